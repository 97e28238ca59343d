"""What matches are held against: other features of equal norm, and the best of all (Table 1)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import MODULES, predecessor_site
from flowhelpers.deactivation.ablation import concat_methods, deactivate
from flowhelpers.deactivation.targets import active_predecessors

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.model import Tokens

CONTROL = "equal norm, random"


def equal_norm(
    suite: "Suite",
    targets: "pd.DataFrame",
    sources: "pd.DataFrame",
    activations: FeatureActivations,
    seed: int = 0,
) -> "pd.DataFrame":
    """The control that the paper lacks: other active features, same norm of change (CHOICES 33).

    Each predecessor is replaced by another feature drawn from those active at the same site and
    token, its activation scaled so that removing it changes what its SAE reads by the same norm,
    even where that is more than the feature writes.

    Returns:
        As `active_predecessors`; targets that have no other feature active at a site are left out.
    """
    import torch

    predecessors = active_predecessors(sources)
    _check_single("the control", predecessors)
    rng = np.random.default_rng(seed)
    keys = ["target", "module"]
    sites = predecessors.join(targets[["layer", "token_row"]], on="target")
    others = _every_active(sites, activations)
    others = others.merge(predecessors[[*keys, "feature"]], on=keys, suffixes=("", "_own"))
    by_site = others[others["feature"] != others["feature_own"]].groupby(keys, sort=False)
    drawn = by_site["feature"].agg(lambda features: rng.choice(np.sort(features)))
    sites = sites.join(drawn.rename("other"), on=keys)
    alone = sites.loc[sites["other"].isna(), "target"]
    sites = sites[~sites["target"].isin(alone)].reset_index(drop=True).astype({"other": int})
    for (layer, module), part in sites.groupby(["layer", "module"]):
        sae = suite.sae(predecessor_site(int(layer), str(module)))
        features = torch.tensor(part[["feature", "other"]].to_numpy())
        own, other = sae.decoder_rows(features).float().norm(dim=-1).cpu().numpy().T
        sites.loc[part.index, "activation"] = part["activation"] * own / other
    return sites.assign(feature=sites["other"])[[*predecessors.columns]]


def table_1(
    suite: "Suite",
    tokens: "Tokens",
    targets: "pd.DataFrame",
    by_method: "Mapping[str, pd.DataFrame]",
    activations: FeatureActivations,
    all_sites: bool = False,
) -> "pd.DataFrame":
    """Single matches against the best of all active candidates (Table 1; CHOICES 13, 34).

    A target's site is where a method finds its only predecessor; other targets are left out. A
    method that finds predecessors at several sites, or none, is held to the site that another one
    named. The search tries the features of the named sites, or of `all_sites`.

    Returns:
        One row for each method, the search among them as "exhaustive", and target: `method`,
        `target`, `change`, `success`, `tried` (interventions), `layer`, `feature`, `dataset`,
        `text`. A method without an active match at the site has tried 0 and changed nothing;
        `change` and `success` are missing for a target that is not active.
    """
    import pandas as pd

    predecessors, only_site = {}, {}
    for method, sources in by_method.items():
        _check_single(method, sources)
        predecessors[method] = active = active_predecessors(sources)
        alone = active[~active["target"].duplicated(keep=False)]
        only_site[method] = alone.set_index("target")["module"]
    named = pd.concat(only_site.values())
    if named.empty:
        raise ValueError("no target has a single source")
    first_named = named.groupby("target").first()
    chosen = targets.loc[first_named.index]
    cases = {}
    for method, active in predecessors.items():
        module = only_site[method].reindex(chosen.index).fillna(first_named)
        cases[method] = _one_by_one(active[active["target"].map(module) == active["module"]])
    searched = named.reset_index().drop_duplicates()
    if all_sites:
        searched = searched[["target"]].merge(pd.Series(MODULES, name="module"), how="cross")
    searched = searched.drop_duplicates().join(chosen[["layer", "token_row"]], on="target")
    cases["exhaustive"] = _one_by_one(_every_active(searched, activations))
    table = deactivate(suite, tokens, targets, *concat_methods(cases))
    keys = ["method", "target"]
    tried = table.groupby(keys).size().rename("tried")
    best = table.sort_values("change", kind="stable").drop_duplicates(keys, keep="last")
    best = best.set_index(keys)[["change", "success"]].join(tried)
    best = best.reindex(pd.MultiIndex.from_product([cases, chosen.index], names=keys))
    best.loc[best["tried"].isna()] = 0.0
    about = chosen[["layer", "feature", "dataset", "text"]]
    return best.reset_index().join(about, on="target").astype({"tried": int})


def _check_single(method: str, sources: "pd.DataFrame") -> None:
    if sources.duplicated(["target", "module"]).any():
        raise ValueError(f"{method} has several matches at a site: expected one (top-1)")


def _every_active(searched: "pd.DataFrame", activations: FeatureActivations) -> "pd.DataFrame":
    """All features that are active at the modules and tokens of targets."""
    import pandas as pd

    parts = []
    for (layer, module), part in searched.groupby(["layer", "module"]):
        at_site = activations.by_site[predecessor_site(int(layer), str(module))]
        codes = at_site[part["token_row"].to_numpy()].tocoo()
        columns = {"feature": codes.col, "activation": codes.data}
        parts.append(part[["target", "module"]].iloc[codes.row].assign(**columns))
    return active_predecessors(pd.concat(parts))


def _one_by_one(predecessors: "pd.DataFrame") -> "tuple[pd.DataFrame, pd.DataFrame]":
    predecessors = predecessors.reset_index(drop=True)
    edits = predecessors.reset_index(names="case").assign(amount=-predecessors["activation"])
    return predecessors[["target"]].assign(r=0.0), edits[["case", "module", "feature", "amount"]]
