"""The page of printed numbers: verdicts of planted runs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flowhelpers.__main__ import main
from flowhelpers.paper_numbers import printed_numbers
from flowhelpers.paper_page import compare_numbers, findings, unlike_preset, write_page


def plant(root: Path, notebook: str, suite: str, **tables: Any) -> Path:
    """A run's folder with these tables."""
    folder = root / f"20260101-00000{len([*root.iterdir()])}-{notebook}"
    (folder / "tables").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"notebook": notebook, "suite": suite}))
    for name, table in tables.items():
        pd.DataFrame(table).to_parquet(folder / "tables" / f"{name}.parquet")
    return folder


def table_1(change: float, success: float) -> dict[str, Any]:
    return {
        "method": ["top-1 cosine"], "targets": ["all of them"], "n": [1894],
        "change": [change], "change_low": [change - 0.02], "change_high": [change + 0.02],
        "success": [success], "success_low": [success - 0.02], "success_high": [success + 0.02],
    }  # fmt: skip


def test_every_number_of_the_paper_is_there_once():
    sizes = Counter[str]()
    for printed in printed_numbers():
        sizes[printed.where] += len(printed.numbers)
    assert sizes == {
        "Table 1": 6, "5.2": 1, "Table 2": 10, "Table 3": 4, "Table 4": 10, "Table 5": 35,
        "Appendix E": 4, "Figure 4": 27, "Figure 13": 56, "Figure 14": 84, "Figure 15": 1,
        "Figure 17 (b)": 1, "5.1, appendix D": 12, "Figure 23": 17, "Figure 6": 4, "Figure 7": 4,
        "Figure 9": 4, "Figure 10": 2, "Figure 11": 4, "Figure 24": 2,
    }  # fmt: skip
    for printed in printed_numbers():
        keys = [name for name in printed.numbers if name not in ("paper", "most")]
        assert not printed.numbers.duplicated(keys).any()


def test_verdicts_go_by_our_interval_and_by_the_model(tmp_path: Path):
    plant(tmp_path, "04_deactivation", "gemma-2-2b", table_1=table_1(0.5, 0.5))
    plant(tmp_path, "04_deactivation", "gemma-2-2b@16k", table_1=table_1(0.76, 0.5))
    flow = {"layer": [24, 25], "module": "res", "ours": ["24/res/14548", "25/res/1"]}
    plant(tmp_path, "02_flow_graphs", "gemma-2-2b", table_5=flow | {"paper": None})
    numbers = compare_numbers(tmp_path).set_index(["where", "what"])
    by_what = {what: row for (_, what), row in numbers.iterrows()}
    inside = by_what["change: top-1 cosine, all of them"]  # of the latest run
    assert (inside["verdict"], round(inside["difference"], 6)) == ("inside our interval", 0.01)
    assert by_what["success: top-1 cosine, all of them"]["verdict"] == "outside"
    assert by_what["n: top-1 cosine, all of them"]["verdict"] == "inside our interval"
    assert by_what["change: exhaustive, all of them"]["verdict"] == "not run"
    assert by_what["ours: 24, res"]["verdict"] == "same"
    assert by_what["ours: 25, res"]["verdict"] == "other"
    assert by_what["ours: 23, res"]["verdict"] == "not run"
    near = table_1(0.7251, 0.6)  # its interval ends at .7451, and .745 is printed as .75
    plant(tmp_path, "04_deactivation", "gemma-2-2b", table_1=near)
    change = compare_numbers(tmp_path).query("what == 'change: top-1 cosine, all of them'")
    assert change["verdict"].item() == "inside our interval"
    finished = plant(tmp_path, "04_deactivation", "gemma-2-2b", table_1=table_1(0.1, 0.1))
    (finished / "results.json").write_text("{}")
    plant(tmp_path, "04_deactivation", "gemma-2-2b", table_1=near)  # a later one that failed
    change = compare_numbers(tmp_path).query("what == 'change: top-1 cosine, all of them'")
    assert (change["verdict"].item(), change["ours"].item()) == ("outside", 0.1)
    (finished / "results.json").unlink()
    plant(tmp_path, "04_deactivation", "flowlet", table_1=table_1(0.75, 0.65))
    other = compare_numbers(tmp_path)
    assert set(other.loc[other["where"] == "Table 1", "verdict"]) == {"another model"}


