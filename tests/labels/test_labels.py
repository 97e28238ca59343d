"""What a feature writes and where it is active, on planted directions and activations."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score
from transformers import Gemma3ForCausalLM

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import FeatureId, Site
from flowhelpers.labels.describe import (
    describe_features,
    read_labels,
    subject_scores,
    top_contexts,
    top_logit_tokens,
    top_tokens,
)
from flowhelpers.labels.plots import token_text
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import token_strings

SITE = Site(1, "res")


def activations_of(texts: list[list[tuple[int, float]]], feature: int = 3) -> FeatureActivations:
    """Activations of one feature, from the token ids of texts and its activation at each."""
    flat = [(i, j + 1, *pair) for i, text in enumerate(texts) for j, pair in enumerate(text)]
    codes = np.zeros((len(flat), toys.RES), dtype=np.float32)
    codes[:, feature] = [row[3] for row in flat]
    tokens = pd.DataFrame([row[:3] for row in flat], columns=["text", "position", "token"])
    return FeatureActivations(tokens, {SITE: csr_matrix(codes)})


def test_written_tokens_are_the_logit_lens_by_hand(planted: Suite, plain_toy: Gemma3ForCausalLM):
    direction = planted.sae(SITE).directions[5]
    with torch.no_grad():
        logits = plain_toy.lm_head(plain_toy.model.norm(direction))
    best = (logits - logits.mean()).sort(descending=True)
    found = top_logit_tokens(planted, "1/res/5", k=7)
    assert found["token"].tolist() == token_strings(planted.model, best.indices[:7].tolist())
    assert found["logit"].to_numpy() == pytest.approx(best.values[:7].numpy(), abs=1e-4)


def test_top_tokens_are_listed_once_by_their_highest_activation(planted: Suite):
    texts = [[(70, 1.0), (71, 5.0), (70, 3.0)], [(72, 0.0), (70, 2.0), (73, 4.0)]]
    found = top_tokens(planted, "1/res/3", activations_of(texts), k=2)
    assert found["token"].tolist() == token_strings(planted.model, [71, 73])
    found = top_tokens(planted, "1/res/3", activations_of(texts))
    assert found["token"].tolist() == token_strings(planted.model, [71, 73, 70])
    assert found["activation"].tolist() == [5.0, 4.0, 3.0]
    assert found["count"].tolist() == [1, 1, 3]
    assert top_tokens(planted, "1/res/4", activations_of(texts)).empty
    with pytest.raises(ValueError, match="no feature 1/res/16 in "):
        top_tokens(planted, "1/res/16", activations_of(texts))


def test_top_contexts_come_from_different_texts_and_keep_to_their_own(planted: Suite):
    ids = [[70, 71, 72, 73, 74], [80, 81, 82, 83], [90, 91, 92]]
    values = [[1.0, 0.0, 7.0, 6.0, 0.0], [0.0, 2.0, 0.0, 0.0], [9.0, 0.0, 0.0]]
    texts = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    found = top_contexts(planted, "1/res/3", activations_of(texts), width=1)
    decode = planted.model.tokenizer.decode
    assert found["text"].tolist() == [2, 0, 1]
    assert found["activation"].tolist() == [9.0, 7.0, 2.0]
    assert found["before"].tolist() == ["", decode([71]), decode([80])]
    assert found["token"].tolist() == [decode([90]), decode([72]), decode([81])]
    assert found["after"].tolist() == [decode([91]), decode([73]), decode([82])]
    wide = top_contexts(planted, "1/res/3", activations_of(texts), k=1, width=50)
    assert wide["after"].tolist() == [decode([91, 92])]
    assert top_contexts(planted, "1/res/4", activations_of(texts)).empty


def test_a_description_says_what_is_written_and_what_is_read(planted: Suite):
    seen = activations_of([[(70, 1.0), (71, 5.0)]])
    found = describe_features(planted, ["1/res/3", FeatureId(2, "mlp", 0), "1/res/4"], seen, k=2)
    assert found["feature"].tolist() == ["1/res/3", "2/mlp/0", "1/res/4"]
    strings = [
        text.strip() if text.strip().isprintable() and text.strip() else repr(text)
        for text in token_strings(planted.model, [71, 70])
    ]
    assert found["active_at"].tolist() == [", ".join(strings), "", ""]
    assert found["label"][0].splitlines()[1] == f"active at {', '.join(strings)}"
    assert found["label"][2].endswith("\nactive at nothing read")
    assert all(found["label"].str.startswith("writes "))
    sources = ["logit lens and top tokens", "logit lens", "logit lens and top tokens"]
    assert found["label_from"].tolist() == sources


def test_a_token_that_is_no_whole_character_is_named_so(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flowhelpers.labels.describe.token_strings", lambda *_: [" �", " a", "\n"])
    assert describe_features(planted, ["1/res/3"], k=3)["writes"].item() == r"(byte), a, '\n'"


def test_ones_own_labels_are_read_as_they_are(planted: Suite, tmp_path: Path):
    content = 'feature,label,note\n1/res/3,"red, or green",x\n2/mlp/0,NA,\n'
    (tmp_path / "mine.csv").write_text(content, encoding="utf-8")
    own = read_labels(tmp_path / "mine.csv", planted)
    assert own.to_dict("list") == {
        "feature": ["1/res/3", "2/mlp/0"],
        "label": ["red, or green", "NA"],
        "label_from": ["mine.csv"] * 2,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("feature,label\n1/res/3,a\n1/res/99,b\n", "no feature 1/res/99 in "),
        ("feature,label\nx,a\n", "'x' is not a feature"),
        ("feature,label\n1/res/3,a\n1/res/3,b\n", "1/res/3 twice"),
        ("feature,label\n1/res/3, \n", "1/res/3 is without a label"),
        ("feature,lable\n1/res/3,a\n", "columns feature, lable: expected feature and"),
    ],
)
def test_a_label_file_that_is_wrong_says_where(
    planted: Suite, tmp_path: Path, content: str, message: str
):
    (tmp_path / "mine.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "mine.csv", planted)


def test_subject_scores_are_the_auc_of_mean_activations():
    generator = np.random.default_rng(0)
    codes = generator.random((160, toys.RES), dtype=np.float32)  # 20 texts of 8 tokens
    codes[codes < 0.8] = 0
    on_subject = np.arange(20) % 3 == 0
    codes[:, 0] = np.repeat(on_subject, 8)  # tells perfectly
    codes[:, 1] = 1 - codes[:, 0]  # and the wrong way round
    codes[:, 2] = 0  # cannot tell
    counted = np.arange(20) < 14
    seen = toys.planted_activations({SITE: codes.tolist()})
    found = subject_scores(seen, SITE, on_subject, counted)
    means = codes.reshape(20, 8, -1).mean(axis=1)[counted]
    for i in range(toys.RES):
        expected = roc_auc_score(on_subject[counted], means[:, i])
        assert found["auc"][i] == pytest.approx(expected)
    assert found["auc"][:3].tolist() == [1.0, 0.0, 0.5]
    assert found["share"][:3].tolist() == [1.0, 0.0, 0.0]
    assert found["share"][5] == pytest.approx(
        means[on_subject[counted], 5].sum() / means[:, 5].sum(), rel=1e-5
    )
    codes[112:] = 9.0  # texts that do not count change nothing
    seen = toys.planted_activations({SITE: codes.tolist()})
    again = subject_scores(seen, SITE, on_subject, counted)
    pd.testing.assert_frame_equal(again, found)
    for on in (True, False):
        with pytest.raises(ValueError, match=r"(0|14) texts are .* (0|14) are not: expected some"):
            subject_scores(seen, SITE, np.full(20, on), counted)


def test_token_text_colours_each_token_by_its_activation():
    tokens = pd.DataFrame({"token": ["ab", " <c", "\n"], "activation": [0.0, 2.5, 1.0]})
    figure = token_text(tokens, "title", "toy", columns=2)
    assert figure.layout.coloraxis.colorbar.orientation == "h"  # one line of text has no height
    (grid,) = figure.data
    assert [list(row) for row in grid.text] == [["ab", " &lt;c"], ["⏎", ""]]
    assert grid.z[0].tolist() == [0, 2.5]
    assert grid.z[1, 0] == 1
    assert np.isnan(grid.z[1, 1])
