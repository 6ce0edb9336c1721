"""
Libraries with blocking sockets, against real servers, hundreds of sessions at once in
one thread.

    ./dev test -m slow tests/coro/test_blocking_libraries.py

runs 500 at once.
"""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import pwd
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("greenlet", reason="it is for the extra [greenlet]")
if sys.platform == "win32":
    pytest.skip("these servers are for POSIX", allow_module_level=True)

import resource

import redis
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.ssl import PrivateCertificate
from twisted.web.resource import Resource
from twisted.web.server import Site

from tests.coro.support import run, spin
from tests.coro.test_blocking_sockets import connections_of, until_closed
from tests.coro.test_examples import example
from tests.coro.test_examples import reactor as reactor
from tests.support import DEADLINE, make_certificate
from twisted_rtsig import coro
from twisted_rtsig.coro import TaskGroup, current_task, serve, spawn, stackful, timeout

# Of pyOpenSSL's, about what Twisted does with certificates.
pytestmark = pytest.mark.filterwarnings("ignore:Passing pyOpenSSL:DeprecationWarning")

LIMIT = 120.0
"""Seconds that all sessions together may take."""

counts = pytest.mark.parametrize(
    "count", [20, pytest.param(500, marks=pytest.mark.slow)]
)


@pytest.fixture(autouse=True)
def room_for_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_sockets() -> set[str]:
    """The sockets of this process; none of them where the system does not tell."""
    found = set()
    for each in glob.glob("/proc/self/fd/*"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(each))
    return {each for each in found if each.startswith("socket:")}


class Meeting:
    """
    Where all sessions wait for each other: then all connections are open.

    Every tenth one is cancelled there: where it waits next.

    :ivar connections: how many the reactor had.
    """

    def __init__(self, reactor: Any, count: int) -> None:
        self._reactor = reactor
        self._missing = count
        self._complete = coro.Event()
        self.connections: int = 0

    def attend(self, number: int) -> None:
        self._missing -= 1
        if not self._missing:
            self.connections = len(set(connections_of(self._reactor)))
            self._complete.set()
        stackful.wait(self._complete.wait())
        if number % 10 == 0:
            current_task().cancel()


def run_sessions(
    reactor: Any,
    modules: list[ModuleType],
    session: Callable[[int, Callable[[int], None]], None],
    count: int,
) -> None:
    """Run sessions at once, each under a timeout; nothing may be left of them."""
    meeting = Meeting(reactor, count)
    threads = set(threading.enumerate())
    ended = []

    async def one(number: int) -> None:
        with timeout(LIMIT):
            await stackful.in_stackful(session, number, meeting.attend)
        ended.append(number)

    async def main() -> None:
        with stackful.patched(*modules):
            async with TaskGroup() as group:
                for number in range(count):
                    group.spawn(one, number)

    before, timers = open_sockets(), len(reactor.getDelayedCalls())
    task = spawn(main, reactor=reactor)
    end = time.monotonic() + LIMIT
    while not task.done:
        assert time.monotonic() < end, "it did not happen"
        reactor.iterate(0.01)
    task.result()
    assert sorted(ended) == [number for number in range(count) if number % 10]
    assert meeting.connections >= count
    spin(reactor, lambda: len(reactor.getDelayedCalls()) <= timers)
    spin(reactor, lambda: open_sockets() <= before)
    assert not coro.statistics(reactor=reactor).tasks.waiting
    assert set(threading.enumerate()) - threads <= set(reactor.getThreadPool().threads)


# SMTP, with STARTTLS and AUTH


@counts
def test_smtplib(reactor: Any, count: int, tmp_path: Path) -> None:
    files = make_certificate(tmp_path)
    pem = b"".join(each.read_bytes() for each in files)
    delivered: list[Any] = []
    server = example("smtp_server").Server(
        PrivateCertificate.loadPEM(pem).options(), {b"ann": b"secret"}, delivered.append
    )
    # A client waits for the server's first word: one that the kernel dropped, as too
    # many had connected, would wait long.
    endpoint = TCP4ServerEndpoint(reactor, 0, backlog=count, interface="127.0.0.1")
    serving = run(reactor, lambda: serve(endpoint, server.session, reactor=reactor))
    port = serving.port.getHost().port
    context = ssl.create_default_context(cafile=str(files[0]))
    stackful.allow_blocking_sockets(context)

    def session(number: int, attend: Callable[[int], None]) -> None:
        # With SMTP, as a context manager, would say QUIT in the middle of a command.
        with contextlib.closing(smtplib.SMTP("127.0.0.1", port, timeout=LIMIT)) as smtp:
            smtp.starttls(context=context)
            smtp.login("ann", "secret")
            attend(number)
            text = f"Subject: {number}\r\n\r\n" + "Hello.\r\n" * 1000
            smtp.sendmail("ann@example.com", ["bob@example.com"], text)
            smtp.quit()

    run_sessions(reactor, [smtplib], session, count)
    assert len(delivered) == count - len(range(0, count, 10))
    run(reactor, serving.stop)


