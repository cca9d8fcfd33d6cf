"""What servers for this machine alone need: a port of 127.0.0.1, and an end at a signal."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from topotune.errors import ConfigError, ResourceError

HOST = "127.0.0.1"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest(BaseException):
    """A signal asks this process to end."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn the signals that end a process into StopRequest; the old handlers are put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise StopRequest

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_port(port: int) -> None:
    """Refuse what is no port.

    Raises:
        ConfigError: it is not from 0 to 65535.
    """
    if not 0 <= port < 2**16:
        raise ConfigError("--port", f"must be from 0 (any free one) to 65535 (got {port})")


def free_port(preferred: int) -> int:
    """The preferred port of 127.0.0.1 if it is free, else any free one.

    Raises:
        ResourceError: none can be bound.
    """
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError):
                continue
            return int(probe.getsockname()[1])
    raise ResourceError(f"port {preferred} of {HOST}: neither it nor any other port can be bound")
