"""One function a figure: a table in, a plotly figure out. Nothing is computed or loaded here.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; what is no higher than
chance is grey and dotted, so that no colour is needed to see it. Every figure has a subtitle, for
the suite and the choices; labels are plain text, their lines parted by newlines.
"""

from __future__ import annotations

import html
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flowhelpers.core.features import MODULES, parse_feature, suggestion
from flowhelpers.core.figures import (
    COLOURS,
    GREY,
    INK,
    MARGIN,
    NAMES,
    PALE,
    SYMBOLS,
    dress,
    escape,
    step,
)
from flowhelpers.flow.layout import Layout, flow_layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from flowhelpers.flow.graph import FlowGraph

HALO = ", ".join(f"{x}px {y}px 1px white" for x in (-1, 1) for y in (-1, 1))
CONDITIONS = (GREY, "#0072B2", "#E69F00", "#CC79A7", "#56B4E9")
CLASS_COLOURS = {
    "translated": "#56B4E9",
    "processed": "#E69F00",
    "newborn": "#CC79A7",
    "unexplained": GREY,
}
NODE_COLOURS = CLASS_COLOURS | COLOURS


def schematic(graph: FlowGraph, feature: str, subtitle: str) -> go.Figure:
    """The paper's Figure 1 for one residual feature of a flow graph, with its class.

    Raises:
        ValueError: If the feature is no residual feature of the graph.
    """
    rows = graph.chain[graph.chain["feature"] == feature]
    if rows.empty:
        hint = suggestion(feature, graph.chain["feature"])
        raise ValueError(f"{feature} is no residual feature of this graph{hint}")
    row, layer = rows.iloc[0], parse_feature(feature).layer
    labels, links = (
        dict(zip(graph.nodes["feature"], graph.nodes[column], strict=True))
        for column in ("label", "link")
    )
    figure = dress(go.Figure(), f"Where {feature} may come from", subtitle, 420)
    mine = "\n".join(filter(None, [_class(row), labels[feature]]))
    _box(figure, (1.0, 0.0), f"R<sub>{layer}</sub>", feature, mine, COLOURS["res"], row["link"])
    for module, lane in {"att": 1.0, "res": 0.0, "mlp": -1.0}.items():
        source, score, null = (row[f"{column}_{module}"] for column in ("from", "s", "null"))
        at = layer - (module == "res")
        site = f"{SYMBOLS[module]}<sub>{at}</sub>" if at >= 0 else "before layer 0"
        if not isinstance(source, str):
            _box(figure, (0.0, lane), site, "no match" if at >= 0 else "nothing", "", GREY)
            continue
        about, link = labels.get(source, ""), links.get(source, "")
        _box(figure, (0.0, lane), site, source, about, COLOURS[module], link)
        colour, dash = (COLOURS[module], "solid") if score > null else (GREY, "dot")
        figure.add_scatter(
            x=[0.22, 0.78],
            y=[lane, 0.0],
            name=f"{source} → {feature}",
            mode="lines",
            line={"width": 1 + 9 * max(score, 0.0), "color": colour, "dash": dash},
            hoverinfo="skip",
            showlegend=False,
        )
        note = {"text": f"<b>{score:.2f}</b> (chance {null:.2f})", "font_color": colour}
        figure.add_annotation(x=0.5, y=lane / 2, bgcolor="white", showarrow=False, **note)
    figure.update_xaxes(range=[-0.3, 1.3], visible=False)
    figure.update_yaxes(range=[-1.45, 1.45], visible=False)
    return _with_line_legend(figure)


