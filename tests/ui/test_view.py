"""What the console, the page and /metrics are given: a snapshot of the real brain, and its events as sentences."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

from scheduler import model as m
from scheduler.model.journal_events import JournalEvent
from scheduler.ui import story, view
from scheduler.ui.snapshot import Snapshot
from tests import builders as b
from tests.core.test_batch import Batch

GIB = 2**30


def seen(batch: Batch, **changes: object) -> Snapshot:
    """The batch as it is drawn now."""
    return view.snapshot(batch.brain, run="r", now=batch.now, elapsed_s=1.0, dashboard=None, **changes)  # type: ignore[arg-type]


def test_waits_and_ends_are_counted_by_reason() -> None:
    """What /metrics says of a run: who waits for what now, and why attempts have ended so far."""
    batch = Batch()
    batch.join(limit_bytes=4 * GIB, available_bytes=4 * GIB)
    batch.start(0, host_bytes=3 * GIB)
    batch.tell(b.asked(1, 3 * GIB))
    shot = seen(batch, ends={"completed": 3})
    assert sum(shot.waits.values()) == 1 and set(shot.waits) <= {reason.value for reason in m.DeferReason}
    assert shot.ends == {"completed": 3}


def test_the_page_can_be_sent_a_batch_in_which_a_trial_waits() -> None:
    """Dask takes only what msgpack can hold, as JSON can; while anything waited the page got nothing."""
    batch = Batch()
    batch.join(limit_bytes=4 * GIB, available_bytes=4 * GIB)
    batch.start(0, host_bytes=3 * GIB)
    batch.tell(b.asked(1, 3 * GIB))
    sent = dataclasses.asdict(seen(batch, ends=Counter({"completed": 3})))
    assert json.loads(json.dumps(sent))["waits"] == sent["waits"]
    assert sent["ends"] == {"completed": 3} and sum(sent["waits"].values()) == 1


def test_a_hosts_swap_is_what_its_vitals_said_last() -> None:
    """None before anything was said, and where the host has no swap."""
    batch = Batch()
    batch.join()
    (before,) = seen(batch).workers
    batch.tell(m.WorkerVitals(worker=before.address, available_bytes=GIB, swap_used_bytes=123))
    (after,) = seen(batch).workers
    assert (before.swap_bytes, after.swap_bytes) == (None, 123)


def test_an_attempts_end_names_the_attempt_and_nothing_else_does() -> None:
    """The page marks the end at the attempt's own place; what is nobody's end has none."""
    fields = {"attempt": "r_2M_h1/3/2", "reason": "stalled", "duration_s": 60.0, "detail": "", "epochs": 0}
    ended = story.tell(JournalEvent.ATTEMPT_ENDED, fields, "r", 1.0)
    other = story.tell(JournalEvent.WORKER_NONE, {}, "r", 1.0)
    assert ended is not None and ended.attempt == "r_2M_h1/3/2"
    assert other is not None and other.attempt == ""


def test_only_a_trial_with_a_checkpoint_is_said_to_go_on_from_it() -> None:
    """One that was ended before its first checkpoint runs again, from the start."""
    fields = {"attempt": "r_2B_h1/1/1", "reason": "preempted", "duration_s": 60.0, "detail": "", "epochs": 0}
    without = story.tell(JournalEvent.ATTEMPT_ENDED, {**fields, "checkpoint": None}, "r", 1.0)
    with_one = story.tell(JournalEvent.ATTEMPT_ENDED, {**fields, "checkpoint": "/c"}, "r", 1.0)
    assert without is not None and without.text.endswith("it runs again")
    assert with_one is not None and with_one.text.endswith("it runs again from its checkpoint")
