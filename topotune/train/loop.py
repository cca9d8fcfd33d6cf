"""The training loop: epochs of steps over device-resident data, one report an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from topotune.data.splits import TensorPair
from topotune.errors import DivergedError
from topotune.optim import optimizer_metrics, optimizer_trace
from topotune.records import EpochReport, TrainOptions
from topotune.seeding import derive_seed
from topotune.tasks.base import Task
from topotune.train.evaluation import evaluate
from topotune.train.learner import Learner
from topotune.train.measures import (
    SpikeCounter,
    energy_limit,
    find_divergence,
    loss_roughness,
    peak_memory_mb,
)
from topotune.train.process import synchronise
from topotune.train.schedule import rate_factor, set_rates
from topotune.train.trace import Columns, StepTrace

CHECK_EVERY = 50
"""Steps between two looks at the device's numbers: each look is the only host synchronisation,
and divergence is noticed at most this many steps late."""

TIMING_METRICS = frozenset({"step_time_ms", "throughput", "peak_memory_mb"})
"""Metrics of an epoch that depend on the machine and the moment; all others repeat exactly."""


@dataclass(frozen=True)
class LoopParts:
    """What the loop trains with; all tensors on ``device``."""

    task: Task
    model: nn.Module
    learner: Learner
    optimizer: Optimizer
    train: TensorPair
    val: TensorPair
    device: torch.device


class TrainingLoop:
    """Trains epoch by epoch and reports each.

    Metrics of a report, besides the optimizer's and the learner's own:

    - ``train_loss``, ``train_<metric>``: means over the epoch's examples, each as its batch was
      trained on (parameters still moving, augmentation on);
    - ``val_loss``, ``val_<metric>``: over the validation split after the epoch;
    - ``learning_rate``: of the first parameter group in the epoch's last step;
    - ``grad_norm``: mean over the steps of the global 2-norm, before any clipping; a batch that
      the learner gave no gradient of takes no step, is 0 in the trace, and does not count;
    - ``grad_spikes``: steps above 5 times the running median (see :class:`SpikeCounter`);
    - ``loss_roughness``: see :func:`~topotune.train.measures.loss_roughness`;
    - ``step_time_ms``: median over blocks of 50 steps of the mean wall time of a full step (batch
      selection, augmentation, gradients, optimizer, bookkeeping), device synchronised a block;
    - ``throughput``: training examples a second over the epoch's blocks;
    - ``peak_memory_mb``: on a GPU that epoch's peak of torch's memory, on the CPU the process's
      peak resident set so far.

    Args:
        parts: what it trains with.
        options: how.
        epochs: how many in all.
        seed: of the order of examples and of augmentation.
        beat: called after every step and every block of validation, as a sign of life.

    Attributes:
        epoch: finished epochs.
        step: finished optimizer steps.
        trace: the steps of the epoch in training, or of the last finished one.
    """

    def __init__(
        self,
        parts: LoopParts,
        options: TrainOptions,
        epochs: int,
        seed: int,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._parts = parts
        self._beat = beat
        self._options = options
        self._epochs = epochs
        self._seed = seed
        # Always on the CPU, so that the order of examples is the same everywhere.
        self._order = torch.Generator().manual_seed(derive_seed(seed, 1))
        self._augment = torch.Generator(parts.device).manual_seed(derive_seed(seed, 2))
        self._spikes = SpikeCounter()
        self.epoch = 0
        self.step = 0
        self.trace = StepTrace()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the training split, the last one possibly smaller."""
        return -(-len(self._parts.train) // self._options.batch_size)

    def run(self) -> Iterator[EpochReport]:
        """Train the remaining epochs; yields after each, its validation included.

        Raises:
            DivergedError: a loss, gradient norm or field energy is not finite, the controlled
                field energy left its bound, or the learner found fault with a step. The text
                names the cause and the step.
            StoppedError: the learner refuses to train another epoch.
        """
        while self.epoch < self._epochs:
            self._parts.learner.before_epoch()
            yield self._run_epoch()

    def _run_epoch(self) -> EpochReport:
        started = time.perf_counter()
        epoch = _Epoch(self._parts, self._options, self.epoch + 1)
        self.trace = epoch.trace
        if self._parts.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._parts.device)
        self._parts.model.train()
        order = torch.randperm(len(self._parts.train), generator=self._order)
        for count, rows in enumerate(
            torch.split(order.to(self._parts.device), self._options.batch_size), start=1
        ):
            self._set_rate()
            epoch.step(rows, self._augment)
            self.step += 1
            self._beat()
            if count % CHECK_EVERY == 0 or count == self.steps_per_epoch:
                epoch.check(last=self.step)
        metrics = epoch.metrics(self._spikes)
        metrics["learning_rate"] = float(self._parts.optimizer.param_groups[0]["lr"])
        metrics |= optimizer_metrics(self._parts.optimizer)
        metrics |= self._parts.learner.metrics(self._parts.model)
        validation = evaluate(self._parts.task, self._parts.model, self._parts.val, self._beat)
        metrics |= {f"val_{name}": value for name, value in validation.items()}
        if not np.isfinite(metrics["val_loss"]):
            raise DivergedError(
                f"validation loss is {metrics['val_loss']} after step {self.step} "
                f"(epoch {self.epoch + 1})"
            )
        self.epoch += 1
        return EpochReport(
            epoch=self.epoch,
            step=self.step,
            metrics=metrics,
            seconds=time.perf_counter() - started,
            timestamp_ms=time.time_ns() // 1_000_000,
        )

    def _set_rate(self) -> None:
        total = self._epochs * self.steps_per_epoch
        set_rates(self._parts.optimizer, rate_factor(self._options.schedule, self.step, total))

    def state_dict(self) -> dict[str, Any]:
        """What the next epoch depends on, besides model, optimizer and global generators."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "order": self._order.get_state(),
            "augment": self._augment.get_state(),
            "device": self._parts.device.type,
            "grad_window": self._spikes.window,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        The augmentation's generator lives on the device; under another kind of device its state
        means nothing, and it restarts from the seed and the epoch.
        """
        self.epoch, self.step = state["epoch"], state["step"]
        self._order.set_state(state["order"])
        if state["device"] == self._parts.device.type:
            self._augment.set_state(state["augment"])
        else:
            self._augment.manual_seed(derive_seed(self._seed, 2, self.epoch))
        self._spikes = SpikeCounter(state["grad_window"])


