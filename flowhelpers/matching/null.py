"""The null distribution of a match: what the best cosine is if two SAEs have nothing in common.

Turned by a random rotation, every feature of an SAE points in a random direction, uniformly,
whatever it was. So the best cosine by chance depends on the features that are chosen from alone:
one distribution for each SAE serves all pairs of sites in which its features are chosen (CHOICES
27).
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.core.cache import cached_table
from flowhelpers.core.directions import Directions, prepare
from flowhelpers.matching.cosine import top_k_cosine

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.saes import SAE

NULL_DRAWS = 4096
NULL_QUANTILE = 0.999
FIRST_SEED = 2**31  # far from the seeds of what may be compared with it
NULL_VERSION = 3  # of what is kept on disk: raise it when that changes


def null_cosines(
    source: Float[Tensor, "sources d_model"] | Directions,
    seed: int = 0,
    draws: int = NULL_DRAWS,
    device: str | None = None,
) -> Float[Tensor, "draws"]:
    """The null distribution: best cosines of random directions with the rows of a matrix.

    The directions are the same for all matrices of one width, so the nulls of a suite err alike.
    The standard error of the 99.9 % quantile (`null_error`) falls with the root of `draws`. At
    Gemma 2 2B's size 4,096 cost a fourth of a product of two SAEs, and leave 2 % of the quantile.
    """
    held = source.rows if isinstance(source, Directions) else source
    at = device or held.device
    return top_k_cosine(_random(held.shape[1], seed, draws, at), source, device=at).scores[:, 0]


@lru_cache(maxsize=1)
def _random(d: int, seed: int, draws: int, device: str | torch.device) -> Directions:
    generator = torch.Generator().manual_seed(FIRST_SEED + seed)
    return prepare(torch.randn(draws, d, generator=generator), device)


def null_threshold(chance: Float[Tensor, "draws"], share: float = NULL_QUANTILE) -> float:
    """The quantile of the draws that a further one lies below with this probability (0.999).

    Of n draws it has the rank share · (n + 1), counted from 1.
    """
    rank = (len(chance) + 1) * share - 1
    at = min(max(rank / max(len(chance) - 1, 1), 0.0), 1.0)
    return torch.quantile(chance.cpu().double(), at).item()


def null_error(chance: Float[Tensor, "draws"]) -> float:
    """The standard error of the 99.9 % quantile of so many draws.

    It is half the distance of the quantiles that lie a standard deviation of the rank below and
    above, a few draws, and has an error of about a half. Below 2,600 draws it is too small: the
    upper of the two would lie beyond the highest draw.
    """
    spread = (NULL_QUANTILE * (1 - NULL_QUANTILE) / len(chance)) ** 0.5
    low, high = (null_threshold(chance, NULL_QUANTILE + by) for by in (-spread, spread))
    return (high - low) / 2


def rotated(
    directions: Float[Tensor, "rows d_model"], seed: int = 0
) -> Float[Tensor, "rows d_model"]:
    """All directions after one random rotation, which keeps the angles between them."""
    generator, d = torch.Generator().manual_seed(seed), directions.shape[1]
    rotation, triangle = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.double))
    rotation *= triangle.diagonal().sign()  # uniform over the orthogonal group
    return directions.float() @ rotation.float().to(directions.device)


def cached_null(
    sae: "SAE",
    rows: Float[Tensor, "sources d_model"] | Directions,
    seed: int,
    device: str | None,
    cache: Path | None,
) -> Float[Tensor, "draws"]:
    """The sorted null distribution of a choice among an SAE's features, `rows`, kept on disk."""
    import pandas as pd

    def compute() -> "pd.DataFrame":
        cosines = null_cosines(rows, seed, device=device)
        return pd.DataFrame({"cosine": cosines.cpu().sort().values.numpy()})

    key = {"seed": seed, "draws": NULL_DRAWS, "chosen": sae.fingerprint}
    table = cached_table("nulls", key, compute, cache, NULL_VERSION)
    return torch.from_numpy(table["cosine"].to_numpy(copy=True))
