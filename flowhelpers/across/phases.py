"""Phases: the parts into which a model's layers fall, each as even within itself as can be.

The paper divides the layers of two models into three parts and does not say how (Figures 5 and 19).
Here the division is computed (CHOICES 46) and held against other orders of the layers: few layers
fit any three parts well.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.across.profile import Profile, depth
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.matching.scores import CLASSES
from flowhelpers.suites.registry import GEMMA

if TYPE_CHECKING:
    import pandas as pd

THIRDS = ["first", "middle", "last"]
# Figures 5 and 19: the parts, first and last layer, into which its text divides two models.
PHASES = {GEMMA: ((0, 5), (6, 15), (16, 25)), "llama-3.1-8b": ((0, 8), (9, 16), (17, 31))}


def thirds(depths: "pd.Series") -> "pd.Series":
    """Whether relative depths lie in the first, the middle or the last third of a model."""
    import pandas as pd

    return pd.cut(depths, [0, 1 / 3, 2 / 3, 1], labels=THIRDS, include_lowest=True).astype(str)


def is_chance(row: Any) -> bool:
    """Whether 5 % or more of the random orders are divided as well (`as_good`)."""
    return getattr(row, "as_good", 0.0) >= 0.05


def segments(values: np.ndarray, parts: int = 3) -> tuple[list[int], float]:
    """The division of rows into so many runs that has the least sum of squared errors.

    Returns:
        The first row of each run, and the share of the variance that the division explains.
    """
    errors = _errors(values)
    best, cuts = errors[0], []  # the least error of the rows before each place, in one part
    for _ in range(parts - 1):
        through = best[:, None] + errors
        cuts.append(through.argmin(axis=0))
        best = through.min(axis=0)
    starts = [len(values)]
    for cut in reversed(cuts):
        starts = [int(cut[starts[0]]), *starts]
    starts = [0, *starts[:-1]]
    return starts, explained(values, starts)


def explained(values: np.ndarray, starts: Sequence[int]) -> float:
    """The share of the rows' variance that the runs' means explain; missing if there is none."""
    errors = _errors(values)
    left = errors[starts, [*starts[1:], len(values)]].sum()
    return float(1 - left / errors[0, -1]) if errors[0, -1] > 1e-12 else np.nan


def _errors(values: np.ndarray) -> np.ndarray:
    """Sum of squared errors of rows a to b − 1 at [a, b]; infinite where there is none."""
    centred = values - values.mean(axis=0)
    sums = np.vstack([np.zeros(values.shape[1]), centred.cumsum(axis=0)])
    squares = np.concatenate([[0.0], (centred**2).sum(axis=1).cumsum()])
    place = np.arange(len(values) + 1)
    count = place[None, :] - place[:, None]
    between = ((sums[None, :] - sums[:, None]) ** 2).sum(axis=2) / np.where(count > 0, count, 1)
    within = np.maximum(squares[None, :] - squares[:, None] - between, 0)
    return np.where(count > 0, within, np.inf)


def fit_phases(
    profile: "pd.DataFrame",
    columns: Sequence[str],
    count: int,
    parts: int = 3,
    shuffles: int = 500,
    seed: int = 0,
    named: Sequence[tuple[int, int]] = (),
) -> "pd.DataFrame":
    """The phases of one model's layers, by the shape of some columns, beside chance.

    `profile` has one row for each of the model's `count` layers; those that lack a column are left
    out, as layer 0, and so are columns that are missing everywhere. Phases that are `named` by
    their first and last layers are measured without chance.

    Returns:
        One row a phase: `phase` (from 1), `first` and `last` layer, `begins` and `ends` (relative
        depth, half a layer beyond, to 1 at most), and of the whole division `layers` (how many
        there are to divide), `explained` (the share of the variance), `by_chance` (its mean over
        `shuffles` other orders), `as_good` (the share of these that explain as much) and `least`
        (the share of all orders that put the same layers together: `as_good` cannot be expected
        below it). No row where there are no more layers than parts, or a named phase has none.
    """
    import pandas as pd

    shape = profile.sort_values("layer").set_index("layer")[list(columns)].astype(float)
    shape = shape.dropna(axis=1, how="all").dropna(axis=0, how="any")
    layers, values = shape.index.to_numpy(), shape.to_numpy()
    inside = [layers[(layers >= a) & (layers <= b)] for a, b in named]
    if not shape.size or not all(map(len, inside)) or not (named or len(layers) > parts):
        return pd.DataFrame()
    if named:
        starts = np.searchsorted(layers, [some[0] for some in inside]).tolist()
        measured = {"explained": explained(values, starts)}
    else:
        starts, share = segments(values, parts)
        rng = np.random.default_rng(seed)
        orders = [values[rng.permutation(len(values))] for _ in range(shuffles)]
        chance = np.array([segments(order, parts)[1] for order in orders])
        measured = {"explained": share, "by_chance": chance.mean()}
        measured["as_good"] = float((chance >= share - 1e-9).mean())
        sizes = np.diff([*starts, len(values)]).tolist()
        same = math.factorial(parts) * math.prod(map(math.factorial, sizes))
        measured["least"] = same / math.factorial(len(values))
    first, last = layers[starts], layers[[*np.subtract(starts[1:], 1), -1]]
    phases = pd.DataFrame({"phase": np.arange(1, len(starts) + 1), "first": first, "last": last})
    phases["begins"] = depth(first - 0.5, count)
    phases["ends"] = np.minimum(depth(last + 0.5, count), 1.0)
    return phases.assign(layers=len(layers), **measured)


def all_phases(
    whole: Profile, parts: int = 3, shuffles: int = 500, seed: int = 0
) -> "pd.DataFrame":
    """The phases of every suite, by its groups and by its classes, and the paper's phases.

    Returns:
        `suite`, `of` (`groups`, `classes`, or `groups, by the paper` and so on), and the columns of
        `fit_phases`; no rows for a suite that has no more layers than `parts`.
    """
    import pandas as pd

    if parts < 1:
        raise ValueError(f"parts={parts}: expected 1 or more")
    frames = []
    for suite, count in zip(whole.across["suite"], whole.across["layers"], strict=True):
        profile = whole.by_layer[whole.by_layer["suite"] == suite]
        for of, columns in {"groups": GROUPS, "classes": CLASSES}.items():
            if not set(columns) <= set(profile):
                continue
            fitted = fit_phases(profile, columns, int(count), parts, shuffles, seed)
            frames.append(fitted.assign(suite=suite, of=of))
            if named := PHASES.get(suite.split("@")[0]):
                measured = fit_phases(profile, columns, int(count), named=named)
                frames.append(measured.assign(suite=suite, of=f"{of}, by the paper"))
    columns = ["suite", "of", "phase", "first", "last", "begins", "ends", "layers", "explained"]
    columns += ["by_chance", "as_good", "least"]
    kept = [frame for frame in frames if len(frame)]
    return pd.concat(kept, ignore_index=True).reindex(columns=columns) if kept else pd.DataFrame()
