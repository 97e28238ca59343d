"""Numbers that the paper prints, and how ours compare."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flowhelpers.core.features import FeatureId, parse_feature
from flowhelpers.core.files import DATA
from flowhelpers.flow.graph import FlowGraph
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.groups.significance import NAMED_PAIRS, class_shares
from flowhelpers.suites.registry import GEMMA

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

TABLE_5_SUITE = GEMMA
TABLE_5_SEED = FeatureId(24, "res", 14548)
TABLE_5_T_MLP = 0.25
# Table 5: the flow of 24/res/14548, one residual feature a layer; it is not cut.
TABLE_5_RES = (
    *(14403, 13755, 12939, 16138, 11935, 14558, 2452, 16335, 9666, 8318, 13754, 7614, 2812),
    *(4955, 5262, 9388, 10649, 8130, 11987, 15694, 12523, 14511, 11460, 9592, 14548, 1646),
)
TABLE_5_MLP = {
    **{0: 12987, 1: 16168, 7: 6110, 17: 8454, 20: 601, 21: 594, 22: 14728},
    **{23: 6936, 24: 11342},
}
# Appendix E: the scores that its text gives, by source and target.
TABLE_5_SCORES = {
    (FeatureId(6, "res", 2452), FeatureId(7, "res", 16335)): 0.30,
    (FeatureId(7, "mlp", 6110), FeatureId(7, "res", 16335)): 0.82,
    (FeatureId(16, "res", 10649), FeatureId(17, "res", 8130)): 0.48,
    (FeatureId(17, "mlp", 8454), FeatureId(17, "res", 8130)): 0.79,
}
# Figures 2, 20 and 21: by seed, the figure and its thresholds. The paper gives those of Table 5
# alone, which is Figure 2. Its text reads the others from the first layers to the last, so the
# stream is not cut; their modules are as in B.2.
FLOW_FIGURES: dict[str, tuple[str, dict[str, float]]] = {
    str(TABLE_5_SEED): ("figure_2", {"t_mlp": TABLE_5_T_MLP}),
    "12/res/14455": ("figure_20", {"t_mlp": 0.15, "t_att": 0.15}),
    "12/res/4230": ("figure_21", {"t_mlp": 0.15, "t_att": 0.15}),
}
# The nodes that the text of appendix E names in them.
NAMED_NODES = {
    "figure_2": (*dict.fromkeys(str(f) for edge in TABLE_5_SCORES for f in edge), "24/res/14548"),
    "figure_20": ("12/res/14455", "17/res/9260", "18/res/2010"),
    "figure_21": ("12/res/4230",),
}

# Table 2: features for suppressing "Scientific concepts and entities"; B.1 has the prompt.
TABLE_2 = (
    *("3/res/9811", "18/res/14053", "18/res/1336", "20/res/4506", "21/res/13226", "22/res/9002"),
    *("22/res/15105", "23/res/4086", "24/res/7017", "24/res/14548"),
)
SUPPRESSION_PROMPT = "I think that the biggest problem of contemporary theoretical physics is "
# Table 3: the features that promote four themes; B.2 has the prompt, which ends with a space.
TABLE_3 = {
    "Anger and frustration": "12/res/4111",
    "Mental health issues": "12/res/16226",
    "Wedding and marriage": "12/res/4230",
    "Religion and God": "12/res/5483",
}
ACTIVATION_PROMPT = "I think "
# Table 4: features for promoting "Research methodology and experimentation" (C.3).
TABLE_4 = (
    *("12/res/6778", "16/res/13806", "18/res/1056", "18/res/7505", "23/res/10746"),
    *("24/res/11794", "24/res/1027", "24/res/7391", "24/res/1714", "25/res/6821"),
)
# Figure 13: of the features seen in a group (row), the share also seen in another (column).
FIGURE_13 = (
    (1, 0.49, 0.32, 0.19, 0.26, 0.17, 0.10, 0.11),
    (0.72, 1, 0.29, 0.20, 0.33, 0.22, 0.091, 0.13),
    (0.82, 0.50, 1, 0.25, 0.45, 0.18, 0.21, 0.18),
    (0.82, 0.59, 0.42, 1, 0.33, 0.45, 0.30, 0.28),
    (0.75, 0.66, 0.50, 0.22, 1, 0.22, 0.16, 0.22),
    (0.76, 0.72, 0.32, 0.49, 0.35, 1, 0.21, 0.33),
    (0.82, 0.51, 0.67, 0.57, 0.46, 0.37, 1, 0.42),
    (0.74, 0.62, 0.50, 0.47, 0.53, 0.50, 0.37, 1),
)
# Table 1, of 1,894 features of two layers of Gemma 2 2B: activation change and success.
TABLE_1 = {"top-1 cosine": (0.75, 0.65), "top-1 Pearson": (0.74, 0.65), "exhaustive": (0.83, 0.73)}
# Figure 14: shares of significant tests, the triangle above the diagonal row by row.
FIGURE_14 = {
    "s_res": (
        *(1, 1, 0.76, 1, 1, 0.95, 0.95, 1, 1, 0.99, 0.82, 1, 0.96, 0.97, 1, 1, 0.67, 1),
        *(0.96, 1, 0.97, 0.95, 0.99, 1, 0.56, 1, 0.99, 1),
    ),
    "s_mlp": (
        *(0.93, 1, 0.81, 1, 0.85, 1, 0.98, 1, 0.96, 1, 0.84, 1, 1, 1, 1, 1, 0.72, 0.97),
        *(0.94, 0.96, 1, 0.96, 1, 1, 0.58, 1, 1, 1),
    ),
    "s_att": (
        *(0.86, 0.84, 1, 0.94, 1, 1, 1, 0.95, 1, 0.94, 1, 1, 1, 1, 0.97, 0.99, 1, 1),
        *(1, 0.67, 0.81, 0.98, 1, 1, 1, 0.72, 0.82, 0.56),
    ),
}


def is_of_paper(suite: str) -> bool:
    """Whether a suite of this name is the one of the paper's tables: Gemma 2 2B with 16k SAEs.

    So are its choices of SAEs by L0 and of modules; the paper does not name the L0 of its SAEs.
    """
    bare, *asked = suite.split("@")
    return bare == TABLE_5_SUITE and "65k" not in asked


def paper_labels(suite: "Suite") -> "pd.DataFrame":
    """The interpretations that the paper's text gives of features, few and as it words them.

    As `labels.read_labels` gives labels; `label_from` says where in the paper. Empty for a suite
    that is not the paper's.
    """
    import pandas as pd

    table = pd.read_csv(DATA / "paper" / "labels.csv")
    there = [parse_feature(name).site in suite.saes for name in table["feature"]]
    return table[[is_of_paper(suite.name) and known for known in there]]


def compare_named_nodes(graphs: Mapping[str, FlowGraph]) -> "pd.DataFrame":
    """Whether graphs, by the figure's name in `NAMED_NODES`, have the nodes that the paper names.

    Returns:
        One row a node: `figure`, `paper` (the feature), `ours` (what the graph has at its site, or
        missing) and `verdict`, `same` or `other`.
    """
    import pandas as pd

    rows = []
    for figure, graph in graphs.items():
        sites = graph.nodes["feature"].map(lambda name: parse_feature(name).site)
        for named in NAMED_NODES[figure]:
            ours = graph.nodes.loc[sites == parse_feature(named).site, "feature"].tolist()
            verdict = "same" if named in ours else "other"
            rows.append((figure, named, ", ".join(ours) or None, verdict))
    return pd.DataFrame(rows, columns=["figure", "paper", "ours", "verdict"])


def compare_table_1(rates: "pd.DataFrame") -> "pd.DataFrame":
    """The paper's Table 1 beside ours, whatever the suite: it is of Gemma 2 2B.

    `rates` are what `deactivation.success_rates` gives by `method`; they are put in the paper's
    order, with `paper_change` and `paper_success`.
    """
    theirs = rates["method"].map(TABLE_1)
    found = rates.assign(paper_change=theirs.str[0], paper_success=theirs.str[1])
    order = [*TABLE_1, *sorted(set(rates["method"]) - set(TABLE_1))]
    key = found["method"].map(order.index)
    return found.iloc[key.argsort(kind="stable")].reset_index(drop=True)


def compare_figure_13(transition: "pd.DataFrame") -> "pd.DataFrame":
    """The paper's Figure 13 beside what `groups.transition_intervals` gives of gemma-2-2b."""
    import pandas as pd

    theirs = pd.DataFrame(FIGURE_13, index=GROUPS, columns=GROUPS).stack().rename("paper")
    keys = ["first", "second"]
    return _beside(theirs.rename_axis(keys).reset_index(), transition, keys)


