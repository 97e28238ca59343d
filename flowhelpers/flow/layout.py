"""Where the nodes and edges of a flow graph stand in its picture and how they look."""

from dataclasses import dataclass, replace
from statistics import mean
from textwrap import wrap
from typing import TYPE_CHECKING

import networkx
import numpy as np

from flowhelpers.core.figures import (
    CLASS_COLOURS,
    CLASS_MARKS,
    COLOURS,
    GREY,
    INK,
    MODULE_MARKS,
)
from flowhelpers.flow.graph import LANES, NODE_COLUMNS, keep_nodes

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

    from flowhelpers.flow.graph import FlowGraph

BEFORE = 0.4  # a module stands so far before its layer's output
MARK = 0.62  # of the way along an edge; not in the middle, where edges that cross would share it
NARROWEST, TALLEST = 880, 1500  # pixels; rows that would stand higher move together
FONT, LETTER = 12, 6.7  # pixels: size of the captions, and the width of a letter
MANY = 5  # seeds whose graph shows what is above chance alone
NODE_HOVER = [name for name in NODE_COLUMNS[4:] if name != "link" and not name.startswith("null")]
EDGE_HOVER = ["score", "cosine", "null", "null_quantile", "rank", "direction", "mutual", "margin"]


@dataclass(frozen=True)
class Layout:
    """A flow graph's picture in pixels from the upper left: layers to the right, a lane a module.

    Attributes:
        nodes: The graph's nodes with `x`, `y`, `size`, `kind` (the class, or the module of what has
            none), its `colour` and `mark`, the colour of the `ring`, a short `caption` or none, and
            `hover`.
        edges: The graph's edges with their ends `x0`, `y0`, `x1`, `y1`, a place `x`, `y` between
            for a mark, `width`, `colour`, `hover` and `dash`, which is `dot` for what is no higher
            than chance.
        layers: The x of each layer's output.
        lanes: The y of the middle of each module's lane.
    """

    title: str
    nodes: "pd.DataFrame"
    edges: "pd.DataFrame"
    layers: dict[int, float]
    lanes: dict[str, float]
    width: float
    height: float


def above_chance(graph: "FlowGraph", kept: "Iterable[str]" = ()) -> "FlowGraph":
    """The graph without matches no higher than chance, and what they alone joined if not `kept`."""
    edges = graph.edges[graph.edges["score"] > graph.edges["null"]]
    joined = keep_nodes(graph, {*edges["source"], *edges["target"], *kept})
    return replace(joined, edges=edges.reset_index(drop=True))


def flow_layout(
    graph: "FlowGraph",
    title: str | None = None,
    by_chance: bool | None = None,
    kept: "Iterable[str]" = (),
) -> Layout:
    """Places a graph's nodes, so that no two touch, near those that they are joined to.

    Where there are many rows, everything is smaller and captions are left out.

    Args:
        title: In place of one that names the seeds.
        by_chance: Whether matches no higher than chance are drawn; by default they are, but for a
            graph of five seeds or more.
        kept: Features that stay though nothing else joins them.
    """
    if not (len(graph.seeds) < MANY if by_chance is None else by_chance):
        graph = above_chance(graph, kept)
    nodes, edges = graph.nodes.copy(), graph.edges.copy()
    module, layer = nodes["module"], nodes["layer"] - nodes["layer"].min()
    rows = nodes.groupby(["module", "layer"]).size().groupby("module").max()
    lanes, total = {}, 0
    for name in LANES:
        lanes[name] = total + (rows.get(name, 1) + 1) / 2
        total += rows.get(name, 1) + 1
    count, digits = int(layer.max()) + 1, len(str(nodes["index"].max()))
    row_height = float(np.clip(TALLEST / total, 3, 68))
    layer_width = max(NARROWEST / (count + 1.2), LETTER * (digits + 1))
    size = min(14, 0.55 * row_height, 0.45 * layer_width)

    nodes["x"] = layer_width * (layer + 1.3 - BEFORE * (module != "res"))
    nodes["y"] = row_height * (module.map(lanes) + nodes["feature"].map(_heights(graph)))
    nodes["size"] = np.where(nodes["is_seed"], 1.6, 1) * size
    nodes["kind"] = nodes["class"].where(nodes["class"].notna(), module)
    nodes["colour"] = nodes["kind"].map(CLASS_COLOURS | COLOURS)
    nodes["mark"] = nodes["kind"].map(CLASS_MARKS | MODULE_MARKS)
    nodes["ring"] = nodes["is_seed"].map({True: INK, False: "white"})
    nodes["caption"] = nodes["index"].astype(str) if row_height > 30 else ""
    letters = int(layer_width / LETTER)
    if row_height > 64 and letters >= 10:
        label = nodes["label"].str.split("\n").str[0].str.removeprefix("writes ")
        lines = label.map(lambda text: "\n".join(wrap(text, letters, max_lines=2, placeholder="…")))
        nodes["caption"] = (nodes["caption"] + "\n" + lines).str.rstrip()
    nodes["hover"] = _hovers(nodes["feature"], nodes[NODE_HOVER])

    places = nodes.set_index("feature")
    for axis in ("x", "y"):
        edges[f"{axis}0"] = edges["source"].map(places[axis]).astype(float)
        edges[f"{axis}1"] = edges["target"].map(places[axis]).astype(float)
        edges[axis] = edges[f"{axis}0"] + MARK * (edges[f"{axis}1"] - edges[f"{axis}0"])
    above = edges["score"] > edges["null"]
    edges["colour"] = edges["module"].map(COLOURS).where(above, GREY)
    edges["dash"] = above.map({True: "solid", False: "dot"})
    edges["width"] = (0.5 + 8 * edges["cosine"].astype(float).clip(lower=0)) * size / 14
    edges["hover"] = _hovers(edges["source"] + " → " + edges["target"], edges[EDGE_HOVER])

    first = int(nodes["layer"].min())
    more = f" and {len(graph.seeds) - 4} more" if len(graph.seeds) > 4 else ""
    return Layout(
        title=title or "The flow through " + ", ".join(graph.seeds[:4]) + more,
        nodes=nodes,
        edges=edges,
        layers={first + i: layer_width * (i + 1.3) for i in range(count)},
        lanes={name: row_height * lane for name, lane in lanes.items()},
        width=layer_width * (count + 1.2),
        height=row_height * total,
    )


def _heights(graph: "FlowGraph") -> dict[str, float]:
    """How far each node stands below the middle of its lane: near the stream that it is joined to.

    Two sweeps order the stream, along the layers and back; then the modules follow it.
    """
    groups = graph.nodes.groupby(["module", "layer"])["feature"].agg(list)
    stream, modules = groups[["res"]].to_list(), groups.drop("res").to_list()
    in_stream = {*graph.chain["feature"]}
    height = dict.fromkeys(graph.network, 0.0)
    for group in [*stream, *reversed(stream), *modules]:
        near = {}
        for name in group:
            joined = in_stream.intersection(networkx.all_neighbors(graph.network, name))
            near[name] = mean(height[other] for other in joined) if joined else 0.0
        for place, name in enumerate(sorted(group, key=near.__getitem__)):
            height[name] = place - (len(group) - 1) / 2
    return height


def _hovers(names: "pd.Series", table: "pd.DataFrame") -> list[str]:
    """Under each row's name a line for each column that says something."""
    texts = [*names]
    for name in table:
        for row, value in enumerate(table[name]):
            text = f"{value:.3f}" if isinstance(value, float) else str(value or "")
            texts[row] += f"\n{name}: {text}" if text not in ("", "nan") else ""
    return texts
