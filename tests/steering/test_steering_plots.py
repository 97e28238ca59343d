"""The figures of the steering experiments show what the tables hold, and leave out the rest."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from flowhelpers.steering.plots import (
    best_by_layer,
    dose_response,
    features_by_layer,
    score_against,
    strategies_by_theme,
    suppression_by_layer,
)

CAPTION = "suite toy · n = 24"


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
    table = table.assign(kl=table["strength"].abs() / 1000)
    return table.astype({"layer": float, "strength": float})


BASE = [(theme, "unsteered", None, None, 0.5, 0.8) for theme in ("Gods", "Sea")]
# Strategies at two layers and two strengths; layers and strengths in a wrong order.
CELLS = [
    (theme, strategy, layer, s, 0.5, (layer + s) / 100 + (strategy == "linear") / 10)
    for theme in ("Gods", "Sea")
    for strategy in ("single", "linear")
    for layer in (12, 4)
    for s in (16, 2)
]
EMPTY = ("Gods", "exponential", 4, 2, np.nan, 0.5)
TABLE = means([*BASE, *CELLS, EMPTY])


def best(*by: str) -> pd.DataFrame:
    known = TABLE.dropna(subset="score")
    return known.loc[known.groupby(list(by), dropna=False, sort=False)["score"].idxmax()]


def series(figure: go.Figure, name: str) -> list[go.Scatter | go.Bar]:
    return [trace for trace in figure.data if trace.name == name]


def check_bars(trace: go.Scatter | go.Bar) -> None:
    assert list(trace.error_y.array) == pytest.approx([0.02] * len(trace.x))
    assert list(trace.error_y.arrayminus) == pytest.approx([0.01] * len(trace.x))


def test_suppression_has_a_map_for_each_strategy_and_measure():
    figure = suppression_by_layer(TABLE[TABLE["theme"] == "Gods"], CAPTION)
    maps = {trace.name: trace for trace in figure.data if trace.type == "heatmap"}
    ways, measures = ("single", "linear", "exponential"), ("behavioral", "coherence", "score")
    assert {*maps} == {f"{way}: {measure}" for way in ways for measure in measures}
    score = maps["linear: score"]
    assert ([*score.x], [*score.y]) == (["4", "12"], ["16", "2"])
    assert score.z.tolist() == [pytest.approx([0.15, 0.19]), pytest.approx([0.08, 0.12])]
    ends = score.customdata[0][1]
    assert ends == pytest.approx([0.18, 0.21])
    frames = [shape for shape in figure.layout.shapes if shape.name == "best layer of each r"]
    middles = {(f.xref, (f.x0 + f.x1) / 2, round((f.y0 + f.y1) / 2, 6)) for f in frames}
    of_single = [maps[f"single: {measure}"].xaxis for measure in measures]
    assert middles == {(axis, 1, strength) for axis in of_single for strength in (0, 1)}  # layer 12
    assert all(0.5 < f.x1 - f.x0 < 1 > f.y1 - f.y0 for f in frames)  # around a cell, and no further
    assert [shape.showlegend for shape in frames].count(True) == 1
    titles = [note.text for note in figure.layout.annotations]
    assert "single: score<br>(unsteered 0.40)" in titles


def test_strategies_stand_side_by_side_at_each_theme():
    figure = strategies_by_theme(best("theme", "strategy"), CAPTION)
    bars = series(figure, "linear")
    assert len(bars) == 3
    assert {tuple(bar.x) for bar in bars} == {("Gods", "Sea")}
    values = sorted(round(float(bar.y[0]), 6) for bar in bars)
    assert values == [0.19, 0.38, 0.5]
    check_bars(bars[0])
    assert series(figure, "exponential") == []  # it has no mean, which is not 0
    assert figure.layout.barmode == "group"


def test_the_best_at_each_layer_with_the_seeds_of_each_theme():
    figure = best_by_layer(best("theme", "strategy", "layer"), CAPTION, {"Gods": 12, "Sea": [4, 9]})
    lines = series(figure, "single")
    assert len(lines) == 2
    for line in lines:
        assert dict(zip(line.x, line.y, strict=True)) == pytest.approx({4: 0.1, 12: 0.14})
        check_bars(line)
    seeds = {line.xaxis: line for line in series(figure, "layer of the seed features")}
    assert [set(seeds[line.xaxis].x) for line in lines] == [{12}, {4, 9}]
    for line in series(figure, "unsteered"):
        assert set(line.y) == {0.4}
        assert [np.isfinite(up) for up in line.error_y.array] == [True] + [False] * (
            len(line.x) - 1
        )


def test_features_are_counted_by_layer_and_module():
    features = pd.DataFrame({"layer": [1, 1, 1, 3], "module": ["res", "res", "mlp", "att"]})
    figure = features_by_layer(features, CAPTION, [2])
    counts = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}
    assert counts == {"stream": ([1], [2]), "MLP": ([1], [1]), "attention": ([3], [1])}
    assert [shape.x0 for shape in figure.layout.shapes] == [2]


def test_more_strength_brings_what_the_table_says_evenly_spaced_from_0_on():
    table = best("theme", "strategy", "strength")
    figure = dose_response(table.assign(strength=-table["strength"]), CAPTION)
    lines = series(figure, "linear")
    assert len(lines) == 6  # two themes, three measures
    assert list(figure.layout.xaxis.categoryarray) == [-2, -16]
    scores = [line for line in lines if "measure=score" in line.hovertemplate]
    for line in scores:
        assert dict(zip(line.x, line.y, strict=True)) == pytest.approx({-2: 0.12, -16: 0.19})
        check_bars(line)


def test_the_score_that_a_cell_was_chosen_by_has_a_panel_of_its_own():
    table = best("theme", "strategy", "strength")
    was = {f"chosen_on{end}": table[f"score{end}"] + 0.5 for end in ("", "_low", "_high")}
    figure = dose_response(table.assign(**was), CAPTION)
    panels = [note.text for note in figure.layout.annotations]
    assert panels[:4] == [
        *("behavioral", "coherence", "score on new samples"),
        "score as chosen (the paper's)",
    ]
    for line in series(figure, "linear"):
        if "as chosen" in line.hovertemplate:
            assert dict(zip(line.x, line.y, strict=True)) == pytest.approx({2: 0.62, 16: 0.69})
            check_bars(line)


@pytest.mark.parametrize(("by", "unit"), [("norm", 10), ("kl", 1 / 1000)])
def test_costs_are_on_a_logarithmic_axis_and_what_has_none_is_counted(by: str, unit: float):
    table = means([*BASE, *CELLS, ("Gods", "single", 4, 0, 0.5, 0.5)])
    figure = score_against(table, CAPTION, by)
    assert figure.layout.xaxis.type == "log"
    places = [x for trace in series(figure, "single") for x in trace.x]
    assert sorted(places) == pytest.approx([2 * unit] * 4 + [16 * unit] * 4)
    assert f"1 of 17 cells have no {by} above 0" in figure.layout.title.subtitle.text
    for line in series(figure, "unsteered"):
        assert list(line.x) == pytest.approx([2 * unit, 16 * unit])
