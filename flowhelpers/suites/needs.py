"""What each experiment needs of a suite: what is fetched, held in memory, and how long it takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from flowhelpers.core.machine import free_memory
from flowhelpers.suites.load import chosen_device, chosen_dtype, decoders_memory, least_memory
from flowhelpers.suites.registry import BYTES, SuiteRow

if TYPE_CHECKING:
    import pandas as pd

MATCHING = 9.0  # of the bare products: both ways, scores by chance, what sorts and certifies them
WORKING = 400 * 2**20  # bytes for products and tables, beside what is loaded
TRIAL = 2048  # rows of the product that measures a machine
TOKENS = 20_000  # of the texts of notebook 03
OCCURRENCES = 1_000  # of the deactivations of notebook 04, each of some passes over a short text
PASSES, CONTEXT = 12, 20
TEXTS, LENGTH = 500, 50  # of the sweeps of notebooks 05 and 06


@dataclass(frozen=True)
class Need:
    """What an experiment needs.

    Attributes:
        experiment: What is done.
        notebooks: Where.
        fetched: Bytes from the hub, what is cached included.
        memory: Bytes on the device at a time.
        seconds: How long it takes to compute, roughly.
    """

    experiment: str
    notebooks: str
    fetched: int
    memory: int
    seconds: float


def needs(row: SuiteRow, dtype: str, speeds: Mapping[str, float]) -> list[Need]:
    """What each experiment needs of a suite, by arithmetic from its sizes.

    Times are those of the products alone, at the speed that was measured, for the numbers of texts
    above; what is small is slower than that.

    Args:
        row: The suite.
        dtype: Type of the weights.
        speeds: Operations a second, as `speed` gives them: of the `model` in that type, and of
            `matching` in its own.
    """
    count = max(len(row.saes), 1)
    model = row.model_parameters or 0
    each = (row.parameters - model) // count  # numbers of an SAE
    files = 0 if row.is_local else each * count * BYTES[row.stored.get("saes", "float32")]
    whole = 0 if row.is_local else model * BYTES[row.stored.get("model", "float32")]
    at_z = sum(site.module == "att" for site in row.saes) if row.d_att else 0
    outputs = (
        at_z * (row.d_att or 0) * (row.d_model or 0) * BYTES[row.stored.get("model", "float32")]
    )
    residual = [site for site in row.saes if site.module == "res"]
    pairs = sum(
        sum(s.layer == r.layer - (s.module == "res") for s in row.saes if s != r) for r in residual
    )
    features = row.features or each // (2 * (row.d_model or 1))
    products = 2 * pairs * features**2 * (row.d_model or 1)
    reading = 2 * (model + each * count // 2)  # operations a token: the model, and all encoders
    least = least_memory(row, dtype) + WORKING
    both = files + whole
    return [
        Need("matching, flow graphs, labels", "01 02", files + outputs,
             decoders_memory(row) + WORKING, MATCHING * products / speeds["matching"]),
        Need(f"groups, {TOKENS:,} tokens", "03", both, least, TOKENS * reading / speeds["model"]),
        Need(f"deactivation, {OCCURRENCES:,} occurrences", "04", both, least,
             OCCURRENCES * PASSES * CONTEXT * 2 * model / speeds["model"]),
        Need(f"steering, {TEXTS} texts of {LENGTH} tokens", "05 06", both, least,
             TEXTS * LENGTH * 2 * model / speeds["model"]),
    ]  # fmt: skip


def needs_table(
    rows: Iterable[SuiteRow], device: str = "auto", notebooks: Iterable[str] = ("01 02", "03")
) -> "pd.DataFrame":
    """What several suites need of this machine, each by itself.

    Args:
        rows: The suites.
        device: Where they would run.
        notebooks: Of which notebooks, as `needs` names them.

    Returns:
        One row a suite and experiment: `suite`, `experiment`, `fetched_gb`, `memory_gib`,
        `minutes` (roughly, from the products alone) and `fits`, whether that memory is free now.
    """
    import pandas as pd

    from flowhelpers.matching.cosine import quick_dtype

    wanted, records = set(notebooks), []
    measured = cache(speed)
    for row in rows:
        place = chosen_device(row, device)
        dtype = chosen_dtype(row, place)
        quick = str(quick_dtype(place)).removeprefix("torch.")
        speeds = {"model": measured(place, dtype), "matching": measured(place, quick)}
        for need in needs(row, dtype, speeds):
            if need.notebooks in wanted:
                records.append(
                    {
                        "suite": row.name,
                        "experiment": need.experiment,
                        "fetched_gb": need.fetched / 1e9,
                        "memory_gib": need.memory / 2**30,
                        "minutes": need.seconds / 60,
                        "fits": need.memory <= free_memory(place),
                    }
                )
    return pd.DataFrame(records)


def speed(device: str, dtype: str) -> float:
    """Operations a second of a product of matrices on this machine, measured in some milliseconds.

    Args:
        device: Torch device.
        dtype: Type of the matrices.
    """
    import time

    import torch

    a = torch.ones(TRIAL, TRIAL, device=device, dtype=getattr(torch, dtype))
    fastest = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        (a @ a).sum().item()  # which waits for it
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * TRIAL**3 / fastest
