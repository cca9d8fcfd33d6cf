"""The nudged phase: the free flow, pulled towards lower cost, corrected where it is asymmetric."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from topotune.tcep.network import MINIMUM_STEPS, DrivenFlow, TCEPNetwork
from topotune.tcep.relax import Equilibrium, Noise, relax
from topotune.tcep.spectral import Jacobian

TOLERANCE_SHARE = 5e-4
"""The nudged phase's tolerance is at most this share of the nudge itself. What is left of the flow
becomes an error of the gradient, magnified by one over the stability margin."""

COARSEST_SHARE = 0.02
"""The share that rounding must allow at the least; with a much looser tolerance the free
equilibrium would pass for the nudged one, and the gradient would be zero."""

ROUNDING = 2.0
"""No tolerance below this many roundings of the typical token is asked for (0.6 were reached)."""


def cost_slope(network: TCEPNetwork, state: Tensor, targets: Tensor) -> Tensor:
    """The per-sample cross-entropy's derivative by the features, (B, R)."""
    surplus = torch.softmax(network.logits(state), dim=1)
    surplus = surplus - F.one_hot(targets, surplus.shape[1]).to(surplus)
    return surplus @ network.head.weight


class NudgedFlow:
    """``F(s) - beta (1/G) dC/ds``, with the correction of asymmetric flows if asked for.

    The correction subtracts ``(J - J^+)(s - s*)``, J the Jacobian at the free equilibrium ``s*``
    and ``J^+`` its adjoint in the metric (design, section 4): what is left has a symmetric
    Jacobian there, so a small nudge moves the state along the exact gradient's direction.

    Args:
        free: the flow of the free phase, ``F``.
        targets: (B,) class numbers.
        beta: (B,) strength and sign of each sample's nudge.
        centre: (B, S) free equilibrium; None for no correction.
    """

    def __init__(
        self, free: DrivenFlow, targets: Tensor, beta: Tensor, centre: Tensor | None
    ) -> None:
        self._free, self._targets, self._beta, self._centre = free, targets, beta, centre
        self._jacobian: Jacobian | None = None
        self._metric = beta

    def __call__(self, state: Tensor) -> Tensor:
        """``ds/dt``, (B, S)."""
        network = self._free.network
        slope = cost_slope(network, state, self._targets)
        pull = network.field.nudge(state, slope)
        flow = self._free(state) - self._beta.unsqueeze(1) * pull
        if self._centre is not None:
            flow = flow - self._asymmetry(state - self._centre, self._centre)
        return flow

    def rows(self, index: Tensor) -> NudgedFlow:
        """The flow of some samples."""
        centre = None if self._centre is None else self._centre[index]
        return NudgedFlow(self._free.rows(index), self._targets[index], self._beta[index], centre)

    def _asymmetry(self, away: Tensor, centre: Tensor) -> Tensor:
        """``(J - J^+) away`` at the free equilibrium, (B, S)."""
        network, field = self._free.network, self._free.network.field
        if field.conservative:  # what is asymmetric is linear and known
            h, _ = field.split(away)
            term = network.recirculation.term(h) - network.recirculation.adjoint_term(h)
            return field.widen(term)
        if self._jacobian is None:
            self._jacobian = Jacobian(self._free, centre)
            self._metric = field.metric(centre).detach()
        against = self._jacobian.transposed_times(self._metric * away) / self._metric
        return self._jacobian.times(away) - against


@dataclass(frozen=True)
class NudgedPhases:
    """Nudged equilibria of one batch, phase by phase.

    Attributes:
        states: (P, B, S); of an orbit (P, T, B, S).
        found: the relaxation of all phases in one batch of P B samples.
        resolution: the coarsest tolerance that will do over the finest that the dtype's rounding
            allows, 0-d; below 1 the nudge drowns in rounding.
        force: RMS of the cost's pull at beta 1, over the samples whose free phase settled.
        settled: (B,) of bool, samples whose free phase and every nudged phase settled.
    """

    states: Tensor
    found: Equilibrium
    resolution: Tensor
    force: Tensor
    settled: Tensor


def relax_nudged(
    network: TCEPNetwork,
    drive: Tensor,
    targets: Tensor,
    free: Equilibrium,
    betas: Tensor,
    strength: Tensor,
    *,
    correct: bool,
    noise: Noise | None = None,
) -> NudgedPhases:
    """Relax from the free equilibrium under several nudges at once.

    The tolerance is the solver's, but at most ``TOLERANCE_SHARE * strength * RMS|dC|``, and at
    least what rounding allows, both over the samples whose free phase settled: one that did not
    may lie anywhere, and would decide for all others how far they are relaxed. Such a sample is
    not followed any further.

    Args:
        network: any.
        drive: (B, N, D), detached.
        targets: (B,).
        free: the free phase.
        betas: (P,) one nudge a phase, on the device; zero gives the free equilibrium again, to
            the tighter tolerance.
        strength: 0-d, beta.
        correct: correct an asymmetric flow.
        noise: the same noise for all phases.
    """
    phases, batch = len(betas), len(drive)
    with torch.no_grad():
        state, solver = free.state, network.dynamics.solver
        followed = free.settled | ~free.settled.any()  # all, where no sample has settled
        pull = network.field.nudge(state, cost_slope(network, state, targets))
        force = _root_mean_square(pull, followed)
        typical = _root_mean_square(network.dynamics.damping * state, followed).clamp_min(1.0)
        floor = ROUNDING * torch.finfo(state.dtype).eps * typical
        wanted = (TOLERANCE_SHARE * strength * force).clamp_max(solver.tolerance)
        tolerance = torch.where(followed, torch.maximum(wanted, floor), torch.inf)
        start = state.repeat(phases, 1)
        centre = start if correct and not network.conservative else None
        flow = NudgedFlow(
            network.free_flow(drive.repeat(phases, 1, 1)),
            targets.repeat(phases),
            betas.to(state.dtype).repeat_interleave(batch),
            centre,
        )
        found = relax(
            flow,
            start,
            solver,
            dt=network.time_step,
            tolerance=tolerance.repeat(phases),
            min_steps=MINIMUM_STEPS,
            memory=network.memory(start),
            noise=None if noise is None else replace(noise, copies=phases),
        )
    states = found.state.view(phases, batch, -1)
    settled = free.settled & found.settled.view(phases, batch).all(dim=0)
    if found.orbit is not None:
        states = found.orbit.view(len(found.orbit), phases, batch, -1).transpose(0, 1)
    resolution = COARSEST_SHARE * strength * force / floor
    return NudgedPhases(states, found, resolution, force, settled)


def _root_mean_square(values: Tensor, rows: Tensor) -> Tensor:
    """Over the entries of those rows of (B, S) that a mask (B,) names, 0-d."""
    means = values.square().mean(dim=1)
    return (torch.where(rows, means, 0.0).sum() / rows.sum()).sqrt()
