"""The page /headroom: on real Dask schedulers, over real HTTP, and as a browser shows it."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker
from prometheus_client.parser import text_string_to_metric_families

from scheduler.cluster import agent_plugin, dashboard
from scheduler.cluster.client import Cluster
from scheduler.cluster.dashboard import HeadroomPage, PageFeed
from scheduler.host import vitals
from scheduler.host.agent_folder import AgentFolder, Connection
from scheduler.host.registry import HostRegistry
from scheduler.model import Json, frames
from scheduler.ui.dashboard import page
from scheduler.ui.dashboard.history import History
from scheduler.ui.dashboard.runs import VERSION, Board
from scheduler.ui.snapshot import Happening, Snapshot, StudyLine, TrialLine, WorkerLine
from scheduler.units import GIB
from tests import browser
from tests import builders as b
from tests.waiting import wait_until

WAIT_S = 30.0


def worker(name: str = "mac-studio", **changes: Any) -> WorkerLine:
    """A worker with 100 GiB, of which 60 are reserved and 40 used."""
    line = WorkerLine(
        address="tcp://10.0.0.7:41233",
        host=name,
        capacity_bytes=100 * GIB,
        reserved_bytes=60 * GIB,
        used_bytes=40 * GIB,
        slots=8,
        free_slots=5,
    )
    return dataclasses.replace(line, **changes)


def trial(attempt: str = "phase6a_2B_h1/3/1", **changes: Any) -> TrialLine:
    """A trial that uses 30 of its 40 GiB, in epoch 4 of 75."""
    line = TrialLine(
        attempt=attempt,
        worker="tcp://10.0.0.7:41233",
        reserved_bytes=40 * GIB,
        used_bytes=30 * GIB,
        running_s=7625.0,
        epoch=4,
        epochs=75,
        value=0.61234,
    )
    return dataclasses.replace(line, **changes)


def full(run: str = "phase6a") -> Snapshot:
    """A busy run: three workers in all conditions, 9 trials, 12 studies in all conditions."""
    studies = [
        StudyLine(name=f"{run}_{budget}_h{horizon}", done=done, quota=50, running=1, best=0.6 - done / 500)
        for budget, done in (("2M", 41), ("20M", 18), ("200M", 3), ("2B", 0))
        for horizon in (1, 3, 5)
    ]
    studies[7] = dataclasses.replace(studies[7], running=0, waiting="waits for memory (needs 31.2 GiB)")
    studies[9] = dataclasses.replace(studies[9], best=None, waiting="waits for memory that other programs hold")
    studies[11] = dataclasses.replace(studies[11], running=0, closed="5 trials in a row failed: ValueError: NaN loss")
    second = worker("node-02", address="tcp://10.0.0.8:40001", reserved_bytes=20 * GIB, used_bytes=26 * GIB)
    third = worker("node-03", address="tcp://10.0.0.9:40001", pressure="hard", closed_reason="swap above 25 %")
    return Snapshot(
        run=run,
        studies=tuple(studies),
        workers=(worker(), dataclasses.replace(second, pressure="elevated"), third),
        trials=(
            trial(),
            trial(f"{run}_20M_h3/18/2", used_bytes=46 * GIB, epochs=None, value=None, running_s=42.0),
            *(
                trial(f"{run}_2M_h{h}/4{n}/1", reserved_bytes=GIB // 2, used_bytes=GIB // 3)
                for h in (1, 3, 5)
                for n in (1, 2)
            ),
            trial(f"{run}_200M_h5/3/1", worker="tcp://10.0.0.9:40001", reserved_bytes=4 * GIB, used_bytes=3 * GIB),
        ),
        elapsed_s=93784.0,
    )


KILL = "trial 2 of 2B_h1 was ended: no CPU and no progress for 10 min; story: runs/phase6a/kill.txt"


def message(
    snapshot: Snapshot, key: str = "phase6a-1", ended: str | None = None, unix: float = 1_700_000_000.0
) -> Json:
    """What a driver sends."""
    return {"version": VERSION, "key": key, "ended": ended, "unix": unix, "snapshot": dataclasses.asdict(snapshot)}


# -- the board and the HTML, without a cluster ----------------------------------------------------------------------


def test_size_reads_well() -> None:
    """Numbers keep three places, and an unknown size is not zero."""
    assert [page.size(n) for n in (None, 0, GIB // 2, 31 * GIB, 1500 * GIB)] == ["?", "0.00", "0.50", "31.0", "1500"]


@pytest.mark.parametrize(
    ("used", "reserved", "widths"),
    [
        (30, 40, {"used": "30.00", "reserved": "10.00"}),
        (50, 40, {"used": "40.00", "over": "10.00"}),
        (None, 40, {"reserved": "40.00"}),
        (0, 0, {}),
    ],
)
def test_a_bar_stacks_used_over_and_reserved(used: int | None, reserved: int, widths: dict[str, str]) -> None:
    """Use up to the reservation, use beyond it and the unused rest lie side by side and never count twice."""
    drawn = page.bar(used, reserved, 100)
    assert drawn.count("<i ") == len(widths)
    for name, width in widths.items():
        assert f'<i class="{name}" style="width:{width}%">' in drawn


def test_text_from_outside_is_escaped() -> None:
    """Neither a host's name, nor a study's reason, nor a run's name can bring markup into the page."""
    evil = "<script>alert(1)</script>"
    study = StudyLine(name=evil, done=0, quota=1, waiting=evil, best=None)
    evil_end = Happening(unix=1.0, text=evil, tone="bad", attempt=evil)
    shot = Snapshot(
        run=evil,
        studies=(study,),
        workers=(worker(evil, closed_reason=evil),),
        trials=(trial(evil),),
        happenings=(evil_end,),
    )
    board = Board()
    board.take(message(shot, key=evil), 0.0)
    board.take(message(shot, key=evil + "2"), 0.0)
    run = board.find("", "", 0.0)
    assert run is not None
    drawn = page.head(board, run, 0.0) + page.workers(shot) + page.trials(shot) + page.below(shot, run.history)
    assert "<script" not in drawn
    assert "&lt;script&gt;" in drawn


