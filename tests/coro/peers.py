"""
Peers of streams: TLS peers that answer only when a test says so, clients that do not
read, and transports without a socket.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import IAddress
from twisted.internet.ssl import PrivateCertificate, optionsForClientTLS
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from tests.coro.support import spin
from twisted_rtsig.coro import CoroutineFactory, Server, Stream, sleep


class TLSPeer:
    """
    A TLS peer of which a test calls each step; it does not answer close_notify by
    itself.

    :param plain: a connected socket.
    """

    def __init__(
        self, plain: socket.socket, context: ssl.SSLContext, server_side: bool
    ) -> None:
        plain.setblocking(False)
        self.plain = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side)

    async def handshake(self) -> None:
        await self._do(self._tls.do_handshake)

    async def write(self, data: bytes) -> None:
        await self._do(self._tls.write, data)

    async def read(self, size: int = 1 << 16) -> bytes:
        """Read some bytes; no bytes after the peer's close_notify."""
        try:
            return await self._do(self._tls.read, size)  # type: ignore[no-any-return]
        except ssl.SSLZeroReturnError:
            return b""

    async def read_until_close_notify(self) -> bytes:
        received = b""
        while data := await self.read():
            received += data
        return received

    async def close_notify(self) -> None:
        # It raises if there is something left to read.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._flush()

    async def end(self) -> bytes:
        """Read after close_notify: no bytes at the end of the connection."""
        while True:
            try:
                return self.plain.recv(1)
            except BlockingIOError:
                await sleep(0)

    async def _do(self, function: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                return function(*args)
            except ssl.SSLWantReadError:
                self._flush()
                await self._receive()
            finally:
                self._flush()

    def _flush(self) -> None:
        while data := self._outgoing.read():
            self.plain.sendall(data)

    async def _receive(self) -> None:
        while True:
            try:
                data = self.plain.recv(1 << 16)
            except BlockingIOError:
                await sleep(0)
            else:
                self._incoming.write(data)
                if not data:
                    self._incoming.write_eof()
                return


async def secure_as_client(plain: socket.socket) -> TLSPeer:
    """Do the handshake of a client that trusts every certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    peer = TLSPeer(plain, context, server_side=False)
    await peer.handshake()
    return peer


@contextlib.asynccontextmanager
async def tls_client_of(
    server: Server, receive_buffer: int | None = None
) -> AsyncIterator[TLSPeer]:
    """A client of a server, after the handshake."""
    with socket_to(server, receive_buffer) as plain:
        yield await secure_as_client(plain)


@contextlib.asynccontextmanager
async def accepted(reactor: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A client endpoint, and a function that accepts its connection."""
    with contextlib.ExitStack() as sockets:
        port = sockets.enter_context(socket.socket())
        port.bind(("127.0.0.1", 0))
        port.listen()
        port.setblocking(False)

        async def accept() -> socket.socket:
            while True:
                try:
                    return sockets.enter_context(port.accept()[0])
                except BlockingIOError:
                    await sleep(0)

        yield TCP4ClientEndpoint(reactor, *port.getsockname()), accept


class Connecting(NamedTuple):
    """
    A TLS client whose handshake has begun, and its server, of which a test calls each
    step.

    :ivar clock: what the client's time limits are measured by.
    :ivar accept: accepts the connection, and returns the socket.
    :ivar secure: accepts the connection and does the handshake.
    """

    clock: Clock
    stream: Stream
    accept: Callable[[], Awaitable[socket.socket]]
    secure: Callable[[], Awaitable[TLSPeer]]


@contextlib.contextmanager
def socket_to(
    server: Server, receive_buffer: int | None = None
) -> Iterator[socket.socket]:
    """A plain client of a server."""
    with socket.socket() as plain:
        if receive_buffer is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        plain.connect(("127.0.0.1", server.port.getHost().port))
        plain.setblocking(False)
        yield plain


def tls_client(endpoint: Any, certificate: PrivateCertificate | None = None) -> Any:
    """
    A client endpoint with TLS.

    :param certificate: the certificate to trust; the system's by default, which that of
        the tests does not belong to.
    """
    return wrapClientTLS(optionsForClientTLS("127.0.0.1", certificate), endpoint)


# Without sockets


class AbortableTransport(StringTransport):
    """Reports to the protocol that it was aborted, as real transports do."""

    protocol: Any
    aborting = False

    def abortConnection(self) -> None:
        self.aborting = True
        self.protocol.connectionLost(Failure(ConnectionAborted()))


def connection_of(
    factory: CoroutineFactory, peer: IAddress | None = None
) -> tuple[Any, AbortableTransport]:
    """A new connection of a server: its protocol and its transport."""
    protocol: Any = factory.buildProtocol(None)
    transport = AbortableTransport(peerAddress=peer)
    transport.protocol = protocol
    protocol.makeConnection(transport)
    return protocol, transport


# Clients that do not read


@contextlib.contextmanager
def unread_client(
    reactor: Any,
    clock: Clock,
    handler: Any,
    path: str | None = None,
    receive_buffer: int = 1 << 16,
    idle_timeout: float | None = 60,
    **options: Any,
) -> Iterator[tuple[CoroutineFactory, socket.socket]]:
    """
    A server whose time is the clock's, and a client that has read nothing yet.

    :param path: the path of a UNIX socket; by default the server listens on TCP.
    :param receive_buffer: the client's receive buffer in bytes: its kernel acknowledges
        as much before the client reads.
    """
    factory = CoroutineFactory(
        handler, idle_timeout=idle_timeout, reactor=clock, **options
    )
    if path is None:
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        family = socket.AF_INET
        address: Any = "127.0.0.1", port.getHost().port
    else:
        port = reactor.listenUNIX(path, factory)
        family = socket.AF_UNIX
        address = path
    with socket.socket(family) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(address)
        client.setblocking(False)
        spin(reactor, lambda: factory.connections)
        yield factory, client
    spin(reactor, lambda: not factory.connections)
    stopped: list[Any] = []
    port.stopListening().addCallback(stopped.append)
    spin(reactor, lambda: stopped)


def read_slowly(
    reactor: Any, client: socket.socket, size: int, chunk: int
) -> Iterator[None]:
    """Read *size* bytes as a client; yields after each piece of at most *chunk*."""
    received = 0
    while received < size:
        try:
            received += len(client.recv(chunk))
        except BlockingIOError:
            reactor.iterate(0.01)
        else:
            reactor.iterate(0)
            yield


def write_much(stream: Stream) -> Deferred[None]:
    """Write more than the kernels hold."""
    transport: Any = stream.transport
    transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    return stream.write(bytes(1 << 22))


async def write_and_wait(stream: Stream) -> None:
    await write_much(stream)


async def write_and_end(stream: Stream) -> None:
    write_much(stream)
