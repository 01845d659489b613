"""What a hostile objective gets out of its process: each line and each file, as the scheduler reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scheduler.host.attempt_folder import AttemptFolder
from scheduler.model import ExitReason, Outcome, messages
from scheduler.model.fields import BadMessage
from scheduler.worker.importable import check_objective
from scheduler.worker.trial_process import TrialProcess, TrialStartError
from scheduler.worker.witness import Witness, conclude
from tests.test_seams import travels

ROOT = Path(__file__).resolve().parents[2]
# What each must come out as. Linux's /dev/full is a disk that is always full.
EXPECTED = {
    "bad_name": (ExitReason.FAILED, r"ValueError: no such file: caf\udce9\x1b[2J"),
    "no_words": (ExitReason.FAILED, "Mute: <Mute that cannot be read"),
    "huge_step": (ExitReason.FAILED, "ValueError: step "),
    "huge_value": (ExitReason.FAILED, "TypeError: the objective returned"),
    "huge_result": (ExitReason.COMPLETED, "completed"),
    "says_interrupted": (ExitReason.FAILED, "TypeError: the objective returned None"),
    "says_does_not_fit": (ExitReason.COMPLETED, "does_not_fit"),
    "forked_child_returns": (ExitReason.COMPLETED, "completed"),
    "forked_child_returns_alone": (ExitReason.FAILED, "exit status 9"),
    "forked_child_exits": (ExitReason.COMPLETED, "completed"),
    "closes_everything": (ExitReason.COMPLETED, "completed"),
    "writes_to_the_pipe": (ExitReason.COMPLETED, "completed"),
    "leaves_rubbish": (ExitReason.FAILED, "exit status 9"),
    "bad_path": (ExitReason.COMPLETED, "completed"),
    "full_disk": (ExitReason.NO_ROOM, "OSError: [Errno 28] No space left on device"),
}
VALUES = {"huge_result": 0.25, "forked_child_exits": 1.0, "closes_everything": 0.0}


class Heard:
    """One attempt as the agent hears it."""

    def __init__(self, folder: Path, objective: str) -> None:
        self.folder = folder / "attempt"
        self.parsed: list[messages.TrialMessage] = []
        self.refused: list[str] = []
        process = TrialProcess.start(environment={"PYTHONPATH": str(ROOT)}, log=folder / "spare.log", preload=[])
        try:
            process.wait_ready(60)
            task = {"protocol": 1, "attempt": "s/0/1", "params": {}, "context": {}, "resume_from": None}
            process.send({**task, "objective": objective, "folder": str(self.folder), "threads": 1})
            for said in process.messages():
                travels(said)
                try:
                    self.parsed.append(messages.parse(said))
                except BadMessage as error:
                    self.refused.append(str(error))
            status = process.close()
        finally:
            process.kill()
            process.close()
        last = (
            next((m for m in self.parsed if isinstance(m, messages.Last)), None) or AttemptFolder(self.folder).result()
        )
        self.outcome: Outcome = conclude(Witness(last=last, exit_status=status))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_hostile_objective_ends_nobody_but_itself(tmp_path: Path, name: str) -> None:
    """Each ends as what it is, everything that is passed on can travel, and the value is the process's own."""
    heard = Heard(tmp_path, f"tests.hostile:{name}")
    reason, detail = EXPECTED[name]
    assert heard.outcome.reason is reason, heard.outcome
    assert detail in heard.outcome.detail
    assert Outcome.from_json(travels(heard.outcome.to_json())) == heard.outcome
    if reason is ExitReason.COMPLETED:
        assert heard.outcome.value == VALUES.get(name, 0.5)
    finals = [m for m in heard.parsed if isinstance(m, messages.Last)]
    assert len(finals) <= 1
    progress = [m for m in heard.parsed if isinstance(m, messages.Progress)]
    assert all(m.value != -777.0 for m in progress)
    if name == "writes_to_the_pipe":
        assert [(m.step, m.value) for m in progress] == [(3, 0.3)]
        assert len(heard.refused) >= 6


def test_the_durable_result_can_always_be_read(tmp_path: Path) -> None:
    """What is far too large is cut before it is written: the file parses, and is of a size that travels."""
    Heard(tmp_path, "tests.hostile:huge_result")
    written = (tmp_path / "attempt" / "result.json").read_text()
    assert len(written) < 2_000_000
    found = json.loads(written)["result"]
    assert (found["value"], found["metrics"]["7"], found["metrics"]["nan"]) == (0.25, "seven", None)
    assert found["metrics"]["digits"] == "an integer of 19932 bits"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nomod:nofun", "objective 'nomod:nofun' cannot be imported: ModuleNotFoundError: No module named 'nomod'"),
        ("tests.hostile:nothing", "AttributeError: module 'tests.hostile' has no attribute 'nothing'"),
        ("tests.hostile:NAMES", "list NAMES is no function"),
        ("tests.leaves_at_import:objective", "SystemExit: bye"),
    ],
)
def test_an_objective_that_cannot_be_imported_is_no_trials_fault(tmp_path: Path, path: str, why: str) -> None:
    """The check says why in one line; a trial that finds out says that it never started."""
    with pytest.raises(TrialStartError) as caught:
        check_objective(path)
    assert why in str(caught.value)
    heard = Heard(tmp_path, path)
    assert heard.outcome.reason is ExitReason.NOT_STARTED
    assert why in heard.outcome.detail


def test_a_check_that_is_killed_from_outside_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever kills it says nothing of the objective; one that is killed each time is told as that."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    body = "import os, pathlib\ncount = pathlib.Path(__file__).with_suffix('.count')\n"
    body += "count.write_text(count.read_text() + 'x' if count.exists() else 'x')\n"
    body += (
        "if len(count.read_text()) < {tries}:\n    os.kill(os.getpid(), 9)\ndef objective(task, progress):\n    pass\n"
    )
    (tmp_path / "killed_once.py").write_text(body.format(tries=2))
    check_objective("killed_once:objective")
    (tmp_path / "killed_always.py").write_text(body.format(tries=99))
    with pytest.raises(
        TrialStartError, match="objective 'killed_always:objective' cannot be imported: killed by SIGKILL"
    ):
        check_objective("killed_always:objective")
    assert (tmp_path / "killed_always.count").read_text() == "xxx"


def test_an_objective_that_can_be_imported_passes_the_check() -> None:
    """The check says nothing where there is nothing to say, and calls nothing."""
    check_objective("tests.hostile:leaves_rubbish")
