"""Hyperparameters as coordinates: what a regression of peaks on an arbitrary objective's parameters sees.

Covers ranges (logarithms where the distribution or the range asks for it), choices, and parameters that only some
branches ask for. Whether a range holds integers does not matter for memory and is not kept. Pure.
"""

from __future__ import annotations

import math
from typing import TypeGuard

from scheduler.model.parameters import Choice, Distribution, Parameters, Range, Space, Value

# A range over more than this is powers of something, whether its author said so or not: rows from 500 to 20,000.
LOG_FROM_RATIO = 16.0
# A range may change while a study runs. A value this far outside of the first one is as far as it gets: a coordinate
# of thousands would drown all others.
FARTHEST = 3.0
# Options that are numbers are a range from this many on (a batch of 16, 32, 64 or 128); two are a switch.
NUMBERS_FROM = 3


def as_range(distribution: Distribution) -> Range | None:
    """Return the range a parameter lies on; None where its options have no order."""
    if isinstance(distribution, Range):
        return distribution
    numbers = [option for option in distribution.options if is_number(option)]
    if len(numbers) < NUMBERS_FROM or len(numbers) < len(distribution.options):
        return None
    return Range(low=min(numbers), high=max(numbers))


def is_number(value: Value) -> TypeGuard[float]:
    """Tell whether it is a finite number; True and False are words."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Axis:
    """One parameter's coordinates.

    A range has its value, from -1 to 1; a choice has one coordinate an option, all options equally far apart. One
    more says that it is absent, at 0 of the others: between the largest and the smallest, belonging to neither.
    """

    __slots__ = ("_high", "_log", "_low", "_options", "width")

    def __init__(self, distribution: Distribution) -> None:
        found = as_range(distribution)
        self._options = distribution.options if isinstance(distribution, Choice) and found is None else ()
        self._low, self._high, self._log = 0.0, 0.0, False
        if found is not None:
            self._log = found.low > 0 and (found.log or found.high / found.low >= LOG_FROM_RATIO)
            self._low, self._high = self._scaled(found.low), self._scaled(found.high)
        self.width = 1 + (len(self._options) or 1)

    def coordinates(self, present: bool, value: Value) -> list[float]:
        """`width` numbers."""
        if not present:
            return [0.0] * (self.width - 1) + [1.0]
        if self._options:
            # Corners of a regular simplex around 0, their squared distance 2. What is none of the options (they may
            # not change, but a study can be old) is in the middle.
            count, known = len(self._options), value in self._options
            at = self._options.index(value) if known else -1
            return [(i == at) - known / count for i in range(count)] + [0.0]
        if not is_number(value) or self._high <= self._low:
            return [0.0, 0.0]
        position = 2 * (self._scaled(value) - self._low) / (self._high - self._low) - 1
        return [max(-FARTHEST, min(FARTHEST, position)), 0.0]

    def _scaled(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self._log else float(value)


class Embedding:
    """The parameters known so far, in the order in which they were first seen; it grows with the branches taken."""

    def __init__(self) -> None:
        self._axes: dict[str, Axis] = {}
        self._taken: dict[str, set[Value]] = {}
        self.owners: list[int] = []
        """coordinate -> number of its parameter"""

    def __len__(self) -> int:
        """How many parameters it knows."""
        return len(self._axes)

    def learn(self, parameters: Parameters, space: Space) -> list[float]:
        """Know these from now on, and give the coordinates that earlier points get for what is new: absent.

        The first distribution seen of a parameter sets its scale for good.
        """
        absent: list[float] = []
        for name in sorted(parameters):  # a study read back gives them in another order
            if name not in space:
                continue
            if name not in self._axes:
                axis = self._axes[name] = Axis(space[name])
                self.owners += [len(self._axes) - 1] * axis.width
                absent += axis.coordinates(False, None)
            if isinstance(space[name], Choice):
                self._taken.setdefault(name, set()).add(parameters[name])
        return absent

    def point(self, parameters: Parameters) -> list[float]:
        """Coordinates of a trial, as many as `owners`; parameters not known are left out."""
        return [
            coordinate
            for name, axis in self._axes.items()
            for coordinate in axis.coordinates(name in parameters, parameters.get(name))
        ]

    def is_new(self, parameters: Parameters, space: Space) -> bool:
        """Whether the trial asks for a parameter, or takes an option, that none before it did: a branch never run."""
        return any(
            name not in self._axes or (name in self._taken and value not in self._taken[name])
            for name, value in parameters.items()
            if name in space
        )
