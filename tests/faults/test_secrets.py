"""A database password in a whole run: a real PostgreSQL that asks for it and goes away; then every file is read."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.faults.sandbox import Sandbox
from tests.faults.test_resume import SMALL, START_S, ends, nothing_left, tail, training
from tests.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

PASSWORD = "ab/s3cr3t+@%"


def unused_port() -> int:
    """A port below those that the system gives out by itself: a client that knocks on one of those while the server is
    away may be given the very same number, and be connected to itself."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(12_000, 28_000)))
            return int(probe.getsockname()[1])


class Server:
    """A PostgreSQL server of its own that lets in `me` with the password only."""

    def __init__(self, folder: Path) -> None:
        self.binaries = max(Path("/usr/lib/postgresql").glob("*/bin/initdb")).parent
        self.as_user = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []  # it refuses root
        self.folder, self.port = folder, unused_port()
        folder.chmod(0o777)
        (folder / "password").write_text(PASSWORD)
        make = [str(self.binaries / "initdb"), "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "-U", "me"]
        subprocess.run([*self.as_user, *make, "-D", str(folder / "data")], check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [
            str(self.binaries / "postgres"),
            "-D",
            str(self.folder / "data"),
            "-p",
            str(self.port),
            "-h",
            "127.0.0.1",
        ]
        self.process = subprocess.Popen([*self.as_user, *command, "-k", str(self.folder)], stderr=subprocess.DEVNULL)
        ready = [str(self.binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        until(lambda: subprocess.run(ready, check=False).returncode == 0, 60, "PostgreSQL answers")

    def stop(self) -> None:
        """End it, its clients' connections with it."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@pytest.fixture
def server() -> Iterator[Server]:
    """A running server. Not below pytest's folder, into which nobody else may look."""
    pytest.importorskip("psycopg", reason="no PostgreSQL driver installed")
    if not sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL server installed")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        server = Server(Path(folder))
        server.start()
        yield server
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            server.stop()


def nowhere(box: Sandbox, said: str) -> None:
    """The password is in no line and no file, whatever form it has; nor can others read what is there."""
    written = [path for path in box.root.rglob("*") if path.is_file()]
    assert {"settings.yaml", "journal.jsonl", "spec.json", "results.csv"} <= {path.name for path in written}
    for form in (PASSWORD, quote(PASSWORD, safe=""), "s3cr3t"):
        assert form not in said
        assert [str(path) for path in written if form.encode() in path.read_bytes()] == []
    assert box.folder.stat().st_mode & 0o077 == 0
    open_to_others = [p for p in box.folder.rglob("*") if p.is_file() and p.stat().st_mode & 0o077]
    # A checkpoint is made by the user's own function, in a folder that others cannot enter.
    assert {path.name for path in open_to_others} <= {"checkpoint.safetensors"}


def test_a_password_in_the_url_is_in_no_file_and_no_line(tmp_path: Path, server: Server) -> None:
    """Through a run, an outage of the server, a stop and a resume, which is given it again."""
    url = f"postgresql+psycopg://me:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}/postgres"
    with Sandbox(tmp_path / "run", **{**SMALL, "trials": 1, "max_epochs": 100}) as box:
        driver = box.start(environment={"HEADROOM_STORAGE": url})
        training(box)
        server.stop()
        until(lambda: box.events("study.unavailable"), 30, lambda: f"the outage noticed: {tail(box)}")
        server.start()
        until(lambda: box.events("study.available"), 60, lambda: f"its end noticed: {tail(box)}")
        driver.send_signal(signal.SIGINT)
        assert ends(driver, box, START_S) == 130, tail(box)
        nothing_left(box, START_S)
        said = tail(box)
        again = box.start(environment={"HEADROOM_STORAGE": url, "CRASH_EPOCH_S": "0.005"})
        assert ends(again, box, 120) == 0, tail(box)
        nowhere(box, said + tail(box))


def test_a_password_in_the_environment_needs_no_url(tmp_path: Path, server: Server) -> None:
    """With PGPASSWORD the settings.yaml of the run is a --config that goes on with it."""
    url = f"postgresql+psycopg://me@127.0.0.1:{server.port}/postgres"
    with Sandbox(tmp_path / "run", **{**SMALL, "trials": 1}) as box:
        driver = box.start("--storage", url, environment={"PGPASSWORD": PASSWORD})
        training(box)
        driver.send_signal(signal.SIGINT)
        assert ends(driver, box, START_S) == 130, tail(box)
        said = tail(box)
        box.config = box.folder / "settings.yaml"
        again = box.start(environment={"PGPASSWORD": PASSWORD, "CRASH_EPOCH_S": "0.005"})
        assert ends(again, box, 120) == 0, tail(box)
        nowhere(box, said + tail(box))
