"""What the driver asks for where trials' files may be elsewhere."""

from __future__ import annotations

from typing import Protocol


class TrialFiles(Protocol):
    """What the driver asks for where trials' files are not all here."""

    def fetch(self, number: int, *names: str) -> None:
        """Bring these files of a trial; without names all that its worker has written, but for
        checkpoints and what was printed."""

    def forget(self, number: int, *names: str) -> None:
        """These files of a trial, or folders whose names end with ``/``, are deleted here."""


class AllHere:
    """Trials' files of a search that workers and driver keep in one folder."""

    def fetch(self, number: int, *names: str) -> None:
        """Nothing to bring."""

    def forget(self, number: int, *names: str) -> None:
        """Nothing else to delete."""
