"""Match features across layers and modules: the match table of a suite, its scores and classes.

A match is an edge from a source feature to a target feature that lies later in the stream:
R_{L-1}, M_L or A_L to R_L. It is `backward` where the target chose its best sources, `forward`
where the source chose its best targets (paper 3.2 and 3.3).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from flowhelpers.core.cache import cached_table
from flowhelpers.core.features import MODULES, Site, predecessor_sites, suggestion
from flowhelpers.core.machine import check_device
from flowhelpers.core.progress_bar import progress
from flowhelpers.matching.cosine import Matches, unit_rows
from flowhelpers.matching.matchers import (
    LEAST_ACTIVE,
    NULL_DRAWS,
    Match,
    Null,
    by_cosine,
    by_pearson,
    by_permutation,
    cosine_null,
    pearson_candidates,
    random_of_top_k,
)

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

Method = Literal["cosine", "random", "permutation", "pearson"]
METHODS: tuple[Method, ...] = ("cosine", "random", "permutation", "pearson")
CLASSES = ("translated", "processed", "newborn", "unexplained")
NULL_QUANTILE = 0.999
TABLE_VERSION = 2  # of what a table on disk holds: raise it when that changes


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
        suite: The suite.
        k: Matches kept for each feature and pair of sites; for `random`, how many are drawn from.
        seed: Seed of the null and of `random`.
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
    """
    import pandas as pd

    words = {"method": METHODS, "direction": ("backward", "forward"), "module": MODULES}
    categories = {name: pd.CategoricalDtype(sorted(some)) for name, some in words.items()}
    categories["suite"] = pd.CategoricalDtype([suite.name])
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{suggestion(method, METHODS)}")
    if method != "permutation" and (weights != "decoder" or folded):
        raise ValueError(f"method={method!r}: weights and folded are for 'permutation' alone")
    if device is not None:
        check_device(device)
    if (method == "pearson") != (texts is not None):
        raise ValueError(f"method={method!r}: texts are for 'pearson', which needs them")
    by_layer = {layer: pairs for layer in range(suite.layers) if (pairs := _pairs(suite, layer))}
    if not by_layer:
        raise ValueError(f"suite {suite.name} has no residual SAE with one that precedes it")
    if layers is not None:
        if not layers or not set(layers) <= set(by_layer):
            there = ", ".join(map(str, by_layer))
            raise ValueError(f"layers={list(layers)}: {suite.name} has matches at layers {there}")
        by_layer = {layer: by_layer[layer] for layer in sorted(set(layers))}
    choices: dict[str, Any] = {"method": method, "k": k, "seed": seed}
    if method == "permutation":
        choices |= {"weights": weights, "folded": folded}
    everything = [pair for pairs in by_layer.values() for pair in pairs.values()]
    candidates = None
    if texts is not None:
        widths = {site: suite.sae(site).width for pair in everything for site in pair}
        candidates = pearson_candidates([(widths[t], widths[s]) for t, s in everything])
        choices |= {"texts": list(texts), "model": suite.model.fingerprint}
        choices |= {"candidates": candidates, "least_active": LEAST_ACTIVE}

    correlated: dict[tuple[Site, Site], tuple[Match, Null]] = {}

    def matched(target: "SAE", source: "SAE") -> tuple[Match, Null]:
        if method == "pearson":
            if not correlated:  # the first layer that is not on disk: one pass of the model for all
                _check_k(k, everything, suite)
                found = by_pearson(suite, texts or [], everything, k, seed, candidates=candidates)
                correlated.update(found)
            return correlated[target.site, source.site]
        null = _cosine_null(target, source, seed, device, cache)
        if method == "permutation":
            return by_permutation(target, source, weights, folded, device), null
        match = by_cosine(target, source, k, device)
        if method == "random":
            match = random_of_top_k(match, k, _seed_of(seed, target.site, source.site))
        return match, null

    def table_of(layer: int) -> "pd.DataFrame":
        parts = [
            part
            for module, pair in by_layer[layer].items()
            for target, source in [tuple(suite.sae(site) for site in pair)]
            for part in _rows(*matched(target, source), target, source, module, k)
        ]
        return pd.concat(parts, ignore_index=True).assign(method=method)

    tables = []
    for layer, pairs in progress(list(by_layer.items()), "matching"):
        _check_k(k, list(pairs.values()), suite)
        sites = dict.fromkeys(site for pair in pairs.values() for site in pair)
        prints = {str(site): suite.sae(site).fingerprint for site in sites}
        key = {"suite": suite.name, "layer": layer, "sites": prints}
        key["null"] = (NULL_QUANTILE, NULL_DRAWS)
        made = cached_table(
            "matches", key | choices, lambda at=layer: table_of(at), cache, TABLE_VERSION
        )
        made.insert(0, "suite", suite.name)
        # A few words over and over: as categories, all layers of a large suite fit into memory.
        tables.append(made.astype(categories))
    table = pd.concat(tables, ignore_index=True)
    for column in words:
        table[column] = table[column].cat.remove_unused_categories()
    return table


