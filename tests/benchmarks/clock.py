"""How long things take."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(compute: Callable[[], Any]) -> tuple[float, Any]:
    """How long it takes, and what it gives."""
    began = time.perf_counter()
    found = compute()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, found
