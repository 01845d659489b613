"""What the user sees while a batch runs: a live view on a terminal, plain lines without one; both on stderr.

Shows a `Snapshot` (drawn by `picture`), what happened, and log lines; decides nothing and asks nobody. Results are
`report`'s, single keys are `keys`'.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from scheduler.model.journal_events import JournalEvent
from scheduler.ui import picture
from scheduler.ui.in_place import InPlace, Stray
from scheduler.ui.keys import KeyReader
from scheduler.ui.snapshot import Happening, Snapshot
from scheduler.units import duration, gib

PLAIN_EVERY_S = 60.0  # without a terminal: a line a minute, and one whenever a trial has ended
REDRAW_S = 0.5  # on a terminal; a picture takes some 10 ms
OnQuit = Callable[[str], None]


class View:
    """Plain lines. Thread-safe; a context manager around the run.

    on_quit("key q") is called from another thread for each `q` the user presses.
    shows: events of which the view itself tells, so that no log line has to.
    """

    shows: frozenset[JournalEvent] = frozenset()

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock, self._unix = clock, unix
        self._lock = threading.Lock()
        self._last_at: float | None = None
        self._last_done = -1
        self._keys: KeyReader | None = None

    def start(self, on_quit: OnQuit | None = None) -> None:
        """Begin; reads keys where standard input is a terminal."""
        if on_quit is not None:

            def pressed(key: str) -> None:
                if key in "qQ":
                    self.asked_to_quit()
                    on_quit("key q")

            self._keys = KeyReader(pressed)
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

    def happened(self, what: Happening) -> None:
        """Tell of a kill, since it must be found among hundreds of lines; of anything else a log line tells."""
        if what.tone == "bad":
            self.line(f"{picture.clock(what.unix)} {what.text}")

    def asked_to_quit(self) -> None:
        """Answer the key at once: what follows may take its time."""
        self.line(f"{picture.clock(self._unix())} q: stopping; q again stops at once")

    def update(self, snapshot: Snapshot) -> None:
        """Show the batch's state, as often as one likes."""
        now = self._clock()
        due = self._last_at is None or snapshot.done != self._last_done or now - self._last_at >= PLAIN_EVERY_S
        if due:
            self._last_at, self._last_done = now, snapshot.done
            self.line(f"{picture.clock(self._unix())} {plain(snapshot)}")

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class LiveView(View):
    """The same on a terminal: what happened scrolls above a picture that is drawn in place."""

    shows = frozenset({JournalEvent.ATTEMPT_LAUNCHED, JournalEvent.ATTEMPT_ENDED, JournalEvent.STUDY_CLOSED})

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True)
        self._glyphs = picture.UNICODE if "utf" in self._console.encoding.lower() else picture.ASCII
        self._place: InPlace | None = None
        self._stray: Stray | None = None
        self._snapshot = Snapshot(run="")
        self._taken_at = self._clock()
        self._asked = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, on_quit: OnQuit | None = None) -> None:
        super().start(on_quit)
        # Drawn by a thread of our own, so that a key is answered although the driver is busy; stdout is left alone for
        # the results.
        self._place = InPlace(self._console)
        self._stray = Stray(sys.stderr, self.line)
        sys.stderr = self._stray
        self._thread = threading.Thread(target=self._redraw, args=(self._place,), name="terminal", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        place, self._place = self._place, None
        self._wake.set()
        try:
            if self._thread is not None:
                self._thread.join(timeout=5)
            if self._stray is not None:
                sys.stderr, stray, self._stray = self._stray.rich_proxied_file, self._stray, None
                stray.finish()
            if place is not None:
                with contextlib.suppress(OSError, ValueError):
                    place.leave()
        finally:
            super().stop()

    def line(self, text: str) -> None:
        self._above(text, "")

    def happened(self, what: Happening) -> None:
        self._above(f"{picture.clock(what.unix)} {what.text}", picture.STYLES[what.tone])

    def asked_to_quit(self) -> None:
        self._asked += 1
        self._wake.set()

    def update(self, snapshot: Snapshot) -> None:
        self._snapshot, self._taken_at = snapshot, self._clock()
        self._wake.set()

    def _redraw(self, place: InPlace) -> None:
        while self._place is place:
            with contextlib.suppress(OSError, ValueError):  # a window that was closed: the batch drains
                place.draw(self._picture())
            self._wake.wait(REDRAW_S)
            self._wake.clear()

    def _picture(self) -> RenderableType:
        shot, size = self._snapshot, self._console.size
        note = ""
        if self._asked and not shot.draining:
            note = "q: stopping; running trials checkpoint and leave; q again stops at once"
        elif self._asked > 1:
            note = "q q: stopping at once"
        return picture.draw(shot, size.width, size.height, glyphs=self._glyphs, note=note, unix=self._unix())

    def _above(self, text: str, style: str) -> None:
        """Fold it ourselves: a line that the terminal wraps is drawn over when its window changes."""
        width = max(20, self._console.width - 1)
        parts = [each for part in text.splitlines() or [""] for each in picture.fold(part, width)]
        lines = [Text(self._plain(part), style=style, no_wrap=True, overflow="ignore") for part in parts]
        with contextlib.suppress(OSError, ValueError):  # a window that was closed: the batch drains
            if (place := self._place) is not None:
                place.above(lines)
            else:
                self._console.print(*lines, sep="\n")

    def _plain(self, text: str) -> str:
        """Return what the terminal's encoding can show of it."""
        if self._glyphs is picture.UNICODE:
            return text
        return text.encode(self._console.encoding, "replace").decode(self._console.encoding, "replace")


def choose(stream: TextIO | None = None) -> View:
    """Choose the live view where stderr is a terminal that can draw, else plain lines."""
    console = Console(file=stream, stderr=stream is None, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console)
    return View(stream)


def plain(snapshot: Snapshot) -> str:
    """Tell the batch in one line."""
    eta = snapshot.eta
    ends = f", ends {picture.about(eta)}{picture.span(eta)}" if eta and snapshot.done < snapshot.quota else ""
    waiting = next((f" waiting: {s.name}: {s.waiting}" for s in snapshot.studies if s.waiting), "")
    return (
        f"{duration(snapshot.elapsed_s)} {snapshot.done}/{snapshot.quota} trials done, "
        f"{len(snapshot.trials)} running, memory {gib(snapshot.reserved_bytes)} reserved of "
        f"{gib(snapshot.capacity_bytes)}, {gib(snapshot.used_bytes)} used{ends}"
        f"{', draining' if snapshot.draining else ''}{waiting}"
    )
