"""A suite's card: its figures beside what is asked of it, as text and as data."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowhelpers.core.files import check_json, write_json, write_text
from flowhelpers.training.measures import local_tokens, measure, row_tokens

if TYPE_CHECKING:
    import pandas as pd

TITLES = {
    "sites": "Each site",
    "flow": "Flow against chance, by layer",
    "tests": "Share of significant Mann-Whitney tests (p < 0.001; 5 tokens of each of 250 texts)",
    "themes": "The residual feature that tells a subject of the passages from all others",
    "examples": "Two features of every site, chosen by rule: a third and two thirds of the way"
    " from the rarest to the commonest; its strongest «token» in context, from three texts",
}


@dataclass(frozen=True)
class Bar:
    """One figure of a suite beside what was asked of it, if anything was."""

    name: str
    value: float
    asked: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of what was asked."""
        if self.asked is None:
            return True
        return bool(self.value >= self.asked if self.at_least else self.value <= self.asked)

    @property
    def asks(self) -> str:
        """What was asked, in signs."""
        return "" if self.asked is None else f"{'≥' if self.at_least else '≤'} {self.asked:g}"

    def __str__(self) -> str:
        return f"{'' if self.met else 'MISSED':<7}{self.name:<48}{self.value:8.3f}  {self.asks}"


Measured = tuple[list[Bar], "dict[str, pd.DataFrame]"]

LOCAL = "the package's passages and modules of the standard library that recipes hold out"
HELD_OUT = "held-out documents of the training mix"
KINDS = {"at_least": True, "at_most": False}


def asked_of(folder: Path | None) -> dict[str, tuple[float, bool]]:
    """What is asked of a suite: the `bars.yaml` of its folder, if it has one.

    Returns:
        For each figure a number, and whether it is asked for at least (or at most) that.

    Raises:
        ValueError: If the file does not hold figures, each with `at_least` or `at_most` a number.
    """
    import yaml

    path = folder / "bars.yaml" if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        asked = {name: next(iter(bar.items())) for name, bar in content.items()}
        return {str(name): (float(at), KINDS[kind]) for name, (kind, at) in asked.items()}
    except (
        yaml.YAMLError,
        AttributeError,
        KeyError,
        StopIteration,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path}: expected figures, each with {' or '.join(KINDS)}, such as"
            f" `bits per byte: {{at_most: 1.7}}` ({' '.join(str(error).split())})"
        ) from error


def bars(figures: Mapping[str, float], asked: Mapping[str, tuple[float, bool]]) -> list[Bar]:
    """The figures beside what is asked; what is asked for and was not measured is not a number."""
    return [
        Bar(name, figures.get(name, math.nan), *asked.get(name, (None, True)))
        for name in dict.fromkeys([*figures, *asked])
    ]


def measured_bars(name: str, rows: Path | None = None, write: bool = False) -> dict[str, list[Bar]]:
    """Measure a suite.

    Args:
        name: A suite.
        rows: The folder of its training, whose held-out rows are then used as well.
        write: Whether to write `card.md` and `card.json` into the suite's folder.

    Returns:
        The figures, by the text they were measured on.

    Raises:
        ValueError: If a card is to be written and the suite is no folder.
    """
    from flowhelpers.suites.load import load_suite
    from flowhelpers.suites.registry import find_suite

    row = find_suite(name)
    if write and row.folder is None:
        raise ValueError(f"suite {row.name} is no folder: there is no place for its card")
    asked = asked_of(row.folder)
    if Path(row.model).is_dir():
        check_json(Path(row.model))
    suite = load_suite(name)
    texts = {LOCAL: local_tokens(suite)}
    if rows:
        from flowhelpers.training.recipe import held_out_rows

        texts = {HELD_OUT: row_tokens(suite, held_out_rows(rows)), **texts}
    measured: dict[str, Measured] = {}
    for text, tokens in texts.items():
        figures, tables = measure(suite, tokens)
        measured[text] = bars(figures, asked), tables
    if write and row.folder:
        write_card(row.folder, measured)
    return {text: found for text, (found, _) in measured.items()}


def stored_bars(name: str) -> dict[str, list[Bar]]:
    """The figures of the card that a suite's folder holds.

    Raises:
        FileNotFoundError: If it has none.
    """
    from flowhelpers.suites.registry import find_suite

    row = find_suite(name)
    path = row.folder / "card.json" if row.folder else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"suite {row.name} has no card; `card {name} --measure` measures it"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    return {text: [Bar(**bar) for bar in found["bars"]] for text, found in record.items()}


def write_card(folder: Path, measured: "Mapping[str, Measured]") -> None:
    """Write `card.md` and `card.json` into a suite's folder.

    Args:
        folder: The suite's folder; its `about.md`, if there is one, comes before the figures.
        measured: For each text it was measured on, the figures and the tables behind them.
    """
    about = folder / "about.md"
    lines = [about.read_text(encoding="utf-8").strip() if about.is_file() else "# Model card"]
    for name, (bars, tables) in measured.items():
        lines += ["", f"## Measured on {name}", ""]
        lines += ["| figure | value | asked | |", "| --- | --- | --- | --- |"]
        for bar in bars:
            lines.append(
                f"| {bar.name} | {bar.value:.3f} | {bar.asks} | {'' if bar.met else 'missed'} |"
            )
        for title, table in tables.items():
            lines += ["", f"### {TITLES[title]}", "", _markdown(table)]
    record = {
        name: {
            "bars": [asdict(bar) for bar in bars],
            "tables": {title: table.to_dict("records") for title, table in tables.items()},
        }
        for name, (bars, tables) in measured.items()
    }
    write_text(folder / "card.md", "\n".join(lines) + "\n")
    write_json(folder / "card.json", record)


def _markdown(table: "pd.DataFrame") -> str:
    def cell(value: object) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", "\\n")

    rows = [list(table.columns), ["---"] * table.shape[1], *table.astype(object).values.tolist()]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)
