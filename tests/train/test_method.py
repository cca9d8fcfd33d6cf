"""Methods: how a spec finds its own, what the loop and the trial ask of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.method_cases import CAP, Watched, watched_spec
from tests.train_cases import (
    QUIET,
    STEPS,
    Blobs,
    advance,
    assert_same,
    blobs_spec,
    reports_of,
    state_of,
)
from topotune.errors import ConfigError, UnknownNameError, UnstableError
from topotune.records import Outcome, OverheadOptions, TrialSpec
from topotune.tasks.base import DataOptions
from topotune.train.assemble import PROBE_ROWS, assemble, check_buildable, probe_rows
from topotune.train.learner import Backprop
from topotune.train.loop import TIMING_METRICS
from topotune.train.method import OptimizerMethod
from topotune.train.methods import METHODS, build_method
from topotune.train.rehearsal import metric_names
from topotune.train.tcep import TcepMethod
from topotune.train.trace import RELAXATION_FILE, TRACE_FILE, read_columns
from topotune.train.trial import open_trial, run_trial
from topotune.train.weights import evaluate_test, load_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "watched", Watched)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", OptimizerMethod),
        ("topological_adam", OptimizerMethod),
        ("torch.optim:RMSprop", OptimizerMethod),
        ("tcep", TcepMethod),
        ("watched", Watched),
    ],
)
def test_a_name_finds_its_method(name: str, kind: type) -> None:
    assert type(build_method(blobs_spec(method=name))) is kind


@pytest.mark.parametrize(("name", "near"), [("tecp", "tcep"), ("adma", "adam")])
def test_an_unknown_name_lists_methods_and_optimizers_together(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        build_method(blobs_spec(method=name))
    text = str(caught.value)
    assert text.startswith(f"unknown method {name!r}; did you mean {near!r}?")
    assert "adam, adamw, nadam, sgd, tcep, topological_adam" in text


def test_no_method_is_named_like_an_optimizer() -> None:
    from topotune.optim import OPTIMIZERS

    assert not METHODS.keys() & OPTIMIZERS.keys()


def test_an_optimizer_is_backpropagation_over_the_tasks_model() -> None:
    spec = blobs_spec(params={"lr": 0.25})
    method, task = OptimizerMethod(spec), Blobs()
    model = method.model(task)
    rows = probe_rows(task, task.splits(DataOptions()).train)
    assert isinstance(method.learner(task, rows), Backprop)
    assert method.optimizer(model.parameters()).param_groups[0]["lr"] == 0.25
    assert list(method.contenders(task, rows, CPU)) == ["adam", "adam_default"]
    assert method.resolved(model) == {}
    assert (method.plain().method, method.plain().params) == ("sgd", {"lr": 0.0})


def test_the_probe_is_the_first_rows_prepared_and_not_augmented() -> None:
    class Shifted(Blobs):
        def prepare(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs + 1.0

    task = Shifted()
    train = task.splits(DataOptions()).train
    found = probe_rows(task, train)
    assert torch.equal(found.inputs, train.inputs[:PROBE_ROWS] + 1.0)
    assert torch.equal(found.targets, train.targets[:PROBE_ROWS])
    assert task.augmented == 0
    few = probe_rows(task, train.rows(0, 3))
    assert len(few) == 3


def test_what_preparing_the_probe_draws_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = assemble(build_method(blobs_spec()), CPU).model.state_dict()
    after = torch.rand(2)

    def draws(task: Blobs, inputs: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        return inputs

    monkeypatch.setattr(Blobs, "prepare", draws)
    assert_same(assemble(build_method(blobs_spec()), CPU).model.state_dict(), expected)
    assert torch.equal(torch.rand(2), after)


def test_measured_values_are_columns_of_the_trace_and_weighted_means(tmp_path: Path) -> None:
    result = run_trial(watched_spec(), folder=tmp_path)
    assert result.outcome is Outcome.COMPLETE
    trace = read_columns(tmp_path / TRACE_FILE)
    assert trace["batch_rows"].tolist() == [16, 16, 16, 16, 6] * 3
    assert trace.keys() == {"step", "loss", "grad_norm", "batch_rows", "broken"}
    expected = (4 * 16 * 16 + 6 * 6) / 70  # by examples, not by batches
    assert result.history[0].metrics["batch_rows"] == pytest.approx(expected, rel=1e-12)


def test_the_step_is_followed_by_the_learners_own(tmp_path: Path) -> None:
    run = open_trial(watched_spec(lr=10.0), folder=tmp_path)
    metrics = [report.metrics for report in run.reports()]
    assert [m["largest"] for m in metrics] == [CAP] * 3
    assert [m["learner_epochs"] for m in metrics] == [1.0, 2.0, 3.0]
    weights = run.weights()
    assert max(float(w.abs().max()) for n, w in weights.items() if n.startswith("last")) == CAP


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("broken_at", [1, STEPS + 2])
def test_a_learners_fault_ends_the_trial_with_its_cause(
    tmp_path: Path, broken_at: int, spoil: bool
) -> None:
    spec = watched_spec(broken_at=broken_at, spoil=spoil)
    result = run_trial(spec, folder=tmp_path)
    epoch = (broken_at - 1) // STEPS + 1
    assert result.outcome is Outcome.DIVERGED
    assert result.reason == f"the learner is broken, at step {broken_at} (epoch {epoch})"
    assert read_columns(tmp_path / TRACE_FILE)["broken"][broken_at - 1] == 1.0


def test_a_learner_that_stops_prunes_the_trial_with_its_reason(tmp_path: Path) -> None:
    result = run_trial(watched_spec(stop_after=2), tmp_path)
    assert result.outcome is Outcome.PRUNED
    assert result.reason == "nothing was learnt in 2 epochs"
    assert len(result.history) == 2
    assert result.metrics["val_loss"] == result.history[-1].metrics["val_loss"]
    assert read_columns(tmp_path / TRACE_FILE)["step"].tolist() == list(range(1, 2 * STEPS + 1))
    assert run_trial(watched_spec(stop_after=2), tmp_path) == result


def test_stopping_after_the_last_epoch_is_no_stop() -> None:
    assert run_trial(watched_spec(stop_after=3)).outcome is Outcome.COMPLETE


@pytest.mark.parametrize("kill_after", [1, 2])
def test_a_resumed_trial_stops_and_ends_like_the_undisturbed_one(
    tmp_path: Path, kill_after: int
) -> None:
    for spec in (watched_spec(), watched_spec(stop_after=2)):
        name = str(spec.params.get("stop_after", 0))
        whole, pieces = tmp_path / f"whole{name}", tmp_path / f"pieces{name}"
        expected = run_trial(spec, folder=whole)
        advance(open_trial(spec, folder=pieces), kill_after)
        resumed = run_trial(spec, folder=pieces)
        assert (resumed.outcome, resumed.reason) == (expected.outcome, expected.reason)
        assert reports_of(resumed) == reports_of(expected)
        assert_same(state_of(spec, pieces), state_of(spec, whole))
        for file in (TRACE_FILE, RELAXATION_FILE):
            assert (pieces / file).read_bytes() == (whole / file).read_bytes()


def test_the_curves_of_every_epoch_are_joined_and_handed_over(tmp_path: Path) -> None:
    run_trial(watched_spec(), tmp_path)
    assert (tmp_path / TRACE_FILE).exists()
    joined = read_columns(tmp_path / RELAXATION_FILE)
    assert joined["epoch"].tolist() == [1, 2, 3]
    assert joined["time"].shape == joined["energy"].shape == joined["residual"].shape == (3, 6)
    assert np.isnan(joined["residual"]).sum(axis=1).tolist() == [2, 1, 0]
    task = Blobs()
    first = task.splits(DataOptions()).train.inputs[:PROBE_ROWS]
    size = float(first.double().square().mean())
    np.testing.assert_allclose(joined["energy"][:, 0], size, rtol=1e-12)


def test_a_method_without_curves_leaves_no_such_file(tmp_path: Path) -> None:
    run_trial(blobs_spec(), folder=tmp_path)
    assert not (tmp_path / RELAXATION_FILE).exists()
    assert not (tmp_path / "relaxation").exists()


def test_the_overhead_is_named_after_what_it_is_measured_against(tmp_path: Path) -> None:
    options = OverheadOptions(blocks=2, steps=1, warmup=0)
    spec = TrialSpec.from_dict({**watched_spec().to_dict(), "overhead": vars(options)})
    run = open_trial(spec, tmp_path)
    result = run.complete()
    assert run.record.overhead.metrics.keys() == {
        "overhead_vs_bptt",
        "overhead_vs_bptt_iqr",
        "overhead_blocks",
        "bptt_step_ms",
    }
    assert reports_of(result) == reports_of(run_trial(watched_spec()))
    assert metric_names(spec) == sorted(result.metrics)


def test_resolved_rows_are_in_the_table_of_parameters() -> None:
    params = open_trial(watched_spec(lr=0.01)).record.start.params
    assert params["lr"] == "0.01"
    assert params["resolved.tensors"] == "6"


def test_an_unstable_spec_is_a_users_error_before_and_at_the_start() -> None:
    spec = watched_spec(gamma=1.5)
    for start in (check_buildable, open_trial, run_trial):
        with pytest.raises(UnstableError, match=r"gamma: must be below 1 \(got 1\.5\)\. Lower"):
            start(spec)
    assert UnstableError.exit_code == 2


def test_rehearsal_knows_the_learners_metrics_and_falls_back_to_a_plain_spec() -> None:
    names = metric_names(watched_spec())
    assert {"learner_epochs", "batch_rows", "largest", "val_loss"} <= set(names)
    assert metric_names(watched_spec(broken_at=1)) == names
    assert set(names) >= TIMING_METRICS


def test_weights_are_tested_with_the_methods_own_model(tmp_path: Path) -> None:
    spec = watched_spec()
    run_trial(spec, folder=tmp_path)
    assert evaluate_test(spec, load_weights(spec, tmp_path)).keys() == {
        "test_loss",
        "test_accuracy",
    }


def test_an_optimizers_errors_are_those_of_before() -> None:
    with pytest.raises(ConfigError, match="adam takes no 'beta'"):
        check_buildable(blobs_spec(params={"beta": 0.1}, overhead=QUIET))
