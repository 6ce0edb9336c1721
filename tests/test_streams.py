"""
The stream transports: reading, writing and closing, in each role.

Every test of behaviour runs on Twisted's epoll reactor as well, which says what
the behaviour has to be.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import random
import signal
import socket
import ssl
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("realtime signals exist on Linux only", allow_module_level=True)

from twisted.internet import tcp, unix
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IFileDescriptorReceiver,
    IHalfCloseableProtocol,
    IPullProducer,
    IPushProducer,
)
from twisted.internet.protocol import ClientFactory
from twisted.internet.ssl import PrivateCertificate
from twisted.python import log
from twisted.python.failure import Failure
from zope.interface import alsoProvides, implementer

from tests.support import (
    DEADLINE,
    Recorder,
    RecorderFactory,
    dispose,
    each_of,
    make_certificate,
    reactor_classes,
    reset,
    settle,
)
from twisted_rtsig.engine.reactor import EngineReactor

REACTORS = [EPollReactor, *reactor_classes()]
KINDS = [
    "TCP server",
    "TCP client",
    "UNIX server",
    "UNIX client",
    "adopted TCP",
    "adopted UNIX",
]
MEGABYTE = 1 << 20


def spin(reactor: Any, until: Callable[[], Any]) -> None:
    """
    Iterate until something is true, which may come true without an event for
    the reactor: at the other end of a connection.
    """
    end = time.monotonic() + DEADLINE
    while not until():
        assert time.monotonic() < end, "it did not happen"
        reactor.iterate(0.01)


class Counted:
    """
    A socket that counts what it is asked to do.

    :ivar sent: what each ``send`` was given and has sent.
    :ivar received: how often it was read from.
    :ivar send_raises: what the next sends raise, after they have sent.
    :ivar recv_raises: what the reads raise, instead of reading.
    """

    def __init__(self, real: socket.socket) -> None:
        self._real = real
        self.sent: list[bytes] = []
        self.received = 0
        self.send_raises: list[BaseException] = []
        self.recv_raises: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def send(self, data: Any) -> int:
        size = self._real.send(data)
        self.sent.append(bytes(data[:size]))
        if self.send_raises:
            raise self.send_raises.pop()
        return size

    def recv(self, size: int) -> bytes:
        self.received += 1
        if self.recv_raises is not None:
            raise self.recv_raises
        return self._real.recv(size)

    def recvmsg(self, *arguments: Any) -> Any:
        self.received += 1
        if self.recv_raises is not None:
            raise self.recv_raises
        return self._real.recvmsg(*arguments)


class Link:
    """
    A stream on a reactor, and a plain socket at its other end.

    :ivar protocol: records what the stream receives.
    :ivar peer: the plain socket, with a time limit.
    """

    def __init__(self, reactor: Any, kind: str, folder: Any) -> None:
        self.reactor = reactor
        self.factory = RecorderFactory()
        self._listening: list[Any] = []
        family, role = kind.split()
        if family == "adopted":
            family, role = role, "adopted"
        unix_path = str(folder / "socket")
        if role == "server":
            if family == "TCP":
                port = reactor.listenTCP(0, self.factory, interface="127.0.0.1")
                self.peer = socket.create_connection(port.socket.getsockname())
            else:
                port = reactor.listenUNIX(unix_path, self.factory)
                self.peer = socket.socket(socket.AF_UNIX)
                self.peer.connect(unix_path)
            self._listening.append(port)
            spin(reactor, lambda: self.factory.connections)
        elif role == "client":
            listener = socket.socket(
                socket.AF_INET if family == "TCP" else socket.AF_UNIX
            )
            listener.bind(("127.0.0.1", 0) if family == "TCP" else unix_path)
            listener.listen()
            client = ClientFactory()
            client.noisy = False
            client.buildProtocol = self.factory.buildProtocol  # type: ignore[method-assign]
            if family == "TCP":
                reactor.connectTCP(*listener.getsockname(), client)
            else:
                reactor.connectUNIX(unix_path, client)
            spin(reactor, lambda: self.factory.connections)
            self.peer, _ = listener.accept()
            listener.close()
        else:
            if family == "TCP":
                listener = socket.create_server(("127.0.0.1", 0))
                self.peer = socket.create_connection(listener.getsockname())
                adopted, _ = listener.accept()
                listener.close()
            else:
                self.peer, adopted = socket.socketpair()
            adopted.setblocking(False)
            reactor.adoptStreamConnection(
                adopted.fileno(), adopted.family, self.factory
            )
            adopted.close()
        self.peer.settimeout(DEADLINE)
        self.protocol: Any = self.factory.connections[0]
        self.transport: Any = self.protocol.transport
        settle(reactor)

    def count(self) -> Counted:
        self.transport.socket = counted = Counted(self.transport.socket)
        return counted

    def receive(self, size: int) -> bytes:
        """So many bytes at the other end."""
        self.peer.setblocking(False)
        data = b""

        def complete() -> bool:
            nonlocal data
            with contextlib.suppress(BlockingIOError):
                while len(data) < size and (chunk := self.peer.recv(size - len(data))):
                    data += chunk
            return len(data) >= size

        spin(self.reactor, complete)
        self.peer.settimeout(DEADLINE)
        return data

    def receive_rest(self) -> bytes:
        """What the other end gets until the stream has closed."""
        self.peer.setblocking(False)
        data, ended = b"", False

        def complete() -> bool:
            nonlocal data, ended
            with contextlib.suppress(BlockingIOError):
                while chunk := self.peer.recv(MEGABYTE):
                    data += chunk
                ended = True
            return ended

        spin(self.reactor, complete)
        return data

    def fill(self) -> bytes:
        """Write until the kernel's buffer is full; what was written."""
        data = random.Random(1).randbytes(8 * MEGABYTE)
        self.transport.write(data)
        settle(self.reactor)
        return data

    def is_writer(self) -> bool:
        return self.transport in self.reactor.getWriters()

    def close(self) -> None:
        self.peer.close()
        for connection in self.factory.connections:
            if not connection.lost:
                connection.transport.abortConnection()
        settle(self.reactor)
        for port in self._listening:
            port.stopListening()
        settle(self.reactor)


