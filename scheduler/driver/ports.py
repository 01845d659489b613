"""What the dispatcher needs of the world around it, as protocols: a connection, the agents behind it, the study.

`cluster.client.Cluster`, `fleet.Fleet` and `recorder.Recorder` are these in a run; a test has smaller ones. Imports
none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scheduler import model as m
from scheduler.model import letters
from scheduler.model.calls import CallStudy
from scheduler.model.messages import Task

Recordable = m.AskTrial | m.ReshapeTrial | m.ReportValue | m.TellTrial | m.EnqueueRetry | CallStudy


class Connection(Protocol):
    """The way to the Dask scheduler."""

    @property
    def is_ours(self) -> bool:
        """Whether the cluster was started by this driver, and may be made anew by it."""

    @property
    def is_connected(self) -> bool:
        """False once the scheduler is gone."""

    @property
    def is_subscribed(self) -> bool:
        """Whether this scheduler knows what we listen to."""

    def tend(self) -> None:
        """Get the connection back where it is gone; called once a second."""

    def rejoin(self) -> None:
        """Make a scheduler that is back known to us again."""

    def revive(self) -> None:
        """Replace a cluster of our own, in the background."""


class Agents(Protocol):
    """The agents of this run, by the name of their worker."""

    @property
    def in_reach(self) -> int:
        """How many can be asked something now."""

    def launch(self, task: Task, worker: str, /) -> None:
        """Hand an attempt's task to an agent."""

    def tell(self, worker: str, order: letters.Order, /) -> None:
        """Say something about an attempt to its agent; it may be out of reach."""

    def give_up(self, attempt: str, why: str, /) -> None:
        """End the attempt as LOST where its agent cannot be asked."""

    def disconnected(self) -> None:
        """Count every agent as out of reach."""

    def tick(self) -> None:
        """Do what is due; called once a second."""


class StudyRecorder(Protocol):
    """The studies' database, which answers with events."""

    def submit(self, command: Recordable, /) -> None:
        """Queue a command; returns at once."""

    def drain(self) -> None:
        """Start no further trial."""

    def close(self, timeout_s: float, /) -> Sequence[Recordable]:
        """Write what is left and stop; returns what is still unwritten after `timeout_s`."""
