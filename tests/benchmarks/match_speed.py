"""How fast top-k matching is beside torch and faiss, and how much memory it takes.

    python tests/benchmarks/match_speed.py [--features 16384] [--width 2304] [--k 5]

On a CPU the times are those of one target SAE against one source, each the best of
`--repeats`, by turns so that a busy machine slows all alike. faiss is timed if it is installed
(`pip install -e '.[bench]'`). With a GPU, all maps of a suite of Gemma 2 2B's shape (26 layers,
three sites) are made, beside the bare bfloat16 products; `--layers` does so on a CPU.

Two cores, the default shape, times as multiples of the bare product in the type that is quickest:

| the quickest type | bare product | one way | both ways | torch | faiss |
| --- | --- | --- | --- | --- | --- |
| float32 (Intel Xeon, AMX off) | 3.6 s | 1.14 | 1.13 | 1.0 | 1.07 |
| bfloat16 in AVX-512 (AMD EPYC) | 1.6 s | 1.1 to 1.3 | 1.35 to 1.4 | 4.5 | 3.5 |
| bfloat16 in AMX (Intel Xeon) | 0.75 to 0.95 s | 1.25 to 1.5 | 1.5 to 1.8 | 4.2 to 5.1 | 5.3 |

The quicker the product, the more counts what is not a product: bringing rows to the type (0.12 s),
the highest of each 64 (0.04 s), and what may be among the best in float32 (0.2 s). Memory beside
input and answer is 240 MiB one way. No GPU has been measured yet.
"""

import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from clock import memory, options, seconds
from torch import Tensor

from flowhelpers.core.directions import prepare, unit_rows
from flowhelpers.core.features import MODULES, Site, predecessor_sites
from flowhelpers.core.machine import quick_dtype
from flowhelpers.matching.cosine import top_k_both_ways, top_k_cosine
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite
from flowhelpers.suites.registry import SuiteRow
from flowhelpers.suites.saes import SAE

MIB = 2**20


def saes(features: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two SAEs, anisotropic as real ones are, half of whose features are related."""
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


def on_cpu(features: int, width: int, k: int, repeats: int) -> None:
    """Prints times and memory of all ways, and whether they agree."""
    target, source = saes(features, width)
    units = unit_rows(target), unit_rows(source)
    rough = [side.to(quick_dtype("cpu")) for side in units]
    ready = prepare(target, "cpu"), prepare(source, "cpu")

    def bare() -> None:
        for part in rough[0].split(2048):
            torch.mm(part, rough[1].T)

    ways: dict[str, Callable[[], object]] = {
        "the bare product": bare,
        "flowhelpers, one way": lambda: top_k_cosine(target, source, k),
        "both ways, normalised": lambda: top_k_both_ways(*ready, k),
        "torch.topk(A @ B.T)": lambda: torch.topk(units[0] @ units[1].T, k),
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
            times[name].append(seconds(way)[0])
    least = min(times["the bare product"])
    for name, found_times in times.items():
        print(f"{name:24}{min(found_times):8.2f} s{min(found_times) / least:8.2f} ×")
    before, most = memory(ways["flowhelpers, one way"])
    print(f"memory beside input and answer: {(most - before) / MIB:.0f} MiB")


def suite_of(layers: int, features: int, width: int, device: str) -> Suite:
    """SAEs at all three sites of so many layers, neighbours related by half."""
    directions: dict[Site, Tensor] = {}
    for layer in range(layers):
        for module in MODULES:
            pair = saes(features, width, seed=3 * layer + MODULES.index(module))
            directions[Site(layer, module)] = unit_rows(pair[0].to(device))
        if layer:
            before = directions[Site(layer - 1, "res")]
            here = directions[Site(layer, "res")]
            here[: features // 2] = unit_rows(here + before)[: features // 2]
    none = torch.zeros(0, dtype=torch.long)
    made = {
        site: SAE(site, rows, torch.ones(len(rows)), none, "random", None, site)
        for site, rows in directions.items()
    }
    row = SuiteRow("random", "none", dict.fromkeys(made, "random"), parameters=0)
    model: Any = SimpleNamespace(layers=layers)
    return Suite(row, model, made)


def whole_suite(layers: int, features: int, width: int, k: int, device: str) -> None:
    """Prints the time of all maps of a suite beside that of the bare bfloat16 products."""
    suite = suite_of(layers, features, width, device)
    pairs = [
        (suite.sae(Site(layer, "res")).directions, suite.sae(place).directions)
        for layer in range(layers)
        for place in predecessor_sites(Site(layer, "res")).values()
    ]
    rough = [(target.bfloat16(), source.bfloat16()) for target, source in pairs[:3]]

    def products() -> None:
        for number in range(len(pairs)):
            torch.mm(rough[number % len(rough)][0], rough[number % len(rough)][1].T)

    def matches() -> None:
        for target, source in pairs:
            top_k_both_ways(target, source, k)

    products()
    top_k_both_ways(*pairs[0], k)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    bare, ours = seconds(products)[0], seconds(matches)[0]
    print(f"{len(pairs)} maps of {features:,} × {width:,}, k = {k}, on {device}")
    print(
        f"bare bfloat16 products {bare:.2f} s, matches both ways {ours:.2f} s, {ours / bare:.1f} ×"
    )
    if device == "cuda":
        beside = (torch.cuda.max_memory_allocated() - held) / MIB
        print(f"{torch.cuda.get_device_name()}, {beside:.0f} MiB beside input")
    with tempfile.TemporaryDirectory() as cache:
        for what in ("in one call, both directions, nulls and disk", "from disk"):
            took, _ = seconds(lambda: match_table(suite, k, cache=Path(cache)))
            print(f"the whole match table {what}: {took:.2f} s")


if __name__ == "__main__":
    given = options(__doc__, features=16_384, width=2_304, k=5, repeats=3, layers=0)
    shape = given.features, given.width, given.k
    if torch.cuda.is_available():
        whole_suite(given.layers or 26, *shape, "cuda")
    elif given.layers:
        whole_suite(given.layers, *shape, "cpu")
    else:
        on_cpu(*shape, given.repeats)
