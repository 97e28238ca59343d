"""Every family of the hub, by its name: its numbers are right, and it goes the whole way.

The files are of the true format, on a hub on the loopback interface; two of Gemma Scope's are of
the true width too. What a family is known to be got wrong at has a test of its own.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import toys
import yaml
from hub import Hub
from hub_families import (
    GPT2_KINDS,
    HOOKS,
    gemma_2_order,
    llama_scope_codes,
    read_sae,
    sae_folder,
    write_gemma_2,
    write_gemma_3_multimodal,
    write_gemma_scope_2,
    write_gpt2,
    write_llama_scope,
)
from hub_files import shrink
from huggingface_hub import constants
from sae_lens import SAE as LensSAE
from torch.nn.functional import normalize

from flowhelpers.activations.corpora import load_texts
from flowhelpers.activations.preflight import run_preflight
from flowhelpers.activations.sparse import collect
from flowhelpers.core.features import MODULES, FeatureId, Site
from flowhelpers.core.files import DATA
from flowhelpers.deactivation import (
    ablation_cases,
    active_predecessors,
    deactivate,
    draw_targets,
    sources_of,
)
from flowhelpers.flow.graph import flow_graph
from flowhelpers.groups.occurrences import find_occurrences
from flowhelpers.matching import null
from flowhelpers.matching.table import match_table
from flowhelpers.steering.plans import make_plan
from flowhelpers.steering.sweeps import steer
from flowhelpers.suites.attention import attention_output, stored_attention_output
from flowhelpers.suites.load import Suite, load_suite
from flowhelpers.suites.model import run_model, tokenize
from flowhelpers.suites.registry import find_suite
from flowhelpers.suites.sae_files import find_files, read_decoder
from flowhelpers.suites.saes import SAE
from flowhelpers.training.measures import measure_saes

FEW = 1024
WIDE = {module: f"layer_1/width_16k/average_l0_{l0}" for module, l0 in (("res", 250), ("att", 146))}
TEXTS = ["The cat sat on the mat and the dog sat by the door.", "Rain fell on seven hills all day."]
SMALL = {
    "pythia-70m-deduped": {"d_model": 64},
    "llama-3.1-8b": {"layers": 2, "d_model": 64, "model_parameters": 100_000},
    "gpt2-small": {"layers": 2, "d_model": 64, "model_parameters": 100_000},
    "gemma-3-270m-pt": {"layers": 2, "d_model": 64, "d_att": 128, "model_parameters": 100_000},
    "gemma-3-4b-pt": {"layers": 2, "d_model": 64, "d_att": 128, "model_parameters": 100_000},
}

AFTER_W_O = ("pythia-70m-deduped", "llama-3.1-8b", "gpt2-small")  # whose att SAEs read the stream


@pytest.fixture(scope="module")
def written(hub: Hub, pythia: str) -> None:
    """Writes the families that are small."""
    write_llama_scope(hub.root)
    write_gpt2(hub.root)
    write_gemma_scope_2(hub.root)
    write_gemma_scope_2(hub.root, size="4b")


@pytest.fixture
def small(written: None, hub_here: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub with all of them, and their rows as small as they are."""
    for name, sizes in SMALL.items():
        shrink(monkeypatch, name, **sizes)
    return hub_here


def whole_way(suite: Suite) -> None:
    """Matches, a graph, groups, a deactivation and a steered text, each of which says something."""
    layer = suite.layers // 2
    matches = match_table(suite, k=2)
    assert set(matches["module"]) == set(MODULES)
    assert matches["cosine"].between(-1, 1).all()
    activations = collect(suite, TEXTS, batch_size=1)
    found = find_occurrences(matches, activations)
    of_layer = found.table[found.table["layer"] == layer]
    assert len(of_layer) == activations.by_site[Site(layer, "res")].nnz > 0
    best = of_layer.groupby("feature").size().idxmax()
    graph = flow_graph(suite, f"{layer}/res/{best}", matches)
    assert len(graph.nodes) > 1

    targets = draw_targets(activations, [layer])
    targets = targets[targets["token_row"] < targets["token_row"].min() + 3]
    sources = sources_of(targets, matches, activations)
    cases, edits = ablation_cases(targets, active_predecessors(sources))
    assert len(cases)
    tokens = tokenize(suite.model, TEXTS)
    table = deactivate(suite, tokens, targets, cases, edits, sources)
    assert len(table) == len(cases)
    assert table["new"].notna().all()
    assert (table["new"] != table["old"]).any()

    plan = make_plan(suite, graph, 40.0, strategy="constant", unit="unit")
    texts = steer(suite, {"unsteered": None, "steered": plan}, "The cat", 3, max_new_tokens=4)
    assert len(texts) == 6


