"""Contracts: test classes to inherit, for a task or an optimizer of your own::

    from topotune.testing import TaskContract

    class TestRings(TaskContract):
        task = Rings

Run it with pytest. A failure says what the rest of topotune relies on.
"""

from topotune.testing.optimizer import OptimizerContract
from topotune.testing.task import TaskContract

__all__ = ["OptimizerContract", "TaskContract"]
