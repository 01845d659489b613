"""The host registry: a private folder through which the agents of one host and its watchdog talk.

Covers registrations of running attempts, their progress ticks, the watchdog's reading of the host, its thresholds and
the durable journal of kills. Standard library only, because the watchdog must stay small. Holds no policy, sends no
signal. Every file is written whole and renamed, or appended in one write, so a reader never sees half of one; a torn
last line of the journal is dropped.

Instants are seconds of the monotonic clock, which all processes of a host share until it reboots; `boot_id` tells
records of an earlier boot apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.files.durable import read_json, sync_folder, write, write_json
from scheduler.files.private import FLAGS, opener, own_folder
from scheduler.model import ExitReason, KillRecord, Pressure, UsageError
from scheduler.model.fields import BadMessage, OtherProtocol, check_protocol, read

PROTOCOL = 1  # of registrations and readings: the watchdog of a host may have been started by another version
STALE_AFTER_S = 5.0  # a reading older than this says nothing: five missed samples
_JOURNAL_LIMIT_BYTES = 4 << 20
_JOURNAL_KEEPS = 200
_SPARE_BYTES = 64 * 1024  # kept on disk so that the last intent fits although the disk is full


def boot_id() -> str:
    """Names this boot of the machine; records of another boot speak of processes that are all gone."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:  # macOS: the boot's instant in whole minutes (it is corrected by seconds when the clock is set)
        asleep_too = time.clock_gettime(time.CLOCK_MONOTONIC)
        return f"boot-{int((time.time() - asleep_too) // 60)}" if sys.platform == "darwin" else "unknown"


