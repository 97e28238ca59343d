"""Match features across layers and modules by the cosine of their directions, without data."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.features import Site
from flowhelpers.runs import progress

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites import Suite

NULL_QUANTILE = 0.999


@dataclass(frozen=True)
class Matches:
    """The best sources of every target feature.

    Attributes:
        indices: Source features, best first; -1 where the cosine is not above zero.
        cosines: Their signed cosines; 0 where the index is -1.
    """

    indices: Int[Tensor, "targets k"]
    cosines: Float[Tensor, "targets k"]


def top_k_cosine(
    target: Float[Tensor, "targets d_model"],
    source: Float[Tensor, "sources d_model"],
    k: int = 1,
    block_bytes: int = 512 * 2**20,
) -> Matches:
    """The k sources of highest cosine for each target (paper 3.2), in blocks of bounded memory.

    Both sides are normalised in float32 (CHOICES 2). The cosine is signed: an antipodal direction
    is no match. Rows of zeros match nothing. Ties go to the lowest index (CHOICES 3).

    Args:
        target: Directions to be matched, one a row.
        source: Directions to choose from, one a row.
        k: Matches kept for each target.
        block_bytes: Memory for one block of cosines.

    Raises:
        ValueError: If the widths differ, k is out of range, or a value is not finite.
    """
    if target.ndim != 2 or source.ndim != 2 or target.shape[1] != source.shape[1]:
        raise ValueError(
            f"cannot compare target {tuple(target.shape)} with source {tuple(source.shape)}:"
            " expected two matrices of the same width"
        )
    if not 1 <= k <= len(source):
        raise ValueError(f"k={k}: expected 1 to {len(source)}, the number of source features")
    unit_source = unit_rows(source)
    keep = min(k + 1, len(source))  # one more, to see a tie at the border
    rows = max(1, block_bytes // (3 * 4 * len(source)))
    indices, cosines = [], []
    for part in target.split(rows):
        block = unit_rows(part) @ unit_source.T
        values, places = block.topk(keep, dim=1)
        # Of sources that tie across the border topk keeps any: these rows are sorted whole.
        cut = (values[:, k - 1] == values[:, -1]) & (values[:, -1] > 0) & (keep > k)
        if cut.any():
            whole = block[cut].sort(dim=1, descending=True, stable=True)
            values[cut], places[cut] = whole.values[:, :keep], whole.indices[:, :keep]
        order = places.sort(dim=1).indices  # stable by index first, then by cosine
        values, places = values.gather(1, order), places.gather(1, order)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
        values, places = values.gather(1, order), places.gather(1, order)
        absent = values <= 0
        cosines.append(values.masked_fill(absent, 0.0))
        indices.append(places.masked_fill(absent, -1))
    return Matches(torch.cat(indices), torch.cat(cosines))


def unit_rows(matrix: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
    """Rows of unit norm in float32; rows of zeros stay zero.

    Raises:
        ValueError: If a value is not finite.
    """
    matrix = matrix.float()
    norms = matrix.norm(dim=1, keepdim=True)
    if not torch.isfinite(norms).all():
        bad = torch.nonzero(~torch.isfinite(norms[:, 0])).flatten()
        raise ValueError(f"{len(bad)} rows are not finite, the first is row {int(bad[0])}")
    return matrix / norms.masked_fill(norms == 0, 1.0)


def null_cosines(
    target: Float[Tensor, "targets d_model"],
    source: Float[Tensor, "sources d_model"],
    seed: int = 0,
) -> Float[Tensor, "targets"]:
    """Best cosine of each target into a randomly rotated copy of the source: what chance gives."""
    return top_k_cosine(target, rotated(source, seed), k=1).cosines[:, 0]


def rotated(
    source: Float[Tensor, "sources d_model"], seed: int = 0
) -> Float[Tensor, "sources d_model"]:
    """The directions, all turned by one random rotation: alike among themselves, new to others."""
    generator = torch.Generator().manual_seed(seed)
    d = source.shape[1]
    rotation, triangle = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.double))
    rotation = rotation * triangle.diagonal().sign()  # uniform over the orthogonal group
    return source @ rotation.to(source)


def predecessor_sites(site: Site) -> dict[str, Site]:
    """Where the features of a residual site may come from: R_{L-1}, M_L and A_L (paper 3.3).

    Layer 0 has no residual predecessor (CHOICES 5).

    Raises:
        ValueError: If the site is not residual.
    """
    if site.module != "res":
        raise ValueError(f"{site} has no predecessors: expected a residual site, such as 12/res")
    sites = {"mlp": Site(site.layer, "mlp"), "att": Site(site.layer, "att")}
    return {"res": Site(site.layer - 1, "res"), **sites} if site.layer else sites


def match_table(suite: "Suite", k: int = 5, seed: int = 0) -> "pd.DataFrame":
    """The matches of every residual feature of a suite, at every site that precedes it.

    Args:
        suite: The suite.
        k: Matches kept for each feature and site.
        seed: Seed of the null's rotations.

    Returns:
        One row for each feature, site and rank: `layer`, `feature`, `module`, `rank` (from 1),
        `source_layer`, `source`, `cosine`, `margin` (to the next rank; missing at the last),
        `mutual` (is the feature the source's best match too) and `null` (the 99.9 % quantile of
        the best cosine by chance, for the layer and site; CHOICES 27).

    Raises:
        ValueError: If no residual dictionary of the suite has one that precedes it.
    """
    import pandas as pd

    pairs = [
        (Site(layer, "res"), module, source)
        for layer in range(suite.layers)
        for module, source in predecessor_sites(Site(layer, "res")).items()
        if Site(layer, "res") in suite.dictionaries and source in suite.dictionaries
    ]
    if not pairs:
        raise ValueError(f"suite {suite.name} has no residual dictionary with one that precedes it")
    tables = []
    for site, module, source in progress(pairs, "matching"):
        targets = suite.dictionary(site).directions
        sources = suite.dictionary(source).directions
        keep = min(k + 1, len(sources))
        matches = top_k_cosine(targets, sources, keep)
        back = top_k_cosine(sources, targets, 1).indices[:, 0]
        null = torch.quantile(null_cosines(targets, sources, seed), NULL_QUANTILE).item()
        best = matches.indices.clamp(min=0)
        target = torch.arange(len(targets), device=best.device)[:, None]
        mutual = (back[best] == target) & (matches.indices >= 0)
        margin = torch.full_like(matches.cosines, torch.nan)
        margin[:, :-1] = matches.cosines[:, :-1] - matches.cosines[:, 1:]
        ranks = min(k, keep)
        tables.append(
            pd.DataFrame(
                {
                    "layer": site.layer,
                    "feature": torch.arange(len(targets)).repeat_interleave(ranks).numpy(),
                    "module": module,
                    "rank": torch.arange(1, ranks + 1).repeat(len(targets)).numpy(),
                    "source_layer": source.layer,
                    "source": matches.indices[:, :ranks].flatten().cpu().numpy(),
                    "cosine": matches.cosines[:, :ranks].flatten().cpu().numpy(),
                    "margin": margin[:, :ranks].flatten().cpu().numpy(),
                    "mutual": mutual[:, :ranks].flatten().cpu().numpy(),
                    "null": null,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def scores(table: "pd.DataFrame") -> "pd.DataFrame":
    """s(R), s(M) and s(A) of every residual feature: its best cosine at each site (paper 3.3).

    Args:
        table: A match table.

    Returns:
        One row a feature: `layer`, `feature`, and for each of `res`, `mlp`, `att` the columns
        `s_res` (cosine), `source_res` (index, -1 without a match) and `null_res`. At layer 0 the
        residual columns are missing.
    """
    best = table[table["rank"] == 1]
    wide = best.pivot(
        index=["layer", "feature"], columns="module", values=["cosine", "source", "null"]
    )
    wide.columns = [
        f"{dict(cosine='s', source='source', null='null')[kind]}_{module}"
        for kind, module in wide.columns
    ]
    return wide.reset_index()
