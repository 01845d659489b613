"""Letters and frames: each comes back as it was sent; another version, or what is none, is one line and no KeyError."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model import Environment, ExitReason, KillRecord, Outcome, Pressure, frames, letters, messages
from scheduler.model.fields import BadMessage, OtherProtocol, fields_of
from scheduler.model.mailbox import Letter
from tests import builders as b
from tests.test_seams import ANYTHING

SCHEDULER = Path(__file__).resolve().parents[2] / "scheduler"
KILL = KillRecord(kill_id="k", rule="stalled", reason=ExitReason.STALLED, evidence={"a": [1]}, steps=(("kill", 2.0),))
ORDERS: list[letters.Order] = [
    letters.Launch(task=b.task(params={"lr": 0.1}, older=("/a", "/b"), ran_s=2.5)),
    letters.Stop(attempt="s/0/1", reason="prune"),
    letters.End(attempt="s/0/1", reason="timeout"),
    letters.Resize(attempt="s/0/1", reserved_bytes=5),
    letters.Answer(attempt="s/0/1", number=3, body={"value": [1]}),
    letters.Dismiss(reason="the end"),
]
REPORTS: list[letters.Report] = [
    letters.Joined(facts=b.facts("", environment=Environment(name="torch", runtime_bytes=5))),
    letters.Left(detail="out of reach"),
    letters.Broken(detail="no torch"),
    letters.RegistryRemade(path="/tmp/x"),
    letters.Vitals(available_bytes=None, pressure=Pressure.SOFT, used_bytes={"s/0/1": 7}, step_s={"s/0/1": 0.5}),
    letters.Restarted(attempt="s/0/1", checkpoint=None, detail="gone"),
    letters.TrialSaid(attempt="s/0/1", pid=7, message=messages.Progress(step=1, value=0.5, peak_bytes=9)),
    letters.WouldKill(attempt="s/0/1", kill=KILL),
    letters.Ended(attempt="s/0/1", outcome=Outcome(reason=ExitReason.STALLED, kill=KILL, values=(0.5, float("inf")))),
]
TO_AGENT: list[frames.ToAgent] = [
    frames.Mail(heard=3, letters=(Letter(4, 3, {"type": "stop"}),)),
    frames.Carrier(worker="tcp://w", owner=True),
    frames.Leave(reason="closing"),
    frames.Discharge(reason="gone"),
]
FROM_WORKER: list[frames.FromWorker] = [
    frames.FromAgent(agent="a", hello=frames.Hello(name="h:1", process={"pid": 1}), heard=0, news={"type": "vitals"}),
    frames.Bye(agent="a", reason="done", for_good=True),
    frames.NoAgent(reason="no disk"),
]
START = frames.AgentStart(id="a", config=b.agent_config(), slots=2, worker=(1, 2.5))


def sent(data: Any) -> Any:
    """What arrives as text on the other side."""
    return json.loads(json.dumps(data))


def name(value: object) -> str:
    """A case's name."""
    return type(value).__name__


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_an_order_arrives_as_it_was_given(order: letters.Order) -> None:
    """Every kind, with every field."""
    assert letters.order(sent(letters.to_json(order))) == order


@pytest.mark.parametrize("report", REPORTS, ids=name)
def test_a_report_arrives_as_it_was_made(report: letters.Report) -> None:
    """Every kind, with every field; a field of another type makes it unread, and names the field."""
    data = letters.to_json(report)
    assert letters.report(sent(data)) == report
    for field in data.keys() - {"type"}:
        unread = letters.report({**data, field: object})
        assert isinstance(unread, letters.Unread) and unread.kind == data["type"] and "\n" not in unread.error


@pytest.mark.parametrize("frame", [*TO_AGENT, *FROM_WORKER], ids=name)
def test_a_frame_arrives_as_it_was_sent(frame: Any) -> None:
    """Every kind; of another version only that somebody leaves is understood."""
    read = frames.to_agent if frame in TO_AGENT else frames.from_worker
    data = sent(frames.to_json(frame))
    assert read(data) == frame
    if isinstance(frame, frames.Leave | frames.Discharge | frames.Bye):
        assert read({**data, "protocol": 2}) == frame
        return
    with pytest.raises(OtherProtocol) as refused:
        read({**data, "protocol": 2})
    assert "speaks protocol 2, this Headroom 1: install the same version on both sides" in str(refused.value)


def test_an_agent_is_started_by_its_own_version_only() -> None:
    """The line on its stdin comes back as it was; another version is refused before any field is looked at."""
    data = sent(START.to_json())
    assert frames.AgentStart.from_json(data) == START
    with pytest.raises(OtherProtocol, match="speaks protocol 2, this Headroom 1"):
        frames.AgentStart.from_json({"protocol": 2})
    with pytest.raises(BadMessage, match=r"AgentStart\.slots: 'two' is no whole number"):
        frames.AgentStart.from_json({**data, "slots": "two"})


def test_what_an_unread_letter_was_about_is_known() -> None:
    """Nobody may wait for an attempt whose launch, or whose end, could not be read."""
    launch = {"type": "launch", "task": {**b.task("s/4/1").to_json(), "protocol": 9}}
    with pytest.raises(OtherProtocol):
        letters.order(launch)
    assert letters.launched(launch) == "s/4/1"
    assert letters.launched({"type": "stop", "attempt": "s/4/1"}) is None
    unread = letters.report({"type": "ended", "attempt": "s/4/1"})
    assert isinstance(unread, letters.Unread) and unread.ended == "s/4/1"


@given(st.dictionaries(st.sampled_from(["type", "frame", "protocol", "attempt", "task", "message"]), ANYTHING))
def test_nothing_but_a_refusal_comes_of_rubbish(data: dict[str, Any]) -> None:
    """Whatever arrives is read or refused; it ends no thread."""
    for read in (letters.order, frames.to_agent, frames.from_worker, frames.AgentStart.from_json):
        try:
            read(data)
        except BadMessage as error:
            assert "\n" not in str(error)
    unread = letters.report(data)
    assert not isinstance(unread, letters.Unread) or "\n" not in unread.error


WIRE = {"messages.py", "letters.py", "frames.py"}
NAMES = {"cmd", "verb", "heard", "letters", "bye", "news", "hello", "for_good", "frame", "carrier", "dismiss"}


# A parameter of the search space has a "type", an error of pydantic's too; Dask's event is a mapping.
ALLOWED = {"settings": {"type"}, "study": {"type"}, "cluster": {"frame"}}


def test_no_other_module_spells_a_name_of_the_wire() -> None:
    """What is said is a dataclass everywhere else: no "type" that is compared, no key that is looked up by its text."""
    found = {}
    for path in sorted(SCHEDULER.rglob("*.py")):
        tree = ast.parse(path.read_text())
        spelled = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & (NAMES | {"type"})
        allowed = ALLOWED.get(path.parent.name, set())
        if path.name not in WIRE and (rest := spelled - allowed):
            found[str(path.relative_to(SCHEDULER))] = rest
    assert found == {}


def test_the_json_of_a_dataclass_is_its_fields() -> None:
    """Nothing is renamed on the way, so that a recorded letter reads like the class."""
    assert fields_of(letters.Stop(attempt="s/0/1", reason="prune")) == {"attempt": "s/0/1", "reason": "prune"}
