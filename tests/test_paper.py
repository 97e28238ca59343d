"""Our graph of the paper's Table 5, from a match table that holds exactly its flow."""

import dataclasses

import pandas as pd
import pytest
import torch
import toys

from flowhelpers.core.features import Site
from flowhelpers.flow.graph import FlowGraph, flow_graph
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.groups.significance import class_shares
from flowhelpers.paper import (
    ACTIVATION_PROMPT,
    FLOW_FIGURES,
    SUPPRESSION_PROMPT,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    TABLE_5_MLP,
    TABLE_5_RES,
    TABLE_5_SCORES,
    compare_figure_4,
    compare_figure_13,
    compare_figure_14,
    compare_named_nodes,
    compare_table_5,
    figure_14,
    is_of_paper,
    paper_labels,
)

WIDTH = 16384


def test_variants_of_gemma_have_the_features_of_the_paper_unless_they_are_wider() -> None:
    of_paper = ("gemma-2-2b", "gemma-2-2b@16k", "gemma-2-2b@l0=70", "gemma-2-2b@res+mlp")
    assert all(map(is_of_paper, of_paper))
    assert not any(map(is_of_paper, ("gemma-2-2b@65k", "gemma-2-2b@65k@res", "gemma-2-9b", "mine")))


def test_the_numbers_are_those_that_the_paper_prints():
    assert len(TABLE_5_RES) == 26
    assert (TABLE_5_RES[0], TABLE_5_RES[7], TABLE_5_RES[24]) == (14403, 16335, 14548)
    assert len(TABLE_5_MLP) == 9
    assert sorted(TABLE_5_SCORES.values()) == [0.30, 0.48, 0.79, 0.82]


def test_the_prompts_end_with_a_space_and_the_seeds_are_those_of_tables_2_to_4():
    assert ACTIVATION_PROMPT == "I think" + " "
    words = "I think that the biggest problem of contemporary theoretical physics is"
    assert words + " " == SUPPRESSION_PROMPT
    assert list(TABLE_2) == [
        *("3/res/9811", "18/res/14053", "18/res/1336", "20/res/4506", "21/res/13226"),
        *("22/res/9002", "22/res/15105", "23/res/4086", "24/res/7017", "24/res/14548"),
    ]
    assert TABLE_3 == {
        **{"Anger and frustration": "12/res/4111", "Mental health issues": "12/res/16226"},
        **{"Wedding and marriage": "12/res/4230", "Religion and God": "12/res/5483"},
    }
    assert list(TABLE_4) == [
        *("12/res/6778", "16/res/13806", "18/res/1056", "18/res/7505", "23/res/10746"),
        *("24/res/11794", "24/res/1027", "24/res/7391", "24/res/1714", "25/res/6821"),
    ]


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


def test_nodes_that_the_text_names_are_found_or_another_is_told():
    figure, limits = FLOW_FIGURES["24/res/14548"]
    assert [*FLOW_FIGURES][1:] == ["12/res/14455", "12/res/4230"]
    assert limits == {"t_mlp": 0.25}
    found = compare_named_nodes({figure: planted(wrong=7)}).set_index("paper")
    names = ["6/res/2452", "7/res/16335", "7/mlp/6110", "16/res/10649", "17/res/8130"]
    assert found.index.tolist() == [*names, "17/mlp/8454", "24/res/14548"]
    assert found.index[found["verdict"] == "other"].tolist() == ["7/res/16335"]
    assert found.loc["7/res/16335", "ours"] == "7/res/16336"
    lost = compare_named_nodes({"figure_20": planted()})
    assert lost["verdict"].tolist() == ["other"] * 3
    assert set(lost["figure"]) == {"figure_20"}


def test_the_papers_interpretations_are_of_its_suite_alone_and_of_features_that_it_has():
    sites = (Site(layer, module) for layer in range(26) for module in ("res", "mlp"))
    suite = toys.bare_suite({site: torch.zeros(WIDTH, 1) for site in sites}, layers=26)
    assert paper_labels(suite).empty
    suite = dataclasses.replace(suite, row=dataclasses.replace(suite.row, name="gemma-2-2b@16k"))
    found = paper_labels(suite)
    assert len(found) == 9
    assert found.set_index("feature")["label"]["7/mlp/6110"] == "datasets and measurements"
    assert all(str(suite.feature(name)) == name for name in found["feature"])
    assert found["label_from"].str.match("paper, ").all()
    saes = {site: sae for site, sae in suite.saes.items() if site.module == "res"}
    assert len(paper_labels(dataclasses.replace(suite, saes=saes))) == 7


# The group statistics.


def test_figure_4_is_the_means_of_figure_14_as_the_paper_prints_them():
    printed = {  # by module and class: s(R), s(M), s(A)
        ("res", "AO"): (0.991, 0.972, 0.915),
        ("res", "AB"): (0.885, 0.903, 0.960),
        ("res", "IB"): (0.887, 0.922, 0.942),
        ("mlp", "AO"): (0.980, 0.992, 0.937),
        ("mlp", "AB"): (0.872, 0.878, 0.922),
        ("mlp", "IB"): (0.930, 0.892, 0.922),
        ("att", "AO"): (0.912, 0.916, 0.999),
        ("att", "AB"): (0.985, 0.987, 0.760),
        ("att", "IB"): (0.998, 0.988, 0.917),
    }
    ours = figure_14().rename(columns={"paper": "significant"}).assign(p=0.0, effect=0.0)
    found = compare_figure_4(class_shares(ours))
    assert found["difference"].abs().max() < 1e-12
    for (module, pair), shares in printed.items():
        part = found[(found["module"] == module) & (found["pair"] == pair)]
        assert part["score"].tolist() == ["s_res", "s_mlp", "s_att"]
        assert part["paper"].tolist() == pytest.approx(shares, abs=6e-4)


def test_the_shares_of_the_text_are_those_of_figure_14():
    found = figure_14().set_index(["first", "second", "score"])["paper"]
    pair = ("From MLP", "From MLP & ATT")
    assert [found[(*pair, f"s_{m}")] for m in ("res", "mlp", "att")] == [0.67, 0.72, 1]


def test_our_shares_stand_beside_those_of_figures_13_and_14():
    pairs = figure_14().rename(columns={"paper": "share"}).assign(tests=104)
    pairs.loc[0, "share"] -= 0.25
    found = compare_figure_14(pairs)
    assert found["difference"].tolist() == [-0.25] + [0.0] * 83
    assert (found["tests"] == 104).all()
    rows = [(a, b, 0.5) for a in GROUPS for b in GROUPS]
    ours = pd.DataFrame(rows, columns=["first", "second", "share"])
    found = compare_figure_13(ours).set_index(["first", "second"])
    assert found.loc[("From ATT", "From RES & ATT"), "paper"] == 0.45  # as the caption says
    assert found.loc[("From ATT", "From RES & ATT"), "difference"] == pytest.approx(0.05)
    assert found.loc[("From MLP", "From nowhere"), "paper"] == 0.82
    assert len(found) == 64
