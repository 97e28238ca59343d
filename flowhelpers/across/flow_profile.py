"""The matches and the flow of one suite, by relative depth and as a whole.

What a suite lacks is missing in these tables, not zero.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.core.features import MODULES
from flowhelpers.flow.lifespans import feature_lifespans, flow_by_layer
from flowhelpers.matching.scores import CLASSES, classify, feature_scores
from flowhelpers.suites.registry import SuiteRow

if TYPE_CHECKING:
    import pandas as pd

QUARTILES = {"low": 0.25, "median": 0.5, "high": 0.75}


def depth(layers: "pd.Series | np.ndarray", count: int) -> Any:
    """Relative depth of layers in a model of so many: 0 is the first, 1 the last."""
    return layers / max(count - 1, 1)


def flow_profile(table: "pd.DataFrame", count: int) -> "pd.DataFrame":
    """How features are matched and what becomes of them, layer by layer.

    What cannot be said of a layer is missing: all of a module that has no SAE there; the
    classes where there is no stream before, as at layer 0 (CHOICES 5); births and `processed` where
    there is no module, for then neither can be seen.

    Args:
        table: A match table.
        count: Layers of the model.

    Returns:
        One row a layer: `layer`, its relative `depth`, `features`, `places` (where predecessors
        were looked for, such as `res+mlp`); for each module the quartiles `low_res`, `median_res`
        and `high_res` of the scores, their mean `s_res`, `null_res` and `above_res`, the share
        above it; `translated` … `unexplained`, `born_mlp`, `born_att`, `dies` and `mutual` as
        `lifespans.flow_by_layer` gives them; and `lives`, the mean number of layers that features
        of this layer live, with `life`, the same as a share of the model's.
    """
    import pandas as pd

    flow = flow_by_layer(table).set_index("layer")
    found = feature_scores(table)
    columns: dict[str, Any] = {"depth": depth(flow.index.to_series(), count)}
    columns["features"] = flow["features"]
    there = {}
    for module in MODULES:
        score, null = (found.get(f"{c}_{module}", found["layer"] * np.nan) for c in ("s", "null"))
        by = score.groupby(found["layer"])
        columns |= {f"{name}_{module}": by.quantile(q) for name, q in QUARTILES.items()}
        columns[f"s_{module}"] = by.mean()
        columns[f"null_{module}"] = null.groupby(found["layer"]).first()
        above = (score > null).where(score.notna()).astype(float)
        columns[f"above_{module}"] = above.groupby(found["layer"]).mean()
        there[module] = by.count().reindex(flow.index, fill_value=0) > 0
    for name in (*CLASSES, "born_mlp", "born_att", "dies", "mutual"):
        columns[name] = flow.get(name, flow["features"] * np.nan).where(_can_be(name, there))
    columns["lives"] = feature_lifespans(table).groupby("layer")["layers"].mean()
    columns["life"] = columns["lives"] / count
    profile = pd.DataFrame(columns, index=flow.index)
    rows = zip(*(there[module] for module in MODULES), strict=True)
    places = ["+".join(m for m, is_there in zip(MODULES, r, strict=True) if is_there) for r in rows]
    profile.insert(2, "places", places)
    return profile.reset_index()


def _can_be(name: str, there: "Mapping[str, pd.Series]") -> "pd.Series":
    if name == "dies":
        return there["res"] | True
    if name.startswith("born"):
        return there["res"] & there[name.removeprefix("born_")]
    modules = there["mlp"] | there["att"]
    return there["res"] & modules if name in ("processed", "newborn") else there["res"]


def summary(row: SuiteRow, table: "pd.DataFrame", d_model: int) -> dict[str, Any]:
    """One suite in numbers, over all its features that have a stream before them.

    Args:
        row: The suite.
        table: Its match table.
        d_model: Width of the stream.

    Returns:
        `suite`, `layers`, `d_model`, `saes` and `features` (of those that were matched),
        `parameters` (in all) and `model_parameters`; `mean_res`, `median_res`, `null_res` and
        `above_res` for each module (missing without one); the `places` where predecessors were
        looked for, such as `res+mlp`; the share of each class; `mean_life` in
        layers, `mutual_life` if every step has to be mutual, and `through`, the share of features
        that live from the first layer to the last.
    """
    layers = row.layers or 1 + int(table["layer"].max())
    found = feature_scores(table)
    found = found[found["s_res"].notna()]
    kinds = classify(found)["class"].value_counts(normalize=True)
    spans = feature_lifespans(table)
    first, last = spans["layer"].min(), spans["layer"].max()
    widths = _widths(table)
    record: dict[str, Any] = {"suite": row.name, "layers": layers, "d_model": d_model}
    record |= {"saes": len(widths), "features": sum(widths.values())}
    record |= {"parameters": row.parameters, "model_parameters": row.model_parameters}
    is_there = {"res": True}
    for module in MODULES:
        score, null = (found.get(f"{c}_{module}", found["layer"] * np.nan) for c in ("s", "null"))
        is_there[module] = bool(score.notna().any())
        above = (score > null)[score.notna()]
        record |= {f"mean_{module}": score.mean(), f"median_{module}": score.median()}
        record |= {f"null_{module}": null.mean(), f"above_{module}": above.mean()}
    record["places"] = "+".join(module for module in MODULES if is_there[module])
    for name in CLASSES:
        seen = name in ("translated", "unexplained") or is_there["mlp"] or is_there["att"]
        record[name] = float(kinds.get(name, 0.0)) if seen else np.nan
    record["mean_life"] = spans["layers"].mean()
    record["mutual_life"] = feature_lifespans(table, mutual=True)["layers"].mean()
    record["through"] = ((spans["first"] == first) & (spans["last"] == last)).mean()
    return record


def _widths(table: "pd.DataFrame") -> dict[tuple[int, str], int]:
    best = table[table["rank"] == 1].assign(module=table["module"].astype(str))
    back, on = (best[best["direction"] == side] for side in ("backward", "forward"))
    found = {
        (int(layer), "res"): part["feature"].nunique() for layer, part in back.groupby("layer")
    }
    sources = on.groupby(["source_layer", "module"])["source"].nunique()
    return found | {(int(layer), module): int(n) for (layer, module), n in sources.items()}
