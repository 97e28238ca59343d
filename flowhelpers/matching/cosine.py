"""Exact top-k cosine between two SAEs of any size, in blocks of bounded memory.

Where low precision is faster, a product in bfloat16 makes a short list of sources for every target,
and the list is rescored in float32. Rounding moves a cosine by no more than a bound that is known
for each target, so that a list can be proven complete (`_certified`); one that cannot is made
longer. The answer is always that of float32.
"""

import time
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.core.directions import unit_rows
from flowhelpers.core.progress_bar import progress

MEMORY = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}
GROUP = 64  # columns of which the highest is taken first: far quicker than sorting out all
LISTED = 24  # entries of a short list beyond the k that are asked for
FLOAT32_UNIT = 2.0**-24  # rounding of one float32 operation, relative
BFLOAT16_UNIT = 2.0**-8


@dataclass(frozen=True)
class TopK:
    """The best sources of every target, best first; where there is none, index -1 and score 0."""

    indices: Int[Tensor, "targets k"]
    scores: Float[Tensor, "targets k"]


def top_k_cosine(
    target: Float[Tensor, "targets d_model"],
    source: Float[Tensor, "sources d_model"],
    k: int = 1,
    memory: int | None = None,
    device: str | torch.device | None = None,
) -> TopK:
    """The k sources of highest cosine for each target (paper 3.2).

    Both sides, in any floating type, are normalised in float32 (CHOICES 2). The cosine is signed:
    an antipodal direction is no match. Rows of zeros match nothing. Ties go to the lowest index
    (CHOICES 3).

    Args:
        memory: Bytes to use besides input and result; by default 512 MiB on a CPU, 2 GiB on a GPU.
            The minimum is a block of one target and 64 sources.
        device: Where to compute; blocks are moved there. By default the device of `target`.

    Raises:
        ValueError: If the widths differ, k or memory is out of range, or a value is not finite.
    """
    if target.ndim != 2 or source.ndim != 2 or target.shape[1] != source.shape[1]:
        raise ValueError(
            f"cannot compare target {tuple(target.shape)} with source {tuple(source.shape)}:"
            " expected two matrices of the same width"
        )
    if not 1 <= k <= len(source):
        raise ValueError(f"k={k}: expected 1 to {len(source)}, the number of source features")
    device = torch.device(device) if device else target.device
    memory = MEMORY.get(device.type, MEMORY["cpu"]) if memory is None else memory
    if memory < 1:
        raise ValueError(f"memory={memory}: expected a number of bytes, 1 or more")
    quick = quick_dtype(device.type)
    rows_at_once, columns_at_once = _block_sizes(memory, target.shape[1], len(source), k)
    indices = torch.full((len(target), k), -1, device=device)
    scores = torch.zeros(len(target), k, device=device)
    columns, rows = range(0, len(source), columns_at_once), range(0, len(target), rows_at_once)
    block: Any = None
    for column, row in progress([*product(columns, rows)], "cosines"):
        if row == 0:
            block = None  # before the next is made, so that there is never room for two
            block = _prepare(source[column : column + columns_at_once], column, quick, device)
        here = slice(row, row + rows_at_once)
        units = unit_rows(target[here].to(device), row)
        best = _best_of_block(units, block, k)
        # Earlier blocks stand first, and the sort is stable: of a tie the lowest index stays.
        both = torch.cat([scores[here], best.scores], dim=1)
        which = torch.cat([indices[here], best.indices + column], dim=1)
        both, order = both.sort(dim=1, descending=True, stable=True)
        scores[here] = both[:, :k]
        indices[here] = which.gather(1, order)[:, :k].where(both[:, :k] > 0, -1)
    return TopK(indices, scores.clamp_(0, 1))


@cache
def quick_dtype(device_type: str) -> torch.dtype:
    """The type in which products are quickest here: on a CPU a trial of some milliseconds tells."""
    if device_type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    if device_type == "cuda" or torch.get_float32_matmul_precision() != "highest":
        return torch.bfloat16
    if device_type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16) * 2:
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(4096, 1024, dtype=dtype)
        began = time.perf_counter()
        torch.mm(a, b.T)
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=seconds.__getitem__)


@dataclass(frozen=True)
class _Block:
    """Sources of one block, padded with rows of zeros, which match nothing."""

    units: Tensor
    rough: Tensor  # in the quick type
    error: float  # the largest norm of what rounding took from a row


def _prepare(source: Tensor, first: int, quick: torch.dtype, device: torch.device) -> _Block:
    units = unit_rows(source.to(device), first)
    units = torch.nn.functional.pad(units, (0, 0, 0, -len(units) % GROUP))
    rough, error = _rounded(units, quick)
    return _Block(units, rough, error.max().item())


