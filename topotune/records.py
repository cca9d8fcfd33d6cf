"""What one trial is given and what it reports: plain frozen records with a JSON round trip.

Nothing here imports torch, ray, optuna, mlflow or pydantic: every part of the house, and every
machine, can read these.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self, TypeAlias

Value: TypeAlias = bool | int | float | str | list[float] | None
"""What a parameter may be: a scalar, or a list of numbers such as ``betas``."""


DATA_TAG, ROWS_TAG = "data.digest", "data.rows"
"""Tags of a trial: which training and validation rows it saw, and how many."""


class Outcome(StrEnum):
    """How a trial ended; each comes with a reason."""

    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    DIVERGED = "DIVERGED"
    FAILED = "FAILED"


_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def pack_number(value: float) -> float | str:
    """A float as strict JSON allows it: non-finite values become "nan", "inf" or "-inf"."""
    return value if math.isfinite(value) else str(float(value))


def unpack_number(value: float | str) -> float:
    """The inverse of :func:`pack_number`."""
    return _WORDS[value] if isinstance(value, str) else float(value)


def pack_metrics(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Metrics as a strict JSON object."""
    return {name: pack_number(value) for name, value in metrics.items()}


def unpack_metrics(packed: Mapping[str, float | str]) -> dict[str, float]:
    """The inverse of :func:`pack_metrics`."""
    return {name: unpack_number(value) for name, value in packed.items()}


