"""
The stream transports: reading, writing and closing, in each role.

Every test of behaviour runs on Twisted's epoll reactor as well: its behaviour is the
right one.
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
from pathlib import Path
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
    Iterate until something is true.  It may become true without an event for the
    reactor: at the other end of a connection.
    """
    end = time.monotonic() + DEADLINE
    while not until():
        assert time.monotonic() < end, "it did not happen"
        reactor.iterate(0.01)


class Counted:
    """
    A socket that counts its calls.

    :ivar sent: the bytes that each ``send`` has sent.
    :ivar received: how often it was read from.
    :ivar send_raises: raised by the next sends, after they have sent.
    :ivar recv_raises: raised by the reads, instead of reading.
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


@contextlib.contextmanager
def logged_errors() -> Iterator[list[Any]]:
    """The errors that are logged meanwhile."""
    errors: list[Any] = []

    def observe(event: Any) -> None:
        if event["isError"]:
            errors.append(event)

    log.addObserver(observe)
    try:
        yield errors
    finally:
        log.removeObserver(observe)


def record_half_closes(protocol: Any) -> list[str]:
    """Let a protocol handle half closes.  The list gets the ends of its directions."""
    ends: list[str] = []
    protocol.readConnectionLost = lambda: ends.append("read")
    protocol.writeConnectionLost = lambda: ends.append("write")
    alsoProvides(protocol, IHalfCloseableProtocol)
    return ends


class Link:
    """
    A stream on a reactor, and a plain socket at its other end.

    :ivar protocol: records the data that the stream receives.
    :ivar peer: the plain socket, with a timeout.
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
        """Receive ``size`` bytes at the other end."""
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
        """Receive at the other end until the stream has closed."""
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
        """Write until the kernel's buffer is full, and return the data."""
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


# Writing


def test_a_transport_is_an_instance_of_twisteds_class(link: Link) -> None:
    """Programs test for these classes."""
    classes = {tcp.Server, tcp.Client, unix.Server, unix.Client}
    assert sum(isinstance(link.transport, each) for each in classes) in (1, 2)


def test_writes_of_a_pass_are_sent_at_its_end_by_one_send(our_link: Link) -> None:
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
def test_pieces_are_sent_by_one_send(our_link: Link, size: int, producer: bool) -> None:
    """They are sent in order, whatever their sizes."""
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


def test_writing_a_wrong_sequence_raises_a_type_error(link: Link) -> None:
    for wrong in ("text", bytearray(b"bytes"), None):
        with pytest.raises(TypeError, match=r"^Data must be bytes$"):
            link.transport.writeSequence([b"bytes", wrong])
    assert not link.is_writer()
    link.transport.loseWriteConnection()
    settle(link.reactor)
    link.transport.writeSequence([b"after", b"the end"])
    assert link.peer.recv(10) == b""


def test_a_short_read_is_not_followed_by_another(
    reactor: EngineReactor, tmp_path: Any
) -> None:
    """One request costs one read, and no level check."""
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
def test_a_write_outside_of_the_protocol_is_sent(link: Link, where: str) -> None:
    write = link.transport.write
    if where == "timer":
        link.reactor.callLater(0, write, b"hello")
    elif where == "thread call":
        link.reactor.callFromThread(write, b"hello")
    else:
        write(b"hello")
    assert link.receive(5) == b"hello"


def test_a_write_in_a_signal_handler_is_sent(our_link: Link) -> None:
    """The write ends the sleep of the reactor."""
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


def test_a_nested_pass_sends_and_receives(link: Link) -> None:
    """It sends data that the outer pass has queued, and reads."""
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


def test_data_beyond_the_kernels_buffer_is_sent_later(link: Link) -> None:
    data = link.fill()
    assert link.is_writer()
    link.transport.write(b"the end")
    assert link.receive(len(data) + 7) == data + b"the end"
    settle(link.reactor)
    assert not link.is_writer()


