"""Streams when TLS fails, or when a TLS peer does not answer."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL
from twisted.internet.defer import succeed
from twisted.internet.endpoints import (
    SSL4ClientEndpoint,
    SSL4ServerEndpoint,
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    wrapClientTLS,
)
from twisted.internet.error import ConnectionClosed, ConnectionLost
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import (
    CertificateOptions,
    PrivateCertificate,
    optionsForClientTLS,
)
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.protocols.policies import WrappingFactory
from zope.interface import implementer

from tests.coro.support import (
    STYLES,
    call,
    client_endpoint,
    forgets_awaits,
    listen,
    run,
    tls_endpoint,
)
from twisted_rtsig.coro import (
    CoroutineFactory,
    Deadline,
    Event,
    Server,
    Stream,
    StreamError,
    TLSError,
    connect,
    format_tasks,
    select,
    serve,
    sleep,
    spawn,
    timeout,
)

# Twisted and pyOpenSSL hold different opinions on what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Logged = list[dict[str, Any]]

LIMIT = 30
MUCH = 1 << 22


class Peer:
    """
    A TLS peer that does what it is told, and answers close_notify only then.

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
        """Read something; no bytes after close_notify."""
        try:
            return await self._do(self._tls.read, size)  # type: ignore[no-any-return]
        except ssl.SSLZeroReturnError:
            return b""

    async def close_notify(self) -> None:
        # There may be something left to read.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._flush()

    async def end(self) -> bytes:
        """What comes after close_notify: no bytes at the end of the connection."""
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


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.fixture
def server_context(certificate: PrivateCertificate, tmp_path: Path) -> ssl.SSLContext:
    pem = tmp_path / "server.pem"
    pem.write_bytes(certificate.dumpPEM())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