@pytest.fixture(params=each_of(REACTORS), ids=lambda each: each.__name__)
def any_reactor(request: Any) -> Iterator[Any]:
    reactor = request.param()
    yield reactor
    dispose(reactor)


@pytest.fixture(params=KINDS)
def link(request: Any, any_reactor: Any, tmp_path: Any) -> Iterator[Link]:
    it = Link(any_reactor, request.param, tmp_path)
    yield it
    it.close()


@pytest.fixture(params=KINDS)
def our_link(
    request: Any, make_reactor: Callable[[], EngineReactor], tmp_path: Any
) -> Iterator[Link]:
    it = Link(make_reactor(), request.param, tmp_path)
    yield it
    it.close()


@pytest.fixture
def tcp_link(any_reactor: Any, tmp_path: Any) -> Iterator[Link]:
    it = Link(any_reactor, "TCP server", tmp_path)
    yield it
    it.close()


# What is written


def test_is_a_transport_of_twisted(link: Link) -> None:
    """Programs ask for the classes."""
    classes = {tcp.Server, tcp.Client, unix.Server, unix.Client}
    assert sum(isinstance(link.transport, each) for each in classes) in (1, 2)


def test_one_send_at_the_end_of_the_pass(our_link: Link) -> None:
    counted = our_link.count()
    during: list[int] = []

    def answer(data: bytes) -> None:
        for piece in (b"one ", b"two ", b"three"):
            our_link.transport.write(piece)
        our_link.transport.writeSequence([b" and", b" four"])
        during.append(len(counted.sent))

    our_link.protocol.dataReceived = answer
    our_link.peer.sendall(b"x")
    assert our_link.receive(18) == b"one two three and "
    assert during == [0]
    assert counted.sent == [b"one two three and four"]
    assert not our_link.is_writer()


@pytest.mark.parametrize("size", [1, 4_000, 9_000, 40_000])
@pytest.mark.parametrize("producer", [False, True])
def test_pieces_are_sent_as_one(our_link: Link, size: int, producer: bool) -> None:
    """Whatever their sizes, and in order."""
    if producer:
        our_link.transport.registerProducer(Producer(), True)
    counted = our_link.count()
    pieces = [bytes([65 + each]) * size for each in range(6)]
    transport = our_link.transport
    transport.writeSequence(pieces[:2])
    transport.write(pieces[2])
    transport.writeSequence(each for each in pieces[3:5])
    transport.writeSequence([])
    transport.write(pieces[5])
    assert our_link.receive(6 * size) == b"".join(pieces)
    assert counted.sent[0] == b"".join(pieces)[: len(counted.sent[0])]
    if size < 10_000:
        assert len(counted.sent) == 1
    assert transport.writeSequence([b""]) is None
    settle(our_link.reactor)
    assert not our_link.is_writer()


def test_a_sequence_that_cannot_be_written(link: Link) -> None:
    for wrong in ("text", bytearray(b"bytes"), None):
        with pytest.raises(TypeError, match=r"^Data must be bytes$"):
            link.transport.writeSequence([b"bytes", wrong])
    assert not link.is_writer()
    link.transport.loseWriteConnection()
    settle(link.reactor)
    link.transport.writeSequence([b"after", b"the end"])
    assert link.peer.recv(10) == b""


def test_no_look_after_a_short_read(reactor: EngineReactor, tmp_path: Any) -> None:
    """One request is one read, and no level check."""
    link = Link(reactor, "TCP server", tmp_path)
    counted = link.count()
    checks = reactor.statistics()["checks"]
    for turn in range(1, 11):
        link.peer.sendall(b"x")
        spin(reactor, lambda: len(link.protocol.data) == turn)
    settle(reactor)
    assert counted.received == 10
    assert reactor.statistics()["checks"] == checks
    link.close()


@pytest.mark.parametrize("where", ["timer", "thread call", "outside"])
def test_write_from_elsewhere(link: Link, where: str) -> None:
    write = link.transport.write
    if where == "timer":
        link.reactor.callLater(0, write, b"hello")
    elif where == "thread call":
        link.reactor.callFromThread(write, b"hello")
    else:
        write(b"hello")
    assert link.receive(5) == b"hello"


def test_write_from_a_signal_handler(our_link: Link) -> None:
    """While the reactor sleeps, which ends it."""
    counted = our_link.count()
    before = signal.signal(
        signal.SIGALRM, lambda *_: our_link.transport.write(b"from the handler")
    )
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    start = time.monotonic()
    try:
        while not counted.sent:
            our_link.reactor.iterate(DEADLINE)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() < start + DEADLINE / 2
    assert our_link.receive(16) == b"from the handler"


