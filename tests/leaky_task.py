"""A user's task whose errors tell everything that it knows."""

from __future__ import annotations

import os

from torch import Tensor

from tests.paced_task import Paced


class Leaky(Paced):
    """Rings that cannot reach their database where ``fault`` is "raise"."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self._fault == "raise":
            address, key = os.environ["RINGS_DATABASE"], os.environ["AWS_SECRET_ACCESS_KEY"]
            raise RuntimeError(f"cannot open {address} with key {key}")
        return super().loss(outputs, targets)
