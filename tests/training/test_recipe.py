"""A recipe is read strictly, and what it trains is a suite that loads."""

import gzip
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flowhelpers.__main__ import main
from flowhelpers.activations.corpora import is_held_out, passages
from flowhelpers.core.features import MODULES, Site
from flowhelpers.core.files import DATA
from flowhelpers.suites.load import load_suite
from flowhelpers.training import language_model
from flowhelpers.training.language_model import read_rows
from flowhelpers.training.recipe import read_recipe, train_suite, usable_device

TINY: dict[str, Any] = {
    "name": "tiny",
    "about": "two layers",
    "sources": {"texts.txt": 1.0},
    "model": {
        "vocab_size": 290,
        "d_model": 16,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "d_mlp": 16,
        "context": 16,
        "tokens": 200,
        "rows": 4,
    },
    "saes": {"features": 20, "k": 2, "tokens": 64, "batch": 16, "rows": 4, "warmup": 1},
}


def write(folder: Path, change: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (TINY | change).items() if v is not None}))
    return path


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(language_model, "can_compile", lambda: False)
    documents = [f"Document {i} follows document {i - 1}." for i in range(500)]
    assert sum(map(is_held_out, documents)) > 3
    (tmp_path / "texts.txt").write_text("<|endoftext|>".join(documents))
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path | None]]:
    """Of what the card was measured, which is not done here."""
    from flowhelpers.training import card

    calls: list[tuple[str, Path | None]] = []
    monkeypatch.setattr(card, "measured_bars", lambda name, rows, write: calls.append((name, rows)))
    return calls


def test_the_recipes_of_the_embedded_suites_are_read():
    recipe = read_recipe()
    assert recipe.name == "flowlet"
    assert (recipe.model.d_model, recipe.model.layers, recipe.saes.features) == (192, 8, 1024)
    early = recipe.exceptions["early"]
    assert (early.features, early.k, early.lr) == (1024, 8, 0.005)  # what it says, else the usual
    assert read_recipe(DATA / "flowlet-mini-recipe.yaml").model.vocab_size == 4096


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"modle": {}}, "modle"),
        ({"name": None}, "name"),
        ({"name": 5}, "name"),
        ({"sources": {}}, "sources"),
        ({"sources": {"a": 0}}, "sources.a"),
        ({"sources": {"a": math.nan}}, "sources.a"),
        ({"sources": {"a/x.txt": 1, "b/x.txt": 1}}, "two sources have the same name"),
        ({"model": {"d_modle": 3}}, "model.d_modle"),
        ({"model": {"layers": 2.5}}, "model.layers"),
        ({"model": {"vocab_size": 99}}, "model.vocab_size"),
        ({"model": {"gain": math.inf}}, "model.gain"),
        ({"model": {"d_model": 33, "heads": 2}}, "d_model is 33, no multiple of 2 x 2 heads"),
        ({"model": {"heads": 4, "kv_heads": 3}}, "kv_heads is 3, which does not divide 4"),
        ({"saes": {"lr": "fast"}}, "saes.lr"),
        ({"saes": {"k": 400, "features": 64}}, "k is 400, more than the 64 features"),
        ({"saes": {"batch": 64, "rows": 2}}, "2 rows of 16 tokens do not fill one batch of 64"),
        ({"exceptions": {"early": {"k": 1}}}, "exceptions.early.sites"),
        ({"exceptions": {"all-others": {"sites": ["att"]}}}, "exceptions.all-others"),
        ({"exceptions": {"../b": {"sites": ["att"]}}}, "../b"),
        ({"exceptions": {"e": {"sites": ["att"], "k": 99}}}, "k is 99, more than the 20"),
    ],
)
def test_a_broken_recipe_says_where(tmp_path: Path, change: dict[str, Any], where: str):
    with pytest.raises(ValueError, match=rf"recipe\.yaml is no recipe: (.|\n)*{re.escape(where)}"):
        read_recipe(write(tmp_path, change))