def test_written_by_who_iterates_within(link: Link) -> None:
    """A pass inside of a pass sends what the outer one has queued, and reads."""
    inner: list[bytes] = []

    def iterate(data: bytes) -> None:
        inner.append(data)
        if len(inner) == 1:
            link.transport.write(b"first")
            assert link.receive(5) == b"first"
            link.peer.sendall(b"more")
            spin(link.reactor, lambda: len(inner) > 1)

    link.protocol.dataReceived = iterate
    link.peer.sendall(b"x")
    spin(link.reactor, lambda: inner)
    assert b"".join(inner) == b"xmore"


def test_more_than_the_kernel_takes(link: Link) -> None:
    data = link.fill()
    assert link.is_writer()
    link.transport.write(b"the end")
    assert link.receive(len(data) + 7) == data + b"the end"
    settle(link.reactor)
    assert not link.is_writer()


def test_write_limit(our_link: Link) -> None:
    """No send is longer than SEND_LIMIT, however much there is to write."""
    counted = our_link.count()
    our_link.transport.SEND_LIMIT = 1000
    our_link.transport.write(b"w" * 1001)
    assert our_link.receive(1001) == b"w" * 1001
    our_link.transport.write(b"x" * 1001)
    our_link.transport.write(b"y" * 2500)
    assert our_link.receive(3501) == b"x" * 1001 + b"y" * 2500
    assert max(map(len, counted.sent)) == 1000


@pytest.mark.skipif(sys.platform == "win32", reason="Windows gets smaller pieces")
def test_much_is_sent_at_once(our_link: Link) -> None:
    """The kernel takes what it has room for, and its peer is woken up less often."""
    our_link.transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    counted = our_link.count()
    data = b"a" * 400_000
    our_link.transport.write(data)
    settle(our_link.reactor)
    assert len(counted.sent[0]) > tcp.Connection.SEND_LIMIT
    our_link.transport.write(b"z")
    assert our_link.receive(len(data) + 1) == data + b"z"


def test_what_cannot_be_written(link: Link) -> None:
    with pytest.raises(TypeError):
        link.transport.write("text")
    link.transport.write(b"")
    settle(link.reactor)
    assert not link.is_writer()

    class Subclass(bytes):
        pass

    link.transport.write(Subclass(b"bytes"))
    assert link.receive(5) == b"bytes"


def test_queued_writer_is_a_writer(our_link: Link) -> None:
    our_link.transport.write(b"x")
    assert our_link.reactor.getWriters().count(our_link.transport) == 1
    our_link.transport.stopWriting()
    assert not our_link.is_writer()
    settle(our_link.reactor)
    our_link.transport.write(b"y")
    assert our_link.receive(2) == b"xy"


def test_added_as_a_writer_while_queued(link: Link) -> None:
    """By the application, which may."""
    link.transport.write(b"x")
    link.reactor.addWriter(link.transport)
    assert link.receive(1) == b"x"
    settle(link.reactor)
    assert not link.is_writer()
    link.transport.write(b"y")
    assert link.receive(1) == b"y"


def test_remove_all_while_queued(our_link: Link) -> None:
    our_link.transport.write(b"x")
    removed = our_link.reactor.removeAll()
    assert our_link.transport in removed
    assert not our_link.is_writer()
    our_link.transport.startReading()


# Producers


@implementer(IPushProducer)
class Producer:
    """Counts what it is asked to do; in turn it may do something."""

    def __init__(self, resume: Callable[[], None] = lambda: None) -> None:
        self.calls: list[str] = []
        self._resume = resume

    def resumeProducing(self) -> None:
        self.calls.append("resume")
        self._resume()

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def stopProducing(self) -> None:
        self.calls.append("stop")


def test_push_producer(link: Link) -> None:
    producer = Producer()
    link.transport.registerProducer(producer, True)
    link.transport.write(b"x")
    assert link.receive(1) == b"x"
    assert producer.calls == []
    data = link.fill()
    assert producer.calls == ["pause"]
    link.receive(len(data))
    spin(link.reactor, lambda: producer.calls == ["pause", "resume"])
    link.transport.unregisterProducer()
    link.transport.write(b"y")
    assert link.receive(1) == b"y"


@pytest.mark.parametrize(
    ("parts", "paused"),
    [((1 << 16,), False), (((1 << 16) + 1,), True), ((1, 1 << 16), True), ((), False)],
)
def test_a_push_producer_is_paused_by_more_than_a_buffer(
    link: Link, parts: tuple[int, ...], paused: bool
) -> None:
    producer = Producer()
    link.transport.registerProducer(producer, True)
    for length in parts:
        link.transport.write(b"x" * length)
    assert producer.calls == ["pause"] * paused
    assert link.receive(sum(parts)) == b"x" * sum(parts)
    spin(link.reactor, lambda: producer.calls == ["pause", "resume"][: 2 * paused])
    link.transport.unregisterProducer()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("unregister", [False, True])
def test_a_producer_that_writes_once_more_before_the_end(
    link: Link, half: bool, unregister: bool
) -> None:
    """What was asked for before it was resumed happens when all is written."""
    transport = link.transport

    def resume() -> None:
        if producer.calls.count("resume") == 1:
            transport.write(b"the last")
            if unregister:
                transport.unregisterProducer()

    producer = Producer(resume)
    transport.registerProducer(producer, True)
    data = link.fill()
    assert producer.calls == ["pause"]
    if half:
        transport.loseWriteConnection()
    else:
        transport.loseConnection()
    if half or unregister:
        assert link.receive_rest() == data + b"the last"
    else:
        # As with Twisted: not before its producer is unregistered.
        assert link.receive(len(data) + 8) == data + b"the last"
        transport.unregisterProducer()
        assert link.receive_rest() == b""


