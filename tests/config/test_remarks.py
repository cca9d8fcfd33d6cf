"""What a search file may say and probably does not mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.search_cases import make_config
from topotune.config.file import parse_search
from topotune.config.rules import remarks
from topotune.search.doctor.preflight import machine_remarks


def test_a_search_of_before_may_have_a_name_that_is_reserved_now() -> None:
    plain = make_config().model_dump()
    saved = parse_search({**plain, "name": "mlflow"}, "search.json", {}, saved=True)
    assert saved.name == "mlflow"


COUPLED: dict[str, Any] = {
    "lr": {"type": "float", "low": 1e-4, "high": 1e-1},
    "coupling": {"type": "categorical", "choices": ["uniform", "exchange"]},
    "w_topo": {"type": "float", "low": 0, "high": 1, "when": {"coupling": "exchange"}},
}


@pytest.mark.parametrize(
    ("points", "twice"),
    [
        ([{"lr": 0.01}, {"lr": 0.02}, {"lr": 1e-2}], [(2, 0)]),
        ([{"lr": 0.01}] * 3, [(1, 0), (2, 0)]),
        ([{"lr": 0.01}, {"lr": 0.01, "coupling": "uniform"}], []),
        (
            [{"coupling": "uniform", "w_topo": 0.5}, {"coupling": "uniform"}],
            [(1, 0)],  # w_topo has no part in either
        ),
        ([{"coupling": "exchange", "w_topo": 0.5}, {"coupling": "exchange"}], []),
    ],
)
def test_a_warm_start_that_stands_twice_is_remarked(
    points: list[dict[str, Any]], twice: list[tuple[int, int]]
) -> None:
    config = make_config(space=COUPLED, warm_start=points)
    starts = [f"warm_start[{a}] is the same point as warm_start[{b}]: " for a, b in twice]
    assert len(remarks(config)) == len(twice)
    assert all(map(str.startswith, remarks(config), starts))


@pytest.mark.parametrize(("gpus", "odd"), [("auto", False), (0.5, False), (1, False), (2, True)])
def test_gpus_that_would_stand_idle_are_remarked(gpus: object, odd: bool) -> None:
    config = make_config(resources={"gpus": gpus})
    assert [text.startswith("resources.gpus: each trial holds 2") for text in remarks(config)] == (
        [True] if odd else []
    )


@pytest.mark.parametrize(
    ("trials", "said"), [(2, ["2 of the grid's 4"]), (4, []), (9, ["ends after 4"]), (None, [])]
)
def test_a_grid_that_does_not_fit_its_budget_is_remarked(
    trials: int | None, said: list[str]
) -> None:
    space = {"depth": {"type": "int", "low": 1, "high": 4}}
    budget = {"trials": trials, "wall_clock": 60.0}
    found = remarks(make_config(space=space, sampler="grid", budget=budget))
    assert len(found) == len(said)
    assert all(text in one for text, one in zip(said, found, strict=True))


def test_what_this_machine_cannot_run_is_remarked() -> None:
    assert machine_remarks(make_config()) == []
    for resources, key in (
        ({"gpus": torch.cuda.device_count() + 1}, "resources.gpus: a trial needs"),
        ({"cpus": 100_000}, "resources.cpus: a trial needs 100000 CPUs"),
        ({"custom": {"tpu": 1}}, "resources.custom.tpu: a trial needs 1 tpu"),
    ):
        (said,) = machine_remarks(make_config(resources=resources))
        assert said.startswith("it does not start on this machine, if that is where it is to run: ")
        assert key in said
