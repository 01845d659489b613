"""What is kept of measured runtimes on a host, and what a plan makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scheduler.host import facts as host_facts
from scheduler.host import runtimes
from scheduler.model import Environment
from scheduler.settings.load import load
from scheduler.ui import report
from scheduler.units import MIB
from scheduler.workload import plan
from tests.builders import facts

CUDA_BUILD = Environment(name="torch-2.13.0+cu130/glibc-stack", runtime_bytes=507 * MIB, origin="measured here on x")


def test_what_was_remembered_is_known(tmp_path: Path) -> None:
    """The newest of a key counts; another key, or another host's folder, knows nothing."""
    key = runtimes.key(None, "auto")
    assert runtimes.known(str(tmp_path), key) is None
    runtimes.remember(str(tmp_path), key, "torch-1/glibc", 5 * MIB)
    runtimes.remember(str(tmp_path), key, CUDA_BUILD.name, CUDA_BUILD.runtime_bytes)
    found = runtimes.known(str(tmp_path), key)
    assert found is not None
    assert (found.name, found.runtime_bytes) == (CUDA_BUILD.name, CUDA_BUILD.runtime_bytes)
    assert found.origin.startswith("measured here on 2")
    assert runtimes.known(str(tmp_path), runtimes.key(("mine",), "auto")) is None


def test_the_key_is_what_a_process_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preloaded modules and allocators make another key; what Dask sets for its workers does not."""
    usual = runtimes.key(None, "auto")
    assert runtimes.key((), "auto") != usual != runtimes.key(None, "default")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    assert runtimes.key(None, "auto") == usual
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    assert runtimes.key(None, "auto") != usual


def test_a_broken_file_is_no_knowledge(tmp_path: Path) -> None:
    """Whatever stands there: the plan goes on without, and the next measurement replaces it."""
    key = runtimes.key(None, "auto")
    for text in (
        "",
        "[]",
        json.dumps({key: 3}),
        json.dumps({key: {"environment": "e", "runtime_bytes": "x", "unix": 1}}),
    ):
        (tmp_path / runtimes.FILE).write_text(text)
        assert runtimes.known(str(tmp_path), key) is None
    runtimes.remember(str(tmp_path), key, "torch-1/glibc", 5 * MIB)
    assert runtimes.known(str(tmp_path), key) is not None


def planned(environment: Environment | None) -> plan.Plan:
    """A 2M study on one worker, on the CPU."""
    settings = load({"device": "cpu", "horizons": "1", "budgets": "2M"}, environ={})
    return plan.make(settings, [facts(environment=environment)])


def test_the_plan_says_whose_runtime_it_used(capsys: pytest.CaptureFixture[str]) -> None:
    """Measured here, or only known of the installed torch: footprints differ by it, and a line says which."""
    unknown, measured = planned(None), planned(CUDA_BUILD)
    assert measured.studies[0].runtime_bytes == CUDA_BUILD.runtime_bytes
    difference = CUDA_BUILD.runtime_bytes - (unknown.studies[0].runtime_bytes or 0)
    assert (measured.studies[0].smallest_bytes or 0) - (unknown.studies[0].smallest_bytes or 0) == difference
    report.print_plan(unknown, as_json=False)
    assert "no trial process was measured here yet" in capsys.readouterr().out
    report.print_plan(measured, as_json=False)
    assert f"{CUDA_BUILD.name} on host: 507 MiB, measured here on x" in capsys.readouterr().out
    assert json.loads(json.dumps(measured.to_json()))["workers"][0]["environment"] == CUDA_BUILD.name


def test_an_unmeasured_environment_plans_with_more() -> None:
    """A preloaded allocator, as the last run found it, widens what is planned: for the smallest trials by some MiB."""
    odd = Environment(name="torch-2.13.0+cu130/libjemalloc.so.2", runtime_bytes=CUDA_BUILD.runtime_bytes)
    wider = (planned(odd).studies[0].smallest_bytes or 0) - (planned(CUDA_BUILD).studies[0].smallest_bytes or 0)
    assert 4 * MIB < wider < 8 * MIB


def test_a_larger_process_makes_a_larger_spare() -> None:
    """What a worker itself will hold follows its trial processes, as far as it was measured."""
    small = Environment(name="torch-2.13.0+cpu/glibc-stack", runtime_bytes=225 * MIB)
    assert 192 * MIB <= host_facts.overhead_bytes(small) <= 240 * MIB
    assert 326 * MIB <= host_facts.overhead_bytes(CUDA_BUILD) <= 400 * MIB
