"""The still picture of a flow graph is the interactive one: planted graphs in, SVG out."""

import warnings
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import plotly.graph_objects as go
import pytest
import toys
from matplotlib import pyplot

from flowhelpers.flow.graph import FlowGraph, flow_graph
from flowhelpers.flow.layout import flow_layout
from flowhelpers.flow.svg import flow_svg
from flowhelpers.matching.table import match_table
from flowhelpers.runs.run import start_run

SVG = "{http://www.w3.org/2000/svg}"
LABEL = "a < b & $x^2$ 中 \x00"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> FlowGraph:
    """Two chains; one edge is made no better than chance, one label is made hard to write."""
    suite = toys.bare_suite()
    table = match_table(suite, k=1, cache=tmp_path_factory.mktemp("matches"))
    found = flow_graph(suite, ["1/res/5", "2/res/3"], table)
    weak = found.edges["null"].mask(found.edges["source"] == "1/mlp/2", 0.61)
    labels = found.nodes["label"].mask(found.nodes["feature"] == "1/res/5", LABEL)
    return replace(
        found, nodes=found.nodes.assign(label=labels), edges=found.edges.assign(null=weak)
    )


@pytest.fixture(scope="module")
def groups(graph: FlowGraph) -> dict[str, ElementTree.Element]:
    """The groups of its SVG that have a name."""
    root = ElementTree.fromstring(flow_svg(graph, "suite <toy> & $5$"))
    return {group.attrib["id"]: group for group in root.iter(f"{SVG}g") if "id" in group.attrib}


def title(group: ElementTree.Element) -> str | None:
    return group.findtext(f"{SVG}title")


def style(group: ElementTree.Element) -> dict[str, str]:
    (path,) = group.iter(f"{SVG}path")
    return dict(part.split(": ") for part in path.attrib["style"].split("; "))


def test_every_node_is_there_once_with_its_name_and_what_hovers_over_it(
    graph: FlowGraph, groups: dict[str, ElementTree.Element]
) -> None:
    for row in flow_layout(graph).nodes.itertuples():
        assert title(groups[str(row.feature)]) == str(row.hover).replace("\x00", "�")
    assert "a < b & $x^2$ 中" in str(title(groups["1/res/5"]))
    assert flow_svg(graph, "toy").count('<g id="1/res/5">') == 1


def test_edges_are_as_thick_and_dotted_as_in_the_interactive_picture(
    graph: FlowGraph, groups: dict[str, ElementTree.Element]
) -> None:
    for edge in flow_layout(graph).edges.itertuples():
        group = groups[f"{edge.source}-{edge.target}"]
        assert title(group) == edge.hover
        assert float(style(group)["stroke-width"]) == pytest.approx(edge.width)
        assert ("stroke-dasharray" in style(group)) == (edge.source == "1/mlp/2")
        assert (style(group)["stroke"] == "#8c8c8c") == (edge.source == "1/mlp/2")


def test_text_is_text_and_shown_as_it_is(graph: FlowGraph) -> None:
    root = ElementTree.fromstring(flow_svg(graph, "suite <toy> & $5$"))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"The flow through 1/res/5 and 2/res/3", "suite <toy> & $5$"} <= {*texts}
    assert {"a < b & $x^2$ 中 �", "attention", "stream", "MLP", "processed"} <= {*texts}


def test_the_same_graph_gives_the_same_bytes_whatever_the_settings(graph: FlowGraph) -> None:
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings(action="error"):  # not even of characters that no font here has
        first = flow_svg(graph, "toy")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        assert flow_svg(graph, "toy") == first
    assert "<dc:date>" not in first
    assert pyplot.get_fignums() == []


def test_a_run_keeps_it_beside_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWHELPERS_RUN_DIR", str(tmp_path))
    run = start_run("n", {})
    run.figure("with", go.Figure(), "<svg>ß</svg>")
    run.figure("without", go.Figure())
    assert (tmp_path / "figures/with.svg").read_text("utf-8") == "<svg>ß</svg>"
    assert [file.name for file in tmp_path.glob("figures/*.svg")] == ["with.svg"]
