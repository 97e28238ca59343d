"""How far to trust a share: intervals from texts drawn anew (bootstrap).

Tokens of one text are not independent, so whole texts are drawn, within their dataset, with
replacement; the interval holds the middle 95 % of what the share then is.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.core.bootstrap import (
    TIMES,
    _middle,
    _quantiles,
    _text_of,
    mean_intervals,
    resamples,
)
from flowhelpers.core.progress_bar import progress
from flowhelpers.groups.occurrences import GROUPS, Occurrences, complete_layers, group_shares
from flowhelpers.groups.significance import (
    ONCE,
    SMALLEST,
    Cells,
    check_alpha,
    class_means,
    class_shares,
    pair_shares,
)

if TYPE_CHECKING:
    import pandas as pd


def share_intervals(
    found: Occurrences, by: Sequence[str] = ("dataset",), times: int = TIMES, seed: int = 0
) -> "pd.DataFrame":
    """`group_shares` with `low` and `high`."""
    import pandas as pd

    shares = group_shares(found, by)
    table = found.table if "layer" in by else complete_layers(found.table)
    in_group = pd.get_dummies(table["group"]).set_axis(list(GROUPS), axis=1)
    in_group = pd.concat([table[[*by, "text"]], in_group], axis=1)
    wide = mean_intervals(in_group, GROUPS, by, found.tokens, times, seed)
    ends = [
        wide[[*by, f"{g}_low", f"{g}_high"]].set_axis([*by, "low", "high"], axis=1).assign(group=g)
        for g in GROUPS
    ]
    ends = pd.concat(ends).astype({"group": shares["group"].dtype})
    shares = shares.merge(ends, "left", on=[*by, "group"])
    shares[["low", "high"]] = shares[["low", "high"]].mask(shares["share"].isna())
    return shares


def group_transition(table: "pd.DataFrame") -> np.ndarray:
    """Of the features ever seen in one group (row), the share also seen in another (Figure 13).

    Features of all layers count together (CHOICES 8); a row is missing where a group is empty.
    """
    features = table.groupby(["layer", "feature"]).ngroup().to_numpy()
    seen = np.zeros((features.max(initial=-1) + 1, len(GROUPS)))
    seen[features, table["group"].cat.codes.to_numpy()] = 1
    both = seen.T @ seen
    members = both.diagonal()[:, None]
    return np.divide(both, members, out=np.full_like(both, np.nan), where=members > 0)


def transition_intervals(found: Occurrences, times: int = TIMES, seed: int = 0) -> "pd.DataFrame":
    """Figure 13 in rows: `group_transition` with intervals.

    A resample has fewer distinct texts, so that fewer features are ever seen in a group. The
    interval is therefore as wide as the resamples spread, but lies around the `share` itself, of
    the `features` seen in the first group that are seen in the second as well.
    """
    import pandas as pd

    table = complete_layers(found.table)
    counts = _row_counts(table, found, times, seed)
    values = np.stack([group_transition(table[count > 0]).ravel() for count in counts])
    share = group_transition(table).ravel()
    pairs = pd.MultiIndex.from_product([GROUPS, GROUPS], names=["first", "second"])
    unique = table.drop_duplicates(["layer", "feature", "group"])["group"].value_counts(sort=False)
    rows = pd.DataFrame({"features": np.repeat(unique.to_numpy(), len(GROUPS))}, index=pairs)
    shift = share - _quantiles(values, 0.5)[0]
    low, high = _middle(values)
    low, high = np.maximum(low + shift, 0), np.minimum(high + shift, 1)
    return rows.assign(share=share, low=low, high=high).reset_index()


def significance_intervals(
    found: Occurrences,
    tests: "pd.DataFrame",
    alpha: float = 1e-3,
    smallest: int = SMALLEST,
    times: int = TIMES,
    seed: int = 0,
    unique: bool = False,
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Figures 4 and 14 with intervals: shares of significant tests, by class and by pair.

    Of `mann_whitney_tests` with the same `alpha`, `smallest` and `unique`, what `class_shares` and
    `pair_shares` give, with `low` and `high`. A resample has fewer distinct texts, of which some
    count twice; so the interval need not lie around the share.
    """
    check_alpha(alpha)
    table = complete_layers(found.table)
    row = np.arange(len(table))
    if unique:
        row = table.groupby(ONCE, observed=True).ngroup().to_numpy()
    first = np.unique(row, return_index=True)[1]
    cells, by_pair = Cells(table.iloc[first]), []
    for counts in _row_counts(table, found, times, seed):
        weights = np.bincount(row, counts, len(first))
        _, p, _ = cells.tested((weights > 0).astype(float) if unique else weights, smallest)
        made, passed = (~np.isnan(p)).sum(axis=1), (p < alpha).sum(axis=1)
        by_pair.append(np.divide(passed, made, out=np.full(made.shape, np.nan), where=made > 0))
    of_pairs = np.stack(by_pair)  # [times, scores, pairs]
    classes, pairs = class_shares(tests), pair_shares(tests)
    classes["low"], classes["high"] = _middle(class_means(of_pairs).reshape(times, -1))
    pairs["low"], pairs["high"] = _middle(of_pairs.reshape(times, -1))
    return classes, pairs


def _row_counts(
    table: "pd.DataFrame", found: Occurrences, times: int, seed: int
) -> Iterator[np.ndarray]:
    """How often each row of the table counts, for every resample of the texts."""
    text = _text_of(found.tokens, table)
    for drawn in progress(resamples(found.tokens, times, seed), "resamples"):
        yield drawn[text]
