"""How long things take, how much memory, and what the command line asks for."""

import argparse
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch


def options(about: str | None, **defaults: Any) -> argparse.Namespace:
    """What the command line gives, by options of the types of their defaults."""
    parser = argparse.ArgumentParser(description=about)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


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
