"""Match features across layers and modules: the match table of a suite.

A match is an edge from a source feature to a target feature that lies later in the stream:
R_{L-1}, M_L or A_L to R_L. It is `backward` where the target chose its best sources, `forward`
where the source chose its best targets (paper 3.2 and 3.3).
"""

import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowhelpers.core.cache import cached_table
from flowhelpers.core.directions import prepare, unit_rows
from flowhelpers.core.features import MODULES, Site, check_choice, predecessor_sites
from flowhelpers.core.machine import check_device, free_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.matching.cosine import Rows
from flowhelpers.matching.matchers import (
    LEAST_ACTIVE,
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
from flowhelpers.matching.null import (
    NULL_DRAWS,
    NULL_QUANTILE,
    cached_null,
    null_error,
    null_threshold,
)
from flowhelpers.suites.load import KEPT

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

Method = Literal["cosine", "random", "permutation", "pearson"]
METHODS: tuple[Method, ...] = ("cosine", "random", "permutation", "pearson")
DIRECTIONS = ("backward", "forward")
TABLE_VERSION = 4  # of what a table on disk holds: raise it when that changes


def match_table(
    suite: "Suite",
    k: int = 5,
    seed: int = 0,
    method: Method = "cosine",
    *,
    weights: Weights = "decoder",
    folded: bool = False,
    texts: Sequence[str] | None = None,
    max_tokens: int = 128,
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
        (each is the other's best), `null_quantile` (the share of best scores by chance that lie
        below), `null` (the 99.9 % quantile of those scores; CHOICES 27) and `null_error` (its
        standard error).

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
        from flowhelpers.activations.sparse import VERSION

        choices |= {"texts": list(texts or ()), "max_tokens": max_tokens, "activations": VERSION}
        choices |= {"least_active": LEAST_ACTIVE, "model": suite.model.fingerprint}

    first = [sum(len(at) - 1 for at in sites.values())]  # pairs, told to the first assignment alone

    @once  # one pass of the model, when the first layer is not on disk
    def codes() -> Any:
        needed = {site for at in sites.values() for site in at}
        return read_codes(suite, texts or (), needed, seed, max_tokens)

    rows: dict[Site, Rows] = {}  # of the layer at hand, normalised once
    nulls: dict[Site, Tensor] = {}

    def match(target: "SAE", source: "SAE") -> tuple[PairMatch, Null]:
        if method == "pearson":
            by_site, shifted = codes()
            return by_pearson(by_site[target.site], by_site[source.site], shifted, k)
        for sae in (target, source):
            if sae.site not in rows:
                rows[sae.site] = _normalised(sae, device)
            if sae.site not in nulls:
                nulls[sae.site] = cached_null(sae, rows[sae.site], seed, device, cache)
        null = nulls[source.site], nulls[target.site]  # a target chooses among sources
        if method == "permutation":
            pairs = first.pop() if first else 0
            return by_permutation(target, source, weights, folded, device, pairs), null
        found = by_cosine(rows[target.site], rows[source.site], k, device)
        if method == "random":
            # A seed for each pair of sites: what is drawn at one says nothing of another.
            text = f"{seed} {target.site} {source.site}".encode()
            own = int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")
            found = random_of_top_k(found, k, own)
        return found, null

    groups, coming = list(sites.values()), {}

    # The last few that were read stay in memory: the target, which is needed again, comes last.
    def read(place: int) -> "list[SAE]":
        return [suite.sae(site) for site in reversed(groups[place])][::-1]

    def matches_at(place: int, reader: ThreadPoolExecutor) -> "pd.DataFrame":
        saes = coming.pop(place).result() if place in coming else read(place)
        if place + 1 < len(groups):  # while these are matched
            coming[place + 1] = reader.submit(read, place + 1)
        tables = []
        for site in set(rows) - set(groups[place]):
            del rows[site]
        for source in saes[1:]:
            tables += _both_sides(*match(saes[0], source), saes[0], source, k, method)
            if source.site.module != "res":
                rows.pop(source.site, None)
        return pd.concat(tables, ignore_index=True)

    # A few words over and over: as categories, all layers of a large suite fit into memory.
    modules = sorted({site.module for some in sites.values() for site in some[1:]})
    words = {"suite": [suite.name], "method": [method], "module": modules}
    categories = {name: pd.CategoricalDtype(some) for name, some in words.items()}
    tables = []
    with ThreadPoolExecutor(1) as reader:
        for place, at in enumerate(progress(groups, "matching")):
            for site in at:
                if k not in range(1, (width := suite.about(site, "width")) + 1):
                    raise ValueError(f"k={k}: expected 1 to {width}, the features of {site}")
            prints = {str(site): suite.about(site, "fingerprint") for site in reversed(at)}
            key = {"suite": suite.name, "layer": at[0].layer, "sites": prints} | choices
            make = partial(matches_at, place, reader)
            made = cached_table("matches", key, make, cache, TABLE_VERSION)
            made.insert(0, "suite", suite.name)
            tables.append(made.astype(categories))
    return pd.concat(tables, ignore_index=True)


def _normalised(sae: "SAE", device: str | None) -> Rows:
    """Directions ready for all products of a layer; of the largest SAEs, block by block there."""
    at = device or sae.decoder.device
    needed = KEPT * 6 * sae.decoder.numel()
    return prepare(sae.decoder, at) if needed < free_memory(str(at)) // 2 else sae.decoder


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
    match: PairMatch, null: Null, target: "SAE", source: "SAE", k: int, method: str
) -> "list[pd.DataFrame]":
    """The rows of a pair of sites: what each target chose, and what each source chose."""
    import numpy as np
    import pandas as pd

    def word(one: str, words: Sequence[str], n: int) -> pd.Categorical:
        return pd.Categorical.from_codes(np.full(n, words.index(one), np.int8), list(words))

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
        cosines = scores
        if method == "pearson":
            cosines = _cosines(target, source, ends[0].flatten(), ends[1].flatten())
        below = torch.searchsorted(chance, scores.contiguous()).float() / len(chance)
        columns = {
            "feature": ends[0].int(),
            "source": ends[1].int(),
            "rank": torch.arange(1, ranks + 1, dtype=torch.int16).expand(choosing, -1),
            "score": scores.float(),
            "cosine": cosines.float(),
            "margin": torch.nn.functional.pad(leads, (0, 1), value=torch.nan)[:, :ranks],
            "mutual": mutual,
            "null_quantile": below,
        }
        frame = pd.DataFrame({name: column.flatten().numpy() for name, column in columns.items()})
        of_all = {
            "direction": word(direction, DIRECTIONS, len(frame)),
            "layer": np.int16(target.site.layer),
            "module": word(source.site.module, sorted(MODULES), len(frame)),
            "source_layer": np.int16(source.site.layer),
            "null": np.float32(null_threshold(chance)),
            "null_error": np.float32(null_error(chance)),
            "method": word(method, METHODS, len(frame)),
        }
        frames.append(frame.assign(**of_all))
    return frames


def _cosines(target: "SAE", source: "SAE", ends: Tensor, starts: Tensor) -> Tensor:
    """The cosine of each match, whatever chose it; 0 where there is none."""
    parts = [
        (unit_rows(target.decoder[t]) * unit_rows(source.decoder[s])).sum(-1).cpu()
        for t, s in zip(ends.split(2**14), starts.split(2**14), strict=True)
    ]
    return torch.cat(parts).clamp(-1, 1).where((ends >= 0) & (starts >= 0), 0.0)
