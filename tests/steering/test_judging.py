"""The embedded judge ranks planted texts as anyone would, and says what it is worth."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flowhelpers.activations.corpora import load_texts, passages, subjects
from flowhelpers.steering.judge_embedded import (
    EmbeddedJudge,
    distinct_tokens,
    embedded_judge,
    mean_losses,
    stems,
    windows,
)
from flowhelpers.steering.reading import read_texts
from flowhelpers.suites.load import load_suite
from flowhelpers.suites.model import Model, logits_of, tokenize

# None of these is in the package.
OWN = {
    "space": "A comet crossed the sky; through the telescope the moons of Saturn were seen.",
    "cooking": "She stirred the soup, added salt and butter, and put the bread into the oven.",
    "war": "The soldiers loaded their rifles while the enemy artillery shelled the trenches.",
    "illness": "The doctor felt his pulse; the fever was high, the patient coughed all night.",
    "sea": "The sailors hauled the sails, and the ship rolled in the waves off the harbour.",
    "school": "The teacher wrote the sum on the blackboard, and the pupils copied the lesson.",
    "weddings": "The bride walked up the aisle, and the groom put the ring on her finger.",
}


@pytest.fixture(scope="module")
def model() -> Model:
    return load_suite("flowlet").model


@pytest.fixture(scope="module")
def judge(model: Model) -> EmbeddedJudge:
    return embedded_judge(model, "space")


def test_fluent_texts_stand_above_scrambled_and_looping_ones(
    model: Model, judge: EmbeddedJudge
) -> None:
    rng = np.random.default_rng(5)
    fluent = [windows(text)[0] for text in passages().groupby("subject").head(4)["text"]]
    fluent += [windows(text)[-1] for text in load_texts("maths", 30, 7)]
    scrambled = [" ".join(rng.permutation(text.split())) for text in fluent]
    high, low = (judge.judge(texts)["coherence"].to_numpy() for texts in (fluent, scrambled))
    assert (high > low).mean() >= 0.95
    assert (high[:, None] > low).mean() >= 0.95
    assert np.median(high) > 0.9
    assert np.median(low) < 0.25
    loops = ["the stars of the " * 9, "the moon " * 16, "It was the first time that " * 6]
    assert mean_losses(model, loops).max() < judge.human  # the loss alone would call it human
    assert judge.judge(loops)["coherence"].max() < 0.15
    assert judge.looped < 0.3 < 0.6 < judge.various <= 1


def test_texts_of_the_theme_stand_above_others(model: Model, judge: EmbeddedJudge) -> None:
    texts = list(OWN.values())
    for theme, text in OWN.items():
        scores = embedded_judge(model, theme).judge(texts)["behavioral"]
        assert texts[int(scores.argmax())] == text
        assert scores.max() > 2 * scores.drop(scores.argmax()).max()


def test_what_it_is_worth_is_measured_on_passages_left_out(
    model: Model, judge: EmbeddedJudge
) -> None:
    assert 0.75 < judge.accuracy < 1  # of 24 subjects
    aucs = [embedded_judge(model, theme).auc for theme in subjects()]
    assert 0.93 < min(aucs) <= max(aucs) <= 1
    assert np.mean(aucs) > 0.97
    with pytest.raises(ValueError, match="unknown theme 'spaec'; did you mean 'space'"):
        embedded_judge(model, "spaec")


def test_the_same_text_has_the_same_scores_and_an_empty_one_none(judge: EmbeddedJudge) -> None:
    texts = ["The stars shone.", "", "  \n", "Stars, planets and the moon."]
    first = judge.judge(texts)
    assert first.equals(judge.judge(texts))
    assert (first.loc[[1, 2]] == 0).all().all()
    assert (first.loc[[0, 3], "behavioral"] > 0.2).all()
    assert first.stack().between(0, 1).all()


def test_texts_are_shown_whole_and_what_speaks_for_the_theme_is_marked(
    judge: EmbeddedJudge,
) -> None:
    texts = ["A planet < 2 stars & <b>, the Planets", "<b>xyzzy\ufffd"]
    table = pd.DataFrame({"theme": "space", "text": texts, "score": 0.512345})
    page = read_texts(table, {"space": judge}).to_html()
    assert "A <mark>planet</mark> &lt; 2 <mark>stars</mark> &amp; &lt;b&gt;, the <mark>Pla" in page
    assert "&lt;b&gt;xyzzy(byte)" in page
    assert "0.51<" in page
    other: Any = SimpleNamespace()  # a judge that tells no words
    assert "<mark>" not in read_texts(table, {"space": other}).to_html()


def test_the_loss_is_that_of_each_text_alone(model: Model) -> None:
    import torch

    texts = ["The cat sat on the mat and looked at the moon.", "Rain.", "A long walk home, alone."]
    for text, loss in zip(texts, mean_losses(model, texts), strict=True):
        ids = tokenize(model, text).ids
        logits = logits_of(model, ids)[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        assert loss == pytest.approx(float(expected), rel=1e-4)
    assert np.isinf(mean_losses(model, [""])).all()


def test_windows_and_stems() -> None:
    text = " ".join(str(i) for i in range(75))
    assert [len(piece.split()) for piece in windows(text)] == [30, 30, 15]
    assert [len(piece.split()) for piece in windows(" ".join(["a"] * 74))] == [30, 30]
    assert windows("only three words") == ["only three words"]
    assert stems("Planets, planet's PLANETARY 42") == ["planet", "planet", "s", "planetari"]


def test_coherence_is_likelihood_times_variety(model: Model, judge: EmbeddedJudge) -> None:
    texts = [
        "The planets go round the sun, and the moon goes round the earth, and the earth goes.",
        "Sun moon the of planet the stars a the in light the of a the the gas.",
        "The cat sat on the mat and the cat sat on the mat and the dog sat on the cat.",
    ]
    likely = (judge.shuffled - mean_losses(model, texts)) / (judge.shuffled - judge.human)
    various = distinct_tokens(model, texts) - judge.looped
    various = various / (judge.various - judge.looped)
    expected = np.clip(likely, 0, 1) * np.clip(various, 0, 1)
    assert ((expected > 0.02) & (expected < 0.98)).any()
    assert judge.judge(texts)["coherence"].to_numpy() == pytest.approx(expected, abs=1e-6)


def test_different_tokens_are_counted_in_pieces(model: Model) -> None:
    words = [" cat", " moon", " tree", " house", " water", " hand"]
    ids = model.tokenizer(words, add_special_tokens=False)["input_ids"]
    assert all(len(row) == 1 for row in ids)  # so that a word is a token
    cat, moon, tree, house, water, hand = words
    expected = {
        cat * 12: 1 / 12,
        (cat + moon + tree) * 4: 3 / 12,
        cat * 4 + moon + tree + house + water + hand: 6 / 9,
        cat * 8: 1.0,  # eight tokens of 32 are too few to tell
        cat * 9: 1 / 9,
        cat * 32 + moon * 16: (1 / 32 + 1 / 16) / 2,
        cat * 16 + moon * 16 + (cat + moon + tree + house) * 8: (2 / 32 + 4 / 32) / 2,
        cat * 32 + (moon + tree) * 4: 1 / 32,  # the rest is too short
        "": 1.0,
    }
    found = distinct_tokens(model, list(expected))
    assert found.tolist() == pytest.approx(list(expected.values()))
