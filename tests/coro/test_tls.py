"""Streams when TLS fails, or when a TLS peer does not answer."""

from __future__ import annotations

import contextlib
import gc
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
from OpenSSL import SSL
from twisted.internet.defer import Deferred, succeed
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

from tests.coro.peers import (
    TLSPeer,
    accepted,
    secure_as_client,
    socket_to,
    tls_client,
    tls_client_of,
)
from tests.coro.support import (
    STYLES,
    Logged,
    call,
    client_endpoint,
    failures,
    forgets_awaits,
    listen,
    run,
    tls_endpoint,
    until,
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

LIMIT = 30
MUCH = 1 << 22


# Peers that do not answer


@pytest.fixture(params=["endpoint", "start_tls"])
def serve_tls(
    request: Any, reactor: Any, certificate: PrivateCertificate
) -> Callable[..., Any]:
    """Serve TLS from the beginning, or from the beginning of the handler."""

    @contextlib.asynccontextmanager
    async def serve_tls(handler: Any, **options: Any) -> Any:
        async def start_tls(stream: Stream) -> None:
            await stream.start_tls(certificate.options())
            await handler(stream)

        if request.param == "endpoint":
            server = await listen(reactor, handler, certificate, **options)
        else:
            server = await listen(reactor, start_tls, **options)
        yield server
        await server.stop()

    return serve_tls


async def say_hello(stream: Stream) -> None:
    await stream.write(b"hello")


async def closed_after(clock: Clock, connections: Any, limit: float) -> None:
    """Let time pass: the connection is closed at the limit, and not before."""
    clock.advance(limit - 1)
    await sleep(0.01)
    assert connections
    clock.advance(1)
    await until(lambda: not connections)


async def closed_without_reset(server: Server, peer: TLSPeer) -> None:
    await until(lambda: not server.factory.connections)
    assert await peer.end() == b""


async def done_after(clock: Clock, operation: Deferred[Any], limit: float) -> None:
    """Let time pass: an operation ends at the limit, and not before."""
    clock.advance(limit - 1)
    await sleep(0.01)
    assert not operation.called
    clock.advance(1)
    await operation


def test_a_server_closes_when_the_client_does_not_answer_close_notify(
    reactor: Any, serve_tls: Any, limits_clock: Clock
) -> None:
    clock = limits_clock

    async def main() -> None:
        async with (
            serve_tls(say_hello, close_timeout=LIMIT, reactor=clock) as server,
            tls_client_of(server) as peer,
        ):
            assert await peer.read_until_close_notify() == b"hello"
            clock.advance(LIMIT - 1)
            # Data is no answer.
            await peer.write(b"go on")
            await sleep(0.01)
            assert server.factory.connections
            clock.advance(1)
            await closed_without_reset(server, peer)

    run(reactor, main)


def test_a_server_without_a_close_timeout_waits_for_close_notify(
    reactor: Any, serve_tls: Any, limits_clock: Clock
) -> None:
    async def main() -> None:
        async with (
            serve_tls(say_hello, close_timeout=None, reactor=limits_clock) as server,
            tls_client_of(server) as peer,
        ):
            assert await peer.read_until_close_notify() == b"hello"
            limits_clock.advance(1_000_000)
            await sleep(0.01)
            assert server.factory.connections
            await peer.close_notify()
            await closed_without_reset(server, peer)

    run(reactor, main)


def test_a_client_closes_when_the_server_does_not_answer_close_notify(
    reactor: Any, connecting: Any
) -> None:
    async def main() -> None:
        async with connecting(close_timeout=LIMIT) as (clock, stream, _, secure):

            async def talk() -> None:
                async with stream:
                    await stream.write(b"hello")

            talking = spawn(talk)
            peer = await secure()
            assert await peer.read_until_close_notify() == b"hello"
            await done_after(clock, talking.as_deferred(), LIMIT)
            assert await peer.end() == b""

    run(reactor, main)


def test_a_client_that_reads_slowly_gets_everything(
    reactor: Any, serve_tls: Any, limits_clock: Clock
) -> None:
    """``close_timeout`` begins when everything was sent that was written before."""

    async def handler(stream: Stream) -> None:
        await stream.write(bytes(MUCH))

    async def main() -> None:
        async with (
            serve_tls(handler, close_timeout=LIMIT, reactor=limits_clock) as server,
            tls_client_of(server, receive_buffer=1 << 16) as peer,
        ):
            received = 0
            while data := await peer.read():
                received += len(data)
                await sleep(0)
                # The limit is over long before everything was read.
                limits_clock.advance(LIMIT / 4)
            assert received == MUCH
            await until(lambda: not server.factory.connections)

    run(reactor, main)


@pytest.mark.skipif(
    not sys.platform.startswith(("linux", "darwin", "freebsd", "netbsd")),
    reason="the kernel does not tell what the peer has acknowledged",
)
def test_a_client_that_reads_slowly_is_not_idle(
    reactor: Any, serve_tls: Any, clock: Clock
) -> None:
    """The kernel has all that was written, and the peer takes a little at a time."""

    async def handler(stream: Stream) -> None:
        layer: Any = stream.transport
        layer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
        await stream.write(bytes(1 << 18))
        await stream.read()

    async def main() -> None:
        async with (
            serve_tls(handler, idle_timeout=60, reactor=clock) as server,
            tls_client_of(server, receive_buffer=1 << 13) as peer,
        ):
            received = 0
            while received < 1 << 18:
                received += len(await peer.read(1 << 12))
                await sleep(0)
                clock.advance(5)
                assert server.factory.connections
            clock.pump([5] * 20)
            await until(lambda: not server.factory.connections)

    run(reactor, main)


def test_close_during_a_handshake_that_the_server_does_not_answer(
    reactor: Any, connecting: Any
) -> None:
    """What was written waits for the handshake, and with it the end."""

    async def main() -> None:
        limits = {"handshake_timeout": None, "close_timeout": LIMIT}
        async with connecting(**limits) as (clock, stream, accept, _):
            await accept()
            stream.write(b"hello")
            await done_after(clock, stream.close(), LIMIT)

    run(reactor, main)


async def serve_tls_from(
    reactor: Any, certificate: PrivateCertificate, factory: Any, wrapped: bool
) -> Server:
    """
    Serve TLS.

    :param wrapped: behind a protocol that does not report the handshake.
    """
    outer = WrappingFactory(factory) if wrapped else factory
    return Server(await tls_endpoint(reactor, certificate).listen(outer), factory)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_close_timeout_of_a_server_begins_after_the_handshake(
    reactor: Any, certificate: PrivateCertificate, limits_clock: Clock, wrapped: bool
) -> None:
    """The handler has returned before; also if nothing reports the handshake."""
    clock = limits_clock

    async def handler(stream: Stream) -> None:
        stream.write(b"hello")

    async def main() -> None:
        factory: Any = CoroutineFactory(
            handler,
            handshake_timeout=3 * LIMIT,
            close_timeout=LIMIT,
            reactor=clock,
        )
        server = await serve_tls_from(reactor, certificate, factory, wrapped)
        with socket_to(server) as plain:
            await until(lambda: factory.connections)
            clock.advance(2 * LIMIT)
            await sleep(0.01)
            assert factory.connections
            peer = await secure_as_client(plain)
            assert await peer.read_until_close_notify() == b"hello"
            # Now the server looks whether the handshake is done.
            clock.advance(0.1)
            await closed_after(clock, factory.connections, LIMIT)
            assert await peer.end() == b""
        await server.stop()

    run(reactor, main)


def test_the_close_timeout_of_a_client_begins_after_the_handshake(
    reactor: Any, connecting: Any
) -> None:
    async def main() -> None:
        limits = {"handshake_timeout": 3 * LIMIT, "close_timeout": LIMIT}
        async with connecting(**limits) as (clock, stream, _, secure):
            stream.write(b"hello")
            closed = stream.close()
            clock.advance(2 * LIMIT)
            await sleep(0.01)
            assert not closed.called
            peer = await secure()
            assert await peer.read_until_close_notify() == b"hello"
            await done_after(clock, closed, LIMIT)

    run(reactor, main)


def test_delayed_calls_that_other_code_has_cancelled(
    reactor: Any, serve_tls: Any, clock: Clock
) -> None:
    """As trial does at the end of a test, before connections are lost."""

    async def main() -> None:
        deadline = Deadline(1, clock)
        async with (
            serve_tls(say_hello, reactor=clock) as server,
            tls_client_of(server) as peer,
        ):
            assert await peer.read_until_close_notify() == b"hello"
            choosing = select(deadline, Event())
            # The limits of the handshake and of the end, the watchdog, the deadline.
            for each in clock.getDelayedCalls():
                each.cancel()
            choosing.cancel()
            await peer.close_notify()
            await until(lambda: not server.factory.connections)

    run(reactor, main)


def test_read_raises_when_no_handshake_comes(reactor: Any, connecting: Any) -> None:
    async def main() -> None:
        async with connecting(handshake_timeout=LIMIT) as (clock, stream, accept, _):
            await accept()
            with pytest.raises(TLSError, match=f"no handshake within {LIMIT} s"):
                await done_after(clock, stream.read(), LIMIT)

    run(reactor, main)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_handshake_timeout_ends_with_the_handshake(
    reactor: Any, certificate: PrivateCertificate, limits_clock: Clock, wrapped: bool
) -> None:
    """The endpoint wraps protocols, or a wrapper does not report the handshake."""
    clock = limits_clock
    options = optionsForClientTLS("127.0.0.1", certificate)

    async def handler(stream: Stream) -> None:
        async for line in stream.lines():
            await stream.write(line)

    async def main() -> None:
        factory: Any = CoroutineFactory(handler, handshake_timeout=LIMIT, reactor=clock)
        server = await serve_tls_from(reactor, certificate, factory, wrapped)
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

    run(reactor, main)


@pytest.mark.parametrize("style", STYLES)
def test_start_tls_raises_when_no_handshake_comes(
    reactor: Any,
    certificate: PrivateCertificate,
    logged: Logged,
    limits_clock: Clock,
    style: str,
) -> None:
    """On either side, when its limit is over."""
    got: list[Any] = []

    def handler(stream: Stream) -> Any:
        steps = [lambda: stream.start_tls(certificate.options())]
        return STYLES[style](reactor, steps, got)

    async def main() -> None:
        limits: Any = {"handshake_timeout": LIMIT, "reactor": limits_clock}
        plain = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        server = await serve(plain, handler, **limits)
        with socket_to(server):
            connections = server.factory.connections
            await until(lambda: connections)
            await closed_after(limits_clock, connections, LIMIT)
        await server.stop()
        async with accepted(reactor) as (endpoint, accept):
            stream = await connect(endpoint, **limits)
            await accept()
            secured = stream.start_tls(optionsForClientTLS("127.0.0.1", certificate))
            limits_clock.advance(LIMIT)
            with pytest.raises(TLSError, match=f"no handshake within {LIMIT} s"):
                await secured

    run(reactor, main)
    assert got == [TLSError]
    assert not failures(logged)


def test_writing_after_the_client_has_sent_close_notify_raises(
    reactor: Any, serve_tls: Any
) -> None:
    """
    The client ends TLS while the server's output waits for room, and reads on: what the
    server writes is an error, and does not vanish.
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
        async with serve_tls(handler) as server, tls_client_of(server) as peer:
            await full.wait()
            await peer.close_notify()
            # The server receives that before there is room again.
            for _ in range(20):
                await sleep(0)
            while await peer.end():
                peer.plain.recv(1 << 20)
            await until(lambda: not server.factory.connections)

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
def test_stream_tls_holds_what_was_negotiated(
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


def test_stream_tls_holds_the_name_and_certificate_of_a_client(
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
def test_stream_handshake(
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


def test_handshake_behind_a_protocol_that_does_not_report_it(
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
    async with tls_client_of(server) as peer:
        peer.plain.sendall(HTTP)
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
def test_failed_tls_raises_tls_error(
    reactor: Any, serve_tls: Any, logged: Logged, offence: Any, style: str
) -> None:
    """In the handler it is a TLSError, which is a ConnectionLost; nothing is logged."""
    got: list[Any] = []

    async def handler(stream: Stream) -> None:
        await STYLES[style](reactor, [stream.read, lambda: stream.write(b"x")], got)

    async def main() -> None:
        async with serve_tls(handler) as server:
            await offence(reactor, server)
            await until(lambda: not server.factory.connections)

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
def test_failed_tls_is_logged_in_one_line(
    reactor: Any, serve_tls: Any, logged: Logged, offence: Any
) -> None:
    async def handler(stream: Stream) -> None:
        await stream.read_line()

    async def main() -> None:
        async with serve_tls(handler) as server:
            for _ in range(3):
                await offence(reactor, server)
                await until(lambda: not server.factory.connections)

    run(reactor, main)
    assert not failures(logged)
    lines = quiet_lines(logged)
    assert [each["log_level"] for each in lines] == [LogLevel.info] * 3
    assert all("TLS has failed" in each["error"] for each in lines)


@pytest.mark.parametrize("wait", ["read", "handshake", "start_tls"])
def test_a_certificate_for_another_host_is_refused(
    reactor: Any, certificate: PrivateCertificate, no_failures: None, wait: str
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
            server = await listen(reactor, say_hello, certificate)
            to = wrapClientTLS(options, client_endpoint(reactor, server))
            stream = await connect(to)
            waiting = getattr(stream, wait)()
        with pytest.raises(TLSError, match=r"example\.com"):
            await waiting
        assert stream.tls is None
        await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)


def test_start_tls_raises_when_the_server_answers_plaintext(
    reactor: Any, certificate: PrivateCertificate, no_failures: None
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


def test_errors_of_tls_that_are_not_awaited_are_not_logged(
    reactor: Any, certificate: PrivateCertificate, no_failures: None
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
