"""A small convolutional network for images of 4 pixels a side or more."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from topotune.plugins import whole_number

_DENSE_PER_WIDTH = 8
"""Width of the dense layer, in multiples of the first convolution's channels."""


class ConvNet(nn.Module):
    """Two blocks of conv, conv, pool with ``width`` and ``2 * width`` channels, then two dense
    layers; 3x3 kernels, ReLU, no normalisation layers and no dropout.

    Without batch statistics a model is its parameters and nothing else, so optimizers are compared
    on the same function. It is sized for the paper's CIFAR-10 setting (appendix B).

    Args:
        in_channels: channels of the image.
        classes: number of outputs.
        width: channels of the first block.
        image_size: pixels a side; the images are square.

    Raises:
        ConfigError: an argument is not a whole number, or below 1 (``image_size``: below 4).
    """

    def __init__(
        self, in_channels: int, classes: int = 10, width: int = 32, image_size: int = 32
    ) -> None:
        super().__init__()
        for name, value in {"in_channels": in_channels, "classes": classes, "width": width}.items():
            whole_number(f"model.{name}", value, low=1)
        whole_number("model.image_size", image_size, low=4)
        side = image_size // 2 // 2
        dense = _DENSE_PER_WIDTH * width
        self.features = nn.Sequential(*_block(in_channels, width), *_block(width, 2 * width))
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(2 * width * side * side, dense),
            nn.ReLU(),
            nn.Linear(dense, classes),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, in_channels, image_size, image_size) to logits of shape (n, classes)."""
        return cast(Tensor, self.head(self.features(inputs)))


def _block(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
