"""Fixtures that several tests share: the loopback hub and what lies on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, Process
from hub_files import write_datasets, write_pythia, write_saes


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub on the loopback interface, empty at first; write repositories below `hub.root`."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


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
    """`EleutherAI/pythia-70m-deduped` on the hub, tiny, with its dictionaries; returns its name."""
    write_saes(hub.root)
    return write_pythia(hub.root)
