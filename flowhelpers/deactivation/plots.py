"""Figures of the deactivation experiments; groups and methods without members are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.express as px

from flowhelpers.core.figures import GREY, INK, dress, legend_below
from flowhelpers.deactivation.ablation import OFF
from flowhelpers.deactivation.comparisons import CONTROL, SINGLE
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.groups.plots import GROUP_COLOURS, GROUP_MARKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import plotly.graph_objects as go

PANELS = {
    "success": "successful deactivations",
    "change": "activation change, mean of 1 − new / old",
    "loss_change": "relative change of the loss",
}
LABELS = {
    "group": "where the target has predecessors",
    "layer": "layer of the target",
    "r": "r, the factor",
    "above": "layers above the target",
    "linear": "change by what is written",
    "change": "activation change",
    "share": "share of cases",
    "value": "",
}
METHOD_LOOKS = {
    "random": (GREY, "x"),
    "permutation": ("#56B4E9", "triangle-up"),
    "top-1": ("#0072B2", "circle"),
    "top-5": ("#E69F00", "diamond"),
    "pearson": ("#CC79A7", "square"),
    CONTROL: (INK, "star"),
}
METHODS = tuple(METHOD_LOOKS)
COLOUR_OF = GROUP_COLOURS | {OFF: "#882255"} | {m: look[0] for m, look in METHOD_LOOKS.items()}
SYMBOL_OF = GROUP_MARKS | {m: look[1] for m, look in METHOD_LOOKS.items()}
ORDER = [OFF, *GROUPS, *METHODS]  # of series
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
    """Rates of `success_rates`, intervals as error bars: Figures 6, 7 and 8, and the controls.

    A panel shows one of the columns (`success`, `change` or `loss_change`) for one value of the
    column `facet`. `series` is the column told apart by colour and symbol, as marks or `lines`.
    """
    import pandas as pd

    parts = []
    for value, part in rates.groupby(facet, sort=False) if facet else [("", rates)]:
        for column in columns:
            panel = PANELS[column] + (f"<br>{facet}: {value}" if facet else "")
            ends = {end: part[f"{column}_{end}"] for end in ("low", "high")}
            parts.append(part.assign(panel=panel, value=part[column], **ends))
    panels = [part["panel"].iloc[0] for part in parts]
    table = pd.concat(parts).dropna(subset="value").query("n > 0").sort_values(x, kind="stable")
    table = table.assign(up=table["high"] - table["value"], down=table["value"] - table["low"])
    across = len(columns) if len(columns) > 1 else 3
    places = _groups_in(table[x]) or sorted({*table[x]})
    figure = px.line(
        table, x=x, y="value", color=series, symbol=series, markers=True,
        error_y="up", error_y_minus="down", facet_col="panel", facet_col_wrap=across,
        facet_row_spacing=0.15, facet_col_spacing=0.07, labels=LABELS,
        category_orders={x: places, series: ORDER, "panel": panels},
        color_discrete_map=COLOUR_OF, symbol_map=SYMBOL_OF,
        hover_data={"panel": False, "n": ":,"} | dict.fromkeys(("value", "low", "high"), ":.2%"),
    )  # fmt: skip
    if not lines:
        names = [str(p).removeprefix("From ").replace(" & ", " &<br>") for p in places]
        figure.update_traces(mode="markers").update_layout(scattermode="group", scattergap=0.4)
        figure.for_each_trace(lambda trace: trace.update(offsetgroup=trace.name))
        figure.update_xaxes(type="category", tickvals=places, ticktext=names)
    if len(columns) > 1:  # each column has an axis of its own
        figure.update_yaxes(matches=None, showticklabels=True)
    figure.update_traces(marker_size=8, error_y={"thickness": 1, "width": 2})
    figure.update_yaxes(tickformat=".2~%", rangemode="tozero", zeroline=True, zerolinecolor=GREY)
    return _finish(figure, title, subtitle, 225 + 335 * -(-len(panels) // across))


def group_shares_by_method(shares: pd.DataFrame, subtitle: str) -> go.Figure:
    """How targets are spread over the groups: `n` and `share` by `method` and `group` (15 a)."""
    figure = px.bar(
        shares, x="group", y="share", color="method", barmode="group", hover_data=["n"],
        labels=LABELS | {"share": "share of targets"}, color_discrete_map=COLOUR_OF,
        category_orders={"group": GROUPS, "method": METHODS},
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%")
    return _finish(figure, "Where targets come from, by how matches are found", subtitle, 540)


def groups_after(shares: pd.DataFrame, subtitle: str) -> go.Figure:
    """Groups of targets once some of their predecessors are removed, or that they are off (15 b).

    Of `shares` within each `group` and `removed`, one row an `after`, with `n`.
    """
    shares = shares.query("n > 0").astype({"group": str, "after": str})
    groups = _groups_in(shares["group"])
    figure = px.bar(
        shares, x="share", y="removed", color="after", orientation="h",
        facet_col="group", facet_col_wrap=2, facet_row_spacing=0.08, facet_col_spacing=0.25,
        hover_data=["n"], labels=LABELS, color_discrete_map=COLOUR_OF,
        category_orders={"group": groups, "after": ORDER},
    )  # fmt: skip
    figure.update_yaxes(matches=None, showticklabels=True, categoryorder="category descending")
    figure.update_yaxes(title="", showgrid=False)
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    title = "What becomes of a feature whose predecessors are removed"
    figure = _finish(figure, title, subtitle, 225 + 100 * (len(groups) + 1))
    return figure.update_layout(margin_l=160)


def written_against_change(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """What a removal itself writes away, against the activation change, case by case.

    Cases of `deactivate` at a single site are drawn, at most 4,000. Axes go from the 1 % to the
    99 % quantile, but hold 0 and 1 and stay within -1 and 2; the subtitle counts what lies outside.
    """
    known = table[table["removed"].isin(SINGLE)].dropna(subset=["linear", "change", "success"])
    low, high = np.quantile(known[["linear", "change"]], [0.01, 0.99]) if len(known) else (0, 1)
    low, high = max(min(low, 0.0), -1.0) - 0.05, min(max(high, 1.0), 2.0) + 0.05
    inside = known[known[["linear", "change"]].apply(lambda c: c.between(low, high)).all(axis=1)]
    drawn = inside.sample(min(MOST_POINTS, len(inside)), random_state=0).sort_index()
    names = drawn["layer"].astype(str) + "/res/" + drawn["feature"].astype(str)
    ends = drawn["success"].map({0: "still active", 1: "deactivated"})
    figure = px.scatter(
        drawn.assign(feature=names, ends=ends), x="linear", y="change", color="removed",
        symbol="ends", facet_col="removed", hover_name="feature", opacity=0.6, labels=LABELS,
        color_discrete_map=COLOUR_OF, category_orders={"removed": _groups_in(drawn["removed"])},
        symbol_map={"still active": "circle-open", "deactivated": "circle"},
    )  # fmt: skip
    figure.add_shape(
        type="line", x0=low, y0=low, x1=high, y1=high, line={"dash": "dot", "width": 1},
        row="all", col="all",  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    figure.update_xaxes(range=[low, high]).update_yaxes(range=[low, high])
    subtitle += f" · {len(drawn):,} of {len(known):,} cases drawn, "
    subtitle += f"{len(known) - len(inside):,} outside; dotted: as much as is written"
    return _finish(figure, "What is written against what happens", subtitle, 600)


def _groups_in(values: pd.Series) -> list[str]:
    return [group for group in GROUPS if group in {*values}]


def _finish(figure: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    """The figure with the look that all have; facets bear their values alone."""
    figure.for_each_annotation(lambda note: note.update(text=note.text.split("=", 1)[-1]))
    return legend_below(dress(figure, title, subtitle, height).update_layout(legend_title=""), 20)