def _pairs(suite: "Suite", layer: int) -> dict[str, tuple[Site, Site]]:
    target = Site(layer, "res")
    if target not in suite.saes:
        return {}
    return {
        module: (target, site)
        for module, site in predecessor_sites(target).items()
        if site in suite.saes
    }


def _check_k(k: int, pairs: Sequence[tuple[Site, Site]], suite: "Suite") -> None:
    sites = dict.fromkeys(site for pair in pairs for site in pair)
    width, site = min((suite.sae(site).width, site) for site in sites)
    if not isinstance(k, int) or not 1 <= k <= width:
        raise ValueError(f"k={k}: expected 1 to {width}, the features of {site}")


def _seed_of(seed: int, *sites: Site) -> int:
    """A seed for each pair of sites, so that what is drawn at one says nothing of another."""
    digest = hashlib.blake2b(f"{seed} {' '.join(map(str, sites))}".encode(), digest_size=6)
    return int.from_bytes(digest.digest(), "big")


def _cosine_null(
    target: "SAE",
    source: "SAE",
    seed: int,
    device: str | None,
    cache: Path | None,
) -> Null:
    # Kept by itself, since several methods share it and it is most of the work.
    import pandas as pd

    def compute() -> pd.DataFrame:
        null = cosine_null(target, source, seed, device)
        sides = {"backward": null.backward, "forward": null.forward}
        parts = [pd.DataFrame({"side": side, "cosine": c.numpy()}) for side, c in sides.items()]
        return pd.concat(parts, ignore_index=True)

    key = {"seed": seed, "draws": NULL_DRAWS}
    key |= {"target": target.fingerprint, "source": source.fingerprint}
    found = cached_table("nulls", key, compute, cache, TABLE_VERSION).groupby("side")["cosine"]
    sides = (found.get_group(side).to_numpy(copy=True) for side in ("backward", "forward"))
    return Null(*map(torch.from_numpy, sides))


