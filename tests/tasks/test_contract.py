"""The contract: the built-in tasks keep it, and tasks that are broken on purpose do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.user_task import Rings
from topotune.data import Splits, TensorPair
from topotune.tasks import DataOptions, build_task
from topotune.tasks.analytic import Quadratic, Rosenbrock
from topotune.tasks.classification import flip_and_shift
from topotune.tasks.images import Cifar10, Digits, Mnist5k
from topotune.testing import TaskContract


class TestMnist5k(TaskContract):
    task = Mnist5k


class TestDigits(TaskContract):
    task = Digits


class TestDigitsWithOptions(TaskContract):
    task = Digits
    options: ClassVar[dict[str, float]] = {
        "val_fraction": 0.3,
        "test_fraction": 0.1,
        "train_examples": 300,
    }


class TestQuadratic(TaskContract):
    task = Quadratic
    batch_size = 1


class TestQuadraticInBatches(TaskContract):
    task = Quadratic
    options: ClassVar[dict[str, float]] = {"dim": 3, "condition": 10.0}


class TestRosenbrock(TaskContract):
    task = Rosenbrock
    batch_size = 1
    lr = 1e-4


class TestRings(TaskContract):
    task = Rings


class CifarLike(Cifar10):
    """Cifar10's model, normalisation and augmentation on made-up images, for want of its files."""

    def splits(self, options: DataOptions) -> Splits:
        generator = torch.Generator().manual_seed(options.split_seed)
        labels = torch.arange(192) % 10
        images = torch.randint(0, 256, (192, 3, 32, 32), generator=generator)
        images[:, 0] = labels[:, None, None] * 25
        rows = TensorPair(images.to(torch.uint8), labels)
        return Splits(rows.rows(0, 128), rows.rows(128, 160), rows.rows(160, 192))


class TestCifarPath(TaskContract):
    task = CifarLike

    def make_task(self) -> CifarLike:
        return CifarLike()

    def test_model_follows_torch_seed(self) -> None:
        super().test_model_follows_torch_seed()
        assert isinstance(self.make_task().model(None, {}), nn.Module)


class PrefixedMetric(Rings):
    metric = "val_accuracy"


class MissingMetric(Rings):
    metric = "f1"


class WrongDirection(Rings):
    direction = "up"


class Leaky(Rings):
    def splits(self, options: DataOptions) -> Splits:
        splits = super().splits(options)
        return replace(splits, val=splits.train.rows(0, 50))


class EmptyTest(Rings):
    def splits(self, options: DataOptions) -> Splits:
        splits = super().splits(options)
        return replace(splits, test=splits.test.rows(0, 0))


class UnseededSplit(Rings):
    def splits(self, options: DataOptions) -> Splits:
        return super().splits(replace(options, split_seed=int(torch.randint(1000, ()))))


class FixedSplit(Rings):
    def splits(self, options: DataOptions) -> Splits:
        return super().splits(DataOptions())


_SHARED = nn.Linear(2, 2)


class SharedModel(Rings):
    def model(self, name: str | None, options: Mapping[str, object]) -> nn.Module:
        super().model(name, options)
        return _SHARED


class OwnSeedModel(Rings):
    def model(self, name: str | None, options: Mapping[str, object]) -> nn.Module:
        torch.seed()
        return super().model(name, options)


class AnyModel(Rings):
    def model(self, name: str | None, options: Mapping[str, object]) -> nn.Module:
        return super().model(None, {})


class SummedLoss(Rings):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="sum")


class UnreducedLoss(Rings):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")


class NanLoss(Rings):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) * float("nan")


class AscentLoss(Rings):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # The right value, the gradient of the opposite.
        loss = super().loss(outputs, targets)
        return 2 * loss.detach() - loss


class DeadLayer(Rings):
    def model(self, name: str | None, options: Mapping[str, object]) -> nn.Module:
        model = super().model(name, options)
        model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        return model


class CountedMetric(Rings):
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": super().metrics(outputs, targets)["accuracy"] * len(outputs)}


class FloatMetric(Rings):
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": super().metrics(outputs, targets)["accuracy"].item()}  # type: ignore[dict-item]


class LossMetric(Rings):
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return super().metrics(outputs, targets) | {"loss": self.loss(outputs, targets)}


class BatchNormalising(Rings):
    def prepare(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(dim=0)


class PrepareInPlace(Rings):
    def prepare(self, inputs: Tensor) -> Tensor:
        return inputs.mul_(0.5)


class GlobalNoise(Rings):
    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + 0.01 * torch.randn_like(inputs)


class AugmentInPlace(Rings):
    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs.add_(0.01)


class Cropping(CifarLike):
    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return flip_and_shift(inputs, 4, generator)[:, :, 4:-4, 4:-4]


@pytest.mark.parametrize(
    ("broken", "check", "words"),
    [
        (PrefixedMetric, "headline_metric", "val_accuracy"),
        (WrongDirection, "headline_metric", "'up'"),
        (EmptyTest, "splits_are_whole", "test split is empty"),
        (Leaky, "splits_are_disjoint", "50 inputs are both in train and in val"),
        (UnseededSplit, "split_follows_its_seed", "global generator"),
        (FixedSplit, "split_follows_its_seed", "split_seed 0 and 1"),
        (SharedModel, "model_follows_torch_seed", "share the parameter"),
        (OwnSeedModel, "model_follows_torch_seed", "two models of the same seed"),
        (AnyModel, "unknown_models_are_refused", "UnknownNameError"),
        (UnreducedLoss, "loss_trains_every_parameter", "shape (32,)"),
        (NanLoss, "loss_trains_every_parameter", "nan"),
        (DeadLayer, "loss_trains_every_parameter", "no gradient reaches unused"),
        (SummedLoss, "loss_and_metrics_are_batch_means", "the mean of its halves"),
        (CountedMetric, "loss_and_metrics_are_batch_means", "accuracy of a batch"),
        (MissingMetric, "metrics_form", "lacks the headline 'f1'"),
        (FloatMetric, "metrics_form", "float, not a tensor"),
        (LossMetric, "metrics_form", "must not name 'loss'"),
        (BatchNormalising, "prepare_is_a_pure_function_of_the_row", "depends on its batch"),
        (PrepareInPlace, "prepare_is_a_pure_function_of_the_row", "writes to its input"),
        (GlobalNoise, "augment_draws_from_its_generator_only", "global generator"),
        (AugmentInPlace, "augment_draws_from_its_generator_only", "writes to its input"),
        (Cropping, "augment_draws_from_its_generator_only", "turns (32, 3, 32, 32) into"),
        (AscentLoss, "an_epoch_of_sgd_lowers_the_training_loss", "one epoch"),
    ],
)
def test_the_contract_finds(broken: type[Rings] | type[Cifar10], check: str, words: str) -> None:
    contract = TaskContract()
    contract.make_task = lambda: broken()  # type: ignore[method-assign]
    with pytest.raises(AssertionError) as caught:
        getattr(contract, f"test_{check}")()
    assert words in str(caught.value)


def test_rings_are_learnt() -> None:
    torch.manual_seed(0)
    task = build_task("tests.user_task:Rings", {})
    splits, model = task.splits(DataOptions()), task.model(None, {"hidden": 32})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model(splits.train.inputs), splits.train.targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    accuracy = task.metrics(model(splits.val.inputs), splits.val.targets)["accuracy"]
    assert accuracy.item() > 0.97
