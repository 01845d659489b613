"""Which way of computing attention a shape is given: a rule, so that an attempt that goes on computes as it began.

Covers the choice alone, without torch: what each way keeps is charged by `footprint` too. The ways are `attention`'s.

Measured, forward and backward in CPU ms (Zen 4, one thread, 11 patches, a batch of 256 unless noted; `lanes` in bf16
computes in fp32):

    width, heads     64, 8   64, 2   64, 32   192, 8   512, 8   512, 32   1024, 8 (B=64)   192, 8 (B=32)   64, 8 (B=32)
    fused, fp32       12.7     6.3     30.4     21.0     29.1      60.7             12.7             2.7            1.9
    lanes, fp32        4.6     3.8     10.9     10.5     28.0      36.3             16.8             3.8            1.4
    fused, bf16       18.1                      25.8      149
    products, bf16     8.9     3.6     28.4     10.0     15.6      34.1              7.7             2.3            1.8
"""

from __future__ import annotations

import enum

WIDEST_LANES = 64  # features a head
WIDEST_LANES_BF16 = 8  # there two batched products are faster sooner
SAMPLES_A_FEATURE = 4  # fewer, and the inner loops are too short for their number


class Attention(enum.Enum):
    """How attention is computed.

    LANES: elementwise, with the samples of the batch side by side. PRODUCTS: two batched matrix products. FUSED:
    torch's `scaled_dot_product_attention`.
    """

    LANES = "lanes"
    PRODUCTS = "products"
    FUSED = "fused"


def attention_for(head_width: int, samples: int, *, is_bf16: bool = False, device: str = "cpu") -> Attention:
    """Return the way for heads of this many features and a micro-batch of this many samples."""
    if device != "cpu":
        return Attention.FUSED
    widest = WIDEST_LANES_BF16 if is_bf16 else WIDEST_LANES
    if head_width <= widest and SAMPLES_A_FEATURE * head_width <= samples:
        return Attention.LANES
    return Attention.PRODUCTS if is_bf16 else Attention.FUSED
