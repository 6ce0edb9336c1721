"""The status of workers: real ones, and what a stranger does to the socket."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import reactor_classes, spin_with_timers
from tests.workers.support import DEADLINE, Twistd, wait_until, write_tac
from twisted_rtsig.coro import LoopMonitor, add_instrument, remove_instrument
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.workers import status as status_module
from twisted_rtsig.workers.__main__ import main
from twisted_rtsig.workers.metrics import FAMILIES, Metric, add_up, exposition
from twisted_rtsig.workers.snapshot import Observer
from twisted_rtsig.workers.status import NoStatus, Status, read_status, socket_path

APPLICATION = """
import os
from twisted.application.service import Application
from twisted.application.strports import service
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.web.resource import Resource
from twisted.web.server import Site
from twisted_rtsig.coro import CoroutineService

class Page(Resource):
    isLeaf = True

    def render_GET(self, request):
        if request.path == b"/compute":
            # Until the test closes the pipe.
            with open("pipe") as pipe:
                pipe.read()
        return b"%d" % os.getpid()

async def echo(stream):
    while data := await stream.read():
        await stream.write(data)

application = Application("both")
service("tcp:0:interface=127.0.0.1", Site(Page())).setServiceParent(application)
CoroutineService(
    serverFromString(reactor, "unix:echo.socket"), echo
).setServiceParent(application)
"""


def get(port: int, path: str = "/") -> int:
    """Get a page; return the process that has answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", None, DEADLINE) as it:
        return int(it.read())


