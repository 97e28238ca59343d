"""Phases: the parts into which a model's layers fall, each as even within itself as can be.

The paper divides the layers of two models into three parts by eye (Figures 5 and 19). Here the
division is computed (CHOICES 46), and held against the same layers in another order: of few layers,
three parts describe anything well.
"""

from typing import TYPE_CHECKING

from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.suites.registry import GEMMA

if TYPE_CHECKING:
    import pandas as pd

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.across.flow_profile import depth
from flowhelpers.matching.scores import CLASSES

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.across.profile import Profile

Parts = tuple[tuple[int, int], ...]

# Figures 5 and 19: the parts, first and last layer, into which its text divides two models.
PHASES = {GEMMA: ((0, 5), (6, 15), (16, 25)), "llama-3.1-8b": ((0, 8), (9, 16), (17, 31))}


def segments(values: np.ndarray, parts: int = 3) -> Parts:
    """The division of rows into so many runs that has the least sum of squared errors.

    The error of a row is its distance to the mean of its run. Of several divisions that do as well
    it is the one whose later runs begin first.

    Args:
        values: `[rows, columns]`, in their order.
        parts: How many runs; none is empty.

    Returns:
        The first and the last row of each run.

    Raises:
        ValueError: If there are fewer rows than parts, a value is missing, or `parts` is below 1.
    """
    values = _checked(values)
    if not 1 <= parts <= len(values):
        raise ValueError(f"{parts} parts of {len(values)} rows: expected 1 to {len(values)}")
    errors = _errors(values)
    rows = len(values)
    best, cuts = errors[0], []  # the least error of the rows before each place, in one part
    for _ in range(parts - 1):
        through = best[:, None] + errors
        cuts.append(through.argmin(axis=0))
        best = through.min(axis=0)
    ends = [rows]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    starts = [0, *reversed(ends[1:])]
    return tuple((a, b - 1) for a, b in zip(starts, reversed(ends), strict=True))


def explained(values: np.ndarray, parts: Parts) -> float:
    """The share of the rows' variance that the means of the parts account for, from 0 to 1.

    Rows that are all alike have none to account for: then it is missing.

    Args:
        values: `[rows, columns]`, in their order.
        parts: The first and the last row of each run; together all rows.

    Raises:
        ValueError: If the parts are not all rows, in order.
    """
    values = _checked(values)
    rows = [row for first, last in parts for row in range(first, last + 1)]
    if rows != list(range(len(values))):
        raise ValueError(f"parts {parts} of {len(values)} rows: expected each row once, in order")
    errors = _errors(values)
    whole = errors[0, -1]
    left = sum(errors[first, last + 1] for first, last in parts)
    return float(1 - left / whole) if whole > 1e-12 else float("nan")


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or np.isnan(values).any():
        raise ValueError(f"values of shape {values.shape}: expected [rows, columns], none missing")
    return values


def _errors(values: np.ndarray) -> np.ndarray:
    """Sum of squared errors of rows a to b − 1 at [a, b]; infinite where there is none."""
    rows = len(values)
    centred = values - values.mean(axis=0)
    sums = np.vstack([np.zeros(values.shape[1]), centred.cumsum(axis=0)])
    squares = np.concatenate([[0.0], (centred**2).sum(axis=1).cumsum()])
    a, b = np.arange(rows + 1)[:, None], np.arange(rows + 1)[None, :]
    count = np.where(b > a, b - a, 1)
    between = ((sums[None, :] - sums[:, None]) ** 2).sum(axis=2) / count
    return np.where(b > a, np.maximum(squares[b] - squares[a] - between, 0), np.inf)


