"""The diagram of a trial's states in the documentation is the table in the code."""

from __future__ import annotations

import re
from pathlib import Path

from scheduler.core.trial import TRANSITIONS

README = Path(__file__).resolve().parents[2] / "scheduler" / "README.md"


def test_the_drawn_arrows_are_the_legal_ones() -> None:
    """No arrow is drawn that the table has not, and none is left out."""
    drawn = re.search(r"stateDiagram-v2\n(    \[\*\] --> PENDING.*?)```", README.read_text(), re.DOTALL)
    assert drawn is not None
    arrows = set(re.findall(r"([A-Z]+) --> ([A-Z]+):", drawn[1]))
    assert arrows == {(state.name, target.name) for state, targets in TRANSITIONS.items() for target in targets}
