"""Who holds which attempt: an agent out of reach keeps its attempts, one that is gone loses them, each ends once."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import pytest
from hypothesis import given

from scheduler.driver.fleet import GRACE_S, OCCUPY_AFTER_S, PING_EVERY_S, SILENT_S, UNHEARD_S, Fleet
from scheduler.host import vitals
from scheduler.host.agent_folder import ProcessIdentity
from scheduler.model import ExitReason, Json, Outcome, frames, letters
from scheduler.model.mailbox import Inbox, Outbox
from scheduler.model.messages import Progress
from scheduler.model.plain import plain
from tests import builders as b
from tests.test_seams import ANYTHING

HOLD_S = 600.0
PROGRESS = letters.TrialSaid(attempt="s/0/1", message=Progress(step=1, value=0.5))
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
        self.taken: list[str] = []
        self.heard: list[letters.Report | letters.Unread] = []
        self.ends: list[tuple[str, Outcome]] = []
        self.outbox, self.inbox = Outbox(), Inbox()
        self.told: list[letters.Order] = []
        self.hello = frames.Hello(name="host:1", process=process or ELSEWHERE)
        self.fleet = Fleet(
            self,
            on_message=lambda worker, report: self.heard.append(report),
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
            mail = frames.to_agent(frame)
            assert isinstance(mail, frames.Mail)
            self.outbox.acknowledged(mail.heard)
            for letter in mail.letters:
                self.told += map(letters.order, self.inbox.take(letter))

    def occupy(self, attempt: str, worker: str) -> None:
        """A thread is kept."""
        self.occupied[attempt] = worker
        self.taken.append(attempt)

    def vacate(self, attempt: str) -> None:
        """It is free again."""
        self.occupied.pop(attempt, None)

    # -- the agent's side

    def says(self, *reports: letters.Report, via: str = "tcp://w:1", **more: Any) -> None:
        """The agent posts letters, and all that is not acknowledged is carried by this worker."""
        for report in reports:
            self.outbox.post(letters.to_json(report))
        self.carries(via, **more)

    def carries(self, via: str = "tcp://w:1", **more: Any) -> None:
        """A frame of the agent's, some of it as it should not be."""
        waiting = tuple(self.outbox.waiting())
        frame = frames.FromAgent(agent="a", hello=self.hello, heard=self.inbox.heard, letters=waiting)
        self.fleet.heard(via, json.dumps({**frames.to_json(frame), **more}))

    def joins(self) -> None:
        """It is ready for attempts."""
        self.says(letters.Joined(facts=b.facts("")))

    def launch(self, attempt: str = "s/0/1") -> None:
        """The driver sends an attempt there."""
        self.fleet.launch(b.task(attempt), "host:1")

    def ended(self, attempt: str = "s/0/1") -> letters.Ended:
        """The agent's word that an attempt is over."""
        return letters.Ended(attempt=attempt, outcome=Outcome(reason=ExitReason.COMPLETED, value=1.0))

    def wait(self, seconds: float) -> None:
        """Time passes, a tick each second."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            self.fleet.tick()

    def kinds(self) -> list[type]:
        """What the driver heard."""
        return [type(report) for report in self.heard]


def test_an_attempt_ends_once_however_often_it_is_said() -> None:
    """The agent's word arrives although it is carried twice, and nothing is reported after it."""
    wire = Wire()
    wire.joins()
    wire.launch()
    assert wire.told[-1] == letters.Launch(task=b.task("s/0/1"))
    wire.wait(OCCUPY_AFTER_S)
    assert wire.occupied == {"s/0/1": "tcp://w:1"}
    wire.says(wire.ended())
    wire.says()
    wire.fleet.worker_left("tcp://w:1")
    wire.wait(HOLD_S + GRACE_S + 1)
    assert [(attempt, outcome.reason) for attempt, outcome in wire.ends] == [("s/0/1", ExitReason.COMPLETED)]
    assert wire.occupied == {}


def test_a_short_attempt_takes_no_thread_of_dask() -> None:
    """A task of Dask's costs as much as such an attempt; one that goes on takes its thread once."""
    wire = Wire()
    wire.joins()
    wire.launch("s/0/1")
    wire.launch("s/1/1")
    wire.says(wire.ended("s/0/1"))
    assert wire.taken == []
    wire.wait(OCCUPY_AFTER_S + 5)
    assert wire.taken == ["s/1/1"]


