"""Fixtures that several tests share: the loopback hub and what lies on it, and the toy suite."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

# Before torch: of the tests that run side by side each has its share of the cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

import pytest
from browsers import Pages, open_browser
from hub import Hub, Process
from hub_files import write_datasets, write_pythia, write_saes
from jaxtyping import install_import_hook

install_import_hook("flowhelpers", "checks.checked")

if TYPE_CHECKING:
    from transformers import Gemma3ForCausalLM

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.model import Model


@pytest.fixture(scope="session", autouse=True)
def cache_of_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Match tables are kept in a folder of these tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWHELPERS_CACHE", str(tmp_path_factory.mktemp("tables")))
        yield


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub on the loopback interface, empty at first; write repositories below `hub.root`."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    """A browser; its pictures lie in FLOWHELPERS_SHOTS, if that is set."""
    with open_browser(
        Path(os.environ.get("FLOWHELPERS_SHOTS") or tmp_path_factory.mktemp("shots"))
    ) as pages:
        yield pages


@pytest.fixture
def hub_here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, as that of the running process, with an empty cache and no requests so far."""
    hub.use_in_process(tmp_path / "home", monkeypatch)
    hub.reset()
    return hub


@pytest.fixture
def run_python(hub: Hub, tmp_path: Path) -> Process:
    """Runs code in a process of its own whose hub is the loopback hub; the cache starts empty."""
    hub.reset()
    return Process(hub.environment(tmp_path / "home"))


@pytest.fixture(scope="session")
def paper_datasets(hub: Hub) -> dict[str, list[str]]:
    """The paper's four datasets on the hub, tiny: the texts of each by the corpus's name."""
    return write_datasets(hub.root)


@pytest.fixture(scope="session")
def pythia(hub: Hub) -> str:
    """`EleutherAI/pythia-70m-deduped` on the hub, tiny, with its SAEs; returns its name."""
    write_saes(hub.root)
    return write_pythia(hub.root)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model's Hugging Face folder."""
    import toys

    return toys.write_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="session")
def toy(toy_folder: Path) -> "Model":
    """The toy model behind the door."""
    from flowhelpers.suites.bridge import load_model

    return load_model(str(toy_folder))


@pytest.fixture(scope="session")
def plain_toy(toy_folder: Path) -> "Gemma3ForCausalLM":
    """The toy model as Hugging Face has it, of the same weights."""
    from transformers import Gemma3ForCausalLM

    return Gemma3ForCausalLM.from_pretrained(toy_folder, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The adder's suite, texts, activations and match table."""
    import adder

    return adder.world(tmp_path_factory.mktemp("adder"))


@pytest.fixture(scope="session")
def planted_folder(toy_folder: Path, toy: "Model") -> Path:
    """A suite's folder around the toy model, with the planted SAEs at every site."""
    import toys

    from flowhelpers.suites.model import run_model, tokenize

    tokens = tokenize(toy, toys.TEXTS)
    _, read = run_model(toy, tokens.ids, read=toy.sites())
    text = {site: values[tokens.is_text] for site, values in read.items()}
    return toys.write_suite(toy_folder.parent, toys.planted_saes(text))


@pytest.fixture(scope="session")
def planted(planted_folder: Path) -> "Suite":
    """The suite of that folder, loaded."""
    from flowhelpers.suites.load import load_suite

    return load_suite(planted_folder)
