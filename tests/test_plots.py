"""Figures show what their tables hold: planted tables in, traces and texts out."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from flowhelpers.plots import (
    COLOURS,
    CONDITIONS,
    GREY,
    TEMPLATE,
    against_chance,
    before_after,
    flow_chain,
    schematic,
    scores_by_layer,
    share_above_null,
    token_text,
)

LABELS = {"1/res/7": "writes <b>, sea\nactive at storm", "1/mlp/2": "writes ship, harbour, mast"}


@pytest.fixture
def flow() -> pd.DataFrame:
    """Three layers around 1/res/7; upward the chain does not go to the node's own best match."""
    nan, none = np.nan, None
    rows = [
        # feature, seed, previous, s, from_res, s, null, from_mlp, s, null, from_att, s, null
        ("0/res/4", False, none, nan, none, nan, nan, "0/mlp/1", 0.2, 0.3, none, 0.0, 0.3),
        (
            "1/res/7",
            True,
            "0/res/4",
            0.8,
            "0/res/4",
            0.8,
            0.4,
            "1/mlp/2",
            0.35,
            0.3,
            none,
            0.0,
            0.3,
        ),
        (
            "2/res/5",
            False,
            "1/res/7",
            0.1,
            "1/res/9",
            0.6,
            0.4,
            none,
            0.0,
            0.3,
            "2/att/3",
            1.0,
            0.3,
        ),
    ]
    columns = ["feature", "is_seed", "previous", "s_previous"]
    columns += [f"{kind}_{m}" for m in ("res", "mlp", "att") for kind in ("from", "s", "null")]
    return pd.DataFrame(rows, columns=columns)


def lines(figure: go.Figure) -> dict[str, go.Scatter]:
    """The edges of a figure by name."""
    return {trace.name: trace for trace in figure.data if "→" in (trace.name or "")}


