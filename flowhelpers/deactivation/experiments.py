"""Does removing a predecessor remove the feature? The experiments of the paper's 5.2.

A target is an active residual feature at one token. Its predecessors are its matches at R_{L-1},
M_L and A_L that are active at that token. A case removes some of them there, or rescales them, and
asks what is left of the target.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.bootstrap import TIMES, mean_intervals
from flowhelpers.core.features import MODULES, Site, predecessor_site
from flowhelpers.groups.occurrences import GROUPS, group_names, modules_of, with_dataset
from flowhelpers.interventions.batched import PREDECESSORS, TARGET, Outcome, intervene

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.model import Tokens

OFF = "Deactivated"
SINGLE = GROUPS[1:4]
CONTROL = "equal norm, random"


def middle_layers(layers: int, n: int = 3) -> list[int]:
    """So many layers spread over the depth: 6, 12 and 18 of Gemma 2 2B's 26, as in the paper."""
    step = max(layers // (n + 1), 1)
    return [number * step for number in range(1, n + 1) if number * step < layers]


def draw_targets(
    activations: FeatureActivations, layers: Sequence[int], per_token: int = 25, seed: int = 0
) -> "pd.DataFrame":
    """Active residual features at the tokens of a sample, at random (paper A.2).

    Args:
        activations: What is active where.
        layers: Layers of the targets.
        per_token: The most at one token and layer; where fewer are active, all.
        seed: Decides which.

    Returns:
        One row a target: `layer`, `feature`, `token_row`, `activation`, and what the sample says of
        the token, `dataset`, `text`, `position`, `token`.

    Raises:
        ValueError: If a layer has no residual SAE, there is none or one stands twice, or
            `per_token` is below 1.
    """
    import pandas as pd

    if per_token < 1:
        raise ValueError(f"per_token={per_token}: expected 1 or more")
    if not len(layers) or len(set(layers)) < len(layers):
        raise ValueError(f"layers={list(layers)}: expected one or more, each once")
    rng = np.random.default_rng(seed)
    parts = []
    for layer in layers:
        if Site(layer, "res") not in activations.by_site:
            there = sorted(site.layer for site in activations.by_site if site.module == "res")
            raise ValueError(f"no activations at {layer}/res: expected a layer of {there}")
        codes = activations.by_site[Site(layer, "res")].tocoo()
        part = pd.DataFrame(
            {
                "layer": layer,
                "feature": codes.col.astype(np.int64),
                "token_row": codes.row.astype(np.int64),
                "activation": codes.data.astype(float),
            }
        )
        part = part.iloc[rng.permutation(len(part))]
        part = part.groupby("token_row", sort=False).head(per_token)
        parts.append(part.sort_values(["token_row", "feature"]))
    targets = pd.concat(parts, ignore_index=True)
    about = with_dataset(activations.tokens)[["dataset", "text", "position", "token"]].iloc[
        targets["token_row"]
    ]
    return pd.concat([targets, about.reset_index(drop=True)], axis=1)


def sources_of(
    targets: "pd.DataFrame",
    matches: "pd.DataFrame",
    activations: FeatureActivations,
    top_n: int = 1,
) -> "pd.DataFrame":
    """Every target's matches, with what they do at its token.

    Args:
        targets: As `draw_targets` gives.
        matches: A match table.
        activations: What is active where.
        top_n: How many matches at each place.

    Returns:
        One row a match: `target` (row of `targets`), `module`, `feature` (the match), `rank`, and
        `activation`, 0 where it is not active.

    Raises:
        ValueError: If the table has no matches at a target's layer, or fewer ranks.
    """
    chosen = matches[matches["direction"] == "backward"]
    ranks = int(chosen["rank"].max())
    if not 1 <= top_n <= ranks:
        raise ValueError(f"top_n={top_n}: expected 1 to {ranks}, the table's ranks")
    chosen = chosen[chosen["rank"] <= top_n]
    if missing := sorted(set(targets["layer"]) - set(chosen["layer"])):
        raise ValueError(f"no matches at layer {missing[0]}: its features have no predecessors")
    chosen = chosen[chosen["source"] >= 0][["layer", "feature", "module", "source", "rank"]]
    own = targets[["layer", "feature", "token_row"]].reset_index(names="target")
    found = own.merge(chosen, on=["layer", "feature"]).assign(activation=0.0)
    found["module"] = found["module"].astype(str)
    for (layer, module), part in found.groupby(["layer", "module"]):
        codes = activations.by_site[predecessor_site(int(layer), str(module))]
        values = codes[part["token_row"].to_numpy(), part["source"].to_numpy()]
        found.loc[part.index, "activation"] = np.asarray(values, dtype=float).ravel()
    found = found.drop(columns=["feature", "layer", "token_row"])
    columns = ["target", "module", "feature", "rank", "activation"]
    found = found.rename(columns={"source": "feature"})[columns]
    return found.sort_values(["target", "module", "rank"], ignore_index=True)


def active_predecessors(sources: "pd.DataFrame") -> "pd.DataFrame":
    """The sources that are active at their target's token: its predecessors there."""
    return sources[sources["activation"] > 0].reset_index(drop=True)


def groups_of(targets: "pd.DataFrame", predecessors: "pd.DataFrame") -> "pd.Categorical":
    """The group of each target, by where it has a predecessor."""
    import pandas as pd

    counts = pd.crosstab(predecessors["target"], predecessors["module"])
    return group_names(counts.reindex(index=targets.index, columns=list(MODULES), fill_value=0) > 0)


def ablation_cases(
    targets: "pd.DataFrame",
    predecessors: "pd.DataFrame",
    r: Sequence[float] = (0.0,),
    subsets: bool = False,
    activation: Literal["clean", "live"] = "clean",
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Cases that rescale all of a target's predecessors, or those of every subset of their places.

    Targets without predecessors have no case. Several in one place go together.

    Args:
        targets: As `draw_targets` gives.
        predecessors: As `active` gives.
        r: The factors; 0 removes.
        subsets: Whether every non-empty subset of the places is a case (Figures 8 and 15 b).
        activation: Whether predecessors are rescaled by their activation in the clean run, or by
            what it is after the edits before them, as of the MLP's after one in the stream
            (CHOICES 9).

    Returns:
        The cases, `target`, `group`, `removed` (the group of the places that are edited), `r`; and
        their edits, `case`, `module`, `feature`, and `amount`, or `r` if live.

    Raises:
        ValueError: If a factor is not finite, or no target has a predecessor.
    """
    import pandas as pd

    if not len(r) or not np.isfinite(r).all() or len(set(r)) < len(r):
        raise ValueError(f"r={list(r)}: expected one or more finite numbers, each once")
    if predecessors.empty:
        raise ValueError("no target has an active predecessor: there is nothing to remove")
    within = {
        whole: [g for g in GROUPS[1:] if set(modules_of(g)) <= set(modules_of(whole))]
        for whole in GROUPS[1:]
    }
    plan = pd.DataFrame(
        [
            (whole, removed, each)
            for whole in GROUPS[1:]
            for removed in (within[whole] if subsets else [whole])
            for each in r
        ],
        columns=["group", "removed", "r"],
    )
    own = pd.DataFrame({"target": targets.index, "group": groups_of(targets, predecessors)})
    cases = own.astype({"group": str}).merge(plan, on="group").sort_values("target", kind="stable")
    cases = cases.reset_index(drop=True)
    places = [(removed, module) for removed in GROUPS for module in modules_of(removed)]
    inside = pd.DataFrame(places, columns=["removed", "module"])
    edits = cases.reset_index(names="case").merge(inside, on="removed")
    edits = edits.merge(predecessors, on=["target", "module"])
    edits = edits.assign(amount=(edits["r"] - 1) * edits["activation"])
    size = "amount" if activation == "clean" else "r"
    return cases, edits[["case", "module", "feature", size]]


def concat_methods(
    parts: "Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]",
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Cases and edits of several methods as one table each; cases bear their `method`."""
    import pandas as pd

    all_cases, all_edits, so_far = [], [], 0
    for method, (cases, edits) in parts.items():
        all_cases.append(cases.assign(method=method))
        all_edits.append(edits.assign(case=edits["case"] + so_far))
        so_far += len(cases)
    return pd.concat(all_cases, ignore_index=True), pd.concat(all_edits, ignore_index=True)


def deactivate(
    suite: "Suite",
    tokens: "Tokens",
    targets: "pd.DataFrame",
    cases: "pd.DataFrame",
    edits: "pd.DataFrame",
    sources: "pd.DataFrame | None" = None,
    loss: bool = False,
    batch_size: int | None = None,
) -> "pd.DataFrame":
    """What is left of each target after its case's edits, all in one forward pass (paper A.2).

    Args:
        suite: The suite.
        tokens: The texts of the sample.
        targets: As `draw_targets` gives.
        cases: As `removals` gives; an edit names a case by its place, from 0.
        edits: As `removals` gives.
        sources: As `sources_of` gives; with them the group after the edits is told as well.
        loss: Whether the loss is read too, on the rest of the text.
        batch_size: Interventions in a pass; by default as many as memory allows.

    Returns:
        The cases with `layer`, `feature`, `dataset` and `text` of their targets, and with: `old`
        and `new` activation; `change`, 1 - new / old, negative where the feature grew; `success`, 1
        where it is off and else 0; `linear`, the share of the target's activation that the edits
        take away by what they write alone, a · v · w_enc / old, before the layer answers, missing
        for live activations, and where a norm lies between (SAEs that read z, or that
        normalise what they read); `after`,
        the group afterwards or "Deactivated"; `loss_change` and `token_loss_change`, relative, of
        the text's mean loss and of the token's own (CHOICES 12). A target that is not active is
        counted, with its `change`, `success`, `linear` and `after` missing.
    """
    cases = cases.reset_index(drop=True)
    where = targets.loc[cases["target"]].reset_index(drop=True)
    read = [TARGET]
    if sources is not None:
        read += [PREDECESSORS[module] for module in MODULES if (sources["module"] == module).any()]
    outcome = intervene(
        suite, tokens, where[["text", "position", "layer"]], edits, read, loss, batch_size
    )
    old, new = outcome.activations(where["feature"].to_numpy())
    table = cases.join(where[["layer", "feature", "dataset", "text"]])
    table = table.assign(old=old, new=new, change=_change(old, new), success=_success(old, new))
    table["linear"] = _written_share(suite, where, edits, old)
    if sources is not None:
        table["after"] = _groups_after(outcome, cases, sources, new)
        table.loc[old <= 0, "after"] = None
    if outcome.losses is not None:
        for name in ("loss", "token_loss"):
            before, after = (outcome.losses[f"{name}_{when}"] for when in ("before", "after"))
            table[f"{name}_change"] = (after - before) / before
    return table


def _change(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return 1 - np.divide(new, old, out=np.full(len(old), np.nan), where=old > 0)


def _success(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.where(old > 0, (new == 0).astype(float), np.nan)


def _written_share(
    suite: "Suite", where: "pd.DataFrame", edits: "pd.DataFrame", old: np.ndarray
) -> np.ndarray:
    """The share of each target's activation that its edits take away in a linear reading."""
    import torch

    if "amount" not in edits:  # how much is written shows in the pass alone
        return np.full(len(where), np.nan)
    taken = np.zeros(len(where))
    case = edits["case"].to_numpy()
    layer, target = where["layer"].to_numpy()[case], where["feature"].to_numpy()[case]
    for (at, module), rows in edits.groupby([layer, "module"]).indices.items():
        sae = suite.sae(predecessor_site(int(at), str(module)))
        above = suite.sae(Site(int(at), "res"))
        if sae.input_site != sae.site or above.normalises_tokens:
            taken[case[rows]] = np.nan  # what is written passes a norm before it is read
            continue
        encoder = above.weights().encoder
        for some in np.array_split(rows, -(-len(rows) // 16384)):
            written = sae.decoder_rows(torch.tensor(edits["feature"].to_numpy()[some])).float()
            heard = (written * encoder[torch.tensor(target[some])]).sum(1).cpu().numpy()
            np.subtract.at(taken, case[some], edits["amount"].to_numpy()[some] * heard)
    return np.divide(taken, old, out=np.full(len(old), np.nan), where=old > 0)


def _groups_after(
    outcome: "Outcome", cases: "pd.DataFrame", sources: "pd.DataFrame", new: np.ndarray
) -> "pd.Categorical":
    import pandas as pd

    looked = cases[["target"]].reset_index(names="case").merge(sources, on="target")
    still = {module: np.zeros(len(cases), dtype=bool) for module in MODULES}
    for module, part in looked.groupby("module"):
        case = part["case"].to_numpy()
        _, value = outcome.activations(part["feature"].to_numpy(), PREDECESSORS[str(module)], case)
        np.logical_or.at(still[str(module)], case, value > 0)
    names = np.where(new > 0, group_names(still).astype(str), OFF)
    return pd.Categorical(names, categories=[*GROUPS, OFF])


def equal_norm(
    suite: "Suite",
    targets: "pd.DataFrame",
    sources: "pd.DataFrame",
    activations: FeatureActivations,
    seed: int = 0,
) -> "pd.DataFrame":
    """The control that the paper lacks: other active features, same norm of change (CHOICES 33).

    Each predecessor is replaced by another feature, drawn from those that are active at the same
    site and token; its activation is scaled so that removing it changes what its SAE reads
    by the same norm, even where that is more than the feature writes. If it does as much to the
    target, the match is nothing special.

    Args:
        suite: The suite.
        targets: As `draw_targets` gives.
        sources: As `sources_of` gives, one for each place.
        activations: What is active where.
        seed: Decides which features.

    Returns:
        As `active`; targets that have no other feature active at a place are left out.

    Raises:
        ValueError: If a target has several matches at a place.
    """
    import pandas as pd
    import torch

    predecessors = active_predecessors(sources)
    if predecessors.duplicated(["target", "module"]).any():
        raise ValueError("a target has several predecessors at a place: expected one (top-1)")
    rng = np.random.default_rng(seed)
    where = targets.loc[predecessors["target"]].reset_index(drop=True)
    parts = []
    for (layer, module), part in predecessors.groupby([where["layer"].to_numpy(), "module"]):
        site = predecessor_site(int(layer), str(module))
        codes, rows = activations.by_site[site], where["token_row"].to_numpy()[part.index]
        own, drawn = part["feature"].to_numpy(), np.full(len(part), -1)
        for place, (row, feature) in enumerate(zip(rows, own, strict=True)):
            others, values = _at_token(codes, int(row))
            others = others[(others != feature) & (values > 0)]
            if len(others):
                drawn[place] = rng.choice(np.sort(others))
        there = drawn >= 0
        sae = suite.sae(site)
        norms = [
            sae.decoder_rows(torch.tensor(f[there])).float().norm(dim=1).cpu().numpy()
            for f in (own, drawn)
        ]
        scaled = part["activation"].to_numpy()[there] * norms[0] / norms[1]
        parts.append(part[there].assign(feature=drawn[there], activation=scaled))
    found = pd.concat(parts).sort_index()
    whole = predecessors.groupby("target").size()
    kept = found.groupby("target").size().reindex(whole.index) == whole
    return found[found["target"].map(kept)].reset_index(drop=True)


def _at_token(codes: "csr_matrix", row: int) -> tuple[np.ndarray, np.ndarray]:
    """The features that are stored for a token, and their activations."""
    at = slice(codes.indptr[row], codes.indptr[row + 1])
    return codes.indices[at], codes.data[at]


def table_1(
    suite: "Suite",
    tokens: "Tokens",
    targets: "pd.DataFrame",
    by_method: "Mapping[str, pd.DataFrame]",
    activations: FeatureActivations,
    all_sites: bool = False,
) -> "pd.DataFrame":
    """Single matches against the best of all active candidates (Table 1; CHOICES 13, 34).

    A target's place is where a method finds its only predecessor. A method that finds predecessors
    at several places, or none, is held to the place that another one named.

    Args:
        suite: The suite.
        tokens: The texts of the sample.
        targets: As `draw_targets` gives; those are used that have a predecessor at one place only,
            by one of the methods at least.
        by_method: Sources by method, one for each place.
        activations: What is active where.
        all_sites: Whether the search tries features of all three sites, and not only of those that
            a method named (CHOICES 13).

    Returns:
        One row for each method, the search among them as "exhaustive", and target: `method`,
        `target`, `layer`, `feature`, `dataset`, `text`, `tried` (interventions), `change`,
        `success`. A method without an active match at the place has tried 0 and changed nothing.
        What was tried at a target that is not active has `change` and `success` missing.

    Raises:
        ValueError: If no target has a single source, or a method several matches at a place.
    """
    import pandas as pd

    single: dict[str, dict[int, str]] = {}
    for method, sources in by_method.items():
        if sources.duplicated(["target", "module"]).any():
            raise ValueError(f"{method} has several matches at a place: expected one (top-1)")
        group = pd.Series(groups_of(targets, active_predecessors(sources)), targets.index).astype(
            str
        )
        single[method] = {t: modules_of(g)[0] for t, g in group.items() if g in SINGLE}
    named: dict[int, list[str]] = {}
    for places in single.values():
        for target, module in places.items():
            named.setdefault(target, []).append(module)
    if not named:
        raise ValueError("no target has a single source")
    chosen = targets.loc[sorted(named)]
    parts = {}
    for method, sources in by_method.items():
        place = {target: single[method].get(target, there[0]) for target, there in named.items()}
        mine = active_predecessors(sources)
        mine = mine[mine["target"].map(place) == mine["module"]]
        parts[method] = _one_by_one(mine)
    modules = {
        target: MODULES if all_sites else tuple(dict.fromkeys(there))
        for target, there in named.items()
    }
    parts["exhaustive"] = _one_by_one(_every_active(chosen, modules, activations))
    cases, edits = concat_methods(parts)
    table = deactivate(suite, tokens, targets, cases, edits)
    keys = ["method", "target"]
    tried = table.groupby(keys).size().rename("tried")
    best = table.sort_values("change", kind="stable").drop_duplicates(keys, keep="last")
    best = best.set_index(keys)[["change", "success"]].join(tried)
    best = best.reindex(pd.MultiIndex.from_product([parts, chosen.index], names=keys))
    best.loc[best["tried"].isna()] = 0.0
    about = chosen[["layer", "feature", "dataset", "text"]]
    return best.reset_index().join(about, on="target").astype({"tried": int})


def _every_active(
    targets: "pd.DataFrame",
    modules: Mapping[int, Sequence[str]],
    activations: FeatureActivations,
) -> "pd.DataFrame":
    import pandas as pd

    parts = []
    for target in targets.itertuples():
        for module in modules[target.Index]:
            codes = activations.by_site[predecessor_site(target.layer, module)]
            indices, values = _at_token(codes, target.token_row)
            found = pd.DataFrame({"feature": indices, "activation": values})
            parts.append(found.assign(target=target.Index, module=module))
    return active_predecessors(pd.concat(parts, ignore_index=True))


def _one_by_one(predecessors: "pd.DataFrame") -> "tuple[pd.DataFrame, pd.DataFrame]":
    predecessors = predecessors.reset_index(drop=True)
    edits = predecessors.reset_index(names="case").assign(amount=-predecessors["activation"])
    return predecessors[["target"]].assign(r=0.0), edits[["case", "module", "feature", "amount"]]


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

    Args:
        suite: The suite.
        tokens: The texts of the sample.
        targets: As `draw_targets` gives.
        cases: As `removals` gives.
        edits: As `removals` gives.
        matches: A match table with forward matches.

    Returns:
        One row for each case and layer from the target's own on: the case's columns, `layer`,
        `text`, `dataset`, `above` (layers above the target), `descendant`, `old`, `new`, `change`
        and `success`.
    """
    import pandas as pd

    forward = matches[
        (matches["direction"] == "forward") & (matches["module"] == "res") & (matches["rank"] == 1)
    ]
    onward = {
        int(layer): part.set_index("source")["feature"]
        for layer, part in forward.groupby("source_layer")
    }
    where = targets.loc[cases["target"]].reset_index(drop=True)
    tables = []
    for layer, rows in where.groupby("layer").indices.items():
        read = [TARGET]
        while layer + len(read) - 1 in onward:
            read.append((len(read), "res"))
        own = edits[edits["case"].isin(rows)]
        own = own.assign(case=np.searchsorted(rows, own["case"]))
        here = where.iloc[rows].reset_index(drop=True)
        outcome = intervene(suite, tokens, here[["text", "position", "layer"]], own, read)
        feature = here["feature"]
        for shift, module in read:
            if shift:
                feature = feature.map(onward[layer + shift - 1]).fillna(-1).astype(int)
            alive = np.flatnonzero(feature >= 0)
            old, new = outcome.activations(feature.to_numpy()[alive], (shift, module), alive)
            part = cases.iloc[rows[alive]].reset_index(drop=True)
            part = part.join(here.iloc[alive][["layer", "text", "dataset"]].reset_index(drop=True))
            part = part.assign(above=shift, descendant=feature.to_numpy()[alive], old=old, new=new)
            part = part.assign(change=_change(old, new), success=_success(old, new))
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

    Args:
        table: As `deactivate` gives.
        by: Columns within which rates are taken, such as `method` and `group`.
        tokens: The sample's tokens, from whose texts resamples are drawn.
        times: Resamples.
        seed: Of these.

    Returns:
        One row a group: `by`, `n`, `inactive` (targets that were not active, which are not among
        the n), `success` and `change` with `_low` and `_high`, and likewise `loss_change` if the
        table has it.
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
