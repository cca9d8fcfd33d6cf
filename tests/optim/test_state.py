"""Saving, loading, copying; which tensors take part in a step."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim_cases import COUPLINGS, SHAPES, gradients, parameters, replay, starts
from topotune.optim import TopologicalAdam

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file], ids=["memory", "file"])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_resumes_bit_for_bit(
    coupling: str,
    dtype: torch.dtype,
    flags: dict[str, Any],
    carry: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    recording = gradients(24, 1.0)
    whole = parameters(starts(), dtype)
    straight = TopologicalAdam(whole, coupling=coupling, lr=0.01, **flags)
    replay(straight, whole, recording[:12])
    saved = carry(straight.state_dict())
    halfway = [p.detach().clone() for p in whole]
    before = straight.metrics()

    second = parameters(halfway)
    resumed = TopologicalAdam(second, **flags)
    resumed.load_state_dict(saved)
    assert resumed.metrics() == before
    assert resumed.param_groups[0]["lr"] == 0.01

    replay(straight, whole, recording[12:])
    replay(resumed, second, recording[12:])
    for mine, other in zip(whole, second, strict=True):
        assert torch.equal(mine, other)
        for name, value in straight.state[mine].items():
            assert resumed.state[other][name].dtype == value.dtype, name
            assert torch.equal(resumed.state[other][name], value), name
    assert resumed.metrics() == straight.metrics()
    assert resumed.energy_trace().step.tolist() == list(range(13, 25))


def test_loading_copies() -> None:
    """Torch's own load shares memory with the loaded dict where no cast is needed."""
    first = parameters(starts())
    source = TopologicalAdam(first, coupling="local")
    replay(source, first, gradients(3, 1.0))
    saved = source.state_dict()
    frozen = copy.deepcopy(saved)
    second = parameters(starts())
    target = TopologicalAdam(second)
    target.load_state_dict(saved)
    replay(target, second, gradients(3, 1.0))
    for index, entries in frozen["state"].items():
        for name, value in entries.items():
            assert torch.equal(saved["state"][index][name], value), name


def test_a_state_that_a_hook_changed_is_the_one_loaded() -> None:
    first = parameters(starts())
    source = TopologicalAdam(first)
    replay(source, first, gradients(3, 1.0))

    def doubled(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state)
        changed["state"][0]["gap0"] *= 2.0
        return changed

    second = parameters(starts())
    target = TopologicalAdam(second)
    target.register_load_state_dict_pre_hook(doubled)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.state[second[0]]["gap0"], 2.0 * source.state[first[0]]["gap0"])


def test_scalars_stay_float64_and_fields_wide() -> None:
    tensors = parameters(starts(), torch.bfloat16)
    optimizer = TopologicalAdam(tensors)
    replay(optimizer, tensors, gradients(3, 1.0))
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    state = optimizer.state[tensors[0]]
    assert state["scalars"].dtype is torch.float64
    assert state["gap0"].dtype is torch.float32
    assert state["exp_avg"].dtype is torch.bfloat16


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_copies_go_their_own_way(
    coupling: str, carry: Callable[[TopologicalAdam], TopologicalAdam]
) -> None:
    tensors = parameters(starts())
    optimizer = TopologicalAdam(tensors, coupling=coupling)
    replay(optimizer, tensors, gradients(4, 1.0))
    twin = carry(optimizer)
    copies = twin.param_groups[0]["params"]
    assert twin.energy_trace().step.tolist() == []
    replay(optimizer, tensors, gradients(4, 1.0))
    replay(twin, copies, gradients(4, 1.0))
    for mine, other in zip(tensors, copies, strict=True):
        assert mine is not other
        assert torch.equal(mine, other)
    assert twin.metrics() == optimizer.metrics()


def test_a_state_dict_of_torch_adam_starts_the_fields_where_it_stands() -> None:
    tensors = parameters(starts())
    adam = torch.optim.Adam(tensors, lr=0.02, fused=True)
    replay(adam, tensors, gradients(5, 1.0))
    moved = parameters([p.detach() for p in tensors])
    optimizer = TopologicalAdam(moved, field_init_scale=0.5)
    optimizer.load_state_dict(adam.state_dict())
    begin = moved[0].detach().clone()
    replay(optimizer, moved, gradients(1, 1.0))
    assert optimizer.state[moved[0]]["step"].item() == 6
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert torch.equal(optimizer.state[moved[0]]["alpha0"], 0.5 * torch.tanh(begin))


def test_state_replaced_by_hand_is_noticed() -> None:
    """Code that moves or resets the state must not step on stale views."""
    recording = gradients(8, 1.0)
    first, second = parameters(starts()), parameters(starts())
    plain, handled = TopologicalAdam(first), TopologicalAdam(second)
    replay(plain, first, recording)
    replay(handled, second, recording[:4])
    for tensor in second:
        for name, value in handled.state[tensor].items():
            handled.state[tensor][name] = value.clone()
    replay(handled, second, recording[4:])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    handled.state.clear()
    replay(handled, second, recording[:1])
    assert handled.state[second[0]]["step"].item() == 1


def test_groups_have_hyperparameters_of_their_own() -> None:
    values = starts()
    together = parameters(values)
    alone = parameters(values)
    recording = gradients(10, 1.0)
    grouped = TopologicalAdam([{"params": together[:1], "coupling": "exchange"}], lr=0.01)
    grouped.add_param_group({"params": together[1:], "eta": 0.1, "weight_decay": 0.2})
    replay(grouped, together, recording)
    one = TopologicalAdam(alone[:1], lr=0.01, coupling="exchange")
    two = TopologicalAdam(alone[1:], lr=0.01, eta=0.1, weight_decay=0.2)
    replay(one, alone[:1], [step[:1] for step in recording])
    replay(two, alone[1:], [step[1:] for step in recording])
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert len(grouped.energy_trace().step) == 10


