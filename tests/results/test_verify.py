"""The comparison of a second training with the recorded metric."""

from __future__ import annotations

import math

import pytest

from topotune.errors import UnknownNameError, VerificationError
from topotune.results.verify import verify


@pytest.mark.parametrize(
    ("first", "second", "device", "tolerance"),
    [
        (0.5, math.nextafter(0.5, 1), "cpu", 0.0),
        (0.5, 0.5001, "cpu", 0.1),  # a CPU gets no tolerance
        (0.5, 0.5001, "cuda:0", 0.0),
        (0.5, 0.62, "cuda", 0.1),
        (math.nan, math.nan, "cpu", 0.0),
        (math.inf, math.inf, "cpu", 0.0),
        (0.5, math.nan, "cuda", 9.0),
    ],
)
def test_a_different_metric_fails_and_names_both(
    first: float, second: float, device: str, tolerance: float
) -> None:
    with pytest.raises(VerificationError) as caught:
        verify({"m": first}, {"m": second}, "m", device, tolerance=tolerance)
    text = str(caught.value)
    assert f"recorded {first!r}, reproduced {second!r} on {device}" in text


def test_a_gpu_may_differ_within_a_stated_tolerance() -> None:
    found = verify({"m": 0.5}, {"m": 0.5001}, "m", "cuda:1", tolerance=1e-3)
    assert not found.exact
    assert found.difference == pytest.approx(1e-4)


def test_what_is_known_to_differ_is_named() -> None:
    with pytest.raises(VerificationError, match="Not as it was recorded: a has changed; torch was"):
        verify({"m": 1}, {"m": 2}, "m", "cpu", differs=["a has changed", "torch was 1, is 2"])
    with pytest.raises(VerificationError, match="kernels and versions are as they were recorded"):
        verify({"m": 1}, {"m": 2}, "m", "cpu")


@pytest.mark.parametrize(("first", "second"), [({}, {"m": 1.0}), ({"m": 1.0}, {"n": 1.0})])
def test_a_missing_metric_is_named(first: dict[str, float], second: dict[str, float]) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown (recorded|reproduced) metric 'm'"):
        verify(first, second, "m", "cpu")
