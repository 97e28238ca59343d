"""The look that all figures share: template, colours, legends."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import plotly.graph_objects as go

if TYPE_CHECKING:
    import pandas as pd

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
MARGIN = {"l": 75, "r": 20, "t": 100, "b": 50}
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
        "yaxis": AXIS | {"gridcolor": "#E6E6E6", "showgrid": True, "automargin": True},
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