def test_a_send_is_no_longer_than_the_limit(our_link: Link) -> None:
    """The limit is SEND_LIMIT, however much data there is."""
    counted = our_link.count()
    our_link.transport.SEND_LIMIT = 1000
    our_link.transport.write(b"w" * 1001)
    assert our_link.receive(1001) == b"w" * 1001
    our_link.transport.write(b"x" * 1001)
    our_link.transport.write(b"y" * 2500)
    assert our_link.receive(3501) == b"x" * 1001 + b"y" * 2500
    assert max(map(len, counted.sent)) == 1000


@pytest.mark.skipif(sys.platform == "win32", reason="Windows gets smaller pieces")
def test_a_large_write_is_sent_at_once(our_link: Link) -> None:
    """The kernel takes as much as it has room for, and the peer wakes up less often."""
    our_link.transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    counted = our_link.count()
    data = b"a" * 400_000
    our_link.transport.write(data)
    settle(our_link.reactor)
    assert len(counted.sent[0]) > tcp.Connection.SEND_LIMIT
    our_link.transport.write(b"z")
    assert our_link.receive(len(data) + 1) == data + b"z"


def test_text_and_empty_bytes_are_not_sent(link: Link) -> None:
    with pytest.raises(TypeError):
        link.transport.write("text")
    link.transport.write(b"")
    settle(link.reactor)
    assert not link.is_writer()

    class Subclass(bytes):
        pass

    link.transport.write(Subclass(b"bytes"))
    assert link.receive(5) == b"bytes"


def test_a_queued_transport_is_a_writer(our_link: Link) -> None:
    our_link.transport.write(b"x")
    assert our_link.reactor.getWriters().count(our_link.transport) == 1
    our_link.transport.stopWriting()
    assert not our_link.is_writer()
    settle(our_link.reactor)
    our_link.transport.write(b"y")
    assert our_link.receive(2) == b"xy"


def test_a_queued_transport_is_added_as_a_writer(link: Link) -> None:
    """The application may do so."""
    link.transport.write(b"x")
    link.reactor.addWriter(link.transport)
    assert link.receive(1) == b"x"
    settle(link.reactor)
    assert not link.is_writer()
    link.transport.write(b"y")
    assert link.receive(1) == b"y"


def test_removeAll_removes_a_queued_transport(our_link: Link) -> None:
    our_link.transport.write(b"x")
    removed = our_link.reactor.removeAll()
    assert our_link.transport in removed
    assert not our_link.is_writer()
    our_link.transport.startReading()


# Producers


@implementer(IPushProducer)
class Producer:
    """Records its calls, and may call ``resume`` in turn."""

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


def test_a_push_producer_is_paused_and_resumed(link: Link) -> None:
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
    """The connection was closed before that, and closes when all is written."""
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
        # As in Twisted, it does not close before its producer is unregistered.
        assert link.receive(len(data) + 8) == data + b"the last"
        transport.unregisterProducer()
        assert link.receive_rest() == b""


def test_a_producer_that_replaces_a_paused_one_is_resumed(link: Link) -> None:
    """It is resumed when there is room, as the former producer would have been."""
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


def test_a_producer_that_is_registered_after_a_write(link: Link) -> None:
    producer = Producer()
    link.transport.write(b"x")
    link.transport.registerProducer(producer, True)
    link.transport.write(b"y" * (1 << 17))
    assert producer.calls == ["pause"]
    assert link.receive(1 + (1 << 17)) == b"x" + b"y" * (1 << 17)
    spin(link.reactor, lambda: producer.calls == ["pause", "resume"])
    link.transport.unregisterProducer()


def test_a_pull_producer_is_resumed_for_each_piece(link: Link) -> None:
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


def test_a_pull_producer_without_data_is_resumed_after_an_earlier_write(
    link: Link,
) -> None:
    """It is resumed again when data that was written before it has been sent."""
    producer = Producer()
    link.transport.write(b"x")
    link.transport.registerProducer(producer, False)
    assert producer.calls == ["resume"]
    spin(link.reactor, lambda: producer.calls == ["resume"] * 2)
    assert link.receive(1) == b"x"
    link.transport.unregisterProducer()


