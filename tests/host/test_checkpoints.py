"""Which files go when a finished trial's checkpoints are dropped."""

from __future__ import annotations

import json
from pathlib import Path

from scheduler.host.checkpoints import drop
from scheduler.model import TrialId


def attempt(attempts: Path, name: str, resume_from: Path | None = None) -> Path:
    """An attempt's folder with a checkpoint, half of another, and a result."""
    folder = attempts / name
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps({"resume_from": resume_from and str(resume_from)}))
    for file in ("checkpoint.pt", "checkpoint.pt.123.tmp", "result.json"):
        (folder / file).write_text("x")
    return folder / "checkpoint.pt"


def test_drops_the_trial_and_what_it_was_resumed_from(tmp_path: Path) -> None:
    """All attempts of the trial and the chain behind them lose their checkpoints; results and other trials stay."""
    attempts = tmp_path / "attempts"
    first = attempt(attempts, "run_2M_h1.t0000.a1")
    second = attempt(attempts, "run_2M_h1.t0007.a2", first)
    third = attempt(attempts, "run_2M_h1.t0007.a3", second)
    other = attempt(attempts, "run_2M_h1.t0070.a1")
    removed = drop(attempts, TrialId("run_2M_h1", 7))
    assert {path.name for path in removed} == {"checkpoint.pt", "checkpoint.pt.123.tmp"}
    assert not any(path.exists() for path in (first, second, third))
    assert other.exists()
    assert (third.parent / "result.json").exists()


def test_touches_nothing_outside_the_run(tmp_path: Path) -> None:
    """A checkpoint that a user named elsewhere is theirs."""
    elsewhere = attempt(tmp_path / "mine", "model")
    attempts = tmp_path / "attempts"
    own = attempt(attempts, "run_2M_h1.t0000.a1", elsewhere)
    drop(attempts, TrialId("run_2M_h1", 0))
    assert elsewhere.exists()
    assert not own.exists()


def test_no_folder_is_no_error(tmp_path: Path) -> None:
    """On another host there is nothing to remove."""
    assert drop(tmp_path / "none", TrialId("study", 1)) == []
