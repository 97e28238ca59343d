"""Matches as a transcoder: from the features of one layer to the stream of another (appendix F).

x̂ = W_dec^B T^T z^A + b_dec^B: z^A are the activations of the earlier SAE, T the transition, sparse
`[features of A, features of B]`. An activation counts in units of what its feature writes, the norm
of its decoder row, so that SAEs of any scale can be joined; in the paper all these norms are 1.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.core.bootstrap import TIMES, interval, resamples
from flowhelpers.core.directions import unit_rows
from flowhelpers.core.features import Site, check_choice
from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import Tokens, run_model
from flowhelpers.suites.saes import SMALLEST_THRESHOLD

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE
    from flowhelpers.suites.transcoders import Transcoder

Rows = Float[Tensor, "tokens d_model"]

PRODUCTS = ("decoder", "decoder-encoder", "encoder", "sum")
BATCH = 16  # texts in one forward pass
ROWS = 2048  # of products with all features of the other SAE, at a time


def virtual_weights(
    source: "SAE", target: "SAE", product: str = "decoder-encoder", rows: slice = slice(None)
) -> Float[Tensor, "sources targets"]:
    """Products of the directions of features of one SAE with those of all features of another.

    `decoder-encoder` are the virtual weights W_dec^A W_enc^B of the paper's eq. (1), `decoder` the
    cosines of 3.2, `encoder` those of encoder directions, `sum` half the sum of these two (Figure
    24). All directions have norm 1; `rows` are the features of the earlier SAE, all unless given.
    """
    check_choice("product", product, PRODUCTS)
    if product == "sum":
        decoders, encoders = (
            virtual_weights(source, target, one, rows) for one in ("decoder", "encoder")
        )
        return (decoders + encoders) / 2
    first, last = (product.split("-") * 2)[:2]
    return _directions(source, first)[rows] @ _directions(target, last).T


def _directions(sae: "SAE", of: str) -> Tensor:
    return sae.directions if of == "decoder" else unit_rows(sae.weights().encoder)


def top_transition(
    source: "SAE", target: "SAE", k: int = 1, product: str = "decoder", ones: bool = True
) -> Tensor:
    """The k highest products of every source feature, as ones (3.2) or as they are (Figure 24).

    Top-k is by source, so that each writes k times (CHOICES 29); what is not above 0 is left out.
    """
    if not 1 <= k <= target.width:
        raise ValueError(f"k={k}: expected 1 to {target.width}, the features of {target.site}")
    blocks = [slice(start, start + ROWS) for start in range(0, source.width, ROWS)]
    best = [virtual_weights(source, target, product, rows).topk(k, dim=1) for rows in blocks]
    values, places = (torch.cat(parts) for parts in zip(*best, strict=True))
    rows, ranks = torch.nonzero(values > 0, as_tuple=True)
    values = values[rows, ranks]
    at = torch.stack([rows, places[rows, ranks]])
    return _sparse(at, values if not ones else values.sign(), (source.width, target.width))


def _sparse(at: Tensor, entries: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(at, entries, shape, check_invariants=False).coalesce()


def shuffled(transition: Tensor, seed: int = 0) -> Tensor:
    """The transition with the targets exchanged among each other at random, its entries kept."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(transition.shape[1], generator=generator).to(transition.device)
    transition = transition.coalesce()
    sources, targets = transition.indices()
    at = torch.stack([sources, order[targets]])
    return _sparse(at, transition.values(), tuple(transition.shape))


@dataclass(frozen=True)
class Prediction:
    """How the stream at one site is told from that at an earlier one."""

    source: Site
    target: Site
    predict: Callable[[Rows], Rows]
    added: tuple[Site, ...] = ()  # sites whose true activations are added to it


def bridge(source: "SAE", target: "SAE", transition: Tensor, folded: bool = False) -> Prediction:
    """Two SAEs and a transition between their features as a transcoder (Figure 22).

    `folded`: activations are in units of each feature's threshold on both sides (SAE Match, eq. 4),
    so that scales that differ between the layers are matched.
    """
    sizes, back = source.norms, torch.ones_like(target.norms)
    if folded:
        for sae in (source, target):
            if sae.thresholds is None:
                raise ValueError(f"the SAE for {sae.site} has no thresholds to fold")
        theta, own = (s.weights().threshold.clamp(min=SMALLEST_THRESHOLD) for s in (target, source))
        sizes, back = 1 / own, target.norms * theta

    def predict(x: Rows) -> Rows:
        codes = source.encode(x).float() * sizes
        carried = torch.sparse.mm(transition.t(), codes.T).T * back
        none = torch.zeros_like(carried)
        return carried @ target.directions + target.decode(none, x).float()

    return Prediction(source.input_site, target.input_site, predict)


def own_reconstruction(sae: "SAE", target: Site | None = None) -> Prediction:
    """What an SAE makes of the stream that it reads: a bridge into it can hardly do better.

    With a `target` it is taken for the stream there: each feature keeps its own direction.
    """
    target = target or sae.input_site
    return Prediction(sae.input_site, target, lambda x: sae.decode(sae.encode(x), x).float())


def copied(source: Site, target: Site) -> Prediction:
    """The stream at one site taken for that at another."""
    return Prediction(source, target, lambda x: x)