def host_folder() -> str:
    """Where this user's registry on this host is, or will be: $HEADROOM_HOST_DIR or <temp dir>/headroom-<uid>."""
    return os.environ.get("HEADROOM_HOST_DIR") or os.path.join(tempfile.gettempdir(), f"headroom-{os.geteuid()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """One running attempt as the watchdog must know it.

    pid, start_time: the trial process's identity (`vitals.start_time`). reservation_bytes: what the ledger holds for
    it now; promised_bytes: what it was admitted with (default: the same). launched: monotonic instant.
    run: its name; topic: its driver's own. owner_pid, owner_start: the agent's own identity; a trial whose owner is
    gone is an orphan. mode: "on" kills, "observe" only logs.
    """

    attempt: str
    slug: str
    pid: int
    start_time: float
    reservation_bytes: int
    folder: str
    run: str = ""
    topic: str = ""
    mode: str = "on"
    uses_device: bool = False
    launched: float = 0.0
    promised_bytes: int | None = None
    owner_pid: int = field(default_factory=os.getpid)
    owner_start: float | None = None
    boot_id: str = field(default_factory=boot_id)

    @property
    def key(self) -> str:
        """Unique on the host: two runs may use one slug."""
        return f"{self.slug}.{self.pid}"

    @property
    def promised(self) -> int:
        return self.reservation_bytes if self.promised_bytes is None else self.promised_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReading:
    """The watchdog's last word on the host. closed_reason: why admission is closed whatever the level; None if not.

    used_bytes: `Registration.key` -> footprint of that attempt's tree now. over: keys of those over their promise.
    `at`: monotonic instant it was taken.
    """

    at: float
    level: Pressure
    closed_reason: str | None
    available_bytes: int | None
    used_bytes: Mapping[str, int] = field(default_factory=dict)
    over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KillStory(KillRecord):
    """One kill as its journal tells it: the record, whom it was meant for, and the lines themselves.

    A reason that this version does not know counts as `lost`: it costs the trial nothing.
    """

    attempt: str
    pid: int
    start_time: float
    boot_id: str
    records: tuple[Mapping[str, Any], ...] = ()

    @property
    def record(self) -> KillRecord:
        """What an attempt's outcome holds of it."""
        return KillRecord(**{each.name: getattr(self, each.name) for each in dataclasses.fields(KillRecord)})


class HostRegistry:
    """The registry under one root folder. Safe to use from several processes; methods raise OSError only.

    Raises UsageError when the root cannot be made, or could be read or written by somebody else.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(os.fspath(root))
        try:
            self._make()
        except OSError as error:
            path = str(error.filename or self.root)
            why = "somebody else's symbolic link" if os.path.islink(path) else error.strerror
            raise UsageError(
                f"the host registry {path} cannot be used ({why}): set HEADROOM_HOST_DIR to a folder of your own"
            ) from None

    @classmethod
    def default(cls) -> HostRegistry:
        """Return the registry of this user on this host: $HEADROOM_HOST_DIR or <temp dir>/headroom-<uid>."""
        try:
            return cls(host_folder())
        except FileNotFoundError:  # no temporary folder can be written, or the working directory is gone
            raise UsageError(
                "no folder for the host registry: set HEADROOM_HOST_DIR to an absolute path that can be written"
            ) from None

    def _make(self) -> None:
        """Make root and `attempts`, or take those that are there and nobody else's. Raises OSError, UsageError.

        The default lies in a folder where everybody may write: somebody may have put a link there, to have us open up,
        or write into, what it points to.
        """
        os.makedirs(os.path.dirname(self.root), mode=0o700, exist_ok=True)
        if os.path.islink(self.root) and os.lstat(self.root).st_uid == os.geteuid():
            self.root = os.path.realpath(self.root)  # one's own link is one's own wish
        with own_folder(self.root) as fd, own_folder("attempts", within=fd, called=self._path("attempts")):
            pass

    def ensure(self) -> None:
        """Make the folders again if somebody removed them (a cleaner of /tmp). Raises OSError.

        What was registered and set is gone with them: `knows` and `policy` tell.
        """
        if not os.path.isdir(self._path("attempts")):
            try:
                self._make()
            except UsageError as error:
                raise OSError(errno.EPERM, str(error), self.root) from None

    def _path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    # -- the agent's side ---------------------------------------------------------------------------------------

    def register(self, reg: Registration) -> None:
        """From now on the watchdog watches this attempt."""
        write_json(self._path("attempts", reg.key + ".json"), {"protocol": PROTOCOL, **dataclasses.asdict(reg)})

    def knows(self, reg: Registration) -> bool:
        """Whether this attempt is registered."""
        return os.path.exists(self._path("attempts", reg.key + ".json"))

    def tick(self, reg: Registration, step: int, now: float, saved_at: float | None = None) -> None:
        """Note that the attempt made progress. Cheap (one small write); saved_at: instant of its last good
        checkpoint."""
        text = f"{step} {now:.3f} {'-' if saved_at is None else f'{saved_at:.3f}'}\n".encode()
        fd = os.open(self._path("attempts", reg.key + ".tick"), os.O_WRONLY | os.O_CREAT | FLAGS, 0o600)
        try:
            os.pwrite(fd, text.ljust(64), 0)  # one write of a fixed length: a reader sees the old line or the new one
        finally:
            os.close(fd)

    @staticmethod
    def resized(reg: Registration, reservation_bytes: int) -> Registration:
        """Return the registration for when the ledger holds another amount, to be registered again.

        Growth does not raise the promise, tightening lowers it.
        """
        return dataclasses.replace(
            reg, reservation_bytes=reservation_bytes, promised_bytes=min(reg.promised, reservation_bytes)
        )

    def deregister(self, reg: Registration) -> None:
        """Take an attempt off: it is over and its memory is back. Idempotent."""
        for name in (reg.key + ".json", reg.key + ".tick"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path("attempts", name))

    def thresholds(self, values: Mapping[str, Any]) -> None:
        """Set the watchdog's thresholds (fields of policy.eviction.Thresholds); it takes them up within seconds."""
        write_json(self._path("policy.json"), dict(values))

    def pressure(self, now: float | None = None) -> HostReading | None:
        """Read the watchdog's last reading, None when there is none or it is older than 5 s (treat as closed).

        One of another version closes the host, and says so.
        """
        data = read_json(self._path("host.json"))
        now = time.monotonic() if now is None else now
        if not data or data.get("boot_id") != boot_id():
            return None
        try:
            check_protocol("the watchdog of this host", data.get("protocol"), PROTOCOL)
            reading = read(HostReading, data)
        except OtherProtocol as error:
            return HostReading(at=now, level=Pressure.NORMAL, closed_reason=str(error), available_bytes=None)
        except BadMessage:
            return None
        return reading if -1.0 <= now - reading.at <= STALE_AFTER_S else None

    def kill_of(self, attempt: str, pid: int) -> KillStory | None:
        """Read the story of the kill of this attempt's process; None if the watchdog never turned on it.

        A kill that was called off is told too (`aborted`), unless a later one of the same process was not.
        """
        mine = [s for s in self.kills() if s.attempt == attempt and s.pid == pid and s.boot_id == boot_id()]
        return next((s for s in reversed(mine) if not s.aborted), mine[-1] if mine else None)

    # -- the watchdog's side ------------------------------------------------------------------------------------

    def registrations(self) -> Iterator[Registration]:
        """Every registration of this boot that can be read; those of an earlier boot are removed."""
        try:
            entries = os.listdir(self._path("attempts"))
        except FileNotFoundError:  # somebody removed the folder: see `ensure`
            return
        for entry in entries:
            if not entry.endswith(".json"):
                continue
            data = read_json(self._path("attempts", entry))
            if not data:
                continue
            try:
                check_protocol("the agent that registered this", data.get("protocol"), PROTOCOL)
                reg = read(Registration, data)
            except BadMessage:  # written by another version: leave it to its owner
                continue
            if reg.boot_id != boot_id():
                self.deregister(reg)
                continue
            yield reg

    def last_tick(self, reg: Registration) -> tuple[int, float, float | None] | None:
        """(step, instant, instant of the last checkpoint or None) of the last tick, None before the first."""
        try:
            with open(self._path("attempts", reg.key + ".tick")) as file:
                step, at, saved = file.read().split()
            return int(step), float(at), None if saved == "-" else float(saved)
        except (OSError, ValueError):
            return None

    def publish(self, reading: HostReading) -> None:
        """Write the host's reading for the agents."""
        about = {"protocol": PROTOCOL, "boot_id": boot_id(), "pid": os.getpid()}
        write_json(self._path("host.json"), {**about, **dataclasses.asdict(reading)})

    def policy(self) -> tuple[float, Mapping[str, Any]]:
        """(change stamp, thresholds as last set); (0, {}) when never set."""
        path = self._path("policy.json")
        try:
            stamp = os.stat(path).st_mtime_ns
        except OSError:
            return 0.0, {}
        return float(stamp), read_json(path) or {}

    def record(self, kill_id: str, step: str, at: float, *, last_resort: bool = False, **data: Any) -> None:
        """Append one step of a kill to the journal and force it to the disk.

        Raises OSError when it cannot be made durable. last_resort: on a full disk give up the spare file for it.
        """
        line = {"kill_id": kill_id, "step": step, "at": round(at, 3), "unix": round(time.time(), 3), **data}
        text = (json.dumps(line, default=str) + "\n").encode()
        try:
            self._append(text)
        except OSError as error:
            if not last_resort or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path("spare"))
            self._append(text)

    def _append(self, text: bytes) -> None:
        fd = os.open(self._path("kills.jsonl"), os.O_RDWR | os.O_APPEND | os.O_CREAT | FLAGS, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":  # a torn line of a crash: end it, so that ours is whole
                text = b"\n" + text
            if os.write(fd, text) != len(text):
                os.ftruncate(fd, size)
                raise OSError(errno.ENOSPC, "short write to the kill journal")
            os.fsync(fd)
        finally:
            os.close(fd)
        if not size:  # the file is new: its name must survive a crash too
            sync_folder(self.root)

    def compact(self) -> None:
        """Drop old kills from a journal that has grown past 4 MiB; for the elected watchdog, its only writer."""
        path = self._path("kills.jsonl")
        try:
            if os.path.getsize(path) <= _JOURNAL_LIMIT_BYTES:
                return
        except OSError:
            return
        stories = self.kills()
        kept = [s for i, s in enumerate(stories) if not s.finished or i >= len(stories) - _JOURNAL_KEEPS]
        text = "".join(json.dumps(dict(line)) + "\n" for story in kept for line in story.records)
        with contextlib.suppress(OSError):
            write(path, text, durable=True)

    def keep_spare(self) -> None:
        """Reserve the room that `record(last_resort=True)` may fall back on."""
        path = self._path("spare")
        with contextlib.suppress(OSError):
            if not os.path.exists(path) or os.path.getsize(path) < _SPARE_BYTES:
                with open(path, "wb", opener=opener) as file:
                    file.write(b"\0" * _SPARE_BYTES)

    def kills(self) -> list[KillStory]:
        """Every kill in the journal, oldest first. Lines that cannot be read are skipped; observations are left out."""
        by_id: dict[str, list[dict[str, Any]]] = {}
        try:
            with open(self._path("kills.jsonl"), encoding="utf-8", errors="replace") as file:
                for line in file:
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        data = json.loads(line)
                        by_id.setdefault(data["kill_id"], []).append(data)
        except FileNotFoundError:
            return []
        return [_story(kill_id, lines) for kill_id, lines in by_id.items() if lines[0].get("step") == "intent"]


def _story(kill_id: str, lines: list[dict[str, Any]]) -> KillStory:
    first = lines[0]
    try:
        reason = ExitReason(first.get("reason"))
    except ValueError:
        reason = ExitReason.LOST
    return KillStory(
        kill_id=kill_id,
        attempt=first.get("attempt", ""),
        pid=first.get("pid", 0),
        start_time=first.get("start_time", 0.0),
        rule=first.get("rule", ""),
        reason=reason,
        within_promise=first.get("within_promise"),
        boot_id=first.get("boot_id", ""),
        evidence=first.get("evidence", {}),
        steps=tuple((line["step"], line["at"]) for line in lines),
        records=tuple(lines),
        seconds=next((line["seconds"] for line in lines if line.get("seconds") is not None), None),
    )
