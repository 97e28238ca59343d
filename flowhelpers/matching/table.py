"""Match features across layers and modules: the match table of a suite.

A match is an edge from a source feature to a target feature that lies later in the stream:
R_{L-1}, M_L or A_L to R_L. It is `backward` where the target chose its best sources, `forward`
where the source chose its best targets (paper 3.2 and 3.3).
"""

import hashlib
import warnings
from collections.abc import Sequence
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowhelpers.core.cache import cached_table
from flowhelpers.core.directions import unit_rows
from flowhelpers.core.features import Site, check_choice, predecessor_sites
from flowhelpers.core.machine import check_device
from flowhelpers.core.progress_bar import progress
from flowhelpers.matching.matchers import (
    LEAST_ACTIVE,
    MAX_TOKENS,
    Null,
    PairMatch,
    Weights,
    by_cosine,
    by_pearson,
    by_permutation,
    check_weights,
    random_of_top_k,
    read_codes,
)
from flowhelpers.matching.null import NULL_DRAWS, NULL_QUANTILE, cached_null

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

Method = Literal["cosine", "random", "permutation", "pearson"]
METHODS: tuple[Method, ...] = ("cosine", "random", "permutation", "pearson")
TABLE_VERSION = 2  # of what a table on disk holds: raise it when that changes


def match_table(
    suite: "Suite",
    k: int = 5,
    seed: int = 0,
    method: Method = "cosine",
    *,
    weights: Weights = "decoder",
    folded: bool = False,
    texts: Sequence[str] | None = None,
    max_tokens: int = MAX_TOKENS,
    layers: Sequence[int] | None = None,
    device: str | None = None,
    cache: Path | None = None,
) -> "pd.DataFrame":
    """The matches of a suite's residual features with all sites that precede them.

    Each layer's matches are cached on disk, under a key of all that they depend on, the directions
    included.

    Args:
        k: Matches kept for each feature and pair of sites; for `random`, how many are drawn from.
        seed: The random seed of the null and of `random`.
        method: `cosine` of directions (top-k, paper 3.2); `random`, one of the k of highest cosine
            (paper A.2); `permutation`, one to one as in SAE Match (paper 3.1, CHOICES 15);
            `pearson`, correlation of activations over `texts` (paper C.4, CHOICES 14).
        weights: For `permutation`: what is matched; `both` are decoder and encoder, `all` the
            encoder's bias as well.
        folded: For `permutation`: fold thresholds into the weights first (CHOICES 16).
        texts: For `pearson`: the text sample.
        max_tokens: For `pearson`: where each text is cut, BOS included.
        layers: The layers whose residual features are matched; by default all.
        device: Where to compute; by default where the SAEs are. Correlations are on the CPU.
        cache: The folder of the tables on disk; by default `cache_folder()`.

    Returns:
        One row a match: `suite`, `method`, `direction` (backward or forward), `layer` and `feature`
        of the residual target, `module`, `source_layer` and `source` (-1 where there is none),
        `rank` (from 1) among the matches of the side that chose, `score` (what the method ranks
        by), `cosine`, `margin` (of the score, to the next rank; missing at the last), `mutual`
        (each is the other's best), `null` (the 99.9 % quantile of the best score by chance, for the
        pair of sites; CHOICES 27) and `null_quantile` (the share of best scores by chance that lie
        below).

        Sites whose SAEs lack what a permutation compares (those at z all weights, those without
        thresholds what is folded) have no rows, and a warning names them.

    Raises:
        ValueError: If no residual SAE has an SAE before it, or none can be permuted, the method
            lacks its texts or gets an argument it does not use, the device does not exist, or k
            exceeds an SAE's width.

    Example:
        >>> from flowhelpers import load_suite, match_table, matching
        >>> matches = match_table(load_suite("flowlet"), k=1, layers=[4])
        >>> best = matching.best_matches(matches, module="res")
        >>> len(best), float(best["null"].iloc[0]) < float(best["cosine"].median())
        (1024, True)
    """
    import pandas as pd

    check_choice("method", method, METHODS)
    if method != "permutation" and (weights != "decoder" or folded):
        raise ValueError(f"method={method!r}: weights and folded are for 'permutation' alone")
    if (method == "pearson") != (texts is not None):
        raise ValueError(f"method={method!r}: texts are for 'pearson', which needs them")
    if device is not None:
        check_device(device)
    sites = _sites_by_layer(suite, layers)
    choices: dict[str, Any] = {"method": method, "k": k, "seed": seed}
    choices["null"] = (NULL_QUANTILE, NULL_DRAWS)
    if method == "permutation":
        sites = _with_weights(suite, sites, weights, folded)
        choices |= {"weights": weights, "folded": folded}
    if method == "pearson":
        choices |= {"texts": list(texts or ()), "max_tokens": max_tokens}
        choices |= {"least_active": LEAST_ACTIVE, "model": suite.model.fingerprint}

    first = [sum(len(at) - 1 for at in sites.values())]  # pairs, told to the first assignment alone

    @once  # one pass of the model, when the first layer is not on disk
    def codes() -> Any:
        needed = {site for at in sites.values() for site in at}
        return read_codes(suite, texts or (), needed, seed, max_tokens)

    def match(target: "SAE", source: "SAE") -> tuple[PairMatch, Null]:
        if method == "pearson":
            by_site, shifted = codes()
            return by_pearson(by_site[target.site], by_site[source.site], shifted, k)
        options = seed, device, cache
        null = cached_null(target, source, *options), cached_null(source, target, *options)
        if method == "permutation":
            pairs = first.pop() if first else 0
            return by_permutation(target, source, weights, folded, device, pairs), null
        found = by_cosine(target, source, k, device)
        if method == "random":
            # A seed for each pair of sites: what is drawn at one says nothing of another.
            text = f"{seed} {target.site} {source.site}".encode()
            own = int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")
            found = random_of_top_k(found, k, own)
        return found, null

    def matches_at(layer: int) -> "pd.DataFrame":
        tables = []
        for site in sites[layer][1:]:
            target, source = suite.sae(sites[layer][0]), suite.sae(site)
            tables += _both_sides(*match(target, source), target, source, k)
        return pd.concat(tables, ignore_index=True).assign(method=method)

    # A few words over and over: as categories, all layers of a large suite fit into memory.
    modules = sorted({site.module for some in sites.values() for site in some[1:]})
    words = {"suite": [suite.name], "method": [method], "module": modules}
    words["direction"] = ["backward", "forward"]
    categories = {name: pd.CategoricalDtype(some) for name, some in words.items()}
    tables = []
    for layer in progress(list(sites), "matching"):
        prints = {}
        for site in sites[layer]:
            sae = suite.sae(site)
            if not 1 <= k <= sae.width:
                raise ValueError(f"k={k}: expected 1 to {sae.width}, the features of {site}")
            prints[str(site)] = sae.fingerprint
        key = {"suite": suite.name, "layer": layer, "sites": prints} | choices
        made = cached_table("matches", key, lambda at=layer: matches_at(at), cache, TABLE_VERSION)
        made.insert(0, "suite", suite.name)
        tables.append(made.astype(categories))
    return pd.concat(tables, ignore_index=True)


