"""Each way to find edges finds the one that was planted, and what it is there to tell apart."""

from dataclasses import replace
from types import SimpleNamespace

import adder
import numpy as np
import pandas as pd
import pytest
import torch
import toys
from scipy.sparse import csr_matrix

from flowhelpers import neighbours
from flowhelpers.activations.sparse import FeatureActivations, collect
from flowhelpers.core.features import Site
from flowhelpers.suites.lens_saes import take_means_off
from flowhelpers.suites.model import run_model
from flowhelpers.suites.saes import make_sae

BELOW, BETWEEN, TARGET = (Site(layer, "res") for layer in range(3))
TOKENS = 400


def activations(**by_layer: np.ndarray) -> FeatureActivations:
    sites = {"below": BELOW, "between": BETWEEN, "target": TARGET}
    codes = {sites[name]: csr_matrix(values) for name, values in by_layer.items()}
    tokens = pd.DataFrame({"text": np.arange(TOKENS) // 20, "position": np.arange(TOKENS) % 20})
    return FeatureActivations(tokens.assign(token=0), codes)


def random_codes(features: int, share: float = 0.2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((TOKENS, features)) * (rng.random((TOKENS, features)) < share)


def test_lasso_keeps_what_a_target_is_made_of_and_drops_a_noisy_copy_of_it():
    below = random_codes(6)
    rng = np.random.default_rng(1)
    below[:, 5] = below[:, 2] * (rng.random(TOKENS) < 0.8)
    target = np.stack([below[:, 2] + 0.5 * below[:, 4], below[:, 1], 1 - below[:, 0]], axis=1)
    target = target + 0.02 * rng.random(target.shape)
    read = activations(below=below, target=target)
    found = neighbours.lasso_edges(read, TARGET, BELOW, [0, 1, 2])
    assert set(np.flatnonzero(found[0])) == {2, 4}
    assert found[0].argmax() == 2
    assert found[1].argmax() == 1
    assert neighbours.best_sources(found, [0, 1, 2])["source"].tolist()[:2] == [2, 1]
    assert found[2, 0] < -0.9  # what lowers a target is no source of it
    assert neighbours.pearson_edges(read, TARGET, BELOW, [0])[0, 5] > 0.5  # fooled by the copy


def test_pearson_is_that_of_numpy_and_says_nothing_of_what_is_hardly_active():
    below, target = random_codes(4), random_codes(3, seed=1)
    below[9:, 3] = 0
    found = neighbours.pearson_edges(activations(below=below, target=target), TARGET, BELOW, [2, 0])
    expected = np.corrcoef(target[:, [2, 0]].T, below.T)[:2, 2:]
    np.testing.assert_allclose(found[:, :3], expected[:, :3], atol=1e-12)
    assert not found[:, 3].any()


def test_a_module_goes_through_the_layers_between_and_leaves_out_what_only_meets_at_the_ends():
    below, between, target = (random_codes(4, 0.1, seed) for seed in range(3))
    target[:, 1] = between[:, 3] = below[:, 0]
    target[:, 2] = below[:, 2]  # with nothing between
    read = activations(below=below, between=between, target=target)
    found = neighbours.module_edges(read, TARGET, BELOW, [1, 2])
    assert neighbours.best_sources(found, [1, 2])["source"].tolist() == [0, -1]
    assert found[0, 0] == 1
    direct = activations(below=below, target=target)
    assert neighbours.module_edges(direct, TARGET, BELOW, [2])[0].argmax() == 2
    for wrong in [(TARGET, BETWEEN), (BETWEEN, BELOW), (BELOW, TARGET), (TARGET, Site(0, "mlp"))]:
        with pytest.raises(ValueError, match="that were both read; read were 0/res, 2/res"):
            neighbours.module_edges(direct, *wrong, [1])


def test_transport_matches_what_is_said_at_other_tokens_and_knows_no_scale():
    rng = np.random.default_rng(0)
    kind = np.arange(TOKENS) % 2
    reference = torch.from_numpy(rng.normal(size=(TOKENS, 8)) + 6 * kind[:, None])
    is_target = np.arange(TOKENS) % 4 < 2
    below = np.stack([(kind == k) * ~is_target * rng.random(TOKENS) for k in (0, 1)], axis=1)
    target = np.stack([(kind == k) * is_target * rng.random(TOKENS) for k in (1, 0)], axis=1)
    below = np.hstack([below, np.zeros((TOKENS, 1))])
    found = [
        neighbours.transport_edges(
            activations(below=below, target=size * target), reference, TARGET, BELOW, [0, 1]
        )
        for size in (1, 7)
    ]
    assert neighbours.best_sources(found[0], [0, 1])["source"].tolist() == [1, 0]
    assert not found[0][:, 2].any()  # never active: no distribution
    torch.testing.assert_close(*found)
    read = activations(below=below, target=target)
    assert neighbours.pearson_edges(read, TARGET, BELOW, [0, 1])[:, :2].max() < 0  # never together


def test_transport_weighs_tokens_by_activation():
    rng = np.random.default_rng(0)
    kind = np.arange(TOKENS) % 2
    reference = torch.from_numpy(rng.normal(size=(TOKENS, 8)) + 6 * kind[:, None])
    even, mostly = np.ones(TOKENS), np.where(kind == 1, 9.0, 1.0)
    is_target = (np.arange(TOKENS) % 4 < 2) & (np.arange(TOKENS) < 100)
    is_source = (np.arange(TOKENS) % 4 >= 2) & (np.arange(TOKENS) < 100)
    below = np.stack([is_source * even, is_source * mostly], axis=1)
    read = activations(below=below, target=(is_target * mostly)[:, None])
    found = neighbours.transport_edges(read, reference, TARGET, BELOW, [0])[0]
    assert found[1] > 1.5 * found[0]


def test_transport_reads_the_tokens_where_a_feature_is_most_active():
    rng = np.random.default_rng(0)
    kind = np.arange(TOKENS) % 2
    reference = torch.from_numpy(rng.normal(size=(TOKENS, 8)) + 6 * kind[:, None])
    strong = np.where(kind == 1, 1.0, 0.9)  # more tokens than are read, both kinds of them
    read = activations(below=np.stack([kind, 1 - kind], axis=1), target=strong[:, None])
    found = neighbours.transport_edges(read, reference, TARGET, BELOW, [0], points=TOKENS // 4)[0]
    assert found[0] > 2 * found[1]


def test_the_distance_is_that_of_scipy_in_one_dimension():
    from scipy.stats import wasserstein_distance

    rng = np.random.default_rng(0)
    reference = torch.from_numpy(rng.normal(size=(TOKENS, 1)))
    below, target = random_codes(1), random_codes(1, seed=3)
    read = activations(below=below, target=target)
    found = neighbours.transport_edges(read, reference, TARGET, BELOW, [0], points=TOKENS)
    values = reference[:, 0].numpy()
    first = wasserstein_distance(values, values, target[:, 0], below[:, 0])
    apart = float(1 / found[0, 0] - 1)  # the second is at least the first, here hardly more
    assert first * 0.95 <= apart <= 2 * first


def test_attribution_is_what_each_source_writes_and_shows_what_no_feature_explains(
    world: SimpleNamespace,
):
    source, target = Site(0, "res"), Site(1, "res")
    wanted = [adder.COPY, adder.MLP, adder.OTHER]
    found, errors = neighbours.attribution_edges(
        world.suite, world.tokens, world.activations, target, [source], wanted
    )
    effects = found[source]
    assert effects[0].argmax() == adder.MATCHES["res"][adder.COPY]
    assert float(effects[0].max()) == pytest.approx(1)
    assert not effects[1].any()  # it comes from the MLP alone
    assert not effects[2].any()  # and this along a coordinate that no feature has
    assert 0.5 < errors[source] < 1  # of effects 4 times 1 and of errors 4 times 3
    assert errors[source] == pytest.approx(12 / 16)
    alone = neighbours.attribution_edges(
        world.suite, world.tokens, world.activations, target, [source], [adder.COPY]
    )
    assert alone[1][source] == pytest.approx(0)
    assert not torch.is_grad_enabled() or found[source].grad_fn is None


def test_attribution_counts_only_tokens_where_the_source_is_active(world: SimpleNamespace):
    source, target = Site(0, "res"), Site(1, "res")
    found, _ = neighbours.attribution_edges(
        world.suite, world.tokens, world.activations, target, [source], [adder.SUM], 1000
    )
    active = world.activations.by_site[source][:, [3]].toarray() > 0
    assert 0 < active.mean() < 1
    assert float(found[source][0, 3]) == pytest.approx(active.mean())  # 1 there, else nothing


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale", "centred"])
def test_attribution_goes_through_what_a_target_does_to_what_it_reads(
    world: SimpleNamespace, norm: str
):
    source, target, step = Site(0, "res"), Site(1, "res"), 1e-2
    rows = torch.randn(1, adder.D, generator=torch.Generator().manual_seed(0))
    lens_sae = toys.write_lens_sae(rows, target, 0.1, b_enc=20.0, b_dec=0.3)
    if norm == "centred":
        take_means_off(lens_sae)
    else:
        lens_sae.cfg.normalize_activations = norm
        lens_sae._setup_activation_normalization()
    sae = make_sae(target, lens_sae, adder.D, "normed")
    suite = replace(world.suite, saes={**world.suite.saes, target: sae})
    read = collect(suite, world.tokens, [source, target])
    asked = suite, world.tokens, read, target, [source]
    found = neighbours.attribution_edges(*asked, [0], 1000)[0][source][0]
    stream = run_model(suite.model, world.tokens.ids, [target])[1][target][world.tokens.is_text]
    on, codes = read.by_site[target].toarray()[:, 0] > 0, read.by_site[source].toarray()
    for each, row in enumerate(suite.sae(source).lens_sae.W_dec.detach()):
        change = (sae.encode(stream + step * row) - sae.encode(stream - step * row))[on, 0]
        expected = (change.numpy() / (2 * step) * codes[on, each]).mean()
        assert float(found[each]) == pytest.approx(expected, abs=1e-2)
    read.by_site[target].data[:] = 0  # of what is never active nothing can be told
    read.by_site[target].eliminate_zeros()
    assert not neighbours.attribution_edges(*asked, [0])[0][source].any()


def test_attribution_over_two_layers_at_once(world: SimpleNamespace):
    target, sources = Site(2, "res"), [Site(0, "res"), Site(1, "res")]
    found, _ = neighbours.attribution_edges(
        world.suite, world.tokens, world.activations, target, sources, [1]
    )
    assert found[sources[0]][0].argmax() == adder.MATCHES["res"][adder.COPY]
    assert found[sources[1]][0].argmax() == adder.COPY


def test_a_chain_goes_from_best_match_to_best_match():
    def turn(one: torch.Tensor, other: torch.Tensor, cosine: float) -> torch.Tensor:
        return cosine * one + (1 - cosine**2) ** 0.5 * other

    axes = torch.eye(6)
    top = axes[:1]
    middle = torch.stack([turn(axes[0], axes[1], 0.8), axes[2]])
    # Of the last two the first is nearer to the top, and the second to its match between.
    bottom = torch.stack([turn(axes[0], axes[3], 0.75), turn(middle[0], axes[4], 0.9)])
    suite = toys.bare_suite({Site(i, "res"): rows for i, rows in enumerate([bottom, middle, top])})
    ends = Site(2, "res"), Site(0, "res"), [0]
    assert neighbours.cosine_edges(suite, *ends).argmax() == 0
    torch.testing.assert_close(neighbours.chained_edges(suite, *ends), torch.tensor([[0, 0.72]]))


def test_cosines_are_those_of_the_decoders(world: SimpleNamespace):
    found = neighbours.cosine_edges(world.suite, Site(1, "res"), Site(0, "res"), [adder.COPY, 1])
    assert found[0].tolist() == [0, 0, 1, 0]
    table = neighbours.best_sources(found, [adder.COPY, 1])
    assert table["source"].tolist() == [2, -1]
    one, other = Site(1, "res"), Site(0, "res")
    below = replace(world.suite.sae(other), decoder=-world.suite.sae(other).decoder)
    turned = replace(world.suite, saes={**world.suite.saes, other: below})
    torch.testing.assert_close(neighbours.cosine_edges(turned, one, other, [adder.COPY, 1]), -found)
