"""``method: tcep`` as a trial sees it: whose parameter is whose, its ends, and a resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.train_cases import (
    BLOBS,
    QUIET,
    Line,
    advance,
    assert_same,
    reports_of,
    state_of,
)
from topotune.config.file import parse_search, read_yaml
from topotune.data.splits import TensorPair
from topotune.errors import ConfigError, UnknownNameError, UnstableError
from topotune.optim import TopologicalAdam
from topotune.records import Outcome, OverheadOptions, TrainOptions, TrialSpec, Value
from topotune.search.study.space import corners
from topotune.tasks import build_task
from topotune.tasks.base import Task
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import NAMES
from topotune.train.assemble import check_buildable, make_model
from topotune.train.methods import build_method
from topotune.train.rehearsal import metric_names
from topotune.train.tcep import OPTIMIZER, PATIENCE, TOLERATED, TcepMethod
from topotune.train.trace import RELAXATION_FILE, TRACE_FILE, read_columns
from topotune.train.trial import open_trial, run_trial
from topotune.train.weights import evaluate_test, load_weights

SPACES = Path(__file__).parents[2] / "search_spaces"

SMALL: dict[str, Value] = {"width": 8, "hidden": 16, "memory": 4}
HASTY: dict[str, Any] = {"solver": "euler", "steps": 1, "tolerance": 1e-5}
"""Dynamics that never get anywhere near their tolerance."""


class Clashing(torch.optim.SGD):
    """An optimizer with an option that TCEP has too."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, lr=lr, momentum=beta)


class Regression(Line):
    """A network that relaxes, and targets that are no classes."""

    def model(self, name: str | None, options: Mapping[str, Value]) -> nn.Module:
        return build_task("digits", {}).model(name, options)


class Unclassified(Task):
    """Knows no network of that name."""

    splits = Line.splits
    loss = Line.loss
    metrics = Line.metrics

    def model(self, name: str | None, options: Mapping[str, Value]) -> nn.Module:
        raise UnknownNameError("model", str(name), ["point"])


def tcep_spec(epochs: int = 2, **params: Any) -> TrialSpec:
    """Two epochs of three steps over 60 rolled digits.

    gamma has a number, because finding its stable range takes longer than these few steps.
    """
    gamma: dict[str, Value] = {} if "gamma_fraction" in params else {"gamma": 0.1}
    return TrialSpec(
        task="digits_rolled",
        method="tcep",
        epochs=epochs,
        seed=7,
        params={"lr": 0.003, **gamma, **params},
        task_options={"train_examples": 60, "val_fraction": 0.05},
        model_options=SMALL,
        train=TrainOptions(batch_size=20),
        overhead=QUIET,
        device="cpu",
        threads=1,
    )


def tcep_method(**params: Any) -> TcepMethod:
    return TcepMethod(tcep_spec(**params))


def built(method: TcepMethod) -> TCEPNetwork:
    task = build_task(method.spec.task, method.spec.task_options)
    model = make_model(method, task)
    assert isinstance(model, TCEPNetwork)
    return model


def test_a_trial_trains_and_leaves_its_columns_its_curves_and_its_weights(tmp_path: Path) -> None:
    spec = tcep_spec()
    result = run_trial(spec, tmp_path)
    assert result.outcome is Outcome.COMPLETE
    trace = read_columns(tmp_path / TRACE_FILE)
    assert trace["step"].tolist() == [1, 2, 3, 4, 5, 6]
    both = {f"{name}_{p}" for name in ("energy", "residual", "nfe") for p in ("free", "nudged")}
    assert both | {"unconverged_share", "diverged_share"} <= trace.keys()
    last = result.history[-1].metrics
    assert last["skipped_steps"] == 0.0
    for name in both:
        assert np.isfinite(trace[name]).all()
        assert last[name] == pytest.approx(float(np.mean(trace[name][3:])), rel=1e-6)
    curves = read_columns(tmp_path / RELAXATION_FILE)
    assert curves["epoch"].tolist() == [1, 2]
    assert curves["energy"].shape == curves["residual"].shape == curves["time"].shape
    energy = curves["energy"]
    assert (np.diff(energy, axis=1) <= 1e-4 * np.abs(energy[:, :1])).all()
    assert (curves["residual"][:, -1] < 0.01 * curves["residual"][:, 0]).all()
    assert 0 <= evaluate_test(spec, load_weights(spec, tmp_path))["test_accuracy"] <= 1
    assert metric_names(spec) == sorted(result.metrics)


