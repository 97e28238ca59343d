"""A suite's names on Neuronpedia become links, labels from one file, and a check on its matches."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import nbformat
import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
import pytest
import toys
from IPython.display import IFrame
from neuronpedia_server import MINI, OPUS, Fault, NeuronpediaServer, be_quick, packed, row

from flowhelpers.core.features import FeatureId, Site
from flowhelpers.flow.files import load_graph, save_graph
from flowhelpers.flow.graph import FlowGraph, flow_graph, labelled
from flowhelpers.flow.plots import flow_picture, schematic
from flowhelpers.flow.svg import flow_svg
from flowhelpers.labels import neuronpedia
from flowhelpers.labels.describe import describe_features, read_labels
from flowhelpers.labels.neuronpedia import NotThere
from flowhelpers.labels.on_neuronpedia import (
    cosine_check,
    feature_embed,
    feature_page,
    neuronpedia_labels,
    single_labels,
)
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TODAY = date.today().isoformat()
WIDTHS = {"res": toys.RES, "mlp": toys.MODULE, "att": toys.MODULE}
PAGE = "https://www.neuronpedia.org/toy-model"
Labels = Callable[..., pd.DataFrame]


@pytest.fixture(scope="module")
def running() -> Iterator[NeuronpediaServer]:
    with NeuronpediaServer() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, no key about, and the certificates read once."""
    be_quick(monkeypatch)


def refuse() -> NoReturn:
    raise AssertionError("the model was asked for")


def named(suite: Suite, *modules: str) -> Suite:
    """The suite with the names of some modules' SAEs on Neuronpedia, and no model."""
    names = {
        site: f"toy-model/{site.layer}-{site.module}"
        for site in suite.saes
        if site.module in modules
    }
    row = dataclasses.replace(suite.row, neuronpedia=names, layers=toys.LAYERS)
    return dataclasses.replace(suite, row=row, source=refuse)


@pytest.fixture
def suite() -> Suite:
    """A suite whose stream and MLP are on Neuronpedia; its model raises if it is asked for."""
    return named(toys.bare_suite(), "res", "mlp")


@pytest.fixture
def server(running: NeuronpediaServer, suite: Suite) -> NeuronpediaServer:
    """The server, with an export of all that the suite has there: features 0, 2, 4 … are told."""
    running.reset()
    for site, name in suite.row.neuronpedia.items():
        model, source = name.split("/")
        lines = [
            row(str(i), f"{site} about {i}", modelId=model, layer=source)
            for i in range(0, WIDTHS[site.module], 2)
        ]
        running.others[name] = {0: packed(*lines)}
    return running


@pytest.fixture
def labels(server: NeuronpediaServer, suite: Suite, tmp_path: Path) -> Labels:
    """Fetches the suite's labels from the server into a cache of the test's own."""
    given: dict[str, Any] = {"base_url": server.datasets, "folder": tmp_path / "cache"}
    return lambda *sites, **options: neuronpedia_labels(
        options.pop("of", suite), sites or None, **(given | options)
    )


