"""Collected activations are those of one text at a time, encoded by hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from flowhelpers.activations import sparse
from flowhelpers.activations.sampling import draw_sample
from flowhelpers.activations.sparse import collect, read_sample
from flowhelpers.core.features import FeatureId, Site
from flowhelpers.suites.load import OnDemand, Suite
from flowhelpers.suites.model import Tokens, run_model, tokenize
from flowhelpers.suites.saes import SAE

LAST = Site(2, "res")


def by_hand(suite: Suite, site: Site, texts: list[str]) -> np.ndarray:
    rows = []
    for text in texts:
        ids = tokenize(suite.model, text).ids
        _, read = run_model(suite.model, ids, read=[site])
        rows.append(suite.sae(site).encode(read[site][0, 1:]))
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_activations_are_those_of_each_text_alone(planted: Suite, batch: int):
    found = collect(planted, toys.TEXTS, batch_size=batch)
    assert list(found.by_site) == list(planted.saes)
    for site in planted.saes:
        expected = by_hand(planted, site, toys.TEXTS)
        assert found.by_site[site].shape == expected.shape
        assert np.allclose(found.by_site[site].toarray(), expected, atol=1e-4)
        assert 0.05 < (expected > 0).mean() < 0.5


def test_the_rows_are_the_tokens_of_the_texts_without_bos_and_padding(planted: Suite):
    found = collect(planted, toys.TEXTS, [LAST], batch_size=2)
    encode = planted.model.tokenizer
    expected = [
        (number, position + 1, token)
        for number, text in enumerate(toys.TEXTS)
        for position, token in enumerate(encode(text, add_special_tokens=False)["input_ids"])
    ]
    assert list(found.tokens.itertuples(index=False, name=None)) == expected
    assert found.by_site[LAST].shape == (len(expected), toys.RES)
    column = found.by_site[LAST].toarray()[:, 9]
    assert np.array_equal(found.of(FeatureId(2, "res", 9)), column)
    assert not set(found.tokens["token"]) & set(encode.all_special_ids)
    with pytest.raises(ValueError, match="batch_size=0: expected 1 or more"):
        collect(planted, toys.TEXTS, [LAST], batch_size=0)
    cut = collect(planted, toys.TEXTS, [LAST], max_tokens=4)
    kept = (found.tokens["position"] <= 3).to_numpy()
    assert cut.tokens.equals(found.tokens[kept].reset_index(drop=True))
    expected = found.by_site[LAST].toarray()[kept]
    assert np.allclose(cut.by_site[LAST].toarray(), expected, atol=1e-4)


def test_special_tokens_inside_a_text_and_what_is_not_marked_are_left_out(planted: Suite):
    found = collect(planted, ["ab<eos>cd"], [LAST])
    whole = by_hand(planted, LAST, ["ab<eos>cd"])
    ids = tokenize(planted.model, "ab<eos>cd").ids[0, 1:].tolist()
    kept = [i for i, token in enumerate(ids) if token != planted.model.tokenizer.eos_token_id]
    assert len(kept) == len(ids) - 1
    assert np.allclose(found.by_site[LAST].toarray(), whole[kept], atol=1e-4)
    assert found.tokens["position"].tolist() == [i + 1 for i in kept]
    tokens = tokenize(planted.model, toys.TEXTS[:1])
    mask = torch.zeros_like(tokens.is_text)
    mask[0, [2, 5]] = True
    found = collect(planted, Tokens(tokens.ids, mask), [LAST])
    expected = by_hand(planted, LAST, toys.TEXTS[:1])[[1, 4]]
    assert np.allclose(found.by_site[LAST].toarray(), expected, atol=1e-4)


def test_texts_without_a_token_are_no_hindrance(planted: Suite):
    found = collect(planted, ["", "", toys.TEXTS[0], ""], [LAST], batch_size=2)
    assert set(found.tokens["text"]) == {2}
    expected = by_hand(planted, LAST, [toys.TEXTS[0]])
    assert np.allclose(found.by_site[LAST].toarray(), expected, atol=1e-4)
    with pytest.raises(ValueError, match="no token is left to read"):
        collect(planted, ["", "<eos>"], [LAST])


def few_at_a_time(planted: Suite) -> tuple[Suite, Counter[Site]]:
    """The suite with room for two SAEs, and how often each was loaded."""
    loads: Counter[Site] = Counter()

    def load(site: Site) -> SAE:
        loads[site] += 1
        return planted.saes[site]

    return Suite(planted.row, planted.model, OnDemand(planted.saes, load, kept=2)), loads


@pytest.mark.parametrize(("room", "batches"), [(10**9, 1), (3, 2), (2, 3), (0.5, 5)])
def test_where_few_saes_fit_each_is_loaded_once_for_as_many_texts_as_memory_holds(
    planted: Suite, monkeypatch: pytest.MonkeyPatch, room: float, batches: int
):
    few, loads = few_at_a_time(planted)
    longest = int(tokenize(planted.model, toys.TEXTS).is_text.sum(1).max())
    of_text = longest * toys.D_MODEL * 4 * len(planted.saes)
    monkeypatch.setattr(sparse, "free_memory", lambda: int(2 * room * of_text))
    found = collect(few, toys.TEXTS, batch_size=1)
    assert loads == dict.fromkeys(planted.saes, batches + 1)  # before, for where it reads
    whole = collect(planted, toys.TEXTS, batch_size=1)
    for site in planted.saes:
        assert np.allclose(found.by_site[site].toarray(), whole.by_site[site].toarray(), atol=1e-6)
    collect(few, toys.TEXTS, batch_size=1)
    assert loads == dict.fromkeys(planted.saes, 2 * batches + 1)
    monkeypatch.setattr(sparse, "HELD", of_text)  # free or not
    collect(few, toys.TEXTS, batch_size=1)
    assert loads == dict.fromkeys(planted.saes, 2 * batches + 1 + len(toys.TEXTS))


def test_a_sample_kept_with_other_room_is_not_mistaken_and_a_kept_one_loads_nothing(
    planted: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(sparse, "READ_TOGETHER", 1)
    monkeypatch.setattr(sparse, "ENCODED_TOGETHER", 1)
    sample = draw_sample(planted.model, {"own": toys.TEXTS})
    expected = read_sample(planted, sample, tmp_path / "whole")
    few, loads = few_at_a_time(planted)
    for room in (10**6, 10**9, 10**6):
        monkeypatch.setattr(sparse, "HELD", room // 1000)
        found = read_sample(few, sample, tmp_path)
        for site, codes in expected.by_site.items():
            assert np.allclose(found.by_site[site].toarray(), codes.toarray(), atol=1e-6)
        made = {site: loads[site] for site in planted.saes}
        assert read_sample(few, sample, tmp_path).tokens is sample.tokens
        assert loads == made
    assert max(made.values()) <= 2 + 1 + len(toys.TEXTS)


def test_chosen_sites_are_read_and_the_pass_stops_after_them(planted: Suite):
    calls: list[int] = []
    hook = ("blocks.1.hook_attn_out", lambda x, hook: calls.append(1))
    with planted.model.bridge.hooks(fwd_hooks=[hook]):
        found = collect(planted, toys.TEXTS, [Site(0, "mlp"), Site(0, "res")])
    assert list(found.by_site) == [Site(0, "mlp"), Site(0, "res")]
    assert calls == []
    with pytest.raises(ValueError, match="no layer 7 in suite"):
        collect(planted, toys.TEXTS, [Site(7, "res")])
