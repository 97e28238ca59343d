"""Removing or rescaling predecessors, and what is left of their targets.

A case takes some of a target's predecessors away at the target's token, or rescales them, all in
one forward pass. `targets`, `sources` and `predecessors` are tables as of `targets.py`; `cases` and
`edits` as `ablation_cases` gives them; `tokens` are the texts of the sample.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from flowhelpers.core.bootstrap import TIMES, mean_intervals
from flowhelpers.core.features import MODULES, Site, predecessor_site
from flowhelpers.deactivation.targets import groups_of
from flowhelpers.groups.occurrences import GROUPS, group_names, modules_of
from flowhelpers.interventions.batched import PREDECESSOR_OFFSETS, TARGET_OFFSET, Outcome, intervene

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.model import Tokens

OFF = "Deactivated"
ROWS_AT_ONCE = 16384


def ablation_cases(
    targets: "pd.DataFrame",
    predecessors: "pd.DataFrame",
    r: Sequence[float] = (0.0,),
    subsets: bool = False,
    activation: Literal["clean", "live"] = "clean",
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Cases that rescale all of a target's predecessors, or those of every subset of their sites.

    Targets without predecessors have no case. Several at one site go together. A factor `r` of 0
    removes. With `subsets` every non-empty subset of the sites is a case (Figures 8 and 15 b).
    Predecessors are rescaled by their activation in the clean run, or live, by what it is after the
    edits before them (CHOICES 9).

    Returns:
        The cases, `target`, `group`, `removed` (the group of the sites that are edited), `r`; and
        their edits, `case`, `module`, `feature`, and `amount`, or `r` if live.
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
    cases = pd.DataFrame({"target": targets.index, "group": groups_of(targets, predecessors)})
    plan = pd.DataFrame(plans, columns=["group", "removed", "r"])
    cases = cases.astype({"group": str}).merge(plan, on="group")
    cases = cases.sort_values("target", kind="stable", ignore_index=True)
    modules = [(removed, module) for removed in GROUPS for module in modules_of(removed)]
    of_removed = pd.DataFrame(modules, columns=["removed", "module"])
    edits = cases.reset_index(names="case").merge(of_removed, on="removed")
    edits = edits.merge(predecessors, on=["target", "module"])
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
          `success`, 1 where it is off and else 0; all but `old` and `new` are missing for a target
          that is not active;
        - `linear`, the share of the activation that the edits take away by what they write alone,
          a · v · w_enc / old, before the layer answers; missing for live activations, and where a
          norm lies between (SAEs that read z, or that normalise what they read);
        - `after`, the group afterwards or "Deactivated", if `sources` are given;
        - `loss_change` and `token_loss_change`, relative, of the text's mean loss and of the
          token's own (CHOICES 12), if `loss` is asked for.
    """
    cases = cases.reset_index(drop=True)
    chosen = targets.loc[cases["target"]].reset_index(drop=True)
    read = [TARGET_OFFSET]
    if sources is not None:
        read += [PREDECESSOR_OFFSETS[m] for m in MODULES if m in {*sources["module"]}]
    outcome = intervene(suite, tokens, chosen[["text", "position", "layer"]], edits, read, loss)
    old, new = outcome.activations(chosen["feature"].to_numpy())
    table = cases.join(chosen[["layer", "feature", "dataset", "text"]])
    table = table.assign(**_changes(old, new), linear=_written_share(suite, chosen, edits, old))
    if sources is not None:
        table["after"] = _groups_after(outcome, cases, sources, new)
        table.loc[old <= 0, "after"] = None
    if outcome.losses is not None:
        for name in ("loss", "token_loss"):
            before, after = (outcome.losses[f"{name}_{when}"] for when in ("before", "after"))
            table[f"{name}_change"] = (after - before) / before
    return table


def _changes(old: np.ndarray, new: np.ndarray) -> dict[str, np.ndarray]:
    success = np.where(old > 0, (new == 0).astype(float), np.nan)
    return {"old": old, "new": new, "change": 1 - _ratio(new, old), "success": success}


