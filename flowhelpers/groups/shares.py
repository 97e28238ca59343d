"""How occurrences are spread over the groups, with intervals from texts drawn anew (bootstrap).

Tokens of one text are not independent, so whole texts are drawn, within their dataset, with
replacement; the interval holds the middle 95 % of what the share then is.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.core.bootstrap import (
    TIMES,
    centred_interval,
    interval,
    mean_intervals,
    resamples,
    text_rows,
)
from flowhelpers.core.progress_bar import progress
from flowhelpers.groups.occurrences import GROUPS, SCORES, Occurrences, complete_layers

if TYPE_CHECKING:
    import pandas as pd


def group_shares(found: Occurrences, by: Sequence[str] = ("dataset",)) -> "pd.DataFrame":
    """How the occurrences are spread over the groups (Figures 5 and 12a).

    Shares add up to one within each value of the columns `by`. Layers that lack a site count only
    if `by` has `layer`.

    Returns:
        One row for each group and value of `by`: `n`, `features` (unique ones), `share` of
        occurrences, `unique_share` of unique features; shares of an empty group are missing, not 0.
    """
    import pandas as pd

    table = found.table if "layer" in by else complete_layers(found.table)
    keys = [*by, "group"]
    unique = table[[*dict.fromkeys([*keys, "layer", "feature"])]].drop_duplicates()
    sizes = [some.groupby(keys, observed=False).size() for some in (table, unique)]
    counts = pd.concat(sizes, axis=1, keys=["n", "features"])
    totals = counts.groupby([*by], observed=False).transform("sum") if by else counts.sum()
    shares = (counts / totals).where(counts["n"] > 0).set_axis(["share", "unique_share"], axis=1)
    return pd.concat([counts, shares], axis=1).reset_index()


def share_intervals(
    found: Occurrences, by: Sequence[str] = ("dataset",), times: int = TIMES, seed: int = 0
) -> "pd.DataFrame":
    """`group_shares` with bootstrap intervals, from `low` to `high`."""
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


def dataset_gaps(
    by_method: Mapping[str, Occurrences], fitted: str, times: int = TIMES, seed: int = 0
) -> "pd.DataFrame":
    """Is there more "From nowhere" in other datasets than in the one that Pearson read (C.4)?

    All methods are of one sample, and drawn anew together, so that `beyond` is paired.

    Returns:
        One row for each method and dataset but `fitted`: the share "From nowhere" `at_home`, in
        `fitted`, and `away`, in the dataset; `difference`, away less at home, and `beyond`, that
        less the first method's, both with intervals `…_low`, `…_high`.
    """
    import pandas as pd

    rows, first = [], {}
    for method, found in by_method.items():
        table, drawn = complete_layers(found.table), resamples(found.tokens, times, seed)
        drawn = np.vstack([np.ones_like(drawn[:1]), drawn])  # the sample itself first
        nowhere = table[table["group"] == GROUPS[0]]
        sums, counts = (
            np.bincount(text_rows(found.tokens, some), minlength=drawn.shape[1])
            for some in (nowhere, table)
        )
        of_text = found.tokens.drop_duplicates(["dataset", "text"])["dataset"].to_numpy()
        own = {name: np.where(of_text == name, drawn, 0) for name in dict.fromkeys(of_text)}
        shares = {name: (many @ sums) / (many @ counts) for name, many in own.items()}
        for name in [name for name in shares if name != fitted]:
            gap = shares[name] - shares[fitted]
            both = np.stack([gap, gap - first.setdefault(name, gap)], axis=1)
            (low, beyond_low), (high, beyond_high) = interval(both[1:])
            row = {"method": method, "dataset": name}
            row |= {"at_home": shares[fitted][0], "away": shares[name][0]}
            row |= {"difference": both[0, 0], "difference_low": low, "difference_high": high}
            row |= {"beyond": both[0, 1], "beyond_low": beyond_low, "beyond_high": beyond_high}
            rows.append(row)
    return pd.DataFrame(rows)


def group_transition(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Of the features ever seen in one group (row), the share also seen in another (Figure 13).

    Of each occurrence the number of its feature, which tells layers apart too (CHOICES 8), and that
    of its group; a row is missing where a group is empty.
    """
    seen = np.zeros((features.max(initial=-1) + 1, len(GROUPS)))
    seen[features, groups] = 1
    both = seen.T @ seen
    members = both.diagonal()[:, None]
    return np.divide(both, members, out=np.full_like(both, np.nan), where=members > 0)


