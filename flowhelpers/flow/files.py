"""Flow graphs as files: our own, and what the graph viewers of others read."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhelpers.core.features import MODULES
from flowhelpers.core.files import read_json, write_json
from flowhelpers.flow.graph import EDGE_COLUMNS, LANES, FlowGraph, chains

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "flowhelpers flow graph, version 2"


def save_graph(graph: FlowGraph, path: Path) -> None:
    """Write a graph as a JSON file, whole or not at all."""
    record = {
        "format": FORMAT,
        "suite": graph.suite,
        "seeds": list(graph.seeds),
        "choices": dict(graph.choices),
        "nodes": _records(graph.nodes),
        "edges": _records(graph.edges),
    }
    write_json(path, record)


def load_graph(path: Path) -> FlowGraph:
    """Read a graph that `save_graph` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no flow graph of this version.
    """
    import pandas as pd

    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        given = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path} holds {given!r}: expected {FORMAT!r}")
    for key in ("suite", "seeds", "choices", "nodes", "edges"):
        if key not in record:
            raise ValueError(f"{path} has no {key!r}: it is no whole flow graph")
    if not record["nodes"]:
        raise ValueError(f"{path} has no nodes: it is no whole flow graph")
    nodes = pd.DataFrame(record["nodes"])
    nodes["class"] = nodes["class"].astype(object)
    links = nodes["link"].astype(str) if "link" in nodes else pd.Series("", nodes.index)
    nodes["link"] = links.where(links.str.match("https?://"), "")  # it will be clicked on
    for module in MODULES:
        names = nodes[f"from_{module}"].astype(object)
        nodes[f"from_{module}"] = names.where(names.notna(), None)
        for kind in ("s", "null", "high"):
            nodes[f"{kind}_{module}"] = nodes[f"{kind}_{module}"].astype(float)
    if any(set(edge) != set(EDGE_COLUMNS) for edge in record["edges"]):
        raise ValueError(f"{path} has edges without some of {', '.join(EDGE_COLUMNS)}")
    edges = pd.DataFrame(record["edges"], columns=EDGE_COLUMNS)
    edges["margin"] = edges["margin"].astype(float)
    return FlowGraph(record["suite"], tuple(record["seeds"]), record["choices"], nodes, edges)


def to_attribution_graph(graph: FlowGraph, slug: str, model: str | None = None) -> dict[str, Any]:
    """The graph in the JSON of circuit-tracer and of Neuronpedia's graph viewer.

    A flow has no tokens. In their place stand the three modules, so that the viewer draws a lane
    for each. Every residual chain is a supernode, named by its seed; labels are `clerp`; a link's
    weight is the match's score.

    Args:
        graph: The graph.
        slug: A name of letters, digits and hyphens.
        model: Neuronpedia's name of the model, to find features by; the suite's unless given.

    Raises:
        ValueError: If the slug holds anything else.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]+", slug):
        raise ValueError(f"slug {slug!r}: expected letters, digits and hyphens")
    nodes = {
        row["feature"]: {
            "node_id": f"{row['layer']}_{row['index']}_{LANES.index(row['module'])}",
            "feature": _number(row["layer"], row["module"], row["index"]),
            "layer": str(row["layer"]),
            "ctx_idx": LANES.index(row["module"]),
            "feature_type": "cross layer transcoder",
            "jsNodeId": f"{row['layer']}_{row['index']}-{LANES.index(row['module'])}",
            "clerp": row["label"].replace("\n", "; ") or row["feature"],
        }
        for row in graph.nodes.to_dict("records")
    }
    links = [
        {
            "source": nodes[row["source"]]["node_id"],
            "target": nodes[row["target"]]["node_id"],
            "weight": float(row["score"]),
        }
        for row in graph.edges.to_dict("records")
    ]
    return {
        "metadata": {
            "slug": slug,
            "scan": model or graph.suite,
            "transcoder_list": [],
            "prompt_tokens": list(LANES),
            "prompt": f"feature flow of {', '.join(graph.seeds)}",
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [node["node_id"] for node in nodes.values()],
            "supernodes": [
                [name, *(nodes[feature]["node_id"] for feature in members)]
                for name, members in chains(graph).items()
            ],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": list(nodes.values()),
        "links": links,
    }


def _records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _number(layer: int, module: str, index: int) -> int:
    """The viewers' number of a feature, from which they tell layer and index (Cantor's pairing).

    Those at MLP and attention get layers that no model has: a viewer finds nothing for them, where
    it would show the residual feature of the same layer and index.
    """
    layer += {"res": 0, "mlp": 1000, "att": 2000}[module]
    return (layer + index) * (layer + index + 1) // 2 + index
