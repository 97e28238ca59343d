"""Texts to read and to train on: the paper's corpora on the hub, and four that need no network.

Every sample is seeded and holds no text twice. Whether a document is held out from training depends
on its content alone: no order, budget or seed can bring it into training.
"""

import gzip
import hashlib
import json
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.core.features import suggestion
from flowhelpers.core.files import DATA, files_below, fingerprint

if TYPE_CHECKING:
    import pandas as pd

PASSAGES = DATA / "passages"
Documents = Iterator[tuple[str, str]]  # keys and texts; the key decides what is held out
Source = Callable[[], Documents]
SEPARATOR = "<|endoftext|>"
HELD_OUT_PERCENT = 2


# Hub id and configuration. The paper gives a configuration for FineWeb only. AutoMathText has
# twenty; this one is web pages, like the other corpora, and those of the highest scores.
PAPER_DATASETS: dict[str, tuple[str, str | None]] = {
    "fineweb": ("HuggingFaceFW/fineweb", "default"),
    "tinystories": ("roneneldan/TinyStories", None),
    "automathtext": ("math-ai/AutoMathText", "web-0.80-to-1.00"),
    "python-github-code": ("tomekkorbak/python-github-code", None),
}
DOMAINS = ("fiction", "science", "maths")
LOCAL_DATASETS = (*DOMAINS, "python")  # python: standard library modules held out from training
CORPORA = (*PAPER_DATASETS, *LOCAL_DATASETS)


def load_texts(
    name_or_path: str | Path, n: int | None, seed: int = 0, or_fewer: bool = False
) -> list[str]:
    """Sample different texts of a corpus, or of a text file or folder of your own.

    Args:
        name_or_path: A name in `CORPORA`, or the path of UTF-8 text, a file (parted into texts by
            `<|endoftext|>`) or a folder, of which hidden files and folders are left out.
        n: How many; None for all of a corpus that is not on the hub.
        seed: Decides which texts are taken; a smaller `n` gives the first of them.
        or_fewer: Whether a corpus that has fewer may give all it has.

    Raises:
        ValueError: If the corpus is unknown, has fewer than `n` texts, or a file is not text.
        FileNotFoundError: If there is no such file or folder.
        ConnectionError: If a hub corpus cannot be read.
    """
    if n is not None and n < 1:
        raise ValueError(f"cannot load n={n} texts: expected at least 1, or None for all")
    on_hub = PAPER_DATASETS.get(name_or_path) if isinstance(name_or_path, str) else None
    if on_hub:
        if n is None:
            raise ValueError(f"n=None takes all texts: {name_or_path!r} is on the hub, give n")
        documents = (text for _, text in hub_documents(*on_hub, seed))
    elif name_or_path in DOMAINS:
        documents = (row["text"] for row in _passages() if row["domain"] == name_or_path)
    elif name_or_path == "python":
        documents = iter(_held_out_python())
    else:
        path = Path(name_or_path).expanduser()
        if not path.exists():
            is_path = len(path.parts) > 1 or path.suffix
            what = "there is no file, folder or corpus" if is_path else "unknown corpus"
            error = FileNotFoundError if is_path else ValueError
            raise error(f"{what} {str(path)!r}{suggestion(str(name_or_path), CORPORA)}")
        documents = (text for _, text in text_documents(path))
    seen: dict[str, None] = {}
    for text in documents:
        seen[text] = None
        if on_hub and len(seen) == n:
            break
    texts = list(seen)
    if n is not None and n > len(texts) and not or_fewer:
        there = f"{str(name_or_path)!r} has {len(texts)} different texts"
        raise ValueError(f"{there}, {n} were asked for (n=None takes all of a local corpus)")
    if on_hub:  # already in seeded order
        return texts
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:n]]


def passages() -> "pd.DataFrame":
    """The package's own passages, always in the same order: columns subject, domain and text.

    Those of the domain `reference` are in no corpus: they are there for their subjects.
    """
    import pandas as pd

    return pd.DataFrame(_passages(), columns=["subject", "domain", "text"])


def subjects() -> list[str]:
    """The subjects of the package's passages, each once, in the order of `passages`."""
    return list(dict.fromkeys(passage["subject"] for passage in _passages()))


@cache
def _passages() -> tuple[dict[str, str], ...]:
    files = sorted(PASSAGES.glob("*.jsonl"))
    return tuple(json.loads(line) for file in files for line in file.open(encoding="utf-8"))


@cache
def _held_out_python() -> tuple[str, ...]:
    # The encodings are tables of characters, not code that a person would write.
    return tuple(
        piece
        for path, source in stdlib_modules()
        if is_held_out(path) and not path.startswith("encodings/")
        for piece in python_pieces(source)
    )


def python_pieces(source: str) -> list[str]:
    """Cut Python source into pieces of 60 to 150 words, if it can be where a function begins."""
    least, most = 60, 150
    pieces, lines, words = [], [], 0
    for line in source.split("\n"):
        size = len(line.split())
        begins = re.match(r"\s*(@|(async\s+)?def\s|class\s)", line)
        if words + size > most or (words >= least and begins):
            pieces.append("\n".join(lines))
            lines, words = [], 0
        lines.append(line)
        words += size
    pieces.append("\n".join(lines))
    return [p.strip("\n") for p in pieces if least <= len(p.split()) <= most]


