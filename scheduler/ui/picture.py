"""A snapshot as the picture on a terminal: what matters first, as much of the rest as the size allows.

Draws only. No line is longer than the terminal is wide, and the whole is no higher: what does not fit is cut, or
counted. From top to bottom: how far it is and when it ends; memory and hosts; what went wrong last; running trials;
waiting ones; studies; workers. From WIDE columns on, studies and events stand beside the trials.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scheduler.ui.snapshot import Eta, Happening, Snapshot, StudyLine, TrialLine, WaitingLine
from scheduler.units import duration, gib

WIDE = 150
T = TypeVar("T")
STYLES = {"bad": "bold red", "warn": "yellow", "good": "green", "": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """What lines are made of, where the terminal's encoding has it."""

    dot: str = "·"
    cut: str = "…"
    used: str = "█"
    reserved: str = "▒"
    free: str = "░"


UNICODE = Glyphs()
ASCII = Glyphs(dot="-", cut="~", used="#", reserved="=", free=".")


def draw(
    shot: Snapshot, width: int = 120, height: int = 40, *, glyphs: Glyphs = UNICODE, note: str = "", unix: float = 0.0
) -> RenderableType:
    """Draw it into `width` x `height` cells. note: what is said instead of the keys. unix: now, for times of day."""
    return _Picture(shot, width, height, glyphs, note, unix).draw()


