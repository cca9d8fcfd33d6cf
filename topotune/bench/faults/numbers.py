"""Numbers that are none: in the loss, the gradient, a metric or the field energy."""

from __future__ import annotations

from contextlib import closing
from itertools import product
from typing import Any

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.rogue import IMPORT_PATH, POISONED_ADAM
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import NAME, Site
from topotune.bench.faults.task import BATCHES
from topotune.search.study.storage import open_storage

EPOCHS = 3
_WORDS = {
    "loss": "loss",
    "gradient": "grad norm",
    "metric": "val_accuracy",
    "energy": "energy",
}
"""What the reason must name, by what was poisoned."""


def _points() -> list[dict[str, Any]]:
    """Every quantity, at the beginning, the middle and the end; NaN and infinity by turns."""
    points = []
    for index, (poison, epoch) in enumerate(product(_WORDS, range(1, EPOCHS + 1))):
        value = ("nan", "inf")[index % 2]
        energy = poison == "energy"
        points.append(
            {
                "lr": 0.03,
                "task.poison": "" if energy else poison,
                "task.value": value,
                "task.epoch": epoch,
                "energy_step": (epoch - 1) * BATCHES + 2 if energy else 0,
                "energy_value": value,
            }
        )
    return points


def _file(site: Site, trials: int, points: list[dict[str, Any]]) -> None:
    steps = sorted({point["energy_step"] for point in points} | {0})
    site.search_file(
        task={"name": IMPORT_PATH, "options": {}},
        method=POISONED_ADAM,
        space={
            "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
            "task.poison": {"type": "categorical", "choices": ["", "loss", "gradient", "metric"]},
            "task.value": {"type": "categorical", "choices": ["nan", "inf"]},
            "task.epoch": {"type": "int", "low": 1, "high": EPOCHS},
            "energy_step": {"type": "categorical", "choices": steps},
            "energy_value": {"type": "categorical", "choices": ["nan", "inf"]},
        },
        warm_start=points,
        budget={"trials": trials, "epochs": EPOCHS},
    )


def _not_a_number(site: Site) -> str:
    points = _points()
    fine = {**points[0], "task.poison": "", "energy_step": 0}
    points = [*points, fine, {**fine, "lr": 0.02}]
    _file(site, len(points), points)
    site.run("search", site.folder / f"{NAME}.yaml")
    status = site.status()
    rows = {row["number"]: row for row in status["trials"]}
    names = list(_WORDS)
    for number in range(len(points) - 2):
        row, point = rows[number], points[number]
        place = f"trial {number} ({names[number // EPOCHS]}, epoch {point['task.epoch']})"
        expect(row["state"] == "DIVERGED", f"{place} is {row['state']}: {row['reason']}")
        word = _WORDS[names[number // EPOCHS]]
        expect(word in row["reason"], f"{place}: {word!r} is not in {row['reason']!r}")
        expect(
            row["epochs"] in (point["task.epoch"] - 1, point["task.epoch"]),
            f"{place} has {row['epochs']} epochs",
        )
    expect(status["best"] in (len(points) - 2, len(points) - 1), f"best is {status['best']}")
    learnt = _learnt(site)
    counted = audit(site, len(points), undisturbed=False)
    return f"{len(points) - 2} DIVERGED with cause; {learnt}; {counted}"


def _learnt(site: Site) -> str:
    """What the sampler is told of a diverged trial: a broken constraint, and no good value."""
    with closing(open_storage(site.search, site.search.config())) as storage:
        (study,) = storage.get_all_studies()
        trials = storage.get_all_trials(study._study_id)
    diverged = [t for t in trials if t.user_attrs["end"]["outcome"] == "DIVERGED"]
    fine = [t for t in trials if t.user_attrs["end"]["outcome"] == "COMPLETE"]
    worst = min(trial.values[0] for trial in fine)
    for trial in diverged:
        broken = [name for name, value in trial.constraints.items() if value > 0]
        expect(bool(broken), f"trial {trial.number} breaks no constraint in the study")
        told = trial.values
        expect(told is None or told[0] <= worst, f"trial {trial.number} is told as {told}")
    return f"{len(diverged)} told to the sampler as infeasible"


NUMBERS = (
    Scenario(
        "not-a-number",
        "NaN or infinity in loss, gradient, metric and energy, in the first, a middle and the "
        "last epoch",
        "each DIVERGED with its cause, never the best, and the sampler is told",
        _not_a_number,
        seconds=40,
    ),
)
