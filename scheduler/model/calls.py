"""What a trial asks its study while it runs, and the answer: both pass the brain by, which has nothing to decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scheduler.model.ids import AttemptId
from scheduler.model.study import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStudy:
    """number: of the answer that is waited for, 0 for none."""

    attempt: AttemptId
    method: str
    number: int
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """body: {"value": ...} or {"error": text, "kind": class}."""

    attempt: AttemptId
    number: int
    body: Json
