"""A user's field, tried on three random samples before anything is trained with it."""

from __future__ import annotations

import torch
from torch import Tensor

from topotune.errors import PluginError
from topotune.tcep.fields import Capped, Field, energy_flow

SAMPLES = 3
APART = 1e-3
"""Relative difference that rounding in float32 does not explain."""


def vet_field(field: Field) -> None:
    """Raise if a field does not keep what its interface promises.

    Looks at shapes, at whether samples are independent of each other, and at whether a flow
    written by hand is that of the energy. :class:`topotune.testing.EnergyContract` looks closer.

    Raises:
        PluginError: it does not, or its code fails; names the method and the rule.
    """
    kind = type(field).__name__
    generator = torch.Generator().manual_seed(0)
    drive = torch.randn(SAMPLES, field.tokens, field.width, generator=generator)
    drive = drive.to(torch.get_default_dtype())
    doing = "initial"
    try:
        with torch.no_grad():
            state = field.initial(drive)
            _shaped(kind, "initial", state, (SAMPLES, field.size))
            state = state + 0.1 * torch.randn(state.shape, generator=generator).to(state)
            doing = "metric"
            _shaped(kind, doing, field.metric(state), (SAMPLES, field.size))
            doing = "features"
            _shaped(kind, doing, field.features(state), (SAMPLES, field.feature_size))
            if field.conservative:
                doing = "energy"
                _shaped(kind, doing, field.energy(state, drive), (SAMPLES,))
            doing = "flow"
            flow = field.flow(state, drive)
            _shaped(kind, doing, flow, (SAMPLES, field.size))
            if not _close(flow[:1], field.flow(state[:1], drive[:1])):
                raise PluginError(
                    f"field {kind}: flow() of a sample changes with the others in its batch; "
                    "each sample must stand for itself"
                )
            if field.conservative and not _close(flow, energy_flow(field, state, drive)):
                raise PluginError(
                    f"field {kind}: flow() is not -(1/metric) times the gradient of energy(). "
                    "Mend one of them, or leave flow() to automatic differentiation"
                )
        doing = "capped"
        for item in field.capped():
            if not isinstance(item, Capped):
                raise PluginError(
                    f"field {kind}: capped() must give Capped(weight, cap), got a "
                    f"{type(item).__name__}"
                )
            item.check(kind)
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(
            f"field {kind}: {doing}() fails on {SAMPLES} samples of {field.tokens} tokens of "
            f"width {field.width}: {type(error).__name__}: {error}. A field needs energy(), or "
            "conservative = False and a flow(); see topotune/tcep/README.md"
        ) from error


def _shaped(kind: str, method: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise PluginError(
            f"field {kind}: {method}() must give shape {shape} for {SAMPLES} samples, got "
            f"{tuple(value.shape)}"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding; numbers that are not finite are judged in training, with their cause."""
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return True
    return bool((a - b).norm() <= APART * (a.norm() + b.norm()))
