"""Steps of the solvers that walk through time: the one place of their formulas.

:func:`topotune.tcep.relax.relax` takes them without gradients, and
:func:`topotune.tcep.relax.unroll` records the very same ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from topotune.errors import UnknownNameError
from topotune.tcep.functions import smooth_relu
from topotune.tcep.recirculation import Memory

NOISE_KINDS = ("gaussian", "poisson")

DIVERGENCE = 1e6
"""A sample has diverged when the root mean square of its flow is above this, or NaN."""


class Flow(Protocol):
    """The right-hand side of ``ds/dt = F(s)``, for a batch of samples."""

    def __call__(self, state: Tensor, /) -> Tensor:
        """(B, S) to (B, S)."""
        ...

    def rows(self, index: Tensor, /) -> Flow:
        """The flow of some samples, in the order of ``index``, (B',) of int64."""
        ...


@dataclass(frozen=True)
class Noise:
    """Noise that is added to the state after every step.

    Attributes:
        kind: "gaussian": ``level sqrt(dt) xi``; "poisson", shot noise that grows with the state:
            ``level sqrt(dt) (Poisson(r) - r)`` with ``r = smooth_relu(s)``.
        level: strength; the variance a unit of time is ``level^2``, or ``level^2 r``.
        generator: what the noise is drawn from, on the device of the states.
        copies: the batch consists of so many equal parts that get the same noise, so that it
            cancels from their differences.
    """

    kind: str
    level: float
    generator: torch.Generator
    copies: int = 1

    def __post_init__(self) -> None:
        if self.kind not in NOISE_KINDS:
            raise UnknownNameError("noise", self.kind, NOISE_KINDS)

    def again(self) -> Noise:
        """The same noise from its beginning."""
        seed = self.generator.initial_seed()
        generator = torch.Generator(self.generator.device).manual_seed(seed)
        return replace(self, generator=generator)

    def kick(self, state: Tensor, dt: float) -> Tensor:
        """One draw, (B, S); a constant for automatic differentiation, as its mean is zero."""
        size = self.level * math.sqrt(dt)
        part = (len(state) // self.copies, *state.shape[1:])
        if self.kind == "gaussian":
            drawn = torch.randn(
                part, generator=self.generator, dtype=state.dtype, device=state.device
            )
            return size * drawn.repeat(self.copies, 1)
        with torch.no_grad():
            # A diverged sample's rate may be NaN, which the sampler would refuse.
            rate = smooth_relu(state).nan_to_num(nan=0.0, posinf=0.0)
            if self.copies == 1:
                counts = torch.poisson(rate, generator=self.generator)
            else:
                counts = self._common_counts(rate)
            return size * (counts - rate)

    def _common_counts(self, rate: Tensor) -> Tensor:
        """Poisson counts of the parts: the first part's, plus those of what a part has more.

        A sum of Poisson counts is one, so each part's are right, and parts of nearly equal rates
        get nearly equal noise.
        """
        parts = rate.view(self.copies, -1, *rate.shape[1:])
        least = parts.amin(dim=0)
        common = torch.poisson(least, generator=self.generator)
        return (common + torch.poisson(parts - least, generator=self.generator)).flatten(0, 1)


class Stepper(ABC):
    """A solver: how a batch goes from one state to the next.

    Attributes:
        time_step: time that a step covers.
        units: how many of the caller's ``steps`` a step stands for.
    """

    time_step: float
    units: int = 1

    def force(self, flow: Flow, state: Tensor) -> tuple[Tensor, Tensor]:
        """One evaluation: what moves the state, and what vanishes at an equilibrium."""
        force = flow(state)
        return force, force

    @abstractmethod
    def step(
        self, flow: Flow, state: Tensor, force: Tensor, norm: Tensor, live: Tensor | None
    ) -> tuple[Tensor, int]:
        """One step of the samples that are live.

        Args:
            flow: of the samples.
            state: (B, S).
            force: at the state, as :meth:`force` gave it.
            norm: (B,), the Euclidean norm of what has to vanish.
            live: (B,) of bool, the samples to move; None: all.

        Returns:
            The new state and the number of further evaluations that it took.
        """

    def excused(self) -> Tensor | None:
        """Samples, (B,) of bool, that the next step takes back if their flow exploded."""
        return None

    def last(self, state: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The state and norm to end with, when no step is left."""
        return state, norm

    def keep(self, index: Tensor) -> None:
        """Go on with some of the samples only."""
        return


class Explicit(Stepper):
    """Euler or Heun with a fixed step, with a past, with noise.

    Args:
        method: "euler" or "heun".
        dt: step; with a memory, the memory's own step holds.
        memory: the past of the first entries of the state; it is stepped along.
        noise: added to all entries after each step.
    """

    def __init__(
        self, method: str, dt: float, memory: Memory | None = None, noise: Noise | None = None
    ) -> None:
        self.heun = method == "heun"
        self.time_step = dt if memory is None else memory.time_step
        self.memory, self.noise = memory, noise

    def force(self, flow: Flow, state: Tensor) -> tuple[Tensor, Tensor]:
        """As the base; with a memory, the second is the right-hand side once the past settled.

        The right-hand side at this moment would be the wrong thing to wait for: while the delayed
        tokens are still those of the start, it vanishes at a point that is no equilibrium.
        """
        force = flow(state)
        if self.memory is None:
            return force, force
        settled = self.memory.settled(state[:, : self.memory.width])
        return _add_to_tokens(force, self.memory.term()), _add_to_tokens(force, settled)

    def step(
        self, flow: Flow, state: Tensor, force: Tensor, norm: Tensor, live: Tensor | None
    ) -> tuple[Tensor, int]:
        """One Euler or Heun step; the past goes along."""
        dt = self.time_step
        new = torch.add(state, force, alpha=dt)
        if self.heun:
            second = flow(new)
            if self.memory is not None:
                ahead = self.memory.ahead(new[:, : self.memory.width])
                second = _add_to_tokens(second, ahead)
            new = torch.add(state, force + second, alpha=0.5 * dt)
        if self.noise is not None:
            new = new + self.noise.kick(state, dt)
        if live is not None:
            new = torch.where(live.unsqueeze(1), new, state)
        if self.memory is not None:
            self.memory.push(new[:, : self.memory.width])
        return new, int(self.heun)

    def keep(self, index: Tensor) -> None:
        """Keep the past of some samples."""
        if self.memory is not None:
            self.memory = self.memory.rows(index)


def _add_to_tokens(force: Tensor, term: Tensor) -> Tensor:
    rest = force.shape[1] - term.shape[1]
    return force + (functional.pad(term, (0, rest)) if rest else term)


def queues(device: torch.device) -> bool:
    """Whether work is queued there, so that a look at a tensor's values stalls it.

    Under ``torch.export`` there are no values to look at, on any device.
    """
    return device.type != "cpu" or torch.compiler.is_exporting()


def row_norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample, (B, S) to (B,)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norm
