"""The loopback hub behaves as the true one to the libraries, and what lies on it loads."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hub import Hub, Process
from hub_files import RELEASES, pythia_weights, random_sae, sae_releases, write_saes

MODEL = "planted/model"
CONFIG = '{"answer": 42}'
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def planted(hub_here: Hub) -> Hub:
    """A repository of one small file, one large one and one in a folder."""
    folder = hub_here.root / "models" / MODEL
    (folder / "deep" / "er").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(CONFIG, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "deep" / "er" / "read me.txt").write_text("deep", encoding="utf-8")
    return hub_here


def test_a_file_is_fetched_once_and_then_read_from_the_cache(planted: Hub):
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(MODEL, "config.json"))
    assert path.read_text(encoding="utf-8") == CONFIG
    assert path.parent.name == planted.commit("models", MODEL)
    assert [r.method for r in planted.requests] == ["HEAD", "GET"]
    assert hf_hub_download(MODEL, "config.json") == str(path)
    assert len(planted.fetched("config.json")) == 1
    planted.reset()
    assert hf_hub_download(MODEL, "config.json", local_files_only=True) == str(path)
    assert hf_hub_download(MODEL, "config.json", revision=path.parent.name) == str(path)
    assert planted.requests == []


def test_etags_are_git_hashes_of_small_files_and_sha256_of_large_ones(planted: Hub):
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    small = get_hf_file_metadata(hf_hub_url(MODEL, "config.json"))
    large = get_hf_file_metadata(hf_hub_url(MODEL, "model.safetensors"))
    blob = b"blob %d\0" % len(CONFIG) + CONFIG.encode()
    assert (small.etag, small.size) == (hashlib.sha1(blob).hexdigest(), len(CONFIG))
    assert (large.etag, large.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert planted.fetched() == []


def test_a_changed_file_is_a_new_commit_and_is_fetched_again(planted: Hub):
    from huggingface_hub import hf_hub_download

    before = planted.commit("models", MODEL)
    hf_hub_download(MODEL, "config.json")
    (planted.root / "models" / MODEL / "config.json").write_text("{}", encoding="utf-8")
    assert planted.commit("models", MODEL) != before
    assert Path(hf_hub_download(MODEL, "config.json")).read_text(encoding="utf-8") == "{}"
    assert len(planted.fetched("config.json")) == 2


def test_repositories_are_listed_and_mirrored(planted: Hub, tmp_path: Path):
    from huggingface_hub import HfApi, HfFileSystem, snapshot_download

    files = ["config.json", "deep/er/read me.txt", "model.safetensors"]
    api = HfApi()
    assert sorted(api.list_repo_files(MODEL)) == files
    assert [f.path for f in api.list_repo_tree(MODEL)] == [files[0], "deep", files[2]]
    info = api.get_paths_info(MODEL, ["model.safetensors", "deep", "missing"])
    assert [(f.path, getattr(f, "size", None)) for f in info] == [
        ("model.safetensors", len(WEIGHTS)),
        ("deep", None),
    ]
    assert HfFileSystem().cat_file(f"{MODEL}/deep/er/read me.txt") == b"deep"
    mirror = Path(snapshot_download(MODEL, local_dir=tmp_path / "mirror"))
    assert (mirror / "model.safetensors").read_bytes() == WEIGHTS
    assert (mirror / "deep" / "er" / "read me.txt").read_text() == "deep"


def test_what_is_missing_is_told_apart(planted: Hub):
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with pytest.raises(EntryNotFoundError):
        hf_hub_download(MODEL, "missing.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(MODEL, "config.json", revision="v2")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("planted/nothing", "config.json")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().dataset_info(MODEL)


def test_a_range_is_served_as_asked(planted: Hub):
    from huggingface_hub.utils import httpx

    url = f"{planted.url}/{MODEL}/resolve/main/model.safetensors"
    part = httpx.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, WEIGHTS[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{len(WEIGHTS)}"
    assert httpx.get(url, headers={"Range": "bytes=-5"}).content == WEIGHTS[-5:]
    beyond = httpx.get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"})
    assert beyond.status_code == 416
    cached = httpx.get(f"{planted.url}/api/resolve-cache/models/{MODEL}/main/config.json")
    assert cached.text == CONFIG


def test_a_broken_connection_is_resumed_where_it_broke(
    planted: Hub, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants, hf_hub_download

    # The client resumes after its last whole chunk, of 10 MiB unless told.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    planted.truncate(f"/{MODEL}/resolve", keep=3000)
    path = hf_hub_download(MODEL, "model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    ranges = [r.range for r in planted.requests if r.method == "GET"]
    assert ranges == [None, "bytes=3000-"]


def test_a_body_that_was_cut_is_an_error_and_leaves_no_file(planted: Hub):
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    planted.truncate(f"/{MODEL}/resolve", keep=3000, declared=True)
    with pytest.raises(OSError, match="file should be of size 10240 but has size 3000"):
        hf_hub_download(MODEL, "model.safetensors")
    assert try_to_load_from_cache(MODEL, "model.safetensors") is None
    assert Path(hf_hub_download(MODEL, "model.safetensors")).read_bytes() == WEIGHTS


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_the_libraries_error_and_lasts_as_long_as_asked(planted: Hub, status: int):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    planted.fail(f"/api/models/{MODEL}", status, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as error:
            HfApi().model_info(MODEL)
        assert error.value.response.status_code == status
    assert HfApi().model_info(MODEL).sha == planted.commit("models", MODEL)


@pytest.mark.parametrize("status", [429, 500])
def test_a_cached_file_survives_a_hub_in_trouble(planted: Hub, status: int):
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(MODEL, "config.json")
    planted.fail(f"/{MODEL}", status, times=None)
    assert hf_hub_download(MODEL, "config.json") == path


def test_a_process_of_its_own_finds_the_hub_and_works_offline_after(
    run_python: Process, planted: Hub
):
    code = (
        "from huggingface_hub import hf_hub_download\n"
        f"print(open(hf_hub_download({MODEL!r}, 'config.json')).read())"
    )
    assert run_python(code).stdout.strip() == CONFIG
    assert len(planted.fetched("config.json")) == 1
    planted.reset()
    assert run_python(code, HF_HUB_OFFLINE="1").stdout.strip() == CONFIG
    missing = run_python(code.replace("config.json", "x.json"), HF_HUB_OFFLINE="1")
    assert "LocalEntryNotFoundError" in missing.stderr
    assert planted.requests == []


def test_the_pythia_model_loads_with_its_weights_and_tokenizer(hub_here: Hub, pythia: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pythia, dtype=torch.float32)
    weights = pythia_weights(seed=0)
    # The file says embed_out; transformers 5 calls it lm_head.
    assert np.array_equal(model.lm_head.weight.detach(), weights["embed_out.weight"])
    name = "gpt_neox.layers.5.mlp.dense_4h_to_h.weight"
    assert np.array_equal(model.get_parameter(name).detach(), weights[name])
    assert model.config.use_parallel_residual
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.25
    tokenizer = AutoTokenizer.from_pretrained(pythia)
    text = "The cat sat on the mat, schön?\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("The cat sat on the mat").input_ids) == 6
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    assert max(ids) < len(tokenizer) <= model.config.vocab_size
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), 384)
    assert logits.isfinite().all()


@pytest.mark.parametrize("release", RELEASES)
def test_a_sae_of_each_release_loads_with_what_was_planted(
    release: str, hub_here: Hub, pythia: str
):
    import torch
    from sae_lens import SAE

    sae_id = sae_releases()[release]["saes"][3]["id"]
    lens_sae, _, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(release, sae_id)
    planted = random_sae(release, sae_id)
    assert np.array_equal(lens_sae.W_dec.detach(), planted["W_dec"])
    assert (lens_sae.cfg.d_in, lens_sae.cfg.d_sae, lens_sae.cfg.architecture()) == (
        64,
        96,
        "standard",
    )
    assert lens_sae.cfg.metadata.hook_name == sae_id
    assert sparsity is not None
    assert len(sparsity) == 96
    with torch.no_grad():
        active = lens_sae.encode(lens_sae.W_dec + lens_sae.b_dec)
    # A feature's own direction, of length 1, less its threshold of 0.5.
    assert torch.allclose(active.diagonal(), torch.full((96,), 0.5), atol=0.1)


def test_every_id_of_the_three_releases_lies_on_the_hub(tmp_path: Path):
    written = write_saes(tmp_path)
    assert {release: len(ids) for release, ids in written.items()} == dict(
        zip(RELEASES, (7, 6, 6), strict=True)
    )
    res = written["pythia-70m-deduped-res-sm"]
    repository = "ctigges/pythia-70m-deduped__res-sm_processed"
    assert res["blocks.0.hook_resid_pre"] == f"{repository}/e-res-sm"
    assert res["blocks.5.hook_resid_post"] == f"{repository}/5-res-sm"
    for ids in written.values():
        for sae_id, path in ids.items():
            config = json.loads((tmp_path / "models" / path / "cfg.json").read_text())
            assert config["hook_name"] == sae_id
            assert (tmp_path / "models" / path / "sparsity.safetensors").is_file()


def test_chosen_weights_can_be_planted(tmp_path: Path):
    from safetensors.numpy import load_file

    def ones(release: str, sae_id: str) -> dict[str, np.ndarray]:
        return random_sae(release, sae_id) | {"b_dec": np.ones(64, np.float32)}

    path = write_saes(tmp_path, ones)["pythia-70m-deduped-att-sm"]["blocks.2.hook_attn_out"]
    weights = load_file(tmp_path / "models" / path / "sae_weights.safetensors")
    assert weights["b_dec"].tolist() == [1.0] * 64
    assert {name: array.shape for name, array in weights.items()} == {
        "W_enc": (64, 96),
        "b_enc": (96,),
        "W_dec": (96, 64),
        "b_dec": (64,),
    }
