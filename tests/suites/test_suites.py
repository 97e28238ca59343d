"""Suites load by folder and by name; what is unknown, broken or too large is said plainly."""

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import toys
import yaml
from hub import Hub
from hub_families import HOOKS, read_sae, read_tensors
from hub_files import PYTHIA, shrink
from transformers import Gemma3ForCausalLM

from flowhelpers.core.features import FeatureId, Site
from flowhelpers.labels.describe import top_logit_tokens
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import KEPT, OnDemand, Suite, load_suite, memory_needed
from flowhelpers.suites.model import final_norm, tokenize
from flowhelpers.suites.registry import find_suite
from flowhelpers.suites.sae_files import FORMATS

NAME = "pythia-70m-deduped"


@pytest.fixture
def tiny_pythia(pythia: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The suite as small as its files on the loopback hub."""
    shrink(monkeypatch, NAME, d_model=64)
    return pythia


def test_a_folder_is_loaded_with_what_was_planted(
    planted: Suite, planted_folder: Path, plain_toy: Gemma3ForCausalLM
):
    assert planted.name == planted_folder.name
    assert planted.row.about == "planted"
    assert planted.row.is_local
    directions = toys.planted_directions()
    assert list(planted.saes) == sorted(directions)
    numbers = sum(p.numel() for p in plain_toy.parameters())
    for site, rows in directions.items():
        sae = planted.sae(site)
        assert torch.allclose(sae.directions, rows, atol=1e-6)
        norms = [(0.5, 1.0, 2.0)[i % 3] for i in range(len(rows))]
        assert sae.norms.tolist() == pytest.approx(norms)
        folder = planted_folder / f"{site.layer}-{site.module}"
        assert sae.source == f"{folder}, suite {planted.name}"
        numbers += sum(p.numel() for p in sae.lens_sae.parameters())
    assert planted.row.parameters == numbers  # counted from the files


def test_features_of_a_suite_are_checked(planted: Suite):
    assert planted.feature("2/mlp/7") == FeatureId(2, "mlp", 7)
    assert planted.feature(FeatureId(0, "res", 15)) == FeatureId(0, "res", 15)
    for text, message in (
        ("1/res/99999", f"no feature 1/res/99999 in {planted.name}: 1/res has features 0 to 15"),
        ("12/res/3", f"no layer 12 in suite {planted.name}: it has layers 0 to 2"),
        ("12/foo/3", r"unknown module 'foo' in '12/foo/3' \(valid: res, mlp, att\)"),
        ("x", "'x' is not a feature: expected layer/module/index, such as 12/res/4230"),
    ):
        with pytest.raises(ValueError, match=message):
            planted.feature(text)
    assert planted.sae("1/att") is planted.saes[Site(1, "att")]
    with pytest.raises(ValueError, match="'x' is not a site"):
        planted.sae("x")
    some = {site: sae for site, sae in planted.saes.items() if site.module != "att"}
    with pytest.raises(ValueError, match=r"no SAE at 1/att in .*\(valid: 0/mlp, 0/res"):
        dataclasses.replace(planted, saes=some).feature("1/att/0")


def test_a_pattern_stands_for_every_layer(toy_folder: Path, planted_folder: Path, tmp_path: Path):
    patterns = {m: f"{planted_folder}/{{layer}}-{m}" for m in ("res", "mlp", "att")}
    write(tmp_path, {"name": "mine", "model": str(toy_folder), "saes": patterns})
    row = find_suite(tmp_path)
    assert row.name == "mine"
    assert {str(site): source for site, source in row.saes.items()} == {
        f"{layer}/{m}": f"{planted_folder}/{layer}-{m}"
        for layer in range(3)
        for m in ("res", "mlp", "att")
    }
    write(tmp_path, {"model": str(toy_folder), "layers": 2, "saes": patterns})
    assert len(find_suite(tmp_path).saes) == 6
    write(tmp_path, {"model": str(toy_folder), "saes": {"res": "{level}-res"}})
    with pytest.raises(FileNotFoundError, match=r"for 0/res .* lacks .*/\{level\}-res/cfg\.json"):
        load_suite(tmp_path)


def write(folder: Path, row: object) -> None:
    text = row if isinstance(row, str) else yaml.safe_dump(row)
    (folder / "suite.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a: [", r"suite\.yaml is not YAML: "),
        ("saes: {0/res: a, 1/res: b, 0/res: c}", r"suite\.yaml is not YAML: 0/res stands .* twice"),
        ({"saes": {"0/res": "0-res", "00/res": "1-res"}}, r"0/res is named .* second .* by 00/res"),
        (
            {"saes": {"0/res": "{planted}/0-res", "2/res": "{planted}/0-res"}},
            r"has one SAE for 0/res and 2/res \(.*0-res\): expected one for each, as by {layer}",
        ),
        ("- model", "expected the key model, and saes"),
        ({"model": None}, r"suite .* \(.*suite\.yaml\): expected the key model, and"),
        ({"sae": {}}, "unknown key 'sae'; did you mean 'saes'"),
        ({"saes": {}}, r"\nsaes\n  Dictionary should have at least 1 item"),
        ({"saes": {"resid": "0-res"}}, r"suite\.yaml\): 'resid' is not a site"),
        ({"saes": {"0/rse": "0-res"}}, "unknown module 'rse' in '0/rse'; did you mean 're"),
        ({"saes": {"0/res": {"release": "x"}}}, "should have at least 2 items"),
        ({"parameters": True}, r"\nparameters\n  Input should be a valid integer"),
        ({"d_model": -2}, r"\nd_model\n  Input should be greater than 0"),
        ({"stored": {"model": "float8"}}, r"stored.model\n  Input should be 'float32', 'float16'"),
        ({"neuronpedia": {"res": "a"}}, r"\nneuronpedia.*\n  String should match pattern"),
        (
            {"model": "modle", "saes": {"res": "x"}},
            "a pattern for every layer, as of res, needs the key 'layers'",
        ),
        ({"saes": {"3/res": "{planted}/0-res"}}, "an SAE at 3/res: its model has layers 0 to 2"),
        (
            {"saes": {"0/res": {"release": "pythia-70m-res", "id": "x"}}},
            "no release 'pythia-70m-res'; did you mean 'py",
        ),
        (
            {"saes": {"0/res": {"release": f"{NAME}-res-sm", "id": "blocks.9.hook_resid_post"}}},
            r"has no SAE 'blocks\.9\.hook_resid_post'; did you mean 'blocks\..\.hook_resi",
        ),
    ],
)
def test_a_broken_suite_file_says_what_is_wrong(
    planted_folder: Path, tmp_path: Path, change: Any, message: str
):
    good = {"model": "{planted}/model", "saes": {"0/res": "0-res"}}
    if isinstance(change, dict):
        change = {key: value for key, value in (good | change).items() if value is not None}
    text = change if isinstance(change, str) else yaml.safe_dump(change)
    write(tmp_path, text.replace("{planted}", str(planted_folder)))
    with pytest.raises(ValueError, match=message):
        load_suite(tmp_path)


def said_to_be_of(folder: Path, to: Path, **about: Any) -> str:
    """A copy of an SAE's folder whose configuration says more about its model."""
    shutil.copytree(folder, to)
    config = json.loads((to / "cfg.json").read_text())
    config["metadata"] |= about
    (to / "cfg.json").write_text(json.dumps(config))
    return str(to)


def test_saes_of_different_models_are_refused(
    planted_folder: Path, toy_folder: Path, tmp_path: Path
):
    planted = planted_folder / "0-res"
    sources = {
        "0/res": said_to_be_of(planted, tmp_path / "0", model_name="google/gemma-2-2b"),
        "1/res": said_to_be_of(planted, tmp_path / "1", model_name="gpt2-small"),
    }
    write(tmp_path, {"name": "mine", "model": str(toy_folder), "saes": sources})
    message = "suite mine: its SAEs are of different models: 0/res of gemma-2-2b, 1/res of"
    with pytest.raises(ValueError, match=message):
        load_suite(tmp_path)
    releases = {
        "0/res": {"release": "pythia-70m-deduped-res-sm", "id": "blocks.0.hook_resid_post"},
        "1/res": {"release": "gpt2-small-resid-post-v5-32k", "id": "blocks.1.hook_resid_post"},
    }
    write(tmp_path, {"name": "mine", "model": PYTHIA, "layers": 6, "saes": releases})
    with pytest.raises(ValueError, match="0/res of pythia-70m-deduped, 1/res of gpt2-small"):
        load_suite(tmp_path)


def test_a_model_at_another_revision_than_its_saes_is_refused(
    planted_folder: Path, toy_folder: Path, tmp_path: Path
):
    kwargs = {"revision": "step3000"}
    source = said_to_be_of(
        planted_folder / "0-res", tmp_path / "sae", model_from_pretrained_kwargs=kwargs
    )
    row = {"name": "mine", "model": str(toy_folder), "saes": {"0/res": source}}
    write(tmp_path, row | {"revision": "step1000"})
    message = r"model at revision step1000, and the SAE for 0/res .* on revision step3000"
    with pytest.raises(ValueError, match=message):
        load_suite(tmp_path)
    write(tmp_path, row | {"revision": "step3000"})
    assert load_suite(tmp_path).sae("0/res").width == toys.RES
    kwargs |= {"n_devices": 2, "fold_ln": False, "checkpoint_label": None, "checkpoint_index": 0}
    source = said_to_be_of(
        planted_folder / "0-res", tmp_path / "other", model_from_pretrained_kwargs=kwargs
    )
    write(tmp_path, row | {"revision": "step3000", "saes": {"0/res": source}})
    with pytest.warns(UserWarning, match=r"trained on a model loaded with {'checkpoint_index': 0}"):
        load_suite(tmp_path)


def test_saes_of_a_base_model_on_another_are_warned_of(
    hub_here: Hub, tiny_pythia: str, tmp_path: Path
):
    release = {"release": "pythia-70m-deduped-res-sm", "id": "blocks.{layer}.hook_resid_post"}
    write(tmp_path, {"model": "other/tuned", "layers": 6, "saes": {"res": release}})
    with (
        pytest.warns(UserWarning, match="has the model other/tuned, and its .* on pythia-70m-dedu"),
        pytest.raises(OSError, match="Repository Not Found"),
    ):
        load_suite(tmp_path)


def test_a_device_or_type_that_is_not_there_is_named(planted_folder: Path):
    with pytest.raises(ValueError, match=r"no device 'cudaa' on this machine.*valid: cpu"):
        load_suite(planted_folder, "cudaa")
    with pytest.raises(ValueError, match="unknown dtype 'float61'; did you mean 'float16'"):
        load_suite(planted_folder, dtype="float61")


def test_a_suite_that_does_not_fit_is_refused_before_anything_is_fetched(
    hub_here: Hub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**28))
    with pytest.raises(MemoryError, match=rf"in suite {NAME} needs 0\.4 GiB on cpu, and 0\.2 GiB"):
        load_suite(NAME)
    assert hub_here.requests == []