def test_smtp_client(reactor: Any, tmp_path: Path) -> None:
    """The example."""
    files = make_certificate(tmp_path)
    pem = b"".join(each.read_bytes() for each in files)
    delivered: list[Any] = []
    server = example("smtp_server").Server(
        PrivateCertificate.loadPEM(pem).options(), {b"ann": b"secret"}, delivered.append
    )
    endpoint = TCP4ServerEndpoint(reactor, 0, backlog=100, interface="127.0.0.1")
    serving = run(reactor, lambda: serve(endpoint, server.session, reactor=reactor))
    port = serving.port.getHost().port
    run(reactor, example("smtp_client").main, reactor, str(port), str(files[0]), "20")
    subjects = {each.text.split(b"Subject: ")[1].splitlines()[0] for each in delivered}
    assert subjects == {b"Message %d" % number for number in range(20)}
    run(reactor, serving.stop)


# HTTP, against Twisted's server


class Hello(Resource):
    isLeaf = True

    def render_GET(self, request: Any) -> bytes:
        path: bytes = request.path
        return b"Hello, " + path

    def render_POST(self, request: Any) -> bytes:
        body: bytes = request.content.read()
        return body[::-1]


@contextlib.contextmanager
def serving_web(reactor: Any) -> Iterator[int]:
    port = reactor.listenTCP(0, Site(Hello()), interface="127.0.0.1")
    try:
        yield port.getHost().port
    finally:
        run(reactor, port.stopListening)


@counts
def test_http_client(reactor: Any, count: int) -> None:
    def session(number: int, attend: Callable[[int], None]) -> None:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        ) as connection:
            connection.request("GET", f"/{number}")
            assert connection.getresponse().read() == f"Hello, /{number}".encode()
            attend(number)
            body = str(number).encode() * 10_000
            connection.request("POST", "/", body)
            assert connection.getresponse().read() == body[::-1]

    with serving_web(reactor) as port:
        run_sessions(reactor, [http.client], session, count)


