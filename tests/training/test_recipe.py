"""A recipe is read strictly, and what it trains is a suite that loads."""

import gzip
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
import yaml
from hub import Hub

from flowhelpers.__main__ import main
from flowhelpers.activations.corpora import is_held_out, passages
from flowhelpers.core.features import MODULES, Site
from flowhelpers.suites.load import load_suite
from flowhelpers.training import language_model as pretraining
from flowhelpers.training.recipe import held_out_rows, read_recipe, train_suite, usable_device

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
    monkeypatch.setattr(pretraining, "compiled", lambda function: function)
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


def test_the_recipe_of_flowlet_is_that_of_its_file():
    recipe = read_recipe()
    assert recipe.name == "flowlet"
    assert sum(recipe.sources.values()) == pytest.approx(1)
    assert recipe.model.sources == recipe.sources
    assert (recipe.model.d_model, recipe.model.layers) == (192, 8)
    assert recipe.saes.features == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'"),
        ({"name": None}, "the key 'name' is missing"),
        ({"sources": None}, "the key 'sources' is missing"),
        ({"sources": {"a": 0.5, "b": 0}}, "sources: b is 0, expected a number above zero"),
        ({"sources": {"a": "all"}}, "sources: a is 'all', expected a number above zero"),
        ({"sources": {"a": math.nan}}, "sources: a is nan, expected a number above zero"),
        ({"sources": {}}, "sources: there is none, expected names, each with its share"),
        ({"sources": 5}, "sources: expected keys and values, got 5"),
        ({"name": 5}, "name is 5, expected a text"),
        ({"about": ["a"]}, r"about is \['a'\], expected a text"),
        ({"licences": ["MIT"]}, r"licences: expected keys and values, got \['MIT'\]"),
        ({"model": {"layers": 0}}, "model: layers is 0, expected 1 or more"),
        ({"model": {"vocab_size": 99}}, "model: vocab_size is 99, expected 260 or more"),
        ({"model": {"decay": 1.5}}, r"model: decay is 1\.5, expected 0 to 1"),
        ({"model": {"gain": math.inf}}, "model: gain is inf, expected 1e-09 or more"),
        (
            {"model": {"d_model": 33, "heads": 2}},
            "model: d_model is 33 with 2 heads, expected a multiple of 4, such as 32",
        ),
        (
            {"model": {"heads": 4, "kv_heads": 3}},
            "model: kv_heads is 3 with 4 heads, expected one of 1, 2, 4",
        ),
        (
            {"saes": {"k": 400, "features": 64}},
            "saes: k is 400, expected 1 to 64, the number of features",
        ),
        (
            {"saes": {"batch": 64, "rows": 2}},
            "saes: 2 rows of 16 tokens do not fill one batch of 64 tokens, but at most 28",
        ),
        ({"exceptions": [1]}, r"exceptions: expected keys and values, got \[1\]"),
        ({"exceptions": {"early": {"k": 1}}}, "early: expected the key 'sites' with a list"),
        ({"exceptions": {"model": {"sites": ["att"]}}}, "model: expected another name, of letters"),
        ({"exceptions": {"a/b": {"sites": ["att"]}}}, "a/b: expected another name, of letters"),
        ({"exceptions": {"e": {"sites": ["att"], "k": 99}}}, "e: k is 99, expected 1 to 20, the"),
        ({"model": {"d_modle": 3}}, "model: unknown key 'd_modle'; did you mean 'd_model'"),
        ({"model": {"sources": {}}}, "model: unknown key 'sources'"),
        ({"model": {"layers": 2.5}}, r"model: layers is 2\.5, expected a whole number"),
        ({"saes": {"lr": "fast"}}, "saes: lr is 'fast', expected a number"),
        ({"saes": {"k": True}}, "saes: k is True, expected a whole number"),
        ({"saes": [3]}, r"saes: expected keys and values, got \[3\]"),
    ],
)
def test_a_broken_recipe_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path, change))


def test_a_key_that_is_empty_is_missing(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name:\nsources: {a: 1}\n")
    with pytest.raises(ValueError, match="the key 'name' is missing"):
        read_recipe(path)
    path.write_text("name: a\nsources: {a: 1}\nlicences:\nmodel:\n")
    assert read_recipe(path).model.layers == 8


@pytest.mark.parametrize("content", ["name: [", "a: b: c", b"\xff\xfe", "- 1", ""])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: str | bytes):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        ValueError, match=r"recipe\.yaml( is not YAML: .|: expected keys and values)"
    ):
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


