"""Where active features come from: predecessor groups and their tests."""

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations import FeatureActivations
from flowhelpers.features import MODULES, Site
from flowhelpers.runs import progress

if TYPE_CHECKING:
    import pandas as pd

GROUPS = (
    "From nowhere",
    "From RES",
    "From MLP",
    "From ATT",
    "From RES & MLP",
    "From RES & ATT",
    "From MLP & ATT",
    "From RES & MLP & ATT",
)
_OF_BITS = np.array([GROUPS.index(name) for name in (
    "From nowhere", "From RES", "From MLP", "From RES & MLP",
    "From ATT", "From RES & ATT", "From MLP & ATT", "From RES & MLP & ATT",
)])  # fmt: skip


def occurrences(scores: "pd.DataFrame", activations: FeatureActivations) -> "pd.DataFrame":
    """Every active residual feature at every token, with its predecessors' activity (paper 5.1).

    A predecessor is the top-1 match at a site, active at the same token. Layers that lack one of
    the three sites are left out, layer 0 always: it has no residual predecessor (CHOICES 5).

    Args:
        scores: One row a feature, as `matching.scores` gives.
        activations: Activations at all sites.

    Returns:
        One row for each active (feature, token): `layer`, `feature`, `token_row` (row of
        `activations.tokens`), `activation`, for each module `res`, `mlp`, `att` whether the
        predecessor is active, its score `s_res` … and its share of all tokens `rate_res` …, and
        `group`.

    Raises:
        ValueError: If no layer has all three sites.
    """
    import pandas as pd

    sources = scores.reindex(columns=[f"source_{module}" for module in MODULES])
    complete = scores[sources.notna().all(axis=1)]
    if complete.empty:
        raise ValueError("no layer has predecessors at all three of res, mlp and att")
    tables = []
    for layer, part in complete.groupby("layer"):
        part = part.sort_values("feature")
        codes = activations.by_site[Site(int(layer), "res")].tocoo()
        columns: dict[str, np.ndarray] = {
            "layer": np.full(codes.nnz, layer),
            "feature": codes.col,
            "token_row": codes.row,
            "activation": codes.data,
        }
        bits = np.zeros(codes.nnz, dtype=int)
        for bit, module in enumerate(MODULES):
            site = Site(int(layer) - (module == "res"), module)
            best = part[f"source_{module}"].to_numpy().astype(int)
            active = activations.by_site[site].toarray() > 0
            predecessor = best[codes.col]
            on = active[codes.row, predecessor] & (predecessor >= 0)
            columns[module] = on
            columns[f"s_{module}"] = part[f"s_{module}"].to_numpy()[codes.col]
            columns[f"rate_{module}"] = np.where(
                predecessor >= 0, active.mean(axis=0)[predecessor], 0.0
            )
            bits += on.astype(int) << bit
        columns["group"] = np.array(GROUPS, dtype=object)[_OF_BITS[bits]]
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def significance(table: "pd.DataFrame", alpha: float = 1e-3, smallest: int = 20) -> "pd.DataFrame":
    """Mann-Whitney U for every pair of groups, score and layer (paper 5.1; two-sided, CHOICES 7).

    Args:
        table: Occurrences; a column `dataset`, if there is one, is tested apart.
        alpha: Level of significance, uncorrected.
        smallest: Groups with fewer members are left out.

    Returns:
        One row a test: `dataset`, `layer`, `score`, `first`, `second`, `n_first`, `n_second`, `p`,
        `significant`, and `pair`: whether the score's module is active in only one of the two
        groups (`AO`), in both (`AB`) or in neither (`IB`).
    """
    import pandas as pd
    from scipy.stats import mannwhitneyu

    if "dataset" not in table:
        table = table.assign(dataset="all")
    rows = []
    for (dataset, layer), part in progress(list(table.groupby(["dataset", "layer"])), "tests"):
        members = {name: group for name, group in part.groupby("group") if len(group) >= smallest}
        names = [name for name in GROUPS if name in members]
        for first, second in combinations(names, 2):
            for module in MODULES:
                a, b = (members[name][f"s_{module}"].to_numpy() for name in (first, second))
                p = float(mannwhitneyu(a, b, alternative="two-sided").pvalue)
                active = (module.upper() in first) + (module.upper() in second)
                cells = (dataset, layer, f"s_{module}", first, second, len(a), len(b), p, p < alpha)
                rows.append((*cells, ("IB", "AO", "AB")[active]))
    columns = ["dataset", "layer", "score", "first", "second", "n_first", "n_second", "p"]
    return pd.DataFrame(rows, columns=[*columns, "significant", "pair"])


def share_significant(tests: "pd.DataFrame") -> "pd.DataFrame":
    """Share of significant tests by score and class of pair, as in the paper's Figure 4.

    The share is first taken for each pair of groups, over layers and datasets, then averaged over
    the pairs of a class; it is missing where a class has no test.
    """
    cells = tests.groupby(["score", "pair", "first", "second"])["significant"].mean()
    shares = cells.groupby(["score", "pair"]).mean().unstack("pair")
    return shares.reindex(columns=["AB", "AO", "IB"])
