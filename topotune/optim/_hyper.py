"""The hyperparameters of Topological Adam: their names, bounds and checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

from torch import Tensor

COUPLINGS = ("uniform", "exchange", "local")
ENERGY_CONTROLS = ("exact", "band")
FIELD_INITS = ("tanh_cos", "normal")
ZERO_GRADIENTS = ("move", "hold")

BAND_WIDTH = 10.0
"""``band`` damps fields whose energy is above this multiple of the target."""

BAND_DAMPING = 0.9
"""The factor by which ``band`` damps fields in one step."""

_RANGES: dict[str, tuple[float, float, bool, bool, str]] = {
    # name: low, high, low included, high included, the rule in words
    "lr": (0.0, math.inf, True, False, "a finite number >= 0"),
    "eps": (0.0, math.inf, True, False, "a finite number >= 0"),
    "eta": (0.0, 1.0, True, False, "a number in [0, 1)"),
    "mu0": (0.0, math.inf, False, False, "a finite number > 0"),
    "w_topo": (0.0, math.inf, True, False, "a finite number >= 0"),
    "field_init_scale": (
        0.0,
        math.inf,
        False,
        False,
        "a finite number > 0 (fields that start at zero stay there)",
    ),
    "target_energy": (0.0, math.inf, False, False, "a finite number > 0"),
    "weight_decay": (0.0, math.inf, True, False, "a finite number >= 0"),
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "coupling": COUPLINGS,
    "energy_control": ENERGY_CONTROLS,
    "field_init": FIELD_INITS,
    "zero_gradient": ZERO_GRADIENTS,
}

_FLAGS = ("eps_inside_sqrt", "maximize", "decoupled_weight_decay")
_OPTIONAL_FLAGS = ("foreach", "fused")

STEPS = "steps_taken"
"""Key of every parameter group that counts calls of ``step``."""

ADAM_ONLY = ("amsgrad", "capturable", "differentiable")
"""Flags of torch's Adam that this method does not have: False is taken, True is refused."""

CHECKED = (*_RANGES, *_CHOICES, *_FLAGS, *_OPTIONAL_FLAGS, "betas", "field_seed", "trace_capacity")
"""Every hyperparameter that :func:`check_group` looks at, beside :data:`ADAM_ONLY`."""


def check_group(group: Mapping[str, Any]) -> None:
    """Check every hyperparameter of a parameter group.

    Raises:
        ValueError: a value is of the wrong type, not finite, or outside its bounds; the message
            names the hyperparameter, the value and the bound.
    """
    for name, bounds in _RANGES.items():
        _check_range(name, group[name], *bounds)
    _check_betas(group["betas"], group["eps_inside_sqrt"])
    for name, known in _CHOICES.items():
        if group[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {group[name]!r}")
    for name in _FLAGS:
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")
    for name in _OPTIONAL_FLAGS:
        if group[name] is not None and not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True, False or None, got {group[name]!r}")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach and fused must not both be True, got foreach=True, fused=True")
    if group["foreach"] and isinstance(group["lr"], Tensor):
        raise ValueError("foreach=True takes no tensor as lr: give a number, or fused=True")
    for name in ADAM_ONLY:
        if group.get(name):
            raise ValueError(
                f"{name} must be False: TopologicalAdam does not have this option of "
                f"torch.optim.Adam, got {group[name]!r}"
            )
    _check_whole("field_seed", group["field_seed"], 0)
    _check_whole("trace_capacity", group["trace_capacity"], 1)
    _check_whole(STEPS, group.get(STEPS, 0), 0)


def _check_range(
    name: str, value: object, low: float, high: float, low_in: bool, high_in: bool, rule: str
) -> None:
    number = value
    if name == "lr" and isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        number = value.item()
    if not _is_real(number):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    above = number >= low if low_in else number > low
    below = number <= high if high_in else number < high
    if not (above and below):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _is_real(value: object) -> TypeGuard[float]:
    """A Python or NumPy number: a NaN passes here and fails every comparison with a bound."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_betas(betas: object, eps_inside_sqrt: bool) -> None:
    rule = "betas must be two numbers in [0, 1)"
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"{rule}, got {betas!r}")
    if not all(_is_real(beta) and 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{rule}, got {betas!r}")
    if eps_inside_sqrt and betas[1] == 0.0:
        raise ValueError(f"eps_inside_sqrt=True needs betas[1] > 0, got betas={betas!r}")


def _check_whole(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")
