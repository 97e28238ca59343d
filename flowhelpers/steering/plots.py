"""The figures of the steering experiments: tables in, plotly figures out, as in `plots`.

A table of means has one row a cell, that is a `theme`, a `strategy`, a `layer` and a `strength`
(r where a theme is suppressed, s where it is brought in), the last two missing where there is none.
It holds the means of `behavioral`, `coherence` and `score` from 0 to 1, each with its interval as
`_low` and `_high` if there is one, `n`, the texts, and may hold `missing`, those without a
judgement. The strategy `unsteered` is the text as the model writes it: a dashed line with its
interval as a pale band. A cell without texts or without a mean is left out, not drawn at zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from flowhelpers.core.features import suggestion
from flowhelpers.core.figures import (
    COLOURS,
    INK,
    NAMES,
    add_line,
    categories,
    dress,
    error_bars,
    escape,
    legend_below,
    looks,
    pattern,
    rated,
    unique_legend,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    Layers = int | Iterable[int]

UNSTEERED = "unsteered"
VALUES = ("behavioral", "coherence", "score")
CELL = ("theme", "strategy", "layer", "strength")
BASE_LOOK = {"color": INK, "symbol": "circle", "dash": "dash", "pattern": ""}
STRATEGY_LOOKS = {
    "single": ("#0072B2", "circle", "solid", ""),
    "cumulative": ("#D55E00", "diamond", "dash", "/"),
    "constant": ("#E69F00", "square", "dashdot", "x"),
    "exponential": ("#009E73", "triangle-up", "longdash", "\\"),
    "linear": ("#CC79A7", "pentagon", "10px,3px", "-"),
    "seeds only": ("#56B4E9", "star", "longdashdot", "|"),
}
SPARE_LOOKS = (
    ("#882255", "hexagon", "12px,3px,3px,3px", "+"),
    ("#117733", "triangle-down", "6px,3px", "."),
    ("#332288", "cross", "8px,2px,2px,2px,2px,2px", "x"),
    ("#AA4499", "hourglass", "14px,6px", "/"),
)
CONTROL_LOOKS = {  # what has nothing to do with a flow graph: grey, hollow and dotted
    "random features": ("#8C8C8C", "x-open", "dot", "."),
    "difference of means": ("#5A5A5A", "square-open", "2px,6px", "x"),
    "prompting": ("#767676", "star-diamond-open", "3px,4px", "-"),
}
STRENGTH_MARKS = ("circle", "diamond", "square", "triangle-up", "star", "pentagon", "cross")
STRENGTH_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MODULE_PATTERNS = {"att": "\\", "res": "", "mlp": "/"}
BEST = "#D50000"
COSTS = {
    "norm": ("Does a larger edit steer better?", "total norm added (log axis)"),
    "kl": (
        "What does steering cost on neutral text?",
        "KL from the unsteered model<br>on neutral text, nats a token (log axis)",
    ),
}


def suppression_by_layer(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """Behavioral, coherence and score by layer, a line for each r (Figure 9).

    Red rings mark the layer of the best score of each r, in each strategy; of equals the lowest.
    Intervals are in the hover.

    Args:
        means: One row a `strategy`, `layer` and `strength` (r) of one `theme`: `n`, and the three
            means. Strategies without layers are not drawn, but for `unsteered`.
        subtitle: Suite, n and choices.

    Raises:
        ValueError: If columns are missing, there are several themes, no cell at a layer, or
            several rows of one cell.
    """
    table = _checked(means, *CELL, *VALUES)
    theme, base = _one_theme(table), _unsteered(table)
    cells = _cells(table, "layer", "strength").sort_values("layer", kind="stable")
    _check_single(cells, *CELL)
    strategies, layers = [*_looks(cells["strategy"])], _numbers(cells["layer"])
    figure = make_subplots(
        3, len(strategies), shared_yaxes=True, shared_xaxes=True, vertical_spacing=0.05,
        horizontal_spacing=0.04, column_titles=[*map(escape, strategies)],
    )  # fmt: skip
    dress(figure, f"Which layer suppresses “{theme}” best?", subtitle, 905)
    factors = _numbers(cells["strength"])[::-1]
    factor_looks = dict(zip(factors, _sequence(len(factors)), strict=True))
    for col, strategy in enumerate(strategies, 1):
        mine = cells[cells["strategy"] == strategy]
        judged = rated(mine, "score")
        best = judged.loc[judged.groupby("strength")["share"].idxmax()]
        for row, column in enumerate(VALUES, 1):
            _add_level(figure, base, column, UNSTEERED, BASE_LOOK, _span(layers), row, col)
            for factor, look in factor_looks.items():
                part = rated(mine[mine["strength"] == factor], column)
                hover, name = _hover(part, "r"), f"r = {_told_number(factor)}"
                add_line(figure, part, "layer", hover, name, look, row, col, interval="hover")
            part = rated(mine.loc[best.index], column)
            figure.add_scatter(
                x=part["layer"], y=part["share"], name="best layer of each r, by score",
                legendgroup="best", mode="markers", hovertext=_hover(part, "r"), row=row, col=col,
                marker={"symbol": "circle-open", "size": 14, "color": BEST, "line_width": 2.5},
                hovertemplate="best: %{hovertext}<extra></extra>",
            )  # fmt: skip
    for row, name in enumerate(("behavioral B", "coherence C", "score (1 − B) · C"), 1):
        figure.update_yaxes(title=name, row=row, col=1)
    _layer_axes(_from_zero(figure), layers).update_xaxes(title="layer", row=3)
    return legend_below(unique_legend(figure))


def best_by_strength(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """The best score of each strategy at each r, evenly spaced from 0 down (Figure 10).

    Args:
        means: One row a `strategy` and `strength` (r) of one `theme`: `n` and `score`, with
            `score_low` and `score_high`; `layer` says which one was best. A strategy without a
            strength is a line across.
        subtitle: Suite, n and choices.

    Raises:
        ValueError: If columns are missing, there are several themes, no cell with a strength, or
            several rows of a strategy at one r.
    """
    table = _checked(means, *CELL, "score")
    theme, cells = _one_theme(table), _cells(table, "strength")
    _check_single(cells, "theme", "strategy", "strength")
    figure = make_subplots(1, 1)
    dress(figure, f"Which strategy suppresses “{theme}” best at each strength?", subtitle, 525)
    factors = _numbers(cells["strength"])[::-1]
    _add_levels(figure, table, "strength", "score", _span(range(len(factors)), 0.5), 1, 1)
    chosen = _looks(cells["strategy"])
    for place, (strategy, look) in enumerate(chosen.items()):
        part = rated(cells[cells["strategy"] == strategy], "score")
        beside = 0.4 * (place - (len(chosen) - 1) / 2) / len(chosen)  # no bar hides another
        part = part.assign(at=np.array(_ranks(part["strength"], factors)) + beside)
        part = part.sort_values("at")
        hover = _hover(part, "r")
        add_line(figure, part, "at", hover, strategy, look, 1, 1, interval="bars")
    _even_axes(figure, factors).update_xaxes(title="r")
    figure.update_yaxes(title="best score (1 − B) · C")
    return legend_below(unique_legend(_from_zero(figure)))


def strategies_by_theme(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """Score, behavioral and coherence of each strategy, theme by theme (Figure 11).

    Bars of unsteered text are white, those of controls grey patterns on white.

    Args:
        means: One row a `theme` and `strategy`: `n` and the three means; `layer` and `strength` say
            which cell it is.
        subtitle: Suite, n and choices.

    Raises:
        ValueError: If columns are missing, there is no strategy, or several rows of one.
    """
    table = _checked(means, *CELL, *VALUES)
    _check_single(table, "theme", "strategy")
    themes, chosen = [*dict.fromkeys(table["theme"])], _looks(_cells(table)["strategy"])
    labels = {theme: "<br>".join(map(escape, wrap(theme, 24) or [""])) for theme in themes}
    figure = make_subplots(3, 1, shared_xaxes=True, vertical_spacing=0.05)
    dress(figure, "How well does each strategy bring a theme into texts?", subtitle, 905)
    for strategy, look in ({UNSTEERED: BASE_LOOK} | chosen).items():
        mine = table[table["strategy"] == strategy]
        for row, column in enumerate(("score", "behavioral", "coherence"), 1):
            part = rated(mine, column)
            _add_bars(figure, part, [labels[x] for x in part["theme"]], strategy, look, row, 1)
    for row, name in enumerate(("score B · C", "behavioral B", "coherence C"), 1):
        figure.update_yaxes(title=name, row=row)
    figure.update_layout(barmode="group", bargap=0.2)
    figure.update_yaxes(rangemode="tozero")
    categories(figure, labels.values())
    lines = max(label.count("<br>") for label in labels.values())
    return legend_below(
        unique_legend(figure), 15 * lines - 10
    )  # there is no title below the labels


def best_by_layer(
    means: pd.DataFrame, subtitle: str, seeds: Mapping[str, Layers] | None = None
) -> go.Figure:
    """The best score of each strategy at each layer, a panel for each theme (Figure 16).

    Layers are evenly spaced, the same in all panels.

    Args:
        means: One row a `theme`, `strategy` and `layer`: `n` and `score`, with `score_low` and
            `score_high`; `strength` says which one was best. A strategy without a layer is a line
            across.
        subtitle: Suite, n and choices.
        seeds: For each theme the layer or layers of the features that it began with: a dotted line.

    Raises:
        ValueError: If columns are missing, there is no cell at a layer, several rows of one, or
            seeds of another theme.
    """
    table = _checked(means, *CELL, "score")
    cells = _cells(table, "layer")
    _check_single(cells, "theme", "strategy", "layer")
    themes = [*dict.fromkeys(cells["theme"])]
    cells = cells.sort_values("layer", kind="stable")
    for theme in seeds or {}:
        if theme not in themes:
            hint = suggestion(theme, themes)
            raise ValueError(f"seeds of {theme!r}, of which there are no means{hint}")
    places = {theme: _as_layers((seeds or {}).get(theme, ())) for theme in themes}
    layers = _numbers([*cells["layer"], *(at for some in places.values() for at in some)])
    figure, panels = _theme_panels(themes, "At which layer does steering work best?", subtitle)
    for theme, (row, col) in panels.items():
        here, mine = (each[each["theme"] == theme] for each in (table, cells))
        _add_levels(figure, here, "layer", "score", _span(range(len(layers)), 0.5), row, col)
        for strategy, look in _looks(cells["strategy"]).items():
            part = rated(mine[mine["strategy"] == strategy], "score")
            _add_bars(figure, part, _ranks(part["layer"], layers), strategy, look, row, col)
        _add_seeds(figure, _ranks(places[theme], layers), row, col)
    figure.update_layout(barmode="group", bargap=0.2)
    figure.update_yaxes(rangemode="tozero").update_yaxes(title="best score", col=1)
    _even_axes(figure, layers).update_xaxes(title="layer")
    return legend_below(unique_legend(figure))


def features_by_layer(features: pd.DataFrame, subtitle: str, seeds: Layers = ()) -> go.Figure:
    """How many features were selected at each layer, by module (Figure 17 a).

    Args:
        features: One row a selected feature: `layer` and `module`.
        subtitle: Suite, theme and choices.
        seeds: The layer or layers of the features that it began with: dotted lines.

    Raises:
        ValueError: If columns are missing, or a module is unknown.
    """
    _check_columns(features, ("layer", "module"))
    for module in dict.fromkeys(features["module"]):
        if module not in NAMES:
            hint = suggestion(module, NAMES)
            raise ValueError(f"unknown module {module!r}: expected {', '.join(NAMES)}{hint}")
    figure = make_subplots(1, 1)
    dress(figure, "At which layers do the selected features lie?", subtitle, 505)
    counts = features.groupby(["module", "layer"]).size()
    for module, name in NAMES.items():
        if module not in counts:
            continue
        here = counts[module].sort_index()
        figure.add_bar(
            x=here.index, y=here, name=name, meta=name,
            marker={"color": COLOURS[module], "pattern": pattern(MODULE_PATTERNS[module])},
            hovertemplate="layer %{x}: %{y} of %{meta}<extra></extra>", row=1, col=1,
        )  # fmt: skip
    _add_seeds(figure, _as_layers(seeds), 1, 1)
    figure.update_layout(barmode="stack", bargap=0.2, legend_traceorder="normal")
    highest = features.groupby("layer").size().max() if len(features) else 1
    figure.update_yaxes(title="features", rangemode="tozero", dtick=max(1, round(highest / 8)))
    layers = _numbers([*features["layer"], *_as_layers(seeds)])
    if layers:
        _layer_axes(figure, layers).update_xaxes(range=[layers[0] - 0.8, layers[-1] + 0.8])
    return legend_below(unique_legend(figure.update_xaxes(title="layer")))


def steered_by_layer(means: pd.DataFrame, subtitle: str, seeds: Layers = ()) -> go.Figure:
    """The score of each strategy by layer, with its interval as a band (Figure 17 b).

    Args:
        means: One row a `strategy` and `layer` of one `theme`: `n` and `score`, with `score_low`
            and `score_high`. A strategy without a layer is a line across.
        subtitle: Suite, n and choices.
        seeds: The layer or layers of the features that it began with: dotted lines.

    Raises:
        ValueError: If columns are missing, there are several themes, no cell at a layer, or
            several rows of a strategy at one layer.
    """
    table = _checked(means, *CELL, "score")
    theme = _one_theme(table)
    cells = _cells(table, "layer").sort_values("layer", kind="stable")
    _check_single(cells, "theme", "strategy", "layer")
    figure = make_subplots(1, 1)
    dress(figure, f"Which layer steers to “{theme}” best?", subtitle, 525)
    layers = _numbers([*cells["layer"], *_as_layers(seeds)])
    _add_levels(figure, table, "layer", "score", _span(layers), 1, 1)
    for strategy, look in _looks(cells["strategy"]).items():
        part = rated(cells[cells["strategy"] == strategy], "score")
        add_line(figure, part, "layer", _hover(part), strategy, look, 1, 1)
    _add_seeds(figure, _as_layers(seeds), 1, 1)
    figure.update_xaxes(title="layer", range=_span(layers)[:: len(layers) + 1])
    figure.update_yaxes(title="score")
    return legend_below(unique_legend(_layer_axes(_from_zero(figure), layers)))


def dose_response(means: pd.DataFrame, subtitle: str) -> go.Figure:
    """Behavioral, coherence and score by strength, a line a strategy, a row of panels a theme.

    Strengths are evenly spaced: from the least up, or from the greatest down where most are below
    zero. Intervals are bands; of more than four strategies, they are in the hover alone.

    Args:
        means: One row a `theme`, `strategy` and `strength`: `n` and the three means; `layer` says
            at which they were measured. A strategy without a strength is a line across.
        subtitle: Suite, n and choices.

    Raises:
        ValueError: If columns are missing, there is no cell with a strength, or several rows of a
            strategy at one.
    """
    table = _checked(means, *CELL, *VALUES)
    cells = _cells(table, "strength")
    _check_single(cells, "theme", "strategy", "strength")
    themes, strengths = [*dict.fromkeys(cells["theme"])], _numbers(cells["strength"])
    if sum(np.sign(strengths)) < 0:
        strengths = strengths[::-1]
    cells = cells.assign(at=_ranks(cells["strength"], strengths)).sort_values("at", kind="stable")
    plot = 260 * len(themes) + 100 * (len(themes) - 1)
    titles = [title for theme in themes for title in (escape(theme), "", "")]
    figure = make_subplots(
        len(themes), 3, subplot_titles=titles, horizontal_spacing=0.07, shared_yaxes="columns",
        vertical_spacing=100 / plot if len(themes) > 1 else None,
    ).update_annotations(x=0, xanchor="left", font_size=14)  # fmt: skip
    dress(figure, "What does more strength bring?", subtitle, 225 + plot)
    chosen = _looks(cells["strategy"])
    interval = "band" if len(chosen) <= 4 else "hover"
    for row, theme in enumerate(themes, 1):
        here, mine = (each[each["theme"] == theme] for each in (table, cells))
        for col, column in enumerate(VALUES, 1):
            _add_levels(
                figure, here, "strength", column, _span(range(len(strengths)), 0.5), row, col
            )
            for strategy, look in chosen.items():
                part = rated(mine[mine["strategy"] == strategy], column)
                hover = _hover(part)
                add_line(figure, part, "at", hover, strategy, look, row, col, interval=interval)
            figure.update_yaxes(title=column, row=row, col=col)
    _even_axes(figure, strengths).update_xaxes(title="strength", row=len(themes))
    return legend_below(unique_legend(_from_zero(figure)))


def score_against(means: pd.DataFrame, subtitle: str, by: str = "norm") -> go.Figure:
    """The score of every cell against what it costs, a panel for each theme.

    Intervals are in the hover. The axis is logarithmic; how many judged cells have no cost above 0
    to be drawn at is said beneath it.

    Args:
        means: One row a cell: `theme`, `strategy`, `layer`, `strength`, `n`, `score` and the column
            of `by`; the other cost is told in the hover if there is one.
        subtitle: Suite, n and choices.
        by: `norm`, all that is added to the stream, or `kl`, what changes on neutral text.

    Raises:
        ValueError: If columns are missing, `by` is unknown, no cell has a cost, or there are
            several rows of one cell.
    """
    if by not in COSTS:
        raise ValueError(f"unknown by {by!r}: expected {' or '.join(COSTS)}")
    table = _checked(means, *CELL, "score", by)
    cells = rated(_cells(table), "score")
    _check_single(cells, *CELL)
    drawn = cells[cells[by] > 0]
    if drawn.empty:
        raise ValueError(f"expected cells with a {by} above 0: found none among {len(cells)}")
    title, axis = COSTS[by]
    figure, panels = _theme_panels([*dict.fromkeys(drawn["theme"])], title, subtitle)
    low, high = float(drawn[by].min()) / 1.3, float(drawn[by].max()) * 1.3
    across = [*np.geomspace(low, high, 25)]
    for theme, (row, col) in panels.items():
        base = _unsteered(table[table["theme"] == theme])
        _add_level(figure, base, "score", UNSTEERED, BASE_LOOK, across, row, col)
        for strategy, look in _looks(cells["strategy"]).items():
            part = drawn[(drawn["theme"] == theme) & (drawn["strategy"] == strategy)]
            if part.empty:
                continue
            figure.add_scatter(
                x=part[by], y=part["share"], name=escape(strategy), legendgroup=strategy,
                mode="markers", hovertext=_hover(part, costs=True), row=row, col=col, opacity=0.8,
                marker={"color": look["color"], "symbol": look["symbol"], "size": 8},
                hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
            )  # fmt: skip
    ends = [*np.log10([low, high])]
    figure.update_xaxes(type="log", range=ends, exponentformat="none", showgrid=True)
    figure.update_xaxes(gridcolor="#E6E6E6")
    last = -(-len(panels) // 2)
    figure.update_xaxes(title=axis, row=last)
    if left := len(cells) - len(drawn):
        note = f"{left:,} of {len(cells):,} cells have no {by} above 0: not drawn"
        axis += f"<br><span style='font-size:12px'>{note}</span>"
        figure.update_xaxes(title=axis, row=last, col=1)
    figure.update_yaxes(title="score", col=1)
    return legend_below(unique_legend(_from_zero(figure)), 20 * axis.count("<br>"))


def _checked(means: pd.DataFrame, *needed: str) -> pd.DataFrame:
    """The table with its own row numbers, once it has all that is needed."""
    _check_columns(means, (*needed, "n"))
    ends = [f"{value}_{end}" for value in VALUES for end in ("low", "high")]
    numbers = {"layer", "strength", *VALUES, *ends, "n", "missing", *COSTS} & {*means.columns}
    return means.reset_index(drop=True).astype(dict.fromkeys(numbers, float))


def _check_columns(table: pd.DataFrame, needed: Sequence[str]) -> None:
    lacking = [name for name in needed if name not in table]
    if lacking:
        raise ValueError(
            f"no column {', '.join(lacking)}: expected {', '.join(needed)}, "
            f"found {', '.join(map(str, table.columns))}"
        )


def _cells(table: pd.DataFrame, *known: str) -> pd.DataFrame:
    """The steered cells of which these columns are known."""
    found = table[table["strategy"] != UNSTEERED].dropna(subset=[*known])
    if found.empty:
        words = f" with a {' and a '.join(known)}" if known else ""
        raise ValueError(f"expected steered cells{words}: found none among {len(table)} rows")
    return found


def _unsteered(table: pd.DataFrame) -> pd.DataFrame:
    base = table[table["strategy"] == UNSTEERED]
    _check_single(base, "theme")
    return base


def _check_single(table: pd.DataFrame, *keys: str) -> None:
    """That there is one row a cell."""
    again = table[table.duplicated([*keys])]
    if len(again):
        cell = ", ".join(str(again[key].iloc[0]) for key in keys)
        raise ValueError(f"several rows of {cell}: expected one a {', '.join(keys)}")


def _one_theme(table: pd.DataFrame) -> str:
    themes = [*map(str, dict.fromkeys(table["theme"]))]
    if len(themes) != 1:
        raise ValueError(f"expected means of one theme: found {', '.join(themes) or 'none'}")
    return themes[0]


def _looks(strategies: Iterable[str]) -> dict[str, dict[str, str]]:
    """How each strategy is drawn: those of flow graphs come first, then others, then controls."""
    found = [*dict.fromkeys(strategies)]
    known = STRATEGY_LOOKS | CONTROL_LOOKS
    others = [name for name in found if name not in known]
    order = [*STRATEGY_LOOKS, *others, *CONTROL_LOOKS]
    return looks([name for name in order if name in found], known, SPARE_LOOKS, "strategies")


def _sequence(count: int) -> list[dict[str, str]]:
    """Looks of so many steps, from pale to dark."""
    colours = sample_colorscale("Viridis", np.linspace(0.87, 0, count).tolist())
    marks, dashes = STRENGTH_MARKS, STRENGTH_DASHES  # 7 and 5, so that 35 steps differ
    return [
        {"color": c, "symbol": marks[i % len(marks)], "dash": dashes[i % len(dashes)]}
        for i, c in enumerate(colours)
    ]


def _numbers(values: Iterable[float]) -> list[float]:
    return sorted({float(value) for value in values})


def _ranks(values: Iterable[float], order: Sequence[float]) -> list[int]:
    return [order.index(float(value)) for value in values]


def _span(places: Iterable[float], beyond: float = 0.0) -> list[float]:
    """The places, with the ends of an axis that holds them."""
    inside = [*places]
    more = beyond or max(0.04 * (inside[-1] - inside[0]), 0.4)
    return [inside[0] - more, *inside, inside[-1] + more]


def _as_layers(seeds: Layers) -> list[int]:
    """One layer or several."""
    return sorted(set(seeds)) if isinstance(seeds, Iterable) else [seeds]


def _told_number(value: float) -> str:
    """As plotly writes numbers at an axis."""
    return f"{value:g}".replace("-", "−")


def _hover(part: pd.DataFrame, symbol: str = "strength", costs: bool = False) -> list[str]:
    """Which cell it is, its value with interval, and n; with costs, its theme too."""
    words = []
    for row in part.to_dict("records"):
        about = [escape(str(row["theme"]))] if costs else []
        about += [f"layer {row['layer']:g}"] if np.isfinite(row["layer"]) else []
        if np.isfinite(row["strength"]):
            about.append(f"{symbol} {'= ' * (symbol == 'r')}{_told_number(row['strength'])}")
        told = [f"{', '.join(about)}: {_value(row)}".removeprefix(": "), f"n = {row['n']:,.0f}"]
        if row.get("missing", 0) > 0:
            told.append(f"{row['missing']:,.0f} without a judgement")
        if costs:
            known = [cost for cost in COSTS if np.isfinite(row.get(cost, np.nan))]
            told += [f"{cost} {_told_number(float(f'{row[cost]:.3g}'))}" for cost in known]
        words.append(", ".join(told))
    return words


def _value(row: Mapping[Any, Any]) -> str:
    between = [row.get(end, np.nan) for end in ("low", "high")]
    low, high = (f"{end:.2f}" for end in between)
    return f"{row['share']:.2f}" + ("" if np.isnan(between).any() else f" ({low} to {high})")


def _theme_panels(
    themes: Sequence[str], title: str, subtitle: str
) -> tuple[go.Figure, dict[str, tuple[int, int]]]:
    """A figure of two panels a row, and the row and column of each theme."""
    across, down = min(len(themes), 2), -(-len(themes) // 2)
    plot = 300 * down + 90 * (down - 1)
    figure = make_subplots(
        down, across, shared_yaxes="all", subplot_titles=[*map(escape, themes)],
        horizontal_spacing=0.05, vertical_spacing=90 / plot if down > 1 else None,
    ).update_annotations(font_size=14)  # fmt: skip
    dress(figure, title, subtitle, 225 + plot)
    return figure, {theme: (at // 2 + 1, at % 2 + 1) for at, theme in enumerate(themes)}


def _add_levels(
    figure: go.Figure,
    table: pd.DataFrame,
    unknown: str,
    column: str,
    across: Sequence[float],
    row: int,
    col: int,
) -> None:
    """A line across for unsteered text, and for each strategy of which a column is unknown."""
    _add_level(figure, _unsteered(table), column, UNSTEERED, BASE_LOOK, across, row, col)
    rest = table[(table["strategy"] != UNSTEERED) & table[unknown].isna()]
    _check_single(rest, "theme", "strategy")
    for strategy, look in _looks(rest["strategy"]).items():
        part = rest[rest["strategy"] == strategy]
        _add_level(figure, part, column, strategy, look, across, row, col)


def _add_level(
    figure: go.Figure,
    table: pd.DataFrame,
    column: str,
    name: str,
    look: Mapping[str, str],
    across: Sequence[float],
    row: int,
    col: int,
) -> None:
    """The one row of the table as a line across a panel, its interval as a pale band."""
    part = rated(table, column)
    if part.empty:
        return
    (cell,) = part.to_dict("records")
    where = {"legendgroup": name, "row": row, "col": col}
    if np.isfinite([cell.get("low", np.nan), cell.get("high", np.nan)]).all():
        figure.add_scatter(
            x=[across[0], across[-1], across[-1], across[0]],
            y=[cell["low"], cell["low"], cell["high"], cell["high"]],
            fill="toself", fillcolor=look["color"], opacity=0.1, line_width=0, mode="lines",
            hoverinfo="skip", showlegend=False, **where,
        )  # fmt: skip
    figure.add_scatter(
        x=[*across], y=[cell["share"]] * len(across), name=escape(name), mode="lines",
        line={"color": look["color"], "dash": look["dash"], "width": 2},
        hovertext=_hover(part) * len(across),
        hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>", **where,
    )  # fmt: skip


def _add_bars(
    figure: go.Figure,
    part: pd.DataFrame,
    x: Iterable[Any],
    strategy: str,
    look: Mapping[str, str],
    row: int,
    col: int,
) -> None:
    """Bars of one strategy, with error bars; those of others stand beside them."""
    if part.empty:
        return
    marker: dict[str, Any] = {"color": look["color"], "line": {"color": look["color"], "width": 1}}
    marker["pattern"] = pattern(look["pattern"])
    if strategy in CONTROL_LOOKS:
        marker["pattern"] = {"shape": look["pattern"], "size": 6, "fillmode": "replace"}
    elif strategy == UNSTEERED:
        marker = {"color": "white", "line": {"color": INK, "width": 1.5}}
    figure.add_bar(
        x=[*x], y=part["share"], name=escape(strategy), legendgroup=strategy,
        offsetgroup=strategy, marker=marker, error_y=error_bars(part), hovertext=_hover(part),
        hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>", row=row, col=col,
    )  # fmt: skip


def _add_seeds(figure: go.Figure, layers: Sequence[int], row: int, col: int) -> None:
    """Dotted lines where the features lie that a flow graph began with."""
    line = {"color": INK, "width": 1.5, "dash": "dot"}
    for layer in layers:
        figure.add_vline(x=layer, line=line, row=row, col=col)
    if layers:
        name = "layer of the seed features"
        figure.add_scatter(x=[None], y=[None], mode="lines", name=name, line=line)


def _from_zero(figure: go.Figure) -> go.Figure:
    """The figure with 0 on its y axes, and room below it for marks that stand there."""
    return figure.update_yaxes(autorangeoptions_include=0)


def _layer_axes(figure: go.Figure, layers: Sequence[float]) -> go.Figure:
    """Ticks at the layers, or at every fourth where there are many.

    No range is set: where axes are shared, plotly does not find that of y if x is given one.
    """
    return figure.update_xaxes(**({"tickvals": layers} if len(layers) <= 16 else {"dtick": 4}))


def _even_axes(figure: go.Figure, places: Sequence[float]) -> go.Figure:
    """Evenly spaced ticks for layers or strengths, in the order given."""
    labels = [_told_number(each) for each in places]
    ends = [-0.5, len(labels) - 0.5]
    ticks = [*range(len(labels))]
    return figure.update_xaxes(tickvals=ticks, ticktext=labels, range=ends, tickangle=0)
