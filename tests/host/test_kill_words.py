"""A kill in words: what people read of it, from the watchdog's own stories and from what a trial may have put there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.host import kill_words
from scheduler.host.attempt_folder import AttemptFolder
from scheduler.model import ExitReason
from scheduler.watchdog.policy.pressure import RUNNING_OUT

GIB = 2**30
STORY: dict[str, Any] = {
    "attempt": "phase6a_20M_h3/17/2",
    "rule": "stalled",
    "reason": "stalled",
    "since": 1000.0,
    "evidence": {"quiet_s": 612.0, "limit_s": 600.0, "footprint_bytes": 3 * GIB, "promised_bytes": 4 * GIB},
    "steps": [
        {"step": "intent", "at": 1612.0, "unix": 1_795_000_612.0},
        {"step": "term", "at": 1613.0, "unix": 1_795_000_613.0},
        {"step": "memory_back", "at": 1614.0, "unix": 1_795_000_614.0, "gained_bytes": 3 * GIB},
    ],
    "candidates": [
        {"attempt": "phase6a_20M_h3/17/2", "footprint_bytes": 3 * GIB, "promised_bytes": 4 * GIB, "why": "chosen"},
        {"attempt": "phase6a_20M_h3/18/1", "footprint_bytes": GIB, "promised_bytes": 0, "why": "healthy: active"},
        {"attempt": "phase6a_20M_h3/19/1", "footprint_bytes": 1000, "promised_bytes": GIB,
         "why": f"too small to help: 1000 bytes of at least {GIB // 4}"},
    ],
}  # fmt: skip


def test_a_story_is_told_in_gib_and_by_the_clock() -> None:
    """Who, why, how much, whose fault, when, and why the others were spared: no byte count, no monotonic instant."""
    told = kill_words.as_text(STORY)
    for words in (
        "Trial 17 of phase6a_20M_h3 (attempt 2) was ended",
        "no CPU and showed no progress for 10 min 12 s (limit 10 min 00 s)",
        "It held 3.00 GiB: within the 4.00 GiB of its promise.",
        "The fault was its own",
        f"First symptom: {kill_words.clock(1_795_000_000.0)}",
        f"{kill_words.clock(1_795_000_613.0)}  asked to end (SIGTERM)",
        "its memory came back: 3.00 GiB",
        "held 1.00 GiB of nothing promised; spared: nothing was wrong with it (active)",
        "too small to help: 1000 B of at least 256 MiB",
    ):
        assert words in told
    assert str(GIB) not in told


def test_a_trial_that_stands_still_is_found_in_its_own_code() -> None:
    """Of its main thread's stack the innermost line that is neither Python's nor installed, wherever it waits."""
    stack = (
        'Thread 0x1 (most recent call first):\n  File "/x/training/trial.py", line 306 in _read\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "/usr/lib/python3.11/threading.py", line 320 in wait\n'
        '  File "/usr/lib/python3.11/site-packages/torch/nn/x.py", line 9 in forward\n'
        '  File "/home/me/train.py", line 8 in objective\n  File "<frozen runpy>", line 88 in _run_code\n'
    )
    assert kill_words.stood(stack) == "It stood in train.py, line 8, in objective."
    assert kill_words.stood("no stack") == kill_words.stood(None) == ""
    assert "It stood in train.py" in kill_words.as_text({**STORY, "stack": stack})


def test_every_rule_of_the_host_has_its_words() -> None:
    """The names that the watchdog gives to want of memory are all known here."""
    import ast

    import scheduler.watchdog.policy.pressure as pressure

    tree = ast.parse(Path(str(pressure.__file__)).read_text())
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    hard_or_soft = {
        "memory_exhausted",
        "psi_full",
        "level_critical",
        "memory_low_no_swap",
        "swap_threshold",
        "memory_low",
    }
    assert hard_or_soft <= said
    for rule in (*hard_or_soft, RUNNING_OUT):
        assert "in need" not in kill_words.why(rule, {"available_bytes": GIB, "limit_bytes": 16 * GIB})


def test_every_reason_of_the_watchdog_says_whose_fault_it_is() -> None:
    """And none of a normal end."""
    for reason in ("stalled", "evicted", "overshoot", "preempted", "lost", "kernel_oom", "timed_out"):
        assert kill_words.fault(ExitReason(reason))
    assert kill_words.fault("completed") == kill_words.fault("nonsense") == ""


def test_the_words_lie_beside_the_numbers(tmp_path: Path) -> None:
    """Each kill.json has its kill.txt, each would_kill.json its would_kill.txt."""
    folder = AttemptFolder(tmp_path)
    folder.write_kill(STORY)
    assert "Trial 17" in (tmp_path / "kill.txt").read_text()
    folder.write_kill({**STORY, "steps": [{"step": "would_kill", "at": 1.0}]}, would_have=True)
    assert "would have been ended" in (tmp_path / "would_kill.txt").read_text()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
KEYS = ("attempt", "rule", "reason", "since", "evidence", "steps", "candidates", "stack")


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON)))
def test_whatever_stands_in_the_file_can_be_told(story: dict[str, Any]) -> None:
    """A trial's own code can write kill.json: nothing in it ends who reads it."""
    assert kill_words.as_text(story)


@pytest.mark.parametrize("text", ["7 bytes of 9", "2147483648 bytes over its promise, 7 s of work to lose"])
def test_bytes_in_a_sentence_become_sizes(text: str) -> None:
    """Also the second number of "a bytes of b", which has no word after it."""
    assert "bytes" not in kill_words.in_words(text)
