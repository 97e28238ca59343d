"""One function a figure: a table in, a plotly figure out. Nothing is computed or loaded here.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; what is no higher than
chance is grey and dotted, so that no colour is needed to see it. Every figure has a subtitle, for
the suite and the choices; labels are plain text, their lines parted by newlines.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from textwrap import shorten, wrap
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flowhelpers.features import parse_feature

if TYPE_CHECKING:
    import pandas as pd

COLOURS = {"res": "#0072B2", "mlp": "#D55E00", "att": "#009E73"}
SYMBOLS = {"res": "R", "mlp": "M", "att": "A"}
LANES = {"att": 1.0, "res": 0.0, "mlp": -1.0}
LANE_NAMES = ["attention", "stream", "MLP"]
GREY, PALE, INK = "#8C8C8C", "#F4F5F7", "#222222"
CONDITIONS = (GREY, "#0072B2", "#E69F00", "#CC79A7", "#56B4E9")
AXIS = {"showgrid": False, "zeroline": False, "linecolor": "#BBBBBB", "ticks": "outside"}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "title": {"x": 0.01, "xanchor": "left", "subtitle": {"font": {"size": 12, "color": GREY}}},
        "margin": {"l": 75, "r": 20, "t": 90, "b": 50},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "white", "align": "left", "font": {"color": INK}},
        "xaxis": AXIS,
        "yaxis": AXIS | {"gridcolor": "#E6E6E6", "showgrid": True},
    }
)


def schematic(
    flow: pd.DataFrame, feature: str, labels: Mapping[str, str], subtitle: str
) -> go.Figure:
    """The paper's Figure 1 for one residual feature of a flow (as `flow.trace` gives).

    Raises:
        ValueError: If the feature is not in the flow.
    """
    rows = flow[flow["feature"] == feature]
    if rows.empty:
        raise ValueError(f"{feature} is not in this flow: it has {', '.join(flow['feature'])}")
    row, layer = rows.iloc[0], parse_feature(feature).layer
    figure = _dress(go.Figure(), f"Where {feature} may come from", subtitle, 420)
    _box(figure, (1.0, 0.0), f"R<sub>{layer}</sub>", feature, labels, COLOURS["res"])
    for module, lane in LANES.items():
        source, score, null = (row.get(f"{column}_{module}") for column in ("from", "s", "null"))
        at = layer - (module == "res")
        site = f"{SYMBOLS[module]}<sub>{at}</sub>" if at >= 0 else "before layer 0"
        if not isinstance(source, str):
            _box(figure, (0.0, lane), site, "no match" if at >= 0 else "nothing", labels, GREY)
            continue
        _box(figure, (0.0, lane), site, source, labels, COLOURS[module])
        line = _edge((0.22, lane), (0.78, 0.0), f"{source} → {feature}", score, null, module)
        note = {"text": f"<b>{score:.2f}</b> (chance {null:.2f})", "font_color": line.line.color}
        note |= {"bgcolor": "white", "showarrow": False}
        figure.add_trace(line).add_annotation(x=0.5, y=lane / 2, **note)
    figure.update_xaxes(range=[-0.3, 1.3], visible=False)
    figure.update_yaxes(range=[-1.45, 1.45], visible=False)
    return _with_line_legend(figure)


def flow_chain(flow: pd.DataFrame, labels: Mapping[str, str], subtitle: str) -> go.Figure:
    """A flow (as `flow.trace` gives) through the layers, in lanes for the three modules."""
    seed = flow.loc[flow["is_seed"], "feature"].iloc[0]
    figure = _dress(go.Figure(), f"The flow through {seed}", subtitle, 430)
    nodes: list[tuple[str, str, float]] = []
    for row in flow.to_dict("records"):
        feature = str(row["feature"])
        layer = float(parse_feature(feature).layer)
        nodes.append((feature, "res", layer))
        sources = {"res": (row["previous"], row["s_previous"], layer - 1)}
        sources |= {m: (row[f"from_{m}"], row[f"s_{m}"], layer - 0.4) for m in ("mlp", "att")}
        for module, (source, score, x) in sources.items():
            if isinstance(source, str):
                ends, null = ((x, LANES[module]), (layer, 0.0)), row[f"null_{module}"]
                figure.add_trace(_edge(*ends, f"{source} → {feature}", score, null, module))
                nodes += [(source, module, x)] if module != "res" else []
    places = {"att": "top center", "res": "bottom right", "mlp": "bottom center"}
    figure.add_scatter(
        x=[x for _, _, x in nodes],
        y=[LANES[module] for _, module, _ in nodes],
        mode="markers+text",
        marker={
            "color": [COLOURS[module] for _, module, _ in nodes],
            "size": [24 if name == seed else 14 for name, _, _ in nodes],
            "line": {
                "color": [INK if name == seed else "white" for name, _, _ in nodes],
                "width": 2,
            },
            "opacity": 1,
        },
        text=[_under(name, labels, len(flow)) for name, _, _ in nodes],
        textposition=[places[module] for _, module, _ in nodes],
        textfont={"size": 10},
        hovertext=[_lines(f"{name}\n{labels.get(name, '')}") for name, _, _ in nodes],
        hoverinfo="text",
        showlegend=False,
    )
    layers = [x for _, module, x in nodes if module == "res"]
    figure.update_xaxes(title="layer", dtick=1, range=[layers[0] - 0.9, layers[-1] + 0.9])
    figure.update_yaxes(range=[-1.5, 1.5], tickvals=[*LANES.values()], ticktext=LANE_NAMES)
    return _with_line_legend(figure.update_yaxes(showgrid=False))


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
    figure = _dress(go.Figure(), title, subtitle, 110 + 30 * len(lines))
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
    _dress(figure, "Best cosine of every residual feature, by layer", subtitle, 420)
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
    figure.update_layout(margin_t=125, legend_y=1.1).update_xaxes(
        title="layer", dtick=_step(scores)
    )
    return figure.update_yaxes(title="cosine", col=1)


def share_above_null(summary: pd.DataFrame, subtitle: str) -> go.Figure:
    """Shares by layer (`layer`, `above_res`, `above_mlp`, `above_att`) of scores above chance."""
    title = "Share of features matched better than 99.9 % of chance"
    figure = _dress(go.Figure(), title, subtitle, 380)
    for module, mark in zip(SYMBOLS, ("circle", "diamond", "square"), strict=True):
        if f"above_{module}" in summary:
            look = {"line_color": COLOURS[module], "marker": {"symbol": mark, "size": 9}}
            share = summary[f"above_{module}"]
            figure.add_scatter(x=summary["layer"], y=share, name=f"s({SYMBOLS[module]})", **look)
    line = {"line": {"dash": "dot", "color": INK}, "annotation_text": "by chance 0.1 %"}
    figure.add_hline(y=0.001, annotation_position="top right", **line)
    figure.update_xaxes(title="layer", dtick=_step(summary))
    return figure.update_yaxes(title="share of features", tickformat=".0%", range=[-0.03, 1.03])


def against_chance(cosines: pd.DataFrame, null: float, title: str, subtitle: str) -> go.Figure:
    """Histograms of the best cosines `found` and by `chance`; a line marks the null's quantile."""
    figure = _dress(go.Figure(), title, subtitle, 360)
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
    figure = _dress(go.Figure(), title, subtitle, 400)
    names = list(dict.fromkeys(table["condition"]))
    if len(names) > len(CONDITIONS):
        raise ValueError(f"{len(names)} conditions: expected at most {len(CONDITIONS)}")
    for name, colour in zip(names, CONDITIONS, strict=False):
        part = table[table["condition"] == name]
        figure.add_bar(
            x=[_lines(str(what)) for what in part["what"]],
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


def escape(text: str) -> str:
    """Text that plotly shows as it is; it would draw `<b>` bold and knows no entity for quotes."""
    return html.escape(text, quote=False)


def _dress(figure: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    heading = {"text": escape(title), "subtitle": {"text": escape(subtitle)}}
    return figure.update_layout(template=TEMPLATE, title=heading, height=height)


def _edge(
    start: tuple[float, float],
    end: tuple[float, float],
    name: str,
    score: float,
    null: float,
    module: str,
) -> go.Scatter:
    """A line as thick as the cosine is high, in colour and unbroken where it is above chance."""
    above = score > null
    side = "above" if above else "not above"
    return go.Scatter(
        x=[start[0], (start[0] + end[0]) / 2, end[0]],
        y=[start[1], (start[1] + end[1]) / 2, end[1]],
        name=name,
        mode="lines",
        line={
            "width": 1 + 9 * max(score, 0.0),
            "color": COLOURS[module] if above else GREY,
            "dash": "solid" if above else "dot",
        },
        hovertext=f"{name}<br>cosine {score:.3f}, {side} chance ({null:.3f})",
        hoverinfo="text",
        showlegend=False,
    )


def _with_line_legend(figure: go.Figure) -> go.Figure:
    for name, color, dash in (("above chance", INK, "solid"), ("not above", GREY, "dot")):
        line = {"color": color, "dash": dash, "width": 3}
        figure.add_scatter(x=[None], y=[None], mode="lines", name=name, line=line)
    return figure


def _box(
    figure: go.Figure,
    place: tuple[float, float],
    site: str,
    feature: str,
    labels: Mapping[str, str],
    colour: str,
) -> None:
    lines = [part for line in labels.get(feature, "").split("\n") for part in wrap(line, 36)]
    figure.add_annotation(
        x=place[0],
        y=place[1],
        text="<br>".join([f"<b>{site}</b>  {feature}", *map(escape, lines[:4])]),
        hovertext=_lines(f"{feature}\n{labels.get(feature, '')}"),
        showarrow=False,
        width=225,
        align="left",
        bgcolor=PALE,
        bordercolor=colour,
        borderwidth=2,
        borderpad=7,
    )


def _under(feature: str, labels: Mapping[str, str], layers: int) -> str:
    """A node's index and, where there is room, the beginning of its label."""
    label = labels.get(feature, "").split("\n")[0].removeprefix("writes ")
    text = shorten(label, 16, placeholder="…") if layers <= 10 else ""
    return feature.rsplit("/", 1)[-1] + (f"<br>{escape(text)}" if text else "")


def _lines(text: str) -> str:
    return "<br>".join(escape(line) for line in text.rstrip("\n").split("\n"))


def _step(table: pd.DataFrame) -> int:
    return 1 if table["layer"].nunique() <= 16 else 4
