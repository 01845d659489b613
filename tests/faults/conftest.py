"""What several fault tests need of the host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import until

LIMIT_BYTES = 2**31


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup with 2 GiB, taken away when nobody is left in it."""
    root = Path("/sys/fs/cgroup/memory")
    if os.geteuid() != 0 or not (root / "cgroup.procs").exists():
        pytest.skip("needs root and the v1 memory controller")
    made = root / f"headroom-test-{os.getpid()}"
    made.mkdir()
    (made / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    yield made
    until(lambda: _remove(made), 30.0, "the cgroup is empty")


def _remove(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()
