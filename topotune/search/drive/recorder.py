"""Everything that is written about a search besides the study: MLflow's records and the pages.

A trial's end is recorded at once; its trace file and the leaderboard are made by a thread of their
own, so that the driver's loop never waits for them. Trials' figures are drawn when somebody looks
(:mod:`topotune.search.figures`).
"""

from __future__ import annotations

import getpass
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from topotune.config.models import SearchConfig
from topotune.errors import TopotuneError
from topotune.records import Outcome, TrialSpec, TrialSummary
from topotune.results.description import describe, describe_trial, figures
from topotune.results.leaderboard import Leaderboard
from topotune.search.drive.book import Progress
from topotune.search.figures import draw_search
from topotune.search.place.folder import SearchFolder, write_text
from topotune.search.place.objects.files import TrialFiles
from topotune.search.place.output import OUTPUT_FILE, tidy
from topotune.search.study.rows import summaries
from topotune.tracking.entries import RUNNING, Epoch, Metrics, Tags, now_ms, safe_tags
from topotune.tracking.labels import MODEL, SEARCH, USER, trial_name
from topotune.tracking.outbox import Outbox
from topotune.tracking.pages import NOTE_TAG
from topotune.train.trace import (
    RELAXATION_FILE,
    RELAXATION_FOLDER,
    TRACE_FILE,
    TRACE_FOLDER,
    relaxations,
    step_traces,
)

_log = logging.getLogger(__name__)

LEADERBOARD_EVERY = 10
"""Trials between two renewals of the leaderboard while a search runs; the end always renews it."""
LEADERBOARD_SHARE = 0.05
"""The largest part of the time that renewals may take: each reads all trials."""


def submitter() -> str:
    """Who started this search: TOPOTUNE_USER, which a submitted job carries, else the account."""
    try:
        return os.environ.get("TOPOTUNE_USER") or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"


def budget_text(config: SearchConfig) -> str:
    """What a search may spend, in one form, so that those of equal budget are found by it."""
    budget = config.budget
    limits: list[tuple[float | None, str]] = [
        (budget.trials, "trials"),
        (budget.epochs, "epochs"),
        (budget.wall_clock, "s"),
        (budget.device_seconds, "device-s"),
    ]
    return ", ".join(f"{limit:g} {unit}" for limit, unit in limits if limit is not None)


def leaderboard(folder: SearchFolder, config: SearchConfig) -> Leaderboard:
    """The present leaderboard of a search, from its study."""
    return board_of(summaries(folder, config), config)


def board_of(rows: Sequence[TrialSummary], config: SearchConfig) -> Leaderboard:
    """The leaderboard of a search's trials."""
    return Leaderboard.of(rows, config.name, config.directions)


