"""A run's folder: what was asked, and the tables, figures and numbers that came of it.

    runs/<time>-<notebook>[-name]/
      config.json      parameters, choices, suite, versions, device, seed
      tables/          each table as .parquet and .csv
      figures/         each figure as .html (alive, no network needed) and .json, some as .svg
      results.json     the few numbers that answer the notebook's question

`flowhelpers run --resume` hands the same folder to a notebook that was stopped: tables that were
finished are read, not computed a second time.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhelpers.core.files import (
    DATA,
    new_folder,
    read_json,
    to_json,
    write_json,
    write_text,
    write_whole,
)

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

RUN_DIR = "FLOWHELPERS_RUN_DIR"  # set by `flowhelpers run`: the folder of the run in progress
RUNS = "FLOWHELPERS_RUNS"  # where other runs make their folders; `runs` unless set
PACKAGES = [
    *("flowhelpers", "torch", "transformers", "sae-lens", "transformer-lens", "plotly", "pandas")
]


@dataclass(frozen=True)
class Run:
    """One execution of a notebook; `kept` are the tables that were finished before."""

    folder: Path
    kept: frozenset[str] = frozenset()

    def table(self, name: str, compute: pd.DataFrame | Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Writes a table as `tables/<name>.parquet` and `.csv`; returns it as read back.

        A function that computes it is not called if the table was finished before this run was
        taken up again.
        """
        import pandas as pd

        path = self._path("tables", name, ".parquet")
        if not (callable(compute) and name in self.kept):
            frame: Any = compute() if callable(compute) else compute
            index = not isinstance(frame.index, pd.RangeIndex)
            write_whole(path.with_suffix(".csv"), lambda file: frame.to_csv(file, index=index))
            write_whole(path, frame.to_parquet)  # last, for its presence says "finished"
        return pd.read_parquet(path)

    def figure(self, name: str, figure: Figure, svg: str | None = None) -> Figure:
        """Writes a plotly figure as `figures/<name>.html` and `.json`, and returns it for display.

        The page needs no network: plotly.js lies beside it, once for all figures of the run. `svg`,
        as `flow.flow_svg` draws one without a browser, is written as `<name>.svg`.
        """
        from plotly.offline import get_plotlyjs

        from flowhelpers.core.pages import figure_html, figure_title, page

        path = self._path("figures", name, ".html")
        script = path.with_name("plotly.min.js")
        if not script.exists():
            write_text(script, get_plotlyjs())
        write_text(path.with_suffix(".json"), str(figure.to_json()))
        title = figure_title(figure.to_plotly_json()) or name
        write_text(path, page(title, figure_html(figure, "directory")))
        if svg is not None:
            write_text(path.with_suffix(".svg"), svg)
        return figure

    def results(self, values: Mapping[str, object]) -> dict[str, Any]:
        """Adds numbers to `results.json`, null where not finite; returns all that it holds now."""
        path = self.folder / "results.json"
        given = json.loads(to_json(values), parse_constant=lambda _: None)
        write_json(path, (read_json(path) if path.exists() else {}) | given)
        return read_json(path)

    def _path(self, kind: str, name: str, ending: str) -> Path:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r} cannot name a file: use letters, digits, '_', '-' and '.'")
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        return folder / (name + ending)