def figure_14() -> "pd.DataFrame":
    """The paper's Figure 14 as rows: `score`, `first`, `second`, `paper`."""
    import pandas as pd

    rows = [
        (score, *pair, share)
        for score, shares in FIGURE_14.items()
        for pair, share in zip(NAMED_PAIRS, shares, strict=True)
    ]
    return pd.DataFrame(rows, columns=["score", "first", "second", "paper"])


def compare_figure_14(pairs: "pd.DataFrame") -> "pd.DataFrame":
    """The paper's Figure 14 beside what `groups.pair_shares` gives of gemma-2-2b.

    The paper's text names 67, 72 and 100 % of one pair.
    """
    return _beside(figure_14(), pairs, ["score", "first", "second"], "tests")


def paper_figure_4() -> "pd.DataFrame":
    """The paper's Figure 4, the means of its Figure 14: `module`, `pair`, `score`, `paper`."""
    tests = figure_14().rename(columns={"paper": "significant"}).assign(p=0, effect=0)
    return class_shares(tests).drop(columns="tests").rename(columns={"share": "paper"})


def compare_figure_4(classes: "pd.DataFrame") -> "pd.DataFrame":
    """The paper's Figure 4, the means of its Figure 14, beside what `groups.class_shares` gives."""
    return _beside(paper_figure_4(), classes, ["module", "pair", "score"])