def test_a_thousand_workers_are_cut_to_what_can_be_read() -> None:
    """The page stays small on a large cluster and says how much it leaves out."""
    shot = Snapshot(run="r", workers=tuple(worker(f"n{i}") for i in range(1000)), trials=(trial(),) * 300)
    drawn = page.workers(shot) + page.trials(shot) + page.below(shot, History())
    assert "… and 968 more workers" in drawn
    assert "… and 236 more trials" in drawn
    assert len(drawn) < 200_000


def test_a_silent_driver_is_called_stale_and_one_that_left_ended() -> None:
    """Ten seconds without news make a run stale; a farewell does not."""
    board = Board()
    board.take(message(full()), 100.0)
    run = board.find("", "", 100.0)
    assert run is not None
    assert run.state(109.0) == ("running", "good")
    assert run.state(111.0) == ("stale", "bad")
    assert "No news from the driver for 1 min 00 s" in page.head(board, run, 160.0)
    board.take(message(full(), ended="all studies reached their quota"), 112.0)
    assert run.state(999.0) == ("ended: all studies reached their quota", "")
    assert "No news" not in page.head(board, run, 999.0)


def test_history_keeps_half_an_hour() -> None:
    """One level each 5 s for 30 min, the present as the last; nothing grows over days."""
    board = Board()
    small = message(Snapshot(run="r", workers=(worker(),)))
    for second in range(4000):
        board.take(small, float(second))
    run = board.find("", "", 4000.0)
    assert run is not None
    (levels,) = run.history.levels.values()
    assert len(levels) in (361, 362)
    assert levels[0].at >= 3999 - 1800
    assert levels[-1].at == 3999.0
    assert levels[-1].used_bytes == 40 * GIB


def test_areas_stack_by_trial_and_none_is_drawn_twice() -> None:
    """The worker's own lies lowest, each trial on those before it; one that ended leaves its place at that moment."""
    history = History()

    def at(now: float, **used: int) -> None:
        trials = tuple(trial(f"s/{n}/1", used_bytes=size * GIB) for n, size in used.items())
        total = (1 + sum(used.values())) * GIB
        history.take(Snapshot(run="r", workers=(worker(used_bytes=total),), trials=trials), now, now)

    at(0.0, a=2)
    at(10.0, a=2, b=3)
    at(20.0, b=4)
    bands = {band.attempt: band for band in history.bands(worker().address, 30.0)}
    (own,) = [band for name, band in bands.items() if not name.startswith("s/")]
    assert own.high == (GIB, GIB, GIB)
    assert own.times == (0.0, 10.0, 20.0, 30.0)
    assert (bands["s/a/1"].times, bands["s/a/1"].low, bands["s/a/1"].high) == (
        (0.0, 10.0, 20.0),
        (GIB, GIB),
        (3 * GIB, 3 * GIB),
    )
    assert (bands["s/b/1"].times, bands["s/b/1"].low, bands["s/b/1"].high) == (
        (10.0, 20.0, 30.0),
        (3 * GIB, GIB),
        (6 * GIB, 5 * GIB),
    )


