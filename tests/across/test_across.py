"""Several suites side by side: profiles of planted suites, counted by hand, and their figures."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import toys
from counted import planted_occurrences

from flowhelpers.across.phases import all_phases
from flowhelpers.across.plots import (
    by_depth,
    groups_against_chance,
    groups_by_dataset,
    groups_by_depth,
    phases_by_depth,
)
from flowhelpers.across.profile import (
    POOLED,
    Profile,
    alike,
    chosen_suites,
    combined,
    depth,
    group_profile,
    one_by_one,
    score_points,
    suite_profile,
)
from flowhelpers.core.features import MODULES
from flowhelpers.groups.occurrences import GROUPS, find_occurrences, modules_of
from flowhelpers.matching.scores import CLASSES
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite

PARTS = {"bare": set(MODULES), "no attention": {"res", "mlp"}, "stream": {"res"}}


def suite_of(name: str) -> Suite:
    """The planted suite with SAEs at some modules alone."""
    modules = PARTS[name]
    directions = toys.planted_directions()
    suite = toys.bare_suite({s: rows for s, rows in directions.items() if s.module in modules})
    return replace(suite, row=replace(suite.row, name=name))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Match tables of the planted suite with some of its modules."""
    cache = tmp_path_factory.mktemp("cache")
    return {name: match_table(suite_of(name), k=1, cache=cache) for name in PARTS}


# Which suites.


