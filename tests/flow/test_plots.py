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
from flowhelpers.core.figures import CLASS_COLOURS, COLOURS, GREY, INK
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
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matches")


@pytest.fixture(scope="module")
def chain(cache: Path) -> FlowGraph:
    """0/res/2 → 1/res/5 → 2/res/14 at 0.8, with MLP predecessors at 1, 0.6 and 0.96."""
    suite = toys.bare_suite()
    return labelled(flow_graph(suite, "1/res/5", match_table(suite, k=3, cache=cache)), LABELS)


@pytest.fixture(scope="module")
def web(cache: Path) -> FlowGraph:
    """Two seeds and three matches of each node, most of them no better than chance."""
    generator = torch.Generator().manual_seed(0)
    planted = toys.planted_directions()
    noise = {site: torch.randn(rows.shape, generator=generator) for site, rows in planted.items()}
    suite = toys.bare_suite({site: normalize(planted[site] + 0.1 * noise[site]) for site in noise})
    table = match_table(suite, k=3, cache=cache)
    return flow_graph(suite, ["1/res/5", "2/res/3"], table, top_n=3)


@pytest.fixture(scope="module")
def deep(cache: Path) -> FlowGraph:
    """32 layers, as wide as they come: indices of six digits."""
    generator = torch.Generator().manual_seed(0)
    sites = [Site(layer, module) for layer in range(32) for module in ("res", "mlp")]
    noise = {site: torch.randn(3, 8, generator=generator) for site in sites}
    directions = {site: normalize(torch.eye(8)[:3] + 0.2 * noise[site]) for site in sites}
    suite = toys.bare_suite(directions, layers=32)
    graph = flow_graph(suite, "9/res/1", match_table(suite, k=1, cache=cache))
    return replace(graph, nodes=graph.nodes.assign(index=graph.nodes["index"] + 131_000))


