"""What the explorer shows of features beyond matches: what they write, where they are active."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowhelpers.activations.corpora import passages
from flowhelpers.activations.sampling import text_length
from flowhelpers.activations.sparse import FeatureActivations, collect
from flowhelpers.core.features import FeatureId, Site
from flowhelpers.core.machine import free_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.groups.occurrences import GROUPS, find_occurrences
from flowhelpers.labels.describe import logit_lens
from flowhelpers.labels.subjects import subject_features
from flowhelpers.matching.cosine import top_k_cosine
from flowhelpers.suites.model import token_strings

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

WRITTEN, CONTEXTS, NEAR = 8, 3, 8  # tokens, places, tokens on each side of a place
SHUFFLES = 200
KEPT = 4 * 2**30  # bytes of directions: all of Gemma 2 2B's stream
Arrays = dict[str, np.ndarray]


def read_features(
    suite: "Suite", table: "pd.DataFrame", given: FeatureActivations | None, small: bool
) -> tuple[dict[str, Any], Arrays]:
    """Of each feature, by site, where it is active, in `given` or else in the package's passages.

    Returns:
        What holds for all, and arrays with a row a feature: `rate` of tokens at which it is active;
        `peak` (rows of `tokens`, one a text), `active` (there) and `near` (activations from `NEAR`
        tokens before to `NEAR` after, in hundredths of it); the `subject` whose passages it tells
        best from others (-1 if no better than by `chance`), with its `auc`; shares of `groups`. Of
        a `small` suite also `writes` (places in `words`), `theta` (the threshold, 0 if none), and
        `direct`, `direct_score`: the best match at each layer, without the layers between.
    """
    from scipy.sparse import csr_matrix

    own = passages()
    read = given or collect(suite, own["text"].tolist(), None, text_length(suite.model))
    text = read.tokens["text"].to_numpy()
    starts = np.flatnonzero(np.diff(text, prepend=-1)).tolist()
    about: dict[str, Any] = {"tokens": token_strings(suite.model, read.tokens["token"].tolist())}
    about |= {"texts": starts, "read": {}, "subjects": {}, "groups": [*GROUPS]}
    counts = np.bincount(text, minlength=int(text.max()) + 1)
    means_of = csr_matrix((1 / counts[text], (text, np.arange(len(text)))))
    if given is None:
        stand = subject_features(suite, read, own["subject"].tolist(), table)
        stand = stand["feature"][stand["passes"].astype(bool)].groupby(stand["subject"])
        about["subjects"] = {name: [] for name in own["subject"]} | stand.agg(list).to_dict()
    groups = _group_shares(table, read)
    parts: list[Arrays] = []
    for site in progress(sorted(suite.saes), "features read"):
        width, codes = suite.about(site, "width"), read.by_site.get(site)
        about["read"][str(site)] = codes is not None
        part = _blank(width)
        if codes is not None:
            part["rate"][:] = codes.getnnz(axis=0) / codes.shape[0]
            _contexts(part, codes.tocsc(), text)
            if given is None:
                _subjects(part, (means_of @ codes).toarray(), own["subject"], [*about["subjects"]])
        for (layer, index), shares in groups.items() if site.module == "res" else ():
            if layer == site.layer:
                part["groups"][index] = shares
        parts.append(part)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return (about, arrays) if not small else _with_weights(suite, about, arrays)


def _blank(width: int) -> Arrays:
    return {
        "rate": np.zeros(width, np.float32),
        "peak": np.full((width, CONTEXTS), -1, np.int32),
        "active": np.zeros((width, CONTEXTS), np.float32),
        "near": np.zeros((width, CONTEXTS, 2 * NEAR + 1), np.uint8),
        "subject": np.full(width, -1, np.int8),
        "auc": np.zeros(width, np.float32),
        "chance": np.zeros(width, np.float32),
        "groups": np.zeros((width, len(GROUPS)), np.float32),
    }


def _contexts(part: Arrays, codes: Any, text: np.ndarray) -> None:
    """The places where features are most active, one a text at most, and what is near them."""
    padded = np.zeros(len(text) + 2 * NEAR)
    for feature, (first, last) in enumerate(zip(codes.indptr, codes.indptr[1:], strict=False)):
        rows, values = codes.indices[first:last], codes.data[first:last]
        order = np.argsort(-values, kind="stable")
        _, best = np.unique(text[rows[order]], return_index=True)  # of each text the first
        padded[rows + NEAR] = values
        for place, at in enumerate(order[np.sort(best)[:CONTEXTS]]):
            window = padded[rows[at] : rows[at] + 2 * NEAR + 1] / values[at]
            part["peak"][feature, place], part["active"][feature, place] = rows[at], values[at]
            part["near"][feature, place] = np.rint(100 * window.clip(0, 1))
        padded[rows + NEAR] = 0


def _subjects(part: Arrays, means: np.ndarray, topics: "pd.Series", names: list[str]) -> None:
    """As `labels.subject_scores`, the best of each feature if no shuffle of the topics has more."""
    from scipy.stats import rankdata

    on, generator = topics.to_numpy() == np.array(names)[:, None], np.random.default_rng(0)
    shuffles = (generator.permutation(on, axis=1) for _ in range(SHUFFLES))
    every = np.concatenate([on, *shuffles]).astype(np.float32)
    sums = (every @ rankdata(means, axis=0).astype(np.float32)).reshape(SHUFFLES + 1, len(on), -1)
    sums, n = np.stack([sums[0], sums[1:].max(axis=0)]), on.sum(axis=1)[:, None]
    auc = (sums - n * (n + 1) / 2) / (n * (len(means) - n))
    part["auc"][:], part["chance"][:] = auc.max(axis=1)
    found = means.any(axis=0) & (part["auc"] > part["chance"])
    part["subject"][found] = auc[0].argmax(axis=0)[found]


def _group_shares(
    table: "pd.DataFrame", read: FeatureActivations
) -> Mapping[tuple[int, int], np.ndarray]:
    """Of each residual feature that is active, the shares of the paper's eight groups (5.1)."""
    import pandas as pd

    try:
        found = find_occurrences(table, read).table
    except ValueError:  # a suite without all three sites has no groups
        return {}
    counts = pd.crosstab([found["layer"], found["feature"]], found["group"])
    counts = counts.reindex(columns=[*GROUPS], fill_value=0)
    shares = counts.to_numpy() / counts.to_numpy().sum(axis=1, keepdims=True)
    return dict(zip(counts.index, shares, strict=True))


