"""Whether SAEs see what they were trained on: a look at a few sentences before long work.

An SAE at a neighbouring site, or with thresholds in other units, gives numbers that look like any
others; only its L0 and its explained variance are far off.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flowhelpers.activations.corpora import load_texts
from flowhelpers.activations.sampling import text_length
from flowhelpers.core.features import Site, parse_site
from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import is_edited, run_model, tokenize
from flowhelpers.suites.registry import declared

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

FAR_L0 = 2.5  # times more or fewer active features than declared, on a few sentences
LEAST_VARIANCE = 0.3  # explained, where nothing is declared
BELOW_DECLARED = 0.25


def preflight_sites(sites: Iterable[Site]) -> list[Site]:
    """Of some sites, those of the first, the middle and the last layer."""
    sites = list(dict.fromkeys(sites))
    layers = sorted({site.layer for site in sites})
    return [
        site for site in sites if site.layer in (layers[0], layers[len(layers) // 2], layers[-1])
    ]


def preflight_once(suite: "Suite", sites: Iterable[Site]) -> None:
    """The preflight of SAEs from the hub, when an experiment first loads them for texts.

    Of the experiment's sites those of `preflight_sites` are looked at, each once. SAEs of a folder
    are left to who made them, and a model that is being edited is left alone.
    """
    of_hub = [site for site in sites if isinstance(suite.row.saes.get(site), Mapping)]
    asked = [site for site in preflight_sites(of_hub) if site not in suite.checked_sites]
    if asked and not is_edited(suite.model):
        run_preflight(suite, sites=asked)


@torch.no_grad()
def run_preflight(
    suite: "Suite", texts: Sequence[str] | None = None, sites: Iterable[Site | str] | None = None
) -> "pd.DataFrame":
    """L0 and explained variance of SAEs on a few sentences, against what is declared.

    BOS and other special tokens are left out (CHOICES 1). What is declared are means over much text
    of another kind: only figures far from them are warned of. The texts are some of the package's
    own unless given, the sites those of `preflight_sites`.

    Returns:
        One row a site: `site`, `tokens`, `l0` (active features a token), `explained_variance` (1
        less the squared error over the variance), both as `declared`, and `is_suspicious`.
    """
    import pandas as pd

    texts = load_texts("science", 6) if texts is None else texts
    chosen = preflight_sites(suite.saes) if sites is None else [parse_site(str(s)) for s in sites]
    tokens = tokenize(suite.model, texts, text_length(suite.model))
    inputs = [suite.about(site, "input_site") for site in chosen]
    _, read = run_model(suite.model, tokens.ids, inputs, stop_after=max(s.layer for s in chosen))
    rows = []
    for site in progress(chosen, "preflight"):
        sae = suite.sae(site)
        x = read[sae.input_site][tokens.is_text]
        codes = sae.encode(x)
        error = x.double() - sae.decode(codes, x).double()
        spread = x.double() - x.double().mean(0)
        l0, variance = declared(suite.row.saes.get(site, ""))
        row = {
            "site": str(site),
            "tokens": len(x),
            "l0": (codes > 0).sum(-1).double().mean().item(),
            "declared_l0": l0,
            "explained_variance": 1 - (error.square().sum() / spread.square().sum()).item(),
            "declared_variance": variance,
        }
        rows.append(row | {"is_suspicious": (problem := _problem(row)) is not None})
        suite.checked_sites.add(site)
        if problem:
            warnings.warn(f"{site} of suite {suite.name}: {problem}", stacklevel=3)
    return pd.DataFrame(rows).astype({"declared_l0": float, "declared_variance": float})


def _problem(row: Mapping[str, Any]) -> str | None:
    l0, variance = row["declared_l0"], row["declared_variance"]
    least = LEAST_VARIANCE if variance is None else variance - BELOW_DECLARED
    is_near = l0 is None or l0 / FAR_L0 <= row["l0"] <= l0 * FAR_L0
    if is_near and row["explained_variance"] >= least:  # false if that is not a number
        return None
    said = "" if l0 is None else f" where {l0:.0f} are declared"
    return (
        f"{row['l0']:.1f} features are active a token{said}, and {row['explained_variance']:.2f} of"
        " the variance is explained: it may not see what it was trained on"
    )
