"""A log file that never grows past its limit, whoever fills it: its beginning, one line on what is missing, its end.

Covers appending, cutting the middle out, and a disk that cannot take it: nothing here raises. One writer a file.
Standard library only.
"""

from __future__ import annotations

import contextlib
import os

from scheduler.files.private import opener

LIMIT_BYTES = 64 * 2**20
TAIL_BYTES = 2**20
_LINE_BYTES = 4096  # how far a cut is moved, at most, to fall between two lines


class BoundedLog:
    """Appends to a file of at most `limit_bytes`: its first half stays, behind it the latest.

    The beginning of a log says what ran, its end why it died; in between a loop that floods it can have its say. Just
    after a cut the latest are `tail_bytes`, just before the next one nearly half of the limit.
    """

    def __init__(
        self, path: str | os.PathLike[str], limit_bytes: int = LIMIT_BYTES, tail_bytes: int = TAIL_BYTES
    ) -> None:
        """Open it for appending: now, or with a later write where that fails."""
        self.path = path
        self._limit_bytes, self._tail_bytes = limit_bytes, min(tail_bytes, limit_bytes // 4)
        self._descriptor: int | None = None
        self._head_bytes: int | None = None  # known from the first cut on
        self._cut_bytes, self._cut_line = 0, b""
        self._unwritten_bytes, self._why = 0, ""
        with contextlib.suppress(OSError):
            self._file()

    @property
    def flooded(self) -> bool:
        """More was written than it holds."""
        return self._head_bytes is not None

    def write(self, data: bytes) -> None:
        """Append it. What the disk does not take is left out, and told in the log as soon as that works."""
        left = memoryview(data)
        try:
            file = self._file()
            if self._unwritten_bytes:
                told = f"\n... {self._unwritten_bytes} bytes of log could not be written: {self._why} ...\n"
                os.write(file, told.encode())
                self._unwritten_bytes = 0
            while left:
                room = self._limit_bytes - os.fstat(file).st_size
                if room > 0:
                    left = left[os.write(file, left[:room]) :]
                else:
                    self._cut(file)
        except OSError as error:
            self._unwritten_bytes += len(left)
            self._why = error.strerror or type(error).__name__

    def close(self) -> None:
        """Free its descriptor. A later write opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _file(self) -> int:
        if self._descriptor is None:
            self._descriptor = opener(os.fspath(self.path), os.O_RDWR | os.O_APPEND | os.O_CREAT)
        return self._descriptor

    def _cut(self, file: int) -> None:
        """Take out what lies between the first half and the last `tail_bytes`, the line on the cut before included.

        Through the open file: its folder may have been moved. A crash in between loses the tail.
        """
        size = os.fstat(file).st_size
        if self._head_bytes is None:
            middle = self._limit_bytes // 2
            around = os.pread(file, _LINE_BYTES, max(0, middle - _LINE_BYTES))
            self._head_bytes = middle - (len(around) - 1 - around.rfind(b"\n") if b"\n" in around else 0)
        tail = os.pread(file, self._tail_bytes, max(0, size - self._tail_bytes))
        tail = tail[tail.find(b"\n", 0, _LINE_BYTES) + 1 :]  # nothing is taken off where no line ends
        self._cut_bytes += max(0, size - self._head_bytes - len(self._cut_line) - len(tail))
        limit = f"{self._limit_bytes // 2**20} MiB" if self._limit_bytes >= 2**20 else f"{self._limit_bytes} bytes"
        self._cut_line = f"\n... {self._cut_bytes} bytes left out: a log is kept to {limit} ...\n".encode()
        os.ftruncate(file, min(size, self._head_bytes))
        kept = memoryview(self._cut_line + tail)
        while kept:
            kept = kept[os.write(file, kept) :]
