"""``method: tcep``: networks that relax, trained by their nudged equilibria."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from topotune.data.splits import TensorPair
from topotune.errors import ConfigError, StoppedError, UnknownNameError, did_you_mean
from topotune.optim import OPTIMIZERS, build_optimizer, optimizer_class, optimizer_options
from topotune.plugins import accepted_names, is_import_path
from topotune.records import TrialSpec, Value
from topotune.tasks.base import Task
from topotune.tasks.classification import ClassificationTask
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import NAMES, Dynamics, Learning, read_options
from topotune.train.learner import BatchResult, Learner, check_optimizer
from topotune.train.method import Contender, Method

OPTIMIZER = "optimizer"
"""The parameter that names the optimizer of the gradients."""

TOLERATED = 0.05
"""An epoch with a larger mean share of unconverged samples is marked."""

AS_DAMPING = ("delay", "fade")
"""Recirculations that are a multiple of the tokens at rest, and so act there as lambda does."""

PATIENCE = 3
"""Marked epochs in a row after which no further one starts."""

UNCONVERGED = "unconverged_share"
"""The column of measured values that says which share of a batch did not converge."""


class TcepMethod(Method):
    """Toroidal continuous equilibrium propagation, with any optimizer on its gradients.

    The parameters that :data:`topotune.tcep.options.NAMES` lists belong to TCEP; ``optimizer``
    (default ``adam``) names an optimizer by registry or import path; every other parameter goes
    to that optimizer.

    Raises:
        ConfigError: a parameter that neither of them has, a value that breaks a rule, or an
            optimizer with an option of the same name as one of TCEP's.
        UnknownNameError: the optimizer or a choice does not exist.
    """

    def __init__(self, spec: TrialSpec) -> None:
        super().__init__(spec)
        self._name = _optimizer_name(spec.params.get(OPTIMIZER, "adam"))
        self._dynamics, self._learning = read_options(spec.params)
        own = {*NAMES, OPTIMIZER}
        self._options = {k: v for k, v in spec.params.items() if k not in own}
        _check_names(self._name, self._options)

    def model(self, task: Task) -> nn.Module:
        """The spec's model, ``tcep`` unless it names another, with the spec's dynamics.

        Raises:
            ConfigError: the task does not classify, its model is no TCEP network, or the way of
                learning does not fit the dynamics.
            UnstableError: the dynamics cannot settle.
        """
        spec = self.spec
        own: dict[str, Any] = {"dynamics": self._dynamics}
        if "field" in spec.params:
            own["field"] = spec.params["field"]
        for name in own:
            if name in spec.model_options:
                raise ConfigError(
                    f"model.{name}",
                    f"method tcep sets this itself (got {spec.model_options[name]!r})",
                    "Write TCEP's parameters without the prefix 'model.'",
                )
        try:
            model = task.model(spec.model or "tcep", {**spec.model_options, **own})
        except UnknownNameError as error:
            if isinstance(task, ClassificationTask):
                raise
            raise self._unfit(f"has no network for it: {error}") from error
        except ConfigError as error:
            written_by_us = {f"model.{name}" for name in own}
            if error.place in written_by_us:
                raise self._unfit(f"has model {spec.model!r}, which is no TCEPNetwork") from error
            raise
        if not isinstance(model, TCEPNetwork):
            raise self._unfit(f"gives a {type(model).__name__}, which is no TCEPNetwork")
        EquilibriumLearner(self._learning).check(model)
        return model

    def learner(self, task: Task, probe: TensorPair) -> Learner:
        """A learner by the spec's gradient.

        Raises:
            ConfigError: the targets are not class numbers.
        """
        return self._learner(self._learning, probe)

    def _learner(self, learning: Learning, probe: TensorPair) -> Learner:
        targets = probe.targets
        if targets.dtype != torch.int64 or targets.ndim != 1:
            kind = str(targets.dtype).removeprefix("torch.")
            raise self._unfit(f"has targets of {kind} and shape {tuple(targets.shape[1:])} a row")
        return TcepLearner(self._dynamics, learning, probe)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer that the parameter ``optimizer`` names."""
        optimizer = build_optimizer(self._name, parameters, self._options)
        check_optimizer(optimizer, self._name, kind=OPTIMIZER)
        return optimizer

    def contenders(
        self, task: Task, probe: TensorPair, device: torch.device
    ) -> Mapping[str, Contender]:
        """``bptt``: the same network and optimizer, the relaxation unrolled and backpropagated."""
        through_time = dataclasses.replace(
            self._learning,
            gradient="bptt",
            beta=self._learning.beta_start,  # not used, and not learned either
            probe_cosine=False,
        )
        return {"bptt": Contender(self.optimizer, lambda: self._learner(through_time, probe))}

    def resolved(self, model: nn.Module) -> dict[str, Value]:
        """What the network made of the dynamics, such as gamma of a gamma_fraction."""
        assert isinstance(model, TCEPNetwork)
        return dict(model.resolved())

    def remarks(self, specs: Sequence[TrialSpec]) -> list[str]:
        """A space that searches lambda, and recirculations that come to another lambda at rest."""
        same = [spec.params for spec in specs if spec.params.get("recirculation") in AS_DAMPING]
        rates = {spec.params["lambda"] for spec in specs if "lambda" in spec.params}
        if len(rates) < 2 or not any("lambda" in params for params in same):
            return []
        kinds = " and ".join(sorted({str(params["recirculation"]) for params in same}))
        return [
            f"recirculation {kinds}: at rest it stands where 'none' does with damping lambda - "
            "gain, and this space searches lambda as well: at several times the evaluations it "
            "finds nothing that 'none' would not. Take it out of the choices, or fix lambda"
        ]

    def plain(self) -> TrialSpec:
        """Gradient descent with a rate of zero, TCEP's choices as they are, its numbers default.

        What is measured depends on the choices alone; numbers at an end of their range may be
        what made the dynamics diverge.
        """
        choices = {k: v for k, v in self.spec.params.items() if isinstance(v, str | bool)}
        kept = {k: v for k, v in choices.items() if k in NAMES}
        return dataclasses.replace(self.spec, params={**kept, OPTIMIZER: "sgd", "lr": 0.0})

    def _unfit(self, problem: str) -> ConfigError:
        return ConfigError(
            f"task {self.spec.task!r} with method tcep",
            problem,
            "TCEP trains classifiers: a task with int64 class numbers as targets, logits as "
            "outputs and a TCEPNetwork as its model, such as digits",
        )


