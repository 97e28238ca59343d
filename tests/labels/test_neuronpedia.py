"""Labels of a whole SAE come once from Neuronpedia's export, and then from disk."""

import json
import logging
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx2
import pandas as pd
import pyarrow.parquet as parquet
import pytest
from neuronpedia_server import (
    MINI,
    MODEL,
    OPUS,
    SOURCE,
    Fault,
    NeuronpediaServer,
    be_quick,
    packed,
    row,
)

from flowhelpers.core.features import Site
from flowhelpers.labels import neuronpedia
from flowhelpers.labels.describe import describe_features
from flowhelpers.labels.neuronpedia import (
    bulk_labels,
    cosine_neighbours,
    embed,
    feature_info,
    page,
    source_of,
)
from flowhelpers.suites.load import Suite

KEY = "sk-np-Secret0123456789abcdef"
TODAY = date.today().isoformat()
SITE = Site(12, "res")
WIDTH = 40
BATCH = "batch-{}.jsonl.gz"
Labels = Callable[..., pd.DataFrame]


@pytest.fixture(scope="module")
def running() -> Iterator[NeuronpediaServer]:
    with NeuronpediaServer() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, no key about, and the certificates read once."""
    be_quick(monkeypatch)


@pytest.fixture
def server(running: NeuronpediaServer) -> NeuronpediaServer:
    """The server, with an export of 40 features in ten files."""
    running.reset()
    running.batches = {
        n: packed(*(row(str(i), f" about {i}\n") for i in range(4 * n, 4 * n + 4)))
        for n in range(10)
    }
    return running


@pytest.fixture
def labels(server: NeuronpediaServer, tmp_path: Path) -> Labels:
    """Fetches the labels from the server into a cache of the test's own."""

    def labels(**options: Any) -> pd.DataFrame:
        given: dict[str, Any] = {"base_url": server.datasets, "folder": tmp_path / "cache"}
        width = options.pop("width", WIDTH)
        return bulk_labels(MODEL, SOURCE, SITE, width, **(given | options))

    return labels


