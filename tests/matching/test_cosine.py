"""Matches are exact: planted ones are found, ties, signs and norms are as CHOICES has them."""

import subprocess
import sys
import warnings
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from flowhelpers.core import directions
from flowhelpers.core.directions import unit_rows
from flowhelpers.core.machine import quick_dtype
from flowhelpers.matching import cosine
from flowhelpers.matching.cosine import top_k_both_ways, top_k_cosine


@pytest.fixture(params=[torch.float32, torch.bfloat16], autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Every test here runs with the product in each type that may be the quickest."""
    for module in (cosine, directions):
        monkeypatch.setattr(module, "quick_dtype", lambda device: request.param)
    return request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows of ±1: with a width that is a power of 4 every cosine is exact in float32."""
    return normal(rows, width, seed=seed).sign()


def by_brute_force(target: Tensor, source: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and cosines in float64, best first, ties to the lowest index."""
    t, s = target.double().numpy(), source.double().numpy()
    sizes = np.outer(np.linalg.norm(t, axis=1), np.linalg.norm(s, axis=1))
    cosines = t @ s.T / np.where(sizes > 0, sizes, 1)
    indices = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(cosines, indices, axis=1)
    return np.where(best > 0, indices, -1), best.clip(0)


def test_a_planted_permutation_is_found_whatever_the_norms():
    source = normal(60, 24)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    target = source[order] * normal(60, 1, seed=2).abs().add(0.01)
    matches = top_k_cosine(target, source * torch.logspace(-3, 3, 60)[:, None])
    assert torch.equal(matches.indices[:, 0], order)
    assert torch.allclose(matches.scores, torch.ones(60, 1), atol=1e-6)
    back = top_k_cosine(source, target)
    assert torch.equal(order[back.indices[:, 0]], torch.arange(60))


def test_an_antipodal_direction_is_no_match():
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    matches = top_k_cosine(target, torch.tensor([[-1.0, 0.0], [-1.0, 0.1]]), k=2)
    assert matches.indices.tolist() == [[-1, -1], [1, -1]]
    assert matches.scores[0].tolist() == [0, 0]
    assert matches.scores[1].tolist() == pytest.approx([0.1 / 1.01**0.5, 0])


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_ties_go_to_the_lowest_index(k: int):
    # Source 4 is best, then eleven that are tied, then the rest; a tie of many cuts the border.
    target = torch.ones(3, 16)
    source = -torch.ones(40, 16)
    tied = [2, 3, 9, 10, 11, 17, 20, 21, 30, 38, 39]
    source[tied] = torch.ones(16)
    for place, index in enumerate(tied):
        source[index, place] = -1  # cosine 14/16 each
    source[4] = 1
    matches = top_k_cosine(target, source, k)
    assert matches.indices.tolist() == [[4, *tied][:k]] * 3
    assert matches.scores[0].tolist() == [1.0, *[0.875] * 11][:k]


@pytest.mark.parametrize("k", [1, 2, 5, 30])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_draws_with_duplicates_and_zero_rows_equal_brute_force(k: int, seed: int):
    rng = np.random.default_rng(seed)
    target, source = signs(25, 16, seed), signs(30, 16, seed + 10)
    source[rng.integers(0, 30, 12)] = source[rng.integers(0, 30, 12)]
    target[rng.integers(0, 25, 6)] = source[rng.integers(0, 30, 6)]
    target[3] = 0
    source[[4, 5]] = 0
    target *= 2.0 ** torch.randint(-3, 4, (25, 1))
    matches = top_k_cosine(target, source, k)
    indices, cosines = by_brute_force(target, source, k)
    assert np.array_equal(matches.indices, indices)
    assert np.array_equal(matches.scores, cosines)
    assert (indices[3] == -1).all()
    assert not np.isin([4, 5], indices).any()


@pytest.mark.parametrize("memory", [40_000, 80_000, 10**9])
def test_blocks_do_not_matter_and_all_are_in_one_bar(memory: int, monkeypatch: pytest.MonkeyPatch):
    target, source = signs(45, 16), signs(333, 16, seed=1)
    whole, bars = top_k_cosine(target, source, 3), []
    monkeypatch.setattr(cosine, "progress", lambda blocks, desc: bars.append(blocks) or blocks)
    parts = top_k_cosine(target, source, 3, memory)
    assert torch.equal(whole.indices, parts.indices)
    assert torch.equal(whole.scores, parts.scores)
    [blocks] = bars
    n_rows, n_columns = (len(set(starts)) for starts in zip(*blocks, strict=True))
    assert len(blocks) == n_rows * n_columns
    assert (len(blocks) == 1) == (memory == 10**9)


def test_half_precision_is_normalised_in_float32():
    target, source = normal(20, 64).to(torch.bfloat16), normal(30, 64, seed=1).to(torch.bfloat16)
    matches = top_k_cosine(target, source, 2)
    expected = top_k_cosine(target.float(), source.float(), 2)
    assert matches.scores.dtype == torch.float32
    assert torch.equal(matches.indices, expected.indices)
    assert torch.equal(matches.scores, expected.scores)


BAD = [normal(6, 3).index_fill(0, torch.tensor([4, 5]), bad) for bad in (torch.nan, torch.inf)]


@pytest.mark.parametrize(
    ("target", "source", "options", "message"),
    [
        *[(normal(4, 3), normal(5, 3), {"k": k}, f"k={k}: expected 1 to 5") for k in (0, 6)],
        (
            normal(4, 3),
            normal(5, 3),
            {"memory": 0},
            r"memory=0: .* a block of 4 by 5 features of w",
        ),
        (
            normal(999, 3),
            normal(99, 3),
            {"memory": 4},
            r"memory=4: .* bytes or more, .* of 64 by 64",
        ),
        (normal(4, 3), normal(5, 2), {}, r"target \(4, 3\) with source \(5, 2\): expected two mat"),
        (BAD[0], normal(4, 3), {}, "2 rows are not finite in float32, the first is row 4"),
        (normal(4, 3), BAD[1], {}, "2 rows are not finite in float32, the first is row 4"),
    ],
)
def test_what_cannot_be_compared_is_named(
    target: Tensor,
    source: Tensor,
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would speak first
    with pytest.raises(ValueError, match=message):
        top_k_cosine(target, source, **options)


def test_no_targets_have_no_matches():
    matches = top_k_cosine(torch.zeros(0, 3), torch.eye(3), 2)
    assert matches.indices.shape == matches.scores.shape == (0, 2)


def draw(rng: np.random.Generator) -> tuple[Tensor, Tensor, int]:
    """Two SAEs that are alike in part, with all that makes a match hard to tell."""
    d = int(rng.choice([2, 3, 8, 24, 64, 192]))
    targets, sources = (int(n) for n in rng.integers(1, 900, 2))
    basis = np.exp(rng.normal(size=d))  # not all dimensions count alike
    target, source = (rng.normal(size=(n, d)) * basis + 0.3 for n in (targets, sources))

    def some(n: int) -> np.ndarray:
        return rng.integers(0, n, max(1, n // 8))

    source[some(sources)[0]] = source[0]
    copies = some(targets)
    target[copies] = source[rng.integers(0, sources, len(copies))]  # related
    source[some(sources)] = source[int(rng.integers(sources))]  # duplicates, many at once
    near = some(sources)
    source[near] = source[rng.integers(0, sources, len(near))] + 1e-6 * rng.normal(
        size=(len(near), d)
    )  # near-ties
    flipped = some(sources)
    source[flipped] = -source[rng.integers(0, sources, len(flipped))]  # ± pairs
    source[some(sources)[:2]] = 0
    target[some(targets)[:2]] = 0
    source *= np.exp(rng.normal(size=(sources, 1)))
    dtype = [torch.float32, torch.float64, torch.float16][rng.integers(3)]
    first, second = (torch.from_numpy(side).to(dtype) for side in (target, source))
    return first, second, int(rng.integers(1, min(12, sources) + 1))


DTYPES = (torch.float32, torch.bfloat16)
DRAWS = [pytest.param(DTYPES[seed % 2], seed, id=str(seed)) for seed in range(200)]


@pytest.mark.parametrize(("quick", "seed"), DRAWS, indirect=["quick"])
def test_random_draws_equal_float64_wherever_it_tells_them_apart(seed: int):
    rng = np.random.default_rng(seed)
    target, source, k = draw(rng)
    matches = top_k_cosine(target, source, k, int(rng.choice([3 * 10**5, 10**6, 10**9])))
    sides = (side.double().numpy() for side in (target, source))
    units = [
        side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-300) for side in sides
    ]
    exact = torch.from_numpy(units[0] @ units[1].T)
    values, order = exact.sort(dim=1, descending=True, stable=True)
    best = values[:, :k].clamp(min=0)
    assert (matches.scores.double() - best).abs().max() < 1e-6
    padded = torch.nn.functional.pad(values, (1, 1), value=-2)
    alone = (padded[:, :-2] - padded[:, 1:-1] > 1e-6) | (torch.arange(values.shape[1]) == 0)
    alone &= padded[:, 1:-1] - padded[:, 2:] > 1e-6
    told = alone[:, :k] & (values[:, :k] > 1e-6)
    assert torch.equal(matches.indices[told], order[:, :k][told])
    assert (matches.indices[values[:, :k] < -1e-6] == -1).all()
    found = matches.indices >= 0
    chosen = exact.gather(1, matches.indices.clamp(min=0))
    assert ((chosen - matches.scores).abs()[found] < 1e-6).all()
    for row in matches.indices.tolist():
        there = [index for index in row if index >= 0]
        assert len(set(there)) == len(there)


def test_what_bfloat16_cannot_tell_apart_is_told_apart(quick: torch.dtype):
    # Many sources lie so near each other that bfloat16 has them equal; the best of them stands last
    # and its rough cosine is no higher than theirs.
    axes = torch.eye(64)
    source = axes[1:].repeat(40, 1)
    source[:100] = axes[0] + 1e-3 * normal(100, 64)
    source[-1] = axes[0]
    rough = unit_rows(source[[*range(100), -1]]).to(torch.bfloat16) @ axes[0].to(torch.bfloat16)
    assert (rough == 1).all()
    assert top_k_cosine(axes[:1], source).indices.item() == len(source) - 1


@pytest.mark.parametrize("k", [1, 5, 40, 299])
def test_both_ways_are_each_way_by_itself(k: int):
    target, source = signs(300, 64), signs(700, 64, seed=1)
    source[:50] = target[:50]
    target[7] = source[9] = 0
    backward, forward = top_k_both_ways(target, source, k, memory=300_000)
    for found, sides in ((backward, (target, source)), (forward, (source, target))):
        indices, cosines = by_brute_force(*sides, k)
        assert np.array_equal(found.indices, indices)
        assert np.array_equal(found.scores, cosines)
    whole = top_k_both_ways(target, source, 301)
    assert [side.indices.shape for side in whole] == [(300, 301), (700, 300)]


def test_a_device_without_room_gets_smaller_blocks_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
):
    target, source = signs(300, 64), signs(700, 64, seed=1)
    expected, true, tried = top_k_cosine(target, source, 3), cosine._product, []

    def full(rows: Any, *more: Any) -> Any:
        tried.append(len(rows))
        if len(rows) > 100:
            raise torch.OutOfMemoryError
        return true(rows, *more)

    monkeypatch.setattr(cosine, "MEMORY", {"cpu": 2**30})
    monkeypatch.setattr(cosine, "_product", full)
    with pytest.warns(UserWarning, match="out of memory .* on cpu: it begins again in sm") as told:
        found = top_k_cosine(target, source, 3)
    assert len(told) == 1
    assert torch.equal(found.indices, expected.indices)
    tried.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(top_k_both_ways(target, source, 3)[0].indices, expected.indices)
    assert max(tried) <= 100  # what had no room is not tried again
    monkeypatch.setattr(cosine, "_product", lambda *_: full([0] * 101))
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(MemoryError, match="cpu has no room for blocks of 64 features"),
    ):
        top_k_cosine(target, source, 3, memory=10**6)


def test_parameters_are_matched_as_their_values():
    rows = torch.nn.Linear(16, 300).weight
    assert rows.requires_grad
    assert torch.equal(top_k_cosine(rows, rows).indices[:, 0], torch.arange(300))


def test_what_is_not_float32_precise_is_never_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    quick_dtype.cache_clear()
    assert quick_dtype("cpu") is torch.bfloat16
    quick_dtype.cache_clear()


def test_rows_too_small_or_large_for_their_squares_are_not_lost():
    target = torch.tensor([[1e-30, 0, 0], [0, 3e30, 0]])
    matches = top_k_cosine(target, torch.tensor([[0, 1e-25, 0], [2e35, 0, 0]]))
    assert matches.indices[:, 0].tolist() == [1, 0]
    assert matches.scores[:, 0].tolist() == [1, 1]


def test_extra_memory_stays_within_what_was_asked_for():
    code = """
import threading, time, psutil, torch
from flowhelpers.matching.cosine import top_k_cosine

def used():
    return psutil.Process().memory_info().rss / 2**20

def watch():
    while True:
        seen.append(used())
        time.sleep(0.002)

a, b = torch.randn(8192, 512), torch.randn(40_000, 512)
top_k_cosine(a[:256], b[:2048], 5, memory=2**20)
seen = [used()]
threading.Thread(target=watch, daemon=True).start()
top_k_cosine(a, b, 5, memory=64 * 2**20)
print(max(seen) - seen[0])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(found.stdout) < 64  # MiB; all cosines would be 1.2 GiB, the sources alone 78
