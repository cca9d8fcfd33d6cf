"""The fields: their start, energy control, reports, and gradients that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.optim_cases import COUPLINGS, gradients, parameters, replay, starts
from topotune.optim import TopologicalAdam

KEYS = {
    "energy",
    "energy_controlled",
    "coupling_current",
    "alpha_norm",
    "beta_norm",
    "alpha_beta_cos",
    "topo_ratio",
    "skipped_nonfinite",
}


def energy_of(alpha: Tensor, beta: Tensor) -> float:
    return (0.5 * (alpha.double().square() + beta.double().square()).mean()).item()


def stepped(dtype: torch.dtype = torch.float64, steps: int = 1, **options: Any) -> TopologicalAdam:
    tensors = parameters(starts(), dtype)
    optimizer = TopologicalAdam(tensors, **options)
    replay(optimizer, tensors, gradients(steps, 1.0))
    return optimizer


def test_first_step_of_uniform_by_hand() -> None:
    """Two elements; every line of the paper's pseudocode written out."""
    p0, p1, g0, g1 = 0.3, -0.8, 0.5, 2.0
    lr, eta, mu0, w, s, target = 0.1, 0.1, 0.4, 0.7, 0.5, 0.02
    p = nn.Parameter(torch.tensor([p0, p1], dtype=torch.float64))
    p.grad = torch.tensor([g0, g1], dtype=torch.float64)
    optimizer = TopologicalAdam([p], lr, (0.9, 0.999), 1e-8, eta, mu0, w, s, target)
    optimizer.step()
    a0, a1 = s * math.tanh(p0), s * math.tanh(p1)
    b0, b1 = 0.5 * s * math.cos(p0), 0.5 * s * math.cos(p1)
    current = (a0 - b0) * g0 + (a1 - b1) * g1
    shift = eta / mu0 * current
    a0, a1 = (1 - eta) * a0 + shift, (1 - eta) * a1 + shift
    b0, b1 = (1 - eta) * b0 - shift, (1 - eta) * b1 - shift
    energy = 0.5 * (a0 * a0 + b0 * b0 + a1 * a1 + b1 * b1) / 2
    scale = math.sqrt(target / energy)
    expected = [
        p0 - lr * (g0 / (abs(g0) + 1e-8) + w * math.tanh(scale * (a0 - b0))),
        p1 - lr * (g1 / (abs(g1) + 1e-8) + w * math.tanh(scale * (a1 - b1))),
    ]
    assert p.tolist() == pytest.approx(expected, rel=1e-12)
    alpha, beta = optimizer.fields(p)
    assert alpha.tolist() == pytest.approx([scale * a0, scale * a1], rel=1e-12)
    assert beta.tolist() == pytest.approx([scale * b0, scale * b1], rel=1e-12)
    assert optimizer.energy() == pytest.approx(energy, rel=1e-12)
    assert optimizer.J_mean_abs() == pytest.approx(abs(current), rel=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_exact_control_meets_the_target(coupling: str, dtype: torch.dtype, bound: float) -> None:
    tensors = parameters(starts(), dtype)
    optimizer = TopologicalAdam(tensors, coupling=coupling, target_energy=0.03)
    for step in gradients(20, 3.0):
        replay(optimizer, tensors, [step])
        for tensor in tensors:
            assert energy_of(*optimizer.fields(tensor)) == pytest.approx(0.03, rel=bound)
        assert optimizer.metrics()["energy_controlled"] == pytest.approx(0.03, rel=1e-14)


@given(energy=st.floats(1e-9, 1e9), target=st.floats(1e-6, 1e3))
@settings(max_examples=60, deadline=None)
def test_band_amplifies_damps_or_leaves(energy: float, target: float) -> None:
    """With a zero gradient the fields only decay, so the raw energy is known."""
    p = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    trial = TopologicalAdam([p], energy_control="band")
    trial.step()
    unit = trial.metrics()["energy"]
    size = 0.01 * math.sqrt(energy / unit)
    q = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
    q.grad = torch.zeros_like(q)
    optimizer = TopologicalAdam(
        [q], energy_control="band", field_init_scale=size, target_energy=target
    )
    optimizer.step()
    raw = optimizer.metrics()["energy"]
    assert raw == pytest.approx(energy, rel=1e-9)
    if raw < target:
        expected = target
    elif raw > 10.0 * target:
        expected = 0.81 * raw
    else:
        expected = raw
    assert optimizer.metrics()["energy_controlled"] == pytest.approx(expected, rel=1e-12)
    assert energy_of(*optimizer.fields(q)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_gradient_leaves_the_fields_of_its_tensor(coupling: str, poison: float) -> None:
    recording = gradients(6, 1.0)
    tensors, others = parameters(starts()), parameters(starts())
    optimizer = TopologicalAdam(tensors, coupling=coupling)
    replay(optimizer, tensors, recording[:3])
    before = [tuple(f.clone() for f in optimizer.fields(t)) for t in tensors]
    controlled = optimizer.metrics()["energy_controlled"]
    broken = [g.clone() for g in recording[3]]
    broken[0][5, 5] = poison
    replay(optimizer, tensors, [broken])
    assert all(
        torch.equal(a, b) for a, b in zip(before[0], optimizer.fields(tensors[0]), strict=True)
    )
    assert not torch.equal(before[1][0], optimizer.fields(tensors[1])[0])
    assert optimizer.metrics()["skipped_nonfinite"] == 1.0
    assert optimizer.metrics()["energy_controlled"] == pytest.approx(controlled, rel=1e-12)

    # Adam's own part does what torch's does: the poison reaches one element and no other.
    clean = TopologicalAdam(others, coupling=coupling)
    replay(clean, others, recording[:3])
    twin = torch.optim.Adam(others[:1], fused=True)
    moments = {key: clean.state[others[0]][key] for key in ("step", "exp_avg", "exp_avg_sq")}
    twin.state[others[0]] = moments
    replay(twin, others[:1], [broken[:1]])
    assert torch.equal(others[0].isfinite(), tensors[0].isfinite())
    assert not tensors[0].isfinite().all()
    finite = tensors[0].isfinite()
    assert torch.equal(tensors[0][finite], others[0][finite])

    replay(optimizer, tensors, recording[4:])
    assert optimizer.metrics()["skipped_nonfinite"] == 1.0
    assert all(field.isfinite().all() for t in tensors for field in optimizer.fields(t))


def test_metrics_from_the_fields_and_the_moments() -> None:
    optimizer = stepped(steps=7, coupling="exchange", w_topo=0.4)
    tensors = optimizer.param_groups[0]["params"]
    found = optimizer.metrics()
    assert found.keys() == KEYS
    assert all(type(value) is float for value in found.values())
    fields = [optimizer.fields(t) for t in tensors]
    alpha = torch.cat([a.flatten() for a, _ in fields])
    beta = torch.cat([b.flatten() for _, b in fields])
    assert found["alpha_norm"] == pytest.approx(alpha.norm().item())
    assert found["beta_norm"] == pytest.approx(beta.norm().item())
    cosine = (alpha @ beta / alpha.norm() / beta.norm()).item()
    assert found["alpha_beta_cos"] == pytest.approx(cosine)
    directions = []
    for t in tensors:
        state = optimizer.state[t]
        m = state["exp_avg"] / (1 - 0.9**7)
        v = state["exp_avg_sq"] / (1 - 0.999**7)
        directions.append((m / (v.sqrt() + 1e-8)).flatten())
    ratio = 0.4 * torch.tanh(alpha - beta).norm() / torch.cat(directions).norm()
    assert found["topo_ratio"] == pytest.approx(ratio.item())


def test_topo_ratio_knows_where_eps_stands() -> None:
    """With one step, Adam's direction is g / sqrt(g^2 + eps)."""
    p = nn.Parameter(torch.tensor([0.2, 0.4], dtype=torch.float64))
    p.grad = torch.tensor([0.5, -0.1], dtype=torch.float64)
    optimizer = TopologicalAdam([p], eps=0.3, eps_inside_sqrt=True)
    optimizer.step()
    alpha, beta = optimizer.fields(p)
    direction = p.grad / (p.grad.square() + 0.3).sqrt()
    expected = 0.15 * torch.tanh(alpha - beta).norm() / direction.norm()
    assert optimizer.metrics()["topo_ratio"] == pytest.approx(expected.item(), rel=1e-9)


def test_published_reports() -> None:
    optimizer = stepped(steps=3)
    tensors = optimizer.param_groups[0]["params"]
    found = optimizer.field_metrics()
    assert found.keys() == {"energy", "j_t", "alpha_norm", "beta_norm", "alpha_beta_corr"}
    assert optimizer.energy() == pytest.approx(3 * optimizer.metrics()["energy"])
    assert optimizer.J_mean_abs() == found["j_t"] == optimizer.metrics()["coupling_current"]
    fields = [optimizer.fields(t) for t in tensors]
    energies = [energy_of(*pair) for pair in fields]
    assert found["energy"] == pytest.approx(sum(energies) / 3)
    assert found["alpha_norm"] == pytest.approx(sum(a.norm().item() for a, _ in fields) / 3)
    pairs = [torch.stack([a.flatten(), b.flatten()]) for a, b in fields[:2]]
    correlations = [torch.corrcoef(pair)[0, 1].item() for pair in pairs]
    assert found["alpha_beta_corr"] == pytest.approx(sum(correlations) / 3)


@pytest.mark.parametrize("options", [{"eta": 0.0}, {}], ids=["eta 0", "no step"])
def test_reports_without_fields(options: dict[str, float]) -> None:
    tensors = parameters(starts())
    optimizer = TopologicalAdam(tensors, **options)  # type: ignore[arg-type]
    if options:
        replay(optimizer, tensors, gradients(2, 1.0))
    assert optimizer.metrics() == dict.fromkeys(KEYS, 0.0)
    assert optimizer.energy() == optimizer.J_mean_abs() == 0.0
    assert set(optimizer.field_metrics().values()) == {0.0}
    assert optimizer.energy_trace().step.tolist() == []
    with pytest.raises(ValueError, match="no fields for this parameter"):
        optimizer.fields(tensors[0])


def test_trace_holds_each_step_and_forgets() -> None:
    tensors = parameters(starts())
    optimizer = TopologicalAdam(tensors)
    energies, currents = [], []
    for step in gradients(5, 1.0):
        replay(optimizer, tensors, [step])
        energies.append(optimizer.metrics()["energy"])
        currents.append(optimizer.metrics()["coupling_current"])
    trace = optimizer.energy_trace()
    assert trace.step.tolist() == [1, 2, 3, 4, 5]
    assert trace.energy.tolist() == pytest.approx(energies)
    assert trace.coupling_current.tolist() == pytest.approx(currents)
    assert trace.energy_controlled.tolist() == pytest.approx([1e-3] * 5)
    assert trace.dropped == 0
    replay(optimizer, tensors, gradients(2, 1.0))
    assert optimizer.energy_trace().step.tolist() == [6, 7]


def test_trace_says_what_it_dropped() -> None:
    tensors = parameters(starts())
    optimizer = TopologicalAdam(tensors, trace_capacity=4)
    replay(optimizer, tensors, gradients(10, 1.0))
    last = optimizer.metrics()["energy"]
    trace = optimizer.energy_trace()
    assert trace.step.tolist() == [7, 8, 9, 10]
    assert trace.dropped == 6
    assert trace.energy[-1].item() == pytest.approx(last)


def test_trace_is_the_mean_over_groups_and_tensors() -> None:
    """One mean over all tensors, however they are batched."""
    apart = parameters(starts(), torch.float64)
    optimizer = TopologicalAdam([{"params": [p]} for p in apart])
    replay(optimizer, apart, gradients(4, 1.0))
    together = stepped(steps=4)
    assert optimizer.energy_trace().energy.tolist() == pytest.approx(
        together.energy_trace().energy.tolist()
    )


def test_normal_fields_are_seeded_and_differ_between_tensors() -> None:
    values = [torch.zeros(400), torch.zeros(400)]

    def fields(seed: int) -> list[Tensor]:
        tensors = parameters(values)
        optimizer = TopologicalAdam(
            tensors, field_init="normal", field_seed=seed, field_init_scale=0.3, coupling="exchange"
        )
        replay(optimizer, tensors, [values])
        state = [optimizer.state[t] for t in tensors]
        return [s[name] for s in state for name in ("alpha0", "beta0")]

    first, again, other = fields(1), fields(1), fields(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[2])
    assert first[0].std().item() == pytest.approx(0.3, rel=0.15)
    assert first[1].std().item() == pytest.approx(0.15, rel=0.15)


def test_low_precision_parameters_move() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        optimizer = stepped(dtype, steps=20, lr=0.05)
        exact = stepped(torch.float64, steps=20, lr=0.05)
        for mine, other in zip(
            optimizer.param_groups[0]["params"], exact.param_groups[0]["params"], strict=True
        ):
            torch.testing.assert_close(mine.double(), other, rtol=0.1, atol=0.02)
        assert optimizer.metrics()["energy_controlled"] == pytest.approx(1e-3)


def test_coefficients_that_vanish_cost_no_denormal_products() -> None:
    """Thousands of float32 elements times 1e-40 would be hundred times as slow, and invisible."""
    optimizer = stepped(torch.float32)
    fields = next(iter(optimizer._plans.values())).batches[0].fields
    assert fields is not None
    fields.coefficient_rows[0] = 1e-36
    assert fields.weights(fields.coefficient_rows)[0] == [0.0, 0.0, 0.0]
    fields.coefficient_rows[0] = 1e-28
    assert fields.weights(fields.coefficient_rows)[0] == [1e-28] * 3
