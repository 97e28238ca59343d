"""The null distribution of a match: what the best cosine is if two SAEs have nothing in common.

One of the two is turned by a random rotation, all its directions alike, so that they keep their
angles among themselves (CHOICES 27).
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.core.cache import cached_table
from flowhelpers.matching.cosine import top_k_cosine

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.saes import SAE

NULL_DRAWS, NULL_ROTATIONS = 8192, 16
NULL_QUANTILE = 0.999
NULL_VERSION = 2  # of what is kept on disk: raise it when that changes


def null_cosines(
    target: Float[Tensor, "targets d_model"],
    source: Float[Tensor, "sources d_model"],
    seed: int = 0,
    draws: int = NULL_DRAWS,
    device: str | None = None,
) -> Float[Tensor, "draws"]:
    """The null distribution: best cosines of targets with randomly rotated copies of the source.

    Pools as many rotations as `draws` cosines need, at most 16; rows of zeros are left out. The
    seed sets the rotations and, if there are more than `draws` targets, which of them are used.
    """
    rows = torch.nonzero((target != 0).any(dim=1)).flatten()
    if not len(rows):
        return target.new_zeros(1)
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for start in range(0, min(draws, NULL_ROTATIONS * len(rows)), len(rows)):
        some = torch.randperm(len(rows), generator=generator)[: draws - start].to(rows.device)
        # To turn the targets is the same as to turn the source the other way, and less to do.
        turned.append(rotated(target[rows[some]], seed * NULL_ROTATIONS + len(turned)))
    return top_k_cosine(torch.cat(turned), source, device=device).scores[:, 0]


def rotated(
    directions: Float[Tensor, "rows d_model"], seed: int = 0
) -> Float[Tensor, "rows d_model"]:
    """All directions after one random rotation, which keeps the angles between them."""
    return directions.float() @ _rotation(directions.shape[1], seed).to(directions.device)


@lru_cache(maxsize=NULL_ROTATIONS)
def _rotation(d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation, triangle = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.double))
    return (rotation * triangle.diagonal().sign()).float()  # uniform over the orthogonal group


def cached_null(
    chooser: "SAE", other: "SAE", seed: int, device: str | None, cache: Path | None
) -> Float[Tensor, "draws"]:
    """The sorted null distribution of best cosines, on disk: several matchers use it."""
    import pandas as pd

    def compute() -> "pd.DataFrame":
        cosines = null_cosines(chooser.decoder, other.decoder, seed, device=device)
        return pd.DataFrame({"cosine": cosines.cpu().sort().values.numpy()})

    key = {"seed": seed, "draws": NULL_DRAWS}
    key |= {"chooser": chooser.fingerprint, "other": other.fingerprint}
    table = cached_table("nulls", key, compute, cache, NULL_VERSION)
    return torch.from_numpy(table["cosine"].to_numpy(copy=True))
