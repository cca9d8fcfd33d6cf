"""Optimizers by name: Topological Adam, torch's own, and any class by import path."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from topotune.errors import ConfigError, TopotuneError, did_you_mean, in_one_line
from topotune.optim.measures import EnergyTrace
from topotune.optim.state import FUSED_KERNELS
from topotune.optim.topological_adam import TopologicalAdam
from topotune.plugins import accepted_names, find_class

__all__ = [
    "OPTIMIZERS",
    "EnergyTrace",
    "TopologicalAdam",
    "build_optimizer",
    "fastest_adam",
    "optimizer_metrics",
    "optimizer_options",
    "optimizer_trace",
]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "topological_adam": TopologicalAdam,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "nadam": torch.optim.NAdam,
}

_BETAS = ("beta1", "beta2")
_PLACE = "method"


@runtime_checkable
class Measured(Protocol):
    """An optimizer that reports numbers of its own once an epoch."""

    def metrics(self) -> dict[str, float]:
        """Name to value, of the last step."""


@runtime_checkable
class Traced(Protocol):
    """An optimizer that records numbers at every step."""

    def energy_trace(self) -> EnergyTrace:
        """The steps since the last call."""


def optimizer_class(name: str) -> type[Optimizer]:
    """The class that a search file's ``method`` names.

    Raises:
        UnknownNameError: no registry entry, and not of the form ``package.module:Class``.
        PluginError: the import path does not lead to a torch optimizer.
    """
    return find_class("method", name, OPTIMIZERS, Optimizer)


def optimizer_options(name: str) -> dict[str, Any]:
    """Keyword argument to default of an optimizer; ``beta1`` and ``beta2`` stand for ``betas``."""
    found = optimizer_class(name)
    parameters = inspect.signature(found).parameters
    names, _ = accepted_names(found)
    options = {name: parameters[name].default for name in names if name != "params"}
    betas = options.get("betas")
    if isinstance(betas, tuple) and len(betas) == 2:
        options |= dict(zip(_BETAS, betas, strict=True))
    return options


def build_optimizer(
    name: str, params: Iterable[Tensor], options: Mapping[str, object]
) -> Optimizer:
    """The optimizer of a search file.

    Args:
        name: a registry name or an import path.
        params: the tensors to train.
        options: keyword arguments. ``beta1`` and ``beta2`` replace the parts of ``betas``; a list
            becomes a tuple.

    Raises:
        UnknownNameError: the name is unknown.
        PluginError: the import path does not lead to a torch optimizer.
        ConfigError: an option is unknown, or the constructor refuses a value or fails.
    """
    tensors = list(params)
    try:
        return _construct(name, tensors, options)
    except (TopotuneError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:  # code of a user may raise anything
        said = str(error) if isinstance(error, TypeError | ValueError) else in_one_line(error)
        option = _refused(name, tensors, options, str(error))
        if option is None:
            place, got = f"{_PLACE} parameters", str(dict(options))
        else:
            place, got = f"{_PLACE} parameter {option}", repr(options[option])
        got = "" if got in said else f" (got {got})"
        raise ConfigError(place, f"{name}: {said}{got}") from error


def _refused(
    name: str, tensors: list[Tensor], options: Mapping[str, object], said: str
) -> str | None:
    """The one option whose absence makes the constructor succeed, or else fail in another way."""
    succeed: list[str] = []
    differ: list[str] = []
    for option in options:
        rest = {key: value for key, value in options.items() if key != option}
        try:
            _construct(name, tensors, rest)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is compared, whatever it is
            if str(error) != said:
                differ.append(option)
        else:
            succeed.append(option)
    found = succeed or differ
    return found[0] if len(found) == 1 else None


def _construct(name: str, tensors: list[Tensor], options: Mapping[str, object]) -> Optimizer:
    """The optimizer, or what its constructor raises.

    Raises:
        ConfigError: an option is unknown.
    """
    found = optimizer_class(name)
    known = optimizer_options(name)
    _, open_ended = accepted_names(found)
    for option in options:
        if option not in known and not open_ended:
            raise ConfigError(
                f"{_PLACE} parameter {option}",
                f"{name} takes no {option!r}{did_you_mean(option, known)}",
            )
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    parts = {key: arguments.pop(key) for key in _BETAS if key in arguments}
    if parts:
        betas = arguments.get("betas", known.get("betas", (0.9, 0.999)))
        if not isinstance(betas, tuple) or len(betas) != 2:
            raise ConfigError(f"{_PLACE} parameter betas", f"must be two numbers (got {betas!r})")
        arguments["betas"] = (parts.get("beta1", betas[0]), parts.get("beta2", betas[1]))
    return found(tensors, **arguments)  # type: ignore[arg-type]


def fastest_adam(params: Iterable[Tensor], device: torch.device, lr: float) -> torch.optim.Adam:
    """``torch.optim.Adam`` in the fastest variant that torch has on the device.

    One fused kernel where the device and every tensor's type have one, else the multi-tensor
    variant.
    """
    tensors = list(params)
    fused = device.type in FUSED_KERNELS and all(tensor.is_floating_point() for tensor in tensors)
    return torch.optim.Adam(tensors, lr=lr, fused=True if fused else None)


def optimizer_metrics(optimizer: Optimizer) -> dict[str, float]:
    """What the optimizer reports of its last step; empty for one that reports nothing."""
    return optimizer.metrics() if isinstance(optimizer, Measured) else {}


def optimizer_trace(optimizer: Optimizer) -> EnergyTrace | None:
    """The per-step values since the last call; None for an optimizer that keeps none."""
    return optimizer.energy_trace() if isinstance(optimizer, Traced) else None