def is_held_out(key: str) -> bool:
    """Whether the document of this key (its text, or a module's path) is kept from training."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def take_documents(source: Source, seed: int, budget: int, held_out: bool = False) -> list[str]:
    """Documents to train on, or held-out ones, in seeded order, up to about `budget` characters."""
    documents = [text for key, text in source() if is_held_out(key) == held_out]
    taken, size = [], 0
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if size >= budget:
            break
        taken.append(documents[index][: budget - size])
        size += len(taken[-1])
    return taken


def stream_documents(
    source: Source, seed: int, budget: int, held_out: bool = False
) -> Iterator[str]:
    """The same one by one: of a hub dataset, of any size, in its own order and never whole."""
    if getattr(source, "func", None) is not hub_documents:
        yield from take_documents(source, seed, budget, held_out)
        return
    for key, text in source():
        if is_held_out(key) == held_out and budget > 0:
            yield text[:budget]
            budget -= len(text)
        if budget <= 0:
            return


def load_source(name: str, folder: Path | None = None) -> Source:
    """A source by name: `stdlib`, `pydoc`, a text file or folder, or a hub dataset `owner/name`.

    Files are looked up in `folder` first. A FileNotFoundError if there is none.
    """
    if name in OWN:
        return OWN[name]
    if folder and not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to look up the text source {name!r} in")
    if path := find_file(name, folder):
        return partial(text_documents, path)
    if name.count("/") == 1:
        return partial(hub_documents, name)
    here = [*OWN, *sorted(path.name for path in folder.iterdir())] if folder else list(OWN)
    hint = f"expected a name, a file, or a hub dataset owner/name{suggestion(name, here)}"
    raise FileNotFoundError(f"no text source {name!r}: {hint}")


def find_file(name: str, folder: Path | None = None) -> Path | None:
    """The file or folder that a source is, if it is one."""
    places = [folder / name, Path(name)] if folder else [Path(name)]
    return next((path for path in places if name not in OWN and path.exists()), None)


def digests(names: Iterable[str], folder: Path | None = None) -> dict[str, str]:
    """A digest of the content of each source that is a file or folder."""
    found = {name: find_file(name, folder) for name in names}
    return {name: fingerprint(path) for name, path in found.items() if path}


def text_documents(path: Path) -> Documents:
    """Documents of a UTF-8 text file (`.gz` too) or of the files below a folder (`files_below`).

    A `<|endoftext|>` parts documents of one file. None may be empty, or other than plain text.
    """
    files = files_below(path)
    if not files:
        raise ValueError(f"{path} is an empty folder, or all is hidden: expected files of text")
    for file in files:
        if re.search(r"\.(jsonl|ndjson)(\.|$)", file.name, re.IGNORECASE):
            told = f"{file} has a record a line (JSON Lines), and each would be read with its keys"
            raise ValueError(f"{told}: save the texts alone, parted by lines {SEPARATOR}")
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as f:
                documents = f.read().replace("\ufeff", "").split(SEPARATOR)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            hint = "text of another encoding, such as UTF-16 or Latin-1, has to be saved as UTF-8"
            raise ValueError(f"{file} is not UTF-8 text, or is cut: {error}; {hint}") from error
        documents = [document.strip() for document in documents if document.strip()]
        if not documents:
            raise ValueError(f"{file} is empty: expected text")
        if any("\0" in document for document in documents):
            raise ValueError(f"{file} is not text, or is UTF-16: it holds zero bytes, not UTF-8")
        yield from zip(documents, documents, strict=True)


def stdlib_modules() -> Documents:
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


def pydoc_topics() -> Documents:
    """The language reference's topics, as shipped with the interpreter."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


OWN = {"stdlib": stdlib_modules, "pydoc": pydoc_topics}


def hub_documents(name: str, config: str | None = None, seed: int | None = None) -> Documents:
    """Column `text` of a hub dataset, streamed: shuffled by a seed, or in its own order.

    Raises:
        ValueError: If the dataset has no such column or configuration.
        ConnectionError: If it cannot be read.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import httpx
    from pyarrow import ArrowInvalid

    try:
        # load_dataset would try for half a minute before it says that there is no network.
        if not constants.is_offline_mode():
            HfApi().dataset_info(name, timeout=10, expand=["sha"])
        rows = load_dataset(name, config, split="train", streaming=True)
        for row in rows if seed is None else rows.shuffle(seed, buffer_size=1_000):
            if "text" not in row:
                raise ValueError(f"{name} has no column 'text': it has {', '.join(row)}")
            if text := (row["text"] or "").strip():
                yield text, text
    except (OSError, httpx.HTTPError, ArrowInvalid) as error:
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise ConnectionError(
            f"cannot read the dataset {name} {config or ''} from {constants.ENDPOINT} ({reason})."
            f" No network is needed for {', '.join(LOCAL_DATASETS)}, or for text of your own"
        ) from error
