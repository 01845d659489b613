"""The brain through its one seam, `handle(event, now)`: what it commands, and its invariants after each event."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest

from scheduler import model as m
from scheduler.core import placement
from scheduler.core.admission import parse_memory_budget
from scheduler.core.fault import RetryPolicy
from scheduler.core.reservation import tightened
from scheduler.core.state import BatchState
from scheduler.core.trial import IllegalTransition, Rules
from scheduler.units import GIB, MIB
from tests import builders as b

Kind = TypeVar("Kind")


class Batch:
    """A brain with a clock; every event is followed by a check of the invariants."""

    def __init__(self, *studies: m.StudySpec, **rules: Any) -> None:
        defaults: dict[str, Any] = {
            "memory_budget": parse_memory_budget("100%"),
            "reserve_bytes": 0,
            "retry": RetryPolicy(max_retries=2, max_consecutive_failures=3, delay_s=0.0),
        }
        self.brain = BatchState(Rules(**{**defaults, **rules}))
        self.now = 0.0
        self.log: list[m.Command] = []
        for study in studies or (b.study(),):
            self.tell(m.StudyOpened(study=study))

    def tell(self, event: m.Event, after: float = 1.0) -> list[m.Command]:
        """Let time pass, hand over the event, check the invariants; returns the commands."""
        self.now += after
        commands = self.brain.handle(event, self.now)
        self.brain.check()
        self.log.extend(commands)
        return commands

    def join(self, **facts: Any) -> list[m.Command]:
        """A worker joins: 24 GiB and four slots unless told otherwise."""
        return self.tell(m.WorkerJoined(facts=b.facts(**facts)))

    def start(self, number: int = 0, host_bytes: int = GIB, *, attempt: int = 1, **asked: Any) -> m.LaunchAttempt:
        """Ask, launch and start a trial; it must be launched at once."""
        launch = only(self.tell(b.asked(number, host_bytes, attempt=attempt, **asked)), m.LaunchAttempt)
        self.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=100 + number))
        return launch

    def end(
        self, attempt: m.AttemptId, reason: m.ExitReason = m.ExitReason.COMPLETED, **outcome: object
    ) -> list[m.Command]:
        """The attempt ends like this."""
        return self.tell(m.AttemptEnded(attempt=attempt, outcome=b.outcome(reason, **outcome)))

    def told(self, trial: m.TrialId, state: m.FinalState) -> list[m.Command]:
        """The study confirms a final state."""
        return self.tell(m.TrialTold(trial=trial, state=state))


def kinds(commands: Iterable[m.Command], *wanted: type[Kind]) -> list[Kind]:
    """The commands of these kinds."""
    return [command for command in commands if isinstance(command, wanted)]


def only(commands: Iterable[m.Command], kind: type[Kind]) -> Kind:
    """The one command of this kind; fails when there are more or none."""
    found = kinds(commands, kind)
    assert len(found) == 1, (kind.__name__, list(commands))
    return found[0]


def test_asks_one_trial_per_study_once_a_worker_is_here() -> None:
    """Nothing is sampled before a worker can size it, then exactly one trial per study, sized for the worker."""
    batch = Batch(b.study("one"), b.study("two"))
    assert batch.log == []
    asks = kinds(batch.join(overhead_bytes=GIB), m.AskTrial)
    assert {ask.study for ask in asks} == {"one", "two"}
    assert {ask.limit_bytes for ask in asks} == {23 * GIB}
    assert kinds(batch.tell(m.Tick()), m.AskTrial) == []


def test_a_study_alone_is_asked_when_a_slot_is_free() -> None:
    """A trial drawn while all slots are taken knows one result less, and could not have started: it is drawn after that
    result; where memory is what is short, one is drawn and waits for it."""
    batch = Batch(b.study("one"))
    batch.join(slots=2)
    first, second = batch.start(0, study="one"), batch.start(1, 20 * GIB, study="one")
    assert len(kinds(batch.log, m.AskTrial)) == 2
    commands = batch.end(first.attempt)
    kept = [type(command) for command in commands if isinstance(command, m.TellTrial | m.AskTrial)]
    assert kept == [m.TellTrial, m.AskTrial]
    assert kinds(batch.tell(b.asked(2, 20 * GIB, study="one")), m.LaunchAttempt) == []
    assert only(batch.end(second.attempt), m.LaunchAttempt).attempt.trial.number == 2


def test_of_several_studies_each_shows_its_next_trial_beforehand() -> None:
    """All slots are taken and each has a trial that waits: which one starts next is compared, not who answers first."""
    batch = Batch(b.study("one"), b.study("two"))
    batch.join(slots=1)
    batch.start(0, study="one")
    batch.tell(b.asked(0, study="two"))
    assert [ask.study for ask in kinds(batch.log, m.AskTrial)] == ["one", "two", "one"]


def test_runs_a_study_to_its_quota_and_ends() -> None:
    """Ask, launch, complete, told: quota times; then the study closes and the batch ends with 0."""
    batch = Batch(b.study(quota=2))
    batch.join()
    for number in range(2):
        launch = batch.start(number)
        tell = only(batch.end(launch.attempt), m.TellTrial)
        assert (tell.state, tell.value) == (m.FinalState.COMPLETE, 0.5)
        batch.told(tell.trial, tell.state)
    assert only(batch.log, m.CloseStudy).early is False
    assert only(batch.log, m.EndBatch).exit_code == 0
    assert len(kinds(batch.log, m.AskTrial)) == 2


def test_a_trial_that_another_driver_took_is_ended_without_a_word() -> None:
    """Running: killed, and nothing is told, counted or removed. Waiting: forgotten. What is left goes on."""
    batch = Batch(b.study(quota=3))
    batch.join(slots=1)
    launch = batch.start(0)
    batch.tell(b.asked(1))
    before = len(batch.log)
    kill = only(batch.tell(m.TrialTaken(trial=launch.attempt.trial)), m.KillAttempt)
    assert kill.attempt == launch.attempt
    assert kinds(batch.tell(m.TrialTaken(trial=launch.attempt.trial)), m.KillAttempt) == []
    batch.tell(m.TrialTaken(trial=m.TrialId("study", 1)))
    batch.end(launch.attempt)  # it had just finished: that is the other's to say
    silent = (m.TellTrial, m.EnqueueRetry, m.DropCheckpoints, m.CloseStudy, m.EndBatch)
    assert not [command for command in batch.log[before:] if isinstance(command, silent)]
    assert batch.brain.studies["study"].counted == 0 and not batch.brain.trials
    launch = batch.start(2)
    only(batch.end(launch.attempt), m.TellTrial)


def test_a_result_told_in_vain_leaves_the_quota() -> None:
    """Another driver had queued the trial again: the study lacks one more than this driver thought."""
    batch = Batch(b.study(quota=2))
    batch.join()
    launch = batch.start(0)
    tell = only(batch.end(launch.attempt), m.TellTrial)
    batch.tell(m.TrialTold(trial=tell.trial, state=m.FinalState.FAIL))
    batch.tell(m.TrialTaken(trial=tell.trial, told=tell.state))
    study = batch.brain.studies["study"]
    assert (study.counted, study.completed, study.untold) == (0, 0, 0)


def test_a_study_without_a_completed_trial_is_no_success() -> None:
    """Its quota is reached, and nothing came of it: exit code 1, and the reason names the study."""
    batch = Batch(b.study("good", quota=1), b.study("bad", quota=2))
    batch.join()
    for number, study, reason in ((0, "good", "completed"), (0, "bad", "failed"), (1, "bad", "pruned")):
        launch = batch.start(number, study=study)
        tell = only(batch.end(launch.attempt, m.ExitReason(reason)), m.TellTrial)
        batch.told(tell.trial, tell.state)
    end = only(batch.log, m.EndBatch)
    assert (end.exit_code, end.reason) == (1, "no trial completed in bad")


def test_what_other_drivers_completed_counts_as_success() -> None:
    """A study whose quota others have filled is one that ran."""
    batch = Batch()
    batch.join()
    batch.tell(m.QuotaReached(study="study", completed=2))
    assert only(batch.log, m.EndBatch).exit_code == 0


def test_a_trial_over_its_time_limit_is_asked_to_leave_then_ended() -> None:
    """Asked once, ended once the time to leave is over, told PRUNED `timed_out`; it counts, and has no constraint."""
    batch = Batch(b.study(quota=1), trial_timeout_s=100.0, drain_timeout_s=20.0)
    batch.join()
    launch = batch.start()
    assert kinds(batch.tell(m.Tick(), after=99), m.StopAttempt) == []
    assert only(batch.tell(m.Tick(), after=2), m.StopAttempt).reason == "timeout"
    assert kinds(batch.tell(m.Tick(), after=19), m.StopAttempt, m.KillAttempt) == []
    assert only(batch.tell(m.Tick(), after=2), m.KillAttempt).reason == "timeout"
    assert kinds(batch.tell(m.Tick(), after=60), m.KillAttempt) == []
    tell = only(batch.end(launch.attempt, m.ExitReason.TIMED_OUT), m.TellTrial)
    assert (tell.state, tell.attrs["stop_reason"], tell.constraint) == (m.FinalState.PRUNED, "timed_out", None)
    assert batch.brain.studies["study"].counted == 1


def test_time_that_was_lost_is_not_held_against_a_trial() -> None:
    """What an attempt with a checkpoint ran counts towards the limit; one that left nothing does not."""
    batch = Batch(b.study(quota=1), trial_timeout_s=100.0)
    batch.join()
    launch = batch.start()
    batch.tell(m.Tick(), after=60)
    commands = batch.end(launch.attempt, m.ExitReason.LOST)
    launch = only(commands or batch.tell(m.Tick(), after=60), m.LaunchAttempt)
    assert launch.ran_s == 0.0
    batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=1))
    batch.tell(m.Tick(), after=60)
    commands = batch.end(launch.attempt, m.ExitReason.LOST, checkpoint="/c")
    launch = only(commands or batch.tell(m.Tick(), after=60), m.LaunchAttempt)
    assert launch.ran_s == 61.0
    batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=1))
    assert only(batch.tell(m.Tick(), after=40), m.StopAttempt).reason == "timeout"


def test_the_time_limit_of_the_batch_drains_it() -> None:
    """As if the user had asked, with a code of its own; what runs is queued again with its checkpoint."""
    batch = Batch(b.study(quota=9), timeout_s=1000.0)
    batch.join()
    launch = batch.start()
    assert kinds(batch.tell(m.Tick(), after=900), m.StopAttempt) == []
    assert only(batch.tell(m.Tick(), after=200), m.StopAttempt).reason == "drain"
    requeue = only(batch.end(launch.attempt, m.ExitReason.INTERRUPTED, checkpoint="/c"), m.EnqueueRetry)
    assert (requeue.resume_from, requeue.retries) == ("/c", 0)
    batch.told(launch.attempt.trial, m.FinalState.FAIL)
    batch.tell(m.QuotaReached(study="study"))
    end = only(batch.log, m.EndBatch)
    assert end.exit_code == 124 and "--timeout" in end.reason


def test_a_batch_that_is_done_at_its_time_limit_is_done() -> None:
    """The last result comes while it drains: exit code 0."""
    batch = Batch(b.study(quota=1), timeout_s=10.0)
    batch.join()
    launch = batch.start()
    batch.tell(m.Tick(), after=20)
    batch.end(launch.attempt)
    assert only(batch.told(launch.attempt.trial, m.FinalState.COMPLETE), m.EndBatch).exit_code == 0


def test_a_host_that_closes_and_opens_is_told_once_each() -> None:
    """Why nothing starts there goes into the journal when it changes, not with every sample."""
    batch = Batch()
    batch.join()
    closed = m.WorkerVitals(worker=b.WORKER, available_bytes=24 * GIB, closed_reason="disk full: /runs")
    for _ in range(3):
        batch.tell(closed)
    for _ in range(3):
        batch.tell(m.WorkerVitals(worker=b.WORKER, available_bytes=24 * GIB))
    assert [note.reason for note in kinds(batch.log, m.NoteHost)] == ["disk full: /runs", None]


def test_does_not_end_before_the_study_confirms() -> None:
    """A final state that the database has not taken keeps the driver alive."""
    batch = Batch(b.study(quota=1))
    batch.join()
    launch = batch.start()
    batch.end(launch.attempt)
    assert kinds(batch.log, m.EndBatch) == []
    assert only(batch.told(launch.attempt.trial, m.FinalState.COMPLETE), m.EndBatch).exit_code == 0


def test_defers_with_a_reason_and_starts_when_memory_is_back() -> None:
    """A trial that does not fit beside another waits, says why once, and starts when the other's memory is back."""
    batch = Batch(b.study(quota=4))
    batch.join(slots=4)
    first = batch.start(0, 20 * GIB)
    deferral = only(batch.tell(b.asked(1, 10 * GIB)), m.NoteDeferral)
    assert deferral.reason == "memory"
    assert deferral.numbers["needed_bytes"] == 10 * GIB
    assert kinds(batch.tell(m.Tick()), m.NoteDeferral) == []
    assert only(batch.end(first.attempt), m.LaunchAttempt).attempt == b.attempt_id(1)