def test_a_model_that_does_not_fit_is_refused_when_it_is_asked_for(
    hub_here: Hub, tiny_pythia: str, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**28))
        suite = load_suite(NAME)
        with pytest.raises(MemoryError, match=rf"model of suite {NAME} needs 0\.4 GiB in float32"):
            assert suite.model
    assert suite.model.d_model == 64


def test_saes_that_do_not_fit_together_are_read_when_they_are_asked_for(
    planted: Suite, planted_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    least, whole = memory_needed(planted.row, kept=KEPT), memory_needed(planted.row)
    assert least < whole
    free = SimpleNamespace(available=(least + whole) // 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    suite = load_suite(planted_folder)
    assert isinstance(suite.saes, OnDemand)
    assert list(suite.saes) == list(planted.saes)
    assert len(suite.saes) == len(planted.saes) == 9
    assert Site(9, "res") not in suite.saes
    with pytest.raises(ValueError, match="no layer 9 in suite"):
        suite.sae("9/res")
    alive = [weakref.ref(suite.sae(site)) for site in suite.saes]
    gc.collect()
    assert sum(ref() is not None for ref in alive) == KEPT
    monkeypatch.undo()
    monkeypatch.setenv("FLOWHELPERS_CACHE", str(tmp_path))
    pd.testing.assert_frame_equal(match_table(suite, k=2), match_table(planted, k=2))


def test_a_suite_by_name_is_fetched_as_far_as_it_is_needed_and_once(
    hub_here: Hub, tiny_pythia: str, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    suite = load_suite(NAME)
    assert sum(path.endswith("sae_weights.safetensors") for path in hub_here.fetched()) == 1
    match_table(suite, k=2)
    files = hub_here.fetched("/resolve/")
    assert sum(path.endswith("sae_weights.safetensors") for path in files) == 18
    assert not [path for path in files if path.startswith(f"/{PYTHIA}")]
    _check_pythia(suite, hub_here.root)
    files = hub_here.fetched("/resolve/")
    assert len(files) == len(set(files))
    weights = [path for path in files if path.endswith("model.safetensors")]
    assert [path.split("/resolve/")[0] for path in weights] == [f"/{PYTHIA}"]

    for offline in (False, True):
        hub_here.reset()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        again = load_suite(NAME)
        assert torch.equal(again.model.unembedding, suite.model.unembedding)
        for site, sae in suite.saes.items():
            assert torch.equal(again.sae(site).directions, sae.directions)
            assert torch.equal(again.sae(site).lens_sae.W_enc, sae.lens_sae.W_enc)
        assert hub_here.fetched() == []  # sae-lens asks whether its files have changed
    assert hub_here.requests == []


@pytest.mark.parametrize("module", ["res", "att"])
def test_a_release_that_sae_lens_alone_can_read_is_loaded_by_it(
    hub_here: Hub, tiny_pythia: str, monkeypatch: pytest.MonkeyPatch, module: str
):
    own = load_suite(f"{NAME}@{module}")
    monkeypatch.delitem(FORMATS, "sae_lens")
    other, x = load_suite(f"{NAME}@{module}"), torch.ones(1, 64)
    for site, sae in other.saes.items():
        assert sae.files is None
        assert torch.equal(sae.directions, own.sae(site).directions)
        assert torch.equal(sae.encode(x), own.sae(site).encode(x))


def _check_pythia(suite: Suite, root: Path) -> None:
    """Weights, directions, encoder and tokens are what lies on the hub."""
    planted = read_tensors(root / "models" / PYTHIA / "model.safetensors")
    assert np.array_equal(suite.model.bridge.W_E, planted["gpt_neox.embed_in.weight"])
    assert suite.layers == 6
    assert len(suite.saes) == 18
    for site, sae in suite.saes.items():
        hook = HOOKS[site.module].format(layer=site.layer)
        lens_sae = read_sae(root, {"release": f"{NAME}-{site.module}-sm", "id": hook})
        rows = lens_sae["W_dec"] / np.linalg.norm(lens_sae["W_dec"], axis=1, keepdims=True)
        assert np.allclose(sae.directions, rows, atol=1e-6)
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        before = (x.numpy() - lens_sae["b_dec"]) @ lens_sae["W_enc"] + lens_sae["b_enc"]
        assert np.allclose(sae.encode(x), np.maximum(before, 0), atol=1e-5)
    tokens = tokenize(suite.model, ["The cat", "a"])  # the SAEs' files say: trained without BOS
    bos = suite.model.tokenizer.bos_token_id
    assert bos not in tokens.ids[0]
    assert tokens.is_text[:, 0].all()
    # The final norm has a bias here: it is not what the feature writes.
    direction = suite.sae("3/res").directions[7]
    gain = torch.from_numpy(planted["gpt_neox.final_layer_norm.weight"])
    centred = direction - direction.mean()
    normed = gain * centred / (centred.square().mean() + 1e-5).sqrt()
    logits = normed @ suite.model.unembedding
    best = (logits - logits.mean()).topk(4).values
    assert top_logit_tokens(suite, "3/res/7", 4)["logit"].to_numpy() == pytest.approx(
        best.numpy(), abs=1e-4
    )
    assert final_norm(suite.model, torch.zeros(64)).abs().max() > 0


def test_no_network_and_nothing_cached_says_what_is_missing(
    hub_here: Hub, tiny_pythia: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    message = "local cache|offline|disk"
    suite = load_suite(NAME)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for ask in (lambda: suite.model, lambda: suite.sae("3/res")):
            with pytest.raises(OSError, match=message):
                ask()
    with Hub(tmp_path) as gone:
        gone.use_in_process(tmp_path / "gone", monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the libraries try again and again
    with pytest.raises(OSError, match=message):
        load_suite(NAME)


def test_ones_own_saes_on_a_model_of_the_hub(hub_here: Hub, pythia: str, tmp_path: Path):
    rows, site = torch.eye(5, 64), Site(2, "mlp")
    toys.write_suite(tmp_path, {site: toys.write_lens_sae(rows, site)}, model=PYTHIA)
    suite = load_suite(tmp_path)
    assert suite.row.model == PYTHIA
    assert not suite.row.is_local
    assert torch.equal(suite.sae(site).directions, rows)


def test_a_local_model_with_saes_of_the_hub_needs_the_network(
    toy_folder: Path, hub_here: Hub, pythia: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    release = {"release": "pythia-70m-deduped-mlp-sm", "id": "blocks.{layer}.hook_mlp_out"}
    write(tmp_path, {"model": str(toy_folder), "saes": {"1/mlp": release}})
    row = find_suite(tmp_path)
    assert row.saes == {Site(1, "mlp"): release | {"id": "blocks.1.hook_mlp_out"}}
    assert not row.is_local
    with pytest.raises(ValueError, match="has width 64: expected 32"):
        load_suite(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="local cache"):
        load_suite(tmp_path)


def test_importing_is_quick_and_brings_no_torch():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "import flowhelpers, flowhelpers.suites.load, flowhelpers.suites.registry\n"
        "print(time.perf_counter() - start); flowhelpers.suites.registry.registered()\n"
        "print({'torch', 'transformers', 'sae_lens', 'pandas'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = run.stdout.split(maxsplit=1)
    assert loaded.strip() == "set()"
    assert float(seconds) < 2


def test_flowlet_loads_in_seconds():
    load_suite("flowlet")  # brings what has to be imported
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        load_suite("flowlet")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 4
