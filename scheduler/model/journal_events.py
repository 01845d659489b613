"""The names of what a run's journal tells: one line each in `journal.jsonl`, and in the log.

Names are constant and dotted, and stay: people filter by them, and a restart reads some of them back
(`driver.decisions`). The table in `scheduler/README.md` is made from this file, held equal by a test. Pure.
"""

from __future__ import annotations

import enum


class JournalEvent(enum.StrEnum):
    """What happened; `meaning` says it for people."""

    meaning: str

    def __new__(cls, name: str, meaning: str) -> JournalEvent:
        member = str.__new__(cls, name)
        member._value_, member.meaning = name, meaning
        return member

    BATCH_STARTED = "batch.started", "a driver began, for the first time or again"
    BATCH_QUIT = "batch.quit", "somebody, or a loss, asked it to stop"
    BATCH_DRAINING = "batch.draining", "running trials have so long to checkpoint and leave"
    BATCH_FORECAST = (
        "batch.forecast",
        "when it will end: low, middle and high, four times in five between the outer two",
    )
    BATCH_NO_FORECAST = (
        "batch.no_forecast",
        "the forecast failed and is left out from here on; trials are not concerned",
    )
    HOOK_FAILED = "hook.failed", "a command of --on-kill or --on-end failed, hung or could not be started"
    BATCH_ENDED = "batch.ended", "the driver leaves, with this exit code"
    JOURNAL_TORN = "journal.torn", "the last line of the journal was cut off, by a power cut or a full disk"
    RUN_FILES_LOST = "run.files_lost", "the run folder or the study's database was removed, moved or replaced"
    DASHBOARD_READY = "dashboard.ready", "where the dashboard is"
    DASHBOARD_NO_PAGE = "dashboard.no_page", "the page /headroom cannot be shown, and why"

    STUDY_REFUSED = "study.refused", "a study of the plan cannot run, and why"
    STUDY_OPENED = "study.opened", "a study is open; so many of its trials count already"
    STUDY_NOTE = "study.note", "something to know of a study, found when it was opened"
    STUDY_ASK_FAILED = "study.ask_failed", "the search space or the sampler raised"
    STUDY_STOPPING = "study.stopping", "a trial, a callback or the sampler said that the study is to end"
    STUDY_CLOSED = "study.closed", "no further trial of it starts; early: before its quota"
    STUDY_UNAVAILABLE = "study.unavailable", "the database does not answer; what is to be written waits"
    STUDY_AVAILABLE = "study.available", "it answers again"
    STUDY_NOT_OURS = "study.not_ours", "another driver has taken this trial over"
    STUDY_REJECTED = "study.rejected", "the database refuses this for good, and why"
    STUDY_TAKEOVER = "study.takeover", "a dead driver's trial is settled by this one"

    TRIAL_ASKED = "trial.asked", "a trial was sampled, with this predicted footprint"
    TRIAL_DEFERRED = "trial.deferred", "it waits, for this reason (told when the reason changes)"
    TRIAL_RESHAPED = "trial.reshaped", "it runs in a form that needs less memory, since there is room for that now"
    TRIAL_CALL_FAILED = "trial.call_failed", "what a running trial told its study was refused"
    TRIAL_ENDED = "trial.ended", "its final state is decided; durable before the study hears of it"
    TRIAL_REQUEUED = "trial.requeued", "it will be run again as another trial, from its checkpoint; durable likewise"
    TRIAL_TOLD = "trial.told", "the study holds its final state"
    TRIAL_TAKEN = "trial.taken", "it has its final state from somebody else"

    ATTEMPT_LAUNCHED = "attempt.launched", "an attempt was sent to a worker, with this reservation"
    ATTEMPT_STARTED = "attempt.started", "its process has its task"
    ATTEMPT_RESTARTED = "attempt.restarted", "the checkpoint it was to go on from cannot be read there"
    ATTEMPT_PROGRESS = "attempt.progress", "an epoch ended"
    ATTEMPT_NOTE = "attempt.note", "something the trial, or its agent, has to say"
    ATTEMPT_STOPPING = "attempt.stopping", "it is asked to checkpoint and leave"
    ATTEMPT_KILLING = "attempt.killing", "its processes are ended"
    ATTEMPT_ENDED = "attempt.ended", "all of an attempt in one line: reason, value, peak, prediction, durations"
    RESERVATION_RESIZED = "reservation.resized", "the ledger holds another amount for it"
    WATCHDOG_WOULD_KILL = "watchdog.would_kill", "what the watchdog would have done, were it not only to observe"

    WORKER_JOINED = "worker.joined", "an agent is ready, with what its host has"
    WORKER_LEFT = "worker.left", "it is out of reach, leaving or gone"
    WORKER_BROKEN = "worker.broken", "no trial can run there; it tries again by itself"
    WORKER_UNUSABLE = "worker.unusable", "a Dask worker is left alone, and why"
    WORKER_NONE = "worker.none", "no worker has been in reach for so long"
    HOST_CLOSED = "host.closed", "nothing starts on it, and why"
    HOST_OPENED = "host.opened", "trials may start on it again"
    REGISTRY_REMADE = "registry.remade", "the host's registry was removed, and made again"
    MESSAGE_DROPPED = "message.dropped", "a letter of an agent could not be read (told once per kind)"

    CLUSTER_DISCONNECTED = "cluster.disconnected", "the Dask scheduler is gone; attempts are held for so long"
    CLUSTER_BACK = "cluster.back", "it is there again"
    CLUSTER_REBUILT = "cluster.rebuilt", "our own cluster was made anew"
    CLUSTER_LOST = "cluster.lost", "it did not come back: the run ends, and can be resumed"


def table() -> list[str]:
    """Return the rows of the table in the docs."""
    return [f"| `{event}` | {event.meaning} |" for event in JournalEvent]
