"""Relaxation against exact answers: linear solves, lambda_eff, long fine integrations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.tcep_cases import some
from topotune.errors import UnknownNameError
from topotune.tcep import stepping
from topotune.tcep.functions import smooth_relu
from topotune.tcep.options import Dynamics, Solver
from topotune.tcep.recirculation import Recirculation, build_recirculation
from topotune.tcep.relax import Equilibrium, Noise, Status, relax, unroll

SOLVERS = ("anderson", "euler", "heun", "dopri5")
SIZE = 8


class Affine:
    """``A s + b`` of each sample, counting how many of its rows were evaluated."""

    def __init__(self, a: Tensor, b: Tensor, counts: Tensor | None = None) -> None:
        self.a, self.b = a, b
        self.counts = torch.zeros(len(b)) if counts is None else counts
        self.index = torch.arange(len(b))
        self.calls = 0

    def __call__(self, state: Tensor) -> Tensor:
        self.calls += 1
        self.counts[self.index] += 1
        if self.a.ndim == 2:
            return state @ self.a.T + self.b
        return torch.einsum("bij,bj->bi", self.a, state) + self.b

    def rows(self, index: Tensor) -> Affine:
        a = self.a if self.a.ndim == 2 else self.a[index]
        part = Affine(a, self.b[index], self.counts)
        part.index = self.index[index]
        return part


class Bend:
    """``-s - s^3 + b``, the downhill flow of :meth:`energy`; elementwise, so the same to the last
    bit in any batch."""

    def __init__(self, b: Tensor) -> None:
        self.b = b

    def __call__(self, state: Tensor) -> Tensor:
        return torch.sub(self.b - state, state.pow(3))

    def rows(self, index: Tensor) -> Bend:
        return Bend(self.b[index])

    def energy(self, state: Tensor) -> Tensor:
        density: Tensor = state.square() / 2 + state.pow(4) / 4 - self.b * state
        return density.sum(dim=1)


class Decays:
    """``-r s`` with a rate r for each sample, negative where it is to explode."""

    def __init__(self, rates: Tensor) -> None:
        self.rates = rates

    def __call__(self, state: Tensor) -> Tensor:
        return -self.rates[:, None] * state

    def rows(self, index: Tensor) -> Decays:
        return Decays(self.rates[index])


def stable(symmetric: bool) -> Tensor:
    a = some(SIZE, SIZE, seed=3) / SIZE**0.5
    one = torch.eye(SIZE, dtype=torch.float64)
    return torch.sub(-(a @ a.T) / 4 if symmetric else 0.6 * (a - a.T) + 0.2 * a, one)


def solution(a: Tensor, b: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve(a, -b.T)
    return solved.T


def distinct(x: Tensor) -> int:
    return len(set(x.tolist()))


def settled(found: Equilibrium, flow: Callable[[Tensor], Tensor], tolerance: float) -> None:
    """What an equilibrium says about itself is true."""
    residual = flow(found.state).square().mean(dim=1).sqrt()
    torch.testing.assert_close(found.residual, residual, rtol=1e-6, atol=1e-14)
    assert torch.equal(found.converged, found.residual <= tolerance)


# ---- linear networks ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_point_of_a_linear_network(name: str, symmetric: bool, dtype: torch.dtype) -> None:
    a, b = stable(symmetric), some(5, SIZE)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    flow = Affine(a.to(dtype), b.to(dtype))
    solver = Solver(name, 400, tolerance)
    found = relax(flow, torch.zeros(5, SIZE, dtype=dtype), solver, dt=0.6)
    assert found.state.dtype == dtype
    assert found.status.dtype == torch.int8
    assert bool(found.converged.all())
    assert float(found.unconverged_share) == 0
    expected = solution(a, b)
    torch.testing.assert_close(found.state.double(), expected, rtol=0, atol=20 * tolerance)
    if dtype == torch.float64:
        settled(found, flow, tolerance)


def test_anderson_takes_far_fewer_evaluations_than_euler() -> None:
    """A linear problem of four distinct rates is solved by four differences."""
    rates = torch.tensor([0.03, 0.2, 0.6, 1.0], dtype=torch.float64)
    flow = Affine(torch.diag(-rates), some(3, 4))
    taken = {}
    for name in ("anderson", "euler"):
        found = relax(
            flow, torch.zeros(3, 4, dtype=torch.float64), Solver(name, 1000, 1e-6), dt=0.8
        )
        assert bool(found.converged.all())
        taken[name] = float(found.nfe.max())
    assert taken["anderson"] <= 9
    assert taken["euler"] > 300


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_all_counted(name: str) -> None:
    flow = Affine(stable(False), some(1, SIZE))
    start = torch.zeros(1, SIZE, dtype=torch.float64)
    found = relax(flow, start, Solver(name, 200, 1e-6), dt=0.5)
    assert int(found.nfe) == flow.calls
    if name == "heun":
        assert int(found.nfe) == 2 * found.steps + 1
    if name in ("euler", "anderson"):
        assert int(found.nfe) == found.steps + 1


@pytest.mark.parametrize("name", SOLVERS)
def test_in_inference_mode_and_under_gradients(name: str) -> None:
    weight = stable(False).requires_grad_()
    flow = Affine(weight, some(2, SIZE))
    start = torch.zeros(2, SIZE, dtype=torch.float64, requires_grad=True)
    solver = Solver(name, 200, 1e-6)
    found = relax(flow, start, solver, dt=0.5)
    assert not found.state.requires_grad
    with torch.inference_mode():
        again = relax(flow, start, solver, dt=0.5)
        assert torch.equal(again.state, found.state)


def test_nothing_is_written_into_the_start() -> None:
    start = some(4, SIZE, seed=5)
    before = start.clone()
    for name in SOLVERS:
        relax(Affine(stable(False), some(4, SIZE)), start, Solver(name, 50, 1e-4), dt=0.5)
        assert torch.equal(start, before)


def test_an_empty_batch() -> None:
    empty = torch.zeros(0, SIZE)
    found = relax(Affine(stable(True).float(), empty), empty, Solver("anderson"), dt=0.5)
    assert found.state.shape == (0, SIZE)
    assert found.nfe.shape == (0,)


# ---- statuses, freezing, taking out ----


def test_too_few_steps_are_unconverged_and_say_so() -> None:
    flow = Affine(stable(True), some(3, SIZE))
    for name in SOLVERS:
        found = relax(flow, torch.zeros(3, SIZE, dtype=torch.float64), Solver(name, 3), dt=0.1)
        assert found.status.tolist() == [Status.UNCONVERGED] * 3
        settled(found, flow, 1e-4)
        assert float(found.unconverged_share) == 1
        assert float(found.diverged_share) == 0


@pytest.mark.parametrize("name", ["anderson", "euler", "heun"])
def test_samples_are_what_they_are_alone(name: str) -> None:
    """Each sample stops when it would alone, however the others fare."""
    scales = torch.logspace(-3, 0, 12, dtype=torch.float64)
    b = some(12, 6) * scales[:, None]
    start = torch.zeros(12, 6, dtype=torch.float64)
    solver = Solver(name, 300, 1e-6)
    together = relax(Bend(b), start, solver, dt=0.2)
    assert bool(together.converged.all())
    assert distinct(together.nfe) > 3
    for row in range(12):
        alone = relax(Bend(b[row : row + 1]), start[:1], solver, dt=0.2)
        assert float(alone.nfe[0]) == float(together.nfe[row])
        torch.testing.assert_close(alone.state[0], together.state[row], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(alone.residual[0], together.residual[row], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_devices_with_a_queue_are_looked_at_less_often_to_the_same_end(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = torch.logspace(-3, 0, 12, dtype=torch.float64)
    b = some(12, 6) * scales[:, None]
    b[5] = math.nan
    start = 3 * some(12, 6, seed=7)
    solver = Solver(name, 300, 1e-6)
    here = relax(Bend(b), start, solver, dt=0.05)
    monkeypatch.setattr(stepping, "queues", lambda device: True)
    there = relax(Bend(b), start, solver, dt=0.05)
    assert torch.equal(there.state, here.state)
    assert torch.equal(there.nfe, here.nfe)
    assert torch.equal(there.status, here.status)
    assert int(there.status[5]) == Status.DIVERGED
    assert here.steps <= there.steps < here.steps + 4


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_that_are_done_are_no_longer_evaluated(name: str) -> None:
    rates = torch.tensor([1.0] * 9 + [0.1])
    a = -rates[:, None, None].double() * torch.eye(4, dtype=torch.float64)
    b = some(10, 4)
    b[9] *= torch.tensor([1.0, 2.0, -3.0, 0.5]).double()
    flow = Affine(a, b)
    found = relax(flow, torch.zeros(10, 4, dtype=torch.float64), Solver(name, 1000, 1e-7), dt=0.5)
    if name != "anderson":  # which solves a single rate in two steps, whatever it is
        assert float(found.nfe[9]) > 3 * float(found.nfe[:9].max())
    assert torch.equal(flow.counts[9:], found.nfe[9:])
    assert bool((flow.counts >= found.nfe).all())
    assert bool((flow.counts[:9] <= found.nfe[:9] + 12).all())
    torch.testing.assert_close(found.state, b / rates[:, None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_diverging_sample_is_frozen_and_disturbs_no_other(name: str) -> None:
    b = some(4, 6)
    b[2] = 0
    start = torch.zeros(4, 6, dtype=torch.float64)
    start[2] = torch.linspace(5, 6, 6)

    class Pit(Bend):
        """A sample without a pull explodes in finite time, too fast for any acceleration."""

        def __call__(self, state: Tensor) -> Tensor:
            lost = (self.b == 0).all(dim=1, keepdim=True)
            return torch.where(lost, state.pow(3), super().__call__(state))

        def rows(self, index: Tensor) -> Bend:
            return Pit(self.b[index])

    solver = Solver(name, 200, 1e-8)
    found = relax(Pit(b), start, solver, dt=0.15)
    C, D = int(Status.CONVERGED), int(Status.DIVERGED)
    assert found.status.tolist() == [C, C, D, C]
    assert float(found.residual[2]) > 1e6
    assert bool(torch.isfinite(found.state).all())
    assert float(found.nfe[2]) < (1000 if name == "dopri5" else 40)
    assert float(found.diverged_share) == 0.25
    assert float(found.unconverged_share) == 0.25
    others = torch.tensor([0, 1, 3])
    alone = relax(Bend(b[others]), start[others], solver, dt=0.15)
    atol = 1e-7 if name == "dopri5" else 1e-12
    torch.testing.assert_close(found.state[others], alone.state, rtol=0, atol=atol)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_that_is_no_number_has_diverged(name: str, bad: float) -> None:
    start = torch.zeros(3, 6, dtype=torch.float64)
    start[1, 2] = bad
    b = some(3, 6)
    found = relax(Bend(b), start, Solver(name, 200, 1e-8), dt=0.15)
    assert found.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    assert float(found.residual[1]) == math.inf
    assert float(found.nfe[1]) == 1


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_linear_explosion_has_diverged(name: str) -> None:
    flow = Decays(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    start = torch.ones(2, 3, dtype=torch.float64)
    found = relax(flow, start, Solver(name, 400, 1e-8), dt=0.5)
    assert found.status.tolist() == [Status.DIVERGED, Status.CONVERGED]
    assert 1e6 < float(found.residual[0]) < 3e6


def test_a_failed_acceleration_is_taken_back() -> None:
    """A wall that only a leap reaches: there the flow is no number."""
    rates = torch.linspace(0.05, 1.0, 6, dtype=torch.float64)

    class Walled(Affine):
        hits = 0

        def __call__(self, state: Tensor) -> Tensor:
            beyond = (state.abs() > 25).any(dim=1, keepdim=True)
            Walled.hits += int(beyond.sum())
            return torch.where(beyond, math.nan, super().__call__(state).tanh())

        def rows(self, index: Tensor) -> Affine:
            part = Walled(self.a, self.b[index], self.counts)
            part.index = self.index[index]
            return part

    b = some(16, 6) / 2
    b[:, 0] = 0.2
    flow = Walled(torch.diag(-rates), b)
    found = relax(flow, 6 * some(16, 6, seed=4), Solver("anderson", 600, 1e-9), dt=0.8)
    assert Walled.hits > 0
    assert bool(found.converged.all())
    torch.testing.assert_close(found.state, b / rates, rtol=0, atol=1e-6)


def test_anderson_among_many_equilibria() -> None:
    """Far from contracting, with saddles all over: plain acceleration solves none of these."""

    class Hopfield(Bend):
        weight = some(20, 20, seed=1)
        weight = 2 * (weight + weight.T) / float(torch.linalg.matrix_norm(weight + weight.T, 2))

        def __call__(self, state: Tensor) -> Tensor:
            return self.b - state + 2 * state.tanh() @ self.weight

        def rows(self, index: Tensor) -> Bend:
            return Hopfield(self.b[index])

    flow = Hopfield(0.3 * some(100, 20, seed=2))
    start = torch.zeros(100, 20, dtype=torch.float64)
    found = relax(flow, start, Solver("anderson", 300, 1e-8), dt=0.3)
    plain = relax(flow, start, Solver("euler", 300, 1e-8), dt=0.3)
    assert float(found.unconverged_share) <= 0.05
    assert float(found.nfe.mean()) < float(plain.nfe.mean())
    settled(found, flow, 1e-8)


@pytest.mark.parametrize("name", SOLVERS)
def test_min_steps(name: str) -> None:
    a, b = stable(True), some(3, SIZE)
    rest = solution(a, b)
    solver = Solver(name, 40, 1e-4)
    at_once = relax(Affine(a, b), rest, solver, dt=0.5)
    assert (at_once.steps, at_once.nfe.tolist()) == (0, [1, 1, 1])
    later = relax(Affine(a, b), rest + 1e-6, solver, dt=0.5, min_steps=8)
    assert later.steps == (2 if name == "dopri5" else 8)
    assert bool(later.converged.all())
    assert float(later.residual.max()) < 0.7 * float(at_once.residual.max() + 1e-6)
    assert bool(relax(Affine(a, b), rest, solver, dt=0.5, min_steps=99).converged.all())


def test_a_tolerance_for_each_sample() -> None:
    flow = Affine(stable(True), some(1, SIZE).repeat(3, 1))
    start = torch.zeros(3, SIZE, dtype=torch.float64)
    bounds = torch.tensor([1e-2, 1e-5, 1e-8], dtype=torch.float64)
    for name in SOLVERS:
        found = relax(flow, start, Solver(name, 300, 1e-1), dt=0.5, tolerance=bounds)
        assert bool((found.residual <= bounds).all())
        assert float(found.residual[0]) > 1e-5
        assert found.nfe[0] < found.nfe[2]


def test_bad_calls_raise() -> None:
    flow, start = Affine(stable(True), some(2, SIZE)), torch.zeros(2, SIZE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(B, S\)"):
        relax(flow, start[0], Solver(), dt=0.5)
    with pytest.raises(ValueError, match="floating"):
        relax(flow, start.long(), Solver(), dt=0.5)
    with pytest.raises(ValueError, match="one a sample"):
        relax(flow, start, Solver(), dt=0.5, tolerance=torch.ones(3))
    memory = recirculating("delay", 1.0).memory(start, 0.5)
    for name in ("anderson", "dopri5"):
        with pytest.raises(ValueError, match="past"):
            relax(flow, start, Solver(name), dt=0.5, memory=memory)
    with pytest.raises(UnknownNameError, match="gaussian"):
        Noise("gausian", 1.0, torch.Generator())


# ---- energy ----


@pytest.mark.parametrize("name", SOLVERS)
def test_energy_falls_along_the_flow_that_descends_it(name: str) -> None:
    flow = Bend(2 * some(6, 5))
    start = some(6, 5, seed=8)
    solver = Solver(name, 300, 1e-5)
    found = relax(flow, start, solver, dt=0.05, energy=flow.energy)
    assert found.energy is not None
    assert found.energy.shape == (found.steps + 1, 6)
    assert torch.equal(found.energy[0], flow.energy(start))
    torch.testing.assert_close(found.energy[-1], flow.energy(found.state), rtol=1e-13, atol=0)
    if name != "anderson":
        change = found.energy.diff(dim=0)
        assert float(change.max()) <= 1e-13 * float(found.energy.abs().max())
        assert float(found.energy[-1].sum()) < float(found.energy[0].sum()) - 1
    assert torch.equal(relax(flow, start, solver, dt=0.05).state, found.state)


# ---- the past ----


def recirculating(
    kind: str, period: float, gamma: float = 0.8, kappa: float = 0.1, damping: float = 1.0
) -> Recirculation:
    dynamics = Dynamics(damping=damping, recirculation=kind, kappa=kappa, time=period)
    return build_recirculation(dynamics, 2, gamma)


class Damped:
    """Tokens ``-lambda h + u``, and two hidden units that follow them."""

    def __init__(self, u: Tensor, damping: float = 1.0) -> None:
        self.u, self.damping = u, damping

    def __call__(self, state: Tensor) -> Tensor:
        h, z = state[:, :4], state[:, 4:]
        return torch.cat([self.u - self.damping * h, h[:, :2] - z], dim=1)

    def rows(self, index: Tensor) -> Damped:
        return Damped(self.u[index], self.damping)


@pytest.mark.parametrize("name", ["auto", "heun"])
@pytest.mark.parametrize("period", [0.1, 0.5, 1, 2, 7.3, 16])
@pytest.mark.parametrize("kind", ["delay", "fade"])
def test_the_past_leads_to_the_equilibrium_of_lambda_eff(
    kind: str, period: float, name: str
) -> None:
    found = recirculating(kind, period)
    u = some(6, 4)
    u *= torch.logspace(-2, 1, 6, dtype=torch.float64)[:, None]
    start = torch.cat([2 * u, torch.zeros(6, 2, dtype=torch.float64)], dim=1)
    memory = found.memory(start[:, :4], 0.4)
    result = relax(Damped(u), start, Solver(name, 3000, 1e-7), dt=0.4, memory=memory)
    assert result.time_step == pytest.approx(period / math.ceil(period / 0.4))
    assert bool(result.converged.all())
    damping = 1.0 - (
        0.8 * math.exp(-0.1 * period) if kind == "delay" else 0.8 * -math.expm1(-0.1 * period)
    )
    expected = u / damping
    torch.testing.assert_close(result.state[:, :4], expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(result.state[:, 4:], expected[:, :2], rtol=0, atol=3e-6)
    assert distinct(result.nfe) > 1  # samples were taken out along the way


def test_a_delay_does_not_settle_before_the_past_has_arrived() -> None:
    """Until T the delayed tokens are the start's, and the flow all but vanishes off equilibrium."""
    found = recirculating("delay", 16.0)
    u = some(2, 4)
    start = torch.zeros(2, 6, dtype=torch.float64)
    memory = found.memory(start[:, :4], 0.4)
    result = relax(Damped(u), start, Solver("euler", 39, 1e-3), dt=0.4, memory=memory)
    assert not bool(result.converged.any())
    assert float(result.residual.min()) > 1e-2


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_gain_settles_on_the_orbit_of_a_long_fine_integration(name: str) -> None:
    gamma, kappa, period = 0.8, 0.6, 3.0
    u = some(5, 4) * torch.logspace(-3, 1, 5, dtype=torch.float64)[:, None]
    start = torch.zeros(5, 6, dtype=torch.float64)

    def run(dt: float, method: str) -> Equilibrium:
        memory = recirculating("gain", period, gamma, kappa).memory(start[:, :4], dt)
        solver = Solver(method, 200_000, 1e-7)
        return relax(Damped(u), start, solver, dt=dt, memory=memory)

    found = run(0.05, name)
    assert found.orbit is not None
    assert found.orbit.shape == (61, 5, 6)
    assert bool(found.converged.all())
    assert found.steps % 61 == 0
    assert distinct(found.nfe) > 1
    torch.testing.assert_close(found.orbit[0], found.state, rtol=0, atol=1e-6)
    assert float((found.orbit[30] - found.orbit[0]).abs().max()) > 0.1
    # h' = u - (1 - gamma e^(-kappa s)) h, solved by the same period over and over, finely.
    h, fine = start[:, :4].clone(), period / 610
    samples: list[Tensor] = []
    for turn in range(12):
        for step in range(610):
            if turn == 11 and step % 10 == 0:
                samples.append(h)
            s = step * fine
            middle = 1 - gamma * math.exp(-kappa * (s + fine / 2))
            h = h + fine * (u - middle * (h + 0.5 * fine * (u - middle * h)))
    exact = torch.stack(samples)
    worst = (found.orbit[:, :, :4] - exact).abs().amax(dim=(0, 2))
    error = float((worst / exact.abs().amax(dim=(0, 2))).max())  # of each sample's own size
    assert error < (0.03 if name == "euler" else 0.001)


