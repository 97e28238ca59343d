"""The figures of several suites side by side: tables in, plotly figures out, as in `plots`.

Depth is relative, from the first layer (0) to the last (1). A suite has one colour and one mark in
all figures; what would be by chance is dotted. What a suite lacks is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flowhelpers.core.figures import GREY, INK, dress, escape, legend_below, unique_legend
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.groups.plots import GROUP_COLOURS, GROUP_MARKS, group_bars

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pandas as pd

SUITE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
SUITE_MARKS = ("circle", "diamond", "square", "x", "star", "triangle-up", "pentagon", "hexagon")
PHASE_COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73")
DEPTH = {"title": "relative depth", "range": [-0.04, 1.04], "tickformat": ".2~f"}


def suite_looks(suites: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each suite, in the order given."""
    names = list(dict.fromkeys(suites))
    kinds = [(n % len(SUITE_COLOURS), n % len(SUITE_MARKS)) for n in range(len(names))]
    looks = [(SUITE_COLOURS[colour], SUITE_MARKS[mark]) for colour, mark in kinds]
    return dict(zip(names, looks, strict=True))


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

    Args:
        table: With `suite`, `layer`, `depth` and the columns to show.
        panels: The title of each column's panel; a column that no suite has is an empty panel.
        title: What it shows.
        subtitle: Suites, n and choices.
        chance: For columns those that hold what is by chance.
        bands: For columns those that hold the lower and the upper end of a band.
        unit: Of the values.
        shares: Whether these are shares, so that axes go from 0 to 1 and are in percent.
        columns: Panels side by side.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_subplots(
        rows, columns, shared_yaxes="all", subplot_titles=[*panels.values()],
        horizontal_spacing=0.04, vertical_spacing=0.32 / rows,
    )  # fmt: skip
    dress(figure, title, subtitle, 190 + 250 * rows)
    looks = suite_looks(table["suite"])
    for place, column in enumerate(panels):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        for suite, (colour, mark) in looks.items():
            if column not in table:
                continue
            part = table[table["suite"] == suite].dropna(subset=[column])
            if part.empty:
                continue
            low, high = (bands or {}).get(column, (None, None))
            if low:
                figure.add_scatter(
                    x=[*part["depth"], *part["depth"][::-1]], y=[*part[high], *part[low][::-1]],
                    fill="toself", fillcolor=colour, opacity=0.15, line_width=0, mode="lines",
                    hoverinfo="skip", showlegend=False, legendgroup=suite, **at,
                )  # fmt: skip
            figure.add_scatter(
                x=part["depth"], y=part[column], name=escape(suite), legendgroup=suite,
                mode="lines+markers", line={"color": colour, "width": 1.5},
                marker={"symbol": mark, "size": 7}, customdata=part["layer"],
                hovertemplate="layer %{customdata}: %{y:" + (".1%" if shares else ".3f") + "}"
                "<extra>%{fullData.name}</extra>",
                **at,
            )  # fmt: skip
            by_chance = (chance or {}).get(column)
            if by_chance:
                figure.add_scatter(
                    x=part["depth"], y=part[by_chance], name=f"{escape(suite)}, by chance",
                    legendgroup=suite, mode="lines", line={"color": colour, "dash": "dot"},
                    hovertemplate="by chance %{y:.3f}<extra>%{fullData.name}</extra>", **at,
                )  # fmt: skip
    figure.update_xaxes(**DEPTH | {"title": None}).update_xaxes(title="relative depth", row=rows)
    figure.update_yaxes(title=unit, col=1)
    figure.update_yaxes(**{"tickformat": ".0%"} if shares else {}, rangemode="tozero")
    return legend_below(unique_legend(figure))


def groups_by_depth(
    groups: pd.DataFrame,
    subtitle: str,
    rows: str = "suite",
    columns: str = "dataset",
    phases: pd.DataFrame | None = None,
    title: str = "Where active features come from, by depth",
) -> go.Figure:
    """The share of each group by relative depth, a panel for each value of two columns.

    Suites below each other and datasets side by side make the paper's Figures 5 and 19 (b),
    matchers below each other and suites side by side its Figure 18. Layer 0, which has no stream
    before it, is drawn apart with hollow marks; bands are intervals.

    Args:
        groups: As `across_groups.group_profile` gives it.
        subtitle: Suites, n and choices.
        rows: The column whose values stand below each other.
        columns: The column whose values stand side by side.
        phases: As `phases.all_phases` gives them, of one division; thin lines mark where they end.
        title: What it shows.
    """
    above, beside = (list(dict.fromkeys(groups[column])) for column in (rows, columns))
    titles = [f"{escape(str(b))}, {escape(str(a))}" for a in above for b in beside]
    figure = make_subplots(
        len(above), len(beside), shared_yaxes="all", subplot_titles=titles,
        horizontal_spacing=0.03, vertical_spacing=0.36 / (len(above) + 1),
    )  # fmt: skip
    dress(figure, title, subtitle, 170 + 260 * len(above))
    figure.update_annotations(font_size=13)
    for row, a in enumerate(above, 1):
        for col, b in enumerate(beside, 1):
            here = groups[(groups[rows] == a) & (groups[columns] == b)]
            suite = here["suite"].iloc[0] if len(here) else ""
            for group in GROUPS:
                part = here[here["group"] == group].dropna(subset=["share"]).sort_values("layer")
                _group_line(figure, part, group, row, col)
            if phases is not None and len(phases):
                ends = phases[phases["suite"] == suite].sort_values("phase")["ends"].iloc[:-1]
                for end in ends:
                    figure.add_vline(x=end, line={"color": GREY, "width": 1}, row=row, col=col)  # pyright: ignore[reportArgumentType]
    figure.update_xaxes(**DEPTH | {"title": None})
    figure.update_xaxes(title="relative depth", row=len(above))
    figure.update_yaxes(title="share of occurrences", col=1)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return legend_below(unique_legend(figure), room=20)