def kept(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# Pages.


def test_a_feature_has_a_page_where_its_sae_has_a_name(suite: Suite):
    assert feature_page(suite, "1/res/5") == f"{PAGE}/1-res/5"
    assert feature_page(suite, FeatureId(2, "mlp", 0)) == f"{PAGE}/2-mlp/0"
    assert feature_page(suite, "1/att/5") is None
    assert feature_embed(suite, "1/att/5") is None
    shown = feature_embed(suite, "1/res/5", plots=False)
    assert shown == f"{PAGE}/1-res/5?embed=true&embedexplanation=true&embedplots=false&" + (
        "embedtest=false"
    )
    assert feature_page(toys.bare_suite(), "1/res/5") is None


# Labels.


def test_all_labels_of_a_suite_come_once_into_one_file_with_its_date(
    labels: Labels, server: NeuronpediaServer, tmp_path: Path
):
    first = labels()
    expected = [
        (f"{layer}/{module}/{i}", f"{layer}/{module} about {i}")
        for layer in range(toys.LAYERS)
        for module in ("mlp", "res")
        for i in range(0, WIDTHS[module], 2)
    ]
    assert list(zip(first["feature"], first["label"], strict=True)) == expected
    assert set(first["label_from"]) == {f"neuronpedia, {MINI}, {TODAY}"}
    assert first.columns.tolist() == ["feature", "label", "label_from"]
    (file,) = kept(tmp_path)
    assert file.name == "bare.parquet"
    about = json.loads(parquet.read_schema(file).metadata[b"flowhelpers"])
    assert {site["date"] for site in about["sites"].values()} == {TODAY}
    asked = len(server.requests)
    pd.testing.assert_frame_equal(labels(), first)
    assert len(server.requests) == asked


def test_sites_that_are_asked_for_later_join_those_that_are_there(
    labels: Labels, server: NeuronpediaServer, tmp_path: Path
):
    one = labels("1/res")
    assert set(one["feature"].str.rpartition("/")[0]) == {"1/res"}
    assert server.asked(0) == 1
    both = labels(Site(2, "mlp"), "1/res")
    assert both["feature"].str.rpartition("/")[0].unique().tolist() == ["2/mlp", "1/res"]
    assert server.asked(0) == 2
    assert len(kept(tmp_path)) == 1
    pd.testing.assert_frame_equal(labels("1/res"), one)
    assert server.asked(0) == 2


def test_what_came_before_a_failure_is_kept(
    labels: Labels, server: NeuronpediaServer, suite: Suite
):
    server.misbehave("2-mlp/explanations/batch-0.jsonl.gz", *[Fault(500)] * neuronpedia.TRIES)
    with pytest.raises(ConnectionError, match="2-mlp"):
        labels()
    assert server.asked(0) == 4 + neuronpedia.TRIES  # all that come before it, by layer
    assert len(labels()) == 3 * (toys.RES + toys.MODULE) // 2
    assert server.asked(0) == 6 + neuronpedia.TRIES


def test_a_refresh_that_fails_loses_nothing(labels: Labels, server: NeuronpediaServer):
    first = labels()
    server.misbehave("1-mlp/explanations/batch-0.jsonl.gz", *[Fault(500)] * neuronpedia.TRIES)
    with pytest.raises(ConnectionError):
        labels(refresh=True)
    asked = len(server.requests)
    pd.testing.assert_frame_equal(labels(), first)
    assert len(server.requests) == asked


@pytest.mark.parametrize("change", ["name", "width", "explainer", "refresh"])
def test_what_was_kept_for_something_else_is_fetched_again(
    labels: Labels, server: NeuronpediaServer, suite: Suite, change: str
):
    row_of = {"modelId": "toy-model", "layer": "1-res"}
    server.others["toy-model/1-res"] = {
        0: packed(row("0", "m", **row_of), row("1", "m", **row_of), row("0", "o", OPUS, **row_of))
    }
    assert labels("1/res")["label"].tolist() == ["m", "m"]
    asked = server.asked(0)
    options: dict[str, Any] = {}
    if change == "name":
        other = {**suite.row.neuronpedia, Site(1, "res"): "toy-model/0-res"}
        options["of"] = dataclasses.replace(
            suite, row=dataclasses.replace(suite.row, neuronpedia=other)
        )
    elif change == "width":
        options["of"] = dataclasses.replace(suite, row=dataclasses.replace(suite.row, features=99))
    elif change == "explainer":
        options["explained_by"] = OPUS
    else:
        options["refresh"] = True
    found = labels("1/res", **options)["label"].tolist()
    assert server.asked(0) == asked + 1
    expected = {"name": [f"0/res about {i}" for i in range(0, 16, 2)], "explainer": ["o", "m"]}
    assert found == expected.get(change, ["m", "m"])


def test_what_was_kept_leniently_does_not_pass_for_whole(labels: Labels, server: NeuronpediaServer):
    of = {"modelId": "toy-model", "layer": "1-res"}
    server.others["toy-model/1-res"] = {0: packed(row("0", "good", **of), row("99", "x", **of))}
    with pytest.warns(UserWarning, match="^lines left out: 1"):
        assert labels("1/res", lenient=True)["label"].tolist() == ["good"]
    asked = server.asked(0)
    assert labels("1/res", lenient=True)["label"].tolist() == ["good"]
    assert server.asked(0) == asked
    with pytest.raises(ValueError, match="the index is 99"):
        labels("1/res")
    server.others["toy-model/1-res"] = {0: packed(row("0", "better", **of))}
    assert labels("1/res")["label"].tolist() == ["better"]
    asked = server.asked(0)
    assert labels("1/res", lenient=True)["label"].tolist() == ["better"]  # what is whole serves
    assert server.asked(0) == asked


def test_a_sae_of_which_the_export_has_nothing_is_an_error_or_left_out(
    labels: Labels, server: NeuronpediaServer
):
    del server.others["toy-model/0-mlp"]
    with pytest.raises(NotThere, match="has no explanations of toy-model/0-mlp"):
        labels()
    with pytest.warns(UserWarning, match="^0/mlp is without labels"):
        found = labels(lenient=True)
    assert len(found) == (3 * toys.RES + 2 * toys.MODULE) // 2
    asked = len(server.requests)
    pd.testing.assert_frame_equal(labels(lenient=True), found)
    assert len(server.requests) == asked
    server.others.clear()
    with pytest.warns(UserWarning, match="is without labels"):
        none = labels(lenient=True, refresh=True)
    assert (len(none), none.columns.tolist()) == (0, found.columns.tolist())


@pytest.mark.parametrize("harm", ["cut", "foreign", "version"])
def test_a_file_of_no_use_is_made_again(labels: Labels, tmp_path: Path, harm: str):
    first = labels()
    (path,) = kept(tmp_path)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif harm == "foreign":
        pd.DataFrame({"a": [1]}).to_parquet(path)
    else:
        said = json.dumps({"version": 0, "sites": {}})
        table = parquet.read_table(path).replace_schema_metadata({"flowhelpers": said})
        parquet.write_table(table, path)
    with pytest.warns(UserWarning, match="is made again"):
        pd.testing.assert_frame_equal(labels(), first)


def test_what_is_not_on_neuronpedia_is_said_so_and_nobody_is_asked(
    labels: Labels, server: NeuronpediaServer, tmp_path: Path
):
    with pytest.raises(ValueError, match="suite bare is not on Neuronpedia"):
        labels(of=toys.bare_suite())
    with pytest.raises(ValueError, match="1/att of suite bare is not on Neuronpedia"):
        labels("1/res", "1/att")
    assert not server.requests
    assert not kept(tmp_path)


def test_no_sae_is_read_for_its_labels_where_the_row_says_how_large_it_is(
    labels: Labels, suite: Suite
):
    row_of = dataclasses.replace(suite.row, features=toys.RES)
    unread: Any = dict.fromkeys(suite.saes)
    found = labels(of=dataclasses.replace(suite, row=row_of, saes=unread))
    assert len(found) == 3 * (toys.RES + toys.MODULE) // 2


def test_single_features_are_asked_for_one_by_one_with_a_key_or_without(
    suite: Suite, server: NeuronpediaServer
):
    told = {"description": " second\n", "explanationModelName": OPUS}
    more = {"description": "third", "explanationModelName": MINI}
    server.features = {
        "toy-model/1-res/2": {"explanations": [{"description": ""}, told, more]},
        "toy-model/1-res/3": {"explanations": [{"description": "x", "explanationModelName": None}]},
        "toy-model/1-res/4": {"explanations": []},
        "toy-model/1-res/5": {"index": "5"},
    }
    names = ["1/res/2", FeatureId(1, "res", 3), "1/res/4", "1/res/5", "1/res/6", "1/att/0"]
    found = single_labels(suite, names, base_url=server.api)
    assert found.to_dict("list") == {
        "feature": ["1/res/2", "1/res/3"],
        "label": ["second", "x"],
        "label_from": [f"neuronpedia, {OPUS}, {TODAY}", f"neuronpedia, unknown, {TODAY}"],
    }
    assert [request.key for request in server.requests] == [None] * 5  # nobody knows 1/att
    single_labels(suite, ["1/res/2"], key="sk-1", base_url=server.api)
    assert server.requests[-1].key == "sk-1"
    server.key = "another"
    with pytest.raises(PermissionError):
        single_labels(suite, ["1/res/2"], base_url=server.api)
    with pytest.raises(ValueError, match="suite bare is not on Neuronpedia"):
        single_labels(toys.bare_suite(), ["1/res/2"], base_url=server.api)


def test_descriptions_take_them_and_ask_for_no_model(labels: Labels, suite: Suite, tmp_path: Path):
    (tmp_path / "mine.csv").write_text("feature,label\n1/res/2,mine\n", encoding="utf-8")
    own = pd.concat([labels(), read_labels(tmp_path / "mine.csv", suite)])
    names = ["1/res/4", "1/res/2", "1/res/5", "1/att/0", "2/mlp/0"]
    found = describe_features(suite, names, own=own, writes=False)
    assert found["feature"].tolist() == names
    assert found["label"].tolist() == ["1/res about 4", "mine", "", "", "2/mlp about 0"]
    source = f"neuronpedia, {MINI}, {TODAY}"
    assert found["label_from"].tolist() == [source, "mine.csv", "", "", source]
    assert not found[["writes", "active_at"]].any(axis=None)
    with pytest.raises(AssertionError, match="the model was asked for"):
        describe_features(suite, names, own=own)


# Links on every node.


@pytest.fixture
def graph(suite: Suite, tmp_path: Path) -> FlowGraph:
    table = match_table(suite, k=1, cache=tmp_path / "matches")
    of_attention = f"2/res/{toys.COORDINATE[2].index(13)}"
    return flow_graph(suite, ["1/res/5", of_attention], table)


def expected_link(feature: str) -> str:
    layer, module, index = feature.split("/")
    return f"{PAGE}/{layer}-{module}/{index}" if module != "att" else ""


def test_every_node_has_its_link_in_the_graph_and_in_its_file(graph: FlowGraph, tmp_path: Path):
    assert set(graph.nodes["module"]) == {"res", "mlp", "att"}
    assert graph.nodes["link"].tolist() == [expected_link(f) for f in graph.nodes["feature"]]
    labels = pd.DataFrame({"feature": ["1/res/5"], "label": ["x"], "label_from": ["y"]})
    assert labelled(graph, labels).nodes["link"].tolist() == graph.nodes["link"].tolist()
    save_graph(graph, tmp_path / "graph.json")
    saved = json.loads((tmp_path / "graph.json").read_text("utf-8"))
    assert [node["link"] for node in saved["nodes"]] == graph.nodes["link"].tolist()
    assert (
        load_graph(tmp_path / "graph.json").nodes["link"].tolist() == graph.nodes["link"].tolist()
    )


def test_a_graph_saved_without_links_or_with_others_than_of_pages_has_none(
    graph: FlowGraph, tmp_path: Path
):
    path = tmp_path / "graph.json"
    save_graph(graph, path)
    saved = json.loads(path.read_text("utf-8"))
    saved["nodes"][0]["link"] = "javascript:alert(1)"
    path.write_text(json.dumps(saved), encoding="utf-8")
    links = load_graph(path).nodes["link"].tolist()
    assert links == ["", *graph.nodes["link"][1:]]
    for node in saved["nodes"]:
        del node["link"]
    path.write_text(json.dumps(saved), encoding="utf-8")
    assert set(load_graph(path).nodes["link"]) == {""}


def test_nodes_lead_to_their_pages_in_every_picture(graph: FlowGraph):
    links = graph.nodes.loc[graph.nodes["link"] != "", ["feature", "link"]]
    svg = flow_svg(graph, "toy")
    figure = flow_picture(graph, "toy", dict.fromkeys(["1/res/5"], 1.0), "strength")
    for drawn in (flow_picture(graph, "toy"), figure):
        nodes = [trace for trace in drawn.data if trace.mode == "markers+text"]
        texts = [text for trace in nodes for text in trace.text]
        hovers = [text for trace in nodes for text in trace.hovertext]
        assert len(texts) == len(graph.nodes)
        for feature, link in zip(links["feature"], links["link"], strict=True):
            index = feature.rpartition("/")[2]
            assert f'<a href="{link}" target="_blank">{index}</a>' in texts
            (hover,) = (text for text in hovers if text.startswith((f"{feature}<", f"{feature},")))
            assert f"<br>{link}" in hover
        assert sum("<a " in text for text in texts) == len(links)
    for feature, link in zip(links["feature"], links["link"], strict=True):
        group = svg.partition(f'<g id="{feature}">')[2].partition("</g>")[0]
        assert f'<a xlink:href="{link}" target="_blank">' in group
    assert svg.count('<a xlink:href="') == len(links)
    box = [note.text for note in schematic(graph, "1/res/5", "toy").layout.annotations]
    assert sum(f'<a href="{PAGE}/1-res/5" target="_blank">1/res/5</a>' in text for text in box) == 1
    assert sum("<a " in text for text in box) == 3


def test_pictures_of_a_suite_that_is_not_there_hold_no_link(tmp_path: Path):
    bare = toys.bare_suite()
    graph = flow_graph(bare, "1/res/5", match_table(bare, k=1, cache=tmp_path))
    assert set(graph.nodes["link"]) == {""}
    assert "<a " not in flow_svg(graph, "toy")
    assert "<a " not in str(flow_picture(graph, "toy").to_json())
    assert "<a " not in str(schematic(graph, "1/res/5", "toy").to_json())


# The check.


def cosines(asked: dict[str, Any]) -> dict[str, Any]:
    """Features one and two above the one asked for, of cosine 0.75 and 0.5."""
    of = {"model": asked["targetModelId"], "source": asked["targetSourceId"]}
    return {
        "topk_decoder_cossim_features": [
            {"feature": of | {"index": asked["index"] + n}, "cosine_similarity": 1 - n / 4}
            for n in (2, 1)
        ]
    }


@pytest.fixture
def table(suite: Suite, tmp_path: Path) -> pd.DataFrame:
    return match_table(suite, k=2, cache=tmp_path / "matches")


def test_the_check_sets_their_best_beside_ours(
    suite: Suite, table: pd.DataFrame, server: NeuronpediaServer
):
    order = toys.COORDINATE[1]  # feature j of layer 1 descends from feature order[j] of layer 0
    server.cosines = lambda asked: (
        cosines(asked) | ({"topk_decoder_cossim_features": []} if asked["index"] == 7 else {})
    )
    names = [f"1/res/{j}" for j in (0, 7, *(j for j in range(16) if order[j] == j + 1))]
    found = cosine_check(suite, table, names, base_url=server.api)
    assert found["feature"].tolist() == names
    assert found["ours"].tolist() == [f"0/res/{order[int(name[6:])]}" for name in names]
    assert found["cosine"].tolist() == pytest.approx([0.8] * len(names))
    assert found["theirs"].tolist()[0] == "0/res/1"
    assert found.loc[1, ["theirs", "their_cosine"]].isna().all()
    assert found["their_cosine"].dropna().tolist() == [0.75] * (len(names) - 1)
    theirs = found["theirs"].tolist()
    assert found["same"].tolist() == [a == b for a, b in zip(found["ours"], theirs, strict=True)]
    body = server.requests[0].body
    assert (body["modelId"], body["source"], body["index"]) == ("toy-model", "1-res", 0)
    assert (body["targetModelId"], body["targetSourceId"]) == ("toy-model", "0-res")
    assert len(server.requests) == len(names)


def test_the_check_tells_the_same_from_another_and_from_none(
    suite: Suite, table: pd.DataFrame, server: NeuronpediaServer
):
    # The MLP predecessor of 0/res/c is 0/mlp/c where c < 8, and there is none else.
    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        return cosines(asked | {"index": asked["index"] - (asked["index"] % 2 == 0)})

    server.cosines = answer
    names = ["0/res/2", "0/res/3", "0/res/12"]
    found = cosine_check(suite, table, names, module="mlp", base_url=server.api)
    assert found["ours"].fillna("").tolist() == ["0/mlp/2", "0/mlp/3", ""]
    assert found["theirs"].tolist() == ["0/mlp/2", "0/mlp/4", "0/mlp/12"]
    assert found["same"].tolist() == [True, False, False]
    assert found["same"].dtype == bool


def test_the_check_of_nothing_is_an_empty_table(suite: Suite, table: pd.DataFrame):
    found = cosine_check(suite, table, [])
    assert (len(found), found.columns[0]) == (0, "feature")


@pytest.mark.parametrize(
    ("feature", "module", "said"),
    [
        ("1/res/5", "att", "1/att of suite bare is not on Neuronpedia"),
        ("0/res/5", "res", "no match back of 0/res/5 at res"),
        ("1/mlp/5", "mlp", "no match back of 1/mlp/5 at mlp"),
        ("1/res/99", "res", "no feature 1/res/99"),
    ],
)
def test_what_cannot_be_checked_is_named_before_anybody_is_asked(
    suite: Suite,
    table: pd.DataFrame,
    server: NeuronpediaServer,
    feature: str,
    module: str,
    said: str,
):
    with pytest.raises(ValueError, match=said):
        cosine_check(suite, table, ["1/res/1", feature], module=module, base_url=server.api)
    with pytest.raises(ValueError, match="suite bare is not on Neuronpedia"):
        cosine_check(toys.bare_suite(), table, ["1/res/1"], base_url=server.api)
    renamed = dataclasses.replace(suite, row=dataclasses.replace(suite.row, name="other"))
    with pytest.raises(ValueError, match="a match table of bare: expected one of other"):
        cosine_check(renamed, table, ["1/res/1"], base_url=server.api)
    assert not server.requests


# The notebooks' cells that ask, each run by itself.


def run_cell(notebook: str, name: str, **given: Any) -> dict[str, Any]:
    """What a cell leaves behind; what it displays is `shown`."""
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if cell.id == name)
    shown: list[Any] = []
    space = {"np": np, "pd": pd, "display": shown.append, "shown": shown} | given
    exec(source, space)
    return space