def test_the_table_of_parameters_says_what_the_dynamics_came_to() -> None:
    params = open_trial(tcep_spec(gamma_fraction=0.5)).record.start.params
    model = built(tcep_method(gamma_fraction=0.5))
    assert params["gamma_fraction"] == "0.5"
    assert params["resolved.gamma"] == str(model.resolved()["resolved.gamma"])
    resolved = {name: str(value) for name, value in model.resolved().items()}
    assert resolved.items() <= params.items()
    assert float(params["resolved.T"]) == 8
    timed = built(tcep_method(recirculation="delay", T_time=2.5)).resolved()
    assert timed["resolved.T_time"] == 2.5
    assert "resolved.T" not in timed


def test_parameters_go_to_tcep_or_to_its_optimizer() -> None:
    params: dict[str, Any] = {"lambda": 2.0, "gamma": 0.25, "beta": 0.2}
    method = tcep_method(**params, optimizer="sgd", momentum=0.5)
    model = built(method)
    assert (model.dynamics.damping, model.recirculation.gamma) == (2.0, 0.25)
    optimizer = method.optimizer(model.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.003, 0.5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (None, torch.optim.Adam),
        ("topological_adam", TopologicalAdam),
        ("torch.optim:RMSprop", torch.optim.RMSprop),
    ],
)
def test_any_optimizer_can_take_the_gradients(name: str | None, kind: type) -> None:
    method = tcep_method(**({} if name is None else {"optimizer": name}))
    assert type(method.optimizer(built(method).parameters())) is kind


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ({"gama": 0.1}, ConfigError, "neither tcep nor its optimizer adam takes 'gama'"),
        ({"gama": 0.1}, ConfigError, "did you mean 'gamma'?"),
        ({"weight_decy": 0.1}, ConfigError, "did you mean 'weight_decay'?"),
        ({"eta": 0.1}, ConfigError, "neither tcep nor its optimizer adam takes 'eta'"),
        ({"optimizer": "adm"}, UnknownNameError, "unknown optimizer 'adm'; did you mean 'adam'?"),
        ({"optimizer": 3}, UnknownNameError, "unknown optimizer '3'"),
        ({"optimizer": "tcep"}, UnknownNameError, "unknown optimizer 'tcep'"),
        ({"optimizer": "torch.optim:LBFGS"}, ConfigError, "optimizer 'torch.optim:LBFGS': LBFGS"),
        ({"optimizer": f"{__name__}:Clashing"}, ConfigError, "named like TCEP's own: beta"),
        ({"lr": -1.0}, ConfigError, "-1"),
        (
            {"beta": -0.1},
            ConfigError,
            "beta: must be a finite number above 0 and at most 2 (got -0.1)",
        ),
        ({"recirculation": "rong"}, UnknownNameError, "did you mean 'ring'?"),
        ({"field": "enrgy"}, UnknownNameError, "did you mean 'energy'?"),
        ({"gamma": 5.0}, UnstableError, "gamma"),
        ({"recirculation": "delay", "gradient": "adjoint"}, ConfigError, "not defined with"),
        ({"recirculation": "delay", "T": 4}, ConfigError, "Write T_time: 4"),
        ({"recirculation": "ring", "T_time": 4.0}, ConfigError, "Write T: 4"),
    ],
)
def test_bad_parameters_are_refused_before_and_at_the_start(
    params: dict[str, Any], error: type[ConfigError], text: str
) -> None:
    for start in (check_buildable, open_trial):
        with pytest.raises(error) as caught:
            start(tcep_spec(**params))
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["dynamics", "field"])
def test_what_the_method_sets_is_no_model_option(name: str) -> None:
    spec = dataclasses.replace(tcep_spec(field="energy"), model_options={**SMALL, name: "energy"})
    with pytest.raises(ConfigError, match=rf"model\.{name}: method tcep sets this itself"):
        check_buildable(spec)


# torch's own, at its first forward-mode derivative
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_a_field_may_be_a_model_option_where_the_method_does_not_set_it() -> None:
    spec = dataclasses.replace(tcep_spec(), model_options={**SMALL, "field": "transformer"})
    assert not built(TcepMethod(spec)).conservative


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("rosenbrock", "has no network for it: unknown model 'tcep'"),
        (f"{__name__}:Unclassified", "has no network for it: unknown model 'tcep'"),
        (BLOBS, "gives a NoisyNet, which is no TCEPNetwork"),
    ],
)
def test_a_task_that_does_not_classify_is_refused(task: str, text: str) -> None:
    spec = dataclasses.replace(tcep_spec(), task=task, task_options={}, model_options={})
    with pytest.raises(ConfigError) as caught:
        check_buildable(spec)
    assert text in str(caught.value)
    assert "TCEP trains classifiers" in str(caught.value)


