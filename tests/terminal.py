"""A program on a terminal of its own: a real pseudo-terminal, and what its screen shows, by a terminal emulator."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import pyte

from tests.waiting import until


class _Screen(pyte.HistoryScreen):
    """Notes each line that the terminal itself had to wrap."""

    def __init__(self, columns: int, lines: int) -> None:
        super().__init__(columns, lines, history=5000)
        self.wrapped: list[str] = []

    def draw(self, data: str) -> None:
        for character in data:
            if self.cursor.x == self.columns:
                self.wrapped.append(self.display[self.cursor.y])
            super().draw(character)


class Terminal:
    """Runs `command` on a terminal of `columns` x `lines`. A context manager: what is left of it is ended."""

    def __init__(
        self, command: Sequence[str], columns: int, lines: int, *, cwd: str, environ: Mapping[str, str]
    ) -> None:
        self.screen = _Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._lock = threading.Lock()
        self.raw = b""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        # `setsid --ctty` makes it the controlling terminal, as a shell's would be.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env={"TERM": "xterm-256color", **environ},
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def press(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    @property
    def shown(self) -> str:
        """What is on the screen now."""
        with self._lock:
            return "\n".join(self.screen.display)

    @property
    def text(self) -> str:
        """What scrolled away, and the screen."""
        with self._lock:
            top = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
            return "\n".join([*top, *self.screen.display])

    def colours_of(self, words: str) -> set[str]:
        """The colours in which these words stand on the screen or above it."""
        found = set()
        with self._lock:
            rows = [*self.screen.history.top, *(self.screen.buffer[y] for y in range(self.screen.lines))]
            for row in rows:
                line = "".join(row[x].data for x in range(self.screen.columns))
                if (at := line.find(words)) >= 0:
                    found |= {row[x].fg for x in range(at, at + len(words))}
        return found

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> Any:
        """Wait until something is so; the screen is in the message otherwise."""
        return until(condition, timeout_s, lambda: f"{what}; the terminal shows:\n{self.text}")

    def wait_for(self, words: str, timeout_s: float = 120.0) -> None:
        """Wait until these words are somewhere on it."""
        self.wait(lambda: words in self.text or self._is_over(), f"{words!r} on the terminal", timeout_s)
        assert words in self.text, f"the program has ended without {words!r}:\n{self.text}"

    def ended(self, timeout_s: float = 120.0) -> int:
        """Wait for the end; its exit code."""
        self.wait(lambda: self.process.poll() is not None, "the program has ended", timeout_s)
        self._reader.join(timeout=10)
        return self.process.returncode

    def _is_over(self) -> bool:
        return self.process.poll() is not None and not self._reader.is_alive()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.press("qq")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._master)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            with self._lock:
                self.raw += data
                self._stream.feed(data)
