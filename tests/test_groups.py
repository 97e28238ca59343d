"""Groups are what the planted activity says, and the tests are SciPy's."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import toys
from scipy.stats import mannwhitneyu

from flowhelpers.activations import FeatureActivations
from flowhelpers.features import Site
from flowhelpers.groups import GROUPS, occurrences, share_significant, significance
from flowhelpers.matching import match_table, scores

BY_BITS: dict[tuple[int, ...], str] = {
    (0, 0, 0): "From nowhere",
    (1, 0, 0): "From RES",
    (0, 1, 0): "From MLP",
    (0, 0, 1): "From ATT",
    (1, 1, 0): "From RES & MLP",
    (1, 0, 1): "From RES & ATT",
    (0, 1, 1): "From MLP & ATT",
    (1, 1, 1): "From RES & MLP & ATT",
}
BITS = list(BY_BITS)
MISSING = float("nan")


@pytest.fixture
def table() -> pd.DataFrame:
    """Scores: feature 0 of layer 1 has three predecessors, feature 1 has none, 2 is never active.

    The rows are in another order than the features.
    """
    columns = ["layer", "feature", "source_res", "source_mlp", "source_att", "s_res", "s_mlp"]
    rows = [
        (1, 1, -1, -1, -1, 0.0, 0.0, 0.0),
        (1, 2, 3, 3, 3, 0.1, 0.1, 0.1),
        (0, 0, MISSING, 0, 0, MISSING, 0.5, 0.5),
        (1, 0, 2, 1, 0, 0.9, 0.8, 0.7),
    ]
    return pd.DataFrame(rows, columns=[*columns, "s_att"])


@pytest.fixture
def activity() -> FeatureActivations:
    """Eight tokens: feature 0's predecessors are active as in `BITS`, and others against them."""

    def only(feature: int, values: list[float]) -> list[list[float]]:
        # The last feature, where an index of -1 would point, is active at every token.
        return [[v if i == feature else 1.0 - (v > 0) for i in range(3)] + [1.0] for v in values]

    own = [[0.5 + token, 4.0 if token in (1, 6) else 0.0, 0.0] for token in range(8)]
    return toys.planted_activations(
        {
            Site(0, "res"): only(2, [0.01 * bits[0] for bits in BITS]),
            Site(1, "mlp"): only(1, [5.0 * bits[1] for bits in BITS]),
            Site(1, "att"): only(0, [2.0 * bits[2] for bits in BITS]),
            Site(1, "res"): own,
        }
    )


def test_all_eight_groups_are_told_by_activity_at_the_same_token(
    table: pd.DataFrame, activity: FeatureActivations
):
    found = occurrences(table, activity)
    first = found[found["feature"] == 0].set_index("token_row")
    assert first["group"].to_dict() == {row: BY_BITS[bits] for row, bits in enumerate(BITS)}
    assert first["activation"].to_dict() == {row: 0.5 + row for row in range(8)}
    for place, module in enumerate(("res", "mlp", "att")):
        assert first[module].tolist() == [bool(bits[place]) for bits in BITS]
        assert first[f"rate_{module}"].tolist() == [0.5] * 8
    assert first[["s_res", "s_mlp", "s_att"]].drop_duplicates().to_numpy().tolist() == [
        [0.9, 0.8, 0.7]
    ]
    assert sorted(first["group"]) == sorted(GROUPS)


def test_a_feature_without_matches_comes_from_nowhere(
    table: pd.DataFrame, activity: FeatureActivations
):
    found = occurrences(table, activity)
    second = found[found["feature"] == 1]
    assert second["token_row"].tolist() == [1, 6]
    assert second["group"].tolist() == ["From nowhere"] * 2
    assert second[["rate_res", "rate_mlp", "rate_att"]].to_numpy().sum() == 0
    assert set(found["feature"]) == {0, 1}


def test_layers_without_all_three_sites_are_left_out(
    table: pd.DataFrame, activity: FeatureActivations
):
    assert set(occurrences(table, activity)["layer"]) == {1}
    more = pd.concat([table, table[table["layer"] == 1].assign(layer=2, source_att=MISSING)])
    pd.testing.assert_frame_equal(occurrences(more, activity), occurrences(table, activity))
    for broken in (table[table["layer"] == 0], table.drop(columns=["source_mlp", "s_mlp"])):
        with pytest.raises(ValueError, match="no layer has predecessors at all three"):
            occurrences(broken, activity)


