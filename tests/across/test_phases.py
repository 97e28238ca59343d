"""Phases of layers: planted ones are found, and chance says when they are none."""

from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest

from flowhelpers.across.phases import PHASES, explained, fit_phases, paper_phases, segments


def every_division(rows: int, parts: int) -> list[tuple[tuple[int, int], ...]]:
    """All ways to cut rows into runs."""
    found = []
    for cuts in combinations(range(1, rows), parts - 1):
        ends = [0, *cuts, rows]
        found.append(tuple((a, b - 1) for a, b in pairwise(ends)))
    return found


def error(values: np.ndarray, parts: tuple[tuple[int, int], ...]) -> float:
    """Squared errors by hand."""
    runs = [values[a : b + 1] for a, b in parts]
    return float(sum(((run - run.mean(axis=0)) ** 2).sum() for run in runs))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_best_of_all_divisions_is_found(parts: int):
    for seed in range(20):
        values = np.random.default_rng(seed).random((7, 3)) + 100
        best = min(every_division(7, parts), key=lambda each: error(values, each))
        assert segments(values, parts) == best
        whole = error(values, ((0, 6),))
        assert explained(values, best) == pytest.approx(1 - error(values, best) / whole)


def test_planted_phases_are_found_whatever_the_levels():
    levels = np.array([[0.5, 0.1], [0.2, 0.6], [0.5, 0.6]])
    values = np.repeat(levels, [2, 5, 3], axis=0)
    assert segments(values) == ((0, 1), (2, 6), (7, 9))
    assert explained(values, ((0, 1), (2, 6), (7, 9))) == pytest.approx(1)
    assert explained(values, ((0, 9),)) == pytest.approx(0)
    noise = np.random.default_rng(0).normal(0, 0.02, values.shape)
    assert segments(values + noise) == ((0, 1), (2, 6), (7, 9))
    assert segments(values[:3], 3) == ((0, 0), (1, 1), (2, 2))
    assert np.isnan(explained(np.ones((4, 2)), ((0, 1), (2, 3))))


def test_what_cannot_be_divided_is_refused():
    values = np.arange(6.0)[:, None]
    for parts in (0, 7):
        with pytest.raises(ValueError, match=f"{parts} parts of 6 rows: expected 1 to 6"):
            segments(values, parts)
    with pytest.raises(ValueError, match="none missing"):
        segments(np.array([[1.0], [np.nan]]), 1)
    with pytest.raises(ValueError, match=r"shape \(6,\)"):
        segments(np.arange(6.0), 2)
    for wrong in (((0, 2), (4, 5)), ((0, 3), (3, 5)), ((0, 4),)):
        with pytest.raises(ValueError, match="expected each row once, in order"):
            explained(values, wrong)


def planted(layers: int = 14, noise: float = 0.0) -> pd.DataFrame:
    """A profile whose layers 1 to 4, 5 to 9 and 10 on are alike; layer 0 has no `a`."""
    steps = np.digitize(np.arange(layers), [5, 10])
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"layer": np.arange(layers), "a": 0.1 + 0.3 * steps, "b": 0.8 - 0.1 * steps}
    )
    table[["a", "b"]] += noise * rng.normal(size=(layers, 2))
    table.loc[0, "a"] = np.nan
    return table.assign(never=np.nan).sample(frac=1, random_state=0)


def test_phases_stand_in_layers_and_depths_beside_chance():
    found = fit_phases(planted(noise=0.01), ["a", "b", "never"], 14)
    assert found[["phase", "first", "last"]].to_numpy().tolist() == [
        [1, 1, 4],
        [2, 5, 9],
        [3, 10, 13],
    ]
    assert found["begins"].tolist() == pytest.approx([0.5 / 13, 4.5 / 13, 9.5 / 13])
    assert found["ends"].tolist() == pytest.approx([4.5 / 13, 9.5 / 13, 13.5 / 13])
    first = found.iloc[0]
    assert first["layers"] == 13
    assert first["explained"] > 0.95 > first["by_chance"]
    assert first["as_good"] < 0.02


def test_layers_without_phases_are_divided_no_better_than_in_another_order():
    rng = np.random.default_rng(1)
    table = pd.DataFrame(
        {"layer": np.arange(20), "a": rng.normal(size=20), "b": rng.normal(size=20)}
    )
    found = fit_phases(table, ["a", "b"], 20).iloc[0]
    assert found["as_good"] > 0.1
    assert found["explained"] == pytest.approx(found["by_chance"], abs=0.2)
    assert fit_phases(table.head(3), ["a", "b"], 20).empty
    assert len(fit_phases(table.head(4), ["a", "b"], 20)) == 3


def test_the_papers_phases_are_measured_alike():
    layers = np.arange(26)
    table = pd.DataFrame({"layer": layers, "a": np.digitize(layers, [6, 16])})
    found = paper_phases("gemma-2-2b@65k", table.tail(25), ["a"], 26)
    assert found[["first", "last"]].to_numpy().tolist() == [[1, 5], [6, 15], [16, 25]]
    assert found["explained"].tolist() == pytest.approx([1, 1, 1])
    shifted = table.assign(a=np.digitize(layers, [8, 18]))
    assert paper_phases("gemma-2-2b", shifted, ["a"], 26)["explained"].iloc[0] < 0.9
    assert paper_phases("flowlet", table, ["a"], 26).empty
    assert paper_phases("gemma-2-2b", table.head(6), ["a"], 26).empty
    assert PHASES["llama-3.1-8b"] == ((0, 8), (9, 16), (17, 31))