def test_a_recipe_trains_a_suite_that_loads(
    text: Path, tmp_path: Path, measured: list[tuple[str, Path | None]]
):
    folder = tmp_path / "suite"
    assert train_suite(folder, text, write(tmp_path, {})) == folder
    assert measured == [(str(folder), folder / "training")]
    assert (folder / "about.md").read_text(encoding="utf-8").startswith("# tiny\n\ntwo layers\n")
    suite = load_suite(folder)
    assert (suite.name, suite.row.about, suite.layers) == ("tiny", "two layers", 2)
    assert suite.row.is_local
    assert Path(suite.row.model) == folder / "model"
    assert set(suite.saes) == set(suite.model.sites())
    assert {sae.width for sae in suite.saes.values()} == {20}
    assert suite.sae("1/mlp").lens_sae.cfg.metadata.model_name == "tiny"
    rows = held_out_rows(folder / "training", rows=8)
    assert rows.shape == (8, 16)
    assert (rows[:, 0] == suite.model.tokenizer.bos_token_id).all()
    words = suite.model.tokenizer.decode(rows[0, 1:].tolist()).split("<eos>")
    assert is_held_out(words[1]) or len(words) < 3
    before = (folder / "model" / "model.safetensors").read_bytes()
    (tmp_path / "texts.txt").unlink()
    train_suite(folder, text, write(tmp_path, {}))  # finished: nothing is done or read twice
    assert (folder / "model" / "model.safetensors").read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"no recipe\.json in .*suite: expected the folder"):
        held_out_rows(folder)
    with pytest.raises(
        ValueError, match=r"others was begun with .* origin\.model was this recipe's, "
    ):
        train_suite(folder, text, write(tmp_path, {}), model=str(folder / "model"))


def test_another_recipe_in_the_same_folder_is_refused_and_the_card_says_what_is_there(
    text: Path, tmp_path: Path, measured: list[tuple[str, Path | None]]
):
    def train(model: dict[str, Any], saes: dict[str, Any], **change: Any) -> str:
        change |= {"model": TINY["model"] | model, "saes": saes}
        train_suite(tmp_path / "suite", text, write(tmp_path, change))
        return (tmp_path / "suite" / "about.md").read_text(encoding="utf-8")

    usual = TINY["saes"]
    exceptions = {"attention": {"sites": ["att"], "features": 12}}
    first = train({}, usual, exceptions=exceptions)
    assert "2 layers, width 16, 2 heads over 1 key-value heads" in first
    assert "| all others | 20 | 2 | 64 | 16 | 0.003 |" in first
    assert "| 0/att, 1/att | 12 | 2 | 64 | 16 | 0.003 |" in first
    assert "Of the package's own passages none stands in this text word for word." in first
    with pytest.raises(
        ValueError, match=r"training was begun with another recipe: d_model was 16, now 32"
    ):
        train({"d_model": 32}, usual, exceptions=exceptions)
    with pytest.raises(
        ValueError, match=r"training/others was begun with .*: k was 2, now 3\. Give"
    ):
        train({}, usual | {"k": 3}, exceptions={"attention": exceptions["attention"] | {"k": 2}})
    with pytest.raises(
        ValueError, match=r"others was begun with another recipe: sites was \['0/mlp'"
    ):
        train({}, usual)
    assert (tmp_path / "suite" / "about.md").read_text(encoding="utf-8") == first
    again = train({}, usual, exceptions=exceptions, about="other words")
    assert again == first.replace("two layers", "other words")
    shutil.rmtree(tmp_path / "suite/training/attention/SAEs")  # done again, another way
    changed = {"attention": exceptions["attention"] | {"features": 8}}
    assert "| 0/att, 1/att | 8 | 2 | 64 | 16 | 0.003 |" in train({}, usual, exceptions=changed)
    assert load_suite(tmp_path / "suite").sae("1/att").width == 8


