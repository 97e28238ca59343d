"""Tables that are computed once and kept on disk, under a key of all that they depend on."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhelpers.core.files import writable_folder, write_whole

if TYPE_CHECKING:
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
    """A table from disk, or computed and put there.

    A file appears whole or not at all, so that processes may share the folder. One that cannot be
    read, was made for another key or is of another version is made again, with a warning.

    Args:
        kind: The folder's name within the cache.
        key: All that the table depends on.
        compute: Makes the table.
        folder: Of the cache; `cache_folder()` unless given.
        version: Of how such tables are computed.

    Raises:
        OSError: If the folder cannot be written to, before anything is computed.
    """
    import pandas as pd
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException, Table

    text = json.dumps(key, sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    mark = f"{digest} version {version}"
    path = Path(folder or cache_folder()) / kind / f"{digest}.parquet"
    if path.exists():
        try:
            found = parquet.read_table(path, page_checksum_verification=True)
            made = (found.schema.metadata or {}).get(b"flowhelpers", b"").decode(errors="replace")
            if made == mark:
                return found.to_pandas()
            problem = f"{path} is made again: it was made for something else"
            if made.startswith(digest):  # one word for all such files
                problem = f"{kind} on disk are made again: they are of"
                problem += f"{made.removeprefix(digest)}, this is version {version}"
        except (ArrowException, OSError) as error:
            problem = f"{path} is made again: {str(error).partition(chr(10))[0]}"
        warnings.warn(problem, stacklevel=2)
    writable_folder(path.parent)
    table = compute()
    arrow = Table.from_pandas(pd.DataFrame(table), preserve_index=False)
    arrow = arrow.replace_schema_metadata((arrow.schema.metadata or {}) | {"flowhelpers": mark})
    write_whole(path, lambda file: parquet.write_table(arrow, file, write_page_checksum=True))
    return arrow.to_pandas()
