"""Which versions of other packages flowhelpers was tried with, as its own requirements say."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

# Whose requirements have to hold. transformers loads the last two where they are installed, each of
# which works with one torch alone.
ASKING = ("flowhelpers", "torchvision", "torchaudio")


@cache
def untried() -> tuple[str, ...]:
    """What is installed in another version than it was tried in, a sentence for each."""
    found = []
    for asking in ASKING:
        with suppress(PackageNotFoundError):
            found += filter(None, (_untried(asking, line) for line in requires(asking) or ()))
    return tuple(found)


def _untried(asking: str, line: str) -> str | None:
    asked = Requirement(line)
    if asked.marker and not asked.marker.evaluate({"extra": ""}):
        return None
    with suppress(PackageNotFoundError):
        installed = version(asked.name)
        if installed not in asked.specifier:
            tried = ",".join(sorted(map(str, asked.specifier), reverse=True))
            return f"{asked.name} {installed} is installed; {asking} was tried with {tried}"
    return None


@cache
def warn_of_untried() -> None:
    """Warns of what `untried` finds, once a process, at the line that called the caller."""
    for sentence in untried():
        warnings.warn(sentence, stacklevel=3)


@contextmanager
def naming_untried() -> Iterator[None]:
    """Where something fails under versions that were not tried, a ValueError names them first.

    Errors of memory, files and network stay as they are.
    """
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        if not untried():
            raise
        raise ValueError(f"{'; '.join(untried())}. Then: {error}") from error


@cache
def code_digest() -> str:
    """A digest of the package's own code, for a version stays the same over many commits."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.blake2b(b"".join(map(Path.read_bytes, files)), digest_size=8).hexdigest()


def check_workers(
    client: Any = None, *, expected: str | None = None, code: str | None = None
) -> None:
    """A ValueError if a worker of a Dask client has another flowhelpers than this process.

    Or than what is asked for: the `expected` version, `code` of that digest. Without a client it is
    this process that is the worker.
    """
    ours, code = expected or version("flowhelpers"), code or code_digest()

    def ask(function: Callable[..., str], *given: str) -> dict[str, Any]:
        if client is None:
            return {"this worker": function(*given)}
        return client.run(function, *given, on_error="return")

    # first by a function of the standard library, which each of them has
    for worker, theirs in ask(version, "flowhelpers").items():
        if theirs != ours:
            theirs = "no flowhelpers" if isinstance(theirs, Exception) else f"flowhelpers {theirs}"
            raise ValueError(f"{worker} has {theirs}, and what was asked for is of {ours}")
    for worker, theirs in ask(code_digest).items():
        if theirs != code:
            whose = "this process" if code == code_digest() else "what was asked for"
            told = f"{worker} has flowhelpers {ours} of another commit than {whose}"
            raise ValueError(f"{told}: have one commit everywhere, or ask for it anew")
