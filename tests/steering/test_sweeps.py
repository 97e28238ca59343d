"""Sweeps write what steering writes, each cell once; scores are counted as planted."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import toys

from flowhelpers.core.features import Site
from flowhelpers.flow.graph import flow_graph
from flowhelpers.matching.table import match_table
from flowhelpers.steering import sweeps
from flowhelpers.steering.controls import side_effects, total_norm
from flowhelpers.steering.plans import Plan, Step, make_plan, steering_vectors
from flowhelpers.steering.scores import (
    beside_unsteered,
    best_cells,
    cell_means,
    paired_differences,
    score_texts,
    select_cells,
    selection_bias,
    verdicts,
    with_costs,
)
from flowhelpers.steering.steered_texts import steer
from flowhelpers.steering.sweeps import (
    SweepCell,
    equal_norm_cells,
    graph_cells,
    random_cells,
    strategy_cells,
    sweep,
    vector_cells,
)
from flowhelpers.suites.load import Suite

PROMPT, OTHER = "The cat sat", "Rain fell"
BRIEF: dict[str, Any] = {"max_new_tokens": 5}
COLUMNS = ["cell", "theme", "strategy", "layer", "strength", "sample", "text"]


def single(suite: Suite, strength: float, feature: str = "1/res/3", kind: str = "add") -> Plan:
    return make_plan(suite, [feature], strength, kind, unit="unit")


@pytest.fixture(scope="module")
def cells(planted: Suite) -> list[SweepCell]:
    vectors = steering_vectors(planted, single(planted, 15.0, "0/res/2"))
    return [
        SweepCell("space"),
        SweepCell("space", "single", single(planted, 9.0), 1, 9.0),
        SweepCell("space", "single", single(planted, -9.0), 1, -9.0),
        SweepCell("sea", "rescale", single(planted, -7.0, "2/res/1", "rescale"), 2, -7.0),
        SweepCell("sea", "difference", vectors, 0, 15.0),
        SweepCell("sea", "single", single(planted, 9.0), 1, 9.0, OTHER),
        SweepCell("sea", prompt=OTHER),
    ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The plans of every call of `steer`, by their names."""
    made: list[list[str]] = []

    def counted(suite: Suite, plans: Any, *args: Any, **given: Any) -> pd.DataFrame:
        made.append(list(plans))
        return steer(suite, plans, *args, **given)

    monkeypatch.setattr(sweeps, "steer", counted)
    return made


def texts_of(table: pd.DataFrame, cell: int) -> list[str]:
    return table.loc[table["cell"] == cell, "text"].tolist()


def test_a_sample_of_a_cell_is_what_steering_alone_gives(planted: Suite, cells: list[SweepCell]):
    numbers = [4, 0, 7]
    table = sweep(planted, cells, PROMPT, numbers, seed=2, **BRIEF, temperature=0.9)
    assert list(table.columns) == COLUMNS
    assert table["cell"].tolist() == [i for i in range(len(cells)) for _ in numbers]
    assert table["sample"].tolist() == numbers * len(cells)
    rows = [(c.theme, c.strategy, c.layer, c.strength) for c in cells for _ in numbers]
    expected = pd.DataFrame(rows, columns=COLUMNS[1:5]).astype({"layer": float, "strength": float})
    pd.testing.assert_frame_equal(table[COLUMNS[1:5]], expected)
    seen = set()
    for number, cell in enumerate(cells):
        start, given = cell.prompt or PROMPT, {"seed": 2, "temperature": 0.9} | BRIEF
        alone = steer(planted, {"it": cell.plan}, start, 8, **given)["text"]
        assert texts_of(table, number) == alone[numbers].tolist()
        seen.add(tuple(texts_of(table, number)))
    assert len(seen) == len(cells)  # else the cells were not told apart
    small = sweep(planted, cells, PROMPT, numbers, seed=2, batch_size=1, **BRIEF, temperature=0.9)
    assert small.equals(table)


