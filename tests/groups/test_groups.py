"""Groups are what the planted activity says, and shares and profiles are counted by hand."""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import toys
from counted import BY_BITS, planted_occurrences, table_of, transition_of
from scipy.stats import entropy

from flowhelpers.activations.sparse import FeatureActivations, collect, read_batches
from flowhelpers.core.bootstrap import resamples
from flowhelpers.core.features import MODULES, Site
from flowhelpers.groups import occurrences
from flowhelpers.groups.occurrences import (
    GROUPS,
    Occurrences,
    check_layers,
    complete_layers,
    complete_layers_of,
    find_occurrences,
    shuffled_tokens,
    youden_thresholds,
)
from flowhelpers.groups.shares import (
    dataset_gaps,
    group_profiles,
    group_shares,
)
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite

BITS = list(BY_BITS)


@pytest.fixture
def matches() -> pd.DataFrame:
    """Feature 0 of layer 1 has three predecessors, feature 1 has none, 2 is never active.

    The rows are in another order than the features, and rank 2 is another source.
    """
    found = {}
    for feature in (1, 2, 0):
        for module, best, score in (("res", 2, 0.9), ("mlp", 1, 0.8), ("att", 0, 0.7)):
            none, never = [(-1, 0.0)] * 2, [(3, 0.1), (2, 0.05)]
            found[1, module, feature] = {0: [(best, score), (3, 0.01)], 1: none, 2: never}[feature]
    for feature in (0, 1, 2, 3):
        for module in ("mlp", "att"):
            found[0, module, feature] = [(0, 0.5), (1, 0.4)]
    return table_of(found)


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
            Site(0, "mlp"): only(0, [float(token == 5) for token in range(8)]),
            Site(0, "att"): only(0, [0.0] * 8),
            Site(1, "mlp"): only(1, [5.0 * bits[1] for bits in BITS]),
            Site(1, "att"): only(0, [2.0 * bits[2] for bits in BITS]),
            Site(1, "res"): own,
        }
    )


def test_all_eight_groups_are_told_by_activity_at_the_same_token(
    matches: pd.DataFrame, activity: FeatureActivations
):
    found = find_occurrences(matches, activity)
    first = found.table[found.table["feature"] == 0].set_index("token_row")
    assert first["group"].to_dict() == {row: BY_BITS[bits] for row, bits in enumerate(BITS)}
    assert first["activation"].to_dict() == {row: 0.5 + row for row in range(8)}
    for place, (module, score) in enumerate(zip(MODULES, (0.9, 0.8, 0.7), strict=True)):
        assert first[module].tolist() == [bool(bits[place]) for bits in BITS]
        assert set(first[f"rate_{module}"]) == {0.5}
        assert set(first[f"s_{module}"]) == {score}
    second = found.table[found.table["feature"] == 1]  # no match is from nowhere
    assert second["token_row"].tolist() == [1, 6]
    assert second["group"].tolist() == ["From nowhere"] * 2
    assert second[["rate_res", "rate_mlp", "rate_att"]].to_numpy().sum() == 0
    assert set(found.table["feature"]) == {0, 1}


def test_of_several_matches_one_that_is_active_is_enough(
    matches: pd.DataFrame, activity: FeatureActivations
):
    found = find_occurrences(matches, activity, top_n=2)  # the second match is active everywhere
    first = found.table[found.table["feature"] == 0]
    assert set(first["group"]) == {"From RES & MLP & ATT"}
    assert set(first["rate_res"]) == {1.0}
    assert set(first["s_res"]) == {0.9}
    for top_n in (0, 3):
        with pytest.raises(ValueError, match=f"top_n={top_n}: expected 1 to 2, the table's ranks"):
            find_occurrences(matches, activity, top_n)


