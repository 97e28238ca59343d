"""Several suites side by side: profiles of planted suites, counted by hand, and their figures."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import toys
from counted import planted_occurrences

from flowhelpers.across.flow_profile import depth, flow_profile, summary
from flowhelpers.across.groups_profile import (
    POOLED,
    activity_profile,
    fullest_suite,
    group_profile,
    group_totals,
)
from flowhelpers.across.phases import all_phases
from flowhelpers.across.plots import (
    by_depth,
    groups_against_chance,
    groups_by_depth,
    phases_by_depth,
    suite_looks,
)
from flowhelpers.across.profile import (
    Profile,
    alike,
    chosen_suites,
    combined,
    one_by_one,
    suite_profile,
)
from flowhelpers.core.features import MODULES
from flowhelpers.groups.occurrences import GROUPS, Occurrences, find_occurrences, modules_of
from flowhelpers.matching.scores import CLASSES, classify, feature_scores
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite
from flowhelpers.suites.needs import needs, needs_table
from flowhelpers.suites.registry import find_suite

PARTS = {"bare": set(MODULES), "no attention": {"res", "mlp"}, "stream": {"res"}}


def suite_of(name: str, called: str = "") -> Suite:
    """The planted suite with SAEs at some modules alone."""
    modules = PARTS[name]
    directions = toys.planted_directions()
    suite = toys.bare_suite({s: rows for s, rows in directions.items() if s.module in modules})
    return replace(suite, row=replace(suite.row, name=called or name))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Match tables of the planted suite with some of its modules."""
    cache = tmp_path_factory.mktemp("cache")
    return {name: match_table(suite_of(name), k=1, cache=cache) for name in PARTS}


# Which suites.


def test_suites_are_refused_that_are_none_unknown_or_there_twice(tmp_path: Path):
    with pytest.raises(ValueError, match=r"suites \[\]: expected a list of one or more.*flowlet"):
        chosen_suites([])
    with pytest.raises(ValueError, match=r"'flowlet': expected a list .*did you mean 'flowlet'"):
        chosen_suites("flowlet")
    with pytest.raises(ValueError, match="unknown suite 'flowlett'; did you mean 'flowlet'"):
        chosen_suites(["flowlet", "flowlett"])
    with pytest.raises(ValueError, match="flowlet is there 2 times; expected each once, others"):
        chosen_suites(["flowlet", "flowlet"])
    text = 'name: flowlet\nmodel: none\nlayers: 2\nsaes: {res: "{layer}"}\n'
    (tmp_path / "suite.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="flowlet is there 2 times"):
        chosen_suites(["flowlet", str(tmp_path)])
    names = ["flowlet@res", "flowlet"]
    assert [row.name for row in chosen_suites(names).values()] == names


class Loaded(SimpleNamespace):
    """Something that can be referred to weakly."""


def test_no_two_suites_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch):
    loaded: list[weakref.ref[Any]] = []

    def load(name: str, device: str) -> Any:
        assert all(each() is None for each in loaded)
        suite = Loaded(name=name, device=device)
        suite.itself = suite  # what holds itself is let go by the collector alone
        loaded.append(weakref.ref(suite))
        return suite

    monkeypatch.setattr("flowhelpers.suites.load.load_suite", load)
    names = ["flowlet", "flowlet@res", "flowlet@res+mlp"]
    gc.disable()
    try:
        found = one_by_one(names, lambda suite: (suite.name, suite.device), "cpu")
    finally:
        gc.enable()
    assert found == {name: (name, "cpu") for name in names}
    assert len(loaded) == 3
    with pytest.raises(ValueError, match="is there 2 times"):
        one_by_one(["flowlet", "flowlet"], lambda suite: suite)
    assert len(loaded) == 3


def test_what_several_suites_need_is_what_each_needs():
    rows = [find_suite(name) for name in ("flowlet", "gemma-2-2b")]
    found = needs_table(rows, "cpu").set_index(["suite", "experiment"])
    assert len(found) == 4
    for row in rows:
        for need in needs(row, "float32", {"model": 1e12, "matching": 1e12}):
            if need.notebooks in ("01 02", "03"):
                mine = found.loc[(row.name, need.experiment)]
                assert mine["fetched_gb"] == pytest.approx(need.fetched / 1e9)
    assert (found.loc["flowlet", "fetched_gb"] == 0).all()
    assert (found.loc["gemma-2-2b", "fetched_gb"] > 1).all()
    assert found.loc["flowlet", "fits"].all()