def recorded(folder: Path, spec: TrialSpec) -> Progress:
    """What the checkpoint in a trial's folder holds; nothing where it cannot be read."""
    from topotune.train.checkpoint import CheckpointStore
    from topotune.train.record import TrialRecord

    try:
        found = CheckpointStore(folder, spec).load_record()
        record = None if found is None else TrialRecord.from_dict(found)
    except (TopotuneError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return Progress()
    if record is None:
        return Progress()
    entries = (*record.entries(), *record.last_series(folder))
    return Progress(record.history, record.overhead.metrics, entries=entries)


class Recorder:
    """Records a search for MLflow and keeps its pages fresh.

    Args:
        folder: the search's folder.
        config: the search.
        fence: called before its thread writes; raises if another driver has taken the search over.
        files: those of the trials, which may lie elsewhere.
        rows: all trials' rows as the driver has them; those of the study on disk by default.
    """

    def __init__(
        self,
        folder: SearchFolder,
        config: SearchConfig,
        fence: Callable[[], None] = lambda: None,
        files: TrialFiles | None = None,
        rows: Callable[[], list[TrialSummary]] | None = None,
    ) -> None:
        self._rows = rows or partial(summaries, folder, config)
        self._folder, self._config, self._fence = folder, config, fence
        self._files = files or TrialFiles(folder)
        self._outbox = Outbox(folder.root, fence)
        self._work: queue.SimpleQueue[TrialSummary | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._ended = self._filed = 0
        self._dropped = threading.Event()
        self._best: dict[str, float] = {}

    def start(self, tags: dict[str, str], files: Sequence[Path] = ()) -> None:
        """Record what is searched, and begin to work.

        Args:
            tags: of the search's own run, besides those that its config gives.
            files: more of its files to keep with the run, under their own paths.
        """
        config = self._config
        params = {
            "task": config.task.name,
            "method": config.method,
            "model": config.model.name,
            "sampler": config.sampler.name,
            "pruner": config.pruner.name,
            "epochs": config.budget.epochs,
            "seed": config.seed,
            "searched": ", ".join(config.space),
            "objective": ", ".join(f"{o.direction} {o.metric}" for o in config.objective),
        }
        # Tags, because a parameter is fixed for ever and a search can be extended.
        changing = {
            "topotune.trials": str(config.budget.trials),
            "topotune.budget": budget_text(config),
            SEARCH: config.name,
            MODEL: config.model.name or "the task's own",
            USER: self._outbox.tag(USER) or submitter(),  # who resumes it did not submit it
        }
        self._outbox.start(None, params, {**tags, **changing})
        root = self._folder.root
        self._outbox.artifact(None, root / "search.yaml")
        for path in files:
            self._outbox.artifact(None, path, path.parent.relative_to(root).as_posix())
        self._thread.start()

    def progress(self, number: int, progress: Progress) -> None:
        """Record what a trial's worker sends; what is recorded is ignored."""
        self._outbox.put(number, *progress.entries, *map(Epoch, progress.reports), force=False)

    def recover(self, finished: list[TrialSummary]) -> None:
        """Record again what a killed driver may have left out; what is recorded is ignored.

        A trial's checkpoint is kept until its end is recorded, and says what this machine's outbox
        lacks, also where that was lost.

        Args:
            finished: rows of the trials.
        """
        ended = [row for row in finished if row.state in {outcome.value for outcome in Outcome}]

        def known(row: TrialSummary) -> bool:
            return self._outbox.has_end(row.number, row.state, row.reason)

        # Trials whose end is recorded ended before the others, in whichever order.
        for row in sorted(ended, key=known, reverse=True):
            if known(row):
                self._count(row)
            else:
                if row.spec:
                    folder = self._files.checkpoint(row.number)
                    self.progress(row.number, recorded(folder, TrialSpec.from_dict(row.spec)))
                self._record_end(row)
            if self._files.has_chunks(row.number):
                self._work.put(row)
        self._describe(board_of(finished, self._config), RUNNING)

    def ended(self, row: TrialSummary) -> None:
        """Record a trial's end; its files follow in the background."""
        self._record_end(row)
        self._work.put(row)

    def _record_end(self, row: TrialSummary) -> None:
        self._count(row)
        # The best so far, with the number of trials that have ended as its step.
        self._outbox.metrics(None, self._best, self._ended, now_ms(), force=False)
        at, config = now_ms(), self._config
        costs = {"device_seconds": row.device_seconds, "epochs_trained": float(row.epochs)}
        tags = {
            "topotune.method": config.method,
            "mlflow.runName": trial_name(row.number, row.state, figures(row)),
            NOTE_TAG: describe_trial(row, config.directions),
        }
        last = (Metrics(costs, 0, at), Tags(safe_tags(tags), at))
        self._outbox.end(row.number, row.state, row.reason, *last)

    def _count(self, row: TrialSummary) -> None:
        """A trial that has ended, which may be the best so far."""
        self._ended += 1
        if row.state == Outcome.COMPLETE and not row.violated:
            for objective, value in zip(self._config.objective, row.values, strict=False):
                name = f"best_{objective.metric}"
                better = max if objective.direction == "maximize" else min
                self._best[name] = better(self._best.get(name, value), value)

    def drop(self) -> None:
        """Finish what the thread is at and leave the rest: another driver records from here on."""
        self._dropped.set()
        self._join()

    def close(self, board: Leaderboard, outcome: str, reason: str) -> None:
        """Finish the files, renew the leaderboard and record how the search ended.

        Where it has not come to its end, files that are not made by now are left to the resume,
        which finds them missing.

        Args:
            board: the final leaderboard.
            outcome: COMPLETE, INTERRUPTED or FAILED.
            reason: why it has ended early; empty otherwise.

        Raises:
            TopotuneError: the outbox cannot be written.
        """
        if outcome != Outcome.COMPLETE:
            self._dropped.set()
        self._join()
        try:
            self._renew(board, outcome)
        except Exception as error:  # noqa: BLE001 - the numbers are in study and outbox
            _log.warning("a page of the search is missing: %s", error)
        spent = {"device_seconds": board.device_seconds}
        self._outbox.metrics(None, spent, self._ended, now_ms())
        self._outbox.end(None, outcome, reason)

    def _join(self) -> None:
        """Wait until the thread has ended."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        again = 0.0
        while (row := self._work.get()) is not None and not self._dropped.is_set():
            try:
                self._finish_trial(row)
                self._filed += 1
                if self._filed % LEADERBOARD_EVERY == 1 and (began := time.monotonic()) >= again:
                    self._renew(board_of(self._rows(), self._config), RUNNING)
                    now = time.monotonic()
                    again = now + (now - began) / LEADERBOARD_SHARE
            except Exception as error:  # noqa: BLE001 - a page must not end a search
                _log.warning("trial %d: its files are missing: %s", row.number, error)
            finally:
                self._outbox.forget(row.number)

    def _finish_trial(self, row: TrialSummary) -> None:
        self._files.fetch(row.number)
        trial = self._folder.trial(row.number)
        if row.state == Outcome.FAILED:
            tidy(trial / OUTPUT_FILE)  # its worker may have been killed
        kinds = (
            (TRACE_FOLDER, step_traces(trial), trial / TRACE_FILE),
            (RELAXATION_FOLDER, relaxations(trial), trial / RELAXATION_FILE),
        )
        for chunks, epochs, joined in kinds:
            last = epochs.last
            if self._dropped.is_set() or not (last and epochs.join(last, joined)):
                continue
            self._fence()
            self._outbox.artifact(row.number, joined)
            # Renamed first: a kill half-way through must not leave chunks that look like all.
            used = (trial / chunks).rename(trial / f"{chunks}.used")
            shutil.rmtree(used)
            self._files.forget(row.number, f"{chunks}/")

    def _describe(self, board: Leaderboard, outcome: str) -> None:
        """Tell on the search's page how it stands."""
        name = self._config.name
        go_on = f"topotune resume {name}" if outcome not in (RUNNING, Outcome.COMPLETE) else ""
        note = describe(board, outcome, self._config.description or "", go_on)
        counts = [f"{n} {state.lower()}" for state, n in board.counts.items() if n]
        best = ", ".join(str(trial.number) for trial in board.front) or "none"
        known = {"topotune.counts": ", ".join(counts), "topotune.best_trial": best}
        self._outbox.tags(None, {NOTE_TAG: note, **known})

    def _renew(self, board: Leaderboard, outcome: str) -> None:
        self._fence()
        root = self._folder.root
        write_text(root / "leaderboard.json", board.to_json())
        write_text(root / "leaderboard.md", board.to_markdown())
        self._outbox.artifact(None, root / "leaderboard.json")
        self._outbox.artifact(None, root / "leaderboard.md")
        self._describe(board, outcome)
        if outcome == Outcome.COMPLETE:
            for picture in draw_search(board, root):
                self._outbox.artifact(None, picture)
