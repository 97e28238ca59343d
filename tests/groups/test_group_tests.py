"""The tests of the groups are SciPy's, one at a time, and intervals are those of texts redrawn."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from counted import planted_occurrences
from scipy.stats import false_discovery_control, mannwhitneyu

from flowhelpers.core.bootstrap import resamples
from flowhelpers.core.features import MODULES
from flowhelpers.groups.intervals import (
    share_intervals,
    significance_intervals,
    transition_intervals,
)
from flowhelpers.groups.occurrences import GROUPS, Occurrences, group_shares, group_transition
from flowhelpers.groups.significance import (
    class_shares,
    mann_whitney,
    mann_whitney_tests,
    pair_shares,
    share_significant,
)


@pytest.fixture(scope="module")
def drawn() -> Occurrences:
    """Occurrences of two layers and two datasets, with ties, and one group that is too small."""
    rng = np.random.default_rng(0)
    parts = []
    for dataset, layer in (("a", 1), ("a", 2), ("b", 1)):
        for place, group in enumerate(GROUPS):
            count = 19 if group == "From ATT" else 20 + 3 * place
            values = rng.normal(0.1 * place * layer, 0.3, (count, 3)).round(1)
            part = pd.DataFrame(values, columns=["s_res", "s_mlp", "s_att"])
            texts = rng.integers(0, 6, count) + 6 * (dataset == "b")
            part = part.assign(group=group, layer=layer, dataset=dataset, text=texts)
            parts.append(part.assign(feature=rng.integers(0, 30, count)))
    table = pd.concat(parts).sample(frac=1, random_state=0).reset_index(drop=True)
    table["group"] = pd.Categorical(table["group"], categories=list(GROUPS))
    zero = table[:30].assign(layer=0, s_res=np.nan)  # no test can use these
    tokens = pd.DataFrame({"dataset": ["a"] * 6 + ["b"] * 6, "text": range(12)})
    return Occurrences("toy", "cosine", 1, tokens, pd.concat([table, zero], ignore_index=True))


def test_each_test_is_the_one_of_scipy(drawn: Occurrences):
    tests = mann_whitney_tests(drawn)
    assert len(tests) == 3 * 3 * 28
    made = tests[tests["p"].notna()]
    assert len(made) == 3 * 3 * len(list(combinations(range(7), 2)))
    assert "From ATT" not in set(made["first"]) | set(made["second"])
    table = drawn.table[drawn.table["layer"] > 0]
    for row in made.itertuples():
        part = table[(table["dataset"] == row.dataset) & (table["layer"] == row.layer)]
        a, b = (part.loc[part["group"] == name, row.score] for name in (row.first, row.second))
        expected = mannwhitneyu(a, b, alternative="two-sided")
        assert row.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (row.n_first, row.n_second) == (len(a), len(b))
        assert row.effect == pytest.approx(2 * expected.statistic / (len(a) * len(b)) - 1)
        assert row.significant == (expected.pvalue < 1e-3)
    assert 0 < made["significant"].mean() < 1


def test_holms_correction_is_the_one_worked_out_step_by_step(drawn: Occurrences):
    tests = mann_whitney_tests(drawn)
    made = tests[tests["p"].notna()].sort_values("p")
    worst, corrected = 0.0, []
    for left, p in zip(range(len(made), 0, -1), made["p"], strict=True):
        worst = max(worst, min(1, p * left))
        corrected.append(worst)
    assert made["p_holm"].tolist() == pytest.approx(corrected)
    assert tests.loc[tests["p"].isna(), ["significant", "p_holm", "effect"]].isna().all(axis=None)
    assert (made["p_holm"] >= false_discovery_control(made["p"]) - 1e-12).all()


def test_all_scores_alike_are_no_difference():
    n, p, effect = mann_whitney(np.array([[30.0], [40.0]]))
    assert n.tolist() == [30, 40]
    assert p.tolist() == [[1, 1], [1, 1]]
    assert effect.tolist() == [[0, 0], [0, 0]]


def test_level_and_smallest_group_are_as_asked(drawn: Occurrences):
    everyone = mann_whitney_tests(drawn, alpha=0.2, smallest=1)
    assert len(everyone) == 3 * 3 * 28
    assert (everyone["significant"] == (everyone["p"] < 0.2)).all()
    large = mann_whitney_tests(drawn, smallest=38).dropna(subset="p")
    assert set(large["first"] + ", " + large["second"]) == {"From MLP & ATT, From RES & MLP & ATT"}
    for alpha in (0, 1, -0.1, 5, float("nan")):
        with pytest.raises(ValueError, match="expected a level between 0 and 1"):
            mann_whitney_tests(drawn, alpha=alpha)


def test_unique_features_count_once_in_a_group(drawn: Occurrences):
    tests = mann_whitney_tests(drawn, smallest=1, unique=True)
    table = drawn.table[drawn.table["layer"] > 0]
    row = tests.iloc[0]
    part = table[(table["dataset"] == row["dataset"]) & (table["layer"] == row["layer"])]
    for side in ("first", "second"):
        members = part.loc[part["group"] == row[side], "feature"]
        assert row[f"n_{side}"] == members.nunique() < len(members)


def test_too_few_occurrences_are_tested_nowhere(drawn: Occurrences):
    tests = mann_whitney_tests(drawn, smallest=1000)
    assert tests["p"].isna().all()
    assert share_significant(tests).isna().all(axis=None)
    assert (pair_shares(tests)["tests"] == 0).all()


def test_shares_are_averaged_over_pairs_and_not_over_tests():
    rows = [("From RES", "From MLP", s) for s in (1.0, 1.0, 1.0, 0.0)]
    rows += [("From RES", "From ATT", 0.0), ("From RES", "From ATT", np.nan)]
    rows += [("From MLP", "From ATT", 1.0)]
    tests = pd.DataFrame(rows, columns=["first", "second", "significant"])
    tests = tests.assign(p=tests["significant"] / 2, effect=0.5, score="s_res")
    shares = share_significant(tests)
    assert shares.loc["s_res", ["AO", "IB"]].tolist() == [0.375, 1.0]
    assert np.isnan(shares.loc["s_res", "AB"])
    assert shares.drop(index="s_res").isna().all(axis=None)
    cells = pair_shares(tests).set_index(["first", "second"])
    assert cells.loc[("From RES", "From ATT"), ["tests", "share"]].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("first", "second", "classes"),
    [
        ("From nowhere", "From RES", ("AO", "IB", "IB")),
        ("From RES", "From MLP", ("AO", "AO", "IB")),
        ("From MLP", "From ATT", ("IB", "AO", "AO")),
        ("From RES", "From RES & MLP", ("AB", "AO", "IB")),
        ("From RES & MLP", "From RES & ATT", ("AB", "AO", "AO")),
        ("From nowhere", "From RES & MLP & ATT", ("AO", "AO", "AO")),
        ("From MLP & ATT", "From RES & MLP & ATT", ("AO", "AB", "AB")),
        ("From nowhere", "From MLP & ATT", ("IB", "AO", "AO")),
    ],
)
def test_pairs_are_classed_by_where_a_module_is_active(
    first: str, second: str, classes: tuple[str, ...]
):
    row = {"first": first, "second": second, "significant": 1.0, "p": 0.0, "effect": 1.0}
    tests = pd.DataFrame([row | {"score": f"s_{m}"} for m in MODULES])
    found = class_shares(tests).dropna(subset="share")
    assert len(found) == 9
    for module, pair in zip(MODULES, classes, strict=True):
        assert set(found.loc[found["module"] == module, "pair"]) == {pair}


def test_the_classes_of_figure_4_are_the_means_of_figure_14(drawn: Occurrences):
    tests = mann_whitney_tests(drawn, alpha=0.05)
    pairs = pair_shares(tests)
    for row in class_shares(tests).itertuples():
        part = pairs[pairs["score"] == row.score]
        name = row.module.upper()
        active = sum(part[side].str.contains(name).astype(int) for side in ("first", "second"))
        part = part[active == {"AO": 1, "AB": 2, "IB": 0}[row.pair]]
        assert row.share == pytest.approx(part["share"].mean(), nan_ok=True)
        assert row.tests == part["tests"].sum()


# Intervals.


def test_texts_are_drawn_within_their_dataset(drawn: Occurrences):
    counts = resamples(drawn.tokens, times=300)
    assert counts.shape == (300, 12)
    assert (counts[:, :6].sum(axis=1) == 6).all()
    assert (counts[:, 6:].sum(axis=1) == 6).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(12), abs=0.2)
    assert (counts == resamples(drawn.tokens, times=300)).all()
    assert (counts != resamples(drawn.tokens, times=300, seed=1)).any()


def weighted(found: Occurrences, counts: np.ndarray) -> Occurrences:
    """The occurrences with each text's rows as often as it was drawn."""
    texts = found.tokens["text"].drop_duplicates().to_numpy()
    often = dict(zip(texts.tolist(), counts.tolist(), strict=True))
    rows = found.table.index.repeat(found.table["text"].map(often))
    return Occurrences(found.suite, found.method, found.top_n, found.tokens, found.table.loc[rows])


