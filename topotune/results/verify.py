"""Whether a second training of an exported config gave the recorded metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from topotune.errors import UnknownNameError, VerificationError


@dataclass(frozen=True)
class Verification:
    """A comparison that held.

    Attributes:
        metric: which metric was compared.
        recorded, reproduced: its two values.
        device: where the second training ran.
        exact: whether the two are the same number, not merely within a tolerance.
    """

    metric: str
    recorded: float
    reproduced: float
    device: str
    exact: bool

    @property
    def difference(self) -> float:
        """Reproduced minus recorded."""
        return self.reproduced - self.recorded


def verify(
    recorded: Mapping[str, float],
    reproduced: Mapping[str, float],
    metric: str,
    device: str,
    *,
    tolerance: float = 0.0,
    differs: Sequence[str] = (),
) -> Verification:
    """Compare one metric of two trainings: the same number on a CPU, within ``tolerance`` else.

    Args:
        recorded: metrics of the trial.
        reproduced: metrics of the second training.
        metric: which to compare.
        device: where the second training ran: "cpu", "cuda" or "cuda:N"; or "auto, " and
            one of these, where the first one may have run on another.
        tolerance: largest absolute difference accepted off the CPU, where kernels may add in
            another order at every run; a CPU repeats exactly and gets none.
        differs: what is known to be another than in the first training, in words.

    Raises:
        UnknownNameError: one side has no such metric.
        VerificationError: the two differ, or the recorded one is not a finite number; the text
            names both.
    """
    for metrics, kind in ((recorded, "recorded metric"), (reproduced, "reproduced metric")):
        if metric not in metrics:
            raise UnknownNameError(kind, metric, metrics)
    first, second = float(recorded[metric]), float(reproduced[metric])
    allowed = 0.0 if device.partition(":")[0] == "cpu" else tolerance
    # NaN on either side, or infinity on both, makes the difference NaN, which fails too
    if not abs(second - first) <= allowed:
        why = (
            f"Not as it was recorded: {'; '.join(differs)}"
            if differs
            else "Code, data, kernels and versions are as they were recorded, as far as that was "
            "done. The same machine, device and thread count repeat a training"
        )
        raise VerificationError(
            f"{metric}: recorded {first!r}, reproduced {second!r} on {device} (difference "
            f"{second - first!r}, allowed {allowed!r}). {why}"
        )
    return Verification(metric, first, second, device, exact=first == second)
