"""Which sites a match table compares: by layer the residual site and those that precede it."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowhelpers.core.features import Site, predecessor_sites
from flowhelpers.matching.matchers import Weights, check_weights

if TYPE_CHECKING:
    from flowhelpers.suites.load import Suite


def sites_by_layer(suite: "Suite", layers: Sequence[int] | None) -> dict[int, list[Site]]:
    """By layer the residual site and, after it, those of its predecessors that have an SAE."""
    by_layer: dict[int, list[Site]] = {}
    for target in (Site(layer, "res") for layer in range(suite.layers)):
        sites = [target, *predecessor_sites(target).values()]
        sites = [site for site in sites if site in suite.saes]
        if target in sites and len(sites) > 1:
            by_layer[target.layer] = sites
    if not by_layer:
        raise ValueError(f"suite {suite.name} has no residual SAE with one that precedes it")
    chosen = set(by_layer if layers is None else layers)
    if not chosen or not chosen <= set(by_layer):
        there = ", ".join(map(str, by_layer))
        raise ValueError(f"layers={list(chosen)}: {suite.name} has matches at layers {there}")
    return {layer: by_layer[layer] for layer in sorted(chosen)}


def with_weights(
    suite: "Suite", sites: dict[int, list[Site]], weights: Weights, folded: bool
) -> dict[int, list[Site]]:
    """By layer the sites that can be permuted by these weights; a warning names the others."""
    refused: dict[Site, ValueError] = {}
    for site in sorted({site for at in sites.values() for site in at}):
        try:
            check_weights(suite.sae(site), weights, folded)
        except ValueError as error:
            refused[site] = error
    kept = {layer: [site for site in at if site not in refused] for layer, at in sites.items()}
    kept = {layer: at for layer, at in kept.items() if at[:1] == sites[layer][:1] and at[1:]}
    if not kept:
        raise next(iter(refused.values()))
    if refused:
        names, why = ", ".join(map(str, refused)), next(iter(refused.values()))
        warnings.warn(f"{suite.name}: not permuted are {names}, as {why}", stacklevel=3)
    return kept
