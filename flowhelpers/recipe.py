"""The whole recipe of a suite: model, dictionaries, and the folder that `load_suite` reads."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowhelpers.features import MODULES, Site, parse_site, suggestion
from flowhelpers.files import write_text
from flowhelpers.model import Model, load_model
from flowhelpers.pretraining import (
    ModelRecipe,
    TokenData,
    prepare,
    reading_order,
    token_rows,
    train_model,
)
from flowhelpers.sources import HELD_OUT_PERCENT, load_source
from flowhelpers.suites import DATA
from flowhelpers.training import DictionaryRecipe, steps_per_chunk, train_dictionaries

FLOWLET = DATA / "flowlet-recipe.yaml"
KEYS = {"name", "sources", "licences", "about", "model", "dictionaries", "exceptions"}


@dataclass(frozen=True)
class SuiteRecipe:
    """How a suite is trained.

    Attributes:
        name: The suite's name.
        about: One line on what it is.
        sources: Name of each text source and its share of the tokens.
        licences: What each source is and its licence, for the card.
        model: How the language model is trained.
        dictionaries: How its dictionaries are trained.
        exceptions: For some sites another way: its name, the sites (`1/res`, or `att` for all of a
            module) and the numbers.
    """

    name: str
    about: str
    sources: dict[str, float]
    licences: dict[str, str]
    model: ModelRecipe
    dictionaries: DictionaryRecipe
    exceptions: dict[str, tuple[tuple[str, ...], DictionaryRecipe]]

    def groups(self, sites: Sequence[Site]) -> dict[str, tuple[list[Site], DictionaryRecipe]]:
        """The sites that are trained alike, and how; those of no exception are called `others`."""
        named = {
            name: [site for site in sites if {str(site), site.module} & set(patterns)]
            for name, (patterns, _) in self.exceptions.items()
        }
        others = [site for site in sites if not any(site in group for group in named.values())]
        groups = {name: (group, self.exceptions[name][1]) for name, group in named.items()}
        return {
            name: (group, recipe)
            for name, (group, recipe) in {"others": (others, self.dictionaries), **groups}.items()
            if group
        }


def read_recipe(path: Path = FLOWLET) -> SuiteRecipe:
    """Read a recipe from a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a key is unknown or missing, or a value has the wrong type.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    _known(content, KEYS, str(path))
    for key in ("name", "sources"):
        if key not in content:
            raise ValueError(f"{path}: the key {key!r} is missing")
    sources = {str(name): float(share) for name, share in content["sources"].items()}
    if not sources or min(sources.values()) <= 0:
        raise ValueError(f"{path}: every source needs a share above zero, got {sources}")
    return SuiteRecipe(
        name=content["name"],
        about=content.get("about", ""),
        sources=sources,
        licences=content.get("licences") or {},
        model=_filled(ModelRecipe, content.get("model"), f"{path}: model", sources=sources),
        dictionaries=_filled(
            DictionaryRecipe, content.get("dictionaries"), f"{path}: dictionaries"
        ),
        exceptions={
            name: _exception(content.get("dictionaries") or {}, change, f"{path}: {name}")
            for name, change in (content.get("exceptions") or {}).items()
        },
    )


def _exception(
    usual: Mapping[str, Any], change: Any, where: str
) -> tuple[tuple[str, ...], DictionaryRecipe]:
    if not isinstance(change, Mapping) or not isinstance(change.get("sites"), list):
        raise ValueError(f"{where}: expected the key 'sites' with a list, got {change!r}")
    for pattern in change["sites"]:
        if pattern not in MODULES:
            parse_site(str(pattern))
    numbers = {key: value for key, value in change.items() if key != "sites"}
    patterns = tuple(map(str, change["sites"]))
    return patterns, _filled(DictionaryRecipe, {**usual, **numbers}, where)


