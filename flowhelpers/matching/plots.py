"""Figures of notebook 01: a table in, a plotly figure out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.express as px
import plotly.graph_objects as go

from flowhelpers.core.figures import (
    CLASS_COLOURS,
    COLOURS,
    GREY,
    INK,
    NAMES,
    SYMBOLS,
    dress,
    grow,
    step,
)

if TYPE_CHECKING:
    import pandas as pd

SCORES = {module: f"s({symbol})" for module, symbol in SYMBOLS.items()}
SCORE_COLOURS = {SCORES[module]: COLOURS[module] for module in SYMBOLS}


def scores_by_layer(scores: pd.DataFrame, subtitle: str) -> go.Figure:
    """s(R), s(M) and s(A) of all features (from `feature_scores`), beside chance.

    Boxes are quartiles, whiskers the 5 % and 95 % quantiles.
    """
    modules = [module for module in SYMBOLS if f"s_{module}" in scores]
    nulls = scores.groupby("layer")[[f"null_{module}" for module in modules]].first()
    nulls.columns = [SCORES[module] for module in modules]
    points = nulls.reset_index().melt("layer", var_name="score", value_name="cosine").dropna()
    figure = px.scatter(points, x="layer", y="cosine", facet_col="score", facet_col_spacing=0.03)
    mark = {"symbol": "line-ew", "size": 18, "line": {"width": 3, "color": INK}}
    figure.update_traces(name="99.9 % of chance lies below", marker=mark)
    figure.data[0].showlegend = True
    for column, module in enumerate(modules, 1):  # from quantiles: no feature of a large suite
        quantiles = scores.dropna(subset=[f"s_{module}"]).groupby("layer")[f"s_{module}"]
        table = quantiles.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
        table.columns = ["lowerfence", "q1", "median", "q3", "upperfence"]
        look = {"name": SCORES[module], "marker_color": COLOURS[module], "showlegend": False}
        figure.add_box(x=table.index, **table, **look, row=1, col=column)
    figure.for_each_annotation(lambda title: title.update(text=title.text.split("=")[-1]))
    dress(figure, "Best cosine of every residual feature, by layer", subtitle, 420)
    grow(figure, 25).update_layout(legend_y=1.1)
    return figure.update_xaxes(title="layer", dtick=step(scores))


def share_above_null(summary: pd.DataFrame, subtitle: str) -> go.Figure:
    """Shares by layer (`layer`, `above_res`, `above_mlp`, `above_att`) of scores above chance."""
    table = summary.rename(columns={f"above_{module}": name for module, name in SCORES.items()})
    figure = px.line(
        table, x="layer", y=[name for name in SCORE_COLOURS if name in table],
        symbol="variable", line_dash="variable", color_discrete_map=SCORE_COLOURS,
    )  # fmt: skip
    figure.add_hline(0.001, line={"dash": "dot", "color": INK}, annotation_text="by chance 0.1 %")
    figure.update_traces(marker_size=9)
    title = "Share of features matched better than 99.9 % of chance"
    return _shares(figure, summary, title, subtitle, [-0.03, 1.03])


def classes_by_layer(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """The shares of the four classes by layer (a column each, beside `layer`), as bars."""
    looks = {"color_discrete_map": CLASS_COLOURS, "pattern_shape": "variable"}
    figure = px.bar(table, x="layer", y=[*CLASS_COLOURS], **looks)
    figure.update_layout(bargap=0.15, legend_traceorder="normal")
    return _shares(figure, table, "What features are, by layer", subtitle, [0, 1])


def _shares(
    figure: go.Figure, table: pd.DataFrame, title: str, subtitle: str, ends: list[float]
) -> go.Figure:
    dress(figure, title, subtitle, 380).update_layout(legend_title=None)
    figure.update_xaxes(title="layer", dtick=step(table))
    return figure.update_yaxes(title="share of features", tickformat=".0%", range=ends)


def agreement_map(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """How often two methods choose the same best source (as `agreement` gives)."""
    import numpy as np

    names = list(dict.fromkeys([*table["first"], *table["second"]]))
    squares = {}
    for module in (module for module in SYMBOLS if module in set(table["module"])):
        part = table[table["module"] == module]
        half = part.pivot(index="first", columns="second", values="same")
        same = half.combine_first(half.T).reindex(names, columns=names)
        squares[f"from {SYMBOLS[module]} ({NAMES[module]})"] = same.to_numpy(float)
    figure = px.imshow(
        np.stack([*squares.values()]), x=names, y=names, facet_col=0, zmin=0, zmax=1,
        text_auto=".0%", labels={"color": "the same"},
        color_continuous_scale=["white", COLOURS["res"]],  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    for annotation, title in zip(figure.layout.annotations, squares, strict=True):
        annotation.text = title
    dress(figure, "How often two methods choose the same source", subtitle, 170 + 60 * len(names))
    grow(figure, 25).update_layout(coloraxis_colorbar_tickformat=".0%")
    figure.update_xaxes(tickangle=-40, automargin=True)
    return figure.update_yaxes(showgrid=False, automargin=True)


def against_chance(cosines: pd.DataFrame, null: float, title: str, subtitle: str) -> go.Figure:
    """Histograms of the best cosines `found` and by `chance`; a line marks the null's quantile."""
    columns = {"chance": GREY, "found": COLOURS["res"]}
    figure = px.histogram(
        cosines.round(4), x=[*columns], color_discrete_map=columns, opacity=0.7, barmode="overlay"
    )
    line = {"line": {"dash": "dot", "color": INK}, "annotation_text": "99.9 % of chance below"}
    figure.add_vline(null, **line)
    figure.update_traces(xbins={"start": 0, "end": 1, "size": 0.02})
    dress(figure, title, subtitle, 360).update_layout(legend_title=None, yaxis_title="features")
    return figure.update_xaxes(title="best cosine", range=[0, 1])
