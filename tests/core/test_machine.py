"""Waits that leave the cores to others, and threads by the size of the work."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.core.machine import fitting_threads
from flowhelpers.suites.model import Edit, Model, run_model

WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SHOW = f"import os; print(*(os.environ.get(name) for name in {WAITS}))"


def shown(code: str, **environment: str) -> str:
    """What a fresh Python prints that knows nothing of how this one waits."""
    kept = {name: value for name, value in os.environ.items() if name not in WAITS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_waits_do_not_spin_where_torch_is_yet_to_be_loaded():
    assert shown(f"import flowhelpers; {SHOW}") == "PASSIVE 1000"
    assert shown(f"import flowhelpers.__main__; {SHOW}") == "PASSIVE 1000"  # kernels inherit it
    assert shown(f"import torch, flowhelpers; {SHOW}") == "None None"  # too late
    assert shown(f"import flowhelpers; {SHOW}", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE 1000"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads(rows: int, width: int) -> int:
    with fitting_threads(rows, width):
        return torch.get_num_threads()


@pytest.mark.usefixtures("two_threads")
def test_small_passes_have_one_thread_and_large_ones_all():
    assert threads(18, 192) == 1  # one text of flowlet
    assert threads(256 * 18, 192) == 2
    assert threads(1, 512) == threads(1, 2304) == 2  # one token of Pythia 70M, of Gemma 2 2B
    with pytest.raises(RuntimeError, match="planted"), fitting_threads(1, 8):
        raise RuntimeError("planted")
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_pass_of_few_tokens_has_one_thread_and_another_all(
    toy: Model, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def look(activations: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return activations

    bound = 20 * 4 * toy.d_model**2  # of 20 tokens
    monkeypatch.setattr("flowhelpers.core.machine.SMALL", bound)
    for rows in (2, 3):
        run_model(toy, torch.arange(1, 9).expand(rows, -1), edits=[Edit(Site(0, "res"), look)])
    assert seen == [1, 2]
    assert torch.get_num_threads() == 2
