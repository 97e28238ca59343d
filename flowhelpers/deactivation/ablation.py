"""Ablating predecessors, and what is left of their targets (paper 5.2, A.2).

A case removes or rescales some of a target's predecessors at the target's token, all in one
forward pass. `targets`, `sources` and `predecessors` are tables of `targets.py`, `cases` and
`edits` those of `ablation_cases`; `tokens` are the texts of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.bootstrap import TIMES, mean_intervals
from flowhelpers.core.features import MODULES, Site, predecessor_site
from flowhelpers.deactivation.targets import active_predecessors, every_active, groups_of
from flowhelpers.groups.occurrences import GROUPS, modules_of
from flowhelpers.interventions.batched import intervene
from flowhelpers.matching.scores import best_matches

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.model import Tokens

OFF = "Deactivated"
ROWS_AT_ONCE = 16384
READS = ["case", "layer", "module", "feature"]


def ablation_cases(
    targets: pd.DataFrame,
    predecessors: pd.DataFrame,
    r: Sequence[float] = (0.0,),
    subsets: bool = False,
    activation: Literal["clean", "live"] = "clean",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cases that rescale a target's predecessors; with `subsets` those of every set of sites.

    A factor `r` of 0 removes (Figures 8 and 15 b). The activation that is rescaled is that of the
    clean run, or the live one, after the edits at earlier sites (CHOICES 9).

    Returns:
        Cases: `target`, `group`, `removed` (the group of the edited sites), `r`. Edits: `case`,
        `module`, `feature`, and `amount`, or `r` if live.
    """
    import pandas as pd

    if not len(r) or not np.isfinite(r).all() or len(set(r)) < len(r):
        raise ValueError(f"r={list(r)}: expected one or more finite numbers, each once")
    if predecessors.empty:
        raise ValueError("no target has an active predecessor: there is nothing to remove")
    plans = [
        (group, removed, factor)
        for group in GROUPS[1:]
        for removed in GROUPS[1:]
        if removed == group or (subsets and {*modules_of(removed)} < {*modules_of(group)})
        for factor in r
    ]
    plan = pd.DataFrame(plans, columns=["group", "removed", "r"])
    cases = groups_of(targets, predecessors).rename_axis("target").astype(str).reset_index()
    cases = cases.merge(plan, on="group").sort_values("target", kind="stable", ignore_index=True)
    edits = cases.assign(case=cases.index, module=cases["removed"].map(modules_of))
    edits = edits.explode("module").merge(predecessors, on=["target", "module"])
    edits = edits.assign(amount=(edits["r"] - 1) * edits["activation"])
    size = "amount" if activation == "clean" else "r"
    return cases, edits[["case", "module", "feature", size]]


