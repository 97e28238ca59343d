"""Sweeps write what steering writes, each cell once; scores are counted as planted."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import toys

from flowhelpers import steering
from flowhelpers.core.features import Site
from flowhelpers.flow.graph import flow_graph, keep_nodes
from flowhelpers.interventions import generation
from flowhelpers.matching.table import match_table
from flowhelpers.steering import sweeps
from flowhelpers.steering.controls import side_effects
from flowhelpers.steering.plans import Plan, make_plan, plan_edits, steering_vectors
from flowhelpers.steering.sweeps import SweepCell, graph_cells, steer, sweep
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import cache_prompt

PROMPT, OTHER = "The cat sat", "Rain fell"
NONE = float("nan")
BRIEF: dict[str, Any] = {"max_new_tokens": 5}
COLUMNS = ["cell", "theme", "strategy", "layer", "strength", "sample", "text"]


def single(suite: Suite, strength: float, feature: str = "1/res/3", kind: Any = "add") -> Plan:
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
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The plans of every batch."""
    made: list[list[Any]] = []

    def counted(suite: Suite, plans: Sequence[Any]) -> Any:
        made.append(list(plans))
        return plan_edits(suite, plans)

    monkeypatch.setattr(sweeps, "plan_edits", counted)
    return made


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """How many rows have room on a device, and how many were tried."""
    room = SimpleNamespace(rows=10**9, tried=[])

    def sample_tokens(model: Any, ids: Any, *args: Any, **given: Any) -> Any:
        room.tried.append(len(ids))
        sampled = generation.sample_tokens(model, ids, *args, **given)
        if len(ids) > room.rows:  # as far as a real one would come
            raise torch.OutOfMemoryError("planted")
        return sampled

    of_sweeps = SimpleNamespace(**vars(generation) | {"sample_tokens": sample_tokens})
    monkeypatch.setattr(sweeps, "generation", of_sweeps)
    return room


def texts_of(table: pd.DataFrame, cell: int) -> list[str]:
    return table.loc[table["cell"] == cell, "text"].tolist()


def test_a_sample_of_a_cell_is_what_steering_alone_gives(planted: Suite, cells: list[SweepCell]):
    numbers = [4, 0, 7]
    table = sweep(planted, cells, PROMPT, numbers, seed=2, **BRIEF, temperature=0.9)
    assert list(table.columns) == COLUMNS
    assert table["cell"].tolist() == [i for i in range(len(cells)) for _ in numbers]
    assert table["sample"].tolist() == numbers * len(cells)
    rows = [(c.theme, c.strategy, c.layer, c.strength) for c in cells]
    expected = pd.DataFrame(rows, columns=COLUMNS[1:5]).astype({"layer": float, "strength": float})
    assert table[COLUMNS[1:5]][::3].reset_index(drop=True).equals(expected)
    seen = set()
    for number, cell in enumerate(cells):
        start, given = cell.prompt or PROMPT, {"seed": 2, "temperature": 0.9} | BRIEF
        alone = steer(planted, {"it": cell.plan}, start, 8, **given)["text"]
        assert texts_of(table, number) == alone[numbers].tolist()
        seen.add(tuple(texts_of(table, number)))
    assert len(seen) == len(cells)  # else the cells were not told apart


def test_texts_are_the_same_in_batches_of_any_size_and_where_memory_runs_out(
    planted: Suite, cells: list[SweepCell], room: SimpleNamespace
):
    plans = {str(i): cell.plan for i, cell in enumerate(cells[:5])}
    given: dict[str, Any] = {"samples": [4, 0, 7], "seed": 2} | BRIEF
    table = steer(planted, plans, PROMPT, **given)
    written = sweep(planted, cells, PROMPT, **given)
    assert len(table["text"].unique()) == 15  # else rows could be mistaken for others
    assert room.tried == [15, 15, 6]
    for size, expected in ((1, [1] * 15), (2, [2, 1] * 5), (4, [3] * 5), (6, [6, 6, 3])):
        room.tried.clear()
        assert steer(planted, plans, PROMPT, **given, batch_size=size).equals(table)
        assert room.tried == expected
        assert sweep(planted, cells, PROMPT, **given, batch_size=size).equals(written)
    # 7 rows leave room for two plans of three samples, 3 for one, 1 for one sample.
    for rows, expected in ((7, [15, 6, 6, 3]), (5, [15, 6, *[3] * 5]), (2, [15, 6, 3, *[1] * 15])):
        room.rows = rows
        room.tried.clear()
        with pytest.warns(UserWarning, match="out of memory with 15 texts at a time") as told:
            found = steer(planted, plans, PROMPT, **given)
        assert len(told) == 1
        assert found.equals(table)
        assert room.tried == expected
        assert found.attrs["batch_size"] <= rows
    # A sweep does not begin again with what had no room.
    room.rows = 5
    room.tried.clear()
    with pytest.warns(UserWarning, match="it goes on with half as many"):
        assert sweep(planted, cells, PROMPT, **given, batch_size=6).equals(written)
    assert room.tried == [6] + [3] * 7
    room.rows = 0
    with pytest.warns(match="goes on"), pytest.raises(MemoryError, match="no room for one text"):
        steer(planted, plans, PROMPT, **given)
    with pytest.raises(ValueError, match="batch_size=0: expected 1 or more"):
        steer(planted, plans, PROMPT, **given, batch_size=0)