@pytest.mark.parametrize("name", SMALL)
def test_a_family_goes_the_whole_way_and_again_with_the_network_off(
    name: str, small: Hub, monkeypatch: pytest.MonkeyPatch
):
    suite = load_suite(name)
    whole_way(suite)
    assert len(suite.saes) == 3 * suite.layers
    codes = {s: sae.encode(torch.ones(1, sae.lens_sae.cfg.d_in)) for s, sae in suite.saes.items()}
    small.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = load_suite(name)
    for site, sae in again.saes.items():
        assert torch.equal(sae.encode(torch.ones(1, sae.lens_sae.cfg.d_in)), codes[site])
    assert again.model.fingerprint == suite.model.fingerprint
    assert small.requests == []


@pytest.mark.parametrize("name", SMALL)
def test_directions_are_the_decoder_s_rows_at_unit_norm_whatever_the_file(name: str, small: Hub):
    suite = load_suite(name)
    sites = [Site(0, "res"), Site(1, "mlp"), Site(1, "att")]
    for site in sites if name in AFTER_W_O else sites[:2]:
        arrays = read_sae(small.root, suite.row.saes[site])
        stored = next(arrays[key] for key in ("W_dec", "w_dec", "decoder.weight") if key in arrays)
        decoder = stored.T if "decoder.weight" in arrays else stored
        rows = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
        found = suite.sae(site)
        assert found.input_site == site
        assert np.allclose(found.directions, rows, atol=1e-6)
        assert found.directions.dtype == torch.float32
        # What a feature writes for one unit of its activation, decoder alone and the whole agree.
        assert torch.allclose(found.norms, found.lens_sae.W_dec.detach().norm(dim=1), rtol=1e-3)
        limits, whole = found.thresholds, getattr(found.lens_sae, "threshold", None)
        assert (limits is None) == (whole is None)
        if limits is not None and whole is not None:
            assert torch.allclose(limits, whole.detach(), rtol=1e-3)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-3-270m-pt"])
def test_weights_in_half_precision_match_as_those_in_float32(name: str, small: Hub):
    full, half = (load_suite(name, dtype=dtype) for dtype in ("float32", "bfloat16"))
    for site in full.saes:
        assert torch.equal(full.sae(site).directions, half.sae(site).directions)
    assert half.sae("1/res").lens_sae.W_dec.dtype == torch.bfloat16
    assert half.model.unembedding.dtype == torch.bfloat16
    assert full.sae("1/res").fingerprint != half.sae("1/res").fingerprint


@pytest.mark.parametrize("name", SMALL)
def test_decoders_are_kept_as_they_are_stored(name: str, small: Hub):
    suite = load_suite(name)
    stored = getattr(torch, suite.row.stored.get("saes", "float32"))
    for site, sae in suite.saes.items():
        comes_to_the_stream = sae.input_site != site  # by products, in float32
        assert sae.decoder.dtype is (torch.float32 if comes_to_the_stream else stored)
        assert sae.norms.dtype is torch.float32
        assert sae.files is not None
        direction = sae.direction(FeatureId(site.layer, site.module, 3))
        assert torch.allclose(direction, sae.directions[3])
    matches = match_table(suite, k=1)
    target, source = (suite.sae(site).directions for site in ("1/res", "0/res"))
    of_stream = (matches["module"] == "res") & (matches["direction"] == "backward")
    found = matches[of_stream & (matches["layer"] == 1)]
    best = (target[found["feature"].to_numpy()] @ source.T).max(dim=1).values
    assert found["cosine"].to_numpy() == pytest.approx(best.numpy(), abs=1e-5)


@pytest.mark.skipif(sys.platform == "darwin", reason="the system does not say what is mapped")
def test_decoders_of_safetensors_are_mapped_from_the_cache_and_never_from_a_folder(
    small: Hub, tmp_path: Path
):
    def is_mapped(sae: SAE) -> bool:
        assert sae.files is not None
        mapped = {Path(each.path) for each in psutil.Process().memory_maps()}
        return sae.files.weights.resolve() in mapped

    sae = load_suite("gpt2-small").sae("0/res")
    assert is_mapped(sae)
    sae.lens_sae.save_model(tmp_path)
    here = toys.load_folder(tmp_path, Site(0, "res"), sae.decoder.shape[1])
    assert torch.equal(here.decoder, sae.decoder)
    assert not is_mapped(here)


