"""JupyterLab on a copy of the notebooks, and what it leaves out when it saves one."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowhelpers.core.files import DATA, write_text, write_whole
from flowhelpers.runs.parameters import notebooks_folder

COPIES = "flowhelpers-notebooks"
FIRST = "00_start_here.ipynb"
CHOICES = "CHOICES.md"
WIDGET = "application/vnd.jupyter.widget-view+json"
WRITTEN = re.compile(r"\w+\(.*\)$", re.DOTALL)  # as a widget stands in text, `VBox(children=...)`
CONFIG = DATA / "jupyter"  # of JupyterLab: it does not ask whether it may fetch news
# It looks for no newer version of itself and lists no extensions of PyPI's.
QUIET = [
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
]


def lab_command(folder: Path, rest: Sequence[str] = ()) -> list[str]:
    """The command that opens JupyterLab in a folder, at 00 in its copy of the notebooks.

    `rest` goes on to JupyterLab.
    """
    copies = copy_notebooks(folder / COPIES)
    first = copies / FIRST
    at = f"/lab/tree/{COPIES}" + (f"/{FIRST}" if first.exists() else "")
    hook = f"--FileContentsManager.pre_save_hook={__name__}.without_views"
    place = [f"--ServerApp.root_dir={folder}", f"--LabApp.default_url={at}"]
    return [sys.executable, "-m", "jupyterlab", *place, hook, *QUIET, *rest]


def copy_notebooks(folder: Path) -> Path:
    """Copies the notebooks with what they link to into a folder; what is there stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(notebooks_folder().glob("[!.]*")):
        copy = folder / path.name
        if copy.exists() or path.suffix not in (".ipynb", ".yaml"):
            continue
        text = path.read_text("utf-8").replace(f"](../flowhelpers/{CHOICES}", f"]({CHOICES}")
        write_text(copy, text)
    if not (folder / CHOICES).exists():
        write_whole(folder / CHOICES, lambda file: shutil.copyfile(DATA.parent / CHOICES, file))
    return folder


def without_views(model: dict[str, Any], **_: Any) -> None:
    """Drops the widgets of a notebook that Jupyter is about to save: they die with the kernel.

    What is shown in their place is the rest of their output: the picture that `core.panel` gives
    along, and a sentence.
    """
    if model["type"] != "notebook" or not isinstance(model.get("content"), dict):
        return
    model["content"].get("metadata", {}).pop("widgets", None)
    for cell in model["content"].get("cells", []):
        outputs = cell.get("outputs", [])
        if not (views := [each for each in outputs if WIDGET in each.get("data", {})]):
            continue
        for output in views:
            del output["data"][WIDGET]
            text = "".join(output["data"].get("text/plain", "none()"))
            if {*output["data"]} <= {"text/plain"} and WRITTEN.match(text):
                outputs.remove(output)
        note = {"text/markdown": "*Run this cell to use its controls.*"}
        outputs.insert(0, {"output_type": "display_data", "data": note, "metadata": {}})