@contextlib.asynccontextmanager
async def accepted(reactor: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A client endpoint, and a function to accept its connection with."""
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


@contextlib.contextmanager
def socket_to(server: Server, receive_buffer: int | None = None) -> Any:
    with socket.socket() as plain:
        if receive_buffer is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        plain.connect(("127.0.0.1", server.port.getHost().port))
        plain.setblocking(False)
        yield plain


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await sleep(0)


def tls_client(endpoint: Any, certificate: PrivateCertificate | None = None) -> Any:
    """By default it trusts the system's certificates, and not that of the tests."""
    return wrapClientTLS(optionsForClientTLS("127.0.0.1", certificate), endpoint)


# Peers that do not answer


@pytest.fixture(params=["endpoint", "start_tls"])
def serve_tls(
    request: Any, reactor: Any, certificate: PrivateCertificate
) -> Callable[..., Any]:
    """Serve TLS from the beginning, or from the beginning of the handler."""

    async def serve_tls(handler: Any, **options: Any) -> Server:
        if request.param == "endpoint":
            endpoint = tls_endpoint(reactor, certificate)
            return await serve(endpoint, handler, **options)

        async def start_tls(stream: Stream) -> None:
            await stream.start_tls(certificate.options())
            await handler(stream)

        plain = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        return await serve(plain, start_tls, **options)

    return serve_tls


async def say_hello(stream: Stream) -> None:
    await stream.write(b"hello")


def test_a_client_that_does_not_answer_close_notify(
    reactor: Any, serve_tls: Any
) -> None:
    clock = Clock()

    async def main() -> None:
        server = await serve_tls(say_hello, close_timeout=LIMIT, reactor=clock)
        with socket_to(server) as plain:
            peer = Peer(plain, client_context(), server_side=False)
            await peer.handshake()
            assert [await peer.read(), await peer.read()] == [b"hello", b""]
            clock.advance(LIMIT - 1)
            # What it sends is no answer.
            await peer.write(b"go on")
            await sleep(0.01)
            assert server.factory.connections
            clock.advance(1)
            await until(lambda: not server.factory.connections)
            # The end, and no reset.
            assert await peer.end() == b""
        await server.stop()
        assert not clock.getDelayedCalls()

    run(reactor, main)


def test_a_client_that_answers_close_notify(reactor: Any, serve_tls: Any) -> None:
    clock = Clock()

    async def main() -> None:
        server = await serve_tls(say_hello, close_timeout=None, reactor=clock)
        with socket_to(server) as plain:
            peer = Peer(plain, client_context(), server_side=False)
            await peer.handshake()
            assert [await peer.read(), await peer.read()] == [b"hello", b""]
            # Without a limit it may take as long as it likes.
            clock.advance(1_000_000)
            await sleep(0.01)
            assert server.factory.connections
            await peer.close_notify()
            await until(lambda: not server.factory.connections)
            assert await peer.end() == b""
        await server.stop()
        assert not clock.getDelayedCalls()

    run(reactor, main)


def test_a_server_that_does_not_answer_close_notify(
    reactor: Any, certificate: PrivateCertificate, server_context: ssl.SSLContext
) -> None:
    clock = Clock()

    async def main() -> None:
        async with accepted(reactor) as (endpoint, accept):
            client = tls_client(endpoint, certificate)

            async def talk() -> None:
                stream = await connect(client, clock, close_timeout=LIMIT)
                async with stream:
                    await stream.write(b"hello")

            talking = spawn(talk)
            peer = Peer(await accept(), server_context, server_side=True)
            await peer.handshake()
            assert [await peer.read(), await peer.read()] == [b"hello", b""]
            clock.advance(LIMIT - 1)
            await sleep(0.01)
            assert not talking.done
            clock.advance(1)
            await talking
            assert await peer.end() == b""
        assert not clock.getDelayedCalls()

    run(reactor, main)


def test_a_client_that_reads_slowly_gets_everything(
    reactor: Any, serve_tls: Any
) -> None:
    """The limit is for the answer, and not for what was written before."""
    clock = Clock()

    async def handler(stream: Stream) -> None:
        await stream.write(bytes(MUCH))

    async def main() -> None:
        server = await serve_tls(handler, close_timeout=LIMIT, reactor=clock)
        with socket_to(server, receive_buffer=1 << 16) as plain:
            peer = Peer(plain, client_context(), server_side=False)
            await peer.handshake()
            received = 0
            while data := await peer.read():
                received += len(data)
                await sleep(0)
                # The limit is over long before everything was read.
                clock.advance(LIMIT / 4)
            assert received == MUCH
            await until(lambda: not server.factory.connections)
        await server.stop()
        assert not clock.getDelayedCalls()

    run(reactor, main)


@pytest.mark.skipif(
    not sys.platform.startswith(("linux", "darwin", "freebsd", "netbsd")),
    reason="the kernel does not tell what the peer has acknowledged",
)
def test_a_client_that_reads_slowly_is_not_idle(reactor: Any, serve_tls: Any) -> None:
    """The kernel has all that was written, and the peer takes a little at a time."""
    clock = Clock()

    async def handler(stream: Stream) -> None:
        layer: Any = stream.transport
        layer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
        await stream.write(bytes(1 << 18))
        await stream.read()

    async def main() -> None:
        server = await serve_tls(handler, idle_timeout=60, reactor=clock)
        with socket_to(server, receive_buffer=1 << 13) as plain:
            peer = Peer(plain, client_context(), server_side=False)
            await peer.handshake()
            received = 0
            while received < 1 << 18:
                received += len(await peer.read(1 << 12))
                await sleep(0)
                clock.advance(5)
                assert server.factory.connections
            clock.pump([5] * 20)
            await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)


def test_close_during_a_handshake_that_does_not_come(
    reactor: Any, certificate: PrivateCertificate
) -> None:
    """What was written waits for the handshake, and with it the end."""
    clock = Clock()

    async def main() -> None:
        async with accepted(reactor) as (endpoint, accept):
            stream = await connect(
                tls_client(endpoint, certificate),
                clock,
                handshake_timeout=None,
                close_timeout=LIMIT,
            )
            await accept()
            stream.write(b"hello")
            closed = stream.close()
            clock.advance(LIMIT - 1)
            await sleep(0.01)
            assert not closed.called
            clock.advance(1)
            await closed
        assert not clock.getDelayedCalls()

    run(reactor, main)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_limit_of_the_answer_begins_after_the_handshake(
    reactor: Any, certificate: PrivateCertificate, wrapped: bool
) -> None:
    """Of a server whose handler has returned; also if nothing reports the handshake."""
    clock = Clock()

    async def handler(stream: Stream) -> None:
        stream.write(b"hello")

    async def main() -> None:
        factory: Any = CoroutineFactory(
            handler,
            handshake_timeout=3 * LIMIT,
            close_timeout=LIMIT,
            reactor=clock,
        )
        outer = WrappingFactory(factory) if wrapped else factory
        listening = tls_endpoint(reactor, certificate).listen(outer)
        server = Server(await listening, factory)
        with socket_to(server) as plain:
            await until(lambda: factory.connections)
            clock.advance(2 * LIMIT)
            await sleep(0.01)
            assert factory.connections
            peer = Peer(plain, client_context(), server_side=False)
            await peer.handshake()
            assert [await peer.read(), await peer.read()] == [b"hello", b""]
            # Now it is looked for the handshake.
            clock.advance(0.1)
            clock.advance(LIMIT - 1)
            await sleep(0.01)
            assert factory.connections
            clock.advance(1)
            await until(lambda: not factory.connections)
            assert await peer.end() == b""
        await server.stop()
        assert not clock.getDelayedCalls()

    run(reactor, main)


