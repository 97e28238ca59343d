"""A Hugging Face hub on the loopback interface: the true API over a folder of small files.

`<root>/models/<owner>/<name>/...` and `<root>/datasets/<owner>/<name>/...` are served as the
repositories `<owner>/<name>`, each with one revision, `main`. The hub writes down every request and
can be told to refuse, or to break off in the middle of a file.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from loopback import LoopbackServer, QuietHandler

REPOSITORY = Path(__file__).parent.parent
# What the hub's default .gitattributes keeps as LFS, of the kinds that the tests write.
LFS = {".safetensors", ".npz", ".parquet", ".bin", ".pt", ".gz"}
LFS_SIZE = 10_000_000


@dataclass(frozen=True)
class Request:
    """One request that reached the hub."""

    method: str
    path: str
    range: str | None = None


@dataclass
class Fault:
    """What goes wrong at paths that begin with `prefix`, and how many times more (None: always)."""

    prefix: str
    times: int | None
    status: int | None = None
    keep: int | None = None
    declared: bool = False


class Hub(LoopbackServer):
    """The server: `with Hub(root) as hub`, then `hub.address`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._digests: dict[tuple[Path, int, int], tuple[str, str]] = {}

    def reset(self) -> None:
        """Forget the requests and the faults."""
        with self._lock:
            self.requests.clear()
            self._faults.clear()

    def fail(self, prefix: str, status: int, times: int | None = 1) -> None:
        """Answer requests for paths that begin with `prefix` with an error."""
        self._faults.append(Fault(prefix, times, status=status))

    def truncate(
        self, prefix: str, keep: int, times: int | None = 1, declared: bool = False
    ) -> None:
        """Send only the first `keep` bytes of files whose paths begin with `prefix`.

        The connection breaks, as on a bad line; or, `declared`, the answer is whole and says that
        it has `keep` bytes, as from a proxy that cuts.
        """
        self._faults.append(Fault(prefix, times, keep=keep, declared=declared))

    def fetched(self, part: str = "", method: str = "GET") -> list[str]:
        """Paths asked for by this method that hold `part`, in order."""
        return [r.path for r in self.requests if r.method == method and part in r.path]

    def commit(self, kind: str, name: str) -> str:
        """The commit hash of a repository: `kind` is `models` or `datasets`."""
        files = [f"{file['path']} {file['oid']}" for file in self.tree(kind, name, "", True)]
        return hashlib.sha1("\n".join(files).encode()).hexdigest()

    def tree(self, kind: str, name: str, path: str, recursive: bool) -> list[dict[str, Any]]:
        """What the tree API lists below a path."""
        folder = self.root / kind / name
        found = (folder / path).rglob("*") if recursive else (folder / path).iterdir()
        return [self.entry(folder, item) for item in sorted(found)]

    def entry(self, folder: Path, item: Path) -> dict[str, Any]:
        """A file or folder as the API describes it."""
        path = item.relative_to(folder).as_posix()
        if item.is_dir():
            oid = hashlib.sha1(path.encode()).hexdigest()
            return {"type": "directory", "path": path, "oid": oid, "size": 0}
        size = item.stat().st_size
        git, sha256 = self.digests(item)
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": git, "size": size}
        if is_lfs(item):
            entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
        return entry

    def digests(self, file: Path) -> tuple[str, str]:
        """The git blob hash and the SHA-256 of a file."""
        key = (file, file.stat().st_mtime_ns, file.stat().st_size)
        if key not in self._digests:
            data = file.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self._digests[key] = git, hashlib.sha256(data).hexdigest()
        return self._digests[key]

    def take_fault(self, path: str, is_body: bool) -> Fault | None:
        """The first fault that applies, counted as used."""
        with self._lock:
            for fault in self._faults:
                applies = path.startswith(fault.prefix) and (fault.status or is_body)
                if applies and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process whose hub is this one and whose caches are in `home`."""
        kept = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|TRANSFORMERS_", k)}
        return kept | {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }

    def use_in_process(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this the hub of the running process, until the test ends.

        The libraries read the environment once, at import: their copies are replaced one by one.
        """
        import datasets
        import transformers.utils.hub
        from huggingface_hub import HfFileSystem, constants, hf_api

        cache = str(home / "hub")
        template = self.address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": self.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": cache,
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name, value in {
            "HF_ENDPOINT": self.address,
            "HF_DATASETS_CACHE": home / "datasets",
            "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
            "HF_HUB_OFFLINE": False,
            "USE_PARQUET_EXPORT": False,  # asks another host, datasets-server.<endpoint>
            "STREAMING_READ_RETRY_INTERVAL": 0,
            "SLEEP_TIME_ON_THREADS_SHUTDOWN": 0,  # five seconds at the end of every stream
        }.items():
            monkeypatch.setattr(datasets.config, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.address)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        HfFileSystem.clear_instance_cache()


