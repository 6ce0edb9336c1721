"""Helpers of several test files: reactors, protocols that record, programs to run."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import ipaddress
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from _pytest.mark import ParameterSet
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from twisted.internet.abstract import FileDescriptor
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import (
    Factory,
    ProcessProtocol,
    Protocol,
    connectionDone,
)
from twisted.python.failure import Failure

from tests import libkqueue
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.kqreactor import KQueueReactor
from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

T = TypeVar("T")

SocketPair = tuple[socket.socket, socket.socket]

ON_PYPY = sys.implementation.name == "pypy"

frees_at_once = pytest.mark.skipif(
    ON_PYPY, reason="PyPy frees an object some time after the last reference has gone"
)
"""For a test that sees when an object is freed."""

DEADLINE = 20.0
"""Seconds after which a test gives up on an event that should come at once."""

A_FEW = 15
"""A hang-up that no call clears is reported in fewer passes than this."""

RESET = struct.pack("HH" if sys.platform == "win32" else "ii", 1, 0)
"""SO_LINGER with no time to linger: close() sends a reset."""


def reactor_classes() -> list[type[EngineReactor]]:
    """The reactors of this package that this platform has."""
    if hasattr(select, "kqueue"):
        return [KQueueReactor]
    if sys.platform == "win32":
        from twisted_rtsig.iocpreactor import CompletionPortReactor

        return [CompletionPortReactor]
    if not sys.platform.startswith("linux"):
        return []
    from twisted_rtsig.epollreactor import EdgeEPollReactor

    classes: list[type[EngineReactor]] = [RealtimeSignalReactor, EdgeEPollReactor]
    # If libkqueue is missing, test_kqueue.py says so when it skips.
    if libkqueue.path() is not None:
        classes.insert(0, libkqueue.KQueueReactor)
    return classes


def each_of(reactors: Iterable[T], plain: Container[T] = ()) -> list[ParameterSet]:
    """
    Reactors, or their names, as the parameters of a fixture.

    A quick run takes only the last one, which must be the reactor that ``rtsig-auto``
    chooses.

    :param plain: the reactors that only call ``doRead`` and ``doWrite``.
    """
    each = list(reactors)
    further = each[:-1]
    return [
        pytest.param(
            one,
            marks=[pytest.mark.further_reactor] * (one in further)
            + [pytest.mark.plain_reactor] * (one in plain),
        )
        for one in each
    ]


def only(chosen: type[EngineReactor]) -> Any:
    """
    A fixture for a file about one reactor.  Name it ``reactor_class``, which overrides
    the fixture of that name in conftest.py.
    """

    @pytest.fixture
    def reactor_class() -> type[EngineReactor]:
        return chosen

    return reactor_class


def dispose(reactor: EngineReactor) -> None:
    """Close all that a reactor holds which was made for one test."""
    for call in reactor.getDelayedCalls():
        call.cancel()
    reactor.disconnectAll()
    for reader in list(reactor._internalReaders):
        reactor.removeReader(reader)
        reader.connectionLost(Failure(Exception("end of test")))
    reactor._internalReaders.clear()
    if isinstance(reactor, EngineReactor):
        # Closes the descriptors of its notifier.
        reactor.beforeDaemonize()


def open_descriptors() -> set[str]:
    """The descriptors that are open in this process."""
    # The garbage of an earlier test may be collected, and closed, at any moment.
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def spin(reactor: EngineReactor, until: Callable[[], Any]) -> None:
    """Iterate until something is true.  Fail if it does not become true in time."""
    end = time.monotonic() + DEADLINE
    while not until():
        assert time.monotonic() < end, "it did not happen"
        # If an event is lost, this sleeps for five seconds.  The deadline allows a few
        # such sleeps and no more.
        reactor.iterate(5)


def spin_with_timers(reactor: Any, until: Callable[[], Any]) -> None:
    """As :func:`spin`, but wake for delayed calls."""
    end = time.monotonic() + DEADLINE
    while not until():
        assert time.monotonic() < end, "it did not happen"
        delay = reactor.timeout()
        reactor.iterate(5 if delay is None else min(delay, 5))


def settle(reactor: EngineReactor) -> None:
    """Iterate until the reactor has nothing to do at the moment."""
    for _ in range(20):
        reactor.iterate(0)


class Recorder(Protocol):
    """Records the data and the end of a connection."""

    def __init__(self) -> None:
        self.data = b""
        self.lost: list[Failure] = []

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost.append(reason)


class RecorderFactory(Factory):
    """Makes recorders, and keeps them in order."""

    noisy = False

    def __init__(self, protocol: Callable[[], Recorder] = Recorder) -> None:
        self.make = protocol
        self.connections: list[Any] = []

    def buildProtocol(self, addr: Any) -> Recorder:
        recorder = self.make()
        self.connections.append(recorder)
        return recorder


class Watcher(FileDescriptor):
    """Watches any descriptor, as an application would do it."""

    def __init__(self, reactor: EngineReactor, descriptor: int) -> None:
        super().__init__(reactor)
        self.descriptor = descriptor
        self.reads = 0
        self.writes = 0
        self.lost: list[Failure] = []
        self.on_read: Callable[[], Any] = lambda: None
        self.on_write: Callable[[], Any] = lambda: None

    def fileno(self) -> int:
        return self.descriptor

    def doRead(self) -> Any:
        self.reads += 1
        return self.on_read()

    def doWrite(self) -> Any:
        self.writes += 1
        return self.on_write()

    def connectionLost(self, reason: Failure) -> None:
        self.lost.append(reason)


def watch(reactor: EngineReactor, descriptor: int) -> Watcher:
    """A watcher that reads, after the reactor has begun to watch its descriptor."""
    watcher = Watcher(reactor, descriptor)
    reactor.addReader(watcher)
    settle(reactor)
    return watcher


def connect(port: Any) -> socket.socket:
    """A plain client of a listening port, with a timeout on all its operations."""
    client = socket.create_connection(("127.0.0.1", port.getHost().port))
    client.settimeout(DEADLINE)
    return client


@contextlib.contextmanager
def process(
    *command: str, seconds: float = 60, stderr: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """
    A process in a process group of its own, whose output is a pipe.  The group is
    killed in the end, or after ``seconds``.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    ) as started:

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)

        watchdog = threading.Timer(seconds, kill)
        watchdog.start()
        try:
            yield started
        finally:
            watchdog.cancel()
            kill()


