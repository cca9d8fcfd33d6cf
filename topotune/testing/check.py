"""The one assertion that the contracts use."""

from __future__ import annotations


def check(condition: bool, message: str) -> None:
    """Fail the test with ``message`` unless the condition holds.

    Not an assert statement: pytest explains only those of test modules, and ``-O`` drops them.

    Raises:
        AssertionError: the condition is false.
    """
    if not condition:
        raise AssertionError(message)
