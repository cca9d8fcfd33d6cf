"""What a check of a machine or cluster comes to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it is fine, what was seen, the fix if it is not, and where."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    place: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For a script."""
        return dataclasses.asdict(self)
