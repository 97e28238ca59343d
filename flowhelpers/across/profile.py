"""Several suites side by side: the flow and the groups of each by relative depth, in one table.

A suite is read alone, and what stays of it are tables: no two need to be in memory at a time. What
a suite lacks is missing in these tables, not zero.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from flowhelpers.across.flow_profile import flow_profile, summary
from flowhelpers.across.groups_profile import POOLED, activity_profile, group_profile, group_totals
from flowhelpers.core.features import suggestion
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.suites.registry import SuiteRow, find_suite, registered

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.groups.occurrences import Occurrences
    from flowhelpers.suites.load import Suite

T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """What stays of one suite, or of several.

    Attributes:
        across: One row a suite: as `across_flow.summary` gives it, and of its occurrences their
            number, the share of each group under its name, and `chance` before the name for that
            by chance.
        by_layer: One row a suite and layer: as `across_flow.flow_profile` gives it,
            `across_groups.activity_profile`, and the share of each group over all texts.
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
        there = suggestion(names if isinstance(names, str) else "", registered())
        raise ValueError(f"suites {names!r}: expected a list of one or more{there}")
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
    from flowhelpers.suites.load import load_suite

    found = {}
    for given, row in chosen_suites(names).items():
        found[row.name] = look(load_suite(given, device))
        gc.collect()  # a suite may hold itself in a circle
    return found


def suite_profile(
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
        ValueError: If one of the occurrences is given without the other, or they are of another
            suite.
    """
    import pandas as pd

    if (found is None) != (base is None):
        raise ValueError("occurrences: expected those found and those by chance, or neither")
    for each in (found, base):
        if each is not None and each.suite != suite.name:
            raise ValueError(f"occurrences of {each.suite}: expected those of {suite.name}")
    width = suite.sae(next(iter(suite.saes))).decoder.shape[1]
    record, by_layer = summary(suite.row, table, width), flow_profile(table, suite.layers)
    groups = totals = pd.DataFrame()
    if found is not None and base is not None:
        by_layer = by_layer.merge(activity_profile(found, base), "left", on="layer")
        groups = group_profile(found, base, suite.layers, times, seed)
        pooled = groups[groups["dataset"] == POOLED].astype({"group": str})
        wide = pooled.pivot(index="layer", columns="group", values="share")
        by_layer = by_layer.merge(wide[list(GROUPS)].reset_index(), "left", on="layer")
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


def alike(by_layer: "pd.DataFrame", columns: Sequence[str], points: int = 41) -> "pd.DataFrame":
    """How far the profiles of any two suites lie apart, and whether they go the same way.

    Profiles are compared at evenly spread relative depths that both reach, on the straight lines
    between their layers.

    Args:
        by_layer: One row a suite and layer, with `suite`, `depth` and the columns.
        columns: What is compared.
        points: How many depths.

    Returns:
        One row a pair of suites and column: `first`, `second`, `column`, `apart` (the mean absolute
        difference) and `correlation` over the depths, missing where one of them does not change.
        No row where one of the suites lacks the column at all but one of its layers.

    Raises:
        ValueError: If there is no such column; the message names the nearest.
    """
    import pandas as pd

    for column in columns:
        if column not in by_layer:
            raise ValueError(f"unknown column {column!r}{suggestion(column, by_layer.columns)}")
    records = []
    for column in columns:
        known = by_layer.dropna(subset=[column]).sort_values("depth")
        lines = {name: part for name, part in known.groupby("suite", sort=False) if len(part) > 1}
        for first, second in combinations(dict.fromkeys(by_layer["suite"]), 2):
            if not {first, second} <= set(lines):
                continue
            a, b = lines[first], lines[second]
            ends = max(a["depth"].min(), b["depth"].min()), min(a["depth"].max(), b["depth"].max())
            at = np.linspace(*ends, points)
            one, two = (np.interp(at, part["depth"], part[column]) for part in (a, b))
            still = min(np.ptp(one), np.ptp(two)) < 1e-12
            way = np.nan if still else float(np.corrcoef(one, two)[0, 1])
            records.append((first, second, column, float(np.abs(one - two).mean()), way))
    return pd.DataFrame(records, columns=["first", "second", "column", "apart", "correlation"])
