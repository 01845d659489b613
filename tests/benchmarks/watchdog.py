"""Figures of the watchdog, beside Dask's Nanny and earlyoom where they have an answer.

Run: `python -m tests.benchmarks.watchdog` (some five minutes), or with the names of some of its parts. `growth` (ten
minutes) and `fast_growth` (six, and 16 GiB of real memory) run only when named; `growth:5` runs five rounds, not 20.

Real processes on this machine; limits are scaled where the real ones would take hours, and each line says so. earlyoom
(Debian package; $EARLYOOM or on the PATH) runs in a pid namespace of its own, so that it can choose only among the
processes of this benchmark. Needs root and Linux for the rows beside peers; other rows run anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scheduler.host import vitals
from scheduler.model import Pressure
from scheduler.model.samples import HostMemory, HostSample, TreeSample, TrialSample
from scheduler.watchdog.policy.eviction import Evaluator
from tests.faults.watchdog_harness import BUSY, HEALTHY, MIB, REPO, SILENT, Host, Trial, host
from tests.waiting import until

GIB = 2**30
HOG = """
import os, signal, sys, time
{ignores_sigterm}
mib, per_s, line = {mib}, {rate}, {line}
block, at = [], time.monotonic()
while len(block) < mib:
    piece = bytearray(1 << 20)
    for i in range(0, len(piece), 4096): piece[i] = 1
    block.append(piece)
    if len(block) == line: open({crossed!r}, "w").write(str(time.monotonic()))
    at += 1 / per_s
    time.sleep(max(0.0, at - time.monotonic()))
