"""Where active features come from: the groups of the paper's 5.1 and their shares.

Every active residual feature at every token falls into one of eight groups, by which of its
predecessors (its matches in the stream before, the MLP and attention) are active at that token.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flowhelpers.core.features import MODULES, Site

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.groups.occurrences import Occurrences

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import predecessor_site

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

GROUPS = (
    "From nowhere",
    "From RES",
    "From MLP",
    "From ATT",
    "From RES & MLP",
    "From RES & ATT",
    "From MLP & ATT",
    "From RES & MLP & ATT",
)
_OF_BITS = np.array([GROUPS.index(name) for name in (
    "From nowhere", "From RES", "From MLP", "From RES & MLP",
    "From ATT", "From RES & ATT", "From MLP & ATT", "From RES & MLP & ATT",
)])  # fmt: skip


@dataclass(frozen=True)
class Occurrences:
    """Active residual features at the tokens of a sample, each with its group.

    Attributes:
        suite: The suite's name.
        method: How predecessors were matched.
        top_n: How many matches a predecessor stands for.
        tokens: The tokens: `text`, `position`, `token` and `dataset` (`all` if there are none).
        table: One row for each active (feature, token): `dataset`, `text`, `layer`, `feature`,
            `token_row` (row of `tokens`), `activation`; for each module `res`, `mlp`, `att`
            whether a predecessor there is active, the score `s_res` … of the best and the share
            `rate_res` … of all tokens on which one is; and `group`. At a layer that lacks a site,
            as layer 0 does, its score is missing.
    """

    suite: str
    method: str
    top_n: int
    tokens: "pd.DataFrame"
    table: "pd.DataFrame"

    @property
    def sample(self) -> str:
        """The suite and what was read, in a line."""
        texts = self.tokens.drop_duplicates("text")
        per_set = texts["dataset"].value_counts(sort=False)
        sizes = ", ".join(f"{name} {n:,}" for name, n in per_set.items())
        tokens = f"{len(self.tokens):,} tokens of {len(texts):,} texts ({sizes})"
        return f"suite {self.suite} · {tokens}"

    def __str__(self) -> str:
        """The sample, the matches, and how many occurrences there are at complete layers."""
        n = len(complete_layers(self.table))
        return f"{self.sample} · {self.method} top-{self.top_n} · n = {n:,} occurrences"


def find_occurrences(
    matches: "pd.DataFrame",
    activations: FeatureActivations,
    top_n: int = 1,
    incomplete: bool = False,
    predecessors: FeatureActivations | None = None,
) -> Occurrences:
    """Every active residual feature at every token, with its predecessors' activity (paper 5.1).

    A predecessor is a match at a site, active at the same token; of several matches one that is
    active is enough (CHOICES 32). Layers that lack one of the three sites are left out unless asked
    for, layer 0 always among them: it has no residual predecessor (CHOICES 5).

    Args:
        matches: A match table, by any method.
        activations: Activations at all sites.
        top_n: How many matches of each feature and site are its predecessors.
        incomplete: Whether layers that lack one or two sites are in it; their groups are those of
            the sites that there are.
        predecessors: What predecessors do, if it is not what they do at the same token, as
            `elsewhere` gives.

    Raises:
        ValueError: If no layer has all three sites and `incomplete` ones are not asked for, the
            activations lack a site of the table, or the table has fewer ranks than `top_n`.
    """
    import pandas as pd

    ranks = int(matches["rank"].max())
    if not isinstance(top_n, int) or not 1 <= top_n <= ranks:
        raise ValueError(f"top_n={top_n}: expected 1 to {ranks}, the table's ranks")
    chosen = matches[(matches["direction"] == "backward") & (matches["rank"] <= top_n)]
    by_place = {
        (int(layer), str(module)): part.sort_values(["feature", "rank"])
        for (layer, module), part in chosen.groupby(["layer", "module"], observed=True)
    }
    layers = sorted({layer for layer, _ in by_place})
    complete = [layer for layer in layers if all((layer, module) in by_place for module in MODULES)]
    if not (complete or incomplete):
        raise ValueError("no layer has predecessors at all three of res, mlp and att")
    sources = predecessors or activations
    sites = {predecessor_site(layer, module) for layer, module in by_place}
    sites |= {Site(layer, "res") for layer in layers}
    if missing := sorted(sites - set(sources.by_site)):
        raise ValueError(
            f"no activations at {', '.join(map(str, missing))}, of which the match table speaks"
        )
    tokens = with_dataset(activations.tokens)
    parts = []
    for layer in layers if incomplete else complete:
        codes = activations.by_site[Site(layer, "res")].tocoo()
        columns: dict[str, np.ndarray] = {
            "layer": np.full(codes.nnz, layer, np.int16),
            "feature": codes.col.astype(np.int32),
            "token_row": codes.row.astype(np.int32),
            "activation": codes.data,
        }
        for module in MODULES:
            part = by_place.get((layer, module))
            if part is None:
                columns[module] = np.zeros(codes.nnz, dtype=bool)
                columns[f"s_{module}"] = columns[f"rate_{module}"] = np.full(codes.nnz, np.nan)
                continue
            width = codes.shape[1]
            site = predecessor_site(layer, module)
            chosen_there = part["source"].to_numpy().reshape(width, -1)
            active = _any_active(sources.by_site[site], chosen_there)
            columns[module] = np.asarray(active[codes.row, codes.col]).ravel() > 0
            best = part["score"].to_numpy().reshape(width, -1)[:, 0]
            columns[f"s_{module}"] = best[codes.col]
            columns[f"rate_{module}"] = active.getnnz(axis=0)[codes.col] / active.shape[0]
        parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    table["group"] = group_names(table)
    for place, column in enumerate(("dataset", "text")):
        table.insert(place, column, tokens[column].to_numpy()[table["token_row"]])
    names = list(dict.fromkeys(tokens["dataset"]))
    table["dataset"] = pd.Categorical(table["dataset"], categories=names)
    suite, method = (str(matches[column].iloc[0]) for column in ("suite", "method"))
    return Occurrences(suite, method, top_n, tokens, table)


def modules_of(group: str) -> tuple[str, ...]:
    """Where a feature of a group has an active predecessor: of `res`, `mlp` and `att`."""
    return tuple(module for module in MODULES if module.upper() in group)


def group_names(active: "Mapping[str, np.ndarray] | pd.DataFrame") -> "pd.Categorical":
    """The group of each row, by whether a predecessor is active at `res`, `mlp` and `att`."""
    import pandas as pd

    bits = sum(np.asarray(active[m]).astype(int) << bit for bit, m in enumerate(MODULES))
    return pd.Categorical.from_codes(_OF_BITS[bits], categories=list(GROUPS))


def with_dataset(tokens: "pd.DataFrame") -> "pd.DataFrame":
    """Tokens with the `dataset` they are of: `all` unless they say."""
    return tokens if "dataset" in tokens else tokens.assign(dataset="all")


def _any_active(codes: "csr_matrix", sources: np.ndarray) -> "csr_matrix":
    """On which tokens one of each feature's sources is active: `[tokens, features]`, sparse.

    Args:
        codes: Activations at the sources' site, `[tokens, sources]`.
        sources: Each feature's sources, `[features, top_n]`; -1 where there is none.
    """
    from scipy.sparse import csr_matrix

    features, ranks = np.nonzero(sources >= 0)
    ones = np.ones(len(features), np.int32)
    shape = (codes.shape[1], len(sources))
    chosen = csr_matrix((ones, (sources[features, ranks], features)), shape=shape)
    return (codes > 0).astype(np.int32) @ chosen


def shuffled_tokens(activations: FeatureActivations, seed: int = 0) -> FeatureActivations:
    """The same activations, each token's replaced by those of a token of another text.

    What the groups are with these predecessors is the base rate that the paper leaves out: how
    often would a feature that is active just as often, but has nothing to do with this token, be
    found active where a predecessor was looked for? Only the feature itself, elsewhere, is as often
    active to the token; the token comes from the same dataset, and is the same for all sites.

    Args:
        activations: Activations at all sites.
        seed: Decides which token stands in for which.
    """
    rng = np.random.default_rng(seed)
    tokens = with_dataset(activations.tokens)
    rows = np.arange(len(tokens))
    for _, part in tokens.groupby("dataset", sort=False, observed=True):
        texts = rng.permutation(part["text"].unique())
        order = {text: place for place, text in enumerate(texts)}
        here = part.index.to_numpy()[np.argsort(part["text"].map(order), kind="stable")]
        longest = int(part["text"].value_counts().max())
        # So far apart in this order no two tokens are of one text, if there are texts enough.
        furthest = max(longest, len(here) - longest)
        rows[here] = np.roll(here, int(rng.integers(longest, furthest + 1)))
    by_site = {site: codes[rows] for site, codes in activations.by_site.items()}
    return FeatureActivations(activations.tokens, by_site)


def group_shares(found: Occurrences, by: Sequence[str] = ("dataset",)) -> "pd.DataFrame":
    """How the occurrences are spread over the groups (Figures 5 and 12a).

    Args:
        found: Occurrences.
        by: Columns within each of whose values the shares add up to one, such as `dataset`,
            `layer`, or both. Layers that lack a site count only where `layer` is among them.

    Returns:
        One row a group in each: `n`, `features` (unique ones), `share` of the occurrences, and
        `unique_share` of the unique features; shares of an empty group are missing, not 0.
    """
    import pandas as pd

    table = found.table if "layer" in by else complete_layers(found.table)
    keys = [*by, "group"]
    cells = table.groupby(keys, observed=False)
    n = cells.size().rename("n")
    unique = table[[*dict.fromkeys([*keys, "layer", "feature"])]].drop_duplicates()
    features = unique.groupby(keys, observed=False).size().rename("features")
    both = pd.concat([n, features], axis=1)
    if not by:
        shares = both / both.sum()
    else:
        shares = both / both.groupby(level=list(range(len(by))), observed=False).transform("sum")
    both["share"], both["unique_share"] = (shares[c].where(both["n"] > 0) for c in shares)
    return both.reset_index()


def complete_layers(table: "pd.DataFrame") -> "pd.DataFrame":
    """The occurrences at layers that have all three sites."""
    return table[table[[f"s_{module}" for module in MODULES]].notna().all(axis=1)]


def group_transition(found: Occurrences) -> "pd.DataFrame":
    """Of the features ever seen in one group, the share also seen in another (Figure 13).

    Features of all complete layers count together (CHOICES 8).

    Returns:
        A matrix: from each group (row) to each (column); a row is missing where a group is empty.
    """
    import pandas as pd

    return pd.DataFrame(
        transition_of(seen_in_groups(complete_layers(found.table))), index=GROUPS, columns=GROUPS
    )


def seen_in_groups(table: "pd.DataFrame") -> np.ndarray:
    """Which features were seen in which group: `[features, groups]`."""
    features = table.groupby(["layer", "feature"]).ngroup().to_numpy()
    seen = np.zeros((features.max(initial=-1) + 1, len(GROUPS)), dtype=bool)
    seen[features, table["group"].cat.codes.to_numpy()] = True
    return seen


def transition_of(seen: np.ndarray) -> np.ndarray:
    """Of the features seen in each group, the share seen in each other: `[groups, groups]`."""
    both = seen.T.astype(float) @ seen.astype(float)
    members = both.diagonal()[:, None]
    return np.divide(both, members, out=np.full_like(both, np.nan), where=members > 0)


def group_profiles(found: Occurrences) -> "pd.DataFrame":
    """For each feature, which groups it falls into, and how evenly (asked for in the paper's C.1).

    Returns:
        One row a feature: `layer`, `feature`, `n` (occurrences), the share in each group by its
        name, `main` (the most frequent group), `main_share`, and `entropy` of the shares in bits,
        from 0 (always the same) to 3 (all eight alike).
    """
    import pandas as pd

    table = complete_layers(found.table)
    counts = table.groupby(["layer", "feature", "group"], observed=False).size().unstack("group")
    counts = counts[counts.sum(axis=1) > 0]
    shares = counts.div(counts.sum(axis=1), axis=0)
    logs = np.log2(shares.to_numpy(), where=shares.to_numpy() > 0, out=np.zeros(shares.shape))
    frame = pd.DataFrame(shares.to_numpy(), index=shares.index, columns=list(GROUPS))
    frame.insert(0, "n", counts.sum(axis=1))
    frame["main"] = shares.idxmax(axis=1).astype(str)
    frame["main_share"] = shares.max(axis=1)
    frame["entropy"] = -(shares.to_numpy() * logs).sum(axis=1) + 0.0
    return frame.reset_index()


def single_source_points(
    found: Occurrences, layers: Sequence[int], n: int = 350, seed: int = 0
) -> "pd.DataFrame":
    """Features of "From nowhere" and of the groups with one source, for Figure 3.

    Args:
        found: Occurrences.
        layers: Of which layers.
        n: The most features of a layer; each (feature, group) stands once.
        seed: Decides which.

    Returns:
        `layer`, `feature`, `group`, `s_res`, `s_mlp`, `s_att`.

    Raises:
        ValueError: If a layer is not among the complete ones.
    """
    import pandas as pd

    table = complete_layers(found.table)
    there = sorted(table["layer"].unique().tolist())
    if not set(layers) <= set(there):
        raise ValueError(f"layers {list(layers)}: expected some of {', '.join(map(str, there))}")
    columns = ["layer", "feature", "group", *(f"s_{module}" for module in MODULES)]
    table = table.loc[table["group"].isin(GROUPS[:4]), columns]
    table = table.drop_duplicates(["layer", "feature", "group"])
    parts = [table[table["layer"] == layer] for layer in layers]
    parts = [part.sample(min(n, len(part)), random_state=seed) for part in parts]
    return pd.concat(parts).sort_values(["layer", "group", "feature"], ignore_index=True)


def score_histograms(
    found: Occurrences, layers: Sequence[int], bins: int = 20, smallest: int = 20
) -> "pd.DataFrame":
    """How the scores of each group are distributed at a few layers, for Figure 12 b.

    Returns:
        `layer`, `score`, `group`, `n`, `at` (the middle of a bin) and `density`; groups with fewer
        members than `smallest` are left out.
    """
    import pandas as pd

    table = complete_layers(found.table)
    frames = []
    for layer in layers:
        here = table[table["layer"] == layer]
        for score in (f"s_{module}" for module in MODULES):
            edges = np.linspace(min(0.0, here[score].min()), 1, bins + 1)
            for group, part in here.groupby("group", observed=True):
                if len(part) >= smallest:
                    density, _ = np.histogram(part[score], edges, density=True)
                    middles = (edges[1:] + edges[:-1]) / 2
                    frame = {"layer": layer, "score": score, "group": group, "n": len(part)}
                    frames.append(pd.DataFrame(frame | {"at": middles, "density": density}))
    columns = ["layer", "score", "group", "n", "at", "density"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def youden_thresholds(found: "Occurrences") -> dict[tuple[int, str], float]:
    """The score that best parts active from inactive predecessors, for each layer and site.

    It is the cut of highest Youden's J (share of active above minus share of inactive above).
    A layer and site whose predecessors are all active, or none, has no cut.

    Args:
        found: Active features with their predecessors' activity.
    """
    import numpy as np
    from sklearn.metrics import roc_curve

    cuts = {}
    for layer, part in found.table.groupby("layer"):
        for module in MODULES:
            active, score = part[module].to_numpy(), part[f"s_{module}"].to_numpy()
            if active.all() or not active.any() or np.isnan(score).all():
                continue
            false, true, limits = roc_curve(active, score)
            best = int(np.argmax(true - false))
            # roc_curve counts scores equal to its limit as above; here high is strictly above.
            cuts[int(layer), module] = float(np.nextafter(min(limits[best], 1.0), -1))
    return cuts