def _rows(
    match: Match, null: Null, target: "SAE", source: "SAE", module: str, k: int
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


def feature_scores(table: "pd.DataFrame") -> "pd.DataFrame":
    """s(R), s(M) and s(A) of every residual feature: its best score at each site (paper 3.3).

    Args:
        table: A match table.

    Returns:
        One row a feature: `layer`, `feature`, and for each of `res`, `mlp`, `att` the columns
        `s_res` (score), `source_res` (index, -1 without a match) and `null_res`. At layer 0 the
        residual columns are missing.
    """
    best = table[(table["rank"] == 1) & (table["direction"] == "backward")]
    wide = best.assign(module=best["module"].astype(str)).pivot(
        index=["layer", "feature"], columns="module", values=["score", "source", "null"]
    )
    wide.columns = [f"{'s' if kind == 'score' else kind}_{module}" for kind, module in wide.columns]
    return wide.reset_index()


def classify(
    scores: "pd.DataFrame", thresholds: Mapping[tuple[int, str], float] | None = None
) -> "pd.DataFrame":
    """Which of the four readings of the paper's 3.3 fits each feature.

    A: `translated`, s(R) alone is high; B: `processed`, s(R) and s(M) or s(A) are; C: `newborn`,
    s(M) or s(A) alone; D: `unexplained`, none. What is high differs by layer and site: what
    exceeds the null's 99.9 % quantile, unless thresholds are given (CHOICES 27). A score that
    does not exist, such as s(R) at layer 0, is not high.

    Args:
        scores: One row a feature, as `scores` gives.
        thresholds: For (layer, module) the score above which a feature's is high, such as
            `youden_thresholds` gives; the null's quantile where there is none.

    Returns:
        `scores` with `high_res`, `high_mlp`, `high_att` (the thresholds that applied) and `class`.

    Raises:
        ValueError: If a threshold is outside [-1, 1], or of a place that the table does not have.
    """
    import numpy as np

    found = scores.copy()
    layers = sorted(scores["layer"].unique().tolist())
    for place in thresholds or {}:
        if place not in {(layer, module) for layer in layers for module in MODULES}:
            raise ValueError(
                f"a threshold for {place!r}: expected (layer, module), a layer of"
                f" {', '.join(map(str, layers))} and a module of {', '.join(MODULES)}"
            )
    high = {}
    for module in MODULES:
        limits = scores.get(f"null_{module}", scores["layer"] * np.nan)
        given = {layer: at for (layer, name), at in (thresholds or {}).items() if name == module}
        for layer, at in given.items():
            check_threshold(at, f"{layer}/{module}")
        found[f"high_{module}"] = scores["layer"].map(given).fillna(limits).astype(float)
        high[module] = scores.get(f"s_{module}", limits) > found[f"high_{module}"]
    module = high["mlp"] | high["att"]
    found["class"] = np.select(
        [high["res"] & ~module, high["res"] & module, module], CLASSES[:3], CLASSES[3]
    )
    return found


def dominant_module(classes: "pd.DataFrame") -> "pd.Series":
    """Which module a feature leans on: of `mlp` and `att`, the nearer one whose score is high.

    Args:
        classes: One row a feature, with its scores and thresholds as `classify` gives them.

    Returns:
        `mlp`, `att`, or missing where neither score is high.
    """
    import pandas as pd

    missing = pd.Series(float("nan"), classes.index)
    scores = pd.DataFrame(
        {
            name: (score := classes.get(f"s_{name}", missing).astype(float)).where(
                score > classes.get(f"high_{name}", missing).astype(float), -float("inf")
            )
            for name in ("mlp", "att")
        }
    )
    return scores.idxmax(axis=1).where(scores.max(axis=1) > -float("inf"), None)


def check_threshold(value: float, name: str) -> None:
    """A threshold of cosines lies in [-1, 1].

    Raises:
        ValueError: If it does not.
    """
    if not -1 <= value <= 1:
        raise ValueError(f"threshold {value} for {name}: expected a cosine, from -1 to 1")


def transition(matches: Matches, width: int) -> Tensor:
    """The transition matrix T of the paper's 3.2: a one for each match.

    Top-k is taken for each row, and a cosine that is not above zero is no match. Rows are features
    of the side that chose: of the target for `backward` matches, as in the paper's 3.2, and of the
    source for `forward` ones, as in its appendix F, where ẑ = z·T (CHOICES 29).

    Args:
        matches: The matches, `[rows, k]`.
        width: Number of features of the other side.

    Returns:
        A sparse matrix, `[rows, width]`.
    """
    rows, ranks = torch.nonzero(matches.indices >= 0, as_tuple=True)
    places = torch.stack([rows, matches.indices[rows, ranks]])
    shape = (len(matches.indices), width)
    ones = torch.ones(len(rows), device=places.device)
    return torch.sparse_coo_tensor(places, ones, shape, check_invariants=False)


def agreement(tables: "Mapping[str, pd.DataFrame]") -> "pd.DataFrame":
    """How often two match tables choose the same best source, for each pair and module.

    Args:
        tables: Match tables of one suite, by name.

    Returns:
        `first`, `second`, `module`, `features` (that both match) and `same`, their share.
    """
    import pandas as pd

    index = ["layer", "module", "feature"]
    best = {}
    for name, table in tables.items():
        rows = table[(table["rank"] == 1) & (table["direction"] == "backward")]
        rows = rows[rows["source"] >= 0].assign(module=rows["module"].astype(str))
        best[name] = rows.set_index(index)["source"]
    records = []
    names = list(best)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            both = pd.concat({"a": best[first], "b": best[second]}, axis=1, join="inner")
            for module, part in (both["a"] == both["b"]).groupby("module"):
                records.append((first, second, module, len(part), part.mean()))
    return pd.DataFrame(records, columns=["first", "second", "module", "features", "same"])
