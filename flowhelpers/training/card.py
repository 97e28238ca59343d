"""A suite's card: its figures beside what is asked of it, as text and as data."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from flowhelpers.core.files import read_json, write_json, write_text
from flowhelpers.training.measures import measure

if TYPE_CHECKING:
    import pandas as pd

TITLES = {
    "sites": "Each site",
    "flow": "Flow against chance, by layer",
    "tests": "Share of significant Mann-Whitney tests (p < 0.001; 5 tokens of each of 250 texts)",
    "themes": "The residual feature that tells a subject of the passages from all others",
}
LOCAL = "the package's passages and modules of the standard library that recipes hold out"
HELD_OUT = "held-out documents of the training mix"
ASKED = dict[
    str, Annotated[dict[Literal["at_least", "at_most"], float], Field(min_length=1, max_length=1)]
]


@dataclass(frozen=True)
class Bar:
    """One figure of a suite beside what was asked of it, if anything was."""

    name: str
    value: float
    asked: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of what was asked; NaN is on none."""
        if self.asked is None:
            return True
        return bool(self.value >= self.asked if self.at_least else self.value <= self.asked)

    @property
    def asks(self) -> str:
        """What was asked, in signs."""
        return "" if self.asked is None else f"{'≥' if self.at_least else '≤'} {self.asked:g}"

    def __str__(self) -> str:
        return f"{'' if self.met else 'MISSED':<7}{self.name:<48}{self.value:8.3f}  {self.asks}"


def bars(figures: Mapping[str, float], folder: Path | None) -> list[Bar]:
    """The figures beside what the `bars.yaml` of a suite's folder asks, if it has one.

    What is asked for and was not measured is not a number.
    """
    import yaml

    path = folder / "bars.yaml" if folder else None
    asked: dict[str, Any] = {}
    if path and path.is_file():
        try:
            asked = TypeAdapter(ASKED).validate_python(yaml.safe_load(path.read_text("utf-8")))
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(
                f"{path}: expected figures, each with at_least or at_most, such as"
                f" `bits per byte: {{at_most: 1.7}}` ({' '.join(str(error).split())})"
            ) from error
    found = []
    for name in dict.fromkeys([*figures, *asked]):
        kind, number = next(iter(asked.get(name, {}).items()), ("at_least", None))
        found.append(Bar(name, figures.get(name, math.nan), number, kind == "at_least"))
    return found


def measured_bars(
    suite: str, training: Path | None = None, write: bool = False
) -> dict[str, list[Bar]]:
    """Measure a suite: its figures, by the text they were measured on.

    Args:
        suite: A name or folder.
        training: The folder of its training, whose held-out rows are then used as well.
        write: Whether to write `card.md` and `card.json` into the suite's folder.
    """
    import torch

    from flowhelpers.activations.corpora import load_texts
    from flowhelpers.suites.load import load_suite
    from flowhelpers.suites.model import Tokens, tokenize
    from flowhelpers.suites.registry import find_suite
    from flowhelpers.training.language_model import read_rows

    row = find_suite(suite)
    if write and row.folder is None:
        raise ValueError(f"suite {row.name} is no folder: there is no place for its card")
    bars({}, row.folder)
    loaded = load_suite(suite)
    names = ("fiction", "science", "maths")
    local = [text for name in names for text in load_texts(name, None)]
    texts = {LOCAL: tokenize(loaded.model, local + load_texts("python", 150, 0), 128)}
    if training and len(rows := read_rows(training, 256, 0, "held_out")):
        ids = torch.from_numpy(rows.astype("int64"))
        special = torch.tensor(loaded.model.tokenizer.all_special_ids)
        device = loaded.model.device
        held_out = Tokens(ids.to(device), ~torch.isin(ids, special).to(device))
        texts = {HELD_OUT: held_out, **texts}
    measured, tables = {}, {}
    for name, tokens in texts.items():
        figures, tables[name] = measure(loaded, tokens)
        measured[name] = bars(figures, row.folder)
    if write and row.folder:
        write_card(row.folder, measured, tables)
    return measured


def stored_bars(suite: str) -> dict[str, list[Bar]]:
    """The figures of the card that a suite's folder holds."""
    from flowhelpers.suites.registry import find_suite

    row = find_suite(suite)
    path = row.folder / "card.json" if row.folder else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"suite {row.name} has no card; `card {suite} --measure` measures it"
        )
    return {text: [Bar(**b) for b in of["bars"]] for text, of in read_json(path).items()}


def write_card(
    folder: Path,
    measured: Mapping[str, list[Bar]],
    tables: "Mapping[str, Mapping[str, pd.DataFrame]]",
) -> None:
    """Write `card.md`, which begins with the folder's `about.md`, and `card.json`."""
    import pandas as pd

    about = folder / "about.md"
    lines = [about.read_text(encoding="utf-8").strip() if about.is_file() else "# Model card"]
    record = {}
    for text, figures in measured.items():
        shown = pd.DataFrame(
            {"figure": b.name, "value": b.value, "asked": b.asks, "": "" if b.met else "missed"}
            for b in figures
        )
        lines += [f"## Measured on {text}", markdown(shown)]
        for name, table in tables[text].items():
            lines += [f"### {TITLES[name]}", markdown(table)]
        records = {name: table.to_dict("records") for name, table in tables[text].items()}
        record[text] = {"bars": TypeAdapter(list[Bar]).dump_python(figures), "tables": records}
    write_text(folder / "card.md", "\n\n".join(lines) + "\n")
    write_json(folder / "card.json", record)


def markdown(table: "pd.DataFrame") -> str:
    """A table in Markdown (that of pandas asks for another package)."""
    rows = [table.columns, ["---"] * table.shape[1], *table.astype(object).to_numpy()]
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
