"""Ablating predecessors, and what is left of their targets (paper 5.2, A.2).

A case removes or rescales some of a target's predecessors at the target's token, all in one
forward pass. `targets`, `sources` and `predecessors` are tables of `targets.py`, `cases` and
`edits` those of `ablation_cases`; `tokens` are the texts of the sample.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from flowhelpers.core.bootstrap import TIMES, mean_intervals
from flowhelpers.core.features import Site, predecessor_site
from flowhelpers.deactivation.targets import groups_of
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
    targets: "pd.DataFrame",
    predecessors: "pd.DataFrame",
    r: Sequence[float] = (0.0,),
    subsets: bool = False,
    activation: Literal["clean", "live"] = "clean",
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Cases that rescale all of a target's predecessors, or those of every subset of their sites.

    Targets without predecessors have no case. Several predecessors at one site go together. A
    factor `r` of 0 removes. With `subsets` every non-empty subset of the sites is a case (Figures 8
    and 15 b). The activation that is rescaled is that of the clean run, or the live one, after the
    edits at earlier sites (CHOICES 9).

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
    cases = pd.DataFrame({"target": targets.index, "group": groups_of(targets, predecessors)})
    cases = cases.astype({"group": str}).merge(plan, on="group")
    cases = cases.sort_values("target", kind="stable", ignore_index=True)
    edits = cases.assign(case=cases.index, module=cases["removed"].map(modules_of))
    edits = edits.explode("module").merge(predecessors, on=["target", "module"])
    edits = edits.assign(amount=(edits["r"] - 1) * edits["activation"])
    size = "amount" if activation == "clean" else "r"
    return cases, edits[["case", "module", "feature", size]]


def concat_methods(
    parts: "Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]",
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Cases and edits of several methods as one table each; cases bear their `method`."""
    import pandas as pd

    cases, edits, n = [], [], 0
    for method, (some_cases, some_edits) in parts.items():
        cases.append(some_cases.assign(method=method))
        edits.append(some_edits.assign(case=some_edits["case"] + n))
        n += len(some_cases)
    return pd.concat(cases, ignore_index=True), pd.concat(edits, ignore_index=True)


def deactivate(
    suite: "Suite",
    tokens: "Tokens",
    targets: "pd.DataFrame",
    cases: "pd.DataFrame",
    edits: "pd.DataFrame",
    sources: "pd.DataFrame | None" = None,
    loss: bool = False,
) -> "pd.DataFrame":
    """What is left of each target after its case's edits, all in one forward pass (paper A.2).

    Returns:
        The cases with `layer`, `feature`, `dataset` and `text` of their targets, and with

        - `old` and `new` activation; `change`, 1 - new / old, negative where the feature grew;
          `success`, 1 where it is off and else 0; missing for a target that is not active;
        - `linear`, the share of the activation that the edits themselves write away,
          a · v · w_enc / old, before the layer responds; missing for live activations, and where a
          norm lies between (SAEs that read z, or that normalise their input);
        - `after`, the group afterwards or "Deactivated", if `sources` are given;
        - `loss_change` and `token_loss_change`, relative, of the text's mean loss and of the
          token's own (CHOICES 12), if `loss` is asked for.
    """
    import pandas as pd

    cases = cases.reset_index(drop=True)
    chosen = targets.loc[cases["target"]].reset_index(drop=True)
    reads = chosen.assign(case=chosen.index, module="res")[READS]
    if sources is not None:
        sources = cases[["target"]].reset_index(names="case").merge(sources, on="target")
        layer = chosen["layer"].to_numpy()[sources["case"]] - (sources["module"] == "res")
        reads = pd.concat([reads, sources.assign(layer=layer)[READS]])
    read, losses = intervene(suite, tokens, chosen, edits, reads, loss)
    about = chosen[["layer", "feature", "dataset", "text"]]
    table = _with_change(cases.join(about).join(read[["old", "new"]]))
    table["linear"] = _written(suite, chosen, edits) / table["old"].where(table["old"] > 0)
    if sources is not None:
        active = sources.assign(target=sources["case"])[read["new"].to_numpy()[len(cases) :] > 0]
        table["after"] = groups_of(cases, active).add_categories([OFF])
        table.loc[table["new"] <= 0, "after"] = OFF
        table.loc[table["old"] <= 0, "after"] = None
    if losses is not None:
        for name in ("loss", "token_loss"):
            before, after = losses[f"{name}_before"], losses[f"{name}_after"]
            table[f"{name}_change"] = (after - before) / before
    return table


