"""A text with a feature's activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.express as px
import plotly.graph_objects as go

from flowhelpers.core.figures import COLOURS, dress, escape

if TYPE_CHECKING:
    import pandas as pd


def token_text(
    tokens: pd.DataFrame, title: str, subtitle: str, columns: int = 14, most: float = 0.0
) -> go.Figure:
    """A text, `columns` tokens a line, coloured by their `activation` from 0 (white) up.

    Texts are comparable by colour if the scale of each goes to the same `most`, or beyond.
    """
    rows = -(-len(tokens) // columns)
    cells = tokens[["token", "activation"]].reset_index(drop=True).reindex(range(rows * columns))
    values = cells["activation"].to_numpy(float).reshape(rows, columns)
    words = cells["token"].fillna("").str.replace("\n", "⏎").map(escape).to_numpy()
    figure = px.imshow(
        values, zmin=0, zmax=max(np.nanmax(values), most, 1e-9), aspect="auto",
        color_continuous_scale=["white", COLOURS["res"]], labels={"color": "activation"},
    )  # fmt: skip
    shown = {"texttemplate": "%{text}", "textfont": {"size": 12}, "ygap": 5}
    figure.update_traces(text=words.reshape(rows, columns), **shown)
    figure.update_traces(hovertemplate="%{text}: %{z:.3g}<extra></extra>", hoverongaps=False)
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    bar = {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yanchor": "top", "len": 0.5}
    figure.update_layout(coloraxis_colorbar=bar | {"thickness": 12, "title_side": "right"})
    figure = dress(figure, title, subtitle, 160 + 30 * rows)
    return figure.update_layout(margin={"l": 10, "r": 10, "b": 60})
