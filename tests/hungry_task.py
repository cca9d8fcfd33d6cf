"""A user's task that runs out of GPU memory on request, and notes what its trial holds of Ray."""

from __future__ import annotations

import json
import time
from pathlib import Path

import ray
import torch
from torch import Tensor

from tests.user_task import Rings


class Hungry(Rings):
    """Rings whose training may raise what torch raises when a GPU is full.

    Args:
        folder: where it notes, a line a batch, what its trial holds.
        memory: "enough" never raises, "once" in the second epoch of the first attempt, "always"
            there and in every later attempt.
        pause: seconds a batch; four times as long where there is enough, so that others wait.
    """

    def __init__(self, folder: str, memory: str = "enough", pause: float = 0.02) -> None:
        super().__init__()
        self._folder, self._memory, self._pause = Path(folder), memory, pause
        self._batches = 0
        self._failed = (self._folder / f"failed-{memory}").exists()

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        if not ray.is_initialized():
            return inputs  # the driver's rehearsal
        self._batches += 1
        held = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        note = {"memory": self._memory, "at": time.time(), "held": held}
        with (self._folder / "held.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        time.sleep(self._pause * (4 if self._memory == "enough" else 1))
        again = self._failed and self._memory == "always"
        if again or (self._memory != "enough" and not self._failed and self._batches == 20):
            (self._folder / f"failed-{self._memory}").touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0")
        return inputs
