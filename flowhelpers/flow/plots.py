"""Figures of flow graphs and of the whole model's flow: tables in, plotly figures out."""

from __future__ import annotations

import html
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import plotly.express as px
import plotly.graph_objects as go

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
from flowhelpers.flow.layout import FONT, flow_layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from flowhelpers.flow.graph import FlowGraph

HALO = ", ".join(f"{x}px {y}px 2px white" for x in (-2, 0, 2) for y in (-2, 0, 2))
RIGHT = 45  # pixels for the captions of the last layer
BOX = {"width": 245, "align": "left", "bgcolor": PALE, "borderwidth": 2, "borderpad": 7}
CONDITIONS = (GREY, "#0072B2", "#E69F00", "#CC79A7", "#56B4E9")


def schematic(graph: FlowGraph, feature: str, subtitle: str) -> go.Figure:
    """The paper's Figure 1 for one residual feature of a flow graph, with its class."""
    row = graph.chain.set_index("feature").loc[feature]
    labels = graph.nodes.set_index("feature")["label"]
    figure = dress(go.Figure(), f"Where {feature} may come from", subtitle, 420)
    kind = row["class"] if isinstance(row["class"], str) else ""
    _add_box(figure, 1.0, 0.0, "res", feature, "\n".join(filter(None, [kind, labels[feature]])))
    for module, y in {"att": 1.0, "res": 0.0, "mlp": -1.0}.items():
        source, score, null = (row[f"{column}_{module}"] for column in ("from", "s", "null"))
        if not isinstance(source, str):
            _add_box(figure, 0.0, y, module, "no match", "")
            continue
        _add_box(figure, 0.0, y, module, source, labels.get(source, ""))
        colour, dash = (COLOURS[module], "solid") if score > null else (GREY, "dot")
        line = {"width": 1 + 9 * max(score, 0.0), "color": colour, "dash": dash}
        ends = {"x0": 0.22, "x1": 0.78, "y0": y, "y1": 0.0, "name": f"{source} → {feature}"}
        figure.add_shape(type="line", line=line, **ends)
        note = {"text": f"<b>{score:.2f}</b> (chance {null:.2f})", "font_color": colour}
        figure.add_annotation(x=0.5, y=y / 2, bgcolor="white", showarrow=False, **note)
    figure.update_xaxes(range=[-0.3, 1.3], visible=False)
    return figure.update_yaxes(range=[-1.45, 1.45], visible=False)


def _add_box(figure: go.Figure, x: float, y: float, module: str, feature: str, text: str) -> None:
    lines = [part for line in text.split("\n") for part in wrap(line, 40)]
    shown = "<br>".join([f"<b>{SYMBOLS[module]}</b>  {feature}", *map(escape, lines[:4])])
    place = {"x": x, "y": y, "showarrow": False, "hovertext": escape(text)}
    figure.add_annotation(text=shown, bordercolor=COLOURS[module], **place, **BOX)


