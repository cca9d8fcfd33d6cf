"""The few functions that the energies are made of, with the derivatives that the flows need."""

from __future__ import annotations

import torch
from torch import Tensor

LAYER_NORM_EPS = 1.0
"""Added to the variance. The layer norm's slope is at most 1 / sqrt(eps), which is what bounds the
attention's curvature; much smaller values make the flow stiff."""

SOFTNESS = 1.0
"""``e`` of the smooth ReLU: the width of its bend is sqrt(e). The integral is written for 1."""


def smooth_relu(x: Tensor) -> Tensor:
    """``sigma(x) = (x + sqrt(x^2 + e)) / 2``: positive, increasing, ReLU from afar."""
    root = torch.sqrt(x * x + SOFTNESS)
    return torch.where(x < 0, _tail(x, root), 0.5 * (x + root))


def smooth_relu_slope(x: Tensor) -> Tensor:
    """The derivative of :func:`smooth_relu`, in (0, 1): ``sigma(x) / sqrt(x^2 + e)``."""
    root = torch.sqrt(x * x + SOFTNESS)
    return torch.where(x < 0, _tail(x, root), 0.5 * (x + root)) / root


def _tail(x: Tensor, root: Tensor) -> Tensor:
    """``sigma`` at negative ``x`` without the cancellation of ``x + root``."""
    return 0.5 * SOFTNESS / (root - x.clamp_max(0))


def smooth_relu_integral(x: Tensor) -> Tensor:
    """``Phi`` with ``Phi' = smooth_relu`` and ``Phi(0) = 0``."""
    square = x * x
    root = torch.sqrt(square + SOFTNESS)
    # asinh(x) for e = 1, several times faster than torch's own on a CPU, and as exact: log1p keeps
    # the digits near zero. Not abs(), whose derivative at zero would be wrong here.
    negative = x < 0
    size = torch.log1p(torch.where(negative, -x, x) + square / (1 + root))
    inverse = torch.where(negative, -size, size)
    return 0.25 * (x * (x + root) + inverse)


def layer_norm(h: Tensor) -> tuple[Tensor, Tensor]:
    """``g = (h - mean) / s`` over the last dimension, ``s = sqrt(variance + eps)``, no gain.

    Returns:
        ``g``, shaped as ``h``, and ``1 / s``, (..., 1), for :func:`layer_norm_pullback`.
    """
    centred = h - h.mean(dim=-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + LAYER_NORM_EPS)
    return centred * inverse, inverse


def layer_norm_pullback(slope: Tensor, g: Tensor, inverse: Tensor) -> Tensor:
    """The gradient with respect to ``h`` of a function whose gradient with respect to ``g`` is
    ``slope``; ``g`` and ``inverse`` as :func:`layer_norm` gave them."""
    along = (slope * g).mean(dim=-1, keepdim=True)
    return inverse * (slope - slope.mean(dim=-1, keepdim=True) - g * along)
