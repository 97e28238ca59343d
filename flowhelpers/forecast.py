"""How long the notebooks will take on this machine, foretold from single steps that are timed.

A step is one of the package's own functions on random numbers of a suite's shapes; of the model and
its SAEs nothing is fetched but `config.json`. How often a preset's notebooks take it is counted
from their parameters. Fetching files, a judge's answers, figures and tables are left out, and so
are notebooks 00, 07 and 08.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
from flowhelpers.suites.load import OnDemand, Suite, device_and_dtype
from flowhelpers.suites.model import Model, Tokens
from flowhelpers.suites.registry import BYTES, GEMMA, SuiteRow, declared, find_suite

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

SMALL = 2e8  # parameters of a model that is made whole; of larger ones the first layer is made, and
DEEP = 3  # so many: what these take more is that of each layer
SECONDS, REPEATS = 4.0, 5  # of a measurement: the best of so many, or of those begun by then
USUAL_L0 = 64  # of SAEs that declare none
TEXTS = 512  # that are steered together
LONGEST = 60.0  # seconds of an assignment that is still tried out
PART, GROWTH = 2048, 2.3  # features of a smaller assignment; how time grows with them
PER_TEXT = 16  # texts of a pass that reads


@dataclass(frozen=True)
class Step:
    """A step, how often it is taken, how that is counted, and what times it, in seconds."""

    name: str
    count: float
    counted: str
    time: Callable[[], float]


def forecast(name: str, preset: str = "paper", device: str = "auto") -> "pd.DataFrame":
    """The steps of a preset's notebooks on a suite, each timed here, and how long all of each take.

    Returns:
        One row a step: `step`, `seconds` of one, `count`, `counted` (the formula in words) and
        `total` in seconds; in `attrs["left_out"]` why other steps have no row.
    """
    import pandas as pd

    rows, left_out = [], {}
    for step in progress(steps_of(name, preset, device), "timing"):
        try:
            seconds = step.time() if step.count else 0.0
        except (OSError, MemoryError, TimeoutError, ValueError) as error:
            left_out[step.name] = str(error).splitlines()[0]
            continue
        rows.append((step.name, seconds, step.count, step.counted, step.count * seconds))
    table = pd.DataFrame(rows, columns=["step", "seconds", "count", "counted", "total"])
    table = table[table["count"] > 0].reset_index(drop=True)
    table.attrs["left_out"] = left_out
    return table


def steps_of(name: str, preset: str, device: str = "auto") -> list[Step]:
    """The steps of notebooks 01 to 06 with their counts; nothing is timed yet."""
    from flowhelpers.activations.corpora import passages
    from flowhelpers.activations.sampling import datasets_for
    from flowhelpers.deactivation.targets import middle_layers
    from flowhelpers.runs.parameters import inspect, plan

    row = find_suite(name)
    width, _, l0 = _shapes(row)
    given = {"suite": name}
    planned = plan([f"0{number}" for number in range(1, 7)], given, preset).items()
    p1, p2, p3, p4, p5, p6 = (
        {n: each.default for n, each in inspect(path).items()} | own for path, own in planned
    )
    layers = row.layers or 1 + max(site.layer for site in row.saes)
    size, where = (row.model_parameters or 0), {}
    for dtype in {"auto", p4["dtype"]}:
        where[dtype] = device_and_dtype(row, device, dtype)

    @cache
    def suite(depth: int, dtype: str) -> Suite:
        return stand_in(row, depth, *where[dtype])

    def at_depth(measure: Callable[..., float], n: int, *given: Any, dtype: str = "auto") -> Any:
        """What it takes through n layers; of large models by two depths, for it is linear."""

        def seconds() -> float:
            if size < SMALL:
                return measure(suite(layers, dtype), n, *given)
            first, deep = (measure(suite(depth, dtype), depth, *given) for depth in (1, DEEP))
            return first + (n - 1) * max(0.0, deep - first) / (DEEP - 1)

        return seconds

    def pairs(at: Iterable[int]) -> int:
        before = [predecessor_sites(site).values() for n in at if (site := Site(n, "res")) in row.saes]
        return sum(site in row.saes for sites in before for site in sites)

    every, compared = pairs(range(layers)), p1["layers"] or range(layers // 2 % 2, layers, 2)
    ways = {*p3["compare"], p3["matcher"], *p4["methods"]}
    tables = len({p1["k"], p2["k"], 5, 1}) + ("random" in {*p1["methods"], *ways})
    one_to_one = pairs(compared) * len({"folded", "all_weights", "all_folded"} & {*p1["methods"]})
    one_to_one += every * ("permutation" in ways)
    readers = [(p1, pairs(compared), p1["methods"]), (p3, every, [*p3["compare"], p3["matcher"]])]
    readers += [(p4, every, p4["methods"])]
    readers = [(p, n) for p, n, methods in readers if "pearson" in methods]
    of_pearson = max((p["pearson_texts"] for p, _ in readers), default=0)
    by_subject = passages().groupby("subject")
    read = [len(by_subject.head(n)) for n in (p2["texts"], 12, 12)]
    read += [p1["texts"], *(p["pearson_texts"] for p, _ in readers)]
    sampled = len(p3["datasets"] or datasets_for(row)) * p3["n_texts"]
    ends = [p["layers"] or n for p, n in ((p5, range(layers // 2 + 1)), (p6, range(3)))]
    ends = [layers if n == "all" else len(n) for n in ends]
    r, (s, plans) = len(p5["r_values"]), (len(p6["strengths"]), len(p6["strategies"]))
    cells = 1 + r + 2 * ends[0] * r + (1 + 3 * r) + 6
    many = layers if p6["layers_c3"] == "all" else len(p6["layers_c3"] or range(8))
    themes = len(p6["themes"] or range(4))
    cells_6 = themes * (plans * ends[1] * s + 2 * s + 3 + 2 * plans + 10) + 2 * many + 4
    if not (p6["seeds"] or row.name.split("@")[0] == GEMMA):
        cells_6 += themes * p6["candidates"] * 16 // p6["n_samples"]
    chosen = p4["layers"] or middle_layers(layers)
    searched = len(p4["search_layers"] or chosen) * p4["exhaustive"]
    texts, tokens, targets = p4["n_texts"], p4["tokens_per_text"], p4["features_per_token"]
    cases = len(p4["methods"]) + 3
    mean_depth = 1 + round(mean(chosen))
    once = texts * len(chosen)
    swept = min(p4["sweep_targets"] / (tokens * targets), once)

    def sampling(kind: str, p: Mapping[str, Any]) -> Any:
        return at_depth(time_sampling, layers, kind, p["max_new_tokens"], p["n_samples"])

    def steered(count: int, p: Mapping[str, Any]) -> int:
        return -(-count * p["n_samples"] // TEXTS) * p["max_new_tokens"]

    return [
        Step("match a pair of SAEs", every * tables, f"{every} pairs x {tables} tables",
             lambda: time_pair(suite(1, "auto"))),
        Step("null of an SAE", len(row.saes), "SAEs", lambda: time_null(suite(1, "auto"))),
        Step("permutation", one_to_one, "pairs: of all, and of 01's layers for each other way",
             lambda: time_assignment(suite(1, "auto"))),
        Step(f"Pearson, {of_pearson} texts", sum(n for _, n in readers), "pairs of 01, 03 and 04",
             lambda: time_correlation(width, l0, of_pearson * (MAX_TOKENS - 1))),
        Step("read 16 texts", sum(read) / 16, f"{sum(read):,} texts / 16",
             at_depth(time_reading, layers)),
        Step(f"read {p3['tokens_per_text']} tokens of each of 16 texts", (sampled + texts) / 16,
             f"{sampled + texts:,} texts of 03 and 04 / 16",
             at_depth(time_reading, layers, p3["tokens_per_text"])),
        Step("05: a token of 512 texts", steered(cells, p5),
             f"{cells} cells at most x {p5['n_samples']} / 512 x {p5['max_new_tokens']} tokens",
             sampling("rescale", p5)),
        Step("06: a token of 512 texts", steered(cells_6, p6),
             f"{cells_6} cells at most x {p6['n_samples']} / 512 x {p6['max_new_tokens']} tokens",
             sampling("add", p6)),
        Step(f"04: edit {tokens} tokens of a text", once + searched * texts * 3 * l0 / (targets * cases),
             f"{texts} texts x {len(chosen)} layers, and the search",
             at_depth(time_edits, mean_depth, tokens, targets, cases, dtype=p4["dtype"])),
        Step(f"04: loss of {tokens} tokens of a text", swept,
             f"{texts} texts x {len(chosen)} layers",
             at_depth(time_losses, layers, tokens, targets, len(p4["r_values"]), dtype=p4["dtype"])),
    ]  # fmt: skip


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


def time_reading(suite: Suite, _: int, per_text: int | None = None) -> float:
    """A pass of 16 texts, whose features are read at all tokens, or at so many of each."""
    from flowhelpers.activations.sparse import read_batches

    tokens = _texts(suite, PER_TEXT)
    tokens.is_text[:, 1 if per_text is None else 1 + per_text :] &= per_text is None
    return best_time(lambda: [*read_batches(suite, tokens)])


def _texts(suite: Suite, n: int) -> Tokens:
    vocabulary = suite.model.unembedding.shape[1]
    ids = torch.randint(4, vocabulary, (n, MAX_TOKENS)).to(suite.model.device)
    return Tokens(ids, torch.arange(MAX_TOKENS).to(ids).expand_as(ids) > 0)


def time_sampling(suite: Suite, _: int, kind: str, new: int, samples: int) -> float:
    """A new token of 512 texts; each plan has a feature at every residual site."""
    from flowhelpers.steering.plans import make_plan
    from flowhelpers.steering.sweeps import steer

    features = [f"{layer}/res/0" for layer in range(suite.layers)]
    plan = make_plan(suite, features, -1.0, kind)
    plans = {str(number): plan for number in range(TEXTS // samples)}

    def texts(length: int) -> Any:
        return steer(suite, plans, "word", samples, length, batch_size=TEXTS, show_progress=False)

    length = int(np.clip(SECONDS / best_time(lambda: texts(1)), 2, new))
    return best_time(lambda: texts(length)) / length  # the prompt's pass among its steps


def time_edits(
    suite: Suite, depth: int, tokens: int, targets: int, cases: int, loss: bool = False
) -> float:
    """The cases of so many targets of a layer at each of some tokens of a text."""
    import pandas as pd

    from flowhelpers.deactivation.ablation import deactivate

    positions = np.linspace(MAX_TOKENS // 4, 3 * MAX_TOKENS // 4, tokens).astype(int)
    at = [(depth - 1, n, "random", 0, place) for place in positions for n in range(targets)]
    table = pd.DataFrame(at, columns=["layer", "feature", "dataset", "text", "position"])
    case = np.arange(cases * len(table))
    feature = case % suite.sae(f"{depth - 1}/mlp").width
    edits = pd.DataFrame({"case": case, "module": "mlp", "feature": feature, "amount": 1.0})
    of_case, texts = pd.DataFrame({"target": case // cases}), _texts(suite, 1)
    return best_time(lambda: deactivate(suite, texts, table, of_case, edits, loss=loss))


def time_losses(suite: Suite, depth: int, tokens: int, targets: int, cases: int) -> float:
    """The same with the loss; of few targets where it takes long, for it is linear."""
    few = time_edits(suite, depth, tokens, 1, cases, loss=True)
    n = int(np.clip(SECONDS / few, 1, targets))
    return time_edits(suite, depth, tokens, n, cases, loss=True) * targets / n
