"""Versions that were not tried: named once on load, and before what then fails."""

import os
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from flowhelpers.core import versions
from flowhelpers.suites import model as models
from flowhelpers.suites.bridge import load_model
from flowhelpers.suites.model import Model, cache_prompt, forward

PACKAGE = Path(versions.__file__).parents[1]
IDS = torch.arange(1, 11)[None]
TRIED = [
    "torch==2.13.0",
    "transformers>=5.23,<=5.24.0",
    "plotly>=7",
    'pywinpty>=2; sys_platform == "win32"',
    'numpy>=2,<3; python_version >= "3.11"',
    "pytest>=99; extra == 'dev'",
    "not-installed>=1",
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The versions that packages seem to have; flowhelpers asks for TRIED."""
    there = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "plotly": "7.1.0", "pytest": "9.0"}
    there |= {"numpy": "2.4.6", "pywinpty": "1.0"}
    asks = {"flowhelpers": TRIED}
    asks |= {name: ["torch==2.14.1"] for name in ("torchvision", "torchaudio")}

    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    def requires(name: str) -> list[str]:
        if name != "flowhelpers":
            version(name)
        return asks.get(name, [])

    monkeypatch.setattr(versions, "version", version)
    monkeypatch.setattr(versions, "requires", requires)
    for cached in (versions.untried, versions.warn_of_untried):
        cached.cache_clear()
    yield there
    monkeypatch.undo()
    for cached in (versions.untried, versions.warn_of_untried):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("changed", "asking", "tried"),
    [
        ({}, "", ""),
        ({"transformers": "5.24.1"}, "flowhelpers", ">=5.23,<=5.24.0"),
        ({"transformers": "5.25.0.dev0"}, "flowhelpers", ">=5.23,<=5.24.0"),
        ({"transformers": "5.22.2"}, "flowhelpers", ">=5.23,<=5.24.0"),
        ({"torch": "2.14.1", "torchaudio": "0.29.1"}, "flowhelpers", "==2.13.0"),
        ({"torch": "2.13.0", "torchvision": "0.29.1"}, "torchvision", "==2.14.1"),
    ],
)
def test_another_version_is_named_with_those_that_were_tried(
    installed: dict[str, str], changed: dict[str, str], asking: str, tried: str
):
    installed |= changed
    named = [f"{n} {v} is installed; {asking} was tried with {tried}" for n, v in changed.items()]
    assert versions.untried() == tuple(named[:1])


def test_loading_a_suite_warns_once(installed: dict[str, str]):
    from flowhelpers.suites.load import load_suite

    installed["plotly"] = "6.9.0"
    with pytest.warns(UserWarning, match=r"plotly 6\.9\.0 is installed; .* was tried with >=7"):
        load_suite("flowlet-mini")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_suite("flowlet-mini")


def test_a_check_that_fails_names_such_versions_first(
    installed: dict[str, str], toy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(models.HOOKS, "mlp", "blocks.{layer}.hook_attn_out")
    with pytest.raises(ValueError, match=r"at layer 0 the stream before plus") as plain:
        load_model(str(toy_folder))
    installed["transformers"] = "5.30.0"
    versions.untried.cache_clear()
    with pytest.raises(ValueError, match=r"^transformers 5\.30\.0 is installed; ") as named:
        load_model(str(toy_folder))
    assert str(named.value).endswith(f" Then: {plain.value}")


def test_an_import_that_fails_names_such_versions_and_missing_memory_does_not(
    installed: dict[str, str], toy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    import transformers

    installed["transformers"] = "5.30.0"
    for error, shown in ((ImportError, ValueError), (MemoryError, MemoryError)):

        def fail(*_: Any, error: type[Exception] = error, **__: Any) -> None:
            raise error("planted")

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(shown, match="planted") as said:
            load_model(str(toy_folder))
        assert ("5.30.0 is installed" in str(said.value)) == (shown is ValueError)


def test_a_run_says_so_before_it_begins(
    installed: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    from flowhelpers.__main__ import main

    installed["torch"] = "2.14.1"
    for what in ("no-such-notebook", "--resume=no-such-file"):
        assert main(["run", what]) == 2
        assert capsys.readouterr().err.startswith("flowhelpers: torch 2.14.1 is installed")


def test_the_release_of_transformers_is_the_one_that_was_to_be_tried():
    import transformers

    expected = os.environ.get("FLOWHELPERS_EXPECT_TRANSFORMERS", "")
    assert transformers.__version__.startswith(expected)


def test_a_pass_extends_its_cache_and_goes_on_from_it(toy: Model):
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    whole = forward(toy, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a word that transformers has given up, for one
        parts = [forward(toy, part, cache) for part in IDS.split([4, 1, 5], dim=1)]
    assert cache.get_seq_length() == 10
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_a_cache_that_stays_empty_is_an_error(toy: Model, monkeypatch: pytest.MonkeyPatch):
    from transformers import DynamicCache

    monkeypatch.setattr(DynamicCache, "update", lambda self, keys, values, *_, **__: (keys, values))
    with pytest.raises(ValueError, match="has 0 tokens in its cache after a pass, not 10"):
        cache_prompt(toy, IDS)


def test_one_function_alone_knows_what_the_cache_is_called():
    knowing = [p.name for p in PACKAGE.rglob("*.py") if "past_key_values" in p.read_text("utf-8")]
    assert knowing == ["model.py"]
    assert (PACKAGE / "suites/model.py").read_text("utf-8").count('"past_key_values"') == 1
