"""A device-side ring of per-step values: one device-to-host copy a drain, none a step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from topotune.optim._fields import COMMON, CONTROLLED, CURRENT, ENERGY, Array, FieldBatch


@dataclass(frozen=True)
class EnergyTrace:
    """Per-step values since the last drain, oldest first; CPU tensors of one length.

    Attributes:
        step: int64, the number of the optimizer's step, from 1.
        energy: float64, mean over tensors of the energy before control.
        energy_controlled: float64, the same after control.
        coupling_current: float64, mean over tensors of ``|J|``.
        dropped: steps that were overwritten because more passed than the ring holds; they are the
            oldest ones and are missing here.
    """

    step: Tensor
    energy: Tensor
    energy_controlled: Tensor
    coupling_current: Tensor
    dropped: int


class TraceRing:
    """Sums over tensors of the common scalars, a row a step, on each device that has tensors."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._buffers: dict[torch.device, Tensor] = {}
        self._rows: dict[torch.device, Array] = {}
        self._entries: deque[tuple[int, list[int], list[torch.device]]] = deque(maxlen=capacity)
        self._recorded = 0

    def record(self, step: int, fields: FieldBatch) -> None:
        """Add the common scalars of the fields' tensors to the row of ``step``."""
        if not self._entries or self._entries[-1][0] != step:
            self._entries.append((step, [], []))
            self._recorded += 1
        _, counts, devices = self._entries[-1]
        device = fields.device
        if device not in self._buffers:
            shape = (self.capacity, COMMON)
            buffer = torch.zeros(shape, dtype=torch.float64, device=device)
            self._buffers[device] = buffer
            self._rows[device] = buffer.numpy() if fields.on_cpu else buffer
        place = (self._recorded - 1) % self.capacity
        sums = fields.report.sum(1)
        if device in devices:
            self._rows[device][place] += sums
        else:
            self._rows[device][place] = sums
            devices.append(device)
        counts.append(fields.report.shape[1])

    def drain(self) -> EnergyTrace:
        """What was recorded since the last drain, and forget it."""
        kept = len(self._entries)
        first = self._recorded - kept
        slots = torch.arange(first, self._recorded) % self.capacity
        sums = torch.zeros(kept, COMMON, dtype=torch.float64)
        for device, buffer in self._buffers.items():
            written = torch.tensor([device in devices for _, _, devices in self._entries])
            sums += torch.where(written.bool()[:, None], buffer.cpu()[slots], 0.0)
        counts = torch.tensor([sum(counts) for _, counts, _ in self._entries], dtype=torch.float64)
        means = sums / counts[:, None]
        trace = EnergyTrace(
            step=torch.tensor([step for step, _, _ in self._entries], dtype=torch.int64),
            energy=means[:, ENERGY],
            energy_controlled=means[:, CONTROLLED],
            coupling_current=means[:, CURRENT],
            dropped=first,
        )
        self._entries.clear()
        self._recorded = 0
        return trace
