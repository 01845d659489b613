"""Final decisions as journal lines: what was decided about a trial, so that a restart can still tell the study.

Pure: `write` and `outstanding` are inverses. A decision is outstanding until the line `trial.told` confirms it; all of
them together are the final states (`final_states`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from scheduler.core.attributes import ended_outcome
from scheduler.model import AttemptId, EnqueueRetry, FinalState, Json, Outcome, TellTrial, TrialId
from scheduler.model.journal_events import JournalEvent


def write(command: TellTrial | EnqueueRetry) -> tuple[JournalEvent, Json]:
    """(event name, fields) of the journal line."""
    fields: Json = {"trial": str(command.trial), "attrs": dict(command.attrs)}
    if isinstance(command, TellTrial):
        fields |= {"state": command.state.value, "value": command.value, "constraint": command.constraint}
        fields |= {"values": list(command.values)} if command.values else {}
        return JournalEvent.TRIAL_ENDED, fields
    fields |= {"next_attempt": command.attempt, "resume_from": command.resume_from, "resume_host": command.resume_host}
    fields |= {"reason": command.reason, "retries": command.retries, "ran_s": command.ran_s}
    return JournalEvent.TRIAL_REQUEUED, fields


def outstanding(records: Iterable[Mapping[str, Any]]) -> dict[TrialId, TellTrial | EnqueueRetry]:
    """Decisions in a journal that the study may not have heard of. Lines that do not parse are skipped: such a trial
    is settled from what its attempt left."""
    found: dict[TrialId, TellTrial | EnqueueRetry] = {}
    for record in records:
        try:
            match record["event"]:
                case JournalEvent.TRIAL_ENDED | JournalEvent.TRIAL_REQUEUED:
                    command = _read(record)
                    found[command.trial] = command
                case JournalEvent.TRIAL_TOLD:
                    found.pop(_trial(record), None)
        except (KeyError, ValueError, TypeError):
            continue
    return found


def ends(records: Iterable[Mapping[str, Any]]) -> dict[AttemptId, Outcome | None]:
    """How the attempts of a journal ended; None: they were under way when its driver died."""
    found: dict[AttemptId, Outcome | None] = {}
    for record in records:
        with contextlib.suppress(KeyError, ValueError, TypeError):
            if record["event"] == JournalEvent.ATTEMPT_LAUNCHED:
                found[AttemptId.parse(record["attempt"])] = None
            elif record["event"] == JournalEvent.ATTEMPT_ENDED:
                found[AttemptId.parse(record["attempt"])] = ended_outcome(record)
    return found


def final_states(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Replay a journal: trial -> the final state that the study must show, once its driver has settled.

    What was confirmed goes before what was decided: another driver may have been first.
    """
    found: dict[str, str] = {}
    for record in records:
        match record["event"]:
            case JournalEvent.TRIAL_ENDED | JournalEvent.TRIAL_TOLD:
                found[str(record["trial"])] = str(record["state"])
            case JournalEvent.TRIAL_REQUEUED:
                found[str(record["trial"])] = FinalState.FAIL.value
    return found


def _trial(record: Mapping[str, Any]) -> TrialId:
    study, _, number = str(record["trial"]).rpartition("/")
    return TrialId(study, int(number))


def _read(record: Mapping[str, Any]) -> TellTrial | EnqueueRetry:
    if record["event"] == JournalEvent.TRIAL_ENDED:
        return TellTrial(
            trial=_trial(record),
            state=FinalState(record["state"]),
            value=record["value"],
            values=tuple(float(value) for value in record.get("values") or ()),
            attrs=record["attrs"],
            constraint=record["constraint"],
        )
    return EnqueueRetry(
        trial=_trial(record),
        attempt=record["next_attempt"],
        resume_from=record["resume_from"],
        resume_host=record.get("resume_host"),
        reason=record["reason"],
        retries=record.get("retries", 0),
        ran_s=record.get("ran_s", 0.0),
        attrs=record["attrs"],
    )
