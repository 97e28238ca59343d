"""How fast top-k matching is beside torch and faiss, and how much memory it takes.

    python tests/benchmarks/match_speed.py [--features 16384] [--width 2304] [--k 5]

On a CPU the times are those of one target dictionary against one source, each the best of
`--repeats`, by turns so that a busy machine slows all alike. faiss is timed if it is installed
(`pip install -e '.[bench]'`). With a GPU, all maps of a suite of Gemma 2 2B's shape (26 layers,
three sites) are made in one go, beside the bare bfloat16 products.
"""

import argparse
import threading
import time
from collections.abc import Callable
from importlib import import_module

import psutil
import torch
from torch import Tensor

from flowhelpers.cosine import quick_dtype, top_k_cosine, unit_rows

MIB = 2**20


def dictionaries(features: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two dictionaries, anisotropic as real ones are, half of whose features are related."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    spread, common = normal(width).square().sqrt() + 0.3, 0.2 * normal(width)
    source = normal(features, width) * spread + common
    target = normal(features, width) * spread + common
    related = torch.randperm(features, generator=generator)[: features // 2]
    kin = torch.randperm(features, generator=generator)[: features // 2]
    target[related] += 2 * torch.rand(len(kin), 1, generator=generator) * source[kin]
    return target, source


def seconds(compute: Callable[[], object]) -> float:
    """How long it takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    compute()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_beside(compute: Callable[[], object]) -> float:
    """The most memory in use at a time, beside what was in use before, in MiB."""
    process = psutil.Process()
    used = [process.memory_info().rss]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            used.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    compute()
    done.set()
    watcher.join()
    return (max(used) - used[0]) / MIB


def on_cpu(features: int, width: int, k: int, repeats: int) -> None:
    """Prints times and memory of all ways, and whether they agree."""
    target, source = dictionaries(features, width)
    units = unit_rows(target), unit_rows(source)
    ways: dict[str, Callable[[], object]] = {
        "torch.topk(A @ B.T)": lambda: torch.topk(units[0] @ units[1].T, k),
        "flowhelpers": lambda: top_k_cosine(target, source, k),
    }
    try:
        faiss = import_module("faiss")
    except ImportError:
        print("faiss is not installed: left out")
    else:
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(width)
        index.add(units[1].numpy())
        ways["faiss IndexFlatIP"] = lambda: index.search(units[0].numpy(), k)
    expected = torch.topk(units[0] @ units[1].T, k)
    found = top_k_cosine(target, source, k)
    other = found.indices != expected.indices
    apart = (found.scores - expected.values).abs().max().item()
    print(f"{features:,} features of width {width:,}, k = {k}, {torch.get_num_threads()} threads,")
    print(
        f"products in {quick_dtype('cpu')}; indices that differ from torch's: {int(other.sum())},"
    )
    print(f"cosines by at most {apart:.1e}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(seconds(way))
    ours = min(times["flowhelpers"])
    for name, found_times in times.items():
        print(f"{name:24}{min(found_times):8.2f} s{min(found_times) / ours:8.1f} ×")
    print(f"memory beside input and answer: {peak_beside(ways['flowhelpers']):.0f} MiB")


def on_gpu(features: int, width: int, k: int, layers: int = 26) -> None:
    """Prints the time of all maps of a suite beside that of the bare products."""
    target, source = (side.cuda() for side in dictionaries(features, width))
    rough = unit_rows(target).bfloat16(), unit_rows(source).bfloat16()
    maps = 3 * layers - 1

    def products() -> None:
        for _ in range(maps):
            torch.mm(rough[0], rough[1].T)

    def matches() -> None:
        for _ in range(maps):
            top_k_cosine(target, source, k)

    products()
    top_k_cosine(target, source, k)
    bare, ours = seconds(products), seconds(matches)
    expected = torch.topk(unit_rows(target[:2048]) @ unit_rows(source).T, k).indices
    same = (top_k_cosine(target[:2048], source, k).indices == expected).float().mean()
    print(f"{torch.cuda.get_device_name()}: {maps} maps of {features:,} × {width:,}, k = {k}")
    print(f"bare bfloat16 products {bare:.2f} s, matches {ours:.2f} s, {ours / bare:.1f} ×")
    print(f"indices equal to torch's float32: {same:.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How fast top-k matching is.")
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=2_304)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if torch.cuda.is_available():
        on_gpu(options.features, options.width, options.k)
    else:
        on_cpu(options.features, options.width, options.k, options.repeats)
