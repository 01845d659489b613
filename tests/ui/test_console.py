"""What people see: plain lines, the live tables, log lines, and a terminal that is left as it was found."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from scheduler.ui import console, log, picture
from scheduler.ui.snapshot import Eta, Snapshot, StudyLine, TrialLine, WorkerLine
from scheduler.units import GIB

ROOT = Path(__file__).resolve().parents[2]


def snapshot(done: int = 3, **extra: Any) -> Snapshot:
    """A batch in full swing."""
    return Snapshot(
        run="night",
        studies=(
            StudyLine(name="night_2M_h1", done=done, quota=50, running=2, best=0.4321),
            StudyLine(name="night_2B_h1", done=0, quota=50, waiting="waits for memory (needs 31.2 GiB)"),
        ),
        workers=(
            WorkerLine(
                address="tcp://a:1",
                host="mac",
                capacity_bytes=100 * GIB,
                reserved_bytes=80 * GIB,
                used_bytes=60 * GIB,
                slots=8,
                free_slots=6,
                pressure="elevated",
            ),
        ),
        trials=(
            TrialLine(
                attempt="night_2M_h1/7/1",
                worker="tcp://a:1",
                reserved_bytes=2 * GIB,
                used_bytes=GIB,
                running_s=125,
                epoch=4,
                epochs=50,
                value=0.6543,
            ),
        ),
        elapsed_s=7500,
        **extra,
    )


def drawn(shown: Snapshot, width: int = 120, height: int = 40) -> str:
    """The live view's picture as text."""
    text = io.StringIO()
    Console(file=text, width=width).print(picture.draw(shown, width, height))
    return text.getvalue()


# -- pictures --------------------------------------------------------------------------------------------------------


def test_the_live_view_keeps_the_four_numbers_of_memory_apart() -> None:
    """Capacity, reserved, used and headroom of each worker, and its pressure, stand side by side."""
    text = drawn(snapshot())
    line = next(line for line in text.splitlines() if line.startswith("mac"))
    assert line.split() == ["mac", "100", "GiB", "80.0", "GiB", "60.0", "GiB", "20.0", "GiB", "6/8", "elevated"]


def test_the_live_view_shows_studies_trials_and_the_key() -> None:
    """Progress of each study, why one waits, each running trial with epoch and loss, and how to stop."""
    text = drawn(snapshot())
    for words in ("3/50", "0.4321", "waits for memory (needs 31.2 GiB)", "2M_h1 #7", "4/50", "0.6543", "2m05s"):
        assert words in text
    assert "q: stop" in text
    assert "draining" in drawn(snapshot(draining=True))


def test_many_trials_are_cut_to_the_terminal_and_counted() -> None:
    """A hundred running trials do not push the rest off the screen."""
    many = snapshot()
    trials = many.trials * 100
    text = drawn(Snapshot(run="n", studies=many.studies, workers=many.workers, trials=trials), height=24)
    assert text.count("\n") <= 24
    assert "more" in text


def test_plain_output_is_a_line_per_change() -> None:
    """Without a terminal: a line at the start, when a trial has ended, and once a minute; no control characters."""
    now = [0.0]
    text = io.StringIO()
    view = console.View(text, clock=lambda: now[0], unix=lambda: 0.0)
    for at, done in ((0, 3), (1, 3), (2, 4), (30, 4), (63, 4)):
        now[0] = at
        view.update(snapshot(done))
    lines = text.getvalue().splitlines()
    assert len(lines) == 3
    assert re.match(r"\d\d:\d\d:\d\d ", lines[0]), "a line in a log file needs its time of day"
    assert lines[0][9:].startswith(
        "2h05m 3/100 trials done, 1 running, memory 80.0 GiB reserved of 100 GiB, 60.0 GiB used"
    )
    assert "\x1b" not in text.getvalue()


def test_a_reader_that_is_gone_does_not_end_the_batch() -> None:
    """A closed stderr (`2>&1 | head`) is survived."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        view = console.View(stream)
        view.line("nobody reads this")
        view.update(snapshot())
        stream.close = lambda: None  # type: ignore[method-assign]  # its own flush at close would raise
    assert isinstance(console.choose(io.StringIO()), console.View)


# -- log lines -------------------------------------------------------------------------------------------------------


def test_readable_lines_translate_units() -> None:
    """Bytes and seconds, which the journal keeps as they are, are in words for people."""
    lines: list[str] = []
    log.configure("info", lines.append)
    fields = {"reserved_bytes": 31 * GIB, "wait_s": 12.345, "reason": "needs memory", "attempt": "s/1/1"}
    log.get().info("attempt.launched", **fields)
    log.get().debug("attempt.progress")
    (line,) = lines
    assert line.endswith('attempt.launched reserved=31.0GiB wait=12.3s reason="needs memory" attempt=s/1/1')


def test_other_libraries_warnings_come_the_same_way() -> None:
    """A warning of the standard library's logging is a line in the view, not a print past it."""
    import logging

    lines: list[str] = []
    log.configure("info", lines.append)
    logging.getLogger("distributed.worker").warning("slow %s", "loop")
    logging.getLogger("distributed.worker").info("chatter")
    assert len(lines) == 1
    assert lines[0].endswith("WARNING distributed.worker slow loop")


