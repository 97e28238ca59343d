"""The whole recipe of a suite: model, SAEs, and the folder that `load_suite` reads."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, PositiveFloat, StringConstraints, model_validator

from flowhelpers.activations.corpora import HELD_OUT_PERCENT, digests, load_source, passages
from flowhelpers.core.features import MODULES, Site, suggestion
from flowhelpers.core.files import DATA, fingerprint, read_json, write_json, write_text
from flowhelpers.core.machine import check_device
from flowhelpers.suites.bridge import load_model
from flowhelpers.training.language_model import (
    ModelRecipe,
    read_rows,
    token_rows,
    train_model,
    train_tokenizer,
)
from flowhelpers.training.saes import SAERecipe, train_saes

FLOWLET = DATA / "flowlet-recipe.yaml"
OTHERS = "all-others"  # no exception can have this name
NEW_MODEL = "Gemma 3's text architecture, trained with Muon and AdamW; weights in half precision."
ABOUT = """# {name}

{about}

{model} The SAEs, at the output of each layer (`res`) and at what its attention (`att`) and its MLP
(`mlp`) add to the stream, are BatchTopK SAEs trained with sae-lens, each from random weights of its
own, and saved as JumpReLU SAEs. Special tokens were left out.

The text:
{sources}

{percent} % of the documents, chosen by a hash of their content (of their path, for Python modules),
were held out. The text holds {passages} of the package's own passages word for word.

```yaml
{numbers}```
"""
GroupName = Annotated[str, StringConstraints(pattern=r"^\w+$")]


class SAEException(SAERecipe, frozen=True):
    """Another way for some sites, such as `1/res`, or `att` for all of a module."""

    sites: list[str]


class SuiteRecipe(BaseModel, extra="forbid", frozen=True):
    """How a suite is trained: the share of each text source, the model and the SAEs.

    What an exception does not say is as in `saes`.
    """

    name: str
    about: str = ""
    sources: dict[str, Annotated[PositiveFloat, Field(allow_inf_nan=False)]] = Field(min_length=1)
    licences: dict[str, str] = {}
    model: ModelRecipe = ModelRecipe()
    saes: SAERecipe = SAERecipe()
    exceptions: dict[GroupName, SAEException] = {}

    @model_validator(mode="before")
    @classmethod
    def _exceptions_inherit(cls, content: Any) -> Any:
        match content:
            case {"saes": dict(saes), "exceptions": dict(exceptions)}:
                own = {n: saes | e if isinstance(e, dict) else e for n, e in exceptions.items()}
                return content | {"exceptions": own}
        return content

    @model_validator(mode="after")
    def _check(self) -> "SuiteRecipe":
        for recipe in (self.saes, *self.exceptions.values()):
            recipe.steps_per_chunk(self.model.context)
        if len({Path(name).name for name in self.sources}) < len(self.sources):
            raise ValueError("two sources have the same name in different folders")
        return self

    def groups(self, sites: Sequence[Site]) -> dict[str, tuple[list[Site], SAERecipe]]:
        """The sites that are trained alike, and how; those of no exception are `all-others`."""
        groups: dict[str, tuple[list[Site], SAERecipe]] = {}
        left = list(sites)
        for name, recipe in self.exceptions.items():
            group = [site for site in left if {str(site), site.module} & set(recipe.sites)]
            matched = {str(site) for site in group} | {site.module for site in group}
            for pattern in set(recipe.sites) - matched:
                raise ValueError(
                    f"exception {name}: no site {pattern} is left for it"
                    f"{suggestion(pattern, map(str, left))}"
                )
            left = [site for site in left if site not in group]
            groups[name] = (group, recipe)
        return {OTHERS: (left, self.saes), **groups} if left else groups


def read_recipe(path: Path = FLOWLET) -> SuiteRecipe:
    """Read a recipe from a YAML file, and check all that can be told before training."""
    import yaml

    try:
        return SuiteRecipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is no recipe: {error}") from error


def train_suite(
    folder: Path,
    text: Path | None = None,
    recipe: Path | None = None,
    model: str | None = None,
    device: str = "cpu",
) -> Path:
    """Train a suite, or SAEs for a model that is there already.

    What is finished is not done twice: a call after a kill goes on where the last checkpoint was,
    with the same recipe, model and text alone.

    Args:
        folder: Where the suite goes; checkpoints and tokens lie in `folder/training`.
        text: Where the recipe's text files lie.
        recipe: A recipe file; by default the one of `flowlet`.
        model: A Hugging Face folder or name; then only SAEs are trained, for it.
        device: A torch device; `auto` is a GPU if there is one.

    Raises:
        ValueError: If something given cannot be used, or `folder` was begun with something else.
    """
    from flowhelpers.training.card import measured_bars

    settings, device = read_recipe(recipe or FLOWLET), usable_device(device)
    work = folder / "training"
    try:
        loaded = load_model(model, device) if model else None
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the model {model!r} cannot be loaded: {reason}") from error
    layers = range(settings.model.layers)
    sites = loaded.sites() if loaded else [Site(i, module) for i in layers for module in MODULES]
    groups = settings.groups(sites)
    is_folder = model is not None and Path(model).is_dir()
    record = {
        "recipe": settings.model_dump(exclude={"name", "about", "licences"}),
        "model": fingerprint(Path(model)) if model and is_folder else model,
        "text": digests(settings.sources, text),
    }
    if (work / "tokens").exists():
        check_begun(work / "tokens" / "recipe.json", record)
    else:
        cut_rows(settings, work, text, loaded.tokenizer if loaded else None, record)
    if loaded is None:
        from transformers import PreTrainedTokenizerFast

        numbers = settings.model
        rows = read_rows(work, numbers.steps * numbers.rows, numbers.seed)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokens")
        model = str(train_model(numbers, tokenizer, rows, work, device))
        loaded, is_folder = load_model(model, device), True
    assert model is not None
    for group, (group_sites, numbers) in groups.items():
        chunks = numbers.steps // numbers.steps_per_chunk(settings.model.context) + 2
        rows = read_rows(work, chunks * numbers.rows, numbers.seed + 1)
        name, part = settings.name if is_folder else model, work / f"saes-{group}"
        for sae in train_saes(numbers, loaded, rows, part, group_sites, name).iterdir():
            copy_whole(sae, folder / "saes" / sae.name)
    write_suite(folder, settings, model, sites)
    measured_bars(str(folder), work, write=True)
    return folder


def usable_device(name: str) -> str:
    """A torch device that this machine has; `auto` is a GPU if there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.device_count() else "cpu"
    check_device(name)
    return name


