"""Edits of the stream: add a direction or rescale features, for all texts or row by row.

Every edit adds something to the stream, so that what an SAE does not explain stays as it is
(paper 3.5, A.2). An SAE that reads z, before W_O, is edited there (CHOICES 30). Where an edit
and a reading share a site, the reading sees what the edit made.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.core.features import FeatureId, Site
from flowhelpers.suites.model import Activations, Edit
from flowhelpers.suites.saes import SAE


def add(
    site: Site,
    vector: Float[Tensor, "d_model"],
    strength: float,
    positions: Sequence[int] | None = None,
) -> Edit:
    """Steering: `h + s · v` at the site (paper 3.5), by default at all tokens of every pass.

    A vector that is zero, not finite or of another width than the stream is a ValueError.
    """
    _check_finite(site, strength * vector)
    if not vector.any():
        raise ValueError(f"the vector to add at {site} is zero")
    return _edit(site, positions, lambda here: strength * vector.to(here))


def rescale(
    sae: SAE, features: Sequence[FeatureId], r: float, positions: Sequence[int] | None = None
) -> Edit:
    """Rescale features: `h + (r - 1) · a · v` (paper 3.5), a read live from the stream.

    r = 0 removes the features, r = 1 changes nothing; all are changed at once.
    """
    _check_finite(sae.site, torch.tensor(r))
    if {feature.site for feature in features} != {sae.site}:
        raise ValueError(f"expected features of {sae.site}, got {[*map(str, features)]}")
    indices = torch.tensor([feature.index for feature in features], device=sae.norms.device)
    return _rescaling(sae, indices, lambda codes: torch.tensor(r).to(codes) - 1, positions)


def add_per_row(
    site: Site,
    rows: Int[Tensor, "n"],
    vectors: Float[Tensor, "n d_model"],
    positions: Sequence[int] | None = None,
) -> Edit:
    """Each row of a batch its own edits: `h[row] + v`."""
    _check_finite(site, vectors)

    def step(here: Tensor) -> Tensor:
        steps = torch.zeros(len(here), vectors.shape[1], device=here.device)
        return steps.index_add(0, rows.to(here.device), vectors.to(steps))[:, None].to(here)

    return _edit(site, positions, step, each_row=True)


def rescale_per_row(
    sae: SAE,
    rows: Int[Tensor, "n"],
    features: Int[Tensor, "n"],
    r: Float[Tensor, "n"],
    positions: Sequence[int] | None = None,
) -> Edit:
    """Each row of a batch its own `rescale` of features, live."""
    _check_finite(sae.site, r)
    chosen, column = features.unique(return_inverse=True)

    def change(codes: Tensor) -> Tensor:
        changes = codes.new_zeros(len(codes), len(chosen))
        changes.index_put_((rows, column), r.to(codes) - 1, accumulate=True)
        return changes[:, None]

    return _rescaling(sae, chosen, change, positions, each_row=positions is not None)


def _rescaling(
    sae: SAE,
    features: Int[Tensor, "n"],
    change: Callable[[Tensor], Tensor],
    positions: Sequence[int] | None,
    each_row: bool = False,
) -> Edit:
    """Adds the features' activations times `change` of them, r - 1."""
    decoder_rows = sae.decoder_rows(features)

    def step(here: Tensor) -> Tensor:
        codes = sae.encode(here)[..., features].float()  # r - 1 is lost in half precision
        return ((codes * change(codes)) @ decoder_rows.to(codes)).to(here)

    return _edit(sae.input_site, positions, step, each_row)


def _edit(
    site: Site,
    positions: Sequence[int] | None,
    step: Callable[[Tensor], Tensor],
    each_row: bool = False,
) -> Edit:
    """Adds a step at some positions; one that changes no token (of each row) is an error."""
    if positions is not None and not len(positions):
        raise ValueError(f"the edit at {site} names no position: it would reach no token")

    def change(activations: Activations) -> Activations:
        length, width = activations.shape[1:]
        if positions and not -length <= min(positions) <= max(positions) < length:
            raise ValueError(f"the edit at {site} names {positions}: the text has {length} tokens")
        at = slice(None) if positions is None else list(positions)
        here = activations[:, at]
        added = step(here)
        if (got := added.shape[-1]) != width:  # of 1, it would be spread over the whole stream
            raise ValueError(f"the edit at {site} has width {got}: expected {width}")
        added = added.expand_as(here)
        changed = activations.clone()
        changed[:, at] = here + added
        meant = added.any(-1)
        lost = meant & (changed[:, at] == here).all(-1)
        if lost.any() and (each_row or bool((lost == meant).all())):
            size = float(added[lost].float().norm(dim=-1).max())
            told = f"the edit at {site} leaves {int(lost.sum())} tokens as they were"
            raise ValueError(f"{told}: its step of {size:.1g} is lost to rounding")
        return changed

    return Edit(site, change)


def _check_finite(site: Site, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        value = float(values[~torch.isfinite(values)][0])
        raise ValueError(f"the edit at {site} is given {value}: expected finite numbers")