@pytest.mark.parametrize("by", [("dataset",), ("dataset", "layer"), ()])
def test_shares_have_the_intervals_of_samples_made_one_by_one(by: tuple[str, ...]):
    found, _ = planted_occurrences()
    again = [
        group_shares(weighted(found, counts), by)["share"].fillna(0).to_numpy()
        for counts in resamples(found.tokens, 50)
    ]
    low, high = np.quantile(np.stack(again), [0.025, 0.975], axis=0)
    shares = share_intervals(found, by, times=50)
    pd.testing.assert_frame_equal(shares.drop(columns=["low", "high"]), group_shares(found, by))
    there = shares["share"].notna()
    assert shares.loc[there, "low"].to_numpy() == pytest.approx(low[there])
    assert shares.loc[there, "high"].to_numpy() == pytest.approx(high[there])
    assert (shares["low"] <= shares["share"] + 1e-9)[there].mean() > 0.9
    assert (shares["high"] >= shares["share"] - 1e-9)[there].mean() > 0.9
    assert shares.loc[~there, ["low", "high"]].isna().all(axis=None)


def test_an_empty_cell_moves_no_other_cells_interval():
    found, _ = planted_occurrences()
    gone = (found.table["dataset"] == "one") & (found.table["layer"] == 1)
    part = replace(found, table=found.table[~gone].reset_index(drop=True))
    by = ("dataset", "layer")
    whole, left = share_intervals(found, by, times=50), share_intervals(part, by, times=50)
    assert left["n"].sum() < whole["n"].sum()
    keys = [*by, "group"]
    both = left.dropna(subset="share").merge(whole, on=keys, suffixes=("", "_whole"))
    assert len(both) > 8
    for column in ("share", "low", "high"):
        assert both[column].to_numpy() == pytest.approx(both[f"{column}_whole"])
    alone = replace(found, table=found.table[found.table["dataset"] == "two"])
    rows = share_intervals(alone, times=50).set_index("dataset")
    assert rows.loc["one", ["share", "low", "high"]].isna().all(axis=None)
    expected = share_intervals(found, times=50).set_index("dataset").loc["two", "low"]
    assert rows.loc["two", "low"].to_numpy() == pytest.approx(expected, nan_ok=True)


