"""Figures of flow graphs and of the whole model's flow: tables in, plotly figures out.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; what is no higher than
chance is grey and dotted, so that no colour is needed to see it.
"""

from __future__ import annotations

import html
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.express as px
import plotly.graph_objects as go

from flowhelpers.core.features import MODULES, parse_feature, suggestion
from flowhelpers.core.figures import (
    CLASS_COLOURS,
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
from flowhelpers.flow.layout import flow_layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from flowhelpers.flow.graph import FlowGraph

HALO = ", ".join(f"{x}px {y}px 1px white" for x in (-1, 1) for y in (-1, 1))
PLAIN_LINE = {"mode": "lines", "hoverinfo": "skip", "showlegend": False}
ARROW = {"symbol": "triangle-right", "color": "white", "line": {"color": INK, "width": 1}}
BOX = {"width": 245, "align": "left", "bgcolor": PALE, "borderwidth": 2, "borderpad": 7}
CONDITIONS = (GREY, "#0072B2", "#E69F00", "#CC79A7", "#56B4E9")


def schematic(graph: FlowGraph, feature: str, subtitle: str) -> go.Figure:
    """The paper's Figure 1 for one residual feature of a flow graph, with its class."""
    rows = graph.chain[graph.chain["feature"] == feature]
    if rows.empty:
        hint = suggestion(feature, graph.chain["feature"])
        raise ValueError(f"{feature} is no residual feature of this graph{hint}")
    row, layer = rows.iloc[0], parse_feature(feature).layer
    labels, links = (graph.nodes.set_index("feature")[column] for column in ("label", "link"))
    figure = dress(go.Figure(), f"Where {feature} may come from", subtitle, 420)
    text = "\n".join(filter(None, [_class(row), labels[feature]]))
    _add_box(figure, 1.0, 0.0, f"R<sub>{layer}</sub>", feature, text, COLOURS["res"], row["link"])
    for module, lane in {"att": 1.0, "res": 0.0, "mlp": -1.0}.items():
        source, score, null = (row[f"{column}_{module}"] for column in ("from", "s", "null"))
        at = layer - (module == "res")
        site = f"{SYMBOLS[module]}<sub>{at}</sub>" if at >= 0 else "before layer 0"
        if not isinstance(source, str):
            _add_box(figure, 0.0, lane, site, "no match" if at >= 0 else "nothing", "", GREY)
            continue
        about, link = labels.get(source, ""), links.get(source, "")
        _add_box(figure, 0.0, lane, site, source, about, COLOURS[module], link)
        colour, dash = (COLOURS[module], "solid") if score > null else (GREY, "dot")
        line = {"width": 1 + 9 * max(score, 0.0), "color": colour, "dash": dash}
        ends = {"x": [0.22, 0.78], "y": [lane, 0.0], "name": f"{source} → {feature}"}
        figure.add_scatter(**ends, line=line, **PLAIN_LINE)
        note = {"text": f"<b>{score:.2f}</b> (chance {null:.2f})", "font_color": colour}
        figure.add_annotation(x=0.5, y=lane / 2, bgcolor="white", showarrow=False, **note)
    figure.update_xaxes(range=[-0.3, 1.3], visible=False)
    figure.update_yaxes(range=[-1.45, 1.45], visible=False)
    return _with_line_legend(figure)


def flow_picture(
    graph: FlowGraph, subtitle: str, values: Mapping[str, float] | None = None, named: str = "value"
) -> go.Figure:
    """A flow graph through the layers, a lane for each module (the paper's Figures 2, 20 and 21).

    A line is as thick as its cosine is high, and a node has the colour of its class; a forward
    edge, which the earlier feature chose, bears an open arrow. The caption of a node that has a
    page leads there. With `values` of some features, which are `named` so, nodes have the colour of
    their value, and those without one are empty.
    """
    layout = flow_layout(graph)
    margin = MARGIN | {"b": 100}
    height = round(layout.height) + margin["t"] + margin["b"]
    figure = dress(go.Figure(), layout.title, subtitle, height)
    steps = layout.edges.assign(width=layout.edges["width"].mul(4).round().div(4))
    for (above, colour, width), part in steps.groupby(["above", "colour", "width"]):
        gaps = part.assign(x2=None, y2=None)  # between the lines of one trace
        figure.add_scatter(
            x=gaps[["x0", "x1", "x2"]].to_numpy(object).ravel(),
            y=gaps[["y0", "y1", "y2"]].to_numpy(object).ravel(),
            line={"width": width, "color": colour, "dash": "solid" if above else "dot"},
            **PLAIN_LINE,
        )
    for direction, part in layout.edges.groupby("direction"):
        # Backward edges have a mark that is not seen, for the hover.
        marker = ARROW | {"size": 0.7 * layout.nodes["size"].min()}
        figure.add_scatter(
            x=part["x"], y=part["y"], name="chosen by the earlier feature", mode="markers",
            marker=marker | {"opacity": float(direction == "forward")},
            hovertext=part["hover"].map(escape), hoverinfo="text",
            showlegend=direction == "forward", legendrank=2000,
        )  # fmt: skip
    if values is None:
        for kind, colour in (CLASS_COLOURS | COLOURS).items():
            part = layout.nodes[layout.nodes["kind"] == kind]
            _add_nodes(figure, part, {"color": colour}, kind, kind in CLASS_COLOURS)
    else:
        _add_valued_nodes(figure, layout.nodes, values, named)
    caption = {"size": layout.font, "shadow": HALO}
    figure.update_traces(textfont=caption, selector={"mode": "markers+text"})
    layers = sorted(layout.nodes["layer"].unique())
    figure.update_xaxes(title="layer", tickvals=layers, range=layout.across)
    lanes = {"tickvals": [*layout.lanes.values()], "ticktext": [NAMES[m] for m in layout.lanes]}
    figure.update_yaxes(range=layout.up, showgrid=False, **lanes)
    below = {"x": 0, "xanchor": "left", "y": -60 / layout.height, "yanchor": "top"}
    width = round(layout.width) + margin["l"] + margin["r"]
    figure.update_layout(width=width, margin=margin, legend=below | {"itemsizing": "constant"})
    return _with_line_legend(figure)


def _add_nodes(
    figure: go.Figure, part: pd.DataFrame, marker: dict[str, Any], name: str, showlegend: bool
) -> None:
    ring = part["is_seed"].map({True: INK, False: "white"})
    look = {"size": part["size"], "line": {"color": ring, "width": part["ring"]}, "opacity": 1}
    figure.add_scatter(
        x=part["x"], y=part["y"], name=name, mode="markers+text", marker=look | marker,
        text=[_linked(*pair) for pair in zip(part["caption"], part["link"], strict=True)],
        textposition=part["caption_at"], hovertext=part["hover"].map(escape), hoverinfo="text",
        showlegend=showlegend,
    )  # fmt: skip


def _add_valued_nodes(
    figure: go.Figure, nodes: pd.DataFrame, values: Mapping[str, float], named: str
) -> None:
    nodes = nodes.assign(value=nodes["feature"].map(dict(values)).astype(float))
    part, others = nodes[nodes["value"].notna()], nodes[nodes["value"].isna()]
    if part.empty:
        raise ValueError(f"none of {len(values)} values is of a node of this graph")
    empty = {"color": "white", "line": {"color": GREY, "width": 1.5}}
    _add_nodes(figure, others, empty, f"no {named}", not others.empty)
    hover = part["hover"] + part["value"].map(("\n" + named + " {:.3g}").format)
    scale = {"color": part["value"], "colorscale": "RdBu", "cmid": 0}  # red is negative
    scale["colorbar"] = {"title": escape(named), "thickness": 12}
    scale["line"] = {"color": INK, "width": part["is_seed"].map({True: 2.5, False: 1.0})}
    _add_nodes(figure, part.assign(hover=hover), scale, named, False)


def births_and_deaths(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """The shares of features born at each layer, by module, and ended there (`flow_by_layer`)."""
    fates = {"born_mlp": "born of the MLP", "born_att": "born of attention"}
    fates |= {"dies": "no match in the next layer"}
    shares = table.rename(columns=fates).melt("layer", [*fates.values()], "fate", "share")
    series = dict.fromkeys(["color", "symbol", "line_dash"], "fate")
    looks = {"color_discrete_sequence": [COLOURS["mlp"], COLOURS["att"], INK]}
    names = {"share": "share of features", "fate": ""}
    figure = px.line(shares, x="layer", y="share", labels=names, **series, **looks)
    dress(figure, "Births and deaths of features, by layer", subtitle, 380)
    figure.update_xaxes(dtick=step(table)).update_traces(marker_size=9, cliponaxis=False)
    return figure.update_yaxes(tickformat=".1%", rangemode="tozero")


def lifespan_map(lifespans: pd.DataFrame, subtitle: str) -> go.Figure:
    """How many features begin at a layer and end at another, in colours by the logarithm.

    The table is as `feature_lifespans` gives; a run of layers is counted once, where it begins.
    """
    begun = lifespans[lifespans["layer"] == lifespans["first"]]
    layers = sorted(lifespans["layer"].unique())
    counts = begun.groupby(["first", "last"]).size().unstack().reindex(layers, columns=layers)
    powers = range(int(np.log10(counts.max(axis=None))) + 1)
    names = {"x": "last layer", "y": "first layer", "color": "features"}
    colours = ["#D6E9F5", COLOURS["res"]]
    figure = px.imshow(np.log10(counts), labels=names, color_continuous_scale=colours, zmin=0)
    dress(figure, "Where features begin and where they end", subtitle, 500)
    figure.update_traces(
        text=counts.map("{:.0f}".format).replace("nan", ""),
        texttemplate="%{text}" if len(layers) <= 16 else None,
        hovertemplate="%{text} features begin at layer %{y} and end at layer %{x}<extra></extra>",
        hoverongaps=False,
    )
    ticks = {"tickvals": [*powers], "ticktext": [10**power for power in powers]}
    figure.update_layout(coloraxis_colorbar=ticks)
    figure.update_xaxes(dtick=step(lifespans), constrain="domain")
    return figure.update_yaxes(dtick=step(lifespans), showgrid=False)


def before_after(table: pd.DataFrame, title: str, value: str, subtitle: str) -> go.Figure:
    """Bars that compare conditions: `what` stands on the axis, `value` is a bar's height."""
    shown = table.assign(**{c: table[c].astype(str).map(escape) for c in ("what", "condition")})
    names = {"value": value, "what": "", "condition": ""}
    looks = {"barmode": "group", "text_auto": ".3g", "color_discrete_sequence": CONDITIONS}
    figure = px.bar(shown, x="what", y="value", color="condition", labels=names, **looks)
    figure.update_traces(textposition="outside", marker_line={"color": INK, "width": 0.5})
    return dress(figure, title, subtitle, 400).update_xaxes(type="category")


def _linked(text: str, address: str) -> str:
    """Text that plotly shows as it is, and that leads to a page if there is one."""
    link = f'<a href="{html.escape(address)}" target="_blank">{escape(text)}</a>'
    return link if text and address else escape(text)


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


def _add_box(
    figure: go.Figure, x: float, y: float, site: str, feature: str, text: str, colour: str, link=""
) -> None:
    lines = [part for line in text.split("\n") for part in wrap(line, 40)]
    shown = "<br>".join([f"<b>{site}</b>  {_linked(feature, link)}", *map(escape, lines[:4])])
    hover = {"hovertext": escape(f"{feature}\n{text}".rstrip("\n")), "showarrow": False}
    figure.add_annotation(x=x, y=y, text=shown, bordercolor=colour, **hover, **BOX)
