"""The notebooks with the code of their folded answers put in place of the exercises.

`python tests/answers.py FOLDER` writes them there, for `flowhelpers run` to execute by
`FLOWHELPERS_NOTEBOOKS=FOLDER`.
"""

import re
import shutil
import sys
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def answered(path: Path, folder: Path) -> int:
    """Copies a notebook with the code of its answers in its exercises; returns how many."""
    book = nbformat.read(path, as_version=4)
    cells = {cell.id: cell for cell in book.cells}
    count = 0
    for name, cell in cells.items():
        code = re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)
        if re.fullmatch(r"answer-\d+", name) and code:
            exercise = cells[name.replace("answer", "exercise")]
            exercise.source, put = re.subn(
                r"(?m)^my_\w+:.*= None$", lambda _, code=code: code[1], exercise.source, count=1
            )
            count += put
    nbformat.write(book, folder / path.name)
    return count


def write_answered(folder: Path) -> None:
    """Writes all notebooks so, with their presets."""
    folder.mkdir()
    shutil.copy(NOTEBOOKS / "presets.yaml", folder)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        assert answered(path, folder), f"{path.name} has no answer that is code"


if __name__ == "__main__":
    write_answered(Path(sys.argv[1]))
