"""The model families on the loopback hub load with the true libraries, as they were written."""

import subprocess
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hub import Hub
from hub_families import (
    GEMMA_2,
    GEMMA_3,
    GEMMA_3_MULTIMODAL,
    GPT2,
    LLAMA,
    MODULES,
    WIDTH_16K,
    Written,
    gemma_2_arrays,
    gemma_2_decoder,
    gemma_2_order,
    gemma_2_partners,
    gemma_weights,
    gpt2_arrays,
    gpt2_weights,
    llama_scope_arrays,
    llama_scope_codes,
    unit_rows,
    write_gemma_2,
    write_gemma_2_model,
    write_gemma_3,
    write_gemma_3_multimodal,
    write_gemma_scope_2,
    write_gpt2,
    write_llama_scope,
)

SENTENCES = [
    "The cat sat on the mat, and the dog was warm.",
    "There sat the other two: a door, a hat and 7 schöne rats!",
    "Who was at the door? The dog that they had met was there.",
]
# What reading with sae-lens has to come out as, by module.
Z = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
OUT = Z | {"att": "hook_attn_out"}


@pytest.fixture(autouse=True)
def installs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing may be installed; what would have been is kept.

    For a multimodal model whose processor does not load, TransformerLens runs `pip install
    torchvision` in the environment that it runs in, which may replace torch.
    """
    asked: list[Any] = []

    def refuse(command: Any, *_: Any, **__: Any) -> NoReturn:
        asked.append(command)
        raise PermissionError(f"a test would have run {command}")

    monkeypatch.setattr(subprocess, "check_call", refuse)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("UV_OFFLINE", "1")
    return asked


@pytest.fixture(scope="module")
def gemma_2(hub: Hub) -> Written:
    """Two SAEs only: each of them is 0.3 GB."""
    return write_gemma_2(hub.root, layers=(1,), modules=("res", "att"))


@pytest.fixture(scope="module")
def llama(hub: Hub) -> Written:
    return write_llama_scope(hub.root)


@pytest.fixture(scope="module")
def gpt2(hub: Hub) -> Written:
    return write_gpt2(hub.root)


@pytest.fixture(scope="module")
def gemma_3(hub: Hub) -> Written:
    return write_gemma_scope_2(hub.root)


@pytest.fixture(scope="module")
def multimodal(hub: Hub) -> Written:
    return write_gemma_scope_2(hub.root, size="4b", kinds=("big",))


def load(release: str, sae_id: str) -> Any:
    """The SAE as sae-lens has it."""
    from sae_lens import SAE

    return SAE.from_pretrained(release, sae_id)


def read(name: str, modules: tuple[str, ...] = MODULES) -> dict[tuple[str, int], Any]:
    """What the model has at its sites, `z` for attention's heads, at tokens of sentences."""
    from flowhelpers.core.features import Site
    from flowhelpers.suites.bridge import load_model
    from flowhelpers.suites.model import run_model, tokenize

    model = load_model(name)
    tokens = tokenize(model, SENTENCES)
    sites = [Site(layer, module) for layer in range(model.layers) for module in modules]
    _, found = run_model(model, tokens.ids, read=[site for site in sites if site.module != "z"])
    heads: dict[Any, Any] = {}

    def keep(site: Site) -> Any:
        def hook(activations: Any, hook: Any = None) -> None:
            heads[site] = activations.detach().flatten(2)

        return hook

    wanted = [site for site in sites if site.module == "z"]
    hooks = [(f"blocks.{site.layer}.attn.hook_z", keep(site)) for site in wanted]
    with model.bridge.hooks(fwd_hooks=hooks):
        model.bridge(tokens.ids)
    return {
        (site.module, site.layer): values[tokens.is_text]
        for site, values in (found | heads).items()
    }


def size(values: Any) -> float:
    """The size of one coordinate."""
    return float(values.pow(2).mean() ** 0.5)


