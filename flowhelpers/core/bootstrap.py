"""Intervals by the bootstrap over texts, each drawn whole: its tokens depend on each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


TIMES, LEVEL = 200, 0.95


def resamples(tokens: "pd.DataFrame", times: int = TIMES, seed: int = 0) -> np.ndarray:
    """How often each text counts in each resample, `[times, texts]`; datasets keep their size.

    `tokens` are the sample's, with `dataset` and `text`.
    """
    if times < 1:
        raise ValueError(f"times={times}: expected 1 resample or more")
    rng = np.random.default_rng(seed)
    texts = _texts(tokens)
    drawn = np.zeros((times, len(texts)), dtype=np.int64)
    for rows in texts.groupby("dataset", sort=False, observed=True).indices.values():
        drawn[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), times)
    return drawn


def mean_intervals(
    table: "pd.DataFrame",
    columns: Sequence[str],
    by: Sequence[str],
    tokens: "pd.DataFrame",
    times: int = TIMES,
    seed: int = 0,
) -> "pd.DataFrame":
    """Means of `columns` within groups of rows, with intervals over texts.

    The table's rows have a `text`; missing values count for nothing. `by` are the columns that tell
    groups apart, none for all rows together; `tokens` are the sample's, with `dataset` and `text`.

    Returns:
        One row for each group there is: `by`, `n`, and for each column its mean under its own name,
        and `<column>_low`, `<column>_high`, which are missing where there is one text only.
    """
    import pandas as pd

    if by:
        grouped = table.groupby(list(by), observed=True, sort=True)
        cell = grouped.ngroup().to_numpy()
        found = grouped.size().rename("n").reset_index()
    else:
        cell, found = np.zeros(len(table), dtype=int), pd.DataFrame({"n": [len(table)]})
    text, drawn = text_rows(tokens, table), resamples(tokens, times, seed)
    for column in columns:
        values = table[column].to_numpy(float)
        there = ~np.isnan(values)
        sums, counts = np.zeros((2, drawn.shape[1], len(found)))
        np.add.at(sums, (text[there], cell[there]), values[there])
        np.add.at(counts, (text[there], cell[there]), 1)
        many, n = drawn @ sums, drawn @ counts
        means = np.divide(many, n, out=np.full_like(many, np.nan), where=n > 0)
        total = counts.sum(axis=0)
        whole = np.full(len(found), np.nan)
        found[column] = np.divide(sums.sum(axis=0), total, out=whole, where=total > 0)
        spread = interval(means) if drawn.shape[1] > 1 else np.full((2, len(found)), np.nan)
        found[f"{column}_low"], found[f"{column}_high"] = spread
    return found


def mean_differences(
    table: "pd.DataFrame",
    column: str,
    by: str,
    baseline: object,
    tokens: "pd.DataFrame",
    times: int = TIMES,
    seed: int = 0,
) -> "pd.DataFrame":
    """By how much the mean of `column` is above that of the rows whose `by` is `baseline`.

    Both means are of the same resampled texts, so that what differs from text to text falls out of
    their difference: where its interval leaves out 0, the means differ.

    Returns:
        One row for each other value of `by`: it, `n`, `mean`, `base`, `difference`,
        `difference_low` and `difference_high`.
    """
    import pandas as pd

    known = table.dropna(subset=[column, by])
    text, drawn = text_rows(tokens, known), resamples(tokens, times, seed)
    drawn = np.vstack([np.ones_like(drawn[:1]), drawn])  # the sample itself first
    means, sizes = {}, known[by].astype(object).value_counts().sort_index()
    for value in sizes.index:
        at = (known[by] == value).to_numpy()
        sums, counts = (
            np.bincount(text[at], weights, drawn.shape[1])
            for weights in (known[column].to_numpy(float)[at], np.ones(at.sum()))
        )
        n = drawn @ counts
        means[value] = np.divide(drawn @ sums, n, out=np.full(len(n), np.nan), where=n > 0)
    base, rows = means.get(baseline, np.full(len(drawn), np.nan)), []
    for value in [value for value in means if value != baseline]:
        gap = means[value] - base
        low, high = interval(gap[1:, None])[:, 0]
        rows.append((value, sizes[value], means[value][0], base[0], gap[0], low, high))
    ends = [f"difference{end}" for end in ("", "_low", "_high")]
    found = pd.DataFrame(rows, columns=[by, "n", "mean", "base", *ends])
    return found.astype({"n": int} | dict.fromkeys(found.columns[2:], float))


def centred_interval(values: np.ndarray, found: np.ndarray) -> np.ndarray:
    """As `interval`, moved so that the median of each column lies at what the sample itself has.

    For what depends on how many texts are different: a resample has fewer of them.
    """
    import pandas as pd

    return interval(values) + (found - pd.DataFrame(values).median().to_numpy())


def interval(values: np.ndarray) -> np.ndarray:
    """The ends of the middle 95 % of each column; missing where no resample has a value."""
    ends = np.full((2, values.shape[1]), np.nan)
    known = ~np.isnan(values).all(axis=0)
    quantiles = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    ends[:, known] = np.nanquantile(values[:, known], quantiles, axis=0)
    return ends


def _texts(tokens: "pd.DataFrame") -> "pd.DataFrame":
    return tokens[["dataset", "text"]].drop_duplicates().reset_index(drop=True)


def text_rows(tokens: "pd.DataFrame", table: "pd.DataFrame") -> np.ndarray:
    """Of each row of a table, the place of its text in `resamples`."""
    texts = _texts(tokens)
    if texts["text"].duplicated().any():
        raise ValueError("texts of several datasets share numbers: expected each number once")
    place = np.zeros(int(texts["text"].max()) + 1, dtype=np.int64)
    place[texts["text"]] = np.arange(len(texts))
    return place[table["text"]]
