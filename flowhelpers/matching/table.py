"""Match features across layers and modules: the match table of a suite.

A match is an edge from a source feature to a target feature that lies later in the stream:
R_{L-1}, M_L or A_L to R_L. It is `backward` where the target chose its best sources, `forward`
where the source chose its best targets (paper 3.2 and 3.3).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from flowhelpers.core.cache import cached_table
from flowhelpers.core.directions import unit_rows
from flowhelpers.core.features import MODULES, Site, predecessor_sites, suggestion
from flowhelpers.core.machine import check_device
from flowhelpers.core.progress_bar import progress
from flowhelpers.matching.matchers import (
    LEAST_ACTIVE,
    PairMatch,
    by_cosine,
    by_pearson,
    by_permutation,
    pearson_candidates,
    random_of_top_k,
)
from flowhelpers.matching.null import NULL_DRAWS, NULL_QUANTILE, Null, cached_null

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

Method = Literal["cosine", "random", "permutation", "pearson"]
METHODS: tuple[Method, ...] = ("cosine", "random", "permutation", "pearson")
TABLE_VERSION = 2  # of what a table on disk holds: raise it when that changes
Pairs = dict[str, tuple[Site, Site]]  # by module, the target's site and the source's


def match_table(
    suite: "Suite",
    k: int = 5,
    seed: int = 0,
    method: Method = "cosine",
    *,
    weights: Literal["decoder", "all"] = "decoder",
    folded: bool = False,
    texts: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    device: str | None = None,
    cache: Path | None = None,
) -> "pd.DataFrame":
    """The matches of a suite's residual features with all sites that precede them.

    Each layer is kept on disk under all that its matches depend on, the directions included, and
    read from there the next time.

    Args:
        k: Matches kept for each feature and pair of sites; for `random`, how many are drawn from.
        seed: Of the null and of `random`.
        method: `cosine` of directions (top-k, paper 3.2); `random`, one of the k of highest cosine
            (paper A.2); `permutation`, one to one as in SAE Match (paper 3.1, CHOICES 15);
            `pearson`, correlation of activations over `texts` (paper C.4, CHOICES 14).
        weights: For `permutation`: match decoders alone, or encoders and their biases as well.
        folded: For `permutation`: fold thresholds into the weights first (CHOICES 16).
        texts: For `pearson`: the text sample.
        layers: The layers to match with what precedes them; all unless given.
        device: Where to compute; where the SAEs are unless given.
        cache: The folder of the tables on disk; `cache_folder()` unless given.

    Returns:
        One row a match: `suite`, `method`, `direction` (backward or forward), `layer` and `feature`
        of the residual target, `module`, `source_layer` and `source` (-1 where there is none),
        `rank` (from 1) among the matches of the side that chose, `score` (what the method ranks
        by), `cosine`, `margin` (of the score, to the next rank; missing at the last), `mutual`
        (each is the other's best), `null` (the 99.9 % quantile of the best score by chance, for the
        pair of sites; CHOICES 27) and `null_quantile` (the share of best scores by chance that lie
        below).

    Raises:
        ValueError: If no residual SAE has one that precedes it (at the layers asked for),
            the method is unknown, lacks its texts or is given what it has no use for, there is no
            such device, or k is larger than an SAE.

    Example:
        >>> from flowhelpers import load_suite, match_table, matching
        >>> matches = match_table(load_suite("flowlet"), k=1, layers=[4])
        >>> best = matching.best_matches(matches, module="res")
        >>> len(best), float(best["null"].iloc[0]) < float(best["cosine"].median())
        (1024, True)
    """
    import pandas as pd

    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{suggestion(method, METHODS)}")
    if method != "permutation" and (weights != "decoder" or folded):
        raise ValueError(f"method={method!r}: weights and folded are for 'permutation' alone")
    if (method == "pearson") != (texts is not None):
        raise ValueError(f"method={method!r}: texts are for 'pearson', which needs them")
    if device is not None:
        check_device(device)
    pairs = _pairs_by_layer(suite, layers)
    job = _Job(suite, pairs, k, seed, method, weights, folded, tuple(texts or ()), device, cache)
    words = {"method": METHODS, "direction": ("backward", "forward"), "module": MODULES}
    # A few words over and over: as categories, all layers of a large suite fit into memory.
    categories = {name: pd.CategoricalDtype(sorted(some)) for name, some in words.items()}
    categories["suite"] = pd.CategoricalDtype([suite.name])
    tables = []
    for layer in progress(list(pairs), "matching"):
        made = cached_table(
            "matches", job.key(layer), lambda at=layer: job.table(at), cache, TABLE_VERSION
        )
        made.insert(0, "suite", suite.name)
        tables.append(made.astype(categories))
    table = pd.concat(tables, ignore_index=True)
    for column in words:
        table[column] = table[column].cat.remove_unused_categories()
    return table


def _pairs_by_layer(suite: "Suite", layers: Sequence[int] | None) -> dict[int, Pairs]:
    by_layer: dict[int, Pairs] = {}
    for target in (Site(layer, "res") for layer in range(suite.layers)):
        sources = predecessor_sites(target) if target in suite.saes else {}
        pairs = {module: (target, site) for module, site in sources.items() if site in suite.saes}
        if pairs:
            by_layer[target.layer] = pairs
    if not by_layer:
        raise ValueError(f"suite {suite.name} has no residual SAE with one that precedes it")
    if layers is None:
        return by_layer
    if not layers or not set(layers) <= set(by_layer):
        there = ", ".join(map(str, by_layer))
        raise ValueError(f"layers={list(layers)}: {suite.name} has matches at layers {there}")
    return {layer: by_layer[layer] for layer in sorted(set(layers))}


@dataclass(frozen=True)
class _Job:
    """What `match_table` was asked for."""

    suite: "Suite"
    pairs: dict[int, Pairs]
    k: int
    seed: int
    method: Method
    weights: Literal["decoder", "all"]
    folded: bool
    texts: tuple[str, ...]
    device: str | None
    cache: Path | None

    @cached_property
    def choices(self) -> dict[str, Any]:
        """All that the tables of all layers depend on, beside the SAEs."""
        choices: dict[str, Any] = {"method": self.method, "k": self.k, "seed": self.seed}
        if self.method == "permutation":
            choices |= {"weights": self.weights, "folded": self.folded}
        if self.method == "pearson":
            choices |= {"texts": list(self.texts), "model": self.suite.model.fingerprint}
            choices |= {"candidates": self.candidates, "least_active": LEAST_ACTIVE}
        return choices

    @property
    def all_pairs(self) -> list[tuple[Site, Site]]:
        return [pair for pairs in self.pairs.values() for pair in pairs.values()]

    @cached_property
    def candidates(self) -> int | None:
        width = {site: self.suite.sae(site).width for pair in self.all_pairs for site in pair}
        return pearson_candidates([(width[t], width[s]) for t, s in self.all_pairs])

    @cached_property
    def correlated(self) -> dict[tuple[Site, Site], tuple[PairMatch, Null]]:
        """Of `pearson`, all pairs: one pass of the model, when the first layer is not on disk."""
        for layer in self.pairs:
            self.check_k(layer)
        pairs, candidates = self.all_pairs, self.candidates
        return by_pearson(self.suite, self.texts, pairs, self.k, self.seed, candidates)

    def check_k(self, layer: int) -> None:
        sites = dict.fromkeys(site for pair in self.pairs[layer].values() for site in pair)
        width, site = min((self.suite.sae(site).width, site) for site in sites)
        if not isinstance(self.k, int) or not 1 <= self.k <= width:
            raise ValueError(f"k={self.k}: expected 1 to {width}, the features of {site}")

    def key(self, layer: int) -> dict[str, Any]:
        """What the table of a layer is kept under."""
        self.check_k(layer)
        sites = dict.fromkeys(site for pair in self.pairs[layer].values() for site in pair)
        prints = {str(site): self.suite.sae(site).fingerprint for site in sites}
        key = {"suite": self.suite.name, "layer": layer, "sites": prints}
        return key | {"null": (NULL_QUANTILE, NULL_DRAWS)} | self.choices

    def table(self, layer: int) -> "pd.DataFrame":
        """The matches of a layer."""
        import pandas as pd

        tables: list[pd.DataFrame] = []
        for module, pair in self.pairs[layer].items():
            target, source = (self.suite.sae(site) for site in pair)
            match, null = self.match(target, source)
            tables += _tables(match, null, target, source, module, self.k)
        return pd.concat(tables, ignore_index=True).assign(method=self.method)

    def match(self, target: "SAE", source: "SAE") -> tuple[PairMatch, Null]:
        if self.method == "pearson":
            return self.correlated[target.site, source.site]
        null = cached_null(target, source, self.seed, self.device, self.cache)
        if self.method == "permutation":
            return by_permutation(target, source, self.weights, self.folded, self.device), null
        match = by_cosine(target, source, self.k, self.device)
        if self.method == "random":
            # A seed for each pair of sites: what is drawn at one says nothing of another.
            text = f"{self.seed} {target.site} {source.site}".encode()
            seed = int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")
            match = random_of_top_k(match, self.k, seed)
        return match, null


def _tables(
    match: PairMatch, null: Null, target: "SAE", source: "SAE", module: str, k: int
) -> "Iterator[pd.DataFrame]":
    import numpy as np
    import pandas as pd

    sides = (
        ("backward", match.backward, match.forward, null.backward),
        ("forward", match.forward, match.backward, null.forward),
    )
    for direction, chosen, other, chance in sides:
        choosing, width = chosen.indices.shape
        ranks = min(k, width)
        best, scores = chosen.indices[:, :ranks].cpu(), chosen.scores[:, :ranks].cpu()
        margin = torch.full((choosing, ranks), torch.nan)
        differences = (chosen.scores[:, :-1] - chosen.scores[:, 1:]).cpu()
        margin[:, : differences.shape[1]] = differences[:, :ranks]
        chooser = torch.arange(choosing)[:, None].expand(-1, ranks)
        ends = (chooser, best) if direction == "backward" else (best, chooser)
        below = torch.searchsorted(chance, scores.contiguous())
        columns = {
            "feature": ends[0].int(),
            "source": ends[1].int(),
            "rank": torch.arange(1, ranks + 1, dtype=torch.int16).expand(choosing, -1),
            "score": scores.float(),
            "cosine": _cosines(target, source, *ends),
            "margin": margin,
            "mutual": _chosen_back(other.indices[:, 0].cpu(), best),
            "null_quantile": below.float() / len(chance),
        }
        frame = pd.DataFrame({name: column.flatten().numpy() for name, column in columns.items()})
        yield frame.assign(
            direction=direction,
            layer=np.int16(target.site.layer),
            module=module,
            source_layer=np.int16(source.site.layer),
            null=np.float32(torch.quantile(chance, NULL_QUANTILE)),
        )


def _chosen_back(other: Tensor, best: Tensor) -> Bool[Tensor, "choosing ranks"]:
    chooser = torch.arange(len(best))[:, None]
    mutual = (best >= 0) & (other[best.clamp(min=0)] == chooser)
    mutual[:, 1:] = False  # of lower rank is not the chooser's best
    return mutual


def _cosines(target: "SAE", source: "SAE", ends: Tensor, starts: Tensor) -> Tensor:
    rows = zip(ends.flatten().split(2**14), starts.flatten().split(2**14), strict=True)
    parts = [
        (unit_rows(target.decoder[t.clamp(min=0)]) * unit_rows(source.decoder[s.clamp(min=0)]))
        .sum(-1)
        .cpu()
        for t, s in ((t.to(target.norms.device), s.to(source.norms.device)) for t, s in rows)
    ]
    missing = (ends.flatten() < 0) | (starts.flatten() < 0)
    return torch.cat(parts).clamp(-1, 1).masked_fill(missing, 0.0)