# The flow.


def test_depth_goes_from_the_first_layer_to_the_last():
    assert depth(np.array([0, 3, 6]), 7).tolist() == [0, 0.5, 1]
    assert depth(np.array([0]), 1).tolist() == [0]


def test_a_profile_is_what_is_planted(tables: dict[str, pd.DataFrame]):
    found = flow_profile(tables["bare"], 3).set_index("layer")
    assert found["depth"].tolist() == [0, 0.5, 1]
    assert found["places"].tolist() == ["mlp+att", "res+mlp+att", "res+mlp+att"]
    assert found["features"].tolist() == [16] * 3
    assert found.loc[1:, "median_res"].tolist() == pytest.approx([0.8, 0.8])
    # Half of the features of a layer have their module predecessor at the MLP, the others none.
    for layer, cosine in ((1, 0.6), (2, 0.96)):
        for module in ("mlp", "att"):
            row = found.loc[layer]
            assert row[f"s_{module}"] == pytest.approx(cosine / 2)
            assert (row[f"low_{module}"], row[f"high_{module}"]) == pytest.approx((0, cosine))
    table = feature_scores(tables["bare"])
    for layer, part in table.groupby("layer"):
        for module in MODULES:
            known = part[f"s_{module}"].notna()
            share = (part[f"s_{module}"] > part[f"null_{module}"])[known].mean()
            assert found.loc[layer, f"above_{module}"] == pytest.approx(share, nan_ok=True)
        kinds = classify(part)["class"].value_counts(normalize=True)
        if layer:
            expected = [kinds.get(name, 0) for name in CLASSES]
            assert found.loc[layer, [*CLASSES]].tolist() == pytest.approx(expected)
    assert found.loc[0, ["s_res", "above_res", *CLASSES, "born_mlp", "mutual"]].isna().all()
    assert found["life"].tolist() == pytest.approx((found["lives"] / 3).tolist())


def test_each_pair_of_sites_is_held_against_its_own_null(tables: dict[str, pd.DataFrame]):
    table = tables["bare"].copy()
    table.loc[(table["layer"] == 2) & (table["module"] == "res"), "null"] = 0.85
    table.loc[(table["layer"] == 1) & (table["module"] == "mlp"), "null"] = 0.59
    table.loc[(table["layer"] == 1) & (table["module"] == "att"), "null"] = 0.61
    found = flow_profile(table, 3).set_index("layer")
    assert found.loc[2, "above_res"] == 0
    assert found.loc[1, ["above_res", "above_mlp", "above_att"]].tolist() == [1, 0.5, 0]
    assert found.loc[1, ["translated", "processed"]].tolist() == [0.5, 0.5]
    assert found.loc[2, ["translated", "processed"]].tolist() == [0, 0]
    whole = summary(suite_of("bare").row, table, toys.D_MODEL)
    assert whole["above_res"] == 0.5
    assert whole["translated"] == 0.25


def test_what_a_suite_lacks_is_missing_and_the_rest_is_the_same(tables: dict[str, pd.DataFrame]):
    whole = flow_profile(tables["bare"], 3)
    without, stream = (flow_profile(tables[name], 3) for name in ("no attention", "stream"))
    of_attention = [c for c in whole if c.endswith("_att")]
    assert len(of_attention) == 7
    assert without[of_attention].isna().all(axis=None)
    assert without["places"].tolist() == ["mlp", "res+mlp", "res+mlp"]
    same = ["median_res", "above_mlp", "null_mlp", "dies", "mutual", "lives"]
    pd.testing.assert_frame_equal(without[same], whole[same])
    assert without.loc[1:, [*CLASSES]].notna().all(axis=None)
    assert stream["layer"].tolist() == [0, 1, 2]
    assert stream["features"].tolist() == [16] * 3
    assert stream["places"].tolist() == ["", "res", "res"]
    assert stream[["processed", "newborn", "born_mlp", "born_att"]].isna().all(axis=None)
    assert stream.loc[1:, ["translated", "unexplained"]].sum(axis=1).tolist() == [1, 1]
    assert stream.loc[0, ["translated", "unexplained"]].isna().all()