def test_a_producer_that_raises_ends_the_connection(link: Link) -> None:
    """The exception is logged."""
    error = RuntimeError("the producer")

    def fail() -> None:
        if len(producer.calls) > 1:
            raise error

    producer = Producer(fail)
    link.transport.registerProducer(producer, False)
    with logged_errors() as errors:
        link.transport.write(b"x")
        spin(link.reactor, lambda: link.protocol.lost)
    [event] = errors
    assert event["failure"].value is error
    assert event["system"] == link.transport.logPrefix()


# The end of a connection


def test_lose_connection_sends_queued_data_first(link: Link) -> None:
    link.transport.write(b"the last")
    link.transport.write(b" words")
    link.transport.loseConnection()
    link.transport.write(b", too late")
    assert link.receive_rest().startswith(b"the last words")
    [reason] = link.protocol.lost
    assert reason.check(ConnectionDone)


def test_lose_connection_sends_a_full_buffer_first(link: Link) -> None:
    data = link.fill()
    link.transport.loseConnection()
    assert link.receive_rest() == data
    assert link.protocol.lost[0].check(ConnectionDone)


def test_abort_connection_discards_queued_data(link: Link) -> None:
    link.transport.write(b"never")
    link.transport.abortConnection()
    link.transport.write(b"sent")
    spin(link.reactor, lambda: link.protocol.lost)
    assert link.protocol.lost[0].check(ConnectionAborted)
    with contextlib.suppress(ConnectionResetError):
        assert link.peer.recv(10) == b""


def test_a_write_after_abort_connection_is_discarded(link: Link) -> None:
    link.transport.abortConnection()
    link.transport.write(b"never")
    spin(link.reactor, lambda: link.protocol.lost)
    with contextlib.suppress(ConnectionResetError):
        assert link.peer.recv(10) == b""


def test_a_transport_that_is_resumed_after_abort_connection_reads_nothing(
    link: Link,
) -> None:
    link.transport.pauseProducing()
    link.peer.sendall(b"never read")

    def abort() -> None:
        # The connection is lost in the next call of callLater(), after a pass.
        link.transport.abortConnection()
        link.transport.resumeProducing()

    link.reactor.callLater(0, abort)
    spin(link.reactor, lambda: link.protocol.lost)
    assert link.protocol.data == b""
    assert link.protocol.lost[0].check(ConnectionAborted)


@pytest.mark.parametrize("kind", ["UNIX server", "UNIX client", "adopted UNIX"])
def test_a_peer_that_sends_on_but_does_not_read_is_lost(
    any_reactor: Any, kind: str, tmp_path: Any
) -> None:
    link = Link(any_reactor, kind, tmp_path)

    def ask_for_more(data: bytes) -> None:
        # Without a limit to the reading, this goes on without end.
        assert len(received) < 100
        received.append(data)
        link.transport.write(b"x")
        link.peer.send(b"more")

    received: list[bytes] = []
    link.protocol.dataReceived = ask_for_more
    link.peer.shutdown(socket.SHUT_RD)
    link.peer.send(b"the first")
    spin(link.reactor, lambda: link.protocol.lost)
    assert link.protocol.lost[0].check(ConnectionLost)
    link.close()


def test_both_directions_half_close(link: Link) -> None:
    """One closes after the other."""
    ends = record_half_closes(link.protocol)
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


@pytest.mark.parametrize("size", [1, MEGABYTE])
def test_a_protocol_that_raises_connection_done_is_not_half_closed(
    link: Link, size: int
) -> None:
    ends = record_half_closes(link.protocol)

    def fail(data: bytes) -> None:
        raise ConnectionDone()

    link.protocol.dataReceived = fail
    link.peer.setblocking(False)
    link.peer.send(bytes(size))
    with logged_errors() as errors:
        spin(link.reactor, lambda: link.protocol.lost or ends)
    assert (ends, len(link.protocol.lost), len(errors)) == ([], 1, 1)