def check_jumprelu(lens_sae: Any, arrays: dict[str, np.ndarray], hook: str) -> None:
    """An SAE with thresholds of its own is loaded as its file has it."""
    assert lens_sae.cfg.architecture() == "jumprelu"
    assert lens_sae.cfg.metadata.hook_name == hook
    assert not lens_sae.cfg.apply_b_dec_to_input
    for name, array in arrays.items():
        loaded = getattr(lens_sae, name.replace("w_", "W_")).detach()
        assert np.array_equal(loaded.numpy(), array), name


def test_gemma_2_is_loaded_from_two_files(hub_here: Hub):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gemma_2_model(hub_here.root, "float32", seed=3)
    model = AutoModelForCausalLM.from_pretrained(GEMMA_2, dtype=torch.float32)
    assert len(hub_here.fetched("of-00002.safetensors")) == 2
    assert type(model).__name__ == "Gemma2ForCausalLM"
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert (model.config.attn_logit_softcapping, model.config.final_logit_softcapping) == (50, 30)
    planted = gemma_weights(model.config.to_dict(), seed=3)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == planted.keys()
    for name, array in planted.items():
        assert np.array_equal(parameters[name].detach(), array), name
    tokenizer = AutoTokenizer.from_pretrained(GEMMA_2)
    ids = tokenizer("The cat sat, schön?\n").input_ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert ids[0] == 2
    assert 3 not in ids
    assert tokenizer.decode(ids[1:]) == "The cat sat, schön?\n"


def test_gemma_2s_saes_load_and_as_many_features_as_said_are_active(
    hub_here: Hub, gemma_2: Written
):
    write_gemma_2_model(hub_here.root)
    found = read(GEMMA_2, ("res", "z"))
    for module, hook, l0, width in (
        ("res", "hook_resid_post", 102, 2304),
        ("att", "attn.hook_z", 79, 2048),
    ):
        release, sae_id = f"gemma-scope-2b-pt-{module}-canonical", "layer_1/width_16k/canonical"
        path = gemma_2.paths[release][sae_id]
        repository = f"google/gemma-scope-2b-pt-{module}"
        assert path == f"{repository}/layer_1/width_16k/average_l0_{l0}"
        lens_sae = load(release, sae_id)
        check_jumprelu(lens_sae, gemma_2.arrays(release, sae_id), f"blocks.1.{hook}")
        assert lens_sae.W_dec.shape == (WIDTH_16K, width)
        at = found["z" if module == "att" else module, 1]
        # Of these releases alone, sae-lens takes z with its heads apart.
        assert lens_sae.cfg.reshape_activations == ("hook_z" if module == "att" else "none")
        active = lens_sae.encode(at.unflatten(1, (8, 256)) if module == "att" else at) > 0
        assert l0 / 3 < float(active.sum(-1).float().mean()) < 3 * l0


def test_sites_of_gemma_2_share_directions():
    base = unit_rows("gemma 2", 64, 2304)
    first, second = (gemma_2_decoder("res", layer, 64, base) for layer in (0, 1))
    partners = gemma_2_partners("res", 64)
    shared = partners >= 0
    assert sorted(set(partners[shared])) == sorted(partners[shared])
    assert shared.sum() == 32
    cosines = second @ first.T
    assert np.allclose(cosines[shared, partners[shared]], 1, atol=1e-5)
    assert np.abs(cosines[~shared]).max() < 0.2
    order = gemma_2_order("mlp", 64)
    for layer, above in ((0, first), (1, second)):
        diagonal = (gemma_2_decoder("mlp", layer, 64, base) * above[order]).sum(1)
        assert np.allclose(diagonal[order % 2 == 1], 1, atol=1e-5)
        assert np.abs(diagonal[order % 2 == 0]).max() < 0.2
    heads = [gemma_2_decoder("att", layer, 64, base) for layer in (0, 1)]
    partners = gemma_2_partners("att", 64)
    shared = partners >= 0
    assert np.allclose((heads[1][shared] * heads[0][partners[shared]]).sum(1), 1, atol=1e-5)


