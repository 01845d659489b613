"""Single keys from the terminal, without Enter, while something else draws on it.

Covers reading in a thread and leaving the terminal as it was found, however the program ends (short of SIGKILL). Does
nothing at all where standard input is no terminal.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

try:
    import termios
    import tty
except ImportError:  # no POSIX terminal here
    termios = None  # type: ignore[assignment]  # what is asked before each use


class KeyReader:
    """Calls `on_key(character)` from its own thread. A context manager; `stop` may be called more than once."""

    def __init__(self, on_key: Callable[[str], None], fd: int | None = None) -> None:
        self._on_key = on_key
        self._fd = _stdin_fd() if fd is None else fd
        self._before: list[Any] | None = None
        self._thread: threading.Thread | None = None
        self._wake_read = self._wake_write = -1
        self._lock = threading.Lock()

    def start(self) -> bool:
        """Begin to read; False when there is no terminal (nothing was changed then)."""
        if termios is None or self._fd < 0 or not os.isatty(self._fd):
            return False
        self._before = termios.tcgetattr(self._fd)
        self._wake_read, self._wake_write = os.pipe()
        atexit.register(self.stop)
        self._thread = threading.Thread(target=self._read, name="keys", daemon=True)
        self._thread.start()
        return True

    def stop(self) -> None:
        """Stop reading and put the terminal back as it was."""
        with self._lock:
            before, self._before = self._before, None
            if before is None:
                return
            os.write(self._wake_write, b"x")
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join(timeout=2)
            # From the background this would stop the whole program (SIGTTOU); the shell then owns the mode anyway.
            if self._in_foreground():
                with contextlib.suppress(termios.error, OSError):
                    termios.tcsetattr(self._fd, termios.TCSADRAIN, before)
            for end in (self._wake_read, self._wake_write):
                os.close(end)
            atexit.unregister(self.stop)

    def __enter__(self) -> KeyReader:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _read(self) -> None:
        while self._before is not None:
            # Looked at again each time: after Ctrl-Z and fg the shell has put its own mode back.
            watched = [self._wake_read]
            if self._in_foreground() and self._listen():
                watched.append(self._fd)
            ready, _, _ = select.select(watched, [], [], 0.5)
            if self._wake_read in ready:
                return
            if self._fd in ready:
                try:
                    data = os.read(self._fd, 64)
                except OSError:
                    return
                if not data:
                    return  # the terminal is gone
                for character in data.decode("utf-8", "ignore"):
                    self._on_key(character)

    def _listen(self) -> bool:
        """Characters as they come, not lines; Ctrl-C and Ctrl-Z keep their meaning."""
        try:
            if termios.tcgetattr(self._fd)[3] & termios.ICANON:
                tty.setcbreak(self._fd, termios.TCSANOW)
        except (termios.error, OSError):
            return False
        return True

    def _in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return False


def _stdin_fd() -> int:
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        return -1
