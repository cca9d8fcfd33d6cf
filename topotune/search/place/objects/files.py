"""Trials' files as the driver sees them, wherever the trials' workers write them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from topotune.errors import TopotuneError
from topotune.search.place.folder import SearchFolder
from topotune.search.ray.watchdog import GUARD_FILE
from topotune.train.checkpoint import CHECKPOINT_FILE
from topotune.train.trace import RELAXATION_FOLDER, TRACE_FOLDER

if TYPE_CHECKING:
    from topotune.search.place.objects.mirror import Mirror


class TrialFiles:
    """The folders of a search's trials.

    Args:
        folder: the search's folder.
        mirror: brings files from the store and deletes them there; None where workers and driver
            share the folder.
    """

    def __init__(self, folder: SearchFolder, mirror: Mirror | None = None) -> None:
        self._folder, self._mirror = folder, mirror

    def fetch(self, number: int) -> None:
        """Bring all that a trial's worker has written, but for its checkpoint and output.

        Raises:
            ResourceError: the store or the folder cannot be used.
        """
        if self._mirror is not None:
            self._mirror.fetch(number)

    def forget(self, number: int, *names: str) -> None:
        """These files of a trial, or folders whose names end with ``/``, are deleted here."""
        if self._mirror is not None:
            self._mirror.forget(number, *names)

    def has_chunks(self, number: int) -> bool:
        """Whether an ended trial's traces were not joined by an earlier session."""
        if self._mirror is not None:
            return number in self._mirror.chunked
        folders = (TRACE_FOLDER, RELAXATION_FOLDER)
        return any((self._folder.trial(number) / name).is_dir() for name in folders)

    def heartbeats(self, number: int) -> Path:
        """The folder that a worker's guard writes to. Where that is another machine's, it shows
        nothing, and the worker is not judged by it."""
        if self._mirror is not None:
            return self._mirror.worker_folder(number)
        return self._folder.trial(number)

    def died(self, number: int) -> Path:
        """The folder with a dead worker's note, as far as it can be brought."""
        with contextlib.suppress(TopotuneError):  # then its end is recorded without them
            self.fetch(number)
        self.forget(number, GUARD_FILE)  # it is read once
        return self._folder.trial(number)

    def checkpoint(self, number: int) -> Path:
        """The folder with a trial's checkpoint and steps, as far as they can be brought."""
        if self._mirror is not None:
            with contextlib.suppress(TopotuneError):
                self._mirror.fetch(number)
                self._mirror.fetch(number, CHECKPOINT_FILE)
        return self._folder.trial(number)