def test_a_suite_gives_the_same_from_the_hub_as_from_its_folder(hub_here: Hub, tmp_path: Path):
    folder = DATA / "flowlet-mini"
    shutil.copytree(folder / "model", hub_here.root / "models" / "someone" / "flowlet-mini")
    saes = {}
    for module in MODULES:
        release = f"gpt2-small-{GPT2_KINDS[module]}-v5-128k"  # a release of sae-lens's own format
        saes[module] = {"release": release, "id": HOOKS[module]}
        for layer in range(6):
            source = {"release": release, "id": HOOKS[module].format(layer=layer)}
            to = sae_folder(hub_here.root, source)
            shutil.copytree(folder / "saes" / f"{layer}-{module}", to)
    row = {"model": "someone/flowlet-mini", "layers": 6, "saes": saes}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(row))
    with pytest.warns(UserWarning, match="its SAEs were trained on gpt2-small"):
        served = load_suite(tmp_path)
    assert not served.row.is_local
    here = load_suite("flowlet-mini")
    for k, together in ((2, match_table), (1, partial(match_table, method="permutation"))):
        tables = [together(suite, k=k).drop(columns="suite") for suite in (served, here)]
        pd.testing.assert_frame_equal(*tables)
    texts = load_texts("fiction", 3)
    with pytest.warns(UserWarning, match="0/res of suite .* where 32 are declared"):
        found = collect(served, texts)
    expected = collect(here, texts)
    assert all((found.by_site[site] != expected.by_site[site]).nnz == 0 for site in here.saes)


# Llama Scope: one threshold, in units of the raw stream (traps 21 and 22).


def test_llama_scope_s_threshold_is_in_raw_units(small: Hub):
    suite = load_suite("llama-3.1-8b")
    tokens = tokenize(suite.model, TEXTS)
    sites = [Site(layer, module) for layer in (0, 1) for module in MODULES]
    _, read = run_model(suite.model, tokens.ids, read=sites)
    for site in sites:
        source = suite.row.saes[site]
        arrays = read_sae(small.root, source)
        about = json.loads((sae_folder(small.root, source) / "hyperparams.json").read_text())
        x = read[site][tokens.is_text]
        raw = llama_scope_codes(arrays, about, x.numpy())
        sae = suite.sae(site)
        codes = sae.encode(x)
        near = np.abs(raw - about["jump_relu_threshold"]) < 1e-2 * about["jump_relu_threshold"]
        assert ((codes > 0).numpy() == (raw > 0))[~near].all()
        assert 1 < (raw > 0).sum(1).mean() < 60
        # In the stream both scales are one: what is written is the raw code times the raw row.
        feature = int(codes.sum(0).argmax())
        written_here = codes[:, [feature]] * sae.decoder_rows(torch.tensor([feature]))
        row = torch.from_numpy(arrays["decoder.weight"].T[feature].copy())
        expected = torch.from_numpy(raw[:, [feature]]).float() * row
        assert torch.allclose(written_here, expected, rtol=2e-2, atol=1e-3)
        assert sae.thresholds is not None
        scale = about["d_model"] ** 0.5 / about["dataset_average_activation_norm"]["in"]
        expected_threshold = about["jump_relu_threshold"] * scale
        assert sae.thresholds[0].item() == pytest.approx(expected_threshold, rel=1e-2)


def test_a_scale_that_sae_lens_does_not_share_is_refused(small: Hub):
    source: Any = find_suite("llama-3.1-8b").saes[Site(0, "res")]
    path = sae_folder(small.root, source) / "hyperparams.json"
    before = path.read_text()
    norm = json.loads(before)["dataset_average_activation_norm"]["in"]
    try:
        path.write_text(before.replace(str(norm), str(norm * 2)))
        message = "sae-lens scales its activations by .* are not known"
        with pytest.raises(ValueError, match=message):
            find_files(source)
    finally:
        path.write_text(before)


# GPT-2: top-k, each token normalised first.


def test_gpt2_s_features_write_their_activation_times_their_row(small: Hub):
    suite = load_suite("gpt2-small")
    tokens = tokenize(suite.model, TEXTS)
    for site in suite.saes:
        _, read = run_model(suite.model, tokens.ids, read=[site])
        x = read[site][tokens.is_text]
        sae = suite.sae(site)
        assert sae.thresholds is None
        codes = sae.encode(x)
        assert ((codes > 0).sum(1) <= 8).all()
        assert (codes > 0).any()
        with torch.no_grad():
            expected = sae.lens_sae.decode(sae.lens_sae.encode(x))  # which keeps the scale
        assert torch.allclose(sae.decode(codes, x), expected, atol=1e-4)
        feature = int(codes.sum(0).argmax())
        without = codes.clone()
        without[:, feature] = 0
        step = sae.decode(codes, x) - sae.decode(without, x)
        row = sae.decoder_rows(torch.tensor([feature]))
        assert torch.allclose(step, codes[:, [feature]] * row, atol=1e-4)
        with pytest.raises(ValueError, match="normalises each token: decode needs `at`"):
            sae.decode(codes)


