"""The launch fence: each attempt is started once, and what another run left in its folder is out of the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.host.claim import claim

REPO = Path(__file__).resolve().parents[2]


def test_a_claim_is_won_once_across_processes(tmp_path: Path) -> None:
    """Ten processes start the same attempt of one run at once: one of them may."""
    folder = tmp_path / "runs" / "s.t0000.a1"
    code = "import sys, pathlib\nfrom scheduler.host.claim import claim\nprint(claim(pathlib.Path(sys.argv[1]), 'run'))"
    racers = [
        subprocess.Popen([sys.executable, "-c", code, folder], cwd=REPO, stdout=subprocess.PIPE, text=True)
        for _ in range(10)
    ]
    said = sorted(racer.communicate()[0].strip() for racer in racers)
    assert said == ["False"] * 9 + ["True"]
    assert not claim(folder, "run")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_another_run_left_is_set_aside(tmp_path: Path) -> None:
    """Its result and checkpoint are not taken for this run's, nor lost; and it is said."""
    folder, notes = tmp_path / "s.t0000.a1", list[str]()
    for run in ("aaaaaaaa11", "bbbbbbbb22", "aaaaaaaa11"):
        assert claim(folder, run, note=notes.append)
        assert [path.name for path in folder.iterdir()] == ["claim"]
        (folder / "result.json").write_text(run)
    names = {path.name: (path / "result.json").read_text() for path in tmp_path.iterdir()}
    assert names == {
        "s.t0000.a1": "aaaaaaaa11",
        "s.t0000.a1.of-aaaaaaaa": "aaaaaaaa11",
        "s.t0000.a1.of-bbbbbbbb": "bbbbbbbb22",
    }
    assert len(notes) == 2 and "left by another run" in notes[0] and "of-aaaaaaaa" in notes[0]
    assert claim(folder, "cccccccc33") and (tmp_path / "s.t0000.a1.of-aaaaaaaa-2").is_dir()


def test_a_folder_in_which_another_runs_trial_works_is_left_alone(tmp_path: Path) -> None:
    """Two runs of one name on one host: the later one waits, and says for what."""
    folder = tmp_path / "s.t0000.a1"
    assert claim(folder, "one")
    with pytest.raises(OSError, match="in use by another run"):
        claim(folder, "two", in_use=lambda path: path == folder)
    assert not claim(folder, "one")


@pytest.mark.parametrize("text", ["", "123 boot", "\x00\x01"])
def test_a_claim_that_names_no_run_is_respected(tmp_path: Path, text: str) -> None:
    """Torn, or written by an earlier version: whose it is cannot be told."""
    folder = tmp_path / "s.t0000.a1"
    folder.mkdir()
    (folder / "claim").write_text(text)
    assert not claim(folder, "run")
