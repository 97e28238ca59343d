"""Do features whose directions are alike act together: matches beside co-activation.

The measures are those of Balcells et al. (2024), over all tokens, those where neither is active
included: Pearson's correlation, Jaccard's index, and how often each is active given the other.
"""

from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.matching.matchers import LEAST_ACTIVE

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csc_matrix

MEASURES = ("pearson", "jaccard", "source_given_target", "target_given_source")


def coactivation_of_matches(
    matches: "pd.DataFrame", activations: FeatureActivations, least_active: int = LEAST_ACTIVE
) -> "pd.DataFrame":
    """How matched features are active together: every best match of a residual feature.

    Args:
        matches: A match table, by any method.
        activations: Activations at all sites.
        least_active: Tokens on which each has to be active, for the measures to say anything.

    Returns:
        One row a feature and module with a match: `layer`, `module`, `feature`, `source_layer`,
        `source`, `score`, `cosine`, `null`, `n_target`, `n_source`, `n_both` (tokens), `pearson`,
        `jaccard`, `source_given_target` (the share of the target's tokens on which the source is
        active too) and `target_given_source`. Measures are missing where either is active on fewer
        than `least_active` tokens.
    """
    import pandas as pd

    best = matches[(matches["direction"] == "backward") & (matches["rank"] == 1)]
    best = best[best["source"] >= 0]
    parts = []
    for (layer, module), part in best.groupby(["layer", "module"], observed=True):
        source_layer = int(part["source_layer"].iloc[0])
        target = activations.by_site[Site(int(layer), "res")].tocsc()
        source = activations.by_site[Site(source_layer, str(module))].tocsc()
        ends = part["feature"].to_numpy(), part["source"].to_numpy()
        columns = ["feature", "source_layer", "source", "score", "cosine", "null"]
        frame = part[columns].reset_index(drop=True)
        frame.insert(0, "layer", int(layer))
        frame.insert(1, "module", str(module))
        parts.append(frame.assign(**_measures(target[:, ends[0]], source[:, ends[1]])))
    found = pd.concat(parts, ignore_index=True)
    few = found[["n_target", "n_source"]].min(axis=1) < least_active
    found[[*MEASURES]] = found[[*MEASURES]].mask(few)
    return found


def _measures(target: "csc_matrix", source: "csc_matrix") -> dict[str, np.ndarray]:
    """Of each column of one with the same column of the other."""
    tokens = target.shape[0]
    on = [(side > 0).astype(np.int64) for side in (target, source)]
    n_target, n_source = (side.sum(axis=0).A1 for side in on)
    both = on[0].multiply(on[1]).sum(axis=0).A1
    sides = [side.astype(np.float64) for side in (target, source)]
    means = [side.sum(axis=0).A1 / tokens for side in sides]
    squares = [side.multiply(side).sum(axis=0).A1 / tokens for side in sides]
    spreads = [np.sqrt(np.maximum(s - m**2, 0)) for s, m in zip(squares, means, strict=True)]
    product = sides[0].multiply(sides[1]).sum(axis=0).A1 / tokens
    scale = spreads[0] * spreads[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "n_target": n_target,
            "n_source": n_source,
            "n_both": both,
            "pearson": np.clip((product - means[0] * means[1]) / scale, -1, 1),
            "jaccard": both / (n_target + n_source - both),
            "source_given_target": both / n_target,
            "target_given_source": both / n_source,
        }


def disagreements(
    found: "pd.DataFrame", near: float = 0.5, together: float = 0.3, n: int = 10
) -> "pd.DataFrame":
    """Where the weights mislead: near but not active together, and active together but not near.

    Args:
        found: What `coactivation` gives, of matches by cosine or by correlation.
        near: The cosine from which directions count as near.
        together: The correlation from which features count as active together.
        n: The most rows of each kind.

    Returns:
        Rows of `found` with `kind`, `near, not together` or `together, not near`, those furthest
        from what the other measure says first.
    """
    import pandas as pd

    there = found[found["pearson"].notna()]
    apart = there[(there["cosine"] >= near) & (there["pearson"] < together)]
    apart = apart.sort_values(["pearson", "layer", "feature"]).head(n)
    close = there[(there["cosine"] < near) & (there["pearson"] >= together)]
    close = close.sort_values(["pearson", "layer", "feature"], ascending=[False, True, True]).head(
        n
    )
    kinds = [apart.assign(kind="near, not together"), close.assign(kind="together, not near")]
    return pd.concat(kinds, ignore_index=True)


def by_cosine(found: "pd.DataFrame", width: float = 0.1, smallest: int = 10) -> "pd.DataFrame":
    """Medians of co-activation by the cosine of the match.

    Args:
        found: What `coactivation` gives.
        width: Of a range of cosines.
        smallest: Ranges with fewer pairs are left out.

    Returns:
        One row a module and range: `module`, `cosine` (the middle of the range), `pairs`, and the
        median of each measure.
    """
    there = found[found["pearson"].notna()]
    middle = (np.floor(there["cosine"].clip(upper=0.999) / width) + 0.5) * width
    cells = there.assign(middle=middle).groupby(["module", "middle"])
    table = cells[[*MEASURES]].median().assign(pairs=cells.size()).reset_index()
    return table[table["pairs"] >= smallest].rename(columns={"middle": "cosine"})
