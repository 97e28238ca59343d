import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import IPython
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from flowhelpers.core.files import write_text, write_whole
from flowhelpers.core.progress_bar import live, progress
from flowhelpers.runs import run as runs
from flowhelpers.runs.run import RUN_DIR, RUNS, start_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `flowhelpers run` would have made for the run in progress."""
    folder = tmp_path / "given"
    folder.mkdir()
    monkeypatch.setenv(RUN_DIR, str(folder))
    return folder


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, flowhelpers.runs.run, flowhelpers.__main__\n"
        "print({'pandas', 'plotly', 'torch', 'papermill', 'tqdm'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_config_says_what_was_asked(folder: Path) -> None:
    asked = {"suite": "flowlet", "layers": [1, 2], "seed": 7, "share": np.float64(0.5)}
    assert start_run("01_matching", asked, [27]).folder == folder
    config = json.loads((folder / "config.json").read_text())
    assert config["parameters"] == asked
    assert list(config["choices"]) == ["27"]
    assert config["choices"]["27"].startswith("classes A–D: a predecessor score is high where")
    assert (config["suite"], config["seed"]) == ("flowlet", 7)
    assert config["versions"]["python"] == sys.version.split()[0]
    assert config["versions"]["pandas"] == pd.__version__


def test_without_a_given_folder_each_run_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RUN_DIR, raising=False)
    monkeypatch.setenv(RUNS, str(tmp_path / "runs"))
    monkeypatch.setattr(runs.time, "strftime", lambda _: "20261121-221500")
    names = [start_run("01_matching", {}, name="my try").folder.name for _ in range(3)]
    first = "20261121-221500-01_matching-my_try"
    assert names == [first, f"{first}-2", f"{first}-3"]


def test_table_comes_back_as_it_was_computed(folder: Path) -> None:
    frame = pd.DataFrame({"feature": ["12/res/4230", "0/mlp/1"], "cosine": [0.25, -1.0]}, [5, 9])
    written = start_run("n", {}).table("matches", lambda: frame.rename_axis("at"))
    pd.testing.assert_frame_equal(written, frame.rename_axis("at"))
    csv = pd.read_csv(folder / "tables/matches.csv", index_col="at")
    pd.testing.assert_frame_equal(csv, written)


def test_finished_table_is_kept_when_taken_up_again_and_only_then(folder: Path) -> None:
    calls = []

    def compute() -> pd.DataFrame:
        calls.append(1)
        return pd.DataFrame({"call": [len(calls)]})

    first = start_run("n", {"k": 1})
    assert first.table("t", compute)["call"].item() == 1
    assert first.table("t", compute)["call"].item() == 2  # the cell was changed and run again
    assert start_run("n", {"k": 1}).table("t", compute)["call"].item() == len(calls) == 2
    assert len(json.loads((folder / "config.json").read_text())["started"]) == 2


def test_table_stopped_midway_is_not_taken_for_finished(folder: Path) -> None:
    def fail_at_parquet() -> pd.DataFrame:
        return pd.DataFrame({"mixed": [1, "one"]})  # which parquet cannot hold

    with pytest.raises(Exception, match="mixed"):
        start_run("n", {}).table("t", fail_at_parquet)
    (folder / "tables/.t.parquet.1.partial").write_text("left by a kill")
    again = start_run("n", {})
    assert again.kept == frozenset()
    again.table("t", pd.DataFrame({"x": [1]}))
    assert sorted(file.name for file in folder.glob("tables/*")) == ["t.csv", "t.parquet"]


def test_other_settings_are_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_run("n", {"k": 3, "suite": "flowlet"})
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_versions", lambda: {"torch": "1.0"})
        with pytest.raises(ValueError, match=r"version of torch was '2.* is now '1\.0'"):
            start_run("n", {"k": 3, "suite": "flowlet"})
    with pytest.raises(ValueError, match=r"k was 3 and is now 4$"):
        start_run("n", {"k": 4, "suite": "flowlet"})
    assert json.loads((folder / "config.json").read_text())["parameters"]["k"] == 3


def test_figures_share_one_script_and_fetch_nothing(folder: Path) -> None:
    run = start_run("n", {})
    for name in ("one", "two"):
        figure = go.Figure(go.Scatter(y=[1, 2], name=f"planted {name}"))
        assert run.figure(name, figure) is figure
    run.figure("two", figure, "<svg>ß</svg>")
    names = sorted(file.name for file in folder.glob("figures/*"))
    assert names == ["one.html", "one.json", "plotly.min.js", "two.html", "two.json", "two.svg"]
    assert (folder / "figures/two.svg").read_text("utf-8") == "<svg>ß</svg>"
    page = (folder / "figures/two.html").read_text()
    assert page.count("planted two") == page.count('src="plotly.min.js"') == 1
    assert "http" not in page.replace("http://www.w3.org", "").split("Plotly.newPlot")[0]
    assert json.loads((folder / "figures/one.json").read_text())["data"][0]["name"] == "planted one"


@pytest.mark.parametrize("name", ["12/res/4230", "../out", "", ".hidden"])
def test_names_that_are_no_file_names_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        start_run("n", {}).table(name, pd.DataFrame())
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_failed_writing_leaves_the_old_file(tmp_path: Path) -> None:
    def half(file: Path) -> None:
        file.write_text("new, but only ha")
        raise OSError("disk full")

    write_text(tmp_path / "file", "old")
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "file", half)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize(
    ("shell", "is_live"),
    [
        (SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": True}}), True),
        (SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": False}}), False),
        (SimpleNamespace(), False),  # a terminal
        (None, False),
    ],
)
def test_live_is_where_a_person_could_answer(
    monkeypatch: pytest.MonkeyPatch, shell: object, is_live: bool
) -> None:
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    assert live() is is_live
    bar: Any = progress(range(3), "planted")
    assert type(bar).__module__ == "tqdm.std"  # a widget would be broken in a saved notebook
    assert list(bar) == [0, 1, 2]


def test_results_are_merged_and_what_is_not_finite_is_null(tmp_path: Path):
    runs.Run(tmp_path).results({"a": 1, "before": np.float32(0.5)})
    values = {"a": math.nan, "b": [1.0, -math.inf, {"c": np.array([2.0, math.nan])}], "d": "NaN"}
    found = runs.Run(tmp_path).results(values)
    assert found == {"before": 0.5, "a": None, "b": [1.0, None, {"c": [2.0, None]}], "d": "NaN"}
    text = (tmp_path / "results.json").read_text("utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == found


def test_an_exercise_is_right_or_not_and_nothing_narrows_it_down() -> None:
    again = [runs.check(value, 0.5, tolerance=0.01) for value in (0.4, 0.6, 5.0)]
    assert again == [f"{value!r} is not it: try again" for value in (0.4, 0.6, 5.0)]
    assert runs.check(0.505, 0.5, tolerance=0.01) == runs.check(" Rises ", "rises") == "right"
    assert runs.check("falls", "rises") == "'falls' is not it: try again"
    assert runs.check(None, 0.5).startswith("no answer yet")