@dataclass
class Process:
    """Runs Python in processes of its own, whose hub is the loopback hub."""

    environment: dict[str, str] = field(repr=False)

    def __call__(self, code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run `code`, with these environment variables besides; the caller looks at the result."""
        return subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )


def is_lfs(file: Path) -> bool:
    """Whether the hub would keep the file as LFS, with its SHA-256 as ETag."""
    return file.suffix in LFS or file.stat().st_size > LFS_SIZE


class _Handler(QuietHandler):
    owner: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.owner.requests.append(Request(self.command, path, self.headers.get("Range")))
        fault = self.owner.take_fault(path, "/resolve" in path and self.command == "GET")
        if fault and fault.status:
            return self._error(fault.status, None, HTTPStatus(fault.status).phrase)
        match [unquote(part) for part in url.path.strip("/").split("/")]:
            case ["api", "models" | "datasets" as kind, owner, name]:
                self._info(kind, f"{owner}/{name}", "main")
            case ["api", "models" | "datasets" as kind, owner, name, "revision", rev]:
                self._info(kind, f"{owner}/{name}", rev)
            case ["api", "models" | "datasets" as kind, owner, name, "tree", rev, *rest]:
                recursive = "recursive=true" in url.query.lower()
                self._tree(kind, f"{owner}/{name}", rev, "/".join(rest), recursive)
            case ["datasets", owner, name, "resolve", rev, *rest]:
                self._file("datasets", f"{owner}/{name}", rev, "/".join(rest), fault)
            case [owner, name, "resolve", rev, *rest]:
                self._file("models", f"{owner}/{name}", rev, "/".join(rest), fault)
            case _:
                self._error(404, None, "Not Found")

    do_HEAD = do_GET

    def _commit(self, kind: str, name: str, revision: str) -> str | None:
        """The commit that a revision means; None once an error has been sent."""
        if not (self.owner.root / kind / name).is_dir():
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        commit = self.owner.commit(kind, name)
        if revision != "main" and not (len(revision) > 6 and commit.startswith(revision)):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit

    def _info(self, kind: str, name: str, revision: str) -> None:
        if commit := self._commit(kind, name, revision):
            files = self.owner.tree(kind, name, "", True)
            self._json(
                {
                    "id": name,
                    "sha": commit,
                    "private": False,
                    "gated": False,
                    "tags": [],
                    "siblings": [{"rfilename": f["path"]} for f in files if f["type"] == "file"],
                }
                | ({"modelId": name} if kind == "models" else {})
            )

    def _tree(self, kind: str, name: str, revision: str, path: str, recursive: bool) -> None:
        if commit := self._commit(kind, name, revision):
            if not (self.owner.root / kind / name / path).is_dir():
                return self._error(404, "EntryNotFound", f"{path} does not exist", commit)
            self._json(self.owner.tree(kind, name, path, recursive))

    def _file(self, kind: str, name: str, revision: str, path: str, fault: Fault | None) -> None:
        commit = self._commit(kind, name, revision)
        if not commit:
            return
        file = self.owner.root / kind / name / path
        if not file.is_file():
            return self._error(404, "EntryNotFound", "Entry not found", commit)
        data = file.read_bytes()
        git, sha256 = self.owner.digests(file)
        headers = {"ETag": f'"{git}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_lfs(file):
            headers |= {"ETag": f'"{sha256}"', "X-Linked-Etag": f'"{sha256}"'}
            headers |= {"X-Linked-Size": str(len(data))}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        self._send(status, data, headers, fault)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, code: str | None, message: str, commit: str | None = None
    ) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {name: value for name, value in headers.items() if value})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None
    ) -> None:
        sent = body if fault is None else body[: fault.keep]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(sent if fault and fault.declared else body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if len(sent) < len(body) and not (fault and fault.declared):
            self.close_connection = True


Hub.handler = _Handler
