"""Themes to steer for: those of the paper or of the passages, their judges and their features."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flowhelpers.activations.corpora import subjects
from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.labels.describe import subject_scores
from flowhelpers.steering.judge_embedded import EmbeddedJudge, embedded_judge
from flowhelpers.steering.judge_endpoint import EndpointJudge
from flowhelpers.steering.plans import check_choice
from flowhelpers.suites.model import Model

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Theme:
    """A theme of texts."""

    name: str  # what a judge behind an endpoint is told
    subject: str  # that of the package's passages, which the embedded judge looks for
    letter: str = ""  # that of the subject in the paper's prompt for suppression


_THEMES = (
    Theme("Anger", "anger"),
    Theme("Mental health", "illness"),
    Theme("Wedding", "weddings"),
    Theme("Religion", "religion"),
    Theme("Scientific concepts and entities", "particle_physics", "b"),
    Theme("Research methodology and experimentation", "experiments", "c"),
)
PAPER = {theme.name: theme for theme in _THEMES}


def theme_of(name: str) -> Theme:
    """One of the paper's themes, or a subject of the package's passages; else a ValueError."""
    if name in PAPER:
        return PAPER[name]
    check_choice("theme", name, [*subjects(), *PAPER])
    letters = {theme.subject: theme.letter for theme in _THEMES}
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
    """The judge of a theme: `embedded`, or `endpoint` for a language model behind an endpoint.

    The embedded judge needs the unsteered model and a seed. The endpoint judge needs the task, and
    takes `model`, `base_url` and so on as `EndpointJudge`.

    Raises:
        ValueError: If the kind is unknown, or the paper's prompt for suppression does not ask for
            the theme; others as `EndpointJudge`.
    """
    check_choice("judge", kind, ("embedded", "endpoint"))
    if kind == "embedded":
        return embedded_judge(model, theme.subject, seed)
    if task == "suppress" and not theme.letter:
        asked = ", ".join(known.name for known in _THEMES if known.letter)
        raise ValueError(f"the paper's prompt to suppress does not ask for {theme.name}: {asked}")
    subject = theme.letter if task == "suppress" else None
    return EndpointJudge(theme.name, task, subject=subject, **endpoint)


def theme_features(
    activations: FeatureActivations,
    of_passages: Sequence[str],
    theme: str,
    sites: Iterable[Site] | None = None,
) -> "pd.DataFrame":
    """How well each feature tells the passages on a theme from others: a label that is measured.

    Every second passage of a subject is for choosing, the others for reporting.

    Args:
        activations: Of passages.
        of_passages: The subject of each passage.
        theme: A subject.
        sites: Of the features; all in `activations` unless given.

    Returns:
        One row a feature, best first: `feature`, `layer`, `module`, `auc` and `share` (as
        `labels.subject_scores`, on the half for choosing) and `auc_other`, `share_other`.

    Raises:
        ValueError: If there is no passage on the theme.
    """
    import pandas as pd

    check_choice("theme", theme, subjects())
    names = pd.Series(list(of_passages))
    on_theme = (names == theme).to_numpy()
    half = (names.groupby(names).cumcount() % 2 == 0).to_numpy()
    tables = []
    for site in sites or activations.by_site:
        chosen_on, other = (subject_scores(activations, site, on_theme, h) for h in (half, ~half))
        table = chosen_on.join(other, rsuffix="_other")
        table.insert(0, "feature", [f"{site}/{i}" for i in table.index])
        tables.append(table.assign(layer=site.layer, module=site.module))
    table = pd.concat(tables, ignore_index=True)
    return table.sort_values(["auc", "share"], ascending=False, kind="stable", ignore_index=True)


def clearest_themes(features: "dict[str, pd.DataFrame]", n: int, best: int = 8) -> list[str]:
    """The n themes with the largest `share_other` of one of their `best` features by AUC."""
    share = {theme: table["share_other"].head(best).max() for theme, table in features.items()}
    return sorted(share, key=lambda theme: -share[theme])[:n]
