"""Spectral caps, eigenvalues, and margins, against dense linear algebra."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.tcep_cases import batch, small_network, some, train
from topotune.errors import PluginError
from topotune.tcep import probe
from topotune.tcep.energy import EnergyField
from topotune.tcep.fields import Capped, Field
from topotune.tcep.functions import smooth_relu_integral
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Caps, Dynamics, Learning
from topotune.tcep.spectral import SpectralCaps, largest_eigenvalue, one_sided_lipschitz
from topotune.tcep.transformer import TransformerField


def norms(weight: Tensor) -> Tensor:
    found: Tensor = torch.linalg.matrix_norm(weight.detach(), ord=2)
    return found


def dense_jacobian(flow: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    count = point.numel()
    found: Tensor = torch.func.jacrev(flow)(point).detach()
    return found.reshape(count, count)


# ---- caps ----


def test_caps_hold_after_steps_of_an_optimizer() -> None:
    """To a per cent, each head by itself, while the weights are pushed outwards."""
    weights = [nn.Parameter(some(3, 8, 5, seed=s)) for s in range(2)]
    weights += [nn.Parameter(some(*shape, seed=7)) for shape in ((30, 20), (20, 30), (1, 9))]
    with torch.no_grad():
        weights[0][1] *= 0.01  # a head that is far below the cap of the others
    quiet = weights[0][1].detach().clone()
    caps = SpectralCaps([Capped(w, 0.5 + 0.5 * i, w.ndim == 3) for i, w in enumerate(weights)])
    assert torch.equal(weights[0][1], quiet)
    assert norms(weights[0])[[0, 2]].tolist() == pytest.approx([0.5, 0.5], rel=0.01)
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    for step in range(15):
        for weight in weights:
            weight.grad = -weight.detach() - 0.2 * some(*weight.shape, seed=step)
        optimizer.step()
        assert float(norms(weights[0])[0]) > 0.502
        caps()
        for i, weight in enumerate(weights):
            assert float(norms(weight).max()) <= 1.01 * (0.5 + 0.5 * i)
    for i, weight in enumerate(weights):
        assert float(norms(weight).max()) == pytest.approx(0.5 + 0.5 * i, rel=0.01)


def test_caps_hold_in_the_training_of_a_network() -> None:
    caps = Caps(attention=0.3, memory=0.4, hidden=0.6)
    network = small_network(torch.float32, caps=caps, gamma=0.1, steps=60, tolerance=1e-5)
    train(network, Learning(), 15, lr=0.02)
    expected = [0.3, 0.3, 0.4, 0.6]
    for (weight, cap, _), right in zip(network.field.capped(), expected, strict=True):
        assert cap == right
        assert float(norms(weight).max()) <= 1.01 * cap
        assert float(norms(weight).max()) > 0.9 * cap


def test_a_cap_scales_and_turns_nothing() -> None:
    weight = nn.Parameter(some(6, 4))
    before = weight.detach().clone()
    SpectralCaps([Capped(weight, 0.5)])
    torch.testing.assert_close(weight.detach() / 0.5, before / norms(before), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cap", [0.0, 1e6])
def test_what_is_below_its_cap_or_has_none_is_left_alone(cap: float) -> None:
    weight = nn.Parameter(some(2, 6, 4))
    before = weight.detach().clone()
    caps = SpectralCaps([Capped(weight, cap, heads=True)])
    for _ in range(3):
        caps()
    assert torch.equal(weight.detach(), before)
    assert len(list(caps.buffers())) == (0 if cap == 0 else 1)


def test_weights_that_start_at_zero_are_capped_once_they_have_grown() -> None:
    weights = [nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(2, 4, 5))]
    caps = SpectralCaps([Capped(w, 1.0, w.ndim == 3) for w in weights])
    for weight in weights:
        assert not weight.any()
        nn.init.normal_(weight, std=10.0)
    for _ in range(20):
        caps()
    for weight in weights:
        assert norms(weight).flatten().tolist() == pytest.approx(
            [1.0] * len(norms(weight).flatten()), rel=0.01
        )


KERNELS = [(6, 4, 3, 3), (3, 8, 1, 5), (5, 4, 3), (4, 2, 2, 2, 2), (7, 5)]
"""Of convolutions over two, one and three dimensions; and a matrix."""


@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_a_kernel_is_capped_as_the_operator_of_a_patch(shape: tuple[int, ...]) -> None:
    """(out, in*k*k), by dense singular values, at once and while the weights are pushed out."""
    weight = nn.Parameter(some(*shape))
    before = weight.detach().clone()
    norm = norms(before.reshape(shape[0], -1))
    caps = SpectralCaps([Capped(weight, 1.0)])
    torch.testing.assert_close(weight.detach(), before / norm, rtol=1e-2, atol=0)
    assert float(caps.norms()[0]) == pytest.approx(1.0, rel=1e-2)
    for step in range(20):
        with torch.no_grad():
            weight.add_(0.03 * weight + 0.005 * some(*shape, seed=step))
        caps()
    assert float(norms(weight.detach().reshape(shape[0], -1))) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_what_the_cap_of_a_kernel_says_about_its_convolution(stride: int) -> None:
    """Patches that do not overlap: its norm is the cap. Overlapping ones: at most 3 times it."""
    weight = nn.Parameter(some(4, 2, 3, 3))
    SpectralCaps([Capped(weight, 1.0)])
    columns = torch.eye(2 * 9 * 9, dtype=torch.float64).view(-1, 2, 9, 9)
    images = nn.functional.conv2d(columns, weight.detach(), stride=stride).flatten(1)
    whole = float(norms(images))
    if stride == 3:
        assert whole == pytest.approx(1.0, rel=1e-2)
    else:
        assert 1.0 < whole <= 3.0


def test_heads_are_capped_one_by_one_and_only_when_named() -> None:
    heads, kernel = nn.Parameter(some(3, 5, 4)), nn.Parameter(some(3, 5, 4))
    SpectralCaps([Capped(heads, 0.5, heads=True), Capped(kernel, 0.5)])
    assert norms(heads).tolist() == pytest.approx([0.5] * 3, rel=1e-2)
    assert float(norms(kernel.detach().reshape(3, 20))) == pytest.approx(0.5, rel=1e-2)


class Convolved(Field):
    """``E = -<u, h> - sum Phi(conv(h))`` over a ring of tokens: a kernel in its energy."""

    shape: tuple[int, ...] = (6, 4, 1, 3)
    heads = False
    cap = 0.5

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width, tokens * width, tokens * width)
        self.kernel = nn.Parameter(some(*self.shape, dtype=torch.float32))

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        rows = functional.pad(self.split(state)[0].transpose(1, 2), (1, 1), mode="circular")
        seen = functional.conv1d(rows, self.kernel.reshape(6, self.width, 3))
        driven = (state * drive.flatten(1)).sum(dim=1)
        return -driven - smooth_relu_integral(seen).sum(dim=(1, 2))

    def features(self, state: Tensor) -> Tensor:
        return state

    def capped(self) -> list[Capped]:
        return [Capped(self.kernel, self.cap, self.heads)]


class Flat(Convolved):
    shape = (72,)


class NoHeads(Convolved):
    heads = True


class BelowZero(Convolved):
    cap = -1.0


def convolved(field: type[Field], fraction: float | None = None) -> TCEPNetwork:
    path = f"{__name__}:{field.__name__}"
    dynamics = Dynamics(damping=4.0, gamma_fraction=fraction)
    return TCEPNetwork(1, 6, 4, width=4, field=path, dynamics=dynamics)


def test_a_field_with_a_kernel_is_capped_and_its_gamma_follows_from_the_cap() -> None:
    made = convolved(Convolved, 0.5)
    (capped,) = made.field.capped()
    assert float(norms(capped.weight.reshape(6, -1))) == pytest.approx(0.5, rel=1e-2)
    # Phi'' is at most 1, so mu is at most the convolution's norm squared, 3 cap^2 at the most.
    assert 0.05 < made.reference_mu <= 0.75
    assert made.recirculation.gamma == pytest.approx(0.5 * (4.0 - made.reference_mu))


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (Flat, "holds a weight of shape (72,); a spectral norm needs at least two dimensions"),
        (NoHeads, "holds a weight of shape (6, 4, 1, 3); a spectral norm a head needs (heads,"),
        (BelowZero, "holds a cap of -1.0; it must be a finite number of at least 0"),
    ],
)
def test_what_has_no_spectral_norm_is_refused_by_the_name_of_the_field(
    field: type[Field], text: str
) -> None:
    with pytest.raises(PluginError) as caught:
        convolved(field)
    assert f"field {field.__name__}: capped() {text}" in str(caught.value)


def test_what_caps_follow_is_in_the_state() -> None:
    """A resumed training caps as an undisturbed one: bit for bit."""
    network, other = (small_network(seed=seed, gamma=0.1) for seed in (0, 1))
    train(network, Learning(), 2, lr=0.1)
    vectors = {name for name in network.state_dict() if name.startswith("caps.")}
    assert len(vectors) == 4
    other.load_state_dict(network.state_dict())
    for made in (network, other):
        with torch.no_grad():
            for weight, _, _ in made.field.capped():
                weight.add_(some(*weight.shape, seed=5))
        made.caps()
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# ---- eigenvalues ----


def largest(matrices: Tensor, steps: int = 14, seed: int = 1) -> Tensor:
    start = some(*matrices.shape[:2], seed=seed, dtype=matrices.dtype)
    return largest_eigenvalue(lambda x: (matrices @ x[:, :, None])[:, :, 0], start, steps)


def spectra(*values: Tensor) -> Tensor:
    """Symmetric matrices with these eigenvalues, in random directions."""
    size = len(values[0])
    turn = torch.linalg.qr(some(len(values), size, size))[0]
    found: Tensor = turn @ torch.stack([v.double() for v in values]).diag_embed() @ turn.mT
    return found


EIGENVALUES = {
    "one": torch.tensor([-3.0]),
    "two": torch.tensor([-3.0, -1.0]),
    "mixed": torch.linspace(-2, 1, 9),
    "negative": -torch.linspace(0.5, 4, 9),
    "all equal": torch.full((9,), -2.0),
    "repeated": torch.tensor([-1.0] * 5 + [-3.0] * 5),
    "repeated largest": torch.tensor([2.0] * 6 + [1.0, 0.0, -9.0]),
    "low rank": torch.tensor([5.0] + [0.0] * 11),
    "negative of low rank": torch.tensor([-5.0, -1.0] + [0.0] * 8),
    "zero": torch.zeros(7),
}


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("values", EIGENVALUES.values(), ids=EIGENVALUES.keys())
def test_largest_eigenvalue(values: Tensor, dtype: torch.dtype, scale: float) -> None:
    matrices = (scale * spectra(values, values.flip(0), 0.5 * values)).to(dtype)
    found = largest(matrices)
    assert found.dtype == dtype
    exact = torch.linalg.eigvalsh(matrices.double())[:, -1]
    rounding = (1e-11 if dtype == torch.float64 else 1e-4) * scale * float(values.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=rounding)


def test_the_largest_eigenvalue_of_a_large_matrix_is_approached_from_below() -> None:
    matrices = spectra(torch.linspace(-3, -0.1, 80), torch.linspace(-1, 5, 80))
    exact = torch.linalg.eigvalsh(matrices)[:, -1]
    width = exact - torch.linalg.eigvalsh(matrices)[:, 0]
    errors = [exact - largest(matrices, steps) for steps in (4, 8, 14, 80)]
    assert all(float(e.min()) >= -1e-12 for e in errors)
    assert float((errors[2] / width).max()) < 0.02
    assert float((errors[2] / errors[0]).max()) < 0.3
    assert float(errors[3].max()) < 1e-11


def test_a_matrix_that_is_no_number_has_no_eigenvalue_and_spoils_no_other() -> None:
    matrices = spectra(torch.linspace(-2, 1, 9), torch.linspace(-2, 1, 9), torch.ones(9))
    matrices[1, 3, 3] = torch.nan
    found = largest(matrices)
    assert found.isnan().tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == pytest.approx([1.0, 1.0], rel=1e-9)


# ---- mu and the margin ----


def field_of(kind: str, tokens: int = 3, gain: float = 3.0) -> Field:
    torch.manual_seed(0)
    found: Field = (
        EnergyField(tokens, 4, 2, hidden=5, memory=6, scale=4.0)
        if kind == "energy"
        else TransformerField(tokens, 4, 2, memory=6)
    )
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(gain)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["energy", "transformer"])
def test_mu_against_the_dense_jacobian(kind: str, dtype: torch.dtype) -> None:
    """12 numbers, so Lanczos is exact."""
    field = field_of(kind).to(dtype)
    drive, state = some(4, 3, 4, dtype=dtype), some(4, field.size, seed=2, dtype=dtype)
    found = one_sided_lipschitz(field, drive, state)
    exact = field_of(kind).double()
    exact.load_state_dict(field.state_dict())
    for i in range(4):
        one = state[i : i + 1].double()

        def flow(tokens: Tensor, i: int = i, one: Tensor = one) -> Tensor:
            return exact.eliminated(tokens[None], drive[i : i + 1].double(), one)[0].flatten()

        tokens = exact.split(one)[0][0]
        dense = dense_jacobian(flow, tokens)
        mu = torch.linalg.eigvalsh(0.5 * (dense + dense.T))[-1]
        assert float(found[i]) == pytest.approx(float(mu), abs=1e-7)
    assert float(found.max() - found.min()) > 1e-2
    assert next(field.parameters()).dtype == dtype


def growth(network: TCEPNetwork, drive: Tensor, state: Tensor) -> float:
    """The largest real part of the eigenvalues of the whole flow's Jacobian."""
    parts = []
    for u, s in zip(drive, state, strict=True):

        def flow(one: Tensor, u: Tensor = u) -> Tensor:
            return network.flow(one[None], u[None])[0]

        dense = dense_jacobian(flow, s)
        parts.append(torch.linalg.eigvals(dense).real.max())
    return float(torch.stack(parts).max())


