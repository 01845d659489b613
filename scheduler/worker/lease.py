"""How long an agent goes on for a driver that it does not hear of.

Pure: instants are arguments. A pause of the agent itself (a suspended machine, SIGSTOP) is not the driver's silence.
"""

from __future__ import annotations

PAUSE_S = 5.0  # between two beats that are a quarter of a second apart: it was we who were away


class Lease:
    """Held from the last sign of life of the driver for `hold_s`. Instants are seconds of one monotonic clock."""

    def __init__(self, hold_s: float, now: float) -> None:
        self._hold_s = hold_s
        self._heard_at = self._beat_at = now

    def heard(self, now: float) -> None:
        """Note that the driver gave a sign of life."""
        self._heard_at = now

    def beat(self, now: float) -> None:
        """Notice pauses of our own; called several times a second."""
        gap_s = now - self._beat_at
        if gap_s > PAUSE_S:
            self._heard_at += gap_s
        self._beat_at = now

    def silent_s(self, now: float) -> float:
        """Seconds without a sign of life."""
        return max(0.0, now - self._heard_at)

    def is_over(self, now: float) -> bool:
        return self.silent_s(now) > self._hold_s
