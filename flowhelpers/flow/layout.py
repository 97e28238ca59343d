"""Where the nodes and edges of a flow graph stand in its picture, whoever draws it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.core.figures import CLASS_COLOURS, COLOURS, GREY, SYMBOLS
from flowhelpers.flow.graph import LANES

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.flow.graph import FlowGraph

CENTRED = {"att": "top center", "res": "bottom center", "mlp": "bottom center"}
BESIDE_EDGES = {"att": "top left", "res": "bottom right", "mlp": "bottom left"}
BEFORE = 0.4  # a module stands so far before its layer's output
BETWEEN_LANES = 1.0  # rows
MARK = 0.62  # of the way along an edge; not in the middle, where edges that cross would share it
NARROWEST, TALLEST = 880, 1500  # pixels; rows that would stand higher move together


@dataclass(frozen=True)
class Layout:
    """A flow graph's picture: layers from left to right, a lane for each module, in rows.

    Attributes:
        title: Of the picture.
        nodes: The graph's nodes with their place `x` (layers) and `y` (rows), `kind` (the class,
            or the module of what has none) and its `colour`, `size` and `ring` in pixels, and two
            texts: `caption`, short or empty, with `caption_at`, such as "top left", and `hover`.
        edges: The graph's edges with their ends `x0`, `y0`, `x1`, `y1`, a place `x`, `y` between
            for a mark, `width` in pixels, whether they are `above` chance, `colour` and `hover`.
        lanes: The y of the middle of each module's lane.
        across: The least and the greatest x shown, `width` pixels apart.
        up: The least and the greatest y shown, `height` pixels apart.
        font: Size of the captions.
    """

    title: str
    nodes: "pd.DataFrame"
    edges: "pd.DataFrame"
    lanes: dict[str, float]
    across: tuple[float, float]
    up: tuple[float, float]
    width: float
    height: float
    font: float


def flow_layout(graph: "FlowGraph") -> Layout:
    """Places a graph's nodes, so that no two touch, near those that they are joined to.

    Where there are many rows or layers, everything is smaller and captions are left out.
    """
    nodes = graph.nodes.copy()
    module, layer = nodes["module"], nodes["layer"]
    rows = nodes.groupby(["module", "layer"]).size().groupby("module").max()
    att, res, mlp = (int(rows.get(name, 1)) for name in LANES)
    upper, lower = (res + att) / 2 + BETWEEN_LANES, -(res + mlp) / 2 - BETWEEN_LANES
    lanes = {"att": upper, "res": 0.0, "mlp": lower}
    up = (lower - (mlp + 1) / 2, upper + (att + 1) / 2)
    across = (float(layer.min()) - 1.3, float(layer.max()) + 0.9)
    layers = int(layer.max() - layer.min()) + 1
    row_height = float(np.clip(TALLEST / (up[1] - up[0]), 3, 50))
    digits = len(str(nodes["index"].max()))
    layer_width = max(NARROWEST / (across[1] - across[0]), 5.0 * digits)
    size = min(14, 0.55 * row_height, 0.45 * layer_width)
    nodes["x"] = layer - BEFORE * (module != "res")
    nodes["y"] = module.map(lanes) + nodes["feature"].map(_heights(graph))
    nodes["kind"] = nodes["class"].where(nodes["class"].notna(), module)
    nodes["colour"] = nodes["kind"].map(CLASS_COLOURS | COLOURS)
    nodes["size"] = np.where(nodes["is_seed"], 1.6, 1) * size
    nodes["ring"] = size / 7
    characters = 104 // layers if row_height > 40 and layers <= 10 else 0
    records = nodes.to_dict("records")
    nodes["caption"] = [_caption(row, characters) if row_height > 24 else "" for row in records]
    nodes["caption_at"] = module.map(BESIDE_EDGES if characters else CENTRED)
    nodes["hover"] = [_node_hover(row) for row in records]

    edges, places = graph.edges.copy(), nodes.set_index("feature")[["x", "y"]]
    for axis in ("x", "y"):
        edges[f"{axis}0"] = edges["source"].map(places[axis]).astype(float)
        edges[f"{axis}1"] = edges["target"].map(places[axis]).astype(float)
        edges[axis] = edges[f"{axis}0"] + MARK * (edges[f"{axis}1"] - edges[f"{axis}0"])
    edges["above"] = edges["score"] > edges["null"]
    edges["colour"] = edges["module"].map(COLOURS).where(edges["above"], GREY)
    edges["width"] = (0.5 + 8 * edges["cosine"].astype(float).clip(lower=0)) * size / 14
    method = graph.choices["method"]
    edges["hover"] = [_edge_hover(row, method) for row in edges.to_dict("records")]
    width, height = layer_width * (across[1] - across[0]), row_height * (up[1] - up[0])
    font = min(10.0, 1.5 * layer_width / digits)
    return Layout(_title(graph.seeds), nodes, edges, lanes, across, up, width, height, font)


def _heights(graph: "FlowGraph") -> dict[str, float]:
    """How far each node stands above the middle of its lane."""
    joined: dict[str, list[str]] = defaultdict(list)
    for source, target, module in graph.edges[["source", "target", "module"]].to_numpy():
        joined[source].append(target)
        if module == "res":
            joined[target].append(source)
    groups = graph.nodes.groupby(["module", "layer"])["feature"].agg(list)
    stream, modules = groups[["res"]].to_list(), groups.drop("res").to_list()
    height = dict.fromkeys(graph.nodes["feature"], 0.0)
    for group in [*stream, *reversed(stream), *modules]:
        near = {name: mean([height[other] for other in joined[name]] or [0]) for name in group}
        for place, name in enumerate(sorted(group, key=near.__getitem__)):
            height[name] = place - (len(group) - 1) / 2
    return height


def _title(seeds: Sequence[str]) -> str:
    named = seeds if len(seeds) <= 4 else [*seeds[:3], f"{len(seeds) - 3} other features"]
    return "The flow through " + " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))


def _caption(row: dict[str, Any], characters: int) -> str:
    label = row["label"].split("\n")[0].removeprefix("writes ")
    short = label if len(label) <= characters else label[: characters - 1].rstrip() + "…"
    return "\n".join(filter(None, [str(row["index"]), short if characters else ""]))


def _node_hover(row: dict[str, Any]) -> str:
    label_from = f"(label from {row['label_from']})" if row["label_from"] else ""
    lines = [row["feature"] + ", a seed" * row["is_seed"], row["label"], label_from]
    lines.append(row["class"] if row["kind"] != row["module"] else "")
    for module, symbol in SYMBOLS.items():
        source, score, high = (row[f"{column}_{module}"] for column in ("from", "s", "high"))
        if isinstance(source, str):
            sign = ">" if score > high else "≤"
            lines.append(f"s({symbol}) = {score:.3f} {sign} {high:.3f}, from {source}")
    return "\n".join(filter(None, [*lines, row["link"]]))


def _edge_hover(row: dict[str, Any], method: str) -> str:
    score = f"cosine {row['cosine']:.3f}"
    if method == "pearson":
        score = f"correlation {row['score']:.3f} ({score})"
    side = "above" if row["above"] else "not above"
    chooser = "later" if row["direction"] == "backward" else "earlier"
    lines = [
        f"{row['source']} → {row['target']}",
        f"{score}, {side} chance ({row['null']:.3f})",
        f"{row['null_quantile']:.1%} of chance lies below",
        f"rank {row['rank']} for the {chooser} feature, {'not ' * (not row['mutual'])}mutual",
    ]
    if not np.isnan(row["margin"]):
        lines.append(f"margin over the next {row['margin']:.3f}")
    return "\n".join(lines)
