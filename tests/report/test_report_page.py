"""The report of a run: what it says, that it says it of any run, and that nothing in it can do anything."""

from __future__ import annotations

import asyncio
import csv
import html.parser
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from scheduler.cli import report as command
from scheduler.cli import schedule
from scheduler.report import page
from scheduler.report.records import load_run
from tests import browser
from tests.report.made import BEGAN, GIB, SCRIPT, Made, frozen, typical

ROOT = Path(__file__).resolve().parents[2]
# An attribute by which an HTML file asks for another one, and elements that do something.
ASKS = {"src", "href", "action", "srcset", "poster", "background", "formaction", "ping"}
ACTS = {"script", "iframe", "object", "embed", "form", "base", "img", "link", "use", "image", "foreignobject", "audio"}


HOLD = """
import sys
from pathlib import Path
from scheduler.driver.lock import DriverLock
lock = DriverLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


class Reader(html.parser.HTMLParser):
    """What a browser would find: elements, their attributes, the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember an element."""
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Remember text."""
        self.words.append(data)

    @property
    def text(self) -> str:
        """All text on one line."""
        return " ".join(" ".join(self.words).split())


def read(folder: Path, now: float | None = None) -> tuple[dict[str, Any], Reader]:
    """The facts of a run, and the page made of them."""
    facts = page.facts(load_run(folder, now=now))
    return facts, Reader(page.as_html(facts))


def test_what_was_asked_is_answered_from_the_page_alone(tmp_path: Path) -> None:
    """Why was trial 12 killed, was it its own fault, what did it cost, why not the others, what is to be done next?"""
    made = typical(tmp_path)
    made.end()
    _, seen = read(made.folder)
    for words in (
        "because it held 4.00 GiB, far over the 1.00 GiB that it was promised",
        "The fault was its own: it held far more than it was promised.",
        "It cost the 13 s that the attempt had run",
        "In the study it is PRUNED; it counts towards the quota and is not run again.",
        "The sampler was told that it is infeasible.",
        "within its promise: 1.00 GiB of 2.00 GiB",
        "its memory came back: 3.00 GiB",
        "What to do next Trial 12 took more memory than promised",
        "Exit 0, all was done",
        "Killed by rule: overshoot 1.",
    ):
        assert words in seen.text


def test_every_end_is_counted_once_and_apart(tmp_path: Path) -> None:
    """Complete, pruned, killed, too large and failed are five things; attempts are counted by their reasons."""
    made = typical(tmp_path)
    made.end()
    facts, _ = read(made.folder)
    total = facts["ends"]["total"]
    assert {word: total[word] for word in ("complete", "pruned", "killed", "too large", "failed")} == {
        "complete": 12,
        "pruned": 1,
        "killed": 1,
        "too large": 1,
        "failed": 1,
    }
    assert {each["reason"]: each["count"] for each in facts["ends"]["attempts"]} == {
        "completed": 12,
        "overshoot": 1,
        "failed": 1,
        "pruned": 1,
    }
    assert facts["verdict"]["ended"] == 15


