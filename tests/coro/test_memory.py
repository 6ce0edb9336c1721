"""Streams hold little in memory, whatever the peer does."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.endpoints import SSL4ServerEndpoint, TCP4ServerEndpoint
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

from tests.coro.support import run
from tests.support import DEADLINE, ON_PYPY
from twisted_rtsig.coro import CoroutineFactory, Stream, serve, sleep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MIB = 1 << 20
# All that goes through a connection; what the process may grow by; and for how
# many turns of the reactor one side does nothing.  A turn reads 64 KiB at least.
TOTAL = 48 * MIB
BOUND = 12 * MIB
TURNS = 1000


def resident() -> int:
    """Bytes of memory that the process has: proc(5)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("there is no /proc that tells how much memory a process has")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture(params=["plain", "TLS"])
def peer(request: Any, reactor: Any, certificate: PrivateCertificate) -> Peer:
    return Peer(reactor, certificate if request.param == "TLS" else None)


class Peer:
    """A client with blocking sockets, in a thread."""

    def __init__(self, reactor: Any, certificate: PrivateCertificate | None) -> None:
        self.reactor = reactor
        self.certificate = certificate
        self.may_read = threading.Event()

    def endpoint(self) -> Any:
        at = {"port": 0, "interface": "127.0.0.1"}
        if self.certificate is None:
            return TCP4ServerEndpoint(self.reactor, **at)
        options = self.certificate.options()
        return SSL4ServerEndpoint(self.reactor, sslContextFactory=options, **at)

    @contextlib.contextmanager
    def socket(self, port: int) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as plain:
            if self.certificate is None:
                yield plain
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            with context.wrap_socket(plain) as secure:
                yield secure
                # To close it would reset the connection: there are unread session
                # tickets.
                secure.unwrap()

    def sends(self, port: int) -> None:
        data = bytes(MIB)
        with self.socket(port) as connected:
            for _ in range(TOTAL // MIB):
                connected.sendall(data)

    def reads(self, port: int) -> int:
        received = 0
        with self.socket(port) as connected:
            self.may_read.wait(DEADLINE)
            while data := connected.recv(1 << 16):
                received += len(data)
        return received


@contextlib.contextmanager
def threads() -> Iterator[ThreadPool]:
    pool = ThreadPool(0, 1)
    pool.start()
    try:
        yield pool
    finally:
        pool.stop()


def test_memory_for_a_client_that_sends_without_end(reactor: Any, peer: Peer) -> None:
    """The handler does not read, for long; then it does, and all is there."""
    received = grown = 0

    async def handler(stream: Stream) -> None:
        nonlocal received, grown
        await stream.peek()
        before = resident()
        for _ in range(TURNS):
            await sleep(0)
        grown = resident() - before
        while data := await stream.read():
            received += len(data)

    async def main() -> None:
        server = await serve(peer.endpoint(), handler, reactor=reactor)
        port = server.port.getHost().port
        with threads() as pool:
            await deferToThreadPool(reactor, pool, peer.sends, port)
        await server.stop(grace=DEADLINE)

    run(reactor, main)
    assert grown < BOUND
    assert received == TOTAL


def test_memory_for_a_client_that_does_not_read(reactor: Any, peer: Peer) -> None:
    """The handler writes without end, but is held up; the client gets it all."""
    written = grown = 0

    async def handler(stream: Stream) -> None:
        nonlocal written
        data = bytes(MIB // 16)
        while written < TOTAL:
            written += len(data)
            await stream.write(data)

    async def main() -> Any:
        nonlocal grown
        server = await serve(peer.endpoint(), handler, reactor=reactor)
        port = server.port.getHost().port
        before = resident()
        with threads() as pool:
            reading = deferToThreadPool(reactor, pool, peer.reads, port)
            while not written:
                await sleep(0)
            for _ in range(TURNS):
                await sleep(0)
            grown = resident() - before
            assert written < TOTAL
            peer.may_read.set()
            received = await reading
        await server.stop()
        return received

    assert run(reactor, main) == TOTAL
    assert grown < BOUND


# Of one piece of data that has arrived


def fed(handler: Any, *pieces: bytes) -> None:
    """Run a handler whose peer sends some pieces, without a reactor."""
    clock = Clock()
    protocol: Any = CoroutineFactory(handler, reactor=clock).buildProtocol(None)
    protocol.makeConnection(StringTransport())
    for each in pieces:
        protocol.dataReceived(each)
    while not protocol.transport.disconnecting:
        clock.advance(0)


@pytest.mark.skipif(ON_PYPY, reason="PyPy copies more")
def test_one_large_read_makes_no_copy() -> None:
    piece = bytes(MIB)
    read = []

    async def handler(stream: Stream) -> None:
        # Once while it waits, and once from what is there.
        read.append(await stream.read(MIB))
        await sleep(0)
        read.append(await stream.read(MIB))

    fed(handler, piece, piece)
    assert [each is piece for each in read] == [True, True]


@pytest.mark.parametrize("pieces", [1, 10])
def test_small_reads_do_not_copy_the_buffered_rest(
    tracemalloc: Any, pieces: int
) -> None:
    """Many small reads of much data make copies of what they read, and no more."""
    lines = [b"a line\n" * 100_000] * pieces
    peaks = []

    async def handler(stream: Stream) -> None:
        # They gather while it sleeps.
        await sleep(0)
        tracemalloc.start()
        try:
            for _ in range(100):
                await stream.read_line()
                await stream.read_until(b"\n")
                await stream.read_until_regex(b"\n")
                await stream.read_exactly(7)
                await stream.read(7)
                await stream.peek(7)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    fed(handler, *lines)
    assert peaks[0] < 100_000
