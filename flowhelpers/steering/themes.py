"""Themes to steer for, their judges, and features to steer: on a theme, and by what they do."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flowhelpers.activations.corpora import subjects
from flowhelpers.activations.preflight import preflight_once
from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import FeatureId, Site, check_choice
from flowhelpers.core.progress_bar import progress
from flowhelpers.interventions.edits import add_per_row
from flowhelpers.interventions.generation import prompt_ids
from flowhelpers.labels.describe import logit_lens, subject_scores
from flowhelpers.steering.judge_embedded import EmbeddedJudge, embedded_judge
from flowhelpers.steering.judge_endpoint import EndpointJudge
from flowhelpers.suites.model import Model, cache_prompt, run_model

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

PROMPT = "From my experience,"  # of Arad et al.
FACTOR, TOP = 10.0, 20
# The paper's themes, and what the package's passages call them.
PAPER = {
    "Anger and frustration": "anger",
    "Mental health issues": "illness",
    "Wedding and marriage": "weddings",
    "Religion and God": "religion",
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
        table = chosen_on.join(other.add_suffix("_other"))
        table.insert(0, "feature", [f"{site}/{i}" for i in table.index])
        tables.append(table.assign(layer=site.layer, module=site.module))
    table = pd.concat(tables, ignore_index=True)
    return table.sort_values(["auc", "share"], ascending=False, kind="stable", ignore_index=True)


@torch.no_grad()
def output_scores(
    suite: "Suite", features: Iterable[FeatureId | str], prompt: str = PROMPT, batch_size: int = 256
) -> "pd.DataFrame":
    """Output score and change of confidence of features (CHOICES 36).

    At the prompt's last token, `FACTOR` times the max activation of the site in the prompt is added
    to the feature. The output score (Arad et al. 2025, equation 3) looks at the `TOP` tokens of the
    feature's logit lens: (1 - rank / vocabulary) · p of the most likely of them. The change of
    confidence (Wang et al. 2026, with k = 1) is by how much -log p of the most likely token grows:
    below zero the feature makes the model surer.

    Returns:
        One row a feature: `feature`, `output_score` (0 to 1), `confidence_change` (nats), `token`
        (the most likely of the `TOP`); missing where nothing at the site is active in the prompt.
    """
    import pandas as pd

    by_site: dict[Site, list[int]] = {}
    for feature in (unique := suite.features(features)):
        by_site.setdefault(feature.site, []).append(feature.index)
    preflight_once(suite, by_site)
    model, ids = suite.model, prompt_ids(suite.model, prompt, 1)
    clean, stream = run_model(model, ids, [suite.sae(site).input_site for site in by_site])
    assert clean is not None
    confidence = clean[0, -1].float().log_softmax(-1).max()
    _, prefix = cache_prompt(model, ids[:, :-1])
    rows = []
    for site, indices in progress(by_site.items(), "effects"):
        sae = suite.sae(site)
        size = FACTOR * sae.encode(stream[sae.input_site][0, 1:]).max()
        if not size > 0:
            continue
        for chosen in torch.tensor(indices, device=ids.device).split(batch_size):
            step = size * sae.decoder_rows(chosen).float()
            edit = add_per_row(sae.input_site, torch.arange(len(chosen)), step)
            last = ids[:, -1:].expand(len(chosen), -1)
            steered, _ = run_model(model, last, edits=[edit], prefix=prefix)
            assert steered is not None
            logs = steered[:, -1].float().log_softmax(-1)
            written = logit_lens(suite, site, chosen).topk(TOP).indices
            best, place = logs.gather(1, written).max(1)
            scores = (1 - (logs > best[:, None]).sum(1) / logs.shape[1]) * best.exp()
            changes = confidence - logs.max(1).values
            tokens = model.tokenizer.batch_decode(written.gather(1, place[:, None]))
            names = [f"{site}/{index}" for index in chosen.tolist()]
            rows += zip(names, scores.tolist(), changes.tolist(), tokens, strict=True)
    columns = ["feature", "output_score", "confidence_change", "token"]
    table = pd.DataFrame(rows, columns=columns).set_index("feature").reindex(map(str, unique))
    return table.astype(dict.fromkeys(columns[1:3], float)).fillna({"token": ""}).reset_index()