def kept(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "neuronpedia" / MODEL / f"{SOURCE}.parquet"


def about(tmp_path: Path) -> dict[str, Any]:
    return json.loads(parquet.read_schema(kept(tmp_path)).metadata[b"flowhelpers"])


def shown(error: BaseException) -> str:
    return str(error) + repr(error) + "".join(traceback.format_exception(error))


# Sources and addresses.


def test_the_source_of_a_site_is_its_modules_pattern_with_the_layer():
    patterns = {"res": "{layer}-gemmascope-res-16k", "mlp": "{layer}-clt-hp"}
    assert source_of(patterns, Site(7, "res")) == "7-gemmascope-res-16k"
    assert source_of(patterns, "0/mlp") == "0-clt-hp"


def test_a_module_without_a_source_or_a_pattern_without_a_layer_is_an_error():
    with pytest.raises(ValueError, match=r"known for 3/att.*valid: res"):
        source_of({"res": "{layer}-x"}, Site(3, "att"))
    with pytest.raises(ValueError, match="'x-res': expected a place for the layer"):
        source_of({"res": "x-res"}, Site(3, "res"))


def test_addresses_are_spelled_as_the_site_has_them():
    start = "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/4230"
    assert page(MODEL, SOURCE, 4230) == start
    assert embed(MODEL, SOURCE, 4230) == (
        f"{start}?embed=true&embedexplanation=true&embedplots=true&embedtest=false"
    )
    full = embed(
        MODEL,
        SOURCE,
        4230,
        explanation=False,
        plots=False,
        test=True,
        activations=True,
        link=False,
        steer=False,
        test_field=True,
        test_text="é & b",
    )
    assert full == (
        f"{start}?embed=true&embedexplanation=false&embedplots=false&embedtest=true"
        "&embedactivations=true&embedlink=false&embedsteer=false&embedtestfield=true"
        "&defaulttesttext=%C3%A9+%26+b"
    )


@pytest.mark.parametrize("model", ["", "../up", "a/b", ".."])
def test_a_name_that_could_leave_its_place_is_refused(model: str, tmp_path: Path):
    with pytest.raises(ValueError, match="the model is"):
        bulk_labels(model, SOURCE, SITE, 4, folder=tmp_path)
    with pytest.raises(ValueError, match="the source is"):
        page(MODEL, model, 0)
    assert list(tmp_path.iterdir()) == []


def test_an_index_below_nothing_is_refused():
    with pytest.raises(ValueError, match="index is -1"):
        page(MODEL, SOURCE, -1)


# The export.


def test_all_labels_come_with_who_explained_them_and_when(labels: Labels):
    table = labels()
    assert table.columns.tolist() == ["feature", "index", "label", "label_from"]
    assert table["index"].tolist() == list(range(WIDTH))
    assert table["feature"].tolist() == [f"12/res/{i}" for i in range(WIDTH)]
    assert table["label"].tolist() == [f"about {i}" for i in range(WIDTH)]
    assert set(table["label_from"]) == {f"neuronpedia, gpt-4o-mini, {TODAY}"}


def test_they_fit_where_ones_own_labels_go(
    server: NeuronpediaServer, planted: Suite, tmp_path: Path
):
    server.batches = {0: packed(row("3", "the third"))}
    own = bulk_labels(MODEL, SOURCE, "1/res", 8, base_url=server.datasets, folder=tmp_path)
    found = describe_features(planted, ["1/res/3", "1/res/4"], own=own).set_index("feature")
    assert found.loc["1/res/3", "label"] == "the third"
    assert found.loc["1/res/3", "label_from"] == f"neuronpedia, gpt-4o-mini, {TODAY}"
    assert found.loc["1/res/4", "label_from"] == "logit lens"


def test_the_second_time_no_network_is_needed(tmp_path: Path):
    with NeuronpediaServer() as server:
        server.batches = {0: packed(row("0", "zero"))}
        given: dict[str, Any] = {"base_url": server.datasets, "folder": tmp_path}
        first = bulk_labels(MODEL, SOURCE, SITE, 2, **given)
    pd.testing.assert_frame_equal(bulk_labels(MODEL, SOURCE, SITE, 2, **given), first)
    with pytest.raises(ConnectionError, match="the connection failed"):
        bulk_labels(MODEL, SOURCE, SITE, 2, refresh=True, **given)
    pd.testing.assert_frame_equal(bulk_labels(MODEL, SOURCE, SITE, 2, **given), first)


def test_every_file_is_fetched_once_and_then_none(labels: Labels, server: NeuronpediaServer):
    labels()
    assert [server.asked(n) for n in range(10)] == [1] * 10
    asked = len(server.requests)
    assert asked <= 10 + 2 * neuronpedia.AT_ONCE
    labels()
    assert len(server.requests) == asked


def test_a_refresh_fetches_anew(labels: Labels, server: NeuronpediaServer):
    labels()
    server.batches = {0: packed(row("0", "better"))}
    assert labels()["label"][0] == "about 0"
    assert labels(refresh=True)["label"].tolist() == ["better"]
    assert labels()["label"].tolist() == ["better"]


@pytest.mark.parametrize("status", [403, 404])
def test_the_export_ends_where_files_are_not_there(
    labels: Labels, server: NeuronpediaServer, status: int
):
    server.missing = status
    assert len(labels()) == WIDTH


def test_a_source_that_is_not_there_is_an_error_and_leaves_nothing(
    server: NeuronpediaServer, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"no explanations of gemma-2-2b/12-nothing.*batch-0"):
        bulk_labels(MODEL, "12-nothing", SITE, 4, base_url=server.datasets, folder=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_kept_is_one_small_file_with_its_date_and_counts(
    labels: Labels, server: NeuronpediaServer, tmp_path: Path
):
    server.batches[10] = packed(row("3", "other", OPUS))
    labels()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept(tmp_path)]
    assert kept(tmp_path).stat().st_size < 6000
    assert "embedding" not in parquet.read_schema(kept(tmp_path)).names
    said = about(tmp_path)
    assert (said["date"], said["batches"], said["explanations"]) == (TODAY, 11, 41)
    assert (said["features"], said["explained_by"]) == (40, {MINI: 40, OPUS: 1})


def test_a_date_on_disk_is_that_of_the_download(labels: Labels, monkeypatch: pytest.MonkeyPatch):
    class Then(date):
        @classmethod
        def today(cls) -> "Then":
            return cls(2024, 2, 29)

    with monkeypatch.context() as patch:
        patch.setattr(neuronpedia, "date", Then)
        labels()
    assert labels()["label_from"][0] == "neuronpedia, gpt-4o-mini, 2024-02-29"
    assert labels(refresh=True)["label_from"][0] == f"neuronpedia, gpt-4o-mini, {TODAY}"


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "foreign", "of another"])
def test_a_kept_file_that_is_of_no_use_is_made_again(
    labels: Labels, server: NeuronpediaServer, tmp_path: Path, harm: str
):
    first = labels()
    path = kept(tmp_path)
    data = bytearray(path.read_bytes())
    if harm == "flipped":
        data[60] ^= 255
    if harm in ("cut", "flipped", "empty"):
        path.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(harm)])
    elif harm == "foreign":
        pd.DataFrame({"a": [1]}).to_parquet(path)
    else:
        table = parquet.read_table(path)
        said = json.dumps(about(tmp_path) | {"of": "gpt2-small/0-res-jb"})
        parquet.write_table(table.replace_schema_metadata({"flowhelpers": said}), path)
    with pytest.warns(UserWarning, match="is made again"):
        again = labels()
    pd.testing.assert_frame_equal(again, first)
    assert server.asked(0) == 2
    labels()
    assert server.asked(0) == 2