class _Picture:
    def __init__(self, shot: Snapshot, width: int, height: int, glyphs: Glyphs, note: str, unix: float) -> None:
        # The last column stays empty: some terminals wrap when it is written to.
        self.shot, self.width, self.height = shot, max(20, width - 1), height
        self.glyphs, self.note, self.unix = glyphs, note, unix

    def draw(self) -> RenderableType:
        shot = self.shot
        if not shot.studies:
            text = f"{shot.run}: starting the workers {self.glyphs.cut}" if shot.run else "starting the workers"
            return Group(self._line((text, "dim")), self._footer())
        head = [self._progress(), self._end(), self._memory()]
        room = self.height - len(head) - 2  # the footer, and the line on which the cursor stands
        body = self._beside(room) if self.width >= WIDE - 1 else self._below(room)
        return Group(*head, *body, self._footer())

    # -- the head -----------------------------------------------------------------------------------------------------

    def _progress(self) -> Text:
        shot = self.shot
        share = shot.done / shot.quota if shot.quota else 1.0
        return self._line(
            (shot.run, "bold"),
            f"  {shot.done}/{shot.quota} trials done ({share:.0%}), ",
            (f"{len(shot.trials)} running", "green" if shot.trials else ""),
            f", {len(shot.waiting)} waiting  {self.glyphs.dot}  {duration(shot.elapsed_s)} so far",
        )

    def _end(self) -> Text:
        shot = self.shot
        if shot.draining:
            return self._line(("draining: no new trial starts", "yellow"))
        if shot.done >= shot.quota:
            return self._line("ends: now")
        if shot.eta is None:
            return self._line("ends: ", (shot.unforeseen or "unknown", "dim"))
        at = ""
        if self.unix:
            then = datetime.datetime.fromtimestamp(self.unix + shot.eta.middle_s).astimezone()
            at = f", {then:%H:%M}" if shot.eta.middle_s < 43_200 else f", {then:%a %d %b %H:%M}"
        return self._line("ends: ", (f"{about(shot.eta)}{at}", "bold"), f"{span(shot.eta)}")

    def _memory(self) -> Text:
        shot = self.shot
        figures = f" {gib(shot.used_bytes)} used, {gib(shot.reserved_bytes)} reserved of {gib(shot.capacity_bytes)}"
        odd = next((worker for worker in shot.workers if worker.state != "normal"), None)
        known = [worker.available_bytes for worker in shot.workers if worker.available_bytes is not None]
        if not shot.workers:
            host = ("  no worker", "bold red")
        elif odd is not None:
            host = (f"  {odd.host}: {odd.state}", "yellow")
        else:
            count, is_wide = len(shot.workers), self.width >= WIDE
            hosts = "host" if count == 1 and not is_wide else f"{count} host{'s' * (count > 1)}"
            state = ["normal"] * (is_wide or not known) + [f"{gib(sum(known))} free"] * bool(known)
            host = (f"  {hosts}: {', '.join(state)}", "")
        bar = self._bar(shot.used_bytes, shot.reserved_bytes, shot.capacity_bytes, 6 if self.width < WIDE else 30)
        return self._line("memory ", *bar, figures, host)

    def _bar(self, used: int, reserved: int, capacity: int, cells: int) -> list[tuple[str, str]]:
        whole = max(1, capacity, reserved, used)
        taken = round(cells * min(used, reserved) / whole)
        over = round(cells * max(0, used - reserved) / whole)
        held = max(0, round(cells * max(reserved, used) / whole) - taken - over)
        left = max(0, cells - taken - over - held)
        g = self.glyphs
        return [
            (g.used * taken, "blue"),
            (g.used * over, "bold red"),
            (g.reserved * held, "cyan"),
            (g.free * left, "dim"),
        ]

    def _footer(self) -> Text:
        shot = self.shot
        if self.note:
            return self._line((self.note, "bold yellow"))
        if shot.draining:
            wait = "" if shot.drain_s is None else f", {duration(shot.drain_s)} at most"
            return self._line(
                (f"running trials finish their step, checkpoint and leave{wait}; q: stop at once", "yellow")
            )
        board = f" {self.glyphs.dot} {shot.dashboard}" if shot.dashboard else ""
        return self._line((f"q: stop{board}", "dim"))

    # -- the body -----------------------------------------------------------------------------------------------------

    def _below(self, room: int) -> list[RenderableType]:
        """One column: troubles, running, waiting, studies, workers, each with its share of the room."""
        shot, parts = self.shot, list[RenderableType]()
        bad = [each for each in shot.happenings if each.tone in ("bad", "warn")]
        told = self._told(bad[-2:], self.width, most=4 if room > 14 else 2) if bad else []
        refused = [each.name.removeprefix(f"{shot.run}_") for each in shot.studies if each.refused is not None]
        if refused:
            told.append(self._line((f"refused: {', '.join(refused)} (why: --dry-run)", "yellow")))
        parts += told
        room -= len(told)
        # A heading and a row each, whatever happens; what is left goes to those who have most to show.
        wanted = [
            len(shot.trials),
            len(shot.waiting),
            len(shot.studies) - len(refused),
            len(shot.workers) if room > 24 else 0,
        ]
        given = share_out(wanted, room)
        makers = (self._trials, self._waiting, self._begun, self._workers)
        for rows, maker in zip(given, makers, strict=True):
            if rows:
                parts.append(maker(rows, self.width))
        return parts

    def _beside(self, room: int) -> list[RenderableType]:
        """Two columns: trials on the left; studies and what happened on the right."""
        shot = self.shot
        left, right = self.width * 55 // 100, self.width - self.width * 55 // 100 - 3
        on_left = share_out([len(shot.trials), len(shot.waiting), len(shot.workers)], room)
        on_right = share_out([len(shot.studies), max(3, len(shot.happenings))], room)
        makers = zip(on_left, (self._trials, self._waiting, self._workers), strict=True)
        columns = Table.grid(padding=(0, 3, 0, 0))
        columns.add_column(width=left, no_wrap=True)
        columns.add_column(width=right, no_wrap=True)
        events = []
        if shot.happenings and on_right[1] > 1:
            told = self._told(shot.happenings, right, most=on_right[1] - 1)
            events = [Text("latest", style="bold"), *told]
        columns.add_row(
            Group(*(maker(rows, left) for rows, maker in makers if rows)),
            Group(*([self._studies(on_right[0], right)] if on_right[0] else []), *events),
        )
        return [columns]

    def _told(self, happenings: Sequence[Happening], width: int, most: int) -> list[Text]:
        """Take the latest of them, folded by us rather than by the terminal, in at most that many lines."""
        lines: list[Text] = []
        for each in reversed(happenings):
            told = fold(f"{clock(each.unix)} {each.text}", width)
            if lines and len(lines) + len(told) > most:
                break
            cut = told[:most]
            lines[:0] = [Text(text, style=STYLES[each.tone], no_wrap=True) for text in cut]
        return lines

    def _trials(self, rows: int, width: int) -> Table:
        wide = width >= 76
        table = (
            self._table(width, "running", "params", ">epoch", ">loss", ">used", ">reserved", ">time")
            if wide
            else (self._table(width, "running", ">epoch", ">used", ">reserved", ">time"))
        )
        most = rows - 1
        for trial in self._cut(self.shot.trials, most):
            over = trial.used_bytes > trial.reserved_bytes
            cells: list[str | Text] = [short(trial.attempt, self.shot.run)]
            if wide:
                cells.append(Text(trial.params, style="dim"))
            cells.append(epoch(trial))
            if wide:
                cells.append("" if trial.value is None else f"{trial.value:.4g}")
            cells.append(Text(gib(trial.used_bytes), style="yellow" if over else ""))
            cells += [gib(trial.reserved_bytes), duration(trial.running_s)]
            table.add_row(*cells)
        self._count(table, len(self.shot.trials), most)
        return table

    def _waiting(self, rows: int, width: int) -> Table:
        table = self._table(width, "waiting", "for", ">since", ">still")
        most = rows - 1
        for trial in self._cut(self.shot.waiting, most):
            behind = f" (behind {trial.behind})" if trial.behind else ""
            table.add_row(trial.trial, f"{trial.what}{behind}", duration(trial.waited_s), still(trial))
        self._count(table, len(self.shot.waiting), most)
        return table

    def _begun(self, rows: int, width: int) -> Table:
        return self._studies(rows, width, [each for each in self.shot.studies if each.refused is None])

    def _studies(self, rows: int, width: int, studies: Sequence[StudyLine] | None = None) -> Table:
        table = self._table(width, "study", ">done", ">running", ">best", ">ends in", "")
        most = rows - 1
        # Those that are at work or were refused come before those that are done with.
        ordered = sorted(self.shot.studies if studies is None else studies, key=lambda each: each.closed is not None)
        for study in self._cut(ordered, most):
            name = study.name.removeprefix(f"{self.shot.run}_")
            if study.refused is not None:
                table.add_row(name, "", "", "", "", Text(f"refused: {study.refused}", style="yellow"))
                continue
            best = "" if study.best is None else f"{study.best:.4g}"
            ends = "" if study.eta is None or study.closed else rough(study.eta.middle_s)
            table.add_row(name, f"{study.done}/{study.quota}", str(study.running or ""), best, ends, _note(study))
        self._count(table, len(ordered), most)
        return table

    def _workers(self, rows: int, width: int) -> Table:
        table = self._table(width, "worker", ">capacity", ">reserved", ">used", ">headroom", ">slots free", "state")
        most = rows - 1
        for worker in self._cut(self.shot.workers, most):
            table.add_row(
                worker.host,
                gib(worker.capacity_bytes),
                gib(worker.reserved_bytes),
                "?" if worker.used_bytes is None else gib(worker.used_bytes),
                gib(worker.headroom_bytes),
                f"{worker.free_slots}/{worker.slots}",
                Text(worker.state, style="" if worker.state == "normal" else "yellow"),
            )
        self._count(table, len(self.shot.workers), most)
        return table

    # -- small things -------------------------------------------------------------------------------------------------

    def _line(self, *parts: str | tuple[str, str]) -> Text:
        text = Text.assemble(*parts, no_wrap=True)
        if text.cell_len > self.width:
            text.truncate(self.width - 1)
            text.append(self.glyphs.cut)
        return text

    def _table(self, width: int, *columns: str) -> Table:
        """Make a table of that width; a column whose name begins with > is of numbers, and is never cut."""
        table = Table(box=None, pad_edge=False, header_style="bold", width=width, padding=(0, 1, 0, 0))
        for index, name in enumerate(columns):
            is_number = name.startswith(">")
            table.add_column(
                name.removeprefix(">"),
                justify="right" if is_number else "left",
                no_wrap=True,
                overflow="ellipsis" if self.glyphs is UNICODE else "crop",
                ratio=None if is_number or index == 0 else 1,
            )
        return table

    def _cut(self, items: Sequence[T], most: int) -> Iterable[T]:
        return items if len(items) <= most else items[: max(0, most - 1)]

    def _count(self, table: Table, there: int, most: int) -> None:
        if there > most:
            table.add_row(Text(f"and {there - max(0, most - 1)} more", style="dim"))