def test_a_transport_that_cannot_wait_to_write_is_named_in_the_log(
    our_link: Link,
) -> None:
    """The kernel took a part of the data, and refuses to watch for the rest."""

    def refuse(writer: Any) -> None:
        raise OSError(errno.ENOSPC, "by the test")

    handle = our_link.transport.socket
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    prefix = our_link.transport.logPrefix()
    our_link.transport.write(bytes(MEGABYTE))
    our_link.reactor.addWriter = refuse
    with logged_errors() as errors:
        spin(our_link.reactor, lambda: our_link.protocol.lost)
    del our_link.reactor.addWriter
    (event,) = errors
    assert event["system"] == prefix
    assert our_link.protocol.lost[0].check(OSError)


def test_reading_a_closed_descriptor_is_refused(link: Link) -> None:
    """As on Twisted's reactor, even if other code has closed the descriptor."""
    link.transport.pauseProducing()
    settle(link.reactor)
    descriptor = link.transport.fileno()
    kept = os.dup(descriptor)
    os.close(descriptor)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            link.transport.resumeProducing()
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
    link.transport.resumeProducing()
    link.peer.sendall(b"x")
    spin(link.reactor, lambda: link.protocol.data == b"x")


def test_a_write_after_the_peer_has_left_ends_the_connection(link: Link) -> None:
    link.transport.pauseProducing()
    settle(link.reactor)
    leave(link.peer)

    def write() -> bool:
        link.transport.write(b"x")
        return bool(link.protocol.lost)

    spin(link.reactor, write)
    assert link.protocol.lost[0].check(ConnectionLost)


def leave(peer: socket.socket) -> None:
    """Close the other end in a way that makes the next send fail."""
    if peer.family == socket.AF_INET:
        reset(peer)
    else:
        peer.close()


def errors_of_a_failed_write(link: Link) -> list[Any]:
    """Write after the peer has answered and left, until the connection is lost."""
    link.peer.sendall(b"413")
    leave(link.peer)
    link.transport.write(b"x")
    with logged_errors() as errors:
        spin(link.reactor, lambda: link.protocol.lost)
        settle(link.reactor)
    return errors


@pytest.mark.parametrize("written", [b"x", bytes(MEGABYTE)], ids=["chunk", "parts"])
def test_input_before_a_failed_write_is_received(link: Link, written: bytes) -> None:
    """The peer answers "413", for example, and resets before the write is sent."""
    link.peer.sendall(b"413 Too Large")
    leave(link.peer)
    link.transport.write(written)
    spin(link.reactor, lambda: link.protocol.lost)
    assert link.protocol.data == b"413 Too Large"
    assert link.protocol.lost[0].check(ConnectionLost)


def test_all_input_before_a_failed_write_is_received(our_link: Link) -> None:
    """More has arrived than one read takes."""
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
def test_the_application_closes_the_connection_after_a_failed_write(
    link: Link, method: str, reason: type[BaseException]
) -> None:
    """It receives the input, and closes the connection itself, for example."""
    link.protocol.data = b""

    def received(data: bytes) -> None:
        link.protocol.data += data
        link.transport.write(b"not sent either")
        if method == "raise":
            raise ZeroDivisionError
        getattr(link.transport, method)()

    link.protocol.dataReceived = received
    errors = errors_of_a_failed_write(link)
    assert link.protocol.data == b"413"
    assert [bool(each.check(reason)) for each in link.protocol.lost] == [True]
    raised = [each["failure"].type for each in errors]
    assert raised == ([ZeroDivisionError] if method == "raise" else [])
    assert link.transport not in link.reactor.getReaders()


def test_a_nested_pass_after_a_failed_write_disconnects_once(our_link: Link) -> None:
    """It reads the end itself, within the read of the outer pass."""
    received = our_link.protocol.dataReceived

    def iterate(data: bytes) -> None:
        received(data)
        our_link.reactor.iterate(0)

    our_link.protocol.dataReceived = iterate
    assert errors_of_a_failed_write(our_link) == []
    assert our_link.protocol.data == b"413"
    assert len(our_link.protocol.lost) == 1


