"""Recirculations by hand-computed kernels, and their pasts against sums over the whole history."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.tcep_cases import some, turn
from topotune.errors import ConfigError, UnstableError
from topotune.tcep.options import RECIRCULATIONS, TIMED, Dynamics
from topotune.tcep.recirculation import Memory, Recirculation, build_recirculation

TOKENS, WIDTH = 6, 3
KINDS_WITH_TERM = tuple(kind for kind in RECIRCULATIONS if kind != "none")


def build(
    kind: str,
    period: float | None = None,
    *,
    gamma: float = 0.7,
    kappa: float = 0.4,
    damping: float = 2.0,
    tokens: int = TOKENS,
) -> Recirculation:
    dynamics = Dynamics(damping=damping, recirculation=kind, kappa=kappa, **turn(kind, period))
    return build_recirculation(dynamics, tokens, gamma)


def matrix(recirculation: Recirculation, tokens: int) -> Tensor:
    """The (N, N) matrix of a term, column by column."""
    unit = torch.eye(tokens, dtype=torch.float64).unsqueeze(2)  # (N samples, N, 1)
    return recirculation.term(unit).squeeze(2).T


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("period", [4, 2])
def test_ring_kernel_by_hand(period: int, negative: bool) -> None:
    gamma, kappa = (-0.7 if negative else 0.7), 0.4
    a, b = math.exp(-kappa), math.exp(-2 * kappa)
    if period == 4:  # distances 0 1 2 1 around the ring
        rows = [[1, a, b, a], [a, 1, a, b], [b, a, 1, a], [a, b, a, 1]]
        divisor = 1 + 2 * a + b
    else:  # even tokens are the same place, and so are odd ones
        rows = [[1, a, 1, a], [a, 1, a, 1], [1, a, 1, a], [a, 1, a, 1]]
        divisor = 2 + 2 * a
    expected = gamma * torch.tensor(rows, dtype=torch.float64) / divisor
    found = matrix(build("ring", period, gamma=gamma, kappa=kappa, tokens=4), 4)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("tokens", [2, 3, 5, 8])
def test_ring_is_symmetric_and_feeds_back_at_most_gamma(tokens: int) -> None:
    for period in range(2, tokens + 1):
        found = matrix(build("ring", period, gamma=1.0, tokens=tokens), tokens)
        assert torch.equal(found, found.T)
        sums = found.sum(dim=1)
        assert float(sums.max()) == pytest.approx(1.0, rel=1e-14)
        assert float(torch.linalg.eigvalsh(found).abs().max()) <= 1 + 1e-12


def test_ring_depends_on_each_of_its_parameters() -> None:
    base = matrix(build("ring", 6), TOKENS)
    for other in (build("ring", 3), build("ring", 6, kappa=0.5), build("ring", 6, gamma=0.8)):
        assert not torch.allclose(matrix(other, TOKENS), base, rtol=1e-3)


def test_the_default_period() -> None:
    assert build("ring").period == TOKENS
    assert [build(kind).period for kind in TIMED] == [4.0, 4.0, 4.0]
    assert not torch.equal(matrix(build("shift"), TOKENS), 0.7 * torch.eye(TOKENS).double())


def test_shift_rotates_by_the_period() -> None:
    h = some(2, TOKENS, WIDTH)
    shifted = build("shift", 2).term(h)
    for token in range(TOKENS):
        assert torch.equal(shifted[:, (token + 2) % TOKENS], 0.7 * h[:, token])


@pytest.mark.parametrize(
    ("kind", "gain"),
    [
        ("ring", 0.7),
        ("shift", 0.7),
        ("delay", 0.7 * math.exp(-1.2)),
        ("fade", 0.7 * (1 - math.exp(-1.2))),
        ("gain", 0.7 * (1 - math.exp(-1.2)) / 1.2),
        ("none", 0.0),
    ],
)
def test_gain(kind: str, gain: float) -> None:
    found = build(kind, 3)
    assert found.gain == pytest.approx(gain, rel=1e-12)
    assert (found.kind, found.timed) == (kind, kind in TIMED)
    assert found.symmetric == (kind != "shift")
    if kind != "none":  # constant tokens see the largest gain
        ones = torch.ones(1, TOKENS, 1, dtype=torch.float64)
        assert float(found.term(ones).max()) == pytest.approx(gain, rel=1e-12)


def test_gain_without_decay() -> None:
    assert build("gain", 3, kappa=0.0).gain == pytest.approx(0.7)
    assert build("delay", 3, kappa=0.0).gain == pytest.approx(0.7)
    assert build("fade", 3, kappa=0.0).gain == 0.0


@pytest.mark.parametrize("kind", RECIRCULATIONS)
def test_adjoint_term_is_the_transpose(kind: str) -> None:
    found = build(kind, 2)
    a, b = some(4, TOKENS, WIDTH), some(4, TOKENS, WIDTH, seed=1)
    left = (found.term(a) * b).sum(dim=(1, 2))
    right = (a * found.adjoint_term(b)).sum(dim=(1, 2))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)
    if kind in ("shift", "ring"):
        assert float(left.abs().min()) > 0
    if kind == "shift":
        assert not torch.allclose(found.term(a), found.adjoint_term(a))


@pytest.mark.parametrize("kind", [kind for kind in RECIRCULATIONS if kind != "shift"])
def test_quadratic_is_the_potential_of_the_term(kind: str) -> None:
    found = build(kind, 3)
    h = some(4, TOKENS, WIDTH).requires_grad_()
    values = found.quadratic(h)
    assert values.shape == (4,)
    (slope,) = torch.autograd.grad(values.sum(), h, allow_unused=True)
    expected = found.term(h).detach()
    torch.testing.assert_close(
        torch.zeros_like(h) if slope is None else slope, expected, rtol=1e-12, atol=1e-15
    )
    assert (kind == "none") == (float(expected.abs().max()) == 0)


def test_a_directed_recirculation_has_no_potential() -> None:
    with pytest.raises(ValueError, match="directed"):
        build("shift", 2).quadratic(some(1, TOKENS, WIDTH))


def test_a_kernel_made_in_inference_mode_trains() -> None:
    found = build("ring")
    with torch.inference_mode():
        found.term(some(1, TOKENS, WIDTH))
    h = some(1, TOKENS, WIDTH).requires_grad_()
    (slope,) = torch.autograd.grad(found.term(h).square().sum(), h)
    assert float(slope.abs().max()) > 0
    assert found.term(h.detach().float()).dtype == torch.float32


# ---- the past ----


def weights(kind: str, count: int, dt: float, gamma: float, kappa: float) -> list[float]:
    """Weight of h(t - k dt), k = 0, 1, ..., by the definition."""
    if kind == "delay":
        return [0.0] * count + [gamma * math.exp(-kappa * count * dt)]
    return [
        gamma * (math.exp(-kappa * k * dt) - math.exp(-kappa * (k + 1) * dt)) for k in range(count)
    ]


@pytest.mark.parametrize("period", [0.1, 0.5, 2.0, 7.3])
@pytest.mark.parametrize("kind", ["delay", "fade"])
def test_memory_is_the_sum_over_the_whole_history(kind: str, period: float) -> None:
    found = build(kind, period)
    count, dt = found.time_step(0.3)
    assert count == math.ceil(period / 0.3)
    assert dt * count == pytest.approx(period, rel=1e-14)
    assert dt <= 0.3 + 1e-12
    by_lag = weights(kind, count, dt, 0.7, 0.4)
    assert sum(by_lag) == pytest.approx(found.gain, rel=1e-12)
    history = [some(2, 4, seed=9)]
    memory = found.memory(history[0], 0.3)
    assert (memory.count, memory.time_step) == (count, dt)
    for step in range(60):
        expected = torch.zeros_like(history[0])
        for lag, weight in enumerate(by_lag):
            expected = expected + weight * history[max(0, step - lag)]
        torch.testing.assert_close(memory.term(), expected, rtol=1e-12, atol=1e-13)
        new = some(2, 4, seed=100 + step)
        ahead = memory.ahead(new)
        memory.push(new)
        torch.testing.assert_close(memory.term(), ahead, rtol=1e-14, atol=1e-15)
        history.append(new)


def test_gain_memory_repeats_its_coefficients() -> None:
    found = build("gain", 2.0)
    h = torch.ones(1, 2, dtype=torch.float64)
    memory = found.memory(h, 0.5)
    assert memory.periodic
    seen = []
    for _ in range(9):
        seen.append(float(memory.term()[0, 0]))
        memory.push(h)
    # of each of five steps, the mean of gamma exp(-kappa t) over it
    edges = [0.7 / 0.4 * math.exp(-0.4 * 0.4 * phase) for phase in range(6)]
    one = [(a - b) / 0.4 for a, b in itertools.pairwise(edges)]
    assert seen == pytest.approx([*one, *one[:4]], rel=1e-13)


@pytest.mark.parametrize("kappa", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("dt", [0.1, 0.7, 5.0])
def test_the_mean_of_gain_does_not_depend_on_the_step(dt: float, kappa: float) -> None:
    found = build("gain", 2.0, kappa=kappa)
    count, step = found.time_step(dt)
    assert count % 2 == 1
    assert count * step == pytest.approx(2.0)
    assert step <= dt
    h = torch.ones(1, 2, dtype=torch.float64)
    memory, seen = found.memory(h, dt), []
    for _ in range(count):
        seen.append(float(memory.term()[0, 0]))
        memory.push(h)
    assert sum(seen) / count == pytest.approx(found.gain, rel=1e-13)


def test_ahead_of_gain_is_of_the_same_step() -> None:
    h = torch.ones(1, 2, dtype=torch.float64)
    memory = build("gain", 2.0).memory(h, 1.0)
    for _ in range(memory.count):
        assert torch.equal(memory.ahead(h), memory.term())
        memory.push(h)


@pytest.mark.parametrize("kind", TIMED)
def test_rows_of_a_memory(kind: str) -> None:
    whole = build(kind, 1.4).memory(some(4, 6), 0.3)
    index = torch.tensor([3, 1])
    for step in range(3):
        whole.push(some(4, 6, seed=step))
    part = whole.rows(index)
    for step in range(10):
        new = some(4, 6, seed=20 + step)
        whole.push(new)
        part.push(new[index])
        assert torch.equal(part.term(), whole.term()[index])


@pytest.mark.parametrize("kind", TIMED)
def test_a_past_is_differentiable(kind: str) -> None:
    found = build(kind, 0.9)

    def run(h0: Tensor, h1: Tensor, h2: Tensor) -> Tensor:
        memory = found.memory(h0, 0.3)
        out = memory.term()
        for h in (h1, h2, h1 * h2, h0 + h2, h1):
            memory.push(h)
            out = out + memory.term() * h
        return out

    inputs = tuple(some(2, 3, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(run, inputs)


def test_at_an_equilibrium_a_past_is_exact() -> None:
    h = some(2, TOKENS, WIDTH)
    for kind in ("delay", "fade"):
        found = build(kind, 1.7)
        memory: Memory = found.memory(h.flatten(1), 0.25)
        for _ in range(20):
            memory.push(h.flatten(1))
        expected = found.term(h).flatten(1)
        torch.testing.assert_close(memory.term(), expected, rtol=1e-13, atol=1e-14)
        assert torch.equal(memory.settled(h.flatten(1)), expected)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("kind", "period", "tokens"),
    [
        ("ring", 0.5, 6),
        ("ring", 1, 6),
        ("ring", 7, 6),
        ("ring", 3.5, 6),
        ("ring", None, 1),
        ("shift", 0.5, 6),
        ("shift", 7, 6),
        ("shift", 1.5, 6),
    ],
)
def test_periods_that_are_no_number_of_tokens(kind: str, period: float | None, tokens: int) -> None:
    with pytest.raises(ConfigError, match=r"whole number.*got") as caught:
        build(kind, period, tokens=tokens)
    assert caught.value.place == "T"
    assert not isinstance(caught.value, UnstableError)


def test_shift_by_one_and_by_all() -> None:
    assert build("shift", 1).period == 1
    assert build("shift", TOKENS).period == TOKENS


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("kind", "kappa", "stable", "unstable"),
    [
        ("ring", 0.4, 0.99, 1.0),
        ("shift", 0.4, 0.99, 1.0),
        ("gain", 0.4, 0.99, 1.0),  # in the first instant of each period
        ("delay", 0.5, 2.7, 2.72),  # exp(-0.5 * 2) = 1 / 2.718
        ("fade", 0.5, 1.58, 1.59),  # 1 - exp(-1) = 1 / 1.582
    ],
)
def test_what_cannot_settle_is_refused(
    kind: str, kappa: float, stable: float, unstable: float, sign: int
) -> None:
    build(kind, 2, gamma=sign * stable, kappa=kappa, damping=1.0)
    with pytest.raises(UnstableError) as caught:
        build(kind, 2, gamma=sign * unstable, kappa=kappa, damping=1.0)
    assert caught.value.place == "lambda"
    unit = "T_time" if kind in TIMED else "T"
    parts = (f"gamma {sign * unstable:g}", f"kappa {kappa:g}", f"{unit} 2", "gain", "Raise lambda")
    for part in parts:
        assert part in str(caught.value)


def test_none_is_always_stable() -> None:
    found = build("none", gamma=100.0, damping=0.1)
    h = some(2, TOKENS, WIDTH)
    assert float(found.term(h).abs().max()) == 0
    assert float(found.quadratic(h).abs().max()) == 0
    assert found.gamma == 0


@pytest.mark.parametrize("gamma", [math.nan, math.inf])
def test_gamma_must_be_a_number(gamma: float) -> None:
    with pytest.raises(ConfigError, match="finite") as caught:
        build("ring", gamma=gamma)
    assert caught.value.place == "gamma"


@pytest.mark.parametrize("kind", ["ring", "shift", "none"])
def test_no_past_where_none_acts(kind: str) -> None:
    found = build(kind)
    with pytest.raises(ValueError, match="keeps no past"):
        found.memory(some(1, 18), 0.1)
    with pytest.raises(ValueError, match="keeps no past"):
        found.time_step(0.1)


def test_a_past_has_a_size_limit() -> None:
    with pytest.raises(ConfigError, match=r"at most 10000 steps") as caught:
        build("delay", 1e9).time_step(0.5)
    assert caught.value.place == "T_time"