@pytest.mark.parametrize("content", ["name: [", "a: b: c", b"\xff\xfe", "- 1", ""])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: str | bytes):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"recipe\.yaml is no recipe: "):
        read_recipe(path)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["9/res"], r"exception e: no site 9/res is left for it; did you mean '\d/res'"),
        (["attn"], "exception e: no site attn is left for it"),
        (["0/mlp", "1/att", "1/res"], "exception f: no site 1/res is left for it"),
    ],
)
def test_an_exception_is_for_sites_that_are_there_and_nobody_elses(
    tmp_path: Path, sites: list[str], message: str
):
    exceptions = {"e": {"sites": sites}, "f": {"sites": ["1/res"]}}
    recipe = read_recipe(write(tmp_path, {"exceptions": exceptions}))
    with pytest.raises(ValueError, match=message):
        recipe.groups([Site(layer, module) for layer in range(2) for module in MODULES])


def documents_of(rows: np.ndarray, tokenizer: Any) -> set[str]:
    text = tokenizer.decode(rows[:, 1:].flatten().tolist())
    return {document for document in text.split("<eos>") if document}


def test_a_recipe_trains_a_suite_that_loads_and_goes_on_as_it_was_begun(
    text: Path,
    tmp_path: Path,
    measured: list[tuple[str, Path | None]],
    monkeypatch: pytest.MonkeyPatch,
):
    exceptions = {"attention": {"sites": ["att"], "features": 12}}
    folder, work = tmp_path / "suite", tmp_path / "suite" / "training"
    assert train_suite(folder, text, write(tmp_path, {"exceptions": exceptions})) == folder
    assert measured == [(str(folder), work)]
    suite = load_suite(folder)
    assert (suite.name, suite.row.about, suite.layers) == ("tiny", "two layers", 2)
    assert suite.row.is_local
    assert Path(suite.row.model) == folder / "model"
    assert set(suite.saes) == set(suite.model.sites())
    widths = {site.module: sae.width for site, sae in suite.saes.items()}
    assert widths == {"att": 12, "mlp": 20, "res": 20}
    assert suite.sae("1/mlp").lens_sae.cfg.metadata.model_name == "tiny"
    about = (folder / "about.md").read_text(encoding="utf-8")
    assert about.startswith("# tiny\n\ntwo layers\n")
    assert "holds 0 of the package's own passages" in about
    assert "  attention:\n    features: 12\n    k: 2\n" in about

    # Held-out documents are in no row of training.
    everything = (text / "texts.txt").read_text().split("<|endoftext|>")
    kept = set(filter(is_held_out, everything))
    train, held_out = (
        documents_of(np.load(work / "tokens" / split / "texts.txt.npy"), suite.model.tokenizer)
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
    assert (folder / "about.md").read_text(encoding="utf-8") == about.replace("two layers", "new")
    (text / "moved.txt").rename(text / "texts.txt")
    with (text / "texts.txt").open("a") as file:
        file.write("more")
    changes: list[tuple[dict[str, Any], str | None, str]] = [
        ({}, None, r"text\.texts\.txt was \w{16}, now \w{16}\. Give another folder"),
        ({"model": TINY["model"] | {"layers": 3}}, None, r"recipe\.model\.layers was 2, now 3"),
        ({"saes": TINY["saes"] | {"k": 3}}, None, r"recipe\.saes\.k was 2, now 3; .*attention\.k"),
        ({"exceptions": {}}, None, r"exceptions\.attention\.features was 12, now None"),
        ({}, str(folder / "model"), r"model was None, now \w{16}"),
    ]
    for change, model, message in changes:
        recipe = write(tmp_path, {"exceptions": exceptions} | change)
        with pytest.raises(
            ValueError, match=f"training was begun with another recipe: .*{message}"
        ):
            train_suite(folder, text, recipe, model=model)
    with pytest.raises(FileNotFoundError, match=r"recipe\.json: expected the folder of a training"):
        read_rows(folder, 8, 0)


@pytest.mark.parametrize("of_the_hub", [False, True])
def test_saes_are_trained_for_a_model_that_is_there(
    text: Path,
    tmp_path: Path,
    toy_folder: Path,
    request: pytest.FixtureRequest,
    measured: list[tuple[str, Path | None]],
    of_the_hub: bool,
):
    """The text holds a passage of the package, and too little to hold any of it out."""
    if of_the_hub:
        request.getfixturevalue("hub_here")
    model = str(request.getfixturevalue("pythia") if of_the_hub else toy_folder)
    documents = [passages()["text"][0], *(f"Document {i}." for i in range(40))]
    kept = [document for document in documents if not is_held_out(document)]
    (text / "few.txt").write_text("<|endoftext|>".join(kept))
    saes = TINY["saes"] | {"tokens": 400}
    recipe = write(tmp_path, {"sources": {"few.txt": 1}, "saes": saes})
    folder = train_suite(tmp_path / "mine", text, recipe, model)
    suite = load_suite(folder)
    assert set(suite.saes) == set(suite.model.sites())
    if of_the_hub:
        assert suite.row.model == model
        assert not (folder / "model").exists()
    else:
        copies = [
            (path / "model.safetensors").read_bytes() for path in (folder / "model", toy_folder)
        ]
        assert copies[0] == copies[1]
    about = (folder / "about.md").read_text(encoding="utf-8")
    assert "A model that was there already, as it is." in about
    assert "holds 1 of the package's own passages" in about
    rows, tokenizer = read_rows(folder / "training", 9, 0), suite.model.tokenizer
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert not len(read_rows(folder / "training", 9, 0, "held_out"))
    with pytest.raises(ValueError, match=r"model was .*, now None"):
        train_suite(folder, text, recipe)


def test_a_source_that_is_too_small_is_named(text: Path, tmp_path: Path):
    (text / "small.txt").write_text("short")
    recipe = write(tmp_path, {"sources": {"texts.txt": 1, "small.txt": 1}})
    with pytest.raises(ValueError, match=r"source 'small\.txt' gives no row of 16 tokens"):
        train_suite(tmp_path / "suite", text, recipe)
    assert not (tmp_path / "suite").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"sources": {"text.txt": 1}}, [], "no text source 'text.txt': .*did you mean 'texts.txt'"),
        ({"sources": {"empty.txt": 1}}, [], r"empty\.txt is empty: expected text"),
        ({"sources": {"cut.txt.gz": 1}}, [], r"cannot read .*cut\.txt\.gz: "),
        ({"model": {"d_model": 33}}, [], r"recipe\.yaml is no recipe: "),
        (
            {},
            ["--device", "cuda"],
            r"torch finds no device 'cuda' on this machine; did you mean 'cpu'",
        ),
        ({}, ["--text", "none"], "no folder none to look up the text source"),
        ({}, ["--model", "nosuch"], "the model 'nosuch' cannot be loaded: "),
        ({}, ["--model", "broken"], r"the model 'broken' cannot be loaded: "),
        ({}, ["--recipe", "none.yaml"], r"none\.yaml"),
    ],
)
def test_mistakes_in_training_are_a_line_and_leave_nothing(
    text: Path,
    tmp_path: Path,
    toy_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    arguments: list[str],
    message: str,
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_folder, "broken")
    Path("broken/tokenizer.json").write_text("{")
    Path("empty.txt").write_text(" ")
    Path("cut.txt.gz").write_bytes(gzip.compress(b"word " * 999)[:-9])
    write(tmp_path, change)
    given = ["train", "suite", "--text", ".", "--recipe", "recipe.yaml", *arguments]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert re.search(rf"^flowhelpers: .*{message}", said, re.MULTILINE)
    assert "Traceback" not in said
    assert not Path("suite").exists()


def test_a_device_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert (usable_device("auto"), usable_device("cpu")) == ("cpu", "cpu")
    with pytest.raises(ValueError, match="torch finds no device 'cuda:0'"):
        usable_device("cuda:0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [usable_device(name) for name in ("auto", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="no device 'cudaa' on this machine; did you mean 'cuda'"):
        usable_device("cudaa")
