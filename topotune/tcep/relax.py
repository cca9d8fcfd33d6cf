"""Relaxation: from a start to the equilibrium of each sample, with a status and what it took."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from topotune.tcep.anderson import Anderson
from topotune.tcep.ode import Dopri5
from topotune.tcep.options import Solver
from topotune.tcep.precision import full_precision
from topotune.tcep.recirculation import Memory
from topotune.tcep.samples import Orbit, Samples
from topotune.tcep.stepping import DIVERGENCE, Explicit, Flow, Noise, Stepper, row_norm

__all__ = ["Equilibrium", "Flow", "Noise", "Status", "relax", "unroll"]


class Status(IntEnum):
    """How a sample's relaxation ended."""

    CONVERGED = 0
    UNCONVERGED = 1
    DIVERGED = 2


@dataclass(frozen=True)
class Equilibrium:
    """Where a batch came to rest, or did not.

    Attributes:
        state: (B, S); of a diverged sample, the state at which it was seen to.
        residual: (B,), root mean square of the flow at the state, infinite where it is NaN.
            With a past: of the flow once the past has become the state. On an orbit: of
            ``(s(t) - s(t - T)) / T``.
        status: (B,) of int8, values of :class:`Status`.
        nfe: (B,) of float32, flow evaluations until the sample was done.
        steps: steps that the batch took; of dopri5, chunks of time.
        time_step: time a step covers (of dopri5, the last may be shorter).
        energy: (steps + 1, B), along the way; None if not asked for.
        orbit: (count, B, S), states at the grid times of the last whole period; None unless the
            recirculation is ``gain``.
        forced: all steps were to be taken, by noise, which leaves no rest point to converge to, or
            by :attr:`Solver.fixed`.
    """

    state: Tensor
    residual: Tensor
    status: Tensor
    nfe: Tensor
    steps: int
    time_step: float
    energy: Tensor | None = None
    orbit: Tensor | None = None
    forced: bool = False

    @property
    def states(self) -> Tensor:
        """Where it ended: the state (B, S), or the orbit (T, B, S)."""
        return self.state if self.orbit is None else self.orbit

    @property
    def converged(self) -> Tensor:
        """(B,) of bool."""
        return self.status == Status.CONVERGED

    @property
    def settled(self) -> Tensor:
        """(B,) of bool, samples that a gradient may be taken at: converged; where all steps were
        forced, those that did not diverge."""
        return self.status != Status.DIVERGED if self.forced else self.converged

    @property
    def unconverged_share(self) -> Tensor:
        """Share of samples that did not converge, diverged ones included; no dimensions."""
        return (~self.converged).float().mean()

    @property
    def diverged_share(self) -> Tensor:
        """Share of samples that diverged; no dimensions."""
        return (self.status == Status.DIVERGED).float().mean()


@full_precision
def relax(
    flow: Flow,
    start: Tensor,
    solver: Solver,
    *,
    dt: float,
    tolerance: float | Tensor | None = None,
    min_steps: int = 0,
    energy: Callable[[Tensor], Tensor] | None = None,
    memory: Memory | None = None,
    noise: Noise | None = None,
) -> Equilibrium:
    """Follow the flow until each sample rests, in full precision; records no gradients.

    Never raises for a sample that does not converge: its status says so. A sample that is done,
    converged or diverged, is frozen and soon no longer evaluated.

    Args:
        flow: the right-hand side; with a memory, without the recirculation.
        start: (B, S), floating point; not written into.
        solver: which solver, its steps and its tolerance. "auto" is anderson, or euler with a
            memory or noise. Noise makes any solver euler: all steps are taken, and the residual
            is that of the flow without noise.
        dt: step size; with a memory, the memory's own.
        tolerance: instead of the solver's; one number, or one a sample, (B,).
        min_steps: no sample is done before so many steps, even if it starts at rest.
        energy: of states (B, S), (B,); its values are recorded after every step.
        memory: the past of the first entries of the state, which must be at ``start``. It is
            used up. With a periodic one, whole periods are run, at least one.
        noise: added after each step.

    Raises:
        ValueError: the start is not (B, S), the tolerance does not fit it, or the solver cannot
            step a memory.
    """
    with torch.no_grad():
        bound = solver.tolerance if tolerance is None else tolerance
        samples = Samples(flow, start, bound)
        stepper = _stepper(solver, dt, start, bound, memory, noise)
        orbit, limit, least = _extent(solver, stepper, min_steps, memory, noise)
        path = None if energy is None else [energy(start)]

        def after_step() -> None:
            if path is not None and energy is not None:
                path.append(energy(samples.state()))

        compact = noise is None and not torch.compiler.is_exporting()
        steps = _walk(samples, stepper, orbit, limit, least, compact, after_step)
        state, norm, nfe, ceiling = samples.finish(stepper)
        scale = math.sqrt(start.shape[1])
        sound = torch.isfinite(state).all(dim=1) & (norm <= DIVERGENCE * scale)
        status = torch.where(norm <= ceiling, int(Status.CONVERGED), int(Status.UNCONVERGED))
        status = torch.where(sound, status, int(Status.DIVERGED)).to(torch.int8)
        return Equilibrium(
            state,
            (norm / scale).nan_to_num(nan=math.inf, posinf=math.inf),
            status,
            nfe,
            steps,
            stepper.time_step,
            None if path is None else torch.stack(path),
            None if orbit is None else orbit.result(samples.rows.state),
            forced=noise is not None or solver.fixed,
        )


