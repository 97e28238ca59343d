"""The figures of the steering experiments, from tables of means as `cell_means` gives.

A cell without a score is left out. Unsteered text, and a strategy without a layer or strength, is a
line across.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flowhelpers.core.figures import COLOURS, INK, NAMES, finish
from flowhelpers.steering.scores import SCORES, best_cells
from flowhelpers.steering.sweeps import UNSTEERED

SEEDS = "layer of the seed features"
BEST = "best layer of each r"
# The colour, marker and dash of each strategy. Controls are grey, hollow and dotted.
LOOKS = {
    "single": ("#0072B2", "circle", "solid"),
    "cumulative": ("#D55E00", "diamond", "dash"),
    "constant": ("#E69F00", "square", "dashdot"),
    "exponential": ("#009E73", "triangle-up", "longdash"),
    "linear": ("#CC79A7", "pentagon", "10px,3px"),
    "seeds only": ("#56B4E9", "star", "longdashdot"),
    "random features": ("#8C8C8C", "x-open", "dot"),
    "difference of means": ("#5A5A5A", "square-open", "2px,6px"),
    "prompting": ("#767676", "star-diamond-open", "3px,4px"),
    UNSTEERED: (INK, "line-ew", "dash"),
    SEEDS: (INK, "line-ns", "dot"),
}
COLOUR, SYMBOL, DASH = ({name: look[i] for name, look in LOOKS.items()} for i in range(3))
MARKS: dict[str, Any] = {"color": "strategy", "symbol": "strategy"}
MARKS |= {"color_discrete_map": COLOUR, "symbol_map": SYMBOL}
AXES = {"value": "mean over samples"}
AS_CHOSEN = {"score": "score on new samples", "chosen_on": "score as chosen (the paper's)"}
ERRORS = {"error_y": "up", "error_y_minus": "down"}
COSTS = {
    "norm": ("Does a larger edit steer better?", "total norm added"),
    "kl": ("What does steering cost on neutral text?", "KL on neutral text, nats a token"),
}


def suppression_by_layer(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """Behavioral, coherence and score of every r (rows) and layer (columns), as maps (Figure 9).

    As there, the layer of the highest score is marked for each r of the method `single`. Each
    measure has a row of panels and a scale of its own, each strategy a column.
    """
    cells = means.dropna(subset=["layer", "strength"])
    plain = means[means["strategy"] == UNSTEERED].iloc[:1]
    best = best_cells(means[means["strategy"] == "single"], ["strength"])
    ways, layers = [*cells["strategy"].unique()], sorted(cells["layer"].unique())
    strengths = sorted(cells["strength"].unique(), key=abs, reverse=True)
    rows, names = [f"{r:g}" for r in strengths], [f"{layer:g}" for layer in layers]
    titles = [f"{way}: {measure}" for measure in SCORES for way in ways]
    for measure in SCORES if len(plain) else ():
        titles[SCORES.index(measure) * len(ways)] += f"\n(unsteered {plain[measure].item():.2f})"
    spaces = {"horizontal_spacing": 0.06, "vertical_spacing": 0.11, "shared_yaxes": True}
    figure = make_subplots(len(SCORES), len(ways), subplot_titles=titles, **spaces)
    for number, (measure, way) in enumerate(product(SCORES, ways)):
        part = cells[cells["strategy"] == way]
        tables = [
            part.pivot(index="strength", columns="layer", values=f"{measure}{end}")
            for end in ("", "_low", "_high")
        ]
        value, low, high = (table.reindex(index=strengths, columns=layers) for table in tables)
        place = {"row": number // len(ways) + 1, "col": number % len(ways) + 1}
        figure.add_heatmap(
            z=value.to_numpy(float), x=names, y=rows, customdata=np.dstack([low, high]),
            name=f"{way}: {measure}", zmin=0, zmax=cells[measure].max(), showscale=False,
            colorscale=["white", COLOURS["res"]], xgap=2, ygap=2,
            texttemplate="%{z:.2f}" if len(layers) <= 12 else None,
            hovertemplate="layer %{x}, r = %{y}: %{z:.3f} (%{customdata[0]:.3f} to"
            " %{customdata[1]:.3f})<extra></extra>", **place,
        )  # fmt: skip
        frame = {"name": BEST, "legendgroup": BEST, "line": {"color": INK, "width": 2}}
        for at, cell in enumerate(best.itertuples() if way == "single" else ()):
            x, y = layers.index(cell.layer), strengths.index(cell.strength)
            ends = {"x0": x - 0.47, "x1": x + 0.47, "y0": y - 0.42, "y1": y + 0.42}
            figure.add_shape(frame | ends, showlegend=place["row"] == 1 and not at, **place)
    figure.update_annotations(font_size=13)
    edges = {"type": "category", "showgrid": False}
    figure.update_xaxes(edges, range=[-0.5, len(names) - 0.5])
    figure.update_yaxes(edges, range=[-0.5, len(rows) - 0.5])
    figure.update_xaxes(title_text="layer", row=len(SCORES)).update_yaxes(title_text="r", col=1)
    height = 300 + 3 * 32 * (len(rows) + 1)
    return finish(figure, "Which layer suppresses the theme best?", subtitle, height)


def strategies_by_theme(
    means: pd.DataFrame, subtitle: str, title: str = "How well does each strategy bring in a theme?"
) -> go.Figure:
    """Score, behavioral and coherence of each strategy, theme by theme (Figure 11)."""
    long = _long(means, SCORES[::-1])
    figure = px.bar(
        long, x="theme", y="value", facet_row="measure", barmode="group", color="strategy",
        color_discrete_map=COLOUR, pattern_shape="strategy", **ERRORS, hover_data=_hover(long),
        labels=AXES,
        category_orders={"strategy": [UNSTEERED, "seeds only", *LOOKS]},
    )  # fmt: skip
    return _finished(figure, title, subtitle, 900)


def best_by_layer(means: pd.DataFrame, subtitle: str, seeds: Mapping[str, Any]) -> go.Figure:
    """The best score of each strategy by layer, a panel for each theme (Figures 16 and 17 b).

    Ticks at the bottom are at the layers of each theme's seeds: one, or a list.
    """
    ticks = pd.Series(seeds, name="layer").explode().rename_axis("theme").reset_index()
    ticks = ticks.astype({"layer": float}).assign(strategy=SEEDS, score=0.0)
    table = pd.concat([means, ticks], ignore_index=True)
    figure = _lines(_long(table, ["score"]), "layer", facet_col="theme", facet_col_wrap=2)
    look = {"size": 16, "line": {"width": 2, "color": INK}}
    figure.update_traces(mode="markers", marker=look, selector={"name": SEEDS})
    height = 225 + 300 * -(-means["theme"].nunique() // 2)
    return _finished(figure, "At which layer does steering work best?", subtitle, height)


def features_by_layer(features: pd.DataFrame, subtitle: str, seeds: Iterable[int]) -> go.Figure:
    """How many features (`layer`, `module`) lie at each layer (Figure 17 a); dotted: `seeds`."""
    counts = features.value_counts(["layer", "module"], sort=False).rename("features").reset_index()
    figure = px.bar(
        counts.replace({"module": NAMES}), x="layer", y="features", color="module",
        color_discrete_map={name: COLOURS[module] for module, name in NAMES.items()},
        pattern_shape="module", category_orders={"module": [*NAMES.values()]},
    )  # fmt: skip
    for layer in seeds:
        figure.add_vline(x=layer, line={"color": INK, "width": 1.5, "dash": "dot"})
    return _finished(figure, "At which layers do the selected features lie?", subtitle, 505)


def dose_response(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """Behavioral, coherence and score by strength, evenly spaced from 0 on (Figure 10).

    With a column `chosen_on`, the score by which a cell was chosen is drawn beside that on others.
    """
    named = AS_CHOSEN if "chosen_on" in means else {}
    long = _long(means, [*SCORES[:2], *(named or ["score"])]).replace({"measure": named})
    themes = means["theme"].nunique()
    panels = {"facet_row": "theme"} if themes > 1 else {"facet_col_wrap": 2}
    figure = _lines(long, "strength", facet_col="measure", **panels)
    strengths = sorted(means["strength"].dropna().unique(), key=abs)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=strengths)
    height = 225 + 300 * (themes if themes > 1 else 2)
    return _finished(figure, "What does more strength bring?", subtitle, height)


def score_against(means: pd.DataFrame, subtitle: str, by: str = "norm") -> go.Figure:
    """The score of every cell against its cost on a logarithmic axis, a panel for each theme.

    The cost is `norm`, all that is added to the stream, or `kl`, what changes on neutral text. The
    subtitle says how many cells cannot be drawn since their cost is not above 0.
    """
    long = _long(means, ["score"])
    is_plain, has_cost = long["strategy"] == UNSTEERED, long[by] > 0
    if left := int((~is_plain & ~has_cost).sum()):
        subtitle += f" · {left} of {sum(~is_plain)} cells have no {by} above 0: not drawn"
    title, axis = COSTS[by]
    drawn = _across(long.assign(**{by: long[by].where(has_cost)})[is_plain | has_cost], by)
    figure = px.scatter(
        drawn, x=by, y="value", log_x=True, **MARKS, facet_col="theme", facet_col_wrap=2,
        hover_data=_hover(long), labels=AXES | {by: axis},
    )  # fmt: skip
    look = {"size": 10, "line": {"width": 1, "color": "white"}}
    figure.update_traces(marker=look, cliponaxis=False)
    ticks = [digit * 10.0**power for power in range(-9, 9) for digit in (1, 2, 5)]
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_traces(mode="lines", line_dash="dash", selector={"name": UNSTEERED})
    return _finished(figure, title, subtitle, 225 + 300 * -(-means["theme"].nunique() // 2))


def _long(means: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """One row a cell and measure: `value`, and error bars `up` and `down`."""
    parts = []
    for measure in measures:
        value, low, high = (means[f"{measure}{end}"] for end in ("", "_low", "_high"))
        bars = {"up": (high - value).clip(0), "down": (value - low).clip(0)}
        parts.append(means.assign(measure=measure, value=value, **bars))
    return pd.concat(parts).dropna(subset="value")


def _lines(long: pd.DataFrame, x: str, **options: Any) -> go.Figure:
    long, dashes = _across(long, x), {"line_dash": "strategy", "line_dash_map": DASH}
    looks = MARKS | dashes | ERRORS | {"labels": AXES}
    figure = px.line(
        long, x=x, y="value", markers=True, hover_data=_hover(long), **looks, **options
    )
    return figure.update_traces(marker_size=9, error_y={"thickness": 1, "width": 0})


def _across(long: pd.DataFrame, x: str) -> pd.DataFrame:
    """Rows without an x are repeated at every x: lines across, their interval at the first."""
    known = long.dropna(subset=x).sort_values(x, kind="stable")
    everywhere = long[long[x].isna()].drop(columns=x).merge(known[[x]].drop_duplicates(), "cross")
    everywhere.loc[everywhere[x] > known[x].min(), ["up", "down"]] = np.nan
    return pd.concat([known, everywhere])


def _hover(long: pd.DataFrame) -> list[str]:
    names = ["theme", "layer", "strength", "n", "missing", *COSTS]
    return [name for name in names if name in long]


def _finished(figure: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    """0 on the y axes, and the look of all figures."""
    return finish(figure.update_yaxes(rangemode="tozero"), title, subtitle, height)
