"""The figures of the steering experiments: tables of means in, plotly figures out.

A table of means has one row a cell, as `cell_means` gives; one without a score is left out.
Unsteered text, and a strategy without a layer or strength, is a line across.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from flowhelpers.core.figures import COLOURS, INK, NAMES, dress, legend_below
from flowhelpers.steering.scores import SCORES
from flowhelpers.steering.sweeps import UNSTEERED

SEEDS = "layer of the seed features"
# The colour, marker, dash and bar pattern of each strategy. Controls are grey, hollow and dotted.
LOOKS = {
    "single": ("#0072B2", "circle", "solid", ""),
    "cumulative": ("#D55E00", "diamond", "dash", "/"),
    "constant": ("#E69F00", "square", "dashdot", "x"),
    "exponential": ("#009E73", "triangle-up", "longdash", "\\"),
    "linear": ("#CC79A7", "pentagon", "10px,3px", "-"),
    "seeds only": ("#56B4E9", "star", "longdashdot", "|"),
    "random features": ("#8C8C8C", "x-open", "dot", "."),
    "difference of means": ("#5A5A5A", "square-open", "2px,6px", "x"),
    "prompting": ("#767676", "star-diamond-open", "3px,4px", "-"),
    UNSTEERED: (INK, "line-ew", "dash", ""),
    SEEDS: (INK, "line-ns", "dot", ""),
}
COLOUR, SYMBOL, DASH, PATTERN = ({name: look[i] for name, look in LOOKS.items()} for i in range(4))
MARKS: dict[str, Any] = {
    "color": "strategy", "color_discrete_map": COLOUR, "symbol": "strategy", "symbol_map": SYMBOL,
}  # fmt: skip
LINES: dict[str, Any] = MARKS | {"line_dash": "strategy", "line_dash_map": DASH, "markers": True}
BARS: dict[str, Any] = {
    "color": "strategy", "color_discrete_map": COLOUR, "barmode": "group",
    "pattern_shape": "strategy", "pattern_shape_map": PATTERN,
}  # fmt: skip
ERRORS = {"error_y": "up", "error_y_minus": "down"}
COSTS = {
    "norm": ("Does a larger edit steer better?", "total norm added"),
    "kl": ("What does steering cost on neutral text?", "KL on neutral text, nats a token"),
}


def suppression_by_layer(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """Behavioral, coherence and score by layer, a line for each r (Figure 9).

    Red rings mark the layer of the best score of each r, in each strategy.
    """
    long = _long(means, SCORES)
    cells = long.dropna(subset=["layer", "strength"]).sort_values("layer", kind="stable")
    factors = sorted(cells["strength"].unique(), reverse=True)
    colours = sample_colorscale("Viridis", np.linspace(0.87, 0, len(factors)).tolist())
    plain = long[long["strategy"] == UNSTEERED].drop(columns=["strategy", "layer"])
    places = cells[["strategy", "layer"]].drop_duplicates()
    lines = pd.concat([cells.assign(r=cells["strength"].map("{:g}".format)),
                       plain.merge(places, how="cross").assign(r=UNSTEERED)])  # fmt: skip
    order = [f"{factor:g}" for factor in factors] + [UNSTEERED]
    facets: dict[str, Any] = {"facet_row": "measure", "facet_col": "strategy"}
    facets["category_orders"] = {"r": order, "measure": SCORES}
    figure = px.line(
        lines, x="layer", y="value", color="r", line_dash="r", markers=True, **facets,
        color_discrete_map=dict(zip(order, [*colours, INK], strict=True)), hover_data=_hover(long),
    )  # fmt: skip
    scores = means.dropna(subset=["layer", "strength", "score"])
    best = scores.loc[scores.groupby(["strategy", "strength"])["score"].idxmax()].index
    rings = px.scatter(cells.loc[best], x="layer", y="value", **facets).update_traces(
        marker={"symbol": "circle-open", "size": 14, "color": "#D50000", "line_width": 2.5},
        name="best layer of each r, by score", hoverinfo="skip", hovertemplate=None,
    )  # fmt: skip
    rings.data[0].showlegend = True
    figure.add_traces(rings.data)
    theme = means["theme"].iloc[0]
    return _finished(figure, f"Which layer suppresses “{theme}” best?", subtitle, 900)


def best_by_strength(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """The best score of each strategy at each r, evenly spaced from 0 down (Figure 10)."""
    long, order = _evenly(_long(means, ["score"]), "strength", largest_first=True)
    labels = {"strength": "r", "value": "best score (1 − B) · C"}
    figure = _lines(long, x="strength", category_orders=order, labels=labels)
    theme = means["theme"].iloc[0]
    title = f"Which strategy suppresses “{theme}” best at each strength?"
    return _finished(figure, title, subtitle, 525)


def strategies_by_theme(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """Score, behavioral and coherence of each strategy, theme by theme (Figure 11)."""
    long = _long(means, SCORES[::-1])
    figure = px.bar(
        long, x="theme", y="value", facet_row="measure", **BARS, **ERRORS, hover_data=_hover(long),
        category_orders={"strategy": [UNSTEERED, *LOOKS], "measure": ("score", *SCORES[:2])},
    )  # fmt: skip
    title = "How well does each strategy bring a theme into texts?"
    return _finished(figure, title, subtitle, 900)


def best_by_layer(
    means: pd.DataFrame, subtitle: str, seeds: Mapping[str, int] | None = None
) -> go.Figure:
    """The best score of each strategy at each layer, a panel for each theme (Figure 16).

    A dotted line is at the layer of the seed of each theme, as `seeds` has it.
    """
    starts = pd.DataFrame({"theme": [*(seeds or {})], "layer": [*(seeds or {}).values()]})
    ends = pd.DataFrame({"strategy": SEEDS, "score": [0, means["score"].max()], "n": 1})
    table = pd.concat([means, starts.merge(ends, how="cross")], ignore_index=True)
    long, order = _evenly(_long(table, ["score"]), "layer")
    is_line = long["strategy"].isin([UNSTEERED, SEEDS])
    shared: dict[str, Any] = {"x": "layer", "y": "value", "facet_col": "theme"}
    shared |= {"facet_col_wrap": 2, "category_orders": order | {"theme": means["theme"].unique()}}
    figure = px.bar(long[~is_line], **shared, **BARS, **ERRORS, hover_data=_hover(long))
    figure.add_traces(px.line(long[is_line], **shared, **LINES | {"markers": False}).data)
    height = 225 + 300 * -(-means["theme"].nunique() // 2)
    return _finished(figure, "At which layer does steering work best?", subtitle, height)


def features_by_layer(
    features: pd.DataFrame, subtitle: str, seeds: Iterable[int] = ()
) -> go.Figure:
    """How many features (`layer`, `module`) lie at each layer (Figure 17 a); dotted: `seeds`."""
    counts = features.value_counts(["layer", "module"], sort=False).rename("features").reset_index()
    figure = px.bar(
        counts.replace({"module": NAMES}), x="layer", y="features", color="module",
        color_discrete_map={name: COLOURS[module] for module, name in NAMES.items()},
        pattern_shape="module", pattern_shape_sequence=["\\", "", "/"],
        category_orders={"module": [*NAMES.values()]},
    )  # fmt: skip
    _add_seeds(figure, seeds)
    return _finished(figure, "At which layers do the selected features lie?", subtitle, 505)


def steered_by_layer(means: pd.DataFrame, subtitle: str, seeds: Iterable[int] = ()) -> go.Figure:
    """The score of each strategy by layer, of one theme (Figure 17 b); `seeds` as above."""
    long = _across(_long(means, ["score"]), "layer")
    figure = _lines(long, x="layer", labels={"value": "score"})
    _add_seeds(figure, seeds)
    title = f"Which layer steers to “{means['theme'].iloc[0]}” best?"
    return _finished(figure, title, subtitle, 525)


def dose_response(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """Behavioral, coherence and score by strength, a line a strategy, a row of panels a theme."""
    long, order = _evenly(_long(means, SCORES), "strength")
    order["measure"] = SCORES
    facets = {"facet_row": "theme", "facet_col": "measure"}
    figure = _lines(long, x="strength", category_orders=order, **facets)
    height = 225 + 300 * means["theme"].nunique()
    return _finished(figure, "What does more strength bring?", subtitle, height)


def score_against(means: pd.DataFrame, subtitle: str, by: str = "norm") -> go.Figure:
    """The score of every cell against its cost on a logarithmic axis, a panel for each theme.

    The cost is `norm`, all that is added to the stream, or `kl`, what changes on neutral text. The
    subtitle says how many cells cannot be drawn since their cost is not above 0.
    """
    long = _long(means, ["score"])
    steered = long[long["strategy"] != UNSTEERED]
    drawn = steered[steered[by] > 0]
    plain = long[long["strategy"] == UNSTEERED].drop(columns=by)
    ends = pd.DataFrame({by: [drawn[by].min(), drawn[by].max()]})
    if left := len(steered) - len(drawn):
        subtitle += f" · {left} of {len(steered)} cells have no {by} above 0: not drawn"
    title, axis = COSTS[by]
    figure = px.scatter(
        pd.concat([drawn, plain.merge(ends, how="cross")]), x=by, y="value", log_x=True, **MARKS,
        facet_col="theme", facet_col_wrap=2, hover_data=_hover(long), labels={by: axis},
    )  # fmt: skip
    figure.update_traces(mode="lines", line_dash="dash", selector={"name": UNSTEERED})
    return _finished(figure, title, subtitle, 225 + 300 * -(-means["theme"].nunique() // 2))


def _long(means: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """One row a cell and measure: `value`, `low`, `high`, and error bars `up` and `down`."""
    parts = []
    for measure in measures:
        ends = {end: means[f"{measure}_{end}"] for end in ("low", "high")}
        parts.append(means.assign(measure=measure, value=means[measure], **ends))
    long = pd.concat(parts).dropna(subset="value")
    up, down = long["high"] - long["value"], long["value"] - long["low"]
    return long.assign(up=up.clip(0), down=down.clip(0))


def _lines(long: pd.DataFrame, **options: Any) -> go.Figure:
    return px.line(long, y="value", **LINES, **ERRORS, hover_data=_hover(long), **options)


def _across(long: pd.DataFrame, x: str) -> pd.DataFrame:
    """Rows without an x are repeated at every x: lines across."""
    known = long.dropna(subset=x).sort_values(x, kind="stable")
    everywhere = long[long[x].isna()].drop(columns=x).merge(known[[x]].drop_duplicates(), "cross")
    return pd.concat([known, everywhere])


def _evenly(
    long: pd.DataFrame, x: str, largest_first: bool = False
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """As `_across`, with x as categories, and their order by number."""
    long = _across(long, x)
    numbers = sorted(long[x].unique(), reverse=largest_first)
    return long.assign(**{x: long[x].map("{:g}".format)}), {x: [f"{value:g}" for value in numbers]}


def _hover(long: pd.DataFrame) -> list[str]:
    names = ["theme", "layer", "strength", "low", "high", "n", "missing", *COSTS]
    return [name for name in names if name in long]


def _add_seeds(figure: go.Figure, seeds: Iterable[int]) -> None:
    for layer in seeds:
        figure.add_vline(x=layer, line={"color": INK, "width": 1.5, "dash": "dot"})


def _finished(figure: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    """Facet titles without the column's name, 0 on the y axes, and the look of all figures."""
    figure.for_each_annotation(lambda note: note.update(text=note.text.partition("=")[2]))
    figure.update_yaxes(rangemode="tozero")
    return legend_below(dress(figure, title, subtitle, height))