def test_reservation_is_held_until_the_attempt_is_reported_gone() -> None:
    """Losing a worker frees nothing by itself: only the end of the attempt does."""
    batch = Batch()
    batch.join()
    launch = batch.start()
    batch.tell(m.WorkerLost(worker=launch.worker))
    assert batch.brain.ledger.worker_of(launch.attempt) == launch.worker
    batch.end(launch.attempt, m.ExitReason.LOST)
    assert batch.brain.ledger.worker_of(launch.attempt) is None
    assert list(batch.brain.ledger) == []


def test_tightening_frees_memory_at_once() -> None:
    """After its first step and validation a trial holds what it needs, and the next one starts on the difference."""
    batch = Batch(b.study(quota=4))
    batch.join()
    first = batch.start(0, 20 * GIB)
    batch.tell(b.asked(1, 10 * GIB))
    commands = batch.tell(m.AttemptSettled(attempt=first.attempt, peak_bytes=8 * GIB))
    assert only(commands, m.ResizeReservation).reserved_bytes == tightened(8 * GIB)
    assert only(commands, m.LaunchAttempt).attempt == b.attempt_id(1)


def test_reservation_grows_when_the_attempt_goes_over() -> None:
    """What is taken is charged at once, even beyond capacity, and nothing new starts beside it."""
    batch = Batch(b.study(quota=4))
    batch.join()
    first = batch.start(0, 4 * GIB)
    commands = batch.tell(m.WorkerVitals(worker=b.WORKER, available_bytes=GIB, used_bytes={first.attempt: 30 * GIB}))
    assert only(commands, m.ResizeReservation).reserved_bytes >= 30 * GIB
    assert kinds(batch.tell(b.asked(1, GIB)), m.LaunchAttempt) == []


