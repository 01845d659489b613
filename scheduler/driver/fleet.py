"""The driver's agents: which there are, how each is reached now, and which attempt is held by whom.

An agent is a place where attempts run; it may be out of reach for a while (its Dask worker, the scheduler or the
network is gone) and comes back with everything it held. So an attempt is lost only with its agent: when that is known
to be dead, or was not heard of for longer than it holds its attempts. Covers that judgement, the letters both ways, and
the end of each attempt, reported exactly once. Carries nothing itself and knows neither memory nor studies.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from scheduler.host.agent_folder import Lives, ProcessIdentity, identity
from scheduler.model import ExitReason, Json, Outcome, frames, letters
from scheduler.model.fields import OtherProtocol
from scheduler.model.mailbox import Inbox, Letter, Outbox
from scheduler.model.messages import Task

PING_EVERY_S = 5.0
SILENT_S = 30.0  # an agent speaks once a second: its Dask worker hangs, whatever the scheduler says
UNHEARD_S = 5.0  # the same for one that was told to end attempts
PAUSE_S = 10.0  # between two ticks that are a second apart: the driver itself was stopped or suspended
OCCUPY_AFTER_S = 1.0  # a task of Dask's costs as much as an attempt that does nothing
GRACE_S = 15.0  # an agent that holds no longer asks its attempts to leave, and then is not waited for

OnEnd = Callable[[str, Outcome], None]
OnReport = Callable[[str, letters.Report | letters.Unread], None]


class Carrier(Protocol):
    """What carries frames: `cluster.client.Cluster`."""

    def send(self, worker: str, agent: str, frame: Json) -> None: ...
    def occupy(self, attempt: str, worker: str) -> None: ...
    def vacate(self, attempt: str) -> None: ...


@dataclass(slots=True, kw_only=True)
class _Agent:
    """One agent. via: the Dask worker that carries for it, None while it is out of reach. away_since: since when.

    joined: its message of that kind, told again whenever it comes back. leaving: it takes no further attempt. attempts:
    those it holds, and when each gets a thread of its Dask worker, infinity for one that has. ending: attempts that are
    not waited for when it is out of reach, and why.
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
    joined: letters.Joined | None = None
    leaving: bool = False
    attempts: dict[str, float] = field(default_factory=dict)
    ending: dict[str, str] = field(default_factory=dict)


