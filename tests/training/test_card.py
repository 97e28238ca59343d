"""The figures of a card are 1 for what is perfect, 0 for what is worthless, and by hand between."""

import dataclasses
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import toys
import yaml
from torch import Tensor
from transformers import Gemma3ForCausalLM

from flowhelpers.__main__ import main
from flowhelpers.core.features import Site
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Edit, Tokens, logits_of, run_model, tokenize
from flowhelpers.suites.saes import make_sae
from flowhelpers.training import card, measures
from flowhelpers.training.card import bars, measured_bars, stored_bars
from flowhelpers.training.measures import bits_per_byte, measure, measure_flow, measure_saes

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


@pytest.mark.parametrize("batch", [1, 16])
def test_figures_of_a_site_are_those_by_hand(
    suite: Suite, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, batch: int
):
    monkeypatch.setattr(measures, "BATCH", batch)
    found = measure_saes(suite, tokens).set_index("site")
    assert found.index.tolist() == [str(site) for site in (PERFECT, WORTHLESS, HALF, DEAD)]
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
    silent = ((x <= 0).all(0).sum() + (x >= 0).all(0).sum()).item()
    assert found.loc[str(PERFECT), "dead_share"] == pytest.approx(silent / (2 * D))
    assert found.loc[str(DEAD), "dead_share"] == 1

    def loss(factor: float) -> float:
        def change(x: Tensor) -> Tensor:
            return torch.where(tokens.is_text[..., None], factor * x, x)

        logits = logits_of(suite.model, tokens.ids, [Edit(HALF, change)]).log_softmax(-1)
        losses = -logits[:, :-1].gather(-1, tokens.ids[:, 1:, None])[..., 0]
        return losses[tokens.is_text[:, 1:]].mean().item()

    recovered = found["loss_recovered"]
    share = (loss(0.0) - loss(0.5)) / (loss(0.0) - loss(1.0))
    assert recovered.iloc[:3].tolist() == pytest.approx([1, 0, share], abs=1e-4)


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
    nats, bits = bits_per_byte(planted, tokenize(planted.model, texts))
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
    # Feature 3 is dead.
    active = pd.DataFrame({"feature": [0, 1, 2, 2], "res": [True, True, True, False]})
    (row,) = measure_flow(scores, active.assign(layer=1, rate_res=[0.1, 0.2, 0.3, 0.4])).to_numpy()
    layer, of_res, of_module, predecessor, chance, ratio = row
    assert (layer, predecessor) == (1, 0.75)
    assert [of_res, of_module, chance, ratio] == pytest.approx([2 / 3, 2 / 3, 0.25, 3])


def test_what_is_asked_of_a_suite_lies_in_its_folder(tmp_path: Path):
    (tmp_path / "bars.yaml").write_text(
        "a: {at_least: 2}\nb: {at_most: 0.5}\nd: {at_least: 0}\ne: {at_least: 1}\nf: {at_most: 1}\n"
    )
    figures = {"a": 1.0, "b": 0.25, "c": 3.0, "e": 1.0, "f": 1.1, "g": math.nan}
    found = bars(figures, tmp_path)
    assert found.index.tolist() == [*figures, "d"]
    assert found["at_least"].dropna().to_dict() == {"a": 2, "d": 0, "e": 1}
    assert found["at_most"].dropna().to_dict() == {"b": 0.5, "f": 1}
    missed = found.index[~found["met"]].tolist()
    assert missed == ["a", "f", "d"]  # d was not measured
    for folder in (None, tmp_path / "empty"):
        assert bars(figures, folder)["met"].all()


@pytest.mark.parametrize("content", ["a: [", "- a", "a: 3", "a: {}", "a: {above: 1}", "5", ""])
def test_a_broken_file_of_bars_is_named(tmp_path: Path, content: str):
    (tmp_path / "bars.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"cannot use .*bars\.yaml: "):
        bars({}, tmp_path)


def test_the_readme_says_what_flowlet_misses_and_nothing_is_asked_that_is_not_there():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    cards = stored_bars("flowlet").values()
    assert all(found["value"].notna().all() for found in cards)
    missed = [value for found in cards for value in found["value"][~found["met"]]]
    assert [f"{value:.1%}".replace("%", " %") in readme for value in missed] == [True]


def test_the_figures_are_of_the_worst_site_or_layer(planted: Suite):
    values, tables = measure(planted, tokenize(planted.model, toys.TEXTS))
    assert values["s(R) above null, layer 1"] == 1.0  # every planted match is at 0.8
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
    assert {name: values[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_a_suite_of_residual_saes_alone_has_figures_without_flow(planted: Suite):
    residual = {site: sae for site, sae in planted.saes.items() if site.module == "res"}
    tokens = tokenize(planted.model, toys.TEXTS)
    values, tables = measure(dataclasses.replace(planted, saes=residual), tokens)
    assert set(tables) == {"sites"}
    assert math.isnan(values["explained variance, lowest mlp, att"])
    assert values["nats per token"] == bits_per_byte(planted, tokens)[0]


def own_suite(folder: Path, planted: Suite, **more: object) -> Path:
    """A suite of one SAE, its model in a folder of its own."""
    shutil.copytree(planted.row.model, folder / "model")
    row = {"model": "model", "saes": {"0/res": f"{planted.row.folder}/0-res"}, **more}
    (folder / "suite.yaml").write_text(yaml.safe_dump(row))
    return folder


def test_a_card_is_measured_on_held_out_rows_written_and_given_back(
    planted: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    folder = own_suite(tmp_path / "suite", planted)
    (folder / "bars.yaml").write_text("bits per byte: {at_most: 1}\n")
    (tmp_path / "recipe.json").write_text('{"recipe": {"sources": {"a.txt": 1}}}')
    np.save(tmp_path / "held_out-0.npy", np.array([[2, 70, 1, 71]]))
    measured: list[Tokens] = []

    def figures(suite: Suite, text: Tokens) -> tuple[dict[str, float], dict[str, pd.DataFrame]]:
        measured.append(text)
        return {"bits per byte": float(len(measured))}, {"sites": pd.DataFrame({"l0": [3]})}

    monkeypatch.setattr(card, "measure", figures)
    found = measured_bars(str(folder), tmp_path, write=True)
    assert [table.loc["bits per byte", "value"] for table in found.values()] == [1, 2]
    assert measured[0].ids.shape == (256, 4)
    assert measured[0].is_text.unique(dim=0).tolist() == [[False, True, False, True]]
    for name, table in stored_bars(str(folder)).items():
        pd.testing.assert_frame_equal(table, found[name])

    # Texts and rows are read as far as the model can.
    np.save(tmp_path / "held_out-0.npy", np.full((2, 200), 70))
    measured_bars(str(folder), tmp_path)
    assert [text.ids.shape[1] for text in measured[1:]] == [toys.CONTEXT] * 3

    # A bar that is missed is shown, and is no error.
    assert main(["card", str(folder)]) == 0
    *_, title, _, row = capsys.readouterr().out.splitlines()
    assert title.startswith("measured on the package's passages")
    assert title.endswith("1 bars were set, 1 missed")
    assert row.split() == ["bits", "per", "byte", "2.000", "1.000", "False"]


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
    assert "has no card; `card" in said(str(folder))
