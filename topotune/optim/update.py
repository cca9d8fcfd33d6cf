"""One step of Adam and the topological correction for tensors that share device and type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from topotune.optim.couplings import COUPLINGS
from topotune.optim.fields import FieldBatch, Move, field_dtype
from topotune.optim.state import (
    ADAM_ENTRIES,
    CHECKED,
    check_group,
    complete,
    is_dense,
    laid_out_like,
)

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch's fused Adam kernel is chosen unless the caller says otherwise."""

# Mapped over lists in C: what is looked at in every step costs a tenth of a microsecond a tensor.
_SHAPE, _DTYPE, _DEVICE, _LAYOUT = map(attrgetter, ("shape", "dtype", "device", "layout"))
_BYTES = attrgetter("nbytes")
_SETTINGS = itemgetter(*(name for name in CHECKED if name != "lr"))


class Batch:
    """Tensors of one parameter group on one device and of one type, and views of their state.

    A batch owns nothing that must survive: it is rebuilt from the optimizer's state whenever the
    set of tensors with a gradient, or the state itself, changes.

    Args:
        places: the tensors' places among those of the group that have a gradient.
        parameters: the tensors; all of them have elements, or none has.
        states: their complete entries in the optimizer's state.
        group: the parameter group.
        fused: whether torch's fused kernel serves them.
    """

    def __init__(
        self,
        places: Sequence[int],
        parameters: list[Tensor],
        states: list[dict[str, Any]],
        group: Mapping[str, Any],
        fused: bool,
    ) -> None:
        self.places, self.parameters, self.fused = places, parameters, fused
        self.steps, self.exp_avgs, self.exp_avg_sqs = (
            [state[name] for state in states] for name in ADAM_ENTRIES
        )
        self.fields: FieldBatch | None = None
        names: tuple[str, ...] = ADAM_ENTRIES
        # An empty tensor has no mean energy, hence no fields; Adam handles it.
        if group["eta"] != 0.0 and parameters[0].numel():
            kind = COUPLINGS[group["coupling"]]
            self.fields = kind(states)
            names += kind.tensors
        self.field_dtype = field_dtype(parameters[0])
        self._states = states
        self._entries_of = itemgetter(*names)
        self._entries = list(chain.from_iterable(map(self._entries_of, states)))
        self._seen = self._look()

    def _look(self) -> tuple[list[Any], ...]:
        """What the kernels take for granted of the tensors and their state."""
        return (
            list(map(_SHAPE, self.parameters)),
            list(map(Tensor.stride, self.parameters)),
            list(map(_DTYPE, self.parameters)),
            list(map(_DEVICE, self.parameters)),
            list(map(Tensor.data_ptr, self._entries)),
            # An address alone may be that of a smaller tensor that took the place of a freed one.
            list(map(_BYTES, self._entries)),
        )

    def fits(self) -> bool:
        """Whether tensors and state are still those that were checked.

        Compared by identity, layout and address: comparing values would wait for the device.
        ``p.data`` may have been exchanged, and so may a state's entry or its data.
        """
        try:
            entries = chain.from_iterable(map(self._entries_of, self._states))
            same = all(map(is_, entries, self._entries))
        except KeyError:
            return False
        same = same and self._look() == self._seen
        return same and (self.fields is None or self.fields.adopt())

    def takes(self, gradients: Sequence[Tensor]) -> bool:
        """Whether gradients have their parameters' shapes, types and devices, and are dense."""
        shapes, _, dtypes, devices, *_ = self._seen
        return (
            list(map(_SHAPE, gradients)) == shapes
            and list(map(_DTYPE, gradients)) == dtypes
            and list(map(_DEVICE, gradients)) == devices
            and list(map(_LAYOUT, gradients)).count(torch.strided) == len(shapes)
        )

    def step(self, gradients: list[Tensor], group: Mapping[str, Any]) -> FieldBatch | None:
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
        if self.parameters[0].dtype is not kind:
            flat = [gradient.to(kind).ravel() for gradient in gradients]
        else:
            flat = [g if g.dim() == 1 else g.ravel() for g in gradients]
        fields.advance(flat, move)
        weight = -float(group["lr"]) * group["w_topo"]
        if weight != 0.0:
            held = gradients if group["zero_gradient"] == "hold" else ()
            fields.add_correction(self.parameters, weight, held)
        return fields

    def _adam_step(self, gradients: list[Tensor], group: Mapping[str, Any]) -> None:
        """Torch's own Adam, so that no correction means bit for bit torch's result."""
        beta1, beta2 = group["betas"]
        eps = group["eps"]
        if group["eps_inside_sqrt"] and eps != 0.0:
            # sqrt(vh + eps) is torch's sqrt(v / (1 - b2^t)) of an average of g^2 + eps, so the
            # same kernels serve: what b2 will multiply is raised by (1 - b2) / b2 * eps.
            torch._foreach_add_(self.exp_avg_sqs, (1.0 - beta2) / beta2 * eps)
            eps = 0.0
        decoupled = group["decoupled_weight_decay"] and group["weight_decay"] != 0.0
        strides = self._seen[1]
        if self.fused and list(map(Tensor.stride, gradients)) != strides:
            gradients = list(map(laid_out_like, self.parameters, gradients))
        no_maxima: list[Tensor] = []  # of amsgrad
        tensors = (
            self.parameters,
            gradients,
            self.exp_avgs,
            self.exp_avg_sqs,
            no_maxima,
            self.steps,
        )
        numbers: dict[str, Any] = {
            "amsgrad": False,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": group["weight_decay"],
            "eps": eps,
            "maximize": group["maximize"],
        }
        if self.fused:
            # What torch's adam() calls in the end, without sorting by device and type once more.
            kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
            torch._foreach_add_(self.steps, 1)
            kernel(*tensors, lr=float(group["lr"]), **numbers)
        else:
            numbers |= {name: group[name] for name in ("lr", "foreach", "fused")}
            adam(*tensors, decoupled_weight_decay=decoupled, **numbers)