def _group_line(figure: go.Figure, part: pd.DataFrame, group: str, row: int, col: int) -> None:
    looks: dict[str, tuple[str, str]] = {g: (GROUP_COLOURS[g], GROUP_MARKS[g]) for g in GROUPS}
    look, at = {"color": looks[group][0]}, {"row": row, "col": col, "legendgroup": group}
    later = part[part["layer"] > 0]
    sure = later.dropna(subset=["low", "high"])
    figure.add_scatter(
        x=[*sure["depth"], *sure["depth"][::-1]], y=[*sure["high"], *sure["low"][::-1]],
        fill="toself", fillcolor=look["color"], opacity=0.18, line_width=0, mode="lines",
        hoverinfo="skip", showlegend=False, **at,
    )  # fmt: skip
    for piece, mark in ((later, ""), (part[part["layer"] == 0], "-open")):
        if piece.empty:
            continue
        words = [
            f"layer {r.layer}: {r.share:.1%}, by chance {r.by_chance:.1%}, n = {r.n:,}"
            for r in piece.itertuples()
        ]
        figure.add_scatter(
            x=piece["depth"], y=piece["share"], name=group, line=look | {"width": 1.5},
            mode="markers" if mark else "lines+markers",
            marker=look | {"symbol": looks[group][1] + mark, "size": 6},
            hovertext=words, hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
            showlegend=not mark, **at,
        )  # fmt: skip


def groups_against_chance(totals: pd.DataFrame, subtitle: str) -> go.Figure:
    """The share of each group in every suite, beside that by chance (Figure 19 a).

    Args:
        totals: As `across_groups.group_totals` gives it.
        subtitle: Suites, n and choices.
    """
    bars = totals.assign(dataset=totals["suite"])
    chance = bars[["dataset", "group", "n"]].assign(share=bars["by_chance"])
    figure = group_bars(bars, chance, subtitle)
    for suite, (colour, _) in suite_looks(totals["suite"]).items():
        for trace in figure.data:
            if trace.type == "bar" and trace.name == suite:
                trace.marker.color = colour
    return figure


def phases_by_depth(phases: pd.DataFrame, subtitle: str) -> go.Figure:
    """Where each suite's phases lie, a bar for every division of every suite.

    Args:
        phases: As `phases.all_phases` gives them.
        subtitle: What was divided, and how.
    """
    names = list(dict.fromkeys(f"{r.suite}: {r.of}" for r in phases.itertuples()))
    figure = dress(go.Figure(), "Phases of the layers", subtitle, 200 + 45 * len(names))
    for number, part in phases.groupby("phase"):
        layers = [f"{r.first} to {r.last}" if r.last > r.first else str(r.first)
                  for r in part.itertuples()]  # fmt: skip
        figure.add_bar(
            y=[escape(f"{r.suite}: {r.of}") for r in part.itertuples()],
            x=part["ends"] - part["begins"], base=part["begins"], orientation="h",
            name=f"phase {number}", text=layers, textposition="inside", textangle=0,
            insidetextanchor="middle",
            marker={"color": PHASE_COLOURS[(int(number) - 1) % len(PHASE_COLOURS)],
                    "line": {"color": INK, "width": 0.5}},
            customdata=part["explained"],
            hovertemplate="layers %{text}: the whole division explains %{customdata:.0%}"
            "<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="overlay", bargap=0.35)
    figure.update_yaxes(
        categoryorder="array", categoryarray=[escape(name) for name in names], autorange="reversed",
        automargin=True, showgrid=False,
    )  # fmt: skip
    edges = [min(0, phases["begins"].min()) - 0.02, max(1, phases["ends"].max()) + 0.02]
    figure.update_xaxes(**DEPTH | {"range": edges})
    return legend_below(figure)
