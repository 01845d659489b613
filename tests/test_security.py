"""Who gets in: other users of this machine into our own Dask cluster, we into one that speaks TLS.

Real listeners on loopback, and where the tests run as root a real other user.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import LocalCluster, Security

from scheduler.cli import schedule
from scheduler.cluster import credentials
from scheduler.cluster.client import Cluster
from scheduler.settings import load as loading
from tests.faults.sandbox import Sandbox
from tests.waiting import free_port, wait_until

REPO = Path(__file__).resolve().parents[1]

# (A stranger.) Tries every way into each port and prints what each one answered.
STRANGER = """
import asyncio, http.client, json, os, sys
from concurrent.futures import ThreadPoolExecutor
from distributed import Client, Security
from distributed.core import rpc

async def ask(address, security):
    async with asyncio.timeout(10), rpc(address, connection_args=security.get_connection_args("client")) as there:
        return await there.identity()

def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    return connection.getresponse().status

def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return f"refused: {type(error).__name__}"

def knock(way):
    port, what = way
    if what.startswith("/"):
        return attempt(get, port, what)
    return attempt(lambda: bool(asyncio.run(ask(f"{what}://127.0.0.1:{port}", own if what == "tls" else Security()))))

own = Security.temporary()
whats = ("tcp", "tls", "/health", "/status", "/info/main/workers.html", "/json/counts.json")
ways = [(port, what) for port in json.loads(sys.argv[1]) for what in whats]
with ThreadPoolExecutor(len(ways)) as pool:  # a port that never answers costs the time limit once, not once each
    answers = list(pool.map(knock, ways))
found = {}
for (port, what), answer in zip(ways, answers):
    found.setdefault(port, {})[what] = answer
print(json.dumps({"uid": os.geteuid(), **found}))
"""


def listening(pids: set[int]) -> list[int]:
    """The TCP ports on which these processes listen."""
    found = {
        connection.laddr.port
        for pid in pids
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    return sorted(found)


def as_a_stranger(code: str, *arguments: str) -> dict[str, Any]:
    """What a program of another user prints as JSON; where we are not root, one of our own without certificates."""
    switch: list[str] = []
    if os.geteuid() == 0 and shutil.which("setpriv"):
        switch = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        reads = subprocess.run(
            [*switch, sys.executable, "-c", "import distributed"], cwd="/", capture_output=True, check=False
        )
        switch = [] if reads.returncode else switch  # a Python below a home folder that others cannot read
    done = subprocess.run(
        [*switch, sys.executable, "-c", code, *arguments],
        cwd="/",
        env={**os.environ, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert not switch or said["uid"] == 65534
    return said


def whoami() -> dict[str, int]:
    """(On the worker.) Its process."""
    return {"pid": os.getpid()}


@pytest.fixture(params=[None, "127.0.0.1:0"], ids=["dashboard off", "dashboard on"])
def own_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Cluster, set[int], bool]]:
    """A cluster of our own with its worker there: (cluster, ports, whether it has a dashboard)."""
    before = set(listening({os.getpid()}))
    cluster = Cluster.local(
        slots=1, memory_bytes=2**30, topic="test", dashboard=request.param, scratch=str(tmp_path / "dask")
    )
    (answer,) = cluster.ask_workers(whoami, 60)
    worker = answer["pid"]
    yield cluster, set(listening({os.getpid(), worker})) - before, request.param is not None
    cluster.close()


def test_other_users_cannot_talk_to_our_own_cluster(own_cluster: tuple[Cluster, set[int], bool]) -> None:
    """Neither in the clear nor with certificates of their own: not the scheduler, not the nanny, not the worker.

    Only a dashboard that is on answers anybody, over HTTP; with it off nothing does.
    """
    cluster, ports, has_dashboard = own_cluster
    assert len(ports) >= 3, ports  # scheduler, nanny, worker, and what they listen on for HTTP
    said = as_a_stranger(STRANGER, json.dumps(sorted(ports)))
    del said["uid"]
    ways_in = {port: answers for port, answers in said.items() if True in (answers["tcp"], answers["tls"])}
    assert not ways_in, ways_in
    shown = {port for port, answers in said.items() if any(answers[path] == 200 for path in answers if "/" in path)}
    expected = {cluster.dashboard.split(":")[2].split("/")[0]} if has_dashboard and cluster.dashboard else set()
    assert shown == expected, said


def test_the_stranger_would_get_into_an_open_cluster() -> None:
    """The proof of the proof: what asks there does get an answer where nobody is kept out."""
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50) as open_one:
        port = int(open_one.scheduler_address.rpartition(":")[2])
        assert as_a_stranger(STRANGER, json.dumps([port]))[str(port)]["tcp"] is True


# -- a cluster that speaks TLS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEM files as an administrator would give them out: ca, key; other_ca, other_key of another authority."""
    folder = tmp_path_factory.mktemp("tls")
    found = {}
    for prefix in ("", "other_"):
        made = Security.temporary()
        for name, text in (("ca", made.tls_ca_file), ("key", made.tls_client_key)):
            found[prefix + name] = folder / f"{prefix}{name}.pem"
            found[prefix + name].write_text(text)
    return found


