"""Themes to steer for: those of the paper or of the passages, their judges and their features."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flowhelpers.activations.corpora import subjects
from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site, suggestion
from flowhelpers.labels.describe import subject_scores
from flowhelpers.steering.judge_embedded import EmbeddedJudge, check_theme, embedded_judge
from flowhelpers.steering.judge_endpoint import EndpointJudge, endpoint_judge
from flowhelpers.suites.model import Model

if TYPE_CHECKING:
    import pandas as pd


JUDGES = ("embedded", "endpoint")


@dataclass(frozen=True)
class Theme:
    """A theme.

    Attributes:
        name: What it is called, and what a judge behind an endpoint is told.
        subject: The subject of the package's passages that is nearest to it, which the embedded
            judge looks for.
        letter: The subject of the paper's prompt for suppression that it is; empty for none.
    """

    name: str
    subject: str
    letter: str = ""


PAPER = {
    theme.name: theme
    for theme in (
        Theme("Anger", "anger"),
        Theme("Mental health", "illness"),
        Theme("Wedding", "weddings"),
        Theme("Religion", "religion"),
        Theme("Scientific concepts and entities", "particle_physics", "b"),
        Theme("Research methodology and experimentation", "experiments", "c"),
    )
}


def theme_of(name: str) -> Theme:
    """One of the paper's themes, or a subject of the package's passages as a theme.

    Raises:
        ValueError: If there is neither; the message names the nearest.
    """
    if name in PAPER:
        return PAPER[name]
    if name not in subjects():
        known = [*subjects(), *PAPER]
        raise ValueError(f"unknown theme {name!r}{suggestion(name, known)}")
    letters = {theme.subject: theme.letter for theme in PAPER.values() if theme.letter}
    return Theme(name, name, letters.get(name, ""))


def judge_of(
    theme: Theme,
    model: Model,
    /,  # so that the endpoint's `model` can be given by its name
    kind: str = "embedded",
    task: Literal["promote", "suppress"] = "promote",
    seed: int = 0,
    **endpoint: Any,
) -> EmbeddedJudge | EndpointJudge:
    """The judge of a theme.

    Args:
        theme: The theme.
        model: The unsteered model, whose likelihood of a text the embedded judge goes by.
        kind: `embedded`, or `endpoint` for a language model behind an OpenAI-compatible endpoint.
        task: What the endpoint is asked about.
        seed: Of the embedded judge.
        endpoint: As of `endpoint.endpoint_judge`: `model`, `base_url` and so on.

    Raises:
        ValueError: If the kind is unknown, or the paper's prompt for suppression does not ask for
            the theme.
        PermissionError: If the endpoint refuses the key.
        ConnectionError: If there is no endpoint.
    """
    if kind not in JUDGES:
        raise ValueError(f"unknown judge {kind!r}{suggestion(kind, JUDGES)}")
    if kind == "embedded":
        return embedded_judge(model, theme.subject, seed)
    if task == "suppress" and not theme.letter:
        asked = ", ".join(each.name for each in PAPER.values() if each.letter)
        raise ValueError(
            f"the paper's prompt for suppression does not ask for {theme.name}: {asked}"
        )
    subject = theme.letter if task == "suppress" else None
    return endpoint_judge(theme.name, task, subject=subject, **endpoint)


def theme_features(
    activations: FeatureActivations,
    of_passages: Sequence[str],
    theme: str,
    sites: Iterable[Site] | None = None,
) -> "pd.DataFrame":
    """How well each feature tells the passages on a theme from others: a label that is measured.

    Every second passage of a subject is for choosing, the others are for seeing what the choice is
    worth.

    Args:
        activations: Of passages.
        of_passages: The subject of each passage.
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
    names = pd.Series(list(of_passages))
    on_theme = (names == theme).to_numpy()
    half = (names.groupby(names).cumcount() % 2 == 0).to_numpy()
    parts = []
    for site in sites or activations.by_site:
        mine, other = (subject_scores(activations, site, on_theme, h) for h in (half, ~half))
        frame = mine.join(other, rsuffix="_other")
        frame.insert(0, "feature", [f"{site}/{i}" for i in frame.index])
        parts.append(frame.assign(layer=site.layer, module=site.module))
    found = pd.concat(parts, ignore_index=True)
    return found.sort_values(["auc", "share"], ascending=False, kind="stable", ignore_index=True)


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
