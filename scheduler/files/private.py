"""Files and folders that are this user's and nobody else's, also below a folder where everybody may write.

Covers making and opening them so that a link which somebody put in their place is not followed. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from scheduler.model import UsageError

FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


def opener(path: str, flags: int) -> int:
    """For `open`: a file that it creates is its user's alone, and a link in its place is not followed."""
    return os.open(path, flags | FLAGS, 0o600)


@contextlib.contextmanager
def own_folder(name: str, within: int | None = None, called: str | None = None) -> Iterator[int]:
    """Open a folder of mode 0700, made where it is not there. within: descriptor of the folder that `name` is in.

    A name is never followed, and what was opened is what is judged. called: its path, for errors. Raises UsageError
    when it is, or holds, somebody else's; OSError naming it, e.g. ENOTDIR for a link.
    """
    called = called or name
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode=0o700, dir_fd=within)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | FLAGS, dir_fd=within)
    except OSError as error:
        error.filename = called
        raise
    try:
        info = os.fstat(fd)
        _check_owner(called, info)
        if stat.S_IMODE(info.st_mode) & 0o077:
            os.fchmod(fd, 0o700)
            if info.st_mode & 0o022:  # others could write here until now
                for entry in os.listdir(fd):
                    _check_owner(f"{called}/{entry}", os.stat(entry, dir_fd=fd, follow_symlinks=False))
        yield fd
    finally:
        os.close(fd)


def _check_owner(path: str, info: os.stat_result) -> None:
    if info.st_uid != os.geteuid():
        raise UsageError(
            f"{path} belongs to user {info.st_uid}, not to you ({os.geteuid()}): "
            "set HEADROOM_HOST_DIR to a folder of your own"
        )
