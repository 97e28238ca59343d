"""What is foretold of a step is within a factor of two of the real thing, and counts are right."""

from collections.abc import Callable, Sequence
from itertools import count
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

from flowhelpers import forecast
from flowhelpers.__main__ import main
from flowhelpers.activations.corpora import load_texts
from flowhelpers.activations.sparse import collect
from flowhelpers.flow.graph import flow_graph
from flowhelpers.forecast import Step, steps_of
from flowhelpers.matching import table
from flowhelpers.matching.matchers import by_permutation
from flowhelpers.steering.plans import make_plan
from flowhelpers.steering.sweeps import steer
from flowhelpers.suites.load import Suite, load_suite

if TYPE_CHECKING:
    import pandas as pd

TURNS = 5  # at most: what others slow down does better the next time


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite("flowlet")


@pytest.fixture(scope="module")
def matches(suite: Suite) -> "pd.DataFrame":
    return table.match_table(suite)


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return steps_of("flowlet")


def step(steps: Sequence[Step], start: str) -> Step:
    return min(
        (each for each in steps if each.step.startswith(start)), key=lambda one: len(one.step)
    )


def hold(real: Callable[[], Any], foretold: Callable[[], float]) -> None:
    """Both by turns, the best of each, for a busy machine slows now one and now the other."""
    best = [float("inf")] * 2
    for _ in range(TURNS):
        best = [min(best[0], forecast.best_time(real)), min(best[1], foretold())]
        if 0.5 < best[1] / best[0] < 2:
            return
    raise AssertionError(f"it takes {best[0]:.3f} s, and {best[1]:.3f} s were foretold")


def test_a_match_table_without_its_cache(suite, steps, tmp_path):
    folder, pair, null = count(), step(steps, "pair of SAEs"), step(steps, "null")
    hold(
        lambda: table.match_table(suite, cache=tmp_path / str(next(folder))),
        lambda: 23 * pair.time() + 24 * null.time(),
    )


def test_permutations_of_a_layer(suite, steps):
    saes = [suite.sae(name) for name in ("4/res", "3/res", "4/mlp", "4/att")]
    hold(
        lambda: [by_permutation(saes[0], source) for source in saes[1:]],
        lambda: 3 * step(steps, "pair of SAEs, one").time(),
    )


def test_reading_64_texts_at_all_sites(suite, steps):
    texts = load_texts("fiction", 64)
    hold(lambda: collect(suite, texts), lambda: 4 * step(steps, "16 texts").time())


def test_steering_512_texts(suite, steps, matches):
    graph = flow_graph(suite, "4/res/17", matches)
    plans = {str(n): make_plan(suite, graph, -n / 8) for n in range(1, 5)}
    sampling = step(steps, "token of all").time
    hold(
        lambda: steer(suite, plans, "I think", 128, 24, batch_size=512),
        lambda: 24 * sampling(),
    )


def test_what_many_layers_take_is_the_law_of_few(steps, monkeypatch):
    reading = step(steps, "16 texts").time
    whole = min(reading() for _ in range(2))
    monkeypatch.setattr(forecast, "SMALL", 0)
    ratios = [reading() / whole for _ in range(3)]
    assert 0.5 < median(ratios) < 2


def test_steps_are_as_many_as_a_table_makes(suite, steps, monkeypatch, tmp_path):
    called, by_cosine = [], table.by_cosine
    monkeypatch.setattr(table, "by_cosine", lambda *given: called.append(1) or by_cosine(*given))
    table.match_table(suite, 1, cache=tmp_path)
    assert len(called) == step(steps, "pair of SAEs").count
    assert len(list((tmp_path / "nulls").glob("*.parquet"))) == step(steps, "null").count


def test_a_step_that_cannot_be_timed_is_left_out_with_a_word(monkeypatch, capsys):
    def steps_here(*_: object) -> list[Step]:
        def offline() -> float:
            raise OSError("no config.json of the model")

        return [Step("a table", "pair", 3, lambda: 1200.0), Step("texts", "reading", 2, offline)]

    monkeypatch.setattr(forecast, "steps_of", steps_here)
    assert main(["suites", "flowlet", "--time"]) == 0
    told = capsys.readouterr().out
    assert "1:00:00" in told
    assert "- not timed: texts, reading, as no config.json of the model" in told


def test_without_time_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(forecast, "forecast", None)  # called, it would be an error
    assert main(["suites", "flowlet"]) == 0
    assert "jobs take" not in capsys.readouterr().out
    assert main(["suites", "--time"]) == 2


def test_an_assignment_of_many_minutes_is_not_tried_out(monkeypatch):
    monkeypatch.setattr(forecast, "LONGEST", 1e-6)
    (permutation,) = (s for s in steps_of("flowlet") if s.job == "permutations")
    with pytest.raises(TimeoutError, match="too long to be tried out"):
        permutation.time()
