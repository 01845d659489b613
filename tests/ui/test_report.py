"""Results: the CSV, the best trial's file, the table; from rows that may lack anything but number and state."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from scheduler.model import Presentation, StudySpec
from scheduler.ui import report
from scheduler.workload.phase6a import COLUMNS


def study(name: str = "r_2M_h1", quota: int = 3) -> StudySpec:
    """A study to report on."""
    shown = Presentation(
        labels={"budget": "2M", "horizon": 1}, columns=COLUMNS, shape={"d_model": "d_model", "layers": "n_layers"}
    )
    return StudySpec(name=name, quota=quota, slots=1, shown=shown)


def row(number: int, state: str = "COMPLETE", **values: Any) -> dict[str, Any]:
    """A trial as the study gives it."""
    return {"number": number, "state": state, **values}


def test_csv_has_a_line_per_trial_and_every_key(tmp_path: Path) -> None:
    """Fixed columns first, whatever else the rows hold after them, empty where a trial has no value."""
    stalled = row(1, "PRUNED") | {"watchdog.reason": "stalled, 10 min"}
    rows = {"r_2M_h1": [row(0, value=0.5, d_model=64, extra=1), stalled]}
    report.write_files(tmp_path, [study()], rows)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [line["number"] for line in lines] == ["0", "1"]
    assert lines[0]["study"] == "r_2M_h1"
    assert lines[0]["extra"] == "1"
    assert lines[1]["value"] == ""
    assert lines[1]["watchdog.reason"] == "stalled, 10 min"


def test_best_is_the_smallest_completed_value(tmp_path: Path) -> None:
    """A pruned trial's smaller value does not count, the earlier of equals does; no file without a completed trial."""
    rows = {
        "a": [row(0, value=0.5), row(1, "PRUNED", value=0.1), row(2, value=0.4), row(3, value=0.4)],
        "b": [row(0, "FAIL")],
    }
    report.write_files(tmp_path, [study("a"), study("b")], rows)
    assert json.loads((tmp_path / "best" / "a.json").read_text())["number"] == 2
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["a.json"]


def test_of_several_values_the_pareto_front_is_kept(tmp_path: Path) -> None:
    """As Optuna finds it, also with equal and infinite values; no file while nothing is complete."""
    random = np.random.default_rng(0)
    values = [[float(x) for x in pair] for pair in random.integers(0, 8, (60, 2))] + [[math.inf, 9.0], [0.0, -1.0]]
    plain = optuna.create_study(directions=["minimize", "maximize"])
    for pair in values:
        plain.add_trial(optuna.trial.create_trial(values=pair))
    rows = [row(n, value=a) | {"value.0": a, "value.1": b} for n, (a, b) in enumerate(values)]
    spec = StudySpec(name="two", quota=9, slots=1, directions=("minimize", "maximize"), define_by_run=True)
    pruned = {"two": [row(9, "PRUNED")]}
    report.write_files(tmp_path, [spec], pruned)
    assert list((tmp_path / "best").iterdir()) == []
    report.write_files(tmp_path, [spec], {"two": rows})
    kept = json.loads((tmp_path / "best" / "two.json").read_text())
    assert kept["study"] == "two" and kept["directions"] == ["minimize", "maximize"]
    assert [each["number"] for each in kept["pareto_front"]] == [trial.number for trial in plain.best_trials]
    (said,) = report.best_lines([spec], {"two": rows})
    assert f"{len(plain.best_trials)} trial" in said