# -- the terminal ----------------------------------------------------------------------------------------------------

HELPER = """
import fcntl, sys, termios, threading, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the pseudo-terminal becomes ours, as a shell's would
sys.path.insert(0, {root!r})
from scheduler.ui.keys import KeyReader
got = threading.Event()
def on_key(key):
    print("key", repr(key), flush=True)
    if key == "q":
        got.set()
with KeyReader(on_key):
    while termios.tcgetattr(0)[3] & termios.ICANON:
        time.sleep(0.01)
    print("ready", flush=True)
    if not got.wait(20):
        print("no key", flush=True)
    {ending}
print("done", flush=True)
"""


def in_terminal(ending: str) -> tuple[str, bool]:
    """Run the reader on a pseudo-terminal, press x and q; its output, and whether the terminal's mode is back."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        [sys.executable, "-c", HELPER.format(root=str(ROOT), ending=ending)],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.write(master, b"xq")
        out, _ = process.communicate(timeout=30)
        return out, termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize(
    "ending", ["pass", "raise RuntimeError", "sys.exit(3)", "import os, signal; signal.raise_signal(signal.SIGINT)"]
)
def test_keys_are_read_and_the_terminal_is_left_as_it_was(ending: str) -> None:
    """Single keys without Enter; the mode is restored after a normal end, an exception, an exit and Ctrl-C."""
    out, restored = in_terminal(ending)
    assert "key 'x'" in out
    assert "key 'q'" in out
    assert restored


def test_without_a_terminal_no_key_is_read() -> None:
    """A pipe as standard input is left alone."""
    from scheduler.ui.keys import KeyReader

    read, write = os.pipe()
    reader = KeyReader(lambda key: None, fd=read)
    assert reader.start() is False
    reader.stop()
    os.close(read)
    os.close(write)


def test_the_live_view_draws_on_a_terminal_and_lets_lines_pass_above() -> None:
    """Log lines and tables share the screen; stopping leaves the last lines and no picture."""
    text = io.StringIO()
    view = console.LiveView(Console(file=text, force_terminal=True, width=100, height=30))
    with view:
        view.start()
        view.update(snapshot())
        view.line("12:00:00 attempt.ended")
        deadline = time.monotonic() + 10
        while "2M_h1 #7" not in text.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "attempt.ended" in text.getvalue()
    assert "2M_h1 #7" in text.getvalue()


def test_a_person_sees_the_fields_that_matter() -> None:
    """The canonical line of the journal has twenty fields; on the terminal it is one line. Chatter is for debug."""
    lines: list[str] = []
    log.configure("info", lines.append)
    fields = {"attempt": "s/0/1", "reason": "completed", "peak_bytes": 2**30, "worker": "tcp://1", "params": {"a": 1}}
    log.show("attempt.ended", fields)
    log.show("attempt.progress", {"attempt": "s/0/1", "step": 1})
    assert len(lines) == 1
    assert lines[0].endswith("attempt.ended attempt=s/0/1 reason=completed peak=1.00GiB")


def test_what_says_nothing_new_is_left_to_the_journal() -> None:
    """A deferral is in the line of progress; that nothing was lost and that a complete trial completed goes unsaid."""
    lines: list[str] = []
    log.configure(sink=lines.append)
    log.show("trial.deferred", {"trial": "s/0", "reason": "slots"})
    log.show("study.closed", {"study": "s", "reason": "quota reached", "early": False})
    log.show("batch.ended", {"exit_code": 0, "reason": "done", "unwritten": 0})
    log.show("attempt.ended", {"attempt": "s/0/1", "reason": "completed", "detail": "completed"})
    log.show("study.closed", {"study": "s", "reason": "5 failures in a row", "early": True})
    assert [line.split(" ", 1)[1] for line in lines] == [
        'study.closed study=s reason="quota reached"',
        "batch.ended exit_code=0 reason=done",
        "attempt.ended attempt=s/0/1 reason=completed",
        'study.closed study=s reason="5 failures in a row" early=True',
    ]


def test_a_kill_stands_out_among_the_lines() -> None:
    """What the watchdog ended is a warning; any other end is not."""
    lines: list[str] = []
    log.configure(sink=lines.append)
    log.show(
        "attempt.ended", {"attempt": "s/0/1", "reason": "stalled", "detail": "no CPU", "kill": {"rule": "stalled"}}
    )
    log.show("attempt.ended", {"attempt": "s/1/1", "reason": "failed", "detail": "ValueError: x", "kill": None})
    assert [" WARNING " in line for line in lines] == [True, False]


def test_a_range_that_begins_within_a_minute_names_its_end_alone() -> None:
    """It would contradict itself otherwise: within a minute, or 1m to 4m."""
    assert picture.span(Eta(low_s=20, middle_s=50, high_s=240)) == " (up to 4m, 4 times in 5)"
    assert picture.span(Eta(low_s=90, middle_s=150, high_s=240)) == " (2m to 4m, 4 times in 5)"
    assert picture.span(Eta(low_s=5, middle_s=20, high_s=50)) == ""
