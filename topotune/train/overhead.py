"""Runtime overhead of a trial's method over others, measured on the trial's own model and data."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from topotune.data.splits import TensorPair
from topotune.records import OverheadOptions, pack_metrics, unpack_metrics
from topotune.train.assemble import probe_rows
from topotune.train.loop import LoopParts
from topotune.train.method import Contender, Method
from topotune.train.process import capture_generators, restore_generators, synchronise


@dataclass(frozen=True)
class Overhead:
    """What a trial's measurement gave, and when.

    Attributes:
        metrics: as :func:`measure_overhead` returns them; empty if nothing was measured.
        timestamp_ms: Unix time; fixed once, so that a replay is idempotent.
    """

    metrics: Mapping[str, float]
    timestamp_ms: int

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, non-finite numbers as words."""
        return {"metrics": pack_metrics(self.metrics), "timestamp_ms": self.timestamp_ms}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        return cls(unpack_metrics(data["metrics"]), int(data["timestamp_ms"]))


class _Runner:
    """A private copy of the model, trained by one contender on one batch."""

    def __init__(self, model: nn.Module, contender: Contender, batch: TensorPair) -> None:
        self._model = copy.deepcopy(model).train()
        self._optimizer = contender.optimizer(self._model.parameters())
        self._learner = contender.learner()
        self._batch = batch

    def seconds(self, steps: int, device: torch.device) -> float:
        """Mean time of a full step: clear gradients, forward, loss, backward, update."""
        clock = _clock(device)
        synchronise(device)
        start = clock()
        for _ in range(steps):
            self._optimizer.zero_grad(set_to_none=True)
            self._learner.gradients(self._model, self._batch)
            self._optimizer.step()
            self._learner.after_step(self._model)
        synchronise(device)
        return (clock() - start) / steps


def measure_overhead(
    model: nn.Module,
    batch: TensorPair,
    trial: Contender,
    others: Mapping[str, Contender],
    options: OverheadOptions,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Time full training steps of several contenders in alternating blocks, on throw-away copies.

    A round gives each contender one block; the order rotates from round to round, so that a
    machine that slows down or speeds up favours none of them, and ratios are taken within a
    round. Time is wall time, except on the CPU with one thread: there it is the thread's own CPU
    time, which is the same on a free core and does not count the turns of other processes on a
    busy one. The given model, its gradients, and every global random generator are left as they
    were. Numbers that overflow in a copy are of no consequence.

    Args:
        model: the trial's model, only copied.
        batch: prepared inputs and targets of the training split, on the model's device.
        trial: the trial's own optimizer and learner.
        others: what it is compared with, by name, at least one.
        options: blocks, steps a block, warm-up steps; ``blocks=0`` measures nothing.
        beat: called after every block.

    Returns:
        ``overhead_vs_<name>`` of each other, the median over the rounds of the trial's step time
        over that contender's (1.0: no overhead); ``overhead_vs_<name>_iqr``, the distance between
        the quartiles of the same ratios; ``overhead_blocks``, the rounds; ``<name>_step_ms``, the
        median step time of the first of the others. Empty for ``blocks=0``.
    """
    if options.blocks == 0:
        return {}
    device = batch.inputs.device
    states = capture_generators(device)
    collecting = gc.isenabled()
    gc.disable()  # a collection would land in one contender's block and not in the others'
    try:
        runners = [_Runner(model, contender, batch) for contender in (*others.values(), trial)]
        for runner in runners:
            if options.warmup:
                runner.seconds(options.warmup, device)
        times = np.empty((options.blocks, len(runners)))
        for block in range(options.blocks):
            for turn in range(len(runners)):
                index = (block + turn) % len(runners)
                times[block, index] = runners[index].seconds(options.steps, device)
                beat()
    finally:
        if collecting:
            gc.enable()
        restore_generators(states, device)
    own = times[:, -1]
    found: dict[str, float] = {}
    for index, name in enumerate(others):
        found |= _ratio(f"overhead_vs_{name}", own / times[:, index])
    return {
        **found,
        "overhead_blocks": float(options.blocks),
        f"{next(iter(others))}_step_ms": 1e3 * float(np.median(times[:, 0])),
    }


def overhead_of(
    method: Method,
    parts: LoopParts,
    options: OverheadOptions,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """:func:`measure_overhead` of a method over its own contenders, on a trial's first rows."""
    probe = probe_rows(parts.task, parts.train)
    rows = parts.train.rows(0, method.spec.train.batch_size)
    return measure_overhead(
        parts.model,
        TensorPair(parts.task.prepare(rows.inputs), rows.targets),
        Contender(method.optimizer, lambda: method.learner(parts.task, probe)),
        method.contenders(parts.task, probe, parts.device),
        options,
        beat,
    )


def _ratio(name: str, ratios: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {name: float(middle), f"{name}_iqr": float(high - low)}


def _clock(device: torch.device) -> Callable[[], float]:
    single = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if single else time.perf_counter
