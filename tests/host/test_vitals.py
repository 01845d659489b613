"""The vitals: identities, trees, limits and counters read right, and None wherever something could not be read."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.host import vitals
from scheduler.host.vitals import macos
from scheduler.model.samples import HostSample, TrialSample
from scheduler.watchdog.policy.eviction import Evaluator

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
if sys.platform == "linux":
    from scheduler.host.vitals import linux

MIB = 2**20
HOLD = "b = bytearray({mib} << 20)\nfor i in range(0, len(b), 4096): b[i] = 1\nprint('ready', flush=True)\ninput()"


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own that holds 40 MiB, with a child that holds 20."""
    child = HOLD.format(mib=20)
    code = (
        f"import subprocess, sys\nc = subprocess.Popen([sys.executable, '-S', '-c', {child!r}], stdin=subprocess.PIPE, "
        f"stdout=subprocess.PIPE, text=True)\nc.stdout.readline()\n" + HOLD.format(mib=40)
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline().strip() == "ready"
    yield process
    process.kill()
    process.communicate()


def test_host_memory_is_plausible() -> None:
    """The limit is at most the RAM, available at most the limit."""
    host = vitals.host_memory()
    assert host.total_bytes and host.limit_bytes and host.available_bytes
    assert 0 < host.available_bytes <= host.limit_bytes <= host.total_bytes
    assert host.free_share is not None and 0 < host.free_share <= 1


@linux_only
def test_tree_is_measured_whole(holder: subprocess.Popen[str]) -> None:
    """A child's memory counts; the exact measurement is not above the cheap one."""
    start = vitals.start_time(holder.pid)
    assert start is not None
    cheap, exact = vitals.sample_tree(holder.pid, start), vitals.sample_tree(holder.pid, start, exact=True)
    assert cheap is not None and cheap.footprint_bytes is not None and cheap.processes == 2
    assert 60 * MIB <= cheap.footprint_bytes <= 90 * MIB
    assert exact is not None and exact.exact and exact.footprint_bytes is not None
    assert 60 * MIB <= exact.footprint_bytes <= cheap.footprint_bytes + MIB
    peak = vitals.peak_bytes(holder.pid)
    assert peak is not None and peak >= 40 * MIB
    assert vitals.own_bytes() > MIB


@linux_only
def test_another_process_with_the_same_pid_is_not_it(holder: subprocess.Popen[str]) -> None:
    """Identity is pid and start time: with another start time nothing is measured."""
    assert vitals.sample_tree(holder.pid, 12345.0) is None
    assert vitals.living(holder.pid, 12345.0) == set()
    assert vitals.start_time(2**22 - 1) is None and vitals.peak_bytes(2**22 - 1) is None


@linux_only
def test_zombie_holds_nothing() -> None:
    """A dead child that nobody has waited for is not living, and its footprint is 0, not unknown."""
    process = subprocess.Popen(["true"])
    start = vitals.start_time(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start is not None and vitals.living(process.pid, start) == set()
    sample = vitals.sample_tree(process.pid, start)
    assert sample is not None and sample.footprint_bytes == 0 and sample.states == "Z"
    process.wait()


@linux_only
@pytest.mark.parametrize(
    ("line", "pid", "state"),
    [
        (b"7 (a b) c) R 1 7 7 0 -1 0 1 2 3 4 10 20 30 40 20 0 2 0 999 0 0", 7, "R"),
        (b"7 (a) R 1 7 7 0 -1 0 1 2 3 4 10 20 30 40 20 0 2 0 9", None, None),
        (b"7 (x", None, None),
        (b"", None, None),
        (None, None, None),
    ],
)
def test_stat_lines(line: bytes | None, pid: int | None, state: str | None) -> None:
    """A name may hold brackets and spaces; a torn line is None."""
    proc = linux.parse_stat(line)
    assert (None if proc is None else (proc.pid, proc.state)) == (None if pid is None else (pid, state))
    if proc is not None:
        assert (proc.cpu_ticks, proc.start, proc.major_faults, proc.threads) == (100, 999.0, 7, 2)


@linux_only
def test_members_of_a_tree() -> None:
    """Descendants, the session, and those seen before; not a newcomer under a pid that was used again."""

    def proc(pid: int, ppid: int, session: int, start: float = 5.0) -> Any:
        return linux.Proc(pid, ppid, session, "S", start, 0, 0, 1)

    table = {p.pid: p for p in (
        proc(1, 0, 1), proc(10, 1, 10), proc(11, 10, 10), proc(12, 11, 12), proc(13, 1, 10), proc(14, 1, 14),
        proc(15, 14, 14), proc(16, 1, 16, 9.0), proc(20, 1, 20),
    )}  # fmt: skip
    known = ((14, 5.0), (16, 5.0))
    assert {p.pid for p in linux.members(10, 5.0, table, known)} == {10, 11, 12, 13, 14, 15}
    del table[10]
    assert {p.pid for p in linux.members(10, 5.0, table, ((11, 5.0),))} == {11, 12}
    assert {p.pid for p in linux.members(10, 4.0, table, ((1, 5.0),))} & {1} == set()


@linux_only
def test_cgroup_limit_bounds_the_host(tmp_path: Path) -> None:
    """The smallest limit of the chain counts, its file cache does not, in v1 and in v2."""
    v2 = tmp_path / "v2"
    v2.mkdir()
    (v2 / "memory.max").write_text(f"{1000 * MIB}\n")
    (v2 / "memory.current").write_text(f"{900 * MIB}\n")
    (v2 / "memory.stat").write_text(f"anon 5\ninactive_file {200 * MIB}\nactive_file {100 * MIB}\n")
    (v2 / "memory.swap.max").write_text("max\n")
    (v2 / "memory.events").write_text("oom 1\noom_kill 3\n")
    v1 = tmp_path / "v1"
    v1.mkdir()
    (v1 / "memory.limit_in_bytes").write_text(f"{800 * MIB}\n")
    (v1 / "memory.usage_in_bytes").write_text(f"{300 * MIB}\n")
    (v1 / "memory.stat").write_text(f"total_inactive_file {MIB}\ntotal_active_file 0\ntotal_swap {10 * MIB}\n")
    (v1 / "memory.memsw.limit_in_bytes").write_text(f"{900 * MIB}\n")
    probe = linux.HostProbe()
    probe.chain = [linux.CgroupLevel(str(v2), 2), linux.CgroupLevel(str(v1), 1)]
    host = probe.read(1.0)
    assert host.limit_bytes == 800 * MIB and host.available_bytes == 400 * MIB
    assert linux.CgroupLevel(str(v1), 1).swap() == (100 * MIB, 90 * MIB)
    assert linux.CgroupLevel(str(v2), 2).swap() is None
    assert linux.CgroupLevel(str(v2), 2).oom_kills() == 3
    (v1 / "memory.usage_in_bytes").unlink()
    assert probe.read(2.0).available_bytes is None  # a probe that fails closes, it never opens


@linux_only
def test_missing_pressure_and_swap_counters_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without PSI gives None, not 0."""
    real = linux.read
    hidden = ("/proc/pressure/memory", "/proc/vmstat")
    monkeypatch.setattr(linux, "read", lambda path, size=65536: None if path in hidden else real(path, size))
    host = linux.HostProbe().read(1.0)
    assert host.psi_full_avg10 is None and host.paging_bytes is None and host.available_bytes


@linux_only
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), rate=st.floats(0.0, 1.0))
def test_failing_readers(
    holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, seed: int, rate: float
) -> None:
    """Readers that fail or fall short at random never raise, and what they could not read is never too small a number.

    A footprint that is given is whole, and a trial that cannot be read is not killed for it.
    """
    dice, real = random.Random(seed), linux.read

    def failing(path: str, size: int = 65536) -> bytes | None:
        text = real(path, size)
        if dice.random() >= rate or text is None:
            return text
        return dice.choice([None, b"", text[: dice.randrange(len(text) + 1)]])

    start = linux.start_time(holder.pid)
    assert start is not None
    evaluator = Evaluator()
    with monkeypatch.context() as patch:
        patch.setattr(linux, "read", failing)
        for i in range(5):
            tree = vitals.sample_tree(holder.pid, start)
            if tree is not None and tree.footprint_bytes is not None and tree.processes == 2 and "Z" not in tree.states:
                assert tree.footprint_bytes >= 60 * MIB
            trial = TrialSample(
                attempt="s/0/1", pid=holder.pid, start_time=start, launched=0.0, ticked_at=130.0 * i, tree=tree
            )
            host = linux.HostProbe().read(130.0 * i)
            decision = evaluator.observe(HostSample(at=130.0 * i, interval_s=130.0, host=host, trials=(trial,)))
            assert decision.kill is None
            vitals.peak_bytes(holder.pid), vitals.living(holder.pid, start), vitals.oom_kills()


def test_oom_witness_needs_both_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL alone, or a counted kill alone, does not show that the kernel did it."""
    counts = iter([5, 5, 6, 6, None])
    monkeypatch.setattr(vitals.system, "oom_kills", lambda chain=None: next(counts))
    witness = vitals.OomWitness()
    assert not witness.is_oom_kill(-9)
    assert witness.is_oom_kill(-9) and witness.is_oom_kill(137)
    assert not witness.is_oom_kill(-15) and not witness.is_oom_kill(0) and not witness.is_oom_kill(None)
    assert not witness.is_oom_kill(-9)


# -- macOS, as far as it can be tried elsewhere ---------------------------------------------------------------------


def test_rusage_layout() -> None:
    """phys_footprint and its lifetime maximum are where sys/resource.h puts them in rusage_info_v4."""
    values = list(range(100, 135))
    buffer = b"u" * 16 + struct.pack("=35Q", *values)
    usage = macos.parse_rusage(buffer)
    assert usage == macos.Rusage(104, 107, 128, 116, 117)
    assert macos.parse_rusage(buffer[:-1]) is None


def test_compressed_process_is_judged_by_its_footprint(monkeypatch: pytest.MonkeyPatch, holder: Any) -> None:
    """A process whose resident size macOS has compressed away is counted with all it holds."""
    usage = macos.Rusage(
        pageins=9, footprint_bytes=13 * 2**30, peak_footprint_bytes=14 * 2**30, read_bytes=0, written_bytes=0
    )
    monkeypatch.setattr(macos, "_rusage", lambda pid: usage)
    start = macos.start_time(holder.pid)
    assert start is not None
    tree = macos.sample(macos.members(holder.pid, start, macos.process_table()), False)
    assert tree is not None and tree.footprint_bytes == 2 * 13 * 2**30 and tree.major_faults == 18
    assert tree.swap_bytes is None
    assert macos.peak_bytes(holder.pid) == 14 * 2**30


def test_footprint_that_macos_refuses_is_none(holder: Any) -> None:
    """Without proc_pid_rusage (another user's process, another system) the footprint is unknown, not RSS."""
    if sys.platform == "darwin":
        pytest.skip("there it answers")
    start = macos.start_time(holder.pid)
    assert start is not None
    tree = macos.sample(macos.members(holder.pid, start, macos.process_table()), False)
    assert tree is not None and tree.footprint_bytes is None and tree.cpu_s is not None


def test_swap_growth_counts_as_paging(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's sin/sout are page-ins on macOS, so only growth of used swap counts, and shrinking does not undo it."""
    swap = iter([(8, 2), (8, 5), (8, 1), (8, 4)])

    class Swap:
        def __init__(self, total: int, used: int) -> None:
            self.total, self.used, self.free = total, used, total - used

    monkeypatch.setattr(psutil, "swap_memory", lambda: Swap(*next(swap)))
    probe = macos.HostProbe()
    assert [probe.read(float(i)).paging_bytes for i in range(4)] == [0, 3, 3, 6]