@pytest.fixture
def elsewhere(suite: Suite, table: pd.DataFrame, server: NeuronpediaServer) -> Callable[..., Any]:
    """Runs the cell of notebook 01 that asks for cosines, at layer 1 of the suite."""
    server.cosines = cosines
    back = table[(table["direction"] == "backward") & (table["rank"] == 1)]
    found = back[(back["layer"] == 1) & (back["module"] == "res")]
    given = {"here": Site(1, "res"), "origin": Site(0, "res"), "matches": table, "found": found}
    given["run"] = SimpleNamespace(table=lambda name, made: made)
    given["cosine_check"] = partial(cosine_check, base_url=server.api)

    def elsewhere(check_cossim: int, of: Suite = suite) -> list[Any]:
        given_now = given | {"loaded": of, "check_cossim": check_cossim}
        return run_cell("01_matching", "cosines-elsewhere", **given_now)["shown"]

    return elsewhere


@pytest.mark.parametrize("n", [1, 5, 99])
def test_the_notebook_asks_for_as_many_cosines_as_it_was_told(
    elsewhere: Callable[..., Any],
    server: NeuronpediaServer,
    capsys: pytest.CaptureFixture[str],
    n: int,
):
    (shown,) = elsewhere(n)
    n = min(n, toys.RES)
    assert len(shown) == shown["feature"].nunique() == len(server.requests) == n
    assert (
        f"the same best match for {shown['same'].sum()} of {n} features" in capsys.readouterr().out
    )


