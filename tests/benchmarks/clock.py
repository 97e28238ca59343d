"""How long things take, and how much memory."""

import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch


def seconds(compute: Callable[[], Any]) -> tuple[float, Any]:
    """How long it takes, and what it gives."""
    began = time.perf_counter()
    found = compute()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def memory(compute: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that this process has in use before, and the most at a time while it computes."""
    process = psutil.Process()
    used = [process.memory_info().rss]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            used.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        compute()
    finally:
        done.set()
        watcher.join()
    return used[0], max(used)
