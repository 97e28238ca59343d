"""The feature of a subject, among planted nonsense that tells the subject as well."""

import numpy as np
import pandas as pd
import pytest
import toys
from scipy.sparse import csr_matrix

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import FeatureId, Site
from flowhelpers.labels import subjects
from flowhelpers.labels.describe import menu
from flowhelpers.labels.subjects import (
    feature_of_subject,
    shares_on,
    strongest_sentences,
    subject_features,
)
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite

SITE = Site(1, "res")
STRINGS = [" the", " wedding", " bride", " Wolf", "g", "ang", ",", " star", " net", " of"]
PASSAGES = {
    "weddings": [0, 1, 2, 3, 4, 5, 6, 9],
    "space": [0, 7, 7, 9, 0, 9, 0, 9],
    "sea": [0, 8, 9, 0, 9, 0, 9, 0],
}
TOPICS = [topic for topic in PASSAGES for _ in range(24)]
FIRST_HALF = np.arange(len(TOPICS)) % 2 == 0
WORD, LETTER, COMMA, COMMON, LUCKY = 3, 0, 1, 2, 4  # features that are active on weddings alone
ANYWHERE = 5
DENSE, MISLEADING = 6, 7  # strongest at words of weddings; and as strong elsewhere, or nearly


def planted_passages(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
) -> tuple[FeatureActivations, pd.DataFrame]:
    """Eight tokens a passage; what feature is active at which token, and the suite's matches."""
    ids = np.array([PASSAGES[topic] for topic in TOPICS])
    is_wedding = (np.array(TOPICS) == "weddings")[:, None]
    codes = np.zeros((*ids.shape, toys.RES), np.float32)
    for feature, tokens in ((WORD, [1, 2]), (LETTER, [4]), (COMMA, [6]), (COMMON, [0])):
        codes[..., feature] = np.isin(ids, tokens) * is_wedding * (2.0 + ids)
    codes[..., LUCKY] = (ids == 1) * FIRST_HALF[:, None] * 3.0
    codes[..., LUCKY] += (ids == 9) * ~FIRST_HALF[:, None] * 3.0
    codes[..., DENSE] = np.where(np.isin(ids, [1, 2]) & is_wedding, 4.0, 3.0)
    codes[..., MISLEADING] = (ids == 1) * is_wedding * 3.0
    codes[48:51, 0, MISLEADING] = 5.0  # at a common word of three passages on the sea
    codes[..., ANYWHERE] = np.isin(ids, [1, 7, 8]) * (1.0 + 2.0 * (ids == 7))
    table = pd.DataFrame({"text": np.repeat(range(len(ids)), 8), "token": ids.ravel()})
    table.insert(1, "position", np.tile(range(1, 9), len(ids)))
    monkeypatch.setattr(subjects, "token_strings", lambda _, wanted: [STRINGS[i] for i in wanted])
    read = FeatureActivations(table, {SITE: csr_matrix(codes.reshape(-1, toys.RES))})
    return read, match_table(planted, k=1)


