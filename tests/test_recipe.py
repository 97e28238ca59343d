"""A recipe is read strictly, and what it trains is a suite that loads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
import yaml
from hub import Hub

from flowhelpers import pretraining
from flowhelpers.recipe import held_out_rows, read_recipe, train_suite
from flowhelpers.sources import is_held_out
from flowhelpers.suites import load_suite

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
    "dictionaries": {"features": 20, "k": 2, "tokens": 64, "batch": 16, "rows": 4, "warmup": 1},
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
    from flowhelpers import card

    calls: list[tuple[str, Path | None]] = []
    monkeypatch.setattr(card, "measured_bars", lambda name, rows, write: calls.append((name, rows)))
    return calls


def test_the_recipe_of_flowlet_is_that_of_its_file():
    recipe = read_recipe()
    assert recipe.name == "flowlet"
    assert sum(recipe.sources.values()) == pytest.approx(1)
    assert recipe.model.sources == recipe.sources
    assert (recipe.model.d_model, recipe.model.layers) == (192, 8)
    assert recipe.dictionaries.features == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'"),
        ({"name": None}, "the key 'name' is missing"),
        ({"sources": None}, "the key 'sources' is missing"),
        ({"sources": {"a": 0.5, "b": 0}}, "every source needs a share above zero"),
        ({"sources": {}}, "every source needs a share above zero"),
        ({"model": {"d_modle": 3}}, "model: unknown key 'd_modle'; did you mean 'd_model'"),
        ({"model": {"sources": {}}}, "model: unknown key 'sources'"),
        ({"model": {"layers": 2.5}}, r"model: layers is 2\.5, expected a whole number"),
        ({"dictionaries": {"lr": "fast"}}, "dictionaries: lr is 'fast', expected a number"),
        ({"dictionaries": {"k": True}}, "dictionaries: k is True, expected a whole number"),
        ({"dictionaries": [3]}, r"dictionaries: expected keys and values, got \[3\]"),
    ],
)
def test_a_broken_recipe_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path, change))


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
    assert set(suite.dictionaries) == set(suite.model.sites())
    assert {dictionary.width for dictionary in suite.dictionaries.values()} == {20}
    assert suite.dictionary("1/mlp").sae.cfg.metadata.model_name == "tiny"
    rows = held_out_rows(folder / "training", rows=8)
    assert rows.shape == (8, 16)
    assert (rows[:, 0] == suite.model.tokenizer.bos_token_id).all()
    words = suite.model.tokenizer.decode(rows[0, 1:].tolist()).split("<eos>")
    assert is_held_out(words[1]) or len(words) < 3
    before = (folder / "model" / "model.safetensors").read_bytes()
    train_suite(folder, text, write(tmp_path, {}))  # finished: nothing is done twice
    assert (folder / "model" / "model.safetensors").read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"no recipe\.json in .*suite: expected the folder"):
        held_out_rows(folder)


def test_dictionaries_are_trained_for_a_model_that_is_there(
    text: Path, tmp_path: Path, toy_folder: Path, measured: list[tuple[str, Path | None]]
):
    folder = train_suite(tmp_path / "mine", text, write(tmp_path, {}), model=str(toy_folder))
    assert measured == [(str(folder), None)]
    assert f"`{toy_folder}`, as it is." in (folder / "about.md").read_text(encoding="utf-8")
    suite = load_suite(folder)
    assert suite.layers == toys.LAYERS
    assert set(suite.dictionaries) == set(suite.model.sites())
    ours, theirs = (path / "model.safetensors" for path in (folder / "model", toy_folder))
    assert ours.read_bytes() == theirs.read_bytes()


def test_dictionaries_are_trained_for_a_model_of_the_hub(
    text: Path,
    tmp_path: Path,
    hub_here: Hub,
    pythia: str,
    measured: list[tuple[str, Path | None]],
    monkeypatch: pytest.MonkeyPatch,
):
    from flowhelpers import recipe

    seen: list[np.ndarray] = []
    true_train = recipe.train_dictionaries

    def train(settings: Any, model: Any, rows: np.ndarray, *args: Any, **kwargs: Any) -> Path:
        seen.append(rows)
        return true_train(settings, model, rows, *args, **kwargs)

    monkeypatch.setattr(recipe, "train_dictionaries", train)
    suite = load_suite(train_suite(tmp_path / "mine", text, write(tmp_path, {}), model=pythia))
    assert suite.row.model == pythia
    assert set(suite.dictionaries) == set(suite.model.sites())
    tokenizer = suite.model.tokenizer
    assert (seen[0][:, 0] == tokenizer.bos_token_id).all()
    decoded = tokenizer.decode(seen[0][:, 1:].flatten().tolist())
    assert "follows document" in decoded
