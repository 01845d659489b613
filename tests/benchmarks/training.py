"""How fast is a step? Ours beside the loop that a user would write, and beside this machine's matrix products.

    .venv/bin/python -m tests.benchmarks.training [--shapes NAME ...] [--recipes NAME ...] [--threads N ...]
        [--rounds N] [--save FILE]

Each loop is a process of its own, in the environment it has in use: ours under `training.runtime.environment`, the
plain loop as it is started from a shell. They take turns, one optimizer step of 256 samples each, so that what else the
machine does meets them alike. Figures are medians over the rounds: CPU time of a process (user and system, all its
threads) a step, wall time a step, and the ratio of either to the plain loop's step of the same round.

The plain loop: `nn.TransformerEncoderLayer` (pre-norm, gelu, d_ff = 4 d, 8 heads, dropout 0.1) behind the same
embedding and before the same head, `DataLoader`, `torch.optim.Adam`, fp32; `plain bf16` is the same under
`torch.autocast`.
`products`: the matrix products of the layers alone, forward and backward, back to back: no loop is faster.

Prints what the processor can do with bf16 (flags and measured), the table, and for each target whether it was met.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.footprint_trials import ROOT, started_with
from training import recipe as recipes
from training import runtime
from training.progress import Silent

SHAPES = {"d=64 L=48": (64, 48), "d=192 L=4": (192, 4), "d=512 L=6": (512, 6)}
PLAIN, PLAIN_BF16, PRODUCTS, PRODUCTS_BF16 = "plain", "plain bf16", "products", "products bf16"
BY_DEFAULT = ("fp32_adamw", "bf16_autocast")
SAMPLES, BATCH, PATCHES, HEADS, FEATURES = 5000, 256, 11, 8, 25
MOST_FP32 = {"d=64 L=48": 0.75, "d=192 L=4": 0.75, "d=512 L=6": 0.90}
MOST_FASTEST = {"d=64 L=48": 0.50, "d=192 L=4": 0.36, "d=512 L=6": 0.36}


# -- the loops: each yields after an optimizer step -----------------------------------------------------------------


def windows() -> tuple[Any, Any]:
    """Overlapping windows of random days, as `hpo.samples` makes them, and labels."""
    import torch

    days = torch.randn(SAMPLES + 59, FEATURES, generator=torch.Generator().manual_seed(0))
    return days.unfold(0, 60, 1).transpose(1, 2), (days[59:, 0] > 0).float()


def plain_model(
    d: int, layers: int, *, features: int = FEATURES, heads: int = HEADS, d_ff: int | None = None, dropout: float = 0.1
) -> Any:
    """What a user would write: (n, 60, features) to (n,) logits."""
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Linear(10 * features, d)
            self.positions = nn.Parameter(torch.zeros(PATCHES, d))
            layer = nn.TransformerEncoderLayer(
                d, heads, d_ff or 4 * d, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(d), enable_nested_tensor=False)
            self.head = nn.Linear(PATCHES * d, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            patches = x.unfold(1, 10, 5).flatten(2)
            logits: torch.Tensor = self.head(self.encoder(self.embedding(patches) + self.positions).flatten(1))
            return logits.squeeze(1)

    return Plain()


def plain_loop(d: int, layers: int, is_bf16: bool) -> Iterator[None]:
    """Train that model as a user would."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    model, loss_of = plain_model(d, layers), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loader = DataLoader(TensorDataset(*windows()), batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
                logits = model(x)
            loss_of(logits.float(), y).backward()
            optimizer.step()
            yield


class Turns(Silent):
    """A progress that ends the trainer after one optimizer step."""

    def tick(self) -> None:
        self.stop_requested = "drain"


def our_loop(d: int, layers: int, recipe: recipes.Recipe) -> Iterator[None]:
    """The trainer's own loop, without validation."""
    from training import computing
    from training.patchtst import PatchTST, PatchTSTConfig
    from training.trainer import Trainer

    config = PatchTSTConfig(d_model=d, n_layers=layers, n_heads=HEADS, d_ff=4 * d)
    x, y = windows()
    whole = SAMPLES // BATCH * BATCH
    turns = Turns()
    trainer = Trainer(
        PatchTST(config, computing.storage(recipe)),
        (x[:whole], y[:whole]),
        epochs=10**6,
        batch_size=BATCH,
        lr=1e-4,
        recipe=recipe,
        progress=turns,
    )
    while True:
        turns.stop_requested = None
        trainer.train()
        yield


def products(d: int, layers: int, is_bf16: bool) -> Iterator[None]:
    """Forward and backward products of the four matrices of each layer."""
    import torch

    dtype, rows = torch.bfloat16 if is_bf16 else torch.float32, BATCH * PATCHES
    shapes = ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    inputs = {width: torch.randn(rows, width).to(dtype) for shape in shapes for width in shape}
    while True:
        for weight in weights * layers:
            x, gradient = inputs[weight.shape[1]], inputs[weight.shape[0]]
            _ = x @ weight.t(), gradient @ weight, gradient.t() @ x
        yield


def loop_of(name: str, d: int, layers: int) -> Iterator[None]:
    """Return the loop of this name: a plain one, products, or a recipe of ours."""
    if name in (PLAIN, PLAIN_BF16):
        return plain_loop(d, layers, name == PLAIN_BF16)
    if name in (PRODUCTS, PRODUCTS_BF16):
        return products(d, layers, name == PRODUCTS_BF16)
    return our_loop(d, layers, recipes.named(name))


