"""What a driver and an agent say to each other, each in a letter of its own: orders one way, reports the other.

Covers the letters and their JSON form. What carries them is `model.frames`, and numbers them `model.mailbox`; what a
trial process says is `model.messages`, and is reported as it was understood. `attempt` is `str(AttemptId)` everywhere:
an agent knows an attempt by that name and nothing more of it. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.model import messages
from scheduler.model.fields import BadMessage, fields_of, read, shown
from scheduler.model.memory import Pressure, WorkerFacts
from scheduler.model.messages import Last, PassedOn, Task
from scheduler.model.outcome import KillRecord, Outcome
from scheduler.model.plain import line
from scheduler.model.study import Json

# -- orders: from the driver to an agent ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Run this attempt; its end is an Ended."""

    task: Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Have the attempt checkpoint and leave. reason: "prune", "drain" or "timeout"."""

    attempt: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """End the attempt's processes now."""

    attempt: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """The ledger holds another amount for the attempt."""

    attempt: str
    reserved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the study says to a call of the attempt's. body: {"value": ...} or {"error": text, "kind": class}."""

    attempt: str
    number: int
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dismiss:
    """The driver leaves, and so must the agent."""

    reason: str


Order = Launch | Stop | End | Resize | Answer | Dismiss

# -- reports: from an agent to the driver -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Trials can run here, as one trial process has shown. facts: their address is the name that the driver gives."""

    facts: WorkerFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """It takes no further attempt, or is out of reach, or gone."""

    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """No trial can run there; it tries again by itself."""

    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryRemade:
    """Somebody removed the host's registry; it was made again."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """The host at this moment; whoever misses it misses nothing. used_bytes, peak_bytes, step_s: by attempt.

    available_bytes: None when the probe failed. closed_reason: why nothing may start here. others_unclaimed_bytes:
    promised to other runs' attempts and not yet taken.
    swap_used_bytes: None where the host has no swap. step_s: the longest pause between two signs of life lately.
    ticks: steps so far.
    tree_bytes: of all our processes there.
    """

    available_bytes: int | None
    swap_used_bytes: int | None = None
    closed_reason: str | None = None
    pressure: Pressure = Pressure.NORMAL
    others_unclaimed_bytes: int = 0
    used_bytes: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    step_s: Mapping[str, float] = field(default_factory=dict)
    ticks: Mapping[str, int] = field(default_factory=dict)
    tree_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted:
    """The checkpoint that the attempt was to go on from cannot be read. checkpoint: the older one it goes on from."""

    attempt: str
    checkpoint: str | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSaid:
    """What the driver must know of what a trial has said; its peak is that of the whole tree. pid: of its process."""

    attempt: str
    message: PassedOn
    pid: int | None = None

    def to_json(self) -> Json:
        return {"attempt": self.attempt, "pid": self.pid, "message": messages.to_json(self.message)}

    @classmethod
    def from_json(cls, data: Any) -> TrialSaid:
        """Read what `to_json` made. Raises BadMessage."""
        given = read(_Said, data)
        message = messages.parse(given.message)
        if isinstance(message, Last):
            raise BadMessage("the end of a trial is told as an outcome")
        return cls(attempt=given.attempt, pid=given.pid, message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class WouldKill:
    """What the watchdog would have done, were it not only to observe."""

    attempt: str
    kill: KillRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The attempt's processes are gone and its memory is back."""

    attempt: str
    outcome: Outcome


Report = Joined | Left | Broken | RegistryRemade | Vitals | Restarted | TrialSaid | WouldKill | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """A letter that could not be read; it never travels. kind: the word it came under. attempt: of an end."""

    kind: str
    error: str
    ended: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    attempt: str
    message: Mapping[str, Any]
    pid: int | None = None


_WORDS: dict[type, str] = {
    Launch: "launch",
    Stop: "stop",
    End: "kill",
    Resize: "resize",
    Answer: "answer",
    Dismiss: "dismiss",
    Joined: "joined",
    Left: "left",
    Broken: "broken",
    RegistryRemade: "registry",
    Vitals: "vitals",
    Restarted: "restarted",
    TrialSaid: "said",
    WouldKill: "would_kill",
    Ended: "ended",
}
_ORDERS = {_WORDS[kind]: kind for kind in (Launch, Stop, End, Resize, Answer, Dismiss)}
_REPORTS = {word: kind for kind, word in _WORDS.items() if word not in _ORDERS}


def is_droppable(report: Report) -> bool:
    """Tell what a driver that was away for long can do without, when thousands wait: the outcome has the rest."""
    if isinstance(report, TrialSaid):
        return isinstance(report.message, messages.Progress | messages.Saved | messages.Note)
    return isinstance(report, WouldKill)


def may_lie(report: Report) -> bool:
    """Tell what nobody waits for: it may be carried a moment later, with what comes meanwhile."""
    return isinstance(report, TrialSaid) and not isinstance(report.message, messages.Called)


def to_json(letter: Order | Report) -> Json:
    """Return the letter as JSON; `order` and `report` are the inverses."""
    body = letter.to_json() if isinstance(letter, TrialSaid) else fields_of(letter)
    return {"type": _WORDS[type(letter)], **body}


def order(data: Mapping[str, Any]) -> Order:
    """Read an order. Raises BadMessage for what is none."""
    found: Order = _read(_ORDERS, data)
    return found


def report(data: Mapping[str, Any]) -> Report | Unread:
    """Read a report, or say what can be said of one that is none. Raises nothing."""
    try:
        found: Report = _read(_REPORTS, data)
    except BadMessage as error:
        return Unread(kind=line(data.get("type"), 40), error=line(error, 200), ended=ended(data))
    return found


def ended(data: Mapping[str, Any]) -> str | None:
    """Return the attempt whose end a report tells, whatever else can be read of it; None for any other report."""
    attempt = data.get("attempt") if data.get("type") == _WORDS[Ended] else None
    return attempt if isinstance(attempt, str) else None


def launched(data: Mapping[str, Any]) -> str | None:
    """Return the attempt that an order which cannot be read was to launch, None where it was none."""
    task = data.get("task")
    attempt = task.get("attempt") if data.get("type") == _WORDS[Launch] and isinstance(task, Mapping) else None
    return attempt if isinstance(attempt, str) else None


def _read(kinds: Mapping[str, type], data: Mapping[str, Any]) -> Any:
    word = data.get("type")
    kind = kinds.get(word) if isinstance(word, str) else None
    if kind is None:
        raise BadMessage(f"a letter of the unknown kind {shown(word)}")
    return TrialSaid.from_json(data) if kind is TrialSaid else read(kind, data)
