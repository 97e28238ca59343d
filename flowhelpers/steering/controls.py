"""Controls of steering: random features, equal norms, the difference of means, side effects."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.core.progress_bar import progress
from flowhelpers.steering.plans import Plan, SteeringVectors, steering_vectors
from flowhelpers.steering.steered_texts import row_edits
from flowhelpers.suites.attention import attention_output
from flowhelpers.suites.model import Activations, Edit, Model, logits_of, run_model, tokenize

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

P = TypeVar("P", Plan, SteeringVectors, Plan | SteeringVectors)
NEAREST = 20
MAX_TOKENS = 64  # that each text is cut to, BOS included
ROWS = 64  # of a pass
LOGITS = 2**28  # of a pass: 1 GiB in float32, a few times over


def random_feature_control(
    suite: "Suite",
    plan: Plan,
    activations: FeatureActivations,
    seed: int = 0,
    nearest: int = NEAREST,
) -> Plan:
    """The plan with random features in place of its own (CHOICES 37).

    Each is drawn from the `nearest` features of its site whose share of active tokens is closest to
    that of the one that it stands for; none is in the plan, or drawn twice. A control that adds has
    the norm of the plan at every site; one that rescales has the same r.

    Args:
        suite: Of the plan.
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
    taken = {site: set(suite.sae(site).excluded.tolist()) for site in {f.site for f in features}}
    for feature in features:
        taken[feature.site].add(feature.index)
        if feature.site not in activations.by_site:
            raise ValueError(f"the sample was not read at {feature.site}, where {feature} lies")
    steps = []
    for step, feature in zip(plan.steps, features, strict=True):
        site = feature.site
        if site not in shares:
            shares[site] = np.asarray((activations.by_site[site] > 0).mean(axis=0)).ravel()
        distance = np.abs(shares[site] - shares[site][feature.index])
        free = [i for i in np.argsort(distance, kind="stable").tolist() if i not in taken[site]]
        if not free:
            raise ValueError(f"no feature of {site} is left to stand for {feature}")
        drawn = int(rng.choice(free[:nearest]))
        taken[site].add(drawn)
        steps.append(replace(step, feature=f"{site}/{drawn}"))
    control = replace(plan, steps=tuple(steps), about=f"random features of seed {seed}")
    if plan.kind == "rescale":
        return control
    own, other = steering_vectors(suite, plan), steering_vectors(suite, control)
    factor = {
        at: float(own[at].norm() / other[at].norm()) if other[at].any() else 1.0 for at in own
    }
    sites = [suite.sae(feature.site).input_site for feature in features]
    steps = [
        replace(step, scale=step.scale * factor[at]) for step, at in zip(steps, sites, strict=True)
    ]
    return replace(control, steps=tuple(steps))


def scale_plan(plan: P, factor: float) -> P:
    """The plan with a change so many times as large: s times the factor, or r - 1 times it."""
    if not isinstance(plan, Plan):
        return {at: vector * factor for at, vector in plan.items()}  # pyright: ignore[reportReturnType]
    rest = 1.0 if plan.kind == "rescale" else 0.0
    steps = (replace(s, strength=rest + (s.strength - rest) * factor) for s in plan.steps)
    return replace(plan, steps=tuple(steps))


def total_norm(suite: "Suite", plan: Plan | SteeringVectors) -> float:
    """Σ‖Δh‖ of a plan that adds, in the stream: what is added at z goes through W_O and the gain.

    Raises:
        ValueError: If the plan is of another suite, or rescales.
    """
    vectors = steering_vectors(suite, plan) if isinstance(plan, Plan) else plan
    return sum(float(_in_stream(suite.model, at, v[None])[0].norm()) for at, v in vectors.items())


