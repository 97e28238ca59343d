"""The figures of the group statistics: tables in, plotly figures out.

The subtitle of each says suite, n and choices. Shares bear their intervals as error bars; what has
no members is left out, not drawn at zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.express as px

from flowhelpers.core.features import MODULES
from flowhelpers.core.figures import COLOURS, GREY, INK, NAMES, escape, finish, step
from flowhelpers.groups.coactivation import MEASURES
from flowhelpers.groups.occurrences import GROUPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import plotly.graph_objects as go

_COLOURS = (GREY, *COLOURS.values(), "#CC79A7", "#56B4E9", "#E69F00", INK)
GROUP_COLOURS = dict(zip(GROUPS, _COLOURS, strict=True))
MARKS = ("x", "circle", "diamond", "square", "star", "hexagon", "triangle-up", "pentagon")
GROUP_MARKS = dict(zip(GROUPS, MARKS, strict=True))
OTHERS = ("#56B4E9", "#CC79A7", "#E69F00", "#882255", GREY)  # of datasets and other series
SCORE_NAMES = {"s_res": "s(R)", "s_mlp": "s(M)", "s_att": "s(A)"}
PANELS = {module: NAMES[module] for module in MODULES}
PAIR_NAMES = {
    "AO": "AO: module active in one group",
    "AB": "AB: module active in both",
    "IB": "IB: module active in neither",
}
ERRORS = {"error_y": "above", "error_y_minus": "below"}
SHORT = {group: group.removeprefix("From ").replace(" & ", " &<br>") for group in GROUPS}
SHORTER = {group.removeprefix("From "): short for group, short in SHORT.items()}
TICKS: Any = {"tickangle": 0, "labelalias": SHORT, "title_standoff": 6}  # of an axis of groups
BY_GROUP: Any = {"color": "group", "color_discrete_map": GROUP_COLOURS}
BY_GROUP |= {"category_orders": {"group": GROUPS}}
MARKED: Any = BY_GROUP | {"symbol": "group", "symbol_map": GROUP_MARKS}


def with_errors(shares: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a share, with what its interval reaches `above` and `below` it."""
    shares = shares.dropna(subset="share")
    low, high = (shares.get(end, shares["share"]) for end in ("low", "high"))
    above, below = (high - shares["share"]).clip(lower=0), (shares["share"] - low).clip(lower=0)
    return shares.assign(above=above, below=below)


def _present(table: pd.DataFrame) -> dict[str, Any]:
    """The groups that have a panel: those that there are."""
    return {"category_orders": {"group": [name for name in GROUPS if name in {*table["group"]}]}}


