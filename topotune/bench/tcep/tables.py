"""The records of the TCEP benchmarks as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from topotune.bench.tcep.gradients import GradientError
from topotune.bench.tcep.memory import GradientCost
from topotune.bench.tcep.setup import Training
from topotune.bench.tcep.solvers import SolverCost

if TYPE_CHECKING:
    from topotune.bench.tcep.accuracy import Accuracy

DETAIL = 0.1
"""The beta whose relative error and worst tensor are shown; ``--json`` has those of all."""


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def trainings(records: Iterable[Training]) -> Table:
    """How the trained networks were trained."""
    table = _table(
        "The trained networks: eqprop with its defaults, Adam, float32",
        ["network"],
        ["steps", "batch", "s", "loss, first", "last", "accuracy", "unconverged", "tensors moved"],
    )
    for record in records:
        table.add_row(
            record.network,
            str(record.steps),
            str(record.batch),
            f"{record.seconds:.1f}",
            f"{record.loss_first:.3f}",
            f"{record.loss_last:.3f}",
            f"{record.accuracy:.1%}",
            f"{record.unconverged_share:.1%}",
            f"{record.parameters_moved}/{record.parameters}",
        )
    return table


def gradients(records: Sequence[GradientError], net: str) -> Table:
    """Cosines with the exact gradient on one of the two nets, one line a flow, dtype and nudge."""
    mine = [record for record in records if record.net == net]
    betas = sorted({record.beta for record in mine})
    detail = DETAIL if DETAIL in betas else betas[0]
    table = _table(
        f"Cosine of the learner's gradient with the exact one, {net} net, by beta. At beta "
        f"{detail:g}: relative error and least cosine of a parameter tensor. Over all beta: most "
        "tensors with zero gradient, largest unconverged share",
        ["flow", "dtype", "tolerance", "nudge"],
        [*(f"{beta:g}" for beta in betas), "rel. error", "least", "zero", "unconv."],
    )
    lines: dict[tuple[str, str, float, str], dict[float, GradientError]] = {}
    for record in mine:
        key = (record.case, record.dtype, record.tolerance, record.nudge)
        lines.setdefault(key, {})[record.beta] = record
    for (case, dtype, tolerance, nudge), line in lines.items():
        shown = line[detail]
        table.add_row(
            case,
            dtype,
            f"{tolerance:.0e}",
            nudge,
            *(f"{line[beta].cosine:.7f}" for beta in betas),
            f"{shown.relative_error:.1e}",
            f"{shown.smallest_cosine:.6f}",
            str(max(record.zero_tensors for record in line.values())),
            f"{max(record.unconverged_share for record in line.values()):.0%}",
        )
    return table


def memory(records: Sequence[GradientCost]) -> Table:
    """Memory and time of one gradient, the gradients beneath one another."""
    first = records[0]
    on_gpu = any(record.peak_bytes is not None for record in records)
    table = _table(
        f"One gradient, batch {first.batch}, {first.device}, {first.threads} thread(s), "
        f"{first.rounds} alternating rounds",
        ["gradient"],
        [
            "steps",
            "evaluations",
            "+ second phase",
            "saved for backward, MB",
            *(["GPU peak, MB"] if on_gpu else []),
            "ms",
            "IQR",
            "vs bptt",
        ],
    )
    order = list(dict.fromkeys(record.gradient for record in records))
    for record in sorted(records, key=lambda record: order.index(record.gradient)):
        if record.failure:
            table.add_row(record.gradient, str(record.steps), record.failure)
            continue
        table.add_row(
            record.gradient,
            str(record.steps),
            _number(record.evaluations_free, "{:.0f}"),
            _number(record.evaluations_second, "{:.0f}"),
            _number(record.saved_bytes, "{:.3f}", 1e-6),
            *([_number(record.peak_bytes, "{:.2f}", 1e-6)] if on_gpu else []),
            _number(record.milliseconds, "{:.1f}"),
            _number(record.spread, "{:.1f}"),
            _number(record.vs_bptt, "{:.2f}"),
        )
    return table


def solvers(records: Sequence[SolverCost], net: str) -> Table:
    """Evaluations and time to a residual on one of the two nets."""
    first = records[0]
    table = _table(
        f"One free phase, {net} net, batch {first.batch}, float32, {first.device}, "
        f"{first.threads} thread(s), {first.rounds} alternating rounds",
        ["lambda", "gamma", "residual", "solver"],
        ["evaluations, mean", "max", "converged", "ms", "IQR"],
    )
    for record in records:
        if record.net == net:
            table.add_row(
                f"{record.damping:g}",
                f"{record.gamma:.3f}",
                f"{record.tolerance:.0e}",
                record.solver,
                f"{record.evaluations_mean:.1f}",
                f"{record.evaluations_max:.0f}",
                f"{record.converged_share:.0%}",
                f"{record.milliseconds:.1f}",
                f"{record.spread:.1f}",
            )
    return table


def accuracy(records: Sequence[Accuracy]) -> Table:
    """Accuracy after the last epoch: mean, and from the lowest to the highest seed."""
    first = records[0]
    table = _table(
        f"Accuracy on {first.task} after {first.epochs} epochs, {len(first.seeds)} seed(s): "
        "mean (lowest to highest)",
        ["trained by"],
        ["validation", "test", "s an epoch", "unconverged", "completed"],
    )
    for record in records:
        share = record.unconverged_share
        done = sum(outcome == "COMPLETE" for outcome in record.outcomes)
        table.add_row(
            record.row,
            _range(record.val_mean, record.val),
            _range(record.test_mean, record.test),
            f"{record.seconds_per_epoch:.2f}",
            _number(share, "{:.2%}"),
            f"{done}/{len(record.outcomes)}",
        )
    return table


def _number(value: float | None, shape: str, factor: float = 1.0) -> str:
    return "-" if value is None else shape.format(factor * value)


def _range(mean: float | None, values: Sequence[float]) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2%} ({min(values):.2%} to {max(values):.2%})"
