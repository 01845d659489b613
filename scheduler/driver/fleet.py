"""The driver's agents: which there are, how each is reached now, and which attempt is held by whom.

An agent is a place where attempts run; it may be out of reach for a while (its Dask worker, the scheduler or the
network is gone) and comes back with everything it held. So an attempt is lost only with its agent: when that is known
to be dead, or was not heard of for longer than it holds its attempts. Covers that judgement, the letters both ways, and
the end of each attempt, reported exactly once. Carries nothing itself and knows neither memory nor studies.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from scheduler.host.agent_folder import Lives, ProcessIdentity, identity
from scheduler.model import ExitReason, Json, Outcome
from scheduler.model.mailbox import Inbox, Letter, Outbox
from scheduler.model.messages import Task

PING_EVERY_S = 5.0
SILENT_S = 30.0  # an agent speaks once a second: its Dask worker hangs, whatever the scheduler says
UNHEARD_S = 5.0  # the same for one that was told to end attempts
PAUSE_S = 10.0  # between two ticks that are a second apart: the driver itself was stopped or suspended
GRACE_S = 15.0  # an agent that holds no longer asks its attempts to leave, and then is not waited for

OnEnd = Callable[[str, Outcome], None]
OnMessage = Callable[[Json], None]


class Carrier(Protocol):
    """What carries frames: `cluster.client.Cluster`."""

    def send(self, worker: str, agent: str, frame: Json) -> None: ...
    def occupy(self, attempt: str, worker: str) -> None: ...
    def vacate(self, attempt: str) -> None: ...


@dataclass(slots=True, kw_only=True)
class _Agent:
    """One agent. via: the Dask worker that carries for it, None while it is out of reach. away_since: since when.

    joined: its message of that kind, told again whenever it comes back. leaving: it takes no further attempt. ending:
    attempts that are not waited for when it is out of reach, and why.
    """

    id: str
    name: str
    process: ProcessIdentity | None
    via: str | None = None
    away_since: float | None = None
    sent_at: float = 0.0
    heard_at: float = 0.0
    outbox: Outbox = field(default_factory=Outbox)
    inbox: Inbox = field(default_factory=Inbox)
    joined: Json | None = None
    leaving: bool = False
    attempts: set[str] = field(default_factory=set)
    ending: dict[str, str] = field(default_factory=dict)


class Fleet:
    """All agents of one driver. May be called from any thread.

    on_message: takes what agents say, with `worker` = the agent's name, and `left` when one is out of reach.
    on_end: takes the end of an attempt, once. hold_s: how long an agent out of reach holds its attempts.
    lives: as `vitals.lives`, to know of an agent on this host that it is dead. clock: monotonic seconds.
    """

    def __init__(
        self,
        carrier: Carrier,
        *,
        on_message: OnMessage,
        on_end: OnEnd,
        hold_s: float,
        lives: Lives,
        clock: Callable[[], float],
    ) -> None:
        self._carrier, self._hold_s, self._lives, self._clock = carrier, hold_s, lives, clock
        self._on_message, self._on_end = on_message, on_end
        self._agents: dict[str, _Agent] = {}
        self._names: dict[str, str] = {}  # name -> id
        self._gone: set[str] = set()
        self._where: dict[str, str] = {}  # attempt -> id
        self._ticked_at = clock()
        self._lock = threading.RLock()

    # -- what the driver wants ----------------------------------------------------------------------------------------

    def launch(self, task: Task, name: str) -> None:
        """Run an attempt at this agent; its end comes through `on_end`."""
        attempt = task.attempt
        with self._lock:
            agent = self._named(name)
            if agent is not None:
                agent.attempts.add(attempt)
                self._where[attempt] = agent.id
                self._post(agent, {"verb": "launch", "task": task.to_json()})
                if agent.via is not None:
                    self._carrier.occupy(attempt, agent.via)
        if agent is None:
            self._on_end(attempt, Outcome(reason=ExitReason.LOST, detail=f"{name} is gone"))

    def tell(self, name: str, verb: str, attempt: str, value: Any) -> None:
        """Say something about an attempt to its agent. One that is out of reach hears it when it is back."""
        with self._lock:
            if (agent := self._named(name)) is not None:
                self._post(agent, {"verb": verb, "attempt": attempt, "value": value})

    def give_up(self, attempt: str, why: str) -> None:
        """Do not wait for an attempt that was told to end if its agent is, or gets, out of reach: it is lost then."""
        with self._lock:
            if (agent := self._agents.get(self._where.get(attempt, ""))) is not None:
                agent.ending[attempt] = why
                if agent.via is None:
                    self._end_unheard(agent)

    def dismiss(self, why: str) -> None:
        """Tell all agents that the driver leaves: nothing is held for it any more."""
        with self._lock:
            for agent in self._agents.values():
                self._post(agent, {"verb": "dismiss", "attempt": "", "value": why})

    @property
    def in_reach(self) -> int:
        """How many agents are in reach and take attempts."""
        with self._lock:
            return sum(agent.via is not None and not agent.leaving for agent in self._agents.values())

    # -- what happens -------------------------------------------------------------------------------------------------

    def heard(self, worker: str, text: str) -> None:
        """Take a frame of an agent, carried by this Dask worker. One that cannot be read is dropped: it is said
        again."""
        try:
            frame = json.loads(text)
            agent_id = frame.get("agent")
        except (ValueError, AttributeError, RecursionError):
            return
        if agent_id is None:
            if "broken" in frame:
                self._on_message({"type": "broken", "worker": worker, "detail": str(frame["broken"])})
            return
        if not isinstance(agent_id, str):
            return
        with self._lock:
            agent = self._known(agent_id, frame.get("hello"))
            if agent is None:
                return
            if "bye" in frame:
                self._lose(agent, str(frame["bye"]))
                return
            self._reached(agent, worker)
            self._read(agent, frame)

    def worker_left(self, worker: str) -> None:
        """Note that a Dask worker is gone; what it carried for may come back by way of another."""
        with self._lock:
            for agent in list(self._agents.values()):
                if agent.via == worker:
                    self._out_of_reach(agent)

    def disconnected(self) -> None:
        """Count every agent as out of reach: the scheduler is gone, and with it every way to them."""
        with self._lock:
            for agent in list(self._agents.values()):
                if agent.via is not None:
                    self._out_of_reach(agent)

    def tick(self) -> None:
        """Once a second: a sign of life to every agent, what was not acknowledged again, and who is lost."""
        now = self._clock()
        with self._lock:
            paused_s = now - self._ticked_at if now - self._ticked_at > PAUSE_S else 0.0
            self._ticked_at = now
            for agent in list(self._agents.values()):
                agent.heard_at += paused_s  # what was said meanwhile is only now being read
                if agent.away_since is not None:
                    agent.away_since += paused_s
                self._judge(agent, now)

    def _judge(self, agent: _Agent, now: float) -> None:
        if agent.via is not None:
            if now - agent.heard_at > UNHEARD_S:
                self._end_unheard(agent)
            if now - agent.heard_at > SILENT_S:
                self._out_of_reach(agent)
            elif now - agent.sent_at >= PING_EVERY_S:
                self._send(agent, agent.outbox.waiting())
        elif agent.process is not None and agent.process.is_dead(self._lives):
            self._lose(agent, "its process is dead")
        elif agent.away_since is not None and now - agent.away_since > self._hold_s + GRACE_S:
            self._lose(agent, f"nothing heard of it for {now - agent.away_since:.0f} s")

    # -- small things -------------------------------------------------------------------------------------------------

    def _named(self, name: str) -> _Agent | None:
        return self._agents.get(self._names.get(name, ""))

    def _known(self, agent_id: str, hello: Any) -> _Agent | None:
        """Return the agent of this id, a new one with its first hello; None for one that was given up, or never said
        hello."""
        if (agent := self._agents.get(agent_id)) is not None:
            return agent
        name = hello.get("name") if isinstance(hello, dict) else None
        if not isinstance(name, str) or not name or agent_id in self._gone:
            return None
        while name in self._names:
            name += "'"  # the same pid again on a host of the same name
        agent = _Agent(id=agent_id, name=name, process=identity(hello.get("process")))
        self._agents[agent_id], self._names[name] = agent, agent_id
        return agent

    def _reached(self, agent: _Agent, worker: str) -> None:
        agent.heard_at = self._clock()
        if agent.via == worker:
            return
        was_away = agent.away_since is not None
        agent.via, agent.away_since = worker, None
        if was_away and agent.joined is not None and not agent.leaving:
            self._on_message({**agent.joined, "via": worker})
        for attempt in agent.attempts:
            self._carrier.occupy(attempt, worker)
        self._send(agent, agent.outbox.waiting())

    def _out_of_reach(self, agent: _Agent) -> None:
        agent.via, agent.away_since = None, self._clock()
        held = len(agent.attempts)
        detail = f"out of reach; it holds {held} attempts for up to {self._hold_s:.0f} s" if held else "out of reach"
        self._on_message({"type": "left", "worker": agent.name, "detail": detail})
        self._end_unheard(agent)

    def _end_unheard(self, agent: _Agent) -> None:
        for attempt, why in list(agent.ending.items()):
            self._ended(attempt, Outcome(reason=ExitReason.LOST, detail=why))

    def _lose(self, agent: _Agent, why: str) -> None:
        del self._agents[agent.id], self._names[agent.name]
        self._gone.add(agent.id)
        self._on_message({"type": "left", "worker": agent.name, "detail": why})
        for attempt in sorted(agent.attempts):
            self._ended(attempt, Outcome(reason=ExitReason.LOST, detail=f"{agent.name} is gone: {why}"))

    def _read(self, agent: _Agent, frame: Json) -> None:
        if isinstance(number := frame.get("heard"), int):
            agent.outbox.acknowledged(number)
        bodies: list[Json] = []
        letters = frame.get("letters")
        for data in letters if isinstance(letters, list) else ():
            try:
                bodies += agent.inbox.take(Letter.from_json(data))
            except (TypeError, ValueError):
                continue
        for body in bodies:
            self._take(agent, body)
        if bodies and agent.leaving:  # it goes when it knows that everything has arrived
            self._send(agent, agent.outbox.waiting())
        if isinstance(news := frame.get("news"), dict) and not agent.leaving and agent.joined is not None:
            self._on_message({**news, "worker": agent.name})

    def _take(self, agent: _Agent, body: Json) -> None:
        message = {**body, "worker": agent.name}
        match body.get("type"):
            case "joined":
                agent.joined = message = {**message, "via": agent.via}
            case "left":
                agent.leaving = True
            case "ended":
                attempt = str(body.get("attempt"))
                try:
                    outcome = Outcome.from_json(body["outcome"])
                except (KeyError, TypeError, ValueError) as error:
                    outcome = Outcome(reason=ExitReason.LOST, detail=f"its end cannot be read: {error}")
                self._ended(attempt, outcome)
                return
        self._on_message(message)

    def _ended(self, attempt: str, outcome: Outcome) -> None:
        with self._lock:
            if (agent_id := self._where.pop(attempt, None)) is None:
                return  # it was given up before
            if (agent := self._agents.get(agent_id)) is not None:
                agent.attempts.discard(attempt)
                agent.ending.pop(attempt, None)
        self._carrier.vacate(attempt)
        self._on_end(attempt, outcome)

    def _post(self, agent: _Agent, body: Json) -> None:
        letter = agent.outbox.post(body)
        if agent.via is not None:
            self._send(agent, [letter])

    def _send(self, agent: _Agent, letters: list[Letter]) -> None:
        assert agent.via is not None
        agent.sent_at = self._clock()
        frame = {"heard": agent.inbox.heard, "letters": [letter.to_json() for letter in letters]}
        self._carrier.send(agent.via, agent.id, frame)
