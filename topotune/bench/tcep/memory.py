"""What one gradient costs, in memory and time, against the number of steps.

Every phase of ``eqprop``, ``implicit`` and ``bptt`` makes exactly the steps that are asked for,
damped Euler steps, whether it has converged or not: a step costs the same wherever it is.
``adjoint`` chooses its own steps; it integrates over the time that so many steps of the default
length cover, to the default tolerance. Its way back follows the states backwards in time, where a
flow that contracts explodes; where that ends it, the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from topotune.bench.shared import (
    Columns,
    alternate,
    median_and_spread,
    number,
    ratio,
    table,
)
from topotune.bench.tcep.setup import Data, build
from topotune.data.splits import TensorPair
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Dynamics, Learning, Solver
from topotune.tcep.probe import resolve

if TYPE_CHECKING:
    from rich.table import Table

GRADIENTS = ("eqprop", "implicit", "adjoint", "bptt")
STEPS = (10, 30, 100, 300, 1000)
ROUNDS = 5

DIVERGED = "diverged"


@dataclass(frozen=True)
class GradientCost:
    """One way to a gradient at one number of steps.

    Attributes:
        gradient, steps: what was measured.
        failure: why there is no gradient, and so no figures; empty if there is one.
        evaluations_free: mean flow evaluations a sample of the first phase.
        evaluations_second: of the nudged phase, the linear solve, or the way back of adjoint;
            None for bptt, whose backward pass has none. Symmetric eqprop makes each of them at
            both nudges.
        saved_bytes: most bytes that automatic differentiation kept for backward at one time,
            parameters and inputs not counted.
        peak_bytes: most memory that torch took on the GPU beyond what was there before; None on
            the CPU.
        milliseconds, spread: median time of one gradient, and the distance of the quartiles.
        vs_bptt: median over the rounds of the ratio to bptt at as many steps; None without bptt.
    """

    gradient: str
    steps: int
    failure: str = ""
    evaluations_free: float | None = None
    evaluations_second: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    milliseconds: float | None = None
    spread: float | None = None
    vs_bptt: float | None = None


class SavedBytes:
    """Counts what automatic differentiation keeps for backward while this is entered.

    A storage counts once, however many tensors of it are kept and for as long as one of them is.

    Attributes:
        now, peak: bytes that are kept at present, and the most that were at one time.

    Args:
        apart: tensors whose storages do not count, as they live anyway.
    """

    def __init__(self, apart: Sequence[Tensor]) -> None:
        self.now, self.peak = 0, 0
        self._apart = {_storage(tensor) for tensor in apart}
        self._kept: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor
        )

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def keep(self, tensor: Tensor) -> None:
        """A tensor is kept from now on."""
        key = _storage(tensor)
        if key in self._apart:
            return
        self._kept[key] = self._kept.get(key, 0) + 1
        if self._kept[key] == 1:
            self.now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)

    def release(self, tensor: Tensor) -> None:
        """It is kept once less."""
        key = _storage(tensor)
        if key in self._apart:
            return
        self._kept[key] -= 1
        if self._kept[key] == 0:
            del self._kept[key]
            self.now -= tensor.untyped_storage().nbytes()


class _Kept:
    """What the graph holds instead of a tensor; it goes when the graph lets go of it."""

    def __init__(self, counter: SavedBytes, tensor: Tensor) -> None:
        # Detached, or a tensor that its own node saves would keep that node for ever.
        self.tensor = tensor.detach()
        self._counter = counter
        counter.keep(self.tensor)

    def __del__(self) -> None:
        self._counter.release(self.tensor)


def _storage(tensor: Tensor) -> int:
    # Unique as long as the storage lives, which it does while anything here holds the tensor.
    return int(tensor.untyped_storage()._cdata)


def run(
    data: Data,
    gradients: Sequence[str] = GRADIENTS,
    steps: Sequence[int] = STEPS,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda text: None,
) -> list[GradientCost]:
    """Measure every gradient at every number of steps, on one network and one batch."""
    network = build(data, Dynamics())
    found: list[GradientCost] = []
    for count in steps:
        progress(f"memory: {count} steps")
        found += _measure(network, data.batch, gradients, count, rounds)
    return found


class _Contender:
    """One gradient, ready to be taken again and again."""

    def __init__(self, network: TCEPNetwork, batch: TensorPair, gradient: str, steps: int) -> None:
        if gradient == "adjoint":
            default = Solver()
            solver = {"name": "dopri5", "step": default.step, "tolerance": default.tolerance}
        else:
            solver = {"name": "euler", "fixed": True}
        self.network = resolve(network, None, steps=steps, **solver)
        self._batch = batch
        self._learner = EquilibriumLearner(Learning(gradient=gradient))

    def __call__(self) -> dict[str, Tensor]:
        self.network.zero_grad(set_to_none=True)
        inputs, targets = self._batch.inputs, self._batch.targets
        return self._learner.gradients(self.network, inputs, targets).measured


def _measure(
    network: TCEPNetwork, batch: TensorPair, gradients: Sequence[str], steps: int, rounds: int
) -> list[GradientCost]:
    contenders = {name: _Contender(network, batch, name, steps) for name in gradients}
    taken = {name: _take(contender, batch) for name, contender in contenders.items()}
    seconds = alternate(
        {name: contenders[name] for name in gradients if taken[name]}, rounds, batch.inputs.device
    )
    found = []
    for name in gradients:
        cost = GradientCost(gradient=name, steps=steps)
        if name not in seconds:
            found.append(replace(cost, failure=DIVERGED))
            continue
        middle, spread = median_and_spread(seconds[name])
        cost = replace(cost, **taken[name], milliseconds=1e3 * middle, spread=1e3 * spread)
        if "bptt" in seconds:
            cost = replace(cost, vs_bptt=ratio(seconds[name], seconds["bptt"])[0])
        found.append(cost)
    return found


def _take(contender: _Contender, batch: TensorPair) -> dict[str, Any]:
    """Take the gradient to see what is saved, and on a GPU again to see its memory.

    Returns:
        Fields of :class:`GradientCost`; empty where samples diverged, so that there is no gradient.
    """
    device = batch.inputs.device
    apart = [*contender.network.parameters(), *contender.network.buffers()]
    with SavedBytes([*apart, batch.inputs, batch.targets]) as saved:
        measured = contender()
    if not float(measured["diverged_share"]) <= 0:  # not a number is a divergence too
        return {}
    peak = None
    if device.type == "cuda":
        # What is made once, such as a kernel or a workspace, was made by the call before.
        contender.network.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    second = measured.get("nfe_nudged")
    return {
        "evaluations_free": float(measured["nfe_free"]),
        "evaluations_second": None if second is None else float(second),
        "saved_bytes": saved.peak,
        "peak_bytes": peak,
    }


def cost_table(costs: Sequence[GradientCost]) -> Table:
    """Memory and time of one gradient, the gradients beneath one another."""
    columns: Columns[GradientCost] = {
        "gradient": lambda cost: cost.gradient,
        "steps": lambda cost: str(cost.steps),
        "evaluations": lambda cost: cost.failure or number(cost.evaluations_free, "{:.0f}"),
        "+ second phase": lambda cost: number(cost.evaluations_second, "{:.0f}"),
        "saved for backward, MB": lambda cost: number(cost.saved_bytes, "{:.3f}", 1e-6),
        "GPU peak, MB": lambda cost: number(cost.peak_bytes, "{:.2f}", 1e-6),
        "ms": lambda cost: number(cost.milliseconds, "{:.1f}"),
        "IQR": lambda cost: number(cost.spread, "{:.1f}"),
        "vs bptt": lambda cost: number(cost.vs_bptt, "{:.2f}"),
    }
    if all(cost.peak_bytes is None for cost in costs):
        columns = {name: cell for name, cell in columns.items() if name != "GPU peak, MB"}
    order = list(dict.fromkeys(cost.gradient for cost in costs))
    return table(
        "One gradient, median of alternating rounds",
        columns,
        sorted(costs, key=lambda cost: order.index(cost.gradient)),
    )