def test_a_thousand_short_trials_stay_few_areas_and_spans() -> None:
    """What is sent to a browser is bounded however short the trials are."""
    history = History()
    for n in range(1000):
        shot = Snapshot(run="r", workers=(worker(),), trials=(trial(f"s/{n}/1", used_bytes=n, running_s=0.5),))
        history.take(shot, float(n), float(n))
    assert len(history.bands(worker().address, 1000.0)) < 1500
    assert len({band.attempt for band in history.bands(worker().address, 1000.0)}) <= 42
    assert len(history.spans) <= 501
    assert {span.lane for span in history.spans.values()} <= {0, 1}


def test_an_end_is_told_with_its_reason_and_at_its_time() -> None:
    """The driver's clock is not the page's: what counts is how long before its message it was."""
    history = History()
    history.take(Snapshot(run="r", workers=(worker(),), trials=(trial("s/1/1"),)), 100.0, 5000.0)
    told = Happening(unix=5003.0, text=KILL, tone="bad", attempt="s/1/1")
    history.take(Snapshot(run="r", workers=(worker(),), happenings=(told,)), 104.0, 5004.0)
    history.take(Snapshot(run="r", workers=(worker(),), happenings=(told,)), 105.0, 5005.0)
    span = history.spans["s/1/1"]
    assert (span.ended, span.tone, span.text) == (103.0, "bad", KILL)
    assert [each.text for each in history.troubles] == [KILL]


def test_a_run_started_again_takes_its_place() -> None:
    """The new driver inherits the history of the one that is gone, also in a page that is open; a live one is kept."""
    board = Board()
    board.take(message(full(), key="phase6a-1"), 0.0)
    board.take(message(full("other"), key="other-1"), 0.0)
    board.take(message(full(), key="phase6a-2"), 5.0)
    assert len(board.runs(5.0)) == 3
    board.take(message(full(), key="phase6a-3"), 30.0)
    assert {run.key for run in board.runs(30.0)} == {"phase6a-3", "other-1"}
    found = board.find("phase6a-1", "phase6a", 30.0)
    assert found is not None
    assert found.key == "phase6a-3"
    assert found.history.levels["tcp://10.0.0.7:41233"][0].at in (0.0, 5.0)


def test_a_board_forgets_old_runs() -> None:
    """A cluster that lives for months keeps the latest 20."""
    board = Board()
    for n in range(50):
        board.take(message(full(f"run{n}"), key=str(n), ended="done"), float(n))
    assert [run.key for run in board.runs(50.0)] == [str(n) for n in range(49, 29, -1)]


def test_the_page_outlives_a_message_it_cannot_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver of another version, or garbage on our topic, is logged once and otherwise ignored."""
    plugin = HeadroomPage()
    plugin.board, plugin._failed = Board(), False
    monkeypatch.setattr(plugin, "_scheduler", None, raising=False)
    for bad in ({"version": 99}, {}, None, "text", {"version": VERSION, "key": "a", "snapshot": {"run": 1}}):
        plugin.log_event(dashboard.TOPIC, bad)
    assert len([r for r in caplog.records if r.name == "scheduler.cluster.dashboard"]) == 1


# -- on a real cluster ----------------------------------------------------------------------------------------------


@pytest.fixture
def local() -> Iterator[LocalCluster]:
    """A Dask scheduler with its dashboard and no worker."""
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50) as cluster:
        yield cluster


def scheduler_of(local: LocalCluster) -> Scheduler:
    return cast(Scheduler, local.scheduler)


def board_of(local: LocalCluster) -> Board:
    return cast(HeadroomPage, scheduler_of(local).plugins[HeadroomPage.name]).board


def connect(local: LocalCluster) -> Cluster:
    """A driver's connection, over TCP as to any cluster."""
    return Cluster.connect(local.scheduler_address, topic="test")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read(), "utf-8")


