"""PatchTST: a transformer encoder over patches of a multivariate daily series, ending in one logit.

Covers the network and its parameter count. It does not cover training (trainer.py) nor memory (footprint.py), but
footprint.py counts the very tensors this file keeps for the backward pass: whoever changes `EncoderLayer.forward`
changes `footprint.layer_bytes` too (tests/training/test_footprint_measured.py compares the two).

Why the layers are written by hand instead of with `torch.nn.TransformerEncoderLayer`: for the clock and for the heap.
- Attention is computed the way that is fastest for its shape and type (attention_choice.py), keeps no (batch, heads,
  patches, patches) tensor, and its weights are not dropped (PatchTST's own default).
- Dropout's masks are cheap (dropout.py), one byte an element. It works in place on the branch's last product, with the
  residual sum. A kept tensor is then never allocated above a temporary one, so that the heap is a stack: backward gives
  it back from the top, and no holes are left between (one of the right size cannot even be used again, because an
  aligned allocation needs some bytes more).
- The stream is (T * B, d), patch by patch, so that the samples of a batch can lie side by side (attention.py), and in
  two dimensions: `addmm` then makes a tensor of its own, and not a view, which in-place operators would have to copy in
  backward.
- The stream is fp32 also where the branches are computed in bf16 (autocast, bf16 weights): sums of hundreds of layers
  are not rounded to eight bits, and what the branches keep is in bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.attention import attend
from training.attention_choice import Attention, attention_for
from training.computing import recomputed, stored_in
from training.dropout import drop_, drop_add, drop_add_to_stream


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

    def forward(self, x: Tensor, owns_x: bool = False) -> Tensor:
        """(T * B, d) -> (T * B, d). owns_x: nobody needs x again, so that it may be written over."""
        dtype = branch_dtype(self.qkv.weight)
        x = self._add(self._attention(self.norm1(x.to(dtype))), x, owns_x)
        hidden = F.gelu(self.up(self.norm2(x.to(dtype))))
        if self.training and self.p:
            hidden = drop_(hidden, self.p)
        return self._add(self.down(hidden), x, True)

    def _attention(self, x: Tensor) -> Tensor:
        rows, d = x.shape
        way = attention_for(
            d // self.n_heads, rows // self.n_patches, is_bf16=x.dtype == torch.bfloat16, device=x.device.type
        )
        if way is Attention.LANES:  # transposed, at no cost
            qkv = torch.addmm(self.qkv.bias[:, None], self.qkv.weight, x.t())
        else:
            qkv = self.qkv(x)
        attended: Tensor = self.out(attend(qkv, way, self.n_patches, self.n_heads))
        return attended

    def _add(self, branch: Tensor, stream: Tensor, owns_stream: bool) -> Tensor:
        """Return stream + dropped branch; the stream is saved by the norm where the branch is of its own type."""
        if self.training and self.p:
            if branch.dtype == stream.dtype:
                return drop_add(branch, stream, self.p)
            return drop_add_to_stream(branch, stream, self.p, in_place=owns_stream)
        if branch.dtype == stream.dtype:
            return branch.add_(stream)
        return stream.add_(branch) if owns_stream else stream + branch


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
        x = self._embed(x)
        if self.training and c.dropout:
            x = drop_(x, c.dropout)
        for layer in self.layers:
            x = recomputed(layer, x) if self.recompute and torch.is_grad_enabled() else layer(x, True)
        return self._logits(self.norm(x.to(self.norm.weight.dtype)))

    def _embed(self, x: Tensor) -> Tensor:
        """(B, context_length, n_features) -> (T * B, d) in fp32."""
        c = self.config
        used = (c.n_patches - 1) * c.stride + c.patch_length
        days = x[:, c.context_length - used :]
        patches = days.unfold(1, c.patch_length, c.stride).transpose(0, 1).reshape(-1, c.n_features * c.patch_length)
        positions = self.positions[:, None].expand(-1, len(days), -1).reshape(-1, c.d_model)
        embedded: Tensor = self.embedding(patches.to(self.embedding.weight.dtype))
        return embedded.add_(positions) if embedded.dtype == torch.float32 else embedded.float().add_(positions)

    def _logits(self, x: Tensor) -> Tensor:
        """(T * B, d) -> (B,), in fp32 also under autocast: one column costs nothing."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            flat = x.float().view(c.n_patches, -1, c.d_model)
            if self.training and c.head_dropout:
                flat = F.dropout(flat, c.head_dropout)
            weight = self.head.weight.float().view(c.n_patches, c.d_model, 1)
            return torch.bmm(flat, weight).sum(0).squeeze(1) + self.head.bias.float()


def branch_dtype(weight: Tensor) -> torch.dtype:
    """Return the type that the layers' branches are computed in: the weights', or what autocast makes of them."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
