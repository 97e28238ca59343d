"""The whole recipe of a suite: model, SAEs, and the folder that `load_suite` reads."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowhelpers.activations.corpora import HELD_OUT_PERCENT, digests, load_source
from flowhelpers.core.features import MODULES, Site, suggestion
from flowhelpers.core.files import check_json, fingerprint, read_json, write_json, write_text
from flowhelpers.core.machine import check_device
from flowhelpers.suites.model import Model, load_model
from flowhelpers.suites.registry import DATA
from flowhelpers.training.language_model import (
    PASSAGES,
    SPECIALS,
    ModelRecipe,
    TokenData,
    passages_in,
    read_rows,
    reading_order,
    token_rows,
    train_model,
)
from flowhelpers.training.saes import (
    SAERecipe,
    check_begun,
    steps_per_chunk,
    train_saes,
)

FLOWLET = DATA / "flowlet-recipe.yaml"
KEYS = {"name", "sources", "licences", "about", "model", "saes", "exceptions"}
OTHERS = "others"
RESERVED = {OTHERS, "model", "tokens"}  # folders of a training that are no exception's
SMALL, LARGE = 1e-9, 1e15
# What a number of a recipe may be; of those not named whole ones are from 1 on, others above zero.
RANGES = {
    "vocab_size": (256 + len(SPECIALS), LARGE),
    "context": (2, LARGE),
    "warmup": (0, LARGE),
    "seed": (0, LARGE),
    "decay": (0, 1),
    "beta1": (0, 1 - SMALL),
    "beta2": (0, 1 - SMALL),
}


@dataclass(frozen=True)
class SuiteRecipe:
    """How a suite is trained.

    Attributes:
        name: The suite's name.
        about: One line on what it is.
        sources: Name of each text source and its share of the tokens.
        licences: What each source is and its licence, for the card.
        model: How the language model is trained.
        saes: How its SAEs are trained.
        exceptions: For some sites another way: its name, the sites (`1/res`, or `att` for all of a
            module) and the numbers.
    """

    name: str
    about: str
    sources: dict[str, float]
    licences: dict[str, str]
    model: ModelRecipe
    saes: SAERecipe
    exceptions: dict[str, tuple[tuple[str, ...], SAERecipe]]

    def groups(self, sites: Sequence[Site]) -> dict[str, tuple[list[Site], SAERecipe]]:
        """The sites that are trained alike, and how; those of no exception are called `others`.

        Raises:
            ValueError: If an exception names a site that is not there, or is another's too.
        """
        groups: dict[str, tuple[list[Site], SAERecipe]] = {}
        left = list(sites)
        for name, (patterns, recipe) in self.exceptions.items():
            group = [site for site in left if {str(site), site.module} & set(patterns)]
            found = {str(site) for site in group} | {site.module for site in group}
            for pattern in patterns:
                if pattern not in found:
                    raise ValueError(
                        f"exception {name}: no site {pattern} is left for it"
                        f"{suggestion(pattern, map(str, left))}"
                    )
            left = [site for site in left if site not in group]
            groups[name] = (group, recipe)
        return {OTHERS: (left, self.saes), **groups} if left else groups

    @property
    def most_tokens(self) -> int:
        """The most tokens that any SAE is trained on."""
        return max(d.tokens for d in (self.saes, *(d for _, d in self.exceptions.values())))


def read_recipe(path: Path = FLOWLET) -> SuiteRecipe:
    """Read a recipe from a YAML file, and check all that can be told before training.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, a key is unknown or missing, or a value cannot be.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _known(content, KEYS, str(path))
    content = {key: value for key, value in content.items() if value is not None}
    for key in ("name", "sources"):
        if key not in content:
            raise ValueError(f"{path}: the key {key!r} is missing")
    for key in ("name", "about"):
        if not isinstance(content.get(key, ""), str):
            raise ValueError(f"{path}: {key} is {content[key]!r}, expected a text")
    for key in ("licences", "exceptions"):
        _mapping(content.get(key, {}), f"{path}: {key}")
    sources = _shares(content["sources"], f"{path}: sources")
    model = _filled(ModelRecipe, content.get("model", {}), f"{path}: model", sources=sources)
    _check_heads(model, f"{path}: model")

    def saes(values: Any, where: str) -> SAERecipe:
        numbers = _filled(SAERecipe, values, f"{path}: {where}")
        _check_batches(numbers, model.context, f"{path}: {where}")
        return numbers

    def exception(name: Any, change: Any) -> tuple[tuple[str, ...], SAERecipe]:
        sites = _patterns(name, change, f"{path}: {name}")
        numbers = {key: value for key, value in change.items() if key != "sites"}
        return sites, saes({**usual, **numbers}, str(name))

    usual = content.get("saes", {})
    return SuiteRecipe(
        name=content["name"],
        about=content.get("about", ""),
        sources=sources,
        licences=content.get("licences", {}),
        model=model,
        saes=saes(usual, "saes"),
        exceptions={
            str(name): exception(name, change)
            for name, change in content.get("exceptions", {}).items()
        },
    )


