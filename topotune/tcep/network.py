"""The network: images to tokens, tokens to a drive, a relaxation to its equilibrium, a readout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from topotune.errors import ConfigError
from topotune.plugins import find_class, is_import_path
from topotune.tcep.energy import EnergyField
from topotune.tcep.fields import Field, build_field, vet_field
from topotune.tcep.options import Dynamics
from topotune.tcep.precision import check_precision, full_precision
from topotune.tcep.recirculation import Memory, build_recirculation
from topotune.tcep.relax import Equilibrium, Noise, relax, unroll
from topotune.tcep.spectral import SpectralCaps, mu_at_caps, one_sided_lipschitz
from topotune.tcep.tokens import Tokens
from topotune.tcep.transformer import TransformerField

FIELDS: dict[str, type[Field]] = {"energy": EnergyField, "transformer": TransformerField}

CHUNK = 512
"""Samples that are relaxed at once when no gradient is wanted."""

REFERENCE_SAMPLES = 8
DEFAULT_FRACTION = 0.3
"""Share of the stable range that gamma takes where the options give neither."""

MINIMUM_STEPS = 4
"""Steps of a phase at least: the drive must reach the hidden units, the nudge the tokens."""


class DrivenFlow:
    """The right-hand side of a batch: a network's flow under the drives of its samples.

    Args:
        network: whose flow.
        drive: (B, N, D).
        recirculate: with the recirculation's term at equilibrium; False leaves it to a memory.
    """

    def __init__(self, network: TCEPNetwork, drive: Tensor, recirculate: bool = True) -> None:
        self.network, self.drive, self.recirculate = network, drive, recirculate

    def __call__(self, state: Tensor) -> Tensor:
        """``ds/dt``, (B, S)."""
        return self.network.flow(state, self.drive, self.recirculate)

    def rows(self, index: Tensor) -> DrivenFlow:
        """The flow of some samples."""
        return DrivenFlow(self.network, self.drive[index], self.recirculate)


class TCEPNetwork(nn.Module):
    """A weight-tied network that is read out at its equilibrium.

    ``dh/dt = field(h, z, u) - lambda h + recirculation(h)`` with the drive
    ``u = tokens(x) W_in + position``; logits are linear in the field's features. The forward pass
    is the free phase. With gradients recorded it is unrolled step by step, so that plain
    backpropagation trains it too.

    Args:
        in_channels, image_size, classes: what the task's data determine.
        tokens: rows, columns or patches of the image.
        patch: pixels a side of a patch.
        width: D, numbers a token.
        heads: attention heads.
        hidden: M, Hopfield units.
        memory: K, columns of the feed-forward memory.
        field: "energy", "transformer", or the import path of a :class:`Field`.
        dynamics: damping, recirculation and solver; None: the defaults.

    Raises:
        ConfigError: a size breaks a rule, a parameter has less than 32 bits, or the dynamics do
            not fit the tokens.
        UnstableError: the dynamics cannot settle.
        UnknownNameError, PluginError: the field is unknown or no field.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        classes: int = 10,
        tokens: str = "rows",
        patch: int = 4,
        width: int = 32,
        heads: int = 2,
        hidden: int = 256,
        memory: int = 64,
        field: str = "energy",
        dynamics: Dynamics | None = None,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "heads": heads, "hidden": hidden, "memory": memory}
        for name, value in {**sizes, "patch": patch, "classes": classes}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"model.{name}", f"must be a whole number, at least 1 (got {value!r})"
                )
        self.dynamics = Dynamics() if dynamics is None else dynamics
        if not isinstance(self.dynamics, Dynamics):
            raise ConfigError(
                "model.dynamics",
                f"is no model option (got {dynamics!r})",
                "Write lambda, gamma, T and the like as parameters of method tcep",
            )
        self.tokens = Tokens(tokens, in_channels, image_size, patch)
        count = self.tokens.count
        facts: dict[str, object] = {
            **sizes,
            "tokens": count,
            "scale": self.dynamics.scale,
            "sharpness": self.dynamics.sharpness,
            "caps": self.dynamics.caps,
        }
        found: type[Field] = find_class("field", field, FIELDS, Field)  # type: ignore[type-abstract]
        self.field = build_field(found, facts)
        if is_import_path(field):
            vet_field(self.field)
        self.embed = nn.Linear(self.tokens.size, width, bias=False)
        nn.init.normal_(self.embed.weight, std=1 / math.sqrt(self.tokens.size))
        self.position = nn.Parameter(0.5 * torch.randn(count, width))
        self.head = nn.Linear(self.field.feature_size, classes)
        check_precision(self)
        self.caps = SpectralCaps(self.field.capped())
        self._take_dynamics()

    def _take_dynamics(self) -> None:
        gamma = self.dynamics.gamma
        if self.dynamics.recirculation == "none":
            gamma = 0.0
        self.reference_mu = math.nan
        if gamma is None:
            gamma = self._stable_gamma()
        self.recirculation = build_recirculation(self.dynamics, self.field.tokens, gamma)
        if self.recirculation.timed:
            self.recirculation.time_step(self.time_step)  # refuses a T_time of too many steps

    @full_precision
    @torch.no_grad()
    def _stable_gamma(self) -> float:
        """A share of the range from 0 to lambda - mu, mu being that under random inputs of unit
        variance; 0 if lambda leaves no range."""
        generator = torch.Generator().manual_seed(0)
        shape = (REFERENCE_SAMPLES, self.tokens.count, self.tokens.size)
        inputs = torch.randn(shape, generator=generator).to(self.position)
        damping, fraction = self.dynamics.damping, self.dynamics.gamma_fraction
        drive = self.embed(inputs) + self.position
        self.reference_mu = mu_at_caps(self.field, drive, damping)
        fraction = DEFAULT_FRACTION if fraction is None else fraction
        return fraction * max(0.0, damping - self.reference_mu)

    @property
    def time_step(self) -> float:
        """Step size of the solvers that step through time."""
        fastest = max(1.0, self.dynamics.damping + abs(self.recirculation.gain))
        return self.dynamics.solver.step / fastest

    @property
    def conservative(self) -> bool:
        """Whether the whole flow, recirculation included, descends an energy."""
        return self.field.conservative and self.recirculation.symmetric

    @full_precision
    def drive(self, inputs: Tensor) -> Tensor:
        """``u``, (B, N, D), of images (B, C, side, side), in the parameters' precision.

        Raises:
            ConfigError: the images have another shape or hold NaN or infinities, or a parameter
                has less than 32 bits.
        """
        check_precision(self)
        own = self.embed.weight.dtype
        if torch.promote_types(inputs.dtype, own) == own:
            inputs = inputs.to(own)
        sequence = self.tokens(inputs)
        if not torch.compiler.is_exporting() and not bool(torch.isfinite(inputs).all()):
            bad = int((~torch.isfinite(inputs)).flatten(1).any(dim=1).sum())
            raise ConfigError(
                "model input",
                f"{bad} of {len(inputs)} samples hold NaN or infinite numbers",
                "Clean the data, or mend the task's prepare or augment",
            )
        drive: Tensor = self.embed(sequence) + self.position
        return drive

    def flow(self, state: Tensor, drive: Tensor, recirculate: bool = True) -> Tensor:
        """``ds/dt`` of the whole network, (B, S).

        Args:
            state: (B, S).
            drive: (B, N, D).
            recirculate: add the recirculation as it acts at an equilibrium.
        """
        h, _ = self.field.split(state)
        linear = -self.dynamics.damping * h
        if recirculate and self.recirculation.gain != 0:
            linear = linear + self.recirculation.term(h)
        flow = self.field.flow(state, drive)
        return flow + self.field.widen(linear)

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        """The energy whose stationary points are the equilibria, (B,).

        Raises:
            TypeError: the field has none.
            ValueError: the recirculation has none.
        """
        h, _ = self.field.split(state)
        total = 0.5 * self.dynamics.damping * h.square().sum(dim=(1, 2))
        total = total - self.recirculation.quadratic(h)
        weight = self.field.metric(state)[:, 0]  # the same number c on all tokens
        return self.field.energy(state, drive) + weight * total

    def logits(self, state: Tensor) -> Tensor:
        """(B, S) to (B, classes)."""
        logits: Tensor = self.head(self.field.features(state))
        return logits

    def memory(self, state: Tensor) -> Memory | None:
        """A past that equals this state, for recirculations that need one."""
        if not self.recirculation.timed:
            return None
        h = state[:, : self.field.tokens * self.field.width]
        return self.recirculation.memory(h, self.time_step)

    def free_flow(self, drive: Tensor) -> DrivenFlow:
        """The right-hand side of the free phase."""
        return DrivenFlow(self, drive, recirculate=not self.recirculation.timed)

    def relax(self, drive: Tensor, noise: Noise | None = None) -> Equilibrium:
        """The free phase, from the field's initial state, without gradients.

        Args:
            drive: (B, N, D).
            noise: disturb the states on the way.
        """
        with torch.no_grad():
            start = self.field.initial(drive)
            return relax(
                self.free_flow(drive),
                start,
                self.dynamics.solver,
                dt=self.time_step,
                memory=self.memory(start),
                min_steps=MINIMUM_STEPS,
                noise=noise,
            )

    def unroll(self, drive: Tensor, noise: Noise | None = None) -> tuple[Tensor, int]:
        """The free phase with its steps recorded by automatic differentiation.

        Returns:
            State (B, S), or orbit (T, B, S), and the number of steps.
        """
        start = self.field.initial(drive)
        state, steps, orbit = unroll(
            self.free_flow(drive),
            start,
            self.dynamics.solver,
            dt=self.time_step,
            min_steps=MINIMUM_STEPS,
            memory=self.memory(start),
            noise=noise,
        )
        return (state if orbit is None else orbit), steps

    @full_precision
    def forward(self, inputs: Tensor) -> Tensor:
        """Images (B, C, side, side) to the logits at their equilibria, (B, classes)."""
        exporting = torch.compiler.is_exporting()
        if torch.is_grad_enabled() and not (torch.is_inference_mode_enabled() or exporting):
            return self.mean_logits(self.unroll(self.drive(inputs))[0])
        parts = []
        for part in [inputs] if exporting else torch.split(inputs, CHUNK):
            found = self.relax(self.drive(part))
            parts.append(self.mean_logits(found.states))
        return torch.cat(parts) if parts else inputs.new_zeros(0, self.head.out_features)

    def mean_logits(self, states: Tensor) -> Tensor:
        """Logits (B, classes) at states (B, S), or their mean over an orbit (T, B, S)."""
        if states.ndim == 2:
            return self.logits(states)
        count, batch, _ = states.shape
        each = self.logits(states.flatten(0, 1))
        return each.view(count, batch, self.head.out_features).mean(dim=0)

    def resolved(self) -> dict[str, float | str]:
        """What the parameters came to: values that the data or the sizes determine."""
        known = self.recirculation
        return {
            "resolved.recirculation": known.kind,
            "resolved.gamma": known.gamma,
            f"resolved.{known.period_name}": known.period,
            "resolved.recirculation_gain": known.gain,
            "resolved.time_step": self.time_step,
            "resolved.mu_at_caps": self.reference_mu,
            "resolved.tokens": self.field.tokens,
        }

    def one_sided_lipschitz(self, drive: Tensor, state: Tensor) -> Tensor:
        """mu of each sample at a state, (B,); see :mod:`topotune.tcep.spectral`."""
        return one_sided_lipschitz(self.field, drive, state)
