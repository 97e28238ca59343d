"""Files of the hub: the cache before the network, and errors that say what to do."""

import errno
import hashlib
import json
import os
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub import Hub, Process
from safetensors.torch import save_file

from flowhelpers.suites.hub import (
    cached,
    fetch,
    fetch_if_there,
    fetched,
    read_hub_json,
    read_tensors,
)

OWNER = "planted/weights"
FILE = "layer_0/params.safetensors"
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def files(hub_here: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository with a large file and a small one; nobody waits between tries."""
    folder = hub_here.root / "models" / OWNER
    (folder / "layer_0").mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(CONTENT)
    (folder / "config.json").write_text('{"answer": 42}', encoding="utf-8")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return hub_here


def test_the_cache_comes_before_the_network(files: Hub):
    assert cached(OWNER, FILE) is None
    path = fetch(OWNER, FILE)
    assert path.read_bytes() == CONTENT
    asked = len(files.requests)
    assert asked
    assert fetch(OWNER, FILE) == cached(OWNER, FILE) == path
    files.fail("/", 500, times=None)
    assert fetch(OWNER, FILE) == path
    assert len(files.requests) == asked


def test_with_the_network_off_what_is_cached_is_found_and_the_rest_is_named(
    files: Hub, monkeypatch: pytest.MonkeyPatch
):
    fetch(OWNER, FILE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(OWNER, FILE).read_bytes() == CONTENT
    with pytest.raises(ConnectionError, match=r"config\.json is not cached .* flowlet needs"):
        fetch(OWNER, "config.json")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_says_which_licence_and_how_to_log_in(files: Hub, status: int):
    files.fail(f"/{OWNER}", status, times=None)
    with pytest.raises(PermissionError) as caught:
        fetch(OWNER, FILE)
    said = str(caught.value)
    assert f"{OWNER}/{FILE}" in said
    assert f"accept its licence at {files.url}/{OWNER}" in said
    assert "hf auth login" in said
    assert "HF_TOKEN" in said


def test_a_gated_repository_is_called_that(files: Hub, monkeypatch: pytest.MonkeyPatch):
    files.gate(OWNER)
    with pytest.raises(PermissionError, match=f"{OWNER}/{FILE} is gated: accept its licence at"):
        fetch(OWNER, FILE)


def test_a_file_that_is_not_there_names_the_nearest(files: Hub):
    with pytest.raises(FileNotFoundError, match=r"layer_1/params.*; did you mean .*_0/pa"):
        fetch(OWNER, "layer_1/params.safetensors")
    assert fetch_if_there(OWNER, "layer_1/params.safetensors") is None
    with pytest.raises(FileNotFoundError, match="the hub has no planted/nothing/x"):
        fetch("planted/nothing", "x.json")
    with pytest.raises(FileNotFoundError, match=f"the hub has no {OWNER}/{FILE}"):
        fetch(OWNER, FILE, "v2")


def test_a_mirror_s_404_that_does_not_say_what_is_missing_is_told_as_such(
    files: Hub, monkeypatch: pytest.MonkeyPatch
):
    files.fail(f"/{OWNER}", 404, times=None)
    with pytest.raises(FileNotFoundError, match=f"the hub has no {OWNER}/{FILE}"):
        fetch(OWNER, FILE)
    assert fetch_if_there(OWNER, FILE) is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch_if_there(OWNER, FILE) is None


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(files: Hub, status: int):
    files.fail(f"/{OWNER}", status, times=3)
    assert fetch(OWNER, FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 500])
def test_a_hub_that_stays_in_trouble_is_told(files: Hub, status: int):
    files.fail(f"/{OWNER}", status, times=None)
    with pytest.raises(ConnectionError, match=f"could not be fetched: the hub says {status}"):
        fetch(OWNER, FILE)


def test_a_download_goes_on_where_it_broke_off(files: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    files.truncate(f"/{OWNER}/resolve", keep=3000)
    assert fetch(OWNER, FILE).read_bytes() == CONTENT
    assert [r.range for r in files.requests if r.method == "GET"] == [None, "bytes=3000-"]


def test_a_file_cut_short_is_an_error_and_is_not_kept(files: Hub):
    files.truncate(f"/{OWNER}/resolve", keep=3000, declared=True)
    with pytest.raises(ConnectionError, match=r"params\.safetensors .*: it was cut short"):
        fetch(OWNER, FILE)
    assert fetch(OWNER, FILE).read_bytes() == CONTENT


def test_a_file_that_is_not_what_the_hub_says_is_an_error_and_is_not_kept(files: Hub):
    path = files.root / "models" / OWNER / FILE
    said = hashlib.sha256(CONTENT).hexdigest()
    files.digests(path)  # what the hub says from here on, whatever it sends
    before = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=f"the hub says {said}: it was removed; try again"):
        fetch(OWNER, FILE)
    assert cached(OWNER, FILE) is None
    path.write_bytes(CONTENT)
    assert fetch(OWNER, FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_a_cache_that_cannot_be_made_is_told(
    run_python: Process, hub: Hub, tmp_path: Path, variable: str
):
    folder = hub.root / "models" / OWNER
    (folder / "layer_0").mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(CONTENT)
    (tmp_path / "a file").write_text("")
    code = (
        "from flowhelpers.suites.hub import fetch, fetch_if_there\n"
        "try:\n"
        f"    fetch_if_there({OWNER!r}, {FILE!r})\n"
        "except OSError as error: print(error)"
    )
    result = run_python(code, **{variable: str(tmp_path / "a file" / "x")})
    assert "cannot be kept in the cache" in result.stdout, result.stderr
    assert "HF_HOME" in result.stdout


def test_a_broken_file_in_the_cache_is_removed_and_fetched_again(files: Hub):
    path = fetch(OWNER, "config.json")
    path.resolve().write_text('{"answ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is truncated .* removed from the cache"):
        read_hub_json(path)
    assert read_hub_json(fetch(OWNER, "config.json")) == {"answer": 42}


@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")]
)
def test_a_cache_that_takes_nothing_is_told(
    files: Hub, monkeypatch: pytest.MonkeyPatch, number: int, word: str
):
    from huggingface_hub import file_download

    def refuse(*args: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_download, "_download_to_tmp_and_move", refuse)
    with pytest.raises(OSError, match=rf"cannot be kept in the cache .*{word}.*HF_HOME") as caught:
        fetch(OWNER, FILE)
    assert caught.value.errno == number


def test_a_read_only_cache_serves_what_it_has(run_python: Process, hub: Hub, tmp_path: Path):
    folder = hub.root / "models" / OWNER
    (folder / "layer_0").mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(CONTENT)
    code = (
        "import sys; from flowhelpers.suites.hub import fetch\n"
        f"print(len(fetch({OWNER!r}, {FILE!r}).read_bytes()))"
    )
    assert run_python(code).stdout.strip() == str(len(CONTENT))
    home = tmp_path / "home"
    for path in [home, *home.rglob("*")]:
        if path.is_dir():
            path.chmod(0o555)
    try:
        hub.reset()
        assert run_python(code).stdout.strip() == str(len(CONTENT))
        assert hub.requests == []
    finally:
        for path in [home, *home.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)


# Some tensors of a model's files.

NAMES = ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.norm.weight"]


@pytest.fixture
def sharded(files: Hub) -> dict[str, torch.Tensor]:
    """A model whose weights lie in two files, bfloat16 and float32; returns all tensors."""
    folder = files.root / "models" / "planted" / "sharded"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(5, 3, generator=generator) for name in (*NAMES, "large")}
    tensors[NAMES[0]] = tensors[NAMES[0]].bfloat16()
    tensors["large"] = torch.randn(400, 400, generator=generator)
    parts = {"model-00001-of-00002": [NAMES[0], "large"], "model-00002-of-00002": [NAMES[1]]}
    for part, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / f"{part}.safetensors")
    places = {name: f"{part}.safetensors" for part, names in parts.items() for name in names}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return tensors


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWHELPERS_CACHE", str(tmp_path / "tables"))


@pytest.mark.usefixtures("tables")
def test_of_a_model_s_files_only_the_tensors_are_fetched(
    files: Hub, sharded: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    found = read_tensors("planted/sharded", [*NAMES, "not there"])
    assert set(found) == set(NAMES)
    for name in NAMES:
        assert found[name].dtype == sharded[name].dtype
        assert torch.equal(found[name], sharded[name])
    gets = [r for r in files.requests if r.method == "GET" and r.path.endswith("safetensors")]
    assert gets
    assert all(request.range for request in gets)
    bounds = [list(map(int, str(r.range).removeprefix("bytes=").split("-"))) for r in gets]
    assert sum(last - first + 1 for first, last in bounds) < 2000 < 400 * 400 * 4

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    files.reset()
    again = read_tensors("planted/sharded", [*NAMES, "not there"])
    assert torch.equal(again[NAMES[0]], found[NAMES[0]])
    assert files.requests == []
    with pytest.raises(ConnectionError, match=r"sharded/model-0.* is not cached"):
        read_tensors("planted/sharded", ["large"])


@pytest.mark.usefixtures("tables")
def test_files_that_are_on_this_machine_are_read_where_they_are(
    files: Hub, sharded: dict[str, torch.Tensor]
):
    for file in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        fetch("planted/sharded", file)
    files.reset()
    assert torch.equal(read_tensors("planted/sharded", ["large"])["large"], sharded["large"])
    assert files.requests == []
    folder = files.root / "models" / "planted" / "sharded"
    assert torch.equal(read_tensors(str(folder), [NAMES[1]])[NAMES[1]], sharded[NAMES[1]])
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is truncated"):
        read_tensors(str(folder), [NAMES[1]])


def test_a_model_is_fetched_whole_once(files: Hub, pythia: str, monkeypatch: pytest.MonkeyPatch):
    with fetched(pythia):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert cached(pythia, "model.safetensors") is not None
    files.reset()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with fetched(pythia):
        pass
    assert files.requests == []


def test_importing_asks_nobody(run_python: Process, hub: Hub):
    code = (
        "import flowhelpers.suites.load, flowhelpers.suites.hub, flowhelpers.suites.sae_files\n"
        "from flowhelpers.suites.load import load_suite\n"
        "from flowhelpers.matching.table import match_table\n"
        "match_table(load_suite('flowlet'), k=1, layers=[1]); print('done')"
    )
    result = run_python(code)
    assert result.stdout.strip() == "done", result.stderr
    assert hub.requests == []