def test_a_client_that_closes_waits_for_a_late_handshake(
    reactor: Any, certificate: PrivateCertificate, server_context: ssl.SSLContext
) -> None:
    clock = Clock()

    async def main() -> None:
        async with accepted(reactor) as (endpoint, accept):
            stream = await connect(
                tls_client(endpoint, certificate),
                clock,
                handshake_timeout=3 * LIMIT,
                close_timeout=LIMIT,
            )
            stream.write(b"hello")
            closed = stream.close()
            clock.advance(2 * LIMIT)
            await sleep(0.01)
            assert not closed.called
            peer = Peer(await accept(), server_context, server_side=True)
            await peer.handshake()
            assert [await peer.read(), await peer.read()] == [b"hello", b""]
            clock.advance(LIMIT - 1)
            await sleep(0.01)
            assert not closed.called
            clock.advance(1)
            await closed
        assert not clock.getDelayedCalls()

    run(reactor, main)


def test_delayed_calls_that_something_else_has_cancelled(
    reactor: Any, serve_tls: Any
) -> None:
    """As trial does at the end of a test, before connections are lost."""
    clock = Clock()

    async def main() -> None:
        server = await serve_tls(say_hello, reactor=clock)
        with socket_to(server) as plain:
            peer = Peer(plain, client_context(), server_side=False)
            await peer.handshake()
            assert [await peer.read(), await peer.read()] == [b"hello", b""]
            deadline = Deadline(1, clock)
            choosing = select(deadline, Event())
            # The limits of the handshake and of the end, the watchdog, the deadline.
            for each in clock.getDelayedCalls():
                each.cancel()
            choosing.cancel()
            await peer.close_notify()
            await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)


def test_a_server_without_a_handshake(
    reactor: Any, certificate: PrivateCertificate
) -> None:
    """Reads wait for the handshake, whose limit is their limit."""
    clock = Clock()

    async def main() -> None:
        async with accepted(reactor) as (endpoint, accept):
            client = tls_client(endpoint, certificate)
            stream = await connect(client, clock, handshake_timeout=LIMIT)
            await accept()
            reading = stream.read()
            clock.advance(LIMIT - 1)
            await sleep(0.01)
            assert not reading.called
            clock.advance(1)
            with pytest.raises(TLSError, match=f"no handshake within {LIMIT} s"):
                await reading
        assert not clock.getDelayedCalls()

    run(reactor, main)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_handshake_that_is_done_is_not_overdue(
    reactor: Any, certificate: PrivateCertificate, wrapped: bool
) -> None:
    """With an endpoint that wraps protocols, and with a wrapper that tells nothing."""
    clock = Clock()
    options = optionsForClientTLS("127.0.0.1", certificate)

    async def handler(stream: Stream) -> None:
        async for line in stream.lines():
            await stream.write(line)

    async def main() -> None:
        factory: Any = CoroutineFactory(handler, handshake_timeout=LIMIT, reactor=clock)
        outer = WrappingFactory(factory) if wrapped else factory
        listening = tls_endpoint(reactor, certificate).listen(outer)
        server = Server(await listening, factory)
        port = server.port.getHost().port
        endpoint = SSL4ClientEndpoint(reactor, "127.0.0.1", port, options)
        stream = await connect(endpoint, clock, handshake_timeout=LIMIT)
        for _ in range(3):
            await stream.write(b"x\n")
            assert await stream.read() == b"x"
            clock.advance(LIMIT)
        await stream.close()
        await until(lambda: not server.factory.connections)
        await server.stop()
        assert not clock.getDelayedCalls()

    run(reactor, main)


