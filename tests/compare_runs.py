"""Compares the tables of two executions of the notebooks: what changed between two versions?

    python tests/compare_runs.py OLD NEW

OLD and NEW are folders of runs, as `flowhelpers run --out` makes them. Of each notebook the latest
run counts. Numbers are compared to a relative 1e-6, everything else exactly; the status is 1 where
a table differs or is in OLD alone.
"""

import sys
from pathlib import Path

import pandas as pd

RTOL, ATOL = 1e-6, 1e-9


def latest_runs(folder: Path) -> dict[str, Path]:
    """The latest run of each notebook: `<time>-<notebook>` folders, by the notebook's name."""
    return {path.name[16:]: path for path in sorted(folder.glob("????????-??????-*/"))}


def difference(old: pd.DataFrame, new: pd.DataFrame) -> str:
    """What is different between two tables, in a line; empty where nothing is."""
    if set(old.columns) == set(new.columns):  # in whatever order
        new = new[old.columns]
    try:
        pd.testing.assert_frame_equal(old, new, rtol=RTOL, atol=ATOL, check_exact=False)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def compare(old: Path, new: Path) -> list[str]:
    """A line for each table that differs, of the notebooks that both folders have."""
    before, after = latest_runs(old), latest_runs(new)
    lines = []
    for notebook in sorted(before.keys() & after.keys()):
        tables = {
            path.name: path for path in sorted((before[notebook] / "tables").glob("*.parquet"))
        }
        for name, path in tables.items():
            counterpart = after[notebook] / "tables" / name
            if not counterpart.exists():
                lines.append(f"{notebook} {path.stem}: missing")
            elif told := difference(pd.read_parquet(path), pd.read_parquet(counterpart)):
                lines.append(f"{notebook} {path.stem}: {told}")
        print(f"{notebook}: {len(tables)} tables")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    differences = compare(*map(Path, sys.argv[1:]))
    print("\n".join(differences) or "all equal")
    sys.exit(bool(differences))
