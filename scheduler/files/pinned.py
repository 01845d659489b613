"""Is what lies at a path still the file or folder that we opened there?

Somebody may remove or move a run's folder or database under it: the kernel lets us go on writing into what nobody will
ever find. Covers noticing and saying what became of it. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

LONGEST_PATH = 1024  # of macOS's F_GETPATH


class Pinned:
    """Keeps a file or folder open, so that no other can get its number. Raises OSError when it is not there.

    Not to be closed while SQLite in this process has the same file open: that would drop its locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # A file system that does not keep its numbers steady (some network ones) cannot be asked.
        self._is_steady = self._is_here()

    def lost(self) -> str | None:
        """Return what became of it: "was removed", "was moved to …", "was replaced by another"; None while it is
        here."""
        if not self._is_steady or self._is_here():
            return None
        now = self._path_now()
        if now is not None:
            return f"was moved to {now}"
        return "was replaced by another" if self.path.exists() else "was removed"

    def close(self) -> None:
        os.close(self._fd)

    def _is_here(self) -> bool:
        mine = os.fstat(self._fd)
        try:
            here = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a mount that does not answer now says nothing of what is on it
            return True
        return (mine.st_dev, mine.st_ino) == (here.st_dev, here.st_ino)

    def _path_now(self) -> Path | None:
        """Where it is now, None when that is nowhere or cannot be told."""
        found = ""
        with contextlib.suppress(OSError):
            if hasattr(fcntl, "F_GETPATH"):  # macOS
                found = os.fsdecode(fcntl.fcntl(self._fd, fcntl.F_GETPATH, bytes(LONGEST_PATH)).rstrip(b"\0"))
            else:
                found = os.readlink(f"/proc/self/fd/{self._fd}")
        with contextlib.suppress(OSError):
            if found and os.path.samestat(os.stat(found), os.fstat(self._fd)):
                return Path(found)
        return None
