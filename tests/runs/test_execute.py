import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from flowhelpers.__main__ import main
from flowhelpers.runs.execute import Manifest, resume, run_notebooks
from flowhelpers.runs.parameters import NOTEBOOKS, plan

COMMAND = [sys.executable, "-m", "flowhelpers", "run"]
GOOD = [
    'new: int = 3  # how many\nwords: list[str] = ["a"]\ndevice: str | None = None',
    """
    import os, sys
    import pandas as pd
    import plotly.graph_objects as go
    from ipywidgets import IntSlider
    from flowhelpers.core.progress_bar import live
    from flowhelpers.runs.run import start_run
    run = start_run("01_good", globals())
    squares = run.table("squares", lambda: pd.DataFrame({"n": range(new)}).eval("n2 = n * n"))
    """,
    'run.figure("curve", go.Figure(go.Scatter(y=[3, 1, 2], name="planted trace")))',
    """
    waits = os.environ["OMP_WAIT_POLICY"]
    results = {"sum": int(squares.n2.sum()), "live": live(), "python": sys.executable}
    run.results(results | {"waits": waits})
    """,
    'IntSlider(description="dead widget")',
]
BAD = ["k: float = 1.0", 'raise RuntimeError(f"planted <failure> {k}")']
LAST = ["k: float = 1.0", "print(k * 2)"]
SLOW = [
    "k: int = 1",
    """
    import os, time
    from pathlib import Path
    import pandas as pd
    from flowhelpers.runs.run import start_run
    run = start_run("01_slow", globals())
    here = Path(os.environ["FLOWHELPERS_NOTEBOOKS"])
    """,
    """
    def compute():
        with open(here / "computed", "a") as file:
            file.write("once ")
        return pd.DataFrame({"k": [k]})
    run.table("t", compute)
    """,
    """
    (here / f"pid{len(list(here.glob('pid*')))}").write_text(f"{os.getpid()}.")
    while not (here / "go").exists():
        time.sleep(0.05)
    """,
]


def write_notebook(path: Path, cells: list[str], text: str = "") -> None:
    """A notebook of these code cells, the first of which holds its parameters."""
    code = [new_code_cell(re.sub(r"(?m)^    ", "", cell).strip()) for cell in cells]
    code[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell(text), *code]), path)