def concat_methods(
    parts: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cases and edits of several methods as one table each; cases bear their `method`."""
    import pandas as pd

    cases = [cases.assign(method=method) for method, (cases, _) in parts.items()]
    starts = np.cumsum([0, *map(len, cases)])
    edits = zip((edits for _, edits in parts.values()), starts, strict=False)
    moved = [table.assign(case=table["case"] + start) for table, start in edits]
    return pd.concat(cases, ignore_index=True), pd.concat(moved, ignore_index=True)


def deactivate(
    suite: Suite,
    tokens: Tokens,
    targets: pd.DataFrame,
    cases: pd.DataFrame,
    edits: pd.DataFrame,
    sources: pd.DataFrame | None = None,
    loss: bool = False,
) -> pd.DataFrame:
    """What is left of each target after its case's edits, all in one forward pass (paper A.2).

    Returns:
        The cases with `layer`, `feature`, `dataset` and `text` of their targets; `old` and `new`
        activation; `change`, 1 - new / old; `success`, 1 where it is off; both missing for a target
        that is not active. `linear` is the share of the activation that the edits themselves write
        away, a · v · w_enc / old, before the layer responds; missing for live activations, and
        where more lies between (SAEs that read z, normalise their input, or are gated). `after` is
        the group afterwards, given `sources`, or "Deactivated"; with `loss`, `loss_change` and
        `token_loss_change` are relative, of the text and of the token alone (CHOICES 12).
    """
    import pandas as pd

    cases = cases.reset_index(drop=True)
    chosen = targets.loc[cases["target"]].reset_index(drop=True)
    reads = chosen.assign(case=chosen.index, module="res")[READS]
    predecessors = None
    if sources is not None:
        predecessors = cases[["target"]].reset_index(names="case").merge(sources, on="target")
        is_res = predecessors["module"] == "res"
        layer = chosen["layer"].to_numpy()[predecessors["case"]] - is_res
        reads = pd.concat([reads, predecessors.assign(layer=layer)[READS]])
    read, losses = intervene(suite, tokens, chosen, edits, reads, loss)
    about = chosen[["layer", "feature", "dataset", "text"]]
    table = _with_change(cases.join(about).join(read[["old", "new"]]))
    table["linear"] = _written(suite, chosen, edits) / table["old"].where(table["old"] > 0)
    if predecessors is not None:
        is_active = read["new"].to_numpy()[len(cases) :] > 0
        active = predecessors.assign(target=predecessors["case"])[is_active]
        table["after"] = groups_of(cases, active).cat.add_categories([OFF])
        table.loc[table["new"] <= 0, "after"] = OFF
        table.loc[table["old"] <= 0, "after"] = None
    if losses is not None:
        for name in ("loss", "token_loss"):
            before, after = losses[f"{name}_before"], losses[f"{name}_after"]
            table[f"{name}_change"] = (after - before) / before
    return table


def _with_change(table: pd.DataFrame) -> pd.DataFrame:
    known = table["old"].where(table["old"] > 0)
    success = (table["new"] == 0).astype(float).where(known.notna())
    return table.assign(change=1 - (table["new"] / known).astype(float), success=success)


def _written(suite: Suite, targets: pd.DataFrame, edits: pd.DataFrame) -> np.ndarray:
    """First-order estimate of how much the edits lower each target's pre-activation."""
    import torch

    taken = np.zeros(len(targets))
    about = targets[["layer", "feature"]].rename(columns={"feature": "feature_read"})
    edits = edits.join(about, on="case")
    chunk = np.arange(len(edits)) // ROWS_AT_ONCE
    for (layer, module, _), rows in edits.groupby(["layer", "module", chunk]):
        sae = suite.sae(predecessor_site(int(layer), str(module)))
        above = suite.sae(Site(int(layer), "res"))
        is_direct = "amount" in edits and sae.input_site == sae.site
        if not is_direct or above.lacking or above.normalises_tokens:
            taken[rows["case"]] = np.nan  # known only during the pass, or more lies between
            continue
        written = sae.decoder_rows(torch.tensor(rows["feature"].to_numpy())).float()
        read = above.weights().encoder[torch.tensor(rows["feature_read"].to_numpy())]
        shares = (written * read).sum(1).cpu().numpy()
        np.subtract.at(taken, rows["case"].to_numpy(), rows["amount"].to_numpy() * shares)
    return taken


def downstream_effects(
    suite: Suite,
    tokens: Tokens,
    targets: pd.DataFrame,
    cases: pd.DataFrame,
    edits: pd.DataFrame,
    matches: pd.DataFrame,
) -> pd.DataFrame:
    """What is left in the layers above: does the model repair it (CHOICES 35)?

    A target's descendant one layer up is its best forward match, the next is that one's, and so on.

    Returns:
        As `deactivate`, one row for each case and layer from the target's own on, with `above`
        (layers above it) and `descendant`; those that are active without the edits alone.
    """
    import pandas as pd

    best = best_matches(matches, "forward", "res")
    best = best.set_index(["source_layer", "source"])["feature"]
    about = targets[["layer", "text", "dataset", "position", "feature"]]
    chosen = cases.reset_index(drop=True).join(about, on="target")
    reads = chosen.assign(case=chosen.index, module="res")[READS]
    chain = []
    while len(reads):
        chain.append(reads)
        above = reads.join(best.rename("above"), on=["layer", "feature"]).dropna(subset="above")
        reads = above.assign(layer=above["layer"] + 1, feature=above["above"].astype(int))[READS]
    read, _ = intervene(suite, tokens, chosen, edits, pd.concat(chain))
    read = read.rename(columns={"layer": "at", "feature": "descendant"})
    table = read.join(chosen.drop(columns=["position", "feature"]), on="case")
    table = _with_change(table.assign(above=table["at"] - table["layer"]))
    table = table[table["old"] > 0].sort_values(["layer", "above", "case"], ignore_index=True)
    return table.drop(columns=["case", "module", "at"])


def success_rates(
    table: pd.DataFrame, by: Sequence[str], tokens: pd.DataFrame, times: int = TIMES, seed: int = 0
) -> pd.DataFrame:
    """Successful deactivations and activation change, with intervals (paper A.2; CHOICES 10, 11).

    `n` are active targets, `inactive` the others; the intervals are over the texts of `tokens`.
    """
    columns = [c for c in ("success", "change", "loss_change") if c in table]
    rates = mean_intervals(table, columns, by, tokens, times, seed)
    inactive = table["change"].isna().groupby([table[c] for c in by], observed=True).sum()
    rates.insert(len(by) + 1, "inactive", inactive.to_numpy(dtype=int))
    return rates.assign(n=rates["n"] - rates["inactive"])


def common_targets(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of targets for which every method has a case (CHOICES 10)."""
    methods = table.groupby("target")["method"].nunique()
    return table[table["target"].map(methods) == table["method"].nunique()]


def table_1(
    suite: Suite,
    tokens: Tokens,
    targets: pd.DataFrame,
    by_method: Mapping[str, pd.DataFrame],
    activations: FeatureActivations,
    all_sites: bool = False,
) -> pd.DataFrame:
    """Single matches against the best of all active candidates (Table 1; CHOICES 13, 34).

    A target's site is where a method finds its only predecessor; other targets are left out. A
    method that finds predecessors at several sites, or none, is held to the site that another one
    named. The search, "exhaustive", tries the features of the named sites, or of `all_sites`.

    Returns:
        One row for each method and target: `change`, `success`, `tried` (interventions), `layer`,
        `feature`, `dataset`, `text`. A method without an active match at the site has tried 0 and
        changed nothing; `change` and `success` are missing for a target that is not active.
    """
    import pandas as pd

    keys = ["method", "target"]
    sources = pd.concat([table.assign(method=name) for name, table in by_method.items()])
    if sources.duplicated([*keys, "module"]).any():
        raise ValueError("a method has several matches at a site: expected one (top-1)")
    active = active_predecessors(sources)
    is_only = ~active.duplicated(keys, keep=False)
    named = active[is_only]
    if named.empty:
        raise ValueError("no target has a single source")
    first_named = named.groupby("target")["module"].first()
    held = active[is_only | (active["module"] == active["target"].map(first_named))]
    if all_sites:
        named = named[["target"]].merge(pd.Series(MODULES, name="module"), how="cross")
    searched = named[["target", "module"]].drop_duplicates()
    searched = searched.join(targets[["layer", "token_row"]], on="target")
    every = every_active(searched, activations).assign(method="exhaustive")
    tried = pd.concat([held, every], ignore_index=True)
    edits = tried.assign(case=tried.index, amount=-tried["activation"])
    edits = edits[["case", "module", "feature", "amount"]]
    table = deactivate(suite, tokens, targets, tried[keys], edits)
    table["tried"] = table.groupby(keys)["target"].transform("size")
    best = table.sort_values("change", kind="stable").drop_duplicates(keys, keep="last")
    rows = pd.MultiIndex.from_product([[*by_method, "exhaustive"], first_named.index], names=keys)
    best = best.set_index(keys)[["change", "success", "tried"]].reindex(rows)
    best.loc[best["tried"].isna()] = 0.0
    about = targets[["layer", "feature", "dataset", "text"]]
    return best.reset_index().join(about, on="target").astype({"tried": int})
