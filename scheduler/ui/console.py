"""What the user sees while a batch runs: a live view on a terminal, plain lines without one; both on stderr.

Draws a `Snapshot` and log lines; decides nothing and asks nobody. Results are `report`'s, single keys are `keys`'.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scheduler.ui.keys import KeyReader
from scheduler.ui.snapshot import Snapshot, StudyLine, TrialLine, WorkerLine
from scheduler.units import duration, gib

PLAIN_EVERY_S = 60.0  # without a terminal: a line a minute, and one whenever a trial has ended
MOST_TRIALS = 12  # rows of running trials that are drawn; the rest is counted
OnQuit = Callable[[str], None]


class View:
    """Plain lines. Thread-safe; a context manager around the run.

    on_quit("key q") is called from another thread for each `q` the user presses.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._lock = threading.Lock()
        self._last_at: float | None = None
        self._last_done = -1
        self._keys: KeyReader | None = None

    def start(self, on_quit: OnQuit | None = None) -> None:
        """Begin; reads keys where standard input is a terminal."""
        if on_quit is not None:
            self._keys = KeyReader(lambda key: on_quit("key q") if key in "qQ" else None)
            self._keys.start()

    def stop(self) -> None:
        """End; the terminal is as it was. May be called more than once."""
        if self._keys is not None:
            self._keys.stop()

    def line(self, text: str) -> None:
        """Show a log line; the sink of `log.configure`."""
        # When the reader of our stderr is gone the batch goes on.
        with self._lock, contextlib.suppress(OSError, ValueError):
            print(text, file=self._stream, flush=True)

    def update(self, snapshot: Snapshot) -> None:
        """Show the batch's state, as often as one likes."""
        now, done = self._clock(), sum(study.done for study in snapshot.studies)
        due = self._last_at is None or done != self._last_done or now - self._last_at >= PLAIN_EVERY_S
        if due:
            self._last_at, self._last_done = now, done
            self.line(plain(snapshot))

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class LiveView(View):
    """The same on a terminal: log lines scroll above tables that are drawn in place."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._snapshot = Snapshot(run="")

    def start(self, on_quit: OnQuit | None = None) -> None:
        super().start(on_quit)
        # Redrawing four times a second costs some 1 % of a core; stdout is left alone for the results.
        self._live = Live(
            get_renderable=lambda: draw(self._snapshot, self._console.height),
            console=self._console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )
        self._live.start()

    def stop(self) -> None:
        live, self._live = self._live, None
        try:
            if live is not None:
                with contextlib.suppress(OSError, ValueError):
                    live.stop()
        finally:
            super().stop()

    def line(self, text: str) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):  # a window that was closed: the batch drains
            self._console.print(Text(text), soft_wrap=True)

    def update(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot


def choose(stream: TextIO | None = None) -> View:
    """Choose the live view where stderr is a terminal that can draw, else plain lines."""
    console = Console(file=stream, stderr=stream is None)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console)
    return View(stream)


# -- drawing ---------------------------------------------------------------------------------------------------------


def plain(snapshot: Snapshot) -> str:
    """Tell the batch in one line."""
    done, quota = sum(s.done for s in snapshot.studies), sum(s.quota for s in snapshot.studies)
    reserved, capacity = sum(w.reserved_bytes for w in snapshot.workers), snapshot.capacity_bytes
    used = sum(w.used_bytes or 0 for w in snapshot.workers)
    waiting = next((f" waiting: {s.name}: {s.waiting}" for s in snapshot.studies if s.waiting), "")
    return (
        f"{duration(snapshot.elapsed_s)} {done}/{quota} trials done, {len(snapshot.trials)} running, "
        f"memory {gib(reserved)} reserved of {gib(capacity)}, {gib(used)} used"
        f"{', draining' if snapshot.draining else ''}{waiting}"
    )


def draw(snapshot: Snapshot, height: int = 40) -> RenderableType:
    """Draw the tables, cut to a terminal of `height` lines."""
    if not snapshot.studies:
        return Text("starting the workers …", style="dim")
    rows = max(3, min(MOST_TRIALS, height - len(snapshot.studies) - len(snapshot.workers) - 12))
    parts: list[RenderableType] = [_studies(snapshot.studies), _workers(snapshot.workers)]
    if snapshot.trials:
        parts.append(_trials(snapshot.trials, rows))
    state = "q: stop"
    if snapshot.draining:
        wait = "" if snapshot.drain_s is None else f", {duration(snapshot.drain_s)} at most"
        state = f"draining: running trials finish their step, checkpoint and leave{wait}; q again stops at once"
    board = f" · dashboard {snapshot.dashboard}" if snapshot.dashboard else ""
    parts.append(Text(f"{snapshot.run} · {duration(snapshot.elapsed_s)} · {state}{board}", style="dim"))
    return Group(*parts)


def _studies(studies: tuple[StudyLine, ...]) -> Table:
    table = _table("study", "done", "running", "best", "waiting")
    for study in studies:
        best = "" if study.best is None else f"{study.best:.4f}"
        note = study.closed or study.waiting or ""
        table.add_row(study.name, f"{study.done}/{study.quota}", str(study.running or ""), best, note)
    return table


def _workers(workers: tuple[WorkerLine, ...]) -> Table:
    table = _table("worker", "capacity", "reserved", "used", "headroom", "slots free", "state")
    for worker in workers:
        state = worker.closed_reason or worker.pressure
        table.add_row(
            worker.host,
            gib(worker.capacity_bytes),
            gib(worker.reserved_bytes),
            "?" if worker.used_bytes is None else gib(worker.used_bytes),
            gib(worker.headroom_bytes),
            f"{worker.free_slots}/{worker.slots}",
            Text(state, style="" if state == "normal" else "yellow"),
        )
    return table


def _trials(trials: tuple[TrialLine, ...], most: int) -> Table:
    table = _table("running", "epoch", "loss", "used", "reserved", "time")
    for trial in trials[:most]:
        over = trial.used_bytes > trial.reserved_bytes
        table.add_row(
            trial.attempt,
            f"{trial.epoch}/{trial.epochs}" if trial.epochs else str(trial.epoch),
            "" if trial.value is None else f"{trial.value:.4f}",
            Text(gib(trial.used_bytes), style="yellow" if over else ""),
            gib(trial.reserved_bytes),
            duration(trial.running_s),
        )
    if len(trials) > most:
        table.add_row(f"and {len(trials) - most} more")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        right = number > 0 and name not in ("waiting", "state")
        table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    return table


__all__ = [
    "LiveView",
    "Snapshot",
    "StudyLine",
    "TrialLine",
    "View",
    "WorkerLine",
    "choose",
    "draw",
    "plain",
]
