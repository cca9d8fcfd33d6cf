"""Non-finite numbers in the loss, the gradient, a metric or the field energy."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from tests.faults.invariants import audit
from tests.faults.rogue import IMPORT_PATH, POISONED_ADAM
from tests.faults.site import Seen, Site
from tests.faults.task import BATCHES
from topotune.search.study.storage import reading

EPOCHS = 3
WORDS = {
    "loss": "loss",
    "gradient": "grad norm",
    "metric": "val_accuracy",
    "energy": "energy",
}
"""What the reason must name, by what was poisoned."""


@pytest.mark.faults
def test_not_a_number(site: Site, seen: Seen) -> None:
    """NaN or infinity in loss, gradient, metric and energy, in the first, a middle and the last
    epoch: each DIVERGED with its cause, never the best, and the sampler learns of it."""
    points = poisoned()
    fine = {**points[0], "task.poison": "", "energy_step": 0}
    points = [*points, fine, {**fine, "lr": 0.02}]
    site.search_file(
        task={"name": IMPORT_PATH, "options": {}},
        method=POISONED_ADAM,
        space=space(points),
        warm_start=points,
        budget={"trials": len(points), "epochs": EPOCHS},
    )
    site.run("search", site.file)
    status = site.status()
    rows = {row["number"]: row for row in status["trials"]}
    for number, (poison, epoch) in enumerate(product(WORDS, range(1, EPOCHS + 1))):
        row, place = rows[number], f"trial {number} ({poison}, epoch {epoch})"
        assert row["state"] == "DIVERGED", f"{place} is {row['state']}: {row['reason']}"
        word = WORDS[poison]
        assert word in row["reason"], f"{place}: {word!r} is not in {row['reason']!r}"
        assert row["epochs"] in (epoch - 1, epoch), f"{place} has {row['epochs']} epochs"
    assert status["best"] in (len(points) - 2, len(points) - 1), f"best is {status['best']}"
    learnt = sampler_learnt(site)
    counted = audit(site, len(points), undisturbed=False)
    seen(f"{len(points) - 2} DIVERGED with cause; {learnt} infeasible for the sampler; {counted}")


def poisoned() -> list[dict[str, Any]]:
    """Every quantity, at the beginning, the middle and the end; NaN and infinity by turns."""
    points = []
    for index, (poison, epoch) in enumerate(product(WORDS, range(1, EPOCHS + 1))):
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


def space(points: list[dict[str, Any]]) -> dict[str, Any]:
    steps = sorted({point["energy_step"] for point in points} | {0})
    return {
        "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "task.poison": {"type": "categorical", "choices": ["", "loss", "gradient", "metric"]},
        "task.value": {"type": "categorical", "choices": ["nan", "inf"]},
        "task.epoch": {"type": "int", "low": 1, "high": EPOCHS},
        "energy_step": {"type": "categorical", "choices": steps},
        "energy_value": {"type": "categorical", "choices": ["nan", "inf"]},
    }


def sampler_learnt(site: Site) -> int:
    """Diverged trials in the study, each of which breaks a constraint and has no good value."""
    with reading(site.kept, site.kept.config()) as storage:
        (study,) = storage.get_all_studies()
        trials = storage.get_all_trials(study._study_id)
    diverged = [t for t in trials if t.user_attrs["end"]["outcome"] == "DIVERGED"]
    fine = [t for t in trials if t.user_attrs["end"]["outcome"] == "COMPLETE"]
    worst = min(trial.values[0] for trial in fine)
    for trial in diverged:
        broken = [name for name, value in trial.constraints.items() if value > 0]
        assert broken, f"trial {trial.number} breaks no constraint in the study"
        values = trial.values
        assert values is None or values[0] <= worst, f"trial {trial.number} has {values}"
    return len(diverged)
