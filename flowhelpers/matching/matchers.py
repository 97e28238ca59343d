"""The ways to match two SAEs: by cosine, at random, by permutation, by correlation.

Each gives the best sources of every target, and the best targets of every source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.core.machine import check_memory
from flowhelpers.matching.cosine import TopK, top_k_cosine
from flowhelpers.matching.null import Null
from flowhelpers.suites.saes import SMALLEST_THRESHOLD

if TYPE_CHECKING:
    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

MAX_TOKENS = 128  # of a text, BOS included
LEAST_ACTIVE = 10  # tokens, for a correlation to say anything


@dataclass(frozen=True)
class PairMatch:
    """The best sources of every target, and the best targets of every source."""

    backward: TopK
    forward: TopK


def by_cosine(target: "SAE", source: "SAE", k: int, device: str | None = None) -> PairMatch:
    """Top-k by cosine (paper 3.2), one match more than k where there is one, for the margin."""
    later, earlier = target.decoder, source.decoder
    return PairMatch(
        top_k_cosine(later, earlier, min(k + 1, source.width), device=device),
        top_k_cosine(earlier, later, min(k + 1, target.width), device=device),
    )


def random_of_top_k(match: PairMatch, k: int, seed: int = 0) -> PairMatch:
    """One of the k best instead of the best, drawn at random: the paper's baseline (A.2)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(matches: TopK) -> TopK:
        there = (matches.indices[:, :k] >= 0).sum(dim=1, keepdim=True).cpu()
        rank = (torch.rand(there.shape, generator=generator) * there).long()
        rank = rank.to(matches.indices.device)
        return TopK(matches.indices.gather(1, rank), matches.scores.gather(1, rank))

    return PairMatch(draw(match.backward), draw(match.forward))


def by_permutation(
    target: "SAE",
    source: "SAE",
    weights: Literal["decoder", "all"] = "decoder",
    folded: bool = False,
    device: str | None = None,
) -> PairMatch:
    """One to one, so that the sum of products is highest (SAE Match; paper 3.1).

    The predecessor of target j is the source i that the permutation sends there: P[i, j] = 1
    (CHOICES 15). The assignment is exact. Of SAEs of unlike width, the larger keeps
    features without a match. Scores are cosines of directions, whatever weights were matched.

    Args:
        weights: `decoder` compares directions; `all` the decoder, the encoder and its bias, in one
            row of weights for each feature.
        folded: Whether thresholds are folded into the weights first (CHOICES 16); decoder rows
            then count with their threshold as their norm.

    Raises:
        ValueError: If the weights of the two cannot be compared, or there is nothing to fold.
        MemoryError: If the matrix of all products does not fit.
    """
    from scipy.optimize import linear_sum_assignment

    needed = 3 * 8 * target.width * source.width
    check_memory(needed, f"the permutation of {target.site} and {source.site}")
    later, earlier = (_rows(side, weights, folded) for side in (target, source))
    products = (later.to(device) @ earlier.to(device).T).cpu().numpy()
    ends, starts = (torch.from_numpy(side) for side in linear_sum_assignment(products, True))
    directions = target.directions.cpu()[ends], source.directions.cpu()[starts]
    cosines = (directions[0] * directions[1]).sum(-1)
    usable = directions[0].any(1) & directions[1].any(1)
    ends, starts, cosines = ends[usable], starts[usable], cosines[usable]
    return PairMatch(
        _one_to_one(ends, starts, cosines, target.width),
        _one_to_one(starts, ends, cosines, source.width),
    )


def _one_to_one(chooser: Tensor, chosen: Tensor, cosines: Tensor, width: int) -> TopK:
    indices, scores = torch.full((width, 1), -1), torch.zeros(width, 1)
    indices[chooser, 0], scores[chooser, 0] = chosen, cosines
    return TopK(indices, scores)


def _rows(sae: "SAE", weights: str, folded: bool) -> Tensor:
    if weights not in ("decoder", "all"):
        raise ValueError(f"weights={weights!r}: expected 'decoder' or 'all'")
    if weights == "decoder" and not folded:
        return sae.directions
    found = sae.weights(folded)
    if weights == "decoder":  # in the stream's basis, wherever the SAE reads
        sizes = sae.norms * sae.weights().threshold.clamp(min=SMALLEST_THRESHOLD)
        return sae.directions * sizes[:, None]
    if sae.input_site != sae.site:
        raise ValueError(
            f"{sae.site} reads {sae.input_site}, in a space of its own: SAEs that"
            " read other spaces can be matched by their decoders alone"
        )
    return torch.cat([found.decoder, found.encoder, found.bias[:, None]], dim=1)


