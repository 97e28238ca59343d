"""Matches are exact: planted ones are found, ties, signs and norms are as CHOICES has them."""

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
import toys
from scipy.stats import beta
from torch import Tensor

from flowhelpers.features import Site
from flowhelpers.matching import (
    match_table,
    null_cosines,
    predecessor_sites,
    scores,
    top_k_cosine,
    unit_rows,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows of ±1: with a width that is a power of 4 every cosine is exact in float32."""
    return normal(rows, width, seed=seed).sign()


def by_brute_force(target: Tensor, source: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and cosines in float64, best first, ties to the lowest index; row by row."""
    indices, cosines = [], []
    for t in target.double().numpy():
        row = []
        for j, s in enumerate(source.double().numpy()):
            size = np.sqrt(t @ t) * np.sqrt(s @ s)
            row.append((-(t @ s / size) if size else 0.0, j))
        best = sorted(row)[:k]
        indices.append([j if c < 0 else -1 for c, j in best])
        cosines.append([-c if c < 0 else 0.0 for c, _ in best])
    return np.array(indices), np.array(cosines)


def test_a_planted_permutation_is_found_whatever_the_norms():
    source = normal(60, 24)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    target = source[order] * normal(60, 1, seed=2).abs().add(0.01)
    matches = top_k_cosine(target, source * torch.logspace(-3, 3, 60)[:, None])
    assert torch.equal(matches.indices[:, 0], order)
    assert torch.allclose(matches.cosines, torch.ones(60, 1), atol=1e-6)
    back = top_k_cosine(source, target)
    assert torch.equal(order[back.indices[:, 0]], torch.arange(60))


def test_a_long_source_is_not_preferred_to_a_near_one():
    source = torch.tensor([[100.0, 100.0], [1.0, 0.1]])
    matches = top_k_cosine(torch.tensor([[5.0, 0.0]]), source, k=2)
    assert matches.indices.tolist() == [[1, 0]]
    assert matches.cosines[0].tolist() == pytest.approx([1 / 1.01**0.5, 0.5**0.5])


def test_an_antipodal_direction_is_no_match():
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    matches = top_k_cosine(target, torch.tensor([[-1.0, 0.0], [-1.0, 0.1]]), k=2)
    assert matches.indices.tolist() == [[-1, -1], [1, -1]]
    assert matches.cosines[0].tolist() == [0, 0]
    assert matches.cosines[1].tolist() == pytest.approx([0.1 / 1.01**0.5, 0])


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_ties_go_to_the_lowest_index(k: int):
    # Source 4 is best, then eleven that are tied, then the rest; a tie of many cuts the border.
    target = torch.ones(3, 16)
    source = -torch.ones(40, 16)
    tied = [2, 3, 9, 10, 11, 17, 20, 21, 30, 38, 39]
    source[tied] = torch.ones(16)
    for place, index in enumerate(tied):
        source[index, place] = -1  # cosine 14/16 each
    source[4] = 1
    matches = top_k_cosine(target, source, k)
    assert matches.indices.tolist() == [[4, *tied][:k]] * 3
    assert matches.cosines[0].tolist() == [1.0, *[0.875] * 11][:k]


@pytest.mark.parametrize("k", [1, 2, 5, 30])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_draws_with_duplicates_and_zero_rows_equal_brute_force(k: int, seed: int):
    rng = np.random.default_rng(seed)
    target, source = signs(25, 16, seed), signs(30, 16, seed + 10)
    source[rng.integers(0, 30, 12)] = source[rng.integers(0, 30, 12)]
    target[rng.integers(0, 25, 6)] = source[rng.integers(0, 30, 6)]
    target[3] = 0
    source[[4, 5]] = 0
    target *= 2.0 ** torch.randint(-3, 4, (25, 1))
    matches = top_k_cosine(target, source, k)
    indices, cosines = by_brute_force(target, source, k)
    assert np.array_equal(matches.indices, indices)
    assert np.array_equal(matches.cosines, cosines)
    assert (indices[3] == -1).all()
    assert not np.isin([4, 5], indices).any()


def test_directions_of_any_kind_equal_brute_force_to_rounding():
    target, source = normal(40, 12, seed=5), normal(50, 12, seed=6)
    matches = top_k_cosine(target, source, 4)
    indices, cosines = by_brute_force(target, source, 4)
    assert np.array_equal(matches.indices, indices)
    assert np.allclose(matches.cosines, cosines, atol=1e-6)


@pytest.mark.parametrize("block_bytes", [1, 12 * 30 * 7, 10**9])
def test_blocks_do_not_matter(block_bytes: int):
    target, source = signs(45, 16), signs(30, 16, seed=1)
    whole, parts = top_k_cosine(target, source, 3), top_k_cosine(target, source, 3, block_bytes)
    assert torch.equal(whole.indices, parts.indices)
    assert torch.equal(whole.cosines, parts.cosines)


def test_half_precision_is_normalised_in_float32():
    target, source = normal(20, 64).to(torch.bfloat16), normal(30, 64, seed=1).to(torch.bfloat16)
    matches = top_k_cosine(target, source, 2)
    expected = top_k_cosine(target.float(), source.float(), 2)
    assert matches.cosines.dtype == torch.float32
    assert torch.equal(matches.indices, expected.indices)
    assert torch.equal(matches.cosines, expected.cosines)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_out_of_range_is_named(k: int):
    with pytest.raises(ValueError, match=f"k={k}: expected 1 to 5, the number of source features"):
        top_k_cosine(normal(4, 3), normal(5, 3), k)


def test_widths_that_differ_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would speak first
    with pytest.raises(ValueError, match=r"target \(4, 3\) with source \(5, 2\): expected two mat"):
        top_k_cosine(normal(4, 3), normal(5, 2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(bad: float):
    broken = normal(6, 3)
    broken[4, 1] = broken[5, 0] = bad
    for pair in ((broken, normal(4, 3)), (normal(4, 3), broken)):
        with pytest.raises(ValueError, match="2 rows are not finite, the first is row 4"):
            top_k_cosine(*pair)


def test_unit_rows_leave_zero_rows_at_zero():
    rows = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert rows.tolist() == [pytest.approx([0.6, 0.8]), [0, 0]]


@pytest.mark.parametrize("planted", [False, True])
def test_the_null_is_what_theory_gives_for_random_directions(planted: bool):
    # The cosine of two random directions in d dimensions is 2 Beta((d-1)/2, (d-1)/2) - 1, and the
    # best of n has the n-th power of its distribution. What is planted does not change that.
    d, n = 24, 400
    source = unit_rows(normal(n, d))
    target = source if planted else normal(n, d, seed=1)
    found = np.concatenate([null_cosines(target, source, seed) for seed in range(20)])
    for q, tolerance in ((0.5, 0.005), (0.99, 0.015)):
        expected = 2 * beta.ppf(q ** (1 / n), (d - 1) / 2, (d - 1) / 2) - 1
        assert np.quantile(found, q) == pytest.approx(expected, abs=tolerance)
    assert torch.equal(null_cosines(target, source, 4), null_cosines(target, source, 4))
    assert not torch.equal(null_cosines(target, source, 4), null_cosines(target, source, 5))


def test_predecessors_are_the_layer_before_and_the_modules_of_the_same_layer():
    assert predecessor_sites(Site(3, "res")) == {
        "res": Site(2, "res"),
        "mlp": Site(3, "mlp"),
        "att": Site(3, "att"),
    }
    assert predecessor_sites(Site(0, "res")) == {"mlp": Site(0, "mlp"), "att": Site(0, "att")}
    with pytest.raises(ValueError, match="3/mlp has no predecessors: expected a residual site"):
        predecessor_sites(Site(3, "mlp"))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return match_table(toys.bare_suite(), k=3)


def test_the_table_holds_each_feature_site_and_rank_once(table: pd.DataFrame):
    assert table.columns.tolist() == [
        *["layer", "feature", "module", "rank", "source_layer"],
        *["source", "cosine", "margin", "mutual", "null"],
    ]
    keys = table.groupby(["layer", "module", "source_layer"]).size()
    assert keys.to_dict() == {
        (0, "att", 0): 48,
        (0, "mlp", 0): 48,
        (1, "att", 1): 48,
        (1, "mlp", 1): 48,
        (1, "res", 0): 48,
        (2, "att", 2): 48,
        (2, "mlp", 2): 48,
        (2, "res", 1): 48,
    }
    assert not table.duplicated(["layer", "feature", "module", "rank"]).any()
    assert set(table["rank"]) == {1, 2, 3}


@pytest.mark.parametrize("layer", [1, 2])
def test_the_table_finds_the_planted_chain(table: pd.DataFrame, layer: int):
    best = table[(table["layer"] == layer) & (table["rank"] == 1)].set_index(["module", "feature"])
    of_module = {1: 0.6, 2: 0.96}[layer]
    assert best.loc["res", "source"].tolist() == toys.RES_FROM[layer]
    assert best.loc["res", "cosine"].to_numpy() == pytest.approx(0.8, abs=1e-6)
    assert best.loc["res", "mutual"].all()
    for feature, coordinate in enumerate(toys.COORDINATE[layer]):
        has, lacks = ("mlp", "att") if coordinate < toys.MODULE else ("att", "mlp")
        row = best.loc[(has, feature)]
        assert (row["source"], row["mutual"]) == (coordinate % toys.MODULE, True)
        assert row["cosine"] == pytest.approx(of_module, abs=1e-6)
        row = best.loc[(lacks, feature)]
        assert (row["source"], row["cosine"], row["mutual"]) == (-1, 0, False)


def test_layer_0_has_module_predecessors_only(table: pd.DataFrame):
    wide = scores(table).set_index(["layer", "feature"])
    first = wide.loc[0]
    assert first[["s_res", "source_res", "null_res"]].isna().all(axis=None)
    assert first["source_mlp"].tolist() == [*range(8), *[-1] * 8]
    assert first["source_att"].tolist() == [*[-1] * 8, *range(8)]
    assert wide.loc[1, "source_res"].tolist() == toys.RES_FROM[1]
    assert wide.loc[2, "s_res"].to_numpy() == pytest.approx(0.8, abs=1e-6)
    assert wide.loc[1, "null_res"].nunique() == 1


def test_the_null_of_the_table_is_a_quantile_of_the_best_by_chance():
    suite = toys.bare_suite()
    table = match_table(suite, k=1, seed=7).set_index(["layer", "module"])
    for layer, module, source in ((1, "res", Site(0, "res")), (2, "att", Site(2, "att"))):
        chance = null_cosines(
            suite.dictionary(Site(layer, "res")).directions, suite.dictionary(source).directions, 7
        )
        expected = np.quantile(chance.numpy(), 0.999)
        assert table.loc[(layer, module), "null"].to_numpy() == pytest.approx(expected, abs=1e-6)


def test_margin_is_the_lead_over_the_next_and_mutual_asks_both_sides():
    axes = torch.eye(5)
    sources = axes[:3]
    targets = torch.stack(
        [
            0.9 * axes[0] + 0.19**0.5 * axes[4],
            0.8 * axes[0] + 0.6 * axes[3],
            0.5 * axes[0] + 0.3 * axes[1] + 0.2 * axes[2] + 0.62**0.5 * axes[4],
        ]
    )
    suite = toys.bare_suite({Site(0, "res"): sources, Site(1, "res"): targets}, layers=2)
    table = match_table(suite, k=2).set_index(["rank", "feature"])
    assert set(table["module"]) == {"res"}
    assert table.loc[1, "cosine"].tolist() == pytest.approx([0.9, 0.8, 0.5])
    assert table.loc[1, "margin"].tolist() == pytest.approx([0.9, 0.8, 0.2])
    assert table.loc[1, "mutual"].tolist() == [True, False, False]
    assert table.loc[2, "source"].tolist() == [-1, -1, 1]
    # The third is the best that source 1 has, though source 1 is not the best that it has.
    assert table.loc[2, "mutual"].tolist() == [False, False, True]
    assert table.loc[2, "margin"].tolist() == pytest.approx([0, 0, 0.1])


def test_more_matches_than_sources_are_all_the_sources():
    table = match_table(toys.bare_suite(), k=50)
    assert table.groupby("module")["rank"].max().to_dict() == {"res": 16, "mlp": 8, "att": 8}
    last = table[table["rank"] == table.groupby("module")["rank"].transform("max")]
    assert last["margin"].isna().all()
    assert table.drop(last.index)["margin"].notna().all()


def test_rows_that_were_excluded_are_no_ones_match():
    directions = toys.planted_directions()
    lost = toys.RES_FROM[1][0]
    directions[Site(0, "res")] = directions[Site(0, "res")].clone()
    directions[Site(0, "res")][lost] = 0
    wide = scores(match_table(toys.bare_suite(directions), k=1)).set_index(["layer", "feature"])
    expected = [-1, *toys.RES_FROM[1][1:]]
    assert wide.loc[1, "source_res"].tolist() == expected
    assert wide.loc[(0, lost), ["source_mlp", "source_att"]].tolist() == [-1, -1]


def test_a_suite_without_two_sites_that_follow_is_an_error():
    suite = toys.bare_suite({Site(0, "res"): torch.eye(4), Site(2, "res"): torch.eye(4)})
    with pytest.raises(ValueError, match="bare has no residual dictionary with one that prec"):
        match_table(suite)
