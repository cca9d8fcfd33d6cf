"""State, parameters and gradients that disagree: an error that names both, and nothing has moved.

Torch's fused kernel checks no sizes, so that what is refused here would end the process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim_cases import COUPLINGS, gradients, parameters, replay, starts
from topotune.optim import TopologicalAdam
from topotune.optim.reference import ReferenceTopologicalAdam


def stepped(
    *values: Tensor, steps: int = 2, **options: Any
) -> tuple[TopologicalAdam, list[nn.Parameter]]:
    """An optimizer after some steps of gradients of one."""
    tensors = parameters(values or (torch.zeros(8),))
    optimizer = TopologicalAdam(tensors, **options)
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()
    return optimizer, tensors


def refuses(optimizer: TopologicalAdam, words: str, kind: type[Exception] = ValueError) -> None:
    """The next step is refused, and no parameter, state or counter has moved."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in tensors]
    counts = [group["steps_taken"] for group in optimizer.param_groups]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(kind, match=words):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert counts == [group["steps_taken"] for group in optimizer.param_groups]
    after = optimizer.state_dict()["state"]
    assert after.keys() == state.keys()
    for key, entries in state.items():
        for name, value in entries.items():
            assert torch.equal(value, after[key][name]), name


@pytest.mark.parametrize(("saved", "mine"), [(8, 4000), (64, 66), (66, 64)])
def test_a_state_of_another_size_is_refused_when_it_is_loaded(saved: int, mine: int) -> None:
    source, _ = stepped(torch.zeros(saved))
    tensor = nn.Parameter(torch.zeros(mine))
    target = TopologicalAdam([("weight", tensor)], lr=0.5)
    with pytest.raises(ValueError, match=rf"parameter 0 \('weight'\).*\({mine},\).*\({saved},\)"):
        target.load_state_dict(source.state_dict())
    assert not target.state
    assert target.param_groups[0]["lr"] == 0.5
    tensor.grad = torch.ones(mine)
    target.step()
    assert tensor.abs().max().item() > 0


def test_a_classifier_of_another_number_of_classes() -> None:
    for classes in (11, 12):
        small, large = nn.Linear(512, 10), nn.Linear(512, classes)
        source = TopologicalAdam(small.parameters())
        small(torch.ones(4, 512)).sum().backward()
        source.step()
        target = TopologicalAdam(large.parameters())
        with pytest.raises(ValueError, match=rf"\({classes}, 512\).*'exp_avg'.*\(10, 512\)"):
            target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.zeros(4000), r"parameter 0 has shape \(4000,\).*'exp_avg'.*\(8,\)"),
        (torch.zeros(6), r"parameter 0 has shape \(6,\).*'exp_avg'.*\(8,\)"),
        (torch.zeros(2, 4), r"parameter 0 has shape \(2, 4\).*'exp_avg'.*\(8,\)"),
        (torch.zeros(8).double(), r"parameter 0 is torch.float64.*'exp_avg'.*torch.float32"),
        (torch.zeros(8).bfloat16(), r"parameter 0 is torch.bfloat16.*'exp_avg'.*torch.float32"),
    ],
    ids=["larger", "smaller", "reshaped", "wider", "narrower"],
)
def test_data_exchanged_after_a_step(data: Tensor, words: str, fused: bool | None) -> None:
    optimizer, (tensor,) = stepped(fused=fused)
    tensor.grad = None
    tensor.data = data.clone()
    tensor.grad = torch.ones_like(tensor)
    refuses(optimizer, words)
    del optimizer.state[tensor]
    optimizer.step()
    assert tensor.abs().min().item() > 0


def test_data_exchanged_after_backward() -> None:
    optimizer, (tensor,) = stepped()
    tensor.data = torch.zeros(4000)
    optimizer.state.clear()
    refuses(optimizer, r"parameter 0 has shape \(4000,\), but its gradient has shape \(8,\)")


def test_data_exchanged_for_a_like_one_is_trained() -> None:
    optimizer, (tensor,) = stepped()
    tensor.data = torch.full((8,), 3.0)
    optimizer.step()
    assert tensor.max().item() < 3.0


