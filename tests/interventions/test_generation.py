"""Sampling: seeds, the nucleus, and where edits act."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import Tensor
from transformers import DynamicCache

from flowhelpers.core.features import FeatureId, Site
from flowhelpers.interventions import edits, generation
from flowhelpers.interventions.generation import generate, sample_tokens
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Edit, Model, forward, logits_of, tokenize

PROMPT = "The cat sat"


@pytest.mark.parametrize("settings", [{"top_p": 1e-6}, {"temperature": 1e-4}])
def test_a_small_nucleus_or_temperature_takes_the_likeliest_token(
    toy: Model, settings: dict[str, Any]
):
    ids = tokenize(toy, PROMPT).ids
    sampled = sample_tokens(toy, ids, [0], 6, **settings)
    likeliest = logits_of(toy, sampled)[:, :-1].argmax(-1)
    assert sampled.shape[1] == ids.shape[1] + 6
    assert torch.equal(sampled[:, ids.shape[1] :], likeliest[:, ids.shape[1] - 1 :])


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    chances = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2], [0.25, 0.25, 0.1, 0.25, 0.15]])
    falling = chances.sort(descending=True).values
    for top_p, *kept in (
        (0.39, [1], [0, 1, 3]),  # with ties
        (0.41, [1, 3], [0, 1, 3]),
        (0.66, [1, 3, 4], [0, 1, 3]),
        (0.84, [1, 3, 4], [0, 1, 3, 4]),
        (1.0, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    ):
        found = chances >= generation._least(falling, top_p)
        assert [row.nonzero().flatten().tolist() for row in found] == kept, top_p


def test_tokens_are_drawn_as_often_as_their_chances_say():
    chances = torch.tensor([[0.0, 0.3, 0.05, 0.1, 0.2, 0.0]])
    known = {0.0: 1, 0.499: 1, 0.501: 3, 0.66: 3, 0.67: 4, 1 - 1e-7: 4}  # of a sum of 0.6
    chances, uniform = chances.expand(len(known), -1), torch.tensor([*known])
    drawn = generation._first_beyond(chances, torch.full((len(known), 1), 0.1), uniform)
    assert drawn[:, 0].tolist() == [*known.values()]


def plainly_drawn(chances: Tensor, uniform: Tensor, top_p: float) -> list[int]:
    """Row by row, with all tokens sorted, in float64."""
    drawn = []
    for row, share in zip(chances.double().numpy(), uniform.double().numpy(), strict=True):
        falling = np.sort(row)[::-1]
        needed = min(int((falling.cumsum() < top_p).sum()), len(row) - 1)
        so_far = np.where(row >= falling[needed], row, 0).cumsum()
        drawn.append(int((so_far <= share * so_far[-1]).sum()))
    return drawn


def hard_logits() -> Tensor:
    """Peaked and flat rows, rows with many ties, and what lies between, over 600 tokens."""
    logits = torch.randn(400, 600, generator=torch.Generator().manual_seed(0))
    logits *= torch.tensor([0.0, 0.1, 1.0, 4.0, 20.0]).repeat(80)[:, None]
    logits[::2] = logits[::2].round()  # many tokens have equal chances
    return logits


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.7, 0.95, 1.0])
def test_the_likeliest_alone_or_all_give_the_token_of_a_plain_sort(
    top_p: float, monkeypatch: pytest.MonkeyPatch
):
    chances = hard_logits().softmax(-1)
    uniform = torch.rand(len(chances), generator=torch.Generator().manual_seed(1))
    expected = plainly_drawn(chances, uniform, top_p)
    sizes = []

    def falling(chances: Tensor) -> Tensor:
        sizes.append(len(chances))
        return chances.sort(descending=True).values  # as on a GPU

    assert generation._drawn(chances, uniform, top_p)[:, 0].tolist() == expected
    monkeypatch.setattr(generation, "_falling", falling)
    for short in (1, 8, 9):
        monkeypatch.setattr(generation, "SHORT", short)
        assert generation._drawn(chances, uniform, top_p)[:, 0].tolist() == expected
    assert len({*sizes}) > 1 or top_p == 1
    assert sizes[-1] < len(chances) or top_p == 1  # the others were not sorted


def test_rows_are_drawn_in_parts_each_with_its_own_number(
    toy: Model, monkeypatch: pytest.MonkeyPatch
):
    ids = tokenize(toy, PROMPT).ids.expand(7, -1)
    seeds = [5, 1, 4, 1, 3, 9, 2]
    whole = sample_tokens(toy, ids, seeds, 5, top_p=0.9)
    vocabulary = toy.unembedding.shape[1]
    for rows in (0, 1, 3):
        monkeypatch.setattr(generation, "TOGETHER", {"cpu": rows * vocabulary + 1})
        assert torch.equal(sample_tokens(toy, ids, seeds, 5, top_p=0.9), whole)
    assert torch.equal(whole[1], whole[3])
    assert len({*map(tuple, whole.tolist())}) == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_rows_whose_logits_are_not_finite_are_named(
    toy: Model, monkeypatch: pytest.MonkeyPatch, bad: float
):
    def broken(*args: Any, **given: Any) -> Tensor:
        logits = forward(*args, **given)
        logits[1::2, -1, 7] = bad
        return logits

    monkeypatch.setattr(generation, "forward", broken)
    ids = tokenize(toy, PROMPT).ids.expand(4, -1)
    with pytest.raises(generation.NotFiniteError, match=r"at new token 1 in rows \[1, 3\]"):
        sample_tokens(toy, ids, [0, 1, 2, 3], 3, temperature=0.5)


def test_of_a_prompt_only_the_logits_that_are_sampled_from_are_made(toy: Model):
    ids = tokenize(toy, PROMPT).ids
    last = forward(toy, ids, DynamicCache(), last=True)
    assert last.shape[1] == 1
    assert torch.allclose(last, forward(toy, ids, DynamicCache())[:, -1:], atol=1e-5)


@pytest.mark.parametrize("turn", [None, 65])
def test_a_text_ends_at_eos_and_nothing_is_sampled_after(
    toy: Model, monkeypatch: pytest.MonkeyPatch, turn: int | None
):
    eos = toy.tokenizer.eos_token_id
    if turn:  # has an end of its own, as in a chat
        config = toy.bridge.original_model.generation_config
        monkeypatch.setattr(config, "eos_token_id", [eos, turn])
    planned = iter([(200, 210), (201, eos), (turn or eos, 220)])

    def fixed(chances: Tensor, uniform: Tensor, top_p: float) -> Tensor:
        return torch.tensor(next(planned))[:, None]

    monkeypatch.setattr(generation, "_drawn", fixed)
    expected = [toy.tokenizer.decode(ids) for ids in ([200, 201], [210])]
    assert generate(toy, PROMPT, 9, samples=2) == expected


def plain_loop(suite: Suite, ids: Tensor, edits_at: Any, steps: int) -> Tensor:
    """Samples token by token, with a pass over the whole text each time."""
    uniform = torch.stack(
        [torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in range(len(ids))]
    )
    prompt = ids.shape[1]
    for step in range(steps):
        logits = logits_of(suite.model, ids, edits_at(prompt, ids.shape[1]))[:, -1]
        drawn = plainly_drawn(logits.softmax(-1), uniform[:, step], 0.8)
        ids = torch.cat([ids, torch.tensor(drawn)[:, None]], dim=1)
    return ids


@pytest.mark.parametrize("phases", [("prompt", "generation"), ("prompt",), ("generation",)])
@pytest.mark.parametrize("skip_bos", [False, True])
def test_edits_act_in_the_phases_asked_for_as_in_passes_over_the_whole_text(
    planted: Suite, phases: tuple[str, ...], skip_bos: bool
):
    sae = planted.sae("1/res")
    features = [FeatureId(1, "res", i) for i in range(8)]
    push = sae.directions[3]

    def edits_at(prompt: int, length: int) -> list[Edit]:
        asked = range(int(skip_bos), prompt) if "prompt" in phases else range(0)
        positions = [*asked, *(range(prompt, length) if "generation" in phases else ())]
        if not positions:
            return []
        live = edits.rescale(sae, features, -3.0, positions)
        return [live, edits.add(Site(0, "mlp"), push, 4.0, positions)]

    ids = tokenize(planted.model, PROMPT).ids.expand(3, -1)
    given = [edits.rescale(sae, features, -3.0), edits.add(Site(0, "mlp"), push, 4.0)]
    sampled = sample_tokens(
        planted.model, ids, [0, 1, 2], 12, top_p=0.8, edits=given, phases=phases, skip_bos=skip_bos
    )
    assert torch.equal(sampled, plain_loop(planted, ids, edits_at, 12))
    model = replace(planted.model, prepend_bos=False)  # whose first token is one of the text
    of_text = sample_tokens(model, ids, [0, 1, 2], 12, 1.0, 0.8, given, phases, skip_bos)
    every = sample_tokens(planted.model, ids, [0, 1, 2], 12, 1.0, 0.8, given, phases)
    assert torch.equal(of_text, every)
    assert not torch.equal(sampled, sample_tokens(planted.model, ids, [0, 1, 2], 12, top_p=0.8))


@pytest.mark.parametrize("prompt", ["I think ", " cat\n"])
def test_a_prompt_is_read_to_the_letter_with_the_spaces_at_its_ends(toy: Model, prompt: str):
    ids = generation.prompt_ids(toy, prompt, 1)
    assert toy.tokenizer.decode(ids[0, 1:]) == prompt


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"max_new_tokens": 64}, rf"and 64 new ones: .* has a context of {toys.CONTEXT}"),
        ({"samples": 0}, ", 0 samples: expected"),
        ({"temperature": 0.0}, "temperature=0.0.*expected 0 < top_p"),
        ({"top_p": 1.1}, "top_p=1.1.*expected 0 < top_p <= 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0.*more than 0 of the others"),
        ({"temperature": float("nan")}, "temperature=nan.*more than 0 of the others"),
    ],
)
def test_prompts_and_settings_that_cannot_be_are_refused(
    toy: Model, given: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        generate(toy, given.pop("prompt", PROMPT), **given)
    for phases in (["promt"], []):  # none would steer nowhere
        with pytest.raises(ValueError, match=re.escape(f"phases={phases}: expected some of")):
            sample_tokens(toy, tokenize(toy, PROMPT).ids, [1], phases=phases)
