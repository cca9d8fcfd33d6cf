"""How far a network is from instability: mu, and the range of gamma that it leaves.

mu is the one-sided Lipschitz constant of the tokens' flow without damping and recirculation: the
largest eigenvalue of the symmetric part of its Jacobian, hidden units eliminated. The flow
contracts where lambda exceeds mu plus the strength of the recirculation. A bound from spectral
norms alone is far too loose to be of use, so mu is measured, at the states that are visited.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topotune.tcep.fields import Field
from topotune.tcep.jacobian import Jacobian
from topotune.tcep.precision import full_precision
from topotune.tcep.spectral import largest_eigenvalue

if TYPE_CHECKING:
    from topotune.tcep.network import TCEPNetwork

REFERENCE_SAMPLES = 8
REFERENCE_STEPS = 40
DEFAULT_FRACTION = 0.3
"""Share of the stable range that gamma takes when nothing is said about it."""


def one_sided_lipschitz(field: Field, drive: Tensor, state: Tensor) -> Tensor:
    """mu of each sample at a state.

    For a conservative field the Jacobian is symmetric and its products are taken by central
    differences, in float64; else products with its transpose are added, by automatic
    differentiation.

    Args:
        field: in any dtype.
        drive: (B, N, D).
        state: (B, S).

    Returns:
        (B,), float64: a lower estimate, see :func:`largest_eigenvalue`.
    """
    with torch.inference_mode(False), torch.no_grad():
        exact = copy.deepcopy(field).double()
        drive, state = drive.detach().clone().double(), state.detach().clone().double()
        h = exact.split(state)[0].clone()

        def flow(tokens: Tensor) -> Tensor:
            return exact.eliminated(tokens, drive, state)

        width = 1e-5 * max(1.0, float(h.abs().max()))
        jacobian = None if exact.conservative else Jacobian(flow, h)

        def product(vector: Tensor) -> Tensor:
            v = vector.view_as(h)
            if jacobian is None:
                return ((flow(h + width * v) - flow(h - width * v)) / (2 * width)).flatten(1)
            return 0.5 * (jacobian.times(v) + jacobian.transposed_times(v)).flatten(1)

        generator = torch.Generator().manual_seed(0)
        start = torch.randn(h.flatten(1).shape, generator=generator, dtype=torch.float64)
        return largest_eigenvalue(product, start.to(h.device))


@full_precision
def stable_gamma(network: TCEPNetwork) -> tuple[float, float]:
    """The strength of the recirculation that a fraction of the stable range stands for.

    The weights grow in training, up to their caps; so mu is measured on a copy of the fresh field
    whose capped matrices are scaled to their caps, at its equilibria under random inputs of unit
    variance. The range is from 0 to lambda - mu. This is an estimate for where training leads to
    and no proof: the margin is measured again every epoch.

    Returns:
        gamma, and the mu that it follows from. gamma is 0 if lambda leaves no range.
    """
    fraction = network.dynamics.gamma_fraction
    fraction = DEFAULT_FRACTION if fraction is None else fraction
    with torch.no_grad():
        field = copy.deepcopy(network.field)
        for capped in field.capped():
            norms = torch.linalg.matrix_norm(capped.matrix.double(), ord=2)
            if capped.cap > 0:
                factor = torch.where(norms > 0, capped.cap / norms, 1.0)  # zeros: nothing to scale
                factor = factor[:, None, None] if capped.heads else factor
                capped.weight.mul_(factor.to(capped.weight.dtype))
        generator = torch.Generator().manual_seed(0)
        shape = (REFERENCE_SAMPLES, network.tokens.count, network.tokens.size)
        inputs = torch.randn(shape, generator=generator).to(network.position)
        drive = network.embed(inputs) + network.position
        state = field.initial(drive)
        damping = network.dynamics.damping
        step = 0.5 / max(1.0, damping)
        count = field.tokens * field.width
        for _ in range(REFERENCE_STEPS):
            flow = field.flow(state, drive)
            decay = torch.nn.functional.pad(state[:, :count], (0, field.size - count))
            state = state + step * (flow - damping * decay)
        mu = float(one_sided_lipschitz(field, drive, state).max())
    return fraction * max(0.0, network.dynamics.damping - mu), mu
