"""Which versions of other packages flowhelpers was tried with, as its own requirements say."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

# The packages whose requirements have to hold; the last two are loaded by transformers where they
# are installed, and work with one torch alone.
ASKING = ("flowhelpers", "torchvision", "torchaudio")


@cache
def untried() -> tuple[str, ...]:
    """What is installed in another version than it was tried in, a sentence for each."""
    found = []
    for asking in ASKING:
        for each in _requirements(asking):
            installed = _installed(each.name)
            if installed and installed not in each.specifier:
                tried = ",".join(sorted(map(str, each.specifier), reverse=True))
                found.append(
                    f"{each.name} {installed} is installed; {asking} was tried with {tried}"
                )
    return tuple(found)


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


def _requirements(package: str) -> list[Requirement]:
    """What a package asks for here, without its extras; nothing of one that is not installed."""
    try:
        found = [Requirement(line) for line in requires(package) or ()]
    except PackageNotFoundError:
        return []
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
