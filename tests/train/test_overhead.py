"""The overhead measurement: what it returns, and that it leaves no trace."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from tests.train_cases import Blobs, assert_same, blobs_spec
from topotune.data.splits import TensorPair
from topotune.records import OverheadOptions
from topotune.tasks.base import DataOptions
from topotune.train import overhead
from topotune.train.learner import Backprop, BatchResult, Learner
from topotune.train.method import Contender, OptimizerMethod
from topotune.train.overhead import measure_overhead
from topotune.train.process import capture_generators

CPU = torch.device("cpu")


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def _measure(
    options: OverheadOptions,
    build: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = _adam,
    model: nn.Module | None = None,
    make_learner: Callable[[], Learner] | None = None,
) -> dict[str, float]:
    task = Blobs()
    batch = task.splits(DataOptions()).train.rows(0, 16)
    learner = make_learner or (lambda: Backprop(task))
    others = OptimizerMethod(blobs_spec()).contenders(task, batch, CPU)
    if make_learner is not None:
        others = {name: Contender(other.optimizer, learner) for name, other in others.items()}
    return measure_overhead(
        model or task.model(None, {}), batch, Contender(build, learner), others, options
    )


def test_no_blocks_measure_nothing() -> None:
    def never(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        raise AssertionError("built although nothing is measured")

    assert _measure(OverheadOptions(blocks=0), never) == {}


def test_everything_is_left_as_it_was() -> None:
    task = Blobs()
    model = task.model(None, {})
    optimizer = _adam(model.parameters())
    rows = task.splits(DataOptions()).train.rows(0, 16)
    Backprop(task).gradients(model, rows)
    optimizer.step()
    model.eval()
    gradients = [p.grad for p in model.parameters()]
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), gradients))
    generators = capture_generators(CPU)

    measured = _measure(OverheadOptions(blocks=3, steps=2, warmup=1), model=model)

    assert measured["overhead_blocks"] == 3.0
    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    assert_same(after, before)
    assert not model.training
    assert_same(capture_generators(CPU), generators)
    assert gc.isenabled()


def test_the_generators_are_put_back_when_the_measurement_fails() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            torch.rand(1)
            raise RuntimeError("no step today")

    model = Blobs().model(None, {})
    generators = capture_generators(CPU)
    with pytest.raises(RuntimeError, match="no step today"):
        _measure(OverheadOptions(), lambda parameters: Broken(parameters, lr=0.1), model)
    assert_same(capture_generators(CPU), generators)
    assert gc.isenabled()


def test_every_contender_takes_full_steps_in_rotating_order() -> None:
    log: list[tuple[int, str]] = []

    class Logging(Backprop):
        """Knows its contender by the order in which learners were asked for."""

        def __init__(self, number: int) -> None:
            super().__init__(Blobs())
            self.number = number

        def gradients(self, model: nn.Module, batch: TensorPair) -> BatchResult:
            assert model.training
            assert len(batch) == 16
            assert all(p.grad is None for p in model.parameters())
            log.append((self.number, "gradients"))
            return super().gradients(model, batch)

        def after_step(self, model: nn.Module) -> None:
            log.append((self.number, "after"))

    class LoggingSGD(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            log.append((2, "step"))
            return super().step(closure)

    numbers = iter(range(3))
    measured = _measure(
        OverheadOptions(blocks=3, steps=2, warmup=1),
        lambda parameters: LoggingSGD(parameters, lr=0.1),
        make_learner=lambda: Logging(next(numbers)),
    )
    order = [number for number, what in log if what == "gradients"]
    warmup, rounds = order[:3], order[3:]
    assert warmup == [0, 1, 2]
    assert rounds == [0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 0, 0, 2, 2, 0, 0, 1, 1]
    assert [what for number, what in log if number == 2] == ["gradients", "step", "after"] * 7
    assert sum(what == "after" for _, what in log) == 21
    assert all(value > 0 for value in measured.values())


def test_the_ratio_is_the_median_of_ratios_within_a_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Seconds a block: the machine doubles its load in round 2, the trial's optimizer stumbles in
    # round 4; rows are rounds, columns are the fastest Adam, the default Adam, the trial's.
    table = [[2.0, 4.0, 3.0], [4.0, 8.0, 6.0], [2.0, 4.0, 3.2], [2.0, 4.0, 9.0], [2.0, 4.0, 2.8]]
    turns = [row[(i + turn) % 3] for i, row in enumerate(table) for turn in range(3)]
    ticks: list[float] = []
    for seconds in turns:
        ticks += [0.0, seconds]
    clock = iter(ticks)
    monkeypatch.setattr("topotune.train.overhead._clock", lambda device: lambda: next(clock))
    measured = _measure(OverheadOptions(blocks=5, steps=2, warmup=0))
    # Ratios 1.5 1.5 1.6 4.5 1.4 over the fastest, half of that over the default.
    assert measured == pytest.approx(
        {
            "overhead_vs_adam": 1.5,
            "overhead_vs_adam_iqr": 0.1,
            "overhead_vs_adam_default": 0.75,
            "overhead_vs_adam_default_iqr": 0.05,
            "overhead_blocks": 5.0,
            "adam_step_ms": 1000.0,
        }
    )


def test_an_optimizer_that_overflows_is_still_measured() -> None:
    measured = _measure(
        OverheadOptions(blocks=2, steps=3, warmup=0),
        lambda parameters: torch.optim.SGD(parameters, lr=1e30),
    )
    assert measured["overhead_vs_adam"] > 0


@pytest.mark.parametrize(("threads", "clock"), [(1, time.thread_time), (2, time.perf_counter)])
def test_a_single_cpu_thread_is_timed_by_its_own_clock(threads: int, clock: object) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert overhead._clock(CPU) is clock
    finally:
        torch.set_num_threads(before)
    assert overhead._clock(torch.device("cuda")) is time.perf_counter
