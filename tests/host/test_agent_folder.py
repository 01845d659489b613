"""The folders of a host's agents: what becomes of those whose agent never came."""

from __future__ import annotations

import os
import time
from pathlib import Path

from scheduler.host.agent_folder import UNENTERED_S, AgentFolder, Ownership
from scheduler.host.registry import HostRegistry


def test_a_folder_that_no_agent_entered_is_forgotten_in_time(tmp_path: Path) -> None:
    """Its worker was killed right after it made it. One that is young, or has its worker, may yet be entered."""
    folder = AgentFolder(HostRegistry(tmp_path / "host"))
    for name in ("young", "owned", "left"):
        folder.make(name)
    owned = Ownership.of(folder, "owned")
    assert owned is not None
    Path(folder.path("left", "lock")).touch()
    long_ago = time.time() - UNENTERED_S - 1
    for name in ("owned", "left"):
        os.utime(folder.path(name), (long_ago, long_ago))
    assert list(folder.agents(lambda pid, start: True)) == []
    assert sorted(os.listdir(folder.root)) == ["owned", "young"]
    owned.release()
