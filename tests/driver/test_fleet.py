"""Who holds which attempt: an agent out of reach keeps its attempts, one that is gone loses them, each ends once."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from hypothesis import given

from scheduler.driver.fleet import GRACE_S, PING_EVERY_S, SILENT_S, UNHEARD_S, Fleet
from scheduler.host import vitals
from scheduler.host.agent_folder import ProcessIdentity
from scheduler.model import ExitReason, Json, Outcome
from scheduler.model.mailbox import Inbox, Letter, Outbox
from scheduler.model.plain import plain
from tests import builders as b
from tests.test_seams import ANYTHING

HOLD_S = 600.0
HERE = dataclasses.asdict(ProcessIdentity.own(vitals.start_time))
ELSEWHERE = {**HERE, "boot_id": "another host"}


class Wire:
    """A carrier that hands frames over at once, or loses them while it is cut. An agent stands at its other end."""

    def __init__(self, process: Json | None = None) -> None:
        self.now = 0.0
        self.alive = True
        self.cut = False
        self.sent: list[tuple[str, str]] = []
        self.occupied: dict[str, str] = {}
        self.messages: list[Json] = []
        self.ends: list[tuple[str, Outcome]] = []
        self.outbox, self.inbox = Outbox(), Inbox()
        self.told: list[Json] = []
        self.hello = {"name": "host:1", "process": process or ELSEWHERE}
        self.fleet = Fleet(
            self,
            on_message=self.messages.append,
            on_end=lambda attempt, outcome: self.ends.append((attempt, outcome)),
            hold_s=HOLD_S,
            lives=lambda pid, start: self.alive,
            clock=lambda: self.now,
        )

    # -- the carrier's side

    def send(self, worker: str, agent: str, frame: Json) -> None:
        """The agent reads what is carried."""
        self.sent.append((worker, agent))
        if not self.cut:
            self.outbox.acknowledged(frame["heard"])
            for letter in frame["letters"]:
                self.told += self.inbox.take(Letter.from_json(letter))

    def occupy(self, attempt: str, worker: str) -> None:
        """A thread is kept."""
        self.occupied[attempt] = worker

    def vacate(self, attempt: str) -> None:
        """It is free again."""
        self.occupied.pop(attempt, None)

    # -- the agent's side

    def says(self, *bodies: Json, via: str = "tcp://w:1", **frame: Any) -> None:
        """The agent posts letters, and all that is not acknowledged is carried by this worker."""
        for body in bodies:
            self.outbox.post(body)
        letters = [letter.to_json() for letter in self.outbox.waiting()]
        text = {"agent": "a", "hello": self.hello, "heard": self.inbox.heard, "letters": letters, **frame}
        self.fleet.heard(via, json.dumps(text))

    def joins(self) -> None:
        """It is ready for attempts."""
        self.says({"type": "joined", "slots": 2})

    def launch(self, attempt: str = "s/0/1") -> None:
        """The driver sends an attempt there."""
        self.fleet.launch(b.task(attempt), "host:1")

    def ended(self, attempt: str = "s/0/1") -> Json:
        """The agent's word that an attempt is over."""
        outcome = Outcome(reason=ExitReason.COMPLETED, value=1.0)
        return {"type": "ended", "attempt": attempt, "outcome": outcome.to_json()}

    def wait(self, seconds: float) -> None:
        """Time passes, a tick each second."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            self.fleet.tick()

    def kinds(self) -> list[str]:
        """What the driver heard."""
        return [message["type"] for message in self.messages]


def test_an_attempt_ends_once_however_often_it_is_said() -> None:
    """The agent's word arrives although it is carried twice, and nothing is reported after it."""
    wire = Wire()
    wire.joins()
    wire.launch()
    assert wire.told[-1] == {"verb": "launch", "task": b.task("s/0/1").to_json()}
    assert wire.occupied == {"s/0/1": "tcp://w:1"}
    wire.says(wire.ended())
    wire.says()
    wire.fleet.worker_left("tcp://w:1")
    wire.wait(HOLD_S + GRACE_S + 1)
    assert [(attempt, outcome.reason) for attempt, outcome in wire.ends] == [("s/0/1", ExitReason.COMPLETED)]
    assert wire.occupied == {}


