"""How time and memory grow: matching with pairs of SAEs, reading and interventions with tokens.

    python tests/benchmarks/growth.py [--features 2048] [--width 256] [--texts 16]

The match table of random suites of 4, 8 and 16 layers, without its cache, is timed, and its peak
memory beside the suite's taken, each in a process of its own; then `flowlet` reads as many texts,
twice and four times as many, and as many tokens of theirs have their features removed. What is
printed is the time of a unit, the best of `--repeats`, all sizes by turns: with linear growth it
stays the same.

On two cores of an Intel Xeon: a pair of 2,048 features of width 256 takes 71.3, 71.6 and 72.3 ms in
suites of 11, 23 and 47 pairs, and 46, 52 and 52 MiB are in use beside suite and answer; a token
read at all sites takes 0.25 ms at all three sizes, a token of 100 interventions 42.4, 40.9 and 41.1
ms.
"""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from clock import memory, options, seconds
from match_speed import suite_of

from flowhelpers.activations.corpora import load_texts
from flowhelpers.activations.sampling import draw_sample
from flowhelpers.activations.sparse import collect
from flowhelpers.deactivation.ablation import deactivate
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite, load_suite

GROWING = (1, 2, 4)
MIB = 2**20


def print_growth(
    what: str, units: Sequence[int], calls: Sequence[Callable[[], object]], repeats: int
) -> None:
    """Prints the time of a unit at each size, and how it compares with the first."""
    times = [[seconds(call)[0] for call in calls] for _ in range(repeats)]
    each = [took / n for took, n in zip(np.min(times, axis=0), units, strict=True)]
    for n, one in zip(units, each, strict=True):
        print(f"{what:<32}{n:>8,}{1000 * one:10.2f} ms each{one / each[0]:8.2f} ×")


def match(suite: Suite) -> pd.DataFrame:
    """The suite's match table, not from disk."""
    with tempfile.TemporaryDirectory() as folder:
        return match_table(suite, cache=Path(folder))


def beside_suite(layers: int, features: int, width: int) -> tuple[float, float]:
    """MiB in use at most while a suite is matched, without the suite; and those of the answer."""
    match(suite_of(2, 256, width, "cpu"))  # imports what is needed
    suite, found = suite_of(layers, features, width, "cpu"), []
    before, most = memory(lambda: found.append(match(suite)))
    return (most - before) / MIB, found[0].memory_usage().sum() / MIB


def matching(features: int, width: int, repeats: int) -> None:
    """Of suites of 4, 8 and 16 layers: memory, each in a process of its own; and time a pair."""
    new_process = get_context("spawn")
    for layers in (4 * n for n in GROWING):  # what another has left would be used again
        with ProcessPoolExecutor(1, new_process) as pool:
            most, answer = pool.submit(beside_suite, layers, features, width).result()
        told = f"{most:.0f} MiB beside the suite, {answer:.0f} of them the answer"
        print(f"  {layers} layers: {told}")
    suites = [suite_of(4 * n, features, width, "cpu") for n in GROWING]
    match(suites[0])
    calls = [lambda suite=suite: match(suite) for suite in suites]
    print_growth("pairs of SAEs matched", [3 * 4 * n - 1 for n in GROWING], calls, repeats)


def experiments(texts: int, repeats: int) -> None:
    """Reading, and removing features at five tokens of each text."""
    suite = load_suite("flowlet")
    some = load_texts("fiction", texts * GROWING[-1])
    samples = [draw_sample(suite.model, {"fiction": some[: texts * n]}) for n in GROWING]
    calls = [lambda n=n: collect(suite, some[: texts * n]) for n in GROWING]
    calls[0]()
    read = [int(sample.ids.is_text.sum()) for sample in samples]
    print_growth("tokens read at all sites", read, calls, repeats)

    def remove(sample) -> None:
        tokens = sample.tokens.loc[sample.tokens.index.repeat(100)].reset_index(drop=True)
        feature = np.arange(len(tokens)) % 100
        targets = tokens.assign(layer=4, feature=feature % 25)
        edits = {"case": tokens.index, "module": "mlp", "feature": feature, "amount": -1.0}
        cases = pd.DataFrame({"target": tokens.index})
        deactivate(suite, sample.ids, targets, cases, pd.DataFrame(edits))

    calls = [lambda sample=sample: remove(sample) for sample in samples]
    print_growth("tokens of 100 interventions", [len(s.tokens) for s in samples], calls, repeats)


if __name__ == "__main__":
    given = options(__doc__, features=2_048, width=256, texts=16, repeats=3)
    matching(given.features, given.width, given.repeats)
    experiments(given.texts, given.repeats)
