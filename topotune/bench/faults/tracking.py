"""Faults of the tracking server: gone, slow, refusing, or answering nonsense."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from topotune.bench.faults.invariants import audit, known_reference, reference
from topotune.bench.faults.ports import free_port
from topotune.bench.faults.proxy import Proxy
from topotune.bench.faults.scenario import BrokenPromiseError, Scenario, expect
from topotune.bench.faults.site import NAME, Driver, Site
from topotune.tracking.dashboard import Dashboard, serve_dashboard
from topotune.tracking.mlflow import MlflowStore

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


class Server:
    """A real ``mlflow server`` process over SQLite, killed and started again on one port."""

    def __init__(self, folder: Path) -> None:
        self._store = MlflowStore.embedded(folder)
        self._dashboard: Dashboard | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Start it and wait until it answers."""
        end = time.monotonic() + 60
        while True:
            self._dashboard = serve_dashboard(self._store, self.port)
            if self._dashboard.url == self.url:
                return
            self.kill()  # somebody holds the port: a worker of the killed server, for a moment
            expect(time.monotonic() < end, f"port {self.port} of the server is taken")

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self._dashboard is not None:
            self._dashboard.stop(grace=0.0)
            self._dashboard = None


@contextmanager
def _server(site: Site) -> Iterator[Server]:
    server = Server(site.folder / "server")
    try:
        server.up()
        yield server
    finally:
        server.kill()


def _search(site: Site, url: str, epochs: int = EPOCHS) -> Driver:
    file = site.search_file({"pause": PAUSE}, budget={"trials": 4, "epochs": epochs})
    reference(site)  # the undisturbed run, unless there is one: right before, on the same machine
    return site.start("search", file, "--tracking-uri", url)


def _paces(site: Site) -> list[float]:
    """Seconds of every epoch of a site's search."""
    return [report.seconds for trial in range(4) for report in site.epochs(trial)]


class SlowedError(BrokenPromiseError):
    """All held, but epochs took too long."""


def measured(row: Callable[[Site], str]) -> Callable[[Site], str]:
    """A row that is run again, its undisturbed search too, where its epochs took too long."""

    def run(site: Site) -> str:
        shared, slower = site.shared, ""
        for attempt in range(1, MEASURED + 1):
            folder = site.folder / f"attempt-{attempt}"
            try:
                with Site(folder, shared) as fresh:
                    return row(fresh) + slower
            except SlowedError as slowed:
                shared, slower = folder / "shared", f"{slower}; measured again after: {slowed}"
        raise BrokenPromiseError(f"slower by more than {SLOWED - 1:.0%}{slower}")

    return run


def _slowdown(site: Site) -> str:
    """How much longer an epoch took than undisturbed."""
    mine, calm = _paces(site), _calm(site)
    ratio = statistics.median(mine) / statistics.median(calm)
    text = f"epochs take {ratio:.3f} times as long (relative IQR {_spread(mine):.3f} and "
    text += f"{_spread(calm):.3f})"
    if ratio > SLOWED:
        raise SlowedError(text)
    return text


def _calm(site: Site) -> list[float]:
    known = known_reference(site)
    assert known is not None  # _search() has run it
    return _paces(Site(known.with_suffix(""), site.shared))


def _spread(values: Sequence[float]) -> float:
    """Interquartile range over the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def _closing(site: Site, ended: float) -> str:
    """How long the command took to end after the last epoch."""
    last = max(report.timestamp_ms for trial in range(4) for report in site.epochs(trial)) / 1000
    expect(ended - last < CLOSED, f"the command ended {ended - last:.0f} s after the last epoch")
    return f"ended {ended - last:.0f} s after the last epoch"


def _stored(text: str) -> tuple[int, int]:
    """Items recorded and stored, as a command's last count says."""
    found = re.findall(r"(\d+) items recorded, (\d+) stored", text)
    expect(bool(found), f"no count: {text[-500:]}")
    return int(found[-1][0]), int(found[-1][1])


