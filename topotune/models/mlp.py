"""The multilayer perceptron of the paper's benchmarks."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from topotune.plugins import whole_number


class MLP(nn.Module):
    """Fully connected layers with ReLU between them (paper, "Neural Network Benchmarks").

    With the default depth of 1 this is the two-layer network: one hidden layer, one output layer.

    Args:
        in_features: numbers an example has, whatever its shape; inputs are flattened.
        hidden: width of every hidden layer.
        classes: number of outputs.
        depth: number of hidden layers.

    Raises:
        ConfigError: an argument is not a whole number of at least 1.
    """

    def __init__(
        self, in_features: int, hidden: int = 256, classes: int = 10, depth: int = 1
    ) -> None:
        super().__init__()
        for name, value in {
            "in_features": in_features,
            "hidden": hidden,
            "classes": classes,
            "depth": depth,
        }.items():
            whole_number(f"model.{name}", value, low=1)
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for _ in range(depth):
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, ...) with ``in_features`` numbers a row, to logits of shape (n, classes)."""
        return cast(Tensor, self.layers(inputs))
