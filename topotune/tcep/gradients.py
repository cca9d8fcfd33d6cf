"""Exact ways to the gradient of the loss at the equilibrium: nudging and implicit differentiation.

Each takes a network and its free phase, writes the gradient of the mean cross-entropy into
``.grad``, and returns what it measured. The formulas hold at equilibria only, and what they give
elsewhere is without bound: a single sample that has not settled could outweigh a whole batch. So
the mean is over the samples of which every phase settled, and where none did ``.grad`` stays as it
is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from topotune.tcep.network import TCEPNetwork
from topotune.tcep.nudging import NudgedPhases, cost_slope, relax_nudged
from topotune.tcep.options import Learning
from topotune.tcep.relax import Equilibrium, Noise, Status, relax

IMPLICIT_TOLERANCE = 1e-4
"""Residual of the linear solve over the size of its right-hand side."""


class Contrast(NamedTuple):
    """What one batch gave besides its gradients.

    Attributes:
        loss: mean cross-entropy at the free equilibrium, 0-d, detached.
        outputs: logits there, (B, classes), detached.
        measured: name to 0-d tensor, on the device.
    """

    loss: Tensor
    outputs: Tensor
    measured: dict[str, Tensor]


class Phase(NamedTuple):
    """The free phase of a batch: the drive with its graph, and where it led."""

    drive: Tensor
    free: Equilibrium
    logits: Tensor
    targets: Tensor


def free_phase(
    network: TCEPNetwork, inputs: Tensor, targets: Tensor, noise: Noise | None = None
) -> Phase:
    """Relax a batch without a nudge; only the drive keeps a graph."""
    drive = network.drive(inputs)
    free = network.relax(drive.detach(), noise=noise)
    with torch.no_grad():
        logits = network.mean_logits(free.states)
    return Phase(drive, free, logits, targets)


def settled_rows(settled: Tensor) -> Tensor | slice | None:
    """Indices of the samples that a mask (B,) of bool names; None if it names no sample."""
    count = int(settled.sum())
    if count == len(settled):
        return slice(None)
    return settled.nonzero().squeeze(1) if count else None


def measure_free(network: TCEPNetwork, phase: Phase) -> dict[str, Tensor]:
    """Energy, residual, evaluations and shares of the free phase."""
    free = phase.free
    found = {
        "residual_free": free.residual.mean(),
        "nfe_free": free.nfe.to(free.state.dtype).mean(),
        "unconverged_share": free.unconverged_share,
        "diverged_share": free.diverged_share,
    }
    if network.conservative:
        with torch.no_grad():
            found["energy_free"] = network.energy(free.state, phase.drive).mean()
    return found


def eqprop(
    network: TCEPNetwork,
    phase: Phase,
    learning: Learning,
    beta: Tensor,
    *,
    third: bool = False,
    noise: Noise | None = None,
) -> tuple[dict[str, Tensor], NudgedPhases]:
    """Equilibrium propagation (Scellier and Bengio 2017; symmetric: Laborieux et al. 2021).

    Nudges at +beta and -beta (symmetric) or +beta and 0 (one-sided). With an energy, the gradient
    is the difference of its derivatives by the parameters at the two, over the difference of the
    nudges and the batch size; without one, ``-<G ds/dbeta, dF/dtheta>`` at the free equilibrium.
    The readout gets the mean of its plain gradients at both. One call of automatic differentiation
    at detached states: memory does not depend on the steps taken. Samples that did not settle in
    all phases do not count.

    Args:
        network: its gradients cleared.
        phase: the free phase.
        learning: nudge and correction.
        beta: 0-d, on the device.
        third: also relax at nudge 0, for :func:`second_difference`.
        noise: as in the free phase.

    Returns:
        What was measured, and the phases.
    """
    low = -1.0 if learning.nudge == "symmetric" else 0.0
    signs = beta.new_tensor([1.0, low, 0.0][: 3 if third else 2])
    targets, drive = phase.targets, phase.drive.detach()
    phases = relax_nudged(
        network,
        drive,
        targets,
        phase.free,
        signs * beta,
        beta,
        correct=learning.correction,
        noise=noise,
    )
    counted = settled_rows(phases.settled)
    rows = slice(None) if counted is None else counted
    high_state, low_state = phases.states[0][..., rows, :], phases.states[1][..., rows, :]
    driven, targets = phase.drive[rows], targets[rows]
    span = (1.0 - low) * beta * len(targets)
    measured = {}
    if network.conservative:
        upper, lower = (
            over_orbit(lambda s: network.energy(s, driven), s) for s in (high_state, low_state)
        )
        total = (upper - lower).sum() / span
        measured["energy_nudged"] = (0.5 * (upper + lower)).mean().detach()
    else:

        def pull(state: Tensor, moved: Tensor) -> Tensor:
            weights = (network.field.metric(state) * moved).detach()
            return (weights * network.flow(state, driven)).sum()

        centre = phase.free.states[..., rows, :]
        total = -over_orbit(pull, centre, high_state - low_state) / span
    costs = [mean_cost(network, s, targets) for s in (high_state, low_state)]
    if counted is not None:
        (total + 0.5 * (costs[0] + costs[1])).backward()  # type: ignore[no-untyped-call]
    found = phases.found
    measured |= {
        "residual_nudged": found.residual.mean(),
        "nfe_nudged": found.nfe.to(found.state.dtype).mean(),
        "nudge_displacement": (high_state - low_state).detach().square().mean().sqrt(),
        "nudge_resolution": phases.resolution,
        "nudge_force": phases.force,
        **_shares(phase.free, found),
    }
    return measured, phases


def _shares(*phases: Equilibrium) -> dict[str, Tensor]:
    """The shares of a batch's samples that did not converge, or diverged, in any of their phases.

    Args:
        phases: of B samples, or of several times these in a row.
    """
    batch = len(phases[0].state)
    status = torch.cat([phase.status.view(-1, batch) for phase in phases])
    bad = {
        "unconverged_share": status != Status.CONVERGED,
        "diverged_share": status == Status.DIVERGED,
    }
    return {name: phase.any(dim=0).float().mean() for name, phase in bad.items()}


def over_orbit(function: Callable[..., Tensor], *states: Tensor) -> Tensor:
    """A function of states (B, S), or its mean over the states of an orbit (T, B, S)."""
    if states[0].ndim == 2:
        return function(*states)
    return torch.stack([function(*each) for each in zip(*states, strict=True)]).mean(dim=0)


def mean_cost(network: TCEPNetwork, states: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, 0-d, at states (B, S) or over an orbit (T, B, S)."""
    return over_orbit(lambda state: F.cross_entropy(network.logits(state), targets), states)


