"""Flow graphs: chains of matches through the layers, with the predecessors in MLP and attention."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from flowhelpers.core.features import MODULES, FeatureId, parse_feature, suggestion
from flowhelpers.labels.neuronpedia import feature_page
from flowhelpers.matching.scores import check_threshold, classify, feature_scores

if TYPE_CHECKING:
    import networkx
    import pandas as pd

    from flowhelpers.suites.load import Suite

LANES = ("att", "res", "mlp")  # from top to bottom
EDGE_COLUMNS = [
    *("source", "target", "module", "direction", "rank"),
    *("score", "cosine", "margin", "mutual", "null", "null_quantile"),
]


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

    @cached_property
    def network(self) -> "networkx.DiGraph":
        """The graph for networkx, its columns as attributes of nodes and edges."""
        import networkx

        network = networkx.DiGraph(suite=self.suite, seeds=self.seeds, **self.choices)
        network.add_nodes_from((node["feature"], node) for node in self.nodes.to_dict("records"))
        edges = self.edges.to_dict("records")
        network.add_edges_from((edge["source"], edge["target"], edge) for edge in edges)
        return network


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
    residual features that it matches best, whose flow this is. Flows of several seeds share nodes.

    The paper's B.2 has `t_res=0.5, t_mlp=t_att=0.15`, its Table 5 `t_mlp=0.25` and no `t_res`.

    Args:
        suite: Neither its model nor an encoder is loaded.
        seeds: One feature or several.
        table: The suite's match table.
        t_res: Ends the chain where a step's score is below it; not at all unless given.
        t_mlp: Leaves out MLP predecessors of a lower score.
        t_att: Leaves out attention predecessors of a lower score.
        top_n: Follows so many matches of each node instead of the best.
        backward: Whether to go back from the seeds.
        forward: Whether to go on from them.
        thresholds: What the classes go by, as in `matching.classify`.

    Raises:
        ValueError: If a feature or the place of a threshold does not exist, a threshold is outside
            [-1, 1], or the table is another suite's or lacks ranks or the layer of a seed.

    Example:
        >>> from flowhelpers import flow_graph, load_suite, match_table
        >>> suite = load_suite("flowlet")
        >>> graph = flow_graph(suite, "4/res/17", match_table(suite, k=1))
        >>> graph.chain["feature"].tolist()[3:6]
        ['3/res/733', '4/res/17', '5/res/197']
        >>> ancestors(graph, "1/res/206")
        ['0/att/68', '0/res/698', '0/mlp/499', '1/att/35', '1/mlp/284']
    """
    import pandas as pd

    limits = {"res": t_res, "mlp": t_mlp, "att": t_att}
    for module, limit in limits.items():
        check_threshold(0.0 if limit is None else limit, f"t_{module}")
    if not isinstance(top_n, int) or not 1 <= top_n <= table["rank"].max():
        raise ValueError(f"top_n={top_n}: expected 1 to {table['rank'].max()}, the table's ranks")
    if (of := table["suite"].iloc[0]) != suite.name:
        raise ValueError(f"a match table of {of}: expected one of {suite.name}")
    names = [seeds] if isinstance(seeds, (str, FeatureId)) else seeds
    found = list(dict.fromkeys(map(suite.feature, names)))
    if not found:
        raise ValueError("no seed given: expected a feature, such as 12/res/4230")
    for seed in found:
        if seed.layer not in {*table["layer"], *table["source_layer"]}:
            raise ValueError(f"the match table has nothing at layer {seed.layer}, of {seed}")
    steps = _Steps(table, top_n, limits)
    starts = [end for s in found for end in ([s] if s.module == "res" else steps.onward(s))]
    reached = {*starts}
    for step in [steps.back] * backward + [steps.onward] * forward:
        seen, ahead = {*starts}, [*starts]
        while ahead:
            fresh = {*step(ahead.pop())} - seen
            seen |= fresh
            ahead += fresh
        reached |= seen
    for node in [*reached]:
        reached |= {*steps.back(node, "mlp"), *steps.back(node, "att")}
    choices: dict[str, Any] = {f"t_{module}": limit for module, limit in limits.items()}
    choices |= {"method": str(table["method"].iloc[0]), "top_n": top_n}
    choices |= {"backward": backward, "forward": forward, "high": "above the null"}
    if thresholds:
        choices["high"] = {f"{layer}/{module}": at for (layer, module), at in thresholds.items()}
    classes = classify(feature_scores(table), thresholds)
    nodes = _nodes(suite, sorted(reached | {*found}, key=_place), found, classes)
    edges = _sorted_edges(pd.DataFrame(steps.edges.values(), columns=EDGE_COLUMNS))
    return FlowGraph(suite.name, tuple(map(str, found)), choices, nodes, edges)


