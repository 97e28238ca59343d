"""A recipe is read strictly, and what it trains is a suite that loads."""

import math
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import toys
import yaml

from flowhelpers.__main__ import main
from flowhelpers.activations.corpora import is_held_out
from flowhelpers.core.features import MODULES, Site
from flowhelpers.core.files import DATA
from flowhelpers.matching.matchers import by_permutation
from flowhelpers.suites.load import load_suite
from flowhelpers.training import language_model, recipe
from flowhelpers.training.card import read_yaml
from flowhelpers.training.language_model import read_rows
from flowhelpers.training.recipe import FLOWLET, SuiteRecipe, train_suite

SIZES = {"vocab_size": 300, "d_model": 16, "layers": 2, "heads": 2, "kv_heads": 1, "d_mlp": 16}
TINY: dict[str, Any] = {
    "name": "tiny",
    "about": "two layers",
    "sources": {"texts.txt": 1.0},
    "model": {**SIZES, "context": 16, "tokens": 200, "rows": 4},
    "saes": {"features": 20, "k": 2, "tokens": 64, "batch": 16, "rows": 4, "warmup": 1},
}


def write(folder: Path, change: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY | change))
    return path


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of which some are held out; nothing is compiled, and no card is measured."""
    monkeypatch.setattr(language_model, "can_compile", lambda: False)
    monkeypatch.setattr(recipe, "measured_bars", Mock())
    documents = [f"Document {i} follows document {i - 1}." for i in range(500)]
    assert sum(map(is_held_out, documents)) > 3
    (tmp_path / "texts.txt").write_text("<|endoftext|>".join(documents))
    return tmp_path


def test_the_recipes_of_the_embedded_suites_are_read():
    flowlet = read_yaml(FLOWLET, SuiteRecipe)
    assert (flowlet.name, flowlet.model.d_model, flowlet.saes.features) == ("flowlet", 192, 1024)
    sites = [Site(layer, module) for layer in range(8) for module in MODULES]
    (others, usual), (early, own), (attention, _) = flowlet.groups(sites)
    assert early == [Site(0, "res"), Site(1, "res"), Site(2, "res")]
    assert {site.module for site in attention} == {"att"}
    assert sorted([*others, *early, *attention]) == sorted(sites)
    assert (usual.k, usual.lr) == (14, 0.003)
    assert (own.features, own.k, own.lr) == (1024, 8, 0.005)  # what it says, else the usual
    mini = read_yaml(DATA / "flowlet-mini-recipe.yaml", SuiteRecipe)
    assert mini.model.vocab_size == 4096


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"modle": {}}, "modle"),
        ({"sources": {}}, "sources"),
        ({"sources": {"a": math.nan}}, "sources.a"),
        ({"model": {"vocab_size": 99}}, "model.vocab_size"),
        ({"model": {"d_model": 33, "heads": 2}}, "2 x heads to divide d_model"),
        ({"model": {"heads": 4, "kv_heads": 3}}, "expected kv_heads to divide heads"),
        ({"saes": {"k": 400, "features": 64}}, "k is 400, more than the 64 features"),
    ],
)
def test_a_broken_recipe_says_where(tmp_path: Path, change: dict[str, Any], where: str):
    with pytest.raises(ValueError, match=rf"cannot use .*recipe\.yaml: (.|\n)*{re.escape(where)}"):
        read_yaml(write(tmp_path, change), SuiteRecipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": ["att", "attn"]}, r"exception e: \['att', 'attn'\] are not all left of 0/res"),
        ({"sites": ["0/mlp", "1/res"]}, r"exception f: \['1/res'\] are not all left"),
        ({"k": 1}, r"exception e: \[\] are not all left"),
        ({"sites": ["att"], "k": 99}, "k is 99, more than the 20"),
        ({"sites": ["att"], "kk": 9}, "kk"),
    ],
)
def test_an_exception_is_for_sites_that_are_there_and_nobody_elses(
    tmp_path: Path, change: dict[str, Any], message: str
):
    exceptions = {"e": change, "f": {"sites": ["1/res"]}}
    settings = read_yaml(write(tmp_path, {"exceptions": exceptions}), SuiteRecipe)
    with pytest.raises(ValueError, match=message):
        settings.groups([Site(layer, module) for layer in range(2) for module in MODULES])


def documents_of(rows: np.ndarray, tokenizer: Any) -> set[str]:
    text = tokenizer.decode(rows[:, 1:].flatten().tolist())
    return {document for document in text.split("<eos>") if document}


def test_a_recipe_trains_a_suite_that_loads_and_goes_on_as_it_was_begun(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    exceptions = {"attention": {"sites": ["att"], "features": 12}}
    folder, work = tmp_path / "suite", tmp_path / "suite" / "training"
    assert train_suite(folder, text, write(tmp_path, {"exceptions": exceptions})) == folder
    recipe.measured_bars.assert_called_once_with(str(folder), work, write=True)
    suite = load_suite(folder)
    assert (suite.name, suite.row.about, suite.layers) == ("tiny", "two layers", 2)
    assert suite.row.is_local
    assert Path(suite.row.model) == folder / "model"
    assert set(suite.saes) == set(suite.model.sites())
    widths = {site.module: sae.width for site, sae in suite.saes.items()}
    assert widths == {"att": 12, "mlp": 20, "res": 20}
    assert suite.sae("1/mlp").lens_sae.cfg.metadata.model_name == "tiny"

    # Held-out documents are in no row of training.
    everything = (text / "texts.txt").read_text().split("<|endoftext|>")
    kept = set(filter(is_held_out, everything))
    train, held_out = (
        documents_of(np.load(work / f"{split}-0.npy"), suite.model.tokenizer)
        for split in ("train", "held_out")
    )
    assert len(kept & held_out) >= len(kept) - 1  # the last may be cut at a row's end
    assert train & set(everything)
    assert not train & kept
    assert read_rows(work, 8, 0, "held_out").shape == (8, 16)

    # What is finished is not done twice, nor is its text needed any more.
    (text / "texts.txt").rename(text / "moved.txt")
    with monkeypatch.context() as patch:
        patch.setattr("flowhelpers.training.recipe.cut_rows", None)
        patch.setattr("flowhelpers.training.language_model.new_model", None)
        patch.setattr("flowhelpers.training.saes.new_sae", None)
        train_suite(folder, text, write(tmp_path, {"exceptions": exceptions, "about": "new"}))
    assert load_suite(folder).row.about == "new"
    (text / "moved.txt").rename(text / "texts.txt")
    with (text / "texts.txt").open("a") as file:
        file.write("more")
    changes: list[tuple[dict[str, Any], str | None, str]] = [
        ({}, None, r"text\.texts\.txt was \w{16}, now \w{16}\. Give another folder"),
        ({"model": TINY["model"] | {"layers": 3}}, None, r"recipe\.model\.layers was 2, now 3"),
        ({"saes": TINY["saes"] | {"k": 3}}, None, r"recipe\.saes\.k was 2, now 3; text"),
        ({"exceptions": {}}, None, r"exceptions\.attention\.features was 12, now nan"),
        ({}, str(folder / "model"), r"model was new, now \w{16}"),
    ]
    for change, model, message in changes:
        path = write(tmp_path, {"exceptions": exceptions} | change)
        with pytest.raises(ValueError, match=f"was begun with another recipe: .*{message}"):
            train_suite(folder, text, path, model=model)


@pytest.mark.parametrize("of_the_hub", [False, True])
def test_saes_are_trained_for_a_model_that_is_there(
    text: Path, tmp_path: Path, toy_folder: Path, request: pytest.FixtureRequest, of_the_hub: bool
):
    """The text is too little to hold any of it out."""
    if of_the_hub:
        request.getfixturevalue("hub_here")
    model = str(request.getfixturevalue("pythia") if of_the_hub else toy_folder)
    kept = [text for text in (f"Document {i}." for i in range(90)) if not is_held_out(text)]
    (text / "few.txt").write_text("<|endoftext|>".join(kept))
    path = write(tmp_path, {"sources": {"few.txt": 1}, "saes": TINY["saes"] | {"tokens": 400}})
    folder = train_suite(tmp_path / "mine", text, path, model)
    suite = load_suite(folder)
    assert set(suite.saes) == set(suite.model.sites())
    if of_the_hub:
        assert suite.row.model == model
        assert not (folder / "model").exists()
    else:
        weights = "model.safetensors"
        assert (folder / "model" / weights).read_bytes() == (toy_folder / weights).read_bytes()
    rows, tokenizer = read_rows(folder / "training", 9, 0), suite.model.tokenizer
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert not len(read_rows(folder / "training", 9, 0, "held_out"))
    with pytest.raises(ValueError, match=r"model was .*, now new"):
        train_suite(folder, text, path)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"sources": {"text.txt": 1}}, [], "no text source 'text.txt': .*did you mean 'texts.txt'"),
        ({"sources": {"empty.txt": 1}}, [], r"empty\.txt is empty: expected text"),
        ({"sources": {"small.txt": 1}}, [], r"source 'small\.txt' gives no row of 16 tokens"),
        ({}, ["--device", "cuda"], "torch finds no device 'cuda' on this machine"),
        ({}, ["--text", "none"], "no folder none to look up the text source"),
        ({}, ["--model", "nosuch"], ""),
        ({}, ["--recipe", "none.yaml"], r"none\.yaml"),
    ],
)
def test_mistakes_in_training_are_a_line_and_leave_nothing(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    arguments: list[str],
    message: str,
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" ")
    Path("small.txt").write_text("short")
    write(tmp_path, change)
    given = ["train", "suite", "--text", ".", "--recipe", "recipe.yaml", *arguments]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert re.search(rf"^flowhelpers: .*{message}", said, re.MULTILINE)
    assert "Traceback" not in said
    assert not Path("suite/training").exists()


def test_attention_alone_is_trained_for_a_model_and_matches_without_its_w_o(
    text: Path, tmp_path: Path, toy_folder: Path, capsys: pytest.CaptureFixture[str]
):
    saes = TINY["saes"] | {"architecture": "jumprelu"}
    exceptions = {"early": {"sites": ["0/res"], "k": 1}, "attention": {"sites": ["att"], "k": 3}}
    path = write(tmp_path, {"saes": saes, "exceptions": exceptions})
    given = ["train", "mine", "--text", str(text), "--recipe", str(path)]
    given = [str(tmp_path / one) if one == "mine" else one for one in given]
    given += ["--model", str(toy_folder), "--sites"]
    assert main([*given, "att,1/mlp"]) == 0
    assert re.search(r"SAEs, 0\.00 GiB each: \d at a time", capsys.readouterr().out)
    suite = load_suite(tmp_path / "mine")
    layers = suite.layers
    attention = [Site(layer, "att") for layer in range(layers)]
    assert set(suite.saes) == {*attention, Site(1, "mlp")}
    kept = yaml.safe_load((tmp_path / "mine" / "suite.yaml").read_text())["saes"]
    assert kept == {"att": "saes/{layer}-att", "1/mlp": "saes/1-mlp"}
    for site in attention:
        assert suite.sae(site).input_site == site
        assert suite.sae(site).lens_sae.cfg.architecture() == "jumprelu"
    pair = by_permutation(suite.sae("1/att"), suite.sae("0/att"))
    assert (pair.backward.indices >= 0).all()
    assert "model" not in vars(suite)  # no W_O was asked for
    assert main([*given, "att"]) == 2
    assert "was begun with another recipe: sites was" in capsys.readouterr().err
    assert main([*given, "att,9/ress"]) == 2
    assert "the model has no site '9/ress'; did you mean" in capsys.readouterr().err


def test_rows_for_a_model_are_no_longer_than_its_context(
    text: Path, tmp_path: Path, toy_folder: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path, {"model": TINY["model"] | {"context": 200}})
    model = Path(shutil.copytree(toy_folder, tmp_path / "model"))
    (model / ".git").mkdir()
    for _ in range(2):  # what was begun with rows that fit is taken up
        train_suite(tmp_path / "mine", text, path, str(model), sites=["0/res"])
        said = capsys.readouterr().out
        assert said.startswith(f"rows of {toys.CONTEXT} tokens, the context of {model}, not 200")
    assert read_rows(tmp_path / "mine" / "training", 3, 0).shape == (3, toys.CONTEXT)
    assert not (tmp_path / "mine" / "model" / ".git").exists()


def test_what_does_not_fit_is_refused_before_any_text_is_read(
    text: Path, tmp_path: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write(tmp_path, {"saes": TINY["saes"] | {"features": 2**20}})
    monkeypatch.setattr("flowhelpers.training.saes.free_memory", lambda device: 2**20)
    with pytest.raises(MemoryError, match=r"1,048,576 features at width 32 takes 1\.\d GiB on cpu"):
        train_suite(tmp_path / "mine", text, path, str(toy_folder), sites=["att"])
    assert not (tmp_path / "mine").exists()