def group_scatter(points: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 3: s(R) against s(M) and s(A) of the features in `single_source_points`, by group.

    Each group has a column of panels, each layer a row; the score at the module is a mark.
    """
    named = points.rename(columns=SCORE_NAMES)
    long = named.melt(["layer", "feature", "group", "s(R)"], ["s(M)", "s(A)"], "score")
    colours = {SCORE_NAMES[f"s_{module}"]: COLOURS[module] for module in MODULES}
    rows = long["layer"].nunique()
    figure = px.scatter(
        long, x="s(R)", y="value", facet_row="layer", facet_col="group", opacity=0.6,
        facet_row_spacing=0.12 / rows, hover_data=["feature"], labels={"value": "score"},
        color="score", color_discrete_map=colours, symbol="score", **_present(long),
    )  # fmt: skip
    figure.update_traces(marker_size=5)
    title = "Scores of features by the group they are found in"
    return finish(figure, title, subtitle, 200 + max(130, 230 - 25 * rows) * rows)


def class_bars(classes: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 4: the share of significant tests by where a module is active in the two groups.

    Each `unit` (what was counted) has a row of panels.
    """
    names = {"pair": PAIR_NAMES, "score": SCORE_NAMES, "module": PANELS}
    figure = px.bar(
        with_errors(classes).replace(names), x="score", y="share", color="pair",
        facet_col="module", facet_row="unit", barmode="group", hover_data=["tests"],
        color_discrete_sequence=["#0072B2", "#E69F00", GREY], labels={"share": "share of tests"},
        category_orders={name: [*values.values()] for name, values in names.items()}, **ERRORS,
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
    height = 200 + 220 * classes["unit"].nunique()
    return finish(figure, "How often two groups differ in a score", subtitle, height)


def group_lines(
    shares: pd.DataFrame, x: str, rows: str, columns: str, title: str, subtitle: str
) -> go.Figure:
    """The share of each group over `layer` or `depth`, rising; layer 0 stands apart.

    `rows` and `columns` are the columns of the table whose values have panels of their own.
    """
    table = with_errors(shares.assign(apart=shares["layer"] == 0))
    figure = px.line(
        table, x=x, y="share", facet_row=rows, facet_col=columns,
        facet_col_spacing=0.03, facet_row_spacing=0.12, hover_data=["n", "layer"],
        line_group="apart", labels={"share": "share of occurrences"}, **MARKED, **ERRORS,
    )  # fmt: skip
    figure.update_traces(line_width=1.5, marker_size=6, error_y={"thickness": 1, "width": 0})
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return finish(figure, title, subtitle, 160 + 280 * table[rows].nunique())


def groups_by_layer(shares: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 5: the share of each group by layer, a column for each dataset.

    If the column `method` has several methods, it is Figure 18, with a row for each.
    """
    shares = shares if "method" in shares else shares.assign(method="")
    title = "Where active features come from, by layer"
    figure = group_lines(shares, "layer", "method", "dataset", title, subtitle)
    return figure.update_xaxes(dtick=step(shares))


def group_bars(
    shares: pd.DataFrame, base: pd.DataFrame, subtitle: str, colours: Sequence[str] = OTHERS
) -> go.Figure:
    """Figure 12 a: how the occurrences of each dataset are spread over the groups.

    `base`, the shares with predecessors at other tokens (`shuffled_tokens`), is drawn as lines;
    where it lies far above all bars, as a number at the upper edge.
    """
    looks = ERRORS | {"x": "group", "y": "share", "color": "dataset"}
    looks |= {"category_orders": {"group": GROUPS}}
    looks |= {"hover_data": ["n"], "labels": {"share": "share of occurrences"}}
    bars, base = with_errors(shares), with_errors(base)
    top = 1.25 * (bars["share"] + bars["above"]).max()
    figure = px.bar(bars, barmode="group", color_discrete_sequence=[*colours], **looks)
    marks = px.scatter(base[base["share"] <= top], color_discrete_sequence=[INK], **looks)
    marks.for_each_trace(lambda trace: trace.update(offsetgroup=trace.name, showlegend=False))
    line = {"symbol": "line-ew", "size": 52 / max(len(marks.data), 1)}
    line |= {"line": {"width": 3, "color": INK}}
    chance = "by chance: the same predecessors at other tokens"
    marks.update_traces(name=chance, legendgroup=chance, marker=line)
    for trace in marks.data[:1]:
        trace.showlegend = True
    figure.add_traces(marks.data)
    figure.update_layout(scattermode="group", scattergap=0.2, bargap=0.2)
    figure.update_xaxes(TICKS, title="").update_yaxes(tickformat=".0%", range=[0, top])
    finish(figure, "Where active features come from", subtitle, 470)
    for group, part in base[base["share"] > top].groupby("group", observed=True)["share"]:
        ends = " to ".join(dict.fromkeys(f"{end:.0%}" for end in (part.min(), part.max())))
        note = {"x": group, "y": top, "yanchor": "top", "showarrow": False}
        figure.add_annotation(text=f"↑ by chance<br>{ends}", **note)
    return figure


def score_densities(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 12 b: how the scores of each group are distributed, as `score_histograms` gives.

    Each group has a row of panels, each score a column, each layer a line.
    """
    table = table.assign(layer="layer " + table["layer"].astype(str))
    figure = px.line(
        table.replace({"score": SCORE_NAMES}), x="at", y="density", facet_row="group",
        facet_col="score", line_dash="layer", facet_row_spacing=0.02, labels={"at": "score"},
        **BY_GROUP | _present(table),
    )  # fmt: skip
    first: set[str] = set()  # of each dash, for the legend
    figure.for_each_trace(lambda line: _name_by_dash(line, first))
    figure.update_yaxes(rangemode="tozero", nticks=3)
    title = "How scores are distributed in each group"
    finish(figure, title, subtitle, 230 + 65 * table["group"].nunique())
    for note in figure.layout.annotations:
        if note.text in (names := {escape(group): short for group, short in SHORT.items()}):
            note.update(text=names[note.text], textangle=0)
    return figure.update_layout(margin_r=80)


def _name_by_dash(line: go.Scatter, first: set[str]) -> None:
    layer = str(line.name).rpartition(", ")[2]
    line.update(name=layer, legendgroup=layer, showlegend=layer not in first, fill="tozeroy")
    first.add(layer)


def _heatmaps(
    rows: pd.DataFrame, first: Sequence[str], second: Sequence[str], digits: str, **labels: str
) -> go.Figure:
    """Shares of the pairs of `first` and `second`, a map for each `panel`; intervals on hover."""
    wide = rows.pivot(index=["panel", "first"], columns="second", values=["share", "low", "high"])
    panels = rows["panel"].unique()
    wide = wide.reindex([(panel, name) for panel in panels for name in first])
    shape = len(panels), len(first), len(second)
    values = (wide[c].reindex(columns=second).to_numpy(float) for c in ("share", "low", "high"))
    share, low, high = (value.reshape(shape) for value in values)
    figure = px.imshow(
        share, x=second, y=first, facet_col=0, facet_col_wrap=2, facet_row_spacing=0.2,
        text_auto=digits, zmin=0, zmax=1, aspect="auto",
        color_continuous_scale=["white", COLOURS["res"]], labels={"x": "", "y": "", **labels},
    )  # fmt: skip
    for note in figure.layout.annotations:
        note.text = panels[int(note.text.partition("=")[2])]
    for i in range(len(panels)):
        figure.data[i].customdata = np.dstack([low[i], high[i]])
    hover = "%{y}<br>%{x}<br>%{z:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%})"
    return figure.update_traces(hovertemplate=hover, hoverongaps=False)


def transition_heatmap(rows: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 13: of the features seen in one group, the share also seen in another."""
    rows = rows.assign(first=[f"{r.first} ({r.features:,})" for r in rows.itertuples()], panel="")
    labels = {"x": "of the features seen in the group on the left, those also seen in this"}
    figure = _heatmaps(rows, rows["first"].unique(), GROUPS, ".0%", color="share", **labels)
    figure.update_xaxes(TICKS)
    return finish(figure, "Do features stay in their group?", subtitle, 560)


def pair_heatmaps(pairs: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 14: for every pair of groups and score, the share of significant tests."""
    short = {group: group.removeprefix("From ") for group in GROUPS}
    rows = pairs.replace({"score": SCORE_NAMES, "first": short, "second": short})
    first, *others, last = short.values()
    rows = rows.rename(columns={"score": "panel"})
    figure = _heatmaps(rows, [first, *others], [*others, last], ".2f", color="share of tests")
    figure.update_xaxes(TICKS | {"labelalias": SHORTER}, showticklabels=True)
    return finish(figure, "Which groups differ in which score", subtitle, 840)


def together_by_cosine(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """Co-activation of matched features by the cosine of their directions, for each module."""
    long = table.melt(["module", "cosine", "pairs"], [*MEASURES], "measure", "median over pairs")
    figure = px.line(
        long.replace({"module": NAMES}), x="cosine", y="median over pairs", color="measure",
        line_dash="measure", facet_col="module", markers=True, hover_data=["pairs"],
        color_discrete_sequence=[INK, *OTHERS], labels={"cosine": "cosine of the match"},
        category_orders={"module": [*PANELS.values()]},
    )  # fmt: skip
    return finish(figure, "Are features that lie near active together?", subtitle, 430)
