"""A progress bar wherever a notebook is read, as plain text, of which a saved one keeps nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def progress(iterable: Iterable[T], desc: str, total: int | None = None) -> Iterable[T]:
    """The iterable with a progress bar and the time left, shown once it takes over two seconds."""
    from tqdm import tqdm

    options: dict[str, Any] = {"desc": desc, "total": total, "delay": 2, "leave": False}
    # All on one line: a stored page would show the codes that move the cursor between lines.
    options |= {"position": 0, "file": sys.stdout if live() else sys.stderr}
    # A page that is stored is redrawn seldom.
    options["mininterval"] = 0.1 if live() or sys.stderr.isatty() else 5
    return tqdm(iterable, **options)


def live() -> bool:
    """Whether a front end with a person before it runs this cell, so that widgets are of use.

    Such a front end offers to answer `input()`; papermill and nbconvert do not.
    """
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    request = shell.get_parent() if hasattr(shell, "get_parent") else {}
    return bool(request.get("content", {}).get("allow_stdin"))
