"""Torch's conventions for optimizers: hyperparameters, loading, schedulers, compilers, wrappers."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.optim_cases import COUPLINGS, compare, gradients, parameters, replay, starts
from topotune.optim import TopologicalAdam, build_optimizer, optimizer_options
from topotune.optim.reference import ReferenceTopologicalAdam


def twins(**options: Any) -> tuple[TopologicalAdam, list[nn.Parameter]]:
    tensors = parameters(starts())
    return TopologicalAdam(tensors, **options), tensors


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("off", [{"w_topo": 0.0}, {"eta": 0.0}], ids=str)
def test_switched_off_it_equals_torch_with_the_flags_that_readme_names(
    off: dict[str, Any], kind: type[torch.optim.Optimizer]
) -> None:
    decay = 0.0 if kind is torch.optim.Adam else 0.1
    flags: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"fused": True}),
        ({"foreach": False}, {}),
    ]
    for mine, torchs in flags:
        optimizer, ours = twins(weight_decay=decay, **mine, **off)
        theirs = parameters(starts())
        replay(optimizer, ours, gradients(20, 1.0))
        other = kind(theirs, weight_decay=decay, **torchs)  # type: ignore[call-arg]
        replay(other, theirs, gradients(20, 1.0))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("flags", [{}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("rate", [torch.tensor(0.01), torch.tensor([0.01]), np.float32(0.01)])
def test_lr_as_a_tensor_or_a_numpy_number(rate: Any, flags: dict[str, Any]) -> None:
    optimizer, ours = twins(lr=rate, w_topo=0.0, **flags)
    theirs = parameters(starts())
    replay(optimizer, ours, gradients(4, 1.0))
    replay(
        torch.optim.Adam(theirs, lr=rate, **(flags or {"fused": True})), theirs, gradients(4, 1.0)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if isinstance(rate, torch.Tensor):
        moved, tensors = twins(lr=rate.clone())
        torch.optim.lr_scheduler.StepLR(moved, 1)
        replay(moved, tensors, gradients(2, 1.0))
        assert not any(torch.equal(a, b) for a, b in zip(ours, tensors, strict=True))


def test_foreach_takes_no_tensor_as_lr_as_in_torch() -> None:
    with pytest.raises(ValueError, match="foreach=True takes no tensor as lr"):
        twins(lr=torch.tensor(0.1), foreach=True)


SET = [
    ("mu0", 0.0, "mu0 must be"),
    ("eta", 2.0, "eta must be"),
    ("coupling", "unifrom", "coupling must be one of"),
    ("energy_control", "exakt", "energy_control must be one of"),
    ("lr", -1.0, "lr must be"),
    ("lr", math.nan, "lr must be"),
    ("betas", (0.9, 1.5), "betas must be"),
    ("amsgrad", True, "amsgrad must be False"),
    ("capturable", True, "capturable must be False"),
    ("differentiable", True, "differentiable must be False"),
    ("zero_gradient", "keep", "zero_gradient must be one of"),
]


@pytest.mark.parametrize(("name", "value", "words"), SET)
def test_hyperparameters_are_checked_however_they_come(name: str, value: Any, words: str) -> None:
    optimizer, tensors = twins()
    replay(optimizer, tensors, gradients(2, 1.0))
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = value
    before = [tensor.detach().clone() for tensor in tensors]
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    optimizer.step()
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], name: value})
    before = [tensor.detach().clone() for tensor in tensors]
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_a_loaded_count_of_steps_is_a_whole_number() -> None:
    optimizer, _ = twins()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["steps_taken"] = "many"
    with pytest.raises(ValueError, match="steps_taken must be a whole number"):
        optimizer.load_state_dict(saved)


def test_the_first_group_may_leave() -> None:
    tensors = parameters(starts())
    optimizer = TopologicalAdam([{"params": [tensor]} for tensor in tensors])
    replay(optimizer, tensors, gradients(3, 1.0))
    optimizer.param_groups.pop(0)
    optimizer.step()
    assert optimizer.energy_trace().step.tolist() == [1, 2, 3, 4]
    optimizer.param_groups.clear()
    optimizer.step()


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_kind_of_weight_decay_is_loaded(decoupled: bool) -> None:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = parameters(starts())
    source = kind(theirs, weight_decay=0.1, fused=True)
    replay(source, theirs, gradients(3, 1.0))
    ours = parameters([p.detach() for p in theirs])
    target = TopologicalAdam(ours, w_topo=0.0)
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["decoupled_weight_decay"] is decoupled
    replay(source, theirs, gradients(3, 1.0))
    replay(target, ours, gradients(3, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_a_state_dict_does_not_name_stays_group_by_group() -> None:
    theirs = parameters(starts())
    source = torch.optim.Adam([{"params": theirs[:1]}, {"params": theirs[1:]}], lr=0.5)
    ours = parameters(starts())
    groups: list[dict[str, Any]] = [
        {"params": ours[:1], "coupling": "local", "eta": 0.1},
        {"params": ours[1:]},
    ]
    target = TopologicalAdam(groups, lr=0.1, zero_gradient="hold")
    target.load_state_dict(source.state_dict())
    read = [[g[n] for n in ("coupling", "eta", "zero_gradient", "lr")] for g in target.param_groups]
    assert read == [["local", 0.1, "hold", 0.5], ["uniform", 0.02, "hold", 0.5]]


@pytest.mark.parametrize("kind", [torch.optim.Adam, TopologicalAdam])
def test_a_hook_after_a_load_has_the_last_word(kind: Any) -> None:
    tensors = parameters(starts())
    optimizer = kind(tensors)
    replay(optimizer, tensors, gradients(1, 1.0))
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: loaded.state[tensors[0]]["exp_avg"].fill_(7.0)
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[tensors[0]]["exp_avg"].unique().item() == 7.0


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_l2_weight_decay_follows_the_twin(coupling: str) -> None:
    options: dict[str, Any] = {"weight_decay": 0.1, "decoupled_weight_decay": False}
    found = compare(torch.float64, 1.0, steps=30, coupling=coupling, maximize=True, **options)
    assert found.error <= 1e-10


@pytest.mark.parametrize(
    "carry",
    [
        copy.deepcopy,
        lambda o: pickle.loads(pickle.dumps(o)),
        lambda o: o.load_state_dict(o.state_dict()) or o,
    ],
    ids=["deepcopy", "pickle", "load"],
)
def test_no_key_of_torch_comes_into_a_group(
    carry: Callable[[TopologicalAdam], TopologicalAdam],
) -> None:
    optimizer, tensors = twins()
    replay(optimizer, tensors, gradients(1, 1.0))
    keys = optimizer.param_groups[0].keys()
    copied = carry(optimizer)
    assert copied.param_groups[0].keys() == keys
    copied.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert copied.param_groups[1].keys() == keys
    theirs = torch.optim.Adam(parameters(starts()))
    copied = TopologicalAdam(parameters(starts()))
    copied.load_state_dict(theirs.state_dict())
    assert copied.param_groups[0].keys() == keys


def test_entries_that_are_no_tensors_are_kept() -> None:
    optimizer, tensors = twins()
    replay(optimizer, tensors, gradients(1, 1.0))
    extra = {"note": "mine", "seen": 3, "list": [1, 2], "array": np.arange(3)}
    optimizer.state[tensors[0]].update(extra)
    optimizer.load_state_dict(optimizer.state_dict())
    loaded = optimizer.state[tensors[0]]
    assert loaded["note"] == "mine"
    assert loaded["list"] == [1, 2]
    assert loaded["list"] is not extra["list"]
    assert loaded["array"].tolist() == [0, 1, 2]
    replay(optimizer, tensors, gradients(1, 1.0))


@pytest.mark.parametrize("carry", ["memory", "file"])
@pytest.mark.parametrize(("coupling", "control"), [("exchange", "band"), ("uniform", "exact")])
def test_a_state_dict_of_the_published_package_goes_on(
    coupling: str, control: str, carry: str
) -> None:
    """Its layout (``m, v, alpha, beta`` and a number as ``step``) is also the twin's."""
    options: dict[str, Any] = {"coupling": coupling, "energy_control": control}
    slow = parameters(starts(), torch.float64)
    twin = ReferenceTopologicalAdam(slow, eta=0.05, **options)
    replay(twin, slow, gradients(5, 1.0))
    whole = twin.state_dict()
    kept = ("lr", "betas", "eps", "eta", "mu0", "w_topo", "field_init_scale", "target_energy")
    saved: dict[str, Any] = {
        "state": {
            i: {name: entries[name] for name in ("step", "m", "v", "alpha", "beta")}
            for i, entries in whole["state"].items()
        },
        "param_groups": [
            {name: group[name] for name in (*kept, "params")} for group in whole["param_groups"]
        ],
    }
    assert isinstance(saved["state"][0]["step"], int)
    if carry == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    fast = parameters([p.detach() for p in slow])
    optimizer = TopologicalAdam(fast, **options)
    optimizer.load_state_dict(saved)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(optimizer.fields(one)[0], twin.state[other]["alpha"])
    replay(twin, slow, gradients(5, 1.0))
    replay(optimizer, fast, gradients(5, 1.0))
    assert optimizer.param_groups[0]["eta"] == 0.05
    for one, other in zip(fast, slow, strict=True):
        assert optimizer.state[one]["step"].item() == 10
        assert (one - other).abs().max().item() <= 1e-12
    del saved["param_groups"][0]["target_energy"]
    with pytest.raises(ValueError, match=r"parameter 0 are not the fields.*'target_energy'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("kind", [torch.optim.Adam, TopologicalAdam])
def test_a_number_of_steps_as_torch_before_1_12_saved_it(kind: Any) -> None:
    theirs = parameters(starts())
    source = kind(theirs)
    replay(source, theirs, gradients(3, 1.0))
    saved = copy.deepcopy(source.state_dict())
    for entries in saved["state"].values():
        entries["step"] = int(entries["step"].item())
    optimizer, tensors = twins()
    optimizer.load_state_dict(saved)
    replay(optimizer, tensors, gradients(1, 1.0))
    assert optimizer.state[tensors[0]]["step"].item() == 4


def test_what_has_no_kernel_is_refused() -> None:
    meta = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match=r"parameter 0 lies on meta.*fused=True needs one of cpu"):
        TopologicalAdam([meta], fused=True)
    with pytest.raises(ValueError, match=r"parameter 1: .*real floating point.*float8_e4m3fn"):
        TopologicalAdam(
            [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn))]
        )


