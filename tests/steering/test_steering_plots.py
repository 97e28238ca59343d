"""The figures of the steering experiments show what the tables hold, and leave out the rest."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from flowhelpers.core.figures import COLOURS
from flowhelpers.steering.plots import (
    BEST,
    CONTROL_LOOKS,
    SPARE_LOOKS,
    STRATEGY_LOOKS,
    best_by_layer,
    best_by_strength,
    dose_response,
    features_by_layer,
    score_against,
    steered_by_layer,
    strategies_by_theme,
    suppression_by_layer,
)

CAPTION = "suite toy · n = 24"
LONG = "Research methodology and experimentation"
NONE = np.nan


def means(rows: list[tuple]) -> pd.DataFrame:
    """Cells of theme, strategy, layer, strength, behavioral and coherence, in this order.

    Every interval goes from 0.01 below to 0.02 above; the score is the product.
    """
    names = ["theme", "strategy", "layer", "strength", "behavioral", "coherence"]
    table = pd.DataFrame(rows, columns=names).assign(n=24, missing=0)
    table["score"] = table["behavioral"] * table["coherence"]
    for value in ("behavioral", "coherence", "score"):
        table[f"{value}_low"] = table[value] - 0.01
        table[f"{value}_high"] = table[value] + 0.02
    table["norm"] = table["strength"].abs() * 10
    return table.assign(kl=table["strength"].abs() / 1000)


def base(theme: str = "Gods") -> tuple:
    return (theme, "unsteered", None, None, 0.5, 0.8)


def suppressed() -> pd.DataFrame:
    """Two strategies, three r, three layers in a wrong order; the best layers are planted."""
    rows = [base()]
    best = {("single", 0): 4, ("single", -4): 2, ("single", -16): 0,
            ("cumulative", 0): 2, ("cumulative", -4): 2, ("cumulative", -16): 4}  # fmt: skip
    for (strategy, r), layer in best.items():
        rows += [("Gods", strategy, x, r, 0.5, 0.9 if x == layer else 0.4) for x in (4, 0, 2)]
    return means(rows)


def in_panel(figure: go.Figure, row: int, col: int) -> dict:
    """The traces of a panel that hold points, by name, without bands."""
    traces = [t for t in figure.select_traces(row=row, col=col) if t.type == "bar" or not t.fill]
    drawn = [trace for trace in traces if len(trace.x) and trace.x[0] is not None]
    found = {trace.name: trace for trace in drawn}
    assert len(found) == len(drawn)
    return found


def bands(figure: go.Figure, row: int, col: int) -> dict:
    traces = figure.select_traces(row=row, col=col, selector={"fill": "toself"})
    return {trace.legendgroup: trace for trace in traces}


def check_bars(trace) -> None:
    assert list(trace.error_y.array) == pytest.approx([0.02] * len(trace.x))
    assert list(trace.error_y.arrayminus) == pytest.approx([0.01] * len(trace.x))


def check_base(figure: go.Figure, row: int, col: int, value: float, name="unsteered") -> None:
    """A dashed black line at the value through the whole panel, its interval as a pale band."""
    line, band = in_panel(figure, row, col)[name], bands(figure, row, col)[name]
    assert set(line.y) == {value}
    assert line.mode == "lines"
    if name == "unsteered":
        assert (line.line.dash, line.line.color) == ("dash", "#222222")
    drawn = [t for t in in_panel(figure, row, col).values() if getattr(t, "mode", "") != "lines"]
    places = [x for trace in drawn for x in trace.x]
    assert min(line.x) < min(places) <= max(places) < max(line.x)
    assert (min(band.x), max(band.x)) == (min(line.x), max(line.x))
    assert list(band.y) == pytest.approx([value - 0.01] * 2 + [value + 0.02] * 2)
    assert band.x[0] == band.x[3] < band.x[1] == band.x[2]
    assert band.opacity <= 0.15


def legend(figure: go.Figure) -> list[str]:
    return [trace.name for trace in figure.data if trace.showlegend]


def panel_titles(figure: go.Figure) -> list[str]:
    return [each.text for each in figure.layout.annotations]


def verticals(figure: go.Figure) -> list[tuple]:
    return [(shape.xref, shape.x0) for shape in figure.layout.shapes if shape.x0 == shape.x1]


def activated() -> pd.DataFrame:
    """Two themes, of which one lacks a strategy, with controls."""
    rows = [base("Gods"), base(LONG)]
    rows += [("Gods", "prompting", None, None, 0.7, 0.7)]
    for theme, more in (("Gods", 0.0), (LONG, 0.1)):
        rows.append((theme, "random features", 4, 8, 0.1 + more, 0.5))
        rows.append((theme, "single", 12, 4, 0.3 + more, 0.5))
        rows.append((theme, "linear", 9, 2, 0.4 + more, 0.5))
    rows.append((LONG, "own <b>", 9, 2, 0.2, 0.5))
    return means(rows)


def by_strength() -> pd.DataFrame:
    rows = [base(), ("Gods", "prompting", None, None, 0.7, 0.7)]
    rows += [("Gods", "single", 8, r, 0.1, c) for r, c in ((-4, 0.4), (0, 0.2), (-16, 0.6))]
    rows += [("Gods", "seeds only", 12, r, 0.2, c) for r, c in ((-1, 0.5), (-16, 0.3))]
    return means(rows)


def by_layer() -> pd.DataFrame:
    rows = [base(), base(LONG), ("Gods", "seeds only", None, 3, 0.2, 0.2)]
    rows += [("Gods", "single", x, 4, 0.1, c) for x, c in ((12, 0.5), (4, 0.4))]
    rows += [("Gods", "linear", x, 2, 0.2, c) for x, c in ((4, 0.6), (12, NONE))]
    rows += [(LONG, "single", 9, 1, 0.1, 0.1)]
    return means(rows)


def selected() -> pd.DataFrame:
    rows = [(5, "res"), (5, "mlp"), (5, "res"), (7, "att"), (3, "mlp")]
    return pd.DataFrame(rows, columns=["layer", "module"])


def one_theme(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["theme"] == "Gods"]


def test_every_figure_asks_and_says_suite_n_and_choices():
    figures = [
        suppression_by_layer(suppressed(), CAPTION),
        best_by_strength(by_strength(), CAPTION),
        strategies_by_theme(activated(), CAPTION),
        best_by_layer(by_layer(), CAPTION, {"Gods": 12}),
        features_by_layer(selected(), CAPTION, 12),
        steered_by_layer(one_theme(by_layer()), CAPTION, 12),
        dose_response(by_strength(), CAPTION),
        score_against(activated(), CAPTION),
        score_against(activated(), CAPTION, by="kl"),
    ]
    assert len({figure.layout.title.text for figure in figures}) == len(figures)
    for figure in figures:
        assert figure.layout.title.text.endswith("?")
        assert figure.layout.title.subtitle.text == CAPTION
        assert figure.layout.legend.y < 0
        assert figure.layout.margin.b >= 115
        assert len(legend(figure)) == len(set(legend(figure))) > 0


def test_suppression_has_a_panel_a_value_and_strategy_and_a_line_an_r():
    table = suppressed()
    table.loc[table["layer"] == 2, "missing"] = 3
    figure = suppression_by_layer(table, CAPTION)
    assert "“Gods”" in figure.layout.title.text
    assert panel_titles(figure) == ["single", "cumulative"]
    names = ["unsteered", "r = 0", "r = −4", "r = −16", "best layer of each r, by score"]
    assert legend(figure) == names
    assert [axis.title.text for axis in figure.select_yaxes(col=1)] == [
        "behavioral B", "coherence C", "score (1 − B) · C",
    ]  # fmt: skip
    for row, value in enumerate((0.5, 0.8, 0.4), 1):
        for col in (1, 2):
            check_base(figure, row, col, value)
            assert [*in_panel(figure, row, col)] == names
            assert list(in_panel(figure, row, col)["r = 0"].x) == [0, 2, 4]
    assert list(in_panel(figure, 2, 1)["r = 0"].y) == [0.4, 0.4, 0.9]
    assert list(in_panel(figure, 2, 1)["r = −16"].y) == [0.9, 0.4, 0.4]
    assert list(in_panel(figure, 3, 2)["r = −16"].y) == [0.2, 0.2, 0.45]
    line = in_panel(figure, 3, 1)["r = −4"]
    assert list(line.hovertext)[:2] == [
        "layer 0, r = −4: 0.20 (0.19 to 0.22), n = 24",
        "layer 2, r = −4: 0.45 (0.44 to 0.47), n = 24, 3 without a judgement",
    ]
    assert "%{hovertext}" in line.hovertemplate
    lines = [in_panel(figure, 1, 1)[name] for name in names[1:4]]
    for looks in zip(*((t.line.color, t.line.dash, t.marker.symbol) for t in lines), strict=True):
        assert len(set(looks)) == 3
    assert all(axis.autorangeoptions.include == 0 for axis in figure.select_yaxes())


def test_red_rings_mark_the_best_layer_of_each_r_in_each_strategy():
    table = suppressed()
    figure = suppression_by_layer(table.set_index(0 * table["n"]), CAPTION)  # any row numbers
    for col, best in ((1, [0, 2, 4]), (2, [4, 2, 2])):  # from the most negative r up
        for row, value in enumerate((0.5, 0.9, 0.45), 1):
            rings = in_panel(figure, row, col)["best layer of each r, by score"]
            assert list(rings.x) == best
            assert list(rings.y) == [value] * 3
            assert (rings.marker.color, rings.marker.symbol) == (BEST, "circle-open")
            assert rings.mode == "markers"
    assert rings.hovertext[0] == "layer 4, r = −16: 0.45 (0.44 to 0.47), n = 24"


def test_of_equal_layers_the_lowest_is_best_and_cells_without_a_score_never():
    table = suppressed()
    single = (table["strategy"] == "single") & (table["strength"] == -4)
    table.loc[single, "score"] = 0.3
    table.loc[single & (table["layer"] == 0), "score"] = NONE
    table.loc[table["layer"] == 4, "n"] = 0
    rings = in_panel(suppression_by_layer(table, CAPTION), 3, 1)["best layer of each r, by score"]
    assert list(rings.x) == [0, 2, 0]
    lines = in_panel(suppression_by_layer(table, CAPTION), 3, 1)
    assert (list(lines["r = −4"].x), list(lines["r = −4"].y)) == ([2], [0.3])
    assert list(lines["r = 0"].x) == [0, 2]
    table.loc[table["strategy"] == "single", "score"] = NONE
    figure = suppression_by_layer(table, CAPTION)
    assert [*in_panel(figure, 3, 1)] == ["unsteered"]
    assert "r = 0" in in_panel(figure, 1, 1)


def test_many_strengths_all_look_different():
    rows = [("Gods", "single", 3, -float(r), 0.5, 0.5) for r in range(20)]
    lines = in_panel(suppression_by_layer(means(rows), CAPTION), 1, 1)
    looks = {(t.line.dash, t.marker.symbol) for name, t in lines.items() if name[0] == "r"}
    assert len(looks) == 20


def test_best_scores_stand_at_each_r_from_0_down_with_intervals():
    figure = best_by_strength(by_strength(), CAPTION)
    assert legend(figure) == ["unsteered", "prompting", "single", "seeds only"]
    axis = figure.layout.xaxis
    assert list(axis.tickvals) == [0, 1, 2, 3]
    assert list(axis.ticktext) == ["0", "−1", "−4", "−16"]
    assert tuple(axis.range) == (-0.5, 3.5)
    lines = in_panel(figure, 1, 1)
    single, seeds = lines["single"], lines["seeds only"]
    assert np.round(single.x).tolist() == [0, 2, 3]
    assert list(single.y) == pytest.approx([0.02, 0.04, 0.06])
    assert np.round(seeds.x).tolist() == [1, 3]
    assert list(seeds.y) == pytest.approx([0.1, 0.06])
    assert single.x[2] < seeds.x[1]  # side by side
    assert single.x[0] == pytest.approx(-seeds.x[0] + 1)  # about the tick
    assert single.mode == "lines+markers"
    assert not {"single", "seeds only"} & set(bands(figure, 1, 1))
    for trace in (single, seeds):
        check_bars(trace)
        look = STRATEGY_LOOKS[trace.name]
        assert (trace.line.color, trace.marker.symbol, trace.line.dash) == look[:3]
    assert single.hovertext[1] == "layer 8, r = −4: 0.04 (0.03 to 0.06), n = 24"
    check_base(figure, 1, 1, 0.4)
    check_base(figure, 1, 1, 0.7 * 0.7, "prompting")
    assert lines["unsteered"].hovertext[0] == "0.40 (0.39 to 0.42), n = 24"


def test_strategies_stand_beside_each_other_at_each_theme():
    table = activated()
    table.loc[(table["theme"] == "Gods") & (table["strategy"] == "linear"), "coherence"] = NONE
    figure = strategies_by_theme(table, CAPTION)
    names = ["unsteered", "single", "linear", "own &lt;b&gt;", "random features", "prompting"]
    assert legend(figure) == names
    long = "Research methodology and<br>experimentation"
    assert list(figure.layout.xaxis.categoryarray) == ["Gods", long]
    assert figure.layout.barmode == "group"
    assert [axis.title.text for axis in figure.select_yaxes()] == [
        "score B · C", "behavioral B", "coherence C",
    ]  # fmt: skip
    score, behavioral, coherence = (in_panel(figure, row, 1) for row in (1, 2, 3))
    assert list(score["single"].y) == pytest.approx([0.15, 0.2])
    assert list(behavioral["single"].y) == pytest.approx([0.3, 0.4])
    assert list(coherence["unsteered"].y) == [0.8, 0.8]
    assert list(score["single"].x) == ["Gods", long]
    assert (list(coherence["linear"].x), list(coherence["linear"].y)) == ([long], [0.5])
    assert (list(score["own &lt;b&gt;"].x), list(score["prompting"].x)) == ([long], ["Gods"])
    for trace in (*score.values(), *behavioral.values(), *coherence.values()):
        check_bars(trace)
    assert score["single"].hovertext[0] == "layer 12, strength 4: 0.15 (0.14 to 0.17), n = 24"
    assert score["prompting"].hovertext[0] == "0.49 (0.48 to 0.51), n = 24"
    assert len({trace.offsetgroup for trace in score.values()}) == len(names)
    modes = {name: trace.marker.pattern.fillmode for name, trace in score.items()}
    assert modes["single"] == modes["linear"] == modes["own &lt;b&gt;"] == "overlay"
    assert modes["random features"] == modes["prompting"] == "replace"  # on white
    assert score["unsteered"].marker.color == "white"
    taller = strategies_by_theme(
        table.assign(theme=table["theme"] + 4 * " and more words"), CAPTION
    )
    assert taller.layout.margin.b > figure.layout.margin.b > 115


def test_looks_differ_and_are_the_same_everywhere():
    looks = [*STRATEGY_LOOKS.values(), *SPARE_LOOKS, *CONTROL_LOOKS.values()]
    for part in range(3):
        assert len({look[part] for look in looks}) == len(looks)
    patterns = [look[3] for look in (*STRATEGY_LOOKS.values(), *CONTROL_LOOKS.values())]
    assert len(set(patterns[:6])) == 6
    assert len(set(patterns[6:])) == 3
    assert all(look[1].endswith("-open") for look in CONTROL_LOOKS.values())
    rows = [(f"{place}", 3, 1, 0.5, 0.5) for place in range(len(SPARE_LOOKS) + 1)]
    table = means([("Gods", *row) for row in rows])
    message = "strategies 0, 1, 2, 3, 4: expected at most 4 beside single; "
    with pytest.raises(ValueError, match=message):
        strategies_by_theme(table, CAPTION)
    assert len(legend(strategies_by_theme(table[1:], CAPTION))) == len(SPARE_LOOKS)


def test_best_layers_are_bars_in_a_panel_a_theme_with_seeds():
    figure = best_by_layer(by_layer(), CAPTION, {LONG: (9, 17), "Gods": 12})
    assert panel_titles(figure) == ["Gods", LONG]
    assert legend(figure) == [
        "unsteered", "seeds only", "single", "linear", "layer of the seed features",
    ]  # fmt: skip
    gods, long = in_panel(figure, 1, 1), in_panel(figure, 1, 2)
    for axis in (figure.layout.xaxis, figure.layout.xaxis2):
        assert list(axis.ticktext) == ["4", "9", "12", "17"]
        assert list(axis.tickvals) == [0, 1, 2, 3]
    assert (list(gods["single"].x), list(gods["linear"].x)) == ([0, 2], [0])
    assert list(gods["single"].y) == pytest.approx([0.04, 0.05])
    assert list(gods["linear"].y) == pytest.approx([0.12])
    assert (list(long["single"].x), [*long]) == ([1], ["unsteered", "single"])
    check_bars(gods["single"])
    assert gods["single"].hovertext[1] == "layer 12, strength 4: 0.05 (0.04 to 0.07), n = 24"
    check_base(figure, 1, 1, 0.4)
    check_base(figure, 1, 2, 0.4)
    check_base(figure, 1, 1, 0.2 * 0.2, "seeds only")
    assert verticals(figure) == [("x", 2), ("x2", 1), ("x2", 3)]
    assert {shape.line.dash for shape in figure.layout.shapes} == {"dot"}
    assert not verticals(best_by_layer(by_layer(), CAPTION))
    assert figure.layout.barmode == "group"
    assert gods["single"].offsetgroup != gods["linear"].offsetgroup
    three = means(
        [(name, "single", x, 1, 0.5, 0.5) for name, x in zip("bca", (9, 3, 5), strict=True)]
    )
    assert panel_titles(best_by_layer(three, CAPTION)) == ["b", "c", "a"]
    assert [*in_panel(best_by_layer(three, CAPTION), 2, 1)] == ["single"]


def test_features_are_stacked_by_module_with_seeds():
    figure = features_by_layer(selected(), CAPTION, (6, 12))
    bars = in_panel(figure, 1, 1)
    assert [*bars] == ["attention", "stream", "MLP"]
    assert {name: dict(zip(bar.x, bar.y, strict=True)) for name, bar in bars.items()} == {
        "attention": {7: 1}, "stream": {5: 2}, "MLP": {3: 1, 5: 1},
    }  # fmt: skip
    assert figure.layout.barmode == "stack"
    assert bars["MLP"].marker.color == COLOURS["mlp"]
    assert len({bar.marker.pattern.shape for bar in bars.values()}) == 3
    assert verticals(figure) == [("x", 6), ("x", 12)]
    low, high = figure.layout.xaxis.range
    assert low < 3
    assert high > 12
    assert list(figure.layout.xaxis.tickvals) == [3, 5, 6, 7, 12]
    assert figure.layout.yaxis.dtick == 1
    assert legend(figure)[-1] == "layer of the seed features"
    many = pd.DataFrame({"layer": [1] * 100 + [*range(1, 27)], "module": "res"})
    layout = features_by_layer(many, CAPTION).layout
    assert (layout.xaxis.dtick, layout.yaxis.dtick) == (4, 13)
    assert not features_by_layer(selected()[:0], CAPTION).data
    with pytest.raises(ValueError, match="unknown module 'attn': expected att, res, mlp"):
        features_by_layer(selected().replace("att", "attn"), CAPTION)
    with pytest.raises(ValueError, match="no column module: expected layer, module, found layer"):
        features_by_layer(selected()[["layer"]], CAPTION)


def test_scores_by_layer_are_lines_with_bands_and_seeds():
    figure = steered_by_layer(one_theme(by_layer()), CAPTION, seeds=[12, 2])
    assert "“Gods”" in figure.layout.title.text
    lines, band = in_panel(figure, 1, 1), bands(figure, 1, 1)["single"]
    assert list(lines["single"].x) == [4, 12]
    assert list(lines["single"].y) == pytest.approx([0.04, 0.05])
    assert list(lines["linear"].x) == [4]
    assert list(band.x) == [4, 12, 12, 4]
    assert list(band.y) == pytest.approx([0.06, 0.07, 0.04, 0.03])
    assert band.fillcolor == lines["single"].line.color == STRATEGY_LOOKS["single"][0]
    check_base(figure, 1, 1, 0.4)
    check_base(figure, 1, 1, 0.2 * 0.2, "seeds only")
    assert verticals(figure) == [("x", 2), ("x", 12)]
    low, high = figure.layout.xaxis.range
    assert (low, high) == (min(lines["unsteered"].x), max(lines["unsteered"].x))
    assert low < 2
    assert high > 12
    assert list(figure.layout.xaxis.tickvals) == [2, 4, 12]
    assert not verticals(steered_by_layer(one_theme(by_layer()), CAPTION))


def test_a_dose_has_a_row_a_theme_and_a_column_a_value():
    more = by_strength().assign(theme=LONG)
    more["behavioral"] += 0.3
    figure = dose_response(pd.concat([by_strength(), more]), CAPTION)
    assert panel_titles(figure) == ["Gods", LONG]
    assert legend(figure) == ["unsteered", "prompting", "single", "seeds only"]
    for row, up in ((1, 0.0), (2, 0.3)):
        expected = ([0.1 + up] * 3, [0.2, 0.4, 0.6], [0.02, 0.04, 0.06])
        for col, y in enumerate(expected, 1):
            line = in_panel(figure, row, col)["single"]
            assert list(line.x) == [0, 2, 3]
            assert list(line.y) == pytest.approx(y)
        assert list(in_panel(figure, row, 2)["seeds only"].y) == [0.5, 0.3]
        assert list(in_panel(figure, row, 2)["seeds only"].x) == [1, 3]
        check_base(figure, row, 2, 0.8)
        check_base(figure, row, 2, 0.7, "prompting")
    assert list(figure.layout.xaxis.ticktext) == ["0", "−1", "−4", "−16"]
    titles = [axis.title.text for axis in figure.select_yaxes(row=2)]
    assert titles == ["behavioral", "coherence", "score"]
    assert set(bands(figure, 1, 1)) == set(legend(figure))
    up = dose_response(activated().query("strategy != 'own <b>'"), CAPTION)
    assert list(up.layout.xaxis.ticktext) == ["2", "4", "8"]  # from the least up


def test_of_many_strategies_a_dose_tells_intervals_in_the_hover_alone():
    rows = [("Gods", name, 3, 2, 0.5, 0.5) for name in STRATEGY_LOOKS]
    few, many = (dose_response(means(rows[:count]), CAPTION) for count in (4, 5))
    assert len(bands(few, 1, 1)) == 4
    assert not bands(many, 1, 1)
    hover = in_panel(many, 1, 1)["single"].hovertext[0]
    assert hover == "layer 3, strength 2: 0.50 (0.49 to 0.52), n = 24"


@pytest.mark.parametrize(("by", "scale"), [("norm", 10), ("kl", 0.001)])
def test_cells_stand_at_what_they_cost(by, scale: float):
    table = pd.concat([activated(), means([("Gods", "constant", 3, 0, 0.5, 0.5),
                                           (LONG, "constant", 4, 3, 0.5, NONE)])])  # fmt: skip
    other = {"norm": "kl", "kl": "norm"}[by]
    table[other] = table[other].replace(0, 1).fillna(1)  # whatever the other cost is
    figure = score_against(table, CAPTION, by)
    assert panel_titles(figure) == ["Gods", LONG]
    assert legend(figure) == [
        "unsteered", "single", "linear", "random features", "own &lt;b&gt;",
    ]  # fmt: skip
    gods, long = in_panel(figure, 1, 1), in_panel(figure, 1, 2)
    assert list(gods["single"].x) == pytest.approx([4 * scale])
    assert list(gods["single"].y) == pytest.approx([0.15])
    assert list(long["own &lt;b&gt;"].x) == pytest.approx([2 * scale])
    assert gods["random features"].marker.symbol == "x-open"
    assert gods["single"].mode == "markers"
    hover = "layer 12, strength 4: 0.15 (0.14 to 0.17), n = 24, norm 40, kl 0.004"
    assert gods["single"].hovertext[0] == f"Gods, {hover}"
    assert long["single"].hovertext[0].startswith(f"{LONG}, layer 12")
    check_base(figure, 1, 1, 0.4)
    check_base(figure, 1, 2, 0.4)
    for axis in figure.select_xaxes():
        assert axis.type == "log"
        assert tuple(axis.range) == pytest.approx(np.log10([2 * scale / 1.3, 8 * scale * 1.3]))
    left = figure.layout.xaxis.title.text
    assert f"2 of 9 cells have no {by} above 0: not drawn" in left  # prompting and strength 0
    assert ("norm added" if by == "norm" else "KL") in left
    assert figure.layout.margin.b > 115
    cells = table[table["strength"] > 0]
    assert "not drawn" not in score_against(cells, CAPTION, by).layout.xaxis.title.text


def test_tables_without_intervals_or_with_holes_are_drawn_without_them():
    bare = suppressed()[["theme", "strategy", "layer", "strength", "n", "behavioral", "coherence",
                         "score"]]  # fmt: skip
    for figure in (suppression_by_layer(bare, CAPTION), steered_by_layer(bare[:4], CAPTION)):
        assert not any(trace.fill for trace in figure.data)
    best = best_by_strength(bare.query("layer != layer or layer == 2"), CAPTION)
    line = in_panel(best, 1, 1)["single"]
    assert line.error_y.array is None
    assert line.hovertext[0] == "layer 2, r = 0: 0.20, n = 24"
    holes = by_strength()
    holes.loc[holes["strategy"] == "unsteered", "score_low"] = NONE
    assert "unsteered" not in bands(best_by_strength(holes, CAPTION), 1, 1)
    empty = by_strength().assign(theme="Gods", layer=pd.array([None] * 7, dtype="Int64"))
    empty.loc[empty["strategy"] == "unsteered", "score"] = None
    lines = in_panel(best_by_strength(empty, CAPTION), 1, 1)
    assert "unsteered" not in lines
    assert lines["single"].hovertext[0].startswith("r = 0: 0.02")


def test_errors_say_what_is_missing_or_too_much():
    table, layers = suppressed(), by_layer()
    with pytest.raises(ValueError, match="no column layer, score: expected theme, strategy, layer"):
        suppression_by_layer(table.drop(columns=["layer", "score"]), CAPTION)
    for figure in (best_by_strength, strategies_by_theme, best_by_layer, steered_by_layer,
                   dose_response, score_against):  # fmt: skip
        with pytest.raises(ValueError, match=r"no column strategy, n: expected .*found theme, "):
            figure(table.drop(columns=["strategy", "n"]), CAPTION)
    with pytest.raises(ValueError, match="no column kl: expected"):
        score_against(table.drop(columns="kl"), CAPTION, by="kl")
    with pytest.raises(ValueError, match="unknown by 'cost': expected norm or kl"):
        score_against(table, CAPTION, by="cost")
    both = pd.concat([table, table.assign(theme="Sports")])
    for figure in (suppression_by_layer, best_by_strength, steered_by_layer):
        with pytest.raises(ValueError, match="means of one theme: found Gods, Sports"):
            figure(both, CAPTION)
    with pytest.raises(
        ValueError, match=r"several rows of Gods, single, 4\.0, 0\.0: expected one a "
    ):
        suppression_by_layer(pd.concat([table, table[1:2]]), CAPTION)
    with pytest.raises(ValueError, match=r"several rows of Gods, single, 0\.0: expected one a "):
        best_by_strength(table, CAPTION)
    with pytest.raises(ValueError, match=r"several rows of Gods, single, 0\.0: expected one a "):
        dose_response(table, CAPTION)
    with pytest.raises(
        ValueError, match=r"several rows of Gods, single: expected one a theme, str"
    ):
        strategies_by_theme(table, CAPTION)
    for figure in (best_by_layer, steered_by_layer):
        with pytest.raises(
            ValueError, match=r"several rows of Gods, single, [04]\.0: expected one a "
        ):
            figure(table, CAPTION)
    with pytest.raises(ValueError, match=r"several rows of Gods: expected one a theme"):
        suppression_by_layer(pd.concat([table, table[:1]]), CAPTION)
    with pytest.raises(ValueError, match=r"several rows of Gods, single, 4\.0, 0\.0: expected one"):
        score_against(pd.concat([table, table[1:2]]), CAPTION)
    with pytest.raises(ValueError, match="steered cells with a layer and a strength: found none"):
        suppression_by_layer(table[:1], CAPTION)
    with pytest.raises(ValueError, match="expected cells with a norm above 0: found none among 18"):
        score_against(table.assign(norm=0.0), CAPTION)
    with pytest.raises(ValueError, match=r"seeds of 'God', of which there are no means.*Gods"):
        best_by_layer(layers, CAPTION, {"God": 12})
    with pytest.raises(ValueError, match="found none"):
        strategies_by_theme(table[:0], CAPTION)
