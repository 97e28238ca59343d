"""Train a small language model of the Gemma 3 text architecture from text.

`flowlet`'s way, for any size: a byte-level BPE tokenizer, rows of one context each drawn from
weighted sources, Muon for the weight matrices and AdamW for everything else. The loop, its
checkpoints and its learning rates are those of `transformers.Trainer`.
"""

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from flowhelpers.core.files import read_json

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD, EOS, BOS, UNK = range(4)


class ModelRecipe(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Every number that decides how a language model is trained."""

    vocab_size: int = Field(default=8192, ge=256 + len(SPECIALS))
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
    warmup: int = Field(default=100, ge=0)
    decay: float = Field(default=0.5, ge=0, le=1)  # share of the steps, at the end
    gain: PositiveFloat = 0.35  # of every post-norm before training
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelRecipe":
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}, which does not divide {self.heads}")
        if self.d_model % (2 * self.heads):  # rotary embedding needs a head of even width
            raise ValueError(f"d_model is {self.d_model}, no multiple of 2 x {self.heads} heads")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps that `tokens` make."""
        return max(1, self.tokens // (self.rows * self.context))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits digits and puts `<bos>` before each text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    digits, to_bytes = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    names = {f"{name.strip('<>')}_token": name for name in SPECIALS}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **names,
    )


def token_rows(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, context: int
) -> Int[np.ndarray, "rows context"]:
    """Documents end to end, `<eos>` between them, cut into rows that each begin with `<bos>`.

    Both are the tokenizer's own; one without `<bos>` begins rows with `<eos>`.
    """
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    stream = [np.zeros(0, np.int32)]
    for start in range(0, len(documents), 512):
        batch = tokenizer(documents[start : start + 512], add_special_tokens=False)["input_ids"]
        stream += [np.array([*ids, eos], dtype=np.int32) for ids in batch]
    flat = np.concatenate(stream)
    body = flat[: len(flat) // (context - 1) * (context - 1)].reshape(-1, context - 1)
    return np.concatenate([np.full((len(body), 1), bos, np.int32), body], axis=1)


def read_rows(work: Path, total: int, seed: int, split: str = "train") -> np.ndarray:
    """Rows of a training folder in reading order, from every source by its share."""
    path = work / "tokens" / "recipe.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: expected the folder of a training")
    shares = read_json(path)["recipe"]["sources"]
    files = {name: path.parent / split / f"{Path(name).name}.npy" for name in shares}
    rows = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
    filled = {name: of_source for name, of_source in rows.items() if len(of_source)}
    return mix_rows(filled, shares, total, seed) if filled else next(iter(rows.values()))


def mix_rows(
    rows: Mapping[str, Integer[np.ndarray, "_ context"]],
    shares: Mapping[str, float],
    total: int,
    seed: int,
) -> Integer[np.ndarray, "total context"]:
    """Rows of all sources in reading order: each source's share, every row once before any twice.

    Depends on the seed and the names, and not on the order in which the sources are given.
    """
    rng = np.random.default_rng(seed)
    weight = sum(shares[name] for name in rows)
    mixed = []
    for name in sorted(rows):
        wanted = math.ceil(total * shares[name] / weight)
        passes = [rng.permutation(len(rows[name])) for _ in range(-(-wanted // len(rows[name])))]
        mixed.append(rows[name][np.concatenate(passes)[:wanted]])
    return rng.permutation(np.concatenate(mixed))[:total]


def new_model(recipe: ModelRecipe) -> Gemma3ForCausalLM:
    """A model with seeded random weights; its post-norms are turned down to `recipe.gain`."""
    torch.manual_seed(recipe.seed)
    config = Gemma3TextConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.d_model // recipe.heads,
        query_pre_attn_scalar=recipe.d_model // recipe.heads,
        max_position_embeddings=recipe.context,
        sliding_window=recipe.context,
        layer_types=["full_attention"] * recipe.layers,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    model: Any = Gemma3ForCausalLM(config)
    model.config._attn_implementation = "sdpa"
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
    tokenizer: PreTrainedTokenizerFast,
    rows: Integer[np.ndarray, "rows context"],
    folder: Path,
    device: str = "cpu",
    save_steps: int = 100,
) -> Path:
    """Train a language model and save it as an ordinary Hugging Face folder.

    A second call goes on from the last checkpoint in `folder`. `rows` are read in their order,
    `recipe.rows` of them a step.

    Returns:
        The folder of the finished model, in half precision: `folder/model`.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    final = folder / "model"
    if final.exists():
        return final
    torch.set_flush_denormal(True)
    model: Any = new_model(recipe)
    decay_steps = round(recipe.decay * recipe.steps)
    arguments = TrainingArguments(
        output_dir=str(folder / "model-checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.rows,
        train_sampling_strategy="sequential",
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=recipe.warmup,
        lr_scheduler_kwargs={"num_decay_steps": decay_steps, "decay_type": "linear"},
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=device == "cpu",
        torch_compile=can_compile(),
        save_steps=save_steps,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        seed=recipe.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would each take a whole batch
    optimizer = MuonAdamW(model, recipe.muon_lr, recipe.adam_lr)
    dataset: Any = rows
    trainer = FiniteTrainer(model, arguments, collate, dataset, optimizers=(optimizer, None))
    # The Trainer writes its state last: a checkpoint without it was cut off by a kill.
    states = folder.glob("model-checkpoints/checkpoint-*/trainer_state.json")
    last = max(states, key=lambda path: int(path.parent.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=str(last.parent) if last else None)
    part = folder / "model.part"
    model.to(torch.float16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    os.replace(part, final)
    shutil.rmtree(folder / "model-checkpoints")
    return final
