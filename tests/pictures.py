"""The pictures of the README, of a run that really happens: `python -m tests.pictures [FOLDER]` (default: docs).

A search of 24 small numpy networks in a real tmux, three at once; one of them stands still after a few epochs, as a
data loader that waits for itself does, and is ended by the watchdog. What is then on the terminal is terminal.svg, the
page of that moment page.png, the report that the run leaves report.png. Needs tmux and chromium; takes a few minutes.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from tests.browser import CHROMIUM, browse
from tests.tmux import TMUX, Tmux
from tests.ui.test_terminal import FAST, ROOT

COLUMNS, LINES = 110, 30
TRIALS = 24
OBJECTIVE = '''
import time

import numpy as np


def objective(trial):
    """A network of one layer, trained by hand. Trial 6 waits for something that never comes."""
    width = trial.suggest_int("width", 64, 4096, log=True)
    rows = trial.suggest_int("rows", 2_000, 40_000, log=True)
    lr = trial.suggest_float("lr", 1e-3, 1.0, log=True)
    rng = np.random.default_rng(trial.number)
    x = rng.normal(size=(rows, 32))
    y = np.sin(x @ rng.normal(size=32))
    hidden = np.tanh(x @ rng.normal(size=(32, width)) / 6)
    weights, loss = np.zeros(width), 1.0
    for epoch in range(1, 21):
        until = time.monotonic() + 0.8
        while time.monotonic() < until:
            error = hidden @ weights - y
            weights -= lr * hidden.T @ error / rows / width**0.5
            time.sleep(0.05)
        loss = float(np.mean((hidden @ weights - y) ** 2))
        trial.report(loss, epoch)
        if trial.number == 6 and epoch == 4:
            time.sleep(3600)
    return loss
'''
ENVIRON = {**FAST, "HEADROOM_WATCHDOG_STALL_AFTER_S": "15", "HEADROOM_WATCHDOG_STALL_UNPROVEN_S": "60"}


def svg(screen: str, title: str) -> str:
    """What tmux has captured, colours and all, as a picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in screen.rstrip().split("\n"):
        console.print(Text.from_ansi(line), no_wrap=True, crop=True)
    # The font is named, not fetched: a picture in a README may not make requests.
    drawn = console.export_svg(title=title, unique_id="headroom")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


def small(path: Path) -> None:
    """Write the PNG again with 128 colours: a quarter of the bytes, and nothing is seen of it."""
    with Image.open(path) as picture:
        reduced = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


async def photograph(url: str, path: Path, scratch: Path, width: int, height: int, sign: str) -> list[str]:
    """A picture of a page once `sign` is on it; returns what it wrote to its console as an error."""
    async with browse(url, scratch, width=width, height=height) as page:
        await page.wait_for(sign, 60)
        await page.settled("deepAll('canvas').length + ' ' + document.documentElement.scrollHeight")
        await page.screenshot(path)
        small(path)
        return page.errors


def dashboard(run: Path) -> str:
    """Where the run's page is, by its journal."""
    for line in (run / "journal.jsonl").read_text().splitlines():
        if (record := json.loads(line))["event"] == "dashboard.ready":
            return str(record["url"])
    raise AssertionError("the run has no dashboard")


def make(folder: Path) -> None:
    """Run it and take the three pictures."""
    folder.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="pictures-"))
    (scratch / "objective.py").write_text(OBJECTIVE)
    told = f"bin/schedule --objective objective.py:objective --trials {TRIALS} --slots 3 --memory-budget 3GiB"
    command = [sys.executable, "-m", "scheduler", *told.split()[1:], "--name", "night", "--dashboard", "127.0.0.1:0"]
    passed = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "LC_ALL", "LANG")}
    environ = {**passed, "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", **ENVIRON}
    run = scratch / "runs" / "night"
    with Tmux(command, COLUMNS, LINES, folder=scratch, environ=environ) as tmux:
        tmux.wait_for("trial 6 of night was ended", 600)
        tmux.wait(lambda: re.search(r"ends: (in about|within)", tmux.shown), "a forecast", 300)
        tmux.wait(lambda: len(re.findall(r"night #\d+ .* [2-9]\d* ", tmux.shown)) >= 2, "trials that run", 300)
        (folder / "terminal.svg").write_text(svg(tmux.captured, told))
        errors = asyncio.run(photograph(dashboard(run), folder / "page.png", scratch / "page", 1280, 640, "trial 6"))
        tmux.ended(900)
    report = (run / "report.html").as_uri()
    errors += asyncio.run(photograph(report, folder / "report.png", scratch / "report", 1000, 1250, "trial 6"))
    assert errors == [], errors
    for name in ("terminal.svg", "page.png", "report.png"):
        print(f"{folder / name}: {(folder / name).stat().st_size / 1024:.0f} KiB")
    print(f"the run: {run}")


if __name__ == "__main__":
    if TMUX is None or CHROMIUM is None:
        sys.exit("the pictures need tmux and chromium")
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
