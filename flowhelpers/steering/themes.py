"""Themes to steer for: those of the paper or of the passages, their judges and their features."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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


# The paper's themes, and what the package's passages call them.
PAPER = {
    "Anger": "anger",
    "Mental health": "illness",
    "Wedding": "weddings",
    "Religion": "religion",
    "Scientific concepts and entities": "particle_physics",
    "Research methodology and experimentation": "experiments",
}
LETTERS = {"particle_physics": "b", "experiments": "c"}  # in the paper's prompt for suppression


class Theme(NamedTuple):
    """A theme of texts."""

    name: str  # what a judge behind an endpoint is told
    subject: str  # that of the package's passages, which the embedded judge looks for


def theme_of(name: str) -> Theme:
    """One of the paper's themes, or a subject of the package's passages; else a ValueError."""
    check_choice("theme", name, [*subjects(), *PAPER])
    return Theme(name, PAPER.get(name, name))


def judge_of(
    theme: Theme, model: Model, /, kind: str = "embedded", task: str = "promote", seed: int = 0,
    **endpoint: Any,
) -> EmbeddedJudge | EndpointJudge:  # fmt: skip
    """The judge of a theme: `embedded`, or `endpoint` for a language model behind an endpoint.

    The embedded judge needs the unsteered model and a seed. The endpoint judge needs the task, and
    takes `model`, `base_url` and so on as `EndpointJudge`; to suppress, the theme has to be one of
    which the paper's prompt asks.
    """
    check_choice("judge", kind, ("embedded", "endpoint"))
    if kind == "embedded":
        return embedded_judge(model, theme.subject, seed)
    subject = LETTERS.get(theme.subject) if task == "suppress" else None
    return EndpointJudge(theme.name, task, subject=subject, **endpoint)


def theme_features(
    activations: FeatureActivations, topics: Sequence[str], theme: str, sites: Iterable[Site] = ()
) -> "pd.DataFrame":
    """How well each feature tells the passages on a theme from others: a label that is measured.

    `topics` are the subjects of the passages; of each, every second passage is for choosing, the
    others for reporting.

    Returns:
        One row a feature, best first: `feature`, `layer`, `module`, `auc` and `share` (as
        `labels.subject_scores`, on the half for choosing) and `auc_other`, `share_other`.
    """
    import pandas as pd

    check_choice("theme", theme, subjects())
    names = pd.Series(list(topics))
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
