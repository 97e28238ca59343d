"""A grid of runs on Dask: each combination of parameters is a task that executes one notebook.

All goes below `out`, a folder that every worker reaches or an fsspec address (`s3://bucket/grid`):

    grid.json             what was asked for, with the notebooks as they were
    <notebook>-<digest>/  a run's folder (see `runs.run`), and in it job.json: how the run ended
    grid.csv, .parquet    parameters × the numbers of each results.json; grid.html draws them

A worker executes in a folder of its own, and the run's folder appears in `out` when it is complete:
renamed into place where `out` is a folder; on an object store its job.json comes last, and a folder
without it counts for nothing. Runs that are finished there are not executed again, whoever asks.
"""

import logging
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from importlib import metadata
from itertools import product
from os import cpu_count
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, cast

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from flowhelpers.core.cache import key_of
from flowhelpers.core.features import check_choice
from flowhelpers.core.files import load_yaml, write_text
from flowhelpers.core.progress_bar import progress
from flowhelpers.core.storage import open_storage, put_folder, writable_storage, write_bytes
from flowhelpers.core.versions import check_workers, code_digest
from flowhelpers.runs.execute import STOPPED, Job, execute_one, say
from flowhelpers.runs.grid_results import write_table
from flowhelpers.runs.pages import duration
from flowhelpers.runs.parameters import find_notebooks, inspect, plan

MANIFEST, MARKER = "grid.json", "job.json"
MANY = 1000  # runs that are started without being asked twice
# seconds, by what a notebook says of its time at its head
STATED = {"half a minute": 30, "under a minute": 60, "a minute and a half": 90, "two minutes": 120}
SAYS = re.compile(rf"\*\*Time\*\* (?:about )?({'|'.join(STATED)})")
ONE_NOTEBOOK = threading.Lock()  # at a time in a worker: a run's folder is told by the environment

Planned = Iterable[tuple[Path, dict[str, Any]]]


class Grid(BaseModel):
    """What was asked for; how far it has come is in the folders of the runs."""

    started: str
    version: str
    code: str = ""  # its digest, which older manifests lack
    working_folder: Path
    notebooks: dict[str, str]  # the source of each by its file's name
    jobs: list[Job]


