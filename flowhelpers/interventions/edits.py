"""Edits of the stream: add a direction or rescale features, for all texts or row by row.

Every edit adds something to the stream, so that what an SAE does not explain stays as it is
(paper 3.5, A.2). An SAE that reads z, before W_O, is edited there (CHOICES 30). Where an edit
and a reading share a site, the reading sees what the edit made.
"""

import math
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

    Raises:
        ValueError: If the vector is zero or not finite, s is not finite, or no position is given;
            when it is applied, if the vector has another width than the stream.
    """
    if not torch.isfinite(vector).all() or not vector.any():
        raise ValueError(f"the vector to add at {site} is zero or not finite")
    _check_finite(strength, "strength")
    return _edit(site, positions, lambda here: strength * vector.to(here))


def rescale(
    sae: SAE,
    features: Sequence[FeatureId],
    r: float | Sequence[float],
    positions: Sequence[int] | None = None,
) -> Edit:
    """Rescale features: `h + (r - 1) · a · v` (paper 3.5), a read live from the stream.

    r = 0 removes the features, r = 1 changes nothing. `r` is one factor, or one for each of the
    features, which are changed at once; `positions` are by default all.

    Raises:
        ValueError: If a feature belongs to another site, none is given, or r is not finite.
    """
    factors = torch.tensor([r] * len(features) if isinstance(r, (int, float)) else r)
    for factor in factors.tolist():
        _check_finite(factor, "r")
    if not len(factors) == len(features) > 0:
        raise ValueError(f"{len(factors)} factors for {len(features)} features")
    for feature in features:
        if feature.site != sae.site:
            raise ValueError(f"{feature} is no feature of {sae.site}")
    indices = torch.tensor([feature.index for feature in features], device=sae.norms.device)
    decoder_rows = sae.decoder_rows(indices)

    def step(here: Tensor) -> Tensor:
        codes = sae.encode(here)[..., indices].float()  # a difference is lost in half precision
        return ((factors.to(codes) * codes - codes) @ decoder_rows.to(codes)).to(here)

    return _edit(sae.input_site, positions, step)


def add_per_row(
    site: Site,
    rows: Int[Tensor, "n"],
    vectors: Float[Tensor, "n d_model"],
    position: int | None = None,
) -> Edit:
    """Each row of a batch its own edits: `h[row] + v`, at one position or all of them."""
    if not torch.isfinite(vectors).all():
        bad = int(rows[(~torch.isfinite(vectors)).any(1).to(rows.device)][0])
        raise ValueError(f"what row {bad} of the batch is to have added at {site} is not finite")

    def change(activations: Activations) -> Activations:
        at = _columns(None if position is None else [position], activations, site)
        step = torch.zeros(len(activations), vectors.shape[1], device=activations.device)
        step = step.index_add(0, rows.to(step.device), vectors.to(step))
        return _stepped(activations, at, step[:, None].to(activations), site, each=True)

    return Edit(site, change)


def rescale_per_row(
    sae: SAE,
    rows: Int[Tensor, "n"],
    features: Int[Tensor, "n"],
    r: Float[Tensor, "n"],
    position: int | None = None,
) -> Edit:
    """Each row of a batch its own `rescale` of features, live, at one position or all of them."""
    if not torch.isfinite(r).all():
        raise ValueError(f"r={float(r[~torch.isfinite(r)][0])}: expected a finite number")
    chosen, column = features.unique(return_inverse=True)
    decoder_rows = sae.decoder_rows(chosen)

    def change(activations: Activations) -> Activations:
        at = _columns(None if position is None else [position], activations, sae.input_site)
        here = activations[:, at]
        codes = sae.encode(here)[..., chosen].float()  # r - 1 is lost in half precision
        factors = torch.zeros(len(here), len(chosen), device=codes.device, dtype=codes.dtype)
        factors.index_put_((rows, column), r.to(codes) - 1, accumulate=True)
        step = (codes * factors[:, None]) @ decoder_rows.to(codes)
        return _stepped(activations, at, step.to(here), sae.input_site, position is not None)

    return Edit(sae.input_site, change)


def _edit(site: Site, positions: Sequence[int] | None, step: Callable[[Tensor], Tensor]) -> Edit:
    if positions is not None and not len(positions):
        raise ValueError(f"the edit at {site} names no position: it would reach no token")

    def change(activations: Activations) -> Activations:
        at = _columns(positions, activations, site)
        return _stepped(activations, at, step(activations[:, at]), site)

    return Edit(site, change)


def _stepped(
    activations: Activations, at: slice | list[int], step: Tensor, site: Site, each: bool = False
) -> Activations:
    """The stream after a step at some positions; one that is lost to rounding is an error.

    Where each row is an edit of its own, each has to change its row; else one token is enough.
    """
    here = activations[:, at]
    if step.shape[-1] != here.shape[-1]:  # a width of 1 would be spread over the whole stream
        raise ValueError(
            f"the edit at {site} has width {step.shape[-1]}: expected {here.shape[-1]}"
        )
    step = step.expand_as(here)
    changed = activations.clone()
    changed[:, at] = here + step
    meant = step.any(-1)
    lost = meant & (changed[:, at] == here).all(-1)
    if lost.any() and (each or bool((lost == meant).all())):
        size = float(step[lost].float().norm(dim=-1).max())
        raise ValueError(
            f"the edit at {site} leaves {int(lost.sum())} tokens as they were: its step of"
            f" {size:.1g} is lost to rounding in {activations.dtype}, in a stream of"
            f" {float(here.float().norm(dim=-1).max()):.3g}"
        )
    return changed


def _columns(
    positions: Sequence[int] | None, activations: Activations, site: Site
) -> slice | list[int]:
    length = activations.shape[1]
    for position in positions or ():
        if not -length <= position < length:
            raise ValueError(
                f"the edit at {site} names position {position}: the text has {length} tokens"
            )
    return slice(None) if positions is None else list(positions)


def _check_finite(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: expected a finite number")
