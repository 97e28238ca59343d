"""A sample holds what it says; it is read once, goes on where it was stopped, and fits memory."""

import weakref
from collections import Counter
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
import toys

from flowhelpers.activations import sparse as activations
from flowhelpers.activations.corpora import LOCAL_DATASETS, PAPER_DATASETS, load_texts
from flowhelpers.activations.sampling import (
    MAX_TOKENS,
    Sample,
    datasets_for,
    draw_sample,
    sample_sizes,
    text_length,
    texts_of,
    unscored_texts,
)
from flowhelpers.activations.sparse import collect, read_sample
from flowhelpers.core.features import Site
from flowhelpers.matching.table import match_table
from flowhelpers.steering.plans import make_plan
from flowhelpers.suites.load import OnDemand, Suite
from flowhelpers.suites.model import Tokens, run_model
from flowhelpers.suites.registry import find_suite
from flowhelpers.suites.saes import SAE, make_sae

TEXTS = {"one": toys.TEXTS, "two": [*reversed(toys.TEXTS), "a"]}


@pytest.fixture(scope="module")
def sample(planted: Suite) -> Sample:
    """Three tokens of each text of two datasets."""
    return draw_sample(planted.model, TEXTS, tokens_per_text=3)


def test_tokens_are_drawn_without_repeats_and_never_special(planted: Suite, sample: Sample):
    special = set(planted.model.tokenizer.all_special_ids)
    assert not set(sample.tokens["token"]) & special
    assert (sample.tokens["position"] > 0).all()
    assert not sample.tokens.duplicated(["text", "position"]).any()
    counts = sample.tokens.groupby("text").size()
    eligible = sample.texts["eligible"]
    assert counts.to_dict() == {i: min(3, n) for i, n in enumerate(eligible) if n}
    ids = sample.ids.ids.numpy()
    for row in sample.tokens.itertuples():
        assert ids[row.text, row.position] == row.token
        assert row.dataset == sample.texts.loc[row.text, "dataset"]


def test_every_token_is_as_likely(planted: Suite):
    text = max(toys.TEXTS, key=len)
    counts: Counter[int] = Counter()
    for seed in range(300):
        drawn = draw_sample(planted.model, {"one": [text]}, 2, seed=seed)
        counts.update(drawn.tokens["position"])
    places = int(drawn.texts["eligible"][0])
    assert set(counts) == set(range(1, places + 1))
    expected = 600 / places
    assert max(abs(n - expected) for n in counts.values()) < 4 * expected**0.5


def test_what_there_is_stands_beside_what_was_asked_for(sample: Sample):
    sizes = sample_sizes(sample, 100, 3).set_index("dataset")
    one = sizes.loc["one", ["texts", "texts_asked", "tokens_asked"]].tolist()
    assert one == [len(toys.TEXTS), 100, 300]
    assert sizes["tokens"].sum() == len(sample.tokens)
    two = sample.texts[sample.texts["dataset"] == "two"]
    assert sizes.loc["two", "short_texts"] == (two["eligible"] < 3).sum() > 0


def test_a_dataset_with_fewer_texts_gives_all_it_has_and_each_suite_has_its_own():
    assert datasets_for(find_suite("flowlet")) == LOCAL_DATASETS
    assert datasets_for(find_suite("pythia-70m-deduped")) == tuple(PAPER_DATASETS)
    found = texts_of(["fiction", "maths"], 150)
    assert len(found["fiction"]) == 150
    assert sorted(found["maths"]) == sorted(load_texts("maths", None))
    assert len(found["maths"]) < 150
    with pytest.raises(ValueError, match="unknown corpus 'fictoin'; did you mean 'fiction'"):
        texts_of(["fictoin"], 5)
    for datasets in ([], ["maths", "maths"]):
        with pytest.raises(ValueError, match=r"expected some of fineweb, .*, each once"):
            texts_of(datasets, 5)
    with pytest.raises(ValueError, match="cannot load n=0 texts"):
        texts_of(["maths"], 0)


