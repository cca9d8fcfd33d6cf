"""The past that a recirculation over time acts through, on a grid of time steps.

Tensors that are pushed are kept, never written into, so a past may be part of a recorded graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from copy import copy

from torch import Tensor


class Memory(ABC):
    """The tokens of the past, (B, N * D) at each of ``count`` steps, and what flows back of them.

    A new one has a past that has always been ``h0``, so at an equilibrium it is exact.

    Attributes:
        count: steps in T.
        time_step: ``T / count``; the memory is right for a solver with this step only.
        periodic: whether the coefficients change over a period, so that states settle on an
            orbit and not on a point.
    """

    periodic = False

    def __init__(self, h0: Tensor, count: int, time_step: float, states: int) -> None:
        self.count, self.time_step = count, time_step
        self._past: deque[Tensor] = deque([h0] * states, maxlen=states)

    @property
    def width(self) -> int:
        """N * D."""
        return self._past[-1].shape[1]

    @property
    def period(self) -> float:
        """T."""
        return self.count * self.time_step

    @abstractmethod
    def term(self) -> Tensor:
        """What flows back at the present time, (B, N * D)."""

    @abstractmethod
    def ahead(self, h: Tensor) -> Tensor:
        """What would flow back one step from now if the tokens then were ``h``."""

    @abstractmethod
    def settled(self, h: Tensor) -> Tensor:
        """What flows back once the whole past equals ``h``; of an orbit, its mean."""

    def push(self, h: Tensor) -> None:
        """Go one step forward; ``h`` (B, N * D) are the tokens at the new time."""
        self._past.append(h)

    def rows(self, index: Tensor) -> Memory:
        """The past of some samples."""
        taken = copy(self)
        found: dict[int, Tensor] = {}  # a new past holds one tensor many times
        for h in self._past:
            if id(h) not in found:
                found[id(h)] = h[index]
        taken._past = deque((found[id(h)] for h in self._past), maxlen=self._past.maxlen)
        return taken


class DelayMemory(Memory):
    """``gain * h(t - T)``."""

    def __init__(self, h0: Tensor, count: int, time_step: float, gain: float) -> None:
        super().__init__(h0, count, time_step, count + 1)  # from t - T to t, both included
        self._gain = gain

    def term(self) -> Tensor:
        """The tokens of T ago."""
        return self._gain * self._past[0]

    def ahead(self, h: Tensor) -> Tensor:
        """The tokens of one step less than T ago."""
        return self._gain * self._past[1]

    def settled(self, h: Tensor) -> Tensor:
        """``gain * h``."""
        return self._gain * h


class FadeMemory(Memory):
    """A sum over the past with exponentially fading weights.

    The weight of ``h(t - k dt)``, k from 0 to count - 1, is the fading's exact integral over one
    step, so that the weights sum to ``gamma (1 - exp(-kappa T))`` whatever the step. The sum goes
    forward by one decay, one new and one old state: its cost does not depend on T.
    """

    def __init__(
        self, h0: Tensor, count: int, time_step: float, gamma: float, kappa: float
    ) -> None:
        super().__init__(h0, count, time_step, count)
        self._decay = math.exp(-kappa * time_step)
        self._newest = gamma * -math.expm1(-kappa * time_step)
        self._leaving = self._newest * math.exp(-kappa * self.period)
        self._gain = gamma * -math.expm1(-kappa * self.period)
        self._sum = self._gain * h0

    def term(self) -> Tensor:
        """The sum over the past."""
        return self._sum

    def ahead(self, h: Tensor) -> Tensor:
        """The sum one step on."""
        rest = (self._decay * self._sum).sub(self._past[0], alpha=self._leaving)
        return rest.add(h, alpha=self._newest)

    def settled(self, h: Tensor) -> Tensor:
        """``gain * h``."""
        return self._gain * h

    def push(self, h: Tensor) -> None:
        """The sum, too, goes one step on."""
        self._sum = self.ahead(h)
        super().push(h)

    def rows(self, index: Tensor) -> Memory:
        """The past and the sum of some samples."""
        taken = super().rows(index)
        assert isinstance(taken, FadeMemory)
        taken._sum = self._sum[index]
        return taken


class GainMemory(Memory):
    """``gamma exp(-kappa (t mod T)) h(t)``: only the present and the phase are kept.

    The coefficient of a step is the decay's exact mean over it, so that the mean over a period is
    the continuous one whatever the step. Its value at the step's beginning would be too strong
    throughout: by 3 % of the orbit's mean with three steps a period, of which .05 % remain.
    """

    periodic = True

    def __init__(
        self, h0: Tensor, count: int, time_step: float, gamma: float, kappa: float, mean: float
    ) -> None:
        super().__init__(h0, count, time_step, 1)
        self._kappa, self._mean = kappa, mean
        decay = kappa * time_step
        self._first = gamma * (-math.expm1(-decay) / decay if decay > 0 else 1.0)
        self._phase = 0

    def term(self) -> Tensor:
        """The present tokens by the present step's coefficient."""
        return self.ahead(self._past[-1])

    def ahead(self, h: Tensor) -> Tensor:
        """By the same: within a step the coefficient does not change."""
        return self._first * math.exp(-self._kappa * self._phase * self.time_step) * h

    def settled(self, h: Tensor) -> Tensor:
        """The mean over a period."""
        return self._mean * h

    def push(self, h: Tensor) -> None:
        """The phase, too, goes one step on."""
        super().push(h)
        self._phase = (self._phase + 1) % self.count