def test_an_orbit_beside_samples_that_never_start() -> None:
    u, start = some(6, 4), torch.zeros(6, 6, dtype=torch.float64)
    start[[0, 2, 5], 1] = math.nan
    sound = torch.tensor([1, 3, 4])

    def run(rows: Tensor) -> Equilibrium:
        memory = recirculating("gain", 3.0).memory(start[rows, :4], 0.5)
        return relax(Damped(u[rows]), start[rows], Solver("euler", 600), dt=0.5, memory=memory)

    mixed, alone = run(torch.arange(6)), run(sound)
    assert mixed.orbit is not None
    assert alone.orbit is not None
    assert torch.equal(mixed.orbit[:, sound], alone.orbit)
    assert mixed.status.tolist() == [2, 0, 2, 0, 0, 2]
    assert mixed.nfe.tolist()[0] == 1


def test_an_orbit_takes_whole_periods() -> None:
    start = torch.zeros(2, 6, dtype=torch.float64)
    for steps, taken in ((3, 7), (7, 7), (17, 14)):
        memory = recirculating("gain", 3.0).memory(start[:, :4], 0.5)
        solver = Solver("euler", steps, 1e-12)
        found = relax(Damped(some(2, 4)), start, solver, dt=0.5, memory=memory)
        assert found.steps == taken
        assert found.status.tolist() == [Status.UNCONVERGED] * 2


