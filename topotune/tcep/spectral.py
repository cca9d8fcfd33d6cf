"""Spectral control: capped norms of the weights, and the margin to instability."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from topotune.tcep.fields import Capped
from topotune.tcep.precision import full_precision

WARM_UP = 50
"""Power iterations when the vectors are fresh; afterwards one a step follows the weights."""

LANCZOS_STEPS = 14

ROUNDINGS = 100
"""A new direction of a Krylov space whose share is below so many roundings is none."""


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
