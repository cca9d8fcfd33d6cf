"""What the benchmarks of TCEP share: small networks, data, a short training."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topotune.bench.shared import table
from topotune.data.splits import TensorPair
from topotune.errors import UnknownNameError
from topotune.tasks.base import DataOptions
from topotune.tasks.builtin import TASKS, build_task
from topotune.tasks.classification import ImageTask
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Dynamics, Learning
from topotune.train.process import synchronise

if TYPE_CHECKING:
    from rich.table import Table

BATCH = 32
"""Samples that every gradient and every relaxation is measured on."""

WIDTH, HEADS, HIDDEN, MEMORY = 16, 2, 64, 32
"""Sizes of the measured network; its tokens are the rows of the image."""

TRAIN_STEPS = 60
TRAIN_RATE = 1e-2
"""How the trained networks are trained: eqprop with its defaults, Adam, batches of ``BATCH``."""

RANDOM = "random"
RANDOM_ROWS, RANDOM_SHAPE = 1024, (1, 8, 8)
"""Standard normal images with random labels, for machines without a data set."""


@dataclass(frozen=True)
class Data:
    """Prepared training rows on the device.

    Attributes:
        name: a task, or "random".
        train: images (n, channels, side, side) in float32 and labels (n,).
        classes: how many.
    """

    name: str
    train: TensorPair
    classes: int

    @property
    def batch(self) -> TensorPair:
        """The rows that are measured on: the first ``BATCH``."""
        return self.train.rows(0, BATCH)


def load(name: str, device: torch.device) -> Data:
    """The training rows of an image task, or random ones.

    Raises:
        UnknownNameError: no such image task.
        DataUnavailableError: its data are not on this machine.
    """
    if name == RANDOM:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(RANDOM_ROWS, *RANDOM_SHAPE, generator=generator)
        labels = torch.randint(10, (RANDOM_ROWS,), generator=generator)
        return Data(name, TensorPair(images, labels).to(device), 10)
    known = {key: task for key, task in TASKS.items() if issubclass(task, ImageTask)}
    if name not in known:
        raise UnknownNameError("benchmark data", name, [*known, RANDOM])
    task = build_task(name, {})
    rows = task.splits(DataOptions()).train.to(device)
    return Data(name, TensorPair(task.prepare(rows.inputs), rows.targets), known[name].classes)


def build(data: Data, dynamics: Dynamics, field: str = "energy", seed: int = 0) -> TCEPNetwork:
    """A fresh small network on the data's device, from a seed, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TCEPNetwork(
            in_channels=data.train.inputs.shape[1],
            image_size=data.train.inputs.shape[2],
            classes=data.classes,
            width=WIDTH,
            heads=HEADS,
            hidden=HIDDEN,
            memory=MEMORY,
            field=field,
            dynamics=dynamics,
        )
    return network.to(data.train.inputs.device)


@dataclass(frozen=True)
class Training:
    """How a network was trained before it was measured.

    Attributes:
        network: which one.
        steps, batch: optimizer steps, and rows a step.
        seconds: wall time.
        loss_first, loss_last: mean cross-entropy over the first and the last tenth of the steps.
        accuracy: share of right answers over the last tenth, on the batches trained on.
        unconverged_share: mean over the steps.
        parameters_moved: parameter tensors that are not what they were, of ``parameters``.
        parameters: parameter tensors.
    """

    network: str
    steps: int
    batch: int
    seconds: float
    loss_first: float
    loss_last: float
    accuracy: float
    unconverged_share: float
    parameters_moved: int
    parameters: int


def train(
    name: str, fresh: TCEPNetwork, data: Data, steps: int = TRAIN_STEPS, rate: float = TRAIN_RATE
) -> tuple[TCEPNetwork, Training]:
    """A trained copy of a network, and how it was trained; a function of its arguments alone."""
    network = copy.deepcopy(fresh)
    learner = EquilibriumLearner(Learning())
    learner.check(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    device = data.train.inputs.device
    generator = torch.Generator().manual_seed(0)
    losses, rights, shares = [], [], []
    begin = time.perf_counter()
    order = torch.zeros(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(data.train), generator=generator)
        rows = data.train.at(order[:BATCH].to(device))
        order = order[BATCH:]
        optimizer.zero_grad()
        found = learner.gradients(network, rows.inputs, rows.targets)
        optimizer.step()
        learner.after_step(network)
        losses.append(found.loss)
        rights.append((found.outputs.argmax(dim=1) == rows.targets).float().mean())
        shares.append(found.measured["unconverged_share"])
    synchronise(device)
    seconds = time.perf_counter() - begin
    tenth = max(1, steps // 10)
    pairs = zip(fresh.parameters(), network.parameters(), strict=True)
    moved = [not torch.equal(before, after) for before, after in pairs]
    return network, Training(
        network=name,
        steps=steps,
        batch=BATCH,
        seconds=seconds,
        loss_first=_mean(losses[:tenth]),
        loss_last=_mean(losses[-tenth:]),
        accuracy=_mean(rights[-tenth:]),
        unconverged_share=_mean(shares),
        parameters_moved=sum(moved),
        parameters=len(moved),
    )


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).mean())


def training_table(trainings: Sequence[Training]) -> Table:
    """How the trained networks were trained."""
    return table(
        "The trained networks: eqprop with its defaults, Adam, float32",
        {
            "network": lambda one: one.network,
            "steps": lambda one: str(one.steps),
            "batch": lambda one: str(one.batch),
            "s": lambda one: f"{one.seconds:.1f}",
            "loss, first": lambda one: f"{one.loss_first:.3f}",
            "last": lambda one: f"{one.loss_last:.3f}",
            "accuracy": lambda one: f"{one.accuracy:.1%}",
            "unconverged": lambda one: f"{one.unconverged_share:.1%}",
            "tensors moved": lambda one: f"{one.parameters_moved}/{one.parameters}",
        },
        trainings,
    )
