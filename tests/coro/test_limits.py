"""The default limits of servers: what exceeds them, and what does not."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import inlineCallbacks
from twisted.internet.endpoints import (
    UNIXClientEndpoint,
    UNIXServerEndpoint,
    wrapClientTLS,
)
from twisted.internet.error import ConnectionAborted, ConnectionClosed, ConnectionDone
from twisted.internet.ssl import PrivateCertificate, optionsForClientTLS
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.python.failure import Failure

from tests.coro.support import call, client_endpoint, listen, run, spin, tls_endpoint
from tests.coro.test_serving import (
    Logged,
    _made,
    _Transport,
    failures,
    held_up,
    write_and_end,
    write_and_wait,
)
from tests.coro.test_tls import (
    Peer,
    accepted,
    client_context,
    socket_to,
    tls_client,
    until,
)
from tests.coro.test_tls import server_context as server_context
from twisted_rtsig.coro import (
    CoroutineFactory,
    Event,
    Server,
    Stream,
    connect,
    coroutine,
    serve,
    sleep,
    spawn,
)
from twisted_rtsig.coro.limits import network_of
from twisted_rtsig.coro.time_limits import pending_of
from twisted_rtsig.files import open_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FIRST_BYTE = 60
IDLE = 3600
WRITE = 120
# A watchdog looks so often, and so it is that much too late at most, and one look.
LOOK = 15


@pytest.fixture
def reactor(reactor: Any) -> Iterator[Any]:
    """Each reactor, with threads for files that run although it is only iterated."""
    threads = reactor.getThreadPool()
    threads.start()
    yield reactor
    threads.stop()


@pytest.fixture(autouse=True, scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = tmp_path_factory.mktemp("big") / "file"
    path.write_bytes(bytes(1 << 22))
    BIG_FILE.append(path)
    yield
    BIG_FILE.clear()


BIG_FILE: list[Path] = []


def lines(logged: Logged, option: str) -> list[str]:
    """What was logged about a limit, in full."""
    texts = [each["log_format"].format(**each) for each in logged if "server" in each]
    return [each for each in texts if option in each]


def age(clock: Clock, transport: _Transport) -> float:
    """Let time pass until a connection is aborted; how long that took."""
    begin = clock.seconds()
    while not transport.aborting:
        assert clock.seconds() - begin < 2 * IDLE, "it is never aborted"
        clock.advance(LOOK)
    return clock.seconds() - begin


# The first byte


async def _read(stream: Stream, errors: list[Any]) -> None:
    try:
        while await stream.read():
            pass
    except ConnectionClosed as error:
        errors.append(error)
        raise


def _read_as_generator(stream: Stream, errors: list[Any]) -> Generator[Any, Any, None]:
    try:
        while (yield stream.read()):
            pass
    except ConnectionClosed as error:
        errors.append(error)
        raise


READERS: dict[str, Any] = {
    "async def": _read,
    "generator": _read_as_generator,
    "@coroutine": coroutine(_read_as_generator),
    "@inlineCallbacks": inlineCallbacks(_read_as_generator),
}


@pytest.mark.parametrize("style", READERS)
def test_a_peer_that_sends_nothing(logged: Logged, style: str) -> None:
    clock = Clock()
    errors: list[Any] = []
    factory = CoroutineFactory(
        lambda stream: READERS[style](stream, errors), name="it", reactor=clock
    )
    _, transport = _made(factory)
    assert FIRST_BYTE <= age(clock, transport) <= FIRST_BYTE + LOOK
    (error,) = errors
    assert isinstance(error, ConnectionAborted)
    assert "has sent nothing for 60.0 s (first_byte_timeout)" in str(error)
    (line,) = lines(logged, "first_byte_timeout")
    assert line.startswith("it: aborted <Stream to ")
    # The handler that fails because of it tells no more.
    assert len([each for each in logged if each["log_namespace"] in _SERVING]) == 1
    assert not clock.getDelayedCalls()


_SERVING = ("twisted_rtsig.coro.factories", "twisted_rtsig.coro.handlers")


def test_a_peer_that_has_sent_something_may_be_silent() -> None:
    """As the member of a chat that only listens."""
    clock = Clock()
    protocol, transport = _made(
        CoroutineFactory(lambda stream: _read(stream, []), reactor=clock)
    )
    clock.advance(LOOK)
    protocol.dataReceived(b"my name\n")
    assert IDLE <= age(clock, transport) <= IDLE + 2 * LOOK


async def _push(stream: Stream) -> None:
    while True:
        await sleep(40)
        await stream.write(b"news")


async def _push_and_read(stream: Stream) -> None:
    spawn(_push, stream)
    await stream.read()


async def _read_late(stream: Stream) -> None:
    await sleep(2 * FIRST_BYTE)
    await stream.read()


@pytest.mark.parametrize("handler", [_push, _push_and_read, _read_late])
def test_a_peer_that_need_not_send_anything(handler: Any) -> None:
    """Because no read waits, or because the server sends something now and then."""
    clock = Clock()
    protocol, transport = _made(CoroutineFactory(handler, reactor=clock))
    for _ in range(2 * FIRST_BYTE // LOOK + 1):
        clock.advance(LOOK)
        assert not transport.aborting
    if handler is _read_late:
        assert FIRST_BYTE - LOOK <= age(clock, transport) <= FIRST_BYTE + LOOK
    else:
        clock.pump([LOOK] * 20)
        assert not transport.aborting
        protocol.connectionLost(Failure(ConnectionDone()))


@pytest.mark.parametrize("first_byte_timeout", [FIRST_BYTE, None])
def test_the_first_byte_comes_after_the_handshake(
    reactor: Any,
    certificate: PrivateCertificate,
    logged: Logged,
    first_byte_timeout: float | None,
) -> None:
    """Before, the limit of the handshake counts, which may be none."""
    clock = Clock()

    async def main() -> None:
        server = await serve(
            tls_endpoint(reactor, certificate),
            lambda stream: _read(stream, []),
            handshake_timeout=None,
            first_byte_timeout=first_byte_timeout,
            reactor=clock,
        )
        with socket_to(server) as plain:
            await until(lambda: server.factory.connections)
            clock.pump([LOOK] * 10)
            assert server.factory.connections
            peer = Peer(plain, client_context(), server_side=False)
            await peer.handshake()
            for _ in range(FIRST_BYTE // LOOK - 1):
                await sleep(0)
                clock.advance(LOOK)
            await sleep(0.01)
            assert server.factory.connections
            clock.pump([LOOK] * 3)
            if first_byte_timeout is not None:
                await until(lambda: not server.factory.connections)
            await sleep(0.01)
            assert bool(server.factory.connections) is (first_byte_timeout is None)
        await server.stop()
        assert not clock.getDelayedCalls()

    run(reactor, main)
    assert bool(lines(logged, "first_byte_timeout")) is (first_byte_timeout is not None)


# Peers that do not read


@contextlib.contextmanager
def stuck(
    reactor: Any, handler: Any, path: Path | None = None, **options: Any
) -> Iterator[tuple[Clock, CoroutineFactory, socket.socket]]:
    """A server with the default limits but for *idle_timeout*, and a client."""
    clock = Clock()
    with held_up(
        reactor,
        clock,
        handler,
        str(path) if path is not None else None,
        idle_timeout=None,
        **options,
    ) as (factory, client):
        yield clock, factory, client


def settle(reactor: Any) -> None:
    """Let the kernel and the transport have what they take."""
    for _ in range(100):
        reactor.iterate(0)


def pass_time(reactor: Any, clock: Clock, seconds: float) -> None:
    for _ in range(int(seconds / LOOK)):
        clock.advance(LOOK)
        reactor.iterate(0)


async def _send_file(stream: Stream) -> None:
    transport: Any = stream.transport
    transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    async with await open_file(BIG_FILE[0], "rb") as file:
        await stream.send_file(file)


async def _write_on_and_on(stream: Stream) -> None:
    """As one that tells many peers something, and waits for none."""
    await write_and_end(stream)
    while not stream.lost:
        await sleep(5)
        stream.write(b"news")


async def _write_as_generator_does(stream: Stream) -> None:
    @inlineCallbacks
    def write() -> Generator[Any, Any, None]:
        transport: Any = stream.transport
        transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        yield stream.write(bytes(1 << 22))

    await write()


STUCK = [
    write_and_wait,
    # The handler has returned, and the rest is to be sent before the end.
    write_and_end,
    _send_file,
    _write_on_and_on,
    _write_as_generator_does,
]


@pytest.mark.parametrize("handler", STUCK)
def test_a_peer_that_does_not_read(reactor: Any, logged: Logged, handler: Any) -> None:
    with stuck(reactor, handler) as (clock, factory, _):
        settle(reactor)
        pass_time(reactor, clock, WRITE - LOOK)
        assert factory.connections
        pass_time(reactor, clock, 3 * LOOK)
        spin(reactor, lambda: not factory.connections)
        assert not clock.getDelayedCalls()
    (line,) = lines(logged, "write_timeout")
    assert "the peer has taken nothing of the output for 120.0 s" in line
    assert failures(logged) == []


@pytest.mark.skipif(sys.platform == "win32", reason="it has no UNIX sockets")
def test_a_peer_of_a_unix_socket_that_does_not_read(
    reactor: Any, logged: Logged, tmp_path: Path
) -> None:
    with stuck(reactor, write_and_end, tmp_path / "socket") as (clock, factory, _):
        settle(reactor)
        pass_time(reactor, clock, WRITE + 3 * LOOK)
        spin(reactor, lambda: not factory.connections)
    assert len(lines(logged, "write_timeout")) == 1


def test_a_peer_that_sends_and_does_not_read(reactor: Any, logged: Logged) -> None:
    """What comes is a sign of life, and still it blocks the output."""

    async def handler(stream: Stream) -> None:
        await write_and_end(stream)
        while await stream.read():
            pass

    with stuck(reactor, handler) as (clock, factory, client):
        settle(reactor)
        for _ in range((WRITE + 3 * LOOK) // LOOK):
            with contextlib.suppress(ConnectionError):
                client.send(b"x")
            settle(reactor)
            clock.advance(LOOK)
        spin(reactor, lambda: not factory.connections)
    assert len(lines(logged, "write_timeout")) == 1


@pytest.mark.parametrize("handler", [write_and_wait, write_and_end, _send_file])
def test_a_peer_that_reads_slowly(reactor: Any, logged: Logged, handler: Any) -> None:
    """It takes many times the limit, and gets everything."""
    received = 0
    with stuck(reactor, handler, receive_buffer=1 << 14) as (clock, _, client):
        settle(reactor)
        while True:
            try:
                data = client.recv(1 << 14)
            except BlockingIOError:
                reactor.iterate(0.01)
            else:
                received += len(data)
                if not data:
                    break
                reactor.iterate(0)
                clock.advance(LOOK)
        assert clock.seconds() > 10 * WRITE
    assert received >= 1 << 22
    assert not lines(logged, "write_timeout")


def test_the_write_limit_can_be_turned_off(reactor: Any, logged: Logged) -> None:
    options = {"write_timeout": None, "first_byte_timeout": None}
    with stuck(reactor, write_and_end, **options) as (clock, factory, _):
        settle(reactor)
        # There is nothing to look for at all.
        assert not clock.getDelayedCalls()
        pass_time(reactor, clock, 10 * WRITE)
        assert factory.connections
    assert not lines(logged, "timeout")


async def look(clock: Clock, times: int) -> None:
    """Let the watchdog look so many times."""
    for _ in range(times):
        clock.advance(LOOK)
        await sleep(0)


async def look_until(clock: Clock, happens: Callable[[], object]) -> None:
    """
    Let the watchdog look until something is true.

    On a busy machine the kernel of the peer takes the last output late, between two
    looks, and the limit begins anew.
    """
    while not happens():
        await look(clock, 1)


async def secure_and_do_not_read(
    plain: socket.socket, server: Server, clock: Clock
) -> None:
    """Do the handshake as a client; the connection lasts for the limit from then on."""
    peer = Peer(plain, client_context(), server_side=False)
    await peer.handshake()
    for _ in range(100):
        await sleep(0)
    await look(clock, WRITE // LOOK - 1)
    assert server.factory.connections
    await look_until(clock, lambda: not server.factory.connections)


@pytest.mark.parametrize("returns", [False, True])
def test_a_peer_of_tls_that_does_not_read(
    reactor: Any, certificate: PrivateCertificate, logged: Logged, returns: bool
) -> None:
    """Neither while the handler waits, nor before the close_notify is sent."""
    clock = Clock()

    async def handler(stream: Stream) -> None:
        layer: Any = stream.transport
        layer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        written = stream.write(bytes(1 << 22))
        if not returns:
            await written

    async def main() -> None:
        endpoint = tls_endpoint(reactor, certificate)
        server = await serve(endpoint, handler, idle_timeout=None, reactor=clock)
        with socket_to(server, receive_buffer=1 << 13) as plain:
            await secure_and_do_not_read(plain, server, clock)
        await server.stop()
        assert not clock.getDelayedCalls()

    run(reactor, main)
    assert len(lines(logged, "write_timeout")) == 1
    assert failures(logged) == []


@pytest.mark.parametrize("returns", [False, True])
def test_a_peer_of_tls_whose_handshake_is_late_does_not_read(
    reactor: Any, certificate: PrivateCertificate, logged: Logged, returns: bool
) -> None:
    """What was written before the handshake is pending neither here nor there."""
    clock = Clock()

    async def handler(stream: Stream) -> None:
        layer: Any = stream.transport
        layer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        written = stream.write(bytes(1 << 22))
        if not returns:
            await written

    async def main() -> None:
        server = await serve(
            tls_endpoint(reactor, certificate),
            handler,
            idle_timeout=None,
            handshake_timeout=10 * WRITE,
            close_timeout=None,
            reactor=clock,
        )
        with socket_to(server, receive_buffer=1 << 13) as plain:
            await until(lambda: server.factory.connections)
            await look(clock, 2 * WRITE // LOOK)
            assert server.factory.connections
            await secure_and_do_not_read(plain, server, clock)
        await server.stop()
        assert not clock.getDelayedCalls()

    run(reactor, main)
    assert len(lines(logged, "write_timeout")) == 1
    assert failures(logged) == []


def test_a_server_of_tls_whose_handshake_is_late_does_not_read_after_close(
    reactor: Any, certificate: PrivateCertificate, server_context: ssl.SSLContext
) -> None:
    clock = Clock()

    async def main() -> None:
        async with accepted(reactor) as (endpoint, accept):
            stream = await connect(
                tls_client(endpoint, certificate),
                clock,
                handshake_timeout=10 * WRITE,
                close_timeout=None,
            )
            # The kernel of the peer has acknowledged the beginning of the handshake.
            await until(lambda: not any(pending_of(stream)))
            # Much more than all buffers hold.
            stream.write(bytes(1 << 24))
            closed = stream.close()
            await look(clock, 2 * WRITE // LOOK)
            assert not closed.called
            peer = Peer(await accept(), server_context, server_side=True)
            await peer.handshake()
            for _ in range(100):
                await sleep(0)
            await look(clock, WRITE // LOOK - 1)
            assert not closed.called
            await look_until(clock, lambda: closed.called)
            await closed
        assert not clock.getDelayedCalls()

    run(reactor, main)


def test_a_connection_that_ends_at_once_does_not_end_the_limits(
    logged: Logged,
) -> None:
    """In the first step of its handler, before the limits begin."""
    clock = Clock()
    streams: list[Stream] = []

    async def handler(stream: Stream) -> None:
        streams.append(stream)
        if len(streams) == 1:
            await stream.abort()
        await stream.read()

    factory = CoroutineFactory(handler, reactor=clock)
    _, transport = _made(factory)
    assert transport.aborting
    clock.advance(FIRST_BYTE)
    _, transport = _made(factory)
    assert FIRST_BYTE <= age(clock, transport) <= FIRST_BYTE + LOOK
    assert not clock.getDelayedCalls()


def test_a_transport_that_raises_does_not_end_the_limits_of_others(
    logged: Logged,
) -> None:
    clock = Clock()

    async def handler(stream: Stream) -> None:
        await stream.read()

    factory = CoroutineFactory(handler, reactor=clock)
    protocols = [_made(factory) for _ in range(3)]
    broken: Any = protocols[1][1]
    # As if there were more to it.
    broken.dataBuffer = b""
    clock.pump([LOOK] * (FIRST_BYTE // LOOK + 2))
    assert [each.aborting for _, each in protocols] == [True, False, True]
    assert len(lines(logged, "first_byte_timeout")) == 1
    events = [each for each in logged if each.get("log_failure")]
    assert all("the limits cannot be applied" in each["log_format"] for each in events)
    # At most once a minute.
    assert len(events) == 2
    protocols[1][0].connectionLost()
    assert not clock.getDelayedCalls()


def test_a_transport_without_a_socket_that_has_no_room(logged: Logged) -> None:
    """It tells no more than that it has no room, and that it has room again."""
    clock = Clock()

    async def handler(stream: Stream) -> None:
        stream.pauseProducing()
        await stream.write(b"x")

    factory = CoroutineFactory(handler, reactor=clock)
    protocol, transport = _made(factory)
    clock.pump([LOOK] * 5)
    protocol.stream.resumeProducing()
    assert transport.disconnecting
    protocol.stream.pauseProducing()
    assert WRITE - LOOK <= age(clock, transport) <= WRITE + 2 * LOOK
    assert len(lines(logged, "write_timeout")) == 1


# Clients


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("file", [False, True])
def test_a_server_that_does_not_read_after_close(
    reactor: Any, certificate: PrivateCertificate, tls: bool, file: bool
) -> None:
    clock = Clock()
    left = Event()

    async def handler(stream: Stream) -> None:
        await left.wait()

    async def main() -> None:
        if tls:
            endpoint = tls_endpoint(reactor, certificate)
            server = await serve(endpoint, handler, reactor=reactor)
        else:
            server = await listen(reactor, handler)
        to: Any = client_endpoint(reactor, server)
        if tls:
            to = wrapClientTLS(optionsForClientTLS("127.0.0.1", certificate), to)
        stream = await connect(to, clock, close_timeout=None)
        async with await open_file(BIG_FILE[0], "rb") as opened:
            # Much more than all buffers hold.
            stream.write(bytes(1 << 24))
            if file:
                stream.send_file(opened)
            closed = stream.close()
            for _ in range(200):
                await sleep(0)
            await look(clock, WRITE // LOOK - 1)
            assert not closed.called
            await look_until(clock, lambda: closed.called)
            await closed
        assert stream.lost
        left.set()
        await server.stop()
        clock.advance(0)
        assert not clock.getDelayedCalls()

    run(reactor, main)


def test_a_client_that_closes_has_no_delayed_call(reactor: Any) -> None:
    """There is nothing left to be sent."""
    clock = Clock()

    async def main() -> None:
        server = await listen(reactor, lambda stream: _read(stream, []))
        stream = await connect(client_endpoint(reactor, server), clock)
        await stream.write(b"x")
        transport: Any = stream.transport
        while transport.dataBuffer or not server.factory.connections:
            await sleep(0)
        await sleep(0.01)
        closed = stream.close()
        assert not clock.getDelayedCalls()
        await closed
        await server.stop()

    run(reactor, main)


# How many


@contextlib.contextmanager
def few_descriptors(free: int) -> Iterator[None]:
    """Three quarters of the descriptors are in use when about *free* more are."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/dev/fd")))
    few = (highest + 1 + free) * 4 // 3
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def is_refused(server: Server, client: socket.socket) -> bool:
    """Wait until a new connection is accepted or refused."""
    client.setblocking(False)
    before = len(server.factory.connections)
    while True:
        try:
            client.recv(1)
        except BlockingIOError:
            if len(server.factory.connections) > before:
                return False
            await sleep(0)
        except ConnectionResetError:
            return True


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such limit")
def test_connections_leave_descriptors_free(reactor: Any, logged: Logged) -> None:
    """Of two servers together, and those of the clients, which are in this process."""

    async def main() -> None:
        servers = [
            await listen(reactor, lambda stream: _read(stream, []), name=each)
            for each in ("one", "two")
        ]
        with few_descriptors(free=20), contextlib.ExitStack() as stack:
            clients = []
            for each in servers:
                refused = False
                while not refused:
                    address = "127.0.0.1", each.port.getHost().port
                    clients.append(
                        stack.enter_context(socket.create_connection(address))
                    )
                    refused = await is_refused(each, clients[-1])
            assert len(servers[0].factory.connections) >= 5
            for client in clients:
                client.close()
            await until(lambda: not any(each.factory.connections for each in servers))
            async with await call(reactor, servers[0]) as stream:
                await stream.write(b"x")
                await until(lambda: servers[0].factory.connections)
        for each in servers:
            await each.stop()

    run(reactor, main)
    told = lines(logged, "max_connections")
    # One for each server.
    assert len(told) == 2
    assert told[0].startswith("one: refused ")
    assert "descriptors of this process are in use (ulimit -n)" in told[0]
    assert failures(logged) == []


