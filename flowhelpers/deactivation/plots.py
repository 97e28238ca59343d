"""The figures of the deactivation experiments: tables in, plotly figures out, as in `plots`.

Rates are shares; a `change` of 1 means that the feature is off, 0 that it is as it was, and below 0
that it grew. A rate bears its interval where the table has one, as an error bar or a band and in
the hover; a group or method without members is left out, not drawn at zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flowhelpers.core.features import FeatureId
from flowhelpers.core.figures import (
    COLOURS,
    GREY,
    INK,
    NAMES,
    SYMBOLS,
    add_line,
    categories,
    dress,
    error_bars,
    escape,
    legend_below,
    looks,
    pattern,
    percent,
    rated,
    step,
    unique_legend,
)
from flowhelpers.deactivation.experiments import CONTROL, OFF, SINGLE
from flowhelpers.groups.occurrences import GROUPS, modules_of
from flowhelpers.groups.plots import GROUP_COLOURS, GROUP_MARKS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

PANELS = {
    "success": ("successful deactivations", "share of cases"),
    "change": ("activation change", "mean of 1 − new / old"),
    "loss_change": ("change of the loss", "relative to the loss before"),
}
METHOD_LOOKS = {
    "random": (GREY, "x", "dot", "."),
    "permutation": ("#56B4E9", "triangle-up", "dash", "\\"),
    "top-1": ("#0072B2", "circle", "solid", ""),
    "top-5": ("#E69F00", "diamond", "dashdot", "/"),
    "pearson": ("#CC79A7", "square", "longdash", "x"),
    CONTROL: (INK, "star", "longdashdot", "-"),
}
SPARE_LOOKS = (
    ("#009E73", "hexagon", "10px,3px", "|"),
    ("#D55E00", "pentagon", "3px,5px", "+"),
    ("#882255", "cross", "12px,3px,3px,3px", "/"),
)
AFTER_COLOURS = {OFF: "#882255"} | GROUP_COLOURS
AFTER_PATTERNS: dict[str, str] = dict(
    zip((OFF, *GROUPS), ("", ".", "", "/", "\\", "x", "-", "|", "+"), strict=True)
)


def methods_by_group(rates: pd.DataFrame, subtitle: str) -> go.Figure:
    """What removing all predecessors does, for each group and way to match them (Figure 6).

    Args:
        rates: As `deactivation.success_rates` gives by `method` and `group`; `set` if there are
            several sets of targets, a row of panels for each.
        subtitle: Suite, n and choices.

    Raises:
        ValueError: If there are more methods than looks.
    """
    table = rates if "set" in rates else rates.assign(set="")
    sets, columns = [*dict.fromkeys(table["set"])], ("success", "change")
    titles = [", ".join(filter(None, (PANELS[c][0], str(each)))) for each in sets for c in columns]
    plot = 300 * len(sets) + 125 * (len(sets) - 1)
    figure = make_subplots(
        len(sets), 2, subplot_titles=[*map(escape, titles)], vertical_spacing=125 / plot
    )
    title = "Does removing the predecessors of a feature remove it?"
    dress(figure, title, subtitle, 225 + plot)
    for method, look in _looks(table["method"]).items():
        for row, each in enumerate(sets, 1):
            part = table[(table["method"] == method) & (table["set"] == each)]
            for col, column in enumerate(columns, 1):
                _add_marks(figure, _at_group(part), column, method, look, row, col)
    return _over_groups(figure, table, columns)


def group_shares_by_method(shares: pd.DataFrame, subtitle: str) -> go.Figure:
    """How targets are spread over the groups, for each way to match (Figure 15 a).

    Args:
        shares: One row a `method` and `group`: `n`, `share`, with `share_low` and `share_high` if
            there are intervals.
        subtitle: Suite, n and choices.

    Raises:
        ValueError: If there are more methods than looks.
    """
    figure = make_subplots(1, 1)
    dress(figure, "Where targets come from, by how matches are found", subtitle, 540)
    for method, look in _looks(shares["method"]).items():
        part = rated(_at_group(shares[shares["method"] == method]), "share")
        if part.empty:
            continue
        figure.add_bar(
            x=part["at"], y=part["share"], name=escape(method), offsetgroup=method,
            marker={"color": look["color"], "pattern": pattern(look["pattern"])},
            error_y=error_bars(part), hovertext=_told(part),
            hovertemplate="%{x}: %{hovertext}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_yaxes(title="share of targets", tickformat=".2~%", rangemode="tozero")
    return _over_groups(figure, shares, ())


def rescaling_sweep(rates: pd.DataFrame, subtitle: str) -> go.Figure:
    """What happens as predecessors are rescaled by r, for each group (Figure 7).

    Args:
        rates: One row an `r` and `group`: `n`, and `change`, `loss_change` and `success` with
            `_low` and `_high`. At r = 0 predecessors are removed, at 1 nothing is edited.
        subtitle: Suite, n and choices.
    """
    columns = ("change", "loss_change", "success")
    titles = [PANELS[column][0] for column in columns]
    figure = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.11)
    dress(figure, "What rescaling its predecessors does to a feature", subtitle, 560)
    for group in GROUPS:
        part = rates[rates["group"] == group].sort_values("r")
        look = {"color": GROUP_COLOURS[group], "symbol": GROUP_MARKS[group], "dash": "solid"}
        for col, column in enumerate(columns, 1):
            _add_line(figure, part, "r", column, group, look, 1, col)
    line = {"color": GREY, "width": 1, "dash": "dot"}
    figure.add_vline(x=1, line=line, layer="below")
    figure.add_scatter(x=[None], y=[None], mode="lines", name="r = 1: nothing changed", line=line)
    figure.update_xaxes(title="r, the factor")
    for col, column in enumerate(columns, 1):
        _value_axis(figure, column, 1, col)
    return legend_below(unique_legend(figure))


def one_at_a_time(rates: pd.DataFrame, subtitle: str) -> go.Figure:
    """What removing the predecessors of one place does, for each group (Figure 8).

    Args:
        rates: As `deactivation.success_rates` gives by `group` and `removed`; rows that removed
            several places at once are not drawn.
        subtitle: Suite, n and choices.
    """
    table, columns = rates[rates["removed"].isin(SINGLE)], ("change", "success")
    figure = make_subplots(1, 2, subplot_titles=[PANELS[column][0] for column in columns])
    dress(figure, "Removing the predecessors of one place at a time", subtitle, 525)
    for place in SINGLE:
        part = _at_group(table[table["removed"] == place])
        look = {"color": COLOURS[modules_of(place)[0]], "symbol": GROUP_MARKS[place]}
        for col, column in enumerate(columns, 1):
            _add_marks(figure, part, column, f"only {_short(place)} removed", look, 1, col)
    return _over_groups(figure, table, columns)


def groups_after(shares: pd.DataFrame, subtitle: str) -> go.Figure:
    """The group of a target once some of its predecessors are removed, or that it is off (15 b).

    Args:
        shares: One row a `group`, `removed` and `after`, a group or "Deactivated": `n`, the cases
            that end there, and `share`, of all cases of that group from which that was removed.
        subtitle: Suite, n and choices.
    """
    table = rated(shares, "share")
    cases = table.groupby(["group", "removed"], observed=True)["n"].transform("sum")
    removed = [_short(each) for each in table["removed"]]
    table = table.assign(
        rank=[GROUPS.index(each) for each in table["removed"]],
        bar=[f"{each}<br>n = {n:,}" for each, n in zip(removed, cases, strict=True)],
        hover=[
            f"{each} removed: {n:,} of {whole:,} cases, {share:.1%}"
            for each, n, whole, share in zip(
                removed, table["n"], cases, table["share"], strict=True
            )
        ],
    )
    order = {
        group: [*dict.fromkeys(part.sort_values("rank")["bar"])]
        for group, part in table.groupby("group", observed=True)
    }
    groups = [group for group in GROUPS[1:] if group in order]
    rows, odd = -(-len(groups) // 2), len(groups) % 2
    counts = [len(order[group]) for group in groups]
    tall = [max(counts[2 * row : 2 * row + 2]) for row in range(rows)]  # bars are equally thick
    gap = 80
    plot = 40 * sum(tall) + gap * (rows - 1)
    specs: list[list[dict[str, int] | None]] = [[{}, {}] for _ in range(rows)]
    if odd:
        specs[-1] = [{"colspan": 2}, None]
    figure = make_subplots(
        rows, 2, subplot_titles=groups, specs=specs, row_heights=tall,
        horizontal_spacing=0.17, vertical_spacing=gap / plot if rows > 1 else None,
    )  # fmt: skip
    title = "What becomes of a feature whose predecessors are removed"
    dress(figure, title, subtitle, 225 + plot)
    for after, colour in AFTER_COLOURS.items():
        for place, group in enumerate(groups):
            part = table[(table["group"] == group) & (table["after"] == after)]
            if part.empty:
                continue
            figure.add_bar(
                x=part["share"], y=part["bar"], name=after, legendgroup=after, orientation="h",
                marker={"color": colour, "pattern": pattern(AFTER_PATTERNS[after])},
                text=[percent(share) for share in part["share"]] if after == OFF else None,
                textposition="inside", insidetextanchor="start", textangle=0,
                hovertext=part["hover"],
                hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
                row=place // 2 + 1, col=place % 2 + 1,
            )  # fmt: skip
    for place, group in enumerate(groups):
        figure.update_yaxes(
            categoryorder="array", categoryarray=order[group], range=[tall[place // 2] - 0.5, -0.5],
            row=place // 2 + 1, col=place % 2 + 1,
        )  # fmt: skip
    figure.update_layout(
        barmode="stack", bargap=0.2, uniformtext={"minsize": 10, "mode": "hide"},
        legend_traceorder="normal",
    )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_xaxes(title="share of cases", row=rows)
    legend_below(unique_legend(figure)).update_yaxes(showgrid=False)
    return figure.update_layout(margin_l=125)


def against_control(rates: pd.DataFrame, subtitle: str) -> go.Figure:
    """Matched predecessors against features drawn at random, layer by layer.

    Args:
        rates: As `deactivation.success_rates` gives by `layer` and `method`.
        subtitle: Suite, n and choices.

    Raises:
        ValueError: If there are more methods than looks.
    """
    columns = ("success", "change")
    figure = make_subplots(1, 2, subplot_titles=[PANELS[column][0] for column in columns])
    dress(figure, "Do matches do more than other active features?", subtitle, 525)
    layers = sorted(rates["layer"].unique())
    table = rates.assign(at=rates["layer"].astype(str)).sort_values("layer", kind="stable")
    for method, look in _looks(rates["method"]).items():
        part = table[table["method"] == method]
        for col, column in enumerate(columns, 1):
            _add_marks(figure, part, column, method, look, 1, col, "layer %{x}: ")
    for col, column in enumerate(columns, 1):
        _value_axis(figure, column, 1, col)
    figure.update_xaxes(title="layer of the target", dtick=step(rates))
    return legend_below(categories(unique_legend(figure), map(str, layers)))


def in_layers_above(rates: pd.DataFrame, subtitle: str) -> go.Figure:
    """Whether what a removal does fades or grows in the layers above the target.

    Args:
        rates: One row a `method`, `layer` (of the target) and `above` (so many layers above it):
            `n` and `change` with `change_low` and `change_high`.
        subtitle: Suite, n and choices.

    Raises:
        ValueError: If there are more methods than looks.
    """
    layers = sorted(rates["layer"].unique())
    across = min(len(layers), 3)
    down = -(-len(layers) // across)
    plot = 300 * down + 90 * (down - 1)
    figure = make_subplots(
        down, across, shared_yaxes="all", subplot_titles=[f"targets at layer {x}" for x in layers],
        horizontal_spacing=0.04, vertical_spacing=90 / plot if down > 1 else None,
    )  # fmt: skip
    dress(figure, "Does the effect fade in the layers above?", subtitle, 225 + plot)
    for method, look in _looks(rates["method"]).items():
        for place, layer in enumerate(layers):
            part = rates[(rates["method"] == method) & (rates["layer"] == layer)]
            part, where = part.sort_values("above"), divmod(place, across)
            _add_line(figure, part, "above", "change", method, look, where[0] + 1, where[1] + 1)
    for place in range(len(layers)):
        _value_axis(figure, "change", place // across + 1, place % across + 1)
    figure.update_yaxes(title="").update_yaxes(title=PANELS["change"][1], col=1)
    ticks = step(rates.assign(layer=rates["above"]))
    figure.update_xaxes(title="layers above the target", dtick=ticks)
    return legend_below(unique_legend(figure))


def written_against_change(table: pd.DataFrame, subtitle: str, most: int = 4000) -> go.Figure:
    """What a removal takes away by what was written alone, against what happens, case by case.

    Axes go from the 1 % to the 99 % quantile of all values, but hold 0 and 1 and stay within -1
    and 2; titles tell how many cases lie outside, and how many are drawn.

    Args:
        table: As `deactivation.deactivate` gives; cases that edited several places, or lack a
            value, are not drawn.
        subtitle: Suite, n and choices.
        most: How many points a panel shows at most, drawn at random with a fixed seed.
    """
    known = table[table["removed"].isin(SINGLE)].dropna(subset=["linear", "change", "success"])
    places = [place for place in SINGLE if (known["removed"] == place).any()]
    both = known[["linear", "change"]].to_numpy().ravel()
    low, high = np.quantile(both, [0.01, 0.99]) if len(both) else (0.0, 1.0)
    low, high = max(min(low, 0.0), -1.0) - 0.05, min(max(high, 1.0), 2.0) + 0.05
    inside = known["linear"].between(low, high) & known["change"].between(low, high)
    titles, drawn = [], {}
    for place in places:
        here = known["removed"] == place
        n, there = int(here.sum()), known[here & inside]
        drawn[place] = there.sample(min(most, len(there)), random_state=0).sort_index()
        symbol, name = (names[modules_of(place)[0]] for names in (SYMBOLS, NAMES))
        counts = f"{len(drawn[place]):,} of {n:,} drawn, {n - len(there):,} outside"
        titles.append(f"{symbol} ({name})<br><span style='font-size:12px'>{counts}</span>")
    figure = make_subplots(1, max(len(places), 1), shared_yaxes=True, subplot_titles=titles)
    dress(figure, "What is written against what happens", subtitle, 600)
    kinds = ((0, "still active", "circle-open"), (1, "deactivated", "circle"))
    line = {"color": INK, "width": 1, "dash": "dot"}
    for col, place in enumerate(places, 1):
        for success, name, symbol in kinds:
            part = drawn[place][drawn[place]["success"] == success]
            figure.add_scatter(
                x=part["linear"], y=part["change"], mode="markers", name=name, showlegend=False,
                marker={"color": COLOURS[modules_of(place)[0]], "symbol": symbol, "size": 5},
                opacity=0.6, row=1, col=col,
                hovertext=[
                    str(FeatureId(layer, "res", feature))
                    for layer, feature in zip(part["layer"], part["feature"], strict=True)
                ],
                hovertemplate="%{hovertext}: written %{x:.2f}, change %{y:.2f}"
                "<extra>%{fullData.name}</extra>",
            )  # fmt: skip
        figure.add_scatter(
            x=[low, high], y=[low, high], mode="lines", line=line, name="as much as is written",
            legendgroup="diagonal", hoverinfo="skip", row=1, col=col,
        )  # fmt: skip
    for _, name, symbol in kinds:
        look = {"color": INK, "symbol": symbol, "size": 7}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=look)
    figure.update_xaxes(title="change by what is written", showgrid=True)
    figure.update_yaxes(title="activation change", col=1)
    figure.update_xaxes(range=[low, high]).update_yaxes(range=[low, high])
    legend_below(unique_legend(figure))  # its top margin, and room for titles of two lines
    return figure.update_layout(
        height=625, margin_t=135, title={"y": 1 - 50 / 625, "yanchor": "middle"}
    )


def _looks(methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """How each method is drawn, in the order given; known ones look alike in all figures."""
    return looks(methods, METHOD_LOOKS, SPARE_LOOKS, "methods")


def _told(part: pd.DataFrame, digits: int = 1) -> list[str]:
    """Rates with interval and n, for a hover; changes of a loss are small and need digits."""
    words = []
    for row in part.to_dict("records"):
        between = [row.get(end, np.nan) for end in ("low", "high")]
        low, high = (f"{end:.{digits}%}" for end in between)
        interval = "" if np.isnan(between).any() else f" ({low} to {high})"
        words.append(f"{row['share']:.{digits}%}{interval}, n = {row['n']:,}")
    return words


def _short(group: str) -> str:
    return group.removeprefix("From ")


def _at_group(table: pd.DataFrame) -> pd.DataFrame:
    """The rows in the order of the groups, with the text that stands at the axis as `at`."""
    rank = [GROUPS.index(group) for group in table["group"]]
    table = table.iloc[np.argsort(rank, kind="stable")]
    return table.assign(at=[_axis_label(group) for group in table["group"]])


def _axis_label(group: str) -> str:
    return _short(group).replace(" & ", " &<br>")


def _add_marks(
    figure: go.Figure,
    table: pd.DataFrame,
    column: str,
    name: str,
    look: dict[str, str],
    row: int,
    col: int,
    before: str = "%{x}: ",
) -> None:
    """Marks with error bars at the table's `at`; those of other series stand beside them."""
    part = rated(table, column)
    if part.empty:
        return
    figure.add_scatter(
        x=part["at"], y=part["share"], name=escape(name), legendgroup=name, offsetgroup=name,
        mode="markers", marker={"color": look["color"], "symbol": look["symbol"], "size": 8},
        error_y=error_bars(part), hovertext=_told(part), row=row, col=col,
        hovertemplate=before + "%{hovertext}<extra>%{fullData.name}</extra>",
    )  # fmt: skip


