"""Do the groups differ in their scores: tests of every pair (paper 5.1, Figures 4 and 14)."""

from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.core.features import MODULES
from flowhelpers.groups.occurrences import GROUPS, Occurrences, complete_layers

if TYPE_CHECKING:
    import pandas as pd

PAIRS = tuple(combinations(range(len(GROUPS)), 2))
NAMED_PAIRS = tuple(combinations(GROUPS, 2))
CLASSES = ("IB", "AO", "AB")  # by in how many of two groups a module is active
ONCE = ["dataset", "layer", "feature", "group"]
SMALLEST = 20  # members of a group, for a test (CHOICES 7)


def mann_whitney_tests(
    found: Occurrences, alpha: float = 1e-3, smallest: int = SMALLEST, unique: bool = False
) -> "pd.DataFrame":
    """Mann-Whitney U for every pair of groups, score, layer and dataset (paper 5.1, CHOICES 7).

    Two-sided, by the normal approximation with the corrections for ties and continuity, which is
    what scipy takes for groups of more than 8. All pairs of a dataset and layer come from one
    product of counts by score, so that a paper-sized table takes seconds.

    Args:
        found: Occurrences.
        alpha: Level of significance, uncorrected.
        smallest: Groups with fewer members are not tested.
        unique: Whether a feature counts once in a group, however often it was active.

    Returns:
        One row a pair, score, layer and dataset, tested or not: `dataset`, `layer`, `score`,
        `first`, `second`, `n_first`, `n_second`, `p`, `effect` (the rank-biserial correlation:
        positive where the first group has the higher scores),
        `significant` (1 or 0) and `p_holm` (Holm's correction over all tests). A pair of which
        one group is too small has none of the last four.

    Raises:
        ValueError: If alpha is outside (0, 1).
    """
    import pandas as pd

    check_alpha(alpha)
    table = complete_layers(found.table)
    if unique:
        table = table.drop_duplicates(ONCE)
    cells = Cells(table)
    n, p, effect = cells.tested(np.ones(len(table)), smallest)
    first, second = np.array(PAIRS).T
    index = [(f"s_{m}", *key, *pair) for m in MODULES for key in cells.keys for pair in NAMED_PAIRS]
    tests = pd.DataFrame(index, columns=["score", "dataset", "layer", "first", "second"])
    tests = tests[["dataset", "layer", "score", "first", "second"]]
    tests["n_first"], tests["n_second"] = (
        n[:, :, side].ravel().astype(int) for side in (first, second)
    )
    tests["p"], tests["effect"] = p.ravel(), effect.ravel()
    tests["significant"] = (tests["p"] < alpha).astype(float).where(tests["p"].notna())
    tests["p_holm"] = _holm(tests["p"].to_numpy())
    return tests


