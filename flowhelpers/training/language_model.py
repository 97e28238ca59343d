"""Train a small language model of the Gemma 3 text architecture from text.

Muon for the weight matrices and AdamW for the rest, in the loop of `transformers.Trainer`.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Trainer,
    TrainingArguments,
)

from flowhelpers.core.files import DATA, read_json

FLOWLET = DATA / "flowlet" / "model"  # what no recipe sets is as in it


class ModelRecipe(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Every number that decides how a language model is trained."""

    vocab_size: int = Field(default=8192, ge=260)  # the bytes, and four special tokens
    d_model: PositiveInt = 192
    layers: PositiveInt = 8
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    d_mlp: PositiveInt = 576
    context: int = Field(default=256, ge=2)
    tokens: PositiveInt = 28_000_000
    rows: PositiveInt = 32  # of `context` tokens, in one step
    muon_lr: PositiveFloat = 0.02  # of the weight matrices, at its peak
    adam_lr: PositiveFloat = 3e-3  # of embeddings and norms, at its peak
    warmup: NonNegativeInt = 100
    decay: float = Field(default=0.5, ge=0, le=1)  # share of the steps, at the end
    gain: PositiveFloat = 0.35  # of every post-norm before training
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelRecipe":
        # A rotary embedding needs a head of even width.
        if self.heads % self.kv_heads or self.d_model % (2 * self.heads):
            raise ValueError("expected kv_heads to divide heads, and 2 x heads to divide d_model")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps that `tokens` make."""
        return max(1, self.tokens // (self.rows * self.context))


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Fill a folder whole or not at all; one that is there stays."""
    if not target.exists():
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        os.replace(part, target)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer that splits digits and puts `<bos>` before each text."""
    like = AutoTokenizer.from_pretrained(FLOWLET)
    return like.train_new_from_iterator(texts, vocab_size, show_progress=False)


def token_rows(
    texts: Iterable[str], tokenizer: Any, context: int
) -> Int[np.ndarray, "rows context"]:
    """Texts end to end, `<eos>` between them, cut into rows that each begin with `<bos>`.

    Both are the tokenizer's own; where one is missing the other serves.
    """
    none = np.zeros((0, context), np.int32)
    return np.concatenate([none, *_row_blocks(texts, tokenizer, context)])


def _row_blocks(texts: Iterable[str], tokenizer: Any, context: int) -> Iterator[np.ndarray]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise ValueError("the tokenizer has neither BOS nor EOS: rows of text need one of them")
    bos, eos = eos if bos is None else bos, bos if eos is None else eos
    left, texts = np.zeros(0, np.int32), iter(texts)
    while batch := list(islice(texts, 512)):
        ids = tokenizer(batch, add_special_tokens=False)["input_ids"]
        flat = np.concatenate([left, *(np.array([*row, eos], np.int32) for row in ids)])
        end = len(flat) // (context - 1) * (context - 1)
        body, left = flat[:end].reshape(-1, context - 1), flat[end:]
        yield np.concatenate([np.full((len(body), 1), bos, np.int32), body], axis=1)


def write_rows(path: Path, texts: Iterable[str], tokenizer: Any, context: int) -> int:
    """The rows of `token_rows` as a `.npy` file, never whole in memory; returns how many."""
    about: dict[str, Any] = {"descr": "<i4", "fortran_order": False}
    count = 0
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, about | {"shape": (0, context)})
        for block in _row_blocks(texts, tokenizer, context):
            file.write(block.astype("<i4").tobytes())
            count += len(block)
        file.seek(0)  # numpy leaves room in the header for a longer first axis
        np.lib.format.write_array_header_1_0(file, about | {"shape": (count, context)})
    return count


@dataclass(frozen=True)
class Rows:
    """Rows of several files in an order of their own; they stay on the disk until they are read."""

    sources: list[np.ndarray]
    places: Int[np.ndarray, "rows 2"]  # which source, and which of its rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.places)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, and of tokens in each."""
        return len(self), self.sources[0].shape[1]

    def __getitem__(self, picked: Any) -> Int[np.ndarray, "picked context"]:
        """Some rows, by their indices or as a slice."""
        rows = [self.sources[source][row] for source, row in self.places[picked]]
        return np.array(rows, np.int32).reshape(-1, self.shape[1])


