"""Our graph of the paper's Table 5, from a match table that holds exactly its flow."""

import dataclasses

import pandas as pd
import pytest
import torch
import toys

from flowhelpers.features import Site
from flowhelpers.flow import FlowGraph, flow_graph
from flowhelpers.paper import TABLE_5_MLP, TABLE_5_RES, TABLE_5_SCORES, compare_table_5

WIDTH = 16384


def test_the_numbers_are_those_that_the_paper_prints():
    assert len(TABLE_5_RES) == 26
    assert (TABLE_5_RES[0], TABLE_5_RES[7], TABLE_5_RES[24]) == (14403, 16335, 14548)
    assert len(TABLE_5_MLP) == 9
    assert sorted(TABLE_5_SCORES.values()) == [0.30, 0.48, 0.79, 0.82]


def planted(
    wrong: int | None = None,
    t_mlp: float = 0.25,
    t_res: float | None = None,
    method: str = "cosine",
) -> FlowGraph:
    """The graph of Table 5; at the layer `wrong` another feature is the match on both sides."""
    scores = {f"{source} {target}": score for (source, target), score in TABLE_5_SCORES.items()}
    chain = [index + (layer == wrong) for layer, index in enumerate(TABLE_5_RES)]
    rows = []
    for layer, index in enumerate(chain):
        sources = {"mlp": (layer, TABLE_5_MLP.get(layer, 5)), "att": (layer, 7)}
        if layer:
            sources["res"] = (layer - 1, chain[layer - 1])
        for module, (source_layer, source) in sources.items():
            plain = {"res": 0.9, "att": 0.1, "mlp": 0.4 if layer in TABLE_5_MLP else 0.2}[module]
            key = f"{source_layer}/{module}/{source} {layer}/res/{index}"
            match = {"layer": layer, "feature": index, "module": module, "source": source}
            match |= {"source_layer": source_layer, "score": scores.get(key, plain)}
            rows += [match | {"direction": way} for way in ("backward", "forward")]
    table = pd.DataFrame(rows).assign(
        rank=1, margin=0.1, mutual=True, null=0.1, null_quantile=1.0, method=method
    )
    table = table.assign(suite="gemma-2-2b", cosine=table["score"])
    sites = (Site(layer, module) for layer in range(26) for module in ("res", "mlp", "att"))
    suite = toys.bare_suite({site: torch.zeros(WIDTH, 1) for site in sites}, layers=26)
    suite = dataclasses.replace(suite, row=dataclasses.replace(suite.row, name="gemma-2-2b"))
    return flow_graph(suite, "24/res/14548", table, t_mlp=t_mlp, t_res=t_res)


def test_every_node_and_score_of_the_table_is_found():
    found = compare_table_5(planted())
    assert len(found) == 35
    assert found["same"].all()
    assert found["paper"].tolist() == found["ours"].tolist()
    scored = found.dropna(subset=["paper_score"])
    assert scored["paper"].tolist() == ["6/res/2452", "7/mlp/6110", "16/res/10649", "17/mlp/8454"]
    assert scored["our_score"].tolist() == [0.30, 0.82, 0.48, 0.79]
    assert scored["difference"].tolist() == [0, 0, 0, 0]


def test_nodes_that_differ_are_told():
    found = compare_table_5(planted(wrong=11))
    other = found[~found["same"]]
    assert other["paper"].tolist() == ["11/res/7614"]
    assert other["ours"].tolist() == ["11/res/7615"]
    lost = planted()
    lost = dataclasses.replace(lost, nodes=lost.nodes[lost.nodes["feature"] != "7/mlp/6110"])
    row = compare_table_5(lost).set_index("paper").loc["7/mlp/6110"]
    assert pd.isna(row["ours"])
    assert not row["same"]


def test_a_graph_of_something_else_is_refused():
    for graph in (
        planted(t_mlp=0.15),
        planted(t_res=0.5),
        planted(method="random"),
        dataclasses.replace(planted(), suite="flowlet"),
        dataclasses.replace(planted(), seeds=("23/res/9592",)),
    ):
        with pytest.raises(ValueError, match="Table 5 is of 24/res/14548 in gemma-2-2b"):
            compare_table_5(graph)
