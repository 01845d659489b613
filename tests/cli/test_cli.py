"""The command: exit codes, one-line errors with nothing written, the plan's two forms, and the setup of bin/."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scheduler import __version__
from scheduler.cli import schedule
from scheduler.settings import layers

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_HEAD = "date,open,high,low,close,volume\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, so that anything written is seen."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr; stdout must be empty."""
    code = schedule.execute(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("headroom: ")
    return code, err


def bars(rows: int, *, broken: tuple[int, ...] = ()) -> str:
    """A CSV of daily bars; rows in `broken` have no closing price."""
    lines = [SAMPLE_HEAD]
    for day in range(rows):
        date = f"{1990 + day // 336}-{day // 28 % 12 + 1:02d}-{day % 28 + 1:02d}"
        close = "" if day in broken else str(100 + day % 13)
        lines.append(f"{date},{100 + day % 13},{102 + day % 13},{99 + day % 13},{close},{1000 + day}\n")
    return "".join(lines)


# -- what it says ----------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints one line and exits 0."""
    assert schedule.execute(["--version"]) == 0
    assert capsys.readouterr().out == f"headroom, version {__version__}\n"


def test_help_names_every_argument_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """--help shows the arguments of the design, examples, how to stop, and what the exit codes mean."""
    assert schedule.execute(["--help"]) == 0
    text = capsys.readouterr().out
    arguments = (
        "budgets horizons trials memory-budget slots storage cluster data config experiment name max-epochs max-steps "
        "pruner watchdog dry-run json log-level version"
    )
    for word in arguments.split(" "):
        assert f"--{word} " in text, word
    assert "bin/schedule --budgets 2M,20M,200M,2B\n" in text
    assert "130 stopped by the user" in text


def test_dry_run_is_a_table_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan goes to stdout, a line per study; no file appears."""
    assert schedule.execute(["--budgets", "2m,20M", "--horizons", "1", "--device", "cpu", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines() if line.startswith("phase6a")] == [
        "phase6a_2M_h1",
        "phase6a_20M_h1",
    ]
    assert err == ""
    assert list(here.iterdir()) == []


def test_dry_run_as_json_is_nothing_but_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json leaves no other word on stdout."""
    assert schedule.execute(["--budgets", "2M", "--trials", "7", "--device", "cpu", "--dry-run", "--json"]) == 0
    studies = json.loads(capsys.readouterr().out)["studies"]
    assert [study["trials"] for study in studies] == [7, 7, 7]


def test_experiment_files_may_follow_one_another(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--experiment a.yaml b.yaml`, as a shell's pattern gives it, runs both."""
    for name, budget in (("a", "2M"), ("b", "20M")):
        (here / f"{name}.yaml").write_text(f"budgets: [{budget}]\nhorizons: [1]\n")
    assert schedule.execute(["--experiment", "a.yaml", "b.yaml", "--device", "cpu", "--dry-run", "--json"]) == 0
    studies = json.loads(capsys.readouterr().out)["studies"]
    assert [study["budget"] for study in studies] == ["2M", "20M"]


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budgets", "5M"], ["--budgets", "5M", "2M, 20M, 200M, 2B"]),
        (["--trials", "many"], ["--trials", "many", "whole number"]),
        (["--trials", "0"], ["--trials", "at least 1"]),
        (["--budgts", "2M"], ["--budgts", "--budgets"]),
        (["--watchdog", "maybe"], ["--watchdog", "on, observe or off"]),
        (["--config", "missing.yaml"], ["missing.yaml", "No such file"]),
        (["--data", "missing.csv"], ["missing.csv"]),
        (["--memory-budget", "100000GiB"], ["memory_budget 100000GiB", "usable"]),
        (["--json"], ["--dry-run"]),
        (["2M"], ["'2M'"]),
        (["--storage", "nothing"], ["--storage", "nothing"]),
        (["--cluster", "somewhere"], ["--cluster", "somewhere", "tcp://"]),
    ],
)
def test_bad_arguments_are_one_line_exit_2_and_nothing_written(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    """Each names the value seen and the fix."""
    code, line = refused(capsys, *arguments)
    assert code == 2
    for word in words:
        assert word in line, line
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bars(50), ["50"]),
        (bars(900).replace("close", "closing", 1), ["close"]),
        (bars(900, broken=(400, 401, 700)), ["3 of 900", "row 402"]),
        ("\x00\x01not a table", []),
    ],
    ids=["too short", "missing column", "empty cells", "no table"],
)
def test_bad_data_is_one_line_exit_2_and_nothing_written(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    """Too short, without a column, with gaps (how many), or no table at all: said before anything starts."""
    data = tmp_path / "bars.csv"
    data.write_text(text)
    code, line = refused(capsys, "--budgets", "2M", "--horizons", "1", "--device", "cpu", "--data", str(data))
    assert code == 2
    for word in ["bars.csv", *words]:
        assert word in line, line
    assert list(here.iterdir()) == []


def test_a_storage_out_of_reach_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A database file that cannot be there is said at once, with the URL, and no run folder is made."""
    (here / "file").write_text("")
    url = f"sqlite:///{here}/file/study.db"
    code, line = refused(capsys, "--budgets", "2M", "--horizons", "1", "--device", "cpu", "--storage", url)
    assert code == 2
    assert "file/study.db" in line
    assert [path.name for path in here.iterdir()] == ["file"]


def test_a_storage_in_a_folder_that_is_not_there_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As under plain Optuna: a typo in the path begins no new study in a new folder; the line says what makes it."""
    arguments = ["--budgets", "2M", "--horizons", "1", "--device", "cpu", "--storage", "sqlite:///no where/x.db"]
    code, line = refused(capsys, *arguments)
    assert code == 2 and "there is no folder no where" in line and "mkdir -p 'no where'" in line
    assert list(here.iterdir()) == []


def test_a_cluster_that_does_not_answer_is_refused_in_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A port where something listens but never answers: one line within some ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        code, line = refused(capsys, "--budgets", "2M", "--cluster", address, "--device", "cpu")
        assert time.monotonic() - started < 20
    assert code == 2
    assert address in line and "something is there and says nothing" in line
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "why"),
    [("tcp://127.0.0.1:1", "connection refused: nothing listens there"), ("tcp://no-host.invalid:1", "not known")],
)
def test_a_cluster_that_is_not_there_is_refused_with_the_reason(
    here: Path, capsys: pytest.CaptureFixture[str], address: str, why: str
) -> None:
    """A dead port and a name that is none: the address, what is the matter with it, and what to do."""
    code, line = refused(capsys, "--budgets", "2M", "--cluster", address, "--device", "cpu")
    assert code == 2
    assert f"--cluster {address}" in line and why in line and "dask scheduler" in line
    assert list(here.iterdir()) == []


def test_a_budget_below_the_smallest_trial_is_exit_3(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can fit: exit 3, the line says what would help, nothing is written; the dry run says the same."""
    arguments = ["--budgets", "2M", "--device", "cpu", "--memory-budget", "300MiB"]
    code, line = refused(capsys, *arguments)
    assert code == 3
    assert "what would help: --memory-budget" in line
    assert list(here.iterdir()) == []
    assert schedule.execute([*arguments, "--dry-run"]) == 3


def test_an_objective_that_cannot_be_imported_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 with the import's own last line, by the run and by the dry run; torch is not imported here for it."""
    (here / "settings.yaml").write_text("training: {objective: 'nomod:nofun'}\n")
    arguments = ["--config", "settings.yaml", "--budgets", "2M", "--horizons", "1", "--device", "cpu"]
    for more in ([], ["--dry-run"]):
        code, line = refused(capsys, *arguments, *more)
        assert code == 2
        assert "training.objective: objective 'nomod:nofun'" in line and "No module named 'nomod'" in line, line
    assert [path.name for path in here.iterdir()] == ["settings.yaml"]


# Each row of the README's table of exit codes, and the test that a real command (or `cli.execute`) ends so.
EXIT_CODES = {
    "0 every study reached its quota": "test_end_to_end.py::test_runs_on_a_cluster_started_by_hand",
    "1 a study was refused at the start": "faults/test_ends.py::test_a_refused_study_makes_the_code_1",
    "1 a study was closed early": "faults/test_resume.py::test_a_study_that_only_fails_is_closed_and_the_others_go_on",
    "1 a study reached its quota with": "faults/test_ends.py::test_a_search_in_which_every_trial_fails_is_no_success",
    "1 the Dask scheduler was away": "faults/test_resume.py::test_the_loss_of_the_dask_scheduler_is_a_clear_end",
    "1 the results could not be written": "faults/test_ends.py::test_results_that_cannot_be_written_are_no_success",
    "1 the run folder or the SQLite": "faults/test_folders.py::test_a_run_folder_that_is_removed_ends_the_run",
    "2 wrong usage or configuration": "cli/test_cli.py::test_bad_arguments_are_one_line_exit_2_and_nothing_written",
    "2 the objective cannot be imported": "cli/test_cli.py::test_an_objective_that_cannot_be_imported_is_refused",
    "3 nothing can fit": "cli/test_cli.py::test_a_budget_below_the_smallest_trial_is_exit_3",
    "124 stopped by `--timeout`": "faults/test_ends.py::test_the_limit_of_the_command_drains_it_with_124",
    "130 stopped by the user": "faults/test_resume.py::test_a_stop_drains_and_the_next_start_goes_on",
}


def test_every_exit_code_of_the_readme_has_its_test() -> None:
    """The table's rows are those that a test produces, one for one, and those tests exist."""
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| exit code | |") :].split("\n\n")[0]
    rows = [" ".join(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()[2:]]
    assert len(rows) == len(EXIT_CODES)
    for row, (said, test) in zip(rows, EXIT_CODES.items(), strict=True):
        assert row.startswith(said), row
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


# -- bin/ ------------------------------------------------------------------------------------------------------------

# A Python that makes environments of itself and notes what is installed, and is the real one otherwise: the setup is
# tested in full without a network.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"-m venv"*)
        for dir; do :; done
        mkdir -p "$dir/bin"; rm -f "$dir/.installing"; cp "$0" "$dir/bin/python"; echo venv >>"{log}" ;;
    *"-m pip --version"*) ;;
    *"-m pip install"*) echo "pip $*" >>"{log}"; exit $(cat "{rc}") ;;
    *"-m scheduler"*) echo "ran $0" ;;
    *"-I -c"*) [ -e "{has}" ] ;;
    *) exec {real} "$@" ;;
esac
"""


class Checkout:
    """A copy of what bin/ needs, with the fake Python first on PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(ROOT / "bin", root / "bin")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, root / name)
        self.log, self.rc, self.has = root / "log", root / "rc", root / "has"
        self.rc.write_text("0")
        path = root / "path"
        path.mkdir()
        fake = path / "python3"
        fake.write_text(FAKE_PYTHON.format(log=self.log, rc=self.rc, has=self.has, real=sys.executable))
        fake.chmod(0o755)
        self.environment = {"PATH": f"{path}:/usr/bin:/bin", "HOME": str(root)}

    def start(self, **extra: str) -> subprocess.Popen[str]:
        """`bin/schedule` in the background."""
        return subprocess.Popen(
            [str(self.root / "bin" / "schedule")],
            env={**self.environment, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def run(self, **extra: str) -> tuple[int, str, str]:
        """`bin/schedule` to its end: exit code, stdout, stderr."""
        process = self.start(**extra)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def installs(self) -> int:
        """How often pip was run."""
        return self.log.read_text().count("pip -m") if self.log.exists() else 0


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A fresh checkout on a machine with nothing installed."""
    return Checkout(tmp_path / "checkout")


def test_first_use_installs_the_pins_once_and_says_so(checkout: Checkout) -> None:
    """The first start makes .venv from constraints.txt with one line on stderr, the second is silent."""
    code, out, err = checkout.run()
    assert (code, out) == (0, f"ran {checkout.root}/.venv/bin/python\n")
    assert err.count("\n") == 1
    assert "setting up" in err
    assert f"-c {checkout.root}/constraints.txt -e {checkout.root}[dashboard]" in checkout.log.read_text()
    assert checkout.run() == (0, out, "")
    assert checkout.installs == 1


def test_only_the_tests_bring_the_test_tools(checkout: Checkout) -> None:
    """bin/test asks for them, and installs into what a user's first start made; then nothing is installed again."""
    checkout.run()
    assert "HEADROOM_EXTRAS=dev,dashboard\n" in (ROOT / "bin" / "test").read_text()
    assert checkout.run(HEADROOM_EXTRAS="dev,dashboard")[0] == 0
    assert f"-e {checkout.root}[dev,dashboard]" in checkout.log.read_text()
    assert checkout.installs == 2
    assert checkout.run()[2] == ""
    assert checkout.installs == 2


def test_an_environment_that_has_the_package_is_used_as_it_is(checkout: Checkout) -> None:
    """Where python3 has the package nothing is made and nothing installed."""
    checkout.has.write_text("")
    assert checkout.run() == (0, f"ran {checkout.root}/path/python3\n", "")
    assert not (checkout.root / ".venv").exists()


def test_changed_pins_are_installed(checkout: Checkout) -> None:
    """After a change of constraints.txt the next start installs again into the same environment."""
    checkout.run()
    (checkout.root / "constraints.txt").write_text("click==8.5.1\n")
    checkout.run()
    assert checkout.log.read_text().count("venv\n") == 1
    assert checkout.installs == 2


def test_an_install_that_failed_is_started_over(checkout: Checkout) -> None:
    """A failed or interrupted setup ends with exit 2 and is repeated from an empty environment."""
    checkout.rc.write_text("1")
    code, out, err = checkout.run()
    assert (code, out) == (2, "")
    assert "failed" in err
    checkout.rc.write_text("0")
    code, out, err = checkout.run()
    assert code == 0
    assert "was cut off" in err
    assert checkout.log.read_text().count("venv\n") == 2


def test_two_first_starts_at_once_install_once(checkout: Checkout) -> None:
    """The second waits for the first and then runs."""
    both = [checkout.start(), checkout.start()]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(out.startswith("ran ") for out, _ in outputs)
    assert checkout.installs == 1


def test_an_old_python_is_one_line(checkout: Checkout) -> None:
    """Python 3.10 and older are refused by name before anything is made."""
    fake = checkout.root / "path" / "python3"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    (checkout.root / "path" / "none").mkdir()
    for name in ("python3.11", "python3.12", "python3.13", "python3.14"):
        shutil.copy(fake, checkout.root / "path" / name)
    code, out, err = checkout.run()
    assert (code, out) == (2, "")
    assert err == ("headroom: needs Python 3.11 or newer, found Python 3.9.2; install one or set HEADROOM_PYTHON\n")
    assert not (checkout.root / ".venv").exists()


def test_scripts_are_posix_sh() -> None:
    """dash, where there is one, finds no fault with the scripts' syntax; they are executable."""
    shell = shutil.which("dash") or "/bin/sh"
    for name in ("bin/schedule", "bin/test", "bin/_bootstrap", ".ci/run"):
        subprocess.run([shell, "-n", str(ROOT / name)], check=True)
        assert name == "bin/_bootstrap" or os.access(ROOT / name, os.X_OK)


def test_no_variable_of_the_start_script_is_taken_for_a_setting() -> None:
    """A first start hands its own variables on; one that the settings do not know would end it with 2."""
    script = (ROOT / "bin" / "_bootstrap").read_text()
    used = set(re.findall(r"HEADROOM_([A-Z_]+)", script))
    assert {"EXTRAS", "SETUP_VENV"} <= used
    assert used <= set(layers.ENVIRONMENT_OTHERS)


OWN = "def objective(trial):\n    return trial.suggest_float('x', 0, 1)\n\ndef sized(params):\n    return 'much'\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--objective", "own.py:objectiv"], ["no 'objectiv'", "did you mean 'objective'?"]),
        (["--memory", "3"], ["--memory", "'3'", "write 3GiB or 3MiB"]),
        (["--memory", "own.py:size"], ["--memory", "no attribute 'size'"]),
        (["--memory", "nowhere.py:sized"], ["--memory", "no file", "nowhere.py"]),
        (["--sampler", "own.py:sized"], ["--sampler own.py:sized raised TypeError"]),
        (["--storage", "sqlit:///x.db"], ["--storage sqlit:///x.db", "use sqlite:///FILE"]),
    ],
)
def test_a_typo_in_an_argument_of_an_objective_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    """What, the value seen, the fix; nothing is written. A function may stand in a file for each of them."""
    (here / "own.py").write_text(OWN)
    code, line = refused(capsys, "--objective", "own.py:objective", "--device", "cpu", *arguments)
    assert code == 2
    for word in said:
        assert word in line, line
    assert not (here / "runs").exists()
