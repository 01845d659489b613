"""An attempt's folder: what its files are called, who writes and who reads each, and whose it is.

| file | written by | says |
|---|---|---|
| `claim` | the agent, once | which run started the attempt: an attempt is started at most once |
| `spec.json` | the agent | the task it was begun with |
| `trial.log` | the agent | the output of the trial and of its children, of bounded size |
| `checkpoint.safetensors` | the trial | what a later attempt goes on from; an objective's own has any other suffix |
| `model.safetensors` | the trial | the model of its best epoch |
| `result.json` | the trial | its last message, durable before it is sent |
| `kill.json`, `would_kill.json` | the watchdog | the story of a kill, or of one that it would have carried out |
| `kill.txt`, `would_kill.txt` | the watchdog | the same for people: sizes in GiB, the time of day, whose fault |

Covers the folders of all attempts of a trial too: which is the latest, which checkpoint the newest, dropping them. A
trial's own code can write here: what does not parse is as good as not there. `training` knows the names of the files
that it writes by itself. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler.files.durable import create, read_json, tail, write, write_json
from scheduler.host import kill_words
from scheduler.host.registry import boot_id
from scheduler.model import AttemptId, Json, KillRecord, TrialId, messages
from scheduler.model.fields import BadMessage, finite

CLAIM = "claim"
TASK = "spec.json"
LOG = "trial.log"
CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
RESULT = "result.json"
KILL = "kill.json"
WOULD_KILL = "would_kill.json"

_one_at_a_time = threading.Lock()  # who has read that it is another run's must be the one to rename it


def attempts_of(run_folder: str | os.PathLike[str]) -> Path:
    """Return the folder that a run's attempts have theirs in."""
    return Path(run_folder) / "attempts"


