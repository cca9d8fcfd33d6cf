"""One step of Adam and the topological correction for tensors that share device and type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from topotune.optim._fields import FieldBatch, Move, field_dtype, initial_fields
from topotune.optim._local import LocalFields
from topotune.optim._lowrank import ExchangeFields, UniformFields

FIELDS: dict[str, type[FieldBatch]] = {
    "uniform": UniformFields,
    "exchange": ExchangeFields,
    "local": LocalFields,
}

FIELD_ENTRIES = frozenset(name for kind in FIELDS.values() for name in (*kind.tensors, "scalars"))
"""The entries of a tensor's state that are not Adam's."""

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch's fused Adam kernel is chosen unless the caller says otherwise."""


def wants_fused(group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether a tensor goes through torch's fused Adam kernel."""
    if group["fused"] is None and group["foreach"] is None:
        # The kernel walks memory, so a tensor with gaps in it (a strided view) is not for it.
        dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
        return dense and parameter.device.type in FUSED_DEVICES
    return bool(group["fused"])


def laid_out_like(parameter: Tensor, other: Tensor) -> Tensor:
    """``other`` with the strides that torch gives to a tensor like ``parameter``.

    The fused kernel pairs elements by their place in memory; it does not look at strides.
    """
    if other.stride() == parameter.stride():
        return other
    return torch.empty_like(parameter, dtype=other.dtype).copy_(other)


class Batch:
    """Tensors of one parameter group on one device and of one type, and views of their state.

    A batch owns nothing that must survive: it is rebuilt from the optimizer's state whenever the
    set of tensors with a gradient, or the state itself, changes.

    Args:
        places: the tensors' places among those of the group that have a gradient.
        parameters: the tensors.
        states: their entries in the optimizer's state; missing ones are created.
        indices: the tensors' places in the whole optimizer.
        group: the parameter group.
    """

    def __init__(
        self,
        places: Sequence[int],
        parameters: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        indices: Sequence[int],
        group: Mapping[str, Any],
    ) -> None:
        self.places, self.parameters = list(places), list(parameters)
        self.fused = wants_fused(group, self.parameters[0])
        for parameter, state in zip(parameters, states, strict=True):
            self._start_adam(parameter, state)
        self.exp_avgs = [state["exp_avg"] for state in states]
        self.exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        self.steps = [state["step"] for state in states]
        self.fields: FieldBatch | None = None
        # An empty tensor has no mean energy, hence no fields; Adam handles it.
        self.filled = [i for i, parameter in enumerate(parameters) if parameter.numel()]
        if group["eta"] != 0.0 and self.filled:
            kind = FIELDS[group["coupling"]]
            for i in self.filled:
                if not all(name in states[i] for name in (*kind.tensors, "scalars")):
                    # No fields yet, or those of another coupling.
                    for name in FIELD_ENTRIES & states[i].keys():
                        del states[i][name]
                    alpha, beta = initial_fields(
                        parameters[i],
                        group["field_init_scale"],
                        group["field_init"],
                        group["field_seed"],
                        indices[i],
                    )
                    states[i].update(kind.start(alpha, beta))
            self.fields = kind([states[i] for i in self.filled])
        self.targets = [self.parameters[i] for i in self.filled]
        self.field_dtype = field_dtype(self.parameters[0])

    def _start_adam(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        """Adam's own state; the counter lies where torch's chosen kernel wants it."""
        wide = torch.get_default_dtype() is torch.float64 and not self.fused
        kind = torch.float64 if wide else torch.float32
        device = parameter.device if self.fused else torch.device("cpu")
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=kind, device=device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] = state["step"].to(device=device, dtype=kind)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = laid_out_like(parameter, state[name])

    def step(self, gradients: Sequence[Tensor], group: Mapping[str, Any]) -> FieldBatch | None:
        """Update the tensors in place.

        Returns:
            The fields after the step; None if there are none.
        """
        self._adam_step(gradients, group)
        fields = self.fields
        if fields is None:
            return None
        rate = group["eta"] / group["mu0"]
        move = Move(
            keep=1.0 - group["eta"],
            rate=-rate if group["maximize"] else rate,
            target=group["target_energy"],
            exact=group["energy_control"] == "exact",
        )
        kind = self.field_dtype
        flat = []
        for i in self.filled:
            gradient = gradients[i] if gradients[i].dtype is kind else gradients[i].to(kind)
            flat.append(gradient if gradient.dim() == 1 else gradient.reshape(-1))
        fields.advance(flat, move)
        weight = -group["lr"] * group["w_topo"]
        if weight != 0.0:
            fields.add_correction(self.targets, weight)
        return fields

    def _adam_step(self, gradients: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        """Torch's own Adam, so that no correction means bit for bit torch's result."""
        beta1, beta2 = group["betas"]
        eps = group["eps"]
        if group["eps_inside_sqrt"] and eps != 0.0:
            # sqrt(vh + eps) is torch's sqrt(v / (1 - b2^t)) of an average of g^2 + eps, so the
            # same kernels serve: what b2 will multiply is raised by (1 - b2) / b2 * eps.
            torch._foreach_add_(self.exp_avg_sqs, (1.0 - beta2) / beta2 * eps)
            eps = 0.0
        adam(
            self.parameters,
            list(map(laid_out_like, self.parameters, gradients)) if self.fused else list(gradients),
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            self.steps,
            foreach=False if self.fused else group["foreach"],
            fused=True if self.fused else group["fused"],
            decoupled_weight_decay=group["weight_decay"] != 0.0,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=eps,
            maximize=group["maximize"],
        )


class Plan:
    """The batches of a parameter group for one set of tensors that have a gradient."""

    def __init__(
        self,
        kind: tuple[object, ...],
        group: Mapping[str, Any],
        parameters: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        indices: Sequence[int],
    ) -> None:
        self.kind, self.parameters = kind, list(parameters)
        members: dict[tuple[object, ...], list[int]] = {}
        for i, parameter in enumerate(parameters):
            fused = wants_fused(group, parameter)
            alone = group["foreach"] is False and not fused
            key = (parameter.device, parameter.dtype, fused, i if alone else -1)
            members.setdefault(key, []).append(i)
        self.batches = [
            Batch(
                places,
                [parameters[i] for i in places],
                [states[i] for i in places],
                [indices[i] for i in places],
                group,
            )
            for places in members.values()
        ]
        self._strides = [parameter.stride() for parameter in parameters]
        self._witness = [state["exp_avg"] for state in states]

    def fits(
        self,
        kind: tuple[object, ...],
        parameters: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
    ) -> bool:
        """Whether settings, tensors and state are still those that the batches view.

        Compared by identity: comparing values would wait for the device.
        """
        return (
            kind == self.kind
            and len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and [parameter.stride() for parameter in parameters] == self._strides
            and all(map(is_, [state.get("exp_avg") for state in states], self._witness))
        )
