"""Recording and replay: what the brain was told leads to the same commands again, in another process too."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler import replay
from scheduler.driver import recording
from scheduler.driver.recording import Recording
from scheduler.model import AttemptId, ExitReason, Pressure, QuitRequested, TrialId, WorkerVitals
from tests import builders as b
from tests.simulator import Simulation, World, bytes_of, phase6a, seconds_of

ROOT = Path(__file__).resolve().parents[2]


def simulate(folder: Path, seed: int = 0) -> list[str]:
    """A troubled batch, recorded; returns what was noted."""
    world = World(
        bytes_of=bytes_of, seconds_of=seconds_of, trouble=0.2, lost_every_s=300.0, vitals_s=5.0, strangers=0.3
    )
    hosts = [b.facts(f"w{n}", host=f"host{n}", overhead_bytes=2**28) for n in range(2)]
    batch, notes = Simulation(world, phase6a(2), hosts, seed=seed), list[str]()
    batch.at(4000.0, QuitRequested(source="q"))
    kept = Recording(folder, batch.brain, studies=1, note=notes.append)
    batch.handle = kept.handle
    batch.run(limit_s=200_000)
    kept.close()
    return notes


def go_through(folder: Path, *arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "scheduler.replay", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_troubled_batch_comes_out_the_same(tmp_path: Path, hash_seed: str) -> None:
    """Every command again, in order, whatever the order of sets in that process."""
    assert simulate(tmp_path, seed=int(hash_seed)) == []
    done = go_through(tmp_path, hash_seed=hash_seed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same as in the run" in done.stdout


def test_each_start_is_gone_through(tmp_path: Path) -> None:
    """A run that was started three times has three recordings, and the command reads all of them."""
    for _ in range(3):
        simulate(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "recording").iterdir()} == {0o600}
    assert sorted(path.name for path in (tmp_path / "recording").iterdir()) == [f"000{n}.jsonl.gz" for n in (1, 2, 3)]
    assert len(go_through(tmp_path).stdout.splitlines()) == 3


def test_a_killed_drivers_recording_is_read_to_where_it_ends(tmp_path: Path) -> None:
    """Cut anywhere: what is whole is gone through, and nothing is wrong with it."""
    simulate(tmp_path)
    path = tmp_path / "recording" / "0001.jsonl.gz"
    whole = path.read_bytes()
    for part in (0.3, 0.7, 0.99):
        path.write_bytes(whole[: int(len(whole) * part)])
        assert replay.main([str(tmp_path)]) == 0


def test_other_rules_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the code or a rule has changed, the first event that leads elsewhere is shown."""
    simulate(tmp_path)
    path = tmp_path / "recording" / "0001.jsonl.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(gzip.compress(text.replace('"reserve_bytes":0', f'"reserve_bytes":{2**34}', 1).encode()))
    assert replay.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "led to" in said and "in the run to" in said


def test_a_brain_that_raised_raises_again(tmp_path: Path) -> None:
    """What ended a driver is in the recording, and comes out again."""
    batch = Simulation(World(bytes_of=bytes_of, seconds_of=seconds_of), phase6a(1), [b.facts("w")], seed=0)
    kept = Recording(tmp_path, batch.brain, studies=1, note=pytest.fail)
    with pytest.raises(KeyError):
        kept.handle(b.asked(1, study="nobody has opened it"), 1.0)
    kept.close()
    (start,) = recording.read(tmp_path)
    assert [step.raised for step in start.steps] == ["KeyError"]
    assert replay.main([str(tmp_path)]) == 0


def test_show_prints_each_event_and_what_followed(tmp_path: Path) -> None:
    """A post-mortem reads the run as a story: when, what was told, what was ordered."""
    simulate(tmp_path)
    lines = go_through(tmp_path, "--show").stdout.splitlines()
    told = [line.split()[1:3] for line in lines if "->" not in line]
    assert ["AttemptStarted", "attempt=2M_h1/0/1"] in told, lines[:20]
    assert any("-> LaunchAttempt attempt=2M_h1/0/1 worker=" in line for line in lines)


@pytest.mark.parametrize("content", [None, b"", b"no gzip", gzip.compress(b'{"v": 99}\n')])
def test_what_is_no_recording_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    """No folder, an empty file, another file, another version: exit 2 and what is wrong."""
    if content is not None:
        (tmp_path / "recording").mkdir()
        (tmp_path / "recording" / "0001.jsonl.gz").write_bytes(content)
    done = go_through(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("replay: ") and len(done.stderr.splitlines()) == 1


def test_a_disk_that_refuses_costs_the_recording_only(tmp_path: Path) -> None:
    """The brain is told all the same, and it is noted once."""
    notes: list[str] = []
    batch = Simulation(World(bytes_of=bytes_of, seconds_of=seconds_of), phase6a(1), [b.facts("w")], seed=0)
    (tmp_path / "recording").write_text("a file where the folder would be")
    batch.handle = Recording(tmp_path, batch.brain, studies=1, note=notes.append).handle
    assert batch.run().ended is not None
    assert len(notes) == 1 and "nothing more is recorded" in notes[0]


def test_a_value_without_a_form_costs_the_recording_only(tmp_path: Path) -> None:
    """Whatever an event holds, the brain is told, the driver goes on, and what was recorded before can be read."""
    notes: list[str] = []
    batch = Simulation(World(bytes_of=bytes_of, seconds_of=seconds_of), phase6a(1), [b.facts("w")], seed=0)
    kept = Recording(tmp_path, batch.brain, studies=1, note=notes.append)
    kept.handle(QuitRequested(source="q"), 1.0)
    kept.handle(QuitRequested(source=object()), 2.0)  # type: ignore[arg-type]
    kept.handle(QuitRequested(source="again"), 3.0)
    kept.close()
    assert batch.brain.draining == "q" and batch.brain.at_once
    assert len(notes) == 1 and "cannot be recorded: object" in notes[0]


def test_values_come_back_as_they_were() -> None:
    """Dataclasses, enums, tuples, sets, and mappings by identifiers."""
    attempt = AttemptId(TrialId("s", 3), 2)
    vitals = WorkerVitals(
        worker="w",
        available_bytes=None,
        pressure=Pressure.SOFT,
        used_bytes={attempt: 5},
        step_s={attempt: float("inf")},
    )
    for value in (vitals, b.facts(), b.outcome(ExitReason.LOST), b.asked(1), (1, ("a", frozenset({2}))), {"a": [None]}):
        assert recording.decode(recording.encode(value)) == value


def test_only_values_of_ours_are_made() -> None:
    """A recording names classes; none but dataclasses and enums of model and core are looked up."""
    for name in ("driver.driver:Driver", "model.ids:re", "core.state:BatchState", "os:system"):
        with pytest.raises((ValueError, AttributeError)):
            recording.decode({"$": name})
