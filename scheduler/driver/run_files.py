"""The two things a run cannot do without: its folder, and its database where that is a file.

Covers noticing that one of them was removed, moved or replaced while the run went on, saving what the database held,
and saying how to go on. Stopping the run is the driver's.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from scheduler.files.pinned import Pinned
from scheduler.host.attempt_folder import attempts_of
from scheduler.study.store import StudyStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """what: "run folder" or "study database". fate: "was removed", "was moved to …" or "was replaced by another"."""

    what: str
    path: Path
    fate: str

    @property
    def is_folder(self) -> bool:
        """Nothing that runs can write its checkpoint or its result any more."""
        return self.what == "run folder"

    def __str__(self) -> str:
        return f"the {self.what} {self.path} {self.fate} while the run went on"


class RunFiles:
    """folder: the run's, which must be there. store: what keeps the studies."""

    def __init__(self, folder: Path, store: StudyStore) -> None:
        self._folder, self._store = Pinned(folder), store
        self._doubted = False
        self.loss: Loss | None = None  # once there is one it stays

    def missing(self) -> Loss | None:
        """Return what is not there at this moment."""
        if (fate := self._folder.lost()) is not None:
            if not (self._folder.path / "run_id").exists():  # an agent's probe makes the path again
                fate = fate.replace("was replaced by another", "was removed")
            return Loss(what="run folder", path=self._folder.path, fate=fate)
        database = self._store.file
        if database is not None and (fate := database.lost()) is not None:
            return Loss(what="study database", path=database.path, fate=fate)
        return None

    def look(self, *, is_last: bool = False) -> Loss | None:
        """Return the loss, once two looks in a row have found one; is_last: this one is enough.

        To be called about once a second: somebody may put things back at once.
        """
        if self.loss is None:
            found = self.missing()
            self.loss = found if self._doubted or is_last else None
            self._doubted = found is not None
        return self.loss

    def save(self, loss: Loss) -> str:
        """Save what would be lost with it; returns the line that says what happened and how to go on."""
        again = "then give the same command"
        if loss.fate.startswith("was moved to "):
            now = loss.fate.removeprefix("was moved to ")
            return f"{loss}; to go on: mv {shlex.quote(now)} {shlex.quote(str(loss.path))}, {again}"
        database = self._store.file
        if database is None:
            return f"{loss}; the studies are in the database all the same: the same command goes on, from no checkpoint"
        if loss.is_folder and database.path.parent != loss.path:
            return f"{loss}; the studies are in {database.path}: the same command goes on, from no checkpoint"
        folder = loss.path.parent
        name = loss.path.name if loss.is_folder else database.path.stem
        target = folder / f"{name}.rescued-{time.strftime('%Y%m%d-%H%M%S')}.db"
        try:
            self._store.rescue(target)
        except OSError as error:
            return f"{loss}; what it held could not be saved ({error}); the same command starts anew"
        make = f"mkdir -p {shlex.quote(str(loss.path))} && " if loss.is_folder else ""
        back = f"{make}mv {shlex.quote(str(target))} {shlex.quote(str(database.path))}"
        return f"{loss}; what the studies held is in {target}; to go on: {back}, {again}"

    def close(self) -> None:
        """Also takes away the empty folders that an agent has made again in place of a run folder that is gone."""
        if self._folder.lost() is not None:
            for path in (attempts_of(self._folder.path), self._folder.path):
                with contextlib.suppress(OSError):
                    path.rmdir()
        self._folder.close()
