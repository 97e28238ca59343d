"""The index holds what the match table says, found by place, and the page holds the index."""

import gzip
import json
import re
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import toys

from flowhelpers import explorer_index as index_module
from flowhelpers import explorer_reading
from flowhelpers.activations.corpora import passages
from flowhelpers.activations.sparse import collect
from flowhelpers.core.cache import read_arrays, write_arrays
from flowhelpers.core.features import FeatureId
from flowhelpers.explorer import write_page
from flowhelpers.explorer_index import FlowIndex, flow_index, index_matches
from flowhelpers.explorer_page import explorer_page
from flowhelpers.flow.graph import flow_graph
from flowhelpers.flow.lifespans import feature_lifespans, flow_by_layer
from flowhelpers.labels.describe import subject_scores, top_contexts, top_logit_tokens
from flowhelpers.matching.scores import classify, feature_scores
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite

WIDTH, LAYERS = toys.RELATED


@pytest.fixture(scope="module")
def random_suite() -> Suite:
    return toys.related_suite()


@pytest.fixture(scope="module")
def table(random_suite: Suite) -> pd.DataFrame:
    return match_table(random_suite, 5)


@pytest.fixture(scope="module")
def found(random_suite: Suite, table: pd.DataFrame, tmp_path_factory: Any) -> FlowIndex:
    widths = {site: WIDTH for site in sorted(random_suite.saes)}
    path = tmp_path_factory.mktemp("index") / "some.arrow"
    write_arrays(path, *index_matches(table, widths))
    return FlowIndex(*read_arrays(path))


@pytest.fixture(scope="module")
def read(planted: Suite) -> FlowIndex:
    return flow_index(planted)


def names(table: pd.DataFrame) -> list[str]:
    return [f"{row.layer}/res/{row.feature}" for row in table.itertuples()]


def test_each_match_of_the_table_is_found_at_its_place(found: FlowIndex, table: pd.DataFrame):
    held = 0
    for (direction, layer, module), part in table.groupby(
        ["direction", "layer", "module"], observed=True
    ):
        chooser, other = ("feature", "source")[:: 1 if direction == "backward" else -1]
        for index, rows in part.sort_values("rank").groupby(chooser):
            chosen = found.choices(str(direction), layer, str(module), index)
            assert chosen["to"] == rows[other].tolist()
            assert chosen["score"] == pytest.approx(rows["score"].tolist(), abs=1e-4)
            assert chosen["mutual"] == rows["mutual"].iloc[0]
            held += len(rows)
        block = found.about["blocks"][f"{direction} {layer} {module}"]
        assert block["null"] == pytest.approx(part["null"].iloc[0], abs=1e-4)
    assert held == len(table) == len(found.arrays["other"])


def test_classes_births_and_lives_are_those_of_the_table(found: FlowIndex, table: pd.DataFrame):
    classes = classify(feature_scores(table))
    spans = feature_lifespans(table).set_index(["layer", "feature"])
    for row, name in zip(classes.itertuples(), names(classes), strict=True):
        record = found.record(found.feature(name))
        assert record["class"] == row[classes.columns.get_loc("class") + 1]
        assert record["life"] == spans.loc[(row.layer, row.feature), ["first", "last"]].tolist()
    by_layer, bars = flow_by_layer(table), found.about["overview"]
    for kind in index_module.CLASSES:
        assert bars["class"][kind] == (by_layer[kind] * WIDTH).round().astype(int).tolist()
    for module in ("mlp", "att"):
        assert bars["born"][module] == (by_layer[f"born_{module}"] * WIDTH).round().tolist()
    assert np.sum([*bars["life"].values()], axis=0).tolist() == [WIDTH] * LAYERS


@pytest.mark.parametrize(("view", "value"), [("class", "newborn"), ("born", "mlp"), ("life", "1")])
def test_a_bar_lists_as_many_features_as_it_counts(found: FlowIndex, view: str, value: str):
    counts = found.about["overview"][view][value]
    assert sum(counts)
    for layer, count in zip(found.about["layers"], counts, strict=True):
        listed = found.listed(view, layer, value)
        assert len(listed) == count
        for name in listed:
            record = found.record(found.feature(name))
            lived = record["life"][1] - record["life"][0] + 1
            assert {"class": record["class"], "born": record.get("born"), "life": str(lived)}[
                view
            ] == value


