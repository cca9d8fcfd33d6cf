"""The hyperparameters of Topological Adam: their names, bounds and checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

COUPLINGS = ("uniform", "exchange", "local")
ENERGY_CONTROLS = ("exact", "band")
FIELD_INITS = ("tanh_cos", "normal")

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
}


def check_group(group: Mapping[str, Any]) -> None:
    """Check every hyperparameter of a parameter group.

    Raises:
        ValueError: a value is of the wrong type, not finite, or outside its bounds; the message
            names the hyperparameter, the value and the bound.
    """
    for name, (low, high, low_in, high_in, rule) in _RANGES.items():
        value = group[name]
        if not _is_real(value):
            raise ValueError(f"{name} must be {rule}, got {value!r}")
        above = value >= low if low_in else value > low
        below = value <= high if high_in else value < high
        if not (above and below):
            raise ValueError(f"{name} must be {rule}, got {value!r}")
    _check_betas(group["betas"], group["eps_inside_sqrt"])
    for name, known in _CHOICES.items():
        if group[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {group[name]!r}")
    for name in ("eps_inside_sqrt", "maximize"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")
    for name in ("foreach", "fused"):
        if group[name] is not None and not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True, False or None, got {group[name]!r}")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach and fused must not both be True, got foreach=True, fused=True")
    _check_whole("field_seed", group["field_seed"], 0)
    _check_whole("trace_capacity", group["trace_capacity"], 1)


def _is_real(value: object) -> bool:
    """A plain Python number: a NaN passes here and fails every comparison with a bound."""
    return isinstance(value, int | float) and not isinstance(value, bool)


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
