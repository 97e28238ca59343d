"""The experiments of 5.2, on a model of which every answer is known."""

from types import SimpleNamespace
from typing import Any

import adder
import numpy as np
import pandas as pd
import pytest
import torch
import toys
from adder import ALL, ATT, COPY, MLP, OTHER, SUM
from sae_lens import GatedSAE, GatedSAEConfig

from flowhelpers.activations.sparse import collect
from flowhelpers.core.bootstrap import resamples
from flowhelpers.core.features import MODULES, Site, predecessor_site
from flowhelpers.deactivation import (
    ablation_cases,
    active_predecessors,
    common_targets,
    concat_methods,
    deactivate,
    downstream_effects,
    draw_targets,
    equal_norm,
    example_target,
    groups_of,
    middle_layers,
    sources_of,
    success_rates,
    table_1,
)
from flowhelpers.deactivation.ablation import OFF, READS
from flowhelpers.interventions.batched import intervene
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Model, tokenize
from flowhelpers.suites.saes import make_sae

RES, MLP_ONLY, ATT_ONLY = "From RES", "From MLP", "From ATT"
BOTH, WITH_ATT, THREE = "From RES & MLP", "From MLP & ATT", "From RES & MLP & ATT"

# By construction: feature, group, what is removed → activation before and after, share of the
# activation that is written away, and the group afterwards.
BUILT = {
    (COPY, RES, RES): (1, 0, 1, OFF),
    (SUM, MLP_ONLY, MLP_ONLY): (1.5, 0, 1, OFF),
    (SUM, BOTH, RES): (2.5, 1.5, 0.4, MLP_ONLY),
    (SUM, BOTH, MLP_ONLY): (2.5, 0, 0.6, OFF),  # what is left lies below the threshold
    (SUM, BOTH, BOTH): (2.5, 0, 1, OFF),
    (MLP, MLP_ONLY, MLP_ONLY): (2, 0, 1, OFF),
    (OTHER, RES, RES): (3, 3, 0, "From nowhere"),
    (ATT, ATT_ONLY, ATT_ONLY): (2.5, 0, 1, OFF),
    (ALL, WITH_ATT, MLP_ONLY): (2, 0, 0.5, OFF),
    (ALL, WITH_ATT, ATT_ONLY): (2, 0, 0.5, OFF),
    (ALL, WITH_ATT, WITH_ATT): (2, 0, 1, OFF),
    (ALL, THREE, RES): (3, 2, 1 / 3, WITH_ATT),
    (ALL, THREE, MLP_ONLY): (3, 2, 1 / 3, "From RES & ATT"),
    (ALL, THREE, ATT_ONLY): (3, 2, 1 / 3, BOTH),
    (ALL, THREE, BOTH): (3, 0, 2 / 3, OFF),
    (ALL, THREE, "From RES & ATT"): (3, 0, 2 / 3, OFF),
    (ALL, THREE, WITH_ATT): (3, 0, 2 / 3, OFF),
    (ALL, THREE, THREE): (3, 0, 1, OFF),
}


@pytest.fixture(scope="module")
def world(world: SimpleNamespace) -> SimpleNamespace:
    found = SimpleNamespace(**vars(world))
    found.targets = draw_targets(found.activations, [1])
    found.sources = sources_of(found.targets, found.matches, found.activations)
    found.predecessors = active_predecessors(found.sources)
    found.groups = groups_of(found.targets, found.predecessors)
    found.cases = ablation_cases(found.targets, found.predecessors)
    return found


def run(
    world: SimpleNamespace, cases: pd.DataFrame, edits: pd.DataFrame, *sources: Any, **given: Any
) -> pd.DataFrame:
    return deactivate(world.suite, world.tokens, world.targets, cases, edits, *sources, **given)


def run_cases(world: SimpleNamespace, **given: Any) -> pd.DataFrame:
    return run(world, *ablation_cases(world.targets, world.predecessors, **given), world.sources)


def search(
    world: SimpleNamespace, all_sites: bool = False, **by_method: pd.DataFrame
) -> pd.DataFrame:
    given = (world.suite, world.tokens, world.targets, by_method, world.activations)
    return table_1(*given, all_sites).set_index(["method", "target"])


