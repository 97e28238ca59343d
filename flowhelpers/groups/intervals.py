"""How far to trust a share: intervals from texts drawn anew (bootstrap).

Tokens of one text are not independent, so whole texts are drawn, within their dataset, with
replacement; the interval holds the middle 95 % of what the share then is.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.core.bootstrap import TIMES, _middle, _quantiles, _text_of, _texts, resamples
from flowhelpers.core.features import MODULES
from flowhelpers.core.progress_bar import progress
from flowhelpers.groups.occurrences import (
    GROUPS,
    Occurrences,
    complete_layers,
    group_shares,
    group_transition,
    seen_in_groups,
    transition_of,
)
from flowhelpers.groups.significance import (
    ONCE,
    SMALLEST,
    Cells,
    check_alpha,
    class_shares,
    pair_shares,
    pairs_in,
)

if TYPE_CHECKING:
    import pandas as pd


def share_intervals(
    found: Occurrences, by: Sequence[str] = ("dataset",), times: int = TIMES, seed: int = 0
) -> "pd.DataFrame":
    """`groups.group_shares` with `low` and `high`."""
    import pandas as pd

    shares = group_shares(found, by)
    table = found.table if "layer" in by else complete_layers(found.table)
    keys = [*by, "group"]
    rows = pd.MultiIndex.from_frame(shares[keys].astype(object))
    cell = rows.get_indexer(pd.MultiIndex.from_frame(table[keys].astype(object)))
    counts = np.zeros((len(_texts(found.tokens)), len(shares)))
    np.add.at(counts, (_text_of(found.tokens, table), cell), 1)
    drawn = resamples(found.tokens, times, seed) @ counts
    whole = shares.groupby(list(by), observed=True, sort=False).ngroup() if by else shares["n"] * 0
    member = np.equal.outer(whole.to_numpy(), whole.to_numpy()).astype(float)
    total = drawn @ member
    values = np.divide(drawn, total, out=np.full_like(drawn, np.nan), where=total > 0)
    low, high = _middle(values)
    there = shares["share"].notna()
    return shares.assign(low=np.where(there, low, np.nan), high=np.where(there, high, np.nan))


def transition_intervals(found: Occurrences, times: int = TIMES, seed: int = 0) -> "pd.DataFrame":
    """`groups.group_transition` in rows, with intervals.

    A resample has fewer distinct texts, so that fewer features are ever seen in a group. The
    interval is therefore as wide as the resamples spread, but lies around the share itself.

    Returns:
        `first`, `second`, `features` (seen in the first), `share` (of them seen in the second as
        well), `low`, `high`.
    """
    import pandas as pd

    table = complete_layers(found.table)
    text = _text_of(found.tokens, table)
    matrices = []
    for drawn in progress(resamples(found.tokens, times, seed), "resamples"):
        matrices.append(transition_of(seen_in_groups(table[drawn[text] > 0])))
    members = seen_in_groups(table).sum(axis=0)
    share = group_transition(found).to_numpy().ravel()
    values = np.stack(matrices).reshape(times, -1)
    low, high = _middle(values)
    shift = share - np.nan_to_num(_quantiles(values, 0.5)[0])
    low, high = np.maximum(low + shift, 0), np.minimum(high + shift, 1)
    there = ~np.isnan(share)
    return pd.DataFrame(
        {
            "first": np.repeat(GROUPS, len(GROUPS)),
            "second": np.tile(GROUPS, len(GROUPS)),
            "features": np.repeat(members, len(GROUPS)),
            "share": share,
            "low": np.where(there, low, np.nan),
            "high": np.where(there, high, np.nan),
        }
    )


def significance_intervals(
    found: Occurrences,
    tests: "pd.DataFrame",
    alpha: float = 1e-3,
    smallest: int = SMALLEST,
    times: int = TIMES,
    seed: int = 0,
    unique: bool = False,
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Shares of significant tests, by class of pair (Figure 4) and by pair (Figure 14).

    What is tested anew is another sample with fewer distinct texts, of which some count twice; so
    the interval need not lie around the share.

    Args:
        found: Occurrences.
        tests: Their tests, as `group_tests.significance` gives them.
        alpha: The level of these.
        smallest: The smallest group of these.
        times: Resamples.
        seed: Of these.
        unique: Whether the tests count a feature once in a group.

    Returns:
        What `class_shares` and `pair_shares` give, with `low` and `high`.
    """
    check_alpha(alpha)
    table = complete_layers(found.table)
    text, row = _text_of(found.tokens, table), np.arange(len(table))
    if unique:
        row = table.groupby(ONCE, observed=True).ngroup().to_numpy()
    first = np.unique(row, return_index=True)[1]
    cells, of_pairs = Cells(table.iloc[first]), []
    for drawn in progress(resamples(found.tokens, times, seed), "resamples"):
        weights = np.bincount(row, drawn[text], len(first))
        _, p, _ = cells.tested((weights > 0).astype(float) if unique else weights, smallest)
        made = ~np.isnan(p)
        passed, count = ((p < alpha) & made).sum(axis=1), made.sum(axis=1)
        of_pairs.append(np.divide(passed, count, out=np.full(count.shape, np.nan), where=count > 0))
    by_pair = np.stack(of_pairs)
    classes, of_class = class_shares(tests), []
    for row in classes.itertuples():
        inside = by_pair[:, MODULES.index(row.score[2:]), pairs_in(row.module, row.pair)]
        made = ~np.isnan(inside)
        total, count = np.where(made, inside, 0).sum(axis=1), made.sum(axis=1)
        of_class.append(np.divide(total, count, out=np.full(times, np.nan), where=count > 0))
    classes["low"], classes["high"] = _middle(np.stack(of_class, axis=1))
    pairs = pair_shares(tests)
    pairs["low"], pairs["high"] = _middle(by_pair.reshape(times, -1))
    return classes, pairs
