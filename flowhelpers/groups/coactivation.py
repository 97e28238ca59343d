"""Do features whose directions are alike act together: matches beside co-activation.

The measures are those of Balcells et al. (2024), over all tokens, those where neither is active
included: Pearson's correlation, Jaccard's index, and how often each is active given the other.
"""

from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.matching.matchers import LEAST_ACTIVE
from flowhelpers.matching.scores import best_matches

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csc_matrix

MEASURES = ("pearson", "jaccard", "source_given_target", "target_given_source")


def coactivation_of_matches(
    matches: "pd.DataFrame", activations: FeatureActivations, least_active: int = LEAST_ACTIVE
) -> "pd.DataFrame":
    """Co-activation of every residual feature with its best matches.

    Returns:
        The match's columns, `n_target`, `n_source`, `n_both` (tokens), and the `MEASURES`:
        `source_given_target` is the share of the target's tokens on which the source is active too.
        They are missing where either is active on fewer than `least_active` tokens.
    """
    import pandas as pd

    best = best_matches(matches)
    best = best[best["source"] >= 0]
    columns = ["layer", "module", "feature", "source_layer", "source", "score", "cosine", "null"]
    parts = []
    for (layer, module), part in best.groupby(["layer", "module"], observed=True):
        site = Site(int(part["source_layer"].iloc[0]), str(module))
        targets = activations.by_site[Site(int(layer), "res")].tocsc()[:, part["feature"]]
        sources = activations.by_site[site].tocsc()[:, part["source"]]
        parts.append(part[columns].assign(**_measures(targets, sources)))
    pairs = pd.concat(parts, ignore_index=True).astype({"layer": int, "module": str})
    few = pairs[["n_target", "n_source"]].min(axis=1) < least_active
    pairs[[*MEASURES]] = pairs[[*MEASURES]].mask(few)
    return pairs


def _measures(target: "csc_matrix", source: "csc_matrix") -> dict[str, np.ndarray]:
    """Of each column of one with the same column of the other."""

    def mean(values: "csc_matrix") -> np.ndarray:
        return values.sum(axis=0).A1 / values.shape[0]

    target, source = target.astype(np.float64), source.astype(np.float64)
    on, source_on = ((side > 0).astype(np.int64) for side in (target, source))
    n, n_source, both = (some.sum(axis=0).A1 for some in (on, source_on, on.multiply(source_on)))
    variance, source_variance = (mean(side.power(2)) - mean(side) ** 2 for side in (target, source))
    covariance = mean(target.multiply(source)) - mean(target) * mean(source)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "n_target": n,
            "n_source": n_source,
            "n_both": both,
            "pearson": np.clip(covariance / np.sqrt(variance * source_variance), -1, 1),
            "jaccard": both / (n + n_source - both),
            "source_given_target": both / n,
            "target_given_source": both / n_source,
        }


def disagreements(pairs: "pd.DataFrame", n: int = 10) -> "pd.DataFrame":
    """Pairs with a cosine from 0.5 but a Pearson correlation below 0.3, and the reverse.

    At most `n` of each `kind`: the lowest correlations of the first, the highest of the reverse.
    """
    import pandas as pd

    order = ["pearson", "layer", "feature"]
    apart = pairs[(pairs["cosine"] >= 0.5) & (pairs["pearson"] < 0.3)].sort_values(order)
    close = pairs[(pairs["cosine"] < 0.5) & (pairs["pearson"] >= 0.3)]
    close = close.sort_values(order, ascending=[False, True, True])
    kinds = {"near, not together": apart, "together, not near": close}
    return pd.concat([rows.head(n).assign(kind=k) for k, rows in kinds.items()], ignore_index=True)


def coactivation_by_cosine(pairs: "pd.DataFrame", smallest: int = 10) -> "pd.DataFrame":
    """Medians of each measure by cosine, in bins of width 0.1 with at least `smallest` pairs."""
    known = pairs[pairs["pearson"].notna()]
    middle = (np.floor(known["cosine"].clip(upper=0.999) / 0.1) + 0.5) * 0.1
    cells = known.groupby(["module", middle])
    table = cells[[*MEASURES]].median().assign(pairs=cells.size()).reset_index()
    return table[table["pairs"] >= smallest]