def _with_change(table: "pd.DataFrame") -> "pd.DataFrame":
    known = table["old"].where(table["old"] > 0)
    success = (table["new"] == 0).astype(float).where(known.notna())
    return table.assign(change=1 - (table["new"] / known).astype(float), success=success)


def _written(suite: "Suite", targets: "pd.DataFrame", edits: "pd.DataFrame") -> np.ndarray:
    """How much of each case's target its edits take away in a linear reading."""
    import torch

    taken = np.zeros(len(targets))
    if "amount" not in edits:  # the amount is known only during the pass
        return taken * np.nan
    edits = edits.join(targets[["layer", "feature"]], on="case", rsuffix="_read")
    chunk = np.arange(len(edits)) // ROWS_AT_ONCE
    for (layer, module, _), rows in edits.groupby(["layer", "module", chunk]):
        sae = suite.sae(predecessor_site(int(layer), str(module)))
        above = suite.sae(Site(int(layer), "res"))
        if sae.input_site != sae.site or above.normalises_tokens:
            taken[rows["case"]] = np.nan  # what is written passes a norm before it is read
            continue
        written = sae.decoder_rows(torch.tensor(rows["feature"].to_numpy())).float()
        read = above.weights().encoder[torch.tensor(rows["feature_read"].to_numpy())]
        shares = (written * read).sum(1).cpu().numpy()
        np.subtract.at(taken, rows["case"].to_numpy(), rows["amount"].to_numpy() * shares)
    return taken


def downstream_effects(
    suite: "Suite",
    tokens: "Tokens",
    targets: "pd.DataFrame",
    cases: "pd.DataFrame",
    edits: "pd.DataFrame",
    matches: "pd.DataFrame",
) -> "pd.DataFrame":
    """What is left in the layers above: does the model repair it (CHOICES 35)?

    A target's descendant one layer up is its best forward match, the next is that one's, and so on.
    Only descendants that are active without the edits count.

    Returns:
        One row for each case and layer from the target's own on: the case's columns, `layer`,
        `text`, `dataset`, `above` (layers above the target), `descendant`, `old`, `new`, `change`
        and `success`.
    """
    import pandas as pd

    best = best_matches(matches, "forward", "res")
    best = best.set_index(["source_layer", "source"])["feature"]
    about = ["layer", "text", "dataset"]
    chosen = cases.reset_index(drop=True).join(
        targets[[*about, "position", "feature"]], on="target"
    )
    reads = chosen.assign(case=chosen.index, module="res")[READS]
    chain = []
    while len(reads):
        chain.append(reads)
        above = reads.join(best.rename("above"), on=["layer", "feature"]).dropna(subset="above")
        reads = above.assign(layer=above["layer"] + 1, feature=above["above"].astype(int))[READS]
    reads = pd.concat(chain)
    read, _ = intervene(suite, tokens, chosen, edits, reads)
    table = read.rename(columns={"feature": "descendant"}).drop(columns="module")
    of_cases = chosen[[*cases.columns, *about]]
    table = table.rename(columns={"layer": "at"}).join(of_cases, on="case")
    table = _with_change(table.assign(above=table["at"] - table["layer"]))
    table = table[table["old"] > 0].sort_values(["layer", "above", "case"])
    columns = [*of_cases, "above", "descendant", "old", "new", "change", "success"]
    return table[columns].reset_index(drop=True)


def success_rates(
    table: "pd.DataFrame",
    by: Sequence[str],
    tokens: "pd.DataFrame",
    times: int = TIMES,
    seed: int = 0,
) -> "pd.DataFrame":
    """Successful deactivations and activation change, with intervals (paper A.2; CHOICES 10, 11).

    Rates of `deactivate`'s table within the columns `by`; the texts of the sample's `tokens` are
    drawn anew `times` times.

    Returns:
        One row a group: `by`, `n`, `inactive` (targets that were not active, not among the n),
        `success`, `change` and, if the table has it, `loss_change`, with `_low` and `_high`.
    """
    columns = [c for c in ("success", "change", "loss_change") if c in table]
    rates = mean_intervals(table, columns, by, tokens, times, seed)
    inactive = table["change"].isna().groupby([table[c] for c in by], observed=True).sum()
    rates.insert(len(by) + 1, "inactive", inactive.to_numpy(dtype=int))
    return rates.assign(n=rates["n"] - rates["inactive"])


def common_targets(table: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of targets for which every method has a case (CHOICES 10)."""
    methods = table.groupby("target")["method"].nunique()
    return table[table["target"].map(methods) == table["method"].nunique()]
