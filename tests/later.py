"""Wheels as others may release them later: `python tests/later.py FOLDER` writes broken ones.

There is one of every package in the lock, of a version above all others, that fails on import. With
`PIP_FIND_LINKS=FOLDER` pip takes whichever it is free to take.
"""

import re
import sys
import zipfile
from pathlib import Path

LOCK = Path(__file__).parent.parent / "constraints.txt"


def write_wheel(folder: Path, name: str, version: str, code: str) -> None:
    """A wheel of one module of the package's name, with this code."""
    name = name.replace("-", "_").replace(".", "_")
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            wheel.writestr(path, text)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir()
    for name in set(re.findall(r"^([\w.-]+)==", LOCK.read_text("utf-8"), re.MULTILINE)):
        write_wheel(folder, name, "9999", "raise ImportError('a later release, and broken')\n")