def test_a_number_of_connections_that_descriptors_do_not_limit(reactor: Any) -> None:
    """A number, or None, is taken at its word."""

    async def main() -> None:
        server = await listen(
            reactor, lambda stream: _read(stream, []), max_connections=None
        )
        with few_descriptors(free=0):
            async with await call(reactor, server):
                await until(lambda: server.factory.connections)
        await server.stop()

    if sys.platform != "win32":
        run(reactor, main)


ADDRESSES: list[tuple[Any, Any]] = [
    (IPv4Address("TCP", "192.0.2.1", 5), IPv4Address("TCP", "192.0.2.1", 6)),
    (
        IPv4Address("TCP", "192.0.2.1", 5),
        IPv6Address("TCP", "::ffff:192.0.2.1", 6),
    ),
    (
        IPv6Address("TCP", "2001:db8::1", 5),
        IPv6Address("TCP", "2001:db8::ffff:0:0:1", 6),
    ),
    (IPv6Address("TCP", "fe80::1%eth0", 5), IPv6Address("TCP", "fe80::1%eth0", 6)),
]
OTHERS: list[tuple[Any, Any]] = [
    (IPv4Address("TCP", "192.0.2.1", 5), IPv4Address("TCP", "192.0.2.2", 5)),
    (
        IPv6Address("TCP", "2001:db8:0:1::1", 5),
        IPv6Address("TCP", "2001:db8:0:2::1", 5),
    ),
    (
        IPv6Address("TCP", "::ffff:192.0.2.1", 5),
        IPv6Address("TCP", "::ffff:192.0.2.2", 5),
    ),
    # All hosts of a link have this network.
    (IPv6Address("TCP", "fe80::1%eth0", 5), IPv6Address("TCP", "fe80::2%eth0", 5)),
    (IPv6Address("TCP", "::1", 5), IPv4Address("TCP", "127.0.0.1", 5)),
]


