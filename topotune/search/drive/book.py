"""The decisions of a search, without Ray: what runs next, what stops, how each trial ended.

The Ray adapters and the driver call this object from one thread. It holds only what can be
rebuilt from the study and the trials' folders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from topotune.config.models import SearchConfig
from topotune.config.rules import planned_trials
from topotune.errors import ConfigError, RunError, TopotuneError, did_you_mean
from topotune.records import (
    EpochReport,
    Outcome,
    TrialSpec,
    TrialSummary,
    pack_metrics,
    unpack_metrics,
)
from topotune.redaction import redact
from topotune.search.drive.outlook import Outlook
from topotune.search.study.deaths import RETRIED, Cause, Death, restarts, verdict
from topotune.search.study.ledger import Ledger
from topotune.search.study.store import Handout, StudyStore
from topotune.search.view import RunningTrial, SearchView
from topotune.tracking.entries import Body, Entry, from_payload, to_payload


@dataclass(frozen=True)
class Progress:
    """What a worker sends after each step: reports that may repeat, and perhaps the end.

    ``stop`` is why no trial can go on where this worker is (a full disk, a damaged checkpoint):
    the search stops, and the trial stays to be resumed. ``entries`` are for MLflow alone.
    """

    reports: tuple[EpochReport, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    outcome: Outcome | None = None
    reason: str = ""
    stop: str = ""
    entries: tuple[Body, ...] = ()

    def to_json(self) -> str:
        """Strict JSON."""
        return json.dumps(
            {
                "reports": [report.to_dict() for report in self.reports],
                "metrics": pack_metrics(self.metrics),
                "outcome": self.outcome,
                "reason": redact(self.reason),
                "stop": redact(self.stop),
                "entries": [to_payload(Entry(None, body)) for body in self.entries],
            },
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """The inverse of :meth:`to_json`."""
        data: dict[str, Any] = json.loads(text)
        return cls(
            tuple(EpochReport.from_dict(report) for report in data["reports"]),
            unpack_metrics(data["metrics"]),
            Outcome(data["outcome"]) if data["outcome"] else None,
            data["reason"],
            data["stop"],
            tuple(from_payload(entry).body for entry in data["entries"]),
        )


class Turn(Enum):
    """The answer to "what next": wait for a slot, or nothing is left."""

    WAIT = "wait"
    END = "end"


@dataclass
class _Live:
    spec: TrialSpec
    params: Mapping[str, Any]
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    verdict: tuple[Outcome, str] | None = None
    left_running: bool = False
    handed_back: bool = False
    alone: bool = False


class Book:
    """Keeps the search's books.

    Args:
        config: the search.
        store: its study.
        ledger: its device seconds.
        concurrency: trials at once; may be changed while the search runs.
        ended: called with the row of each trial that ended.
        finished: rows of trials that had ended before.

    Attributes:
        live: the trials in flight.
        holding: those of them that hold a device.
        unplaced: how many wait for Ray to give them one.
        shared: the cluster is used by others, too: a slot that is not to be filled is given back.
        contested: other searches wait for their share of the cluster: trials above
            ``concurrency`` end after their epoch, and go on from there when there is room.
        stopping: why the search drains; empty while it does not.
        left_running: trials in flight that were left to a resume.
        fatal: what ends the search.
        record: called with what a worker sends, before the study takes it in.
    """

    def __init__(
        self,
        config: SearchConfig,
        store: StudyStore,
        ledger: Ledger,
        concurrency: int,
        ended: Callable[[TrialSummary], None],
        finished: list[TrialSummary],
    ) -> None:
        self.config, self.store, self.ledger = config, store, ledger
        self.concurrency, self._ended = concurrency, ended
        self.live: dict[int, _Live] = {}
        self.holding: set[int] = set()
        self.unplaced = 0
        self.stopping = ""
        self.left_running = 0
        self.shared = self.contested = False
        self.fatal: TopotuneError | None = None
        self.record: Callable[[int, Progress], None] = lambda number, progress: None
        self._outlook = Outlook(config, finished)

    def take_over(self, recorded: Callable[[int], Progress]) -> None:
        """Take in what an earlier session's workers had recorded and its driver had not heard of,
        by trial number; before anything is handed out. A trial that ends by it needs no worker.

        Args:
            recorded: a trial's epochs and other metrics by its number, as its worker left them.
        """
        unfinished = []
        for handout in self.store.begun():
            number, spec = handout.number, handout.spec
            live = self.live[number] = _Live(spec, self.store.params(number))
            progress = recorded(number)
            if progress.reports:
                self.progress(number, progress)
            if live.verdict is None and live.epoch >= spec.epochs:
                live.verdict = (Outcome.COMPLETE, "")
            if live.verdict is None:
                del self.live[number]
                unfinished.append(number)
            else:
                self.end(number)
        for number in reversed(unfinished):
            self.store.hand_back(number)

    def next(self) -> Handout | Turn:
        """The next trial to run, or why none can run now."""
        if self.stopping or self.fatal:
            return Turn.END
        if over := self._over_budget():
            # Trials that an earlier session left running can have no more time either.
            closed = self.store.close_orphans(Outcome.PRUNED, over, self.ledger.trials)
            self.store.commit(force=True)
            for row in closed:
                self._close(row)
            return Turn.END
        # Trials that share a GPU would never leave it to the one that waits for a whole one.
        if self.full or self.waits_alone:
            return Turn.WAIT
        handout = self.store.next()
        if handout is None:
            return Turn.END
        self.store.commit()
        self.live[handout.number] = _Live(handout.spec, self.store.params(handout.number))
        if handout.alone:
            self._part(handout.number)
        return handout

    @property
    def waits_alone(self) -> bool:
        """Whether a trial waits for a device that it shares with no other."""
        return any(live.alone and number not in self.holding for number, live in self.live.items())

    def _part(self, number: int) -> None:
        """From now on a trial shares its device with no other."""
        self.live[number].alone = True
        self.ledger.alone.add(number)

    @property
    def full(self) -> bool:
        """Whether no more trials are handed out before one ends."""
        return len(self.live) >= self.concurrency

    def stop(self, reason: str) -> None:
        """Hand out nothing more; trials in flight stop after their epoch and stay resumable."""
        self.stopping = self.stopping or reason

    def short_of_trials(self) -> str:
        """Why nothing more is handed out though the budget has more trials; empty while it is."""
        trials = self.config.budget.trials
        if trials is not None and self.store.started >= trials:
            return ""
        if over := self._over_budget():
            return over
        if self.store.left == 0:
            return f"all {self.store.started} points of the grid have been tried"
        return ""

    def _over_budget(self) -> str:
        """Which limit of time is reached; empty while none is."""
        budget = self.config.budget
        if budget.wall_clock is not None and self.ledger.wall_seconds >= budget.wall_clock:
            return f"budget.wall_clock of {budget.wall_clock:g} s is used up"
        if budget.device_seconds is not None:
            spent = self.ledger.device_seconds
            if spent >= budget.device_seconds:
                return f"budget.device_seconds of {budget.device_seconds:g} is used up"
        return ""

    def progress(self, number: int, progress: Progress) -> bool:
        """Take a worker's step in; whether the trial may go on."""
        self.record(number, progress)
        goes_on = self._progress(self.live[number], number, progress)
        if goes_on:  # else nothing is done before end() commits it
            self.store.commit()
        return goes_on

    def _progress(self, live: _Live, number: int, progress: Progress) -> bool:
        for report in progress.reports:
            if report.epoch > live.epoch and live.verdict is None:
                # A restarted worker gives all its epochs at once, and a study whose driver was
                # killed lacks some of them: the trials that came since must not judge the old ones.
                judged = report is progress.reports[-1]
                self._take(number, live, report, progress.metrics, judged)
        live.metrics.update(progress.metrics)
        if progress.stop:
            self.fatal = self.fatal or RunError(f"trial {number}: {progress.stop}")
        if live.verdict is None and progress.outcome is not None:
            live.verdict = (progress.outcome, progress.reason)
        if live.verdict is not None:
            return False
        if self.stopping or self.fatal:
            live.left_running = True
            return False
        if over := self._over_budget():
            live.verdict = (Outcome.PRUNED, over)
            return False
        kept = sum(not self.live[one].handed_back for one in self.holding if one in self.live)
        live.handed_back = live.handed_back or (self.contested and kept > self.concurrency)
        return not live.handed_back

    def _take(
        self,
        number: int,
        live: _Live,
        report: EpochReport,
        extra: Mapping[str, float],
        judged: bool,
    ) -> None:
        live.epoch = report.epoch
        live.metrics.update(report.metrics)
        live.metrics.update(extra)
        for objective in self.config.objective:
            value = live.metrics.get(objective.metric)
            if value is None:
                names = sorted(live.metrics)
                reason = f"metric {objective.metric!r} was not reported"
                live.verdict = (Outcome.FAILED, reason)
                self.fatal = ConfigError(
                    "objective.metric",
                    f"the trials report no {objective.metric!r}"
                    + did_you_mean(objective.metric, names),
                )
                return
            if not math.isfinite(value):
                reason = f"{objective.metric} is {value} after epoch {report.epoch}"
                live.verdict = (Outcome.DIVERGED, reason)
                return
        if self.store.known(number, report.epoch):
            return  # judged when it was new; the study has moved on since
        verdict = None
        if judged and report.epoch < live.spec.epochs and self.store.stops(number, report):
            reason = f"{self.config.pruner.name} after epoch {report.epoch} of {live.spec.epochs}"
            verdict = Outcome.PRUNED, reason
            # Before the report: a kill between the two loses neither it nor its verdict.
            seconds = self.ledger.trials.get(number, 0.0)
            self.store.note_end(number, *verdict, live.metrics, report.epoch, seconds, report)
        self.store.report(number, report)
        live.verdict = verdict

    def died(
        self, number: int, death: Death, recorded: Callable[[], Sequence[EpochReport]] = tuple
    ) -> str:
        """A trial's worker died; a line on whether it is tried again.

        Deaths are counted in the study, each cause for itself, so that a resumed search goes on
        counting; while the search stops nothing is counted, as it ends workers itself. Ask
        :meth:`over` before a worker is started again.

        Args:
            number: the trial.
            death: of its worker.
            recorded: all epochs of its checkpoint, the last of which the worker may not have
                reported; asked for where it is not tried again.
        """
        live = self.live[number]
        if (self.stopping or self.fatal) and death.cause in RETRIED:
            live.left_running = True
            return f"trial {number} is cut short; a resume goes on from its last epoch"
        times = self.store.count_death(number, death.cause)[death.cause]
        self.store.commit()
        left = restarts(self.config.budget, death.cause) - times
        if left < 0:
            for report in recorded():
                if report.epoch > live.epoch and live.verdict is None:
                    self._take(number, live, report, {}, judged=False)
            if live.verdict is None and live.epoch >= live.spec.epochs:
                live.verdict = (Outcome.COMPLETE, "")
                return f"trial {number}: {verdict(death, times)}, after its last epoch"
            live.verdict = live.verdict or (Outcome.FAILED, verdict(death, times))
            return f"trial {number} is given up: {verdict(death, times)}"
        where = ""
        if death.cause is Cause.GPU_MEMORY:
            self._part(number)
            where = ", alone on a device"
        return (
            f"trial {number}: {verdict(death, 1)}; it goes on from its last epoch{where} "
            f"({left} more {'restart' if left == 1 else 'restarts'} allowed)"
        )

    def over(self, number: int) -> bool:
        """Whether a trial must not be started again."""
        live = self.live.get(number)
        return live is None or live.verdict is not None or live.left_running or live.handed_back

    def end(self, number: int, error: str = "") -> TrialSummary | None:
        """A trial gave its slot back; its row, or None if it stays running for a resume.

        Args:
            number: the trial.
            error: why its worker is gone for good; empty if it ended by itself.
        """
        live = self.live.get(number)
        self.holding.discard(number)
        if live is None:
            return None
        unfinished = live.left_running or self.stopping or self.fatal
        if live.verdict is None and not error and (unfinished or live.handed_back):
            if unfinished:
                self.left_running += 1
            else:
                self.store.hand_back(number)
            self.store.commit()
            del self.live[number]
            return None
        outcome, reason = live.verdict or (Outcome.FAILED, error or "the worker ended early")
        if outcome is Outcome.COMPLETE and live.epoch < live.spec.epochs:
            outcome, reason = Outcome.FAILED, f"ended after epoch {live.epoch} without a reason"
        seconds = self.ledger.trials.get(number, 0.0)
        row = self.store.finish(number, outcome, reason, live.metrics, live.epoch, seconds)
        self.store.commit(force=True)  # its records follow, and checkpoints go
        del self.live[number]
        self._close(row)
        return row

    def _close(self, row: TrialSummary) -> None:
        self._outlook.ended(row)
        self._ended(row)

    def view(self, phase: str, waiting: str = "", tracking: str = "") -> SearchView:
        """A snapshot to show.

        Args:
            phase: "starting", "running", "draining" or "done".
            waiting: why something waits; empty if nothing does.
            tracking: one line on the tracking server.
        """
        names = [objective.metric for objective in self.config.objective]
        running = tuple(
            RunningTrial(
                number,
                live.epoch,
                tuple(live.metrics.get(name) for name in names),
                live.params,
                number in self.holding,
            )
            for number, live in self.live.items()
        )
        left = self.store.left
        return SearchView(
            name=self.config.name,
            phase=phase,
            counts={**self._outlook.counts, "RUNNING": len(self.holding)},
            total=planned_trials(self.config),
            epochs=self.config.budget.epochs,
            front=tuple(self._outlook.front),
            running=running,
            device_seconds=self.ledger.device_seconds,
            wall_seconds=self.ledger.wall_seconds,
            eta_seconds=None if left is None else self._outlook.eta(left + len(running) / 2),
            waiting=waiting,
            tracking=tracking,
            objectives=self._outlook.objectives,
        )
