"""The match table holds the planted chain in both directions, and its classes are the paper's."""

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
import toys
from hub import Hub
from hub_families import write_gemma_scope_2
from hub_files import shrink
from sae_lens import StandardSAE, StandardSAEConfig
from torch import Tensor

from flowhelpers.core.cache import CACHE
from flowhelpers.core.features import Site, predecessor_sites
from flowhelpers.matching import table as matching
from flowhelpers.matching.cosine import TopK
from flowhelpers.matching.matchers import by_permutation
from flowhelpers.matching.null import null_cosines, null_error
from flowhelpers.matching.scores import (
    agreement,
    best_matches,
    classify,
    feature_scores,
    transition,
)
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import KEPT, OnDemand, Suite, load_suite
from flowhelpers.suites.saes import SAE, make_sae

CODE = {"res": 0, "mlp": 1, "att": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tables are kept in a folder of the test's own."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "matches"


@pytest.fixture
def table() -> pd.DataFrame:
    return match_table(toys.bare_suite(), k=3)


def backward(table: pd.DataFrame, layer: int, module: str, rank: int = 1) -> pd.DataFrame:
    """The matches that the features of a layer chose at a module, by feature."""
    keep = (table["layer"] == layer) & (table["module"] == module) & (table["rank"] == rank)
    return table[keep & (table["direction"] == "backward")].set_index("feature").sort_index()


def two_layers(first: Tensor, second: Tensor) -> Suite:
    return toys.bare_suite({Site(0, "res"): first, Site(1, "res"): second}, layers=2)


def test_the_table_holds_each_feature_site_and_rank_once(table: pd.DataFrame):
    counts = table.groupby(["direction", "layer", "module", "source_layer"], observed=True).size()
    expected = {("backward", layer, m, layer): 48 for layer in range(3) for m in ("mlp", "att")}
    expected |= {("forward", layer, m, layer): 24 for layer in range(3) for m in ("mlp", "att")}
    expected |= {
        (way, layer, "res", layer - 1): 48 for layer in (1, 2) for way in ("backward", "forward")
    }
    assert counts.to_dict() == expected
    for direction, chooser in (("backward", "feature"), ("forward", "source")):
        mine = table[table["direction"] == direction]
        assert not mine.duplicated(["layer", "module", chooser, "rank"]).any()
    assert set(table["rank"]) == {1, 2, 3}
    assert set(table["method"]) == {"cosine"}
    assert not table.loc[table["rank"] > 1, "mutual"].any()


@pytest.mark.parametrize("layer", [1, 2])
def test_the_table_finds_the_planted_chain(table: pd.DataFrame, layer: int):
    best = backward(table, layer, "res")
    assert best["source"].tolist() == toys.RES_FROM[layer]
    assert best["cosine"].to_numpy() == pytest.approx(0.8, abs=1e-6)
    assert best["mutual"].all()
    of_module = {1: 0.6, 2: 0.96}[layer]
    for feature, coordinate in enumerate(toys.COORDINATE[layer]):
        has, lacks = ("mlp", "att") if coordinate < toys.MODULE else ("att", "mlp")
        row = backward(table, layer, has).loc[feature]
        assert (row["source"], row["mutual"]) == (coordinate % toys.MODULE, True)
        assert row["cosine"] == pytest.approx(of_module, abs=1e-6)
        row = backward(table, layer, lacks).loc[feature]
        assert (row["source"], row["cosine"], row["mutual"]) == (-1, 0, False)


def test_forward_matches_are_those_that_sources_choose(table: pd.DataFrame):
    onward = best_matches(table, "forward", "res").set_index(["layer", "source"])["feature"]
    assert len(onward) == len(best_matches(table, module="res")) == 2 * toys.RES
    for layer in (1, 2):
        for feature, source in enumerate(toys.RES_FROM[layer]):
            assert onward[layer, source] == feature
    of_mlp = best_matches(table, "forward", "mlp").query("layer == 2")
    for source, feature in of_mlp.set_index("source")["feature"].items():
        assert toys.COORDINATE[2][feature] == source


def test_layer_0_has_module_predecessors_only(table: pd.DataFrame):
    with pytest.raises(ValueError, match="3/mlp has no predecessors: expected a residual site"):
        predecessor_sites(Site(3, "mlp"))
    wide = feature_scores(table).set_index(["layer", "feature"])
    first = wide.loc[0]
    assert first[["s_res", "source_res", "null_res"]].isna().all(axis=None)
    assert first["source_mlp"].tolist() == [*range(8), *[-1] * 8]
    assert first["source_att"].tolist() == [*[-1] * 8, *range(8)]
    assert wide.loc[1, "source_res"].tolist() == toys.RES_FROM[1]
    assert wide.loc[2, "s_res"].to_numpy() == pytest.approx(0.8, abs=1e-6)
    assert wide.loc[1, "null_res"].nunique() == 1


def test_the_null_of_the_table_is_a_quantile_of_the_best_by_chance():
    suite = toys.bare_suite()
    table = match_table(suite, k=1, seed=7)
    for layer, module, source in ((1, "res", Site(0, "res")), (2, "att", Site(2, "att"))):
        chance = null_cosines(suite.sae(source).directions, 7).numpy()
        rows = backward(table, layer, module)
        assert rows["null"].to_numpy() == pytest.approx(
            np.quantile(chance, 0.999, method="weibull"), abs=1e-6
        )
        assert rows["null_error"].to_numpy() == pytest.approx(null_error(torch.tensor(chance)))
        below = [(chance < score).mean() for score in rows["score"]]
        assert rows["null_quantile"].to_numpy() == pytest.approx(below, abs=1e-6)


def test_margin_is_the_lead_over_the_next_and_mutual_asks_both_sides():
    axes = torch.eye(5)
    targets = torch.stack(
        [
            0.9 * axes[0] + 0.19**0.5 * axes[4],
            0.8 * axes[0] + 0.6 * axes[3],
            0.5 * axes[0] + 0.3 * axes[1] + 0.2 * axes[2] + 0.62**0.5 * axes[4],
        ]
    )
    table = match_table(two_layers(axes[:3], targets), k=2)
    first, second = (backward(table, 1, "res", rank) for rank in (1, 2))
    assert first["cosine"].tolist() == pytest.approx([0.9, 0.8, 0.5])
    assert first["margin"].tolist() == pytest.approx([0.9, 0.8, 0.2])
    assert first["mutual"].tolist() == [True, False, False]
    assert second["source"].tolist() == [-1, -1, 1]
    # The third is the best that source 1 has; but source 1 is not the best that the third has.
    assert second["mutual"].tolist() == [False, False, False]
    assert second["margin"].tolist() == pytest.approx([0, 0, 0.1])
    # All that there is was asked for: there is no next to lead over.
    whole = match_table(two_layers(axes[:3], targets), k=3)
    assert backward(whole, 1, "res", 3)["margin"].isna().all()


def test_what_a_method_does_not_know_lacks_or_has_no_use_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would speak first
    with pytest.raises(ValueError, match="unknown method 'cosin'; did you mean 'cosine'"):
        match_table(toys.bare_suite(), 1, method="cosin")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="method='pearson': texts are for 'pearson', which needs"):
        match_table(toys.bare_suite(), 1, method="pearson")
    with pytest.raises(ValueError, match="method='cosine': texts are for 'pearson'"):
        match_table(toys.bare_suite(), 1, texts=["a"])
    with pytest.raises(ValueError, match="weights and folded are for 'permutation' alone"):
        match_table(toys.bare_suite(), 1, weights="all")
    with pytest.raises(ValueError, match="torch finds no device 'cpuu' on this machine"):
        match_table(toys.bare_suite(), 1, device="cpuu")
    with pytest.raises(ValueError, match=r"k=9: expected 1 to 8, .* of 0/mlp"):
        match_table(toys.bare_suite(), k=9)
    apart = toys.bare_suite({Site(0, "res"): torch.eye(4), Site(2, "res"): torch.eye(4)})
    with pytest.raises(ValueError, match="bare has no residual SAE with one that prec"):
        match_table(apart, k=1)


