"""The tests of the groups are SciPy's, one at a time, and intervals are those of texts redrawn."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from counted import planted_occurrences, transition_of
from scipy.stats import mannwhitneyu

from flowhelpers.core.bootstrap import resamples
from flowhelpers.core.features import MODULES
from flowhelpers.groups.occurrences import GROUPS, SCORES, Occurrences
from flowhelpers.groups.shares import (
    group_shares,
    share_intervals,
    transition_intervals,
)
from flowhelpers.groups.significance import (
    class_shares,
    mann_whitney,
    mann_whitney_tests,
    pair_shares,
    scores_by_activity,
    share_significant,
    significance_intervals,
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
    # Holm, step by step, over the tests that were made alone.
    ordered = made.sort_values("p")
    steps = ordered["p"] * np.arange(len(made), 0, -1)
    assert ordered["p_holm"].tolist() == pytest.approx(steps.cummax().clip(upper=1).tolist())
    assert tests.loc[tests["p"].isna(), ["significant", "p_holm", "effect"]].isna().all(axis=None)
    n, p, effect = mann_whitney(np.array([[30.0], [40.0]]))  # all scores alike
    assert (n.tolist(), p.tolist()) == ([30, 40], [[1, 1], [1, 1]])
    assert effect.tolist() == [[0, 0], [0, 0]]


def test_level_smallest_group_and_unit_are_as_asked(drawn: Occurrences):
    everyone = mann_whitney_tests(drawn, alpha=0.2, smallest=1)
    assert (everyone["significant"] == (everyone["p"] < 0.2)).all()
    large = mann_whitney_tests(drawn, smallest=38).dropna(subset="p")
    assert set(large["first"] + ", " + large["second"]) == {"From MLP & ATT, From RES & MLP & ATT"}
    none = mann_whitney_tests(drawn, smallest=1000)
    assert none["p"].isna().all()
    assert share_significant(none).isna().all(axis=None)
    assert (pair_shares(none)["tests"] == 0).all()
    for alpha in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="expected a level between 0 and 1"):
            mann_whitney_tests(drawn, alpha=alpha)
    row = mann_whitney_tests(drawn, smallest=1, unique=True).iloc[0]
    part = drawn.table[(drawn.table["dataset"] == row["dataset"]) & (drawn.table["layer"] == 1)]
    for side in ("first", "second"):
        members = part.loc[part["group"] == row[side], "feature"]
        assert row[f"n_{side}"] == members.nunique() < len(members)


def test_shares_are_averaged_over_pairs_and_not_over_tests():
    rows = [("From RES", "From MLP", s) for s in (1.0, 1.0, 1.0, 0.0)]
    rows += [("From RES", "From ATT", 0.0), ("From RES", "From ATT", np.nan)]
    rows += [("From MLP", "From ATT", 1.0)]
    tests = pd.DataFrame(rows, columns=["first", "second", "significant"])
    tests = tests.assign(p=tests["significant"] / 2, effect=0.5)
    tests = pd.concat([tests.assign(score=score) for score in SCORES])
    shares = share_significant(tests)
    assert shares.loc["s_res", ["AO", "IB"]].tolist() == [0.375, 1.0]
    cells = pair_shares(tests[tests["score"] == "s_res"]).set_index(["first", "second"])
    assert cells.loc[("From RES", "From ATT"), ["tests", "share"]].tolist() == [1, 0]


def test_the_classes_of_figure_4_are_the_means_of_figure_14(drawn: Occurrences):
    tests = mann_whitney_tests(drawn, alpha=0.05)
    pairs, classes = pair_shares(tests), class_shares(tests)
    assert len(classes) == 3 * 3 * 3
    for row in classes.itertuples():
        part = pairs[pairs["score"] == row.score]
        name = row.module.upper()
        active = sum(part[side].str.contains(name).astype(int) for side in ("first", "second"))
        part = part[active == {"AO": 1, "AB": 2, "IB": 0}[row.pair]]
        assert len(part) == {"AO": 16, "AB": 6, "IB": 6}[row.pair]
        assert row.share == pytest.approx(part["share"].mean(), nan_ok=True)
        assert row.tests == part["tests"].sum()


def test_what_a_score_tells_is_counted_pair_by_pair():
    found, _ = planted_occurrences()
    later = found.table[found.table["layer"] > 0]
    rows = scores_by_activity(found).set_index("score")
    for module in MODULES:
        on, off = (later.loc[later[module] == is_on, f"s_{module}"] for is_on in (True, False))
        signs = np.sign(np.subtract.outer(on.to_numpy(), off.to_numpy()))
        expected = [on.median(), off.median(), signs.mean()]
        row = rows.loc[f"s_{module}", ["active", "inactive", "effect"]]
        assert row.tolist() == pytest.approx(expected, abs=1e-9)


# Intervals.


def redrawn(found: Occurrences, times: int) -> Iterator[Occurrences]:
    """The occurrences with each text's rows as often as it was drawn, sample by sample."""
    texts = found.tokens["text"].drop_duplicates()
    for counts in resamples(found.tokens, times):
        often = found.table["text"].map(dict(zip(texts, counts.tolist(), strict=True)))
        yield replace(found, table=found.table.loc[found.table.index.repeat(often)])