def _filled(recipe: type, values: Any, where: str, **more: Any) -> Any:
    values = values or {}
    types = {field.name: field.type for field in fields(recipe)}
    _known(values, types.keys() - more.keys(), where)
    for key, value in values.items():
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or (types[key] is int and not isinstance(value, int)):
            kind = "a whole number" if types[key] is int else "a number"
            raise ValueError(f"{where}: {key} is {value!r}, expected {kind}")
    return recipe(**values, **more)


def _known(values: Any, known: Any, where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    for key in values.keys() - set(known):
        raise ValueError(f"{where}: unknown key {key!r}{suggestion(str(key), sorted(known))}")


def train_suite(
    folder: Path,
    text: Path | None = None,
    recipe: str | Path | None = None,
    model: str | None = None,
    device: str = "cpu",
) -> Path:
    """Train a suite, or dictionaries for a model that is there already.

    What is finished is not done twice: a call after a kill goes on where the last checkpoint was.

    Args:
        folder: Where the suite goes; checkpoints and tokens lie in `folder/training`.
        text: Where the recipe's text files lie.
        recipe: A recipe file; by default the one of `flowlet`.
        model: A Hugging Face folder or name; then only dictionaries are trained, for it.
        device: A torch device; where it says `auto`, a GPU if there is one.

    Returns:
        `folder`, which `load_suite` reads.
    """
    settings = read_recipe(Path(recipe) if recipe else FLOWLET)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    work = folder / "training"  # kept, so that a second call finds what is done
    work.mkdir(parents=True, exist_ok=True)
    if model is None:
        model = str(train_model(settings.model, work, text, device))
        data = prepare(settings.model, work, text)[1].train
        loaded = load_model(model, device)
    else:
        loaded = load_model(model, device)
        data = _rows_for(loaded, settings, text)
    name = settings.name if Path(model).is_dir() else model
    trained = [
        train_dictionaries(
            numbers, loaded, _reading(data, settings, numbers), work / group, sites, model_name=name
        )
        for group, (sites, numbers) in settings.groups(loaded.sites()).items()
    ]
    assemble(folder, settings, model, trained)
    trained_model = (work / "recipe.json").is_file()
    write_text(folder / "about.md", about(settings, None if trained_model else model))
    from flowhelpers.card import measured_bars  # it needs what the training does not

    measured_bars(str(folder), work if trained_model else None, write=True)
    return folder


def about(settings: SuiteRecipe, model: str | None = None) -> str:
    """The words of a suite's card: what it is, and how and on what it was trained.

    Args:
        settings: The recipe.
        model: The model that was there already, if the recipe trained dictionaries alone.
    """
    m, usual = settings.model, settings.dictionaries
    lines = [f"# {settings.name}", "", settings.about, "", "## The model", ""]
    if model:
        lines.append(f"`{model}`, as it is.")
    else:
        lines += [
            f"Gemma 3's text architecture: {m.layers} layers, width {m.d_model}, {m.heads} heads"
            f" over {m.kv_heads} key-value heads, MLP of {m.d_mlp}, context of {m.context} tokens,"
            " embedding and unembedding tied. The tokenizer is a byte-level BPE of"
            f" {m.vocab_size:,} tokens, trained on the same text; it splits digits and puts `<bos>`"
            " before each text. Weights are kept in half precision.",
            "",
            f"It saw {m.steps * m.rows * m.context:,} tokens, in {m.steps:,} steps of {m.rows}"
            f" rows; Muon (peak rate {m.muon_lr:g}) for the matrices, AdamW ({m.adam_lr:g}) for"
            " the rest.",
        ]
    total = sum(settings.sources.values())
    lines += [
        "",
        "## The text",
        "",
        "| source | share of the tokens | what it is, and its licence |",
    ]
    lines += ["| --- | --- | --- |"]
    for name, share in settings.sources.items():
        lines.append(f"| `{name}` | {share / total:.0%} | {settings.licences.get(name, '')} |")
    lines += [
        "",
        f"{HELD_OUT_PERCENT} % of the documents, chosen by a hash of their content (of their path,"
        " for Python modules), were held out. The package's own passages are not in this text.",
        "",
        "## The dictionaries",
        "",
        "One at the output of each layer (`res`), and at what its attention (`att`) and its MLP"
        " (`mlp`) add to the stream. They were trained as BatchTopK SAEs with sae-lens and saved as"
        " JumpReLU SAEs. Each began from random weights of its own. BOS and other special tokens"
        " were left out.",
        "",
        "| sites | features | k | tokens | tokens a step | learning rate |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {', '.join(patterns)} | {d.features:,} | {d.k} | {d.steps * d.batch:,} | {d.batch}"
            f" | {d.lr:g} |"
            for patterns, d in [*settings.exceptions.values(), (("all others",), usual)]
        ),
    ]
    return "\n".join(lines) + "\n"


