"""What the loop derives from its per-step numbers; pure Python on numbers already on the host."""

from __future__ import annotations

import bisect
import resource
import sys
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.optim import Optimizer

from topotune.errors import DivergedError

SPIKE_FACTOR = 5.0
"""A gradient norm above this many running medians is a spike."""
SPIKE_WINDOW = 100
"""Steps that the running median looks back on."""
SPIKE_MINIMUM = 10
"""Steps that must be known before one can be called a spike: the first gradients of a fresh
network are no sample of anything."""

ENERGY_BOUND = 1000.0
"""A controlled field energy above this multiple of its target is divergence.

Energy control holds the energy at its target (exact) or within 10 times of it (band); three
orders of magnitude are out of reach of either while it works, and well below where the fields
overflow. The energy before control is not bounded: that of the uniform coupling legitimately lies
far above the target.
"""


class SpikeCounter:
    """Counts the steps whose gradient norm exceeds 5 times the running median.

    The running median is that of the last 100 norms before the step that is judged, across
    epochs; a step is judged once 10 norms are known. Spikes enter the window like any other norm.
    """

    def __init__(self, window: Iterable[float] = ()) -> None:
        self._recent: deque[float] = deque(window)
        self._sorted = sorted(self._recent)

    @property
    def window(self) -> list[float]:
        """The norms that the next median is taken of, oldest first; checkpoints save them."""
        return list(self._recent)

    def count(self, norms: Iterable[float]) -> int:
        """Judge these norms in order and return how many are spikes."""
        return sum(self._judge(norm) for norm in norms)

    def _judge(self, norm: float) -> bool:
        known = len(self._sorted)
        spike = False
        if known >= SPIKE_MINIMUM:
            middle = known // 2
            median = self._sorted[middle]
            if known % 2 == 0:
                median = 0.5 * (median + self._sorted[middle - 1])
            spike = norm > SPIKE_FACTOR * median
        if known == SPIKE_WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(norm)
        bisect.insort(self._sorted, norm)
        return spike


def loss_roughness(losses: Sequence[float]) -> float:
    """Population standard deviation of the step-to-step loss changes over the absolute mean loss.

    Zero for fewer than three losses (a single change has no spread) and infinite where the loss
    changes unevenly around a mean of zero.
    """
    if len(losses) < 3:
        return 0.0
    spread = float(np.std(np.diff(losses)))
    mean = abs(float(np.mean(losses)))
    if mean == 0.0:
        return np.inf if spread > 0.0 else 0.0
    return spread / mean


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB (2**20 bytes).

    On a GPU: the most that torch's tensors took since the last reset of its counter. On the CPU:
    the largest resident set of the whole process so far, earlier trials included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here


def energy_limit(optimizer: Optimizer) -> float | None:
    """The largest controlled energy that counts as training; None without a target.

    The target is ``target_energy`` of the parameter groups, the largest where they differ, since
    the energy is reported as one mean over all tensors.
    """
    targets = [float(g["target_energy"]) for g in optimizer.param_groups if "target_energy" in g]
    return ENERGY_BOUND * max(targets) if targets else None


def find_divergence(
    steps: dict[str, np.ndarray],
    first: int,
    epoch: int,
    limit: float | None,
    known: tuple[int, str] | None = None,
) -> DivergedError | None:
    """The earliest breach of finiteness or of the energy bound in a run of steps, if any.

    Args:
        steps: name to one value a step, in order; all of one length.
        first: number of the first of these steps, counted from 1.
        epoch: epoch that they belong to, counted from 1.
        limit: bound on ``energy_controlled``; None for no bound.
        known: index and cause of a step that the learner itself found fault with; it knows more
            than that the loss of this step is not a number, so its cause stands.
    """
    worst: tuple[int, str] | None = None
    for name, values in steps.items():
        bad = ~np.isfinite(values)
        if name == "energy_controlled" and limit is not None:
            bad |= values > limit
        if bad.any():
            index = int(np.argmax(bad))
            if worst is None or index < worst[0]:
                worst = (index, name)
    if known is not None and (worst is None or known[0] <= worst[0]):
        return DivergedError(f"{known[1]}, at step {first + known[0]} (epoch {epoch})")
    if worst is None:
        return None
    index, name = worst
    value, place = float(steps[name][index]), f"step {first + index} (epoch {epoch})"
    label = name.replace("_", " ")
    if limit is not None and limit < value < np.inf:
        return DivergedError(
            f"{label} {value:.6g} at {place}: above {ENERGY_BOUND:g} times its target "
            f"{limit / ENERGY_BOUND:g}"
        )
    return DivergedError(f"{label} is {value} at {place}")
