"""Grids of runs on Dask, with a worker killed, a scheduler gone, storage that is full."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytest.importorskip("distributed")
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from flowhelpers.__main__ import main
from flowhelpers.core import versions
from flowhelpers.core.storage import put_folder, write_bytes
from flowhelpers.runs.execute import Job, run_notebooks
from flowhelpers.runs.grid import (
    MARKER,
    combinations,
    execute_grid,
    execute_task,
    new_grid,
    resume_grid,
    run_grid,
)
from flowhelpers.runs.grid_results import grid_figure
from flowhelpers.runs.parameters import NOTEBOOKS, plan

TINY = [
    'n: int = 1\nseed: int = 0\nwords: list[str] = ["a"]\nrate: float = 1.0',
    """
    import os, time
    from pathlib import Path
    import pandas as pd
    from flowhelpers.runs.run import start_run
    here = Path(os.environ["FLOWHELPERS_NOTEBOOKS"])
    run = start_run("01_tiny", globals())
    (here / f"began-{n}-{seed}-{os.getppid()}-{time.time_ns()}").touch()
    while n == 2 and not (here / "go").exists():
        time.sleep(0.05)
    if n == 4:
        raise RuntimeError("planted")
    """,
    """
    run.table("t", pd.DataFrame({"n": [n] * n, "seed": seed}))
    run.results({"square": n * n + seed, "in": {"half": n / 2}, "word": "w", "n": n + 1})
    """,
]
GRID = "n: [1, 2, 3]\nseed: [0, 1]"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a grid and the tiny notebook, which waits at n=2 until there is a file `go`."""
    code = [new_code_cell(textwrap.dedent(cell).strip()) for cell in TINY]
    code[0].metadata["tags"] = ["parameters"]
    (tmp_path / "notebooks").mkdir()
    cells = [new_markdown_cell("**Time** half a minute on two"), *code]
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks/01_tiny.ipynb")
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.setenv(NOTEBOOKS, str(tmp_path / "notebooks"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Dask:
    """A scheduler and workers, each a process that may be killed."""

    def __init__(self, here: Path):
        self.here, self.processes, self.port = here, [], None

    def scheduler(self) -> subprocess.Popen:
        file = self.here / "scheduler.json"
        file.unlink(missing_ok=True)
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        process = self.start("scheduler", *options, "--scheduler-file", str(file))
        until(lambda: file.exists() and file.read_text().rstrip().endswith("}"))
        self.address = json.loads(file.read_text())["address"]
        return process

    def worker(self, **env: str) -> subprocess.Popen:
        options = ["--nworkers", "1", "--nthreads", "1", "--no-dashboard"]
        folder = ["--local-directory", str(self.here / "scratch")]
        return self.start("worker", self.address, *options, *folder, **env)

    def start(self, what: str, *options: str, **env: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *options]
        with (self.here / f"{what}.log").open("a") as log:
            process = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def run(self, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "flowhelpers", "run", "--cluster", self.address, *options]
        return subprocess.Popen(command, cwd=self.here, stderr=subprocess.PIPE, text=True)


def until(true: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def dask(here: Path) -> Iterator[Dask]:
    dask = Dask(here)
    dask.scheduler()
    yield dask
    for process in reversed(dask.processes):
        process.terminate()
    for process in dask.processes:
        process.wait(60)


def test_a_grid_outlives_its_workers_and_its_scheduler(here: Path, dask: Dask):
    def began(n: int) -> list[Path]:
        return sorted(here.glob(f"notebooks/began-{n}-*"))

    def ended() -> list[Path]:
        return sorted(here.glob(f"out/*/{MARKER}"))

    dask.worker()
    dask.worker()
    first = dask.run("--grid", "grid.yaml", "--out", "out")
    until(lambda: began(2))
    os.kill(int(began(2)[0].name.split("-")[3]), signal.SIGKILL)  # a worker, in the middle
    until(lambda: len(began(2)) >= 3 and len(ended()) >= 2)  # its task came to another
    for process in dask.processes:  # the scheduler first; then those that keep workers alive
        process.kill()
    for path in began(2):
        with suppress(ProcessLookupError):
            os.kill(int(path.name.split("-")[3]), signal.SIGKILL)
    assert first.wait(60) == 130
    assert "--resume out/grid.json" in first.communicate()[1]
    before = {path: path.stat().st_mtime_ns for path in ended()}

    (here / "notebooks/go").touch()
    dask.scheduler()
    dask.worker()
    second = dask.run("--resume", "out/grid.json")
    said = second.communicate(timeout=120)[1]
    assert second.returncode == 0, said
    assert f"6 runs, {len(before)} of them finished before" in said
    assert f"{6 - len(before)} to do, 0:00:" in said
    assert "by runs that finished" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(here.glob("out/.*"))

    table = pd.read_parquet(here / "out/grid.parquet")
    pd.testing.assert_frame_equal(
        pd.read_csv(here / "out/grid.csv"), table, check_dtype=False, check_exact=False
    )
    assert list(table["result.n"]) == [2, 2, 3, 3, 4, 4]
    assert list(table["square"]) == [1, 2, 4, 5, 9, 10]
    assert list(table["in.half"]) == [0.5, 0.5, 1, 1, 1.5, 1.5]
    page = (here / "out/grid.html").read_text()
    assert "A grid of 6 runs, 6 finished" in page
    for folder, n, seed in zip(table["folder"], table["n"], table["seed"], strict=True):
        assert f'href="{folder}/notebook.html"' in page
        (here / "one").mkdir(exist_ok=True)
        if seed == 0:  # and a single run
            run_notebooks(plan(given={"n": str(n)}), here / "one")
            (single,) = here.glob("one/*/tables/t.parquet")
            in_grid = here / "out" / folder / "tables/t.parquet"
            assert single.read_bytes() == in_grid.read_bytes()
            subprocess.run(["rm", "-r", str(here / "one")], check=True)


def test_a_worker_of_another_version_is_refused(
    here: Path, dask: Dask, capsys: pytest.CaptureFixture[str]
):
    info = here / "old/flowhelpers-0.0.7.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flowhelpers\nVersion: 0.0.7\n")
    paths = [str(here / "old"), os.environ.get("PYTHONPATH", "")]
    dask.worker(PYTHONPATH=os.pathsep.join(filter(None, paths)))
    until(lambda: "Registered to" in (here / "worker.log").read_text())
    options = ["--grid", "grid.yaml", "--out", "out", "--cluster", dask.address]
    assert main(["run", *options]) == 2
    said = capsys.readouterr().err
    assert "has flowhelpers 0.0.7, and what was asked for is of 0.1.0" in said
    assert not list(here.glob("notebooks/began*"))


def test_a_worker_of_another_commit_is_refused(
    here: Path, dask: Dask, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(Path(versions.__file__).parents[1], here / "other/flowhelpers")
    with (here / "other/flowhelpers/runs/lesson.py").open("a") as file:
        file.write("# changed\n")
    dask.worker(PYTHONPATH=str(here / "other"))
    until(lambda: "Registered to" in (here / "worker.log").read_text())
    assert main(["run", "--grid", "grid.yaml", "--out", "out", "--cluster", dask.address]) == 2
    assert "has flowhelpers 0.1.0 of another commit than this process" in capsys.readouterr().err
    assert not list(here.glob("notebooks/began*"))


def test_runs_that_do_not_arrive_in_the_storage_are_told(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "grid.yaml").write_text("n: [1]")  # each process has a memory of its own
    options = ["--out", "memory://bucket/lost", "--workers", "1"]
    assert main(["run", "--grid", "grid.yaml", *options]) == 1
    told = capsys.readouterr().err
    assert "1 runs left nothing in memory://bucket/lost: their workers died" in told
    MemoryFileSystem().rm("/bucket", recursive=True)


def test_a_page_draws_three_parameters_and_says_which():
    rows = [(n, seed, k, n + seed + k) for n in (1, 2, 3) for seed in (0, 1) for k in (5, 10)]
    runs = pd.DataFrame(rows, columns=["n", "seed", "k", "number"]).assign(notebook="01_tiny")
    figure = grid_figure(runs, ["seed", "k", "n"])
    assert "by n, coloured by seed, with a symbol for k" in figure.layout.title.text
    assert len({(trace.marker.color, trace.marker.symbol) for trace in figure.data}) == 4
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 3]


@pytest.mark.parametrize(
    ("grid", "options", "said"),
    [
        ("m: [1]", [], "unknown parameter 'm'"),
        ("n: [1, two]", [], "parameter 'n' is int, not 'two'"),
        ("n: 3", [], "each with a list of values, as in `seed: [0, 1]`"),
        ("n: []", [], "each with a list of values"),
        ("just words", [], "each with a list of values"),
        ("[]", [], "each with a list of values"),
        ("{}", [], "each with a list of values"),
        ("n: [1]\nn: [2]", [], "n stands there twice"),
        ("- {n: [1]}\n- {n: [1], seed: [1], n: [3]}", [], "n stands there twice"),
        ("n: [1]", ["--name", "mine"], "--name: the runs of a --grid"),
        ("n: [1]", ["-p", "n=2"], "n is given by -p and in grid.yaml"),
        ("n: [1]", ["--workers", "0"], "workers=0: expected 1 or more"),
        ("n: [1]", ["--workers", "2", "--cluster", "tcp://a:1"], "or a cluster alone"),
        ("n: [1]", ["--cluster", "tcp://127.0.0.1:9"], "no Dask scheduler answers at tcp"),
        ("n: [1]", ["--out", "/proc/none"], "cannot write to /proc/none"),
        ("n: [1]", ["--out", "nothere://a"], "nothere"),
        (f"n: {list(range(100))}\nseed: {list(range(100))}", [], "10,000 runs are more than 1,000"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    here: Path, capsys: pytest.CaptureFixture[str], grid: str, options: list[str], said: str
):
    (here / "grid.yaml").write_text(grid)
    assert main(["run", "--grid", "grid.yaml", "--out", "out", *options]) == 2
    told = capsys.readouterr().err
    assert said in told
    if "10,000" in said:
        assert "3 days, 11:20:00 on 1 worker(s) by the notebooks' own times" in told
        assert not (here / "out").exists()
    assert not list(here.glob("notebooks/began*"))
    assert not list(here.glob("out/01*"))


def test_what_is_no_record_of_a_run_is_named(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "grid.yaml").write_text("n: [1]")
    (here / "out" / "mine").mkdir(parents=True)
    (here / "out" / "mine" / "job.json").write_text('{"a": 1}')
    assert main(["run", "--grid", "grid.yaml", "--out", "out"]) == 2
    assert "out/mine/job.json is no record of a run of a grid" in capsys.readouterr().err


def test_a_grid_that_is_no_text_is_named(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "grid.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["run", "--grid", "grid.yaml", "--out", "out"]) == 2
    assert "grid.yaml: expected parameters" in capsys.readouterr().err


def test_options_of_a_grid_are_for_a_grid(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "--out", "s3://bucket"]) == 2
    assert "are for a --grid" in capsys.readouterr().err
    (here / "grid.json").write_text("{}")
    assert main(["run", "--resume", "grid.json"]) == 2
    assert "grid.json is not the manifest of a grid" in capsys.readouterr().err
    assert main(["run", "--resume", "--out", "."]) == 2
    assert "nothing to take up" in (said := capsys.readouterr().err)
    assert said.endswith("; its grid by its name: --resume grid.json\n")


def test_a_grid_is_every_combination_once(here: Path):
    (here / "grid.yaml").write_text(
        "- {n: [1, 2], words: [[a], [a, b]]}\n- {n: [2, 3], rate: [1], words: [[a]]}\n- {n: [1], "
        "words: [[a]]}"
    )
    grid = new_grid(combinations([], here / "grid.yaml", {"seed": "5"}, None))
    assert [tuple(job.parameters.items()) for job in grid.jobs][2:] == [
        (("seed", 5), ("n", 2), ("words", ["a"])),
        (("seed", 5), ("n", 2), ("words", ["a", "b"])),
        (("seed", 5), ("n", 2), ("rate", 1.0), ("words", ["a"])),
        (("seed", 5), ("n", 3), ("rate", 1.0), ("words", ["a"])),
    ]
    assert len({job.folder for job in grid.jobs}) == len(grid.jobs) == 6


def test_a_manifest_of_another_version_is_refused(here: Path):
    grid = new_grid(combinations([], here / "grid.yaml", {}, None))
    grid.version = "0.0.7"
    (here / "grid.json").write_text(grid.model_dump_json())
    with pytest.raises(ValueError, match=r"has flowhelpers 0\.1\.0, .* is of 0\.0\.7"):
        resume_grid("grid.json", workers=1)


def test_runs_and_workers_of_another_commit_do_not_count(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    planned = [*combinations([], here / "grid.yaml", {}, None)]
    grid = new_grid(planned)
    monkeypatch.setattr("flowhelpers.runs.grid.code_digest", lambda: "another")
    monkeypatch.setattr("flowhelpers.runs.grid.MANY", 5)
    other = new_grid(planned)
    for job in grid.jobs:
        ended = job.model_copy(update={"status": "finished"}).model_dump_json()
        write_bytes(LocalFileSystem(), f"{here}/out/{job.folder}/{MARKER}", ended.encode())
    with pytest.raises(ValueError, match="6 runs are more than 5"):
        execute_grid(other, "out")
    assert "6 more in out are of other parameters, notebooks or code" in capsys.readouterr().err
    with pytest.raises(ValueError, match="another commit than what was asked for"):
        execute_task("", "", "out", ".", None, other.version, other.code)


def test_a_folder_that_fsspec_takes_for_a_pattern_is_refused(here: Path):
    with pytest.raises(ValueError, match=r"a\[1\]: expected a folder without any of"):
        run_grid([], str(here / "a[1]"))


def test_an_object_store_gets_a_run_whole_and_once(here: Path):
    (here / "grid.yaml").write_text("n: [1, 4]")
    grid = new_grid(combinations([], here / "grid.yaml", {}, None))
    store = MemoryFileSystem()
    for job in [*grid.jobs, *grid.jobs]:
        source = grid.notebooks["01_tiny.ipynb"]
        options = ("memory://bucket/g", str(here), None, grid.version, grid.code)
        ended = Job.model_validate_json(execute_task(source, job.model_dump_json(), *options))
        kept = Job.model_validate_json(store.cat_file(f"/bucket/g/{job.folder}/{MARKER}"))
        assert kept == ended
        assert (ended.status, ended.error is None) == (
            ("failed", False) if job.parameters["n"] == 4 else ("finished", True)
        )
    good = grid.jobs[0].folder
    assert json.loads(store.cat_file(f"/bucket/g/{good}/results.json"))["square"] == 1
    assert store.exists(f"/bucket/g/{good}/tables/t.parquet")
    began = [path.name.split("-")[1] for path in here.glob("notebooks/began*")]
    assert sorted(began) == ["1", "4", "4"]  # what failed may have been mended
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("kind", [LocalFileSystem, MemoryFileSystem])
def test_of_a_run_that_finds_no_room_nothing_is_left(tmp_path: Path, kind: type):
    class Full(kind):
        def put_file(self, lpath: str, rpath: str, *args: object, **options: object) -> None:
            if Path(lpath).name == "z":
                raise OSError(errno.ENOSPC, "No space left on device")
            super().put_file(lpath, rpath, *args, **options)

        def cp_file(self, path1: str, path2: str, **options: object) -> None:
            if Path(path1).name == "z":
                raise OSError(errno.ENOSPC, "No space left on device")
            super().cp_file(path1, path2, **options)

    run = tmp_path / "run"
    run.mkdir()
    for name in ("a", "z", MARKER):
        (run / name).write_text(name)
    fs, target = Full(), f"{tmp_path}/out/run"
    fs.makedirs(f"{tmp_path}/out")
    with pytest.raises(OSError, match=r"nothing of it is left: .*No space left"):
        put_folder(run, fs, target, MARKER)
    assert fs.find(f"{tmp_path}/out") == []
    (run / "z").unlink()
    (run / MARKER).write_text(MARKER)
    put_folder(run, fs, target, MARKER)
    assert sorted(Path(path).name for path in fs.find(f"{tmp_path}/out")) == ["a", MARKER]
