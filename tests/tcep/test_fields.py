"""The fields of TCEP against their twins, their Jacobians, and fields of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from tests import tcep_reference as reference
from topotune.errors import ConfigError, RunError
from topotune.tcep import functions as fn
from topotune.tcep.energy import EnergyField
from topotune.tcep.fields import Field, build_field, energy_flow
from topotune.tcep.options import Caps
from topotune.tcep.transformer import TransformerField

torch.set_num_threads(1)

SHAPES = [(3, 4, 2), (2, 6, 3), (5, 3, 1)]
"""Tokens, width, heads."""

AnyField = TypeVar("AnyField", bound=Field)

WEIGHTS = ["initialised", "randomised"]


def energy_field(
    tokens: int = 3,
    width: int = 4,
    heads: int = 2,
    weights: str = "randomised",
    sharpness: float | None = None,
) -> EnergyField:
    torch.manual_seed(tokens)
    field = EnergyField(tokens, width, heads, 5, 4, scale=7.0, sharpness=sharpness).double()
    return _weigh(field, weights)


def transformer_field(
    tokens: int = 3, width: int = 4, heads: int = 2, weights: str = "randomised"
) -> TransformerField:
    torch.manual_seed(tokens)
    return _weigh(TransformerField(tokens, width, heads, 5).double(), weights)


def _weigh(field: AnyField, weights: str) -> AnyField:
    if weights == "randomised":
        with torch.no_grad():
            for p in field.parameters():
                p.copy_(0.7 * torch.randn_like(p))
    return field


def point(field: Field, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A state and a drive, float64."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(batch, field.size, generator=generator, dtype=torch.float64)
    drive = torch.randn(batch, field.tokens, field.width, generator=generator, dtype=torch.float64)
    return 1.5 * state, drive


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, over the largest entry."""
    return ((one - other).abs().max() / other.abs().max()).item()


# The functions.