def notes(figure: go.Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_schematic_draws_an_edge_for_each_match_and_none_without(flow: pd.DataFrame) -> None:
    figure = schematic(flow, "1/res/7", LABELS, "toy")
    edges = lines(figure)
    assert set(edges) == {"0/res/4 → 1/res/7", "1/mlp/2 → 1/res/7"}
    stream, mlp = edges["0/res/4 → 1/res/7"], edges["1/mlp/2 → 1/res/7"]
    assert stream.line.width == pytest.approx(1 + 9 * 0.8)
    assert mlp.line.width == pytest.approx(1 + 9 * 0.35)
    assert (stream.line.color, mlp.line.color) == (COLOURS["res"], COLOURS["mlp"])
    assert stream.y[0] == 0 > mlp.y[0]
    assert "cosine 0.800, above chance (0.400)" in stream.hovertext
    texts = notes(figure)
    assert "<b>0.80</b> (chance 0.40)" in texts
    assert "<b>A<sub>1</sub></b>  no match" in texts
    assert "<b>M<sub>1</sub></b>  1/mlp/2<br>writes ship, harbour, mast" in texts


def test_labels_are_shown_as_text_not_as_markup(flow: pd.DataFrame) -> None:
    figure = schematic(flow, "1/res/7", LABELS, "k < 5")
    mine = next(note for note in figure.layout.annotations if "  1/res/7" in note.text)
    assert mine.text == "<b>R<sub>1</sub></b>  1/res/7<br>writes &lt;b&gt;, sea<br>active at storm"
    assert mine.hovertext == "1/res/7<br>writes &lt;b&gt;, sea<br>active at storm"
    assert figure.layout.title.subtitle.text == "k &lt; 5"


def test_schematic_of_layer_0_says_that_nothing_comes_before(flow: pd.DataFrame) -> None:
    figure = schematic(flow, "0/res/4", {}, "toy")
    assert "<b>before layer 0</b>  nothing" in notes(figure)
    (edge,) = lines(figure).values()
    assert (edge.line.color, edge.line.dash) == (GREY, "dot")  # 0.2 is below its null of 0.3
    assert "not above chance" in edge.hovertext


def test_schematic_of_a_feature_outside_the_flow_is_an_error(flow: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="1/res/9 is not in this flow: it has 0/res/4"):
        schematic(flow, "1/res/9", {}, "toy")


def test_flow_chain_joins_the_nodes_of_the_chain(flow: pd.DataFrame) -> None:
    edges = lines(flow_chain(flow, LABELS, "toy"))
    assert set(edges) == {
        "0/mlp/1 → 0/res/4",
        "0/res/4 → 1/res/7",
        "1/mlp/2 → 1/res/7",
        "1/res/7 → 2/res/5",  # and not 1/res/9, which is no node
        "2/att/3 → 2/res/5",
    }
    up = edges["1/res/7 → 2/res/5"]
    assert up.line.width == pytest.approx(1 + 9 * 0.1)
    assert (up.line.color, up.line.dash) == (GREY, "dot")
    assert (list(up.x), list(up.y)) == ([1, 1.5, 2], [0, 0, 0])
    attention = edges["2/att/3 → 2/res/5"]
    assert (attention.line.color, attention.line.dash) == (COLOURS["att"], "solid")
    assert (attention.y[0], attention.y[-1]) == (1, 0)
    assert edges["0/mlp/1 → 0/res/4"].y[0] == -1


def test_flow_chain_marks_the_seed_and_says_what_nodes_are(flow: pd.DataFrame) -> None:
    nodes = flow_chain(flow, LABELS, "toy").data[-3]
    assert list(nodes.text) == [
        "4",
        "1",
        "7<br>&lt;b&gt;, sea",
        "2<br>ship, harbour,…",
        "5",
        "3",
    ]
    assert list(nodes.marker.size) == [14, 14, 24, 14, 14, 14]
    assert nodes.marker.color[3] == COLOURS["mlp"]
    assert nodes.hovertext[2] == "1/res/7<br>writes &lt;b&gt;, sea<br>active at storm"
    assert nodes.hovertext[4] == "2/res/5"


def test_flow_chain_of_a_deep_model_leaves_out_what_has_no_room(flow: pd.DataFrame) -> None:
    deep = pd.concat([flow] * 4, ignore_index=True)
    assert set(flow_chain(deep, LABELS, "toy").data[-3].text) == {"4", "1", "7", "2", "5", "3"}


def test_token_text_colours_the_characters_of_each_token() -> None:
    tokens = pd.DataFrame({"token": ["ab", " <c", "\n", "d"], "activation": [0.0, 2.5, 1.0, 0.5]})
    (grid,) = token_text(tokens, "title", "toy", columns=4).data
    assert [list(row) for row in grid.text] == [
        ["a", "b", "", ""],
        [" ", "&lt;", "c", "⏎"],
        ["d", "", "", ""],
    ]
    assert [list(row) for row in grid.z] == [
        [0, 0, None, None],
        [2.5, 2.5, 2.5, 1],
        [0.5, None, None, None],
    ]
    assert grid.hovertext[1][0] == "' &lt;c': 2.5"
    assert (grid.zmin, grid.zmax, grid.texttemplate) == (0, 2.5, "%{text}")


def test_token_text_breaks_a_token_that_is_longer_than_a_line() -> None:
    tokens = pd.DataFrame({"token": ["x", "abcdefg"], "activation": [1.0, 0.0]})
    (grid,) = token_text(tokens, "title", "toy", columns=3).data
    assert ["".join(row) for row in grid.text] == ["x", "abc", "def", "g"]


def test_a_text_without_activation_is_white() -> None:
    tokens = pd.DataFrame({"token": ["a"], "activation": [0.0]})
    (grid,) = token_text(tokens, "title", "toy").data
    assert grid.zmin < grid.zmax
    assert grid.colorscale[0][1] == "white"


def test_scores_by_layer_are_the_quantiles_of_each_layer() -> None:
    values = np.linspace(0, 1, 101)
    table = pd.concat(
        [
            pd.DataFrame({"layer": 0, "s_mlp": values, "null_mlp": 0.3}),
            pd.DataFrame(
                {"layer": 1, "s_mlp": values / 2, "null_mlp": 0.2, "s_res": values, "null_res": 0.4}
            ),
        ]
    )
    figure = scores_by_layer(table, "toy")
    stream, stream_null, mlp, mlp_null = figure.data
    assert list(stream.x) == [1]  # layer 0 has no stream before it
    assert (stream.q1[0], stream.median[0], stream.q3[0]) == (0.25, 0.5, 0.75)
    assert (stream.lowerfence[0], stream.upperfence[0]) == pytest.approx((0.05, 0.95))
    assert list(mlp.median) == [0.5, 0.25]
    assert (list(stream_null.y), list(mlp_null.y)) == ([0.4], [0.3, 0.2])
    assert mlp.marker.color == COLOURS["mlp"]
    assert notes(figure) == ["s(R)", "s(M)", "s(A)"]


def test_share_above_null_has_a_line_for_each_score_there_is() -> None:
    summary = pd.DataFrame({"layer": [0, 1], "above_res": [np.nan, 0.9], "above_mlp": [0.5, 0.1]})
    figure = share_above_null(summary, "toy")
    assert [trace.name for trace in figure.data] == ["s(R)", "s(M)"]
    assert list(figure.data[1].y) == [0.5, 0.1]
    assert figure.data[0].marker.symbol != figure.data[1].marker.symbol
    assert [shape.y0 for shape in figure.layout.shapes] == [0.001]


def test_against_chance_puts_both_histograms_on_the_same_bins() -> None:
    both = pd.DataFrame({"found": [0.5, 0.9], "chance": [0.1, 0.2]})
    figure = against_chance(both, 0.33, "title", "toy")
    chance, found = figure.data
    assert (list(chance.x), list(found.x)) == ([0.1, 0.2], [0.5, 0.9])
    assert chance.xbins.to_plotly_json() == found.xbins.to_plotly_json()
    assert figure.layout.shapes[0].x0 == 0.33


def test_before_after_has_a_bar_for_each_row() -> None:
    table = pd.DataFrame(
        {
            "what": ["a\nb", "a\nb", "c", "c"],
            "condition": ["before", "after", "before", "after"],
            "value": [12.34, 0.0, 0.123, 1.0],
        }
    )
    before, after = before_after(table, "title", "activation", "toy").data
    assert (list(before.x), list(before.y)) == (["a<br>b", "c"], [12.34, 0.123])
    assert list(after.y) == [0, 1]
    assert list(before.text) == ["12.3", "0.12"]
    assert (before.name, after.name) == ("before", "after")
    assert (before.marker.color, after.marker.color) == CONDITIONS[:2]


def test_more_conditions_than_colours_are_an_error() -> None:
    table = pd.DataFrame({"what": "a", "condition": range(6), "value": 1.0})
    with pytest.raises(ValueError, match="6 conditions: expected at most 5"):
        before_after(table, "title", "value", "toy")


def test_every_figure_says_suite_and_choices_and_looks_the_same(flow: pd.DataFrame) -> None:
    bars = pd.DataFrame({"what": ["a"], "condition": ["c"], "value": [1.0]})
    scores = pd.DataFrame({"layer": [1], "s_res": [0.5], "null_res": [0.3]})
    figures = [
        schematic(flow, "1/res/7", LABELS, "suite toy"),
        flow_chain(flow, LABELS, "suite toy"),
        token_text(pd.DataFrame({"token": ["a"], "activation": [1.0]}), "title", "suite toy"),
        scores_by_layer(scores, "suite toy"),
        share_above_null(pd.DataFrame({"layer": [1], "above_res": [1.0]}), "suite toy"),
        against_chance(pd.DataFrame({"found": [0.5], "chance": [0.1]}), 0.3, "title", "suite toy"),
        before_after(bars, "title", "value", "suite toy"),
    ]
    for figure in figures:
        assert figure.layout.title.subtitle.text == "suite toy"
        assert figure.layout.title.text
        assert figure.layout.template == TEMPLATE
        assert figure.layout.template.layout.plot_bgcolor == "white"