def test_as_many_rows_as_fit_in_half_of_what_is_free(
    planted: Suite, cells: list[SweepCell], monkeypatch: pytest.MonkeyPatch
):
    model, added, live = planted.model, cells[1].plan, cells[3].plan
    _, prefix = cache_prompt(model, torch.ones(1, 10, dtype=torch.int64))
    of_token = sum(tensor.nbytes for layer in prefix.layers for tensor in layer) // 10
    logits = 4 * model.unembedding.shape[1]

    def fitting(free: int, *plans: Any, prompt: int = 1, new: int = 10_000) -> int:
        monkeypatch.setattr(sweeps, "free_memory", lambda device: free)
        return sweeps._fitting_rows(planted, plans, prompt, new)

    # Of a long text keys and values count, of heads that share them once, and half of them again.
    assert fitting(2 * 300 * 10_000 * of_token, added, None) == pytest.approx(200, abs=2)
    assert 25 <= fitting(2 * 100 * logits, None, prompt=0, new=1) <= 33
    assert 1 < fitting(2**20, None, prompt=9, new=1) < fitting(2**20, None, prompt=1, new=9) / 2
    sae = planted.sae("2/res").lens_sae
    weights = sum(tensor.nbytes for tensor in (sae.W_enc, sae.W_dec))
    free, short = 2 * 100 * logits, {"prompt": 0, "new": 1}
    # An edit that rescales holds its SAE.
    assert fitting(free + 2 * weights, live, **short) == fitting(free, added, **short)
    assert fitting(weights, live) == 1
    assert fitting(2**50, live) == sweeps.LARGEST_BATCH


def test_what_texts_depend_on_makes_them_anew(
    planted: Suite, calls: list[list[Any]], tmp_path: Path
):
    cache = tmp_path / "texts.sqlite"
    plan = single(planted, 9.0)
    push = steering_vectors(planted, plan)

    def made(
        plan: Any = plan, suite: Suite = planted, prompt: str = PROMPT, samples: Any = (0, 1),
        **given: Any,
    ) -> int:  # fmt: skip
        """How many plans had to be written, with this cell or these settings."""
        calls.clear()
        cell = SweepCell("space", "single", plan, 1, 9.0)
        sweep(suite, [cell], prompt, samples, cache, **BRIEF | given)
        return sum(map(len, calls))

    step = plan.steps[0]
    sae = planted.sae("1/res")
    other_rows = toys.write_lens_sae(
        sae.lens_sae.W_dec.detach() * 1.5, Site(1, "res"), sae.lens_sae.threshold.detach()
    )
    others = {Site(1, "res"): replace(sae, loader=other_rows)}
    other_model = replace(planted, source=replace(planted.model, prepend_bos=False))
    changes: list[dict[str, Any]] = [
        {"plan": replace(plan, steps=(replace(step, strength=9.5),))},
        {"plan": replace(plan, steps=(replace(step, scale=2 * step.scale),))},
        {"plan": replace(plan, steps=(replace(step, feature="1/res/4"),))},
        {"plan": replace(plan, kind="rescale")},
        {"plan": None},
        {"plan": push},
        {"plan": push, "prompt": OTHER},
        {"plan": {Site(1, "res"): push[Site(1, "res")] * 1.01}},
        {"plan": {Site(2, "res"): push[Site(1, "res")]}},
        {"prompt": OTHER},
        {"samples": [1, 0]},
        {"seed": 1},
        {"max_new_tokens": 6},
        {"phases": ["prompt"]},
        {"suite": replace(planted, saes={**planted.saes, **others})},
        {"suite": other_model},
    ]
    assert made() == 1
    for change in changes:
        assert made(**change) == 1, change
    for change in ({}, *changes):
        assert made(**change) == 0, change
    with plan.on(planted):
        assert made() == made(seed=2) == made(seed=2) == 1
    assert made(seed=2) == 1
    # The SAE of a layer that is not steered is nothing to it.
    elsewhere = {Site(2, "res"): replace(sae, site=Site(2, "res"), loader=other_rows)}
    assert made(suite=replace(planted, saes={**planted.saes, **elsewhere})) == 0