@dataclass(frozen=True, slots=True)
class AttemptFolder:
    """One attempt's. Reading raises nothing; writing raises OSError."""

    path: Path

    @classmethod
    def of(cls, run_folder: str | os.PathLike[str], attempt: AttemptId) -> AttemptFolder:
        return cls(attempts_of(run_folder) / attempt.slug)

    # -- the launch fence ---------------------------------------------------------------------------------------------

    def claim(
        self,
        run_id: str,
        *,
        in_use: Callable[[Path], bool] = lambda folder: False,
        note: Callable[[str], None] = lambda text: None,
    ) -> bool:
        """Make the folder and claim it for this run: False when that was done before. Raises OSError.

        Dask may run a task twice (dask/distributed#6078); a second training start of one attempt must not happen. On a
        host with a disk of its own the attempts of a run stay behind when its folder is removed where the driver is,
        and the next run of that name numbers its attempts alike: what another run left is renamed, with all that is in
        it, and that is noted. in_use: whether a process works there; then EBUSY.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _one_at_a_time:
            other = self._claimed_by()
            if other is not None and other != run_id:
                if in_use(self.path):
                    raise OSError(errno.EBUSY, f"in use by another run ({other[:8]})", os.fspath(self.path))
                note(f"{self.path} was left by another run: it is now {self._set_aside(other)}")
                self.path.mkdir(mode=0o700, exist_ok=True)
        return create(self.path / CLAIM, f"{os.getpid()} {boot_id()} {run_id}\n")

    def _claimed_by(self) -> str | None:
        """Return the run that claimed the folder; None when nobody did, or did not say (a torn claim, or one of a
        version that did not write it)."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            words = (self.path / CLAIM).read_text().split()
            return words[2] if len(words) == 3 else None
        return None

    def _set_aside(self, run: str) -> Path:
        endings = ("", *(f"-{number}" for number in range(2, 100)))
        targets = [self.path.with_name(f"{self.path.name}.of-{run[:8]}{ending}") for ending in endings]
        target = next(path for path in targets if not path.exists())
        return self.path.rename(target)

    # -- how it began -------------------------------------------------------------------------------------------------

    def write_task(self, task: messages.Task) -> None:
        """Keep what the attempt is begun with."""
        write_json(self.path / TASK, task.to_json(), durable=True)

    def _begun_with(self, name: str) -> Any:
        return (read_json(self.path / TASK) or {}).get(name)

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint it began with, as it was named; None for one that began anew."""
        before = self._begun_with("resume_from")
        return Path(before) if isinstance(before, str) and before else None

    @property
    def retries(self) -> int | None:
        """How many retries its trial had spent when it began, None where that is not known."""
        spent = self._begun_with("retries")
        return spent if isinstance(spent, int) else None

    @property
    def ran_s(self) -> float:
        """How long its trial has run, earlier attempts included, up to this one's checkpoint; by the host's clock."""
        own_s = 0.0
        with contextlib.suppress(OSError):
            own_s = self.checkpoint.stat().st_mtime - (self.path / TASK).stat().st_mtime
        return max(0.0, finite(self._begun_with("ran_s")) or 0.0) + max(0.0, own_s)

    # -- what the trial writes ----------------------------------------------------------------------------------------

    @property
    def log(self) -> Path:
        return self.path / LOG

    def log_tail(self) -> str:
        """Read the end of its log, empty where there is none."""
        return tail(self.log)

    @property
    def checkpoint(self) -> Path:
        """Where its checkpoint is, once it has written one."""
        default = self.path / CHECKPOINT
        named = (path for path in sorted(self.path.glob("checkpoint.*")) if path.suffix != ".tmp")
        return default if default.is_file() else next(named, default)

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoint.is_file()

    def drop_checkpoint(self) -> list[Path]:
        """Remove it and the model, with the halves that a killed process left behind; return what went.

        What cannot go stays.
        """
        removed = []
        for path in (*self.path.glob("checkpoint.*"), *self.path.glob(f"{MODEL}*")):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path)
        return removed

    def result(self) -> messages.Last | None:
        """Read the last message as it was written before it was sent; None when there is none that parses."""
        with contextlib.suppress(BadMessage):
            return messages.last(read_json(self.path / RESULT) or {})
        return None

    # -- what the watchdog writes -------------------------------------------------------------------------------------

    def write_kill(self, story: Mapping[str, Any], *, would_have: bool = False) -> Path | None:
        """Keep the story of a kill; would_have: of one that was only observed. Returns where; None without a folder."""
        if not self.path.is_dir():
            return None
        path = self.path / (WOULD_KILL if would_have else KILL)
        write_json(path, story, durable=True)
        # Whoever reads the words looks there after the fact; whatever goes wrong with them must not hold up a kill.
        with contextlib.suppress(Exception):
            write(path.with_suffix(".txt"), kill_words.as_text(story))
        return path

    def kill_story(self, *, would_have: bool = False) -> Json:
        """All that is written of the kill, for the watchdog that takes it over; empty without one."""
        return read_json(self.path / (WOULD_KILL if would_have else KILL)) or {}

    def kill(self, *, would_have: bool = False) -> KillRecord | None:
        """Read the record of the kill as far as it is written; would_have: of one that was only observed."""
        with contextlib.suppress(BadMessage):
            return KillRecord.from_json(read_json(self.path / (WOULD_KILL if would_have else KILL)))
        return None


# -- all attempts of a trial ------------------------------------------------------------------------------------------


def folders_of(attempts: Path, trial: TrialId) -> list[tuple[int, AttemptFolder]]:
    """List (number, folder) of each attempt of a trial that is here, oldest first."""
    slug = re.compile(re.escape(AttemptId(trial, 0).slug.removesuffix("0")) + r"(\d+)")
    if not attempts.is_dir():
        return []
    return sorted(
        ((int(found[1]), AttemptFolder(path)) for path in attempts.iterdir() if (found := slug.fullmatch(path.name))),
        key=lambda each: each[0],
    )


def newest_checkpoint(newest_first: Sequence[AttemptFolder]) -> str | None:
    """Find the newest checkpoint of any attempt: a later attempt may have died before it wrote its first."""
    for folder in newest_first:
        if folder.has_checkpoint:
            return os.fspath(folder.checkpoint)
        before = folder.resumed_from
        if before is not None and before.is_file():
            return os.fspath(before)
    return None


def first_readable(checkpoints: Sequence[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """Find the first of these, files or folders, that can be read on this host; and why each before it cannot.

    Returns (its path, or None when there is none; [(path, why)] of those before it).
    """
    unreadable = []
    for path in checkpoints:
        try:
            if os.path.isdir(path):
                os.listdir(path)
            else:
                with open(path, "rb") as file:
                    file.read(1)
        except OSError as error:
            unreadable.append((path, error.strerror or str(error)))
        else:
            return path, unreadable
    return None, unreadable


def drop_checkpoints(attempts: Path, trial: TrialId) -> list[Path]:
    """Remove the checkpoints of all attempts of a trial, and of the attempts that it was resumed from.

    Whether they may go is the brain's decision. Only files below `attempts` are touched, as this host sees it: on
    another host's own disk nothing is removed. Returns what was removed; what cannot be removed stays.
    """
    todo = [folder for _, folder in folders_of(attempts, trial)]
    seen: set[AttemptFolder] = set()
    removed = []
    while todo:
        folder = todo.pop()
        if folder in seen:
            continue
        seen.add(folder)
        before = folder.resumed_from
        if before is not None and before.parent.parent == attempts:
            todo.append(AttemptFolder(before.parent))
        removed += folder.drop_checkpoint()
    return removed
