"""All rows of the fault matrix, in the order of the table."""

from __future__ import annotations

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


def named(names: list[str] | None, slow: bool) -> list[Scenario]:
    """The scenarios of these names; without names all, the slow ones only where asked for.

    Raises:
        UnknownNameError: there is no such row.
    """
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names or ():
        if name not in known:
            raise UnknownNameError("row", name, known)
    if names:
        return [known[name] for name in names]
    return [scenario for scenario in SCENARIOS if slow or not scenario.slow]
