"""Controls of steering: random features, equal norms, the difference of means, side effects."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.activations.sampling import text_length
from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.core.progress_bar import progress
from flowhelpers.steering.plans import Plan, SteeringVectors, plan_edits, steering_vectors
from flowhelpers.steering.sweeps import SweepCell
from flowhelpers.suites.attention import attention_output
from flowhelpers.suites.model import Activations, Edit, Model, logits_of, run_model, tokenize

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

MAX_TOKENS = 64  # of each text, BOS included
ROWS, LOGITS = 64, 2**28  # of a pass: rows; logits, 1 GiB in float32, a few times over


def random_feature_control(
    suite: "Suite", plan: Plan, activations: FeatureActivations, seed: int = 0, nearest: int = 20
) -> Plan:
    """The plan with random features in place of its own (CHOICES 37).

    Each is drawn from the `nearest` features of its site whose share of active tokens in a sample
    of text is closest to that of the feature it replaces; none is in the plan, or drawn twice. A
    control that adds has the norm of the plan at every site; one that rescales has the same r.
    """
    rng = np.random.default_rng(seed)
    features = [suite.feature(step.feature) for step in plan.steps]
    taken = {site: set(suite.sae(site).excluded.tolist()) for site in {f.site for f in features}}
    if missing := taken.keys() - activations.by_site.keys():
        raise ValueError(f"the sample was not read at {min(missing)}, where the plan has features")
    for feature in features:
        taken[feature.site].add(feature.index)
    shares = {site: (activations.by_site[site] > 0).mean(axis=0).A1 for site in taken}
    steps = []
    for step, feature in zip(plan.steps, features, strict=True):
        site, share = feature.site, shares[feature.site]
        closest = np.abs(share - share[feature.index]).argsort(kind="stable")
        free = [index for index in closest.tolist() if index not in taken[site]]
        if not free:
            raise ValueError(f"no feature of {site} is left to stand for {feature}")
        index = int(rng.choice(free[:nearest]))
        taken[site].add(index)
        steps.append(replace(step, feature=f"{site}/{index}"))
    control = replace(plan, steps=tuple(steps), about=f"random features of seed {seed}")
    if plan.kind == "rescale":
        return control
    own, other = steering_vectors(suite, plan), steering_vectors(suite, control)
    factor = {at: float(own[at].norm() / other[at].norm()) if other[at].any() else 1 for at in own}
    sites = [suite.sae(feature.site).input_site for feature in features]
    scaled = (replace(s, scale=s.scale * factor[at]) for s, at in zip(steps, sites, strict=True))
    return replace(control, steps=tuple(scaled))


def random_cells(
    suite: "Suite", cell: SweepCell, activations: FeatureActivations, seeds: Iterable[int],
    texts: Sequence[str] = (),
) -> list[SweepCell]:  # fmt: skip
    """A cell for each seed, with random features in place of a cell's own (CHOICES 37).

    With texts each comes a second time, scaled to the norm of the cell's own plan on these.
    """
    assert isinstance(cell.plan, Plan)
    cells = []
    for seed in seeds:
        twin = random_feature_control(suite, cell.plan, activations, seed)
        cells.append(replace(cell, strategy="random features", plan=twin))
        if texts:
            own, other = side_effects(suite, {"own": cell.plan, "twin": twin}, texts)["norm"]
            if other > 0:
                scaled = scale_plan(twin, float(own / other))
                cells.append(replace(cell, strategy="random, same norm", plan=scaled))
    return cells


def scale_plan(plan: Plan | SteeringVectors, factor: float) -> Plan | SteeringVectors:
    """The plan with s, or r - 1, times the factor."""
    if not isinstance(plan, Plan):
        return {at: vector * factor for at, vector in plan.items()}
    rest = 1.0 if plan.kind == "rescale" else 0.0
    steps = (replace(s, strength=rest + (s.strength - rest) * factor) for s in plan.steps)
    return replace(plan, steps=tuple(steps))


def total_norm(suite: "Suite", plan: Plan | SteeringVectors) -> float:
    """Σ‖Δh‖ of a plan that adds, in the stream: at z through W_O and the gain."""
    vectors = steering_vectors(suite, plan) if isinstance(plan, Plan) else plan
    return sum(float(_in_stream(suite.model, at)(v[None])[0].norm()) for at, v in vectors.items())


def equal_norm_cells(suite: "Suite", cells: Sequence[SweepCell], measure: str) -> list[SweepCell]:
    """Cells scaled to the total norm Σ‖Δh‖ of the cell of their theme with the strategy `measure`.

    At the same s, a plan of many layers changes more. Cells without a plan are left out.
    """
    steered = [(cell, cell.plan, total_norm(suite, cell.plan)) for cell in cells if cell.plan]
    budget = {cell.theme: norm for cell, _, norm in steered if cell.strategy == measure}
    equal = []
    for cell, plan, norm in steered:
        if (factor := budget.get(cell.theme, 0) / norm) > 0:
            s = (cell.strength or 0) * factor
            equal.append(replace(cell, plan=scale_plan(plan, factor), strength=s))
    return equal


@torch.no_grad()
def difference_of_means(
    model: Model, site: Site, texts: Sequence[str], others: Sequence[str]
) -> Float[Tensor, "d_model"]:
    """The mean of the stream at the tokens of texts on a theme, less that of others (AxBench)."""
    means = []
    for group in (texts, others):
        tokens = tokenize(model, group, text_length(model, MAX_TOKENS))
        _, stream = run_model(model, tokens.ids, [site], stop_after=site.layer)
        means.append(stream[site][tokens.is_text].float().mean(0))  # NaN if there is no token
    difference = means[0] - means[1]
    if not (torch.isfinite(difference).all() and difference.any()):
        raise ValueError(f"{len(texts)} texts and {len(others)} others have no means, or equal")
    return difference


@torch.no_grad()
def side_effects(
    suite: "Suite", plans: Mapping[str, Plan | SteeringVectors | None], texts: Sequence[str]
) -> "pd.DataFrame":
    """What plans do to a few given texts, such as neutral ones.

    Returns:
        One row a plan: `plan`, `norm` (Σ‖Δh‖: the norm of each edit's step in the stream, summed
        over the sites, mean over tokens) and `kl` (KL(unsteered ‖ steered) of the next token in
        nats, mean over tokens).

    Raises:
        FloatingPointError: If a plan makes logits infinite or NaN; it names the plan.
    """
    import pandas as pd

    model, names = suite.model, list(plans)
    tokens = tokenize(model, texts, text_length(model, MAX_TOKENS))
    clean = logits_of(model, tokens.ids).float().log_softmax(-1)
    rows = min(ROWS, LOGITS // (MAX_TOKENS * clean.shape[-1]))
    plans_per_pass = max(1, rows // len(texts))
    found = {}
    for start in progress(range(0, len(names), plans_per_pass), "side effects"):
        batch = names[start : start + plans_per_pass]
        norms = torch.zeros(len(batch), *tokens.ids.shape, device=model.device)
        edits = plan_edits(suite, [plans[name] for name in batch])
        measured = [_measured(model, edit, norms) for edit in edits]
        logits = logits_of(model, tokens.ids.repeat(len(batch), 1), measured)
        steered = logits.float().log_softmax(-1).unflatten(0, (len(batch), -1))
        for name, norm, log_q in zip(batch, norms, steered, strict=True):
            if not torch.isfinite(log_q).all():
                raise FloatingPointError(f"plan {name!r}: logits are no longer finite")
            kl = (clean.exp() * (clean - log_q)).sum(-1)
            found[name] = torch.stack([norm, kl])[:, tokens.is_text].double().mean(1).tolist()
    found = pd.DataFrame.from_dict(found, "index", columns=["norm", "kl"])
    return found.rename_axis("plan").reset_index()


def _measured(model: Model, edit: Edit, norms: Float[Tensor, "plan text position"]) -> Edit:
    """The edit, which also adds the norm of its step at each token to `norms`."""
    in_stream = _in_stream(model, edit.site)  # which may take a pass: not inside of another

    def change(activations: Activations) -> Activations:
        changed = edit.change(activations)
        step = (changed - activations).float().flatten(0, 1)
        norms.add_(in_stream(step).norm(dim=-1).view(norms.shape))
        return changed

    return Edit(edit.site, change)


def _in_stream(model: Model, site: Site) -> Callable[[Tensor], Tensor]:
    return attention_output(model, site.layer).to_residual if site.module == "z" else Tensor.float
