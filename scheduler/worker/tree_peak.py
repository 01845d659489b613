"""The peak of a whole process tree, out of looks at its processes.

A trial is all that it starts. Its root's own peak is exact (the kernel keeps it); of a tree there is no such counter,
so it is looked at while it has children, and what a look cannot see is bounded. Pure: whoever reads processes is the
vitals adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.model.samples import ProcessMemory


class TreePeak:
    """What the processes of one trial held at most, together.

    At a look the tree holds the footprints of its processes, memory that they share counted once, and the mapped files
    of the one that has most (libraries: a process's own peak has them, too). A process whose own peak rose since the
    last look has been at it in between: what it has given back since is added. So the tree was never above the sum
    since the last look, as far as its processes were seen. What the root had reached before it had children is its
    own affair.

    shared_bytes: what the root shares with the process it was forked off. A process's part of memory that it shares is
    the smaller the more share it; so all of this is added, lest the trial's own be too little: it may write to it all.
    peak_bytes: 0 while no child was seen. footprint_bytes: at the last look, None when it could not be read.
    child_peak_bytes: the largest own peak of any child.
    """

    def __init__(self, shared_bytes: int = 0) -> None:
        self.peak_bytes = 0
        self._shared_bytes = shared_bytes
        self.child_peak_bytes = 0
        self.footprint_bytes: int | None = None
        self._peaks: dict[tuple[int, float], int] = {}

    def saw(self, root_pid: int, processes: Sequence[ProcessMemory]) -> None:
        """Take in a look: every living process of the tree."""
        given_back = 0
        for each in processes:
            is_root = each.pid == root_pid
            if each.peak_bytes > self._peaks.get(each.identity, each.peak_bytes if is_root else 0):
                given_back += max(0, each.peak_bytes - each.resident_bytes)
            self._peaks[each.identity] = each.peak_bytes
            if not is_root:
                self.child_peak_bytes = max(self.child_peak_bytes, each.peak_bytes)
        footprints = [each.footprint_bytes for each in processes]
        if None in footprints:
            self.footprint_bytes = None
            return
        self.footprint_bytes = self._shared_bytes + sum(size for size in footprints if size is not None)
        if len(processes) > 1:
            files = max(each.file_bytes for each in processes)
            self.peak_bytes = max(self.peak_bytes, self.footprint_bytes + files + given_back)

    def alone(self, root: tuple[int, float], peak_bytes: int) -> None:
        """Take in the root's own peak while it has no children."""
        self._peaks = {root: peak_bytes}


def with_children(own_peak_bytes: int, tree: TreePeak | None = None, waited_for_bytes: int | None = None) -> int:
    """Work out the peak of a trial's tree from everything that is known of it.

    own_peak_bytes: of the root. waited_for_bytes: the largest peak of any child that the root has waited for, which the
    kernel keeps also of those that lived between two looks. It is inherited: a child starts with its parent's, so
    only above that it is the child's own. What it shows beyond the children that were seen is on top of the tree.
    """
    seen = tree.child_peak_bytes if tree is not None else 0
    peak = max(own_peak_bytes, tree.peak_bytes if tree is not None else 0)
    if waited_for_bytes is None or waited_for_bytes <= max(own_peak_bytes, seen):
        return peak
    return peak + waited_for_bytes - seen