def test_a_changed_type_is_converted_by_a_load_as_with_torch() -> None:
    optimizer, (tensor,) = stepped(coupling="local")
    tensor.grad = None
    tensor.data = tensor.data.double()
    optimizer.load_state_dict(optimizer.state_dict())
    tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    assert optimizer.state[tensor]["gap"].dtype is torch.float64


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(
    ("saved", "mine"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float64),
    ],
)
def test_a_state_of_another_type_is_converted(
    saved: torch.dtype, mine: torch.dtype, coupling: str
) -> None:
    first = parameters(starts(), saved)
    source = TopologicalAdam(first, coupling=coupling)
    replay(source, first, gradients(3, 1.0))
    second = parameters([p.detach() for p in first], mine)
    target = TopologicalAdam(second)
    target.load_state_dict(source.state_dict())
    replay(target, second, gradients(2, 1.0))
    replay(source, first, gradients(2, 1.0))
    wide = torch.float64 if mine is torch.float64 else torch.float32
    bound = 1e-6 if torch.bfloat16 not in (saved, mine) else 1e-2
    for one, other in zip(first, second, strict=True):
        state = target.state[other]
        assert state["exp_avg"].dtype is mine
        assert state["scalars"].dtype is torch.float64
        assert target.fields(other)[0].dtype is wide
        assert (one.double() - other.double()).abs().max().item() <= bound


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "a field"])
def test_one_entry_extended_alone(coupling: str, name: str) -> None:
    """What densification of a scene does to the two moments, and forgets to do to the rest."""
    optimizer, (tensor,) = stepped(coupling=coupling)
    state = optimizer.state[tensor]
    field = {"uniform": "gap0", "exchange": "beta0", "local": "sum0"}[coupling]
    entry = field if name == "a field" else name
    state[entry] = torch.cat([state[entry], torch.zeros(4)])
    refuses(optimizer, rf"parameter 0 has shape \(8,\), but '{entry}'.*\(12,\)")


def test_densification_with_the_state_extended() -> None:
    optimizer, (tensor,) = stepped()
    state = optimizer.state.pop(tensor)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.cat([state[name], torch.zeros(4)])
    larger = nn.Parameter(torch.cat([tensor.detach(), torch.zeros(4)]))
    optimizer.param_groups[0]["params"][0] = larger
    optimizer.state[larger] = state
    larger.grad = torch.ones(12)
    refuses(optimizer, r"'alpha0' in its state has shape \(8,\)")
    for name in ("gap0", "alpha0", "scalars"):
        del state[name]
    optimizer.step()
    assert optimizer.fields(larger)[0].shape == (12,)
    assert state["step"].item() == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: s.pop("exp_avg_sq"), "has 'step' but no 'exp_avg_sq'"),
        (lambda s: s.pop("step"), "has 'exp_avg' but no 'step'"),
        (lambda s: s.update(step=torch.zeros(3)), r"'step'.*one number, got shape \(3,\)"),
        (lambda s: s.update(step="two"), "'step'.*one number, got 'two'"),
        (lambda s: s.update(exp_avg=[0.0] * 8), "'exp_avg'.*must be a tensor, got list"),
        (lambda s: s.update(exp_avg=torch.zeros(8).to_sparse()), "'exp_avg'.*dense real"),
        (
            lambda s: s.update(exp_avg=torch.zeros(8, dtype=torch.complex64)),
            "'exp_avg'.*dense real",
        ),
        (lambda s: s.update(scalars=torch.zeros(3).double()), r"'scalars'.*\(10,\), got \(3,\)"),
        (lambda s: s.update(gap0=torch.zeros(2, 4)), r"'gap0'.*\(2, 4\)"),
    ],
)
def test_damaged_entries(damage: Callable[[dict[str, Any]], object], words: str) -> None:
    """In a state dict and in the state itself."""
    source, _ = stepped()
    saved = copy.deepcopy(source.state_dict())
    damage(saved["state"][0])
    target, (tensor,) = stepped()
    before = tensor.detach().clone()
    kept = target.state[tensor]["exp_avg"]
    with pytest.raises(ValueError, match=words):
        target.load_state_dict(saved)
    assert target.state[tensor]["exp_avg"] is kept
    assert torch.equal(tensor, before)
    damage(target.state[tensor])
    with pytest.raises(ValueError, match=words):
        target.step()
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "gap0", "alpha0", "scalars", "step"])
@pytest.mark.parametrize("how", ["entry", "data"])
def test_an_entry_replaced_between_steps_is_the_one_that_is_used(name: str, how: str) -> None:
    """``state[name] = ...``, or ``state[name].data = ...`` as code that moves a state does."""
    first, one = stepped()
    second, two = stepped()
    for optimizer, tensor in ((first, one[0]), (second, two[0])):
        state = optimizer.state[tensor]
        changed = state[name].clone() * 2
        if optimizer is first:
            optimizer.load_state_dict(
                {**optimizer.state_dict(), "state": {0: {**state, name: changed}}}
            )
        elif how == "entry":
            state[name] = changed
        else:
            state[name].data = changed
        tensor.grad = torch.full((8,), 0.5)
        optimizer.step()
    assert torch.equal(one[0], two[0])


@pytest.mark.parametrize("view", [lambda x: x[:4], lambda x: x.view(torch.float16)[:8]])
def test_an_entry_of_another_kind_at_the_same_address(view: Callable[[Tensor], Tensor]) -> None:
    """As where memory is reused: data exchanged twice may lie where the first lay."""
    optimizer, (tensor,) = stepped()
    entry = optimizer.state[tensor]["exp_avg"]
    address = entry.data_ptr()
    entry.data = view(entry.detach())
    assert entry.data_ptr() == address
    refuses(optimizer, "parameter 0 .*'exp_avg'")