def _ratio(values: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.divide(values, old, out=np.full(len(old), np.nan), where=old > 0)


def _written_share(
    suite: "Suite", targets: "pd.DataFrame", edits: "pd.DataFrame", old: np.ndarray
) -> np.ndarray:
    """The share of each case's target that its edits take away in a linear reading."""
    import torch

    if "amount" not in edits:  # how much is written shows in the pass alone
        return np.full(len(targets), np.nan)
    taken = np.zeros(len(targets))
    case = edits["case"].to_numpy()
    layers, features = (targets[column].to_numpy()[case] for column in ("layer", "feature"))
    for (layer, module), rows in edits.groupby([layers, "module"]).indices.items():
        sae = suite.sae(predecessor_site(int(layer), str(module)))
        above = suite.sae(Site(int(layer), "res"))
        if sae.input_site != sae.site or above.normalises_tokens:
            taken[case[rows]] = np.nan  # what is written passes a norm before it is read
            continue
        encoder = above.weights().encoder
        for some in np.array_split(rows, -(-len(rows) // ROWS_AT_ONCE)):
            written = sae.decoder_rows(torch.tensor(edits["feature"].to_numpy()[some])).float()
            read = (written * encoder[torch.tensor(features[some])]).sum(1).cpu().numpy()
            np.subtract.at(taken, case[some], edits["amount"].to_numpy()[some] * read)
    return _ratio(taken, old)


def _groups_after(
    outcome: Outcome, cases: "pd.DataFrame", sources: "pd.DataFrame", new: np.ndarray
) -> "pd.Categorical":
    import pandas as pd

    sources = cases[["target"]].reset_index(names="case").merge(sources, on="target")
    active = {module: np.zeros(len(cases), dtype=bool) for module in MODULES}
    for module, part in sources.groupby("module"):
        case, offset = part["case"].to_numpy(), PREDECESSOR_OFFSETS[str(module)]
        _, values = outcome.activations(part["feature"].to_numpy(), offset, case)
        np.logical_or.at(active[str(module)], case, values > 0)
    names = np.where(new > 0, group_names(active).astype(str), OFF)
    return pd.Categorical(names, categories=[*GROUPS, OFF])


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

    is_best = (matches["direction"] == "forward") & (matches["rank"] == 1)
    forward = matches[is_best & (matches["module"] == "res")].groupby("source_layer")
    upward = {int(layer): best.set_index("source")["feature"] for layer, best in forward}
    chosen = targets.loc[cases["target"]].reset_index(drop=True)
    tables = []
    for layer, rows in chosen.groupby("layer").indices.items():
        read = [TARGET_OFFSET]
        while layer + len(read) - 1 in upward:
            read.append((len(read), "res"))
        own_edits = edits[edits["case"].isin(rows)]
        own_edits = own_edits.assign(case=np.searchsorted(rows, own_edits["case"]))
        own = chosen.iloc[rows].reset_index(drop=True)
        about = cases.iloc[rows].reset_index(drop=True).join(own[["layer", "text", "dataset"]])
        outcome = intervene(suite, tokens, own[["text", "position", "layer"]], own_edits, read)
        descendants = own["feature"]
        for offset in read:
            if offset != TARGET_OFFSET:
                best = upward[layer + offset[0] - 1]
                descendants = descendants.map(best).fillna(-1).astype(int)
            followed = np.flatnonzero(descendants >= 0)
            features = descendants.to_numpy()[followed]
            effects = _changes(*outcome.activations(features, offset, followed))
            part = about.iloc[followed].assign(above=offset[0], descendant=features, **effects)
            tables.append(part[part["old"] > 0])
    return pd.concat(tables, ignore_index=True)


def success_rates(
    table: "pd.DataFrame",
    by: Sequence[str],
    tokens: "pd.DataFrame",
    times: int = TIMES,
    seed: int = 0,
) -> "pd.DataFrame":
    """Successful deactivations and activation change, with intervals (paper A.2; CHOICES 10, 11).

    Rates of a table as of `deactivate` within the columns `by`; the texts of the sample's `tokens`
    are drawn anew `times` times.

    Returns:
        One row a group: `by`, `n`, `inactive` (targets that were not active, not among the n),
        `success`, `change` and, if the table has it, `loss_change`, with `_low` and `_high`.
    """
    columns = ["success", "change", *(["loss_change"] if "loss_change" in table else [])]
    rates = mean_intervals(table, columns, by, tokens, times, seed)
    off = table["change"].isna()
    inactive = off.groupby([table[c] for c in by], observed=True).sum() if by else [off.sum()]
    rates.insert(len(by) + 1, "inactive", np.asarray(inactive, dtype=int))
    return rates.assign(n=rates["n"] - rates["inactive"])


def common_targets(table: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of targets for which every method has a case (CHOICES 10)."""
    methods = table.groupby("target")["method"].nunique()
    return table[table["target"].map(methods) == table["method"].nunique()]