def mixed_rows(work: Path, total: int, seed: int, split: str = "train") -> Rows:
    """Rows of a training folder: each source's share, every row once before any twice, shuffled."""
    shares = read_json(work / "recipe.json")["recipe"]["sources"]
    sources = [np.load(work / f"{split}-{i}.npy", mmap_mode="r") for i in range(len(shares))]
    counts = {name: len(rows) for name, rows in zip(sorted(shares), sources, strict=True)}
    weight = sum(shares[name] for name in shares if counts[name])
    rng = np.random.default_rng(seed)
    places = [np.zeros((0, 2), int)]
    for number, (name, count) in enumerate(counts.items()):
        if count:
            wanted = math.ceil(total * shares[name] / weight)
            passes = [rng.permutation(count) for _ in range(-(-wanted // count))]
            picked = np.concatenate(passes)[:wanted]
            places.append(np.stack([np.full(len(picked), number), picked], axis=1))
    return Rows(sources, rng.permutation(np.concatenate(places))[:total])


def read_rows(
    work: Path, total: int, seed: int, split: str = "train"
) -> Integer[np.ndarray, "rows context"]:
    """The rows of `mixed_rows`, in memory."""
    return mixed_rows(work, total, seed, split)[:]


def new_model(recipe: ModelRecipe) -> Gemma3ForCausalLM:
    """A model with seeded random weights; its post-norms are turned down to `recipe.gain`."""
    torch.manual_seed(recipe.seed)
    config = Gemma3TextConfig.from_pretrained(
        FLOWLET,
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.d_model // recipe.heads,
        query_pre_attn_scalar=recipe.d_model // recipe.heads,
        max_position_embeddings=recipe.context,
        layer_types=["full_attention"] * recipe.layers,
    )
    model: Any = Gemma3ForCausalLM(config)
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            torch.nn.init.constant_(norm.weight, recipe.gain - 1)  # the norm's gain is 1 + weight
    return model


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices, AdamW for embeddings and norms, as one optimizer."""

    def __init__(self, model: torch.nn.Module, muon_lr: float, adam_lr: float) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name
            (matrices if is_matrix else others).append(parameter)
        super().__init__([*matrices, *others], {})
        self.optimizers = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        # A scheduler sets the rates of both, and a checkpoint holds the state of both.
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]

    def step(self, closure: None = None) -> None:
        """One step of each."""
        for optimizer, group in zip(self.optimizers, self.param_groups, strict=True):
            optimizer.state, optimizer.param_groups = self.state, [group]
            optimizer.step()


class FiniteTrainer(Trainer):
    """A trainer that stops at a loss that is not finite."""

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Forward and backward pass of one batch."""
        loss = super().training_step(*args, **options)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss became {loss} at step {self.state.global_step}")
        return loss


def collate(rows: list[Int[np.ndarray, "context"]]) -> dict[str, Int[Tensor, "batch context"]]:
    """Rows of token ids as a batch of `transformers.Trainer`."""
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    return {"input_ids": ids, "labels": ids}


def can_compile() -> bool:
    """Whether a C compiler is at hand for `torch.compile` (2.7 times as fast on CPU)."""
    return any(map(shutil.which, ("c++", "g++", "clang++", "cl")))


def train_model(
    recipe: ModelRecipe,
    tokenizer: Any,
    rows: Integer[np.ndarray, "rows context"],
    folder: Path,
    device: str = "cpu",
    save_steps: int = 100,
) -> None:
    """Train a language model and save it as a Hugging Face folder, in half precision.

    A second call goes on from the last checkpoint beside `folder`. `rows` are read in their order,
    `recipe.rows` of them a step. Raises a FloatingPointError if a loss is not finite.
    """
    if folder.exists():
        return
    checkpoints = folder.with_name(f"{folder.name}.checkpoints")
    torch.set_flush_denormal(True)
    model: Any = new_model(recipe)
    decay_steps = round(recipe.decay * recipe.steps)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.rows,
        train_sampling_strategy="sequential",
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=recipe.warmup,
        lr_scheduler_kwargs={"num_decay_steps": decay_steps, "decay_type": "linear"},
        bf16=True,
        use_cpu=device == "cpu",
        torch_compile=can_compile(),
        save_steps=save_steps,
        save_total_limit=1,
        report_to="none",
        seed=recipe.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would each take a whole batch
    optimizer = MuonAdamW(model, recipe.muon_lr, recipe.adam_lr)
    dataset: Any = rows
    trainer = FiniteTrainer(model, arguments, collate, dataset, optimizers=(optimizer, None))
    # The Trainer writes its state last: a checkpoint without it was cut off by a kill.
    whole = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=str(last) if last else None)

    def save(part: Path) -> None:
        model.to(torch.float16).save_pretrained(part)
        tokenizer.save_pretrained(part)

    write_folder(folder, save)
    shutil.rmtree(checkpoints)