def test_a_sharded_parameter_is_refused_in_one_sentence() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    sharded = DTensor.from_local(torch.zeros(4), mesh, [Shard(0)], run_check=False)
    with pytest.raises(ValueError, match="parameter 0 is a DTensor: TopologicalAdam takes plain"):
        TopologicalAdam([nn.Parameter(sharded)])


@pytest.mark.parametrize("foreach", [None, True])
def test_a_compiled_step_runs_uncompiled_and_compiles_nothing_anew(foreach: bool | None) -> None:
    torch._dynamo.reset()
    plain, ours = twins(foreach=foreach)
    compiled, theirs = twins(foreach=foreach)
    step = torch.compile(compiled.step, backend="eager")
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        for recorded in gradients(10, 1.0):
            replay(plain, ours, [recorded])
            for tensor, gradient in zip(theirs, recorded, strict=True):
                tensor.grad = gradient.clone()
            step()
    finally:
        torch._dynamo.config.error_on_recompile = before
        torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_checkpoints_of_torch_distributed_are_restored_twice(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    inputs = torch.randn(8, 4)

    def trained(net: nn.Module, optimizer: TopologicalAdam) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()

    source = TopologicalAdam(model.parameters(), coupling="local")
    trained(model, source)
    for turn in range(2):
        folder = tmp_path / str(turn)
        saved = get_optimizer_state_dict(model, source)
        save({"optimizer": saved}, checkpoint_id=folder, no_dist=True)
        fresh = copy.deepcopy(model)
        target = TopologicalAdam(fresh.parameters(), coupling="local")
        held = {"optimizer": get_optimizer_state_dict(fresh, target)}
        load(held, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(fresh, target, held["optimizer"])
        trained(model, source)
        trained(fresh, target)
        for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(one, other)
        model, source = fresh, target


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_turns_between_sets_of_parameters_equal_optimizers_of_their_own(coupling: str) -> None:
    """A trunk and two heads by turns, each tensor with its own count of steps."""
    together, apart = parameters(starts()), parameters(starts())
    optimizer = TopologicalAdam(together, coupling=coupling)
    alone = [TopologicalAdam([tensor], coupling=coupling) for tensor in apart]
    plans = []
    for turn, recorded in enumerate(gradients(12, 1.0)):
        taking_part = (0, 1 + turn % 2)
        optimizer.zero_grad()
        for i in taking_part:
            together[i].grad, apart[i].grad = recorded[i].clone(), recorded[i].clone()
            alone[i].step()
        optimizer.step()
        plans.append(list(optimizer._plans.values()))
    # Every turn after the first two uses what they have built.
    assert all(kept == plans[1] for kept in plans[2:])
    assert len(plans[1]) == 2
    for one, other, each in zip(together, apart, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(optimizer.state[one]["scalars"], each.state[other]["scalars"])


def test_plans_of_parameters_that_left_are_let_go() -> None:
    optimizer, tensors = twins()
    for _ in range(40):
        replay(optimizer, tensors, gradients(1, 1.0))
        del optimizer.state[tensors[0]]
        tensors[0] = optimizer.param_groups[0]["params"][0] = nn.Parameter(tensors[0].detach())
    replay(optimizer, tensors, gradients(1, 1.0))
    assert len(optimizer._plans) == 1


@pytest.mark.parametrize("kind", [TopologicalAdam, ReferenceTopologicalAdam])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_zero_gradient_decides_whether_a_padding_row_moves(coupling: str, kind: Any) -> None:
    for choice, moves in (("move", True), ("hold", False)):
        torch.manual_seed(0)
        layer = nn.Embedding(5, 3, padding_idx=0)
        optimizer = kind(layer.parameters(), coupling=coupling, zero_gradient=choice)
        for turn in range(50):
            optimizer.zero_grad()
            layer(torch.tensor([0, 1 + turn % 4])).square().sum().backward()
            optimizer.step()
        assert bool(layer.weight[0].any()) is moves
        assert layer.weight[1:].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("control", ["exact", "band"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_hold_follows_the_twin(coupling: str, control: str, dtype: torch.dtype) -> None:
    """Half of every gradient is zero; one tensor is large enough for tricks of its own."""
    begin = [*starts(), 0.05 * torch.randn(130, 130, generator=torch.Generator().manual_seed(1))]
    options: dict[str, Any] = {"coupling": coupling, "energy_control": control}
    fast, slow = parameters(begin, dtype), parameters(begin, torch.float64)
    pair = (
        (TopologicalAdam(fast, zero_gradient="hold", **options), fast),
        (ReferenceTopologicalAdam(slow, zero_gradient="hold", **options), slow),
    )
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        step = [1e-2 * torch.randn(t.shape, generator=generator) for t in begin]
        step = [g.bfloat16().float() * (g > 0) for g in step]
        for optimizer, tensors in pair:
            replay(optimizer, tensors, [step])
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(fast, slow, strict=True):
        assert (one.double() - other).abs().max().item() <= bound


def test_a_search_space_may_search_zero_gradient() -> None:
    assert optimizer_options("topological_adam")["zero_gradient"] == "move"
    built = build_optimizer(
        "topological_adam", [nn.Parameter(torch.zeros(2))], {"zero_gradient": "hold"}
    )
    assert built.param_groups[0]["zero_gradient"] == "hold"


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-2, cycle_momentum=True),
    ],
)
def test_schedulers_change_rates_and_betas(scheduler: Callable[..., Any]) -> None:
    optimizer, ours = twins(eta=0.0)
    theirs = parameters(starts())
    other = torch.optim.Adam(theirs, fused=True)
    mine, torchs = scheduler(optimizer), scheduler(other)
    for step in gradients(10, 1.0):
        replay(optimizer, ours, [step])
        replay(other, theirs, [step])
        mine.step()
        torchs.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
