"""Topological Adam: Adam with two auxiliary fields whose joint energy is held at a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from topotune.optim.fields import CURRENT, ENERGY, field_dtype
from topotune.optim.measures import (
    EnergyTrace,
    FieldStates,
    TraceRing,
    common,
    field_metrics,
    materialised,
    metrics,
)
from topotune.optim.state import (
    ADAM_ONLY,
    STEPS,
    check_gradient,
    check_group,
    check_parameter,
    check_state,
    converted,
    label,
)
from topotune.optim.update import Plan

PLANS_KEPT = 32
"""Sets of tensors with a gradient whose plans are kept, for models that change them by turns."""


class TopologicalAdam(Optimizer):
    """Energy-stabilised Adam with coupled auxiliary fields (S. Reid, 2025).

    Every parameter tensor has two fields ``alpha`` and ``beta`` of its shape. A step moves them
    by the coupling current ``J`` of their difference and the gradient, brings their mean energy
    ``mean(alpha^2 + beta^2) / 2`` back to a target, and updates ::

        p -= lr * (adam_direction + w_topo * tanh(alpha - beta))

    The names and defaults of the first nine arguments are those of the package
    ``topological-adam`` 1.0. The dynamics default to the paper's pseudocode
    (``coupling="uniform"``, ``energy_control="exact"``); that package's are
    ``coupling="exchange", energy_control="band"``. ``eps`` stands outside the root by default, as
    in Kingma's Adam, torch and that package, because then ``w_topo=0`` or ``eta=0`` *is*
    ``torch.optim.Adam`` (``AdamW`` with ``weight_decay``) with the same flags, bit for bit, the
    property that the paper states; its formula has ``eps`` inside (``eps_inside_sqrt=True``). By
    default that is ``Adam(params, fused=True)``; ``foreach=False`` gives ``Adam(params)`` as it
    runs on the CPU.

    Parameters whose gradient is zero drift: the correction does not ask whether an element has a
    gradient. A padding row of an ``Embedding`` leaves zero (by 3e-5 to 6e-3 in 1000 steps at lr
    1e-3, depending on coupling and model). That is the method; ``zero_gradient="hold"`` gives
    such elements no correction.

    The update costs one or two reads of the gradient and one elementwise pass over the tensor,
    never writes a field for ``uniform`` and ``exchange``, and never waits for the device.

    Args:
        params: tensors, named tensors, or parameter groups with hyperparameters of their own.
        lr: learning rate, >= 0; a number or, as in torch, a tensor of one element (read by the host
            in every step).
        betas: decay of the two moments, each in [0, 1).
        eps: floor of the denominator, >= 0.
        eta: coupling rate in [0, 1); 0 switches fields and correction off.
        mu0: field permeability, > 0; the current acts with ``eta / mu0``.
        w_topo: weight of the correction, >= 0.
        field_init_scale: size of the fields at the start, > 0.
        target_energy: mean energy that the control aims at, > 0.
        weight_decay: >= 0.
        decoupled_weight_decay: torch's name: True for AdamW's decay, False for Adam's (L2), which
            is part of the gradient of the moments and not of the fields'.
        coupling: ``uniform`` (J is one number a tensor and shifts the fields), ``exchange`` (J is
            normalised by the gradient and rotates the fields into each other) or ``local``
            (element by element).
        energy_control: ``exact`` rescales to the target in every step; ``band`` amplifies to the
            target from below and multiplies by 0.9 above ten times the target.
        zero_gradient: ``move`` or ``hold``: whether an element whose gradient is exactly zero gets
            the correction.
        eps_inside_sqrt: ``m / sqrt(v + eps)`` instead of ``m / (sqrt(v) + eps)``. The state's
            ``exp_avg_sq`` is then the average of ``g^2 + eps``.
        field_init: ``tanh_cos`` of the parameter (deterministic) or seeded ``normal``.
        field_seed: seed of ``normal``.
        maximize: ascend the objective.
        foreach, fused: which of torch's Adam kernels serves, with torch's meaning of the flags;
            the result equals ``torch.optim.Adam`` with the same flags. Both None: fused on the
            CPU and on CUDA, else torch's default. ``foreach=False`` handles one tensor at a time.
        trace_capacity: steps that :meth:`energy_trace` can hold between two calls.

    Raises:
        ValueError: a hyperparameter is outside its bounds, or a parameter is not a plain dense
            tensor of real floating point (a DTensor is a shard of one).

    A gradient with a NaN or an infinity (or one whose sum or norm overflows its type) leaves the
    fields of its tensor as they are and gets no correction; it is counted in
    ``metrics()["skipped_nonfinite"]``. The Adam part treats it as ``torch.optim.Adam`` does, so
    the NaN reaches the moments and the parameter. Nothing is clamped: where the dynamics
    overflow, the reported energy says so, and that step is skipped in the same way.

    ``torch.compile`` leaves ``step`` as it is; it is not for CUDA graphs.

    Fields are float64 for float64 parameters, else float32; the scalars of a tensor are float64
    always. All that determines later steps lies in ``state`` and ``param_groups``; the trace does
    not (read it before saving).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eta: float = 0.02,
        mu0: float = 0.5,
        w_topo: float = 0.15,
        field_init_scale: float = 0.01,
        target_energy: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        coupling: str = "uniform",
        energy_control: str = "exact",
        zero_gradient: str = "move",
        eps_inside_sqrt: bool = False,
        field_init: str = "tanh_cos",
        field_seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        trace_capacity: int = 4096,
    ) -> None:
        given = dict(locals())
        defaults = {k: v for k, v in given.items() if k not in ("self", "params", "__class__")}
        check_group(defaults)
        super().__init__(params, defaults)
        self._reset_caches()

    def _reset_caches(self) -> None:
        """Forget everything that is derived from the state."""
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._trace = TraceRing(self.defaults["trace_capacity"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a loaded state dict; newer hyperparameters get defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            self._fill_in(group)
        self._reset_caches()

    def _fill_in(self, group: dict[str, Any]) -> None:
        """Give a group the keys of this class that it lacks, and none of torch's beside them."""
        for name in ADAM_ONLY:
            # Torch adds "differentiable" to the defaults of what it restores.
            self.defaults.pop(name, None)
            if not group.get(name):
                group.pop(name, None)
        for name, value in self.defaults.items():
            group.setdefault(name, value)
        group.setdefault(STEPS, 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyperparameters are checked.

        Raises:
            ValueError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._fill_in(group)
            check_group(group)
            first = sum(len(other["params"]) for other in self.param_groups[:-1])
            for place, parameter in enumerate(group["params"]):
                check_parameter(label(group, place, first), parameter, group)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # as torch's own methods: what a step keeps would be traced anew
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: a hyperparameter that was set since is outside its bounds, or the shape,
                type or device of a gradient or of an entry of the state is not its parameter's.
                Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        offset = 0
        for group in self.param_groups:
            found = [(p, g) for p in group["params"] if (g := p.grad) is not None]
            if found:
                parameters, gradients = map(list, zip(*found, strict=True))
                work.append((group, self._plan(group, parameters, gradients, offset), gradients))
            offset += len(group["params"])
        # All checks are done, and nothing has moved yet.
        count = 1 + max((group[STEPS] for group in self.param_groups), default=0)
        for group in self.param_groups:
            group[STEPS] = count
        moved = [
            batch.step([gradients[i] for i in batch.places], group)
            for group, plan, gradients in work
            for batch in plan.batches
        ]
        fields = [each for each in moved if each is not None]
        if fields:
            self._trace.record(count, fields)
        return loss

    def _plan(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        offset: int,
    ) -> Plan:
        """The batches of these tensors, kept from an earlier step where nothing has changed.

        Raises:
            RuntimeError, ValueError: as :meth:`step`.
        """
        key = tuple(map(id, parameters))
        states = list(map(self.state.get, parameters))
        plan = self._plans.get(key)
        fits = plan is not None and plan.fits(group, states)
        if plan is not None and fits and plan.takes(gradients):
            return plan
        if not fits:
            check_group(group)
        places = {id(p): i for i, p in enumerate(group["params"])}
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            called = label(group, places[id(parameter)], offset)
            check_parameter(called, parameter, group)
            check_gradient(called, parameter, gradient)
            check_state(called, parameter, {} if state is None else state)
        # A plan keeps its tensors alive; those that have left the optimizer are let go.
        alive = {id(p) for each in self.param_groups for p in each["params"]}
        self._plans = {k: kept for k, kept in self._plans.items() if alive.issuperset(k)}
        if len(self._plans) >= PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        entries = [self.state[parameter] for parameter in parameters]
        indices = [offset + places[id(parameter)] for parameter in parameters]
        plan = self._plans[key] = Plan(group, parameters, entries, indices)
        return plan

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as a copy; everything is checked before anything is changed.

        Moments get their parameters' type and device, as torch casts them; fields stay float32 or
        float64 and the scalars float64. A state dict of ``torch.optim.Adam`` or ``AdamW`` begins
        new fields where the parameters stand and keeps its kind of weight decay
        (``decoupled_weight_decay``); one of the published package ``topological-adam`` becomes
        this class's, fields included. Hyperparameters that it does not name stay as they are,
        group by group: that package's dynamics are ``coupling="exchange"``,
        ``energy_control="band"``.

        Raises:
            ValueError: a hyperparameter is outside its bounds or not this class's, or an entry
                does not fit its parameter; the message names it and both shapes.
        """
        exact: list[tuple[Tensor, dict[str, Any]]] = []
        # Torch casts every entry to the parameter's type, which rounds scalars and fields. The
        # caller's hooks come before the check, and see the exact entries after the load.
        handles = (
            self.register_load_state_dict_pre_hook(lambda _, loaded: self._checked(loaded, exact)),
            self.register_load_state_dict_post_hook(
                lambda _: self.state.update(exact), prepend=True
            ),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _checked(
        self, loaded: dict[str, Any], exact: list[tuple[Tensor, dict[str, Any]]]
    ) -> dict[str, Any]:
        """The state dict with its entries converted; ``exact`` gets them a second time.

        Raises:
            ValueError: as :meth:`load_state_dict`.
        """
        saved_groups = loaded["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved_groups] != sizes:
            return loaded  # torch refuses it
        state, groups, first = dict(loaded["state"]), [], 0
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            names = {"param_names": group["param_names"]} if "param_names" in group else {}
            own = self.defaults | {n: v for n, v in group.items() if n in self.defaults}
            groups.append(own | saved_group)
            final = groups[-1] | names | {"params": group["params"]}
            check_group(final)
            for place, (parameter, key) in enumerate(
                zip(group["params"], saved_group["params"], strict=True)
            ):
                called = label(final, place, first)
                check_parameter(called, parameter, final)
                if key in state:
                    entries = converted(
                        called, parameter, state[key], saved_group, final["coupling"]
                    )
                    exact.append((parameter, entries))
                    state[key] = {n: v for n, v in entries.items() if isinstance(v, Tensor)}
            first += len(group["params"])
        return {**loaded, "state": state, "param_groups": groups}

    def energy(self) -> float:
        """Sum over tensors of the energy before control, at the last step; 0.0 without fields."""
        return common(self._measured())[ENERGY].sum().item()

    def J_mean_abs(self) -> float:  # noqa: N802 - the name of the published package
        """Mean over tensors of ``|J|`` at the last step; 0.0 without fields."""
        return common(self._measured())[CURRENT].mean().item()

    def field_metrics(self) -> dict[str, float]:
        """The field statistics of the published package, from the fields as they are.

        Returns:
            Means over tensors: ``energy`` (after control), ``j_t`` (``|J|``), ``alpha_norm``,
            ``beta_norm`` and ``alpha_beta_corr`` (the centred correlation of the fields). All 0.0
            without fields.
        """
        return field_metrics(self._measured())

    def metrics(self) -> dict[str, float]:
        """What the last step measured; the only place beside the trace that waits for the device.

        Returns:
            ``energy`` and ``energy_controlled``: mean over tensors before and after control.
            ``coupling_current``: mean over tensors of ``|J|`` (``local``: of its mean over
            elements).
            ``alpha_norm``, ``beta_norm``, ``alpha_beta_cos``: 2-norms of the fields of all
            tensors together and the cosine between them.
            ``topo_ratio``: 2-norm of ``w_topo * tanh(alpha - beta)`` over that of Adam's
            direction, all tensors together and every element counted, also one that
            ``zero_gradient="hold"`` leaves.
            ``skipped_nonfinite``: tensor steps skipped since the start.
            All 0.0 without fields.
        """
        return metrics(self._measured())

    def energy_trace(self) -> EnergyTrace:
        """Per-step values since the last call (one copy from each device), and forget them.

        The trace is not part of ``state_dict()``; loading one, pickling or copying the optimizer
        begins an empty trace.
        """
        return self._trace.drain()

    def fields(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """The fields ``alpha, beta`` of a parameter, materialised as fresh tensors of its shape.

        Raises:
            ValueError: the parameter is not the optimizer's, or has no fields (no step with a
                gradient yet, ``eta=0``, or no elements).
        """
        state = self.state.get(parameter, {})
        if "scalars" not in state:
            raise ValueError(
                f"no fields for this parameter of shape {tuple(parameter.shape)}: it is not in "
                "the optimizer, had no step with a gradient, has no elements, or eta is 0"
            )
        alpha, beta = materialised(state)
        return alpha.to(field_dtype(parameter)), beta.to(field_dtype(parameter))

    def _measured(self) -> FieldStates:
        """The states that have fields, in the order of the parameters, with their groups."""
        return [
            (state, group)
            for group in self.param_groups
            for parameter in group["params"]
            if "scalars" in (state := self.state.get(parameter, {}))
        ]
