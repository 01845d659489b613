"""The journal's vocabulary: spelt in one file, used, written in the docs."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from scheduler.driver.journal import Journal, read
from scheduler.model.journal_events import JournalEvent, table

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for path in sorted((ROOT / "scheduler").rglob("*.py")) if path.name != "journal_events.py"]


def test_the_readme_says_what_each_event_is() -> None:
    """The table is the one that the file gives, row by row."""
    section = (ROOT / "scheduler" / "README.md").read_text().split("## The journal\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == table()


def test_each_event_is_written_somewhere_and_spelt_nowhere_else() -> None:
    """A name that nobody writes leaves the list; one that is not in it cannot be written."""
    used, spelt = set(), {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "JournalEvent":
                used.add(node.attr)
            if isinstance(node, ast.Constant) and node.value in set(JournalEvent):
                spelt[str(path.relative_to(ROOT))] = node.value
    assert used == {event.name for event in JournalEvent}
    assert spelt == {}


def test_an_event_is_its_name_in_the_journal(tmp_path: Path) -> None:
    """Whoever reads the file by a text editor, jq or a script sees the dotted name."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write(JournalEvent.TRIAL_TOLD, trial="s/0")
    journal.close()
    assert json.loads((tmp_path / "journal.jsonl").read_text())["event"] == "trial.told"
    assert next(read(tmp_path / "journal.jsonl"))["event"] == JournalEvent.TRIAL_TOLD