def test_a_summary_counts_what_has_a_stream_before_it(tables: dict[str, pd.DataFrame]):
    row = suite_of("bare").row
    found = summary(row, tables["bare"], toys.D_MODEL)
    assert (found["layers"], found["d_model"], found["saes"]) == (3, 32, 9)
    assert found["features"] == 3 * 16 + 6 * 8
    assert found["places"] == "res+mlp+att"
    assert found["mean_res"] == pytest.approx(0.8)
    assert found["mean_mlp"] == pytest.approx((0.6 + 0.96) / 4)  # layer 0, with its 1, is out
    later = feature_scores(tables["bare"]).query("layer > 0")
    for module in MODULES:
        above = (later[f"s_{module}"] > later[f"null_{module}"]).mean()
        assert found[f"above_{module}"] == pytest.approx(above)
    assert sum(found[name] for name in CLASSES) == pytest.approx(1)
    less = summary(row, tables["stream"], toys.D_MODEL)
    assert (less["saes"], less["features"], less["places"]) == (3, 48, "res")
    assert np.isnan([less["mean_mlp"], less["above_att"], less["processed"], less["newborn"]]).all()
    assert less["translated"] == found["above_res"]
    # Every step is of one to one: who lives at all lives through, or the null cuts every life.
    high = bool((later["s_res"] > later["null_res"]).all())
    assert (found["through"], found["mean_life"]) == ((1, 3) if high else (0, 1))
    assert found["mutual_life"] == found["mean_life"]


# The groups.


@pytest.fixture(scope="module")
def found() -> Occurrences:
    """Occurrences of the planted suite at random activity."""
    return planted_occurrences(tokens=120)[0]


@pytest.fixture(scope="module")
def base() -> Occurrences:
    """Others, that stand for chance."""
    return planted_occurrences(tokens=80)[0]


def test_groups_are_counted_by_hand_beside_chance(found: Occurrences, base: Occurrences):
    table = group_profile(found, base, 3, times=5)
    assert set(table["dataset"]) == {"one", "two", POOLED}
    assert not table.duplicated(["dataset", "layer", "group"]).any()
    for row in table.itertuples():
        able = row.layer > 0 or "RES" not in row.group
        for each, share in ((found, row.share), (base, row.by_chance)):
            part = each.table[each.table["layer"] == row.layer]
            if row.dataset != POOLED:
                part = part[part["dataset"] == row.dataset]
            expected = (part["group"] == row.group).mean() if able else np.nan
            assert share == pytest.approx(expected, nan_ok=True)
        assert row.depth == row.layer / 2
    # In the planted suite nothing is from both modules: that it may be and is not, is a zero.
    both = table[(table["group"] == "From MLP & ATT") & (table["layer"] > 0)]
    assert both["share"].tolist() == [0.0] * len(both)


def test_totals_are_over_the_layers_that_have_most_places(found: Occurrences, base: Occurrences):
    assert set(fullest_suite(found).table["layer"]) == {1, 2}
    totals = group_totals(found, base, times=5).set_index("group")
    later = found.table[found.table["layer"] > 0]
    for group in GROUPS:
        assert totals.loc[group, "n"] == (later["group"] == group).sum()
        assert totals.loc[group, "share"] == pytest.approx((later["group"] == group).mean())
    assert totals["share"].sum() == pytest.approx(1)
    assert totals["by_chance"].sum() == pytest.approx(1)
    assert set(totals["places"]) == {"res+mlp+att"}


def without_attention(tables: dict[str, pd.DataFrame]) -> tuple[Occurrences, Occurrences]:
    """Occurrences of a suite that has no attention SAEs."""
    rng = np.random.default_rng(1)
    both = []
    for _ in range(2):
        codes = {
            site: (rng.random((40, len(rows))) * (rng.random((40, len(rows))) < 0.4)).tolist()
            for site, rows in toys.planted_directions().items()
            if site.module != "att"
        }
        activity = toys.planted_activations(codes)
        both.append(find_occurrences(tables["no attention"], activity, incomplete=True))
    return both[0], both[1]