@pytest.mark.parametrize(("one", "other"), ADDRESSES)
def test_what_is_one_address(one: Any, other: Any) -> None:
    assert network_of(one) == network_of(other) is not None


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_what_is_not_one_address(one: Any, other: Any) -> None:
    assert network_of(one) != network_of(other)


@pytest.mark.parametrize("address", [None, UNIXAddress(None), UNIXAddress("/x")])
def test_what_has_no_address(address: Any) -> None:
    assert network_of(address) is None


@contextlib.contextmanager
def clients_of(address: str) -> Iterator[Callable[[Any], socket.socket]]:
    with contextlib.ExitStack() as stack:

        def connected(server: Any) -> socket.socket:
            client = stack.enter_context(socket.socket())
            client.bind((address, 0))
            client.connect(("127.0.0.1", server.port.getHost().port))
            client.setblocking(False)
            return client

        yield connected


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="it has one loopback address"
)
def test_connections_per_address(reactor: Any, logged: Logged) -> None:
    async def main() -> None:
        server = await listen(
            reactor,
            lambda stream: _read(stream, []),
            name="it",
            max_connections_per_address=2,
        )
        connections = server.factory.connections

        async def reaches(count: int) -> None:
            await until(lambda: len(connections) == count)

        with clients_of("127.0.0.2") as one, clients_of("127.0.0.3") as other:
            for again in range(3):
                first = [one(server), one(server)]
                await reaches(2)
                for _ in range(5):
                    assert await is_refused(server, one(server))
                others = [other(server)]
                await reaches(3)
                # One that was lost makes room for one.
                first.pop().close()
                await reaches(2)
                first.append(one(server))
                await reaches(3)
                for each in (*first, *others):
                    each.close()
                await reaches(0)
                assert not server.factory._per_address, again
        await server.stop()

    run(reactor, main)
    (line,) = lines(logged, "max_connections_per_address")
    assert line.startswith("it: refused IPv4Address(")
    assert line.endswith("127.0.0.2 has 2 (max_connections_per_address)")


