"""Decoder directions: rows of unit norm."""

import torch
from jaxtyping import Float
from torch import Tensor


def unit_rows(
    matrix: Float[Tensor, "rows d_model"], first: int = 0
) -> Float[Tensor, "rows d_model"]:
    """Rows of unit norm in float32; rows of zeros stay zero.

    Raises:
        ValueError: If a value is not finite; rows are counted from `first`.
    """
    matrix = matrix.float()
    largest = torch.linalg.vector_norm(matrix, ord=torch.inf, dim=1, keepdim=True)
    if not torch.isfinite(largest).all():
        bad = torch.nonzero(~torch.isfinite(largest[:, 0])).flatten() + first
        raise ValueError(f"{len(bad)} rows are not finite, the first is row {int(bad[0])}")
    # Divided by the largest entry first, neither huge nor tiny rows are lost in their squares.
    units = matrix / largest.masked_fill(largest == 0, 1.0)
    norms = torch.linalg.vector_norm(units, dim=1, keepdim=True)
    return units.div_(norms.masked_fill_(norms == 0, 1.0))
