"""What a user's function returns or raises, as bounded JSON: so that nothing it says can break whoever reads it.

Covers any object: numbers of other libraries, texts that are no Unicode, what contains itself, what is far too large.
Never raises. What whoever reads it must check again (anybody can write to a pipe) is theirs: `scheduler.model.plain`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

MAX_TEXT = 16_000  # characters of one text: a database's column holds 64 KiB
MAX_KEY = 200
MAX_ENTRIES = 10_000  # of all lists and mappings together
MAX_CHARACTERS = 400_000  # of all texts together
MAX_DEPTH = 16
WIDEST = 2**63  # msgpack has 64 bits and dies of more; Python itself refuses to print 4,300 digits and more
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but line feed and tab


def plain(value: Any) -> Any:
    """Return the value as JSON has it: numbers of other libraries become Python's, NaN becomes None, the rest text."""
    try:
        return _Plain().of(value, MAX_DEPTH)
    except Exception as error:  # an object whose own methods raise
        return f"<{type(value).__name__} that cannot be read: {type(error).__name__}>"


def text(value: Any, limit: int = MAX_TEXT) -> str:
    """`str(value)` in valid Unicode, without control characters that a terminal obeys, and bounded: begin and end."""
    try:
        found = value if isinstance(value, str) else str(value)
    except Exception as error:
        found = f"<{type(value).__name__} that cannot be read: {type(error).__name__}>"
    # Half of a surrogate pair is how Python shows a byte that is no UTF-8, in a file's name say: nothing can encode it.
    valid = _cut(found, limit).encode("utf-8", "backslashreplace").decode()
    return _cut(_CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), valid), limit)


def one_line(said: str, limit: int = 500) -> str:
    """Return the text on one line, shortened."""
    return text(" ".join(said.split()), limit)


def _cut(found: str, limit: int) -> str:
    if len(found) <= limit:
        return found
    half = max(1, (limit - 5) // 2)
    return f"{found[:half]} ... {found[-half:]}"


class _Plain:
    """One value's way to JSON, with what room is left for it."""

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
            case str() | bytes():
                return self.text(value)
        if depth == 0:
            return "..."
        match value:
            case Mapping():
                return self.mapping(value, depth)
            case list() | tuple() | set() | frozenset():
                return self.listed(value, len(value), depth)
            case _ if hasattr(value, "tolist"):  # numpy and torch
                shape = tuple(getattr(value, "shape", ()))
                if math.prod(shape) > self.entries:
                    return self.text(f"{type(value).__name__} of shape {shape}")
                return self.of(value.tolist(), depth - 1)
        return self.text(value)

    def text(self, value: Any, limit: int = MAX_TEXT) -> str:
        found = text(value, max(10, min(limit, self.characters)))
        self.characters -= len(found)
        return found

    def mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, entry in value.items():
            if self.entries <= 0:
                found["..."] = f"{len(value) - len(found)} more"
                break
            self.entries -= 1
            found[self.text(key, MAX_KEY)] = self.of(entry, depth - 1)
        return found

    def listed(self, value: Iterable[Any], size: int, depth: int) -> list[Any]:
        found: list[Any] = []
        for entry in value:
            if self.entries <= 0:
                found.append(f"... {size - len(found)} more")
                break
            self.entries -= 1
            found.append(self.of(entry, depth - 1))
        return found


def whole(value: int) -> int | float | str:
    """Return the integer if 64 bits hold it, else the nearest float, else how large it is."""
    if -WIDEST <= value < WIDEST:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return f"an integer of {int(value).bit_length()} bits"