class _Epoch:
    """One epoch's steps and the numbers that they leave on the device."""

    def __init__(self, parts: LoopParts, options: TrainOptions, number: int) -> None:
        self._parts = parts
        self._clip = options.grad_clip
        self._number = number
        self._parameters = [p for g in parts.optimizer.param_groups for p in g["params"]]
        self._limit = energy_limit(parts.optimizer)
        # 0-d device tensors of the steps since the last check, by name: appending costs nothing,
        # and a check moves all of them in one copy.
        self._pending: dict[str, list[Tensor]] = {}
        self._measured: dict[str, None] = {}  # names of the learner's own, in order
        self._sizes: list[int] = []
        self._taken: list[bool] = []  # of all steps of the epoch: had the batch any gradient
        self._sums: dict[str, float] = {}
        self._examples = 0
        self._block_seconds: list[tuple[float, int]] = []
        self._block_start = time.perf_counter()
        self.trace = StepTrace()

    def step(self, rows: Tensor, generator: torch.Generator) -> None:
        """Train on these rows of the training split."""
        task, model, optimizer = self._parts.task, self._parts.model, self._parts.optimizer
        batch = self._parts.train.at(rows)
        inputs = task.augment(task.prepare(batch.inputs), generator)
        optimizer.zero_grad(set_to_none=True)
        learner = self._parts.learner
        loss, outputs, further = learner.gradients(model, TensorPair(inputs, batch.targets))
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients) if gradients else torch.zeros_like(loss)
        if gradients:
            if self._clip is not None:
                clip_grads_with_norm_(self._parameters, self._clip, norm)
            optimizer.step()
            learner.after_step(model)
        self._taken.append(bool(gradients))
        with torch.no_grad():
            measured = task.metrics(outputs, batch.targets)
        self._pending.setdefault("loss", []).append(loss)
        self._pending.setdefault("grad_norm", []).append(norm)
        for name, value in measured.items():
            self._pending.setdefault(f"train_{name}", []).append(value)
        for name, value in further.items():
            self._pending.setdefault(name, []).append(value)
            self._measured[name] = None
        self._sizes.append(len(rows))

    def check(self, last: int) -> None:
        """Fetch the steps since the last check, the newest of them being number ``last``.

        Raises:
            DivergedError: one of them left the finite numbers or the energy bound, or cannot be
                trained on by the learner's word.
        """
        synchronise(self._parts.device)
        now = time.perf_counter()
        self._block_seconds.append((now - self._block_start, len(self._sizes)))
        columns = _fetch(self._pending)
        count = len(self._sizes)
        weights = np.asarray(self._sizes, dtype=np.float64)
        for name in columns.keys() - {"grad_norm"}:
            self._sums[name] = self._sums.get(name, 0.0) + float(columns[name] @ weights)
        self._examples += sum(self._sizes)
        self._pending, self._sizes = {}, []

        steps = {"loss": columns["loss"], "grad_norm": columns["grad_norm"]}
        judged = dict(steps)
        steps |= {name: columns[name] for name in self._measured}
        known = self._parts.learner.fault(steps)
        taken = np.asarray(self._taken[-count:])
        for name, values in _traced(self._parts.optimizer).items():
            if len(values) > 0:
                steps[name] = _aligned(values, taken, np.nan)
            if name in _JUDGED:  # a step that was not traced is no divergence
                judged[name] = _aligned(values, taken, 0.0)
        first = last - count + 1
        self.trace.append({"step": np.arange(first, last + 1), **steps})
        fault = find_divergence(judged, first, self._number, self._limit, known)
        if fault is not None:
            raise fault
        self._block_start = time.perf_counter()

    def metrics(self, spikes: SpikeCounter) -> dict[str, float]:
        """The epoch's training metrics; every step has been checked."""
        steps = self.trace.columns()
        norms = steps["grad_norm"][np.asarray(self._taken)]
        means = {name: total / self._examples for name, total in self._sums.items()}
        means["train_loss"] = means.pop("loss")
        seconds = sum(spent for spent, _ in self._block_seconds)
        return means | {
            "grad_norm": float(np.mean(norms)) if len(norms) else 0.0,
            "grad_spikes": float(spikes.count(norms.tolist())),
            "loss_roughness": loss_roughness(steps["loss"].tolist()),
            "step_time_ms": float(np.median([1e3 * s / n for s, n in self._block_seconds])),
            "throughput": self._examples / seconds,
            "peak_memory_mb": peak_memory_mb(self._parts.device),
        }


_JUDGED = ("energy", "energy_controlled")
"""What an optimizer traces and must keep finite, besides the loss and the gradient norm."""


def _traced(optimizer: Optimizer) -> Columns:
    """The optimizer's per-step values since the last call; empty columns if it traced no step."""
    trace = optimizer_trace(optimizer)
    if trace is None:
        return {}
    return {
        "energy": trace.energy.numpy(),
        "energy_controlled": trace.energy_controlled.numpy(),
        "coupling_current": trace.coupling_current.numpy(),
    }


def _aligned(values: np.ndarray, taken: np.ndarray, missing: float) -> np.ndarray:
    """One value a step: the last steps that were taken have values, all others get ``missing``."""
    places = np.flatnonzero(taken)
    known = values[len(values) - min(len(values), len(places)) :]
    found = np.full(len(taken), missing)
    found[places[len(places) - len(known) :]] = known
    return found


def _fetch(pending: Mapping[str, list[Tensor]]) -> Columns:
    """All columns in one copy to the host, as float64."""
    stacked = torch.stack([torch.stack(values).double() for values in pending.values()])
    return dict(zip(pending, stacked.cpu().numpy(), strict=True))