def test_an_agent_that_comes_back_has_lost_nothing() -> None:
    """While its worker is gone nothing ends; by way of another worker it hears what was said meanwhile and says what
    happened."""
    wire = Wire()
    wire.joins()
    wire.launch()
    wire.fleet.worker_left("tcp://w:1")
    assert wire.kinds() == ["joined", "left"] and wire.fleet.in_reach == 0
    wire.fleet.tell("host:1", "stop", "s/0/1", "prune")
    wire.wait(HOLD_S)
    assert not wire.ends
    wire.says({"type": "progress", "attempt": "s/0/1"}, via="tcp://w:2")
    assert wire.kinds() == ["joined", "left", "joined", "progress"]
    assert wire.told[-1] == {"verb": "stop", "attempt": "s/0/1", "value": "prune"}
    assert wire.occupied == {"s/0/1": "tcp://w:2"}
    assert wire.fleet.in_reach == 1


def test_an_agent_that_says_nothing_is_out_of_reach() -> None:
    """Its worker may hang while Dask still counts it; a pause of the driver itself is no silence of others."""
    wire = Wire()
    wire.joins()
    wire.now += SILENT_S + 1
    wire.fleet.tick()
    assert wire.fleet.in_reach == 1  # the driver was away for so long
    wire.wait(SILENT_S + 1)
    assert wire.fleet.in_reach == 0 and wire.kinds()[-1] == "left"
    wire.says()
    assert wire.fleet.in_reach == 1 and wire.kinds()[-1] == "joined"


def test_letters_that_the_carrier_loses_are_said_again() -> None:
    """A launch that was lost on its way arrives with the next sign of life, once."""
    wire = Wire()
    wire.joins()
    wire.cut = True
    wire.launch()
    assert not wire.told
    wire.cut = False
    wire.wait(2 * PING_EVERY_S)
    wire.says()
    assert [letter["verb"] for letter in wire.told] == ["launch"]


def test_an_agent_that_is_not_heard_of_loses_its_attempts_when_it_holds_them_no_longer() -> None:
    """Not before: until then it may come back with them, and they would be run twice."""
    wire = Wire()
    wire.joins()
    wire.launch()
    wire.fleet.disconnected()
    wire.wait(HOLD_S + GRACE_S - 1)
    assert not wire.ends
    wire.wait(2)
    assert wire.ends[0][1].reason is ExitReason.LOST and "616 s" in wire.ends[0][1].detail
    wire.says(wire.ended(), via="tcp://w:2")  # it comes back after all: nobody waits for it any more
    assert len(wire.ends) == 1 and wire.fleet.in_reach == 0


def test_an_agent_on_this_host_that_is_dead_loses_its_attempts_at_once() -> None:
    """Its process can be seen, so nobody waits; of one on another host nothing is known."""
    here, elsewhere = Wire(HERE), Wire(ELSEWHERE)
    for wire in (here, elsewhere):
        wire.joins()
        wire.launch()
        wire.alive = False
        wire.fleet.worker_left("tcp://w:1")
        wire.fleet.tick()
    assert [outcome.reason for _, outcome in here.ends] == [ExitReason.LOST]
    assert not elsewhere.ends


def test_an_agent_whose_process_died_under_a_living_worker_loses_its_attempts_at_once() -> None:
    """The worker says so."""
    wire = Wire()
    wire.joins()
    wire.launch()
    wire.fleet.heard("tcp://w:1", json.dumps({"agent": "a", "bye": "its process has died"}))
    assert wire.ends[0][1].detail == "host:1 is gone: its process has died"
    wire.launch("s/1/1")  # the brain did not know yet
    assert wire.ends[1][0] == "s/1/1" and wire.ends[1][1].reason is ExitReason.LOST