def status_of(twistd: Twistd, *options: str) -> str:
    """Return the output of the command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["status", str(twistd.pidfile), *options]) == 0
    return printed.getvalue()


def by_pid(twistd: Twistd) -> dict[int, Any]:
    status = read_status(str(twistd.pidfile))
    return {each["pid"]: each for each in status["workers"]}


def metrics_of(twistd: Twistd) -> dict[str, float]:
    """Return the sums, by the name of the sample and its labels."""
    text = status_of(twistd, "--metrics")
    return {
        sample.name + "".join(sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.slow
@pytest.mark.processes
def test_status(tmp_path: Path) -> None:
    """An application with twisted.web and with coroutines."""
    os.mkfifo(tmp_path / "pipe")
    tac = write_tac(tmp_path, APPLICATION)
    with Twistd(tmp_path, "--count", "2", "-y", tac) as twistd:
        first = twistd.wait_until_ready(2)
        port = twistd.port()
        path = tmp_path / "twistd.pid.status"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        answered = [get(port) for _ in range(10)]
        echoed = socket.socket(socket.AF_UNIX)
        echoed.settimeout(DEADLINE)
        echoed.connect(str(tmp_path / "echo.socket"))
        echoed.sendall(b"hello")
        assert echoed.recv(5) == b"hello"

        # A table for people.
        lines = status_of(twistd, "--tasks").splitlines()
        assert lines[0].startswith(f"Supervisor {twistd.process.pid}, up ")
        assert lines[2].split()[:4] == ["worker", "pid", "state", "age"]
        rows = [line.split() for line in lines[3:5]]
        assert [row[:3] for row in rows] == [
            [str(number), str(pid), "ready"] for number, pid in enumerate(sorted(first))
        ] or {row[1] for row in rows} == {str(pid) for pid in first}
        assert lines[5].split()[0] == "all"
        text = "\n".join(lines)
        assert "server echo: connections 1" in text
        assert "waits for" in text
        assert "in echo: while data := await stream.read():" in text
        assert "reactor: readers " in text

        # JSON for programs.
        status = json.loads(status_of(twistd, "--json"))
        assert status["pid"] == twistd.process.pid
        assert status["count"] == 2
        for worker in status["workers"]:
            assert worker["answers"]
            assert worker["requests"] == answered.count(worker["pid"])
            assert worker["cpu"] > 0
            assert worker["memory"] > 1e6
            assert worker["reactor"]["readers"] > 0
            assert "tasks" not in worker
        assert sum(each["connections"] for each in status["workers"]) == 1

        # Sums for Prometheus.
        sums = metrics_of(twistd)
        assert sums["twisted_worker_requests_total"] == 10
        assert sums["twisted_worker_connections"] == 1
        assert sums["twisted_taskswaiting"] == 1
        assert sums["twisted_server_connectionsecho"] == 1
        assert sums["twisted_workersready"] == 2
        assert sums["twisted_pass_seconds_count"] > 10
        assert sums["twisted_pass_seconds_bucket+Inf"] > 10

        # The counts of a worker stay in the sums after it has ended.
        echoed.close()
        # The status is not requested between this request and the end of the worker.
        get(port)
        twistd.send(signal.SIGHUP)
        twistd.wait_for("The reload is complete")
        wait_until(lambda: set(by_pid(twistd)).isdisjoint(first))
        assert {each["restarts"] for each in by_pid(twistd).values()} == {1}
        sums = metrics_of(twistd)
        assert sums["twisted_worker_requests_total"] == 11
        assert sums["twisted_workers_ended_totalstopped"] == 2
        assert sums["twisted_server_connectionsecho"] == 0

        # A worker that is computing does not answer; the others do.
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
            client.sendall(b"GET /compute HTTP/1.0\r\n\r\n")
            pipe = os.open(tmp_path / "pipe", os.O_WRONLY)
            answers = [each["answers"] for each in by_pid(twistd).values()]
            assert sorted(answers) == [False, True]
            assert "ready" in status_of(twistd).split("no answer")[0].splitlines()[-1]
            os.close(pipe)
            while client.recv(1000):
                pass
        assert all(each["answers"] for each in by_pid(twistd).values())
        assert any(each["slow_passes"] for each in by_pid(twistd).values())

        twistd.send(signal.SIGTERM)
        twistd.wait()
        assert not path.exists()
        with pytest.raises(NoStatus, match="give the pid file"):
            read_status(str(twistd.pidfile))


@pytest.mark.slow
@pytest.mark.processes
def test_socket_is_removed_after_the_supervisor_was_killed(tmp_path: Path) -> None:
    tac = write_tac(tmp_path, APPLICATION)
    with Twistd(tmp_path, "--count", "1", "-y", tac) as twistd:
        twistd.wait_until_ready(1)
        wait_until(lambda: "twistd.pid.status" in os.listdir(tmp_path))
        twistd.send(signal.SIGKILL)
        twistd.wait()
        wait_until(lambda: "twistd.pid.status" not in os.listdir(tmp_path))


# The command


@pytest.mark.processes
def test_no_supervisor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "twistd.pid")
    assert main(["status", missing]) == 1
    assert capsys.readouterr() == (
        "",
        f"{missing}: No such file or directory: give the pid file of a running "
        "'twistd workers' (its option --pidfile), or its status socket\n",
    )
    pidfile = tmp_path / "twistd.pid"
    pidfile.write_text("1")
    done = subprocess.run(
        [sys.executable, "-m", "twisted_rtsig.workers", "status", missing],
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
    # The supervisor has ended and left its socket.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(socket_path(missing))
    assert main(["status", missing]) == 1
    assert capsys.readouterr().err.endswith(f"{missing}.status: Connection refused\n")


@pytest.mark.parametrize(
    "arguments",
    [[], ["status"], ["stop", "pid"], ["status", "pid", "--json", "--metrics"]],
    ids=" ".join,
)
def test_wrong_arguments(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m twisted_rtsig.workers" in capsys.readouterr().err


# Metrics


def test_metrics_are_added_up() -> None:
    echo = (("server", 'e"\n\\cho'),)
    first = [
        Metric("twisted_tasks_spawned", (), 2),
        Metric("twisted_server_connections", echo, 1),
        Metric("twisted_pass_seconds", (), [0.5, *[1] * 28]),
    ]
    second = [
        Metric("twisted_tasks_spawned", (), 3),
        Metric("twisted_server_connections", (("server", "other"),), 7),
        Metric("twisted_pass_seconds", (), [0.25, *[2] * 28]),
    ]
    sums = add_up([*first, *second])
    assert sums == [
        Metric("twisted_tasks_spawned", (), 5),
        Metric("twisted_server_connections", echo, 1),
        Metric("twisted_pass_seconds", (), [0.75, *[3] * 28]),
        Metric("twisted_server_connections", (("server", "other"),), 7),
    ]
    families = {
        each.name: each for each in text_string_to_metric_families(exposition(sums))
    }
    assert [each.value for each in families["twisted_tasks_spawned"].samples] == [5]
    servers = families["twisted_server_connections"].samples
    assert [each.labels for each in servers] == [dict(echo), {"server": "other"}]
    passes = {
        (each.name.removeprefix("twisted_pass_seconds"), each.labels.get("le")): each
        for each in families["twisted_pass_seconds"].samples
    }
    assert passes["_sum", None].value == 0.75
    assert passes["_count", None].value == 84
    assert passes["_bucket", "1e-06"].value == 3
    assert passes["_bucket", "+Inf"].value == 84
    for name, family in families.items():
        assert (family.type, family.documentation) == FAMILIES[name]


# Unexpected clients


@pytest.fixture(params=reactor_classes()[:1], ids=lambda each: each.__name__)
def reactor_class(request: Any) -> Callable[[], EngineReactor]:
    chosen: Callable[[], EngineReactor] = request.param
    return chosen


@pytest.fixture
def path(reactor: EngineReactor, tmp_path: Path) -> str:
    """Return the socket of a supervisor without workers."""
    supervisor: Any = SimpleNamespace(
        reactor=reactor, handlers={}, slots={}, workers=list
    )
    pidfile = str(tmp_path / "pid")
    Status(supervisor).listen(pidfile, None, None)
    return socket_path(pidfile)


def _ask(reactor: EngineReactor, path: str, data: bytes) -> bytes:
    """Send a request; return the answer."""
    client = _connected(path)
    client.sendall(data)
    return _answer(reactor, client)


def _connected(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.setblocking(False)
    return client


def _answer(reactor: EngineReactor, client: socket.socket) -> bytes:
    received = []

    def ended() -> bool:
        try:
            received.append(client.recv(1 << 16))
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        return not received[-1]

    end = time.monotonic() + DEADLINE
    while not ended():
        assert time.monotonic() < end
        # The client is not on the reactor, so poll it.
        reactor.iterate(0.001)
    client.close()
    return b"".join(received)


def test_request(reactor: EngineReactor, path: str) -> None:
    answer = json.loads(_ask(reactor, path, b'{"tasks": true}\n'))
    assert (answer["pid"], answer["workers"]) == (os.getpid(), [])


@pytest.mark.parametrize(
    "garbage",
    [b"\n", b"GET / HTTP/1.0\r\n\r\n", b"{}\n", b"[]\n", b"7\n", b"\xff\n"],
)
def test_invalid_request(reactor: EngineReactor, path: str, garbage: bytes) -> None:
    answer = json.loads(_ask(reactor, path, garbage))
    assert answer == {
        "error": 'send a JSON object such as {"tasks": false} in one line'
    }
    assert not reactor.getDelayedCalls()


def test_long_line(reactor: EngineReactor, path: str) -> None:
    assert _ask(reactor, path, b"[" * 100_000) == b""


def test_silent_client(
    reactor: EngineReactor, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "_CLIENT_TIMEOUT", 0.02)
    assert _answer(reactor, _connected(path)) == b""


def test_many_clients(reactor: EngineReactor, path: str) -> None:
    clients = [_connected(path) for _ in range(40)]
    spin_with_timers(reactor, lambda: len(reactor.server_connections) == 16)
    assert _answer(reactor, clients.pop()) == b""
    for each in clients:
        each.close()
    spin_with_timers(reactor, lambda: not reactor.server_connections)
    assert json.loads(_ask(reactor, path, b'{"tasks": false}\n'))


def test_client_disconnects_before_the_answer(
    reactor: EngineReactor, tmp_path: Path
) -> None:
    class Worker:
        ended = True
        ready = True

        def send(self, message: object) -> bool:
            return True

    worker = Worker()
    supervisor: Any = SimpleNamespace(
        reactor=reactor, handlers={}, slots={}, workers=lambda: [worker]
    )
    status = Status(supervisor)
    pidfile = str(tmp_path / "pid")
    status.listen(pidfile, None, None)
    client = _connected(socket_path(pidfile))
    # Of many requests on one connection, only the first is handled.
    client.sendall(b'{"tasks": false}\n' * 50)
    spin_with_timers(reactor, lambda: status._questions)
    assert len(status._questions) == 1
    client.close()
    for question in list(status._questions):
        question.answered(cast(Any, worker), None)
    assert not status._questions
    spin_with_timers(reactor, lambda: not reactor.server_connections)


def test_passes_are_counted(reactor: EngineReactor) -> None:
    """Passes are counted even while an instrument of the application counts them."""
    observer = Observer(reactor)
    monitor = LoopMonitor()
    reactor.iterate(0)
    add_instrument(monitor, reactor)
    for _ in range(2):
        reactor.iterate(0)
    remove_instrument(monitor, reactor)
    for _ in range(2):
        reactor.iterate(0)
    assert observer.snapshot()["passes"]["counts"] == observer.passes.counts
    assert observer.passes.count == 4
    assert monitor.passes.count == 1


@pytest.mark.processes
def test_reader_of_the_output_has_ended(tmp_path: Path) -> None:
    """As head(1) does."""
    answer = '{"metrics": [], "pid": 1, "age": 0, "count": 0, "workers": []}'
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        command = ["-m", "twisted_rtsig.workers", "status", str(tmp_path / "socket")]
        with subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as asking:
            assert asking.stdout is not None
            asking.stdout.close()
            with server.accept()[0] as accepted:
                assert accepted.recv(100) == b'{"tasks": false}\n'
                accepted.sendall(answer.encode())
            assert asking.stderr is not None
            assert asking.stderr.read() == b""
        assert asking.returncode == 0
