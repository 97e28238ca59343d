"""The ways to match two SAEs: by cosine, at random, by permutation, by correlation."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from flowhelpers.core.features import Site, check_choice
from flowhelpers.core.machine import check_memory
from flowhelpers.matching.cosine import TopK, top_k_cosine
from flowhelpers.suites.saes import SMALLEST_THRESHOLD

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

MAX_TOKENS = 128  # of a text, BOS included
LEAST_ACTIVE = 10  # tokens, for a correlation to say anything
ROWS = 1024  # of correlations with all sources, at a time
Weights = Literal["decoder", "encoder", "both", "all"]
WEIGHTS: tuple[Weights, ...] = (
    "decoder",
    "encoder",
    "both",
    "all",
)  # both without the bias, all with the encoder's
Null = tuple[Tensor, Tensor]  # best scores by chance, sorted: of targets, and of sources


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
    weights: Weights = "decoder",
    folded: bool = False,
    device: str | None = None,
) -> PairMatch:
    """One to one, so that the sum of products is highest (SAE Match; paper 3.1).

    The predecessor of target j is the source i with P[i, j] = 1; the assignment is exact (CHOICES
    15). Of SAEs of unlike width, the larger keeps features without a match. `weights` and `folded`
    are those of `match_table`; scores are cosines of directions whatever was matched.

    Raises:
        ValueError: If the weights of the two cannot be compared, or there is nothing to fold.
        MemoryError: If the matrix of all products does not fit.
    """
    from scipy.optimize import linear_sum_assignment

    what = f"the permutation of {target.site} and {source.site}"
    check_memory(3 * 8 * target.width * source.width, what)
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
    """What a permutation compares: a row of weights for each feature."""
    check_choice("weights", weights, WEIGHTS)
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
    parts = [found.decoder, found.encoder, found.bias[:, None]]
    kept = {"encoder": parts[1:2], "both": parts[:2], "all": parts}[weights]
    return torch.cat(kept, dim=1)


def read_codes(
    suite: "Suite", texts: Sequence[str], sites: Collection[Site], seed: int = 0
) -> "tuple[dict[Site, csr_matrix], np.ndarray]":
    """Activations over texts for `by_pearson`, and for each token another one, by chance.

    Activations are `[tokens, features]`, without BOS and other special tokens. The other token is
    one of the same batch, so many tokens on.
    """
    from scipy.sparse import vstack

    from flowhelpers.activations.sparse import read_batches
    from flowhelpers.suites.model import tokenize

    rng = np.random.default_rng(seed)
    batches, shifted, count = [], [], 0
    for batch in read_batches(suite, tokenize(suite.model, texts, MAX_TOKENS), sites):
        tokens = next(iter(batch.values())).shape[0]
        shifted.append(count + np.roll(np.arange(tokens), int(rng.integers(1, max(2, tokens)))))
        batches.append(batch)
        count += tokens
    codes = {s: vstack([batch[s] for batch in batches], "csr", float) for s in sites}
    return codes, np.concatenate(shifted)


def by_pearson(
    target: "csr_matrix",
    source: "csr_matrix",
    shifted: np.ndarray,
    k: int,
    least_active: int = LEAST_ACTIVE,
) -> tuple[PairMatch, Null]:
    """Top-k by correlation of activations `[tokens, features]` (paper C.4), one more than k.

    Raw activations with their zeros; a correlation that is not above 0 is no match, and so is that
    of a feature active on fewer than `least_active` tokens: two features that are active once, on
    the same token, correlate perfectly (CHOICES 14).
    By chance: the best correlations with sources whose tokens are `shifted`.
    """
    elsewhere = source[shifted]
    match = PairMatch(
        _most_correlated(target, source, k + 1, least_active),
        _most_correlated(source, target, k + 1, least_active),
    )
    nulls = []
    for chooser, other in ((target, elsewhere), (elsewhere, target)):
        best = _most_correlated(chooser, other, 1, least_active).scores[:, 0]
        best = best[torch.from_numpy(chooser.getnnz(0) >= least_active)]
        nulls.append(best.sort().values if len(best) else torch.zeros(1))
    return match, (nulls[0], nulls[1])


def _most_correlated(chooser: "csr_matrix", other: "csr_matrix", k: int, least: int) -> TopK:
    """The k highest correlations above 0 of each chooser; of a tie, the lowest index first."""
    mean, spread = _moments(chooser, least)
    other_mean, other_spread = _moments(other, least)
    features, tokens = chooser.T.tocsr(), chooser.shape[0]
    scores, indices = [], []
    for first in range(0, features.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        covariance = (features[rows] @ other).toarray() / tokens
        covariance -= np.outer(mean[rows], other_mean)
        correlations = torch.from_numpy(covariance / np.outer(spread[rows], other_spread))
        best = correlations.sort(dim=1, descending=True, stable=True)
        scores.append(best.values[:, :k].clamp(max=1).float())
        indices.append(best.indices[:, :k])
    values, places = torch.cat(scores), torch.cat(indices)
    return TopK(places.where(values > 0, -1), values.where(values > 0, 0.0))


def _moments(codes: "csr_matrix", least: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature; infinite where a correlation says nothing."""
    mean = codes.mean(0).A1
    spread = np.sqrt(np.maximum(codes.power(2).mean(0).A1 - mean**2, 0))
    return mean, np.where((codes.getnnz(0) >= least) & (spread > 0), spread, np.inf)