def _optimizer_name(name: Value) -> str:
    if not (isinstance(name, str) and (is_import_path(name) or name in OPTIMIZERS)):
        raise UnknownNameError(
            OPTIMIZER, str(name), OPTIMIZERS, "or an import path, package.module:Class"
        )
    return name


def _check_names(optimizer: str, options: Mapping[str, Value]) -> None:
    known = optimizer_options(optimizer)
    own = {*NAMES, OPTIMIZER}
    if shared := sorted(own & known.keys()):
        raise ConfigError(
            OPTIMIZER,
            f"{optimizer} has options that are named like TCEP's own: {', '.join(shared)}",
            "Wrap it in a class whose options are named otherwise",
        )
    if accepted_names(optimizer_class(optimizer))[1]:
        return  # it takes any other option as well
    for name in options:
        if name not in known:
            raise ConfigError(
                f"method parameter {name}",
                f"neither tcep nor its optimizer {optimizer} takes {name!r}"
                + did_you_mean(name, {*own, *known}),
            )


class TcepLearner(Learner):
    """Gradients from equilibria, and a watch over their convergence.

    An epoch is marked when the mean share of samples with a phase that did not converge is above
    ``TOLERATED``; after ``PATIENCE`` marked epochs in a row the next does not start. State noise
    keeps every sample from settling, so noisy training is not watched.

    Args:
        dynamics: of the network, for the text of the cause.
        learning: how the gradients are made.
        probe: rows that are measured once an epoch.
    """

    def __init__(self, dynamics: Dynamics, learning: Learning, probe: TensorPair) -> None:
        self._inner = EquilibriumLearner(learning)
        self._dynamics, self._watch, self._probe = dynamics, not learning.noisy, probe
        self._shares: list[float] = []  # of the last marked epochs in a row, oldest first
        self._unconverged: Tensor | float = 0.0  # samples of this epoch; on the device
        self._samples, self._skipped = 0, 0

    def gradients(self, model: nn.Module, batch: TensorPair) -> BatchResult:
        """One contrast of free and nudged equilibria (or one of the baselines)."""
        contrast = self._inner.gradients(_network(model), batch.inputs, batch.targets)
        share = contrast.measured.get(UNCONVERGED)
        if share is not None:
            self._unconverged = self._unconverged + share.double() * len(batch)
        self._samples += len(batch)
        self._skipped += all(parameter.grad is None for parameter in model.parameters())
        return BatchResult(contrast.loss, contrast.outputs, contrast.measured)

    def after_step(self, model: nn.Module) -> None:
        """Bring the spectral norms back under their caps."""
        self._inner.after_step(_network(model))

    def before_epoch(self) -> None:
        """Refuse to train on what does not converge."""
        if len(self._shares) < PATIENCE:
            return
        solver = self._dynamics.solver
        raise StoppedError(
            f"unconverged: at least {min(self._shares):.1%} of the samples did not reach "
            f"tolerance {solver.tolerance:g} within {solver.steps} steps in each of the last "
            f"{PATIENCE} epochs; raise steps or lambda, lower gamma or the caps"
        )

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """The probe batch's measures; ``skipped_steps``, batches of the epoch of which no sample
        settled; and ``unconverged_marked``, 1.0 or 0.0."""
        share, skipped = float(self._unconverged) / max(self._samples, 1), float(self._skipped)
        self._unconverged, self._samples, self._skipped = 0.0, 0, 0
        marked = self._watch and share > TOLERATED
        self._shares = [*self._shares[1 - PATIENCE :], share] if marked else []
        found = self._inner.epoch_metrics(_network(model), self._probe.inputs, self._probe.targets)
        return {**found, "skipped_steps": skipped, "unconverged_marked": float(marked)}

    def curves(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Time, energy and residual along one relaxation of the probe batch."""
        return self._inner.relaxation(_network(model), self._probe.inputs)

    def fault(self, columns: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
        """The first step whose states left the finite numbers, as its relaxation saw it."""
        return self._inner.fault(columns)

    def state_dict(self) -> dict[str, Any]:
        """The inner learner's state, and how long it has not converged."""
        return {"inner": self._inner.state_dict(), "unconverged": list(self._shares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is another learner's.
        """
        if state.keys() != {"inner", "unconverged"}:
            raise ValueError(
                f"no state of TcepLearner: it has {', '.join(sorted(state)) or 'none'}"
            )
        self._inner.load_state_dict(state["inner"])
        self._shares = [float(share) for share in state["unconverged"]]


def _network(model: nn.Module) -> TCEPNetwork:
    assert isinstance(model, TCEPNetwork)  # TcepMethod.model makes no other
    return model
