"""A flow is the planted chain, from whichever of its nodes it is traced."""

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from torch import Tensor

from flowhelpers.features import Site
from flowhelpers.flow import members, trace
from flowhelpers.matching import match_table, scores
from flowhelpers.suites import Suite

AXES = torch.eye(4)


@pytest.fixture(scope="module")
def suite() -> Suite:
    return toys.bare_suite()


@pytest.fixture(scope="module")
def table(suite: Suite) -> pd.DataFrame:
    return scores(match_table(suite, k=1))


def traced(directions: dict[str, Tensor], seed: str, layers: int = 3) -> pd.DataFrame:
    """A trace through residual dictionaries of these directions, by site."""
    sites = {Site(int(key[0]), key[2:]): rows for key, rows in directions.items()}
    small = toys.bare_suite(sites, layers)
    return trace(small, seed, scores(match_table(small, k=1)))


@pytest.mark.parametrize("coordinate", [2, 13])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_planted_chain_is_found_from_each_of_its_nodes(
    suite: Suite, table: pd.DataFrame, coordinate: int, layer: int
):
    nodes = [f"{at}/res/{order.index(coordinate)}" for at, order in toys.COORDINATE.items()]
    chain = trace(suite, nodes[layer], table)
    assert chain["feature"].tolist() == nodes
    assert chain["is_seed"].tolist() == [at == layer for at in range(3)]
    assert chain["from_res"].tolist()[1:] == nodes[:2]
    assert chain["previous"].tolist()[1:] == nodes[:2]
    assert chain["s_res"].tolist()[1:] == pytest.approx([0.8, 0.8])
    assert chain["s_previous"].tolist()[1:] == pytest.approx([0.8, 0.8])
    assert chain.loc[0, ["from_res", "s_res", "null_res", "previous"]].isna().all()
    has, lacks = ("mlp", "att") if coordinate < toys.MODULE else ("att", "mlp")
    assert chain[f"from_{has}"].tolist() == [f"{at}/{has}/{coordinate % 8}" for at in range(3)]
    assert chain[f"s_{has}"].tolist() == pytest.approx([1, 0.6, 0.96])
    assert chain[f"from_{lacks}"].isna().all()
    assert chain[f"s_{lacks}"].tolist() == [0, 0, 0]


def test_the_nulls_are_those_of_the_table(suite: Suite, table: pd.DataFrame):
    chain = trace(suite, "1/res/5", table)
    for module in ("res", "mlp", "att"):
        by_layer = table.groupby("layer")[f"null_{module}"].first()
        assert np.array_equal(chain[f"null_{module}"], by_layer, equal_nan=True)


def test_forward_goes_to_the_best_of_the_next_layer_and_says_whose_own_match_differs():
    between = (0.6 * AXES[0] + 0.8 * AXES[1])[None]
    weaker = (0.5 * AXES[0] + 0.75**0.5 * AXES[2])[None]
    chain = traced({"0/res": AXES[:2], "1/res": torch.cat([weaker, between])}, "0/res/0")
    assert chain["feature"].tolist() == ["0/res/0", "1/res/1"]
    last = chain.iloc[1]
    assert (last["previous"], last["from_res"]) == ("0/res/0", "0/res/1")
    assert (last["s_previous"], last["s_res"]) == (pytest.approx(0.6), pytest.approx(0.8))
    back = traced({"0/res": AXES[:2], "1/res": torch.cat([weaker, between])}, "1/res/1")
    assert back["feature"].tolist() == ["0/res/1", "1/res/1"]


def test_a_chain_ends_where_nothing_points_the_same_way():
    layers = {"0/res": AXES[:1], "1/res": torch.stack([AXES[1], AXES[2]]), "2/res": -AXES[1:2]}
    chain = traced(layers, "1/res/0")
    assert chain["feature"].tolist() == ["1/res/0"]
    assert chain[["from_res", "from_mlp", "from_att"]].isna().all(axis=None)


def test_a_suite_with_some_sites_only_is_traced_through_these():
    alone = traced({"1/res": AXES[:2], "2/res": AXES[[1, 0]]}, "2/res/0", layers=4)
    assert alone["feature"].tolist() == ["1/res/1", "2/res/0"]
    partial = traced({"1/res": AXES[:2], "1/mlp": AXES[1:2], "3/res": AXES}, "1/res/1", layers=4)
    assert partial["feature"].tolist() == ["1/res/1"]
    assert partial["from_mlp"].tolist() == ["1/mlp/0"]


def test_a_seed_that_cannot_be_traced_is_refused(suite: Suite, table: pd.DataFrame):
    with pytest.raises(ValueError, match="1/mlp/3 lies at 1/mlp: a flow starts from a residual"):
        trace(suite, "1/mlp/3", table)
    with pytest.raises(ValueError, match="no feature 1/res/16 in bare: 1/res has features 0 to 15"):
        trace(suite, "1/res/16", table)


def test_the_members_of_a_flow_are_its_nodes_and_their_predecessors(
    suite: Suite, table: pd.DataFrame
):
    nodes = [f"{at}/res/{order.index(9)}" for at, order in toys.COORDINATE.items()]
    chain = trace(suite, nodes[1], table)
    assert members(chain) == [*nodes, "0/att/1", "1/att/1", "2/att/1"]