# Gemma Scope 2: attention SAEs read z, whatever their folders are called.


@pytest.mark.parametrize("name", ["gemma-3-270m-pt", "gemma-3-4b-pt"])
def test_gemma_scope_2_s_attention_comes_into_the_stream(name: str, small: Hub):
    check_attention(load_suite(name), small.root, "w_dec")
    weights = [path for path in small.fetched() if path.endswith("model.safetensors")]
    assert len(weights) <= 2 * 4 + 1  # ranges for two layers, and the model once


def test_what_a_sae_at_z_is_worth_is_measured_at_z(small: Hub):
    suite = load_suite("gemma-3-270m-pt")
    table = measure_saes(suite, tokenize(suite.model, TEXTS))
    looked = run_preflight(suite, TEXTS, suite.saes)
    both = table.set_index("site").join(looked.set_index("site"), rsuffix="_looked")
    assert both["l0"].tolist() == pytest.approx(both["l0_looked"].tolist())
    explained = both["explained_variance_looked"].tolist()
    assert both["explained_variance"].tolist() == pytest.approx(explained, abs=1e-4)
    assert table["loss_recovered"].notna().all()


def check_attention(suite: Suite, root: Path, decoder: str) -> None:
    """Directions at each layer's attention are its rows through the model's W_O and gain."""
    for layer in (0, 1):
        found = suite.sae(Site(layer, "att"))
        assert found.input_site == Site(layer, "z")
        stored = stored_attention_output(suite.row.model, layer)
        of_model = attention_output(suite.model, layer)
        assert stored is not None
        assert stored.gain is not None
        assert of_model.gain is not None
        assert torch.allclose(stored.weights, of_model.weights.float(), atol=1e-6)
        assert torch.allclose(stored.gain, of_model.gain.float(), rtol=1e-3)
        rows = torch.from_numpy(read_sae(root, suite.row.saes[found.site])[decoder][:64])
        without_gain = rows @ of_model.weights.float()
        expected = normalize(without_gain * of_model.gain.float())
        assert torch.allclose(found.directions[:64], expected, atol=1e-4)
        assert (normalize(without_gain) * expected).sum(1).mean() < 0.999


# Gemma Scope: decoders of 1,024 features; two whole SAEs at the true width, as sae-lens asks.


@pytest.fixture(scope="module")
def gemma_2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Gemma 2 2B's first two layers with their SAEs, on a hub of their own."""
    with Hub(tmp_path_factory.mktemp("gemma-hub")) as hub:
        write_gemma_2(hub.root, features=FEW, wide=WIDE)
        with pytest.MonkeyPatch.context() as patch:
            hub.use_in_process(tmp_path_factory.mktemp("gemma-home"), patch)
            shrink(patch, "gemma-2-2b", layers=2, model_parameters=200_000_000)
            # Chance is drawn less often: at this width that takes longer than the matches.
            patch.setattr(null, "null_cosines", partial(null.null_cosines, draws=512))
            yield hub


@pytest.fixture(scope="module")
def gemma_suite(gemma_2: Hub) -> Suite:
    """The suite by its name, of which the decoders alone can be read."""
    return load_suite("gemma-2-2b")