def _beside(
    paper: "pd.DataFrame", ours: "pd.DataFrame", keys: list[str], *more: str
) -> "pd.DataFrame":
    """Shares of the paper with ours of the same keys, their `difference`, and `more` columns."""
    ours = ours.rename(columns={"share": "ours"})[[*keys, "ours", *more]]
    table = paper.merge(ours, how="left", on=keys)
    return table.assign(difference=table["ours"] - table["paper"])


def compare_table_5(graph: FlowGraph) -> "pd.DataFrame":
    """The paper's Table 5 beside our graph of the same feature, node by node.

    The graph is of 24/res/14548 in gemma-2-2b by cosine, with `t_mlp=0.25` and no `t_res`.

    Returns:
        One row a layer and module: `paper` and `ours` (feature, or missing), `same`, and where the
        paper's text gives the score of the edge that leads on from it, `paper_score`, `our_score`
        and their `difference`. A feature of either that the other lacks is a row too.

    Raises:
        ValueError: If the graph is of another suite or seed, or was built otherwise.
    """
    import pandas as pd

    expected = {"method": "cosine", "top_n": 1, "t_res": None, "t_mlp": TABLE_5_T_MLP}
    given = {name: graph.choices.get(name) for name in expected}
    if not is_of_paper(graph.suite) or (graph.seeds, given) != ((str(TABLE_5_SEED),), expected):
        raise ValueError(
            f"Table 5 is of {TABLE_5_SEED} in {TABLE_5_SUITE} with {expected}:"
            f" given {', '.join(graph.seeds)} in {graph.suite} with {given}"
        )
    theirs = {(layer, "res"): index for layer, index in enumerate(TABLE_5_RES)}
    theirs |= {(layer, "mlp"): index for layer, index in TABLE_5_MLP.items()}
    nodes = graph.nodes[graph.nodes["module"] != "att"]
    ours = nodes.set_index(["layer", "module"])["index"].to_dict()
    edges = graph.edges.set_index(["source", "target"])["cosine"]
    scores = {str(source): (target, score) for (source, target), score in TABLE_5_SCORES.items()}
    rows = []
    for layer, module in sorted(theirs | ours, key=lambda place: (place[0], place[1] == "mlp")):
        indices = theirs.get((layer, module)), ours.get((layer, module))
        paper, mine = (None if i is None else f"{layer}/{module}/{i}" for i in indices)
        target, paper_score = scores.get(str(paper), (None, None))
        our_score = edges.get((paper, str(target)))
        rows.append((layer, module, paper, mine, paper == mine, paper_score, our_score))
    columns = ["layer", "module", "paper", "ours", "same", "paper_score", "our_score"]
    table = pd.DataFrame(rows, columns=columns)
    table = table.astype({"paper_score": float, "our_score": float})
    return table.assign(difference=table["our_score"] - table["paper_score"])