def test_a_producer_in_the_place_of_one_that_was_paused(link: Link) -> None:
    """It is resumed when there is room, as the former one would have been."""
    first, second = Producer(), Producer()
    link.transport.registerProducer(first, True)
    data = link.fill()
    link.transport.unregisterProducer()
    link.receive(len(data))
    settle(link.reactor)
    link.transport.registerProducer(second, True)
    link.transport.write(b"x")
    assert link.receive(1) == b"x"
    spin(link.reactor, lambda: second.calls == ["resume"])
    link.transport.unregisterProducer()


def test_producer_registered_after_a_write(link: Link) -> None:
    producer = Producer()
    link.transport.write(b"x")
    link.transport.registerProducer(producer, True)
    link.transport.write(b"y" * (1 << 17))
    assert producer.calls == ["pause"]
    assert link.receive(1 + (1 << 17)) == b"x" + b"y" * (1 << 17)
    spin(link.reactor, lambda: producer.calls == ["pause", "resume"])
    link.transport.unregisterProducer()


def test_pull_producer(link: Link) -> None:
    pieces = [b"%04d" % number for number in range(100)]
    left = list(pieces)

    def produce() -> None:
        if left:
            link.transport.write(left.pop(0))
        else:
            link.transport.unregisterProducer()
            link.transport.loseConnection()

    producer = Producer(produce)
    alsoProvides(producer, IPullProducer)
    link.transport.registerProducer(producer, False)
    assert link.receive_rest() == b"".join(pieces)
    assert producer.calls == ["resume"] * 101
    assert link.protocol.lost


def test_pull_producer_that_has_nothing_yet(link: Link) -> None:
    """It is asked again when what was written before it came has been sent."""
    producer = Producer()
    link.transport.write(b"x")
    link.transport.registerProducer(producer, False)
    assert producer.calls == ["resume"]
    spin(link.reactor, lambda: producer.calls == ["resume"] * 2)
    assert link.receive(1) == b"x"
    link.transport.unregisterProducer()


def test_producer_raises(link: Link) -> None:
    """It is logged, and the connection ends."""
    error = RuntimeError("the producer")

    def fail() -> None:
        if len(producer.calls) > 1:
            raise error

    producer = Producer(fail)
    link.transport.registerProducer(producer, False)
    logged: list[Any] = []
    log.addObserver(logged.append)
    try:
        link.transport.write(b"x")
        spin(link.reactor, lambda: link.protocol.lost)
    finally:
        log.removeObserver(logged.append)
    [event] = [each for each in logged if each["isError"]]
    assert event["failure"].value is error
    assert event["system"] == link.transport.logPrefix()


# The end of a connection


def test_lose_connection_sends_first(link: Link) -> None:
    link.transport.write(b"the last")
    link.transport.write(b" words")
    link.transport.loseConnection()
    link.transport.write(b", too late")
    assert link.receive_rest().startswith(b"the last words")
    [reason] = link.protocol.lost
    assert reason.check(ConnectionDone)


def test_lose_connection_with_a_full_buffer(link: Link) -> None:
    data = link.fill()
    link.transport.loseConnection()
    assert link.receive_rest() == data
    assert link.protocol.lost[0].check(ConnectionDone)


def test_abort_sends_nothing(link: Link) -> None:
    link.transport.write(b"never")
    link.transport.abortConnection()
    link.transport.write(b"sent")
    spin(link.reactor, lambda: link.protocol.lost)
    assert link.protocol.lost[0].check(ConnectionAborted)
    with contextlib.suppress(ConnectionResetError):
        assert link.peer.recv(10) == b""


def test_write_after_abort(link: Link) -> None:
    link.transport.abortConnection()
    link.transport.write(b"never")
    spin(link.reactor, lambda: link.protocol.lost)
    with contextlib.suppress(ConnectionResetError):
        assert link.peer.recv(10) == b""


def test_half_close(link: Link) -> None:
    """Both directions, one after the other."""
    ends: list[str] = []
    link.protocol.readConnectionLost = lambda: ends.append("read")
    link.protocol.writeConnectionLost = lambda: ends.append("write")
    alsoProvides(link.protocol, IHalfCloseableProtocol)
    link.transport.write(b"request")
    link.transport.loseWriteConnection()
    assert link.receive_rest() == b"request"
    assert ends == ["write"]
    link.peer.settimeout(DEADLINE)
    link.peer.sendall(b"answer")
    link.peer.shutdown(socket.SHUT_WR)
    spin(link.reactor, lambda: len(ends) == 2)
    assert ends == ["write", "read"]
    assert link.protocol.data == b"answer"
    link.transport.loseConnection()
    spin(link.reactor, lambda: link.protocol.lost)


def test_peer_is_gone_when_written_to(link: Link) -> None:
    link.transport.pauseProducing()
    settle(link.reactor)
    if link.peer.family == socket.AF_INET:
        reset(link.peer)
    else:
        link.peer.close()

    def write() -> bool:
        link.transport.write(b"x")
        return bool(link.protocol.lost)

    spin(link.reactor, write)
    assert link.protocol.lost[0].check(ConnectionLost)


