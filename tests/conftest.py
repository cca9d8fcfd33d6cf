"""Test set-up: one torch thread, tables of what rows saw, and an end that leaves no process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two cores are not fought over

import signal
import uuid
from contextlib import suppress

import psutil
import pytest

from tests.tables import findings, table, text
from topotune.bench.scaling.processes import marked

RUN = "TOPOTUNE_TEST_RUN"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("topotune")
    group.addoption("--table", action="store_true", help="print what faults, load and fuzz saw")
    group.addoption("--runs", type=int, default=1, help="of each fault; --table gives the ranges")
    group.addoption("--inputs", type=int, default=100_000, help="of the fuzzer (-m fuzz)")
    group.addoption("--seed", type=int, default=0, help="of the fuzzer's mutations (-m fuzz)")


def pytest_configure(config: pytest.Config) -> None:
    """SIGTERM and a closed terminal end the tests as Ctrl-C does: what they started ends, too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        os.environ[RUN] = uuid.uuid4().hex


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    runs = metafunc.config.getoption("--runs")
    if runs > 1 and "seen" in metafunc.fixturenames:
        metafunc.fixturenames.append("run")
        metafunc.parametrize("run", range(runs), ids="run{}".format)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.getoption("--table"):
        return
    stats = terminalreporter.stats
    reports = [one for kind in ("passed", "failed") for one in stats.get(kind, ())]
    found = findings([report for report in reports if isinstance(report, pytest.TestReport)])
    if found:
        terminalreporter.write_line(text(table(found)))
    for report in reports:
        for name, value in report.user_properties:
            if name == "table":
                terminalreporter.write_line(str(value))


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what is left: a worker of pytest-xdist that is killed after Ctrl-C cannot clean up."""
    if hasattr(config, "workerinput"):
        return
    left = [one for one in marked(RUN, os.environ[RUN]) if one.pid != os.getpid()]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, 5)
