"""Decoder directions: rows of unit norm, and what products of them need."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.core.machine import check_device, in_threads, quick_dtype

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
            raise ValueError(
                f"{len(bad)} rows are not finite in float32, the first is row {first + bad[0]}"
            )
        # Divided by the largest entry first, neither huge nor tiny rows are lost in their squares.
        rows /= largest.masked_fill(largest == 0, 1.0)
        sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        units[odd] = rows / sizes.masked_fill(sizes == 0, 1.0)
    return units


@dataclass(frozen=True)
class Directions:
    """Directions ready for products.

    `rows` times `scale` are of unit norm, `rough` the same in the type whose products are quickest,
    and `errors` the norms of what rounding took from each. The scale of a row of zeros is zero.
    """

    rows: Float[Tensor, "rows d_model"]
    scale: Float[Tensor, "rows"]
    rough: Float[Tensor, "rows d_model"]
    errors: Float[Tensor, "rows"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice) -> "Directions":
        return Directions(self.rows[some], self.scale[some], self.rough[some], self.errors[some])


def prepare(
    matrix: Float[Tensor, "rows d_model"] | Directions, device: str | torch.device, first: int = 0
) -> Directions:
    """Makes rows ready for products with many others, unless they are; errors as of `unit_rows`."""
    device = device_of(device)
    if isinstance(matrix, Directions):
        held = matrix.rows, matrix.scale, matrix.rough, matrix.errors
        return Directions(*(each.to(device) for each in held))
    rows = matrix.detach().to(device).float()
    norms = torch.linalg.vector_norm(rows, dim=1)
    if not ((norms > 1 / FAR) & (norms < FAR)).all():
        rows = unit_rows(rows, first)
        norms = torch.linalg.vector_norm(rows, dim=1)
    scale, errors = torch.where(norms > 0, 1 / norms, 0.0), torch.zeros_like(norms)
    rough = torch.empty(rows.shape, dtype=quick_dtype(device.type), device=device)

    def make_rough(some: slice) -> None:
        units = rows[some] * scale[some, None]
        rough[some] = units
        errors[some] = torch.linalg.vector_norm(units.sub_(rough[some]), dim=1)

    part = PART if device.type == "cpu" else max(1, len(rows))
    parts = [slice(i, i + part) for i in range(0, len(rows), part)]
    in_threads(make_rough, parts, device.type)
    return Directions(rows, scale, rough, errors)


def device_of(given: str | torch.device) -> torch.device:
    """A device by its name, or itself; a ValueError if this machine has none of this name."""
    if isinstance(given, str):
        check_device(given)
    return torch.device(given) if isinstance(given, str) else given
