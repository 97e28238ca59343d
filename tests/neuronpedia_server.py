"""Neuronpedia and its public export on the loopback interface, in their true forms, misbehaving.

The export is gzip files of JSON lines below `/v1`; a file that is not there is 403, as S3 answers.
The site is `/api/feature` and `/api/cossim`. Misbehaviour is told for paths that end in a word, as
a list of faults: one a request, in their order.
"""

import gzip
import json
from dataclasses import dataclass, field
from functools import cache
from ssl import SSLContext, create_default_context
from typing import Any

import pytest
from loopback import LoopbackServer, QuietHandler

MODEL, SOURCE = "gemma-2-2b", "12-gemmascope-res-16k"
MINI, OPUS = "gpt-4o-mini", "claude-opus"


@cache
def certificates(**options: Any) -> SSLContext:
    """Those of this machine, read once."""
    return create_default_context()


def be_quick(patch: pytest.MonkeyPatch) -> None:
    """Short pauses between tries, no key about, and the certificates read once."""
    from flowhelpers.labels import neuronpedia

    patch.setattr(neuronpedia, "PAUSE", 0.005)
    patch.delenv("NEURONPEDIA_API_KEY", raising=False)
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr("httpx2._transports.default.create_ssl_context", certificates)


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Attributes:
        status: The HTTP status instead of 200.
        headers: More headers.
        body: The body instead of the true one; `{key}` becomes the key that was sent.
        keep: Bytes of the body after which the connection is cut; -1: not even a status line.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    keep: int | None = None


@dataclass(frozen=True)
class Asked:
    """One request: its method, path, the key and the body that were sent."""

    method: str
    path: str
    key: str | None
    body: Any


def row(index: Any, description: Any, who: str | None = MINI, **more: Any) -> dict[str, Any]:
    """A line of the export; `more` adds fields and replaces them."""
    given = {
        "id": f"cm{index}",
        "modelId": MODEL,
        "layer": SOURCE,
        "index": index,
        "description": description,
        "embedding": "[" + ",".join(f"{(7 * k) % 11 / 13:.6f}" for k in range(64)) + "]",
        "typeName": "oai_token-act-pair",
        "explanationModelName": who,
    }
    return given | more


def packed(*lines: Any) -> bytes:
    """Lines as a file of the export; bytes stay as they are."""
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return gzip.compress(b"\n".join(texts) + b"\n")


class NeuronpediaServer(LoopbackServer):
    """The server: `with NeuronpediaServer() as server`, then `server.datasets` and `server.api`.

    Attributes:
        batches: The files of the export, by number.
        others: Those of other sources, by `model/source`.
        missing: The status of one that is not there.
        features: What the site knows, by path below `/api/feature`.
        cosines: What it answers when asked for neighbours; a function is given what was asked.
        key: The only key that it takes; None for any, and for none.
        requests: What reached it, in order.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As at first."""
        self.batches: dict[int, bytes] = {}
        self.others: dict[str, dict[int, bytes]] = {}
        self.missing = 403
        self.features: dict[str, Any] = {}
        self.cosines: Any = None
        self.key: str | None = None
        self.requests: list[Asked] = []
        self.faults: dict[str, list[Fault]] = {}

    @property
    def api(self) -> str:
        """The address of the site."""
        return self.address

    @property
    def datasets(self) -> str:
        """The address of the export."""
        return f"{self.address}/v1"

    def misbehave(self, end: str, *faults: Fault) -> None:
        """The next requests for paths that end so meet these faults, one each."""
        self.faults.setdefault(end, []).extend(faults)

    def fault(self, path: str) -> Fault:
        """The fault that a request meets."""
        for end, faults in self.faults.items():
            if path.endswith(end) and faults:
                return faults.pop(0)
        return Fault()

    def asked(self, number: int) -> int:
        """How often a batch was asked for."""
        return sum(each.path.endswith(f"/batch-{number}.jsonl.gz") for each in self.requests)

    def answer(self, asked: Asked) -> tuple[int, bytes]:
        """The true answer."""
        if asked.path.startswith("/v1/"):
            start, _, end = asked.path.partition("/explanations/batch-")
            number = int(end.removesuffix(".jsonl.gz"))
            sources = {f"{MODEL}/{SOURCE}": self.batches} | self.others
            batches = sources.get(start.removeprefix("/v1/"), {})
            if number in batches:
                return 200, batches[number]
            return self.missing, b"<Error><Code>AccessDenied</Code></Error>"
        if self.key is not None and asked.key != self.key:
            return 401, json.dumps({"message": f"Invalid API key {asked.key}"}).encode()
        if asked.method == "POST" and asked.path == "/api/cossim":
            found = self.cosines(asked.body) if callable(self.cosines) else self.cosines
            return 200, json.dumps(found).encode()
        name = asked.path.removeprefix("/api/feature/")
        if name in self.features:
            return 200, json.dumps(self.features[name]).encode()
        return 404, b'{"message": "Not found"}'


class _Handler(QuietHandler):
    owner: NeuronpediaServer

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the other side did not wait
            self.close_connection = True

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        asked = Asked(self.command, self.path, self.headers.get("x-api-key"), body)
        self.owner.requests.append(asked)
        fault = self.owner.fault(self.path)
        status, whole = self.owner.answer(asked)
        if fault.status != 200:
            status, whole = fault.status, b"out of order"
        if fault.body is not None:
            whole = fault.body.replace(b"{key}", (asked.key or "").encode())
        if fault.keep is not None:
            self.close_connection = True
        if fault.keep == -1:
            return
        self.send_response(status)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[: fault.keep])

    do_POST = do_GET


NeuronpediaServer.handler = _Handler