def test_the_planted_suite_gives_the_groups_counted_by_hand():
    rng = np.random.default_rng(0)
    codes = {
        site: (rng.random((40, len(rows))) * (rng.random((40, len(rows))) < 0.4)).tolist()
        for site, rows in toys.planted_directions().items()
    }
    activity = toys.planted_activations(codes)
    found = occurrences(scores(match_table(toys.bare_suite(), k=1)), activity)
    expected = set()
    for layer in (1, 2):
        for token in range(40):
            for feature, coordinate in enumerate(toys.COORDINATE[layer]):
                if not codes[Site(layer, "res")][token][feature]:
                    continue
                module = "mlp" if coordinate < toys.MODULE else "att"
                bits = {
                    "res": codes[Site(layer - 1, "res")][token][toys.RES_FROM[layer][feature]],
                    module: codes[Site(layer, module)][token][coordinate % toys.MODULE],
                }
                key = tuple(int(bits.get(m, 0) > 0) for m in ("res", "mlp", "att"))
                expected.add((layer, feature, token, BY_BITS[key]))
    columns = found[["layer", "feature", "token_row", "group"]]
    assert set(columns.itertuples(index=False, name=None)) == expected
    assert len(found) == len(expected)


@pytest.fixture(scope="module")
def drawn() -> pd.DataFrame:
    """Occurrences of two layers and two datasets, with ties, and one group that is too small."""
    rng = np.random.default_rng(0)
    parts = []
    for dataset, layer in (("a", 1), ("a", 2), ("b", 1)):
        for place, group in enumerate(GROUPS):
            count = 19 if group == "From ATT" else 20 + 3 * place
            values = rng.normal(0.1 * place * layer, 0.3, (count, 3)).round(1)
            part = pd.DataFrame(values, columns=["s_res", "s_mlp", "s_att"])
            parts.append(part.assign(group=group, layer=layer, dataset=dataset))
    return pd.concat(parts).sample(frac=1, random_state=0)


def test_each_test_is_the_one_of_scipy(drawn: pd.DataFrame):
    tests = significance(drawn)
    large = [group for group in GROUPS if group != "From ATT"]
    assert len(tests) == 3 * 3 * len(list(combinations(large, 2)))
    assert "From ATT" not in set(tests["first"]) | set(tests["second"])
    for row in tests.sample(40, random_state=1).itertuples():
        part = drawn[(drawn["dataset"] == row.dataset) & (drawn["layer"] == row.layer)]
        a, b = (part.loc[part["group"] == name, row.score] for name in (row.first, row.second))
        expected = mannwhitneyu(a, b, alternative="two-sided").pvalue
        assert row.p == pytest.approx(expected, rel=1e-12)
        assert (row.n_first, row.n_second) == (len(a), len(b))
        assert row.significant == (expected < 1e-3)
    assert 0 < tests["significant"].mean() < 1


def test_level_and_smallest_group_are_as_asked(drawn: pd.DataFrame):
    everyone = significance(drawn, alpha=0.2, smallest=1)
    assert len(everyone) == 3 * 3 * 28
    assert (everyone["significant"] == (everyone["p"] < 0.2)).all()
    large = significance(drawn, smallest=38)
    assert set(large["first"] + ", " + large["second"]) == {"From MLP & ATT, From RES & MLP & ATT"}
    one = significance(drawn[drawn["dataset"] == "b"].drop(columns="dataset"))
    assert set(one["dataset"]) == {"all"}


def test_too_few_occurrences_give_an_empty_table(drawn: pd.DataFrame):
    tests = significance(drawn, smallest=1000)
    assert tests.columns.tolist() == significance(drawn).columns.tolist()
    assert tests.empty
    assert share_significant(tests).empty


def test_pairs_are_classed_by_where_the_scores_module_is_active(drawn: pd.DataFrame):
    tests = significance(drawn, smallest=1)
    tests = tests[(tests["dataset"] == "b")].set_index(["first", "second", "score"])["pair"]
    for first, second, classes in (
        ("From nowhere", "From RES", ("AO", "IB", "IB")),
        ("From RES", "From MLP", ("AO", "AO", "IB")),
        ("From MLP", "From ATT", ("IB", "AO", "AO")),
        ("From RES", "From RES & MLP", ("AB", "AO", "IB")),
        ("From RES & MLP", "From RES & ATT", ("AB", "AO", "AO")),
        ("From nowhere", "From RES & MLP & ATT", ("AO", "AO", "AO")),
        ("From MLP & ATT", "From RES & MLP & ATT", ("AO", "AB", "AB")),
        ("From nowhere", "From MLP & ATT", ("IB", "AO", "AO")),
    ):
        found = tuple(tests[(first, second, f"s_{m}")] for m in ("res", "mlp", "att"))
        assert found == classes, (first, second)


def test_shares_are_averaged_over_pairs_and_not_over_tests():
    rows = [("From RES", "From MLP", s) for s in (True, True, True, False)]
    rows += [("From RES", "From ATT", False)]
    frame = pd.DataFrame(rows, columns=["first", "second", "significant"])
    tests = pd.concat(
        [frame.assign(score="s_res", pair="AO"), frame[:1].assign(score="s_res", pair="IB")]
    )
    shares = share_significant(tests)
    assert shares.loc["s_res", ["AO", "IB"]].tolist() == [0.375, 1.0]
    assert np.isnan(shares.loc["s_res", "AB"])
