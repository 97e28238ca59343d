"""Ablating predecessors, and what is left of their targets (paper 5.2, A.2).

A case removes or rescales some of a target's predecessors at the target's token, all in one
forward pass. `targets`, `sources` and `predecessors` are tables of `targets.py`, `cases` and
`edits` those of `ablation_cases`; `tokens` are the texts of the sample.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from flowhelpers.core.bootstrap import TIMES, mean_intervals
from flowhelpers.core.features import MODULES, Site, predecessor_site
from flowhelpers.deactivation.targets import active_predecessors, groups_of
from flowhelpers.groups.occurrences import GROUPS, modules_of
from flowhelpers.interventions.batched import PREDECESSOR_OFFSETS, TARGET_OFFSET, Outcome, intervene
from flowhelpers.matching.scores import best_matches

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
    cases = cases.reset_index(drop=True)
    chosen = targets.loc[cases["target"]].reset_index(drop=True)
    read = [TARGET_OFFSET]
    if sources is not None:
        read += [PREDECESSOR_OFFSETS[m] for m in MODULES if m in {*sources["module"]}]
    outcome = intervene(suite, tokens, chosen, edits, read, loss)
    old, new = outcome.activations(chosen["feature"].to_numpy())
    table = cases.join(chosen[["layer", "feature", "dataset", "text"]]).assign(**_changes(old, new))
    table["linear"] = _written(suite, chosen, edits) / np.where(old > 0, old, np.nan)
    if sources is not None:
        table["after"] = _groups_after(outcome, cases, sources)
        table.loc[new <= 0, "after"] = OFF
        table.loc[old <= 0, "after"] = None
    if outcome.losses is not None:
        for name in ("loss", "token_loss"):
            before, after = (outcome.losses[f"{name}_{when}"] for when in ("before", "after"))
            table[f"{name}_change"] = (after - before) / before
    return table


def _changes(old: np.ndarray, new: np.ndarray) -> dict[str, np.ndarray]:
    change = 1 - (new / np.where(old > 0, old, np.nan)).astype(float)
    success = np.where(old > 0, new == 0, np.nan)
    return {"old": old, "new": new, "change": change, "success": success}


def _written(suite: "Suite", targets: "pd.DataFrame", edits: "pd.DataFrame") -> np.ndarray:
    """How much of each case's target its edits take away in a linear reading."""
    import torch

    if "amount" not in edits:  # the amount is known only during the pass
        return np.full(len(targets), np.nan)
    taken = np.zeros(len(targets))
    edits = edits.join(targets[["layer", "feature"]], on="case", rsuffix="_read")
    for (layer, module), rows in edits.groupby(["layer", "module"]):
        sae = suite.sae(predecessor_site(int(layer), str(module)))
        above = suite.sae(Site(int(layer), "res"))
        if sae.input_site != sae.site or above.normalises_tokens:
            taken[rows["case"]] = np.nan  # what is written passes a norm before it is read
            continue
        encoder = above.weights().encoder
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows.iloc[start : start + ROWS_AT_ONCE]
            written = sae.decoder_rows(torch.tensor(some["feature"].to_numpy())).float()
            read = encoder[torch.tensor(some["feature_read"].to_numpy())]
            shares = (written * read).sum(1).cpu().numpy()
            np.subtract.at(taken, some["case"].to_numpy(), some["amount"].to_numpy() * shares)
    return taken


def _groups_after(
    outcome: Outcome, cases: "pd.DataFrame", sources: "pd.DataFrame"
) -> "pd.Categorical":
    sources = cases[["target"]].reset_index(names="case").merge(sources, on="target")
    for module, part in sources.groupby("module"):
        features, case = part["feature"].to_numpy(), part["case"].to_numpy()
        _, after = outcome.activations(features, PREDECESSOR_OFFSETS[str(module)], case)
        sources.loc[part.index, "activation"] = after
    groups = groups_of(cases, active_predecessors(sources.assign(target=sources["case"])))
    return groups.add_categories([OFF])


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
    upward = {at: part.set_index("source")["feature"] for at, part in best.groupby("source_layer")}
    about = ["layer", "text", "dataset"]
    cases = cases.reset_index(drop=True)
    chosen = cases.join(targets[[*about, "position", "feature"]], on="target")
    tables = []
    for layer, own in chosen.groupby("layer"):
        read = [TARGET_OFFSET]
        while layer + len(read) - 1 in upward:
            read.append((len(read), "res"))
        own_edits = edits[edits["case"].isin(own.index)]
        own_edits = own_edits.assign(case=own.index.get_indexer(own_edits["case"]))
        own = own.reset_index(drop=True)
        outcome = intervene(suite, tokens, own, own_edits, read)
        descendants = own["feature"]
        for offset in read:
            if offset != TARGET_OFFSET:
                best = upward[layer + offset[0] - 1]
                descendants = descendants.map(best).fillna(-1).astype(int)
            followed = np.flatnonzero(descendants >= 0)
            features = descendants.to_numpy()[followed]
            effects = _changes(*outcome.activations(features, offset, followed))
            part = own.loc[followed, [*cases.columns, *about]]
            part = part.assign(above=offset[0], descendant=features, **effects)
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

    Rates of `deactivate`'s table within the columns `by`; the texts of the sample's `tokens` are
    drawn anew `times` times.

    Returns:
        One row a group: `by`, `n`, `inactive` (targets that were not active, not among the n),
        `success`, `change` and, if the table has it, `loss_change`, with `_low` and `_high`.
    """
    columns = [c for c in ("success", "change", "loss_change") if c in table]
    rates = mean_intervals(table, columns, by, tokens, times, seed)
    off = table["change"].isna()
    inactive = off.groupby([table[c] for c in by], observed=True).sum() if by else [off.sum()]
    rates.insert(len(by) + 1, "inactive", np.asarray(inactive, dtype=int))
    return rates.assign(n=rates["n"] - rates["inactive"])


def common_targets(table: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of targets for which every method has a case (CHOICES 10)."""
    methods = table.groupby("target")["method"].nunique()
    return table[table["target"].map(methods) == table["method"].nunique()]