def _shares(sources: Any, where: str) -> dict[str, float]:
    for name, share in _mapping(sources, where).items():
        if not _is_number(share, float) or not 0 < share < LARGE:
            raise ValueError(f"{where}: {name} is {share!r}, expected a number above zero")
    if not sources:
        raise ValueError(f"{where}: there is none, expected names, each with its share")
    return {str(name): float(share) for name, share in sources.items()}


def _patterns(name: Any, change: Any, where: str) -> tuple[str, ...]:
    if not isinstance(change, Mapping) or not isinstance(change.get("sites"), list):
        raise ValueError(f"{where}: expected the key 'sites' with a list, got {change!r}")
    if not re.fullmatch(r"[\w-]+", str(name)) or name in RESERVED:
        raise ValueError(f"{where}: expected another name, of letters, digits, '_' and '-'")
    return tuple(map(str, change["sites"]))


def _filled(recipe: type, values: Any, where: str, **more: Any) -> Any:
    types = {field.name: field.type for field in fields(recipe)}
    _known(values, types.keys() - more.keys(), where)
    for key, value in values.items():
        whole = types[key] is int
        if not _is_number(value, types[key]):
            kind = "a whole number" if whole else "a number, such as 0.001"
            raise ValueError(f"{where}: {key} is {value!r}, expected {kind}")
        low, high = RANGES.get(key, (1 if whole else SMALL, LARGE))
        if not low <= value <= high:
            expected = f"{low:g} to {high:g}" if high < LARGE else f"{low:g} or more"
            raise ValueError(f"{where}: {key} is {value!r}, expected {expected}")
    return recipe(**values, **more)


def _is_number(value: Any, kind: Any) -> bool:
    fits = isinstance(value, int if kind is int else int | float)
    return fits and not isinstance(value, bool)


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    return values


def _known(values: Any, known: Iterable[str], where: str) -> None:
    for key in _mapping(values, where).keys() - set(known):
        raise ValueError(f"{where}: unknown key {key!r}{suggestion(str(key), sorted(known))}")


def _check_heads(m: ModelRecipe, where: str) -> None:
    if m.heads % m.kv_heads:
        fitting = ", ".join(str(n) for n in range(1, m.heads + 1) if m.heads % n == 0)
        raise ValueError(
            f"{where}: kv_heads is {m.kv_heads} with {m.heads} heads, expected one of {fitting}"
        )
    step = 2 * m.heads  # a head's width is even, for its rotary embedding
    if m.d_model % step:
        near = max(1, round(m.d_model / step)) * step
        raise ValueError(
            f"{where}: d_model is {m.d_model} with {m.heads} heads, expected a multiple of {step},"
            f" such as {near}"
        )


def _check_batches(numbers: SAERecipe, context: int, where: str) -> None:
    if numbers.k > numbers.features:
        raise ValueError(
            f"{where}: k is {numbers.k}, expected 1 to {numbers.features}, the number of features"
        )
    try:
        steps_per_chunk(numbers, context)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def usable_device(name: str) -> str:
    """A torch device that this machine has; `auto` is a GPU if there is one.

    Raises:
        ValueError: If it has none such.
    """
    if name == "auto":
        return "cuda" if torch.cuda.device_count() else "cpu"
    check_device(name)
    return name


