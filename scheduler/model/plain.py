"""JSON that was written by somebody else, made safe: bounded, valid Unicode, numbers that everything can carry.

Whatever crosses a seam goes through here once: lines of a trial's pipe, files in an attempt's folder, attributes of a
study. A user's code can write there too, and nothing it writes may end who reads it: a lone surrogate cannot be
encoded, an integer of 65 bits kills the Dask worker (msgpack), one of 4,301 digits whoever prints or parses it, and ten
thousand brackets whoever walks them. Never raises.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 16_000  # characters of one text: MySQL's TEXT holds 64 KiB, a traceback may be longer
MAX_KEY = 200
MAX_ENTRIES = 10_000  # of all lists and mappings together
MAX_CHARACTERS = 400_000  # of all texts together
MAX_DEPTH = 20
WIDEST = 2**63
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but line feed and tab


def plain(value: Any) -> Any:
    """Return the value as bounded JSON; what is no JSON becomes its text."""
    return _Plain().of(value, MAX_DEPTH)


def text(value: Any, limit: int = MAX_TEXT) -> str:
    """`str(value)` in valid Unicode, without control characters that a terminal obeys, and bounded: begin and end."""
    try:
        found = value if isinstance(value, str) else str(value)
    except Exception as error:
        found = f"<{type(value).__name__} that cannot be read: {type(error).__name__}>"
    # Half of a surrogate pair is how Python shows a byte that is no UTF-8, in a file's name say: nothing can encode it.
    valid = _cut(found, limit).encode("utf-8", "backslashreplace").decode()
    return _cut(_CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), valid), limit)


def _cut(found: str, limit: int) -> str:
    if len(found) <= limit:
        return found
    half = max(1, (limit - 5) // 2)
    return f"{found[:half]} ... {found[-half:]}"


def line(value: Any, limit: int = 500) -> str:
    """Return the text on one line; of what it has returned, the same again."""
    return _joined(text(_joined(text(value)), limit))  # a cut may leave spaces side by side


def _joined(found: str) -> str:
    return " ".join(found.split())


class _Plain:
    """One value, with what room is left for it."""

    def __init__(self) -> None:
        self.entries, self.characters = MAX_ENTRIES, MAX_CHARACTERS

    def of(self, value: Any, depth: int) -> Any:
        match value:
            case None | bool():
                return value
            case int():
                return whole(value)
            case float():
                return float(value) if math.isfinite(value) else None
            case Mapping() if depth:
                found: dict[str, Any] = {}
                for key, entry in value.items():
                    if self.entries <= 0:
                        found["..."] = f"{len(value) - len(found)} more"
                        break
                    self.entries -= 1
                    found[self.text(key, MAX_KEY)] = self.of(entry, depth - 1)
                return found
            case list() | tuple() | set() | frozenset() if depth:
                entries: list[Any] = []
                for entry in value:
                    if self.entries <= 0:
                        entries.append(f"... {len(value) - len(entries)} more")
                        break
                    self.entries -= 1
                    entries.append(self.of(entry, depth - 1))
                return entries
            case Mapping() | list() | tuple() | set() | frozenset():
                return "..."
        return self.text(value)

    def text(self, value: Any, limit: int = MAX_TEXT) -> str:
        found = text(value, max(10, min(limit, self.characters)))
        self.characters -= len(found)
        return found


def whole(value: int) -> int | float | str:
    """Return the integer if 64 bits hold it, else the nearest float, else how large it is."""
    if -WIDEST <= value < WIDEST:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return f"an integer of {int(value).bit_length()} bits"
