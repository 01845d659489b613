"""A program inside a real tmux, as its user runs it over ssh: keys pressed, the screen captured, every byte counted."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.waiting import until

TMUX = shutil.which("tmux")


class Tmux:
    """Runs `command` in a tmux server of its own, in a window of `columns` x `lines`. A context manager: what is left
    of it is ended."""

    def __init__(
        self, command: Sequence[str], columns: int, lines: int, *, folder: Path, environ: Mapping[str, str]
    ) -> None:
        assert TMUX is not None
        self._socket, self._bytes, self._code = folder / "tmux", folder / "bytes", folder / "code"
        self._environ = {**environ, "TERM": "xterm-256color", "SHELL": "/bin/sh"}
        # The program begins once its output is also written to a file; its exit code is left behind.
        told = f"read go; {shlex.join(command)}; echo $? >{shlex.quote(str(self._code))}; read end"
        self._tmux("new-session", "-d", "-x", str(columns), "-y", str(lines), "-c", str(folder), told)
        self._tmux("set-option", "-g", "history-limit", "5000")
        self._tmux("pipe-pane", "-O", f"cat >{shlex.quote(str(self._bytes))}")
        until(self._bytes.exists, 20, lambda: "tmux writes what the program writes")
        self.press("Enter")

    def press(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        self._tmux("send-keys", *keys)

    def resize(self, columns: int, lines: int) -> None:
        """Give the window another size."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    @property
    def shown(self) -> str:
        """What is on the screen now."""
        return self._tmux("capture-pane", "-p")

    @property
    def text(self) -> str:
        """What scrolled away, and the screen; lines that tmux had to wrap stay in two."""
        return self._tmux("capture-pane", "-p", "-S", "-")

    @property
    def captured(self) -> str:
        """What is on the screen now, with the escape sequences of its colours."""
        return self._tmux("capture-pane", "-p", "-e")

    @property
    def wrapped(self) -> list[str]:
        """The lines that tmux had to wrap."""
        joined = self._tmux("capture-pane", "-p", "-J", "-S", "-").splitlines()
        return sorted({line.rstrip() for line in joined} - set(self.text.splitlines()))

    @property
    def raw(self) -> bytes:
        """All bytes that the program has written."""
        return self._bytes.read_bytes()

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        with contextlib.suppress(OSError, ValueError):
            return int(self._code.read_text())
        return None

    def styles_of(self, words: str) -> set[str]:
        """The SGR parameters in force where these words begin, on the screen or above it: {"1", "31"} is bold red."""
        found = set()
        for line in self._tmux("capture-pane", "-p", "-e", "-S", "-").splitlines():
            in_force: set[str] = set()
            plain = ""
            for part in re.split(r"(\x1b\[[0-9;]*m)", line):
                if part.startswith("\x1b["):
                    for each in part[2:-1].split(";"):
                        in_force = set() if each in ("", "0") else in_force | {each}
                    continue
                if words in plain + part and len(plain) <= (plain + part).find(words):
                    found |= in_force
                plain += part
        return found

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> Any:
        """Wait until something is so; the screen is in the message otherwise."""
        return until(condition, timeout_s, lambda: f"{what}; tmux shows:\n{self.text}")

    def wait_for(self, words: str, timeout_s: float = 120.0) -> None:
        """Wait until these words are somewhere on it."""
        self.wait(lambda: words in self.text or self.code is not None, f"{words!r} in tmux", timeout_s)
        assert words in self.text, f"the program has ended without {words!r}:\n{self.text}"

    def ended(self, timeout_s: float = 120.0) -> int:
        """Wait for the end; its exit code."""
        self.wait(lambda: self.code is not None, "the program has ended", timeout_s)
        assert self.code is not None
        return self.code

    def __enter__(self) -> Tmux:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            if self.code is None:
                self.press("q", "q")
                self.ended(30)
        subprocess.run([*self._command, "kill-server"], env=self._environ, capture_output=True, check=False)

    @property
    def _command(self) -> list[str]:
        return [str(TMUX), "-S", str(self._socket), "-f", os.devnull, "-u"]

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments], env=self._environ, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout
