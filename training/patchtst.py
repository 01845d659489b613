"""PatchTST: a transformer encoder over patches of a multivariate daily series, ending in one logit.

Covers the network and its parameter count. It does not cover training (trainer.py) nor memory (footprint.py), but
footprint.py counts the very tensors this file keeps for the backward pass: whoever changes `EncoderLayer.forward`
changes `footprint.layer_bytes` too (tests/training/test_footprint_measured.py compares the two).

Why the layers are written by hand instead of with `torch.nn.TransformerEncoderLayer`: for the heap.
- Attention goes through `scaled_dot_product_attention` and the attention weights are not dropped (PatchTST's own
  default), so that no (batch, heads, patches, patches) tensor is ever kept.
- Dropout, scaling and the residual sum work in place on the branch's last product. A kept tensor is then never
  allocated above a temporary one, so that the heap is a stack: backward gives it back from the top, and no holes are
  left between (one of the right size cannot even be used again, because an aligned allocation needs some bytes more).
- Dropout keeps one byte an element, `nn.Dropout` on CPU a float.
- The stream is (B * T, d): `addmm` then makes a tensor of its own, and not a view, which in-place operators would have
  to copy in backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.computing import recomputed, stored_in


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
        """Exact number of trainable parameters."""
        d, f = self.d_model, self.d_ff
        layer = (4 * d * d + 4 * d) + (2 * d * f + f + d) + 4 * d
        embedding = self.n_features * self.patch_length * d + d
        positions = self.n_patches * d
        head = self.n_patches * d + 1
        return self.n_layers * layer + embedding + positions + 2 * d + head


def drop_(x: Tensor, probability: float) -> Tensor:
    """Inverted dropout in place, with a one-byte mask kept for backward. x: a tensor nothing else has saved."""
    dropped = torch.empty_like(x, dtype=torch.bool).bernoulli_(probability)
    return x.masked_fill_(dropped, 0.0).mul_(1 / (1 - probability))


def joined(branch: Tensor, stream: Tensor) -> Tensor:
    """Return the stream with this branch added. branch: nothing else may hold it, its memory becomes the stream's.

    The stream is fp32 also where products are bf16: of hundreds of layers, each adds less than bf16 can tell apart.
    """
    return branch.add_(stream) if branch.dtype == stream.dtype else stream + branch


class EncoderLayer(nn.Module):
    """Pre-norm: x + drop(attention(norm(x))), then x + drop(feed_forward(norm(x)))."""

    def __init__(self, config: PatchTSTConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_patches = config.n_patches
        self.n_heads = config.n_heads
        self.p = config.dropout
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.up = nn.Linear(d, config.d_ff)
        self.down = nn.Linear(config.d_ff, d)

    def forward(self, x: Tensor) -> Tensor:
        """(B * T, d) -> (B * T, d)."""
        x = joined(self._drop_(self.out(self._attend(self.qkv(self.norm1(x))))), x)
        hidden = self._drop_(F.gelu(self.up(self.norm2(x))))
        return joined(self._drop_(self.down(hidden)), x)

    def _attend(self, qkv: Tensor) -> Tensor:
        rows, width = qkv.shape
        d = width // 3
        q, k, v = qkv.view(-1, self.n_patches, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, d)

    def _drop_(self, x: Tensor) -> Tensor:
        return drop_(x, self.p) if self.training and self.p else x


class PatchTST(nn.Module):
    """(B, context_length, n_features) -> (B,) logits. All features of a patch are embedded together.

    matrices: what the layers' are stored in; all else is fp32. recompute: a layer keeps its input alone for backward,
    and runs again there.
    """

    recompute = False

    def __init__(self, config: PatchTSTConfig, matrices: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        d, t = config.d_model, config.n_patches
        self.embedding = nn.Linear(config.n_features * config.patch_length, d)
        self.positions = nn.Parameter(torch.empty(t, d))
        self.layers = nn.ModuleList(stored_in(matrices, EncoderLayer(config)) for _ in range(config.n_layers))
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
                self._draw(parameter, residual_std)
            elif parameter.dim() == 2 and name != "positions":
                self._draw(parameter, 0.02)

    @staticmethod
    @torch.no_grad()
    def _draw(parameter: Tensor, std: float) -> None:
        """Draw in fp32 whatever the parameter is stored in: the same seed gives the same weights, rounded."""
        if parameter.dtype == torch.float32:
            nn.init.normal_(parameter, std=std)
        else:
            parameter.copy_(torch.empty_like(parameter, dtype=torch.float32).normal_(std=std))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the up class. x: (B, context_length, n_features), normalised."""
        c = self.config
        if c.context_length != x.shape[1]:
            raise ValueError(f"expected windows of {c.context_length} days, got {x.shape[1]}")
        used = (c.n_patches - 1) * c.stride + c.patch_length
        days = x[:, c.context_length - used :]
        patches = days.unfold(1, c.patch_length, c.stride).reshape(-1, c.n_features * c.patch_length)
        x = joined(self.embedding(patches), self.positions.repeat(len(days), 1))
        if self.training and c.dropout:
            x = drop_(x, c.dropout)
        for layer in self.layers:
            x = recomputed(layer, x) if self.recompute and torch.is_grad_enabled() else layer(x)
        flat = self.norm(x).view(-1, c.n_patches * c.d_model)
        if self.training and c.head_dropout:
            flat = F.dropout(flat, c.head_dropout)
        logits: Tensor = self.head(flat)
        return logits.squeeze(1)
