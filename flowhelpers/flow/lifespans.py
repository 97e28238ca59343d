"""The whole model's flow: how long its features live, where they are born, where they meet."""

from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.core.features import MODULES
from flowhelpers.matching.scores import (
    CLASSES,
    check_threshold,
    classify,
    dominant_module,
    feature_scores,
)

if TYPE_CHECKING:
    import pandas as pd


def feature_lifespans(
    table: "pd.DataFrame", t_res: float | None = None, mutual: bool = False
) -> "pd.DataFrame":
    """How long every residual feature lives: the run of layers whose joining matches are high.

    A step back goes to a feature's best match, a step on to the feature whose best match the next
    layer holds for it, as in a flow graph. A step is high if its score is at least `t_res`, or
    above the null's quantile if `t_res` is not given.

    Args:
        table: A match table.
        t_res: The score that a step has to have.
        mutual: Whether each of the two has to be the other's best match as well.

    Returns:
        One row a feature: `layer`, `feature`, `first` and `last` layer of its run, and `layers`,
        their number. A run ends where the table does: of some layers it holds no more than these.
    """
    import pandas as pd

    if t_res is not None:
        check_threshold(t_res, "t_res")
    best = _best(table)
    high = best["score"] > best["null"] if t_res is None else best["score"] >= t_res
    steps = best[high & best["mutual"]] if mutual else best[high]
    widths = _widths(table)
    first = {layer: np.full(width, layer) for layer, width in widths.items()}
    last = {layer: np.full(width, layer) for layer, width in widths.items()}
    parts = {key: part for key, part in steps.groupby(["layer", "direction"], observed=True)}
    for layer in widths:
        if layer - 1 in widths and (layer, "backward") in parts:
            part = parts[layer, "backward"]
            first[layer][part["feature"]] = first[layer - 1][part["source"]]
    for layer in reversed(widths):
        if layer + 1 in widths and (layer + 1, "forward") in parts:
            part = parts[layer + 1, "forward"]
            last[layer][part["source"]] = last[layer + 1][part["feature"]]
    spans = [
        {"layer": layer, "feature": np.arange(width), "first": first[layer], "last": last[layer]}
        for layer, width in widths.items()
    ]
    found = pd.concat(map(pd.DataFrame, spans), ignore_index=True)
    return found.assign(layers=found["last"] - found["first"] + 1)


def flow_by_layer(table: "pd.DataFrame") -> "pd.DataFrame":
    """What becomes of features from layer to layer, over the whole model.

    Returns:
        One row a layer that the match table has: `features`; the share of each class of the paper's
        3.3; `born_mlp` and `born_att`, the share that is newborn by that module
        (`dominant_module`); `dies`, the share without a match on that is higher than chance
        (missing where the table has no next layer); `mutual`, the share with a best match back
        that is mutual; `sources`, how many features of the layer before are anybody's best match,
        as a share of those that choose a match on; and `largest_funnel`, how many features share
        one.
    """
    import pandas as pd

    best, widths = _best(table), _widths(table)
    steps = set(table.loc[table["module"] == "res", "layer"])
    classes = classify(feature_scores(table))
    rows = []
    for layer, width in widths.items():
        part = classes[classes["layer"] == layer]
        born = dominant_module(part[part["class"] == "newborn"])
        row = {"layer": layer, "features": width}
        row |= (part["class"].value_counts() / width).to_dict()
        row |= {f"born_{name}": (born == name).sum() / width for name in MODULES[1:]}
        on = best[(best["layer"] == layer + 1) & (best["direction"] == "forward")]
        if layer + 1 in steps:
            row["dies"] = 1 - (on["score"] > on["null"]).sum() / width
        back = best[(best["layer"] == layer) & (best["direction"] == "backward")]
        if len(back):
            ahead = best[(best["layer"] == layer) & (best["direction"] == "forward")]
            counts = back["source"].value_counts()
            row["mutual"] = back["mutual"].sum() / width
            row |= {"sources": len(counts) / max(len(ahead), 1), "largest_funnel": counts.iloc[0]}
        rows.append(row)
    found = pd.DataFrame(rows)
    for name in CLASSES:  # one that no feature is of has no column yet
        found[name] = found.get(name, 0.0 * found["layer"]).fillna(0.0)
    return found


def _best(table: "pd.DataFrame") -> "pd.DataFrame":
    """The best matches in the stream."""
    best = table[(table["rank"] == 1) & (table["module"] == "res")]
    return best[(best["source"] >= 0) & (best["feature"] >= 0)]


def _widths(table: "pd.DataFrame") -> dict[int, int]:
    """By layer, how many features each residual SAE has that the table names on either side."""
    targets = table[table["direction"] == "backward"].groupby("layer")["feature"].max()
    sources = table[(table["direction"] == "forward") & (table["module"] == "res")]
    sources = sources.groupby("source_layer")["source"].max()
    return (targets.combine_first(sources).sort_index() + 1).astype(int).to_dict()