def test_what_breaks_the_model_is_named_and_a_sweep_goes_on_from_where_it_stopped(
    planted: Suite, cells: list[SweepCell], calls: list[list[Any]], tmp_path: Path
):
    far = SweepCell("sea", "constant", toys.plans_that_break(planted)["far"], 1, 3e38)
    given: dict[str, Any] = {"cache": tmp_path / "new" / "texts.sqlite", "batch_size": 4} | BRIEF
    expected = sweep(planted, cells, PROMPT, [0, 1], **BRIEF)
    with pytest.raises(FloatingPointError, match=r"'sea: constant, layer 1, strength 3e\+38 "):
        sweep(planted, [*cells[:3], far, *cells[3:]], PROMPT, [0, 1], **given)
    calls.clear()
    assert sweep(planted, cells, PROMPT, [0, 1], **given).equals(expected)
    assert [len(batch) for batch in calls] == [2, 1, 2]  # what is there is not made again
    with pytest.raises(ValueError, match=r"1 plans and samples=\[\]: expected 1 or more of each"):
        sweep(planted, cells[:1], PROMPT, [])
    calls.clear()
    # Cells with equal plans share their texts.
    new, same = (replace(single(planted, 3.0), about=about) for about in ("", "in other words"))
    more = [SweepCell("war", "single", new, 1, 3.0), SweepCell("sea", "constant", same, 1, 3.0)]
    more += [SweepCell("war", prompt=PROMPT), *cells[::-1]]
    table = sweep(planted, more, PROMPT, [0, 1], **given)
    assert [len(batch) for batch in calls] == [1]
    assert texts_of(table, 0) == texts_of(table, 1) != texts_of(table, 2)
    assert texts_of(table, 2) == texts_of(expected, 0)


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
    table = steering.score_texts(texts, {"sea": sea, "war": war, "space": Planted({})})
    assert sea.asked == [["a", "c", "d"]]  # each text once
    assert war.asked == [["b", "a"]]
    assert table.drop(columns=["behavioral", "coherence", "score"]).equals(texts)
    expected = {
        "behavioral": [0.5, NONE, 1.0, 0.25, 0.5, 0.0],
        "coherence": [0.8, 0.5, NONE, 0.4, 0.8, 1.0],
        "score": [0.4, NONE, NONE, 0.1, 0.4, 0.0],
    }
    for column, values in expected.items():
        assert table[column].to_numpy() == pytest.approx(values, nan_ok=True)
    less = steering.score_texts(texts, {"sea": sea, "war": war}, suppress=True)
    assert less["score"].to_numpy() == pytest.approx([0.4, NONE, NONE, 0.3, 0.4, 1.0], nan_ok=True)


def test_a_judge_that_cannot_be_trusted_is_refused():
    texts = written([(0, "sea", 0, "a"), (0, "sea", 1, "b"), (1, "war", 0, "b")])
    fine = Planted({"a": (0.0, 1.0), "b": (1.0, 0.0)})

    with pytest.raises(ValueError, match="no judge for war: expected one for each theme"):
        steering.score_texts(texts, {"sea": fine})
    short: Any = SimpleNamespace(judge=lambda texts: fine.judge(texts)[:-1])
    with pytest.raises(ValueError, match="2 elements"):
        steering.score_texts(texts, {"sea": short, "war": fine})
    for scores in ((1.1, 0.5), (0.5, -0.1), (None, 5.0)):
        bad = Planted({**fine.scores, "b": scores})
        with pytest.raises(ValueError, match="the judge of 'war' gave 1 scores outside 0"):
            steering.score_texts(texts, {"sea": fine, "war": bad})


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


SCORES = scored(
    {
        ("sea", "unsteered", NONE, NONE): [(1, 0), (0, 1), (1, 0), (0, 1)],
        ("sea", "single", 3, 2): [(0.5, 0.5), (1, 0.5), (NONE, 0.5), (0.6, NONE)],
        ("war", "unsteered", NONE, NONE): [(1, 1), (0.5, 1), (1, 1), (0, 1)],
        ("war", "single", 3, 2): [(NONE, NONE)] * 4,
    }
)


