"""How a batch ends: the exit code and the sentence that goes with it.

Pure. The codes for what goes wrong before a batch begins (usage, nothing fits) are `HeadroomError.exit_code`; all of
them stand in the README's table. Never 0 on work that was not done.
"""

from __future__ import annotations

from collections.abc import Collection

from scheduler.core.trial import Study

DONE, NOT_DONE, TIMED_OUT, STOPPED = 0, 1, 124, 130  # 124: what timeout(1) ends with


def verdict(
    studies: Collection[Study], *, over: bool, draining: str | None, failed: bool, timed_out: bool
) -> tuple[int, str]:
    """(exit code, reason). over: every study is closed. draining: who asked to stop. failed: nobody did, it cannot go
    on. timed_out: the batch's own time limit asked."""
    if any(study.closed_early for study in studies):
        return NOT_DONE, "some studies closed early"
    if over:
        empty = sorted(study.spec.name for study in studies if not study.completed)
        if empty:
            return NOT_DONE, f"no trial completed in {', '.join(empty)}"
        return DONE, "all studies reached their quota"
    if failed:
        return NOT_DONE, f"stopped by {draining}"
    return (TIMED_OUT if timed_out else STOPPED), f"stopped by {draining}"
