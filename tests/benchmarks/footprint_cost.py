"""What the heap of the built-in training costs: CPU per step and peak of the same training under three heaps.

A part of `tests.benchmarks.footprint` (`--groups cost`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping

from tests.benchmarks.footprint_trials import ROOT, started_with
from training import runtime

SHAPES = (
    {"d_model": 64, "n_layers": 32, "d_ff": 128, "n_heads": 4, "micro_batch": 64},
    {"d_model": 256, "n_layers": 16, "d_ff": 512, "n_heads": 8, "micro_batch": 64},
    {"d_model": 512, "n_layers": 6, "d_ff": 2048, "n_heads": 8, "micro_batch": 32},
    {"d_model": 128, "n_layers": 8, "d_ff": 512, "n_heads": 8, "micro_batch": 256},
    {"d_model": 64, "n_layers": 16, "d_ff": 256, "n_heads": 2, "micro_batch": 8},
)
STEPS = """
import json, resource, sys, torch
sys.path.insert(0, {root!r})
from training.patchtst import PatchTST, PatchTSTConfig
from training.trainer import Trainer
from training.memory import peak_bytes
torch.set_num_threads(1); torch.manual_seed(0)
p = {params!r}; batch = p.pop("micro_batch")
x, y = torch.randn(2 * batch, 60, 25), torch.ones(2 * batch)
def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF); return used.ru_utime + used.ru_stime
trainer = Trainer(PatchTST(PatchTSTConfig(**p)), (x, y), epochs=1000, batch_size=batch, accumulation_steps=2)
trainer.max_steps = 2; trainer.train()
steps = max(3, int(1 / (1e-3 + 2e-9 * batch * 66 * sum(q.numel() for q in trainer.model.parameters()) / 60)))
steps = min(steps, 30); trainer.max_steps += steps; start = seconds(); trainer.train()
print(json.dumps([(seconds() - start) / steps, peak_bytes()]))
"""


def allocator_cost(rounds: int = 3) -> None:
    """CPU per step and peak of the same training under three heaps, processes interleaved; medians."""
    heaps: dict[str, Mapping[str, str | None]] = {
        "glibc default": {},
        "glibc, threshold 64 KiB": {"MALLOC_MMAP_THRESHOLD_": "65536"},
        runtime.STACK: {"GLIBC_TUNABLES": runtime.environment({})["GLIBC_TUNABLES"]},
    }
    print(f"\nCPU per step against glibc's default (median of {rounds} interleaved pairs), peak against the exact one")
    print(f"{'':<22}" + "".join(name.rjust(26) for name in heaps), flush=True)
    for shape in SHAPES:
        script = STEPS.format(root=str(ROOT), params=dict(shape))
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in heaps}
        for _ in range(rounds):
            for name, extra in heaps.items():
                environment = started_with({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **extra})
                out = subprocess.run(
                    [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
                )
                cpu_s, peak_bytes = json.loads(out.stdout)
                found[name].append((cpu_s, peak_bytes))
        exact = statistics.median(peak for _, peak in found["glibc, threshold 64 KiB"])
        row = f"d={shape['d_model']} L={shape['n_layers']} B={shape['micro_batch']}".ljust(22)
        for runs in found.values():
            ratio = statistics.median(a / b for (a, _), (b, _) in zip(runs, found["glibc default"], strict=True))
            peak = statistics.median(peak for _, peak in runs)
            row += f"{ratio:.2f}, {peak / exact - 1:+.1%}".rjust(26)
        print(row, flush=True)
