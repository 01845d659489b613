"""Completion by the shell, tried in the shells that are here, and the help that fits its terminal."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.cli import completion
from scheduler.cli.schedule import command, execute

ROOT = Path(__file__).resolve().parents[2]
ENVIRON = {**os.environ, "HEADROOM_PYTHON": sys.executable, "COLUMNS": "80"}


def shell(program: str, script: str) -> str:
    """What a shell says to a script, in the checkout."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([program, "-c", script], cwd=ROOT, env=ENVIRON, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_bash_completes_options_and_values() -> None:
    """After the documented line: options by their beginning, the next of a list of budgets, files."""
    words = 'COMP_WORDS=(bin/schedule {}); COMP_CWORD={}; _schedule_completion bin/schedule; echo "${{COMPREPLY[*]}}"'
    script = 'eval "$(bin/schedule --completion bash)"; '
    assert shell("bash", script + words.format("--memory-b", 1)).split() == ["--memory-budget"]
    assert shell("bash", script + words.format("--budgets 20M,2", 2)).split() == ["20M,2M", "20M,200M", "20M,2B"]
    assert "complete" in shell("bash", script + "complete -p schedule")


@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_other_shells_take_the_script(name: str) -> None:
    """It is for the command by its name, calls it by its path, and the shell reads it without complaint."""
    program = Path("/opt/it is/bin/schedule")
    script = completion.script(command, name, program)
    assert "_HEADROOM_COMPLETE" in script
    assert str(program) in script.replace("\\", "")
    assert " schedule)" not in script
    line = 'eval "$(bin/schedule --completion zsh)"' if name == "zsh" else "bin/schedule --completion fish | source"
    shell(name, f"autoload -Uz compinit; compinit -D; {line}" if name == "zsh" else line)


def test_another_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """With the shells that there are."""
    assert execute(["--completion", "tcsh"]) == 2
    assert "bash, zsh or fish" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["scheduler", "scheduler.cli.footprint"])
def test_help_fits_80_columns(module: str) -> None:
    """No line is longer than a terminal is wide, the examples' included."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, env=ENVIRON, capture_output=True, text=True, check=True
    )
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_what_will_not_be_as_written_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    """More threads than cores, and a dashboard's port that somebody has, in the dry run."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = execute(["--budgets", "2M", "--dry-run", "--threads", "999", "--dashboard", str(port)])
    out = capsys.readouterr().out
    assert code == 0
    assert "--threads 999: the largest worker has" in out
    assert f"--dashboard 127.0.0.1:{port} cannot be had" in out


def test_the_same_is_said_before_a_real_run_begins(tmp_path: Path) -> None:
    """In a line each, before the first of the run's own; Dask's five lines of warning are not there."""
    (tmp_path / "objective.py").write_text("def objective(trial):\n    return trial.suggest_float('x', 0, 1)\n")
    command = [sys.executable, "-m", "scheduler", "--objective", "objective.py:objective", "--trials", "1"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*command, "--threads", "99", "--dashboard", port],
            cwd=tmp_path,
            env=ENVIRON,
            capture_output=True,
            text=True,
            check=True,
        )
    before, began, after = done.stderr.partition(" batch.started ")
    assert began, done.stderr
    assert "headroom: --threads 99: the largest worker has" in before
    assert f"headroom: --dashboard 127.0.0.1:{port} cannot be had (Address already in use): another" in before
    assert "dashboard.ready url=http://127.0.0.1:" in after
    assert "already in use" not in after
    assert "warn" not in after


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--device", "cuda"], "no NVIDIA GPU"),
        (["--device", "mps"], "no Mac with Apple silicon"),
        (["--dashboard", "192.0.2.1:8787"], "no address of this machine"),
        (["--dashboard", "no-such-host.invalid:8787"], "no address of this machine"),
        (["--dashboard", "foo"], "must be a port"),
        (["--dashboard", ":99999"], "must be a port"),
    ],
)
def test_what_this_machine_has_not_is_refused_in_one_line(
    given: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not twenty trials that fit nowhere: nothing is started or written, with --dry-run or without."""
    if given == ["--device", "cuda"] and shutil.which("nvidia-smi"):
        pytest.skip("this machine may have an NVIDIA GPU")
    if given == ["--device", "mps"] and sys.platform == "darwin":
        pytest.skip("this is a Mac")
    monkeypatch.chdir(tmp_path)
    for mode in (["--dry-run"], []):
        assert execute(["--budgets", "2M", "--horizons", "1", "--trials", "1", *mode, *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"headroom: {given[0]} ")
        assert why in line
    assert list(tmp_path.iterdir()) == []


def test_a_budget_without_a_unit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """100 of what? It was taken for bytes, and nothing fitted."""
    assert execute(["--budgets", "2M", "--dry-run", "--memory-budget", "100"]) == 2
    assert "100GiB" in capsys.readouterr().err
