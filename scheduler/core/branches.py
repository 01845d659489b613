"""What a study's trials have asked for, in order: what the next one will ask, as far as that can be known.

A tree of questions. Under each stands what was asked next, and by whom: where all asked the same the answer does not
matter; where they did not, a parameter whose values tell them apart does (`n_layers`, say, in a loop over layers), and
one with a value that nobody had before leaves it open. Numbers on a continuous scale tell nobody apart. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.model.parameters import Value


class Question(NamedTuple):
    """One suggest. distribution: as text, by which two are told apart. is_discrete: its values can be counted."""

    name: str
    distribution: str
    is_discrete: bool


Answered = tuple[Question, Value]


@dataclass(slots=True)
class _Node:
    """After the same questions. seen: of each discrete parameter before, value -> what its trials asked next."""

    followers: dict[Question | None, _Node] = field(default_factory=dict)
    seen: dict[str, dict[Value, set[Question | None]]] = field(default_factory=dict)


class Branches:
    """All that the trials of one study have asked."""

    def __init__(self) -> None:
        self._root = _Node()

    def learn(self, asked: Sequence[Answered], *, whole: bool) -> None:
        """Take in what a trial asked. whole: it came to its end, so that it is known what it did not ask any more."""
        node = self._root
        for position, (question, _) in enumerate(asked):
            node = self._follow(node, asked[:position], question)
        if whole:
            self._follow(node, asked, None)

    @staticmethod
    def _follow(node: _Node, before: Sequence[Answered], question: Question | None) -> _Node:
        for earlier, value in before:
            if earlier.is_discrete:
                node.seen.setdefault(earlier.name, {}).setdefault(_key(value), set()).add(question)
        return node.followers.setdefault(question, _Node())

    def next(self, asked: Sequence[Answered]) -> Question | None:
        """Return what a trial that has asked this will ask next; None when that is nothing, or not known."""
        node = self._root
        for question, _ in asked:
            if (found := node.followers.get(question)) is None:
                return None
            node = found
        if len(node.followers) <= 1:
            return next(iter(node.followers), None)
        # Of several that tell apart the one with the fewest values: what was never the same twice always does.
        telling = [
            (len(node.seen[question.name]), -position, question.name, value)
            for position, (question, value) in enumerate(asked)
            if question.name in node.seen and all(len(found) == 1 for found in node.seen[question.name].values())
        ]
        for _, _, name, value in sorted(telling, key=lambda each: each[:2]):
            if (known := node.seen[name].get(_key(value))) is not None:
                return next(iter(known))
        return None


def _key(value: Value) -> Value:
    """Return a key by which True and 1 are two options."""
    return f"bool:{value}" if isinstance(value, bool) else value