def test_layers_without_all_three_sites_are_left_out_unless_asked_for(
    matches: pd.DataFrame, activity: FeatureActivations
):
    whole = find_occurrences(matches, activity)
    assert set(whole.table["layer"]) == {1}
    both = find_occurrences(matches, activity, incomplete=True)
    zero = both.table[both.table["layer"] == 0]
    assert zero[["s_res", "rate_res"]].isna().all(axis=None)
    assert not zero["res"].any()
    assert set(zero["s_mlp"]) == {0.5}
    assert set(zero.loc[zero["token_row"] == 5, "group"]) == {"From MLP"}
    later = both.table[both.table["layer"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(later, whole.table)
    for sites in (matches[matches["layer"] == 0], matches[matches["module"] != "mlp"]):
        with pytest.raises(ValueError, match="no layer has predecessors at all three"):
            find_occurrences(sites, activity)
    part = {site: codes for site, codes in activity.by_site.items() if site != Site(1, "mlp")}
    with pytest.raises(ValueError, match="no activations at 1/mlp, of which the match table"):
        find_occurrences(matches, FeatureActivations(activity.tokens, part))


def test_the_planted_suite_gives_the_groups_counted_by_hand():
    found, expected = planted_occurrences()
    table = found.table[found.table["layer"] > 0]
    columns = table[["layer", "feature", "token_row", "group"]]
    assert set(columns.itertuples(index=False, name=None)) == expected
    assert len(table) == len(expected)


def test_shares_are_counted_by_hand_and_an_empty_group_has_none():
    found, expected = planted_occurrences()
    shares = group_shares(found).set_index(["dataset", "group"])
    for dataset, tokens in (("one", range(16)), ("two", range(16, 40))):
        here = [row for row in expected if row[2] in tokens]
        counts = Counter(group for *_, group in here)
        unique = Counter(group for *_, group in {(a, b, d) for a, b, _, d in here})
        for group in GROUPS:
            row = shares.loc[dataset, group]
            assert (row["n"], row["features"]) == (counts[group], unique[group])
            some = counts[group] > 0
            share = counts[group] / len(here) if some else np.nan
            assert row["share"] == pytest.approx(share, nan_ok=True)
            share = unique[group] / unique.total() if some else np.nan
            assert row["unique_share"] == pytest.approx(share, nan_ok=True)
    assert shares.loc["one", "From MLP & ATT"]["n"] == 0  # no feature has both, as planted
    by_layer = group_shares(found, ("layer",)).set_index(["layer", "group"])
    assert by_layer.loc[0, "From MLP"]["n"] > 0  # layer 0 is shown apart, and only here
    assert group_shares(found, ())["n"].sum() == len(expected)


def best_cut(score: np.ndarray, active: np.ndarray) -> float:
    """Just below the highest score of highest J, from one row an occurrence."""

    def j(cut: float) -> float:
        return float((score[active] >= cut).mean() - (score[~active] >= cut).mean())

    cut = max([np.inf, *np.sort(np.unique(score))[::-1]], key=j)  # of equals the first
    return float(np.nextafter(min(cut, 1.0), -1))


def test_youdens_cut_is_that_of_all_occurrences_but_only_one_batch_of_them_is_held(
    planted: Suite, monkeypatch: pytest.MonkeyPatch
):
    matches = match_table(planted, k=2)
    of_feature = matches.groupby(["layer", "module", "feature"], observed=True).ngroup()
    rng = np.random.default_rng(0)  # some scores many times
    matches["score"] = rng.choice([0.1, 0.35, 0.6, 0.8], of_feature.max() + 1)[of_feature]
    matches.loc[(matches["layer"] == 2) & (matches["module"] == "att"), "source"] = -1
    table = find_occurrences(matches, collect(planted, toys.TEXTS, max_tokens=20)).table
    expected = {
        (layer, module): best_cut(part[f"s_{module}"].to_numpy(), part[module].to_numpy())
        for layer, part in table.groupby("layer")
        for module in MODULES
        if (layer, module) != (2, "att")  # never active
    }
    assert len(set(expected.values())) > 2
    held: list[weakref.ref[Any]] = []

    def watched(*given: Any) -> Iterator[dict[Site, Any]]:
        for batch in read_batches(*given, batch_size=1):
            assert sum(ref() is not None for ref in held) <= 1  # the one that was counted last
            held.append(weakref.ref(batch[Site(1, "res")]))
            yield batch

    monkeypatch.setattr(occurrences, "read_batches", watched)
    cuts = youden_thresholds(planted, toys.TEXTS, matches, max_tokens=20)
    assert len(held) == len(toys.TEXTS)
    assert cuts == expected


def test_datasets_are_held_against_the_one_that_was_read_and_methods_on_equal_resamples():
    found, _ = planted_occurrences()
    some = complete_layers(found.table).drop(columns="group")

    def method(**rates: float) -> Occurrences:
        draw = np.random.default_rng(1).random(len(some))
        away = draw < some["dataset"].astype(str).map(rates)
        return replace(found, table=some.assign(group=np.where(away, GROUPS[0], GROUPS[1])))

    by_method = {"cosine": method(one=0.3, two=0.4), "pearson": method(one=0.1, two=0.9)}
    by_method["same"] = by_method["cosine"]
    gaps = dataset_gaps(by_method, "one", times=60).set_index("method")
    assert gaps["dataset"].tolist() == ["two"] * 3
    drawn = {}
    for name, made in by_method.items():
        nowhere = made.table["group"] == GROUPS[0]
        shares = nowhere.groupby(made.table["dataset"].astype(str)).mean()
        assert gaps.loc[name, ["at_home", "away"]].tolist() == pytest.approx(shares.tolist())
        gap = shares["two"] - shares["one"]
        assert gaps.loc[name, "difference"] == pytest.approx(gap)
        draws = []
        for times in resamples(found.tokens, 60):
            rows = made.table.loc[made.table.index.repeat(times[made.table["text"]])]
            means = (rows["group"] == GROUPS[0]).groupby(rows["dataset"].astype(str)).mean()
            draws.append(means["two"] - means["one"])
        drawn[name] = np.array(draws)
        for column, values in (
            ("difference", drawn[name]),
            ("beyond", drawn[name] - drawn["cosine"]),
        ):
            ends = gaps.loc[name, [f"{column}_low", f"{column}_high"]].tolist()
            assert ends == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-9)
    assert dataset_gaps(by_method, "absent", times=2).empty
    assert gaps.loc["pearson", "beyond_low"] > 0.2
    assert (gaps.loc["same", ["beyond", "beyond_low", "beyond_high"]] == 0).all()


def test_a_layer_without_predecessors_is_refused_with_those_that_have_them():
    sites = {Site(layer, module) for layer in range(4) for module in MODULES}
    assert check_layers([3, 1], sites) == [3, 1]
    for layers in ([0], [4], [1, 1], [], [1, 9]):
        with pytest.raises(ValueError, match=r"expected some of \[1, 2, 3\], each once"):
            check_layers(layers, sites)
    with pytest.raises(ValueError, match=r"layers=\[2\]: expected some of \[1\]"):
        check_layers([2], sites - {Site(2, "att"), Site(3, "mlp")})
    assert check_layers([2], {site for site in sites if site.module != "att"}) == [2]


def test_the_transition_and_the_profiles_are_counted_by_hand():
    found, expected = planted_occurrences()
    members = {g: {(a, b) for a, b, _, group in expected if group == g} for g in GROUPS}
    matrix = transition_of(found)
    for i, first in enumerate(GROUPS):
        for j, second in enumerate(GROUPS):
            both, size = members[first] & members[second], len(members[first])
            assert matrix[i, j] == pytest.approx(len(both) / size if size else np.nan, nan_ok=True)
    assert ((matrix > 0) & (matrix < 1)).any()
    profiles = group_profiles(found).set_index(["layer", "feature"])
    counts = Counter((layer, feature, group) for layer, feature, _, group in expected)
    for (layer, feature), row in profiles.iterrows():
        own = {g: counts[layer, feature, g] for g in GROUPS}
        assert row["n"] == sum(own.values())
        shares = np.array([own[g] / row["n"] for g in GROUPS])
        assert row[list(GROUPS)].to_numpy(float) == pytest.approx(shares)
        assert own[row["main"]] == max(own.values())
        assert row["main_share"] == pytest.approx(shares.max())
        assert row["entropy"] == pytest.approx(entropy(shares) / np.log(2))
    assert profiles["n"].sum() == len(expected)


def random_activity(rates: np.ndarray, tokens: int = 400) -> FeatureActivations:
    """Features active at random at these rates, at the four sites of layer 1; two datasets."""
    rng = np.random.default_rng(0)
    places = ((0, "res"), (1, "mlp"), (1, "att"), (1, "res"))
    codes = {
        Site(layer, module): (rng.random((tokens, len(rates))) < rates).astype(float).tolist()
        for layer, module in places
    }
    found = toys.planted_activations(codes)
    found.tokens["dataset"] = np.where(found.tokens["text"] < 20, "one", "two")
    return found


def test_shuffled_tokens_are_of_another_text_of_the_same_dataset_at_all_sites_alike():
    activity = random_activity(np.linspace(0.02, 0.9, 30))
    number = np.arange(1, 401)[:, None]  # each token's activation tells which token it is
    for site, codes in activity.by_site.items():
        activity.by_site[site] = codes.multiply(number).tocsr()  # pyright: ignore[reportIndexIssue]
    away = shuffled_tokens(activity)
    came_from = {s: c.max(axis=1).toarray()[:, 0].astype(int) - 1 for s, c in away.by_site.items()}
    rows = came_from[Site(1, "res")]
    for other in came_from.values():
        assert (other == rows).mean() > 0.95  # but for tokens at which nothing is active
    tokens, known = activity.tokens, rows >= 0
    source, target = tokens.iloc[rows[known]], tokens[known]
    assert (source["dataset"].to_numpy() == target["dataset"].to_numpy()).all()
    assert (source["text"].to_numpy() != target["text"].to_numpy()).all()
    for dataset in ("one", "two"):
        inside = (tokens["dataset"] == dataset).to_numpy()
        for site, codes in activity.by_site.items():
            often = codes[inside].getnnz(axis=0)
            assert (away.by_site[site][inside].getnnz(axis=0) == often).all()
    again = shuffled_tokens(activity).by_site[Site(1, "res")]
    assert (again != away.by_site[Site(1, "res")]).nnz == 0
    assert (shuffled_tokens(activity, seed=1).by_site[Site(1, "res")] != again).nnz > 0


def test_a_base_rate_is_the_predecessors_own_rate_whether_or_not_it_is_real():
    # A steep tail: a feature active at nine tokens of ten has no other that is like it.
    activity = random_activity(np.array([0.9, *np.full(59, 0.02)]))
    activity.by_site[Site(1, "att")] = activity.by_site[Site(1, "res")]  # pyright: ignore[reportIndexIssue]
    matches = table_of({(1, m, f): [(f, 0.9)] for m in MODULES for f in range(60)})
    real, base = (
        find_occurrences(matches, activity, predecessors=away).table
        for away in (None, shuffled_tokens(activity))
    )
    assert len(real) == len(base)
    assert base["rate_res"].to_numpy() == pytest.approx(real["rate_res"])
    assert real["att"].all()  # attention's are the features themselves
    for table, modules in ((real, ("res", "mlp")), (base, MODULES)):  # nothing else is related
        for module in modules:
            dense = table["feature"] == 0
            assert table.loc[dense, module].mean() == pytest.approx(0.9, abs=0.04)
            assert table.loc[~dense, module].mean() == pytest.approx(0.02, abs=0.03)


def test_groups_need_a_layer_with_all_three_predecessors():
    sites = {Site(layer, module) for layer in range(4) for module in MODULES}
    assert complete_layers_of(sites) == [1, 2, 3]
    assert complete_layers_of(sites - {Site(2, "att"), Site(2, "res")}) == [1]  # 3 has none before
    with pytest.raises(ValueError, match="no layer has SAEs for its stream, MLP, attention"):
        complete_layers_of({site for site in sites if site.module != "att"})
