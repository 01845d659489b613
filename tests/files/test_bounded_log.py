"""The log that keeps its beginning and its end: exact bytes, and disks that take nothing."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scheduler.files.bounded_log import BoundedLog


def test_what_fits_is_kept_as_it_is(tmp_path: Path) -> None:
    """A log within its limit is appended to, byte for byte, its user's alone, and goes on where another one stopped."""
    path = tmp_path / "log"
    for words in (b"first\n", b"\xff second\n"):
        log = BoundedLog(path, limit_bytes=100)
        log.write(words)
        assert not log.flooded
        log.close()
    assert path.read_bytes() == b"first\n\xff second\n"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("seed", range(20))
def test_a_flood_keeps_head_and_tail_and_says_what_is_missing(tmp_path: Path, seed: int) -> None:
    """Whatever the pieces: never over the limit, whole lines, the first half, the last ones, and the bytes add up."""
    chance = random.Random(seed)
    path, limit, tail = tmp_path / "log", 40_000, 5_000
    log = BoundedLog(path, limit_bytes=limit, tail_bytes=tail)
    written = b"".join(b"line %d %s\n" % (n, b"x" * chance.randrange(200)) for n in range(4_000))
    left = written
    while left:
        part = left[: chance.choice([1_000, 7_777, 100_000, chance.randrange(1, 3_000)])]
        log.write(part)
        left = left[len(part) :]
        assert path.stat().st_size <= limit
    log.close()
    assert log.flooded
    head, missing, rest = re.split(
        rb"\n\.\.\. (\d+) bytes left out: a log is kept to 40000 bytes \.\.\.\n", path.read_bytes()
    )
    assert written.startswith(head) and limit // 2 - 300 < len(head) <= limit // 2 and head.endswith(b"\n")
    assert written.endswith(rest) and len(rest) >= tail - 300 and rest.startswith(b"line ")
    assert len(head) + int(missing) + len(rest) == len(written)


def test_one_endless_line_is_bounded_too(tmp_path: Path) -> None:
    """A progress bar never ends its line: the cut falls anywhere."""
    path = tmp_path / "log"
    log = BoundedLog(path, limit_bytes=40_000, tail_bytes=5_000)
    for _ in range(100):
        log.write(b"y" * 3_000)
    log.write(b"end")
    log.close()
    text = path.read_bytes()
    assert len(text) <= 40_000 and text.startswith(b"y" * 20_000 + b"\n...") and text.endswith(b"yend")


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process may grow past `limit` bytes: a disk that is full, for whoever runs this.

    Not a fixture: pytest tells a test's end before it tears its fixtures down, and its own output may be a longer file.
    """
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_log_and_nothing_else(tmp_path: Path) -> None:
    """No write raises; when there is room again the log says how much is missing, and goes on."""
    path = tmp_path / "log"
    log = BoundedLog(path)
    with small_files(10_000):
        for _ in range(30):
            log.write(b"z" * 999 + b"\n")
        assert path.stat().st_size == 10_000
        os.truncate(path, 1_000)
        log.write(b"again\n")
        log.close()
    assert path.read_bytes().endswith(b"z\n\n... 20000 bytes of log could not be written: File too large ...\nagain\n")


def test_a_folder_that_comes_later_is_found(tmp_path: Path) -> None:
    """A log that cannot be opened yet loses what is written until then, says so, and is opened by a later write."""
    path = tmp_path / "folder" / "log"
    log = BoundedLog(path)
    log.write(b"lost")
    path.parent.mkdir()
    log.write(b"kept\n")
    log.close()
    assert path.read_bytes() == b"\n... 4 bytes of log could not be written: No such file or directory ...\nkept\n"