def test_products_are_taken_before_the_mean():
    means = steering.cell_means(SCORES)
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
    # Without the theme the unsteered are one group.
    by_theme = steering.cell_means(SCORES, ["strategy", "layer", "strength"])
    assert by_theme["n"].tolist() == [8, 2]
    assert by_theme["score"].to_numpy() == pytest.approx([2.5 / 8, 0.375])


def test_costs_are_those_of_each_cell_and_another_prompt_has_none(
    planted: Suite, cells: list[SweepCell]
):
    texts = ["The cat sat on the mat.", "Rain fell on the sea."]
    means = pd.DataFrame({"cell": [6, 3, 0, 1]})
    found = steering.with_costs(means, planted, cells, texts)
    alone = side_effects(planted, {"a": cells[3].plan, "b": cells[1].plan}, texts)
    assert found[["norm", "kl"]].iloc[0].isna().all()  # prompting
    assert np.allclose(found[["norm", "kl"]].iloc[[1, 3]], alone[["norm", "kl"]], atol=1e-5)
    assert found["norm"][2] == 0
    assert found["norm"][3] == pytest.approx(9)


def test_intervals_are_drawn_by_samples_and_by_the_seed():
    rng = np.random.default_rng(0)
    values = [(float(b), 1.0) for b in rng.random(40)]
    # The second cell is the first, less a half; its samples have other numbers in other order.
    less = [(b / 2, 1.0) for b, _ in values]
    table = scored({("a", "x", 1, 1): values, ("a", "y", 1, 1): less}, first=100)
    table = pd.concat([table[:40], table[40:][::-1]], ignore_index=True)
    means = steering.cell_means(table)
    whole, halved = means[["score", "score_low", "score_high"]].to_numpy()
    # Drawn together: what halves the scores halves the interval, to the last digit.
    assert halved == pytest.approx(whole / 2, rel=1e-9)
    assert means.equals(steering.cell_means(table))
    other = steering.cell_means(table, seed=1)
    assert other["score"].equals(means["score"])
    assert (other["score_low"] != means["score_low"]).all()
    # About the mean and two of its standard errors.
    error = np.std([b for b, _ in values]) / 40**0.5
    assert means["score_high"][0] - means["score"][0] == pytest.approx(1.96 * error, rel=0.3)
    assert means["score"][0] - means["score_low"][0] == pytest.approx(1.96 * error, rel=0.3)


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
    found = steering.paired_differences(table.sample(frac=1, random_state=1), "unsteered")
    found = found.sort_values(["theme", "strength"], ignore_index=True)
    assert found["theme"].tolist() == ["sea", "war", "war"]
    assert found["strength"].tolist() == [2, 2, 4]
    assert found["n"].tolist() == [20, 25, 25]
    # The same difference at every sample has no interval, however the samples differ.
    for column in ("difference", "difference_low", "difference_high"):
        assert found[column][:2].tolist() == pytest.approx([0.25, -0.125])
    assert found["difference"][2] == pytest.approx(war[5:].mean())
    assert found["difference_low"][2] < war[5:].mean() - 0.02
    by_theme = steering.paired_differences(table, "unsteered", by=["theme"])
    assert by_theme["n"].tolist() == [20, 50]
    with pytest.raises(ValueError, match="no cell of the strategy 'none': there are unsteered, s"):
        steering.paired_differences(table, "none")


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
    found = steering.beside_unsteered(table.iloc[[4, 1]], table, "the best")
    assert found["steered"].tolist() == ["loud 7", "wet 7"]
    assert found["unsteered"].tolist() == ["plain war 7", ""]
    assert found["score"].tolist() == [0.4, 0.1]
    assert set(found["kind"]) == {"the best"}
    with pytest.raises(ValueError, match="the worst: there is no unsteered text of the same theme"):
        steering.beside_unsteered(table.iloc[[4, 6]], table, "the worst")


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
    found = means[means["theme"] != "law"]
    assert steering.best_cells(found, ["theme", "strategy"])["cell"].tolist() == [3, 2, 6]
    # A layer that is missing is a group of its own.
    assert steering.best_cells(means, ["layer"])["cell"].tolist() == [2, 3, 5]
    best = steering.best_cells(found, ["theme"])
    assert best.equals(means.loc[[3, 2]])
    # Where no text has a score there is no best, in words.
    with pytest.raises(ValueError, match=r"theme law: no text has a score, so none is the best"):
        steering.best_cells(means, ["theme", "strategy"])
    with pytest.warns(UserWarning, match=r"strategy, layer \('y', 1\.0\): no text has a score"):
        best = steering.best_cells(means, ["strategy", "layer"])
    assert best["cell"].tolist() == [2, 3, 5, 6]