def test_types_are_mixed_in_one_group() -> None:
    values = starts()
    types = (torch.float32, torch.bfloat16, torch.float64)
    mixed = [nn.Parameter(v.to(t)) for v, t in zip(values, types, strict=True)]
    optimizer = TopologicalAdam(mixed)
    replay(optimizer, mixed, gradients(5, 1.0))
    for i, (tensor, dtype) in enumerate(zip(mixed, types, strict=True)):
        single = [nn.Parameter(values[i].to(dtype))]
        replay(TopologicalAdam(single), single, [step[i : i + 1] for step in gradients(5, 1.0)])
        assert torch.equal(tensor, single[0]), dtype
    assert optimizer.energy_trace().energy.isfinite().all()


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradients_may_be_missing_and_appear_later(coupling: str) -> None:
    recording = gradients(9, 1.0)
    tensors, alone = parameters(starts()), parameters(starts())
    optimizer = TopologicalAdam(tensors, coupling=coupling)
    untouched = tensors[0].detach().clone()
    for step in recording[:4]:
        for tensor, gradient in zip(tensors[1:], step[1:], strict=True):
            tensor.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(tensors[0], untouched)
    assert tensors[0] not in optimizer.state
    replay(optimizer, tensors, recording[4:])
    late = TopologicalAdam(alone[:1], coupling=coupling)
    replay(late, alone[:1], [step[:1] for step in recording[4:]])
    assert torch.equal(tensors[0], alone[0])
    assert [optimizer.state[t]["step"].item() for t in tensors] == [5.0, 9.0, 9.0]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_empty_and_single_element_tensors(coupling: str) -> None:
    tensors = [nn.Parameter(torch.ones(s)) for s in ((0, 3), (), (1,))]
    optimizer = TopologicalAdam(tensors, coupling=coupling)
    for _ in range(3):
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()
    assert tensors[1].item() < 1.0
    assert tensors[2].item() == pytest.approx(tensors[1].item())
    assert all(torch.isfinite(torch.tensor(list(optimizer.metrics().values()))))
    with pytest.raises(ValueError, match="no elements"):
        optimizer.fields(tensors[0])


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_layouts_do_not_matter(coupling: str) -> None:
    """A transposed parameter, a channels-last one, one with gaps, and an expanded gradient."""
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(5, 7, generator=generator)
    image = torch.randn(2, 3, 4, 4, generator=generator)
    strange = [
        nn.Parameter(square.t().contiguous().t()),
        nn.Parameter(image.to(memory_format=torch.channels_last)),
        nn.Parameter(torch.stack([square, square], dim=-1)[..., 0]),
    ]
    usual = [nn.Parameter(values.clone()) for values in (square, image, square)]
    random = torch.randn(5, 7, generator=generator)
    recording = [[random, torch.randn(1, generator=generator).expand(2, 3, 4, 4), random]]
    for tensors in (strange, usual):
        optimizer = TopologicalAdam(tensors, coupling=coupling)
        for step in recording * 4:
            for tensor, gradient in zip(tensors, step, strict=True):
                tensor.grad = gradient
            optimizer.step()
    for mine, other in zip(strange, usual, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_a_parameter_may_change_its_layout_between_steps() -> None:
    values = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))]
    recording = [[torch.sin(float(i) + values[0])] for i in range(1, 7)]
    usual, changed = parameters(values), parameters(values)
    plain, handled = TopologicalAdam(usual), TopologicalAdam(changed)
    replay(plain, usual, recording)
    replay(handled, changed, recording[:3])
    changed[0].data = changed[0].data.to(memory_format=torch.channels_last)
    replay(handled, changed, recording[3:])
    torch.testing.assert_close(usual[0], changed[0], rtol=1e-6, atol=1e-7)


def test_closure() -> None:
    tensor = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = TopologicalAdam([tensor])

    def closure() -> float:
        optimizer.zero_grad()
        loss = tensor.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == 5.0
    assert tensor.abs().sum().item() < 3.0


def test_sparse_gradients_are_refused() -> None:
    layer = nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*sparse=False"):
        TopologicalAdam(layer.parameters()).step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_other_numbers_are_refused(dtype: torch.dtype) -> None:
    tensor: Tensor = torch.zeros(3, dtype=dtype)
    with pytest.raises(ValueError, match="real floating point"):
        TopologicalAdam([tensor])


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    tensors = parameters(starts())
    optimizer = TopologicalAdam(tensors[:1])
    with pytest.raises(ValueError, match="mu0"):
        optimizer.add_param_group({"params": tensors[1:], "mu0": 0.0})
    assert len(optimizer.param_groups) == 1
    replay(optimizer, tensors[:1], [step[:1] for step in gradients(1, 1.0)])


def test_changing_the_coupling_begins_new_fields() -> None:
    tensors = parameters(starts())
    optimizer = TopologicalAdam(tensors)
    replay(optimizer, tensors, gradients(3, 1.0))
    for coupling in ("local", "exchange", "uniform"):
        optimizer.param_groups[0]["coupling"] = coupling
        replay(optimizer, tensors, gradients(2, 1.0))
        assert len(optimizer.state[tensors[0]]) == 6, coupling
        alpha, _ = optimizer.fields(tensors[0])
        assert alpha.shape == SHAPES[0]
    assert optimizer.state[tensors[0]]["step"].item() == 9