def test_suites_are_refused_that_are_none_unknown_or_there_twice(tmp_path: Path):
    for given, message in (
        ([], r"suites \[\]: expected a list of one or more.*flowlet"),
        ("flowlet", "'flowlet': expected a list .*did you mean 'flowlet'"),
        (["flowlet", "flowlett"], "unknown suite 'flowlett'; did you mean 'flowlet'"),
        (["flowlet", "flowlet"], "suites flowlet, flowlet: expected flowlet once, as suite or"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen_suites(given)
    text = 'name: flowlet\nmodel: none\nlayers: 2\nsaes: {res: "{layer}"}\n'
    (tmp_path / "suite.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="expected flowlet once"):
        chosen_suites(["flowlet", str(tmp_path)])
    names = ["flowlet@res", "flowlet"]
    assert [row.name for row in chosen_suites(names).values()] == names


def test_no_two_suites_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch):
    loaded: list[weakref.ref[Any]] = []

    def load(name: str, device: str, _: str) -> Any:
        assert all(each() is None for each in loaded)
        suite = Mock(row=name, device=device)
        suite.itself = suite  # what holds itself is let go by the collector alone
        loaded.append(weakref.ref(suite))
        return suite

    monkeypatch.setattr("flowhelpers.suites.load.load_suite", load)
    names = ["flowlet", "flowlet@res", "flowlet@res+mlp"]
    gc.disable()
    try:
        found = one_by_one(names, lambda suite: (suite.row, suite.device), "cpu")
    finally:
        gc.enable()
    assert found == {name: (name, "cpu") for name in names}
    assert len(loaded) == 3


# The flow.


def test_a_profile_is_what_is_planted_each_pair_of_sites_against_its_own_null(
    tables: dict[str, pd.DataFrame],
):
    table = tables["bare"].copy()
    for layer, module, null in ((2, "res", 0.85), (1, "mlp", 0.59), (1, "att", 0.61)):
        table.loc[(table["layer"] == layer) & (table["module"] == module), "null"] = null
    whole = suite_profile(suite_of("bare"), table)
    profile, whole = whole.by_layer.set_index("layer"), whole.across.iloc[0]
    assert profile["depth"].tolist() == [0, 0.5, 1]
    assert depth(np.array([0]), 1).tolist() == [0]
    assert profile["places"].tolist() == ["mlp+att", "res+mlp+att", "res+mlp+att"]
    assert profile["features"].tolist() == [16] * 3
    assert profile.loc[1:, "median_res"].tolist() == pytest.approx([0.8, 0.8])
    # Half of the features of a layer have their module predecessor at the MLP, the others none.
    for layer, cosine in ((1, 0.6), (2, 0.96)):
        for module in ("mlp", "att"):
            row = profile.loc[layer]
            assert row[f"s_{module}"] == pytest.approx(cosine / 2)
            assert (row[f"low_{module}"], row[f"high_{module}"]) == pytest.approx((0, cosine))
    assert profile.loc[2, "above_res"] == 0
    assert profile.loc[1, ["above_res", "above_mlp", "above_att"]].tolist() == [1, 0.5, 0]
    assert profile.loc[1, ["translated", "processed"]].tolist() == [0.5, 0.5]
    assert profile.loc[2, ["translated", "processed"]].tolist() == [0, 0]
    assert profile.loc[0, ["s_res", "above_res", *CLASSES, "born_mlp", "mutual"]].isna().all()
    assert profile["life"].tolist() == pytest.approx((profile["lives"] / 3).tolist())
    assert (whole["layers"], whole["d_model"], whole["saes"]) == (3, 32, 9)
    assert (whole["features"], whole["places"]) == (3 * 16 + 6 * 8, "res+mlp+att")
    assert (whole["above_res"], whole["translated"]) == (0.5, 0.25)
    assert whole["mean_res"] == pytest.approx(0.8)
    assert whole["mean_mlp"] == pytest.approx((0.6 + 0.96) / 4)  # layer 0, with its 1, is out
    assert sum(whole[name] for name in CLASSES) == pytest.approx(1)


def test_what_a_suite_lacks_is_missing_and_the_rest_is_the_same(tables: dict[str, pd.DataFrame]):
    profiles = [suite_profile(suite_of(name), table) for name, table in tables.items()]
    whole, without, stream = (profile.by_layer for profile in profiles)
    of_attention = [c for c in whole if c.endswith("_att")]
    assert len(of_attention) == 7
    assert without[of_attention].isna().all(axis=None)
    assert without["places"].tolist() == ["mlp", "res+mlp", "res+mlp"]
    same = ["median_res", "above_mlp", "null_mlp", "dies", "mutual", "lives"]
    pd.testing.assert_frame_equal(without[same], whole[same])
    assert without.loc[1:, [*CLASSES]].notna().all(axis=None)
    assert stream["features"].tolist() == [16] * 3
    assert stream["places"].tolist() == ["", "res", "res"]
    assert stream[["processed", "newborn", "born_mlp", "born_att"]].isna().all(axis=None)
    assert stream.loc[1:, ["translated", "unexplained"]].sum(axis=1).tolist() == [1, 1]
    assert stream.loc[0, ["translated", "unexplained"]].isna().all()
    more, _, less = (profile.across.iloc[0] for profile in profiles)
    assert (less["saes"], less["features"], less["places"]) == (3, 48, "res")
    assert less[["mean_mlp", "above_att", "processed", "newborn"]].isna().all()
    # Every step is of one to one: who lives at all lives through, or the null cuts every life.
    assert less["translated"] == more["above_res"] in (0, 1)
    lives = (1, 3, 3) if more["above_res"] else (0, 1, 1)
    assert (more["through"], more["mean_life"], more["mutual_life"]) == lives


# The groups.

FOUND, BASE = (planted_occurrences(tokens)[0] for tokens in (120, 80))  # BASE stands for chance


def test_groups_are_counted_by_hand_beside_chance(tables: dict[str, pd.DataFrame]):
    table = group_profile(FOUND, BASE, 3, times=5)
    assert set(table["dataset"]) == {"one", "two", POOLED}
    assert not table.duplicated(["dataset", "layer", "group"]).any()
    for row in table.itertuples():
        possible = row.layer > 0 or "RES" not in row.group
        for occurrences, share in ((FOUND, row.share), (BASE, row.by_chance)):
            part = occurrences.table[occurrences.table["layer"] == row.layer]
            if row.dataset != POOLED:
                part = part[part["dataset"] == row.dataset]
            expected = (part["group"] == row.group).mean() if possible else np.nan
            assert share == pytest.approx(expected, nan_ok=True)
        assert row.depth == row.layer / 2
    # In the planted suite nothing is from both modules: that it may be and is not, is a zero.
    both = table[(table["group"] == "From MLP & ATT") & (table["layer"] > 0)]
    assert both["share"].tolist() == [0.0] * len(both)
    whole = suite_profile(suite_of("bare"), tables["bare"], FOUND, BASE, 5).totals
    for dataset, part in FOUND.table.query("layer > 0").groupby("dataset", observed=True):
        row = whole[whole["dataset"] == dataset].astype({"group": str}).set_index("group")["share"]
        assert row.sum() == pytest.approx(1)
        assert row["From RES"] == pytest.approx((part["group"] == "From RES").mean())
    totals = whole[whole["dataset"] == POOLED].set_index("group")
    shares = FOUND.table.query("layer > 0")["group"].value_counts(normalize=True)
    assert totals["share"].to_dict() == pytest.approx(shares.to_dict())
    assert totals["by_chance"].sum() == pytest.approx(1)
    assert set(totals["places"]) == {"res+mlp+att"}
    with pytest.raises(ValueError, match="occurrences of bare: expected those of stream"):
        suite_profile(suite_of("stream"), tables["stream"], FOUND, BASE)


def test_activity_and_what_scores_tell_are_those_of_each_layer(tables: dict[str, pd.DataFrame]):
    profile = suite_profile(suite_of("bare"), tables["bare"], FOUND, BASE, 5)
    table = profile.by_layer.set_index("layer")
    assert table.index.tolist() == [0, 1, 2]
    assert table.loc[0, ["active_res", "chance_res", "tells_res"]].isna().all()
    for layer in (1, 2):
        part, other = (some.table[some.table["layer"] == layer] for some in (FOUND, BASE))
        for module in MODULES:
            row = table.loc[layer]
            assert row[f"active_{module}"] == pytest.approx(part[module].mean())
            assert row[f"chance_{module}"] == pytest.approx(other[module].mean())
            on, off = (part.loc[part[module] == is_on, f"s_{module}"] for is_on in (True, False))
            signs = np.sign(np.subtract.outer(on.to_numpy(), off.to_numpy()))
            assert row[f"tells_{module}"] == pytest.approx((1 + signs.mean()) / 2)


def test_points_are_at_an_eighth_a_half_and_seven_eighths_where_all_sites_are():
    table = pd.concat([FOUND.table.query("layer == 1").assign(layer=at) for at in range(1, 32)])
    points = score_points(replace(FOUND, table=table), 32)
    assert points["layer"].unique().tolist() == [4, 16, 28]  # as in Figure 19 d
    assert set(points["suite"]) == {"bare"}
    keys = ["feature", "group"]
    single = FOUND.table.query("layer == 1 and group in @GROUPS[:4]")[keys].drop_duplicates()
    found = points.loc[points["layer"] == 16, keys]
    assert sorted(found.values.tolist()) == sorted(single.values.tolist())
    assert score_points(replace(FOUND, table=FOUND.table.assign(s_att=np.nan)), 3).empty


# Side by side.


@pytest.fixture(scope="module")
def side_by_side(tables: dict[str, pd.DataFrame]) -> Profile:
    """Three suites, of which one has no attention and one read no text."""
    sites = [site for site in toys.planted_directions() if site.module != "att"]
    rng, less = np.random.default_rng(1), []
    for _ in range(2):
        codes = {s: rng.random((40, 16 if s.module == "res" else 8)) for s in sites}
        codes = {s: (c * (rng.random(c.shape) < 0.4)).tolist() for s, c in codes.items()}
        activity = toys.planted_activations(codes)
        less.append(find_occurrences(tables["no attention"], activity, incomplete=True))
    occurrences = {"bare": (FOUND, BASE), "no attention": less, "stream": ()}
    return combined(
        [suite_profile(suite_of(n), tables[n], *read, times=5) for n, read in occurrences.items()]
    )


def test_suites_stand_side_by_side_each_with_the_groups_that_it_can_have(side_by_side: Profile):
    across, by_layer = side_by_side.across, side_by_side.by_layer
    names = ["bare", "no attention", "stream"]
    assert across["suite"].tolist() == names
    assert by_layer["suite"].tolist() == np.repeat(names, 3).tolist()
    possible = [group for group in GROUPS if "att" not in modules_of(group)]
    for prefix in ("", "chance "):
        rows = across.set_index("suite")[[prefix + group for group in GROUPS]]
        assert rows.loc["stream"].isna().all()
        assert rows.loc["no attention"].dropna().index.tolist() == [prefix + g for g in possible]
        assert rows.loc["no attention"].sum() == pytest.approx(1)
    totals = side_by_side.totals.query("dataset == @POOLED").groupby("suite", sort=False)
    assert totals["places"].first().to_dict() == {"bare": "res+mlp+att", "no attention": "res+mlp"}
    assert across["occurrences"].tolist()[:2] == totals["n"].sum().tolist()
    of_attention = by_layer.loc[by_layer["suite"] == "no attention", ["active_att", "tells_att"]]
    assert of_attention.isna().all(axis=None)
    pooled = side_by_side.groups.query("suite == 'bare' and dataset == @POOLED")
    for group, part in pooled.groupby("group", observed=True):
        column = by_layer.loc[by_layer["suite"] == "bare", group].tolist()
        assert column == pytest.approx(part["share"].tolist(), nan_ok=True)


@pytest.mark.filterwarnings("error")
def test_profiles_are_compared_at_the_depths_that_both_reach():
    up = pd.DataFrame({"suite": "up", "depth": np.linspace(0, 1, 5)})
    up["x"] = up["depth"]
    down = pd.DataFrame({"suite": "down", "depth": np.linspace(0.5, 1, 8)})
    down["x"] = 1 - down["depth"]
    flat = pd.DataFrame({"suite": "flat", "depth": [0.0, 1.0], "x": [0.5, 0.5], "y": [1.0, np.nan]})
    table = pd.concat([up, down, flat], ignore_index=True)
    pairs = alike(table, ["x", "y"]).set_index(["first", "second"])
    assert pairs["column"].tolist() == ["x"] * 3  # of y there is one layer of one suite
    assert pairs.loc[("up", "down"), ["apart", "correlation"]].tolist() == pytest.approx([0.5, -1])
    assert np.isnan(pairs.loc[("up", "flat"), "correlation"])
    assert pairs.loc[("up", "flat"), "apart"] == pytest.approx(0.25, abs=0.01)


# The figures.


def test_every_suite_has_its_line_and_its_looks(side_by_side: Profile):
    panels, bands = {"median_res": "R", "median_att": "A"}, {"median_res": ("low_res", "high_res")}
    chance = {"median_res": "null_res"}
    figure = by_depth(side_by_side.by_layer, panels, "title", "subtitle", chance, bands)
    assert figure.layout.xaxis.range is None  # else plotly.js does not fit the shared y axis
    lines = {(t.name, t.xaxis): t for t in figure.data}
    assert set(lines) == {
        *((name, "x") for name in ("bare", "no attention", "stream")),
        *((f"{name}, by chance", "x") for name in ("bare", "no attention", "stream")),
        ("bare", "x2"),
    }
    mine = side_by_side.by_layer.query("suite == 'no attention'").dropna(subset=["median_res"])
    line, chance = lines["no attention", "x"], lines["no attention, by chance", "x"]
    assert list(line.x) == list(chance.x) == mine["depth"].tolist() == [0.5, 1]
    assert list(line.y) == mine["median_res"].tolist()
    assert line.error_y.array == pytest.approx(mine["high_res"] - mine["median_res"])
    assert line.error_y.arrayminus == pytest.approx(mine["median_res"] - mine["low_res"])
    assert list(chance.y) == mine["null_res"].tolist()
    assert (line.line.dash, chance.line.dash) == ("solid", "dot")


def test_groups_have_a_panel_for_every_suite_and_dataset(side_by_side: Profile):
    groups = side_by_side.groups
    table = groups[groups["dataset"] != POOLED]
    figure = groups_by_depth(table[table["suite"] == "bare"], "subtitle")
    assert figure.layout.xaxis.range is None
    part = table.query("suite == 'bare' and dataset == 'two' and group == 'From RES'")
    (line,) = [t for t in figure.data if t.name == "From RES" and t.xaxis == "x2"]
    assert list(line.x) == [0.5, 1]
    assert list(line.y) == part.loc[part["layer"] > 0, "share"].tolist()
    phases = pd.DataFrame({"suite": ["bare", "no attention"] * 2, "ends": [0.75, 0.5, 1, 1]})
    phases["as_good"] = [0.04, 0.05] * 2
    wide = groups_by_depth(groups[groups["dataset"] == POOLED], "s", "method", "suite", phases)
    assert [(shape.x0, shape.xref) for shape in wide.layout.shapes] == [(0.75, "x"), (0.5, "x2")]
    assert [shape.line.dash for shape in wide.layout.shapes] == ["solid", "dot"]
    assert not [t for t in wide.data if t.xaxis == "x2" and "ATT" in t.name]


def test_totals_and_phases_are_bars(side_by_side: Profile):
    totals = side_by_side.totals.query("dataset == @POOLED")
    figure = groups_against_chance(totals, "subtitle")
    bars = {trace.name: trace for trace in figure.data if trace.type == "bar"}
    assert "From ATT" not in bars["no attention"].x
    part = totals.query("suite == 'no attention'").dropna(subset=["share"])
    assert list(bars["no attention"].y) == part["share"].tolist()
    (marks,) = [t for t in figure.data if t.offsetgroup == "no attention" and t.type == "scatter"]
    assert list(marks.y) == part["by_chance"].tolist()
    single = side_by_side.totals.query("dataset != @POOLED")
    figure = groups_by_dataset(single, "subtitle")
    panels = {a.text: a.y for a in figure.layout.annotations}
    axis = "y" if panels["bare"] < panels["no attention"] else "y2"
    (bar,) = [t for t in figure.data if (t.name, t.yaxis) == ("two", axis)]
    part = single.query("suite == 'bare' and dataset == 'two'").dropna(subset=["share"])
    assert (list(bar.x), list(bar.y)) == (part["group"].tolist(), part["share"].tolist())
    table = all_phases(side_by_side, parts=1, shuffles=3)
    assert set(table["suite"]) == {"bare", "no attention", "stream"}
    assert table["ends"].max() <= 1
    drawn = {bar.name: bar for bar in phases_by_depth(table, "subtitle").data}
    assert {name: bar.marker.pattern.shape for name, bar in drawn.items()} == {
        "phase 1": "",
        "phase 1, within chance": "/",  # as any division into one part is
    }
    for name, bar in drawn.items():
        part = table[table["as_good"].ge(0.05) == ("chance" in name)]
        assert list(bar.base) == part["begins"].tolist()
        assert list(bar.x) == (part["ends"] - part["begins"]).tolist()
        assert list(bar.y) == (part["suite"] + ": " + part["of"]).tolist()
        assert "stream: groups" not in bar.y
