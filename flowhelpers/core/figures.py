"""The look that all figures share: template, colours, legends."""

from __future__ import annotations

import html
from textwrap import wrap
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import plotly.io as pio

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
CLASS_MARKS = {
    "translated": "circle",
    "processed": "diamond",
    "newborn": "triangle-up",
    "unexplained": "x",
}
MODULE_MARKS = {"res": "circle", "mlp": "square", "att": "square"}
MARGIN = {"l": 75, "r": 20, "t": 100, "b": 50}
LINE, WRAPPED = 17, 120  # pixels of a subtitle's line, and its letters
# of plotly.js: without its button that offers to upload the figure
CONFIG = {"showSendToCloud": False, "displaylogo": False}
for _name in pio.renderers:  # what displays figures in a notebook, those of others included
    if hasattr(pio.renderers[_name], "config"):
        pio.renderers[_name].config = (pio.renderers[_name].config or {}) | CONFIG
AXIS = {"showgrid": False, "zeroline": False, "linecolor": "#BBBBBB", "ticks": "outside"}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "title": {
            **{"x": 0.01, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 14}},
            "subtitle": {"font": {"size": 12, "color": "#595959"}},
        },
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
    """The figure with the look that all have, its title and its subtitle, wrapped."""
    lines = wrap(subtitle.replace(" · ", "; "), WRAPPED) or [""]
    more = LINE * (len(lines) - 1)
    heading = {"text": escape(title), "subtitle": {"text": escape("\n".join(lines))}}
    look = {"template": TEMPLATE, "margin": MARGIN | {"t": MARGIN["t"] + more}}
    return figure.update_layout(**look, title=heading, height=height + more)


def grow(figure: go.Figure, top: int) -> go.Figure:
    """The figure with more room between its subtitle and its panels."""
    layout = figure.layout
    return figure.update_layout(height=layout.height + top, margin_t=layout.margin.t + top)


def step(table: pd.DataFrame) -> int:
    """How far apart ticks of layers stand."""
    return 1 if table["layer"].nunique() <= 16 else 4


def legend_below(figure: go.Figure, room: int = 0) -> go.Figure:
    """The legend under the axis titles, and `room` more: above, panels have their titles."""
    layout = figure.layout
    top, bottom, height = layout.margin.t + 10, 115 + room, layout.height + room
    place = {"x": 0, "xanchor": "left", "yanchor": "top"}
    place["y"] = -(55 + room) / (height - top - bottom)
    return figure.update_layout(height=height, margin_t=top, margin_b=bottom, legend=place)


def finish(figure: go.Figure, title: str, subtitle: str, height: int, room: int = 0) -> go.Figure:
    """The look of all figures, for one of plotly express: panels bear values as titles."""
    for panel in figure.layout.annotations:
        panel.text = escape(panel.text.replace("layer=", "layer ").split("=", 1)[-1])
    figure.update_layout(legend_title_text="")
    return legend_below(dress(figure, title, subtitle, height), room)
