"""What a parameter group and the state of a parameter must be, checked, completed and converted.

Torch's fused kernels walk memory and check no sizes: an entry that disagrees with its parameter
would be read and written beyond its end. Whatever a kernel gets has passed through here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from topotune.optim.couplings import COUPLINGS
from topotune.optim.fields import FieldBatch, field_dtype, initial_fields

Rule = tuple[str, Callable[[float], bool]]
"""A rule in words, and whether a number keeps it; a NaN fails every comparison."""

_NOT_NEGATIVE: Rule = ("a finite number >= 0", lambda x: 0.0 <= x < math.inf)
_POSITIVE: Rule = ("a finite number > 0", lambda x: 0.0 < x < math.inf)

_NUMBERS: dict[str, Rule] = {
    "lr": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "eta": ("a number in [0, 1)", lambda x: 0.0 <= x < 1.0),
    "mu0": _POSITIVE,
    "w_topo": _NOT_NEGATIVE,
    "field_init_scale": (f"{_POSITIVE[0]} (fields that start at zero stay there)", _POSITIVE[1]),
    "target_energy": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "coupling": tuple(COUPLINGS),
    "energy_control": ("exact", "band"),
    "field_init": ("tanh_cos", "normal"),
    "zero_gradient": ("move", "hold"),
}
_FLAGS = ("eps_inside_sqrt", "maximize", "decoupled_weight_decay")
_OPTIONAL_FLAGS = ("foreach", "fused")

STEPS = "steps_taken"
"""Key of every parameter group that counts calls of ``step``."""

ADAM_ONLY = ("amsgrad", "capturable", "differentiable")
"""Flags of torch's Adam that this method does not have: False is taken, True is refused."""

CHECKED = (*_NUMBERS, *_CHOICES, *_FLAGS, *_OPTIONAL_FLAGS, "betas", "field_seed", "trace_capacity")
"""Every hyperparameter that :func:`check_group` looks at, beside :data:`ADAM_ONLY`."""

ADAM_ENTRIES = ("step", "exp_avg", "exp_avg_sq")
_FIELD_TENSORS = frozenset(name for kind in COUPLINGS.values() for name in kind.tensors)
_FIELD_ENTRIES = _FIELD_TENSORS | {"scalars"}

_PUBLISHED = {"m": "exp_avg", "v": "exp_avg_sq"}
"""Names of the moments in a state of the published package; its fields are alpha and beta."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

FUSED_KERNELS = ("cpu", "cuda", "mps", "xpu")
"""Types of device for which torch has a fused Adam kernel."""


def check_group(group: Mapping[str, Any]) -> None:
    """Check every hyperparameter of a parameter group.

    Raises:
        ValueError: a value is of the wrong type, not finite, or outside its bounds; the message
            names the hyperparameter, the value and the bound.
    """
    for name, (rule, keeps) in _NUMBERS.items():
        value = number = group[name]
        if name == "lr" and isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
            number = value.item()
        if not (_is_real(number) and keeps(number)):
            raise ValueError(f"{name} must be {rule}, got {value!r}")
    betas = group["betas"]
    pair = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
    if not pair or not all(_is_real(beta) and 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if group["eps_inside_sqrt"] and betas[1] == 0.0:
        raise ValueError(f"eps_inside_sqrt=True needs betas[1] > 0, got betas={betas!r}")
    for name, known in _CHOICES.items():
        if group[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {group[name]!r}")
    for name in (*_FLAGS, *_OPTIONAL_FLAGS):
        optional = name in _OPTIONAL_FLAGS
        if not isinstance(group[name], bool) and not (optional and group[name] is None):
            allowed = "True, False or None" if optional else "True or False"
            raise ValueError(f"{name} must be {allowed}, got {group[name]!r}")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach and fused must not both be True, got foreach=True, fused=True")
    if group["foreach"] and isinstance(group["lr"], Tensor):
        raise ValueError("foreach=True takes no tensor as lr: give a number, or fused=True")
    for name in ADAM_ONLY:
        if group.get(name):
            raise ValueError(
                f"{name} must be False: TopologicalAdam does not have this option of "
                f"torch.optim.Adam, got {group[name]!r}"
            )
    for name, low in (("field_seed", 0), ("trace_capacity", 1), (STEPS, 0)):
        value = group.get(name, low)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def label(group: Mapping[str, Any], place: int, first: int) -> str:
    """What a message calls a parameter: its place in the optimizer, and its name if it has one.

    Args:
        group: the parameter group.
        place: the parameter's place in the group.
        first: the place of the group's first parameter in the optimizer.
    """
    names: Sequence[str] = group.get("param_names", ())
    name = f" ({names[place]!r})" if place < len(names) else ""
    return f"parameter {first + place}{name}"


def check_parameter(called: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
    """Check that the method can train this tensor.

    Raises:
        ValueError: it cannot; the message names the parameter and what it is.
    """
    if _is_wrapper(parameter):
        raise ValueError(
            f"{called} is a {type(parameter).__name__}: TopologicalAdam takes plain tensors only, "
            "since its current and energy are sums over a whole tensor; replicate the model "
            "(DistributedDataParallel) instead of sharding it, or train it with torch.optim.AdamW"
        )
    if parameter.layout is not torch.strided:
        raise ValueError(f"{called} must be a dense tensor, got layout {parameter.layout}")
    if parameter.dtype not in DTYPES:
        raise ValueError(
            f"{called}: parameters must be real floating point of 16, 32 or 64 bits, "
            f"got dtype {parameter.dtype}"
        )
    if group["fused"] and parameter.device.type not in FUSED_KERNELS:
        raise ValueError(
            f"{called} lies on {parameter.device}, where torch has no fused kernel: fused=True "
            f"needs one of {', '.join(FUSED_KERNELS)}"
        )
    if group["fused"] and not is_lazy(parameter) and not is_dense(parameter):
        raise ValueError(
            f"{called} of shape {tuple(parameter.shape)} and strides {parameter.stride()} has gaps "
            "in memory, which torch's fused kernel would overwrite: make it contiguous, or leave "
            "fused at None"
        )


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor only stands for others, such as the shards of a DTensor."""
    return is_traceable_wrapper_subclass(tensor)


