"""The texts to evaluate on: the paper's corpora by their hub names, and four that need no network.

Every sample is seeded and holds no text twice. The local corpora are the package's own passages and
the modules of the standard library's source that no training has seen.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.activations.sources import SEPARATOR, is_held_out, stdlib_modules, text_documents
from flowhelpers.core.features import suggestion
from flowhelpers.core.files import DATA

if TYPE_CHECKING:
    import pandas as pd

PASSAGES = DATA / "passages"
PIECE_WORDS = (60, 150)
SHUFFLE_BUFFER = 1_000


@dataclass(frozen=True)
class Corpus:
    """Where a corpus comes from.

    Attributes:
        name: The name by which `load_texts` knows it.
        about: What it holds.
        hub_id: The hub dataset; empty if the corpus is on every machine.
        config: The configuration of the hub dataset; None for its only one.
        split: The split that is read.
        column: The column that holds the text.
    """

    name: str
    about: str
    hub_id: str = ""
    config: str | None = None
    split: str = "train"
    column: str = "text"


# The paper gives a configuration for FineWeb only. AutoMathText has twenty; this one is web pages,
# like the other corpora, and those of the highest scores.
CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus("fineweb", "web pages in English", "HuggingFaceFW/fineweb", "default"),
        Corpus("tinystories", "short stories for children", "roneneldan/TinyStories"),
        Corpus("automathtext", "mathematics", "math-ai/AutoMathText", "web-0.80-to-1.00"),
        Corpus("python-github-code", "Python code", "tomekkorbak/python-github-code"),
        Corpus("python", "Python code: standard library modules held out from training"),
        Corpus("fiction", "the package's passages of fiction"),
        Corpus("science", "the package's passages on science"),
        Corpus("maths", "the package's passages on mathematics"),
    )
}
DOMAINS = ("fiction", "science", "maths")


def load_texts(
    name_or_path: str | Path, n: int | None, seed: int = 0, or_fewer: bool = False
) -> list[str]:
    """Sample texts of a corpus, or of a text file or folder of your own.

    In a file, texts are parted by `<|endoftext|>`; in a folder, every file holds at least one.

    Args:
        name_or_path: A name in `CORPORA`, or the path of a UTF-8 text file or folder.
        n: How many; None for all of a corpus that is not on the hub.
        seed: Decides which texts are taken, and their order; a smaller `n` gives the first of them.
        or_fewer: Whether a corpus that has fewer may give all it has.

    Returns:
        `n` different texts.

    Raises:
        ValueError: If the corpus is unknown, has fewer than `n` texts, or a file is not text.
        FileNotFoundError: If there is no such file or folder.
        ConnectionError: If a hub corpus cannot be read.
    """
    if n is not None and n < 1:
        raise ValueError(f"cannot load n={n} texts: expected at least 1, or None for all")
    corpus = CORPORA.get(name_or_path) if isinstance(name_or_path, str) else None
    if corpus and corpus.hub_id:
        return _hub_texts(corpus, n, seed, or_fewer)
    if corpus is None:
        found: Iterable[str] = _own_texts(name_or_path)
    elif corpus.name in DOMAINS:
        found = [row["text"] for row in _passages() if row["domain"] == corpus.name]
    else:
        found = _held_out_python()
    texts = list(dict.fromkeys(found))
    if n is not None and n > len(texts) and not or_fewer:
        own = "" if corpus else f" (a file is parted into texts by {SEPARATOR})"
        raise ValueError(_too_few(name_or_path, n, len(texts)) + f"; n=None takes all{own}")
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order[:n]]


def passages() -> "pd.DataFrame":
    """The package's own passages, always in the same order: columns subject, domain and text."""
    import pandas as pd

    return pd.DataFrame(_passages(), columns=["subject", "domain", "text"])


def subjects() -> list[str]:
    """The subjects of the package's passages, each once, in the order of `passages`."""
    return list(dict.fromkeys(passage["subject"] for passage in _passages()))


