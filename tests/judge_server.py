"""A chat-completions server on the loopback interface that judges by a fixed rule, and misbehaves.

What it answers depends on the text alone, never on the order of requests: `scores(text)` says what.
Misbehaviour is told for one text or for all, as a list of faults: one a request, in their order.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loopback import LoopbackServer, QuietHandler

MARK = "the subjects are:"  # of the prompt that asks for three scores
ALL = ""  # misbehaviour for every text


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Attributes:
        content: What the model says instead of scores.
        status: The HTTP status instead of 200.
        message: What the error says; `{key}` becomes the key that was sent.
        headers: More headers.
        body: The whole HTTP body instead of a completion.
        delay: Seconds before the answer.
        keep: Bytes of the body after which the connection is cut; -1: not even a status line.
    """

    content: Any = None
    status: int = 200
    message: str = "out of order"
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    delay: float = 0
    keep: int | None = None


@dataclass(frozen=True)
class Asked:
    """One request that reached the server.

    Attributes:
        body: What was posted.
        text: The text to judge in it.
        key: The key that was sent.
        time: When, by the monotonic clock.
        path: Where to.
    """

    body: dict[str, Any]
    text: str
    key: str
    time: float
    path: str


class JudgeServer(LoopbackServer):
    """The server: `with JudgeServer() as server`, then `server.url`.

    Attributes:
        key: The key that it takes; None for any.
        models: The models that it has.
        requests: What reached it, in order.
        alive: How many requests more it answers before it cuts every connection; None for all.
        most: The most requests that it answered at one time.
    """

    def __init__(self, key: str | None = None, models: Iterable[str] = ("gpt-4o-mini",)) -> None:
        self.key = key
        self.models = set(models)
        self.requests: list[Asked] = []
        self.alive: int | None = None
        self.most = self._now = 0
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Its address, as a client is told."""
        return f"{self.address}/v1"

    def misbehave(self, text: str, *faults: Fault) -> None:
        """The next requests for this text (`ALL`: for any) meet these faults, one each."""
        self._faults.setdefault(text, []).extend(faults)

    def reset(self) -> None:
        """Forget the requests and the faults."""
        with self._lock:
            self.requests.clear()
            self._faults.clear()
            self.alive, self.most = None, 0

    def asked(self) -> list[str]:
        """The texts that were asked about, in order."""
        return [request.text for request in self.requests]

    def enter(self, asked: Asked) -> Fault | None:
        """Writes a request down; the fault that it meets."""
        with self._lock:
            self.requests.append(asked)
            self._now += 1
            self.most = max(self.most, self._now)
            if self.alive is not None:
                self.alive -= 1
                if self.alive < 0:
                    return Fault(keep=-1)
            for text in (asked.text, ALL):
                if self._faults.get(text):
                    return self._faults[text].pop(0)
        return None

    def leave(self) -> None:
        """A request is over."""
        with self._lock:
            self._now -= 1


def scores(text: str) -> tuple[int, list[int]]:
    """Coherence, and the behavioural scores of three subjects; to promote, the first is given."""
    coherence, *behavioral = (byte % 6 for byte in hashlib.sha256(text.encode()).digest()[:4])
    return coherence, behavioral


class _Handler(QuietHandler):
    owner: JudgeServer

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length))
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        system, user = (message["content"] for message in body["messages"])
        text = user.partition('Text:\n"""\n')[2].removesuffix('\n"""\n')
        fault = self.owner.enter(Asked(body, text, key, time.monotonic(), self.path)) or Fault()
        try:
            time.sleep(fault.delay)
            status, message = fault.status, fault.message.replace("{key}", key)
            if scheme != "Bearer" or self.owner.key not in (None, key):
                status, message = 401, f"Incorrect API key provided: {key}"
            elif self.path != "/v1/chat/completions":
                status, message = 404, f"no {self.path} here"
            elif body["model"] not in self.owner.models:
                status, message = 404, f"The model {body['model']!r} does not exist"
            coherence, behavioral = scores(text)
            told = behavioral if MARK in system.lower() else behavioral[0]
            content = json.dumps({"coherence": coherence, "behavioral": told}, indent=4)
            content = content if fault.content is None else fault.content
            answer = _completion(body["model"], content)
            if status != 200:
                answer = {"error": {"message": message, "code": f"e{status}", "type": "error"}}
            whole = (fault.body or json.dumps(answer)).encode()
            self._send(status, whole, fault)
        except OSError:  # the other side did not wait
            self.close_connection = True
        finally:
            self.owner.leave()

    def _send(self, status: int, whole: bytes, fault: Fault) -> None:
        if fault.keep is not None:
            self.close_connection = True
        if fault.keep == -1:
            return
        self.send_response(status)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[: fault.keep])
        self.wfile.flush()


def _completion(model: str, content: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


JudgeServer.handler = _Handler