def test_http_client_example(reactor: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with serving_web(reactor) as port:
        arguments = (f"127.0.0.1:{port}", "/", "20")
        run(reactor, example("http_client").main, reactor, *arguments)
        assert capsys.readouterr().out == "200 20 times\n"


# Redis


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A Redis of its own."""
    path = program("redis-server", "redis-server")
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    command = [path, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with running([*command, "--dir", str(folder)], "eady to accept connections"):
        yield port


@counts
def test_redis(reactor: Any, redis_port: int, count: int) -> None:
    keys = f"{reactor!r}".replace(" ", "")

    def session(number: int, attend: Callable[[int], None]) -> None:
        with redis.Redis("127.0.0.1", redis_port, socket_timeout=LIMIT) as client:
            key = f"{keys}:{number}"
            assert client.set(key, b"x" * 10_000)
            attend(number)
            # It waits for what another connection of the client brings.
            client.rpush(f"{key}:list", number)
            assert client.blpop([f"{key}:list"], 10)[1] == str(number).encode()
            with client.pipeline() as pipeline:
                pipeline.append(key, "y").strlen(key).incr(f"{keys}:total")
                assert pipeline.execute()[1] == 10_001

    run_sessions(reactor, [redis], session, count)

    def total() -> int:
        with redis.Redis("127.0.0.1", redis_port) as client:
            return int(client.get(f"{keys}:total"))

    assert total() == count - len(range(0, count, 10))


def test_redis_with_one_pool(reactor: Any, redis_port: int) -> None:
    """Tasks may share a client: each has a connection of its pool while it needs it."""
    client = redis.Redis("127.0.0.1", redis_port, socket_timeout=LIMIT)
    channel = f"{reactor!r}"

    def session(number: int, attend: Callable[[int], None]) -> None:
        attend(number)
        with client.pubsub() as subscription:
            subscription.subscribe(channel, f"{number}")
            client.publish(f"{number}", "hello")
            found = iter(subscription.listen())
            assert [next(found)["type"] for _ in range(3)][2] == "message"
            assert subscription.get_message(timeout=0.01) is None

    def all_of_them(number: int, attend: Callable[[int], None]) -> None:
        session(number, lambda _: None)

    async def main() -> None:
        with stackful.patched(redis):
            async with TaskGroup() as group:
                for number in range(10):
                    group.spawn(
                        stackful.in_stackful, all_of_them, number, lambda _: None
                    )
            await stackful.in_stackful(client.close)

    run(reactor, main)
    until_closed(reactor)


def test_redis_client(reactor: Any, redis_port: int) -> None:
    """The example."""
    it = example("redis_client")
    with redis.Redis("127.0.0.1", redis_port) as client:
        client.delete(it.KEY)
        run(reactor, it.main, reactor, str(redis_port), "20")
        assert client.get(it.KEY) == b"20"


# PostgreSQL


@pytest.fixture(scope="module")
def postgres_port() -> Iterator[int]:
    """
    A PostgreSQL of its own, which trusts the user tester.

    It refuses to run as root, so that root runs it as another user.
    """
    pytest.importorskip(
        "pg8000.native",
        reason="there is no pg8000 (pip install -e '.[blocking-libraries]')",
    )
    initdb, postgres = (
        program(name, "postgresql", *glob.glob("/usr/lib/postgresql/*/bin"))
        for name in ("initdb", "postgres")
    )
    if os.geteuid() == 0 and not os.stat(os.devnull).st_mode & stat.S_IWOTH:
        pytest.skip(f"only root may write to {os.devnull}, and initdb needs it")
    user: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    files = make_certificate(folder)
    files[1].chmod(0o600)
    if os.geteuid() == 0:
        other = pwd.getpwnam("nobody")
        user = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
        for each in (folder, *files):
            os.chown(each, other.pw_uid, other.pw_gid)
    data = folder / "data"
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": folder,
        "max_connections": 600,
        "shared_buffers": "16MB",
        "fsync": "off",
        "ssl": "on",
        "ssl_cert_file": files[0],
        "ssl_key_file": files[1],
    }
    try:
        subprocess.run(
            [initdb, "--no-sync", "-A", "trust", "-U", "tester", "-D", data],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
            timeout=LIMIT,
            **user,
        )
        command = [postgres, "-D", str(data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with running(command, "ready to accept connections", cwd="/", **user):
            yield port
    finally:
        shutil.rmtree(folder)


@counts
def test_pg8000(reactor: Any, postgres_port: int, count: int) -> None:
    def connect() -> Any:
        return sys.modules["pg8000.native"].Connection(
            "tester",
            "127.0.0.1",
            "postgres",
            postgres_port,
            timeout=LIMIT,
            ssl_context=False,
        )

    def session(number: int, attend: Callable[[int], None]) -> None:
        with contextlib.closing(connect()) as connection:
            connection.run("BEGIN")
            connection.run("INSERT INTO seen VALUES (:number)", number=number)
            attend(number)
            query = "SELECT each * :number FROM generate_series(1, 1000) AS each"
            rows = connection.run(query, number=number)
            assert rows == [[each * number] for each in range(1, 1001)]
            connection.run("COMMIT")

    with contextlib.closing(connect()) as connection:
        connection.run("DROP TABLE IF EXISTS seen")
        connection.run("CREATE TABLE seen (number int)")
        run_sessions(reactor, [sys.modules["pg8000"]], session, count)
        # The transactions of those that were cancelled are rolled back.
        assert connection.run("SELECT number FROM seen ORDER BY number") == [
            [number] for number in range(count) if number % 10
        ]


def test_pg8000_over_tls(reactor: Any, postgres_port: int) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    stackful.allow_blocking_sockets(context)

    def session() -> Any:
        with (
            stackful.patched(sys.modules["pg8000"]),
            contextlib.closing(
                sys.modules["pg8000.native"].Connection(
                    "tester",
                    "127.0.0.1",
                    "postgres",
                    postgres_port,
                    timeout=DEADLINE,
                    ssl_context=context,
                )
            ) as connection,
        ):
            return connection.run(
                "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            )

    assert run(reactor, stackful.in_stackful, session) == [[True]]
    until_closed(reactor)


def test_postgres_client(
    reactor: Any, postgres_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example."""
    it = example("postgres_client")
    run(reactor, it.main, reactor, "tester", str(postgres_port), "25")
    # The first five accounts have given three times, and taken from those before.
    balances = "99 100 100 100 100 101 100 100 100 100"
    assert capsys.readouterr().out == f"balances: {balances}\n"


# Servers


def program(name: str, package: str, *folders: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *folders]))
    if path is None:
        pytest.skip(f"there is no {name} (apt-get install {package})")
    return path


@contextlib.contextmanager
def running(command: list[str], ready: str, **options: Any) -> Iterator[None]:
    """A server, from the moment when it says that it is ready."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    ) as server:
        assert server.stdout is not None
        said = []
        try:
            for line in server.stdout:
                said.append(line)
                if ready in line:
                    break
            else:
                raise AssertionError(f"{command[0]} has ended: {''.join(said)}")
            # It must not wait for what it says later to be read.
            reading = threading.Thread(target=server.stdout.read, daemon=True)
            reading.start()
            yield
            server.send_signal(signal.SIGINT)
            reading.join()
        finally:
            server.kill()
