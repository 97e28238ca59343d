"""Sampling text: many samples in one batch, each with a random stream of its own."""

from collections.abc import Collection, Sequence
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import Activations, Edit, Model, editing, forward, tokenize

PHASES = ("prompt", "generation")


class NotFiniteError(FloatingPointError):
    """Logits are no longer finite in some `rows` of the batch."""

    def __init__(self, rows: Sequence[int], step: int) -> None:
        super().__init__(f"logits are no longer finite at new token {step} in rows {rows}")
        self.rows = rows


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
    """Sample continuations of a prompt; edits act on prompt and generated tokens alike."""
    ids = prompt_ids(model, prompt, max_new_tokens).expand(samples, -1)
    seeds = [sample_seed(seed, i) for i in range(samples)]
    sampled = sample_tokens(model, ids, seeds, max_new_tokens, temperature, top_p, edits)
    return continuations(model, sampled[:, ids.shape[1] :])


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one sample: the same whatever else shares its batch."""
    return seed * 1_000_003 + sample


def prompt_ids(model: Model, prompt: str, max_new_tokens: int) -> Int[Tensor, "1 position"]:
    """A prompt as tokens, BOS first; an error if it is empty, or too long with what follows."""
    if not prompt:
        raise ValueError("the prompt is empty: expected some text")
    ids = tokenize(model, prompt).ids
    context = model.bridge.cfg.n_ctx
    if ids.shape[1] + max_new_tokens > context:
        told = f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones"
        raise ValueError(f"{told}: {model.name} has a context of {context}")
    return ids


def continuations(model: Model, ids: Int[Tensor, "batch position"]) -> list[str]:
    """Generated tokens as text, up to the end-of-text token."""
    eos = model.tokenizer.eos_token_id
    rows = [[*takewhile(lambda token: token != eos, row)] for row in ids.tolist()]
    return [model.tokenizer.decode(row) for row in rows]


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
    show_progress: bool = True,
) -> Int[Tensor, "batch longer"]:
    """Sample tokens for every row of a batch, each with a random stream of its own, by its seed.

    Edits have to treat all positions alike; they act on the tokens of the `phases` (CHOICES 20),
    with `skip_bos` not on the first. Tokens are drawn from the smallest set of likely ones whose
    probability reaches `top_p` (nucleus). After its end-of-text token a row means nothing.
    """
    from transformers import DynamicCache

    if not temperature > 0 or not 0 < top_p <= 1 or max_new_tokens < 1 or not len(ids):
        given = f"{temperature=}, {top_p=}, {max_new_tokens=}, {len(ids)} samples"
        raise ValueError(f"{given}: expected 0 < top_p <= 1 and more than 0 of the others")
    if len(seeds) != len(ids):  # one would be spread over all rows
        raise ValueError(f"{len(seeds)} seeds for {len(ids)} rows")
    if not phases or {*phases} - {*PHASES}:
        raise ValueError(f"phases={phases}: expected some of {PHASES}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = np.stack([torch.rand(max_new_tokens, generator=g).numpy() for g in generators])
    ended = torch.zeros(len(ids), dtype=torch.bool)
    # The first pass reads the prompt, each later one a single new token.
    prompt, inputs, key_values = ids, ids, DynamicCache()
    steps = range(max_new_tokens)

    def in_phases(edit: Edit) -> Edit:
        def change(activations: Activations) -> Activations:
            if ("prompt" if inputs is prompt else "generation") not in phases:
                return activations
            first = int(skip_bos and inputs is prompt)
            changed = edit.change(activations[:, first:])
            return torch.cat([activations[:, :first], changed], dim=1)

        return Edit(edit.site, change)

    with editing(model, [in_phases(edit) for edit in edits]):  # once, for hooks take time to put on
        for step in progress(steps, "sampling") if show_progress else steps:
            logits = forward(model, inputs, key_values)[:, -1].float().cpu()
            if not (finite := torch.isfinite(logits).all(dim=1)).all():
                raise NotFiniteError((~finite).nonzero().flatten().tolist(), step + 1)
            drawn = _drawn(_nucleus(logits / temperature, top_p), uniform[:, step])
            inputs = drawn.to(ids.device)
            ids = torch.cat([ids, inputs], dim=1)
            ended |= drawn[:, 0] == model.tokenizer.eos_token_id
            if ended.all():
                break
    return ids


def _nucleus(logits: Float[Tensor, "batch vocabulary"], top_p: float) -> np.ndarray:
    """The smallest set of likely tokens that reaches top_p, with ties; others at 0."""
    chances = logits.softmax(-1).numpy()
    falling = np.sort(chances, axis=-1)[:, ::-1]  # many times as fast as torch's
    before = (falling.cumsum(axis=-1) < top_p).sum(axis=-1, keepdims=True)
    least = np.take_along_axis(falling, before.clip(max=falling.shape[1] - 1), axis=-1)
    return np.where(chances >= least, chances, 0)


def _drawn(chances: np.ndarray, uniform: np.ndarray) -> Int[Tensor, "batch 1"]:
    """One token a row: the first whose cumulative chance exceeds that share of the sum."""
    so_far = chances.cumsum(axis=-1, dtype=np.float64)
    share = uniform.astype(np.float64)[:, None] * so_far[:, -1:]
    return torch.from_numpy((so_far <= share).sum(axis=-1, keepdims=True))
