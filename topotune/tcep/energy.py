"""The conservative field: attention and memory over tokens, coupled to a Hopfield layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topotune.errors import ConfigError
from topotune.tcep.fields import Capped, Field
from topotune.tcep.functions import (
    layer_norm,
    layer_norm_pullback,
    smooth_relu,
    smooth_relu_integral,
    smooth_relu_slope,
)
from topotune.tcep.options import Caps

INIT_GAIN = 0.5
"""Weights start at this over sqrt(fan-in)."""


class EnergyField(Field):
    """The energy of the design, damping and recirculation apart.

    With ``g = layernorm(h)``, ``q = g W_q``, ``k = g W_k`` a head, ``r = sigma(z)``::

        E = c { -<u, h> - (1/(b H)) sum_heads,i log sum_{j != i} exp(b q_i.k_j)
                - sum Phi(g Xi + b_m) }
            + sum(z r - Phi(z)) - <r, vec(g) W1 + b1>

    The second term is a weight-tied attention block and the third its feed-forward memory (Hoover
    et al. 2023, "Energy Transformer"); the second line is a layer of continuous Hopfield units
    (Hopfield 1984), whose activations ``r`` the readout sees. The metric is ``c`` on tokens and
    ``sigma'(z)`` on hidden units, so ``dz/dt = -dE/dr``. Without the hidden units one block is
    too weak for anything that needs position.

    Args:
        tokens, width: N (at least 2: a token attends to the others) and D.
        heads: H; must divide the width.
        hidden: M, hidden units z.
        memory: K, columns of Xi.
        scale: c.
        sharpness: b; None: 1 / sqrt(D / H).
        caps: largest spectral norms.

    Raises:
        ConfigError: the heads do not divide the width, or there is one token only.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        heads: int,
        hidden: int,
        memory: int,
        scale: float,
        sharpness: float | None = None,
        caps: Caps | None = None,
    ) -> None:
        check_attention(tokens, width, heads)
        super().__init__(tokens, width, tokens * width + hidden, hidden)
        self.scale = float(scale)
        self.heads = heads
        self.sharpness = (width // heads) ** -0.5 if sharpness is None else float(sharpness)
        self.caps = caps or Caps()

        head_width = width // heads
        self.query = weight(heads, width, head_width, fan_in=width)
        self.key = weight(heads, width, head_width, fan_in=width)
        self.memory = weight(width, memory, fan_in=width)
        self.memory_bias = nn.Parameter(torch.zeros(memory))
        self.hidden_weight = weight(tokens * width, hidden, fan_in=tokens * width)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        others = ~torch.eye(tokens, dtype=torch.bool)
        self.register_buffer("_others", others, persistent=False)
        self._others: Tensor

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        """``E`` of each sample, (B,)."""
        h, z = self.split(state)
        g, _ = layer_norm(h)
        _, _, scores = self._attend(g)
        attention = torch.logsumexp(scores, dim=-1).sum(dim=(1, 2)) / (self.sharpness * self.heads)
        memory = smooth_relu_integral(F.linear(g, self.memory.T, self.memory_bias)).sum(dim=(1, 2))
        r = smooth_relu(z)
        drawn = torch.addmm(self.hidden_bias, g.flatten(1), self.hidden_weight)
        hidden = (z * r - smooth_relu_integral(z) - r * drawn).sum(dim=1)
        return self.scale * (-(drive * h).sum(dim=(1, 2)) - attention - memory) + hidden

    def metric(self, state: Tensor) -> Tensor:
        """``c`` on tokens, ``sigma'(z)`` on hidden units."""
        h, z = self.split(state)
        tokens = torch.full_like(h, self.scale).flatten(1)
        return torch.cat([tokens, smooth_relu_slope(z)], dim=1)

    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        """``-(1/G) dE/ds`` written out; equal to automatic differentiation of the energy."""
        h, z = self.split(state)
        g, inverse = layer_norm(h)
        drawn = torch.addmm(self.hidden_bias, g.flatten(1), self.hidden_weight)
        back = (smooth_relu(z) @ self.hidden_weight.T).view_as(g) / self.scale
        pulled = layer_norm_pullback(self._block(g) + back, g, inverse)
        return torch.cat([(drive + pulled).flatten(1), drawn - z], dim=1)

    def features(self, state: Tensor) -> Tensor:
        """``r = sigma(z)``, (B, M)."""
        return smooth_relu(self.split(state)[1])

    def nudge(self, state: Tensor, slope: Tensor) -> Tensor:
        """``slope`` on the hidden units: sigma' of the readout and of the metric cancel."""
        return F.pad(slope, (self.tokens * self.width, 0))

    def eliminated(self, tokens: Tensor, drive: Tensor, state: Tensor) -> Tensor:
        """The tokens' flow with ``z = vec(g) W1 + b1``."""
        g, inverse = layer_norm(tokens)
        drawn = torch.addmm(self.hidden_bias, g.flatten(1), self.hidden_weight)
        back = (smooth_relu(drawn) @ self.hidden_weight.T).view_as(g) / self.scale
        return drive + layer_norm_pullback(self._block(g) + back, g, inverse)

    def capped(self) -> list[Capped]:
        """W_q and W_k a head, Xi, W1."""
        return [
            Capped(self.query, self.caps.attention, heads=True),
            Capped(self.key, self.caps.attention, heads=True),
            Capped(self.memory, self.caps.memory),
            Capped(self.hidden_weight, self.caps.hidden),
        ]

    def _attend(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, (B, H, N, D / H), and ``b q_i . k_j``, (B, H, N, N), minus infinity
        where i = j."""
        q, k = self._heads(g, self.query), self._heads(g, self.key)
        scores = self.sharpness * (q @ k.transpose(2, 3))
        return q, k, scores.masked_fill(~self._others, -torch.inf)

    def _heads(self, g: Tensor, weight: Tensor) -> Tensor:
        """``g`` times each head's matrix, by one product."""
        joined = g @ _joined(weight)
        return joined.view(*g.shape[:2], self.heads, weight.shape[2]).transpose(1, 2)

    def _block(self, g: Tensor) -> Tensor:
        """The gradient with respect to ``g`` of attention and memory, (B, N, D)."""
        q, k, scores = self._attend(g)
        share = torch.softmax(scores, dim=-1)
        by_query = (share @ k).transpose(1, 2).flatten(2) @ _joined(self.query).T
        by_key = (share.transpose(2, 3) @ q).transpose(1, 2).flatten(2) @ _joined(self.key).T
        recalled = smooth_relu(F.linear(g, self.memory.T, self.memory_bias)) @ self.memory.T
        return (by_query + by_key) / self.heads + recalled


def _joined(weight: Tensor) -> Tensor:
    """The heads' matrices (H, D, D / H) side by side, (D, D)."""
    return weight.transpose(0, 1).flatten(1)


def weight(*shape: int, fan_in: int) -> nn.Parameter:
    """A fresh matrix, normal numbers of ``INIT_GAIN / sqrt(fan_in)``."""
    return nn.Parameter(torch.randn(shape) * (INIT_GAIN / math.sqrt(fan_in)))


def check_attention(tokens: int, width: int, heads: int) -> None:
    """Raise unless there are tokens to attend to, of a width that the heads divide.

    Raises:
        ConfigError: there is one token only, one number a token, or a rest.
    """
    if tokens < 2:
        raise ConfigError(
            "model.tokens",
            f"attention needs at least 2 tokens (got {tokens})",
            "Cut the image into rows or smaller patches",
        )
    if width < 2:
        raise ConfigError(
            "model.width",
            f"must be at least 2 (got {width})",
            "The layer norm of a single number is zero, whatever the number",
        )
    if width % heads != 0:
        fitting = [n for n in range(1, width + 1) if width % n == 0]
        raise ConfigError(
            "model.heads",
            f"must divide the width {width} (got {heads})",
            f"Choose one of {', '.join(map(str, fitting))}",
        )
