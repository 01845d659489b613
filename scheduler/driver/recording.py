"""What the brain was told and what it answered, kept so that a run can be gone through again.

Covers the files `recording/<start>.jsonl.gz` of a run folder (one per start of the driver: its rules, then each event
with its instant and commands) and the JSON form of the values in them. `python -m scheduler.replay RUN` reads them.
Recording is never worth a run: whatever goes wrong with it ends the recording, and is said once.
"""

from __future__ import annotations

import dataclasses
import enum
import gzip
import importlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.files.private import opener
from scheduler.model import Command, Event

FOLDER = "recording"
VERSION = 1
FLUSH_S = 30.0  # a crash loses at most so much of it, beside what the compressor has not given out
LIMIT_BYTES = 2**28


class Recording:
    """Writes what passes through `BatchState.handle`; drop-in for the call itself."""

    def __init__(self, run_folder: Path, brain: BatchState, *, studies: int, note: Callable[[str], None]) -> None:
        """Begin for a brain that has not been told anything yet. note: hears why a recording ended early."""
        self._brain, self._note = brain, note
        self._file: gzip.GzipFile | None = None
        self._flushed_at = time.monotonic()
        try:
            self.path = _next(run_folder / FOLDER)
            # Open as long as the run is, and its user's alone.
            self._raw = open(self.path, "xb", opener=opener)  # noqa: SIM115
            self._file = gzip.GzipFile(fileobj=self._raw, mode="wb", compresslevel=6)
        except OSError as error:
            self._end(error)
        self._write({"v": VERSION, "unix": round(time.time(), 3), "rules": brain.rules, "studies": studies})

    def handle(self, event: Event, now: float) -> list[Command]:
        """Pass the event to the brain, and keep it with what came of it, an exception too."""
        try:
            commands = self._brain.handle(event, now)
        except BaseException as error:
            self._write({"at": now, "event": event, "raised": type(error).__name__})
            raise
        line: dict[str, Any] = {"at": now, "event": event}
        self._write(line | {"commands": commands} if commands else line)
        return commands

    def close(self) -> None:
        """Write what is still held."""
        if self._file is not None:
            try:
                self._file.close()
                self._raw.close()
            except OSError as error:
                self._end(error)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(encode(line), separators=(",", ":")).encode() + b"\n")
            now = time.monotonic()
            if now - self._flushed_at > FLUSH_S:
                self._flushed_at = now
                self._file.flush()
                self._raw.flush()
                if self.path.stat().st_size > LIMIT_BYTES:
                    self._end(f"it has {LIMIT_BYTES} bytes")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self._end(error)

    def _end(self, why: object) -> None:
        self._file = None
        self._note(f"nothing more is recorded for a replay: {why}")


def _next(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    taken = [int(path.name.partition(".")[0]) for path in folder.glob("[0-9]*.jsonl.gz")]
    return folder / f"{max(taken, default=0) + 1:04d}.jsonl.gz"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One event as it was handled. commands: in their JSON form; raised: name of the exception that came instead."""

    at: float
    event: Event
    commands: Sequence[Any]
    raised: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of the driver: what its brain was made with, and all it was told until its end or a crash."""

    path: Path
    rules: Rules
    studies: int
    steps: Iterator[Step]


def read(run_folder: Path) -> Iterator[Start]:
    """Yield the starts of a run, oldest first. A torn end, as a killed driver leaves it, is the end.

    Raises FileNotFoundError without a recording, OSError, ValueError for one that is not of this version.
    """
    paths = sorted((run_folder / FOLDER).glob("*.jsonl.gz"))
    if not paths:
        raise FileNotFoundError(f"{run_folder / FOLDER} has no recording")
    for path in paths:
        lines = _lines(path)
        head = next(lines, {})
        if head.get("v") != VERSION:
            raise ValueError(f"{path} is no recording of version {VERSION}")
        yield Start(path=path, rules=decode(head["rules"]), studies=head["studies"], steps=map(_step, lines))


def _step(line: Mapping[str, Any]) -> Step:
    event, commands = decode(line["event"]), line.get("commands", [])
    return Step(at=line["at"], event=event, commands=commands, raised=line.get("raised"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (EOFError, zlib.error, ValueError):
        return


# -- values as JSON -------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """Return a value of `model` or `core` as JSON.

    Dataclasses and enums name their class; what is no JSON says what it is.
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return {"$enum": [_name(type(value)), value.name]}
    if dataclasses.is_dataclass(value):
        fields = {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"$": _name(type(value)), **fields}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {"$map": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"$set": [encode(item) for item in value]}
    if isinstance(value, list | Sequence):
        return [encode(item) for item in value]
    raise TypeError(f"cannot be recorded: {type(value).__name__}")


def decode(data: Any) -> Any:
    """Read what `encode` made. Classes are looked up in `model` and `core` only."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    match data:
        case {"$enum": [name, member]}:
            return _class(name)[member]
        case {"$map": pairs}:
            return {decode(key): decode(item) for key, item in pairs}
        case {"$tuple": items}:
            return tuple(decode(item) for item in items)
        case {"$set": items}:
            return frozenset(decode(item) for item in items)
        case {"$": name, **fields}:
            return _class(name)(**{key: decode(item) for key, item in fields.items()})
    return {key: decode(item) for key, item in data.items()}


def _name(cls: type) -> str:
    return f"{cls.__module__.removeprefix('scheduler.')}:{cls.__qualname__}"


def _class(name: str) -> Any:
    module, _, cls = name.partition(":")
    if module.split(".")[0] not in ("model", "core"):
        raise ValueError(f"{name} is nothing that is recorded")
    found = getattr(importlib.import_module(f"scheduler.{module}"), cls)
    if not (dataclasses.is_dataclass(found) or isinstance(found, enum.EnumMeta)):
        raise ValueError(f"{name} is nothing that is recorded")
    return found
