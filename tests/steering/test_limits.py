"""What a judge cannot see: fluent nonsense is coherent to it, and words of other subjects count."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest

from flowhelpers import steering
from flowhelpers.activations.corpora import passages
from flowhelpers.steering.judge_embedded import EmbeddedJudge, embedded_judge
from flowhelpers.suites.load import load_suite

OWN = ["a particle of the same kind, and the particle is a", "the energy of the wave in a field"]


@pytest.fixture(scope="module")
def judge() -> EmbeddedJudge:
    return embedded_judge(load_suite("flowlet").model, "particle_physics")


def test_the_judge_tells_shuffled_words_and_loops_but_not_nonsense(judge: EmbeddedJudge):
    theme = steering.theme_of("particle_physics")
    limits = steering.judge_limits(judge, theme, OWN).set_index("text")
    assert limits["n"].tolist() == [24, 46, 46, 46, 46, 2]
    coherence = limits["coherence"]
    assert coherence["human, other subjects"] > 0.8
    assert coherence["halves of two of these"] > 0.6  # which no reader would call coherent
    assert coherence["their words shuffled"] < 0.35
    assert coherence["four words repeated"] < 0.5
    own = judge.judge(OWN)
    found = limits.loc["this model's own, unsteered", ["behavioral", "coherence"]]
    assert found.to_numpy(float) == pytest.approx(own.mean().to_numpy())
    on_theme, others = limits["behavioral"].iloc[:2]
    assert on_theme > 0.5 > 5 * others
    note = steering.limits_note(limits.reset_index())
    assert f"shuffled words {coherence['their words shuffled']:.2f}" in note


def test_pieces_are_as_long_as_the_model_s_own_and_judged_by_who_has_not_seen_them(
    judge: EmbeddedJudge,
):
    seen: list[Sequence[str]] = []

    class Spy:
        def judge(self, texts: Sequence[str]) -> pd.DataFrame:
            seen.append(texts)
            return pd.DataFrame({"behavioral": np.zeros(len(texts)), "coherence": 1.0})

    theme = steering.theme_of("particle_physics")
    plain = steering.judge_limits(Spy(), theme, OWN)
    assert (plain["behavioral"] == 0).all()
    assert {len(text.split()) for some in seen[:-1] for text in some} == {9}
    assert seen[-1] == OWN
    on_theme = seen[0]
    table = passages()
    numbers = table.index[table["subject"] == "particle_physics"]
    expected = []
    for number, text in zip(numbers, on_theme, strict=True):
        (unseen,) = (c for c, left_out in judge.folds if number in left_out)
        expected.append(judge.behavioral([text], unseen)[0])
    found = steering.judge_limits(judge, theme, OWN)["behavioral"][0]
    assert found == pytest.approx(np.mean(expected))
    assert found < judge.behavioral(on_theme).mean()  # of what it was trained on it is surer


def test_the_words_that_count_are_those_without_which_behavioral_falls(judge: EmbeddedJudge):
    texts = ["The Electron and the proton sat in a kitchen.", "kitchen", "the of and"]
    words = steering.theme_words(judge, texts)
    assert set(words[0].split(", ")[:2]) == {"Electron", "proton"}
    assert words[1:] == ["", ""]
    first = words[0].split(", ")[0]
    missing = 1 - judge.behavioral([texts[0], texts[0].replace(first, "")])
    assert missing[1] > 10 * missing[0]  # so sure is it that the odds alone tell
    assert steering.theme_words(object(), texts) == ["", "", ""]
    of_the_sea = "The sailors hauled the sails, and the ship rolled in the waves off the harbour."
    assert steering.nearest_subjects(judge, [of_the_sea, of_the_sea]) == "sea (2)"
    assert steering.nearest_subjects(judge, []) == ""
    assert steering.nearest_subjects(object(), texts) == ""
