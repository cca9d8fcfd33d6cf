"""Topological Adam: Adam with two auxiliary fields whose joint energy is held at a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from topotune.optim import _report
from topotune.optim._batch import FIELD_ENTRIES, Plan
from topotune.optim._hyper import check_group
from topotune.optim._trace import EnergyTrace, TraceRing

STEPS = "steps_taken"
"""Key of the first parameter group that counts calls of ``step``."""


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
    ``torch.optim.Adam`` (``AdamW`` with ``weight_decay``), bit for bit, the property that the
    paper states; its formula has ``eps`` inside (``eps_inside_sqrt=True``).

    The update costs one or two reads of the gradient and one elementwise pass over the tensor,
    never writes a field for ``uniform`` and ``exchange``, and never waits for the device.

    Args:
        params: tensors, named tensors, or parameter groups with hyperparameters of their own.
        lr: learning rate, >= 0.
        betas: decay of the two moments, each in [0, 1).
        eps: floor of the denominator, >= 0.
        eta: coupling rate in [0, 1); 0 switches fields and correction off.
        mu0: field permeability, > 0; the current acts with ``eta / mu0``.
        w_topo: weight of the correction, >= 0.
        field_init_scale: size of the fields at the start, > 0.
        target_energy: mean energy that the control aims at, > 0.
        weight_decay: decoupled weight decay (AdamW), >= 0.
        coupling: ``uniform`` (J is one number a tensor and shifts the fields), ``exchange`` (J is
            normalised by the gradient and rotates the fields into each other) or ``local``
            (element by element).
        energy_control: ``exact`` rescales to the target in every step; ``band`` amplifies to the
            target from below and multiplies by 0.9 above ten times the target.
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
        ValueError: a hyperparameter is outside its bounds, or a parameter is not real floating
            point.

    A gradient with a NaN or an infinity (or one whose sum or norm overflows its type) leaves the
    fields of its tensor as they are and gets no correction; it is counted in
    ``metrics()["skipped_nonfinite"]``. The Adam part treats it as ``torch.optim.Adam`` does, so
    the NaN reaches the moments and the parameter. Nothing is clamped: where the dynamics
    overflow, the reported energy says so.

    Fields are float64 for float64 parameters, else float32; the scalars of a tensor are float64
    always. All that determines later steps lies in ``state`` and ``param_groups``; the trace does
    not (read it before saving).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eta: float = 0.02,
        mu0: float = 0.5,
        w_topo: float = 0.15,
        field_init_scale: float = 0.01,
        target_energy: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        coupling: str = "uniform",
        energy_control: str = "exact",
        eps_inside_sqrt: bool = False,
        field_init: str = "tanh_cos",
        field_seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        trace_capacity: int = 4096,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "eta": eta,
            "mu0": mu0,
            "w_topo": w_topo,
            "field_init_scale": field_init_scale,
            "target_energy": target_energy,
            "weight_decay": weight_decay,
            "coupling": coupling,
            "energy_control": energy_control,
            "eps_inside_sqrt": eps_inside_sqrt,
            "field_init": field_init,
            "field_seed": field_seed,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "trace_capacity": trace_capacity,
        }
        check_group(defaults)
        super().__init__(params, defaults)
        self._reset_caches()

    def _reset_caches(self) -> None:
        """Forget everything that is derived from the state."""
        self._plans: dict[int, Plan] = {}
        self._trace = TraceRing(self.defaults["trace_capacity"])
        self.param_groups[0].setdefault(STEPS, 0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a loaded state dict; newer hyperparameters get defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._reset_caches()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyperparameters are checked.

        Raises:
            ValueError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            for tensor in group["params"]:
                if not tensor.is_floating_point():
                    raise ValueError(
                        f"parameters must be real floating point, got dtype {tensor.dtype}"
                    )
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.param_groups[0]
        first[STEPS] += 1
        offset = 0
        for place, group in enumerate(self.param_groups):
            parameters, gradients = [], []
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise RuntimeError(
                        "TopologicalAdam does not take sparse gradients "
                        f"(parameter of shape {tuple(parameter.shape)}); build the layer with "
                        "sparse=False"
                    )
                parameters.append(parameter)
                gradients.append(gradient)
            if parameters:
                for batch in self._plan(place, group, parameters, offset).batches:
                    fields = batch.step([gradients[i] for i in batch.places], group)
                    if fields is not None:
                        self._trace.record(first[STEPS], fields)
            offset += len(group["params"])
        return loss

    def _plan(
        self, place: int, group: dict[str, Any], parameters: list[Tensor], offset: int
    ) -> Plan:
        """The group's batches, kept from the last step where nothing has changed."""
        states = [self.state[parameter] for parameter in parameters]
        kind = (group["coupling"], group["eta"] != 0.0, group["foreach"], group["fused"])
        plan = self._plans.get(place)
        if plan is None or not plan.fits(kind, parameters, states):
            numbers = {id(p): offset + i for i, p in enumerate(group["params"])}
            indices = [numbers[id(parameter)] for parameter in parameters]
            plan = self._plans[place] = Plan(kind, group, parameters, states, indices)
        return plan

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as a copy, every tensor in the type that it was saved in.

        Torch casts floating-point state to the parameter's type, which would round the float64
        scalars and, for half precision, the fields.
        """
        final: dict[str, Any] = {}
        # The last hook sees what any hook of the caller made of the state dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: final.update(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved_ids = [i for group in final["param_groups"] for i in group["params"]]
        tensors = [p for group in self.param_groups for p in group["params"]]
        for saved, parameter in zip(saved_ids, tensors, strict=True):
            loaded = self.state.get(parameter, {})
            for name, value in final["state"].get(saved, {}).items():
                exact = value.to(parameter.device) if name in FIELD_ENTRIES else loaded[name]
                loaded[name] = exact.clone()

    def energy(self) -> float:
        """Sum over tensors of the energy before control, at the last step; 0.0 without fields."""
        return _report.total_energy(self._states())

    def J_mean_abs(self) -> float:  # noqa: N802 - the name of the published package
        """Mean over tensors of ``|J|`` at the last step; 0.0 without fields."""
        return _report.metrics(self._states(), [])["coupling_current"]

    def field_metrics(self) -> dict[str, float]:
        """The field statistics of the published package, from the fields as they are.

        Returns:
            Means over tensors: ``energy`` (after control), ``j_t`` (``|J|``), ``alpha_norm``,
            ``beta_norm`` and ``alpha_beta_corr`` (the centred correlation of the fields). All 0.0
            without fields.
        """
        return _report.field_metrics(self._states())

    def metrics(self) -> dict[str, float]:
        """What the last step measured; the only place beside the trace that waits for the device.

        Returns:
            ``energy`` and ``energy_controlled``: mean over tensors before and after control.
            ``coupling_current``: mean over tensors of ``|J|`` (``local``: of its mean over
            elements).
            ``alpha_norm``, ``beta_norm``, ``alpha_beta_cos``: 2-norms of the fields of all
            tensors together and the cosine between them.
            ``topo_ratio``: 2-norm of ``w_topo * tanh(alpha - beta)`` over that of Adam's
            direction, all tensors together.
            ``skipped_nonfinite``: tensor steps skipped since the start.
            All 0.0 without fields.
        """
        directions = [
            (self.state[parameter], group)
            for group in self.param_groups
            for parameter in group["params"]
            if "scalars" in self.state.get(parameter, {})
        ]
        return _report.metrics(self._states(), directions)

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
        return _report.kind_of(state).materialise(state)

    def _states(self) -> list[dict[str, Tensor]]:
        """The states that have fields, in the order of the parameters."""
        found = (self.state.get(p, {}) for group in self.param_groups for p in group["params"])
        return [state for state in found if "scalars" in state]
