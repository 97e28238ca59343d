"""One way to change the stream: add to it, or rescale what a feature writes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.dictionaries import Dictionary
from flowhelpers.features import FeatureId, Site
from flowhelpers.model import Activations, Edit


def add(
    site: Site,
    vector: Float[Tensor, "d_model"],
    strength: float,
    positions: Sequence[int] | None = None,
) -> Edit:
    """Steering: `h + s · v` at the site (paper 3.5).

    Args:
        site: Where.
        vector: The direction.
        strength: s, in units of the vector.
        positions: Token positions; by default all, in every pass.

    Raises:
        ValueError: If the vector is zero or not finite.
    """
    if not torch.isfinite(vector).all() or not vector.any():
        raise ValueError(f"the vector to add at {site} is zero or not finite")

    def change(activations: Activations) -> Activations:
        step = torch.zeros_like(activations)
        step[:, _slice(positions, activations, site)] = strength * vector.to(activations)
        return activations + step

    return Edit(site, change)


def rescale(
    dictionary: Dictionary,
    features: Sequence[FeatureId],
    r: float,
    positions: Sequence[int] | None = None,
) -> Edit:
    """Rescale features: `h + (r - 1) · a · v` (paper 3.5), with `a` read live from the stream.

    What the dictionary does not explain stays as it is; r = 0 removes the features, r = 1 changes
    nothing.

    Args:
        dictionary: The dictionary at the site.
        features: Features of that dictionary, all changed at once.
        r: The factor.
        positions: Token positions; by default all.

    Raises:
        ValueError: If a feature belongs to another site or none is given.
    """
    if not features:
        raise ValueError("no feature to rescale")
    for feature in features:
        if feature.site != dictionary.site:
            raise ValueError(f"{feature} is no feature of {dictionary.site}")

    def change(activations: Activations) -> Activations:
        where = _slice(positions, activations, dictionary.site)
        here = activations[:, where]
        codes = dictionary.encode(here)
        written = torch.stack(
            [dictionary.written(feature, codes[..., feature.index]) for feature in features]
        ).sum(0)
        changed = activations.clone()
        changed[:, where] = here + (r - 1) * written.to(activations)
        return changed

    return Edit(dictionary.site, change)


def _slice(
    positions: Sequence[int] | None, activations: Activations, site: Site
) -> slice | list[int]:
    if positions is None:
        return slice(None)
    length = activations.shape[1]
    outside = [p for p in positions if not -length <= p < length]
    if outside:
        raise ValueError(
            f"the edit at {site} names position {outside[0]}: the text has {length} tokens"
        )
    return list(positions)
