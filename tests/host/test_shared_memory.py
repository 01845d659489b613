"""Memory that no RSS shows: memfd and tmpfs files are counted for who fills them, and for nobody else. Linux."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scheduler.host import vitals
from tests.waiting import wait_until

MIB = 2**20
SIZE = 96 * MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not os.path.isdir("/dev/shm"), reason="needs /dev/shm")


@pytest.fixture
def name() -> Iterator[Path]:
    """A name of our own on the tmpfs."""
    path = Path("/dev/shm") / f"headroom-test-{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def running(script: str, path: Path | None = None) -> Iterator[tuple[int, float, Callable[[], None]]]:
    """A process in a session of its own that says `ok` when it is ready: pid, start, and what lets it go on."""
    words = [
        sys.executable,
        "-S",
        "-c",
        f"import os, sys, mmap\nsize = {SIZE}\npath = sys.argv[1]\n{script}",
        str(path),
    ]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, bufsize=1
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == "ok\n"
        start = vitals.start_time(process.pid)
        assert start is not None
        yield process.pid, start, lambda: go_on(process)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def go_on(process: subprocess.Popen[str]) -> None:
    """Give it the line that it waits for."""
    assert process.stdin is not None
    process.stdin.write("\n")


READY = "print('ok', flush=True); sys.stdin.readline()\n"
MEMFD = "fd = os.memfd_create('x')\nfor _ in range(size >> 20): os.write(fd, bytes(1 << 20))\n"


def held(*ones: tuple[int, float, Callable[[], None]]) -> list[int]:
    """Footprints of these trees, looked at together."""
    found = vitals.sample_trees({f"t{i}": (one[0], one[1], False, ()) for i, one in enumerate(ones)})
    return [sample.footprint_bytes or 0 for sample in found.values() if sample is not None]


def test_memfd_that_is_only_written_counts() -> None:
    """Its pages are mapped nowhere, so RSS does not show them; the footprint does."""
    with running(MEMFD + READY) as one:
        sample = vitals.sample_tree(one[0], one[1])
        assert sample is not None and sample.footprint_bytes is not None
        assert SIZE <= sample.shared_bytes < SIZE + 8 * MIB and sample.lasting_bytes == 0
        assert SIZE < sample.footprint_bytes < SIZE + 60 * MIB


def test_mapped_and_touched_memory_is_not_counted_twice() -> None:
    """A memfd that is mapped and touched is in RssShmem already."""
    touch = MEMFD + "m = mmap.mmap(fd, size)\nfor i in range(0, size, 4096): m[i] = 1\n"
    with running(touch + READY) as one:
        assert SIZE < held(one)[0] < SIZE + 60 * MIB


def open_files(pid: int) -> list[str]:
    """What its descriptors name; one that is closed while we look is none of them."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return found


def test_file_on_a_tmpfs_counts_while_its_name_is_there(name: Path) -> None:
    """Written and closed again: it was seen open, so it stays with who wrote it, until it is unlinked."""
    script = "f = open(path, 'wb')\nfor _ in range(size >> 20): f.write(bytes(1 << 20))\nf.flush()\n" + READY
    with running(script + "f.close()\n" + READY, name) as one:
        sample = vitals.sample_tree(one[0], one[1])
        assert sample is not None and sample.lasting_bytes >= SIZE
        assert held(one)[0] > SIZE
        one[2]()
        wait_until(lambda: str(name) not in open_files(one[0]), "it is closed")
        assert held(one)[0] > SIZE
        name.unlink()
        assert held(one)[0] < SIZE


def test_file_that_is_only_read_or_was_there_before_is_not_its_doing(name: Path) -> None:
    """Data that somebody put on the tmpfs belongs to no trial, opened for reading or for writing."""
    with open(name, "wb") as file:
        file.writelines(bytes(MIB) for _ in range(SIZE // MIB))
    os.utime(name, (1e9, 1e9))
    with running("f = open(path, 'rb')\nf.read(10)\n" + READY, name) as one:
        assert held(one)[0] < SIZE
    with running("f = open(path, 'r+b')\n" + READY, name) as one:
        assert held(one)[0] < SIZE
    with running(
        "f = open(path, 'r+b')\n" + READY + f"f.seek({SIZE})\nf.write(bytes(size))\nf.flush()\n" + READY, name
    ) as one:
        before = held(one)[0]
        one[2]()
        wait_until(lambda: name.stat().st_size == 2 * SIZE, "it has grown")
        assert SIZE <= held(one)[0] - before < 2 * SIZE


def test_shared_by_two_is_split_and_a_parent_is_no_second_holder(name: Path) -> None:
    """Two trials that fill one file answer for half of it each; the worker above a trial takes nothing off it."""
    script = "f = open(path, 'ab')\nfor _ in range(size >> 21): f.write(bytes(1 << 20))\nf.flush()\n" + READY
    with running(script, name) as one, running(script, name) as two:
        first, second = held(one, two)
        assert SIZE // 2 < first < SIZE and SIZE // 2 < second < SIZE
        own = vitals.start_time(os.getpid())
        assert own is not None
        wanted = {"": (os.getpid(), own), "a": one[:2], "b": two[:2]}
        found = vitals.sample_trees({key: (pid, start, False, ()) for key, (pid, start) in wanted.items()})
        assert found["a"] is not None and found["a"].shared_bytes >= SIZE // 2
        assert found[""] is not None and found[""].shared_bytes >= SIZE
