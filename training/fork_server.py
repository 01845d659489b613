"""The fork server: `python -m training.fork_server` imports what trials need, once, and forks each trial's process.

Covers the server's side: what it imports, whether it may fork at all, and what a forked process has to have for its
own. What such a process does then is `training.trial`, to the letter; who asks for one is the agent
(`scheduler.worker.fork_server`), through a socket on stdin: a request with three descriptors (the process's stdin,
stdout and stderr), an answer with its pid. Linux only.

A forked process is the agent's own child, not the server's: the server forks twice and the one between ends at once,
so that the kernel gives the orphan to the agent, which has asked to be given them (a "subreaper"). So whoever waits for
a trial learns of its end from the kernel, and a server that dies takes nothing with it.

It forks only while it is one thread without CUDA: of several threads only the one that forks is in the child, and the
locks of the others stay locked there; a CUDA that was initialised is unusable in it. Whatever was imported may not have
left a file or a connection open either: its position would be shared. End of file on the socket, or the death of the
agent (PR_SET_PDEATHSIG), ends the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from typing import Any

from training import pipes, trial
from training.memory import anonymous_bytes
from training.processes import ORPHANED, leave_with

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # <linux/prctl.h>
NAME, TRIAL_NAME = b"fork-server", b"trial"  # what `top` and `ps -o comm` show; their command line is the same
CUDA_LIBRARY = b"/libcuda.so"  # the driver's, loaded by the first call that needs a device
REQUEST_BYTES = 4096
MADV_COLLAPSE = 25  # <linux/mman.h>
HUGE_PAGE_BYTES = 2**21  # x86-64's; elsewhere the kernel refuses or rounds


def main(arguments: Sequence[str]) -> int | None:
    """Serve until nobody asks any more; None in a forked process, whose descriptors are in place.

    arguments: `--parent=PID`, whoever starts it, and what `training.trial` takes.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NAME, NAME)
    if any(each.startswith("--parent=") and int(each.partition("=")[2]) != os.getppid() for each in arguments):
        return ORPHANED  # it died before it could be said that its death is ours
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=pipes.private_stdin())
    before = open_files()
    trial.preload(arguments)
    end_library_threads()
    gc.collect()
    gc.freeze()  # a collection in a child would write to the head of every object, and so copy every page
    use_huge_pages()
    why = unfit()
    if why is None and (left := open_files() - before):
        why = f"what is imported has left {len(left)} files or connections open"
    control.send(json.dumps({"unfit": why, "shared_bytes": anonymous_bytes()}).encode())
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
        if not request:
            return 0
        answer: dict[str, Any] = {"unfit": unfit()}
        if answer["unfit"] is None:
            sys.stdout.flush()
            sys.stderr.flush()
            try:
                child = fork_orphan()
            except OSError as error:
                answer = {"errno": error.errno}
            else:
                if child == 0:
                    control.close()
                    become_trial(descriptors)
                    return None
                answer["pid"] = child
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(json.dumps(answer).encode())


def unfit() -> str | None:
    """Why no process may be forked off this one, on one line; None when one may."""
    if len(threads := os.listdir("/proc/self/task")) > 1:
        return f"what is imported has started {len(threads) - 1} threads: {', '.join(_thread_names(threads))}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "what is imported has initialised CUDA"
    with open("/proc/self/maps", "rb") as maps:
        if CUDA_LIBRARY in maps.read():
            return "what is imported has loaded the CUDA driver"
    return None


def _thread_names(threads: Sequence[str]) -> list[str]:
    names = set()
    for thread in threads:
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/comm", encoding="utf-8") as name:
            names.add(name.read().strip())
    return sorted(names - {NAME.decode()}) or ["not named"]


def open_files() -> set[tuple[int, int]]:
    """Return what is open here and has a position or a peer: all but devices, which have neither."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself is closed again
            status = os.fstat(int(number))
            if not stat.S_ISCHR(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                found.add((status.st_dev, status.st_ino))
    return found


def end_library_threads() -> None:
    """Have OpenBLAS end its threads: it does so before every fork, and makes them again where it needs them.

    It starts them when numpy is imported, wherever more than one thread is allowed.
    """
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def use_huge_pages() -> None:
    """Have the kernel put what was imported into pages of 2 MiB (Linux 6.1 and later; elsewhere it stays as it is).

    A fork copies an entry for each page, and an end takes it away again: with torch a process forked twice, used a
    little and ended took 14 ms of CPU instead of 27. A page that is written to is copied 4 KiB at a time all the same.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        regions = [line.split() for line in maps]
    for where, permissions, _, _, inode, *_ in regions:
        first, last = (int(end, 16) for end in where.split("-"))
        first, last = -(-first // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, last // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if permissions == "rw-p" and inode == "0" and first < last:
            madvise(first, last - first, MADV_COLLAPSE)


def fork_orphan() -> int | None:
    """Fork a process that is no child of ours but of whoever adopts our orphans: its pid, 0 in it. Raises OSError.

    The one between has been waited for when this returns, so the adoption is over; None when somebody has killed it.
    """
    reading, writing = os.pipe()
    try:
        between = os.fork()
    except OSError:
        os.close(reading)
        os.close(writing)
        raise
    if between == 0:
        os.close(reading)
        return _fork_and_end(writing)
    os.close(writing)
    said = os.read(reading, 32)
    os.close(reading)
    os.waitpid(between, 0)
    if not said:
        return None
    if (found := int(said)) < 0:
        raise OSError(-found, os.strerror(-found))
    return found


def _fork_and_end(writing: int) -> int:
    """Return 0 in a forked process; this one writes its pid, or minus the errno, and ends."""
    try:
        found = os.fork()
        if found == 0:
            os.close(writing)
            return 0
    except OSError as error:
        found = -(error.errno or errno.EAGAIN)
    os.write(writing, b"%d" % found)
    os._exit(0)


def become_trial(descriptors: Sequence[int]) -> None:
    """Give a forked process what it must not share: a session, stdin, stdout and stderr, a name, random numbers."""
    os.setsid()
    for wanted, descriptor in enumerate(descriptors):
        os.dup2(descriptor, wanted)
        os.close(descriptor)
    prctl(PR_SET_NAME, TRIAL_NAME)
    sys.argv[1:] = []
    # Python seeds its own again in a forked process, and a torch that nobody has seeded begins with the same numbers in
    # every process; numpy would go on with the server's.
    if (random := sys.modules.get("numpy.random")) is not None:
        random.seed()


def prctl(option: int, value: Any) -> None:
    """Set an attribute of this process; see prctl(2)."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    if (status := main(sys.argv[1:])) is not None:
        sys.exit(status)
    leave_with(trial.run_forked)
