"""The figures of a card are 1 for what is perfect, 0 for what is worthless, and by hand between."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import toys
import yaml
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import Gemma3ForCausalLM

from flowhelpers.__main__ import main
from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.core.files import DATA
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Edit, Tokens, logits_of, run_model, tokenize
from flowhelpers.suites.saes import make_sae
from flowhelpers.training import card, measures
from flowhelpers.training.card import Bar, bars, measured_bars, stored_bars, write_card
from flowhelpers.training.measures import (
    bits_per_byte,
    loss_recovered,
    measure,
    measure_flow,
    measure_saes,
    measure_themes,
)

D = toys.D_MODEL
BOTH = torch.cat([torch.eye(D), -torch.eye(D)])  # relu(x) and relu(-x): all of x
PERFECT, WORTHLESS, HALF, DEAD = Site(0, "mlp"), Site(1, "att"), Site(1, "res"), Site(2, "res")


@pytest.fixture(scope="module")
def suite(planted: Suite) -> Suite:
    """Four saes: perfect, of zeros, of half of what is there, and the mean alone."""
    _, read = run_model(planted.model, tokenize(planted.model, toys.TEXTS).ids, read=[DEAD])
    lens_saes = {
        PERFECT: toys.write_lens_sae(BOTH, PERFECT),
        WORTHLESS: toys.write_lens_sae(BOTH, WORTHLESS, threshold=1e9),
        HALF: toys.write_lens_sae(0.5 * BOTH, HALF, encoder=BOTH.T),
        DEAD: toys.write_lens_sae(BOTH, DEAD, threshold=1e9, b_dec=read[DEAD][0, 3]),
    }
    found = {site: make_sae(site, lens_sae, D, "planted") for site, lens_sae in lens_saes.items()}
    return dataclasses.replace(planted, saes=found)


@pytest.fixture(scope="module")
def tokens(planted: Suite) -> Tokens:
    return tokenize(planted.model, toys.TEXTS)


def test_loss_recovered_is_1_for_a_perfect_sae_and_0_for_zeros(suite: Suite, tokens: Tokens):
    found = loss_recovered(suite, tokens, batch=2)
    assert found[PERFECT] == pytest.approx(1, abs=1e-5)
    assert found[WORTHLESS] == 0
    assert list(found) == [PERFECT, WORTHLESS, HALF, DEAD]


def test_loss_recovered_is_the_share_by_hand(suite: Suite, tokens: Tokens):
    def loss(factor: float) -> float:
        def change(x: Tensor) -> Tensor:
            return torch.where(tokens.is_text[..., None], factor * x, x)

        logits = logits_of(suite.model, tokens.ids, [Edit(HALF, change)]).log_softmax(-1)
        losses = -logits[:, :-1].gather(-1, tokens.ids[:, 1:, None])[..., 0]
        return losses[tokens.is_text[:, 1:]].mean().item()

    expected = (loss(0.0) - loss(0.5)) / (loss(0.0) - loss(1.0))
    assert loss_recovered(suite, tokens)[HALF] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch", [1, 16])
def test_figures_of_a_site_are_those_by_hand(suite: Suite, tokens: Tokens, batch: int):
    found = measure_saes(suite, tokens, batch).set_index("site")
    _, read = run_model(suite.model, tokens.ids, read=list(suite.saes))
    for site, rebuilt in (
        (PERFECT, lambda x: x),
        (WORTHLESS, lambda x: 0 * x),
        (HALF, lambda x: 0.5 * x),
        (DEAD, lambda x: suite.sae(DEAD).lens_sae.b_dec.detach().expand_as(x)),
    ):
        x = read[site][tokens.is_text]
        spread = (x - x.mean(0)).square().sum()
        explained = 1 - (x - rebuilt(x)).square().sum() / spread
        row = found.loc[str(site)]
        assert row["explained_variance"] == pytest.approx(explained.item(), abs=1e-4)
    assert found["explained_variance"].tolist()[0] == pytest.approx(1)
    assert found.loc[str(WORTHLESS), "explained_variance"] < 0
    # Every coordinate is on one side of zero, and so half of the features are active.
    assert found["l0"].tolist() == pytest.approx([D, 0, D, 0])
    assert found["l0_share_of_d"].tolist() == pytest.approx([1, 0, 1, 0])
    x = read[PERFECT][tokens.is_text]
    silent = [(x <= 0).all(0).sum() + (x >= 0).all(0).sum()]
    assert found.loc[str(PERFECT), "dead_share"] == pytest.approx(silent[0].item() / (2 * D))
    assert found.loc[str(DEAD), "dead_share"] == 1


def test_bits_per_byte_is_the_loss_by_hand_over_the_bytes(
    planted: Suite, plain_toy: Gemma3ForCausalLM
):
    texts = [*toys.TEXTS, "naïve — café"]
    losses = []
    for text in texts:
        ids = tokenize(planted.model, text).ids
        with torch.no_grad():
            logits = plain_toy(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-logits[i, token].item() for i, token in enumerate(ids[0, 1:])]
    nats, bits = bits_per_byte(planted, tokenize(planted.model, texts), batch=2)
    size = len("".join(texts).encode())
    assert nats == pytest.approx(np.mean(losses), rel=1e-5)
    assert bits == pytest.approx(sum(losses) / size / math.log(2), rel=1e-5)


def test_flow_against_chance_is_counted_by_hand():
    scores = pd.DataFrame(
        {
            "layer": [0, 1, 1, 1, 1],
            "feature": [0, 0, 1, 2, 3],
            "s_res": [math.nan, 0.9, 0.5, 0.3, 0.99],
            "null_res": [math.nan, 0.4, 0.4, 0.4, 0.4],
            "s_mlp": [0.1, 0.1, 0.6, 0.1, 0.9],  # feature 1 is from the MLP alone,
            "null_mlp": 0.5,
            "s_att": [0.1, 0.1, 0.1, 0.6, 0.9],  # feature 2 from attention alone
            "null_att": 0.5,
        }
    )
    codes = [[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 1.0, 0.0]]  # feature 3 is dead
    activations = toys.planted_activations({Site(1, "res"): codes})
    found = pd.DataFrame(
        {"layer": 1, "res": [True, True, True, False], "rate_res": [0.1, 0.2, 0.3, 0.4]}
    )
    row = measure_flow(scores, activations, found).iloc[0]
    assert (row["layer"], row["live"]) == (1, 3)
    assert row["s_res_above_null"] == pytest.approx(2 / 3)
    assert row["module_above_null"] == pytest.approx(2 / 3)
    assert row["predecessor_active"] == 0.75
    assert row["by_chance"] == pytest.approx(0.25)
    assert row["ratio"] == pytest.approx(3)


def test_themes_find_the_planted_feature_and_its_auc(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    subjects = ["sea", "war", "food"] * 12
    frame = pd.DataFrame({"subject": subjects, "domain": "fiction", "text": "x"})
    rng = np.random.default_rng(0)
    sites = [Site(layer, "res") for layer in range(3)]
    codes = {site: rng.random((36, 3, toys.RES)).astype(np.float32) for site in sites}
    # One token of each text about the sea, and most of those about war, tells what it is about.
    about = {name: np.array([s == name for s in subjects]) for name in set(subjects)}
    codes[sites[1]][about["sea"], 1, 9] = 5
    codes[sites[2]][about["war"], 2, 4] = rng.uniform(0.9, 3, 12)
    tokens = pd.DataFrame({"text": np.repeat(range(36), 3), "position": 1, "token": 70})

    def collected(suite: Suite, texts: list[str], at: list[Site]) -> FeatureActivations:
        assert (len(texts), at) == (36, sites)
        flat = {site: csr_matrix(codes[site].reshape(108, -1)) for site in at}
        return FeatureActivations(tokens, flat)

    monkeypatch.setattr(measures, "passages", lambda: frame)
    monkeypatch.setattr(measures, "collect", collected)
    found = measure_themes(planted).set_index("subject")
    assert found.index.tolist() == ["food", "sea", "war"]
    assert found.loc["sea"].tolist() == ["1/res/9", 1.0, 1.0]
    assert found.loc["war", "feature"] == "2/res/4"
    # The two halves together are all of the texts, and their AUCs lie on both sides of the whole's.
    whole = roc_auc_score(about["war"], codes[sites[2]][..., 4].max(1))
    parts = found.loc["war", ["auc_chosen_on", "auc_held_out"]]
    assert min(parts) - 0.05 <= whole <= max(parts) + 0.05
    # Of 48 features of noise the best on one half is no good on the other.
    assert found.loc["food", "auc_chosen_on"] > 0.75
    chance = [measure_themes(planted, seed).set_index("subject") for seed in range(8)]
    assert np.mean([table.loc["food", "auc_held_out"] for table in chance]) < 0.65


def test_a_bar_is_met_or_missed():
    assert Bar("a", 0.5, 0.5).met
    assert not Bar("a", 0.49, 0.5).met
    assert Bar("a", 0.5, 0.5, at_least=False).met
    assert not Bar("a", 0.51, 0.5, at_least=False).met
    assert not Bar("a", math.nan, 0.5).met
    assert not Bar("a", math.nan, 0.5, at_least=False).met
    assert Bar("a", 1.0).met
    assert str(Bar("name", 0.49, 0.5)).split() == ["MISSED", "name", "0.490", "≥", "0.5"]
    assert str(Bar("name", 0.49, 0.5, at_least=False)).split() == ["name", "0.490", "≤", "0.5"]


def test_what_is_asked_of_a_suite_lies_in_its_folder(tmp_path: Path):
    assert bars({"a": 1.0}, None) == bars({"a": 1.0}, tmp_path) == [Bar("a", 1.0)]
    (tmp_path / "bars.yaml").write_text("a: {at_least: 2}\nb: {at_most: 0.5}\nd: {at_least: 0}\n")
    found = bars({"a": 1.0, "b": 0.25, "c": 3.0}, tmp_path)
    assert found[:3] == [Bar("a", 1.0, 2, True), Bar("b", 0.25, 0.5, False), Bar("c", 3.0)]
    assert [bar.met for bar in found] == [False, True, True, False]  # d was not measured


@pytest.mark.parametrize(
    "content", ["a: [", "- a", "a: 3", "a: {}", "a: {above: 1}", "a: {at_least: much}", "5"]
)
def test_a_broken_file_of_bars_is_named(tmp_path: Path, content: str):
    (tmp_path / "bars.yaml").write_text(content)
    with pytest.raises(
        ValueError, match=r"bars\.yaml: expected figures, each with at_least or at_m"
    ):
        bars({}, tmp_path)


def test_what_is_asked_of_flowlet_is_what_its_card_has():
    for found in stored_bars("flowlet").values():
        names = [bar.name for bar in found]
        again = bars({bar.name: bar.value for bar in found}, DATA / "flowlet")
        assert [bar.name for bar in again] == names  # nothing is asked for that is not there
        assert again == found


def test_the_whole_is_measured_and_a_card_gives_it_back(
    planted: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    frame = pd.DataFrame({"subject": ["a", "b"] * 4, "domain": "x", "text": toys.TEXTS[:4] * 2})
    monkeypatch.setattr(measures, "passages", lambda: frame)
    tokens = tokenize(planted.model, toys.TEXTS)
    values, tables = measure(planted, tokens)
    nats, bits = bits_per_byte(planted, tokens)
    assert (values["bits per byte"], values["nats per token"]) == (bits, nats)
    assert set(tables) == {"sites", "flow", "tests", "themes"}
    pd.testing.assert_frame_equal(tables["sites"], measure_saes(planted, tokens))
    assert values["s(R) above null, layer 1"] == 1.0  # every planted match is at 0.8

    # Every figure is that of the worst site or layer, or the mean.
    sites = tables["sites"].set_index(tables["sites"]["site"].str[2:])
    flow, shares = tables["flow"].set_index("layer"), tables["tests"].set_index("score")
    expected = {
        "L0 / d_model, highest site": max(sites["l0_share_of_d"]),
        "explained variance, lowest res": min(sites.loc["res", "explained_variance"]),
        "explained variance, lowest mlp, att": min(sites.loc[["mlp", "att"], "explained_variance"]),
        "dead share, highest site": max(sites["dead_share"]),
        "loss recovered, lowest res": min(sites.loc["res", "loss_recovered"]),
        "s(R) above null, lowest later layer": flow.loc[2, "s_res_above_null"],
        "s(M) or s(A) above null, mean of layers": flow["module_above_null"].mean(),
        "… against chance, lowest layer": min(flow["ratio"]),
        "significant tests, s_att, one active (AO)": shares.loc["s_att", "AO"],
        "… s_res, AO − both inactive (IB)": shares.loc["s_res", "AO"] - shares.loc["s_res", "IB"],
    }
    found_again = {name: values[name] for name in expected}
    assert found_again == pytest.approx(expected, nan_ok=True)

    (tmp_path / "about.md").write_text("# A toy\n")
    (tmp_path / "bars.yaml").write_text(
        "bits per byte: {at_most: 1.7}\nnats per token: {at_least: 0}\n"
    )
    found = bars(values, tmp_path)
    write_card(tmp_path, {"a text": found}, {"a text": tables})
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert text.startswith("# A toy\n")
    assert f"| bits per byte | {bits:.3f} | ≤ 1.7 | missed |" in text
    assert f"| nats per token | {nats:.3f} | ≥ 0 |  |" in text
    assert f"| dead share, highest site | {max(sites['dead_share']):.3f} |  |  |" in text
    record = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert record["a text"]["tables"]["flow"][0]["layer"] == 1
    (tmp_path / "suite.yaml").write_text(
        f"model: {planted.row.model}\nsaes: {{0/res: {planted.row.folder}/0-res}}\n"
    )
    for before, after in zip(found, stored_bars(str(tmp_path))["a text"], strict=True):
        assert str(after) == str(before)
        assert after.met == before.met
    with pytest.raises(FileNotFoundError, match=r"has no card; `card .* --measure` meas"):
        stored_bars(str(planted.row.folder))


def test_a_suite_of_residual_saes_alone_has_a_card_without_flow(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    frame = pd.DataFrame({"subject": ["a", "b"] * 4, "domain": "x", "text": toys.TEXTS[:4] * 2})
    monkeypatch.setattr(measures, "passages", lambda: frame)
    tokens = tokenize(planted.model, toys.TEXTS)

    def only(module: str) -> Suite:
        kept = {site: d for site, d in planted.saes.items() if site.module == module}
        return dataclasses.replace(planted, saes=kept)

    values, tables = measure(only("res"), tokens)
    assert set(tables) == {"sites", "themes"}
    assert "explained variance, lowest mlp, att" not in values
    assert values["nats per token"] == bits_per_byte(planted, tokens)[0]
    with pytest.raises(ValueError, match="has no residual SAE: there is no flow in it"):
        measure(only("mlp"), tokens)


def own_suite(folder: Path, planted: Suite, **more: object) -> Path:
    """A suite of one SAE, its model in a folder of its own."""
    shutil.copytree(planted.row.model, folder / "model")
    row = {"model": "model", "saes": {"0/res": f"{planted.row.folder}/0-res"}, **more}
    (folder / "suite.yaml").write_text(yaml.safe_dump(row))
    return folder


def test_the_rows_that_a_training_held_out_are_measured(
    planted: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, tokens = own_suite(tmp_path / "suite", planted), tmp_path / "tokens"
    (tokens / "held_out").mkdir(parents=True)
    (tokens / "recipe.json").write_text('{"recipe": {"sources": {"a.txt": 1}}}')
    np.save(tokens / "held_out" / "a.txt.npy", np.array([[2, 70, 1, 71]]))
    measured: list[Tokens] = []

    def figures(suite: Suite, text: Tokens) -> tuple[dict[str, float], dict[str, pd.DataFrame]]:
        measured.append(text)
        return {"bits per byte": float(len(measured))}, {}

    monkeypatch.setattr(card, "measure", figures)
    held_out, local = measured_bars(str(folder), tmp_path, write=True).values()
    assert [held_out, local] == [[Bar("bits per byte", n)] for n in (1, 2)]
    assert measured[0].ids.shape == (256, 4)
    assert measured[0].is_text.unique(dim=0).tolist() == [[False, True, False, True]]
    assert "missed" not in (folder / "card.md").read_text(encoding="utf-8")


def test_a_missed_bar_is_shown_and_is_no_error(
    planted: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = own_suite(tmp_path, planted)
    (folder / "bars.yaml").write_text("x: {at_least: 2}\n")
    write_card(folder, {"a text": bars({"x": 1.0, "y": 2.0}, folder)}, {"a text": {}})
    assert main(["card", str(folder)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "measured on a text: 1 bars were set, 1 missed"
    assert [line.split() for line in rest] == [["MISSED", "x", "1.000", "≥", "2"], ["y", "2.000"]]


def test_the_readme_says_what_flowlet_misses():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    missed = [bar for found in stored_bars("flowlet").values() for bar in found if not bar.met]
    assert [f"{bar.value:.1%}".replace("%", " %") in readme for bar in missed] == [True]


def test_mistakes_with_a_card_are_a_line(
    planted: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def said(*arguments: str) -> str:
        assert main(["card", *arguments]) == 2
        text = capsys.readouterr().err
        assert text.startswith("flowhelpers: ")
        assert text.count("\n") == 1
        return text

    assert "--write writes what was measured: give --measure" in said(str(tmp_path), "--write")
    assert "is no folder: there is no place for its card" in said(
        "pythia-70m-deduped", "--measure", "--write"
    )
    folder = own_suite(tmp_path, planted, parameters=10**15)
    assert re.search(r"needs \d+\.\d GiB on cpu, and", said(str(folder), "--measure"))
