"""Keeps a watchdog on the host, and hears what it says of it.

Covers starting one, starting it again when it is gone, the thresholds it goes by, and what its silence means: a host
that is not watched may not be filled. What it decides is `scheduler.watchdog`; how it is heard, `host.registry`.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time

from scheduler.host.registry import HostRegistry
from scheduler.model import Pressure
from scheduler.model.frames import AgentConfig
from scheduler.watchdog import watchdog

EXIT_S = 10.0
GRACE_S = 10.0


class WatchdogKeeper:
    """One agent's. Each starts one; flock decides which of the host's watches and which stand by."""

    def __init__(self, config: AgentConfig, registry: HostRegistry) -> None:
        self._registry, self._thresholds = registry, config.thresholds
        self._wanted = config.watchdog_mode != "off"
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._heard_at = time.monotonic()

    def set_thresholds(self) -> None:
        """Have the host's watchdog, whoever's it is, go by this run's thresholds. Raises OSError."""
        if self._wanted:
            self._registry.thresholds(self._thresholds)

    def restore_thresholds(self) -> bool:
        """Set them again if they are gone with the whole registry (a cleaner of /tmp); whether they were."""
        gone = self._wanted and not self._registry.policy()[0]
        if gone:
            self.set_thresholds()
        return gone

    def ensure(self) -> None:
        """Start one unless ours runs. Raises OSError."""
        if not self._wanted or self._closing.is_set():
            return
        if self._process is None or self._process.poll() is not None:
            self._process = watchdog.start(self._registry.root)

    def pressure(self) -> tuple[Pressure, str | None]:
        """(level, why admission is closed) as the watchdog says. One that is silent closes the host: what is not
        watched may not be filled. It gets a moment at the start to say its first word."""
        if not self._wanted:
            return Pressure.NORMAL, None
        reading = self._registry.pressure()
        if reading is not None:
            self._heard_at = time.monotonic()
            return reading.level, reading.closed_reason
        silent = time.monotonic() - self._heard_at > GRACE_S
        return Pressure.NORMAL, "the watchdog does not answer" if silent else None

    def begin_to_close(self) -> None:
        """Start no other one from here on; ours watches until `close`."""
        self._closing.set()

    def close(self) -> None:
        """Let ours end: it does when its stdin is closed. Returns when it is gone, after 10 s at most."""
        self._closing.set()
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_S)
