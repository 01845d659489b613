"""The names under which this project keeps what it must know of a trial among the trial's user attributes."""

from __future__ import annotations

# Written while a trial runs; the trial itself neither sees nor sets them: whose it is would change under the driver.
OURS = frozenset(
    {"owner", "run", "asked_unix", "attempt", "retries", "ran_s", "retry_of", "retry_reason", "resume_from"}
    | {"resume_host", "micro_batch", "footprint.predicted_bytes", "warm_start"}
)


def check(key: str) -> None:
    """Raise ValueError for a name that is not the objective's to set."""
    if key in OURS:
        raise ValueError(f"user attribute {key!r}: Headroom keeps its own under this name; choose another one")
