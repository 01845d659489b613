"""Letters over a carrier that loses, repeats and reorders them are read once and in order."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.mailbox import Inbox, Letter, Outbox


def body(n: int) -> dict[str, int]:
    """A letter that says its number."""
    return {"n": n}


@given(seed=st.integers(0, 2**32), count=st.integers(0, 30), loss=st.floats(0, 0.9))
def test_each_letter_is_read_once_and_in_order(seed: int, count: int, loss: float) -> None:
    """Whatever the carrier loses, repeats or swaps, carrying again what is not acknowledged gets all across."""
    rng = random.Random(seed)
    outbox, inbox = Outbox(), Inbox()
    read: list[int] = []
    posted = 0
    while len(read) < count:
        if posted < count and rng.random() < 0.5:
            outbox.post(body(posted := posted + 1))
        on_the_way = [
            letter for letter in outbox.waiting() if rng.random() > loss for _ in range(rng.choice((1, 1, 2)))
        ]
        rng.shuffle(on_the_way)
        for letter in on_the_way:
            read += [each["n"] for each in inbox.take(letter)]
        if rng.random() > loss:
            outbox.acknowledged(inbox.heard)
    assert read == list(range(1, count + 1))


@given(
    limit=st.integers(1, 8),
    letters=st.lists(st.booleans(), max_size=40),
    carried=st.sets(st.integers(1, 40)),
)
def test_a_full_box_drops_the_oldest_that_may_go_and_nothing_else(
    limit: int, letters: list[bool], carried: set[int]
) -> None:
    """What must arrive arrives although others were dropped in between, some of them already on their way."""
    outbox, inbox, read = Outbox(limit=limit), Inbox(), []
    for number, droppable in enumerate(letters, 1):
        letter = outbox.post(body(number), droppable=droppable)
        if number in carried:
            read += [each["n"] for each in inbox.take(letter)]
    assert len(outbox) <= max(limit, letters.count(False))
    for letter in outbox.waiting():
        read += [each["n"] for each in inbox.take(letter)]
    outbox.acknowledged(inbox.heard)
    assert len(outbox) == 0
    assert read == sorted(set(read))
    assert set(read) >= {number for number, droppable in enumerate(letters, 1) if not droppable}
    assert len(read) + outbox.dropped >= len(letters)


def test_a_letter_survives_json_and_nonsense_is_refused() -> None:
    """What is carried as text is the same letter again; anything else raises instead of being read as one."""
    letter = Letter(3, 1, {"type": "ended"})
    assert Letter.from_json(json.loads(json.dumps(letter.to_json()))) == letter
    for bad in ([1, 2], ["1", 0, {}], [1, 0, "text"], [1, 0, {}, 4]):
        with pytest.raises((TypeError, ValueError)):
            Letter.from_json(bad)


def test_an_acknowledgement_of_what_was_never_posted_is_capped() -> None:
    """A number from another life of the sender cannot swallow letters to come."""
    outbox = Outbox()
    outbox.post(body(1))
    outbox.acknowledged(99)
    outbox.post(body(2))
    assert [letter.number for letter in outbox.waiting()] == [2]
