"""Folders of this machine and of object stores alike, by their fsspec addresses."""

import uuid
from contextlib import suppress
from glob import has_magic
from os import rename
from pathlib import Path
from typing import Any

from flowhelpers.core.files import write_whole


def open_storage(out: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(out)
    except ImportError as error:
        raise ValueError(f"{out}: {error}") from error


def writable_storage(out: str) -> tuple[Any, str]:
    """As `open_storage`; an OSError if nothing can be written there."""
    fs, root = open_storage(out)
    if has_magic(root):  # fsspec takes it for a pattern
        raise ValueError(f"{out}: expected a folder without any of * ? [ in its name")
    probe = f"{root}/.{uuid.uuid4().hex}"
    try:
        write_bytes(fs, probe, b"a word")
        fs.rm(probe)
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error}") from error
    return fs, root


def write_bytes(fs: Any, path: str, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    if _is_local(fs):
        write_whole(Path(path), lambda file: file.write_bytes(data))
    else:
        fs.pipe_file(path, data)


def _is_local(fs: Any) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def put_folder(folder: Path, fs: Any, target: str, last: str) -> None:
    """Puts a folder into its place, whole or not at all; in place of another that is there.

    On an object store its file `last` comes last: a folder without it is not whole.
    """
    root, name = target.rsplit("/", 1)
    partial = f"{root}/.{name}.{uuid.uuid4().hex}.partial" if _is_local(fs) else target
    try:
        if _is_local(fs):
            fs.put(str(folder), partial, recursive=True)
        if fs.exists(target):
            fs.rm(target, recursive=True)
        if _is_local(fs):
            rename(partial, target)
        else:
            marker = (folder / last).read_bytes()
            (folder / last).unlink()
            fs.put(str(folder), target, recursive=True)
            fs.pipe_file(f"{target}/{last}", marker)
    except BaseException as error:
        with suppress(Exception):
            fs.rm(partial, recursive=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {target}, nothing of it is left: {error}") from error
        raise
