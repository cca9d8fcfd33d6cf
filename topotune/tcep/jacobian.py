"""Products with the Jacobian of a flow at a point, and with its transpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Jacobian:
    """The linear map ``J = dF/ds`` of a batch at fixed states, without forming it.

    Both products are reverse passes over graphs that are recorded once: ``J^T w`` directly, and
    ``J v`` as the derivative of ``<J^T w, v>`` by ``w``, in which it is linear.

    Args:
        flow: states to ``ds/dt``, samples independent of each other.
        state: any shape.
    """

    def __init__(self, flow: Callable[[Tensor], Tensor], state: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self._point = state.detach().clone().requires_grad_()
            self._value = flow(self._point)
            self._weight = torch.zeros_like(self._value, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(
                self._value, self._point, self._weight, create_graph=True
            )

    def times(self, vector: Tensor) -> Tensor:
        """``J v``, shaped as the state."""
        (product,) = torch.autograd.grad(self._pulled, self._weight, vector, retain_graph=True)
        return product

    def transposed_times(self, vector: Tensor) -> Tensor:
        """``J^T w``, shaped as the state."""
        (product,) = torch.autograd.grad(self._value, self._point, vector, retain_graph=True)
        return product