def test_two_drivers_share_one_page(local: LocalCluster) -> None:
    """Two drivers register and feed one page: both runs are on it, the scheduler keeps no old snapshot, Dask's own
    pages go on and link to ours, and the page outlives the drivers."""
    failures: list[dict[str, Any]] = []
    clusters = [connect(local), connect(local)]
    feeds = [PageFeed(c, key=f"k{i}", log=lambda e, **f: failures.append(f)) for i, c in enumerate(clusters)]
    link = local.dashboard_link
    urls = [feed.start(link) for feed in feeds]
    assert urls == [link.replace("/status", "/headroom")] * 2
    assert "Headroom" in get(urls[0])
    assert 'href="headroom"' in get(link)
    for n in range(5):
        for i, feed in enumerate(feeds):
            feed.update(dataclasses.replace(full(f"run{i}"), elapsed_s=float(n)))
    feeds[0].end("all studies reached their quota")
    feeds[1].end("stopped")
    for cluster in clusters:
        cluster.close()
    now = time.monotonic()
    assert {run.key: run.state(now)[0] for run in board_of(local).runs(now)} == {
        "k0": "ended: all studies reached their quota",
        "k1": "ended: stopped",
    }
    assert scheduler_of(local).get_events(dashboard.TOPIC) == ()
    assert "Headroom" in get(urls[0])
    assert failures == []


def test_prometheus_finds_memory_and_reasons_on_dask_s_own_page(local: LocalCluster) -> None:
    """What a worker may promise, has promised and holds, who waits for what and why attempts ended, beside Dask's."""
    shot = dataclasses.replace(
        full(), waits={"memory": 2}, ends={"completed": 7, "stalled": 1}, workers=(worker(swap_bytes=GIB),)
    )
    with Client(local.scheduler_address, set_as_default=False) as client:
        client.register_plugin(HeadroomPage())
        client.log_event(dashboard.TOPIC, message(shot))
        url = local.dashboard_link.replace("/status", "/metrics")
        wait_until(lambda: 'headroom_trials_running{run="phase6a"}' in get(url), "the run is at /metrics", WAIT_S)
        found = get(url)
    samples = {
        (each.name, *sorted(each.labels.values())): each.value
        for family in text_string_to_metric_families(found)
        for each in family.samples
    }
    place = ("mac-studio", "phase6a", "tcp://10.0.0.7:41233")
    assert samples["headroom_memory_capacity_bytes", *place] == 100 * GIB
    assert samples["headroom_memory_reserved_bytes", *place] == 60 * GIB
    assert samples["headroom_memory_used_bytes", *place] == 40 * GIB
    assert samples["headroom_swap_used_bytes", *place] == GIB
    assert samples["headroom_trials_running", "phase6a"] == 9
    assert samples["headroom_trials_waiting", "memory", "phase6a"] == 2
    assert samples["headroom_attempts_ended_total", "phase6a", "stalled"] == 1
    assert samples["headroom_trials_quota", "phase6a", "phase6a_2B_h1"] == 50
    assert ("dask_scheduler_clients",) in samples


