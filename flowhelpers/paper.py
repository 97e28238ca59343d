"""Numbers that the paper prints, and how ours compare."""

from typing import TYPE_CHECKING

from flowhelpers.features import FeatureId
from flowhelpers.flow import FlowGraph

if TYPE_CHECKING:
    import pandas as pd

TABLE_5_SUITE = "gemma-2-2b"
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


def compare_table_5(graph: FlowGraph) -> "pd.DataFrame":
    """The paper's Table 5 beside our graph of the same feature, node by node.

    Args:
        graph: The flow of 24/res/14548 in gemma-2-2b by cosine, with `t_mlp=0.25` and no `t_res`.

    Returns:
        One row a layer and module: `paper` and `ours` (feature, or missing), `same`, and where the
        paper's text gives the score of the edge that leads on from it, `paper_score`, `our_score`
        and their `difference`. A feature of either that the other lacks is a row too.

    Raises:
        ValueError: If the graph is of another suite or seed, or was built otherwise.
    """
    import pandas as pd

    expected = {"method": "cosine", "top_n": 1, "t_res": None, "t_mlp": TABLE_5_T_MLP}
    expected |= {"backward": True, "forward": True}
    given = {name: graph.choices.get(name) for name in expected}
    if (graph.suite, graph.seeds, given) != (TABLE_5_SUITE, (str(TABLE_5_SEED),), expected):
        raise ValueError(
            f"Table 5 is of {TABLE_5_SEED} in {TABLE_5_SUITE} with {expected}:"
            f" given {', '.join(graph.seeds)} in {graph.suite} with {given}"
        )
    theirs = {(layer, "res"): index for layer, index in enumerate(TABLE_5_RES)}
    theirs |= {(layer, "mlp"): index for layer, index in TABLE_5_MLP.items()}
    nodes = graph.nodes[graph.nodes["module"] != "att"]
    ours = nodes.set_index(["layer", "module"])["index"].to_dict()
    edges = graph.edges.set_index(["source", "target"])["cosine"]
    scores = {source: (target, score) for (source, target), score in TABLE_5_SCORES.items()}
    rows = []
    for layer, module in sorted(theirs | ours, key=lambda place: (place[0], place[1] == "mlp")):
        indices = theirs.get((layer, module)), ours.get((layer, module))
        paper, mine = (None if i is None else FeatureId(layer, module, int(i)) for i in indices)
        target, paper_score = scores.get(paper, (None, None)) if paper else (None, None)
        our_score = edges.get((str(paper), str(target))) if target else None
        rows.append(
            {
                "layer": layer,
                "module": module,
                "paper": str(paper) if paper else None,
                "ours": str(mine) if mine else None,
                "same": paper == mine,
                "paper_score": paper_score,
                "our_score": our_score,
            }
        )
    table = pd.DataFrame(rows).astype({"paper_score": float, "our_score": float})
    return table.assign(difference=table["our_score"] - table["paper_score"])