@dataclass(frozen=True)
class Execution:
    """What an execution of notebooks left."""

    status: int
    out: Path
    said: str

    @property
    def jobs(self) -> list[dict]:
        return json.loads(next(self.out.glob("*.json")).read_text())["jobs"]

    def folder(self, index: int) -> Path:
        return self.out / self.jobs[index]["folder"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Execution:
    """Three notebooks, the second of which fails, executed by the command line."""
    root = tmp_path_factory.mktemp("executed")
    text = "Planted $x_1$ and $$\\frac{a}{b}$$ [last](03_last.ipynb)"
    write_notebook(root / "notebooks/01_good.ipynb", GOOD, text)
    write_notebook(root / "notebooks/02_bad.ipynb", BAD)
    write_notebook(root / "notebooks/03_last.ipynb", LAST)
    done = subprocess.run(
        [*COMMAND, "--name", "trial", "-p", "new=4", "words=x,y", "k=2"],
        env=os.environ | {NOTEBOOKS: str(root / "notebooks")},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Execution(done.returncode, root / "runs", done.stderr)


def test_others_run_when_one_fails(executed: Execution) -> None:
    assert executed.status == 1
    assert [job["status"] for job in executed.jobs] == ["finished", "failed", "finished"]
    last = nbformat.read(executed.folder(2) / "notebook.ipynb", as_version=4)
    assert last.cells[-1].outputs[0].text == "4.0\n"
    assert "[2/3] failed after" in executed.said
    assert "RuntimeError: planted <failure> 2.0" in executed.said
    assert "planted &lt;failure&gt; 2.0" in (executed.folder(1) / "notebook.html").read_text()


def test_run_folder_holds_what_the_notebook_made(executed: Execution) -> None:
    folder = executed.folder(0)
    assert re.fullmatch(r"\d{8}-\d{6}-01_good-trial", folder.name)
    squares = pd.DataFrame({"n": [0, 1, 2, 3], "n2": [0, 1, 4, 9]})
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "tables/squares.parquet"), squares)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "tables/squares.csv"), squares)
    results = json.loads((folder / "results.json").read_text())
    expected = {"sum": 14, "live": False, "python": sys.executable, "waits": "PASSIVE"}
    assert results == expected
    config = json.loads((folder / "config.json").read_text())
    assert config["parameters"] == {"new": 4, "words": ["x", "y"], "device": None}
    hidden = [path.name for path in executed.out.rglob(".*")]
    empty = [path for path in executed.out.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert hidden + empty == []


def test_page_needs_no_network_and_has_the_figure(executed: Execution) -> None:
    from plotly.offline import get_plotlyjs

    page = (executed.folder(0) / "notebook.html").read_text()
    assert page.count(get_plotlyjs()) == 1
    page = page.replace(get_plotlyjs(), "")
    assert not re.search(r"<(script|link|iframe)[^>]*(src|href)=|import\(|cdn|widget-view", page)
    assert page.count('class="plotly-graph-div"') == page.count('"name":"planted trace"') == 1
    assert page.count("<math") == 2
    assert "<mfrac>" in page


def test_index_leads_to_everything(executed: Execution) -> None:
    page = next(executed.out.glob("*.html")).read_text()
    links = re.findall(r'href="([^"]*)"', page)
    good = executed.folder(0).name
    made = ["notebook.html", "figures/curve.html", "tables/squares.csv"]
    made += ["results.json", "config.json", "notebook.ipynb"]
    assert [link for link in links if link.startswith(good)] == [f"{good}/{name}" for name in made]
    assert [link for link in links if not (executed.out / link).is_file()] == []
    assert "RuntimeError: planted &lt;failure&gt; 2.0" in page
    assert f'<script src="{good}/figures/plotly.min.js">' in page  # for the first figure
    assert re.findall(r'class="status (\w+)"', page) == ["finished", "failed", "finished"]
    assert "2 of 3 notebooks finished" in page
    assert "http" not in page


@pytest.fixture
def notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one notebook that waits in its last cell until it may go on."""
    folder = tmp_path / "notebooks"
    write_notebook(folder / "01_slow.ipynb", SLOW)
    monkeypatch.setenv(NOTEBOOKS, str(folder))
    return folder


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds; an AssertionError if it does not in time."""
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_stopped_by_any_signal_then_taken_up_again(notebooks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, "--out", str(out)]
    folders = []
    for number, stop in enumerate([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]):
        running = subprocess.Popen(
            command + ["--resume"] * (number > 0), stderr=subprocess.PIPE, text=True
        )
        pid = notebooks / f"pid{number}"
        wait_for(lambda pid=pid: pid.exists() and pid.read_text().endswith("."))
        if number == 1:  # what is running is not up for taking
            with pytest.raises(FileNotFoundError, match="still running"):
                resume(out)
        running.send_signal(stop)
        said = running.communicate(timeout=60)[1]
        kernel = int(pid.read_text().removesuffix("."))
        wait_for(lambda kernel=kernel: not psutil.pid_exists(kernel))
        path = next(out.glob("*.json"))
        (job,) = Manifest.model_validate_json(path.read_bytes()).jobs
        folders.append(job.folder)
        if stop != signal.SIGKILL:
            assert running.returncode == 130
            assert job.status == "stopped"
            assert f"flowhelpers run --resume {path}" in said
    (notebooks / "go").touch()
    assert main(["run", "--out", str(out), "--resume"]) == 0
    (job,) = Manifest.model_validate_json(path.read_bytes()).jobs
    assert job.status == "finished"
    assert {*folders, job.folder} == {folders[0]}
    assert (notebooks / "computed").read_text() == "once "
    assert main(["run", "--out", str(out), "--resume"]) == 2  # for nothing is left to do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["01_slwo"], "unknown notebook '01_slwo'; did you mean '01_slow'"),
        (["-p", "kk=1"], "unknown parameter 'kk'; did you mean 'k'"),
        (["-p", "k"], "-p takes name=value, not 'k'"),
        (["--preset", "quick"], "unknown preset 'quick'"),
        (["--out", "broken.ipynb/runs"], "cannot make the folder"),
        (["none/01_slow.ipynb"], "unknown notebook 'none/01_slow.ipynb'"),
        (["broken.ipynb"], "broken.ipynb is not a notebook"),
        (["--resume"], "nothing to take up"),
        (["--resume", "none.json"], "--resume takes the manifest of a run"),
        (["01", "--resume"], "--resume goes on with what was asked for before"),
        (["--resume", "grid.json", "--grid", "other.yaml"], "--resume goes on with what was asked"),
    ],
)
def test_errors_are_a_line_and_write_nothing(
    notebooks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.ipynb").write_text("{")
    out = tmp_path / "out"
    assert main(["run", "--out", str(out), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("flowhelpers: ")
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()
    with pytest.raises((ValueError, OSError)):
        main(["--debug", "run", "--out", str(out), *arguments])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowhelpers.training.card.stored_bars", {}.__getitem__)
    with pytest.raises(KeyError):
        main(["card"])


@pytest.mark.parametrize("seconds", ["0", "1.5"])
def test_a_timeout_is_of_some_seconds(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", f"--timeout={seconds}"])
    assert f"a whole number of seconds from 1, got '{seconds}'" in capsys.readouterr().err


def test_other_files_do_not_keep_a_run_from_being_taken_up(
    notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (notebooks / "go").touch()
    write_notebook(notebooks / "02_bad.ipynb", BAD)
    out = tmp_path / "out"
    assert main(["run", "--out", str(out)]) == 1
    (out / "99999999.json").write_text("{}")
    (out / "zz.json").write_text("not JSON")
    write_notebook(notebooks / "02_bad.ipynb", LAST)
    assert main(["run", "--out", str(out), "--resume"]) == 0
    assert not list(out.glob(".*"))
    capsys.readouterr()
    assert main(["run", "--resume", str(out / "zz.json")]) == 2
    assert "zz.json is not the manifest of a run" in capsys.readouterr().err


def test_runs_of_the_same_second_are_apart(
    notebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def pretend(notebook: Path, output: Path, given: dict, **options: object) -> None:
        made.append(output.parent.name)
        write_notebook(output, ["k: int = 1"])

    monkeypatch.setattr("flowhelpers.runs.execute.papermill.execute_notebook", pretend)
    monkeypatch.setattr("flowhelpers.runs.execute.folder_name", lambda *_: "same")
    assert [run_notebooks(plan(), tmp_path / "out") for _ in range(2)] == [0, 0]
    assert made == ["same", "same-2"]
    assert len([*(tmp_path / "out").glob("*.json")]) == 2


def test_notebooks_are_listed_with_their_parameters(
    notebooks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["notebooks"]) == 0
    assert capsys.readouterr().out.split() == ["01_slow", "k:", "int", "=", "1"]
