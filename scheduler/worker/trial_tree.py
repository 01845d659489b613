"""The processes of one trial: who they are, and what they hold and have held together.

A trial is all that it starts, what left its session included. Pure: takes in what `memory_gauge` has read. How the peak
of a tree follows from looks at it is `tree_peak`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from scheduler.model.samples import ProcessMemory, TreeSample
from scheduler.worker.tree_peak import TreePeak, with_children


@dataclass(slots=True, kw_only=True)
class TrialTree:
    """One trial's. pid, start_time: its root's identity. own_peak_bytes: of the root alone, None until it is known.

    members: (pid, start time) of every process of it that was ever seen.
    """

    attempt: str
    pid: int
    start_time: float
    peak: TreePeak = field(default_factory=TreePeak)
    own_peak_bytes: int | None = None
    members: set[tuple[int, float]] = field(default_factory=set)

    @property
    def peak_bytes(self) -> int | None:
        """Of all of it, as far as that is known while it runs."""
        return with_children(self.own_peak_bytes or 0, self.peak) or None

    @property
    def descendants(self) -> Iterator[tuple[int, float]]:
        """Whoever is not the root."""
        return (each for each in self.members if each[0] != self.pid)

    def reached(self, own_peak_bytes: int | None) -> None:
        """Take in a peak of the root's, by its own word or the kernel's."""
        if own_peak_bytes is not None:
            self.own_peak_bytes = max(self.own_peak_bytes or 0, own_peak_bytes)

    def looked_at(self, processes: Sequence[ProcessMemory]) -> None:
        """Take in what each living process of it holds now."""
        self.members.update(each.identity for each in processes)
        self.peak.saw(self.pid, processes)

    def sampled(self, sample: TreeSample, own_peak_bytes: int | None) -> int | None:
        """Take in a sample of the whole, and the root's own peak. Returns the bytes it holds now, None if unknown."""
        self.members.update(sample.members)
        footprint, held = sample.footprint_bytes, self.peak.footprint_bytes
        if sample.processes > 1 and held is not None:
            footprint = held + sample.unmapped_bytes  # pages that they share count once in this
        if sample.processes == 1 and own_peak_bytes is not None:
            self.peak.alone(sample.members[0], own_peak_bytes)
        if own_peak_bytes is not None and sample.shared_bytes:  # what a memfd or a tmpfs holds is in no VmHWM
            own_peak_bytes = max(own_peak_bytes, footprint or 0)
        self.reached(own_peak_bytes)
        return footprint