# ---- unrolling ----


@pytest.mark.parametrize("kind", ["none", "delay", "fade", "gain"])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_unrolling_takes_the_very_same_steps(name: str, kind: str) -> None:
    u, start = some(3, 4), some(3, 6, seed=2)
    solver = Solver(name, 36, 1e-14)

    def memory() -> object:
        if kind == "none":
            return None
        return recirculating(kind, 2.0).memory(start[:, :4], 0.25)

    relaxed = relax(Damped(u), start, solver, dt=0.25, memory=memory())  # type: ignore[arg-type]
    state, steps, orbit = unroll(
        Damped(u.requires_grad_()),
        start,
        solver,
        dt=0.25,
        memory=memory(),  # type: ignore[arg-type]
    )
    assert steps == relaxed.steps
    assert torch.equal(state, relaxed.state)
    assert state.requires_grad
    assert (orbit is None) == (kind != "gain")
    if orbit is not None:
        assert relaxed.orbit is not None
        assert torch.equal(orbit, relaxed.orbit)
        assert orbit.requires_grad


def test_unrolling_stops_by_the_same_rule() -> None:
    b = some(12, 6) * torch.logspace(-3, 0, 12, dtype=torch.float64)[:, None]
    start = torch.zeros(12, 6, dtype=torch.float64)
    solver = Solver("euler", 300, 1e-6)
    relaxed = relax(Bend(b), start, solver, dt=0.2)
    state, steps, _ = unroll(Bend(b), start, solver, dt=0.2)
    assert steps == relaxed.steps < 300
    assert torch.equal(state, relaxed.state)
    other, _, _ = unroll(Bend(b), start, Solver("anderson", 300, 1e-6), dt=0.2)
    assert torch.equal(other, state)


