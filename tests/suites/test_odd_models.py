"""Odd tokenizers, short contexts, texts without BOS, mended folders: right, or a clear word."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import toys
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Phi3Config

import flowhelpers.suites.model as models
from flowhelpers.activations.sampling import draw_sample
from flowhelpers.activations.sparse import collect
from flowhelpers.core.features import Site
from flowhelpers.deactivation.ablation import deactivate
from flowhelpers.suites.attention import attention_output, stored_attention_output
from flowhelpers.suites.bridge import load_model
from flowhelpers.suites.load import load_suite
from flowhelpers.suites.model import Edit, Model, run_model, tokenize

Tokenizer = Callable[[Any], None]
AT = Site(1, "res")
CHAT = "<|header|>user<|/header|> the cat<|eot|> the mat"


@pytest.fixture
def copy(toy_folder: Path, tmp_path: Path) -> Path:
    """The toy model's folder, to be changed."""
    return Path(shutil.copytree(toy_folder, tmp_path / "model"))


def with_tokenizer(folder: Path, change: Callable[[Any], None]) -> Model:
    """The model of a folder after its tokenizer is changed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return load_model(str(folder))


def write_suite(folder: Path, prepend_bos: dict[int, bool], d: int = toys.D_MODEL) -> Path:
    """A suite around the model in `folder/model`, with a random SAE after some layers."""
    for layer, begins in prepend_bos.items():
        torch.manual_seed(layer)
        about = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post", prepend_bos=begins)
        StandardSAE(StandardSAEConfig(d_in=d, d_sae=24, metadata=about)).save_model(
            folder / f"{layer}-res"
        )
    saes = "".join(f"  {layer}/res: {layer}-res\n" for layer in prepend_bos)
    (folder / "suite.yaml").write_text(f"name: odd\nmodel: model\nsaes:\n{saes}")
    return folder


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_special_tokens_without_a_name_are_special(copy: Path):
    def add(tokenizer: Any) -> None:
        added = [AddedToken(x, special=True) for x in ("<|header|>", "<|/header|>", "<|eot|>")]
        tokenizer.add_tokens(added, special_tokens=True)

    tokenizer = AutoTokenizer.from_pretrained(copy)
    add(tokenizer)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(copy)
        plain.resize_token_embeddings(len(tokenizer))
    plain.save_pretrained(copy)
    model = with_tokenizer(copy, add)
    tokens = tokenize(model, CHAT)
    read = tokens.ids[tokens.is_text].tolist()
    names = model.tokenizer.added_tokens_decoder
    assert not [names[i] for i in read if i in names and names[i].special]
    kept = model.tokenizer.decode(tokens.ids[0], skip_special_tokens=True)
    assert model.tokenizer.decode(read) == kept
    drawn = draw_sample(model, {"chat": [CHAT] * 5}, 100).tokens["token"]
    assert set(drawn) == set(read)


def test_a_tokenizer_of_another_model_is_refused(copy: Path):
    model = with_tokenizer(copy, lambda tokenizer: tokenizer.add_tokens(["hills"]))
    assert tokenize(model, "the").ids.max() < toys.VOCABULARY
    with pytest.raises(ValueError, match=r"token 320 \('hills'\), and 320 embeddings"):
        tokenize(model, "seven hills")


def nameless(tokenizer: Any) -> None:
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None


def test_a_tokenizer_without_bos_and_eos_needs_saes_trained_without(copy: Path):
    model = with_tokenizer(copy, nameless)
    with pytest.raises(ValueError, match=r"neither BOS nor EOS .* `prepend_bos: false`"):
        tokenize(model, "the cat")
    suite = load_suite(write_suite(copy.parent, {1: False}))
    assert len(collect(suite, ["the cat", "a"]).tokens)
    with pytest.raises(ValueError, match="no token in ''"):
        tokenize(suite.model, "")


@pytest.mark.parametrize("change", [lambda tokenizer: None, nameless], ids=["bos", "no bos"])
def test_saes_trained_without_bos_read_texts_without(copy: Path, change: Tokenizer):
    with_tokenizer(copy, change)
    suite = load_suite(write_suite(copy.parent, {1: False}))
    found = collect(suite, toys.TEXTS[:2])
    plain = AutoModelForCausalLM.from_pretrained(copy, attn_implementation="eager").eval()
    encode, sae = suite.model.tokenizer, SAE.load_from_disk(copy.parent / "1-res")
    for text in (0, 1):
        ids = torch.tensor([encode(toys.TEXTS[text], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            stream = plain(ids, output_hidden_states=True).hidden_states[2][0]
        own = found.tokens["text"] == text
        assert found.tokens.loc[own, "position"].tolist() == list(range(ids.shape[1]))
        assert found.tokens.loc[own, "token"].tolist() == ids[0].tolist()
        codes = torch.from_numpy(found.by_site[AT][own.to_numpy()].toarray())
        assert torch.allclose(codes, sae.encode(stream), atol=1e-5)


def test_the_first_token_of_a_text_without_bos_can_be_changed(copy: Path):
    suite = load_suite(write_suite(copy.parent, {0: False, 1: False}))
    tokens = tokenize(suite.model, toys.TEXTS[:2])
    where = pd.DataFrame({"text": [0, 1, 1], "position": [0, 0, 3], "layer": 1, "feature": 2})
    where["dataset"] = "own"
    cases = pd.DataFrame({"target": where.index})
    row, amount = suite.sae("0/res").decoder_rows(torch.tensor([5]))[0], -1.5
    edits = pd.DataFrame({"case": where.index, "module": "res", "feature": 5, "amount": amount})
    found = deactivate(suite, tokens, where, cases, edits)
    for n, place in where.iterrows():
        text, at = int(place["text"]), int(place["position"])

        def push(stream: torch.Tensor, at: int = at) -> torch.Tensor:
            moved = stream.clone()
            moved[:, at] += amount * row
            return moved

        ids = tokens.ids[text : text + 1]
        _, read = run_model(suite.model, ids, [AT], [Edit(Site(0, "res"), push)])
        new = suite.sae(AT).encode(read[AT][0, at])[2]
        assert float(found["new"].iloc[int(str(n))]) == pytest.approx(float(new), abs=1e-5)


def test_a_suite_whose_saes_saw_unlike_texts_is_refused(copy: Path):
    suite = load_suite(write_suite(copy.parent, {0: True, 1: False}))
    with pytest.raises(ValueError, match=r"suite odd: the SAE for 1/res .* `prepend_bos: false`"):
        suite.sae(AT)


@pytest.mark.parametrize("kind", ["rotary", "learned", "longrope"])
def test_a_text_longer_than_the_context_is_refused(copy: Path, kind: str):
    if kind == "learned":
        config = GPT2Config(
            vocab_size=toys.VOCABULARY,
            n_positions=toys.CONTEXT,
            n_embd=toys.D_MODEL,
            n_layer=3,
            n_head=4,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(copy)
    if kind == "longrope":  # a text beyond this changes the angles of all that share its batch
        config = Phi3Config(
            vocab_size=toys.VOCABULARY,
            hidden_size=toys.D_MODEL,
            num_hidden_layers=3,
            num_attention_heads=4,
            pad_token_id=0,
            original_max_position_embeddings=toys.CONTEXT,
            rope_parameters={
                "rope_type": kind,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
            },
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(copy)
    model = load_model(str(copy))
    text = "the cat sat on the seven hills. " * 60
    assert tokenize(model, text, toys.CONTEXT).ids.shape == (1, toys.CONTEXT)
    for cut in (None, toys.CONTEXT + 1):
        with pytest.raises(ValueError, match="has a context of 64; give max_tokens=64 or fewer"):
            tokenize(model, ["a", text], cut)


def test_padding_of_any_token_and_side_changes_nothing(copy: Path, toy: Model):
    def pad(tokenizer: Any) -> None:
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.bos_token

    model, texts = with_tokenizer(copy, pad), [*toys.TEXTS[:3], "<eos> mat"]
    tokens = tokenize(model, texts)
    _, read = run_model(model, tokens.ids, [AT])
    for i, text in enumerate(texts):
        alone = tokenize(toy, text)
        _, expected = run_model(toy, alone.ids, [AT])
        length = alone.ids.shape[1]
        assert tokens.is_text[i, :length].equal(alone.is_text[0])
        assert not tokens.is_text[i, length:].any()
        assert torch.allclose(read[AT][i, :length], expected[AT][0], atol=1e-5)


def test_what_is_kept_goes_by_all_that_activations_depend_on(copy: Path, toy: Model):
    def own() -> str:
        return load_model(str(copy)).fingerprint

    assert own() == toy.fingerprint  # wherever the folder lies
    seen = {toy.fingerprint}
    change_json(copy / "config.json", sliding_window=7)
    seen.add(own())
    change_json(copy / "config.json", rms_norm_eps=0.5)
    seen.add(own())
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "embed" in name)
    weights[name][300, 7] += 1.0  # of some 10,000 numbers one
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    seen.add(own())
    with_tokenizer(copy, lambda tokenizer: tokenizer.add_tokens(["hills"]))
    seen.add(own())
    with_tokenizer(copy, lambda tokenizer: setattr(tokenizer, "bos_token", "<eos>"))
    seen.add(own())
    (copy / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')  # where texts end
    seen.add((model := load_model(str(copy))).fingerprint)
    model.bridge.original_model.config.sliding_window = 5
    seen.add(model.fingerprint)
    assert len(seen) == 8


def test_other_versions_of_what_computes_make_another_digest(
    copy: Path, toy: Model, monkeypatch: pytest.MonkeyPatch
):
    for changed in ("torch", "transformers", "transformer-lens", "sae-lens"):
        monkeypatch.setattr(models, "version", lambda name, c=changed: "0" if name == c else "1")
        other = load_model(str(copy)).fingerprint
        monkeypatch.setattr(models, "version", lambda name: "1")
        assert other != load_model(str(copy)).fingerprint


def test_weights_that_are_pickled_bring_z_to_the_stream_too(copy: Path, toy: Model):
    expected = attention_output(toy, 1)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert stored_attention_output(str(copy), 1) is None  # so that the model is asked
    assert torch.equal(attention_output(load_model(str(copy)), 1).weights, expected.weights)


def test_what_z_becomes_has_to_fit_a_norm_of_the_block(toy: Model, monkeypatch: pytest.MonkeyPatch):
    block = toy.bridge.blocks[1]
    assert attention_output(toy, 1).gain is not None
    monkeypatch.setattr(type(block), "named_children", lambda self: iter(()))
    with pytest.raises(ValueError, match=re.escape(f"{toy.name}: at layer 1 what is put at z")):
        attention_output(toy, 1)


def test_a_gain_that_is_nearly_constant_is_not_left_out(copy: Path):
    weights = load_file(copy / "model.safetensors")
    for name in weights:
        if "post_attention_layernorm" in name:
            noise = torch.randn(toys.D_MODEL, generator=torch.Generator().manual_seed(1))
            weights[name] = 0.03 * noise  # Gemma's file holds the gain less 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    gain = attention_output(load_model(str(copy)), 1).gain
    assert gain is not None
    assert 0.01 < (gain - 1).abs().mean() < 0.1


@pytest.mark.parametrize("change", ["lack", "other names", "left over"])
def test_weights_that_are_not_in_the_files_are_no_random_numbers(copy: Path, change: str):
    weights = load_file(copy / "model.safetensors")
    if change == "lack":
        del weights["model.layers.2.mlp.down_proj.weight"]
    if change == "other names":
        weights = {f"module.{name}": each for name, each in weights.items()}
    if change == "left over":
        weights["model.layers.3.mlp.down_proj.weight"] = torch.ones(2, 2)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    if change == "left over":
        with pytest.warns(
            UserWarning, match=r"model: 1 weights are not used, such as model\.layers"
        ):
            load_model(str(copy))
        return
    with pytest.raises(ValueError, match=r"model: its files lack \d+ weights, such as"):
        load_model(str(copy))


def test_an_adapter_beside_the_weights_is_not_left_out_in_silence(copy: Path):
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, which is not applied: merge it"):
        load_model(str(copy))


@pytest.mark.parametrize("values", [{"hidden_activation": "foo"}, {"intermediate_size": 7}])
def test_what_transformers_refuses_is_said_of_the_model(copy: Path, values: dict[str, Any]):
    change_json(copy / "config.json", **values)
    with pytest.raises(ValueError, match=re.escape(f"{copy} cannot be used here: ")):
        load_model(str(copy))


def test_buffers_are_part_of_the_digest(copy: Path):
    model = load_model(str(copy))
    other = load_model(str(copy))
    next(other.bridge.original_model.buffers()).add_(0.5)
    assert model.fingerprint != other.fingerprint


@pytest.mark.parametrize("line", ["neuronpedia: [a]", "transcoders: [a]", "variants: ab"])
def test_a_suite_file_of_other_shapes_is_named(copy: Path, line: str):
    path = write_suite(copy.parent, {1: True}) / "suite.yaml"
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"({path})")):
        load_suite(copy.parent)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"normalize_activations": "expected_average_only_in"},
            r"the SAE for 1/res \(.*1-res, suite odd\) was .* \(normalize_activations: .*: fold it",
        ),
        (
            {"architecture": "batchtopk"},
            "suite odd: the SAE for 1/res .*save_inference_model saves",
        ),
    ],
)
def test_what_cannot_encode_is_told_with_suite_site_and_field(
    copy: Path, changed: dict[str, str], words: str
):
    folder = write_suite(copy.parent, {0: True, 1: True})
    change_json(folder / "1-res" / "cfg.json", **changed)
    sae = load_suite(folder).sae(AT)  # it can be matched
    assert sae.directions.isfinite().all()
    with pytest.raises(ValueError, match=words):
        sae.encode(torch.ones(toys.D_MODEL))


def test_the_number_of_layers_is_the_model_s(copy: Path):
    path = write_suite(copy.parent, {0: True, 1: True}) / "suite.yaml"
    path.write_text(f"{path.read_text()}layers: 2\nd_model: {toys.D_MODEL}\n")
    whole = (copy / "config.json").read_text()
    change_json(copy / "config.json", num_hidden_layers=None, n_layer=3)  # as GPT-2 has it
    assert load_suite(copy.parent).layers == 3
    change_json(copy / "config.json", n_layer=None)
    suite = load_suite(copy.parent)
    (copy / "config.json").write_text(whole)
    with pytest.raises(ValueError, match="suite odd: its model has 3 layers, not 2"):
        _ = suite.model


def test_a_model_whose_folder_is_not_there_is_named(copy: Path):
    path = write_suite(copy.parent, {1: True}) / "suite.yaml"
    path.write_text(path.read_text().replace("model: model", "model: ./modle"))
    with pytest.raises(FileNotFoundError, match=r"modle/config\.json"):
        load_suite(copy.parent)
