"""The benchmark of TCEP measures what it says; how fast anything is, is not tested."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from tests.tables import text
from tests.tcep_reference import energy, implicit_gradient, ring_kernel, solve_equilibrium
from topotune.bench.shared import alternate, median_and_spread
from topotune.bench.tcep import accuracy as tcep_accuracy
from topotune.bench.tcep import gradients as tcep_gradients
from topotune.bench.tcep import memory as tcep_memory
from topotune.bench.tcep import run as bench
from topotune.bench.tcep import solvers as tcep_solvers
from topotune.bench.tcep.gradients import CASES, GradientError, Precision
from topotune.bench.tcep.memory import GradientCost, SavedBytes
from topotune.bench.tcep.setup import BATCH, Data, Training, build, load
from topotune.cli.main import app
from topotune.data.splits import TensorPair
from topotune.errors import ConfigError, InterruptError, UnknownNameError
from topotune.tcep import probe
from topotune.tcep.energy import EnergyField
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Dynamics
from topotune.tcep.probe import resolve

CPU = torch.device("cpu")
MEASURED = ("energy", "energy, shift, corrected", "energy, shift, uncorrected")


@pytest.fixture(scope="module")
def data() -> Data:
    return load("digits_rolled", CPU)


@pytest.fixture(scope="module")
def measured(data: Data) -> tuple[list[GradientError], list[Training]]:
    return tcep_gradients.run(
        data,
        cases=[case for case in CASES if case.name in MEASURED],
        betas=(0.1, 0.5),
        precisions=(Precision("float64", 1e-9),),
        train_steps=8,
    )


def test_one_gradient_a_combination(
    measured: tuple[list[GradientError], list[Training]],
) -> None:
    records, trainings = measured
    keys = [(r.case, r.net, r.nudge, r.beta) for r in records]
    assert sorted(keys) == sorted(
        itertools.product(
            MEASURED, ("initialised", "trained"), ("symmetric", "one_sided"), (0.1, 0.5)
        )
    )
    assert [training.network for training in trainings] == ["energy", "shift"]
    for training in trainings:
        assert (training.steps, training.batch) == (8, BATCH)
        assert training.loss_last < training.loss_first
        assert training.parameters_moved == training.parameters == 10


def test_gradients_are_as_exact_as_claimed(
    measured: tuple[list[GradientError], list[Training]],
) -> None:
    found = {(r.case, r.net, r.nudge, r.beta): r for r in measured[0]}
    for record in measured[0]:
        assert record.zero_tensors == 0, record
        assert record.unconverged_share == 0.0, record
        assert record.smallest_cosine <= record.cosine + 1e-12
    for net in ("initialised", "trained"):
        for case in ("energy", "energy, shift, corrected"):
            best = found[case, net, "symmetric", 0.1]
            assert best.cosine > 0.99999
            assert best.smallest_cosine > 0.99999
            assert best.relative_error < 1e-3
            assert best.relative_error < found[case, net, "symmetric", 0.5].relative_error
            assert best.relative_error < found[case, net, "one_sided", 0.1].relative_error
        left_out = found["energy, shift, uncorrected", net, "symmetric", 0.1]
        assert left_out.relative_error > 10 * best.relative_error
        assert left_out.smallest_cosine < 0.999


def _tiny() -> tuple[TCEPNetwork, Tensor, Tensor]:
    torch.manual_seed(3)
    network = TCEPNetwork(
        in_channels=1,
        image_size=3,
        classes=3,
        width=4,
        heads=2,
        hidden=5,
        memory=6,
        dynamics=Dynamics(recirculation="ring", gamma=0.3, period=3),
    )
    return network.double(), torch.randn(2, 1, 3, 3).double(), torch.tensor([0, 2])


def test_what_is_exact_here_agrees_with_dense_algebra() -> None:
    """The oracle of the table against Newton's method and a dense solve of the written-out energy,
    sample by sample."""
    network, inputs, targets = _tiny()
    field = network.field
    assert isinstance(field, EnergyField)
    kernel = ring_kernel(field.tokens, 3, network.recirculation.kappa)
    parameters = list(network.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for image, target in zip(inputs, targets, strict=True):

        def flow(state: Tensor, image: Tensor = image) -> Tensor:
            with torch.enable_grad():
                point = state if state.requires_grad else state.detach().requires_grad_()
                (h,), (z,) = field.split(point)
                u = network.drive(image[None])[0]
                value = energy(field, h, z, u, 1.0, network.recirculation.gamma, kernel)
                return -torch.autograd.grad(value, point, create_graph=True)[0]

        def cost(state: Tensor, target: Tensor = target) -> Tensor:
            return functional.cross_entropy(network.logits(state), target[None])

        start = field.initial(network.drive(image[None])).detach()
        state = solve_equilibrium(flow, start)
        for sum_, part in zip(total, implicit_gradient(flow, cost, state, parameters), strict=True):
            sum_ += part / len(inputs)
    dense = torch.cat([part.flatten() for part in total])
    exact = probe.exact_gradient(network, inputs, targets)
    assert float((exact - dense).norm() / dense.norm()) < 1e-8


def test_the_oracle_of_the_orbit_is_exact_where_the_orbit_is_a_point(data: Data) -> None:
    """Without decay, ``gain`` is a constant: it has an equilibrium, and an implicit gradient."""
    still = Dynamics(recirculation="gain", gamma=0.3, kappa=0.0, time=1.0)
    network = build(data, still)
    batch = data.batch.rows(0, 4)
    through_steps = tcep_gradients.exact_gradient(network, batch)
    implicit = probe.exact_gradient(network, batch.inputs, batch.targets)
    assert float((through_steps - implicit).norm() / implicit.norm()) < 1e-6


def test_saved_bytes_count_a_storage_once_and_forget_it() -> None:
    weight = torch.randn(100, dtype=torch.float64, requires_grad=True)
    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    with SavedBytes([weight]) as saved:
        squared = x * x  # x, twice
        assert saved.peak == 800
        grown = (squared * weight).exp()  # squared; the result of exp; weight does not count
        assert saved.peak == 2400
        grown.sum().backward()  # type: ignore[no-untyped-call]
        del squared, grown
        assert saved.now == 0
        x.sin().sum().backward()  # type: ignore[no-untyped-call]
    assert saved.peak == 2400
    assert saved.now == 0


@pytest.fixture(scope="module")
def costs(data: Data) -> list[GradientCost]:
    return tcep_memory.run(data, gradients=("eqprop", "implicit", "bptt"), steps=(3, 24), rounds=2)


def test_memory_of_eqprop_is_constant_and_that_of_bptt_grows(costs: list[GradientCost]) -> None:
    saved: dict[tuple[str, int], int] = {}
    for cost in costs:
        assert cost.saved_bytes is not None
        assert not cost.failure
        saved[cost.gradient, cost.steps] = cost.saved_bytes
    assert len(saved) == 6
    for constant in ("eqprop", "implicit"):
        assert saved[constant, 24] == pytest.approx(saved[constant, 3], rel=0.02)
    assert saved["bptt", 24] / saved["bptt", 3] == pytest.approx(8, rel=0.1)
    assert saved["bptt", 24] > 5 * saved["eqprop", 24]


def test_every_phase_makes_the_steps_that_are_asked_for(costs: list[GradientCost]) -> None:
    for cost in costs:
        # One evaluation more than steps: the residual after the last.
        assert cost.evaluations_free in (cost.steps, cost.steps + 1)
        if cost.gradient == "bptt":
            assert cost.evaluations_second is None
            assert cost.vs_bptt == 1.0
        else:
            assert cost.evaluations_second in (cost.steps, cost.steps + 1)


def test_a_gradient_that_diverges_is_named_and_not_timed(data: Data) -> None:
    huge = Data("huge", TensorPair(1e38 * data.train.inputs, data.train.targets), data.classes)
    (cost,) = tcep_memory.run(huge, gradients=("bptt",), steps=(2,), rounds=2)
    assert cost.failure == tcep_memory.DIVERGED
    assert cost.milliseconds is None
    assert cost.saved_bytes is None


def test_solvers_reach_the_residual(data: Data) -> None:
    found, trainings = tcep_solvers.run(
        data,
        solvers=("anderson", "euler"),
        tolerances=(1e-3, 1e-5),
        dampings=(1.0,),
        rounds=2,
        train_steps=3,
    )
    assert len(found) == 8
    assert [training.network for training in trainings] == ["lambda 1"]
    taken = {(r.net, r.solver, r.tolerance): r for r in found}
    for record in found:
        assert record.converged_share == 1.0
        assert 1 <= record.evaluations_mean <= record.evaluations_max
        assert 0.0 < record.gamma < 1.0
    for net in ("initialised", "trained"):
        loose, tight = (taken[net, "euler", tolerance] for tolerance in (1e-3, 1e-5))
        assert loose.evaluations_mean < tight.evaluations_mean
        fast = taken[net, "anderson", 1e-5]
        assert fast.evaluations_mean < tight.evaluations_mean


def test_accuracy_trains_and_tests_every_row() -> None:
    rows = ("eqprop", "head only", "MLP 256, Adam")
    small = {"width": 8, "heads": 2, "hidden": 16, "memory": 8}
    found = tcep_accuracy.run(rows=rows, seeds=1, epochs=1, network=small)
    assert [record.row for record in found] == list(rows)
    for record in found:
        assert record.outcomes == ("COMPLETE",)
        assert record.val == (record.val_mean,)
        assert record.test == (record.test_mean,)
        assert record.val_mean is not None
        assert 0.0 < record.val_mean < 1.0
        assert (record.unconverged_share is None) == record.row.startswith("MLP")
    assert found[0].parameters["gradient"] == "eqprop"
    assert found[2].val_mean != found[0].val_mean


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def contender(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    seconds = alternate({name: contender(name) for name in "abc"}, 3, CPU)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert median_and_spread([1.0, 100.0, 3.0, 2.0, 4.0]) == (3.0, 2.0)


def test_networks_come_from_their_seed_alone(data: Data) -> None:
    state = torch.get_rng_state()
    first, second, other = (build(data, Dynamics(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.position, second.position)
    assert not torch.equal(first.position, other.position)
    twin = resolve(first, torch.float64, name="heun", steps=7)
    assert (twin.dynamics.solver.name, twin.dynamics.solver.steps) == ("heun", 7)
    assert twin.position.dtype == torch.float64
    assert first.dynamics.solver.name == "auto"
    assert first.position.dtype == torch.float32


def test_random_data_need_no_data_set() -> None:
    data = load("random", CPU)
    assert data.batch.inputs.shape == (BATCH, 1, 8, 8)
    assert float(data.train.inputs.std()) == pytest.approx(1.0, abs=0.01)
    assert set(data.train.targets.tolist()) == set(range(data.classes))


def test_the_command_prints_json_and_tables() -> None:
    threads = torch.get_num_threads()
    options = ["--part", "memory", "--steps", "1", "--rounds", "2", "--data", "random"]
    done = CliRunner().invoke(app, ["bench", "tcep", *options, "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert {record["gradient"] for record in report["memory"]} == set(tcep_memory.GRADIENTS)
    assert report["data"] == "random"
    assert report["gradients"] == report["solvers"] == report["accuracy"] == []
    shown = CliRunner().invoke(app, ["bench", "tcep", *options], catch_exceptions=False).stdout
    assert shown.startswith("cpu (")
    for gradient in tcep_memory.GRADIENTS:
        assert gradient in shown
    assert torch.get_num_threads() == threads


def test_a_part_is_printed_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second part fails; what the first one measured has been shown by then."""

    def fails(*given: object, **named: object) -> None:
        assert "eqprop" in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(tcep_solvers, "run", fails)
    options = ["--part", "memory", "--part", "solvers", "--steps", "1", "--rounds", "2"]
    with pytest.raises(InterruptError):
        app(["bench", "tcep", *options, "--data", "random"], standalone_mode=False)


