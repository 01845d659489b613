"""The host registry: what is written is read back whole, by other processes too, and old or torn things are no harm."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from scheduler.files.durable import read_json, write_json
from scheduler.host import registry as registry_module
from scheduler.host.registry import HostReading, HostRegistry, Registration, boot_id
from scheduler.model import HeadroomError, Pressure, UsageError
from scheduler.watchdog import watchdog
from scheduler.watchdog.election import Election

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def registry(tmp_path: Path) -> HostRegistry:
    """An empty registry."""
    return HostRegistry(tmp_path / "host")


def registration(folder: Path, **more: Any) -> Registration:
    """A registration of this very process."""
    fields: dict[str, Any] = {"attempt": "s/1/1", "slug": "s.t0001.a1", "pid": os.getpid(), "start_time": 5.0}
    return Registration(**{**fields, "reservation_bytes": 1000, "folder": str(folder), **more})


def test_registration_round_trip(registry: HostRegistry, tmp_path: Path) -> None:
    """What an agent registers the watchdog reads, until it is deregistered, twice if need be."""
    reg = registration(tmp_path, mode="observe", uses_device=True, owner_start=3.0)
    registry.register(reg)
    assert list(registry.registrations()) == [reg]
    registry.deregister(reg)
    registry.deregister(reg)
    assert list(registry.registrations()) == []
    assert os.listdir(Path(registry.root) / "attempts") == []


def test_default_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$HEADROOM_HOST_DIR names the root; it is private to its user."""
    monkeypatch.setenv("HEADROOM_HOST_DIR", str(tmp_path / "mine"))
    registry = HostRegistry.default()
    assert registry.root == str(tmp_path / "mine")
    assert os.stat(registry.root).st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a folder somebody else's")
def test_a_root_of_another_user_is_refused(tmp_path: Path) -> None:
    """In a shared temporary folder somebody may have made the root first: that is an error, not a trap."""
    os.makedirs(tmp_path / "host" / "attempts")
    os.chown(tmp_path / "host", 12345, 12345)
    with pytest.raises(HeadroomError, match="HEADROOM_HOST_DIR"):
        HostRegistry(tmp_path / "host")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a link somebody else's")
@pytest.mark.parametrize("where", ["host", "host/attempts"])
def test_somebody_elses_link_is_not_followed(tmp_path: Path, where: str) -> None:
    """A link put in our place in a shared folder: refused with the way out, and what it points to stays as it was."""
    target = tmp_path / "target"
    target.mkdir(mode=0o755)
    link = tmp_path / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    os.lchown(link, 12345, 12345)
    with pytest.raises(UsageError, match=f"{link} .*symbolic link.*HEADROOM_HOST_DIR"):
        HostRegistry(tmp_path / "host")
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(target.iterdir()) == []


def test_ones_own_link_is_followed(tmp_path: Path) -> None:
    """A user may keep the folder elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "host").symlink_to(tmp_path / "elsewhere")
    assert HostRegistry(tmp_path / "host").root == str(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file somebody else's")
def test_a_folder_in_which_others_have_written_is_refused(tmp_path: Path) -> None:
    """It was open to all, and something of another user's is in it: it is closed, not used."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host").chmod(0o777)
    (tmp_path / "host" / "kills.jsonl").write_text("{}")
    os.chown(tmp_path / "host" / "kills.jsonl", 12345, 12345)
    with pytest.raises(UsageError, match=r"kills\.jsonl belongs to user 12345"):
        HostRegistry(tmp_path / "host")


