"""The user's commands of a run: what they are told, and that nothing they do concerns the run."""

from __future__ import annotations

import json
import time
from pathlib import Path

from scheduler.driver.hooks import MOST_AT_ONCE, Hooks
from tests.waiting import wait_until


def hooks(notes: list[str], *, limit_s: float = 30.0, **commands: str | None) -> Hooks:
    """Hooks of a run `night` in /runs/night."""
    given: dict[str, str | None] = {"on_kill": None, "on_end": None, **commands}
    return Hooks(
        on_kill=given["on_kill"],
        on_end=given["on_end"],
        run="night",
        folder="/runs/night",
        note=notes.append,
        limit_s=limit_s,
    )


def test_a_command_is_told_in_its_environment_and_on_its_input(tmp_path: Path) -> None:
    """What happened as HOOK_* and as one JSON object; quotes, a shell's words and NULs in it are no danger."""
    notes: list[str] = []
    words = '"$HOOK_EVENT" "$HOOK_TEXT" "$HOOK_RULE"'
    command = f'cat > {tmp_path}/told.json; printf "%s|%s|%s" {words} > {tmp_path}/words'
    called = hooks(notes, on_kill=command)
    text = 'trial 17 of "20M_h3" was ended; $(touch /tmp/never)'
    called.killed(text, {"rule": "stalled\0", "evidence": {"quiet_s": 600.0}, "attempt": "s/17/1"})
    called.ended("over", {})
    assert notes == []
    assert (tmp_path / "words").read_text() == rf"kill|{text}|stalled\x00"
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["run"] == "night" and told["evidence"] == {"quiet_s": 600.0} and told["attempt"] == "s/17/1"


def test_a_command_that_fails_is_a_note() -> None:
    """With its status and the last thing it said; one that is not there likewise."""
    notes: list[str] = []
    called = hooks(notes, on_end="echo mail server is away >&2; exit 3")
    called.ended("over", {"exit_code": 0})
    hooks(notes, on_end="there-is-no-such-command").ended("over", {})
    assert notes[0] == "--on-end: exit status 3: mail server is away"
    assert notes[1].startswith("--on-end: exit status 127")


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """It holds up neither the run nor its end beyond the limit, and leaves nothing behind."""
    notes: list[str] = []
    called = hooks(notes, limit_s=1.0, on_kill=f"(sleep 300; touch {tmp_path}/late) & echo $! > {tmp_path}/pid; wait")
    began = time.monotonic()
    called.killed("a kill", {})
    assert time.monotonic() - began < 1.0, "the driver does not wait"
    wait_until(lambda: notes, "a note")
    assert notes == ["--on-kill: not done after 1 s, ended"]
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not alive(pid), "its child is gone")


def alive(pid: int) -> bool:
    """Whether a process runs, and not as a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_flood_of_kills_starts_a_few_commands_only() -> None:
    """Beyond so many that still run a kill is noted and its command left out."""
    notes: list[str] = []
    called = hooks(notes, limit_s=2.0, on_kill="sleep 300")
    for number in range(MOST_AT_ONCE + 3):
        called.killed(f"kill {number}", {})
    assert len([note for note in notes if "still run" in note]) == 3
    called.ended("over", {})


def test_without_commands_nothing_is_started() -> None:
    """The usual case."""
    notes: list[str] = []
    called = hooks(notes)
    called.killed("a kill", {})
    called.ended("over", {})
    assert notes == []
