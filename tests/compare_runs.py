"""Compares the tables of two executions of the notebooks: what changed between two versions?

    python tests/compare_runs.py OLD NEW

OLD and NEW are folders of `flowhelpers run --out`; of each notebook the latest run counts. A line
for each table that differs (numbers by more than a relative 1e-6, all else at all) says in how many
rows each column does, and the largest relative difference. The status is then 1.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd


def latest_runs(folder: Path) -> dict[str, Path]:
    """The latest run of each notebook: `<time>-<notebook>` folders, by the notebook's name."""
    return {path.name[16:]: path for path in sorted(folder.glob("????????-??????-*/"))}


def difference(old: pd.Series, new: pd.Series) -> str:
    """What is different between two columns; empty where nothing is."""
    if (len(old), str(old.dtype)) != (len(new), str(new.dtype)):
        return f"{len(old)} rows of {old.dtype}, now {len(new)} of {new.dtype}"
    if not pd.api.types.is_numeric_dtype(old):
        rows = sum(repr(a) != repr(b) for a, b in zip(old, new, strict=True))
        return f"{rows} of {len(old)} rows" if rows else ""
    before, after = (column.to_numpy("float64", na_value=np.nan) for column in (old, new))
    rows = ~np.isclose(before, after, rtol=1e-6, atol=1e-9, equal_nan=True)
    share = np.abs(after[rows] - before[rows]) / np.fmax(np.abs(before), np.abs(after))[rows]
    largest = np.nan_to_num(share, nan=np.inf).max(initial=0)  # inf: a number beside none
    return f"{rows.sum()} of {len(old)} rows, by {largest:.1e}" if rows.any() else ""


def compare(old: Path, new: Path) -> list[str]:
    """A line for each table that differs, and for each notebook that one folder alone has."""
    before, after = latest_runs(old), latest_runs(new)
    lines = [f"{notebook}: in one of the two alone" for notebook in sorted({*before} ^ {*after})]
    for notebook in sorted(before.keys() & after.keys()):
        paths = sorted(before[notebook].glob("tables/*.parquet"))
        names = {path.name for path in paths}
        lines += [
            f"{notebook} {path.stem}: new"
            for path in sorted(after[notebook].glob("tables/*.parquet"))
            if path.name not in names
        ]
        for path in paths:
            told, counterpart = {"all": "missing"}, after[notebook] / "tables" / path.name
            if counterpart.exists():
                one, two = (pd.read_parquet(file).reset_index() for file in (path, counterpart))
                told = {column: difference(one[column], two[column]) for column in {*one} & {*two}}
                told |= dict.fromkeys({*one} ^ {*two}, "in one of the two alone")
            shown = "; ".join(f"{column}: {what}" for column, what in sorted(told.items()) if what)
            lines += [f"{notebook} {path.stem}: {shown}"] * bool(shown)
        print(f"{notebook}: {len(paths)} tables")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folders = [Path(folder) for folder in sys.argv[1:]]
    for folder in folders:
        if not latest_runs(folder):
            sys.exit(f"{folder} holds no runs: expected folders named <time>-<notebook>")
    differences = compare(*folders)
    print("\n".join(differences) or "all equal")
    sys.exit(bool(differences))
