"""Log lines for people: key=value, and the standard library's warnings among them.

Covers the readable rendering and where it goes; the JSON line is the journal's (`driver.journal`). Event names are
constant and dotted, units stand in the keys (`reserved_bytes`, `wait_s`): the readable line writes both for people
(`reserved=31.2 GiB`, `wait=12.3 s`), the JSON line leaves them as they are.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from scheduler.masking import scrubbed
from scheduler.model.journal_events import JournalEvent
from scheduler.units import gib

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
Sink = Callable[[str], None]


# A person at the terminal sees less than the journal holds: these only with --log-level debug ...
QUIET = frozenset(
    {
        JournalEvent.ATTEMPT_PROGRESS,
        JournalEvent.ATTEMPT_STARTED,
        JournalEvent.RESERVATION_RESIZED,
        JournalEvent.STUDY_REFUSED,  # the command line has said it
        JournalEvent.TRIAL_ASKED,
        JournalEvent.TRIAL_DEFERRED,  # what waits, and for what, stands in the line of progress and in the live view
        JournalEvent.TRIAL_ENDED,
        JournalEvent.TRIAL_TOLD,
    }
)
# ... and of these only some fields.
SHOWN: dict[str, tuple[str, ...]] = {
    JournalEvent.BATCH_STARTED: ("run", "driver_pid"),
    JournalEvent.WORKER_JOINED: (
        "host",
        "slots",
        "limit_bytes",
        "limit_source",
        "available_bytes",
        "overhead_bytes",
        "environment",
        "runtime_bytes",
    ),
    JournalEvent.ATTEMPT_LAUNCHED: ("attempt", "reserved_bytes", "source", "wait_s", "resume_from"),
    JournalEvent.ATTEMPT_ENDED: (
        "attempt",
        "reason",
        "value",
        "epochs",
        "duration_s",
        "predicted_bytes",
        "peak_bytes",
        "detail",
    ),
}


# What says nothing new to a person.
DULL = (("early", False), ("unwritten", 0), ("detail", "completed"), ("detail", "pruned"), ("wait_s", 0.0))


def configure(level: str = "info", sink: Sink | None = None) -> None:
    """Send what `get()` logs at `level` and above to `sink` as readable lines (default: stderr), passwords hidden.

    The standard library's warnings and errors (Dask, Optuna, tornado) go the same way, their chatter does not. Call it
    after Optuna was imported, which sets up a logger of its own then.
    """
    to = sink or stderr_sink

    def write(line: str) -> None:
        to(scrubbed(line))

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            readable,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: _SinkLogger(write),
        cache_logger_on_first_use=False,
    )
    # Optuna writes to stderr by a handler of its own, past any live view, and calls each new study news.
    optuna = logging.getLogger("optuna")
    optuna.handlers.clear()
    optuna.propagate = True
    optuna.setLevel(logging.WARNING)
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _Forward)]:
        root.removeHandler(handler)
    root.addHandler(_Forward(write))
    root.setLevel(logging.WARNING if LEVELS[level] > logging.DEBUG else logging.INFO)


def get(**context: Any) -> Any:
    """Return a logger; `context` stands on each of its lines."""
    return structlog.get_logger(**context)


def show(event: str, fields: Mapping[str, Any]) -> None:
    """Log an event of the journal for a person: the fields that matter, at the level it deserves."""
    wanted = SHOWN.get(event, tuple(fields))
    shown = {k: fields[k] for k in wanted if fields.get(k) is not None and not isinstance(fields[k], dict | list)}
    shown.pop("traceback", None)
    for key, value in DULL:
        if shown.get(key) == value:
            del shown[key]
    said = get()
    if event in QUIET:
        said.debug(event, **shown)
    elif fields.get("kill"):  # the line among all others that must be seen
        said.warning(event, **shown)
    else:
        said.info(event, **shown)


def readable(_logger: Any, _method: str, event: Mapping[str, Any]) -> str:
    """One event as a line: time, level (when not info), name, key=value; a traceback follows on its own lines."""
    fields = dict(event)
    time, name = fields.pop("timestamp", ""), fields.pop("event", "")
    level, trace = fields.pop("level", "info"), fields.pop("exception", None)
    parts = [
        time,
        "" if level == "info" else level.upper(),
        str(name),
        *(_pair(key, value) for key, value in fields.items()),
    ]
    line = " ".join(part for part in parts if part)
    return line if trace is None else f"{line}\n{trace}"


def stderr_sink(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _SinkLogger:
    """What structlog calls with the rendered line."""

    def __init__(self, write: Sink) -> None:
        self._write = write

    def msg(self, line: str) -> None:
        self._write(line)

    debug = info = warning = error = critical = exception = fatal = log = warn = msg


class _Forward(logging.Handler):
    """Standard-library records as readable lines."""

    def __init__(self, write: Sink) -> None:
        super().__init__(logging.WARNING)
        self._write = write
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record))
        except Exception:  # a log line must never end the batch
            self.handleError(record)


def _pair(key: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and key.endswith("_bytes"):
        return f"{key[:-6]}={gib(value).replace(' ', '')}"
    if isinstance(value, int | float) and not isinstance(value, bool) and key.endswith("_s"):
        return f"{key[:-2]}={value:.1f}s"
    if isinstance(value, float):
        return f"{key}={value:.6g}"
    text = str(value)
    return f"{key}={json.dumps(text, ensure_ascii=False) if not text or any(c.isspace() for c in text) else text}"
