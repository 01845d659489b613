"""Dataclasses as JSON and back: every declared type, and nothing but BadMessage for whatever else comes in."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.fields import BadMessage, read, write
from tests.test_seams import ANYTHING


class Level(enum.IntEnum):
    """A state that travels by its number."""

    LOW = 0
    HIGH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A dataclass in another."""

    word: str


@dataclass(frozen=True, slots=True, kw_only=True)
class All:
    """A field of each type that can be read."""

    whole: int
    number: float = 0.5
    truth: bool = False
    level: Level = Level.LOW
    maybe: int | None = None
    inner: Inner | None = None
    several: tuple[str, ...] = ()
    pair: tuple[str, float] = ("a", 1.0)
    named: Mapping[str, float] = field(default_factory=dict)
    free: Any = None


EACH = All(
    whole=2**63 - 1,
    number=float("inf"),
    truth=True,
    level=Level.HIGH,
    maybe=1,
    inner=Inner(word="w"),
    several=("x", "y"),
    pair=("b", 2.0),
    named={"k": 0.1},
    free=[{"any": None}],
)


@pytest.mark.parametrize("value", [EACH, All(whole=0)])
def test_what_is_written_is_read_again(value: All) -> None:
    """Through JSON text and back nothing has changed; what is not said has its default."""
    assert read(All, json.loads(json.dumps(write(value)))) == value
    assert read(All, {"whole": 1, "unknown": 2}) == All(whole=1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([], "All: [] is no mapping"),
        ({}, "All.whole is missing"),
        ({"whole": True}, "All.whole: True is no whole number of 64 bits"),
        ({"whole": 2**63}, "is no whole number of 64 bits"),
        ({"whole": 1, "number": "1"}, "All.number: '1' is no number"),
        ({"whole": 1, "truth": 1}, "All.truth: 1 is no truth value"),
        ({"whole": 1, "level": 7}, "All.level: 7 is no Level"),
        ({"whole": 1, "maybe": "x"}, "All.maybe: 'x' is no whole number"),
        ({"whole": 1, "inner": {"word": 1}}, "Inner.word: 1 is no text"),
        ({"whole": 1, "several": "ab"}, "All.several: 'ab' is no list"),
        ({"whole": 1, "pair": ["a"]}, "is no list of 2"),
        ({"whole": 1, "named": {"k": None}}, "All.named['k']: None is no number"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(data: Any, why: str) -> None:
    """The line says which field, what was seen and what it should be."""
    with pytest.raises(BadMessage) as refused:
        read(All, data)
    assert why in str(refused.value)


@given(st.dictionaries(st.sampled_from([*All.__dataclass_fields__]), ANYTHING) | ANYTHING)
def test_nothing_else_is_raised(data: Any) -> None:
    """Whatever comes in is a message or a BadMessage of one line."""
    said = ""
    try:
        read(All, data)
    except BadMessage as error:
        said = str(error)
    assert "\n" not in said
