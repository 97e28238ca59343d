"""Sparse feature activations at every site, in one pass of the model over the texts."""

from collections.abc import Iterable, Mapping, Sequence
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
    from scipy.sparse import csr_matrix, vstack

    if not tokens.is_text.any():
        raise ValueError("no token is left to read: the texts hold special tokens only")
    sites = list(sites or suite.dictionaries)
    dictionaries = {site: suite.dictionary(site) for site in sites}
    last = max(site.layer for site in sites)
    parts: dict[Site, list[csr_matrix]] = {site: [] for site in sites}
    for rows in progress(torch.arange(len(tokens.ids)).split(batch), "activations"):
        length = 1 + max(tokens.is_text[rows].any(0).nonzero().flatten().tolist(), default=0)
        ids, is_text = tokens.ids[rows, :length], tokens.is_text[rows, :length]
        _, read = run(suite.model, ids, read=sites, stop_after=last)
        for site, dictionary in dictionaries.items():
            values = dictionary.encode(read[site][is_text])
            parts[site].append(csr_matrix(values.float().cpu().numpy()))
    text, position = torch.nonzero(tokens.is_text, as_tuple=True)
    frame = pd.DataFrame(
        {
            "text": text.cpu().numpy(),
            "position": position.cpu().numpy(),
            "token": tokens.ids[text, position].cpu().numpy(),
        }
    )
    return FeatureActivations(
        frame, {site: vstack(rows, format="csr") for site, rows in parts.items()}
    )
