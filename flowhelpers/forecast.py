"""How long the notebooks will take on this machine, foretold from single steps that are timed.

A step is one of the package's own functions on random numbers of a suite's shapes; of the model and
its SAEs nothing is fetched but `config.json`. How often a preset's notebooks take it is counted
from their parameters. Fetching files, a judge's answers, figures and tables are left out, and so
are notebooks 00, 07 and 08.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from statistics import NormalDist, mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowhelpers.core.features import MODULES, Site, predecessor_sites
from flowhelpers.core.machine import check_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.matching.matchers import MAX_TOKENS, ROWS, by_pearson, by_permutation
from flowhelpers.suites.load import KEPT, OnDemand, Suite, device_and_dtype, memory_needed
from flowhelpers.suites.model import Model, Tokens
from flowhelpers.suites.registry import BYTES, SuiteRow, declared, find_suite

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

DEEP = 3  # layers of a second, deeper model: what it takes more is that of its layers
SECONDS, REPEATS = 4.0, 5  # of a measurement: the best of so many, or of those begun by then
USUAL_L0 = 64  # of SAEs that declare none
TEXTS = 512  # that are steered together
LONGEST = 60.0  # seconds of an assignment that is still tried out
PART, GROWTH = 2048, 2.3  # features of a smaller assignment; how time grows with them
PER_TEXT = 16  # texts of a pass that reads


def best_time(call: Callable[[], Any]) -> float:
    """Seconds of the quickest of a few calls."""
    times: list[float] = []
    while not times or (len(times) < REPEATS and sum(times) < SECONDS):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def stand_in(row: SuiteRow, layers: int, device: str, dtype: str, with_model: bool = True) -> Suite:
    """So many layers of a suite, of random numbers: its widths, and as many features active.

    Its SAEs have the mean width of the suite's, and the mean L0 that these declare, else 64. They
    bring each token to variance 1, so that their threshold is known beforehand; those of one kind,
    of the stream or of modules, share their weights.
    """
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    from flowhelpers.suites.saes import make_sae

    width, d, l0 = _shapes(row)
    check_memory(4 * (4 + 3 * layers) * width * d, "SAEs of random numbers", device)
    config = JumpReLUSAEConfig(
        d_in=d, d_sae=width, normalize_activations="layer_norm", device=device, dtype=dtype
    )

    @cache
    def of_kind(is_res: bool) -> Any:
        lens_sae = JumpReLUSAE(config)
        with torch.no_grad():
            for weights in (lens_sae.W_dec, lens_sae.W_enc):
                weights.normal_(0, d**-0.5)
            lens_sae.threshold.fill_(NormalDist().inv_cdf(1 - min(l0 / width, 0.5)))
        return lens_sae

    def load(site: Site) -> Any:
        return make_sae(site, of_kind(site.module == "res"), d, "random")

    sites = [Site(layer, module) for layer in range(layers) for module in MODULES]
    saes = OnDemand(sites, load, len(sites))
    few = SuiteRow(row.name, row.model, dict.fromkeys(sites, "random"), layers=layers, d_model=d)
    model = cache(lambda: _model(row, layers, device, dtype))
    return Suite(few, model if with_model else _no_model, saes, device, dtype)


def _no_model() -> Model:
    raise AssertionError("this step needs no model")


def _shapes(row: SuiteRow) -> tuple[int, int, float]:
    """Features of an SAE, width of the stream, features active at a token: the means of a suite."""
    if not row.parameters or not row.d_model:
        raise ValueError(f"{row.name}: the shapes of its SAEs are not known before they are loaded")
    each = (row.parameters - (row.model_parameters or 0)) / len(row.saes)
    known = [l0 for source in row.saes.values() if (l0 := declared(source)[0])]
    width = row.features or round((each - row.d_model) / (2 * row.d_model + 2))
    return width, row.d_model, mean(known or [USUAL_L0])


def _model(row: SuiteRow, layers: int, device: str, dtype: str) -> Model:
    """The first layers of a suite's model with random weights, and a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import PreTrainedTokenizerFast

    from flowhelpers.suites.bridge import bridged

    config = AutoConfig.from_pretrained(row.model, revision=row.revision).get_text_config()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    numbers = (row.model_parameters or 0) // (row.layers or 1)
    numbers = layers * numbers + 2 * config.vocab_size * config.hidden_size
    check_memory(BYTES[dtype] * numbers, f"{layers} layers of {row.model}", device, dtype)
    weights = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    words = Tokenizer(WordLevel({"[PAD]": 0, "[EOS]": 1, "[BOS]": 2, "word": 3}, "word"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]", "bos_token": "[BOS]"}
    with tempfile.TemporaryDirectory() as folder:  # TransformerLens looks for both in files
        config.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return bridged(row.model, folder, weights.to(device), tokenizer)


def time_pair(suite: Suite) -> float:
    """Both ways between two SAEs, in a match table of theirs alone whose nulls are on disk."""
    from flowhelpers.matching.table import match_table

    sites = {Site(0, "res"), Site(0, "mlp")}
    two = Suite(suite.row, _no_model, {site: suite.sae(site) for site in sites}, suite.device)
    with tempfile.TemporaryDirectory() as folder:
        match_table(two, k=2, device=suite.device, cache=Path(folder))
        k = count(3)  # of each another, for a table is kept
        return best_time(
            lambda: match_table(two, k=next(k), device=suite.device, cache=Path(folder))
        )


def time_null(suite: Suite) -> float:
    """The null of one SAE."""
    from flowhelpers.matching.cosine import prepare
    from flowhelpers.matching.null import null_cosines

    rows = prepare(suite.sae("0/res").decoder, suite.device)
    return best_time(lambda: null_cosines(rows, device=suite.device))


def time_assignment(suite: Suite) -> float:
    """One permutation; a TimeoutError if by a part of it it would take over a minute."""
    from scipy.optimize import linear_sum_assignment

    target, source = suite.sae("0/res"), suite.sae("0/mlp")
    products = target.directions[:PART].cpu() @ source.directions[:PART].cpu().T
    small = best_time(lambda: linear_sum_assignment(products.numpy(), True))
    foretold = small * (target.width / len(products)) ** GROWTH
    if foretold > LONGEST:
        raise TimeoutError(f"it takes some {foretold / 60:.0f} minutes, too long to be tried out")
    return best_time(lambda: by_permutation(target, source, device=suite.device))


def time_correlation(width: int, l0: float, tokens: int) -> float:
    """Pearson's correlations of a pair of SAEs; of wide ones by two parts, for it is linear."""
    from scipy.sparse import csr_matrix

    rng, active = np.random.default_rng(0), max(1, round(l0))

    def codes(features: int) -> "csr_matrix":
        at = rng.integers(0, width, (tokens, active))
        row = np.repeat(np.arange(tokens), active)
        values = rng.random(at.size, dtype=np.float32) + 0.1
        made = csr_matrix((values, (row, at.ravel())), (tokens, width))
        return made[:, :features]

    source, shifted = codes(width), np.roll(np.arange(tokens), tokens // 2)
    part = ROWS * torch.get_num_threads()
    sizes = [width] if width <= 4 * part else [part, 2 * part]
    targets = codes(sizes[-1])
    times = [best_time(lambda n=n: by_pearson(targets[:, :n], source, shifted, 5)) for n in sizes]
    return times[0] + (times[-1] - times[0]) * (width / sizes[0] - 1)


def time_reading(suite: Suite, per_text: int | None = None) -> float:
    """A pass of 16 texts, whose features are read at all tokens, or at so many of each."""
    from flowhelpers.activations.sparse import read_batches

    tokens = _texts(suite, PER_TEXT)
    tokens.is_text[:, 1 if per_text is None else 1 + per_text :] &= per_text is None
    return best_time(lambda: [*read_batches(suite, tokens)])


def _texts(suite: Suite, n: int) -> Tokens:
    vocabulary = suite.model.unembedding.shape[1]
    ids = torch.randint(4, vocabulary, (n, MAX_TOKENS)).to(suite.model.device)
    return Tokens(ids, torch.arange(MAX_TOKENS).to(ids).expand_as(ids) > 0)


def time_sampling(suite: Suite, kind: str, new: int, samples: int) -> float:
    """A new token of 512 texts; each plan has a feature at every residual site."""
    from flowhelpers.steering.plans import make_plan
    from flowhelpers.steering.sweeps import steer

    features = [f"{layer}/res/0" for layer in range(suite.layers)]
    plan = make_plan(suite, features, -1.0, kind)
    plans = {str(number): plan for number in range(TEXTS // samples)}

    def seconds(length: int) -> float:
        given = {"batch_size": TEXTS, "show_progress": False}
        return best_time(lambda: steer(suite, plans, "word", samples, length, **given))

    first = seconds(1)
    more = int(np.clip(SECONDS / first, 1, new - 1))
    return (seconds(1 + more) - first) / more


def time_edits(suite: Suite, tokens: int, targets: int, cases: int, loss: bool = False) -> float:
    """The cases of so many targets at each of some tokens of a text."""
    import pandas as pd

    from flowhelpers.deactivation.ablation import deactivate

    last = suite.layers - 1
    positions = np.linspace(MAX_TOKENS // 4, 3 * MAX_TOKENS // 4, tokens).astype(int)
    at = [(last, n, "random", 0, position) for position in positions for n in range(targets)]
    table = pd.DataFrame(at, columns=["layer", "feature", "dataset", "text", "position"])
    case = np.arange(cases * len(table))
    width = suite.sae(f"{last}/mlp").width
    edits = pd.DataFrame({"case": case, "module": "mlp", "feature": case % width, "amount": 1.0})
    cases_of = pd.DataFrame({"target": case // cases})
    texts = _texts(suite, 1)
    return best_time(lambda: deactivate(suite, texts, table, cases_of, edits, loss=loss))