def test_the_transition_has_intervals_around_its_shares():
    found, _ = planted_occurrences()
    rows = transition_intervals(found, times=50)
    again = np.stack(
        [
            group_transition(weighted(found, c)).to_numpy().ravel()
            for c in resamples(found.tokens, 50)
        ]
    )
    known = ~np.isnan(again).all(axis=0)
    spread = np.nanquantile(again[:, known], [0.025, 0.5, 0.975], axis=0)
    share = rows["share"].to_numpy()[known]
    low, high = share + spread[0] - spread[1], share + spread[2] - spread[1]
    assert rows["low"].to_numpy()[known] == pytest.approx(low.clip(min=0), abs=1e-9)
    assert rows["high"].to_numpy()[known] == pytest.approx(high.clip(max=1), abs=1e-9)
    matrix = rows.pivot(index="first", columns="second", values="share")
    pd.testing.assert_frame_equal(
        matrix.loc[list(GROUPS), list(GROUPS)], group_transition(found), check_names=False
    )
    there = rows.dropna(subset="share")
    assert ((there["low"] <= there["share"]) & (there["share"] <= there["high"])).all()
    assert rows.loc[rows["share"].isna(), ["low", "high"]].isna().all(axis=None)
    assert (there["high"] > there["low"]).any()


@pytest.mark.parametrize("unique", [False, True])
def test_tests_have_the_intervals_of_samples_made_one_by_one(drawn: Occurrences, unique: bool):
    options = {"alpha": 0.05, "smallest": 5}
    found = planted_occurrences(tokens=120)[0] if unique else drawn  # where a feature has one score
    tests = mann_whitney_tests(found, unique=unique, **options)
    classes, pairs = significance_intervals(found, tests, times=20, unique=unique, **options)
    again = [
        mann_whitney_tests(weighted(found, counts), unique=unique, **options)
        for counts in resamples(found.tokens, 20)
    ]
    for rows, shares in ((classes, class_shares), (pairs, pair_shares)):
        wide = np.stack([shares(each)["share"].to_numpy() for each in again])
        known = ~np.isnan(wide).all(axis=0)
        low, high = np.nanquantile(wide[:, known], [0.025, 0.975], axis=0)
        assert rows["low"].to_numpy()[known] == pytest.approx(low)
        assert rows["high"].to_numpy()[known] == pytest.approx(high)
        assert rows.loc[~known, ["low", "high"]].isna().all(axis=None)
        assert (rows["low"] < rows["high"]).any()
        pd.testing.assert_frame_equal(rows.drop(columns=["low", "high"]), shares(tests))


def test_intervals_are_asked_for_with_sense(drawn: Occurrences):
    tests = mann_whitney_tests(drawn)
    with pytest.raises(ValueError, match=r"alpha=2\.0: expected a level between 0 and 1"):
        significance_intervals(drawn, tests, alpha=2.0)
    with pytest.raises(ValueError, match="times=0: expected 1 resample or more"):
        share_intervals(drawn, times=0)
