"""Objectives that do their work in other processes, as a user's script may."""

from __future__ import annotations

import os
import subprocess
import sys
import time

HOLD = "import sys, time; b = b'x' * (300 << 20); print('held', flush=True); time.sleep(float(sys.argv[1]))"


def sample(trial, context, architectures, fit):
    """One number."""
    return {"rate": trial.suggest_float("rate", 0.0, 1.0)}


def estimate(params, context):
    """What the objective itself takes: it knows nothing of its children."""
    return {"host_bytes": 60 << 20}


def _result(task):
    from training import trial

    return {"value": task["params"]["rate"], "metrics": {"own_peak_bytes": trial.peak_bytes()}}


def short(task, progress):
    """A program that takes 300 MiB for less than half a second."""
    subprocess.run([sys.executable, "-S", "-c", HOLD, "0.1"], check=True, stdout=subprocess.DEVNULL)
    return _result(task)


def long(task, progress):
    """The same for four seconds, with an epoch reported in the last of them."""
    with subprocess.Popen([sys.executable, "-S", "-c", HOLD, "4"], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        time.sleep(3.0)
        progress.report(1, 1.0)
        child.wait()
    return _result(task)


def forks(task, progress):
    """A fork that takes 300 MiB for a second."""
    child = os.fork()
    if child == 0:
        held = b"x" * (300 << 20)
        time.sleep(1.0)
        os._exit(len(held) == 0)
    os.waitpid(child, 0)
    return _result(task)


def loads(task, progress):
    """A torch DataLoader with two workers, which hand 8 MiB at a time over in shared memory."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Batches(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, i):
            time.sleep(0.05)
            return torch.full((2 << 20,), float(i))

    kept = torch.ones(25 << 20)  # 100 MiB, which the workers share
    total = sum(batch.mean().item() for batch in DataLoader(Batches(), num_workers=2, prefetch_factor=4))
    return _result(task) | {"value": total / kept.numel()}
