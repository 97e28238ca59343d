"""The figures of the deactivation experiments show what the tables hold, and leave out the rest."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from flowhelpers.core.figures import COLOURS
from flowhelpers.deactivation.experiments import CONTROL, OFF, SINGLE
from flowhelpers.deactivation.plots import (
    AFTER_COLOURS,
    AFTER_PATTERNS,
    METHOD_LOOKS,
    SPARE_LOOKS,
    against_control,
    group_shares_by_method,
    groups_after,
    in_layers_above,
    methods_by_group,
    one_at_a_time,
    rescaling_sweep,
    written_against_change,
)
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.groups.plots import GROUP_COLOURS, GROUP_MARKS

CAPTION = "suite toy · n = 12"
ALL = "RES &<br>MLP &<br>ATT"


def rated(rows: list[tuple], keys: tuple[str, ...], *columns: str) -> pd.DataFrame:
    """Rows of keys, n and values; each value's interval goes from 0.01 below to 0.02 above it."""
    table = pd.DataFrame(rows, columns=[*keys, "n", *columns])
    for column in columns:
        table[f"{column}_low"] = table[column] - 0.01
        table[f"{column}_high"] = table[column] + 0.02
    return table


def by_method() -> pd.DataFrame:
    """Two methods, groups in a wrong order, one without members in each of two ways."""
    rows = [
        ("top-1", "From RES & MLP & ATT", 1200, 0.9, 0.7),
        ("top-1", "From RES", 30, 0.5, -0.25),
        ("top-1", "From MLP", 0, 0.0, 0.0),
        ("random", "From RES", 40, 0.1, 0.05),
        ("random", "From ATT", 7, np.nan, np.nan),
        ("random", "From RES & MLP & ATT", 9, 0.2, np.nan),
    ]
    return rated(rows, ("method", "group"), "success", "change")


def in_panel(figure: go.Figure, row: int, col: int) -> list:
    """The traces of a panel that hold points, without bands."""
    traces = figure.select_traces(row=row, col=col)
    return [t for t in traces if t.type == "bar" or t.fill is None]


def check_bars(trace, up: float = 0.02, down: float = 0.01) -> None:
    """Error bars have the lengths that `rated` made."""
    assert list(trace.error_y.array) == pytest.approx([up] * len(trace.x))
    assert list(trace.error_y.arrayminus) == pytest.approx([down] * len(trace.x))


def panel_titles(figure: go.Figure) -> list[str]:
    return [each.text for each in figure.layout.annotations]


def legend(figure: go.Figure) -> list[str]:
    return [trace.name for trace in figure.data if trace.showlegend]


def sweep() -> pd.DataFrame:
    rows = [
        ("From MLP", 2.0, 21, -0.5, 0.25, 0.0),
        ("From MLP", 0.0, 20, 0.75, 0.00123, 0.5),
        ("From MLP", 1.0, 20, 0.0, 0.0, 0.0),
        ("From RES", 0.0, 1234, 0.25, 0.125, 0.1),
        ("From RES", 1.0, 1234, np.nan, 0.0, 0.0),
        ("From ATT", 0.0, 0, 0.0, 0.0, 0.0),
    ]
    return rated(rows, ("group", "r"), "change", "loss_change", "success")


def after() -> pd.DataFrame:
    rows = [
        ("From RES & MLP", "From RES & MLP", OFF, 3, 0.75),
        ("From RES & MLP", "From RES & MLP", "From nowhere", 1, 0.25),
        ("From RES & MLP", "From RES", "From MLP", 1500, 1.0),
        ("From RES & MLP", "From RES", OFF, 0, 0.0),
        ("From RES", "From RES", OFF, 1, 0.2),
        ("From RES", "From RES", "From ATT", 4, 0.8),
        ("From ATT", "From ATT", OFF, 0, np.nan),
    ]
    return pd.DataFrame(rows, columns=["group", "removed", "after", "n", "share"])


def above() -> pd.DataFrame:
    rows = [
        (method, layer, up, 100 - up, start - 0.1 * up)
        for method, start in (("top-1", 0.9), ("random", 0.2))
        for layer in (2, 3, 4, 5)
        for up in (1, 0, 2)
        if (method, layer) != ("random", 2)
    ]
    return rated(rows, ("method", "layer", "above"), "change")


