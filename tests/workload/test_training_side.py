"""The training side's functions: whatever a user's own does wrong is one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.cli import schedule
from scheduler.model import UsageError
from scheduler.settings.load import load
from scheduler.workload import functions as training_side

pytestmark = pytest.mark.timeout(800)  # whole commands, on a machine that may be busy
ROOT = Path(__file__).resolve().parents[2]
CANDIDATE = "{'d_model': 64, 'n_layers': 2, 'n_heads': 2, 'd_ff': 128}"
GOOD = {
    "candidates": f"def candidates(context):\n    return [{CANDIDATE}]\n",
    "estimate": "def estimate(params, context):\n    return {'host_bytes': 2**28}\n",
    "micro_batch": "def micro_batch(params, context, limit_bytes, **more):\n    return 8\n",
    "check_data": "def check_data(path, horizon):\n    return None\n",
    "sample": "def sample(trial, context, architectures, fit):\n"
    "    params = dict(architectures[0], lr=trial.suggest_float('lr', 1e-5, 1e-2, log=True))\n"
    "    return dict(params, micro_batch=fit(params))\n",
}


def run(folder: Path, source: str, keys: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder that holds the module `mine`, whose functions take the place of ours."""
    (folder / "mine.py").write_text(source)
    training = {key: f"mine:{key}" for key in keys}
    (folder / "own.yaml").write_text(json.dumps({"training": training, "budgets": ["2M"], "horizons": [1]}))
    return subprocess.run(
        [sys.executable, "-m", "scheduler", "--config", "own.yaml", "--dashboard", "off", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )


BAD = [
    ("estimate", "return {'host_bytes': params['lr'] * 2**20}", ["raised KeyError: 'lr'", "line 4", "bare candidates"]),
    ("estimate", "return None", ["returned None", "'host_bytes'"]),
    ("estimate", "return {'bytes': 5}", ["no host_bytes", "only bytes"]),
    ("estimate", "return {'host_bytes': -5}", ["host_bytes -5", "from 1 on"]),
    ("estimate", "return {'host_bytes': 0}", ["host_bytes 0"]),
    ("estimate", "return {'host_bytes': float('nan')}", ["host_bytes nan", "not a number"]),
    ("estimate", "return {'host_bytes': '3GiB'}", ["host_bytes '3GiB'"]),
    ("estimate", "return {'host_bytes': 2**70}", ["host_bytes 1180591620717411303424"]),
    ("estimate", "return {'host_bytes': 5, 'device_bytes': -1}", ["device_bytes -1"]),
    ("estimate", "return {'host_bytes': 5, 'runtime_bytes': 6}", ["runtime_bytes 6", "more than"]),
    ("estimate", "return {'host_bytes': 5, 'components': {'weights': None}}", ["component weights None"]),
    ("estimate", "return {'host_bytes': 5, 'components': [1]}", ["components [1]"]),
    ("estimate", "import sys; sys.exit(0)", ["raised SystemExit: 0"]),
    ("candidates", "return None", ["returned None"]),
    ("candidates", "return ['large', 'small']", ["entry 0 is 'large'"]),
    ("candidates", "return 'large'", ["returned 'large'"]),
    ("candidates", "yield {'d_model': 64}; raise OSError('gone')", ["raised OSError: gone", "budget 2M"]),
    ("candidates", "return [{'d_model': object()}]", ["entry 0: d_model", "JSON"]),
    ("candidates", "return context['depths']", ["raised KeyError: 'depths'"]),
    ("micro_batch", "return 'half'", ["micro-batch 'half'"]),
    ("micro_batch", "return 0", ["micro-batch 0", "None"]),
    ("micro_batch", "return 0.5", ["0.5"]),
    ("micro_batch", "return params['lr']", ["raised KeyError: 'lr'", "bare candidates"]),
    ("check_data", "raise KeyError('close')", ["raised KeyError: 'close'"]),
    ("check_data", "raise ValueError('too old')", ["refuses the data: too old"]),
    ("check_data", "return {'n_features': 'many'}", ["n_features 'many'"]),
    ("sample", "return trial.suggest_float('lr', 1, 0)", ["raised ValueError"]),
    ("sample", "return None", ["returned None"]),
    ("sample", "return {'model': object()}", ["model = <object", "JSON"]),
    ("sample", "return {'d_model': architectures[0]['depth']}", ["raised KeyError: 'depth'"]),
]


@pytest.mark.parametrize(("key", "body", "said"), BAD, ids=[f"{key}-{body[:30]}" for key, body, _ in BAD])
def test_what_a_users_function_does_wrong_is_one_line(
    key: str,
    body: str,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Raising or answering nonsense: the setting, the function, what it did; exit code 2, in the plan and in a run."""
    head = GOOD[key].split("\n", 1)[0]
    bad = {**GOOD, key: f"# the user's own\n#\n{head}\n    {body}\n"}
    (tmp_path / "mine.py").write_text(bad[key] + "".join(text for other, text in bad.items() if other != key))
    training = {each: f"mine:{each}" for each in bad}
    (tmp_path / "own.yaml").write_text(json.dumps({"training": training, "budgets": ["2M"], "horizons": [1]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    for arguments in (["--dry-run"], []):
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        code = schedule.execute(["--config", "own.yaml", *arguments])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert err.startswith(f"headroom: training.{key}: mine:{key} ") and err.count("\n") == 1
        for words in said:
            assert words in err
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert not (tmp_path / "runs").exists()


def test_the_command_itself_says_it_in_one_line(tmp_path: Path) -> None:
    """As a user would see it: an estimator that reads a sampled parameter, in a process of its own."""
    source = "def estimate(params, context):\n    return {'host_bytes': 2**20 * params['lr']}\n"
    for arguments in (["--dry-run"], ["--trials", "1"]):
        done = run(tmp_path, source, ["estimate"], *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("headroom: training.estimate: mine:estimate raised KeyError: 'lr' (mine.py, line 2)")
        assert "'d_model': " in line and line.endswith("as params.get(name, default)")
    assert not (tmp_path / "runs").exists()


def test_our_own_estimator_cannot_size_their_candidates(tmp_path: Path) -> None:
    """With candidates of one's own and our estimator the line says which setting to change."""
    source = "def candidates(context):\n    return [{'units': 64}]\n"
    done = run(tmp_path, source, ["candidates"], "--dry-run")
    assert done.returncode == 2
    assert "training.footprint:estimate raised KeyError: 'd_model'" in done.stderr
    assert "a training.estimate of your own" in done.stderr


@pytest.mark.parametrize(
    "source", ["def estimate(:\n", "raise RuntimeError('no licence')\n", "import sys; sys.exit(0)\n"]
)
def test_a_module_that_cannot_be_imported_is_one_line(source: str, tmp_path: Path) -> None:
    """A syntax error, an exception or an exit while a user's module is imported."""
    done = run(tmp_path, source, ["estimate"], "--dry-run")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("headroom: training.estimate: importing mine raised ")


def test_a_function_that_takes_other_arguments_is_told_which(tmp_path: Path) -> None:
    """A wrong signature: the line gives the right one."""
    done = run(tmp_path, "def estimate(params):\n    return {'host_bytes': 5}\n", ["estimate"], "--dry-run")
    assert done.returncode == 2
    assert "it must be estimate(params, context) -> {'host_bytes': bytes, ...}" in done.stderr


def test_answers_come_out_as_the_scheduler_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of NumPy become Python's, what may be left out is filled in, a misfit of the sampler goes through."""
    source = (
        "import numpy as np\n"
        "class Misfit(Exception):\n    needed_bytes = 7\n"
        "def estimate(params, context):\n    return {'host_bytes': np.float64(9.5)}\n"
        "def sample(trial, context, architectures, fit):\n"
        "    if trial is None:\n        raise Misfit\n"
        "    return {'lr': np.float32(0.5), 'sizes': (1, np.int64(2))}\n"
    )
    (tmp_path / "mine_too.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    given = {"training.estimate": "mine_too:estimate", "training.sample": "mine_too:sample"}
    functions = training_side.load(load(given, environ={}))
    sample, estimate = functions["sample"], functions["estimate"]
    assert sample is not None and estimate is not None
    assert estimate({}, {"device": "cpu", "allocator": "default"}) == {
        "host_bytes": 10,
        "device_bytes": 0,
        "runtime_bytes": 0,
        "components": {},
        "family": "mine_too:estimate/cpu/default",
    }
    assert sample(object(), {}, [], None) == {"lr": 0.5, "sizes": [1, 2]}
    with pytest.raises(Exception) as misfit:  # noqa: PT011 - its class is in the module that was just written
        sample(None, {}, [], None)
    assert not isinstance(misfit.value, UsageError) and getattr(misfit.value, "needed_bytes", None) == 7
