"""Documents to train on: files and folders of text, hub datasets, and the interpreter's own source.

Whether a document is held out depends on its content alone, so that no later choice of order,
budget or seed can bring a held-out document into training.
"""

import gzip
import hashlib
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from flowhelpers.core.features import suggestion
from flowhelpers.core.files import fingerprint

SEPARATOR = "<|endoftext|>"
HELD_OUT_PERCENT = 2


def is_held_out(key: str) -> bool:
    """Whether the document of this key (its text, or a module's path) is kept from training."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True)
class Documents:
    """A source of documents as (key, text) pairs; the key decides what is held out."""

    name: str
    pairs: Callable[[], Iterator[tuple[str, str]]]

    def train(self, seed: int, budget: int) -> list[str]:
        """Documents to train on in seeded order, up to about `budget` characters."""
        return self._take(False, seed, budget)

    def held_out(self, seed: int, budget: int) -> list[str]:
        """Documents never trained on in seeded order, up to about `budget` characters."""
        return self._take(True, seed, budget)

    def _take(self, held_out: bool, seed: int, budget: int) -> list[str]:
        documents = [text for key, text in self.pairs() if is_held_out(key) == held_out]
        taken, size = [], 0
        for index in np.random.default_rng(seed).permutation(len(documents)):
            if size >= budget:
                break
            taken.append(documents[index][: budget - size])
            size += len(taken[-1])
        return taken


def load_source(name: str, folder: Path | None = None) -> Documents:
    """A source by name: `stdlib`, `pydoc`, a text file or folder, or a dataset of the hub.

    Args:
        name: A file's or folder's path (looked up in `folder` first), or a hub id `owner/name`.
        folder: Where text files lie.

    Raises:
        FileNotFoundError: If there is no such file and the name is not a hub id.
    """
    if name in OWN:
        return Documents(name, OWN[name])
    if folder and not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to look up the text source {name!r} in")
    if path := find_file(name, folder):
        return Documents(name, partial(text_documents, path))
    if name.count("/") == 1:
        return Documents(name, partial(hub_documents, name))
    here = [*OWN, *sorted(path.name for path in folder.iterdir())] if folder else list(OWN)
    raise FileNotFoundError(
        f"no text source {name!r}: expected stdlib, pydoc, a file or folder"
        f"{f' (looked in {folder})' if folder else ''}, or a hub dataset owner/name"
        f"{suggestion(name, here)}"
    )


def find_file(name: str, folder: Path | None = None) -> Path | None:
    """The file or folder that a source is, if it is one."""
    places = ([folder / name] if folder else []) + [Path(name)]
    return next((path for path in places if name not in OWN and path.exists()), None)


def digests(names: Iterable[str], folder: Path | None = None) -> dict[str, str]:
    """A digest of the content of each source that is a file or folder."""
    found = {name: find_file(name, folder) for name in names}
    return {name: fingerprint(path) for name, path in found.items() if path}


def text_documents(path: Path) -> Iterator[tuple[str, str]]:
    """Documents of a text file (`.gz` too) or of every file below a folder.

    Lines `<|endoftext|>` part documents of one file.

    Raises:
        ValueError: If a file is empty or not UTF-8 text.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        opener = gzip.open if file.suffix == ".gz" else open
        try:
            with opener(file, "rt", encoding="utf-8") as handle:
                text = handle.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"cannot read {file}: {error}") from error
        if not text.strip():
            raise ValueError(f"{file} is empty: expected text")
        for document in text.split(SEPARATOR):
            if document.strip():
                yield document.strip(), document.strip()


def stdlib_modules() -> Iterator[tuple[str, str]]:
    """Source of the standard library's modules, its tests left out, keyed by path."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules are kept in older encodings on purpose
            continue
        if len(text) > 200:
            yield relative.as_posix(), text


def pydoc_topics() -> Iterator[tuple[str, str]]:
    """The language reference's topics, as shipped with the interpreter."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def hub_documents(
    name: str, split: str = "train", column: str = "text", limit: int = 200_000
) -> Iterator[tuple[str, str]]:
    """The first `limit` documents of a hub dataset, streamed.

    Raises:
        ValueError: If the dataset has no such column, or cannot be read.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split, streaming=True).take(limit)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the dataset {name}, split {split!r}: {error}") from error
    for row in rows:
        if column not in row:
            raise ValueError(f"{name} has no column {column!r}{suggestion(column, row)}")
        yield row[column], row[column]


OWN = {"stdlib": stdlib_modules, "pydoc": pydoc_topics}
