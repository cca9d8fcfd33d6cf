"""Hyperparameters are checked; the registry builds by name."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from topotune.errors import ConfigError, PluginError, UnknownNameError
from topotune.optim import (
    OPTIMIZERS,
    TopologicalAdam,
    build_optimizer,
    fastest_adam,
    optimizer_metrics,
    optimizer_options,
    optimizer_trace,
)
from topotune.optim.reference import ReferenceTopologicalAdam

BAD: list[tuple[str, Any, str]] = [
    ("lr", -1.0, ">= 0"),
    ("lr", math.nan, ">= 0"),
    ("lr", math.inf, "finite"),
    ("lr", "0.1", ">= 0"),
    ("lr", True, ">= 0"),
    ("lr", torch.tensor(-0.1), ">= 0"),
    ("lr", torch.tensor([0.1, 0.1]), ">= 0"),
    ("lr", np.float32(-0.1), ">= 0"),
    ("zero_gradient", "stay", "move, hold"),
    ("decoupled_weight_decay", None, "True or False"),
    ("eps", -1e-9, ">= 0"),
    ("eta", 1.0, r"\[0, 1\)"),
    ("eta", -0.1, r"\[0, 1\)"),
    ("eta", math.nan, r"\[0, 1\)"),
    ("mu0", 0.0, "> 0"),
    ("mu0", math.nan, "> 0"),
    ("w_topo", -0.1, ">= 0"),
    ("w_topo", math.inf, "finite"),
    ("field_init_scale", 0.0, "> 0"),
    ("target_energy", 0.0, "> 0"),
    ("target_energy", math.nan, "> 0"),
    ("weight_decay", -0.1, ">= 0"),
    ("betas", (1.0, 0.9), r"\[0, 1\)"),
    ("betas", (0.9, math.nan), r"\[0, 1\)"),
    ("betas", (0.9,), "two numbers"),
    ("betas", 0.9, "two numbers"),
    ("coupling", "unifrom", "uniform, exchange, local"),
    ("energy_control", "none", "exact, band"),
    ("field_init", "zeros", "tanh_cos, normal"),
    ("field_seed", -1, ">= 0"),
    ("field_seed", 0.5, "whole number"),
    ("trace_capacity", 0, ">= 1"),
    ("maximize", 1, "True or False"),
    ("eps_inside_sqrt", None, "True or False"),
    ("foreach", "yes", "None"),
]


@pytest.mark.parametrize("kind", [TopologicalAdam, ReferenceTopologicalAdam])
@pytest.mark.parametrize(("name", "value", "rule"), BAD)
def test_a_bad_value_is_named_with_its_bound(name: str, value: Any, rule: str, kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*{rule}") as caught:
        kind([nn.Parameter(torch.zeros(2))], **{name: value})
    assert repr(value) in str(caught.value)


def test_values_that_exclude_each_other() -> None:
    tensor = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="foreach and fused"):
        TopologicalAdam(tensor, foreach=True, fused=True)
    with pytest.raises(ValueError, match=r"eps_inside_sqrt=True needs betas\[1\] > 0"):
        TopologicalAdam(tensor, betas=(0.9, 0.0), eps_inside_sqrt=True)


def test_names_and_defaults_of_the_published_package() -> None:
    published = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "eta": 0.02,
        "mu0": 0.5,
        "w_topo": 0.15,
        "field_init_scale": 0.01,
        "target_energy": 1e-3,
    }
    parameters = inspect.signature(TopologicalAdam).parameters
    positional = [
        p for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert {p.name: p.default for p in positional[1:]} == published
    assert list(published) == [p.name for p in positional[1:]]
    twin = inspect.signature(ReferenceTopologicalAdam).parameters
    assert {n: p.default for n, p in parameters.items()} == {n: p.default for n, p in twin.items()}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_registered_optimizer_trains(name: str) -> None:
    tensor = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = build_optimizer(name, [tensor], {"lr": 0.05})
    assert type(optimizer) is OPTIMIZERS[name]
    for _ in range(20):
        optimizer.zero_grad()
        tensor.square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert tensor.square().sum().item() < 0.5


def test_options_are_translated() -> None:
    tensor = [nn.Parameter(torch.zeros(2))]
    built = build_optimizer("topological_adam", tensor, {"beta1": 0.7, "coupling": "local"})
    assert built.param_groups[0]["betas"] == (0.7, 0.999)
    assert built.param_groups[0]["coupling"] == "local"
    listed = build_optimizer("adam", tensor, {"betas": [0.5, 0.6]})
    assert listed.param_groups[0]["betas"] == (0.5, 0.6)
    both = build_optimizer("nadam", tensor, {"betas": [0.5, 0.6], "beta2": 0.8})
    assert both.param_groups[0]["betas"] == (0.5, 0.8)


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("topological_adam", {"w_top": 0.1}, ["w_top", "did you mean 'w_topo'"]),
        ("adam", {"eta": 0.1}, ["eta", "adam"]),
        ("adam", {"params": 1}, ["params"]),
        ("sgd", {"beta1": 0.9}, ["beta1"]),
        ("topological_adam", {"lr": -1.0}, ["lr must be", "-1.0"]),
        ("topological_adam", {"beta1": 1.5}, ["betas must be", "1.5"]),
        ("topological_adam", {"betas": 0.9, "beta1": 0.5}, ["betas", "0.9"]),
        ("adam", {"lr": -1.0}, ["-1.0", "adam"]),
        ("adam", {"lr": "fast"}, ["fast", "adam"]),
        ("topological_adam", {"coupling": None}, ["coupling", "None"]),
    ],
)
def test_refused_options_are_named(name: str, options: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(name, [nn.Parameter(torch.zeros(2))], options)
    for part in parts:
        assert part in str(caught.value)


def test_unknown_optimizers() -> None:
    tensor = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(UnknownNameError, match="did you mean 'topological_adam'"):
        build_optimizer("topologcal_adam", tensor, {})
    with pytest.raises(PluginError, match=r"expected a subclass of torch.optim"):
        build_optimizer("torch.nn:Linear", tensor, {})


def test_any_class_by_import_path() -> None:
    path = "topotune.optim.reference:ReferenceTopologicalAdam"
    built = build_optimizer(path, [nn.Parameter(torch.zeros(2))], {"eta": 0.3, "beta2": 0.5})
    assert isinstance(built, ReferenceTopologicalAdam)
    assert built.param_groups[0]["betas"] == (0.9, 0.5)


def test_options_for_introspection() -> None:
    options = optimizer_options("topological_adam")
    assert options["mu0"] == 0.5
    assert options["beta2"] == 0.999
    assert options["coupling"] == "uniform"
    assert "params" not in options
    assert "beta1" not in optimizer_options("sgd")


def test_fastest_adam_is_fused_on_the_cpu() -> None:
    built = fastest_adam([nn.Parameter(torch.zeros(2))], torch.device("cpu"), lr=0.5)
    assert built.param_groups[0]["fused"] is True
    assert built.param_groups[0]["lr"] == 0.5


def test_reports_of_optimizers_that_have_none() -> None:
    tensor = nn.Parameter(torch.zeros(2))
    tensor.grad = torch.ones(2)
    silent, telling = torch.optim.SGD([tensor], lr=0.1), TopologicalAdam([tensor])
    assert optimizer_metrics(silent) == {}
    assert optimizer_trace(silent) is None
    telling.step()
    assert optimizer_metrics(telling)["energy_controlled"] == pytest.approx(1e-3)
    trace = optimizer_trace(telling)
    assert trace is not None
    assert trace.step.tolist() == [1]
