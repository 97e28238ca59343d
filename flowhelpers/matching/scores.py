"""What a match table says: best matches, scores, classes and the transition matrix."""

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flowhelpers.core.features import MODULES
from flowhelpers.matching.cosine import TopK

if TYPE_CHECKING:
    import pandas as pd

CLASSES = ("translated", "processed", "newborn", "unexplained")


def best_matches(
    table: "pd.DataFrame",
    direction: Literal["backward", "forward"] = "backward",
    module: str | None = None,
) -> "pd.DataFrame":
    """The matches of rank 1 in one direction, for all modules or for one."""
    best = table[(table["rank"] == 1) & (table["direction"] == direction)]
    return best if module is None else best[best["module"] == module]


def feature_scores(table: "pd.DataFrame") -> "pd.DataFrame":
    """s(R), s(M) and s(A) of every residual feature: its best score at each site (paper 3.3).

    Returns:
        One row a feature: `layer`, `feature`, and for each of `res`, `mlp`, `att` the columns
        `s_res` (score), `source_res` (index, -1 without a match) and `null_res`. At layer 0 the
        residual columns are missing.
    """
    best = best_matches(table)
    wide = best.assign(module=best["module"].astype(str)).pivot(
        index=["layer", "feature"], columns="module", values=["score", "source", "null"]
    )
    wide.columns = [f"{'s' if kind == 'score' else kind}_{module}" for kind, module in wide.columns]
    return wide.reset_index()


def classify(
    scores: "pd.DataFrame", thresholds: Mapping[tuple[int, str], float] | None = None
) -> "pd.DataFrame":
    """Which of the four readings of the paper's 3.3 fits each feature.

    A, `translated`: only s(R) is high; B, `processed`: s(R), and s(M) or s(A); C, `newborn`: s(M)
    or s(A), but not s(R); D, `unexplained`: none. A score is high above the null's 99.9 % quantile,
    or above the threshold given for its (layer, module), as by `youden_thresholds` (CHOICES 27). A
    missing score, such as s(R) at layer 0, is not high.

    Returns:
        `scores` with `high_res`, `high_mlp`, `high_att` (the thresholds that applied) and `class`.

    Raises:
        ValueError: If a threshold is outside [-1, 1], or for a site that the table does not have.
    """
    import numpy as np

    found = scores.copy()
    missing = scores["layer"] * np.nan
    for module in MODULES:
        found[f"high_{module}"] = scores.get(f"null_{module}", missing).astype(float)
    for (layer, module), threshold in (thresholds or {}).items():
        at = scores["layer"] == layer
        if not at.any() or module not in MODULES:
            raise ValueError(
                f"a threshold for {(layer, module)!r}: expected (layer, module), a layer of"
                f" {', '.join(map(str, scores['layer'].unique()))} and a module of"
                f" {', '.join(MODULES)}"
            )
        check_threshold(threshold, f"{layer}/{module}")
        found.loc[at, f"high_{module}"] = threshold
    high = {m: scores.get(f"s_{m}", missing) > found[f"high_{m}"] for m in MODULES}
    module = high["mlp"] | high["att"]
    found["class"] = np.select(
        [high["res"] & ~module, high["res"] & module, module], CLASSES[:3], CLASSES[3]
    )
    return found


def dominant_module(classes: "pd.DataFrame") -> "pd.Series":
    """The module, `mlp` or `att`, with the larger high score by `classify`; missing if neither."""
    import pandas as pd

    scores = {m: classes[f"s_{m}"] for m in MODULES[1:] if f"s_{m}" in classes}
    high = {m: score.where(score > classes[f"high_{m}"]) for m, score in scores.items()}
    table = pd.DataFrame(high, classes.index, dtype=float).dropna(how="all")
    return table.idxmax(axis=1).astype(object).reindex(classes.index)  # of none, no numbers


def check_threshold(value: float, name: str) -> None:
    """Raise a ValueError if a threshold cannot be a cosine."""
    if not -1 <= value <= 1:
        raise ValueError(f"threshold {value} for {name}: expected a cosine, from -1 to 1")


def transition(matches: TopK, width: int) -> Tensor:
    """The transition matrix T of the paper's 3.2, sparse `[rows, width]`: a one for each match.

    Rows are features of the side that chose, columns the `width` features of the other side. In
    `backward` matches the targets choose (paper 3.2); in `forward` matches the sources choose, so
    that activations z of the sources become z·T. Top-k is by row. Appendix F, which applies T so,
    prints no formula for it (CHOICES 29).
    """
    rows, ranks = torch.nonzero(matches.indices >= 0, as_tuple=True)
    places = torch.stack([rows, matches.indices[rows, ranks]])
    shape = (len(matches.indices), width)
    ones = torch.ones(len(rows), device=places.device)
    return torch.sparse_coo_tensor(places, ones, shape, check_invariants=False)


def agreement(tables: "Mapping[str, pd.DataFrame]") -> "pd.DataFrame":
    """How often two match tables choose the same best source, for each pair and module.

    Returns:
        `first`, `second`, `module`, `features` (that both match) and `same`, their share.
    """
    import pandas as pd

    best = {}
    for name, table in tables.items():
        rows = best_matches(table).astype({"module": str})
        best[name] = rows[rows["source"] >= 0].set_index(["layer", "module", "feature"])["source"]
    parts = []
    for first, second in combinations(best, 2):
        both = pd.concat([best[first], best[second]], axis=1, join="inner", keys=["a", "b"])
        same = (both["a"] == both["b"]).groupby("module").agg(features="size", same="mean")
        parts.append(same.reset_index().assign(first=first, second=second))
    columns = ["first", "second", "module", "features", "same"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