class _Steps:
    """Where a walk may go from a node, by the match table; it remembers the edges it took."""

    def __init__(self, table: "pd.DataFrame", top_n: int, limits: Mapping[str, float | None]):
        kept = table[(table["rank"] <= top_n) & (table["source"] >= 0) & (table["feature"] >= 0)]
        self.groups = {
            key: part.set_index("feature" if key[2] == "backward" else "source", drop=False)
            for key, part in kept.groupby(["layer", "module", "direction"], observed=True)
        }
        self.limits = limits
        self.edges: dict[tuple[str, str], list[Any]] = {}

    def back(self, node: FeatureId, module: str = "res") -> list[FeatureId]:
        """Predecessors of a residual node at a module."""
        return self._step(node, node.layer, module, "backward")

    def onward(self, node: FeatureId) -> list[FeatureId]:
        """Residual features that a node leads to."""
        return self._step(node, node.layer + (node.module == "res"), node.module, "forward")

    def _step(self, node: FeatureId, layer: int, module: str, direction: str) -> list[FeatureId]:
        group = self.groups.get((layer, module, direction))
        if group is None or node.index not in group.index:
            return []
        limit, reached = self.limits[module], []
        for row in group.loc[[node.index]].sort_values("rank").to_dict("records"):
            if limit is not None and row["score"] < limit:
                continue
            source = FeatureId(int(row["source_layer"]), module, int(row["source"]))
            target = FeatureId(layer, "res", int(row["feature"]))
            ends = str(source), str(target)
            if direction == "backward" or ends not in self.edges:
                self.edges[ends] = [*ends, *(row[column] for column in EDGE_COLUMNS[2:])]
            reached.append(source if direction == "backward" else target)
        return reached


def _nodes(
    suite: "Suite", nodes: Sequence[FeatureId], seeds: Sequence[FeatureId], classes: "pd.DataFrame"
) -> "pd.DataFrame":
    import pandas as pd

    rows = [(str(node), node.layer, node.module, node.index, node in seeds) for node in nodes]
    frame = pd.DataFrame(rows, columns=["feature", "layer", "module", "index", "is_seed"])
    links = [feature_page(suite, node) or "" for node in nodes]
    frame = frame.assign(label="", label_from="", link=links)
    kinds = ("source", "s", "null", "high")
    columns = ["class", *(f"{kind}_{module}" for module in MODULES for kind in kinds)]
    known = classes.assign(module="res").set_index(["layer", "module", "feature"])
    places = pd.MultiIndex.from_frame(frame[["layer", "module", "index"]])
    known = known.reindex(places, columns=columns)
    frame["class"] = pd.Series(known["class"].to_numpy(), dtype=object)
    for module in MODULES:
        sources = zip(frame["layer"] - (module == "res"), known[f"source_{module}"], strict=True)
        names = [f"{at}/{module}/{int(index)}" if index >= 0 else None for at, index in sources]
        frame[f"from_{module}"] = pd.Series(names, dtype=object)
        for kind in kinds[1:]:
            frame[f"{kind}_{module}"] = known[f"{kind}_{module}"].astype(float).to_numpy()
    return frame


def _place(node: FeatureId) -> tuple[int, int, int]:
    return node.layer, LANES.index(node.module), node.index


def _places(names: "pd.Series") -> "pd.Series":
    return names.map(lambda name: _place(parse_feature(name)))


def _sorted_edges(edges: "pd.DataFrame") -> "pd.DataFrame":
    order = edges.assign(place=_places(edges["target"]))
    order = order.sort_values(["place", "module", "rank", "source"], ignore_index=True)
    return order.drop(columns="place")


def merged(graphs: Sequence[FlowGraph]) -> FlowGraph:
    """Several graphs of one suite as one, the graph that `flow_graph` builds of all their seeds."""
    import pandas as pd

    kinds = {(graph.suite, json.dumps(dict(graph.choices), sort_keys=True)) for graph in graphs}
    if len(kinds) != 1:
        given = ", ".join(f"{suite} {choices}" for suite, choices in sorted(kinds)) or "none"
        raise ValueError(f"graphs of {given}: expected one suite and one set of choices")
    seeds = tuple(dict.fromkeys(seed for graph in graphs for seed in graph.seeds))
    nodes = pd.concat([graph.nodes for graph in graphs]).drop_duplicates("feature")
    nodes = nodes.sort_values("feature", key=_places, ignore_index=True)
    nodes["is_seed"] = nodes["feature"].isin(seeds)
    edges = pd.concat([graph.edges for graph in graphs]).sort_values("direction", kind="stable")
    edges = edges.drop_duplicates(["source", "target"])  # what both sides chose is backward
    return replace(graphs[0], seeds=seeds, nodes=nodes, edges=_sorted_edges(edges))


