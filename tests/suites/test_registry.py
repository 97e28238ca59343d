"""The table of suites against sae-lens's own list, its variants, and how much each takes."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import load_file, save_file

from flowhelpers import __main__
from flowhelpers.core.features import MODULES, Site
from flowhelpers.suites.load import KEPT, decoders_memory, memory_needed
from flowhelpers.suites.registry import declared, find_suite, registered

KNOWN = get_pretrained_saes_directory()
HUB = [name for name, row in registered().items() if row.variants]
VARIANTS = [f"{name}@{variant}" for name in HUB for variant in registered()[name].variants]
WORDS = {"res": {"res", "lxr", "resid"}, "mlp": {"mlp", "lxm"}, "att": {"att", "lxa", "attn"}}


def releases(name: str) -> list[tuple[Site, Any]]:
    sources = find_suite(name).saes.items()
    return [(site, dict(source)) for site, source in sources if not isinstance(source, str)]


def test_the_suites_that_are_asked_for_are_there():
    assert {"gpt2-small", "pythia-70m-deduped", "gemma-2-2b", "gemma-2-9b", "llama-3.1-8b"} < {*HUB}
    sizes, kinds = ("270m", "1b", "4b", "12b"), ("pt", "it")
    assert {f"gemma-3-{size}-{kind}" for size in sizes for kind in kinds} < {*HUB}
    local = [name for name, row in registered().items() if row.is_local]
    assert local == ["flowlet", "flowlet-mini"]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_id_is_in_sae_lens_own_list_at_its_layer_and_module(name: str):
    row = find_suite(name)
    found = releases(name)
    every = {Site(layer, module) for layer in range(row.layers or 0) for module in MODULES}
    nested = {Site(layer, "res") for layer in range(25)}  # a release without the last layer
    assert {site for site, _ in found} == (nested if "matryoshka" in name else every)
    models = set()
    for site, source in found:
        release = KNOWN[source["release"]]
        assert source["id"] in release.saes_map, (str(site), source)
        models.add(release.model.rsplit("/")[-1].lower())
        number = re.search(r"(?:layer_|^l|blocks\.)(\d+)", source["id"])
        assert number
        assert int(number[1]) == site.layer
        parts = set(re.split(r"[-_]", source["release"]))
        assert [module for module in MODULES if WORDS[module] & parts] == [site.module]
        assert row.neuronpedia.get(site) == release.neuronpedia_id.get(source["id"]), str(site)
        if width := re.search(r"width_(\d+)([km])", source["id"]):
            expected = int(width[1]) * {"k": 1_000, "m": 1_000_000}[width[2]]
            assert (row.features or 0) / expected == pytest.approx(1, abs=0.05)
    own = {"openai-community/gpt2": "gpt2-small"}
    assert models == {own.get(row.model, row.model.rsplit("/")[-1].lower())}


@pytest.mark.parametrize("l0", [20, 400])
@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-2-2b@65k", "gemma-2-9b@131k"])
def test_the_sae_of_the_nearest_mean_l0_is_taken(name: str, l0: int):
    width = {"gemma-2-2b": "16k", "gemma-2-2b@65k": "65k"}.get(name, "131k")
    for site, source in releases(f"{name}@l0={l0}"):
        start = f"layer_{site.layer}/width_{width}/average_l0_"
        ids = KNOWN[source["release"]].saes_map
        numbers = [int(i.removeprefix(start)) for i in ids if start in i]
        assert len(numbers) > 3
        chosen = int(source["id"].removeprefix(start))
        assert abs(chosen - l0) == min(abs(number - l0) for number in numbers)
        assert declared(source)[0] == chosen


def test_a_sae_of_chosen_l0_keeps_its_neuronpedia_name_if_it_has_one():
    row = find_suite("gemma-2-2b@l0=70")
    # The canonical SAE of layer 5 has a mean L0 of 68, that of layer 0 one of 105.
    assert row.neuronpedia[Site(5, "res")] == "gemma-2-2b/5-gemmascope-res-16k"
    assert Site(0, "res") not in row.neuronpedia


def test_a_choice_is_part_of_the_name_and_leaves_the_row_as_it_was():
    before = registered()["gemma-2-2b"]
    row = find_suite("gemma-2-2b@65k@res+mlp")
    assert row.name == "gemma-2-2b@65k@res+mlp"
    assert {site.module for site in row.saes} == {"res", "mlp"}
    assert (before.features, row.features) == (16_384, 65_536)
    assert registered()["gemma-2-2b"] is before
    assert before.parameters < row.parameters < find_suite("gemma-2-2b@65k").parameters


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma-2-2b@64k", "gemma-2-2b has no variant '64k'; did you mean '65k'.*l0=70, res.mlp"),
        ("gemma-2-2b@l0=", "no variant 'l0='"),
        ("gemma-2-2b@res+mpl", "no variant 'res.mpl'; did you mean 'res.mlp'"),
        ("llama-3.1-8b@l0=50", "llama-3.1-8b has no "),
        ("gemma-2-2b@16k@65k", "'65k' is the second of its kind"),
        ("flowlet@16k", "flowlet has no variant '16k'"),
        ("gemma-2-2c@65k", "unknown suite 'gemma-2-2c'; did you mean 'gemma-2-2b'"),
        ("pythia-70m", "'pythia-70m'; did you mean 'pythia-70m-deduped'.*; a folder needs a"),
    ],
)
def test_a_choice_that_is_not_there_names_the_nearest(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        find_suite(name)


def test_what_is_declared_is_of_the_path_or_of_the_list():
    assert declared(find_suite("gemma-2-2b").saes[Site(12, "res")])[0] == 82
    assert declared(find_suite("llama-3.1-8b").saes[Site(12, "att")])[0] == 50
    assert declared("folder") == (None, None)


def test_what_a_suite_takes_follows_from_its_sizes():
    row = find_suite("gemma-2-2b")
    # 78 SAEs of 16,384 features, two matrices each, 52 at 2,304 and 26 at 2,048, float32.
    numbers, model = 2 * 16_384 * (52 * 2304 + 26 * 2048), 2_614_341_888
    assert decoders_memory(row) == pytest.approx((KEPT + 2) * 4 * numbers / 2 / 78, rel=1e-3)
    whole = 4 * (model + 1.5 * numbers)  # decoders as stored, beside the weights
    assert memory_needed(row) == pytest.approx(whole, rel=1e-3)
    few = 4 * (model + 1.5 * numbers * KEPT / 78)
    assert memory_needed(row, kept=KEPT) == pytest.approx(few, rel=1e-3)
    half = 2 * model + numbers * (2 + 2)
    assert memory_needed(row, "bfloat16") == pytest.approx(half, rel=1e-3)
    stored = replace(row, stored={"saes": "bfloat16"})
    assert decoders_memory(stored) == decoders_memory(row) // 2
    unknown = replace(row, model_parameters=None)
    assert memory_needed(unknown, kept=KEPT) == memory_needed(unknown)


def test_of_a_folder_only_what_transformers_and_sae_lens_load_counts(
    planted_folder: Path, tmp_path: Path
):
    from transformers import Gemma3ForCausalLM

    folder = Path(shutil.copytree(planted_folder, tmp_path / "suite"))
    model = folder / "model"
    whole = Gemma3ForCausalLM.from_pretrained(model)
    loaded = sum(weights.numel() for weights in whole.parameters())
    saes = [load_file(path) for path in folder.glob("*/sae_weights.safetensors")]
    in_saes = sum(tensor.numel() for sae in saes for tensor in sae.values())

    def counted() -> tuple[int | None, int]:
        row = find_suite(folder)
        return row.model_parameters, row.parameters

    assert counted() == (loaded, loaded + in_saes)
    beside = [
        "consolidated",
        "adapter_model",
        "optimizer",
        "model-00001-of-00002",
        "original/model",
    ]
    (model / "original").mkdir()
    for name in [*(f"model/{name}" for name in beside), "0-res/sparsity", "0-res/model"]:
        save_file({"more": torch.zeros(12_345)}, folder / f"{name}.safetensors")
    assert counted() == (loaded, loaded + in_saes)
    # A single file comes before shards, as it does for transformers.
    index = '{"weight_map": {"more": "model-00001-of-00002.safetensors"}}'
    (model / "model.safetensors.index.json").write_text(index)
    assert counted() == (loaded, loaded + in_saes)
    for path in model.glob("model*"):
        path.unlink()
    whole.save_pretrained(model, max_shard_size="20KB")
    assert len(list(model.glob("model-*.safetensors"))) > 2
    assert counted() == (loaded, loaded + in_saes)
    for path in model.glob("model*"):
        path.unlink()
    torch.save(whole.state_dict(), model / "pytorch_model.bin")  # whose size is not told
    assert counted() == (None, in_saes)


def test_the_command_tells_what_there_is_and_what_it_takes(capsys: pytest.CaptureFixture[str]):
    assert __main__.main(["suites"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in registered())
    assert "variants: 16k, 65k" in said
    assert __main__.main(["suites", "gemma-2-2b@l0=70"]) == 0
    said = capsys.readouterr().out
    assert "average_l0_68" in said
    assert re.search(r"in float32 it takes \d+\.\d GiB of memory as a whole, \d\.\d to match", said)
    assert "Attention SAEs read z" in said
    assert __main__.main(["suites", "gemma-2-2b@l0=x"]) == 2
    assert "no variant 'l0=x'" in capsys.readouterr().err
