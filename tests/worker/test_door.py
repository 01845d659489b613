"""When a host cannot start anything: it says why in words, and opens again only after every probe has succeeded."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.model import HeadroomError
from scheduler.worker import door
from tests.waiting import wait_until


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at once, again and again."""
    monkeypatch.setattr(door, "FIRST_LOOK_S", 0.0)
    monkeypatch.setattr(door, "LONGEST_WAIT_S", 0.0)
    monkeypatch.setattr(door, "LARGEST_SHARE", 1e9)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB and 30 inodes."""
    path = tmp_path / "disk"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m,nr_inodes=30", "tmpfs"]
    if subprocess.run(["mount", *options, str(path)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=False)


def shown(found: door.Door) -> str | None:
    """Why it is closed now; a type checker takes an attribute for the same as a line before."""
    return found.reason


def settled(found: door.Door, reason: str | None) -> None:
    """Wait until it has looked and come to this."""

    def looked() -> bool:
        found.look()
        return found.reason == reason

    wait_until(looked, f"the reason {reason!r}, not {found.reason!r}")


def test_it_opens_when_every_probe_succeeds(quick: None) -> None:
    """Whatever else fails on the way becomes the reason; the probe of one failure is asked until it is over."""
    broken: list[Exception] = [OSError(errno.EAGAIN, "x"), HeadroomError("no torch"), RuntimeError("can't start")]

    def always() -> None:
        if broken:
            raise broken[0]

    def once() -> None:
        if extra:
            raise OSError(errno.EROFS, "x", "/runs")

    extra = [1]
    found = door.Door(always)
    found.look()
    assert shown(found) is None
    found.close("first", once)
    assert shown(found) == "first"
    for words in ("no process to be had (Resource temporarily unavailable)", "no torch", "no process to be had (can't"):
        settled(found, next(w for w in [words, f"{words} start)"] if w == door.words(broken[0])))
        broken.pop(0)
    settled(found, "file system is read-only: /runs")
    extra.clear()
    settled(found, None)
    extra.append(1)
    found.close("second")
    settled(found, None)  # the probe of the first failure is no longer asked


def test_what_fails_while_it_looks_is_looked_at_too(quick: None) -> None:
    """A probe that began before a failure says nothing about it: it stays closed until the next one has succeeded."""
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait(30)

    found = door.Door(slow)
    found.close("first")
    found.look()
    assert begun.wait(30)
    found.close("second")
    go_on.set()
    wait_until(lambda: not found._looking, "the look is over")
    assert found.reason == "second"
    settled(found, None)


def test_looking_takes_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a probe that took seconds the next one waits ten times as long."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    looked: list[float] = []

    def slow() -> None:
        looked.append(now[0])
        now[0] += 6.0
        raise HeadroomError("cannot import")

    found = door.Door()
    found.close("first", slow)
    monkeypatch.setattr("threading.Thread.start", lambda self: self.run())
    for _ in range(200):
        now[0] += 1.0
        found.look()
    assert len(looked) == 4, looked


def test_a_thread_that_is_not_to_be_had_keeps_it_closed(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a thread nothing can be probed, and nothing could be started."""

    def none(self: object) -> None:
        raise RuntimeError("can't start new thread")

    found = door.Door()
    found.close("first")
    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", none)
        found.look()
    assert found.reason == "no process to be had (can't start new thread)"
    settled(found, None)


def test_folders_are_probed_by_writing_to_them(small_disk: Path) -> None:
    """Room for a file and an inode each: else the word is what is short, with the path; nothing is left behind."""
    probe = door.folders([small_disk / "runs"])
    probe()
    assert list((small_disk / "runs").iterdir()) == []
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (2**20 - 8 * 4096))
    assert reason(probe) == f"disk full: {small_disk / 'runs'}"
    filler.unlink()
    taken = [small_disk / str(number) for number in range(40)]
    with pytest.raises(OSError, match="No space"):
        touch(taken)
    assert reason(probe) == f"no inodes left: {small_disk / 'runs'}"
    for path in taken:
        path.unlink(missing_ok=True)
    probe()
    (small_disk / "file").touch()
    assert reason(door.folders([small_disk / "file" / "runs"])) == f"no folder: {small_disk / 'file' / 'runs'}"


def touch(paths: list[Path]) -> None:
    """Make files of these names."""
    for path in paths:
        path.touch()


def reason(probe: door.Probe) -> str:
    """Why the probe fails."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - whichever
        probe()
    return door.words(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EACCES, "x", "/a"), "folder not writable: /a"),
        (OSError(errno.ENOENT, "x", "/a"), "folder gone: /a"),
        (OSError(errno.EDQUOT, "x", "/a"), "disk quota reached: /a"),
        (OSError(errno.EIO, "I/O error", "/a"), "I/O error: /a"),
        (OSError("odd"), "odd"),
        (HeadroomError("two\nlines"), "two lines"),
        (ValueError(), "ValueError"),
    ],
)
def test_words(error: Exception, words: str) -> None:
    """What is short and where, on one line."""
    assert door.words(error) == words


def test_naming_gives_an_error_its_folder() -> None:
    """Whatever file it was about: a person can do something about the folder."""
    with pytest.raises(FileNotFoundError) as caught, door.naming(Path("/runs")):
        os.stat("/does/not/exist")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "/runs")
