"""A run of a grid, as a worker of Dask executes it."""

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from flowhelpers.core.files import write_text
from flowhelpers.core.storage import open_storage, put_folder
from flowhelpers.core.versions import check_workers
from flowhelpers.runs.execute import Job, execute_one

MARKER = "job.json"
ONE_NOTEBOOK = threading.Lock()  # at a time in a worker: a run's folder is told by the environment


def execute_task(
    source: str, told: str, out: str, working_folder: str, timeout: int | None, version: str
) -> str:
    """Executes a run in a folder of this worker and puts it into `out`; returns its job as JSON.

    A notebook that fails is an outcome like another. An OSError if `out` cannot be written to.
    """
    check_workers(expected=version)
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
        there = Path(working_folder)
        local = job.model_copy(update={"notebook": notebook})
        cwd = there if there.is_dir() else here
        job.error = execute_one(local, here, cwd, timeout, ({}, "../grid.html"))
        job.status = "failed" if job.error else "finished"
        job.seconds = time.monotonic() - began
        write_text(folder / MARKER, job.model_dump_json(indent=2))
        put_folder(folder, fs, f"{root}/{job.folder}", MARKER)
    return job.model_dump_json()


def _scratch() -> str | None:
    """The folder that Dask gives a worker, and clears after one that died."""
    from distributed import get_worker

    try:
        return get_worker().local_directory
    except ValueError:
        return None


def ended_runs(fs: Any, root: str, folder: str = "*") -> dict[str, Job]:
    """The runs that came to an end, by their folders."""
    markers = fs.glob(f"{root}/{folder}/{MARKER}")
    found = fs.cat(markers) if markers else {}
    jobs = [Job.model_validate_json(text) for text in found.values()]
    return {str(job.folder): job for job in jobs}
