"""Edges between residual features, by the paper's measures and by those of its neighbours.

Each function scores every feature of a site below as the source of some `features` of a target
site, however many layers lie between: `[targets, sources]`, higher is better, 0 or less is none.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

    from flowhelpers.suites.load import Suite

Edges = Float[Tensor, "targets sources"]
LEAST_ACTIVE = 10  # tokens, for a feature to be told anything of, as for Pearson (CHOICES 14)


def cosine_edges(suite: "Suite", target: Site, source: Site, features: Sequence[int]) -> Edges:
    """The paper's: cosines of decoder directions (CHOICES 2)."""
    ends = suite.sae(target).directions[[*features]], suite.sae(source).directions
    return (ends[0] @ ends[1].T).cpu()


def chained_edges(suite: "Suite", target: Site, source: Site, features: Sequence[int]) -> Edges:
    """The paper's over several layers: the best match one layer below, and of that one, and so on.

    A target has the one source that its chain reaches; its score is the product of the cosines.
    """
    ends, scores = torch.tensor([*features]), torch.ones(len(features))
    steps = [Site(layer, "res") for layer in range(source.layer, target.layer + 1)]
    for below, above in reversed([*pairwise(at for at in steps if at in suite.saes)]):
        cosines, ends = cosine_edges(suite, above, below, ends.tolist()).max(dim=1)
        scores = scores * cosines
    return torch.zeros(len(ends), suite.sae(source).width).scatter_(
        1, ends[:, None], scores[:, None]
    )


def pearson_edges(
    activations: FeatureActivations, target: Site, source: Site, features: Sequence[int]
) -> Edges:
    """The paper's appendix C.4: correlations of activations, zeros included (CHOICES 14)."""
    y, x = _standardised(activations, target, features), _standardised(activations, source)
    return torch.from_numpy(y.T @ x / len(x))


def lasso_edges(
    activations: FeatureActivations,
    target: Site,
    source: Site,
    features: Sequence[int],
    alpha: float = 0.05,
) -> Edges:
    """CircuitLasso (arXiv 2606.16939): each target's activation regressed on all those below.

    scikit-learn's Lasso of activations of mean 0 and variance 1, so that `alpha` is the correlation
    below which nothing enters; the paper's penalty was not to be had (CHOICES 47). Coefficients
    keep their sign: what lowers a target is no source of it.
    """
    from sklearn.linear_model import Lasso

    y, x = _standardised(activations, target, features), _standardised(activations, source)
    x = np.asfortranarray(x)
    lasso = Lasso(alpha, fit_intercept=False, precompute=x.T @ x, tol=1e-3)
    return torch.from_numpy(np.atleast_2d(lasso.fit(x, y).coef_))


