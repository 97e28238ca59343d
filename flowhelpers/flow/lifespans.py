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

    Raises:
        ValueError: If the threshold is outside [-1, 1].
    """
    import pandas as pd

    if t_res is not None:
        check_threshold(t_res, "t_res")
    best = table[(table["rank"] == 1) & (table["module"] == "res")]
    high = best["score"] > best["null"] if t_res is None else best["score"] >= t_res
    high &= (best["source"] >= 0) & (best["feature"] >= 0)
    kept = best[high & best["mutual"]] if mutual else best[high]
    parts = {key: part for key, part in kept.groupby(["layer", "direction"], observed=True)}
    widths = table[table["direction"] == "backward"].groupby("layer")["feature"].max() + 1
    sources = table[(table["direction"] == "forward") & (table["module"] == "res")]
    widths = widths.combine_first(sources.groupby("source_layer")["source"].max() + 1).astype(int)
    layers = sorted(widths.index)
    first = {layer: np.full(widths[layer], layer) for layer in layers}
    last = {layer: np.full(widths[layer], layer) for layer in layers}
    for layer in layers:
        part = parts.get((layer, "backward"))
        if part is not None and layer - 1 in first:
            first[layer][part["feature"]] = first[layer - 1][part["source"]]
    for layer in reversed(layers):
        part = parts.get((layer + 1, "forward"))
        if part is not None and layer + 1 in last:
            last[layer][part["source"]] = last[layer + 1][part["feature"]]
    frames = [
        pd.DataFrame(
            {
                "layer": layer,
                "feature": np.arange(widths[layer]),
                "first": first[layer],
                "last": last[layer],
            }
        )
        for layer in layers
    ]
    return pd.concat(frames, ignore_index=True).assign(layers=lambda t: t["last"] - t["first"] + 1)


def _width(table: "pd.DataFrame", layer: int) -> int:
    """Features of a residual SAE that the table has as a source only."""
    sources = table[(table["source_layer"] == layer) & (table["module"] == "res")]
    return int(sources.loc[sources["direction"] == "forward", "source"].max()) + 1


def flow_by_layer(table: "pd.DataFrame") -> "pd.DataFrame":
    """What becomes of features from layer to layer, over the whole model.

    Args:
        table: A match table.

    Returns:
        One row a layer that the table has: `features`; the share of each class of the paper's 3.3;
        `born_mlp` and `born_att`, the share that is newborn by that module
        (`dominant_module`); `dies`, the share without a match on that is higher than chance
        (missing where the table has no next layer); `mutual`, the share with a best match back
        that is mutual; `sources`, how many features of the layer before are anybody's best match,
        as a share of those that choose a match on; and `largest_funnel`, how many features share
        one.
    """
    import pandas as pd

    best = table[(table["rank"] == 1) & (table["module"] == "res")]
    steps = set(best["layer"])
    best = best[(best["source"] >= 0) & (best["feature"] >= 0)]
    records = []
    classes = classify(feature_scores(table))
    parts = {int(layer): part for layer, part in classes.groupby("layer")}
    for layer in sorted({*parts, *(at - 1 for at in steps)}):
        part = parts.get(layer)
        if part is None:  # a source alone
            part = classes[:0].reindex(range(_width(table, layer)))
        record = {"layer": layer, "features": len(part)}
        record |= part["class"].value_counts(normalize=True).to_dict()
        born = dominant_module(part[part["class"] == "newborn"])
        record |= {f"born_{name}": float((born == name).sum() / len(part)) for name in MODULES[1:]}
        on = best[(best["layer"] == layer + 1) & (best["direction"] == "forward")]
        if layer + 1 in steps:
            record["dies"] = 1 - float((on["score"] > on["null"]).sum() / len(part))
        back = best[best["layer"] == layer]
        ahead = back[back["direction"] == "forward"]
        back = back[back["direction"] == "backward"]
        if len(back):
            counts = back["source"].value_counts()
            record |= {
                "mutual": float(back["mutual"].sum() / len(part)),
                "sources": len(counts) / max(len(ahead), 1),
                "largest_funnel": int(counts.iloc[0]),
            }
        records.append(record)
    found = pd.DataFrame(records)
    for name in CLASSES:  # one that no feature is of has no column yet
        found[name] = found[name].fillna(0.0) if name in found else 0.0
    return found
