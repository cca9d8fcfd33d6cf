"""The contract of fields: the built-in ones keep it, fields that are broken on purpose do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests import tcep_reference as reference
from topotune.tcep.energy import EnergyField
from topotune.tcep.fields import Capped, Field
from topotune.tcep.transformer import TransformerField
from topotune.testing import EnergyContract, KnownEquilibrium

torch.set_num_threads(1)


class TestEnergyField(EnergyContract):
    def make_field(self) -> EnergyField:
        return EnergyField(3, 4, 2, hidden=3, memory=4, scale=7.0)

    def known_equilibrium(self, field: Field) -> KnownEquilibrium:
        # Tokens are chosen, and the twin says which drive holds them there.
        assert isinstance(field, EnergyField)
        damping, tokens = 3.0, torch.randn(2, 3, 4, dtype=torch.float64)
        drives = []
        for h in tokens:
            h.requires_grad_()
            g = torch.cat([reference.normalised(row) for row in h])
            z = (g @ field.hidden_weight + field.hidden_bias).detach()
            total = reference.energy(field, h, z, torch.zeros_like(h), damping)
            drives.append(torch.autograd.grad(total, h)[0] / field.scale)
        return KnownEquilibrium(torch.stack(drives), damping, tokens.detach())


class TestTrainedSizes(EnergyContract):
    """Weights as large as their caps allow."""

    damping = 4.0

    def make_field(self) -> EnergyField:
        field = EnergyField(3, 3, 1, hidden=4, memory=3, scale=20.0, sharpness=0.8)
        with torch.no_grad():
            for weight, cap, _ in field.capped():
                norms = torch.linalg.matrix_norm(weight, 2)
                weight.mul_(cap / norms[..., None, None])
        return field


class TestTransformerField(EnergyContract):
    field = TransformerField
    options: ClassVar[dict[str, Any]] = {"tokens": 3, "width": 4, "heads": 2, "memory": 4}

    def known_equilibrium(self, field: Field) -> KnownEquilibrium:
        assert isinstance(field, TransformerField)
        tokens = torch.randn(2, 3, 4, dtype=torch.float64)
        with torch.no_grad():
            zero = torch.zeros(3, 4, dtype=torch.float64)
            drives = [-reference.transformer_flow(field, h, zero, 3.0) for h in tokens]
        return KnownEquilibrium(torch.stack(drives), 3.0, tokens)


class Springs(Field):
    """A quadratic energy over tokens, with ``z`` drawn to what one matrix makes of them."""

    def __init__(self) -> None:
        super().__init__(3, 2, 3 * 2 + 2, 2)
        self.root = nn.Parameter(0.5 * torch.randn(6, 6))
        self.draw = nn.Parameter(0.5 * torch.randn(6, 2))

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        h, z = state[:, :6], state[:, 6:]
        quadratic = ((h @ self.root).square().sum(dim=1) + z.square().sum(dim=1)) / 2
        return quadratic - (h * drive.flatten(1)).sum(dim=1) - (z * (h @ self.draw)).sum(dim=1)

    def features(self, state: Tensor) -> Tensor:
        return state[:, 6:]

    def eliminated(self, tokens: Tensor, drive: Tensor, state: Tensor) -> Tensor:
        h = tokens.flatten(1)
        flow = drive.flatten(1) - h @ self.root @ self.root.T + h @ self.draw @ self.draw.T
        return flow.view_as(tokens)


class TestSprings(EnergyContract):
    """An energy with no flow written by hand, and a rest point from a linear solve."""

    field = Springs

    def known_equilibrium(self, field: Field) -> KnownEquilibrium:
        assert isinstance(field, Springs)
        drive = torch.randn(2, 3, 2, dtype=torch.float64)
        stiffness = field.root @ field.root.T - field.draw @ field.draw.T
        matrix = (stiffness + 1.5 * torch.eye(6, dtype=torch.float64)).detach()
        rest = torch.linalg.solve(matrix, drive.flatten(1).T).T
        return KnownEquilibrium(drive, 1.5, rest.reshape(2, 3, 2))


class TestNoParameters(EnergyContract):
    class Still(Springs):
        def __init__(self) -> None:
            super().__init__()
            self.root.requires_grad_(False)
            self.draw.requires_grad_(False)
            for name in ("root", "draw"):
                fixed = getattr(self, name).detach()
                delattr(self, name)
                self.register_buffer(name, fixed)

    field = Still


class WrongForce(Springs):
    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        flow = super().flow(state, drive)
        return torch.cat([flow[:, :6], 1.01 * flow[:, 6:]], dim=1)


class WrongSign(Springs):
    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        return -super().flow(state, drive)


class Twisted(Springs):
    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        h = state[:, :6]
        twist = torch.cat([0.1 * h.roll(1, dims=1), torch.zeros_like(state[:, 6:])], dim=1)
        return super().flow(state, drive) + twist


class ElsewhereAtRest(Springs):
    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        return super().flow(state, drive) + 0.1


class Mixing(Springs):
    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        shared = state[:, :6].mean(dim=0)
        return super().energy(state, drive) + 0.1 * (state[:, :6] * shared).sum(dim=1)


class MixingFeatures(Springs):
    def features(self, state: Tensor) -> Tensor:
        return state[:, 6:] - state[:, 6:].mean(dim=0)


class NegativeMetric(Springs):
    def metric(self, state: Tensor) -> Tensor:
        return torch.ones_like(state) - 2 * (state > 3)


class MovingMetric(Springs):
    def metric(self, state: Tensor) -> Tensor:
        return 1 + 0.1 * state.square()


class Unbounded(Springs):
    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        return super().energy(state, drive) - 5 * state[:, :6].square().sum(dim=1)


class IdleParameter(Springs):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        # An offset moves the energy and nothing else.
        return super().energy(state, drive) + self.idle.sum()


class Detached(Springs):
    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        return super().flow(state, drive).detach()


class BlindToTheDrive(Springs):
    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        return super().energy(state, 0 * drive)


class NoisyFlow(Springs):
    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        return super().flow(state, drive) + 0 * torch.randn(())


class WritingFlow(Springs):
    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        flow = super().flow(state, drive)
        drive += 1
        return flow


class SummedEnergy(Springs):
    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        return super().energy(state, drive).sum()


class FewFeatures(Springs):
    def features(self, state: Tensor) -> Tensor:
        return state[:, 7:]


class StaleEliminated(Springs):
    def eliminated(self, tokens: Tensor, drive: Tensor, state: Tensor) -> Tensor:
        return drive - tokens


class CapsABias(Springs):
    def capped(self) -> list[Capped]:
        return [Capped(nn.Parameter(torch.ones(2, 2)), 1.0)]


class NegativeCap(Springs):
    def capped(self) -> list[Capped]:
        return [Capped(self.root, -1.0)]


@pytest.mark.parametrize(
    ("broken", "check", "words"),
    [
        (WrongForce, "the_force_is_the_slope_of_the_energy", "flow() is not -(1/G) dE/ds"),
        (WrongSign, "the_force_is_the_slope_of_the_energy", "flow() is not -(1/G) dE/ds"),
        (Twisted, "the_jacobian_is_symmetric_in_the_metric", "No energy has this force"),
        (Twisted, "the_force_is_the_slope_of_the_energy", "flow() is not -(1/G) dE/ds"),
        (ElsewhereAtRest, "it_rests_where_the_energy_is_flat", "different equilibria"),
        (WrongSign, "the_energy_falls", "Euler step 1 of length 0.01 raises the energy"),
        (Mixing, "samples_do_not_mix", "flow() of a sample in a batch differs"),
        (MixingFeatures, "samples_do_not_mix", "features() of a sample in a batch differs"),
        (NegativeMetric, "the_metric_is_positive_and_one_number_on_tokens", "an entry of -1"),
        (MovingMetric, "the_metric_is_positive_and_one_number_on_tokens", "must be one number"),
        (Unbounded, "it_rests_where_the_energy_is_flat", "does not come to rest at lambda 2"),
        (IdleParameter, "every_parameter_has_an_effect", "the parameter idle has no effect"),
        (Detached, "every_parameter_has_an_effect", "the parameter root has no effect"),
        (BlindToTheDrive, "the_drive_moves_it", "the input has no effect"),
        (NoisyFlow, "it_changes_nothing_and_repeats_itself", "draws random numbers"),
        (WritingFlow, "it_changes_nothing_and_repeats_itself", "writes to its arguments"),
        (SummedEnergy, "shapes", "energy() has shape (), not (3,)"),
        (FewFeatures, "shapes", "features() has shape (3, 1), not (3, 2)"),
        (StaleEliminated, "eliminated_agrees_with_the_flow_at_rest", "eliminated() differs by"),
        (CapsABias, "capped_matrices_are_parameters", "no parameter of the field"),
        (
            NegativeCap,
            "capped_matrices_are_parameters",
            "capped() holds a cap of -1",
        ),
    ],
)
def test_the_contract_finds(broken: Callable[[], Field], check: str, words: str) -> None:
    contract = EnergyContract()
    contract.make_field = lambda: broken()  # type: ignore[method-assign]
    with pytest.raises(AssertionError) as caught:
        getattr(contract, f"test_{check}")()
    assert words in str(caught.value)


def test_a_wrong_known_answer_is_found() -> None:
    class Case(TestSprings):
        def known_equilibrium(self, field: Field) -> KnownEquilibrium:
            case = super().known_equilibrium(field)
            return case._replace(tokens=case.tokens + 1e-4)

    with pytest.raises(AssertionError, match="away from the known equilibrium"):
        Case().test_the_known_equilibrium()
