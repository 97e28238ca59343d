"""Decoder directions: rows of unit norm."""

import torch
from jaxtyping import Float
from torch import Tensor

FAR = 1e15  # squares of what is larger, or smaller than its inverse, are lost in float32


def unit_rows(
    matrix: Float[Tensor, "rows d_model"], first: int = 0
) -> Float[Tensor, "rows d_model"]:
    """Rows of unit norm in float32; rows of zeros stay zero.

    Raises:
        ValueError: If a value is not finite; rows are counted from `first`.
    """
    matrix = matrix.float()
    norms = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    units = matrix / norms
    odd = torch.nonzero(~((norms > 1 / FAR) & (norms < FAR))[:, 0]).flatten()
    if len(odd):
        rows = matrix[odd]
        largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)
        if len(bad := odd[~torch.isfinite(largest[:, 0])]):
            raise ValueError(f"{len(bad)} rows are not finite, the first is row {first + bad[0]}")
        # Divided by the largest entry first, neither huge nor tiny rows are lost in their squares.
        rows /= largest.masked_fill(largest == 0, 1.0)
        sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        units[odd] = rows / sizes.masked_fill(sizes == 0, 1.0)
    return units