def by_pearson(
    suite: "Suite",
    texts: Sequence[str],
    pairs: Sequence[tuple[Site, Site]],
    k: int,
    seed: int = 0,
    candidates: int | None = None,
    least_active: int = LEAST_ACTIVE,
) -> dict[tuple[Site, Site], tuple[PairMatch, Null]]:
    """Top-k by correlation of activations (paper C.4), in one pass of the model over the texts.

    Raw activations with their zeros; BOS and other special tokens are left out; a correlation that
    is not defined is 0, and one that is not above 0 is no match. So is that of a feature active on
    too few tokens: two features that are active once, on the same token, correlate perfectly
    (CHOICES 14). By chance: the correlations with a source whose tokens are shifted.

    Args:
        suite: The suite.
        texts: The text sample.
        pairs: Target and source sites.
        k: TopK kept, and one more for the margin.
        seed: Seed of the shifts.
        max_tokens: Each text is cut to so many tokens, BOS included.
        candidates: Looks only at so many sources of highest cosine for each target, and so many
            targets for each source, instead of at all (`pearson_candidates`).
        least_active: Tokens on which a feature has to be active.
    """
    from flowhelpers.activations.sparse import read_batches
    from flowhelpers.suites.model import tokenize

    looked_at = {
        (target, source): _candidates(suite.sae(target), suite.sae(source), candidates)
        if candidates
        else None
        for target, source in pairs
    }
    widths = {site: suite.sae(site).width for pair in pairs for site in pair}
    products = {
        (target, source): np.zeros(
            (2, widths[target] * widths[source] if ends is None else ends.shape[1])
        )
        for (target, source), ends in looked_at.items()
    }
    sums = {site: np.zeros((3, width)) for site, width in widths.items()}
    count = 0
    rng = np.random.default_rng(seed)
    for batch in read_batches(suite, tokenize(suite.model, texts, MAX_TOKENS), list(widths)):
        tokens = next(iter(batch.values())).shape[0]
        count += tokens
        shifted = np.roll(np.arange(tokens), int(rng.integers(1, max(2, tokens))))
        for site, codes in batch.items():
            sums[site] += [codes.sum(0).A1, codes.power(2).sum(0).A1, codes.getnnz(0)]
        for (target, source), ends in looked_at.items():
            for which, codes in enumerate((batch[source], batch[source][shifted])):
                product = batch[target].T @ codes
                picked = product.toarray().ravel() if ends is None else product[*ends].A1
                products[target, source][which] += picked
    return {
        (target, source): _correlated(
            products[target, source],
            _all_pairs(widths[target], widths[source]) if ends is None else ends,
            sums[target],
            sums[source],
            count,
            k,
            least_active,
        )
        for (target, source), ends in looked_at.items()
    }


def pearson_candidates(
    widths: Sequence[tuple[int, int]], memory: int = 2**30, few: int = 64
) -> int | None:
    """How many candidates `by_pearson` is to have: all (None), or `few` where those do not fit.

    The sums of all pairs, of so many targets and sources, may take `memory` bytes.
    """
    whole = 16 * sum(target * source for target, source in widths)
    return None if whole <= memory else few


def _all_pairs(targets: int, sources: int) -> np.ndarray:
    return np.indices((targets, sources), dtype=np.int32).reshape(2, -1)


def _candidates(target: "SAE", source: "SAE", n: int) -> np.ndarray:
    """Pairs of features that are near by cosine, seen from either side: `[2, pairs]`, sorted."""
    sources = top_k_cosine(target.decoder, source.decoder, min(n, source.width)).indices
    targets = top_k_cosine(source.decoder, target.decoder, min(n, target.width)).indices
    back = np.stack([np.indices(sources.shape)[0], sources.cpu().numpy()]).reshape(2, -1)
    on = np.stack([targets.cpu().numpy(), np.indices(targets.shape)[0]]).reshape(2, -1)
    both = np.concatenate([back, on], axis=1)
    return np.unique(both[:, (both >= 0).all(axis=0)], axis=1)


def _correlated(
    products: np.ndarray,
    ends: np.ndarray,
    target: np.ndarray,
    source: np.ndarray,
    count: int,
    k: int,
    least_active: int,
) -> tuple[PairMatch, Null]:
    rows, columns = ends
    (mean_t, spread_t), (mean_s, spread_s) = (
        (total / count, np.sqrt(np.maximum(square / count - (total / count) ** 2, 0)))
        for total, square, _ in (target, source)
    )
    scale = spread_t[rows] * spread_s[columns]
    defined = (target[2][rows] >= least_active) & (source[2][columns] >= least_active) & (scale > 0)
    found, chance = (
        np.where(
            defined,
            (part / count - mean_t[rows] * mean_s[columns]) / np.where(defined, scale, 1),
            0,
        ).clip(-1, 1)
        for part in products
    )
    widths = len(mean_t), len(mean_s)
    match = PairMatch(
        _best(rows, columns, found, widths[0], min(k + 1, widths[1])),
        _best(columns, rows, found, widths[1], min(k + 1, widths[0])),
    )
    by_chance = (
        _best(rows, columns, chance, widths[0], 1).scores[target[2] >= least_active, 0],
        _best(columns, rows, chance, widths[1], 1).scores[source[2] >= least_active, 0],
    )
    none = torch.zeros(1)
    return match, Null(*(draws.sort().values if len(draws) else none for draws in by_chance))


def _best(chooser: np.ndarray, chosen: np.ndarray, scores: np.ndarray, width: int, k: int) -> TopK:
    """The k highest scores above 0 of each chooser; of a tie, the lowest index first."""
    keep = scores > 0
    chooser, chosen, scores = chooser[keep], chosen[keep], scores[keep]
    order = np.lexsort((chosen, -scores, chooser))
    chooser, chosen, scores = chooser[order], chosen[order], scores[order]
    rank = np.arange(len(chooser)) - np.searchsorted(chooser, chooser)
    top = rank < k
    indices, values = np.full((width, k), -1), np.zeros((width, k), dtype=np.float32)
    indices[chooser[top], rank[top]] = chosen[top]
    values[chooser[top], rank[top]] = scores[top]
    return TopK(torch.from_numpy(indices), torch.from_numpy(values))
