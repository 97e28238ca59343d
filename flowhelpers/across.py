"""Several suites side by side: the flow and the groups of each by relative depth, in one table.

A suite is read alone, and what stays of it are tables: no two need to be in memory at a time. What
a suite lacks is missing in these tables, not zero.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from flowhelpers.across_groups import activity_profile, depth, group_profile, group_totals
from flowhelpers.features import MODULES, suggestion
from flowhelpers.lifespans import flow_by_layer, lifespans
from flowhelpers.matching import CLASSES, classify, scores
from flowhelpers.registry import SuiteRow, find_suite, registered

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.groups import Occurrences
    from flowhelpers.suites import Suite

T = TypeVar("T")
QUARTILES = {"low": 0.25, "median": 0.5, "high": 0.75}


@dataclass(frozen=True)
class Profile:
    """What stays of one suite, or of several.

    Attributes:
        across: One row a suite: as `summary` gives it, and of its occurrences their number, the
            share of each group under its name, and `chance` before the name for that by chance.
        by_layer: One row a suite and layer: as `flow_profile` gives it, and
            `across_groups.activity_profile`.
        groups: As `across_groups.group_profile` gives it; empty where no text was read.
        totals: As `across_groups.group_totals` gives it; empty where no text was read.
    """

    across: "pd.DataFrame"
    by_layer: "pd.DataFrame"
    groups: "pd.DataFrame"
    totals: "pd.DataFrame"


def chosen_suites(names: Sequence[str]) -> dict[str, SuiteRow]:
    """The rows of several suites, by the names or folders that were given for them.

    Raises:
        ValueError: If there is none, one is unknown, or two have the same name.
    """
    if isinstance(names, str) or not names:
        hint = suggestion(names, registered()) if names else f": {', '.join(registered())}"
        raise ValueError(f"suites {names!r}: expected a list of one or more{hint}")
    rows = {name: find_suite(name) for name in names}
    called = [find_suite(name).name for name in names]
    for name in called:
        if called.count(name) > 1:
            others = [each for each in registered() if each not in called]
            raise ValueError(
                f"suites {', '.join(map(str, names))}: {name} is there {called.count(name)} times;"
                f" expected each once, others are {', '.join(others)}"
            )
    return rows


def one_by_one(
    names: Sequence[str], look: "Callable[[Suite], T]", device: str = "auto"
) -> dict[str, T]:
    """What `look` says of each suite, by its name; each is let go before the next is loaded.

    Args:
        names: As for `chosen_suites`.
        look: Takes a loaded suite; what it returns should hold no part of it.
        device: Where suites are loaded.

    Raises:
        ValueError: As `chosen_suites` says, before anything is loaded.
    """
    from flowhelpers.suites import load_suite

    found = {}
    for given, row in chosen_suites(names).items():
        found[row.name] = look(load_suite(given, device))
        gc.collect()  # a suite may hold itself in a circle
    return found


def flow_profile(table: "pd.DataFrame", count: int) -> "pd.DataFrame":
    """How features are matched and what becomes of them, layer by layer.

    What cannot be said of a layer is missing: all of a module that has no dictionary there; the
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
        of this layer live.
    """
    import pandas as pd

    flow = flow_by_layer(table).set_index("layer")
    found = scores(table)
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
    columns["lives"] = lifespans(table).groupby("layer")["layers"].mean()
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
        `suite`, `layers`, `d_model`, `dictionaries` and `features` (of those that were matched),
        `parameters` (in all) and `model_parameters`; `mean_res`, `median_res`, `null_res` and
        `above_res` for each module (missing without one); the share of each class; `mean_life` in
        layers, `mutual_life` if every step has to be mutual, and `through`, the share of features
        that live from the first layer to the last.
    """
    layers = row.layers or 1 + int(table["layer"].max())
    found = scores(table)
    found = found[found["s_res"].notna()]
    kinds = classify(found)["class"].value_counts(normalize=True)
    spans = lifespans(table)
    first, last = spans["layer"].min(), spans["layer"].max()
    widths = _widths(table)
    record: dict[str, Any] = {"suite": row.name, "layers": layers, "d_model": d_model}
    record |= {"dictionaries": len(widths), "features": sum(widths.values())}
    record |= {"parameters": row.parameters, "model_parameters": row.model_parameters}
    is_there = {"res": True}
    for module in MODULES:
        score, null = (found.get(f"{c}_{module}", found["layer"] * np.nan) for c in ("s", "null"))
        is_there[module] = bool(score.notna().any())
        above = (score > null)[score.notna()]
        record |= {f"mean_{module}": score.mean(), f"median_{module}": score.median()}
        record |= {f"null_{module}": null.mean(), f"above_{module}": above.mean()}
    for name in CLASSES:
        seen = name in ("translated", "unexplained") or is_there["mlp"] or is_there["att"]
        record[name] = float(kinds.get(name, 0.0)) if seen else np.nan
    record["mean_life"] = spans["layers"].mean()
    record["mutual_life"] = lifespans(table, mutual=True)["layers"].mean()
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


def profile(
    suite: "Suite",
    table: "pd.DataFrame",
    found: "Occurrences | None" = None,
    base: "Occurrences | None" = None,
    times: int = 200,
    seed: int = 0,
) -> Profile:
    """All that is compared of one suite.

    Args:
        suite: The suite.
        table: Its match table.
        found: Its occurrences, layers that lack a site among them; None if it read no text.
        base: The same with predecessors elsewhere (`groups.elsewhere`).
        times: Resamples, for intervals.
        seed: Of these.

    Raises:
        ValueError: If one of the occurrences is given without the other.
    """
    import pandas as pd

    if (found is None) != (base is None):
        raise ValueError("occurrences: expected those found and those by chance, or neither")
    width = suite.dictionary(next(iter(suite.dictionaries))).directions.shape[1]
    record, by_layer = summary(suite.row, table, width), flow_profile(table, suite.layers)
    groups = totals = pd.DataFrame()
    if found is not None and base is not None:
        by_layer = by_layer.merge(activity_profile(found, base), "left", on="layer")
        groups = group_profile(found, base, suite.layers, times, seed)
        totals = group_totals(found, base, times, seed)
        record["occurrences"] = int(totals["n"].sum())
        record |= dict(zip(totals["group"].astype(str), totals["share"], strict=True))
        names = "chance " + totals["group"].astype(str)
        record |= dict(zip(names, totals["by_chance"], strict=True))
    by_layer.insert(0, "suite", suite.name)
    return Profile(pd.DataFrame([record]), by_layer, groups, totals)


def combined(profiles: Sequence[Profile]) -> Profile:
    """The tables of several suites in one, in the order given.

    Raises:
        ValueError: If there is none, or two are of suites of the same name.
    """
    import pandas as pd

    names = [name for each in profiles for name in each.across["suite"]]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"profiles of {', '.join(names) or 'nothing'}: expected each suite once")
    tables = {}
    for name in (field.name for field in fields(Profile)):
        parts = [table for each in profiles if len(table := getattr(each, name))]
        tables[name] = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return Profile(**tables)