@pytest.mark.parametrize(
    "function", [fn.smooth_relu, fn.smooth_relu_slope, fn.smooth_relu_integral]
)
def test_functions_differentiate_twice(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize(
    ("function", "slope"),
    [(fn.smooth_relu_integral, fn.smooth_relu), (fn.smooth_relu, fn.smooth_relu_slope)],
)
def test_each_function_is_the_slope_of_the_next(
    function: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]
) -> None:
    x = torch.linspace(-9, 9, 37, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(function(x).sum(), x)
    assert torch.allclose(found, slope(x.detach()), rtol=0, atol=1e-14)


def test_smooth_relu_is_a_relu_from_afar_and_positive() -> None:
    x = torch.tensor([-1000.0, -10.0, 0.0, 10.0, 1000.0], dtype=torch.float64)
    values, slopes = fn.smooth_relu(x), fn.smooth_relu_slope(x)
    assert torch.allclose(values, torch.relu(x), rtol=0, atol=0.51)
    assert (values - torch.relu(x))[[0, -1]].abs().max() < 1e-3
    assert values[2].item() == 0.5
    assert slopes[2].item() == 0.5
    assert bool((values > 0).all())
    assert bool(((slopes > 0) & (slopes < 1)).all())
    assert fn.smooth_relu_integral(x[2:3]).item() == 0


def test_layer_norm_and_its_pullback() -> None:
    h = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(2, 3, 5, dtype=torch.float64)
    g, inverse = fn.layer_norm(h)
    assert torch.allclose(g, nn.functional.layer_norm(h, (5,), eps=1.0), atol=1e-14)
    (found,) = torch.autograd.grad(g, h, slope)
    pulled = fn.layer_norm_pullback(slope, g, inverse)
    assert torch.allclose(found, pulled, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: fn.layer_norm(x)[0], h)
    assert torch.autograd.gradgradcheck(lambda x: fn.layer_norm(x)[0], h)


# The conservative field.


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_energy_equals_its_twin(shape: tuple[int, int, int], weights: str) -> None:
    field = energy_field(*shape, weights)
    state, drive = point(field)
    h, z = field.split(state)
    expected = torch.stack([reference.energy(field, h[i], z[i], drive[i]) for i in range(3)])
    assert apart(field.energy(state, drive), expected) < 1e-12


@pytest.mark.parametrize("sharpness", [None, 1.3])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flow_is_the_force_of_the_twins_energy(
    shape: tuple[int, int, int], weights: str, sharpness: float | None
) -> None:
    field = energy_field(*shape, weights, sharpness)
    state, drive = point(field)
    flow = field.flow(state, drive)
    metric = field.metric(state)
    for i in range(len(state)):
        h, z = (part[0].detach().requires_grad_() for part in field.split(state[i : i + 1]))
        slopes = torch.autograd.grad(reference.energy(field, h, z, drive[i]), (h, z))
        expected = -torch.cat([s.flatten() for s in slopes]) / metric[i]
        assert apart(flow[i], expected) < 1e-12


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flow_equals_automatic_differentiation(shape: tuple[int, int, int], weights: str) -> None:
    field = energy_field(*shape, weights)
    state, drive = point(field)
    assert apart(field.flow(state, drive), energy_flow(field, state, drive)) < 1e-12


def test_damping_and_ring_belong_to_the_twins_energy() -> None:
    field = energy_field()
    state, drive = point(field, 1)
    damping, gamma, kernel = 1.3, -0.4, reference.ring_kernel(3, 3, 0.6)
    h, z = (part[0].detach().requires_grad_() for part in field.split(state))
    total = reference.energy(field, h, z, drive[0], damping, gamma, kernel)
    of_tokens, of_hidden = torch.autograd.grad(total, (h, z))
    flow, hidden = field.split(field.flow(state, drive))
    expected = flow[0] - damping * h + gamma * kernel @ h
    assert apart(-of_tokens / field.scale, expected) < 1e-12
    assert apart(-of_hidden / fn.smooth_relu_slope(z), hidden[0]) < 1e-12


def test_ring_kernel_wraps_around_and_is_bounded() -> None:
    kernel = reference.ring_kernel(6, 4, 0.5)
    assert torch.equal(kernel, kernel.T)
    assert kernel.sum(dim=1).max().item() == pytest.approx(1, abs=1e-15)
    # Distances around a ring of 4: 0 1 2 1 0 1.
    ratio = (kernel[0] / kernel[0, 0]).log() / -0.5
    assert torch.allclose(ratio, torch.tensor([0, 1, 2, 1, 0, 1], dtype=torch.float64))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_jacobian_is_symmetric_in_the_metric(shape: tuple[int, int, int], weights: str) -> None:
    field = energy_field(*shape, weights)
    state, drive = point(field, 1)
    matrix = reference.jacobian(lambda s: field.flow(s, drive), state)
    scaled = field.metric(state)[0, :, None] * matrix
    assert apart(scaled, scaled.T) < 1e-12
    # And it is the metric that makes it so.
    assert apart(matrix, matrix.T) > 1e-3


def test_metric_is_positive() -> None:
    field = energy_field()
    state, _ = point(field)
    metric = field.metric(20 * state)
    assert bool((metric > 0).all())
    assert bool((metric[:, :12] == 7.0).all())
    assert bool((metric[:, 12:] < 1).all())


def test_eliminated_is_the_flow_where_hidden_units_rest() -> None:
    field = energy_field()
    state, drive = point(field)
    h, _ = field.split(state)
    g, _ = fn.layer_norm(h)
    rest = g.flatten(1) @ field.hidden_weight + field.hidden_bias
    settled = torch.cat([h.flatten(1), rest], dim=1)
    tokens, hidden = field.split(field.flow(settled, drive))
    assert hidden.abs().max() < 1e-13
    assert apart(field.eliminated(h, drive, state), tokens) < 1e-12


def test_initial_state_and_features() -> None:
    field = energy_field()
    state, drive = point(field)
    tokens, hidden = field.split(field.initial(drive))
    assert torch.equal(tokens, drive)
    assert torch.equal(hidden, torch.zeros(3, 5, dtype=torch.float64))
    features = field.features(state)
    assert features.shape == (3, field.feature_size)
    assert torch.equal(features, fn.smooth_relu(state[:, 12:]))


def test_split_is_a_view() -> None:
    field = energy_field()
    state, _ = point(field)
    tokens, hidden = field.split(state)
    assert tokens.shape == (3, 3, 4)
    assert tokens.data_ptr() == state.data_ptr()
    assert torch.equal(torch.cat([tokens.flatten(1), hidden], dim=1), state)


@pytest.mark.parametrize("build", [energy_field, transformer_field])
def test_float32_is_close_to_float64(build: Callable[[], Field]) -> None:
    field = build()
    state, drive = point(field)
    exact = field.flow(state, drive)
    energies = field.energy(state, drive) if field.conservative else None
    field.float()
    state, drive = state.float(), drive.float()
    flow = field.flow(state, drive)
    assert flow.dtype == torch.float32
    assert apart(flow.double(), exact) < 1e-5
    if energies is not None:
        assert apart(field.energy(state, drive).double(), energies) < 1e-5
        assert apart(energy_flow(field, state, drive).double(), exact) < 1e-4


def test_capped_names_every_matrix() -> None:
    for field in (energy_field(), transformer_field()):
        capped = {id(c.weight) for c in field.capped()}
        matrices = {id(p) for p in field.parameters() if p.dim() > 1}
        assert capped == matrices
    caps = {id(c.weight): c.cap for c in energy_field().capped()}
    assert sorted(caps.values()) == [0.6, 0.6, 1.0, 4.0]
    own = EnergyField(3, 4, 2, 5, 4, scale=1.0, caps=Caps(attention=0.1, memory=0.2, hidden=0.3))
    assert [c.cap for c in own.capped()] == [0.1, 0.1, 0.2, 0.3]


# The transformer field.


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_transformer_flow_equals_its_twin(shape: tuple[int, int, int], weights: str) -> None:
    field = transformer_field(*shape, weights)
    state, drive = point(field)
    h, _ = field.split(state)
    expected = torch.stack(
        [reference.transformer_flow(field, h[i], drive[i]).flatten() for i in range(3)]
    )
    assert apart(field.flow(state, drive), expected) < 1e-12


def test_transformer_twin_adds_damping_and_mixing() -> None:
    field = transformer_field()
    state, drive = point(field, 1)
    h, mixing = state.view(3, 4), torch.randn(3, 3, dtype=torch.float64)
    found = reference.transformer_flow(field, h, drive[0], 0.7, mixing)
    expected = field.flow(state, drive).view(3, 4) - 0.7 * h + mixing @ h
    assert apart(found, expected) < 1e-12


@pytest.mark.parametrize("weights", WEIGHTS)
def test_transformer_jacobian_is_not_symmetric(weights: str) -> None:
    field = transformer_field(weights=weights)
    state, drive = point(field, 1)
    matrix = reference.jacobian(lambda s: field.flow(s, drive), state)
    assert apart(matrix, matrix.T) > 0.1


def test_transformer_has_no_energy_and_shows_all_tokens() -> None:
    field = transformer_field()
    state, drive = point(field)
    assert not field.conservative
    with pytest.raises(TypeError, match="TransformerField has no energy"):
        field.energy(state, drive)
    assert torch.equal(field.features(state), state)
    assert torch.equal(field.metric(state), torch.ones_like(state))
    h, _ = field.split(state)
    assert torch.equal(field.eliminated(h, drive, state).flatten(1), field.flow(state, drive))


# Refusals.


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "place", "words"),
    [
        (1, 4, 2, "model.tokens", "at least 2 tokens (got 1)"),
        (0, 4, 2, "model.tokens", "at least 2 tokens (got 0)"),
        (3, 6, 4, "model.heads", "must divide the width 6 (got 4). Choose one of 1, 2, 3, 6"),
        (3, 6, 7, "model.heads", "must divide the width 6 (got 7)"),
    ],
)
def test_impossible_shapes(tokens: int, width: int, heads: int, place: str, words: str) -> None:
    for build in (
        lambda: EnergyField(tokens, width, heads, 5, 4, scale=1.0),
        lambda: TransformerField(tokens, width, heads, 4),
    ):
        with pytest.raises(ConfigError) as caught:
            build()
        assert caught.value.place == place
        assert words in str(caught.value)


