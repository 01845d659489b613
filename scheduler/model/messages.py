"""What an agent and a trial process say to each other: typed, of one version, and bounded where it enters.

Covers the messages of both directions, their JSON form and their parser. What a trial says and does not parse raises
BadMessage and is dropped by whoever reads: a user's code can write to the same pipe and the same files, and nothing it
writes may end the agent, its worker or the driver. The other side is `training.protocol`, which may not import this
and is held equal by a test. How the lines travel is `worker.trial_process`; what agent and driver say is
`model.letters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.fields import BadMessage, check_protocol, fields_of, finite, read
from scheduler.model.plain import WIDEST, line, plain, text
from scheduler.model.study import Json

PROTOCOL = 1
LAST_STEP = 2**31 - 1  # what a study's database holds
LARGEST_BYTES = 2**50  # no process has a peak of a PiB
MAX_PATH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What every message may tell of memory: the process's own peak so far, and what it holds of its device."""

    peak_bytes: int | None = None
    device_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Memory):
    """It has its task and its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Memory):
    """An epoch ended. step: 0 to LAST_STEP. value: finite."""

    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked(Memory):
    """It came forward. n: how many optimizer steps, or whatever it counts."""

    n: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled(Memory):
    """Memory is flat from here on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Memory):
    """A checkpoint is durable at `path`."""

    path: str
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Memory):
    """Something for whoever watches the run, on one line."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Called(Memory):
    """A trial that asks while it runs wants something of its study. number: of the answer, 0 when none is awaited."""

    method: str
    number: int = 0
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Last(Memory):
    """The end: a result, or an error. It is durable (`result.json`) before it is sent.

    result: the objective's own mapping, None after an error. error: one line. started: False when the objective never
    ran (it cannot be imported, the folder cannot be made). no_room: the error is a disk that is full or gone, or a
    process that was not to be had. asked: the reason it was asked to leave for, None when it was not.
    children_peak_bytes: the largest peak of a process it has waited for. environment, runtime_bytes: what the process
    was and held when it was ready. fatal: the error is one that ends the study.
    """

    result: Mapping[str, Any] | None = None
    error: str = ""
    traceback: str | None = None
    started: bool = True
    no_room: bool = False
    fatal: bool = False
    asked: str | None = None
    duration_s: float = 0.0
    device_peak_bytes: int | None = None
    children_peak_bytes: int | None = None
    environment: str | None = None
    runtime_bytes: int | None = None


PassedOn = Started | Progress | Ticked | Settled | Saved | Note | Called  # the end is told as an outcome
TrialMessage = PassedOn | Last

_WORDS: dict[type, str] = {
    Started: "started",
    Progress: "progress",
    Ticked: "tick",
    Settled: "settled",
    Saved: "checkpoint",
    Note: "note",
    Called: "call",
}


def to_json(message: PassedOn) -> Json:
    """Return the message as the trial says it; `parse` is the inverse."""
    return {"type": _WORDS[type(message)], **fields_of(message)}


# -- how it begins ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The accelerator that torch sees there: "cuda" or "mps", and its memory (for Metal what it can safely hold)."""

    kind: str
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """It has imported what it needs and waits for its task.

    environment: what it runs in (`model.Environment.name`). rss_bytes: what it holds now.
    """

    environment: str | None = None
    rss_bytes: int | None = None
    device: Device | None = None


