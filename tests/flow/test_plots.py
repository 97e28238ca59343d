"""Figures show what their tables hold: planted tables and graphs in, traces and texts out."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import toys
from torch.nn.functional import normalize

from flowhelpers.core.features import Site
from flowhelpers.core.figures import CLASS_COLOURS, CLASS_MARKS, COLOURS, GREY, INK, MODULE_MARKS
from flowhelpers.flow.files import load_graph, save_graph
from flowhelpers.flow.graph import FlowGraph, flow_graph, labelled
from flowhelpers.flow.layout import flow_layout
from flowhelpers.flow.plots import (
    before_after,
    births_and_deaths,
    flow_picture,
    lifespan_map,
    schematic,
)
from flowhelpers.flow.svg import flow_svg
from flowhelpers.matching.table import match_table

LABELS = pd.DataFrame(
    [
        ("1/res/5", "writes <b>, sea\nactive at storm", "mine.csv"),
        ("1/mlp/2", "writes ship, harbour, mast", "logit lens"),
    ],
    columns=["feature", "label", "label_from"],
)


@pytest.fixture(scope="module")
def chain() -> FlowGraph:
    """0/res/2 → 1/res/5 → 2/res/14 at 0.8, with MLP predecessors at 1, 0.6 and 0.96."""
    suite = toys.bare_suite()
    table = match_table(suite, k=3, seed=7)  # of whose draws chance is below 0.6
    return labelled(flow_graph(suite, "1/res/5", table), LABELS)


@pytest.fixture(scope="module")
def web() -> FlowGraph:
    """Two seeds and three matches of each node, most of them no better than chance."""
    generator = torch.Generator().manual_seed(0)
    planted = toys.planted_directions()
    noise = {site: torch.randn(rows.shape, generator=generator) for site, rows in planted.items()}
    suite = toys.bare_suite({site: normalize(planted[site] + 0.1 * noise[site]) for site in noise})
    table = match_table(suite, k=3)
    return flow_graph(suite, ["1/res/5", "2/res/3"], table, top_n=3)


@pytest.fixture(scope="module")
def deep() -> FlowGraph:
    """32 layers, as wide as they come: indices of six digits."""
    generator = torch.Generator().manual_seed(0)
    sites = [Site(layer, module) for layer in range(32) for module in ("res", "mlp")]
    noise = {site: torch.randn(3, 8, generator=generator) for site in sites}
    directions = {site: normalize(torch.eye(8)[:3] + 0.2 * noise[site]) for site in sites}
    suite = toys.bare_suite(directions, layers=32)
    graph = flow_graph(suite, "9/res/1", match_table(suite, k=1))
    return replace(graph, nodes=graph.nodes.assign(index=graph.nodes["index"] + 131_000))


def nodes(figure: go.Figure) -> pd.DataFrame:
    """The nodes that a flow picture draws, by feature, which their hover begins with."""
    rows = [
        {
            "feature": hover.split("<br>")[0].removesuffix(", a seed"),
            "x": trace.x[number],
            "y": trace.y[number],
            "size": trace.marker.size[number],
            "ring": trace.marker.line.color[number],
            "colour": trace.marker.color,
            "mark": trace.marker.symbol[number],
            "text": trace.text[number],
            "hover": hover,
        }
        for trace in figure.data
        if trace.mode == "markers+text"
        for number, hover in enumerate(trace.hovertext)
    ]
    return pd.DataFrame(rows)


def edges(figure: go.Figure) -> Iterator[tuple[str, str, go.layout.shape.Line]]:
    """Source and target of every line of a flow picture, by what stands at its ends."""
    at = {(row.x, row.y): row.feature for row in nodes(figure).itertuples()}
    for shape in figure.layout.shapes:
        yield at[shape.x0, shape.y0], at[shape.x1, shape.y1], shape.line


def test_schematic_draws_an_edge_for_each_match_and_its_class(chain: FlowGraph) -> None:
    figure = schematic(replace(chain, nodes=chain.nodes.assign(null_mlp=0.7)), "1/res/5", "k < 5")
    drawn = {shape.name: shape for shape in figure.layout.shapes}
    assert set(drawn) == {"0/res/2 → 1/res/5", "1/mlp/2 → 1/res/5"}
    stream, mlp = drawn["0/res/2 → 1/res/5"].line, drawn["1/mlp/2 → 1/res/5"].line
    assert (stream.width, mlp.width) == pytest.approx((1 + 9 * 0.8, 1 + 9 * 0.6))
    assert (stream.color, stream.dash) == (COLOURS["res"], "solid")
    assert (mlp.color, mlp.dash) == (GREY, "dot")  # not above chance
    assert drawn["1/mlp/2 → 1/res/5"].y0 < 0 == drawn["0/res/2 → 1/res/5"].y0
    shown = [note.text for note in figure.layout.annotations]
    null = chain.nodes.set_index("feature").loc["1/res/5", "null_res"]
    assert f"<b>0.80</b> (chance {null:.2f})" in shown
    assert "<b>R</b>  1/res/5<br>processed<br>writes &lt;b&gt;, sea<br>active at storm" in shown
    assert figure.layout.title.subtitle.text == "k &lt; 5"


def test_flow_picture_colours_nodes_by_a_value_and_leaves_others_empty(chain: FlowGraph) -> None:
    values = {"0/res/2": -1.0, "1/res/5": 3.0, "9/res/9": 5.0}
    figure = flow_picture(chain, "toy", values, "strength")
    (valued,) = [trace for trace in figure.data if trace.name == "strength"]
    (empty,) = [trace for trace in figure.data if trace.name == "no strength"]
    assert [*valued.marker.color] == [-1, 3]
    assert valued.marker.cmid == 0
    for hover, (name, value) in zip(valued.hovertext, values.items(), strict=False):
        assert hover.startswith(name)
        assert hover.endswith(f"strength: {value:.3g}")
    assert len(empty.x) + len(valued.x) == len(chain.nodes)
    with pytest.raises(ValueError, match="none of 1 values is of a node of this graph"):
        flow_picture(chain, "toy", {"7/res/7": 1.0}, "strength")


def test_flow_picture_joins_every_edge_once_and_dots_what_is_chance(web: FlowGraph) -> None:
    table = web.edges.set_index(["source", "target"])
    figure = flow_picture(web, "toy")
    drawn = {(source, target): line for source, target, line in edges(figure)}
    assert sorted(drawn) == sorted(table.index)
    above = table["score"] > table["null"]
    assert {*above} == {True, False}
    scale = flow_layout(web).nodes["size"].min() / 14
    for (source, target), line in drawn.items():
        expected = ("dot", GREY)
        if above[source, target]:
            expected = ("solid", COLOURS[source.split("/")[1]])
        assert (line.dash, line.color) == expected
        cosine = table.loc[(source, target), "cosine"]
        assert line.width == pytest.approx((0.5 + 8 * max(cosine, 0)) * scale)
    (marks,) = [trace for trace in figure.data if trace.mode == "markers"]
    ends = [tuple(hover.split("<br>")[0].split(" → ")) for hover in marks.hovertext]
    arrows = dict(zip(ends, marks.marker.opacity, strict=True))
    assert arrows == (table["direction"] == "forward").to_dict()


@pytest.mark.parametrize("name", ["chain", "web", "deep"])
def test_flow_picture_draws_every_node_once_and_none_touches_another(
    name: str, request: pytest.FixtureRequest
) -> None:
    graph = request.getfixturevalue(name)
    figure = flow_picture(graph, "toy")
    drawn = nodes(figure)
    assert sorted(drawn["feature"]) == sorted(graph.nodes["feature"])
    x, y, size = drawn[["x", "y", "size"]].to_numpy().T
    apart = np.hypot(np.subtract.outer(x, x), np.subtract.outer(y, y))
    np.fill_diagonal(apart, np.inf)
    assert (apart > np.add.outer(size, size) / 2).all()
    (_, width), (height, _) = figure.layout.xaxis.range, figure.layout.yaxis.range
    assert drawn["x"].between(0, width).all()
    assert drawn["y"].between(0, height).all()


def test_flow_picture_keeps_layers_and_lanes_and_crosses_no_chains(web: FlowGraph) -> None:
    figure = flow_picture(web, "toy")
    drawn, axis = nodes(figure), figure.layout.xaxis
    parts = drawn["feature"].str.split("/", expand=True)
    at, module = parts[0].astype(int), parts[1]
    layers = dict(zip(axis.ticktext, axis.tickvals, strict=True))
    assert [*layers] == sorted({*at})
    ahead = at.map(layers) - drawn["x"]
    assert np.allclose(ahead[module == "res"], 0)
    assert np.allclose(ahead[module != "res"], 0.4 * (layers[1] - layers[0]))
    lanes = drawn["y"].groupby(module).agg(["min", "max"])
    for upper, lower in pairwise(["att", "res", "mlp"]):
        assert lanes.loc[upper, "max"] + 1 < lanes.loc[lower, "min"]
    # Parallel chains do not cross.
    suite = toys.bare_suite()
    table, seeds = match_table(suite, k=3), ["1/res/5", "1/res/9"]
    graph = flow_graph(suite, seeds, table)
    height = nodes(flow_picture(graph, "toy")).set_index("feature")["y"]
    chains = [flow_graph(suite, seed, table).chain["feature"] for seed in seeds]
    upper, lower = (height[chain].to_numpy() for chain in chains)
    assert len({*(upper > lower)}) == 1 < len(upper)


def test_flow_picture_rings_seeds_and_colours_classes(web: FlowGraph) -> None:
    known = web.nodes.set_index("feature")
    drawn = nodes(flow_picture(web, "toy")).set_index("feature")
    is_seed = known["is_seed"].reindex(drawn.index)
    assert drawn.loc[is_seed, "size"].min() > drawn.loc[~is_seed, "size"].max()
    assert (drawn["ring"] == is_seed.map({True: INK, False: "white"})).all()
    kind = known["class"].fillna(known["module"]).reindex(drawn.index)
    assert (drawn["colour"] == kind.map(CLASS_COLOURS | COLOURS)).all()
    assert (drawn["mark"] == kind.map(CLASS_MARKS | MODULE_MARKS)).all()
    assert len({*CLASS_MARKS.values()}) == len(CLASS_MARKS)


def test_many_seeds_leave_out_what_is_no_higher_than_chance_unless_asked(web: FlowGraph) -> None:
    above = web.edges[web.edges["score"] > web.edges["null"]]
    joined = {*above["source"], *above["target"], *web.seeds}
    assert joined < {*web.nodes["feature"]}
    alone = next(name for name in web.nodes["feature"] if name not in joined)
    many = replace(web, seeds=(*web.seeds, *["1/res/5"] * 3))
    figure = flow_picture(many, "toy")
    assert {*nodes(figure)["feature"]} == joined
    assert len(figure.layout.shapes) == len(above) < len(web.edges)
    said = f"{len(web.edges) - len(above)} of {len(web.edges)} matches, no higher than chance,"
    assert said in figure.layout.title.subtitle.text
    assert {*nodes(flow_picture(many, "toy", by_chance=True))["feature"]} == {*web.nodes["feature"]}
    assert {*nodes(flow_picture(web, "toy", by_chance=False))["feature"]} == joined
    valued = flow_picture(many, "toy", {alone: 1.0}, "strength")
    assert {trace.name: len(trace.x) for trace in valued.data}["strength"] == 1
    assert flow_svg(many, "toy").count('<a id="') == len(joined)
    named = flow_picture(web, "toy", title="Cut at 0.5")
    assert named.layout.title.text == "Cut at 0.5"
    assert "Cut at 0.5" in flow_svg(web, "toy", title="Cut at 0.5")


def test_captions_hold_labels_in_a_few_layers_and_numbers_in_many(
    chain: FlowGraph, deep: FlowGraph
) -> None:
    few = nodes(flow_picture(chain, "toy")).set_index("feature")
    assert few.loc["1/mlp/2", "text"] == "2<br>ship, harbour, mast"
    assert few.loc["2/mlp/2", ["text", "hover"]].tolist() == ["2", "2/mlp/2"]
    label = "label: writes &lt;b&gt;, sea<br>active at storm<br>label_from: mine.csv"
    assert label in few.loc["1/res/5", "hover"]
    many = nodes(flow_picture(deep, "toy"))["text"]
    assert {*many} <= {"131000", "131001", "131002"}
    layout = flow_layout(deep)
    assert layout.layers[1] - layout.layers[0] > 0.55 * 12 * 6
    drawn = flow_picture(deep, "toy").data
    fonts = [trace.textfont.size for trace in drawn if trace.mode == "markers+text"]
    assert {*fonts} == {12}
    # A long label has two lines of whole words, as wide as a layer.
    long = chain.nodes.assign(label="writes " + ", ".join(["telescope"] * 90))
    caption = nodes(flow_picture(replace(chain, nodes=long), "toy"))["text"].iloc[0].split("<br>")
    assert len(caption) == 3
    assert {word.strip(",…") for line in caption[1:] for word in line.split()} == {"telescope"}
    assert caption[2].endswith("…")
    # Where they are too high there are none.
    named = chain.nodes["feature"]
    rows = pd.concat([chain.nodes.assign(feature=named + f"/{n}") for n in range(200)])
    layout = flow_layout(replace(chain, nodes=rows.reset_index(), edges=chain.edges[:0]))
    assert {*layout.nodes["caption"]} == {""}
    assert layout.nodes["size"].max() < layout.nodes["y"].sort_values().diff().max()


def test_births_lifespans_and_conditions_are_drawn_as_in_their_tables() -> None:
    table = pd.DataFrame({"layer": [0, 1], "born_mlp": [0.1, 0.2], "born_att": [0, 0.3]})
    table["dies"] = [0.4, np.nan]
    mlp, att, dies = births_and_deaths(table, "toy").data
    assert (list(mlp.y), list(att.y), dies.y[0]) == ([0.1, 0.2], [0, 0.3], 0.4)
    assert np.isnan(dies.y[1])
    runs = [(0, 0, 1), (1, 0, 1), (0, 0, 0), (0, 0, 1), (1, 0, 1), (2, 2, 2)]
    (grid,) = lifespan_map(pd.DataFrame(runs, columns=["layer", "first", "last"]), "toy").data
    counts = np.array([[1, 2, np.nan], [np.nan] * 3, [np.nan, np.nan, 1]])
    assert np.array_equal(np.array(grid.z, dtype=float), counts, equal_nan=True)
    assert (list(grid.x), list(grid.y)) == ([0, 1, 2], [0, 1, 2])
    table = pd.DataFrame({"what": ["a<\nb", "a<\nb", "c", "c"], "value": [12.34, 0.0, 0.123, 1]})
    table["condition"] = ["before", "after"] * 2
    before, after = before_after(table, "title", "activation", "toy").data
    assert (list(before.y), list(before.x)) == (["a&lt;<br>b", "c"], [12.34, 0.123])
    assert (before.name, after.name, list(after.x)) == ("before", "after", [0, 1])
    assert {(bar.constraintext, bar.textfont.size) for bar in (before, after)} == {("none", 12)}


@pytest.fixture(scope="module")
def linked() -> FlowGraph:
    """A graph of a suite whose stream and MLP, but not its attention, are on Neuronpedia."""
    bare = toys.bare_suite()
    names = {at: f"toy-model/{at.layer}-{at.module}" for at in bare.saes if at.module != "att"}
    suite = replace(bare, row=replace(bare.row, neuronpedia=names))
    of_attention = f"2/res/{toys.COORDINATE[2].index(13)}"
    return flow_graph(suite, ["1/res/5", of_attention], match_table(suite, k=1))


def test_every_node_has_its_page_in_the_graph_and_in_its_file(
    linked: FlowGraph, tmp_path: Path
) -> None:
    for node in linked.nodes.itertuples():
        page = f"https://www.neuronpedia.org/toy-model/{node.layer}-{node.module}/{node.index}"
        assert node.link == ("" if node.module == "att" else page)
    bad = replace(linked, nodes=linked.nodes.assign(link="javascript:alert(1)"))
    for graph, links in ((linked, linked.nodes["link"].tolist()), (bad, [""] * len(bad.nodes))):
        save_graph(graph, tmp_path / "graph.json")
        assert load_graph(tmp_path / "graph.json").nodes["link"].tolist() == links


def test_nodes_lead_to_their_pages_in_every_picture(linked: FlowGraph, chain: FlowGraph) -> None:
    links = linked.nodes.loc[linked.nodes["link"] != "", ["feature", "link"]]
    svg = flow_svg(linked, "toy")
    values = dict.fromkeys(["1/res/5"], 1.0)
    for figure in (flow_picture(linked, "toy"), flow_picture(linked, "toy", values, "strength")):
        drawn = nodes(figure).set_index("feature")
        for feature, link in links.itertuples(index=False):
            index = feature.rpartition("/")[2]
            assert drawn.loc[feature, "text"] == f'<a href="{link}" target="_blank">{index}</a>'
        assert drawn["text"].str.contains("<a ").sum() == len(links)
    for feature, link in links.itertuples(index=False):
        assert f'<a id="{feature}" href="{link}" target="_blank">' in svg
    assert svg.count('<a id="') == len(linked.nodes) > svg.count(" href=") == len(links)
    assert "<a " not in str(flow_picture(chain, "toy").to_json())
