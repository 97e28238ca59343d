"""Sweeps: the cells of an experiment, and their texts.

A cell is one way to steer for one theme: a strategy, a layer, a strength. The best of many cells
looks better than it is: choose it on some samples and report it on others (CHOICES 39).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from flowhelpers.core.cache import DiskCache, key_of
from flowhelpers.core.features import Site
from flowhelpers.core.progress_bar import progress
from flowhelpers.flow.graph import FlowGraph
from flowhelpers.steering.controls import (
    random_feature_control,
    scale_plan,
    side_effects,
    total_norm,
)
from flowhelpers.steering.plans import Plan, SteeringVectors, make_plan, plan_or_none
from flowhelpers.steering.steered_texts import steer

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.activations.sparse import FeatureActivations
    from flowhelpers.suites.load import Suite

UNSTEERED = "unsteered"
CELL = ("theme", "strategy", "layer", "strength")


@dataclass(frozen=True)
class SweepCell:
    """One way to steer: a strategy by its name, a layer (or the last of several), a strength."""

    theme: str  # it decides the judge
    strategy: str = UNSTEERED
    plan: Plan | SteeringVectors | None = None  # vectors are added; None is no edit
    layer: int | None = None
    strength: float | None = None  # s, or r
    prompt: str | None = None  # if not that of the other cells


def sweep(
    suite: "Suite",
    cells: Sequence[SweepCell],
    prompt: str,
    samples: Sequence[int],
    cache: Path | None = None,
    seed: int = 0,
    batch_size: int = 512,
    **settings: Any,
) -> "pd.DataFrame":
    """The texts of every cell. Sample i has the same random stream in all of them.

    Args:
        suite: Of the plans.
        cells: The cells; texts that several have in common are written once.
        prompt: What texts go on from.
        samples: The numbers of the samples.
        cache: A file that keeps texts as they come, so that a sweep that was stopped goes on.
        seed: Decides the texts.
        batch_size: The most rows of a batch.
        settings: As of `steer`: `max_new_tokens`, `temperature`, `top_p`, `phases`, `skip_bos`.

    Returns:
        One row a text: `cell` (its place in `cells`), `theme`, `strategy`, `layer`, `strength`,
        `sample`, `text`.

    Raises:
        ValueError: If there is no cell or sample, or a prompt or plan does not fit the suite.
        FloatingPointError: As `steer`; it names the cell.
    """
    import pandas as pd

    numbers = [int(number) for number in samples]
    if not cells or not numbers:
        raise ValueError(f"{len(cells)} cells, {len(numbers)} samples: expected 1 or more of each")
    common = {"model": suite.model.fingerprint, "samples": numbers, "seed": seed} | settings
    if "phases" in settings:
        common["phases"] = sorted(settings["phases"])
    keys = [key_of(common | _plan_key(suite, cell, cell.prompt or prompt)) for cell in cells]
    texts = DiskCache(cache).get(set(keys)) if cache else {}
    missing: dict[str, dict[str, SweepCell]] = {}
    for key, cell in zip(keys, cells, strict=True):
        if key not in texts:
            missing.setdefault(cell.prompt or prompt, {})[key] = cell
    cells_per_batch = max(1, batch_size // len(numbers))
    batches = [
        (start, list(new)[i : i + cells_per_batch])
        for start, new in missing.items()
        for i in range(0, len(new), cells_per_batch)
    ]
    for start, batch in progress(batches, "sweep"):
        plans = {_name(missing[start][key], key): missing[start][key].plan for key in batch}
        written = steer(
            suite, plans, start, numbers, seed=seed, batch_size=batch_size, show_progress=False,
            **settings,
        )  # fmt: skip
        rows = written["text"].to_numpy().reshape(len(batch), -1).tolist()
        new = dict(zip(batch, rows, strict=True))
        if cache:
            DiskCache(cache).put(new)
        texts |= new
    rows = [(i, *(getattr(cell, name) for name in CELL)) for i, cell in enumerate(cells)]
    table = pd.DataFrame(rows, columns=["cell", *CELL]).astype({"layer": float, "strength": float})
    table = table.assign(sample=[numbers] * len(cells), text=[texts[key] for key in keys])
    return table.explode(["sample", "text"], ignore_index=True).astype({"sample": int})


def _name(cell: SweepCell, key: str) -> str:
    at = "" if cell.layer is None else f" at layer {cell.layer}"
    s = "" if cell.strength is None else f" of strength {cell.strength:g}"
    return f"{cell.theme}: {cell.strategy}{at}{s} [{key[:6]}]"


def _plan_key(suite: "Suite", cell: SweepCell, prompt: str) -> dict[str, Any]:
    """All that a cell's texts depend on, but for what all cells have in common."""
    if cell.plan is None:
        return {"prompt": prompt}
    if not isinstance(cell.plan, Plan):
        vectors = {str(at): vector.double().tolist() for at, vector in cell.plan.items()}
        return {"prompt": prompt, "push": vectors}
    plan = asdict(cell.plan)
    sites = {suite.feature(step.feature).site for step in cell.plan.steps}
    prints = {str(site): suite.sae(site).fingerprint for site in sites}
    return {"prompt": prompt, "saes": prints} | {k: v for k, v in plan.items() if k != "about"}


