"""Flow graphs: chains of matches through the layers, with the predecessors in MLP and attention."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import networkx

from flowhelpers.core.features import MODULES, FeatureId, parse_feature, suggestion
from flowhelpers.labels.neuronpedia import feature_page
from flowhelpers.matching.scores import (
    best_matches,
    check_threshold,
    classify,
    dominant_module,
    feature_scores,
)

if TYPE_CHECKING:
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
        nodes: One row a feature; `link` is its page on Neuronpedia, or empty. Residual features
            have a `class`, and for each of `res`, `mlp`, `att` the best predecessor `from_res`, its
            score `s_res`, the null's quantile `null_res` and the threshold `high_res` that decides
            the class. What does not exist is missing.
        edges: One row a match: `module` of the source, `direction` (which side chose it), `score`
            (what the method ranks by), and the columns of the match table.
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
) -> FlowGraph:
    """The flow through one or several features (paper 3.3, B.2; CHOICES 25 and 26).

    Backward, each step goes to the best match of the node reached; forward, to the feature of the
    next layer whose score with the node is highest. Every residual node has its MLP and attention
    predecessors, which are not followed further. A seed at an MLP or attention has the flow of the
    residual features that it matches best. Flows of several seeds share nodes. The paper's B.2 has
    `t_res=0.5` and `t_mlp=t_att=0.15`, its Table 5 `t_mlp=0.25` and no `t_res`.

    Args:
        t_res: The chain ends where s(R) of a node is lower (CHOICES 26); by default it does not.
        t_mlp: MLP predecessors with a lower score are left out; likewise `t_att` for attention.
        top_n: How many matches of each node are followed.

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
    named = suite.features(seeds)
    if not named:
        raise ValueError("no seed given: expected a feature, such as 12/res/4230")
    for seed in named:
        if seed.layer not in {*table["layer"], *table["source_layer"]}:
            raise ValueError(f"the match table has nothing at layer {seed.layer}, of {seed}")

    matches = table[(table["rank"] <= top_n) & (table["source"] >= 0) & (table["feature"] >= 0)]
    limit = matches["module"].astype(object).map(limits).astype(float)
    matches = matches[~(_cut_scores(matches, table) < limit)]  # where there is no limit, it is NaN
    starts, from_seeds = {seed for seed in named if seed.module == "res"}, []
    for seed in [seed for seed in named if seed.module != "res"]:
        rows = matches[(matches["direction"] == "forward") & (matches["module"] == seed.module)]
        rows = rows[(rows["layer"] == seed.layer) & (rows["source"] == seed.index)]
        starts |= {FeatureId(seed.layer, "res", index) for index in rows["feature"]}
        from_seeds.append(rows)
    before, steps_back = _walk(matches, starts, "backward")
    after, steps_on = _walk(matches, starts, "forward")
    nodes = before | after
    places = [(node.layer, node.index) for node in nodes]
    modules = matches[(matches["direction"] == "backward") & (matches["module"] != "res")]
    modules = modules.merge(pd.DataFrame(places, columns=["layer", "feature"], dtype=int))
    edges = pd.concat([steps_back, steps_on, modules, *from_seeds])
    columns = [edges[name].astype(str) for name in ("source_layer", "module", "source")]
    edges["source"] = columns[0] + "/" + columns[1] + "/" + columns[2]
    edges["target"] = edges["layer"].astype(str) + "/res/" + edges["feature"].astype(str)
    edges = edges.drop_duplicates(["source", "target"])  # what both sides chose is backward
    order = ["layer", "feature", "module", "rank", "source"]
    edges = edges.astype({"module": str}).sort_values(order)
    edges = pd.DataFrame(edges[EDGE_COLUMNS].to_dict("records"), columns=EDGE_COLUMNS)
    nodes |= {*named, *map(parse_feature, edges["source"])}
    choices: dict[str, Any] = {"t_res": t_res, "t_mlp": t_mlp, "t_att": t_att, "top_n": top_n}
    choices["method"] = str(table["method"].iloc[0])
    in_order = sorted(nodes, key=lambda node: (node.layer, LANES.index(node.module), node.index))
    node_table = _node_table(suite, in_order, named, classify(feature_scores(table)))
    return FlowGraph(suite.name, tuple(map(str, named)), choices, node_table, edges)


def _cut_scores(matches: "pd.DataFrame", table: "pd.DataFrame") -> "pd.Series":
    """What a limit is held against: the score, but in a step on the s(R) of the node it reaches.

    That is the node's own best match back, which is at least the score of the step (paper B.2).
    """
    own = best_matches(table, module="res").set_index(["layer", "feature"])["score"]
    on = matches[(matches["direction"] == "forward") & (matches["module"] == "res")]
    reached = own.reindex(list(zip(on["layer"], on["feature"], strict=True))).set_axis(on.index)
    return matches["score"].where(~matches.index.isin(on.index), reached)


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
        table[f"from_{module}"] = [f"{at}/{module}/{i:.0f}" if i >= 0 else None for at, i in ends]
    return table.reindex(columns=NODE_COLUMNS).astype(NODE_TYPES)


def labelled(graph: FlowGraph, labels: "pd.DataFrame") -> FlowGraph:
    """The graph with labels (`feature`, `label`, `label_from`, as `describe_features` gives)."""
    known = labels.set_index("feature")
    nodes = graph.nodes.copy()
    for column in ("label", "label_from"):
        nodes[column] = nodes["feature"].map(known[column]).fillna(nodes[column])
    return replace(graph, nodes=nodes)