def _rows_for(model: Model, settings: SuiteRecipe, text: Path | None) -> dict[str, np.ndarray]:
    context = settings.model.context
    total = sum(settings.sources.values())
    others = (recipe.tokens for _, recipe in settings.exceptions.values())
    tokens = max(settings.dictionaries.tokens, *others, 0)
    rows = {}
    for name, share in settings.sources.items():
        budget = int(7 * tokens * share / total)
        documents = load_source(name, text).train(settings.dictionaries.seed, budget)
        rows[name] = token_rows(documents, model.tokenizer, context)
    return rows


def _reading(
    data: Mapping[str, np.ndarray], settings: SuiteRecipe, recipe: DictionaryRecipe
) -> np.ndarray:
    context = next(iter(data.values())).shape[1]
    total = (recipe.steps // steps_per_chunk(recipe, context) + 1) * recipe.rows
    counts = {name: len(rows) for name, rows in data.items()}
    order = reading_order(counts, settings.sources, total, recipe.seed + 1)
    names = list(data)
    return np.stack([data[names[source]][row] for source, row in order])


def assemble(folder: Path, settings: SuiteRecipe, model: str, dictionaries: Sequence[Path]) -> Path:
    """Put model and dictionaries into a suite's folder; the model only if it is a folder."""
    import yaml

    place = model
    if Path(model).is_dir():
        place = "model"
        _copy(Path(model), folder / place)
    for part in (path for group in dictionaries for path in group.iterdir() if path.is_dir()):
        _copy(part, folder / "dictionaries" / part.name)
    names = {path.name for path in (folder / "dictionaries").iterdir() if path.is_dir()}
    modules = sorted({name.split("-")[1] for name in names}, reverse=True)
    row = {
        "name": settings.name,
        "about": settings.about,
        "model": place,
        "layers": 1 + max(int(name.split("-")[0]) for name in names),
        "dictionaries": {module: f"dictionaries/{{layer}}-{module}" for module in modules},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(row, sort_keys=False), encoding="utf-8")
    return folder


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)


def held_out_rows(folder: Path, rows: int = 256, seed: int = 0) -> np.ndarray:
    """Held-out rows of a training folder, from every source by its share.

    Raises:
        FileNotFoundError: If the folder holds no tokens.
    """
    path = folder / "recipe.json"
    if not path.is_file():
        raise FileNotFoundError(f"no recipe.json in {folder}: expected the folder of a training")
    recipe = ModelRecipe(**json.loads(path.read_text()))
    _, data = prepare(recipe, folder, None)
    return _mixed(data, recipe, rows, seed)


def _mixed(data: TokenData, recipe: ModelRecipe, rows: int, seed: int) -> np.ndarray:
    counts = {name: len(held) for name, held in data.held_out.items()}
    order = reading_order(counts, recipe.sources, rows, seed)
    names = list(data.held_out)
    return np.stack([data.held_out[names[source]][row] for source, row in order])
