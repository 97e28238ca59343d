"""Phases of layers: planted ones are found, and chance says when they are none."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from flowhelpers.across.phases import (
    PHASES,
    all_phases,
    explained,
    fit_phases,
    is_chance,
    segments,
    thirds,
)
from flowhelpers.across.profile import Profile, depth


def error(values: np.ndarray, starts: tuple[int, ...]) -> float:
    """Squared errors by hand."""
    runs = np.split(values, starts[1:])
    return float(sum(((run - run.mean(axis=0)) ** 2).sum() for run in runs))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_best_of_all_divisions_is_found(parts: int):
    for seed in range(20):
        values = np.random.default_rng(seed).random((7, 3)) + 100
        every = [(0, *cuts) for cuts in combinations(range(1, 7), parts - 1)]
        best = min(every, key=lambda starts: error(values, starts))
        starts, share = segments(values, parts)
        assert tuple(starts) == best
        assert share == pytest.approx(1 - error(values, best) / error(values, (0,)))


def test_planted_phases_are_found_whatever_the_levels():
    levels = np.array([[0.5, 0.1], [0.2, 0.6], [0.5, 0.6]])
    values = np.repeat(levels, [2, 5, 3], axis=0)
    assert segments(values) == ([0, 2, 7], pytest.approx(1))
    assert explained(values, [0]) == pytest.approx(0)
    noise = np.random.default_rng(0).normal(0, 0.02, values.shape)
    assert segments(values + noise)[0] == [0, 2, 7]
    assert segments(values[:3], 3)[0] == [0, 1, 2]
    assert np.isnan(explained(np.ones((4, 2)), [0, 2]))


def test_phases_stand_in_layers_and_depths_beside_chance():
    # Layers 1 to 4, 5 to 9 and 10 on are alike; layer 0 has no `a`.
    layers = np.arange(14)
    steps = np.digitize(layers, [5, 10])
    profile = pd.DataFrame({"layer": layers, "a": 0.1 + 0.3 * steps, "b": 0.8 - 0.1 * steps})
    profile[["a", "b"]] += 0.01 * np.random.default_rng(0).normal(size=(14, 2))
    profile.loc[0, "a"] = np.nan
    profile = profile.assign(never=np.nan).sample(frac=1, random_state=0)
    phases = fit_phases(profile, ["a", "b", "never"], 14)
    assert phases["phase"].tolist() == [1, 2, 3]
    assert phases[["first", "last"]].to_numpy().tolist() == [[1, 4], [5, 9], [10, 13]]
    assert phases["begins"].tolist() == pytest.approx([0.5 / 13, 4.5 / 13, 9.5 / 13])
    assert phases["ends"].tolist() == pytest.approx([4.5 / 13, 9.5 / 13, 1])
    first = phases.iloc[0]
    assert first["layers"] == 13
    assert first["explained"] > 0.95 > first["by_chance"]
    assert first["as_good"] < 0.02
    # By hand: 3! orders of the runs, 4!, 5! and 4! within them, of 13! in all.
    assert first["least"] == pytest.approx(6 * 24 * 120 * 24 / math.factorial(13))
    # Layers without phases are divided no better than in another order.
    noise = np.random.default_rng(1).normal(size=(20, 2))
    profile = pd.DataFrame(noise, columns=["a", "b"]).assign(layer=np.arange(20))
    first = fit_phases(profile, ["a", "b"], 20).iloc[0]
    assert first["as_good"] > 0.1
    assert first["explained"] == pytest.approx(first["by_chance"], abs=0.2)
    assert fit_phases(profile.head(3), ["a", "b"], 20).empty
    # Five layers that are perfectly divided come so in a fifth of all orders, or a tenth.
    for steps, least in (([0, 1, 1, 2, 2], 0.2), ([0, 1, 1, 1, 2], 0.3)):
        few = pd.DataFrame({"layer": range(5), "a": steps})
        first = fit_phases(few, ["a"], 5, shuffles=2000).iloc[0]
        assert first["least"] == pytest.approx(least)
        assert first["as_good"] == pytest.approx(least, abs=0.04)
    assert len(fit_phases(profile.head(4), ["a", "b"], 20)) == 3


def test_the_papers_phases_are_measured_alike_and_stand_beside_ours():
    layers = np.arange(26)
    named = PHASES["gemma-2-2b"]
    profile = pd.DataFrame({"layer": layers, "a": np.digitize(layers, [6, 16])})
    phases = fit_phases(profile.tail(25), ["a"], 26, named=named)
    assert phases[["first", "last"]].to_numpy().tolist() == [[1, 5], [6, 15], [16, 25]]
    assert phases["explained"].tolist() == pytest.approx([1, 1, 1])
    shifted = profile.assign(a=np.digitize(layers, [8, 18]))
    assert fit_phases(shifted, ["a"], 26, named=named)["explained"].iloc[0] < 0.9
    assert fit_phases(profile.head(6), ["a"], 26, named=named).empty
    values = np.digitize(layers, [8, 18])[:, None] / [1, 2, 3, 4]
    classes = ["translated", "processed", "newborn", "unexplained"]
    by_layer = pd.DataFrame(values, columns=classes).assign(layer=layers)
    both = [by_layer.assign(suite=name) for name in ("gemma-2-2b@65k", "flowlet")]
    across = pd.DataFrame({"suite": ["gemma-2-2b@65k", "flowlet"], "layers": 26})
    whole = Profile(across, pd.concat(both), pd.DataFrame(), pd.DataFrame())
    table = all_phases(whole, shuffles=3).drop_duplicates(["suite", "of"])
    assert table["suite"].tolist() == ["gemma-2-2b@65k", "gemma-2-2b@65k", "flowlet"]
    assert table["of"].tolist() == ["classes", "classes, by the paper", "classes"]
    assert table["explained"].tolist()[::2] == pytest.approx([1, 1])
    assert np.isnan(table["as_good"].tolist()[1])
    with pytest.raises(ValueError, match="parts=0: expected 1 or more"):
        all_phases(whole, parts=0)


def test_thirds_are_of_the_depth_and_chance_is_a_twentieth():
    names = thirds(depth(pd.Series(range(1, 8)), 8)).tolist()
    assert names == ["first"] * 2 + ["middle"] * 2 + ["last"] * 3
    assert thirds(depth(pd.Series([0, 1, 2]), 3)).tolist() == ["first", "middle", "last"]
    rows = pd.DataFrame({"as_good": [0.04, 0.05, np.nan]}).itertuples()
    assert [is_chance(row) for row in rows] == [False, True, False]