def flow_picture(
    graph: FlowGraph,
    subtitle: str,
    values: Mapping[str, float] | None = None,
    named: str = "value",
) -> go.Figure:
    """A flow graph through the layers, a lane for each module (the paper's Figures 2, 20 and 21).

    A line is as thick as its cosine is high, and a node has the colour of its class; a forward
    edge, which the earlier feature chose, bears an open arrow. The caption of a node that has a
    page leads there.

    Args:
        graph: The graph.
        subtitle: Suite and choices.
        values: A value for some features, such as the strength that a plan steers them with or the
            effect that they have: nodes then have the colour of their value, and those without one
            are empty.
        named: What the values are.

    Raises:
        ValueError: If values are given and no node has one.
    """
    layout = flow_layout(graph)
    margin = MARGIN | {"b": 100}
    height = round(layout.height) + margin["t"] + margin["b"]
    figure = dress(go.Figure(), layout.title, subtitle, height)
    steps = layout.edges.assign(width=layout.edges["width"].mul(4).round().div(4))
    for (above, module, width), part in steps.groupby(["above", "module", "width"]):
        figure.add_scatter(
            x=_with_gaps(part["x0"], part["x1"]),
            y=_with_gaps(part["y0"], part["y1"]),
            mode="lines",
            line={
                "width": width,
                "color": COLOURS[module] if above else GREY,
                "dash": "solid" if above else "dot",
            },
            hoverinfo="skip",
            showlegend=False,
        )
    for direction, part in layout.edges.groupby("direction"):
        figure.add_scatter(
            x=part["x"],
            y=part["y"],
            name="chosen by the earlier feature" if direction == "forward" else None,
            mode="markers",
            marker={
                "symbol": "triangle-right",
                "size": 0.7 * layout.nodes["size"].min(),
                "color": "white",
                "line": {"color": INK, "width": 1},
                "opacity": float(direction == "forward"),
            },
            hovertext=part["hover"].map(escape),
            hoverinfo="text",
            showlegend=direction == "forward",
            legendrank=2000,
        )
    if values is None:
        for kind, colour in NODE_COLOURS.items():
            part = layout.nodes[layout.nodes["kind"] == kind]
            shown = kind in CLASS_COLOURS
            _add_nodes(figure, layout, part, {"color": colour}, kind, showlegend=shown)
    else:
        _add_valued_nodes(figure, layout, values, named)
    layers = sorted(layout.nodes["layer"].unique())
    figure.update_xaxes(title="layer", tickvals=layers, range=layout.across)
    lanes = {"tickvals": [*layout.lanes.values()], "ticktext": [NAMES[m] for m in layout.lanes]}
    figure.update_yaxes(range=layout.up, showgrid=False, **lanes)
    below = {"x": 0, "xanchor": "left", "y": -60 / layout.height, "yanchor": "top"}
    figure.update_layout(
        width=round(layout.width) + margin["l"] + margin["r"],
        margin=margin,
        legend=below | {"itemsizing": "constant"},
    )
    return _with_line_legend(figure)


def _add_nodes(
    figure: go.Figure,
    layout: Layout,
    part: pd.DataFrame,
    marker: dict[str, Any],
    name: str,
    showlegend: bool = False,
) -> None:
    ring = part["is_seed"].map({True: INK, False: "white"})
    look = {"size": part["size"], "line": {"color": ring, "width": part["ring"]}, "opacity": 1}
    figure.add_scatter(
        x=part["x"],
        y=part["y"],
        name=name,
        mode="markers+text",
        marker=look | marker,
        text=[linked(*pair) for pair in zip(part["caption"], part["link"], strict=True)],
        textposition=part["caption_at"],
        textfont={"size": layout.font, "shadow": HALO},
        hovertext=part["hover"].map(escape),
        hoverinfo="text",
        showlegend=showlegend,
    )