def run_program(
    code: str,
    *arguments: str,
    reactor_class: type[EngineReactor] = RealtimeSignalReactor,
) -> str:
    """
    Run a Python program in a process group of its own, and kill the processes that it
    leaves behind.  It must exit with status 0.

    :param reactor_class: imported by the program as ``Reactor``, with its ``install``.
    :return: its output.
    """
    imports = (
        f"from {reactor_class.__module__} import {reactor_class.__name__} as Reactor\n"
        f"from {reactor_class.__module__} import install\n"
    )
    script = imports + textwrap.dedent(code)
    with process(sys.executable, "-c", script, *arguments) as program:
        output, errors = program.communicate()
    assert program.returncode == 0, (program.returncode, output, errors[-5000:])
    return output


def run_forking(
    code: str, reactor_class: type[EngineReactor] = RealtimeSignalReactor
) -> None:
    """
    Run a program that begins with :data:`FORKING`.  After ``code``, its reactor must
    still get its events.
    """
    ending = 'assert_events_arrive()\nprint("events arrive", flush=True)\n'
    output = run_program(FORKING + code + ending, reactor_class=reactor_class)
    assert output == "events arrive\n"


def spawn_waiting(reactor: Any, protocol: ProcessProtocol) -> tuple[Any, int]:
    """
    Start a child that ends with status 7 when a pipe is closed.

    :return: its transport, and the descriptor of the pipe.
    """
    child_end, own_end = os.pipe()
    transport = reactor.spawnProcess(
        protocol, "/bin/sh", ["sh", "-c", "read line; exit 7"], childFDs={0: child_end}
    )
    os.close(child_end)
    return transport, own_end


@contextlib.contextmanager
def unix_connection(
    reactor: EngineReactor, folder: Path
) -> Iterator[tuple[socket.socket, Any]]:
    """A client of a listening UNIX socket, and the accepted connection."""
    factory = RecorderFactory()
    path = str(folder / "socket")
    reactor.listenUNIX(path, factory)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        spin(reactor, lambda: factory.connections)
        yield client, factory.connections[0]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """
    Write a self-signed certificate for this machine, and its key.

    All tests of a session have the same one.
    """
    paths = folder / "certificate.pem", folder / "key.pem"
    for path, pem in zip(paths, _certificate_and_key(), strict=True):
        path.write_bytes(pem)
    return paths