def test_another_model_of_a_task_that_classifies_is_refused_by_its_name() -> None:
    spec = dataclasses.replace(tcep_spec(), model="mlp", model_options={})
    with pytest.raises(ConfigError, match="has model 'mlp', which is no TCEPNetwork"):
        check_buildable(spec)
    with pytest.raises(UnknownNameError, match="did you mean 'tcep'"):
        check_buildable(dataclasses.replace(tcep_spec(), model="tcepp"))


@pytest.mark.parametrize(
    "targets", [torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4).int()]
)
def test_targets_that_are_no_class_numbers_are_refused(targets: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"has targets of .*int64 class numbers"):
        tcep_method().learner(Line(), TensorPair(torch.zeros(4, 1, 8, 8), targets))


def test_regression_with_a_network_that_relaxes_is_refused() -> None:
    spec = dataclasses.replace(tcep_spec(), task=f"{__name__}:Regression", task_options={})
    with pytest.raises(ConfigError, match="has targets of float32"):
        open_trial(spec)


def test_epochs_that_do_not_converge_are_marked_and_then_no_further_one_starts(
    tmp_path: Path,
) -> None:
    spec = tcep_spec(epochs=6, **HASTY)
    result = run_trial(spec, folder=tmp_path)
    assert result.outcome is Outcome.PRUNED
    assert len(result.history) == PATIENCE
    assert [r.metrics["unconverged_marked"] for r in result.history] == [1.0] * PATIENCE
    assert all(r.metrics["unconverged_share"] > TOLERATED for r in result.history)
    # None of the three batches of an epoch settled, so that no step was taken.
    assert [r.metrics["skipped_steps"] for r in result.history] == [3.0] * PATIENCE
    assert [r.metrics["grad_norm"] for r in result.history] == [0.0] * PATIENCE
    fresh = built(TcepMethod(spec)).state_dict()
    for name, value in load_weights(spec, tmp_path).items():
        assert name.startswith("caps.") or torch.equal(value, fresh[name]), name
    assert result.reason == (
        "unconverged: at least 100.0% of the samples did not reach tolerance 1e-05 within 1 steps "
        "in each of the last 3 epochs; raise steps or lambda, lower gamma or the caps"
    )
    assert run_trial(spec, folder=tmp_path) == result
    assert run_trial(tcep_spec(epochs=PATIENCE, **HASTY)).outcome is Outcome.COMPLETE


@pytest.mark.parametrize("kill_after", [1, 2, 3])
def test_a_resumed_trial_counts_its_marked_epochs_on(tmp_path: Path, kill_after: int) -> None:
    spec = tcep_spec(epochs=6, **HASTY)
    advance(open_trial(spec, folder=tmp_path), kill_after)
    result = run_trial(spec, folder=tmp_path)
    assert (result.outcome, len(result.history)) == (Outcome.PRUNED, PATIENCE)


def test_one_converged_epoch_clears_the_count() -> None:
    method = tcep_method(**HASTY)
    task = build_task("digits_rolled", {})
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 1, 8, 8, generator=generator)
    rows = TensorPair(images, torch.arange(8))
    hasty, model = method.learner(task, rows), built(method)
    patient, easy = tcep_method().learner(task, rows), built(tcep_method())

    def epoch(learner: Any, network: nn.Module) -> float:
        learner.before_epoch()
        learner.gradients(network, rows)
        marked: float = learner.metrics(network)["unconverged_marked"]
        return marked

    assert [epoch(hasty, model), epoch(hasty, model)] == [1.0, 1.0]
    state = hasty.state_dict()
    assert len(state["unconverged"]) == 2
    patient.load_state_dict(state)
    assert epoch(patient, easy) == 0.0
    assert patient.state_dict()["unconverged"] == []
    with pytest.raises(ValueError, match="no state of TcepLearner"):
        patient.load_state_dict({"beta": 1.0})


def test_noise_keeps_samples_moving_and_is_not_held_against_them() -> None:
    spec = tcep_spec(epochs=5, noise="gaussian", noise_level=0.1, **HASTY)
    result = run_trial(spec)
    assert result.outcome is Outcome.COMPLETE
    assert {r.metrics["unconverged_marked"] for r in result.history} == {0.0}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"beta": "learned"},
        {"optimizer": "topological_adam", "eta": 0.02},
        {"noise": "gaussian", "noise_level": 0.05},
        {"recirculation": "delay"},
    ],
    ids=lambda params: "-".join(map(str, params)) or "plain",
)
def test_a_resumed_trial_is_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, params: dict[str, Any]
) -> None:
    spec = tcep_spec(**params)
    expected = run_trial(spec, folder=tmp_path / "whole")
    advance(open_trial(spec, folder=tmp_path / "pieces"), 1)
    resumed = run_trial(spec, folder=tmp_path / "pieces")
    assert reports_of(resumed) == reports_of(expected)
    assert_same(state_of(spec, tmp_path / "pieces"), state_of(spec, tmp_path / "whole"))
    for file in (TRACE_FILE, RELAXATION_FILE):
        whole = (tmp_path / "whole" / file).read_bytes()
        assert (tmp_path / "pieces" / file).read_bytes() == whole


