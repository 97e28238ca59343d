"""Sparse feature activations at every site, in one pass of the model over the texts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowhelpers.features import FeatureId, Site
from flowhelpers.model import Tokens, run, tokenize
from flowhelpers.runs import progress

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

    from flowhelpers.suites import Suite


@dataclass(frozen=True)
class FeatureActivations:
    """Which features are active at which tokens.

    Attributes:
        tokens: One row a token: `text` (its number), `position` (0 is BOS), `token` (its id).
        by_site: At each site the activations, `[tokens, features]`, sparse.
    """

    tokens: "pd.DataFrame"
    by_site: "Mapping[Site, csr_matrix]"

    def of(self, feature: FeatureId) -> np.ndarray:
        """The activation of one feature at every token."""
        return self.by_site[feature.site][:, [feature.index]].toarray()[:, 0]


def collect(
    suite: "Suite",
    texts: Sequence[str],
    sites: Iterable[Site] | None = None,
    max_tokens: int = 128,
    batch: int = 16,
) -> FeatureActivations:
    """Read the features of texts at all sites. BOS and other special tokens are left out.

    Args:
        suite: The suite.
        texts: The texts.
        sites: The sites; by default all that have a dictionary.
        max_tokens: Each text is cut to so many tokens, BOS included.
        batch: Texts in one forward pass.

    Raises:
        ValueError: If no token is left to read.
    """
    return collect_tokens(suite, tokenize(suite.model, texts, max_tokens), sites, batch)


def collect_tokens(
    suite: "Suite",
    tokens: Tokens,
    sites: Iterable[Site] | None = None,
    batch: int = 16,
) -> FeatureActivations:
    """As `collect`, of texts that are tokens already."""
    import pandas as pd
    from scipy.sparse import vstack

    batches = list(read_batches(suite, tokens, sites, batch))
    text, position = torch.nonzero(tokens.is_text, as_tuple=True)
    frame = pd.DataFrame(
        {
            "text": text.cpu().numpy(),
            "position": position.cpu().numpy(),
            "token": tokens.ids[text, position].cpu().numpy(),
        }
    )
    by_site = {site: vstack([read[site] for read in batches], format="csr") for site in batches[0]}
    return FeatureActivations(frame, by_site)


def read_batches(
    suite: "Suite",
    tokens: Tokens,
    sites: Iterable[Site] | None = None,
    batch: int = 16,
) -> "Iterator[dict[Site, csr_matrix]]":
    """The activations of texts batch by batch, for each site `[tokens of the batch, features]`.

    Args:
        suite: The suite.
        tokens: The texts.
        sites: The sites; by default all that have a dictionary.
        batch: Texts in one forward pass.

    Raises:
        ValueError: If no token is left to read.
    """
    from scipy.sparse import csr_matrix

    if not tokens.is_text.any():
        raise ValueError("no token is left to read: the texts hold special tokens only")
    dictionaries = [suite.dictionary(site) for site in sites or suite.dictionaries]
    reads = [dictionary.reads for dictionary in dictionaries]
    for rows in progress(torch.arange(len(tokens.ids)).split(batch), "activations"):
        length = 1 + max(tokens.is_text[rows].any(0).nonzero().flatten().tolist(), default=0)
        ids, is_text = tokens.ids[rows, :length], tokens.is_text[rows, :length]
        _, read = run(suite.model, ids, reads, stop_after=max(site.layer for site in reads))
        yield {
            dictionary.site: csr_matrix(
                dictionary.encode(read[dictionary.reads][is_text]).float().cpu().numpy()
            )
            for dictionary in dictionaries
        }