def test_the_notebook_asks_nobody_unless_told_and_where_nobody_can_be_asked(
    elsewhere: Callable[..., Any], server: NeuronpediaServer, capsys: pytest.CaptureFixture[str]
):
    assert elsewhere(0) == []
    assert capsys.readouterr().out.count("\n") == 1
    assert elsewhere(3, of=toys.bare_suite()) == []
    said = "Neuronpedia was not asked: 1/res and 0/res of bare are not both there\n"
    assert capsys.readouterr().out == said
    assert not server.requests
    server.key = "another"
    assert elsewhere(3) == []
    assert "Neuronpedia gave no answer: " in capsys.readouterr().out


@pytest.mark.parametrize("fetch", [False, True])
@pytest.mark.parametrize("mine", [False, True])
def test_the_notebook_fetches_labels_if_told_and_ones_own_come_before_them(
    suite: Suite, server: NeuronpediaServer, tmp_path: Path, fetch: bool, mine: bool
):
    path = tmp_path / "mine.csv"
    path.write_text("feature,label\n1/res/2,mine\n", encoding="utf-8")
    ask = partial(neuronpedia_labels, base_url=server.datasets, folder=tmp_path / "cache")
    given = {"loaded": suite, "fetch_labels": fetch, "labels": str(path) if mine else None}
    given |= {"neuronpedia_labels": ask, "read_labels": read_labels}
    own = run_cell("02_flow_graphs", "known-labels", **given)["own_labels"]
    assert bool(server.requests) == fetch
    found = describe_features(suite, ["1/res/2", "1/res/4"], own=own, writes=False)[
        "label"
    ].tolist()
    fetched = ["1/res about 2", "1/res about 4"] if fetch else ["", ""]
    assert found == (["mine", fetched[1]] if mine else fetched)


