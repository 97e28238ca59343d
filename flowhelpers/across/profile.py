"""Several suites side by side: the flow and the groups of each by relative depth, in one table.

A suite is read alone, and what stays of it are tables: no two need to be in memory at a time. What
a suite lacks is missing in these tables, not zero.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from flowhelpers.core.features import MODULES, suggestion
from flowhelpers.flow.lifespans import feature_lifespans, flow_by_layer
from flowhelpers.groups.occurrences import GROUPS, SCORES, Occurrences, complete_layers, modules_of
from flowhelpers.groups.shares import group_shares, share_intervals, single_source_points
from flowhelpers.groups.significance import activity_auc
from flowhelpers.matching.scores import CLASSES, best_matches, classify, feature_scores
from flowhelpers.suites.registry import SuiteRow, find_suite, registered

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

T = TypeVar("T")

POOLED = "all texts"  # beside the datasets
BY_MODULE = ("processed", "newborn", "born_mlp", "born_att")  # not to be seen without a module


@dataclass(frozen=True)
class Profile:
    """What stays of one suite, or of several; what cannot be said of a suite or layer is missing.

    Attributes:
        across: One row a suite, over all features that have a stream before them: its size, mean,
            median, null and share above it of each score, `places` of predecessors (`res+mlp`),
            classes, `mean_life` in layers, `mutual_life` by mutual steps alone, `through`, the
            share of features that live from the first layer to the last; with texts, each group
            and, after `chance`, the same by chance.
        by_layer: One row a suite and layer: relative `depth`; of each score the quartiles
            `low_res`, `median_res`, `high_res`, mean `s_res`, `null_res` and `above_res`; what
            `flow_by_layer` has; `lives`, how many layers its features live, `life` as a share of
            all. With texts `active_res`, how often a predecessor is active there, `chance_res`, by
            chance, `tells_res`, the AUC of the score for it, and each group.
        groups: As `group_profile` gives it; empty where no text was read.
        totals: The same over all complete layers, with their `places`: those that have most of the
            places that a feature may come from. By dataset it is Figure 19 a.
    """

    across: "pd.DataFrame"
    by_layer: "pd.DataFrame"
    groups: "pd.DataFrame"
    totals: "pd.DataFrame"


def chosen_suites(names: Sequence[str]) -> dict[str, SuiteRow]:
    """The rows of the suites named; a ValueError for an unknown or repeated name, or for none."""
    if isinstance(names, str) or not names:
        valid = suggestion(names if isinstance(names, str) else "", registered())
        raise ValueError(f"suites {names!r}: expected a list of one or more{valid}")
    rows = {name: find_suite(name) for name in names}
    known = [find_suite(name).name for name in names]
    if twice := {name for name in known if known.count(name) > 1}:
        raise ValueError(
            f"suites {', '.join(known)}: expected {', '.join(twice)} once, as suite or among others"
        )
    return rows


def one_by_one(
    names: Sequence[str], look: "Callable[[Suite], T]", device: str = "auto", dtype: str = "auto"
) -> dict[str, T]:
    """What `look` returns for each suite, loaded one at a time; it must not refer to the suite."""
    from flowhelpers.suites.load import load_suite

    seen = {}
    for given, row in chosen_suites(names).items():
        seen[row.name] = look(load_suite(given, device, dtype))
        gc.collect()  # a suite may hold itself in a circle
    return seen


def suite_profile(
    suite: "Suite",
    table: "pd.DataFrame",
    found: Occurrences | None = None,
    base: Occurrences | None = None,
    times: int = 200,
    seed: int = 0,
) -> Profile:
    """The profile of one suite, from its match table and its occurrences.

    `found` includes `incomplete` layers; it is None if the suite read no text. `base` is the same
    with predecessors at other tokens (`shuffled_tokens`). Intervals are from `times` resamples.
    Raises a ValueError if the occurrences are of another suite.
    """
    import pandas as pd

    if found is not None and found.suite != suite.name:
        raise ValueError(f"occurrences of {found.suite}: expected those of {suite.name}")
    scores, spans = feature_scores(table), feature_lifespans(table)
    d_model = suite.sae(next(iter(suite.saes))).decoder.shape[1]
    record: dict[str, Any] = {"suite": suite.name, "layers": suite.layers, "d_model": d_model}
    sizes = {name: getattr(suite.row, name) for name in ("parameters", "model_parameters")}
    record |= sizes | _summary(table, scores, spans)
    by_layer = _flow_profile(table, scores, spans, suite.layers)
    groups = totals = pd.DataFrame()
    if found is not None and base is not None:
        groups = group_profile(found, base, suite.layers, times, seed)
        pooled = groups[groups["dataset"] == POOLED].astype({"group": str})
        wide = pooled.pivot(index="layer", columns="group", values="share")
        by_layer = by_layer.join(_activity(found, base)).join(wide[list(GROUPS)])
        totals = _group_totals(found, base, times, seed)
        shares = totals[totals["dataset"] == POOLED].astype({"group": str}).set_index("group")
        record["occurrences"] = int(shares["n"].sum())
        record |= shares["share"].to_dict() | shares["by_chance"].add_prefix("chance ").to_dict()
    by_layer = by_layer.reset_index()
    by_layer.insert(0, "suite", suite.name)
    return Profile(pd.DataFrame([record]), by_layer, groups, totals)


def combined(profiles: Sequence[Profile]) -> Profile:
    """The tables of several suites in one, in the order given."""
    import pandas as pd

    tables = []
    for field in fields(Profile):
        parts = [table for profile in profiles if len(table := getattr(profile, field.name))]
        tables.append(pd.concat(parts, ignore_index=True) if parts else pd.DataFrame())
    return Profile(*tables)


def depth(layers: Any, count: int) -> Any:
    """Relative depth of layers in a model of so many: 0 is the first, 1 the last."""
    return layers / max(count - 1, 1)


def _flow_profile(
    table: "pd.DataFrame", scores: "pd.DataFrame", spans: "pd.DataFrame", count: int
) -> "pd.DataFrame":
    """How features are matched and what becomes of them, by layer.

    Classes are missing where there is no stream before, as at layer 0 (CHOICES 5).
    """
    flow = flow_by_layer(table).set_index("layer")
    matched = _score_columns(scores).reindex(flow.index)
    known = matched[[f"median_{module}" for module in MODULES]].notna().set_axis([*MODULES], axis=1)
    profile = flow[["features", *CLASSES, *BY_MODULE[2:], "dies", "mutual"]].copy()
    profile.insert(0, "depth", depth(flow.index.to_series(), count))
    places = ["+".join(known.columns[row]) for row in known.to_numpy()]
    by_module = {name: known[["mlp", "att"]].any(axis=1) for name in BY_MODULE[:2]}
    by_module |= {f"born_{module}": known[module] for module in ("mlp", "att")}
    for name in (*CLASSES, *BY_MODULE[2:], "mutual"):
        profile[name] = profile[name].where(known["res"] & by_module.get(name, True))
    lives = spans.groupby("layer")["layers"].mean()
    return profile.assign(places=places, lives=lives, life=lives / count).join(matched)


def _score_columns(scores: "pd.DataFrame") -> "pd.DataFrame":
    """Quartiles, mean, null and share above it of each module's scores, by layer."""
    import pandas as pd

    layer = scores["layer"]
    columns = {}
    for module in MODULES:
        score, null = (scores.get(f"{name}_{module}", layer * np.nan) for name in ("s", "null"))
        for name, q in (("low", 0.25), ("median", 0.5), ("high", 0.75)):
            columns[f"{name}_{module}"] = score.groupby(layer).quantile(q)
        above = (score > null).where(score.notna()).astype(float)
        for name, values in (("s", score), ("null", null), ("above", above)):
            columns[f"{name}_{module}"] = values.groupby(layer).mean()
    return pd.DataFrame(columns)


