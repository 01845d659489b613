"""Checkpoints by time instead of by epoch, and what is said of large ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.training.test_recipes import trainer  # noqa: E402
from training import saver, tensor_file  # noqa: E402
from training.progress import Silent  # noqa: E402
from training.recipe import FP32_ADAMW  # noqa: E402
from training.saver import Saver  # noqa: E402


class Listener(Silent):
    """Keeps what is said; asks to leave at a step."""

    def __init__(self, leave_at: int | None = None) -> None:
        self.written: list[int] = []
        self.notes: list[str] = []
        self.steps, self.leave_at = 0, leave_at

    def tick(self) -> None:
        self.steps += 1
        if self.steps == self.leave_at:
            self.stop_requested = "drain"

    def checkpoint(self, path: str, step: int = 0) -> None:
        self.written.append(self.steps)

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(path: Path, listener: Listener, **given: Any) -> dict[str, Any]:
    """Two epochs of three steps each."""
    return trainer(FP32_ADAMW, epochs=2, saver=Saver(path, **given), progress=listener).train()


def test_a_checkpoint_is_due_by_time_also_within_an_epoch(tmp_path: Path) -> None:
    """After each step when no time need pass; without a time after each epoch; not at all while it has not passed."""
    always, epochs, never = Listener(), Listener(), Listener()
    run(tmp_path / "a", always, every_s=0.0)
    run(tmp_path / "b", epochs)
    run(tmp_path / "c", never, every_s=1e9)
    assert always.written == [1, 2, 3, 3, 4, 5, 6, 6]
    assert epochs.written == [3, 6]
    assert never.written == [] and not (tmp_path / "c").exists()


def test_one_within_an_epoch_leads_to_the_same_end(tmp_path: Path) -> None:
    """Taken up from the middle of an epoch: the losses of an undisturbed training to the bit."""

    class Copying(Listener):
        def checkpoint(self, path: str, step: int = 0) -> None:
            if self.steps == 2:
                (tmp_path / "kept").write_bytes(Path(path).read_bytes())

    expected = run(tmp_path / "a", Copying(), every_s=0.0)
    again = trainer(FP32_ADAMW, epochs=2)
    again.resume(tmp_path / "kept")
    assert (again.epoch, again.step) == (0, 2)
    assert again.train()["val_losses"] == expected["val_losses"]


def test_a_drain_writes_one_whatever_the_time(tmp_path: Path) -> None:
    """Asked to leave long before one is due: it is written all the same."""
    listener = Listener(leave_at=2)
    assert run(tmp_path / "a", listener, every_s=1e9)["stop_reason"] == "interrupted"
    assert listener.written == [2]


def test_what_a_large_checkpoint_takes_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size, time and how often, when the memory has settled; of a small one nothing."""
    quiet, loud = Listener(), Listener()
    run(tmp_path / "a", quiet)
    monkeypatch.setattr(saver, "WORTH_SAYING_BYTES", 1)
    monkeypatch.setattr(tensor_file, "try_disk", lambda folder: 1e5)
    run(tmp_path / "b", loud, every_s=1800.0, drain_s=1e6)
    assert quiet.notes == []
    (said,) = loud.notes
    assert said.startswith("a checkpoint is 0.0 GiB and takes some ") and said.endswith(" s, one every 30 minutes")


def test_a_drain_that_cannot_finish_one_says_so_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the beginning, and again before it is tried; it is tried all the same."""
    listener = Listener(leave_at=4)
    monkeypatch.setattr(saver, "WORTH_SAYING_BYTES", 1)
    monkeypatch.setattr(tensor_file, "try_disk", lambda folder: 1.0)
    run(tmp_path / "a", listener, drain_s=20.0)
    assert len(listener.notes) == 2
    assert all("may not finish one (drain_timeout_s): the one before is kept" in said for said in listener.notes)
    assert listener.written[-1] == 4


def test_the_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    """A rate above nothing, and no file left behind."""
    assert tensor_file.try_disk(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