def _add_line(
    figure: go.Figure,
    table: pd.DataFrame,
    x: str,
    column: str,
    name: str,
    look: dict[str, str],
    row: int,
    col: int,
) -> None:
    """A line with marks, and its interval as a band."""
    part = rated(table, column)
    hover = _told(part, 3 if column == "loss_change" else 1)
    add_line(figure, part, x, hover, name, look, row, col, f"{x} %{{x}}: ")


def _value_axis(figure: go.Figure, column: str, row: int, col: int) -> None:
    """A value's axis in percent, with 0 on it, and a line there where values may lie below."""
    look = {"zeroline": column != "success", "zerolinecolor": GREY}
    look |= {"title": PANELS[column][1], "title_standoff": 8, "tickformat": ".2~%"}
    figure.update_yaxes(**look, rangemode="tozero", row=row, col=col)


def _over_groups(figure: go.Figure, table: pd.DataFrame, columns: tuple[str, ...]) -> go.Figure:
    """The figure with the groups that have members on its x axes, and its legend below."""
    there = set(table["group"][table["n"] > 0])
    labels = [_axis_label(group) for group in GROUPS if group in there]
    rows = len(figure._grid_ref or [])
    for row in range(1, rows + 1):
        for col, column in enumerate(columns, 1):
            _value_axis(figure, column, row, col)
    figure.update_xaxes(title="where the target has predecessors", title_standoff=12, row=rows)
    return legend_below(categories(unique_legend(figure), labels), 32)  # for labels of three lines
