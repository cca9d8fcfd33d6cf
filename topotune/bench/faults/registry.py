"""All rows of the fault matrix, in the order of the table."""

from __future__ import annotations

from collections.abc import Sequence

from topotune.bench.faults.clocks import CLOCKS
from topotune.bench.faults.disk import DISK
from topotune.bench.faults.drivers import DRIVERS
from topotune.bench.faults.nodes import NODES
from topotune.bench.faults.numbers import NUMBERS
from topotune.bench.faults.scenario import Scenario
from topotune.bench.faults.signals import SIGNALS
from topotune.bench.faults.study import STUDY
from topotune.bench.faults.tracking import TRACKING
from topotune.bench.faults.workers import WORKERS
from topotune.errors import UnknownNameError

SCENARIOS: tuple[Scenario, ...] = (
    *WORKERS,
    *NODES,
    *DRIVERS,
    *SIGNALS,
    *TRACKING,
    *STUDY,
    *DISK,
    *CLOCKS,
    *NUMBERS,
)


QUICK = (
    *("worker-killed", "node-killed", "driver-killed-with-orphans"),
    *("user-errors", "print-and-fork", "not-a-number"),
    *("stopped-by-sigint", "second-sigint", "second-driver"),
    *("tracking-gone", "tracking-errors"),
    *("study-locked", "study-damaged", "checkpoints-damaged"),
    *("disk-full", "clock-set-back"),
)
"""Every kind of fault, by its shorter rows: what ``--quick`` and the usual tests run."""


def named(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names; without names all.

    Raises:
        UnknownNameError: there is no such row.
    """
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in known:
            raise UnknownNameError("row", name, known)
    return [known[name] for name in names] if names else list(SCENARIOS)