def train_suite(
    folder: Path,
    text: Path | None = None,
    recipe: str | Path | None = None,
    model: str | None = None,
    device: str = "cpu",
) -> Path:
    """Train a suite, or SAEs for a model that is there already.

    What is finished is not done twice: a call after a kill goes on where the last checkpoint was.
    Each stage keeps what decided it beside what it made, and is taken up with the same alone.

    Args:
        folder: Where the suite goes; checkpoints and tokens lie in `folder/training`.
        text: Where the recipe's text files lie.
        recipe: A recipe file; by default the one of `flowlet`.
        model: A Hugging Face folder or name; then only SAEs are trained, for it.
        device: A torch device; where it says `auto`, a GPU if there is one.

    Returns:
        `folder`, which `load_suite` reads.

    Raises:
        ValueError: If a recipe, device or model cannot be used, or what is in `folder` was begun
            with another recipe or model, or from other text.
        FileNotFoundError: If a text source is not there.
    """
    settings = read_recipe(Path(recipe) if recipe else FLOWLET)
    device = usable_device(device)
    work = folder / "training"  # kept, so that a second call finds what is done
    try:
        groups = _train(settings, folder, text, model, device)
    finally:
        for made in (work, folder):
            with suppress(OSError):  # only an empty folder is removed
                made.rmdir()
    write_text(folder / "about.md", about(settings, work, groups, model))
    from flowhelpers.training.card import measured_bars  # it needs what the training does not

    measured_bars(str(folder), None if model else work, write=True)
    return folder


def _train(
    settings: SuiteRecipe, folder: Path, text: Path | None, model: str | None, device: str
) -> list[str]:
    # Trains and assembles all but the card; returns the names of the groups of sites.
    work, m = folder / "training", settings.model
    if model is None:
        loaded = None
        sites = [Site(layer, module) for layer in range(m.layers) for module in MODULES]
        origin: dict[str, Any] = {"model": "this recipe's"}
    else:
        loaded = _loaded(model, device)
        sites = loaded.sites()
        origin = {
            "model": fingerprint(Path(model)) if Path(model).is_dir() else model,
            "sources": settings.sources,
            "context": m.context,
            "tokens": settings.most_tokens,
            "seed": settings.saes.seed,
            "text": digests(settings.sources, text),
        }
    groups = settings.groups(sites)
    for group, (at, numbers) in groups.items():
        check_begun(numbers, work / group, at, origin)
    if loaded is None:
        model = str(train_model(m, work, text, device))
        data = read_rows(m, work)[1].train
        loaded = load_model(model, device)
    else:
        data = _rows_for(loaded, settings, text, work)
    assert model is not None
    name = settings.name if Path(model).is_dir() else model
    trained = [
        train_saes(
            numbers,
            loaded,
            _reading(data, settings, numbers),
            work / group,
            at,
            model_name=name,
            origin=origin,
        )
        for group, (at, numbers) in groups.items()
    ]
    assemble(folder, settings, model, trained)
    return list(groups)


def _loaded(model: str, device: str) -> Model:
    try:
        if Path(model).is_dir():
            check_json(Path(model))
        return load_model(model, device)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the model {model!r} cannot be loaded: {reason}") from error


