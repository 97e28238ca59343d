"""Trained transcoders: read where they were trained, refused where an SAE belongs.

The files are of the true format; that of Gemma 2 is of the true width, which sae-lens asks for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hub import Hub
from hub_families import (
    D_GEMMA_2,
    D_MODEL,
    WIDTH_16K,
    Arrays,
    write_gemma_2,
    write_gemma_scope_2,
    write_transcoder,
)
from hub_files import shrink
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig

from flowhelpers.core.features import Site
from flowhelpers.matching.transcoding import explained_variance, through_mlp
from flowhelpers.suites import transcoders
from flowhelpers.suites.load import Suite, load_suite
from flowhelpers.suites.model import tokenize
from flowhelpers.suites.registry import find_suite, registered

TEXTS = ["The cat sat on the mat and the dog sat by the door.", "Rain fell on seven hills all day."]
GEMMA_2 = {
    "release": "gemma-scope-2b-pt-transcoders",
    "id": "layer_1/width_16k/average_l0_65",  # the one of this layer on the true hub
}
GEMMA_3 = {"release": "gemma-scope-2-270m-pt-transcoders-all", "id": "layer_1_width_16k_l0_big"}
RESIDUAL = {"release": "gemma-scope-2-270m-pt-res-all", "id": GEMMA_3["id"]}
AFFINE = GEMMA_3 | {"id": GEMMA_3["id"] + "_affine"}
READS = "model.layers.1.pre_feedforward_layernorm.output"
SMALL = {"layers": 2, "d_model": 64, "d_att": 128, "model_parameters": 100_000}


@pytest.fixture(scope="module")
def gemmas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Gemma 2 2B and Gemma 3 270M of two layers, with transcoders of the second."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub, pytest.MonkeyPatch.context() as patch:
        write_gemma_2(hub.root, features=4, wide={})
        write_gemma_scope_2(hub.root)
        hub.use_in_process(tmp_path_factory.mktemp("home"), patch)
        shrink(patch, "gemma-2-2b", layers=2, model_parameters=200_000_000)
        shrink(patch, "gemma-3-270m-pt", **SMALL)
        yield hub


def by_hand(suite: Suite, arrays: Arrays, has_gain: bool) -> dict[str, tuple[Any, Any]]:
    """Truth and prediction, from the file's arrays and plain hooks on the Hugging Face model."""
    model = suite.model.bridge.original_model
    layer, kept = model.model.layers[1], {}
    names = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "post_attention_layernorm")
    hooks = [
        getattr(layer, name).register_forward_hook(
            lambda _, read, out, name=name: kept.update({name: (read[0].detach(), out.detach())})
        )
        for name in names
    ]
    tokens = tokenize(suite.model, TEXTS)
    with torch.no_grad():
        states = model(input_ids=tokens.ids, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        # The last of the hidden states is behind the final norm: the second layer's is made up.
        before = states.hidden_states[1]
        mid, gained = kept[names[0]]
        root = (mid.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        x = (gained if has_gain else mid / root)[tokens.is_text].double().numpy()
    written, attention = kept[names[1]][1], kept[names[2]][1]
    assert torch.allclose(mid, before + attention, atol=1e-4)
    codes = x @ arrays["W_enc"] + arrays["b_enc"]
    codes = np.where(codes > arrays["threshold"], codes, 0)
    assert 0.001 < (codes > 0).mean() < 0.3
    told = codes @ arrays["W_dec"] + arrays["b_dec"]
    if "affine_skip_connection" in arrays:
        told = told + x @ arrays["affine_skip_connection"]
    mlp, middle = (part[tokens.is_text].double().numpy() for part in (written, mid))
    return {
        "MLP": (mlp, told),
        "stream": (middle + mlp, middle + told),
        "stream, no MLP": (middle + mlp, middle),
    }


@pytest.mark.parametrize("kind", ["Gemma Scope", "Gemma Scope 2", "Gemma Scope 2, affine"])
def test_what_a_transcoder_explains_is_that_by_plain_hooks(
    gemmas: Hub, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if kind == "Gemma Scope":
        arrays = write_transcoder(gemmas.root, GEMMA_2, WIDTH_16K, D_GEMMA_2)
        suite = load_suite("gemma-2-2b")
    else:
        source = AFFINE if kind.endswith("affine") else GEMMA_3
        arrays = write_transcoder(gemmas.root, source, 256, D_MODEL, READS, source is AFFINE)
        row: dict[str, Any] = {"model": "google/gemma-3-270m", **SMALL}
        row |= {"saes": {"1/res": RESIDUAL}, "transcoders": {"1/mlp": source}}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(row))
        suite = load_suite(tmp_path if source is AFFINE else "gemma-3-270m-pt")
    transcoder = suite.transcoder(1)
    assert transcoder.source == Site(1, "normed" if kind == "Gemma Scope" else "mlp_in")
    found = explained_variance(suite, tokenize(suite.model, TEXTS), through_mlp(transcoder), 10)
    found = found.set_index("prediction")["explained"]
    for name, (truth, told) in by_hand(suite, arrays, kind != "Gemma Scope").items():
        spread = ((truth - truth.mean(0)) ** 2).sum()
        expected = 1 - ((truth - told) ** 2).sum() / spread
        assert found[name] == pytest.approx(expected, abs=1e-4), name
    half = load_suite(suite.row.folder or suite.name, dtype="bfloat16").transcoder(1)
    assert half.lens_transcoder.W_dec.dtype == torch.bfloat16
    assert transcoder.lens_transcoder.W_dec.dtype == torch.float32
    with pytest.raises(ValueError, match="has no transcoder of layer 2"):
        suite.transcoder(2)


def test_every_transcoder_of_the_table_is_in_sae_lens_own_list_and_of_the_suite_s_model():
    known, rows = get_pretrained_saes_directory(), registered()
    having = {name for name, row in rows.items() if row.transcoders}
    without = {"gemma-2-9b", "gemma-2-2b-matryoshka"}
    assert having == {name for name in rows if name.startswith("gemma-")} - without
    for name in having:
        row = find_suite(name)
        assert list(row.transcoders) == [Site(i, "mlp") for i in range(row.layers or 0)]
        for site, source in row.transcoders.items():
            one: Any = transcoders.the_one(source)
            release = known[one["release"]]
            assert one["id"] in release.saes_map
            assert one["id"].replace("/", "_").startswith(f"layer_{site.layer}_width_16k_")
            assert release.model.rsplit("/")[-1] == row.model.rsplit("/")[-1]


def saved_transcoder(folder: Path, **about: Any) -> Path:
    config = JumpReLUTranscoderConfig(
        d_in=D_MODEL, d_out=D_MODEL, d_sae=8, apply_b_dec_to_input=False
    )
    for name, value in about.items():
        setattr(config if hasattr(config, name) else config.metadata, name, value)
    JumpReLUTranscoder(config).save_model(folder)
    return folder


@pytest.mark.parametrize("hook", [None, "blocks.1.hook_mlp_out"])
def test_a_transcoder_among_the_saes_is_refused_on_load(
    gemmas: Hub, tmp_path: Path, hook: str | None
):
    """Even one that claims the right hook point, and from the hub before a file is fetched."""
    saved_transcoder(tmp_path / "mine", hook_name=hook)
    gemmas.reset()
    for source in ("mine", GEMMA_3, GEMMA_2):
        row = {"model": "google/gemma-3-270m", "saes": {"1/mlp": source}, **SMALL}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(row))
        with pytest.raises(ValueError, match=r"the SAE for 1/mlp .* is a transcoder, which reads"):
            load_suite(tmp_path)
    assert gemmas.requests == []


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            {"hook_name": "blocks.1.hook_resid_mid"},
            "reads blocks.1.hook_resid_mid: expected blocks",
        ),
        ({"hook_name": "blocks.0.mlp.hook_in"}, "reads blocks.0.mlp.hook_in: expected blocks.1"),
        ({"hook_name_out": "blocks.1.mlp.hook_out"}, "predicts blocks.1.mlp.hook_out: expected"),
        ({"normalize_activations": "expected_average_only_in"}, "layer 1 .* that its files lack"),
    ],
)
def test_a_transcoder_of_another_place_is_refused(
    gemmas: Hub, tmp_path: Path, about: dict[str, str], message: str
):
    right = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    row: dict[str, Any] = {"model": "google/gemma-3-270m", **SMALL}
    row |= {"saes": {"1/res": RESIDUAL}, "transcoders": {"1/mlp": "mine"}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(row))
    saved_transcoder(tmp_path / "mine", **right)
    assert load_suite(tmp_path).transcoder(1).source == Site(1, "mlp_in")
    saved_transcoder(tmp_path / "mine", **right | about)
    with pytest.raises(ValueError, match=message):
        load_suite(tmp_path).transcoder(1)
