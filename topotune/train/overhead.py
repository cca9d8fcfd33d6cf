"""Runtime overhead of a trial's optimizer over Adam, measured on the trial's own model and data."""

from __future__ import annotations

import copy
import gc
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from topotune.data.splits import TensorPair
from topotune.files import write_atomically
from topotune.optim import fastest_adam
from topotune.records import OverheadOptions, pack_metrics, unpack_metrics
from topotune.train.generators import capture_generators, restore_generators
from topotune.train.learner import Learner

_log = logging.getLogger(__name__)

ADAM_RATE = 1e-3
"""Learning rate of the Adam contenders: their cost does not depend on it, and torch's default
keeps them away from overflow whatever the trial's own rate is."""

OptimizerBuilder = Callable[[Iterable[nn.Parameter]], Optimizer]


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


def write_overhead(path: Path, overhead: Overhead) -> None:
    """Keep a measurement as a JSON file, atomically."""
    write_atomically(path, json.dumps(overhead.to_dict(), allow_nan=False).encode())


def read_overhead(path: Path) -> Overhead | None:
    """The measurement kept in a file; None if there is none or it is damaged (then logged)."""
    if not path.exists():
        return None
    try:
        return Overhead.from_dict(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is damaged (%r): the overhead is measured again", path, error)
        return None


class _Contender:
    """A private copy of the model, trained by one optimizer on one batch."""

    def __init__(
        self, model: nn.Module, build: OptimizerBuilder, learner: Learner, batch: TensorPair
    ) -> None:
        self._model = copy.deepcopy(model).train()
        self._optimizer = build(self._model.parameters())
        self._learner = learner
        self._batch = batch

    def seconds(self, steps: int, device: torch.device) -> float:
        """Mean time of a full step: clear gradients, forward, loss, backward, update."""
        clock = _clock(device)
        _synchronise(device)
        start = clock()
        for _ in range(steps):
            self._optimizer.zero_grad(set_to_none=True)
            self._learner.gradients(self._model, self._batch)
            self._optimizer.step()
        _synchronise(device)
        return (clock() - start) / steps


def measure_overhead(
    model: nn.Module,
    batch: TensorPair,
    build: OptimizerBuilder,
    make_learner: Callable[[], Learner],
    options: OverheadOptions,
) -> dict[str, float]:
    """Time full training steps of three optimizers in alternating blocks, on throw-away copies.

    The contenders are the fastest ``torch.optim.Adam`` of the device, torch's default Adam, and
    the trial's optimizer. A round gives each one block; the order rotates from round to round, so
    that a machine that slows down or speeds up favours none of them, and ratios are taken within
    a round. Time is wall time, except on the CPU with one thread: there it is the thread's own CPU
    time, which is the same on a free core and does not count the turns of other processes on a
    busy one. The given model, its gradients, and every global random generator are left as they
    were. Numbers that overflow in a copy are of no consequence.

    Args:
        model: the trial's model, only copied.
        batch: prepared inputs and targets of the training split, on the model's device.
        build: parameters to the trial's optimizer.
        make_learner: a fresh learner for each contender.
        options: blocks, steps a block, warm-up steps; ``blocks=0`` measures nothing.

    Returns:
        ``overhead_vs_adam`` and ``overhead_vs_adam_default``, the medians over the rounds of the
        step time over that of the fastest and of the default Adam (1.0: no overhead);
        ``..._iqr``, the distance between the quartiles of the same ratios; ``adam_step_ms``, the
        median step time of the fastest Adam; ``overhead_blocks``, the rounds. Empty for
        ``blocks=0``.
    """
    if options.blocks == 0:
        return {}
    device = batch.inputs.device
    builders: list[OptimizerBuilder] = [
        lambda parameters: fastest_adam(parameters, device, ADAM_RATE),
        lambda parameters: torch.optim.Adam(parameters, lr=ADAM_RATE),
        build,
    ]
    states = capture_generators(device)
    collecting = gc.isenabled()
    gc.disable()  # a collection would land in one contender's block and not in the others'
    try:
        contenders = [_Contender(model, b, make_learner(), batch) for b in builders]
        for contender in contenders:
            if options.warmup:
                contender.seconds(options.warmup, device)
        times = np.empty((options.blocks, len(contenders)))
        for block in range(options.blocks):
            for turn in range(len(contenders)):
                index = (block + turn) % len(contenders)
                times[block, index] = contenders[index].seconds(options.steps, device)
    finally:
        if collecting:
            gc.enable()
        restore_generators(states, device)
    fastest, default, trial = times.T
    return {
        **_ratio("overhead_vs_adam", trial / fastest),
        **_ratio("overhead_vs_adam_default", trial / default),
        "overhead_blocks": float(options.blocks),
        "adam_step_ms": 1e3 * float(np.median(fastest)),
    }


def _ratio(name: str, ratios: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {name: float(middle), f"{name}_iqr": float(high - low)}


def _clock(device: torch.device) -> Callable[[], float]:
    single = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if single else time.perf_counter


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