def check_alpha(alpha: float) -> None:
    """A level of significance lies between 0 and 1.

    Raises:
        ValueError: If it does not.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}: expected a level between 0 and 1, such as 0.001")


class Cells:
    """Occurrences by dataset, layer, score and group, ready to be tested with any weights."""

    def __init__(self, table: "pd.DataFrame"):
        keys = table[["dataset", "layer"]].drop_duplicates().sort_values(["dataset", "layer"])
        self.keys = list(keys.itertuples(index=False, name=None))
        self.cell = table.groupby(["dataset", "layer"], observed=True).ngroup().to_numpy()
        self.group = table["group"].cat.codes.to_numpy().astype(np.int64)
        self.values = {m: self._places(table[f"s_{m}"].to_numpy()) for m in MODULES}

    def _places(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each occurrence's place among the distinct scores of its cell, and where cells begin."""
        order = np.lexsort((scores, self.cell))
        cell, ordered = self.cell[order], scores[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (cell[1:] != cell[:-1]) | (ordered[1:] != ordered[:-1])
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.cumsum(new) - 1
        starts = np.searchsorted(cell[new], np.arange(len(self.keys) + 1))
        return place, starts

    def tested(self, weights: np.ndarray, smallest: int) -> tuple[np.ndarray, ...]:
        """Members, p and effect; `weights` say how often each occurrence counts.

        Returns:
            `[scores, cells, groups]`, and twice `[scores, cells, pairs]`.
        """
        first, second = np.array(PAIRS).T
        found = []
        for place, starts in self.values.values():
            width = int(starts[-1])
            counts = np.bincount(self.group * width + place, weights, len(GROUPS) * width)
            counts = counts.reshape(len(GROUPS), width)
            cells = [
                mann_whitney(counts[:, start:end], smallest) for start, end in pairwise(starts)
            ]
            found.append([(n, p[first, second], effect[first, second]) for n, p, effect in cells])
        return tuple(np.array([[cell[i] for cell in cells] for cells in found]) for i in range(3))


def mann_whitney(
    counts: np.ndarray, smallest: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mann-Whitney U of all pairs of groups at once.

    Args:
        counts: How often each group has each score, scores rising, `[groups, scores]`.
        smallest: Groups with fewer members are not tested.

    Returns:
        Members `[groups]`, and for each pair p (two-sided) and the rank-biserial correlation
        `[groups, groups]`; missing where a group is too small.
    """
    from scipy.stats import norm

    n = counts.sum(axis=1)
    below = np.cumsum(counts, axis=1) - counts
    u = counts @ (below + counts / 2).T  # how often the first is higher, ties by half
    pairs, total = np.outer(n, n), n[:, None] + n[None, :]
    cubes, squares = (counts**3).sum(axis=1), counts**2
    ties = cubes[:, None] + cubes[None, :] + 3 * (squares @ counts.T + counts @ squares.T)
    enough = (n >= max(smallest, 1))[:, None] & (n >= max(smallest, 1))[None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        tied = (ties - total) / (total * (total - 1))
        deviation = np.sqrt(pairs / 12 * (total + 1 - tied))
        beyond = np.maximum(u, pairs - u) - pairs / 2 - 0.5
        z = np.where(deviation > 0, beyond / deviation, -np.inf)
        effect = 2 * u / pairs - 1
    p = np.minimum(2 * norm.sf(z), 1)
    return n, np.where(enough, p, np.nan), np.where(enough, effect, np.nan)


def _holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction; what is missing is no test."""
    there = np.flatnonzero(~np.isnan(p))
    order = there[np.argsort(p[there], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected = np.full_like(p, np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


def pair_shares(tests: "pd.DataFrame") -> "pd.DataFrame":
    """For each pair of groups and score, the share of its tests that are significant (Figure 14).

    Returns:
        One row a pair and score: `score`, `first`, `second`, `tests` (over layers and datasets),
        `share` and the median `effect`; missing where no test was made.
    """
    keys = ["score", "first", "second"]
    cells = tests.groupby(keys, sort=False)
    found = cells["p"].count().rename("tests").to_frame()
    found["share"] = cells["significant"].mean()
    found["effect"] = cells["effect"].median()
    return found.reset_index()


def pairs_in(module: str, pair: str) -> list[int]:
    """The places in `PAIRS` of those of a class: active in one group, in both or in neither."""
    active = [module.upper() in group for group in GROUPS]
    return [i for i, (a, b) in enumerate(PAIRS) if CLASSES[active[a] + active[b]] == pair]


def class_shares(tests: "pd.DataFrame") -> "pd.DataFrame":
    """Shares of significant tests by where a module is active in the two groups (Figure 4).

    A pair's share is taken first, over layers and datasets, then the mean over the pairs of a
    class, as the paper's Figure 4 is of its Figure 14.

    Returns:
        One row a module, class and score: `module`, `pair` (`AO`: the module is active in only one
        of the two groups, `AB`: in both, `IB`: in neither), `score`, `share`, and `tests`. A class
        without a test has no share.
    """
    import pandas as pd

    cells = pair_shares(tests).set_index(["score", "first", "second"])
    rows = []
    for module in MODULES:
        for pair in ("AO", "AB", "IB"):
            names = [NAMED_PAIRS[i] for i in pairs_in(module, pair)]
            for score in (f"s_{each}" for each in MODULES):
                part = cells.reindex([(score, *each) for each in names])
                rows.append((module, pair, score, part["share"].mean(), int(part["tests"].sum())))
    return pd.DataFrame(rows, columns=["module", "pair", "score", "share", "tests"])


def share_significant(tests: "pd.DataFrame") -> "pd.DataFrame":
    """Of Figure 4 the share of each score by where its own module is active.

    Returns:
        A row a score, with the columns `AB`, `AO`, `IB`; missing where a class has no test.
    """
    shares = class_shares(tests)
    own = shares[shares["score"] == "s_" + shares["module"]]
    wide = own.pivot(index="score", columns="pair", values="share")
    return wide.loc[[f"s_{module}" for module in MODULES], ["AB", "AO", "IB"]]
