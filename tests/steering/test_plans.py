"""Plans do what their formulas say, on a model whose stream is known; texts keep their seeds."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys

from flowhelpers import steering
from flowhelpers.core.features import FeatureId, Site, parse_feature
from flowhelpers.interventions.generation import generate
from flowhelpers.steering.plans import Plan, Step, make_plan, plan_edits, steering_vectors
from flowhelpers.steering.sweeps import steer
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Edit, Model, run_model

THETA = {"0/res/2": 0.25, "1/mlp/1": 0.25, "1/res/3": 0.5, "1/res/0": 1.25, "2/res/1": 0.25}
FEATURES = [*THETA]
PROMPT = "The cat sat"


def streams(world: SimpleNamespace, *edits: Edit) -> dict[Site, torch.Tensor]:
    sites = [Site(0, "res"), Site(1, "mlp"), Site(1, "res"), Site(2, "res")]
    return run_model(world.suite.model, world.tokens.ids, sites, list(edits))[1]


def row(suite: Suite, name: str) -> torch.Tensor:
    feature = parse_feature(name)
    return suite.sae(feature.site).lens_sae.W_dec.detach()[feature.index]


@pytest.mark.parametrize(
    ("strategy", "options", "expected"),
    [
        ("constant", {}, {3: 8, 5: 8, 7: 8}),
        ("single", {}, {3: 8, 5: 8, 7: 8}),
        # 8 · exp(-0.05 · 3), · 5, · 7, worked out by hand; then counted from layer 2
        ("exponential", {}, {3: 6.885663811400462, 5: 6.230406264571239, 7: 5.637504718973491}),
        ("exponential", {"from_start": True}, {3: 7.6098353960, 5: 6.8856638114, 7: 6.2304062646}),
        ("exponential", {"alpha": -0.25}, {3: 3.7789324219, 5: 2.2920383749, 7: 1.3901915476}),
        # from (2, 8) to (9, 1): one less at each layer
        ("linear", {}, {3: 7, 5: 5, 7: 3}),
        ("linear", {"end_strength": 15.0}, {3: 9, 5: 11, 7: 13}),
    ],
)
def test_schedules_are_those_of_the_paper(
    strategy: str, options: dict[str, Any], expected: dict[int, float]
):
    found = steering.schedule(8.0, [2, 3, 5, 7, 9], strategy, **options)
    assert {layer: found[layer] for layer in expected} == pytest.approx(expected)
    assert steering.schedule(8.0, [4], "linear") == {4: 8.0}


@pytest.mark.parametrize("unit", ["theta", "max", "unit"])
def test_what_is_added_is_the_formula_at_every_site_and_token(world: SimpleNamespace, unit: Any):
    suite = world.suite
    maxima = {name: 2.0 + place for place, name in enumerate(FEATURES)}
    given: dict[str, Any] = {"unit": unit, "max_activation": maxima, "alpha": -0.5}
    plan = make_plan(suite, FEATURES, 3.0, strategy="exponential", **given)
    by_default = make_plan(suite, FEATURES, 3.0, strategy="exponential", alpha=-0.5)
    assert (plan == by_default) == (unit == "theta")  # CHOICES 19
    assert make_plan(suite, FEATURES[0], 3.0) == make_plan(suite, FEATURES[:1], 3.0)
    clean, steered = streams(world), streams(world, *plan_edits(suite, [plan]))
    added = {}
    for name in FEATURES:
        scale = {"theta": THETA[name], "max": maxima[name], "unit": 0.5}[unit]
        added[name] = 3 * math.exp(-0.5 * int(name[0])) * scale * row(suite, name)
    # The stream keeps what was added below; this model's layers answer nothing.
    expected = {Site(0, "res"): added["0/res/2"], Site(1, "mlp"): added["1/mlp/1"]}
    expected[Site(1, "res")] = sum(v for n, v in added.items() if n[0] in "01")
    expected[Site(2, "res")] = sum(added.values())
    for site, step in expected.items():
        moved = steered[site] - clean[site]
        assert torch.allclose(moved, step.expand_as(moved), atol=1e-6), site


def test_rescaling_reads_each_feature_live_after_the_layers_below(world: SimpleNamespace):
    suite = world.suite
    plan = make_plan(suite, ["0/res/2", "1/res/3"], -2.0, "rescale")
    clean, steered = streams(world), streams(world, *plan_edits(suite, [plan]))
    a = suite.sae("0/res").encode(clean[Site(0, "res")])[..., 2:3]
    below = clean[Site(0, "res")] - 3 * a * row(suite, "0/res/2")
    assert torch.allclose(steered[Site(0, "res")], below, atol=1e-6)
    assert (a > 0).any()
    # Trap 15: both lie along one coordinate; what is left below is 1 - 3 < 0, and so off above.
    moved = steered[Site(1, "res")] - clean[Site(1, "res")]
    assert torch.allclose(moved, -3 * a * row(suite, "0/res/2"), atol=1e-6)
    both = Plan(
        suite.name, "rescale", "activation", (Step("1/res/3", -2.0, 1.0), Step("1/res/5", 2.0, 1.0))
    )
    together = streams(world, *plan_edits(suite, [both]))
    codes = suite.sae("1/res").encode(clean[Site(1, "res")])
    step = -3 * codes[..., 3:4] * row(suite, "1/res/3") + codes[..., 5:6] * row(suite, "1/res/5")
    moved = together[Site(1, "res")] - clean[Site(1, "res")]
    assert torch.allclose(moved, step, atol=1e-6)


def test_strategies_choose_the_layers(world: SimpleNamespace):
    def layers(**given: Any) -> list[str]:
        plan = make_plan(world.suite, FEATURES, 1.0, **given)
        return [step.feature for step in plan.steps]

    assert layers() == FEATURES
    assert layers(layer=1) == FEATURES[:4]
    assert layers(strategy="single", layer=1) == FEATURES[1:4]
    assert layers(strategy="linear", layer=0) == FEATURES[:1]
    # The span is that of the graph, however far the plan goes.
    plan = make_plan(world.suite, FEATURES, 3.0, strategy="linear", layer=1)
    assert [step.strength for step in plan.steps] == [3, 2, 2, 2]


def test_a_plan_counts_layers_from_0_and_in_thresholds_unless_asked(world: SimpleNamespace):
    plan = make_plan(world.suite, ["1/res/3", "2/res/1"], 2.0, strategy="exponential")
    strengths = [2 * math.exp(-0.05), 2 * math.exp(-0.1)]  # traps 18 and 19: not 2 at the first
    assert [step.strength for step in plan.steps] == pytest.approx(strengths)
    assert (plan.unit, [step.scale for step in plan.steps]) == ("theta", [0.5, 0.25])


def test_the_unit_is_the_threshold_or_without_one_the_greatest_activation(world: SimpleNamespace):
    suite, read = world.suite, world.activations
    assert steering.unit_of(suite, read) == {"unit": "theta", "max_activation": {}}
    codes = read.by_site[Site(1, "res")].toarray().max(axis=0)
    bare = replace(suite, saes={**suite.saes, Site(1, "res"): SimpleNamespace(thresholds=None)})
    for found in (steering.unit_of(bare, read), steering.unit_of(suite, read, "max")):
        assert found["unit"] == "max"
        of_site = {n: x for n, x in found["max_activation"].items() if n.startswith("1/res/")}
        assert of_site == {f"1/res/{i}": x for i, x in enumerate(codes.tolist()) if x > 0} != {}
    with pytest.raises(ValueError, match="unknown unit 'thta'; did you mean 'theta'"):
        steering.unit_of(suite, read, "thta")


STEP = {"feature": "1/res/2", "strength": -2, "scale": 1}
BY_HAND = {"suite": "a", "kind": "rescale", "unit": "activation", "steps": [STEP]}


def test_a_plan_survives_saving_and_loading(world: SimpleNamespace, tmp_path: Path):
    plan = make_plan(world.suite, FEATURES, 3.3, strategy="exponential", about="Größe: a test")
    steering.save_plan(plan, tmp_path / "plan.json")
    assert steering.load_plan(tmp_path / "plan.json") == plan
    (tmp_path / "plan.json").write_text(json.dumps(BY_HAND), encoding="utf-8")
    expected = Plan("a", "rescale", "activation", (Step("1/res/2", -2, 1),))
    assert steering.load_plan(tmp_path / "plan.json") == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": []}, "steps"),
        ({"kind": "ad"}, "kind"),
        ({"more": 1}, "more"),
        ({"steps": [STEP | {"feature": 73}]}, "feature"),
        ({"steps": [STEP | {"strength": math.nan}]}, "finite"),
        ({"steps": [STEP | {"strength": True}]}, "valid number"),
        ({"steps": [{"feature": "1/res/2", "strength": 1}]}, "scale"),  # what is one unit of s?
        ({"kind": "ad", "more": 1}, r"^\S+plan.json holds no plan: kind: [^\n]*; more: [^\n]*$"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, changed: dict, message: str):
    (tmp_path / "plan.json").write_text(json.dumps(BY_HAND | changed), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        steering.load_plan(tmp_path / "plan.json")


def test_a_plan_serves_any_code_and_leaves_nothing_behind(world: SimpleNamespace):
    suite = world.suite
    plan = make_plan(suite, FEATURES, 4.0)
    ids = world.tokens.ids
    clean = suite.model.bridge(ids, return_type="logits")
    with plan.on(suite):
        steered = suite.model.bridge(ids, return_type="logits")
    assert not torch.allclose(clean, steered, atol=1e-3)
    assert torch.equal(clean, suite.model.bridge(ids, return_type="logits"))


def test_steered_and_unsteered_share_their_seeds(planted: Suite):
    push = make_plan(planted, [FeatureId(1, "res", 3)], 50.0, unit="unit")
    nothing = make_plan(planted, [FeatureId(1, "res", 3)], 0.0, unit="unit")
    same = make_plan(planted, [FeatureId(1, "res", 3)], 1.0, "rescale")
    vectors = steering_vectors(planted, push)
    plans = {"plain": None, "nothing": nothing, "pushed": push, "r = 1": same, "vectors": vectors}
    table = steer(planted, plans, PROMPT, samples=4, max_new_tokens=8, seed=3)
    texts = {name: part["text"].tolist() for name, part in table.groupby("plan", sort=False)}
    assert list(texts) == list(plans)
    assert table["sample"].tolist() == [0, 1, 2, 3] * 5
    given = {"samples": 4, "temperature": 1.27, "top_p": 0.7}
    expected, other = (generate(planted.model, PROMPT, 8, **given, seed=seed) for seed in (3, 4))
    assert len({*expected, *other}) == 8
    assert texts["plain"] == texts["nothing"] == texts["r = 1"] == expected
    assert texts["vectors"] == texts["pushed"] != expected
    apart = steer(planted, plans, PROMPT, samples=4, max_new_tokens=8, seed=3, batch_size=5)
    assert apart.equals(table)


def test_an_sae_that_reads_z_is_pushed_there(planted: Suite, toy: Model):
    at_z = replace(planted, saes={Site(1, "att"): toys.sae_at_z(toy)})
    push = steering_vectors(at_z, Plan(planted.name, "add", "theta", (Step("1/att/4", 2.0, 0.5),)))
    assert set(push) == {Site(1, "z")}
    assert torch.allclose(push[Site(1, "z")], row(at_z, "1/att/4"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"features": []}, r"no feature to steer at layer 0: there are some at \[\]"),
        ({"features": ["1/res/99"]}, "no feature 1/res/99 in adder"),
        ({"strength": math.inf}, "strength=inf: expected a finite number"),
        ({"layer": 99}, "layer=99: adder has the layers 0 to "),
        ({"layer": -1}, "layer=-1: adder has the layers 0 to "),
        (
            {"unit": "max", "max_activation": {"0/res/2": 1}},
            "unit='max': max_activation has no value for 1/mlp/1",
        ),
        ({"strategy": "expnential"}, "unknown strategy 'expnential'; did you mean 'exponential'"),
        ({"kind": "rescale", "strategy": "linear"}, "r is the same at all"),
    ],
)
def test_plans_that_make_no_sense_are_refused(
    world: SimpleNamespace, given: dict[str, Any], message: str
):
    settings: dict[str, Any] = {"features": FEATURES, "strength": 1.0} | given
    with pytest.raises(ValueError, match=message):
        make_plan(world.suite, **settings)


def test_a_plan_of_another_suite_and_no_plan_are_refused(world: SimpleNamespace, planted: Suite):
    plan = make_plan(world.suite, ["1/res/3"], 1.0)
    for kind in ("add", "rescale"):
        with pytest.raises(ValueError, match="a plan of suite adder: expected one of"):
            steer(planted, {"one": replace(plan, kind=kind)}, PROMPT, samples=1)
    absent = Plan(planted.name, "add", "unit", (Step("1/res/99", 1.0, 1.0),))
    with pytest.raises(ValueError, match="no feature 1/res/99"):
        steer(planted, {"one": absent}, PROMPT, samples=1)
    with pytest.raises(ValueError, match=r"0 plans and samples=.*: expected 1 or more of"):
        steer(planted, {}, PROMPT)
