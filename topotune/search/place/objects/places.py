"""Where the driver finds what a trial's worker leaves behind."""

from __future__ import annotations

import contextlib
from pathlib import Path

from topotune.errors import TopotuneError
from topotune.search.place.folder import SearchFolder
from topotune.search.place.objects import layout
from topotune.search.place.objects.address import store_address, worker_folder
from topotune.search.place.objects.files import AllHere, TrialFiles
from topotune.search.ray.watchdog import GUARD_FILE
from topotune.train.checkpoint import CHECKPOINT_FILE


class Places:
    """The folders of a search's trials as the driver sees them.

    Args:
        folder: the search's folder.
        files: brings trials' files from a store; None where all are in the folder.
    """

    def __init__(self, folder: SearchFolder, files: TrialFiles | None) -> None:
        self._folder, self._files = folder, AllHere() if files is None else files
        self._address = store_address(folder.root.parent)

    def signs(self, number: int) -> Path:
        """The folder that a worker shows its signs of life in; where that is another machine's,
        there is nothing to be seen in it, and the worker is not judged."""
        if self._address is None:
            return self._folder.trial(number)
        return worker_folder(self._address, self._folder.name) / layout.trial_name(number)

    def died(self, number: int) -> Path:
        """The folder with a dead worker's note, as far as it can be had."""
        if self._address is not None:
            with contextlib.suppress(TopotuneError):  # then its end is told without them
                self._files.fetch(number)
            self._files.forget(number, GUARD_FILE)  # it is read once
        return self._folder.trial(number)

    def checkpoint(self, number: int) -> Path:
        """The folder with a trial's checkpoint and steps, as far as they can be had."""
        if self._address is not None:
            with contextlib.suppress(TopotuneError):
                self._files.fetch(number)
                self._files.fetch(number, CHECKPOINT_FILE)
        return self._folder.trial(number)