def transition_intervals(found: Occurrences, times: int = TIMES, seed: int = 0) -> "pd.DataFrame":
    """Figure 13 in rows: `group_transition` with intervals.

    Of the `features` seen in the first group, `share` is also seen in the second. A resample has
    fewer distinct texts, so fewer features are seen in a group. The interval is therefore as wide
    as the resamples spread, but is centred on the `share` itself.
    """
    import pandas as pd

    table = complete_layers(found.table)
    text = text_rows(found.tokens, table)
    drawn = progress(resamples(found.tokens, times, seed), "resamples")
    features = table.groupby(["layer", "feature"]).ngroup().to_numpy()
    groups = table["group"].cat.codes.to_numpy()
    rows = (counts[text] > 0 for counts in drawn)
    values = np.stack([group_transition(features[some], groups[some]).ravel() for some in rows])
    share = group_transition(features, groups).ravel()
    pairs = pd.MultiIndex.from_product([GROUPS, GROUPS], names=["first", "second"])
    unique = table.drop_duplicates(["layer", "feature", "group"])["group"].value_counts(sort=False)
    rows = pd.DataFrame({"features": np.repeat(unique.to_numpy(), len(GROUPS))}, index=pairs)
    low, high = centred_interval(values, share).clip(0, 1)
    return rows.assign(share=share, low=low, high=high).reset_index()


def group_profiles(found: Occurrences) -> "pd.DataFrame":
    """For each feature, which groups it falls into, and how evenly (asked for in the paper's C.1).

    Returns:
        One row a feature: `layer`, `feature`, `n` (occurrences), the share in each group by its
        name, `main` (the most frequent group), `main_share`, and `entropy` of the shares in bits,
        from 0 (always the same) to 3 (all eight alike).
    """
    from scipy.stats import entropy

    table = complete_layers(found.table)
    counts = table.groupby(["layer", "feature", "group"], observed=False).size().unstack("group")
    counts = counts[counts.sum(axis=1) > 0].set_axis(list(GROUPS), axis=1)
    profiles = counts.div(counts.sum(axis=1), axis=0)
    main, main_share = profiles.idxmax(axis=1), profiles.max(axis=1)
    bits = entropy(profiles.to_numpy(), base=2, axis=1)
    profiles.insert(0, "n", counts.sum(axis=1))
    return profiles.assign(main=main, main_share=main_share, entropy=bits).reset_index()


def single_source_points(
    found: Occurrences, layers: Sequence[int], n: int = 350, seed: int = 0
) -> "pd.DataFrame":
    """Features of the groups with one source or none, at most `n` of each layer (Figure 3).

    One row for each feature and group: `layer`, `feature`, `group`, `s_res`, `s_mlp`, `s_att`.
    """
    import pandas as pd

    table = complete_layers(found.table)
    known = sorted(table["layer"].unique().tolist())
    if not set(layers) <= set(known):
        raise ValueError(f"layers {list(layers)}: expected some of {', '.join(map(str, known))}")
    keys = ["layer", "group", "feature"]
    single = table.loc[table["group"].isin(GROUPS[:4]), ["layer", "feature", "group", *SCORES]]
    by_layer = single.drop_duplicates(keys).groupby("layer")
    parts = [part for layer, part in by_layer if layer in layers] or [single]
    parts = [part.sample(min(n, len(part)), random_state=seed) for part in parts]
    return pd.concat(parts).sort_values(keys, ignore_index=True)


def score_histograms(
    found: Occurrences, layers: Sequence[int], bins: int = 20, smallest: int = 20
) -> "pd.DataFrame":
    """How the scores of groups with `smallest` members or more are distributed (Figure 12 b).

    Returns:
        `layer`, `score`, `group`, `n`, `at` (the middle of a bin) and `density`.
    """
    import pandas as pd

    table = complete_layers(found.table).melt(["layer", "group"], [*SCORES], "score", "value")
    rows = []
    for layer, score in product(layers, SCORES):
        here = table[(table["layer"] == layer) & (table["score"] == score)]
        edges = np.linspace(min(0.0, here["value"].min()), 1, bins + 1)
        for group, values in here.groupby("group", observed=True)["value"]:
            if len(values) >= smallest:
                density, _ = np.histogram(values, edges, density=True)
                bars = np.stack([(edges[1:] + edges[:-1]) / 2, density], axis=1)
                rows += [(layer, score, group, len(values), *bar) for bar in bars]
    return pd.DataFrame(rows, columns=["layer", "score", "group", "n", "at", "density"])