@pytest.mark.parametrize("params", [{}, {"beta": "learned"}, {"gradient": "implicit"}])
def test_the_overhead_is_over_bptt_of_the_same_network(params: dict[str, Any]) -> None:
    options = OverheadOptions(blocks=1, steps=1, warmup=0)
    spec = dataclasses.replace(tcep_spec(epochs=1, **params), overhead=options)
    measured = run_trial(spec)
    assert {name for name in measured.metrics if "overhead" in name or "step_ms" in name} == {
        "overhead_vs_bptt",
        "overhead_vs_bptt_iqr",
        "overhead_blocks",
        "bptt_step_ms",
    }
    plain = run_trial(dataclasses.replace(spec, overhead=QUIET))
    assert reports_of(measured) == reports_of(plain)


def test_an_exploding_rate_diverges_with_the_learners_cause_and_its_place(tmp_path: Path) -> None:
    spec = tcep_spec(optimizer="sgd", lr=1e30)
    result = run_trial(spec, folder=tmp_path)
    assert result.outcome is Outcome.DIVERGED
    assert " at step 2 (epoch 1)" in result.reason
    assert "loss is nan" not in result.reason
    assert metric_names(spec) == metric_names(tcep_spec(optimizer="sgd"))


def test_a_plain_spec_keeps_the_choices_and_moves_nothing() -> None:
    method = tcep_method(
        recirculation="delay",
        gamma=0.3,
        beta="learned",
        probe_cosine=True,
        optimizer="topological_adam",
        coupling="local",
    )
    assert method.plain().params == {
        "recirculation": "delay",
        "beta": "learned",
        "probe_cosine": True,
        "optimizer": "sgd",
        "lr": 0.0,
    }
    assert isinstance(build_method(method.plain()), TcepMethod)


def remarks(file: str | None = None, **space: Any) -> list[str]:
    """What the method says of a shipped space, or of one over these parameters."""
    if file is not None:
        data, lines = read_yaml(Path(file))
    else:
        data, lines = read_yaml(SPACES / "tcep_digits_rolled.yaml")
        data["fixed"] = {"optimizer": "adamw", **space.pop("fixed", {})}
        data["space"], data["warm_start"] = space, []
    specs = corners(parse_search(data, "space.yaml", lines))
    return build_method(specs[0]).remarks(specs)


def choices(*kinds: str) -> dict[str, Any]:
    return {"type": "categorical", "choices": list(kinds)}


RATE = {"type": "float", "low": 0.5, "high": 4.0, "log": True}


@pytest.mark.parametrize("file", sorted(map(str, SPACES.glob("tcep*.yaml"))))
def test_no_shipped_space_searches_one_thing_twice(file: str) -> None:
    assert remarks(file) == []


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"recirculation": choices("ring", "delay", "none"), "lambda": RATE}, "delay"),
        ({"recirculation": choices("delay", "fade"), "lambda": RATE}, "delay and fade"),
        ({"fixed": {"recirculation": "fade"}, "lambda": RATE}, "fade"),
        ({"recirculation": choices("ring", "gain", "shift", "none"), "lambda": RATE}, ""),
        ({"recirculation": choices("delay", "none"), "fixed": {"lambda": 1.0}, "lr": RATE}, ""),
        (
            {
                "recirculation": choices("ring", "delay"),
                "lambda": {**RATE, "when": {"recirculation": "ring"}},
            },
            "",
        ),
    ],
)
def test_delay_and_fade_beside_lambda_are_remarked_on(space: dict[str, Any], named: str) -> None:
    found = remarks(**space)
    assert len(found) == bool(named)
    for remark in found:
        assert remark.startswith(f"recirculation {named}: at rest it stands where 'none' does")
        assert "or fix lambda" in remark


def test_no_optimizer_of_the_registry_clashes_with_tcep() -> None:
    from topotune.optim import OPTIMIZERS, optimizer_options

    own = {*NAMES, OPTIMIZER}
    for name in OPTIMIZERS:
        assert not own & optimizer_options(name).keys(), name
