"""Co-activation is what its formulas say, pair by pair, over all tokens."""

import numpy as np
import pandas as pd
import pytest
import toys
from counted import table_of

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.groups.coactivation import (
    MEASURES,
    by_cosine,
    coactivation_of_matches,
    disagreements,
)

TOKENS = 400


@pytest.fixture(scope="module")
def activity() -> FeatureActivations:
    """Sources and targets active at random; target 0 is active where source 0 is, and no more."""
    rng = np.random.default_rng(0)
    source, target = (rng.random((TOKENS, 6)) * (rng.random((TOKENS, 6)) < 0.2) for _ in "ab")
    target[:, 0] = 2 * source[:, 0]
    target[:, 1] = np.where(rng.random(TOKENS) < 0.5, source[:, 1], 0)
    target[:, 5] = 0
    target[:3, 5] = 1  # too seldom
    rows = {Site(0, "res"): source.tolist(), Site(1, "res"): target.tolist()}
    return toys.planted_activations(rows)


@pytest.fixture(scope="module")
def matches() -> pd.DataFrame:
    """Feature f of layer 1 comes from feature f of layer 0; feature 4 from nothing."""
    chosen = {(1, "res", f): [(f if f != 4 else -1, 0.9 - 0.1 * f)] for f in range(6)}
    table = table_of(chosen)
    return table.assign(cosine=table["score"], null=0.3)


def test_every_measure_is_the_one_worked_out_for_the_pair(
    matches: pd.DataFrame, activity: FeatureActivations
):
    found = coactivation_of_matches(matches, activity).set_index("feature")
    assert set(found.index) == {0, 1, 2, 3, 5}
    a, b = (activity.by_site[Site(layer, "res")].toarray() for layer in (1, 0))
    for f in range(4):
        target, source = a[:, f], b[:, f]
        both = ((target > 0) & (source > 0)).sum()
        row = found.loc[f]
        assert (row["n_target"], row["n_source"]) == ((target > 0).sum(), (source > 0).sum())
        assert row["n_both"] == both
        assert row["pearson"] == pytest.approx(np.corrcoef(target, source)[0, 1])
        assert row["jaccard"] == pytest.approx(both / ((target > 0) | (source > 0)).sum())
        assert row["source_given_target"] == pytest.approx(both / (target > 0).sum())
        assert row["target_given_source"] == pytest.approx(both / (source > 0).sum())
    assert found.loc[0, "pearson"] == pytest.approx(1)
    assert found.loc[1, "source_given_target"] == 1
    assert found.loc[1, "target_given_source"] < 0.7


def test_of_a_feature_that_is_seldom_active_nothing_is_said(
    matches: pd.DataFrame, activity: FeatureActivations
):
    row = coactivation_of_matches(matches, activity).set_index("feature").loc[5]
    assert row["n_target"] == 3
    measures = ["pearson", "jaccard", "source_given_target", "target_given_source"]
    assert row[measures].isna().all()
    row = coactivation_of_matches(matches, activity, least_active=3).set_index("feature").loc[5]
    assert row[measures].notna().all()


def test_disagreements_are_those_of_cosine_and_correlation(
    matches: pd.DataFrame, activity: FeatureActivations
):
    found = coactivation_of_matches(matches.assign(cosine=[0.2, 0.4, 0.9, 0.6, 0.8, 0.9]), activity)
    rows = disagreements(found)
    kinds = rows.groupby("kind")["feature"].apply(set).to_dict()
    assert kinds == {"near, not together": {2, 3}, "together, not near": {0, 1}}
    assert rows.loc[rows["kind"] == "together, not near", "feature"].tolist() == [0, 1]
    assert len(disagreements(found, n=1)) == 2


def test_medians_are_those_of_pairs_in_a_range_of_cosines():
    rng = np.random.default_rng(0)
    cosines = np.array([0.05] * 9 + [0.21, 0.29] * 6 + [0.55] * 10 + [1.0] * 10)
    measures = {name: rng.random(len(cosines)) for name in MEASURES}
    pairs = pd.DataFrame({"module": "res", "cosine": cosines} | measures)
    found = by_cosine(pairs)
    assert found["cosine"].tolist() == pytest.approx([0.25, 0.55, 0.95])
    assert found["pairs"].tolist() == [12, 10, 10]  # nine pairs are too few
    inside = pairs[pairs["cosine"].between(0.2, 0.3)]
    for name in MEASURES:
        assert found[name].iloc[0] == pytest.approx(inside[name].median())
