"""Which checkpoints stay on disk: those of the best trials, and none of the others."""

from __future__ import annotations

from topotune.config.models import SearchConfig
from topotune.records import Outcome, TrialSummary
from topotune.search.place.folder import SearchFolder
from topotune.search.place.objects.files import TrialFiles
from topotune.train.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE


class Retention:
    """Deletes the checkpoints of ended trials that are not among the best.

    With several objectives every complete trial may be on the front, so all of those are kept.

    Args:
        folder: the search's folder.
        config: the search; ``keep_checkpoints`` is how many stay.
        finished: rows of trials that ended before.
        files: where they are deleted, too.
    """

    def __init__(
        self,
        folder: SearchFolder,
        config: SearchConfig,
        finished: list[TrialSummary],
        files: TrialFiles | None = None,
    ) -> None:
        self._files = files or TrialFiles(folder)
        self._folder, self._keep = folder, config.keep_checkpoints
        self._sign = 1.0 if config.objective[0].direction == "maximize" else -1.0
        self._all = len(config.objective) > 1
        self._kept: list[tuple[float, int]] = []
        for row in finished:
            if row.state not in ("RUNNING", "WAITING"):
                self.ended(row)

    def ended(self, row: TrialSummary) -> None:
        """Keep or delete a trial's checkpoint, and perhaps that of one it displaces."""
        if row.state != Outcome.COMPLETE or not row.values:
            self._delete(row.number)
            return
        # The last epoch's is whole and final; the one before was there in case it would not be.
        (self._folder.trial(row.number) / PREVIOUS_FILE).unlink(missing_ok=True)
        if self._all:
            return
        # A trial that breaks a constraint is kept behind all that do not.
        rank = self._sign * row.values[0] - (1e300 if row.violated else 0.0)
        self._kept.append((rank, -row.number))
        self._kept.sort(reverse=True)
        for _, negative in self._kept[self._keep :]:
            self._delete(-negative)
        del self._kept[self._keep :]

    def _delete(self, number: int) -> None:
        for name in (CHECKPOINT_FILE, PREVIOUS_FILE):
            (self._folder.trial(number) / name).unlink(missing_ok=True)
        self._files.forget(number, CHECKPOINT_FILE)
