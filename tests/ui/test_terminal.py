"""The command on a real terminal: what its user sees at 80x24 and 200x50, and what the keys do."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.terminal import Terminal

pytestmark = pytest.mark.timeout(800)  # whole runs, on a machine that may be busy
ROOT = Path(__file__).resolve().parents[2]
OBJECTIVE = """
import os, time

def steady(trial):
    x = trial.suggest_float("x", 0, 1)
    for step in range(1, 4):
        time.sleep(0.3)
        trial.report(x, step)
    return x

def hangs(trial):
    x = trial.suggest_float("x", 0, 1)
    trial.report(x, 1)
    if trial.number == 1:
        time.sleep(3600)
    return x

def long(trial):
    x = trial.suggest_float("x", 0, 1)
    for step in range(1, 100_000):
        time.sleep(0.1)
        trial.report(x, step)
    return x
"""
# A stall in seconds instead of minutes.
FAST = {
    "HEADROOM_WATCHDOG_SAMPLE_S": "0.3",
    "HEADROOM_WATCHDOG_HOST_SAMPLE_S": "0.3",
    "HEADROOM_WATCHDOG_STALL_AFTER_S": "4",
    "HEADROOM_WATCHDOG_STALL_UNPROVEN_S": "4",
    "HEADROOM_WATCHDOG_STALL_BUCKET_S": "1",
    "HEADROOM_WATCHDOG_STALL_GRACE_S": "1",
    "HEADROOM_WATCHDOG_COOLDOWN_S": "1",
}


def start(folder: Path, function: str, columns: int, lines: int, *arguments: str, **environ: str) -> Terminal:
    """The command for one of the objectives above, on a terminal of that size."""
    (folder / "objective.py").write_text(OBJECTIVE)
    command = [sys.executable, "-m", "scheduler", "--objective", f"{folder}/objective.py:{function}"]
    command += ["--name", "run", "--runs-dir", str(folder / "runs"), "--dashboard", "off", *arguments]
    passed = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "LC_ALL", "LANG")}
    given = {**passed, "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", **environ}
    return Terminal(command, columns, lines, cwd=str(folder), environ=given)


def wrapped(terminal: Terminal) -> list[str]:
    """Lines that the terminal had to wrap; those after the live view are left whole on purpose, to be copied."""
    after = re.compile(r"results in /|headroom: stopped|\S*pytest-|/runs/|--")
    return [line for line in terminal.screen.wrapped if not after.search(line)]


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 50)])
def test_a_run_fits_its_terminal_and_q_drains_it(tmp_path: Path, columns: int, lines: int) -> None:
    """From the first line to the last nothing is wrapped by the terminal; `q` is answered at once, and the run ends."""
    with start(tmp_path, "long", columns, lines, "--trials", "8", "--slots", "2") as terminal:
        terminal.wait_for("run #0")
        terminal.wait(lambda: re.search(r"run #0 .* \d+/?\d* ", terminal.shown), "an epoch of trial 0")
        shown = terminal.shown
        for words in ("0/8 trials done", "ends: unknown until the first trials end", "memory", "q: stop"):
            assert words in shown, shown
        terminal.press("q")
        terminal.wait(lambda: "stopping" in terminal.shown or "draining" in terminal.shown, "an answer to q", 30)
        assert terminal.ended() == 130
        assert "to go on where it stopped" in terminal.text
        assert wrapped(terminal) == []


def test_a_finished_run_is_summed_up_and_foreseen(tmp_path: Path) -> None:
    """Once trials have ended the end is foreseen; ends are sentences; the results come last."""
    with start(tmp_path, "steady", 120, 40, "--trials", "30", "--slots", "2", "--memory", "200MiB") as terminal:
        seen = re.compile(r"ends: (in about \d|within a minute)")
        terminal.wait(lambda: seen.search(terminal.shown) or terminal.process.poll() is not None, "a forecast")
        assert seen.search(terminal.text), terminal.text
        assert terminal.ended() == 0
        assert re.search(r"trial 0 of run completed with 0\.\d+ after 3 epochs", terminal.text), terminal.text
        assert "study run is complete" in terminal.text
        assert "30/30" in terminal.text
        assert wrapped(terminal) == []


def test_a_kill_is_told_in_red_with_its_story(tmp_path: Path) -> None:
    """Who was ended, why, and where that is told in full; the file is there. --on-kill and --on-end are called."""
    hooks = [f"--on-kill=cat > {tmp_path}/kill", f"--on-end=cat > {tmp_path}/end; exit 7"]
    with start(tmp_path, "hangs", 80, 24, "--trials", "3", "--slots", "1", *hooks, **FAST) as terminal:
        terminal.wait_for("trial 1 of run was ended", 300)
        assert "red" in terminal.colours_of("trial 1 of run was ended")
        assert terminal.ended() in (0, 1)
        told = re.sub(r"\s+", "", terminal.text.replace("\n", ""))
        assert "trial1ofrunwasended:noCPUandnoprogressfor" in told
        story = re.search(r"story:(\S+?kill\.(?:json|txt))", told)
        assert story is not None, terminal.text
        assert (tmp_path / story[1]).exists()
        killed, end = (json.loads((tmp_path / name).read_text()) for name in ("kill", "end"))
        assert killed["text"].startswith("trial 1 of run was ended: no CPU")
        assert (killed["reason"], killed["attempt"]) == ("stalled", "run/1/1")
        assert (end["event"], end["run"], end["exit_code"]) == ("end", "run", terminal.process.returncode)
        assert "--on-end: exit status 7" in terminal.text
        assert wrapped(terminal) == []


def test_q_during_the_start_is_answered_at_once(tmp_path: Path) -> None:
    """Before any worker is there the key is heard; nothing is started, and the exit code says stopped by the user."""
    with start(tmp_path, "steady", 80, 24, "--trials", "3") as terminal:
        terminal.wait_for("starting the workers")
        terminal.press("q")
        terminal.wait(lambda: "stopping" in terminal.shown or terminal.process.poll() is not None, "an answer", 30)
        assert terminal.ended() == 130
        assert "Traceback" not in terminal.text


def test_no_colour_and_no_unicode_where_neither_is_wanted(tmp_path: Path) -> None:
    """NO_COLOR takes the colours away, a locale that is not UTF-8 all that is not ASCII."""
    environ = {"NO_COLOR": "1", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with start(tmp_path, "steady", 80, 24, "--trials", "3", "--slots", "1", **environ) as terminal:
        assert terminal.ended() == 0
        assert "3/3" in terminal.text
        assert re.search(rb"\x1b\[[0-9;]*3[0-7]m", terminal.raw) is None
        assert all(byte < 128 for byte in terminal.raw)