def _verdict(site: Site, output: str, ended: float) -> str:
    """Everything is stored, if need be after ``topotune sync``; training was not slowed."""
    recorded, stored = _stored(output)
    text = f"{stored} of {recorded} items stored at the end"
    if stored < recorded:
        expect(f"topotune sync {NAME}" in output, f"sync is not named: {output[-500:]}")
        recorded, stored = _stored(site.run("sync", NAME, "--timeout", "120"))
        text += f", {stored} of {recorded} after sync"
    expect(stored == recorded, text)
    return f"{text}; {_closing(site, ended)}; {audit(site)}; {_slowdown(site)}"


def _outage(seconds: float, epochs: int) -> Callable[[Site], str]:
    def row(site: Site) -> str:
        with _server(site) as server:
            driver = _search(site, server.url, epochs)
            site.reach(driver, 0, 2)
            server.kill()
            down = time.monotonic()
            site.wait(lambda: time.monotonic() - down > seconds, seconds + 5, "the clock stands")
            expect(driver.process.poll() is None, "the search ended before the server was back")
            server.up()
            output = driver.finish()
            ended = time.time()
            expect("cannot be reached" in output, "the outage was not said")
            return _verdict(site, output, ended)

    return row


def _gone(site: Site) -> str:
    with _server(site) as server:
        driver = _search(site, server.url)
        site.reach(driver, 0, 2)
        server.kill()
        output = driver.finish()
        ended = time.time()
        recorded, stored = _stored(output)
        expect(stored < recorded, "nothing was left to ship")
        refused = site.run("sync", NAME, "--timeout", "3", code=1)
        expect("wait" in refused, f"sync without a server: {refused}")
        server.up()
        return _verdict(site, output, ended)


def _down_at_start(site: Site) -> str:
    with _server(site) as server:
        server.kill()
        driver = _search(site, server.url)
        site.reach(driver, 1, 1)
        server.up()
        output = driver.finish()
        return _verdict(site, output, time.time())


def _misbehaving(modes: Sequence[str], seconds: float) -> Callable[[Site], str]:
    """The server answers in each of these ways for some seconds, then well again."""

    def row(site: Site) -> str:
        with _server(site) as server, Proxy(server.port) as proxy:
            driver = _search(site, proxy.url)
            site.reach(driver, 0, 1)
            for mode in modes:
                proxy.mode = mode
                met = site.wait(partial(proxy.met, mode), 40, f"no {mode} call")
                time.sleep(max(0.0, seconds - met))
            proxy.mode = "pass"
            output = driver.finish()
            calls = ", ".join(f"{proxy.calls[mode]} {mode}" for mode in modes)
            return f"calls met: {calls}; {_verdict(site, output, time.time())}"

    return row


def _slow(site: Site) -> str:
    with _server(site) as server, Proxy(server.port, "slow") as proxy:
        driver = _search(site, proxy.url)
        output = driver.finish()
        ended = time.time()
        proxy.mode = "pass"
        return f"{proxy.calls['slow']} slow calls; {_verdict(site, output, ended)}"


_EXPECTED = "search ends well, training not slowed by 5 %, everything stored once"

TRACKING = (
    Scenario(
        "tracking-restart-10s",
        "MLflow server killed, back after 10 s",
        _EXPECTED,
        measured(_outage(10, EPOCHS)),
    ),
    Scenario(
        "tracking-restart-60s",
        "MLflow server killed, back after 60 s",
        _EXPECTED,
        measured(_outage(60, 18)),
        seconds=180,
    ),
    Scenario(
        "tracking-gone",
        "MLflow server killed until after the end of the search, then topotune sync",
        _EXPECTED,
        measured(_gone),
    ),
    Scenario(
        "tracking-down-at-start",
        "MLflow server down at the start",
        _EXPECTED,
        measured(_down_at_start),
    ),
    Scenario("tracking-slow", "MLflow slow: 2 s a call", _EXPECTED, measured(_slow), seconds=100),
    Scenario(
        "tracking-errors",
        "MLflow answers 429, 500 and 503 for a while",
        _EXPECTED,
        measured(_misbehaving(("429", "500", "503"), 3.0)),
        seconds=45,
    ),
    Scenario(
        "tracking-nonsense",
        "a login page instead of MLflow, broken connections, then silence",
        _EXPECTED,
        measured(_misbehaving(("login", "reset", "mute"), 3.0)),
        seconds=60,
    ),
)
