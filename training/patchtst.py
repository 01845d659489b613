"""PatchTST: a transformer encoder over patches of a multivariate daily series, ending in one logit.

Covers the network and its parameter count. It does not cover training (trainer.py) nor memory (footprint.py), but
footprint.py counts the very tensors this file keeps for the backward pass: whoever changes `EncoderLayer.forward`
changes `footprint._layer_activation_bytes` too (tests/test_footprint_measured.py compares the two).

Why the layers are written by hand instead of `torch.nn.TransformerEncoderLayer`:
- attention goes through `scaled_dot_product_attention` and the attention weights are not dropped (as in PatchTST's own
  defaults), so that no (batch, heads, patches, patches) tensor is ever kept;
- dropout keeps one byte an element (`native_dropout`'s mask) instead of a float, which is what `nn.Dropout` keeps on CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchTSTConfig:
    """Shape of one model. Lengths count days; `d_ff` is the feed-forward width (2 or 4 x d_model in the search)."""

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    n_features: int = 25
    context_length: int = 60
    patch_length: int = 10
    stride: int = 5
    dropout: float = 0.1
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if not 1 <= self.patch_length <= self.context_length:
            raise ValueError(f"patch_length {self.patch_length} must lie in 1..context_length ({self.context_length})")
        if self.stride < 1:
            raise ValueError(f"stride {self.stride} must be at least 1")

    @property
    def n_patches(self) -> int:
        """How many tokens the encoder sees. Days before the first whole patch (counted from the end) are unused."""
        return (self.context_length - self.patch_length) // self.stride + 1

    @property
    def param_count(self) -> int:
        """Exact number of trainable parameters (DESIGN 7)."""
        d, f = self.d_model, self.d_ff
        layer = (4 * d * d + 4 * d) + (2 * d * f + f + d) + 4 * d
        embedding = self.n_features * self.patch_length * d + d
        positions = self.n_patches * d
        head = self.n_patches * d + 1
        return self.n_layers * layer + embedding + positions + 2 * d + head


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Inverted dropout that keeps a one-byte mask for backward."""
    if not training or probability == 0.0:
        return x
    return torch.native_dropout(x, probability, True)[0]


class EncoderLayer(nn.Module):
    """Pre-norm: x + drop(attention(norm(x))), then x + drop(feed_forward(norm(x)))."""

    def __init__(self, config: PatchTSTConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads = config.n_heads
        self.p = config.dropout
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.up = nn.Linear(d, config.d_ff)
        self.down = nn.Linear(config.d_ff, d)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        x = x + dropout(self.out(attended), self.p, self.training)
        hidden = dropout(F.gelu(self.up(self.norm2(x))), self.p, self.training)
        return x + dropout(self.down(hidden), self.p, self.training)


class PatchTST(nn.Module):
    """(B, context_length, n_features) -> (B,) logits. All features of a patch are embedded together."""

    def __init__(self, config: PatchTSTConfig) -> None:
        super().__init__()
        self.config = config
        d, t = config.d_model, config.n_patches
        self.embedding = nn.Linear(config.n_features * config.patch_length, d)
        self.positions = nn.Parameter(torch.empty(t, d))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(t * d, 1)
        self._initialise()

    def _initialise(self) -> None:
        """Normal(0, 0.02) weights; the projections into the residual stream shrink with depth, as in GPT-2.

        Without the 1/sqrt(2 L) the residual stream of a 256-layer model starts far too large.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        nn.init.normal_(self.positions, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() == 2 and name != "positions":
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the up class. x: (B, context_length, n_features), normalised."""
        c = self.config
        if c.context_length != x.shape[1]:
            raise ValueError(f"expected windows of {c.context_length} days, got {x.shape[1]}")
        used = (c.n_patches - 1) * c.stride + c.patch_length
        patches = x[:, c.context_length - used :].unfold(1, c.patch_length, c.stride).flatten(2)
        x = dropout(self.embedding(patches) + self.positions, c.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        flat = dropout(self.norm(x).flatten(1), c.head_dropout, self.training)
        return self.head(flat).squeeze(1)