def test_cells_with_equal_plans_share_their_texts(
    planted: Suite, cells: list[SweepCell], calls: list[list[str]]
):
    same = single(planted, 9.0)
    twice = [
        cells[1],
        SweepCell("sea", "constant", replace(same, about="in other words"), 1, 9.0),
        SweepCell("space"),
        SweepCell("sea"),
        SweepCell("sea", prompt=PROMPT),
        SweepCell("sea", "single", single(planted, 9.5), 1, 9.5),
    ]
    table = sweep(planted, twice, PROMPT, range(3), **BRIEF)
    assert [len(plans) for plans in calls] == [3]
    assert texts_of(table, 0) == texts_of(table, 1)
    assert texts_of(table, 2) == texts_of(table, 3) == texts_of(table, 4)
    assert texts_of(table, 0) != texts_of(table, 5)


def test_a_sweep_that_was_stopped_goes_on(
    planted: Suite, cells: list[SweepCell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache, made, stop_at = tmp_path / "new" / "texts.sqlite", [], 2

    def stopping(suite: Suite, plans: Any, *args: Any, **given: Any) -> pd.DataFrame:
        if len(made) >= stop_at:
            raise KeyboardInterrupt
        made.append(len(plans))
        return steer(suite, plans, *args, **given)

    expected = sweep(planted, cells, PROMPT, range(3), **BRIEF)
    monkeypatch.setattr(sweeps, "steer", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep(planted, cells, PROMPT, range(3), cache, batch_size=6, **BRIEF)
    assert made == [2, 2]
    stop_at = 9
    table = sweep(planted, cells, PROMPT, range(3), cache, batch_size=6, **BRIEF)
    assert made == [2, 2, 1, 2]  # what is there is not made again
    assert table.equals(expected)
    assert sweep(planted, cells, PROMPT, range(3), cache, **BRIEF).equals(expected)
    assert made == [2, 2, 1, 2]
    # Of other cells only those that are new, whatever else is asked for and in which order.
    more = [SweepCell("war", "single", single(planted, 3.0), 1, 3.0), *cells[::-1]]
    table = sweep(planted, more, PROMPT, range(3), cache, **BRIEF)
    assert made == [2, 2, 1, 2, 1]
    assert texts_of(table, 1) == texts_of(expected, len(cells) - 1)


def test_what_texts_depend_on_makes_them_anew(
    planted: Suite, calls: list[list[str]], tmp_path: Path
):
    cache = tmp_path / "texts.sqlite"
    plan = single(planted, 9.0)
    push = steering_vectors(planted, plan)

    def made(given: dict[str, Any] | None = None, **changed: Any) -> int:
        """How many plans had to be written, with these cells or settings."""
        calls.clear()
        asked = {"plan": plan, "prompt": PROMPT, "samples": [0, 1], "seed": 0, "suite": planted}
        asked |= changed
        cell = SweepCell("space", "single", asked["plan"], 1, 9.0)
        sweep(
            asked["suite"], [cell], asked["prompt"], asked["samples"], cache, asked["seed"],
            **BRIEF | (given or {}),
        )  # fmt: skip
        return sum(map(len, calls))

    step = plan.steps[0]
    sae = planted.sae("1/res")
    other_rows = toys.write_lens_sae(
        sae.lens_sae.W_dec.detach() * 1.5, Site(1, "res"), sae.lens_sae.threshold.detach()
    )
    others = {Site(1, "res"): replace(sae, loader=other_rows)}
    other_model = replace(planted, source=replace(planted.model))
    other_model.model.__dict__["fingerprint"] = "another model of the same name"
    changes: list[dict[str, Any]] = [
        {"plan": replace(plan, steps=(replace(step, strength=9.5),))},
        {"plan": replace(plan, steps=(replace(step, scale=2 * step.scale),))},
        {"plan": replace(plan, steps=(replace(step, feature="1/res/4"),))},
        {"plan": replace(plan, steps=(step, Step("2/res/1", 1.0)))},
        {"plan": replace(plan, kind="rescale")},
        {"plan": None},
        {"plan": push},
        {"plan": push, "prompt": OTHER},
        {"plan": {Site(1, "res"): push[Site(1, "res")] * 1.01}},
        {"plan": {Site(2, "res"): push[Site(1, "res")]}},
        {"prompt": OTHER},
        {"samples": [0, 1, 2]},
        {"samples": [1, 0]},
        {"seed": 1},
        {"given": {"max_new_tokens": 6}},
        {"given": {"temperature": 1.0}},
        {"given": {"top_p": 0.5}},
        {"given": {"phases": {"prompt"}}},
        {"given": {"skip_bos": True}},
        {"suite": replace(planted, saes={**planted.saes, **others})},
        {"suite": other_model},
    ]
    assert made() == 1
    for change in changes:
        assert made(**change) == 1, change
    for change in ({}, *changes):
        assert made(**change) == 0, change
    # The SAE of a layer that is not steered is nothing to it; nor is what a plan is called.
    elsewhere = replace(sae, site=Site(2, "res"), loader=other_rows)
    suite = replace(planted, saes={**planted.saes, Site(2, "res"): elsewhere})
    assert made(suite=suite) == 0
    assert made(plan=replace(plan, about="in other words")) == 0


def test_a_strength_that_breaks_the_model_is_named_and_what_was_before_is_kept(
    planted: Suite, cells: list[SweepCell], calls: list[list[str]], tmp_path: Path
):
    # Two features along the same coordinate, whose sum is more than a float32 can hold.
    plan = toys.plans_that_break(planted)["far"]
    far = SweepCell("sea", "constant", plan, 1, 3e38)
    cache = tmp_path / "texts.sqlite"
    words = r"plan 'sea: constant at layer 1 of strength 3e\+38 "
    with pytest.raises(FloatingPointError, match=words):
        sweep(planted, [*cells[:3], far, cells[3]], PROMPT, [0, 1], cache, batch_size=2, **BRIEF)
    calls.clear()
    sweep(planted, cells[:4], PROMPT, [0, 1], cache, batch_size=2, **BRIEF)
    assert [batch[0][:30] for batch in calls] == ["sea: rescale at layer 2 of str"]


def test_a_sweep_over_nothing_is_refused(planted: Suite, cells: list[SweepCell]):
    with pytest.raises(ValueError, match="0 cells, 2 samples: expected 1 or more of each"):
        sweep(planted, [], PROMPT, range(2))
    with pytest.raises(ValueError, match="7 cells, 0 samples: expected 1 or more of each"):
        sweep(planted, cells, PROMPT, [])
    with pytest.raises(ValueError, match="the prompt is empty"):
        sweep(planted, cells, "", range(2))
    strange = SweepCell("space", "single", replace(single(planted, 1.0), suite="other"))
    with pytest.raises(ValueError, match="a plan of suite other: expected one of"):
        sweep(planted, [strange], PROMPT, range(2))
    absent = Plan("a", "add", "unit", (Step("1/res/99", 1.0),))
    with pytest.raises(ValueError, match="no feature 1/res/99"):
        sweep(planted, [SweepCell("a", plan=absent)], "a", [0])


@dataclass
class Planted:
    """A judge that gives scores by the text; it notes what it was asked."""

    scores: dict[str, tuple[float | None, float | None]]
    asked: list[list[str]] = field(default_factory=list)

    def judge(self, texts: Sequence[str]) -> pd.DataFrame:
        self.asked.append(list(texts))
        rows = [self.scores[text] for text in texts]
        found = pd.DataFrame(rows, columns=["behavioral", "coherence"], dtype=float)
        return found.assign(note="more than is asked for").set_axis([7] * len(rows))


def written(rows: Sequence[tuple[int, str, int, str]]) -> pd.DataFrame:
    cell, theme, sample, text = zip(*rows, strict=True)
    return pd.DataFrame({"cell": cell, "theme": theme, "sample": sample, "text": text})


def test_scores_stand_beside_their_texts():
    texts = written(
        [(0, "sea", 0, "a"), (1, "war", 0, "b"), (0, "sea", 1, "c"), (1, "war", 1, "a"),
         (2, "sea", 0, "a"), (2, "sea", 1, "d")]
    ).set_index(pd.Index([5, 3, 5, 1, 0, 3]))  # fmt: skip
    sea = Planted({"a": (0.5, 0.8), "c": (1.0, None), "d": (0.0, 1.0)})
    war = Planted({"a": (0.25, 0.4), "b": (None, 0.5)})
    before = texts.copy()
    table = score_texts(texts, {"sea": sea, "war": war, "space": Planted({})})
    assert texts.equals(before)
    assert sea.asked == [["a", "c", "d"]]  # each text once
    assert war.asked == [["b", "a"]]
    assert table.drop(columns=["behavioral", "coherence", "score"]).equals(texts)
    none = np.nan
    expected = {
        "behavioral": [0.5, none, 1.0, 0.25, 0.5, 0.0],
        "coherence": [0.8, 0.5, none, 0.4, 0.8, 1.0],
        "score": [0.4, none, none, 0.1, 0.4, 0.0],
    }
    for column, values in expected.items():
        assert table[column].to_numpy() == pytest.approx(values, nan_ok=True)
    less = score_texts(texts, {"sea": sea, "war": war}, suppress=True)
    assert less["score"].to_numpy() == pytest.approx([0.4, none, none, 0.3, 0.4, 1.0], nan_ok=True)
    assert less[["behavioral", "coherence"]].equals(table[["behavioral", "coherence"]])


def test_a_judge_that_cannot_be_trusted_is_refused():
    texts = written([(0, "sea", 0, "a"), (0, "sea", 1, "b"), (1, "war", 0, "b")])
    fine = Planted({"a": (0.0, 1.0), "b": (1.0, 0.0)})

    class Short(Planted):
        def judge(self, texts: Sequence[str]) -> pd.DataFrame:
            return super().judge(texts)[:-1]

    with pytest.raises(ValueError, match="no judge for war: expected one for each theme"):
        score_texts(texts, {"sea": fine})
    with pytest.raises(ValueError, match="the judge of 'sea' gave 1 rows for 2 texts, 0 scores"):
        score_texts(texts, {"sea": Short(fine.scores), "war": fine})
    for scores in ((1.1, 0.5), (0.5, -0.1), (None, 5.0)):
        bad = Planted({**fine.scores, "b": scores})
        with pytest.raises(ValueError, match="'war' gave 1 rows for 1 texts, 1 scores outside 0 t"):
            score_texts(texts, {"sea": fine, "war": bad})


def scored(
    scores: dict[tuple[Any, ...], Sequence[tuple[float, float]]], first: int = 0
) -> pd.DataFrame:
    """Rows of cells, by theme, strategy, layer and strength, with B and C of each sample."""
    rows = [
        (cell, *key, first + sample, b, c, b * c)
        for cell, (key, some) in enumerate(scores.items())
        for sample, (b, c) in enumerate(some)
    ]
    names = ["cell", "theme", "strategy", "layer", "strength", "sample"]
    table = pd.DataFrame(rows, columns=[*names, "behavioral", "coherence", "score"])
    return table.astype({"layer": float, "strength": float})


NONE = float("nan")
SCORES = scored(
    {
        ("sea", "unsteered", NONE, NONE): [(1, 0), (0, 1), (1, 0), (0, 1)],
        ("sea", "single", 3, 2): [(0.5, 0.5), (1, 0.5), (NONE, 0.5), (0.6, NONE)],
        ("war", "unsteered", NONE, NONE): [(1, 1), (0.5, 1), (1, 1), (0, 1)],
        ("war", "single", 3, 2): [(NONE, NONE)] * 4,
    }
)


def test_products_are_taken_before_the_mean():
    means = cell_means(SCORES)
    keys = list(means.columns[:5])
    pd.testing.assert_frame_equal(means[keys], SCORES[keys][::4].reset_index(drop=True))
    assert means["n"].tolist() == [4, 2, 4, 0]
    assert means["missing"].tolist() == [0, 2, 0, 4]
    # B and C of the first are one half each, and no text has both.
    expected = {
        "behavioral": [0.5, 0.7, 0.625, NONE],
        "coherence": [0.5, 0.5, 1, NONE],
        "score": [0, 0.375, 0.625, NONE],
    }
    for column, values in expected.items():
        assert means[column].to_numpy() == pytest.approx(values, nan_ok=True)
        low, high = means[f"{column}_low"], means[f"{column}_high"]
        known = means[column].notna()
        assert (low <= means[column])[known].all()
        assert (high >= means[column])[known].all()
        assert low[~known].isna().all()
    assert means["score_low"][0] == means["score_high"][0] == 0
    assert means["score_low"][2] < 0.5 < 0.7 < means["score_high"][2]


def test_costs_are_those_of_each_cell_and_another_prompt_has_none(
    planted: Suite, cells: list[SweepCell]
):
    texts = ["The cat sat on the mat.", "Rain fell on the sea."]
    means = pd.DataFrame({"cell": [6, 3, 0, 1]})
    found = with_costs(means, planted, cells, texts)
    alone = side_effects(planted, {"a": cells[3].plan, "b": cells[1].plan}, texts)
    assert found[["norm", "kl"]].iloc[0].isna().all()  # prompting
    assert np.allclose(found[["norm", "kl"]].iloc[[1, 3]], alone[["norm", "kl"]], atol=1e-5)
    assert found["norm"][2] == 0
    assert found["norm"][3] == pytest.approx(9)


def test_rows_in_any_order_give_the_same_means():
    shuffled = SCORES.sample(frac=1, random_state=3)
    means = cell_means(shuffled).sort_values("cell", ignore_index=True)
    pd.testing.assert_frame_equal(means, cell_means(SCORES))


def test_the_unsteered_of_a_theme_are_one_group():
    by_theme = cell_means(SCORES, ["strategy", "layer", "strength"])
    assert by_theme["n"].tolist() == [8, 2]
    assert by_theme["missing"].tolist() == [0, 6]
    assert by_theme["score"].to_numpy() == pytest.approx([2.5 / 8, 0.375])


def test_intervals_are_drawn_by_samples_and_by_the_seed():
    rng = np.random.default_rng(0)
    values = [(float(b), 1.0) for b in rng.random(40)]
    # The second cell is the first, less a half; its samples have other numbers in other order.
    less = [(b / 2, 1.0) for b, _ in values]
    table = scored({("a", "x", 1, 1): values, ("a", "y", 1, 1): less}, first=100)
    table = pd.concat([table[:40], table[40:][::-1]], ignore_index=True)
    means = cell_means(table)
    whole, halved = means[["score", "score_low", "score_high"]].to_numpy()
    # Drawn together: what halves the scores halves the interval, to the last digit.
    assert halved == pytest.approx(whole / 2, rel=1e-9)
    assert means.equals(cell_means(table))
    other = cell_means(table, seed=1)
    assert other["score"].equals(means["score"])
    assert (other["score_low"] != means["score_low"]).all()
    # About the mean and two of its standard errors.
    error = np.std([b for b, _ in values]) / 40**0.5
    assert means["score_high"][0] - means["score"][0] == pytest.approx(1.96 * error, rel=0.3)
    assert means["score"][0] - means["score_low"][0] == pytest.approx(1.96 * error, rel=0.3)
    one = cell_means(table[table["sample"] == 120])
    assert one["score"].tolist() == [values[20][0], values[20][0] / 2]
    assert one[["score_low", "score_high"]].isna().all(axis=None)


def test_differences_are_taken_sample_by_sample():
    rng = np.random.default_rng(0)
    sea, war = rng.random((2, 30)) / 2
    table = scored(
        {
            ("sea", "unsteered", NONE, NONE): [(b, 1) for b in sea],
            ("sea", "single", 3, 2): [(b + 0.25, 1) for b in sea[:20]] + [(NONE, 1)] * 10,
            ("war", "unsteered", NONE, NONE): [(NONE, 1)] * 5 + [(b, 1) for b in war[5:]],
            ("war", "single", 3, 2): [(b - 0.125, 1) for b in war],
            ("war", "single", 3, 4): [(2 * b, 1) for b in war],
        }
    )
    found = paired_differences(table.sample(frac=1, random_state=1), "unsteered")
    found = found.sort_values(["theme", "strength"], ignore_index=True)
    assert found["theme"].tolist() == ["sea", "war", "war"]
    assert found["strength"].tolist() == [2, 2, 4]
    assert found["n"].tolist() == [20, 25, 25]
    # The same difference at every sample has no interval, however the samples differ.
    for column in ("difference", "difference_low", "difference_high"):
        assert found[column][:2].tolist() == pytest.approx([0.25, -0.125])
    assert found["difference"][2] == pytest.approx(war[5:].mean())
    assert found["difference_low"][2] < war[5:].mean() - 0.02
    by_theme = paired_differences(table, "unsteered", by=["theme"])
    assert by_theme["n"].tolist() == [20, 50]
    # Against the mean of both themes where the theme is not what they have in common.
    both = paired_differences(table, "unsteered", on=[], by=["theme"]).set_index("theme")
    base = np.where(np.arange(30) < 5, sea, (sea + war) / 2)
    assert both.loc["sea", "difference"] == pytest.approx((sea + 0.25 - base)[:20].mean())
    with pytest.raises(ValueError, match="no cell of the strategy 'none': there are unsteered, s"):
        paired_differences(table, "none")


def test_a_steered_text_stands_beside_the_unsteered_one_of_its_sample():
    rows = [
        ("sea", "unsteered", 3, "plain sea 3"),
        ("sea", "single", 7, "wet 7"),
        ("war", "unsteered", 7, "plain war 7"),
        ("sea", "unsteered", 7, ""),
        ("war", "single", 7, "loud 7"),
        ("war", "unsteered", 7, "another"),
        ("war", "single", 3, "loud 3"),
    ]
    table = pd.DataFrame(rows, columns=["theme", "strategy", "sample", "text"])
    table = table.assign(score=np.arange(7) / 10)
    found = beside_unsteered(table.iloc[[4, 1]], table, "the best")
    assert found["steered"].tolist() == ["loud 7", "wet 7"]
    assert found["unsteered"].tolist() == ["plain war 7", ""]
    assert found["score"].tolist() == [0.4, 0.1]
    assert set(found["kind"]) == {"the best"}
    with pytest.raises(ValueError, match="the worst: there is no unsteered text of the same theme"):
        beside_unsteered(table.iloc[[4, 6]], table, "the worst")


def test_the_best_cell_is_the_first_of_the_highest():
    means = pd.DataFrame(
        {
            "cell": [0, 1, 2, 3, 4, 5, 6, 7],
            "theme": ["sea", "sea", "war", "sea", "war", "war", "sea", "law"],
            "strategy": ["x", "y", "x", "x", "x", "x", "y", "x"],
            "layer": [1, 1, 1, 2, 2, NONE, NONE, 1],
            "score": [0.2, NONE, 0.4, 0.6, 0.4, 0.1, 0.0, NONE],
        }
    )
    assert best_cells(means, ["theme", "strategy"])["cell"].tolist() == [3, 2, 6]
    assert best_cells(means, ["theme"])["cell"].tolist() == [3, 2]
    # A layer that is missing is a group of its own.
    assert best_cells(means, ["layer"])["cell"].tolist() == [2, 3, 5]
    best = best_cells(means, ["theme"])
    assert best.equals(means.loc[[3, 2]])
    cells = [SweepCell(f"theme {number}") for number in range(8)]
    assert select_cells(cells, best) == [cells[3], cells[2]]


def test_strategies_layers_and_strengths_make_cells(planted: Suite):
    asked = []

    def plan_of(strategy: str, layer: int, strength: float) -> Plan | None:
        asked.append((strategy, layer, strength))
        return None if layer == 2 else single(planted, strength, f"{layer}/res/3")

    cells = strategy_cells("sea", iter(["x", "y"]), iter([0, 2, 1]), iter([1, 2.5]), plan_of)
    assert len(asked) == 12
    places = [(c.theme, c.strategy, c.layer, c.strength) for c in cells]
    assert places == [("sea", *cell) for cell in product("xy", (0, 1), (1.0, 2.5))]
    for cell in cells:
        assert isinstance(cell.plan, Plan)
        assert cell.plan.steps[0].feature == f"{cell.layer}/res/3"
        assert cell.plan.steps[0].strength == cell.strength
    push = {Site(0, "res"): torch.ones(toys.D_MODEL)}
    found = strategy_cells("sea", ["difference"], [0], [1.0], lambda *_: push)
    assert [cell.plan for cell in found] == [push]


def test_the_cells_of_a_graph_end_at_three_of_its_layers_or_where_asked(planted: Suite):
    graph = flow_graph(planted, "1/res/3", match_table(planted, k=2))
    assert sorted(graph.nodes["layer"].unique()) == [0, 1, 2]
    cells = graph_cells(planted, "sea", graph, ["single", "linear"], [2.0])
    expected = [make_plan(planted, graph, 2.0, "add", way, at) for way, at in product(
        ("single", "linear"), (1, 2))]  # fmt: skip
    assert [cell.plan for cell in cells] == expected
    assert {c.layer for c in graph_cells(planted, "sea", graph, ["single"], [1], [0])} == {0}
    with pytest.raises(ValueError, match=r"layers=\[7\]: the graph of sea has features at"):
        graph_cells(planted, "sea", graph, ["single"], [1], [7])


def test_a_vector_has_the_norms_of_the_feature(planted: Suite):
    site, vector = Site(2, "res"), torch.arange(toys.D_MODEL).float()
    cells = vector_cells(planted, "sea", site, vector, "1/res/3", [2, 4])
    for cell, s in zip(cells, (2.0, 4.0), strict=True):
        assert (cell.strategy, cell.layer, cell.strength) == ("difference of means", 2, s)
        assert isinstance(cell.plan, dict)
        norm = total_norm(planted, make_plan(planted, ["1/res/3"], s))
        assert float(cell.plan[site].norm()) == pytest.approx(norm)
        assert torch.cosine_similarity(cell.plan[site], vector, dim=0) > 0.999


def test_at_equal_norm_a_plan_of_many_layers_changes_as_much_as_one_of_one(planted: Suite):
    # Trap 20: at the same s a plan of many layers adds more.
    one = SweepCell("sea", "single", single(planted, 4.0), 1, 4.0)
    names = ["0/res/2", "1/res/3", "2/res/1"]
    many = SweepCell("sea", "constant", make_plan(planted, names, 4.0, unit="unit"), 2, 4.0)
    other = SweepCell("war", "constant", many.plan, 2, 4.0)  # without a single of its theme
    cells = equal_norm_cells(planted, [SweepCell("sea"), many, one, other], "single")
    assert [cell.strategy for cell in cells] == ["constant", "single"]
    norms = [total_norm(planted, cell.plan or {}) for cell in (many, *cells)]
    assert norms == pytest.approx([12, 4, 4])
    assert [cell.strength for cell in cells] == pytest.approx([4 / 3, 4])


def test_random_features_stand_in_and_are_scaled_to_the_same_change(planted: Suite):
    codes = np.random.default_rng(0).random((40, toys.RES)).tolist()
    read = toys.planted_activations({Site(1, "res"): codes})
    texts = ["The cat sat on the mat.", "Rain fell on the sea."]
    cell = SweepCell("sea", "single", single(planted, -4.0, kind="rescale"), 1, -4.0)
    cells = random_cells(planted, cell, read, range(8), texts)
    assert {c.strategy for c in cells} == {"random features", "random, same norm"}
    plans = {str(number): c.plan for number, c in enumerate([cell, *cells])}
    norms = side_effects(planted, plans, texts)["norm"]
    for norm, twin in zip(norms[1:], cells, strict=True):
        assert (twin.theme, twin.layer, twin.strength) == ("sea", 1, -4.0)
        assert isinstance(twin.plan, Plan)
        assert twin.plan.steps[0].feature != "1/res/3"
        if twin.strategy == "random, same norm":
            assert norm == pytest.approx(norms[0], rel=1e-3)


def test_what_chosen_cells_lose_is_luck_beyond_what_unsteered_text_loses():
    rows = [("unsteered", 0.5, 0.4), ("single", 0.9, 0.6), ("linear", 0.8, 0.7), ("other", 1, 0)]
    table = pd.DataFrame(rows, columns=["strategy", "chosen_on", "score"])
    assert selection_bias(table, ["single", "linear", "absent"]) == pytest.approx(0.2 - 0.1)


def test_a_verdict_needs_the_whole_interval():
    ends = {"single": (0.5, 0.4, 0.6), "unsteered": (0.1, 0, 0.39), "prompting": (0.9, 0.61, 1),
            "random": (0.3, 0.2, 0.41)}  # fmt: skip
    means = pd.DataFrame(
        [("sea", name, *row) for name, row in ends.items()],
        columns=["theme", "strategy", "score", "score_low", "score_high"],
    )
    rivals = ["unsteered", "prompting", "random"]
    (row,) = verdicts(means, [SweepCell("sea", "single")], rivals).to_dict("records")
    assert [row[rival] for rival in rivals] == ["above", "below", "no difference"]
    assert (row["strategy"], row["score"]) == ("single", 0.5)
