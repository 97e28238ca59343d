"""Themes to steer for: which features, which prompt; those of the paper, or found by a rule."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations import FeatureActivations
from flowhelpers.features import FeatureId, Site
from flowhelpers.flow import FlowGraph
from flowhelpers.judging import check_theme
from flowhelpers.labels import subject_scores

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Theme:
    """A theme.

    Attributes:
        name: What a judge behind an endpoint is told.
        subject: The subject of the package's passages that it is nearest to, for the embedded
            judge; None where there is none.
        seeds: The features that flow graphs start from.
    """

    name: str
    subject: str | None
    seeds: tuple[str, ...]


def theme_features(
    activations: FeatureActivations,
    subjects: Sequence[str],
    theme: str,
    sites: Iterable[Site] | None = None,
) -> "pd.DataFrame":
    """How well each feature tells the passages on a theme from others: a label that is measured.

    Every second passage of a subject is for choosing, the others are for seeing what the choice is
    worth.

    Args:
        activations: Of passages.
        subjects: The subject of each passage.
        theme: The theme, one of them.
        sites: The sites whose features are asked for; all that were read unless given.

    Returns:
        One row a feature, best first: `feature`, `layer`, `module`, `auc` and `share` (as
        `labels.subject_scores`, on the half for choosing) and `auc_other`, `share_other`.

    Raises:
        ValueError: If there is no passage on the theme.
    """
    import pandas as pd

    check_theme(theme)
    names = pd.Series(list(subjects))
    on_theme = (names == theme).to_numpy()
    half = (names.groupby(names).cumcount() % 2 == 0).to_numpy()
    parts = []
    for site in sites or activations.by_site:
        mine, other = (subject_scores(activations, site, on_theme, h) for h in (half, ~half))
        frame = mine.join(other, rsuffix="_other")
        frame.insert(
            0, "feature", [str(FeatureId(site.layer, site.module, i)) for i in frame.index]
        )
        parts.append(frame.assign(layer=site.layer, module=site.module))
    found = pd.concat(parts, ignore_index=True)
    return found.sort_values(["auc", "share"], ascending=False, kind="stable", ignore_index=True)


def keep_nodes(graph: FlowGraph, features: Iterable[str]) -> FlowGraph:
    """The graph without nodes that are not named: what the paper does by hand, with labels in view.

    Seeds stay. Edges stay where both ends do.

    Raises:
        ValueError: If nothing is left.
    """
    kept = {*features, *graph.seeds}
    nodes = graph.nodes[graph.nodes["feature"].isin(kept)].reset_index(drop=True)
    both = graph.edges["source"].isin(kept) & graph.edges["target"].isin(kept)
    if nodes.empty:
        raise ValueError("no node of the graph is left")
    return replace(graph, nodes=nodes, edges=graph.edges[both].reset_index(drop=True))


def clearest_themes(features: "dict[str, pd.DataFrame]", n: int, best: int = 8) -> list[str]:
    """The themes that have the feature most their own.

    By the largest share of a feature's activation that is on the theme, of the `best` features that
    tell the theme best, on the half of the passages that these were not chosen on.

    Args:
        features: `theme_features` of each theme.
        n: How many themes.
        best: Features of each theme that count.
    """
    share = {theme: table["share_other"].head(best).max() for theme, table in features.items()}
    order = np.argsort([-value for value in share.values()], kind="stable")
    return [list(share)[place] for place in order[:n]]
