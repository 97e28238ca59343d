"""The preflight is silent where SAEs see what they were trained on, and warns where not."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowhelpers.activations import preflight as room
from flowhelpers.activations.preflight import preflight_sites, run_preflight
from flowhelpers.activations.sampling import draw_sample
from flowhelpers.activations.sparse import collect, read_sample
from flowhelpers.core.features import Site
from flowhelpers.steering.plans import make_plan
from flowhelpers.steering.sweeps import steer
from flowhelpers.steering.themes import output_scores
from flowhelpers.suites.load import Suite, load_suite
from flowhelpers.suites.model import HOOKS, logits_of, run_model, tokenize
from flowhelpers.suites.saes import SAE

TEXTS = [
    "At night the astronomers watched the stars and the planets, and wrote down what they saw."
]
MLP = Site(4, "mlp")


@pytest.fixture(scope="module")
def flowlet() -> Suite:
    return load_suite("flowlet")


def with_sae(suite: Suite, **changed: torch.Tensor) -> Suite:
    """The suite with other weights in the SAE at 4/mlp."""
    lens_sae = copy.deepcopy(suite.sae(MLP).lens_sae)
    for name, value in changed.items():
        getattr(lens_sae, name).data = value
    other = replace(suite.sae(MLP), loader=lens_sae)
    return replace(suite, saes={**suite.saes, MLP: other})


def test_saes_in_their_place_pass_and_others_or_no_text_are_errors(flowlet: Suite):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = run_preflight(flowlet, TEXTS)
    assert table["site"].tolist() == [
        f"{at}/{m}" for at in (0, 4, 7) for m in ("att", "mlp", "res")
    ]
    assert [str(site) for site in preflight_sites(flowlet.saes)] == table["site"].tolist()
    assert not table["is_suspicious"].any()
    assert table["declared_l0"].isna().all()
    with pytest.raises(ValueError, match="no layer 9 in suite flowlet"):
        run_preflight(flowlet, TEXTS, ["9/res"])
    with pytest.raises(ValueError, match="no text given"):
        run_preflight(flowlet, [])


def test_figures_are_those_worked_out_by_hand(flowlet: Suite, monkeypatch: pytest.MonkeyPatch):
    found = run_preflight(flowlet, TEXTS, ["4/mlp"]).iloc[0]
    tokens = tokenize(flowlet.model, TEXTS)
    x = run_model(flowlet.model, tokens.ids, [MLP])[1][MLP][0, 1:]  # all but BOS
    lens_sae = flowlet.sae(MLP).lens_sae
    with torch.no_grad():
        codes = lens_sae.encode(x)
        error = (x - lens_sae.decode(codes)).square().sum() / (x - x.mean(0)).square().sum()
    assert found["tokens"] == len(x)
    assert found["l0"] == pytest.approx((codes > 0).sum().item() / len(x))
    assert found["explained_variance"] == pytest.approx(1 - error.item(), abs=1e-4)
    monkeypatch.setattr(flowlet.model.bridge.cfg, "n_ctx", 7)  # texts are cut to what it can read
    assert run_preflight(flowlet, TEXTS, ["4/mlp"])["tokens"].item() == 6


@pytest.mark.parametrize("factor", [30.0, -30.0])
def test_thresholds_in_other_units_are_warned_of_with_the_figures(
    flowlet: Suite, monkeypatch: pytest.MonkeyPatch, factor: float
):
    monkeypatch.setattr(room, "declared", lambda source: (15.0, None))
    threshold = flowlet.sae(MLP).lens_sae.threshold.detach()
    suite = with_sae(flowlet, threshold=threshold * factor)
    message = r"4/mlp of suite flowlet: \d+\.\d features are active a token where 15 are declared"
    with pytest.warns(UserWarning, match=message):
        table = run_preflight(suite, TEXTS, ["4/mlp"])
    assert table["is_suspicious"].tolist() == [True]
    assert not 6 < table["l0"].item() < 37.5


def test_variance_that_is_not_explained_is_warned_of(
    flowlet: Suite, monkeypatch: pytest.MonkeyPatch
):
    decoder = flowlet.sae(MLP).lens_sae.W_dec.detach()
    suite = with_sae(flowlet, W_dec=decoder.roll(1, dims=1))
    with pytest.warns(UserWarning, match=r"4/mlp .* of the variance is explained: it may not see"):
        run_preflight(suite, TEXTS, ["4/mlp"])
    monkeypatch.setattr(room, "declared", lambda source: (None, 0.999))
    monkeypatch.setattr(room, "BELOW_DECLARED", 0.01)
    with pytest.warns(UserWarning, match="4/res"):
        run_preflight(flowlet, TEXTS, ["4/res"])


def as_of_hub(suite: Suite) -> Suite:
    """The suite as if its SAEs came from a release that declares an L0 of 32."""
    release, hook = "gpt2-small-resid-post-v5-32k", HOOKS["res"]
    sources = {
        site: {"release": release, "id": hook.format(layer=site.layer)} for site in suite.saes
    }
    return replace(suite, row=replace(suite.row, saes=sources))


@pytest.fixture
def looked(flowlet: Suite, monkeypatch: pytest.MonkeyPatch) -> tuple[Suite, list[list[str]]]:
    """A suite as if it came from the hub, and the sites of each preflight that it has."""
    looks: list[list[str]] = []

    def look(suite: Suite, texts: object = None, sites: Sequence[Site] = ()) -> None:
        looks.append([str(site) for site in sites])
        run_preflight(suite, TEXTS, sites)

    monkeypatch.setattr(room, "run_preflight", look)
    return as_of_hub(flowlet), looks


def test_what_first_reads_texts_looks_at_saes_of_the_hub(
    looked: tuple[Suite, list[list[str]]], tmp_path: Path
):
    suite, looks = looked
    sites = [Site(layer, "res") for layer in range(5)]
    collect(suite, TEXTS, sites)
    assert looks == [["0/res", "2/res", "4/res"]]
    collect(suite, TEXTS, sites)
    collect(suite, TEXTS, [Site(4, "res"), MLP])
    assert looks[1:] == [["4/mlp"]]
    sample = draw_sample(suite.model, {"here": TEXTS}, 3)
    read_sample(suite, sample, tmp_path)
    assert looks[2:] == [["0/att", "0/mlp", "4/att", "7/att", "7/mlp", "7/res"]]
    read_sample(replace(suite), sample, tmp_path)
    assert len(looks) == 3  # all of it was read from disk
    plan = make_plan(suite, ["5/mlp/3"], 2.0, unit="unit")
    steer(suite, {"plan": plan}, "The cat", 1, 1)
    with plan.on(suite):
        logits_of(suite.model, tokenize(suite.model, TEXTS).ids)
    output_scores(suite, ["6/res/3"], "The cat sat")
    assert looks[3:] == [["5/mlp"], ["6/res"]]


def test_no_look_is_had_at_folders_and_at_models_that_are_edited(
    looked: tuple[Suite, list[list[str]]], flowlet: Suite
):
    suite, looks = looked
    collect(flowlet, TEXTS, [MLP])
    with make_plan(flowlet, ["1/res/3"], 2.0, unit="unit").on(flowlet):
        collect(suite, TEXTS, [MLP])
    assert looks == []
    collect(suite, TEXTS, [MLP])
    assert looks == [["4/mlp"]]


def test_what_ended_a_preflight_takes_no_warning_with_it(
    flowlet: Suite, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(room, "declared", lambda source: (1000.0, None))
    suite = as_of_hub(flowlet)
    sites = [Site(4, "res"), Site(5, "res"), Site(6, "res")]
    encode, trouble = SAE.encode, [sites[1]]

    def fails(sae: SAE, x: torch.Tensor) -> torch.Tensor:
        if sae.site in trouble:
            raise ConnectionError(trouble.pop())
        return encode(sae, x)

    monkeypatch.setattr(SAE, "encode", fails)
    with pytest.warns(UserWarning, match="4/res of suite"), pytest.raises(ConnectionError):
        collect(suite, TEXTS, sites)
    assert suite.checked_sites == {sites[0]}
    with pytest.warns(UserWarning, match="where 1000 are declared") as caught:
        collect(suite, TEXTS, sites)
    assert {str(w.message).split()[0] for w in caught} == {"5/res", "6/res"}