def test_a_paused_protocol_gets_no_input_after_a_failed_write(link: Link) -> None:
    link.transport.pauseProducing()
    link.peer.sendall(b"413")
    leave(link.peer)
    link.transport.write(b"x")
    spin(link.reactor, lambda: link.protocol.lost)
    assert link.protocol.data == b""
    assert link.protocol.lost[0].check(ConnectionLost)


def test_a_reset_is_reported_as_connection_lost(tcp_link: Link) -> None:
    tcp_link.peer.sendall(b"data")
    reset(tcp_link.peer)
    spin(tcp_link.reactor, lambda: tcp_link.protocol.lost)
    assert tcp_link.protocol.lost[0].check(ConnectionLost)
    assert not tcp_link.protocol.lost[0].check(ConnectionDone)


def test_a_stream_disconnects_another_in_the_same_pass(
    any_reactor: Any, tmp_path: Any
) -> None:
    """The other one has not yet sent the data that it has queued."""
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
def test_an_interrupted_send_ends_the_connection(
    link: Link, pieces: list[bytes]
) -> None:
    """It is unknown how much was sent.  The data is not sent twice."""
    counted = link.count()
    error = KeyboardInterrupt()
    counted.send_raises.append(error)
    for piece in pieces:
        link.transport.write(piece)
    with logged_errors() as errors:
        spin(link.reactor, lambda: link.protocol.lost)
    [event] = errors
    assert event["failure"].value is error
    assert link.protocol.lost[0].value is error
    assert counted.sent == [b"".join(pieces)]


def test_an_interrupt_between_two_sends_loses_no_data(
    reactor: EngineReactor, tmp_path: Any
) -> None:
    """The next pass sends the data that is left, also of a stream that is paused."""
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


def test_an_interrupt_after_a_half_close_does_not_repeat_it(
    our_link: Link, monkeypatch: Any
) -> None:
    """After an interrupt all streams are queued again, to be sure."""
    ends = record_half_closes(our_link.protocol)
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


# Reading


@pytest.mark.parametrize("size", [1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 18])
def test_all_data_is_received_before_the_end(link: Link, size: int) -> None:
    """Reading goes on until the end of the stream was read."""
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


def test_many_connections_end_with_their_data(any_reactor: Any) -> None:
    """The events of data and end are spread over batches in many ways."""
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


def test_data_during_a_pause_is_received_after_it(link: Link) -> None:
    for turn in range(5):
        link.transport.pauseProducing()
        link.peer.sendall(b"%d" % turn)
        settle(link.reactor)
        assert len(link.protocol.data) == turn
        link.transport.resumeProducing()
        spin(link.reactor, lambda: len(link.protocol.data) == turn + 1)
    assert link.protocol.data == b"01234"


def test_a_stream_pauses_another_in_the_same_batch(
    any_reactor: Any, tmp_path: Any
) -> None:
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


def test_data_around_urgent_data_is_received(tcp_link: Link) -> None:
    """A read stops at the mark of urgent data.  Another one reads what follows it."""
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
def test_a_read_that_fails_ends_the_connection(
    link: Link, size: int, number: int, kind: Any
) -> None:
    """The first read fails, or the next one after a full read."""
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


def test_a_half_close_after_a_full_read_leaves_writing_open(link: Link) -> None:
    """Another read of the same pass finds the end."""
    ends = record_half_closes(link.protocol)
    link.transport.bufferSize = 10
    link.peer.sendall(b"x" * 10)
    link.peer.shutdown(socket.SHUT_WR)
    spin(link.reactor, lambda: ends)
    assert link.protocol.data == b"x" * 10
    link.transport.write(b"answer")
    assert link.receive(6) == b"answer"
    assert ends == ["read"]


def test_a_fast_sender_is_not_read_without_end(our_link: Link) -> None:
    """A peer that always sends more does not get a growing share of a pass."""
    our_link.transport.bufferSize = 10
    counted = our_link.count()
    reads = []
    for _ in range(20):
        our_link.peer.sendall(b"x" * 100)
        before = counted.received
        our_link.reactor.iterate(0.01)
        reads.append(counted.received - before)
    # One read for an event, and four after a full read in the last pass.
    assert max(reads) <= 1 + 4
    spin(our_link.reactor, lambda: len(our_link.protocol.data) == 2000)