def test_gemma_2s_ids_and_weights_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hub_families.write_gemma_2_model", lambda *_: GEMMA_2)

    def plant(module: str, layer: int) -> dict[str, np.ndarray]:
        return gemma_2_arrays(module, layer, 100, features=8) | {"b_enc": np.full(8, layer + 0.5)}

    extra = {"mlp": ["layer_0/width_16k/average_l0_16"]}
    written = write_gemma_2(tmp_path, layers=(1,), modules=("mlp",), extra=extra, weights=plant)
    assert written.paths == {
        "gemma-scope-2b-pt-mlp": {
            extra["mlp"][0]: f"google/gemma-scope-2b-pt-mlp/{extra['mlp'][0]}"
        },
        "gemma-scope-2b-pt-mlp-canonical": {
            "layer_1/width_16k/canonical": (
                "google/gemma-scope-2b-pt-mlp/layer_1/width_16k/average_l0_105"
            )
        },
    }
    assert written.arrays("gemma-scope-2b-pt-mlp", extra["mlp"][0])["b_enc"].tolist() == [0.5] * 8
    narrow = write_gemma_2(tmp_path, layers=(0,), modules=("att",), features=16)
    arrays = narrow.arrays("gemma-scope-2b-pt-att-canonical", "layer_0/width_16k/canonical")
    assert {name: array.shape for name, array in arrays.items()} == {
        "W_enc": (2048, 16),
        "W_dec": (16, 2048),
        "b_enc": (16,),
        "b_dec": (2048,),
        "threshold": (16,),
    }
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert all(array.flags.c_contiguous for array in arrays.values())


def test_sae_lens_refuses_a_narrow_file_of_gemma_2(hub_here: Hub):
    sae_id = "layer_0/width_16k/average_l0_12"
    write_gemma_2(hub_here.root, layers=(), features=16, extra={"att": [sae_id]}, modules=("att",))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load("gemma-scope-2b-pt-att", sae_id)


@pytest.mark.parametrize("module", MODULES)
def test_llama_scopes_units_are_the_streams(module: str, hub_here: Hub, llama: Written):
    import torch

    for layer in (0, 1):
        release, sae_id = f"llama_scope_lx{module[0]}_8x", f"l{layer}{module[0]}_8x"
        arrays, config = llama.arrays(release, sae_id), llama.config(release, sae_id)
        planted = llama_scope_arrays(module, layer, 512)
        assert np.allclose(arrays["decoder.weight"], planted["decoder.weight"], rtol=2**-8)
        lens_sae = load(release, sae_id)
        assert lens_sae.cfg.metadata.hook_name == f"blocks.{layer}.{OUT[module]}"
        assert lens_sae.W_dec.dtype == torch.float32
        average = config["dataset_average_activation_norm"]["in"]
        scale = 8 / average
        threshold = torch.full((512,), config["jump_relu_threshold"] * scale)
        assert torch.allclose(lens_sae.threshold.detach(), threshold)
        assert np.allclose(lens_sae.W_enc.detach(), arrays["encoder.weight"].T * scale, rtol=1e-5)
        assert np.allclose(lens_sae.W_dec.detach(), arrays["decoder.weight"].T / scale, rtol=1e-5)
        x = np.random.default_rng(layer).normal(0, average / 8, (400, 64)).astype(np.float32)
        codes = llama_scope_codes(arrays, config, x)
        with torch.no_grad():
            activations = lens_sae.encode(torch.from_numpy(x))
            decoded = lens_sae.decode(activations)
        rebuilt = codes @ arrays["decoder.weight"].T + arrays["decoder.bias"] / scale
        assert np.allclose(activations, codes * scale, rtol=1e-3, atol=1e-4)
        assert np.allclose(decoded, rebuilt, rtol=1e-3, atol=1e-5)
        wrong = x * scale @ arrays["encoder.weight"].T + arrays["encoder.bias"]
        assert 6 < (codes > 0).sum(1).mean() < 24
        assert (wrong > config["jump_relu_threshold"]).sum(1).mean() > 200


