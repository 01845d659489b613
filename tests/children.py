"""Objectives that do their work in other processes, as a user's script may."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Trial

    from training.progress import Progress

HOLD = "import sys, time; b = b'x' * (300 << 20); print('held', flush=True); time.sleep(float(sys.argv[1]))"


def sample(
    trial: Trial,
    context: Mapping[str, Any],
    architectures: Sequence[Mapping[str, Any]],
    fit: Callable[[Mapping[str, Any]], int | None],
) -> dict[str, Any]:
    """One number."""
    return {"rate": trial.suggest_float("rate", 0.0, 1.0)}


def estimate(params: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, int]:
    """What the objective itself takes: it knows nothing of its children."""
    return {"host_bytes": 60 << 20}


def _result(task: Mapping[str, Any]) -> dict[str, Any]:
    from training import memory

    return {"value": task["params"]["rate"], "metrics": {"own_peak_bytes": memory.peak_bytes()}}


def short(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """A program that takes 300 MiB for less than half a second."""
    subprocess.run([sys.executable, "-S", "-c", HOLD, "0.1"], check=True, stdout=subprocess.DEVNULL)
    return _result(task)


def long(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """The same for four seconds, with an epoch reported in the last of them."""
    with subprocess.Popen([sys.executable, "-S", "-c", HOLD, "4"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(3.0)
        progress.report(1, 1.0)
        child.wait()
    return _result(task)


def forks(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """A fork that takes 300 MiB for a second."""
    child = os.fork()
    if child == 0:
        held = b"x" * (300 << 20)
        time.sleep(1.0)
        os._exit(len(held) == 0)
    os.waitpid(child, 0)
    return _result(task)


def loads(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """A torch DataLoader with two workers, which hand 8 MiB at a time over in shared memory."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Batches(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 60

        def __getitem__(self, i: int) -> torch.Tensor:
            time.sleep(0.05)
            return torch.full((2 << 20,), float(i))

    kept = torch.ones(25 << 20)  # 100 MiB, which the workers share
    total = sum(batch.mean().item() for batch in DataLoader(Batches(), num_workers=2, prefetch_factor=4))
    return _result(task) | {"value": total / kept.numel()}