def test_failed_probe_and_pressure_close_admission() -> None:
    """No reading, or pressure, means closed; a good reading opens again."""
    for vitals in ({"available_bytes": None}, {"available_bytes": 24 * GIB, "pressure": m.Pressure.ELEVATED}):
        batch = Batch()
        batch.join()
        batch.tell(m.WorkerVitals(worker=b.WORKER, **vitals))
        assert kinds(batch.tell(b.asked(0)), m.LaunchAttempt) == []
        only(batch.tell(m.WorkerVitals(worker=b.WORKER, available_bytes=24 * GIB)), m.LaunchAttempt)


def test_lost_attempt_is_retried_from_its_checkpoint_then_fails() -> None:
    """LOST without progress is retried max_retries times, then told FAIL; the trial keeps its number."""
    batch = Batch(b.study(quota=1))
    batch.join()
    launch = batch.start()
    for attempt, retries in ((2, 0), (3, 0), (4, 1), (5, 2)):
        checkpoint = f"/c{min(attempt, 3)}"
        commands = batch.end(launch.attempt, m.ExitReason.LOST, checkpoint=checkpoint)
        launch = only(commands or batch.tell(m.Tick(), after=60), m.LaunchAttempt)
        assert (launch.attempt.attempt, launch.resume_from, launch.retries) == (attempt, checkpoint, retries)
    tell = only(batch.end(launch.attempt, m.ExitReason.LOST), m.TellTrial)
    assert tell.state is m.FinalState.FAIL
    assert tell.attrs["stop_reason"] == "lost"


def test_a_trials_duration_is_that_of_all_its_attempts() -> None:
    """Each attempt of the builder's says 1 s; one that was lost without a word ran as long as it was seen to."""
    batch = Batch(b.study(quota=1))
    batch.join()
    launch = batch.start()
    batch.tell(m.Tick(), after=60)
    commands = batch.end(launch.attempt, m.ExitReason.LOST, duration_s=0.0)
    launch = only(commands or batch.tell(m.Tick(), after=60), m.LaunchAttempt)
    batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=1))
    commands = batch.end(launch.attempt, m.ExitReason.PREEMPTED, checkpoint="/c", duration_s=7.0)
    launch = only(commands or batch.tell(m.Tick(), after=60), m.LaunchAttempt)
    batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=1))
    tell = only(batch.end(launch.attempt, value=0.5, duration_s=30.0), m.TellTrial)
    assert tell.attrs["attempts"] == 3
    assert tell.attrs["duration_s"] == 61.0 + 7.0 + 30.0


def test_a_trial_that_never_started_costs_nothing_and_closes_its_host() -> None:
    """However often: no retry, no failure in a row; nothing else starts there until the worker's next word."""
    batch = Batch(b.study(quota=9))
    batch.join()
    launch = batch.start()
    for _ in range(10):
        assert kinds(batch.end(launch.attempt, m.ExitReason.NOT_STARTED, detail="disk full: /runs"), m.TellTrial) == []
        row = batch.brain.ledger.row(launch.worker)
        assert row is not None and row.closed_reason == "disk full: /runs"
        assert kinds(batch.tell(m.Tick(), after=600), m.LaunchAttempt) == []
        launch = only(batch.tell(m.WorkerVitals(worker=launch.worker, available_bytes=24 * GIB)), m.LaunchAttempt)
        assert (launch.retries, batch.brain.studies["study"].failures_in_row) == (0, 0)
    assert batch.brain.studies["study"].counted == 0


def test_a_preempted_trial_runs_again_from_its_checkpoint() -> None:
    """Killed within its promise: nothing is told to the study, no constraint, and its checkpoint is used."""
    batch = Batch(b.study(quota=1))
    batch.join()
    launch = batch.start()
    kill = m.KillRecord(kill_id="k", rule="pressure", reason=m.ExitReason.PREEMPTED, within_promise=True)
    commands = batch.end(launch.attempt, m.ExitReason.PREEMPTED, checkpoint="/c", kill=kill)
    again = only(commands or batch.tell(m.Tick(), after=600), m.LaunchAttempt)
    assert (again.attempt.attempt, again.resume_from, again.retries) == (2, "/c", 0)
    assert kinds(batch.log, m.TellTrial) == []