def leave(peer: socket.socket) -> None:
    """Close the other end in the way that makes the next send fail."""
    if peer.family == socket.AF_INET:
        reset(peer)
    else:
        peer.close()


@pytest.mark.parametrize("written", [b"x", bytes(MEGABYTE)], ids=["chunk", "parts"])
def test_a_write_that_fails_loses_nothing_that_has_arrived(
    link: Link, written: bytes
) -> None:
    """The peer answers and resets before the write is sent: "413", say."""
    link.peer.sendall(b"413 Too Large")
    leave(link.peer)
    link.transport.write(written)
    spin(link.reactor, lambda: link.protocol.lost)
    assert link.protocol.data == b"413 Too Large"
    assert link.protocol.lost[0].check(ConnectionLost)


def test_a_write_that_fails_reads_to_the_end(our_link: Link) -> None:
    """Whatever has arrived, and not one read of it."""
    handle = our_link.transport.socket
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MEGABYTE)
    our_link.peer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(8):
            our_link.peer.send(bytes(range(256)) * 128)
    waiting = array.array("i", [0])
    fcntl.ioctl(handle, termios.FIONREAD, waiting)
    assert waiting[0] > 2 * our_link.transport.bufferSize
    leave(our_link.peer)
    our_link.transport.write(b"x")
    spin(our_link.reactor, lambda: our_link.protocol.lost)
    assert len(our_link.protocol.data) == waiting[0]
    assert our_link.protocol.lost[0].check(ConnectionLost)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("abortConnection", ConnectionAborted),
        ("loseConnection", ConnectionLost),
        ("pauseProducing", ConnectionLost),
        ("raise", ZeroDivisionError),
    ],
)
def test_what_the_application_does_when_a_write_has_failed(
    link: Link, method: str, reason: type[BaseException]
) -> None:
    """It reads what has arrived, and closes the connection itself, say."""
    link.protocol.data = b""

    def received(data: bytes) -> None:
        link.protocol.data += data
        link.transport.write(b"not sent either")
        if method == "raise":
            raise ZeroDivisionError
        getattr(link.transport, method)()

    link.protocol.dataReceived = received
    link.peer.sendall(b"413")
    leave(link.peer)
    link.transport.write(b"x")
    logged: list[Any] = []
    log.addObserver(logged.append)
    try:
        spin(link.reactor, lambda: link.protocol.lost)
        settle(link.reactor)
    finally:
        log.removeObserver(logged.append)
    errors = [each["failure"].type for each in logged if each["isError"]]
    assert link.protocol.data == b"413"
    assert [bool(each.check(reason)) for each in link.protocol.lost] == [True]
    assert errors == ([ZeroDivisionError] if method == "raise" else [])
    assert link.transport not in link.reactor.getReaders()


def test_a_pass_within_the_read_after_a_write_that_fails(our_link: Link) -> None:
    """It may meet the end itself, and disconnects the stream, once."""
    received = our_link.protocol.dataReceived

    def iterate(data: bytes) -> None:
        received(data)
        our_link.reactor.iterate(0)

    our_link.protocol.dataReceived = iterate
    our_link.peer.sendall(b"413")
    leave(our_link.peer)
    our_link.transport.write(b"x")
    logged: list[Any] = []
    log.addObserver(logged.append)
    try:
        spin(our_link.reactor, lambda: our_link.protocol.lost)
        settle(our_link.reactor)
    finally:
        log.removeObserver(logged.append)
    assert our_link.protocol.data == b"413"
    assert len(our_link.protocol.lost) == 1
    assert [each for each in logged if each["isError"]] == []


def test_a_paused_protocol_is_given_nothing_by_a_write_that_fails(link: Link) -> None:
    link.transport.pauseProducing()
    link.peer.sendall(b"413")
    leave(link.peer)
    link.transport.write(b"x")
    spin(link.reactor, lambda: link.protocol.lost)
    assert link.protocol.data == b""
    assert link.protocol.lost[0].check(ConnectionLost)


def test_reset_is_told_as_such(tcp_link: Link) -> None:
    tcp_link.peer.sendall(b"data")
    reset(tcp_link.peer)
    spin(tcp_link.reactor, lambda: tcp_link.protocol.lost)
    assert tcp_link.protocol.lost[0].check(ConnectionLost)
    assert not tcp_link.protocol.lost[0].check(ConnectionDone)


def test_one_disconnects_the_other(any_reactor: Any, tmp_path: Any) -> None:
    """Before the other has sent what it has queued in the same pass."""
    first = Link(any_reactor, "TCP server", tmp_path)
    second = Link(any_reactor, "TCP server", tmp_path)

    def resume() -> None:
        if len(producer.calls) == 2:
            second.transport.connectionLost(Failure(ConnectionDone()))

    producer = Producer(resume)
    first.transport.registerProducer(producer, False)
    first.transport.write(b"x")
    second.transport.write(b"y")
    spin(any_reactor, lambda: second.protocol.lost)
    assert first.receive(1) == b"x"
    first.transport.unregisterProducer()
    first.close()
    second.close()


