"""Why a trial waits: each reason is given somewhere, and has words for people."""

from __future__ import annotations

import re
from pathlib import Path

from scheduler.model import DeferReason

CORE = Path(__file__).resolve().parents[2] / "scheduler" / "core"


def test_each_reason_is_given_and_has_words_of_its_own() -> None:
    """None is left over, none shows a person its constant, and two never read alike."""
    given = set(re.findall(r"DeferReason\.([A-Z_]+)", "".join(path.read_text() for path in CORE.glob("*.py"))))
    assert given == set(DeferReason.__members__)
    words = [reason.words for reason in DeferReason]
    assert len(set(words)) == len(words) and not any("_" in each for each in words)