def cases() -> pd.DataFrame:
    """300 cases of RES on a line, and a few others."""
    linear = np.linspace(0, 1, 300)
    table = pd.DataFrame({"removed": "From RES", "linear": linear, "change": linear**2})
    more = pd.DataFrame(
        {
            "removed": ["From MLP"] * 4 + ["From RES & MLP", "From ATT"],
            "linear": [0.3, 0.6, 90.0, 0.5, 0.5, np.nan],
            "change": [-0.02, 1.0, 0.5, -70.0, 0.5, 0.5],
        }
    )
    table = pd.concat([table, more], ignore_index=True)
    table = table.assign(success=(table["change"] == 1).astype(float), layer=3)
    return table.assign(feature=np.arange(len(table)))


def test_every_figure_says_suite_n_and_choices():
    layers = rated([(6, "top-1", 5, 0.5, 0.6)], ("layer", "method"), "success", "change")
    places = rated([("From RES", "From RES", 5, 0.5, 0.6)], ("group", "removed"), "change",
                   "success")  # fmt: skip
    figures = [
        methods_by_group(by_method(), CAPTION),
        group_shares_by_method(by_method().rename(columns={"success": "share"}), CAPTION),
        rescaling_sweep(sweep(), CAPTION),
        one_at_a_time(places, CAPTION),
        groups_after(after(), CAPTION),
        against_control(layers, CAPTION),
        in_layers_above(above(), CAPTION),
        written_against_change(cases(), CAPTION),
    ]
    assert all(figure.layout.title.subtitle.text == CAPTION for figure in figures)
    assert len({figure.layout.title.text for figure in figures}) == len(figures)
    for figure in figures:
        assert figure.layout.legend.y < 0
        assert figure.layout.margin.b >= 115
        assert len(legend(figure)) == len(set(legend(figure))) > 0


def test_methods_stand_in_table_order_with_their_rates_and_intervals():
    figure = methods_by_group(by_method(), CAPTION)
    assert panel_titles(figure) == ["successful deactivations", "activation change"]
    assert legend(figure) == ["top-1", "random"]
    success, change = in_panel(figure, 1, 1), in_panel(figure, 1, 2)
    assert [t.name for t in success] == [t.name for t in change] == ["top-1", "random"]
    assert [list(t.x) for t in success] == [["RES", ALL], ["RES", ALL]]
    assert [list(t.y) for t in success] == [[0.5, 0.9], [0.1, 0.2]]
    assert [list(t.x) for t in change] == [["RES", ALL], ["RES"]]
    assert [list(t.y) for t in change] == [[-0.25, 0.7], [0.05]]
    for trace in (*success, *change):
        check_bars(trace)
        assert trace.mode == "markers"
        look = METHOD_LOOKS[trace.name]
        assert (trace.marker.color, trace.marker.symbol) == look[:2]
    assert list(success[0].hovertext) == [
        "50.0% (49.0% to 52.0%), n = 30",
        "90.0% (89.0% to 92.0%), n = 1,200",
    ]
    assert change[0].hovertext[0] == "-25.0% (-26.0% to -23.0%), n = 30"
    assert "%{x}: %{hovertext}" in success[0].hovertemplate
    layout = figure.layout
    assert list(layout.xaxis.categoryarray) == ["RES", "ATT", ALL]  # no members: no place
    assert layout.xaxis2.categoryarray == layout.xaxis.categoryarray
    assert tuple(layout.xaxis.range) == (-0.5, 2.5)
    assert layout.yaxis.title.text == "share of cases"
    assert layout.yaxis2.title.text == "mean of 1 − new / old"
    assert (layout.yaxis.zeroline, layout.yaxis2.zeroline) == (False, True)
    assert "%" in layout.yaxis.tickformat
    assert "%" in layout.yaxis2.tickformat
    assert layout.xaxis.title.text == "where the target has predecessors"
    assert layout.scattermode == "group"  # marks of methods stand side by side
    assert len({t.offsetgroup for t in success}) == 2


def test_sets_of_targets_have_a_row_of_panels_each():
    one, two = by_method().assign(set="own denominator"), by_method().assign(set="common set")
    two["success"] /= 2
    figure = methods_by_group(pd.concat([one, two]), CAPTION)
    assert panel_titles(figure) == [
        f"{what}, {each}"
        for each in ("own denominator", "common set")
        for what in ("successful deactivations", "activation change")
    ]
    assert list(in_panel(figure, 1, 1)[0].y) == [0.5, 0.9]
    assert list(in_panel(figure, 2, 1)[0].y) == [0.25, 0.45]
    assert list(in_panel(figure, 2, 2)[0].y) == [-0.25, 0.7]
    assert legend(figure) == ["top-1", "random"]
    assert figure.layout.height > methods_by_group(one, CAPTION).layout.height + 300
    assert figure.layout.yaxis3.title.text == "share of cases"


