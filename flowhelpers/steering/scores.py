"""Scores of texts: means over samples, differences, and the cells that do best."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from flowhelpers.core.bootstrap import mean_intervals
from flowhelpers.steering.controls import side_effects
from flowhelpers.steering.sweeps import CELL, UNSTEERED, SweepCell

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

SCORES = ("behavioral", "coherence", "score")
TIMES = 1000  # resamples of intervals


@runtime_checkable
class Judge(Protocol):
    """What gives texts their scores: the embedded judge, an endpoint, or your own."""

    def judge(self, texts: Sequence[str]) -> "pd.DataFrame":
        """`behavioral` and `coherence` from 0 to 1, one row a text; missing where there is none."""
        ...


def score_texts(
    texts: "pd.DataFrame", judges: Mapping[str, Judge], suppress: bool = False
) -> "pd.DataFrame":
    """Texts of `sweep` with scores by the judge of their theme: `behavioral`, `coherence`, `score`.

    The score of a text is B · C, or (1 - B) · C where the theme is to be suppressed (paper 5.3, B;
    CHOICES 22); missing where the judge gave none (CHOICES 23). What else a judge gives under a
    name that begins with `behavioral_` follows.
    """
    import pandas as pd

    if missing := set(texts["theme"]) - set(judges):
        raise ValueError(f"no judge for {', '.join(sorted(missing))}: expected one for each theme")
    parts = []
    for theme, of_theme in texts.reset_index(drop=True).groupby("theme", sort=False):
        different = list(dict.fromkeys(of_theme["text"]))
        judged = judges[str(theme)].judge(different)
        scores = judged[["behavioral", "coherence", *_of_subjects(judged)]]
        if outside := int(((scores < 0) | (scores > 1)).sum().sum()):
            raise ValueError(f"the judge of {theme!r} gave {outside} scores outside 0 to 1")
        parts.append(of_theme.join(scores.set_axis(different), on="text"))
    scored = pd.concat(parts).sort_index().set_axis(texts.index)
    present = 1 - scored["behavioral"] if suppress else scored["behavioral"]
    more = {name: scored.pop(name) for name in _of_subjects(scored)}
    return scored.assign(score=present * scored["coherence"], **more)


def _of_subjects(scores: "pd.DataFrame") -> list[str]:
    return [name for name in scores if name.startswith("behavioral_")]


def cell_means(
    scores: "pd.DataFrame", by: Sequence[str] = ("cell", *CELL), seed: int = 0
) -> "pd.DataFrame":
    """The mean scores of each cell, with 95 % intervals from samples drawn anew.

    The product is taken text by text, before the mean (CHOICES 22). The same samples are drawn for
    all cells. Columns: `by`, `n` (texts with scores), `missing` (texts without), and `behavioral`,
    `coherence` and `score`, each with `_low` and `_high`, and so what else the judge gave.
    """
    import pandas as pd

    keys = list(by)
    cell = scores.groupby(keys, sort=False, dropna=False).ngroup()
    table = scores.assign(group=cell, text=scores["sample"])  # the bootstrap draws samples
    samples = pd.DataFrame({"dataset": "samples", "text": np.sort(scores["sample"].unique())})
    measures = [*SCORES, *_of_subjects(scores)]
    means = mean_intervals(table, measures, ["group"], samples, TIMES, seed)
    n = table["score"].notna().groupby(cell).sum().to_numpy()
    named = scores[keys].drop_duplicates().reset_index(drop=True)
    named = named.assign(n=n, missing=means["n"].to_numpy() - n)
    return named.join(means.drop(columns=["group", "n"]))


def paired_differences(
    scores: "pd.DataFrame",
    baseline: str,
    on: Sequence[str] = ("theme",),
    by: Sequence[str] = CELL,
    seed: int = 0,
) -> "pd.DataFrame":
    """By how much each cell scores above a baseline, sample by sample.

    A text and its baseline, a strategy, have `on` and the sample in common, hence the random stream
    too: the intervals are narrower than those of two means.

    Returns:
        `by`, `n`, `difference`, `difference_low`, `difference_high` and the `verdict`: `above` or
        `below` where the interval leaves out 0, else `undecided`; without the baseline's cells.
    """
    is_base = scores["strategy"] == baseline
    if not is_base.any():
        known = ", ".join(map(str, scores["strategy"].unique()))
        raise ValueError(f"no cell of the strategy {baseline!r}: there are {known}")
    keys = [*on, "sample"]
    base = scores[is_base].groupby(keys)["score"].mean().rename("base")
    table = scores[~is_base].join(base, on=keys)
    means = cell_means(table.assign(score=table["score"] - table["base"]), by, seed)
    names = {f"score{end}": f"difference{end}" for end in ("", "_low", "_high")}
    sure = means["score_low"] > 0, means["score_high"] < 0
    verdict = np.select(sure, ["above", "below"], "undecided")
    return means[[*by, "n", *names]].rename(columns=names).assign(verdict=verdict)


def with_costs(
    means: "pd.DataFrame", suite: "Suite", cells: Sequence[SweepCell], texts: Sequence[str]
) -> "pd.DataFrame":
    """Means with `norm` and `kl` of each cell by `side_effects`; missing for prompting."""
    plans = {str(number): cell.plan for number, cell in enumerate(cells)}
    costs = side_effects(suite, plans, texts)[["norm", "kl"]]
    costs[[cell.plan is None and cell.prompt is not None for cell in cells]] = np.nan
    at = means["cell"].to_numpy()
    return means.assign(norm=costs["norm"].to_numpy()[at], kl=costs["kl"].to_numpy()[at])


def beside_unsteered(steered: "pd.DataFrame", scores: "pd.DataFrame", kind: str) -> "pd.DataFrame":
    """Rows of `scores` as `steered`, with the `unsteered` text of their theme and sample.

    The column `kind` says what the rows are.
    """
    plain = scores[scores["strategy"] == UNSTEERED].drop_duplicates(["theme", "sample"])
    plain = plain.set_index(["theme", "sample"])["text"].rename("unsteered")
    table = steered.join(plain, on=["theme", "sample"]).assign(kind=kind, steered=steered["text"])
    if table["unsteered"].isna().any():
        raise ValueError(f"{kind}: there is no unsteered text of the same theme and sample")
    return table


def best_cells(means: "pd.DataFrame", by: Sequence[str]) -> "pd.DataFrame":
    """The rows of `cell_means` of highest score for each of `by`, the first of equals.

    Where the judge gave no text a score, there is no best, and a warning names it; it is a
    ValueError where the first of `by`, such as a theme, has no score at all.
    """
    for keys in (by[:1], by):
        best = means.groupby([*keys], sort=False, dropna=False)["score"].max()
        if none := [*map(str, best.index[best.isna()])]:
            told = f"{', '.join(keys)} {', '.join(none)}: no text has a score, so none is the best"
            if len(keys) == 1:
                raise ValueError(f"{told} (a judge's `problem` says why)")
            warnings.warn(told, stacklevel=2)
    known = means[means["score"].notna()]
    return known.loc[known.groupby([*by], sort=False, dropna=False)["score"].idxmax()]


def selection_bias(
    chosen_on: "pd.DataFrame", reported: "pd.DataFrame", strategies: Iterable[str]
) -> tuple[float, float, float]:
    """By how much the strategies' cells fall on new samples, beyond what unsteered text does.

    Args:
        chosen_on: Scores by which the cells were chosen as the best, a text a row; others too.
        reported: Those of the chosen cells on other samples.
        strategies: Those whose cells were chosen.

    Returns:
        The difference of the mean scores, and the ends of its 95 % interval by the normal
        approximation; samples are independent, cells are not.
    """
    cells, gaps = reported[[*CELL]].drop_duplicates(), []
    for texts in (chosen_on.merge(cells, on=[*CELL]), reported):
        own, plain = texts["strategy"].isin([*strategies]), texts["strategy"] == UNSTEERED
        means = (texts[rows].groupby("sample")["score"].mean() for rows in (own, plain))
        gaps.append(next(means) - next(means))
    fall = float(gaps[0].mean() - gaps[1].mean())
    error = 1.96 * float(np.sqrt(sum(gap.var() / gap.count() for gap in gaps)))
    return fall, fall - error, fall + error


def verdicts(
    scores: "pd.DataFrame", best: Sequence[SweepCell], rivals: Iterable[str], seed: int = 0
) -> "pd.DataFrame":
    """By how much each theme's best cell scores above each rival strategy, sample by sample.

    Returns:
        One row a theme and `rival`, with the columns of `paired_differences`.
    """
    import pandas as pd

    cells = pd.MultiIndex.from_frame(scores[["theme", "strategy"]])
    is_best = cells.isin([(cell.theme, cell.strategy) for cell in best])
    parts = []
    for rival in rivals:
        both = scores[is_best | (scores["strategy"] == rival)]
        found = paired_differences(both, rival, by=("theme", "strategy"), seed=seed)
        parts.append(found.assign(rival=rival))
    return pd.concat(parts, ignore_index=True)
