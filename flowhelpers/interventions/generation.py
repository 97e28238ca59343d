"""Sampling text: many samples in one batch, each with a random stream of its own."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.core.features import suggestion
from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import Activations, Edit, Model, editing, forward, tokenize

PHASES = ("prompt", "generation")


class NotFiniteError(FloatingPointError):
    """Logits are no longer finite.

    Attributes:
        rows: Rows of the batch where this is so.
    """

    def __init__(self, rows: Sequence[int], step: int) -> None:
        super().__init__(
            f"logits are no longer finite at new token {step} in rows {', '.join(map(str, rows))}"
        )
        self.rows = tuple(rows)


def generate(
    model: Model,
    prompt: str,
    max_new_tokens: int = 40,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    edits: Sequence[Edit] = (),
) -> list[str]:
    """Sample continuations of a prompt, with edits applied to prompt and generated tokens alike.

    Returns:
        The continuations, without the prompt.

    Raises:
        ValueError: As `sample_tokens`; also if there is no sample or the prompt is empty.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: expected 1 or more")
    ids = prompt_ids(model, prompt, max_new_tokens)
    seeds = [sample_seed(seed, i) for i in range(samples)]
    found = sample_tokens(
        model, ids.expand(samples, -1), seeds, max_new_tokens, temperature, top_p, edits
    )
    return continuations(model, found[:, ids.shape[1] :])


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one sample: the same whatever else shares its batch."""
    return seed * 1_000_003 + sample


def prompt_ids(model: Model, prompt: str, max_new_tokens: int) -> Int[Tensor, "1 position"]:
    """A prompt as tokens, BOS first.

    Raises:
        ValueError: If it is empty, or too long for the model with what is to follow.
    """
    if not prompt:
        raise ValueError("the prompt is empty: expected some text")
    ids = tokenize(model, prompt).ids
    context = model.bridge.cfg.n_ctx
    if ids.shape[1] + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones: {model.name} has a"
            f" context of {context}"
        )
    return ids


def continuations(model: Model, ids: Int[Tensor, "batch position"]) -> list[str]:
    """Generated tokens as text, up to the end-of-text token."""
    eos = model.tokenizer.eos_token_id
    texts = []
    for row in ids.tolist():
        end = row.index(eos) if eos in row else len(row)
        texts.append(model.tokenizer.decode(row[:end]))
    return texts


@torch.no_grad()
def sample_tokens(
    model: Model,
    ids: Int[Tensor, "batch position"],
    seeds: Sequence[int],
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    top_p: float = 1.0,
    edits: Sequence[Edit] = (),
    phases: Collection[str] = PHASES,
    skip_bos: bool = False,
    cache: bool = True,
    bar: bool = True,
) -> Int[Tensor, "batch longer"]:
    """Sample tokens for every row of a batch.

    Each row has a random stream of its own: it does not depend on what else is in the batch.

    Args:
        model: The model.
        ids: The prompts, of one length.
        seeds: One for each row.
        max_new_tokens: Tokens to sample for each row.
        temperature: What logits are divided by.
        top_p: The share of probability from which tokens are drawn (nucleus).
        edits: Changes to the stream; they have to treat all positions alike.
        phases: Whether edits act on the prompt's tokens, the generated ones, or both (CHOICES 20).
        skip_bos: Whether the first token is left as it is.
        cache: Whether keys and values are kept, so that each pass has one token; the tokens are the
            same without.
        bar: Whether a progress bar is shown.

    Returns:
        Prompt and sampled tokens; after its end-of-text token a row means nothing.

    Raises:
        ValueError: If a setting is out of range.
        NotFiniteError: If logits are no longer finite.
    """
    from transformers import DynamicCache

    if temperature <= 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}:"
            " expected temperature > 0, 0 < top_p <= 1 and max_new_tokens >= 1"
        )
    if len(seeds) != len(ids):
        raise ValueError(f"{len(seeds)} seeds for {len(ids)} rows: expected one for each")
    for phase in phases:
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}{suggestion(phase, PHASES)}")
    prompt = ids.shape[1]
    first = (1 if skip_bos else 0) if "prompt" in phases else prompt
    last = prompt + max_new_tokens if "generation" in phases else prompt
    kept: Any = DynamicCache() if cache else None
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    uniform = np.stack([torch.rand(max_new_tokens, generator=g).numpy() for g in generators])
    eos = model.tokenizer.eos_token_id
    ended = torch.zeros(len(ids), dtype=torch.bool)
    steps = range(max_new_tokens)
    start = 0

    def within(edit: Edit) -> Edit:
        """The edit on the positions of its phases only."""

        def change(activations: Activations) -> Activations:
            here = slice(max(first - start, 0), max(last - start, 0))
            if here.start >= min(here.stop, activations.shape[1]):
                return activations
            if here.start == 0 and here.stop >= activations.shape[1]:
                return edit.change(activations)
            changed = activations.clone()
            changed[:, here] = edit.change(activations[:, here])
            return changed

        return Edit(edit.site, change)

    with editing(model, [within(edit) for edit in edits]):  # once: to put hooks on takes its time
        for step in progress(steps, "sampling") if bar else steps:
            start = prompt + step - 1 if cache and step else 0
            logits = forward(model, ids[:, start:], kept)
            final = logits[:, -1].float().cpu()
            _check_finite(final, step)
            drawn = _drawn(_nucleus(final / temperature, top_p), uniform[:, step])
            ids = torch.cat([ids, drawn.to(ids.device)], dim=1)
            ended |= drawn[:, 0] == eos
            if ended.all():
                break
    return ids


def _check_finite(logits: Float[Tensor, "batch vocabulary"], step: int) -> None:
    rows = (~torch.isfinite(logits).all(dim=1)).nonzero().flatten().tolist()
    if rows:
        raise NotFiniteError(rows, step + 1)


def _nucleus(logits: Float[Tensor, "batch vocabulary"], top_p: float) -> np.ndarray:
    """The smallest set of most likely tokens whose probability reaches top_p, others at 0.

    Tokens as likely as the last of them are in as well.
    """
    chances = logits.softmax(-1).numpy()
    falling = np.sort(chances, axis=-1)[:, ::-1]  # many times as fast as torch's
    before = (falling.cumsum(axis=-1) < top_p).sum(axis=-1, keepdims=True)
    least = np.take_along_axis(falling, before.clip(max=falling.shape[1] - 1), axis=-1)
    return np.where(chances >= least, chances, 0)


def _drawn(chances: np.ndarray, uniform: np.ndarray) -> Int[Tensor, "batch 1"]:
    """One token a row: the first at which the chances so far exceed a share of their sum."""
    so_far = chances.cumsum(axis=-1, dtype=np.float64)
    share = uniform.astype(np.float64)[:, None] * so_far[:, -1:]
    return torch.from_numpy((so_far <= share).sum(axis=-1, keepdims=True))