def test_the_table_shows_each_study_even_without_a_trial(tmp_path: Path) -> None:
    """What completed against the quota, the best trial and its peak, and the remark of a study that closed early."""
    text = io.StringIO()
    rows = {
        "a": [
            row(0, value=0.51234, d_model=64, duration_s=61.0) | {"footprint.observed_peak_bytes": 2**30},
            row(1, "FAIL"),
        ]
    }
    report.finish(tmp_path, [study("a"), study("b")], rows, notes={"a": "closed: 5 failures in a row"}, stream=text)
    lines = text.getvalue().splitlines()
    a = next(line for line in lines if line.startswith("a "))
    for word in ("1/3", "0.5123", "64", "1.00 GiB", "1m01s", "closed: 5 failures in a row"):
        assert word in a
    assert any(line.startswith("b ") and "0/3" in line for line in lines)
    assert "failed" in lines[0]
    assert "pruned" not in lines[0]


def test_what_was_interrupted_did_not_fail() -> None:
    """A trial that was queued again is in the CSV, but not counted as failed: its successor counts."""
    from rich.console import Console

    text = io.StringIO()
    rows = {"a": [row(0, "FAIL", retried=1), row(1, value=0.5)]}
    Console(file=text, width=200).print(report.results_table([study("a")], rows))
    assert "failed" not in text.getvalue()
    assert report.to_csv([study("a")], rows).count("FAIL") == 1


def test_the_table_is_readable_in_80_columns() -> None:
    """The usual run (nothing pruned or failed) is not cut on a small terminal."""
    from rich.console import Console

    text = io.StringIO()
    name = "phase6a-e2_200M_h5"
    best = {"value": 0.51234, "d_model": 2048, "n_layers": 256, "duration_s": 90061.0}
    rows = {name: [row(12) | best | {"footprint.observed_peak_bytes": 123 * 2**30}]}
    Console(file=text, width=80).print(report.results_table([study(name, 50)], rows))
    assert "…" not in text.getvalue()
    assert text.getvalue().count("\n") == 2


def test_files_are_replaced_as_a_whole(tmp_path: Path) -> None:
    """A second report leaves no temporary file and no stale line."""
    report.write_files(tmp_path, [study()], {"r_2M_h1": [row(0), row(1)]})
    report.write_files(tmp_path, [study()], {"r_2M_h1": [row(0)]})
    assert (tmp_path / "results.csv").read_text().count("\n") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "results.csv"]


def test_only_files_that_are_there_are_named(tmp_path: Path) -> None:
    """Most checkpoints are dropped in time: neither results.csv nor best/ sends anybody to one that is gone."""
    kept = tmp_path / "kept.safetensors"
    kept.write_text("")
    rows = {"r_2M_h1": [row(0, value=0.1, checkpoint="/gone", model="/gone"), row(1, value=0.2, checkpoint=str(kept))]}
    report.write_files(tmp_path, [study()], rows)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [line["checkpoint"] for line in lines] == ["", str(kept)]
    assert "gone" not in (tmp_path / "best" / "r_2M_h1.json").read_text()


def test_every_row_says_why_it_is_as_it_is(tmp_path: Path) -> None:
    """Also a trial that runs, waits, was run again without having started, or was ended by another program."""
    rows = [row(0, "RUNNING"), row(1, "WAITING"), row(2, "FAIL", retried=5, retry_reason="lost"), row(3, "FAIL")]
    report.write_files(tmp_path, [study()], {"r_2M_h1": [*rows, row(4, "PRUNED", stop_reason="stalled")]})
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    told = [line["stop_reason"] for line in lines]
    assert told == ["running", "queued", "lost", "ended by another program", "stalled"]


def test_what_was_killed_is_counted_apart_from_what_was_pruned() -> None:
    """A pruner's decision, the watchdog's, and a configuration that fits nowhere are three columns."""
    from rich.console import Console

    text = io.StringIO()
    ended = ["pruned", "stalled", "overshoot", "timed_out", "does_not_fit"]
    rows = {"a": [row(i, "PRUNED", stop_reason=reason) for i, reason in enumerate(ended)]}
    Console(file=text, width=200).print(report.results_table([study("a")], rows))
    head, line = text.getvalue().splitlines()
    assert head.split()[1:5] == ["complete", "pruned", "killed", "too"]
    assert line.split()[1:5] == ["0/3", "1", "3", "1"]
