"""What carries letters: the frames on an agent's socket and through Dask, and how an agent is started. Versioned.

A frame of another version is refused in one line that says what is spoken on which side; only that an agent is to leave
is understood in every version, since a driver must be rid of the agents of an older one. How frames travel is
`host.agent_folder` and `cluster`; what the letters say is `model.letters`. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.fields import BadMessage, check_protocol, fields_of, read, shown
from scheduler.model.mailbox import Letter
from scheduler.model.study import Json

PROTOCOL = 1

# -- how an agent begins ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What the driver tells every agent. topic: names the driver; run_id: names the run folder, as long as it exists.
    began_unix: when this driver began; of two drivers of one run the later has it.

    environment: dotted path of the function that gives a trial process its environment; context: its argument.
    driver: its process, as `agent_folder.ProcessIdentity`. away_timeout_s: how long attempts are held for a driver that
    is not heard of. drain_timeout_s: what an attempt has at least to checkpoint and leave.
    reserve_bytes: kept free on each host. dask_limit: the workers' own memory limit is the user's word (a cluster that
    was started by hand), not ours.
    """

    run: str
    topic: str
    run_id: str
    began_unix: float
    driver: Mapping[str, Any]
    away_timeout_s: float
    drain_timeout_s: float
    environment: str
    context: Mapping[str, Any]
    watchdog_mode: str
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    preload: tuple[str, ...] | None = None  # what a warm spare imports; None: what the built-in training needs
    fork: bool = True  # trial processes off a fork server, where that can be
    reserve_bytes: int = 0
    dask_limit: bool = False
    vitals_every_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStart:
    """The line that an agent's process is started with. worker: (pid, start time) of the Dask worker.

    worker_limit_bytes: that worker's own memory limit, None for none.
    """

    id: str
    config: AgentConfig
    slots: int
    worker: tuple[int, float]
    worker_limit_bytes: int | None = None

    def to_json(self) -> Json:
        return {"protocol": PROTOCOL, **fields_of(self)}

    @classmethod
    def from_json(cls, data: Any) -> AgentStart:
        """Read what `to_json` made. Raises BadMessage."""
        if isinstance(data, Mapping):
            check_protocol("whoever starts this agent", data.get("protocol"), PROTOCOL)
        return read(cls, data)


# -- to an agent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """From the driver. heard: it has read every letter of the agent's up to this number."""

    heard: int
    letters: tuple[Letter, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """From a Dask worker: it carries from now on. owner: it has this agent for its own."""

    worker: str
    owner: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """From a Dask worker that is being closed: have the attempts checkpoint and leave."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Discharge:
    """From a Dask worker: the agent's driver is gone, end everything at once."""

    reason: str


ToAgent = Mail | Carrier | Leave | Discharge

# -- from an agent, or from the worker that was to have one -----------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What the driver must know to take an agent for one. process: as `agent_folder.ProcessIdentity`."""

    name: str
    process: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FromAgent:
    """heard: it has read every letter of the driver's up to this number. news: its Vitals, as JSON."""

    agent: str
    hello: Hello
    heard: int
    letters: tuple[Letter, ...] = ()
    news: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    """The agent is gone. for_good: so is its driver, nobody is to take its place."""

    agent: str
    reason: str
    for_good: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NoAgent:
    """The Dask worker has none, because none can be started."""

    reason: str


FromWorker = FromAgent | Bye | NoAgent

_WORDS: dict[type, str] = {
    Mail: "mail",
    Carrier: "carrier",
    Leave: "leave",
    Discharge: "discharge",
    FromAgent: "agent",
    Bye: "bye",
    NoAgent: "no_agent",
}
_TO_AGENT = {_WORDS[kind]: kind for kind in (Mail, Carrier, Leave, Discharge)}
_FROM_WORKER = {_WORDS[kind]: kind for kind in (FromAgent, Bye, NoAgent)}
_IN_ANY_VERSION = (Leave, Discharge, Bye)


def to_json(frame: ToAgent | FromWorker) -> Json:
    """Return the frame as JSON; `to_agent` and `from_worker` are the inverses."""
    return {"protocol": PROTOCOL, "frame": _WORDS[type(frame)], **fields_of(frame)}


def to_agent(data: Any) -> ToAgent:
    """Read a frame that an agent gets. Raises BadMessage, OtherProtocol."""
    found: ToAgent = _read(_TO_AGENT, data, "whoever carries this agent's mail")
    return found


def from_worker(data: Any) -> FromWorker:
    """Read a frame that the driver, or the worker that passes it on, gets. Raises BadMessage, OtherProtocol."""
    found: FromWorker = _read(_FROM_WORKER, data, "an agent")
    return found


def _read(kinds: Mapping[str, type], data: Any, who: str) -> Any:
    if not isinstance(data, Mapping):
        raise BadMessage(f"a frame that is no mapping: {shown(data)}")
    word = data.get("frame")
    kind = kinds.get(word) if isinstance(word, str) else None
    if kind not in _IN_ANY_VERSION:
        check_protocol(who, data.get("protocol"), PROTOCOL)
    if kind is None:
        raise BadMessage(f"a frame of the unknown kind {shown(word)}")
    return read(kind, data)
