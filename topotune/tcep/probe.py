"""Measures on a fixed batch that leave the network as it is: margins, a relaxation, a cosine."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor

from topotune.tcep.gradients import eqprop, free_phase, implicit
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Learning, Solver
from topotune.tcep.precision import full_precision
from topotune.tcep.relax import relax

EXACT_TOLERANCE = 1e-11
EXACT_STEPS = 2000


@full_precision
def margins(network: TCEPNetwork, inputs: Tensor) -> dict[str, float]:
    """How far the flow is from instability at the equilibria of some inputs.

    Returns:
        ``one_sided_lipschitz``: mu, the largest over the samples; ``stability_margin``:
        lambda - mu - |recirculation gain|; ``recirculation_gain``; ``gamma``.
    """
    with torch.no_grad():
        drive = network.drive(inputs)
        state = network.relax(drive).state
        finite = bool(torch.isfinite(state).all())
        mu = float(network.one_sided_lipschitz(drive, state).max()) if finite else float("nan")
    gain = network.recirculation.gain
    return {
        "one_sided_lipschitz": mu,
        "stability_margin": network.dynamics.damping - mu - abs(gain),
        "recirculation_gain": gain,
        "gamma": network.recirculation.gamma,
    }


@full_precision
def relaxation(network: TCEPNetwork, inputs: Tensor) -> dict[str, np.ndarray]:
    """The free phase of some inputs by small damped Euler steps, watched.

    Returns:
        ``time``; ``residual``, the RMS of the flow at equilibrium; and ``energy`` where there is
        one: each (steps + 1,), the mean over the samples.
    """
    solver = dataclasses.replace(network.dynamics.solver, name="euler", tolerance=1e-30)
    residuals: list[Tensor] = []
    energies: list[Tensor] = []
    with torch.no_grad():
        drive = network.drive(inputs)
        start = network.field.initial(drive)

        def watch(state: Tensor) -> Tensor:
            residuals.append(network.flow(state, drive).square().mean(dim=1).sqrt().mean())
            if network.conservative:
                energies.append(network.energy(state, drive).mean())
            return state[:, 0]

        found = relax(
            network.free_flow(drive),
            start,
            solver,
            dt=network.time_step,
            memory=network.memory(start),
            energy=watch,
        )
    curves = {
        "time": found.time_step * np.arange(len(residuals), dtype=np.float64),
        "residual": torch.stack(residuals).double().cpu().numpy(),
    }
    if energies:
        curves["energy"] = torch.stack(energies).double().cpu().numpy()
    return curves


def flat_gradient(network: TCEPNetwork) -> Tensor:
    """All of ``.grad`` in one float64 row; zeros for a parameter without a gradient."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).double().flatten()
            for p in network.parameters()
        ]
    )


def resolve(
    network: TCEPNetwork, dtype: torch.dtype | None = None, **solver: object
) -> TCEPNetwork:
    """A copy without gradients, in another dtype or with another solver."""
    twin = copy.deepcopy(network)
    if dtype is not None:
        twin = twin.to(dtype)
    changed: Solver = dataclasses.replace(twin.dynamics.solver, **solver)  # type: ignore[arg-type]
    twin.dynamics = dataclasses.replace(twin.dynamics, solver=changed)
    twin.zero_grad(set_to_none=True)
    return twin


def exact_copy(network: TCEPNetwork) -> TCEPNetwork:
    """A float64 copy that solves to rounding."""
    return resolve(
        network, torch.float64, name="auto", tolerance=EXACT_TOLERANCE, steps=EXACT_STEPS
    )


def exact_gradient(network: TCEPNetwork, inputs: Tensor, targets: Tensor) -> Tensor:
    """The implicit gradient of a batch's mean loss, in float64 to about 1e-9, as one row."""
    twin = exact_copy(network)
    phase = free_phase(twin, inputs.double(), targets)
    implicit(twin, phase, relative=1e-10)
    return flat_gradient(twin)


@full_precision
def eqprop_gradient(
    network: TCEPNetwork, inputs: Tensor, targets: Tensor, learning: Learning, beta: Tensor
) -> Tensor:
    """The gradient that the learner would use, in the network's own dtype, as one row."""
    twin = resolve(network)
    phase = free_phase(twin, inputs, targets)
    eqprop(twin, phase, learning, beta.to(inputs))
    return flat_gradient(twin)


def gradient_cosine(
    network: TCEPNetwork, inputs: Tensor, targets: Tensor, learning: Learning, beta: Tensor
) -> float:
    """Cosine of the learner's gradient with the exact one."""
    with torch.enable_grad():
        used = eqprop_gradient(network, inputs, targets, learning, beta)
        exact = exact_gradient(network, inputs, targets)
    return float(torch.nn.functional.cosine_similarity(used, exact, dim=0))