@pytest.mark.parametrize("seed", ["2/res/7", "0/res/3", "4/res/39", "1/mlp/5", "3/att/11"])
def test_the_neighbourhood_is_the_flow_graph_and_all_it_chose(
    random_suite: Suite, found: FlowIndex, table: pd.DataFrame, seed: str
):
    near = found.neighbourhood([found.feature(seed)])
    graph = flow_graph(random_suite, seed, table)
    whole = {name for name, record in near.items() if "on" in record}
    assert whole == {*graph.chain["feature"], seed}
    assert {*graph.nodes["feature"]} <= {*near}
    for name in whole:
        record, layer = near[name], int(name.split("/")[0])
        for module, chosen in record.get("back", {}).items():
            sources = {f"{layer - (module == 'res')}/{module}/{i}" for i in chosen["to"]}
            assert sources <= {*near}


def test_the_index_is_kept_and_knows_no_other_features(
    planted: Suite, read: FlowIndex, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(index_module, "match_table", None)  # made once
    assert flow_index(planted).about == read.about
    labels = pd.DataFrame({"feature": ["1/res/2"], "label": ["<b>rain</b>"], "label_from": ["me"]})
    mine = flow_index(planted, labels=labels)
    assert mine.record(mine.feature("1/res/2"))["label"] == "<b>rain</b>"
    assert mine.search("RAIN") == ["1/res/2"]
    assert mine.search("nothing at all") == []
    with pytest.raises(ValueError, match=r"1/res has features 0 to 15"):
        read.feature("1/res/16")
    with pytest.raises(ValueError, match="no SAE at 9/res"):
        read.feature("9/res/1")


def test_what_was_read_is_what_labels_says(planted: Suite, read: FlowIndex):
    texts = passages()
    activations = collect(planted, texts["text"].tolist(), None, toys.CONTEXT)
    names = [*dict.fromkeys(texts["subject"])]
    tokens = read.about["tokens"]
    checked = 0
    for site in sorted(planted.saes):
        of = texts["subject"].to_numpy()
        scores = [
            subject_scores(activations, site, of == name, np.ones(len(of), bool))["auc"]
            for name in names
        ]
        for i in range(0, planted.sae(site).width, 3):
            feature = FeatureId(site.layer, site.module, i)
            record, values = read.record(feature), activations.of(feature)
            contexts = top_contexts(planted, feature, activations, 3)
            assert record["rate"] == pytest.approx((values > 0).mean(), rel=0.01)
            assert [c[1] for c in record["contexts"]] == pytest.approx(
                contexts["activation"].tolist(), rel=0.01
            )
            for peak, active, near in record["contexts"]:
                assert values[peak] == pytest.approx(active, rel=0.01)
                for by, share in zip(near[::2], near[1::2], strict=True):
                    there = values[peak + by] / values[peak]
                    same = activations.tokens["text"].iloc[[peak, peak + by]].nunique() == 1
                    assert share == pytest.approx(100 * min(there, 1), abs=0.51)
                    checked += same
            if record["contexts"]:
                column, at = [one[i] for one in scores], read.place(feature)
                assert read.arrays["auc"][at] == pytest.approx(max(column), abs=1e-3)
                is_above = max(column) > read.arrays["chance"][at]
                best = names[int(np.argmax(column))] if is_above else None
                assert record.get("subject") == best
            assert record["writes"] == top_logit_tokens(planted, feature, 8)["token"].tolist()
            thresholds = planted.sae(site).thresholds
            assert thresholds is not None
            assert record["theta"] == pytest.approx(float(thresholds[i]), rel=1e-4)
            if "groups" in record:
                assert sum(record["groups"]) == pytest.approx(1, abs=0.01)
    assert checked > 100
    assert len(tokens) == len(activations.tokens)


def test_a_subject_is_told_only_above_what_shuffled_subjects_give():
    topics = np.repeat(["sea", "war", "space"], 24)
    names, generator = ["sea", "war", "space"], np.random.default_rng(0)
    means = generator.random((72, 400)) * (generator.random((72, 400)) < 0.3)
    means[topics == "war", 5] += 1
    means[:, 6] = 0  # never active
    part = explorer_reading._blank(400)
    explorer_reading._subjects(part, means, pd.Series(topics), names)
    assert part["subject"][5] == 1
    assert part["auc"][5] == 1
    assert part["subject"][6] == -1
    told = part["subject"] >= 0
    assert told.sum() <= 10  # of 399 at random, at one in 201 each
    assert (told == (part["auc"] > part["chance"])).all()
    assert 0.6 < np.median(part["chance"]) < 0.8


def test_a_subject_is_found_through_features_that_stand_for_it(
    planted: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def stand(suite: Any, activations: Any, topics: Any, matches: pd.DataFrame) -> pd.DataFrame:
        assert [*topics] == passages()["subject"].tolist()
        assert {*matches["direction"]} == {"forward", "backward"}
        rows = [("war", "1/res/4", 1), ("war", "1/res/2", 0), ("war", "2/res/9", 1)]
        return pd.DataFrame(rows, columns=["subject", "feature", "passes"])

    monkeypatch.setattr(explorer_reading, "subject_features", stand)
    made = flow_index(planted, cache=tmp_path)
    assert made.search("War") == ["1/res/4", "2/res/9"]
    assert made.search("sea") == []
    assert [*made.about["subjects"]] == [*dict.fromkeys(passages()["subject"])]


def test_direct_matches_skip_the_layers_between(planted: Suite, read: FlowIndex):
    rows = {at: planted.sae(f"{at}/res").directions for at in range(3)}
    for i in range(toys.RES):
        record = read.record(FeatureId(2, "res", i))
        cosines = rows[2][i] @ rows[0].T
        layer, to, score = record["direct"][0]
        assert (layer, to) == (0, int(cosines.argmax()))
        assert score == pytest.approx(float(cosines.max()), abs=1e-4)
        assert [at for at, _, _ in record["direct"]] == [0, 1]


def unpacked(page: str) -> dict[str, Any]:
    records = re.search(r'id="records">([^<]*)<', page)
    assert records
    return json.loads(gzip.decompress(b64decode(records[1])))


def test_a_page_holds_all_of_a_small_suite_and_asks_nothing_of_the_network(read: FlowIndex):
    page = explorer_page(read, read.everything(), [])
    held = unpacked(page)
    assert held["about"]["whole"]
    assert held["records"] == json.loads(json.dumps(read.everything()))
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


def test_a_page_of_a_large_suite_holds_what_is_near_and_says_so(
    planted: Suite, read: FlowIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(index_module, "SMALL", 10)
    path, seeds = tmp_path / "page.html", ["1/res/3", "2/mlp/4"]
    with pytest.raises(ValueError, match="too large for one page: name the features"):
        write_page(planted, [], path)
    assert f"what is near {', '.join(seeds)}, not all" in write_page(planted, seeds, path)
    held = unpacked(path.read_text("utf-8"))
    assert held["about"]["seeds"] == seeds
    assert not held["about"]["whole"]
    near = read.neighbourhood(map(read.feature, seeds))
    assert {*held["records"]} >= {*near}
    assert [*map(tuple, held["records"]["1/res/3"]["direct"])] == near["1/res/3"]["direct"]
    assert "writes" not in held["records"]["1/res/3"]
    write_page(planted, seeds, path, writes=True)
    assert all(
        record["writes"] == read.record(read.feature(name))["writes"]
        for name, record in unpacked(path.read_text("utf-8"))["records"].items()
    )
    monkeypatch.setattr("flowhelpers.explorer_page.LARGEST", 1_000_000)
    path.unlink()
    with pytest.raises(ValueError, match="more than 1: name fewer"):
        write_page(planted, seeds, path)
    assert not path.exists()


def test_matches_out_of_order_are_refused(table: pd.DataFrame, random_suite: Suite):
    widths = {site: WIDTH for site in sorted(random_suite.saes)}
    with pytest.raises(ValueError, match="not in order of their ranks"):
        index_matches(table.sample(frac=1, random_state=0), widths)


def test_a_larger_suite_has_contexts_from_what_is_given(
    planted: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(index_module, "SMALL", 10)
    bare = flow_index(planted, cache=tmp_path)
    assert "rate" not in bare.arrays
    activations = collect(planted, toys.TEXTS, ["1/res", "2/res"])
    some = flow_index(planted, activations, cache=tmp_path)
    assert some.record(FeatureId(1, "res", 0)).keys() >= {"rate", "contexts"}
    assert "rate" not in some.record(FeatureId(1, "mlp", 0))
    assert "writes" not in some.arrays
    assert replace(some, labels={}).search("war") == []


def test_a_truncated_file_is_made_again(
    planted: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(index_module, "SMALL", 10)  # of its matches alone
    made = flow_index(planted, cache=tmp_path)
    records = made.everything()
    (file,) = (tmp_path / "explorer").iterdir()
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="is made again"):
        again = flow_index(planted, cache=tmp_path)
    assert again.about == made.about
    assert again.everything() == records
