"""Notebooks executed one by one, each in its run's folder, and taken up again when stopped.

An execution has a manifest, `<out>/<time>.json`, written before the first notebook starts and after
each change, and beside it a page, `<out>/<time>.html`, that leads to everything made. A notebook
that fails does not keep the others from running. What was stopped is taken up from the manifest:
finished notebooks are left alone, the others run again in the folders they had.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import papermill
from filelock import FileLock, Timeout
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError, strip_color
from papermill.iorw import LocalHandler, papermill_io

from flowhelpers.core.files import new_folder, read_json, writable_folder, write_json, write_text
from flowhelpers.runs.pages import duration, index_page, link_pages, notebook_page
from flowhelpers.runs.run import RUN_DIR, folder_name

STOPPED = 130  # the exit status of a program that Ctrl-C stopped
TRACEBACK_LINES = 15


@dataclass(frozen=True)
class Job:
    """One notebook of an execution, and how it fared."""

    notebook: str
    parameters: dict[str, Any] = field(default_factory=dict)
    status: str = "waiting"  # then running, and finished, failed or stopped
    folder: str | None = None  # the name of its run's folder, once it has one
    seconds: float | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """The notebook's name."""
        return Path(self.notebook).stem


@dataclass(frozen=True)
class Manifest:
    """An execution of notebooks: what was asked for, where, and how far it has come."""

    path: Path
    started: str
    working_folder: str
    name: str | None
    jobs: tuple[Job, ...]

    @property
    def unfinished(self) -> bool:
        """Whether any notebook is yet to finish; a failed one may, once its cause is mended."""
        return any(job.status != "finished" for job in self.jobs)

    def update(self, index: int, **changes: Any) -> "Manifest":
        """The manifest with one job changed, saved."""
        job = replace(self.jobs[index], **changes)
        changed = replace(self, jobs=(*self.jobs[:index], job, *self.jobs[index + 1 :]))
        changed.save()
        return changed

    def save(self) -> None:
        """Writes the manifest and its page."""
        content = asdict(self)
        del content["path"]
        write_json(self.path, content)
        finished = sum(job.status == "finished" for job in self.jobs)
        summary = f"{finished} of {len(self.jobs)} notebooks finished · started {self.started}"
        entries = [asdict(job) | {"name": job.name} for job in self.jobs]
        index_page(self.path.with_suffix(".html"), summary, entries)


def run_notebooks(
    planned: Mapping[Path, dict[str, Any]],
    out: Path,
    *,
    name: str | None = None,
    timeout: int | None = None,
) -> int:
    """Executes notebooks, as `plan` gives them, each in a folder of its own below `out`.

    Args:
        planned: The notebooks and the parameters to override in each.
        out: Where the folders, the manifest and the index page go.
        name: A word to tell this run's folders from others.
        timeout: Seconds that a cell may take; no end unless given.

    Returns:
        The exit status: 0, 1 if a notebook failed, 130 if stopped.
    """
    jobs = tuple(Job(str(notebook), values) for notebook, values in planned.items())
    with _new_manifest(writable_folder(out)) as path:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        manifest = Manifest(path, started, str(Path.cwd()), name, jobs)
        manifest.save()
        return _execute(manifest, timeout)


def resume(out: Path, path: Path | None = None, *, timeout: int | None = None) -> int:
    """Takes an execution up again: that of a manifest, or the latest unfinished one in `out`.

    Returns:
        The exit status, as of `run_notebooks`.

    Raises:
        FileNotFoundError: If there is none to take up.
    """
    latest = sorted(out.glob("*.json"), key=lambda file: file.stem, reverse=True)
    for candidate in [path.resolve()] if path else latest:
        with _lock(candidate) as free:
            try:
                manifest = load_manifest(candidate.resolve()) if free else None
            except ValueError:
                if path:
                    raise
                continue  # another file that happens to lie there
            if manifest and manifest.unfinished:
                return _execute(manifest, timeout)
    raise FileNotFoundError(f"{path or out}: nothing to take up, all is finished or still running")


def load_manifest(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        ValueError: If the file is not a manifest.
    """
    try:
        content = read_json(path)
        jobs = tuple(Job(**job) for job in content.pop("jobs"))
        return Manifest(path=path, jobs=jobs, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the manifest of a run") from error


def _execute(manifest: Manifest, timeout: int | None) -> int:
    out, total = manifest.path.parent, len(manifest.jobs)
    papermill_io.register(str(out), _WholeFiles())
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it cannot read all of our types
    # A process started in the background inherits that Ctrl-C is ignored: here it stops the run.
    stops = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(stop, signal.default_int_handler) for stop in stops]
    try:
        for index, job in enumerate(manifest.jobs):
            if job.status == "finished":
                continue
            name = job.folder or new_folder(out, folder_name(job.name, manifest.name)).name
            manifest = manifest.update(index, status="running", folder=name, error=None)
            _say(f"[{index + 1}/{total}] {job.name}: {out / name}")
            began = time.monotonic()
            try:
                error = _execute_one(job, out / name, manifest.working_folder, timeout)
            except KeyboardInterrupt:
                manifest.update(index, status="stopped", seconds=time.monotonic() - began)
                _say(f"stopped; to take it up again: flowhelpers run --resume {manifest.path}")
                return STOPPED
            status, seconds = "failed" if error else "finished", time.monotonic() - began
            manifest = manifest.update(index, status=status, seconds=seconds, error=error)
            reason = ": " + error.splitlines()[0] if error else ""
            _say(f"[{index + 1}/{total}] {status} after {duration(seconds)}{reason}")
    finally:
        for stop, handler in zip(stops, before, strict=True):
            signal.signal(stop, handler)
        pages = {
            job.name: out / job.folder / "notebook.html" for job in manifest.jobs if job.folder
        }
        link_pages({name: page for name, page in pages.items() if page.is_file()})
    _say(f"index: {manifest.path.with_suffix('.html')}")
    return 1 if manifest.unfinished else 0


def _execute_one(job: Job, folder: Path, working_folder: str, timeout: int | None) -> str | None:
    """Executes a notebook and writes its page; returns what went wrong, if anything did."""
    notebook, errors = folder / "notebook.ipynb", []
    bar: Any = {"desc": job.name, "leave": False}
    os.environ[RUN_DIR] = str(folder)
    try:
        papermill.execute_notebook(
            job.notebook,
            str(notebook),
            parameters=job.parameters,
            kernel_name="python3",
            kernel_manager_class=_ThisPython,
            language="python",
            progress_bar=bar,
            cwd=working_folder,
            start_timeout=180,
            execution_timeout=timeout,
            coalesce_streams=True,
        )
    except PapermillExecutionError as error:
        lines = strip_color("\n".join(error.traceback)).splitlines()[-TRACEBACK_LINES:]
        errors += [f"{error.ename}: {error.evalue}", *lines]
    except Exception as error:  # whatever it was, the other notebooks are to run
        errors.append(f"{type(error).__name__}: {error}")
    finally:
        del os.environ[RUN_DIR]
    try:
        notebook_page(notebook)
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
def _new_manifest(out: Path) -> Iterator[Path]:
    """The path of a manifest that is nobody else's, held until the execution ends."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in count(1):
        path = out / f"{stamp}{f'-{number}' if number > 1 else ''}.json"
        with _lock(path) as free:
            if free and not path.exists():
                yield path
                return


@contextmanager
def _lock(manifest: Path) -> Iterator[bool]:
    """Holds a manifest against other processes; False if one of them has it."""
    file = manifest.with_name(f".{manifest.stem}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # where an open file cannot be removed, it stays
            file.unlink()
        lock.release()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