def about(
    settings: SuiteRecipe, work: Path, groups: Sequence[str], model: str | None = None
) -> str:
    """The words of a suite's card: what it is, and how and on what it was trained.

    The words are the recipe's; the numbers are those that the training left beside its output.

    Args:
        settings: The recipe.
        work: The folder of the training.
        groups: The groups of sites that were trained alike.
        model: The model that was there already, if the recipe trained SAEs alone.
    """
    records = {group: read_json(work / group / "recipe.json") for group in groups}
    lines = [f"# {settings.name}", "", settings.about, "", "## The model", ""]
    if model:
        lines.append(f"`{model}`, as it is.")
        sources = next(iter(records.values()))["origin"]["sources"]
    else:
        m = ModelRecipe(**read_json(work / "recipe.json"))
        sources = m.sources
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
    total = sum(sources.values())
    seen = read_json((work if model else work / "tokens") / PASSAGES)
    lines += [
        "",
        "## The text",
        "",
        "| source | share of the tokens | what it is, and its licence |",
        "| --- | --- | --- |",
        *(
            f"| `{name}` | {share / total:.0%} | {settings.licences.get(name, '')} |"
            for name, share in sources.items()
        ),
        "",
        f"{HELD_OUT_PERCENT} % of the documents, chosen by a hash of their content (of their path,"
        f" for Python modules), were held out. Of the package's own passages {seen or 'none'}"
        f" stand{'s' if seen < 2 else ''} in this text word for word"
        f"{': what is measured on them is measured on text seen in training' if seen else ''}.",
        "",
        "## The SAEs",
        "",
        "One at the output of each layer (`res`), and at what its attention (`att`) and its MLP"
        " (`mlp`) add to the stream. They were trained as BatchTopK SAEs with sae-lens and saved as"
        " JumpReLU SAEs. Each began from random weights of its own. BOS and other special tokens"
        " were left out.",
        "",
        "| sites | features | k | tokens | tokens a step | learning rate |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for group, record in records.items():
        numbers = {key: record[key] for key in record.keys() - {"sites", "origin"}}
        d = SAERecipe(**numbers)
        sites = "all others" if group == OTHERS and len(records) > 1 else ", ".join(record["sites"])
        lines.append(
            f"| {sites} | {d.features:,} | {d.k} | {d.steps * d.batch:,} | {d.batch} | {d.lr:g} |"
        )
    return "\n".join(lines) + "\n"


def _rows_for(
    model: Model, settings: SuiteRecipe, text: Path | None, work: Path
) -> dict[str, np.ndarray]:
    total = sum(settings.sources.values())
    rows, seen = {}, set()
    for name, source in [(name, load_source(name, text)) for name in settings.sources]:
        budget = int(7 * settings.most_tokens * settings.sources[name] / total)
        documents = source.train(settings.saes.seed, budget)
        seen |= passages_in(documents)
        rows[name] = token_rows(documents, model.tokenizer, settings.model.context)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / PASSAGES, len(seen))
    return rows


def _reading(
    data: Mapping[str, np.ndarray], settings: SuiteRecipe, recipe: SAERecipe
) -> np.ndarray:
    context = next(iter(data.values())).shape[1]
    total = (recipe.steps // steps_per_chunk(recipe, context) + 1) * recipe.rows
    counts = {name: len(rows) for name, rows in data.items()}
    order = reading_order(counts, settings.sources, total, recipe.seed + 1)
    names = list(data)
    return np.stack([data[names[source]][row] for source, row in order])


def assemble(folder: Path, settings: SuiteRecipe, model: str, saes: Sequence[Path]) -> Path:
    """Put model and SAEs into a suite's folder; the model only if it is a folder."""
    import yaml

    place = model
    if Path(model).is_dir():
        place = "model"
        _copy(Path(model), folder / place)
    for part in (path for group in saes for path in group.iterdir() if path.is_dir()):
        _copy(part, folder / "saes" / part.name)
    names = {path.name for path in (folder / "saes").iterdir() if path.is_dir()}
    modules = sorted({name.split("-")[1] for name in names}, reverse=True)
    row = {
        "name": settings.name,
        "about": settings.about,
        "model": place,
        "layers": 1 + max(int(name.split("-")[0]) for name in names),
        "saes": {module: f"saes/{{layer}}-{module}" for module in modules},
    }
    write_text(folder / "suite.yaml", yaml.safe_dump(row, sort_keys=False))
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
    recipe = ModelRecipe(**read_json(path))
    return _mixed(read_rows(recipe, folder)[1], recipe, rows, seed)


def _mixed(data: TokenData, recipe: ModelRecipe, rows: int, seed: int) -> np.ndarray:
    counts = {name: len(held) for name, held in data.held_out.items()}
    order = reading_order(counts, recipe.sources, rows, seed)
    names = list(data.held_out)
    return np.stack([data.held_out[names[source]][row] for source, row in order])
