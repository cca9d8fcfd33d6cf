"""Gradients to compare with: through the steps, by the adjoint equation, or of the readout only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topotune.tcep.gradients import Contrast, Phase, mean_cost, settled_rows
from topotune.tcep.network import DrivenFlow, TCEPNetwork
from topotune.tcep.relax import Noise
from topotune.tcep.stepping import DIVERGENCE

ADAPTIVE_STEPS = 20
"""Steps of the adjoint method's solver at most, for each that the dynamics' solver may take; where
it succeeds it takes 1 to 4. Where a flow explodes no step is small enough, and the error control
would divide forever."""

FEWEST_STEPS = 100
"""And so many more."""

ADJOINT_FAILED = "adjoint_failed"
"""Name of the measured value that is 1 where the adjoint equation could not be integrated."""

REFUSALS = ("max_num_steps exceeded", "underflow in dt", "non-finite values in state")
"""How torchdiffeq begins to say that it cannot integrate this flow (and is not just broken)."""


def bptt(
    network: TCEPNetwork, inputs: Tensor, targets: Tensor, noise: Noise | None = None
) -> Contrast:
    """Backpropagation through all steps of the free phase (damped Euler unless heun is chosen).

    It stops where the free phase would, so it takes no step more than needed; memory grows with
    the steps.
    """
    drive = network.drive(inputs)
    states, steps = network.unroll(drive, noise)
    cost = mean_cost(network, states, targets)
    cost.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        final = states if states.ndim == 2 else states.mean(dim=0)
        tolerance = 1.05 * network.dynamics.solver.tolerance
        measured = _measure(network, final, drive, steps, tolerance)
        if network.recirculation.kind == "gain":
            del measured["unconverged_share"]  # of a point; this is an orbit
        return Contrast(cost.detach(), network.mean_logits(states), measured)


class _AdjointModule(nn.Module):
    """A driven flow as the module of time and state that an ODE solver takes."""

    def __init__(self, flow: DrivenFlow) -> None:
        super().__init__()
        self._flow = flow
        self.evaluations = 0

    def forward(self, time: Tensor, state: Tensor) -> Tensor:
        self.evaluations += 1
        return self._flow(state)


def adjoint(network: TCEPNetwork, inputs: Tensor, targets: Tensor) -> Contrast:
    """The adjoint equation, integrated backwards by torchdiffeq (Chen et al. 2018).

    The free phase is integrated by dopri5 over a fixed time, ``steps * dt``, and its adjoint over
    the same. Memory does not depend on the steps. It replaces the nudged phase.

    The way back retraces a flow that contracts, so errors grow exponentially with the time: beyond
    some steps it fails, which ``adjoint_failed`` and gradients of NaN then say.
    """
    from torchdiffeq import odeint_adjoint

    drive = network.drive(inputs)
    module = _AdjointModule(network.free_flow(drive))
    solver = network.dynamics.solver
    start = network.field.initial(drive)
    duration = solver.steps * network.time_step
    times = torch.tensor([0.0, duration], dtype=start.dtype, device=start.device)
    # The drive stands for the embedding: given both, its gradient would count twice.
    parameters = (drive, *network.field.parameters())
    state: Tensor | None = None
    try:
        state = odeint_adjoint(
            module,
            start,
            times,
            method="dopri5",
            rtol=solver.tolerance / 3,
            atol=solver.tolerance / 3,
            options={"max_num_steps": FEWEST_STEPS + ADAPTIVE_STEPS * solver.steps},
            adjoint_params=tuple(p for p in parameters if p.requires_grad),
        )[-1]
        assert state is not None
        forward = module.evaluations
        logits = network.logits(state)
        cost = F.cross_entropy(logits, targets)
        cost.backward()  # type: ignore[no-untyped-call]
    except AssertionError as error:
        if not str(error).startswith(REFUSALS):
            raise
        return _undefined(network, len(targets), module.evaluations, back=state is not None)
    with torch.no_grad():
        measured = _measure(network, state, drive, forward, solver.tolerance)
        back = torch.tensor(module.evaluations - forward)
        measured |= {"nfe_nudged": back.to(logits), ADJOINT_FAILED: torch.zeros_like(logits[0, 0])}
    return Contrast(cost.detach(), logits.detach(), measured)


def _measure(
    network: TCEPNetwork, state: Tensor, drive: Tensor, evaluations: int, tolerance: float
) -> dict[str, Tensor]:
    """Energy, residual, evaluations and shares of a free phase that ended at a state (B, S)."""
    residual = network.flow(state, drive).square().mean(dim=1).sqrt()
    measured = {
        "residual_free": residual.mean(),
        "nfe_free": residual.new_tensor(float(evaluations)),
        "unconverged_share": (~(residual <= tolerance)).to(residual).mean(),
        "diverged_share": (~(residual <= DIVERGENCE)).to(residual).mean(),
    }
    if network.conservative:
        measured["energy_free"] = network.energy(state, drive).mean()
    return measured


def _undefined(network: TCEPNetwork, batch: int, evaluations: int, back: bool) -> Contrast:
    """What is left where torchdiffeq gives up on the way there or back: no loss, no gradient."""
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    none = torch.full_like(network.head.bias.detach()[0], torch.nan)
    one, zero = torch.ones_like(none), torch.zeros_like(none)
    measured = {
        "residual_free": none,
        "nfe_free": one * evaluations,
        "nfe_nudged": zero,
        "unconverged_share": one,
        "diverged_share": zero if back else one,
        ADJOINT_FAILED: one if back else zero,
    }
    if network.conservative:
        measured["energy_free"] = none
    return Contrast(none, none.expand(batch, network.head.out_features), measured)


def head_only(network: TCEPNetwork, phase: Phase) -> dict[str, Tensor]:
    """The readout's plain gradient at the free equilibrium; nothing else gets one (a control)."""
    rows = settled_rows(phase.free.settled)
    if rows is not None:
        states, targets = phase.free.states[..., rows, :], phase.targets[rows]
        mean_cost(network, states, targets).backward()  # type: ignore[no-untyped-call]
    return {}