def test_nothing_that_a_trial_wrote_becomes_markup_and_nothing_is_asked_for(tmp_path: Path) -> None:
    """Errors, choices, stacks and names with a script in them are shown as text; the page has no script, no request."""
    made = typical(tmp_path)
    made.say("study.note", study="made", note=SCRIPT)
    made.end(1, SCRIPT)
    facts, seen = read(made.folder)
    assert {tag for tag, _ in seen.elements} & ACTS <= {"link"}
    for tag, attrs in seen.elements:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ASKS & set(attrs):
            assert str(attrs[name]).startswith(("#", "data:,")), (tag, attrs)
    policy = next(str(a["content"]) for t, a in seen.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "url(" not in page.as_html(facts)
    assert seen.text.count("alert('x')") >= 4


def test_a_run_that_goes_on_and_one_that_died_are_told_apart(tmp_path: Path) -> None:
    """Without a last word it is running while a driver holds the lock, and dead when none does."""
    made = typical(tmp_path)
    made.attempt("made/15", 61, 70, None)
    facts, seen = read(made.folder, now=BEGAN + 100)
    assert facts["verdict"]["state"] == "died"
    assert "Give the same command again" in seen.text
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(made.folder / "driver.lock")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        facts, seen = read(made.folder, now=BEGAN + 100)
    finally:
        holder.communicate("")
    assert facts["verdict"]["state"] == "running"
    assert {each["reason"]: each["count"] for each in facts["ends"]["attempts"]}["running"] == 1
    assert "The run is going on: 15 of 15 trials" in seen.text


def test_without_its_database_the_journal_stands_in(tmp_path: Path) -> None:
    """A study that cannot be read costs importance and says so; how trials ended is still right."""
    made = typical(tmp_path)
    for number, state in ((0, "COMPLETE"), (1, "FAIL")):
        made.say("trial.asked", trial=f"made/{number}", params={"x": 1}, attempt=1)
        attrs = {"stop_reason": "completed" if state == "COMPLETE" else "failed"}
        made.say("trial.ended", trial=f"made/{number}", state=state, value=0.5, constraint=None, attrs=attrs)
    made.end()
    (made.folder / "study.db").unlink()
    facts, seen = read(made.folder)
    assert (facts["ends"]["total"]["complete"], facts["ends"]["total"]["failed"]) == (1, 1)
    assert "could not be read" in seen.text
    assert not (made.folder / "study.db").exists()


def test_a_run_before_its_first_trial_has_a_report(tmp_path: Path) -> None:
    """Nothing but the first line of the journal, and no settings: every section says that it is empty."""
    made = Made(tmp_path)
    (made.folder / "settings.yaml").unlink()
    facts, seen = read(made.folder)
    assert facts["verdict"]["ended"] == 0
    assert "No attempt was started." in seen.text


def test_lines_of_the_journal_that_mean_nothing_are_passed_over(tmp_path: Path) -> None:
    """A torn or edited journal, a kill.json that a trial has written itself: the rest of the report is there."""
    made = typical(tmp_path)
    for event in ("attempt.launched", "attempt.progress", "attempt.ended", "reservation.resized", "worker.joined"):
        made.say(event, attempt=["no", "text"], worker=None, kill="none", peak_bytes="much")
    story = next((made.folder / "attempts").glob("*/kill.json"))
    story.write_text(json.dumps({"steps": "none", "samples": {"a": 1}, "candidates": [3], "evidence": [SCRIPT]}))
    made.end()
    facts, _ = read(made.folder)
    assert facts["ends"]["total"]["complete"] == 12
    assert len(facts["kills"]) == 1


def test_importance_is_of_the_parameters_by_name(tmp_path: Path) -> None:
    """Each parameter that was suggested has its share; the best trials at an end of a range are pointed out."""
    made = Made(tmp_path)
    study = made.study("made", quota=40)
    for i in range(40):
        study.add_trial(frozen(i / 39))
    made.end()
    facts, seen = read(made.folder)
    importance = facts["search"][0]["importance"]
    assert set(importance) == {"x", "kind"}
    assert sum(importance.values()) == pytest.approx(1.0)
    few = Made(tmp_path, name="few")
    few.study("few").add_trial(frozen(0.5))
    assert "it takes 8 completed trials" in page.facts(load_run(few.folder))["search"][0]["why_no_importance"]
    assert "lower end of x" not in seen.text  # the best four lie within the first tenth, not at the end


def test_of_several_values_the_front_is_shown(tmp_path: Path) -> None:
    """No single best, no importance; the trials that none beats in all values are drawn and listed."""
    made = Made(tmp_path, direction="minimize,minimize")
    made.say("study.opened", study="made", counted=0, quota=3)
    url = f"sqlite:///{made.folder / 'study.db'}"
    study = optuna.create_study(study_name="made", storage=url, directions=["minimize", "minimize"])
    for values in ([1.0, 3.0], [2.0, 1.0], [2.0, 4.0]):
        study.add_trial(optuna.trial.create_trial(values=values))
    made.end()
    facts, seen = read(made.folder)
    assert [each["number"] for each in facts["search"][0]["front"]] == [0, 1]
    assert "2 of 3 completed trials are on the Pareto front" in seen.text
    assert facts["best"][0]["why"] == "it has several values"


@pytest.mark.parametrize("observed", [False, True])
def test_a_bystander_is_not_blamed(tmp_path: Path, observed: bool) -> None:
    """One that kept its promise: not its own fault, run again, what it lost since its checkpoint; or only observed."""
    made = Made(tmp_path)
    study = made.study("made")
    made.worker()
    evidence = {
        "footprint_bytes": GIB // 2,
        "promised_bytes": GIB,
        "available_bytes": GIB // 8,
        "limit_bytes": 16 * GIB,
    }
    told = made.kill("made/0", "memory_exhausted", "preempted", **evidence)
    if observed:
        story = next((made.folder / "attempts").glob("*/kill.json"))
        story.rename(story.with_name("would_kill.json"))
        made.say("watchdog.would_kill", attempt="made/0/1", rule="memory_exhausted", reason="preempted")
    made.attempt("made/0", 0, 50, "completed" if observed else "preempted", steps={20: 1, 40: 2},
                 kill=None if observed else told)  # fmt: skip
    if not observed:
        made.attempt("made/0", 60, 80, number=2, steps={70: 3}, resume_from="c")
    study.add_trial(frozen(0.5))
    made.end()
    facts, seen = read(made.folder)
    assert "the host's memory was as good as used up: 128 MiB of 16.0 GiB were available" in seen.text
    if observed:
        assert "Trial 0 of made would have been ended" in seen.text
        assert facts["kills"][0]["cost"] == ""
    else:
        assert "The fault was not its own" in seen.text
        assert "It cost 10 s of 50 s: it went on from its checkpoint." in seen.text
        assert "cost the trial nothing" in seen.text


def test_hours_add_up(tmp_path: Path) -> None:
    """What was trained twice, lost and waited for is what the journal's instants say."""
    made = Made(tmp_path)
    made.study("made")
    made.worker()
    made.say("trial.deferred", trial="made/0", reason="ledger_full")
    made.attempt("made/0", 0, 100, "lost", steps={40: 1, 80: 2})
    made.attempt("made/0", 110, 150, "completed", number=2, steps={120: 3}, resume_from="c")
    made.attempt("made/1", 20, 60, "failed")
    made.end()
    hours = page.facts(load_run(made.folder))["hours"]
    assert hours["done_again_s"] == pytest.approx(20)  # from step 2's end to the loss
    assert hours["lost_by_end"] == {"failed": pytest.approx(40)}
    assert hours["busy_s"] == pytest.approx(140)
    assert hours["trials_s"] == pytest.approx(180)
    assert {each["reason"]: each["seconds"] for each in hours["waited_by_reason"]} == {
        "ledger_full": 2.0,
        "its turn": 4.0,
    }


def test_what_died_with_its_driver_ended_with_it(tmp_path: Path) -> None:
    """The next driver, an hour later, says that it is lost; its hour is not an hour of training, and it ran again."""
    made = Made(tmp_path)
    study = made.study("made")
    made.worker()
    made.attempt("made/0", 0, 0, None)
    made.at = 30
    made.say("host.opened", worker="h:1")  # the last word
    made.at = 3600
    made.say("batch.started", run="made", driver_pid=2, owner="p")
    made.say("attempt.ended", attempt="made/0/1", reason="lost", duration_s=0.0, peak_bytes=None, kill=None)
    made.attempt("made/1", 3610, 3650, number=2)
    study.add_trial(frozen(None, "FAIL", stop_reason="lost", retried=1))
    study.add_trial(frozen(0.5))
    made.end()
    facts, _ = read(made.folder)
    assert {each["reason"]: each["seconds"] for each in facts["hours"]["spent_by_end"]} == {"completed": 40, "lost": 30}
    assert facts["hours"]["done_again_s"] == 30
    assert facts["verdict"]["starts"] == 2
    assert facts["ends"]["total"]["failed"] == 0


def test_overtaking_is_worth_what_the_two_orders_say(tmp_path: Path) -> None:
    """A, B and C are drawn; B does not fit beside A, C does and goes first: 20 s instead of 30 s."""
    made = Made(tmp_path)
    made.study("made")
    made.worker()  # with 12.4 GiB for trials
    made.attempt("made/0", 0, 10, reserved_bytes=10 * GIB, wait_s=0.0)
    made.attempt("made/2", 0.2, 20.2, reserved_bytes=GIB, wait_s=0.0)
    made.attempt("made/1", 10, 20, reserved_bytes=10 * GIB, wait_s=9.9)
    made.end()
    saved = {each["by"]: each["seconds"] for each in page.facts(load_run(made.folder))["hours"]["saved"]}
    assert saved["letting smaller ones go first"] == pytest.approx(10.0)
    assert saved["running at the same time"] == pytest.approx(40 - 20.2, abs=0.1)


def test_forecasts_are_judged_by_what_came(tmp_path: Path) -> None:
    """Of three forecasts of the end two held it; the middle was off by a tenth of the time that was left."""
    made = typical(tmp_path)
    for at, low, middle, high in ((10, 90, 100, 120), (20, 105, 108, 120), (30, 95, 107, 120)):
        made.at = at
        ends = {"low_unix": BEGAN + low, "middle_unix": BEGAN + middle, "high_unix": BEGAN + high}
        made.say("batch.forecast", **ends)
    made.at = 100
    made.end()
    facts, seen = read(made.folder)
    forecast = facts["hours"]["forecast"]
    assert (forecast["held"], forecast["judged"], forecast["median_error"]) == (2, 3, pytest.approx(0.1))
    assert "2 of 3 had the truth in their range" in seen.text


def test_the_best_configuration_is_a_file_that_the_command_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the built-in workload: the YAML goes through --dry-run, names the checkpoint that is there, and its trial."""
    made = Made(tmp_path, objective=None, budgets="2M", horizons="3", max_epochs=2)
    study = made.study("made_2M_h3")
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_text("c")
    study.add_trial(frozen(0.5, checkpoint=str(checkpoint)))
    made.end()
    path = page.leave(made.folder)
    assert path == made.folder / "report.html"
    file = made.folder / "best" / "made_2M_h3.yaml"
    assert str(checkpoint) in file.read_text()
    assert schedule.execute(["--config", str(file), "--dry-run"]) == 0
    assert "made_2M_h3-best_2M_h3" in capsys.readouterr().out
    checkpoint.unlink()
    page.leave(made.folder)
    assert "checkpoint: null" in file.read_text()


def test_json_and_csv_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json is one object that every reader takes, --csv a row per trial, each with its reason; -o names a file."""
    made = typical(tmp_path)
    made.end()
    assert command.execute([str(made.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["verdict"]["exit_code"] == 0
    assert command.execute([str(made.folder), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 16
    assert all(row["stop_reason"] for row in rows)
    out = tmp_path / "out.html"
    assert command.execute([str(made.folder), "-o", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert not (made.folder / "report.html").exists()


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a journal, and a file that cannot be written, are said with what to do."""
    assert command.execute([str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
    made = Made(tmp_path)
    assert command.execute([str(made.folder), "-o", str(tmp_path / "none" / "x.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_report_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """At the end of a run whatever goes wrong with the report is told and changes nothing."""
    said = command.leave(tmp_path / "nowhere")
    assert said.startswith("no report was made")
    assert "\n" not in said


def test_a_finished_command_leaves_its_report(tmp_path: Path) -> None:
    """The whole command with somebody's objective: the report, and the best configuration, are in the run's folder."""
    (tmp_path / "own.py").write_text("def objective(trial):\n    return trial.suggest_float('x', 0, 1) ** 2\n")
    base = [sys.executable, "-m", "scheduler", "--objective", "own.py:objective", "--dashboard", "off", "--name", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HEADROOM_HOST_DIR": str(tmp_path / "host")}
    done = subprocess.run(
        [*base, "--runs-dir", str(tmp_path), "--trials", "3"],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"report in {tmp_path / 'run' / 'report.html'}" in done.stderr
    facts, seen = read(tmp_path / "run")
    assert facts["verdict"]["studies"][0]["completed"] == 3
    assert facts["timeline"]["used_from"] == "the workers' samples"
    assert "Exit 0" in seen.text
    assert (tmp_path / "run" / "best" / "run.yaml").is_file()


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1440, 1920])
def test_in_a_browser_nothing_is_wider_than_the_window(tmp_path: Path, width: int) -> None:
    """On a phone and on a desk: nothing sticks out of the page, no tick lies over another, charts are drawn."""
    made = typical(tmp_path)
    made.end()
    path = page.leave(made.folder)

    async def look() -> dict[str, Any]:
        async with browser.browse(path.as_uri(), tmp_path, width=width, height=900) as tab:
            await tab.wait_for("Settings, versions, machine")
            return {
                "wide": await tab.value("document.documentElement.scrollWidth"),
                "charts": await tab.value("document.querySelectorAll('svg.chart').length"),
                "over": await tab.value(OVERLAPS),
                "asked": await tab.value("performance.getEntriesByType('resource').length"),
                "small": await tab.value(SMALL),
            }

    found = asyncio.run(look())
    assert found["wide"] <= width
    assert found["charts"] >= 8
    assert found["over"] == []
    assert found["asked"] == 0
    assert found["small"] >= 8.5


# Pairs of tick texts of one chart whose boxes share more than a pixel; the smallest height of a text in any of them.
OVERLAPS = """
[...document.querySelectorAll('svg.chart')].flatMap((svg) => {
  const boxes = [...svg.querySelectorAll('text.tick')].map((t) => [t.textContent, t.getBoundingClientRect()])
  const both = (p, q, from, to) => Math.min(p[to], q[to]) - Math.max(p[from], q[from])
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
    both(p, q, 'left', 'right') > 1 && both(p, q, 'top', 'bottom') > 3).map(([b]) => a + ' | ' + b))
})
"""
SMALL = "Math.min(...[...document.querySelectorAll('svg.chart text')].map((t) => t.getBoundingClientRect().height))"


def test_no_chart_says_nan(tmp_path: Path) -> None:
    """Numbers in the drawings are finite, whatever the run had."""
    made = typical(tmp_path)
    made.end()
    text = page.as_html(page.facts(load_run(made.folder)))
    assert not re.search(r'="[^"]*(?:nan|inf)[^"]*"', text)
    assert f"{GIB}" not in Reader(text).text  # sizes are in GiB, not in bytes
