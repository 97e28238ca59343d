"""Two ways to match layers that are far apart: step by step, and directly."""

from typing import TYPE_CHECKING

import torch

from flowhelpers.core.features import Site
from flowhelpers.matching.cosine import top_k_cosine
from flowhelpers.matching.null import null_cosines, null_threshold
from flowhelpers.matching.scores import best_matches

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite


def far_matches(
    suite: "Suite", table: "pd.DataFrame", first: int, last: int, seed: int = 0
) -> "pd.DataFrame":
    """Every residual feature of a layer, and its match in a much earlier one, found in two ways.

    Returns:
        One row a feature of layer `last`: `feature`; `chain_end`, where the best matches back lead
        in layer `first` (-1 if a step has none), `chain_cosine`, the cosine of the two, `product`,
        that of the steps, and `steps_above`, whether all steps are above chance; `direct`, the
        feature of layer `first` of highest cosine, and `direct_cosine`. The null lines are of this
        pair of layers: `direct_null`, the 99.9 % quantile of the best cosine of random directions
        there, and `chain_null`, that of a single cosine: a chain does not choose its end by it.
    """
    import pandas as pd

    ends = suite.sae(Site(last, "res")).directions, suite.sae(Site(first, "res")).directions
    best = best_matches(table, "backward", "res").set_index(["layer", "feature"])
    found = pd.DataFrame({"feature": range(len(ends[0]))})
    at, product, above = found["feature"], 1.0, True
    for layer in range(last, first, -1):
        step = best.loc[layer].reindex(at)
        product = product * step["cosine"].fillna(0.0).to_numpy()
        above = above & (step["score"] > step["null"]).to_numpy()
        at = step["source"].fillna(-1).astype(int).reset_index(drop=True)
    chain = torch.tensor(at.to_numpy(), device=ends[1].device)
    cosine = (ends[0].to(ends[1]) * ends[1][chain]).sum(1).where(chain >= 0, 0.0)
    direct = top_k_cosine(*ends)
    return found.assign(
        chain_end=at,
        chain_cosine=cosine.cpu().numpy(),
        product=product,
        steps_above=above,
        direct=direct.indices[:, 0].cpu().numpy(),
        direct_cosine=direct.scores[:, 0].cpu().numpy(),
        direct_null=null_threshold(null_cosines(ends[1], seed)),
        chain_null=null_threshold(null_cosines(ends[1][:1], seed)),
    )
