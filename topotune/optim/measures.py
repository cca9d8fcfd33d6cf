"""What the fields report: metrics on request, and a trace of every step.

Only reading waits for the device: :func:`metrics` when it is called, and the trace once a drain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topotune.optim.fields import COMMON, CONTROLLED, CURRENT, ENERGY, SKIPPED, Array, FieldBatch
from topotune.optim.state import coupling_of

FieldStates = Sequence[tuple[dict[str, Tensor], Mapping[str, Any]]]
"""The states of the tensors that have fields, each with its parameter group."""


def materialised(state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The fields ``alpha, beta`` of a tensor, fresh and float64."""
    kind = coupling_of(state)
    assert kind is not None
    alpha, beta = kind.materialise(dict(state))
    return alpha.double(), beta.double()


def common(tensors: FieldStates) -> Tensor:
    """The common scalars on the CPU, (4, k); zeros (4, 1) where no tensor has fields."""
    rows = [state["scalars"][:COMMON].cpu() for state, _ in tensors]
    return torch.stack(rows or [torch.zeros(COMMON, dtype=torch.float64)], dim=1)


def field_metrics(tensors: FieldStates) -> dict[str, float]:
    """See ``TopologicalAdam.field_metrics``."""
    sums = dict.fromkeys(("energy", "j_t", "alpha_norm", "beta_norm", "alpha_beta_corr"), 0.0)
    for state, _ in tensors:
        alpha, beta = materialised(state)
        centred_a, centred_b = alpha - alpha.mean(), beta - beta.mean()
        norms = centred_a.norm() * centred_b.norm()
        sums["energy"] += float(0.5 * (alpha.square() + beta.square()).mean())
        sums["j_t"] += float(state["scalars"][CURRENT])
        sums["alpha_norm"] += float(alpha.norm())
        sums["beta_norm"] += float(beta.norm())
        if norms > 0.0:
            sums["alpha_beta_corr"] += float((centred_a * centred_b).sum() / norms)
    return {name: value / max(len(tensors), 1) for name, value in sums.items()}


def metrics(tensors: FieldStates) -> dict[str, float]:
    """See ``TopologicalAdam.metrics``."""
    names = ("energy", "energy_controlled", "coupling_current", "alpha_norm", "beta_norm")
    found = dict.fromkeys((*names, "alpha_beta_cos", "topo_ratio", "skipped_nonfinite"), 0.0)
    rows = common(tensors)
    means = rows.mean(1).tolist()
    found["energy"], found["energy_controlled"] = means[ENERGY], means[CONTROLLED]
    found["coupling_current"] = means[CURRENT]
    found["skipped_nonfinite"] = rows[SKIPPED].sum().item()
    sums = torch.zeros(5, dtype=torch.float64)
    for state, group in tensors:
        alpha, beta = materialised(state)
        correction = torch.tanh(alpha - beta).mul_(group["w_topo"])
        parts = (
            alpha * alpha,
            beta * beta,
            alpha * beta,
            correction.square(),
            adam_direction(state, group).square(),
        )
        sums += torch.stack([part.sum() for part in parts]).cpu()
    alpha_square, beta_square, product, correction_square, direction_square = sums.tolist()
    found["alpha_norm"], found["beta_norm"] = alpha_square**0.5, beta_square**0.5
    if alpha_square * beta_square != 0.0:
        found["alpha_beta_cos"] = product / (alpha_square**0.5 * beta_square**0.5)
    if direction_square != 0.0:
        found["topo_ratio"] = (correction_square / direction_square) ** 0.5
    return found


def adam_direction(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Tensor:
    """Adam's direction of the last step, in float64, from the moments as they are."""
    beta1, beta2 = group["betas"]
    step = state["step"].item()
    mean = state["exp_avg"].double() / (1.0 - beta1**step)
    square = state["exp_avg_sq"].double() / (1.0 - beta2**step)
    # With eps inside the root, this average of squares holds it already.
    floor = 0.0 if group["eps_inside_sqrt"] else float(group["eps"])
    direction: Tensor = mean.div_(square.sqrt_().add_(floor))
    return direction


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
    """Sums over tensors of the common scalars, a row a step, on each device that has tensors.

    A ring on each device: one device-to-host copy a drain, none a step.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._buffers: dict[torch.device, Tensor] = {}
        self._rows: dict[torch.device, Array] = {}
        self._steps: deque[tuple[int, int]] = deque(maxlen=capacity)  # number, count of tensors
        self._recorded = 0

    def record(self, step: int, batches: Sequence[FieldBatch]) -> None:
        """Add a row: the common scalars of all tensors that took part in ``step``."""
        sums: dict[torch.device, Array] = {}
        count = 0
        for fields in batches:
            device, total = fields.device, fields.report.sum(1)
            sums[device] = sums[device] + total if device in sums else total
            count += fields.report.shape[1]
            if device not in self._buffers:
                shape = (self.capacity, COMMON)
                buffer = torch.zeros(shape, dtype=torch.float64, device=device)
                self._buffers[device] = buffer
                self._rows[device] = buffer.numpy() if fields.on_cpu else buffer
        for device, rows in self._rows.items():
            rows[self._recorded % self.capacity] = sums.get(device, 0.0)
        self._steps.append((step, count))
        self._recorded += 1

    def drain(self) -> EnergyTrace:
        """What was recorded since the last drain, and forget it."""
        dropped = self._recorded - len(self._steps)
        slots = torch.arange(dropped, self._recorded) % self.capacity
        sums = torch.zeros(len(slots), COMMON, dtype=torch.float64)
        for buffer in self._buffers.values():
            sums += buffer.cpu()[slots]
        numbers = torch.tensor(list(self._steps), dtype=torch.int64).view(-1, 2)
        means = sums / numbers[:, 1:]
        self._steps.clear()
        self._recorded = 0
        return EnergyTrace(
            step=numbers[:, 0],
            energy=means[:, ENERGY],
            energy_controlled=means[:, CONTROLLED],
            coupling_current=means[:, CURRENT],
            dropped=dropped,
        )