# Several explanations, and none.


def test_of_several_explanations_the_commonest_explainers_last_is_taken(
    labels: Labels, server: NeuronpediaServer
):
    server.batches = {
        0: packed(row("0", "m0"), row("1", "m1 old"), row("2", "o2", OPUS), row("1", "m1 new")),
        1: packed(row("0", "o0", OPUS), row("1", "o1", OPUS), row("3", "m3"), row("4", "x4", None)),
    }
    table = labels()
    assert table["label"].tolist() == ["m0", "m1 new", "o2", "m3", "x4"]
    who = [MINI, MINI, OPUS, MINI, "unknown"]
    assert table["label_from"].tolist() == [f"neuronpedia, {each}, {TODAY}" for each in who]
    asked = len(server.requests)
    table = labels(explained_by=OPUS)
    assert table["label"].tolist() == ["o0", "o1", "o2", "m3", "x4"]
    assert len(server.requests) == asked


def test_explainers_of_equally_many_go_by_name(labels: Labels, server: NeuronpediaServer):
    server.batches = {
        0: packed(
            row("0", "b0", "b"), row("0", "a0", "a"), row("1", "a1", "a"), row("1", "b1", "b")
        )
    }
    assert labels()["label"].tolist() == ["a0", "a1"]


def test_an_explainer_that_has_none_is_an_error_that_names_those_that_have(labels: Labels):
    with pytest.raises(ValueError, match=r"by 'gpt-4o'; did you mean 'gpt-4o-mini'"):
        labels(explained_by="gpt-4o")


def test_missing_and_empty_ones_are_without_label_and_numbers_may_be_text(
    labels: Labels, server: NeuronpediaServer
):
    server.batches = {
        0: packed(row(7, "seven"), row("03", "three"), row("5", " "), b"", row("1", "1"))
    }
    assert labels()["index"].tolist() == [1, 3, 7]
    assert labels()["index"].dtype == "int64"


def test_an_export_of_empty_ones_is_an_empty_table(labels: Labels, server: NeuronpediaServer):
    server.batches = {0: packed(row("0", ""))}
    for _ in range(2):
        table = labels()
        assert table.columns.tolist() == ["feature", "index", "label", "label_from"]
        assert (len(table), table["index"].dtype) == (0, "int64")


def test_labels_in_any_script_come_through(labels: Labels, server: NeuronpediaServer):
    said = "“números” – 数字,\u2028 עברית 🧠\ttab"
    plain = json.dumps(row("1", said), ensure_ascii=False).encode()
    server.batches = {0: packed(row("0", said), plain)}
    assert labels()["label"].tolist() == [said, said]
    assert labels()["label"].tolist() == [said, said]


# What cannot be used.