def _rounded(units: Tensor, quick: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in the quick type, and the norm of what rounding took from each."""
    rough = units.to(quick)
    if quick is units.dtype:
        return rough, units.new_zeros(len(units))
    parts = zip(units.split(1024), rough.split(1024), strict=True)
    return rough, torch.cat([(a - b).norm(dim=1) for a, b in parts])


def _block_sizes(memory: int, d: int, sources: int, k: int) -> tuple[int, int]:
    # Half for the sources of a block, in float32 and the quick type; half for all that depends on
    # its targets: the product, its short list, and the targets themselves.
    columns = max(GROUP, memory // 2 // (8 * d) // GROUP * GROUP)
    columns = min(columns, sources + -sources % GROUP)
    listed = min(k + LISTED, columns)
    a_row = 12 * d + 6 * columns + listed * (GROUP * 12 + 60)
    return max(1, memory // 2 // a_row), columns


def _best_of_block(target: Tensor, block: _Block, k: int) -> TopK:
    # With t', s' the rounded rows, |t·s - t'·s'| <= |t - t'| |s| + |t'| |s - s'|, where |s| = 1 and
    # |t'| <= 1 + |t - t'|. To it comes what sums in float32 lose: two products and one norm.
    rough, error = _rounded(target, block.rough.dtype)
    if rough.is_cuda and rough.dtype is torch.bfloat16:  # no rounding on the way
        product = torch.mm(rough, block.rough.T, out_dtype=torch.float32)
    else:
        product = rough @ block.rough.T
    slack = 3 * target.shape[1] * FLOAT32_UNIT + 1e-7
    error += (1 + error) * block.error + slack
    return _certified(target, block, product, error, k, k + LISTED)


def _certified(
    target: Tensor, block: _Block, product: Tensor, error: Tensor, k: int, listed: int
) -> TopK:
    """The k best of a block, proven to be those of the exact cosines.

    Of unit rows t of `target` and s of `block` in float32, `product` has the rough cosines p(t, s),
    `[targets, sources of the block]`, and `error` for each target a bound on |p(t, s) - t·s| but
    for the rounding of the product itself. `listed` sources are rescored for each target.
    """
    # 1. A list that would hold much of the block saves nothing: all cosines, in float64, so that
    #    equal sources come out equal.
    if 4 * listed > len(block.units):
        parts = [target.double() @ part.double().T for part in block.units.split(4096)]
        scores, indices = torch.cat(parts, dim=1).float().sort(dim=1, descending=True, stable=True)
        return TopK(indices[:, :k], scores[:, :k])
    # 2. The short list: the `listed` sources of the highest rough cosines. So every other source
    #    has a rough cosine of at most `rough[:, -1]`, the lowest on the list.
    rough, places = _highest(product, listed)
    # 3. Rescored in float32. Sorted by index first, and then stably by cosine: ties go to the
    #    lowest index, on the list. That no source off the list ties is proven in 5.
    places = places.sort(dim=1).values
    scores, order = _dots(target, block.units, places).sort(dim=1, descending=True, stable=True)
    scores, places = scores[:, :k].contiguous(), places.gather(1, order[:, :k])
    # 4. The bound: a source off the list has an exact cosine of at most `beyond`. Its rough cosine
    #    is at most the list's lowest; the product was rounded once to its type (`rounding`,
    #    relative); the rows were rounded before it, and the sums carry float32 errors (`error`).
    rounding = BFLOAT16_UNIT if product.dtype is torch.bfloat16 else FLOAT32_UNIT
    lowest = rough[:, -1].float()
    beyond = lowest + rounding * lowest.abs() + error
    # 5. A target's k best are proven if its k-th score is strictly above that bound. They are also
    #    proven if the bound is not above zero (a cosine that is not is no match, so nothing off the
    #    list counts), or if the target is a row of zeros (which matches nothing).
    certain = (scores[:, -1] > beyond) | (beyond <= 0) | ~target.any(dim=1)
    # 6. The others get a list eight times as long, an eighth of the targets at a time, so that the
    #    memory stays the same. This ends: at the latest in 1, where there is nothing to prove.
    longer = 8
    uncertain = torch.nonzero(~certain).flatten()
    for again in uncertain.split(max(1, len(target) // longer)) if len(uncertain) else ():
        redone = _certified(target[again], block, product[again], error[again], k, longer * listed)
        scores[again], places[again] = redone.scores, redone.indices
    return TopK(places, scores)


def _highest(product: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n highest of each row: they lie in those n groups of columns that reach highest."""
    groups = product.view(len(product), -1, GROUP)
    if groups.shape[1] <= n:
        return product.topk(n, dim=1)
    chosen = groups.amax(dim=2).topk(n, dim=1).indices
    candidates = groups.gather(1, chosen[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    values, places = candidates.topk(n, dim=1)
    return values, chosen.gather(1, places // GROUP) * GROUP + places % GROUP


def _dots(target: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """Products of each target with some sources, each summed alike wherever it stands."""
    if target.is_cuda:
        rows = max(1, 2**26 // (places.shape[1] * target.shape[1]))
        parts = zip(target.split(rows), places.split(rows), strict=True)
        return torch.cat([(source[p] * t[:, None]).sum(-1) for t, p in parts])
    n, listed = places.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        pattern = torch.sparse_csr_tensor(
            torch.arange(0, n * listed + 1, listed),
            places.flatten(),
            torch.zeros(n * listed),
            size=(n, len(source)),
            check_invariants=False,
        )
        dots = torch.sparse.sampled_addmm(pattern, target, source.T, beta=0)
    return dots.values().view(n, listed)