def test_a_suite_without_attention_has_the_groups_that_it_can_have(
    tables: dict[str, pd.DataFrame],
):
    found, base = without_attention(tables)
    totals = group_totals(found, base, times=5).set_index("group")
    able = [group for group in GROUPS if "att" not in modules_of(group)]
    assert totals["share"].dropna().index.tolist() == able
    assert totals["by_chance"].dropna().index.tolist() == able
    assert totals["share"].sum() == pytest.approx(1)
    assert set(totals["places"]) == {"res+mlp"}
    activity = activity_profile(found, base)
    assert activity[["active_att", "chance_att", "tells_att"]].isna().all(axis=None)
    assert activity[["active_mlp", "chance_mlp"]].notna().all(axis=None)
    whole = suite_profile(suite_of("no attention"), tables["no attention"], found, base, 5)
    assert whole.across["From ATT"].isna().all()
    assert whole.across["chance From ATT"].isna().all()
    assert whole.across["From RES & MLP"].notna().all()
    assert whole.across["occurrences"].tolist() == [len(found.table.query("layer > 0"))]


def test_activity_and_what_scores_tell_are_counted_pair_by_pair(
    found: Occurrences, base: Occurrences
):
    table = activity_profile(found, base).set_index("layer")
    assert table.index.tolist() == [0, 1, 2]
    assert np.isnan(table.loc[0, ["active_res", "chance_res", "tells_res"]].astype(float)).all()
    for layer in (1, 2):
        part = found.table[found.table["layer"] == layer]
        for module in MODULES:
            row = table.loc[layer]
            other = base.table[base.table["layer"] == layer][module]
            assert row[f"active_{module}"] == pytest.approx(part[module].mean())
            assert row[f"chance_{module}"] == pytest.approx(other.mean())
            on, off = (part.loc[part[module] == is_on, f"s_{module}"] for is_on in (True, False))
            wins = np.greater.outer(on.to_numpy(), off.to_numpy())
            ties = np.equal.outer(on.to_numpy(), off.to_numpy())
            assert row[f"tells_{module}"] == pytest.approx((wins + ties / 2).mean())


# Side by side.


@pytest.fixture(scope="module")
def side_by_side(tables: dict[str, pd.DataFrame], found: Occurrences, base: Occurrences) -> Profile:
    """Three suites, of which one read no text and one has no attention."""
    less = without_attention(tables)
    return combined(
        [
            suite_profile(suite_of("bare"), tables["bare"], found, base, times=5),
            suite_profile(suite_of("no attention"), tables["no attention"], *less, times=5),
            suite_profile(suite_of("stream"), tables["stream"]),
        ]
    )


def test_suites_stand_side_by_side_in_the_order_given(side_by_side: Profile):
    across, by_layer = side_by_side.across, side_by_side.by_layer
    names = ["bare", "no attention", "stream"]
    assert across["suite"].tolist() == names
    assert list(dict.fromkeys(by_layer["suite"])) == names
    assert by_layer.groupby("suite").size().to_dict() == dict.fromkeys(names, 3)
    assert across.set_index("suite").loc["stream", list(GROUPS)].isna().all()
    pooled = side_by_side.groups[side_by_side.groups["dataset"] == POOLED]
    first = pooled.iloc[: 3 * len(GROUPS)]
    for group in GROUPS:
        column = by_layer.loc[by_layer["suite"] == "bare", group].tolist()
        assert column == pytest.approx(
            first.loc[first["group"] == group, "share"].tolist(), nan_ok=True
        )


def test_two_suites_of_one_name_are_refused(tables: dict[str, pd.DataFrame], found: Occurrences):
    one = suite_profile(suite_of("stream", "mine"), tables["stream"])
    with pytest.raises(ValueError, match="profiles of mine, mine: expected each suite once"):
        combined([one, one])
    with pytest.raises(ValueError, match="profiles of nothing"):
        combined([])
    with pytest.raises(ValueError, match="expected those found and those by chance, or neither"):
        suite_profile(suite_of("bare"), tables["bare"], found)
    with pytest.raises(ValueError, match="occurrences of bare: expected those of stream"):
        suite_profile(suite_of("stream"), tables["stream"], found, found)
    assert combined([one]).groups.empty


@pytest.mark.filterwarnings("error")
def test_profiles_are_compared_at_the_depths_that_both_reach():
    up = pd.DataFrame({"suite": "up", "depth": np.linspace(0, 1, 5)})
    up["x"] = up["depth"]
    down = pd.DataFrame({"suite": "down", "depth": np.linspace(0.5, 1, 8)})
    down["x"] = 1 - down["depth"]
    flat = pd.DataFrame({"suite": "flat", "depth": [0.0, 1.0], "x": [0.5, 0.5], "y": [1.0, np.nan]})
    table = pd.concat([up, down, flat], ignore_index=True)
    found = alike(table, ["x", "y"]).set_index(["first", "second"])
    assert found["column"].tolist() == ["x"] * 3  # of y there is one layer of one suite
    assert found.loc[("up", "down"), "correlation"] == pytest.approx(-1)
    assert found.loc[("up", "down"), "apart"] == pytest.approx(0.5, abs=1e-9)
    assert np.isnan(found.loc[("up", "flat"), "correlation"])
    assert found.loc[("up", "flat"), "apart"] == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match="unknown column 'z'"):
        alike(table, ["z"])


