"""What was computed or answered once is kept on disk under a key of all that it depends on."""

import hashlib
import json
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhelpers.core.files import writable_folder, write_whole

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

CACHE = "FLOWHELPERS_CACHE"  # where tables are kept; the user's cache folder unless set


def cache_folder() -> Path:
    """Where tables are kept; the environment variable FLOWHELPERS_CACHE may name another place."""
    import platformdirs

    given = os.environ.get(CACHE)
    return Path(given) if given else platformdirs.user_cache_path("flowhelpers")


def cached_table(
    kind: str,
    key: Mapping[str, Any],
    compute: "Callable[[], pd.DataFrame]",
    folder: Path | None = None,
    version: int = 1,
) -> "pd.DataFrame":
    """A table from disk, or computed and put there, whole or not at all.

    `key` is all that it depends on, `version` how tables of this `kind` are computed. A file that
    cannot be read is made again, with a warning. An OSError comes before anything is computed if
    the folder, `cache_folder()` unless given, cannot be written to.
    """
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException, Table

    name = f"{key_of({'key': key, 'version': version})}.parquet"
    path = Path(folder or cache_folder()) / kind / name
    if path.exists():
        try:
            found = parquet.read_table(path, page_checksum_verification=True)
            if (found.schema.metadata or {}).get(b"key") != name.encode():
                raise OSError("it was made for something else")
            return found.to_pandas()
        except (ArrowException, OSError) as error:
            warnings.warn(f"{path} is made again: {error}", stacklevel=2)
    writable_folder(path.parent)
    table = Table.from_pandas(compute(), preserve_index=False)
    table = table.replace_schema_metadata((table.schema.metadata or {}) | {"key": name})
    write_whole(path, lambda file: parquet.write_table(table, file, write_page_checksum=True))
    return table.to_pandas()


Arrays = tuple[dict[str, Any], "dict[str, np.ndarray]"]  # and what is told of them, as JSON


def cached_arrays(
    kind: str,
    key: Mapping[str, Any],
    compute: Callable[[], Arrays],
    folder: Path | None = None,
    version: int = 1,
) -> Arrays:
    """Arrays of any shapes from one file, memory-mapped; otherwise as `cached_table`."""
    from pyarrow import ArrowException

    name = f"{key_of({'key': key, 'version': version})}.arrow"
    path = Path(folder or cache_folder()) / kind / name
    if path.exists():
        try:
            return read_arrays(path)
        except (ArrowException, OSError, LookupError, ValueError) as error:
            warnings.warn(f"{path} is made again: {error}", stacklevel=2)
    writable_folder(path.parent)
    about, arrays = compute()
    write_whole(path, lambda file: write_arrays(file, about, arrays))
    return read_arrays(path)


def write_arrays(file: Path, about: Mapping[str, Any], arrays: "Mapping[str, np.ndarray]") -> None:
    """One row of an Arrow table whose columns are the arrays; shapes and `about` are metadata."""
    import pyarrow as pa

    columns = {}
    for name, array in arrays.items():
        ends = pa.array([0, array.size], pa.int64())
        columns[name] = pa.LargeListArray.from_arrays(ends, pa.array(array.reshape(-1)))
    shapes = {name: array.shape for name, array in arrays.items()}
    told = {"about": json.dumps(about), "shapes": json.dumps(shapes)}
    table = pa.table(columns).replace_schema_metadata(told)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_arrays(path: Path) -> Arrays:
    """What `write_arrays` wrote, the arrays memory-mapped: nothing is read but what is used."""
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    told = {name.decode(): json.loads(text) for name, text in (table.schema.metadata or {}).items()}
    arrays = {
        name: table[name].chunk(0).values.to_numpy(zero_copy_only=True).reshape(shape)
        for name, shape in told["shapes"].items()
    }
    return told["about"], arrays


PATIENCE = 60.0  # seconds to wait while another process writes


@dataclass(frozen=True)
class DiskCache:
    """Answers in one SQLite file, which several processes may share.

    What was put is there for good once `put` returns, even if the process is killed. A file that is
    no such store is left as it is, with a ValueError: answers may have been paid for.
    """

    path: Path

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The answers that are there, by their keys."""
        if not self.path.exists():
            return {}
        with self._open() as database:
            ask = "SELECT key, value FROM kept WHERE key = ?"
            found = [database.execute(ask, (key,)).fetchone() for key in keys]
        return {row[0]: json.loads(row[1]) for row in found if row}

    def put(self, items: Mapping[str, Any]) -> None:
        """Keeps answers that JSON can hold, all or none; one with the same key is replaced."""
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
            raise ValueError(f"{self.path} is no store of answers: {error}") from error


def key_of(value: Mapping[str, Any]) -> str:
    """A digest of what was asked, the same whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