@pytest.mark.parametrize("kind", ["none", "delay", "fade", "gain"])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_unrolling_is_differentiable(name: str, kind: str) -> None:
    def run(u: Tensor, start: Tensor) -> Tensor:
        memory = None
        if kind != "none":
            memory = recirculating(kind, 0.9).memory(start[:, :4], 0.3)
        solver = Solver(name, 6, 1e-14)
        flow = Damped(u)
        state, _, orbit = unroll(flow, start, solver, dt=0.3, memory=memory)
        return state if orbit is None else orbit.mean(dim=0) + state

    inputs = (some(2, 4).requires_grad_(), some(2, 6, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)


# ---- noise ----


def noise(kind: str, level: float, seed: int = 0) -> Noise:
    return Noise(kind, level, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_noise_of_level_zero_is_none(kind: str) -> None:
    flow, start = Bend(some(3, 6)), torch.zeros(3, 6, dtype=torch.float64)
    plain = relax(flow, start, Solver("euler", 50, 1e-14), dt=0.2)
    for name in ("auto", "euler", "heun", "anderson", "dopri5"):
        quiet = relax(flow, start, Solver(name, 50, 1e-6), dt=0.2, noise=noise(kind, 0.0))
        assert quiet.steps == 50
        assert torch.equal(quiet.state, plain.state)
        assert bool(quiet.converged.all())  # says the residual of the last state


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_noise_is_reproducible(kind: str) -> None:
    flow, start = Bend(some(3, 6)), torch.zeros(3, 6, dtype=torch.float64)
    solver = Solver("auto", 20, 1e-6)
    runs = [
        relax(flow, start, solver, dt=0.2, noise=noise(kind, 0.3, seed)).state for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    state, steps, _ = unroll(flow, start, solver, dt=0.2, noise=noise(kind, 0.3, 1))
    assert steps == 20
    assert torch.equal(state, runs[0])


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_moments_of_one_kick(kind: str) -> None:
    state = torch.tensor([[-1.0, 0.5, 4.0]], dtype=torch.float64).repeat(200_000, 1)
    level, dt = 0.5, 0.3
    kick = noise(kind, level).kick(state, dt)
    rate = smooth_relu(state[0]) if kind == "poisson" else torch.ones(3, dtype=torch.float64)
    variance = level**2 * dt * rate
    within = 5 * variance.sqrt() / 200_000**0.5
    assert bool((kick.mean(dim=0).abs() < within).all())
    torch.testing.assert_close(kick.var(dim=0), variance, rtol=0.03, atol=0)


def test_gaussian_noise_reaches_its_stationary_variance() -> None:
    """s <- (1 - dt) s + level sqrt(dt) xi has variance level^2 dt / (1 - (1 - dt)^2)."""
    dt, level = 0.2, 0.4
    flow = Decays(torch.ones(2000, dtype=torch.float64))
    start = torch.zeros(2000, 10, dtype=torch.float64)
    found = relax(flow, start, Solver("euler", 40), dt=dt, noise=noise("gaussian", level))
    expected = level**2 * dt / (1 - (1 - dt) ** 2)
    assert float(found.state.var()) == pytest.approx(expected, rel=0.05)
    assert float(found.unconverged_share) == 1
    residual = found.state.square().mean(dim=1).sqrt()  # of the flow without noise
    torch.testing.assert_close(found.residual, residual)


def test_noise_with_a_diverging_sample() -> None:
    flow = Decays(torch.tensor([1.0, -9.0, 1.0], dtype=torch.float64))
    start = torch.ones(3, 6, dtype=torch.float64)
    found = relax(flow, start, Solver("euler", 60), dt=0.5, noise=noise("poisson", 0.1))
    assert found.status.tolist()[1] == Status.DIVERGED
    calm = Decays(torch.ones(3, dtype=torch.float64))
    other = relax(calm, start, Solver("euler", 0 + 60), dt=0.5, noise=noise("gaussian", 0.1))
    assert bool(torch.isfinite(other.state).all())
    assert bool(torch.isfinite(found.state).all())