def check_gradient(called: str, parameter: Tensor, gradient: Tensor) -> None:
    """Check that a gradient is its parameter's.

    Raises:
        RuntimeError: it is sparse, as torch's Adam raises.
        ValueError: its shape, type or device is another.
    """
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"TopologicalAdam does not take sparse gradients ({called} of shape "
            f"{tuple(parameter.shape)}, gradient of layout {gradient.layout}); build the layer "
            "with sparse=False"
        )
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"{called} has shape {tuple(parameter.shape)}, but its gradient has shape "
            f"{tuple(gradient.shape)}: the parameter's data was exchanged after backward()"
        )
    if gradient.dtype is not parameter.dtype or gradient.device != parameter.device:
        raise ValueError(
            f"{called} is {parameter.dtype} on {parameter.device}, but its gradient is "
            f"{gradient.dtype} on {gradient.device}"
        )


def check_state(called: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Check that the entries of a state fit their parameter as they are.

    Raises:
        ValueError: one is missing, or its shape, type or device is another.
    """
    check_shapes(called, parameter, state)
    for name, dtype in _dtypes(parameter).items():
        entry = state.get(name)
        if entry is not None and (entry.dtype is not dtype or entry.device != parameter.device):
            raise ValueError(
                f"{called} is {parameter.dtype} on {parameter.device}, so that {name!r} in its "
                f"state must be {dtype} there, got {entry.dtype} on {entry.device}; "
                "optimizer.load_state_dict(optimizer.state_dict()) converts the state"
            )


def _dtypes(parameter: Tensor) -> dict[str, torch.dtype]:
    """Entry of a parameter's state to its type."""
    moments = dict.fromkeys(ADAM_ENTRIES[1:], parameter.dtype)
    fields = dict.fromkeys(_FIELD_TENSORS, field_dtype(parameter))
    return moments | fields | {"scalars": torch.float64}


def check_shapes(called: str, parameter: Tensor, state: object) -> None:
    """Check what no conversion could mend: missing entries, shapes, and entries of other kinds.

    Raises:
        ValueError: the message names the parameter, the entry and both shapes.
    """
    entries = _mapping(called, state)
    present = [name for name in ADAM_ENTRIES if name in entries]
    if present and len(present) < len(ADAM_ENTRIES):
        (missing, *_) = [name for name in ADAM_ENTRIES if name not in entries]
        raise ValueError(
            f"the state of {called} has {present[0]!r} but no {missing!r}; delete "
            "optimizer.state[parameter] to begin anew"
        )
    step = entries.get("step", 0)
    single = isinstance(step, Tensor) and step.numel() == 1 and step.layout is torch.strided
    if not single and not isinstance(step, Real):
        found = f"shape {tuple(step.shape)}" if isinstance(step, Tensor) else repr(step)
        raise ValueError(f"'step' in the state of {called} must be one number, got {found}")
    for name in (*ADAM_ENTRIES[1:], *sorted(_FIELD_TENSORS & entries.keys())):
        if name in entries:
            _check_tensor(called, repr(name), entries[name], parameter)
    kind = coupling_of(entries)
    if kind is not None:
        entry = _check_tensor(called, "'scalars'", entries["scalars"])
        if entry.shape != (kind.scalar_count,):
            raise ValueError(
                f"'scalars' in the state of {called} must have shape ({kind.scalar_count},), got "
                f"{tuple(entry.shape)}; delete it to begin new fields"
            )


def _mapping(called: str, state: object) -> Mapping[str, Any]:
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of {called} must be a dict, got {type(state).__name__}")
    return state


def _check_tensor(called: str, name: str, entry: object, like: Tensor | None = None) -> Tensor:
    """An entry of a state, if it is a dense real tensor and of the shape of ``like``."""
    if not isinstance(entry, Tensor):
        raise ValueError(
            f"{name} in the state of {called} must be a tensor, got {type(entry).__name__}"
        )
    plain = entry.layout is torch.strided and not _is_wrapper(entry)
    if not plain or not entry.is_floating_point():
        raise ValueError(
            f"{name} in the state of {called} must be a dense real tensor, got a "
            f"{type(entry).__name__} of layout {entry.layout} and dtype {entry.dtype}"
        )
    if like is not None and entry.shape != like.shape:
        raise ValueError(
            f"{called} has shape {tuple(like.shape)}, but {name} in its state has shape "
            f"{tuple(entry.shape)}: give every entry the parameter's shape, or delete "
            "optimizer.state[parameter] to begin anew"
        )
    return entry


def coupling_of(state: Mapping[str, Any]) -> type[FieldBatch] | None:
    """The coupling whose fields a state holds, known by its entries; None without fields."""
    if "scalars" not in state:
        return None
    kinds = (kind for kind in COUPLINGS.values() if all(name in state for name in kind.tensors))
    return next(kinds, None)


def complete(
    parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any], index: int, fused: bool
) -> None:
    """Create the entries that a step needs and a state lacks, and lay the others out for it.

    Args:
        parameter: the tensor.
        state: its checked state, changed in place.
        group: its parameter group.
        index: its place in the optimizer.
        fused: whether torch's fused kernel serves it.
    """
    # The counter lies where torch's chosen kernel wants it.
    wide = torch.get_default_dtype() is torch.float64 and not fused
    number = torch.float64 if wide else torch.float32
    device = parameter.device if fused else torch.device("cpu")
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=number, device=device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    step = torch.as_tensor(state["step"], dtype=number, device=device)
    # The very tensor where nothing is to change: another plan may hold it.
    state["step"] = step if step.dim() == 0 else step.reshape(())
    for name in ADAM_ENTRIES[1:]:
        state[name] = laid_out_like(parameter, state[name])
    if group["eta"] == 0.0 or not parameter.numel():
        return
    fields = COUPLINGS[group["coupling"]]
    if coupling_of(state) is not fields:
        # No fields yet, or those of another coupling.
        for name in _FIELD_ENTRIES & state.keys():
            del state[name]
        scale, kind, seed = (group[f"field_{name}"] for name in ("init_scale", "init", "seed"))
        state.update(fields.start(*initial_fields(parameter, scale, kind, seed, index)))
    for name in fields.tensors:
        state[name] = state[name].contiguous()


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill their stretch of memory, which fused kernels walk."""
    if tensor.is_contiguous():
        return True
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def laid_out_like(parameter: Tensor, other: Tensor) -> Tensor:
    """``other`` with the strides that torch gives to a tensor like ``parameter``.

    The fused kernel pairs elements by their place in memory; it does not look at strides.
    """
    same = other.stride() == parameter.stride()
    # A stride of a dimension of size one says nothing about the place in memory.
    if same or (other.is_contiguous() and parameter.is_contiguous()):
        return other
    return torch.empty_like(parameter, dtype=other.dtype).copy_(other)


def converted(
    called: str, parameter: Tensor, saved: object, group: Mapping[str, Any], coupling: str
) -> dict[str, Any]:
    """A copy of one parameter's part of a state dict, in the types that a step needs.

    Moments get the parameter's type, as torch casts them; fields and scalars keep theirs, wider
    than a half-precision parameter's. A state of the published package ``topological-adam``
    becomes this class's.

    Args:
        called: what messages call the parameter.
        parameter: the tensor.
        saved: the entries.
        group: the parameter group that was saved with them.
        coupling: the coupling that the loaded group has.

    Raises:
        ValueError: an entry does not fit the parameter.
    """
    entries = dict(_mapping(called, saved))
    for old, new in _PUBLISHED.items():
        if old in entries and new not in entries:
            entries[new] = entries.pop(old)
    published = [entries.pop(name) for name in ("alpha", "beta") if name in entries]
    check_shapes(called, parameter, entries)
    if "step" in entries and not isinstance(entries["step"], Tensor):
        entries["step"] = torch.tensor(float(entries["step"]), dtype=torch.float64)
    types, loaded = _dtypes(parameter), {}
    for name, value in entries.items():
        if name in types:
            value = value.to(device=parameter.device, dtype=types[name])
        loaded[name] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    if len(published) == 2 and parameter.numel():
        if "target_energy" not in group:
            raise ValueError(
                f"'alpha' and 'beta' in the state of {called} are not the fields of "
                "TopologicalAdam: their group has no 'target_energy' (the published package's V3 "
                "averages gradients there); delete both from the state dict to begin new fields"
            )
        fields = [_check_tensor(called, "a field (alpha or beta)", f, parameter) for f in published]
        where, kind = parameter.device, field_dtype(parameter)
        alpha, beta = (f.to(device=where, dtype=kind).contiguous() for f in fields)
        loaded |= COUPLINGS[coupling].start(alpha, beta)
    return loaded
