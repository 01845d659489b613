"""What a training saves, where and when: its checkpoint, and the model of its best epoch.

Covers what is said of a checkpoint that takes long, and that a full disk costs the file and not the run. What is in
either, and how it is read again, is `training.checkpoint` and `training.model_file`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import checkpoint, model_file, tensor_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from training.progress import Progress

LONGEST_DRAIN_S = 3600.0
WORTH_SAYING_BYTES = 2**30  # of a checkpoint: smaller ones are written in seconds


class Saver:
    """One training's.

    path: where the checkpoint goes, None for none. task: see `checkpoint.task_digest`. every_s: a checkpoint is due so
    many seconds after the one before, also within an epoch; None: after each epoch. drain_s: what there is for one when
    asked to leave, None where nobody says. model_facts: what `model_file` keeps beside the weights; given, the best
    epoch's model lies beside the checkpoint.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        task: str = "",
        every_s: float | None = None,
        drain_s: float | None = None,
        model_facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.task = path, task
        self._every_s, self._drain_s, self._model_facts = every_s, drain_s, model_facts
        self._saved_s = time.monotonic()
        self._stepped_s, self._longest_step_s = self._saved_s, 0.0
        self._bytes_per_s: float | None = None  # of the disk, once it was tried

    # -- the checkpoint -----------------------------------------------------------------------------------------------

    def stepped(self) -> None:
        """Take note that a step has ended: the longest of them says how long a drain waits."""
        now = time.monotonic()
        self._longest_step_s = max(self._longest_step_s, now - self._stepped_s)
        self._stepped_s = now

    def is_due(self, *, within_epoch: bool) -> bool:
        """Whether one is to be written now; within_epoch: after a step, not after an epoch."""
        if self._every_s is None:
            return not within_epoch
        return time.monotonic() - self._saved_s >= self._every_s

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], epoch: int, progress: Progress) -> bool:
        """Write one; whether it is there. A full disk costs the checkpoint, not the run."""
        if self.path is None:
            return False
        try:
            checkpoint.save(self.path, tensors, facts, self.task)
        except OSError as error:
            progress.note(f"checkpoint not written, the one before is kept: {error}")
            return False
        finally:
            self._saved_s = time.monotonic()
        progress.checkpoint(str(self.path), epoch)
        return True

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read a checkpoint of this task into these tensors and return its facts. Raises CheckpointRejected."""
        return checkpoint.load(path, tensors, self.task)

    def say(self, size_bytes: int, progress: Progress, *, leaving: bool = False) -> None:
        """Say what a large checkpoint takes; when leaving, only that there is no time for it, before it is tried."""
        if self.path is None or size_bytes < WORTH_SAYING_BYTES:
            return
        try:
            self._bytes_per_s = self._bytes_per_s or tensor_file.try_disk(self.path.parent)
        except OSError as error:
            progress.note(f"checkpoints cannot be written: {error}")
            return
        takes_s = size_bytes / self._bytes_per_s
        said = f"a checkpoint is {size_bytes / 2**30:.1f} GiB and takes some {takes_s:.0f} s"
        if not leaving:
            every = "epoch" if self._every_s is None else f"{self._every_s / 60:g} minutes"
            said += f", one every {every}"
        # What whoever ends it gives it (scheduler/core/leaving.py): twice its longest step, and no less than this.
        there_s = None if self._drain_s is None else max(self._drain_s, min(LONGEST_DRAIN_S, 2 * self._longest_step_s))
        if there_s is not None and takes_s > there_s:
            said += f"; a drain has {there_s:.0f} s and may not finish one (drain_timeout_s): the one before is kept"
        elif leaving:
            return
        progress.note(said)

    # -- the model of the best epoch ----------------------------------------------------------------------------------

    @property
    def model_path(self) -> Path | None:
        """Where it lies, None where none is kept."""
        wanted = self.path is not None and self._model_facts is not None
        return self.path.with_name(model_file.NAME) if wanted and self.path else None

    def save_model(self, model: nn.Module, epoch: int, value: float, progress: Progress) -> None:
        """Keep the weights of an epoch that is the best so far: a checkpoint has those of the last one."""
        if self.model_path is None or self._model_facts is None:
            return
        try:
            model_file.save(self.model_path, model, {**self._model_facts, "epoch": epoch, "value": value})
        except OSError as error:
            with contextlib.suppress(OSError):  # an earlier epoch's would pass for the best one's
                self.model_path.unlink()
            progress.note(f"model of epoch {epoch}, the best so far, not written: {error}")

    def take_over_model(self, beside: Path) -> None:
        """Go on with the model that lies beside an earlier attempt's checkpoint."""
        if self.model_path is not None:
            model_file.take_over(beside.with_name(model_file.NAME), self.model_path)
