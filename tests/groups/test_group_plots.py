"""The figures of the group statistics show what the tables hold, and leave out what is empty."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from counted import planted_occurrences

from flowhelpers.groups import plots
from flowhelpers.groups.coactivation import MEASURES
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.groups.shares import (
    score_histograms,
    share_intervals,
    single_source_points,
    transition_intervals,
)
from flowhelpers.groups.significance import mann_whitney_tests, significance_intervals

FOUND = planted_occurrences(tokens=120)[0]  # no feature is from MLP and attention at once
CAPTION = "suite toy"


@pytest.fixture(scope="module")
def significance() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Figures 4 and 14 as tables."""
    tests = mann_whitney_tests(FOUND, alpha=0.05, smallest=5)
    return significance_intervals(FOUND, tests, alpha=0.05, smallest=5, times=5)[:2]


def panel(figure: go.Figure, name: str, axis: str) -> Any:
    """The trace of this name in the panel of an x axis."""
    (trace,) = [t for t in figure.data if t.name == name and t.xaxis == axis]
    return trace


def test_bars_are_the_shares_with_their_intervals_and_an_empty_group_has_none():
    shares = share_intervals(FOUND, times=20)
    base = share_intervals(FOUND, times=5).assign(share=0.1)
    figure = plots.group_bars(shares, base, CAPTION)
    bars = [t for t in figure.data if t.type == "bar"]
    assert {bar.name for bar in bars} == {"one", "two"}
    for bar in bars:
        part = shares[shares["dataset"] == bar.name].dropna(subset="share")
        assert list(bar.x) == part["group"].tolist()
        assert "From MLP & ATT" not in bar.x
        assert list(bar.y) == part["share"].tolist()
        assert bar.error_y.array == pytest.approx((part["high"] - part["share"]).clip(lower=0))
        assert bar.error_y.arrayminus == pytest.approx((part["share"] - part["low"]).clip(lower=0))
    marks = [t for t in figure.data if t.type == "scatter"]
    assert [t.offsetgroup for t in marks] == [bar.offsetgroup for bar in bars] == ["one", "two"]
    assert all(set(t.y) == {0.1} for t in marks)
    # Chance far above all bars is a number, and does not flatten them.
    top = figure.layout.yaxis.range[1]
    assert bars[0].y[0] < top < 1.5 * shares["high"].max()
    far = base.assign(share=base["share"].where(base["group"] != "From nowhere", 5.0))
    figure = plots.group_bars(shares, far.assign(low=far["share"], high=far["share"]), CAPTION)
    assert figure.layout.yaxis.range[1] == top
    (note,) = figure.layout.annotations
    assert (note.x, note.text) == ("From nowhere", "↑ by chance<br>500%")


def test_layer_0_stands_apart():
    shares = share_intervals(FOUND, ("dataset", "layer"), times=5)
    two = pd.concat([shares.assign(method="a"), shares.assign(method="b", share=0.5)])
    figure = plots.groups_by_layer(two, CAPTION)
    lines = [t for t in figure.data if t.name == "From nowhere"]
    assert len(lines) == 8  # a panel for each dataset and method, layer 0 apart
    part = shares[(shares["dataset"] == "two") & (shares["group"] == "From nowhere")]
    first, later = [t for t in lines if t.xaxis == "x4"]  # the upper row, which is of method a
    assert [[*first.x], [*later.x]] == [[0], [1, 2]]
    assert [*first.y, *later.y] == part["share"].tolist()


