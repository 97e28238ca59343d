"""The still picture of a flow graph is the interactive one: planted graphs in, SVG out."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import toys

from flowhelpers.core.figures import GREY
from flowhelpers.flow.graph import FlowGraph, flow_graph
from flowhelpers.flow.layout import flow_layout
from flowhelpers.flow.svg import MARKS, flow_svg
from flowhelpers.matching.table import match_table

SVG = "{http://www.w3.org/2000/svg}"
LABEL = "a < b & $x^2$ 中 \x00"


@pytest.fixture(scope="module")
def graph() -> FlowGraph:
    """Two chains; one edge is made no better than chance, one label is made hard to write."""
    suite = toys.bare_suite()
    table = match_table(suite, k=1, seed=7)  # of whose draws chance is below 0.6
    found = flow_graph(suite, ["1/res/5", "2/res/3"], table)
    weak = found.edges["null"].mask(found.edges["source"] == "1/mlp/2", 0.61)
    labels = found.nodes["label"].mask(found.nodes["feature"] == "1/res/5", LABEL)
    return replace(
        found, nodes=found.nodes.assign(label=labels), edges=found.edges.assign(null=weak)
    )


@pytest.fixture(scope="module")
def root(graph: FlowGraph) -> ElementTree.Element:
    return ElementTree.fromstring(flow_svg(graph, "suite <toy> & $5$"))


def test_nodes_and_edges_are_there_once_as_in_the_interactive_picture(
    graph: FlowGraph, root: ElementTree.Element
) -> None:
    drawn = {element.attrib["id"]: element for element in root.iter() if "id" in element.attrib}
    layout = flow_layout(graph)
    assert len(drawn) == len(layout.nodes) + len(layout.edges)
    for node in layout.nodes.itertuples():
        (mark,) = drawn[str(node.feature)]
        assert mark.findtext(f"{SVG}title") == str(node.hover).replace("\x00", "�")
        assert (mark.attrib["fill"], mark.attrib["stroke"]) == (node.colour, node.ring)
        assert mark.attrib["d"] == MARKS[str(node.mark)]
    for edge in layout.edges.itertuples():
        line = drawn[f"{edge.source}-{edge.target}"]
        assert line.findtext(f"{SVG}title") == edge.hover
        assert float(line.attrib["stroke-width"]) == pytest.approx(edge.width)
        assert ("stroke-dasharray" in line.attrib) == (edge.source == "1/mlp/2")
        assert (line.attrib["stroke"] == GREY) == (edge.source == "1/mlp/2")
    arrows = [path for path in root.iter(f"{SVG}path") if path.attrib["fill"] == "white"]
    assert len(arrows) == (graph.edges["direction"] == "forward").sum() > 0


def test_text_is_text_and_the_same_graph_gives_the_same_bytes(
    graph: FlowGraph, root: ElementTree.Element
) -> None:
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"The flow through 1/res/5, 2/res/3", "suite <toy> & $5$", "processed"} <= texts
    assert {"a < b & $x^2$ 中 �", "attention", "stream", "MLP"} <= texts
    assert flow_svg(graph, "toy") == flow_svg(graph, "toy")