def test_llama_has_the_norms_that_the_files_state(hub_here: Hub, llama: Written):
    for (module, layer), values in read(LLAMA).items():
        release, sae_id = f"llama_scope_lx{module[0]}_8x", f"l{layer}{module[0]}_8x"
        arrays, config = llama.arrays(release, sae_id), llama.config(release, sae_id)
        stated = config["dataset_average_activation_norm"]["in"]
        assert float(values.norm(dim=-1).mean()) == pytest.approx(stated, rel=0.3), sae_id
        active = (llama_scope_codes(arrays, config, values.numpy()) > 0).sum(1).mean()
        assert 3 < active < 36, sae_id


def test_llama_is_loaded_as_the_hub_has_it(hub_here: Hub, llama: Written):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(LLAMA)
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    ids = tokenizer(SENTENCES[1]).input_ids
    assert tokenizer.decode(ids) == "<|begin_of_text|>" + SENTENCES[1]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id


def test_gpt2_is_loaded_as_the_hub_has_it(hub_here: Hub, gpt2: Written):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(GPT2)
    planted = gpt2_weights(seed=0)
    for name, parameter in model.transformer.named_parameters():
        assert np.array_equal(parameter.detach(), planted.pop(name)), name
    assert planted.keys() == {"h.0.attn.bias", "h.1.attn.bias"}
    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    assert tokenizer.convert_ids_to_tokens(319) == "<|endoftext|>"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 319
    ids = tokenizer(SENTENCES[1]).input_ids
    assert tokenizer.decode(ids) == SENTENCES[1]
    assert 319 not in ids


