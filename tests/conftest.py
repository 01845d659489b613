"""What every test gets: its own host registry, no settings from outside, few threads, no deadlines in hypothesis.

Holds no fixtures for one module's sake: those live in that module's tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Two cores are what the timed tests are meant for; more threads would only make the tests disturb each other. Set
# before torch is imported by anything.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MKL_NUM_THREADS", "2")

# A loaded machine is no reason to fail an example.
settings.register_profile("headroom", deadline=None)
settings.load_profile("headroom")


@pytest.fixture(autouse=True)
def isolated_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No `HEADROOM_…` of the caller's reaches a test, and its watchdog shares no registry with a real run."""
    for key in [name for name in os.environ if name.startswith("HEADROOM_")]:
        monkeypatch.delenv(key)
    host = tmp_path_factory.mktemp("host")
    monkeypatch.setenv("HEADROOM_HOST_DIR", str(host))
    return host


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a device where there is none; torch is imported only if such a test was collected."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA or MPS device"))