def _sites_by_layer(suite: "Suite", layers: Sequence[int] | None) -> dict[int, list[Site]]:
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


def _with_weights(
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


def _both_sides(
    match: PairMatch, null: Null, target: "SAE", source: "SAE", k: int
) -> "list[pd.DataFrame]":
    """The rows of a pair of sites: what each target chose, and what each source chose."""
    import numpy as np
    import pandas as pd

    frames = []
    for direction, chosen, other, chance in (
        ("backward", match.backward, match.forward, null[0]),
        ("forward", match.forward, match.backward, null[1]),
    ):
        choosing, width = chosen.indices.shape
        ranks = min(k, width)
        best, scores = chosen.indices[:, :ranks].cpu(), chosen.scores[:, :ranks].cpu()
        leads = (chosen.scores[:, :-1] - chosen.scores[:, 1:]).cpu()
        chooser = torch.arange(choosing)[:, None].expand(-1, ranks)
        mutual = (best >= 0) & (other.indices[:, 0].cpu()[best] == chooser)
        mutual[:, 1:] = False  # of lower rank is not the chooser's best
        ends = (chooser, best) if direction == "backward" else (best, chooser)
        columns = {
            "feature": ends[0].int(),
            "source": ends[1].int(),
            "rank": torch.arange(1, ranks + 1, dtype=torch.int16).expand(choosing, -1),
            "score": scores.float(),
            "cosine": _cosines(target, source, ends[0].flatten(), ends[1].flatten()),
            "margin": torch.nn.functional.pad(leads, (0, 1), value=torch.nan)[:, :ranks],
            "mutual": mutual,
            "null_quantile": torch.searchsorted(chance, scores.contiguous()).float() / len(chance),
        }
        of_all = {
            "direction": direction,
            "layer": np.int16(target.site.layer),
            "module": source.site.module,
            "source_layer": np.int16(source.site.layer),
            "null": np.float32(torch.quantile(chance, NULL_QUANTILE)),
        }
        frame = pd.DataFrame({name: column.flatten().numpy() for name, column in columns.items()})
        frames.append(frame.assign(**of_all))
    return frames


def _cosines(target: "SAE", source: "SAE", ends: Tensor, starts: Tensor) -> Tensor:
    """The cosine of each match, whatever chose it; 0 where there is none."""
    parts = [
        (unit_rows(target.decoder[t]) * unit_rows(source.decoder[s])).sum(-1).cpu()
        for t, s in zip(ends.split(2**14), starts.split(2**14), strict=True)
    ]
    return torch.cat(parts).clamp(-1, 1).where((ends >= 0) & (starts >= 0), 0.0)
