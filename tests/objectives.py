"""Training functions as users write them, good and bad: what the trial process must turn into an outcome."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from training.progress import Progress


def good(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Report three epochs and return a mapping."""
    for step in (1, 2, 3):
        progress.tick()
        progress.report(step, 1.0 / step)
    progress.settled()
    return {"value": 0.25, "epochs": 3, "metrics": {"seen": task["params"]}}


def bare_number(task: Mapping[str, Any], progress: Progress) -> float:
    """Return the value alone."""
    return 0.5


def nothing(task: Mapping[str, Any], progress: Progress) -> None:
    """Forget to return."""


def raises(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Raise an ordinary exception."""
    raise RuntimeError("the learning rate\nwas silly")


def exits(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Leave through sys.exit, with the status of success."""
    sys.exit(0)


def interrupts(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Raise KeyboardInterrupt."""
    raise KeyboardInterrupt


def returns_nan(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return NaN."""
    return {"value": float("nan")}


def reports_nan(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Report NaN and would go on."""
    progress.report(1, float("nan"))
    return {"value": 1.0}


def prints(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Write to stdout in all the ways there are, among them what looks like the protocol."""
    print('{"type": "result", "result": {"value": -1}}')
    os.write(1, b'{"type": "error"}\n')
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    return {"value": 0.5}


def floods(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Print for ever, until asked to stop."""
    line = "x" * 1000
    while not progress.stop_requested:
        print(line)
    return {"value": None, "stop_reason": "interrupted"}


def prints_until_it_fails(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Print for ever, deaf to every request: it ends when a print fails."""
    progress.tick()
    while True:
        print("x" * 1000)


def returns_when_asked(task: Mapping[str, Any], progress: Progress) -> Any:
    """Return a value when it is asked to stop."""
    while not progress.stop_requested:
        progress.tick()
        time.sleep(0.01)
    return {"value": 0.5}


def aborts(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Die of SIGABRT."""
    os.abort()


def segfaults(task: Mapping[str, Any], progress: Progress) -> None:
    """Die of SIGSEGV."""
    ctypes.string_at(0)


def reads_stdin(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Read stdin, which must not be the scheduler's."""
    return {"value": 0.5, "metrics": {"stdin": sys.stdin.read()}}


def waits(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Tick until asked to stop; obey."""
    while not progress.stop_requested:
        progress.tick()
        time.sleep(0.01)
    return {"value": None, "stop_reason": {"drain": "interrupted", "prune": "pruned"}[progress.stop_requested]}


def computes(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Compute with torch for ever, and hear no request."""
    import torch

    progress.tick()
    a = torch.ones(200, 200)
    while True:
        a = (a @ a).clamp(max=1.0)


def has_child(task: Mapping[str, Any], progress: Progress) -> None:
    """Start a process of its own, say its pid, and wait for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(task["folder"]) / "child").write_text(str(child.pid))
    progress.tick()
    child.wait()


def has_children(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Start so many that ending them takes a moment, wait for the first, and fail for its death."""
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(200)]
    progress.tick()
    raise RuntimeError(f"a child ended with {children[0].wait()}")


def leaves_thread(task: Mapping[str, Any], progress: Progress) -> float:
    """Return while a thread of its own would keep the process for ever."""
    import threading

    threading.Thread(target=threading.Event().wait).start()
    return 0.5


def uses_pandas_and_talib(task: Mapping[str, Any], progress: Progress) -> float:
    """Use TA-Lib on a pandas Series, as a user may."""
    import pandas
    import talib

    sma: Any = talib.SMA  # declared for NumPy's arrays alone
    return float(sma(pandas.Series([1.0, 2.0, 3.0]), 2).iloc[-1])


def real_and_modules(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Train for real, and tell which large modules that imported."""
    from training import hpo

    result = hpo.objective(task, progress)
    result["metrics"] = {"large": [name for name in ("pandas", "torch._dynamo", "scipy") if name in sys.modules]}
    return result


def leaves_a_daemon(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Start a process that leaves the session and whose parent is gone: it stays below the trial all the same."""
    code = "import os, time; os.fork() and os._exit(0); time.sleep(600)"
    subprocess.run([sys.executable, "-c", code], start_new_session=True, check=True)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {"value": float(len(children)), "metrics": {"children": children}}


def told(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Do what the parameters say: end, fail, or train on until a file is there (`ignore`: whatever is asked)."""
    params = task["params"]
    if params["do"] == "fail":
        raise RuntimeError("not to my taste")
    step = 0
    while params["do"] in ("wait", "ignore") and not os.path.exists(params["until"]):
        if progress.stop_requested and params["do"] == "wait":
            return {"value": 1.0, "epochs": step, "stop_reason": "interrupted"}
        step += 1
        progress.tick()
        time.sleep(0.02)
    return {"value": 0.5, "epochs": step}