def test_rates_without_intervals_have_no_error_bars_and_missing_ones_are_not_told():
    bare = by_method()[["method", "group", "n", "success", "change"]]
    trace = in_panel(methods_by_group(bare, CAPTION), 1, 1)[0]
    assert trace.error_y.array is None
    assert trace.hovertext[0] == "50.0%, n = 30"
    holes = by_method()
    holes.loc[1, ["success_low", "success_high"]] = np.nan
    assert in_panel(methods_by_group(holes, CAPTION), 1, 1)[0].hovertext[0] == "50.0%, n = 30"


def test_methods_look_alike_everywhere_and_differ_from_each_other():
    looks = [*METHOD_LOOKS.values(), *SPARE_LOOKS]
    assert len({look[0] for look in looks}) == len({look[1] for look in looks}) == len(looks)
    assert len({look[2] for look in looks}) == len(looks)
    names = ["a", "top-1", "b", "c"]
    rows = [(name, "From RES", 5, 0.5, 0.6) for name in names]
    figure = methods_by_group(rated(rows, ("method", "group"), "success", "change"), CAPTION)
    colours = [trace.marker.color for trace in in_panel(figure, 1, 1)]
    a, b, c = (look[0] for look in SPARE_LOOKS)
    assert colours == [a, METHOD_LOOKS["top-1"][0], b, c]
    rows.append(("d", "From RES", 5, 0.5, 0.6))
    with pytest.raises(ValueError, match="methods a, top-1, b, c, d: expected at most 3 beside"):
        methods_by_group(rated(rows, ("method", "group"), "success", "change"), CAPTION)


def test_group_shares_are_bars_of_each_method():
    rows = [
        ("pearson", "From RES", 1600, 0.8),
        ("pearson", "From nowhere", 400, 0.2),
        ("pearson", "From ATT", 0, np.nan),
        ("a <b>", "From ATT", 3, 1.0),
    ]
    table = pd.DataFrame(rows, columns=["method", "group", "n", "share"])
    figure = group_shares_by_method(table, CAPTION)
    first, second = figure.data
    assert (first.type, first.name, second.name) == ("bar", "pearson", "a &lt;b&gt;")
    assert (list(first.x), list(first.y)) == (["nowhere", "RES"], [0.2, 0.8])
    assert (list(second.x), list(second.y)) == (["ATT"], [1.0])
    assert list(first.hovertext) == ["20.0%, n = 400", "80.0%, n = 1,600"]
    assert first.error_y.array is None
    assert list(figure.layout.xaxis.categoryarray) == ["nowhere", "RES", "ATT"]
    assert figure.layout.yaxis.title.text == "share of targets"
    assert figure.layout.barmode == "group"
    assert first.offsetgroup != second.offsetgroup
    look = (first.marker.color, first.marker.pattern.shape)
    assert look == (METHOD_LOOKS["pearson"][0], METHOD_LOOKS["pearson"][3])
    sure = table.assign(share_low=table["share"] - 0.01, share_high=table["share"] + 0.02)
    for trace in group_shares_by_method(sure, CAPTION).data:
        check_bars(trace)


