"""What the workers of a running cluster have, asked before a run of ours begins there. Starts nothing on them."""

from __future__ import annotations

import functools
import uuid

from scheduler.cluster.agent_plugin import describe
from scheduler.cluster.client import Cluster
from scheduler.cluster.credentials import Security
from scheduler.model import WorkerFacts
from scheduler.model.fields import read
from scheduler.settings.schema import Settings
from scheduler.worker import importable

FACTS_TIMEOUT_S = 10.0
IMPORT_TIMEOUT_S = importable.CHECK_TIMEOUT_S + 10.0


def cluster_facts(
    settings: Settings, address: str, security: Security, imported: importable.ToImport | None = None
) -> list[WorkerFacts]:
    """Ask what the workers of a running cluster have, for the plan.

    imported: what they must be able to import. Raises UsageError: no answer, no worker, or none that can import it.
    (Where only some cannot, their hosts are closed when they try.)
    """
    cluster = Cluster.connect(address, topic=f"plan-{uuid.uuid4().hex[:8]}", security=security)
    ask = functools.partial(describe, runtime_key=(settings.training.preload, settings.heap, settings.training.fork))
    try:
        found = [read(WorkerFacts, answer) for answer in cluster.ask_workers(ask, FACTS_TIMEOUT_S)]
        if imported is not None:
            tried = functools.partial(importable.why_not_imported, imported.path, imported.module)
            said = [each["problem"] for each in cluster.ask_workers(tried, FACTS_TIMEOUT_S, IMPORT_TIMEOUT_S)]
            if None not in said:
                raise imported.refused(said[0], f" (on the workers of {address})")
        return found
    finally:
        cluster.close()
