"""``tanh`` of an affine function of a tensor, as cheaply as single precision allows on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACCURACY = 2.0**-24
"""Largest absolute error of the polynomials: half a rounding of a float32 number near one."""

# A bound of tanh's derivative of order n + 1 over (n + 1)!, for the degrees n = 0, 1, 2, 3:
# the Taylor remainder at distance d is at most REMAINDERS[n] * d**(n + 1).
REMAINDERS = (1.0, 0.385, 1.0 / 3.0, 0.1725)


def degree_for(reach: float) -> int | None:
    """The lowest degree whose Taylor polynomial of tanh is accurate up to a distance of ``reach``.

    Returns:
        A degree from 0 to 3; None if none of them is accurate enough, or ``reach`` is NaN.
    """
    for degree, bound in enumerate(REMAINDERS):
        if bound * reach ** (degree + 1) <= ACCURACY:
            return degree
    return None


def taylor(centre: float, degree: int) -> list[float]:
    """Taylor coefficients of tanh at ``centre``, constant first."""
    t = math.tanh(centre)
    slope = 1.0 - t * t
    return [t, slope, -t * slope, slope * (t * t - slope / 2.0) * 2.0 / 3.0][: degree + 1]


def shifted(coefficients: list[float], scale: float, middle: float) -> list[float]:
    """Coefficients in ``x`` of the polynomial in ``scale * (x - middle)``, constant first."""
    result = [0.0] * len(coefficients)
    for coefficient in reversed(coefficients):  # Horner's scheme on polynomials in x
        stepped = [0.0] * len(result)
        for power, value in enumerate(result):
            stepped[power] -= scale * middle * value
            if power + 1 < len(result):
                stepped[power + 1] += scale * value
        stepped[0] += coefficient
        result = stepped
    return result


def polynomial(tensor: Tensor, coefficients: list[float]) -> Tensor:
    """The polynomial of a tensor, fresh; at least degree 1, constant first.

    One pass for the two highest coefficients and two for each other one.
    """
    first = torch.tensor(coefficients[-2], dtype=tensor.dtype)
    value = torch.add(first, tensor, alpha=coefficients[-1])
    for coefficient in reversed(coefficients[:-2]):
        value.mul_(tensor).add_(coefficient)
    return value
