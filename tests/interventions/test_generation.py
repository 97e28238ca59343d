"""Sampling: seeds, the nucleus, and where edits act."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import Tensor

from flowhelpers.core.features import FeatureId, Site
from flowhelpers.interventions import edits, generation
from flowhelpers.interventions.generation import generate, sample_tokens
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Edit, Model, logits_of, tokenize

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
    chances = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]])
    for top_p, kept in ((0.39, [1]), (0.41, [1, 3]), (0.66, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4])):
        found = torch.from_numpy(generation._nucleus(chances.log(), top_p))
        expected = torch.zeros(1, 5)
        expected[:, kept] = chances[:, kept]
        assert torch.allclose(found, expected, atol=1e-6), top_p


def test_tokens_are_drawn_as_often_as_their_chances_say():
    chances = np.array([[0.0, 0.3, 0.0, 0.1, 0.2, 0.0]])
    known = {0.0: 1, 0.499: 1, 0.501: 3, 0.66: 3, 0.67: 4, 1 - 1e-7: 4}  # of a sum of 0.6
    uniform = np.array([*known], dtype=np.float32)
    drawn = generation._drawn(chances.repeat(len(known), axis=0), uniform)
    assert drawn[:, 0].tolist() == [*known.values()]


def test_a_text_ends_at_eos_and_nothing_is_sampled_after(
    toy: Model, monkeypatch: pytest.MonkeyPatch
):
    eos = toy.tokenizer.eos_token_id
    planned = iter([(200, 210), (201, eos), (eos, 220)])

    def fixed(logits: Tensor, top_p: float) -> np.ndarray:
        chosen = torch.tensor(next(planned))
        return torch.nn.functional.one_hot(chosen, logits.shape[1]).float().numpy()

    monkeypatch.setattr(generation, "_nucleus", fixed)
    expected = [toy.tokenizer.decode(ids) for ids in ([200, 201], [210])]
    assert generate(toy, PROMPT, 9, samples=2) == expected


def plain_loop(suite: Suite, ids: Tensor, edits_at: Any, steps: int) -> Tensor:
    """Samples token by token, with a pass over the whole text each time."""
    uniform = np.stack([torch.rand(steps, generator=torch.Generator().manual_seed(s)).numpy()
                        for s in range(len(ids))])  # fmt: skip
    prompt = ids.shape[1]
    for step in range(steps):
        logits = logits_of(suite.model, ids, edits_at(prompt, ids.shape[1]))[:, -1]
        drawn = generation._drawn(generation._nucleus(logits, 0.8), uniform[:, step])
        ids = torch.cat([ids, drawn], dim=1)
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
