"""A grid of runs on Dask: each combination of parameters is a task that executes one notebook.

All goes below `out`, a folder that every worker reaches or an fsspec address (`s3://bucket/grid`):

    grid.json             what was asked for, with copies of the notebooks in `notebooks/`
    <notebook>-<digest>/  a run's folder (see `runs.run`), and in it job.json: how the run ended
    grid.csv, .parquet    parameters × the numbers of each results.json; grid.html draws them

A worker executes in a folder of its own, and the run's folder appears in `out` when it is complete:
renamed into place where `out` is a folder; on an object store its job.json comes last, and a folder
without it counts for nothing. Runs that are finished there are not executed again, whoever asks.
"""

import json
import logging
import re
import sys
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
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from flowhelpers.core.cache import key_of
from flowhelpers.core.features import check_choice
from flowhelpers.core.storage import open_storage, writable_storage, write_bytes
from flowhelpers.core.versions import check_workers
from flowhelpers.runs.execute import STOPPED, Job
from flowhelpers.runs.grid_results import write_table
from flowhelpers.runs.grid_task import ended_runs, execute_task
from flowhelpers.runs.pages import duration
from flowhelpers.runs.parameters import find_notebooks, inspect, plan

if TYPE_CHECKING:
    pass

MANIFEST = "grid.json"
MANY = 1000  # runs that are started without being asked twice
# seconds, by what a notebook says of its time at its head
STATED = {"half a minute": 30, "under a minute": 60, "a minute and a half": 90, "two minutes": 120}
SAYS = rf"\*\*Time\*\* (?:about )?({'|'.join(STATED)})"

Planned = Iterable[tuple[Path, dict[str, Any]]]


class Grid(BaseModel):
    """What was asked for; how far it has come is in the folders of the runs."""

    started: str
    version: str
    working_folder: Path
    notebooks: dict[str, str]  # the source of each, kept in files of their own
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
            own = {
                name: [parameters[name].check(value) for value in values]
                for name, values in grid.items()
                if name in parameters
            }
            for values in product(*own.values()):
                chosen = dict(zip(own, values, strict=True))
                yield notebook, usual(chosen.get("suite"))[notebook] | chosen


def _read_yaml(path: Path) -> list[dict[str, list[Any]]]:
    import yaml

    kind = TypeAdapter(list[dict[str, Annotated[list[Any], Field(min_length=1)]]])
    try:
        given = yaml.safe_load(path.read_text("utf-8"))
        return kind.validate_python(given if isinstance(given, list) else [given], strict=True)
    except (yaml.YAMLError, ValidationError) as error:
        raise ValueError(
            f"{path}: expected parameters, each with a list of values, as in `seed: [0, 1]`, or a"
            f" list of such mappings: {str(error)[:200]}"
        ) from error


def new_grid(planned: Planned) -> Grid:
    """A grid of these runs, each once; a run's folder is named by all that it depends on."""
    version, sources, jobs = metadata.version("flowhelpers"), {}, {}
    for notebook, parameters in planned:
        if notebook.name not in sources:
            sources[notebook.name] = notebook.read_text("utf-8")
        key = {"notebook": sources[notebook.name], "version": version, "parameters": parameters}
        folder = f"{notebook.stem}-{key_of(key)[:12]}"
        jobs[folder] = Job(notebook=Path(notebook.name), parameters=parameters, folder=folder)
    return Grid(
        started=str(datetime.now())[:19],
        version=version,
        working_folder=Path.cwd(),
        notebooks=sources,
        jobs=list(jobs.values()),
    )


def read_grid(manifest: str) -> Grid:
    """The grid of a manifest; a ValueError if it is of another version of the package."""
    fs, path = open_storage(manifest)
    root, ours = path.rsplit("/", 1)[0], metadata.version("flowhelpers")
    try:
        told = json.loads(fs.cat_file(path))
        names = {job["notebook"] for job in told["jobs"]}
        books = {name: fs.cat_file(f"{root}/notebooks/{name}").decode() for name in names}
        grid = Grid.model_validate(told | {"notebooks": books})
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{manifest} is not the manifest of a grid") from error
    if grid.version != ours:
        raise ValueError(
            f"{manifest} was started with flowhelpers {grid.version}, and this is {ours}: install"
            " that version, or start the grid anew"
        )
    return grid


def run_grid(planned: Planned, out: str, **options: Any) -> int:
    """Executes runs, as `combinations` gives them; see `execute_grid`."""
    return execute_grid(new_grid(planned), out, **options)


