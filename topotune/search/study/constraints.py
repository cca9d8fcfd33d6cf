"""A search's constraints as Optuna wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from topotune.config.models import SearchConfig
from topotune.records import Outcome
from topotune.search.study.rows import FINISHED


def constraint_values(
    config: SearchConfig, metrics: Mapping[str, float], outcome: Outcome
) -> dict[str, float]:
    """Constraint values as Optuna wants them: the same keys every time, feasible at <= 0.

    A value that is missing or NaN is a violation, but for a pruned trial, which may not have
    come to measure it. One more, FINISHED, tells the samplers which trials came to an end at all.
    """
    found = {}
    unknown = 0.0 if outcome is Outcome.PRUNED else 1.0
    for name, bound in config.constraints.items():
        value = metrics.get(name, math.nan)
        excess = [value - bound.max] if bound.max is not None else []
        excess += [bound.min - value] if bound.min is not None else []
        found[name] = unknown if math.isnan(value) else max(-1e300, min(max(excess), 1e300))
    # A Gaussian process would fit one more model a constraint; the worst value tells it enough.
    if config.sampler.name != "gp":
        fine = outcome in (Outcome.COMPLETE, Outcome.PRUNED)
        found[FINISHED] = -1.0 if fine else 1.0
    return found
