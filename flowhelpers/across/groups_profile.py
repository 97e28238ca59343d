"""The groups of several suites by relative depth: shares beside chance, and what scores tell."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.across.flow_profile import depth
from flowhelpers.core.features import MODULES
from flowhelpers.groups.intervals import share_intervals
from flowhelpers.groups.occurrences import Occurrences, group_shares, modules_of

if TYPE_CHECKING:
    import pandas as pd

POOLED = "all texts"  # beside the datasets


def fullest_suite(found: Occurrences) -> Occurrences:
    """The occurrences at the layers that have most of the places that a feature may come from.

    Of a suite that has SAEs at all three sites these are the layers after the first; of one
    without attention, those with a stream before and an MLP.
    """
    places = found.table[[f"s_{module}" for module in MODULES]].notna().sum(axis=1)
    return replace(found, table=found.table[places == places.max()])


def group_profile(
    found: Occurrences, base: Occurrences, count: int, times: int = 200, seed: int = 0
) -> "pd.DataFrame":
    """The share of every group by layer, beside that by chance (Figures 5, 18 and 19 b).

    Args:
        found: Occurrences, layers that lack a site among them if wanted.
        base: The same with predecessors elsewhere (`groups.elsewhere`).
        count: Layers of the model.
        times: Resamples, for intervals.
        seed: Of these.

    Returns:
        `suite`, `method`, `dataset` (`all texts` for all together), `layer`, `depth`, `group`, `n`,
        `share`, `low`, `high` and `by_chance`; a group that a layer's SAEs do not allow is
        missing, one that is only empty has the share 0.
    """
    import pandas as pd

    single = _with_chance(found, base, ["dataset", "layer"], times, seed)
    pooled = _with_chance(found, base, ["layer"], times, seed).assign(dataset=POOLED)
    table = pd.concat([single.assign(dataset=single["dataset"].astype(str)), pooled])
    table.insert(0, "suite", found.suite)
    table.insert(1, "method", found.method)
    table.insert(4, "depth", depth(table["layer"], count))
    return table.reset_index(drop=True)


def group_totals(
    found: Occurrences, base: Occurrences, times: int = 200, seed: int = 0
) -> "pd.DataFrame":
    """The share of every group over the `fullest` layers, beside that by chance (Figure 19 a).

    Args:
        found: Occurrences.
        base: The same with predecessors elsewhere.
        times: Resamples, for intervals.
        seed: Of these.

    Returns:
        `suite`, `method`, `places` (such as `res+mlp`), `group`, `n`, `share`, `low`, `high` and
        `by_chance`; missing for groups that the places do not allow.
    """
    whole = fullest_suite(found)
    there = [m for m in MODULES if whole.table[f"s_{m}"].notna().any()]
    ours, theirs = (replace(o, table=o.table.assign(layer=0)) for o in (whole, fullest_suite(base)))
    table = _with_chance(ours, theirs, ["layer"], times, seed).drop(columns="layer")
    table.insert(0, "suite", found.suite)
    table.insert(1, "method", found.method)
    table.insert(2, "places", "+".join(there))
    return table


def _with_chance(
    found: Occurrences, base: Occurrences, by: list[str], times: int, seed: int
) -> "pd.DataFrame":
    shares = share_intervals(found, by, times, seed).drop(columns=["features", "unique_share"])
    chance = group_shares(base, by)[[*by, "group", "share"]].rename(columns={"share": "by_chance"})
    table = shares.merge(chance, "left", on=[*by, "group"])
    # A group that there may be and is not has the share 0; one that cannot be has none.
    counts = table["n"].groupby([table[column] for column in by], observed=True).transform("sum")
    there = found.table[[f"s_{m}" for m in MODULES]].notna().groupby(found.table["layer"]).any()
    able = [
        all(there.at[layer, f"s_{module}"] for module in modules_of(group))
        for layer, group in zip(table["layer"], table["group"], strict=True)
    ]
    empty = (counts > 0) & np.array(able)
    for column in ("share", "by_chance"):
        table[column] = table[column].where(table[column].notna() | ~empty, 0.0)
    return table


def activity_profile(found: Occurrences, base: Occurrences) -> "pd.DataFrame":
    """How often predecessors are active, by layer, and whether scores tell which.

    Args:
        found: Occurrences.
        base: The same with predecessors elsewhere.

    Returns:
        One row a layer: `layer`; for each module `active_res`, the share of occurrences with an
        active predecessor there, `chance_res`, the same elsewhere, and `tells_res`, the chance that
        of an occurrence with an active predecessor and one without the first has the higher score
        (0.5: the score tells nothing); missing without the module, the last also where all are
        active or none.
    """
    import pandas as pd

    records = []
    elsewhere = {layer: part for layer, part in base.table.groupby("layer")}
    for layer, part in found.table.groupby("layer"):
        record: dict[str, Any] = {"layer": int(layer)}
        for module in MODULES:
            score, active = part[f"s_{module}"], part[module].to_numpy()
            is_there = bool(score.notna().any())
            record[f"active_{module}"] = active.mean() if is_there else np.nan
            chance = elsewhere[layer][module].mean() if layer in elsewhere else np.nan
            record[f"chance_{module}"] = chance if is_there else np.nan
            pairs = int(active.sum()) * int((~active).sum())
            above = score.rank()[active].sum() - active.sum() * (active.sum() + 1) / 2
            record[f"tells_{module}"] = above / pairs if is_there and pairs else np.nan
        records.append(record)
    return pd.DataFrame(records)
