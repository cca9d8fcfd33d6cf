"""One epoch over a handful of rows: what a trial will report, found out before it is started."""

from __future__ import annotations

import dataclasses

import torch

from topotune.errors import DivergedError, PluginError, TopotuneError, in_one_line
from topotune.records import OverheadOptions, TrialSpec
from topotune.train.assemble import assemble
from topotune.train.loop import TrainingLoop
from topotune.train.methods import build_method
from topotune.train.overhead import overhead_of
from topotune.train.process import capture_generators, restore_generators

ROWS = 4


def metric_names(spec: TrialSpec) -> list[str]:
    """The names of all metrics that a trial of this spec reports, sorted.

    Really trains on ``ROWS`` rows of the training split and evaluates on as many of the
    validation split, on the CPU, so that a task's or optimizer's own metrics are found too. The
    process's random generators are left as they were.

    Raises:
        UserError: the spec names something that does not exist or breaks a rule, its data cannot
            be had, or the task's code fails.
    """
    cpu = torch.device("cpu")
    states = capture_generators(cpu)
    try:
        return sorted(_rehearse(spec, cpu))
    except TopotuneError:
        raise
    except Exception as error:
        raise PluginError(
            f"task {spec.task!r} with method {spec.method!r} fails when it trains on {ROWS} rows "
            f"with {dict(spec.params)}: {in_one_line(error)}"
        ) from error
    finally:
        restore_generators(states, cpu)


def _rehearse(spec: TrialSpec, cpu: torch.device) -> set[str]:
    method = build_method(spec)
    parts = assemble(method, cpu)
    few = dataclasses.replace(parts, train=parts.train.rows(0, ROWS), val=parts.val.rows(0, ROWS))
    loop = TrainingLoop(few, spec.train, epochs=1, seed=spec.seed)
    try:
        names = set(next(loop.run()).metrics)
    except DivergedError as error:
        # This corner of the space diverges at once; a method that moves nothing reports the same
        # metrics but for its own. If that diverges too, every trial would.
        plain = method.plain()
        if spec == plain:
            raise PluginError(
                f"task {spec.task!r}: {error}, with a fresh model that nothing has changed yet; "
                "every trial would diverge. Look at its data, model and loss"
            ) from error
        return _rehearse(plain, cpu)
    if spec.overhead.blocks:
        once = OverheadOptions(blocks=1, steps=1, warmup=0)
        names |= overhead_of(method, few, once).keys()
    return names
