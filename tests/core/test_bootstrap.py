"""Differences of means are of the same resampled texts: what texts differ by falls out."""

import numpy as np
import pandas as pd
import pytest

from flowhelpers import core
from flowhelpers.core.bootstrap import resamples


def table_of(texts: int = 12) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Three methods whose values differ far more from text to text than from each other."""
    rng = np.random.default_rng(3)
    text, method = np.repeat(np.arange(texts), 12), np.tile([*"abc"], 4 * texts)
    value = 10.0 * (text % 5) + (method == "b") + rng.normal(0, 0.1, len(text))
    table = pd.DataFrame({"text": text, "method": method, "value": value})
    table.loc[[0, 7], "value"] = np.nan
    return table, pd.DataFrame({"dataset": "a", "text": range(texts)})


def test_differences_have_the_intervals_of_samples_made_one_by_one():
    table, tokens = table_of()
    found = core.mean_differences(table, "value", "method", "c", tokens, times=40, seed=5)
    again = []
    for counts in resamples(tokens, 40, 5):
        rows = pd.concat(
            [table[table["text"] == t] for t, n in enumerate(counts) for _ in range(n)]
        )
        means = rows.groupby("method")["value"].mean()
        again.append((means - means["c"])[["a", "b"]])
    low, high = np.quantile(np.stack(again), [0.025, 0.975], axis=0)
    whole = table.groupby("method")["value"].mean()
    found = found.set_index("method")
    assert found.index.tolist() == ["a", "b"]
    assert found["mean"].to_numpy() == pytest.approx(whole[["a", "b"]].to_numpy())
    assert (found["base"] == whole["c"]).all()
    assert found["n"].tolist() == [47, 47]  # a missing value counts for nothing
    assert found["difference"].to_numpy() == pytest.approx((whole - whole["c"])[["a", "b"]])
    assert found["difference_low"].to_numpy() == pytest.approx(low)
    assert found["difference_high"].to_numpy() == pytest.approx(high)
    assert found.loc["b", "difference_low"] > 0  # though each mean varies by whole texts
    assert found.loc["a", "difference_low"] < 0 < found.loc["a", "difference_high"]


def test_without_the_baseline_nothing_is_told():
    table, tokens = table_of()
    found = core.mean_differences(table, "value", "method", "absent", tokens, times=5)
    assert found["method"].tolist() == [*"abc"]
    assert found[["base", "difference", "difference_low"]].isna().all(axis=None)
