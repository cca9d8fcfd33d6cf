"""The readable twin of Topological Adam: the literal recursion, one tensor after the other.

This is the oracle of the fast path's tests and the baseline of its benchmark. It keeps both fields
as full tensors, rewrites them in every step and asks the device for every decision, as a first
implementation does. It follows the same specification and takes the same arguments; ``foreach``,
``fused`` and ``trace_capacity`` have no effect here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from topotune.optim.fields import BAND_DAMPING, BAND_WIDTH, initial_fields
from topotune.optim.state import check_group
from topotune.optim.topological_adam import TopologicalAdam


class ReferenceTopologicalAdam(Optimizer):
    """Topological Adam as written; see :class:`topotune.optim.TopologicalAdam` for the arguments.

    Fields and moments have the parameter's type. ``state[p]`` holds ``step``, ``m``, ``v``,
    ``alpha``, ``beta``, ``energy`` (before control), ``energy_controlled``, ``current``
    (``|J|``) and ``skipped``.
    """

    __signature__ = inspect.signature(TopologicalAdam)

    def __init__(self, params: ParamsT, *args: Any, **options: Any) -> None:
        given = self.__signature__.bind(params, *args, **options)
        given.apply_defaults()
        defaults = {name: value for name, value in given.arguments.items() if name != "params"}
        check_group(defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group, index)
                index += 1
        return loss

    def _step_one(self, p: Tensor, grad: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        if not state:
            alpha, beta = initial_fields(
                p, group["field_init_scale"], group["field_init"], group["field_seed"], index
            )
            state.update(
                step=0,
                m=torch.zeros_like(p),
                v=torch.zeros_like(p),
                alpha=alpha.to(p.dtype),
                beta=beta.to(p.dtype),
                energy=0.0,
                energy_controlled=0.0,
                current=0.0,
                skipped=0,
            )
        g = -grad if group["maximize"] else grad
        beta1, beta2 = group["betas"]
        lr, eps = group["lr"], group["eps"]

        state["step"] += 1
        # L2 weight decay is part of the gradient that Adam sees, not of the one that fields see.
        decoupled, decay = group["decoupled_weight_decay"], group["weight_decay"]
        adam_g = g if decoupled else g + decay * p
        m = state["m"] = beta1 * state["m"] + (1 - beta1) * adam_g
        v = state["v"] = beta2 * state["v"] + (1 - beta2) * adam_g * adam_g
        m_hat = m / (1 - beta1 ** state["step"])
        v_hat = v / (1 - beta2 ** state["step"])
        if group["eps_inside_sqrt"]:
            direction = m_hat / (v_hat + eps).sqrt()
        else:
            direction = m_hat / (v_hat.sqrt() + eps)

        correction = torch.zeros_like(p)
        if group["eta"] != 0.0 and p.numel():
            if bool(torch.isfinite(g).all()) and move_fields(state, g, group):
                correction = group["w_topo"] * torch.tanh(state["alpha"] - state["beta"])
                if group["zero_gradient"] == "hold":
                    correction[g == 0] = 0.0
            else:
                state["skipped"] += 1

        if decoupled:
            p.mul_(1 - lr * decay)
        p.sub_(lr * (direction + correction))


def move_fields(state: dict[str, Any], g: Tensor, group: dict[str, Any]) -> bool:
    """Current, coupling, energy and control of one tensor, in this order.

    Returns:
        False where the energy overflows: the fields are left as they are, and the energy says so.
    """
    alpha, beta = state["alpha"], state["beta"]
    eta, target = group["eta"], group["target_energy"]
    rate = eta / group["mu0"]

    gap = alpha - beta
    if group["coupling"] == "uniform":
        current = (gap * g).sum()
        to_alpha, to_beta = current, -current
    elif group["coupling"] == "exchange":
        current = (gap * g).sum() / (g.norm() + 1e-12)
        to_alpha, to_beta = current * beta, -current * alpha
    else:
        current = gap * g
        to_alpha, to_beta = current, -current
    alpha = (1 - eta) * alpha + rate * to_alpha
    beta = (1 - eta) * beta + rate * to_beta

    energy = (0.5 * (alpha * alpha + beta * beta).mean()).item()
    if not math.isfinite(energy):
        state["energy"] = energy
        return False
    if group["energy_control"] == "exact" or energy < target:
        scale = (target / energy) ** 0.5
    elif energy > BAND_WIDTH * target:
        scale = BAND_DAMPING
    else:
        scale = 1.0
    state["alpha"], state["beta"] = scale * alpha, scale * beta
    state["energy"], state["energy_controlled"] = energy, energy * scale**2
    state["current"] = current.abs().mean().item()
    return True
