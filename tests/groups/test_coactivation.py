"""Co-activation is what its formulas say, pair by pair, over all tokens."""

import numpy as np
import pandas as pd
import pytest
import toys
from counted import table_of

from flowhelpers.core.features import Site
from flowhelpers.groups.coactivation import (
    MEASURES,
    coactivation_by_cosine,
    coactivation_of_matches,
    disagreements,
)

RNG = np.random.default_rng(0)
SOURCE, TARGET = (RNG.random((400, 6)) * (RNG.random((400, 6)) < 0.2) for _ in "ab")
TARGET[:, 0] = 2 * SOURCE[:, 0]
TARGET[:, 1] = np.where(RNG.random(400) < 0.5, SOURCE[:, 1], 0)
TARGET[:, 5] = 0
TARGET[:3, 5] = 1  # too seldom
ACTIVITY = toys.planted_activations(
    {Site(0, "res"): SOURCE.tolist(), Site(1, "res"): TARGET.tolist()}
)
# Feature f of layer 1 comes from feature f of layer 0; feature 4 from nothing.
MATCHES = table_of({(1, "res", f): [(f if f != 4 else -1, 0.9 - 0.1 * f)] for f in range(6)})
MATCHES = MATCHES.assign(cosine=MATCHES["score"], null=0.3)


def test_every_measure_is_the_one_worked_out_for_the_pair():
    pairs = coactivation_of_matches(MATCHES, ACTIVITY).set_index("feature")
    assert set(pairs.index) == {0, 1, 2, 3, 5}
    for f in range(4):
        target, source = TARGET[:, f] > 0, SOURCE[:, f] > 0
        n, n_source = target.sum(), source.sum()
        both, either = (target & source).sum(), (target | source).sum()
        assert pairs.loc[f, ["n_target", "n_source", "n_both"]].tolist() == [n, n_source, both]
        pearson = np.corrcoef(TARGET[:, f], SOURCE[:, f])[0, 1]
        expected = [pearson, both / either, both / n, both / n_source]
        assert pairs.loc[f, [*MEASURES]].tolist() == pytest.approx(expected)
    assert pairs.loc[1, "source_given_target"] == 1
    assert pairs.loc[1, "target_given_source"] < 0.7
    # Of a feature that is seldom active nothing is said, unless asked for.
    assert pairs.loc[5, "n_target"] == 3
    assert pairs.loc[5, [*MEASURES]].isna().all()
    some = coactivation_of_matches(MATCHES, ACTIVITY, least_active=3).set_index("feature")
    assert some.loc[5, [*MEASURES]].notna().all()


def test_disagreements_are_those_of_cosine_and_correlation():
    cosines = MATCHES.assign(cosine=[0.2, 0.4, 0.9, 0.6, 0.8, 0.9])
    rows = disagreements(coactivation_of_matches(cosines, ACTIVITY))
    features = rows.groupby("kind")["feature"].apply(list).to_dict()
    assert set(features["near, not together"]) == {2, 3}
    assert features["together, not near"] == [0, 1]
    assert rows.groupby("kind")["pearson"].apply(lambda p: p.is_monotonic_increasing).iloc[0]
    assert len(disagreements(coactivation_of_matches(cosines, ACTIVITY), n=1)) == 2


def test_medians_are_those_of_pairs_in_a_range_of_cosines():
    cosines = np.array([0.05] * 9 + [0.21, 0.29] * 6 + [0.55] * 10 + [1.0] * 10)
    measures = {name: RNG.random(len(cosines)) for name in MEASURES}
    pairs = pd.DataFrame({"module": "res", "cosine": cosines} | measures)
    medians = coactivation_by_cosine(pairs)
    assert medians["cosine"].tolist() == pytest.approx([0.25, 0.55, 0.95])
    assert medians["pairs"].tolist() == [12, 10, 10]  # nine pairs are too few
    inside = pairs[pairs["cosine"].between(0.2, 0.3)]
    expected = inside[[*MEASURES]].median().tolist()
    assert medians.iloc[0][[*MEASURES]].tolist() == pytest.approx(expected)