class Plan:
    """The batches of a parameter group for one set of tensors that have a gradient.

    Args:
        group: the checked parameter group.
        parameters: those of its tensors that have a gradient.
        states: their entries in the optimizer's state, checked; missing ones are created.
        indices: the tensors' places in the whole optimizer.
    """

    def __init__(
        self,
        group: Mapping[str, Any],
        parameters: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        indices: Sequence[int],
    ) -> None:
        self._kind, self._states = _kind(group), list(states)
        # The tensors are kept, so that their ids name them and no others.
        self.parameters = list(parameters)
        self._remember(group)
        batches: dict[tuple[Any, ...], list[int]] = {}
        for i, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
            fused = bool(group["fused"])
            if group["fused"] is None and group["foreach"] is None:
                fused = parameter.device.type in FUSED_DEVICES and is_dense(parameter)
            complete(parameter, state, group, indices[i], fused)
            alone = i if group["foreach"] is False and not fused else -1
            key = (fused, parameter.device, parameter.dtype, parameter.numel() > 0, alone)
            batches.setdefault(key, []).append(i)
        self.batches = [
            Batch(at, [parameters[i] for i in at], [states[i] for i in at], group, key[0])
            for key, at in batches.items()
        ]

    def _remember(self, group: Mapping[str, Any]) -> None:
        self._rate, self._settings, self._keys = group["lr"], _SETTINGS(group), len(group)

    def fits(self, group: Mapping[str, Any], states: Sequence[object]) -> bool:
        """Whether settings, tensors and state are still those that the batches view.

        Hyperparameters that were set since are checked; a new learning rate, which a scheduler
        sets in every step, quickly.

        Raises:
            ValueError: a hyperparameter is outside its bounds.
        """
        rate = group["lr"]
        known = len(group) == self._keys and all(map(is_, _SETTINGS(group), self._settings))
        if not known or not (
            rate is self._rate or (type(rate) is float and 0.0 <= rate < math.inf)
        ):
            check_group(group)
            self._remember(group)
        return (
            _kind(group) == self._kind
            and all(map(is_, states, self._states))
            and all(batch.fits() for batch in self.batches)
        )

    def takes(self, gradients: Sequence[Tensor]) -> bool:
        """Whether gradients are their parameters': see :meth:`Batch.takes`."""
        return all(batch.takes([gradients[i] for i in batch.places]) for batch in self.batches)


def _kind(group: Mapping[str, Any]) -> tuple[object, ...]:
    """What decides about the batches and their state."""
    return group["coupling"], group["eta"] != 0.0, group["foreach"], group["fused"]
