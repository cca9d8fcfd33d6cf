"""Schedules: exact factors, and each group's own base rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from topotune.errors import UnknownNameError
from topotune.train.schedule import rate_factor, set_rates


@pytest.mark.parametrize(
    ("name", "step", "factor"),
    [
        ("constant", 0, 1.0),
        ("constant", 99, 1.0),
        ("linear", 0, 1.0),
        ("linear", 25, 0.75),
        ("linear", 99, 0.01),
        ("cosine", 0, 1.0),
        ("cosine", 25, 0.5 + math.sqrt(2) / 4),
        ("cosine", 50, 0.5),
        ("cosine", 75, 0.5 - math.sqrt(2) / 4),
        ("cosine", 100, 0.0),
    ],
)
def test_exact_factors(name: str, step: int, factor: float) -> None:
    assert rate_factor(name, step, 100) == pytest.approx(factor, rel=1e-12, abs=1e-15)


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cosine'"):
        rate_factor("cosin", 0, 10)


def test_every_group_keeps_its_own_base_rate() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.4},
        {"params": [nn.Parameter(torch.zeros(1))]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for factor in (1.0, 0.5, 0.25):
        set_rates(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == [0.4 * factor, 0.1 * factor]


def test_the_base_rate_survives_a_state_dict() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    set_rates(optimizer, 0.5)
    fresh = torch.optim.SGD([parameter], lr=0.1)
    fresh.load_state_dict(optimizer.state_dict())
    set_rates(fresh, 0.5)
    assert fresh.param_groups[0]["lr"] == 0.05


def test_a_rate_that_is_a_tensor_is_changed_in_place() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=rate, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    set_rates(optimizer, 0.5)
    set_rates(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.125
