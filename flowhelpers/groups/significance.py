"""Do the groups differ in their scores: tests of every pair (paper 5.1, Figures 4 and 14)."""

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.core.bootstrap import TIMES, centred_interval, resamples, text_rows
from flowhelpers.core.features import MODULES
from flowhelpers.core.progress_bar import progress
from flowhelpers.groups.occurrences import GROUPS, SCORES, Occurrences, complete_layers

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

NAMED_PAIRS = tuple(combinations(GROUPS, 2))
FIRST, SECOND = np.triu_indices(len(GROUPS), 1)  # the groups of each pair
CLASSES = {"AO": 1, "AB": 2, "IB": 0}  # in how many of two groups a module is active
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
    """
    import pandas as pd
    from statsmodels.stats.multitest import multipletests

    check_alpha(alpha)
    table = complete_layers(found.table)
    if unique:
        table = table.drop_duplicates(ONCE)
    cells = _cells(table)
    n, p, effect = _tested(cells, np.ones(len(table)), smallest)
    rows = [(*key, *pair) for key in cells for pair in NAMED_PAIRS]
    tests = pd.DataFrame(rows, columns=["dataset", "layer", "score", "first", "second"])
    tests["n_first"], tests["n_second"] = (n[:, i].ravel().astype(int) for i in (FIRST, SECOND))
    tests["p"], tests["effect"] = (value[:, FIRST, SECOND].ravel() for value in (p, effect))
    made = tests["p"].notna()
    tests["significant"] = (tests["p"] < alpha).astype(float).where(made)
    tests["p_holm"] = np.nan
    if made.any():
        tests.loc[made, "p_holm"] = multipletests(tests.loc[made, "p"], method="holm")[1]
    return tests


def check_alpha(alpha: float) -> None:
    """Raise a ValueError unless the level of significance lies between 0 and 1."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}: expected a level between 0 and 1, such as 0.001")


def _cells(table: "pd.DataFrame") -> "dict[tuple[Any, Any, str], csr_matrix]":
    """For each dataset, layer and score, which rows have which group and value of the score.

    `[groups * values, rows]`: times the rows' weights it is what `mann_whitney` takes.
    """
    from scipy.sparse import csr_matrix

    table, cells = table.reset_index(drop=True), {}
    for score in SCORES:
        for (dataset, layer), part in table.groupby(["dataset", "layer"], observed=True):
            values, place = np.unique(part[score], return_inverse=True)
            place += part["group"].cat.codes.to_numpy(np.int64) * len(values)
            shape, one = (len(GROUPS) * len(values), len(table)), np.ones(len(part))
            cells[dataset, layer, score] = csr_matrix((one, (place, part.index)), shape)
    return cells


def _tested(cells: "dict[Any, csr_matrix]", weights: np.ndarray, smallest: int) -> list[np.ndarray]:
    """Members `[cells, groups]`, p and effect `[cells, groups, groups]`, of weighted rows."""
    counts = [(rows @ weights).reshape(len(GROUPS), -1) for rows in cells.values()]
    tests = [mann_whitney(of_cell, smallest) for of_cell in counts]
    return [np.stack(values) for values in zip(*tests, strict=True)]


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


def class_shares(tests: "pd.DataFrame") -> "pd.DataFrame":
    """Figure 4: shares of significant tests by where a module is active in the two groups.

    They are means over pairs, as the paper's Figure 4 is of its Figure 14. In `pair`, `AO` says
    that the module is active in only one of the two groups, `AB` in both, `IB` in neither.
    """
    by_class = _by_class(pair_shares(tests))
    return by_class.agg(share=("share", "mean"), tests=("tests", "sum")).reset_index()


def _by_class(pairs: "pd.DataFrame") -> Any:
    """Rows of pairs of groups, grouped by module, class and score."""
    import pandas as pd

    parts = []
    for module in MODULES:
        active = sum(pairs[side].str.contains(module.upper()) for side in ("first", "second"))
        parts += [pairs[active == n].assign(module=module, pair=c) for c, n in CLASSES.items()]
    return pd.concat(parts).groupby(["module", "pair", "score"], sort=False)


def significance_intervals(
    found: Occurrences,
    tests: "pd.DataFrame",
    alpha: float = 1e-3,
    smallest: int = SMALLEST,
    times: int = TIMES,
    seed: int = 0,
    unique: bool = False,
) -> "tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]":
    """Figures 4 and 14 with intervals: shares of significant tests, by class and by pair.

    The result of `class_shares` and `pair_shares`, with `low` and `high`, for `mann_whitney_tests`
    with the same `alpha`, `smallest` and `unique`. A resample has fewer distinct texts, and some
    count twice, so its shares are lower: intervals are centred on the sample's own.

    Returns:
        Classes; pairs; and for each score of a module the `difference` of the shares of AO and IB,
        with `difference_low` and `difference_high`, over the same resamples.
    """
    import pandas as pd

    check_alpha(alpha)
    table = complete_layers(found.table)
    groups = table.groupby(ONCE, observed=True)  # the occurrences that count as one if `unique`
    row = groups.ngroup().to_numpy() if unique else np.arange(len(table))
    first = np.unique(row, return_index=True)[1]
    cells, by_pair = _cells(table.iloc[first]), []
    text = text_rows(found.tokens, table)
    for counts in progress(resamples(found.tokens, times, seed), "resamples"):
        weights = np.bincount(row, counts[text], len(first))
        weights = np.minimum(weights, 1) if unique else weights
        p = _tested(cells, weights, smallest)[1][:, FIRST, SECOND]
        p = p.reshape(len(SCORES), -1, len(NAMED_PAIRS))
        made, passed = (~np.isnan(p)).sum(axis=1), (p < alpha).sum(axis=1)
        share = np.divide(passed, made, out=np.full(made.shape, np.nan), where=made > 0)
        by_pair.append(share.ravel())
    classes, pairs = class_shares(tests), pair_shares(tests)
    of_resamples = pairs[["score", "first", "second"]].join(pd.DataFrame(by_pair).T)
    means = _by_class(of_resamples)[[*range(times)]].mean().to_numpy().T
    for rows, values in ((pairs, np.stack(by_pair)), (classes, means)):
        ends = centred_interval(values, rows["share"].to_numpy()).clip(0, 1)
        rows["low"], rows["high"] = ends
    own = classes["score"] == "s_" + classes["module"]
    ao, ib = (classes.index[own & (classes["pair"] == pair)] for pair in ("AO", "IB"))
    gaps = classes.loc[ao, ["score"]].reset_index(drop=True)
    share = classes["share"].to_numpy()
    gaps["difference"] = share[ao] - share[ib]
    ends = centred_interval(means[:, ao] - means[:, ib], gaps["difference"].to_numpy())
    gaps["difference_low"], gaps["difference_high"] = ends
    return classes, pairs, gaps


def share_significant(tests: "pd.DataFrame") -> "pd.DataFrame":
    """Figure 4 for the score of each module: a row for each score, columns `AB`, `AO`, `IB`."""
    shares = class_shares(tests)
    own = shares[shares["score"] == "s_" + shares["module"]]
    return own.pivot(index="score", columns="pair", values="share").loc[[*SCORES]]


def scores_by_activity(found: Occurrences) -> "pd.DataFrame":
    """How well each score separates occurrences with an active predecessor from the others.

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
    if known[module].nunique() < 2:
        return np.nan
    return float(roc_auc_score(known[module], known[f"s_{module}"]))