def test_pearson_reads_no_text_that_is_scored_even_of_the_same_corpus(tmp_path: Path):
    own, everything = tmp_path / "own.txt", load_texts("fiction", None)
    for seed in (0, 3):  # drawn with the same seed or another
        scored = [*load_texts("fiction", 150, seed), *load_texts("maths", 5)]
        left = unscored_texts("fiction", 200, scored)
        assert sorted(left) == sorted(set(everything) - set(scored))
        few = unscored_texts("fiction", 12, scored)
        assert few == left[:12] != unscored_texts("fiction", 12, scored, seed=1)
    own.write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\nThree.", "utf-8")
    assert unscored_texts(str(own), 5, ["Two.", "Four."]) in (
        ["One.", "Three."],
        ["Three.", "One."],
    )
    with pytest.raises(ValueError, match=r"all 3 texts of .*own.txt' are scored, and none is left"):
        unscored_texts(str(own), 5, ["One.", "Two.", "Three."])
    with pytest.raises(ValueError, match="0 texts of 'maths' for pearson: expected 1 or more"):
        unscored_texts("maths", 0, [])


def test_texts_longer_than_the_context_are_refused_unless_they_are_cut(planted: Suite):
    long, model = "The cat sat on the mat. " * 40, planted.model
    assert model.bridge.cfg.n_ctx == toys.CONTEXT < MAX_TOKENS
    for read in (lambda: collect(planted, [long]), lambda: draw_sample(model, {"one": [long]})):
        with pytest.raises(ValueError, match="has a context of 64; give max_tokens=64 or fewer"):
            read()
    assert collect(planted, [long], max_tokens=9).tokens["position"].max() == 8
    assert (text_length(model), text_length(model, 20)) == (toys.CONTEXT, 20)


def test_texts_without_a_token_to_choose_are_refused(planted: Suite):
    bos = planted.model.tokenizer.bos_token
    with pytest.raises(ValueError, match="'empty' has no text"):
        draw_sample(planted.model, {"one": toys.TEXTS, "empty": [bos, ""]})
    with pytest.raises(ValueError, match="tokens_per_text=0: expected 1 or more"):
        draw_sample(planted.model, TEXTS, 0)