def test_one_that_is_to_be_ended_and_out_of_reach_is_given_up() -> None:
    """A host that is missing when the user stops does not keep the run; one that is there is waited for."""
    wire = Wire()
    wire.joins()
    wire.launch()
    wire.launch("s/1/1")
    wire.fleet.give_up("s/0/1", "stopped")
    wire.says()
    wire.wait(UNHEARD_S - 1)
    assert not wire.ends
    wire.wait(2)  # it hangs
    assert [(attempt, outcome.detail) for attempt, outcome in wire.ends] == [("s/0/1", "stopped")]
    wire.fleet.disconnected()
    assert len(wire.ends) == 1
    wire.fleet.give_up("s/1/1", "stopped")
    assert [attempt for attempt, _ in wire.ends] == ["s/0/1", "s/1/1"]


def test_an_agent_that_leaves_takes_nothing_more_and_hears_at_once_that_all_has_arrived() -> None:
    """It waits for that; and it does not join again when its letters come by another way."""
    wire = Wire()
    wire.joins()
    wire.launch()
    wire.says({"type": "left", "detail": "its worker is being closed"}, wire.ended())
    assert wire.kinds()[-1] == "left" and wire.fleet.in_reach == 0
    assert len(wire.outbox) == 0
    wire.fleet.worker_left("tcp://w:1")
    wire.says(via="tcp://w:2")
    assert "joined" not in wire.kinds()[1:]


def test_what_is_no_frame_is_dropped() -> None:
    """Nonsense, an unknown agent without a hello, and an end that cannot be read, which is a lost attempt."""
    wire = Wire()
    for text in ("", "[1]", "{", '{"agent": "x"}', '{"agent": "x", "bye": "never seen"}', "[" * 5000, "null"):
        wire.fleet.heard("tcp://w:1", text)
    wire.joins()
    wire.launch()
    wire.fleet.heard("tcp://w:1", json.dumps({"agent": "a", "letters": [[1], "x", [9, 5, {"type": "joined"}]]}))
    assert wire.kinds() == ["joined"]
    wire.says({"type": "ended", "attempt": "s/0/1", "outcome": {"reason": "no such"}})
    assert wire.ends[0][1].reason is ExitReason.LOST


def test_an_identity_of_another_host_or_container_is_never_known_to_be_dead() -> None:
    """The same number may be another process there."""
    own = ProcessIdentity.own(vitals.start_time)
    assert not own.is_dead(vitals.lives)
    assert dataclasses.replace(own, start_time=-1.0).is_dead(vitals.lives)
    others: list[dict[str, Any]] = [{"boot_id": "x"}, {"pid_space": "x"}]
    for strange in others:
        assert not dataclasses.replace(own, start_time=-1.0, **strange).is_dead(vitals.lives)


def test_a_zombie_is_dead() -> None:
    """A process that has ended and that nobody has waited for holds nothing."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        start = vitals.start_time(pid)
        assert start is not None and not vitals.lives(pid, start)
    finally:
        os.waitpid(pid, 0)


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_a_frame_that_cannot_be_read_changes_nothing(agent: Any, hello: Any, letters: Any, news: Any) -> None:
    """Whatever a worker of another version carries: nothing is raised on Dask's thread, and the next frame is read."""
    wire = Wire()
    for frame in (agent, {"agent": agent, "hello": hello}, {"agent": "b", "hello": hello, "letters": letters}):
        wire.fleet.heard("tcp://w:1", json.dumps(plain(frame)))
    wire.joins()
    wire.fleet.heard("tcp://w:1", json.dumps(plain({"agent": "a", "heard": letters, "letters": letters, "news": news})))
    wire.fleet.heard("tcp://w:1", json.dumps(plain({"agent": "a", "letters": [letters, [1, 2, news], [9, 0, {}]]})))
    wire.launch()
    assert [told["verb"] for told in wire.told] == ["launch"]