def test_the_kernels_third_kill_in_a_row_is_the_trials_own() -> None:
    """What leaps between two samples looks like a bystander; told as what it is, it teaches the next estimate."""
    batch = Batch(b.study(quota=9))
    batch.join()
    launch = batch.start(0, 2 * GIB)
    for _ in range(2):
        commands = batch.end(launch.attempt, m.ExitReason.PREEMPTED, peak_bytes=2 * GIB)
        launch = only(commands or batch.tell(m.Tick(), after=600), m.LaunchAttempt)
    tell = only(batch.end(launch.attempt, m.ExitReason.PREEMPTED, peak_bytes=2 * GIB), m.TellTrial)
    assert (tell.state, tell.attrs["stop_reason"]) == (m.FinalState.PRUNED, "kernel_oom")
    assert (tell.constraint or 0) > 0


def test_late_news_of_an_earlier_attempt_is_ignored() -> None:
    """A worker that was thought lost may still report: its attempt is over, the present one is not touched."""
    batch = Batch(b.study(quota=1))
    batch.join()
    first = batch.start()
    batch.end(first.attempt, m.ExitReason.LOST)
    batch.tell(m.Tick(), after=60)
    assert batch.end(first.attempt) == []
    assert batch.tell(m.AttemptProgress(attempt=first.attempt, step=1, value=0.1)) == []


@pytest.mark.parametrize(
    ("reason", "constraint"),
    [(m.ExitReason.EVICTED, True), (m.ExitReason.OVERSHOOT, True), (m.ExitReason.KERNEL_OOM, True),
     (m.ExitReason.STALLED, False)],
)  # fmt: skip
def test_watchdog_kills_are_pruned_and_explained(reason: m.ExitReason, constraint: bool) -> None:
    """Kills become PRUNED with the reason; those for memory also make the configuration infeasible."""
    batch = Batch()
    batch.join()
    launch = batch.start()
    kill = m.KillRecord(kill_id="k1", rule="rule", reason=reason, evidence={"swap_bytes": 5}, seconds=3.0)
    tell = only(batch.end(launch.attempt, reason, kill=kill), m.TellTrial)
    assert tell.state is m.FinalState.PRUNED
    assert tell.attrs["watchdog.reason"] == reason.value
    assert tell.attrs["watchdog.evidence"] == {"swap_bytes": 5}
    assert ((tell.constraint or 0) > 0) is constraint


def test_memory_kill_teaches_the_next_estimate() -> None:
    """A trial killed for memory at twice its estimate makes the next one of its family reserve more than that."""
    batch = Batch()
    batch.join()
    launch = batch.start(0, 2 * GIB)
    batch.end(launch.attempt, m.ExitReason.KERNEL_OOM, peak_bytes=4 * GIB)
    again = only(batch.tell(b.asked(1, 2 * GIB)), m.LaunchAttempt)
    assert again.reserved_bytes > 4 * GIB
    assert again.footprint.source is m.FootprintSource.CORRECTED


def test_unsettled_peaks_teach_nothing() -> None:
    """A trial that failed before memory was flat says nothing about the peak."""
    batch = Batch()
    batch.join()
    launch = batch.start(0, 2 * GIB)
    tell = only(batch.end(launch.attempt, m.ExitReason.FAILED, peak_bytes=GIB // 2), m.TellTrial)
    assert "footprint.observed_peak_bytes" not in tell.attrs
    assert only(batch.tell(b.asked(1, 2 * GIB)), m.LaunchAttempt).reserved_bytes == 2 * GIB


def test_a_whole_run_teaches_whether_or_not_it_said_settled() -> None:
    """An objective of one's own need not say that its memory is flat: its COMPLETE trials are observations."""
    batch = Batch(b.study(quota=9))
    batch.join()
    for number in range(3):
        launch = batch.start(number, 2 * GIB)
        tell = only(batch.end(launch.attempt, peak_bytes=3 * GIB), m.TellTrial)
        assert tell.attrs["footprint.observed_peak_bytes"] == 3 * GIB
    again = only(batch.tell(b.asked(3, 2 * GIB)), m.LaunchAttempt)
    assert again.reserved_bytes > 3 * GIB and again.footprint.samples == 3


def test_unknown_footprint_runs_alone_then_is_sized_by_what_was_seen() -> None:
    """Without an estimator the first trial gets the whole worker; later ones what was seen, with room above it."""
    batch = Batch(b.study(quota=9))
    batch.join()
    asked = b.asked(0, footprint=m.Footprint.unknown())
    launch = only(batch.tell(asked), m.LaunchAttempt)
    assert launch.reserved_bytes == 24 * GIB
    batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=1))
    batch.tell(m.AttemptSettled(attempt=launch.attempt, peak_bytes=2 * GIB))
    batch.end(launch.attempt, peak_bytes=2 * GIB)
    second = only(batch.tell(b.asked(1, footprint=m.Footprint.unknown())), m.LaunchAttempt)
    assert second.reserved_bytes == 7 * GIB


def test_misfits_are_pruned_without_counting_and_close_the_study_in_the_end() -> None:
    """A trial no worker can hold teaches the sampler and is not counted; too many in a row end the study."""
    batch = Batch(b.study(quota=5), max_misfits=3)
    batch.join()
    for number in range(3):
        tell = only(batch.tell(b.asked(number, 25 * GIB)), m.TellTrial)
        assert tell.state is m.FinalState.PRUNED
        assert tell.constraint is not None and tell.constraint > 0
        batch.told(tell.trial, tell.state)
    assert batch.brain.studies["study"].counted == 0
    assert only(batch.log, m.CloseStudy).early is True
    assert only(batch.log, m.EndBatch).exit_code == 1


def test_a_study_that_closes_over_its_misfits_takes_along_all_that_wait() -> None:
    """The large worker has left: of three that fit nowhere any more the second closes the study, and with it the third
    and the one that would still have fitted."""
    batch = Batch(b.study(quota=9), max_misfits=2)
    batch.join(address="large", limit_bytes=64 * GIB, host="large")
    first = batch.start(0, 60 * GIB)
    for number, size in enumerate((50, 40, 30, 6), 1):
        batch.tell(b.asked(number, size * GIB))
    batch.join(address="small", limit_bytes=8 * GIB, available_bytes=0, host="small")
    commands = batch.tell(m.WorkerLost(worker="large"))
    assert [each.trial.number for each in kinds(commands, m.TellTrial)] == [1, 2]
    assert [each.trial.number for each in kinds(commands, m.EnqueueRetry)] == [3, 4]
    assert only(commands, m.CloseStudy).early
    assert set(batch.brain.trials) == {first.attempt.trial}


