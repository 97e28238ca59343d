"""Flow graphs as files: our own, and what the graph viewers of others read."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx

from flowhelpers.core.files import read_json, write_json
from flowhelpers.flow.graph import EDGE_COLUMNS, LANES, NODE_TYPES, FlowGraph

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "flowhelpers flow graph, version 2"


def save_graph(graph: FlowGraph, path: Path) -> None:
    """Write a graph to a JSON file; if writing fails, no incomplete file is left."""
    record = {"format": FORMAT, "suite": graph.suite, "seeds": graph.seeds}
    record |= {"choices": graph.choices, "nodes": _records(graph.nodes)}
    write_json(path, record | {"edges": _records(graph.edges)})


def load_graph(path: Path) -> FlowGraph:
    """Read a graph that `save_graph` wrote; a ValueError if it is of another version."""
    import pandas as pd

    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} holds no flow graph: expected the format {FORMAT!r}")
    nodes = pd.DataFrame(record["nodes"]).astype(NODE_TYPES)
    nodes["link"] = nodes["link"].where(nodes["link"].str.match("https?://"), "")  # is clicked on
    edges = pd.DataFrame(record["edges"], columns=EDGE_COLUMNS).astype({"margin": float})
    return FlowGraph(record["suite"], tuple(record["seeds"]), record["choices"], nodes, edges)


def to_attribution_graph(graph: FlowGraph, slug: str, model: str | None = None) -> dict[str, Any]:
    """The graph in the JSON of circuit-tracer and of Neuronpedia's graph viewer.

    A flow has no tokens, so the three modules take their place and the viewer draws a lane for
    each. Connected residual features form a supernode, named by its seeds; labels are `clerp`; a
    link's weight is the score of the match. `model` is the model's name on Neuronpedia.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]+", slug):
        raise ValueError(f"slug {slug!r}: expected letters, digits and hyphens")
    ids, nodes = {}, []
    for row in graph.nodes.to_dict("records"):
        layer, lane, index = row["layer"], LANES.index(row["module"]), row["index"]
        ids[row["feature"]] = f"{layer}_{index}_{lane}"
        node = {"node_id": ids[row["feature"]], "jsNodeId": f"{layer}_{index}-{lane}"}
        node |= {"feature": _number(layer, row["module"], index), "layer": str(layer)}
        node |= {"ctx_idx": lane, "feature_type": "cross layer transcoder"}
        nodes.append(node | {"clerp": row["label"].replace("\n", "; ") or row["feature"]})
    links = graph.edges[["source", "target", "score"]].rename(columns={"score": "weight"})
    links = links.replace({"source": ids, "target": ids}).to_dict("records")
    stream = graph.chain["feature"]
    supernodes = []
    for joined in networkx.weakly_connected_components(graph.network.subgraph(stream)):
        chain = [name for name in stream if name in joined]
        seeds = ", ".join(name for name in chain if name in graph.seeds)
        supernodes.append([seeds or chain[0], *map(ids.get, chain)])
    metadata = {"slug": slug, "scan": model or graph.suite, "schema_version": 1}
    metadata |= {"prompt": f"feature flow of {', '.join(graph.seeds)}", "transcoder_list": []}
    metadata["prompt_tokens"] = list(LANES)
    view = {"pinnedIds": [*ids.values()], "supernodes": supernodes, "linkType": "both"}
    view |= {"clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": view, "nodes": nodes, "links": links}


def _records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _number(layer: int, module: str, index: int) -> int:
    """The viewers' number of a feature, from which they tell layer and index (Cantor's pairing)."""
    # at MLP and attention a layer that no model has: else the viewer shows the residual feature
    layer += {"res": 0, "mlp": 1000, "att": 2000}[module]
    return (layer + index) * (layer + index + 1) // 2 + index
