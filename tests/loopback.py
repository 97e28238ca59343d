"""What the tests' servers on the loopback interface share."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Self


class QuietHandler(BaseHTTPRequestHandler):
    """Answers over connections that stay open, and writes no log."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass


class LoopbackServer:
    """A server in a thread: `with TheServer() as server`, then `server.address`.

    Attributes:
        handler: Answers requests; in it, `owner` is the server.
        address: Its address, once it runs.
    """

    handler: ClassVar[type[QuietHandler]]

    def __enter__(self) -> Self:
        handler = type("Handler", (self.handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
