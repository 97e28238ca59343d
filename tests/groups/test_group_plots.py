"""The figures of the group statistics show what the tables hold, and leave out what is empty."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from counted import planted_occurrences

from flowhelpers.groups.coactivation import MEASURES
from flowhelpers.groups.intervals import (
    share_intervals,
    significance_intervals,
    transition_intervals,
)
from flowhelpers.groups.occurrences import (
    GROUPS,
    Occurrences,
    group_shares,
    score_histograms,
    single_source_points,
)
from flowhelpers.groups.plots import (
    class_bars,
    group_bars,
    group_scatter,
    groups_by_layer,
    pair_heatmaps,
    score_densities,
    together_by_cosine,
    transition_heatmap,
)
from flowhelpers.groups.significance import class_shares, mann_whitney_tests, pair_shares

CAPTION = "suite toy · n = 12"


@pytest.fixture(scope="module")
def found() -> Occurrences:
    """Occurrences of the planted suite, where no feature is from MLP and attention at once."""
    return planted_occurrences(tokens=120)[0]


@pytest.fixture(scope="module")
def tests(found: Occurrences) -> pd.DataFrame:
    """Their tests."""
    return mann_whitney_tests(found, alpha=0.05, smallest=5)


def titles(figure: go.Figure) -> tuple[str, str]:
    """Title and subtitle."""
    return figure.layout.title.text, figure.layout.title.subtitle.text


def test_every_figure_says_suite_n_and_choices(found: Occurrences, tests: pd.DataFrame):
    shares, once = share_intervals(found, times=5), class_shares(tests).assign(unit="x")
    measures = {key: [0.1] for key in MEASURES}
    figures = [
        group_scatter(single_source_points(found, [1, 2]), CAPTION),
        class_bars(once, CAPTION),
        groups_by_layer(share_intervals(found, ("dataset", "layer"), times=5), CAPTION),
        group_bars(shares, group_shares(found), CAPTION),
        score_densities(score_histograms(found, [1, 2]), CAPTION),
        transition_heatmap(transition_intervals(found, times=5), CAPTION),
        pair_heatmaps(pair_shares(tests), CAPTION),
        together_by_cosine(
            pd.DataFrame({"module": ["res"], "cosine": [0.5], "pairs": [10]} | measures), CAPTION
        ),
    ]
    assert all(titles(figure)[1] == CAPTION for figure in figures)
    assert len({titles(figure)[0] for figure in figures}) == len(figures)


def test_bars_are_the_shares_with_their_intervals_and_an_empty_group_has_none(found: Occurrences):
    shares = share_intervals(found, times=20)
    base = group_shares(found)
    figure = group_bars(shares, base, CAPTION)
    bars = {trace.name: trace for trace in figure.data if trace.type == "bar"}
    assert set(bars) == {"one", "two"}
    for name, bar in bars.items():
        part = shares[(shares["dataset"] == name)].dropna(subset="share")
        assert list(bar.x) == part["group"].tolist()
        assert "From MLP & ATT" not in bar.x
        assert list(bar.y) == part["share"].tolist()
        assert bar.error_y.array == pytest.approx((part["high"] - part["share"]).clip(lower=0))
        first = part.iloc[0]
        expected = f"{first['share']:.1%} ({first['low']:.1%} to {first['high']:.1%})"
        assert bar.hovertext[0] == f"{expected}, n = {first['n']:,}"
    marks = {trace.meta: trace for trace in figure.data if trace.type == "scatter"}
    assert set(marks) == {"one", "two"}
    for name, trace in marks.items():
        part = base[base["dataset"] == name].dropna(subset="share")
        assert list(trace.y) == part["share"].tolist()
        assert [GROUPS[round(x)] for x in trace.x] == part["group"].tolist()


def test_layer_0_stands_apart_with_hollow_marks(found: Occurrences):
    shares = share_intervals(found, ("dataset", "layer"), times=5)
    figure = groups_by_layer(shares, CAPTION)
    marks = [t for t in figure.data if t.mode == "markers" and t.name == "From nowhere"]
    assert len(marks) == 4  # a panel for each dataset, layer 0 apart
    for number, name in enumerate(("one", "two")):
        part = shares[(shares["dataset"] == name) & (shares["group"] == "From nowhere")]
        later, first = marks[2 * number : 2 * number + 2]
        assert [*first.x, *later.x] == part["layer"].tolist() == [0, 1, 2]
        assert [*first.y, *later.y] == part["share"].tolist()
        assert (first.marker.symbol, later.marker.symbol) == ("x-open", "x")
        assert later.hovertext[0].startswith(f"{part['share'].iloc[1]:.1%}")
    lines = [t for t in figure.data if t.mode == "lines" and not t.fill]
    assert all(0 not in trace.x for trace in lines)
    two = pd.concat([shares.assign(method="a"), shares.assign(method="b")])
    both = groups_by_layer(two, CAPTION)
    assert len([t for t in both.data if t.mode == "markers" and t.name == "From RES"]) == 8
    assert sum(bool(t.showlegend) for t in both.data) == len(GROUPS)


def test_points_are_single_sources_each_once(found: Occurrences):
    points = single_source_points(found, [1, 2], n=12)
    assert points.groupby("layer").size().tolist() == [12, 12]
    assert set(points["group"]) <= set(GROUPS[:4])
    assert not points.duplicated(["layer", "feature", "group"]).any()
    table = found.table.drop_duplicates(["layer", "feature"]).set_index(["layer", "feature"])
    for row in points.itertuples():
        assert row.s_res == table.loc[(row.layer, row.feature), "s_res"]
    figure = group_scatter(points, CAPTION)
    assert sum(len(trace.x) for trace in figure.data) == 2 * len(points)  # s(M) and s(A)
    for trace, module in zip(figure.data[:2], ("mlp", "att"), strict=True):
        part = points[(points["layer"] == 1) & (points["group"] == "From nowhere")]
        assert list(trace.x) == part["s_res"].tolist()
        assert list(trace.y) == part[f"s_{module}"].tolist()
    with pytest.raises(ValueError, match=r"layers \[0\]: expected some of 1, 2"):
        single_source_points(found, [0])


def test_densities_are_those_of_the_scores(found: Occurrences):
    table = score_histograms(found, [2], bins=10, smallest=1)
    part = table[(table["score"] == "s_res") & (table["group"] == "From RES")]
    here = found.table[(found.table["layer"] == 2) & (found.table["group"] == "From RES")]
    assert (part["n"] == len(here)).all()
    width = part["at"].diff().iloc[1]
    assert (part["density"] * width).sum() == pytest.approx(1)
    mode = part.loc[part["density"].idxmax(), "at"]
    assert abs(mode - here["s_res"].mode()[0]) <= width
    figure = score_densities(table, CAPTION)
    assert {trace.name for trace in figure.data} == set(table["group"])
    assert score_histograms(found, [2], smallest=10**6).empty


def test_the_transition_shows_its_shares_row_by_row(found: Occurrences):
    rows = transition_intervals(found, times=5)
    heat = transition_heatmap(rows, CAPTION).data[0]
    assert list(heat.x) == list(GROUPS)
    table = rows.set_index(["first", "second"])
    for i, first in enumerate(GROUPS):
        assert heat.y[i] == f"{first} ({table.loc[(first, first), 'features']:,})"
        for j, second in enumerate(GROUPS):
            share = table.loc[(first, second), "share"]
            assert heat.z[i][j] == pytest.approx(share, nan_ok=True)
            if np.isnan(share):
                assert heat.text[i][j] == "empty"


def test_triangles_and_classes_show_the_shares_of_tests(found: Occurrences, tests: pd.DataFrame):
    classes, pairs = significance_intervals(found, tests, alpha=0.05, smallest=5, times=5)
    heat = pair_heatmaps(pairs, CAPTION).data
    assert len(heat) == 3
    table = pairs.set_index(["score", "first", "second"])["share"]
    for trace, score in zip(heat, ("s_res", "s_mlp", "s_att"), strict=True):
        for i, first in enumerate(GROUPS[:-1]):
            for j, second in enumerate(GROUPS[1:], 1):
                expected = table.get((score, first, second), np.nan) if i < j else np.nan
                assert trace.z[i][j - 1] == pytest.approx(expected, nan_ok=True)
    figure = class_bars(classes.assign(unit="occurrences"), CAPTION)
    assert len(figure.data) == 9
    for trace, module in zip(figure.data[::3], ("res", "mlp", "att"), strict=True):
        part = classes[(classes["module"] == module) & (classes["pair"] == "AO")]
        assert trace.name == "AO: module active in one group"
        assert list(trace.y) == pytest.approx(part["share"].tolist(), nan_ok=True)
        shown = ["empty" if np.isnan(s) else f"{s:.0%}" for s in part["share"]]
        assert list(trace.text) == shown


def test_each_measure_has_its_own_line():
    values = {measure: [0.1 * i, 0.2 * i] for i, measure in enumerate(MEASURES, 1)}
    table = pd.DataFrame({"module": "mlp", "cosine": [0.3, 0.7], "pairs": [10, 20]} | values)
    figure = together_by_cosine(table, CAPTION)
    names = ["Pearson", "Jaccard", "P(source | target)", "P(target | source)"]
    assert [trace.name for trace in figure.data] == names
    for trace, measure in zip(figure.data, MEASURES, strict=True):
        assert list(trace.x) == [0.3, 0.7]
        assert list(trace.y) == values[measure]
        assert list(trace.hovertext) == ["10 pairs", "20 pairs"]
