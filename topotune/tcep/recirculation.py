"""Recirculation: what a token gets back of its neighbours on a ring, or of its own past.

The six readings of the proposal's ``tau(h, t) = gamma exp(-kappa |t mod T|) h(t mod T)``. At an
equilibrium each is one linear map of the tokens; those over time also have a :class:`Memory`,
which the solvers step through time with. T is a number of tokens, ``T`` of a search file, for ring
and shift; it is a time, ``T_time``, for delay, fade and gain.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from copy import copy

import torch
from torch import Tensor

from topotune.errors import ConfigError, UnknownNameError, UnstableError
from topotune.tcep.options import Dynamics

DEFAULT_TIME = 4.0
"""T_time, where it is not given."""

DEFAULT_SHIFT = 1
"""T of ``shift``, where it is not given: all tokens would be a full turn, the identity."""

MOST_STATES = 10_000
"""Stored states of the past at most; beyond, T_time was meant in another unit."""


class Recirculation(ABC):
    """What flows back to the tokens ``h`` (B, N, D).

    Attributes:
        kind: its name in a search file.
        gamma, kappa, period: strength, decay, and T or T_time as resolved; 0 for ``none``.
        symmetric: whether the term is the gradient of a quadratic form.
        gain: coefficient at equilibrium: gamma (ring, shift), gamma exp(-kappa T) (delay),
            gamma (1 - exp(-kappa T)) (fade), the mean over a period (gain), 0 (none).
        timed: whether it acts through the past, so that :meth:`memory` is to be used.
    """

    kind: str
    symmetric = True
    timed = False

    def __init__(self, gamma: float, kappa: float, period: float, gain: float) -> None:
        self.gamma, self.kappa, self.period, self.gain = gamma, kappa, period, gain

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(gamma={self.gamma:g}, kappa={self.kappa:g}, "
            f"period={self.period:g}, gain={self.gain:g})"
        )

    @property
    def period_name(self) -> str:
        """What a search file calls the period."""
        return "T_time" if self.timed else "T"

    @property
    def strongest(self) -> float:
        """The largest rate at which tokens are fed back, which the damping must exceed."""
        return abs(self.gain)

    def check_stable(self, damping: float) -> None:
        """Refuse what no solver can settle, whatever the field does.

        Raises:
            UnstableError: lambda is not above :attr:`strongest`.
        """
        if self.strongest < damping:
            return
        bound = "|gain|" if self.strongest == abs(self.gain) else "|gamma|"
        raise UnstableError(
            "lambda",
            f"must be above {bound} = {self.strongest:g} with recirculation {self.kind!r} "
            f"(got lambda {damping:g}, gamma {self.gamma:g}, kappa {self.kappa:g}, "
            f"{self.period_name} {self.period:g}: gain {self.gain:g})",
            "Raise lambda, lower gamma, or give gamma_fraction, which stays in the stable range",
        )

    @abstractmethod
    def term(self, h: Tensor) -> Tensor:
        """``A h`` at an equilibrium, (B, N, D)."""

    def adjoint_term(self, h: Tensor) -> Tensor:
        """``A^T h``, (B, N, D)."""
        return self.term(h)

    def quadratic(self, h: Tensor) -> Tensor:
        """``1/2 <h, A h>`` of each sample, (B,); its gradient is :meth:`term`.

        Raises:
            ValueError: the recirculation is directed, so no such form exists.
        """
        return 0.5 * (h * self.term(h)).sum(dim=(1, 2))

    def time_step(self, dt: float) -> tuple[int, float]:
        """Stored states of the past, and the step, at most ``dt``, that divides T_time into them.

        Raises:
            ConfigError: more than :data:`MOST_STATES` states would have to be kept.
            ValueError: the recirculation does not act through the past.
        """
        if not self.timed:
            raise ValueError(f"recirculation {self.kind!r} keeps no past")
        if self.period / dt > MOST_STATES:
            raise ConfigError(
                "T_time",
                f"must be at most {MOST_STATES} steps of {dt:g} for recirculation {self.kind!r} "
                f"(got {self.period:g})",
                "Lower T_time, or raise step",
            )
        count = math.ceil(self.period / dt)
        return count, self.period / count

    def memory(self, h0: Tensor, dt: float) -> Memory:
        """A past that equals ``h0`` (B, N * D) at all times, on the grid of :meth:`time_step`.

        Raises:
            ConfigError, ValueError: as :meth:`time_step`.
        """
        raise ValueError(f"recirculation {self.kind!r} keeps no past")


class _Ring(Recirculation):
    """``gamma K h`` with ``K_ij`` decaying with the distance of i and j around a ring of T."""

    kind = "ring"

    def __init__(self, gamma: float, kappa: float, period: float | None, tokens: int) -> None:
        size = _whole_period(self.kind, tokens if period is None else period, 2, tokens)
        super().__init__(gamma, kappa, float(size), gamma)
        self._kernels: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        place = torch.arange(tokens)
        around = (place[:, None] - place[None, :]).abs() % size
        kernel = torch.exp(-kappa * torch.minimum(around, size - around).double())
        # One divisor for all rows: a divisor for each row would break the symmetry.
        self._exact = kernel * (gamma / kernel.sum(dim=1).max())

    def _kernel(self, h: Tensor) -> Tensor:
        key = (h.device, h.dtype)
        if key not in self._kernels:
            if torch.compiler.is_exporting():  # what is made here is no tensor to keep
                return self._exact.to(device=h.device, dtype=h.dtype)
            # Outside of inference mode, so that a training step may use the same tensor.
            with torch.inference_mode(False), torch.no_grad():
                self._kernels[key] = self._exact.to(device=h.device, dtype=h.dtype)
        return self._kernels[key]

    def term(self, h: Tensor) -> Tensor:
        return torch.matmul(self._kernel(h), h)


class _Shift(Recirculation):
    """``gamma h`` rotated by T tokens: directed, so without an energy."""

    kind = "shift"
    symmetric = False

    def __init__(self, gamma: float, kappa: float, period: float | None, tokens: int) -> None:
        self._by = _whole_period(self.kind, DEFAULT_SHIFT if period is None else period, 1, tokens)
        super().__init__(gamma, kappa, float(self._by), gamma)

    def term(self, h: Tensor) -> Tensor:
        return self.gamma * torch.roll(h, self._by, dims=1)

    def adjoint_term(self, h: Tensor) -> Tensor:
        return self.gamma * torch.roll(h, -self._by, dims=1)

    def quadratic(self, h: Tensor) -> Tensor:
        raise ValueError("recirculation 'shift' is directed: no energy has it as its gradient")


class _Timed(Recirculation):
    """A multiple of h at equilibrium, reached through the past."""

    timed = True

    def __init__(self, gamma: float, kappa: float, period: float | None, tokens: int) -> None:
        period = DEFAULT_TIME if period is None else period
        if not (math.isfinite(period) and period > 0):
            raise ConfigError("T_time", f"must be a finite number above 0 (got {period!r})")
        super().__init__(gamma, kappa, period, gamma * self._share(kappa, period))

    @staticmethod
    @abstractmethod
    def _share(kappa: float, period: float) -> float:
        """gain / gamma."""

    def term(self, h: Tensor) -> Tensor:
        return self.gain * h


class _Delay(_Timed):
    """``gamma exp(-kappa T) h(t - T)``."""

    kind = "delay"

    @staticmethod
    def _share(kappa: float, period: float) -> float:
        return math.exp(-kappa * period)

    def memory(self, h0: Tensor, dt: float) -> Memory:
        return DelayMemory(h0, *self.time_step(dt), self.gain)


class _Fade(_Timed):
    """``gamma kappa`` times the integral of ``exp(-kappa s) h(t - s)`` over s from 0 to T."""

    kind = "fade"

    @staticmethod
    def _share(kappa: float, period: float) -> float:
        return -math.expm1(-kappa * period)

    def memory(self, h0: Tensor, dt: float) -> Memory:
        return FadeMemory(h0, *self.time_step(dt), self.gamma, self.kappa)


class _Gain(_Timed):
    """``gamma exp(-kappa (t mod T)) h(t)``: settles on an orbit of period T, not on a point."""

    kind = "gain"

    @property
    def strongest(self) -> float:
        return abs(self.gamma)

    @staticmethod
    def _share(kappa: float, period: float) -> float:
        decay = kappa * period
        return -math.expm1(-decay) / decay if decay > 0 else 1.0

    def time_step(self, dt: float) -> tuple[int, float]:
        """As the base, in an odd number of steps: a state that an Euler step too long for it throws
        to and fro would be back after an even number, and pass for an orbit."""
        count, _ = super().time_step(dt)
        count += 1 - count % 2
        return count, self.period / count

    def memory(self, h0: Tensor, dt: float) -> Memory:
        return GainMemory(h0, *self.time_step(dt), self.gamma, self.kappa, self.gain)


class _NoRecirculation(Recirculation):
    kind = "none"

    def __init__(self, gamma: float, kappa: float, period: float | None, tokens: int) -> None:
        super().__init__(0.0, kappa, 0.0, 0.0)

    def term(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


def _whole_period(kind: str, period: float, low: int, tokens: int) -> int:
    if not (period == int(period) if math.isfinite(period) else False) or not (
        low <= period <= tokens
    ):
        raise ConfigError(
            "T",
            f"must be a whole number of tokens, {low} to {tokens}, for recirculation {kind!r} "
            f"(got {period:g})",
            "A time is T_time, of recirculation delay, fade and gain",
        )
    return int(period)


class Memory(ABC):
    """The tokens of the past, (B, N * D) at each of ``count`` steps, and what flows back of them.

    A new one has a past that has always been ``h0``, so at an equilibrium it is exact. Tensors
    that are pushed are kept, never written into, so a past may be part of a recorded graph.

    Attributes:
        count: steps in T.
        time_step: ``T / count``; the memory is right for a solver with this step only.
        gain: what comes back of a past that does not change.
        periodic: whether the coefficients change over a period, so that states settle on an
            orbit and not on a point.
    """

    periodic = False

    def __init__(self, h0: Tensor, count: int, time_step: float, gain: float, states: int) -> None:
        self.count, self.time_step, self.gain = count, time_step, gain
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

    def settled(self, h: Tensor) -> Tensor:
        """What flows back once the whole past equals ``h``; of an orbit, its mean."""
        return self.gain * h

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
        super().__init__(h0, count, time_step, gain, count + 1)  # t - T to t, both included

    def term(self) -> Tensor:
        """The tokens of T ago."""
        return self.gain * self._past[0]

    def ahead(self, h: Tensor) -> Tensor:
        """The tokens of one step less than T ago."""
        return self.gain * self._past[1]


class FadeMemory(Memory):
    """A sum over the past with exponentially fading weights.

    The weight of ``h(t - k dt)``, k from 0 to count - 1, is the fading's exact integral over one
    step, so that the weights sum to ``gamma (1 - exp(-kappa T))`` whatever the step. The sum goes
    forward by one decay, one new and one old state: its cost does not depend on T.
    """

    def __init__(
        self, h0: Tensor, count: int, time_step: float, gamma: float, kappa: float
    ) -> None:
        gain = gamma * -math.expm1(-kappa * (count * time_step))
        super().__init__(h0, count, time_step, gain, count)
        self._decay = math.exp(-kappa * time_step)
        self._newest = gamma * -math.expm1(-kappa * time_step)
        self._leaving = self._newest * math.exp(-kappa * self.period)
        self._sum = self.gain * h0

    def term(self) -> Tensor:
        """The sum over the past."""
        return self._sum

    def ahead(self, h: Tensor) -> Tensor:
        """The sum one step on."""
        rest = (self._decay * self._sum).sub(self._past[0], alpha=self._leaving)
        return rest.add(h, alpha=self._newest)

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
        super().__init__(h0, count, time_step, mean, 1)
        self._kappa = kappa
        decay = kappa * time_step
        self._first = gamma * (-math.expm1(-decay) / decay if decay > 0 else 1.0)
        self._phase = 0

    def term(self) -> Tensor:
        """The present tokens by the present step's coefficient."""
        return self.ahead(self._past[-1])

    def ahead(self, h: Tensor) -> Tensor:
        """By the same: within a step the coefficient does not change."""
        return self._first * math.exp(-self._kappa * self._phase * self.time_step) * h

    def push(self, h: Tensor) -> None:
        """The phase, too, goes one step on."""
        super().push(h)
        self._phase = (self._phase + 1) % self.count


_KINDS: dict[str, type[_Ring | _Shift | _Timed | _NoRecirculation]] = {
    "ring": _Ring,
    "delay": _Delay,
    "fade": _Fade,
    "gain": _Gain,
    "shift": _Shift,
    "none": _NoRecirculation,
}


def build_recirculation(dynamics: Dynamics, tokens: int, gamma: float) -> Recirculation:
    """The recirculation that the dynamics describe.

    Args:
        dynamics: kind, kappa, T or T_time, and lambda; its gamma is not read.
        tokens: N.
        gamma: the strength, resolved.

    Raises:
        ConfigError: T, T_time or gamma breaks its rule.
        UnstableError: the damping does not exceed what flows back.
        UnknownNameError: no such kind.
    """
    try:
        kind = _KINDS[dynamics.recirculation]
    except KeyError:
        raise UnknownNameError("recirculation", dynamics.recirculation, _KINDS) from None
    if not math.isfinite(gamma):
        raise ConfigError("gamma", f"must be a finite number (got {gamma!r})")
    period = dynamics.time if kind.timed else dynamics.period
    built = kind(gamma, dynamics.kappa, period, tokens)
    built.check_stable(dynamics.damping)
    return built
