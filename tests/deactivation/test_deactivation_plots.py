"""The figures of the deactivation experiments show what the tables hold, and leave out the rest."""

from html import unescape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from flowhelpers.deactivation import CONTROL, groups_after, rate_panels, written_against_change
from flowhelpers.deactivation.ablation import OFF

CAPTION = "suite toy · n = 12"


def rated(rows: list[tuple], keys: tuple[str, ...], *columns: str) -> pd.DataFrame:
    """Rows of keys, n and values; each value's interval goes from 0.01 below to 0.02 above it."""
    table = pd.DataFrame(rows, columns=[*keys, "n", *columns])
    for column in columns:
        table[f"{column}_low"] = table[column] - 0.01
        table[f"{column}_high"] = table[column] + 0.02
    return table


def panels(figure: go.Figure) -> dict[str, dict[str, go.Scatter]]:
    """The traces of each panel by their names, by the panel's title."""
    found = {}
    for note in figure.layout.annotations:
        axes = [a for a in figure.select_xaxes() if a.domain[0] <= note.x <= a.domain[1]]
        ids = {a.plotly_name.replace("xaxis", "x") for a in axes}
        inside = [t for t in figure.data if t.xaxis in ids]
        tops = {t.yaxis: figure.layout[t.yaxis.replace("y", "yaxis")].domain[1] for t in inside}
        own = min(tops, key=lambda axis: abs(tops[axis] - note.y))
        found[unescape(note.text)] = {t.name: t for t in inside if t.yaxis == own}
    return found


def test_panels_hold_every_rate_with_its_interval_and_no_empty_group():
    rows = [
        ("top-1", "From RES & MLP & ATT", 1200, 0.9, 0.7),
        ("top-1", "From RES", 30, 0.5, -0.25),
        ("top-1", "From MLP", 0, 0.0, 0.0),
        ("random", "From RES", 40, 0.1, 0.05),
        ("random", "From ATT", 7, np.nan, np.nan),
    ]
    table = rated(rows, ("method", "group"), "success", "change")
    figure = rate_panels(table, "group", "method", "Removed", CAPTION)
    success, change = panels(figure).values()
    expected = {
        ("top-1", "success"): {"From RES": 0.5, "From RES & MLP & ATT": 0.9},
        ("top-1", "change"): {"From RES": -0.25, "From RES & MLP & ATT": 0.7},
        ("random", "success"): {"From RES": 0.1},
        ("random", "change"): {"From RES": 0.05},
    }
    for (method, column), values in expected.items():
        trace = {"success": success, "change": change}[column][method]
        assert dict(zip(trace.x, trace.y, strict=True)) == values
        assert trace.error_y.array == pytest.approx([0.02] * len(values))
        assert trace.error_y.arrayminus == pytest.approx([0.01] * len(values))
    assert figure.layout.yaxis.matches is None  # a change is no share


def test_each_value_of_a_facet_has_panels_of_its_own_and_lines_go_from_left_to_right():
    keys = [("top-1", 2, 0.9), ("top-1", 4, 0.9), (CONTROL, 4, 0.2)]
    rows = [(*key[:2], up, 100 - up, key[2] - 0.1 * up) for key in keys for up in (1, 0, 2)]
    table = rated(rows, ("method", "layer", "above"), "change")
    figure = rate_panels(
        table, "above", "method", "Above", CAPTION, columns=["change"], facet="layer", lines=True
    )
    by_layer = {int(title[-1]): traces for title, traces in panels(figure).items()}
    assert sum(map(len, by_layer.values())) == len(keys)
    two = [by_layer[4][method].x for method in ("top-1", CONTROL)]
    assert (two[0] < two[1]).all()  # beside each other
    for method, layer, start in keys:
        trace = by_layer[layer][method]
        assert list(trace.text) == [0, 1, 2]  # on hover
        assert abs(trace.x - trace.text).max() < 0.2
        assert list(trace.y) == pytest.approx([start, start - 0.1, start - 0.2])


