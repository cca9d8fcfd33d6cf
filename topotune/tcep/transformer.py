"""The non-conservative field: a pre-norm transformer block, which has no energy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topotune.tcep.energy import check_attention, weight
from topotune.tcep.fields import Capped, Field
from topotune.tcep.functions import layer_norm, smooth_relu
from topotune.tcep.options import Caps


class TransformerField(Field):
    """``flow = u + Attn(LN h) + FFN(LN h)``: values and output weights of their own.

    Its Jacobian is not symmetric, so there is nothing that the flow minimises, and plain
    equilibrium propagation estimates its gradients with a bias that no ``beta`` removes; the
    learner's correction does (design, section 4). The state is the tokens, and the readout sees
    all of them.

    Args:
        tokens, width, heads: N, D and H.
        memory: width of the feed-forward part.
        sharpness: inverse temperature; None: 1 / sqrt(D / H).
        caps: largest spectral norms: ``attention`` of query, key, value and output a head,
            ``memory`` of both feed-forward matrices.

    Raises:
        ConfigError: the heads do not divide the width, or there is one token only.
    """

    conservative = False

    def __init__(
        self,
        tokens: int,
        width: int,
        heads: int,
        memory: int,
        sharpness: float | None = None,
        caps: Caps | None = None,
    ) -> None:
        check_attention(tokens, width, heads)
        super().__init__(tokens, width, tokens * width, tokens * width)
        self.heads = heads
        head_width = width // heads
        self.sharpness = head_width**-0.5 if sharpness is None else float(sharpness)
        self.caps = caps or Caps()

        self.query = weight(heads, width, head_width, fan_in=width)
        self.key = weight(heads, width, head_width, fan_in=width)
        self.value = weight(heads, width, head_width, fan_in=width)
        self.output = weight(heads, head_width, width, fan_in=width)
        self.inner = weight(width, memory, fan_in=width)
        self.inner_bias = nn.Parameter(torch.zeros(memory))
        self.outer = weight(memory, width, fan_in=memory)
        self.outer_bias = nn.Parameter(torch.zeros(width))

    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        """``u + Attn(LN h) + FFN(LN h)``, flattened."""
        h, _ = self.split(state)
        g, _ = layer_norm(h)
        apart = g.unsqueeze(1)
        scores = self.sharpness * (apart @ self.query) @ (apart @ self.key).transpose(2, 3)
        mixed = torch.softmax(scores, dim=-1) @ (apart @ self.value) @ self.output
        inner = smooth_relu(F.linear(g, self.inner.T, self.inner_bias))
        return (drive + mixed.sum(dim=1) + inner @ self.outer + self.outer_bias).flatten(1)

    def features(self, state: Tensor) -> Tensor:
        """All tokens, (B, N D)."""
        return state

    def nudge(self, state: Tensor, slope: Tensor) -> Tensor:
        """``slope`` itself: the features are the state."""
        return slope

    def capped(self) -> list[Capped]:
        """All matrices but the readout's."""
        attention, memory = self.caps.attention, self.caps.memory
        by_head = (self.query, self.key, self.value, self.output)
        return [
            *(Capped(w, attention, heads=True) for w in by_head),
            Capped(self.inner, memory),
            Capped(self.outer, memory),
        ]
