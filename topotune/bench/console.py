"""Where a benchmark's tables are printed."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Standard output; wide where nobody looks, so that nothing is cut."""
    out = Console(highlight=False, markup=False)
    return out if out.is_terminal else Console(highlight=False, markup=False, width=220)
