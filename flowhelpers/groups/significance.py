"""Do the groups differ in their scores: tests of every pair (paper 5.1, Figures 4 and 14)."""

from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.core.features import MODULES
from flowhelpers.groups.occurrences import GROUPS, SCORES, Occurrences, complete_layers, modules_of

if TYPE_CHECKING:
    import pandas as pd

NAMED_PAIRS = tuple(combinations(GROUPS, 2))
FIRST, SECOND = np.triu_indices(len(GROUPS), 1)  # the groups of each pair
CLASSES = ("IB", "AO", "AB")  # by in how many of two groups a module is active
CLASS_ROWS = [(module, pair) for module in MODULES for pair in ("AO", "AB", "IB")]
# Which pairs of groups are in each class of each module, [9, 28].
IN_CLASS = np.array(
    [[sum(m in modules_of(g) for g in pair) == CLASSES.index(c) for pair in NAMED_PAIRS]
     for m, c in CLASS_ROWS]
)  # fmt: skip
ONCE = ["dataset", "layer", "feature", "group"]
SMALLEST = 20  # members of a group, for a test (CHOICES 7)


def mann_whitney_tests(
    found: Occurrences, alpha: float = 1e-3, smallest: int = SMALLEST, unique: bool = False
) -> "pd.DataFrame":
    """Mann-Whitney U for every pair of groups, score, layer and dataset (paper 5.1, CHOICES 7).

    Two-sided, by the normal approximation with the corrections for ties and continuity, which is
    what scipy takes for groups of more than 8. `alpha` is uncorrected; groups with fewer members
    than `smallest` are not tested; with `unique` a feature counts once in a group.

    Returns:
        One row a pair, score, layer and dataset: `dataset`, `layer`, `score`, `first`, `second`,
        `n_first`, `n_second`; `p`, `effect` (the rank-biserial correlation: positive where the
        first group has the higher scores), `significant` (1 or 0) and `p_holm` (Holm's correction
        over all tests), which are missing where one of the groups is too small.

    Raises:
        ValueError: If alpha is outside (0, 1).
    """
    import pandas as pd
    from statsmodels.stats.multitest import multipletests

    check_alpha(alpha)
    table = complete_layers(found.table)
    if unique:
        table = table.drop_duplicates(ONCE)
    cells = Cells(table)
    n, p, effect = cells.tested(np.ones(len(table)), smallest)
    rows = [(*key, score, *pair) for score in SCORES for key in cells.keys for pair in NAMED_PAIRS]
    tests = pd.DataFrame(rows, columns=["dataset", "layer", "score", "first", "second"])
    tests["n_first"], tests["n_second"] = (n[..., i].ravel().astype(int) for i in (FIRST, SECOND))
    tests["p"], tests["effect"] = p.ravel(), effect.ravel()
    made = tests["p"].notna()
    tests["significant"] = (tests["p"] < alpha).astype(float).where(made)
    tests["p_holm"] = np.nan
    if made.any():
        tests.loc[made, "p_holm"] = multipletests(tests.loc[made, "p"], method="holm")[1]
    return tests