@pytest.mark.parametrize("style", STYLES)
def test_start_tls_without_a_handshake(
    reactor: Any, certificate: PrivateCertificate, logged: Logged, style: str
) -> None:
    """Neither side of a server with start_tls waits longer than its limit."""
    clock = Clock()
    got: list[Any] = []

    def handler(stream: Stream) -> Any:
        steps = [lambda: stream.start_tls(certificate.options())]
        return STYLES[style](reactor, steps, got)

    async def main() -> None:
        plain = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        server = await serve(plain, handler, handshake_timeout=LIMIT, reactor=clock)
        with socket_to(server):
            await until(lambda: server.factory.connections)
            clock.advance(LIMIT - 1)
            await sleep(0.01)
            assert server.factory.connections
            clock.advance(1)
            await until(lambda: not server.factory.connections)
        await server.stop()
        async with accepted(reactor) as (endpoint, accept):
            stream = await connect(endpoint, clock, handshake_timeout=LIMIT)
            await accept()
            secured = stream.start_tls(optionsForClientTLS("127.0.0.1", certificate))
            clock.advance(LIMIT)
            with pytest.raises(TLSError, match=f"no handshake within {LIMIT} s"):
                await secured
        assert not clock.getDelayedCalls()

    run(reactor, main)
    assert got == [TLSError]
    assert not failures(logged)


def test_close_notify_while_output_waits(reactor: Any, serve_tls: Any) -> None:
    """
    A client ends TLS and reads on: what is written then is an error, and does not
    vanish.
    """
    outcome: list[Any] = []
    full = Event()

    async def handler(stream: Stream) -> None:
        try:
            # More than kernels hold, though not endless, if nothing stops it.
            for _ in range(1000):
                writing = stream.write(bytes(1 << 16))
                if not writing.called:
                    full.set()
                await writing
        except ConnectionClosed as error:
            outcome.append(error)

    async def main() -> None:
        server = await serve_tls(handler, reactor=reactor)
        with socket_to(server) as plain:
            peer = Peer(plain, client_context(), server_side=False)
            await peer.handshake()
            await full.wait()
            await peer.close_notify()
            # The server receives that before there is room again.
            for _ in range(20):
                await sleep(0)
            while await peer.end():
                plain.recv(1 << 20)
            await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)
    assert len(outcome) == 1


# What was negotiated


@implementer(IOpenSSLClientConnectionCreator)
class AsksForName:
    """Verifies nothing, and tells the server a name."""

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        connection = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD))
        connection.set_tlsext_host_name(b"host.example")
        return connection


