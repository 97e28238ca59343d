"""Where active features come from: the groups of the paper's 5.1 and their shares.

Every active residual feature at every token falls into one of eight groups, by which of its
predecessors (its matches in the stream before, the MLP and attention) are active at that token.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations.sampling import MAX_TOKENS
from flowhelpers.activations.sparse import FeatureActivations, read_batches
from flowhelpers.core.features import MODULES, Site, predecessor_site
from flowhelpers.suites.model import tokenize

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

    from flowhelpers.suites.load import Suite

_SOURCES = "nowhere", "RES", "MLP", "ATT", "RES & MLP", "RES & ATT", "MLP & ATT", "RES & MLP & ATT"
GROUPS = tuple(f"From {sources}" for sources in _SOURCES)
SCORES = tuple(f"s_{module}" for module in MODULES)


@dataclass(frozen=True)
class Occurrences:
    """Active residual features at the tokens of a sample, each with its group.

    Attributes:
        tokens: `text`, `position`, `token` and `dataset` (`all` if there are none).
        table: One row for each active (feature, token): `dataset`, `text`, `layer`, `feature`,
            `token_row` (row of `tokens`), `activation`; for each module `res`, `mlp`, `att`
            whether a predecessor there is active, the score `s_res` … of the best (missing where
            the layer lacks the site) and the share `rate_res` … of all tokens on which one is;
            and `group`.
    """

    suite: str
    method: str
    top_n: int
    tokens: "pd.DataFrame"
    table: "pd.DataFrame"

    @property
    def sample(self) -> str:
        """The suite and what was read, in a line."""
        texts = self.tokens.drop_duplicates("text")["dataset"].value_counts(sort=False)
        sizes = ", ".join(f"{name} {n:,}" for name, n in texts.items())
        read = f"{len(self.tokens):,} tokens of {texts.sum():,} texts ({sizes})"
        return f"suite {self.suite} · {read}"

    def __str__(self) -> str:
        n = len(complete_layers(self.table))
        return f"{self.sample} · {self.method} top-{self.top_n} · n = {n:,} occurrences"


def check_layers(layers: Sequence[int], sites: Collection[Site]) -> list[int]:
    """The layers, refused unless each has SAEs for its features and for all their predecessors.

    Layer 0 has none for the stream before it (CHOICES 5). `sites` are those of the suite's SAEs.
    """
    modules = {site.module for site in sites}
    residual = sorted(site.layer for site in sites if site.module == "res" and site.layer)
    valid = [n for n in residual if {predecessor_site(n, m) for m in modules} <= {*sites}]
    if not layers or sorted({*layers} & {*valid}) != sorted(layers):
        raise ValueError(f"layers={list(layers)}: expected some of {valid}, each once")
    return list(layers)


def complete_layers_of(sites: Collection[Site]) -> list[int]:
    """The layers that have SAEs and those of all three predecessors; a ValueError if none has."""
    complete = [
        layer
        for layer in sorted({site.layer for site in sites} - {0})
        if {Site(layer, "res"), *(predecessor_site(layer, m) for m in MODULES)} <= {*sites}
    ]
    if not complete:
        told = "no layer has SAEs for its stream, MLP, attention and the stream before"
        raise ValueError(f"{told}: there are no groups to count")
    return complete


def find_occurrences(
    matches: "pd.DataFrame",
    activations: FeatureActivations,
    top_n: int = 1,
    incomplete: bool = False,
    predecessors: FeatureActivations | None = None,
) -> Occurrences:
    """Every active residual feature at every token, with its predecessors' activity (paper 5.1).

    A site counts as active if at least one of the feature's `top_n` matches there is active at the
    same token (CHOICES 32).

    Args:
        incomplete: Whether to include layers that lack one or two of the three sites, such as layer
            0 (CHOICES 5); their groups are formed from the sites that they have.
        predecessors: Where to read predecessors, if at other tokens (`shuffled_tokens`).

    Raises:
        ValueError: If no layer has all three sites and `incomplete` is False, the activations lack
            a site of the table, or the table has fewer ranks than `top_n`.
    """
    import pandas as pd

    matched = _best_sources(matches, top_n, incomplete)
    layers = list(dict.fromkeys(layer for layer, _ in matched))
    sources = (predecessors or activations).by_site
    sites = {Site(layer, "res") for layer in layers} | {predecessor_site(*at) for at in matched}
    if missing := ", ".join(map(str, sorted(sites - set(sources)))):
        raise ValueError(f"no activations at {missing}, of which the match table speaks")
    parts, none = [], np.float32(np.nan)
    for layer in layers:
        codes = activations.by_site[Site(layer, "res")].tocoo()
        places = {"layer": np.int16(layer), "feature": codes.col, "token_row": codes.row}
        part = pd.DataFrame(places | {"activation": codes.data})
        for module in MODULES:
            score, rate = f"s_{module}", f"rate_{module}"
            if (layer, module) not in matched:
                part = part.assign(**{module: False, score: none, rate: none})
                continue
            by_rank, site = matched[layer, module], predecessor_site(layer, module)
            active = _any_active(sources[site], by_rank["source"].to_numpy())
            part[module] = np.asarray(active[codes.row, codes.col]).ravel() > 0
            part[score] = by_rank["score", 1].to_numpy()[codes.col]
            part[rate] = (active.getnnz(axis=0) / active.shape[0]).astype(np.float32)[codes.col]
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    table["group"] = group_names(table)
    tokens = with_dataset(activations.tokens)
    of_rows = tokens[["dataset", "text"]].astype({"text": np.int32})
    of_rows["dataset"] = pd.Categorical(of_rows["dataset"], tokens["dataset"].unique())
    of_rows = of_rows.iloc[table["token_row"]].reset_index(drop=True)
    table = pd.concat([of_rows, table], axis=1)
    suite, method = (str(matches[column].iloc[0]) for column in ("suite", "method"))
    return Occurrences(suite, method, top_n, tokens, table)


def _best_sources(
    matches: "pd.DataFrame", top_n: int, incomplete: bool
) -> "dict[tuple[int, str], pd.DataFrame]":
    """By layer and module the `source` and `score` of each feature (rows) at each rank."""
    ranks = int(matches["rank"].max())
    if not isinstance(top_n, int) or not 1 <= top_n <= ranks:
        raise ValueError(f"top_n={top_n}: expected 1 to {ranks}, the table's ranks")
    best = matches[(matches["direction"] == "backward") & (matches["rank"] <= top_n)]
    by_place = best.groupby(["layer", "module"], observed=True)
    by_place = dict(iter(by_place[["feature", "rank", "source", "score"]]))
    found = {
        (int(layer), str(module)): part.pivot(index="feature", columns="rank")
        for (layer, module), part in by_place.items()
        if incomplete or all((layer, m) in by_place for m in MODULES)
    }
    if not found:
        raise ValueError("no layer has predecessors at all three of res, mlp and att")
    return found


def _any_active(codes: "csr_matrix", sources: np.ndarray) -> "csr_matrix":
    """Of codes `[tokens, sources]` how many of `[features, top_n]` are active; -1 is no source."""
    from scipy.sparse import csr_matrix

    features, ranks = np.nonzero(sources >= 0)
    places = sources[features, ranks], features
    shape = (codes.shape[1], len(sources))
    chosen = csr_matrix((np.ones(len(features), np.int32), places), shape=shape)
    return (codes > 0).astype(np.int32) @ chosen


def modules_of(group: str) -> tuple[str, ...]:
    """Where a feature of a group has an active predecessor: of `res`, `mlp` and `att`."""
    return tuple(module for module in MODULES if module.upper() in group)


def group_names(active: "Mapping[str, np.ndarray] | pd.DataFrame") -> "pd.Categorical":
    """The group of each row, by whether a predecessor is active at `res`, `mlp` and `att`."""
    import pandas as pd

    bit = {module: 1 << place for place, module in enumerate(MODULES)}
    place = np.argsort([sum(bit[module] for module in modules_of(group)) for group in GROUPS])
    bits = sum(np.asarray(active[module]).astype(int) * bit[module] for module in MODULES)
    return pd.Categorical.from_codes(place[bits], categories=list(GROUPS))


def with_dataset(tokens: "pd.DataFrame") -> "pd.DataFrame":
    """Tokens with the `dataset` they are of: `all` unless they say."""
    return tokens if "dataset" in tokens else tokens.assign(dataset="all")


def complete_layers(table: "pd.DataFrame") -> "pd.DataFrame":
    """The occurrences at layers that have all three sites."""
    return table[table[[*SCORES]].notna().all(axis=1)]


def shuffled_tokens(activations: FeatureActivations, seed: int = 0) -> FeatureActivations:
    """The activations with those of each token replaced by those of a token of another text.

    They give the base rate that the paper leaves out: every predecessor is active as often as
    before, but at other tokens of the same dataset. All sites use the same replacement.
    """
    rng = np.random.default_rng(seed)
    tokens = with_dataset(activations.tokens)
    rows = np.arange(len(tokens))
    for _, part in tokens.groupby("dataset", sort=False, observed=True):
        texts = rng.permutation(part["text"].unique())
        order = {text: place for place, text in enumerate(texts)}
        by_text = part.index.to_numpy()[np.argsort(part["text"].map(order), kind="stable")]
        longest = int(part["text"].value_counts().max())
        # So far apart in this order no two tokens are of one text, if there are texts enough.
        furthest = max(longest, len(by_text) - longest)
        rows[by_text] = np.roll(by_text, int(rng.integers(longest, furthest + 1)))
    by_site = {site: codes[rows] for site, codes in activations.by_site.items()}
    return FeatureActivations(activations.tokens, by_site)


def youden_thresholds(
    suite: "Suite", texts: Sequence[str], matches: "pd.DataFrame", max_tokens: int = MAX_TOKENS
) -> dict[tuple[int, str], float]:
    """The score that best separates active from inactive predecessors, by layer and site.

    It has the highest Youden's J over all occurrences in the texts, each cut to `max_tokens`; there
    is none where predecessors are all active or all inactive. A score is its feature's, so that for
    each feature two counts of tokens are enough: they are exact, and of the texts no more is held
    than is read together.
    """
    from sklearn.metrics import roc_curve

    matched = _best_sources(matches, 1, incomplete=False)
    sites = {Site(layer, "res") for layer, _ in matched} | {predecessor_site(*at) for at in matched}
    counts = {at: np.zeros((2, len(by_rank)), int) for at, by_rank in matched.items()}
    for batch in read_batches(suite, tokenize(suite.model, texts, max_tokens), sorted(sites)):
        for at, by_rank in matched.items():
            codes, sources = batch[Site(at[0], "res")], by_rank["source"].to_numpy()
            both = codes.multiply(_any_active(batch[predecessor_site(*at)], sources))
            counts[at] += both.getnnz(axis=0), codes.getnnz(axis=0) - both.getnnz(axis=0)
    cuts = {}
    for at, by_rank in matched.items():
        if counts[at].any(axis=1).all():
            scores = by_rank["score", 1].to_numpy()
            active, weights = np.repeat([True, False], len(scores)), counts[at].ravel()
            false, true, limits = roc_curve(active, np.tile(scores, 2), sample_weight=weights)
            limit = min(limits[np.argmax(true - false)], 1.0)
            # roc_curve counts scores equal to its limit as above; high is strictly above.
            cuts[at] = float(np.nextafter(limit, -1))
    return cuts