def combinations(
    names: Sequence[str], path: Path, given: Mapping[str, str], preset: str | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The notebooks and parameters of a grid, all checked.

    Args:
        path: A YAML file: names of parameters, each with a list of values, whose combinations are
            all run; or a list of such mappings. A notebook gets the parameters that it has.
        given: Parameters of every run, as texts; `names`, `given` and `preset` are as for `plan`.
    """
    declared = {notebook: inspect(notebook) for notebook in find_notebooks(names)}
    known = sorted({name for parameters in declared.values() for name in parameters})

    @cache  # a preset may set more for some suites
    def usual(suite: str | None) -> dict[Path, dict[str, Any]]:
        return plan(names, {**given, **({"suite": suite} if preset and suite else {})}, preset)

    for grid in _read_yaml(path):
        for name in grid:
            check_choice("parameter", name, known)
            if name in given:
                raise ValueError(f"{name} is given by -p and in {path}: expected one of both")
        for notebook, parameters in declared.items():
            has = grid.keys() & parameters.keys()
            own = {n: [parameters[n].check(v) for v in grid[n]] for n in grid if n in has}
            for values in product(*own.values()):
                chosen = dict(zip(own, values, strict=True))
                yield notebook, usual(chosen.get("suite"))[notebook] | chosen


def _read_yaml(path: Path) -> list[dict[str, list[Any]]]:
    from yaml import YAMLError

    some = Field(min_length=1)
    grids = Annotated[list[Annotated[dict[str, Annotated[list[Any], some]], some]], some]
    try:
        given = load_yaml(path)
        given = given if isinstance(given, list) else [given]
        return TypeAdapter(grids).validate_python(given, strict=True)
    except (YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected parameters, each with a list of values, as in `seed: [0, 1]`, or a"
            f" list of such mappings: {str(error)[:200]}"
        ) from error


def new_grid(planned: Planned) -> Grid:
    """A grid of these runs, each once; a run's folder is named by all that it depends on."""
    version, code, sources, jobs = metadata.version("flowhelpers"), code_digest(), {}, {}
    for notebook, parameters in progress(planned, "combinations"):
        if notebook.name not in sources:
            sources[notebook.name] = notebook.read_text("utf-8")
        key = {"notebook": sources[notebook.name], "of": [version, code], "parameters": parameters}
        folder = f"{notebook.stem}-{key_of(key)[:12]}"
        jobs[folder] = Job(notebook=Path(notebook.name), parameters=parameters, folder=folder)
    given = {"version": version, "code": code, "notebooks": sources, "jobs": list(jobs.values())}
    return Grid(started=str(datetime.now())[:19], working_folder=Path.cwd(), **given)


def run_grid(planned: Planned, out: str, **options: Any) -> int:
    """Executes runs, as `combinations` gives them; see `execute_grid`."""
    return execute_grid(new_grid(planned), out, **options)


def resume_grid(manifest: str, **options: Any) -> int:
    """Goes on with the grid of a manifest, `<out>/grid.json`; see `execute_grid`."""
    fs, path = open_storage(manifest)
    try:
        grid = Grid.model_validate_json(fs.cat_file(path))
    except ValidationError as error:
        raise ValueError(f"{manifest} is not the manifest of a grid") from error
    return execute_grid(grid, manifest.removesuffix(MANIFEST).rstrip("/\\") or ".", **options)


def execute_grid(
    grid: Grid,
    out: str,
    *,
    cluster: str | None = None,
    workers: int | None = None,
    timeout: int | None = None,
    yes: bool = False,
) -> int:
    """Executes the runs that are not finished in `out`; then writes their table and its page.

    Args:
        cluster: The address of a Dask scheduler; by default workers of this machine.
        workers: How many of these; by default one for two cores.
        timeout: Seconds that a cell may take, without end unless given.
        yes: Start more than `MANY` runs.

    Returns:
        The exit status: 0, 1 if a run failed, 130 if stopped.

    Raises:
        ValueError: If there are too many runs, or a worker has another version of the package.
        OSError: If `out` cannot be written to, now or by a worker, or no scheduler answers.
    """
    if (cluster and workers) or (workers is not None and workers < 1):
        raise ValueError(f"workers={workers}: expected 1 or more here, or a cluster alone")
    fs, root = open_storage(out)
    done = {name: job for name, job in ended_runs(fs, root).items() if job.status == "finished"}
    waiting = [job for job in grid.jobs if job.folder not in done]
    finished = len(grid.jobs) - len(waiting)
    workers = workers or max(1, (cpu_count() or 1) // 2)
    say(f"{len(grid.jobs):,} runs, {finished:,} of them finished before")
    if others := len(done) - finished:
        say(f"{others:,} more in {out} are of other parameters, notebooks or code: not counted")
    if waiting:
        time_needed = _forecast(grid, waiting, done, None if cluster else workers)
        say(f"{len(waiting):,} to do, {time_needed}")
    if len(waiting) > MANY and not yes:
        raise ValueError(f"{len(waiting):,} runs are more than {MANY:,}: start them with --yes")
    fs, root = writable_storage(out)
    write_bytes(fs, f"{root}/{MANIFEST}", grid.model_dump_json(indent=1).encode())
    if waiting:
        with _client(cluster, workers) as client:
            check_workers(client, expected=grid.version, code=grid.code)
            if not _execute(client, grid, waiting, out, timeout):
                say(f"stopped; to take it up again: flowhelpers run --resume {out}/{MANIFEST}")
                return STOPPED
    ended = ended_runs(fs, root)
    if lost := sum(str(job.folder) not in ended for job in waiting):
        say(f"{lost:,} runs left nothing in {out}: their workers died, or do not reach it")
    table = write_table(fs, root, [ended.get(str(job.folder), job) for job in grid.jobs])
    say(f"table and page: {out}/grid.csv, {out}/grid.html")
    return int((table["status"] != "finished").any())


def _execute(client: Any, grid: Grid, waiting: list[Job], out: str, timeout: int | None) -> bool:
    """Has the workers execute runs; whether they came to an end, for a scheduler may be lost."""
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    mark = uuid.uuid4().hex  # what a scheduler remembers of an earlier time is of no use
    books = grid.notebooks.items()  # sent once to each worker
    sources = {name: client.submit(str, text, key=f"{name}-{mark}") for name, text in books}
    where = out if "://" in out else str(Path(out).resolve())
    options, futures = (where, str(grid.working_folder), timeout, grid.version, grid.code), {}
    for job in waiting:
        asked = (sources[str(job.notebook)], job.model_dump_json(), *options)
        futures[client.submit(execute_task, *asked, key=f"{job.folder}-{mark}")] = job
    began, total = time.monotonic(), len(waiting)
    try:
        for number, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            if future.status in ("cancelled", "lost"):
                say("the scheduler is gone")
                return False
            try:
                ended = Job.model_validate_json(future.result())
            except KilledWorker as error:  # time and again
                ended = job.model_copy(update={"status": "failed", "error": str(error)})
            except OSError as error:  # storage is full, say
                say(f"{job.folder}: {error}")
                return False
            left = (time.monotonic() - began) / number * (total - number)
            reason = f": {ended.error.splitlines()[0]}" if ended.error else ""
            say(f"[{number}/{total}] {job.folder} {ended.status} after"
                 f" {duration(ended.seconds or 0)}{reason}; {duration(left)} left")  # fmt: skip
    except KeyboardInterrupt:
        return False
    finally:
        with suppress(Exception):
            client.cancel(list(futures))
    return True


def execute_task(
    source: str, told: str, out: str, there: str, timeout: int | None, version: str, code: str
) -> str:
    """Executes a run in a folder of this worker and puts it into `out`; returns its job as JSON.

    A notebook that fails is an outcome like another. An OSError if `out` cannot be written to, a
    ValueError if this worker, which may have come late, has another version or code.
    """
    check_workers(expected=version, code=code)
    job = Job.model_validate_json(told)
    fs, root = open_storage(out)
    with ONE_NOTEBOOK, tempfile.TemporaryDirectory(dir=_scratch()) as scratch:
        ended = ended_runs(fs, root, str(job.folder)).get(str(job.folder))
        if ended and ended.status == "finished":  # by a worker that was taken for dead
            return ended.model_dump_json()
        here, began = Path(scratch), time.monotonic()
        notebook, folder = here / job.notebook.name, here / str(job.folder)
        notebook.write_text(source, "utf-8")
        folder.mkdir()
        local = job.model_copy(update={"notebook": notebook})
        cwd = Path(there) if Path(there).is_dir() else here
        job.error = execute_one(local, here, cwd, timeout, ({}, "../grid.html"))
        job.status = "failed" if job.error else "finished"
        job.seconds = time.monotonic() - began
        write_text(folder / MARKER, job.model_dump_json(indent=2))
        put_folder(folder, fs, f"{root}/{job.folder}", MARKER)
    return job.model_dump_json()


def _scratch() -> str | None:
    """The folder that Dask gives a worker, and clears after one that died."""
    from distributed import get_worker

    with suppress(ValueError):
        return get_worker().local_directory


def ended_runs(fs: Any, root: str, folder: str = "*") -> dict[str, Job]:
    """The runs that came to an end, by their folders."""
    markers = fs.glob(f"{root}/{folder}/{MARKER}")
    found = fs.cat(markers) if markers else {}
    jobs = []
    for path, text in found.items():
        try:
            jobs.append(Job.model_validate_json(text))
        except ValidationError as error:
            raise ValueError(f"{path} is no record of a run of a grid: remove it") from error
    return {str(job.folder): job for job in jobs}


def _forecast(grid: Grid, waiting: list[Job], done: Mapping[str, Job], workers: int | None) -> str:
    """How long runs will take on so many workers, None if unknown, and by what that is told."""
    total, by = 0.0, set()
    for job in waiting:
        seconds = [each.seconds or 0 for each in done.values() if each.notebook == job.notebook]
        stated = [STATED[words] for words in SAYS.findall(grid.notebooks[str(job.notebook)])]
        if not (seconds or stated):
            return f"and {job.notebook} states no time: the first that finish will tell"
        total += mean(seconds or stated)
        by.add("runs that finished" if seconds else "the notebooks' own times, on two cores")
    shared = f"on {workers} worker(s)" if workers else "of one worker, less of several,"
    return f"{duration(total / (workers or 1))} {shared} by {' and '.join(sorted(by))}"


@contextmanager
def _client(cluster: str | None, workers: int) -> Iterator[Any]:
    """A client of the scheduler at an address, or of one on this machine with its own workers."""
    try:
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise ValueError("a grid needs Dask: pip install -e '.[cluster]'") from error
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # we say all ourselves
    if cluster:
        try:
            client = Client(cluster, timeout="10s")
        except (OSError, ValueError) as error:
            raise OSError(f"no Dask scheduler answers at {cluster}: {error}") from error
        with client:
            yield client
        return
    threads = max(1, (cpu_count() or 1) // workers)  # of torch, in each notebook
    env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TQDM_DISABLE": 1}
    options: dict[str, Any] = {"n_workers": workers, "threads_per_worker": 1, "env": env}
    options["silence_logs"] = logging.CRITICAL
    with (
        LocalCluster(dashboard_address=cast(Any, None), **options) as local,
        Client(local) as client,
    ):
        yield client
