"""How right the learner's gradients are: against the exact ones, tensor by tensor.

The exact gradient is the implicit one, solved in float64 to rounding on a float64 copy of the same
weights. Recirculation ``gain`` has no equilibrium; there it is automatic differentiation through
the steps, taken until the orbit stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topotune.bench.shared import Columns, table
from topotune.bench.tcep.setup import TRAIN_STEPS, Data, Training, build, train
from topotune.data.splits import TensorPair
from topotune.tcep import probe
from topotune.tcep.baselines import bptt
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import NUDGES, Dynamics, Learning, Solver
from topotune.tcep.probe import resolve

if TYPE_CHECKING:
    from rich.table import Table

BETAS = (0.01, 0.05, 0.1, 0.22, 0.5, 1.0)

GAMMA, KAPPA = 0.3, 0.5
"""Of every recirculation; lambda is 1."""

STEPS = 1000
"""Most steps of a phase. Far above what the tolerances take, so that these alone decide."""

ORBIT_TOLERANCE = 1e-10

DETAIL = 0.1
"""The beta whose relative error and worst tensor are shown; ``--json`` has those of all."""


@dataclass(frozen=True)
class Case:
    """A row of the table: a flow, and whether its asymmetry is corrected in the nudged phase.

    Attributes:
        name: its name.
        network: the name of the network, which several cases may share.
        field: "energy" or "transformer".
        dynamics: without a solver of their own.
        correction: as in :class:`Learning`.
    """

    name: str
    network: str
    field: str
    dynamics: Dynamics
    correction: bool = True


def _recirculating(kind: str, period: float | None = None, time: float | None = None) -> Dynamics:
    return Dynamics(recirculation=kind, gamma=GAMMA, kappa=KAPPA, period=period, time=time)


_PLAIN, _SHIFT = Dynamics(recirculation="none"), _recirculating("shift", 1)

CASES: tuple[Case, ...] = (
    Case("energy", "energy", "energy", _PLAIN),
    Case("energy, ring", "ring", "energy", _recirculating("ring")),
    Case("energy, delay", "delay", "energy", _recirculating("delay", time=1.0)),
    Case("energy, fade", "fade", "energy", _recirculating("fade", time=4.0)),
    Case("energy, gain", "gain", "energy", _recirculating("gain", time=2.0)),
    Case("energy, shift, corrected", "shift", "energy", _SHIFT),
    Case("energy, shift, uncorrected", "shift", "energy", _SHIFT, correction=False),
    Case("transformer, corrected", "transformer", "transformer", _PLAIN),
    Case("transformer, uncorrected", "transformer", "transformer", _PLAIN, correction=False),
)


@dataclass(frozen=True)
class Precision:
    """What the learner computes with.

    Attributes:
        dtype: "float64" or "float32".
        tolerance: of the solver. The learner tightens that of the nudged phase by itself.
    """

    dtype: str
    tolerance: float


PRECISIONS: tuple[Precision, ...] = (
    Precision("float64", 1e-9),
    Precision("float32", Solver().tolerance),
)
"""With rounding and the solver out of the way, and as a training has it."""


@dataclass(frozen=True)
class GradientError:
    """One gradient of the learner against the exact one.

    Attributes:
        case, net, nudge, beta, dtype, tolerance: what was measured; ``net`` is "initialised" or
            "trained".
        cosine: of the whole gradient with the exact one.
        relative_error: norm of their difference over the norm of the exact one.
        smallest_cosine, smallest_name: the least cosine of one parameter tensor's gradient.
        zero_tensors: parameter tensors whose gradient is zero or missing.
        unconverged_share: of the samples, in the free or in the nudged phase.
    """

    case: str
    net: str
    nudge: str
    beta: float
    dtype: str
    tolerance: float
    cosine: float
    relative_error: float
    smallest_cosine: float
    smallest_name: str
    zero_tensors: int
    unconverged_share: float


def run(
    data: Data,
    cases: Sequence[Case] = CASES,
    betas: Sequence[float] = BETAS,
    precisions: Sequence[Precision] = PRECISIONS,
    nudges: Sequence[str] = NUDGES,
    train_steps: int = TRAIN_STEPS,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[list[GradientError], list[Training]]:
    """Every combination, on a fresh network and on the same one after a short training.

    Args:
        data: what the gradients are taken on, and trained on.
        cases, betas, precisions, nudges: the combinations.
        train_steps: length of the training.
        progress: called with what is being measured.
    """
    found: list[GradientError] = []
    trainings: list[Training] = []
    for name in dict.fromkeys(case.network for case in cases):
        mine = [case for case in cases if case.network == name]
        progress(f"gradients: {name}")
        fresh = build(data, mine[0].dynamics, mine[0].field)
        trained, training = train(name, fresh, data, train_steps)
        trainings.append(training)
        for net, network in (("initialised", fresh), ("trained", trained)):
            exact = exact_gradient(network, data.batch)
            for case in mine:
                for precision in precisions:
                    for nudge in nudges:
                        found += [
                            _measure(case, net, network, exact, data.batch, precision, nudge, beta)
                            for beta in betas
                        ]
    return found, trainings


def exact_gradient(network: TCEPNetwork, batch: TensorPair) -> Tensor:
    """The gradient of the mean loss of a batch, one row in float64."""
    if network.recirculation.kind != "gain":
        return probe.exact_gradient(network, batch.inputs, batch.targets)
    # dt stays what it is in the learner: on an orbit, the gradient depends on it.
    twin = resolve(network, torch.float64, name="euler", steps=STEPS, tolerance=ORBIT_TOLERANCE)
    bptt(twin, batch.inputs.double(), batch.targets)
    return probe.flat_gradient(twin)


def _measure(
    case: Case,
    net: str,
    network: TCEPNetwork,
    exact: Tensor,
    batch: TensorPair,
    precision: Precision,
    nudge: str,
    beta: float,
) -> GradientError:
    dtype = getattr(torch, precision.dtype)
    twin = resolve(network, dtype, steps=STEPS, tolerance=precision.tolerance)
    learner = EquilibriumLearner(Learning(nudge=nudge, beta=beta, correction=case.correction))
    contrast = learner.gradients(twin, batch.inputs.to(dtype), batch.targets)
    used = probe.flat_gradient(twin)
    sizes = [parameter.numel() for parameter in twin.parameters()]
    pairs = list(zip(torch.split(used, sizes), torch.split(exact, sizes), strict=True))
    cosines = torch.stack([torch.cosine_similarity(a, b, dim=0, eps=1e-30) for a, b in pairs])
    names = [name for name, _ in twin.named_parameters()]
    return GradientError(
        case=case.name,
        net=net,
        nudge=nudge,
        beta=beta,
        dtype=precision.dtype,
        tolerance=precision.tolerance,
        cosine=float(torch.cosine_similarity(used, exact, dim=0, eps=1e-30)),
        relative_error=float((used - exact).norm() / exact.norm()),
        smallest_cosine=float(cosines.min()),
        smallest_name=names[int(cosines.argmin())],
        zero_tensors=sum(not bool(mine.any()) for mine, _ in pairs),
        unconverged_share=float(contrast.measured["unconverged_share"]),
    )


def _cosine(beta: float) -> Callable[[dict[float, GradientError]], str]:
    return lambda line: f"{line[beta].cosine:.7f}"


def error_table(errors: Sequence[GradientError], net: str) -> Table:
    """Cosines with the exact gradient on one of the two nets, one line a flow, dtype and nudge."""
    lines: dict[tuple[str, str, float, str], dict[float, GradientError]] = {}
    for one in errors:
        if one.net == net:
            key = (one.case, one.dtype, one.tolerance, one.nudge)
            lines.setdefault(key, {})[one.beta] = one
    betas = sorted({one.beta for one in errors})
    detail = DETAIL if DETAIL in betas else betas[0]
    columns: Columns[dict[float, GradientError]] = {
        "flow": lambda line: line[detail].case,
        "dtype": lambda line: line[detail].dtype,
        "tolerance": lambda line: f"{line[detail].tolerance:.0e}",
        "nudge": lambda line: line[detail].nudge,
        **{f"{beta:g}": _cosine(beta) for beta in betas},
        "rel. error": lambda line: f"{line[detail].relative_error:.1e}",
        "least": lambda line: f"{line[detail].smallest_cosine:.6f}",
        "zero": lambda line: str(max(one.zero_tensors for one in line.values())),
        "unconv.": lambda line: f"{max(one.unconverged_share for one in line.values()):.0%}",
    }
    return table(
        f"Cosine of the learner's gradient with the exact one, {net} net, by beta. At beta "
        f"{detail:g}: relative error and least cosine of a parameter tensor. Over all beta: most "
        "tensors with zero gradient, largest unconverged share",
        columns,
        lines.values(),
        words=4,
    )
