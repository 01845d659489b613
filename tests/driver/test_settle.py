"""What becomes of trials that a dead driver left: the rule as a table, the reader on real folders, a real process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scheduler.core.attributes import ended_line
from scheduler.core.fault import RetryPolicy
from scheduler.driver import decisions, recovery
from scheduler.driver.journal import Journal, read
from scheduler.host import vitals
from scheduler.host.registry import HostRegistry, Registration
from scheduler.model import AttemptId, EnqueueRetry, ExitReason, FinalState, KillRecord, Outcome, TellTrial, TrialId
from scheduler.model.messages import last
from scheduler.study.store import LeftTrial
from tests.study.test_study import ARCHITECTURES, STUDY, ask, spec, states, store_at

TRIAL = TrialId(STUDY, 0)
POLICY = RetryPolicy(max_retries=3)
KILL = KillRecord(
    kill_id="k1",
    rule="stalled",
    reason=ExitReason.STALLED,
    evidence={"cpu": 0.0},
    seconds=600.0,
    steps=(("intent", 1.0), ("kill", 2.0), ("released", 3.0)),
)


def result(stop_reason: str = "completed", value: float | None = 0.5) -> dict[str, Any]:
    """The last line of a trial process, which was asked to leave where it says that it was interrupted."""
    body = {"value": value, "epochs": 4, "stop_reason": stop_reason}
    asked = "drain" if stop_reason == "interrupted" else None
    return {"type": "result", "result": body, "peak_bytes": 700, "duration_s": 9.0, "asked": asked}


ERROR = {"type": "error", "error": "ValueError: x", "traceback": "Traceback ...\nValueError: x", "peak_bytes": 600}
DECIDED = TellTrial(trial=TRIAL, state=FinalState.FAIL, value=None, attrs={"error": "SIGSEGV"})


def remains_of(**found: Any) -> recovery.Remains:
    """What an attempt left, its final message as it is read from the disk."""
    if "result" in found:
        found["result"] = last(found["result"])
    return recovery.Remains(**found)


def kill_for(reason: ExitReason, **more: Any) -> KillRecord:
    """The record of a kill for this reason."""
    return dataclasses.replace(KILL, reason=reason, **more)


def left(**more: Any) -> LeftTrial:
    """A RUNNING trial of a dead driver."""
    return LeftTrial(**{"trial": TRIAL, "run": "run1", **more})


@pytest.mark.parametrize(
    ("remains", "trial", "decided", "expected"),
    [
        (dict(attempt=1, result=result()), {}, None, "COMPLETE 0.5"),
        (dict(attempt=1, result=result("early_stopping")), {}, None, "COMPLETE 0.5"),
        (dict(attempt=1, result=result(), kill=KILL), {}, None, "COMPLETE 0.5"),
        (dict(attempt=1, result=result(), process=(1, 2.0)), {}, None, "COMPLETE 0.5"),
        (dict(attempt=1, result=result(value=None)), {}, None, "FAIL None"),
        (dict(attempt=1, result=result("pruned")), {}, None, "PRUNED None"),
        (dict(attempt=2, result=result("interrupted"), checkpoint="/c"), {}, None, "retry 3 /c interrupted"),
        (dict(attempt=9, result=result("interrupted")), {"retries": 9}, None, "retry 10 None interrupted"),
        (dict(attempt=1, result=ERROR), {}, None, "FAIL None"),
        (dict(attempt=1, kill=KILL), {}, None, "PRUNED None"),
        (dict(attempt=1, kill=kill_for(ExitReason.OVERSHOOT)), {}, None, "PRUNED None"),
        (dict(attempt=1, kill=kill_for(ExitReason.LOST)), {}, None, "retry 2 None lost"),
        (dict(attempt=1, checkpoint="/c"), {}, None, "retry 2 /c lost"),
        (dict(attempt=2), {"attempt": 2, "retries": 1, "attrs": {"resume_from": "/b"}}, None, "retry 3 /b lost"),
        (dict(attempt=3), {}, None, "retry 4 None lost"),
        (dict(attempt=4), {}, None, "FAIL None"),
        (dict(attempt=4), {"attempt": 4, "retries": 3}, None, "FAIL None"),
        (dict(attempt=4), {"attempt": 4, "retries": 0}, None, "retry 5 None lost"),
        (dict(attempt=9, retries=2), {}, None, "retry 10 None lost"),
        (dict(attempt=9, retries=3), {}, None, "FAIL None"),
        (dict(attempt=9, retries=3, checkpoint="/c", progress=True), {}, None, "retry 10 /c lost"),
        (
            dict(attempt=1, kill=kill_for(ExitReason.EVICTED, within_promise=True)),
            {},
            None,
            "retry 2 None preempted",
        ),
        (dict(attempt=0), {}, None, "retry 1 None not started"),
        (dict(attempt=0), {"attempt": 3, "attrs": {"resume_from": "/b"}}, None, "retry 3 /b not started"),
        (dict(reachable=False), {"attempt": 2}, None, "retry 3 None lost"),
        (dict(attempt=1, process=(77, 5.0)), {}, None, "end 77"),
        (dict(attempt=1, process=(77, 5.0)), {}, DECIDED, "end 77"),
        (dict(attempt=1), {}, DECIDED, "FAIL None"),
    ],
)
def test_the_rule(remains: dict[str, Any], trial: dict[str, Any], decided: Any, expected: str) -> None:
    """What was decided, then a durable result, then a kill, then a lost attempt; a live process is ended first."""
    verdict = recovery.decide(left(**trial), remains_of(**remains), POLICY, decided)
    match verdict:
        case TellTrial():
            said = f"{verdict.state.value} {verdict.value}"
        case EnqueueRetry():
            said = f"retry {verdict.attempt} {verdict.resume_from} {verdict.reason}"
        case recovery.EndProcess():
            said = f"end {verdict.pid}"
    assert said == expected


def test_a_settled_trial_tells_its_story() -> None:
    """Peak, duration, evidence and reason are the same attributes that a living driver writes."""
    done = recovery.decide(left(), remains_of(attempt=2, result=result()), POLICY)
    assert isinstance(done, TellTrial)
    assert done.attrs["footprint.observed_peak_bytes"] == 700
    assert (done.attrs["duration_s"], done.attrs["attempts"], done.attrs["stop_reason"]) == (9.0, 2, "completed")
    later = recovery.decide(left(ran_s=5.0), remains_of(attempt=2, result=result(), earlier_s=3.0), POLICY)
    assert isinstance(later, TellTrial)
    assert later.attrs["duration_s"] == 17.0  # under earlier drivers, in its first attempt, in this one
    killed = recovery.decide(left(), recovery.Remains(attempt=1, kill=kill_for(ExitReason.EVICTED)), POLICY)
    assert isinstance(killed, TellTrial)
    assert killed.constraint is not None and killed.constraint > 0
    assert (killed.attrs["watchdog.reason"], killed.attrs["watchdog.kill_id"]) == ("evicted", "k1")


@pytest.mark.parametrize(
    ("ended", "remains", "expected"),
    [
        (None, {}, (FinalState.FAIL, "lost")),
        (Outcome(reason=ExitReason.NO_ROOM, detail="disk full"), {}, (3, "no_room")),
        (Outcome(reason=ExitReason.PREEMPTED), {}, (3, "preempted")),
        (Outcome(reason=ExitReason.NOT_STARTED, detail="no process to be had"), {}, (3, "not_started")),
        (Outcome(reason=ExitReason.LOST), {}, (FinalState.FAIL, "lost")),
        (Outcome(reason=ExitReason.FAILED, exit_status=3, detail="exit 3"), {}, (FinalState.FAIL, "failed")),
        (Outcome(reason=ExitReason.COMPLETED, value=0.25), {}, (FinalState.COMPLETE, "completed")),
        (Outcome(reason=ExitReason.LOST), {"result": result()}, (FinalState.COMPLETE, "completed")),
    ],
)
def test_an_end_that_the_dead_driver_saw_is_not_taken_for_a_loss(
    tmp_path: Path, ended: Outcome | None, remains: dict[str, Any], expected: tuple[Any, str]
) -> None:
    """Its journal has the end and no decision: it waited to run the trial again. What was nobody's fault then spends no
    retry now, although nothing of it is on the disk (a full one, say); what was the trial's own fault stays so."""
    log = Journal(tmp_path / "journal.jsonl")
    attempt = AttemptId(TRIAL, 1)
    log.write("attempt.launched", attempt=str(attempt))
    if ended is not None:
        log.write("attempt.ended", **ended_line(attempt, ended, predicted_bytes=None))
    log.close()
    files = {"result.json": remains["result"]} if remains else {}
    folder_of(tmp_path, 1, **{"spec.json": {"retries": 3}, **files})
    evidence = recovery.Evidence(ends=decisions.ends(read(tmp_path / "journal.jsonl")))
    verdict = recovery.settle(left(folder=str(tmp_path)), evidence, POLICY)
    match verdict:
        case TellTrial():
            assert (verdict.state, verdict.attrs["stop_reason"]) == expected
        case EnqueueRetry():
            assert (verdict.retries, verdict.reason) == expected


