"""Spectral control: capped norms of the weights, and the margin to instability.

mu is the one-sided Lipschitz constant of the tokens' flow without damping and recirculation: the
largest eigenvalue of the symmetric part of its Jacobian, hidden units eliminated. The flow
contracts where lambda exceeds mu plus the strength of the recirculation. A bound from spectral
norms alone is far too loose to be of use, so mu is measured, at the states that are visited.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from topotune.tcep.fields import Capped, Field
from topotune.tcep.precision import full_precision

WARM_UP = 50
"""Power iterations when the vectors are fresh; afterwards one a step follows the weights."""

LANCZOS_STEPS = 14

ROUNDINGS = 100
"""A new direction of a Krylov space is rounding if its share is below this many roundings."""

REFERENCE_STEPS = 40
"""Euler steps to the equilibria at which :func:`mu_at_caps` measures."""


class SpectralCaps(nn.Module):
    """Keeps the largest singular values of some matrices below their caps.

    One power iteration a call on vectors that are kept from call to call (Miyato et al. 2018), so
    the norm is followed, not computed: it lags behind by what one optimizer step changes. The
    vectors are buffers, so a resumed training caps as an undisturbed one would.
    """

    def __init__(self, matrices: Sequence[Capped]) -> None:
        super().__init__()
        self._matrices = [m for m in matrices if m.cap > 0]
        generator = torch.Generator().manual_seed(0)
        for index, capped in enumerate(self._matrices):
            matrix = capped.matrix
            shape = (*matrix.shape[:-2], matrix.shape[-1], 1)
            start = torch.randn(shape, generator=generator).to(matrix)
            self.register_buffer(f"vector_{index}", start)
        for _ in range(WARM_UP):
            self.norms()
        self()

    @full_precision
    @torch.no_grad()
    def norms(self) -> list[Tensor]:
        """The norms, one tensor a matrix: 0-d, or (heads,)."""
        found = []
        for index, capped in enumerate(self._matrices):
            matrix, vector = capped.matrix, getattr(self, f"vector_{index}")
            image = matrix @ vector
            back = matrix.mT @ (image / image.norm(dim=-2, keepdim=True).clamp_min(1e-30))
            norm = back.norm(dim=-2, keepdim=True)
            # A matrix of zeros would leave no vector to notice by that it grew.
            vector.copy_(torch.where(norm > 0, back / norm.clamp_min(1e-30), vector))
            found.append(norm.flatten() if capped.heads else norm.squeeze())
        return found

    @torch.no_grad()
    def forward(self) -> None:
        """Scale every matrix that is above its cap back to it, in place."""
        for (weight, cap, heads), norm in zip(self._matrices, self.norms(), strict=True):
            factor = (cap / norm.clamp_min(1e-30)).clamp_max(1.0)
            weight.mul_(factor[:, None, None] if heads else factor)


@torch.no_grad()
def mu_at_caps(field: Field, drive: Tensor, damping: float) -> float:
    """The largest mu over some drives that training may lead to.

    The weights grow in training, up to their caps; so mu is measured on a copy of the fresh field
    whose capped matrices are scaled to their caps, at its equilibria. This is an estimate for
    where training leads to and no proof: the margin is measured again every epoch.

    Args:
        field: as initialised.
        drive: (B, N, D).
        damping: lambda.
    """
    field = copy.deepcopy(field)
    for capped in field.capped():
        norms = torch.linalg.matrix_norm(capped.matrix.double(), ord=2)
        if capped.cap > 0:
            factor = torch.where(norms > 0, capped.cap / norms, 1.0)  # zeros: nothing to scale
            factor = factor[:, None, None] if capped.heads else factor
            capped.weight.mul_(factor.to(capped.weight.dtype))
    state = field.initial(drive)
    step = 0.5 / max(1.0, damping)
    for _ in range(REFERENCE_STEPS):
        decay = field.widen(field.split(state)[0])
        state = state + step * (field.flow(state, drive) - damping * decay)
    return float(one_sided_lipschitz(field, drive, state).max())


def one_sided_lipschitz(field: Field, drive: Tensor, state: Tensor) -> Tensor:
    """mu of each sample at a state.

    For a conservative field the Jacobian is symmetric and its products are taken by central
    differences, in float64; else products with its transpose are added, by automatic
    differentiation.

    Args:
        field: in any dtype.
        drive: (B, N, D).
        state: (B, S).

    Returns:
        (B,), float64: a lower estimate, see :func:`largest_eigenvalue`.
    """
    with torch.inference_mode(False), torch.no_grad():
        exact = copy.deepcopy(field).double()
        drive, state = drive.detach().clone().double(), state.detach().clone().double()
        h = exact.split(state)[0].clone()

        def flow(tokens: Tensor) -> Tensor:
            return exact.eliminated(tokens, drive, state)

        width = 1e-5 * max(1.0, float(h.abs().max()))
        jacobian = None if exact.conservative else Jacobian(flow, h)

        def product(vector: Tensor) -> Tensor:
            v = vector.view_as(h)
            if jacobian is None:
                return ((flow(h + width * v) - flow(h - width * v)) / (2 * width)).flatten(1)
            return 0.5 * (jacobian.times(v) + jacobian.transposed_times(v)).flatten(1)

        generator = torch.Generator().manual_seed(0)
        start = torch.randn(h.flatten(1).shape, generator=generator, dtype=torch.float64)
        return largest_eigenvalue(product, start.to(h.device))


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int = LANCZOS_STEPS
) -> Tensor:
    """The largest eigenvalue of one symmetric matrix a sample, by Lanczos iteration.

    With full reorthogonalisation. A lower estimate: exact once ``steps`` reaches the dimension,
    and to a few per cent of the spectrum's width well before.

    Args:
        product: (B, n) vectors to their images, (B, n).
        start: (B, n), not zero.
        steps: products to take.

    Returns:
        (B,), in the dtype of ``start``; NaN where a product is not finite.
    """
    count = min(steps, start.shape[1])
    vector = start / start.norm(dim=1, keepdim=True)
    basis = [vector]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for index in range(count):
        image = product(basis[-1])
        diagonal.append((image * basis[-1]).sum(dim=1))
        if index == count - 1:
            break
        known = torch.stack(basis, dim=1)
        for _ in range(2):  # twice is enough (Parlett)
            image = image - ((known @ image.unsqueeze(2)).mT @ known).squeeze(1)
        norm = image.norm(dim=1)
        beside.append(norm)
        basis.append(image / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(1))
    main = torch.stack(diagonal, dim=1).double()
    side = torch.stack(beside, dim=1).double() if beside else main[:, :0]
    sound = torch.isfinite(torch.cat([main, side], dim=1)).all(dim=1)
    main, side = (torch.where(sound.unsqueeze(1), x, 0.0) for x in (main, side))
    # Once the Krylov space is exhausted, what follows is rounding. The first entry in its place
    # is a value that the largest eigenvalue is never below.
    largest = torch.cat([main, side], dim=1).abs().amax(dim=1, keepdim=True)
    live = (side > ROUNDINGS * torch.finfo(start.dtype).eps * largest).double().cumprod(dim=1)
    side = side * live
    main = torch.where(functional.pad(live, (1, 0), value=1.0) > 0, main, main[:, :1])
    matrix = main.diag_embed() + side.diag_embed(offset=1) + side.diag_embed(offset=-1)
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return torch.where(sound, values[:, -1], torch.nan).to(start.dtype)


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
