"""Without a correction the optimizer is torch's Adam, bit for bit; and what it asks of torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim_cases import gradients, parameters, replay, starts
from topotune.optim import TopologicalAdam

FLAGS: list[dict[str, bool]] = [{"foreach": False}, {"foreach": True}, {"fused": True}]
OFF: list[dict[str, float]] = [{"w_topo": 0.0}, {"eta": 0.0}]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("off", OFF, ids=lambda off: next(iter(off)))
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: next(iter(flags)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_switched_off_it_is_torch_adam_bit_for_bit(
    dtype: torch.dtype,
    flags: dict[str, Any],
    off: dict[str, Any],
    decay: float,
    maximize: bool,
) -> None:
    ours, theirs = parameters(starts(), dtype), parameters(starts(), dtype)
    shared: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "maximize": maximize, **flags}
    optimizer = TopologicalAdam(ours, weight_decay=decay, **shared, **off)
    if decay:
        twin: torch.optim.Optimizer = torch.optim.AdamW(theirs, weight_decay=decay, **shared)
    else:
        twin = torch.optim.Adam(theirs, **shared)
    recording = gradients(30, 1.0)
    replay(optimizer, ours, recording)
    replay(twin, theirs, recording)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(optimizer.state[mine]["exp_avg_sq"], twin.state[other]["exp_avg_sq"])


def test_the_default_is_the_fused_kernel_on_the_cpu() -> None:
    ours, theirs = parameters(starts()), parameters(starts())
    replay(TopologicalAdam(ours, eta=0.0), ours, gradients(30, 1.0))
    replay(torch.optim.Adam(theirs, fused=True), theirs, gradients(30, 1.0))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_a_correction_makes_a_difference() -> None:
    ours, theirs = parameters(starts()), parameters(starts())
    replay(TopologicalAdam(ours), ours, gradients(30, 1.0))
    replay(torch.optim.Adam(theirs, fused=True), theirs, gradients(30, 1.0))
    assert not any(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_foreach_and_single_tensor_steps_agree() -> None:
    """The batches differ (all tensors, one tensor), the arithmetic does not."""
    one, all_ = parameters(starts()), parameters(starts())
    replay(TopologicalAdam(one, foreach=False), one, gradients(30, 1.0))
    replay(TopologicalAdam(all_, foreach=True), all_, gradients(30, 1.0))
    for mine, other in zip(one, all_, strict=True):
        assert (mine - other).abs().max().item() <= 1e-8


@pytest.mark.parametrize("inside", [False, True])
def test_eps_placement_by_hand(inside: bool) -> None:
    """Two steps of one number; the floor is large, so that its place matters."""
    g1, g2, eps, b1, b2, lr = 0.5, -0.2, 0.3, 0.9, 0.99, 0.1
    p = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = TopologicalAdam(
        [p], lr=lr, betas=(b1, b2), eps=eps, eta=0.0, eps_inside_sqrt=inside
    )
    replay(optimizer, [p], [[torch.tensor(g1)], [torch.tensor(g2)]])
    g1, g2 = float(torch.tensor(g1)), float(torch.tensor(g2))
    expected, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate((g1, g2), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        expected -= lr * m_hat / ((v_hat + eps) ** 0.5 if inside else v_hat**0.5 + eps)
    assert p.item() == pytest.approx(expected, rel=1e-14)


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched below the Python level of ``step``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")


@pytest.mark.parametrize("control", ["exact", "band"])
@pytest.mark.parametrize("coupling", ["uniform", "exchange", "local"])
def test_a_step_reads_no_number_through_torch(coupling: str, control: str) -> None:
    tensors = parameters(starts())
    optimizer = TopologicalAdam(tensors, coupling=coupling, energy_control=control)
    replay(optimizer, tensors, gradients(2, 1.0))
    with _Counted() as counted:
        optimizer.step()
    assert counted.calls["_fused_adam_"] == 1
    assert not any(counted.calls[name] for name in READS)


@pytest.mark.parametrize("control", ["exact", "band"])
@pytest.mark.parametrize("coupling", ["uniform", "exchange", "local"])
def test_steps_need_no_value_at_all_on_other_devices(coupling: str, control: str) -> None:
    """Meta tensors hold no numbers: any read by the host raises."""
    tensors = [
        nn.Parameter(torch.empty(3, 4, device="meta")),
        nn.Parameter(torch.empty((), device="meta")),
    ]
    optimizer = TopologicalAdam(
        tensors, coupling=coupling, energy_control=control, eps_inside_sqrt=True, weight_decay=0.1
    )
    for _ in range(3):
        for tensor in tensors:
            tensor.grad = torch.empty_like(tensor)
        optimizer.step()
    assert optimizer.state[tensors[0]]["scalars"].device.type == "meta"
    assert optimizer.state[tensors[0]]["step"].item() == 3


@pytest.mark.parametrize("coupling", ["uniform", "exchange", "local"])
def test_grad_scaler_unscales_and_skips(coupling: str) -> None:
    torch.manual_seed(0)
    plain, scaled = nn.Linear(4, 3), nn.Linear(4, 3)
    scaled.load_state_dict(plain.state_dict())
    direct = TopologicalAdam(plain.parameters(), coupling=coupling)
    mixed = TopologicalAdam(scaled.parameters(), coupling=coupling)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs = torch.randn(8, 4)
    for broken in (False, True, False):
        for model in (plain, scaled):
            model.zero_grad()
        loss = scaled(inputs).square().mean()
        scaler.scale(loss * (float("inf") if broken else 1.0)).backward()
        scaler.step(mixed)
        scaler.update()
        if not broken:
            plain(inputs).square().mean().backward()
            direct.step()
    assert scaler.get_scale() == 512.0
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(one, other)
    assert mixed.metrics()["skipped_nonfinite"] == 0.0
