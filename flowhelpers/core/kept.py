"""Answers that are kept on disk by what was asked, so that nothing is asked for twice."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowhelpers.core.files import writable_folder

PATIENCE = 60.0  # seconds to wait while another process writes


@dataclass(frozen=True)
class DiskCache:
    """Answers in one SQLite file, which several processes may share.

    What was put is there for good once `put` returns: a process that is killed loses none of it. No
    connection stays open between calls.

    A file that is no such store is left as it is, and an error says so: answers may have been paid
    for, and a path may be a mistake.

    Attributes:
        path: The file; made, with its folder, when something is put.
    """

    path: Path

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The answers that are there, by their keys.

        Raises:
            ValueError: If the file is no store of answers.
            OSError: If it cannot be read.
        """
        if not self.path.exists():
            return {}
        with self._open() as database:
            ask = "SELECT key, value FROM kept WHERE key = ?"
            found = [database.execute(ask, (key,)).fetchone() for key in keys]
        return {row[0]: json.loads(row[1]) for row in found if row}

    def put(self, items: Mapping[str, Any]) -> None:
        """Keeps answers, all or none of them; one with the same key is replaced.

        Args:
            items: Values that JSON can hold, by their keys.

        Raises:
            ValueError: If the file is no store of answers.
            OSError: If it cannot be written.
        """
        rows = [(key, json.dumps(value)) for key, value in items.items()]
        writable_folder(self.path.parent)
        with self._open() as database:
            database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction."""
        try:
            with closing(sqlite3.connect(self.path, timeout=PATIENCE)) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value)")
                yield database
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot use the answers kept in {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} is no store of answers: {error}."
                " Give another path, or move the file away"
            ) from error


def key_of(value: Mapping[str, Any]) -> str:
    """A digest of what was asked: the same whatever the order of its keys.

    Args:
        value: What JSON can hold.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
