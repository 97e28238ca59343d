"""Flow of one feature: the chain of best matches through the layers, with module predecessors."""

from typing import TYPE_CHECKING

import torch

from flowhelpers.features import MODULES, FeatureId, Site
from flowhelpers.matching import top_k_cosine

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites import Suite


def trace(suite: "Suite", seed: FeatureId | str, scores: "pd.DataFrame") -> "pd.DataFrame":
    """The residual chain through a feature, backward and forward (paper 3.4; CHOICES 25).

    Backward, each step goes to the best match of the node reached, as in the match table; forward,
    to the feature of the next layer whose cosine with the node is highest. Every residual node
    has its MLP and attention predecessor.

    Args:
        suite: The suite.
        seed: A residual feature.
        scores: One row a feature, as `matching.scores` gives.

    Returns:
        One row a residual node, by layer: `feature`, `is_seed`, `previous` (the node before it in
        the chain) with its cosine `s_previous`, and for each of `res`, `mlp`, `att` the
        predecessor `from_res` …, its cosine `s_res` … and the null's quantile `null_res` …; what
        does not exist is missing. Up to the seed `previous` is `from_res`; after it the two differ
        where the node's own best match is another feature.

    Raises:
        ValueError: If the feature does not exist or is not residual.
    """
    import pandas as pd

    seed = suite.feature(seed)
    if seed.module != "res":
        raise ValueError(f"{seed} lies at {seed.site}: a flow starts from a residual feature")
    lookup = scores.set_index(["layer", "feature"])

    def row_of(node: FeatureId) -> "pd.Series | dict[str, float]":
        key = (node.layer, node.index)
        return lookup.loc[key] if key in lookup.index else {}  # no site precedes this one

    def predecessor(node: FeatureId, module: str) -> FeatureId | None:
        source = row_of(node).get(f"source_{module}", torch.nan)
        return (
            FeatureId(node.layer - (module == "res"), module, int(source)) if source >= 0 else None
        )

    chain = [seed]
    while before := predecessor(chain[0], "res"):
        chain.insert(0, before)
    while (site := Site(chain[-1].layer + 1, "res")) in suite.dictionaries:
        direction = suite.dictionary(chain[-1].site).directions[chain[-1].index]
        best = int(top_k_cosine(direction[None], suite.dictionary(site).directions).indices)
        if best < 0:
            break
        chain.append(FeatureId(site.layer, "res", best))
    rows = []
    for before, node in zip([None, *chain], chain, strict=False):
        row = row_of(node)
        record: dict[str, object] = {"feature": str(node), "is_seed": node == seed}
        for module in MODULES:
            source = predecessor(node, module)
            record[f"from_{module}"] = str(source) if source else None
            record[f"s_{module}"] = float(row.get(f"s_{module}", torch.nan))
            record[f"null_{module}"] = float(row.get(f"null_{module}", torch.nan))
        record["previous"] = str(before) if before else None
        record["s_previous"] = _cosine(suite, before, node) if before else torch.nan
        rows.append(record)
    return pd.DataFrame(rows)


def members(flow: "pd.DataFrame") -> list[str]:
    """Every feature of a flow, each once: its nodes and the predecessors of each."""
    columns = [flow[column] for column in ("feature", "from_res", "from_mlp", "from_att")]
    return list(dict.fromkeys(name for column in columns for name in column.dropna()))


def _cosine(suite: "Suite", first: FeatureId, second: FeatureId) -> float:
    one, two = (suite.dictionary(node.site).directions[node.index] for node in (first, second))
    return float(one.float() @ two.float())