def test_an_agent_that_comes_back_has_lost_nothing() -> None:
    """While its worker is gone nothing ends; by way of another worker it hears what was said meanwhile and says what
    happened."""
    wire = Wire()
    wire.joins()
    wire.launch()
    wire.fleet.worker_left("tcp://w:1")
    assert wire.kinds() == [letters.Joined, letters.Left] and wire.fleet.in_reach == 0
    wire.fleet.tell("host:1", letters.Stop(attempt="s/0/1", reason="prune"))
    wire.wait(HOLD_S)
    assert not wire.ends
    wire.says(PROGRESS, via="tcp://w:2")
    assert wire.kinds() == [letters.Joined, letters.Left, letters.Joined, letters.TrialSaid]
    assert [report.facts.via for report in wire.heard if isinstance(report, letters.Joined)] == [
        "tcp://w:1",
        "tcp://w:2",
    ]
    assert wire.told[-1] == letters.Stop(attempt="s/0/1", reason="prune")
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
    assert wire.fleet.in_reach == 0 and wire.kinds()[-1] is letters.Left
    wire.says()
    assert wire.fleet.in_reach == 1 and wire.kinds()[-1] is letters.Joined


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
    assert [type(order) for order in wire.told] == [letters.Launch]


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
    wire.fleet.heard("tcp://w:1", json.dumps(frames.to_json(frames.Bye(agent="a", reason="its process has died"))))
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
    wire.says(letters.Left(detail="its worker is being closed"), wire.ended())
    assert wire.kinds()[-1] is letters.Left and wire.fleet.in_reach == 0
    assert len(wire.outbox) == 0
    wire.fleet.worker_left("tcp://w:1")
    wire.says(via="tcp://w:2")
    assert letters.Joined not in wire.kinds()[1:]


def test_what_is_no_frame_is_dropped() -> None:
    """Nonsense, an agent that nobody knows, and an end that cannot be read, which is a lost attempt."""
    wire = Wire()
    for text in ("", "[1]", "{", '{"protocol": 1}', '{"protocol": 1, "frame": "agent"}', "[" * 5000, "null"):
        wire.fleet.heard("tcp://w:1", text)
    wire.fleet.heard("tcp://w:1", json.dumps(frames.to_json(frames.Bye(agent="x", reason="never seen"))))
    wire.joins()
    wire.launch()
    for bad in ([[1]], ["x"], [[9, 5, {"type": "joined"}], 3], 7):
        wire.carries(letters=bad)
    wire.says(news={"type": "vitals", "available_bytes": "all"})
    assert wire.kinds() == [letters.Joined, letters.Unread]
    wire.outbox.post({"type": "ended", "attempt": "s/0/1", "outcome": {"reason": "no such"}})
    wire.carries()
    assert wire.ends[0][1].reason is ExitReason.LOST and "no such" in wire.ends[0][1].detail


@pytest.mark.parametrize("spoken", [2, None, "1", True])
def test_an_agent_of_another_version_is_refused_in_one_line(spoken: Any) -> None:
    """The driver hears what is spoken on which side, and what to do, whatever the frames hold; a goodbye is heard."""
    wire = Wire()
    wire.carries(protocol=spoken, hello=5, letters="all", heard=None)
    (broken,) = wire.heard
    assert isinstance(broken, letters.Broken)
    assert broken.detail.startswith("an agent speaks protocol ") and "install the same version" in broken.detail
    assert "\n" not in broken.detail and wire.fleet.in_reach == 0
    wire.joins()
    wire.launch()
    bye = frames.to_json(frames.Bye(agent="a", reason="done"))
    wire.fleet.heard("tcp://w:1", json.dumps({**bye, "protocol": spoken}))
    assert wire.ends[0][1].detail == "host:1 is gone: done"


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
def test_a_frame_that_cannot_be_read_changes_nothing(agent: Any, hello: Any, posted: Any, news: Any) -> None:
    """Whatever is carried: nothing is raised on Dask's thread, and the next frame is read."""
    wire = Wire()
    ours: Json = {"protocol": frames.PROTOCOL, "frame": "agent", "heard": 0}
    for frame in (agent, ours, {**ours, "agent": agent, "hello": hello}, {**ours, "hello": hello, "letters": posted}):
        wire.fleet.heard("tcp://w:1", json.dumps(plain(frame)))
    wire.joins()
    for more in (
        {"heard": posted},
        {"letters": posted},
        {"news": news},
        {"letters": [posted, [1, 2, news], [9, 0, {}]]},
    ):
        wire.carries(**plain(more))
    wire.launch()
    assert [type(order) for order in wire.told] == [letters.Launch]