def test_failures_in_a_row_close_the_study_and_leave_the_others() -> None:
    """The circuit breaker closes one study with its last error; the other goes on."""
    batch = Batch(b.study("bad", quota=9), b.study("good", quota=9))
    batch.join()
    for number in range(3):
        launch = batch.start(number, study="bad")
        batch.end(launch.attempt, m.ExitReason.FAILED, detail="ZeroDivisionError: division by zero")
    close = only(batch.log, m.CloseStudy)
    assert close.study == "bad"
    assert close.early
    assert "ZeroDivisionError: division by zero" in close.reason
    assert batch.brain.studies["good"].closed is None
    batch.start(0, study="good")


def test_a_result_resets_the_circuit_breaker() -> None:
    """Failures count only in a row."""
    batch = Batch(b.study(quota=9))
    batch.join()
    for number, reason in enumerate([m.ExitReason.FAILED, m.ExitReason.FAILED, m.ExitReason.COMPLETED] * 2):
        batch.end(batch.start(number).attempt, reason)
    assert kinds(batch.log, m.CloseStudy) == []


def test_pruner_stops_the_attempt_once() -> None:
    """The pruner's advice becomes one stop, and the attempt ends PRUNED."""
    batch = Batch()
    batch.join()
    launch = batch.start()
    report = only(batch.tell(m.AttemptProgress(attempt=launch.attempt, step=1, value=0.7)), m.ReportValue)
    assert (report.step, report.value) == (1, 0.7)
    assert only(batch.tell(m.PruneAdvised(attempt=launch.attempt, step=1)), m.StopAttempt).reason == "prune"
    assert batch.tell(m.PruneAdvised(attempt=launch.attempt, step=2)) == []
    assert only(batch.end(launch.attempt, m.ExitReason.PRUNED), m.TellTrial).state is m.FinalState.PRUNED


def test_quit_drains_and_keeps_everything() -> None:
    """Running trials are asked to stop, waiting ones are queued again, nothing new starts; exit code 130."""
    batch = Batch(b.study(quota=9))
    batch.join(slots=1)
    launch = batch.start(0)
    batch.tell(b.asked(1))
    commands = batch.tell(m.QuitRequested(source="key q"))
    assert only(commands, m.StopAttempt).attempt == launch.attempt
    assert only(commands, m.EnqueueRetry).trial == b.trial_id(1)
    requeue = only(batch.end(launch.attempt, m.ExitReason.INTERRUPTED, checkpoint="/c"), m.EnqueueRetry)
    assert (requeue.attempt, requeue.resume_from) == (2, "/c")
    for trial in (0, 1):
        batch.told(b.trial_id(trial), m.FinalState.FAIL)
    assert only(batch.log, m.EndBatch).exit_code == 130
    assert batch.brain.studies["study"].counted == 0


def test_trial_asked_while_draining_goes_back_into_the_queue() -> None:
    """An ask that was under way when the user quit is not lost and not run."""
    batch = Batch()
    batch.join()
    batch.tell(m.QuitRequested(source="key q"))
    assert kinds(batch.log, m.EndBatch) == []
    only(batch.tell(b.asked(0)), m.EnqueueRetry)
    only(batch.told(b.trial_id(0), m.FinalState.FAIL), m.EndBatch)


def test_result_that_comes_while_draining_counts() -> None:
    """A trial that finishes during the drain is complete, not interrupted."""
    batch = Batch(b.study(quota=1))
    batch.join()
    launch = batch.start()
    batch.tell(m.QuitRequested(source="key q"))
    assert only(batch.end(launch.attempt), m.TellTrial).state is m.FinalState.COMPLETE
    assert only(batch.told(launch.attempt.trial, m.FinalState.COMPLETE), m.EndBatch).exit_code == 0


@pytest.mark.parametrize("impatience", ["second quit", "timeout"])
def test_second_quit_or_timeout_kills(impatience: str) -> None:
    """Whoever does not leave in time, or when the user asks twice, is killed, once."""
    batch = Batch(drain_timeout_s=20.0)
    batch.join()
    launch = batch.start()
    batch.tell(m.QuitRequested(source="SIGTERM"))
    event: Callable[[], m.Event] = m.Tick if impatience == "timeout" else lambda: m.QuitRequested(source="SIGTERM")
    assert only(batch.tell(event(), after=21), m.KillAttempt).attempt == launch.attempt
    assert kinds(batch.tell(m.Tick()), m.KillAttempt) == []


def test_large_trial_is_not_starved_by_small_ones() -> None:
    """While small trials keep coming, the large one's worker is held for it and it starts."""
    batch = Batch(b.study("large", quota=50), b.study("small", quota=50))
    batch.join(slots=4)
    running = [batch.start(number, 6 * GIB, study="small").attempt for number in range(4)]
    batch.tell(b.asked(0, 20 * GIB, study="large"))
    started: list[m.LaunchAttempt] = []
    for number in range(4, 30):
        batch.end(running.pop(0))
        started = kinds(batch.log, m.LaunchAttempt)
        if started[-1].attempt.trial.study == "large":
            return
        launches = kinds(batch.tell(b.asked(number, 6 * GIB, study="small")), m.LaunchAttempt)
        running += [launch.attempt for launch in launches]
        if not running:
            break
    raise AssertionError(f"the large trial never started: {[str(launch.attempt) for launch in started]}")


def test_illegal_transition_tells_the_story() -> None:
    """A violation of the table raises with the trial's whole story."""
    batch = Batch()
    batch.join()
    launch = batch.start()
    with pytest.raises(IllegalTransition, match=r"pending -> admitted.*running -> running"):
        batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=1))


def test_study_at_its_quota_closes_without_asking() -> None:
    """A resumed study that is complete closes at once."""
    batch = Batch()
    batch.brain.studies.clear()
    batch.tell(m.StudyOpened(study=b.study(quota=3), counted=3, completed=1))
    batch.join()
    assert kinds(batch.log, m.AskTrial) == []
    assert only(batch.log, m.EndBatch).exit_code == 0


def test_a_study_that_cannot_be_asked_closes_early() -> None:
    """The user's sampler raised: that study is over, with the reason."""
    batch = Batch()
    batch.join()
    batch.tell(m.AskFailed(study="study", detail="KeyError: 'dropout'"))
    assert "KeyError: 'dropout'" in only(batch.log, m.CloseStudy).reason
    assert only(batch.log, m.EndBatch).exit_code == 1


