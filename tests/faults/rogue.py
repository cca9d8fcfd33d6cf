"""Trials that misbehave: what a search must survive of its own user's code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
from torch import Tensor

from tests.faults.task import BATCHES, PacedRings
from topotune.bench.scaling.task import in_worker
from topotune.optim import TopologicalAdam

IMPORT_PATH = "tests.faults.rogue:RogueRings"
POISONED_ADAM = "tests.faults.rogue:PoisonedAdam"
FAULTS = ("raise", "exit", "interrupt", "abort", "hang", "leak", "fork", "print")
_SPARED = 1e9
"""Bytes of the machine's memory that the fault "leak" leaves, if nobody stops it."""
PRINTED = 50_000_000
"""Characters that the fault "print" prints."""


class RogueRings(PacedRings):
    """Rings whose trial does something terrible in a worker, in its second epoch.

    Args:
        pause: seconds a batch.
        fault: one of ``FAULTS``; empty for none.
        poison: what becomes not a number: "loss", "gradient" or "metric"; empty for nothing.
        value: "nan" or "inf", what it becomes.
        epoch: the epoch (1 is the first) in which it does.
    """

    def __init__(
        self,
        pause: float = 0.0,
        fault: str = "",
        poison: str = "",
        value: str = "nan",
        epoch: int = 2,
    ) -> None:
        super().__init__(pause)
        self._fault, self._poison = fault, poison
        self._value, self._epoch = float(value), epoch
        self._batches = 0

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """The points as they are, after the pause and the fault."""
        self._batches += 1
        if in_worker() and self._batches == BATCHES + 2:
            misbehave(self._fault)
        return super().augment(inputs, generator)

    def _poisoned(self, gradient: Tensor) -> Tensor:
        return gradient * self._value

    def _now(self) -> bool:
        return in_worker() and self._batches == (self._epoch - 1) * BATCHES + 2

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, or what it was poisoned with."""
        training = outputs.requires_grad
        if training and self._now() and self._poison == "gradient":
            outputs.register_hook(self._poisoned)  # type: ignore[no-untyped-call]
        loss = super().loss(outputs, targets)
        return loss * self._value if training and self._now() and self._poison == "loss" else loss

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Accuracy, or what it was poisoned with; of the validation only."""
        measured = dict(super().metrics(outputs, targets))
        validating = torch.is_inference_mode_enabled()
        late = self._batches >= self._epoch * BATCHES
        if in_worker() and validating and late and self._poison == "metric":
            measured["accuracy"] = measured["accuracy"] * self._value
        return measured


class PoisonedAdam(TopologicalAdam):
    """Topological Adam whose fields, and so its energy, become not a number at a step.

    Args:
        params: as for Topological Adam.
        lr: learning rate.
        energy_value: "nan" or "inf".
        energy_step: the step (1 is the first); 0 for none.
        options: as for Topological Adam.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        energy_value: str = "nan",
        energy_step: int = 0,
        **options: Any,
    ) -> None:
        self._count, self._step, self._energy_value = 0, energy_step, float(energy_value)
        super().__init__(params, lr=lr, **options)

    def step(self, closure: Any = None) -> Any:
        """One update, after the fields were poisoned if it is time."""
        self._count += 1
        if in_worker() and self._count == self._step:
            for state in self.state.values():
                for value in state.values():
                    if isinstance(value, Tensor) and value.is_floating_point():
                        value.fill_(self._energy_value)
        return super().step(closure)


def misbehave(fault: str) -> None:
    """Do it."""
    if fault == "raise":
        raise RuntimeError("the user's code is broken")
    if fault == "exit":
        sys.exit(3)
    if fault == "interrupt":
        raise KeyboardInterrupt
    if fault == "abort":
        os.abort()
    if fault == "hang":
        while True:
            time.sleep(1.0)
    if fault == "leak":
        kept = []
        while True:
            if psutil.virtual_memory().available > _SPARED:
                kept.append(torch.ones(5_000_000))
            time.sleep(0.02)
    if fault == "fork":
        subprocess.Popen(["sleep", "3000"])
        subprocess.Popen(["sleep", "3000"], start_new_session=True)
        if os.fork() == 0:
            signal.pause()
    if fault == "print":
        for _ in range(PRINTED // 1000):
            print("x" * 999)