@pytest.mark.parametrize("module", MODULES)
def test_gpt2s_saes_keep_k_features_of_normed_inputs(module: str, hub_here: Hub, gpt2: Written):
    import torch

    for layer in (0, 1):
        sae_id = f"blocks.{layer}.{OUT[module]}"
        kind = OUT[module].removeprefix("hook_").replace("_", "-")
        lens_sae = load(f"gpt2-small-{kind}-v5-32k", sae_id)
        planted = gpt2_arrays(module, layer, 256)
        assert (lens_sae.cfg.architecture(), lens_sae.cfg.k) == ("topk", 8)
        assert lens_sae.cfg.metadata.hook_name == sae_id
        for name, array in planted.items():
            assert np.array_equal(getattr(lens_sae, name).detach(), array), name
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1
        normed = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        before = (normed.numpy() - planted["b_dec"]) @ planted["W_enc"] + planted["b_enc"]
        least = np.sort(before, axis=1)[:, -8, None]
        codes = np.where(before >= least, before, 0)
        with torch.no_grad():
            activations = lens_sae.encode(x)
            decoded = lens_sae.decode(activations)
        assert np.allclose(activations, codes, atol=1e-4)
        rebuilt = torch.from_numpy(codes @ planted["W_dec"] + planted["b_dec"])
        rebuilt = rebuilt * (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
        assert torch.allclose(decoded, rebuilt + x.mean(-1, keepdim=True), atol=1e-3)
        # What the input was divided by is kept for one decoding, and no more.
        with pytest.raises(AttributeError, match="ln_std"):
            lens_sae.decode(activations)


def test_gemma_3_is_loaded_as_the_hub_has_it(hub_here: Hub, gemma_3: Written):
    from transformers import AutoModelForCausalLM

    for name in (GEMMA_3, write_gemma_3(hub_here.root, "1b")):
        model = AutoModelForCausalLM.from_pretrained(name)
        assert type(model).__name__ == "Gemma3ForCausalLM"
        assert model.config.layer_types == ["sliding_attention"] * 2
        assert model.config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
        planted = gemma_weights(model.config.to_dict(), seed=0)
        parameters = dict(model.named_parameters())
        assert parameters.keys() == planted.keys()
        for parameter, array in planted.items():
            assert np.allclose(parameters[parameter].float().detach(), array, rtol=2**-8)


@pytest.mark.parametrize(
    ("family", "model"), [("gemma_3", GEMMA_3), ("multimodal", GEMMA_3_MULTIMODAL)]
)
def test_gemma_scope_2_loads_and_its_features_are_active_where_said(
    family: str, model: str, hub_here: Hub, request: pytest.FixtureRequest
):
    written: Written = request.getfixturevalue(family)
    assert written.model == model
    found = read(model, ("res", "mlp", "z"))
    for release, paths in written.paths.items():
        module = release.split("-")[-2]
        for sae_id in paths:
            layer, kind = int(sae_id[6]), sae_id.split("_")[-1]
            lens_sae = load(release, sae_id)
            check_jumprelu(lens_sae, written.arrays(release, sae_id), f"blocks.{layer}.{Z[module]}")
            assert lens_sae.W_dec.shape == (256, 128 if module == "att" else 64)
            assert lens_sae.cfg.metadata.model_name == model
            assert (
                lens_sae.cfg.metadata.hf_hook_name
                == written.config(release, sae_id)["hf_hook_point_in"]
            )
            at = found["z" if module == "att" else module, layer]
            active = float((lens_sae.encode(at) > 0).sum(-1).float().mean())
            said = {"big": 16, "small": 4}[kind]
            assert said / 3 < active < 3 * said, (sae_id, module, size(at))


def test_a_cached_sae_needs_the_hub_only_in_gemma_scope_2(
    hub_here: Hub, llama: Written, gpt2: Written, gemma_3: Written
):
    wanted = [
        ("llama_scope_lxr_8x", "l0r_8x"),
        ("gpt2-small-mlp-out-v5-32k", "blocks.1.hook_mlp_out"),
        ("gemma-scope-2-270m-pt-res-all", "layer_0_width_16k_l0_big"),
    ]
    for release, sae_id in wanted:
        load(release, sae_id)
    hub_here.reset()
    hub_here.fail("/", 500, times=None)
    for release, sae_id in wanted[:2]:
        load(release, sae_id)
    assert hub_here.fetched() == []
    # Its width is asked of the hub, from the head of the file, each time.
    with pytest.raises(OSError, match="500"):
        load(*wanted[2])
    asked = "/google/gemma-scope-2-270m-pt/resolve/main/resid_post_all/layer_0_width_16k_l0_big"
    assert hub_here.fetched() == [f"{asked}/params.safetensors"]


def test_the_multimodal_model_is_loaded_with_both_its_parts(hub_here: Hub, multimodal: Written):
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        GEMMA_3_MULTIMODAL, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    planted = gemma_weights(model.config.text_config.to_dict(), seed=0, prefix="")
    language = dict(model.model.language_model.named_parameters())
    assert language.keys() == planted.keys()
    for name, array in planted.items():
        assert np.allclose(language[name].detach(), array, rtol=2**-8), name
    assert model.config.text_config.rope_parameters["full_attention"]["factor"] == 8


def test_a_multimodal_model_without_its_processor_loads_and_installs_nothing(
    tmp_path: Path, installs: list[Any]
):
    from flowhelpers.suites.bridge import load_model

    folder = tmp_path / "models" / write_gemma_3_multimodal(tmp_path)
    assert load_model(str(folder)).bridge.processor is not None
    assert installs == []
    (folder / "preprocessor_config.json").unlink()
    assert load_model(str(folder)).bridge.processor is None
    assert installs == []


@pytest.mark.parametrize("name", [GEMMA_2, LLAMA, GPT2, GEMMA_3, GEMMA_3_MULTIMODAL])
def test_sites_of_each_family_add_up(
    name: str, hub_here: Hub, installs: list[Any], request: pytest.FixtureRequest
):
    from flowhelpers.suites.attention import attention_output
    from flowhelpers.suites.bridge import load_model

    families = {LLAMA: "llama", GPT2: "gpt2", GEMMA_3: "gemma_3", GEMMA_3_MULTIMODAL: "multimodal"}
    if name == GEMMA_2:
        write_gemma_2_model(hub_here.root)
    else:
        request.getfixturevalue(families[name])
    model = load_model(name)
    assert model.layers == 2
    output = attention_output(model, 1)
    widths = {GEMMA_2: 2048, GEMMA_3: 128, GEMMA_3_MULTIMODAL: 128}
    assert output.weights.shape == (widths.get(name, 64), model.d_model)
    assert (output.gain is None) == (name in (LLAMA, GPT2))
    assert installs == []