def dask(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """A `dask …` command in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO), "HEADROOM_HOST_DIR": str(folder / "host")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def flags(certificates: dict[str, Path], prefix: str = "") -> list[str]:
    """The arguments that Dask's commands and ours share."""
    ca, key = str(certificates[f"{prefix}ca"]), str(certificates[f"{prefix}key"])
    return ["--tls-ca-file", ca, "--tls-cert", ca, "--tls-key", key]


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what `dask` started."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def by_hand(certificates: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Two Dask schedulers as a user starts them: {"tls": address with certificates and a worker, "tcp": without}."""
    folder = tmp_path_factory.mktemp("by_hand")
    ports = {"tls": free_port(), "tcp": free_port()}
    addresses = {kind: f"{kind}://127.0.0.1:{port}" for kind, port in ports.items()}
    listen, tls = ["--host", "127.0.0.1", "--no-dashboard"], ["--protocol", "tls", *flags(certificates)]
    work = ["--nthreads", "2", "--memory-limit", "0", "--no-nanny"]
    started = [
        dask(["scheduler", *listen, "--port", str(ports["tls"]), *tls], folder),
        dask(["scheduler", *listen, "--port", str(ports["tcp"])], folder),
        dask(["worker", addresses["tls"], *listen, *work, *tls], folder),
    ]

    def answers(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(lambda: all(answers(port) for port in ports.values()), "both schedulers listen", 60)
        yield addresses
    finally:
        end(started)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must end with 2."""
    code = schedule.execute(["--budgets", "2M", "--horizons", "1", *arguments])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


def test_a_run_on_a_tls_cluster(by_hand: dict[str, str], certificates: dict[str, Path], tmp_path: Path) -> None:
    """The whole command against scheduler and worker that let in only who has their certificates."""
    with Sandbox(tmp_path / "run", budgets=["2M"], horizons=[1], trials=2, max_epochs=3) as box:
        driver = box.start("--cluster", by_hand["tls"], *flags(certificates))
        assert driver.wait(100) == 0, box.log.read_text()
        assert [trial["state"] for trial in box.trials()] == ["COMPLETE", "COMPLETE"]


def test_certificates_from_dask_own_configuration(
    by_hand: dict[str, str], certificates: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Who has set up Dask for that cluster need not tell us again."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"}
    for key, name in (("CA_FILE", "ca"), ("CLIENT__CERT", "ca"), ("CLIENT__KEY", "key")):
        environment[f"DASK_DISTRIBUTED__COMM__TLS__{key}"] = str(certificates[name])
    done = subprocess.run(
        [sys.executable, "-m", "scheduler", "--budgets", "2M", "--dry-run", "--cluster", by_hand["tls"]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "phase6a_2M_h1" in done.stdout


def test_tls_addresses_that_cannot_work_are_one_line(
    by_hand: dict[str, str], certificates: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No certificates, missing or foreign ones, and either protocol at a scheduler of the other: what, and the fix."""
    assert "needs certificates: give --tls-ca-file" in refused(capsys, "--cluster", by_hand["tls"])
    missing = refused(capsys, "--cluster", by_hand["tls"], "--tls-ca-file", "nowhere.pem", "--tls-cert", "nowhere.pem")
    assert "--tls-ca-file" in missing and "nowhere.pem" in missing and "No such file" in missing
    swapped = ["--tls-ca-file", str(certificates["key"]), "--tls-cert", str(certificates["ca"])]
    assert "cannot be used" in refused(capsys, "--cluster", by_hand["tls"], *swapped)
    foreign = refused(capsys, "--cluster", by_hand["tls"], *flags(certificates, "other_"))
    assert "do not accept each other's certificates" in foreign
    to_tls = by_hand["tls"].replace("tls://", "tcp://")
    assert "if it speaks TLS, say tls://" in refused(capsys, "--cluster", to_tls)
    to_tcp = by_hand["tcp"].replace("tcp://", "tls://")
    assert "it does not speak TLS: say tcp://" in refused(capsys, "--cluster", to_tcp, *flags(certificates))


@pytest.mark.parametrize("word", credentials.NO_TLS)
def test_plain_bytes_in_a_handshake_are_no_matter_of_certificates(word: str) -> None:
    """However OpenSSL words it when the other side answers in plain text, the hint is to say tcp://."""
    assert credentials.explained(ssl.SSLError(1, f"[SSL: {word}] as it says it")) == "it does not speak TLS: say tcp://"
    verify = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    assert "certificates" in credentials.explained(verify)


# -- the dashboard ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "listens"),
    [
        ("8788", "127.0.0.1:8788"),
        (":8788", "127.0.0.1:8788"),
        ("0.0.0.0:8788", "0.0.0.0:8788"),
        ("myhost:0", "myhost:0"),
        ("off", None),
    ],
)
def test_a_dashboard_is_for_this_machine_unless_told_otherwise(given: str, listens: str | None) -> None:
    """A bare port, which Dask takes for every interface, is loopback's; who wants the network says so."""
    settings = loading.load({"dashboard": given}, environ={})
    assert settings.dashboard_address == listens


@pytest.mark.parametrize("given", ["here", "1.2.3.4", "80 80", ":70000", "a:b:1"])
def test_a_dashboard_address_that_is_none_is_one_line(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag, the value seen and what it must be."""
    line = refused(capsys, "--dashboard", given, "--dry-run")
    assert "--dashboard" in line and given in line and "must be a port" in line


# -- what is read ----------------------------------------------------------------------------------------------------


class Bomb:
    """An object whose unpickling does something."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["pickle", "zip with a pickle"])
def test_a_checkpoint_executes_nothing(tmp_path: Path, form: str) -> None:
    """A file that runs code when it is unpickled, as `torch.load` may, is rejected unread."""
    import torch

    from training.checkpoint import load
    from training.errors import CheckpointRejected

    path, done = tmp_path / "checkpoint.safetensors", tmp_path / "done"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(done)))
    else:
        torch.save(Bomb(done), path)
    with pytest.raises(CheckpointRejected):
        load(path, {}, "task")
    assert not done.exists()


def test_a_configuration_file_executes_nothing_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML's tags for Python objects are refused."""
    (tmp_path / "evil.yaml").write_text(f"name: !!python/object/apply:os.mkdir [{tmp_path}/done]\n")
    assert "evil.yaml" in refused(capsys, "--config", str(tmp_path / "evil.yaml"), "--dry-run")
    assert not (tmp_path / "done").exists()
