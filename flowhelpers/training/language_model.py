"""Train a small language model of the Gemma 3 text architecture from folders of text.

The recipe of `flowlet`'s model, for any size: a byte-level BPE tokenizer, rows of one context each
drawn from weighted sources, Muon for the weight matrices and AdamW for everything else. A run that
was killed goes on from its last checkpoint; the same seed reads the same rows in the same order.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from flowhelpers.activations.corpora import Documents, digests, load_source, passages
from flowhelpers.core.files import check_unchanged, read_json, write_json
from flowhelpers.suites.model import token_losses

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD, EOS, BOS, UNK = range(4)
PASSAGES = "passages.json"  # how many of the package's own passages the training text holds


@dataclass(frozen=True)
class ModelRecipe:
    """Every number that decides how a language model is trained.

    Attributes:
        sources: Name of each text source and its share of the training tokens. A name is a file or
            folder, a hub dataset, `stdlib` (the interpreter's own source) or `pydoc` (its topics).
        tokens: Training tokens in all.
        rows: Rows of `context` tokens in one step.
        muon_lr: Learning rate of the weight matrices, at its peak.
        adam_lr: Learning rate of embeddings and norms, at its peak.
        decay: Share of the steps, at the end, over which the learning rates fall to zero.
        gain: Gain of every post-norm before training.
    """

    sources: dict[str, float]
    vocab_size: int = 8192
    d_model: int = 192
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    d_mlp: int = 576
    context: int = 256
    tokens: int = 28_000_000
    rows: int = 32
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup: int = 100
    decay: float = 0.5
    gain: float = 0.35
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps that `tokens` make."""
        return max(1, self.tokens // (self.rows * self.context))

    def config(self) -> Gemma3TextConfig:
        """The Hugging Face configuration of the model."""
        return Gemma3TextConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.d_model // self.heads,
            query_pre_attn_scalar=self.d_model // self.heads,
            max_position_embeddings=self.context,
            sliding_window=self.context,
            layer_types=["full_attention"] * self.layers,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=BOS,
        )


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits digits and puts `<bos>` before each text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def token_rows(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, context: int
) -> Int[np.ndarray, "rows context"]:
    """Documents end to end, `<eos>` between them, cut into rows that each begin with `<bos>`.

    Both are the tokenizer's own; one without `<bos>` begins rows with `<eos>`.
    """
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    stream: list[np.ndarray] = []
    for start in range(0, len(documents), 512):
        batch = tokenizer(documents[start : start + 512], add_special_tokens=False)["input_ids"]
        stream.extend(np.array([*ids, eos], dtype=np.int32) for ids in batch)
    flat = np.concatenate(stream) if stream else np.zeros(0, np.int32)
    body = flat[: len(flat) // (context - 1) * (context - 1)].reshape(-1, context - 1)
    return np.concatenate([np.full((len(body), 1), bos, np.int32), body], axis=1)


@dataclass(frozen=True)
class TokenData:
    """Rows of every source, and the order in which training reads them."""

    train: dict[str, Integer[np.ndarray, "_ context"]]
    held_out: dict[str, Integer[np.ndarray, "_ context"]]
    order: Int[np.ndarray, "drawn 2"] = field(repr=False)

    def batch(self, step: int, rows: int) -> Int[Tensor, "rows context"]:
        """The rows of one step: the same for the same step, whenever it is asked for."""
        names = list(self.train)
        drawn = self.order[step * rows : (step + 1) * rows]
        return torch.from_numpy(
            np.stack([self.train[names[source]][row] for source, row in drawn]).astype(np.int64)
        )


def reading_order(
    rows: dict[str, int], shares: dict[str, float], total: int, seed: int
) -> Int[np.ndarray, "total 2"]:
    """Which (source, row) is read when: each source's share, every row once before any twice."""
    rng = np.random.default_rng(seed)
    weight = sum(shares.values())
    parts = []
    for index, (name, count) in enumerate(rows.items()):
        wanted = math.ceil(total * shares[name] / weight)
        passes = [rng.permutation(count) for _ in range(math.ceil(wanted / count))]
        drawn = np.concatenate(passes)[:wanted]
        parts.append(np.stack([np.full(wanted, index), drawn], axis=1))
    order = np.concatenate(parts)
    rng.shuffle(order)
    return order[:total]


def prepare(
    recipe: ModelRecipe, folder: Path, text_folder: Path | None
) -> tuple[PreTrainedTokenizerFast, TokenData]:
    """Read the sources, train the tokenizer and cut the rows, or read all of it from `folder`.

    Raises:
        ValueError: If the rows in `folder` were cut by another recipe or from other text, or a
            source is too small.
    """
    if len({Path(name).name for name in recipe.sources}) < len(recipe.sources):
        raise ValueError(
            f"sources {', '.join(recipe.sources)}: expected names that differ in their last part"
        )
    tokens = folder / "tokens"
    path = tokens / "recipe.json"
    keys = ("sources", "vocab_size", "context", "tokens", "seed")
    record = {key: asdict(recipe)[key] for key in keys}
    record["text"] = digests(recipe.sources, text_folder)
    if tokens.exists():
        if path.is_file():  # text that is gone is not needed any more
            record["text"] = read_json(path)["text"] | record["text"]
        check_unchanged(path, record)
    else:
        part = folder / "tokens.part"
        try:
            _cut(recipe, {name: load_source(name, text_folder) for name in recipe.sources}, part)
            write_json(part / path.name, record)
            os.replace(part, tokens)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return read_rows(recipe, folder)


def read_rows(recipe: ModelRecipe, folder: Path) -> tuple[PreTrainedTokenizerFast, TokenData]:
    """The tokenizer and the rows that `prepare` left in `folder`."""
    tokens = folder / "tokens"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokens)
    splits = {
        split: {
            name: np.load(tokens / f"{split}-{Path(name).name}.npy", mmap_mode="r")
            for name in recipe.sources
        }
        for split in ("train", "held_out")
    }
    order = reading_order(
        {name: len(rows) for name, rows in splits["train"].items()},
        recipe.sources,
        recipe.steps * recipe.rows,
        recipe.seed,
    )
    return tokenizer, TokenData(splits["train"], splits["held_out"], order)


def _cut(recipe: ModelRecipe, sources: dict[str, Documents], folder: Path) -> None:
    tokenizer = train_tokenizer(_tokenizer_sample(sources, recipe), recipe.vocab_size)
    tokenizer.save_pretrained(folder)
    seen: set[str] = set()
    for name, source in tqdm(sources.items(), desc="tokens"):
        budget = int(7 * recipe.tokens * recipe.sources[name] / sum(recipe.sources.values()))
        for split, documents in (
            ("train", source.train(recipe.seed, budget)),
            ("held_out", source.held_out(recipe.seed, 2_000_000)),
        ):
            rows = token_rows(documents, tokenizer, recipe.context)
            if not len(rows):
                raise ValueError(
                    f"source {name!r} gives no row of {recipe.context} tokens for {split}"
                )
            np.save(folder / f"{split}-{Path(name).name}.npy", rows.astype(np.uint32))
            if split == "train":
                seen |= passages_in(documents)
    write_json(folder / PASSAGES, len(seen))


def passages_in(documents: Sequence[str]) -> set[str]:
    """The package's own passages that stand in documents word for word."""
    return {text for text in passages()["text"] if any(text in each for each in documents)}


def _tokenizer_sample(sources: dict[str, Documents], recipe: ModelRecipe) -> Iterator[str]:
    total = sum(recipe.sources.values())
    for name, source in sources.items():
        for document in source.train(recipe.seed + 1, int(3e7 * recipe.sources[name] / total)):
            yield from (document[i : i + 20_000] for i in range(0, len(document), 20_000))


def new_model(recipe: ModelRecipe) -> Gemma3ForCausalLM:
    """A model with seeded random weights; its post-norms are turned down to `recipe.gain`."""
    torch.manual_seed(recipe.seed)
    model: Any = Gemma3ForCausalLM(recipe.config())
    model.config._attn_implementation = "sdpa"
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            torch.nn.init.constant_(norm.weight, recipe.gain - 1)  # the norm's gain is 1 + weight
    return model


def train_model(
    recipe: ModelRecipe,
    folder: Path,
    text_folder: Path | None = None,
    device: str = "cpu",
    checkpoint_every: float = 120.0,
) -> Path:
    """Train a language model and save it as an ordinary Hugging Face folder.

    Args:
        recipe: The numbers.
        folder: Where tokens, checkpoints and the log are kept; a second call goes on from there,
            with the same recipe alone.
        text_folder: Where sources that are file names are looked up.
        device: A torch device; `cpu` and `cuda` take the same recipe.
        checkpoint_every: Seconds between checkpoints.

    Returns:
        The folder of the finished model: `folder/model`.

    Raises:
        ValueError: If what is in `folder` was begun with another recipe, or from other text.
    """
    final, checkpoint = folder / "model", folder / "checkpoint.pt"
    if final.exists() or checkpoint.exists():
        check_unchanged(folder / "recipe.json", asdict(recipe))
    tokenizer, data = prepare(recipe, folder, text_folder)
    if final.exists():
        return final
    torch.set_flush_denormal(True)
    write_json(folder / "recipe.json", asdict(recipe))
    model: Any = new_model(recipe)
    model.to(device)
    optimizers = _optimizers(model, recipe)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    loss_of = compiled(lambda ids: next_token_loss(model, ids).mean())
    saved_at = time.monotonic()
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc="model")
    log = (folder / "model.log").open("a", buffering=1)
    for step in bar:
        scale = learning_rate_scale(step, recipe)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
        loss = loss_of(data.batch(step, recipe.rows).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss became {loss.item()} at step {step}")
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % 50 == 0:
            log.write(json.dumps({"step": step, "loss": round(loss.item(), 4)}) + "\n")
        if time.monotonic() - saved_at > checkpoint_every:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            saved_at = time.monotonic()
    report = held_out_loss(model, tokenizer, data, recipe)
    part = folder / "model.part"
    model.to(torch.float16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    write_json(part / "training.json", {"recipe": asdict(recipe), "held_out": report})
    os.replace(part, final)
    return final


def _optimizers(model: Gemma3ForCausalLM, recipe: ModelRecipe) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate_scale(step: int, recipe: ModelRecipe) -> float:
    """Linear warm-up, a plateau at 1, and a linear fall to zero over the last `decay` share."""
    rise = (step + 1) / max(1, recipe.warmup)
    fall = (recipe.steps - step) / max(1.0, recipe.decay * recipe.steps)
    return min(1.0, rise, fall)


def next_token_loss(model: Gemma3ForCausalLM, ids: Int[Tensor, "rows context"]) -> Tensor:
    """Cross-entropy of every next token in nats, `[rows, context - 1]`, under bfloat16 autocast."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = hidden @ model.get_input_embeddings().weight.T
    return token_losses(logits, ids[:, 1:])


def compiled(function: Any) -> Any:
    """`torch.compile` where a C compiler is at hand (2.7 times as fast on CPU), else as it is."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # the kinds of failure are many: no compiler, one that is too old
        return function
    return torch.compile(function)


@torch.no_grad()
def held_out_loss(
    model: Gemma3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: TokenData,
    recipe: ModelRecipe,
    rows: int = 256,
) -> dict[str, dict[str, float]]:
    """Loss on documents never trained on: nats per token and bits per byte, by source and mixed.

    The mix weighs the sources as training did, by tokens: its bits per byte are the sum of the
    weighted nats over the sum of the weighted bytes.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor(
        [
            len(bytes_of(tokenizer, i)) if len(SPECIALS) <= i < len(tokenizer) else 0
            for i in range(recipe.vocab_size)  # which little text does not fill
        ]
    )
    report, nats_mix, bytes_mix = {}, 0.0, 0.0
    weight = sum(recipe.sources.values())
    for name, held in data.held_out.items():
        pick = np.random.default_rng(recipe.seed).permutation(len(held))[:rows]
        ids = torch.from_numpy(np.asarray(held[np.sort(pick)]).astype(np.int64))
        nats = sum(
            next_token_loss(model, part.to(device)).double().sum().item() for part in ids.split(32)
        )
        count, size = ids[:, 1:].numel(), int(lengths[ids[:, 1:]].sum())
        report[name] = {
            "nats_per_token": nats / count,
            "bits_per_byte": nats / size / math.log(2),
            "tokens": count,
        }
        share = recipe.sources[name] / weight
        nats_mix += share * nats / count
        bytes_mix += share * size / count
    report["mix"] = {
        "nats_per_token": nats_mix,
        "bits_per_byte": nats_mix / bytes_mix / math.log(2),
        "tokens": sum(int(part["tokens"]) for part in report.values()),
    }
    return report


def bytes_of(tokenizer: PreTrainedTokenizerFast, token: int) -> bytes:
    """The bytes that one token of a byte-level BPE stands for."""
    table = _byte_table()
    return bytes(table[character] for character in tokenizer.convert_ids_to_tokens(token))


def _byte_table() -> dict[str, int]:
    # GPT-2's printable stand-ins for bytes: printable ones stand for themselves, the others follow
    # from 256 on in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
