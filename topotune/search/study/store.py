"""The owner of the Optuna study: every state change of a trial goes through here.

The study is the source of truth. Ray holds nothing that a restart would need: a trial that was
running when its driver died is found RUNNING here and handed out again.

How outcomes are stored, so that every sampler learns from them: COMPLETE with its values; PRUNED
with its curve; DIVERGED and FAILED as COMPLETE with the worst values of the finished trials and a
violated constraint ``finished`` (before any trial has finished: PRUNED with the constraint),
because Optuna's samplers ignore the state FAIL and would walk back to the same place. The user
attribute ``outcome`` says which it was, and only that is ever shown.

What is changed is committed in turns (:meth:`StudyStore.commit`), before anything is done on the
strength of it. Between any two writes the driver may be killed, and the search that goes on is the
undisturbed one: a report and its verdict are one write, a noted end is settled at the next opening,
and a trial that was being sampled is sampled again from the beginning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from topotune.config.models import SearchConfig
from topotune.records import (
    EpochReport,
    Outcome,
    TrialSpec,
    TrialSummary,
    Value,
    pack_metrics,
    unpack_metrics,
)
from topotune.search.place.addresses import study_place
from topotune.search.place.folder import SearchFolder
from topotune.search.study.address import study_name
from topotune.search.study.deaths import Cause
from topotune.search.study.patience import Patience
from topotune.search.study.pruner import make_pruner
from topotune.search.study.rows import (
    JUDGED,
    SPENT,
    Spent,
    check_notes,
    constraint_values,
    damaged_record,
    damaged_study,
    note_of,
    reported,
    spent,
    summarise,
)
from topotune.search.study.samplers import make_sampler
from topotune.search.study.space import queued_points, resolve, suggest
from topotune.search.study.storage import open_study


@dataclass(frozen=True)
class Handout:
    """A trial to run: new, or one that an earlier driver left running; ``alone`` on its GPU after
    it ran out of its memory."""

    number: int
    spec: TrialSpec
    alone: bool = False


class StudyStore:
    """One search's study on disk.

    Args:
        folder: the search's folder.
        config: the search.
        gpus: GPUs that a trial holds, for resolving specs.
        patience: how to wait for a database that is away; its ``note`` gets a line on all of the
            study that is mended.
        fence: called before each write; raises if another driver has taken the search over.

    Raises:
        ResourceError: the database cannot be reached or used, or the folder not be written.
        SearchFolderError: the study is damaged, or has lost trials.
    """

    def __init__(
        self,
        folder: SearchFolder,
        config: SearchConfig,
        gpus: float = 0,
        patience: Patience | None = None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config, self._gpus = config, gpus
        self._directions = [objective.direction for objective in config.objective]
        self._place = study_place(folder, config)
        patience = patience or Patience(self._place)
        self._storage, self._journal = open_study(folder, config, patience, fence)
        self._study = self._open(study_name(folder, config))
        self._name_metrics()
        self._enqueue()
        frozen = self._study.get_trials(deepcopy=False)
        self._worst: list[float] | None = None
        self._pruner = make_pruner(config)
        for trial in frozen:
            check_notes(trial, self._place, len(self._directions))
            self._learn(trial)
            before = 0
            for epoch, value in _curve(trial).items():
                self._pruner.reported(trial.number, before, epoch, value)
                before = epoch
        self._waiting = sum(t.state == TrialState.WAITING for t in frozen)
        self._started = len(frozen) - self._waiting
        self._trials: dict[int, Trial] = {}
        self._orphans: list[int] = []
        for trial in frozen:
            if trial.state == TrialState.RUNNING and not self._settle(trial):
                self._orphans.append(trial.number)
        self.commit()

    def _open(self, name: str) -> Study:
        # Optuna would try to create it each time, and leave a record of that in the journal.
        known = name in [study.study_name for study in self._storage.get_all_studies()]
        pruner = optuna.pruners.NopPruner()  # ours decides, see topotune.search.study.pruner
        if known:
            return optuna.load_study(study_name=name, storage=self._storage, pruner=pruner)
        return optuna.create_study(
            storage=self._storage, study_name=name, directions=self._directions, pruner=pruner
        )

    def commit(self, force: bool = False) -> None:
        """Have all changes up to now on disk, before something is done on the strength of them.

        Args:
            force: their copy, too.

        Raises:
            ResourceError: the disk is full, or the folder cannot be written.
            LeaseLostError: another driver has taken the search over.
        """
        self._journal.commit(force)

    def spent(self) -> Spent:
        """What the sessions before this one have spent.

        Raises:
            SearchFolderError: the study's note of it is damaged.
        """
        note = self._storage.get_study_system_attrs(self._study._study_id).get(SPENT)
        try:
            return spent(self._study.get_trials(deepcopy=False), note)
        except ValueError as error:
            raise damaged_study(self._place, "note of its time", error) from None

    def keep_spent(self, spent: Spent) -> None:
        """Store what is spent by now; trials that have ended say it themselves."""
        running = [n for n in spent.trials if n in self._trials or n in self._orphans]
        note: dict[str, Any] = {
            "wall_seconds": round(spent.wall_seconds, 3),
            "trials": {str(number): round(spent.trials[number], 3) for number in running},
        }
        self._storage.set_study_system_attr(self._study._study_id, SPENT, note)
        self.commit()

    def _settle(self, trial: FrozenTrial) -> bool:
        """End a trial whose driver died between the note of its end and the study's own; whether
        it was such a one. Done first of all, so that it is among the rows that ended before."""
        end = trial.user_attrs.get("end")
        if end is None:
            return False
        if JUDGED in end:
            self._store(trial.number, end["epochs"], end[JUDGED])
        self._tell(trial.number, Outcome(end["outcome"]), unpack_metrics(end["metrics"]))
        return True

    def _name_metrics(self) -> None:
        """Have optuna-dashboard show the objectives by their names."""
        names = [objective.metric for objective in self.config.objective]
        if self._study.metric_names != names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._study.set_metric_names(names)

    def _enqueue(self) -> None:
        """Queue the warm-start points and the grid, once: a restart finds them there."""
        # Optuna's own check for repeats takes close numbers for equal and reads all trials anew
        # for every point. The points are queued first and in order, so counting is enough.
        for point in queued_points(self.config)[len(self._study.get_trials(False)) :]:
            self._study.enqueue_trial(point)

    @property
    def started(self) -> int:
        """Trials that have been handed out."""
        return self._started

    @property
    def left(self) -> int | None:
        """Trials that may still be handed out; None without a limit."""
        limit = self.config.budget.trials
        if self.config.sampler.name == "grid":
            return len(self._orphans) + self._waiting
        return None if limit is None else len(self._orphans) + max(limit - self._started, 0)

    def next(self) -> Handout | None:
        """The next trial: orphans first, then queued points, then the sampler's; None at the end.

        Raises:
            ConfigError: a resolved value has the wrong type for its block.
        """
        if self._orphans:
            return self._adopt(self._orphans.pop(0))
        if self.left == 0:
            return None
        self._study.sampler = make_sampler(self.config, self._started)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self._study.ask()
        self._started += 1
        self._waiting = max(self._waiting - 1, 0)
        self._trials[trial.number] = trial
        return self._specify(trial, self._sample(trial))

    def begun(self) -> list[Handout]:
        """The trials that an earlier session left running, by number; those that are not handed
        back have ended."""
        begun = [n for n in self._orphans if "spec" in self._frozen(n).user_attrs]
        self._orphans = [number for number in self._orphans if number not in begun]
        return [self._adopt(number) for number in begun]

    def hand_back(self, number: int) -> None:
        """A trial gave its place up and goes on later, as the next one that is handed out."""
        self._orphans.insert(0, number)

    def _sample(self, trial: Trial) -> dict[str, Value]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return suggest(trial, self.config.space)

    def _specify(self, trial: Trial, sampled: Mapping[str, Value]) -> Handout:
        """Note what a trial's parameters resolve to."""
        spec = resolve(self.config, sampled, trial.number, self._gpus)
        trial.set_user_attr("spec", spec.to_dict())
        return Handout(trial.number, spec)

    def _adopt(self, number: int) -> Handout:
        self._study.sampler = make_sampler(self.config, number)  # before it sees the trial
        notes = self._frozen(number).user_attrs
        stored = notes.get("spec")
        if stored is None:  # killed between ask and the note of what it resolved to
            sampled = self._sample(self._trial(number))
            if self._frozen(number).params != sampled:
                # Another version has sampled otherwise: what it has stored stays as it is.
                del self._trials[number]
                sampled = self._sample(self._trial(number))
            return self._specify(self._trial(number), sampled)
        try:
            alone = Cause.GPU_MEMORY in notes.get("deaths", {})
            return Handout(number, TrialSpec.from_dict(stored), alone)
        except (TypeError, ValueError) as error:
            raise damaged_record(self._place, number, error) from None

    def _trial(self, number: int) -> Trial:
        if number not in self._trials:
            self._trials[number] = Trial(self._study, self._id(number))
        return self._trials[number]

    def params(self, number: int) -> Mapping[str, Any]:
        """What was sampled for a trial that was handed out."""
        return self._trial(number).params

    def known(self, number: int, epoch: int) -> bool:
        """Whether a trial's report of an epoch was taken in, and judged, before."""
        return epoch in reported(self._frozen(number), len(self.config.objective))

    def report(self, number: int, report: EpochReport) -> None:
        """Store the objectives' values at an epoch that is not known yet. A trial with a report
        in the study was not stopped by it, but for one whose end is noted.

        With one objective nothing is stored for a value that is missing or not finite.
        """
        if len(self.config.objective) > 1:
            values = [report.metrics.get(o.metric) for o in self.config.objective]
            name = note_of(report.epoch)
            self._storage.set_trial_system_attr(self._id(number), name, values)
            return
        value = self._value(report)
        if value is not None:
            self._store(number, report.epoch, value)

    def stops(self, number: int, report: EpochReport) -> bool:
        """Whether the pruner stops the trial at a report that is not stored yet."""
        value = self._value(report)
        if value is None:
            return False
        return self._pruner.stops(number, _curve(self._frozen(number)), report.epoch, value)

    def _value(self, report: EpochReport) -> float | None:
        value = report.metrics.get(self.config.objective[0].metric, math.nan)
        return value if len(self.config.objective) == 1 and math.isfinite(value) else None

    def _store(self, number: int, epoch: int, value: float) -> None:
        curve = _curve(self._frozen(number))
        if epoch not in curve:
            self._trial(number).report(value, epoch)
            self._pruner.reported(number, max(curve, default=0), epoch, value)

    def count_death(self, number: int, cause: str) -> dict[str, int]:
        """Count a death of the trial's worker, for this and all later sessions; all its counts."""
        trial = self._trial(number)
        counts: dict[str, int] = dict(trial.user_attrs.get("deaths", {}))
        counts[cause] = counts.get(cause, 0) + 1
        trial.set_user_attr("deaths", counts)
        return counts

    def note_end(
        self,
        number: int,
        outcome: Outcome,
        reason: str,
        metrics: Mapping[str, float],
        epochs: int,
        device_seconds: float,
        judged: EpochReport | None = None,
    ) -> None:
        """Note how a trial ends: from here on its outcome is decided.

        Args:
            number: the trial.
            outcome: its outcome.
            reason: why.
            metrics: its last values.
            epochs: that it trained.
            device_seconds: that it took.
            judged: the report that it is stopped at, which need not be stored yet.
        """
        note: dict[str, Any] = {
            "outcome": outcome.value,
            "reason": reason,
            "metrics": pack_metrics(metrics),
            "epochs": epochs,
            "device_seconds": round(device_seconds, 3),
        }
        if judged is not None:
            note[JUDGED] = self._value(judged)
        self._trial(number).set_user_attr("end", note)

    def finish(
        self,
        number: int,
        outcome: Outcome,
        reason: str,
        metrics: Mapping[str, float],
        epochs: int,
        device_seconds: float,
    ) -> TrialSummary:
        """Store how a trial ended and return its row; a finished trial stays as it is."""
        self.note_end(number, outcome, reason, metrics, epochs, device_seconds)
        ended = self._tell(number, outcome, metrics)
        return summarise(ended, self.config, {number: device_seconds})

    def close_orphans(
        self, outcome: Outcome, reason: str, ledger: Mapping[int, float]
    ) -> list[TrialSummary]:
        """End the trials that an earlier session left running and that were not taken up."""
        rows = []
        for number in self._orphans:
            frozen = self._frozen(number)
            epochs = max(reported(frozen, len(self.config.objective)), default=0)
            rows.append(self.finish(number, outcome, reason, {}, epochs, ledger.get(number, 0.0)))
        self._orphans = []
        return rows

    def _tell(self, number: int, outcome: Outcome, metrics: Mapping[str, float]) -> FrozenTrial:
        trial = self._trial(number)
        objectives = [metrics.get(o.metric, math.nan) for o in self.config.objective]
        fine = outcome in (Outcome.COMPLETE, Outcome.PRUNED)
        for key, value in constraint_values(self.config, metrics, outcome).items():
            if key not in trial.constraints:
                trial.set_constraint(key, value)
        state, values = TrialState.PRUNED, None
        if outcome is Outcome.COMPLETE:
            state, values = TrialState.COMPLETE, objectives
        elif not fine and self._worst is not None:
            state, values = TrialState.COMPLETE, self._worst
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self._study.sampler = make_sampler(self.config, number)
            self._study.tell(number, values, state=state, skip_if_finished=True)
        self._trials.pop(number, None)
        ended = self._frozen(number)
        self._learn(ended)
        return ended

    def _learn(self, trial: FrozenTrial) -> None:
        """Keep the worst value of each objective among the trials that really finished, and have
        the pruner compare with all that Optuna takes for finished."""
        if trial.state == TrialState.COMPLETE:
            self._pruner.completed(_curve(trial))
        outcome = trial.user_attrs.get("end", {}).get("outcome")
        if outcome != Outcome.COMPLETE.value or not trial.state.is_finished():
            return
        values: list[float] = trial.values
        pick = {"maximize": min, "minimize": max}
        self._worst = [
            pick[direction](*pair)
            for direction, *pair in zip(
                self._directions, values, self._worst or values, strict=True
            )
        ]

    def rows(self, ledger: Mapping[int, float]) -> list[TrialSummary]:
        """All trials' rows.

        Args:
            ledger: device seconds of each trial.
        """
        trials = self._study.get_trials(deepcopy=False)
        return [summarise(trial, self.config, ledger) for trial in trials]

    def _frozen(self, number: int) -> FrozenTrial:
        found: FrozenTrial = self._storage.get_trial(self._id(number))
        return found

    def _id(self, number: int) -> int:
        study = self._study._study_id
        found: int = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        return found

    def close(self) -> None:
        """Commit what is left, and give the database's connections back.

        Raises:
            ResourceError, LeaseLostError: as :meth:`commit`.
        """
        try:
            self.commit(force=True)
        finally:
            self._storage.remove_session()


def _curve(trial: FrozenTrial) -> dict[int, float]:
    """A trial's reports, epochs ascending; others may have stored numbers that are not finite."""
    curve = sorted(trial.intermediate_values.items())
    return {epoch: value for epoch, value in curve if math.isfinite(value)}