open({full!r}, "w").write("full")
time.sleep(600)
"""


def say(*words: Any) -> None:
    """One line, at once."""
    print(*words, flush=True)


def spread(values: list[float]) -> str:
    """p50, p99 and worst of some seconds."""
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"p50 {statistics.median(ordered):.2f} s  p99 {p99:.2f} s  (n={len(ordered)})"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is taken away again."""
    path = Path(tempfile.mkdtemp(prefix="headroom-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# -- its own cost ---------------------------------------------------------------------------------------------------


def own_cost(seconds: float = 40.0) -> None:
    """CPU and memory of the watchdog with 16 trials at the real, unscaled sampling."""
    with scratch() as root, host(root) as here:
        here.registry.thresholds({})
        watchdog = here.running()
        for i in range(16):
            here.trial(f"t{i}", "while True:\n    tick(); time.sleep(1.0)")
        pid, start = watchdog.pid, vitals.start_time(watchdog.pid)
        assert start is not None
        time.sleep(6.0)
        before = vitals.sample_tree(pid, start)
        time.sleep(seconds)
        after = vitals.sample_tree(pid, start, exact=True)
        assert before and after and before.cpu_s is not None and after.cpu_s is not None and after.footprint_bytes
        share = (after.cpu_s - before.cpu_s) / seconds
        status = Path(f"/proc/{pid}/status").read_text()
        rss = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
        processes = sum(name.isdigit() for name in os.listdir("/proc"))
        say(f"own CPU, 16 trials, {processes} processes on the host: {100 * share:.2f} % of a core (target < 0.5 %)")
        say(f"own memory: {after.footprint_bytes / MIB:.1f} MiB of its own, {rss:.1f} MiB resident (target < 30 MiB)")


# -- latency --------------------------------------------------------------------------------------------------------


def stall_latency_simulated(runs: int = 2000) -> None:
    """From the moment the ten minutes are full to the kill order, at the real sampling, over random phases."""
    dice, late = random.Random(0), []
    for _ in range(runs):
        evaluator, stopped, at = Evaluator(), dice.uniform(40.0, 70.0), dice.uniform(0.0, 5.0)
        cpu = 0.0
        while True:
            cpu = min(at, stopped)
            tree = TreeSample(footprint_bytes=GIB, swap_bytes=0, cpu_s=cpu, io_bytes=0, major_faults=0, states="S")
            trial = TrialSample(
                attempt="s/0/1", pid=9, start_time=1.0, launched=0.0, ticked_at=min(at, stopped // 1), tree=tree
            )
            memory = HostMemory(at=at, limit_bytes=100 * GIB, available_bytes=50 * GIB)
            if evaluator.observe(HostSample(at=at, interval_s=5.0, host=memory, trials=(trial,))).kill is not None:
                break
            at += 5.0 + dice.uniform(0.0, 0.05)
        late.append(at - stopped - evaluator.thresholds.stall_after_s)
    say(f"stall, beyond the 600 s limit (simulated clock, 5 s samples): {spread(late)}")


def stall_latency_real(rounds: int = 12) -> None:
    """The same with real processes and a limit of 1.5 s, to the death of the process."""
    ordered, dead = [], []
    with scratch() as root, host(root, breaker_kills=1000, cooldown_s=0.1) as here:
        here.running()
        for i in range(rounds):
            trial = here.trial(f"s{i}", SILENT)
            if not trial.done.wait(20.0) or trial.story is None:
                raise RuntimeError("not killed")
            steps, since = dict(trial.story.steps), float(trial.story.records[0]["since"])
            ordered.append(steps["intent"] - since - here.limits["stall_after_s"])
            dead.append(steps["dead"] - since - here.limits["stall_after_s"])
        say(f"stall, beyond a limit of 1.5 s (real processes, 0.1 s samples), to the order: {spread(ordered)}")
        say(f"  to confirmed death, 0.5 s of it for the Python stack:                     {spread(dead)}")
    say("  Dask Nanny: has no rule for it (worker-ttl asks the worker's event loop, not the trial). earlyoom: none.")


# One machine for both: 1000 MiB, the line at 200 MiB available. Ours sees it as its cgroup limit; earlyoom, which reads
# /proc/meminfo only, gets one that tells the same numbers, in a mount and pid namespace of its own.
MACHINE_MIB, LINE_MIB, OTHERS_MIB = 1000, 200, 40


def hog(root: Path, *, ignores_sigterm: bool = False, mib: int = 830, line: int = 700) -> tuple[str, Path]:
    """A script that takes 600 MiB/s and notes when it has passed `line` MiB."""
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if ignores_sigterm else ""
    crossed, full = root / "hog.crossed", root / "hog.full"
    path = root / "hog.py"
    path.write_text(
        HOG.format(mib=mib, rate=600, line=line, crossed=str(crossed), full=str(full), ignores_sigterm=ignore)
    )
    return str(path), crossed


def pressure_ours(rounds: int, ignores_sigterm: bool) -> None:
    """Three trials; one takes all."""
    times, extra, wrong, missed = [], 0, 0, 0
    for _ in range(rounds):
        # The real windows (12 of 15 s) are for people's machines; here both act at the first sight, as earlyoom does.
        limits = {
            "soft_free_share_no_swap": LINE_MIB / MACHINE_MIB,
            "soft_for_s": 0.1,
            "hard_free_share_no_swap": 0.0,
            "soft_grace_s": 10.0,
            "stall_after_s": 600.0,
        }
        with scratch() as root, host(root, **limits) as here:
            group = here.cgroup("memory", "bench", limit_in_bytes=MACHINE_MIB * MIB)
            here.running(cgroup=group)
            others = [here.trial(n, f"block = hold({OTHERS_MIB})\n" + HEALTHY, cgroup=group) for n in "ab"]
            path, crossed = hog(root, ignores_sigterm=ignores_sigterm)
            trial = here.trial("hog", f"tick()\nexec(open({path!r}).read())", cgroup=group)
            if not trial.done.wait(25.0) or trial.story is None:
                missed += 1
                continue
            time.sleep(2.0)
            times.append(dict(trial.story.steps)["dead"] - float(crossed.read_text()))
            extra += len(here.stories()) - 1
            wrong += sum(o.done.is_set() for o in others)
    tail = f"wrong victims {wrong}  extra kills {extra}  not killed {missed} of {rounds}"
    say(f"  watchdog:   {spread(times) if times else ''}  {tail}")


def pretend(file: Path, group: Path) -> None:
    """Write a /proc/meminfo for a machine of MACHINE_MIB in which the cgroup is all there is."""
    used = (
        vitals.system.numbers(vitals.system.read(f"{group}/memory.stat"), (b"total_rss",)).get(b"total_rss", 0) // 1024
    )
    values = {
        "MemTotal": MACHINE_MIB * 1024,
        "MemFree": MACHINE_MIB * 1024 - used,
        "MemAvailable": MACHINE_MIB * 1024 - used,
        "Cached": 0,
        "AnonPages": used,
        "SwapTotal": 0,
        "SwapFree": 0,
    }
    text = "".join(f"{name + ':':<16}{value:>8} kB\n" for name, value in values.items())
    fd = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.pwrite(fd, text.encode(), 0)  # the same length each time, in one write
    os.close(fd)


def pressure_earlyoom(program: str, rounds: int, ignores_sigterm: bool) -> None:
    """The same for earlyoom, which can see and choose only the three."""
    times, wrong, missed = [], 0, 0
    for _ in range(rounds):
        with scratch() as root, host(root) as here:
            group = here.cgroup("memory", "bench", limit_in_bytes=2 * MACHINE_MIB * MIB)
            path, crossed = hog(root, ignores_sigterm=ignores_sigterm)
            fake = root / "meminfo"
            pretend(fake, group)
            hold = root / "hold.py"
            hold.write_text(
                HOG.format(mib=OTHERS_MIB, rate=600, line=0, crossed="", full=str(root / "held"), ignores_sigterm="")
            )
            script = f"""
            mount --bind {fake} /proc/meminfo
            {program} -M {LINE_MIB * 1024},1 -r 0 > {root}/earlyoom.log 2>&1 &
            echo 0 > {group}/cgroup.procs
            for n in a b; do {sys.executable} -S {hold} & echo $! > {root}/$n.pid; done
            sleep 1
            {sys.executable} -S {path} &
            wait $!
            {sys.executable} -S -c 'import time; print(time.monotonic())' > {root}/died
            sleep 1
            for n in a b; do kill -0 $(cat {root}/$n.pid) 2>/dev/null && echo $n >> {root}/alive; done
            true
            """
            process = subprocess.Popen(
                ["unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c", script],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + 20.0
            while process.poll() is None and time.monotonic() < deadline:
                pretend(fake, group)
                time.sleep(0.01)
            if (root / "died").exists():
                times.append(float((root / "died").read_text()) - float(crossed.read_text()))
                alive = (root / "alive").read_text().split() if (root / "alive").exists() else []
                wrong += 2 - len(alive)
            else:
                missed += 1
            process.kill()  # with --kill-child all of its namespace goes with it
            process.wait()
    tail = f"wrong victims {wrong}  not killed within 15 s {missed} of {rounds}"
    say(f"  earlyoom:   {spread(times) if times else ''}  {tail}")


NANNY = """
import os, subprocess, sys, time
from dask.distributed import Client, LocalCluster

def run(path, child, note):
    with open(note, "a") as file: file.write("start\\n")
    if child: return subprocess.call([sys.executable, "-S", path])
    exec(open(path).read(), {{"__name__": "hog"}})

if __name__ == "__main__":
    path, child, note = sys.argv[1], sys.argv[2] == "child", sys.argv[3]
    cluster = LocalCluster(n_workers=1, threads_per_worker=1, memory_limit="450MiB", dashboard_address=":0")
    client = Client(cluster)
    future = client.submit(run, path, child, note, pure=False, retries=0)
    before = set(client.scheduler_info()["workers"])
    end = time.monotonic() + {seconds}
    while time.monotonic() < end and future.status == "pending":
        pids = list(client.nthreads())
        if before - set(pids): print("killed", time.monotonic(), flush=True); break
        time.sleep(0.02)
    if not child: time.sleep(12)
    print("status", future.status, flush=True)
    if child: os._exit(0)  # closing would wait for the child; the workers go with their parent
    client.close(); cluster.close()
"""


def end_what_runs(path: str) -> None:
    """End a hog that outlived its Dask cluster; the path is in this benchmark's own scratch folder, so it is ours."""
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        words = (vitals.system.read(f"/proc/{pid}/cmdline") or b"").split(b"\0")
        if words[-2:-1] == [path.encode()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def pressure_nanny() -> None:
    """A hog inside the worker, and one in a child process of the task (as trials are run here)."""
    for kind in ("worker", "child"):
        with scratch() as root:
            path, crossed = hog(root, mib=600, line=300)
            main = root / "main.py"
            main.write_text(NANNY.format(seconds=15))
            words = [sys.executable, str(main), path, kind, str(root / "starts")]
            with open(root / "out", "wb") as file:  # not a pipe: the child would hold it open
                subprocess.run(words, stdout=file, stderr=subprocess.DEVNULL, timeout=90, cwd=root, check=False)
            out = (root / "out").read_text()
            starts = len((root / "starts").read_text().splitlines())
            killed = re.search(r"killed ([\d.]+)", out)
            if kind == "worker" and killed:
                first = float(crossed.read_text()) if starts == 1 else None
                after = "" if first is None else f"{float(killed[1]) - first:.2f} s after the line, "
                say(f"  Dask Nanny: worker killed {after}the task was started {starts} x (retries=0)")
            elif kind == "worker":
                say(f"  Dask Nanny: worker not killed within 15 s ({out.strip()})")
            else:
                seen = "killed" if killed else "not noticed within 15 s (it reads the worker's own RSS)"
                say(f"  Dask Nanny, the hog in a child process: {seen}")
            end_what_runs(path)


# -- time that is left ----------------------------------------------------------------------------------------------

GROWER = """
import time
piece, per_s = {piece}, {rate}
tick()
blocks, at = [], time.monotonic()
while True:
    blocks.append(b"\\xff" * (piece << 20))
    at += piece / per_s
    time.sleep(max(0.0, at - time.monotonic()))
    if len(blocks) % 16 == 0: tick()
"""


def growth(rounds: int = 20) -> None:
    """What reached the kernel's killer before: 50 MiB/s in 2 GiB."""
    race(2048, 50, 300, rounds)


def fast_growth(rounds: int = 20) -> None:
    """1 GiB/s in 16 GiB."""
    race(16384, 1024, 2048, rounds)


def race(limit_mib: int, rate_mib: int, promise_mib: int, rounds: int) -> None:
    """At the real thresholds: a trial that grows without end beside two that keep their promise, in a cgroup."""
    times, left, over, first, bystanders, missed = [], [], [], 0, 0, 0
    for n in range(rounds):
        with scratch() as root, host(root) as here:
            here.registry.thresholds({})
            group = here.cgroup("memory", f"growth{limit_mib}-{n}", limit_in_bytes=limit_mib * MIB)
            here.running(cgroup=group)
            promise = promise_mib * MIB
            held = f"block = hold({int(0.8 * promise_mib)})\n" + HEALTHY
            others = [here.trial(name, held, reservation_bytes=promise, cgroup=group) for name in "ab"]
            script = GROWER.format(piece=max(1, rate_mib // 50), rate=rate_mib)
            began = time.monotonic()
            trial = here.trial("grower", script, reservation_bytes=promise, cgroup=group)
            if not trial.done.wait(120.0):
                missed += 1
                continue
            lines = (group / "memory.oom_control").read_text().split()
            kernel = int(lines[lines.index("oom_kill") + 1])
            story, bystanders = trial.story, bystanders + sum(o.done.is_set() for o in others)
            if kernel or story is None or not story.signalled:
                missed += 1
                continue
            first += 1
            evidence = story.evidence
            times.append(dict(story.steps)["dead"] - dict(story.steps)["intent"])
            left.append(evidence["available_bytes"] / MIB)
            over.append(evidence["footprint_bytes"] / promise)
            rates = evidence["footprint_bytes"] / MIB / (dict(story.steps)["intent"] - began)
    say(f"growth {rate_mib} MiB/s in {limit_mib} MiB ({rates:.0f} MiB/s on average in the last round): the watchdog "
        f"before the kernel {first} of {rounds}, the kernel {missed}, bystanders ended {bystanders}")  # fmt: skip
    say(f"  when ordered: {statistics.median(left):.0f} MiB left (least {min(left):.0f}), "
        f"the grower at {statistics.median(over):.1f} x its promise (most {max(over):.1f})")  # fmt: skip
    say(f"  order to death: {spread(times)}")


# -- errors ---------------------------------------------------------------------------------------------------------


def any_done(trials: Sequence[Trial]) -> bool:
    """Whether one of them has ended."""
    return any(trial.done.is_set() for trial in trials)


def elected_twice(here: Host) -> bool:
    """Whether a second watchdog has won."""
    return len(here.saw("watchdog.elected")) == 2


def four_at_once(rounds: int = 6) -> None:
    """Four trials over a real cgroup limit: how many die beyond the one that is needed, and who."""
    kills, kernel = [], 0
    for _ in range(rounds):
        with scratch() as root, host(root, own_share=0.25) as here:
            group = here.cgroup("memory", "bench", limit_in_bytes=400 * MIB)
            here.running(cgroup=group)
            trials = [here.trial(n, "block = hold(85)\n" + HEALTHY, cgroup=group) for n in "abcd"]
            until(functools.partial(any_done, trials), 20.0, "one dies")
            time.sleep(2.5)
            kills.append(len(here.stories()))
            kernel += sum((t.state or "").startswith("FAIL") for t in trials)
    say(f"four trials over the line at once, {rounds} times: {sum(kills) - rounds} extra kills, kernel kills {kernel}")


def soak_simulated(hours: float = 24.0, trials: int = 16) -> None:
    """A day of healthy trials of all kinds at the real thresholds, with missing samples and restless memory."""
    dice, evaluator, kills, at = random.Random(1), Evaluator(), 0, 0.0
    cpu = [0.0] * trials
    ticked = [0.0] * trials
    paused = [0.0] * trials
    levels: dict[Pressure, int] = dict.fromkeys(Pressure, 0)
    began = time.perf_counter()
    while at < hours * 3600:
        at += 5.0
        samples = []
        for i in range(trials):
            kind = i % 6
            states = "R"
            if kind == 0:  # computes
                cpu[i] += 4.5
                ticked[i] = at
            elif kind == 1:  # a GPU trial: ticks each minute, almost no CPU
                cpu[i] += 0.001
                ticked[i] = at - at % 60
                states = "S"
            elif kind == 2:  # long epochs without a tick
                cpu[i] += 0.3
                ticked[i] = at - at % 5400
            elif kind == 3:  # computes for a minute, then waits nine for a file system, and ticks after it
                cpu[i] += 4.0 if at % 600 < 60 else 0.0
                ticked[i] = at - at % 600
                states = "D"
            elif kind == 4:  # is stopped by somebody for half an hour at a time
                paused[i] = at % 7200
                states = "T" if paused[i] < 1800 else "R"
                if states == "R":
                    cpu[i] += 4.0
                    ticked[i] = at
            else:  # background of a Mac: a twelfth of its speed
                cpu[i] += 0.06
                ticked[i] = at - at % 240
                states = "S"
            tree = None
            if dice.random() > 0.02:
                held = int((4 + 1.5 * dice.random()) * GIB)
                tree = TreeSample(footprint_bytes=held, swap_bytes=int(0.3 * GIB), cpu_s=cpu[i], io_bytes=0,
                                  major_faults=int(at / 10), states=states, exact=True)  # fmt: skip
            samples.append(TrialSample(attempt=f"s/{i}/1", pid=100 + i, start_time=1.0, launched=0.0,
                                       promised_bytes=5 * GIB, uses_device=kind == 1, ticked_at=ticked[i],
                                       tree=tree))  # fmt: skip
        free = (0.12 + 0.2 * dice.random()) * 128 * GIB
        memory = HostMemory(at=at, limit_bytes=128 * GIB, available_bytes=int(free), swap_total_bytes=16 * GIB,
                            swap_free_bytes=6 * GIB, paging_bytes=int(at * 2**18), psi_some_avg10=dice.random() * 8,
                            psi_full_avg10=dice.random() * 4, psi_full_avg60=1.0)  # fmt: skip
        decision = evaluator.observe(HostSample(at=at, interval_s=5.0, host=memory, trials=tuple(samples)))
        levels[decision.level] += 1
        kills += decision.kill is not None
    per_sample = (time.perf_counter() - began) / (hours * 720)
    say(f"soak, simulated: {hours * trials:.0f} healthy trial-hours at the real thresholds: {kills} false kills")
    say(f"  (evaluation of one sample of {trials} trials, its making included: {1e3 * per_sample:.2f} ms)")


def soak_forecast(hours: float = 24.0, trials: int = 16) -> None:
    """A day at one look a second on a restless host: trials that load their promise within seconds, every fourth one
    a fifth over it for good, and other programs that take gigabytes a second and stop a little above SOFT."""
    dice, evaluator, kills, at = random.Random(2), Evaluator(), 0, 0.0
    size = 128 * GIB
    held, goal, promise = [0] * trials, [0] * trials, 4 * GIB
    others, aim, pace = 20 * GIB, 20 * GIB, GIB
    levels: dict[Pressure, int] = dict.fromkeys(Pressure, 0)
    forecasts = 0
    while at < hours * 3600:
        at += 1.0
        for i in range(trials):
            if dice.random() < 1 / 1200:
                held[i] = 300 * MIB  # a new trial begins to load
            goal[i] = int(promise * (1.2 if i % 4 == 0 else 0.97))
            held[i] = min(goal[i], held[i] + int(dice.uniform(0.5, 3.0) * GIB))
        if dice.random() < 1 / 120:
            room = size - sum(goal) - int(dice.uniform(0.085, 0.4) * size)
            aim, pace = dice.choice([20 * GIB, room]), int(dice.uniform(0.2, 8.0) * GIB)
        others += max(-pace, min(pace, aim - others)) + int(dice.gauss(0, 20 * MIB))
        free = size - sum(held) - others
        memory = HostMemory(at=at, limit_bytes=size, available_bytes=free, swap_total_bytes=0, swap_free_bytes=0)
        samples = None
        if at % 5 == 0 or evaluator.host.level is not Pressure.NORMAL:
            samples = tuple(
                TrialSample(attempt=f"s/{i}/1", pid=100 + i, start_time=1.0, launched=0.0, promised_bytes=promise,
                            ticked_at=at, tree=TreeSample(footprint_bytes=held[i], swap_bytes=0, cpu_s=at, io_bytes=0,
                                                          major_faults=0, states="R", exact=True))
                for i in range(trials)
            )  # fmt: skip
        decision = evaluator.observe(HostSample(at=at, interval_s=1.0, host=memory, trials=samples))
        levels[decision.level] += 1
        forecasts += decision.level_reason == "running_out"
        kills += decision.kill is not None
    say(f"soak, simulated, a look a second, restless memory: {hours * trials:.0f} trial-hours, {kills} false kills; "
        f"the forecast was on {forecasts} s, HARD {levels[Pressure.HARD]} s")  # fmt: skip


def soak_real(seconds: float = 45.0) -> None:
    """Real healthy trials of all kinds with limits a four-hundredth of the real ones."""
    with scratch() as root, host(root) as here:
        here.running()
        here.trial("healthy", HEALTHY)
        here.trial("busy", BUSY)
        here.trial("gpu", "while True:\n    tick(); time.sleep(1.2)", uses_device=True)
        here.trial("grow", "block = hold(60)\n" + HEALTHY, reservation_bytes=50 * MIB)
        here.trial("tree", "tick()\nsubprocess.call([sys.executable, '-S', '-c', "
                   "'import time\\nwhile True: sum(range(20000)); time.sleep(0.02)'])")  # fmt: skip
        here.trial("short", "for i in range(200):\n    tick(); hold(5); time.sleep(0.4)")
        stopped = here.trial("stopped", HEALTHY)
        os.kill(stopped.process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        hours = len(here.trials) * seconds * 400 / 3600
        say(f"soak, real processes, limits / 400: {len(here.stories())} false kills in {len(here.trials)} trials x "
            f"{seconds:.0f} s (as {hours:.0f} trial-hours)")  # fmt: skip


def takeover(rounds: int = 5) -> None:
    """SIGKILL of the watchdog to the standby's election."""
    times = []
    for _ in range(rounds):
        with scratch() as root, host(root) as here:
            first = here.running()
            here.watchdog()
            time.sleep(1.0)
            died = time.time()
            first.kill()
            first.wait()
            until(functools.partial(elected_twice, here), 10.0, "the standby is elected")
            times.append(here.saw("watchdog.elected")[1]["unix"] - died)
    say(f"standby takes over after SIGKILL: {spread(times)} (target 2 s)")


def main(parts: list[str]) -> None:
    """Print all figures, or those of these parts."""
    assert REPO.exists()
    say(f"watchdog figures, {os.cpu_count()} cores, {(vitals.host_memory().total_bytes or 0) / GIB:.0f} GiB, "
        f"{os.uname().sysname} {os.uname().release}")  # fmt: skip
    for part in parts:
        name, _, rounds = part.partition(":")
        globals()[name](*([int(rounds)] if rounds else []))
    if parts:
        return
    own_cost()
    stall_latency_simulated()
    stall_latency_real()
    takeover()
    soak_simulated()
    soak_forecast()
    soak_real()
    if sys.platform != "linux" or os.geteuid() != 0:
        say("the rows under real memory pressure need Linux and root")
        return
    four_at_once()
    earlyoom = os.environ.get("EARLYOOM") or shutil.which("earlyoom")
    say("pressure on a machine of 1000 MiB: one of three takes 600 MiB/s; from 200 MiB available to its death")
    pressure_ours(6, ignores_sigterm=False)
    if earlyoom:
        pressure_earlyoom(earlyoom, 6, ignores_sigterm=False)
    pressure_nanny()
    say("the same, the process ignores SIGTERM (grace of the watchdog: 10 s, by time)")
    pressure_ours(2, ignores_sigterm=True)
    if earlyoom:
        pressure_earlyoom(earlyoom, 2, ignores_sigterm=True)
    if not earlyoom:
        say("  earlyoom: not installed (apt-get install earlyoom, or set EARLYOOM)")


if __name__ == "__main__":
    main(sys.argv[1:])