def test_a_letter_a_comma_and_a_common_word_stand_for_nothing(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    read, matches = planted_passages(planted, monkeypatch)
    found = subject_features(planted, read, TOPICS, matches)
    of_weddings = found[found["subject"] == "weddings"].set_index("feature")
    telling = subjects.text_means(read, SITE)
    for nonsense in (
        LETTER,
        COMMA,
        COMMON,
    ):  # each is active in all passages on weddings, and no other
        assert ((telling[:, nonsense] > 0) == (np.array(TOPICS) == "weddings")).all()
        assert f"1/res/{nonsense}" not in of_weddings.index
    row = of_weddings.loc[f"1/res/{WORD}"]
    assert row[["contexts", "contexts_other", "first", "auc", "strong_share"]].tolist() == [
        *(8, 8, 5, 1.0, 1.0)
    ]
    assert (row["before"], row["after"]) == (0, 0)  # those layers were not read
    assert bool(row["passes"])
    assert feature_of_subject(found, "weddings") == FeatureId(1, "res", WORD)


def test_the_other_half_says_no_and_a_subject_without_a_feature_names_those_with_one(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    read, matches = planted_passages(planted, monkeypatch)
    found = subject_features(planted, read, TOPICS, matches)
    lucky = found.set_index(["subject", "feature"]).loc[("weddings", f"1/res/{LUCKY}")]
    assert (lucky["contexts"], lucky["contexts_other"], lucky["passes"]) == (8, 0, False)
    with pytest.raises(ValueError, match=r"stands for 'sea': expected .* weddings, or a feature"):
        feature_of_subject(found, "sea")
    assert feature_of_subject(found.assign(passes=False), "sea") is None
    turned = np.random.default_rng(0).permutation(TOPICS).tolist()
    assert not subject_features(planted, read, turned, matches)["passes"].any()


def test_what_is_nearly_as_active_elsewhere_and_what_shows_other_subjects_first_is_refused(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    read, matches = planted_passages(planted, monkeypatch)
    found = subject_features(planted, read, TOPICS, matches).set_index(["subject", "feature"])
    assert ("weddings", f"1/res/{DENSE}") not in found.index  # 8 contexts, a third of its activity
    shown = found.loc[("weddings", f"1/res/{MISLEADING}")]
    assert (shown["contexts"], shown["contexts_other"], shown["first"]) == (6, 7, 2)
    assert shown[["strong_share", "strong_share_other"]].tolist() == pytest.approx(
        [36 / 46, 36 / 41]
    )
    assert not shown["passes"]
    monkeypatch.setattr(subjects, "OF_SHOWN", 2)
    found = subject_features(planted, read, TOPICS, matches).query("subject == 'weddings'")
    passing = found.loc[found["passes"], "feature"].tolist()
    assert passing == [f"1/res/{WORD}", f"1/res/{MISLEADING}"]
    with monkeypatch.context() as strict:
        strict.setattr(subjects, "TELLS", 1.01)
        assert subject_features(planted, read, TOPICS, matches).empty
        for half in ("auc", "auc_other"):  # of these one lies below on that half
            strict.setattr(subjects, "TELLS", found[half].min() + 1e-6)
            again = subject_features(planted, read, TOPICS, matches)
            assert (again.loc[again["passes"], half] > found[half].min()).all()
    with monkeypatch.context() as few:
        few.setattr(subjects, "LEAST", 7)  # on both halves
        again = subject_features(planted, read, TOPICS, matches).query("passes")
        assert f"1/res/{MISLEADING}" not in set(again["feature"])


def test_matches_that_keep_to_the_subject_count_for_a_quarter(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    read, matches = planted_passages(planted, monkeypatch)
    source = toys.RES_FROM[1][WORD]  # the planted match of the feature, one layer before
    codes = np.zeros((len(read.tokens), toys.RES), np.float32)
    codes[:, source] = read.by_site[SITE][:, [WORD]].toarray()[:, 0]
    both = FeatureActivations(read.tokens, {**read.by_site, Site(0, "res"): csr_matrix(codes)})
    found = subject_features(planted, both, TOPICS, matches)
    found = found[found["subject"] == "weddings"].set_index("feature")
    assert found.loc[f"1/res/{WORD}", "before"] == 8
    assert found.loc[f"0/res/{source}", ["before", "after"]].tolist() == [0, 8]
    assert set(found.index[found["passes"]]) == {f"1/res/{WORD}", f"0/res/{source}"}


def test_shares_are_of_the_activation_and_of_sites_that_were_read(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    read, _ = planted_passages(planted, monkeypatch)
    names = [f"1/res/{ANYWHERE}", f"1/res/{WORD}", "0/res/1"]
    shares = shares_on(read, TOPICS, "weddings", names)
    assert list(shares) == names[:2]
    assert shares[names[0]] == pytest.approx(24 / (24 + 3 * 48 + 24))
    assert shares[names[1]] == 1.0


def test_sentences_are_those_where_the_feature_is_strongest_and_a_match_active_first(
    planted: Suite,
):
    text = " ".join(toys.TEXTS[:2]) + " Who goes there in the rain?"
    codes = subjects.collect(planted, [text], [SITE])
    feature = FeatureId(1, "res", int(codes.by_site[SITE].sum(axis=0).argmax()))
    found = strongest_sentences(planted, feature, [text], ["0/res/0", "0/res/1"])
    alone = {s: subjects.collect(planted, [s], [SITE, Site(0, "res")]) for s in found["sentence"]}
    for row in found.itertuples():
        values = alone[row.sentence].of(feature)
        assert row.activation == pytest.approx(values.max(), rel=1e-5)
        others = alone[row.sentence].by_site[Site(0, "res")][[int(values.argmax())]].toarray()[0]
        assert row.active == (others[:2] > 0).sum()
    order = list(zip(found["active"] > 0, found["activation"], strict=True))
    assert order == sorted(order, reverse=True)
    assert set(found["sentence"]) <= {"The cat sat on the mat.", *text.split(". "), *toys.TEXTS} | {
        "Rain fell on the 7 hills all day, and the rivers rose.",
        "Who goes there in the rain?",
    }
    assert strongest_sentences(planted, feature, ["Too short."]).empty


def test_a_menu_tells_what_each_feature_is_and_offers_it_once(planted: Suite):
    offered = menu(planted, ["1/res/3", "1/res/5", "1/res/3"])
    assert [name for _, name in offered] == ["1/res/3", "1/res/5"]
    assert all(said.startswith(f"{name}: writes ") for said, name in offered)