def twice(world: SimpleNamespace) -> pd.DataFrame:
    return pd.concat([world.sources, world.sources.assign(rank=2, feature=0)])


def test_targets_are_active_features_drawn_by_the_seed(world: SimpleNamespace):
    targets, tokens = world.targets, world.activations.tokens
    codes = world.activations.by_site[Site(1, "res")]
    assert len(targets) == codes.nnz
    assert (targets["activation"] == codes[targets["token_row"], targets["feature"]].A1).all()
    for column in ("text", "position", "token"):
        assert (targets[column].to_numpy() == tokens[column].to_numpy()[targets["token_row"]]).all()
    assert (targets["position"] > 0).all()  # not at BOS (trap 7)
    few, again, other = (draw_targets(world.activations, [1, 2], 2, seed) for seed in (3, 3, 4))
    assert few.groupby(["layer", "token_row"]).size().max() == 2
    assert few.equals(again)
    assert not few.equals(other)
    assert set(few[few["layer"] == 1]["feature"]) == {COPY, SUM, MLP, OTHER, ATT, ALL}


def test_sources_are_the_matches_with_what_they_do_at_that_token(world: SimpleNamespace):
    for row in world.sources.itertuples():
        target = world.targets.loc[row.target]
        assert adder.MATCHES[row.module][int(target["feature"])] == row.feature
        codes = world.activations.by_site[predecessor_site(1, row.module)]
        assert row.activation == codes[target["token_row"], row.feature]
    features = [feature for of in adder.MATCHES.values() for feature in of]
    assert len(world.sources) == sum((world.targets["feature"] == f).sum() for f in features)
    assert not world.sources.duplicated(["target", "module"]).any()
    assert (world.predecessors["activation"] > 0).all()
    assert {*groups_of(world.targets, world.predecessors[:0])} == {"From nowhere"}


