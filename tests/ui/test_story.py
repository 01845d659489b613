"""What happened, as a sentence: each end of an attempt, each rule of a kill, and what concerns no single trial."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from scheduler.model import ExitReason
from scheduler.model.host_words import HOST_IN_NEED
from scheduler.model.journal_events import JournalEvent
from scheduler.ui import story
from scheduler.watchdog.policy import pressure

GIB = 2**30
ENDED = {"attempt": "r_2M_h1/3/1", "duration_s": 61.0, "epochs": 0, "detail": "it said so"}


def said(event: JournalEvent, **fields: Any) -> tuple[str, str]:
    """(tone, sentence) of an event."""
    found = story.tell(event, fields, "r", 1.0)
    assert found is not None
    return found.tone, found.text


@pytest.mark.parametrize(
    ("reason", "fields", "tone", "text"),
    [
        ("completed", {"value": 0.25, "epochs": 2}, "", "completed with 0.25 after 2 epochs, 1m01s"),
        (
            "completed",
            {"value": 0.25, "peak_bytes": GIB, "predicted_bytes": 2 * GIB},
            "",
            "peak 1.00 GiB of 2.00 GiB predicted",
        ),
        ("pruned", {"epochs": 1}, "", "was pruned after 1 epoch, 1m01s"),
        ("failed", {}, "warn", "failed after 1m01s: it said so"),
        ("kernel_oom", {}, "bad", "was killed by the kernel after 1m01s: it said so"),
        ("timed_out", {}, "warn", "ran into --trial-timeout after 1m01s"),
        ("interrupted", {}, "", "left with its checkpoint after 1m01s"),
        ("preempted", {}, "bad", "lost its memory to another program after 1m01s; it runs again"),
        ("not_started", {}, "warn", "runs again, its host is to blame: it said so"),
        ("no_room", {}, "warn", "runs again, its host is to blame: it said so"),
        ("lost", {}, "warn", "was lost after 1m01s: it said so; it runs again"),
    ],
)
def test_each_end_has_its_sentence(reason: str, fields: dict[str, Any], tone: str, text: str) -> None:
    """Whose fault it was shows in the tone and in whether it runs again."""
    found = said(JournalEvent.ATTEMPT_ENDED, **{**ENDED, **fields, "reason": reason})
    assert found[0] == tone
    assert found[1].startswith("trial 3 of 2M_h1 ") and text in found[1]


HELD = {"footprint_bytes": 3 * GIB, "promised_bytes": 2 * GIB}


@pytest.mark.parametrize(
    ("rule", "evidence", "text"),
    [
        ("stalled", {"quiet_s": 600.0}, "no CPU and no progress for 10 min"),
        ("stalled", {"quiet_s": "what a trial wrote there"}, "no CPU and no progress for long"),
        ("thrashing", HELD, "made no progress while it held 3.00 GiB of 2.00 GiB promised"),
        ("orphaned", {}, "nobody waits for its result any more"),
        ("overshoot", HELD, "it took far more than it was promised: 3.00 GiB of 2.00 GiB"),
        (
            "memory_exhausted",
            HELD,
            "as good as used up while it held 3.00 GiB of 2.00 GiB promised",
        ),
        ("psi_full", {"footprint_bytes": True}, "every task of the host was waiting for memory"),
        ("of_a_later_version", {}, "of a later version"),
    ],
)
def test_each_rule_of_a_kill_has_its_words(rule: str, evidence: dict[str, Any], text: str) -> None:
    """With the numbers that count, where they are numbers."""
    kill = {"rule": rule, "evidence": evidence}
    tone, told = said(JournalEvent.ATTEMPT_ENDED, **ENDED, reason="evicted", kill=kill)
    assert tone == "bad" and told.startswith("trial 3 of 2M_h1 was ended: ") and text in told
    tone, told = said(JournalEvent.WATCHDOG_WOULD_KILL, attempt=ENDED["attempt"], **kill)
    assert tone == "warn" and text in told and told.endswith("(observing only)")


def test_a_kill_that_costs_nothing_says_so_and_where_its_story_is() -> None:
    """Preempted: it runs again; a second attempt is called one."""
    fields = {**ENDED, "attempt": "r_2M_h1/3/2", "reason": ExitReason.PREEMPTED.value, "checkpoint": "/run/checkpoint"}
    fields["kill"] = {"rule": "memory_low"}
    found = story.tell(JournalEvent.ATTEMPT_ENDED, fields, "r", 1.0, lambda attempt: "/run/kill.txt")
    assert found is not None
    assert found.text.startswith("trial 3 of 2M_h1, attempt 2, was ended: the host was short of memory")
    assert found.text.endswith("; it runs again from its checkpoint; story: /run/kill.txt")


@pytest.mark.parametrize(
    ("event", "fields", "tone", "text"),
    [
        (JournalEvent.STUDY_CLOSED, {"study": "r_2M_h1", "reason": "failures"}, "good", "study 2M_h1 is complete"),
        (JournalEvent.STUDY_CLOSED, {"study": "r_2M_h1", "reason": "x", "early": True}, "warn", "closed early: x"),
        (JournalEvent.STUDY_ASK_FAILED, {"study": "r_2M_h1", "detail": "x"}, "bad", "cannot be sampled: x"),
        (JournalEvent.STUDY_UNAVAILABLE, {"error": "x"}, "warn", "the database does not answer: x"),
        (JournalEvent.STUDY_AVAILABLE, {}, "good", "the database answers again"),
        (JournalEvent.HOST_CLOSED, {"worker": "w", "reason": "disk full"}, "warn", "nothing starts on w: disk full"),
        (JournalEvent.HOST_OPENED, {"worker": "w"}, "good", "trials may start on w again"),
        (JournalEvent.WORKER_LEFT, {"worker": "w", "detail": "x"}, "warn", "worker w is out of reach: x"),
        (JournalEvent.WORKER_BROKEN, {"worker": "w", "detail": "x"}, "bad", "no trial can run on w: x"),
        (JournalEvent.WORKER_NONE, {}, "bad", "no worker is in reach"),
        (JournalEvent.CLUSTER_DISCONNECTED, {"held_s": 600}, "warn", "trials are held for 10m00s"),
        (JournalEvent.CLUSTER_BACK, {}, "good", "the Dask scheduler is back"),
        (JournalEvent.CLUSTER_REBUILT, {}, "warn", "made anew"),
        (JournalEvent.CLUSTER_LOST, {}, "bad", "can be resumed"),
        (
            JournalEvent.RUN_FILES_LOST,
            {"what": "database", "fate": "removed", "path": "/d"},
            "bad",
            "database was removed: /d",
        ),
    ],
)
def test_what_concerns_no_single_trial(event: JournalEvent, fields: dict[str, Any], tone: str, text: str) -> None:
    """Studies, hosts, workers, the database, the cluster and the run's files."""
    found = said(event, **fields)
    assert found[0] == tone and text in found[1]


def test_what_says_nothing_to_a_person_has_no_sentence() -> None:
    """The journal has it all."""
    assert story.tell(JournalEvent.ATTEMPT_PROGRESS, {}, "r", 1.0) is None


def test_no_state_of_a_host_has_words_that_the_watchdog_does_not_name() -> None:
    """The words are by the names that its policy gives."""
    tree = ast.parse(Path(pressure.__file__).read_text())
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(HOST_IN_NEED) - named == set()