def ready(message: Mapping[str, Any]) -> Ready | None:
    """Return the message by which a trial process says that it is ready, None for any other.

    Raises BadMessage for one of another version, or with a field that is none.
    """
    if message.get("type") != "ready":
        return None
    check_protocol("the trial process", message.get("protocol"), PROTOCOL)
    return read(Ready, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One attempt, as the driver orders it and the trial process gets it.

    attempt: `str(AttemptId)`. objective: `module:function` that is called with the task; function: what that calls,
    where it is the user's. folder: the attempt's own. resume_from: the newest checkpoint, None to begin at the start;
    older: those to fall back on where it cannot be read. reserved_bytes: what the ledger holds for it, which is none of
    the trial's business. retries: of its trial, spent so far; ran_s: in attempts before this one. ahead: what the trial
    is answered before it asks. is_guess: nobody has promised those bytes. least_bytes: where other runs hold some of
    them, with how many left it may start; None: with all.
    """

    attempt: str
    objective: str
    params: Mapping[str, Any]
    context: Mapping[str, Any]
    folder: str
    reserved_bytes: int
    resume_from: str | None = None
    older: tuple[str, ...] = ()
    threads: int = 1
    retries: int = 0
    ran_s: float = 0.0
    function: str | None = None
    ahead: Mapping[str, Any] = field(default_factory=dict)
    is_guess: bool = False
    least_bytes: int | None = None

    def to_json(self) -> Json:
        return {"protocol": PROTOCOL, **fields_of(self)}

    def for_trial(self) -> Json:
        """Return the line that the trial process gets."""
        return {name: value for name, value in self.to_json().items() if name != "reserved_bytes"}

    @classmethod
    def from_json(cls, data: Any) -> Task:
        """Return the inverse of `to_json`. Raises BadMessage."""
        if isinstance(data, Mapping):
            check_protocol("whoever wrote this task", data.get("protocol"), PROTOCOL)
        return read(cls, data)


# -- what it is told while it runs ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTrial:
    """Finish the step, write a checkpoint, leave. reason: "prune", "drain", "timeout", ..."""

    reason: str

    def to_json(self) -> Json:
        return {"cmd": "stop", "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerTrial:
    """What the study says to a call of this number. body: {"value": ...} or {"error": text, "kind": class}."""

    number: int
    body: Mapping[str, Any]

    def to_json(self) -> Json:
        return {**self.body, "cmd": "answer", "number": self.number}


ToTrial = StopTrial | AnswerTrial


# -- reading what it says ---------------------------------------------------------------------------------------------


def parse(message: Mapping[str, Any]) -> TrialMessage:
    """Parse a message, every field of its type and bounded. Raises BadMessage; nothing else, whatever is handed in."""
    memory = {name: _bytes(message.get(name)) for name in ("peak_bytes", "device_bytes")}
    match message.get("type"):
        case "started":
            return Started(**memory)
        case "progress":
            return Progress(step=_step(message.get("step")), value=_number("value", message.get("value")), **memory)
        case "tick":
            return Ticked(n=n if isinstance(n := message.get("n"), int) and 0 <= n < WIDEST else 0, **memory)
        case "settled":
            return Settled(**memory)
        case "checkpoint":
            return Saved(path=_path(message.get("path")), step=_step(message.get("step", 0)), **memory)
        case "note":
            return Note(text=line(message.get("text", "")), **memory)
        case "call":
            return _call(message, memory)
        case "result" | "error":
            return last(message)
    raise BadMessage(f"a message of the unknown type {line(message.get('type'), 80)!r}")


def last(message: Mapping[str, Any]) -> Last:
    """Parse a final message. Raises BadMessage for one that is none."""
    kind, found = message.get("type"), message.get("result")
    if kind == "result" and not isinstance(found, Mapping):
        raise BadMessage(f"a result that is no mapping: {line(found, 80)!r}")
    if kind not in ("result", "error"):
        raise BadMessage(f"no final message: {line(kind, 80)!r}")
    trace, asked, duration_s = message.get("traceback"), message.get("asked"), message.get("duration_s")
    return Last(
        result=plain(found) if kind == "result" else None,
        error=line(message.get("error", "")) if kind == "error" else "",
        traceback=text(trace) if trace else None,
        started=message.get("started") is not False,
        no_room=message.get("no_room") is True,
        fatal=message.get("fatal") is True,
        asked=line(asked, 40) if asked else None,
        duration_s=number if (number := finite(duration_s)) is not None and number >= 0 else 0.0,
        peak_bytes=_bytes(message.get("peak_bytes")),
        device_peak_bytes=_bytes(message.get("device_peak_bytes")),
        children_peak_bytes=_bytes(message.get("children_peak_bytes")),
        environment=text(environment, 500) if isinstance(environment := message.get("environment"), str) else None,
        runtime_bytes=_bytes(message.get("runtime_bytes")),
    )


def _call(message: Mapping[str, Any], memory: Mapping[str, int | None]) -> Called:
    number, arguments = message.get("number", 0), message.get("arguments")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < WIDEST:
        raise BadMessage(f"a call of the number {line(plain(number), 40)!r}")
    if not isinstance(arguments, Mapping):
        raise BadMessage(f"a call with arguments that are no mapping: {line(arguments, 80)!r}")
    return Called(method=line(message.get("method"), 40), number=number, arguments=plain(arguments), **memory)


def _number(name: str, value: Any) -> float:
    if (found := finite(value)) is None:
        raise BadMessage(f"{name} {line(value, 80)!r} is no finite number")
    return found


def _step(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LAST_STEP:
        raise BadMessage(f"step {line(plain(value), 80)!r} is no whole number from 0 to {LAST_STEP}")
    return value


def _bytes(value: Any) -> int | None:
    """Memory is told beside what a message is about: a number that cannot be one is left out, the message stays."""
    found = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_BYTES
    return value if found else None


def _path(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_PATH or text(value, MAX_PATH) != value or "\n" in value:
        raise BadMessage(f"path {line(value, 200)!r} is no path that can be passed on")
    return value