def _with_weights(
    suite: "Suite", about: dict[str, Any], arrays: Arrays
) -> tuple[dict[str, Any], Arrays]:
    """Adds what weights alone say: tokens written, thresholds, direct matches."""
    sites = sorted(suite.saes)
    stream = [site for site in sites if site.module == "res"]
    rows = {site: suite.sae(site).directions for site in stream}
    writes, thresholds, direct, scores = [], [], [], []
    for site in progress(sites, "what features write"):
        sae = suite.sae(site)
        usable = torch.ones(sae.width, dtype=torch.bool)
        usable[sae.excluded.cpu()] = False
        chosen = torch.full((sae.width, WRITTEN), -1)
        for some in usable.nonzero().flatten().split(1024):
            chosen[some] = logit_lens(suite, site, some).topk(WRITTEN).indices.cpu()
        writes.append(chosen.numpy().astype(np.int32))
        none = torch.zeros(sae.width)
        thresholds.append((none if sae.thresholds is None else sae.thresholds).cpu().numpy())
        to = np.full((sae.width, len(stream)), -1, np.int32)
        score = np.zeros((sae.width, len(stream)), np.float32)
        for column, other in enumerate(stream):
            if site.module == "res" and other != site:
                best = top_k_cosine(rows[site], rows[other], 1)
                to[:, column] = best.indices[:, 0].cpu()
                score[:, column] = best.scores[:, 0].cpu()
        direct.append(to)
        scores.append(score)
    ids, places = np.unique(np.concatenate(writes), return_inverse=True)
    about["words"] = ["", *token_strings(suite.model, ids[ids >= 0].tolist())]
    places = places.reshape(-1, WRITTEN) + (ids[0] >= 0)  # word 0 is none
    arrays["writes"] = np.where(places > 0, places, -1).astype(np.int32)
    arrays["theta"] = np.concatenate(thresholds).astype(np.float32)
    arrays["direct"], arrays["direct_score"] = np.concatenate(direct), np.concatenate(scores)
    return about, arrays


def written(suite: "Suite", features: Iterable[FeatureId]) -> dict[str, list[str]]:
    """The tokens that features write, by the logit lens; those without a direction are left out."""
    by_site: dict[Site, list[int]] = {}
    for feature in features:
        by_site.setdefault(feature.site, []).append(feature.index)
    found = {}
    for site, indices in by_site.items():
        some = torch.tensor([i for i in indices if i not in suite.sae(site).excluded])
        best = logit_lens(suite, site, some).topk(WRITTEN).indices if len(some) else []
        for index, ids in zip(some.tolist(), best, strict=True):
            found[f"{site}/{index}"] = token_strings(suite.model, ids.tolist())
    return found


def direct_matches(
    suite: "Suite", feature: FeatureId, kept: dict[Site, torch.Tensor]
) -> list[tuple[int, int, float]]:
    """The best match of a residual feature at every other layer: `layer`, `index`, `cosine`.

    `kept` holds directions from call to call: `KEPT` bytes at most, and half of what is free.
    """

    def rows(site: Site) -> torch.Tensor:
        if site in kept:
            return kept[site]
        read = suite.sae(site).directions
        held = sum(each.nbytes for each in kept.values())
        if held + read.nbytes <= min(KEPT, held + free_memory(read.device.type) // 2):
            kept[site] = read
        return read

    own, found = rows(feature.site)[feature.index], []
    for other in sorted(suite.saes):
        if other.module == "res" and other != feature.site:
            cosine, index = (rows(other) @ own).max(dim=0)
            if cosine > 0:
                found.append((other.layer, int(index), round(float(cosine), 4)))
    return found
