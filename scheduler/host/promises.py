"""What the runs of one host have promised of its memory together, seen through the host registry.

Each driver keeps its own ledger, and two on one host know nothing of each other: the registrations of their attempts
do. Covers what other runs were promised and have not taken yet, and the claim by which an attempt is registered: under
a lock of the whole host, and only where what it needs was not promised to another run a moment before. Runs of other
users, or with another HEADROOM_HOST_DIR, are seen only by the memory that they have taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from scheduler.host import vitals
from scheduler.host.registry import HostRegistry, Registration
from scheduler.model import HeadroomError
from scheduler.units import gib

LOCK_TIMEOUT_S = 5.0  # the holder samples some processes; one that is stopped meanwhile must not stop all others


class NoRoom(HeadroomError):
    """Another run was faster: the bytes are promised to it."""


class Promises:
    """One per agent. topic: of its driver, by which its own attempts are told from other runs'."""

    def __init__(self, registry: HostRegistry, topic: str, reserve_bytes: int = 0) -> None:
        self._registry, self._topic, self._reserve_bytes = registry, topic, reserve_bytes

    def others_unclaimed_bytes(self) -> int:
        """Promised to attempts of other runs on this host that live, and not yet taken by them."""
        return sum(_unclaimed(self._theirs()).values())

    def others_held_bytes(self) -> int:
        """Return the bytes that attempts of other runs on this host hold now."""
        return sum(_held(self._theirs()).values())

    def others_among(self, members: Iterable[tuple[int, float]]) -> int:
        """Bytes that attempts of other runs hold whose processes are among these (two drivers, one Dask worker)."""
        present = set(members)
        return sum(_held([r for r in self._theirs() if (r.pid, r.start_time) in present]).values())

    def _theirs(self) -> list[Registration]:
        return [reg for reg in self._registry.registrations() if reg.topic != self._topic]

    def register(self, reg: Registration, least_bytes: int | None = None) -> Registration:
        """Register an attempt; return what was registered. Raises NoRoom when other runs have promised the bytes it
        needs, OSError on a full disk.

        Where no other run has an attempt the driver's own ledger has said all there is to say. least_bytes: a trial
        that nobody can size is to have all there is; with so much left it gets that.
        """
        with self._exclusive():
            beside = [other for other in self._registry.registrations() if other.key != reg.key]
            others = sorted({other.run for other in beside if other.topic != self._topic})
            if others:
                available = vitals.host_memory().available_bytes
                promised = sum(_unclaimed(beside).values())
                room = (available or 0) - promised - self._reserve_bytes
                needed = reg.reservation_bytes if least_bytes is None else least_bytes
                if room < needed:
                    raise NoRoom(
                        f"no room: {gib(needed)} needed, {gib(max(0, room))} free that nobody was "
                        f"promised; on this host run {', '.join(others)} was faster"
                    )
                if room < reg.reservation_bytes:  # by what it was to have it is judged all the same
                    reg = replace(reg, reservation_bytes=room, promised_bytes=reg.promised)
            self._registry.register(reg)
        return reg

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        path = os.path.join(self._registry.root, "promises.lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            while time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.01)
            yield
        finally:
            os.close(fd)


def held_by_runs(root: str) -> int:
    """Return the bytes that attempts of all runs on this host hold now: for a plan, whose own run has none there yet.

    root: the registry's folder; 0 where there is none.
    """
    return sum(_held(list(HostRegistry(root).registrations())).values()) if os.path.isdir(root) else 0


def _held(registrations: list[Registration]) -> dict[str, int]:
    """Bytes that each of these attempts holds now; those whose process is gone are left out."""
    if not registrations:
        return {}
    wanted = {reg.key: (reg.pid, reg.start_time, False, ()) for reg in registrations}
    samples = vitals.sample_trees(wanted)
    return {key: sample.footprint_bytes or 0 for key, sample in samples.items() if sample is not None}


def _unclaimed(registrations: list[Registration]) -> dict[str, int]:
    held = _held(registrations)
    return {r.key: max(0, r.reservation_bytes - held[r.key]) for r in registrations if r.key in held}
