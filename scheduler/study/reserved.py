"""The names under which this project keeps what it must know of a trial among the trial's user attributes."""

from __future__ import annotations

# Written while a trial runs; the trial itself neither sees nor sets them: whose it is would change under the driver.
OURS = frozenset(
    {"owner", "run", "asked_unix", "attempt", "retries", "ran_s", "retry_of", "retry_reason", "resume_from"}
    | {"resume_host", "micro_batch", "footprint.predicted_bytes", "warm_start"}
)

# What Optuna's own functions keep of a trial that runs; all else is the sampler's, the pruner's or the driver's.
OPTUNAS = ("artifacts:", "terminator:")


def check(key: str) -> None:
    """Raise ValueError for a name that is not the objective's to set."""
    if key in OURS:
        raise ValueError(f"user attribute {key!r}: Headroom keeps its own under this name; choose another one")


def check_system(key: str) -> None:
    """Raise ValueError for a system attribute that a trial may not set."""
    if not key.startswith(OPTUNAS):
        raise ValueError(f"system attribute {key!r}: a trial that Headroom runs can keep {' and '.join(OPTUNAS)} only")
