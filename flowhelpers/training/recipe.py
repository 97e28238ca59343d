"""The whole recipe of a suite: model, SAEs, and the folder that `load_suite` reads."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, Field, PositiveFloat
from transformers import AutoTokenizer

from flowhelpers.activations.corpora import Source, digests, load_source, stream_documents
from flowhelpers.core.features import MODULES, Site, suggestion
from flowhelpers.core.files import DATA, fingerprint, read_json, write_json, write_text
from flowhelpers.core.machine import check_device
from flowhelpers.suites.bridge import load_model
from flowhelpers.training.card import measured_bars, read_yaml
from flowhelpers.training.language_model import (
    ModelRecipe,
    mixed_rows,
    read_rows,
    train_model,
    train_tokenizer,
    write_folder,
    write_rows,
)
from flowhelpers.training.saes import SAERecipe, train_saes

FLOWLET = DATA / "flowlet-recipe.yaml"


class SuiteRecipe(BaseModel, extra="forbid", frozen=True):
    """How a suite is trained: the share of each text source, the model and the SAEs.

    An exception is another way for some sites, such as `1/res`, or `att` for all of a module; what
    it does not say is as in `saes`.
    """

    name: str
    about: str = ""
    sources: dict[str, Annotated[PositiveFloat, Field(allow_inf_nan=False)]] = Field(min_length=1)
    licences: dict[str, str] = {}
    model: ModelRecipe = ModelRecipe()
    saes: SAERecipe = SAERecipe()
    exceptions: dict[str, dict[str, Any]] = {}

    def groups(self, sites: Sequence[Site]) -> list[tuple[list[Site], SAERecipe]]:
        """The sites that are trained alike, and how; those of no exception come first."""
        groups: list[tuple[list[Site], SAERecipe]] = []
        left = list(sites)
        for name, changes in self.exceptions.items():
            recipe = SAERecipe.model_validate(self.saes.model_dump() | changes)
            group = [site for site in left if {str(site), site.module} & set(recipe.sites)]
            matched = {str(site) for site in group} | {site.module for site in group}
            if not group or set(recipe.sites) - matched:
                known = ", ".join(map(str, left))
                raise ValueError(f"exception {name}: {recipe.sites} are not all left of {known}")
            left = [site for site in left if site not in group]
            groups.append((group, recipe))
        return [(left, self.saes), *groups] if left else groups


def train_suite(
    folder: Path,
    text: Path | None = None,
    recipe: Path | None = None,
    model: str | None = None,
    device: str = "cpu",
    sites: Iterable[str] | None = None,
) -> Path:
    """Train a suite, or SAEs for a model that is there already.

    What is finished is not done twice: a call after a kill goes on where the last checkpoint was,
    with the same recipe, model and text alone.

    Args:
        folder: Where the suite goes; tokens and what it was begun with lie in `folder/training`.
        text: Where the recipe's text files lie.
        recipe: A recipe file; by default the one of `flowlet`.
        model: A Hugging Face folder or name; then only SAEs are trained, for it, on rows of the
            recipe's length or of the model's context, if that is shorter.
        device: A torch device; `auto` is a GPU if there is one.
        sites: Train SAEs for these alone: modules, such as `att`, or sites, such as `12/att`.

    Raises:
        ValueError: If something given cannot be used, or `folder` was begun with something else.
        MemoryError: If training a single SAE does not fit.
    """
    settings: SuiteRecipe = read_yaml(recipe or FLOWLET, SuiteRecipe)
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() else "cpu"
    check_device(device)
    loaded = load_model(model, device) if model else None
    if loaded and (context := loaded.bridge.cfg.n_ctx) < settings.model.context:
        print(f"rows of {context} tokens, the context of {model}, not {settings.model.context}")
        fitting = settings.model.model_copy(update={"context": context})
        settings = settings.model_copy(update={"model": fitting})
    numbers, layers = settings.model, range(settings.model.layers)
    there = loaded.sites() if loaded else [Site(i, module) for i in layers for module in MODULES]
    asked = chosen_sites(sites, there)
    groups = [([s for s in group if s in asked], how) for group, how in settings.groups(there)]
    groups = [(group, how) for group, how in groups if group]
    for group, how in groups:
        width = loaded.d_model if loaded else numbers.d_model
        count, each = (
            how.at_once(width, numbers.context, device),
            how.memory(width, numbers.context),
        )
        print(f"{len(group)} SAEs, {each / 2**30:.2f} GiB each: {min(count, len(group))} at a time")
    is_folder = model is not None and Path(model).is_dir()
    record = {
        "recipe": settings.model_dump(exclude={"name", "about", "licences"}, exclude_none=True),
        "model": fingerprint(Path(model)) if model and is_folder else model or "new",
        "text": digests(settings.sources, text),
    } | ({"sites": sorted(map(str, asked))} if sites is not None else {})
    work = folder / "training"
    if work.exists():
        check_begun(work, record)
    else:
        tokens = max([how.tokens for _, how in groups] + [numbers.tokens] * (loaded is None))
        sources = {name: load_source(name, text) for name in settings.sources}
        known = loaded and loaded.tokenizer
        write_folder(work, partial(cut_rows, settings, sources, tokens, known, record))
    if loaded is None:
        rows = read_rows(work, numbers.steps * numbers.rows, numbers.seed)
        tokenizer = AutoTokenizer.from_pretrained(work)
        train_model(numbers, tokenizer, rows, folder / "model", device)
        loaded = load_model(str(folder / "model"), device)
    elif is_folder:
        given = {"dirs_exist_ok": True, "ignore": shutil.ignore_patterns(".*")}
        write_folder(folder / "model", partial(shutil.copytree, str(model), **given))
    on_hub = None if is_folder else model
    for group, how in groups:
        chunks = how.steps // how.steps_per_chunk(numbers.context) + 2
        rows = mixed_rows(work, chunks * how.rows, how.seed + 1)
        train_saes(how, loaded, rows, folder / "saes", group, on_hub or settings.name)
    whole = [m for m in MODULES if all(site in asked for site in there if site.module == m)]
    saes = {module: f"saes/{{layer}}-{module}" for module in whole}
    saes |= {str(s): f"saes/{s.layer}-{s.module}" for s in asked if s.module not in whole}
    row = {
        "name": settings.name,
        "about": settings.about,
        "model": on_hub or "model",
        "layers": 1 + max(site.layer for site in there),
        "saes": saes,
    }
    write_text(folder / "suite.yaml", yaml.safe_dump(row, sort_keys=False))
    measured_bars(str(folder), work, write=True)
    return folder


def chosen_sites(names: Iterable[str] | None, there: Sequence[Site]) -> list[Site]:
    """The sites of a model that are named, by module or one by one; all if no names are given."""
    if names is None:
        return list(there)
    known = {name for site in there for name in (str(site), site.module)}
    for name in (names := list(names)):
        if name not in known:
            raise ValueError(f"the model has no site {name!r}{suggestion(name, sorted(known))}")
    return [site for site in there if {str(site), site.module} & set(names)]


def check_begun(work: Path, now: dict[str, Any]) -> None:
    """What was begun is taken up only with what it was begun with; each difference is named."""
    import pandas as pd

    before = read_json(work / "recipe.json")
    now = now | {"text": before["text"] | now["text"]}  # text that is gone is not needed any more
    both = pd.concat([pd.json_normalize(x).T for x in (before, now)], axis=1).astype(str)
    changes = [f"{key} was {was}, now {new}" for key, was, new in both.itertuples() if was != new]
    if changes:
        raise ValueError(
            f"{work} was begun with another recipe: {'; '.join(changes)}."
            " Give another folder, or what it was begun with"
        )


def cut_rows(
    settings: SuiteRecipe,
    sources: Mapping[str, Source],
    tokens: int,
    tokenizer: Any,
    record: Mapping[str, Any],
    part: Path,
) -> None:
    """Cut text into rows of tokens, by a tokenizer that is trained if none is given."""
    total = sum(settings.sources.values())
    seed, context = settings.model.seed, settings.model.context
    if tokenizer is None:
        sample = (
            document[start : start + 20_000]
            for name, source in sources.items()
            for document in stream_documents(
                source, seed + 1, int(3e7 * settings.sources[name] / total)
            )
            for start in range(0, len(document), 20_000)
        )
        tokenizer = train_tokenizer(sample, settings.model.vocab_size)
    tokenizer.save_pretrained(part)
    for i, (name, source) in enumerate(sorted(sources.items())):
        budget = int(7 * tokens * settings.sources[name] / total)
        texts = stream_documents(source, seed, budget)
        if not write_rows(part / f"train-{i}.npy", texts, tokenizer, context):
            raise ValueError(f"source {name!r} gives no row of {context} tokens")
        held_out = stream_documents(source, seed, 2_000_000, held_out=True)
        write_rows(part / f"held_out-{i}.npy", held_out, tokenizer, context)
    write_json(part / "recipe.json", record)
