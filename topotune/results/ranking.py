"""The one order of trials: finished and feasible first, best first.

The terminal, MLflow and the export use the same rule: finished trials that keep every constraint,
best first; then finished ones that break a constraint; then the rest, which have no comparable
objective. A diverged or failed trial, or one whose objective is not a finite number, is never
best, whatever value it carries.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from topotune.errors import ConfigError
from topotune.records import Outcome, TrialSummary

STATES = (*(outcome.value for outcome in Outcome), "RUNNING", "WAITING")
_LATER = {"PRUNED": 2, "RUNNING": 4, "WAITING": 5, "DIVERGED": 6, "FAILED": 7}
_UNUSABLE, _UNKNOWN_STATE = 3, 8  # complete without finite objectives; a state of a later version


def _costs(values: Sequence[float], directions: Sequence[str]) -> tuple[float, ...]:
    """The objectives with the sign turned so that lower is better."""
    return tuple(-v if d == "maximize" else v for v, d in zip(values, directions, strict=True))


def check_directions(directions: Sequence[str]) -> None:
    """Refuse an empty list and words other than "maximize" and "minimize".

    Raises:
        ConfigError: with the position of the wrong word.
    """
    if not directions:
        raise ConfigError("directions", "empty, at least one objective is needed")
    for index, word in enumerate(directions):
        if word not in ("maximize", "minimize"):
            raise ConfigError(
                f"directions[{index}]", f"got {word!r}", "Write 'maximize' or 'minimize'"
            )


def is_finished(trial: TrialSummary, directions: Sequence[str]) -> bool:
    """Whether a trial is COMPLETE with one finite value for every objective."""
    return (
        trial.state == Outcome.COMPLETE
        and len(trial.values) == len(directions)
        and all(math.isfinite(v) for v in trial.values)
    )


def is_eligible(trial: TrialSummary, directions: Sequence[str]) -> bool:
    """Whether a trial may be called best: finished, and no constraint broken."""
    return is_finished(trial, directions) and not trial.violated


def pareto_fronts(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """The non-dominated front of every point, 1 being the Pareto front.

    A point dominates another if it is at least as good everywhere and better somewhere; equal
    points share a front. Efficient non-dominated sorting with binary search (Zhang et al., 2015):
    in lexicographic order a point can only be dominated by earlier ones, and if some member of
    front k dominates it, so does some member of every front before k.

    Args:
        points: finite objective values, one row a point.
        directions: "maximize" or "minimize", one an objective.
    """
    costs = [_costs(point, directions) for point in points]
    fronts: list[list[tuple[float, ...]]] = []
    front_of = [0] * len(costs)

    def dominated(front: list[tuple[float, ...]], cost: tuple[float, ...]) -> bool:
        # of two objectives the second only falls along a front, so its last member tells all
        members = front[-1:] if len(cost) == 2 else reversed(front)
        return any(
            other != cost and all(a <= b for a, b in zip(other, cost, strict=True))
            for other in members
        )

    for index in sorted(range(len(costs)), key=costs.__getitem__):
        cost = costs[index]
        level = bisect_left(fronts, True, key=lambda front: not dominated(front, cost))
        if level == len(fronts):
            fronts.append([])
        fronts[level].append(cost)
        front_of[index] = level + 1
    return front_of


def rank(trials: Iterable[TrialSummary], directions: Sequence[str]) -> list[TrialSummary]:
    """All trials, best first; the order does not depend on the order given.

    Finished and feasible trials come first, by front and then by the first objective (with one
    objective the front is the value's own rank); then finished ones that break a constraint, in
    the same way; then PRUNED by epochs survived and last value; COMPLETE without finite
    objectives; RUNNING; WAITING; DIVERGED; FAILED. Ties go to the lower trial number.

    Raises:
        ConfigError: a direction is neither "maximize" nor "minimize".
    """
    check_directions(directions)
    given = list(trials)
    keys: dict[int, tuple[float, ...]] = {}
    for tier, violating in ((0, False), (1, True)):
        chosen = [t for t in given if is_finished(t, directions) and bool(t.violated) is violating]
        fronts = pareto_fronts([t.values for t in chosen], directions)
        for trial, front in zip(chosen, fronts, strict=True):
            keys[id(trial)] = (tier, front, _costs(trial.values, directions)[0], trial.number)

    def key(trial: TrialSummary) -> tuple[float, ...]:
        if id(trial) in keys:
            return keys[id(trial)]
        if trial.state == Outcome.COMPLETE:
            return (_UNUSABLE, 0, 0, trial.number)
        tier = _LATER.get(trial.state, _UNKNOWN_STATE)
        if trial.state != Outcome.PRUNED:
            return (tier, 0, 0, trial.number)
        value = last_value(trial)
        usable = value is not None and math.isfinite(value)
        cost = _costs((value,), directions[:1])[0] if usable and value is not None else math.inf
        return (tier, -trial.epochs, cost, trial.number)

    return sorted(given, key=key)


def counts(trials: Iterable[TrialSummary]) -> dict[str, int]:
    """How many trials each state has; every known state is listed, zeros included."""
    found = dict.fromkeys(STATES, 0)
    for trial in trials:
        found[trial.state] = found.get(trial.state, 0) + 1
    return found


def last_value(trial: TrialSummary, objective: int = 0) -> float | None:
    """An objective as last known: its final value, else the curve's last; None where neither is
    known."""
    if trial.values:
        return trial.values[objective] if objective < len(trial.values) else None
    curve = trial.curves[objective] if objective < len(trial.curves) else {}
    return curve[max(curve)] if curve else None