# The figures.


def test_every_suite_has_its_line_and_its_looks(side_by_side: Profile):
    figure = by_depth(
        side_by_side.by_layer,
        {"median_res": "R", "median_att": "A"},
        "title",
        "subtitle",
        chance={"median_res": "null_res"},
        bands={"median_res": ("low_res", "high_res")},
        shares=False,
    )
    assert figure.layout.title.subtitle.text == "subtitle"
    lines = [t for t in figure.data if t.mode == "lines+markers"]
    assert [(t.name, t.xaxis) for t in lines] == [
        *((name, "x") for name in ("bare", "no attention", "stream")),
        ("bare", "x2"),
    ]
    mine = side_by_side.by_layer.query("suite == 'no attention'").dropna(subset=["median_res"])
    assert list(lines[1].x) == mine["depth"].tolist() == [0.5, 1]
    assert list(lines[1].y) == mine["median_res"].tolist()
    dots = [t for t in figure.data if t.name == "no attention, by chance"]
    assert list(dots[0].y) == mine["null_res"].tolist()
    assert len([t for t in figure.data if t.fill]) == 3
    looks = suite_looks([str(n) for n in range(40)])
    assert len(set(looks.values())) == 40


def test_groups_have_a_panel_for_every_suite_and_dataset(side_by_side: Profile):
    groups, phases = side_by_side.groups, pd.DataFrame({"suite": ["bare"] * 2, "phase": [1, 2]})
    phases["ends"] = [0.75, 1.25]
    table = groups[groups["suite"] == "bare"]
    figure = groups_by_depth(table[table["dataset"] != POOLED], "subtitle", phases=phases)
    assert [a.text for a in figure.layout.annotations] == ["one, bare", "two, bare"]
    assert [shape.x0 for shape in figure.layout.shapes] == [0.75, 0.75]
    part = table[(table["dataset"] == "two") & (table["group"] == "From RES")]
    line = [t for t in figure.data if t.name == "From RES" and t.xaxis == "x2"]
    assert list(line[0].x) == [0.5, 1]
    assert list(line[0].y) == part.loc[part["layer"] > 0, "share"].tolist()
    hollow = [t for t in figure.data if t.name == "From MLP" and t.marker.symbol.endswith("-open")]
    assert [list(t.x) for t in hollow] == [[0.0], [0.0]]
    wide = groups_by_depth(groups[groups["dataset"] == POOLED], "s", "method", "suite")
    assert [a.text for a in wide.layout.annotations] == ["bare, cosine", "no attention, cosine"]
    assert not [t for t in wide.data if t.xaxis == "x2" and "ATT" in (t.name or "")]


def test_totals_keep_the_colours_of_their_suites(side_by_side: Profile):
    figure = groups_against_chance(side_by_side.totals, "subtitle")
    bars = {trace.name: trace for trace in figure.data if trace.type == "bar"}
    looks = suite_looks(["bare", "no attention"])
    assert {name: bar.marker.color for name, bar in bars.items()} == {
        name: colour for name, (colour, _) in looks.items()
    }
    assert "From ATT" not in bars["no attention"].x
    part = side_by_side.totals.query("suite == 'no attention'").dropna(subset=["share"])
    assert list(bars["no attention"].y) == part["share"].tolist()


def test_phases_are_bars_from_their_beginning_to_their_end(side_by_side: Profile):
    table = all_phases(side_by_side, parts=1, shuffles=3)
    assert set(table["suite"]) == {"bare", "no attention", "stream"}
    figure = phases_by_depth(table, "subtitle")
    (bar,) = figure.data
    assert list(bar.base) == table["begins"].tolist()
    assert list(bar.x) == (table["ends"] - table["begins"]).tolist()
    assert set(bar.text) == {"1 to 2"}
    assert "stream: groups" not in bar.y
    assert "stream: classes" in bar.y
