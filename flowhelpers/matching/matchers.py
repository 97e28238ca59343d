"""The ways to match two SAEs: by cosine, at random, by permutation, by correlation."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from timeit import repeat
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from flowhelpers.core.features import Site, check_choice
from flowhelpers.core.machine import check_memory, in_threads
from flowhelpers.matching.cosine import Rows, TopK, top_k_both_ways
from flowhelpers.suites.saes import SMALLEST_THRESHOLD

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

LEAST_ACTIVE = 10  # tokens, for a correlation to say anything
CONSTANT = 1e-12  # a variance of so small a share of the mean square is rounding
ROWS = 256  # targets whose correlations with all sources are held at a time, on each thread
TIMED = 2048  # features of the part of an assignment that is timed
# Of an assignment's time with its size: of 8,192 and 16,384 features it is foretold within a factor
# of 1.5, whether half of the targets, or all, have a source of their own among them.
GROWTH = 2.3
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


def by_cosine(target: Rows, source: Rows, k: int, device: str | None = None) -> PairMatch:
    """Top-k by cosine (paper 3.2), one match more than k where there is one, for the margin."""
    return PairMatch(*top_k_both_ways(target, source, k + 1, device=device))


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
    pairs: int = 0,
) -> PairMatch:
    """One to one, so that the sum of products is highest (SAE Match; paper 3.1).

    The predecessor of target j is the source i with P[i, j] = 1; the assignment is exact (CHOICES
    15). Of SAEs of unlike width, the larger keeps features without a match. `weights` and `folded`
    are those of `match_table`; scores are cosines of directions whatever was matched.

    An assignment is on one core, and threads do not help: scipy keeps Python's lock. Where `pairs`
    such as this may take over a minute in all, their time is said before, from that of a part.

    Raises:
        ValueError: If the weights of the two cannot be compared, or there is nothing to fold.
        MemoryError: If the matrix of all products does not fit.
    """
    from scipy.optimize import linear_sum_assignment

    what = f"the permutation of {target.site} and {source.site}"
    check_memory(3 * 8 * target.width * source.width, what)
    later, earlier = (_rows(side, weights, folded) for side in (target, source))
    products = (later.to(device) @ earlier.to(device).T).cpu().numpy()
    if pairs and (minutes := pairs * assignment_time(products) / 60) > 1:
        size = f"{target.width:,} × {source.width:,} features"
        print(f"up to {pairs} assignments of {size}: about {minutes:.0f} minutes on one core")
    ends, starts = (torch.from_numpy(side) for side in linear_sum_assignment(products, True))
    directions = target.directions.cpu()[ends], source.directions.cpu()[starts]
    cosines = (directions[0] * directions[1]).sum(-1)
    usable = directions[0].any(1) & directions[1].any(1)
    ends, starts, cosines = ends[usable], starts[usable], cosines[usable]
    return PairMatch(
        _one_to_one(ends, starts, cosines, target.width),
        _one_to_one(starts, ends, cosines, source.width),
    )


def assignment_time(products: np.ndarray) -> float:
    """Seconds that an assignment takes here, by that of its first rows and columns."""
    from scipy.optimize import linear_sum_assignment

    share = min(1, TIMED / max(products.shape))
    rows, columns = (int(n * share) for n in products.shape)
    part = products[:rows, :columns]
    times = repeat(lambda: linear_sum_assignment(part, True), number=1, repeat=3)
    return min(times) * share**-GROWTH


def _one_to_one(chooser: Tensor, chosen: Tensor, cosines: Tensor, width: int) -> TopK:
    indices, scores = torch.full((width, 1), -1), torch.zeros(width, 1)
    indices[chooser, 0], scores[chooser, 0] = chosen, cosines
    return TopK(indices, scores)


def check_weights(sae: "SAE", weights: str, folded: bool) -> None:
    """Raise a ValueError if `by_permutation` cannot compare an SAE by these weights."""
    check_choice("weights", weights, WEIGHTS)
    if weights != "decoder" and sae.input_site != sae.site:
        raise ValueError(
            f"{sae.site} reads {sae.input_site}, in a space of its own: SAEs that"
            " read other spaces can be matched by their decoders alone"
        )
    if weights != "decoder" or folded:
        sae.check_encoder(folded)


def _rows(sae: "SAE", weights: str, folded: bool) -> Tensor:
    """What a permutation compares: a row of weights for each feature."""
    check_weights(sae, weights, folded)
    if weights == "decoder" and not folded:
        return sae.directions
    if weights == "decoder":  # in the stream's basis, wherever the SAE reads
        sizes = sae.norms * sae.weights().threshold.clamp(min=SMALLEST_THRESHOLD)
        return sae.directions * sizes[:, None]
    found = sae.weights(folded)
    parts = [found.decoder, found.encoder, found.bias[:, None]]
    kept = {"encoder": parts[1:2], "both": parts[:2], "all": parts}[weights]
    return torch.cat(kept, dim=1)


def read_codes(
    suite: "Suite", texts: Sequence[str], sites: Collection[Site], seed: int, max_tokens: int
) -> "tuple[dict[Site, csr_matrix], np.ndarray]":
    """Activations over texts for `by_pearson`, and for each token another one, by chance.

    Activations are `[tokens, features]`, without BOS and other special tokens, 8 bytes each that is
    not zero: of 100,000 tokens and an L0 of 80 at the 48 sites that even layers of Gemma 2 2B need
    3.1 GB, at all 78 sites 5.0 GB. The other token is one of the same batch, so many tokens on.

    Raises:
        MemoryError: If, by the first batch, all activations will not fit.
    """
    from scipy.sparse import vstack

    from flowhelpers.activations.sparse import read_batches
    from flowhelpers.suites.model import tokenize

    rng = np.random.default_rng(seed)
    ids = tokenize(suite.model, texts, max_tokens)
    batches, shifted, count = [], [], 0
    for batch in read_batches(suite, ids, sites):
        tokens = next(iter(batch.values())).shape[0]
        if not batches:
            share = int(ids.is_text.sum()) / tokens
            size = 8 * sum(codes.nnz for codes in batch.values())
            check_memory(int(share * size), f"{int(share * tokens):,} tokens at {len(batch)} sites")
        shifted.append(count + np.roll(np.arange(tokens), int(rng.integers(1, max(2, tokens)))))
        batches.append(batch)
        count += tokens
    # Taken out of the batches site by site, so that there is never twice as much in memory.
    codes = {s: vstack([batch.pop(s) for batch in batches], "csr") for s in sites}
    return codes, np.concatenate(shifted)


def by_pearson(
    target: "csr_matrix",
    source: "csr_matrix",
    shifted: np.ndarray,
    k: int,
    least_active: int = LEAST_ACTIVE,
) -> tuple[PairMatch, Null]:
    """Top-k by correlation of activations `[tokens, features]` (paper C.4), one more than k.

    All pairs of features are compared. Raw activations with their zeros; a correlation that is not
    above 0 is no match, and so is that of a feature active on fewer than `least_active` tokens: two
    features that are active once, on the same token, correlate perfectly (CHOICES 14).
    By chance: the best correlations with sources whose tokens are `shifted`.

    Both directions come from one set of sums: sparse products in float64, of some targets at a time
    on each of torch's threads. At Gemma's size (100,000 tokens, 16,384 features on both sides, an
    L0 of 80) a pair of SAEs takes 22 s of one core, half of it for chance, and 1 GB: the 36 pairs
    of its even layers 13 minutes and all 77 of them 28, divided by the cores. Dense sums are 2·T·F²
    = 5·10¹³ operations, 42,000 times as many; torch took 5 minutes for them on two
    cores where sparse ones took 7 s on one. So they are on the CPU, whatever the device.

    Raises:
        MemoryError: If there is no room for all that is held at a time (some 0.2 GB a thread).
    """
    target, source = target.astype(float), source.astype(float)
    found = _most_correlated(target, source, k + 1, least_active)
    by_chance = _most_correlated(target, source[shifted], 1, least_active)
    nulls = []
    for codes, best in ((target, by_chance.backward), (source, by_chance.forward)):
        scores = best.scores[torch.from_numpy(codes.getnnz(0) >= least_active), 0]
        nulls.append(scores.sort().values if len(scores) else torch.zeros(1))
    return found, (nulls[0], nulls[1])


def _most_correlated(target: "csr_matrix", source: "csr_matrix", k: int, least: int) -> PairMatch:
    """The k highest correlations above 0 of each side; of a tie, the lowest index first."""
    (tokens, width), threads = target.shape, torch.get_num_threads()
    dense = threads * 6 * 8 * min(ROWS, width) * source.shape[1]
    what = f"the correlation of {width:,} with {source.shape[1]:,} features over {tokens:,} tokens"
    check_memory(dense + 12 * target.nnz, what)
    mean, spread = _moments(target, least)
    other_mean, other_spread = _moments(source, least)
    features = target.T.tocsr()

    def best_of(first: int) -> tuple[TopK, TopK]:
        rows = slice(first, first + ROWS)
        sums = (features[rows] @ source).toarray() / tokens - np.outer(mean[rows], other_mean)
        found = torch.from_numpy(sums / np.outer(spread[rows], other_spread))
        onward = _highest(found.T.contiguous(), k)
        return _highest(found, k), TopK(onward.indices + first, onward.scores)

    backward, forward = zip(*in_threads(best_of, range(0, width, ROWS)), strict=True)
    # Parts are in the order of targets and the sort is stable: of a tie the lowest index stays.
    values = torch.cat([part.scores for part in forward], dim=1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    indices = torch.cat([part.indices for part in forward], dim=1).gather(1, order)
    best = torch.cat([part.indices for part in backward]), torch.cat([p.scores for p in backward])
    return PairMatch(_above_0(*best), _above_0(indices[:, :k], values[:, :k]))


def _above_0(indices: Tensor, values: Tensor) -> TopK:
    there = values > 0
    return TopK(indices.where(there, -1), values.clamp(max=1).float().where(there, 0.0))


def _highest(values: Tensor, k: int) -> TopK:
    """The k highest of each row, whatever their sign; of a tie, the lowest index first."""
    highest, places = values.topk(min(k + 1, values.shape[1]), dim=1)
    tied = ((highest[:, 1:] == highest[:, :-1]) & (highest[:, 1:] > 0)).any(dim=1)  # few
    again = values[tied].sort(dim=1, descending=True, stable=True)
    highest[tied], places[tied] = (x[:, : places.shape[1]] for x in (again.values, again.indices))
    return TopK(places[:, :k], highest[:, :k])


def _moments(codes: "csr_matrix", least: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature; infinite where a correlation says nothing."""
    mean, power = codes.mean(0).A1, codes.power(2).mean(0).A1
    variance = power - mean**2
    tells = (codes.getnnz(0) >= least) & (variance > CONSTANT * power)
    return mean, np.where(tells, np.sqrt(variance.clip(min=0)), np.inf)
