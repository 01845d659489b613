"""The launch fence: an attempt's folder belongs to whoever made its claim, and each attempt is started once.

Covers the claim file, and a folder that another run has left: on a host with a disk of its own the attempts of a run
stay behind when its folder is removed where the driver is, and the next run of that name numbers its attempts alike.
Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from scheduler.files.durable import create
from scheduler.host.registry import boot_id

NAME = "claim"
_one_at_a_time = threading.Lock()  # who has read that it is another run's must be the one to rename it


def claim(
    folder: Path,
    run_id: str,
    *,
    in_use: Callable[[Path], bool] = lambda folder: False,
    note: Callable[[str], None] = lambda text: None,
) -> bool:
    """Make the attempt's folder and claim it for this run: False when that was done before. Raises OSError.

    Dask may run a task twice (dask/distributed#6078); a second training start of one attempt must not happen. What
    another run left there is renamed, with all that is in it, and that is noted. in_use: whether a process works there;
    then EBUSY.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _one_at_a_time:
        other = _run_of(folder)
        if other is not None and other != run_id:
            if in_use(folder):
                raise OSError(errno.EBUSY, f"in use by another run ({other[:8]})", os.fspath(folder))
            note(f"{folder} was left by another run: it is now {_set_aside(folder, other)}")
            folder.mkdir(mode=0o700, exist_ok=True)
    return create(folder / NAME, f"{os.getpid()} {boot_id()} {run_id}\n")


def _run_of(folder: Path) -> str | None:
    """The run that claimed the folder; None when nobody did, or did not say (a torn claim, or one of a version that
    did not write it)."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        words = (folder / NAME).read_text().split()
        return words[2] if len(words) == 3 else None
    return None


def _set_aside(folder: Path, run: str) -> Path:
    endings = ("", *(f"-{number}" for number in range(2, 100)))
    targets = [folder.with_name(f"{folder.name}.of-{run[:8]}{ending}") for ending in endings]
    target = next(path for path in targets if not path.exists())
    return folder.rename(target)
