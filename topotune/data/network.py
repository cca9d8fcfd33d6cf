"""Find out quickly that there is no way to a download, and never wait for one without end."""

from __future__ import annotations

import http.client
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_PROBE_SECONDS = 10.0
"""For all mirrors together, name resolution and every address included."""

_STALL_SECONDS = 30.0
"""For one wait on the network during a download."""


def unreachable(urls: Sequence[str], seconds: float = _PROBE_SECONDS) -> str:
    """Why none of the addresses answers, or "" if one does.

    All are asked at once (a HEAD request, through the proxy of the environment if there is one).
    A socket timeout alone would not do: it counts anew for every address that a name resolves to,
    and not at all for the resolution itself.

    Args:
        urls: mirrors of the same thing.
        seconds: the longest that this call takes.
    """
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(url: str) -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "topotune"})
            with urllib.request.urlopen(request, timeout=seconds):
                answers.put("")
        except urllib.error.HTTPError as answer:
            # Somebody is there; what this server thinks of HEAD is not the question.
            answer.close()
            answers.put("")
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers.put(f"{url} does not answer ({error})")

    deadline = time.monotonic() + seconds
    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    reasons = []
    for _ in urls:
        try:
            reason = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            reasons.append(f"no answer within {seconds:g} s from {', '.join(urls)}")
            break
        if not reason:
            return ""
        reasons.append(reason)
    return "; ".join(reasons)


@contextmanager
def bounded_waits(seconds: float = _STALL_SECONDS) -> Iterator[None]:
    """Give sockets that are opened inside, and that name no timeout, this one.

    torchvision's downloads name none: a connection that stalls would hold its worker, and the lock
    on which the others wait, for ever.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