def module_edges(
    activations: FeatureActivations,
    target: Site,
    source: Site,
    features: Sequence[int],
    cut: float = 0.3,
) -> Edges:
    """Co-activation modules (arXiv 2506.18141): components of features that are active together.

    In the graph over the residual layers from source to target, features of neighbouring layers
    are joined where the tokens at which both are active are at least `cut` of those at which
    either is (Jaccard). A source is one of the target's own module; of several, that with the
    highest Jaccard index. Cut and index are a choice of ours (CHOICES 47).
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    layers = range(source.layer, target.layer + 1)
    there = [at for at in (Site(layer, "res") for layer in layers) if at in activations.by_site]
    if len(there) < 2 or (there[0], there[-1]) != (source, target):
        read = ", ".join(map(str, activations.by_site))
        told = f"modules from {source} to {target}: expected residual sites, the source below"
        raise ValueError(f"{told}, that were both read; read were {read}")
    codes = [activations.by_site[site] for site in there]
    starts = np.cumsum([0, *(one.shape[1] for one in codes)])
    joined = []
    for place, (below, above) in enumerate(pairwise(codes)):
        rows, columns = np.nonzero(_jaccard(below, above) >= cut)
        joined.append(np.stack([rows + starts[place], columns + starts[place + 1]]))
    ends = np.concatenate(joined, axis=1)
    graph = coo_matrix((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(starts[-1],) * 2)
    module = connected_components(graph, directed=False)[1]
    chosen = codes[-1][:, [*features]]
    same = module[starts[-2] :][[*features]][:, None] == module[: starts[1]]
    return torch.from_numpy(np.where(same, _jaccard(chosen, codes[0]), 0.0))


def transport_edges(
    activations: FeatureActivations,
    reference: Float[Tensor, "tokens d"],
    target: Site,
    source: Site,
    features: Sequence[int],
    points: int = 64,
    projections: int = 64,
    seed: int = 0,
) -> Edges:
    """Semantic optimal transport (arXiv 2605.28567): features as distributions of hidden states.

    A feature is the distribution of the `reference` states of the tokens where it is most active,
    weighted by its activations; two are compared by the sliced 2-Wasserstein distance W, a mean
    over random directions, and scored 1 / (1 + W). What of the paper could be read names neither
    the shared space nor the kind of W: the space is what the notebook hands in (CHOICES 47).
    """
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(reference.shape[1], projections, generator=generator)
    states = (reference.cpu().float() @ (axes / axes.norm(dim=0))).numpy()
    levels = (np.arange(points // 2) + 0.5) / (points // 2)

    def quantiles(codes: "csr_matrix") -> Tensor:
        table = np.full((codes.shape[1], len(levels) * projections), np.nan)
        for place, column in enumerate(codes.T.tocsr()):
            strongest = column.data.argsort()[::-1][:points]
            if column.nnz < LEAST_ACTIVE:
                continue
            values = states[column.indices[strongest]]
            order = values.argsort(axis=0)
            mass = (column.data[strongest] / column.data[strongest].sum())[order].cumsum(axis=0)
            at = np.array([np.searchsorted(one, levels) for one in mass.T]).clip(max=len(mass) - 1)
            table[place] = (
                np.take_along_axis(values, order, 0).T[np.arange(projections)[:, None], at].ravel()
            )
        return torch.from_numpy(table)

    ends = quantiles(activations.by_site[target][:, [*features]].tocsr())
    apart = torch.cdist(ends, quantiles(activations.by_site[source])) / ends.shape[1] ** 0.5
    return (1 / (1 + apart)).nan_to_num(0.0)


def best_sources(edges: Edges, features: Sequence[int]) -> "pd.DataFrame":
    """Each target `feature` with its best `source` and `score`; without one, source -1."""
    import pandas as pd

    scores, best = (values.numpy() for values in edges.max(dim=1))
    source = np.where(scores > 0, best, -1)
    return pd.DataFrame({"feature": [*features], "source": source, "score": scores})


def _standardised(
    activations: FeatureActivations, site: Site, features: Sequence[int] | None = None
) -> np.ndarray:
    """Activations of mean 0 and variance 1, `[tokens, features]`; 0 of features hardly active."""
    codes = activations.by_site[site]
    codes = codes if features is None else codes[:, [*features]]
    values = codes.toarray().astype(float)
    values -= values.mean(axis=0)
    spread = values.std(axis=0)
    tells = (codes.getnnz(axis=0) >= LEAST_ACTIVE) & (spread > 0)
    return values * np.where(tells, 1 / np.where(tells, spread, 1), 0)


def _jaccard(one: "csr_matrix", other: "csr_matrix") -> np.ndarray:
    """Of the tokens at which either is active, the share at which both are."""
    on, beside = (one > 0).astype(float), (other > 0).astype(float)
    both = (on.T @ beside).toarray()
    counts = on.getnnz(axis=0)[:, None], beside.getnnz(axis=0)
    either = counts[0] + counts[1] - both
    tells = (counts[0] >= LEAST_ACTIVE) & (counts[1] >= LEAST_ACTIVE)
    return np.where(tells, both / np.maximum(either, 1), 0.0)