def test_the_fused_kernel_is_refused_a_tensor_with_gaps() -> None:
    """It walks memory, and would train the elements between."""
    base = torch.arange(16.0)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(8,\) and strides \(2,\)"):
        TopologicalAdam([nn.Parameter(base[::2])], fused=True)
    optimizer, (tensor,) = stepped(fused=True)
    tensor.data = base[::2]
    refuses(optimizer, "gaps in memory")
    assert torch.equal(base, torch.arange(16.0))
    TopologicalAdam(nn.LazyLinear(3).parameters(), fused=True)


def test_an_entry_replaced_by_a_number_or_by_a_strided_view() -> None:
    first, one = stepped()
    second, two = stepped()
    state = second.state[two[0]]
    state["step"] = 2
    for name in ("exp_avg", "exp_avg_sq", "gap0"):
        state[name] = torch.stack([state[name], torch.full((8,), 9.0)], dim=1)[:, 0]
    first.step()
    second.step()
    assert torch.equal(one[0], two[0])


def test_a_later_group_is_checked_before_an_earlier_one_moves() -> None:
    tensors = parameters([torch.zeros(3), torch.zeros(8)])
    optimizer = TopologicalAdam([{"params": [tensor]} for tensor in tensors])
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    tensors[1].grad = None
    tensors[1].data = torch.zeros(9)
    tensors[1].grad = torch.ones(9)
    refuses(optimizer, r"parameter 1 has shape \(9,\)")


def test_a_sparse_gradient_is_refused_before_anything_moves() -> None:
    tensor = nn.Parameter(torch.zeros(2, 3))
    optimizer = TopologicalAdam([tensor])
    tensor.grad = torch.ones(2, 3).to_sparse()
    refuses(optimizer, r"sparse gradients \(parameter 0 of shape \(2, 3\)", RuntimeError)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_a_compressed_parameter_whose_gradients_are_compressed_is_refused() -> None:
    tensor = nn.Parameter(torch.ones(2, 3).to_sparse_csr())
    with pytest.raises(ValueError, match="parameter 0 must be a dense tensor, got layout"):
        TopologicalAdam([tensor])


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("control", ["exact", "band"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e30, 3e38, 1e-42])
def test_finite_gradients_of_any_size_leave_finite_parameters(
    size: float, dtype: torch.dtype, control: str, coupling: str
) -> None:
    """As torch's Adam does; the fields stay fit for the ordinary gradients that follow."""
    ours, theirs = parameters(starts(), dtype), parameters(starts(), dtype)
    optimizer = TopologicalAdam(ours, coupling=coupling, energy_control=control)
    for tensors, each in ((ours, optimizer), (theirs, torch.optim.Adam(theirs, fused=True))):
        replay(each, tensors, gradients(2, 1.0))
        for step in gradients(3, 1.0):
            replay(each, tensors, [[size * torch.sign(gradient) for gradient in step]])
            replay(each, tensors, gradients(1, 1.0))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.isfinite(), other.isfinite())
        assert optimizer.state[mine]["scalars"].isfinite().all()
    assert size > 1e30 or all(tensor.isfinite().all() for tensor in ours)


def test_local_follows_the_twin_through_a_huge_gradient() -> None:
    """Single precision cannot hold the energy before control; the fields after it, it can."""
    fast, slow = parameters(starts()), parameters(starts(), torch.float64)
    optimizer = TopologicalAdam(fast, coupling="local")
    twin = ReferenceTopologicalAdam(slow, coupling="local")
    for step in gradients(3, 1.0):
        for scale in (1.0, 1e30):
            replay(optimizer, fast, [[scale * gradient for gradient in step]])
            replay(twin, slow, [[scale * gradient.double() for gradient in step]])
            for one, other in zip(fast, slow, strict=True):
                alpha, beta = optimizer.fields(one)
                state = twin.state[other]
                gap = (state["alpha"] - state["beta"]).float()
                torch.testing.assert_close(alpha - beta, gap, rtol=1e-4, atol=1e-6)
    assert optimizer.metrics()["energy"] > 1e50
    assert optimizer.metrics()["skipped_nonfinite"] == 0.0


def test_an_overflow_is_reported_and_not_written() -> None:
    tensor = nn.Parameter(torch.linspace(-1, 1, 8))
    optimizer = TopologicalAdam([tensor], coupling="local", field_init_scale=1e20)
    tensor.grad = torch.full((8,), 1e30)
    optimizer.step()
    assert optimizer.metrics()["energy"] == float("inf")
    assert optimizer.metrics()["skipped_nonfinite"] == 1.0
    assert tensor.isfinite().all()