def _summary(
    table: "pd.DataFrame", scores: "pd.DataFrame", spans: "pd.DataFrame"
) -> dict[str, Any]:
    """One suite in numbers, from its match table."""
    scores = scores[scores["s_res"].notna()]
    whole = _score_columns(scores.assign(layer=0)).iloc[0]
    back, on = best_matches(table), best_matches(table, "forward").astype({"module": str})
    widths = {(layer, "res"): part["feature"].nunique() for layer, part in back.groupby("layer")}
    widths |= on.groupby(["source_layer", "module"])["source"].nunique().to_dict()
    record: dict[str, Any] = {"saes": len(widths), "features": int(sum(widths.values()))}
    for module in MODULES:
        record[f"mean_{module}"] = whole[f"s_{module}"]
        record |= whole[[f"{name}_{module}" for name in ("median", "null", "above")]].to_dict()
    known = [module for module in MODULES if whole.notna()[f"median_{module}"]]
    record["places"] = "+".join(known)
    shares = classify(scores)["class"].value_counts(normalize=True)
    for name in CLASSES:
        possible = name not in BY_MODULE or known != ["res"]
        record[name] = float(shares.get(name, 0.0)) if possible else np.nan
    record["mean_life"] = spans["layers"].mean()
    record["mutual_life"] = feature_lifespans(table, mutual=True)["layers"].mean()
    through = (spans["first"] == spans["layer"].min()) & (spans["last"] == spans["layer"].max())
    return record | {"through": through.mean()}


