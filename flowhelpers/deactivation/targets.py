"""Targets of the deactivation experiments, and their predecessors.

A target is an active residual feature at one token. Its sources are its matches at R_{L-1}, M_L and
A_L; those that are active at that token are its predecessors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flowhelpers.activations.sampling import text_length
from flowhelpers.activations.sparse import FeatureActivations, collect
from flowhelpers.core.features import MODULES, FeatureId, Site, predecessor_site
from flowhelpers.groups.occurrences import group_names, with_dataset
from flowhelpers.suites.model import token_strings

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

CONTROL = "another active feature"


def middle_layers(layers: int) -> list[int]:
    """Three layers spread over the depth: 6, 12 and 18 of Gemma 2 2B's 26, as in the paper."""
    step = max(layers // 4, 1)
    return [layer for layer in (step, 2 * step, 3 * step) if layer < layers]


def draw_targets(
    activations: FeatureActivations, layers: Sequence[int], per_token: int = 25, seed: int = 0
) -> pd.DataFrame:
    """Active residual features at a sample's tokens, at most `per_token` of each (paper A.2).

    One row a target: `layer`, `feature`, `token_row`, `activation`, and the token's columns.
    """
    import pandas as pd

    if per_token < 1:
        raise ValueError(f"per_token={per_token}: expected 1 or more")
    readable = sorted(site.layer for site in activations.by_site if site.module == "res")
    if not layers or sorted({*layers} & {*readable}) != sorted(layers):
        raise ValueError(f"layers={list(layers)}: expected some of {readable}, each once")
    rng = np.random.default_rng(seed)
    parts = []
    for layer in layers:
        codes = activations.by_site[Site(layer, "res")].tocoo()
        columns = {"layer": layer, "feature": codes.col, "token_row": codes.row}
        part = pd.DataFrame(columns).astype(np.int64).assign(activation=codes.data.astype(float))
        part = part.iloc[rng.permutation(len(part))].groupby("token_row", sort=False)
        parts.append(part.head(per_token).sort_values(["token_row", "feature"]))
    targets = pd.concat(parts, ignore_index=True)
    tokens = with_dataset(activations.tokens)[["dataset", "text", "position", "token"]]
    return targets.join(tokens, on="token_row")


def sources_of(
    targets: pd.DataFrame, matches: pd.DataFrame, activations: FeatureActivations, top_n: int = 1
) -> pd.DataFrame:
    """Every target's `top_n` matches at each site, with their activation at its token.

    One row a match: `target` (row of `targets`), `module`, `feature`, `rank`, `activation`.
    """
    backward = matches[matches["direction"] == "backward"]
    if not 1 <= top_n <= (ranks := int(backward["rank"].max())):
        raise ValueError(f"top_n={top_n}: expected 1 to {ranks}, the table's ranks")
    if missing := sorted(set(targets["layer"]) - set(backward["layer"])):
        raise ValueError(f"no matches at layer {missing[0]}: its features have no predecessors")
    backward = backward[(backward["rank"] <= top_n) & (backward["source"] >= 0)]
    backward = backward[["layer", "feature", "module", "source", "rank"]]
    sources = targets[["layer", "feature", "token_row"]].reset_index(names="target")
    sources = sources.merge(backward.astype({"module": str}), on=["layer", "feature"])
    sources = sources.sort_values(["target", "module", "rank"], ignore_index=True)
    sources = sources.assign(feature=sources["source"], activation=0.0)
    for (layer, module), part in sources.groupby(["layer", "module"]):
        codes = activations.by_site[predecessor_site(int(layer), str(module))]
        values = codes[part["token_row"].to_numpy(), part["feature"].to_numpy()]
        sources.loc[part.index, "activation"] = np.asarray(values, dtype=float).ravel()
    return sources[["target", "module", "feature", "rank", "activation"]]


def active_predecessors(sources: pd.DataFrame) -> pd.DataFrame:
    """The sources that are active at their target's token: its predecessors there."""
    return sources[sources["activation"] > 0].reset_index(drop=True)


def groups_of(targets: pd.DataFrame, predecessors: pd.DataFrame) -> pd.Series:
    """The `group` of each target, by where it has a predecessor."""
    import pandas as pd

    counts = pd.crosstab(predecessors["target"], predecessors["module"])
    counts = counts.reindex(index=targets.index, columns=list(MODULES), fill_value=0)
    return pd.Series(group_names(counts > 0), targets.index, name="group")


class Example(NamedTuple):
    """A feature whose predecessor in the stream is active at the same token of a text."""

    text: str
    position: int  # of the token; 0 is BOS
    word: str
    feature: FeatureId
    activation: float
    predecessor: FeatureId
    predecessor_activation: float
    rule: str  # by which it was found


def example_target(
    suite: Suite, texts: Sequence[str], matches: pd.DataFrame, layers: Sequence[int]
) -> Example:
    """The feature of greatest activation that is "From RES" at a word of five letters or more.

    It is looked for in one text and layer after another. Where a text has none, a shorter word will
    do, then a feature that has other predecessors too. A ValueError if no text has any.
    """
    for text in texts:
        active = collect(suite, [text], None, text_length(suite.model))
        words = np.array(token_strings(suite.model, active.tokens["token"]))
        for layer in layers:
            targets = draw_targets(active, [layer], per_token=10**6)
            near = active_predecessors(sources_of(targets, matches, active))
            near = near[near["rank"] == 1]
            group = groups_of(targets, near)
            is_long = np.array([len(word.strip()) > 4 for word in words])[targets["token_row"]]
            of_stream = targets.index.isin(near.loc[near["module"] == "res", "target"])
            rules = {
                "'From RES', at a word of five letters or more": (group == "From RES") & is_long,
                "'From RES'": group == "From RES",
                "with a predecessor in the stream among others": of_stream,
            }
            for rule, chosen in rules.items():
                if not chosen.any():
                    continue
                row = targets.loc[targets.loc[chosen, "activation"].idxmax()]
                at_site = near[(near["target"] == row.name) & (near["module"] == "res")]
                feature = FeatureId(layer, "res", int(row["feature"]))
                source = FeatureId(layer - 1, "res", int(at_site["feature"].iloc[0]))
                word, activation = words[int(row["token_row"])], float(row["activation"])
                place = text, int(row["position"]), str(word)
                amount = float(at_site["activation"].iloc[0])
                return Example(*place, feature, activation, source, amount, rule)
    raise ValueError(
        f"in {len(texts)} texts no feature of layers {[*layers]} has an active predecessor in the"
        " stream: there is nothing to remove"
    )


def equal_norm(
    suite: Suite,
    targets: pd.DataFrame,
    sources: pd.DataFrame,
    activations: FeatureActivations,
    seed: int | Sequence[tuple[int, int]] = 0,
) -> pd.DataFrame:
    """The control that the paper lacks: other active features, same norm of change (CHOICES 33).

    Each predecessor is replaced by another feature drawn from those active at the same site and
    token, its activation scaled so that removing it changes what its SAE reads by the same norm,
    even where that is more than it writes. Targets with no other active at a site are left out.
    A seed for each target makes its draw independent of which others there are.
    """
    import torch

    predecessors = active_predecessors(sources)
    keys = ["target", "module"]
    if predecessors.duplicated(keys).any():
        raise ValueError("the control has several matches at a site: expected one (top-1)")
    if isinstance(seed, int):
        draws = dict.fromkeys(targets.index, np.random.default_rng(seed))  # one for all
    else:
        draws = dict(zip(targets.index, map(np.random.default_rng, seed), strict=True))
    sites = predecessors.join(targets[["layer", "token_row"]], on="target")
    others = every_active(sites.assign(own=sites["feature"]), activations)
    by_site = others[others["feature"] != others["own"]].groupby(keys, sort=False)
    drawn = {key: draws[key[0]].choice(np.sort(active)) for key, active in by_site["feature"]}
    sites["other"] = [drawn.get(key) for key in zip(sites["target"], sites["module"], strict=True)]
    alone = sites.loc[sites["other"].isna(), "target"]
    sites = sites[~sites["target"].isin(alone)].reset_index(drop=True).astype({"other": int})
    for (layer, module), part in sites.groupby(["layer", "module"]):
        sae = suite.sae(predecessor_site(int(layer), str(module)))
        features = torch.tensor(part[["feature", "other"]].to_numpy().T)
        own, other = (sae.decoder_rows(f).float().norm(dim=1).cpu().numpy() for f in features)
        sites.loc[part.index, "activation"] = part["activation"] * own / other
    return sites.assign(feature=sites["other"])[[*predecessors.columns]]


def every_active(sites: pd.DataFrame, activations: FeatureActivations) -> pd.DataFrame:
    """All features that are active at the `layer`, `module` and `token_row` of each `target`."""
    import pandas as pd

    parts = []
    for (layer, module), part in sites.groupby(["layer", "module"]):
        at_site = activations.by_site[predecessor_site(int(layer), str(module))]
        codes = at_site[part["token_row"].to_numpy()].tocoo()
        columns = {"feature": codes.col, "activation": codes.data}
        parts.append(part.iloc[codes.row].assign(**columns))
    return active_predecessors(pd.concat(parts))