def share_out(wanted: Sequence[int], room: int) -> list[int]:
    """Give out `room` lines: each part that has rows gets a heading and a row, then, in turn, a row each as it needs.

    Returns lines for each part, its heading among them; 0: it is left out.
    """
    given = [0] * len(wanted)
    for index, rows in enumerate(wanted):
        if rows and room >= 2:
            given[index], room = 2, room - 2
    while room > 0:
        short_of = [i for i, rows in enumerate(wanted) if given[i] and given[i] < rows + 1]
        if not short_of:
            break
        for index in short_of[:room]:
            given[index] += 1
        room -= min(room, len(short_of))
    return given


def fold(text: str, width: int) -> list[str]:
    """Break a line at spaces where that is possible; what follows is indented."""
    lines, rest, indent = [], text, ""
    while len(indent) + len(rest) > width:
        room = width - len(indent)
        at = rest.rfind(" ", 0, room + 1)
        at = room if at < room // 2 else at
        lines.append(indent + rest[:at])
        rest, indent = rest[at:].lstrip(), "    "
    return [*lines, indent + rest]


def short(attempt: str, run: str) -> str:
    """ "night_20M_h3/17/1" as "20M_h3 #17"; a later attempt as "20M_h3 #17.2"."""
    study, number, again = attempt.rsplit("/", 2)
    return f"{study.removeprefix(f'{run}_')} #{number}{'' if again == '1' else f'.{again}'}"