REFUSED = {
    "layers=.1, 1.: expected": lambda w: draw_targets(w.activations, [1, 1]),
    "per_token=0: expected 1 or more": lambda w: draw_targets(w.activations, [1], 0),
    "layers=.5.: expected some of .0, 1, 2., each once": lambda w: draw_targets(w.activations, [5]),
    "top_n=2: expected 1 to 1": lambda w: sources_of(w.targets, w.matches, w.activations, 2),
    "no matches at layer 2": lambda w: sources_of(
        draw_targets(w.activations, [2]), w.matches, w.activations
    ),
    r"r=\[nan\]": lambda w: ablation_cases(w.targets, w.predecessors, [np.nan]),
    r"r=\[0, 0\]": lambda w: ablation_cases(w.targets, w.predecessors, [0, 0]),
    "no target has an active predecessor": lambda w: ablation_cases(w.targets, w.predecessors[:0]),
    "the control has several matches at a site": lambda w: equal_norm(
        w.suite, w.targets, twice(w), w.activations
    ),
    "a method has several matches at a site": lambda w: search(w, cosine=twice(w)),
    "no target has a single source": lambda w: search(w, cosine=w.sources.assign(activation=0.0)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_give_no_number_is_refused(world: SimpleNamespace, message: str):
    with pytest.raises(ValueError, match=message):
        REFUSED[message](world)


def test_several_matches_at_a_site_count_and_go_together(world: SimpleNamespace):
    # A second match of SUM at R_0: the one that is active everywhere and is no part of SUM.
    more = world.matches.iloc[:1].assign(feature=SUM, source=1, rank=2)
    table = pd.concat([world.matches, more], ignore_index=True)
    assert sources_of(world.targets, table, world.activations, 1).equals(world.sources)
    predecessors = active_predecessors(sources_of(world.targets, table, world.activations, 2))
    cases, edits = ablation_cases(world.targets, predecessors)
    of_sum = world.targets[world.targets["feature"] == SUM]
    assert (cases.loc[cases["target"].isin(of_sum.index), "group"] == BOTH).all()
    sites = edits.groupby("case")["module"].value_counts().unstack(fill_value=0)
    two = cases.index[cases["target"].isin(of_sum.index)]
    assert sites.loc[two, "res"].tolist() == (1 + (of_sum["token"] % 3 == 0)).tolist()
    linear, plain = run(world, cases, edits)["linear"], run_cases(world)["linear"]
    assert linear.to_numpy() == pytest.approx(plain.to_numpy())


def test_every_subset_does_what_is_built(world: SimpleNamespace):
    cases, edits = ablation_cases(world.targets, world.predecessors, subsets=True)
    order = np.random.default_rng(0).permutation(len(cases))  # cases may come in any
    mixed, moved = cases.iloc[order], edits.assign(case=np.argsort(order)[edits["case"]])
    table = run(world, mixed, moved, world.sources)
    assert table["target"].tolist() == mixed["target"].tolist()
    seen = table.groupby(["feature", "group", "removed"])
    assert set(seen.groups) == set(BUILT)
    for key, part in seen:
        old, new, linear, after = BUILT[key]
        assert part["old"].to_numpy() == pytest.approx(old, abs=1e-5)
        assert part["new"].to_numpy() == pytest.approx(new, abs=1e-5)
        assert part["change"].to_numpy() == pytest.approx(1 - new / old, abs=1e-5)
        assert part["linear"].to_numpy() == pytest.approx(linear, abs=1e-5)
        assert set(part["success"]) == {float(new == 0)}
        assert set(part["after"]) == {after}
    own = world.targets.loc[table["target"]].reset_index(drop=True)
    for column in ("layer", "feature", "text", "dataset"):
        assert (table[column] == own[column]).all()


@pytest.mark.parametrize("activation", ["clean", "live"])  # the same, for no site answers another
def test_rescaling_adds_r_less_one_times_the_activation(world: SimpleNamespace, activation: str):
    table = run_cases(world, r=[-1.0, 1.0, 2.0], activation=activation)
    assert (table["group"] == table["removed"]).all()
    assert len(table) == 3 * len(world.targets)  # here every target has a predecessor
    for row in table.itertuples():
        old, _, linear, _ = BUILT[row.feature, row.group, row.group]
        value = old * (1 + (row.r - 1) * linear)
        threshold = adder.THRESHOLDS[Site(1, "res")][row.feature]
        assert row.new == pytest.approx(value if value > threshold else 0, abs=1e-5)
        expected = (1 - row.r) * linear if activation == "clean" else np.nan
        assert row.linear == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert (table.loc[table["r"] == 1, "change"] == 0).all()


def test_the_loss_changes_by_its_share_of_what_it_was(world: SimpleNamespace):
    cases, edits = ablation_cases(world.targets, world.predecessors, r=[-30.0, 1.0])
    table = run(world, cases, edits, loss=True)
    same = table[table["r"] == 1]
    assert (same["loss_change"] == 0).all()
    assert (same["token_loss_change"].dropna() == 0).all()
    of_cases = world.targets.loc[cases["target"]].reset_index(drop=True)
    reads = of_cases.assign(case=of_cases.index, module="res")[READS]
    _, losses = intervene(world.suite, world.tokens, of_cases, edits, reads, loss=True)
    assert losses is not None
    for name in ("loss", "token_loss"):
        grown = table[f"{name}_change"] + 1
        assert (grown - 1).abs().max() > 0.01  # so that what it is divided by shows
        after = (losses[f"{name}_before"] * grown).to_numpy()
        assert after == pytest.approx(losses[f"{name}_after"].to_numpy(), rel=1e-5, nan_ok=True)
    last = of_cases["position"] == 19
    assert table["token_loss_change"][last].isna().all()


def test_rates_are_means_over_active_targets_with_intervals_of_texts(world: SimpleNamespace):
    table = run_cases(world)
    table.loc[table.index[table["group"] == RES][0], ["change", "success"]] = np.nan
    tokens = world.activations.tokens.assign(dataset="all")
    rates = success_rates(table, ["group"], tokens, times=50).set_index("group")
    from_res = table[(table["group"] == RES) & table["change"].notna()]
    assert rates.loc[RES, ["n", "inactive"]].tolist() == [len(from_res), 1]
    assert 0 < from_res["success"].mean() < 1
    for column in ("success", "change"):
        assert rates.loc[RES, column] == pytest.approx(from_res[column].mean())
    # By hand: draw texts anew, and take the share over all their cases.
    of_text = from_res.groupby("text")["success"].agg(["sum", "count"]).reindex(range(3))
    drawn = resamples(tokens, 50)
    shares = drawn @ of_text["sum"].to_numpy() / (drawn @ of_text["count"].to_numpy())
    low, high = np.quantile(shares, [0.025, 0.975])
    assert rates.loc[RES, ["success_low", "success_high"]].tolist() == pytest.approx([low, high])


def test_a_target_that_is_off_has_no_change(world: SimpleNamespace):
    targets = world.targets.copy()
    off = targets.index[(targets["token"] % 4 != 1)][0]
    targets.loc[off, "feature"] = OTHER  # not active at this token
    sources = sources_of(targets, world.matches, world.activations)
    cases, edits = ablation_cases(targets, active_predecessors(sources))
    table = deactivate(world.suite, world.tokens, targets, cases, edits, sources)
    known = table.set_index("target")[["change", "success", "linear", "after"]].notna()
    assert not known.loc[off].any()
    assert known.drop(off).all(axis=None)
    given = (world.suite, world.tokens, targets, {"cosine": sources}, world.activations)
    searched = table_1(*given).set_index("target").loc[off]
    assert (searched["tried"] > 0).all()
    assert searched[["change", "success"]].isna().all(axis=None)


def test_methods_have_their_own_denominators_and_a_common_one(world: SimpleNamespace):
    # Trap 25: a method that knows the MLP's matches alone has fewer targets.
    fewer = world.predecessors[world.predecessors["module"] == "mlp"]
    parts = {"all": world.cases, "mlp": ablation_cases(world.targets, fewer)}
    table = run(world, *concat_methods(parts))
    with_mlp = world.targets["feature"].isin([SUM, MLP, ALL])
    counts = table["method"].value_counts()
    assert (counts["all"], counts["mlp"]) == (len(world.targets), with_mlp.sum())
    own = table[(table["method"] == "mlp") & (table["feature"] == ALL)]
    fifth = world.targets.loc[own["target"], "token"] % 5 == 0
    assert own["success"].to_numpy() == pytest.approx(np.where(fifth, 0, 1))
    common = common_targets(table)
    assert set(common["target"]) == set(world.targets.index[with_mlp])
    assert len(common) == 2 * with_mlp.sum()


def test_the_control_changes_the_stream_by_the_same_norm_and_nothing_else(world: SimpleNamespace):
    drawn = equal_norm(world.suite, world.targets, world.sources, world.activations)
    both = world.predecessors.merge(drawn, on=["target", "module"], suffixes=("", "_drawn"))
    assert len(both) == len(drawn)
    assert (both["feature"] != both["feature_drawn"]).all()
    others = {}
    for row in both.itertuples():
        site = predecessor_site(1, row.module)
        norms = world.suite.sae(site).lens_sae.W_dec.detach().norm(dim=1)
        expected = float(norms[row.feature]) * row.activation
        assert float(norms[row.feature_drawn]) * row.activation_drawn == pytest.approx(expected)
        token = world.targets.loc[row.target, "token_row"]
        assert world.activations.by_site[site][token, row.feature_drawn] > 0
    # A target without another active feature at one of its sites is left out whole.
    for target, part in world.predecessors.groupby("target"):
        row = world.targets.loc[target, "token_row"]
        sites = [world.activations.by_site[predecessor_site(1, m)] for m in part["module"]]
        others[target] = all(codes[row].nnz > 1 for codes in sites)
    assert set(drawn["target"]) == {target for target, has_other in others.items() if has_other}
    given = (world.suite, world.targets, world.sources, world.activations)
    assert drawn.equals(equal_norm(*given))
    assert not drawn.equals(equal_norm(*given, seed=1))
    table = run(world, *ablation_cases(world.targets, drawn))
    assert (table["new"] == table["old"]).all()  # features have nothing to do with each other


def test_the_search_finds_what_a_method_misses(world: SimpleNamespace):
    # `other` is wrong about COPY, and knows no match at attention.
    copies = world.targets.index[world.targets["feature"] == COPY]
    other = world.sources[world.sources["module"] != "att"].copy()
    wrong = (other["module"] == "res") & other["target"].isin(copies)
    other.loc[wrong, ["feature", "activation"]] = [1, 1.0]
    by = search(world, cosine=world.sources, other=other.astype({"feature": int}))
    single = world.groups.index[world.groups.isin([RES, MLP_ONLY, ATT_ONLY])]
    assert set(single) <= set(by.loc["exhaustive"].index)
    assert (by.loc["cosine"].loc[copies, ["tried", "change", "success"]] == 1).all().all()
    assert by.loc["other"].loc[copies, "change"].to_numpy() == pytest.approx(0, abs=1e-5)
    best = by.loc["exhaustive"]
    assert (best.loc[copies, ["change", "success"]] == 1).all().all()
    rows = world.targets.loc[copies, "token_row"]
    active = np.diff(world.activations.by_site[Site(0, "res")].indptr)[rows]
    assert best.loc[copies, "tried"].tolist() == active.tolist()
    at_att = world.targets.index[world.targets["feature"] == ATT]
    assert (by.loc["other"].loc[at_att, ["tried", "change", "success"]] == 0).all().all()
    assert (by.loc["cosine"].loc[at_att, "success"] == 1).all()


def test_a_method_that_finds_several_sites_is_held_to_the_one_named(world: SimpleNamespace):
    # To `blind` SUM at tokens with R_0 is "From RES", to `cosine` it is "From RES & MLP".
    sums = world.targets.index[world.targets["feature"] == SUM]
    at_mlp = (world.sources["module"] == "mlp") & world.sources["target"].isin(sums)
    by = search(world, cosine=world.sources, blind=world.sources[~at_mlp])
    both = [target for target in sums if world.groups[target] == BOTH]
    for method in ("cosine", "blind"):
        assert (by.loc[method].loc[both, "tried"] == 1).all()
        assert by.loc[method].loc[both, "change"].to_numpy() == pytest.approx(0.4)
    # Where cosine names the MLP and `blind` nothing, `blind` is held to the MLP and has no match.
    alone = [target for target in sums if world.groups[target] == MLP_ONLY]
    assert (by.loc["blind"].loc[alone, ["tried", "change"]] == 0).all().all()


def test_the_search_over_all_sites_tries_more(world: SimpleNamespace):
    own = search(world, cosine=world.sources).loc["exhaustive"]
    every = search(world, all_sites=True, cosine=world.sources).loc["exhaustive"]
    rows = world.targets.loc[every.index, "token_row"]
    sites = [world.activations.by_site[predecessor_site(1, m)] for m in MODULES]
    active = np.sum([np.diff(codes.indptr)[rows] for codes in sites], axis=0)
    assert every["tried"].tolist() == active.tolist()
    assert (every["tried"] > own["tried"]).any()
    assert (every["change"] >= own["change"] - 1e-5).all()


def test_what_grows_again_above_is_seen(world: SimpleNamespace):
    matches = world.matches.copy()
    first = (matches["direction"] == "forward") & (matches["rank"] == 1)
    matches.loc[first & (matches["source"] == MLP), "feature"] = adder.SECOND
    cases, edits = world.cases
    table = downstream_effects(world.suite, world.tokens, world.targets, cases, edits, matches)
    own = table[table["above"] == 0].set_index("target")
    plain = run(world, cases, edits).set_index("target")["change"]
    assert own["change"].to_numpy() == pytest.approx(plain.loc[own.index].to_numpy())
    above = table[table["above"] == 1]
    targets = world.targets.loc[above["target"]]
    features = targets["feature"].to_numpy()
    assert set(features) == {COPY, SUM, MLP}
    descendants = adder.FORWARD | {MLP: adder.SECOND}
    assert above["descendant"].tolist() == [descendants[feature] for feature in features]
    # The MLP of layer 2 gives COPY .5 of its 1.5 back, and nothing to SUM; what SECOND reads is not
    # touched, and it counts at the tokens alone where it is active.
    change = above["change"].to_numpy()
    assert change[features == COPY] == pytest.approx(2 / 3, abs=1e-5)
    assert change[features == SUM] == pytest.approx(1, abs=1e-5)
    assert set(targets["token"][features == MLP] % 4) == {1}
    assert (table["old"] > 0).all()


def test_layers_in_the_middle_are_spread_over_the_depth():
    for layers, expected in ((26, [6, 12, 18]), (32, [8, 16, 24]), (2, [1])):  # 26 as in the paper
        assert middle_layers(layers) == expected
    assert all(0 < layer < n for n in range(2, 40) for layer in middle_layers(n))


def test_layer_0_has_module_sources_and_saes_at_z_say_nothing_of_what_is_written(
    toy: Model, planted: Suite
):
    suite = Suite(planted.row, toy, {**planted.saes, Site(1, "att"): toys.sae_at_z(toy)})
    tokens = tokenize(toy, toys.TEXTS[:3])
    read = collect(suite, tokens)
    targets = draw_targets(read, [0, 1])
    sources = sources_of(targets, match_table(suite, k=1), read)
    modules = sources.groupby(targets["layer"].loc[sources["target"]].to_numpy())["module"].unique()
    assert [{*modules[0]}, {*modules[1]}] == [{"mlp", "att"}, {"res", "mlp", "att"}]
    cases, edits = ablation_cases(targets, active_predecessors(sources))
    table = deactivate(suite, tokens, targets, cases, edits)
    own = targets.loc[table["target"], "activation"].to_numpy()
    assert table["old"].to_numpy() == pytest.approx(own, abs=1e-5)
    assert (table["new"] != table["old"])[table["layer"] == 0].any()
    at_z = (table["layer"] == 1) & table["group"].str.contains("ATT")
    assert at_z.any()
    assert (table["linear"].isna() == at_z).all()
    assert table["change"].notna().all()


def test_of_a_gated_sae_all_is_told_but_what_is_written(toy: Model, planted: Suite):
    site = Site(1, "res")
    gated = GatedSAE(GatedSAEConfig(toys.D_MODEL, 24))
    gated.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    with torch.no_grad():
        gated.b_gate += 0.1
        gated.b_mag += 0.1
    of_gated = make_sae(site, gated, toys.D_MODEL, "gated")
    suite = Suite(planted.row, toy, {**planted.saes, site: of_gated})
    tokens = tokenize(toy, toys.TEXTS[:3])
    read = collect(suite, tokens)
    targets = draw_targets(read, [1])
    sources = sources_of(targets, match_table(suite, k=1), read)
    table = deactivate(
        suite, tokens, targets, *ablation_cases(targets, active_predecessors(sources))
    )
    assert len(table)
    assert table["change"].notna().all()
    assert table["linear"].isna().all()


def test_the_example_is_the_strongest_of_the_first_text_that_has_one(planted: Suite):
    matches = match_table(planted)
    texts = [text for text in toys.TEXTS if len(text) > 10]
    found = example_target(planted, texts, matches, [2, 1])
    assert found.text == texts[0]
    active = collect(planted, [found.text])
    targets = draw_targets(active, [found.feature.layer], 10**6)
    near = active_predecessors(sources_of(targets, matches, active, 1))
    group = groups_of(targets, near)
    if found.rule.startswith("'From RES'"):
        some = targets[group == RES]
    else:
        some = targets.loc[near.loc[near["module"] == "res", "target"]]
    if "five letters" in found.rule:
        assert len(found.word.strip()) > 4
    own = some[(some["feature"] == found.feature.index) & (some["position"] == found.position)]
    assert own["activation"].item() == found.activation
    row = near[(near["target"] == own.index[0]) & (near["module"] == "res")]
    assert row["feature"].item() == found.predecessor.index
    assert row["activation"].item() == found.predecessor_activation > 0
    assert found.predecessor.site == Site(found.feature.layer - 1, "res")


def test_where_no_predecessor_is_active_there_is_nothing_to_remove(planted: Suite):
    matches = match_table(planted)
    none = matches.assign(source=matches["source"].where(matches["module"] != "res", -1))
    with pytest.raises(ValueError, match=r"in 2 texts no feature of layers \[1, 2\] has an active"):
        example_target(planted, toys.TEXTS[:2], none, [1, 2])
