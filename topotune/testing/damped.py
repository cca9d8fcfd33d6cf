"""A field with damping, as the contract of fields needs it: its flow, its energy, its rest."""

from __future__ import annotations

import torch
from torch import Tensor

from topotune.errors import RunError
from topotune.tcep.fields import Field
from topotune.tcep.reference import solve_equilibrium
from topotune.testing.check import check

DIFFERENCE = 1e-3
"""Half of a finite difference; the formula's error is of its fourth power."""


def damped_flow(field: Field, state: Tensor, drive: Tensor, damping: float) -> Tensor:
    """The flow (B, S) with ``-lambda h`` on the tokens."""
    count = field.tokens * field.width
    rates = torch.zeros_like(state)
    rates[:, :count] = damping
    return field.flow(state, drive) - rates * state


def damped_energy(field: Field, state: Tensor, drive: Tensor, damping: float) -> Tensor:
    """The energy with that of the damping, (B,)."""
    tokens, _ = field.split(state)
    weight = field.metric(state)[0, 0].detach()
    return field.energy(state, drive) + weight * damping / 2 * tokens.square().sum(dim=(1, 2))


def rest(field: Field, drive: Tensor, damping: float) -> Tensor:
    """The equilibria (B, S) that the damped flow leads to from ``initial``, one by one.

    Raises:
        AssertionError: it does not come to rest.
    """
    found = []
    for i in range(len(drive)):
        one = drive[i : i + 1]

        def flow(state: Tensor, one: Tensor = one) -> Tensor:
            return damped_flow(field, state, one, damping)

        try:
            found.append(solve_equilibrium(flow, field.initial(one)))
        except RunError as error:
            check(False, f"the damped flow does not come to rest at lambda {damping:g}: {error}")
    return torch.cat(found)


def energy_slope(field: Field, state: Tensor, drive: Tensor, entry: int) -> Tensor:
    """The derivative of one sample's energy along one entry of its state, of fourth order."""

    def at(shift: float) -> Tensor:
        moved = state.clone()
        moved[0, entry] += shift
        return field.energy(moved, drive)[0]

    near = at(DIFFERENCE) - at(-DIFFERENCE)
    far = at(2 * DIFFERENCE) - at(-2 * DIFFERENCE)
    return (8 * near - far) / (12 * DIFFERENCE)