def notes(figure: go.Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def nodes(figure: go.Figure) -> pd.DataFrame:
    """The nodes that a flow picture draws, by feature, which their hover begins with."""
    rows = [
        {
            "feature": hover.split("<br>")[0].removesuffix(", a seed"),
            "x": trace.x[number],
            "y": trace.y[number],
            "size": trace.marker.size[number],
            "ring": trace.marker.line.color[number] if trace.name != "no strength" else "",
            "colour": trace.marker.color,
            "text": trace.text[number],
            "hover": hover,
        }
        for trace in figure.data
        if trace.mode == "markers+text"
        for number, hover in enumerate(trace.hovertext)
    ]
    return pd.DataFrame(rows)


def edges(figure: go.Figure) -> Iterator[tuple[str, str, go.scatter.Line]]:
    """Source and target of every line of a flow picture, by what stands at its ends."""
    at = {(row.x, row.y): row.feature for row in nodes(figure).itertuples()}
    for trace in figure.data:
        if trace.mode == "lines" and trace.x[0] is not None:
            ends = list(zip(trace.x, trace.y, strict=True))
            for start, end, gap in zip(ends[::3], ends[1::3], ends[2::3], strict=True):
                assert gap == (None, None)
                yield at[start], at[end], trace.line


def marks(figure: go.Figure) -> list[tuple[str, float]]:
    """What hovers over each edge, and whether a mark is seen there."""
    return [
        (hover, trace.marker.opacity)
        for trace in figure.data
        if trace.mode == "markers"
        for hover in trace.hovertext
    ]


def hover_of(graph: FlowGraph, feature: str) -> list[str]:
    drawn = nodes(flow_picture(graph, "toy")).set_index("feature")
    return str(drawn.loc[feature, "hover"]).split("<br>")


def test_schematic_draws_an_edge_for_each_match_and_its_class(chain: FlowGraph) -> None:
    given = {"null_mlp": 0.7, "high_res": 0.123, "high_mlp": -0.5, "high_att": np.nan}
    figure = schematic(replace(chain, nodes=chain.nodes.assign(**given)), "1/res/5", "k < 5")
    drawn = {trace.name: trace for trace in figure.data if "→" in (trace.name or "")}
    assert set(drawn) == {"0/res/2 → 1/res/5", "1/mlp/2 → 1/res/5"}
    stream, mlp = drawn["0/res/2 → 1/res/5"].line, drawn["1/mlp/2 → 1/res/5"].line
    assert (stream.width, mlp.width) == pytest.approx((1 + 9 * 0.8, 1 + 9 * 0.6))
    assert (stream.color, stream.dash) == (COLOURS["res"], "solid")
    assert (mlp.color, mlp.dash) == (GREY, "dot")  # not above chance
    assert drawn["1/mlp/2 → 1/res/5"].y[0] < 0 == drawn["0/res/2 → 1/res/5"].y[0]
    shown = notes(figure)
    null = chain.nodes.set_index("feature").loc["1/res/5", "null_res"]
    assert f"<b>0.80</b> (chance {null:.2f})" in shown
    assert "<b>A<sub>1</sub></b>  no match" in shown
    assert "<b>M<sub>1</sub></b>  1/mlp/2<br>writes ship, harbour, mast" in shown
    (mine,) = (note for note in shown if note.startswith("<b>R<sub>1</sub></b>  1/res/5<br>"))
    limits = "processed (high above .12 / -.50 / –)"
    assert mine.split("<br>")[1:] == [limits, "writes &lt;b&gt;, sea", "active at storm"]
    assert figure.layout.title.subtitle.text == "k &lt; 5"
    assert "<b>before layer 0</b>  nothing" in notes(schematic(chain, "0/res/2", "toy"))


def test_flow_picture_colours_nodes_by_a_value_and_leaves_others_empty(chain: FlowGraph) -> None:
    values = {"0/res/2": -1.0, "1/res/5": 3.0, "9/res/9": 5.0}
    figure = flow_picture(chain, "toy", values, "strength")
    (valued,) = [trace for trace in figure.data if trace.name == "strength"]
    (empty,) = [trace for trace in figure.data if trace.name == "no strength"]
    assert [*valued.marker.color] == [-1, 3]
    assert valued.marker.cmid == 0
    for hover, (name, value) in zip(valued.hovertext, values.items(), strict=False):
        assert hover.startswith(name)
        assert hover.endswith(f"strength {value:.3g}")
    assert empty.marker.color == "white"
    assert len(empty.x) + len(valued.x) == len(chain.nodes)


def test_what_the_graph_does_not_have_cannot_be_drawn(chain: FlowGraph) -> None:
    with pytest.raises(ValueError, match="none of 1 values is of a node of this graph"):
        flow_picture(chain, "toy", {"7/res/7": 1.0}, "strength")
    for feature in ("1/res/9", "1/mlp/2"):
        with pytest.raises(ValueError, match=f"{feature} is no residual.*valid: 0/res/2, 1/res/5"):
            schematic(chain, feature, "toy")


def test_flow_picture_joins_every_edge_once_and_dots_what_is_chance(web: FlowGraph) -> None:
    table = web.edges.set_index(["source", "target"])
    drawn = {(source, target): line for source, target, line in edges(flow_picture(web, "toy"))}
    assert sorted(drawn) == sorted(table.index)
    above = table["score"] > table["null"]
    assert {*above} == {True, False}
    for (source, target), line in drawn.items():
        module = source.split("/")[1]
        expected = ("solid", COLOURS[module]) if above[source, target] else ("dot", GREY)
        assert (line.dash, line.color) == expected
        cosine = table.loc[(source, target), "cosine"]
        scale = flow_layout(web).nodes["size"].min() / 14
        assert line.width == pytest.approx((0.5 + 8 * max(cosine, 0)) * scale, abs=0.126)


def test_flow_picture_bears_an_arrow_on_forward_edges_and_only_there(web: FlowGraph) -> None:
    names = web.edges["source"] + " → " + web.edges["target"]
    drawn = marks(flow_picture(web, "toy"))
    seen = {hover.split("<br>")[0] for hover, opacity in drawn if opacity}
    assert seen == {*names[web.edges["direction"] == "forward"]}
    assert {hover.split("<br>")[0] for hover, _ in drawn} == {*names}


@pytest.mark.parametrize("name", ["chain", "web", "deep"])
def test_flow_picture_draws_every_node_once_and_none_touches_another(
    name: str, request: pytest.FixtureRequest
) -> None:
    graph = request.getfixturevalue(name)
    figure = flow_picture(graph, "toy")
    drawn = nodes(figure)
    assert sorted(drawn["feature"]) == sorted(graph.nodes["feature"])
    (left, right), (low, high) = figure.layout.xaxis.range, figure.layout.yaxis.range
    layout = flow_layout(graph)
    x = drawn["x"].to_numpy() * layout.width / (right - left)
    y = drawn["y"].to_numpy() * layout.height / (high - low)
    apart = np.hypot(np.subtract.outer(x, x), np.subtract.outer(y, y))
    radii = np.add.outer(drawn["size"].to_numpy(), drawn["size"].to_numpy()) / 2
    np.fill_diagonal(apart, np.inf)
    assert (apart > radii).all()
    assert drawn["x"].between(left, right).all()
    assert drawn["y"].between(low, high).all()


@pytest.mark.parametrize("name", ["web", "deep"])
def test_flow_picture_keeps_layers_and_lanes(name: str, request: pytest.FixtureRequest) -> None:
    figure = flow_picture(request.getfixturevalue(name), "toy")
    drawn = nodes(figure)
    parts = drawn["feature"].str.split("/", expand=True)
    layer, module = parts[0].astype(int), parts[1]
    assert (drawn["x"][module == "res"] == layer[module == "res"]).all()
    assert np.allclose(drawn["x"][module != "res"], layer[module != "res"] - 0.4)
    lanes = drawn["y"].groupby(module).agg(["min", "max"])
    order = [lane for lane in ("mlp", "res", "att") if lane in lanes.index]
    assert all(lanes.loc[a, "max"] + 1 < lanes.loc[b, "min"] for a, b in pairwise(order))
    assert figure.layout.yaxis.ticktext == ("attention", "stream", "MLP")
    assert list(figure.layout.xaxis.tickvals) == sorted({*layer})


def test_parallel_chains_do_not_cross(cache: Path) -> None:
    suite = toys.bare_suite()
    graph = flow_graph(suite, ["1/res/5", "1/res/9"], match_table(suite, k=3, cache=cache))
    height = nodes(flow_picture(graph, "toy")).set_index("feature")["y"]
    upper, lower = (
        [height[f"{layer}/res/{order.index(c)}"] for layer, order in toys.COORDINATE.items()]
        for c in (toys.COORDINATE[1][5], toys.COORDINATE[1][9])
    )
    assert len({(a > b) for a, b in zip(upper, lower, strict=True)}) == 1


def test_flow_picture_rings_seeds_and_colours_classes(web: FlowGraph) -> None:
    known = web.nodes.set_index("feature")
    drawn = nodes(flow_picture(web, "toy")).set_index("feature")
    seeds = drawn.index.isin(["1/res/5", "2/res/3"])
    assert drawn["size"][seeds].min() > drawn["size"][~seeds].max()
    assert {*drawn["ring"][seeds]} == {INK}
    assert {*drawn["ring"][~seeds]} == {"white"}
    for feature, colour in drawn["colour"].items():
        row = known.loc[str(feature)]
        palette = CLASS_COLOURS if row["module"] == "res" else COLOURS
        assert colour == palette[row["class"] if row["module"] == "res" else row["module"]]


def test_hovers_hold_label_source_scores_and_thresholds(chain: FlowGraph) -> None:
    row = chain.nodes.set_index("feature").loc["1/res/5"]
    assert hover_of(chain, "1/res/5") == [
        "1/res/5, a seed",
        "writes &lt;b&gt;, sea",
        "active at storm",
        "(label from mine.csv)",
        "processed",
        f"s(R) = 0.800 &gt; {row['high_res']:.3f}, from 0/res/2",
        f"s(M) = 0.600 &gt; {row['high_mlp']:.3f}, from 1/mlp/2",
    ]
    assert hover_of(chain, "2/mlp/2") == ["2/mlp/2"]
    strict = replace(chain, nodes=chain.nodes.assign(high_mlp=0.7))
    assert "s(M) = 0.600 ≤ 0.700, from 1/mlp/2" in hover_of(strict, "1/res/5")


def test_hovers_of_edges_hold_cosine_margin_and_null(chain: FlowGraph) -> None:
    edge = chain.edges.iloc[-1]
    (hover,) = (text for text, seen in marks(flow_picture(chain, "toy")) if seen)
    assert hover.split("<br>") == [
        "1/res/5 → 2/res/14",
        f"cosine 0.800, above chance ({edge['null']:.3f})",
        "100.0% of chance lies below",
        "rank 1 for the earlier feature, mutual",
        "margin over the next 0.800",
    ]
    table = chain.edges.assign(margin=np.nan, mutual=False, direction="backward", null=0.9)
    table["score"] = 0.7
    other = replace(chain, edges=table, choices={"method": "pearson"})
    hover = dict.fromkeys(text for text, _ in marks(flow_picture(other, "toy"))).popitem()[0]
    assert "correlation 0.700 (cosine 0.800), not above chance (0.900)" in hover
    nearly = replace(chain, edges=table.assign(score=table["cosine"] * (1 + 1e-7)))
    hover = dict.fromkeys(text for text, _ in marks(flow_picture(nearly, "toy"))).popitem()[0]
    assert "correlation" not in hover
    assert hover.endswith("rank 1 for the later feature, not mutual")


def test_captions_hold_labels_in_a_few_layers_and_numbers_in_many(
    chain: FlowGraph, deep: FlowGraph
) -> None:
    few = nodes(flow_picture(chain, "toy")).set_index("feature")["text"]
    assert few["1/mlp/2"] == "2<br>ship, harbour, mast"
    assert few["2/mlp/2"] == "2"
    many = nodes(flow_picture(deep, "toy"))["text"]
    assert {*many} <= {"131000", "131001", "131002"}
    layout = flow_layout(deep)
    between = layout.width / (layout.across[1] - layout.across[0])
    assert layout.font > 7
    assert 0.6 * layout.font * 6 < between


def test_a_graph_too_high_for_captions_has_none(chain: FlowGraph) -> None:
    wide = [
        chain.nodes.assign(feature=[f"{at}/{number}" for at in chain.nodes["feature"]])
        for number in range(200)
    ]
    graph = replace(chain, nodes=pd.concat(wide, ignore_index=True), edges=chain.edges[:0])
    layout = flow_layout(graph)
    assert {*layout.nodes["caption"]} == {""}
    assert layout.nodes["size"].max() < layout.height / (layout.up[1] - layout.up[0])


def test_births_and_deaths_has_a_line_for_each_and_ends_deaths_before_the_last_layer() -> None:
    table = pd.DataFrame(
        {"layer": [0, 1], "born_mlp": [0.1, 0.2], "born_att": [0, 0.3], "dies": [0.4, np.nan]}
    )
    mlp, att, dies = births_and_deaths(table, "toy").data
    assert (list(mlp.y), list(att.y), dies.y[0]) == ([0.1, 0.2], [0, 0.3], 0.4)
    assert np.isnan(dies.y[1])
    assert [mlp.name, att.name] == ["born of the MLP", "born of attention"]
    assert (mlp.line.color, att.line.color) == (COLOURS["mlp"], COLOURS["att"])


def test_lifespan_map_counts_every_run_once_where_it_begins() -> None:
    runs = [(0, 0, 1), (1, 0, 1), (0, 0, 0), (0, 0, 1), (1, 0, 1), (2, 2, 2)]
    (grid,) = lifespan_map(pd.DataFrame(runs, columns=["layer", "first", "last"]), "toy").data
    counts = [["1", "2", ""], ["", "", ""], ["", "", "1"]]
    assert [list(row) for row in grid.text] == counts
    expected = [[np.log10(float(n)) if n else np.nan for n in row] for row in counts]
    assert np.array_equal(np.array(grid.z, dtype=float), expected, equal_nan=True)
    assert (list(grid.x), list(grid.y)) == ([0, 1, 2], [0, 1, 2])


def test_before_after_has_a_bar_for_each_row() -> None:
    table = pd.DataFrame({"what": ["a<\nb", "a<\nb", "c", "c"], "value": [12.34, 0.0, 0.123, 1]})
    table["condition"] = ["before", "after"] * 2
    before, after = before_after(table, "title", "activation", "toy").data
    assert (list(before.x), list(before.y)) == (["a&lt;<br>b", "c"], [12.34, 0.123])
    assert (before.name, after.name, list(after.y)) == ("before", "after", [0, 1])
    assert before.marker.color != after.marker.color


@pytest.fixture(scope="module")
def linked(cache: Path) -> FlowGraph:
    """A graph of a suite whose stream and MLP, but not its attention, are on Neuronpedia."""
    bare = toys.bare_suite()
    names = {at: f"toy-model/{at.layer}-{at.module}" for at in bare.saes if at.module != "att"}
    suite = replace(bare, row=replace(bare.row, neuronpedia=names))
    of_attention = f"2/res/{toys.COORDINATE[2].index(13)}"
    return flow_graph(suite, ["1/res/5", of_attention], match_table(suite, k=1, cache=cache))


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
            assert f"<br>{link}" in drawn.loc[feature, "hover"]
        assert drawn["text"].str.contains("<a ").sum() == len(links)
    for feature, link in links.itertuples(index=False):
        group = svg.partition(f'<g id="{feature}">')[2].partition("</g>")[0]
        assert f'<a xlink:href="{link}" target="_blank">' in group
    assert svg.count('<a xlink:href="') == len(links)
    assert sum("<a " in text for text in notes(schematic(linked, "1/res/5", "toy"))) == 3
    bare = str(flow_picture(chain, "toy").to_json()) + str(schematic(chain, "1/res/5", "toy"))
    assert "<a " not in bare + flow_svg(chain, "toy")