def test_links_in_place_of_files_are_not_written_through(registry: HostRegistry, tmp_path: Path) -> None:
    """Each file that the registry writes or appends to."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    reg = registration(tmp_path)
    for name in ("kills.jsonl", f"attempts/{reg.key}.tick", "spare", "watchdog.lock", "watchdog.log"):
        (Path(registry.root) / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        registry.record("k", "intent", 1.0)
    with pytest.raises(OSError, match="symbolic"):
        registry.tick(reg, 1, 2.0)
    registry.keep_spare()
    assert not Election(registry).won()
    with pytest.raises(OSError, match="symbolic"):
        watchdog.start(registry.root)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "root", ["/proc/nowhere/host", "/dev/null/host", "/dev/null"], ids=["no file system", "below a file", "a file"]
)
def test_a_root_that_cannot_be_made_is_one_line(root: str) -> None:
    """What, why, and the way out."""
    with pytest.raises(UsageError, match=r"cannot be used \(.+\): set HEADROOM_HOST_DIR") as caught:
        HostRegistry(root)
    assert "symbolic link" not in str(caught.value)


def test_a_root_that_was_removed_is_made_again(registry: HostRegistry, tmp_path: Path) -> None:
    """A cleaner of /tmp: whoever asks makes it anew, private again, and sees what is no longer in it."""
    reg = registration(tmp_path)
    registry.register(reg)
    registry.thresholds({"sample_s": 1.0})
    registry.ensure()
    assert registry.knows(reg) and registry.policy()[0]
    election = Election(registry)
    assert election.won()
    shutil.rmtree(registry.root)
    assert list(registry.registrations()) == []
    assert election.won()  # on a new lock
    registry.ensure()
    assert os.stat(registry.root).st_mode & 0o777 == 0o700
    assert not registry.knows(reg) and not registry.policy()[0]
    registry.register(reg)
    assert list(registry.registrations()) == [reg]


def test_ticks(registry: HostRegistry, tmp_path: Path) -> None:
    """The last tick wins, also a shorter line after a longer one; before the first there is none."""
    reg = registration(tmp_path)
    assert registry.last_tick(reg) is None
    registry.tick(reg, 1_000_000, 123456.789, saved_at=99.5)
    registry.tick(reg, 7, 5.25)
    assert registry.last_tick(reg) == (7, 5.25, None)


def test_resizing_remembers_the_promise(registry: HostRegistry, tmp_path: Path) -> None:
    """Growth granted later does not raise what the trial promised; tightening lowers it."""
    reg = registry.resized(registration(tmp_path), 1500)
    assert (reg.reservation_bytes, reg.promised) == (1500, 1000)
    reg = registry.resized(reg, 800)
    registry.register(reg)
    assert (reg.reservation_bytes, reg.promised) == (800, 800)
    assert list(registry.registrations()) == [reg]


def test_registrations_of_another_boot_are_swept(registry: HostRegistry, tmp_path: Path) -> None:
    """After a restart of the machine every registered process is gone, whatever pids are in use."""
    registry.register(registration(tmp_path, boot_id="another"))
    assert list(registry.registrations()) == []
    assert os.listdir(Path(registry.root) / "attempts") == []


def test_unreadable_registrations_are_passed_over(registry: HostRegistry, tmp_path: Path) -> None:
    """A torn or foreign file does not hide the others."""
    reg = registration(tmp_path)
    registry.register(reg)
    (Path(registry.root) / "attempts" / "torn.1.json").write_text('{"attempt": "s/')
    (Path(registry.root) / "attempts" / "other.2.json").write_text('{"version": 9}')
    assert list(registry.registrations()) == [reg]


def test_reading_goes_stale(registry: HostRegistry) -> None:
    """A reading older than 5 s, of the future, or of another boot is None: closed, never open."""
    assert registry.pressure() is None
    registry.publish(HostReading(at=100.0, level=Pressure.SOFT, closed_reason="x", available_bytes=None))
    reading = registry.pressure(now=104.0)
    assert reading is not None and reading.level is Pressure.SOFT and reading.available_bytes is None
    assert registry.pressure(now=105.5) is None
    assert registry.pressure(now=50.0) is None
    data = read_json(os.path.join(registry.root, "host.json")) or {}
    write_json(os.path.join(registry.root, "host.json"), {**data, "boot_id": "another"})
    assert registry.pressure(now=104.0) is None


def test_a_watchdog_of_another_version_closes_the_host_in_one_line(registry: HostRegistry) -> None:
    """Its reading may hold anything: what is spoken on which side is why nothing starts, and no field is looked at."""
    path = os.path.join(registry.root, "host.json")
    write_json(path, {"protocol": 2, "boot_id": boot_id(), "pressure": "fine"})
    reading = registry.pressure()
    assert reading is not None and reading.closed_reason is not None
    assert "the watchdog of this host speaks protocol 2, this Headroom 1: install the same" in reading.closed_reason
    for damaged in ({"at": "now"}, {"level": 9}, {}):
        write_json(path, {"protocol": 1, "boot_id": boot_id(), **damaged})
        assert registry.pressure() is None


def test_kill_stories(registry: HostRegistry) -> None:
    """A story is told from its intent on; a kill called off does not hide a later one that was not."""
    assert registry.kill_of("s/1/1", 7) is None
    start: dict[str, Any] = {"attempt": "s/1/1", "pid": 7, "start_time": 1.0, "rule": "stalled", "reason": "stalled"}
    registry.record("k1", "intent", 1.0, boot_id=boot_id(), **start)
    registry.record("k1", "aborted", 2.0)
    story = registry.kill_of("s/1/1", 7)
    assert story is not None and story.aborted and story.finished and not story.signalled
    registry.record("k2", "intent", 3.0, boot_id=boot_id(), **start)
    registry.record("k2", "term", 4.0)
    story = registry.kill_of("s/1/1", 7)
    assert story is not None and story.kill_id == "k2" and story.signalled and not story.finished
    registry.record("k2", "dead", 5.0, seconds=4.5)
    registry.record("k2", "released", 6.0)
    story = registry.kill_of("s/1/1", 7)
    assert story is not None and story.finished and story.seconds == 4.5
    assert registry.kill_of("s/1/1", 8) is None
    assert [name for name, _ in story.steps] == ["intent", "term", "dead", "released"]


def test_observations_are_no_kills(registry: HostRegistry) -> None:
    """What observe mode would have killed is in the journal and is not a story."""
    registry.record("k1", "would_kill", 1.0, attempt="s/1/1", pid=7, boot_id=boot_id())
    assert registry.kills() == [] and registry.kill_of("s/1/1", 7) is None


def test_torn_last_line(registry: HostRegistry) -> None:
    """A crash in the middle of a line costs that line only; the next one is whole."""
    registry.record("k1", "intent", 1.0, attempt="s/1/1", pid=7, boot_id=boot_id())
    with open(os.path.join(registry.root, "kills.jsonl"), "a") as file:
        file.write('{"kill_id": "k1", "st')
    registry.record("k1", "term", 2.0)
    assert [name for name, _ in registry.kills()[0].steps] == ["intent", "term"]


def test_compacting_keeps_what_is_unfinished(registry: HostRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal grown too long loses its oldest finished kills, never one that is under way."""
    monkeypatch.setattr(registry_module, "_JOURNAL_LIMIT_BYTES", 1000)
    monkeypatch.setattr(registry_module, "_JOURNAL_KEEPS", 5)
    for i in range(20):
        registry.record(f"k{i}", "intent", float(i), attempt=f"s/{i}/1", pid=i, boot_id=boot_id())
        if i != 3:
            registry.record(f"k{i}", "released", i + 0.5)
    registry.compact()
    assert [story.kill_id for story in registry.kills()] == ["k3", "k15", "k16", "k17", "k18", "k19"]
    assert all(story.finished for story in registry.kills()[1:])


def test_thresholds_change_is_noticed(registry: HostRegistry) -> None:
    """A watchdog sees by the stamp that the thresholds were set anew."""
    assert registry.policy() == (0.0, {})
    registry.thresholds({"stall_after_s": 5.0})
    stamp, values = registry.policy()
    assert values == {"stall_after_s": 5.0}
    time.sleep(0.01)  # file times are coarser than two writes in a row
    registry.thresholds({"stall_after_s": 6.0})
    assert registry.policy()[0] != stamp
    assert json.loads((Path(registry.root) / "policy.json").read_text()) == {"stall_after_s": 6.0}