BAD: dict[str, tuple[Any, str]] = {
    "above": (row("40", "x"), "the index is 40, expected 0 to 39"),
    "below": (row("-1", "x"), "the index is -1, expected 0 to 39"),
    "no number": (row("four", "x"), "the index is 'four', expected a number"),
    "a fraction": (row(4.0, "x"), "the index is 4.0, expected a number"),
    "a bool": (row(True, "x"), "the index is True, expected a number"),
    "far too large": (row("9" * 30, "x"), "expected a number"),
    "not JSON": (b'{"index": "4", "desc', "it is not JSON"),
    "not UTF-8": (b'{"index": "4", "description": "\xff"}', "it is not JSON"),
    "no object": (b'["index"]', "it is a list, expected an object"),
    "no index": ({"modelId": MODEL, "layer": SOURCE, "description": "x"}, "it has no index"),
    "no description": (row("4", None), "it has no description"),
    "a list for text": (row("4", ["x"]), "no valid text"),
    "half a character": (row("4", "\ud800"), "no valid text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_line_that_cannot_be_used_is_named_or_left_out(
    labels: Labels, server: NeuronpediaServer, kind: str
):
    line, said = BAD[kind]
    server.batches[9] = packed(row("36", "good"), line, row("39", "end"))
    for _ in range(2):  # fetched, and from disk
        with pytest.raises(ValueError, match=r"batch 9, line 2: ") as error:
            labels()
        assert said in str(error.value)
        assert "lenient=True" in str(error.value)
    with pytest.warns(UserWarning, match=r"^lines left out: 1\. .*batch 9, line 2"):
        table = labels(lenient=True)
    assert table["index"].tolist() == [*range(37), 39]
    assert server.asked(9) == 1


def test_many_are_counted_and_few_are_told(labels: Labels, server: NeuronpediaServer):
    server.batches = {0: packed(*[b"{"] * 30, row("1", "x"), *[row("99", "x")] * 5)}
    with pytest.warns(UserWarning, match="^lines left out: 35") as caught:
        assert labels(lenient=True)["index"].tolist() == [1]
    assert str(caught[0].message).count(", line ") == 3
    assert "and 32 more" in str(caught[0].message)


def test_the_same_file_for_a_narrower_sae_is_an_error(labels: Labels):
    labels()
    with pytest.raises(ValueError, match=r"batch 9, line 4: the index is 39, expected 0 to 38"):
        labels(width=39)


@pytest.mark.parametrize("hole", [3, 7])
def test_a_file_missing_amid_others_is_told(labels: Labels, server: NeuronpediaServer, hole: int):
    del server.batches[hole]
    with pytest.raises(ValueError, match=f"batch {hole} is missing, batch 9 is there"):
        labels()
    with pytest.warns(UserWarning, match="^lines left out: 1"):
        assert len(labels(lenient=True)) == WIDTH - 4


@pytest.mark.parametrize("field", ["modelId", "layer"])
def test_rows_of_something_else_are_an_error_even_if_lenient(
    labels: Labels, server: NeuronpediaServer, tmp_path: Path, field: str
):
    server.batches[1] = packed(row("4", "x"), row("5", "x", **{field: "other"}))
    with pytest.raises(ValueError, match=r"batch 1, line 2: it is of .*other.*, not of gemma-2-2b"):
        labels(lenient=True)
    assert not kept(tmp_path).exists()


# A bad line.


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429, {"Retry-After": "0.02"}),
        Fault(500),
        Fault(503),
        Fault(keep=-1),
        Fault(keep=40),
        Fault(body=packed(row("1", "x"))[:-20]),
        Fault(body=b""),
        Fault(body=b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff"),
    ],
    ids=["429", "500", "503", "refused", "cut", "gzip cut", "empty", "garbled"],
)
def test_what_passes_is_tried_again(labels: Labels, server: NeuronpediaServer, fault: Fault):
    server.misbehave(BATCH.format(2), fault, fault)
    assert len(labels()) == WIDTH
    assert server.asked(2) == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(500), "answers 500"),
        (Fault(429), "answers 429"),
        (Fault(keep=40), "connection failed"),
        (Fault(body=packed(row("1", "x"))[:-20]), "cut short or broken"),
        (Fault(body=b"<html>log in</html>"), "cut short or broken"),
    ],
)
def test_patience_ends(
    labels: Labels, server: NeuronpediaServer, tmp_path: Path, fault: Fault, said: str
):
    server.misbehave(BATCH.format(2), *[fault] * 50)
    with pytest.raises(ConnectionError, match=rf"batch-2\.jsonl\.gz: .*{said}.*6 of at most 6"):
        labels()
    assert server.asked(2) == neuronpedia.TRIES
    assert not kept(tmp_path).exists()