@pytest.fixture(scope="module")
def wide_suite(gemma_2: Hub, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """The two SAEs of the true width."""
    folder = tmp_path_factory.mktemp("wide")
    saes = {
        f"1/{module}": {"release": f"gemma-scope-2b-pt-{module}", "id": sae_id}
        for module, sae_id in WIDE.items()
    }
    row = {"model": "google/gemma-2-2b", "layers": 2, "d_model": 2304, "saes": saes}
    (folder / "suite.yaml").write_text(yaml.safe_dump(row))
    return load_suite(folder)


def test_gemma_scope_s_matches_are_those_planted_and_need_no_model(
    gemma_suite: Suite, gemma_2: Hub
):
    matches = match_table(gemma_suite, k=1)
    asked = [r for r in gemma_2.requests if "gemma-2-2b" in r.path and "safetensors" in r.path]
    assert all(r.range for r in asked if r.method == "GET" and not r.path.endswith("json"))
    assert "model" not in vars(gemma_suite)
    assert all("lens_sae" not in vars(gemma_suite.sae(site)) for site in gemma_suite.saes)
    best = matches[matches["direction"] == "backward"]
    at = best[(best["layer"] == 1) & (best["module"] == "res")].set_index("feature").sort_index()
    even = np.arange(0, FEW, 2)
    assert (at["source"].to_numpy()[even] == gemma_2_order("res", FEW)[even]).all()
    assert np.allclose(at["cosine"].to_numpy()[even], 1, atol=1e-5)
    mlp = best[(best["layer"] == 1) & (best["module"] == "mlp")].set_index("feature").sort_index()
    order = gemma_2_order("mlp", FEW)
    odd = np.flatnonzero(order % 2)
    assert (mlp["source"].to_numpy()[order[odd]] == odd).all()


def test_gemma_scope_s_attention_comes_into_the_stream(gemma_suite: Suite, gemma_2: Hub):
    check_attention(gemma_suite, gemma_2.root, "W_dec")


def test_gemma_s_mlp_is_read_after_its_norm(gemma_suite: Suite):
    # Trap 4: on the raw output of the MLP, L0 and explained variance are far off.
    tokens = tokenize(gemma_suite.model, TEXTS)
    kept: dict[str, torch.Tensor] = {}
    block = gemma_suite.model.bridge.original_model.model.layers[1]
    hooks = [
        part.register_forward_hook(lambda *call, name=name: kept.update({name: call[2].detach()}))
        for name, part in (("raw", block.mlp), ("after", block.post_feedforward_layernorm))
    ]
    _, read = run_model(gemma_suite.model, tokens.ids, read=[Site(1, "mlp")])
    for hook in hooks:
        hook.remove()
    assert torch.allclose(read[Site(1, "mlp")], kept["after"], atol=1e-5)
    assert not torch.allclose(kept["raw"], kept["after"], rtol=0.1)


def test_gemma_scope_encodes_as_sae_lens_does_and_passes_its_preflight(wide_suite: Suite):
    tokens = tokenize(wide_suite.model, TEXTS)
    for module, sae_id in WIDE.items():
        sae = wide_suite.sae(f"1/{module}")
        _, read = run_model(wide_suite.model, tokens.ids, read=[sae.input_site])
        x = read[sae.input_site][tokens.is_text]
        plain = LensSAE.from_pretrained(f"gemma-scope-2b-pt-{module}", sae_id)
        shaped = x.unflatten(-1, (8, 256)) if module == "att" else x
        with torch.no_grad():
            codes = plain.encode(shaped)
        assert (codes > 0).any()
        assert torch.equal(sae.encode(x), codes)
    table = run_preflight(wide_suite, TEXTS, wide_suite.saes)
    assert table["declared_l0"].tolist() == [146, 250]
    assert (table["l0"] / table["declared_l0"]).between(0.2, 5).all()


def test_a_hub_file_that_is_cut_short_in_the_cache_is_named(gemma_suite: Suite, tmp_path: Path):
    files = gemma_suite.sae("0/res").files
    assert files is not None
    short = tmp_path / "params.npz"
    short.write_bytes(files.weights.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=r"the SAE in .* cannot be read: expected whole files"):
        read_decoder(replace(files, weights=short))


def test_a_multimodal_model_without_its_processor_loads_and_installs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from flowhelpers.suites.bridge import load_model

    asked: list[Any] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: asked.append(command))
    folder = tmp_path / "models" / write_gemma_3_multimodal(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    assert load_model(str(folder)).bridge.processor is None
    assert asked == []


def test_decoders_alone_and_files_that_are_not_there_are_known_with_the_network_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with Hub(tmp_path / "hub") as hub:
        hub.use_in_process(tmp_path / "home", monkeypatch)
        monkeypatch.setenv("FLOWHELPERS_CACHE", str(tmp_path / "tables"))
        write_gpt2(hub.root)
        write_gemma_scope_2(hub.root)
        optional = [*hub.root.rglob("sparsity.safetensors")]
        optional += hub.root.glob("models/google/gemma-scope-2-*/*/*/config.json")
        assert len(optional) > 10
        for path in optional:
            path.unlink()
        names = ("gpt2-small", "gemma-3-270m-pt")
        for name in names:
            shrink(monkeypatch, name, **SMALL[name])
        online = {name: match_table(load_suite(name), k=1) for name in names}
        hub.reset()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        for name in names:
            suite = load_suite(name)
            assert match_table(suite, k=1).equals(online[name])
            assert suite.sae("1/res").lens_sae.cfg.d_in == 64
        assert hub.requests == []
