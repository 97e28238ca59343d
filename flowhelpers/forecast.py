"""How long the notebooks will take on this machine, foretold from single steps that are timed.

A step is one of the package's own functions on random numbers of a suite's shapes; of the model and
its SAEs nothing is fetched but `config.json`. How often a preset's notebooks take it is counted
from their parameters. Fetching files, a judge's answers, figures and tables are left out, and so
are notebooks 00, 07 and 08. `tests/test_forecast.py` holds every step within a factor of two of the
real thing on `flowlet`.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import count
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix

from flowhelpers.activations.corpora import passages
from flowhelpers.activations.sampling import datasets_for
from flowhelpers.activations.sparse import read_batches
from flowhelpers.core.features import MODULES, Site, predecessor_sites
from flowhelpers.core.files import DATA
from flowhelpers.core.machine import check_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.deactivation.ablation import deactivate
from flowhelpers.deactivation.targets import middle_layers
from flowhelpers.matching.cosine import prepare
from flowhelpers.matching.matchers import MAX_TOKENS, by_pearson, by_permutation
from flowhelpers.matching.null import null_cosines
from flowhelpers.matching.table import match_table
from flowhelpers.runs.parameters import inspect, plan
from flowhelpers.steering.plans import make_plan
from flowhelpers.steering.sweeps import steer
from flowhelpers.suites.bridge import bridged
from flowhelpers.suites.load import OnDemand, Suite, device_and_dtype
from flowhelpers.suites.model import Model, Tokens
from flowhelpers.suites.registry import BYTES, GEMMA, SuiteRow, declared, find_suite
from flowhelpers.suites.saes import make_sae

SECONDS, REPEATS = 4.0, 5  # of a measurement: the best of so many calls, or of those begun by then
SMALL = 2e8  # parameters of a model that is made whole; of larger ones the first layer is made, and
DEEP = 3  # so many: what these take more is that of each layer
WHOLE = 4096  # features of SAEs whose correlations are timed whole
USUAL_L0 = 64  # of SAEs that declare none
TEXTS, PER_PASS = 512, 16  # that are steered, and that are read together
CASES = 3  # of a target, unlike ones, of all methods and controls: on flowlet 2.5
LONGEST = 60.0  # seconds of an assignment that is still tried out, foretold from that of
PART, GROWTH = 2048, 2.3  # so many features by how time grows with them


class Step(NamedTuple):
    """A step, how often it is taken, how that is counted, and what gives its seconds."""

    name: str
    count: float
    counted: str
    time: Callable[[], float]


def forecast(name: str, preset: str = "paper", device: str = "auto") -> pd.DataFrame:
    """The steps of a preset's notebooks on a suite, each timed here, and how long all of each take.

    Returns:
        One row a step: `step`, `seconds` of one, `count`, `counted` (the formula in words) and
        `total` in seconds; `attrs["left_out"]` says why others have no row.
    """
    rows, left_out = [], {}
    for step in progress(steps_of(name, preset, device), "timing"):
        try:
            seconds = step.time()
        except (OSError, MemoryError, TimeoutError, LookupError) as error:
            left_out[step.name] = str(error).splitlines()[0]
            continue
        rows.append((step.name, seconds, *step[1:3], step.count * seconds))
    table = pd.DataFrame(rows, columns=["step", "seconds", "count", "counted", "total"])
    table.attrs["left_out"] = left_out
    return table


def steps_of(name: str, preset: str, device: str = "auto") -> list[Step]:
    """The steps of notebooks 01 to 06 that the preset takes; nothing is timed yet."""
    row = find_suite(name)
    planned = plan([f"0{number}" for number in range(1, 7)], {"suite": name}, preset).items()
    p1, p2, p3, p4, p5, p6 = (
        {n: each.default for n, each in inspect(path).items()} | own for path, own in planned
    )
    (width, _, l0), layers = shapes(row), row.layers or 1 + max(row.saes).layer
    of_depth = cache(partial(stand_in, row))

    def suite(depth: int = 1, dtype: str = "auto") -> Suite:
        return of_depth(depth, *device_and_dtype(row, device, dtype))

    def through(n: int, measure: Callable[..., float], *given: Any, dtype: str = "auto") -> Any:
        """What a step takes through n layers; of large models by two depths, for it is linear."""

        def seconds() -> float:
            if (row.model_parameters or 0) < SMALL:
                return measure(suite(layers, dtype), n, *given)
            first, deep = (measure(suite(depth, dtype), depth, *given) for depth in (1, DEEP))
            return first + (n - 1) * max(0.0, deep - first) / (DEEP - 1)

        return seconds

    def pairs(at: Iterable[int]) -> int:
        ends = [site for site in (Site(n, "res") for n in at) if site in row.saes]
        return sum(before in row.saes for end in ends for before in predecessor_sites(end).values())

    compared = pairs(p1["layers"] or range(layers // 2 % 2, layers, 2))
    every, ways = pairs(range(layers)), {p3["matcher"], *p3["compare"], *p4["methods"]}
    tables = len({p1["k"], p2["k"], 5, 1}) + ("random" in {*p1["methods"], *ways})
    more = len({*p1["methods"]} & {"folded", "all_weights", "all_folded"})
    one_to_one = every * ("permutation" in ways) + compared * more
    asked = (
        (p1["methods"], compared),
        ([p3["matcher"], *p3["compare"]], every),
        (p4["methods"], every),
    )
    reads = [(p["pearson_texts"], n) for p, (methods, n) in zip((p1, p3, p4), asked, strict=True)
             if "pearson" in methods]  # fmt: skip
    unread = max((texts for texts, _ in reads), default=0)
    whole = [len(passages().groupby("subject").head(n)) for n in (p2["texts"], 12, 12)]
    whole = sum(whole) + p1["texts"] + sum(texts for texts, _ in reads)
    n_texts, tokens, targets = p4["n_texts"], p4["tokens_per_text"], p4["features_per_token"]
    sampled = len(p3["datasets"] or datasets_for(row)) * p3["n_texts"] + n_texts
    at = p4["layers"] or middle_layers(layers)
    once = n_texts * len(at)
    searched = n_texts * len(p4["search_layers"] or at) * p4["exhaustive"] * 3 * (l0 or USUAL_L0)
    swept = min(p4["sweep_targets"] / (tokens * targets), once)
    ends = [layers if p["layers"] == "all" else len(p["layers"] or usual)
            for p, usual in ((p5, range(layers // 2 + 1)), (p6, range(3)))]  # fmt: skip
    r, s, themes = len(p5["r_values"]), len(p6["strengths"]), len(p6["themes"] or range(4))
    # With those that are reported, their controls, and 06's trial of candidates and C.3.
    cells = {"05": r * (2 * ends[0] + 4) + 8}
    each = len(p6["strategies"]) * (ends[1] * s + 2) + 2 * s + 13
    if not (p6["seeds"] or row.name.split("@")[0] == GEMMA):
        each += p6["candidates"] * 16 / p6["n_samples"]
    c3 = layers if p6["layers_c3"] == "all" else len(p6["layers_c3"] or range(8))
    cells["06"] = int(themes * each + 2 * c3 + 4)
    steps = [
        Step("match a pair of SAEs", every * tables, f"{every} pairs x {tables} tables",
             lambda: time_pair(suite())),
        Step("null of an SAE", len(row.saes), "SAEs", lambda: time_null(suite())),
        Step("permutation of a pair", one_to_one, f"all pairs, and {compared} x {more} of 01",
             lambda: time_assignment(suite())),
        Step(f"Pearson of a pair, {unread} texts", sum(n for _, n in reads), "pairs of 01, 03, 04",
             lambda: time_correlation(width, l0, unread * (MAX_TOKENS - 1))),
        Step("16 texts read", whole / PER_PASS, f"{whole:,} texts of 01 to 06 / 16",
             through(layers, time_reading)),
        Step("some tokens of 16 texts read", sampled / PER_PASS, f"{sampled:,} of 03 and 04 / 16",
             through(layers, time_reading, tokens)),
        Step("04: features of a text ablated", once + searched / targets / CASES,
             f"{n_texts} texts x {len(at)} layers, and as many rows as the search has",
             through(1 + round(mean(at)), time_edits, tokens, targets, CASES, dtype=p4["dtype"])),
        Step("04: a text's loss at all r", swept, f"{n_texts} texts x {len(at)} layers, or fewer",
             through(layers, time_losses, tokens, targets, len(p4["r_values"]), dtype=p4["dtype"])),
    ]  # fmt: skip
    for number, kind, p in (("05", "rescale", p5), ("06", "add", p6)):
        n, new = cells[number], p["max_new_tokens"]
        counted = f"at most {n:,} cells x {p['n_samples']} / {TEXTS} x {new} tokens"
        call = through(layers, time_sampling, kind, new, p["n_samples"])
        times = -(-n * p["n_samples"] // TEXTS) * new
        steps.append(Step(f"{number}: a token of {TEXTS} texts", times, counted, call))
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


def stand_in(row: SuiteRow, layers: int, device: str, dtype: str) -> Suite:
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

    sites = [Site(layer, module) for layer in range(layers) for module in MODULES]
    saes = OnDemand(sites, load, len(sites))
    few = SuiteRow(row.name, row.model, dict.fromkeys(sites, "random"), layers=layers, d_model=d)
    return Suite(few, partial(_model, row, layers, device, dtype), saes, device, dtype)


def _model(row: SuiteRow, layers: int, device: str, dtype: str) -> Model:
    """The first layers of a suite's model, with random weights and flowlet's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(row.model, revision=row.revision).get_text_config()
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
    sites = {Site(0, "res"), Site(0, "mlp")}
    two = Suite(suite.row, suite.source, {site: suite.sae(site) for site in sites}, suite.device)
    with tempfile.TemporaryDirectory() as folder:
        match_table(two, k=2, device=suite.device, cache=Path(folder))
        k = count(3)  # of each another, for a table is kept
        return best_time(
            lambda: match_table(two, k=next(k), device=suite.device, cache=Path(folder))
        )