def labelled(graph: FlowGraph, labels: "pd.DataFrame") -> FlowGraph:
    """The graph with labels (`feature`, `label`, `label_from`, as `describe_features` gives)."""
    known = labels.set_index("feature")
    nodes = graph.nodes.copy()
    for column in ("label", "label_from"):
        nodes[column] = nodes["feature"].map(known[column]).fillna(nodes[column])
    return replace(graph, nodes=nodes)


def keep_nodes(graph: FlowGraph, features: Iterable[str]) -> FlowGraph:
    """The graph of the seeds and the nodes that are named, as the paper chooses them by hand."""
    kept = {*features, *graph.seeds}
    nodes = graph.nodes[graph.nodes["feature"].isin(kept)].reset_index(drop=True)
    both = graph.edges["source"].isin(kept) & graph.edges["target"].isin(kept)
    if nodes.empty:
        raise ValueError("no node of the graph is left")
    return replace(graph, nodes=nodes, edges=graph.edges[both].reset_index(drop=True))


def ancestors(graph: FlowGraph, feature: FeatureId | str) -> list[str]:
    """The features of the graph that lead to one, by layer."""
    import networkx

    return _in_order(graph, networkx.ancestors(graph.network, _node(graph, feature)))


def descendants(graph: FlowGraph, feature: FeatureId | str) -> list[str]:
    """The features of the graph that one leads to, by layer."""
    import networkx

    return _in_order(graph, networkx.descendants(graph.network, _node(graph, feature)))


def path(graph: FlowGraph, first: FeatureId | str, last: FeatureId | str) -> "pd.DataFrame":
    """The edges from one feature to a later one, in order; the sum of (1 - score) is least."""
    import networkx

    ends = _node(graph, first), _node(graph, last)
    try:
        nodes = networkx.shortest_path(graph.network, *ends, lambda a, b, edge: 1 - edge["score"])
    except networkx.NetworkXNoPath as error:
        raise ValueError(f"no path leads from {first} to {last} in this graph") from error
    return graph.edges.set_index(["source", "target"]).loc[[*pairwise(nodes)]].reset_index()


def lifespan(
    graph: FlowGraph, feature: FeatureId | str, t_res: float | None = None
) -> tuple[int, int]:
    """The first and the last layer of the run around a residual feature (CHOICES 26).

    The run ends where no residual edge of the graph goes on whose score is at least `t_res`, or
    above the null's quantile if `t_res` is not given.
    """
    import networkx

    node = _node(graph, feature)
    check_threshold(0.0 if t_res is None else t_res, "t_res")
    if parse_feature(node).module != "res":
        raise ValueError(f"{node} is not residual: a lifespan is that of a residual feature")

    edges = graph.edges[graph.edges["module"] == "res"]
    high = edges["score"] > edges["null"] if t_res is None else edges["score"] >= t_res
    network = graph.network.edge_subgraph(edges.loc[high, ["source", "target"]].itertuples(False))
    near = {node}
    if node in network:
        near |= networkx.ancestors(network, node) | networkx.descendants(network, node)
    layers = [graph.network.nodes[name]["layer"] for name in near]
    return min(layers), max(layers)


def chains(graph: FlowGraph) -> dict[str, list[str]]:
    """For each seed its chain: the residual features that lead to it or that it leads to.

    The chain of a seed at an MLP or attention is that of the residual features it matches. A
    feature that several chains share is listed with the first.
    """
    import networkx

    residual = graph.network.subgraph(graph.chain["feature"])
    found, taken = {}, set()
    for seed in graph.seeds:
        line = {seed} if seed in residual else {*graph.network.successors(seed)}
        for start in [*line]:
            line |= networkx.ancestors(residual, start) | networkx.descendants(residual, start)
        found[seed] = _in_order(graph, line - taken)
        taken |= line
    return found


def _node(graph: FlowGraph, feature: FeatureId | str) -> str:
    name = str(parse_feature(str(feature)))
    if name not in graph.network:
        raise ValueError(f"{name} is not in this graph{suggestion(name, graph.nodes['feature'])}")
    return name


def _in_order(graph: FlowGraph, features: set[str]) -> list[str]:
    return [name for name in graph.network if name in features]