def test_the_sweep_has_a_line_and_a_band_a_group_and_marks_where_nothing_changes():
    figure = rescaling_sweep(sweep(), CAPTION)
    titles = ["activation change", "change of the loss", "successful deactivations"]
    assert panel_titles(figure) == titles
    assert legend(figure) == ["From RES", "From MLP", "r = 1: nothing changed"]
    expected = {
        1: ([0.25], [0.75, 0.0, -0.5]),
        2: ([0.125, 0.0], [0.00123, 0.0, 0.25]),
        3: ([0.1, 0.0], [0.5, 0.0, 0.0]),
    }
    for col, (res, mlp) in expected.items():
        lines = [t for t in in_panel(figure, 1, col) if t.x[0] is not None]
        assert [t.name for t in lines] == ["From RES", "From MLP"]
        assert [list(t.y) for t in lines] == [res, mlp]
        assert [list(t.x) for t in lines] == [[0.0, 1.0][: len(res)], [0.0, 1.0, 2.0]]
        for line in lines:
            assert line.mode == "lines+markers"
            assert line.line.color == GROUP_COLOURS[line.name]
            assert line.marker.symbol == GROUP_MARKS[line.name]
        band = [t for t in figure.select_traces(row=1, col=col) if t.fill == "toself"][1]
        assert list(band.x) == [0.0, 1.0, 2.0, 2.0, 1.0, 0.0]
        high, low = [y + 0.02 for y in mlp], [y - 0.01 for y in mlp]
        assert list(band.y) == pytest.approx([*high, *low[::-1]])
        assert band.fillcolor == GROUP_COLOURS["From MLP"]
        assert band.showlegend is False
    change, loss = in_panel(figure, 1, 1)[1], in_panel(figure, 1, 2)[1]
    assert change.hovertext[2] == "-50.0% (-51.0% to -48.0%), n = 21"
    assert loss.hovertext[0] == "0.123% (-0.877% to 2.123%), n = 20"  # losses change little
    assert in_panel(figure, 1, 1)[0].hovertext[0].endswith("n = 1,234")
    assert [(s.x0, s.x1, s.xref) for s in figure.layout.shapes] == [
        (1, 1, "x"), (1, 1, "x2"), (1, 1, "x3"),
    ]  # fmt: skip
    names = [figure.layout[axis].title.text for axis in ("yaxis", "yaxis2", "yaxis3")]
    assert names == ["mean of 1 − new / old", "relative to the loss before", "share of cases"]
    assert figure.layout.xaxis2.title.text == "r, the factor"


def test_one_place_at_a_time_has_a_series_a_place_and_no_joint_ones():
    rows = [
        ("From RES & MLP", "From MLP", 11, 0.6, 0.3),
        ("From RES & MLP", "From RES & MLP", 10, 0.9, 0.8),
        ("From MLP & ATT", "From MLP & ATT", 10, 0.9, 0.8),
        ("From RES", "From RES", 12, 0.4, 0.1),
        ("From RES & MLP", "From RES", 13, -0.2, 0.0),
        ("From ATT", "From ATT", 0, 0.0, 0.0),
    ]
    figure = one_at_a_time(rated(rows, ("group", "removed"), "change", "success"), CAPTION)
    assert panel_titles(figure) == ["activation change", "successful deactivations"]
    assert legend(figure) == ["only RES removed", "only MLP removed"]
    for col, values in ((1, ([0.4, -0.2], [0.6])), (2, ([0.1, 0.0], [0.3]))):
        res, mlp = in_panel(figure, 1, col)
        assert (list(res.x), list(mlp.x)) == (["RES", "RES &<br>MLP"], ["RES &<br>MLP"])
        assert (list(res.y), list(mlp.y)) == values
        assert (res.marker.color, mlp.marker.color) == (COLOURS["res"], COLOURS["mlp"])
        assert res.marker.symbol != mlp.marker.symbol
        assert res.offsetgroup != mlp.offsetgroup
        assert [text.rsplit(", ", 1)[1] for text in res.hovertext] == ["n = 12", "n = 13"]
        check_bars(res)
        check_bars(mlp)
    assert list(figure.layout.xaxis.categoryarray) == ["RES", "RES &<br>MLP"]
    assert figure.layout.yaxis.title.text == "mean of 1 − new / old"
    assert figure.layout.yaxis2.title.text == "share of cases"


