"""
Whole programs, with real processes and real clients: a web server, plain, over TLS, as
a daemon, and refused if its reactor cannot run here.  A server whose signal queue
overflows most of the time.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import http.client
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("realtime signals exist on Linux only", allow_module_level=True)

from tests.programs import hostile_client, line_server
from tests.support import DEADLINE, make_certificate, process

pytestmark = pytest.mark.processes

TWISTD = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
OURS = {
    "rtsig": "twisted_rtsig.rtsigreactor.RealtimeSignalReactor",
    "rtsig-epoll": "twisted_rtsig.epollreactor.EdgeEPollReactor",
}
CONNECTIONS = 50
TCP = "tcp:0:interface=127.0.0.1"

MakeConnection = Callable[[], http.client.HTTPConnection]


# The server


# A server may take this long, and its errors belong to its output.
one_output = functools.partial(process, seconds=6 * DEADLINE, stderr=subprocess.STDOUT)


def port_in(log: str) -> int | None:
    """The port on which a web server says that it listens."""
    found = re.search(r"Site.* starting on (\d+)", log)
    return int(found[1]) if found else None


@contextlib.contextmanager
def serving(reactor_name: str, folder: Path, listen: str = TCP) -> Iterator[int]:
    """
    ``twistd web`` in the foreground.  In the end it gets SIGTERM, and must stop without
    an error in its log.

    :return: its port.
    """
    with one_output(
        *TWISTD,
        *("--nodaemon", "--no_save", "--pidfile=", "--reactor", reactor_name),
        *("web", "--path", str(folder), "--listen", listen),
        # Without the log of requests, the output is short enough for a pipe.
        *("--logfile", os.devnull),
    ) as server:
        log = ""
        assert server.stdout is not None
        for line in server.stdout:
            log += line
            if (port := port_in(line)) is not None:
                break
        else:
            pytest.fail(f"the server has not started:\n{log}")
        yield port
        server.terminate()
        log += server.communicate(timeout=DEADLINE)[0]
        # Recent releases of Twisted end by the signal itself, after their clean-up.
        assert server.returncode in (0, -signal.SIGTERM)
        assert_no_error_in(reactor_name, log)


def assert_no_error_in(reactor_name: str, log: str) -> None:
    assert f"reactor class: {OURS[reactor_name]}." in log
    assert log.rstrip().endswith("Server Shut Down.")
    assert "Traceback" not in log
    assert "Unhandled" not in log


# The files and their clients


def make_small_files(folder: Path, count: int) -> dict[str, str]:
    """
    Files with random content.

    :return: the hash of each file.
    """
    chance = random.Random(count)
    made = {}
    for number in range(count):
        content = chance.randbytes(chance.choice((0, 1, chance.randint(2, 30_000))))
        name = f"{number}.bin"
        (folder / name).write_bytes(content)
        made[name] = hashlib.sha256(content).hexdigest()
    return made


def make_large_file(path: Path, pieces: int) -> tuple[str, list[str]]:
    """
    A large file.

    :return: its hash, and those of its megabytes.
    """
    chance = random.Random(pieces)
    whole = hashlib.sha256()
    of_pieces = []
    with path.open("wb") as file:
        for _ in range(pieces):
            content = chance.randbytes(1_000_000)
            file.write(content)
            whole.update(content)
            of_pieces.append(hashlib.sha256(content).hexdigest())
    return whole.hexdigest(), of_pieces


def fetch(
    connection: http.client.HTTPConnection, name: str, range_: str | None = None
) -> str:
    """
    Fetch a file, or a range of it, over a connection that stays.

    :return: the hash of the content.
    """
    connection.request("GET", f"/{name}", headers={"Range": range_} if range_ else {})
    response = connection.getresponse()
    assert response.status == (206 if range_ else 200)
    content = hashlib.sha256()
    while piece := response.read(1 << 18):
        content.update(piece)
    return content.hexdigest()


def check_all_files(folder: Path, make: MakeConnection, megabytes: int) -> None:
    """
    Over 50 connections at once, fetch 1,000 small files, and one large file
    three times: twice as a whole, and once in pieces by all of them.
    """
    small = make_small_files(folder, 1000)
    whole, pieces = make_large_file(folder / "large.bin", megabytes)
    work: list[tuple[str, str | None, str]] = [
        (name, None, content) for name, content in small.items()
    ]
    for number, content in enumerate(pieces):
        start = number * 1_000_000
        work.append(("large.bin", f"bytes={start}-{start + 999_999}", content))
    random.Random(0).shuffle(work)
    shares = [work[number::CONNECTIONS] for number in range(CONNECTIONS)]
    for share in shares[:2]:
        share.insert(0, ("large.bin", None, whole))
    all_connected = threading.Barrier(CONNECTIONS)

    def take(share: list[tuple[str, str | None, str]]) -> None:
        with contextlib.closing(make()) as connection:
            connection.connect()
            its_socket = connection.sock
            all_connected.wait(DEADLINE)
            for name, range_, content in share:
                assert fetch(connection, name, range_) == content, (name, range_)
                assert connection.sock is its_socket, "it was not kept alive"

    with ThreadPoolExecutor(CONNECTIONS) as clients:
        for _ in clients.map(take, shares):
            pass


@pytest.fixture(params=OURS)
def reactor_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """A folder to serve.  It is removed after the test, since it may become large."""
    folder = tmp_path / "site"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_files_are_served_over_kept_alive_connections(
    reactor_name: str, site: Path
) -> None:
    with serving(reactor_name, site) as port:
        check_all_files(
            site,
            lambda: http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE),
            megabytes=200,
        )


def test_files_over_tls(reactor_name: str, site: Path, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    listen = f"ssl:0:interface=127.0.0.1:certKey={certificate}:privateKey={key}"
    context = ssl.create_default_context(cafile=str(certificate))
    with serving(reactor_name, site, listen) as port:
        check_all_files(
            site,
            lambda: http.client.HTTPSConnection(
                "127.0.0.1", port, timeout=DEADLINE, context=context
            ),
            megabytes=200,
        )


def test_curl_fetches_a_file_and_a_listing(reactor_name: str, site: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    content = random.Random(0).randbytes(300_000)
    (site / "a file.bin").write_bytes(content)
    (site / "folder").mkdir()

    def get(path: str) -> bytes:
        return subprocess.run(
            [
                *(curl, "--fail", "--silent", "--show-error", "--noproxy", "*"),
                *("--max-time", str(DEADLINE), f"http://127.0.0.1:{port}/{path}"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        ).stdout

    with serving(reactor_name, site) as port:
        assert get("a%20file.bin") == content
        listing = get("").decode()
    assert 'href="a%20file.bin"' in listing
    assert 'href="folder/"' in listing


# A daemon


def test_a_daemon_serves_files_and_stops_at_SIGTERM(
    reactor_name: str, site: Path, tmp_path: Path
) -> None:
    files = make_small_files(site, 20)
    log_path, pid_path = tmp_path / "daemon.log", tmp_path / "daemon.pid"
    try:
        subprocess.run(
            [
                *TWISTD,
                *("--no_save", "--rundir", str(tmp_path)),
                *("--pidfile", str(pid_path), "--logfile", str(log_path)),
                *("--reactor", reactor_name),
                *("web", "--path", str(site), "--listen", TCP),
            ],
            stdin=subprocess.DEVNULL,
            check=True,
            timeout=DEADLINE,
        )
        # The command has returned, so the daemon runs.
        daemon = os.pidfd_open(int(pid_path.read_text()))
        try:
            port = port_in(log_path.read_text())
            assert port is not None
            one, other = (
                http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
                for _ in range(2)
            )
            # The connections take turns, so that the server waits for each of them.
            with contextlib.closing(one), contextlib.closing(other):
                for name, content in files.items():
                    assert fetch(one, name) == content
                    assert fetch(other, name) == content
            signal.pidfd_send_signal(daemon, signal.SIGTERM)
            ended, _, _ = select.select([daemon], [], [], DEADLINE)
            assert ended, "the daemon goes on after SIGTERM"
        finally:
            os.close(daemon)
        assert not pid_path.exists()
        assert_no_error_in(reactor_name, log_path.read_text())
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(pid_path.read_text()), signal.SIGKILL)


# Refusals


@pytest.mark.parametrize(
    ("name", "variable", "platform", "why", "instead"),
    [
        ("rtsig", "foo", "linux", "='foo': neither a number", "--reactor=epoll"),
        ("rtsig", "9", "linux", "signal 9 is no realtime signal", "--reactor=epoll"),
        ("rtsig", "", "darwin", "Linux only, and this is darwin", "--reactor=poll"),
        (
            *("rtsig-epoll", "", "darwin", "Linux only, and this is darwin"),
            "--reactor=poll",
        ),
        ("rtsig-kqueue", "", "linux", "this is linux", "--reactor=rtsig-epoll"),
    ],
)
def test_a_reactor_that_cannot_run_is_refused(
    name: str, variable: str, platform: str, why: str, instead: str, site: Path
) -> None:
    """One sentence gives the reason, and names a reactor that can run."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from twisted.scripts.twistd import run;"
            f"sys.platform = {platform!r}; run()",
            *("--nodaemon", "--no_save", "--pidfile=", "--reactor", name),
            *("web", "--path", str(site), "--listen", TCP),
        ],
        env={**os.environ, "TWISTED_RTSIG_SIGNAL": variable},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )
    # The exit status is Twisted's: 1, and 0 of the oldest releases.
    assert "Traceback" not in done.stdout
    [sentence] = [line for line in done.stdout.splitlines() if "cannot be used" in line]
    assert why in sentence
    assert instead in sentence


