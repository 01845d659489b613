"""Everything that crosses a seam, fuzzed: nothing that a trial says, writes or returns ends whoever hears it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import msgpack
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.core.attributes import final_attrs
from scheduler.core.fault import NEVER_RAN, RetryPolicy
from scheduler.driver import decisions, recovery
from scheduler.driver.journal import Journal, read
from scheduler.model import ExitReason, FinalState, KillRecord, Outcome, TellTrial, messages
from scheduler.model.fields import BadMessage
from scheduler.model.plain import MAX_CHARACTERS, MAX_ENTRIES, line, plain, text
from scheduler.study.transactions import clean
from scheduler.worker.witness import Witness, conclude
from tests import builders as b
from tests.driver.test_settle import TRIAL, folder_of, left
from tests.study.test_study import ARCHITECTURES, STUDY, ask, spec, store_at
from training import objective
from training import plain as theirs

# Half of a surrogate pair, NUL, a terminal's escape, what ends a line elsewhere, and what is merely unusual.
CHARACTERS = st.characters() | st.sampled_from("\udcff\ud800\x00\x1b\r\n\u2028\x85\u202e")
NASTY_TEXT = st.text(CHARACTERS) | st.just("x" * 70_000)
KEYS = NASTY_TEXT | st.integers() | st.none()
NASTY_NUMBERS = (
    st.integers()
    | st.sampled_from([2**63, 2**64, 2**70, -(2**63) - 1, 10**4000, -(10**4000)])
    | st.floats(allow_nan=True, allow_infinity=True)
)
LEAVES = st.none() | st.booleans() | NASTY_NUMBERS | NASTY_TEXT | st.binary(max_size=20)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
KINDS = ["started", "progress", "tick", "settled", "checkpoint", "note", "result", "error", "ready", "nonsense"]
FIELDS = [
    *("step", "value", "n", "path", "text", "peak_bytes", "device_bytes", "result", "error", "traceback", "asked"),
    *("started", "no_room", "duration_s", "device_peak_bytes"),
]
MESSAGES = st.builds(
    lambda kind, rest: {**rest, "type": kind},
    st.sampled_from(KINDS) | ANYTHING,
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING | st.integers(0, 100) | st.floats(0, 1), max_size=6),
)
KILLS = st.builds(
    lambda reason, rest: {**rest, "reason": reason},
    st.sampled_from([reason.value for reason in ExitReason]) | ANYTHING,
    st.dictionaries(st.sampled_from(["kill_id", "rule", "within_promise", "evidence", "steps", "seconds"]), ANYTHING),
)
RESULTS = st.dictionaries(st.sampled_from(["value", "epochs", "stop_reason", "metrics", "best_epoch"]), ANYTHING)


def travels(value: Any) -> Any:
    """The value after every road that ours take: msgpack, JSON in UTF-8, and back. Raises when one cannot carry it."""
    msgpack.packb(value)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return json.loads(text)


class Hostile:
    """An object whose own methods raise."""

    def __str__(self) -> str:
        raise RuntimeError("no text of mine")

    __repr__ = __str__


def nested(depth: int, kind: type = list) -> Any:
    """Brackets in brackets."""
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


@given(ANYTHING)
def test_whatever_comes_in_travels_everywhere_afterwards(value: Any) -> None:
    """After `plain` a value goes through msgpack and UTF-8 JSON unchanged, and again through `plain`."""
    found = plain(value)
    assert travels(found) == found
    assert plain(found) == found


@given(ANYTHING)
def test_both_sides_of_the_pipe_say_the_same(value: Any) -> None:
    """What the trial process made plain is left as it is by the scheduler, which checks again."""
    assert plain(theirs.plain(value)) == theirs.plain(value)


@pytest.mark.parametrize("make", [plain, theirs.plain, clean])
def test_what_cannot_be_told_in_full_is_cut(make: Any) -> None:
    """Endless lists, texts and depth come out bounded; what contains itself and what raises come out at all."""
    loop: list[Any] = []
    loop.append(loop)
    for value in (10**6000, loop, nested(5000), nested(5000, dict), Hostile(), {Hostile(): Hostile()}, "x" * 10**7):
        travels(make(value))
    large = make({"metrics": {str(i): ["word" * 100] * 10 for i in range(20_000)}})
    assert len(json.dumps(large)) < 2 * MAX_CHARACTERS + 20 * MAX_ENTRIES
    assert make([0] * 10**6)[-1].endswith("more")


@given(NASTY_TEXT)
def test_a_text_cannot_reach_through_to_the_terminal(said: str) -> None:
    """No control character but line feed and tab is left, and `line` has none at all."""
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in text(said))
    assert "\n" not in line(said)


@given(MESSAGES)
def test_a_message_is_parsed_or_refused(message: dict[Any, Any]) -> None:
    """Every field of what is parsed has its type and travels; the rest is BadMessage and nothing else."""
    try:
        found = messages.parse(message)
    except BadMessage as error:
        travels(str(error))
        return
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    travels(fields)
    if isinstance(found, messages.Progress):
        assert math.isfinite(found.value) and 0 <= found.step <= messages.LAST_STEP


@given(MESSAGES, KILLS)
def test_every_end_is_an_outcome(message: dict[Any, Any], kill: dict[str, Any]) -> None:
    """Whatever the last message and the kill's record hold, the outcome and its attributes can be written anywhere."""
    last = None
    with contextlib.suppress(BadMessage):
        last = messages.last(message)
    record = None
    with contextlib.suppress(BadMessage):
        record = KillRecord.from_json(kill)
    outcome = conclude(Witness(last=last, kill=record, exit_status=1))
    assert Outcome.from_json(travels(outcome.to_json())) == outcome
    travels(final_attrs(outcome, b.footprint(), 1, trusted_peak=True))
    assert (outcome.value is None) or math.isfinite(outcome.value)


