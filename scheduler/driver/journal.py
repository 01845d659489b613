"""The journal: an append-only file of JSON lines, one per thing that happened.

Covers writing (durable where asked, never blocking the driver on a full disk) and reading back (a torn last line is
dropped and reported). It is the structured log for post-mortems as well as what a restart may replay.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from structlog.processors import JSONRenderer

from scheduler.model.plain import plain

VERSION = 1
_render = JSONRenderer(default=str, ensure_ascii=False)
_HELD_LINES = 100_000  # kept in memory while the disk is full; then the oldest go


class Journal:
    """One writer per file (the driver's lock sees to it). `write` may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Open for appending. A torn last line (power cut, full disk) is ended, so that the next one is whole."""
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._held: deque[bytes] = deque(maxlen=_HELD_LINES)
        size = os.fstat(self._fd).st_size
        self.was_torn = bool(size) and os.pread(self._fd, 1, size - 1) != b"\n"
        if self.was_torn:
            self._held.append(b"\n")

    @property
    def held(self) -> int:
        """Lines that the disk has not taken yet."""
        return len(self._held)

    def write(self, event: str, *, durable: bool = False, **fields: Any) -> None:
        """Append one line. durable: it is on the disk when this returns (unless the disk refuses: then it is held)."""
        record = {"v": VERSION, "unix": round(time.time(), 3), "event": event, **fields}
        with self._lock:
            self._held.append(_line(record))
            self._flush(durable)

    def flush(self) -> bool:
        """Try again to write what is held; False while the disk refuses."""
        with self._lock:
            return not self._held or self._flush(durable=True)

    def close(self) -> None:
        with self._lock:
            self._flush(durable=True)
            os.close(self._fd)

    def _flush(self, durable: bool) -> bool:
        try:
            while self._held:
                size = os.fstat(self._fd).st_size
                if os.write(self._fd, self._held[0]) != len(self._held[0]):
                    os.ftruncate(self._fd, size)
                    return False
                self._held.popleft()
            if durable:
                os.fsync(self._fd)
        except OSError:  # full disk, lost mount: training goes on; what happened is held until it is back
            return False
        return True


def _line(record: dict[str, Any]) -> bytes:
    """Return the record as a line.

    What comes from a trial is bounded where it enters (`model.plain`); that the journal takes everything all the same
    is what keeps a fault elsewhere from ending the driver, and each start after it.
    """
    try:
        rendered = str(_render(None, "info", record)).encode()
    except Exception:  # no Unicode, too many digits, too deep, a text that raises: whatever it is, it is made plain
        rendered = str(_render(None, "info", plain(record))).encode()
    return rendered + b"\n"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the journal's records, oldest first; lines that are no whole JSON object (a torn one) are skipped."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and "event" in record:
                    yield record
