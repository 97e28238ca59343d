"""Matches as a transcoder: a planted permutation carries all over, a shuffled one nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.matching import transcoding
from flowhelpers.matching.matchers import WEIGHTS, by_permutation
from flowhelpers.matching.scores import transition
from flowhelpers.matching.transcoding import (
    PRODUCTS,
    bridge,
    explained_variance,
    linear_map,
    own_reconstruction,
    shuffled,
    top_transition,
    virtual_weights,
)
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Tokens, run_model, tokenize
from flowhelpers.suites.saes import SAE, make_sae

FIRST, SECOND = Site(0, "res"), Site(1, "res")
D, F = toys.D_MODEL, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair() -> tuple[SAE, SAE, Tensor]:
    """An SAE, the same features in another order at other norms, and that order."""
    axes = torch.linalg.qr(normal(D, D)).Q[:F]
    order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    saes = []
    for seed, (site, rows) in enumerate(((FIRST, axes), (SECOND, axes[order]))):
        norms = 0.5 + normal(F, 1, seed=seed).abs()
        lens_sae = toys.write_lens_sae(
            rows * norms, site, 0.1 * norms[:, 0], encoder=(rows / norms).T
        )
        saes.append(make_sae(site, lens_sae, D, "planted"))
    return saes[0], saes[1], order


def stream(sae: SAE, tokens: int = 40) -> Tensor:
    """What some active features of an SAE write."""
    codes = (normal(tokens, F, seed=5) - 0.5).relu() * 4
    return codes @ sae.directions


def test_a_planted_permutation_carries_the_stream_over_and_a_shuffled_one_does_not(
    pair: tuple[SAE, SAE, Tensor], monkeypatch: pytest.MonkeyPatch
):
    source, target, order = pair
    x = stream(source)
    x = source.decode(source.encode(x))  # what lies below a threshold is left out
    T = top_transition(source, target)
    assert torch.equal(T.to_dense().argmax(1)[order], torch.arange(F))
    predictions = {"T": bridge(source, target, T)}
    predictions |= {f"shuffled {s}": bridge(source, target, shuffled(T, s)) for s in range(5)}
    for weights in WEIGHTS[:3]:
        paired = transition(by_permutation(target, source, weights).forward, F)
        predictions[weights] = bridge(source, target, paired)
    tokens = Tokens(torch.zeros(4, 11, dtype=torch.long), torch.arange(11).expand(4, 11) > 0)
    monkeypatch.setattr(transcoding, "_streams", lambda *_: iter([[x, x]]))
    suite = toys.bare_suite({FIRST: source.directions, SECOND: target.directions})
    table = explained_variance(suite, tokens, predictions).set_index("prediction")
    for name in ("T", *WEIGHTS[:3]):
        assert table.loc[name, ["explained", "low", "high"]].tolist() == pytest.approx(
            [1] * 3, 1e-5
        )
    assert (table.filter(like="shuffled", axis=0)["high"] < 0.2).all()
    assert (table["tokens"] == 40).all()


def test_folding_matches_the_scales_of_the_activations(pair: tuple[SAE, SAE, Tensor]):
    source, target, order = pair
    x = stream(source)
    T = top_transition(source, target)
    codes = source.encode(x) / source.weights().threshold
    expected = codes[:, order] * target.weights().threshold @ target.lens_sae.W_dec.detach()
    assert torch.allclose(bridge(source, target, T, folded=True).predict(x), expected, atol=1e-5)


def test_products_are_those_of_their_names(pair: tuple[SAE, SAE, Tensor]):
    source, target, _ = pair
    unit = torch.nn.functional.normalize
    rows = {
        "decoder": lambda s: unit(s.lens_sae.W_dec),
        "encoder": lambda s: unit(s.lens_sae.W_enc.T),
    }
    by_name = {name: rows[name](source) @ rows[name](target).T for name in rows}
    by_name["decoder-encoder"] = rows["decoder"](source) @ rows["encoder"](target).T
    by_name["sum"] = (by_name["decoder"] + by_name["encoder"]) / 2
    for product in PRODUCTS:
        assert torch.allclose(virtual_weights(source, target, product), by_name[product], atol=1e-6)
        raw = top_transition(source, target, 2, product, ones=False).to_dense()
        best = by_name[product].topk(2, dim=1)
        kept = torch.zeros(F, F).scatter(1, best.indices, best.values.clamp(min=0))
        assert torch.allclose(raw, kept, atol=1e-6)
    with pytest.raises(ValueError, match="unknown product 'encodr'; did you mean 'encoder'"):
        virtual_weights(source, target, "encodr")
    with pytest.raises(ValueError, match="k=17: expected 1 to 16, the features of 1/res"):
        top_transition(source, target, 17)


def test_explained_variance_is_that_by_hand_and_a_linear_map_is_least_squares(planted: Suite):
    tokens = tokenize(planted.model, toys.TEXTS)
    _, read = run_model(planted.model, tokens.ids, [FIRST, SECOND])
    x, y = (read[site][tokens.is_text].double().numpy() for site in (FIRST, SECOND))
    sae = planted.sae(SECOND)
    table = explained_variance(
        planted, tokens,
        {"own": own_reconstruction(sae), "linear": linear_map(planted, tokens, FIRST, SECOND)},
    ).set_index("prediction")  # fmt: skip
    rebuilt = sae.decode(sae.encode(torch.from_numpy(y).float())).double().numpy()
    with_one = np.hstack([x, np.ones((len(x), 1))])
    fitted = with_one @ np.linalg.lstsq(with_one, y, rcond=None)[0]
    for name, predicted in (("own", rebuilt), ("linear", fitted)):
        by_hand = 1 - ((y - predicted) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert table.loc[name, "explained"] == pytest.approx(by_hand, abs=1e-5)
        assert table.loc[name, "low"] <= table.loc[name, "high"]
    assert "ahead" not in table


def test_how_far_a_bridge_is_ahead_is_told_over_the_same_texts(planted: Suite):
    tokens = tokenize(planted.model, toys.TEXTS)
    sae = planted.sae(SECOND)
    own = own_reconstruction(sae)
    worse = replace(own, predict=lambda x: own.predict(x) + 0.01 * x.std())
    bridges = {"own": own, "worse": worse, "same": own}
    table = explained_variance(planted, tokens, bridges, baseline="own").set_index("prediction")
    assert table.loc[["own", "same"], ["ahead", "ahead_low", "ahead_high"]].eq(0).all(axis=None)
    wanted = table.loc["own", "explained"] - table.loc["worse", "explained"]
    row = table.loc["worse"]
    assert row["ahead"] == pytest.approx(wanted)
    # The texts differ more than the bridges do, whose interval is hence far narrower.
    assert row["ahead_high"] - row["ahead_low"] < (row["high"] - row["low"]) / 5


def test_what_has_no_thresholds_cannot_be_folded(pair: tuple[SAE, SAE, Tensor]):
    source, target, _ = pair
    T = top_transition(source, target)
    del target.lens_sae.threshold
    with pytest.raises(ValueError, match="the SAE for 1/res has no thresholds to fold"):
        bridge(source, target, T, folded=True)
