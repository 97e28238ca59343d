"""How long a suite's jobs take on this machine, foretold from single steps that are timed.

A step is one of the package's own functions on random numbers of the suite's shapes; of the model
and its SAEs nothing is fetched but `config.json`. `tests/test_forecast.py` holds small jobs of each
kind within a factor of two of the real thing on `flowlet`.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any, NamedTuple

import pandas as pd
import torch

from flowhelpers.activations.sampling import MAX_TOKENS, text_length
from flowhelpers.activations.sparse import read_batches
from flowhelpers.core.features import MODULES, Site, predecessor_sites
from flowhelpers.core.files import DATA
from flowhelpers.core.machine import check_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.matching.matchers import assignment_time, by_permutation
from flowhelpers.matching.null import null_cosines
from flowhelpers.matching.table import match_table
from flowhelpers.steering.plans import make_plan
from flowhelpers.steering.sweeps import steer
from flowhelpers.suites.bridge import bridged
from flowhelpers.suites.hub import fetch
from flowhelpers.suites.load import OnDemand, Suite, device_and_dtype
from flowhelpers.suites.model import Model, Tokens
from flowhelpers.suites.registry import BYTES, SuiteRow, declared, find_suite
from flowhelpers.suites.saes import make_sae

SECONDS, REPEATS = 4.0, 5  # of a measurement: the best of so many calls, or of those begun by then
SMALL = 2e8  # parameters of a model that is made whole; of larger ones the first layer is made, and
DEEP = 3  # so many: what these take more is that of each layer
USUAL_L0 = 64  # of SAEs that declare none
TOKENS, PER_PASS = 100_000, 16  # that are read, and texts of a pass
TEXTS, NEW = 512, 36  # that are steered together, and tokens of each
LONGEST = 60.0  # seconds of an assignment that is still tried out


class Step(NamedTuple):
    """A step of a job, how often the job takes it, and what times it."""

    job: str
    step: str
    count: int
    time: Callable[[], float]


def forecast(name: str, device: str = "auto") -> pd.DataFrame:
    """What a suite's jobs take here: matching, permutations, reading and steering texts.

    Returns:
        One row a step: `job`, `step`, `seconds` of one, `count` of them in the job, and `total` in
        seconds; `attrs["left_out"]` says of other steps, by job and step, why they could not be
        timed. Jobs that the suite's sites leave out have no rows.
    """
    rows, left_out = [], {}
    for step in progress(steps_of(name, device), "timing"):
        try:
            seconds = step.time()
        except (OSError, MemoryError, TimeoutError) as error:
            left_out[f"{step.job}, {step.step}"] = str(error).splitlines()[0]
            continue
        rows.append((step.job, step.step, seconds, step.count, step.count * seconds))
    table = pd.DataFrame(rows, columns=["job", "step", "seconds", "count", "total"])
    table.attrs["left_out"] = left_out
    return table


def steps_of(name: str, device: str = "auto") -> list[Step]:
    """The steps of all jobs; nothing is timed yet."""
    row = find_suite(name)
    layers = row.layers or 1 + max(row.saes).layer
    modules = tuple(module for module in MODULES if any(s.module == module for s in row.saes))
    of_depth = cache(partial(stand_in, row, modules))
    at = device_and_dtype(row, device, "auto")

    def through(measure: Callable[[Suite], float]) -> float:
        """What a step takes through all layers; of large models by two depths: it is linear."""
        if (row.model_parameters or 0) < SMALL:
            return measure(of_depth(layers, *at))
        first, deep = (measure(of_depth(depth, *at)) for depth in (1, DEEP))
        return first + (layers - 1) * max(0.0, deep - first) / (DEEP - 1)

    ends = [site for site in row.saes if site.module == "res"]
    pairs = sum(site in row.saes for end in ends for site in predecessor_sites(end).values())
    one = cache(partial(stand_in, row, MODULES, 1, *at))
    passes = -(-TOKENS // (PER_PASS * (MAX_TOKENS - 1)))
    steps = [
        Step("the match table", "pair of SAEs", pairs, lambda: time_pair(one())),
        Step("the match table", "null of an SAE", pairs and len(row.saes),
             lambda: time_null(one())),
        Step("permutations", "pair of SAEs, one to one", pairs, lambda: time_assignment(one())),
        Step(f"{TOKENS:,} tokens read at all sites", f"{PER_PASS} texts", passes,
             lambda: through(time_reading)),
        Step(f"{TEXTS} texts of {NEW} tokens steered", "token of all", NEW if ends else 0,
             lambda: through(time_sampling)),
    ]  # fmt: skip
    return [step for step in steps if step.count]


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


def shapes(row: SuiteRow) -> tuple[int, int, float | None]:
    """Features of an SAE, width of the stream, features active at a token: a suite's means."""
    if not row.parameters or not row.d_model:
        raise ValueError(f"{row.name}: the shapes of its SAEs are not known before they are loaded")
    each = (row.parameters - (row.model_parameters or 0)) / len(row.saes)
    known = [l0 for source in row.saes.values() if (l0 := declared(source)[0])]
    width = row.features or round((each - row.d_model) / (2 * row.d_model + 2))
    return width, row.d_model, mean(known) if known else None


