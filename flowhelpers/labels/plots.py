"""A text with a feature's activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from flowhelpers.core.figures import COLOURS, dress, escape

if TYPE_CHECKING:
    import pandas as pd


def token_text(tokens: pd.DataFrame, title: str, subtitle: str, columns: int = 80) -> go.Figure:
    """A text, `columns` characters a line, its tokens coloured by activation from 0 (white) up.

    The table has one row a token, in order, with its text as `token` and its `activation`.
    """
    lines: list[list[tuple[str, float | None, str]]] = [[]]
    for token, value in zip(tokens["token"], tokens["activation"], strict=True):
        if len(lines[-1]) + len(token) > columns:
            lines.append([])
        for char in token.replace("\n", "⏎").replace("\t", " "):
            if len(lines[-1]) == columns:
                lines.append([])
            lines[-1].append((char, float(value), f"{escape(repr(token))}: {value:.3g}"))
        if "\n" in token:
            lines.append([])
    lines = [line + [("", None, "")] * (columns - len(line)) for line in lines if line]
    figure = dress(go.Figure(), title, subtitle, 110 + 30 * len(lines))
    figure.add_heatmap(
        z=[[value for _, value, _ in line] for line in lines],
        text=[[escape(char) for char, _, _ in line] for line in lines],
        hovertext=[[hover for _, _, hover in line] for line in lines],
        hoverinfo="text",
        hoverongaps=False,
        texttemplate="%{text}",
        textfont={"family": "ui-monospace, Menlo, Consolas, monospace", "size": 13},
        colorscale=[[0, "white"], [1, COLOURS["res"]]],
        zmin=0,
        zmax=max(float(tokens["activation"].max()), 1e-9),
        ygap=5,
        colorbar={"title": "activation", "thickness": 12},
    )
    figure.update_layout(margin={"l": 10, "b": 10}, xaxis_visible=False, yaxis_visible=False)
    return figure.update_yaxes(autorange="reversed")
