"""An HTTP proxy that misbehaves on request, between a search and its tracking server."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

_HOST = "127.0.0.1"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host"}


class Proxy:
    """Passes requests on to a server on 127.0.0.1, as :attr:`mode` says.

    Args:
        target: port of the server.

    Attributes:
        mode: "pass"; "slow": every call takes ``delay`` seconds; a status code such as "503",
            answered without asking the server; "login": status 200 and a page of HTML; "reset":
            the request reaches the server and the connection breaks in the middle of its answer;
            "mute": the connection stays open and nothing ever comes.
        delay: seconds a slow call takes.
        calls: requests so far, by the mode that they met.
        url: where it listens.
    """

    def __init__(self, target: int, mode: str = "pass", delay: float = 2.0) -> None:
        self.mode, self.delay = mode, delay
        self.calls: dict[str, int] = {}
        self._target = target
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer((_HOST, 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://{_HOST}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, mode: str) -> None:
        """A request met this mode."""
        with self._lock:
            self.calls[mode] = self.calls.get(mode, 0) + 1

    def met(self, mode: str) -> bool:
        """Whether a request has met this mode."""
        return self.calls.get(mode, 0) > 0

    def ask(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """The server's status, headers and body; 502 where it does not answer."""
        connection = http.client.HTTPConnection(_HOST, self._target, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        except (OSError, http.client.HTTPException):
            return 502, {}, b""
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        mode = self.proxy.mode
        self.proxy.count(mode)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
        if mode == "mute":
            time.sleep(60)
            return self._break()
        if mode == "login":
            return self._reply(200, {"Content-Type": "text/html"}, b"<html>please log in</html>")
        if mode.isdecimal():
            return self._reply(int(mode), {"Retry-After": "30"}, b"not now")
        if mode == "slow":
            time.sleep(self.proxy.delay)
        status, found, answer = self.proxy.ask(self.command, self.path, body, headers)
        if mode == "reset":
            self._head(status, {}, len(answer) + 10)
            self.wfile.write(answer[: len(answer) // 2])
            return self._break()
        return self._reply(status, found, answer)

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in {*_HOP_BY_HOP, "content-length", "date", "server"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        with suppress(OSError):  # the other side has given up waiting
            self._head(status, headers, len(body))
            self.wfile.write(body)

    def _break(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Silent."""


for _method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
    setattr(_Handler, f"do_{_method}", _Handler._serve)
