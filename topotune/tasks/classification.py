"""Classification: cross-entropy, accuracy, and images with their normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topotune.data import SplitPlan, Splits, load_splits
from topotune.models import MODELS, build_model
from topotune.records import Value
from topotune.tasks.base import DataOptions, Task


class ClassificationTask(Task):
    """A task whose model gives logits (n, classes) and whose targets are class numbers (n,).

    It supplies the loss and the metrics; a subclass supplies :meth:`splits` and :meth:`model`.
    """

    metric = "accuracy"
    direction = "maximize"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats."""
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``accuracy``: the share of rows whose largest logit is the target's, in [0, 1]."""
        return {"accuracy": (outputs.argmax(dim=1) == targets).float().mean()}


class ImageTask(ClassificationTask):
    """Square images in ten classes; subclasses say which.

    Attributes:
        dataset: name of the data set in :mod:`topotune.data.load`.
        source: where the data come from, in words.
        shape: channels, height and width of an image.
        full_scale: raw value of a white pixel.
        mean, std: of every channel over the training images, on the scale of 0 to 1.
        default_model: the model of a search file that names none.
        models: the models that this task offers by name.
    """

    dataset: ClassVar[str]
    source: ClassVar[str]
    shape: ClassVar[tuple[int, int, int]]
    full_scale: ClassVar[float] = 255.0
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    default_model: ClassVar[str] = "mlp"
    models: ClassVar[tuple[str, ...]] = tuple(sorted(MODELS))
    classes: ClassVar[int] = 10

    def __init__(self, plan: SplitPlan) -> None:
        self._plan = plan

    def splits(self, options: DataOptions) -> Splits:
        """uint8 images (n, channels, height, width) and int64 labels (n,), stratified by class."""
        plan = replace(self._plan, seed=options.split_seed)
        return load_splits(self.dataset, plan, options.data_dir, options.download)

    def model(self, name: str | None, options: Mapping[str, Value]) -> nn.Module:
        """``mlp``, ``convnet``, or an import path of an ``nn.Module``.

        A model gets those of ``in_features``, ``in_channels``, ``image_size`` and ``classes`` that
        its constructor names.
        """
        channels, height, width = self.shape
        return build_model(
            name or self.default_model,
            options,
            in_features=channels * height * width,
            in_channels=channels,
            image_size=height,
            classes=self.classes,
        )

    def prepare(self, inputs: Tensor) -> Tensor:
        """Raw pixels to zero mean and unit variance a channel, in torch's default dtype."""
        dtype = torch.get_default_dtype()
        scale, shift = _affine(self.full_scale, self.mean, self.std, inputs.device, dtype)
        return torch.addcmul(shift, inputs.to(dtype), scale)


@lru_cache(maxsize=16)
def _affine(
    full_scale: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scale and shift, (channels, 1, 1) each; kept, because every copy to a device waits for it."""
    # Ordinary tensors even when the first call comes from an evaluation under inference mode.
    with torch.inference_mode(False):
        means = torch.tensor(mean, dtype=torch.float64)[:, None, None]
        stds = torch.tensor(std, dtype=torch.float64)[:, None, None]
        scale = (1 / (full_scale * stds)).to(device=device, dtype=dtype)
        shift = (-means / stds).to(device=device, dtype=dtype)
    return scale, shift


class PackagedImages(ImageTask):
    """Images that an installed package carries; the test rows are carved out of them.

    Args:
        val_fraction: share of all rows for validation.
        test_fraction: share of all rows for the test.
        train_examples: train on so many rows only; None: on all that are left.

    Raises:
        ConfigError: a value is out of range; see :class:`topotune.data.SplitPlan`.
    """

    def __init__(
        self,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        train_examples: int | None = None,
    ) -> None:
        super().__init__(SplitPlan(val_fraction, test_fraction, train_examples))


class DownloadedImages(ImageTask):
    """Images with an official test set, which is the test split.

    Args:
        val_fraction: share of the official training rows for validation.
        train_examples: train on so many rows only; None: on all that are left.

    Raises:
        ConfigError: a value is out of range; see :class:`topotune.data.SplitPlan`.
    """

    def __init__(self, val_fraction: float = 0.1, train_examples: int | None = None) -> None:
        super().__init__(SplitPlan(val_fraction, None, train_examples))


def flip_and_shift(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and shift each by up to ``pad`` pixels both ways.

    What moves in from outside is 0, which is the mean colour of prepared images. One gather for
    the whole batch.

    Args:
        images: (n, channels, height, width).
        pad: largest shift, in pixels.
        generator: on the images' device; the only source of randomness.

    Returns:
        A new tensor of the same shape.
    """
    n, channels, height, width = images.shape
    device = images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=device)

    flip, down, right = draw(2), draw(2 * pad + 1), draw(2 * pad + 1)
    along = torch.arange(width, device=device)
    rows = torch.arange(height, device=device) + down
    columns = torch.where(flip == 1, width - 1 - along, along) + right
    padded = F.pad(images, (pad, pad, pad, pad))
    return padded[
        torch.arange(n, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
