"""How long a trial that was asked to leave has for it.

Pure. A trial hears the request between two steps, then writes a checkpoint: how long that takes is known from the trial
itself, from the pauses between its signs of life. A step of a large model on a loaded machine takes minutes, and ending
it there throws away all since the last checkpoint.
"""

from __future__ import annotations

LONGEST_S = 3600.0  # also for one whose steps take longer: whoever asked may be a machine that shuts down


def allowance_s(floor_s: float, step_s: float | None) -> float:
    """Seconds from the request to the end: a step and a checkpoint, each as long as the longest pause, but at least
    `floor_s` and, unless that is more, an hour at most. step_s: the longest pause, None where none was seen."""
    return max(floor_s, min(LONGEST_S, 2 * (step_s or 0.0)))
