"""Match tables whose layers are made by workers of Dask."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("distributed")
from distributed import Client, LocalCluster

from flowhelpers.core.features import Site
from flowhelpers.core.machine import free_memory
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import load_suite


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    options: dict[str, Any] = {"dashboard_address": None, "memory_limit": "3GiB"}
    with LocalCluster(n_workers=2, threads_per_worker=2, **options) as local, Client(local) as one:
        yield one


@pytest.mark.parametrize("method", ["cosine", "random", "permutation", "pearson"])
def test_tables_are_those_of_one_machine_to_the_byte(client: Client, tmp_path: Path, method: Any):
    suite = load_suite("flowlet-mini")
    options: dict[str, Any] = {"k": 3, "seed": 7, "method": method, "layers": [0, 2, 5]}
    if method == "pearson":
        options["texts"] = ["The cat sat on the mat, and the dog lay by the door."] * 20
    here = match_table(suite, **options, cache=tmp_path / "here")
    there = match_table(suite, **options, cache=tmp_path / "there", client=client)
    pd.testing.assert_frame_equal(here, there)
    kept = sorted(tmp_path.glob("here/matches/*"))
    assert len(kept) == 3
    for file in kept:
        assert file.read_bytes() == (tmp_path / "there/matches" / file.name).read_bytes()
    unused = SimpleNamespace(run=lambda *_, **__: {})  # all is on disk
    again = match_table(suite, **options, cache=tmp_path / "there", client=unused)
    pd.testing.assert_frame_equal(here, again)


def test_a_worker_has_the_memory_that_it_was_given(client: Client):
    free = client.submit(free_memory, pure=False).result()
    assert 0 < free < 3 * 2**30
    assert free < free_memory()


def test_layers_go_to_workers_with_memory_for_them(tmp_path: Path):
    asked: list[list[str] | None] = []

    def cluster(**limits: int) -> SimpleNamespace:
        def submit(work: Any, *given: Any, workers: list[str] | None, **_: Any) -> Any:
            asked.append(workers)
            return SimpleNamespace(result=lambda: work(*given))

        there = {"workers": {name: {"memory_limit": limits[name]} for name in limits}}
        of_all = {"run": lambda *_, **__: {}, "scheduler_info": lambda: there}
        return SimpleNamespace(**of_all, submit=submit)

    suite = load_suite("flowlet-mini")
    given: dict[str, Any] = {"k": 2, "cache": tmp_path}
    match_table(suite, layers=[1], client=cluster(small=2**20, large=2**40, any=0), **given)
    match_table(suite, layers=[2], client=cluster(large=2**40, any=0), **given)
    assert asked == [["large", "any"], None]
    with pytest.raises(MemoryError, match=r"flowlet-mini needs 0\.\d+ GiB on a worker, and of 1"):
        match_table(suite, layers=[3], client=cluster(small=2**20), **given)


def test_a_worker_with_another_suite_of_that_name_is_refused(client: Client, tmp_path: Path):
    suite = load_suite("flowlet-mini")
    saes = {site: suite.sae(site) for site in suite.saes}
    saes[Site(1, "res")] = saes[Site(2, "res")]
    wrong = replace(suite, saes=saes)
    with pytest.raises(
        ValueError, match="this worker has another SAE at 1/res of suite flowlet-mini"
    ):
        match_table(wrong, layers=[1], client=client, cache=tmp_path)
