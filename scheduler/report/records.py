"""What a run has left, read into one value: its folder, its journal, its studies, the stories of its kills.

Covers reading only; every section of the report computes from a `Run` and reads nothing itself. A run may be going on,
over, or its driver dead: whatever is not there is empty, and what could not be read is said in `missing`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scheduler.driver import decisions, journal
from scheduler.host.attempt_folder import AttemptFolder
from scheduler.masking import masked
from scheduler.model import AttemptId, ExitReason, HeadroomError, Json, Presentation, StudySpec, TrialId, UsageError
from scheduler.model.fields import finite
from scheduler.model.journal_events import JournalEvent as E
from scheduler.settings import command, load
from scheduler.settings.schema import Settings
from scheduler.study import reading
from scheduler.study.reading import StudyRead
from scheduler.workload import studies as workload

JOURNAL = "journal.jsonl"


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt. Instants are Unix seconds. end: its line `attempt.ended`, empty while there is none.

    until: when it ended, or the last that is known of it. reserved: (instant, bytes) from the launch on. progress:
    (instant, step, value, peak bytes). waited_for: why its trial was deferred before, in the order it happened.
    """

    id: AttemptId
    worker: str
    launched: float
    until: float
    started: float | None = None
    predicted_bytes: int | None = None
    source: str = ""
    wait_s: float = 0.0
    waited_for: tuple[str, ...] = ()
    resume_from: str | None = None
    end: Mapping[str, Any] = field(default_factory=dict)
    reserved: list[tuple[float, int]] = field(default_factory=list)
    progress: list[tuple[float, int, float | None, int | None]] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """How it ended: an exit reason, "running", or "unknown" where nobody saw it."""
        return str(self.end.get("reason") or "unknown")

    @property
    def lasted_s(self) -> float:
        return max(0.0, self.until - self.launched)

    @property
    def peak_bytes(self) -> int | None:
        peaks = [p for *_, p in self.progress if p] + [int(p) for p in [finite(self.end.get("peak_bytes"))] if p]
        return max(peaks, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of the driver. ended: its line `batch.ended`, empty for one that died or still runs."""

    began: float
    until: float
    ended: Mapping[str, Any]
    quit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A kill that was carried out, or (`observed`) would have been. story: what is in its kill.json, maybe nothing."""

    attempt: AttemptId
    unix: float | None
    record: Mapping[str, Any]
    story: Mapping[str, Any]
    log_tail: str = ""
    observed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything. state: "running", "over" or "died". rows: trials by study, as for results.csv. asked: "study/number"
    -> all that the trial was given, as its driver wrote it down. forecasts: (when it was made, low, middle, high), of
    the end of its start, all Unix seconds.
    """

    folder: Path
    name: str
    now: float
    state: str
    settings: Settings | None
    specs: Sequence[StudySpec]
    starts: Sequence[Start]
    attempts: Sequence[Attempt]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    asked: Mapping[str, Mapping[str, Any]]
    studies: Mapping[str, StudyRead]
    kills: Sequence[Kill]
    refused: Mapping[str, str]
    closed: Mapping[str, tuple[str, bool]]
    notes: Sequence[tuple[str, str]]
    workers: Mapping[str, Mapping[str, Any]]
    forecasts: Sequence[tuple[float, float, float, float]]
    events: Mapping[str, int]
    missing: Sequence[str] = ()

    @property
    def began(self) -> float:
        return self.starts[0].began if self.starts else self.now

    @property
    def until(self) -> float:
        return self.now if self.state == "running" else max((s.until for s in self.starts), default=self.now)

    @property
    def trials(self) -> Iterator[tuple[StudySpec, Mapping[str, Any]]]:
        """Every trial with its study."""
        return ((spec, row) for spec in self.specs for row in self.rows.get(spec.name, ()))

    def spec(self, study: str) -> StudySpec:
        return next(spec for spec in self.specs if spec.name == study)


def load_run(folder: Path, *, now: float | None = None) -> Run:
    """Read the run of this folder. Raises UsageError where there is none."""
    folder = folder.absolute()
    if not (folder / JOURNAL).is_file():
        raise UsageError(f"{folder} is no run: it has no {JOURNAL}; name a folder such as runs/phase6a")
    now = time.time() if now is None else now
    records = list(journal.read(folder / JOURNAL))
    missing: list[str] = []
    settings = _settings(folder, missing)
    starts = _starts(records)
    state = "over" if starts and starts[-1].ended else "running" if _is_held(folder / "driver.lock") else "died"
    attempts = _attempts(records, starts, now if state == "running" else None)
    quotas = {str(r["study"]): int(r.get("quota") or 0) for r in records if r["event"] == E.STUDY_OPENED}
    studies = _studies(folder, settings, quotas, missing)
    specs = _specs(settings, quotas, studies)
    rows = {spec.name: studies[spec.name].rows if spec.name in studies else _told(records, spec) for spec in specs}
    return Run(
        folder=folder,
        name=next((str(r["run"]) for r in records if r["event"] == E.BATCH_STARTED), folder.name),
        now=now,
        state=state,
        settings=settings,
        specs=specs,
        starts=starts,
        attempts=attempts,
        rows=rows,
        asked={str(r["trial"]): r["params"] for r in records if r["event"] == E.TRIAL_ASKED and _is_map(r, "params")},
        studies=studies,
        kills=_kills(folder, records, attempts),
        refused={str(r["study"]): str(r.get("reason")) for r in records if r["event"] == E.STUDY_REFUSED},
        closed={
            str(r["study"]): (str(r.get("reason")), bool(r.get("early")))
            for r in records
            if r["event"] == E.STUDY_CLOSED
        },
        notes=_notes(records),
        workers={str(r["worker"]): r for r in records if r["event"] == E.WORKER_JOINED},
        forecasts=_forecasts(records),
        events=Counter(str(r["event"]) for r in records),
        missing=missing,
    )


def _settings(folder: Path, missing: list[str]) -> Settings | None:
    try:
        return load.resolved(folder / "settings.yaml")
    except HeadroomError as error:
        missing.append(f"the run's settings could not be read ({error})")
        return None


def _is_held(path: Path) -> bool:
    """Whether a driver holds the run's lock. Only asked where its process lives: a try must keep no start from it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.kill(int(os.pread(fd, 32, 0).decode()), 0)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ValueError):
        return False
    finally:
        os.close(fd)
    return False


def _starts(records: Sequence[Json]) -> list[Start]:
    found: list[Start] = []
    for record in records:
        at = finite(record.get("unix")) or 0.0
        if record["event"] == E.BATCH_STARTED:
            found.append(Start(began=at, until=at, ended={}))
        if not found:
            continue
        last = found[-1]
        asked = str(record.get("source")) if record["event"] == E.BATCH_QUIT and last.quit is None else last.quit
        ended = record if record["event"] == E.BATCH_ENDED else last.ended
        found[-1] = Start(began=last.began, until=max(at, last.until), ended=ended, quit=asked)
    return found


def _attempts(records: Iterable[Json], starts: Sequence[Start], now: float | None) -> list[Attempt]:
    found: dict[str, Attempt] = {}
    waiting: dict[str, list[str]] = {}
    for record in records:
        with contextlib.suppress(KeyError, ValueError, TypeError):  # a line that somebody has changed: left out
            _take(found, waiting, record)
    ends = [start.until for start in starts]
    for attempt in found.values():
        # The last word of the driver that launched it: after its death nobody wrote down when an attempt ended.
        last = next((end for end in ends if end >= attempt.launched), attempt.until)
        if not attempt.end:
            attempt.until = max(attempt.until, last if now is None else now)
            attempt.end = {"reason": "unknown" if now is None else "running"}
        elif attempt.until > last:  # told by the next driver, who settled it
            ran_s = finite(attempt.end.get("duration_s")) or 0.0
            reported = attempt.progress[-1][0] if attempt.progress else attempt.launched
            attempt.until = attempt.launched + ran_s if ran_s > 0 else max(last, reported)
    return sorted(found.values(), key=lambda a: (a.launched, str(a.id)))


def _take(found: dict[str, Attempt], waiting: dict[str, list[str]], record: Json) -> None:
    at = float(record["unix"])
    match record["event"]:
        case E.TRIAL_DEFERRED:
            waiting.setdefault(str(record["trial"]), []).append(str(record["reason"]))
        case E.ATTEMPT_LAUNCHED:
            key = str(record["attempt"])
            id_ = AttemptId.parse(key)
            found[key] = Attempt(
                id=id_,
                worker=str(record["worker"]),
                launched=at,
                until=at,
                predicted_bytes=_whole(record.get("predicted_bytes")),
                source=str(record.get("source") or ""),
                wait_s=finite(record.get("wait_s")) or 0.0,
                waited_for=tuple(waiting.pop(str(id_.trial), ())),
                resume_from=record.get("resume_from"),
                reserved=[(at, _whole(record.get("reserved_bytes")) or 0)],
            )
        case E.ATTEMPT_STARTED:
            found[str(record["attempt"])].started = at
        case E.RESERVATION_RESIZED:
            found[str(record["attempt"])].reserved.append((at, int(record["reserved_bytes"])))
        case E.ATTEMPT_PROGRESS:
            attempt = found[str(record["attempt"])]
            attempt.until = at
            attempt.progress.append((at, int(record["step"]), finite(record["value"]), _whole(record["peak_bytes"])))
        case E.ATTEMPT_ENDED:
            attempt = found[str(record["attempt"])]
            attempt.until, attempt.end = at, record


def _is_map(record: Json, key: str) -> bool:
    return isinstance(record.get(key), dict)


def _whole(value: Any) -> int | None:
    number = finite(value)
    return None if number is None else int(number)


def _studies(folder: Path, settings: Settings | None, names: Iterable[str], missing: list[str]) -> dict[str, StudyRead]:
    # Its own database is found beside the journal, wherever the folder has been moved since.
    own = f"sqlite:///{quote(str(folder / 'study.db'))}"
    url = own if settings is None or settings.storage is None else settings.storage
    called = settings is not None and (settings.objective or "").startswith((command.PICKLE_FILE, command.PICKLED))
    if url == own and called and not (folder / "study.db").exists():
        missing.append(
            "the study was in the memory of the program that called optimize(): values and parameters here are the "
            "journal's, and importance is left out"
        )
        return {}
    try:
        return reading.read(url, names)
    except HeadroomError as error:
        missing.append(
            f"the studies in {masked(url)} could not be read ({error}): values and parameters here are "
            "the journal's, and importance is left out"
        )
        return {}


def _specs(settings: Settings | None, quotas: Mapping[str, int], studies: Mapping[str, StudyRead]) -> list[StudySpec]:
    """Return every study that was opened, or is in the plan: as the workload shows it, where the settings tell."""
    known: dict[str, StudySpec] = {}
    if settings is not None:
        with contextlib.suppress(HeadroomError, OSError):
            known = {spec.name: spec for spec in workload.studies(settings)}
    names = dict.fromkeys([*known, *quotas])
    found = []
    for name in names:
        directions = studies[name].directions if name in studies else ("minimize",)
        plain = StudySpec(name=name, quota=0, slots=1, directions=directions, shown=Presentation())
        spec = known.get(name, plain)  # the journal knows what the run was last given
        found.append(replace(spec, quota=quotas.get(name, spec.quota)))
    return found


def _told(records: Iterable[Json], spec: StudySpec) -> list[Mapping[str, Any]]:
    """Return the trials of a study as the journal tells them, where its database cannot be read."""
    states = decisions.final_states(records := list(records))
    rows: dict[TrialId, dict[str, Any]] = {}
    for record in records:
        study, _, number = str(record.get("trial") or "").rpartition("/")
        if study != spec.name or not number.isdigit():
            continue
        id_ = TrialId(study, int(number))
        row = rows.setdefault(id_, {"number": id_.number, "state": states.get(str(id_), "RUNNING"), "value": None})
        if record["event"] == E.TRIAL_ASKED and isinstance(record.get("params"), dict):
            row |= record["params"] | {"asked.params": tuple(record["params"])}
        if record["event"] in (E.TRIAL_ENDED, E.TRIAL_REQUEUED):
            row |= dict(record.get("attrs") or {}) | {"value": record.get("value")}
            row |= {"retried": -1} if record["event"] == E.TRIAL_REQUEUED else {}
    return [rows[id_] for id_ in sorted(rows)]


def _kills(folder: Path, records: Iterable[Json], attempts: Sequence[Attempt]) -> list[Kill]:
    found = []
    for attempt in attempts:
        record = attempt.end.get("kill")
        if record is None and attempt.reason in (ExitReason.KERNEL_OOM.value, ExitReason.TIMED_OUT.value):
            held = {"footprint_bytes": attempt.peak_bytes, "promised_bytes": attempt.predicted_bytes}
            record = {"rule": attempt.reason, "reason": attempt.reason, "evidence": held}
        if not isinstance(record, dict):
            continue
        place = AttemptFolder.of(folder, attempt.id)
        found.append(
            Kill(
                attempt=attempt.id,
                unix=finite(attempt.end.get("unix")),
                record=record,
                story=place.kill_story(),
                log_tail=place.log_tail(),
            )
        )
    for line in records:
        if line["event"] == E.WATCHDOG_WOULD_KILL:
            with contextlib.suppress(ValueError, KeyError):
                id_ = AttemptId.parse(str(line["attempt"]))
                story = AttemptFolder.of(folder, id_).kill_story(would_have=True)
                found.append(Kill(attempt=id_, unix=finite(line.get("unix")), record=line, story=story, observed=True))
    return found


def _forecasts(records: Iterable[Json]) -> list[tuple[float, float, float, float]]:
    found = []
    for record in records:
        if record["event"] == E.BATCH_FORECAST:
            told = [finite(record.get(key)) for key in ("unix", "low_unix", "middle_unix", "high_unix")]
            if None not in told:
                at, low, middle, high = (float(each or 0.0) for each in told)
                found.append((at, low, middle, high))
    return found


def _notes(records: Iterable[Json]) -> list[tuple[str, str]]:
    """Return what was said of studies, hosts, connections and files, each thing once."""
    told: dict[str, str] = {
        E.STUDY_NOTE: "note",
        E.RUN_FILES_LOST: "fate",
        E.CLUSTER_LOST: "error",
        E.HOST_CLOSED: "reason",
        E.WORKER_BROKEN: "detail",
        E.WORKER_UNUSABLE: "why",
        E.STUDY_UNAVAILABLE: "error",
    }
    pairs = [
        (str(r["event"]), " ".join(str(r[k]) for k in ("study", "worker", "path", told[r["event"]]) if r.get(k)))
        for r in records
        if r["event"] in told
    ]
    return list(dict.fromkeys(pairs))[:50]
