"""The figures of several suites side by side: tables in, plotly figures out.

Depth is relative, from the first layer (0) to the last (1). A suite has one colour in all figures;
what would be by chance is dotted. What a suite lacks is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.express as px

from flowhelpers.across.phases import is_chance
from flowhelpers.core.figures import GREY, INK, finish
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.groups.plots import ERRORS, OTHERS, TICKS, group_bars, group_lines, with_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    import plotly.graph_objects as go

SUITE_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK]
VALUES = ["share", "low", "high"]
DEPTH = {"tickformat": ".2~f"}  # a fixed range would keep plotly.js from fitting the y axes


def by_depth(
    table: pd.DataFrame,
    panels: Mapping[str, str],
    title: str,
    subtitle: str,
    chance: Mapping[str, str] | None = None,
    bands: Mapping[str, tuple[str, str]] | None = None,
    unit: str = "share of features",
    shares: bool = True,
    columns: int = 3,
) -> go.Figure:
    """A line for every suite over relative depth, in a panel for each column of a table.

    `panels` maps each column to show to its panel's title, `chance` a column to the column of its
    chance level, `bands` a column to the columns of the ends of its error bars. With `shares`, the
    y axes are in percent.
    """
    import pandas as pd

    parts = []
    for column, panel in panels.items():
        ends = (bands or {}).get(column, (column, column))
        lines = {"measured": [column, *ends]}
        if by_chance := (chance or {}).get(column):
            lines["by chance"] = [by_chance] * 3
        for line, names in lines.items():
            values = table[names].where(table[column].notna()).set_axis(VALUES, axis=1)
            part = pd.concat([table[["suite", "layer", "depth"]], values], axis=1)
            parts.append(part.assign(panel=panel, line=line))
    figure = px.line(
        with_errors(pd.concat(parts)), x="depth", y="share", color="suite",
        line_dash="line", line_dash_map={"measured": "solid", "by chance": "dot"}, markers=True,
        facet_col="panel", facet_col_wrap=columns, hover_data=["layer"],
        color_discrete_sequence=SUITE_COLOURS, labels={"share": unit, "depth": "relative depth"},
        category_orders={"suite": table["suite"].unique(), "panel": [*panels.values()]}, **ERRORS,
    )  # fmt: skip
    figure.for_each_trace(lambda line: line.update(name=line.name.removesuffix(", measured")))
    figure.update_traces(error_y={"thickness": 1, "width": 0}).update_xaxes(**DEPTH)
    look = {"tickformat": ".0%"} if shares else {"hoverformat": ".3f"}
    figure.update_yaxes(rangemode="tozero", **look)
    return finish(figure, title, subtitle, 190 + 250 * -(-len(panels) // columns))


def groups_by_depth(
    groups: pd.DataFrame,
    subtitle: str,
    rows: str = "suite",
    columns: str = "dataset",
    phases: pd.DataFrame | None = None,
    title: str = "Where active features come from, by depth",
) -> go.Figure:
    """The share of each group over relative depth (Figures 5, 18 and 19 b).

    Panels differ in `rows` and `columns`; with `columns="suite"` the ends of `phases` are drawn,
    dotted where they are within chance.
    """
    figure = group_lines(groups, "depth", rows, columns, title, subtitle)
    if phases is not None:
        for column, suite in enumerate(groups["suite"].unique(), 1):
            own = phases[phases["suite"] == suite].sort_values("ends").iloc[:-1]
            for row in own.itertuples():
                look = {"color": GREY, "width": 1, "dash": "dot" if is_chance(row) else "solid"}
                figure.add_vline(x=row.ends, line=look, col=column)
    return figure.update_xaxes(**DEPTH)


def groups_against_chance(totals: pd.DataFrame, subtitle: str) -> go.Figure:
    """The share of each group in every suite, and its share by chance; datasets are pooled."""
    bars = totals.assign(dataset=totals["suite"])
    chance = bars[["dataset", "group", "n"]].assign(share=bars["by_chance"])
    return group_bars(bars, chance, subtitle, SUITE_COLOURS)


def groups_by_dataset(totals: pd.DataFrame, subtitle: str) -> go.Figure:
    """Figure 19 a: the share of each group by dataset, a panel for each suite."""
    figure = px.bar(
        with_errors(totals), x="group", y="share", color="dataset", facet_row="suite",
        barmode="group", hover_data=["n"], color_discrete_sequence=[*OTHERS],
        category_orders={"group": GROUPS}, labels={"share": "share of occurrences"}, **ERRORS,
    )  # fmt: skip
    figure.update_xaxes(TICKS, title="").update_yaxes(tickformat=".0%", rangemode="tozero")
    title = "Where active features come from, by dataset"
    return finish(figure, title, subtitle, 180 + 260 * totals["suite"].nunique())


def phases_by_depth(phases: pd.DataFrame, subtitle: str) -> go.Figure:
    """The phases of each suite from `all_phases`, a bar for every division of its layers.

    Divisions within chance are hatched.
    """
    table = phases.assign(division=phases["suite"] + ": " + phases["of"])
    table["width"], table["phase"] = table["ends"] - table["begins"], table["phase"].astype(str)
    ends = table[["first", "last"]].astype(int).to_numpy()
    table["layers"] = [f"{a} to {b}" if a < b else str(a) for a, b in ends]
    table["told"] = ["within chance" if is_chance(row) else "" for row in table.itertuples()]
    order = table["division"].unique()
    figure = px.bar(
        table, x="width", y="division", base="begins", color="phase", text="layers",
        orientation="h", hover_data=["explained"], category_orders={"division": order},
        color_discrete_sequence=["#56B4E9", "#E69F00", "#CC79A7", "#009E73"],
        pattern_shape="told", pattern_shape_map={"": "", "within chance": "/"},
        labels={"width": "relative depth", "division": ""},
    )  # fmt: skip
    figure.for_each_trace(lambda bar: bar.update(name="phase " + bar.name.removesuffix(", ")))
    look = {"bgcolor": "white", "size": 6}
    figure.update_traces(insidetextanchor="middle", textfont_color=INK, marker_pattern=look)
    figure.update_layout(barmode="overlay", bargap=0.35).update_xaxes(range=[0, 1])
    figure.update_yaxes(automargin=True, showgrid=False)
    return finish(figure, "Phases of the layers", subtitle, 200 + 45 * len(order))
