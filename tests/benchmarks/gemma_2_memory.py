"""Peak memory and time of the whole match table of Gemma 2 2B, from files of the true size.

    python tests/benchmarks/gemma_2_memory.py FOLDER [--layers 26] [--k 5]

Files of Gemma Scope's true format and width (26 layers, three sites, 16,384 features) are written
to FOLDER with random numbers, by default whole: 23 GB. With `--decoders` the encoders, which
nothing here reads, are left out of the files: 12 GB. The decoders are then read one by one as those
of a suite of the hub are, and the table is made; memory is watched all the while.

On two cores of an Intel Xeon with AMX all 26 layers took 205 s, 3.6 times the bare products of each
pair of sites one way (on another day 4 layers took 2.9 times theirs; the table has both ways, and
scores by chance), and at most 2.9 GiB in all; read from disk again, 3 s. Of a pair's 2.6 s two are
its matches, with SAEs being read meanwhile; 0.4 are chance, 0.2 the rows made ready, the table and
its file. Where float32 is quickest, 4 layers take 1.7 times their products.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from clock import memory

from flowhelpers.core.features import MODULES, Site, predecessor_sites
from flowhelpers.core.machine import quick_dtype
from flowhelpers.matching.table import match_table
from flowhelpers.suites.attention import AttentionOutput
from flowhelpers.suites.load import KEPT, OnDemand, Suite
from flowhelpers.suites.registry import SuiteRow
from flowhelpers.suites.sae_files import SaeFiles
from flowhelpers.suites.saes import SAE, read_sae

FEATURES, D_MODEL, D_Z = 16_384, 2_304, 2_048
HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
GIB = 2**30


def write_files(folder: Path, layers: int, decoders_alone: bool) -> dict[Site, Path]:
    """A params.npz for every site, as Gemma Scope has them; those that are there stay."""
    random = np.random.default_rng(0)
    common = random.standard_normal((FEATURES, D_MODEL), dtype=np.float32)
    paths = {}
    for site in (Site(layer, module) for layer in range(layers) for module in MODULES):
        path = folder / f"layer_{site.layer}" / site.module / "params.npz"
        paths[site] = path
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        d = D_Z if site.module == "att" else D_MODEL
        rows = random.standard_normal((FEATURES, d), dtype=np.float32)
        rows += common[:, :d]  # so that SAEs are related
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        arrays = {
            "W_dec": rows,
            "threshold": np.ones(FEATURES, np.float32),
            "b_enc": np.zeros(FEATURES, np.float32),
            "b_dec": np.zeros(d, np.float32),
        }
        np.savez(path, **arrays if decoders_alone else {**arrays, "W_enc": rows.T})
        print(f"\rwritten: {len(paths)} of {3 * layers}", end="", flush=True)
    print()
    return paths


def suite_of(paths: dict[Site, Path], layers: int) -> Suite:
    """A suite that reads each decoder when it is asked for, and keeps a few."""

    def output(layer: int) -> AttentionOutput:
        generator = torch.Generator().manual_seed(layer)
        weights = torch.randn(D_Z, D_MODEL, generator=generator)
        return AttentionOutput(weights, torch.rand(D_MODEL, generator=generator) + 0.5)

    def load(site: Site) -> SAE:
        hook = f"blocks.{site.layer}.{HOOKS[site.module]}"
        files = SaeFiles(str(paths[site]), paths[site], hook, str(site))
        brings = partial(output, site.layer)
        return read_sae(site, files, _nothing, D_MODEL, "cpu", "float32", brings)

    row = SuiteRow("gemma-2-2b", "none", dict.fromkeys(paths, "none"), 0, layers=layers)
    return Suite(row, _nothing, OnDemand(sorted(paths), load, KEPT))


def _nothing() -> NoReturn:
    raise AssertionError("matching needs no model and no encoder")


def bare_products(layers: int) -> float:
    """Seconds of one product for each pair of sites, in the type that is quickest here."""
    rough = torch.ones(FEATURES, D_MODEL, dtype=quick_dtype("cpu"))
    began = time.perf_counter()
    for part in rough.split(2048):
        torch.mm(part, rough.T)
    once = time.perf_counter() - began
    return once * sum(len(predecessor_sites(Site(layer, "res"))) for layer in range(layers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory of Gemma 2 2B's match table.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--decoders", action="store_true", help="write decoders alone")
    options = parser.parse_args()
    paths = write_files(options.folder, options.layers, options.decoders)
    suite = suite_of(paths, options.layers)
    bare = bare_products(options.layers)
    with tempfile.TemporaryDirectory() as cache:
        for what in ("made", "read from disk"):
            began = time.perf_counter()
            most = memory(lambda: match_table(suite, options.k, cache=Path(cache)))[1]
            took = time.perf_counter() - began
            print(
                f"{options.layers} layers, {what}: {took:.0f} s, {took / bare:.2f} × the bare"
                f" products ({bare:.0f} s); peak memory {most / GIB:.2f} GiB in all"
            )