def assert_intervals(
    rows: pd.DataFrame, low: np.ndarray, high: np.ndarray, known: Any, within: float = 1e-12
):
    """Those of the known rows, and none of the others."""
    assert rows.loc[known, "low"].to_numpy() == pytest.approx(low, abs=within)
    assert rows.loc[known, "high"].to_numpy() == pytest.approx(high, abs=within)
    assert rows.loc[~known, ["low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize("by", [("dataset",), ("dataset", "layer"), ()])
def test_shares_have_the_intervals_of_samples_made_one_by_one(by: tuple[str, ...]):
    found, _ = planted_occurrences()
    again = [group_shares(each, by)["share"].fillna(0) for each in redrawn(found, 50)]
    low, high = np.quantile(np.stack(again), [0.025, 0.975], axis=0)
    shares = share_intervals(found, by, times=50)
    pd.testing.assert_frame_equal(shares.drop(columns=["low", "high"]), group_shares(found, by))
    known = shares["share"].notna()
    assert_intervals(shares, low[known], high[known], known)
    with pytest.raises(ValueError, match="times=0: expected 1 resample or more"):
        share_intervals(found, by, times=0)


def test_the_transition_has_intervals_around_its_shares():
    found, _ = planted_occurrences()
    rows = transition_intervals(found, times=50)
    again = [transition_of(e).ravel() for e in redrawn(found, 50)]
    matrix = transition_of(found)
    assert rows["share"].tolist() == pytest.approx(matrix.ravel(), nan_ok=True)
    seen = found.table.query("layer > 0").drop_duplicates(["layer", "feature", "group"])
    sizes = rows.drop_duplicates("first").set_index("first")["features"]
    assert sizes.to_dict() == seen["group"].value_counts().to_dict()
    known = rows["share"].notna()
    spread = np.nanquantile(np.stack(again)[:, known], [0.025, 0.5, 0.975], axis=0)
    share = rows.loc[known, "share"].to_numpy()
    low, high = share + spread[0] - spread[1], share + spread[2] - spread[1]
    assert_intervals(rows, low.clip(min=0), high.clip(max=1), known, within=1e-9)


@pytest.mark.parametrize("unique", [False, True])
def test_tests_have_the_intervals_of_samples_made_one_by_one(drawn: Occurrences, unique: bool):
    options = {"alpha": 0.05, "smallest": 5, "unique": unique}
    found = planted_occurrences(tokens=120)[0] if unique else drawn  # where a feature has one score
    tests = mann_whitney_tests(found, **options)
    classes, pairs, gaps = significance_intervals(found, tests, times=20, **options)
    again = [mann_whitney_tests(sample, **options) for sample in redrawn(found, 20)]
    for rows, shares in ((classes, class_shares), (pairs, pair_shares)):
        wide = np.stack([shares(each)["share"].to_numpy() for each in again])
        known = ~np.isnan(wide).all(axis=0)
        spread = np.nanquantile(wide[:, known], [0.025, 0.5, 0.975], axis=0)
        share = rows.loc[known, "share"].to_numpy()  # in the middle of its interval
        low, high = share + spread[0] - spread[1], share + spread[2] - spread[1]
        assert_intervals(rows, low.clip(min=0), high.clip(max=1), known)
        assert (rows["low"] < rows["high"]).any()
        pd.testing.assert_frame_equal(rows.drop(columns=["low", "high"]), shares(tests))
    own = [share_significant(each) for each in (tests, *again)]
    here, *redone = [(each["AO"] - each["IB"]).to_numpy() for each in own]
    assert gaps["score"].tolist() == [*SCORES]
    assert gaps["difference"].to_numpy() == pytest.approx(here)
    low, middle, high = np.nanquantile(np.stack(redone), [0.025, 0.5, 0.975], axis=0)
    assert gaps["difference_low"].to_numpy() == pytest.approx(here + low - middle)
    assert gaps["difference_high"].to_numpy() == pytest.approx(here + high - middle)
