"""Neuronpedia and its public export on the loopback interface, in their true forms, misbehaving.

The export is gzip files of JSON lines below `/v1`; a file that is not there is 403, as S3 answers.
The site is `/api/cossim`. Faults are given for paths that end in a word, one a
request.
"""

import gzip
import json
from dataclasses import dataclass, field
from typing import Any

from loopback import LoopbackServer, QuietHandler

MODEL = "toy-model"
MINI, OPUS = "gpt-4o-mini", "claude-opus"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # `{key}` becomes the key that was sent
    keep: int | None = None  # bytes after which the connection is cut; -1: not even a status line


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    key: str | None
    body: Any


def row(index: Any, description: Any, source: str, who: str | None = MINI) -> dict[str, Any]:
    """A line of the export."""
    given = {"id": f"cm{index}", "modelId": MODEL, "layer": source, "index": index}
    return given | {"description": description, "explanationModelName": who, "embedding": "[0.5]"}


def packed(*lines: Any) -> bytes:
    """Lines as a file of the export."""
    texts = [json.dumps(line, ensure_ascii=False).encode() for line in lines]
    return gzip.compress(b"\n".join(texts) + b"\n")


class NeuronpediaServer(LoopbackServer):
    """The server: `with NeuronpediaServer() as server`, then `server.address`."""

    def __init__(self) -> None:
        self.batches: dict[str, list[bytes]] = {}  # files of the export, by source
        self.cosines: Any = None  # the neighbours, a function of what was asked
        self.requests: list[Asked] = []
        self.faults: dict[str, list[Fault]] = {}  # one a request, by the end of a path

    def answer(self, asked: Asked) -> tuple[int, bytes]:
        """The true answer."""
        if asked.path.startswith("/v1/"):
            start, _, end = asked.path.partition("/explanations/batch-")
            batches = self.batches.get(start.removeprefix(f"/v1/{MODEL}/"), [])
            there = dict(enumerate(batches)).get(int(end.removesuffix(".jsonl.gz")))
            return (200, there) if there is not None else (403, b"<Error>AccessDenied</Error>")
        return 200, json.dumps(self.cosines(asked.body)).encode()


class _Handler(QuietHandler):
    owner: NeuronpediaServer

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        asked = Asked(self.path, self.headers.get("x-api-key"), body)
        self.owner.requests.append(asked)
        faults = next((f for end, f in self.owner.faults.items() if self.path.endswith(end)), [])
        fault = faults.pop(0) if faults else Fault()
        status, whole = self.owner.answer(asked)
        status = fault.status if fault.status != 200 else status
        if fault.body is not None:
            whole = fault.body.replace(b"{key}", (asked.key or "").encode())
        self.close_connection = fault.keep is not None
        if fault.keep == -1:
            return
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(whole))} | fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(whole[: fault.keep])

    do_POST = do_GET


NeuronpediaServer.handler = _Handler
