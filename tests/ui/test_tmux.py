"""The command inside a real tmux, as over ssh: nothing wraps, nothing flickers, keys answer, a kill is red."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.tmux import TMUX, Tmux
from tests.ui.test_terminal import FAST, OBJECTIVE, ROOT

pytestmark = [
    pytest.mark.timeout(800),  # whole runs, on a machine that may be busy
    pytest.mark.skipif(TMUX is None, reason="no tmux on this machine"),
]
ERASES = (b"\x1b[2J", b"\x1b[3J", b"\x1b[J", b"\x1b[2K", b"\x1b[1J")
REFRESH = re.compile(rb"\x1b\[\d+A")


def start(folder: Path, function: str, columns: int, lines: int, *arguments: str, **environ: str) -> Tmux:
    """The command for one of the objectives, in a window of that size."""
    (folder / "objective.py").write_text(OBJECTIVE)
    command = [sys.executable, "-m", "scheduler", "--objective", f"{folder}/objective.py:{function}"]
    command += ["--name", "run", "--runs-dir", str(folder / "runs"), "--dashboard", "off", *arguments]
    passed = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "LC_ALL", "LANG")}
    given = {**passed, "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", **environ}
    return Tmux(command, columns, lines, folder=folder, environ=given)


def wrapped(tmux: Tmux) -> list[str]:
    """Lines that tmux had to wrap; those after the live view are left whole on purpose, to be copied."""
    return [line for line in tmux.wrapped if not re.match(r"results in /|report in /|headroom: stopped", line)]


def drawn_again(tmux: Tmux, times: int) -> bytes:
    """Wait for so many refreshes; what was sent meanwhile."""
    before = len(tmux.raw)
    tmux.wait(lambda: len(REFRESH.findall(tmux.raw[before:])) >= times, "the picture is drawn again")
    return tmux.raw[before:]


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 50)])
def test_a_run_is_drawn_without_flicker_and_q_drains_it(tmp_path: Path, columns: int, lines: int) -> None:
    """Of a refresh only what changed is sent, and nothing is erased for it; another size leaves one picture, too."""
    with start(tmp_path, "long", columns, lines, "--trials", "8", "--slots", "2") as tmux:
        tmux.wait_for("run #0")
        tmux.wait(lambda: re.search(r"run #0 .* \d+ ", tmux.shown), "steps of trial 0")
        drawn = drawn_again(tmux, 8)
        assert not any(erase in drawn for erase in ERASES), drawn
        assert len(drawn) / len(REFRESH.findall(drawn)) < columns * lines / 4, drawn
        for size in ((columns - 15, lines - 3), (columns, lines)):
            tmux.resize(*size)
            drawn_again(tmux, 2)
            tmux.wait(lambda: tmux.shown.count("q: stop") == 1, "one picture", 20)
        for words in ("0/8 trials done", "ends: unknown until the first trials end", "memory", "q: stop"):
            assert tmux.shown.count(words) == 1, tmux.shown
        tmux.press("q")
        tmux.wait(lambda: "stopping" in tmux.shown or "draining" in tmux.shown, "an answer to q", 30)
        assert tmux.ended() == 130
        assert "to go on where it stopped" in re.sub(r"\s+", " ", tmux.text)
        assert wrapped(tmux) == []
        assert tmux.raw.count(b"\x1b[?25h") == tmux.raw.count(b"\x1b[?25l") == 1  # the cursor is back


def test_q_is_answered_during_the_start(tmp_path: Path) -> None:
    """Before any worker is there: said at once, and nothing is started."""
    with start(tmp_path, "steady", 80, 24, "--trials", "3") as tmux:
        tmux.wait_for("starting the workers")
        tmux.press("q")
        tmux.wait(lambda: "stopping" in tmux.shown or tmux.code is not None, "an answer", 30)
        assert tmux.ended() == 130
        assert "attempt.launched" not in tmux.text


def test_a_kill_is_red(tmp_path: Path) -> None:
    """The sentence says who, why and where it is told in full, bold and red, and no line of it is wrapped by tmux."""
    with start(tmp_path, "hangs", 80, 24, "--trials", "3", "--slots", "1", **FAST) as tmux:
        tmux.wait_for("trial 1 of run was ended", 300)
        assert {"1", "31"} <= tmux.styles_of("trial 1 of run was ended")
        assert tmux.ended() in (0, 1)
        assert "trial1ofrunwasended:noCPUandnoprogressfor" in re.sub(r"\s+", "", tmux.text)
        assert wrapped(tmux) == []
