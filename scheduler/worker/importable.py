"""Whether the function that trials call can be imported: asked of a process such as theirs, before any of them starts.

What is done about one that cannot is the caller's: a command refuses it, a worker starts nothing until it can.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.model import Json, UsageError
from scheduler.model.plain import line
from scheduler.worker import launch
from scheduler.worker.trial_process import TrialStartError
from scheduler.worker.witness import FROM_OUTSIDE, describe_status

CHECK_TIMEOUT_S = 120.0  # importing torch took 25 s on a cold, busy disk
CHECK_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ToImport:
    """A function that trials call, as `check_objective` takes it. flag: what the user calls it; hint: what may help."""

    path: str
    module: str
    flag: str
    hint: str = ""

    def refused(self, why: str, where: str = "") -> UsageError:
        """Return the error for one that cannot be imported."""
        return UsageError(f"{self.flag}: {why}{where}{self.hint}")


def check_objective(
    path: str, environment: Mapping[str, str | None] | None = None, module: str = "training.trial"
) -> None:
    """Import the objective `module:function` as a trial would, in a process. Raises TrialStartError saying why not.

    A process that was killed from outside says nothing of the objective and is tried again. module: what runs it.
    """
    # A pickled function is longer than an argument may be, and what it holds is nobody else's to read (ps).
    long = path.startswith("pickled:")
    command = [sys.executable, "-m", module, "--check=-" if long else f"--check={path}"]
    for tries_left in reversed(range(CHECK_TRIES)):
        try:
            done = subprocess.run(
                command,
                input=path.encode() if long else b"",
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=launch.variables(environment or {}),
                start_new_session=True,
                timeout=CHECK_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TrialStartError(f"objective {path!r} took longer than {CHECK_TIMEOUT_S:.0f} s to import") from None
        if done.returncode == 0:
            return
        if tries_left and done.returncode in FROM_OUTSIDE:
            continue
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"objective {path!r} cannot be imported: {describe_status(done.returncode)}"
        raise TrialStartError(line(why), done.returncode)


async def why_not_imported(path: str, module: str) -> Json:
    """(On a Dask worker, whose loop goes on meanwhile.) `check_objective` there: {"problem": why not, or None}."""
    try:
        await asyncio.to_thread(check_objective, path, module=module)
    except TrialStartError as error:
        return {"problem": str(error)}
    return {"problem": None}
