"""Labels come once from Neuronpedia's export and then from disk; a check asks it for matches."""

import dataclasses
import logging
import traceback
from collections.abc import Iterator
from datetime import date
from functools import cache
from pathlib import Path
from ssl import create_default_context
from typing import Any

import pandas as pd
import pytest
import toys
from neuronpedia_server import MINI, MODEL, OPUS, Fault, NeuronpediaServer, packed, row
from tenacity import wait_none

from flowhelpers.core.features import FeatureId, Site
from flowhelpers.labels import neuronpedia
from flowhelpers.labels.describe import describe_features
from flowhelpers.labels.neuronpedia import TRIES, cosine_check, feature_page, neuronpedia_labels
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite

KEY = "sk-np-Secret0123456789abcdef"
TODAY = date.today().isoformat()
WIDTHS = {"mlp": 8, "res": 16}


def from_(explainer: str) -> str:
    return f"neuronpedia, {explainer}, {TODAY}"


@pytest.fixture
def suite() -> Suite:
    """A suite whose stream and MLP are on Neuronpedia."""
    bare = toys.bare_suite()
    sites = [site for site in bare.saes if site.module != "att"]
    names = {site: f"{MODEL}/{site.layer}-{site.module}" for site in sites}
    return dataclasses.replace(bare, row=dataclasses.replace(bare.row, neuronpedia=names))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[NeuronpediaServer]:
    """In Neuronpedia's place, with labels of features 0, 2, 4 … in two files for each SAE."""
    certificates = cache(lambda **_: create_default_context())
    monkeypatch.setattr("httpx2._transports.default.create_ssl_context", certificates)
    monkeypatch.setattr(neuronpedia._ask.retry, "wait", wait_none())
    monkeypatch.setenv("FLOWHELPERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    with NeuronpediaServer() as server:
        monkeypatch.setattr(neuronpedia, "API", server.address)
        monkeypatch.setattr(neuronpedia, "EXPORT", f"{server.address}/v1")
        widths = {f"{n}-{module}": wide for n in range(3) for module, wide in WIDTHS.items()}
        for source, width in widths.items():
            lines = [row(str(i), f" {source} about {i}\n", source) for i in range(0, width, 2)]
            server.batches[source] = [packed(*lines[:3]), packed(*lines[3:])]
        yield server


def test_a_feature_has_a_page_where_its_sae_has_a_name(suite: Suite):
    page = "https://www.neuronpedia.org/toy-model/1-res/5"
    assert feature_page(suite, "1/res/5") == feature_page(suite, FeatureId(1, "res", 5)) == page
    assert feature_page(suite, "1/att/5") is None
    assert feature_page(toys.bare_suite(), "1/res/5") is None


def test_all_labels_of_a_suite_come_once_and_without_the_key(
    suite: Suite, server: NeuronpediaServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    table = neuronpedia_labels(suite)
    expected = [
        (f"{n}/{module}/{i}", f"{n}-{module} about {i}", from_(MINI))
        for n in range(3)
        for module, width in WIDTHS.items()
        for i in range(0, width, 2)
    ]
    assert table.columns.tolist() == ["feature", "label", "label_from"]
    assert list(table.itertuples(index=False, name=None)) == expected
    assert len({asked.path for asked in server.requests}) == len(server.requests) == 6 * 3
    assert {asked.key for asked in server.requests} == {None}
    monkeypatch.setattr(neuronpedia, "date", None)  # the date is that of the download
    part = neuronpedia_labels(suite, [Site(2, "mlp"), "1/res"])
    assert part["feature"].str[:5].unique().tolist() == ["2/mlp", "1/res"]
    assert part["label_from"].unique().tolist() == [from_(MINI)]
    assert len(server.requests) == 6 * 3


def test_of_several_explanations_the_commonest_explainers_last_is_taken(
    suite: Suite, server: NeuronpediaServer
):
    lines = [
        ("0", "m0", MINI), ("1", "m1 old", MINI), ("2", "o2", OPUS), ("1", "m1 new", MINI),
        ("0", "o0", OPUS), ("5", " ", OPUS), (3, "“数字”\u2028 🧠", MINI), ("04", "x4", None),
        ("6", None, OPUS), ("6", "", OPUS),
    ]  # fmt: skip
    rows = [row(index, label, "1-res", who) for index, label, who in lines]
    server.batches["1-res"] = [packed(*rows[:4]), packed(*rows[4:])]
    table = neuronpedia_labels(suite, ["1/res"])
    assert table["feature"].tolist() == [f"1/res/{i}" for i in range(5)]
    assert table["label"].tolist() == ["m0", "m1 new", "o2", "“数字”\u2028 🧠", "x4"]
    assert table["label_from"].tolist() == [*map(from_, [MINI, MINI, OPUS, MINI, "unknown"])]
    equal = [row("0", label, "2-res", label[0]) for label in ("b0", "a0")]
    server.batches["2-res"] = [packed(*equal)]
    assert neuronpedia_labels(suite, ["2/res"])["label"].tolist() == ["a0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row("99", "x", "1-res"), "1-res has features beyond the 16 of 1/res"),
        (row("-1", "x", "1-res"), "the same SAE"),
        (row("4", "x", "2-res"), "1-res has rows of toy-model/2-res"),
        (row("four", "x", "1-res"), "four"),
    ],
)
def test_an_export_of_another_sae_is_an_error(
    suite: Suite, server: NeuronpediaServer, line: dict[str, Any], message: str
):
    server.batches["1-res"].append(packed(row("3", "fine", "1-res"), line))
    with pytest.raises(ValueError, match=message):
        neuronpedia_labels(suite, ["1/res"])


def test_an_sae_that_the_export_lacks_is_left_out_with_a_warning(
    suite: Suite, server: NeuronpediaServer
):
    there = server.batches.pop("0-mlp")
    with pytest.warns(UserWarning, match="0/mlp is without labels: the export has nothing of"):
        assert len(neuronpedia_labels(suite)) == 3 * 8 + 2 * 4
    server.batches["0-mlp"] = there
    assert len(neuronpedia_labels(suite)) == 3 * (8 + 4)
    with pytest.raises(ValueError, match="1/att of bare is not on Neuronpedia"):
        neuronpedia_labels(suite, ["1/att"])
    with pytest.warns(UserWarning, match="no SAE of suite bare is on Neuronpedia"):
        assert neuronpedia_labels(toys.bare_suite()).empty


FAULTS = {
    "429": Fault(429),
    "503": Fault(503),
    "refused": Fault(keep=-1),
    "cut": Fault(keep=40),
    "cut gzip": Fault(body=packed({"index": "1"})[:-9]),
    "broken gzip": Fault(body=b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_passes_is_tried_again_and_patience_ends(
    suite: Suite, server: NeuronpediaServer, fault: Fault
):
    server.faults["1-res/explanations/batch-1.jsonl.gz"] = [fault] * 2
    unpacked = Fault(headers={"Content-Encoding": "gzip"})  # by the connection
    server.faults["1-res/explanations/batch-0.jsonl.gz"] = [unpacked]
    assert len(neuronpedia_labels(suite, ["1/res"])) == 8
    assert len(server.requests) == 5
    server.faults["2-res/explanations/batch-1.jsonl.gz"] = [fault] * 50
    with pytest.raises(ConnectionError, match=r"2-res/explanations/batch-1\.jsonl\.gz: "):
        neuronpedia_labels(suite)
    assert len(server.requests) == 5 + 4 * 3 + 1 + TRIES
    server.faults.clear()
    assert len(neuronpedia_labels(suite)) == 3 * (8 + 4)
    assert len(server.requests) == 5 + 4 * 3 + 1 + TRIES + 3  # what was whole by then was kept


@pytest.fixture
def table(suite: Suite, tmp_path: Path) -> pd.DataFrame:
    return match_table(suite, k=2, cache=tmp_path / "matches")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 302, 200])
def test_the_key_is_in_no_message_no_log_and_no_file(
    suite: Suite,
    server: NeuronpediaServer,
    table: pd.DataFrame,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", f" {KEY}\n")
    fault = Fault(status, body=b"<Bad key {key}>", keep=None if status != 500 else -1)
    server.faults["/cossim"] = [fault] * 10
    server.cosines = lambda asked: {}
    with pytest.raises((ValueError, ConnectionError)) as error:
        cosine_check(suite, table, ["1/res/4"])
    assert ("give another key" in str(error.value)) == (status in (401, 403))
    assert server.requests[0].key == KEY
    shown = str(error.value) + repr(error.value) + "".join(traceback.format_exception(error.value))
    assert caplog.records
    assert KEY.lower() not in (shown + caplog.text + "".join(capfd.readouterr())).lower()
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in files


@pytest.mark.parametrize("wrong", ["two words", "Schlüssel", "line\nbreak"])
def test_what_can_be_no_key_is_not_quoted(
    suite: Suite, table: pd.DataFrame, wrong: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", wrong)
    with pytest.raises(ValueError, match="that no key has") as error:
        cosine_check(suite, table, ["1/res/4"])
    assert wrong not in str(error.value)


def neighbours(spelling: int, asked: dict[str, Any], *shifts: int) -> dict[str, Any]:
    """Features that lie so far above the one asked for, the last of them nearest."""
    many, value = [*neuronpedia.COSINES.items()][spelling]
    of = {"model": asked["targetModelId"], "source": asked["targetSourceId"]}
    found = [of | {"index": asked["index"] + n} for n in shifts]
    return {many: [{"feature": feature, value: 0.25 + i / 4} for i, feature in enumerate(found)]}


@pytest.mark.parametrize("spelling", [0, 1])
def test_the_check_sets_their_best_beside_ours_and_tells_the_same_from_another_and_from_none(
    suite: Suite, table: pd.DataFrame, server: NeuronpediaServer, spelling: int
):
    # The MLP predecessor of 0/res/c is 0/mlp/c where c < 8, and there is none else.
    shifts = {2: [5, 0], 3: [1], 7: [], 12: [0]}
    server.cosines = lambda asked: neighbours(spelling, asked, *shifts[asked["index"]])
    found = cosine_check(suite, table, [f"0/res/{c}" for c in shifts], module="mlp")
    assert found["ours"].fillna("").tolist() == ["0/mlp/2", "0/mlp/3", "0/mlp/7", ""]
    assert found["cosine"].tolist()[:3] == pytest.approx([1.0] * 3)
    assert found["theirs"].fillna("").tolist() == ["0/mlp/2", "0/mlp/4", "", "0/mlp/12"]
    assert found["their_cosine"].fillna(0).tolist() == [0.5, 0.25, 0, 0.25]
    assert found["same"].tolist() == [True, False, False, False]
    source = {"modelId": MODEL, "source": "0-res", "index": 2}
    target = {"targetModelId": MODEL, "targetSourceId": "0-mlp"}
    assert server.requests[0].body == source | target
    found = cosine_check(suite, table, ["1/res/2"])  # of the stream, from the layer before
    assert found["ours"].tolist() == [f"0/res/{toys.COORDINATE[1][2]}"]
    assert found["cosine"].tolist() == pytest.approx([0.8])


@pytest.mark.parametrize(
    "reply",
    [
        {"values": [], "indices": []},
        [[1, 0.5]],
        {"topk_decoder_cossim_features": None},
        {"topk_decoder_cossim_features": [{"index": 3, "cosine": 1}]},
        neighbours(0, {"targetModelId": MODEL, "targetSourceId": "2-res", "index": 1}, 1),
    ],
)
def test_neighbours_of_another_form_or_sae_are_an_error(
    suite: Suite, table: pd.DataFrame, server: NeuronpediaServer, reply: Any
):
    server.cosines = lambda asked: reply
    with pytest.raises(ValueError, match=r"no known form|not of toy-model"):
        cosine_check(suite, table, ["1/res/0"])


@pytest.mark.parametrize(
    ("feature", "module", "said"),
    [
        ("1/res/5", "att", "1/att of bare is not on Neuronpedia"),
        ("0/res/5", "res", "no match back of 0/res/5 at res"),
        ("1/mlp/5", "mlp", "no match back of 1/mlp/5 at mlp"),
    ],
)
def test_what_cannot_be_checked_is_named(
    suite: Suite, table: pd.DataFrame, server: Any, feature: str, module: str, said: str
):
    with pytest.raises(ValueError, match=said):
        cosine_check(suite, table, [feature], module=module)
    renamed = dataclasses.replace(suite, row=dataclasses.replace(suite.row, name="other"))
    with pytest.raises(ValueError, match="a match table of bare: expected one of other"):
        cosine_check(renamed, table, ["1/res/1"])
    assert not server.requests


def test_of_several_labels_of_a_feature_the_last_is_shown(
    planted: Suite, server: NeuronpediaServer
):
    named = dataclasses.replace(planted.row, neuronpedia={Site(1, "res"): f"{MODEL}/1-res"})
    suite = dataclasses.replace(planted, row=named)
    mine = pd.DataFrame({"feature": ["1/res/2"], "label": ["mine"], "label_from": ["mine.csv"]})
    both = pd.concat([neuronpedia_labels(suite), mine])
    found = describe_features(suite, ["1/res/2", "1/res/4", "1/res/5"], user_labels=both)
    assert found["label"].tolist()[:2] == ["mine", "1-res about 4"]
    assert found["label_from"].tolist() == ["mine.csv", from_(MINI), "logit lens"]
