"""`bin/footprint`: the table, the micro-batch that fits, JSON, and one-line errors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from scheduler.cli import footprint

ROOT = Path(__file__).resolve().parents[2]
PLAN_CASE = ("--d-model", "1024", "--n-layers", "256", "--d-ff-ratio", "2")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = footprint.execute(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_one_architecture_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Every component, the total, the micro-batch that fits and how sure it is."""
    code, out, err = run(capsys, *PLAN_CASE, "--micro-batch", "64", "--memory", "128GiB")
    assert (code, err) == (0, "")
    for word in ("weights", "gradients", "optimizer_state", "activations", "runtime", "host", "fits", "how sure:"):
        assert word in out


def test_the_mac_takes_sixty_four(capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration of the lost two days: 64 at most under 128 GB with Metal's cap."""
    code, out, _ = run(capsys, *PLAN_CASE, "--memory", "128GB", "--device", "mps", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["params"]["micro_batch"] == found["fitting_micro_batch"] == 64
    assert found["params"]["accumulation_steps"] == 4
    assert found["fits"] and found["source"] == "prior" and found["samples"] == 0


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A trial too large for the limit: exit code 3, and no micro-batch."""
    code, out, _ = run(capsys, *PLAN_CASE, "--memory", "8GiB", "--json")
    found = json.loads(out)
    assert code == 3
    assert found["fitting_micro_batch"] is None and not found["fits"]


def test_a_recipe_makes_a_large_model_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """2B on 24 GiB: refused in fp32 with the recipe that would do, and with that recipe it fits."""
    model = ("--d-model", "1024", "--n-layers", "240", "--d-ff-ratio", "2", "--memory", "20GiB")
    code, out, _ = run(capsys, *model)
    assert code == 3 and "it would with --recipe adam8bit" in out
    code, out, _ = run(capsys, *model, "--recipe", "adam8bit", "--json")
    assert code == 0
    parts = json.loads(out)["components"]
    assert parts["optimizer_state"] < 0.6 * parts["weights"]


def test_a_budget_lists_its_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    """All architectures of a budget with the micro-batch of each, as table and as JSON."""
    code, out, _ = run(capsys, "--budget", "2B", "--memory", "128GiB")
    assert code == 0 and "1024" in out and "architectures fit" in out
    _, out, _ = run(capsys, "--budget", "2B", "--memory", "128GiB", "--json")
    assert json.loads(out)["fitting"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--d-model"),
        (["--d-model", "x"], "--d-model"),
        (["--d-model", "100", "--n-layers", "2"], "multiple"),
        (["--budget", "3M"], "3M"),
        (["--budget", "2M", "--d-model", "64"], "exclude"),
        ([*PLAN_CASE, "--memory", "100G"], "100GiB"),
        ([*PLAN_CASE, "--memory", "0GiB"], "--memory"),
        ([*PLAN_CASE, "--patch-length", "70"], "--patch-length"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    """Exit code 2 and one line on stderr that names what was wrong."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("headroom: ") and err.count("\n") == 1 and said in err


def test_a_data_file_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its rows and columns are in the table, and a bad file is one line."""
    path = tmp_path / "bars.csv"
    days = np.busday_offset(np.datetime64("1950-01-02"), np.arange(20_000)).astype(str)
    path.write_text("date,open,high,low,close,volume\n" + "".join(f"{day},9,9,9,9,7\n" for day in days))
    small = ("--d-model", "64", "--n-layers", "2", "--micro-batch", "1", "--memory", "1GiB", "--json")
    plain = json.loads(run(capsys, *small)[1])["components"]
    counted = json.loads(run(capsys, *small, "--data", str(path))[1])["components"]
    assert counted["data"] > plain["data"] + 15_000 * 25 * 4 and counted["loading"] > 0
    code, out, err = run(capsys, *small, "--data", str(tmp_path / "absent.csv"))
    assert (code, out, err.count("\n")) == (2, "", 1) and "absent.csv" in err


def test_the_command_itself() -> None:
    """bin/footprint runs from any folder."""
    command = [str(ROOT / "bin" / "footprint"), "--d-model", "64", "--n-layers", "2", "--memory", "1GiB", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    assert json.loads(done.stdout)["fits"]
