"""A suite's card: its figures beside what is asked of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import yaml
from pydantic import Field, TypeAdapter

from flowhelpers.activations.corpora import DOMAINS, load_texts
from flowhelpers.activations.sampling import text_length
from flowhelpers.core.files import read_json, write_json
from flowhelpers.suites.load import load_suite
from flowhelpers.suites.model import Tokens, special_ids, tokenize
from flowhelpers.suites.registry import find_suite
from flowhelpers.training.language_model import read_rows
from flowhelpers.training.measures import measure

LOCAL = "the package's passages and modules of the standard library that recipes hold out"
HELD_OUT = "held-out documents of the training mix"
Bound = Annotated[dict[Literal["at_least", "at_most"], float], Field(min_length=1, max_length=1)]


def read_yaml(path: Path, kind: Any) -> Any:
    """What a YAML file holds, as a value of a type; a ValueError names the file and the place."""
    try:
        return TypeAdapter(kind).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"cannot use {path}: {error}") from error


def bars(figures: Mapping[str, float], folder: Path | None) -> pd.DataFrame:
    """The figures beside what the `bars.yaml` of a suite's folder asks, if it has one.

    Returns:
        One row a figure: `value` (NaN if it was asked for and not measured), `at_least` or
        `at_most` (NaN if not asked), and whether it is `met`, as NaN never is.
    """
    path = folder / "bars.yaml" if folder else None
    asked = read_yaml(path, dict[str, Bound]) if path and path.is_file() else {}
    table = pd.DataFrame(asked, ["at_least", "at_most"], [*{**figures, **asked}], dtype=float).T
    table.insert(0, "value", pd.Series(figures, dtype=float))
    enough = table["at_least"].isna() | (table["value"] >= table["at_least"])
    few = table["at_most"].isna() | (table["value"] <= table["at_most"])
    return table.assign(met=enough & few)


def measured_bars(
    suite: str, training: Path | None = None, write: bool = False
) -> dict[str, pd.DataFrame]:
    """Measure a suite, by name or folder: its `bars`, by the text they were measured on.

    Held-out rows of a `training` folder are used as well; `write` puts a `card.json` in the suite.
    """
    folder = find_suite(suite).folder
    if write and folder is None:
        raise ValueError(f"suite {suite} is no folder: there is no place for its card")
    bars({}, folder)  # a mistake in what is asked shows before the work
    loaded = load_suite(suite)
    local = [text for name in DOMAINS for text in load_texts(name, None)]
    local, length = local + load_texts("python", 150, 0), text_length(loaded.model)
    texts = {LOCAL: tokenize(loaded.model, local, length)}
    if training and len(rows := read_rows(training, 256, 0, "held_out")):
        rows = rows[:, : loaded.model.bridge.cfg.n_ctx]
        ids = torch.from_numpy(rows.astype("int64")).to(loaded.model.device)
        special = special_ids(loaded.model.tokenizer).to(ids.device)
        texts = {HELD_OUT: Tokens(ids, ~torch.isin(ids, special)), **texts}
    measured, record = {}, {}
    for name, tokens in texts.items():
        figures, tables = measure(loaded, tokens)
        measured[name] = bars(figures, folder)
        named = {"bars": measured[name].reset_index(names="name"), **tables}
        record[name] = {title: table.to_dict("records") for title, table in named.items()}
    if write and folder:
        write_json(folder / "card.json", record)
    return measured


def stored_bars(suite: str) -> dict[str, pd.DataFrame]:
    """The figures of the card that a suite's folder holds, beside what is asked of it now."""
    folder = find_suite(suite).folder
    if not folder or not (path := folder / "card.json").is_file():
        raise FileNotFoundError(f"suite {suite} has no card; `card {suite} --measure` measures it")
    return {
        text: bars(pd.DataFrame(of["bars"]).set_index("name")["value"].to_dict(), folder)
        for text, of in read_json(path).items()
    }
