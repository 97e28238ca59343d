"""Sampling text: many samples in one batch, each with a random stream of its own."""

from collections.abc import Collection, Sequence
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.core.machine import in_threads
from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import Activations, Edit, Model, editing, forward, tokenize

PHASES = ("prompt", "generation")
SHORT = 512  # likeliest tokens of a row that are looked at first; few nuclei are larger
# Logits that are drawn from at a time: what a core's cache holds; on a GPU, what keeps it busy and
# takes half a GiB at most.
TOGETHER = {"cpu": 2**20, "cuda": 2**23}


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
    """Generated tokens as text, up to the first of the `end_ids`."""
    ends = end_ids(model)
    rows = [[*takewhile(lambda token: token not in ends, row)] for row in ids.tolist()]
    return [model.tokenizer.decode(row) for row in rows]


def end_ids(model: Model) -> list[int]:
    """The tokens that end a text: the tokenizer's EOS, and those of `generation_config`."""
    named = getattr(model.bridge.original_model.generation_config, "eos_token_id", None)
    ids = {model.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(ids - {None})


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
    with `skip_bos` not on BOS. Tokens are drawn from the smallest set of likely ones whose
    probability reaches `top_p` (nucleus). After the first of the `end_ids` a row means nothing.
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
    uniform = torch.stack([torch.rand(max_new_tokens, generator=g) for g in generators])
    device = ids.device if ids.is_cuda else torch.device("cpu")  # MPS has no float64
    uniform, ended = uniform.to(device), torch.zeros(len(ids), 1, dtype=torch.bool, device=device)
    # The first pass reads the prompt, each later one a single new token.
    prompt, inputs, key_values = ids, ids, DynamicCache()
    steps = range(max_new_tokens)
    over = torch.tensor(end_ids(model), dtype=torch.long, device=device)

    def in_phases(edit: Edit) -> Edit:
        def change(activations: Activations) -> Activations:
            if ("prompt" if inputs is prompt else "generation") not in phases:
                return activations
            first = int(skip_bos and model.prepend_bos and inputs is prompt)
            changed = edit.change(activations[:, first:])
            return torch.cat([activations[:, :first], changed], dim=1)

        return Edit(edit.site, change)

    with editing(model, [in_phases(edit) for edit in edits]):  # once, for hooks take time to put on
        for step in progress(steps, "sampling") if show_progress else steps:
            logits = forward(model, inputs, key_values, last=True)[:, -1].to(device)
            ends = torch.stack([logits.amin(1), logits.amax(1)]).float() / temperature
            if not (finite := ends.isfinite().all(dim=0)).all():
                raise NotFiniteError((~finite).nonzero().flatten().tolist(), step + 1)
            tokens = draw_tokens(logits, uniform[:, step], temperature, top_p)
            inputs = tokens.to(ids.device)
            ids = torch.cat([ids, inputs], dim=1)
            ended |= torch.isin(tokens, over)
            if ended.all():
                break
    return ids


def draw_tokens(
    logits: Float[Tensor, "batch vocabulary"],
    uniform: Float[Tensor, "batch"],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Int[Tensor, "batch 1"]:
    """A token for each row, by a number from 0 to 1 of its own; on the logits' device."""

    def draw(part: tuple[Tensor, Tensor]) -> Tensor:
        return _drawn((part[0].float() / temperature).softmax(-1), part[1], top_p)

    rows = max(1, TOGETHER[logits.device.type] // logits.shape[1])
    parts = zip(logits.split(rows), uniform.split(rows), strict=True)
    return torch.cat(in_threads(draw, parts, logits.device.type))


def _drawn(
    chances: Float[Tensor, "batch vocabulary"], uniform: Float[Tensor, "batch"], top_p: float
) -> Int[Tensor, "batch 1"]:
    """One token a row, out of the smallest set of likely ones that reaches `top_p`, with ties.

    It is the first, in vocabulary order, whose cumulative chance exceeds the share `uniform` of the
    sum. Sums are in float64: in float32 those of a large vocabulary are off by as much as the
    chance of a rare token, and on a GPU need not even grow, so that a token outside of the set
    could be drawn. Where the `SHORT` likeliest hold the set, which they do if the last of them is
    no longer in it, the others are not sorted.
    """
    drawn = torch.zeros(len(chances), 1, dtype=torch.int64, device=chances.device)
    wide = torch.ones(len(chances), dtype=torch.bool, device=chances.device)
    if chances.shape[1] > 64 * SHORT:  # else a sort of all takes no longer
        likely, tokens = chances.topk(SHORT)
        least = _least(likely, top_p)
        tokens, order = tokens.sort()
        drawn = tokens.gather(1, _first_beyond(likely.gather(1, order), least, uniform))
        wide = likely[:, -1] >= least[:, 0]
    if wide.any():
        chances = chances[wide]
        drawn[wide] = _first_beyond(chances, _least(_falling(chances), top_p), uniform[wide])
    return drawn


def _falling(chances: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, "batch vocabulary"]:
    if chances.is_cuda:
        return chances.sort(descending=True).values
    return torch.from_numpy(np.sort(chances.numpy())).flip(-1)  # many times as fast as torch's


def _least(falling: Float[Tensor, "batch n"], top_p: float) -> Float[Tensor, "batch 1"]:
    """The last chance that is needed to reach `top_p`, or the last of all."""
    before = (falling.cumsum(-1, dtype=torch.float64) < top_p).sum(-1, keepdim=True)
    return falling.gather(-1, before.clamp(max=falling.shape[1] - 1))


def _first_beyond(
    chances: Float[Tensor, "batch n"], least: Float[Tensor, "batch 1"], uniform: Tensor
) -> Int[Tensor, "batch 1"]:
    """The first place where the sum of chances not below `least` exceeds a share of the whole."""
    so_far = chances.where(chances >= least, 0).cumsum(-1, dtype=torch.float64)
    return (so_far <= uniform.double()[:, None] * so_far[:, -1:]).sum(-1, keepdim=True)
