"""What a user may set of TCEP: the dynamics of the network and the way it learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from topotune.errors import ConfigError, UnknownNameError

RECIRCULATIONS = ("ring", "delay", "fade", "gain", "shift", "none")
SOLVERS = ("auto", "anderson", "euler", "heun", "dopri5")
GRADIENTS = ("eqprop", "implicit", "adjoint", "bptt", "head")
NUDGES = ("symmetric", "one_sided")
NOISES = ("none", "gaussian", "poisson")
TIMED = ("delay", "fade", "gain")
"""Recirculations that need the states of the past, and so a solver that steps through time."""

LEARNED = "learned"

LOOSEST = 0.1
"""Beyond this tolerance a free phase ends about where it began, and outputs tell nothing of
inputs."""

LARGEST_BETA = 2.0
"""A symmetric nudge breaks down near 1: a negative one rewards a cost that has no upper bound."""


@dataclass(frozen=True)
class Solver:
    """How equilibria are searched.

    Attributes:
        name: "anderson" (acceleration with damped Euler to fall back on), "euler" (damped, fixed
            step), "heun", "dopri5" (torchdiffeq), or "auto": anderson, and euler where the
            recirculation needs the past.
        steps: iterations at most.
        tolerance: a sample has converged when the root mean square of its flow is below this.
        step: step size in units of the fastest decay time; dt = step / max(1, lambda + |gain|).
        fixed: take all steps and count every sample, settled or not. No parameter of a search
            file: it is for measuring what steps cost, not for learning.
    """

    name: str = "auto"
    steps: int = 60
    tolerance: float = 1e-4
    step: float = 0.8
    fixed: bool = False

    def __post_init__(self) -> None:
        _one_of("solver", self.name, SOLVERS)
        _whole("steps", self.steps, 1)
        _real("tolerance", self.tolerance, low=0.0, open_low=True, high=LOOSEST)
        _real("step", self.step, low=0.0, open_low=True, high=1.0)


@dataclass(frozen=True)
class Caps:
    """Largest spectral norms, enforced after every optimizer step; 0 leaves a matrix alone.

    Attributes:
        attention: of W_q and W_k, each head.
        memory: of Xi.
        hidden: of W1.
    """

    attention: float = 0.6
    memory: float = 1.0
    hidden: float = 4.0

    def __post_init__(self) -> None:
        for name in ("attention", "memory", "hidden"):
            _real(f"cap_{name}", getattr(self, name), low=0.0)


@dataclass(frozen=True)
class Dynamics:
    """The flow that a network relaxes by.

    Attributes:
        damping: lambda, the decay rate of the tokens.
        recirculation: ring, delay, fade, gain, shift or none.
        gamma: strength of the recirculation; None: ``gamma_fraction`` says it.
        gamma_fraction: the strength as a share of the stable range; None with ``gamma``.
        kappa: decay of the recirculation, a token (ring) or a unit of time (delay, fade, gain).
        period: T, in tokens, of ring and shift; None: all tokens for ring, 1 for shift.
        time: T_time, in units of time, of delay, fade and gain; None: 4.
        scale: c, the weight of the token energy against the hidden units'.
        sharpness: b, the attention's inverse temperature; None: 1 / sqrt(width of a head).
        solver: how equilibria are searched.
        caps: largest spectral norms.
    """

    damping: float = 1.0
    recirculation: str = "ring"
    gamma: float | None = None
    gamma_fraction: float | None = None
    kappa: float = 0.5
    period: float | None = None
    time: float | None = None
    scale: float = 20.0
    sharpness: float | None = None
    solver: Solver = field(default_factory=Solver)
    caps: Caps = field(default_factory=Caps)

    def __post_init__(self) -> None:
        _real("lambda", self.damping, low=0.0, open_low=True)
        _one_of("recirculation", self.recirculation, RECIRCULATIONS)
        if self.gamma is not None and self.gamma_fraction is not None:
            raise ConfigError(
                "gamma",
                f"is given twice: gamma {self.gamma} and gamma_fraction {self.gamma_fraction}",
                "Keep one; in a search, gamma_fraction stays within the stable range",
            )
        if self.gamma is not None:
            _real("gamma", self.gamma)
        if self.gamma_fraction is not None:
            _real("gamma_fraction", self.gamma_fraction, low=0.0, high=1.0)
        _real("kappa", self.kappa, low=0.0)
        for name, value in (("T", self.period), ("T_time", self.time)):
            if value is not None:
                _real(name, value, low=0.0, open_low=True)
        self._check_unit()
        _real("c", self.scale, low=0.0, open_low=True)
        if self.sharpness is not None:
            _real("sharpness", self.sharpness, low=0.0, open_low=True)
        if self.recirculation in TIMED and self.solver.name in ("anderson", "dopri5"):
            raise ConfigError(
                "solver",
                f"recirculation {self.recirculation!r} needs the states of the past, which "
                f"{self.solver.name!r} does not step through",
                "Choose solver euler, heun or auto",
            )

    def _check_unit(self) -> None:
        """Refuse tokens where a time is meant, and the other way round."""
        kind = self.recirculation
        if kind in TIMED and self.period is not None:
            raise ConfigError(
                "T",
                f"is a number of tokens, of ring and shift; recirculation {kind!r} takes a time, "
                f"T_time (got T {self.period:g})",
                f"Write T_time: {self.period:g}",
            )
        if kind not in (*TIMED, "none") and self.time is not None:
            raise ConfigError(
                "T_time",
                f"is a time, of {', '.join(TIMED)}; recirculation {kind!r} takes a number of "
                f"tokens, T (got T_time {self.time:g})",
                f"Write T: {max(round(self.time), 1)}",
            )


@dataclass(frozen=True)
class Learning:
    """How a network learns.

    Attributes:
        gradient: "eqprop" (free and nudged phase); "implicit" (linear solve at the equilibrium),
            "adjoint" (torchdiffeq's), "bptt" (backpropagation through the steps) as baselines;
            "head": the readout alone learns, on equilibria that stay as initialised (a control).
        beta: strength of the nudge, or "learned".
        nudge: "symmetric" (at +beta and -beta) or "one_sided" (at +beta).
        beta_start: where a learned beta starts.
        beta_bound: largest relative difference of the one-sided and the symmetric gradient that
            a learned beta may cause.
        correction: in a field or recirculation without an energy, correct the nudged flow for
            the asymmetry of its Jacobian.
        noise: state noise while training: none, gaussian or poisson.
        noise_level: its strength; 0 is no noise.
        probe_cosine: report the cosine with the implicit gradient on a probe batch every epoch.
    """

    gradient: str = "eqprop"
    beta: float | str = 0.1
    nudge: str = "symmetric"
    beta_start: float = 0.1
    beta_bound: float = 0.05
    correction: bool = True
    noise: str = "none"
    noise_level: float = 0.0
    probe_cosine: bool = False

    def __post_init__(self) -> None:
        _one_of("gradient", self.gradient, GRADIENTS)
        if isinstance(self.beta, str):
            if self.beta != LEARNED:
                raise ConfigError(
                    "beta", f"must be a number above 0, or {LEARNED!r} (got {self.beta!r})"
                )
        else:
            _real("beta", self.beta, low=0.0, open_low=True, high=LARGEST_BETA)
        _one_of("nudge", self.nudge, NUDGES)
        _real("beta_start", self.beta_start, low=0.0, open_low=True)
        _real("beta_bound", self.beta_bound, low=0.0, open_low=True, high=1.0)
        for name in ("correction", "probe_cosine"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, f"must be true or false (got {getattr(self, name)!r})")
        _one_of("noise", self.noise, NOISES)
        _real("noise_level", self.noise_level, low=0.0)

    @property
    def noisy(self) -> bool:
        """Whether training states are disturbed at all."""
        return self.noise != "none" and self.noise_level > 0


_SOLVER = {"solver": "name", "steps": "steps", "tolerance": "tolerance", "step": "step"}
_CAPS = {f"cap_{f.name}": f.name for f in fields(Caps)}
_DYNAMICS = {
    "lambda": "damping",
    "recirculation": "recirculation",
    "gamma": "gamma",
    "gamma_fraction": "gamma_fraction",
    "kappa": "kappa",
    "T": "period",
    "T_time": "time",
    "c": "scale",
    "sharpness": "sharpness",
}
_LEARNING = {f.name: f.name for f in fields(Learning)}

NAMES = (*_DYNAMICS, *_SOLVER, *_CAPS, *_LEARNING, "field")
"""Every parameter of ``method: tcep`` in a search file, the optimizer's own apart."""


def read_options(params: Mapping[str, Any]) -> tuple[Dynamics, Learning]:
    """The dynamics and the learning that parameters of a search file describe.

    Args:
        params: names of :data:`NAMES` to values; others are ignored.

    Raises:
        ConfigError: a value breaks its rule.
        UnknownNameError: a choice that does not exist.
    """

    def given(names: Mapping[str, str]) -> dict[str, Any]:
        return {inner: params[outer] for outer, inner in names.items() if outer in params}

    dynamics = Dynamics(
        **given(_DYNAMICS), solver=Solver(**given(_SOLVER)), caps=Caps(**given(_CAPS))
    )
    return dynamics, Learning(**given(_LEARNING))


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise UnknownNameError(name, str(value), known)


def _whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(name, f"must be a whole number of at least {low} (got {value!r})")


def _real(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> None:
    rule = "a finite number"
    if low > -math.inf:
        rule += f" above {low:g}" if open_low else f" of at least {low:g}"
    if high < math.inf:
        rule += f" and at most {high:g}"
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if right:
        assert isinstance(value, int | float)
        right = (low < value if open_low else low <= value) and value <= high
    if not right:
        raise ConfigError(name, f"must be {rule} (got {value!r})")