FACTS: dict[str, object] = {
    "tokens": 3,
    "width": 4,
    "heads": 2,
    "hidden": 5,
    "memory": 6,
    "scale": 9.0,
    "sharpness": None,
    "caps": Caps(),
}


class Springs(Field):
    """A quadratic energy, ``E = c (1/2 sum_d <h_d, A h_d> - <u, h>)``; the rest point is known.

    No flow is written: it comes from automatic differentiation.
    """

    def __init__(self, tokens: int, width: int, scale: float = 3.0) -> None:
        super().__init__(tokens, width, tokens * width, tokens * width)
        self.scale = scale
        self.root = nn.Parameter(torch.randn(tokens, tokens))

    def stiffness(self) -> Tensor:
        return self.root @ self.root.T

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        h, _ = self.split(state)
        stretched = (h * (self.stiffness() @ h)).sum(dim=(1, 2)) / 2
        return self.scale * (stretched - (drive * h).sum(dim=(1, 2)))

    def metric(self, state: Tensor) -> Tensor:
        return torch.full_like(state, self.scale)

    def features(self, state: Tensor) -> Tensor:
        return state


class Tilted(Springs):
    """Springs with one hidden unit a token, and a potential that is not quadratic."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width)
        self.size += tokens

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        h, z = self.split(state)
        hidden = (0.5 * z.square() - z * torch.tanh(h).sum(dim=2)).sum(dim=1)
        return super().energy(state[:, : self.tokens * self.width], drive) + hidden


class Greedy(Springs):
    def __init__(self, tokens: int, width: int, colour: str) -> None:
        super().__init__(tokens, width)


class Shrunken(Springs):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens - 1, width)


class Fussy(Springs):
    def __init__(self, tokens: int, width: int) -> None:
        raise ValueError("not on a Sunday")


class Everything(Springs):
    def __init__(self, **facts: object) -> None:
        assert set(facts) == set(FACTS)
        super().__init__(3, 4)


def test_a_constructor_gets_what_it_names() -> None:
    field = build_field(EnergyField, FACTS)
    assert isinstance(field, EnergyField)
    assert (field.tokens, field.width, field.heads, field.scale) == (3, 4, 2, 9.0)
    assert field.feature_size == 5
    assert field.memory.shape == (4, 6)
    springs = build_field(Springs, FACTS)
    assert isinstance(springs, Springs)
    assert springs.scale == 9.0
    assert isinstance(build_field(TransformerField, FACTS), TransformerField)
    assert isinstance(build_field(Everything, FACTS), Everything)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Greedy, "the constructor of Greedy needs 'colour'. A field can have caps, heads, hidden"),
        (Shrunken, "Shrunken has 2 tokens of width 4, expected 3 of 4"),
        (Fussy, "not on a Sunday"),
    ],
)
def test_fields_that_do_not_fit(found: type[Field], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_field(found, FACTS)
    assert caught.value.place == "field"
    assert words in str(caught.value)


# Fields of a user's own.


@pytest.mark.parametrize("build", [Springs, Tilted])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_flow_by_differentiation_works_without_gradients(
    build: type[Springs], mode: Callable[[], torch.no_grad]
) -> None:
    torch.manual_seed(0)
    field = build(3, 2).double()
    state, drive = point(field)
    expected = field.flow(state, drive)
    assert expected.requires_grad
    with mode():
        # Tensors that were made in inference mode too, as evaluation has them.
        found = field.flow(state.clone(), drive.clone())
        assert torch.equal(found, expected)
        assert not found.requires_grad


def test_flow_of_springs_is_what_hooke_says() -> None:
    torch.manual_seed(0)
    field = Springs(3, 2).double()
    state, drive = point(field)
    h, _ = field.split(state)
    expected = drive - field.stiffness() @ h
    assert apart(field.flow(state, drive), expected.flatten(1)) < 1e-13


def test_differentiation_reaches_weights_through_the_flow() -> None:
    torch.manual_seed(0)
    field = Springs(3, 2).double()
    state, drive = point(field)
    aim = torch.randn_like(state)
    (found,) = torch.autograd.grad((field.flow(state, drive) * aim).sum(), field.root)
    h, _ = field.split(state)
    by_hand = (drive - field.stiffness() @ h).flatten(1)
    (expected,) = torch.autograd.grad((by_hand * aim).sum(), field.root)
    assert apart(found, expected) < 1e-12


# The oracle itself, where the answer is known.


def test_the_oracle_on_a_linear_network() -> None:
    torch.manual_seed(0)
    field, damping = Springs(3, 2).double(), 0.8
    _, drive = point(field, 1)
    aim = torch.randn(1, 6, dtype=torch.float64)

    def flow(state: Tensor) -> Tensor:
        return field.flow(state, drive) - damping * state

    def cost(state: Tensor) -> Tensor:
        return (state * aim).sum()

    matrix = field.stiffness() + damping * torch.eye(3, dtype=torch.float64)
    rest = torch.linalg.solve(matrix, drive[0])
    state = reference.solve_equilibrium(flow, field.initial(drive))
    assert apart(state.view(3, 2), rest.detach()) < 1e-13
    expected = -torch.kron(matrix.detach(), torch.eye(2, dtype=torch.float64))
    assert torch.allclose(reference.jacobian(flow, state), expected, rtol=0, atol=1e-13)
    (gradient,) = reference.implicit_gradient(flow, cost, state, [field.root])
    (through,) = torch.autograd.grad((rest.flatten() * aim[0]).sum(), field.root)
    assert apart(gradient, through) < 1e-12


@pytest.mark.parametrize("build", [energy_field, transformer_field])
def test_implicit_gradient_equals_finite_differences(build: Callable[..., Field]) -> None:
    field, damping = build(2, 3, 1), 4.0
    _, drive = point(field, 1)
    readout = torch.randn(field.feature_size, 3, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([1])

    def flow(state: Tensor) -> Tensor:
        tokens, hidden = field.split(field.flow(state, drive))
        damped = tokens - damping * field.split(state)[0]
        return torch.cat([damped.flatten(1), hidden], dim=1)

    def cost(state: Tensor) -> Tensor:
        return nn.functional.cross_entropy(field.features(state) @ readout, label)

    def loss() -> Tensor:
        return cost(reference.solve_equilibrium(flow, start)).detach()

    start = field.initial(drive)
    start = reference.solve_equilibrium(flow, start)
    parameters = [*field.parameters(), readout]
    gradients = reference.implicit_gradient(flow, cost, start, parameters)
    indices = [(n, p.numel() // 2) for n, p in enumerate(parameters)]
    before = [p.detach().clone() for p in parameters]
    found = reference.finite_difference_gradient(loss, parameters, indices)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    expected = torch.stack([gradients[n].flatten()[k] for n, k in indices])
    assert apart(found, expected) < 1e-6
    assert all(bool(g.any()) for g in gradients)


def test_a_parameter_without_effect_has_gradient_zero() -> None:
    state = torch.zeros(2, dtype=torch.float64)
    idle = torch.ones(3, dtype=torch.float64, requires_grad=True)
    push = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for flow, parameters in ((lambda s: push - s, [idle, push]), (lambda s: -s, [idle])):
        gradients = reference.implicit_gradient(flow, lambda s: s.sum(), state, parameters)
        assert torch.equal(gradients[0], torch.zeros(3, dtype=torch.float64))
        assert all(torch.equal(g, torch.ones_like(g)) for g in gradients[1:])


def test_the_equilibrium_is_the_one_that_the_flow_finds() -> None:
    # Two attractors, +1 and -1, with a repeller between them to which Newton alone would jump.
    def flow(state: Tensor) -> Tensor:
        return state - state**3

    start = torch.tensor([0.05, -0.4, 3.0], dtype=torch.float64)
    found = reference.solve_equilibrium(flow, start)
    assert torch.allclose(found, start.sign(), rtol=0, atol=1e-15)


def test_the_oracle_refuses_what_it_cannot_solve() -> None:
    with pytest.raises(ValueError, match="needs float64"):
        reference.solve_equilibrium(lambda s: -s, torch.ones(2))
    with pytest.raises(ValueError, match="not differentiable"):
        reference.jacobian(lambda s: -s.detach(), torch.ones(2))
    with pytest.raises(RunError, match="no equilibrium within 50 Newton steps"):
        reference.solve_equilibrium(
            lambda s: 1 + s * s, torch.ones(2, dtype=torch.float64), steps=50
        )