@pytest.mark.parametrize("column_type", [{}, dict.fromkeys(["group", "after"], "category")])
def test_groups_after_are_stacked_for_each_removal(column_type: dict[str, str]):
    figure = groups_after(after().astype(column_type), CAPTION)
    assert panel_titles(figure) == ["From RES", "From RES & MLP"]  # none is from attention
    assert legend(figure) == [OFF, "From nowhere", "From MLP", "From ATT"]
    assert figure.layout.barmode == "stack"
    res = {trace.name: trace for trace in in_panel(figure, 1, 1)}
    assert [*res] == [OFF, "From ATT"]
    assert (list(res[OFF].x), list(res[OFF].y)) == ([0.2], ["RES<br>n = 5"])
    assert (list(res["From ATT"].x), list(res["From ATT"].y)) == ([0.8], ["RES<br>n = 5"])
    assert list(res[OFF].text) == ["20%"]
    assert res["From ATT"].text is None
    assert list(res["From ATT"].hovertext) == ["RES removed: 4 of 5 cases, 80.0%"]
    both = {trace.name: trace for trace in in_panel(figure, 1, 2)}
    assert [*both] == [OFF, "From nowhere", "From MLP"]
    assert (list(both[OFF].x), list(both[OFF].y)) == ([0.75], ["RES & MLP<br>n = 4"])
    assert list(both["From nowhere"].x) == [0.25]
    assert list(both["From MLP"].y) == ["RES<br>n = 1,500"]
    assert list(both["From MLP"].hovertext) == ["RES removed: 1,500 of 1,500 cases, 100.0%"]
    order = ("RES<br>n = 1,500", "RES & MLP<br>n = 4")
    assert figure.layout.yaxis2.categoryarray == order
    assert tuple(figure.layout.yaxis.range) == tuple(figure.layout.yaxis2.range) == (1.5, -0.5)
    assert all(trace.orientation == "h" for trace in figure.data)
    assert all(t.marker.color == AFTER_COLOURS[t.name] for t in figure.data)
    assert all(t.marker.pattern.shape == AFTER_PATTERNS[t.name] for t in figure.data)
    assert AFTER_COLOURS[OFF] not in GROUP_COLOURS.values()
    assert [*AFTER_COLOURS] == [OFF, *GROUPS]
    assert figure.layout.xaxis.title.text == figure.layout.xaxis2.title.text == "share of cases"


@pytest.mark.parametrize("n", range(1, 8))
def test_any_number_of_groups_fits_the_grid(n: int):
    rows = [(group, group, OFF, 2, 1.0) for group in GROUPS[1 : n + 1]]
    table = pd.DataFrame(rows, columns=["group", "removed", "after", "n", "share"])
    figure = groups_after(table, CAPTION)
    assert panel_titles(figure) == [*GROUPS[1 : n + 1]]
    assert len(figure.data) == n
    assert legend(figure) == [OFF]
    wide = [axis.domain == (0, 1) for axis in figure.select_xaxes()]
    assert wide == [False] * (n - n % 2) + [True] * (n % 2)


def test_controls_stand_beside_matches_layer_by_layer():
    rows = [
        (12, "top-1", 40, 0.8, 0.9),
        (6, "top-1", 30, 0.6, 0.7),
        (6, CONTROL, 20, 0.1, -0.1),
        (12, CONTROL, 0, 0.0, 0.0),
    ]
    figure = against_control(rated(rows, ("layer", "method"), "success", "change"), CAPTION)
    assert panel_titles(figure) == ["successful deactivations", "activation change"]
    assert legend(figure) == ["top-1", CONTROL]
    for col, values in ((1, ([0.6, 0.8], [0.1])), (2, ([0.7, 0.9], [-0.1]))):
        match, control = in_panel(figure, 1, col)
        assert (list(match.x), list(control.x)) == (["6", "12"], ["6"])
        assert (list(match.y), list(control.y)) == values
        assert match.marker.symbol != control.marker.symbol
        assert match.offsetgroup != control.offsetgroup
        check_bars(match)
        check_bars(control)
    assert in_panel(figure, 1, 1)[0].hovertext[1] == "80.0% (79.0% to 82.0%), n = 40"
    assert "layer %{x}: %{hovertext}" in in_panel(figure, 1, 1)[0].hovertemplate
    assert list(figure.layout.xaxis.categoryarray) == ["6", "12"]
    assert figure.layout.xaxis.type == "category"
    assert figure.layout.xaxis.title.text == "layer of the target"
    assert figure.layout.yaxis.title.text == "share of cases"
    assert figure.layout.yaxis2.title.text == "mean of 1 − new / old"


def test_layers_above_have_a_panel_a_layer_and_a_line_a_method():
    figure = in_layers_above(above(), CAPTION)
    assert panel_titles(figure) == [f"targets at layer {layer}" for layer in (2, 3, 4, 5)]
    assert legend(figure) == ["top-1", "random"]
    assert [t.name for t in in_panel(figure, 1, 1)] == ["top-1"]
    top, random = in_panel(figure, 2, 1)
    assert list(top.x) == list(random.x) == [0, 1, 2]
    assert list(top.y) == pytest.approx([0.9, 0.8, 0.7])
    assert list(random.y) == pytest.approx([0.2, 0.1, 0.0])
    assert (top.line.dash, random.line.dash) == ("solid", "dot")
    assert top.hovertext[1] == "80.0% (79.0% to 82.0%), n = 99"
    band = next(t for t in figure.select_traces(row=2, col=1) if t.fill == "toself")
    assert list(band.x) == [0, 1, 2, 2, 1, 0]
    assert list(band.y) == pytest.approx([0.92, 0.82, 0.72, 0.69, 0.79, 0.89])
    assert figure.layout.xaxis4.title.text == "layers above the target"
    titles = [axis.title.text for axis in figure.select_yaxes()]
    assert titles[:3] == ["mean of 1 − new / old", "", ""]
    single = in_layers_above(above().query("layer == 3"), CAPTION)
    assert panel_titles(single) == ["targets at layer 3"]
    assert len(in_panel(single, 1, 1)) == 2