def _add_valued_nodes(
    figure: go.Figure, layout: Layout, values: Mapping[str, float], named: str
) -> None:
    value = layout.nodes["feature"].map(dict(values)).astype(float)
    known = value.notna()
    if not known.any():
        raise ValueError(f"none of {len(values)} values is of a node of this graph")
    empty = {"color": "white", "line": {"color": GREY, "width": 1.5}}
    _add_nodes(figure, layout, layout.nodes[~known], empty, f"no {named}", bool((~known).any()))
    part, value = layout.nodes[known], value[known]
    hover = [f"{text}\n{named} {x:.3g}" for text, x in zip(part["hover"], value, strict=True)]
    most = max(value.abs().max(), 1e-9)
    low, high = -most * (value.min() < 0), most * (value.max() > 0)
    scale = {
        "color": value,
        "colorscale": "RdBu" if low and high else "Reds_r" if low else "Blues",
        "cmin": low,
        "cmax": high or most * (not low),
        "colorbar": {"title": escape(named), "thickness": 12},
        "line": {"color": INK, "width": part["is_seed"].map({True: 2.5, False: 1.0})},
    }
    _add_nodes(figure, layout, part.assign(hover=hover), scale, named)


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


def scores_by_layer(scores: pd.DataFrame, subtitle: str) -> go.Figure:
    """s(R), s(M) and s(A) of all features (as `matching.scores` gives), beside chance.

    Boxes are quartiles, whiskers the 5 % and 95 % quantiles.
    """
    titles = [f"s({symbol})" for symbol in SYMBOLS.values()]
    figure = make_subplots(1, 3, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    dress(figure, "Best cosine of every residual feature, by layer", subtitle, 420)
    for column, module in enumerate(SYMBOLS, 1):
        if f"s_{module}" not in scores:
            continue
        known = scores.dropna(subset=[f"s_{module}"]).groupby("layer")
        table = known[f"s_{module}"].quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
        parts = zip(("lowerfence", "q1", "median", "q3", "upperfence"), table, strict=True)
        box = {part: table[quantile] for part, quantile in parts}
        box |= {"name": titles[column - 1], "marker_color": COLOURS[module], "showlegend": False}
        figure.add_box(x=table.index, **box, row=1, col=column)
        figure.add_scatter(
            x=table.index, y=known[f"null_{module}"].first(), name="99.9 % of chance lies below",
            mode="markers", showlegend=column == 1, row=1, col=column,
            marker={"symbol": "line-ew", "size": 18, "line": {"width": 3, "color": INK}},
        )  # fmt: skip
    figure.update_layout(margin_t=125, legend_y=1.1).update_xaxes(title="layer", dtick=step(scores))
    return figure.update_yaxes(title="cosine", col=1)


def share_above_null(summary: pd.DataFrame, subtitle: str) -> go.Figure:
    """Shares by layer (`layer`, `above_res`, `above_mlp`, `above_att`) of scores above chance."""
    title = "Share of features matched better than 99.9 % of chance"
    figure = dress(go.Figure(), title, subtitle, 380)
    for module, mark in zip(SYMBOLS, ("circle", "diamond", "square"), strict=True):
        if f"above_{module}" in summary:
            look = {"line_color": COLOURS[module], "marker": {"symbol": mark, "size": 9}}
            share = summary[f"above_{module}"]
            figure.add_scatter(x=summary["layer"], y=share, name=f"s({SYMBOLS[module]})", **look)
    line = {"line": {"dash": "dot", "color": INK}, "annotation_text": "by chance 0.1 %"}
    figure.add_hline(y=0.001, annotation_position="top right", **line)
    figure.update_xaxes(title="layer", dtick=step(summary))
    return figure.update_yaxes(title="share of features", tickformat=".0%", range=[-0.03, 1.03])


def classes_by_layer(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """The shares of the four classes by layer (as `lifespans.flow_by_layer` gives), as bars."""
    figure = dress(go.Figure(), "What features are, by layer", subtitle, 380)
    for name, colour in CLASS_COLOURS.items():
        hover = "layer %{x}: %{y:.1%}<extra>%{fullData.name}</extra>"
        look = {"marker_color": colour, "hovertemplate": hover}
        figure.add_bar(x=table["layer"], y=table[name], name=name, **look)
    figure.update_layout(barmode="stack", bargap=0.15, legend_traceorder="normal")
    figure.update_xaxes(title="layer", dtick=step(table))
    return figure.update_yaxes(title="share of features", tickformat=".0%", range=[0, 1])


def births_and_deaths(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """The shares of features that are born at each layer, by module, and that end there.

    The table is as `lifespans.flow_by_layer` gives.
    """
    figure = dress(go.Figure(), "Births and deaths of features, by layer", subtitle, 380)
    looks = {
        "born_mlp": ("born of the MLP", COLOURS["mlp"], "diamond", "solid"),
        "born_att": ("born of attention", COLOURS["att"], "square", "solid"),
        "dies": ("no match in the next layer", INK, "x", "dash"),
    }
    for column, (name, colour, mark, dash) in looks.items():
        look = {"line": {"color": colour, "dash": dash}, "marker": {"symbol": mark, "size": 9}}
        figure.add_scatter(x=table["layer"], y=table[column], name=name, cliponaxis=False, **look)
    figure.update_xaxes(title="layer", dtick=step(table))
    return figure.update_yaxes(title="share of features", tickformat=".1%", rangemode="tozero")


def lifespan_map(lifespans: pd.DataFrame, subtitle: str) -> go.Figure:
    """How many features begin at a layer and end at another, in colours by the logarithm.

    The table is as `lifespans.lifespans` gives; a run of layers is counted once, where it begins.
    """
    begun = lifespans[lifespans["layer"] == lifespans["first"]]
    layers = sorted(lifespans["layer"].unique())
    counts = begun.groupby(["first", "last"]).size().unstack().reindex(layers, columns=layers)
    powers = range(int(np.log10(counts.max(axis=None))) + 1)
    figure = dress(go.Figure(), "Where features begin and where they end", subtitle, 500)
    figure.add_heatmap(
        x=layers,
        y=layers,
        z=np.log10(counts),
        text=counts.map("{:.0f}".format).replace("nan", ""),
        texttemplate="%{text}" if len(layers) <= 16 else None,
        hovertemplate="%{text} features begin at layer %{y} and end at layer %{x}<extra></extra>",
        hoverongaps=False,
        colorscale=[[0, "#D6E9F5"], [1, COLOURS["res"]]],
        zmin=0,
        colorbar={"title": "features", "tickvals": [*powers], "ticktext": [10**p for p in powers]},
    )
    figure.update_xaxes(title="last layer", dtick=step(lifespans))
    figure.update_yaxes(title="first layer", dtick=step(lifespans), showgrid=False)
    return figure.update_yaxes(autorange="reversed")


def agreement_map(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """How often two methods choose the same best source (as `matching.agreement` gives)."""
    modules = [module for module in SYMBOLS if module in set(table["module"])]
    names = list(dict.fromkeys([*table["first"], *table["second"]]))
    titles = [f"from {SYMBOLS[module]} ({NAMES[module]})" for module in modules]
    figure = make_subplots(1, len(modules), shared_yaxes=True, subplot_titles=titles)
    dress(figure, "How often two methods choose the same source", subtitle, 170 + 60 * len(names))
    for column, module in enumerate(modules, 1):
        part = table[table["module"] == module]
        half = part.pivot(index="first", columns="second", values="same")
        same = half.combine_first(half.T).reindex(names, columns=names)
        figure.add_heatmap(
            x=names, y=names, z=same, texttemplate="%{z:.0%}", hoverongaps=False,
            hovertemplate="%{y} and %{x}: %{z:.1%} the same<extra></extra>",
            coloraxis="coloraxis", row=1, col=column,
        )  # fmt: skip
    white_to_blue = [[0, "white"], [1, COLOURS["res"]]]
    bar = {"title": "the same", "tickformat": ".0%"}
    figure.update_layout(
        margin_t=125, coloraxis={"cmin": 0, "cmax": 1, "colorscale": white_to_blue, "colorbar": bar}
    )
    figure.update_xaxes(tickangle=-40, automargin=True)
    return figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)


def against_chance(cosines: pd.DataFrame, null: float, title: str, subtitle: str) -> go.Figure:
    """Histograms of the best cosines `found` and by `chance`; a line marks the null's quantile."""
    figure = dress(go.Figure(), title, subtitle, 360)
    bins = {"start": 0, "end": 1, "size": 0.02}
    for column, colour in (("chance", GREY), ("found", COLOURS["res"])):
        look = {"name": column, "marker_color": colour, "opacity": 0.7, "xbins": bins}
        figure.add_histogram(x=cosines[column].round(4), **look)
    line = {"line": {"dash": "dot", "color": INK}, "annotation_text": "99.9 % of chance below"}
    figure.add_vline(x=null, annotation_position="top right", **line)
    figure.update_layout(barmode="overlay", yaxis_title="features")
    return figure.update_xaxes(title="best cosine", range=[0, 1])


def before_after(table: pd.DataFrame, title: str, value: str, subtitle: str) -> go.Figure:
    """Bars that compare conditions: `what` stands on the axis, `value` is a bar's height.

    Raises:
        ValueError: If there are more conditions than colours.
    """
    figure = dress(go.Figure(), title, subtitle, 400)
    names = list(dict.fromkeys(table["condition"]))
    if len(names) > len(CONDITIONS):
        raise ValueError(f"{len(names)} conditions: expected at most {len(CONDITIONS)}")
    for name, colour in zip(names, CONDITIONS, strict=False):
        part = table[table["condition"] == name]
        figure.add_bar(
            x=[escape(str(what)) for what in part["what"]],
            y=part["value"],
            name=escape(str(name)),
            marker={"color": colour, "line": {"color": INK, "width": 0.5}},
            text=[f"{number:.{2 if abs(number) < 1 else 3}g}" for number in part["value"]],
            textposition="outside",
            textfont={"size": 10},
            hovertemplate="%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(barmode="group", bargap=0.3, yaxis_title=value)
    return figure.update_xaxes(type="category")


def linked(text: str, address: str) -> str:
    """Text that plotly shows as it is, and that leads to a page if there is one."""
    text = escape(text)
    if not text or not address:
        return text
    return f'<a href="{html.escape(address)}" target="_blank">{text}</a>'


def _with_line_legend(figure: go.Figure) -> go.Figure:
    for name, color, dash in (("above chance", INK, "solid"), ("not above", GREY, "dot")):
        line = {"color": color, "dash": dash, "width": 3}
        figure.add_scatter(x=[None], y=[None], mode="lines", name=name, line=line)
    return figure


def _class(row: pd.Series[Any]) -> str:
    """A node's class with the scores that its predecessors have to exceed for it."""
    if not isinstance(row["class"], str):
        return ""
    limits = [row[f"high_{module}"] for module in MODULES]
    shown = " / ".join("–" if np.isnan(x) else f"{x:.2f}".replace("0.", ".") for x in limits)
    return f"{row['class']} (high above {shown})"


def _box(
    figure: go.Figure,
    place: tuple[float, float],
    site: str,
    feature: str,
    text: str,
    colour: str,
    link: str = "",
) -> None:
    lines = [part for line in text.split("\n") for part in wrap(line, 40)]
    figure.add_annotation(
        x=place[0],
        y=place[1],
        text="<br>".join([f"<b>{site}</b>  {linked(feature, link)}", *map(escape, lines[:4])]),
        hovertext=escape(f"{feature}\n{text}".rstrip("\n")),
        showarrow=False,
        width=245,
        align="left",
        bgcolor=PALE,
        bordercolor=colour,
        borderwidth=2,
        borderpad=7,
    )


def _with_gaps(starts: pd.Series[float], ends: pd.Series[float]) -> list[float | None]:
    return [place for pair in zip(starts, ends, strict=True) for place in (*pair, None)]
