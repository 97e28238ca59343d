"""Files of the hub: the cache before the network, and of a model's files the tensors alone."""

import json
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub import Hub, Process
from safetensors.torch import save_file

from flowhelpers.suites.hub import cached, fetch, fetch_if_there, model_on_disk, read_tensors

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
    files.fail("/", 500, times=None)
    assert fetch(OWNER, FILE) == cached(OWNER, FILE) == path
    assert len(files.requests) == asked


def test_with_the_network_off_what_is_cached_is_found_and_the_rest_is_an_error(
    files: Hub, monkeypatch: pytest.MonkeyPatch
):
    fetch(OWNER, FILE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(OWNER, FILE).read_bytes() == CONTENT
    assert fetch_if_there(OWNER, "config.json") is None
    with pytest.raises(OSError, match="cannot find the requested files"):
        fetch(OWNER, "config.json")


def test_a_file_that_is_not_there_is_none_where_that_may_be_and_trouble_is_an_error(files: Hub):
    assert fetch_if_there(OWNER, "layer_1/params.safetensors") is None
    with pytest.raises(OSError, match="404"):
        fetch(OWNER, "layer_1/params.safetensors")
    files.fail(f"/{OWNER}", 403, times=None)
    with pytest.raises(OSError, match="locate the file"):
        fetch_if_there(OWNER, FILE)


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
    with pytest.raises(OSError, match=r"offline|cache"):
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
    with model_on_disk(pythia):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert cached(pythia, "model.safetensors") is not None
    files.reset()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with model_on_disk(pythia):
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
