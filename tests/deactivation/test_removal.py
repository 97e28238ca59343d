"""Removing a source however far below, beside a control of the same norm."""

from types import SimpleNamespace

import adder
import numpy as np
import pandas as pd
import pytest
import toys

from flowhelpers import deactivation
from flowhelpers.activations.sparse import collect
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import tokenize


@pytest.mark.parametrize(("hop", "layer"), [(1, 1), (2, 2)])
def test_removing_the_source_takes_what_it_wrote_and_the_control_takes_nothing(
    world: SimpleNamespace, hop: int, layer: int
):
    feature = {1: adder.COPY, 2: 1}[layer]
    targets = deactivation.draw_targets(world.activations, [layer])
    targets = targets[targets["feature"] == feature]
    # At layer 2 the feature is on at all tokens, by what the MLP adds; its source is not.
    sources = pd.DataFrame({"method": ["right", "none"], "feature": feature, "source": [2, -1]})
    table = deactivation.remove_sources(
        world.suite, world.tokens, targets, sources, world.activations, hop
    )
    right, none = (table[table["method"] == name] for name in ("right", "none"))
    active = right[right["found"] > 0]
    assert len(active)
    assert len(right) == len(none) == len(targets)
    expected = {1: 1.0, 2: 2 / 3}[layer]
    np.testing.assert_allclose(active["change"], expected, atol=1e-6)
    np.testing.assert_allclose(active["control"], 0, atol=1e-6)
    np.testing.assert_allclose(active["beyond"], expected, atol=1e-6)
    assert (active["success"] == (layer == 1)).all()
    assert not none[["found", "change", "success", "control", "beyond"]].any(axis=None)
    assert not right.loc[right["found"] == 0, ["change", "control"]].any(axis=None)


def test_the_control_of_a_source_is_the_same_whoever_names_it_and_beside_whom(planted: Suite):
    tokens = tokenize(planted.model, toys.TEXTS)
    read = collect(planted, tokens)
    targets = deactivation.draw_targets(read, [2])
    features = targets["feature"].unique()
    named = [("one", 0), ("another", 0), ("other", 1), ("last", 2)]
    sources = pd.concat(
        [pd.DataFrame({"method": m, "feature": features, "source": i}) for m, i in named]
    )

    def removed(of: list[str], seed: int = 0) -> pd.Series:
        given = sources[sources["method"].isin(of)]
        table = deactivation.remove_sources(planted, tokens, targets, given, read, 1, seed)
        return table.set_index(["method", "target"])["control"]

    all_of, alone = removed(["one", "another", "other", "last"]), removed(["another"])
    assert alone.abs().max() > 0.01
    for method in ("one", "another"):
        np.testing.assert_allclose(all_of[method], alone["another"], atol=1e-5)
    assert not np.allclose(removed(["another"], seed=1), alone, atol=1e-5)
