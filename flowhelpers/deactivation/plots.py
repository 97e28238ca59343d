"""Figures of the deactivation experiments; groups and methods without members are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.express as px

from flowhelpers.core.figures import GREY, INK, finish, grow
from flowhelpers.deactivation.ablation import OFF
from flowhelpers.deactivation.targets import CONTROL
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.groups.plots import GROUP_COLOURS, GROUP_MARKS, TICKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import plotly.graph_objects as go

NAMES = {
    "success": "successful deactivations",
    "change": "activation change, 1 − new / old",
    "loss_change": "relative change of the loss",
    "share": "share of targets",
    "linear": "change by what is written",
    "group": "where the target has predecessors",
    "layer": "layer of the target",
    "r": "r, the factor",
    "above": "layers above the target",
    "found": "targets whose source is active",
    "beyond": "activation change beyond the control",
    "hop": "layers from source to target",
} | dict.fromkeys(["value", "removed"], "")
METHODS = ("random", "permutation", "top-1", "top-5", "pearson", CONTROL)
METHOD_COLOURS = (GREY, "#56B4E9", "#0072B2", "#E69F00", "#CC79A7", INK)
AT = {group: group.replace("From", "removed at") for group in GROUPS}
COLOUR_OF = GROUP_COLOURS | {OFF: "#882255"} | dict(zip(METHODS, METHOD_COLOURS, strict=True))
COLOUR_OF |= {AT[group]: GROUP_COLOURS[group] for group in GROUPS}
MARK_OF = GROUP_MARKS | {AT[group]: GROUP_MARKS[group] for group in GROUPS}
ORDER = [OFF, *GROUPS, *AT.values(), *METHODS]  # of series
LEAST, MOST = -0.55, 1.55  # of changes that are drawn case by case
MOST_POINTS = 4000


def rate_panels(
    rates: pd.DataFrame,
    x: str,
    series: str,
    title: str,
    subtitle: str,
    columns: Sequence[str] = ("success", "change"),
    facet: str | None = None,
    lines: bool = False,
) -> go.Figure:
    """Rates of `success_rates`, intervals as error bars: Figures 6, 7, 8 and 15 a, and the control.

    A panel shows one of the columns (`success`, `change`, `loss_change` or `share`) for one value
    of the column `facet`. `series` is told apart by colour and symbol, as marks or `lines`.
    """
    import pandas as pd

    if series == "removed":
        rates = rates.assign(removed=rates["removed"].astype(str).replace(AT))
    ends = f"\n{facet}: " + rates[facet].astype(str) if facet else pd.Series("", rates.index)
    parts = []
    for column in columns:
        value = rates[column]
        high, low = (rates.get(f"{column}_{end}", value) for end in ("high", "low"))
        panel = NAMES[column] + ends
        parts.append(rates.assign(panel=panel, value=value, up=high - value, down=value - low))
    panels = [NAMES[column] + end for end in ends.unique() for column in columns]
    table = pd.concat(parts).dropna(subset="value").query("n > 0").sort_values(x, kind="stable")
    across = len(columns) if len(columns) > 1 else 3
    places = _groups_in(table[x]) or sorted({*table[x]})
    figure = px.line(
        table, x=x, y="value", color=series, symbol=series, markers=True,
        error_y="up", error_y_minus="down", facet_col="panel", facet_col_wrap=across,
        facet_row_spacing=0.15, facet_col_spacing=0.07, labels=NAMES,
        category_orders={x: places, series: ORDER, "panel": panels},
        color_discrete_map=COLOUR_OF, symbol_map=MARK_OF,
        hover_data={"panel": False, "n": ":,", "value": ":.2%"},
    )  # fmt: skip
    if lines:
        _side_by_side(figure, places)
    else:
        figure.update_traces(mode="markers").update_layout(scattermode="group", scattergap=0.4)
        figure.for_each_trace(lambda trace: trace.update(offsetgroup=trace.name))
        figure.update_xaxes(type="category")
    if x == "group":
        figure.update_xaxes(TICKS)
    if len(columns) > 1:  # each column has an axis of its own
        figure.update_yaxes(matches=None, showticklabels=True)
    figure.update_yaxes(tickformat=".2~%", rangemode="tozero", zeroline=True, zerolinecolor=GREY)
    height = 265 + 335 * -(-len(panels) // across)
    finish(figure, title, subtitle, height, 30 if x == "group" else 0)
    return grow(figure, 20)  # for panel titles of two lines


def _side_by_side(figure: go.Figure, places: Sequence[Any]) -> None:
    """Moves lines a little apart, so that their intervals do not hide each other's."""
    names = list(dict.fromkeys(trace.name for trace in figure.data))
    step = 0.4 * min(np.diff(places), default=1) / len(names)
    for trace in figure.data:
        by = step * (names.index(trace.name) - (len(names) - 1) / 2)
        told = trace.hovertemplate.replace("%{x}", "%{text}")
        trace.update(x=np.add(trace.x, by), text=trace.x, hovertemplate=told)
    figure.update_traces(error_y={"thickness": 1, "width": 0})


def groups_after(shares: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 15 b: groups of targets once some of their predecessors are removed."""
    shares = shares.query("n > 0").astype({"group": str, "after": str})
    groups = _groups_in(shares["group"])
    shares = shares.assign(removed=shares["removed"].astype(str).replace(AT))
    figure = px.bar(
        shares, x="share", y="removed", color="after", orientation="h",
        facet_col="group", facet_col_wrap=2, facet_row_spacing=0.08, facet_col_spacing=0.3,
        pattern_shape="after",
        hover_data=["n"], labels=NAMES, color_discrete_map=COLOUR_OF,
        category_orders={"group": groups, "after": ORDER},
    )  # fmt: skip
    figure.update_yaxes(matches=None, showticklabels=True, categoryorder="category descending")
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    title = "What becomes of a feature whose predecessors are removed"
    return finish(figure, title, subtitle, 345 + 100 * len(groups)).update_layout(margin_l=190)


def written_against_change(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """What a removal at a single site writes away, against the activation change, case by case."""
    known = table[table["removed"].isin(GROUPS[1:4])].dropna(subset=["linear", "change"])
    inside = known["linear"].between(LEAST, MOST) & known["change"].between(LEAST, MOST)
    drawn = known[inside].sample(min(MOST_POINTS, inside.sum()), random_state=0).sort_index()
    figure = px.scatter(
        drawn, x="linear", y="change", color="removed", facet_col="removed",
        hover_data=["layer", "feature"], opacity=0.6, range_x=[LEAST, MOST], range_y=[LEAST, MOST],
        labels=NAMES, color_discrete_map=COLOUR_OF,
        category_orders={"removed": _groups_in(drawn["removed"])},
    )  # fmt: skip
    dotted = {"type": "line", "line": {"dash": "dot", "width": 1}, "row": "all", "col": "all"}
    figure.add_shape(x0=LEAST, y0=LEAST, x1=MOST, y1=MOST, **dotted)
    subtitle += f" · {len(drawn):,} of {len(known):,} cases drawn, {(~inside).sum():,} outside"
    return finish(figure, "What is written against what happens", subtitle, 600)


def _groups_in(values: pd.Series) -> list[str]:
    return [group for group in GROUPS if group in {*values}]