# Overload


def report_of(control: int, count: int) -> line_server.Report:
    """Ask for the records after ``count`` connections have ended."""
    with socket.create_connection(
        ("127.0.0.1", control), timeout=line_server.PATIENCE + DEADLINE
    ) as client:
        client.sendall(b"%d\n" % count)
        report: line_server.Report = json.loads(hostile_client.answers(client))
    return report


def test_an_overflowing_signal_queue_loses_nothing() -> None:
    """
    The signal queue is full most of the time, and clients connect and disconnect in
    many ways.  No byte, no answer and no end of a connection is lost.
    """
    count = 2000
    seed = 20_001
    visits = hostile_client.plan(count, seed)
    with one_output(sys.executable, line_server.__file__) as server:
        assert server.stdout is not None
        port, control = (int(server.stdout.readline()) for _ in range(2))
        with one_output(
            sys.executable, hostile_client.__file__, str(port), str(count), str(seed)
        ) as client:
            output, _ = client.communicate()
            assert client.returncode == 0, output
        report = report_of(control, count)
        log, _ = server.communicate(timeout=DEADLINE)
    assert server.returncode == 0, log
    assert "Traceback" not in log
    assert log.count("RLIMIT_SIGPENDING") == 1
    assert report["statistics"]["overflows"] > 0
    assert report["most_at_once"] > 100

    records = report["records"]
    assert collections.Counter(each["lost"] for each in records) == {1: count}
    assert {each["why"] for each in records} == {"ConnectionDone", "ConnectionLost"}
    by_name = {each["name"]: each for each in records}
    silent = [visit for visit in visits if not visit.payload]
    assert sum(not each["name"] for each in records) == len(silent)
    for visit in visits:
        if not visit.payload:
            continue
        record = by_name[visit.name]
        received = visit.payload[: record["received"]]
        if visit.way.all_arrives:
            assert received == visit.payload, visit.way
        assert record["sha256"] == hashlib.sha256(received).hexdigest()
        assert record["answered"] == received.rfind(b"\n") + 1
