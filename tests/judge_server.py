"""A chat-completions server on the loopback interface that judges by a fixed rule, and misbehaves.

What it answers depends on the text alone, never on the order of requests: `scores(text)` says what.
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from loopback import LoopbackServer, QuietHandler

MARK = "the subjects are:"  # of the prompt that asks for three scores
ALL = ""  # faults for every text


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request."""

    content: str | None = None  # of the model, instead of scores
    status: int = 200
    message: str = "out of order"  # of the error; `{key}` becomes the key that was sent
    headers: dict[str, str] = field(default_factory=dict)  # more of them
    body: str | None = None  # the whole, instead of a completion
    delay: float = 0  # seconds before the answer
    cut: bool = False  # whether the connection ends in the middle of the body


@dataclass(frozen=True)
class Asked:
    """One request that reached the server: its body, the text to judge in it, the key, the path."""

    body: dict[str, Any]
    text: str
    key: str
    path: str


class JudgeServer(LoopbackServer):
    """The server: `with JudgeServer() as server`, then `server.url`."""

    def __init__(self, key: str | None = None) -> None:
        self.key = key  # that it takes; None for any
        self.requests: list[Asked] = []  # that reached it, in order
        # By the text, or `ALL`, what goes wrong with its next requests, one each.
        self.faults: dict[str, list[Fault]] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Its address, as a client is told."""
        return f"{self.address}/v1"

    def asked(self) -> list[str]:
        """The texts that were asked about, in order."""
        return [request.text for request in self.requests]


def scores(text: str) -> tuple[int, list[int]]:
    """Coherence, and the behavioural scores of three subjects; to promote, the first is given."""
    coherence, *behavioral = (byte % 6 for byte in hashlib.sha256(text.encode()).digest()[:4])
    return coherence, behavioral


class _Handler(QuietHandler):
    owner: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        system, user = (message["content"] for message in body["messages"])
        text = user.partition('Text:\n"""\n')[2].removesuffix('\n"""\n')
        with self.owner.lock:
            self.owner.requests.append(Asked(body, text, key, self.path))
            faults = self.owner.faults.get(text) or self.owner.faults.get(ALL)
            fault = faults.pop(0) if faults else Fault()
        time.sleep(fault.delay)
        status, message = fault.status, fault.message.replace("{key}", key)
        if self.owner.key not in (None, key):
            status, message = 401, f"Incorrect API key provided: {key}"
        elif self.path != "/v1/chat/completions" or body["model"] != "gpt-4o-mini":
            status, message = 404, f"no {body['model']} at {self.path}"
        coherence, behavioral = scores(text)
        told = behavioral if MARK in system.lower() else behavioral[0]
        content = fault.content or json.dumps({"coherence": coherence, "behavioral": told})
        choice = {"index": 0, "message": {"role": "assistant", "content": content}}
        answer = {"id": "0", "object": "chat.completion", "choices": [choice]}
        if status != 200:
            answer = {"error": {"message": message, "code": f"e{status}", "type": "error"}}
        self._send(status, (fault.body or json.dumps(answer)).encode(), fault)

    def _send(self, status: int, whole: bytes, fault: Fault) -> None:
        self.send_response(status)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.close_connection = fault.cut
        self.wfile.write(whole[: len(whole) // 2 if fault.cut else None])


JudgeServer.handler = _Handler