def flow_picture(
    graph: FlowGraph,
    subtitle: str,
    values: Mapping[str, float] | None = None,
    named: str = "value",
    *,
    title: str | None = None,
    by_chance: bool | None = None,
) -> go.Figure:
    """A flow graph through the layers, a lane for each module (the paper's Figures 2, 20 and 21).

    A line is thicker if its cosine is higher, and dotted if its score is not above chance. A
    forward edge, which the earlier feature chose, has an open arrow. A node has the colour and the
    mark of its class, and its caption links to its page.

    Args:
        values: Of features, called `named` in the legend: nodes have the colour of their value, and
            those without a value are empty.
        title: In place of one that names the seeds.
        by_chance: Whether what is no higher than chance is drawn; by default it is, but for a graph
            of five seeds or more.
    """
    layout = flow_layout(graph, title, by_chance, values or ())
    nodes, edges = layout.nodes, layout.edges
    if left := len(graph.edges) - len(edges):
        subtitle += f" · {left} of {len(graph.edges)} matches, no higher than chance, are left out"
    figure = dress(go.Figure(), layout.title, subtitle, round(layout.height) + MARGIN["t"] + 100)
    ends = edges[["x0", "x1", "y0", "y1"]].to_dict("records")
    lines = edges.rename(columns={"colour": "color"})[["width", "color", "dash"]].to_dict("records")
    look = {"type": "line", "layer": "below"}
    shapes = [look | end | {"line": line} for end, line in zip(ends, lines, strict=True)]
    figure.update_layout(shapes=shapes)
    is_forward = edges["direction"] == "forward"
    arrow = {"symbol": "triangle-right", "color": "white", "line": {"color": INK, "width": 1}}
    figure.add_scatter(  # backward edges have a mark that is not seen, for the hover
        x=edges["x"], y=edges["y"], name="chosen by the earlier feature", mode="markers",
        marker=arrow | {"size": 0.7 * nodes["size"].min(), "opacity": is_forward.astype(float)},
        hovertext=edges["hover"].map(escape), hoverinfo="text",
        showlegend=bool(is_forward.any()), legendrank=2000,
    )  # fmt: skip
    if values is None:
        for kind, part in nodes.groupby("kind"):
            _add_nodes(
                figure, part, NAMES.get(str(kind)) or str(kind), color=part["colour"].iloc[0]
            )
    else:
        value = nodes["feature"].map(dict(values)).astype(float)
        if value.isna().all():
            raise ValueError(f"none of {len(values)} values is of a node of this graph")
        nodes["hover"] += value.map(f"\n{named}: {{:.3g}}".format).where(value.notna(), "")
        empty = nodes[value.isna()].assign(ring=GREY)
        _add_nodes(figure, empty, f"no {named}", color="white")
        bar = {"title": escape(named), "thickness": 12}
        scale = {"colorscale": "RdBu", "cmid": 0, "colorbar": bar}  # red is negative
        valued = nodes[value.notna()].assign(ring=INK)
        _add_nodes(figure, valued, named, color=value.dropna(), **scale)
    caption = {"size": FONT, "shadow": HALO}
    figure.update_traces(textfont=caption, cliponaxis=False, selector={"mode": "markers+text"})
    ticks = {"tickvals": [*layout.layers.values()], "ticktext": [*layout.layers]}
    figure.update_xaxes(title="layer", range=[0, layout.width], **ticks)
    lanes = {"tickvals": [*layout.lanes.values()], "ticktext": [NAMES[m] for m in layout.lanes]}
    figure.update_yaxes(range=[layout.height, 0], showgrid=False, **lanes)
    below = {"x": 0, "xanchor": "left", "y": -60 / layout.height, "yanchor": "top"}
    width = round(layout.width) + MARGIN["l"] + RIGHT
    return figure.update_layout(width=width, margin_b=100, margin_r=RIGHT, legend=below)


def _add_nodes(figure: go.Figure, part: pd.DataFrame, name: str, **marker: Any) -> None:
    caption, has_page = part["caption"].map(escape), (part["caption"] != "") & (part["link"] != "")
    links = '<a href="' + part["link"].map(html.escape) + '" target="_blank">'
    ring = {"color": part["ring"], "width": part["is_seed"].map({True: 2.5, False: 1.0})}
    figure.add_scatter(
        x=part["x"], y=part["y"], name=name, mode="markers+text",
        marker={"size": part["size"], "symbol": part["mark"], "line": ring, "opacity": 1} | marker,
        text=caption.mask(has_page, links + caption + "</a>"),
        textposition=part["module"].map({"att": "top center"}).fillna("bottom center"),
        hovertext=part["hover"].map(escape), hoverinfo="text",
    )  # fmt: skip


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
    """How many features begin at one layer and end at another (`feature_lifespans`).

    A run is counted once, at its first layer; the colour scale ends at the ninth decile.
    """
    begun = lifespans[lifespans["layer"] == lifespans["first"]]
    layers = sorted(lifespans["layer"].unique())
    counts = begun.groupby(["first", "last"]).size().unstack().reindex(layers, columns=layers)
    looks = {"color_continuous_scale": ["#D6E9F5", COLOURS["res"]], "text_auto": len(layers) <= 16}
    names = {"x": "last layer", "y": "first layer", "color": "features"}
    figure = px.imshow(counts, labels=names, zmin=0, zmax=counts.stack().quantile(0.9), **looks)
    dress(figure, "Where features begin and where they end", subtitle, 500)
    figure.update_traces(hoverongaps=False)
    figure.update_xaxes(dtick=step(lifespans), constrain="domain")
    return figure.update_yaxes(dtick=step(lifespans), showgrid=False)


def before_after(table: pd.DataFrame, title: str, value: str, subtitle: str) -> go.Figure:
    """Bars that compare conditions: `what` is on the y axis, `value` is the length of a bar."""
    shown = table.assign(**{c: table[c].astype(str).map(escape) for c in ("what", "condition")})
    names = {"value": value, "what": "", "condition": ""}
    looks = {"barmode": "group", "text_auto": ".3g", "color_discrete_sequence": CONDITIONS}
    across = {"orientation": "h", "range_x": [0, 1.1 * table["value"].max()]}  # room for numbers
    figure = px.bar(shown, "value", "what", color="condition", labels=names, **looks, **across)
    outside = {"textposition": "outside", "constraintext": "none", "textfont_size": 12}
    figure.update_traces(**outside, cliponaxis=False, marker_line={"color": INK, "width": 0.5})
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return dress(figure, title, subtitle, 180 + 20 * len(table))
