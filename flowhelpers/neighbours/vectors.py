"""Steering vectors from an SAE's features, by neighbours of the paper.

All are vectors at one site, made from `contrasts` of two groups of texts; their norm means nothing,
so that they can be compared at one norm.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.saes import SAE


def contrasts(
    activations: FeatureActivations, site: Site, on_theme: Sequence[bool] | np.ndarray
) -> "pd.DataFrame":
    """How the features of a site differ between texts on a theme and others, token by token.

    `on_theme` is one a text.

    Returns:
        One row a feature: `amplitude` and `frequency` (by how much the mean activation, and the
        share of active tokens, is higher on the theme), `active` (its tokens, both groups), `on`
        and `off` (its mean activation where it is on the theme and elsewhere), `added` and `taken`
        (see `functional_vector`) and `information` (mutual, of being active and the theme, nats).
    """
    import pandas as pd

    is_on = np.asarray(on_theme, dtype=bool)[activations.tokens["text"]]
    if is_on.all() or not is_on.any():
        raise ValueError("on_theme: expected texts on the theme and others, with tokens in both")
    codes = activations.by_site[site]
    groups = codes[np.flatnonzero(is_on)], codes[np.flatnonzero(~is_on)]
    on, off = (group.mean(axis=0).A1 for group in groups)
    shares = [(group > 0).mean(axis=0).A1 for group in groups]
    dense = groups[1].toarray()  # of the others, which are to become as those on the theme
    added, taken = (np.maximum(on - dense, 0).mean(0), np.minimum(off, dense).mean(0))
    part = is_on.mean()
    both = part * shares[0] + (1 - part) * shares[1]
    information = _entropy(both) - part * _entropy(shares[0]) - (1 - part) * _entropy(shares[1])
    table = {"amplitude": on - off, "frequency": shares[0] - shares[1], "on": on, "off": off}
    table |= {"active": codes.getnnz(axis=0), "added": added, "taken": taken}
    return pd.DataFrame(table | {"information": information})


def target_atoms(
    sae: "SAE", contrast: "pd.DataFrame", top: float = 0.35
) -> Float[Tensor, "d_model"]:
    """STA, steering target atoms (arXiv 2505.20322): Σ Δa · v of the atoms.

    Atoms are the features whose contrasts of amplitude and frequency have one sign, either sign,
    and are by size both among the `top` share of all (CHOICES 48).
    """
    amplitude, frequency = contrast["amplitude"], contrast["frequency"]
    agree = amplitude * frequency > 0
    sizes = amplitude.abs(), frequency.abs().where(agree, 0.0)
    high = [size >= size.quantile(1 - top) for size in sizes]
    return _weighted(sae, amplitude.where(agree & high[0] & high[1], 0.0).to_numpy())


def functional_vector(
    sae: "SAE", contrast: "pd.DataFrame", k: int = 16
) -> Float[Tensor, "d_model"]:
    """SpARE (arXiv 2410.15999): the mean change that it makes at tokens of the other texts.

    Of the `k` features that tell most of the theme (mutual information), those that are more active
    on it are raised to their mean there where they are below, and of the others their mean
    elsewhere is taken away, as far as it is there. The paper changes each token by itself; the mean
    of that is a vector, which can be scaled to one norm (CHOICES 48).
    """
    best = contrast["information"].nlargest(k).index
    wanted = contrast["added"].where(contrast["amplitude"] > 0, -contrast["taken"])
    return _weighted(sae, wanted.where(wanted.index.isin(best), 0.0).to_numpy())


def refined_vector(
    sae: "SAE",
    vector: Float[Tensor, "d_model"],
    contrast: "pd.DataFrame",
    relevance: Sequence[float] | np.ndarray,
    least: float = 0.7,
    near: float = 0.4,
) -> Float[Tensor, "d_model"]:
    """SAE-RSV (arXiv 2509.23799): a vector of few texts, less what is irrelevant, plus what misses.

    The features in which the few texts differ, but whose `relevance` is below `least`, are taken
    out. Features that are nowhere active in the few texts come in if a relevant one is at a cosine
    of `near` or more, with its amplitude times the cosine. The paper asks a language model whether
    a feature's explanation is relevant, and compares explanations by their embeddings; here
    relevance is measured on other texts, and decoder directions are compared (CHOICES 48).
    """
    amplitude = contrast["amplitude"].to_numpy(float)
    is_relevant = np.asarray(relevance, dtype=float) >= least
    known = np.flatnonzero(is_relevant & (amplitude > 0))
    change = np.where(is_relevant, 0.0, -amplitude)
    if len(known):
        directions = sae.directions.cpu()
        cosines, nearest = (directions @ directions[known].T).max(dim=1)
        is_missing = (contrast["active"].to_numpy() == 0) & (cosines.numpy() >= near)
        gain = cosines.numpy() * amplitude[known[nearest.numpy()]]
        change = np.where(is_missing, gain, change)
    return vector.float().cpu() + _weighted(sae, change)


def _weighted(sae: "SAE", weights: np.ndarray) -> Float[Tensor, "d_model"]:
    """The sum of decoder rows, each times its weight."""
    chosen = np.flatnonzero(weights)
    if not len(chosen):
        raise ValueError(f"no feature of {sae.site} is left to steer by: expected one or more")
    rows = sae.decoder_rows(torch.from_numpy(chosen)).float().cpu()
    return torch.from_numpy(weights[chosen]).float() @ rows


def _entropy(share: np.ndarray) -> np.ndarray:
    """Of a feature's being active or not, in nats."""
    from scipy.special import entr

    share = share.clip(0, 1)  # a mean of ones may be rounded up
    return entr(share) + entr(1 - share)