@functools.cache
def _certificate_and_key() -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class Served:
    """A listening port on a reactor, its connections, and plain clients."""

    def __init__(
        self, reactor: EngineReactor, protocol: Callable[[], Recorder] = Recorder
    ) -> None:
        self.reactor = reactor
        self.factory = RecorderFactory(protocol)
        self.port = reactor.listenTCP(0, self.factory, interface="127.0.0.1")
        self.clients: list[socket.socket] = []

    def connect(self) -> tuple[socket.socket, Any]:
        """A new client, and the accepted connection."""
        client = connect(self.port)
        self.clients.append(client)
        wanted = len(self.factory.connections) + 1
        spin(self.reactor, lambda: len(self.factory.connections) == wanted)
        settle(self.reactor)
        return client, self.factory.connections[-1]

    def send_bytes(self, client: socket.socket, connection: Any, count: int) -> None:
        """Let a client send bytes one by one, and wait until all have arrived."""
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wanted = len(connection.data) + count
        for _ in range(count):
            client.sendall(b"x")
        spin(self.reactor, lambda: len(connection.data) == wanted)

    def cost_of_requests(self, count: int) -> dict[str, int]:
        """
        Receive requests over one connection, each after the one before has arrived.

        :return: how much the counts of the reactor's statistics have grown.
        """
        client, connection = self.connect()
        before = self.reactor.statistics()
        for turn in range(1, count + 1):
            client.sendall(b"x")
            spin(self.reactor, lambda: len(connection.data) == turn)
        settle(self.reactor)
        after = self.reactor.statistics()
        return {name: after[name] - before[name] for name in after}

    def close(self) -> None:
        """Close both ends of all connections, paused ones as well."""
        for client in self.clients:
            client.close()
        for connection in self.factory.connections:
            if not connection.lost:
                connection.transport.connectionLost(Failure(ConnectionDone()))


def blocked_signals(status: str = "") -> int:
    """The mask of blocked signals: of this thread, or in the status of a process."""
    if not status:
        with open("/proc/thread-self/status") as file:
            status = file.read()
    line = next(each for each in status.splitlines() if each.startswith("SigBlk"))
    return int(line.split()[1], 16)


def reset(connection: socket.socket) -> None:
    """Close a connection in a way that its peer takes for an error."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """
    A TCP port of this machine that refuses connections: a socket is bound to it and
    does not listen, so that no other socket can get the port.
    """
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def read_all(reactor: EngineReactor, client: socket.socket, size: int) -> None:
    """Read until ``size`` bytes have arrived."""
    client.setblocking(False)
    got = 0

    def read() -> None:
        nonlocal got
        with contextlib.suppress(BlockingIOError):
            while chunk := client.recv(1 << 20):
                got += len(chunk)

    # Read in the reactor itself.  The kernel goes on sending while the reactor sleeps,
    # and may report room only when this end has read that as well.
    watcher = Watcher(reactor, client.fileno())
    watcher.on_read = read
    reactor.addReader(watcher)
    spin(reactor, lambda: got >= size)
    reactor.removeReader(watcher)
    assert got == size


class Output(ProcessProtocol):
    """Collects the output of a child."""

    def __init__(self) -> None:
        self.output = b""
        self.ended = False

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.output += data

    def processEnded(self, reason: Failure) -> None:
        self.ended = True


ECHO = """
import os, socket, sys, threading
from twisted.internet.protocol import Factory, Protocol

class Echo(Protocol):
    def dataReceived(self, data):
        self.transport.write(data)

def listen(reactor):
    return reactor.listenTCP(
        0, Factory.forProtocol(Echo), interface="127.0.0.1").socket.getsockname()

def talk(client, times=20):
    for turn in range(times):
        client.sendall(b"%03d" % turn)
        assert client.recv(3) == b"%03d" % turn

def converse(address, times=20):
    with socket.create_connection(address, timeout=20) as client:
        talk(client, times)

def in_thread(function, *arguments):
    outcome = []
    def call():
        try:
            outcome.append(function(*arguments))
        except BaseException as error:
            outcome.append(error)
    thread = threading.Thread(target=call)
    thread.outcome = outcome
    thread.start()
    return thread
"""
"""The beginning of a program with an echo server, clients and threads."""


FORKING = (
    ECHO
    + """
import traceback

reactor = Reactor()
address = listen(reactor)
client = socket.create_connection(address, timeout=20)

def events():
    counts = reactor.statistics()
    return counts["signals"] if "signals" in counts else counts["events"]

def spin_until_done(thread):
    while thread.is_alive():
        reactor.iterate(0.05)
    assert thread.outcome == [None], thread.outcome

def in_child(function):
    'Call the function in a forked child, which must return None or 0.'
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = function() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

def assert_events_arrive():
    'The input of the connection is reported by events, and not found by a check.'
    # The connection is accepted, and armed after it was found idle for a while.
    reactor.iterate(0)
    while not reactor.statistics()["armed"]:
        reactor.iterate(0)
    # Then it is checked once more.  If that check found the first input, the signal of
    # that input would come together with the next one, and the connection be taken for
    # noisy.
    reactor.iterate(0)
    before = events()
    spin_until_done(in_thread(talk, client))
    assert reactor.statistics()["armed"] == 1
    assert events() >= before + 10, reactor.statistics()

assert_events_arrive()
"""
)
"""The beginning of a program that forks: a reactor, and one connection to it."""
