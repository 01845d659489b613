"""Dataclasses as JSON and back: what somebody else wrote is of its declared types, or refused in one line. Pure.

`write` turns a dataclass into JSON types; `read` makes it again from them. Read are whole numbers that 64 bits hold,
numbers, texts, booleans, enums (by value), tuples and mappings of these, and dataclasses of these, one with a
`from_json` of its own by that. Fields that are not known are passed over, so that a newer writer may say more.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from scheduler.model.plain import WIDEST, line, plain

T = TypeVar("T")


class BadMessage(ValueError):
    """No message of the protocol: which field, and the value seen."""


class OtherProtocol(BadMessage):
    """The other side speaks another version of the protocol."""


def finite(value: Any) -> float | None:
    """Return the number as a finite float; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def write(value: Any) -> Any:
    """Return the value as JSON types."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fields_of(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): write(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [write(each) for each in value]
    return value


def fields_of(value: Any) -> dict[str, Any]:
    """Return a dataclass's fields as JSON types, whatever `to_json` it has."""
    return {each.name: write(getattr(value, each.name)) for each in dataclasses.fields(value)}


def read(kind: type[T], data: Any) -> T:
    """Return a dataclass from its JSON form. Raises BadMessage, and nothing else, whatever is handed in."""
    if not isinstance(data, Mapping):
        raise BadMessage(f"{kind.__name__}: {shown(data)} is no mapping")
    given = {}
    for name, hint, needed in _declared(cast("Hashable", kind)):
        if name in data:
            given[name] = _value(hint, data[name], f"{kind.__name__}.{name}")
        elif needed:
            raise BadMessage(f"{kind.__name__}.{name} is missing")
    return kind(**given)


def check_protocol(channel: str, spoken: Any, known: int) -> None:
    """Raise OtherProtocol unless the other side speaks our version of this channel's protocol."""
    if spoken != known or isinstance(spoken, bool):
        raise OtherProtocol(
            f"{channel} speaks protocol {shown(spoken)}, this Headroom {known}: install the same version on both sides"
        )


def shown(value: Any) -> str:
    """Return the value seen, in an error."""
    return line(repr(plain(value)), 80)


@functools.cache
def _declared(kind: Hashable) -> tuple[tuple[str, Any, bool], ...]:
    """(name, type, whether it has no default) of each field."""
    assert isinstance(kind, type) and dataclasses.is_dataclass(kind)
    hints, missing = get_type_hints(kind), dataclasses.MISSING
    return tuple(
        (each.name, hints[each.name], each.default is missing and each.default_factory is missing)
        for each in dataclasses.fields(kind)
    )


def _value(hint: Any, data: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return data
    if origin in (Union, types.UnionType):
        if data is None and type(None) in get_args(hint):
            return None
        (hint,) = (each for each in get_args(hint) if each is not type(None))
        return _value(hint, data, where)
    if origin is tuple:
        return _tuple(get_args(hint), data, where)
    if origin is not None and issubclass(origin, Mapping):
        _require(isinstance(data, Mapping), data, where, "mapping")
        _, inner = get_args(hint)
        return {str(key): _value(inner, each, f"{where}[{shown(key)}]") for key, each in data.items()}
    if hasattr(hint, "from_json"):
        return hint.from_json(data)
    if dataclasses.is_dataclass(hint):
        return read(cast("type[Any]", hint), data)
    return _plain_value(hint, data, where)


def _tuple(inner: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _require(isinstance(data, list | tuple), data, where, "list")
    if inner[-1] is Ellipsis:
        return tuple(_value(inner[0], each, where) for each in data)
    _require(len(data) == len(inner), data, where, f"list of {len(inner)}")
    return tuple(_value(hint, each, where) for hint, each in zip(inner, data, strict=True))


def _plain_value(hint: Any, data: Any, where: str) -> Any:
    if issubclass(hint, enum.Enum):
        try:
            return hint(data)
        except (ValueError, TypeError):
            raise BadMessage(f"{where}: {shown(data)} is no {hint.__name__}") from None
    if hint is float:
        _require(isinstance(data, int | float) and not isinstance(data, bool), data, where, "number")
        _require(isinstance(data, float) or -WIDEST <= data < WIDEST, data, where, "number")
        return float(data)
    if hint is int:
        whole = isinstance(data, int) and not isinstance(data, bool)
        _require(whole and -WIDEST <= data < WIDEST, data, where, "whole number of 64 bits")
    else:
        _require(isinstance(data, hint), data, where, {str: "text", bool: "truth value"}.get(hint, hint.__name__))
    return data


def _require(holds: bool, data: Any, where: str, what: str) -> None:
    if not holds:
        raise BadMessage(f"{where}: {shown(data)} is no {what}")