@torch.no_grad()
def linear_map(suite: "Suite", tokens: Tokens, source: Site, target: Site) -> Prediction:
    """The best linear map of the stream over texts, by least squares: a ceiling for bridges."""
    read = zip(*_streams(suite, tokens, [source, target]), strict=True)
    x, y = (torch.cat(parts).double().cpu() for parts in read)  # a GPU has no driver gelsd
    weights = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0), driver="gelsd").solution
    weights, bias = weights.to(tokens.ids.device), (y.mean(0) - x.mean(0) @ weights)
    bias = bias.to(weights)

    def predict(x: Rows) -> Rows:
        return (x.double() @ weights + bias).float()

    return Prediction(source, target, predict)


def through_mlp(transcoder: "Transcoder") -> dict[str, Prediction]:
    """What a trained transcoder (paper 2.2) predicts, so that bridges can be laid beside it.

    `MLP` is what it was trained for. `stream` is the stream after the layer, like a bridge's: that
    before it, what attention truly adds, and the transcoder in the MLP's place. `stream, no MLP`
    leaves the MLP out: what this explains is no merit of the transcoder.
    """
    layer, source = transcoder.target.layer, transcoder.source
    before, attention, after = (Site(layer, module) for module in ("pre", "att", "res"))
    return {
        "MLP": Prediction(source, transcoder.target, transcoder.predict),
        "stream": Prediction(source, after, transcoder.predict, (before, attention)),
        "stream, no MLP": Prediction(before, after, lambda x: x, (attention,)),
    }


def _streams(suite: "Suite", tokens: Tokens, sites: list[Site]) -> Iterator[list[Tensor]]:
    """The stream at the text's tokens, batch by batch."""
    last = max(site.layer for site in sites)
    for rows in torch.arange(len(tokens.ids)).split(BATCH):
        _, read = run_model(suite.model, tokens.ids[rows], sites, stop_after=last)
        yield [read[site][tokens.is_text[rows]].float() for site in sites]


@torch.no_grad()
def explained_variance(
    suite: "Suite",
    tokens: Tokens,
    predictions: Mapping[str, Prediction],
    times: int = TIMES,
    seed: int = 0,
    baseline: str | None = None,
) -> "pd.DataFrame":
    """How much of the target's variance each prediction explains (appendix F; CHOICES 28).

    1 - Σ‖x - x̂‖² / Σ‖x - mean‖², with intervals over texts. Columns: `prediction`, `source`,
    `target`, `tokens`, `explained`, `low`, `high`; with a `baseline`, one of the predictions, also
    by how much it explains more than each: `ahead`, `ahead_low`, `ahead_high`, over the same texts.
    """
    import pandas as pd

    needed = ((p.source, p.target, *p.added) for p in predictions.values())
    sites = [*dict.fromkeys(site for each in needed for site in each)]
    n = tokens.is_text.sum(1).double().cpu()
    parts = torch.zeros(len(predictions), len(tokens.ids), dtype=torch.double)
    squares = {site: torch.zeros(len(tokens.ids), dtype=torch.double) for site in sites}
    sums: dict[Site, Tensor] = {}
    text = tokens.is_text.cpu().nonzero()[:, 0]
    start = 0
    for streams in progress(
        _streams(suite, tokens, sites), "explained variance", -(-len(tokens.ids) // BATCH)
    ):
        read = dict(zip(sites, streams, strict=True))
        of = text[start : start + len(streams[0])]
        start += len(of)
        for site, x in read.items():
            squares[site].index_add_(0, of, x.double().square().sum(1).cpu())
            of_texts = sums.setdefault(site, torch.zeros(len(n), x.shape[1], dtype=torch.double))
            of_texts.index_add_(0, of, x.double().cpu())
        for row, prediction in enumerate(predictions.values()):
            predicted = prediction.predict(read[prediction.source])
            error = read[prediction.target] - sum((read[s] for s in prediction.added), predicted)
            parts[row].index_add_(0, of, error.double().square().sum(1).cpu())
    table = pd.DataFrame({"dataset": "texts", "text": np.arange(len(n))})
    drawn = torch.from_numpy(
        np.vstack([np.ones((1, len(n))), resamples(table, times, seed)])
    ).double()
    rows, drawn_of = [], {}
    for (name, prediction), errors in zip(predictions.items(), parts, strict=True):
        at = prediction.target
        spread = drawn @ squares[at] - (drawn @ sums[at]).square().sum(1) / (drawn @ n)
        drawn_of[name] = explained = (1 - drawn @ errors / spread).numpy()
        rows.append((name, str(prediction.source), str(at), int(n.sum()), *_with_ends(explained)))
    columns = ["prediction", "source", "target", "tokens", "explained", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    if baseline is not None:
        ahead = [_with_ends(drawn_of[baseline] - explained) for explained in drawn_of.values()]
        table[["ahead", "ahead_low", "ahead_high"]] = ahead
    return table


def _with_ends(drawn: np.ndarray) -> tuple[float, float, float]:
    """The first, which is that of all texts, and the interval of the others."""
    low, high = interval(drawn[1:, None])[:, 0]
    return float(drawn[0]), float(low), float(high)