def second_difference(
    network: TCEPNetwork, inputs: Tensor, phases: NudgedPhases, beta: Tensor
) -> Tensor:
    """Relative difference of the one-sided and the symmetric gradient of a symmetric nudge, 0-d.

    Their difference is the second difference of the energy's parameter derivatives over the
    nudges +beta, -beta, 0; the size of the symmetric one is taken from ``.grad``. The readout,
    whose gradient is plain, does not count. NaN where no sample settled.

    Args:
        network: conservative, its ``.grad`` as :func:`eqprop` left it.
        inputs: the batch.
        phases: three, as ``third`` asks for.
        beta: 0-d.
    """
    rows = settled_rows(phases.settled)
    if rows is None:
        return torch.full_like(beta, torch.nan)
    drive = network.drive(inputs[rows])
    energies = [
        over_orbit(lambda s: network.energy(s, drive), states[..., rows, :]).sum()
        for states in phases.states
    ]
    total = (energies[0] + energies[1] - 2 * energies[2]) / (2 * beta * len(drive))
    inner = [p for name, p in network.named_parameters() if not name.startswith("head.")]
    apart = torch.autograd.grad(total, inner, allow_unused=True)
    gap = torch.stack([g.square().sum() for g in apart if g is not None]).sum().sqrt()
    size = torch.stack([p.grad.square().sum() for p in inner if p.grad is not None]).sum().sqrt()
    return gap / size


class _AdjointFlow:
    """``da/dt = J^T a + dC/ds``: a flow whose equilibrium solves the implicit equation."""

    def __init__(self, network: TCEPNetwork, drive: Tensor, state: Tensor, slope: Tensor) -> None:
        self._network, self._drive, self._state, self._slope = network, drive, state, slope
        with torch.enable_grad():
            self._point = state.detach().requires_grad_()
            self._flow = network.flow(self._point, drive)

    def __call__(self, adjoint: Tensor) -> Tensor:
        (back,) = torch.autograd.grad(self._flow, self._point, adjoint, retain_graph=True)
        return back + self._slope

    def rows(self, index: Tensor) -> _AdjointFlow:
        return _AdjointFlow(
            self._network, self._drive[index], self._state[index], self._slope[index]
        )


def implicit(
    network: TCEPNetwork, phase: Phase, relative: float = IMPLICIT_TOLERANCE
) -> dict[str, Tensor]:
    """Implicit differentiation at the free equilibrium (Bai et al. 2019), solved iteratively.

    Solves ``J^T a = -dC/ds`` as the equilibrium of a linear flow that is as stable as the
    network's own, by the network's solver; then ``<a, dF/dtheta>`` by automatic differentiation.

    Args:
        network: its gradients cleared.
        phase: the free phase.
        relative: residual of the solve over the RMS of ``dC/ds``.
    """
    state, drive = phase.free.state, phase.drive.detach()
    slope = cost_slope(network, state, phase.targets)
    # dC/ds = G (1/G) dC/ds: the nudge is given in the metric
    slope = (network.field.metric(state) * network.field.nudge(state, slope)).detach()
    solver = network.dynamics.solver
    flow = _AdjointFlow(network, drive, state, slope)
    tolerance = relative * slope.square().mean(dim=1).sqrt() + torch.finfo(slope.dtype).tiny
    tolerance = torch.where(phase.free.settled, tolerance, torch.inf)  # those others do not count
    found = relax(flow, torch.zeros_like(state), solver, dt=network.time_step, tolerance=tolerance)
    rows = settled_rows(phase.free.settled & found.settled)
    if rows is not None:
        point, targets = state[rows], phase.targets[rows]
        total = (found.state[rows] * network.flow(point, phase.drive[rows])).sum() / len(targets)
        cost = F.cross_entropy(network.logits(point), targets)
        (total + cost).backward()  # type: ignore[no-untyped-call]
    return {
        "residual_nudged": found.residual.mean(),
        "nfe_nudged": found.nfe.to(state.dtype).mean(),
        **_shares(phase.free, found),
    }
