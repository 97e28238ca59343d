"""Flow graphs: chains of matches through the layers, with the predecessors in MLP and attention."""

import json
from collections.abc import Iterable, Mapping, Sequence, Set
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
NODE_COLUMNS = [
    *("feature", "layer", "module", "index", "is_seed", "label", "label_from", "link", "class"),
    *(f"{kind}_{module}" for module in MODULES for kind in ("from", "s", "null", "high")),
]
NODE_TYPES = dict.fromkeys(["class", *(f"from_{module}" for module in MODULES)], object)
NODE_TYPES |= {f"{kind}_{module}": float for module in MODULES for kind in ("s", "null", "high")}
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
            features `class`, and for each of `res`, `mlp`, `att` the best predecessor `from_res`,
            its score `s_res`, the null's quantile `null_res` and the threshold `high_res` that the
            class goes by. What does not exist is missing.
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

    Neither the suite's model nor an encoder is loaded. The paper's B.2 has `t_res=0.5` and
    `t_mlp=t_att=0.15`, its Table 5 `t_mlp=0.25` and no `t_res`.

    Args:
        t_res: Ends the chain where a step's score is below it; not at all unless given.
        t_mlp: Leaves out MLP predecessors of a lower score, as `t_att` those in attention.
        top_n: Follows so many matches of each node instead of the best.
        thresholds: What the classes go by, as in `matching.classify`.

    Example:
        >>> from flowhelpers import flow, flow_graph, load_suite, match_table
        >>> suite = load_suite("flowlet")
        >>> graph = flow_graph(suite, "4/res/17", match_table(suite, k=1))
        >>> graph.chain["feature"].tolist()[3:6]
        ['3/res/733', '4/res/17', '5/res/197']
        >>> flow.ancestors(graph, "1/res/206")
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
    named = list(dict.fromkeys(map(suite.feature, names)))
    if not named:
        raise ValueError("no seed given: expected a feature, such as 12/res/4230")
    for seed in named:
        if seed.layer not in {*table["layer"], *table["source_layer"]}:
            raise ValueError(f"the match table has nothing at layer {seed.layer}, of {seed}")

    matches = table[(table["rank"] <= top_n) & (table["source"] >= 0) & (table["feature"] >= 0)]
    limit = matches["module"].astype(object).map(limits).astype(float)
    matches = matches[~(matches["score"] < limit)]  # where there is no limit, it is NaN
    starts, from_seeds = {seed for seed in named if seed.module == "res"}, []
    for seed in [seed for seed in named if seed.module != "res"]:
        rows = matches[(matches["direction"] == "forward") & (matches["module"] == seed.module)]
        rows = rows[(rows["layer"] == seed.layer) & (rows["source"] == seed.index)]
        starts |= {FeatureId(seed.layer, "res", index) for index in rows["feature"]}
        from_seeds.append(rows)
    directions = ["backward"] * backward + ["forward"] * forward
    walks = [_walk(matches, starts, direction) for direction in directions]
    nodes = starts.union(*(reached for reached, _ in walks))
    places = [(node.layer, node.index) for node in nodes]
    modules = matches[(matches["direction"] == "backward") & (matches["module"] != "res")]
    modules = modules.merge(pd.DataFrame(places, columns=["layer", "feature"], dtype=int))
    edges = pd.concat([*(rows for _, rows in walks), modules, *from_seeds])
    columns = [edges[name].astype(str) for name in ("source_layer", "module", "source")]
    edges["source"] = columns[0] + "/" + columns[1] + "/" + columns[2]
    edges["target"] = edges["layer"].astype(str) + "/res/" + edges["feature"].astype(str)
    edges = edges.drop_duplicates(["source", "target"])  # what both sides chose is backward
    edges = pd.DataFrame(edges[EDGE_COLUMNS].to_dict("records"), columns=EDGE_COLUMNS)
    nodes |= {*named, *map(parse_feature, edges["source"])}
    choices: dict[str, Any] = {f"t_{module}": limit for module, limit in limits.items()}
    choices |= {"method": str(table["method"].iloc[0]), "top_n": top_n}
    high = {f"{layer}/{module}": at for (layer, module), at in (thresholds or {}).items()}
    choices |= {"backward": backward, "forward": forward, "high": high or "above the null"}
    classes = classify(feature_scores(table), thresholds)
    node_table = _node_table(suite, sorted(nodes, key=_place), named, classes)
    return FlowGraph(suite.name, tuple(map(str, named)), choices, node_table, _sorted_edges(edges))


def _walk(
    matches: "pd.DataFrame", starts: Set[FeatureId], direction: str
) -> tuple[set[FeatureId], "pd.DataFrame"]:
    """The residual features that a chain of matches joins to the starts, and these matches."""
    import pandas as pd

    forward = direction == "forward"
    near, far = ("source", "feature") if forward else ("feature", "source")
    rows = matches[(matches["direction"] == direction) & (matches["module"] == "res")]
    reached, taken = {*starts}, [rows[:0]]
    for layer, group in [*rows.groupby("layer")][:: 1 if forward else -1]:
        at, next_layer = (layer - 1, layer) if forward else (layer, layer - 1)
        here = [node.index for node in reached if node.layer == at]
        taken.append(group[group[near].isin(here)])
        reached |= {FeatureId(next_layer, "res", index) for index in taken[-1][far]}
    return reached, pd.concat(taken)


def _node_table(
    suite: "Suite", nodes: Sequence[FeatureId], seeds: Sequence[FeatureId], classes: "pd.DataFrame"
) -> "pd.DataFrame":
    import pandas as pd

    rows = [(str(node), node.layer, node.module, node.index, node in seeds) for node in nodes]
    table = pd.DataFrame(rows, columns=["feature", "layer", "module", "index", "is_seed"])
    links = [feature_page(suite, node) or "" for node in nodes]
    table = table.assign(label="", label_from="", link=links)
    classes = classes.rename(columns={"feature": "index"}).assign(module="res")
    table = table.merge(classes, "left", ["layer", "module", "index"])
    for module in MODULES:
        sources = table.get(f"source_{module}", pd.Series(-1, table.index))
        ends = zip(table["layer"] - (module == "res"), sources, strict=True)
        names = [f"{layer}/{module}/{int(i)}" if i >= 0 else None for layer, i in ends]
        table[f"from_{module}"] = pd.Series(names, dtype=object)
    return table.reindex(columns=NODE_COLUMNS).astype(NODE_TYPES)


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

    What several chains share is listed with the first.
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