@torch.no_grad()
def difference_of_means(
    model: Model,
    site: Site,
    texts: Sequence[str],
    others: Sequence[str],
) -> Float[Tensor, "d_model"]:
    """The mean of the stream at the tokens of some texts, less that of others (AxBench's DiffMean).

    Args:
        model: The model.
        site: Where.
        texts: Texts of the theme.
        others: Texts of none.

    Raises:
        ValueError: If one of the two has no text, or both have the same mean.
    """
    means = []
    for group in (texts, others):
        total, n = torch.zeros(model.d_model, device=model.device), 0
        for start in progress(range(0, len(group), ROWS), "means"):
            tokens = tokenize(model, group[start : start + ROWS], MAX_TOKENS)
            _, read = run_model(model, tokens.ids, [site], stop_after=site.layer)
            total += read[site][tokens.is_text].float().sum(0)
            n += int(tokens.is_text.sum())
        if not n:
            raise ValueError(f"{len(texts)} texts of the theme and {len(others)} others: no token")
        means.append(total / n)
    if torch.equal(*means):
        raise ValueError(f"texts of the theme and others have the same mean at {site}")
    return means[0] - means[1]


@torch.no_grad()
def side_effects(
    suite: "Suite",
    plans: Mapping[str, Plan | SteeringVectors | None],
    texts: Sequence[str],
) -> "pd.DataFrame":
    """What plans do to given texts, such as neutral ones.

    Args:
        suite: Of the plans.
        plans: Plans, or vectors to be added, by name; None for no edit.
        texts: The texts.

    Returns:
        One row a plan: `plan`, `norm` (Σ‖Δh‖: the norm of each edit's step in the stream, summed
        over the sites, mean over tokens) and `kl` (KL(unsteered ‖ steered) of the next token in
        nats, mean over tokens).

    Raises:
        ValueError: If there is no plan or text, or a plan is of another suite.
        FloatingPointError: If a plan makes logits infinite or NaN; it names the plan.
    """
    import pandas as pd

    if not plans or not texts:
        raise ValueError(f"{len(plans)} plans and {len(texts)} texts: expected 1 or more of each")
    model, names = suite.model, list(plans)
    rows = max(1, min(ROWS, LOGITS // (MAX_TOKENS * model.unembedding.shape[1])))
    norms, kls = torch.zeros(2, len(names), dtype=torch.float64)
    n_tokens = 0
    for at in progress(range(0, len(texts), rows), "side effects"):
        piece = texts[at : at + rows]
        tokens = tokenize(model, piece, MAX_TOKENS)
        clean = logits_of(model, tokens.ids).float().log_softmax(-1)
        n_tokens += int(tokens.is_text.sum())
        plans_per_pass = max(1, rows // len(piece))
        for start in range(0, len(names), plans_per_pass):
            batch = names[start : start + plans_per_pass]
            ids, is_text = (part.repeat(len(batch), 1) for part in (tokens.ids, tokens.is_text))
            step_norms: list[Float[Tensor, "rows"]] = []
            edits = row_edits(suite, [plans[name] for name in batch], len(piece))
            measured = [_measured(model, edit, is_text, step_norms) for edit in edits]
            steered = logits_of(model, ids, measured).float().log_softmax(-1)
            for number, name in enumerate(batch):
                of_plan = slice(number * len(piece), (number + 1) * len(piece))
                if not torch.isfinite(steered[of_plan]).all():
                    raise FloatingPointError(f"plan {name!r}: logits are no longer finite")
                kl = (clean.exp() * (clean - steered[of_plan])).sum(-1)
                kls[start + number] += float(kl[tokens.is_text].double().sum())
                norms[start + number] += sum(float(n[of_plan].double().sum()) for n in step_norms)
    return pd.DataFrame(
        {"plan": names, "norm": (norms / n_tokens).numpy(), "kl": (kls / n_tokens).numpy()}
    )


def _measured(
    model: Model,
    edit: Edit,
    is_text: Bool[Tensor, "rows position"],
    step_norms: list[Float[Tensor, "rows"]],
) -> Edit:
    """The edit, which also notes the norm of its step, summed over the tokens of each row."""

    def change(activations: Activations) -> Activations:
        changed = edit.change(activations)
        step = (changed - activations).float().flatten(0, 1)
        norms = _in_stream(model, edit.site, step).norm(dim=-1).view(is_text.shape)
        step_norms.append((norms * is_text).sum(1))
        return changed

    return Edit(edit.site, change)


def _in_stream(
    model: Model, site: Site, steps: Float[Tensor, "n d_in"]
) -> Float[Tensor, "n d_model"]:
    if site.module != "z":
        return steps.float()
    return attention_output(model, site.layer).to_residual(steps)
