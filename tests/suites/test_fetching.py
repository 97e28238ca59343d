"""Files of the hub: the cache before the network, and single tensors without the rest."""

import json
import time
from pathlib import Path

import pytest
import torch
from hub import Hub, Process
from huggingface_hub import constants
from safetensors.torch import save_file

from flowhelpers.suites.hub import cached, fetch, model_folder, naming, read_tensors

OWNER = "planted/sharded"
NAMES = ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.norm.weight"]
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def sharded(
    hub_here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """A model whose weights lie in two files, bfloat16 and float32; returns all tensors."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # nobody waits between tries
    monkeypatch.setenv("FLOWHELPERS_CACHE", str(tmp_path / "tables"))
    folder = hub_here.root / "models" / OWNER
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(5, 3, generator=generator) for name in NAMES}
    tensors[NAMES[0]] = tensors[NAMES[0]].bfloat16()
    tensors["large"] = torch.randn(400, 400, generator=generator)
    places = {NAMES[0]: PARTS[0], "large": PARTS[0], NAMES[1]: PARTS[1]}
    for part in PARTS:
        held = {name: tensors[name] for name in places if places[name] == part}
        save_file(held, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text('{"answer": 42}')
    return tensors


@pytest.mark.usefixtures("sharded")
def test_the_cache_comes_before_the_network(hub_here: Hub, monkeypatch: pytest.MonkeyPatch):
    assert cached(OWNER, PARTS[0]) is None
    path = fetch(OWNER, PARTS[0])
    assert path == cached(OWNER, PARTS[0])
    hub_here.reset()
    hub_here.fail("/", 500, times=None)
    assert fetch(OWNER, PARTS[0]) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(OWNER, PARTS[0]) == path
    assert hub_here.requests == []
    with pytest.raises(OSError, match="cannot find the requested files in the local cache"):
        fetch(OWNER, "config.json")


def test_of_a_model_s_files_only_the_tensors_are_fetched(
    hub_here: Hub, sharded: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    found = read_tensors(OWNER, [*NAMES, "not there"])
    assert set(found) == set(NAMES)
    for name in NAMES:
        assert found[name].dtype == sharded[name].dtype
        assert torch.equal(found[name], sharded[name])
    gets = [r for r in hub_here.requests if r.method == "GET" and r.path.endswith("safetensors")]
    bounds = [list(map(int, str(r.range).removeprefix("bytes=").split("-"))) for r in gets]
    assert 0 < sum(last - first + 1 for first, last in bounds) < 2000 < 400 * 400 * 4

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_here.reset()
    again = read_tensors(OWNER, [*NAMES, "not there"])
    assert torch.equal(again[NAMES[0]], found[NAMES[0]])
    assert hub_here.requests == []
    with pytest.raises(ConnectionError):
        read_tensors(OWNER, ["large"])


@pytest.mark.parametrize(("part", "name", "keep"), [(1, NAMES[1], 8), (0, "large", 1000)])
def test_bytes_that_were_cut_short_are_not_kept(
    part: int, name: str, keep: int, hub_here: Hub, sharded: dict[str, torch.Tensor]
):
    hub_here.truncate(f"/{OWNER}/resolve/main/{PARTS[part]}", keep, declared=True, times=None)
    with pytest.raises((OSError, ValueError)):
        read_tensors(OWNER, [name])
    hub_here.reset()
    assert torch.equal(read_tensors(OWNER, [name])[name], sharded[name])


def test_files_that_are_on_this_machine_are_read_where_they_are(
    hub_here: Hub, sharded: dict[str, torch.Tensor]
):
    for file in ("model.safetensors.index.json", PARTS[0]):
        fetch(OWNER, file)
    hub_here.reset()
    assert torch.equal(read_tensors(OWNER, ["large"])["large"], sharded["large"])
    assert hub_here.requests == []
    folder = hub_here.root / "models" / OWNER
    assert torch.equal(read_tensors(str(folder), [NAMES[1]])[NAMES[1]], sharded[NAMES[1]])
    (folder / PARTS[1]).write_bytes(b"short")
    with pytest.raises(ValueError, match=rf"{PARTS[1]} cannot be read, it may be truncated"):
        read_tensors(str(folder), [NAMES[1]])


def test_of_a_model_whose_weights_lie_there_twice_those_are_read_that_transformers_loads(
    toy_folder: Path, tmp_path: Path
):
    from transformers import Gemma3ForCausalLM

    model = Gemma3ForCausalLM.from_pretrained(toy_folder)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(1)
    (tmp_path / "model.safetensors").rename(tmp_path / "kept")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "kept").rename(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = Gemma3ForCausalLM.from_pretrained(tmp_path).state_dict()
    found = read_tensors(str(tmp_path), [NAMES[0]])[NAMES[0]]
    assert torch.equal(found, loaded[NAMES[0]])
    assert not torch.equal(found, model.state_dict()[NAMES[0]])


def test_a_model_is_fetched_whole_once(hub_here: Hub, pythia: str, monkeypatch: pytest.MonkeyPatch):
    fetch(pythia, "config.json")  # which alone makes no whole model
    folder = Path(model_folder(pythia))
    assert {"model.safetensors", "tokenizer.json"} < {path.name for path in folder.iterdir()}
    hub_here.reset()
    assert model_folder(pythia) == str(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(pythia) == model_folder(str(folder)) == str(folder)
    assert hub_here.requests == []


def test_importing_and_the_embedded_suite_ask_nobody(run_python: Process, hub: Hub):
    code = (
        "import flowhelpers.suites.load, flowhelpers.suites.hub, flowhelpers.suites.sae_files\n"
        "from flowhelpers.suites.load import load_suite\n"
        "from flowhelpers.matching.table import match_table\n"
        "match_table(load_suite('flowlet'), k=1, layers=[1]); print('done')"
    )
    result = run_python(code)
    assert result.stdout.strip() == "done", result.stderr
    assert hub.requests == []


def test_errors_of_memory_and_files_stay_and_others_are_named():
    for error in (MemoryError("full"), FileNotFoundError("full"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error), match=r"^full$"), naming("it"):
            raise error
    with pytest.raises(ValueError, match=r"^it is odd: KeyError: 'x'$"), naming("it", "is odd"):
        raise KeyError("x")
