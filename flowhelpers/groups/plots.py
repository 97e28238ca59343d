"""The figures of the group statistics: tables in, plotly figures out.

The subtitle of each says suite, n and choices. Shares bear their intervals as error bars; what has
no members is left out, not drawn at zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.express as px

from flowhelpers.core.figures import (
    COLOURS,
    GREY,
    INK,
    NAMES,
    SYMBOLS,
    dress,
    escape,
    legend_below,
    step,
)
from flowhelpers.groups.coactivation import MEASURES
from flowhelpers.groups.occurrences import GROUPS, SCORES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import plotly.graph_objects as go

GROUP_COLOURS = dict(
    zip(GROUPS, (GREY, *COLOURS.values(), "#CC79A7", "#56B4E9", "#E69F00", INK), strict=True)
)
MARKS = ("x", "circle", "diamond", "square", "star", "hexagon", "triangle-up", "pentagon")
GROUP_MARKS = dict(zip(GROUPS, MARKS, strict=True))
OTHERS = ("#56B4E9", "#CC79A7", "#E69F00", "#882255", GREY)  # of datasets and other series
SCORE_NAMES = {f"s_{module}": f"s({symbol})" for module, symbol in SYMBOLS.items()}
PANELS = {"module": [NAMES[module] for module in SYMBOLS], "score": [*SCORE_NAMES.values()]}
PAIR_NAMES = {
    "AO": "AO: module active in one group",
    "AB": "AB: module active in both",
    "IB": "IB: module active in neither",
}
WHITE_TO_BLUE = ["white", COLOURS["res"]]
HOVER = {"share": ":.1%", "low": ":.1%", "high": ":.1%"}
ERRORS = {"error_y": "above", "error_y_minus": "below"}
IN_ORDER = {"group": [*GROUPS]}


def finish(figure: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    """The look of all figures, for one of plotly express: panels named by their values alone."""
    figure.for_each_annotation(lambda a: a.update(text=escape(a.text.split("=", 1)[-1])))
    figure.update_layout(legend_title_text="")
    return legend_below(dress(figure, title, subtitle, height))


def with_errors(shares: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a share, with what its interval reaches `above` and `below` it."""
    shares = shares.dropna(subset="share")
    low, high = (shares.get(end, shares["share"]) for end in ("low", "high"))
    above, below = (high - shares["share"]).clip(lower=0), (shares["share"] - low).clip(lower=0)
    return shares.assign(low=low, high=high, above=above, below=below)


def named_layers(table: pd.DataFrame) -> pd.DataFrame:
    """Layers as the titles of panels."""
    return table.assign(layer="layer " + table["layer"].astype(str))