class Fleet:
    """All agents of one driver. May be called from any thread.

    on_message: takes the agent's name and what it says, and Left when one is out of reach.
    on_end: takes the end of an attempt, once. hold_s: how long an agent out of reach holds its attempts.
    lives: as `vitals.lives`, to know of an agent on this host that it is dead. clock: monotonic seconds.
    """

    def __init__(
        self,
        carrier: Carrier,
        *,
        on_message: OnReport,
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
                agent.attempts[attempt] = self._clock() + OCCUPY_AFTER_S
                self._where[attempt] = agent.id
                self._post(agent, letters.Launch(task=task))
        if agent is None:
            self._on_end(attempt, Outcome(reason=ExitReason.LOST, detail=f"{name} is gone"))

    def tell(self, name: str, order: letters.Order) -> None:
        """Say something about an attempt to its agent. One that is out of reach hears it when it is back."""
        with self._lock:
            if (agent := self._named(name)) is not None:
                self._post(agent, order)

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
                self._post(agent, letters.Dismiss(reason=why))

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
            frame = frames.from_worker(json.loads(text))
        except OtherProtocol as error:
            self._on_message(worker, letters.Broken(detail=str(error)))
            return
        except (ValueError, RecursionError):
            return
        match frame:
            case frames.NoAgent(reason=reason):
                self._on_message(worker, letters.Broken(detail=reason))
            case frames.Bye(agent=agent_id, reason=reason):
                with self._lock:
                    if (agent := self._agents.get(agent_id)) is not None:
                        self._lose(agent, reason)
            case frames.FromAgent():
                with self._lock:
                    if (agent := self._known(frame)) is not None:
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
                self._occupy(agent, now)

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

    def _occupy(self, agent: _Agent, now: float) -> None:
        """Have Dask count a thread as taken by each attempt: it scales down what it takes for idle."""
        if agent.via is None:
            return
        for attempt, due in agent.attempts.items():
            if due <= now:
                agent.attempts[attempt] = math.inf
                self._carrier.occupy(attempt, agent.via)

    # -- small things -------------------------------------------------------------------------------------------------

    def _named(self, name: str) -> _Agent | None:
        return self._agents.get(self._names.get(name, ""))

    def _known(self, frame: frames.FromAgent) -> _Agent | None:
        """Return the agent that says this, a new one by its first hello; None for one that was given up."""
        if (agent := self._agents.get(frame.agent)) is not None:
            return agent
        name = frame.hello.name
        if not name or frame.agent in self._gone:
            return None
        while name in self._names:
            name += "'"  # the same pid again on a host of the same name
        agent = _Agent(id=frame.agent, name=name, process=identity(frame.hello.process))
        self._agents[agent.id], self._names[name] = agent, agent.id
        return agent

    def _reached(self, agent: _Agent, worker: str) -> None:
        agent.heard_at = self._clock()
        if agent.via == worker:
            return
        was_away = agent.away_since is not None
        agent.via, agent.away_since = worker, None
        if was_away and agent.joined is not None and not agent.leaving:
            self._on_message(agent.name, self._named_facts(agent, agent.joined))
        agent.attempts = dict.fromkeys(agent.attempts, 0.0)
        self._occupy(agent, agent.heard_at)
        self._send(agent, agent.outbox.waiting())

    def _out_of_reach(self, agent: _Agent) -> None:
        agent.via, agent.away_since = None, self._clock()
        held = len(agent.attempts)
        detail = f"out of reach; it holds {held} attempts for up to {self._hold_s:.0f} s" if held else "out of reach"
        self._on_message(agent.name, letters.Left(detail=detail))
        self._end_unheard(agent)

    def _end_unheard(self, agent: _Agent) -> None:
        for attempt, why in list(agent.ending.items()):
            self._ended(attempt, Outcome(reason=ExitReason.LOST, detail=why))

    def _lose(self, agent: _Agent, why: str) -> None:
        del self._agents[agent.id], self._names[agent.name]
        self._gone.add(agent.id)
        self._on_message(agent.name, letters.Left(detail=why))
        for attempt in sorted(agent.attempts):
            self._ended(attempt, Outcome(reason=ExitReason.LOST, detail=f"{agent.name} is gone: {why}"))

    def _read(self, agent: _Agent, frame: frames.FromAgent) -> None:
        agent.outbox.acknowledged(frame.heard)
        bodies = [body for letter in frame.letters for body in agent.inbox.take(letter)]
        for body in bodies:
            self._take(agent, letters.report(body))
        if bodies and agent.leaving:  # it goes when it knows that everything has arrived
            self._send(agent, agent.outbox.waiting())
        if frame.news is not None and not agent.leaving and agent.joined is not None:
            self._on_message(agent.name, letters.report(frame.news))

    def _take(self, agent: _Agent, report: letters.Report | letters.Unread) -> None:
        match report:
            case letters.Joined():
                agent.joined = report
                report = self._named_facts(agent, report)
            case letters.Left():
                agent.leaving = True
            case letters.Ended(attempt=attempt, outcome=outcome):
                self._ended(attempt, outcome)
                return
            case letters.Unread(ended=str(attempt), error=error):
                lost = Outcome(reason=ExitReason.LOST, detail=f"its end cannot be read: {error}")
                self._ended(attempt, lost)
                return
        self._on_message(agent.name, report)

    @staticmethod
    def _named_facts(agent: _Agent, joined: letters.Joined) -> letters.Joined:
        return letters.Joined(facts=dataclasses.replace(joined.facts, address=agent.name, via=agent.via or ""))

    def _ended(self, attempt: str, outcome: Outcome) -> None:
        with self._lock:
            if (agent_id := self._where.pop(attempt, None)) is None:
                return  # it was given up before
            if (agent := self._agents.get(agent_id)) is not None:
                agent.attempts.pop(attempt, None)
                agent.ending.pop(attempt, None)
        self._carrier.vacate(attempt)
        self._on_end(attempt, outcome)

    def _post(self, agent: _Agent, order: letters.Order) -> None:
        letter = agent.outbox.post(letters.to_json(order))
        if agent.via is not None:
            self._send(agent, [letter])

    def _send(self, agent: _Agent, posted: list[Letter]) -> None:
        assert agent.via is not None
        agent.sent_at = self._clock()
        mail = frames.Mail(heard=agent.inbox.heard, letters=tuple(posted))
        self._carrier.send(agent.via, agent.id, frames.to_json(mail))