def child(name: str, shape: str, threads: int) -> None:
    """Take one step for each line of stdin, and say its CPU and wall seconds."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    loop = loop_of(name, *SHAPES[shape])
    for _ in sys.stdin:
        used, started = _cpu_s(), time.perf_counter()
        next(loop)
        print(json.dumps([_cpu_s() - used, time.perf_counter() - started]), flush=True)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# -- taking turns ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Medians of one loop. Seconds a step; ratios to the plain loop's step of the same round."""

    cpu_s: float
    wall_s: float
    cpu_ratio: float
    wall_ratio: float


class Loop:
    """A process that takes a step when told to."""

    def __init__(self, name: str, shape: str, threads: int) -> None:
        settings: dict[str, str | None] = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        if name in {each.name for each in recipes.RECIPES}:
            settings |= runtime.environment({"threads": threads})
        command = [sys.executable, "-m", "tests.benchmarks.training", "--child", name, shape, str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        self.process = subprocess.Popen(command, env=started_with(settings), **pipes)

    def step(self) -> tuple[float, float]:
        """Return CPU and wall seconds of one step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a loop has ended with status {self.process.wait()}")
        cpu_s, wall_s = json.loads(line)
        return cpu_s, wall_s

    def end(self) -> None:
        """Let it go, and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_turns(names: Sequence[str], shape: str, threads: int, rounds: int) -> dict[str, Timing]:
    """Two steps of each to warm up, then `rounds` steps of each, one after the other."""
    loops = {name: Loop(name, shape, threads) for name in names}
    try:
        for _ in range(2):
            for loop in loops.values():
                loop.step()
        found = [{name: loop.step() for name, loop in loops.items()} for _ in range(rounds)]
    finally:
        for loop in loops.values():
            loop.end()
    return {
        name: Timing(
            cpu_s=statistics.median(each[name][0] for each in found),
            wall_s=statistics.median(each[name][1] for each in found),
            cpu_ratio=statistics.median(each[name][0] / each[PLAIN][0] for each in found),
            wall_ratio=statistics.median(each[name][1] / each[PLAIN][1] for each in found),
        )
        for name in names
    }


# -- what is printed ------------------------------------------------------------------------------------------------


def machine() -> str:
    """The processor, what it has for bf16, and torch."""
    import torch

    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        pass
    has = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    lacks = [name for name in ("avx512_bf16", "amx_bf16") if name not in flags]
    return (
        f"{model}, {os.cpu_count()} cores; has {', '.join(has) or 'none of the known flags'}; "
        f"lacks {', '.join(lacks) or 'nothing of it'}; torch {torch.__version__}"
    )


def flops(shape: str) -> float:
    """Of `products`."""
    d, layers = SHAPES[shape]
    return 3 * 2 * BATCH * PATCHES * layers * 12 * d * d


def print_timings(shape: str, threads: int, found: Mapping[str, Timing]) -> None:
    """One line a loop."""
    print(f"\n{shape}, {threads} thread{'s' * (threads > 1)}: a step of {BATCH}")
    print(f"{'':<18}{'CPU ms':>9}{'ratio':>7}{'wall ms':>9}{'ratio':>7}")
    for name, timing in found.items():
        rate = f"   {flops(shape) / timing.cpu_s / 1e9:.0f} GFLOP/s a core" if name.startswith(PRODUCTS) else ""
        print(
            f"{name:<18}{timing.cpu_s * 1e3:>9.0f}{timing.cpu_ratio:>7.2f}"
            f"{timing.wall_s * 1e3:>9.0f}{timing.wall_ratio:>7.2f}{rate}",
            flush=True,
        )


def print_targets(shape: str, found: Mapping[str, Timing]) -> None:
    """Whether CPU time met what was asked for, and where it could not have: the products alone are above it."""
    ours = {name: timing.cpu_ratio for name, timing in found.items() if name in {r.name for r in recipes.RECIPES}}
    asked = []
    if ours:
        fastest = min(ours, key=lambda name: ours[name])
        asked.append((f"fastest recipe ({fastest})", ours[fastest], MOST_FASTEST[shape]))
    if recipes.FP32_ADAMW.name in ours:
        asked.append(("fp32", ours[recipes.FP32_ADAMW.name], MOST_FP32[shape]))
    if "bf16_autocast" in ours and PLAIN_BF16 in found:
        asked.append(("beside the plain loop in bf16", ours["bf16_autocast"], found[PLAIN_BF16].cpu_ratio))
    limit = min(found[name].cpu_ratio for name in (PRODUCTS, PRODUCTS_BF16))
    for what, ratio, most in asked:
        verdict = "met" if ratio <= most else "missed"
        above = f"; bf16 products alone take {limit:.2f}" if ratio > most and what.startswith("fastest") else ""
        print(f"  {verdict}: {what} {ratio:.2f}, asked for at most {most:.2f}{above}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=list(BY_DEFAULT), choices=[r.name for r in recipes.RECIPES])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", type=Path, help="append each table as a line of JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child[0], chosen.child[1], int(chosen.child[2]))
        return
    print(machine())
    names = [PLAIN, PLAIN_BF16, *chosen.recipes, PRODUCTS, PRODUCTS_BF16]
    for threads in chosen.threads:
        for shape in chosen.shapes:
            found = take_turns(names, shape, threads, chosen.rounds)
            print_timings(shape, threads, found)
            print_targets(shape, found)
            if chosen.save:
                with chosen.save.open("a", encoding="utf-8") as file:
                    row = {name: [t.cpu_s, t.wall_s, t.cpu_ratio, t.wall_ratio] for name, t in found.items()}
                    file.write(json.dumps({"shape": shape, "threads": threads, "timings": row}) + "\n")


if __name__ == "__main__":
    main()