def test_points_and_densities_are_those_of_the_scores():
    points = single_source_points(FOUND, [1, 2], n=12)
    assert points.groupby("layer").size().tolist() == [12, 12]
    assert set(points["group"]) <= set(GROUPS[:4])
    assert not points.duplicated(["layer", "feature", "group"]).any()
    table = FOUND.table.drop_duplicates(["layer", "feature"]).set_index(["layer", "feature"])
    for row in points.itertuples():
        assert row.s_res == table.loc[(row.layer, row.feature), "s_res"]
    figure = plots.group_scatter(points, CAPTION)
    part = points[(points["layer"] == 1) & (points["group"] == "From RES")]
    rows = [note.text for note in figure.layout.annotations if note.text.startswith("layer")]
    assert sorted(rows) == ["layer 1", "layer 2"]
    for module, name in (("mlp", "s(M)"), ("att", "s(A)")):
        (trace,) = [
            t
            for t in figure.data
            if t.name == name and "layer=1<br>group=From RES<" in t.hovertemplate
        ]
        assert list(trace.x) == part["s_res"].tolist()
        assert list(trace.y) == part[f"s_{module}"].tolist()
    with pytest.raises(ValueError, match=r"layers \[0\]: expected some of 1, 2"):
        single_source_points(FOUND, [0])
    table = score_histograms(FOUND, [2], bins=10, smallest=1)
    part = table[(table["score"] == "s_res") & (table["group"] == "From RES")]
    scores = FOUND.table.query("layer == 2 and group == 'From RES'")["s_res"]
    assert (part["n"] == len(scores)).all()
    width = part["at"].diff().iloc[1]
    assert (part["density"] * width).sum() == pytest.approx(1)
    assert abs(part.loc[part["density"].idxmax(), "at"] - scores.mode()[0]) <= width
    figure = plots.score_densities(table, CAPTION)
    trace = next(trace for trace in figure.data if "group=From RES<" in trace.hovertemplate)
    rows = [note.text for note in figure.layout.annotations if note.textangle == 0]
    assert {*rows} == {plots.SHORT[group] for group in table["group"]}
    assert list(trace.y) == part["density"].tolist()
    assert trace.name == "layer 2"
    assert score_histograms(FOUND, [2], smallest=10**6).empty


def test_heatmaps_show_their_shares_row_by_row(significance: tuple[pd.DataFrame, pd.DataFrame]):
    rows = transition_intervals(FOUND, times=5)
    (heat,) = plots.transition_heatmap(rows, CAPTION).data
    assert list(heat.x) == list(GROUPS)
    table = rows.set_index(["first", "second"])
    for i, first in enumerate(GROUPS):
        assert heat.y[i] == f"{first} ({table.loc[(first, first), 'features']:,})"
        row = table.loc[first].loc[[*GROUPS], ["share", "low", "high"]].to_numpy()
        values = np.column_stack([heat.z[i], heat.customdata[i]])
        assert values == pytest.approx(row, nan_ok=True)
    pairs = significance[1].set_index(["score", "first", "second"])["share"]
    figure = plots.pair_heatmaps(significance[1], CAPTION)
    for trace, score in zip(figure.data, ("s_res", "s_mlp", "s_att"), strict=True):
        for i, first in enumerate(GROUPS[:-1]):
            for j, second in enumerate(GROUPS[1:], 1):
                expected = pairs.get((score, first, second), np.nan) if i < j else np.nan
                assert trace.z[i][j - 1] == pytest.approx(expected, nan_ok=True)


def test_classes_and_measures_have_a_panel_for_each_module(
    significance: tuple[pd.DataFrame, pd.DataFrame],
):
    classes = significance[0].assign(unit="occurrences")
    figure = plots.class_bars(classes, CAPTION)
    names = {"s(R)": "s_res", "s(M)": "s_mlp", "s(A)": "s_att"}
    for axis, module in (("x", "res"), ("x2", "mlp"), ("x3", "att")):
        part = classes[(classes["module"] == module) & (classes["pair"] == "AO")]
        bar = panel(figure, "AO: module active in one group", axis)
        shares = part.set_index("score")["share"].dropna()
        assert dict(zip((names[x] for x in bar.x), bar.y, strict=True)) == shares.to_dict()
    values = {measure: [0.1 * i, 0.2 * i] for i, measure in enumerate(MEASURES, 1)}
    table = pd.DataFrame({"module": "mlp", "cosine": [0.3, 0.7], "pairs": [10, 20]} | values)
    figure = plots.together_by_cosine(table, CAPTION)
    assert {trace.name: list(trace.y) for trace in figure.data} == values
    assert {trace.xaxis for trace in figure.data} == {"x2"}
