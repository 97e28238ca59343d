"""Flow of one feature: the chain of best matches through the layers, with module predecessors."""

from typing import TYPE_CHECKING

import torch

from flowhelpers.features import FeatureId, Site
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
        One row a residual node, by layer: `feature`, `is_seed`, and for each of `res`, `mlp`,
        `att` the predecessor `from_res` …, its cosine `s_res` … and the null's quantile
        `null_res` …; the predecessor is missing where there is no match.

    Raises:
        ValueError: If the feature does not exist or is not residual.
    """
    import pandas as pd

    seed = suite.feature(seed)
    if seed.module != "res":
        raise ValueError(f"{seed} lies at {seed.site}: a flow starts from a residual feature")
    lookup = scores.set_index(["layer", "feature"])
    chain = [seed]
    while chain[0].layer > 0:
        source = int(lookup.loc[(chain[0].layer, chain[0].index), "source_res"])
        if source < 0:
            break
        chain.insert(0, FeatureId(chain[0].layer - 1, "res", source))
    while chain[-1].layer < suite.layers - 1:
        direction = suite.dictionary(chain[-1].site).directions[chain[-1].index]
        following = suite.dictionary(Site(chain[-1].layer + 1, "res")).directions
        best = int(top_k_cosine(direction[None], following, 1).indices[0, 0])
        if best < 0:
            break
        chain.append(FeatureId(chain[-1].layer + 1, "res", best))
    rows = []
    for node in chain:
        row = lookup.loc[(node.layer, node.index)]
        record: dict[str, object] = {"feature": str(node), "is_seed": node == seed}
        for module in ("res", "mlp", "att"):
            source = row.get(f"source_{module}")
            known = source is not None and source == source and source >= 0
            at = node.layer - (module == "res")
            record[f"from_{module}"] = str(FeatureId(at, module, int(source))) if known else None
            record[f"s_{module}"] = float(row.get(f"s_{module}", torch.nan))
            record[f"null_{module}"] = float(row.get(f"null_{module}", torch.nan))
        rows.append(record)
    return pd.DataFrame(rows)
