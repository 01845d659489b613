"""The agent's mail over a real socket: what is carried together, and that nothing lies for long."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.host import vitals
from scheduler.host.agent_folder import Connection, ProcessIdentity
from scheduler.model import ExitReason, Json, Outcome, frames, letters, messages
from scheduler.worker import agent_mail
from scheduler.worker.agent_mail import Mail

STARTED = letters.TrialSaid(attempt="s/0/1", message=messages.Started())
PROGRESS = letters.TrialSaid(attempt="s/0/1", message=messages.Progress(step=1, value=0.5))
CALLED = letters.TrialSaid(attempt="s/0/1", message=messages.Called(method="should_prune", number=1, arguments={}))
ENDED = letters.Ended(attempt="s/0/1", outcome=Outcome(reason=ExitReason.COMPLETED, value=1.0))
FOR_EVER_S = 1e6


class Served:
    """An agent's mail, and the Dask worker that carries for it."""

    def __init__(self, folder: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "agent"))
        listener.listen()
        hello = frames.Hello(name="host:1", process=vars_of(ProcessIdentity.own(vitals.start_time)))
        self.mail = Mail(
            listener,
            agent="a",
            hello=hello,
            on_letter=lambda body: None,
            on_carrier=lambda frame: None,
            on_heard=lambda: None,
        )
        self.mail.start()
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(60)
        connected.connect(str(folder / "agent"))
        self.connection = Connection(connected)
        self._frames = self.connection.frames()
        self.connection.send(frames.to_json(frames.Carrier(worker="tcp://w:1", owner=True)))
        assert self.next() == []  # it is greeted

    def next(self) -> list[str]:
        """What the letters of the next frame are; fails after a minute without one."""
        data: Json = next(self._frames)[0]
        frame = frames.from_worker(data)
        assert isinstance(frame, frames.FromAgent)
        kinds = [letters.report(letter.body) for letter in frame.letters]
        return [type(k.message if isinstance(k, letters.TrialSaid) else k).__name__ for k in kinds]

    def close(self) -> None:
        """Both ends."""
        self.mail.close("over", for_good=True)
        self.connection.close()


def vars_of(process: ProcessIdentity) -> Json:
    """Its fields."""
    return {name: getattr(process, name) for name in process.__slots__}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """One that is connected."""
    found = Served(tmp_path)
    yield found
    found.close()


def test_what_a_short_trial_says_is_one_frame(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end takes along what nobody waits for, in order."""
    monkeypatch.setattr(agent_mail, "TOGETHER_S", FOR_EVER_S)
    for letter in (STARTED, PROGRESS, ENDED):
        served.mail.post(letter)
    assert served.next() == ["Started", "Progress", "Ended"]


def test_a_question_is_carried_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that asks for something waits for the answer."""
    monkeypatch.setattr(agent_mail, "TOGETHER_S", FOR_EVER_S)
    served.mail.post(STARTED)
    served.mail.post(CALLED)
    assert served.next() == ["Started", "Called"]


def test_what_lies_is_carried_soon(served: Served) -> None:
    """Also when nothing comes after it, and again when it was carried before."""
    for _ in range(3):
        served.mail.post(PROGRESS)
        assert served.next() == ["Progress"]


def test_more_than_a_frame_holds_is_all_carried(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frame after frame, without waiting for more."""
    monkeypatch.setattr(agent_mail, "TOGETHER_S", FOR_EVER_S)
    for _ in range(2 * agent_mail.PER_FRAME):
        served.mail.post(PROGRESS)
    served.mail.post(ENDED)
    found = [kind for _ in range(3) for kind in served.next()]
    assert found == ["Progress"] * (2 * agent_mail.PER_FRAME) + ["Ended"]


def test_letters_that_lie_go_with_the_next_worker(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that carried is gone: who comes after it is told at once."""
    monkeypatch.setattr(agent_mail, "TOGETHER_S", FOR_EVER_S)
    served.mail.post(PROGRESS)
    served.connection.send(frames.to_json(frames.Carrier(worker="tcp://w:1", owner=True)))
    assert served.next() == ["Progress"]