class _JsonRecord:
    """JSON text to and from a flat dataclass; non-finite metrics survive."""

    def to_json(self) -> str:
        """One line of strict JSON."""
        return json.dumps(self.to_dict(), allow_nan=False, sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps(allow_nan=False)`` accepts."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record that :meth:`to_json` wrote; raises ValueError or TypeError otherwise."""
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record that :meth:`to_dict` gave."""
        return cls(**data)


@dataclass(frozen=True)
class TrainOptions(_JsonRecord):
    """How the loop trains, whatever the method.

    Attributes:
        batch_size: examples a step.
        schedule: learning-rate schedule over the whole budget: "constant", "cosine" (to zero)
            or "linear" (to zero).
        grad_clip: clip the global gradient norm to this value before the step; None: never.
    """

    batch_size: int = 64
    schedule: str = "constant"
    grad_clip: float | None = None


@dataclass(frozen=True)
class OverheadOptions(_JsonRecord):
    """How the overhead is measured at the start of a trial: over Adam, or, for TCEP, over BPTT.

    Attributes:
        blocks: alternating blocks a contender; 0 switches the measurement off.
        steps: full training steps a block.
        warmup: uncounted steps a contender before the first block.
    """

    blocks: int = 9
    steps: int = 4
    warmup: int = 3


@dataclass(frozen=True)
class TrialSpec(_JsonRecord):
    """Everything that determines one training run; ``topotune train`` takes it as YAML.

    Attributes:
        task: a built-in task's name or ``package.module:Class``.
        method: "tcep", or an optimizer's registry name or import path.
        epochs: passes over the training split.
        seed: seed of initialisation, batch order and augmentation (already derived for the trial).
        params: the method's keyword arguments (``lr``, ``eta``, ...).
        task_options, model, model_options: what the task and the model builder take; ``model``
            None means the task's default.
        train: loop options.
        overhead: how the overhead is measured.
        split_seed: seed of the train / validation / test split; the same for every trial, so that
            two methods see the same data.
        data_dir: where data sets lie; None means the default of the data loader.
        download: whether a missing data set may be downloaded.
        device: "auto" (a GPU if torch sees one), "cpu", "cuda" or "cuda:N".
        threads: CPU threads of torch; 0 leaves torch's own choice.
    """

    task: str
    method: str
    epochs: int
    seed: int
    params: Mapping[str, Value] = field(default_factory=dict)
    task_options: Mapping[str, Value] = field(default_factory=dict)
    model: str | None = None
    model_options: Mapping[str, Value] = field(default_factory=dict)
    train: TrainOptions = field(default_factory=TrainOptions)
    overhead: OverheadOptions = field(default_factory=OverheadOptions)
    split_seed: int = 0
    data_dir: str | None = None
    download: bool = True
    device: str = "auto"
    threads: int = 1

    def table(self) -> dict[str, Value]:
        """All as one flat table: the method's own parameters by name, the rest with its place."""
        return {
            **self.params,
            "task": self.task,
            "method": self.method,
            "model": self.model,
            "epochs": self.epochs,
            "split_seed": self.split_seed,
            "train.batch_size": self.train.batch_size,
            "train.schedule": self.train.schedule,
            "train.grad_clip": self.train.grad_clip,
            **{f"task.{name}": value for name, value in self.task_options.items()},
            **{f"model.{name}": value for name, value in self.model_options.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the nested records too."""
        fields = dict(data)
        fields["train"] = TrainOptions.from_dict(fields.get("train", {}))
        fields["overhead"] = OverheadOptions.from_dict(fields.get("overhead", {}))
        return cls(**fields)


@dataclass(frozen=True)
class EpochReport(_JsonRecord):
    """What one finished epoch measured.

    Attributes:
        epoch: epochs finished so far, counted from 1.
        step: optimizer steps finished so far.
        metrics: name to value; may hold NaN or infinities.
        seconds: wall time of the epoch, training and evaluation.
        timestamp_ms: when it finished, Unix time; fixed once, so that a replay is idempotent.
    """

    epoch: int
    step: int
    metrics: Mapping[str, float]
    seconds: float
    timestamp_ms: int

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, non-finite metrics as words."""
        return {**vars(self), "metrics": pack_metrics(self.metrics)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "metrics": unpack_metrics(data["metrics"])})


@dataclass(frozen=True)
class TrialResult(_JsonRecord):
    """How a trial ended, with its whole history.

    Attributes:
        outcome: COMPLETE, PRUNED (stopped by the reader of its reports), DIVERGED or FAILED.
        reason: one sentence; empty for COMPLETE.
        history: one report an epoch.
        metrics: the last epoch's metrics and the trial-level ones (``overhead_vs_adam``, ...).
    """

    outcome: Outcome
    reason: str
    history: tuple[EpochReport, ...]
    metrics: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, non-finite metrics as words."""
        return {
            "outcome": self.outcome.value,
            "reason": self.reason,
            "history": [report.to_dict() for report in self.history],
            "metrics": pack_metrics(self.metrics),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        return cls(
            outcome=Outcome(data["outcome"]),
            reason=data["reason"],
            history=tuple(EpochReport.from_dict(r) for r in data["history"]),
            metrics=unpack_metrics(data["metrics"]),
        )


@dataclass(frozen=True)
class TrialSummary(_JsonRecord):
    """One row of a search: what the study knows of a trial. Results and tracking read these.

    Attributes:
        number: the trial's number in the study, from 0.
        state: an :class:`Outcome` value, or "RUNNING" or "WAITING".
        reason: why it ended so.
        params: the parameters as sampled (names as in the search file).
        values: objective values, one an objective; empty if there are none.
        metrics: the last metrics known.
        curve: epoch to the first objective's value, as the trial reported it.
        further_curves: the same of each further objective; empty for one that is no epoch's, such
            as an overhead.
        epochs: epochs finished.
        seed: the trial's derived seed.
        device_seconds: what the ledger charged to it, all attempts together.
        violated: constraints that it breaks, as "name: value > max".
        spec: the resolved TrialSpec as a dict; empty until the trial started.
    """

    number: int
    state: str
    reason: str = ""
    params: Mapping[str, Value] = field(default_factory=dict)
    values: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: Mapping[int, float] = field(default_factory=dict)
    further_curves: tuple[Mapping[int, float], ...] = ()
    epochs: int = 0
    seed: int = 0
    device_seconds: float = 0.0
    violated: tuple[str, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)

    @property
    def curves(self) -> tuple[Mapping[int, float], ...]:
        """The curve of every objective, the first objective's first."""
        return (self.curve, *self.further_curves)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, non-finite numbers as words."""
        curve, *further = [{str(e): pack_number(v) for e, v in c.items()} for c in self.curves]
        return dataclasses.asdict(self) | {
            "values": [pack_number(v) for v in self.values],
            "metrics": pack_metrics(self.metrics),
            "curve": curve,
            "further_curves": further,
            "violated": list(self.violated),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        fields = dict(data)
        fields["values"] = tuple(unpack_number(v) for v in fields["values"])
        fields["metrics"] = unpack_metrics(fields["metrics"])
        curves = [fields["curve"], *fields.get("further_curves", ())]
        curve, *further = [{int(e): unpack_number(v) for e, v in c.items()} for c in curves]
        fields |= {"curve": curve, "further_curves": tuple(further)}
        fields["violated"] = tuple(fields["violated"])
        return cls(**fields)