def group_profile(
    found: Occurrences, base: Occurrences, count: int, times: int = 200, seed: int = 0
) -> "pd.DataFrame":
    """The share of every group by layer, and its share by chance (Figures 5, 18 and 19 b).

    A group that is impossible with a layer's SAEs is missing; one that is possible but empty has
    the share 0. The dataset `all texts` pools all datasets.
    """
    import pandas as pd

    single = _with_chance(found, base, ["dataset", "layer"], times, seed)
    pooled = _with_chance(found, base, ["layer"], times, seed).assign(dataset=POOLED)
    table = pd.concat([single.astype({"dataset": str}), pooled], ignore_index=True)
    return table.assign(depth=depth(table["layer"], count))


def _group_totals(found: Occurrences, base: Occurrences, times: int, seed: int) -> "pd.DataFrame":
    """The share of every group over all complete layers, beside that by chance."""
    import pandas as pd

    def whole(some: Occurrences) -> Occurrences:
        places = some.table[[*SCORES]].notna().sum(axis=1)
        return replace(some, table=some.table[places == places.max()].assign(layer=0))

    ours, other = whole(found), whole(base)
    known = [m for m in MODULES if ours.table[f"s_{m}"].notna().any()]
    pooled = _with_chance(ours, other, ["layer"], times, seed).assign(dataset=POOLED)
    single = _with_chance(ours, other, ["dataset", "layer"], times, seed)
    table = pd.concat([pooled, single.astype({"dataset": str})], ignore_index=True)
    return table.drop(columns="layer").assign(places="+".join(known))


def score_points(found: Occurrences, count: int, seed: int = 0) -> "pd.DataFrame":
    """Figure 19 d: scores of features at an eighth, a half and seven eighths of `count` layers.

    Of Llama's 32 layers these are the paper's 4, 16 and 28. Columns are `suite` and those of
    `single_source_points`; there is no row if a suite lacks a site at these layers.
    """
    import pandas as pd

    known = complete_layers(found.table)["layer"].unique()
    layers = sorted({round(count * eighths / 8) for eighths in (1, 4, 7)} & {*known})
    points = single_source_points(found, layers, seed=seed) if layers else pd.DataFrame()
    return points.assign(suite=found.suite)


def _with_chance(
    found: Occurrences, base: Occurrences, by: list[str], times: int, seed: int
) -> "pd.DataFrame":
    shares = share_intervals(found, by, times, seed).drop(columns=["features", "unique_share"])
    chance = group_shares(base, by)[[*by, "group", "share"]].rename(columns={"share": "by_chance"})
    table = shares.merge(chance, "left", on=[*by, "group"])
    # A group that there may be and is not has the share 0; one that cannot be has none.
    known = found.table.groupby("layer")[[*SCORES]].count() > 0
    places = zip(table["layer"], table["group"], strict=True)
    possible = [all(known.at[at, f"s_{m}"] for m in modules_of(group)) for at, group in places]
    empty = (table.groupby(by, observed=True)["n"].transform("sum") > 0) & np.array(possible)
    for column in ("share", "by_chance"):
        table[column] = table[column].where(table[column].notna() | ~empty, 0.0)
    return table.assign(suite=found.suite, method=found.method)


def _activity(found: Occurrences, base: Occurrences) -> "pd.DataFrame":
    """How often predecessors are active, by layer, and whether scores tell which."""
    import pandas as pd

    layers = found.table.groupby("layer")
    known = layers[[*SCORES]].count().set_axis([*MODULES], axis=1) > 0
    active = layers[[*MODULES]].mean().where(known).add_prefix("active_")
    chance = base.table.groupby("layer")[[*MODULES]].mean().where(known).add_prefix("chance_")
    tells = {f"tells_{m}": layers[[m, f"s_{m}"]].apply(activity_auc, m) for m in MODULES}
    return active.join(chance).join(pd.DataFrame(tells))


def alike(by_layer: "pd.DataFrame", columns: Sequence[str], points: int = 41) -> "pd.DataFrame":
    """How far the profiles of any two suites lie apart, and how they correlate.

    Profiles are interpolated at evenly spaced relative depths that both reach. `apart` is the mean
    absolute difference; `correlation` is missing if one of them is constant. There is no row if a
    suite has the column at fewer than two layers.
    """
    import pandas as pd

    records = []
    for column in columns:
        known = by_layer.dropna(subset=[column]).sort_values("depth")
        lines = {name: part for name, part in known.groupby("suite", sort=False) if len(part) > 1}
        for first, second in combinations(by_layer["suite"].unique(), 2):
            if first not in lines or second not in lines:
                continue
            pair = [lines[suite][["depth", column]].to_numpy(float).T for suite in (first, second)]
            start, end = max(at[0] for at, _ in pair), min(at[-1] for at, _ in pair)
            a, b = (np.interp(np.linspace(start, end, points), *line) for line in pair)
            still = min(np.ptp(a), np.ptp(b)) < 1e-12
            correlation = np.nan if still else float(np.corrcoef(a, b)[0, 1])
            records.append((first, second, column, float(np.abs(a - b).mean()), correlation))
    return pd.DataFrame(records, columns=["first", "second", "column", "apart", "correlation"])
