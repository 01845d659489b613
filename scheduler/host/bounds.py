"""What bounds the memory of this process, and which memory it is: the smallest rules, and is named.

Covers RAM, the cgroups, what the batch system gave (Slurm's --mem, where no cgroup enforces it) and the limit of one
Dask worker. Covers also the name of the memory: workers that draw from one memory say the same name, whatever they
are called. Reads the environment and the vitals; decides nothing.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.host import vitals
from scheduler.host.registry import boot_id
from scheduler.model import HeadroomError, Json
from scheduler.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a worker may use. See `model.WorkerFacts` for the fields."""

    domain: str
    total_bytes: int
    limit_bytes: int
    available_bytes: int
    worker_limit_bytes: int | None = None
    limit_source: str = "ram"

    @property
    def name(self) -> str:
        """Tells apart what may be charged to one another: the same memory under the same limits."""
        return f"{self.domain}:{self.limit_bytes}:{self.worker_limit_bytes or ''}"

    def to_json(self) -> Json:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def measure(environment: Mapping[str, str], worker_limit_bytes: int | None = None) -> Bounds:
    """Measure the bounds of this process. worker_limit_bytes: of the Dask worker it is, None or 0 where it has none.

    Raises HeadroomError when the host's memory cannot be read.
    """
    memory = vitals.host_memory()
    if memory.total_bytes is None or memory.limit_bytes is None or memory.available_bytes is None:
        raise HeadroomError("cannot read how much memory this machine has: without it nothing can be admitted safely")
    limit, source, domain = memory.limit_bytes, "ram", _machine()
    if (cgroup := vitals.binding_cgroup()) is not None and limit < memory.total_bytes:
        source, domain = "cgroup", f"{domain}/{cgroup}"
    given = slurm_bytes(environment)
    if given is not None and given < limit:
        limit, source, domain = given, "slurm", f"{domain}/slurm-{environment.get('SLURM_JOB_ID', '')}"
    own = worker_limit_bytes if worker_limit_bytes and worker_limit_bytes < limit else None
    return Bounds(
        domain=domain,
        total_bytes=memory.total_bytes,
        limit_bytes=limit,
        available_bytes=memory.available_bytes,
        worker_limit_bytes=own,
        limit_source=source if own is None else "dask",
    )


def slurm_bytes(environment: Mapping[str, str]) -> int | None:
    """Return what Slurm gave this job on this node, in bytes; None outside of a job, or where it gave all of the node.

    SLURM_MEM_PER_NODE (--mem) or SLURM_MEM_PER_CPU (--mem-per-cpu) times the job's CPUs here; both in MiB (sbatch(1)).
    """
    if (per_node := _number(environment.get("SLURM_MEM_PER_NODE"))) is not None:
        return per_node * MIB or None
    per_cpu = _number(environment.get("SLURM_MEM_PER_CPU"))
    cpus = _number(environment.get("SLURM_CPUS_ON_NODE"))
    return per_cpu * cpus * MIB if per_cpu and cpus else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else None


def _machine() -> str:
    """Return this boot of this machine: on Linux a unique id, elsewhere an instant, which two machines may share."""
    return boot_id() if sys.platform == "linux" and boot_id() != "unknown" else f"{socket.gethostname()}/{boot_id()}"