@pytest.mark.skipif(sys.platform == "win32", reason="it has no UNIX sockets")
def test_unix_sockets_have_no_address(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "socket")
        server = await serve(
            UNIXServerEndpoint(reactor, path),
            lambda stream: _read(stream, []),
            max_connections_per_address=1,
            reactor=reactor,
        )
        to = UNIXClientEndpoint(reactor, path)
        async with await connect(to), await connect(to):
            await until(lambda: len(server.factory.connections) == 2)
        await server.stop()

    run(reactor, main)


def test_a_handler_without_its_connection_counts(logged: Logged) -> None:
    """It holds memory as well; and when it ends, it does not count twice."""
    end = Event()

    async def handler(stream: Stream) -> None:
        await end.wait()

    clock = Clock()
    factory = CoroutineFactory(handler, max_connections_per_address=1, reactor=clock)

    def made() -> tuple[Any, _Transport]:
        protocol: Any = factory.buildProtocol(None)
        transport = _Transport(peerAddress=IPv4Address("TCP", "192.0.2.1", 1))
        transport.protocol = protocol
        protocol.makeConnection(transport)
        return protocol, transport

    first, _ = made()
    first.connectionLost(Failure(ConnectionDone()))
    assert made()[1].aborting
    end.set()
    assert not factory.connections
    second, transport = made()
    assert not transport.aborting
    second.connectionLost(Failure(ConnectionDone()))
    assert not factory._per_address


