"""The door to the model: its sites are what they are called, edits reach and leave no trace."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from transformers import AutoTokenizer, Gemma3ForCausalLM
from transformers.utils import logging

import flowhelpers.suites.model as models
from flowhelpers.core.features import Site
from flowhelpers.interventions import edits
from flowhelpers.suites.bridge import check_sites, load_model
from flowhelpers.suites.model import (
    Edit,
    Model,
    editing,
    final_norm,
    logits_of,
    run_model,
    token_strings,
    tokenize,
)

SITES = [Site(layer, module) for layer in range(3) for module in ("att", "mlp", "res")]
PROMPT = toys.TEXTS[1]


@pytest.fixture
def ids(toy: Model) -> Tensor:
    return tokenize(toy, [toys.TEXTS[0], toys.TEXTS[1]]).ids


def plus(site: Site, size: float = 1.0) -> Edit:
    return edits.add(site, torch.arange(toys.D_MODEL) - 10.0, size)


def hooks_on(model: Model) -> int:
    return sum(len(module._forward_hooks) for module in model.bridge.modules())


def test_reading_equals_plain_hooks_on_the_same_weights(
    toy: Model, plain_toy: Gemma3ForCausalLM, ids: Tensor
):
    logits, read = run_model(toy, ids, read=SITES)
    by_hand, activations = toys.read_by_hand(plain_toy, ids)
    assert logits is not None
    assert torch.allclose(logits, by_hand, atol=1e-5)
    assert list(read) == SITES
    for site in SITES:
        assert torch.allclose(read[site], activations[site], atol=1e-5), site
    for layer in (1, 2):
        parts = [read[site] for site in (Site(layer - 1, "res"), *SITES[3 * layer : 3 * layer + 2])]
        assert torch.allclose(sum(parts[1:], parts[0]), read[Site(layer, "res")], atol=1e-5)


def raw_mlp(layer: int) -> Callable[[Model, Site], str]:
    """The site's hook, but at one layer the MLP's output before its post-norm."""
    true_name = models.hook_name

    def name(model: Model, site: Site) -> str:
        broken = site == Site(layer, "mlp")
        return f"blocks.{layer}.mlp.hook_out" if broken else true_name(model, site)

    return name


def test_a_site_before_its_norm_is_refused_by_layer_and_size(
    toy: Model, plain_toy: Gemma3ForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    ids = torch.arange(1, 9)[None] * (toys.VOCABULARY // 10)
    raw: list[Tensor] = []
    mlp = plain_toy.get_submodule("model.layers.1.mlp")
    handle = mlp.register_forward_hook(lambda *a: raw.append(a[2]))
    _, read = toys.read_by_hand(plain_toy, ids)
    handle.remove()
    missing = (read[Site(1, "mlp")] - raw[0]).abs().max() / read[Site(1, "res")].abs().max()
    monkeypatch.setattr(models, "hook_name", raw_mlp(1))
    with pytest.raises(ValueError, match="at layer 1 the stream before plus") as error:
        check_sites(toy)
    assert f"by {missing:.2%} of its size (allowed 0.01%)" in str(error.value)
    assert missing > 0.01


def test_a_hook_name_that_means_nothing_is_noticed_on_load(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    # TransformerLens itself says nothing of a hook that does not exist.
    monkeypatch.setitem(models.HOOKS, "res", "blocks.{layer}.hook_resid_pst")
    with pytest.raises(ValueError, match="0/res, 1/res, 2/res was never reached"):
        load_model(str(toy_folder))
    assert logging.is_progress_bar_enabled()  # as it was before


class Deaf:
    """The bridge, except that hooks at one site are never called, or what they return is lost."""

    def __init__(self, bridge: Any, site: Site, called: bool = True) -> None:
        self.bridge, self.hook = bridge, models.HOOKS[site.module].format(layer=site.layer)
        self.called = called

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bridge, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.bridge(*args, **kwargs)

    def hooks(self, fwd_hooks: list[tuple[str, Any]]) -> Any:
        def silent(function: Any) -> Any:
            return lambda *a, **k: (function(*a, **k) if self.called else None, None)[1]

        kept = [(n, silent(f) if n == self.hook else f) for n, f in fwd_hooks]
        return self.bridge.hooks(fwd_hooks=kept)


@pytest.mark.parametrize("site", [Site(1, "att"), Site(0, "res"), Site(2, "mlp")], ids=str)
def test_a_site_that_cannot_be_edited_or_is_never_reached_is_refused(toy: Model, site: Site):
    check_sites(toy)
    with pytest.raises(ValueError, match=f"a vector added at {site} left the logits as they were"):
        check_sites(dataclasses.replace(toy, bridge=Deaf(toy.bridge, site)))
    with pytest.raises(RuntimeError, match=f"edit at {site} was never reached by a forward pass"):
        check_sites(dataclasses.replace(toy, bridge=Deaf(toy.bridge, site, called=False)))


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_zero_edit_leaves_the_logits_bit_equal_and_another_does_not(
    toy: Model, ids: Tensor, site: Site
):
    plain = logits_of(toy, ids)
    assert torch.equal(logits_of(toy, ids, [plus(site, 0.0)]), plain)
    changed = logits_of(toy, ids, [plus(site)])
    assert ((changed - plain).abs().amax(-1) > 1e-3).all()


def test_an_edit_of_the_mlp_changes_what_comes_after_and_nothing_before(toy: Model, ids: Tensor):
    edit = plus(Site(1, "mlp"), 0.25)
    vector = 0.25 * (torch.arange(toys.D_MODEL) - 10.0)
    _, clean = run_model(toy, ids, read=SITES)
    _, edited = run_model(toy, ids, read=SITES, edits=[edit])
    for site in SITES[:4]:
        assert torch.equal(edited[site], clean[site]), site
    for site in (Site(1, "mlp"), Site(1, "res")):
        assert torch.allclose(edited[site] - clean[site], vector.expand_as(clean[site]), atol=1e-5)
    assert not torch.allclose(edited[Site(2, "att")], clean[Site(2, "att")], atol=1e-3)


def test_edits_of_one_site_are_applied_in_order_and_read_after(toy: Model, ids: Tensor):
    site = Site(0, "att")
    _, clean = run_model(toy, ids, read=[site])
    double, more = Edit(site, lambda x: 2 * x), Edit(site, lambda x: x + 1)
    _, first = run_model(toy, ids, read=[site], edits=[more, double])
    _, second = run_model(toy, ids, read=[site], edits=[double, more])
    assert torch.equal(first[site], 2 * (clean[site] + 1))
    assert torch.equal(second[site], 2 * clean[site] + 1)


def test_edits_leave_no_hooks_and_no_change_behind_even_if_one_fails(toy: Model, ids: Tensor):
    def fail(activations: Tensor) -> Tensor:
        raise ZeroDivisionError("planted")

    before, plain = hooks_on(toy), logits_of(toy, ids)
    with editing(toy, [plus(Site(1, "res"))]):
        assert hooks_on(toy) > before
        assert not torch.equal(toy.bridge(ids), plain)
    assert hooks_on(toy) == before
    run_model(toy, ids, read=SITES[:3], edits=[plus(Site(0, "res"))], stop_after=0)
    assert hooks_on(toy) == before
    with pytest.raises(ZeroDivisionError, match="planted"):
        logits_of(toy, ids, [plus(Site(0, "mlp")), Edit(Site(1, "att"), fail)])
    with pytest.raises(KeyboardInterrupt), editing(toy, [plus(Site(0, "mlp"))]):
        raise KeyboardInterrupt
    assert hooks_on(toy) == before
    assert torch.equal(logits_of(toy, ids), plain)


def test_an_edit_that_is_never_reached_is_an_error(toy: Model):
    two = [plus(Site(0, "att")), plus(Site(2, "mlp"))]
    with pytest.raises(RuntimeError, match="edit at 0/att, 2/mlp was never"), editing(toy, two):
        pass


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"edits": [plus(Site(0, "att")), plus(Site(2, "mlp"))], "stop_after": 1},
            "2/mlp lies after layer 1, where the pass stops",
        ),
        (
            {"read": [Site(1, "res")], "stop_after": 0},
            "1/res lies after layer 0, where the pass stops",
        ),
        (
            {"edits": [Edit(Site(1, "res"), lambda x: x[:, 1:])]},
            r"1/res gave shape \(1, 3, 32\): expected \(1, 4, 32\)",
        ),
        ({"read": [Site(3, "res")]}, "no layer 3 in .*: expected 0 to 2"),
        ({"read": [Site(-1, "res")]}, "no layer -1 in .*: expected 0 to 2"),
        ({"read": [Site(0, "resid")]}, "unknown module 'resid'; did you mean 'res'"),
    ],
)
def test_an_edit_of_another_shape_or_a_place_that_is_not_there_is_named(
    toy: Model, asked: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        run_model(toy, torch.arange(1, 5)[None], **asked)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_pass_that_stops_early_reads_what_the_full_one_reads(toy: Model, ids: Tensor, stop: int):
    sites = [site for site in SITES if site.layer <= stop]
    change = [plus(Site(0, "mlp"))]
    _, full = run_model(toy, ids, read=sites, edits=change)
    seen: list[int] = []
    hooks = [
        (f"blocks.{layer}.hook_mlp_out", lambda x, hook, layer=layer: seen.append(layer))
        for layer in range(3)
    ]
    with toy.bridge.hooks(fwd_hooks=hooks):
        logits, short = run_model(toy, ids, read=sites, edits=change, stop_after=stop)
    assert logits is None
    assert seen == list(range(stop + 1))
    assert all(torch.equal(short[site], full[site]) for site in sites)


def test_the_final_norm_and_the_unembedding_are_those_of_the_model(
    toy: Model, plain_toy: Gemma3ForCausalLM, ids: Tensor
):
    logits, read = run_model(toy, ids, read=[Site(2, "res")])
    stream = read[Site(2, "res")]
    with torch.no_grad():
        expected = plain_toy.model.norm(stream)
    assert torch.allclose(final_norm(toy, stream), expected, atol=1e-6)
    assert torch.allclose(final_norm(toy, stream[1, 3]), expected[1, 3], atol=1e-6)
    assert logits is not None
    assert torch.allclose(final_norm(toy, stream) @ toy.unembedding, logits, atol=1e-4)


def test_bos_stands_in_front_once_and_padding_behind(toy: Model):
    tokenizer = toy.tokenizer
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    tokens = tokenize(toy, [toys.TEXTS[1], "a", "", "<bos>a"])
    single = [tokenizer(text)["input_ids"] for text in (toys.TEXTS[1], "a", "")]
    assert [row.count(bos) for row in tokens.ids.tolist()] == [1, 1, 1, 1]
    for row, mask, expected in zip(tokens.ids, tokens.is_text, [*single, single[1]], strict=True):
        length = len(expected)
        assert row[:length].tolist() == expected
        assert row[length:].tolist() == [pad] * (len(row) - length)
        assert mask.tolist() == [False] + [True] * (length - 1) + [False] * (len(row) - length)
    assert tokens.ids.shape[1] == len(single[0])


def test_special_tokens_inside_a_text_are_not_text(toy: Model):
    tokens = tokenize(toy, "a<eos>b<bos>c")
    ids = tokens.ids[0].tolist()
    assert token_strings(toy, ids) == ["<bos>", "a", "<eos>", "b", "<bos>", "c"]
    assert tokens.is_text[0].tolist() == [False, True, False, True, False, True]
    cut = tokenize(toy, "a<eos>b<bos>c", max_tokens=3)
    assert cut.ids[0].tolist() == ids[:3]  # BOS counted
    with pytest.raises(ValueError, match="max_tokens=0"):
        tokenize(toy, toys.TEXTS, max_tokens=0)
    with pytest.raises(ValueError, match="no text given"):
        tokenize(toy, [])


def test_a_tokenizer_without_bos_begins_with_eos(toy: Model, toy_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    tokenizer.bos_token = None
    tokenizer.pad_token = None

    other = dataclasses.replace(toy, tokenizer=tokenizer)
    tokens = tokenize(other, ["ab", "a"])
    eos = tokenizer.eos_token_id
    assert tokens.ids[:, 0].tolist() == [eos, eos]
    assert tokens.is_text.sum(1).tolist() == [
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("ab", "a")
    ]


def test_the_tests_check_shapes_as_they_run(toy: Model):
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        logits_of(toy, torch.zeros(4, dtype=torch.long))
