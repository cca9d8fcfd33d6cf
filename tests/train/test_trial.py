"""A trial from spec to result: repeated, tracked, stopped and diverged, with exact answers."""

from __future__ import annotations

import json
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
    RecordingTracker,
    advance,
    assert_same,
    blobs_spec,
    method_spec,
    reports_of,
    state_of,
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
from topotune.train.checkpoint import CHECKPOINT_FILE
from topotune.train.trace import TRACE_FILE, read_columns
from topotune.train.trial import open_trial, preflight, run_trial
from topotune.train.weights import evaluate_test, load_weights


def test_the_same_spec_gives_the_same_metrics_and_another_seed_others() -> None:
    spec = method_spec("adam")
    assert reports_of(run_trial(spec)) == reports_of(run_trial(spec))
    assert reports_of(run_trial(spec)) != reports_of(run_trial(method_spec("adam", seed=8)))


def test_the_tracker_is_told_in_order_and_once(tmp_path: Path) -> None:
    spec = method_spec("adam", overhead=OverheadOptions(blocks=1, steps=1, warmup=0))
    tracker = RecordingTracker()
    seen: list[int] = []

    def on_epoch(report: EpochReport) -> bool:
        # Checkpointed and tracked before it is yielded.
        assert len(state_of(spec, tmp_path)["history"]) == report.epoch
        assert tracker.calls[-1] == ("epoch", report)
        seen.append(report.epoch)
        return True

    result = run_trial(spec, tracker, tmp_path, on_epoch)
    kinds = [kind for kind, _ in tracker.calls]
    assert kinds == ["start", "metrics", "epoch", "epoch", "epoch", "artifact", "end"]
    assert seen == [1, 2, 3]
    assert tuple(tracker.of("epoch")) == result.history
    ((params, tags),) = tracker.of("start")
    assert params["lr"] == 0.01
    assert params["train.batch_size"] == 16
    assert (params["task"], params["method"], params["epochs"]) == (BLOBS, "adam", 3)
    assert tags["seed"] == "7"
    assert tags["version.torch"] == str(torch.__version__)
    assert tags["device"] == "cpu"
    ((overhead, step, _),) = tracker.of("metrics")
    assert step == 0
    assert list(tracker.of("artifact")) == [tmp_path / TRACE_FILE]
    assert list(tracker.of("end")) == [(Outcome.COMPLETE, "")]
    assert result.metrics == {**result.history[-1].metrics, **overhead}


def test_a_finished_trial_opened_again_replays_the_same_records(tmp_path: Path) -> None:
    spec = method_spec("adam", overhead=OverheadOptions(blocks=1, steps=1, warmup=0))
    first, second = RecordingTracker(), RecordingTracker()
    once = run_trial(spec, first, tmp_path)
    again = run_trial(spec, second, tmp_path)
    assert again == once
    assert second.calls == first.calls


def test_an_epoch_that_was_checkpointed_and_never_reported_is_reported(tmp_path: Path) -> None:
    class LostAtEpoch(RecordingTracker):
        def epoch(self, report: EpochReport) -> None:
            super().epoch(report)
            if report.epoch == 2:
                raise ConnectionResetError("the worker dies here")

    spec = method_spec("adam")
    lost = LostAtEpoch()
    with pytest.raises(ConnectionResetError):
        run_trial(spec, lost, tmp_path)
    tracker = RecordingTracker()
    run = open_trial(spec, tracker, tmp_path)
    assert run.restored == 2
    reports = list(run.reports())
    assert [r.epoch for r in reports] == [1, 2, 3]
    assert reports[:2] == list(lost.of("epoch"))


def test_finish_happens_once(tmp_path: Path) -> None:
    tracker = RecordingTracker()
    run = open_trial(method_spec("adam"), tracker, tmp_path)
    advance(run, 1)
    first = run.finish(Outcome.PRUNED, "not promising")
    assert run.finish(Outcome.COMPLETE) is first
    assert list(tracker.of("end")) == [(Outcome.PRUNED, "not promising")]
    assert read_columns(tmp_path / TRACE_FILE)["step"].tolist() == [1, 2, 3, 4, 5]


def test_stopped_by_its_consumer_is_pruned_with_the_reason() -> None:
    tracker = RecordingTracker()
    result = run_trial(method_spec("adam"), tracker, on_epoch=lambda report: report.epoch < 2)
    assert result.outcome is Outcome.PRUNED
    assert result.reason == "stopped after epoch 2 of 3 on request"
    assert len(result.history) == 2
    assert list(tracker.of("end")) == [(Outcome.PRUNED, result.reason)]


def test_stopping_after_the_last_epoch_stops_nothing() -> None:
    result = run_trial(method_spec("adam"), on_epoch=lambda report: report.epoch < 3)
    assert result.outcome is Outcome.COMPLETE


@pytest.mark.parametrize("bad_at", [1, STEPS, STEPS + 3, 3 * STEPS])
def test_a_bad_step_ends_the_trial_as_diverged_at_that_step(tmp_path: Path, bad_at: int) -> None:
    tracker = RecordingTracker()
    spec = method_spec("adam", task_options={"bad_at": bad_at})
    result = run_trial(spec, tracker, tmp_path)
    epoch = (bad_at - 1) // STEPS + 1
    assert result.outcome is Outcome.DIVERGED
    assert result.reason == f"loss is nan at step {bad_at} (epoch {epoch})"
    assert len(result.history) == epoch - 1
    assert list(tracker.of("end")) == [(Outcome.DIVERGED, result.reason)]
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


def test_other_exceptions_pass_through_and_no_end_is_recorded() -> None:
    class Full(RecordingTracker):
        def epoch(self, report: EpochReport) -> None:
            raise OSError("no space left on device")

    tracker = Full()
    with pytest.raises(OSError, match="no space left"):
        run_trial(method_spec("adam"), tracker)
    assert list(tracker.of("end")) == []


def test_a_spec_is_trained_without_a_folder_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = RecordingTracker()
    run_trial(method_spec("adam"), tracker)
    assert list(tmp_path.iterdir()) == []
    assert list(tracker.of("artifact")) == []


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
    tracker = RecordingTracker()
    run = open_trial(spec, tracker, tmp_path)
    next(run.reports())
    (first,) = tracker.of("metrics")
    assert first[0].keys() == {
        "overhead_vs_adam",
        "overhead_vs_adam_iqr",
        "overhead_vs_adam_default",
        "overhead_vs_adam_default_iqr",
        "overhead_blocks",
        "adam_step_ms",
    }
    for lost in (CHECKPOINT_FILE, "overhead.json"):  # either one is enough
        (tmp_path / lost).unlink()
        again = RecordingTracker()
        run_trial(spec, again, tmp_path)
        assert list(again.of("metrics")) == [first]


def test_a_damaged_overhead_file_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "overhead.json").write_text('{"metrics": ')
    spec = method_spec("adam", overhead=OverheadOptions(blocks=1, steps=1, warmup=0))
    result = run_trial(spec, folder=tmp_path)
    assert result.metrics["overhead_vs_adam"] > 0
    assert "damaged" in caplog.text
    assert json.loads((tmp_path / "overhead.json").read_text())["metrics"]


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
    for start in (preflight, open_trial):
        with pytest.raises(error) as caught:
            start(spec)
        assert text in str(caught.value)


def test_preflight_accepts_what_trains_and_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    preflight(blobs_spec())
    preflight(blobs_spec(device="cuda:99"), check_device=False)
    assert torch.equal(torch.rand(2), expected)