# In the log


def test_a_stranger_cannot_fill_the_log(logged: Logged) -> None:
    clock = Clock()
    factory = CoroutineFactory(
        lambda stream: _read(stream, []), name="it", max_connections=1, reactor=clock
    )
    _, first = _made(factory)

    def knock(times: int) -> None:
        for _ in range(times):
            assert _made(factory)[1].aborting

    knock(100)
    (line,) = lines(logged, "max_connections")
    assert line.endswith("it has 1 connections (max_connections)")
    assert {each["log_level"] for each in logged if "why" in each} == {LogLevel.warn}
    clock.pump([LOOK] * 3)
    knock(100)
    assert len(lines(logged, "max_connections")) == 1
    clock.pump([LOOK] * 2)
    assert first.aborting
    _, first = _made(factory)
    knock(3)
    *_, line = lines(logged, "max_connections")
    assert line.endswith("(max_connections) (199 more since the last such message)")
    assert len(lines(logged, "max_connections")) == 2
    # A clock that is set back silences nothing.
    clock.rightNow = 0
    knock(1)
    assert len(lines(logged, "max_connections")) == 3


def test_many_silent_peers_make_one_line(logged: Logged) -> None:
    """More than are looked at in one turn of the reactor."""
    clock = Clock()
    factory = CoroutineFactory(
        lambda stream: _read(stream, []), max_connections=None, reactor=clock
    )
    transports = [_made(factory)[1] for _ in range(1200)]
    clock.pump([LOOK] * (FIRST_BYTE // LOOK + 1))
    assert all(each.aborting for each in transports)
    assert not factory.connections
    assert not clock.getDelayedCalls()
    assert len([each for each in logged if each["log_namespace"] in _SERVING]) == 1


def test_looks_leave_room_for_others(logged: Logged) -> None:
    """A look at very many connections is made of many short ones."""
    clock = Clock()
    factory = CoroutineFactory(_push, max_connections=None, reactor=clock)
    protocols = [_made(factory)[0] for _ in range(1200)]
    seen: list[int] = []

    def count() -> None:
        seen.append(sum(each.stream.signs is not None for each in protocols))
        if seen[-1] < 1200:
            clock.callLater(0, count)

    clock.callLater(LOOK, count)
    clock.advance(LOOK)
    assert len(seen) == 3
    assert seen[0] < seen[1] < seen[2] == 1200
    for each in protocols:
        each.connectionLost(Failure(ConnectionDone()))


def test_handshakes_that_do_not_come_make_one_line(
    reactor: Any, certificate: PrivateCertificate, logged: Logged
) -> None:
    clock = Clock()

    async def main() -> None:
        server = await serve(
            tls_endpoint(reactor, certificate),
            lambda stream: _read(stream, []),
            reactor=clock,
        )
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(socket_to(server))
            await until(lambda: len(server.factory.connections) == 5)
            clock.advance(30)
            await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)
    (line,) = lines(logged, "handshake_timeout")
    assert "no handshake within 30.0 s" in line
    assert len([each for each in logged if each["log_namespace"] in _SERVING]) == 1