def test_the_first_notebook_asks_for_labels_of_the_features_it_shows_and_no_others(
    suite: Suite, table: pd.DataFrame, server: NeuronpediaServer
):
    source = f"0/res/{toys.COORDINATE[1][4]}"
    server.features = {
        f"toy-model/{name.replace('/', '-', 1)}": {"explanations": [{"description": f"on {name}"}]}
        for name in ("1/res/4", source)
    }
    given = {"loaded": suite, "here": Site(1, "res"), "matches": table}
    given |= {"flow_graph": flow_graph, "labelled": labelled, "schematic": schematic}
    given |= {"single_labels": partial(single_labels, base_url=server.api)}
    given |= {"describe": partial(describe_features, writes=False)}
    given |= {"run": SimpleNamespace(figure=lambda name, figure: figure)}
    given |= {"first": FeatureId(1, "res", 4)}
    space = run_cell("01_matching", "figure-1", fetch_labels=True, **given)
    assert {request.path for request in server.requests} >= {
        f"/api/feature/{name}" for name in server.features
    }
    assert len(server.requests) == 2 + (toys.COORDINATE[1][4] < toys.MODULE)
    shown = space["picture"]("1/res/4")
    texts = [note.text for note in shown.layout.annotations]
    for name in ("1/res/4", source):
        assert sum(text.endswith(f"<br>on {name}") for text in texts) == 1
    server.requests.clear()
    run_cell("01_matching", "figure-1", fetch_labels=False, **given)
    assert not server.requests


@pytest.mark.parametrize("embed", [False, True])
def test_the_notebook_shows_a_features_page_on_request_only(
    suite: Suite, capsys: pytest.CaptureFixture[str], embed: bool
):
    given = {"feature_page": feature_page, "feature_embed": feature_embed, "IFrame": IFrame}
    given |= {"embed": embed, "loaded": suite}
    shown = run_cell("02_flow_graphs", "on-neuronpedia", chosen="1/res/5", **given)["shown"]
    assert [frame.src for frame in shown] == [feature_embed(suite, "1/res/5")] * embed
    assert capsys.readouterr().out == f"1/res/5: {PAGE}/1-res/5\n"
    shown = run_cell("02_flow_graphs", "on-neuronpedia", chosen="1/att/5", **given)["shown"]
    assert shown == []
    assert "no page" in capsys.readouterr().out