@given(RESULTS)
def test_what_an_objective_returns_becomes_a_result_or_an_error(result: dict[str, Any]) -> None:
    """`check_result` returns bounded JSON with a finite value, or raises what becomes the trial's own error."""
    try:
        found = objective.check_result(result)
    except (TypeError, ArithmeticError):
        return
    travels(found)
    assert found["value"] is None or math.isfinite(found["value"])


@given(st.dictionaries(NASTY_TEXT, ANYTHING, max_size=3), st.text(max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_the_journal_takes_everything(tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    """A line that JSON or UTF-8 refuses is written all the same, and what comes after it can be read."""
    journal = Journal(tmp_path / "journal.jsonl")
    kept = {key: value for key, value in fields.items() if key not in ("event", "durable", "self")}
    journal.write("attempt.ended", **kept)
    journal.write("after", word=word)
    assert journal.held == 0
    journal.close()
    assert list(read(tmp_path / "journal.jsonl"))[-1]["word"] == word


REFUSED = {
    "surrogate": "caf\udce9",
    "digits": 10**6000,
    "deep": nested(5000),
    "mute": Hostile(),
    "surrogate key": {"\ud800": 1},
    "keys": {None: 1, (1, 2): 2},
    "bytes": b"\xff",
    "set": {1, 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_journal_takes_what_json_or_utf8_refuses(tmp_path: Path, name: str) -> None:
    """The line is written, bounded, and read back with all that could be kept of it."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("attempt.ended", detail=REFUSED[name], reason="failed")
    journal.close()
    (record,) = read(tmp_path / "journal.jsonl")
    assert record["reason"] == "failed"


def test_the_journal_is_read_past_a_line_that_is_too_deep(tmp_path: Path) -> None:
    """Ten thousand brackets are a torn line, not the end of each start."""
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "deep", "x": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"event": "after"}\n')
    assert [record["event"] for record in read(path)] == ["after"]


@pytest.mark.parametrize("name", ["result.json", "kill.json", "spec.json"])
@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"type": "result", "result": 5, "reason": "nonsense", "resume_from": 7, "retries": "many"}',
        '{"type": "error", "error": "\\udcff", "traceback": {"a": 1}, "reason": ["lost"], "resume_from": ["x"]}',
        '{"type": "result", "result": {"value": 1' + "0" * 5000 + "}}",
        '{"type": "result", "result": {"epochs": "all", "value": NaN, "stop_reason": {"a": "b"}}, "duration_s": "x"}',
        "\x00\xff",
    ],
)
def test_what_a_trial_leaves_behind_does_not_end_the_next_driver(tmp_path: Path, name: str, content: str) -> None:
    """With rubbish in any file of its folder it is settled, and the decision can be written and read back."""
    folder = folder_of(tmp_path, 1)
    (folder / name).write_text(content)
    verdict = recovery.settle(left(folder=str(tmp_path)), recovery.Evidence(), RetryPolicy())
    assert verdict is not None
    event, fields = decisions.write(verdict)
    travels(fields)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write(event, durable=True, **fields)
    journal.close()
    assert decisions.outstanding(read(journal.path)) == {TRIAL: verdict}


def test_an_objective_cannot_talk_itself_out_of_the_quota() -> None:
    """The words that the quota is counted by are the scheduler's own: one that uses them has run all the same."""
    for word in NEVER_RAN:
        outcome = b.outcome(ExitReason.COMPLETED, result={"stop_reason": word, "value": 1.0})
        assert final_attrs(outcome, b.footprint(), 1, trusted_peak=False)["stop_reason"] == "completed"


def test_a_study_holds_what_it_is_told_and_plain_optuna_reads_it(tmp_path: Path) -> None:
    """Attributes with everything that is nasty in them are written once and read by Optuna itself."""
    store = store_at(tmp_path / "study.db")
    store.open(spec(), ARCHITECTURES)
    asked = ask(store)
    nasty = {"error": "no file \udcff\x00", "big": 10**6000, "nan": math.nan, "deep": nested(500)}
    nasty["metrics"] = ["x" * 900] * 900
    store.tell(TellTrial(trial=asked.trial, state=FinalState.FAIL, value=None, attrs=nasty))
    store.close()
    found = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{tmp_path / 'study.db'}").trials[0]
    assert found.user_attrs["error"] == "no file \\udcff\\x00"
    assert found.user_attrs["nan"] is None
    assert len(json.dumps(found.user_attrs["metrics"])) < 64_000


@given(st.text(alphabet="ab \n\t\x1f", max_size=60), st.integers(10, 40))
def test_a_line_of_a_line_is_the_same_line(text: str, limit: int) -> None:
    """A record that is read and written twice does not change: what is cut out leaves no second pair of spaces."""
    once = line(text, limit)
    assert line(once, limit) == once and len(once) <= limit
