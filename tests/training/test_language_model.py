"""Rows, reading order and rates are exact, and a killed training ends as one that was not."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from safetensors.torch import load_file
from transformers import Trainer

from flowhelpers.suites.bridge import load_model
from flowhelpers.suites.model import logits_of, tokenize
from flowhelpers.training import language_model
from flowhelpers.training.language_model import (
    ModelRecipe,
    mixed_rows,
    new_model,
    read_rows,
    token_rows,
    train_model,
    train_tokenizer,
    write_rows,
)

EOS, BOS = 1, 2
SIZES = {"vocab_size": 300, "d_model": 16, "layers": 2, "heads": 2, "kv_heads": 1, "d_mlp": 16}
RECIPE = ModelRecipe(**SIZES, context=16, tokens=400, rows=4, warmup=2)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "can_compile", lambda: False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(iter(toys.TEXTS * 20), 300)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> np.ndarray:
    """Enough for 60 steps."""
    return np.tile(token_rows(toys.TEXTS * 40, tokenizer, 16), (20, 1))[: 4 * 60]


def test_the_tokenizer_keeps_every_byte_and_splits_digits(tokenizer: Any):
    for text in (*toys.TEXTS, "naïve café\t— 数学 🙂\r\n  x\x00y", " leading and trailing "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("4096")["input_ids"]) == 5
    assert tokenizer("a")["input_ids"][0] == BOS == tokenizer.bos_token_id
    assert tokenizer.eos_token_id == EOS


def test_rows_are_the_documents_end_to_end(tokenizer: Any):
    documents = toys.TEXTS * 300
    stream: list[int] = []
    for text in documents:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
    rows = token_rows(documents, tokenizer, 8)
    assert (rows[:, 0] == BOS).all()
    assert rows[:, 1:].flatten().tolist() == stream[: len(stream) // 7 * 7]
    assert token_rows([], tokenizer, 8).shape == token_rows(["a"], tokenizer, 8).shape == (0, 8)


def test_rows_on_the_disk_are_those_in_memory_and_stay_there(tokenizer: Any, tmp_path: Path):
    documents = toys.TEXTS * 600
    rows = token_rows(documents, tokenizer, 8)
    assert write_rows(tmp_path / "train-0.npy", iter(documents), tokenizer, 8) == len(rows)
    assert np.array_equal(np.load(tmp_path / "train-0.npy"), rows)
    assert write_rows(tmp_path / "none.npy", [], tokenizer, 8) == 0
    assert np.load(tmp_path / "none.npy").shape == (0, 8)
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": {"sources": {"a": 1}}}))
    mixed = mixed_rows(tmp_path, 100, 3)
    assert isinstance(mixed.sources[0], np.memmap)
    assert np.array_equal(mixed[np.array([5, 2])], read_rows(tmp_path, 100, 3)[[5, 2]])


def test_rows_have_the_special_tokens_of_their_tokenizer():
    other = train_tokenizer(iter(toys.TEXTS * 20), 310)
    other.eos_token, other.bos_token = "<unk>", None
    rows = token_rows(toys.TEXTS * 9, other, 8)
    assert (rows[:, 0] == other.eos_token_id).all()
    assert other.eos_token_id in rows[:, 1:]
    assert not np.isin(rows, [BOS, EOS]).any()
    other.eos_token, other.bos_token = None, "<unk>"
    assert np.array_equal(token_rows(toys.TEXTS * 9, other, 8), rows)
    other.bos_token = None
    with pytest.raises(ValueError, match="the tokenizer has neither BOS nor EOS"):
        token_rows(toys.TEXTS, other, 8)


def test_each_source_has_its_share_and_every_row_comes_once_before_any_twice(tmp_path: Path):
    counts, shares = {"a": 10, "b": 100, "c": 7, "d": 0}, {"c": 1.0, "a": 2.0, "b": 1.0, "d": 9.0}
    for i, n in enumerate(counts.values()):
        rows = np.array([[i, row] for row in range(n)], dtype=int).reshape(n, 2)
        np.save(tmp_path / f"train-{i}.npy", rows)
        np.save(tmp_path / f"held_out-{i}.npy", rows[:0])

    def read(shares: dict[str, float], *more: Any) -> np.ndarray:
        (tmp_path / "recipe.json").write_text(json.dumps({"recipe": {"sources": shares}}))
        return read_rows(tmp_path, *more)

    mixed = read(shares, 120, 0)
    for index, wanted in enumerate((60, 30, 30)):
        times = np.bincount(mixed[mixed[:, 0] == index, 1], minlength=counts["abc"[index]])
        assert times.sum() == wanted
        assert times.max() - times.min() <= 1
    assert len(np.unique(mixed[:10, 0])) > 1  # shuffled
    assert np.array_equal(mixed, read(dict(sorted(shares.items())), 120, 0))
    assert not np.array_equal(mixed, read(shares, 120, 1))
    assert len(read(dict.fromkeys("abcd", 1.0), 100, 0)) == 100
    assert read(shares, 9, 0, "held_out").shape == (0, 2)


def test_a_new_model_is_seeded_and_its_post_norms_are_turned_down():
    one, two = new_model(RECIPE), new_model(RECIPE)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    other = new_model(RECIPE.model_copy(update={"seed": 1}))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    x = torch.randn(3, 16)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    layer: Any = one.model.layers[1]
    for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
        assert torch.allclose(norm(x), RECIPE.gain * unit, atol=1e-4)
    assert torch.allclose(layer.input_layernorm(x), unit, atol=1e-4)


def test_a_killed_training_ends_as_one_that_was_not(
    rows: np.ndarray, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps: list[tuple[list[float], np.ndarray]] = []
    true_step = Trainer.training_step

    def step(trainer: Any, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        steps.append((rates, inputs["input_ids"].numpy()))
        if len(steps) == 10:  # the fourth step of the second training, after a checkpoint
            raise InterruptedError
        return true_step(trainer, model, inputs, *more)

    monkeypatch.setattr(Trainer, "training_step", step)
    whole, killed = tmp_path / "whole", tmp_path / "killed" / "model"
    train_model(RECIPE, tokenizer, rows, whole)
    assert len(steps) == RECIPE.steps == 6
    # Warm-up over two steps from zero, and a linear fall over the last three.
    scales = [0, 1 / 2, 1, 1, 2 / 3, 1 / 3]
    for (rates, ids), scale, expected in zip(steps, scales, rows.reshape(-1, 4, 16), strict=False):
        assert rates == pytest.approx([0.02 * scale, 0.003 * scale])
        assert np.array_equal(ids, expected)
    with pytest.raises(InterruptedError):
        train_model(RECIPE, tokenizer, rows, killed, save_steps=3)
    assert not killed.exists()
    (killed.parent / "model.checkpoints" / "checkpoint-4").mkdir()  # one that was cut off
    train_model(RECIPE, tokenizer, rows, killed, save_steps=3)
    assert len(steps) == 13
    weights, again = (load_file(at / "model.safetensors") for at in (whole, killed))
    for name, tensor in again.items():
        assert torch.equal(tensor, weights[name]), name
    assert [path.name for path in killed.parent.iterdir()] == ["model"]
    train_model(RECIPE, tokenizer, rows, killed)
    assert len(steps) == 13
    name = "model.layers.0.mlp.up_proj.weight"
    moved = weights[name].float() - new_model(RECIPE).get_parameter(name)
    assert moved.abs().max() > 1e-2
    trained = load_model(str(killed))
    assert (trained.layers, trained.d_model) == (2, 16)
    assert tokenize(trained, "a1z").ids[0, 0] == BOS


def test_training_learns_what_is_planted(rows: np.ndarray, tokenizer: Any, tmp_path: Path):
    recipe = RECIPE.model_copy(update={"tokens": 64 * 60, "adam_lr": 0.02})
    train_model(recipe, tokenizer, rows, tmp_path / "model")
    trained = load_model(str(tmp_path / "model"))
    ids = torch.from_numpy(rows[:8].astype(np.int64))
    logits = logits_of(trained, ids).log_softmax(-1)
    loss = -logits[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    assert loss < 0.5 * math.log(recipe.vocab_size)


def test_a_loss_that_is_not_finite_is_an_error_at_its_step(
    rows: np.ndarray, tokenizer: Any, tmp_path: Path
):
    recipe = RECIPE.model_copy(update={"adam_lr": math.inf})
    with pytest.raises(FloatingPointError, match="the loss became nan at step 1"):
        train_model(recipe, tokenizer, rows, tmp_path / "model")
    assert not (tmp_path / "model").exists()
