"""What this machine has: devices, memory that is free, and threads."""

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from flowhelpers.core.features import suggestion

if TYPE_CHECKING:
    import torch

A = TypeVar("A")
B = TypeVar("B")
SMALL = 2**24  # a product of fewer multiplications is done before a second thread would have begun
FEW = 16  # rows of a product for which reading the matrix takes as long as multiplying


@contextmanager
def fitting_threads(rows: int, width: int) -> Iterator[None]:
    """Inside the block torch has one thread on the CPU if the products are too small for more.

    Threads that wait for each other after every step of a pass can cost more than they save.
    `rows` are those of the products, such as the tokens of a pass; the largest matrices are taken
    to be `width` × `4 width`.
    """
    import torch

    if max(rows, FEW) * 4 * width**2 >= SMALL:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of the calling thread alone
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_threads(work: Callable[[A], B], parts: Iterable[A], device_type: str = "cpu") -> list[B]:
    """What work gives of each part, on as many threads as torch has, each with one of torch's.

    Threads that share every short step of one part would wait for each other at each. A GPU has
    threads of its own: there one part comes after the other.
    """
    import torch

    if device_type != "cpu":
        return [*map(work, parts)]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return [*pool.map(work, parts)]
    finally:
        torch.set_num_threads(threads)  # with which threads begin that come later


def check_device(name: str) -> None:
    """A ValueError that names this machine's devices if torch finds none of this name."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cpu", *(["cuda", *gpus] if gpus else [])]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if name not in here:
        raise ValueError(f"torch finds no device {name!r} on this machine{suggestion(name, here)}")


def halved(rows: int, what: str, error: Exception, said: bool) -> int:
    """Half as many rows as a device had no memory for, with a warning unless one was given.

    A MemoryError if there was one row alone, or `what` that is.
    """
    if rows == 1:
        raise MemoryError(f"the device has no room for one {what}") from error
    if not said:
        warnings.warn(
            f"out of memory with {rows} {what}s at a time: it goes on with half as many, and"
            " fewer if need be",
            stacklevel=3,
        )
    return rows // 2


def free_memory(device: str = "cpu") -> int:
    """Bytes that are free on a device; on a GPU with what torch keeps of it and does not use.

    In a task of Dask it is what the worker may still take.
    """
    if device.startswith("cuda"):
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil

    free = psutil.virtual_memory().available
    with suppress(KeyError, ValueError):  # not within a task of Dask
        limit = sys.modules["distributed"].get_worker().memory_manager.memory_limit
        own = psutil.Process().memory_info().rss
        free = max(0, min(free, limit - own)) if limit else free
    return free


def check_memory(needed: int, what: str, device: str = "cpu", dtype: str = "") -> None:
    """A MemoryError if `what` needs more bytes, in type `dtype`, than are free on a device."""
    free = free_memory(device)
    if needed > free:
        as_type = f" in {dtype}" if dtype else ""
        raise MemoryError(
            f"{what} needs {needed / 2**30:.1f} GiB{as_type} on {device},"
            f" and {free / 2**30:.1f} GiB are free"
        )


@cache
def quick_dtype(device_type: str) -> "torch.dtype":
    """The type in which products are quickest here: on a CPU a trial of some milliseconds tells."""
    import torch

    if device_type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    if device_type == "cuda" or torch.get_float32_matmul_precision() != "highest":
        return torch.bfloat16
    if device_type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16) * 2:
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(4096, 1024, dtype=dtype)
        began = time.perf_counter()
        torch.mm(a, b.T)
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=seconds.__getitem__)
