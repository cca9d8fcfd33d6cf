"""What the solvers take to a residual: flow evaluations and time of one free phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topotune.bench.shared import alternate, median_and_spread, table
from topotune.bench.tcep.setup import TRAIN_STEPS, Data, Training, build, train
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Dynamics
from topotune.tcep.probe import resolve
from topotune.tcep.relax import Equilibrium

if TYPE_CHECKING:
    from rich.table import Table

SOLVERS = ("anderson", "euler", "heun", "dopri5")
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
DAMPINGS = (0.5, 1.0, 2.0)
ROUNDS = 5

STEPS = 200
"""Most steps; what has not converged by then is reported as that."""


@dataclass(frozen=True)
class SolverCost:
    """One solver to one residual, on one batch in float32.

    Attributes:
        net: "initialised" or "trained".
        damping: lambda.
        gamma: of the ring, as the network resolved it for this lambda.
        tolerance: on the root mean square of the flow.
        solver: its name.
        evaluations_mean, evaluations_max: flow evaluations a sample.
        converged_share: samples that reached the tolerance.
        milliseconds, spread: median time of the batch, and the distance of the quartiles.
    """

    net: str
    damping: float
    gamma: float
    tolerance: float
    solver: str
    evaluations_mean: float
    evaluations_max: float
    converged_share: float
    milliseconds: float
    spread: float


def run(
    data: Data,
    solvers: Sequence[str] = SOLVERS,
    tolerances: Sequence[float] = TOLERANCES,
    dampings: Sequence[float] = DAMPINGS,
    rounds: int = ROUNDS,
    train_steps: int = TRAIN_STEPS,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[list[SolverCost], list[Training]]:
    """Every combination, on a fresh network and on the same one after a short training."""
    found: list[SolverCost] = []
    trainings: list[Training] = []
    for damping in dampings:
        progress(f"solvers: lambda {damping:g}")
        fresh = build(data, Dynamics(damping=damping))
        trained, training = train(f"lambda {damping:g}", fresh, data, train_steps)
        trainings.append(training)
        for net, network in (("initialised", fresh), ("trained", trained)):
            with torch.no_grad():
                drive = network.drive(data.batch.inputs)
            for tolerance in tolerances:
                found += _measure(net, network, drive, tolerance, solvers, rounds)
    return found, trainings


def _measure(
    net: str,
    network: TCEPNetwork,
    drive: Tensor,
    tolerance: float,
    solvers: Sequence[str],
    rounds: int,
) -> list[SolverCost]:
    ends: dict[str, Equilibrium] = {}

    def contender(name: str) -> Callable[[], None]:
        twin = resolve(network, None, name=name, steps=STEPS, tolerance=tolerance)

        def relax() -> None:
            ends[name] = twin.relax(drive)

        return relax

    seconds = alternate({name: contender(name) for name in solvers}, rounds, drive.device)
    costs = []
    for name in solvers:
        ended = ends[name]
        middle, spread = median_and_spread(seconds[name])
        costs.append(
            SolverCost(
                net=net,
                damping=network.dynamics.damping,
                gamma=network.recirculation.gamma,
                tolerance=tolerance,
                solver=name,
                evaluations_mean=float(ended.nfe.float().mean()),
                evaluations_max=float(ended.nfe.max()),
                converged_share=float(ended.converged.float().mean()),
                milliseconds=1e3 * middle,
                spread=1e3 * spread,
            )
        )
    return costs


def cost_table(costs: Sequence[SolverCost], net: str) -> Table:
    """Evaluations and time to a residual on one of the two nets."""
    return table(
        f"One free phase, {net} net, float32, median of alternating rounds",
        {
            "lambda": lambda cost: f"{cost.damping:g}",
            "gamma": lambda cost: f"{cost.gamma:.3f}",
            "residual": lambda cost: f"{cost.tolerance:.0e}",
            "solver": lambda cost: cost.solver,
            "evaluations, mean": lambda cost: f"{cost.evaluations_mean:.1f}",
            "max": lambda cost: f"{cost.evaluations_max:.0f}",
            "converged": lambda cost: f"{cost.converged_share:.0%}",
            "ms": lambda cost: f"{cost.milliseconds:.1f}",
            "IQR": lambda cost: f"{cost.spread:.1f}",
        },
        [cost for cost in costs if cost.net == net],
        words=4,
    )
