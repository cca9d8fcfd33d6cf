"""One trial, from its spec to its result: the composition root. Runs the same in any process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from topotune.data.splits import TensorPair, data_tags
from topotune.errors import CheckpointError, DivergedError, StoppedError
from topotune.files import make_folder
from topotune.records import (
    EpochReport,
    Outcome,
    TrialResult,
    TrialSpec,
)
from topotune.tracking.base import NullTracker, Tracker
from topotune.train.assemble import (
    assemble,
    check_spec,
    preflight,
    probe_rows,
    resolved_params,
)
from topotune.train.checkpoint import CheckpointStore
from topotune.train.generators import capture_generators, restore_generators
from topotune.train.loop import TIMING_METRICS, TrainingLoop
from topotune.train.method import Contender
from topotune.train.methods import build_method
from topotune.train.overhead import Overhead, measure_overhead, read_overhead, write_overhead
from topotune.train.process import provenance, reset_process_state, resolve_device
from topotune.train.trace import EpochRecord

__all__ = [
    "TIMING_METRICS",
    "TrialRun",
    "open_trial",
    "preflight",
    "run_trial",
]

OVERHEAD_FILE = "overhead.json"


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
        tracker: Tracker,
        folder: Path | None,
        beat: Callable[[], None],
        tags: Mapping[str, str],
    ) -> None:
        self.spec, self._more_tags = spec, tags
        self._beat = beat
        self._tracker = tracker
        self._folder = folder
        self._device = resolve_device(spec.device)
        reset_process_state(spec.seed, spec.threads, self._device)
        self._method = build_method(spec)
        self._parts = assemble(self._method, self._device)
        self._resolved = self._method.resolved(self._parts.model)
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

    @property
    def history(self) -> tuple[EpochReport, ...]:
        """The reports of all finished epochs, restored ones included."""
        return tuple(self._history)

    def reports(self) -> Iterator[EpochReport]:
        """Yield every epoch's report: first those already known, then each as it is trained.

        A new epoch is trained and evaluated, its step trace and its learner's curves written, its
        checkpoint written with the report in its history, then given to the tracker, then
        yielded. So an epoch that was checkpointed is never trained again, and one that was
        checkpointed but perhaps not reported is reported again with the same values. What the
        consumer does to the global random generators between epochs has no effect on the
        training.

        Raises:
            DivergedError: training left the finite numbers or its energy bound; call
                ``finish(Outcome.DIVERGED, str(error))``.
            StoppedError: the learner refuses another epoch; call
                ``finish(Outcome.PRUNED, str(error))``.
            CheckpointError: a checkpoint cannot be written.
        """
        self._begin()
        for report in tuple(self._history):
            self._tracker.epoch(report)
            yield report
        restore_generators(self._generators, self._device)
        try:
            for trained in self._loop.run():
                report = self._in_order(trained)
                self._generators = capture_generators(self._device)
                self._save(report)
                self._history.append(report)
                self._tracker.epoch(report)
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

    def finish(self, outcome: Outcome, reason: str = "") -> TrialResult:
        """Hand the trial's files and the outcome to the tracker. Later calls change nothing.

        Returns:
            The result, its metrics being the last epoch's and the overhead's.
        """
        if self._result is None:
            if self._record is not None:
                for path in self._record.join(len(self._history)):
                    self._tracker.artifact(path)
            self._tracker.end(outcome, reason)
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

    def _begin(self) -> None:
        self._tracker.start(resolved_params(self.spec, self._resolved), self._tags())
        if self._overhead is None:
            self._overhead = self._find_overhead()
        if self._overhead.metrics:
            self._tracker.metrics(self._overhead.metrics, 0, self._overhead.timestamp_ms)

    def _tags(self) -> dict[str, str]:
        return {
            "seed": str(self.spec.seed),
            **provenance(self._device),
            **data_tags(self._parts.train, self._parts.val),
            **self._more_tags,
        }

    def _find_overhead(self) -> Overhead:
        """Measured once a trial: kept before it is reported, so that a resume repeats it."""
        path = None if self._folder is None else self._folder / OVERHEAD_FILE
        known = None if path is None else read_overhead(path)
        if known is not None:
            return known
        parts, spec, method = self._parts, self.spec, self._method
        probe = probe_rows(parts.task, parts.train)
        rows = parts.train.rows(0, spec.train.batch_size)
        metrics = measure_overhead(
            parts.model,
            TensorPair(parts.task.prepare(rows.inputs), rows.targets),
            Contender(method.optimizer, lambda: method.learner(parts.task, probe)),
            method.contenders(parts.task, probe, self._device),
            spec.overhead,
            self._beat,
        )
        measured = Overhead(metrics, time.time_ns() // 1_000_000)
        if path is not None:
            write_overhead(path, measured)
        return measured

    def _save(self, report: EpochReport) -> None:
        if self._record is not None:
            self._record.write_steps(report.epoch, self._loop.trace)
            self._record.write_curves(report.epoch, self._parts.learner.curves(self._parts.model))
        overhead = self._overhead
        assert overhead is not None  # reports() measures or reads it before the first epoch
        if self._store is not None:
            self._store.save(
                {
                    "model": self._parts.model.state_dict(),
                    "optimizer": self._parts.optimizer.state_dict(),
                    "learner": self._parts.learner.state_dict(),
                    "loop": self._loop.state_dict(),
                    "generators": self._generators,
                    "history": [known.to_json() for known in (*self._history, report)],
                    "overhead": overhead.to_dict(),
                }
            )

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            self._parts.model.load_state_dict(state["model"])
            self._parts.optimizer.load_state_dict(state["optimizer"])
            self._parts.learner.load_state_dict(state["learner"])
            self._loop.load_state_dict(state["loop"])
            self._history = [EpochReport.from_json(text) for text in state["history"]]
            self._overhead = Overhead.from_dict(state["overhead"])
            restore_generators(state["generators"], self._device)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint in {self._folder}: does not fit the model, optimizer or learner that "
                f"this spec builds now: {error}. Their code has changed since: use another folder"
            ) from error


def open_trial(
    spec: TrialSpec,
    tracker: Tracker | None = None,
    folder: Path | None = None,
    beat: Callable[[], None] = lambda: None,
    tags: Mapping[str, str] | None = None,
) -> TrialRun:
    """Build a trial and restore its newest checkpoint, if its folder has one.

    Resets the process's global state first (see :func:`reset_process_state`), so that a trial
    does not depend on what ran before it.

    Args:
        spec: what to train.
        tracker: where reports go; None keeps nothing.
        folder: the trial's own folder, for checkpoints and the step trace; None writes nothing.
        beat: called at every sign of progress, many times an epoch.
        tags: what the tracker is given besides device, versions and data, such as whose code it is.

    Raises:
        UserError: the spec names something that does not exist or breaks a rule.
        CheckpointError: the folder's checkpoints belong to another spec.
    """
    check_spec(spec)
    tracker = NullTracker() if tracker is None else tracker
    return TrialRun(spec, tracker, folder, beat, tags or {})


def run_trial(
    spec: TrialSpec,
    tracker: Tracker | None = None,
    folder: Path | None = None,
    on_epoch: Callable[[EpochReport], bool] | None = None,
) -> TrialResult:
    """Train one trial to its end, in this process.

    Args:
        spec: what to train.
        tracker: where reports go; None keeps nothing.
        folder: the trial's own folder; with one, a trial that was interrupted goes on from its
            last finished epoch, and its result is what it would have been without interruption.
        on_epoch: called with every report, replayed ones included; returning False stops the
            trial as PRUNED. The answer to the last epoch's report stops nothing.

    Returns:
        COMPLETE; PRUNED if ``on_epoch`` or the learner stopped it; DIVERGED with the cause. Any
        other exception is the caller's to judge and passes through; the tracker then gets no end.

    Raises:
        UserError: as :func:`open_trial`.
        CheckpointError: as :func:`open_trial`, or a checkpoint cannot be written.
    """
    run = open_trial(spec, tracker, folder)
    try:
        for report in run.reports():
            go_on = on_epoch is None or on_epoch(report)
            if not go_on and report.epoch < spec.epochs:
                reason = f"stopped after epoch {report.epoch} of {spec.epochs} on request"
                return run.finish(Outcome.PRUNED, reason)
    except DivergedError as cause:
        return run.finish(Outcome.DIVERGED, str(cause))
    except StoppedError as cause:
        return run.finish(Outcome.PRUNED, str(cause))
    return run.finish(Outcome.COMPLETE)