@pytest.mark.parametrize("kind", ["UNIX server", "UNIX client", "adopted UNIX"])
def test_descriptors_are_sent_and_received(
    any_reactor: Any, kind: str, tmp_path: Any
) -> None:
    """They keep their place among the bytes, in both directions."""
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

    # The last descriptor arrives before a write that fails.
    link.peer.sendmsg([b"with"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    link.peer.sendall(b"end")
    link.peer.close()
    link.transport.sendFileDescriptor(writing)
    link.transport.write(b"x")
    spin(any_reactor, lambda: link.protocol.lost)
    if any_reactor.__class__ is not EPollReactor:
        # Twisted's reactor reads only once.
        assert link.protocol.data.endswith(b"withend")
    assert len(got) == 4
    for number in (reading, writing, *got, *received):
        os.close(number)
    link.close()


def test_an_exception_in_the_application_ends_one_connection(
    any_reactor: Any, tmp_path: Any
) -> None:
    """It is logged under the stream's prefix.  The other connections go on."""
    links = [Link(any_reactor, "TCP server", tmp_path) for _ in range(3)]
    error = RuntimeError("the application")

    def fail(data: bytes) -> None:
        raise error

    links[1].protocol.dataReceived = fail
    prefix = links[1].transport.logPrefix()
    with logged_errors() as errors:
        for each in links:
            each.peer.sendall(b"x")
        for each in (links[0], links[2]):
            spin(any_reactor, lambda: each.protocol.data)
        spin(any_reactor, lambda: links[1].protocol.lost)
    [event] = errors
    assert event["failure"].value is error
    assert event["system"] == prefix
    assert links[1].protocol.lost[0].value is error
    for each in links:
        each.close()


def test_a_protocol_logs_under_its_prefix(any_reactor: Any, tmp_path: Any) -> None:
    """Code outside of the protocols logs without a prefix."""
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


def tls_options(folder: Path) -> tuple[Any, ssl.SSLContext]:
    """The options of a server in Twisted, and the context of its clients."""
    certificate, key = make_certificate(folder)
    both = certificate.read_bytes() + key.read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(str(certificate))
    return PrivateCertificate.loadPEM(both).options(), context


# Twisted uses a deprecated way to pass its certificates to pyOpenSSL.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["TCP server", "UNIX server"])
def test_start_tls_encrypts_later_writes_only(
    any_reactor: Any, kind: str, tmp_path: Any
) -> None:
    """Earlier writes are sent in plain."""
    link = Link(any_reactor, kind, tmp_path)
    options, context = tls_options(tmp_path)
    context.check_hostname = False
    secret = b"secret" * 50_000

    def start(data: bytes) -> None:
        link.transport.write(b"220 ready")
        link.transport.startTLS(options)
        link.transport.write(secret)
        del link.protocol.dataReceived

    link.protocol.dataReceived = start
    link.peer.sendall(b"STARTTLS")
    assert link.receive(9) == b"220 ready"
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
    # The first byte is the type of a TLS record.  No word is sent in plain.
    assert seen[0] == 22
    assert b"secret" not in seen
    talk(lambda: client.write(b"hello over TLS"))
    spin(any_reactor, lambda: link.protocol.data == b"hello over TLS")
    link.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_encrypted_input_before_a_failed_write_is_received(
    tcp_link: Link, tmp_path: Any
) -> None:
    options, context = tls_options(tmp_path)
    tcp_link.transport.startTLS(options)
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


# Many connections


def test_many_connections_with_random_clients(any_reactor: Any) -> None:
    """The clients send, pause and end at random."""
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
    """Sends its input back, and ends when its peer ends."""

    transport: Any

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)

    def readConnectionLost(self) -> None:
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        pass


class Talker:
    """A client of an echo server that sends and ends at random."""

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
