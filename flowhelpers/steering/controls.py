"""What steering has to be held against: random features, its norm, other ways, side effects."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.core.progress_bar import progress
from flowhelpers.steering.plans import Plan, SteeringVectors, Step, row_edits, steering_vectors
from flowhelpers.suites.attention import attention_output
from flowhelpers.suites.model import Activations, Edit, Model, logits_of, run_model, tokenize

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

NEAREST = 20
MAX_TOKENS = 64
ROWS = 64
LOGITS = 2**28  # of the texts of a pass: a GiB in float32, several times


def random_feature_control(
    suite: "Suite",
    plan: Plan,
    activations: FeatureActivations,
    seed: int = 0,
    nearest: int = NEAREST,
) -> Plan:
    """The plan with random features in place of its own (CHOICES 37).

    Each is drawn from the `nearest` features of its site whose share of active tokens is closest to
    that of the one that it stands for; none is in the plan, or drawn twice. A twin that adds writes
    the norm that the plan writes, at every site; one that rescales has the same r.

    Args:
        suite: The suite.
        plan: The plan.
        activations: Of a sample of text, at the plan's sites.
        seed: Decides the draw.
        nearest: From how many each is drawn.

    Raises:
        ValueError: If a site was not read, or has too few features.
    """
    rng = np.random.default_rng(seed)
    features = [suite.feature(step.feature) for step in plan.steps]
    shares: dict[Site, np.ndarray] = {}
    taken: dict[Site, set[int]] = {}
    for feature in features:
        site = feature.site
        if site not in activations.by_site:
            raise ValueError(f"the sample was not read at {site}, where {feature} lies")
        if site not in shares:
            shares[site] = np.asarray((activations.by_site[site] > 0).mean(axis=0)).ravel()
            taken[site] = set(suite.sae(site).excluded.tolist())
        taken[site].add(feature.index)
    steps = []
    for step, feature in zip(plan.steps, features, strict=True):
        share, out = shares[feature.site], taken[feature.site]
        order = np.argsort(np.abs(share - share[feature.index]), kind="stable")
        free = [index for index in order.tolist() if index not in out]
        if not free:
            raise ValueError(f"no feature of {feature.site} is left to stand for {feature}")
        twin = int(rng.choice(free[:nearest]))
        out.add(twin)
        steps.append(replace(step, feature=f"{feature.site}/{twin}"))
    found = replace(plan, steps=tuple(steps), about=f"random features of seed {seed}")
    if plan.kind == "rescale":
        return found
    norms = [_norms(steering_vectors(suite, each)) for each in (plan, found)]

    def resized(step: Step) -> Step:
        at = suite.sae(suite.feature(step.feature).site).input_site
        # Where strengths are 0, as at the end of a schedule, there is no norm to be had.
        factor = norms[0][at] / norms[1][at] if norms[1][at] else 1.0
        return replace(step, scale=step.scale * factor)

    return replace(found, steps=tuple(map(resized, found.steps)))


@overload
def scale_plan(plan: Plan, factor: float) -> Plan: ...
@overload
def scale_plan(plan: SteeringVectors, factor: float) -> SteeringVectors: ...
def scale_plan(plan: Plan | SteeringVectors, factor: float) -> Plan | SteeringVectors:
    """The plan with a change so many times as large: s times the factor, or r - 1 times it."""
    if not isinstance(plan, Plan):
        return {at: vector * factor for at, vector in plan.items()}
    rest = 1.0 if plan.kind == "rescale" else 0.0
    steps = (replace(s, strength=rest + (s.strength - rest) * factor) for s in plan.steps)
    return replace(plan, steps=tuple(steps))


def total_norm(suite: "Suite", plan: Plan | SteeringVectors) -> float:
    """Σ‖Δh‖ of a plan that adds: the norms of what it adds at each site, in the stream, summed.

    What is added at z is taken through W_O and the gain.

    Raises:
        ValueError: If the plan is of another suite, or rescales.
    """
    push = steering_vectors(suite, plan) if isinstance(plan, Plan) else plan
    return sum(float(_in_stream(suite.model, at, v[None])[0].norm()) for at, v in push.items())


@torch.no_grad()
def difference_of_means(
    model: Model,
    site: Site,
    texts: Sequence[str],
    others: Sequence[str],
    max_tokens: int = MAX_TOKENS,
) -> Float[Tensor, "d_model"]:
    """The mean of the stream at the tokens of some texts, less that of others (AxBench's DiffMean).

    Args:
        model: The model.
        site: Where.
        texts: Texts of the theme.
        others: Texts of none.
        max_tokens: Each text is cut to so many tokens, BOS included.

    Raises:
        ValueError: If one of the two has no text, or both have the same mean.
    """
    means = []
    for some in (texts, others):
        sums, n = torch.zeros(model.d_model, device=model.device), 0
        for start in progress(range(0, len(some), ROWS), "means"):
            tokens = tokenize(model, some[start : start + ROWS], max_tokens)
            _, read = run_model(model, tokens.ids, [site], stop_after=site.layer)
            sums += read[site][tokens.is_text].float().sum(0)
            n += int(tokens.is_text.sum())
        if not n:
            raise ValueError(f"{len(texts)} texts of the theme and {len(others)} others: no token")
        means.append(sums / n)
    found = means[0] - means[1]
    if not found.any():
        raise ValueError(f"texts of the theme and others have the same mean at {site}")
    return found


@torch.no_grad()
def side_effects(
    suite: "Suite",
    plans: Mapping[str, Plan | SteeringVectors | None],
    texts: Sequence[str],
    max_tokens: int = MAX_TOKENS,
    rows: int = ROWS,
) -> "pd.DataFrame":
    """What plans do to texts that are given, such as neutral ones.

    Args:
        suite: The suite.
        plans: Plans, or vectors to be added, by name; None for no edit.
        texts: The texts.
        max_tokens: Each text is cut to so many tokens, BOS included.
        rows: The most texts of a pass; fewer where the vocabulary is large.

    Returns:
        One row a plan: `plan`, `norm` (Σ‖Δh‖: the mean over tokens of the norm of each edit's step,
        in the stream, summed over the sites) and `kl` (mean over tokens of the divergence of the
        next token's distribution from the unsteered one, KL(unsteered ‖ steered), in nats).

    Raises:
        ValueError: If there is no plan or text, or a plan is of another suite.
        FloatingPointError: If a plan makes logits infinite or NaN; it names the plan.
    """
    import pandas as pd

    if not plans or not texts:
        raise ValueError(f"{len(plans)} plans and {len(texts)} texts: expected 1 or more of each")
    model, names = suite.model, list(plans)
    rows = max(1, min(rows, LOGITS // (max_tokens * model.unembedding.shape[1])))
    norms, kls = torch.zeros(2, len(names), dtype=torch.float64)
    pieces = [texts[start : start + rows] for start in range(0, len(texts), rows)]
    count = 0
    work = []
    for piece in pieces:
        together = max(1, rows // len(piece))
        work += [(piece, start, together) for start in range(0, len(names), together)]
    for piece, start, together in progress(work, "side effects"):
        some = names[start : start + together]
        if start == 0:
            tokens = tokenize(model, piece, max_tokens)
            clean = logits_of(model, tokens.ids).float().log_softmax(-1)
            count += int(tokens.is_text.sum())
        ids, is_text = (part.repeat(len(some), 1) for part in (tokens.ids, tokens.is_text))
        found: list[Float[Tensor, "rows"]] = []
        edits = row_edits(suite, [plans[name] for name in some], len(piece))
        measured = [_measured(model, edit, is_text, found) for edit in edits]
        steered = logits_of(model, ids, measured).float().log_softmax(-1)
        for number, name in enumerate(some):
            mine = slice(number * len(piece), (number + 1) * len(piece))
            own = steered[mine]
            if not torch.isfinite(own).all():
                raise FloatingPointError(f"plan {name!r}: logits are no longer finite")
            kl = (clean.exp() * (clean - own)).sum(-1)
            kls[start + number] += float(kl[tokens.is_text].double().sum())
            norms[start + number] += sum(float(part[mine].double().sum()) for part in found)
    return pd.DataFrame(
        {"plan": names, "norm": (norms / count).numpy(), "kl": (kls / count).numpy()}
    )


def _measured(
    model: Model,
    edit: Edit,
    is_text: Bool[Tensor, "rows position"],
    found: list[Float[Tensor, "rows"]],
) -> Edit:
    """The edit, that also notes the norm of its step, summed over the tokens of each row."""

    def change(activations: Activations) -> Activations:
        changed = edit.change(activations)
        step = (changed - activations).float().flatten(0, 1)
        norms = _in_stream(model, edit.site, step).norm(dim=-1).view(is_text.shape)
        found.append((norms * is_text).sum(1))
        return changed

    return Edit(edit.site, change)


def _in_stream(
    model: Model, site: Site, steps: Float[Tensor, "n d_in"]
) -> Float[Tensor, "n d_model"]:
    if site.module != "z":
        return steps.float()
    return attention_output(model, site.layer).to_residual(steps)


def _norms(push: SteeringVectors) -> dict[Site, float]:
    return {at: float(vector.float().norm()) for at, vector in push.items()}