def test_the_children_of_a_settled_trial_count() -> None:
    """What its last message says of processes that it has waited for is in the peak that the next driver learns."""
    last_words = {**result(), "children_peak_bytes": 5000}
    done = recovery.decide(left(), remains_of(attempt=1, result=last_words), POLICY)
    assert isinstance(done, TellTrial) and done.attrs["footprint.observed_peak_bytes"] == 5700


def folder_of(run: Path, attempt: int, **files: Any) -> Path:
    """An attempt's folder with these files in it."""
    folder = run / "attempts" / AttemptId(TRIAL, attempt).slug
    folder.mkdir(parents=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_newest_attempt_counts_and_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    """Attempt 10 is newer than 9; one that died before its first checkpoint goes on from the one before."""
    evidence = recovery.Evidence()
    assert not evidence.of(TRIAL, tmp_path).reachable
    folder_of(tmp_path, 9, checkpoint__safetensors="x")
    folder_of(tmp_path, 10, trial__log="last words")
    remains = evidence.of(TRIAL, tmp_path)
    assert (remains.attempt, remains.result, remains.log_tail) == (10, None, "last words")
    assert remains.checkpoint is not None and remains.checkpoint.endswith(".a9/checkpoint.safetensors")
    assert evidence.of(TrialId(STUDY, 1), tmp_path) == recovery.Remains()


def test_a_torn_result_is_no_result(tmp_path: Path) -> None:
    """Half a line is not a result; the attempt counts as lost."""
    folder_of(tmp_path, 1, result__json='{"type": "result", "resu')
    assert recovery.Evidence().of(TRIAL, tmp_path).result is None


def test_kills_are_found_in_the_hosts_journal(tmp_path: Path) -> None:
    """A kill that was carried out is evidence; one that was only intended or was called off is not."""
    registry, folder = HostRegistry(tmp_path / "host"), folder_of(tmp_path, 1)
    evidence = recovery.Evidence(registry=registry)
    story: dict[str, Any] = {"attempt": f"{TRIAL}/1", "pid": 1, "rule": "stalled", "reason": "stalled"}
    registry.record("k1", "intent", 1.0, folder=str(folder), **story)
    assert evidence.of(TRIAL, tmp_path).kill is None
    registry.record("k1", "term", 2.0)
    found = evidence.of(TRIAL, tmp_path).kill
    assert found is not None and (found.kill_id, found.reason) == ("k1", ExitReason.STALLED)
    registry.record("k1", "aborted", 3.0)
    assert evidence.of(TRIAL, tmp_path).kill is None
    registry.record("k2", "intent", 4.0, folder="/another/run", **story)
    registry.record("k2", "kill", 5.0)
    assert evidence.of(TRIAL, tmp_path).kill is None, "an attempt of the same name in another run"


@pytest.mark.parametrize(
    ("steps", "counts"), [("intent", False), ("intent aborted", False), ("intent recheck term", True)]
)
def test_a_story_of_a_kill_counts_once_a_signal_was_sent(tmp_path: Path, steps: str, counts: bool) -> None:
    """The story lies in the attempt's folder from the intent on: called off, it has ended nobody, and costs nothing."""
    told = [{"step": step, "at": at, "seconds": 7.0} for at, step in enumerate(steps.split())]
    folder_of(tmp_path, 1, kill__json={"kill_id": "k", "rule": "stalled", "reason": "stalled", "steps": told})
    remains = recovery.Evidence().of(TRIAL, tmp_path)
    assert (remains.kill is not None and remains.kill.seconds == 7.0) is counts
    verdict = recovery.decide(left(), remains, POLICY)
    assert isinstance(verdict, TellTrial if counts else EnqueueRetry)


def test_a_process_that_outlived_its_driver_is_ended_first(tmp_path: Path) -> None:
    """The trial is given away only once its old process is gone, and nothing else is killed."""
    registry, folder = HostRegistry(tmp_path / "host"), folder_of(tmp_path, 1)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        for process, born in ((child, vitals.start_time(child.pid)), (bystander, 1.0)):
            registry.register(
                Registration(
                    attempt=f"{TRIAL}/1",
                    slug=folder.name,
                    pid=process.pid,
                    start_time=born or 0.0,
                    reservation_bytes=1,
                    folder=str(folder),
                )
            )
        evidence = recovery.Evidence(registry=registry, start_time=_unless_reaped(child))
        verdict = recovery.settle(left(folder=str(tmp_path)), evidence, POLICY)
        assert isinstance(verdict, EnqueueRetry) and verdict.reason == "lost"
        assert child.wait(10) == -9
        assert bystander.poll() is None, "its number was registered, but it was born at another time"
    finally:
        for process in (child, bystander):
            process.kill()
            process.wait()


OWN = ".a1/checkpoint.safetensors"
LOST = Outcome(reason=ExitReason.LOST, detail="its worker is gone", checkpoint="/before")


@pytest.mark.parametrize(
    ("files", "attempt", "reason", "checkpoint"),
    [
        (
            {"result.json": result(), "checkpoint.safetensors": "x"},
            1,
            ExitReason.COMPLETED,
            ".a1/checkpoint.safetensors",
        ),
        ({"result.json": ERROR}, 1, ExitReason.FAILED, "/before"),
        ({"kill.json": KILL.to_json()}, 1, ExitReason.STALLED, "/before"),
        ({"checkpoint.safetensors": "x"}, 1, ExitReason.LOST, OWN),
        ({"result.json": result()}, 2, ExitReason.LOST, "/before"),
    ],
    ids=["it had finished", "it had failed", "it was killed", "nothing of it but a checkpoint", "another attempt's"],
)
def test_how_an_attempt_that_was_lost_really_ended(
    files: dict[str, Any], attempt: int, reason: ExitReason, checkpoint: str, tmp_path: Path
) -> None:
    """A living driver reads its folder: what it had done is not done again, and it goes on from its checkpoint."""
    folder_of(tmp_path, 1, **files)
    outcome = recovery.recover(AttemptId(TRIAL, attempt), LOST, recovery.Evidence(), tmp_path)
    assert outcome.reason is reason
    assert outcome.checkpoint is not None and outcome.checkpoint.endswith(checkpoint)


def test_a_lost_attempt_on_another_hosts_disk_stays_lost(tmp_path: Path) -> None:
    """Nothing can be read of it here."""
    assert recovery.recover(AttemptId(TRIAL, 1), LOST, recovery.Evidence(), tmp_path / "elsewhere") == LOST


def test_a_lost_attempt_that_still_trains_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a moment to write its result, then it is ended: it is given away, and must not train twice."""
    monkeypatch.setattr(recovery, "RECOVER_GRACE_S", 0.0)
    registry, folder = HostRegistry(tmp_path / "host"), folder_of(tmp_path, 1, checkpoint__safetensors="x")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as child:
        registry.register(
            Registration(
                attempt=f"{TRIAL}/1",
                slug=folder.name,
                pid=child.pid,
                start_time=vitals.start_time(child.pid) or 0.0,
                reservation_bytes=1,
                folder=str(folder),
            )
        )
        evidence = recovery.Evidence(registry=registry, start_time=_unless_reaped(child))
        outcome = recovery.recover(AttemptId(TRIAL, 1), LOST, evidence, tmp_path)
        assert child.wait(10) == -9
    assert outcome.reason is ExitReason.LOST
    assert outcome.checkpoint is not None and outcome.checkpoint.endswith(".a1/checkpoint.safetensors")


def _unless_reaped(child: subprocess.Popen[bytes]) -> Any:
    """`vitals.start_time`, reaping the child as init would: a zombie still has its number."""

    def start_time(pid: int) -> float | None:
        child.poll()
        return vitals.start_time(pid)

    return start_time


def test_resume_settles_and_runs_nothing_twice(tmp_path: Path) -> None:
    """A driver died with a finished, a killed, a lost and an unlaunched trial: each ends as the rule says, once."""
    file = tmp_path / "study.db"
    first = store_at(file, folder=tmp_path)
    first.open(spec(), ARCHITECTURES)
    done, lost, killed, unlaunched = (ask(first).trial for _ in range(4))
    first.close()
    for trial, files in (
        (done, {"result.json": result()}),
        (lost, {"checkpoint.safetensors": "x"}),
        (killed, {"kill.json": KILL.to_json()}),
    ):
        folder = tmp_path / "attempts" / AttemptId(trial, 1).slug
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
    for owner in ("driver2", "driver3"):  # the second resume finds nothing left to do
        store = store_at(file, owner=owner, folder=tmp_path)
        opened = recovery.resume(store, spec(), ARCHITECTURES, evidence=recovery.Evidence(), policy=POLICY)
        assert (opened.counted, opened.waiting, list(opened.left)) == (2, 2, [])
        assert states(file) == ["COMPLETE", "FAIL", "PRUNED", "FAIL", "WAITING", "WAITING"]
        rows = store.rows(STUDY)
        assert [row.get("retried") for row in rows] == [None, 4, None, 5, None, None]
        assert rows[4]["resume_from"].endswith("checkpoint.safetensors") and rows[4]["attempt"] == 2
        assert rows[5]["attempt"] == 1 and rows[5]["retry_of"] == unlaunched.number
        store.close()
