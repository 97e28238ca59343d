"""Steered texts: of some plans, or of the cells of an experiment (paper 3.5, B.1, B.2).

A cell is one way to steer for one theme: a strategy, a layer, a strength. The best of many cells
looks better than it is: choose it on some samples and report it on others (CHOICES 39).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowhelpers.activations.sparse import PASS_TENSORS
from flowhelpers.core.cache import DiskCache, key_of
from flowhelpers.core.features import parse_feature
from flowhelpers.core.machine import free_memory, halved
from flowhelpers.core.progress_bar import progress
from flowhelpers.flow.graph import FlowGraph
from flowhelpers.interventions import generation
from flowhelpers.steering.plans import Plan, SteeringVectors, make_plan, plan_edits
from flowhelpers.suites.model import is_edited

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

UNSTEERED = "unsteered"
LARGEST_BATCH = 512  # rows; beyond these a step only gets longer
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


def steer(
    suite: "Suite",
    plans: Mapping[str, Plan | SteeringVectors | None],
    prompt: str,
    samples: int | Sequence[int] = 32,
    max_new_tokens: int = 36,
    temperature: float = 1.27,
    top_p: float = 0.7,
    seed: int = 0,
    phases: Collection[str] = generation.PHASES,
    skip_bos: bool = False,
    batch_size: int | None = None,
    show_progress: bool = True,
) -> "pd.DataFrame":
    """Texts of several plans, or vectors to be added, many samples of each in one batch.

    Sample i has the same random stream under every plan, so that steered and unsteered text (a plan
    that is None) can be laid side by side. What else is in the batch makes no difference. The
    prompt is taken literally (CHOICES 24), temperature and top-p are the paper's.

    `samples` are so many, or those with these numbers; plans act in the `phases` (`prompt`,
    `generation` or both) and, with `skip_bos`, not at the first token (CHOICES 20); `batch_size` is
    the most rows of a batch, by default as many as memory allows; halved, with a warning, where a
    GPU runs out of it.

    Returns:
        One row a text: `plan`, `sample`, `text` (without the prompt); `attrs["batch_size"]` is the
        most rows that a batch had room for.

    Raises:
        FloatingPointError: If the logits that a plan makes are infinite or NaN; it names the plan.
        MemoryError: If not even one row fits.

    Example:
        >>> from flowhelpers import load_suite, make_plan, steer
        >>> suite = load_suite("flowlet")
        >>> plans = {"unsteered": None, "steered": make_plan(suite, ["4/res/3"], 8.0)}
        >>> table = steer(suite, plans, "I think", samples=2, max_new_tokens=4)
        >>> table[["plan", "sample"]].values.tolist()
        [['unsteered', 0], ['unsteered', 1], ['steered', 0], ['steered', 1]]
    """
    import pandas as pd

    numbers = list(range(samples)) if isinstance(samples, int) else list(samples)
    if not plans or not numbers:
        raise ValueError(f"{len(plans)} plans and samples={samples}: expected 1 or more of each")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    ids = generation.prompt_ids(suite.model, prompt, max_new_tokens)
    seeds = [generation.sample_seed(seed, number) for number in numbers]
    names, texts = list(plans), []
    most = batch_size or _fitting_rows(suite, plans.values(), ids.shape[1], max_new_tokens)
    at_first = most
    while len(texts) < len(names) * len(numbers):
        done, first = divmod(len(texts), len(numbers))
        batch = names[done : done + max(1, most // len(numbers))]
        own = seeds[first : first + most]  # all, unless not even one plan's fit
        rows = ids.expand(len(batch) * len(own), -1)
        try:
            tokens = generation.sample_tokens(
                suite.model, rows, own * len(batch), max_new_tokens, temperature, top_p,
                plan_edits(suite, [plans[name] for name in batch]), phases, skip_bos,
                show_progress=show_progress,
            )  # fmt: skip
        except generation.NotFiniteError as error:
            name = batch[error.rows[0] // len(own)]
            raise FloatingPointError(f"plan {name!r}: {error}") from error
        except torch.OutOfMemoryError as error:
            most = halved(len(rows), "text", error, said=most < at_first)
            continue
        texts += generation.continuations(suite.model, tokens[:, ids.shape[1] :])
    plan_of_row = np.repeat(names, len(numbers))
    table = pd.DataFrame({"plan": plan_of_row, "sample": numbers * len(names), "text": texts})
    table.attrs["batch_size"] = most
    return table


def _fitting_rows(
    suite: "Suite", plans: Iterable[Plan | SteeringVectors | None], prompt: int, new: int
) -> int:
    """How many rows fit in half of the free memory, beside the SAEs that edits hold."""
    model, cfg = suite.model, suite.model.bridge.cfg
    live = [plan for plan in plans if isinstance(plan, Plan) and plan.kind == "rescale"]
    sites = {parse_feature(step.feature).site for plan in live for step in plan.steps}
    width = suite.sae(min(sites)).width if sites else 0
    held = 2 * len(sites) * width * model.d_model
    # Keys and values, half of them again while a layer joins and repeats its own; the logits
    # and two copies, as of a model that caps them.
    cached = 3 * model.layers * (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    of_prompt = prompt * (PASS_TENSORS * model.d_model + 4 * width)
    of_row = (prompt + new) * cached + of_prompt + 3 * model.unembedding.shape[1]
    size = model.unembedding.element_size()
    room = free_memory(str(model.device)) // 2 - held * size
    return int(np.clip(room // (of_row * size), 1, LARGEST_BATCH))


def sweep(
    suite: "Suite",
    cells: Sequence[SweepCell],
    prompt: str,
    samples: Sequence[int],
    cache: Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    **settings: Any,
) -> "pd.DataFrame":
    """The texts of every cell, one row a text, as `steer` writes them with the same `settings`.

    Texts that several cells have in common are written once, and kept in the file `cache` as they
    come, so that a sweep that was stopped goes on. `cell` is the place in `cells`.
    """
    import pandas as pd

    numbers = [int(number) for number in samples]
    cache = None if is_edited(suite.model) else cache  # `plan.on`, say: its key does not tell
    common = {"model": suite.model.fingerprint, "samples": numbers, "seed": seed} | settings
    keys = [key_of(common | _plan_key(suite, cell, cell.prompt or prompt)) for cell in cells]
    texts = DiskCache(cache).get(set(keys)) if cache else {}
    missing: dict[str, dict[str, SweepCell]] = {}
    for key, cell in zip(keys, cells, strict=True):
        if key not in texts:
            missing.setdefault(cell.prompt or prompt, {})[key] = cell
    for start, new in missing.items():
        for first in progress(new, "sweep"):
            if first in texts:
                continue
            waiting = ((key, cell) for key, cell in new.items() if key not in texts)
            together = (batch_size or LARGEST_BATCH) // max(1, len(numbers))
            batch = dict(islice(waiting, max(1, together)))
            plans = {
                f"{c.theme}: {c.strategy}, layer {c.layer}, strength {c.strength} [{key}]": c.plan
                for key, c in batch.items()
            }
            written = steer(
                suite, plans, start, numbers, seed=seed, batch_size=batch_size,
                show_progress=False, **settings,
            )  # fmt: skip
            batch_size = written.attrs["batch_size"]  # halved, it may be
            rows = written["text"].to_numpy().reshape(len(batch), -1).tolist()
            of_batch = dict(zip(batch, rows, strict=True))
            if cache:
                DiskCache(cache).put(of_batch)
            texts |= of_batch
    rows = [(i, *(getattr(cell, name) for name in CELL)) for i, cell in enumerate(cells)]
    table = pd.DataFrame(rows, columns=["cell", *CELL]).astype({"layer": float, "strength": float})
    table = table.assign(sample=[numbers] * len(cells), text=[texts[key] for key in keys])
    return table.explode(["sample", "text"], ignore_index=True).astype({"sample": int})


def _plan_key(suite: "Suite", cell: SweepCell, prompt: str) -> dict[str, Any]:
    """All that a cell's texts depend on, but for what all cells have in common."""
    if not isinstance(cell.plan, Plan):
        vectors = {str(at): vector.tolist() for at, vector in (cell.plan or {}).items()}
        return {"prompt": prompt, "push": vectors}
    sites = {suite.feature(step.feature).site for step in cell.plan.steps}
    prints = {str(site): suite.about(site, "fingerprint") for site in sites}
    return {"prompt": prompt, "saes": prints} | asdict(replace(cell.plan, about=""))


def graph_cells(
    suite: "Suite", theme: str, graph: FlowGraph, strategy: str, strengths: Iterable[float],
    layers: Iterable[int], name: str | None = None, **settings: Any,
) -> list[SweepCell]:  # fmt: skip
    """Cells that steer a graph's features up to each layer, where there are some, at each strength.

    `name` is the strategy's in tables, if another; `settings` are those of `make_plan`.
    """
    of_graph = sorted(graph.nodes["layer"].unique())
    ends = [x for x in layers if (x in of_graph if strategy == "single" else x >= of_graph[0])]
    cells = []
    for layer, s in product(ends, strengths):
        plan = make_plan(suite, graph, s, strategy=strategy, layer=layer, **settings)
        cells.append(SweepCell(theme, name or strategy, plan, layer, float(s)))
    return cells