def test_what_is_read_is_what_every_sae_says_of_the_whole_text(
    planted: Suite, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(activations, "READ_TOGETHER", 2)
    found = read_sample(planted, sample, tmp_path)
    pd.testing.assert_frame_equal(found.tokens, sample.tokens)
    whole = collect(planted, sample.texts["text"].tolist())
    place = whole.tokens.reset_index().set_index(["text", "position"])["index"]
    rows = place.loc[list(zip(sample.tokens["text"], sample.tokens["position"], strict=True))]
    assert set(found.by_site) == set(planted.saes)
    for site, codes in found.by_site.items():
        expected = whole.by_site[site][rows.to_numpy()].toarray()
        assert codes.nnz > 0
        assert codes.toarray() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("after", [1, 3])
def test_a_pass_that_was_stopped_goes_on_after_its_last_batch_and_ends_the_same(
    planted: Suite, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    monkeypatch.setattr(activations, "READ_TOGETHER", 2)
    monkeypatch.setattr(activations, "ENCODED_TOGETHER", 6)  # of one pass
    whole = read_sample(planted, sample, tmp_path / "whole")
    calls: list[int] = []
    true = activations.run_model

    def stopping(*args: object, **options: object) -> object:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return true(*args, **options)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(activations, "run_model", stopping)
        with pytest.raises(KeyboardInterrupt):
            read_sample(planted, sample, tmp_path / "stopped")
    after = -100  # nothing stops it any more
    monkeypatch.setattr(activations, "run_model", stopping)
    for _ in range(2):  # the second time all is on disk
        again = read_sample(planted, sample, tmp_path / "stopped")
        assert len(calls) == -(-len(sample.texts) // 2)  # each text is read once
        for site, codes in whole.by_site.items():
            assert (codes != again.by_site[site]).nnz == 0


def test_another_sample_model_or_sae_is_read_anew(planted: Suite, sample: Sample, tmp_path: Path):
    first = read_sample(planted, sample, tmp_path)
    for seed, folders in ((0, 1), (1, 2)):  # the same seed draws the same tokens
        read_sample(planted, draw_sample(planted.model, TEXTS, 3, seed=seed), tmp_path)
        assert len(list(tmp_path.iterdir())) == folders
    weight = next(planted.model.bridge.original_model.parameters())
    before = weight.clone()
    weight += 0.5  # in place, in the same session
    read_sample(planted, sample, tmp_path)
    weight.copy_(before)
    read_sample(planted, sample, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    site = Site(1, "res")
    changed = toys.write_lens_sae(torch.eye(16, toys.D_MODEL), site)
    saes = {**planted.saes, site: make_sae(site, changed, toys.D_MODEL, "changed")}
    found = read_sample(replace(planted, saes=saes), sample, tmp_path)
    assert (found.by_site[site] != first.by_site[site]).nnz > 0
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("kind", ["plan", "hook"])
def test_of_a_model_that_is_edited_nothing_is_kept_or_taken(
    planted: Suite, sample: Sample, tmp_path: Path, kind: str
):
    def edited() -> Any:
        if kind == "plan":
            return make_plan(planted, ["0/res/3"], 50.0, unit="unit").on(planted)
        layer = planted.model.bridge.original_model.get_submodule("model.layers.1")
        return layer.register_forward_pre_hook(lambda _, inputs: (3 * inputs[0], *inputs[1:]))

    site = Site(1, "res")
    with edited():
        first = read_sample(planted, sample, tmp_path).by_site[site]
    assert not list(tmp_path.iterdir())
    plain = read_sample(planted, sample, tmp_path).by_site[site]
    with edited():
        again = read_sample(planted, sample, tmp_path).by_site[site]
        with pytest.raises(ValueError, match="the model is being edited, and tables are kept"):
            match_table(planted, method="pearson", texts=toys.TEXTS)
    assert (first != again).nnz == 0
    assert (first != plain).nnz > 0


def test_what_is_kept_is_kept_under_the_shape_of_the_texts_and_how_it_is_made(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    ids = torch.arange(2, 26)
    keys = [
        activations._digest(planted, Tokens(ids.view(shape), ids.view(shape) > 0), 16, 1)
        for shape in ((4, 6), (3, 8))
    ]
    monkeypatch.setattr(activations, "VERSION", activations.VERSION + 1)
    tokens = Tokens(ids.view(4, 6), ids.view(4, 6) > 0)
    assert len({*keys, activations._digest(planted, tokens, 16, 1)}) == 3


def test_a_batch_on_disk_that_is_broken_is_made_again(
    planted: Suite, sample: Sample, tmp_path: Path
):
    first = read_sample(planted, sample, tmp_path)
    path = next(tmp_path.rglob("*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"\.npz is made again, it is truncated or corrupt"):
        again = read_sample(planted, sample, tmp_path)
    for site, codes in first.by_site.items():
        assert (codes != again.by_site[site]).nnz == 0


def test_no_more_than_a_few_saes_are_in_memory_and_each_is_loaded_once_for_many_texts(
    planted: Suite, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(activations, "READ_TOGETHER", 1)
    loaded: list[weakref.ref] = []
    alive: list[int] = []

    def load(site: Site) -> SAE:
        sae = copy(planted.sae(site))
        loaded.append(weakref.ref(sae))
        alive.append(sum(ref() is not None for ref in loaded))
        return sae

    suite = replace(planted, saes=OnDemand(planted.saes, load, kept=2))
    assert len(read_sample(suite, sample, tmp_path).by_site) == 9
    assert max(alive) <= 4  # two kept, one in use, and one that is being read
    assert len(alive) < 5 * 9  # and not once for each of the texts


def test_too_little_memory_is_told_before_the_pass(
    planted: Suite, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(activations, "run_model", None)
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryError, match=r"the sample needs .* GiB"):
        read_sample(planted, sample, tmp_path)


def test_a_sae_at_z_is_read_at_z(planted: Suite, sample: Sample, tmp_path: Path):
    at_z, att = Site(1, "z"), Site(1, "att")
    _, read = run_model(planted.model, sample.ids.ids, read=[at_z])
    sae = toys.sae_at_z(planted.model)
    suite = Suite(planted.row, planted.model, {**planted.saes, att: sae})
    found = read_sample(suite, sample, tmp_path).by_site[att]
    tokens = torch.tensor(sample.tokens[["text", "position"]].to_numpy())
    expected = sae.lens_sae.encode(read[at_z][tokens[:, 0], tokens[:, 1]]).detach().numpy()
    assert found.nnz > 0
    assert found.toarray() == pytest.approx(expected, abs=1e-4)
