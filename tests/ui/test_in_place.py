"""The picture at the foot of the terminal: only what changed is written, and what scrolls by above it stays."""

from __future__ import annotations

import io
import random

import pyte
import pytest
from rich.console import Console, Group
from rich.text import Text

from scheduler.ui.in_place import InPlace, Stray

COLUMNS, LINES = 40, 12


class Screen(io.StringIO):
    """A terminal, by an emulator."""

    def __init__(self) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(COLUMNS, LINES, history=5000)
        self._stream = pyte.Stream(self.screen)
        self.sent = ""

    def write(self, text: str) -> int:
        self._stream.feed(text)
        self.sent += text
        return len(text)

    def lines(self) -> list[str]:
        """All that scrolled away and all that is shown, without what is empty at the end."""
        top = ["".join(row[x].data for x in range(COLUMNS)) for row in self.screen.history.top]
        found = [line.rstrip() for line in [*top, *self.screen.display]]
        while found and not found[-1]:
            found.pop()
        return found


def made(screen: Screen) -> InPlace:
    """A picture's place on that terminal."""
    return InPlace(Console(file=screen, force_terminal=True, width=COLUMNS, height=LINES, color_system="256"))


def picture(rows: list[str]) -> Group:
    """Some lines, in colour."""
    return Group(*(Text(row, style="red") for row in rows))


@pytest.mark.parametrize("seed", range(20))
def test_after_any_drawing_the_screen_shows_what_was_told_and_the_last_picture(seed: int) -> None:
    """Pictures that grow, shrink and change here and there, and lines that pass above them."""
    chance, screen, told = random.Random(seed), Screen(), list[str]()
    place, rows = made(screen), list[str]()
    for _ in range(60):
        if chance.random() < 0.3:
            new = [f"told {len(told) + n}" for n in range(chance.randint(1, 15))]
            told += new
            place.above([Text(line) for line in new])
        else:
            wanted = chance.randint(1, LINES - 1)
            rows = [*rows, *(f"row {n}" for n in range(len(rows), wanted))][:wanted]
            rows = [f"{row.split(':')[0]}: {chance.random():.3f}" if chance.random() < 0.3 else row for row in rows]
            place.draw(picture(rows))
        assert screen.lines() == told + rows
    place.leave()
    assert screen.lines() == told
    assert screen.sent.count("\x1b[?25l") == screen.sent.count("\x1b[?25h") == 1


def test_a_picture_that_has_not_changed_costs_next_to_nothing() -> None:
    """A second time nothing is written but where the cursor is; one line that changed is one line."""
    screen = Screen()
    place, rows = made(screen), ["x" * 30] * (LINES - 1)
    place.draw(picture(rows))
    screen.sent = ""
    place.draw(picture(rows))
    assert len(screen.sent) <= 1
    place.draw(picture([*rows[:-1], "y"]))
    assert screen.lines()[-1] == "y"
    assert len(screen.sent) < 60
    assert "\x1b[2" not in screen.sent


def test_what_is_higher_than_the_terminal_is_left_out() -> None:
    """Else it could not be drawn over: each refresh would leave a copy behind."""
    screen = Screen()
    place = made(screen)
    for number in range(3):
        place.draw(picture([f"{number} {row}" for row in range(30)]))
    assert screen.lines() == [f"2 {row}" for row in range(LINES - 1)]


def test_what_others_print_is_told_line_by_line() -> None:
    """A library's warning passes above the picture; half a line waits for its end."""
    told: list[str] = []
    stream = io.StringIO()
    stray = Stray(stream, told.append)
    print("one\ntwo", file=stray)
    print("half", end="", file=stray)
    assert told == ["one", "two"]
    stray.finish()
    assert told == ["one", "two", "half"]
    assert stream.getvalue() == ""
