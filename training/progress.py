"""Where a training function says how far it is, and hears that it is to stop."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where a training function says how far it is; see `training.protocol` for the real one."""

    @property
    def stop_requested(self) -> str | None:
        """None, "prune" (leave) or "drain" (write a checkpoint, then leave)."""

    def report(self, step: int, value: float) -> None:
        """Say that an epoch ended with this validation loss; step counts from 1."""

    def tick(self) -> None:
        """Say that an optimizer step ended."""

    def settled(self) -> None:
        """Say that the memory peak has been reached."""

    def checkpoint(self, path: str, step: int = 0) -> None:
        """Say that a checkpoint is durable."""

    def note(self, text: str) -> None:
        """Something that whoever watches the run should hear of, in one line."""


class Silent:
    """A progress nobody listens to."""

    stop_requested: str | None = None

    def report(self, step: int, value: float) -> None: ...
    def tick(self) -> None: ...
    def settled(self) -> None: ...
    def checkpoint(self, path: str, step: int = 0) -> None: ...
    def note(self, text: str) -> None: ...