@pytest.mark.parametrize("field", ["energy", "transformer"])
@pytest.mark.parametrize("kind", ["ring", "shift", "delay"])
def test_where_the_margin_is_positive_the_network_contracts(field: str, kind: str) -> None:
    gamma = None if kind == "none" else 0.4
    for damping in (1.0, 2.0):
        network = small_network(
            field=field, recirculation=kind, gamma=gamma, kappa=0.1, damping=damping, steps=600
        )
        train(network, Learning(), 3, lr=0.05)
        inputs, _ = batch(3)
        margin = probe.margins(network, inputs)["stability_margin"]
        drive = network.drive(inputs).detach()
        rate = growth(network, drive, network.relax(drive).state)
        assert rate < 0
        if margin > 0:
            break
    assert margin > 0, "the test has no case where the margin is positive"
    assert rate <= -0.5 * min(margin, 1.0)


def test_the_margin_of_an_energy_tells_stable_from_unstable() -> None:
    """Eliminating the hidden units keeps the signs of the spectrum: the margin's sign is exact."""
    network = small_network(recirculation="none", damping=1.0)
    drive = network.drive(batch(1)[0]).detach()
    state = network.relax(drive).state
    mu = float(network.one_sided_lipschitz(drive, state))
    for damping, stable in ((mu + 0.02, True), (mu - 0.02, False)):
        other = small_network(recirculation="none", damping=damping)
        assert (growth(other, drive, state) < 0) is stable


@pytest.mark.parametrize("weight", ["query", "hidden_weight"])
def test_margins_of_a_network_that_is_no_number_any_more(weight: str) -> None:
    network = small_network(torch.float32, gamma=0.2)
    nn.init.constant_(getattr(network.field, weight), torch.nan)
    found = probe.margins(network, batch(4, torch.float32)[0])
    assert found["recirculation_gain"] == 0.2
    assert found["one_sided_lipschitz"] != found["one_sided_lipschitz"]
    assert found["stability_margin"] != found["stability_margin"]
