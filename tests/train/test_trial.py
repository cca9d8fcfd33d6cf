"""A trial from spec to result: repeated, tracked, stopped and diverged, with exact answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train_cases import (
    BLOBS,
    STEPS,
    TRAIN_ROWS,
    Blobs,
    advance,
    assert_same,
    blobs_spec,
    method_spec,
    reports_of,
)
from topotune.data.splits import Splits
from topotune.errors import (
    CheckpointError,
    ConfigError,
    PluginError,
    ResourceError,
    UnknownNameError,
    UserError,
)
from topotune.records import (
    EpochReport,
    Outcome,
    OverheadOptions,
    TrainOptions,
)
from topotune.tasks.base import DataOptions
from topotune.tracking.entries import Metrics, Start
from topotune.train.assemble import check_buildable
from topotune.train.checkpoint import CheckpointStore
from topotune.train.record import TrialRecord
from topotune.train.trace import TRACE_FILE, read_columns
from topotune.train.trial import open_trial, run_trial
from topotune.train.weights import evaluate_test, load_weights


def test_the_same_spec_gives_the_same_metrics_and_another_seed_others() -> None:
    spec = method_spec("adam")
    assert reports_of(run_trial(spec)) == reports_of(run_trial(spec))
    assert reports_of(run_trial(spec)) != reports_of(run_trial(method_spec("adam", seed=8)))


def test_what_a_trial_reports_is_in_its_checkpoint_first(tmp_path: Path) -> None:
    spec = method_spec("adam", overhead=OverheadOptions(blocks=1, steps=1, warmup=0))
    seen: list[EpochReport] = []

    def on_epoch(report: EpochReport) -> bool:
        # Checkpointed before it is yielded, and read without the training's state.
        seen.append(report)
        found = CheckpointStore(tmp_path, spec).load_record()
        assert found is not None
        assert TrialRecord.from_dict(found).history == tuple(seen)
        return True

    run = open_trial(spec, tmp_path)
    result = run.complete(on_epoch)
    assert [report.epoch for report in seen] == [1, 2, 3]
    assert tuple(seen) == result.history == run.record.history
    start, overhead = run.record.entries()
    assert isinstance(start, Start)
    assert start.params["lr"] == "0.01"
    assert start.params["train.batch_size"] == "16"
    table = (start.params["task"], start.params["method"], start.params["epochs"])
    assert table == (BLOBS, "adam", "3")
    assert start.tags["seed"] == "7"
    assert start.tags["version.torch"] == str(torch.__version__)
    assert start.tags["device"] == "cpu"
    assert isinstance(overhead, Metrics)
    assert overhead.step == 0
    assert (tmp_path / TRACE_FILE).exists()
    assert run.series(seen[-1].timestamp_ms).last == 3 * STEPS
    assert (result.outcome, result.reason) == (Outcome.COMPLETE, "")
    assert result.metrics == {**result.history[-1].metrics, **overhead.values}
    kept = CheckpointStore(tmp_path, spec).load_record()
    assert kept is not None
    assert TrialRecord.from_dict(kept) == run.record


def test_the_thinned_steps_of_the_last_epoch_are_the_same_from_its_file(tmp_path: Path) -> None:
    run = open_trial(method_spec("topological_adam-uniform"), tmp_path)
    assert run.record.last_series(tmp_path) == ()
    advance(run, 2)
    at = run.history[-1].timestamp_ms
    series = run.series(at)
    assert {"loss", "grad_norm", "energy"} <= series.points.keys()
    assert [step for step, _ in series.points["loss"]] == list(range(STEPS + 1, 2 * STEPS + 1))
    assert run.record.last_series(tmp_path) == (series,)
    assert open_trial(run.spec, tmp_path).record.last_series(tmp_path) == (series,)


def test_a_finished_trial_opened_again_replays_the_same_records(tmp_path: Path) -> None:
    spec = method_spec("adam", overhead=OverheadOptions(blocks=1, steps=1, warmup=0))
    first = open_trial(spec, tmp_path)
    once = first.complete()
    second = open_trial(spec, tmp_path)
    again = second.complete()
    assert again == once
    assert second.record.history == first.record.history
    assert second.record.overhead == first.record.overhead
    assert second.record.start.params == first.record.start.params
    assert second.record.start.tags == first.record.start.tags


def test_an_epoch_that_was_checkpointed_and_never_reported_is_reported(tmp_path: Path) -> None:
    lost: list[EpochReport] = []

    def dies(report: EpochReport) -> bool:
        lost.append(report)
        if report.epoch == 2:
            raise ConnectionResetError("the worker dies here")
        return True

    spec = method_spec("adam")
    with pytest.raises(ConnectionResetError):
        run_trial(spec, tmp_path, dies)
    run = open_trial(spec, tmp_path)
    assert run.restored == 2
    reports = list(run.reports())
    assert [r.epoch for r in reports] == [1, 2, 3]
    assert reports[:2] == lost


def test_finish_happens_once(tmp_path: Path) -> None:
    run = open_trial(method_spec("adam"), tmp_path)
    advance(run, 1)
    first = run.finish(Outcome.PRUNED, "not promising")
    assert run.finish(Outcome.COMPLETE) is first
    assert (first.outcome, first.reason) == (Outcome.PRUNED, "not promising")
    assert read_columns(tmp_path / TRACE_FILE)["step"].tolist() == [1, 2, 3, 4, 5]


def test_stopped_by_its_consumer_is_pruned_with_the_reason() -> None:
    result = run_trial(method_spec("adam"), on_epoch=lambda report: report.epoch < 2)
    assert result.outcome is Outcome.PRUNED
    assert result.reason == "stopped after epoch 2 of 3 on request"
    assert len(result.history) == 2


def test_stopping_after_the_last_epoch_stops_nothing() -> None:
    result = run_trial(method_spec("adam"), on_epoch=lambda report: report.epoch < 3)
    assert result.outcome is Outcome.COMPLETE


@pytest.mark.parametrize("bad_at", [1, STEPS, STEPS + 3, 3 * STEPS])
def test_a_bad_step_ends_the_trial_as_diverged_at_that_step(tmp_path: Path, bad_at: int) -> None:
    spec = method_spec("adam", task_options={"bad_at": bad_at})
    result = run_trial(spec, tmp_path)
    epoch = (bad_at - 1) // STEPS + 1
    assert result.outcome is Outcome.DIVERGED
    assert result.reason == f"loss is nan at step {bad_at} (epoch {epoch})"
    assert len(result.history) == epoch - 1
    trace = read_columns(tmp_path / TRACE_FILE)
    assert trace["step"].tolist() == list(range(1, STEPS * epoch + 1))
    assert np.isfinite(trace["loss"][: bad_at - 1]).all()
    assert np.isnan(trace["loss"][bad_at - 1])
    # Trained again from its last checkpoint it ends alike.
    again = run_trial(spec, folder=tmp_path)
    assert (again.outcome, again.reason) == (result.outcome, result.reason)


def test_an_exploding_rate_diverges_with_a_cause() -> None:
    spec = method_spec("sgd", params={"lr": 1e30})
    result = run_trial(spec)
    assert result.outcome is Outcome.DIVERGED
    assert result.reason.endswith("(epoch 1)")
    assert result.metrics == {}


def test_an_infinite_gradient_of_a_finite_loss_is_divergence() -> None:
    # Outputs of 1e38 have a finite cross entropy whose gradient overflows on its way back.
    spec = method_spec("adam", task_options={"bad_at": 2, "bad": 1e38})
    result = run_trial(spec)
    assert result.outcome is Outcome.DIVERGED
    assert result.reason == "grad norm is inf at step 2 (epoch 1)"


@pytest.mark.parametrize("coupling", ["uniform", "exchange", "local"])
def test_topological_adam_trains_within_its_bound_and_traces_every_step(
    tmp_path: Path, coupling: str
) -> None:
    spec = method_spec(f"topological_adam-{coupling}")
    result = run_trial(spec, folder=tmp_path)
    assert result.outcome is Outcome.COMPLETE
    assert result.metrics["energy_controlled"] == pytest.approx(1e-3, rel=1e-4)
    trace = read_columns(tmp_path / TRACE_FILE)
    assert trace.keys() == {
        "step",
        "loss",
        "grad_norm",
        "energy",
        "energy_controlled",
        "coupling_current",
    }
    assert all(len(column) == 3 * STEPS for column in trace.values())
    np.testing.assert_allclose(trace["energy_controlled"], 1e-3, rtol=1e-4)
    assert trace["energy"][-1] == pytest.approx(result.metrics["energy"], rel=1e-12)


def test_an_energy_that_leaves_its_bound_is_divergence_although_all_is_finite() -> None:
    # Band control damps by 0.9 a step at most; with gradients this large the local coupling feeds
    # the fields faster than that.
    spec = method_spec(
        "topological_adam-local",
        params={"lr": 1e-4, "coupling": "local", "energy_control": "band", "eta": 0.05},
        task_options={"scale": 300.0},
        train=TrainOptions(batch_size=16),
    )
    result = run_trial(spec)
    assert result.outcome is Outcome.DIVERGED
    assert result.reason.startswith("energy controlled ")
    assert result.reason.endswith("above 1000 times its target 0.001")


def test_a_switched_off_correction_has_no_energy_and_does_not_diverge(tmp_path: Path) -> None:
    spec = method_spec("topological_adam-uniform", params={"lr": 0.01, "eta": 0.0})
    adam = run_trial(method_spec("adam"))
    result = run_trial(spec, folder=tmp_path)
    assert read_columns(tmp_path / TRACE_FILE).keys() == {"step", "loss", "grad_norm"}
    for mine, theirs in zip(result.history, adam.history, strict=True):
        assert mine.metrics["val_loss"] == pytest.approx(theirs.metrics["val_loss"], rel=1e-3)


def test_weights_that_break_after_the_last_step_are_noticed_in_validation() -> None:
    spec = method_spec("sgd", params={"lr": 1e38}, train=TrainOptions(batch_size=TRAIN_ROWS))
    result = run_trial(spec)
    assert result.outcome is Outcome.DIVERGED
    assert result.reason.startswith("validation loss is ")
    assert result.reason.endswith("after step 1 (epoch 1)")


def test_other_exceptions_pass_through() -> None:
    def full(report: EpochReport) -> bool:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        run_trial(method_spec("adam"), on_epoch=full)


def test_a_spec_is_trained_without_a_folder_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_trial(method_spec("adam"))
    assert list(tmp_path.iterdir()) == []


def test_weights_are_the_trained_ones_and_give_the_test_metrics(tmp_path: Path) -> None:
    spec = method_spec("adam", epochs=6, params={"lr": 0.05})
    run = open_trial(spec, folder=tmp_path)
    untrained = run.weights()
    result = [*run.reports()][-1]
    weights = load_weights(spec, tmp_path)
    assert_same(run.weights(), weights)
    before, after = evaluate_test(spec, untrained), evaluate_test(spec, weights)
    assert after.keys() == {"test_loss", "test_accuracy"}
    assert after["test_loss"] < 0.7 * before["test_loss"]
    assert after["test_loss"] != result.metrics["val_loss"]  # other rows
    assert evaluate_test(spec, weights) == after


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    spec = method_spec("adam")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_weights(spec, tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)do not fit.*first\.weight"):
        evaluate_test(spec, {"other": torch.zeros(1)})


def test_the_overhead_is_measured_once_and_repeated(tmp_path: Path) -> None:
    spec = method_spec("adam", overhead=OverheadOptions(blocks=2, steps=1, warmup=0))
    run = open_trial(spec, tmp_path)
    next(run.reports())
    first = run.record.overhead
    assert first.metrics.keys() == {
        "overhead_vs_adam",
        "overhead_vs_adam_iqr",
        "overhead_vs_adam_default",
        "overhead_vs_adam_default_iqr",
        "overhead_blocks",
        "adam_step_ms",
    }
    for _ in range(2):
        again = open_trial(spec, tmp_path)
        again.complete()
        assert again.record.overhead == first


def test_what_loading_the_data_draws_has_no_effect_on_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = open_trial(method_spec("adam")).weights()
    load = Blobs.splits

    def loads_and_draws(task: Blobs, options: DataOptions) -> Splits:
        torch.rand(5)  # as reading from a cache or downloading might
        return load(task, options)

    monkeypatch.setattr(Blobs, "splits", loads_and_draws)
    assert_same(open_trial(method_spec("adam")).weights(), expected)


def test_measuring_the_overhead_does_not_change_the_training() -> None:
    measured = method_spec("adam", overhead=OverheadOptions(blocks=2, steps=3, warmup=1))
    assert reports_of(run_trial(measured)) == reports_of(run_trial(method_spec("adam")))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"epochs": 0}, ConfigError, "epochs: must be a whole number of at least 1 (got 0)"),
        ({"epochs": 2.5}, ConfigError, "epochs: must be a whole number"),
        ({"seed": -1}, ConfigError, "seed: must be"),
        ({"threads": -1}, ConfigError, "threads: must be"),
        ({"train": TrainOptions(batch_size=0)}, ConfigError, "train.batch_size: must be"),
        ({"train": TrainOptions(schedule="step")}, UnknownNameError, "unknown schedule 'step'"),
        (
            {"train": TrainOptions(grad_clip=0.0)},
            ConfigError,
            "train.grad_clip: must be a positive",
        ),
        ({"train": TrainOptions(grad_clip=np.nan)}, ConfigError, "train.grad_clip: must be"),
        ({"overhead": OverheadOptions(blocks=-1)}, ConfigError, "overhead.blocks: must be"),
        ({"overhead": OverheadOptions(steps=0)}, ConfigError, "overhead.steps: must be"),
        ({"device": "gpu"}, ConfigError, "device: unknown device 'gpu'"),
        ({"device": "cuda:x"}, ConfigError, "unknown device 'cuda:x'"),
        ({"device": "cuda:99"}, ResourceError, "device 'cuda:99': torch sees"),
        ({"task": "blobz"}, UnknownNameError, "blobz"),
        ({"task": "no_such_module:Task"}, PluginError, "no_such_module"),
        ({"task_options": {"colour": 1}}, UserError, "colour"),
        ({"method": "adamm"}, UnknownNameError, "did you mean 'adam'"),
        ({"params": {"lr": -1.0}}, UserError, "-1"),
        ({"params": {"lr": 0.1, "speed": 2}}, UserError, "speed"),
        ({"method": "torch.optim:LBFGS", "params": {}}, ConfigError, "closure"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_and_at_the_start(
    changes: dict[str, Any], error: type[UserError], text: str, tmp_path: Path
) -> None:
    spec = blobs_spec(**changes)
    for start in (check_buildable, open_trial):
        with pytest.raises(error) as caught:
            start(spec)
        assert text in str(caught.value)


def test_preflight_accepts_what_trains_and_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_buildable(blobs_spec())
    check_buildable(blobs_spec(device="cuda:99"), check_device=False)
    assert torch.equal(torch.rand(2), expected)
