"""Rows, order and schedule are exact, and a run that was killed ends as one that was not."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flowhelpers.activations.corpora import is_held_out, passages
from flowhelpers.suites.model import load_model, tokenize
from flowhelpers.training import language_model as pretraining
from flowhelpers.training.language_model import (
    BOS,
    EOS,
    ModelRecipe,
    TokenData,
    bytes_of,
    compiled,
    held_out_loss,
    learning_rate_scale,
    new_model,
    next_token_loss,
    prepare,
    reading_order,
    token_rows,
    train_model,
    train_tokenizer,
)

RECIPE = ModelRecipe(
    sources={"letters.txt": 3.0, "numbers.txt": 1.0},
    vocab_size=300,
    d_model=16,
    layers=2,
    heads=2,
    kv_heads=1,
    d_mlp=16,
    context=16,
    tokens=400,
    rows=4,
    warmup=2,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(toys.TEXTS * 20), 310)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources whose documents each name themselves: `a17z` and `<17>`."""
    folder = tmp_path_factory.mktemp("texts")
    letters = [f"a{i}z is the letter of document a{i}z." for i in range(400)]
    numbers = [f"<{i}> and <{i}> are {2 * i}." for i in range(400)]
    assert any(map(is_held_out, letters))
    assert any(map(is_held_out, numbers))
    (folder / "letters.txt").write_text("<|endoftext|>".join(letters))
    (folder / "numbers.txt").write_text("<|endoftext|>".join(numbers))
    return folder