def epoch(trial: TrialLine) -> str:
    """How far it is: epochs, and the part of the present one; before the first its steps."""
    if trial.state:
        return trial.state
    if not trial.epoch and trial.ticks:
        return f"step {trial.ticks}"
    of = f"/{trial.epochs}" if trial.epochs else ""
    within = "" if trial.within is None else f" +{trial.within:.0%}"
    return f"{trial.epoch}{of}{within}"


def about(eta: Eta) -> str:
    """Say the middle, no more exact than it is: "in about 2h05m"."""
    return "within a minute" if eta.middle_s < 60 else f"in about {rough(eta.middle_s)}"


def span(eta: Eta) -> str:
    """Say how sure that is, in brackets; "" where it makes no difference."""
    low, high = rough(eta.low_s), rough(eta.high_s)
    between = f"up to {high}" if eta.low_s < 60 else f"{low} to {high}"
    return "" if eta.high_s < 60 or low == high else f" ({between}, 4 times in 5)"


def rough(seconds: float) -> str:
    """Say how long, to the minute: "2h05m", "12m", "1m" for less."""
    return duration(max(60.0, round(seconds / 60) * 60.0)).removesuffix("00s").removesuffix("00m")


def still(trial: WaitingLine) -> str:
    if trial.still is None:
        return ""
    return rough(trial.still.middle_s) if trial.still.middle_s >= 60 else "<1m"


def clock(unix: float) -> str:
    return f"{datetime.datetime.fromtimestamp(unix).astimezone():%H:%M:%S}"


def _note(study: StudyLine) -> Text:
    if study.closed:
        return Text(study.closed, style="dim")
    return Text(study.waiting or "", style="dim")


__all__ = ["ASCII", "UNICODE", "Glyphs", "about", "clock", "draw", "fold", "rough", "share_out", "span"]