def test_the_cells_of_a_graph_are_where_it_has_features(planted: Suite):
    graph = flow_graph(planted, "1/res/3", match_table(planted, k=2))
    assert sorted(graph.nodes["layer"].unique()) == [0, 1, 2]
    everywhere = make_plan(planted, graph, 2.0).table()
    assert everywhere[["feature", "layer"]].equals(graph.nodes[["feature", "layer"]])
    with pytest.raises(ValueError, match="a flow graph of suite other: expected"):
        make_plan(planted, replace(graph, suite="other"), 2.0)
    # Nodes go with their edges, and seeds stay.
    assert keep_nodes(graph, []).nodes["feature"].tolist() == ["1/res/3"]
    all_edges = graph.edges[["source", "target"]]
    graph = keep_nodes(graph, graph.nodes["feature"][graph.nodes["layer"] > 0])
    below = all_edges.apply(lambda end: end.str.startswith("0/")).any(axis=1)
    assert 0 < below.sum() < len(below)
    assert graph.edges[["source", "target"]].equals(all_edges[~below].reset_index(drop=True))
    given: dict[str, Any] = {"kind": "rescale"}
    for strategy, layers in (("single", [1, 2]), ("constant", [2, 1])):
        cells = graph_cells(planted, "sea", graph, strategy, [2, 0.5], [*layers, 0], "x", **given)
        assert [(c.theme, c.strategy) for c in cells] == [("sea", "x")] * 2 * len(layers)
        places = [(layer, s) for layer in layers for s in (2.0, 0.5)]
        assert [(c.layer, c.strength) for c in cells] == places
        plans = [make_plan(planted, graph, s, "rescale", strategy, layer) for layer, s in places]
        assert [cell.plan for cell in cells] == plans
    assert graph_cells(planted, "sea", graph, "single", [2], [0, 7]) == []


def test_what_chosen_cells_lose_is_luck_beyond_what_unsteered_text_loses():
    def texts(**means: float) -> pd.DataFrame:
        """Four texts of each strategy, about its mean; unsteered text has no spread."""
        rows: dict[tuple[Any, ...], Sequence[tuple[float, float]]] = {
            ("sea", name, *((NONE, NONE) if name == "unsteered" else (3, 2))): [
                (mean + (name != "unsteered") * step, 1) for step in (-0.1, 0.1, -0.1, 0.1)
            ]
            for name, mean in means.items()
        }
        return scored(rows)

    before = texts(unsteered=0.5, single=0.8, linear=0.7, other=0.9)
    again = texts(unsteered=0.4, single=0.5, linear=0.6).assign(cell=9)  # other was not chosen
    fall, low, high = steering.selection_bias(before, again, ["single", "linear", "absent"])
    assert fall == pytest.approx(0.2 - 0.1)
    error = 1.96 * (2 * 0.04 / 3 / 4) ** 0.5  # two means of four texts, each 0.1 off
    assert (low, high) == pytest.approx((fall - error, fall + error))


def test_a_verdict_is_by_differences_sample_by_sample_and_needs_the_whole_interval():
    texts = np.linspace(0.2, 0.6, 12)  # that differ far more among each other than in the mean
    flip = np.array([0.2, -0.2] * 6)
    rows: dict[tuple[Any, ...], Sequence[tuple[float, float]]] = {
        ("sea", "single", 3, 2): [(x, 1) for x in texts],
        ("sea", "linear", 3, 2): [(x + 0.1, 1) for x in texts],  # not the best: no rival either
        ("sea", "unsteered", NONE, NONE): [(x - 0.05, 1) for x in texts],
        ("sea", "prompting", NONE, NONE): [(x + 0.05, 1) for x in texts],
        ("sea", "random", NONE, NONE): [(x + y, 1) for x, y in zip(texts, flip, strict=True)],
    }
    rivals = ["unsteered", "prompting", "random"]
    found = steering.verdicts(scored(rows), [SweepCell("sea", "single")], rivals)
    assert found["rival"].tolist() == rivals
    assert found["verdict"].tolist() == ["above", "below", "undecided"]
    assert found["difference"].tolist() == pytest.approx([0.05, -0.05, 0])
    assert set(found["strategy"]) == {"single"}