def check_begun(path: Path, now: dict[str, Any]) -> None:
    """What was begun is taken up only with what it was begun with; each difference is named."""
    import pandas as pd

    before = read_json(path)
    now = now | {"passages": before["passages"]}
    now = now | {"text": before["text"] | now["text"]}  # text that is gone is not needed any more
    flat_before, flat_now = (pd.json_normalize(x).iloc[0].to_dict() for x in (before, now))
    changes = [
        f"{key} was {flat_before.get(key)}, now {flat_now.get(key)}"
        for key in flat_before | flat_now
        if flat_before.get(key) != flat_now.get(key)
    ]
    if changes:
        raise ValueError(
            f"{path.parents[1]} was begun with another recipe: {'; '.join(changes)}."
            " Give another folder, or what it was begun with"
        )


def cut_rows(
    settings: SuiteRecipe, work: Path, text: Path | None, tokenizer: Any, record: dict[str, Any]
) -> None:
    """Read the sources and cut them into rows, by a tokenizer that is trained if none is given."""
    sources = {name: load_source(name, text) for name in settings.sources}
    total = sum(settings.sources.values())
    seed, part = settings.model.seed, work / "tokens.part"
    recipes = [settings.saes, *settings.exceptions.values()]
    tokens = max(r.tokens for r in (recipes if tokenizer else [settings.model, *recipes]))
    seen = 0
    try:
        if tokenizer is None:
            sample = (
                document[start : start + 20_000]
                for name, source in sources.items()
                for document in source.train(seed + 1, int(3e7 * settings.sources[name] / total))
                for start in range(0, len(document), 20_000)
            )
            tokenizer = train_tokenizer(sample, settings.model.vocab_size)
            tokenizer.save_pretrained(part)
        for name, source in sources.items():
            documents = source.train(seed, int(7 * tokens * settings.sources[name] / total))
            train = token_rows(documents, tokenizer, settings.model.context)
            if not len(train):
                raise ValueError(f"source {name!r} gives no row of {settings.model.context} tokens")
            seen += sum(any(p in document for document in documents) for p in passages()["text"])
            held_out = source.held_out(seed, 2_000_000)
            rows = {"train": train, "held_out": token_rows(held_out, tokenizer, train.shape[1])}
            for split, values in rows.items():
                (part / split).mkdir(parents=True, exist_ok=True)
                np.save(part / split / f"{Path(name).name}.npy", values)
        write_json(part / "recipe.json", {**record, "passages": seen})
        os.replace(part, work / "tokens")
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for made in (work, work.parent):
            with suppress(OSError):  # only an empty folder is removed
                made.rmdir()


def write_suite(folder: Path, settings: SuiteRecipe, model: str, sites: Sequence[Site]) -> None:
    """The suite's model, if it is a folder, its `suite.yaml` and the words of its card."""
    import yaml

    if Path(model).is_dir():
        copy_whole(Path(model), folder / "model")
    row = {
        "name": settings.name,
        "about": settings.about,
        "model": "model" if Path(model).is_dir() else model,
        "layers": 1 + max(site.layer for site in sites),
        "saes": {m: f"saes/{{layer}}-{m}" for m in MODULES if m in {s.module for s in sites}},
    }
    write_text(folder / "suite.yaml", yaml.safe_dump(row, sort_keys=False))
    record = read_json(folder / "training" / "tokens" / "recipe.json")
    numbers, model_words = dict(record["recipe"], sources=None), NEW_MODEL
    if record["model"]:
        numbers["model"], model_words = None, "A model that was there already, as it is."
    total = sum(settings.sources.values())
    sources = [
        f"- `{name}`, {share / total:.0%} of the tokens. {settings.licences.get(name, '')}".strip()
        for name, share in settings.sources.items()
    ]
    words = ABOUT.format(
        name=settings.name,
        about=settings.about,
        model=model_words,
        sources="\n".join(sources),
        percent=HELD_OUT_PERCENT,
        passages=record["passages"],
        numbers=yaml.safe_dump(
            {k: v for k, v in numbers.items() if v is not None}, sort_keys=False
        ),
    )
    write_text(folder / "about.md", words)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a folder, so that `target` is whole or as it was."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