def group_scatter(points: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 3: s(R) against s(M) and s(A) of the features in `single_source_points`, by group."""
    ids = ["layer", "feature", "group", "s_res"]
    long = named_layers(points).melt(ids, ["s_mlp", "s_att"], "score", "value")
    long["score"] = long["score"].map(SCORE_NAMES)
    figure = px.scatter(
        long.rename(columns={"s_res": "s(R)"}), x="s(R)", y="value", symbol="group",
        symbol_map=GROUP_MARKS, facet_row="layer", facet_col="score", opacity=0.7,
        hover_data=["feature"], labels={"value": "score at the module"}, color="group",
        color_discrete_map=GROUP_COLOURS, category_orders=IN_ORDER,
    )  # fmt: skip
    title = "Scores of features by the group they are found in"
    return finish(figure, title, subtitle, 130 + 330 * points["layer"].nunique())


def class_bars(classes: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 4: the share of significant tests by where a module is active in the two groups.

    A row of panels for each `unit`, what was counted; otherwise as `significance_intervals` gives.
    """
    names = {"pair": PAIR_NAMES, "score": SCORE_NAMES, "module": NAMES}
    figure = px.bar(
        with_errors(classes).replace(names), x="score", y="share", color="pair", text_auto=".0%",
        facet_col="module", facet_row="unit", barmode="group", hover_data=HOVER | {"tests": ":,"},
        color_discrete_sequence=["#0072B2", "#E69F00", GREY], labels={"share": "share of tests"},
        category_orders=PANELS | {"pair": [*PAIR_NAMES.values()]}, **ERRORS,
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
    height = 200 + 220 * classes["unit"].nunique()
    return finish(figure, "How often two groups differ in a score", subtitle, height)


def group_lines(
    shares: pd.DataFrame, x: str, rows: str, columns: str, title: str, subtitle: str
) -> go.Figure:
    """The share of each group over `layer` or `depth`, in panels; layer 0 apart with hollow marks.

    `rows` and `columns` are the columns of the table whose values have panels of their own.
    """
    table = with_errors(shares).sort_values(x, kind="stable")
    panels = {name: [*dict.fromkeys(shares[name])] for name in (rows, columns)}
    at_zero = np.where(table["layer"] == 0, " at layer 0", "")
    table["series"] = table["group"].astype(str) + at_zero
    marks = GROUP_MARKS | {f"{g} at layer 0": f"{mark}-open" for g, mark in GROUP_MARKS.items()}
    figure = px.line(
        table, x=x, y="share", symbol="series", symbol_map=marks, facet_row=rows, facet_col=columns,
        hover_data=HOVER | {"n": ":,", "layer": True}, labels={"share": "share of occurrences"},
        facet_col_spacing=0.03, facet_row_spacing=0.12, category_orders=panels | IN_ORDER,
        color="group", color_discrete_map=GROUP_COLOURS, **ERRORS,
    )  # fmt: skip
    for trace in figure.data:
        group, _, series = trace.name.partition(", ")
        shown = trace.showlegend and series == group
        trace.update(name=group, legendgroup=group, showlegend=shown)
    figure.update_traces(line_width=1.5, marker_size=6, error_y={"thickness": 1, "width": 0})
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return finish(figure, title, subtitle, 160 + 280 * table[rows].nunique())


def groups_by_layer(shares: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 5: the share of each group by layer, a column for each dataset.

    With several methods in the column `method` it is Figure 18, a row for each.
    """
    shares = shares if "method" in shares else shares.assign(method="")
    title = "Where active features come from, by layer"
    figure = group_lines(shares, "layer", "method", "dataset", title, subtitle)
    return figure.update_xaxes(dtick=step(shares))


def group_bars(
    shares: pd.DataFrame, base: pd.DataFrame, subtitle: str, colours: Sequence[str] = OTHERS
) -> go.Figure:
    """Figure 12 a: how the occurrences of each dataset are spread over the groups.

    `base` is the same of predecessors at other tokens (`shuffled_tokens`): short lines mark it.
    """
    looks: Any = {"x": "group", "y": "share", "color": "dataset", "hover_data": HOVER | {"n": ":,"}}
    looks |= ERRORS | {"category_orders": IN_ORDER}
    figure = px.bar(
        with_errors(shares), barmode="group", color_discrete_sequence=[*colours],
        labels={"share": "share of occurrences"}, **looks,
    )  # fmt: skip
    marks = px.scatter(with_errors(base), color_discrete_sequence=[INK], **looks)
    marks.for_each_trace(lambda trace: trace.update(offsetgroup=trace.name, showlegend=False))
    marks.data[0].showlegend = True
    line = {"symbol": "line-ew", "size": 80 / len(marks.data), "line": {"width": 3, "color": INK}}
    chance = "by chance: the same predecessors at other tokens"
    marks.update_traces(name=chance, legendgroup=chance, marker=line)
    figure.add_traces(marks.data)
    figure.update_layout(scattermode="group", scattergap=0.2, bargap=0.2, xaxis_title=None)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return finish(figure, "Where active features come from", subtitle, 470)


def score_densities(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 12 b: how the scores of each group are distributed, as `score_histograms` gives."""
    figure = px.line(
        named_layers(table).replace({"score": SCORE_NAMES}), x="at", y="density", facet_row="layer",
        facet_col="score", labels={"at": "score"}, color="group", color_discrete_map=GROUP_COLOURS,
        category_orders=PANELS | IN_ORDER,
    )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    height = 150 + 260 * table["layer"].nunique()
    return finish(figure, "How scores are distributed in each group", subtitle, height)


def transition_heatmap(rows: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 13: of the features seen in one group, the share also seen in another."""
    table = rows.assign(seen=[f"{r.first} ({r.features:,})" for r in rows.itertuples()])
    wide = table.pivot(index="seen", columns="second", values=["share", "low", "high"])
    wide = wide.reindex(table["seen"].unique())
    share, low, high = (wide[name][[*GROUPS]] for name in ("share", "low", "high"))
    figure = px.imshow(
        share, text_auto=".0%", zmin=0, zmax=1, color_continuous_scale=WHITE_TO_BLUE, aspect="auto",
        labels={"x": "also seen in", "y": "seen in (features)", "color": "share"},
    )  # fmt: skip
    figure.update_traces(
        customdata=np.dstack([low, high]), hoverongaps=False,
        hovertemplate="%{y}, also in %{x}: %{z:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%})",
    )  # fmt: skip
    return finish(figure, "Do features stay in their group?", subtitle, 560)


def pair_heatmaps(pairs: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 14: for every pair of groups and score, the share of significant tests."""
    columns = ["share", "low", "high", "tests"]
    wide = pairs.pivot(index=["score", "first"], columns="second", values=columns)
    order = [(score, group) for score in SCORES for group in GROUPS[:-1]]
    shape = len(SCORES), len(GROUPS) - 1, len(GROUPS) - 1
    values = {c: wide[c].reindex(order, columns=GROUPS[1:]).to_numpy(float) for c in columns}
    share, *others = (value.reshape(shape) for value in values.values())
    short = [group.removeprefix("From ") for group in GROUPS]
    figure = px.imshow(
        share, x=short[1:], y=short[:-1], facet_col=0, text_auto=".2f", zmin=0, zmax=1,
        color_continuous_scale=WHITE_TO_BLUE, labels={"color": "share of tests"}, aspect="auto",
    )  # fmt: skip
    for panel, trace in enumerate(figure.data):
        figure.layout.annotations[panel].text = [*SCORE_NAMES.values()][panel]
        trace.update(customdata=np.dstack([other[panel] for other in others]), hoverongaps=False)
    figure.update_traces(
        hovertemplate="%{y} and %{x}: %{z:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%})"
        " of %{customdata[2]} tests<extra></extra>"
    )
    return finish(figure, "Which groups differ in which score", subtitle, 480)


def together_by_cosine(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """Co-activation of matched features by the cosine of their directions, for each module."""
    long = table.melt(["module", "cosine", "pairs"], [*MEASURES], "measure", "median over pairs")
    figure = px.line(
        long.replace({"module": NAMES}), x="cosine", y="median over pairs", color="measure",
        line_dash="measure", facet_col="module", markers=True, hover_data=["pairs"],
        color_discrete_sequence=[INK, *OTHERS], labels={"cosine": "cosine of the match"},
        category_orders=PANELS,
    )  # fmt: skip
    return finish(figure, "Are features that lie near active together?", subtitle, 430)