def strategy_cells(
    theme: str,
    strategies: Iterable[str],
    layers: Iterable[int],
    strengths: Iterable[float],
    plan_of: Callable[[str, int, float], Plan | SteeringVectors | None],
) -> list[SweepCell]:
    """The cells of every strategy, layer and strength (s or r) for which `plan_of` gives a plan."""
    return [
        SweepCell(theme, strategy, plan, layer, float(strength))
        for strategy, layer, strength in product(strategies, layers, strengths)
        if (plan := plan_of(strategy, layer, strength))
    ]


def graph_cells(
    suite: "Suite",
    theme: str,
    graph: FlowGraph,
    strategies: Iterable[str],
    strengths: Iterable[float],
    layers: Sequence[int] | None = None,
) -> list[SweepCell]:
    """Cells that add a graph's features up to `layers`, or three of its layers after the first."""
    of_graph = sorted(graph.nodes["layer"].unique())
    places = np.linspace(0, len(of_graph) - 1, 4).round().astype(int)[1:]
    ends = layers or sorted({int(of_graph[place]) for place in places})
    if not set(ends) & set(of_graph):
        raise ValueError(f"layers={layers}: the graph of {theme} has features at {of_graph}")

    def plan_of(strategy: str, layer: int, strength: float) -> Plan | None:
        return plan_or_none(suite, graph, strength, strategy=strategy, layer=layer)

    return strategy_cells(theme, strategies, ends, strengths, plan_of)


def vector_cells(
    suite: "Suite", theme: str, site: Site, vector: Tensor, feature: str, strengths: Iterable[float]
) -> list[SweepCell]:
    """A vector as steering vector, with the norms of a feature at the strengths."""
    cells = []
    for s in strengths:
        norm = total_norm(suite, make_plan(suite, [feature], s))
        vectors = {site: vector * norm / vector.norm()}
        cells.append(SweepCell(theme, "difference of means", vectors, site.layer, float(s)))
    return cells


def random_cells(
    suite: "Suite", cell: SweepCell, activations: "FeatureActivations", seeds: Iterable[int],
    texts: Sequence[str] = (),
) -> list[SweepCell]:  # fmt: skip
    """A cell for each seed, with random features in place of a cell's own (CHOICES 37).

    With texts each comes a second time, scaled to the norm of the cell's own plan on these.
    """
    assert isinstance(cell.plan, Plan)
    cells = []
    for seed in seeds:
        twin = random_feature_control(suite, cell.plan, activations, seed)
        cells.append(replace(cell, strategy="random features", plan=twin))
        if texts:
            own, other = side_effects(suite, {"own": cell.plan, "twin": twin}, texts)["norm"]
            if other > 0:
                scaled = scale_plan(twin, float(own / other))
                cells.append(replace(cell, strategy="random, same norm", plan=scaled))
    return cells


def equal_norm_cells(suite: "Suite", cells: Sequence[SweepCell], measure: str) -> list[SweepCell]:
    """Cells scaled to the total norm Σ‖Δh‖ of the cell of their theme with the strategy `measure`.

    At the same s, a plan of many layers changes more. Cells without a plan are left out.
    """
    budget = {c.theme: total_norm(suite, c.plan) for c in cells if c.plan and c.strategy == measure}
    equal = []
    for cell in cells:
        if cell.plan is not None and cell.theme in budget:
            factor = budget[cell.theme] / total_norm(suite, cell.plan)
            plan, s = scale_plan(cell.plan, factor), (cell.strength or 0) * factor
            equal.append(replace(cell, plan=plan, strength=s))
    return equal
