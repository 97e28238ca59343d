"""Sweeps over ways to steer: every cell's texts, their scores, and the cell that does best.

A cell is one way to steer for one theme: a strategy, a layer, a strength. The best of many cells
looks better than it is, so it is to be chosen on some samples and reported on others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from flowhelpers.core.bootstrap import mean_intervals
from flowhelpers.core.cache import DiskCache, key_of
from flowhelpers.core.progress_bar import progress
from flowhelpers.steering.controls import side_effects
from flowhelpers.steering.plans import Plan, SteeringVectors, steer

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

UNSTEERED = "unsteered"
CELL = ("theme", "strategy", "layer", "strength")
TIMES = 1000  # resamples: the ends of intervals decide what beats what
SCORES = ("behavioral", "coherence", "score")


@runtime_checkable
class Judge(Protocol):
    """What gives texts their scores: the embedded judge, an endpoint, or your own."""

    def judge(self, texts: Sequence[str]) -> "pd.DataFrame":
        """`behavioral` and `coherence` from 0 to 1, one row a text; missing where there is none."""
        ...


@dataclass(frozen=True)
class SweepCell:
    """One way to steer.

    Attributes:
        theme: What for; the judge goes by it.
        strategy: Its name, such as `single` or `unsteered`.
        plan: A plan, vectors to be added, or None for no edit.
        layer: The layer, or the last one.
        strength: s, or r.
        prompt: What the texts go on from, if not what those of the other cells do.
    """

    theme: str
    strategy: str = UNSTEERED
    plan: Plan | SteeringVectors | None = None
    layer: int | None = None
    strength: float | None = None
    prompt: str | None = None


def sweep(
    suite: "Suite",
    cells: Sequence[SweepCell],
    prompt: str,
    samples: Sequence[int],
    kept: Path | None = None,
    seed: int = 0,
    batch_size: int = 512,
    **settings: Any,
) -> "pd.DataFrame":
    """The texts of every cell. Sample i has the same random stream in all of them.

    Args:
        suite: The suite.
        cells: The cells; what several have in common is written once.
        prompt: What texts go on from.
        samples: The numbers of the samples.
        kept: A file in which texts are kept as they come, so that a sweep that was stopped goes on
            from there; without it nothing is kept.
        seed: Decides the texts.
        batch_size: The most rows of a batch.
        settings: As of `steering.steer`: `max_new_tokens`, `temperature`, `top_p`, `phases`,
            `skip_bos`.

    Returns:
        One row a text: `cell` (its place in `cells`), `theme`, `strategy`, `layer`, `strength`,
        `sample`, `text`.

    Raises:
        ValueError: If there is no cell or sample, or a prompt or plan does not fit the suite.
        FloatingPointError: As `steering.steer`; it names theme, strategy, layer and strength.
    """
    import pandas as pd

    numbers = [int(number) for number in samples]
    if not cells or not numbers:
        raise ValueError(
            f"{len(cells)} cells of {len(numbers)} samples: expected 1 or more of each"
        )
    common = {"model": suite.model.fingerprint, "samples": numbers, "seed": seed} | settings
    if "phases" in settings:
        common["phases"] = sorted(settings["phases"])  # a set will do, and its order means nothing
    keys = [key_of(common | _asked(suite, cell, cell.prompt or prompt)) for cell in cells]
    found = DiskCache(kept).get(set(keys)) if kept else {}
    missing = {key: cell for key, cell in zip(keys, cells, strict=True) if key not in found}
    batches = []
    for start in dict.fromkeys(cell.prompt or prompt for cell in missing.values()):
        mine = [key for key, cell in missing.items() if (cell.prompt or prompt) == start]
        size = max(1, batch_size // len(numbers))
        batches += [(start, mine[i : i + size]) for i in range(0, len(mine), size)]
    for start, batch in progress(batches, "sweep"):
        plans = {_name(missing[key], key): missing[key].plan for key in batch}
        texts = steer(
            suite, plans, start, numbers, seed=seed, batch_size=batch_size, bar=False, **settings
        )["text"].tolist()
        new = {key: texts[i * len(numbers) :][: len(numbers)] for i, key in enumerate(batch)}
        if kept:
            DiskCache(kept).put(new)
        found |= new
    cell_of = np.repeat(np.arange(len(cells)), len(numbers))
    table = pd.DataFrame({"cell": cell_of, **_described(cells, cell_of)})
    texts = [text for key in keys for text in found[key]]
    return table.assign(sample=numbers * len(cells), text=texts)


def _described(cells: Sequence[SweepCell], cell_of: np.ndarray) -> dict[str, Any]:
    columns = {name: [getattr(cells[cell], name) for cell in cell_of] for name in CELL}
    floats = {name: np.array(columns[name], dtype=float) for name in ("layer", "strength")}
    return columns | floats


def _name(cell: SweepCell, key: str) -> str:
    at = "" if cell.layer is None else f" at layer {cell.layer}"
    s = "" if cell.strength is None else f" of strength {cell.strength:g}"
    return f"{cell.theme}: {cell.strategy}{at}{s} [{key[:6]}]"


def _asked(suite: "Suite", cell: SweepCell, prompt: str) -> dict[str, Any]:
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


def score_texts(
    texts: "pd.DataFrame", judges: Mapping[str, Judge], suppress: bool = False
) -> "pd.DataFrame":
    """Texts with their scores: `behavioral`, `coherence`, `score`.

    The score of a text is B · C, or (1 - B) · C where the theme is to be suppressed (paper 5.3, B;
    CHOICES 22); missing where the judge gave none (CHOICES 23).

    Args:
        texts: As `sweep` gives.
        judges: The judge of each theme.
        suppress: Whether the theme is to be suppressed.

    Raises:
        ValueError: If a theme has no judge, or a judge gives scores outside 0 to 1.
    """
    import pandas as pd

    if missing := set(texts["theme"]) - set(judges):
        raise ValueError(f"no judge for {', '.join(sorted(missing))}: expected one for each theme")
    parts, numbered = [], texts.reset_index(drop=True)
    for theme, part in numbered.groupby("theme", sort=False):
        different = list(dict.fromkeys(part["text"]))
        scores = judges[str(theme)].judge(different)[["behavioral", "coherence"]]
        outside = (scores < 0) | (scores > 1)
        if len(scores) != len(different) or outside.any(axis=None):
            raise ValueError(
                f"the judge of {theme!r} gave {len(scores)} rows for {len(different)} texts,"
                f" {int(outside.sum().sum())} scores outside 0 to 1"
            )
        mine = scores.set_index(pd.Index(different)).loc[part["text"]].set_index(part.index)
        parts.append(part.join(mine))
    found = pd.concat(parts).sort_index().set_axis(texts.index)
    present = 1 - found["behavioral"] if suppress else found["behavioral"]
    return found.assign(score=present * found["coherence"])


def cell_means(
    scores: "pd.DataFrame", by: Sequence[str] = ("cell", *CELL), times: int = TIMES, seed: int = 0
) -> "pd.DataFrame":
    """The mean scores of each cell, with 95 % intervals from samples drawn anew.

    The product is taken text by text, before the mean (CHOICES 22). The same samples are drawn for
    all cells, as they share their random streams.

    Args:
        scores: As `judged` gives.
        by: Columns that tell cells apart.
        times: Resamples.
        seed: Of these.

    Returns:
        `by`, `n` (texts with scores), `missing` (texts without), and `behavioral`, `coherence` and
        `score`, each with `_low` and `_high`.
    """
    import pandas as pd

    keys = list(by)
    order = scores[keys].drop_duplicates()
    marks = scores[keys].astype(object).where(scores[keys].notna(), "")
    number = marks.groupby(keys, sort=False).ngroup()
    table = scores.assign(group=number, text=scores["sample"])
    drawn = pd.DataFrame({"dataset": "samples", "text": np.sort(scores["sample"].unique())})
    means = mean_intervals(table, SCORES, ["group"], drawn, times, seed)
    counts = table["score"].notna().groupby(table["group"]).agg(["sum", "size"])
    found = order.reset_index(drop=True).assign(
        n=counts["sum"].to_numpy(), missing=(counts["size"] - counts["sum"]).to_numpy()
    )
    return found.join(means.drop(columns=["group", "n"]))


def paired_differences(
    scores: "pd.DataFrame",
    baseline: str,
    on: Sequence[str] = ("theme",),
    by: Sequence[str] = CELL,
    times: int = TIMES,
    seed: int = 0,
) -> "pd.DataFrame":
    """By how much each cell scores above a baseline, sample by sample.

    Steered and unsteered text of one sample share a random stream, so that the differences are
    surer than two means with intervals of their own.

    Args:
        scores: As `judged` gives.
        baseline: The strategy that is the baseline.
        on: What a text and its baseline have in common, beside the sample.
        by: Columns that tell cells apart.
        times: Resamples.
        seed: Of these.

    Returns:
        `by`, `n`, `difference`, `difference_low`, `difference_high`; cells of the baseline are left
        out.

    Raises:
        ValueError: If there is no baseline.
    """
    is_base = scores["strategy"] == baseline
    if not is_base.any():
        there = ", ".join(map(str, scores["strategy"].unique()))
        raise ValueError(f"no cell of the strategy {baseline!r}: there are {there}")
    keys = [*on, "sample"]
    base = scores[is_base].groupby(keys)["score"].mean().rename("base")
    table = scores[~is_base].join(base, on=keys)
    table = table.assign(score=table["score"] - table["base"])
    found = cell_means(table, by, times, seed)
    names = {"score": "difference"} | {f"score_{x}": f"difference_{x}" for x in ("low", "high")}
    return found[[*by, "n", *names]].rename(columns=names)


def with_costs(
    means: "pd.DataFrame", suite: "Suite", cells: Sequence[SweepCell], texts: Sequence[str]
) -> "pd.DataFrame":
    """Means with what each cell does to texts: `norm` and `kl`, as `controls.side_effects` gives.

    A cell that has another prompt and no edit has neither.

    Args:
        means: With `cell`.
        suite: The suite.
        cells: The cells that it numbers.
        texts: The texts, such as neutral ones.
    """
    names = [str(number) for number in range(len(cells))]
    plans = {name: cell.plan for name, cell in zip(names, cells, strict=True)}
    found = side_effects(suite, plans, texts)[["norm", "kl"]]
    found[[cell.plan is None and cell.prompt is not None for cell in cells]] = np.nan
    at = means["cell"].to_numpy()
    return means.assign(norm=found["norm"].to_numpy()[at], kl=found["kl"].to_numpy()[at])


def beside_unsteered(steered: "pd.DataFrame", scores: "pd.DataFrame", kind: str) -> "pd.DataFrame":
    """Steered texts with the unsteered text of the same theme and sample, to be read.

    Args:
        steered: Rows of `scores`.
        scores: As `judged` gives, with unsteered cells.
        kind: What these are, in words.

    Returns:
        The rows with `kind`, `steered` and `unsteered`.

    Raises:
        ValueError: If the unsteered text of one is not there.
    """
    plain = scores[scores["strategy"] == UNSTEERED].drop_duplicates(["theme", "sample"])
    found = plain.set_index(["theme", "sample"])["text"].rename("unsteered")
    table = steered.join(found, on=["theme", "sample"]).assign(kind=kind, steered=steered["text"])
    if table["unsteered"].isna().any():
        raise ValueError(f"{kind}: there is no unsteered text of the same theme and sample")
    return table


def best_cells(means: "pd.DataFrame", by: Sequence[str]) -> "pd.DataFrame":
    """The cell of highest score for each of `by`, the first of equals; rows of `means`.

    Args:
        means: As `cell_means` gives.
        by: Columns, such as theme and strategy.
    """
    known = means[means["score"].notna()]
    return known.loc[known.groupby(list(by), sort=False, dropna=False)["score"].idxmax()]


def select_cells(cells: Sequence[SweepCell], best: "pd.DataFrame") -> list[SweepCell]:
    """The cells that `best_cells` names, in its order."""
    return [cells[int(number)] for number in best["cell"]]


def strategy_cells(
    theme: str,
    strategies: Iterable[str],
    layers: Iterable[int],
    strengths: Iterable[float],
    plan_of: Callable[[str, int, float], Plan | SteeringVectors | None],
) -> list[SweepCell]:
    """The cells of every strategy, layer and strength; those without a feature are left out.

    Args:
        theme: The theme.
        strategies: Names.
        layers: Layers.
        strengths: s or r.
        plan_of: From strategy, layer and strength to the plan, or None where there is none.
    """
    layers, strengths = list(layers), list(strengths)
    grid = [(name, layer, s) for name in strategies for layer in layers for s in strengths]
    plans = [(place, plan_of(*place)) for place in grid]
    return [
        SweepCell(theme, name, plan, layer, float(s)) for (name, layer, s), plan in plans if plan
    ]
