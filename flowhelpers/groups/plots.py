"""The figures of the group statistics: tables in, plotly figures out, as in `plots`.

A share bears its interval where the table has one, as an error bar, a band or in the hover; a group
without members is left out, not drawn at zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flowhelpers.core.figures import (
    COLOURS,
    GREY,
    INK,
    NAMES,
    SYMBOLS,
    dress,
    error_bars,
    escape,
    legend_below,
    percent,
    step,
)
from flowhelpers.flow.plots import CONDITIONS
from flowhelpers.groups.occurrences import GROUPS

if TYPE_CHECKING:
    import pandas as pd

GROUP_COLOURS = dict(
    zip(
        GROUPS,
        (GREY, *COLOURS.values(), "#CC79A7", "#56B4E9", "#E69F00", INK),
        strict=True,
    )
)
GROUP_MARKS = dict(
    zip(
        GROUPS,
        ("x", "circle", "diamond", "square", "star", "hexagon", "triangle-up", "pentagon"),
        strict=True,
    )
)
SCORES = {f"s_{module}": f"s({symbol})" for module, symbol in SYMBOLS.items()}
PAIR_NAMES = {"AO": "active in one group", "AB": "active in both", "IB": "inactive in both"}


def group_scatter(points: pd.DataFrame, subtitle: str) -> go.Figure:
    """s(R) against s(M) and s(A) for single features of a few layers, by group (Figure 3).

    Args:
        points: As `groups.single_source_points` gives.
        subtitle: Suite, n and choices.
    """
    layers = sorted(points["layer"].unique())
    others = ("mlp", "att")
    titles = [f"layer {layer}: s(R) and {SCORES[f's_{m}']}" for layer in layers for m in others]
    figure = make_subplots(len(layers), 2, subplot_titles=titles, vertical_spacing=0.16)
    dress(
        figure,
        "Scores of features by the group they are found in",
        subtitle,
        130 + 330 * len(layers),
    )
    for group in GROUPS[:4]:
        for row, layer in enumerate(layers, 1):
            part = points[(points["group"] == group) & (points["layer"] == layer)]
            for column, module in enumerate(others, 1):
                figure.add_scatter(
                    x=part["s_res"], y=part[f"s_{module}"], name=group, legendgroup=group,
                    mode="markers", showlegend=row == column == 1,
                    marker={"color": GROUP_COLOURS[group], "symbol": GROUP_MARKS[group], "size": 5},
                    opacity=0.7, row=row, col=column,
                    hovertext=[f"{layer}/res/{feature}" for feature in part["feature"]],
                    hovertemplate="%{hovertext}: %{x:.2f}, %{y:.2f}<extra>%{fullData.name}</extra>",
                )  # fmt: skip
                figure.update_yaxes(title=SCORES[f"s_{module}"], row=row, col=column)
    figure.update_xaxes(title="s(R)", showgrid=True)
    return legend_below(figure)


def class_bars(classes: pd.DataFrame, subtitle: str) -> go.Figure:
    """The share of significant tests by where a module is active in the two groups (Figure 4).

    Args:
        classes: As `group_tests.class_shares` gives, with intervals if there are any, and `unit`,
            what was counted, a row for each.
        subtitle: Suite, n and choices.
    """
    units = list(dict.fromkeys(classes["unit"]))
    titles = [f"{NAMES[module]}, {unit}" for unit in units for module in SYMBOLS]
    figure = make_subplots(
        len(units), 3, shared_yaxes=True, subplot_titles=titles, vertical_spacing=0.16
    )
    dress(figure, "How often two groups differ in a score", subtitle, 200 + 220 * len(units))
    colours = dict(zip(PAIR_NAMES, ("#0072B2", "#E69F00", GREY), strict=True))
    for row, unit in enumerate(units, 1):
        for column, module in enumerate(SYMBOLS, 1):
            here = classes[(classes["unit"] == unit) & (classes["module"] == module)]
            for pair, name in PAIR_NAMES.items():
                part = here[here["pair"] == pair].set_index("score").reindex([*SCORES])
                figure.add_bar(
                    x=[*SCORES.values()], y=part["share"], name=f"{pair}: module {name}",
                    legendgroup=pair, showlegend=row == column == 1, marker_color=colours[pair],
                    error_y=error_bars(part), customdata=part["tests"].fillna(0),
                    text=[percent(share) for share in part["share"]], textposition="inside",
                    textangle=0, insidetextanchor="start",
                    hovertemplate="%{x}: %{y:.1%} of %{customdata} tests<extra>"
                    "%{fullData.name}</extra>",
                    row=row, col=column,
                )  # fmt: skip
    figure.update_layout(barmode="group", bargap=0.25, uniformtext={"minsize": 9, "mode": "hide"})
    figure.update_yaxes(title="share of tests", col=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
    return legend_below(figure)


def groups_by_layer(shares: pd.DataFrame, subtitle: str) -> go.Figure:
    """The share of each group by layer: a column for each dataset, a row for each method.

    It is the paper's Figure 5, its Figure 18 with two methods, and 19 (b) for another suite. Bands
    are intervals. Layer 0, which has no stream before it, is drawn apart with hollow marks.

    Args:
        shares: As `intervals.share_intervals` gives by `dataset` and `layer`; `method` if several.
        subtitle: Suite, n and choices.
    """
    table = shares if "method" in shares else shares.assign(method="")
    methods, datasets = (list(dict.fromkeys(table[c])) for c in ("method", "dataset"))
    titles = [f"{name} {method}".strip() for method in methods for name in datasets]
    spaces = {"horizontal_spacing": 0.03, "vertical_spacing": 0.12}
    figure = make_subplots(
        len(methods), len(datasets), shared_yaxes="all", subplot_titles=titles, **spaces
    )
    dress(figure, "Where active features come from, by layer", subtitle, 160 + 280 * len(methods))
    for row, method in enumerate(methods, 1):
        for column, dataset in enumerate(datasets, 1):
            here = table[(table["method"] == method) & (table["dataset"] == dataset)]
            for group in GROUPS:
                part = here[(here["group"] == group)].dropna(subset="share")
                later = part[part["layer"] > 0]
                look = {"color": GROUP_COLOURS[group]}
                shown = {"legendgroup": group, "row": row, "col": column}
                hover = [_in_words(each) for each in part.to_dict("records")]
                if "low" in part:
                    figure.add_scatter(
                        x=[*later["layer"], *later["layer"][::-1]],
                        y=[*later["high"], *later["low"][::-1]],
                        fill="toself", fillcolor=look["color"], opacity=0.18, line_width=0,
                        hoverinfo="skip", showlegend=False, mode="lines", **shown,
                    )  # fmt: skip
                for place, mark in ((part["layer"] > 0, ""), (part["layer"] == 0, "-open")):
                    figure.add_scatter(
                        x=part["layer"][place], y=part["share"][place], name=group, mode="markers",
                        marker=look | {"symbol": GROUP_MARKS[group] + mark, "size": 6},
                        hovertext=np.array(hover, dtype=object)[place.to_numpy()],
                        hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
                        showlegend=row == column == 1 and not mark, **shown,
                    )  # fmt: skip
                figure.add_scatter(
                    x=later["layer"], y=later["share"], mode="lines", line=look | {"width": 1.5},
                    hoverinfo="skip", showlegend=False, **shown,
                )  # fmt: skip
    figure.update_xaxes(title="layer", dtick=step(table))
    figure.update_yaxes(title="share of occurrences", col=1)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return legend_below(figure)


def group_bars(shares: pd.DataFrame, base: pd.DataFrame, subtitle: str) -> go.Figure:
    """How the occurrences of each dataset are spread over the groups (Figure 12 a).

    Args:
        shares: As `intervals.share_intervals` gives by `dataset`.
        base: The same of predecessors elsewhere (`groups.elsewhere`): short lines mark it.
        subtitle: Suite, n and choices.
    """
    datasets = list(dict.fromkeys(shares["dataset"]))
    colours = dict(zip(datasets, (*CONDITIONS[1:], GREY), strict=False))
    figure = dress(go.Figure(), "Where active features come from", subtitle, 470)
    for place, dataset in enumerate(datasets):
        part = shares[shares["dataset"] == dataset].dropna(subset="share")
        hover = [_in_words(row) for row in part.to_dict("records")]
        figure.add_bar(
            x=part["group"].astype(str), y=part["share"], name=str(dataset), offsetgroup=place,
            marker_color=colours.get(dataset, GREY), error_y=error_bars(part), hovertext=hover,
            hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    width = 0.8 / len(datasets)
    for place, dataset in enumerate(datasets):
        part = base[base["dataset"] == dataset].dropna(subset="share")
        places = [GROUPS.index(group) - 0.4 + width * (place + 0.5) for group in part["group"]]
        figure.add_scatter(
            x=places, y=part["share"], xaxis="x2", mode="markers", error_y=error_bars(part),
            name="by chance: the same predecessors at other tokens", legendgroup="base",
            showlegend=place == 0, meta=str(dataset),
            hovertext=[_in_words(row) for row in part.to_dict("records")],
            hovertemplate="by chance %{hovertext}<extra>%{meta}</extra>",
            marker={"symbol": "line-ew", "size": 100 * width, "line": {"width": 3, "color": INK}},
        )  # fmt: skip
    figure.update_layout(
        barmode="group", bargap=0.2,
        xaxis={"categoryorder": "array", "categoryarray": list(GROUPS), "range": [-0.5, 7.5]},
        xaxis_tickangle=-15,
        xaxis2={"overlaying": "x", "range": [-0.5, 7.5], "visible": False, "matches": None},
    )  # fmt: skip
    figure.update_yaxes(title="share of occurrences", tickformat=".0%", rangemode="tozero")
    return legend_below(figure)


def score_densities(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """How the scores of each group are distributed, at a few layers (Figure 12 b).

    Args:
        table: As `groups.score_histograms` gives.
        subtitle: Suite, n and choices.
    """
    layers = sorted(table["layer"].unique())
    titles = [f"layer {layer}: {name}" for layer in layers for name in SCORES.values()]
    figure = make_subplots(len(layers), 3, subplot_titles=titles, vertical_spacing=0.14)
    dress(figure, "How scores are distributed in each group", subtitle, 150 + 260 * len(layers))
    for row, layer in enumerate(layers, 1):
        for column, score in enumerate(SCORES, 1):
            here = table[(table["layer"] == layer) & (table["score"] == score)]
            for group in GROUPS:
                part = here[here["group"] == group]
                if part.empty:
                    continue
                figure.add_scatter(
                    x=part["at"], y=part["density"], mode="lines", name=group, legendgroup=group,
                    line={"color": GROUP_COLOURS[group], "width": 2}, row=row, col=column,
                    showlegend=row == column == 1,
                    hovertemplate="%{x:.2f}: %{y:.2f}<extra>%{fullData.name}</extra>",
                )  # fmt: skip
    figure.update_yaxes(title="density", rangemode="tozero", col=1)
    return legend_below(figure)


def transition_heatmap(rows: pd.DataFrame, subtitle: str) -> go.Figure:
    """Of the features seen in one group, the share also seen in another (Figure 13).

    Args:
        rows: As `intervals.transition_intervals` gives.
        subtitle: Suite, n and choices.
    """
    figure = dress(
        go.Figure(),
        "Of the features seen in a group (row; so many), the share also seen in another",
        subtitle,
        560,
    )
    share = rows.pivot(index="first", columns="second", values="share")
    text = rows.assign(text=[_in_words(row) for row in rows.to_dict("records")])
    hover = text.pivot(index="first", columns="second", values="text")
    order = list(GROUPS)
    members = rows.drop_duplicates("first").set_index("first")["features"]
    figure.add_heatmap(
        x=order,
        y=[f"{group} ({members[group]:,})" for group in order],
        z=share.loc[order, order],
        text=hover.loc[order, order],
        texttemplate="%{z:.2f}",
        hovertemplate="%{y} → %{x}: %{text}<extra></extra>",
        hoverongaps=False,
        colorscale=[[0, "white"], [1, COLOURS["res"]]],
        zmin=0,
        zmax=1,
        colorbar={"title": "share"},
    )
    figure.update_xaxes(title="also seen in", tickangle=-30, automargin=True)
    return figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)


def pair_heatmaps(pairs: pd.DataFrame, subtitle: str) -> go.Figure:
    """For every pair of groups and score, the share of significant tests (Figure 14).

    Args:
        pairs: As `group_tests.pair_shares` gives, with intervals if there are any.
        subtitle: Suite, n and choices.
    """
    figure = make_subplots(1, 3, shared_yaxes=True, subplot_titles=[*SCORES.values()])
    dress(figure, "Which groups differ in which score", subtitle, 480)
    order = [group.removeprefix("From ") for group in GROUPS]
    for column, score in enumerate(SCORES, 1):
        part = pairs[pairs["score"] == score]
        words = [_in_words(row | {"n": row["tests"]}) for row in part.to_dict("records")]
        part = part.assign(text=words, a=part["first"].str[5:], b=part["second"].str[5:])
        share, text = (
            part.pivot(index="a", columns="b", values=value).reindex(order[:-1], columns=order[1:])
            for value in ("share", "text")
        )
        figure.add_heatmap(
            x=order[1:], y=order[:-1], z=share, text=text, coloraxis="coloraxis",
            texttemplate="%{z:.2f}", hoverongaps=False, row=1, col=column,
            hovertemplate="%{y} and %{x}: %{text}<extra></extra>",
        )  # fmt: skip
    scale = [[0, "white"], [1, COLOURS["res"]]]
    axis = {"cmin": 0, "cmax": 1, "colorscale": scale, "colorbar": {"title": "share of tests"}}
    figure.update_layout(margin_t=125, coloraxis=axis)
    figure.update_xaxes(tickangle=-40, automargin=True)
    return figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)


def together_by_cosine(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """Co-activation of matched features by the cosine of their directions, for each module.

    Args:
        table: As `coactivation.by_cosine` gives.
        subtitle: Suite, n and choices.
    """
    modules = [module for module in SYMBOLS if module in set(table["module"])]
    titles = [f"from {SYMBOLS[module]} ({NAMES[module]})" for module in modules]
    figure = make_subplots(1, len(modules), shared_yaxes=True, subplot_titles=titles)
    dress(figure, "Are features that lie near active together?", subtitle, 430)
    names = {
        "pearson": ("Pearson", INK, "solid"),
        "jaccard": ("Jaccard", "#CC79A7", "dash"),
        "source_given_target": ("P(source | target)", "#0072B2", "dot"),
        "target_given_source": ("P(target | source)", "#D55E00", "dashdot"),
    }
    for column, module in enumerate(modules, 1):
        part = table[table["module"] == module]
        for measure, (name, colour, dash) in names.items():
            hover = [f"{n:,} pairs" for n in part["pairs"]]
            figure.add_scatter(
                x=part["cosine"], y=part[measure], name=name, legendgroup=name, hovertext=hover,
                line={"color": colour, "dash": dash}, mode="lines+markers",
                showlegend=column == 1, row=1, col=column,
                hovertemplate="cosine %{x:.2f}: median %{y:.2f} of %{hovertext}<extra>"
                "%{fullData.name}</extra>",
            )  # fmt: skip
    figure.update_xaxes(title="cosine of the match", range=[0, 1.02])
    figure.update_yaxes(title="median over pairs", col=1)
    figure.update_yaxes(range=[-0.1, 1.03])
    return legend_below(figure)


def _in_words(row: dict[str, object]) -> str:
    """A share with its interval and its n, for a hover."""
    share, low = row["share"], row.get("low", np.nan)
    if np.isnan(share):  # pyright: ignore[reportArgumentType, reportCallIssue]
        return "empty"
    words = f"{share:.1%}"
    if not np.isnan(low):  # pyright: ignore[reportArgumentType, reportCallIssue]
        words += f" ({low:.1%} to {row['high']:.1%})"
    n = row.get("n", row.get("features"))
    return escape(words + (f", n = {n:,}" if n is not None else ""))
