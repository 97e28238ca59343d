"""Flow graphs: chains of matches through the layers, with the predecessors in MLP and attention."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.core.features import suggestion

if TYPE_CHECKING:
    import pandas as pd

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from flowhelpers.core.features import MODULES, FeatureId, parse_feature
from flowhelpers.labels.on_neuronpedia import feature_page
from flowhelpers.matching.scores import check_threshold, classify, dominant_module, feature_scores

if TYPE_CHECKING:
    import networkx
    import pandas as pd

    from flowhelpers.suites.load import Suite

LANES = ("att", "res", "mlp")  # from top to bottom


@dataclass(frozen=True)
class FlowGraph:
    """Features and the matches that join them.

    Attributes:
        suite: The suite's name.
        seeds: The features that it was built from.
        choices: What it was built with.
        nodes: One row a feature: `feature`, `layer`, `module`, `index`, `is_seed`, `label`,
            `label_from`, `link` (its page on Neuronpedia, empty if it has none); for residual
            features `class`, and for each of `res`, `mlp`, `att` the best predecessor `from_res` …,
            its score `s_res` …, the null's quantile `null_res` … and the threshold `high_res` …
            that the class goes by. What does not exist is missing.
        edges: One row a match, from `source` to `target`: `module` (of the source), `direction`
            (which side chose it), `rank`, `score` (what the method ranks by), `cosine`, `margin`,
            `mutual`, `null`, `null_quantile`.
    """

    suite: str
    seeds: tuple[str, ...]
    choices: Mapping[str, Any]
    nodes: "pd.DataFrame"
    edges: "pd.DataFrame"

    @property
    def chain(self) -> "pd.DataFrame":
        """The residual nodes, by layer."""
        return self.nodes[self.nodes["module"] == "res"].reset_index(drop=True)


def flow_graph(
    suite: "Suite",
    seeds: FeatureId | str | Iterable[FeatureId | str],
    table: "pd.DataFrame",
    *,
    t_res: float | None = None,
    t_mlp: float | None = None,
    t_att: float | None = None,
    top_n: int = 1,
    backward: bool = True,
    forward: bool = True,
    thresholds: Mapping[tuple[int, str], float] | None = None,
) -> FlowGraph:
    """The flow through one or several features (paper 3.4, B.2; CHOICES 25 and 26).

    Backward, each step goes to the best match of the node reached; forward, to the feature of the
    next layer whose score with the node is highest. Every residual node has its MLP and attention
    predecessors, which are not followed further. A seed at an MLP or attention leads to the
    residual features that it matches best, whose flow this is. Flows of several seeds share the
    nodes that they have in common.

    The paper's B.2 has `t_res=0.5, t_mlp=t_att=0.15`, its Table 5 `t_mlp=0.25` and no `t_res`.

    Args:
        suite: The suite.
        seeds: Features.
        table: The suite's match table.
        t_res: Ends the chain where a step's score is below it; not at all unless given.
        t_mlp: Leaves out MLP predecessors of a lower score.
        t_att: Leaves out attention predecessors of a lower score.
        top_n: Follows so many matches of each node instead of the best.
        backward: Whether to go back from the seeds.
        forward: Whether to go on from them.
        thresholds: What the classes go by, as in `matching.classify`.

    Raises:
        ValueError: If a feature does not exist, a threshold is outside [-1, 1] or of a place that
            does not, or the table has fewer ranks than `top_n`, nothing at a seed's layer, or is
            another suite's.
    """
    import pandas as pd

    limits = {"res": t_res, "mlp": t_mlp, "att": t_att}
    for module, limit in limits.items():
        if limit is not None:
            check_threshold(limit, f"t_{module}")
    if not isinstance(top_n, int) or not 1 <= top_n <= table["rank"].max():
        raise ValueError(f"top_n={top_n}: expected 1 to {table['rank'].max()}, the table's ranks")
    if (of := table["suite"].iloc[0]) != suite.name:
        raise ValueError(f"a match table of {of}: expected one of {suite.name}")
    names = [seeds] if isinstance(seeds, (str, FeatureId)) else list(seeds)
    if not names:
        raise ValueError("no seed given: expected a feature, such as 12/res/4230")
    found = list(dict.fromkeys(suite.feature(name) for name in names))
    for seed in found:
        if seed.layer not in {*table["layer"], *table["source_layer"]}:
            raise ValueError(f"the match table has nothing at layer {seed.layer}, of {seed}")
    steps = _Steps(suite, table, top_n, limits)
    starts: list[FeatureId] = []
    for seed in found:
        starts += [seed] if seed.module == "res" else steps.onward(seed)
    reached = dict.fromkeys(starts)
    for go, step in ((backward, steps.back), (forward, steps.onward)):
        seen, ahead = dict.fromkeys(starts), list(starts)
        while go and ahead:
            ahead = [node for at in ahead for node in step(at) if node not in seen]
            ahead = list(dict.fromkeys(ahead))
            seen |= dict.fromkeys(ahead)
        reached |= seen
    for node in list(reached):
        for module in ("mlp", "att"):
            reached |= dict.fromkeys(steps.back(node, module))
    reached |= dict.fromkeys(found)
    nodes = sorted(reached, key=_place)
    edges = pd.DataFrame(steps.edges.values(), columns=EDGE_COLUMNS)
    choices = {f"t_{module}": limit for module, limit in limits.items()} | {
        "method": str(table["method"].iloc[0]),
        "top_n": top_n,
        "backward": backward,
        "forward": forward,
        "high": {f"{layer}/{module}": at for (layer, module), at in (thresholds or {}).items()}
        or "above the null",
    }
    return FlowGraph(
        suite.name,
        tuple(map(str, found)),
        choices,
        _nodes(suite, nodes, found, classify(feature_scores(table), thresholds)),
        _sorted_edges(edges),
    )


EDGE_COLUMNS = [
    *("source", "target", "module", "direction", "rank"),
    *("score", "cosine", "margin", "mutual", "null", "null_quantile"),
]


def _place(node: FeatureId) -> tuple[int, int, int]:
    return node.layer, LANES.index(node.module), node.index


def _sorted_edges(edges: "pd.DataFrame") -> "pd.DataFrame":
    places = edges["target"].map(lambda name: _place(parse_feature(name)))
    order = edges.assign(place=places).sort_values(["place", "module", "rank", "source"])
    return order.drop(columns="place").reset_index(drop=True)


class _Steps:
    """Where a walk may go from a node, by the match table; it remembers the edges it took."""

    def __init__(
        self,
        suite: "Suite",
        table: "pd.DataFrame",
        top_n: int,
        limits: Mapping[str, float | None],
    ):
        kept = table[(table["rank"] <= top_n) & (table["source"] >= 0) & (table["feature"] >= 0)]
        self.groups = {
            key: part.set_index("feature" if key[2] == "backward" else "source", drop=False)
            for key, part in kept.groupby(["layer", "module", "direction"], observed=True)
        }
        self.suite = suite
        self.limits = limits
        self.edges: dict[tuple[str, str], tuple[Any, ...]] = {}

    def back(self, node: FeatureId, module: str = "res") -> list[FeatureId]:
        """Predecessors of a residual node at a module."""
        return self._step(node, (node.layer, module, "backward"))

    def onward(self, node: FeatureId) -> list[FeatureId]:
        """Residual features that a node leads to."""
        layer = node.layer + (node.module == "res")
        return self._step(node, (layer, node.module, "forward"))

    def _step(self, node: FeatureId, key: tuple[int, str, str]) -> list[FeatureId]:
        group = self.groups.get(key)
        if group is None or node.index not in group.index:
            return []
        limit = self.limits[key[1]]
        reached = []
        for row in group.loc[[node.index]].sort_values("rank").to_dict("records"):
            if limit is not None and row["score"] < limit:
                continue
            source = FeatureId(int(row["source_layer"]), key[1], int(row["source"]))
            target = FeatureId(int(row["layer"]), "res", int(row["feature"]))
            edge = {"source": str(source), "target": str(target)}
            ends = edge["source"], edge["target"]
            if key[2] == "backward" or ends not in self.edges:
                self.edges[ends] = tuple((row | edge)[column] for column in EDGE_COLUMNS)
            reached.append(source if key[2] == "backward" else target)
        return reached


def _nodes(
    suite: "Suite",
    nodes: Sequence[FeatureId],
    seeds: Sequence[FeatureId],
    classes: "pd.DataFrame",
) -> "pd.DataFrame":
    import pandas as pd

    frame = pd.DataFrame(
        {
            "feature": [str(node) for node in nodes],
            "layer": [node.layer for node in nodes],
            "module": [node.module for node in nodes],
            "index": [node.index for node in nodes],
            "is_seed": [node in seeds for node in nodes],
            "label": "",
            "label_from": "",
            "link": [feature_page(suite, node) or "" for node in nodes],
        }
    )
    known = classes.set_index(["layer", "feature"])
    known = known.reindex([(node.layer, node.index) for node in nodes])
    residual = (frame["module"] == "res").to_numpy()
    frame["class"] = pd.Series(known["class"].where(residual).to_numpy(), dtype=object)
    for module in MODULES:
        sources = known.get(f"source_{module}", pd.Series(np.nan, known.index))
        names = [
            f"{node.layer - (module == 'res')}/{module}/{int(source)}"
            if node.module == "res" and source >= 0
            else None
            for node, source in zip(nodes, sources, strict=True)
        ]
        frame[f"from_{module}"] = pd.Series(names, dtype=object)
        for kind in ("s", "null", "high"):
            values = known.get(f"{kind}_{module}", pd.Series(np.nan, known.index))
            frame[f"{kind}_{module}"] = values.where(residual).astype(float).to_numpy()
    return frame


def merged(graphs: Sequence[FlowGraph]) -> FlowGraph:
    """Several graphs of one suite as one: their nodes and edges, each once.

    It is the graph that `flow_graph` builds of all the seeds.

    Raises:
        ValueError: If there is none, or they are of several suites or choices.
    """
    import pandas as pd

    kinds = {(graph.suite, json.dumps(dict(graph.choices), sort_keys=True)) for graph in graphs}
    if len(kinds) != 1:
        given = ", ".join(f"{suite} {choices}" for suite, choices in sorted(kinds)) or "none"
        raise ValueError(
            f"cannot merge graphs of {given}: expected one suite and one set of choices"
        )
    seeds = tuple(dict.fromkeys(seed for graph in graphs for seed in graph.seeds))
    nodes = pd.concat([graph.nodes for graph in graphs]).drop_duplicates("feature")
    names = nodes["feature"].tolist()
    nodes["is_seed"] = nodes["feature"].isin(seeds)
    edges = pd.concat([graph.edges for graph in graphs]).sort_values("direction", kind="stable")
    edges = edges.drop_duplicates(["source", "target"])  # what both sides chose is backward
    order = sorted(range(len(nodes)), key=lambda row: _place(parse_feature(names[row])))
    nodes = nodes.iloc[order].reset_index(drop=True)
    return FlowGraph(graphs[0].suite, seeds, graphs[0].choices, nodes, _sorted_edges(edges))


def labelled(graph: FlowGraph, labels: "pd.DataFrame") -> FlowGraph:
    """The graph with labels (`feature`, `label`, `label_from`, as `labels.describe` gives)."""
    known = labels.set_index("feature")
    nodes = graph.nodes.copy()
    for column in ("label", "label_from"):
        nodes[column] = nodes["feature"].map(known[column]).fillna(nodes[column])
    return replace(graph, nodes=nodes)


def to_networkx(graph: FlowGraph) -> "networkx.DiGraph":
    """The graph for networkx: an edge for each match, source to target; columns as attributes."""
    import networkx

    found = networkx.DiGraph(suite=graph.suite, seeds=graph.seeds, **graph.choices)
    for row in graph.nodes.to_dict("records"):
        found.add_node(row["feature"], **row)
    for row in graph.edges.to_dict("records"):
        found.add_edge(row["source"], row["target"], **row)
    return found


def ancestors(graph: FlowGraph, feature: FeatureId | str) -> list[str]:
    """The features of the graph that lead to one, by layer.

    Raises:
        ValueError: If the feature is not in the graph.
    """
    import networkx

    return _in_order(graph, networkx.ancestors(to_networkx(graph), _node(graph, feature)))


def descendants(graph: FlowGraph, feature: FeatureId | str) -> list[str]:
    """The features of the graph that one leads to, by layer.

    Raises:
        ValueError: If the feature is not in the graph.
    """
    import networkx

    return _in_order(graph, networkx.descendants(to_networkx(graph), _node(graph, feature)))


def path(graph: FlowGraph, first: FeatureId | str, last: FeatureId | str) -> "pd.DataFrame":
    """The edges of the way from one feature to a later one, in order.

    Of several ways it is the one whose sum of (1 - score) is least.

    Raises:
        ValueError: If a feature is not in the graph, or there is no way.
    """
    import networkx

    network = to_networkx(graph)
    ends = _node(graph, first), _node(graph, last)
    try:
        way = networkx.shortest_path(network, *ends, weight=lambda a, b, edge: 1 - edge["score"])
    except networkx.NetworkXNoPath as error:
        raise ValueError(f"no way leads from {first} to {last} in this graph") from error
    keys = list(pairwise(way))
    return graph.edges.set_index(["source", "target"]).loc[keys].reset_index()


def lifespan(
    graph: FlowGraph, feature: FeatureId | str, t_res: float | None = None
) -> tuple[int, int]:
    """The first and the last layer of the run around a residual feature (CHOICES 26).

    The run ends where no residual edge of the graph goes on whose score is at least `t_res`, or
    above the null's quantile if `t_res` is not given.

    Raises:
        ValueError: If the feature is not in the graph, or is not residual.
    """
    import networkx

    node = _node(graph, feature)
    if t_res is not None:
        check_threshold(t_res, "t_res")
    if parse_feature(node).module != "res":
        raise ValueError(f"{node} is not residual: a lifespan is that of a residual feature")
    edges = graph.edges[graph.edges["module"] == "res"]
    high = edges["score"] > edges["null"] if t_res is None else edges["score"] >= t_res
    network = networkx.DiGraph()
    network.add_node(node)
    network.add_edges_from(edges.loc[high, ["source", "target"]].itertuples(index=False))
    near = {node} | networkx.ancestors(network, node) | networkx.descendants(network, node)
    layers = [parse_feature(name).layer for name in near]
    return min(layers), max(layers)


def turns(graph: FlowGraph) -> "pd.DataFrame":
    """The residual nodes where the meaning turns: a module lies nearer than the stream before.

    These have an s(M) or s(A) that is high and above s(R) (paper 3.3, class C and those of class B
    that lean on the module). Layer 0, which has no s(R), is left out.

    Returns:
        Rows of `nodes`, with the module as `turned_by` (`matching.dominant_module`).
    """
    chain = graph.chain
    chain["turned_by"] = dominant_module(chain)
    near = chain["s_mlp"].where(chain["turned_by"] == "mlp", chain["s_att"])
    return chain[chain["turned_by"].notna() & (near > chain["s_res"])]


def chains(graph: FlowGraph) -> dict[str, list[str]]:
    """For each seed its chain: the residual features that lead to it or that it leads to.

    The chain of a seed at an MLP or attention is that of the residual features it matches. A
    feature that several chains share is listed with the first.
    """
    import networkx

    residual = set(graph.nodes.loc[graph.nodes["module"] == "res", "feature"])
    whole = to_networkx(graph)
    network = whole.subgraph(residual)
    found, taken = {}, set()
    for seed in graph.seeds:
        starts = [seed] if seed in residual else list(whole.successors(seed))
        line = set(starts)
        for start in starts:
            line |= networkx.ancestors(network, start) | networkx.descendants(network, start)
        found[seed] = _in_order(graph, line - taken)
        taken |= line
    return found


def _node(graph: FlowGraph, feature: FeatureId | str) -> str:
    name = str(parse_feature(str(feature)))
    if name not in set(graph.nodes["feature"]):
        raise ValueError(f"{name} is not in this graph{suggestion(name, graph.nodes['feature'])}")
    return name


def _in_order(graph: FlowGraph, features: Iterable[str]) -> list[str]:
    wanted = set(features)
    return [name for name in graph.nodes["feature"] if name in wanted]


def keep_nodes(graph: FlowGraph, features: Iterable[str]) -> FlowGraph:
    """The graph without nodes that are not named: what the paper does by hand, with labels in view.

    Seeds stay. Edges stay where both ends do.

    Raises:
        ValueError: If nothing is left.
    """
    kept = {*features, *graph.seeds}
    nodes = graph.nodes[graph.nodes["feature"].isin(kept)].reset_index(drop=True)
    both = graph.edges["source"].isin(kept) & graph.edges["target"].isin(kept)
    if nodes.empty:
        raise ValueError("no node of the graph is left")
    return replace(graph, nodes=nodes, edges=graph.edges[both].reset_index(drop=True))
