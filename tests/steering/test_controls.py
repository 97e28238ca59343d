"""What steering is held against, on planted frequencies, streams and steps that are known."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import adder
import numpy as np
import pandas as pd
import pytest
import torch
import toys

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site, parse_feature
from flowhelpers.steering import controls
from flowhelpers.steering.controls import random_feature_control, scale_plan, side_effects
from flowhelpers.steering.plans import Plan, Step, make_plan, plan_edits, steering_vectors
from flowhelpers.steering.sweeps import SweepCell
from flowhelpers.suites.attention import attention_output
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Model, logits_of, run_model, tokenize
from flowhelpers.suites.saes import make_sae

RES, MLP, ATT = Site(1, "res"), Site(1, "mlp"), Site(1, "att")
# Feature ORDER[i] is active at i (i + 1) / 2 of 128 tokens: the nearest to it is ORDER[i - 1].
ORDER = torch.randperm(toys.RES, generator=torch.Generator().manual_seed(5)).tolist()
TEXTS = [*toys.TEXTS, "The rivers rose and the cat sat on the hills."]


@pytest.fixture(scope="module")
def suite(planted: Suite, toy: Model) -> Suite:
    """The planted suite, with an SAE at z and one of directions that are not orthogonal."""
    rows = torch.randn(toys.RES, toys.D_MODEL, generator=torch.Generator().manual_seed(1))
    lens_sae = toys.write_lens_sae(rows * torch.arange(1, toys.RES + 1)[:, None], RES, 0.5)
    slanted = make_sae(RES, lens_sae, toys.D_MODEL, "planted")
    own = {RES: slanted, ATT: toys.sae_at_z(toy)}
    return replace(planted, saes={**planted.saes, **own})


@pytest.fixture(scope="module")
def seen() -> FeatureActivations:
    """Activations at which every feature of a residual site has a share of tokens of its own."""
    counts = np.zeros(toys.RES, dtype=int)
    counts[ORDER] = [i * (i + 1) // 2 for i in range(toys.RES)]
    rng = np.random.default_rng(0)
    codes = {}
    for site, width in ((Site(0, "res"), toys.RES), (RES, toys.RES), (MLP, toys.MODULE), (ATT, 6)):
        made = np.zeros((128, width), dtype=np.float32)
        for feature, count in enumerate(counts[:width]):
            # How often counts, and not how much.
            made[rng.permutation(128)[:count], feature] = rng.uniform(0.1, 90, count)
        codes[site] = made.tolist()
    return toys.planted_activations(codes)


def plan_of(suite: Suite, names: Sequence[str], kind: Any = "add", strength: float = 2.0) -> Plan:
    scales = [1.0 if kind == "rescale" else 1.5 + i for i in range(len(names))]
    steps = tuple(Step(n, strength, scale) for n, scale in zip(names, scales, strict=True))
    return Plan(suite.name, kind, "theta", steps)


def indices(plan: Plan) -> list[int]:
    return [parse_feature(step.feature).index for step in plan.steps]


def test_the_nearest_twin_is_the_feature_active_as_often(suite: Suite, seen: FeatureActivations):
    for i in range(1, toys.RES):
        twin = random_feature_control(suite, plan_of(suite, [f"1/res/{ORDER[i]}"]), seen, nearest=1)
        assert indices(twin) == [ORDER[i - 1]]
    # 15, 21, 28, 36, 45: what is taken is passed over, be it by the plan or by a twin.
    plan = plan_of(suite, [f"1/res/{ORDER[7]}", f"1/res/{ORDER[6]}"])
    assert indices(random_feature_control(suite, plan, seen, nearest=1)) == [ORDER[8], ORDER[5]]
    plan = plan_of(suite, [f"1/res/0{ORDER[6]}", f"1/res/{ORDER[7]}"])  # as written by hand
    assert indices(random_feature_control(suite, plan, seen, nearest=1)) == [ORDER[5], ORDER[8]]
    # An excluded feature stands for none.
    without = replace(suite.sae(RES), excluded=torch.tensor([ORDER[8], ORDER[6]]))
    other = replace(suite, saes={**suite.saes, RES: without})
    plan = plan_of(suite, [f"1/res/{ORDER[7]}"])
    assert indices(random_feature_control(other, plan, seen, nearest=1)) == [ORDER[5]]


def test_twins_are_drawn_from_the_nearest_by_the_seed(suite: Suite, seen: FeatureActivations):
    plan = plan_of(suite, [f"1/res/{ORDER[9]}"])
    twins = [random_feature_control(suite, plan, seen, seed, nearest=3) for seed in range(60)]
    drawn = [indices(twin)[0] for twin in twins]
    assert set(drawn) == {ORDER[8], ORDER[10], ORDER[7]}  # 45: 36, 55 and 28
    assert min(drawn.count(feature) for feature in set(drawn)) > 8
    assert twins[7] == random_feature_control(suite, plan, seen, 7, nearest=3)


def test_a_twin_writes_the_same_norm_at_every_site(suite: Suite, seen: FeatureActivations):
    names = ["0/res/3", "1/res/4", "1/mlp/2", "1/res/9", "1/att/5", "1/res/11", "1/att/0"]
    plan = plan_of(suite, names)
    for seed in range(4):
        twin = random_feature_control(suite, plan, seen, seed)
        chosen = [step.feature for step in twin.steps]
        assert [name[:5] for name in chosen] == [name[:5] for name in names]
        assert len({*chosen, *names}) == 2 * len(names)
        assert [step.strength for step in twin.steps] == [2.0] * len(names)
        own, other = steering_vectors(suite, plan), steering_vectors(suite, twin)
        assert set(own) == set(other) == {Site(0, "res"), MLP, RES, Site(1, "z")}
        for at, vector in own.items():
            assert float(other[at].norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
            assert not torch.allclose(other[at], vector, rtol=0.1)
        # Features of one site keep their proportions.
        scales = [step.scale for step in twin.steps]
        assert scales[3] / scales[1] == pytest.approx(plan.steps[3].scale / plan.steps[1].scale)


def test_the_twin_of_a_plan_that_adds_nothing_adds_nothing(suite: Suite, seen: FeatureActivations):
    # As at the end of a linear schedule down to 0.
    twin = random_feature_control(suite, plan_of(suite, ["1/res/4"], strength=0.0), seen)
    assert not steering_vectors(suite, twin)[RES].any()


def test_a_twin_that_cannot_be_drawn_is_an_error(suite: Suite, seen: FeatureActivations):
    with pytest.raises(ValueError, match="the sample was not read at 2/res, where the"):
        random_feature_control(suite, plan_of(suite, ["1/res/3", "2/res/1"]), seen)
    plan = plan_of(suite, [f"1/mlp/{i}" for i in range(5)])
    with pytest.raises(ValueError, match="no feature of 1/mlp is left to stand for 1/mlp/3"):
        random_feature_control(suite, plan, seen)


def test_norms_are_those_of_the_stream_and_grow_with_the_strength(suite: Suite):
    names = ["0/res/3", "1/res/4", "1/res/9", "1/att/5", "1/att/0"]
    plan = plan_of(suite, names)
    output, vectors = attention_output(suite.model, 1), steering_vectors(suite, plan)
    assert output.gain is not None
    at_z = vectors[Site(1, "z")] @ output.weights * output.gain
    in_stream = (vectors[Site(0, "res")], vectors[RES], at_z)
    expected = float(sum(vector.norm() for vector in in_stream))
    assert controls.total_norm(suite, plan) == pytest.approx(expected, rel=1e-5)
    assert controls.total_norm(suite, vectors) == pytest.approx(expected, rel=1e-5)
    thrice = scale_plan(plan, -3.0)
    assert thrice == plan_of(suite, names, strength=-6.0)
    assert controls.total_norm(suite, thrice) == pytest.approx(3 * expected, rel=1e-5)
    assert controls.total_norm(suite, scale_plan(vectors, 3.0)) == pytest.approx(3 * expected)
    # A plan that rescales is changed by its distance from 1.
    plan = plan_of(suite, names, "rescale")
    assert scale_plan(plan, 3.0) == plan_of(suite, names, "rescale", 4.0)  # 1 + 3 (2 - 1)
    with pytest.raises(ValueError, match="a plan of kind 'rescale'"):
        controls.total_norm(suite, plan)


@pytest.mark.parametrize("max_tokens", [64, 4])
def test_the_difference_of_means_is_that_of_the_tokens(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, max_tokens: int
):
    # The adder's stream is the token's embedding and constants; texts differ in length.
    model, rows = world.suite.model, adder.embeddings(toys.VOCABULARY)
    texts, others = [TEXTS[0], TEXTS[5], TEXTS[4]], [TEXTS[1], TEXTS[3]]
    monkeypatch.setattr(controls, "MAX_TOKENS", max_tokens)

    def mean(some: list[str]) -> torch.Tensor:
        ids = model.tokenizer(some, add_special_tokens=False)["input_ids"]
        return rows[[token for text in ids for token in text[: max_tokens - 1]]].mean(0)

    expected = mean(texts) - mean(others)
    assert expected.norm() > 0.3
    for site in (Site(0, "res"), Site(2, "res")):
        found = controls.difference_of_means(model, site, texts, others)
        assert torch.allclose(found, expected, atol=1e-5)
    for nothing in ([""], texts):
        with pytest.raises(ValueError, match=r"texts and . others have no means, or equal"):
            controls.difference_of_means(model, Site(1, "res"), texts, nothing)


def test_side_effects_are_those_of_every_token_by_hand(suite: Suite):
    adds = plan_of(suite, ["0/res/3", "1/mlp/2", "1/att/5", "1/att/0", "1/res/4"], strength=0.2)
    steps = (Step("1/res/3", 0.5, 1.0), Step("1/res/5", -1.0, 1.0))
    scales = Plan(suite.name, "rescale", "activation", steps)
    plans = {"adds": adds, "vectors": steering_vectors(suite, adds), "scales": scales}
    table = side_effects(suite, plans, TEXTS).set_index("plan")
    assert list(table.index) == list(plans)
    assert table.loc["adds", "norm"] == pytest.approx(controls.total_norm(suite, adds), rel=1e-4)
    assert table.loc["vectors"].to_numpy() == pytest.approx(table.loc["adds"].to_numpy(), rel=1e-5)
    rows = suite.sae(RES).lens_sae.W_dec.detach()
    norms, kl = [], {"adds": [], "scales": []}
    for tokens in (tokenize(suite.model, text) for text in TEXTS):  # text by text, without padding
        codes = suite.sae(RES).encode(run_model(suite.model, tokens.ids, [RES])[1][RES])
        step = -0.5 * codes[..., [3]] * rows[3] - 2 * codes[..., [5]] * rows[5]
        norms += step.norm(dim=-1)[tokens.is_text].tolist()
        p = logits_of(suite.model, tokens.ids)[tokens.is_text].double().softmax(-1)
        for name, values in kl.items():
            logits = logits_of(suite.model, tokens.ids, plan_edits(suite, [plans[name]]))
            q = logits[tokens.is_text].double().softmax(-1)
            values += (p * (p / q).log()).sum(-1).tolist()
    for name, values in kl.items():
        assert np.mean(values) > 0.01
        assert table.loc[name, "kl"] == pytest.approx(np.mean(values), rel=1e-3)
    assert min(norms) < max(norms)
    assert table.loc["scales", "norm"] == pytest.approx(np.mean(norms), rel=1e-4)


def test_plans_may_come_in_pieces_and_one_that_is_no_edit_does_nothing(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
):
    plans = {
        "adds": plan_of(suite, ["0/res/3", "1/att/5"]),
        "none": None,
        "nothing": scale_plan(plan_of(suite, ["1/res/4", "1/att/0"]), 0.0),
        "scales": plan_of(suite, ["1/res/3", "0/mlp/1", "1/att/1"], "rescale", strength=-3.0),
    }
    together = side_effects(suite, plans, TEXTS)
    assert together["plan"].tolist() == list(plans)
    assert together[["norm", "kl"]][1:3].to_numpy() == pytest.approx(0, abs=1e-6)
    for rows in (1, 12, 13):
        monkeypatch.setattr(controls, "ROWS", rows)
        apart = side_effects(suite, plans, TEXTS)
        pd.testing.assert_frame_equal(apart, together, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(controls, "MAX_TOKENS", 5)
    short = side_effects(suite, plans, TEXTS)
    assert short["norm"][0] == pytest.approx(together["norm"][0], rel=1e-4)
    assert short["norm"][3] != pytest.approx(together["norm"][3], rel=1e-2)


def test_a_plan_that_breaks_the_model_is_named(planted: Suite):
    with pytest.raises(FloatingPointError, match="plan 'far': logits are no longer finite"):
        side_effects(planted, toys.plans_that_break(planted), TEXTS)


def test_at_equal_norm_a_plan_of_many_layers_changes_as_much_as_one_of_one(planted: Suite):
    # Trap 20: at the same s a plan of many layers adds more.
    one = SweepCell("sea", "single", make_plan(planted, ["1/res/3"], 4.0, unit="unit"), 1, 4.0)
    names = ["0/res/2", "1/res/3", "2/res/1"]
    many = SweepCell("sea", "constant", make_plan(planted, names, 4.0, unit="unit"), 2, 4.0)
    other = SweepCell("war", "constant", many.plan, 2, 4.0)  # without a single of its theme
    cells = controls.equal_norm_cells(planted, [SweepCell("sea"), many, one, other], "single")
    assert [cell.strategy for cell in cells] == ["constant", "single"]
    norms = [controls.total_norm(planted, cell.plan or {}) for cell in (many, *cells)]
    assert norms == pytest.approx([12, 4, 4])
    assert [cell.strength for cell in cells] == pytest.approx([4 / 3, 4])


def test_random_features_stand_in_and_are_scaled_to_the_same_change(planted: Suite):
    codes = np.random.default_rng(0).random((40, toys.RES)).tolist()
    read = toys.planted_activations({Site(1, "res"): codes})
    plan = make_plan(planted, ["1/res/3"], -4.0, "rescale")
    cell = SweepCell("sea", "single", plan, 1, -4.0)
    cells = controls.random_cells(planted, cell, read, range(8), TEXTS)
    assert {c.strategy for c in cells} == {"random features", "random, same norm"}
    plans = {str(number): c.plan for number, c in enumerate([cell, *cells])}
    norms = side_effects(planted, plans, TEXTS)["norm"]
    for norm, twin in zip(norms[1:], cells, strict=True):
        assert (twin.theme, twin.layer, twin.strength) == ("sea", 1, -4.0)
        assert isinstance(twin.plan, Plan)
        (step,) = twin.plan.steps
        assert step.feature != "1/res/3"
        if twin.strategy == "random, same norm":
            assert norm == pytest.approx(norms[0], rel=1e-3)
        else:
            assert replace(step, feature="1/res/3") == plan.steps[0]