def test_interruptions_do_not_use_up_the_retries() -> None:
    """A trial that the user stopped many times is still retried when its worker is lost."""
    batch = Batch(b.study(quota=1))
    batch.join()
    launch = batch.start(attempt=9)
    only(batch.end(launch.attempt, m.ExitReason.LOST) or batch.tell(m.Tick(), after=60), m.LaunchAttempt)


def test_lost_attempts_under_earlier_drivers_count() -> None:
    """A trial that took its worker down under other drivers too is not retried for ever."""
    batch = Batch(b.study(quota=1))
    batch.join()
    launch = batch.start(attempt=3, retries=2)
    assert only(batch.end(launch.attempt, m.ExitReason.LOST), m.TellTrial).state is m.FinalState.FAIL


def test_smaller_worker_that_joins_later_is_taken_for_what_it_has() -> None:
    """An absolute budget above a later worker's memory does not end the batch: that worker counts with 90 %."""
    batch = Batch(memory_budget=parse_memory_budget("20GiB"))
    batch.join()
    batch.join(address="tcp://127.0.0.1:5000", limit_bytes=10 * GIB)
    assert sorted(view.capacity_bytes // GIB for view in batch.brain.ledger.views()) == [9, 20]


@pytest.mark.parametrize(("keep", "dropped"), [("best", [0, 2, 3]), ("none", [0, 1, 2, 3]), ("all", [])])
def test_checkpoints_of_finished_trials_go(keep: str, dropped: list[int]) -> None:
    """Only what nobody resumes from goes: by default each study keeps its best trial's checkpoint."""
    batch = Batch(b.study(quota=9), keep_checkpoints=keep)
    batch.join()
    for number, value in enumerate([0.5, 0.3, 0.4]):
        batch.end(batch.start(number).attempt, value=value)
    batch.end(batch.start(3).attempt, m.ExitReason.STALLED)
    batch.start(4)
    batch.tell(m.QuitRequested(source="key q"))
    batch.end(b.attempt_id(4), m.ExitReason.INTERRUPTED, checkpoint="/c")
    assert sorted(drop.trial.number for drop in kinds(batch.log, m.DropCheckpoints)) == dropped


def test_settling_never_raises_a_reservation() -> None:
    """A prior that was right leaves less room than the margin above what was seen: it stays as it is."""
    batch = Batch()
    batch.join()
    launch = batch.start(0, GIB)
    assert kinds(batch.tell(m.AttemptSettled(attempt=launch.attempt, peak_bytes=GIB - 1)), m.ResizeReservation) == []
    over = batch.tell(m.AttemptSettled(attempt=launch.attempt, peak_bytes=GIB + 5))
    assert only(over, m.ResizeReservation).reserved_bytes >= GIB + 5


def test_a_worker_that_falls_silent_is_closed_until_it_speaks() -> None:
    """Vitals that stop coming close admission there; the next ones open it."""
    batch = Batch()
    batch.join()
    batch.tell(m.WorkerVitals(worker=b.WORKER, available_bytes=24 * GIB))
    batch.tell(m.Tick(), after=60)
    assert only(batch.tell(b.asked(0)), m.NoteDeferral).reason == "probe_failed"
    only(batch.tell(m.WorkerVitals(worker=b.WORKER, available_bytes=24 * GIB)), m.LaunchAttempt)


# -- where a trial runs ------------------------------------------------------------------------------------------------

CPU_BUILD = m.Environment(name="torch-1+cpu/glibc-stack", runtime_bytes=225 * MIB)
CUDA_BUILD = m.Environment(name="torch-1+cu1/glibc-stack", runtime_bytes=510 * MIB)


def sized(number: int, above: int, assumed: int = 225 * MIB) -> m.TrialAsked:
    """A trial that needs `above` bytes on top of the runtime its estimate assumed."""
    size = m.Footprint(host_bytes=above + assumed, prior_bytes=above + assumed, runtime_bytes=assumed)
    return b.asked(number, footprint=size, family="f")


def test_a_trial_is_charged_the_runtime_of_its_worker() -> None:
    """Asked with the CPU build's runtime, launched where the CUDA build holds 285 MiB more: reserved with these."""
    batch = Batch()
    ask = only(batch.join(environment=CUDA_BUILD), m.AskTrial)
    assert (ask.correction.runtime_bytes, ask.environments) == (CUDA_BUILD.runtime_bytes, (CUDA_BUILD.name,))
    launch = only(batch.tell(sized(0, GIB)), m.LaunchAttempt)
    assert launch.reserved_bytes == GIB + CUDA_BUILD.runtime_bytes


def test_in_a_mixed_fleet_each_worker_charges_its_own() -> None:
    """It is asked and placed by the larger runtime, so that it may start anywhere; it reserves that of its worker."""
    batch = Batch(b.study(quota=4))
    batch.join(address="w1", environment=CPU_BUILD, slots=1)
    batch.join(address="w2", environment=CUDA_BUILD, slots=1)
    assert kinds(batch.tell(m.Tick()), m.AskTrial) == []  # one was asked when the first joined
    launches = [only(batch.tell(sized(number, GIB)), m.LaunchAttempt) for number in range(2)]
    assert only(kinds(batch.log, m.AskTrial)[1:2], m.AskTrial).correction.runtime_bytes == CUDA_BUILD.runtime_bytes
    reserved = {launch.worker: launch.reserved_bytes for launch in launches}
    assert reserved == {"w1": GIB + CPU_BUILD.runtime_bytes, "w2": GIB + CUDA_BUILD.runtime_bytes}


def test_each_environment_learns_for_itself() -> None:
    """A peak is held against what its own process held when it was ready, and corrects its own environment alone."""
    batch = Batch(b.study(quota=4))
    batch.join(address="w1", environment=CPU_BUILD, slots=1)
    launch = only(batch.tell(sized(0, GIB)), m.LaunchAttempt)
    batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=100))
    batch.tell(m.AttemptSettled(attempt=launch.attempt, peak_bytes=GIB))
    said: dict[str, Any] = {"environment": CPU_BUILD.name, "runtime_bytes": 230 * MIB}
    batch.end(launch.attempt, peak_bytes=2 * GIB + 230 * MIB, **said)
    again = only(batch.tell(sized(1, GIB)), m.LaunchAttempt)
    assert 2 * GIB + CPU_BUILD.runtime_bytes < again.reserved_bytes < 2.2 * GIB + CPU_BUILD.runtime_bytes
    batch.join(address="w2", environment=CUDA_BUILD, slots=1)
    other = only(batch.tell(sized(2, GIB)), m.LaunchAttempt)
    assert (other.worker, other.reserved_bytes) == ("w2", GIB + CUDA_BUILD.runtime_bytes)


