"""Learning-rate schedules: pure functions of the global step, so that a resume needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from topotune.errors import UnknownNameError

BASE_RATE = "initial_lr"
"""Key under which a parameter group keeps its base rate (the key torch's schedulers use); it
lives in ``param_groups`` and therefore in every checkpoint."""


def _constant(progress: float) -> float:
    return 1.0


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1.0 - progress


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
}


def find_schedule(name: str) -> Callable[[float], float]:
    """The schedule of that name: progress in [0, 1] to a factor of the base rate.

    Raises:
        UnknownNameError: no schedule has that name.
    """
    if name not in SCHEDULES:
        raise UnknownNameError("schedule", name, SCHEDULES)
    return SCHEDULES[name]


def rate_factor(name: str, step: int, total: int) -> float:
    """The factor of the base rate for the step with index ``step`` (from 0) of ``total``.

    The first step uses the base rate itself; zero would be reached at ``step == total``, so no
    step is wasted on a rate of zero.
    """
    return find_schedule(name)(step / total)


def set_rates(optimizer: Optimizer, factor: float) -> None:
    """Give every parameter group its own base rate times ``factor``.

    The base rate is what the group had when it was first seen. A rate that is a tensor is changed
    in place, as fused and capturable optimizers require.
    """
    for group in optimizer.param_groups:
        if BASE_RATE not in group:
            group[BASE_RATE] = float(group["lr"])
        base = group[BASE_RATE]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(base * factor)
        else:
            group["lr"] = base * factor
