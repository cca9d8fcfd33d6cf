"""Spectral control: capped norms of the weights, and the margin to instability."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from topotune.tcep.fields import Capped

WARM_UP = 50
"""Power iterations when the vectors are fresh; afterwards one a step follows the weights."""

LANCZOS_STEPS = 14


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
        for index, (weight, _) in enumerate(self._matrices):
            shape = (*weight.shape[:-2], weight.shape[-1], 1)
            start = torch.randn(shape, generator=generator).to(weight)
            self.register_buffer(f"vector_{index}", start)
        for _ in range(WARM_UP):
            self.norms()
        self()

    @torch.no_grad()
    def norms(self) -> list[Tensor]:
        """The norms, one tensor a matrix: 0-d, or (heads,)."""
        found = []
        for index, (weight, _) in enumerate(self._matrices):
            vector = getattr(self, f"vector_{index}")
            image = weight @ vector
            back = weight.mT @ (image / image.norm(dim=-2, keepdim=True).clamp_min(1e-30))
            norm = back.norm(dim=-2, keepdim=True)
            vector.copy_(back / norm.clamp_min(1e-30))
            found.append(norm.flatten() if weight.ndim == 3 else norm.squeeze())
        return found

    @torch.no_grad()
    def forward(self) -> None:
        """Scale every matrix that is above its cap back to it, in place."""
        for (weight, cap), norm in zip(self._matrices, self.norms(), strict=True):
            factor = (cap / norm.clamp_min(1e-30)).clamp_max(1.0)
            weight.mul_(factor[:, None, None] if weight.ndim == 3 else factor)


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
        (B,), in the dtype of ``start``.
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
        # An exhausted Krylov space continues with zeros, which add zero eigenvalues of their own
        # only where the matrix's own largest one is below zero; the guard below removes them.
        basis.append(image / norm.clamp_min(1e-12).unsqueeze(1))
    matrix = torch.diag_embed(torch.stack(diagonal, dim=1).double())
    if beside:
        side = torch.stack(beside, dim=1).double()
        live = torch.cumprod((side > 1e-9).double(), dim=1)
        side = side * live
        matrix = matrix + torch.diag_embed(side, offset=1) + torch.diag_embed(side, offset=-1)
        dead = torch.nn.functional.pad(1 - live, (1, 0))
        matrix = matrix - torch.diag_embed(1e30 * dead)
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values[:, -1].to(start.dtype)
