"""The loop on a problem whose every step can be written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train_cases import Line
from topotune.data.splits import TensorPair
from topotune.errors import ConfigError
from topotune.optim import TopologicalAdam
from topotune.records import EpochReport, TrainOptions
from topotune.tasks.base import DataOptions
from topotune.train import evaluation
from topotune.train import loop as loop_module
from topotune.train.evaluation import evaluate
from topotune.train.learner import Backprop, BatchResult, Learner, check_optimizer
from topotune.train.loop import TIMING_METRICS, LoopParts, TrainingLoop
from topotune.train.measures import loss_roughness


def _parts(task: Line, lr: float, learner: Learner | None = None) -> LoopParts:
    model = task.model(None, {})
    splits = task.splits(DataOptions())
    return LoopParts(
        task=task,
        model=model,
        learner=learner or Backprop(task),
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        train=splits.train,
        val=splits.val,
        device=torch.device("cpu"),
    )


def _train(
    parts: LoopParts, epochs: int = 1, seed: int = 0, **options: Any
) -> tuple[TrainingLoop, list[EpochReport]]:
    loop = TrainingLoop(parts, TrainOptions(**{"batch_size": 2, **options}), epochs, seed)
    return loop, list(loop.run())


def test_one_epoch_is_every_example_once_and_the_last_batch_is_kept() -> None:
    task = Line(rows=5)
    loop, reports = _train(_parts(task, 1e-3), epochs=2)
    assert [len(b) for b in task.batches] == [2, 2, 1] * 2
    first = [x for batch in task.batches[:3] for x in batch]
    second = [x for batch in task.batches[3:] for x in batch]
    assert sorted(first) == sorted(second) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert first != second
    assert [(r.epoch, r.step) for r in reports] == [(1, 3), (2, 6)]
    assert (loop.epoch, loop.step, loop.steps_per_epoch) == (2, 6, 3)


def test_the_order_depends_on_the_seed_alone() -> None:
    orders: list[list[list[float]]] = []
    for seed in (0, 0, 1):
        task = Line(rows=20)
        torch.manual_seed(len(orders))  # the global generator has no say
        _train(_parts(task, 1e-3), seed=seed)
        orders.append(task.batches)
    assert orders[0] == orders[1] != orders[2]


def test_every_metric_against_the_recursion_written_out() -> None:
    task = Line(rows=5)
    loop, (report,) = _train(_parts(task, 0.01))
    weight, losses, norms, errors = 0.0, [], [], []
    for batch in task.batches:
        x = np.asarray(batch)
        losses.append(float(np.mean((2 - weight) ** 2 * x**2)))
        errors.append(float(np.mean(np.abs(2 - weight) * x)))
        gradient = 2 * (weight - 2) * float(np.mean(x**2))
        norms.append(abs(gradient))
        weight -= 0.01 * gradient
    sizes = [2, 2, 1]
    expected = {
        "train_loss": np.average(losses, weights=sizes),
        "train_error": np.average(errors, weights=sizes),
        "val_loss": (2 - weight) ** 2 * 11.0,
        "val_error": abs(2 - weight) * 3.0,
        "learning_rate": 0.01,
        "grad_norm": np.mean(norms),
        "grad_spikes": 0.0,
        "loss_roughness": loss_roughness(losses),
    }
    assert report.metrics.keys() == expected.keys() | TIMING_METRICS
    for name, value in expected.items():
        assert report.metrics[name] == pytest.approx(value, rel=1e-5), name
    assert all(report.metrics[name] > 0 for name in TIMING_METRICS)
    columns = loop.trace.columns()
    assert columns["step"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(columns["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(columns["grad_norm"], norms, rtol=1e-5)


def test_blocks_of_a_long_epoch_join_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for every in (1, 7, 1000):
        monkeypatch.setattr(loop_module, "CHECK_EVERY", every)
        loop, (report,) = _train(_parts(Line(rows=41), 1e-5))
        assert loop.trace.columns()["step"].tolist() == list(range(1, 22))
        metrics = {k: v for k, v in report.metrics.items() if k not in TIMING_METRICS}
        results.append((metrics, loop.trace.columns()["loss"].tolist()))
    for metrics, losses in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-12)
        assert losses == results[0][1]


def test_clipping_bounds_the_step_and_not_the_reported_norm() -> None:
    task = Line(rows=4)
    parts = _parts(task, 1.0)
    _, (report,) = _train(parts, grad_clip=0.25)
    assert isinstance(parts.model, nn.Linear)
    assert parts.model.weight.item() == pytest.approx(0.5, rel=1e-5)  # two steps of 0.25
    assert report.metrics["grad_norm"] > 10


def test_the_schedule_runs_over_the_whole_budget() -> None:
    _, reports = _train(_parts(Line(rows=4), 0.008), epochs=4, schedule="linear")
    rates = [r.metrics["learning_rate"] for r in reports]
    assert rates == pytest.approx([0.007, 0.005, 0.003, 0.001])  # last of two steps an epoch


def test_spikes_are_judged_across_epochs_and_the_window_is_state() -> None:
    class Spiky(Learner):
        """A gradient of 1, but 50 in the 12th, 15th and 23rd step."""

        def __init__(self, done: int = 0) -> None:
            self.calls = done

        def gradients(self, model: nn.Module, batch: TensorPair) -> BatchResult:
            self.calls += 1
            for parameter in model.parameters():
                size = 50.0 if self.calls in (12, 15, 23) else 1.0
                parameter.grad = torch.full_like(parameter, size)
            return BatchResult(torch.ones(()), batch.targets)

    options, rows = TrainOptions(batch_size=1), 8  # epochs of 8 steps
    loop = TrainingLoop(_parts(Line(rows), 1e-3, Spiky()), options, 3, 0)
    assert [r.metrics["grad_spikes"] for r in loop.run()] == [0.0, 2.0, 1.0]

    first = TrainingLoop(_parts(Line(rows), 1e-3, Spiky()), options, 3, 0)
    next(first.run())
    second = TrainingLoop(_parts(Line(rows), 1e-3, Spiky(done=8)), options, 3, 0)
    second.load_state_dict(first.state_dict())
    assert [r.metrics["grad_spikes"] for r in second.run()] == [2.0, 1.0]


def test_a_state_of_another_kind_of_device_restarts_augmentation_only() -> None:
    loop, _ = _train(_parts(Line(rows=5), 1e-3), epochs=2)
    state = loop.state_dict()
    same = TrainingLoop(_parts(Line(rows=5), 1e-3), TrainOptions(), 3, 0)
    same.load_state_dict(state)
    moved = TrainingLoop(_parts(Line(rows=5), 1e-3), TrainOptions(), 3, 0)
    moved.load_state_dict({**state, "device": "cuda", "augment": torch.zeros(3)})
    assert torch.equal(same.state_dict()["order"], moved.state_dict()["order"])
    assert (moved.epoch, moved.step) == (2, 6)
    assert not torch.equal(same.state_dict()["augment"], moved.state_dict()["augment"])


def test_a_learners_own_metrics_are_asked_for_once_an_epoch() -> None:
    class Counting(Backprop):
        calls = 0

        def gradients(self, model: nn.Module, batch: TensorPair) -> BatchResult:
            self.calls += 1
            return super().gradients(model, batch)

        def metrics(self, model: nn.Module) -> dict[str, float]:
            assert model.training
            counted, self.calls = self.calls, 0
            return {"learner_batches": float(counted)}

    task = Line(rows=5)
    _, reports = _train(_parts(task, 1e-3, Counting(task)), epochs=2)
    assert [r.metrics["learner_batches"] for r in reports] == [3.0, 3.0]


class _Choosy(Backprop):
    """Learns nothing of the batches whose turns are named."""

    def __init__(self, task: Line, refused: set[int]) -> None:
        super().__init__(task)
        self.refused, self.turn, self.after = refused, 0, 0

    def gradients(self, model: nn.Module, batch: TensorPair) -> BatchResult:
        self.turn += 1
        if self.turn not in self.refused:
            return super().gradients(model, batch)
        with torch.no_grad():
            outputs = model(batch.inputs)
            return BatchResult(self._task.loss(outputs, batch.targets), outputs)

    def after_step(self, model: nn.Module) -> None:
        self.after += 1


@pytest.mark.parametrize("clip", [None, 10.0])
def test_a_batch_without_gradients_takes_no_step(clip: float | None) -> None:
    """The optimizer counts, traces and moves as if the batch had never been."""
    task = Line(rows=10)
    learner = _Choosy(task, refused={2, 5})
    parts = _parts(task, 0.1, learner)
    optimizer = TopologicalAdam(parts.model.parameters(), lr=0.1)
    parts = dataclasses.replace(parts, optimizer=optimizer)
    loop, (report,) = _train(parts, grad_clip=clip)
    assert loop.step == 5
    assert learner.after == 3
    (weight,) = parts.model.parameters()
    assert float(optimizer.state[weight]["step"]) == 3
    trace = loop.trace.columns()
    assert [norm > 0 for norm in trace["grad_norm"]] == [True, False, True, True, False]
    taken = trace["grad_norm"] > 0
    assert np.isnan(trace["energy"]).tolist() == (~taken).tolist()
    assert report.metrics["grad_norm"] == pytest.approx(trace["grad_norm"][taken].mean())
    assert report.metrics["train_loss"] == pytest.approx(trace["loss"].mean())

    # The same three batches, and no others.
    model = task.model(None, {})
    optimizer = TopologicalAdam(model.parameters(), lr=0.1)
    for place in (0, 2, 3):
        inputs = torch.tensor(task.batches[place]).unsqueeze(1)
        optimizer.zero_grad()
        loss = task.loss(model(inputs), 2 * inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9)
        optimizer.step()
    torch.testing.assert_close(next(model.parameters()), weight)


def test_an_epoch_without_any_gradient_moves_nothing() -> None:
    task = Line(rows=4)
    parts = _parts(task, 0.1, _Choosy(task, refused={1, 2}))
    _, (report,) = _train(parts)
    assert not any(bool(p.any()) for p in parts.model.parameters())
    assert report.metrics["grad_norm"] == report.metrics["grad_spikes"] == 0
    assert np.isfinite(report.metrics["train_loss"])


def test_a_learner_without_state_refuses_one() -> None:
    learner = Backprop(Line())
    assert learner.state_dict() == {}
    learner.load_state_dict({})
    with pytest.raises(ValueError, match="Backprop keeps no state, got beta"):
        learner.load_state_dict({"beta": 0.1})


_READ = torch.ops.aten._local_scalar_dense.default
_READ_IN_INFERENCE = torch.ops.aten.item.default


class _CountHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts reads of a tensor's value by the host (``.item()``, ``bool(tensor)``, ...)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.reads += func in (_READ, _READ_IN_INFERENCE)
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait_for_a_step() -> None:
    class Quiet(Line):
        def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
            return inputs

    reads = []
    for rows in (20, 200):
        parts = _parts(Quiet(rows), 1e-6)
        with _CountHostReads() as counter:
            _train(parts, grad_clip=1.0, schedule="cosine")
        reads.append(counter.reads)
    assert reads[0] == reads[1] > 0


def test_evaluation_is_the_mean_over_rows_whatever_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = Line(rows=10)
    model, rows = task.model(None, {}), task.splits(DataOptions()).val
    whole = evaluate(task, model.train(), rows)
    modes = [model.training]
    assert whole == pytest.approx({"loss": 4 * 38.5, "error": 11.0})
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 3)
    assert evaluate(task, model.eval(), rows) == pytest.approx(whole, rel=1e-6)
    modes.append(model.training)
    assert modes == [True, False]
    assert task.batches == []


def test_dropout_is_off_in_evaluation_and_no_gradient_is_recorded() -> None:
    class Forgetful(Line):
        def model(self, name: str | None, options: Mapping[str, Any]) -> nn.Module:
            return nn.Sequential(super().model(name, options), nn.Dropout(0.5), _NoGradient())

    class _NoGradient(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            return inputs + 1.0

    task = Forgetful(rows=4)
    measured = evaluate(task, task.model(None, {}), task.splits(DataOptions()).val)
    assert measured["error"] == pytest.approx(4.0)  # |1 - 2x| for x = 1..4


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    check_optimizer(torch.optim.Adam(parameters), "adam")
    with pytest.raises(ConfigError, match=r"'torch\.optim:LBFGS'.*closure.*such as 'adam'"):
        check_optimizer(torch.optim.LBFGS(parameters), "torch.optim:LBFGS")


def test_an_optimizer_without_a_rate_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ConfigError, match="parameter group without 'lr'"):
        check_optimizer(optimizer, "mine")
