"""Controls of steering: random features, equal norms, the difference of means, side effects."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
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
MAX_TOKENS, ROWS = 64, 64  # of each text, BOS included; of a pass
LOGITS = 2**28  # of a pass: 1 GiB in float32, a few times over


def random_feature_control(
    suite: "Suite", plan: Plan, activations: FeatureActivations, seed: int = 0, nearest: int = 20
) -> Plan:
    """The plan with random features in place of its own (CHOICES 37).

    Each is drawn from the `nearest` features of its site whose share of active tokens in a sample
    of text is closest to that of the feature it replaces; none is in the plan, or drawn twice. A
    control that adds has the norm of the plan at every site; one that rescales has the same r.

    Raises:
        ValueError: If a site is not in `activations`, or has too few features.
    """
    rng = np.random.default_rng(seed)
    features = [suite.feature(step.feature) for step in plan.steps]
    shares: dict[Site, np.ndarray] = {}
    taken: dict[Site, set[int]] = {}
    for site in dict.fromkeys(feature.site for feature in features):
        if site not in activations.by_site:
            raise ValueError(f"the sample was not read at {site}, where the plan has features")
        shares[site] = np.asarray((activations.by_site[site] > 0).mean(axis=0)).ravel()
        own = {feature.index for feature in features if feature.site == site}
        taken[site] = own | set(suite.sae(site).excluded.tolist())
    drawn = []
    for site, index in ((feature.site, feature.index) for feature in features):
        closest = np.argsort(np.abs(shares[site] - shares[site][index]), kind="stable").tolist()
        free = [i for i in closest if i not in taken[site]]
        if not free:
            raise ValueError(f"no feature of {site} is left to stand for {site}/{index}")
        number = int(rng.choice(free[:nearest]))
        taken[site].add(number)
        drawn.append(f"{site}/{number}")
    steps = tuple(replace(s, feature=f) for s, f in zip(plan.steps, drawn, strict=True))
    control = replace(plan, steps=steps, about=f"random features of seed {seed}")
    if plan.kind == "rescale":
        return control
    own, other = steering_vectors(suite, plan), steering_vectors(suite, control)
    factor = {at: float(own[at].norm() / other[at].norm()) if other[at].any() else 1 for at in own}
    factors = [factor[suite.sae(feature.site).input_site] for feature in features]
    steps = (replace(s, scale=s.scale * f) for s, f in zip(steps, factors, strict=True))
    return replace(control, steps=tuple(steps))


def scale_plan(plan: P, factor: float) -> P:
    """The plan with s, or r - 1, times the factor."""
    if not isinstance(plan, Plan):
        return cast("P", {at: vector * factor for at, vector in plan.items()})
    rest = 1.0 if plan.kind == "rescale" else 0.0
    steps = (replace(s, strength=rest + (s.strength - rest) * factor) for s in plan.steps)
    return replace(plan, steps=tuple(steps))


def total_norm(suite: "Suite", plan: Plan | SteeringVectors) -> float:
    """Σ‖Δh‖ of a plan that adds, in the stream: at z through W_O and the gain."""
    vectors = steering_vectors(suite, plan) if isinstance(plan, Plan) else plan
    return sum(float(_in_stream(suite.model, at, v[None])[0].norm()) for at, v in vectors.items())


@torch.no_grad()
def difference_of_means(
    model: Model, site: Site, texts: Sequence[str], others: Sequence[str]
) -> Float[Tensor, "d_model"]:
    """The mean of the stream at the tokens of texts on a theme, less that of others (AxBench).

    Raises:
        ValueError: If one of the two has no token, or both have the same mean.
    """
    means = []
    for group in (texts, others):
        total, n = torch.zeros(model.d_model, device=model.device), 0
        for start in progress(range(0, len(group), ROWS), "means"):
            tokens = tokenize(model, group[start : start + ROWS], MAX_TOKENS)
            _, stream = run_model(model, tokens.ids, [site], stop_after=site.layer)
            total += stream[site][tokens.is_text].float().sum(0)
            n += int(tokens.is_text.sum())
        if not n:
            raise ValueError(f"{len(texts)} texts of the theme and {len(others)} others: no token")
        means.append(total / n)
    if torch.equal(*means):
        raise ValueError(f"texts of the theme and others have the same mean at {site}")
    return means[0] - means[1]


@torch.no_grad()
def side_effects(
    suite: "Suite", plans: Mapping[str, Plan | SteeringVectors | None], texts: Sequence[str]
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
        ValueError: If there is no plan or text.
        FloatingPointError: If a plan makes logits infinite or NaN; it names the plan.
    """
    import pandas as pd

    if not plans or not texts:
        raise ValueError(f"{len(plans)} plans and {len(texts)} texts: expected 1 or more of each")
    model, names = suite.model, list(plans)
    rows = max(1, min(ROWS, LOGITS // (MAX_TOKENS * model.unembedding.shape[1])))
    sums = pd.DataFrame(0.0, index=names, columns=["norm", "kl"])
    n_tokens = 0
    for at in progress(range(0, len(texts), rows), "side effects"):
        n_texts = len(texts[at : at + rows])
        tokens = tokenize(model, texts[at : at + rows], MAX_TOKENS)
        clean = logits_of(model, tokens.ids).float().log_softmax(-1)
        n_tokens += int(tokens.is_text.sum())
        plans_per_pass = max(1, rows // n_texts)
        for start in range(0, len(names), plans_per_pass):
            batch = names[start : start + plans_per_pass]
            norms = torch.zeros(len(batch), *tokens.ids.shape, device=model.device)
            edits = row_edits(suite, [plans[name] for name in batch], n_texts)
            measured = [_measured(model, edit, norms) for edit in edits]
            logits = logits_of(model, tokens.ids.repeat(len(batch), 1), measured)
            steered = logits.float().log_softmax(-1).unflatten(0, (len(batch), n_texts))
            for name, norm, log_q in zip(batch, norms, steered, strict=True):
                if not torch.isfinite(log_q).all():
                    raise FloatingPointError(f"plan {name!r}: logits are no longer finite")
                kl = (clean.exp() * (clean - log_q)).sum(-1)
                both = [float(v[tokens.is_text].double().sum()) for v in (norm, kl)]
                sums.loc[name] += both
    return (sums / n_tokens).rename_axis("plan").reset_index()


def _measured(model: Model, edit: Edit, norms: Float[Tensor, "plan text position"]) -> Edit:
    """The edit, which also adds the norm of its step at each token to `norms`."""

    def change(activations: Activations) -> Activations:
        changed = edit.change(activations)
        step = (changed - activations).float().flatten(0, 1)
        norms.add_(_in_stream(model, edit.site, step).norm(dim=-1).view(norms.shape))
        return changed

    return Edit(edit.site, change)


def _in_stream(
    model: Model, site: Site, steps: Float[Tensor, "n d_in"]
) -> Float[Tensor, "n d_model"]:
    is_z = site.module == "z"
    return attention_output(model, site.layer).to_residual(steps) if is_z else steps.float()
