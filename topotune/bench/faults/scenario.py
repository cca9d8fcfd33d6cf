"""A row of the fault matrix: one fault, what is expected, and the code that does both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from topotune.bench.faults.site import Site


class BrokenPromiseError(AssertionError):
    """An expectation of a row did not hold; the text says which, and what was seen."""


def expect(holds: bool, text: str) -> None:
    """Raise :class:`BrokenPromiseError` with ``text`` unless the expectation holds."""
    if not holds:
        raise BrokenPromiseError(text)


@dataclass(frozen=True)
class Scenario:
    """One row.

    Attributes:
        name: short and unique, such as ``worker-killed``; names the test too.
        fault: what is done to the search, in words.
        expected: what must hold besides the invariants of every row, in words.
        run: injects the fault for real and checks; what was seen, in a line. It raises
            :class:`BrokenPromiseError` where an expectation fails.
        seconds: wall time on two idle cores, about.
        alone: it measures the whole machine, so that nothing else may run beside it.
    """

    name: str
    fault: str
    expected: str
    run: Callable[[Site], str]
    seconds: float = 30.0
    alone: bool = False


@dataclass(frozen=True)
class Finding:
    """How a row came out.

    Attributes:
        name, fault, expected: the scenario's.
        ok: whether everything held.
        seen: what was seen, or what did not hold.
        seconds: wall time.
    """

    name: str
    fault: str
    expected: str
    ok: bool
    seen: str
    seconds: float
