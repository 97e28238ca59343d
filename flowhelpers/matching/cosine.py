"""Exact top-k cosine between two SAEs of any size, one way or both ways from one product.

A product in the type that is quickest here tells every cosine within a bound that is known for each
feature. All pairs that, by this bound, may be among the k best are computed again in float32
(`_best_of`). So the answer is that of float32, whatever the type of the product.

The work is the product's, 2·n·m·d operations for n and m features of width d; choosing from it
takes as long as reading it. A pair of Gemma 2 2B's SAEs (16,384 features, width 2,304) takes
1.2·10¹² operations, its 77 pairs 9.5·10¹³. Two SAEs of a million features take 4.6·10¹⁵: 12 s of a
GPU that makes 4·10¹⁴ a second in bfloat16. They need not fit in its memory: with 4 GiB blocks of
some 30,000 features are multiplied, and each SAE is read 35 times.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.core.directions import Directions, device_of, prepare
from flowhelpers.core.machine import in_threads, quick_dtype
from flowhelpers.core.progress_bar import progress

MEMORY = {"cpu": 2**30, "cuda": 4 * 2**30}
GROUP = 64  # entries of which the highest is taken first: far quicker than sorting out all
STRIP = 2048  # rows that a CPU's core multiplies at a time
FEW_STRIPS = 2
LESS = 0.7  # of the memory that a GPU did not have
LISTED = 64  # bytes of an entry that may be among the best
FLOAT32_UNIT = 2.0**-24  # rounding of one operation, relative
UNITS = {torch.float32: FLOAT32_UNIT, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class TopK:
    """The best sources of every target, best first; where there is none, index -1 and score 0."""

    indices: Int[Tensor, "targets k"]
    scores: Float[Tensor, "targets k"]


Rows = Tensor | Directions


def top_k_cosine(
    target: Float[Tensor, "targets d_model"] | Directions,
    source: Float[Tensor, "sources d_model"] | Directions,
    k: int = 1,
    memory: int | None = None,
    device: str | torch.device | None = None,
) -> TopK:
    """The k sources of highest cosine for each target (paper 3.2).

    Both sides, in any floating type, are normalised in float32 (CHOICES 2). The cosine is signed:
    an antipodal direction is no match. Rows of zeros match nothing. Ties go to the lowest index
    (CHOICES 3).

    Args:
        memory: Bytes to use besides input and result, a little more where very many cosines are
            among the best or nearly so; by default 1 GiB on a CPU, 4 GiB on a GPU. Where a GPU has
            less, it begins again in smaller blocks, says so, and stays with them from then on.
        device: Where to compute; blocks are moved there. By default the device of `target`.

    Raises:
        ValueError: If the widths differ, k is out of range, a value is not finite, or memory is
            too small for a block of 64 features of each side.
        MemoryError: If the device has no room for such a block.
    """
    return _matches(target, source, k, memory, device, both=False)[0]


def top_k_both_ways(
    target: Float[Tensor, "targets d_model"] | Directions,
    source: Float[Tensor, "sources d_model"] | Directions,
    k: int = 1,
    memory: int | None = None,
    device: str | torch.device | None = None,
) -> tuple[TopK, TopK]:
    """The best sources of each target, and the best targets of each source, from one product.

    As `top_k_cosine` finds them, with the same errors; k or as many as there are.
    """
    return _matches(target, source, k, memory, device, both=True)


def _matches(
    target: Rows, source: Rows, k: int, memory: int | None, device: Any, both: bool
) -> tuple[TopK, TopK]:
    shapes = _rows_of(target).shape, _rows_of(source).shape
    if not (isinstance(k, int) and 1 <= k <= (k if both else len(source))):
        raise ValueError(f"k={k}: expected 1 to {len(source)}, the number of source features")
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"cannot compare target {tuple(shapes[0])} with source {tuple(shapes[1])}:"
            " expected two matrices of the same width"
        )
    device = device_of(device or _rows_of(target).device)
    usual, ran_out = memory is None, None
    memory = MEMORY.get(device.type, MEMORY["cpu"]) if memory is None else memory
    while True:
        try:
            *blocks, needed = _block_sizes(target, source, memory, device.type, both)
        except ValueError:
            if ran_out is None:
                raise
            told = f"{device} has no room for blocks of {GROUP} features"
            raise MemoryError(told) from ran_out
        try:
            return _in_blocks(target, source, k, memory, device, both, blocks)
        except torch.OutOfMemoryError as error:
            if ran_out is None:
                told = f"out of memory while matching on {device}: it begins again in smaller"
                warnings.warn(f"{told} blocks", stacklevel=3)
            ran_out, memory = error, int(LESS * needed)
        if usual:  # what comes later finds no more room
            MEMORY[device.type] = memory


def _rows_of(side: Rows) -> Tensor:
    return side.rows if isinstance(side, Directions) else side


def _block_sizes(
    target: Rows, source: Rows, memory: int, device_type: str, both: bool
) -> tuple[int, int, float]:
    """Targets and sources of a block that fits, with its product, in memory; and what it takes."""
    width, quick = _rows_of(target).shape[1], quick_dtype(device_type)
    of_row = width * (4 + quick.itemsize)  # float32, and the quick type
    raw = [of_row * (not isinstance(side, Directions)) for side in (target, source)]
    of_pair = 1.1 * (4 if device_type == "cuda" else quick.itemsize)
    rows, columns = len(target), len(source)
    if device_type == "cpu" and not both:  # new memory costs as much as a tenth of a product
        rows = min(rows, FEW_STRIPS * STRIP)

    def needed() -> float:
        return 4 / 3 * (rows * raw[0] + columns * raw[1] + rows * columns * of_pair)

    while needed() > memory:
        # One way it makes no difference how many targets are compared at a time.
        if rows > (columns if both else min(columns, STRIP)) or columns <= GROUP < rows:
            rows = max(GROUP, rows // 2 // GROUP * GROUP)
        elif columns > GROUP:
            columns = max(GROUP, columns // 2 // GROUP * GROUP)
        else:
            least = f"a block of {rows} by {columns} features of width {width}"
            raise ValueError(f"memory={memory}: expected {needed():.0f} bytes or more, for {least}")
    return max(rows, 1), max(columns, 1), needed()


def _in_blocks(
    target: Rows,
    source: Rows,
    k: int,
    memory: int,
    device: torch.device,
    both: bool,
    blocks: Sequence[int],
) -> tuple[TopK, TopK]:
    backward, forward = (
        TopK(torch.full((n, best), -1, device=device), torch.zeros(n, best, device=device))
        for n, best in ((len(target), min(k, len(source))), (len(source), min(k, len(target))))
    )
    rows, columns = (range(0, len(s), n) for s, n in zip((target, source), blocks, strict=True))
    columns_of: Any = None
    dtype = torch.float32 if device.type != "cpu" else quick_dtype("cpu")
    size = [min(len(s), n) + GROUP for s, n in zip((target, source), blocks, strict=True)]
    room = torch.empty(size[0] * size[1], dtype=dtype, device=device)
    for column, row in progress([*product(columns, rows)], "cosines"):
        if row == 0:
            columns_of = None  # before the next are made, so that there is never room for two
            columns_of = prepare(source[column : column + blocks[1]], device, column)
        rows_of = prepare(target[row : row + blocks[0]], device, row)
        found = _in_block(rows_of, columns_of, k, memory, both, room)
        del rows_of
        _keep(backward, found[0], row, column)
        if found[1] is not None:
            _keep(forward, found[1], column, row)
    return backward, forward


def _in_block(
    rows: Directions, columns: Directions, k: int, memory: int, both: bool, room: Tensor
) -> tuple[TopK, TopK | None]:
    cosines, by_row, by_column = _product(rows, columns, k, both, room)
    best = _best_of(cosines, by_row, rows, columns, k, memory)
    if by_column is None:
        return best, None
    return best, _best_of(cosines.T, by_column, columns, rows, k, memory)


def _keep(best: TopK, of_block: TopK, first: int, first_other: int) -> None:
    """Puts what a block has found among the best that are known of its rows."""
    rows, k = slice(first, first + len(of_block.scores)), best.scores.shape[1]
    # Earlier blocks stand first, and the sort is stable: of a tie the lowest index stays.
    scores = torch.cat([best.scores[rows], of_block.scores], dim=1)
    indices = torch.cat([best.indices[rows], of_block.indices + first_other], dim=1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    best.scores[rows] = scores[:, :k].clamp(max=1)
    best.indices[rows] = indices.gather(1, order)[:, :k].where(scores[:, :k] > 0, -1)


def _product(
    rows: Directions, columns: Directions, k: int, both: bool, room: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rough cosines, in `room`, and the highest of each group of `GROUP` or fewer, both ways.

    All are padded with -inf to whole groups; the last is `[columns, groups of rows]`.
    """
    n, m = len(rows), len(columns)
    of_row, of_column = _group_size(m, k), _group_size(n, k)
    on_gpu = rows.rough.device.type != "cpu"
    shape = -(-n // of_column) * of_column, -(-m // of_row) * of_row
    cosines = room[: shape[0] * shape[1]].view(shape)
    cosines[n:], cosines[:, m:] = -torch.inf, -torch.inf
    by_row = cosines.new_empty(shape[0], shape[1] // of_row)
    by_column = cosines.new_empty(shape[0] // of_column, shape[1]) if both else None

    def multiply(strip: slice) -> None:
        real = slice(strip.start, min(strip.stop, n))
        if on_gpu and rows.rough.dtype is torch.bfloat16:  # no rounding on the way
            cosines[real, :m] = torch.mm(rows.rough[real], columns.rough.T, out_dtype=room.dtype)
        else:
            torch.mm(rows.rough[real], columns.rough.T, out=cosines[real, :m])
        _amax(cosines[strip].unflatten(1, (-1, of_row)), 2, by_row[strip])
        if by_column is not None:
            groups = slice(strip.start // of_column, -(-strip.stop // of_column))
            _amax(cosines[strip].unflatten(0, (-1, of_column)), 1, by_column[groups])

    strip = shape[0] if on_gpu else STRIP
    strips = [slice(i, min(i + strip, shape[0])) for i in range(0, shape[0], strip)]
    in_threads(multiply, strips, rows.rough.device.type)
    return cosines, by_row[:n], None if by_column is None else by_column.T[:m].contiguous()


def _amax(entries: Tensor, dim: int, highest: Tensor) -> None:
    """The highest; of bfloat16, if none is above 0, any of them.

    Bits of those above 0 are in the same order as integers, whose highest is found five times as
    quickly.
    """
    if entries.dtype is torch.bfloat16:
        entries, highest = entries.view(torch.int16), highest.view(torch.int16)
    torch.amax(entries, dim, out=highest)


def _group_size(n: int, k: int) -> int:
    """So many that among the groups' highest the k-th tells much of the k-th of all."""
    size = GROUP
    while size > 1 and n < 16 * k * size:
        size //= 2
    return size


def _best_of(
    cosines: Tensor, highest: Tensor, rows: Directions, others: Directions, k: int, memory: int
) -> TopK:
    """The k best others of each row, proven to be those of the exact cosines.

    `cosines` are rough, `[rows or more, others or more]`, `highest` those of each group. Of a row t
    and another s in float32 with rounded t' and s', |t·s - t'·s'| <= |t - t'| |s| + |t'| |s - s'|,
    where |s| = 1 and |t'| <= 1 + |t - t'|; to it comes what sums of d terms in float32 lose, here
    and where the exact cosine is computed (`error`). The product was also rounded once to its type
    (`unit`, relative).

    At least k others have a rough cosine of the k-th highest of the groups or more, so k exact ones
    are `least` or more. Whatever is among the k best has an exact cosine of `least` or more, and
    above 0, as no other is a match; so its rough one is at least `low`. Of those that are, the ones
    at or above that k-th highest are computed first: the lowest of them is a better `least`.
    """
    k, n = min(k, len(others)), len(rows)
    indices = torch.full((n, k), -1, device=cosines.device)
    scores = torch.zeros(n, k, device=cosines.device)
    error = rows.errors + (1 + rows.errors) * others.errors.amax()
    error += 2 * rows.rows.shape[1] * FLOAT32_UNIT + 1e-7
    unit, size = UNITS[cosines.dtype], cosines.shape[1] // highest.shape[1]
    kth = highest.topk(k, dim=1).values[:, -1].float()
    least = (kth - unit * kth.abs() - error).clamp(min=0)

    def lowest(least: Tensor, error: Tensor) -> Tensor:
        low = least - error
        low -= 2.02 * unit * low.abs()  # for the product's rounding, and for its own
        return low.to(cosines.dtype)

    low = lowest(least, error).masked_fill(rows.scale == 0, torch.inf)
    near = (highest >= low[:, None]) | (low <= 0)[:, None]
    # So many rows at a time that all that may be among their best fits.
    room = max(1, memory // 8 // torch.get_num_threads() // LISTED)
    part = (near.sum(1) * size).cumsum(0) // room
    ends = part.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()

    def choose(here: slice) -> None:
        row, group = near[here].nonzero(as_tuple=True)
        entries = cosines[here].unflatten(1, (-1, size))[row, group]
        which, place = (entries >= low[here][row, None]).nonzero(as_tuple=True)
        row, other, rough = row[which], group[which] * size + place, entries[which, place]

        def cosines_of(some: Tensor) -> Tensor:
            exact = _dots(rows.rows[here], others.rows, row[some], other[some])
            return exact * rows.scale[here][row[some]] * others.scale[other[some]]

        first = rough >= kth[here][row]
        exact = rows.scale.new_zeros(len(row)).masked_scatter(first, cosines_of(first))
        best = rows.scale.new_full((here.stop - here.start,), torch.inf)
        best = best.scatter_reduce(0, row[first], exact[first], "amin").clamp(min=0)
        second = ~first & (rough >= lowest(best, error[here])[row])
        exact = exact.masked_scatter(second, cosines_of(second))
        either = first | second
        found = _sorted(row[either], other[either], exact[either], len(best), k)
        indices[here], scores[here] = found.indices, found.scores

    parts = [slice(*ends_of) for ends_of in pairwise([0, *ends])]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        in_threads(choose, parts, rows.rows.device.type)
    return TopK(indices, scores)


def _sorted(row: Tensor, other: Tensor, scores: Tensor, n: int, k: int) -> TopK:
    """The k best of each row, of entries in the order of rows and others."""
    counts = torch.bincount(row, minlength=n)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = n, max(k, int(counts.max()))
    table = scores.new_zeros(shape).index_put((row, place), scores)
    others = other.new_full(shape, -1).index_put((row, place), other)
    table, order = table.sort(dim=1, descending=True, stable=True)  # of a tie the lowest index
    return TopK(others.gather(1, order[:, :k]), table[:, :k])


def _dots(rows: Tensor, others: Tensor, row: Tensor, other: Tensor) -> Tensor:
    """Products of some rows with some others, each summed alike wherever it stands."""
    n = len(rows)
    if 16 * len(row) > n * len(others):  # so many that all are quicker; equal ones come out equal
        dense = torch.cat([rows.double() @ part.double().T for part in others.split(4096)], dim=1)
        return dense[row, other].float()
    if rows.device.type != "cpu":
        parts = zip(*(at.split(max(1, 2**26 // rows.shape[1])) for at in (row, other)), strict=True)
        return torch.cat([rows.new_zeros(0), *((rows[r] * others[o]).sum(-1) for r, o in parts)])
    starts = torch.nn.functional.pad(torch.bincount(row, minlength=n).cumsum(0), (1, 0))
    none, shape = torch.zeros(len(row)), (n, len(others))
    listed = torch.sparse_csr_tensor(starts, other, none, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(listed, rows, others.T, beta=0).values()
