"""Ports of 127.0.0.1 that a server of a row can be given, and given again."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from topotune.bench.faults.scenario import expect

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 20_000
"""Above the ports that Ray gives its workers on a cluster of several nodes."""


def free_port() -> int:
    """A port that nobody has, and that no outgoing connection is given while its server is down."""
    highest = int(_RANGE.read_text(encoding="ascii").split()[0]) if _RANGE.exists() else 32_768
    chance = random.SystemRandom()
    for _ in range(200):
        port = chance.randrange(_LOWEST, max(highest, _LOWEST + 1000))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    expect(False, "no free port is found")
    return 0
