"""How a process of a trial's kind is started: its command line, its variables, its session.

Covers trial processes and the server that forks them. What they are to whoever started them is `trial_process` and
`fork_server`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WITHHELD = "HEADROOM_STORAGE"  # no trial needs the database, and many programs write their environment into a log
_PROJECT = Path(__file__).resolve().parents[2]


def start(
    module: str, preload: Sequence[str] | None, environment: Mapping[str, str | None], *more: str, **pipes: Any
) -> subprocess.Popen[bytes]:
    """Start `python -m module`. preload: modules it imports first, None: what the built-in training needs; environment:
    see `variables`; more: further arguments; pipes: stdin, stdout and stderr, as Popen takes them."""
    imports = [] if preload is None else [f"--preload={','.join(preload)}"]
    started = subprocess.Popen(
        [sys.executable, "-m", module, *imports, *more],
        env=variables(environment),
        start_new_session=True,  # the terminal's Ctrl-C is the driver's; and its own session is its own tree
        **pipes,
    )
    # The kernel, when it must kill for memory, should take a trial before the driver or the watchdog. What it forks
    # begins with the same.
    with contextlib.suppress(OSError):
        Path(f"/proc/{started.pid}/oom_score_adj").write_text("500")
    return started


def variables(environment: Mapping[str, str | None]) -> dict[str, str]:
    """Return a trial process's variables: these over our own, None takes one away; it finds our modules, then the
    user's."""
    path = os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH", "")]))
    found = {**os.environ, "PYTHONPATH": path, WITHHELD: None, **environment}
    return {name: value for name, value in found.items() if value is not None}