def fit_phases(
    profile: "pd.DataFrame",
    columns: Sequence[str],
    count: int,
    parts: int = 3,
    shuffles: int = 500,
    seed: int = 0,
) -> "pd.DataFrame":
    """The phases of one model's layers, by the shape of some columns, beside chance.

    Args:
        profile: One row a layer, with `layer`. Columns that are missing everywhere are left out,
            and then layers that lack one of the others, as layer 0 does.
        columns: The columns that make the shape.
        count: Layers of the model.
        parts: How many phases.
        shuffles: How often the layers are put in another order, for chance.
        seed: Of these orders.

    Returns:
        One row a phase: `phase` (from 1), `first` and `last` layer, `begins` and `ends` (relative
        depth, half a layer beyond), and of the whole division `layers` (how many there are to
        divide), `explained` (`segments`), `by_chance` (its mean with the layers in other orders)
        and `as_good` (the share of other orders that is explained as well). No row where there are
        no more layers than parts.
    """
    import pandas as pd

    layers, values = _shape(profile, columns)
    if len(layers) <= parts:
        return pd.DataFrame()
    found = segments(values, parts)
    rng = np.random.default_rng(seed)
    orders = [values[rng.permutation(len(values))] for _ in range(shuffles)]
    chance = np.array([explained(each, segments(each, parts)) for each in orders])
    share = explained(values, found)
    whole = {"layers": len(layers), "explained": share, "by_chance": chance.mean()}
    whole["as_good"] = float((chance >= share - 1e-9).mean())
    return _rows(layers, found, count).assign(**whole)


def paper_phases(
    suite: str, profile: "pd.DataFrame", columns: Sequence[str], count: int
) -> "pd.DataFrame":
    """The phases that the paper names for a suite, as `phases` gives them, without chance.

    Args:
        suite: Its name; a variant has those of its suite.
        profile: As for `phases`.
        columns: As for `phases`.
        count: Layers of the model.

    Returns:
        No row where the paper names none, or a phase has no layer in the profile.
    """
    import pandas as pd

    layers, values = _shape(profile, columns)
    named = PHASES.get(suite.split("@")[0], ())
    rows = [np.flatnonzero((layers >= first) & (layers <= last)) for first, last in named]
    if not rows or not all(map(len, rows)):
        return pd.DataFrame()
    parts = tuple((int(each[0]), int(each[-1])) for each in rows)
    return _rows(layers, parts, count).assign(
        layers=len(layers), explained=explained(values, parts)
    )


def all_phases(
    found: "Profile", parts: int = 3, shuffles: int = 500, seed: int = 0
) -> "pd.DataFrame":
    """The phases of every suite, by its groups and by its classes, and those of the paper.

    Args:
        found: Profiles, as `across.combined` gives them.
        parts: How many phases.
        shuffles: As for `phases`.
        seed: As for `phases`.

    Returns:
        `suite`, `of` (`groups`, `classes`, or `groups, by the paper` and so on), and the columns of
        `phases`; nothing of a suite with no more layers than parts.
    """
    import pandas as pd

    frames = []
    for suite, count in zip(found.across["suite"], found.across["layers"], strict=True):
        mine = found.by_layer[found.by_layer["suite"] == suite]
        for of, columns in {"groups": GROUPS, "classes": CLASSES}.items():
            if not set(columns) <= set(mine):
                continue
            ours = fit_phases(mine, columns, int(count), parts, shuffles, seed)
            theirs = paper_phases(suite, mine, columns, int(count))
            frames += [ours.assign(of=of), theirs.assign(of=f"{of}, by the paper")]
            frames[-2]["suite"] = frames[-1]["suite"] = suite
    columns = ["suite", "of", "phase", "first", "last", "begins", "ends", "layers", "explained"]
    columns += ["by_chance", "as_good"]
    kept = [frame for frame in frames if len(frame)]
    return pd.concat(kept, ignore_index=True).reindex(columns=columns) if kept else pd.DataFrame()


def _shape(profile: "pd.DataFrame", columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The layers that can be compared, `[layers]`, and their values, `[layers, columns]`."""
    values = profile.sort_values("layer").set_index("layer")[list(columns)].astype(float)
    values = values.dropna(axis=1, how="all").dropna(axis=0, how="any")
    values = values if len(values.columns) else values[:0]
    return values.index.to_numpy(), values.to_numpy()


def _rows(layers: np.ndarray, parts: Parts, count: int) -> "pd.DataFrame":
    import pandas as pd

    records: list[dict[str, Any]] = []
    for number, (a, b) in enumerate(parts, 1):
        first, last = int(layers[a]), int(layers[b])
        ends = np.array([first - 0.5, last + 0.5])
        begins, end = depth(ends, count)
        records.append(
            {"phase": number, "first": first, "last": last, "begins": begins, "ends": end}
        )
    return pd.DataFrame(records)
