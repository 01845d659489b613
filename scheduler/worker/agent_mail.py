"""The agent's mail: its letters to the driver, the driver's to it, and the Dask workers that carry them.

Covers the agent's socket, who carries letters now (any worker of this driver on this host may), carrying them again,
and what a carrier says for itself. A carrier that is stuck holds up nobody: it has a thread of its own. What the
letters say is the agent's business.
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from scheduler.host.agent_folder import Connection
from scheduler.model import Json, frames, letters
from scheduler.model.fields import BadMessage
from scheduler.model.mailbox import Inbox, Outbox

PER_FRAME = 100  # letters
AGAIN_AFTER_S = 5.0  # unacknowledged letters are carried again
TOGETHER_S = 0.05  # so long what nobody waits for may lie: a short trial's start, reports and end are then one frame


@dataclass(slots=True, kw_only=True)
class _Carrier:
    """A connected Dask worker. sent: the last letter that was handed to it; the rest is what it is still owed."""

    connection: Connection
    greeted: bool = False
    owner: bool = False
    sent: int = 0
    owed_receipt: bool = False
    news: letters.Vitals | None = None
    closed: bool = False


class Mail:
    """Serves an agent's socket from threads of its own.

    hello: what the driver must know to take this agent for one. on_letter: takes what the driver says, in order.
    on_carrier: takes what a carrier says for itself. on_heard: called at each sign of life of the
    driver.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        agent: str,
        hello: frames.Hello,
        on_letter: Callable[[Json], None],
        on_carrier: Callable[[frames.Leave | frames.Discharge], None],
        on_heard: Callable[[], None],
    ) -> None:
        self._listener, self._agent, self._hello = listener, agent, hello
        self._on_letter, self._on_carrier, self._on_heard = on_letter, on_carrier, on_heard
        self._outbox, self._inbox = Outbox(), Inbox()
        self._carriers: list[_Carrier] = []
        self._changed = threading.Condition()
        self._reading = threading.Lock()  # letters are read in order, whoever brings them
        self._moved_at = time.monotonic()  # the last acknowledgement that was news, or the last time all was said again
        self._due = math.inf  # when what lies here is to be carried

    def start(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), name="headroom-mail", daemon=True).start()

    def listen(self, listener: socket.socket) -> None:
        """Take carriers by another socket from now on; those that are connected stay."""
        former, self._listener = self._listener, listener
        with contextlib.suppress(OSError):
            former.shutdown(socket.SHUT_RDWR)  # or the thread in `accept` would never know
        former.close()
        self.start()

    # -- the agent's side -------------------------------------------------------------------------------------------

    def post(self, report: letters.Report) -> None:
        """Post a letter to the driver: kept until it has it, some only until thousands of letters wait."""
        with self._changed:
            if not self._outbox:
                self._moved_at = time.monotonic()
            self._outbox.post(letters.to_json(report), droppable=letters.is_droppable(report))
            self._carry(TOGETHER_S if letters.may_lie(report) else 0.0)

    def news(self, vitals: letters.Vitals) -> None:
        """Something of the moment, kept until the next: whoever misses it misses nothing."""
        with self._changed:
            for carrier in self._carriers:
                carrier.news = vitals
            self._carry()

    @property
    def has_carrier(self) -> bool:
        with self._changed:
            return any(carrier.greeted for carrier in self._carriers)

    @property
    def unread(self) -> int:
        """Letters that the driver has not acknowledged."""
        with self._changed:
            return len(self._outbox)

    def close(self, why: str, *, for_good: bool) -> None:
        """Say goodbye and stop. for_good: the driver is gone, nobody is to take this agent's place."""
        with self._changed:
            carriers, self._carriers = self._carriers, []
            for carrier in carriers:
                carrier.closed = True
            self._changed.notify_all()
        for carrier in carriers:
            with contextlib.suppress(OSError):
                carrier.connection.send(frames.to_json(frames.Bye(agent=self._agent, reason=why, for_good=for_good)))
            carrier.connection.close()
        with contextlib.suppress(OSError):
            self._listener.close()

    # -- threads ----------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:
                return
            carrier = _Carrier(connection=Connection(connected))
            with self._changed:
                self._carriers.append(carrier)
            for work in (self._read, self._write):
                threading.Thread(target=work, args=(carrier,), name="headroom-carrier", daemon=True).start()

    def _read(self, carrier: _Carrier) -> None:
        refused = ""
        for data, _ in carrier.connection.frames():
            try:
                frame = frames.to_agent(data)
            except BadMessage as error:
                if str(error) != refused:
                    refused = str(error)
                    print(f"a frame is dropped: {error}", file=sys.stderr, flush=True)
                continue
            match frame:
                case frames.Carrier(owner=owner):
                    self._greet(carrier, owner)
                case frames.Mail():
                    self._take(frame)
                case frames.Leave() | frames.Discharge():
                    self._on_carrier(frame)
        self._drop(carrier)

    def _greet(self, carrier: _Carrier, owner: bool) -> None:
        """Have it carry from now on, and all said again that is not acknowledged: nobody knows what became of that."""
        with self._changed:
            carrier.greeted = carrier.owed_receipt = True
            carrier.owner, carrier.sent = owner, 0
            if carrier in self._carriers:
                self._carriers.remove(carrier)
                self._carriers.append(carrier)
            self._carry()

    def _take(self, mail: frames.Mail) -> None:
        self._on_heard()
        with self._reading:
            with self._changed:
                self._acknowledged(mail.heard)
                bodies = [body for letter in mail.letters for body in self._inbox.take(letter)]
                if mail.letters and (current := self._current()) is not None:
                    current.owed_receipt = True
                    self._carry(TOGETHER_S)
            for body in bodies:
                try:
                    self._on_letter(body)
                except Exception:  # whatever one letter runs into: the next ones must be read
                    traceback.print_exc()

    def _acknowledged(self, number: int) -> None:
        before = len(self._outbox)
        self._outbox.acknowledged(number)
        now = time.monotonic()
        if len(self._outbox) != before or not self._outbox:
            self._moved_at = now
        elif now - self._moved_at > AGAIN_AFTER_S and (current := self._current()) is not None:
            self._moved_at, current.sent = now, 0
            self._carry()

    def _carry(self, within_s: float = 0.0) -> None:
        """Have whoever carries now look at what it is owed, at once or a little later with what comes meanwhile."""
        self._due = min(self._due, time.monotonic() + within_s)
        self._changed.notify_all()

    def _write(self, carrier: _Carrier) -> None:
        while True:
            with self._changed:
                while not carrier.closed:
                    wait_s = self._due - time.monotonic()
                    if wait_s <= 0 and (frame := self._owed(carrier)) is not None:
                        break
                    self._changed.wait(wait_s if 0 < wait_s < math.inf else None)
                if carrier.closed:
                    return
            try:
                assert frame is not None
                carrier.connection.send(frames.to_json(frame))
            except OSError:
                self._drop(carrier)
                return

    def _owed(self, carrier: _Carrier) -> frames.FromAgent | None:
        """Return what this carrier is to be handed now; None when nothing."""
        if carrier is not self._current():
            return None
        waiting = [letter for letter in self._outbox.waiting() if letter.number > carrier.sent]
        owed = waiting[:PER_FRAME]
        if len(owed) == len(waiting):
            self._due = math.inf
        if not (owed or carrier.news or carrier.owed_receipt):
            return None
        if owed:
            carrier.sent = owed[-1].number
        news, carrier.owed_receipt, carrier.news = carrier.news, False, None
        return frames.FromAgent(
            agent=self._agent,
            hello=self._hello,
            heard=self._inbox.heard,
            letters=tuple(owed),
            news=None if news is None else letters.to_json(news),
        )

    def _current(self) -> _Carrier | None:
        """Return the worker that has this agent for its own, else the last that came."""
        greeted = [carrier for carrier in self._carriers if carrier.greeted]
        return next((carrier for carrier in reversed(greeted) if carrier.owner), greeted[-1] if greeted else None)

    def _drop(self, carrier: _Carrier) -> None:
        carrier.connection.close()
        with self._changed:
            was_current = carrier is self._current()
            carrier.closed = True
            if carrier in self._carriers:
                self._carriers.remove(carrier)
            if was_current and (current := self._current()) is not None:
                current.sent, current.owed_receipt = 0, True  # the driver must hear which way it goes now
            self._carry()
