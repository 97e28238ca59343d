"""Edges by attribution, as in sparse feature circuits (Marks et al., arXiv 2403.19647)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import Activations, Edit, Tokens, editing, forward

if TYPE_CHECKING:
    from flowhelpers.suites.load import Suite

ROWS = 32  # texts of a pass


def attribution_edges(
    suite: "Suite",
    tokens: Tokens,
    activations: FeatureActivations,
    target: Site,
    sources: Sequence[Site],
    features: Sequence[int],
    per_feature: int = 4,
    seed: int = 0,
) -> tuple[dict[Site, Float[Tensor, "targets sources"]], dict[Site, float]]:
    """Activation times gradient: z · v · ∂p / ∂h, p the target's activation, h the stream.

    One backward pass gives all `sources`. Effects are at the target's own token, the mean over
    `per_feature` tokens where it is active, drawn from `activations`, which were read from `tokens`
    at all text tokens. The paper attributes a metric of the output, sums over tokens and refines
    by integrated gradients; here p takes the metric's place, to tell one edge (CHOICES 47).

    Returns:
        For each source site the effects, and the error term: of all absolute effects, the share
        that is of what the SAE leaves unexplained.
    """
    rng = np.random.default_rng(seed)
    codes = activations.by_site[target].tocsc()
    drawn = []
    for place, feature in enumerate(features):
        rows = codes[:, [feature]].nonzero()[0]
        some = rng.choice(rows, min(per_feature, len(rows)), replace=False)
        drawn += [(place, int(row)) for row in some]
    places, rows = torch.tensor(drawn, dtype=torch.long).view(-1, 2).T
    at = torch.from_numpy(activations.tokens[["text", "position"]].to_numpy()[rows])
    order = at[:, 1].argsort()  # so that rows of one pass are about as long
    places, at = places[order], at[order]
    read_by, wanted = suite.sae(target), torch.tensor([*features])[places]
    effects = {site: torch.zeros(len(features), suite.sae(site).width) for site in sources}
    errors, totals = dict.fromkeys(sources, 0.0), dict.fromkeys(sources, 0.0)
    for chosen in progress(torch.arange(len(places)).split(ROWS) if drawn else (), "attribution"):
        text, position = at[chosen].T
        row = torch.arange(len(chosen))
        ids = tokens.ids[text][:, : int(position.max()) + 1]
        stream = _differentiable(suite, ids, [*sources, target])
        with torch.enable_grad():
            read = read_by.encode_with_gradients(stream[target][row, position])
            told = read[row, wanted[chosen]].sum()
        gradients = torch.autograd.grad(told, [stream[site] for site in sources])
        for site, whole in zip(sources, gradients, strict=True):
            sae, gradient = suite.sae(site), whole[row, position].float()
            here = stream[site].detach()[row, position]
            active = sae.encode(here)
            each = (active * (gradient @ sae.lens_sae.W_dec.detach().float().T)).cpu()
            left = here - sae.decode(active, here)
            effects[site].index_add_(0, places[chosen], each)
            error = float((left * gradient).sum(1).abs().sum())
            errors[site] += error
            totals[site] += float(each.abs().sum()) + error
    counts = torch.bincount(places, minlength=len(features)).clamp(min=1)[:, None]
    means = {site: total / counts for site, total in effects.items()}
    return means, {site: errors[site] / max(totals[site], 1e-12) for site in sources}


def _differentiable(suite: "Suite", ids: Tensor, sites: Sequence[Site]) -> dict[Site, Activations]:
    """The stream at sites, that of the lowest as a leaf on which the others depend."""
    kept: dict[Site, Activations] = {}

    def keep(site: Site) -> Callable[[Activations], Activations]:
        def change(here: Activations) -> Activations:
            kept[site] = here.clone() if kept else here.detach().clone().requires_grad_()
            return kept[site]

        return change

    edits = [Edit(site, keep(site)) for site in sorted({*sites})]
    with torch.enable_grad(), editing(suite.model, edits):
        forward(suite.model, ids)
    return kept