# Tables on disk.


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every pair of sites that is matched."""
    calls: list[int] = []
    true = matching.by_cosine

    def counted(*args: Any) -> object:
        calls.append(1)
        return true(*args)

    monkeypatch.setattr(matching, "by_cosine", counted)
    return calls


def test_a_table_is_read_from_disk_and_is_the_same(cache: Path, computed: list[int]):
    first = match_table(toys.bare_suite(), k=2)
    assert len(computed) == 8
    again = match_table(toys.bare_suite(), k=2)
    assert len(computed) == 8
    pd.testing.assert_frame_equal(first, again)
    assert len(list(cache.glob("*.parquet"))) == 3
    assert not list(cache.glob(".*"))
    file = next(cache.glob("*.parquet"))
    with pytest.raises(OSError, match="cannot make the folder"):
        match_table(toys.bare_suite(), k=2, cache=file)
    assert len(computed) == 8


def test_every_thing_that_a_table_depends_on_makes_another(
    computed: list[int], monkeypatch: pytest.MonkeyPatch
):
    suite = toys.bare_suite()
    match_table(suite, k=2)
    for k, seed, method in ((1, 0, "cosine"), (2, 1, "cosine"), (2, 0, "random")):
        before = len(computed)
        match_table(suite, k, seed, method)  # pyright: ignore[reportArgumentType]
        assert len(computed) == before + 8
    directions = toys.planted_directions()
    directions[Site(2, "mlp")] = directions[Site(2, "mlp")].flip(0)
    before = len(computed)
    match_table(toys.bare_suite(directions), k=2)
    assert len(computed) == before + 3  # the layer that has the changed SAE
    monkeypatch.setattr(matching, "TABLE_VERSION", matching.TABLE_VERSION + 1)
    match_table(suite, k=2)
    assert len(computed) == before + 3 + 8


@pytest.mark.parametrize("harm", ["truncated", "empty", "other", "not parquet", "one bit"])
def test_a_file_that_is_not_what_it_should_be_is_made_again(
    cache: Path, computed: list[int], harm: str
):
    first = match_table(toys.bare_suite(), k=2)
    files = sorted(cache.glob("*.parquet"), key=lambda file: pd.read_parquet(file)["layer"][0])
    content = files[2].read_bytes()
    harmed = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "other": files[1].read_bytes(),
        "not parquet": b"PAR1 of sorts",
        "one bit": content[:600] + bytes([content[600] ^ 1]) + content[601:],
    }
    files[2].write_bytes(harmed[harm])
    with pytest.warns(UserWarning, match=r"parquet is made again: \w"):
        again = match_table(toys.bare_suite(), k=2)
    assert len(computed) == 11
    pd.testing.assert_frame_equal(first, again)
    assert files[2].read_bytes() == content


def test_a_table_that_was_stopped_goes_on_where_it_was(
    cache: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
):
    whole = match_table(toys.bare_suite(), k=2, cache=cache.parent / "whole")
    counted = matching.by_cosine

    def stopped(*args: Any) -> object:
        if len(computed) == 8 + 6:
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(matching, "by_cosine", stopped)
        with pytest.raises(KeyboardInterrupt):
            match_table(toys.bare_suite(), k=2)
    assert len(list(cache.iterdir())) == 2  # layers 0 and 1, whole; nothing of layer 2
    pd.testing.assert_frame_equal(match_table(toys.bare_suite(), k=2), whole)
    assert len(computed) == 8 + 6 + 3


def _made(number: int) -> pd.DataFrame:
    return match_table(toys.bare_suite(), k=2)


def test_processes_may_make_the_same_table_at_once(cache: Path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(_made, range(2), chunksize=1)
    for other in found:
        pd.testing.assert_frame_equal(match_table(toys.bare_suite(), k=2), other)
    assert len(list(cache.glob("*.parquet"))) == 3
    assert not list(cache.glob(".*"))


def test_some_layers_are_those_of_the_whole_table():
    some = match_table(toys.bare_suite(), k=3, layers=[2, 0])
    whole = match_table(toys.bare_suite(), k=3)
    expected = whole[whole["layer"].isin([0, 2])].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, expected)
    for layers in ([], [3], [-1]):
        with pytest.raises(ValueError, match=r"layers=\[.*\]: bare has matches at layers 0, 1, 2"):
            match_table(toys.bare_suite(), k=3, layers=layers)


def test_without_room_for_directions_blocks_are_normalised_as_they_come(
    monkeypatch: pytest.MonkeyPatch, cache: Path
):
    expected = match_table(toys.bare_suite(), k=3)
    monkeypatch.setattr(matching, "free_memory", lambda device: 0)
    found = match_table(toys.bare_suite(), k=3, cache=cache / "other")
    pd.testing.assert_frame_equal(found, expected)


def test_every_sae_is_read_once_where_few_fit():
    whole, reads = toys.bare_suite(), []

    def read(site: Site) -> SAE:
        reads.append(site)
        return whole.saes[site]

    few = replace(whole, saes=OnDemand(whole.saes, read, KEPT))
    pd.testing.assert_frame_equal(match_table(few, k=3), match_table(whole, k=3))
    assert sorted(reads) == sorted(whole.saes)


# The other methods fill the same table.


def test_random_draws_each_of_the_first_k_alike_often():
    rng = torch.Generator().manual_seed(0)
    source = torch.nn.functional.normalize(torch.randn(40, 16, generator=rng), dim=1)
    target = torch.nn.functional.normalize(torch.randn(3000, 16, generator=rng), dim=1)
    suite = two_layers(source, target)
    exact = (target.double() @ source.double().T).numpy()
    table = match_table(suite, k=5, method="random")
    drawn = backward(table, 1, "res")
    assert set(table["rank"]) == {1}
    assert set(table["method"]) == {"random"}
    chosen = np.argsort(-exact, axis=1)[:, :5] == drawn["source"].to_numpy()[:, None]
    assert chosen.sum() == 3000
    assert (abs(chosen.sum(axis=0) - 600) < 90).all()
    pd.testing.assert_frame_equal(table, match_table(suite, k=5, method="random"))
    assert not table["source"].equals(match_table(suite, k=5, seed=1, method="random")["source"])
    cosines = exact[np.arange(3000), drawn["source"]]
    assert drawn["cosine"].to_numpy() == pytest.approx(cosines, abs=1e-6)


def test_a_permutation_of_the_layers_is_found_in_both_directions():
    table = match_table(toys.bare_suite(), k=1, method="permutation")
    for layer in (1, 2):
        assert backward(table, layer, "res")["source"].tolist() == toys.RES_FROM[layer]
    assert table["mutual"].sum() == (table["source"] >= 0).sum() - (table["feature"] < 0).sum()


@pytest.mark.parametrize("folded", [False, True])
def test_where_attention_is_read_at_z_the_other_sites_are_permuted_by_all_weights(
    folded: bool, hub_here: Hub, monkeypatch: pytest.MonkeyPatch
):
    write_gemma_scope_2(hub_here.root)
    shrink(monkeypatch, "gemma-3-270m-pt", layers=2, d_model=64, d_att=128)
    suite = load_suite("gemma-3-270m-pt")
    options: dict[str, Any] = {"method": "permutation", "weights": "all", "folded": folded}
    for _ in range(2):  # the second from disk
        with pytest.warns(UserWarning, match="not permuted are 0/att, 1/att, as 0/att reads 0/z"):
            table = match_table(suite, k=1, **options)
        there = set(zip(table["layer"], table["module"], strict=True))
        assert there == {(0, "mlp"), (1, "mlp"), (1, "res")}
    for module, site in (("mlp", Site(1, "mlp")), ("res", Site(0, "res"))):
        alone = by_permutation(suite.sae("1/res"), suite.sae(site), "all", folded)
        found = backward(table, 1, module)["source"]
        assert found.tolist() == alone.backward.indices[:, 0].tolist()
    with pytest.raises(ValueError, match="1/att reads 1/z"):
        by_permutation(suite.sae("1/res"), suite.sae("1/att"), "all", folded)
    assert set(match_table(suite, k=1, method="permutation")["module"]) == set(CODE)


def suite_to_fold(without: list[Site]) -> Suite:
    """The planted directions as SAEs with thresholds, but for some."""
    saes = {}
    for site, rows in toys.planted_directions().items():
        lens_sae = toys.write_lens_sae(rows, site, torch.linspace(0.5, 2, len(rows)))
        if site in without:
            lens_sae = StandardSAE(StandardSAEConfig(rows.shape[1], len(rows)))
            lens_sae.W_dec.data = rows
        saes[site] = make_sae(site, lens_sae, rows.shape[1], "planted")
    return replace(toys.bare_suite(), saes=saes)


def test_what_has_nothing_to_fold_is_left_out_by_itself():
    suite = suite_to_fold([Site(2, "mlp")])
    fold: dict[str, Any] = {"method": "permutation", "folded": True}
    with pytest.warns(UserWarning, match="not permuted are 2/mlp, as the SAE for 2/mlp"):
        table = match_table(suite, k=1, **fold)
    whole = match_table(suite_to_fold([]), k=1, **fold)
    lost = (whole["layer"] == 2) & (whole["module"] == "mlp")
    kept = whole[~lost].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, kept, check_categorical=False)
    with pytest.warns(UserWarning, match="not permuted are 1/res"):  # a target, and a source
        table = match_table(suite_to_fold([Site(1, "res")]), k=1, **fold)
    kept = whole[(whole["layer"] != 1) & (whole["module"] != "res")].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, kept, check_categorical=False, check_dtype=False)
    with pytest.raises(ValueError, match=r"the SAE for 0/att .* has no thresholds to fold"):
        match_table(suite_to_fold([*toys.planted_directions()]), k=1, **fold)


def test_texts_and_where_they_are_cut_make_another_table_of_correlations(planted: Suite):
    def scores(texts: list[str], cut: int) -> list[float]:
        table = match_table(planted, k=1, method="pearson", texts=texts, max_tokens=cut)
        return table["score"].tolist()

    texts = toys.TEXTS * 4
    assert scores(texts, 128) != scores(texts, 6)
    assert scores(texts, 128) != scores(texts[:-3], 128)


def test_methods_agree_where_they_choose_the_same():
    first = pd.DataFrame(
        {
            "rank": 1, "direction": "backward", "layer": 1, "module": ["res"] * 4 + ["mlp"],
            "feature": [0, 1, 2, 3, 0], "source": [5, 6, 7, -1, 2],
        }
    )  # fmt: skip
    second = first.assign(source=[5, 6, 9, 3, 2])
    found = agreement({"a": first, "b": second}).set_index("module")
    assert found.loc["res", ["first", "second", "features"]].tolist() == ["a", "b", 3]
    assert found.loc["res", "same"] == pytest.approx(2 / 3)
    assert found.loc["mlp", "same"] == 1


def test_the_transition_matrix_has_a_one_for_each_match():
    matches = TopK(torch.tensor([[2, 0], [1, -1], [-1, -1]]), torch.zeros(3, 2))
    found = transition(matches, 4)
    assert found.is_sparse
    assert found.to_dense().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


# Classes.


def scored(**columns: list[float]) -> pd.DataFrame:
    count = len(next(iter(columns.values())))
    base: dict[str, object] = {"layer": [1] * count, "feature": list(range(count))}
    for module in CODE:
        base[f"null_{module}"] = [0.3] * count
    return pd.DataFrame(base | columns)


def test_the_four_classes_are_those_of_the_paper():
    table = scored(
        s_res=[0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.3, np.nan],  # the last as at layer 0
        s_mlp=[0.1, 0.5, 0.1, 0.5, 0.1, 0.1, 0.3, 0.5],
        s_att=[0.1, 0.1, 0.5, 0.1, 0.5, 0.1, 0.3, 0.1],
    )
    found = classify(table)
    assert found["class"].tolist() == [
        *["translated", "processed", "processed", "newborn", "newborn", "unexplained"],
        *["unexplained", "newborn"],  # what equals the line is not above it
    ]
    assert found["high_res"].tolist() == [0.3] * 8
    moved = classify(table, {(1, "mlp"): 0.6, (1, "res"): 0.95})
    assert moved["class"].tolist() == [
        *["unexplained", "unexplained", "newborn", "unexplained", "newborn"],
        *["unexplained", "unexplained", "unexplained"],
    ]
    assert (moved["high_mlp"].iloc[0], moved["high_att"].iloc[0]) == (0.6, 0.3)


def test_a_threshold_that_is_no_cosine_or_of_no_place_is_refused():
    table = scored(s_res=[0.5], s_mlp=[0.5], s_att=[0.5])
    for threshold in (1.5, -1.01, float("nan")):
        with pytest.raises(ValueError, match="for 1/mlp: expected a cosine, from -1 to 1"):
            classify(table, {(1, "mlp"): threshold})
    for place in ((9, "res"), (1, "MLP")):
        with pytest.raises(ValueError, match=r"expected \(layer, module\), a layer of 1 and"):
            classify(table, {place: 0.5})


def test_the_table_of_flowlet_is_made_in_seconds_and_read_in_less():
    suite = load_suite("flowlet")
    for most in (20, 1):
        began = time.perf_counter()
        match_table(suite, k=5)
        assert time.perf_counter() - began < most
