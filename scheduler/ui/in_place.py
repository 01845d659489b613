"""A picture that stays in its place at the foot of a terminal, while lines scroll by above it.

Only lines that have changed are written again, each over what stood there, and nothing is erased beforehand: there is
no moment at which the picture is not there, and over a slow connection little to send. Knows nothing of what is drawn.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterable
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

_TO_END_OF_LINE, _TO_END_OF_SCREEN, _HIDE, _SHOW = "\x1b[K", "\x1b[J", "\x1b[?25l", "\x1b[?25h"
# Spaces at the end of a line, in colour or not: a terminal that becomes narrower folds them into a line of their own.
_PADDING = re.compile(r" *(\x1b\[0m)?(?:\x1b\[[0-9;]*m *\x1b\[0m| )*$")


class InPlace:
    """Thread-safe. Between calls the cursor stands at the beginning of the line below the picture.

    Raises OSError or ValueError where the terminal is gone.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._file = console, console.file
        self._lock = threading.RLock()
        self._lines: list[str] = []  # of the picture, as written, with their colours
        self._size = console.size
        self._cursor_is_hidden = False

    def draw(self, picture: RenderableType) -> None:
        """Show this picture instead of the one before; what would not fit on the screen is left out."""
        lines = self._rendered(picture)
        with self._lock:
            self._write(lines[: max(1, self._console.height - 1)])

    def above(self, lines: Iterable[Text]) -> None:
        """Write lines above the picture, where they stay. None may be wider than the terminal."""
        told = [line for each in lines for line in self._rendered(each)]
        with self._lock:
            self._write([*told, *self._lines])
            del self._lines[: len(told)]

    def leave(self) -> None:
        """Take the picture away; what was written above it stays."""
        with self._lock:
            out = self._up(self._rows()) + _TO_END_OF_SCREEN if self._lines else ""
            self._lines = []
            self._send(out + (_SHOW if self._cursor_is_hidden else ""))
            self._cursor_is_hidden = False

    def _rendered(self, picture: RenderableType) -> list[str]:
        with self._console.capture() as captured:
            self._console.print(picture)
        return [_PADDING.sub(r"\1", line, count=1) for line in captured.get().split("\n")[:-1]]

    def _write(self, lines: list[str]) -> None:
        """Write these over the picture there is."""
        before, out = self._lines, "" if self._cursor_is_hidden else _HIDE
        if self._console.size == self._size:
            known = [old == new for old, new in zip(before, lines, strict=False)]
            first = next((i for i, same in enumerate(known) if not same), len(known))
            out += self._up(len(before) - first)
        else:  # the terminal may have folded or moved what stands there
            known, first = [], 0
            out += self._up(self._rows()) + _TO_END_OF_SCREEN
        for index in range(first, len(lines)):
            is_there = index < len(known) and known[index]
            out += "\r\n" if is_there else f"{lines[index]}{_TO_END_OF_LINE}\r\n"
        out += _TO_END_OF_SCREEN if len(lines) < len(before) else ""
        self._lines, self._size, self._cursor_is_hidden = lines, self._console.size, True
        self._send(out)

    def _rows(self) -> int:
        """How many rows of the screen the picture takes: a terminal that became narrower has folded its lines."""
        width = max(1, self._console.width)
        cells = (cell_len(Text.from_ansi(line).plain) for line in self._lines)
        return sum(max(1, -(-each // width)) for each in cells)

    @staticmethod
    def _up(rows: int) -> str:
        return f"\r\x1b[{rows}A" if rows else "\r"

    def _send(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


class Stray(io.TextIOBase):
    """Takes the place of a stream on the terminal: what others print to it is told line by line, not where the cursor
    happens to be."""

    def __init__(self, stream: TextIO, tell: Callable[[str], None]) -> None:
        self.rich_proxied_file = stream  # by this name rich finds the terminal
        self._tell, self._rest = tell, ""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute there
        return self.rich_proxied_file.encoding

    def isatty(self) -> bool:
        return self.rich_proxied_file.isatty()

    def fileno(self) -> int:
        return self.rich_proxied_file.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._tell(line)
        return len(text)

    def finish(self) -> None:
        """Tell what has no end of line."""
        if self._rest:
            self.write("\n")
