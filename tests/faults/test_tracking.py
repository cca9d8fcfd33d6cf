"""Faults of the tracking server: gone, slow, refusing, or answering nonsense."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.faults.invariants import audit, known_reference, reference
from tests.faults.site import NAME, Driver, Seen, Site
from tests.proxy import Proxy
from topotune.bench.scaling.processes import free_port
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.serve import Dashboard, serve_dashboard

EPOCHS, PAUSE = 6, 0.2
"""Of a trial, and seconds that each of an epoch's five batches sleeps: cores that are shared with
a server must not decide how long an epoch takes."""
SLOWED = 1.05
"""Median seconds of an epoch over those of the undisturbed search, at most."""
MEASURED = 3
"""How often both searches are run, at most, until that holds: a neighbour's load during one of
them can only lengthen its epochs, while a tracking that holds training up does it every time."""
CLOSED = 120.0
"""Seconds from the last epoch to the end of the command, at most, whatever the server does."""


@pytest.mark.faults_full
@pytest.mark.parametrize(
    ("seconds", "epochs"), [pytest.param(10, EPOCHS, id="10s"), pytest.param(60, 18, id="60s")]
)
def test_tracking_restart(site: Site, seen: Seen, seconds: int, epochs: int) -> None:
    """MLflow server killed, back after a while: search ends well, training not slowed by 5 %,
    everything stored once."""

    def row(site: Site) -> str:
        with serving(site) as server:
            driver = search(site, server.url, epochs)
            site.reach(driver, 0, 2)
            server.kill()
            time.sleep(seconds)
            assert driver.process.poll() is None, "the search ended before the server was back"
            server.up()
            output = driver.finish()
            ended = time.time()
            assert "cannot be reached" in output, "the outage was not said"
            return verdict(site, output, ended)

    seen(measured(site, row))


@pytest.mark.faults
def test_tracking_gone(site: Site, seen: Seen) -> None:
    """MLflow server killed until after the end of the search, then topotune sync: search ends well,
    training not slowed by 5 %, everything stored once."""

    def row(site: Site) -> str:
        with serving(site) as server:
            driver = search(site, server.url)
            site.reach(driver, 0, 2)
            server.kill()
            output = driver.finish()
            ended = time.time()
            recorded, stored = counts(output)
            assert stored < recorded, "nothing was left to ship"
            refused = site.run("sync", NAME, "--timeout", "3", code=1)
            assert "wait" in refused, f"sync without a server: {refused}"
            server.up()
            return verdict(site, output, ended)

    seen(measured(site, row))


@pytest.mark.faults_full
def test_tracking_down_at_start(site: Site, seen: Seen) -> None:
    """MLflow server down at the start: search ends well, training not slowed by 5 %, everything
    stored once."""

    def row(site: Site) -> str:
        with serving(site) as server:
            server.kill()
            driver = search(site, server.url)
            site.reach(driver, 1, 1)
            server.up()
            return verdict(site, driver.finish(), time.time())

    seen(measured(site, row))


@pytest.mark.faults_full
def test_tracking_slow(site: Site, seen: Seen) -> None:
    """MLflow slow, 2 s a call: search ends well, training not slowed by 5 %, everything stored
    once."""

    def row(site: Site) -> str:
        with serving(site) as server, Proxy(server.port, "slow") as proxy:
            output = search(site, proxy.url).finish()
            ended = time.time()
            proxy.mode = "pass"
            return f"{proxy.calls['slow']} slow calls; {verdict(site, output, ended)}"

    seen(measured(site, row))


@pytest.mark.parametrize(
    "modes",
    [
        pytest.param(("429", "500", "503"), id="errors", marks=pytest.mark.faults),
        pytest.param(("login", "reset", "mute"), id="nonsense", marks=pytest.mark.faults_full),
    ],
)
def test_tracking_misbehaves(site: Site, seen: Seen, modes: Sequence[str]) -> None:
    """MLflow answers 429, 500 and 503 for a while; or a login page, broken connections, then
    silence: search ends well, training not slowed by 5 %, everything stored once."""

    def row(site: Site) -> str:
        with serving(site) as server, Proxy(server.port) as proxy:
            driver = search(site, proxy.url)
            site.reach(driver, 0, 1)
            for mode in modes:
                proxy.mode = mode
                met = site.wait(partial(proxy.met, mode), 40, f"no {mode} call")
                time.sleep(max(0.0, 3.0 - met))
            proxy.mode = "pass"
            output = driver.finish()
            calls = ", ".join(f"{proxy.calls[mode]} {mode}" for mode in modes)
            return f"calls met: {calls}; {verdict(site, output, time.time())}"

    seen(measured(site, row))


class SlowedError(AssertionError):
    """All held, but epochs took too long."""


def measured(site: Site, row: Callable[[Site], str]) -> str:
    """Run a row, again and with its undisturbed search too, where its epochs took too long."""
    shared, slower = site.shared, ""
    for attempt in range(1, MEASURED + 1):
        folder = site.folder / f"attempt-{attempt}"
        try:
            with Site(folder, shared) as fresh:
                return row(fresh) + slower
        except SlowedError as slowed:
            shared, slower = folder / "shared", f"{slower}; measured again after: {slowed}"
    raise AssertionError(f"slower by more than {SLOWED - 1:.0%}{slower}")


class Server:
    """A real ``mlflow server`` process over SQLite, killed and started again on one port."""

    def __init__(self, folder: Path) -> None:
        self._store = MlflowStore.embedded(folder)
        self._dashboard: Dashboard | None = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Start it and wait until it answers."""
        end = time.monotonic() + 60
        while True:
            self._dashboard = serve_dashboard(self._store, self.port)
            if self._dashboard.url == self.url:
                return
            self.kill()  # somebody holds the port: a worker of the killed server, for a moment
            assert time.monotonic() < end, f"port {self.port} of the server is taken"

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self._dashboard is not None:
            self._dashboard.stop(grace=0.0)
            self._dashboard = None


