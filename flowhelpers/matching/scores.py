"""What a match table says: best matches, scores, classes and the transition matrix."""

from collections.abc import Mapping
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
    """The match of rank 1 of every feature that chose.

    `backward`, the best source of each residual feature, at each module or one of them; `forward`,
    the best residual feature of each source.
    """
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

    A: `translated`, s(R) alone is high; B: `processed`, s(R) and s(M) or s(A) are; C: `newborn`,
    s(M) or s(A) alone; D: `unexplained`, none. What is high differs by layer and site: what
    exceeds the null's 99.9 % quantile, unless thresholds are given (CHOICES 27). A score that
    does not exist, such as s(R) at layer 0, is not high.

    Args:
        scores: One row a feature, as `scores` gives.
        thresholds: For (layer, module) the score above which a feature's is high, such as
            `youden_thresholds` gives; the null's quantile where there is none.

    Returns:
        `scores` with `high_res`, `high_mlp`, `high_att` (the thresholds that applied) and `class`.

    Raises:
        ValueError: If a threshold is outside [-1, 1], or of a place that the table does not have.
    """
    import numpy as np

    found = scores.copy()
    layers = sorted(scores["layer"].unique().tolist())
    for place in thresholds or {}:
        if place not in {(layer, module) for layer in layers for module in MODULES}:
            raise ValueError(
                f"a threshold for {place!r}: expected (layer, module), a layer of"
                f" {', '.join(map(str, layers))} and a module of {', '.join(MODULES)}"
            )
    high = {}
    for module in MODULES:
        limits = scores.get(f"null_{module}", scores["layer"] * np.nan)
        given = {layer: at for (layer, name), at in (thresholds or {}).items() if name == module}
        for layer, at in given.items():
            check_threshold(at, f"{layer}/{module}")
        found[f"high_{module}"] = scores["layer"].map(given).fillna(limits).astype(float)
        high[module] = scores.get(f"s_{module}", limits) > found[f"high_{module}"]
    module = high["mlp"] | high["att"]
    found["class"] = np.select(
        [high["res"] & ~module, high["res"] & module, module], CLASSES[:3], CLASSES[3]
    )
    return found


def dominant_module(classes: "pd.DataFrame") -> "pd.Series":
    """Which module a feature leans on: of `mlp` and `att`, the nearer one whose score is high.

    Args:
        classes: One row a feature, with its scores and thresholds as `classify` gives them.

    Returns:
        `mlp`, `att`, or missing where neither score is high.
    """
    import pandas as pd

    missing = pd.Series(float("nan"), classes.index)
    scores = pd.DataFrame(
        {
            name: (score := classes.get(f"s_{name}", missing).astype(float)).where(
                score > classes.get(f"high_{name}", missing).astype(float), -float("inf")
            )
            for name in ("mlp", "att")
        }
    )
    return scores.idxmax(axis=1).where(scores.max(axis=1) > -float("inf"), None)


def check_threshold(value: float, name: str) -> None:
    """Raise a ValueError if a threshold is no cosine."""
    if not -1 <= value <= 1:
        raise ValueError(f"threshold {value} for {name}: expected a cosine, from -1 to 1")


def transition(matches: TopK, width: int) -> Tensor:
    """The transition matrix T of the paper's 3.2: a one for each match.

    Top-k is taken for each row, and a cosine that is not above zero is no match. Rows are features
    of the side that chose: of the target for `backward` matches, as in the paper's 3.2, and of the
    source for `forward` ones, as in its appendix F, where ẑ = z·T (CHOICES 29).

    Args:
        matches: The matches, `[rows, k]`.
        width: Number of features of the other side.

    Returns:
        A sparse matrix, `[rows, width]`.
    """
    rows, ranks = torch.nonzero(matches.indices >= 0, as_tuple=True)
    places = torch.stack([rows, matches.indices[rows, ranks]])
    shape = (len(matches.indices), width)
    ones = torch.ones(len(rows), device=places.device)
    return torch.sparse_coo_tensor(places, ones, shape, check_invariants=False)


def agreement(tables: "Mapping[str, pd.DataFrame]") -> "pd.DataFrame":
    """How often two match tables choose the same best source, for each pair and module.

    Args:
        tables: Match tables of one suite, by name.

    Returns:
        `first`, `second`, `module`, `features` (that both match) and `same`, their share.
    """
    import pandas as pd

    index = ["layer", "module", "feature"]
    best = {}
    for name, table in tables.items():
        rows = best_matches(table)
        rows = rows[rows["source"] >= 0].assign(module=rows["module"].astype(str))
        best[name] = rows.set_index(index)["source"]
    records = []
    names = list(best)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            both = pd.concat({"a": best[first], "b": best[second]}, axis=1, join="inner")
            for module, part in (both["a"] == both["b"]).groupby("module"):
                records.append((first, second, module, len(part), part.mean()))
    return pd.DataFrame(records, columns=["first", "second", "module", "features", "same"])
