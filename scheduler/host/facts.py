"""What this machine is, for the plan: cores, device, memory, as the `WorkerFacts` of a worker that does not run yet.

Asks the system without importing torch or Dask, so that `--dry-run` is quick. A running worker's facts come from the
worker itself (see `agent`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

from scheduler.model import DevicePool, Environment, WorkerFacts
from scheduler.units import MIB

# What a worker with its warm spare holds before it can be asked: 192 MiB were measured where the spare is 225, 326
# where it is 507 (much of it are pages of files, which processes share). The ledger charges the real number.
OVERHEAD_BYTES = 256 * MIB
WORKER_BYTES, SPARE_SHARE = 112 * MIB, 0.5
METAL_SHARE = 0.75  # of RAM, what Metal can safely hold; torch gives the exact number only once it is imported


def cores() -> int:
    """CPUs this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def resolve_device(device: str) -> str:
    """`auto` made definite without importing torch (which costs seconds): Metal on Apple silicon, CUDA where there is
    an NVIDIA driver and the installed torch is no CPU build, else the CPU."""
    if device != "auto":
        return device
    if platform.system() == "Darwin":
        return "mps" if platform.machine() == "arm64" else "cpu"
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "cpu"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() and not version.endswith("+cpu") else "cpu"


def why_no_device(device: str) -> str | None:
    """Say why there is no such device on this machine, None where there is, or nobody asked for one."""
    if device == "mps" and (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return "this machine is no Mac with Apple silicon"
    if device != "cuda":
        return None
    if device_pool(device, 0) is None:
        return "nvidia-smi finds no NVIDIA GPU on this machine"
    with contextlib.suppress(metadata.PackageNotFoundError):
        if (version := metadata.version("torch")).endswith("+cpu"):
            return f"the torch that is installed, {version}, is built for the CPU alone"
    return None


def overhead_bytes(environment: Environment | None) -> int:
    """Return what a worker will hold besides its trials."""
    return OVERHEAD_BYTES if environment is None else WORKER_BYTES + int(SPARE_SHARE * environment.runtime_bytes)


def facts(device: str, slots: int, environment: Environment | None = None) -> WorkerFacts:
    """Return the local worker as it will be: this host's memory, the device's pool (None when it cannot be asked).

    environment: of its trial processes, where one was measured before. Raises HeadroomError when the host's memory
    cannot be read.
    """
    from scheduler.host import bounds
    from scheduler.host.promises import held_by_runs
    from scheduler.host.registry import host_folder

    found = bounds.measure(os.environ)
    return WorkerFacts(
        address="local",
        host=socket.gethostname(),
        slots=slots,
        overhead_bytes=overhead_bytes(environment),
        others_held_bytes=held_by_runs(host_folder()),
        device=device_pool(device, found.total_bytes),
        **found.to_json(),
        environment=environment,
    )


def device_pool(device: str, total_bytes: int) -> DevicePool | None:
    """Return the memory of the device, None on the CPU and where the driver's tool gives no answer."""
    if device == "mps":
        return DevicePool(kind="mps", total_bytes=int(total_bytes * METAL_SHARE), unified=True)
    if device != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return DevicePool(kind="cuda", total_bytes=int(answer.split()[0]) * MIB, unified=False)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