def keep_nodes(graph: FlowGraph, features: Iterable[str]) -> FlowGraph:
    """The graph of the seeds and the given features only, which the paper chooses by hand."""
    kept = {*features, *graph.seeds}
    nodes = graph.nodes[graph.nodes["feature"].isin(kept)].reset_index(drop=True)
    both = graph.edges["source"].isin(kept) & graph.edges["target"].isin(kept)
    return replace(graph, nodes=nodes, edges=graph.edges[both].reset_index(drop=True))


def ancestors(graph: FlowGraph, feature: FeatureId | str) -> list[str]:
    """The features of the graph with a path to the given one, by layer."""
    above = networkx.ancestors(graph.network, _node(graph, feature))
    return [name for name in graph.network if name in above]


def descendants(graph: FlowGraph, feature: FeatureId | str) -> list[str]:
    """The features of the graph that the given one has a path to, by layer."""
    below = networkx.descendants(graph.network, _node(graph, feature))
    return [name for name in graph.network if name in below]


def path(graph: FlowGraph, first: FeatureId | str, last: FeatureId | str) -> "pd.DataFrame":
    """The edges of the path from one feature to a later one with the least sum of (1 - score)."""
    ends = _node(graph, first), _node(graph, last)
    try:
        nodes = networkx.shortest_path(graph.network, *ends, lambda a, b, edge: 1 - edge["score"])
    except networkx.NetworkXNoPath as error:
        raise ValueError(f"no path leads from {first} to {last} in this graph") from error
    return graph.edges.set_index(["source", "target"]).loc[[*pairwise(nodes)]].reset_index()


def layer_by_layer(graph: FlowGraph) -> "pd.DataFrame":
    """The chain of a graph, one row a residual node, as in the paper's appendix E.

    `step` is the score of the step to the node, `high above` the thresholds that decide its class,
    for stream / MLP / attention, and `adds` the modules' matches with high scores.
    """
    chain, labels = graph.chain, graph.nodes.set_index("feature")["label"].str.replace("\n", "; ")
    steps = graph.edges[graph.edges["module"] == "res"].groupby("target")["score"].max()
    story = chain[["feature", *(f"s_{module}" for module in MODULES), "class"]]
    story.insert(1, "label", chain["feature"].map(labels))
    story.insert(2, "step", chain["feature"].map(steps).astype(float))
    limits = chain[[f"high_{module}" for module in MODULES]].map("{:.3f}".format)
    story["high above"] = limits.replace("nan", "–").agg(" / ".join, axis=1)
    adds = []
    for node in chain.to_dict("records"):
        high = [node[f"from_{m}"] for m in MODULES[1:] if node[f"s_{m}"] > node[f"high_{m}"]]
        adds.append(" | ".join(f"{source}: {labels[source]}" for source in high))
    return story.assign(adds=adds)


def linear_circuits(graph: FlowGraph) -> "pd.DataFrame":
    """The residual nodes with a high s(M) or s(A), a sign of a linear circuit (paper 3.4).

    They are those of class B, `processed`, where s(R) is high too, and of class C, `newborn`, where
    it is not. `turned_by` is the module of the highest such score. `nearer`, whether that score is
    above s(R), is our own mark and none of the paper's classes: the paper's example of a processed
    feature, 7/res/16335 with s(R) = 0.30 and s(M) = 0.82, bears it. Layer 0, which has no s(R), is
    left out.
    """
    chain = graph.chain
    chain["turned_by"] = dominant_module(chain)
    near = chain["s_mlp"].where(chain["turned_by"] == "mlp", chain["s_att"])
    chain["nearer"] = near > chain["s_res"]
    return chain[chain["turned_by"].notna() & chain["s_res"].notna()].reset_index(drop=True)


def cut_spans(graph: FlowGraph, t_res: float) -> "pd.DataFrame":
    """What a cut at `t_res` leaves of an uncut chain, by two readings of B.2 (CHOICES 26).

    A step back is the best match of the node that it leaves, and both readings hold its s(R)
    against `t_res`. A step forward counts by s(R) of the node it reaches, as a cut does, or by the
    score of the step itself, which is lower where that node has a better match back.

    Returns:
        One row a reading: `a step forward counts by`, and `first` and `last` layer around the seed.
    """
    import pandas as pd

    check_threshold(t_res, "t_res")
    chain, at = graph.chain, parse_feature(graph.seeds[0]).layer
    steps = graph.edges[graph.edges["module"] == "res"].groupby("target")["score"].max()
    readings = {"s(R) of the node reached": chain["s_res"]}
    readings["the score of the step"] = chain["feature"].map(steps)
    rows = []
    for reading, score in readings.items():
        ends = chain["layer"][~(score >= t_res)]  # layers that no step leads to; the first is one
        last = min(ends[ends > at], default=chain["layer"].max() + 1) - 1
        rows.append((reading, ends[ends <= at].max(), last))
    return pd.DataFrame(rows, columns=["a step forward counts by", "first", "last"])


def _node(graph: FlowGraph, feature: FeatureId | str) -> str:
    name = str(parse_feature(str(feature)))
    if name not in graph.network:
        raise ValueError(f"{name} is not in this graph{suggestion(name, graph.nodes['feature'])}")
    return name
