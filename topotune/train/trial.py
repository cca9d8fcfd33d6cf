"""One trial, from its spec to its result: the composition root. Runs the same in any process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from topotune.data.splits import data_tags
from topotune.errors import CheckpointError, DivergedError, OutboxError, StoppedError
from topotune.files import make_folder
from topotune.records import (
    EpochReport,
    Outcome,
    TrialResult,
    TrialSpec,
)
from topotune.tracking.entries import Series, Start, begun, now_ms
from topotune.train.assemble import (
    assemble,
    check_spec,
)
from topotune.train.checkpoint import CheckpointStore
from topotune.train.loop import TIMING_METRICS, TrainingLoop
from topotune.train.methods import build_method
from topotune.train.overhead import Overhead, overhead_of
from topotune.train.process import (
    capture_generators,
    provenance,
    reset_process_state,
    resolve_device,
    restore_generators,
)
from topotune.train.record import TrialRecord
from topotune.train.trace import EpochRecord, thinned

__all__ = [
    "TIMING_METRICS",
    "TrialRun",
    "open_trial",
    "run_trial",
]


class TrialRun:
    """A trial opened for training; :func:`open_trial` makes it.

    Iterate over :meth:`reports`, then call :meth:`finish`. :func:`run_trial` does both; a worker
    that must talk to a scheduler between epochs does them itself.

    Attributes:
        spec: what is trained.
        restored: epochs that came from the checkpoint; a report whose ``epoch`` is not above
            this is a replay.
    """

    def __init__(
        self,
        spec: TrialSpec,
        folder: Path | None,
        beat: Callable[[], None],
        tags: Mapping[str, str],
    ) -> None:
        self.spec = spec
        self._beat = beat
        self._folder = folder
        self._device = resolve_device(spec.device)
        reset_process_state(spec.seed, spec.threads, self._device)
        self._method = build_method(spec)
        self._parts = assemble(self._method, self._device)
        self._start = self._begin(tags)
        if folder is not None:
            make_folder(folder)
        self._loop = TrainingLoop(self._parts, spec.train, spec.epochs, spec.seed, beat)
        self._history: list[EpochReport] = []
        self._overhead: Overhead | None = None
        self._result: TrialResult | None = None
        self._store = None if folder is None else CheckpointStore(folder, spec)
        self._record = None if folder is None else EpochRecord(folder)
        state = None if self._store is None else self._store.load_or_restart()
        if state is not None:
            self._restore(state)
        self._generators = capture_generators(self._device)
        self.restored = len(self._history)

    def _begin(self, tags: Mapping[str, str]) -> Start:
        found = {
            "seed": str(self.spec.seed),
            **provenance(self._device),
            **data_tags(self._parts.train, self._parts.val),
            **tags,
        }
        resolved = self._method.resolved(self._parts.model)
        return begun({**self.spec.table(), **resolved}, found, now_ms())

    @property
    def record(self) -> TrialRecord:
        """What is known of the trial by now; its overhead once :meth:`reports` has begun."""
        overhead = self._overhead or Overhead({}, 0)
        return TrialRecord(self._start, overhead, tuple(self._history))

    def series(self, at: int) -> Series:
        """The steps of the epoch that was trained last, whole or broken off, for a chart.

        Args:
            at: when it ended, Unix milliseconds.
        """
        trace = self._loop.trace
        return Series(thinned(trace.columns()) if len(trace) else {}, at)

    @property
    def history(self) -> tuple[EpochReport, ...]:
        """The reports of all finished epochs, restored ones included."""
        return tuple(self._history)

    def reports(self) -> Iterator[EpochReport]:
        """Yield every epoch's report: first those already known, then each as it is trained.

        A new epoch is trained and evaluated, its step trace and its learner's curves written, its
        checkpoint written with the report in its history, then yielded. So an epoch that was
        checkpointed is never trained again, and one that was checkpointed but perhaps not reported
        is reported again with the same values. What the consumer does to the global random
        generators between epochs has no effect on the training.

        Raises:
            DivergedError: training left the finite numbers or its energy bound; call
                ``finish(Outcome.DIVERGED, str(error))``.
            StoppedError: the learner refuses another epoch; call
                ``finish(Outcome.PRUNED, str(error))``.
            CheckpointError: a checkpoint cannot be written.
        """
        if self._overhead is None:
            self._overhead = Overhead(self._measure(), now_ms())
        yield from tuple(self._history)
        restore_generators(self._generators, self._device)
        try:
            for trained in self._loop.run():
                report = self._in_order(trained)
                self._generators = capture_generators(self._device)
                self._save(report)
                self._history.append(report)
                yield report
                restore_generators(self._generators, self._device)
        except DivergedError:
            if self._record is not None:
                self._record.write_steps(len(self._history) + 1, self._loop.trace)
            raise

    def _in_order(self, report: EpochReport) -> EpochReport:
        """The report, not stamped before the one before it: a clock may be set back."""
        before = self._history[-1].timestamp_ms if self._history else 0
        return replace(report, timestamp_ms=max(report.timestamp_ms, before))

    def complete(self, on_epoch: Callable[[EpochReport], bool] | None = None) -> TrialResult:
        """Train to the end, as :func:`run_trial` says."""
        epochs = self.spec.epochs
        try:
            for report in self.reports():
                go_on = on_epoch is None or on_epoch(report)
                if not go_on and report.epoch < epochs:
                    reason = f"stopped after epoch {report.epoch} of {epochs} on request"
                    return self.finish(Outcome.PRUNED, reason)
        except DivergedError as cause:
            return self.finish(Outcome.DIVERGED, str(cause))
        except StoppedError as cause:
            return self.finish(Outcome.PRUNED, str(cause))
        return self.finish(Outcome.COMPLETE)

    def finish(self, outcome: Outcome, reason: str = "") -> TrialResult:
        """Join the trial's files an epoch. Later calls change nothing.

        Returns:
            The result, its metrics being the last epoch's and the overhead's.
        """
        if self._result is None:
            if self._record is not None:
                self._record.join(len(self._history))
            metrics = dict(self._history[-1].metrics) if self._history else {}
            self._result = TrialResult(
                outcome, reason, self.history, metrics | self.overhead_metrics()
            )
        return self._result

    def overhead_metrics(self) -> dict[str, float]:
        """The measured overhead; empty before :meth:`reports` began or with ``blocks=0``."""
        return dict(self._overhead.metrics) if self._overhead else {}

    def weights(self) -> dict[str, Tensor]:
        """The model's present ``state_dict`` as CPU tensors of its own."""
        state = self._parts.model.state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def _measure(self) -> dict[str, float]:
        """Once a trial: the first checkpoint keeps it, so that a resume repeats it."""
        return overhead_of(self._method, self._parts, self.spec.overhead, self._beat)

    def _save(self, report: EpochReport) -> None:
        if self._record is not None:
            self._record.write_steps(report.epoch, self._loop.trace)
            self._record.write_curves(report.epoch, self._parts.learner.curves(self._parts.model))
        if self._store is not None:
            self._store.save(
                {
                    "model": self._parts.model.state_dict(),
                    "optimizer": self._parts.optimizer.state_dict(),
                    "learner": self._parts.learner.state_dict(),
                    "loop": self._loop.state_dict(),
                    "generators": self._generators,
                },
                replace(self.record, history=(*self._history, report)).to_dict(),
            )

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            self._parts.model.load_state_dict(state["model"])
            self._parts.optimizer.load_state_dict(state["optimizer"])
            self._parts.learner.load_state_dict(state["learner"])
            self._loop.load_state_dict(state["loop"])
            known = TrialRecord.from_dict(state)
            self._history, self._overhead = list(known.history), known.overhead
            restore_generators(state["generators"], self._device)
        except (
            RuntimeError,
            OutboxError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise CheckpointError(
                f"checkpoint in {self._folder}: does not fit the model, optimizer or learner that "
                f"this spec builds now: {error}. Their code has changed since: use another folder"
            ) from error


def open_trial(
    spec: TrialSpec,
    folder: Path | None = None,
    beat: Callable[[], None] = lambda: None,
    tags: Mapping[str, str] | None = None,
) -> TrialRun:
    """Build a trial and restore its newest checkpoint, if its folder has one.

    Resets the process's global state first (see :func:`reset_process_state`), so that a trial
    does not depend on what ran before it.

    Args:
        spec: what to train.
        folder: the trial's own folder, for checkpoints and the step trace; None writes nothing.
        beat: called at every sign of progress, many times an epoch.
        tags: what is recorded besides device, versions and data, such as whose code it is.

    Raises:
        UserError: the spec names something that does not exist or breaks a rule.
        CheckpointError: the folder's checkpoints belong to another spec.
    """
    check_spec(spec)
    return TrialRun(spec, folder, beat, tags or {})


def run_trial(
    spec: TrialSpec,
    folder: Path | None = None,
    on_epoch: Callable[[EpochReport], bool] | None = None,
) -> TrialResult:
    """Train one trial to its end, in this process.

    Args:
        spec: what to train.
        folder: the trial's own folder; with one, a trial that was interrupted goes on from its
            last finished epoch, and its result is what it would have been without interruption.
        on_epoch: called with every report, replayed ones included; returning False stops the
            trial as PRUNED. The answer to the last epoch's report stops nothing.

    Returns:
        COMPLETE; PRUNED if ``on_epoch`` or the learner stopped it; DIVERGED with the cause. Any
        other exception is the caller's to judge and passes through.

    Raises:
        UserError: as :func:`open_trial`.
        CheckpointError: as :func:`open_trial`, or a checkpoint cannot be written.
    """
    return open_trial(spec, folder).complete(on_epoch)
