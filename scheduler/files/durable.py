"""Files that are read while they are written, or after a power cut: whole, or not there. Also the end of a log.

A file is written beside its place, then renamed into it; `durable` also forces it, and its name, to the disk. Every
file is this user's alone (`files.private`). Covers neither appending (the journal, the registry's record of kills) nor
locking. Standard library only. `training` has a writer of its own: it may not import from here.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import Any

from scheduler.files.private import opener

TAIL_BYTES = 4096

Path = str | os.PathLike[str]


def write(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file's content: a reader sees the old text or the new one, never a part. Raises OSError.

    durable: it is on the disk when this returns, under its name.
    """
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", opener=opener) as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk a left-over file would make things worse
            os.unlink(temporary)
        raise
    if durable:
        sync_folder(os.path.dirname(path) or ".")


def write_json(path: Path, data: Any, *, durable: bool = False) -> None:
    """`write` for a JSON value; what JSON does not know is written as its text."""
    write(path, json.dumps(data, default=str), durable=durable)


def create(path: Path, text: str) -> bool:
    """Make a file that is not there yet and force it to the disk; False when it is there. Raises OSError."""
    path = os.fspath(path)
    try:
        with open(path, "x", encoding="utf-8", opener=opener) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    sync_folder(os.path.dirname(path) or ".")
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file, None when it is missing, unreadable or not an object."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk; does nothing where folders cannot be opened or synced."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def tail(path: Path, size: int = TAIL_BYTES) -> str:
    """Read the last bytes of a file as text; empty when it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