# -- which checkpoint -----------------------------------------------------------------------------------------------


def trained(batch: Batch, attempt: m.AttemptId, step: int) -> None:
    """The attempt reports an epoch."""
    batch.tell(m.AttemptProgress(attempt=attempt, step=step, value=0.5))


def test_an_attempt_that_started_over_does_not_make_its_checkpoint_the_newest() -> None:
    """The one that could not be read has more epochs: the next attempt may be where it can be read again."""
    batch = Batch()
    batch.join()
    first = batch.start()
    trained(batch, first.attempt, 30)
    second = only(batch.end(first.attempt, m.ExitReason.LOST, checkpoint="/a1"), m.LaunchAttempt)
    assert (second.resume_from, second.older) == ("/a1", ())
    batch.tell(m.AttemptStarted(attempt=second.attempt, worker=second.worker, pid=2))
    batch.tell(m.AttemptRestarted(attempt=second.attempt, checkpoint=None, detail="/a1 on b: No such file"))
    trained(batch, second.attempt, 2)
    third = only(batch.end(second.attempt, m.ExitReason.LOST, checkpoint="/a2"), m.LaunchAttempt)
    assert (third.resume_from, third.older, third.retries) == ("/a1", ("/a2",), 0)
    batch.tell(m.AttemptStarted(attempt=third.attempt, worker=third.worker, pid=3))
    trained(batch, third.attempt, 31)
    tell = only(batch.end(third.attempt), m.TellTrial)
    assert tell.attrs["started_over"] == "/a1 on b: No such file"


def test_falling_back_on_an_older_checkpoint_is_no_progress() -> None:
    """An attempt that ends with the checkpoint it fell back on has brought nothing, and spends a retry."""
    batch = Batch()
    batch.join()
    launch, path = batch.start(), None
    for number, step in ((1, 5), (2, 9)):
        trained(batch, launch.attempt, step)
        path = f"/a{number}"
        launch = only(batch.end(launch.attempt, m.ExitReason.LOST, checkpoint=path), m.LaunchAttempt)
        batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=number))
    assert (launch.resume_from, launch.older, launch.retries) == ("/a2", ("/a1",), 0)
    batch.tell(m.AttemptRestarted(attempt=launch.attempt, checkpoint="/a1", detail="/a2 is gone"))
    again = only(batch.end(launch.attempt, m.ExitReason.LOST, checkpoint="/a1"), m.LaunchAttempt)
    assert (again.resume_from, again.retries) == ("/a2", 1)


def test_a_trial_waits_a_little_for_the_host_that_has_its_checkpoint() -> None:
    """It is not started from the beginning elsewhere while its own host is about to be back; after that it is."""
    batch = Batch()
    batch.join(address="w1", host="one")
    launch = batch.start()
    batch.tell(m.Tick(), after=100.0)
    batch.join(address="w2", host="two")
    batch.tell(m.WorkerLost(worker="w1"))
    commands = batch.end(launch.attempt, m.ExitReason.LOST, checkpoint="/a1")
    assert only(commands, m.NoteDeferral).reason == "checkpoint_elsewhere"
    assert not kinds(batch.tell(m.Tick(), after=55.0), m.LaunchAttempt)
    assert only(batch.tell(m.Tick(), after=10.0), m.LaunchAttempt).worker == "w2"


def test_a_trial_goes_back_to_the_host_that_has_its_checkpoint() -> None:
    """Another worker of that host will do; and what has hardly begun waits for no host."""
    batch = Batch()
    batch.join(address="w1", host="one")
    launch = batch.start()
    batch.tell(m.Tick(), after=100.0)
    batch.join(address="w2", host="two")
    batch.tell(m.WorkerLost(worker="w1"))
    batch.end(launch.attempt, m.ExitReason.LOST, checkpoint="/a1")
    again = only(batch.join(address="w3", host="one"), m.LaunchAttempt)
    assert again.worker == "w3"
    batch.tell(m.AttemptStarted(attempt=again.attempt, worker=again.worker, pid=3))
    batch.tell(m.QuitRequested(source="q"))
    requeue = only(batch.end(again.attempt, m.ExitReason.INTERRUPTED, checkpoint="/a2"), m.EnqueueRetry)
    assert (requeue.resume_from, requeue.resume_host) == ("/a2", "one")


def test_a_trial_that_another_driver_left_prefers_the_host_of_its_checkpoint() -> None:
    """What the study says of it is enough."""
    batch = Batch()
    batch.join(address="w1", host="one")
    batch.join(address="w2", host="two")
    for number, host in enumerate(("one", "two")):
        launch = batch.start(number, resume_from="/c", resume_host=host, ran_s=100.0)
        assert launch.worker == {"one": "w1", "two": "w2"}[host]
        tell = only(batch.end(launch.attempt), m.TellTrial)
        batch.told(tell.trial, tell.state)


# -- how long a drain waits -----------------------------------------------------------------------------------------


def stepping(batch: Batch, launch: m.LaunchAttempt, step_s: float) -> None:
    """The worker says how long the trial's steps take."""
    vitals = m.WorkerVitals(worker=launch.worker, available_bytes=20 * GIB, step_s={launch.attempt: step_s})
    batch.tell(vitals)


def test_a_drain_waits_for_a_step_as_long_as_steps_have_taken() -> None:
    """A step and a checkpoint: said with the time, and only those with shorter steps are ended before."""
    batch = Batch(b.study(quota=5), drain_timeout_s=20.0)
    batch.join()
    slow, quick = batch.start(0), batch.start(1)
    stepping(batch, slow, 95.0)
    stepping(batch, quick, 0.5)
    commands = batch.tell(m.QuitRequested(source="q"))
    said = only(commands, m.NoteDrain)
    assert (said.attempt, said.wait_s, said.step_s) == (slow.attempt, 190.0, 95.0)
    assert batch.brain.drain_ends == batch.now + 190.0
    stepping(batch, slow, 180.0)  # the step goes on, and must not move its own end
    kill = only(batch.tell(m.Tick(), after=20.0), m.KillAttempt)
    assert (kill.attempt, kill.reason) == (quick.attempt, "drain_timeout")
    assert not kinds(batch.tell(m.Tick(), after=165.0), m.KillAttempt)
    assert only(batch.tell(m.Tick(), after=10.0), m.KillAttempt).attempt == slow.attempt


