"""The contract of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topotune.data.splits import Splits, TensorPair
from topotune.errors import ConfigError, UnknownNameError
from topotune.tasks.base import DataOptions, Task
from topotune.testing.check import check

_EVALUATED_ROWS = 1000
"""Rows on which the loss before and after an epoch is compared."""


class TaskContract:
    """What topotune expects of a :class:`topotune.tasks.Task`.

    Inherit it in a class whose name starts with ``Test`` and set :attr:`task`, or override
    :meth:`make_task`.

    Attributes:
        task: the class to check, constructed with :attr:`options`.
        options: keyword arguments of its constructor.
        data: where its data lie.
        batch_size: rows of a training step.
        lr: learning rate at which one epoch of SGD must lower the training loss.
        repeated_rows: whether the data set itself holds equal rows, so that equal inputs in two
            splits prove nothing.
    """

    task: ClassVar[type[Task]]
    options: ClassVar[Mapping[str, Any]] = {}
    data: ClassVar[DataOptions] = DataOptions(download=False)
    batch_size: ClassVar[int] = 32
    lr: ClassVar[float] = 0.05
    repeated_rows: ClassVar[bool] = False

    def make_task(self) -> Task:
        """A new task."""
        return self.task(**self.options)

    def _splits(self, split_seed: int = 0) -> Splits:
        options = DataOptions(self.data.data_dir, self.data.download, split_seed)
        return self.make_task().splits(options)

    def _batch(self, task: Task) -> TensorPair:
        raw = self._splits().train
        batch = raw.at(torch.arange(min(self.batch_size, len(raw))))
        return TensorPair(task.prepare(batch.inputs), batch.targets)

    def _model(self, task: Task, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return task.model(None, {})

    def test_headline_metric(self) -> None:
        """``metric`` is a bare name, ``direction`` one of two words."""
        task = self.make_task()
        check(task.direction in ("maximize", "minimize"), f"direction is {task.direction!r}")
        prefixed = task.metric.startswith(("train_", "val_", "test_"))
        check(not prefixed, f"metric {task.metric!r}: the loop adds the split's name itself")

    def test_splits_are_whole(self) -> None:
        """Three splits with rows, on the CPU."""
        splits = self._splits()
        for name in ("train", "val", "test"):
            split: TensorPair = getattr(splits, name)
            check(len(split) > 0, f"the {name} split is empty")
            for part in (split.inputs, split.targets):
                check(part.device.type == "cpu", f"the {name} split lies on {part.device}")
                check(not part.requires_grad, f"the {name} split requires gradients")

    def test_splits_are_disjoint(self) -> None:
        """No row of one split is a row of another."""
        if self.repeated_rows:
            return
        splits = self._splits()
        rows = {name: _rows(getattr(splits, name).inputs) for name in ("train", "val", "test")}
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            shared = len(rows[one] & rows[other])
            check(not shared, f"{shared} inputs are both in {one} and in {other}")

    def test_split_follows_its_seed(self) -> None:
        """Equal ``split_seed``, equal splits; another one, another split; no global randomness."""
        before = torch.get_rng_state()
        first, again, other = self._splits(0), self._splits(0), self._splits(1)
        untouched = torch.equal(before, torch.get_rng_state())
        check(untouched, "splits() draws from torch's global generator")
        for name in ("train", "val", "test"):
            one, two = getattr(first, name), getattr(again, name)
            same = torch.equal(one.inputs, two.inputs) and torch.equal(one.targets, two.targets)
            check(same, f"the {name} split differs between two calls with the same split_seed")
        differs = any(
            _rows(getattr(first, name).inputs) != _rows(getattr(other, name).inputs)
            for name in ("train", "val")
        )
        check(differs, "split_seed 0 and 1 give the same training and validation rows")

    def test_model_follows_torch_seed(self) -> None:
        """Initialisation comes from ``torch.manual_seed``, and every model is a new one."""
        task = self.make_task()
        one, two = self._model(task), self._model(task)
        check(any(p.requires_grad for p in one.parameters()), "the model has nothing to train")
        for (name, p), (_, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
            check(p is not q, f"two models share the parameter {name}")
            check(torch.equal(p, q), f"{name} differs between two models of the same seed")

    def test_unknown_models_are_refused(self) -> None:
        """An unknown model name or option raises the error that a user can read."""
        task = self.make_task()
        for name, options, expected in (
            ("no_such_model", {}, UnknownNameError),
            (None, {"no_such_option": 1}, ConfigError),
        ):
            try:
                task.model(name, options)
            except expected:
                continue
            check(False, f"model({name!r}, {options!r}) does not raise {expected.__name__}")

    def test_loss_trains_every_parameter(self) -> None:
        """The loss is a finite scalar whose gradient reaches all parameters."""
        task = self.make_task()
        model, batch = self._model(task).train(), self._batch(task)
        loss = task.loss(model(batch.inputs), batch.targets)
        check(loss.shape == (), f"the loss has shape {tuple(loss.shape)}, not ()")
        check(bool(torch.isfinite(loss)), f"the loss at initialisation is {loss.item()}")
        loss.backward()  # type: ignore[no-untyped-call]
        for name, p in model.named_parameters():
            gradient = p.grad if p.grad is not None else torch.zeros_like(p)
            if p.requires_grad:
                check(bool(gradient.any()), f"no gradient reaches {name}")
                check(bool(torch.isfinite(gradient).all()), f"the gradient of {name} is not finite")

    def test_loss_and_metrics_are_batch_means(self) -> None:
        """A batch's value is the mean of its halves' values: the loop weighs batches by size."""
        task = self.make_task()
        model, batch = self._model(task).eval(), self._batch(task)
        half = len(batch) // 2
        if half == 0:
            return
        with torch.no_grad():
            values = [
                {"loss": task.loss(outputs, part.targets), **task.metrics(outputs, part.targets)}
                for part in (
                    batch.rows(0, half),
                    batch.rows(half, 2 * half),
                    batch.rows(0, 2 * half),
                )
                for outputs in [model(part.inputs)]
            ]
        for name, whole in values[2].items():
            mean = (values[0][name] + values[1][name]) / 2
            check(
                torch.allclose(whole, mean, rtol=1e-4, atol=1e-6),
                f"{name} of a batch is {whole.item():g}, the mean of its halves {mean.item():g}",
            )

    def test_metrics_form(self) -> None:
        """Finite 0-d floating-point tensors, the headline among them."""
        task = self.make_task()
        model, batch = self._model(task), self._batch(task)
        with torch.no_grad():
            metrics = task.metrics(model(batch.inputs), batch.targets)
        check(task.metric in metrics, f"metrics() lacks the headline {task.metric!r}")
        check("loss" not in metrics, "metrics() must not name 'loss': the loop records it")
        for name, value in metrics.items():
            check(isinstance(value, Tensor), f"{name} is a {type(value).__name__}, not a tensor")
            check(value.shape == (), f"{name} has shape {tuple(value.shape)}, not ()")
            check(value.is_floating_point(), f"{name} has dtype {value.dtype}")
            check(bool(torch.isfinite(value)), f"{name} at initialisation is {value.item()}")

    def test_prepare_is_a_pure_function_of_the_row(self) -> None:
        """``prepare`` keeps rows, changes nothing in place, and treats each row by itself."""
        task, raw = self.make_task(), self._splits().train
        inputs = raw.inputs[: self.batch_size].clone()
        kept = inputs.clone()
        prepared = task.prepare(inputs)
        check(len(prepared) == len(inputs), "prepare() changes the number of rows")
        check(torch.equal(inputs, kept), "prepare() writes to its input")
        alone = task.prepare(inputs[:1])
        check(
            torch.allclose(prepared[:1].double(), alone.double()),
            "prepare() of a row depends on its batch",
        )

    def test_augment_draws_from_its_generator_only(self) -> None:
        """``augment`` keeps the shape and repeats itself when its generator does."""
        task = self.make_task()
        inputs = self._batch(task).inputs
        kept = inputs.clone()

        def augmented(global_seed: int) -> Tensor:
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            result = task.augment(inputs, torch.Generator(inputs.device).manual_seed(7))
            untouched = torch.equal(before, torch.get_rng_state())
            check(untouched, "augment() draws from torch's global generator")
            return result

        one, two = augmented(1), augmented(2)
        check(torch.equal(one, two), "augment() does not repeat itself with the same generator")
        check(torch.equal(inputs, kept), "augment() writes to its input")
        same = one.shape == inputs.shape and one.dtype == inputs.dtype
        check(same, f"augment() turns {tuple(inputs.shape)} into {tuple(one.shape)}")

    def test_an_epoch_of_sgd_lowers_the_training_loss(self) -> None:
        """The whole chain learns."""
        task, train = self.make_task(), self._splits().train
        model = self._model(task)
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr)
        generator = torch.Generator().manual_seed(0)

        def training_loss() -> float:
            part = train.rows(0, min(_EVALUATED_ROWS, len(train)))
            with torch.no_grad():
                return task.loss(model.eval()(task.prepare(part.inputs)), part.targets).item()

        before = training_loss()
        model.train()
        order = torch.randperm(len(train), generator=generator)
        for start in range(0, len(train), self.batch_size):
            batch = train.at(order[start : start + self.batch_size])
            inputs = task.augment(task.prepare(batch.inputs), generator)
            optimizer.zero_grad()
            task.loss(model(inputs), batch.targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        after = training_loss()
        check(after < before, f"one epoch at lr={self.lr:g} takes the loss {before:g} to {after:g}")


def _rows(inputs: Tensor) -> set[bytes]:
    flat = inputs.reshape(len(inputs), -1).contiguous().numpy()
    return {row.tobytes() for row in flat}
