"""The whole model's flow: how long its features live, where they are born, where they meet."""

from typing import TYPE_CHECKING, Literal

import numpy as np

from flowhelpers.core.features import MODULES
from flowhelpers.matching.scores import (
    CLASSES,
    best_matches,
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
    """How long every residual feature lives: the run of layers joined by matches with high scores.

    As in a flow graph, a step backward goes to the feature's best match, a step forward to the
    feature of the next layer that it matches best. A score is high from `t_res` on, or by default
    above the null's quantile. With `mutual`, a step must be the best match of both features.

    Returns:
        One row a feature: `layer`, `feature`, `first` and `last` layer of its run, and `layers`,
        their number. A run ends where the table does.
    """
    import pandas as pd

    check_threshold(0.0 if t_res is None else t_res, "t_res")
    first = {layer: np.full(width, layer) for layer, width in _widths(table).items()}
    last = {layer: layers.copy() for layer, layers in first.items()}
    steps = {}
    for direction in ("backward", "forward"):
        best = _best(table, direction)
        high = best["score"] > best["null"] if t_res is None else best["score"] >= t_res
        steps[direction] = best[high & (best["mutual"] | (not mutual))].groupby("layer")
    for layer, step in steps["backward"]:
        first[layer][step["feature"]] = first[layer - 1][step["source"]]
    for layer, step in reversed([*steps["forward"]]):
        last[layer - 1][step["source"]] = last[layer][step["feature"]]
    spans = {layer: pd.DataFrame({"first": first[layer], "last": last[layer]}) for layer in first}
    lifespans = pd.concat(spans, names=["layer", "feature"]).reset_index()
    return lifespans.assign(layers=lifespans["last"] - lifespans["first"] + 1)


def flow_by_layer(table: "pd.DataFrame") -> "pd.DataFrame":
    """How many features are passed on, born and lost at each layer of the model.

    Returns:
        One row a layer: `features`; the share of each class of the paper's 3.3; `born_mlp` and
        `born_att`, the share that is newborn by that module; `dies`, the share without a forward
        match above chance (missing if the table has no next layer); `mutual`, the share whose best
        backward match is mutual; `sources`, the share of features of the layer before (those that
        choose a forward match) that are some feature's best match; and `largest_funnel`, the most
        features that share one best match.
    """
    import pandas as pd

    widths = pd.Series(_widths(table)).rename_axis("layer")
    classes = classify(feature_scores(table))
    newborn = classes[classes["class"] == "newborn"]
    births = newborn.assign(**{"class": "born_" + dominant_module(newborn)})
    counts = pd.concat([classes, births])[["layer", "class"]].value_counts().unstack()
    columns = [*CLASSES, *(f"born_{module}" for module in MODULES[1:])]
    shares = counts.reindex(widths.index, columns=columns).fillna(0.0).div(widths, axis=0)
    back, on = _best(table, "backward").groupby("layer"), _best(table, "forward")
    went_on = (on["score"] > on["null"]).groupby(on["layer"] - 1).sum()
    has_next = table.loc[table["module"] == "res", "layer"].unique() - 1
    shares = shares.assign(
        dies=1 - went_on.reindex(has_next, fill_value=0) / widths,
        mutual=back["mutual"].sum() / widths,
        sources=back["source"].nunique() / on.groupby("layer").size(),
        largest_funnel=back["source"].value_counts().groupby("layer").max(),
    )
    shares.insert(0, "features", widths)
    return shares.rename_axis(columns=None).reset_index()


def funnels(table: "pd.DataFrame") -> "pd.DataFrame":
    """The residual features that are best backward matches, and of how many `features`.

    `score` is the mean over these, `above` the number of them whose match is above chance.
    """
    best = _best(table, "backward")
    sources = best.assign(high=best["score"] > best["null"]).groupby(["source_layer", "source"])
    sizes = sources.agg(features=("high", "size"), score=("score", "mean"), above=("high", "sum"))
    return sizes.sort_values(["features", "score"], ascending=False).reset_index()


def _best(table: "pd.DataFrame", direction: Literal["backward", "forward"]) -> "pd.DataFrame":
    """The best matches in the stream."""
    best = best_matches(table, direction, "res")
    return best[(best["source"] >= 0) & (best["feature"] >= 0)]


def _widths(table: "pd.DataFrame") -> dict[int, int]:
    """By layer, how many features each residual SAE has that the table names on either side."""
    targets = table.groupby("layer")["feature"].max()
    sources = table[table["module"] == "res"].groupby("source_layer")["source"].max()
    return (targets.combine_first(sources).sort_index() + 1).astype(int).to_dict()