def test_a_second_quit_does_not_wait_for_a_step() -> None:
    """However long it takes."""
    batch = Batch()
    batch.join()
    slow = batch.start()
    stepping(batch, slow, 900.0)
    batch.tell(m.QuitRequested(source="q"))
    assert only(batch.tell(m.QuitRequested(source="q")), m.KillAttempt).attempt == slow.attempt


def test_a_drain_of_quick_steps_says_nothing_of_waiting() -> None:
    """The limit that the user has set is enough; and no drain waits more than an hour."""
    batch = Batch(drain_timeout_s=20.0)
    batch.join()
    launch = batch.start()
    stepping(batch, launch, 9.0)
    assert not kinds(batch.tell(m.QuitRequested(source="q")), m.NoteDrain)
    batch = Batch(drain_timeout_s=20.0)
    batch.join()
    stepping(batch, batch.start(), 86_400.0)
    assert only(batch.tell(m.QuitRequested(source="q")), m.NoteDrain).wait_s == 3600.0


def test_a_drain_after_a_prune_gives_the_drains_own_time() -> None:
    """One that was asked to leave before has at least as long as the others."""
    batch = Batch(drain_timeout_s=20.0)
    batch.join()
    launch = batch.start()
    batch.tell(m.PruneAdvised(attempt=launch.attempt, step=1))
    batch.tell(m.Tick(), after=15.0)
    batch.tell(m.QuitRequested(source="q"))
    assert not kinds(batch.tell(m.Tick(), after=19.0), m.KillAttempt)
    assert kinds(batch.tell(m.Tick(), after=2.0), m.KillAttempt)


# -- room, and what fits into it ------------------------------------------------------------------------------------


def forms(*sizes: int) -> tuple[m.Form, ...]:
    """Smaller forms of a trial, with so many bytes."""
    return tuple(m.Form(params={"micro_batch": size // GIB}, footprint=b.footprint(size)) for size in sizes)


def test_a_trial_takes_the_form_that_there_is_room_for_and_its_study_hears_first() -> None:
    """16 of 24 GiB are taken: of 20, 10 and 5 GiB it is 5. It runs, is charged and is learnt from with that."""
    batch = Batch()
    batch.join()
    batch.start(0, 16 * GIB)
    commands = batch.tell(b.asked(1, 20 * GIB, smaller=forms(10 * GIB, 5 * GIB)))
    kept = [command for command in commands if isinstance(command, m.ReshapeTrial | m.LaunchAttempt)]
    assert [type(command) for command in kept] == [m.ReshapeTrial, m.LaunchAttempt]
    launch = only(commands, m.LaunchAttempt)
    assert (launch.params, launch.reserved_bytes) == ({"micro_batch": 5}, 5 * GIB)
    batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=9))
    ended = only(batch.end(launch.attempt, peak_bytes=4 * GIB), m.TellTrial)
    assert ended.attrs["footprint.predicted_bytes"] == 5 * GIB


def test_what_has_a_checkpoint_keeps_the_form_it_began_with() -> None:
    """Its losses would differ in the last digits: it waits for the room that it needs as it is."""
    batch = Batch()
    batch.join()
    first = batch.start(0, 16 * GIB)
    resumed = b.asked(1, 20 * GIB, smaller=forms(5 * GIB), resume_from="/there", attempt=2)
    assert kinds(batch.tell(resumed), m.LaunchAttempt) == []
    launch = only(batch.end(first.attempt), m.LaunchAttempt)
    assert (launch.attempt.trial.number, launch.reserved_bytes) == (1, 20 * GIB)


def test_what_no_worker_could_hold_any_more_takes_a_smaller_form() -> None:
    """The largest worker has gone: 20 GIB fit nowhere now, and it is not told that it does not fit."""
    batch = Batch()
    batch.join(limit_bytes=12 * GIB)
    launch = only(batch.tell(b.asked(0, 20 * GIB, smaller=forms(10 * GIB))), m.LaunchAttempt)
    assert launch.reserved_bytes == 10 * GIB


def vitals(batch: Batch, worker: str, available_bytes: int, after: float) -> list[m.Command]:
    """News of a worker."""
    return batch.tell(m.WorkerVitals(worker=worker, available_bytes=available_bytes), after)


def test_vitals_that_open_no_room_are_not_placed_on_again_within_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten in a row, while a trial waits for memory that other programs hold: one placement a quarter of a second; the
    eleventh opens the room, and it starts at once."""
    calls: list[float] = []
    place = placement.place_in

    def counted(*given: Any) -> placement.Placement:
        calls.append(given[-1])
        return place(*given)

    monkeypatch.setattr(placement, "place_in", counted)
    batch = Batch()
    batch.join()
    vitals(batch, b.WORKER, 8 * GIB, 1.0)
    batch.tell(b.asked(0, 20 * GIB))
    calls.clear()
    for n in range(10):
        vitals(batch, b.WORKER, 8 * GIB + n, 0.05)
    assert len(calls) in (1, 2)
    assert only(vitals(batch, b.WORKER, 24 * GIB, 0.01), m.LaunchAttempt).attempt.trial.number == 0


def test_while_its_trial_waits_for_memory_and_a_slot_is_free_a_study_shows_three_more() -> None:
    """Four wait at the most; with all slots taken, or one that waits for a slot, none is drawn ahead."""
    batch = Batch(b.study(quota=20))
    batch.join(slots=4)
    batch.start(0, 20 * GIB)
    for number in range(1, 5):
        batch.tell(b.asked(number, 20 * GIB))
    assert len(kinds(batch.log, m.AskTrial)) == 5
    batch.tell(m.Tick())
    assert len(kinds(batch.log, m.AskTrial)) == 5
    full = Batch(b.study(quota=20))
    full.join(slots=2)
    full.start(0, 20 * GIB)
    full.start(1, GIB)
    assert len(kinds(full.log, m.AskTrial)) == 2


def test_one_that_was_drawn_ahead_starts_where_it_fits() -> None:
    """The second of a study fits beside the first, for which memory is short."""
    batch = Batch(b.study(quota=20))
    batch.join()
    batch.start(0, 20 * GIB)
    assert kinds(batch.tell(b.asked(1, 20 * GIB)), m.LaunchAttempt) == []
    assert only(batch.tell(b.asked(2, 2 * GIB)), m.LaunchAttempt).attempt.trial.number == 2