def test_a_scheduler_without_bokeh_costs_one_line(local: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the page cannot be, the driver says so once and names Dask's own page; updates and the end cost nothing."""
    monkeypatch.setitem(sys.modules, "bokeh.server.tornado", None)
    failures: list[dict[str, Any]] = []
    cluster = connect(local)
    feed = PageFeed(cluster, key="k", log=lambda event, **fields: failures.append({"event": event, **fields}))
    assert feed.start(local.dashboard_link) == local.dashboard_link
    feed.update(full())
    begun = time.monotonic()
    feed.end("done")
    assert time.monotonic() - begun < 0.5
    cluster.close()
    assert [failure["event"] for failure in failures] == ["dashboard.no_page"]
    assert "has no bokeh" in failures[0]["error"]


def test_a_scheduler_that_is_gone_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed of a dead scheduler neither raises nor waits long, and logs one line."""
    monkeypatch.setattr(dashboard, "END_SENT_TIMEOUT_S", 0.5)
    failures: list[dict[str, Any]] = []
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50) as local:
        cluster = connect(local)
        feed = PageFeed(cluster, key="k", log=lambda event, **fields: failures.append({"event": event, **fields}))
        feed.start(local.dashboard_link)
    begun = time.monotonic()
    for _ in range(100):
        feed.update(full())
    feed.end("done")
    cluster.close()
    assert time.monotonic() - begun < 8
    assert len(failures) <= 1


def test_dask_shows_the_trials_memory(tmp_path: Path) -> None:
    """With our agent on it, a worker's memory on Dask's own pages is that of its whole tree of processes, the warm
    spare with torch among it; without, the worker's own again."""
    context = {"device": "cpu", "threads": 1, "allocator": "auto"}
    config = b.agent_config(topic="memory", run_id="memory", context=context, preload=None, vitals_every_s=0.1)
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            host="127.0.0.1",
            memory_limit=4 * GIB,
            dashboard_address="127.0.0.1:0",
            local_directory=str(tmp_path),
            silence_logs=50,
        ) as local,
        Client(local, set_as_default=False) as client,
    ):
        (state,) = local.scheduler.workers.values()
        own = client.run(own_rss)[state.address]
        client.run(agent_plugin.install, dataclasses.asdict(config))
        wait_until(lambda: state.metrics["memory"] > own + 100 * 2**20, "Dask sees the trials' memory")
        drawn = get(local.dashboard_link.replace("/status", "/info/main/workers.html"))
        (shown,) = re.findall(r'<progress class="progress" value="(\d+)"', drawn)[:1]
        assert int(shown) > own + 100 * 2**20
        client.run(agent_plugin.remove, config.topic)
        wait_until(lambda: state.metrics["memory"] < own + 50 * 2**20, "it is gone from there")
        folder = AgentFolder(HostRegistry.default())
        (entry,) = folder.agents(vitals.lives)
        Connection.to(entry.address).send(frames.to_json(frames.Discharge(reason="the test is over")))
        wait_until(lambda: not list(folder.agents(vitals.lives)), "the agent has left")


def own_rss(dask_worker: Worker) -> int:
    return dask_worker.monitor.proc.memory_info().rss


# -- in a browser ---------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")

# Elements that stick out of the window to the right, the innermost ones.
TOO_WIDE = """
document.documentElement.scrollWidth <= window.innerWidth ? [] : deepAll("*")
  .filter((n) => n.getBoundingClientRect().right > window.innerWidth + 1 && !n.closest(".wide"))
  .map((n) => `${n.nodeName}.${n.className}: ${n.getBoundingClientRect().right} ${n.textContent.slice(0, 40)}`)
"""

# Pairs of pieces of text (leaf elements of our parts) whose boxes overlap, or that stick out of the window.
COLLISIONS = """
(() => {
  const boxes = deepAll("td, th, b, .muted, .badge, h1, h2").filter((n) => !n.children.length && n.textContent.trim())
    .map((n) => [n.textContent.trim(), n.getBoundingClientRect()]).filter(([, r]) => r.width)
  const found = []
  boxes.forEach(([text, a], i) => {
    if (a.left < 0 || a.right > window.innerWidth + 1) found.push("outside: " + text)
    for (const [other, b] of boxes.slice(i + 1))
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        found.push(text + " / " + other)
  })
  return found
})()
"""