def start_run(
    notebook: str,
    namespace: Mapping[str, Any],
    choices: Iterable[int] = (),
    *,
    name: str | None = None,
) -> Run:
    """Starts a run and writes its `config.json`: parameters, choices, versions, device, seed.

    Under `flowhelpers run` the folder is the one it made; elsewhere a new one, below `runs/` or
    what the environment variable FLOWHELPERS_RUNS names. To take a run up again with other settings
    or versions than it was started with is a ValueError.

    Args:
        namespace: `globals()`, of which what earlier cells gave with a type is recorded, such as
            `seed: int = 0`; outside a notebook the parameters themselves.
        choices: Rows of CHOICES.md that bear on the notebook's numbers.
        name: A word to tell this run's folder from others.
    """
    parameters, settled = _parameters(namespace), settled_choices()
    asked = parameters.get("device")
    config = {
        "notebook": notebook,
        "parameters": parameters,
        "choices": {str(number): settled[number] for number in choices},
        "suite": parameters.get("suite"),
        "device": (asked if asked != "auto" else None) or _device(),
        "seed": parameters.get("seed"),
        "versions": _versions(),
        "platform": platform.platform(),
        "started": [time.strftime("%Y-%m-%d %H:%M:%S")],
    }
    config = json.loads(to_json(config))
    given = os.environ.get(RUN_DIR)
    root = Path(os.environ.get(RUNS, "runs"))
    folder = Path(given) if given else new_folder(root, folder_name(notebook, name))
    path = folder / "config.json"
    if path.exists():
        before = read_json(path)
        old, new = _settings(before), _settings(config)
        changed = [name for name in old | new if old.get(name) != new.get(name)]
        said = "; ".join(f"{n} was {old.get(n)!r} and is now {new.get(n)!r}" for n in changed)
        if changed:
            raise ValueError(f"{folder} was started with other settings: {said}")
        config["started"] = before["started"] + config["started"]
        for unfinished in folder.rglob(".*.partial"):
            unfinished.unlink()
    write_json(path, config)
    if "In" in namespace:  # a notebook, which shows texts in its tables whole
        import pandas as pd

        pd.set_option("display.max_colwidth", None)
    return Run(folder, frozenset(file.stem for file in folder.glob("tables/*.parquet")))


@cache
def settled_choices() -> dict[int, str]:
    """What the paper leaves open and how it is settled here, by the row's number in CHOICES.md."""
    text = (DATA.parent / "CHOICES.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|", text, re.MULTILINE)
    return {int(number): f"{question}: {default}" for number, question, default in rows}


def folder_name(notebook: str, name: str | None = None) -> str:
    """The name of a run's folder: `<time>-<notebook>[-name]`."""
    parts = [time.strftime("%Y%m%d-%H%M%S"), notebook, name]
    return "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts if part)


def check(answer: float | str | None, truth: float | str, tolerance: float = 0.01) -> str:
    """Says whether the answer to an exercise is right, and no more: no trying narrows it down.

    Words are compared without regard to case; a number may be off by `tolerance`.
    """
    if answer is None:
        return "no answer yet: put yours in place of None and run the cell again"
    if isinstance(truth, str) or isinstance(answer, str):
        right = str(answer).strip().lower() == str(truth).strip().lower()
    else:
        right = abs(answer - truth) <= tolerance
    return "right" if right else f"{answer!r} is not it: try again"


def environment() -> str:
    """Versions, device, cores and memory: what a run depends on, in a few lines."""
    import psutil

    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    memory = psutil.virtual_memory()
    return (
        f"versions: {versions}\n"
        f"device: {_device() or 'cpu'}; {os.cpu_count()} cores,"
        f" {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory free"
    )


def _parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The values of names that cells give with a type, up to the one that starts the run."""
    if "In" not in namespace:
        return dict(namespace)
    cells = takewhile(lambda cell: "start_run(" not in cell, namespace["In"])
    lines = [line for cell in cells for line in ast.parse(cell).body]
    names = [line.target for line in lines if isinstance(line, ast.AnnAssign)]
    return {name.id: namespace[name.id] for name in names if isinstance(name, ast.Name)}


def _versions() -> dict[str, str]:
    versions = {package: metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version()} | versions


def _device() -> str | None:
    torch = sys.modules.get("torch")
    return torch and (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    # Tables that are kept and those that come are to be of the same versions.
    versions = {f"version of {name}": version for name, version in config["versions"].items()}
    return {"notebook": config["notebook"]} | config["parameters"] | config["choices"] | versions
