"""An attempt's folder: its files' names, started once, what another run left is set aside, which checkpoints go."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.host import attempt_folder
from scheduler.host.attempt_folder import AttemptFolder, drop_checkpoints
from scheduler.model import TrialId
from training import hpo, model_file, trial

REPO = Path(__file__).resolve().parents[2]


def test_the_names_of_its_files_stand_in_one_place() -> None:
    """No other module of ours spells them, and the training side spells the same."""
    module = attempt_folder
    own = {module.TASK, module.LOG, module.CHECKPOINT, module.MODEL, module.RESULT, module.KILL, module.WOULD_KILL}
    elsewhere = {}
    for path in sorted((REPO / "scheduler").rglob("*.py")):
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        if path.name != "attempt_folder.py" and (found := own & texts):
            elsewhere[path.name] = found
    assert elsewhere == {}
    assert (trial.LOG, trial.RESULT) == (module.LOG, module.RESULT)
    assert (hpo.CHECKPOINT, model_file.NAME) == (module.CHECKPOINT, module.MODEL)


@pytest.mark.parametrize("text", ["", "[]", '{"reason": "nonsense"}', '{"reason": ["evicted"]}', "[" * 50_000])
def test_a_record_that_is_none_of_ours_is_no_kill(tmp_path: Path, text: str) -> None:
    """A trial's own code can write there: it cannot make its end look like a kill of a kind that there is not."""
    (tmp_path / "kill.json").write_text(text)
    assert AttemptFolder(tmp_path).kill() is None


def test_a_claim_is_won_once_across_processes(tmp_path: Path) -> None:
    """Ten processes start the same attempt of one run at once: one of them may."""
    folder = tmp_path / "runs" / "s.t0000.a1"
    code = (
        "import sys, pathlib\nfrom scheduler.host.attempt_folder import AttemptFolder\n"
        "print(AttemptFolder(pathlib.Path(sys.argv[1])).claim('run'))"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, folder], cwd=REPO, stdout=subprocess.PIPE, text=True)
        for _ in range(10)
    ]
    said = sorted(racer.communicate()[0].strip() for racer in racers)
    assert said == ["False"] * 9 + ["True"]
    assert not AttemptFolder(folder).claim("run")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_another_run_left_is_set_aside(tmp_path: Path) -> None:
    """Its result and checkpoint are not taken for this run's, nor lost; and it is said."""
    folder, notes = tmp_path / "s.t0000.a1", list[str]()
    for run in ("aaaaaaaa11", "bbbbbbbb22", "aaaaaaaa11"):
        assert AttemptFolder(folder).claim(run, note=notes.append)
        assert [path.name for path in folder.iterdir()] == ["claim"]
        (folder / "result.json").write_text(run)
    names = {path.name: (path / "result.json").read_text() for path in tmp_path.iterdir()}
    assert names == {
        "s.t0000.a1": "aaaaaaaa11",
        "s.t0000.a1.of-aaaaaaaa": "aaaaaaaa11",
        "s.t0000.a1.of-bbbbbbbb": "bbbbbbbb22",
    }
    assert len(notes) == 2 and "left by another run" in notes[0] and "of-aaaaaaaa" in notes[0]
    assert AttemptFolder(folder).claim("cccccccc33") and (tmp_path / "s.t0000.a1.of-aaaaaaaa-2").is_dir()


def test_a_folder_in_which_another_runs_trial_works_is_left_alone(tmp_path: Path) -> None:
    """Two runs of one name on one host: the later one waits, and says for what."""
    folder = tmp_path / "s.t0000.a1"
    assert AttemptFolder(folder).claim("one")
    with pytest.raises(OSError, match="in use by another run"):
        AttemptFolder(folder).claim("two", in_use=lambda path: path == folder)
    assert not AttemptFolder(folder).claim("one")


@pytest.mark.parametrize("text", ["", "123 boot", "\x00\x01"])
def test_a_claim_that_names_no_run_is_respected(tmp_path: Path, text: str) -> None:
    """Torn, or written by an earlier version: whose it is cannot be told."""
    folder = tmp_path / "s.t0000.a1"
    folder.mkdir()
    (folder / "claim").write_text(text)
    assert not AttemptFolder(folder).claim("run")


def attempt(attempts: Path, name: str, resume_from: Path | None = None) -> Path:
    """An attempt's folder with a checkpoint, half of another, a model and a result."""
    folder = attempts / name
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps({"resume_from": resume_from and str(resume_from)}))
    for file in ("checkpoint.safetensors", "checkpoint.safetensors.123.tmp", "model.safetensors", "result.json"):
        (folder / file).write_text("x")
    return folder / "checkpoint.safetensors"


def test_drops_the_trial_and_what_it_was_resumed_from(tmp_path: Path) -> None:
    """All attempts of the trial and the chain behind them lose their checkpoints; results and other trials stay."""
    attempts = tmp_path / "attempts"
    first = attempt(attempts, "run_2M_h1.t0000.a1")
    second = attempt(attempts, "run_2M_h1.t0007.a2", first)
    third = attempt(attempts, "run_2M_h1.t0007.a3", second)
    other = attempt(attempts, "run_2M_h1.t0070.a1")
    removed = drop_checkpoints(attempts, TrialId("run_2M_h1", 7))
    kinds = {"checkpoint.safetensors", "checkpoint.safetensors.123.tmp", "model.safetensors"}
    assert {path.name for path in removed} == kinds
    assert not any(path.exists() for path in (first, second, third))
    assert other.exists()
    assert (third.parent / "result.json").exists()


def test_touches_nothing_outside_the_run(tmp_path: Path) -> None:
    """A checkpoint that a user named elsewhere is theirs."""
    elsewhere = attempt(tmp_path / "mine", "model")
    attempts = tmp_path / "attempts"
    own = attempt(attempts, "run_2M_h1.t0000.a1", elsewhere)
    drop_checkpoints(attempts, TrialId("run_2M_h1", 0))
    assert elsewhere.exists()
    assert not own.exists()


def test_no_folder_is_no_error(tmp_path: Path) -> None:
    """On another host there is nothing to remove."""
    assert drop_checkpoints(tmp_path / "none", TrialId("study", 1)) == []


def test_an_objectives_own_checkpoint_is_found_whatever_its_suffix(tmp_path: Path) -> None:
    """`checkpoint.pt` of a user's torch.save is what the next attempt goes on from; half a file is not."""
    folder = AttemptFolder(tmp_path)
    (tmp_path / "checkpoint.pt.123.tmp").write_text("half")
    assert not folder.has_checkpoint
    (tmp_path / "checkpoint.pt").write_text("whole")
    assert folder.checkpoint == tmp_path / "checkpoint.pt"
    folder.drop_checkpoint()
    assert list(tmp_path.iterdir()) == []


def test_the_first_checkpoint_that_can_be_read_is_found_and_each_before_it_explained(tmp_path: Path) -> None:
    """A file or a folder; nothing is believed from its name."""
    file, folder = tmp_path / "older.pt", tmp_path / "folder"
    file.write_bytes(b"x")
    folder.mkdir()
    gone = str(tmp_path / "gone.pt")
    assert attempt_folder.first_readable([str(folder), str(file)]) == (str(folder), [])
    assert attempt_folder.first_readable([gone, str(file)]) == (str(file), [(gone, "No such file or directory")])
    assert attempt_folder.first_readable([gone]) == (None, [(gone, "No such file or directory")])
    assert attempt_folder.first_readable([]) == (None, [])