@pytest.mark.parametrize("pieces", [[b"x"], [b"x", b"y"]])
def test_interrupted_send(link: Link, pieces: list[bytes]) -> None:
    """Nobody knows what was sent: it is not sent twice, and it is the end."""
    counted = link.count()
    error = KeyboardInterrupt()
    counted.send_raises.append(error)
    for piece in pieces:
        link.transport.write(piece)
    logged: list[Any] = []
    log.addObserver(logged.append)
    try:
        spin(link.reactor, lambda: link.protocol.lost)
    finally:
        log.removeObserver(logged.append)
    [event] = [each for each in logged if each["isError"]]
    assert event["failure"].value is error
    assert link.protocol.lost[0].value is error
    assert counted.sent == [b"".join(pieces)]


def test_interrupted_between_two_sends(reactor: EngineReactor, tmp_path: Any) -> None:
    """What was not come to is sent by the next pass, also for one who reads not."""
    first, second = (Link(reactor, "TCP server", tmp_path) for _ in range(2))

    def interrupted(reason: Any) -> None:
        raise KeyboardInterrupt

    first.protocol.connectionLost = interrupted
    first.count().send_raises += [BrokenPipeError(errno.EPIPE, "by the test")] * 2
    second.transport.pauseProducing()
    first.transport.write(b"x")
    second.transport.write(b"y")
    with pytest.raises(KeyboardInterrupt):
        settle(reactor)
    assert second.receive(1) == b"y"
    first.protocol.lost.append(None)
    first.close()
    second.close()


def test_interrupted_after_half_a_close(our_link: Link, monkeypatch: Any) -> None:
    """What is queued again, to be sure, does not end a second time."""
    ends: list[str] = []
    our_link.protocol.readConnectionLost = lambda: ends.append("read")
    our_link.protocol.writeConnectionLost = lambda: ends.append("write")
    alsoProvides(our_link.protocol, IHalfCloseableProtocol)
    our_link.transport.loseWriteConnection()
    settle(our_link.reactor)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(our_link.reactor._notifier, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            our_link.reactor.iterate(0)
    settle(our_link.reactor)
    assert ends == ["write"]


# What is read


@pytest.mark.parametrize("size", [1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 18])
def test_data_and_end_together(link: Link, size: int) -> None:
    """No read is the last one before the end of the stream was seen."""
    data = b"x" * size
    link.peer.setblocking(False)
    sent = 0

    def send() -> bool:
        nonlocal sent
        with contextlib.suppress(BlockingIOError):
            while sent < size:
                sent += link.peer.send(data[sent:])
        return sent == size

    spin(link.reactor, send)
    link.peer.shutdown(socket.SHUT_WR)
    spin(link.reactor, lambda: link.protocol.lost)
    assert link.protocol.data == data
    assert link.protocol.lost[0].check(ConnectionDone)


def test_data_and_end_of_many(any_reactor: Any) -> None:
    """In all the ways that signals of data and end can be spread over batches."""
    factory = RecorderFactory()
    port = any_reactor.listenTCP(0, factory, backlog=200, interface="127.0.0.1")
    clients = [socket.create_connection(port.socket.getsockname()) for _ in range(150)]
    spin(any_reactor, lambda: len(factory.connections) == len(clients))
    settle(any_reactor)
    for number, client in enumerate(clients):
        client.sendall(b"x" * (number + 1))
        if number % 3 == 0:
            any_reactor.iterate(0)
        client.sendall(b"y")
        if number % 2:
            any_reactor.iterate(0)
        client.close()
    spin(any_reactor, lambda: all(each.lost for each in factory.connections))
    assert sorted(len(each.data) for each in factory.connections) == [
        number + 2 for number in range(len(clients))
    ]
    port.stopListening()
    settle(any_reactor)


def test_paused_while_data_comes(link: Link) -> None:
    for turn in range(5):
        link.transport.pauseProducing()
        link.peer.sendall(b"%d" % turn)
        settle(link.reactor)
        assert len(link.protocol.data) == turn
        link.transport.resumeProducing()
        spin(link.reactor, lambda: len(link.protocol.data) == turn + 1)
    assert link.protocol.data == b"01234"


def test_paused_by_another_of_the_same_batch(any_reactor: Any, tmp_path: Any) -> None:
    links = [Link(any_reactor, "TCP server", tmp_path) for _ in range(2)]

    def pause_both(data: bytes) -> None:
        calls.append(data)
        for each in links:
            each.transport.pauseProducing()

    calls: list[bytes] = []
    for each in links:
        each.protocol.dataReceived = pause_both
        each.peer.sendall(b"x")
    spin(any_reactor, lambda: calls)
    settle(any_reactor)
    assert calls == [b"x"]
    for each in links:
        each.transport.resumeProducing()
    spin(any_reactor, lambda: len(calls) == 2)
    for each in links:
        each.close()


def test_urgent_data(tcp_link: Link) -> None:
    """A read stops at its mark; what is behind is read as well."""
    for turn in range(3):
        tcp_link.peer.sendall(b"before")
        tcp_link.peer.send(b"!", socket.MSG_OOB)
        tcp_link.peer.sendall(b"behind")
        wanted = b"beforebehind" * (turn + 1)
        spin(tcp_link.reactor, lambda: tcp_link.protocol.data == wanted)
    tcp_link.peer.send(b"!", socket.MSG_OOB)
    tcp_link.peer.sendall(b"end")
    tcp_link.peer.close()
    spin(tcp_link.reactor, lambda: tcp_link.protocol.lost)
    assert tcp_link.protocol.data.endswith(b"end")


@pytest.mark.parametrize("size", [1, 10])
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ETIMEDOUT, ConnectionLost), (errno.EBADF, None)]
)
def test_read_fails(link: Link, size: int, number: int, kind: Any) -> None:
    """At once, or when it reads on because there may be more."""
    link.transport.bufferSize = 10
    counted = link.count()

    def fail(data: bytes) -> None:
        counted.recv_raises = OSError(number, "by the test")

    if size == 1:
        fail(b"")
    else:
        link.protocol.dataReceived = fail
    link.peer.sendall(b"x" * (size + 1))
    spin(link.reactor, lambda: link.protocol.lost)
    if kind is not None:
        assert link.protocol.lost[0].check(kind)


