"""Figures of matches as a transcoder between layers (appendix F): tables in, plotly figures out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.express as px
import plotly.graph_objects as go

from flowhelpers.core.figures import COLOURS, GREY, INK, PALE, dress, legend_below

if TYPE_CHECKING:
    import pandas as pd

SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", GREY, INK)
NAMES = {"explained": "explained variance", "layer": "layer of the target"}


def schematic_of_bridge(source: str, target: str, subtitle: str) -> go.Figure:
    """Figure 22: the encoder of one SAE, the transition, and the decoder of the other."""
    figure = dress(go.Figure(), f"From {source} to {target} by matches", subtitle, 480)
    boxes = [f"stream at {source}", "z = encode(x)", "z · T", "decode", f"stream at {target}"]
    notes = ["", f"SAE of {source}", "one match each", f"SAE of {target}", "predicted"]
    look = {"bgcolor": PALE, "borderwidth": 2, "borderpad": 8, "showarrow": False}
    aside = {"xshift": 80, "xanchor": "left", "font_color": GREY, "showarrow": False}
    for row, (box, note) in enumerate(zip(boxes, notes, strict=True)):
        colour = COLOURS["mlp"] if row == 2 else COLOURS["res"]
        figure.add_annotation(x=0, y=-row, text=f"<b>{box}</b>", bordercolor=colour, **look)
        figure.add_annotation(x=0, y=-row, text=note, **aside)
        if row:
            figure.add_annotation(x=0, y=0.5 - row, text="<b>↓</b>", showarrow=False, font_size=22)
    figure.update_xaxes(range=[-0.6, 1], visible=False)
    return figure.update_yaxes(range=[-4.5, 0.5], visible=False)


def explained_by_layer(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """What each kind of bridge explains of the next layer, for all neighbouring layers."""
    figure = px.line(
        _with_ends(table), x="layer", y="explained", color="kind", symbol="kind", markers=True,
        error_y="above", error_y_minus="below", labels=NAMES, color_discrete_sequence=SERIES,
    )  # fmt: skip
    dress(figure, "How much of the next layer do matches explain?", subtitle, 480)
    figure.update_traces(error_y={"thickness": 1, "width": 0})
    return legend_below(figure.update_xaxes(dtick=1).update_yaxes(hoverformat=".3f"))


def explained_by_permutation(table: pd.DataFrame, subtitle: str, top_1: float) -> go.Figure:
    """Figure 23: permutations by the weights matched and what is folded; the line is cosine's."""
    figure = px.bar(
        _with_ends(table), x="weights", y="explained", color="folded", barmode="group",
        error_y="above", error_y_minus="below", labels=NAMES, color_discrete_sequence=SERIES,
    )  # fmt: skip
    dress(figure, "Permutations as bridges, folded and not", subtitle, 480)
    line = {"line": {"dash": "dot", "color": INK}, "annotation_text": "the best match by cosine"}
    return legend_below(figure.add_hline(top_1, **line).update_yaxes(hoverformat=".3f"))


def explained_by_k(table: pd.DataFrame, subtitle: str, top_1: float) -> go.Figure:
    """Figure 24: the k highest products as they are, by the weights multiplied."""
    told = {"False": "activations as they are", "True": "folded: in units of each threshold"}
    table = table.assign(folded=table["folded"].astype(str).replace(told))
    figure = px.line(
        _with_ends(table), x="k", y="explained", color="product", symbol="product", markers=True,
        facet_col="folded", error_y="above", error_y_minus="below", labels=NAMES,
        color_discrete_sequence=SERIES,
    )  # fmt: skip
    figure.for_each_annotation(lambda title: title.update(text=title.text.partition("=")[2]))
    subtitle += " · dotted: the best match by cosine, as ones"
    dress(figure, "How many matches, and of which weights?", subtitle, 480)
    figure.add_hline(top_1, line={"dash": "dot", "color": INK})
    return legend_below(figure.update_xaxes(dtick=1).update_yaxes(hoverformat=".3f"))


def _with_ends(table: pd.DataFrame) -> pd.DataFrame:
    above, below = table["high"] - table["explained"], table["explained"] - table["low"]
    return table.assign(above=above.clip(lower=0), below=below.clip(lower=0))