def test_shares_without_an_interval_are_one_panel():
    rows = [("pearson", "From RES", 1600, 0.8), ("pearson", "From nowhere", 400, 0.2)]
    table = pd.DataFrame([*rows, ("top-1", "From ATT", 3, 1.0)])
    table.columns = ["method", "group", "n", "share"]
    figure = rate_panels(table, "group", "method", "", "", columns=["share"])
    marks = {trace.name: dict(zip(trace.x, trace.y, strict=True)) for trace in figure.data}
    assert marks == {"pearson": {"From RES": 0.8, "From nowhere": 0.2}, "top-1": {"From ATT": 1}}


def test_what_is_removed_is_not_called_what_a_target_is_from():
    rows = [("From RES & MLP", "From RES", 9, 0.8), ("From RES & MLP", "From MLP", 9, 0.1)]
    table = pd.DataFrame(rows, columns=["group", "removed", "n", "share"])
    figure = rate_panels(table, "group", "removed", "", "", columns=["share"])
    assert [trace.name for trace in figure.data] == ["removed at RES", "removed at MLP"]
    assert [{*trace.x} for trace in figure.data] == [{"From RES & MLP"}] * 2
    assert len({trace.marker.symbol for trace in figure.data}) == 2


def test_groups_after_are_stacked_for_each_removal():
    rows = [
        ("From RES & MLP", "From RES & MLP", OFF, 3, 0.75),
        ("From RES & MLP", "From RES & MLP", "From nowhere", 1, 0.25),
        ("From RES & MLP", "From RES", "From MLP", 1500, 1.0),
        ("From RES", "From RES", OFF, 1, 0.2),
        ("From RES", "From RES", "From ATT", 4, 0.8),
        ("From ATT", "From ATT", OFF, 0, np.nan),
    ]
    table = pd.DataFrame(rows, columns=["group", "removed", "after", "n", "share"])
    figure = groups_after(table.astype({"group": "category", "after": "category"}), CAPTION)
    shares = {
        (group, removed, after): share
        for group, traces in panels(figure).items()
        for after, trace in traces.items()
        for removed, share in zip(trace.y, trace.x, strict=True)
    }
    expected = {(row[0], row[1].replace("From", "removed at"), row[2]): row[4] for row in rows}
    assert shares == {key: share for key, share in expected.items() if not np.isnan(share)}
    assert figure.layout.barmode == "relative"


def test_written_against_change_draws_single_sites_and_tells_what_lies_outside():
    linear = np.linspace(0, 1, 300)
    line = pd.DataFrame({"removed": "From RES", "linear": linear, "change": linear**2})
    rows = [
        ("From MLP", 0.3, -0.02), ("From MLP", 0.6, 1.0), ("From MLP", 90.0, 0.5),
        ("From MLP", 0.5, -70.0), ("From RES & MLP", 0.5, 0.5), ("From ATT", np.nan, 0.5),
    ]  # fmt: skip
    table = pd.concat([line, pd.DataFrame(rows, columns=line.columns)], ignore_index=True)
    table = table.assign(success=(table["change"] == 1) * 1.0, layer=3, feature=table.index)
    figure = written_against_change(table, CAPTION)
    assert "302 of 304 cases drawn, 2 outside" in figure.layout.title.subtitle.text
    drawn = panels(figure)
    points = {title: sum(len(t.x) for t in traces.values()) for title, traces in drawn.items()}
    assert points == {"From RES": 300, "From MLP": 2}
    at_mlp = drawn["From MLP"]["From MLP"]
    assert {*zip(at_mlp.x, at_mlp.y, strict=True)} == {(0.3, -0.02), (0.6, 1.0)}
    for shape in figure.layout.shapes:  # the diagonal
        assert (shape.x0, shape.x1) == (shape.y0, shape.y1) == figure.layout.xaxis.range
    many = pd.concat([line] * 20, ignore_index=True).assign(success=0.0, layer=3, feature=1)
    thinned = written_against_change(many, CAPTION)
    assert sum(len(t.x) for t in thinned.data) == 4000
    assert thinned == written_against_change(many, CAPTION)