def test_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer: PreTrainedTokenizerFast):
    for text in (*toys.TEXTS, "naïve café\t— 数学 🙂\r\n  x\x00y", " leading and trailing "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(bytes_of(tokenizer, token) for token in ids) == text.encode()
        assert sum(len(bytes_of(tokenizer, token)) for token in ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_every_byte_is_a_token_and_digits_stand_alone(tokenizer: PreTrainedTokenizerFast):
    single = {bytes_of(tokenizer, token) for token in range(4, len(tokenizer))}
    assert {bytes([byte]) for byte in range(256)} <= single
    assert [len(bytes_of(tokenizer, i)) for i in tokenizer("4096")["input_ids"][1:]] == [1] * 4
    assert tokenizer("a")["input_ids"][0] == BOS == tokenizer.bos_token_id
    assert tokenizer.eos_token_id == EOS


def test_rows_are_the_documents_end_to_end(tokenizer: PreTrainedTokenizerFast):
    documents = toys.TEXTS * 300
    rows = token_rows(documents, tokenizer, 8)
    stream: list[int] = []
    for text in documents:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
    assert (rows[:, 0] == BOS).all()
    assert rows[:, 1:].flatten().tolist() == stream[: len(stream) // 7 * 7]
    assert token_rows([], tokenizer, 8).shape == (0, 8)
    assert token_rows(["a"], tokenizer, 8).shape == (0, 8)


def test_rows_have_the_special_tokens_of_their_tokenizer():
    other = train_tokenizer(iter(toys.TEXTS * 20), 310)
    other.eos_token, other.bos_token = "<unk>", None
    rows = token_rows(toys.TEXTS * 9, other, 8)
    assert (rows[:, 0] == other.eos_token_id).all()
    assert other.eos_token_id in rows[:, 1:]
    assert not np.isin(rows, [BOS, EOS]).any()


def test_each_source_has_its_share_and_every_row_comes_once_before_any_twice():
    rows, shares = {"a": 10, "b": 100, "c": 7}, {"a": 2.0, "b": 1.0, "c": 1.0}
    order = reading_order(rows, shares, total=120, seed=0)
    assert order.shape == (120, 2)
    for index, (name, wanted) in enumerate((("a", 60), ("b", 30), ("c", 30))):
        drawn = order[order[:, 0] == index, 1]
        counts = np.bincount(drawn, minlength=rows[name])
        assert len(drawn) == counts.sum() == wanted
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(order, reading_order(rows, shares, 120, 0))
    assert not np.array_equal(order, reading_order(rows, shares, 120, 1))
    assert len(reading_order(rows, {"a": 1.0, "b": 1.0, "c": 1.0}, 100, 0)) == 100


def test_a_batch_is_the_same_whenever_it_is_asked_for():
    rng = np.random.default_rng(0)
    train = {name: rng.integers(0, 99, (9, 5)) for name in ("a", "b")}
    order = reading_order({"a": 9, "b": 9}, {"a": 1.0, "b": 2.0}, 12, 0)
    data = TokenData(train, {}, order)
    second = data.batch(1, 4)
    data.batch(0, 4)
    assert torch.equal(data.batch(1, 4), second)
    expected = [train["ab"[source]][row].tolist() for source, row in order[4:8]]
    assert second.tolist() == expected


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    recipe = replace(RECIPE, tokens=64 * 100, warmup=10, decay=0.4)
    assert recipe.steps == 100
    scale = [learning_rate_scale(step, recipe) for step in range(100)]
    assert scale[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert scale[10:61] == [1.0] * 51
    assert scale[61:] == pytest.approx([(100 - i) / 40 for i in range(61, 100)])
    assert learning_rate_scale(0, replace(recipe, warmup=0)) == 1.0
    assert min(scale) > 0


def test_a_new_model_is_seeded_and_its_post_norms_are_turned_down():
    one, two = new_model(RECIPE), new_model(RECIPE)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    other = new_model(replace(RECIPE, seed=1))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    x = torch.randn(3, 16)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    layer: Any = one.model.layers[1]
    for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
        assert torch.allclose(norm(x), RECIPE.gain * unit, atol=1e-4)
    assert torch.allclose(layer.input_layernorm(x), unit, atol=1e-4)


def test_held_out_documents_are_in_no_row_of_training(texts: Path, tmp_path: Path):
    tokenizer, data = prepare(RECIPE, tmp_path, texts)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]

    def documents(rows: np.ndarray) -> set[str]:
        text = str(tokenizer.decode(rows[:, 1:].flatten().tolist()))
        return {document for document in text.split("<eos>") if document}

    for name in RECIPE.sources:
        everything = set((texts / name).read_text().split("<|endoftext|>"))
        train, held = documents(data.train[name]), documents(data.held_out[name])
        whole = {text for text in everything if is_held_out(text)}
        assert len(held & whole) >= len(whole) - 1  # the last may be cut at a row's end
        assert train & everything
        assert not train & whole
        assert not any(text.startswith(part[:-1]) for text in whole for part in train)


def test_rows_are_cut_once_and_then_read(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer, first = prepare(RECIPE, tmp_path, texts)
    monkeypatch.setattr(pretraining, "load_source", None)  # would fail if it were called
    again, second = prepare(RECIPE, tmp_path, texts)
    assert again.get_vocab() == tokenizer.get_vocab()
    for name in RECIPE.sources:
        assert np.array_equal(first.train[name], second.train[name])
    assert np.array_equal(first.order, second.order)


def test_rows_of_another_recipe_or_other_text_are_refused(texts: Path, tmp_path: Path):
    mine, work = tmp_path / "texts", tmp_path / "work"
    shutil.copytree(texts, mine)
    prepare(RECIPE, work, mine)
    prepare(replace(RECIPE, layers=9, d_model=32, rows=2), work, mine)  # rows do not hang on it
    prepare(RECIPE, work, tmp_path)  # nor is the text needed any more
    with pytest.raises(
        ValueError, match=r"tokens was begun with .*: context was 16, now 32\. Give an"
    ):
        prepare(replace(RECIPE, context=32), work, mine)
    shares = {name: RECIPE.sources[name] for name in reversed(RECIPE.sources)}
    with pytest.raises(ValueError, match="begun with another recipe: the order of its keys"):
        prepare(replace(RECIPE, sources=shares), work, mine)
    with (mine / "letters.txt").open("a") as file:
        file.write(" more")
    with pytest.raises(
        ValueError, match=r"recipe: text\.letters\.txt was \w{16}, now \w{16}\. Give"
    ):
        prepare(RECIPE, work, mine)


def test_passages_of_the_package_in_the_text_are_counted(tmp_path: Path):
    ours = passages()["text"]
    planted = [f"Before. {ours[7]} After.", ours[9], ours[9], ours[11][:-1]]
    others = [f"Document {i} follows document {i - 1}." for i in range(400)]
    (tmp_path / "letters.txt").write_text("<|endoftext|>".join(planted + others))
    (tmp_path / "numbers.txt").write_text("<|endoftext|>".join(others))
    assert not any(map(is_held_out, planted))
    prepare(replace(RECIPE, tokens=100_000), tmp_path, tmp_path)
    assert json.loads((tmp_path / "tokens" / "passages.json").read_text()) == 2


def test_sources_that_cannot_be_told_apart_or_are_too_small_are_named(tmp_path: Path):
    (tmp_path / "texts.txt").write_text("short")
    same = replace(RECIPE, sources={"a/texts.txt": 1.0, "b/texts.txt": 1.0})
    with pytest.raises(ValueError, match=r"a/texts\.txt, b/texts\.txt: expected names that"):
        prepare(same, tmp_path / "a", tmp_path)
    small = replace(RECIPE, sources={"texts.txt": 1.0})
    with pytest.raises(ValueError, match=r"source 'texts\.txt' gives no row of 16 tokens for"):
        prepare(small, tmp_path / "b", tmp_path)
    assert not any((tmp_path / "b").iterdir())


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "compiled", lambda function: function)


def test_a_killed_run_ends_as_one_that_was_not(
    texts: Path, tmp_path: Path, uncompiled: None, monkeypatch: pytest.MonkeyPatch
):
    whole = train_model(RECIPE, tmp_path / "whole", texts, checkpoint_every=1e9)
    assert not (tmp_path / "whole" / "checkpoint.pt").exists()
    true_batch = TokenData.batch
    asked: list[int] = []

    def batch(data: TokenData, step: int, rows: int) -> Tensor:
        asked.append(step)
        if asked == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return true_batch(data, step, rows)

    monkeypatch.setattr(TokenData, "batch", batch)
    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        train_model(RECIPE, killed, texts, checkpoint_every=0.0)
    assert not (killed / "model").exists()
    with pytest.raises(ValueError, match=r"begun with another recipe: tokens was 400, now 800\. G"):
        train_model(replace(RECIPE, tokens=800), killed, texts)
    resumed = train_model(RECIPE, killed, texts, checkpoint_every=0.0)
    assert asked == [0, 1, 2, 3, 3, 4, 5]
    weights = load_file(whole / "model.safetensors")
    for name, tensor in load_file(resumed / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    losses = [json.loads((path / "training.json").read_text()) for path in (whole, resumed)]
    assert losses[0] == losses[1]
    assert train_model(RECIPE, killed, texts) == resumed
    assert len(asked) == 7
    with pytest.raises(
        ValueError, match=r"recipe: d_model was 16, now 32; layers was 2, now 3\. Gi"
    ):
        train_model(replace(RECIPE, d_model=32, layers=3), killed, texts)

    trained = load_model(str(resumed))
    assert (trained.layers, trained.d_model) == (2, 16)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = weights[name].float() - new_model(RECIPE).get_parameter(name)
    assert moved.abs().max() > 1e-2
    assert tokenize(trained, "a1z").ids[0, 0] == BOS


def test_training_learns_what_is_planted(texts: Path, tmp_path: Path, uncompiled: None):
    recipe = replace(RECIPE, tokens=64 * 60, adam_lr=0.02)
    folder = train_model(recipe, tmp_path, texts)
    report = json.loads((folder / "training.json").read_text())["held_out"]
    assert report["mix"]["nats_per_token"] < 0.5 * math.log(recipe.vocab_size)


def test_the_held_out_loss_is_the_one_by_hand(tokenizer: PreTrainedTokenizerFast):
    recipe = replace(RECIPE, vocab_size=len(tokenizer), sources={"a": 3.0, "b": 1.0})
    held = {
        "a": token_rows(toys.TEXTS[:2] * 4, tokenizer, 16),
        "b": token_rows(toys.TEXTS[2:] * 9, tokenizer, 16),
    }
    data = TokenData({}, held, np.zeros((0, 2), int))
    model = new_model(recipe)
    report = held_out_loss(model, tokenizer, data, recipe)
    nats, size = {}, {}
    for name, rows in held.items():
        losses = []
        ids = torch.from_numpy(rows).long()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits.float()
        for row, scores in zip(ids, logits.log_softmax(-1), strict=True):
            losses += [-scores[i - 1, row[i]].item() for i in range(1, 16)]
        text = [int(token) for token in rows[:, 1:].flatten() if token >= 4]
        nats[name] = np.mean(losses)
        size[name] = sum(len(bytes_of(tokenizer, token)) for token in text) / len(losses)
        assert report[name]["nats_per_token"] == pytest.approx(nats[name], rel=2e-3)
        bits = nats[name] / size[name] / math.log(2)
        assert report[name]["bits_per_byte"] == pytest.approx(bits, rel=2e-3)
        assert report[name]["tokens"] == len(losses)
    mixed = {key: 0.75 * part["a"] + 0.25 * part["b"] for key, part in (("n", nats), ("s", size))}
    assert report["mix"]["nats_per_token"] == pytest.approx(mixed["n"], rel=2e-3)
    bits = mixed["n"] / mixed["s"] / math.log(2)
    assert report["mix"]["bits_per_byte"] == pytest.approx(bits, rel=2e-3)
    first = next_token_loss(model, torch.from_numpy(held["a"]).long())
    assert first.shape == (len(held["a"]), 15)


def test_without_a_compiler_functions_run_as_they_are(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert compiled(none) is none
