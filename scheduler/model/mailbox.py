"""Letters between the driver and an agent: each is read once and in order, whatever becomes of what carries them.

Pure. A letter is numbered when it is posted and kept until the other side has acknowledged its number; whoever carries
letters may lose, repeat or reorder them. Both directions use the same two halves. What a letter says, and when one is
carried again, is not decided here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.fields import BadMessage, shown
from scheduler.model.study import Json

KEPT = 20_000  # unacknowledged letters; some 10 MB of an agent's memory


@dataclass(frozen=True, slots=True)
class Letter:
    """One letter on its way. `after`: the reader must have read up to this number before it; what lies between the two
    was dropped by the sender and is not waited for."""

    number: int
    after: int
    body: Json

    def to_json(self) -> list[Any]:
        return [self.number, self.after, self.body]

    @classmethod
    def from_json(cls, data: Any) -> Letter:
        """Read what `to_json` made. Raises BadMessage on anything else."""
        match data:
            case [int(number), int(after), dict(body)]:
                return cls(number, after, body)
        raise BadMessage(f"no letter: {shown(data)}")


@dataclass(slots=True, kw_only=True)
class Outbox:
    """What was posted and is not yet acknowledged, numbered from 1.

    limit: how many letters are kept. Past it the oldest that may be dropped goes; the others stay, however many.
    """

    limit: int = KEPT
    dropped: int = 0
    last: int = 0  # the number given last
    _read: int = 0  # acknowledged up to here
    _kept: deque[tuple[int, Json, bool]] = field(default_factory=deque)

    def post(self, body: Json, *, droppable: bool = False) -> Letter:
        """Keep a letter until it is acknowledged; returns it as it is to be carried."""
        after = self._kept[-1][0] if self._kept else self._read
        self.last += 1
        self._kept.append((self.last, body, droppable))
        if len(self._kept) > self.limit:
            self._drop_one()
        return Letter(self.last, after, body)

    def acknowledged(self, number: int) -> None:
        """Forget every letter up to this one: the other side has read them."""
        self._read = max(self._read, min(number, self.last))
        while self._kept and self._kept[0][0] <= self._read:
            self._kept.popleft()

    def waiting(self) -> list[Letter]:
        """Every letter that is not acknowledged, in order."""
        after, found = self._read, []
        for number, body, _ in self._kept:
            found.append(Letter(number, after, body))
            after = number
        return found

    def __len__(self) -> int:
        return len(self._kept)

    def _drop_one(self) -> None:
        for index, (_, _, droppable) in enumerate(self._kept):
            if droppable:
                del self._kept[index]
                self.dropped += 1
                return


@dataclass(slots=True, kw_only=True)
class Inbox:
    """What came from one sender. heard: the number of the last letter that was read, which is what is acknowledged."""

    heard: int = 0
    _early: dict[int, Letter] = field(default_factory=dict)

    def take(self, letter: Letter) -> list[Json]:
        """Return what can be read now, in order: nothing for a letter that came before or comes too early."""
        known = self._early.get(letter.number)
        # The same letter again after one before it was dropped: what it waits for can only have become less.
        if letter.number > self.heard and (known is None or letter.after < known.after):
            self._early[letter.number] = letter
        ready = []
        while (found := self._next()) is not None:
            self.heard = found.number
            ready.append(found.body)
        if ready:
            self._early = {number: early for number, early in self._early.items() if number > self.heard}
        return ready

    def _next(self) -> Letter | None:
        readable = [n for n, letter in self._early.items() if letter.after <= self.heard < n]
        return self._early[min(readable)] if readable else None
