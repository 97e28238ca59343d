"""The ways to match find what was planted, and their nulls are what theory gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import toys
from scipy.sparse import csr_matrix
from scipy.stats import beta
from torch import Tensor

from flowhelpers.activations.sparse import collect
from flowhelpers.core.directions import unit_rows
from flowhelpers.core.features import Site
from flowhelpers.matching import matchers
from flowhelpers.matching.cosine import top_k_cosine
from flowhelpers.matching.matchers import Null, PairMatch, by_pearson, by_permutation, read_codes
from flowhelpers.matching.null import NULL_QUANTILE, null_cosines, null_error, rotated
from flowhelpers.matching.table import match_table
from flowhelpers.suites.attention import AttentionOutput
from flowhelpers.suites.load import Suite
from flowhelpers.suites.saes import SAE, make_sae

FIRST, SECOND = Site(0, "res"), Site(1, "res")
D = toys.D_MODEL


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_null_is_what_theory_gives_for_random_directions():
    # The cosine of two random directions in d dimensions is 2 Beta((d-1)/2, (d-1)/2) - 1, and the
    # best of n has the n-th power of its distribution.
    d, n = 24, 400
    source = normal(n, d)
    found = null_cosines(source, seed=3, draws=6400)
    assert found.shape == (6400,)
    for q, tolerance in ((0.5, 0.005), (0.99, 0.015)):
        expected = 2 * beta.ppf(q ** (1 / n), (d - 1) / 2, (d - 1) / 2) - 1
        assert np.quantile(found, q) == pytest.approx(expected, abs=tolerance)
    assert torch.equal(null_cosines(source, 4), null_cosines(source, 4))
    assert not torch.equal(null_cosines(source, 4), null_cosines(source, 5))
    assert null_cosines(torch.zeros(4, d)).unique().tolist() == [0]


def test_the_null_is_that_of_rotated_saes_whatever_their_angles():
    # Features of a narrow cone, turned by many rotations, find what random directions find.
    d = 24
    source, target = normal(400, d) * torch.linspace(0.2, 2, d), normal(40, d, seed=1) + 1
    turned = [top_k_cosine(rotated(target, seed), source).scores[:, 0] for seed in range(400)]
    found, expected = null_cosines(source), torch.cat(turned)
    for q in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(found, q) == pytest.approx(np.quantile(expected, q), abs=0.012)


def test_the_error_of_the_null_is_how_far_it_moves_with_other_draws():
    source = normal(400, 24)
    chances = [null_cosines(source, seed, draws=2000) for seed in range(40)]
    moved = np.std([np.quantile(chance, NULL_QUANTILE) for chance in chances])
    said = np.mean([null_error(chance) for chance in chances])
    assert 0.7 < said / moved < 1.6


# The permutation.


def sae_at(site: Site, decoder: Tensor, **more: Any) -> SAE:
    return make_sae(site, toys.write_lens_sae(decoder, site, **more), decoder.shape[1], "planted")


def planted_pair(features: int = 60, noise: float = 0.2) -> tuple[SAE, SAE, Tensor]:
    """An SAE, the same permuted and noised, and from which feature each descends."""
    source = unit_rows(normal(features, D))
    order = torch.randperm(features, generator=torch.Generator().manual_seed(1))
    target = unit_rows(source[order] + noise * D**-0.5 * normal(features, D, seed=2))
    threshold = normal(features, seed=3).abs() + 0.1
    encoder = unit_rows(normal(features, D, seed=4))
    earlier = sae_at(FIRST, source, threshold=threshold, encoder=encoder.T, b_enc=0.1)
    later = sae_at(SECOND, target, threshold=threshold[order], encoder=encoder[order].T, b_enc=0.1)
    return later, earlier, order


@pytest.mark.parametrize("weights", ["decoder", "all"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_permuted_noised_sae_is_recovered_in_the_stated_direction(weights: str, folded: bool):
    later, earlier, order = planted_pair()
    match = by_permutation(later, earlier, weights, folded)  # pyright: ignore[reportArgumentType]
    # The predecessor of target j is the source that it descends from.
    assert torch.equal(match.backward.indices[:, 0], order)
    assert torch.equal(match.forward.indices[order, 0], torch.arange(60))
    cosines = (later.directions * earlier.directions[order]).sum(1)
    assert torch.allclose(match.backward.scores[:, 0], cosines)
    assert torch.allclose(match.forward.scores[order, 0], cosines)


def test_the_assignment_is_of_highest_sum_and_not_greedy():
    # Both targets like source 0 best; the sum is highest if the second yields.
    source = torch.eye(2, 3)
    target = unit_rows(torch.tensor([[1.0, 0.0, 0.2], [1.0, 0.9, 0.0]]))
    match = by_permutation(sae_at(SECOND, target), sae_at(FIRST, source))
    assert match.backward.indices.tolist() == [[0], [1]]


def test_every_feature_has_one_however_poor_unless_there_are_too_few():
    later, earlier, _ = planted_pair(features=20, noise=9.0)
    fewer = sae_at(FIRST, earlier.directions[:12])
    match = by_permutation(later, fewer)
    found = match.backward.indices[:, 0]
    assert sorted(found[found >= 0].tolist()) == list(range(12))
    assert (match.forward.indices >= 0).all()
    assert (match.backward.scores[found < 0] == 0).all()


def test_the_time_of_many_assignments_is_said_before_the_first_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(matchers, "repeat", lambda *given, **more: [12, 10])  # seconds of a part
    monkeypatch.setattr(matchers, "TIMED", 4)
    suite = toys.bare_suite()
    match_table(suite, 1, method="permutation", cache=tmp_path)
    told = capsys.readouterr().out  # two pairs at layer 0, three at each of the others
    minutes = round(8 * 10 * (16 / 4) ** matchers.GROWTH / 60)
    what = f"up to 8 assignments of 16 × 8 features: about {minutes} minutes on one core\n"
    assert (told, minutes) == (what, 32)
    match_table(suite, 1, method="permutation", cache=tmp_path)  # on disk
    by_permutation(suite.sae("1/res"), suite.sae("0/res"))
    monkeypatch.setattr(matchers, "repeat", lambda *given, **more: [0.2])
    match_table(suite, 1, seed=1, method="permutation", cache=tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("d_z", [D, 48])
def test_a_folded_sae_at_z_is_compared_in_the_stream(d_z: int):
    # Of the same width as the stream, raw rows at z would be compared without a word.
    output = AttentionOutput(normal(d_z, D, seed=5), normal(D, seed=6))
    decoder, threshold = normal(12, d_z, seed=7), torch.linspace(0.5, 2, 12)
    lens_sae = toys.write_lens_sae(decoder, Site(1, "att"), threshold, hook="blocks.1.attn.hook_z")
    at_z = make_sae(Site(1, "att"), lens_sae, D, "planted", lambda: output)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(8))
    later = sae_at(SECOND, output.to_residual(decoder)[order], threshold=threshold[order])
    for folded in (False, True):
        match = by_permutation(later, at_z, folded=folded)
        assert torch.equal(match.backward.indices[:, 0], order)
    with pytest.raises(ValueError, match="1/att reads 1/z, in a space of its own"):
        by_permutation(later, at_z, "all")
    with pytest.raises(ValueError, match="unknown weights 'encoders'; did you mean 'encoder'"):
        matchers.check_weights(later, "encoders", False)


def test_a_permutation_that_does_not_fit_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    later, earlier, _ = planted_pair()
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryError, match=r"permutation of 1/res and 0/res needs .* GiB are free"):
        by_permutation(later, earlier)


def test_folding_leaves_reconstructions_as_they_are():
    later, _, _ = planted_pair()
    x = 3 * normal(200, D, seed=9)
    rebuilt = {}
    for folded in (False, True):
        found = later.weights(folded)
        before = x @ found.encoder.T + found.bias
        codes = before * (before > found.threshold)
        rebuilt[folded] = codes @ found.decoder
    expected = later.decode(later.encode(x))
    assert (expected != 0).any(dim=1).float().mean() > 0.9
    assert torch.allclose(rebuilt[False], expected, atol=1e-5)
    assert torch.allclose(rebuilt[True], expected, atol=1e-5)
    assert torch.equal(later.weights(True).threshold, torch.ones(60))
    assert not torch.allclose(later.weights(True).decoder, later.weights().decoder)


# Correlation.

SITES = SECOND, FIRST, Site(1, "mlp")


def correlated(
    suite: Suite, texts: Sequence[str] = toys.TEXTS, **more: Any
) -> tuple[PairMatch, Null]:
    codes, shifted = read_codes(suite, texts, SITES, 0, 128)
    return by_pearson(codes[SECOND], codes[FIRST], shifted, 3, **more)


@pytest.fixture(scope="module")
def activations(planted: Suite) -> dict[Site, np.ndarray]:
    return {s: codes.toarray() for s, codes in collect(planted, toys.TEXTS).by_site.items()}


def drawn_codes(rng: np.random.Generator, tokens: int, width: int) -> np.ndarray:
    """Activations of any sparsity, some large; a constant, one never active, ties by repetition."""
    codes = rng.exponential(10.0 ** rng.uniform(-1, 1, width), (tokens, width))
    codes += 50 * (rng.random(width) < 0.1)  # far from 0 where they are active
    codes *= rng.random((tokens, width)) < rng.uniform(0.02, 1, width)
    codes[:, 0], codes[:, width // 2] = 0.1 * rng.integers(1, 9), 0
    codes[:, -2:] = codes[:, 1:3]
    return codes.astype(np.float32).astype(float)


@pytest.mark.parametrize("draw", range(50))
def test_correlations_are_numpy_s_whatever_the_codes(draw: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(draw)
    monkeypatch.setattr(matchers, "ROWS", int(rng.integers(1, 40)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 + draw % 3)
    tokens, k = int(rng.integers(20, 400)), int(rng.integers(1, 6))
    a, b = (drawn_codes(rng, tokens, int(rng.integers(6, 70))) for _ in range(2))
    b[:, 3] = 0.3 * b[:, 3] + a[:, 3]
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :]
    for side, codes in ((0, a), (1, b)):
        few = ((codes > 0).sum(0) < 10) | (np.ptp(codes, axis=0) == 0)
        exact[(few, slice(None)) if side == 0 else (slice(None), few)] = 0
    shifted = rng.permutation(tokens)
    match, null = by_pearson(csr_matrix(a), csr_matrix(b), shifted, k)
    for values, found in ((exact, match.backward), (exact.T, match.forward)):
        indices, scores = found.indices.numpy(), found.scores.numpy()
        best = (-np.sort(-values, axis=1))[:, : k + 1].clip(0)
        assert scores == pytest.approx(best, abs=1e-6)
        chosen = np.take_along_axis(values, indices.clip(0), axis=1)
        assert np.where(indices < 0, 0, chosen) == pytest.approx(best, abs=1e-6)
        last = values.shape[1] - 1
        for copy, first in ((last, 2), (last - 1, 1)):  # of a tie, the lowest index first
            assert (indices[(indices == copy).any(1)] == first).any(1).all()
    again, _ = by_pearson(csr_matrix(a), csr_matrix(b[shifted]), shifted, 1)
    apart = again.backward.scores[(a > 0).sum(0) >= 10, 0]
    assert torch.equal(null[0], apart.sort().values)


def test_codes_are_those_of_the_texts_cut_where_one_says_and_stay_small(
    planted: Suite, activations: dict[Site, np.ndarray]
):
    whole, shifted = read_codes(planted, toys.TEXTS, SITES, 0, 128)
    assert all((codes.toarray() == activations[site]).all() for site, codes in whole.items())
    assert (whole[FIRST].dtype, whole[FIRST].indices.dtype) == (np.float32, np.int32)
    assert sorted(shifted) == [*range(whole[FIRST].shape[0])]
    short, shifted = read_codes(planted, toys.TEXTS, SITES, 0, 3)
    assert short[FIRST].shape[0] == len(shifted) == 2 * len(toys.TEXTS) < whole[FIRST].shape[0]


def test_what_a_correlation_needs_is_said_before(planted: Suite, monkeypatch: pytest.MonkeyPatch):
    codes, shifted = read_codes(planted, toys.TEXTS, SITES, 0, 128)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(MemoryError, match=r"16 with 16 features over \d+ tokens needs .* are free"):
        by_pearson(codes[SECOND], codes[FIRST], shifted, 3)
    with pytest.raises(MemoryError, match=r"\d+ tokens at 3 sites needs .* are free"):
        read_codes(planted, toys.TEXTS, SITES, 0, 128)


def test_a_correlation_of_few_tokens_is_none(planted: Suite, activations: dict[Site, np.ndarray]):
    assert ((activations[SECOND] > 0).sum(axis=0) == 11).all()
    enough, _ = correlated(planted, least_active=11)
    assert (enough.backward.indices[:, 0] >= 0).all()
    for limit in (12, 10**6):  # the second as of a feature that is never active
        match, null = correlated(planted, least_active=limit)
        assert (match.backward.indices == -1).all()
        assert null[0].tolist() == [0]


def test_chance_correlations_are_lower_than_real_ones(planted: Suite):
    texts = [f"{text} {again}" for text in toys.TEXTS for again in toys.TEXTS]
    match, null = correlated(planted, texts=texts, least_active=1)
    assert null[0].mean() < 0.7 * match.backward.scores[:, 0].mean()
    assert len(null[0]) <= 16
    assert torch.equal(null[0], correlated(planted, texts=texts, least_active=1)[1][0])