def remember_a_morning(board: Board) -> None:
    """Give the board half an hour of a run, with a kill in it, so that there is something to look at."""
    now, unix = time.monotonic(), time.time()
    told: tuple[Happening, ...] = ()
    for step in range(29 * 12, 0, -1):
        ago = 5.0 * step
        running = [trial(running_s=7200 - ago, used_bytes=(20 + step % 9) * GIB)]
        if ago > 600:
            running.append(trial("phase6a_2B_h1/2/1", running_s=3000 - ago, used_bytes=10 * GIB))
        else:
            told = (Happening(unix=unix - 600, text=KILL, tone="bad", attempt="phase6a_2B_h1/2/1"),)
        short = f"phase6a_20M_h3/{step // 30}/1"
        running.append(trial(short, running_s=150.0 - ago % 150, used_bytes=5 * GIB))
        lines = tuple(dataclasses.replace(each, swap_bytes=GIB * (step % 40) // 10) for each in full().workers)
        shot = dataclasses.replace(full(), workers=lines, trials=tuple(running), happenings=told)
        board.take(message(shot, unix=unix - ago), now - ago)


@needs_browser
def test_a_person_sees_the_run(local: LocalCluster, tmp_path: Path) -> None:
    """In a browser: the empty page, then a busy run whose numbers, reasons and bars are readable and do not overlap
    at 1280x800, its history drawn, then a second run beside it, and at last that the scheduler is gone."""

    async def look() -> None:
        with Client(local.scheduler_address, set_as_default=False) as client:
            await asyncio.to_thread(client.register_plugin, HeadroomPage())
            url = local.dashboard_link.replace("/status", "/headroom")
            async with browser.browse(url, tmp_path) as tab:
                await tab.wait_for("No run has reported")
                await tab.screenshot(tmp_path / "empty.png")
                remember_a_morning(board_of(local))
                await asyncio.to_thread(client.log_event, dashboard.TOPIC, message(full(), unix=time.time()))
                await tab.wait_for("phase6a")
                for words in (
                    "186 / 600 trials done 9 running 160.0 GiB headroom 1 d 02 h elapsed",
                    "mac-studio tcp://10.0.0.7:41233 pressure normal 5 of 8 slots free",
                    "capacity 100.0 GiB reserved 60.0 GiB used 40.0 GiB headroom 40.0 GiB",
                    "pressure hard closed: swap above 25 %",
                    "2B_h1/3/1 mac-studio 30.0 / 40.0 4 / 75 0.6123 2 h 07 min",
                    "200M_h3 3 / 50 – 0.594 waits for memory (needs 31.2 GiB)",
                    "closed: 5 trials in a row failed: ValueError: NaN loss",
                ):
                    assert words in await tab.wait_for(words)  # the parts of the page are filled one after another
                assert await tab.value(COLLISIONS) == []
                assert await tab.value("document.documentElement.scrollWidth <= window.innerWidth")
                used = await tab.value("deepAll('.worker .bar .used')[0].getBoundingClientRect().width")
                whole = await tab.value("deepAll('.worker .bar')[0].getBoundingClientRect().width")
                assert used == pytest.approx(0.4 * whole, rel=0.02)
                assert await tab.value("deepAll('canvas').filter((c) => c.width > 300 && c.height > 100).length") >= 4
                assert KILL in await tab.text()
                await tab.screenshot(tmp_path / "busy.png")
                for width, height in ((390, 3200), (1440, 1400), (1920, 1400)):
                    await tab.resize(width, height)
                    await tab.settled("deepAll('canvas').map((c) => c.width).join()")
                    await tab.screenshot(tmp_path / f"busy-{width}.png")
                    assert await tab.value(TOO_WIDE) == [], width
                    assert await tab.value(COLLISIONS) == [], width
                assert tab.errors == []
                for each in (message(full(), unix=time.time()), message(full("other"), key="other-1")):
                    await asyncio.to_thread(client.log_event, dashboard.TOPIC, each)
                await tab.wait_for("Runs on this cluster: other running phase6a running")
                await tab.screenshot(tmp_path / "two.png")
                await asyncio.to_thread(local.close)
                await tab.wait_for("Connection lost at")
                await tab.screenshot(tmp_path / "lost.png")

    asyncio.run(look())


@needs_browser
def test_a_person_sees_that_the_run_is_over(tmp_path: Path) -> None:
    """A run whose cluster is its own takes the page's server along: what stays says how it ended, and cries nothing."""

    async def look() -> None:
        cluster = await asyncio.to_thread(
            Cluster.local,
            slots=1,
            memory_bytes=2**30,
            topic="test",
            dashboard="127.0.0.1:0",
            scratch=str(tmp_path / "dask"),
        )
        feed = PageFeed(cluster, key="k", log=lambda event, **fields: None)
        url = await asyncio.to_thread(feed.start, str(cluster.dashboard))
        async with browser.browse(url, tmp_path) as tab:
            await asyncio.to_thread(feed.update, full())
            await tab.wait_for("186 / 600")
            await asyncio.to_thread(feed.end, "all studies reached their quota")
            await asyncio.to_thread(cluster.close)
            text = await tab.wait_for("The run is over: all studies reached their quota")
            await tab.screenshot(tmp_path / "over.png")
            assert "Connection lost" not in text
            assert tab.errors == []

    asyncio.run(look())
