"""Files that appear whole or not at all, folders that no two runs share, and what decided them."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"  # of the package
HIDDEN = re.compile(r"\..*|.*~|#.*#|.*\.swp|__pycache__|desktop\.ini|thumbs\.db", re.IGNORECASE)


def writable_folder(folder: Path) -> Path:
    """The folder resolved, made unless it is there; an OSError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise OSError(f"cannot write to the folder {folder}: permission denied")
    return folder.resolve()


def new_folder(root: Path, name: str) -> Path:
    """Makes `root/name`, or `root/name-2` and so on if that is taken; it is never shared."""
    folder, number = writable_folder(root) / name, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = folder.with_name(f"{name}-{number}")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: `write` fills one beside it, which takes its place."""
    path = Path(path)
    writer = f"{os.getpid()}-{threading.get_ident()}"
    partial = path.with_name(f".{path.name}.{writer}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Writes a value as a JSON file, whole or not at all."""
    write_text(path, to_json(value) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; a ValueError names the file if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, it may be truncated or corrupt: {error}") from error


def load_yaml(path: Path) -> Any:
    """Reads a YAML file; a YAMLError names a key that is there twice: yaml keeps but the last."""
    import yaml

    class Once(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise yaml.YAMLError(f"{twice[0]} stands there twice")
            return super().construct_mapping(node, deep)

    return yaml.load(path.read_text(encoding="utf-8"), Once)


def to_json(value: object) -> str:
    """A value as JSON; arrays as lists, what else is unknown as text."""

    def plain(item: Any) -> object:
        return item.tolist() if hasattr(item, "tolist") else str(item)

    return json.dumps(value, indent=2, ensure_ascii=False, default=plain)


def files_below(path: Path) -> list[Path]:
    """The files below a folder in order, or the file that is given.

    Hidden ones (`.git`, `.DS_Store`, `desktop.ini`) and editors' backups (`a.txt~`) are no content
    of a folder, unless they are what is given. Links are followed, once around a circle.
    """
    if not path.is_dir():
        return [path]
    if path.is_symlink() and any(path.samefile(parent) for parent in path.absolute().parents):
        return []
    inside = sorted(each for each in path.iterdir() if not HIDDEN.fullmatch(each.name))
    return [file for each in inside for file in files_below(each)]


def fingerprint(path: Path) -> str:
    """A digest of a file, or of the files below a folder (`files_below`) with their names."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files_below(path):
        digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "blake2b").digest())
    return digest.hexdigest()