def check_alpha(alpha: float) -> None:
    """Raises a ValueError unless the level of significance lies between 0 and 1."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}: expected a level between 0 and 1, such as 0.001")


class Cells:
    """Occurrences by dataset and layer (a cell), score and group, to be tested with any weights."""

    def __init__(self, table: "pd.DataFrame"):
        by_cell = table.groupby(["dataset", "layer"], observed=True)
        self.keys, cell = by_cell.size().index.to_list(), by_cell.ngroup().to_numpy()
        self.group = table["group"].cat.codes.to_numpy().astype(np.int64)
        self.places, self.starts = [], []  # each row among distinct scores, and where cells begin
        for score in SCORES:
            place = table.groupby(["dataset", "layer", score], observed=True).ngroup().to_numpy()
            ends = np.zeros(len(self.keys), np.int64)
            np.maximum.at(ends, cell, place + 1)
            self.places.append(place)
            self.starts.append([0, *ends])

    def tested(self, weights: np.ndarray, smallest: int) -> tuple[np.ndarray, ...]:
        """Members, p and effect; `weights` say how often each occurrence counts.

        Returns:
            `[scores, cells, groups]`, and twice `[scores, cells, pairs]`.
        """
        tests = []
        for place, starts in zip(self.places, self.starts, strict=True):
            width = starts[-1]
            counts = np.bincount(self.group * width + place, weights, len(GROUPS) * width)
            counts = counts.reshape(len(GROUPS), width)
            tests.append([mann_whitney(counts[:, a:b], smallest) for a, b in pairwise(starts)])
        n, p, effect = (np.array([[c[i] for c in cells] for cells in tests]) for i in range(3))
        return n, p[..., FIRST, SECOND], effect[..., FIRST, SECOND]


def mann_whitney(counts: np.ndarray, smallest: int = 1) -> tuple[np.ndarray, ...]:
    """Mann-Whitney U of all pairs of groups, from how often each has each score, in rising order.

    All pairs come from one product of `counts`, `[groups, scores]`, so that the tests of a sample
    can be made hundreds of times (`significance_intervals`).

    Returns:
        Members `[groups]`, and for each pair p (two-sided) and the rank-biserial correlation
        `[groups, groups]`; missing where a group has fewer members than `smallest`.
    """
    from scipy.stats import norm

    n = counts.sum(axis=1)
    below = np.cumsum(counts, axis=1) - counts
    u = counts @ (below + counts / 2).T  # how often the first is higher, ties by half
    pairs, total = np.outer(n, n), n[:, None] + n[None, :]
    cubes, squares = (counts**3).sum(axis=1), counts**2
    ties = cubes[:, None] + cubes[None, :] + 3 * (squares @ counts.T + counts @ squares.T)
    enough = np.minimum.outer(n, n) >= max(smallest, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        tied = (ties - total) / (total * (total - 1))
        deviation = np.sqrt(pairs / 12 * (total + 1 - tied))
        beyond = np.maximum(u, pairs - u) - pairs / 2 - 0.5
        z = np.where(deviation > 0, beyond / deviation, -np.inf)
        effect = 2 * u / pairs - 1
    p = np.minimum(2 * norm.sf(z), 1)
    return n, np.where(enough, p, np.nan), np.where(enough, effect, np.nan)


def pair_shares(tests: "pd.DataFrame") -> "pd.DataFrame":
    """Figure 14: for each pair of groups and score, the share of significant tests.

    Beside it stand `tests` (over layers and datasets) and the median `effect`.
    """
    measures = {"tests": ("p", "count"), "share": ("significant", "mean")}
    by_pair = tests.groupby(["score", "first", "second"], sort=False)
    return by_pair.agg(**measures, effect=("effect", "median")).reset_index()


def class_means(shares: np.ndarray) -> np.ndarray:
    """Means of what is known, from `[..., scores, pairs]` to `[..., classes, scores]`."""
    known = (~np.isnan(shares)).astype(float)
    total, count = np.nan_to_num(shares) @ IN_CLASS.T, known @ IN_CLASS.T
    means = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return means.swapaxes(-1, -2)


def class_shares(tests: "pd.DataFrame") -> "pd.DataFrame":
    """Figure 4: shares of significant tests by where a module is active in the two groups.

    They are means over pairs, as the paper's Figure 4 is of its Figure 14. In `pair`, `AO` says
    that the module is active in only one of the two groups, `AB` in both, `IB` in neither.
    """
    import pandas as pd

    every = pd.MultiIndex.from_tuples([(score, *pair) for score in SCORES for pair in NAMED_PAIRS])
    pairs = pair_shares(tests).set_index(["score", "first", "second"]).reindex(every)
    shares, made = (pairs[c].to_numpy().reshape(len(SCORES), -1) for c in ("share", "tests"))
    rows = [(*row, score) for row in CLASS_ROWS for score in SCORES]
    table = pd.DataFrame(rows, columns=["module", "pair", "score"])
    table["share"] = class_means(shares).ravel()
    return table.assign(tests=(IN_CLASS @ np.nan_to_num(made).T).astype(int).ravel())


def share_significant(tests: "pd.DataFrame") -> "pd.DataFrame":
    """Of Figure 4 each score where its own module is active: a row a score, `AB`, `AO`, `IB`."""
    shares = class_shares(tests)
    own = shares[shares["score"] == "s_" + shares["module"]]
    return own.pivot(index="score", columns="pair", values="share").loc[[*SCORES]]


def scores_by_activity(found: Occurrences) -> "pd.DataFrame":
    """How each module's score parts the occurrences with an active predecessor from the others.

    One row a score: its medians, and the rank-biserial correlation `effect`; layer 0 is left out.
    """
    import pandas as pd

    later, rows = found.table[found.table["layer"] > 0], []
    for module, score in zip(MODULES, SCORES, strict=True):
        medians = later.groupby(module)[score].median().reindex([True, False])
        rows.append((score, *medians, 2 * activity_auc(later, module) - 1))
    return pd.DataFrame(rows, columns=["score", "active", "inactive", "effect"])


def activity_auc(table: "pd.DataFrame", module: str) -> float:
    """The AUC of a module's score for whether its predecessor is active; missing if all are."""
    from sklearn.metrics import roc_auc_score

    known = table.dropna(subset=f"s_{module}")
    active = known[module]
    both = active.any() and not active.all()
    return float(roc_auc_score(active, known[f"s_{module}"])) if both else np.nan