@contextmanager
def serving(site: Site) -> Iterator[Server]:
    server = Server(site.folder / "server")
    try:
        server.up()
        yield server
    finally:
        server.kill()


def search(site: Site, url: str, epochs: int = EPOCHS) -> Driver:
    file = site.search_file({"pause": PAUSE}, budget={"trials": 4, "epochs": epochs})
    reference(site)  # the undisturbed run, unless there is one: right before, on the same machine
    return site.start("search", file, "--tracking-uri", url)


def verdict(site: Site, output: str, ended: float) -> str:
    """Everything is stored, if need be after ``topotune sync``; training was not slowed."""
    recorded, stored = counts(output)
    text = f"{stored} of {recorded} items stored at the end"
    if stored < recorded:
        assert f"topotune sync {NAME}" in output, f"sync is not named: {output[-500:]}"
        recorded, stored = counts(site.run("sync", NAME, "--timeout", "120"))
        text += f", {stored} of {recorded} after sync"
    assert stored == recorded, text
    last = max(report.timestamp_ms for trial in range(4) for report in site.epochs(trial)) / 1000
    closing = f"ended {ended - last:.0f} s after the last epoch"
    assert ended - last < CLOSED, f"the command {closing}"
    return f"{text}; {closing}; {audit(site)}; {slowdown(site)}"


def counts(text: str) -> tuple[int, int]:
    """Items recorded and stored, as a command's last count says."""
    found = re.findall(r"(\d+) items recorded, (\d+) stored", text)
    assert found, f"no count: {text[-500:]}"
    return int(found[-1][0]), int(found[-1][1])


def slowdown(site: Site) -> str:
    """How much longer an epoch took than undisturbed."""
    known = known_reference(site)
    assert known is not None  # search() has run it
    mine, calm = paces(site), paces(Site(known.with_suffix(""), site.shared))
    ratio = statistics.median(mine) / statistics.median(calm)
    text = f"epochs take {ratio:.3f} times as long (relative IQR {spread(mine):.3f} and "
    text += f"{spread(calm):.3f})"
    if ratio > SLOWED:
        raise SlowedError(text)
    return text


def paces(site: Site) -> list[float]:
    """Seconds of every epoch of a site's search."""
    return [report.seconds for trial in range(4) for report in site.epochs(trial)]


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle
