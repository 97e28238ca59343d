"""Does removing the source that a method names remove the target, however far below it lies?"""

from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.deactivation.targets import equal_norm
from flowhelpers.interventions.batched import intervene

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.model import Tokens


def remove_sources(
    suite: "Suite",
    tokens: "Tokens",
    targets: "pd.DataFrame",
    sources: "pd.DataFrame",
    activations: FeatureActivations,
    hop: int,
    seed: int = 0,
) -> "pd.DataFrame":
    """Removes each target's source `hop` layers below, at the target's token (paper 5.2).

    The control removes another feature that is active there, by the same norm (CHOICES 33), the
    same one whichever method names the source. As in Table 1, a source that is not active has
    changed nothing, so that all methods are judged by the same targets (CHOICES 34).

    Args:
        targets: Of one layer, as of `deactivation.draw_targets`; `activations` are their sample's.
        sources: `method`, `feature` (of the target), `source` (-1: none).

    Returns:
        One row a method and target: `method`, `hop`, `target`, `text`, `found` (1 where the source
        is active), `change` and `success` (as of `deactivation.deactivate`), `control` (the
        control's change) and `beyond`, by how much `change` exceeds it; both missing where no
        other feature is active.
    """
    layer = int(targets["layer"].iloc[0])
    shifted = targets.assign(layer=layer - hop + 1)  # whose predecessor's site is the sources'
    codes = activations.by_site[Site(layer - hop, "res")]
    parts = targets.reset_index(names="target").merge(sources, on="feature", how="inner")
    rows, columns = parts["token_row"].to_numpy(), parts["source"].clip(lower=0).to_numpy()
    values = np.asarray(codes[rows, columns], dtype=float).ravel()
    parts = parts.assign(module="res", rank=1, hop=hop, activation=values)
    parts.loc[parts["source"] < 0, "activation"] = 0.0
    parts["found"] = (parts["activation"] > 0).astype(float)
    active = parts[parts["found"] > 0].assign(feature=lambda table: table["source"])
    # A method and target is a target of its own to the control.
    named = shifted.loc[active["target"]].set_axis(active.index)
    own = active[["module", "feature", "rank", "activation"]].rename_axis("target").reset_index()
    drawn = equal_norm(suite, named, own, activations, [(seed, at) for at in active["target"]])
    other = drawn.set_index("target")[["module", "feature", "activation"]]
    for name, edits in (("new", active), ("other", other)):
        cases = named.loc[edits.index].reset_index(drop=True)
        edits = edits[["module", "feature"]].assign(amount=-edits["activation"])
        about = {"case": range(len(cases)), "layer": layer, "module": "res"}
        reads = cases[["feature"]].assign(**about)
        read, _ = intervene(suite, tokens, cases, edits.assign(case=about["case"]), reads)
        parts.loc[edits.index, "old"] = read["old"].to_numpy()
        parts.loc[edits.index, name] = read["new"].to_numpy()
    is_found = parts["found"] > 0
    parts["change"] = (1 - parts["new"] / parts["old"]).where(is_found, 0.0)
    parts["success"] = (parts["new"] == 0).astype(float).where(is_found, 0.0)
    parts["control"] = (1 - parts["other"] / parts["old"]).where(is_found, 0.0)
    parts["beyond"] = parts["change"] - parts["control"]
    kept = ["method", "hop", "target", "text", "found", "change", "success", "control", "beyond"]
    return parts[kept]