def test_half_close_after_a_full_read(link: Link) -> None:
    """The end that a further read finds is the end of one direction only."""
    ends: list[str] = []
    link.protocol.readConnectionLost = lambda: ends.append("read")
    link.protocol.writeConnectionLost = lambda: ends.append("write")
    alsoProvides(link.protocol, IHalfCloseableProtocol)
    link.transport.bufferSize = 10
    link.peer.sendall(b"x" * 10)
    link.peer.shutdown(socket.SHUT_WR)
    spin(link.reactor, lambda: ends)
    assert link.protocol.data == b"x" * 10
    link.transport.write(b"answer")
    assert link.receive(6) == b"answer"
    assert ends == ["read"]


def test_fast_sender(our_link: Link) -> None:
    """Who always has more to say gets no larger share of a pass with time."""
    our_link.transport.bufferSize = 10
    counted = our_link.count()
    reads = []
    for _ in range(20):
        our_link.peer.sendall(b"x" * 100)
        before = counted.received
        our_link.reactor.iterate(0.01)
        reads.append(counted.received - before)
    # What an event leads to, and what a full read in the last pass does.
    assert max(reads) <= 1 + 4
    spin(our_link.reactor, lambda: len(our_link.protocol.data) == 2000)


@pytest.mark.parametrize("kind", ["UNIX server", "UNIX client", "adopted UNIX"])
def test_descriptors_travel(any_reactor: Any, kind: str, tmp_path: Any) -> None:
    """In order with the bytes before and behind them, in both directions."""
    link = Link(any_reactor, kind, tmp_path)
    got: list[int] = []
    link.protocol.fileDescriptorReceived = got.append
    alsoProvides(link.protocol, IFileDescriptorReceiver)
    reading, writing = os.pipe()
    descriptors = array.array("i", [reading])
    for _ in range(3):
        link.peer.sendall(b"before")
        link.peer.sendmsg(
            [b"with"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
        )
        link.peer.sendall(b"behind")
    spin(any_reactor, lambda: link.protocol.data == b"beforewithbehind" * 3)
    assert len(got) == 3

    link.transport.write(b"before")
    link.transport.sendFileDescriptor(writing)
    link.transport.write(b"behind")
    settle(any_reactor)
    data, received, _, _ = socket.recv_fds(link.peer, 100, 5)
    while len(data) < 12:
        settle(any_reactor)
        data += link.peer.recv(100)
    assert data == b"beforebehind"
    os.write(received[0], b"through")
    assert os.read(got[0], 10) == b"through"
    assert not link.is_writer()

    # The last of it arrives before a write that fails.
    link.peer.sendmsg([b"with"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    link.peer.sendall(b"end")
    link.peer.close()
    link.transport.sendFileDescriptor(writing)
    link.transport.write(b"x")
    spin(any_reactor, lambda: link.protocol.lost)
    if any_reactor.__class__ is not EPollReactor:
        # Which reads once.
        assert link.protocol.data.endswith(b"withend")
    assert len(got) == 4
    for number in (reading, writing, *got, *received):
        os.close(number)
    link.close()


def test_application_fails(any_reactor: Any, tmp_path: Any) -> None:
    """It is logged with who it was, and nobody else suffers."""
    links = [Link(any_reactor, "TCP server", tmp_path) for _ in range(3)]
    error = RuntimeError("the application")

    def fail(data: bytes) -> None:
        raise error

    links[1].protocol.dataReceived = fail
    prefix = links[1].transport.logPrefix()
    logged: list[Any] = []
    log.addObserver(logged.append)
    try:
        for each in links:
            each.peer.sendall(b"x")
        for each in (links[0], links[2]):
            spin(any_reactor, lambda: each.protocol.data)
        spin(any_reactor, lambda: links[1].protocol.lost)
    finally:
        log.removeObserver(logged.append)
    [event] = [each for each in logged if each["isError"]]
    assert event["failure"].value is error
    assert event["system"] == prefix
    assert links[1].protocol.lost[0].value is error
    for each in links:
        each.close()


def test_what_is_logged_tells_who(any_reactor: Any, tmp_path: Any) -> None:
    """From a stream its prefix, from elsewhere nobody's."""
    links = [Link(any_reactor, "TCP server", tmp_path) for _ in range(2)]
    systems: list[str] = []

    def observe(event: Any) -> None:
        if event.get("message") == ("here",):
            systems.append(event["system"])

    def say(*arguments: Any) -> None:
        log.msg("here")

    log.addObserver(observe)
    try:
        for each in links:
            each.protocol.dataReceived = say
            each.protocol.connectionLost = say
            each.peer.sendall(b"x")
            spin(any_reactor, lambda: len(systems) % 2 == 1)
            any_reactor.callLater(0, say)
            spin(any_reactor, lambda: len(systems) % 2 == 0)
        for each in links:
            each.peer.close()
            spin(any_reactor, lambda: each.transport.disconnected)
    finally:
        log.removeObserver(observe)
    prefixes = [each.transport.logPrefix() for each in links]
    assert systems == [prefixes[0], "-", prefixes[1], "-", *prefixes]
    for each in links:
        each.protocol.lost.append(None)
        each.close()


# TLS


# Twisted hands its certificates to pyOpenSSL in an old way.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["TCP server", "UNIX server"])
def test_start_tls(any_reactor: Any, kind: str, tmp_path: Any) -> None:
    """What was written before goes out as it is, and nothing after it does."""
    link = Link(any_reactor, kind, tmp_path)
    certificate, key = make_certificate(tmp_path)
    both = certificate.read_bytes() + key.read_bytes()
    options = PrivateCertificate.loadPEM(both).options()
    secret = b"secret" * 50_000

    def start(data: bytes) -> None:
        link.transport.write(b"220 ready")
        link.transport.startTLS(options)
        link.transport.write(secret)
        del link.protocol.dataReceived

    link.protocol.dataReceived = start
    link.peer.sendall(b"STARTTLS")
    assert link.receive(9) == b"220 ready"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(str(certificate))
    raw, plain = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(raw, plain)
    link.peer.setblocking(False)
    seen = b""

    def talk(step: Callable[[], Any]) -> Any:
        nonlocal seen
        result = None
        with contextlib.suppress(ssl.SSLWantReadError):
            result = step()
        if plain.pending:
            link.peer.sendall(plain.read())
        with contextlib.suppress(BlockingIOError):
            chunk = link.peer.recv(MEGABYTE)
            seen += chunk
            raw.write(chunk)
        return result

    def shake_hands() -> bool:
        client.do_handshake()
        return True

    spin(any_reactor, lambda: talk(shake_hands))
    got = b""

    def all_read() -> bool:
        nonlocal got
        got += talk(lambda: client.read(MEGABYTE)) or b""
        return len(got) == len(secret)

    spin(any_reactor, all_read)
    assert got == secret
    # The type of a TLS record, and not a word in plain.
    assert seen[0] == 22
    assert b"secret" not in seen
    talk(lambda: client.write(b"hello over TLS"))
    spin(any_reactor, lambda: link.protocol.data == b"hello over TLS")
    link.close()


# Everything at once


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_write_that_fails_loses_nothing_that_was_encrypted(
    tcp_link: Link, tmp_path: Any
) -> None:
    certificate, key = make_certificate(tmp_path)
    both = certificate.read_bytes() + key.read_bytes()
    tcp_link.transport.startTLS(PrivateCertificate.loadPEM(both).options())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(str(certificate))
    tcp_link.peer.setblocking(False)
    client = context.wrap_socket(
        tcp_link.peer, server_hostname="127.0.0.1", do_handshake_on_connect=False
    )

    def shaken() -> bool:
        try:
            client.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        return True

    spin(tcp_link.reactor, shaken)
    settle(tcp_link.reactor)
    client.send(b"413 Too Large")
    reset(client)
    tcp_link.transport.write(b"x")
    spin(tcp_link.reactor, lambda: tcp_link.protocol.lost)
    assert tcp_link.protocol.data == b"413 Too Large"


def test_storm(any_reactor: Any) -> None:
    """Many connections, which say what they like when they like, and end so."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    factory = RecorderFactory(Echo)
    port = any_reactor.listenTCP(0, factory, backlog=500, interface="127.0.0.1")
    talkers = [Talker(port.socket.getsockname(), chance) for _ in range(200)]

    def done() -> bool:
        for talker in talkers:
            talker.go_on()
        return all(each.ended for each in talkers) and all(
            each.lost for each in factory.connections
        )

    try:
        spin(any_reactor, done)
    except AssertionError:
        print("seed", seed, [vars(each) for each in talkers if not each.ended][:3])
        raise
    assert all(each.received == each.sent for each in talkers)
    port.stopListening()
    settle(any_reactor)


@implementer(IHalfCloseableProtocol)
class Echo(Recorder):
    """Answers with what it gets, and ends when the other side does."""

    transport: Any

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)

    def readConnectionLost(self) -> None:
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        pass


class Talker:
    """A client of an echo server that does as chance has it."""

    def __init__(self, address: Any, chance: random.Random) -> None:
        self._chance = chance
        self._socket = socket.create_connection(address)
        self._socket.setblocking(False)
        self._to_say = [
            chance.randbytes(chance.choice([1, 10, 1000, 1 << 16, 100_000]))
            for _ in range(chance.randrange(1, 8))
        ]
        self.sent = b""
        self.received = b""
        self.ended = False

    def go_on(self) -> None:
        if self.ended or self._chance.random() < 0.3:
            return
        with contextlib.suppress(BlockingIOError):
            if self._to_say:
                piece = self._to_say.pop(0)
                try:
                    size = self._socket.send(piece)
                except BlockingIOError:
                    size = 0
                self.sent += piece[:size]
                if size < len(piece):
                    self._to_say.insert(0, piece[size:])
                if not self._to_say:
                    self._socket.shutdown(socket.SHUT_WR)
            chunk = self._socket.recv(1 << 20)
            self.received += chunk
            if not chunk:
                self.ended = True
                self._socket.close()
