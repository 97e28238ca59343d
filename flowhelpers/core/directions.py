"""Decoder directions: rows of unit norm, and what products of them need."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowhelpers.core.machine import in_threads, quick_dtype

PART = 256  # rows that stay in a CPU's cache
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


@dataclass(frozen=True)
class Directions:
    """Directions ready for products: in float32 (`units`) and in the quickest type (`rough`).

    `errors` are the norms of what rounding took from each; `usable` is False for rows of zeros.
    """

    units: Float[Tensor, "rows d_model"]
    rough: Float[Tensor, "rows d_model"]
    errors: Float[Tensor, "rows"]
    usable: Bool[Tensor, "rows"]

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, rows: slice) -> "Directions":
        return Directions(self.units[rows], self.rough[rows], self.errors[rows], self.usable[rows])


def prepare(
    matrix: Float[Tensor, "rows d_model"] | Directions, device: str | torch.device, first: int = 0
) -> Directions:
    """Normalises rows for products with many others, unless they are; errors as of `unit_rows`."""
    if isinstance(matrix, Directions):
        return matrix
    device = device_of(device)
    quick = quick_dtype(device.type)
    units = torch.empty(matrix.shape, device=device)
    rough = units if quick is torch.float32 else units.new_empty(units.shape, dtype=quick)
    errors, norms = units.new_zeros(len(units)), units.new_empty(len(units))

    def normalise(rows: slice) -> None:
        units[rows] = part = unit_rows(matrix[rows].to(device), first + rows.start)
        norms[rows] = torch.linalg.vector_norm(part, dim=1)
        if rough is not units:
            rough[rows] = part
            errors[rows] = torch.linalg.vector_norm(part - rough[rows], dim=1)

    if device.type == "cpu":
        in_threads(normalise, [slice(i, i + PART) for i in range(0, len(units), PART)])
    else:
        normalise(slice(0, len(units)))
    return Directions(units, rough, errors, norms > 0)


def device_of(given: str | torch.device) -> torch.device:
    """A device by its name, or itself."""
    return torch.device(given) if isinstance(given, str) else given