def test_a_file_that_the_connection_has_unpacked_is_read(labels: Labels, server: NeuronpediaServer):
    server.misbehave(BATCH.format(2), Fault(headers={"Content-Encoding": "gzip"}))
    assert len(labels()) == WIDTH


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_wait_that_a_server_asks_for_is_kept_but_not_a_long_one(
    server: NeuronpediaServer, monkeypatch: pytest.MonkeyPatch, form: str
):
    waits: list[float] = []
    monkeypatch.setattr(neuronpedia.time, "sleep", waits.append)

    def after(seconds: int) -> Fault:
        when = datetime.now(UTC) + timedelta(seconds=seconds)
        said = str(seconds) if form == "seconds" else format_datetime(when, usegmt=True)
        return Fault(429, {"Retry-After": said})

    server.features[f"{MODEL}/{SOURCE}/4"] = {"index": "4"}
    server.misbehave("/4", after(30), Fault(429, {"Retry-After": "soon"}))
    assert feature_info(MODEL, SOURCE, 4, base_url=server.api) == {"index": "4"}
    assert len(waits) == 2
    assert 28 < waits[0] <= 30
    assert waits[1] < 1
    server.misbehave("/4", after(3000))
    with pytest.raises(ConnectionError, match=r"asks to wait for (2999|3000) s \(1 of"):
        feature_info(MODEL, SOURCE, 4, base_url=server.api)
    assert len(waits) == 2


# The site.


def test_a_feature_is_what_the_site_says_with_a_key_or_without(
    server: NeuronpediaServer, monkeypatch: pytest.MonkeyPatch
):
    said = {"modelId": MODEL, "layer": SOURCE, "index": "4230", "explanations": [{"é": 1}]}
    server.features[f"{MODEL}/{SOURCE}/4230"] = said
    assert feature_info(MODEL, SOURCE, 4230, base_url=server.api) == said
    assert feature_info(MODEL, SOURCE, 4230, key=KEY, base_url=server.api + "/") == said
    monkeypatch.setenv("NEURONPEDIA_API_KEY", f" {KEY}2\n")
    assert feature_info(MODEL, SOURCE, 4230, base_url=server.api) == said
    assert feature_info(MODEL, SOURCE, 4230, key=KEY, base_url=server.api) == said
    assert [each.key for each in server.requests] == [None, KEY, f"{KEY}2", KEY]


@pytest.mark.parametrize("body", [None, b"null", b"{}"])
def test_a_feature_that_is_not_there_is_named(server: NeuronpediaServer, body: bytes | None):
    if body:
        server.features[f"{MODEL}/{SOURCE}/4"] = json.loads(body)
    with pytest.raises(ValueError, match=f"has no (feature )?{MODEL}/{SOURCE}/4"):
        feature_info(MODEL, SOURCE, 4, base_url=server.api)


def test_what_is_no_answer_is_an_error(server: NeuronpediaServer):
    for fault in (Fault(body=b"<html>"), Fault(302, {"Location": "http://127.0.0.1:9/"})):
        server.features[f"{MODEL}/{SOURCE}/4"] = {}
        server.misbehave("/4", fault)
        with pytest.raises(ValueError, match=r"127\.0\.0\.1 answers"):
            feature_info(MODEL, SOURCE, 4, base_url=server.api)
    for wrong in ("neuronpedia.org", "http://name:word@host", "ftp://host"):
        with pytest.raises(ValueError, match="base_url is no address") as error:
            feature_info(MODEL, SOURCE, 4, base_url=wrong)
        assert "name:word" not in str(error.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 200])