def test_the_card_counts_passages_that_the_text_holds(
    text: Path, tmp_path: Path, toy_folder: Path, measured: list[tuple[str, Path | None]]
):
    planted = [passages()["text"][0], *(f"Document {i}." for i in range(40))]
    (tmp_path / "few.txt").write_text("<|endoftext|>".join(planted))
    changes = {"sources": {"few.txt": 1}, "saes": TINY["saes"] | {"tokens": 200}}
    recipe = write(tmp_path, changes)
    folder = train_suite(tmp_path / "mine", text, recipe, model=str(toy_folder))
    about = (folder / "about.md").read_text(encoding="utf-8")
    assert "passages 1 stands in this text word for word: what is measured on them is" in about


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"sources": {"text.txt": 1}}, [], "no text source 'text.txt': .*did you mean 'texts.txt'"),
        ({"sources": {"empty.txt": 1}}, [], r"empty\.txt is empty: expected text"),
        ({"sources": {"cut.txt.gz": 1}}, [], r"cannot read .*cut\.txt\.gz: "),
        ({"sources": 5}, [], r"recipe\.yaml: sources: expected keys and values, got 5"),
        ({"model": {"d_model": 33}}, [], r"recipe\.yaml: model: d_model is 33 with 4 heads, exp"),
        (
            {},
            ["--device", "cuda"],
            r"torch finds no device 'cuda' on this machine; did you mean 'cpu'",
        ),
        ({}, ["--text", "none"], "no folder none to look up the text source"),
        ({}, ["--model", "nosuch"], "the model 'nosuch' cannot be loaded: "),
        ({}, ["--model", "broken"], r"the model 'broken' .*broken/tokenizer\.json is not JSON"),
        ({}, ["--recipe", "none.yaml"], "no recipe at none.yaml"),
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


def test_saes_are_trained_for_a_model_that_is_there(
    text: Path, tmp_path: Path, toy_folder: Path, measured: list[tuple[str, Path | None]]
):
    folder = train_suite(tmp_path / "mine", text, write(tmp_path, {}), model=str(toy_folder))
    assert measured == [(str(folder), None)]
    assert f"`{toy_folder}`, as it is." in (folder / "about.md").read_text(encoding="utf-8")
    suite = load_suite(folder)
    assert suite.layers == toys.LAYERS
    assert set(suite.saes) == set(suite.model.sites())
    ours, theirs = (path / "model.safetensors" for path in (folder / "model", toy_folder))
    assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(ValueError, match=r"origin\.model was \w{16}, now this recipe's"):
        train_suite(folder, text, write(tmp_path, {}))
    assert not (folder / "training" / "model").exists()  # refused before hours are spent on one
    shutil.copytree(toy_folder, tmp_path / "other")
    (tmp_path / "other" / "new").write_text("")
    with pytest.raises(ValueError, match=r"origin\.model was \w{16}, now \w{16}\. Give another"):
        train_suite(folder, text, write(tmp_path, {}), model=str(tmp_path / "other"))
    with (text / "texts.txt").open("a") as file:
        file.write("more")
    with pytest.raises(ValueError, match=r"origin\.text\.texts\.txt was \w{16}, now \w{16}\. Give"):
        train_suite(folder, text, write(tmp_path, {}), model=str(toy_folder))


def test_saes_are_trained_for_a_model_of_the_hub(
    text: Path,
    tmp_path: Path,
    hub_here: Hub,
    pythia: str,
    measured: list[tuple[str, Path | None]],
    monkeypatch: pytest.MonkeyPatch,
):
    from flowhelpers.training import recipe

    seen: list[np.ndarray] = []
    true_train = recipe.train_saes

    def train(settings: Any, model: Any, rows: np.ndarray, *args: Any, **kwargs: Any) -> Path:
        seen.append(rows)
        return true_train(settings, model, rows, *args, **kwargs)

    monkeypatch.setattr(recipe, "train_saes", train)
    suite = load_suite(train_suite(tmp_path / "mine", text, write(tmp_path, {}), model=pythia))
    assert suite.row.model == pythia
    assert set(suite.saes) == set(suite.model.sites())
    tokenizer = suite.model.tokenizer
    assert (seen[0][:, 0] == tokenizer.bos_token_id).all()
    decoded = tokenizer.decode(seen[0][:, 1:].flatten().tolist())
    assert "follows document" in decoded
