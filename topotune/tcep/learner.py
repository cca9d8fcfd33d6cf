"""The learner: free and nudged phases to ``.grad``, with what happened on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from topotune.errors import ConfigError
from topotune.tcep import probe
from topotune.tcep.baselines import ADJOINT_FAILED, adjoint, bptt, head_only
from topotune.tcep.gradients import (
    Contrast,
    eqprop,
    free_phase,
    implicit,
    measure_free,
    second_difference,
)
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.nudging import COARSEST_SHARE
from topotune.tcep.options import LEARNED, TIMED, Learning
from topotune.tcep.precision import full_precision
from topotune.tcep.relax import Noise

ADAPT_EVERY = 5
"""Steps between two looks at a learned beta."""
BETA_RANGE = (5e-3, 1.0)
"""Where a learned beta stays: rounding below, the symmetric rule's own breakdown above."""
RESOLVED = 0.4
"""Rounding makes a gap of about half of this over the nudge's resolution."""
LEARNT = 0.2
"""A cost that pulls with less than this share of its first pull has little left to teach, and
drowns in rounding for a good reason."""


class EquilibriumLearner:
    """Turns batches into gradients as :class:`Learning` says.

    Relaxing looks at residuals on the host to stop early; all else stays on the device.

    Args:
        learning: gradient, nudge, noise.

    Raises:
        ConfigError: the options contradict each other.
    """

    def __init__(self, learning: Learning) -> None:
        self.learning = learning
        start = learning.beta_start if learning.beta == LEARNED else float(learning.beta)
        self._beta = torch.tensor(start, dtype=torch.float64)
        self._steps = 0
        self._first_force: float | None = None
        adapts = learning.beta == LEARNED
        if adapts and (learning.gradient != "eqprop" or learning.nudge != "symmetric"):
            raise ConfigError(
                "beta",
                "'learned' compares the one-sided with the symmetric gradient of eqprop "
                f"(got gradient {learning.gradient!r}, nudge {learning.nudge!r})",
                "Choose gradient eqprop with nudge symmetric, or a number for beta",
            )
        if learning.noisy and learning.gradient in ("implicit", "adjoint"):
            raise ConfigError(
                "noise",
                f"gradient {learning.gradient!r} needs an equilibrium, which noise leaves none of",
                "Choose gradient eqprop or bptt, or noise none",
            )

    @property
    def beta(self) -> float:
        """The present strength of the nudge."""
        return float(self._beta)

    def check(self, network: TCEPNetwork) -> None:
        """Check that this way of learning and this network fit.

        Raises:
            ConfigError: they do not.
        """
        kind, gradient = network.recirculation.kind, self.learning.gradient
        if (kind == "gain" and gradient in ("implicit", "adjoint")) or (
            kind in TIMED and gradient == "adjoint"
        ):
            raise ConfigError(
                "gradient",
                f"{gradient!r} is not defined with recirculation {kind!r}, "
                + ("which has no fixed point" if kind == "gain" else "which looks into the past"),
                "Choose gradient eqprop or bptt",
            )
        if self.learning.beta == LEARNED and not network.conservative:
            raise ConfigError(
                "beta",
                "'learned' needs an energy, which this field or recirculation has not",
                "Give beta a number",
            )

    @full_precision
    def gradients(self, network: TCEPNetwork, inputs: Tensor, targets: Tensor) -> Contrast:
        """Write the gradient of the batch's mean cross-entropy into ``.grad``.

        Of eqprop, implicit and head it is the mean over the samples that settled, and where none
        did no parameter gets one: there is no step to take. bptt and adjoint differentiate what
        was computed, settled or not.

        Args:
            network: in training mode, its gradients cleared.
            inputs: images, (B, C, side, side).
            targets: (B,) int64 class numbers.

        Raises:
            ConfigError: the inputs have a wrong shape, are not finite, or are no samples at all,
                or a parameter has less than 32 bits.
        """
        if not len(inputs):
            raise ConfigError(
                "model input",
                "must be at least one sample, for a gradient (got an empty batch)",
                "Leave empty batches out",
            )
        learning = self.learning
        noise = self._noise(inputs.device)
        if learning.gradient == "bptt":
            return bptt(network, inputs, targets, noise)
        if learning.gradient == "adjoint":
            return adjoint(network, inputs, targets)
        phase = free_phase(network, inputs, targets, noise)
        measured = measure_free(network, phase)
        if learning.gradient == "implicit":
            measured |= implicit(network, phase)
        elif learning.gradient == "head":
            measured |= head_only(network, phase)
        else:
            self._beta = self._beta.to(phase.logits)
            adapt = learning.beta == LEARNED and self._steps % ADAPT_EVERY == 0
            found, phases = eqprop(
                network, phase, learning, self._beta, third=adapt, noise=noise and noise.again()
            )
            measured |= found
            if learning.beta == LEARNED:
                measured["beta"] = self._beta.clone()
            if adapt:
                gap = second_difference(network, inputs, phases, self._beta)
                self._adapt(gap, phases.resolution)
        self._steps += 1
        loss = F.cross_entropy(phase.logits, targets)
        return Contrast(loss, phase.logits, measured)

    def after_step(self, network: TCEPNetwork) -> None:
        """Bring spectral norms back below their caps, where anything but the head moves."""
        if self.learning.gradient != "head":
            network.caps()

    def epoch_metrics(
        self, network: TCEPNetwork, inputs: Tensor, targets: Tensor
    ) -> dict[str, float]:
        """Margins of a probe batch, and the gradient's cosine if asked for.

        There is no cosine for recirculation ``gain``: on an orbit there is no implicit gradient.
        """
        found = probe.margins(network, inputs)
        exact = network.recirculation.kind != "gain"
        if self.learning.probe_cosine and self.learning.gradient == "eqprop" and exact:
            found["gradient_cosine"] = probe.gradient_cosine(
                network, inputs, targets, self.learning, self._beta
            )
        return found

    def relaxation(self, network: TCEPNetwork, inputs: Tensor) -> dict[str, np.ndarray]:
        """One relaxation of a probe batch, step by step."""
        return probe.relaxation(network, inputs)

    def fault(self, columns: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
        """The first step that training cannot go on from, and why; None if all steps are sound.

        Args:
            columns: what :meth:`gradients` measured, by name, one value a step.
        """
        found: list[tuple[int, str]] = []
        diverged = columns.get("diverged_share", np.zeros(0))
        # NaN is a divergence too, so the comparison is the other way round.
        bad = np.flatnonzero(~(diverged <= 0))
        if bad.size:
            share = float(diverged[bad[0]])
            found.append(
                (
                    int(bad[0]),
                    f"the relaxation of {share:.0%} of the samples left the "
                    "finite numbers: lambda is too small for mu and the recirculation, the "
                    "learning rate too large, or the field itself gives no number",
                )
            )
        failed = np.flatnonzero(columns.get(ADJOINT_FAILED, np.zeros(0)) > 0)
        if failed.size:
            found.append(
                (
                    int(failed[0]),
                    "the adjoint equation could not be integrated: it retraces the contracting "
                    "flow backwards, where errors grow exponentially with the time. Lower steps, "
                    "or choose gradient implicit",
                )
            )
        silent = self._silent(columns)
        if silent is not None:
            found.append(silent)
        return min(found) if found else None

    def _silent(self, columns: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
        """The first step whose nudge drowns in rounding while there is still much to learn."""
        if "nudge_resolution" not in columns:
            return None
        resolution, force = columns["nudge_resolution"], columns["nudge_force"]
        if self._first_force is None and force.size:
            self._first_force = float(force[0])
        found = np.flatnonzero((resolution < 1) & (force > LEARNT * (self._first_force or 0.0)))
        if not found.size:
            return None
        step = int(found[0])
        pull = self.beta * float(force[step])
        return step, (
            f"the nudged phase does not move: beta {self.beta:.3g} pulls with {pull:.2g} (RMS), "
            f"and {COARSEST_SHARE:g} of that is {1 / max(float(resolution[step]), 1e-30):.2g} "
            "times below what rounding lets a relaxation resolve. Raise beta, or use float64"
        )

    def state_dict(self) -> dict[str, Any]:
        """The learned beta, its clock, and the first pull of the cost."""
        return {"beta": self.beta, "steps": self._steps, "first_force": self._first_force}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            KeyError: the state is another learner's.
        """
        self._beta = torch.tensor(float(state["beta"]), dtype=torch.float64)
        self._steps = int(state["steps"])
        self._first_force = state["first_force"]

    def _adapt(self, gap: Tensor, resolution: Tensor) -> None:
        """Move beta so that the gap, which grows in proportion, meets its bound.

        Where rounding makes the gap, it grows as beta falls, and lowering beta would never end:
        there beta rises to what rounding resolves.
        """
        bound = self.learning.beta_bound
        wanted = (bound / gap.clamp_min(1e-12)).clamp(0.25, 4.0).sqrt()
        resolved = (RESOLVED / bound / resolution).clamp_max(2.0)
        factor = torch.maximum(wanted, resolved).nan_to_num(nan=1.0)  # 0 / 0: all is learnt
        self._beta = (self._beta * factor.to(self._beta)).clamp(*BETA_RANGE)

    def _noise(self, device: torch.device) -> Noise | None:
        """Noise from a seed that the global CPU generator draws, which checkpoints save."""
        if not self.learning.noisy:
            return None
        seed = int(torch.randint(2**62, ()))
        generator = torch.Generator(device).manual_seed(seed)
        return Noise(self.learning.noise, self.learning.noise_level, generator)
