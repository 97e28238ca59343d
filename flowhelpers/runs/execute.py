"""Notebooks executed one by one, each in its run's folder, and taken up again when stopped.

An execution has a manifest, `<out>/<time>.json`, written before the first notebook starts and after
each change, and beside it a page, `<out>/<time>.html`, that leads to everything made. What was
stopped is taken up from the manifest: finished notebooks are left alone, the others run again in
the folders they had.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import papermill
from filelock import FileLock, Timeout
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError, strip_color
from papermill.iorw import LocalHandler, papermill_io
from pydantic import BaseModel, ValidationError

from flowhelpers.core.files import new_folder, writable_folder, write_text
from flowhelpers.runs.pages import duration, index_page, notebook_page
from flowhelpers.runs.run import RUN_DIR, folder_name

STOPPED = 130  # the exit status of a program that Ctrl-C stopped
TRACEBACK_LINES = 15


class Job(BaseModel):
    """One notebook of an execution, and how it fared."""

    notebook: Path
    parameters: dict[str, Any]
    status: str = "waiting"  # then running, and finished, failed or stopped
    folder: str | None = None  # the name of its run's folder, made once it is not waiting
    seconds: float | None = None
    error: str | None = None


class Manifest(BaseModel):
    """An execution of notebooks: what was asked for, and how far it has come."""

    started: str
    working_folder: Path
    name: str | None
    jobs: list[Job]

    @property
    def unfinished(self) -> bool:
        """Whether any notebook is yet to finish; a failed one may, once its cause is mended."""
        return any(job.status != "finished" for job in self.jobs)

    def save(self, path: Path) -> None:
        """Writes the manifest and its page."""
        write_text(path, self.model_dump_json(indent=2))
        finished = sum(job.status == "finished" for job in self.jobs)
        summary = f"{finished} of {len(self.jobs)} notebooks finished · started {self.started}"
        entries = [job.model_dump() | {"name": job.notebook.stem} for job in self.jobs]
        index_page(path.with_suffix(".html"), summary, entries)


def run_notebooks(
    planned: Mapping[Path, dict[str, Any]],
    out: Path,
    *,
    name: str | None = None,
    timeout: int | None = None,
) -> int:
    """Executes notebooks, as `plan` gives them, each in a folder of its own below `out`.

    One that fails does not keep the others from running. `name` tells this run's folders from
    others; a cell may take `timeout` seconds, without end unless given.

    Returns:
        The exit status: 0, 1 if a notebook failed, 130 if stopped.
    """
    jobs = [Job(notebook=notebook, parameters=given) for notebook, given in planned.items()]
    now = datetime.now()
    manifest = Manifest(started=str(now)[:19], working_folder=Path.cwd(), name=name, jobs=jobs)
    path = writable_folder(out) / f"{now:%Y%m%d-%H%M%S-%f}.json"
    with _lock(path):
        return _execute(manifest, path, timeout)


def resume(out: Path, path: Path | None = None, *, timeout: int | None = None) -> int:
    """Takes an execution up again: that of a manifest, or the latest unfinished one in `out`.

    Returns the exit status, as `run_notebooks` does; a FileNotFoundError if none is to take up.
    """
    for candidate in [path] if path else sorted(out.glob("*.json"), reverse=True):
        with suppress(Timeout), _lock(candidate):
            try:
                manifest = Manifest.model_validate_json(candidate.read_bytes())
            except ValidationError as error:
                if path:
                    raise ValueError(f"{path} is not the manifest of a run") from error
                continue  # another file that happens to lie there
            if manifest.unfinished:
                return _execute(manifest, candidate.resolve(), timeout)
    told = f"{path or out}: nothing to take up, all is finished or still running"
    if not path and (grid := out / "grid.json").exists():
        told += f"; its grid by its name: --resume {grid}"
    raise FileNotFoundError(told)


def _execute(manifest: Manifest, path: Path, timeout: int | None) -> int:
    out, total = path.parent, len(manifest.jobs)
    papermill_io.register(str(out), _WholeFiles())
    for job in manifest.jobs:  # named at once, so that their pages can lead to each other
        job.folder = job.folder or folder_name(job.notebook.stem, manifest.name)
    pages = {job.notebook.stem: f"../{job.folder}/notebook.html" for job in manifest.jobs}
    links = pages, f"../{path.stem}.html"
    # A process started in the background inherits that Ctrl-C is ignored: here it stops the run.
    stops = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(stop, signal.default_int_handler) for stop in stops]
    try:
        for number, job in enumerate(manifest.jobs, 1):
            if job.status == "finished":
                continue
            stem, began = job.notebook.stem, time.monotonic()
            if job.status == "waiting":
                job.folder = new_folder(out, str(job.folder)).name
            job.status, job.error = "running", None
            manifest.save(path)
            say(f"[{number}/{total}] {stem}: {out / str(job.folder)}")
            try:
                job.error = execute_one(job, out, manifest.working_folder, timeout, links)
                job.status = "failed" if job.error else "finished"
            except KeyboardInterrupt:
                job.status = "stopped"
                say(f"stopped; to take it up again: flowhelpers run --resume {path}")
                return STOPPED
            finally:
                job.seconds = time.monotonic() - began
                manifest.save(path)
            reason = ": " + job.error.splitlines()[0] if job.error else ""
            say(f"[{number}/{total}] {job.status} after {duration(job.seconds)}{reason}")
    finally:
        for stop, handler in zip(stops, before, strict=True):
            signal.signal(stop, handler)
    say(f"index: {path.with_suffix('.html')}")
    return 1 if manifest.unfinished else 0


def execute_one(
    job: Job,
    out: Path,
    working_folder: Path,
    timeout: int | None,
    links: tuple[dict[str, str], str],
) -> str | None:
    """Executes a notebook and writes its page; returns what went wrong, if anything did."""
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it cannot read all of our types
    folder, errors = out / str(job.folder), []
    os.environ[RUN_DIR] = str(folder)
    progress = {"desc": job.notebook.stem, "leave": False}
    options: Any = {"kernel_name": "python3", "language": "python", "start_timeout": 180}
    options |= {"kernel_manager_class": _ThisPython, "progress_bar": progress}
    options |= {"execution_timeout": timeout, "coalesce_streams": True, "cwd": working_folder}
    notebook = folder / "notebook.ipynb"
    try:
        papermill.execute_notebook(job.notebook, notebook, job.parameters, **options)
    except PapermillExecutionError as error:
        lines = strip_color("\n".join(error.traceback)).splitlines()[-TRACEBACK_LINES:]
        errors += [f"{error.ename}: {error.evalue}", *lines]
    except Exception as error:  # whatever it was, the other notebooks are to run
        errors.append(f"{type(error).__name__}: {error}")
    finally:
        del os.environ[RUN_DIR]
    try:
        notebook_page(notebook, *links)
    except Exception as error:
        errors.append(f"no notebook.html, for {type(error).__name__}: {error}")
    return "\n".join(errors) or None


class _ThisPython(AsyncKernelManager):
    """Starts the very Python that runs this, whatever kernels are registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        # the kernel's own log would break into the progress bar; cells report by other means
        return KernelSpec(**get_kernel_dict(extra_arguments=["--log-level=CRITICAL"]))


class _WholeFiles(LocalHandler):
    """Papermill's files, whole or not at all."""

    def write(self, buf: str, path: str) -> None:
        write_text(Path(path), buf)


@contextmanager
def _lock(manifest: Path) -> Iterator[None]:
    """Holds a manifest against other processes; a Timeout if one of them has it."""
    file = manifest.with_name(f".{manifest.stem}.lock")
    with FileLock(file, timeout=0):
        try:
            yield
        finally:
            with suppress(OSError):  # where an open file cannot be removed, it stays
                file.unlink()


def say(line: str) -> None:
    """Tells it at once, apart from what is printed as a result."""
    print(line, file=sys.stderr, flush=True)