def _too_few(name: str | Path, n: int, count: int) -> str:
    return f"{str(name)!r} has {count} different texts, {n} were asked for"


def _passages() -> list[dict[str, str]]:
    found = []
    for file in sorted(PASSAGES.glob("*.jsonl")):
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
        for number, line in enumerate(lines, 1):
            passage = json.loads(line)
            if set(passage) != {"subject", "domain", "text"} or passage["domain"] not in DOMAINS:
                raise ValueError(
                    f"{file}:{number} is not a passage: expected subject, domain (one of "
                    f"{', '.join(DOMAINS)}) and text, got {line[:80]}"
                )
            found.append(passage)
    if not found:
        raise FileNotFoundError(f"no passages in {PASSAGES}: expected .jsonl files, reinstall")
    return found


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
    """Cut Python source into pieces of 60 to 150 words, between lines.

    A piece ends where a function or class begins, once it has 60 words, and in any case before it
    has more than 150. A rest of less than 60 words is left out.
    """
    least, most = PIECE_WORDS
    pieces: list[str] = []
    lines: list[str] = []
    words = 0
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


def _own_texts(name_or_path: str | Path) -> list[str]:
    path = Path(name_or_path).expanduser()
    if not path.exists():
        hint = suggestion(str(name_or_path), CORPORA)
        if len(path.parts) > 1 or path.suffix:
            raise FileNotFoundError(f"there is no file, folder or corpus {str(path)!r}{hint}")
        raise ValueError(f"unknown corpus {str(path)!r}{hint}; a path to a text file works too")
    files = [path]
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        if not files:
            raise ValueError(f"{path} is an empty folder: expected files of text")
    return [text for file in files for text in _file_texts(file)]


def _file_texts(file: Path) -> list[str]:
    try:
        texts = [text.lstrip("\ufeff") for _, text in text_documents(file)]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not texts:
        raise ValueError(f"{file} holds nothing but separators: expected text")
    if any("\0" in text for text in texts):
        raise ValueError(f"{file} is not text: it holds zero bytes, expected UTF-8")
    return texts


def _hub_texts(corpus: Corpus, n: int | None, seed: int, or_fewer: bool) -> list[str]:
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import httpx
    from pyarrow import ArrowInvalid

    if n is None:
        raise ValueError(f"n=None takes all texts: {corpus.name!r} is on the hub, give a number")
    try:
        # load_dataset would try for half a minute before it says that there is no network.
        if not constants.is_offline_mode():
            HfApi().dataset_info(corpus.hub_id, timeout=10, expand=["sha"])
        rows = load_dataset(corpus.hub_id, corpus.config, split=corpus.split, streaming=True)
        texts = _first_texts(rows.shuffle(seed, buffer_size=SHUFFLE_BUFFER), corpus, n)
    except (OSError, httpx.HTTPError, ArrowInvalid) as error:
        config = f", configuration {corpus.config!r}" if corpus.config else ""
        local = ", ".join(name for name, other in CORPORA.items() if not other.hub_id)
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise ConnectionError(
            f"cannot read {corpus.name!r}, the dataset {corpus.hub_id}{config}, split "
            f"{corpus.split!r}, from {constants.ENDPOINT} ({reason}). With HF_HUB_OFFLINE=1 a copy "
            f"that datasets has cached is read. No network is needed for {local}, or for a text "
            "file or folder of your own"
        ) from error
    if len(texts) < n and not or_fewer:
        raise ValueError(_too_few(corpus.name, n, len(texts)))
    return texts


def _first_texts(rows: Iterable[dict[str, Any]], corpus: Corpus, n: int) -> list[str]:
    texts: dict[str, None] = {}
    for row in rows:
        if corpus.column not in row:
            raise ValueError(
                f"{corpus.hub_id} has no column {corpus.column!r}{suggestion(corpus.column, row)}"
            )
        text = (row[corpus.column] or "").strip()
        if text:
            texts[text] = None
        if len(texts) == n:
            break
    return list(texts)