def with_alpn(certificate: PrivateCertificate) -> CertificateOptions:
    return CertificateOptions(
        privateKey=certificate.privateKey.original,
        certificate=certificate.original,
        acceptableProtocols=[b"h2", b"http/1.1"],
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("by_start_tls", [False, True])
def test_what_was_negotiated(
    reactor: Any, certificate: PrivateCertificate, style: str, by_start_tls: bool
) -> None:
    seen: list[Any] = []

    def handler(stream: Stream) -> Any:
        def see() -> Any:
            seen.append(stream.tls)
            return succeed(None)

        steps: list[Callable[[], Any]] = [
            stream.handshake,
            see,
            stream.read,
        ]
        if by_start_tls:
            steps.insert(0, lambda: stream.start_tls(with_alpn(certificate)))
        return STYLES[style](reactor, steps, [])

    async def main() -> None:
        endpoint: Any = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        if not by_start_tls:
            endpoint = SSL4ServerEndpoint(
                reactor, 0, with_alpn(certificate), interface="127.0.0.1"
            )
        server = await serve(endpoint, handler)
        options = optionsForClientTLS(
            "127.0.0.1", certificate, acceptableProtocols=[b"http/1.1"]
        )
        stream = await connect(wrapClientTLS(options, client_endpoint(reactor, server)))
        assert stream.tls is None
        await stream.handshake()
        ours = stream.tls
        assert ours is not None
        assert ours.version.startswith("TLSv1.")
        assert "_" in ours.cipher or "-" in ours.cipher
        assert ours.cipher_bits >= 128
        assert ours.alpn_protocol == "http/1.1"
        # An address is no name.
        assert ours.server_hostname is None
        assert ours.peer_certificate == certificate
        await until(lambda: seen)
        (theirs,) = seen
        assert theirs == ours._replace(peer_certificate=None)
        await stream.close()
        assert stream.tls is None
        await server.stop()

    run(reactor, main)


def test_the_name_and_the_certificate_of_a_client(
    reactor: Any, certificate: PrivateCertificate
) -> None:
    seen: list[Any] = []

    async def handler(stream: Stream) -> None:
        await stream.handshake()
        seen.append(stream.tls)

    async def main() -> None:
        both = SSL4ServerEndpoint(
            reactor, 0, certificate.options(certificate), interface="127.0.0.1"
        )
        server = await serve(both, handler)
        options = optionsForClientTLS("127.0.0.1", certificate, certificate)
        endpoint = wrapClientTLS(options, client_endpoint(reactor, server))
        async with await connect(endpoint) as stream:
            await stream.read()
        assert seen.pop().peer_certificate == certificate
        await server.stop()
        server = await serve(tls_endpoint(reactor, certificate), handler)
        endpoint = client_endpoint(reactor, server)
        async with await connect(wrapClientTLS(AsksForName(), endpoint)) as stream:
            await stream.handshake()
            assert stream.tls is not None
            assert stream.tls.server_hostname == "host.example"
            await stream.read()
        assert seen.pop().server_hostname == "host.example"
        await server.stop()

    run(reactor, main)


@forgets_awaits
def test_a_handshake_to_wait_for(
    reactor: Any, certificate: PrivateCertificate, logged: Logged
) -> None:
    async def main() -> None:
        async with accepted(reactor) as (endpoint, accept):
            plain = await connect(endpoint)
            assert plain.tls is None
            with pytest.raises(StreamError, match="not encrypted"):
                plain.handshake()
            await plain.abort()
            with pytest.raises(ConnectionClosed):
                await plain.handshake()
            await accept()
            stream = await connect(tls_client(endpoint, certificate))
            peer = await accept()
            for _ in range(2):
                # To give up the wait is not to give up the handshake.
                with pytest.raises(TimeoutError), timeout(0):
                    await stream.handshake()
            waiting = [spawn(stream.handshake) for _ in range(2)]
            await sleep(0)
            assert "the TLS handshake of" in format_tasks(reactor)
            peer.close()
            for each in waiting:
                with pytest.raises(ConnectionClosed):
                    await each
            # Without being awaited.
            stream.handshake()

    run(reactor, main)
    gc.collect()
    assert not failures(logged)


def test_a_handshake_that_a_protocol_in_between_keeps_to_itself(
    reactor: Any, certificate: PrivateCertificate
) -> None:
    secure = Event()

    async def handler(stream: Stream) -> None:
        await stream.handshake()
        secure.set()
        await stream.read()

    async def main() -> None:
        factory = WrappingFactory(CoroutineFactory(handler, handshake_timeout=None))
        port = await tls_endpoint(reactor, certificate).listen(factory)
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port)
        async with await connect(tls_client(endpoint, certificate)) as stream:
            await stream.handshake()
            await secure.wait()
        await port.stopListening()

    run(reactor, main)


# TLS that fails


def failures(logged: Logged) -> list[Any]:
    return [each["log_failure"].value for each in logged if each.get("log_failure")]


HTTP = b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"


async def plain_http(reactor: Any, server: Server) -> None:
    async with await call(reactor, server) as stream:
        await stream.write(HTTP)
        # The server may send an alert, which is not text.
        with contextlib.suppress(ConnectionClosed):
            while await stream.read():
                pass


async def rejected_certificate(reactor: Any, server: Server) -> None:
    endpoint = tls_client(client_endpoint(reactor, server))
    stream = await connect(endpoint)
    with pytest.raises(TLSError, match="certificate verify failed") as caught:
        await stream.read()
    assert type(caught.value.__cause__).__module__ == "OpenSSL.SSL"
    # Each operation gets the error.
    for what in (stream.write(b"x"), stream.read()):
        with pytest.raises(TLSError, match="certificate verify failed") as caught:
            await what
        assert caught.value.__cause__ is not None


async def damaged_record(reactor: Any, server: Server) -> None:
    with socket_to(server) as plain:
        peer = Peer(plain, client_context(), server_side=False)
        await peer.handshake()
        plain.sendall(HTTP)
        await until(lambda: not server.factory.connections)


async def garbage_for_a_handshake(reactor: Any, server: Server) -> None:
    with socket_to(server) as plain:
        await until(lambda: server.factory.connections)
        plain.sendall(bytes(1000))
        await until(lambda: not server.factory.connections)