@full_precision
def unroll(
    flow: Flow,
    start: Tensor,
    solver: Solver,
    *,
    dt: float,
    min_steps: int = 0,
    memory: Memory | None = None,
    noise: Noise | None = None,
) -> tuple[Tensor, int, Tensor | None]:
    """The same steps as :func:`relax` with euler or heun, recorded by automatic differentiation.

    Samples that are done are frozen by the same rule and stay in the batch. Solvers other than
    heun are stepped as euler. A sample that diverged is frozen where it was seen to; gradients
    through it may be no numbers.

    Returns:
        The state (B, S), the number of steps, and the orbit (count, B, S) of a periodic memory.

    Raises:
        ValueError: as :func:`relax`.
    """
    samples = Samples(flow, start, solver.tolerance)
    heun = solver.name == "heun" and noise is None
    stepper = Explicit("heun" if heun else "euler", dt, memory, noise)
    orbit, limit, least = _extent(solver, stepper, min_steps, memory, noise)
    steps = _walk(samples, stepper, orbit, limit, least)
    state = samples.rows.state
    return state, steps, None if orbit is None else orbit.result(state)


def _stepper(
    solver: Solver,
    dt: float,
    start: Tensor,
    tolerance: float | Tensor,
    memory: Memory | None,
    noise: Noise | None,
) -> Stepper:
    name = solver.name
    if name == "auto":
        name = "anderson" if memory is None else "euler"
    if memory is not None and name in ("anderson", "dopri5"):
        raise ValueError(f"solver {name!r} cannot step a past; choose euler, heun or auto")
    if noise is not None or name in ("euler", "heun"):
        return Explicit("euler" if noise is not None else name, dt, memory, noise)
    if name == "anderson":
        return Anderson(dt, start)
    return Dopri5(dt, solver.steps, float(torch.as_tensor(tolerance).min()))


def _extent(
    solver: Solver, stepper: Stepper, min_steps: int, memory: Memory | None, noise: Noise | None
) -> tuple[Orbit | None, int, int]:
    """The orbit to record, if there is one, and the most and fewest steps to take."""
    orbit = Orbit(memory) if memory is not None and memory.periodic else None
    limit = math.ceil(solver.steps / stepper.units)
    if orbit is not None:
        limit = orbit.limit(solver.steps)
    forced = noise is not None or solver.fixed
    return orbit, limit, limit if forced else min(limit, math.ceil(min_steps / stepper.units))


def _walk(
    samples: Samples,
    stepper: Stepper,
    orbit: Orbit | None,
    limit: int,
    least: int,
    compact: bool = False,
    after_step: Callable[[], None] | None = None,
) -> int:
    """Step until no sample moves or the limit; the number of steps.

    Without ``after_step`` the state after the last step is not evaluated.
    """
    for step in range(limit + 1):
        if step == limit and after_step is None:
            return step
        force, vanishing = samples.evaluate(stepper)
        norm = row_norm(vanishing.detach())
        drift = norm if orbit is None else orbit.drift(step, samples.rows.state)
        samples.judge(norm, drift, step >= least, stepper.excused())
        if step == limit or not samples.look(step):
            return step
        if orbit is not None:
            orbit.record(step, samples.rows.state, samples.mask)
        if compact and samples.sparse:
            kept = samples.compact()
            stepper.keep(kept)
            if orbit is not None:
                orbit.keep(kept)
            force, norm = force[kept], norm[kept]
        samples.advance(stepper, force, norm)
        if after_step is not None:
            after_step()
    raise AssertionError("unreachable: the last turn returns")
