"""The table of suites against sae-lens's own list, its variants, and what each needs."""

import re

import pytest
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from flowhelpers import __main__
from flowhelpers.core.features import MODULES, Site
from flowhelpers.suites.load import KEPT, decoders_memory
from flowhelpers.suites.registry import declared_l0, find_suite, registered

KNOWN = get_pretrained_saes_directory()
HUB = [name for name, row in registered().items() if row.variants]
VARIANTS = [f"{name}@{variant}" for name in HUB for variant in registered()[name].variants]


def releases(name: str) -> list[tuple[Site, dict[str, str]]]:
    sources = find_suite(name).saes.items()
    return [(site, dict(source)) for site, source in sources if not isinstance(source, str)]


def test_the_suites_that_are_asked_for_are_there():
    assert {"gpt2-small", "pythia-70m-deduped", "gemma-2-2b", "gemma-2-9b", "llama-3.1-8b"} < {*HUB}
    sizes, kinds = ("270m", "1b", "4b", "12b"), ("pt", "it")
    assert {f"gemma-3-{size}-{kind}" for size in sizes for kind in kinds} < {*HUB}
    assert [name for name, row in registered().items() if row.is_local] == [
        "flowlet",
        "flowlet-mini",
    ]
    assert not registered()["flowlet"].variants


@pytest.mark.parametrize("name", VARIANTS)
def test_every_release_and_id_is_in_sae_lens_own_list(name: str):
    row = find_suite(name)
    found = releases(name)
    assert len(found) == len(row.saes) == 3 * (row.layers or 0)
    assert {site.layer for site, _ in found} == set(range(row.layers or 0))
    models = set()
    for site, source in found:
        release = KNOWN[source["release"]]
        assert source["id"] in release.saes_map, (str(site), source)
        models.add(release.model.rsplit("/")[-1].lower())
        hooked = site.module if "layer_" not in source["id"] else None
        number = re.search(r"(?:layer_|^l|blocks\.)(\d+)", source["id"])
        assert number is not None
        assert int(number[1]) == site.layer, hooked
    assert models == {{"openai-community/gpt2": "gpt2-small"}.get(
        row.model, row.model.rsplit("/")[-1].lower())}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_module_s_release_is_of_that_module(name: str):
    words = {
        "res": ("res", "lxr", "resid"),
        "mlp": ("mlp", "lxm"),
        "att": ("att", "lxa", "attn"),
    }
    for site, source in releases(name):
        parts = re.split(r"[-_]", source["release"])
        assert [m for m in MODULES if set(words[m]) & set(parts)] == [site.module]


@pytest.mark.parametrize("name", VARIANTS)
def test_neuronpedia_calls_the_saes_what_sae_lens_says(name: str):
    row = find_suite(name)
    for site, source in releases(name):
        called = KNOWN[source["release"]].neuronpedia_id.get(source["id"])
        assert row.neuronpedia.get(site) == called, str(site)


def test_pythia_s_embedding_bears_another_sae_s_name_in_sae_lens_list():
    # The reason why our names are patterns of our own, and no embedding is among the sites.
    wrong = KNOWN["pythia-70m-deduped-res-sm"]
    assert wrong.saes_map["blocks.0.hook_resid_pre"] == "e-res-sm"
    assert wrong.neuronpedia_id["blocks.0.hook_resid_pre"] == "pythia-70m-deduped/e-att-sm"
    assert "e-att-sm" not in " ".join(registered()["pythia-70m-deduped"].neuronpedia.values())


def test_the_sizes_are_those_of_the_releases():
    width = re.compile(r"width_(\d+)([km])")
    for name in VARIANTS:
        row = find_suite(name)
        for _, source in releases(name)[:1]:
            if match := width.search(source["id"]):
                expected = int(match[1]) * {"k": 1_000, "m": 1_000_000}[match[2]]
                assert abs((row.features or 0) / expected - 1) < 0.05


@pytest.mark.parametrize("l0", [20, 70, 400])
@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-2-2b@65k", "gemma-2-9b@131k"])
def test_the_sae_of_the_nearest_mean_l0_is_taken(name: str, l0: int):
    row = find_suite(f"{name}@l0={l0}")
    width = {"gemma-2-2b": "16k", "gemma-2-2b@65k": "65k"}.get(name, "131k")
    for site, source in row.saes.items():
        assert not isinstance(source, str)
        start = f"layer_{site.layer}/width_{width}/average_l0_"
        assert source["id"].startswith(start)
        there = [
            int(i.removeprefix(start)) for i in KNOWN[source["release"]].saes_map if start in i
        ]
        assert len(there) > 3
        best = min(abs(each - l0) for each in there)
        assert abs(int(source["id"].removeprefix(start)) - l0) == best
        assert declared_l0(source) == int(source["id"].removeprefix(start))


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
    assert row.features == 65_536
    assert registered()["gemma-2-2b"] is before
    assert before.features == 16_384
    whole = find_suite("gemma-2-2b@65k").parameters
    assert before.parameters < row.parameters < whole


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma-2-2b@64k", "gemma-2-2b has no variant '64k'; did you mean '65k'.*l0=70, res.mlp"),
        ("gemma-2-2b@l0=", "no variant 'l0='"),
        ("gemma-2-2b@res+mpl", "no variant 'res.mpl'; did you mean 'res.mlp'"),
        ("llama-3.1-8b@l0=50", "llama-3.1-8b has no choice of SAEs by their mean L0"),
        ("flowlet@16k", "flowlet has no variant '16k'"),
        ("gemma-2-2c@65k", "unknown suite 'gemma-2-2c'; did you mean 'gemma-2-2b'"),
    ],
)
def test_a_choice_that_is_not_there_names_the_nearest(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        find_suite(name)


def test_declared_l0_is_of_the_path_or_of_the_list():
    source = find_suite("gemma-2-2b").saes[Site(12, "res")]
    assert declared_l0(source) == 82
    assert declared_l0(find_suite("llama-3.1-8b").saes[Site(12, "att")]) == 50
    assert declared_l0({"release": "none", "id": "such"}) is None
    assert declared_l0("folder") is None


def test_what_matching_takes_follows_from_the_sizes():
    # 78 SAEs of 16,384 features, two matrices each, 52 at 2,304 and 26 at 2,048, float32.
    numbers = 2 * 16_384 * (52 * 2304 + 26 * 2048)
    expected = (KEPT + 2) * 4 * numbers / 2 / 78
    assert decoders_memory(find_suite("gemma-2-2b")) == pytest.approx(expected, rel=1e-3)


def test_the_command_tells_what_there_is_and_what_it_takes(capsys: pytest.CaptureFixture[str]):
    assert __main__.main(["suites"]) == 0
    said = capsys.readouterr().out
    for name in registered():
        assert name in said
    assert "variants: 16k, 65k" in said
    assert __main__.main(["suites", "gemma-2-2b@l0=70"]) == 0
    said = capsys.readouterr().out
    assert "average_l0_68" in said
    assert re.search(r"in float32 it takes \d+\.\d GiB of memory as a whole, \d\.\d to match", said)
    assert "Attention SAEs read z" in said
    assert __main__.main(["suites", "gemma-2-2b@l0=x"]) == 2
    assert "no variant 'l0=x'" in capsys.readouterr().err