def time_null(suite: Suite) -> float:
    """The null of one SAE."""
    rows = prepare(suite.sae("0/res").decoder, suite.device)
    return best_time(lambda: null_cosines(rows, device=suite.device))


def time_assignment(suite: Suite) -> float:
    """One permutation; a TimeoutError if by a part of it it would take over a minute."""
    target, source = suite.sae("0/res"), suite.sae("0/mlp")
    products = target.directions[:PART].cpu() @ source.directions[:PART].cpu().T
    small = best_time(lambda: linear_sum_assignment(products.numpy(), True))
    foretold = small * (target.width / len(products)) ** GROWTH
    if foretold > LONGEST:
        raise TimeoutError(f"it takes some {foretold / 60:.0f} minutes, too long to be tried out")
    return best_time(lambda: by_permutation(target, source, device=suite.device))


def time_correlation(width: int, l0: float | None, tokens: int) -> float:
    """Pearson's correlations of a pair of SAEs; of wide ones by two parts, for it is linear."""
    if l0 is None:
        raise LookupError("it grows with the square of L0, which its SAEs do not declare")
    rng, active = np.random.default_rng(0), max(1, round(l0))

    def codes(features: int) -> csr_matrix:
        at = rng.integers(0, width, (tokens, active))
        row = np.repeat(np.arange(tokens), active)
        values = rng.random(at.size, dtype=np.float32) + 0.1
        made = csr_matrix((values, (row, at.ravel())), (tokens, width))
        return made[:, :features]

    source, shifted = codes(width), np.roll(np.arange(tokens), tokens // 2)
    sizes = [width] if width <= WHOLE else [width // 8, width // 4]
    targets = codes(sizes[-1])
    times = [best_time(lambda n=n: by_pearson(targets[:, :n], source, shifted, 5)) for n in sizes]
    return times[0] + (times[-1] - times[0]) * (width / sizes[0] - 1)


def time_reading(suite: Suite, _: int, per_text: int | None = None) -> float:
    """A pass of 16 texts, whose features are read at all tokens, or at so many of each."""
    tokens = _texts(suite, PER_PASS)
    tokens.is_text[:, 1 : -per_text if per_text else 1] = False
    return best_time(lambda: [*read_batches(suite, tokens)])


def _texts(suite: Suite, n: int) -> Tokens:
    vocabulary = suite.model.unembedding.shape[1]
    ids = torch.randint(4, vocabulary, (n, MAX_TOKENS)).to(suite.model.device)
    return Tokens(ids, torch.arange(MAX_TOKENS).to(ids).expand_as(ids) > 0)


def time_sampling(
    suite: Suite, _: int, kind: Literal["rescale", "add"], new: int, samples: int
) -> float:
    """A new token of 512 texts; each plan has a feature at every residual site."""
    features = [f"{layer}/res/0" for layer in range(suite.layers)]
    plan = make_plan(suite, features, -1.0, kind)
    plans = {str(number): plan for number in range(TEXTS // samples)}

    given = {"batch_size": TEXTS, "show_progress": False}

    def seconds(length: int) -> float:
        return best_time(lambda: steer(suite, plans, "I think", samples, length, **given))

    length = int(np.clip(SECONDS / seconds(1), 2, new))
    return seconds(length) / length  # the prompt's pass is among its steps


def time_edits(
    suite: Suite, depth: int, tokens: int, targets: int, cases: int, loss: bool = False
) -> float:
    """The cases of so many targets of a layer at each of some tokens of a text."""
    positions = np.linspace(1, MAX_TOKENS - 1, tokens + 2)[1:-1].astype(int)
    at = [(depth - 1, n, "random", 0, place) for place in positions for n in range(targets)]
    table = pd.DataFrame(at, columns=["layer", "feature", "dataset", "text", "position"])
    case = np.arange(cases * len(table))
    feature = case % suite.sae(f"{depth - 1}/mlp").width
    edits = pd.DataFrame({"case": case, "feature": feature, "amount": 1.0})
    sites = pd.Series(("mlp", "att", "res")[: 2 + (depth > 1)], name="module")
    edits = edits.merge(sites, how="cross")
    of_case, texts = pd.DataFrame({"target": case // cases}), _texts(suite, 1)
    return best_time(lambda: deactivate(suite, texts, table, of_case, edits, loss=loss))


def time_losses(suite: Suite, depth: int, tokens: int, targets: int, cases: int) -> float:
    """The same with the loss; of one token, and few targets where it takes long: it is linear."""
    of_one = time_edits(suite, depth, 1, 1, cases, loss=True)
    n = max(2, int(min(SECONDS / of_one, targets)))
    more = time_edits(suite, depth, 1, n, cases, loss=True) - of_one
    return tokens * (of_one + max(0.0, more) * (targets - 1) / (n - 1))