def test_the_key_is_in_no_message_and_no_log(
    server: NeuronpediaServer,
    status: int,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    caplog.set_level(logging.DEBUG)
    fault = Fault(status, body=b"<Bad key {key}>", keep=None if status != 500 else -1)
    server.misbehave("/4", *[fault] * 10)
    with pytest.raises((ValueError, PermissionError, ConnectionError)) as error:
        feature_info(MODEL, SOURCE, 4, key=KEY, base_url=server.api)
    assert isinstance(error.value, PermissionError) == (status in (401, 403))
    assert server.requests[0].key == KEY
    out, err = capfd.readouterr()
    assert caplog.records
    assert KEY.lower() not in (shown(error.value) + caplog.text + out + err).lower()
    assert error.value.__context__ is None


def test_the_export_is_fetched_without_the_key(
    labels: Labels, server: NeuronpediaServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    labels()
    assert {each.key for each in server.requests} == {None}


@pytest.mark.parametrize("wrong", ["two words", "Schlüssel", "line\nbreak", 'quo"te'])
def test_what_can_be_no_key_is_not_quoted(server: NeuronpediaServer, wrong: str):
    with pytest.raises(ValueError, match="that no key has") as error:
        feature_info(MODEL, SOURCE, 4, key=wrong, base_url=server.api)
    assert wrong not in shown(error.value)
    assert not server.requests


def neighbours(old: bool, *found: tuple[int, float], **of: Any) -> dict[str, Any]:
    """What /api/cossim answers, in one of the two spellings that the source has had."""
    many, one = neuronpedia.COSINES[old]
    of = {"model": MODEL, "source": "13-x"} | of
    return {
        "feature": {"model": MODEL, "source": SOURCE, "index": 5},
        many: [{"feature": of | {"index": index}, one: cosine} for index, cosine in found],
    }


@pytest.mark.parametrize("old", [False, True])
def test_neighbours_are_asked_for_in_the_sites_words_and_come_best_first(
    server: NeuronpediaServer, old: bool
):
    server.cosines = neighbours(old, (9, 0.25), (0, 0.75))
    table = cosine_neighbours(MODEL, SOURCE, 5, "13-x", key=KEY, base_url=server.api)
    assert table.to_dict("list") == {"index": [0, 9], "cosine": [0.75, 0.25]}
    assert server.requests[0].key == KEY
    assert server.requests[0].body == {
        "modelId": MODEL,
        "source": SOURCE,
        "index": 5,
        "targetModelId": MODEL,
        "targetSourceId": "13-x",
    }
    server.cosines = neighbours(old, (1, 1.0), model="gemma-2-9b")
    given: dict[str, Any] = {"target_model": "gemma-2-9b", "base_url": server.api}
    assert cosine_neighbours(MODEL, SOURCE, 5, "13-x", **given)["index"].tolist() == [1]
    assert server.requests[1].body["targetModelId"] == "gemma-2-9b"
    server.cosines = neighbours(old)
    empty = cosine_neighbours(MODEL, SOURCE, 5, "13-x", base_url=server.api)
    assert empty.columns.tolist() == ["index", "cosine"]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"values": [], "indices": []}, r"keys \['indices', 'values'\] came"),
        ([[1, 0.5]], "a list came"),
        ({"topk_decoder_cossim_features": None}, "came"),
        ({"topk_decoder_cossim_features": [{"index": 3, "cosine": 1}]}, r"\['cosine', 'index'\]"),
        ({"topk_decoder_cossim_features": [[3, 1]]}, "a list came"),
        (neighbours(False, (1, 0.5), source="14-x"), "is of gemma-2-2b/14-x"),
    ],
)
def test_neighbours_in_another_form_are_an_error(server: NeuronpediaServer, reply: Any, said: str):
    server.cosines = reply
    with pytest.raises(ValueError, match=said):
        cosine_neighbours(MODEL, SOURCE, 5, "13-x", base_url=server.api)


def test_nothing_is_fetched_at_import_nor_is_anything_heavy_imported():
    code = (
        "import socket, sys\n"
        "socket.socket = None\n"
        "import flowhelpers.labels.neuronpedia as n\n"
        "n.embed('a', 'b', 1)\n"
        "print({'httpx2', 'pandas', 'pyarrow', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_client_is_httpx2_as_the_tests_take_it_to_be():
    with neuronpedia._client("http://127.0.0.1:9") as client:
        assert isinstance(client, httpx2.Client)
        assert not client.follow_redirects