def test_written_against_change_draws_single_places_and_tells_what_lies_outside():
    figure = written_against_change(cases(), CAPTION)
    titles = panel_titles(figure)
    assert len(titles) == 2  # what attention writes is not known
    assert titles[0].startswith("R (stream)<br>")
    assert "300 of 300 drawn, 0 outside" in titles[0]
    assert titles[1].startswith("M (MLP)<br>")
    assert "2 of 4 drawn, 2 outside" in titles[1]
    points = {
        (col, t.marker.symbol): t for col in (1, 2) for t in in_panel(figure, 1, col)
        if t.mode == "markers" and t.x[0] is not None
    }  # fmt: skip
    table = cases()
    res = table[table["removed"] == "From RES"]
    on = res[res["success"] == 0]
    assert list(points[1, "circle-open"].x) == on["linear"].tolist()
    assert list(points[1, "circle-open"].y) == on["change"].tolist()
    assert list(points[1, "circle"].x) == list(points[1, "circle"].y) == [1.0]
    assert points[1, "circle"].marker.color == COLOURS["res"]
    assert points[2, "circle"].marker.color == COLOURS["mlp"]
    assert list(points[2, "circle-open"].x) == [0.3]
    assert list(points[2, "circle-open"].y) == [-0.02]
    assert (list(points[2, "circle"].x), list(points[2, "circle"].y)) == ([0.6], [1.0])
    assert list(points[2, "circle"].hovertext) == ["3/res/301"]
    assert legend(figure) == ["as much as is written", "still active", "deactivated"]
    low, high = figure.layout.xaxis.range
    assert (low, high) == pytest.approx((-0.05, 1.05))
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        assert tuple(axis.range) == (low, high)
    for col in (1, 2):
        diagonal = [t for t in in_panel(figure, 1, col) if t.mode == "lines"]
        assert [(tuple(t.x), tuple(t.y)) for t in diagonal] == [((low, high), (low, high))]
    assert figure.layout.xaxis.title.text == "change by what is written"
    assert figure.layout.yaxis.title.text == "activation change"


def test_the_range_follows_the_points_within_limits():
    table = cases()
    table["linear"] = np.where(table.index % 10, table["linear"], 1.5)
    assert written_against_change(table, CAPTION).layout.xaxis.range[1] == pytest.approx(1.55)
    table["linear"] = np.where(table.index % 10, table["linear"], 50)
    table["change"] = np.where(table.index % 10 == 1, -50, table["change"])
    figure = written_against_change(table, CAPTION)
    assert tuple(figure.layout.xaxis.range) == pytest.approx((-1.05, 2.05))
    assert "240 of 300 drawn, 60 outside" in panel_titles(figure)[0]


def test_points_are_thinned_always_alike():
    figure = written_against_change(cases(), CAPTION, most=50)
    assert "50 of 300 drawn, 0 outside" in panel_titles(figure)[0]
    assert "2 of 4 drawn, 2 outside" in panel_titles(figure)[1]
    marks = [t for t in in_panel(figure, 1, 1) if t.mode == "markers"]
    places = [x for trace in marks for x in trace.x if x is not None]
    assert len(places) == len(set(places)) == 50
    known = set(cases()["linear"])
    assert set(places) <= known
    assert np.ptp(places) > 0.8  # drawn from all, not the first ones
    assert written_against_change(cases(), CAPTION, most=50) == figure


def test_every_place_that_is_edited_alone_has_its_colour():
    table = cases().assign(removed=np.resize(SINGLE, len(cases())), linear=0.5, change=0.5)
    figure = written_against_change(table, CAPTION)
    names = [title.split("<br>")[0] for title in panel_titles(figure)]
    assert names == ["R (stream)", "M (MLP)", "A (attention)"]
    for col, module in enumerate(COLOURS, 1):
        assert in_panel(figure, 1, col)[0].marker.color == COLOURS[module]
