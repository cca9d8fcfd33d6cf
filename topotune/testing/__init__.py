"""Contracts: test classes to inherit, for a task, an optimizer or a TCEP field of your own::

    from topotune.testing import TaskContract

    class TestRings(TaskContract):
        task = Rings

Run it with pytest. A failure says what the rest of topotune relies on.
"""

from topotune.testing.field import EnergyContract, KnownEquilibrium
from topotune.testing.optimizer import OptimizerContract
from topotune.testing.task import TaskContract

__all__ = ["EnergyContract", "KnownEquilibrium", "OptimizerContract", "TaskContract"]
