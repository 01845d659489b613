"""What bf16 is worth on this processor: matrix products timed when a trial begins.

Covers the measurement and the words for it. Flags do not tell: AMX computes products in bf16 seven times as fast as
AVX-512 in fp32 (Xeon), AVX-512's own bf16 instructions 2.2 times (Zen 4), and where there is neither torch converts,
which is slower than fp32. The recipe stays what the study was given: its trials are to be comparable.
"""

from __future__ import annotations

import time

import torch

ROWS, TRIES = 512, 3


def bf16_speedup(d_model: int, d_ff: int) -> float:
    """Return how many times as fast (512, d_model) x (d_model, d_ff) is in bf16 as in fp32 on this CPU.

    CPU time, not the clock's: other programs run beside. Draws no random number. 1 to 100 ms.
    """
    return _product_s(d_model, d_ff, torch.float32) / _product_s(d_model, d_ff, torch.bfloat16)


def _product_s(d_model: int, d_ff: int, dtype: torch.dtype) -> float:
    x, weight = torch.ones(ROWS, d_model, dtype=dtype), torch.ones(d_ff, d_model, dtype=dtype)
    found = []
    for _ in range(1 + TRIES):  # the first makes the kernel
        started = time.process_time()
        torch.mm(x, weight.t())
        found.append(time.process_time() - started)
    return max(min(found[1:]), 1e-9)


def warning(recipe: str, speedup: float) -> str | None:
    """Return what to say where bf16 is slower here; None where it is not."""
    if speedup >= 1:
        return None
    return (
        f"this processor computes products in bf16 at {speedup:.2f} times the speed of fp32: recipe {recipe} saves "
        "memory here, and no time"
    )