def stand_in(row: SuiteRow, modules: Sequence[str], layers: int, device: str, dtype: str) -> Suite:
    """So many layers of a suite, of random numbers: its widths, and as many features active.

    Its SAEs have the mean width of the suite's, and the mean L0 that these declare, else 64. They
    bring each token to variance 1, so that their threshold is known beforehand; those of one kind,
    of the stream or of modules, share their weights.
    """
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    width, d, l0 = shapes(row)
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
            lens_sae.threshold.fill_(NormalDist().inv_cdf(1 - min((l0 or USUAL_L0) / width, 0.5)))
        return lens_sae

    def load(site: Site) -> Any:
        return make_sae(site, of_kind(site.module == "res"), d, "random")

    sites = [Site(layer, module) for layer in range(layers) for module in modules]
    saes = OnDemand(sites, load, len(sites))
    few = SuiteRow(row.name, row.model, dict.fromkeys(sites, "random"), layers=layers, d_model=d)
    return Suite(few, partial(_model, row, layers, device, dtype), saes, device, dtype)


def _model(row: SuiteRow, layers: int, device: str, dtype: str) -> Model:
    """The first layers of a suite's model, with random weights and flowlet's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    about = Path(row.model) / "config.json"
    if not about.is_file():
        about = fetch(row.model, "config.json", row.revision)
    config = AutoConfig.from_pretrained(about).get_text_config()
    numbers = layers * (row.model_parameters or 0) // (row.layers or 1)
    numbers += 2 * config.vocab_size * config.hidden_size
    check_memory(BYTES[dtype] * numbers, f"{layers} layers of {row.model}", device, dtype)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    weights = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(DATA / "flowlet" / "model")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return bridged(row.model, folder, weights.to(device), tokenizer)


def time_pair(suite: Suite) -> float:
    """Both ways between two SAEs, in a match table of theirs alone whose nulls are on disk."""
    saes = {site: suite.sae(site) for site in (Site(0, "res"), Site(0, "mlp"))}
    two = Suite(suite.row, suite.source, saes, suite.device)
    with tempfile.TemporaryDirectory() as folder:
        k = count(2)  # of each another, for a table is kept
        match_table(two, next(k), cache=Path(folder))
        return best_time(lambda: match_table(two, next(k), cache=Path(folder)))


def time_null(suite: Suite) -> float:
    """The null of one SAE."""
    return best_time(lambda: null_cosines(suite.sae("0/res").decoder))


def time_assignment(suite: Suite) -> float:
    """One permutation; a TimeoutError if by a part of it it would take over a minute."""
    target, source = suite.sae("0/res"), suite.sae("0/mlp")
    foretold = assignment_time((target.directions @ source.directions.T).cpu().numpy())
    if foretold > LONGEST:
        raise TimeoutError(f"one takes some {foretold / 60:.0f} minutes, too long to be tried out")
    return best_time(lambda: by_permutation(target, source, device=suite.device))


def time_reading(suite: Suite) -> float:
    """A pass of 16 texts whose features are read at all tokens."""
    vocabulary = suite.model.unembedding.shape[1]
    length = text_length(suite.model)
    ids = torch.randint(4, vocabulary, (PER_PASS, length)).to(suite.model.device)
    tokens = Tokens(ids, torch.arange(length).to(ids).expand_as(ids) > 0)
    return best_time(lambda: [*read_batches(suite, tokens)])


def time_sampling(suite: Suite) -> float:
    """A new token of 512 texts under plans of a feature at every residual site."""
    plan = make_plan(suite, [f"{layer}/res/0" for layer in range(suite.layers)], -1.0, unit="unit")
    plans = {str(number): plan for number in range(TEXTS // 32)}

    def seconds(new: int) -> float:
        given = {"batch_size": TEXTS, "show_progress": False}
        return best_time(lambda: steer(suite, plans, "I think", 32, new, **given))

    new = min(NEW, max(2, int(SECONDS / seconds(1))))
    return seconds(new) / new  # the prompt's pass is among its steps
