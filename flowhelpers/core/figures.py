"""The look that all figures share: template, colours, error bars, legends."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

    Look = tuple[str, str, str, str]

COLOURS = {"res": "#0072B2", "mlp": "#D55E00", "att": "#009E73"}
SYMBOLS = {"res": "R", "mlp": "M", "att": "A"}
NAMES = {"att": "attention", "res": "stream", "mlp": "MLP"}
GREY, PALE, INK = "#8C8C8C", "#F4F5F7", "#222222"
CLASS_COLOURS = {
    "translated": "#56B4E9",
    "processed": "#E69F00",
    "newborn": "#CC79A7",
    "unexplained": GREY,
}
MARGIN = {"l": 75, "r": 20, "t": 90, "b": 50}
AXIS = {"showgrid": False, "zeroline": False, "linecolor": "#BBBBBB", "ticks": "outside"}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "title": {"x": 0.01, "xanchor": "left", "subtitle": {"font": {"size": 12, "color": GREY}}},
        "margin": MARGIN,
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "white", "align": "left", "font": {"color": INK}},
        "xaxis": AXIS,
        "yaxis": AXIS | {"gridcolor": "#E6E6E6", "showgrid": True},
    }
)


def escape(text: str) -> str:
    """Text that plotly shows as it is; it would draw `<b>` bold and knows no entity for quotes."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def dress(figure: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    """The figure with the look that all have, its title and its subtitle."""
    heading = {"text": escape(title), "subtitle": {"text": escape(subtitle)}}
    return figure.update_layout(template=TEMPLATE, title=heading, height=height)


def step(table: pd.DataFrame) -> int:
    """How far apart ticks of layers stand."""
    return 1 if table["layer"].nunique() <= 16 else 4


def legend_below(figure: go.Figure, room: int = 0) -> go.Figure:
    """The legend under the axis titles, and `room` more: above, long subtitles run into it."""
    margin = {"t": 110, "b": 115 + room}
    height = figure.layout.height
    place = {"x": 0, "xanchor": "left", "y": -(55 + room) / (height - 225), "yanchor": "top"}
    return figure.update_layout(margin=margin, legend=place, height=height + room)


def error_bars(part: pd.DataFrame) -> dict[str, object] | None:
    """Error bars from `low` to `high` around `share`; none where the table has no intervals."""
    if "low" not in part or part["low"].isna().all():
        return None
    up, down = part["high"] - part["share"], part["share"] - part["low"]
    look = {"color": INK, "thickness": 1, "width": 2}
    return {"type": "data", "array": up.clip(lower=0), "arrayminus": down.clip(lower=0)} | look


def percent(share: float) -> str:
    """A share in whole percent; a missing one is of an empty group."""
    return "empty" if np.isnan(share) else f"{share:.0%}"


LOOK_PARTS = ("color", "symbol", "dash", "pattern")


def looks(
    names: Iterable[str], known: Mapping[str, Look], spare: Sequence[Look], what: str
) -> dict[str, dict[str, str]]:
    """How each name is drawn, in the order given, as `color`, `symbol`, `dash` and `pattern`.

    Args:
        names: Of series; each may come several times.
        known: The looks of names that look alike in all figures.
        spare: The looks of others, in their order.
        what: What the names are of, for the error.

    Raises:
        ValueError: If there are more unknown names than spare looks.
    """
    found, left = [*dict.fromkeys(names)], iter(spare)
    if len(set(found) - set(known)) > len(spare):
        raise ValueError(
            f"{what} {', '.join(found)}: expected at most {len(spare)} beside {'; '.join(known)}"
        )
    chosen = {name: known[name] if name in known else next(left) for name in found}
    return {name: dict(zip(LOOK_PARTS, look, strict=True)) for name, look in chosen.items()}


def rated(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows that have members and a value, which becomes `share`, its interval `low`, `high`."""
    names = {column: "share", f"{column}_low": "low", f"{column}_high": "high"}
    found = table.rename(columns=names).dropna(subset="share")
    return found[found["n"] > 0]


def pattern(shape: str) -> dict[str, object]:
    """A white pattern over a bar's colour."""
    return {"shape": shape, "size": 6, "fgcolor": "white", "fillmode": "overlay"}


def add_line(
    figure: go.Figure,
    part: pd.DataFrame,
    x: str,
    hover: Sequence[str],
    name: str,
    look: Mapping[str, str],
    row: int,
    col: int,
    before: str = "",
    interval: str = "band",
) -> None:
    """A line with marks, its interval as a `band`, as error `bars` or in the hover alone.

    Args:
        figure: Of panels.
        part: As `rated` gives; nothing is drawn of an empty one.
        x: The column of the places.
        hover: A text for each row.
        name: Of the series, in the legend.
        look: As `looks` gives.
        row: Of the panel.
        col: Of the panel.
        before: A template that comes before the hover, such as `layer %{x}: `.
        interval: `band`, `bars` or `hover`.
    """
    if part.empty:
        return
    if interval == "band" and "low" in part:
        sure = part.dropna(subset=["low", "high"])
        figure.add_scatter(
            x=[*sure[x], *sure[x][::-1]], y=[*sure["high"], *sure["low"][::-1]], mode="lines",
            fill="toself", fillcolor=look["color"], opacity=0.15, line_width=0, legendgroup=name,
            hoverinfo="skip", showlegend=False, row=row, col=col,
        )  # fmt: skip
    figure.add_scatter(
        x=part[x], y=part["share"], name=escape(name), legendgroup=name, mode="lines+markers",
        line={"color": look["color"], "dash": look["dash"], "width": 1.5},
        marker={"symbol": look["symbol"], "size": 7}, hovertext=hover, row=row, col=col,
        error_y=error_bars(part) if interval == "bars" else None,
        hovertemplate=before + "%{hovertext}<extra>%{fullData.name}</extra>",
    )  # fmt: skip


def categories(figure: go.Figure, labels: Iterable[str]) -> go.Figure:
    """The labels in their order on all x axes, with series side by side at each."""
    names = [*labels]
    figure.update_layout(scattermode="group", scattergap=0.4)
    return figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=names, tickangle=0,
        range=[-0.5, len(names) - 0.5],
    )  # fmt: skip


def unique_legend(figure: go.Figure) -> go.Figure:
    """The figure with one entry of the legend for each name."""
    seen = set()
    for trace in figure.data:
        if trace.showlegend is not False:
            trace.showlegend = trace.name not in seen
            seen.add(trace.name)
    return figure
