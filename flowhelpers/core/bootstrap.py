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
