"""Images as sequences of tokens."""

from __future__ import annotations

from torch import Tensor, nn

from topotune.errors import ConfigError, UnknownNameError

LAYOUTS = ("rows", "columns", "patches")


class Tokens(nn.Module):
    """Cuts square images (B, C, side, side) into tokens (B, N, P).

    Args:
        layout: "rows" (N = side, P = C side), "columns", or "patches" of ``patch`` pixels a side
            (N = (side / patch)^2, P = C patch^2), row by row.
        channels, side: of the images.
        patch: side of a patch.

    Raises:
        UnknownNameError: the layout does not exist.
        ConfigError: the patches do not tile the image, or the image is empty.
    """

    def __init__(self, layout: str, channels: int, side: int, patch: int = 4) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise UnknownNameError("model.tokens", str(layout), LAYOUTS)
        if side < 1 or channels < 1:
            raise ConfigError(
                "model.tokens",
                f"images of {channels} channels and {side} pixels a side make no sequence",
                "Give the task images of at least one pixel",
            )
        if layout == "patches" and (patch < 1 or side % patch != 0):
            tiling = [n for n in range(1, side + 1) if side % n == 0]
            raise ConfigError(
                "model.patch",
                f"must divide the image's side {side} (got {patch})",
                f"Choose one of {', '.join(map(str, tiling))}",
            )
        self.layout, self.channels, self.side, self.patch = layout, channels, side, patch
        if layout == "patches":
            self.count, self.size = (side // patch) ** 2, channels * patch**2
        else:
            self.count, self.size = side, channels * side

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, side, side) to (B, N, P).

        Raises:
            ConfigError: the images have another shape.
        """
        expected = (self.channels, self.side, self.side)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ConfigError(
                "model input",
                f"must be images of shape (n, {self.channels}, {self.side}, {self.side}) "
                f"(got {tuple(images.shape)})",
                "Choose a task whose inputs are images, or a model of your own",
            )
        if self.layout == "rows":
            return images.transpose(1, 2).flatten(2)
        if self.layout == "columns":
            return images.permute(0, 3, 1, 2).flatten(2)
        across = self.side // self.patch
        cut = images.reshape(-1, self.channels, across, self.patch, across, self.patch)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.count, self.size)