OFFENCES = [
    plain_http,
    rejected_certificate,
    damaged_record,
    garbage_for_a_handshake,
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("offence", OFFENCES)
def test_tls_fails_as_a_lost_connection(
    reactor: Any, serve_tls: Any, logged: Logged, offence: Any, style: str
) -> None:
    """In the handler it is a TLSError, which is a ConnectionLost; nothing is logged."""
    got: list[Any] = []

    async def handler(stream: Stream) -> None:
        await STYLES[style](reactor, [stream.read, lambda: stream.write(b"x")], got)

    async def main() -> None:
        server = await serve_tls(handler, reactor=reactor)
        await offence(reactor, server)
        await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)
    if got:
        assert got == [TLSError, TLSError]
    else:
        # start_tls has raised it.
        assert len(quiet_lines(logged)) == 1
    assert issubclass(TLSError, ConnectionLost)
    assert not failures(logged)


def quiet_lines(logged: Logged) -> list[dict[str, Any]]:
    of_servers = "twisted_rtsig.coro.factories", "twisted_rtsig.coro.handlers"
    return [each for each in logged if each["log_namespace"] in of_servers]


@pytest.mark.parametrize("offence", OFFENCES)
def test_tls_that_fails_is_worth_one_line(
    reactor: Any, serve_tls: Any, logged: Logged, offence: Any
) -> None:
    async def handler(stream: Stream) -> None:
        await stream.read_line()

    async def main() -> None:
        server = await serve_tls(handler, reactor=reactor)
        for _ in range(3):
            await offence(reactor, server)
            await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)
    assert not failures(logged)
    lines = quiet_lines(logged)
    assert [each["log_level"] for each in lines] == [LogLevel.info] * 3
    assert all("TLS has failed" in each["error"] for each in lines)


@pytest.mark.parametrize("wait", ["read", "handshake", "start_tls"])
def test_a_certificate_for_another_name(
    reactor: Any, certificate: PrivateCertificate, logged: Logged, wait: str
) -> None:
    """service_identity finds that out, and not OpenSSL."""

    async def secure_and_say_hello(stream: Stream) -> None:
        await stream.start_tls(certificate.options())
        await say_hello(stream)

    async def main() -> None:
        options = optionsForClientTLS("example.com", certificate)
        if wait == "start_tls":
            server = await listen(reactor, secure_and_say_hello)
            stream = await call(reactor, server)
            waiting: Any = stream.start_tls(options)
        else:
            endpoint = tls_endpoint(reactor, certificate)
            server = await serve(endpoint, say_hello, reactor=reactor)
            to = wrapClientTLS(options, client_endpoint(reactor, server))
            stream = await connect(to)
            waiting = getattr(stream, wait)()
        with pytest.raises(TLSError, match=r"example\.com"):
            await waiting
        assert stream.tls is None
        await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)
    assert not failures(logged)


def test_start_tls_with_a_server_that_speaks_no_tls(
    reactor: Any, certificate: PrivateCertificate, logged: Logged
) -> None:
    async def handler(stream: Stream) -> None:
        await stream.read_line()
        await stream.write(b"220 hello\r\n" * 100)
        await stream.read()

    async def main() -> None:
        server = await listen(reactor, handler)
        stream = await call(reactor, server)
        await stream.write(b"STARTTLS\n")
        with pytest.raises(TLSError) as caught:
            await stream.start_tls(optionsForClientTLS("127.0.0.1", certificate))
        assert type(caught.value.__cause__).__module__ == "OpenSSL.SSL"
        await server.stop()

    run(reactor, main)
    assert not failures(logged)


def test_a_failure_that_nobody_awaits_is_not_logged(
    reactor: Any, certificate: PrivateCertificate, logged: Logged
) -> None:
    """A write and a handshake that were not awaited say nothing when they fail."""

    async def main() -> None:
        server = await listen(reactor, plain_answer)
        stream = await call(reactor, server)
        stream.start_tls(optionsForClientTLS("127.0.0.1", certificate))
        stream.write(b"x")
        await until(lambda: stream.lost)
        stream.write(b"x")
        await server.stop()

    async def plain_answer(stream: Stream) -> None:
        await stream.write(HTTP)
        await stream.read()

    run(reactor, main)
    gc.collect()
    assert not failures(logged)
