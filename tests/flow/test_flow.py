"""A flow graph is the planted chain, from whichever of its nodes it is built."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from torch import Tensor

from flowhelpers.core.features import Site, parse_feature
from flowhelpers.flow.files import load_graph, save_graph, to_attribution_graph
from flowhelpers.flow.graph import (
    FlowGraph,
    ancestors,
    cut_spans,
    descendants,
    flow_graph,
    labelled,
    linear_circuits,
    path,
)
from flowhelpers.flow.lifespans import feature_lifespans, flow_by_layer
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite

AXES = torch.eye(12)


@pytest.fixture
def suite() -> Suite:
    return toys.bare_suite()


@pytest.fixture
def table(suite: Suite) -> pd.DataFrame:
    return match_table(suite, k=3)


def nodes_of(coordinate: int) -> list[str]:
    """The planted chain of the features that descend from a coordinate."""
    return [f"{at}/res/{order.index(coordinate)}" for at, order in toys.COORDINATE.items()]


def bare(directions: dict[str, Tensor], layers: int = 3) -> Suite:
    """A suite of residual SAEs with these directions, by site."""
    sites = {Site(int(key[0]), key[2:]): rows for key, rows in directions.items()}
    return toys.bare_suite(sites, layers)


def built(directions: dict[str, Tensor], seed: str, layers: int = 3, **options: Any) -> FlowGraph:
    small = bare(directions, layers)
    return flow_graph(small, seed, match_table(small, k=1), **options)


@pytest.mark.parametrize(("coordinate", "layer"), [(2, 0), (2, 1), (13, 1), (13, 2)])
def test_the_planted_chain_is_found_from_each_of_its_nodes(
    suite: Suite, table: pd.DataFrame, coordinate: int, layer: int
):
    nodes = nodes_of(coordinate)
    graph = flow_graph(suite, nodes[layer], table)
    chain = graph.chain
    assert chain["feature"].tolist() == nodes
    assert chain["is_seed"].tolist() == [at == layer for at in range(3)]
    assert chain["from_res"].tolist()[1:] == nodes[:2]
    assert chain["s_res"].tolist()[1:] == pytest.approx([0.8, 0.8])
    assert chain.loc[0, ["from_res", "s_res", "null_res", "high_res"]].isna().all()
    has, lacks = ("mlp", "att") if coordinate < toys.MODULE else ("att", "mlp")
    modules = [f"{at}/{has}/{coordinate % 8}" for at in range(3)]
    assert chain[f"from_{has}"].tolist() == modules
    assert chain[f"s_{has}"].tolist() == pytest.approx([1, 0.6, 0.96])
    assert chain[f"from_{lacks}"].isna().all()
    assert sorted(graph.nodes["feature"]) == sorted([*nodes, *modules])
    edges = {(row.source, row.target): row for row in graph.edges.itertuples()}
    assert set(edges) == {*pairwise(nodes), *zip(modules, nodes, strict=True)}
    for (source, target), row in edges.items():
        expected = {"res": 0.8, has: {0: 1, 1: 0.6, 2: 0.96}[int(target[0])]}[row.module]
        assert row.cosine == pytest.approx(expected)
        assert row.mutual
        forward = row.module == "res" and int(source[0]) >= layer
        assert row.direction == ("forward" if forward else "backward")


def test_scores_nulls_and_classes_are_those_of_the_table(suite: Suite, table: pd.DataFrame):
    chain = flow_graph(suite, nodes_of(2)[1], table.assign(null=np.float32(0.7))).chain
    assert chain["class"].tolist()[1:] == ["translated", "processed"]
    graph = flow_graph(suite, nodes_of(2)[1], table)
    chain = graph.chain
    backward = table[table["direction"] == "backward"]
    nulls = backward.groupby(["layer", "module"], observed=True)["null"].first()
    for module in ("res", "mlp", "att"):
        for kind in ("null", "high"):
            assert chain[f"{kind}_{module}"].tolist()[1:] == [nulls[at, module] for at in (1, 2)]
    others = graph.nodes[graph.nodes["module"] != "res"]
    assert others[["class", "s_res", "high_mlp", "from_res"]].isna().all(axis=None)
    # Linear circuits are processed and newborn; some have a module nearer than the stream.
    nodes = nodes_of(13)  # s(A) is 1, 0.6 and 0.96 beside s(R) of 0.8
    for null, first, second in (
        ({}, "processed", "processed"),
        ({"res": 0.9}, "newborn", "newborn"),
        ({"att": 0.7}, "translated", "processed"),
    ):
        nulls = table["module"].astype(str).map({"res": 0.5, "mlp": 0.5, "att": 0.5} | null)
        low = flow_graph(suite, nodes[0], table.assign(null=nulls.astype(np.float32)))
        assert low.chain["class"].tolist()[1:] == [first, second]
        found = linear_circuits(low)[["feature", "class", "turned_by", "nearer"]]
        rows = [[nodes[1], first, "att", False], [nodes[2], second, "att", True]]
        assert found.values.tolist() == rows[first == "translated" :]
    assert linear_circuits(replace(low, nodes=low.nodes.assign(high_att=0.97))).empty


def test_forward_goes_to_the_best_of_the_next_layer_whosever_match_that_is():
    between = (0.6 * AXES[0] + 0.8 * AXES[1])[None]
    weaker = (0.5 * AXES[0] + 0.75**0.5 * AXES[2])[None]
    directions = {"0/res": AXES[:2], "1/res": torch.cat([weaker, between])}
    graph = built(directions, "0/res/0")
    assert graph.chain["feature"].tolist() == ["0/res/0", "1/res/1"]
    assert graph.chain["from_res"].tolist()[1] == "0/res/1"
    edge = graph.edges.iloc[0]
    assert (edge["direction"], edge["mutual"]) == ("forward", False)
    assert edge["cosine"] == pytest.approx(0.6)
    back = built(directions, "1/res/1")
    assert back.chain["feature"].tolist() == ["0/res/1", "1/res/1"]


def test_a_chain_ends_where_nothing_points_the_same_way_or_a_site_lacks():
    layers = {"0/res": AXES[:1], "1/res": torch.stack([AXES[1], AXES[2]]), "2/res": -AXES[1:2]}
    graph = built(layers, "1/res/0")
    assert graph.nodes["feature"].tolist() == ["1/res/0"]
    assert graph.edges.empty
    alone = built({"1/res": AXES[:2], "2/res": AXES[[1, 0]]}, "2/res/0", layers=4)
    assert alone.chain["feature"].tolist() == ["1/res/1", "2/res/0"]
    partial = {"1/res": AXES[:2], "1/mlp": AXES[1:2], "3/res": AXES}
    graph = built(partial, "1/res/1", layers=4)
    assert graph.nodes["feature"].tolist() == ["1/res/1", "1/mlp/0"]


def rising(cosines: list[float]) -> dict[str, Tensor]:
    """One residual feature a layer, each at the given cosine from the one before."""
    rows = [AXES[0]]
    for number, cosine in enumerate(cosines, 1):
        rows.append(cosine * rows[-1] + (1 - cosine**2) ** 0.5 * AXES[number])
    return {f"{layer}/res": row[None] for layer, row in enumerate(rows)}


def test_a_cut_leaves_the_run_of_layers_around_the_seed():
    # CHOICES 26: the failing edge is taken out, the nodes on the seed's side stay.
    chain = rising([0.9, 0.4, 0.7, 0.6, 0.3, 0.8])
    for seed, span in (("3/res/0", [2, 3, 4]), ("0/res/0", [0, 1]), ("6/res/0", [5, 6])):
        graph = built(chain, seed, layers=7, t_res=0.5)
        assert graph.chain["layer"].tolist() == span
        assert (graph.edges["cosine"] >= 0.5).all()
        whole = built(chain, seed, layers=7)
        assert whole.chain["layer"].tolist() == list(range(7))
        spans = feature_lifespans(match_table(bare(chain, 7), k=1), 0.5).set_index("layer")
        assert spans.loc[int(seed[0]), ["first", "last"]].tolist() == [span[0], span[-1]]
    assert built(chain, "3/res/0", layers=7, t_res=0.6).chain["layer"].tolist() == [2, 3, 4]


def test_a_forward_step_is_cut_by_s_r_of_the_node_that_it_reaches():
    between = (0.6 * AXES[0] + 0.8 * AXES[1])[None]  # s(R) is 0.8, by 0/res/1
    directions = {"0/res": AXES[:2], "1/res": between}
    for t_res, chain in ((0.7, ["0/res/0", "1/res/0"]), (0.85, ["0/res/0"])):
        assert built(directions, "0/res/0", t_res=t_res).chain["feature"].tolist() == chain
        spans = cut_spans(built(directions, "0/res/0"), t_res)[["first", "last"]].values.tolist()
        assert spans == [[0, len(chain) - 1], [0, 0]]  # the step itself is 0.6
    chain = rising([0.9, 0.4, 0.7, 0.6, 0.3, 0.8])
    for at, first, last in ((0, 0, 1), (3, 2, 4), (6, 5, 6)):
        spans = cut_spans(built(chain, f"{at}/res/0", layers=7), 0.5)
        assert spans[["first", "last"]].values.tolist() == [[first, last]] * 2


@pytest.mark.parametrize(
    ("coordinate", "module", "limits", "kept"),
    [
        (2, "mlp", {"t_mlp": 0.7}, [0, 2]),
        (2, "mlp", {"t_mlp": 0.6, "t_att": 0.9}, [0, 1, 2]),
        (13, "att", {"t_att": 0.7}, [0, 2]),
    ],
)
def test_module_predecessors_below_their_threshold_are_left_out(
    suite: Suite, table: pd.DataFrame, coordinate: int, module: str, limits: Any, kept: list[int]
):
    nodes = nodes_of(coordinate)  # s(M) or s(A) is 1, 0.6 and 0.96
    edges = flow_graph(suite, nodes[0], table, **limits).edges.query("module == @module")
    assert edges["target"].tolist() == [nodes[layer] for layer in kept]


def test_top_n_follows_so_many_of_each():
    first = torch.stack([AXES[0], AXES[1], AXES[2], AXES[3]])
    second = torch.stack([0.8 * AXES[0] + 0.6 * AXES[1], AXES[2]])
    small = bare({"0/res": first, "1/res": second}, 2)
    graph = flow_graph(small, "1/res/0", match_table(small, k=2), top_n=2)
    assert graph.chain["feature"].tolist() == ["0/res/0", "0/res/1", "1/res/0"]
    assert graph.edges["rank"].tolist() == [1, 2]
    assert graph.edges["cosine"].tolist() == pytest.approx([0.8, 0.6])


def test_a_seed_whose_layer_another_seed_reached_goes_on_all_the_same():
    # 0/res/0 goes on to 1/res/1, whose own match back is 0/res/1; that one leads to 1/res/0.
    between = 0.6 * AXES[0] + 0.8 * AXES[1]
    directions = {"0/res": AXES[:2], "1/res": torch.stack([between, AXES[2]])}
    small = bare(directions | {"2/res": between[None]})
    table, seeds = match_table(small, k=1), ["0/res/0", "2/res/0"]
    together = flow_graph(small, seeds, table)
    apart = [flow_graph(small, seed, table).network.edges for seed in seeds]
    assert {*together.network.edges} == {*apart[0], *apart[1]}
    assert {*together.nodes.loc[together.nodes["is_seed"], "feature"]} == {*seeds}
    assert ("0/res/0", "1/res/0") in together.network.edges


def test_ancestors_descendants_and_paths_are_those_of_the_chain(suite: Suite, table: pd.DataFrame):
    nodes = nodes_of(2)
    graph = flow_graph(suite, nodes[1], table)
    assert ancestors(graph, nodes[1]) == [nodes[0], "0/mlp/2", "1/mlp/2"]
    assert descendants(graph, "0/mlp/2") == nodes
    way = path(graph, "0/mlp/2", nodes[2])
    assert way["source"].tolist() == ["0/mlp/2", *nodes[:2]]
    assert way["target"].tolist() == nodes
    assert way["cosine"].tolist() == pytest.approx([1, 0.8, 0.8])
    assert graph.network.nodes[nodes[1]]["is_seed"]
    of_mlp = flow_graph(suite, "1/mlp/2", table)  # leads to the features that it matches
    assert of_mlp.chain["feature"].tolist() == nodes
    assert of_mlp.nodes.query("is_seed")["feature"].tolist() == ["1/mlp/2"]
    with pytest.raises(ValueError, match=f"no path leads from {nodes[2]} to {nodes[0]}"):
        path(graph, nodes[2], nodes[0])
    with pytest.raises(ValueError, match="1/res/15 is not in this graph; did you mean"):
        ancestors(graph, "1/res/15")
    # Of two ways the one of higher cosines is taken.
    near = 0.8 * AXES[0] + 0.6 * AXES[1]
    second = torch.stack([near, 0.5 * AXES[0] + 0.75**0.5 * AXES[2]])
    third = (second[0] + second[1])[None]
    small = bare({"0/res": AXES[:1], "1/res": second, "2/res": third / third.norm()})
    graph = flow_graph(small, ["2/res/0", "1/res/1"], match_table(small, k=1))
    assert path(graph, "0/res/0", "2/res/0")["target"].tolist() == ["1/res/0", "2/res/0"]


def test_a_graph_is_the_same_after_saving(suite: Suite, table: pd.DataFrame, tmp_path: Path):
    graph = flow_graph(suite, [nodes_of(2)[1], "1/att/3"], table, t_res=0.5)
    save_graph(graph, tmp_path / "graph.json")
    again = load_graph(tmp_path / "graph.json")
    assert (again.suite, again.seeds, again.choices) == (graph.suite, graph.seeds, graph.choices)
    pd.testing.assert_frame_equal(again.nodes, graph.nodes, check_dtype=False)
    pd.testing.assert_frame_equal(again.edges, graph.edges, check_dtype=False)
    (tmp_path / "graph.json").write_text('{"format": "x"}')
    with pytest.raises(ValueError, match="holds no flow graph"):
        load_graph(tmp_path / "graph.json")


def test_the_export_is_what_graph_viewers_read(suite: Suite, table: pd.DataFrame):
    nodes = nodes_of(2)
    labels = pd.DataFrame({"feature": nodes, "label": "a\nb", "label_from": "x"})
    graph = labelled(flow_graph(suite, [nodes[1], nodes_of(9)[1]], table), labels)
    found = json.loads(json.dumps(to_attribution_graph(graph, "a-flow", "gemma-2-2b")))
    assert (found["metadata"]["slug"], found["metadata"]["scan"]) == ("a-flow", "gemma-2-2b")
    ids = {node["node_id"]: node for node in found["nodes"]}
    assert len(ids) == len(graph.nodes)
    ends = {(link["source"], link["target"], link["weight"]) for link in found["links"]}
    assert len(ends) == len(graph.edges)
    assert {end for *pair, _ in ends for end in pair} <= set(ids)
    for node in found["nodes"]:
        layer, index, place = map(int, node["node_id"].split("_"))
        assert (node["layer"], node["ctx_idx"]) == (str(layer), place)
        assert found["metadata"]["prompt_tokens"][place] in ("att", "res", "mlp")
        total = layer + index + 1000 * {1: 0, 2: 1, 0: 2}[place]  # not the number of a res feature
        assert node["feature"] == total * (total + 1) // 2 + index
    assert len({node["feature"] for node in found["nodes"]}) == len(found["nodes"])
    with pytest.raises(ValueError, match="expected letters, digits and hyphens"):
        to_attribution_graph(graph, "a/b")
    chain = [f"{node[0]}_{parse_feature(node).index}_1" for node in nodes]
    assert ids[chain[1]]["clerp"] == "a; b"
    supernodes = {name: members for name, *members in found["qParams"]["supernodes"]}
    assert set(supernodes) == set(graph.seeds)
    assert supernodes[nodes[1]] == chain


@pytest.mark.parametrize(
    ("seeds", "options", "message"),
    [
        ("1/res/16", {}, "no feature 1/res/16 in bare: 1/res has features 0 to 15"),
        ([], {}, "no seed given"),
        ("1/res/1", {"t_res": 1.5}, "threshold 1.5 for t_res: expected a cosine, from -1 to 1"),
        ("1/res/1", {"t_att": float("nan")}, "threshold nan for t_att"),
        ("1/res/1", {"top_n": 0}, "top_n=0: expected 1 to 3"),
    ],
)
def test_what_makes_no_sense_is_refused(
    suite: Suite, table: pd.DataFrame, seeds: Any, options: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        flow_graph(suite, seeds, table, **options)
    other = replace(suite, row=replace(suite.row, name="other"))
    with pytest.raises(ValueError, match="a match table of bare: expected one of other"):
        flow_graph(other, seeds, table)
    with pytest.raises(ValueError, match="the match table has nothing at layer 2, of 2/res/1"):
        flow_graph(suite, "2/res/1", table[table["layer"] == 0])


def long_chain() -> Suite:
    """Eight layers, in each a chain, its decoys, and what is born and what dies there.

    Feature 0 of layer 0 lives through all layers; one that an MLP writes is born at layer 2 and
    ends at 5; decoys are copies of the first chain's features that lie a little further off.
    """
    axes = torch.eye(64)
    directions: dict[Site, Tensor] = {}
    first, second = axes[0], axes[20]
    for layer in range(8):
        rows = [axes[40 + layer], axes[50 + layer]]  # born and dead in this layer
        mlp = [axes[30 + layer]]
        if layer:
            first = 0.9 * first + 0.19**0.5 * axes[layer]
        rows.append(0.97 * first + (1 - 0.97**2) ** 0.5 * axes[10 + layer])  # a decoy
        rows.append(first)
        if 2 <= layer <= 5:
            second = axes[20] if layer == 2 else 0.8 * second + 0.6 * axes[20 + layer]
            rows.append(second)
        if layer == 2:
            mlp.append(0.7 * axes[20] + 0.51**0.5 * axes[63])
        directions[Site(layer, "res")] = torch.stack(rows)
        directions[Site(layer, "mlp")] = torch.stack(mlp)
    return toys.bare_suite(directions, layers=8)


def test_lifespans_of_planted_chains_come_out_exactly():
    table = match_table(long_chain(), k=1)
    found = feature_lifespans(table, 0.5).set_index(["layer", "feature"])
    for layer in range(8):
        assert found.loc[(layer, 0), ["first", "last", "layers"]].tolist() == [layer, layer, 1]
        assert found.loc[(layer, 3), ["first", "last", "layers"]].tolist() == [0, 7, 8]
    for layer in range(2, 6):
        assert found.loc[(layer, 4), ["first", "last"]].tolist() == [2, 5]
    strict = feature_lifespans(table, 0.95)
    assert strict.set_index(["layer", "feature"]).loc[(4, 3), "layers"] == 1
    mutual = feature_lifespans(table, 0.5, mutual=True).set_index(["layer", "feature"])
    assert mutual.loc[(4, 3), ["first", "last"]].tolist() == [0, 7]
    assert mutual.loc[(4, 2), ["first", "last"]].tolist() == [4, 4]
    with pytest.raises(ValueError, match="threshold 2 for t_res: expected a cosine"):
        feature_lifespans(table, 2)
    found = feature_lifespans(match_table(bare(rising([0.9, 0.8])), k=1), 0.5)  # no modules
    assert found[["layer", "first", "last"]].values.tolist() == [[0, 0, 2], [1, 0, 2], [2, 0, 2]]


def test_a_birth_is_by_the_module_whose_score_is_high():
    by_mlp = [0.65 * AXES[4] + (1 - 0.65**2) ** 0.5 * AXES[8], 0.8 * AXES[0] + 0.6 * AXES[9]]
    directions = {"0/res": AXES[:2], "1/res": AXES[[4, 0, 5]], "1/mlp": torch.stack(by_mlp)}
    suite = bare(directions | {"1/att": (0.6 * AXES[4] + 0.8 * AXES[10])[None]}, 2)
    table = match_table(suite, k=1)
    table["null"] = np.where(table["module"] == "mlp", np.float32(0.7), np.float32(0.5))
    graph = flow_graph(suite, "1/res/0", table)
    (born,) = graph.chain.to_dict("records")
    assert born["class"] == "newborn"
    assert born["s_mlp"] > born["s_att"]  # attention, though less near, is the one that is high
    assert linear_circuits(graph)[["feature", "turned_by"]].values.tolist() == [["1/res/0", "att"]]
    shares = flow_by_layer(table).set_index("layer").loc[1]
    columns = ["born_att", "born_mlp", "processed", "unexplained"]
    assert shares[columns].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_layers_that_the_table_lacks_or_nothing_leads_on_from(suite: Suite):
    found = flow_by_layer(match_table(suite, k=1, layers=[0, 2])).set_index("layer")
    assert found["dies"].notna().to_dict() == {0: False, 1: True, 2: False}
    stream = bare({"0/res": AXES[:3], "1/res": AXES[[0, 1, 9]]}, layers=2)
    found = flow_by_layer(match_table(stream, k=1).assign(null=np.float32(0.5))).set_index("layer")
    assert found["features"].to_dict() == {0: 3, 1: 3}
    assert found["dies"][0] == pytest.approx(1 / 3)
    assert found["translated"].tolist() == pytest.approx([0, 2 / 3])
    broken = bare({"0/res": AXES[:2], "0/mlp": AXES[:2], "1/res": AXES[2:4]}, layers=2)
    dies = flow_by_layer(match_table(broken, k=1)).set_index("layer")["dies"]
    assert dies[0] == 1
    assert np.isnan(dies[1])


def test_births_deaths_and_funnels_of_planted_chains_come_out_exactly():
    table = match_table(long_chain(), k=1).assign(null=np.float32(0.5))
    found = flow_by_layer(table).set_index("layer")
    assert found["features"].tolist() == [4, 4, 5, 5, 5, 5, 4, 4]
    # At layer 2 feature 4 is born from the MLP; features 0 and 1 of each layer come from nowhere.
    assert found["newborn"].tolist() == pytest.approx([0, 0, 0.2, 0, 0, 0, 0, 0])
    assert found["born_mlp"].tolist() == pytest.approx([0, 0, 0.2, 0, 0, 0, 0, 0])
    assert found["born_att"].tolist() == [0] * 8
    assert found["unexplained"].tolist() == pytest.approx([1, 0.5, 0.4, 0.4, 0.4, 0.4, 0.5, 0.5])
    assert found["translated"].tolist() == pytest.approx([0, 0.5, 0.4, 0.6, 0.6, 0.6, 0.5, 0.5])
    # Two features of each layer die there, and at layer 5 the second chain does as well.
    assert found["dies"].tolist()[:7] == pytest.approx([0.5, 0.5, 0.4, 0.4, 0.4, 0.6, 0.5])
    assert np.isnan(found["dies"].iloc[7])
    # The chain's feature and its decoy both go back to the chain's feature of the layer before.
    assert found["largest_funnel"].tolist()[1:] == [2] * 7
    assert found["mutual"].tolist()[1:] == pytest.approx([0.25, 0.2, 0.4, 0.4, 0.4, 0.25, 0.25])
