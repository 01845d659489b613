"""Sizes and durations as people write and read them: `parse_size("12GiB")`, `gib(bytes)`, `parse_duration("12h")`.

Covers text <-> bytes, text -> seconds. Percentages of a host's memory are not sizes: see
`policy.admission.parse_memory_budget`.
"""

from __future__ import annotations

import re

from scheduler.model import UsageError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
}


def parse_size(text: str | int, name: str = "size") -> int:
    """Bytes of "100GiB", "12 GB", "512MiB", "1.5gib" or a plain number of bytes.

    Raises UsageError (one line, starting with `name`) on anything else. "100G" is refused: it means 2^30 to some
    and 10^9 to others, and the difference at this size is a whole trial.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(text))
    if match is None:
        raise UsageError(f"{name} {text!r} is not a size: write e.g. 100GiB, 12GB or 512MiB")
    number, unit = match[1], match[2].lower()
    if unit in ("k", "m", "g", "t"):
        big = unit.upper()
        raise UsageError(f"{name} {text!r} is ambiguous: write {number}{big}iB (binary) or {number}{big}B (decimal)")
    if unit not in _UNITS:
        raise UsageError(f"{name} {text!r} has the unknown unit {match[2]!r}: use MiB, GiB, TiB, MB, GB or TB")
    if "." in number:
        return round(float(number) * _UNITS[unit])
    return int(number) * _UNITS[unit]


_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}


def parse_duration(text: str | float, name: str = "duration") -> float:
    """Seconds of "90s", "30m", "12h", "1.5d" or a plain number of seconds. Raises UsageError, as `parse_size` does."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].lower() not in _SECONDS:
        raise UsageError(f"{name} {text!r} is not a duration: write e.g. 90s, 30m, 12h or 2d")
    seconds = float(match[1]) * _SECONDS[match[2].lower()]
    if seconds <= 0:
        raise UsageError(f"{name} {text!r} leaves no time: write e.g. 90s, 30m, 12h or 2d")
    return seconds


def duration(seconds: float, *, wide: bool = False) -> str:
    """Say how long, in two units at most: "45s", "12m03s", "2h05m", "3d04h"; wide: "45 s", "12 min 03 s"."""
    whole, gap, minute = max(0, int(seconds)), " " if wide else "", "min" if wide else "m"
    for unit, size, inner, inner_size in (("d", 86400, "h", 3600), ("h", 3600, minute, 60), (minute, 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{gap}{unit}{gap}{whole % size // inner_size:02d}{gap}{inner}"
    return f"{whole}{gap}s"


def gib(size_bytes: int) -> str:
    """Three significant places with a binary unit: "31.2 GiB", "512 MiB", "0 B"."""
    sign, size = ("-" if size_bytes < 0 else ""), abs(size_bytes)
    for unit, scale in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= scale:
            value = size / scale
            places = 2 if value < 10 else 1 if value < 100 else 0
            return f"{sign}{value:.{places}f} {unit}"
    return f"{sign}{size} B"