def test_rows_that_a_table_does_not_hold_are_made_of_it(tmp_path: Path):
    plant(tmp_path, "04_deactivation", "gemma-2-2b", targets={"layer": [6] * 13_106})
    seeds = {"feature": ["24/res/14548", "3/res/9811"]}
    means = {"chosen_on": [0.51, 0.705]}
    plant(tmp_path, "05_theme_suppression", "gemma-2-2b@l0=70", seeds=seeds, figure_10=means)
    steered = {"layer": [None, 5.0, 6.0], "score": [0.9, 0.4, 0.3]}
    plant(tmp_path, "06_theme_activation", "gemma-2-2b", figure_17=steered)
    parts = {
        "suite": "llama-3.1-8b@8x",
        "of": "groups",
        "phase": [1, 2],
        "first": 0,
        "last": [8, 17],
    }
    plant(tmp_path, "07_across_models", "gemma-2-2b", phases=parts)
    numbers = compare_numbers(tmp_path)
    verdicts = dict(zip(numbers["where"] + " " + numbers["what"], numbers["verdict"], strict=True))
    assert verdicts["Figure 15 targets: targets"] == "inside our interval"
    of_table_2 = numbers[numbers["where"] == "Table 2"]
    assert of_table_2["verdict"].value_counts().to_dict() == {"other": 8, "same": 2}
    assert verdicts["Figure 10 chosen_on: lowest"] == "inside the axis"
    assert verdicts["Figure 10 chosen_on: highest"] == "outside the axis"
    assert verdicts["Figure 17 (b) layer: best layer"] == "inside our interval"
    assert verdicts["5.1, appendix D last: llama-3.1-8b, 1"] == "inside our interval"
    assert verdicts["5.1, appendix D last: llama-3.1-8b, 2"] == "outside"
    assert verdicts["5.1, appendix D last: gemma-2-2b, 1"] == "not run"


@pytest.mark.parametrize(("ours", "verdict"), [(0.7, "holds"), (0.53, "not seen")])
def test_a_finding_holds_where_its_interval_lies_beyond_the_control(
    tmp_path: Path, ours: float, verdict: str
):
    means = [ours, 0.5, 0.1]
    control = {
        "layer": 2,
        "method": ["top-1", "random", "another active feature"],
        "success": means,
    }
    control |= {"success_low": [x - 0.05 for x in means], "success_high": [x + 0.05 for x in means]}
    plant(tmp_path, "04_deactivation", "flowlet", control=control)
    found = findings(tmp_path).set_index("finding")["verdict"]
    (random,) = [v for f, v in found.items() if "random one of the five" in str(f)]
    (norm,) = [v for f, v in found.items() if "of equal norm" in str(f)]
    assert (random, norm) == (verdict, "holds")
    assert (found == "not run").sum() == len(found) - 2
    others = {
        name: column[1:] if isinstance(column, list) else column for name, column in control.items()
    }
    plant(tmp_path, "04_deactivation", "flowlet", control=others)  # without top-1
    assert set(findings(tmp_path)["verdict"]) == {"not run"}


def test_findings_of_steering_and_of_bridges_are_told_from_their_controls(tmp_path: Path):
    def verdicts(**tables: Any) -> dict[str, str]:
        plant(tmp_path, "06_theme_activation", "flowlet", **tables)
        plant(tmp_path, "08_transcoders", "flowlet", **tables)
        found = findings(tmp_path)
        return dict(zip(found["table"] + found["where"], found["verdict"], strict=True))

    def above(*lows: float) -> dict[str, Any]:
        rivals = ["random features"] * 3 + ["unsteered"] * 3
        themes = ["money", "war", "sea"] * 2
        ends = {"difference": 0.3, "difference_low": [*lows, 0.1, 0.1, 0.1]}
        return {"theme": themes, "strategy": "single", "rival": rivals} | ends

    def explained(matches: list[float]) -> dict[str, Any]:
        ends = {"low": [*matches, -0.1, -0.1], "high": [*matches, 0.1, 0.1]}
        kinds = ["matches"] * 2 + ["shuffled"] * 2
        return {"layer": [1, 2] * 2, "kind": kinds, "explained": [*matches, 0, 0]} | ends

    def spread(low: float) -> dict[str, Any]:
        comparisons = ["best, above seeds only", "many layers, same norm"]
        return {"comparison": comparisons, "difference": 0.1, "difference_low": [0.05, low]}

    good = verdicts(
        verdicts=above(0.1, 0.01, -0.1), neighbours=explained([0.5, 0.2]), pooled=spread(0.01)
    )
    bad = verdicts(
        verdicts=above(0.1, -0.01, -0.1), neighbours=explained([0.5, 0.05]), pooled=spread(-0.1)
    )
    for finding in ("verdictsFigure 11", "neighboursappendix F", "pooled5.3"):
        assert (good[finding], bad[finding]) == ("holds", "not seen")


def test_the_page_says_what_a_run_set_otherwise_than_the_preset() -> None:
    config = {"notebook": "03_group_statistics", "suite": "gemma-2-2b@16k"}
    used = {"layers": [8, 18], "n_texts": 5, "seed": 1, "alpha": 0.001}
    assert unlike_preset(config | {"parameters": used}) == ["n_texts"]
    assert unlike_preset(config | {"parameters": used | {"layers": None}}) == ["layers", "n_texts"]


def test_the_page_leads_to_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = plant(tmp_path, "04_deactivation", "gemma-2-2b", table_1=table_1(0.75, 0.65))
    page = write_page(tmp_path).read_text("utf-8")
    assert f'<a href="{run.name}/tables/table_1.csv">' in page
    assert len(pd.read_csv(tmp_path / "paper.csv")) == len(compare_numbers(tmp_path)) == 288
    assert main(["paper", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "paper.html")
    assert main(["paper", str(run / "tables")]) == 2