def resume_grid(manifest: str, **options: Any) -> int:
    """Goes on with the grid of a manifest, `<out>/grid.json`; see `execute_grid`."""
    out = manifest.rpartition("/")[0] or "."
    return execute_grid(read_grid(f"{out}/{MANIFEST}"), out, **options)


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
        raise ValueError(f"workers={workers}: expected 1 or more of this machine, or a cluster")
    fs, root = writable_storage(out)
    done = {name: job for name, job in ended_runs(fs, root).items() if job.status == "finished"}
    waiting = [job for job in grid.jobs if job.folder not in done]
    workers = workers or max(1, (cpu_count() or 1) // 2)
    at_once = 1 if cluster else workers
    _say(f"{len(grid.jobs):,} runs, {len(grid.jobs) - len(waiting):,} of them finished before")
    if waiting:
        foretold = _forecast(waiting, list(done.values()), grid.notebooks, at_once)
        _say(f"{len(waiting):,} to do, on {'each worker' if cluster else workers}: {foretold}")
    if len(waiting) > MANY and not yes:
        raise ValueError(f"{len(waiting):,} runs are more than {MANY:,}: start them with --yes")
    for name, source in grid.notebooks.items():
        write_bytes(fs, f"{root}/notebooks/{name}", source.encode())
    told = grid.model_dump_json(indent=1, exclude={"notebooks"})
    write_bytes(fs, f"{root}/{MANIFEST}", told.encode())
    if waiting:
        with _client(cluster, workers) as client:
            check_workers(client)
            if not _execute(client, grid, waiting, out, timeout):
                _say(f"stopped; to take it up again: flowhelpers run --resume {out}/{MANIFEST}")
                return STOPPED
    table = write_table(out, grid.jobs)
    _say(f"table and page: {out}/grid.csv, {out}/grid.html")
    return int((table["status"] != "finished").any())


def _execute(client: Any, grid: Grid, waiting: list[Job], out: str, timeout: int | None) -> bool:
    """Has the workers execute runs; whether they came to an end, for a scheduler may be lost."""
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    mark = uuid.uuid4().hex  # what a scheduler remembers of an earlier time is of no use
    sources = {
        name: client.submit(str, source, key=f"{name}-{mark}")  # sent once to each worker
        for name, source in grid.notebooks.items()
    }
    where = out if "://" in out else str(Path(out).resolve())
    options = (where, str(grid.working_folder), timeout, grid.version)
    futures = {
        client.submit(execute_task, sources[str(job.notebook)], job.model_dump_json(), *options,
                      key=f"{job.folder}-{mark}", pure=False): job
        for job in waiting
    }  # fmt: skip
    began, total = time.monotonic(), len(waiting)
    try:
        for number, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            if future.status in ("cancelled", "lost"):
                _say("the scheduler is gone")
                return False
            try:
                ended = Job.model_validate_json(future.result())
            except KilledWorker as error:  # time and again
                ended = job.model_copy(update={"status": "failed", "error": str(error)})
            left = (time.monotonic() - began) / number * (total - number)
            reason = f": {ended.error.splitlines()[0]}" if ended.error else ""
            _say(f"[{number}/{total}] {job.folder} {ended.status} after"
                 f" {duration(ended.seconds or 0)}{reason}; {duration(left)} left")  # fmt: skip
    except KeyboardInterrupt:
        return False
    finally:
        with suppress(Exception):
            client.cancel(list(futures))
    return True


def _forecast(waiting: list[Job], done: list[Job], sources: Mapping[str, str], workers: int) -> str:
    """How long runs will take, and by what that is told."""
    total, by = 0.0, set()
    for name, source in sources.items():
        seconds = [job.seconds or 0 for job in done if job.notebook.name == name]
        stated = [STATED[words] for words in re.findall(SAYS, source)]
        if not (seconds or stated):
            return f"{name} states no time: the first that finish will tell"
        by.add("finished runs" if seconds else "the notebooks' own times, on two cores")
        count = sum(job.notebook.name == name for job in waiting)
        total += count * mean(seconds or stated)
    return f"about {duration(total / workers)} by {' and '.join(sorted(by))}"


@contextmanager
def _client(cluster: str | None, workers: int) -> Iterator[Any]:
    """A client of the scheduler at an address, or of one on this machine with its own workers."""
    try:
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise ValueError("a grid needs Dask: pip install 'flowhelpers[cluster]'") from error
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # we say it ourselves
    if cluster:
        try:
            client = Client(cluster, timeout="10s")
        except (OSError, ValueError) as error:
            raise OSError(f"no Dask scheduler answers at {cluster}: {error}") from error
        with client:
            _say(f"{client.dashboard_link} shows what {cluster} does")
            yield client
        return
    threads = max(1, (cpu_count() or 1) // workers)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = dict.fromkeys(names, threads) | {"TQDM_DISABLE": 1}
    options: dict[str, Any] = {"n_workers": workers, "threads_per_worker": 1, "env": env}
    options["dashboard_address"] = None
    with LocalCluster(**options) as local, Client(local) as client:
        yield client


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