def test_tables_show_every_record(
    measured: tuple[list[GradientError], list[Training]],
) -> None:
    failed = GradientCost("adjoint", 1000, failure="states explode")
    records: bench.Records = {
        "trainings": measured[1],
        "gradients": measured[0],
        "memory": [failed],
    }
    shown = text(*bench.tables(records))
    for name in MEASURED:
        assert shown.count(f"│ {name} ") >= 4  # two nets, two nudges
    best = next(r for r in measured[0] if r.nudge == "one_sided" and r.beta == 0.5)
    assert f"{best.cosine:.7f}" in shown
    assert "states explode" in shown
    plain = json.loads(json.dumps(bench.plain(bench.Options(), [records]), allow_nan=False))
    assert plain["memory"][0]["saved_bytes"] is None
    assert len(plain["gradients"]) == len(measured[0])


def test_bad_input_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'memory'"):
        bench.Options(parts=("memroy",))
    with pytest.raises(ConfigError, match=r"rounds: must be >= 2 \(got 1\)"):
        bench.Options(rounds=1)
    with pytest.raises(ConfigError, match=r"steps: must be >= 1 \(got 0\)"):
        bench.Options(steps=(10, 0))
    with pytest.raises(UnknownNameError, match="quadratic"):
        load("quadratic", CPU)
    with pytest.raises(UnknownNameError, match="cifar10"):
        tcep_accuracy.run("cifar10")
    with pytest.raises(ConfigError, match=r"seeds: must be >= 1 \(got 0\)"):
        tcep_accuracy.run(seeds=0)
    assert bench.Options(parts=("all",)).parts == bench.PARTS
