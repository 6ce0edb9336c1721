"""The default limits of servers: what exceeds them, and what does not."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import (
    UNIXClientEndpoint,
    UNIXServerEndpoint,
)
from twisted.internet.error import ConnectionAborted, ConnectionClosed, ConnectionDone
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.python.failure import Failure

from tests.coro import peers
from tests.coro.support import (
    Certificate,
    Logged,
    call,
    client_endpoint,
    failures,
    listen,
    run,
    spin,
    until,
)
from tests.files.conftest import reactor as reactor
from tests.files.conftest import reactor_without_threads as reactor_without_threads
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


def age(clock: Clock, transport: peers.AbortableTransport) -> float:
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


async def _read_all(stream: Stream) -> None:
    await _read(stream, [])


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
def test_a_peer_that_sends_nothing_is_aborted(logged: Logged, style: str) -> None:
    clock = Clock()
    errors: list[Any] = []
    factory = CoroutineFactory(
        lambda stream: READERS[style](stream, errors), name="it", reactor=clock
    )
    _, transport = peers.connection_of(factory)
    assert FIRST_BYTE <= age(clock, transport) <= FIRST_BYTE + LOOK
    (error,) = errors
    assert isinstance(error, ConnectionAborted)
    assert "has sent nothing for 60.0 s (first_byte_timeout)" in str(error)
    (line,) = lines(logged, "first_byte_timeout")
    assert line.startswith("it: aborted <Stream to ")
    # The handler that fails because of it logs nothing more.
    assert len([each for each in logged if each["log_namespace"] in _SERVING]) == 1
    assert not clock.getDelayedCalls()


_SERVING = ("twisted_rtsig.coro.factories", "twisted_rtsig.coro.handlers")


def test_a_peer_that_has_sent_something_may_be_silent() -> None:
    """As a member of a chat who only reads."""
    clock = Clock()
    protocol, transport = peers.connection_of(
        CoroutineFactory(_read_all, reactor=clock)
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
def test_first_byte_timeout_counts_only_while_a_read_waits(handler: Any) -> None:
    """It does not count while no read waits, or the server sends now and then."""
    clock = Clock()
    protocol, transport = peers.connection_of(CoroutineFactory(handler, reactor=clock))
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
def test_first_byte_timeout_begins_after_the_handshake(
    reactor: Any,
    certificate: PrivateCertificate,
    logged: Logged,
    first_byte_timeout: float | None,
) -> None:
    """Before that, handshake_timeout counts, which may be None."""
    clock = Clock()

    async def main() -> None:
        limits: Any = {
            "handshake_timeout": None,
            "first_byte_timeout": first_byte_timeout,
        }
        server = await listen(reactor, _read_all, certificate, reactor=clock, **limits)
        with peers.socket_to(server) as plain:
            await until(lambda: server.factory.connections)
            clock.pump([LOOK] * 10)
            assert server.factory.connections
            await peers.secure_as_client(plain)
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
    with peers.unread_client(
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
    """As a handler that writes to many peers, and waits for none."""
    await peers.write_and_end(stream)
    while not stream.lost:
        await sleep(5)
        stream.write(b"news")


async def _write_as_generator_does(stream: Stream) -> None:
    @inlineCallbacks
    def write() -> Generator[Any, Any, None]:
        yield peers.write_much(stream)

    await write()


STUCK = [
    peers.write_and_wait,
    # The handler has returned, and the rest is to be sent before the end.
    peers.write_and_end,
    _send_file,
    _write_on_and_on,
    _write_as_generator_does,
]


@pytest.mark.parametrize("handler", STUCK)
def test_a_peer_that_does_not_read_is_aborted(
    reactor: Any, logged: Logged, handler: Any
) -> None:
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
def test_a_unix_peer_that_does_not_read_is_aborted(
    reactor: Any, logged: Logged, tmp_path: Path
) -> None:
    with stuck(reactor, peers.write_and_end, tmp_path / "socket") as (
        clock,
        factory,
        _,
    ):
        settle(reactor)
        pass_time(reactor, clock, WRITE + 3 * LOOK)
        spin(reactor, lambda: not factory.connections)
    assert len(lines(logged, "write_timeout")) == 1


def test_a_peer_that_sends_but_does_not_read_is_aborted(
    reactor: Any, logged: Logged
) -> None:
    """Its input is a sign of life, but its output stays blocked."""

    async def handler(stream: Stream) -> None:
        await peers.write_and_end(stream)
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


@pytest.mark.parametrize(
    "handler", [peers.write_and_wait, peers.write_and_end, _send_file]
)
def test_a_peer_that_reads_slowly_gets_everything(
    reactor: Any, logged: Logged, handler: Any
) -> None:
    """It takes many times the limit."""
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
    with stuck(reactor, peers.write_and_end, **options) as (clock, factory, _):
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


async def aborted_by_the_write_limit(clock: Clock, closed: Deferred[None]) -> None:
    """Let time pass: ``close`` is done when the peer has read nothing for the limit."""
    for _ in range(200):
        await sleep(0)
    await look(clock, WRITE // LOOK - 1)
    assert not closed.called
    await look_until(clock, lambda: closed.called)
    await closed


async def secure_and_do_not_read(
    plain: socket.socket, server: Server, clock: Clock
) -> None:
    """Do the handshake as a client; the connection lasts for the limit from then on."""
    await peers.secure_as_client(plain)
    for _ in range(100):
        await sleep(0)
    await look(clock, WRITE // LOOK - 1)
    assert server.factory.connections
    await look_until(clock, lambda: not server.factory.connections)


@pytest.mark.parametrize("late_handshake", [False, True])
@pytest.mark.parametrize("handler", [peers.write_and_wait, peers.write_and_end])
def test_a_tls_client_that_does_not_read_is_aborted(
    reactor: Any,
    certificate: PrivateCertificate,
    logged: Logged,
    limits_clock: Clock,
    handler: Any,
    late_handshake: bool,
) -> None:
    """
    It is aborted while the handler waits, or before close_notify is sent.  What was
    written before the handshake does not count: neither side can send it yet.
    """
    options: Any = {"idle_timeout": None, "reactor": limits_clock}
    if late_handshake:
        options.update(handshake_timeout=10 * WRITE, close_timeout=None)

    async def main() -> None:
        server = await listen(reactor, handler, certificate, **options)
        with peers.socket_to(server, receive_buffer=1 << 13) as plain:
            if late_handshake:
                await until(lambda: server.factory.connections)
                await look(limits_clock, 2 * WRITE // LOOK)
                assert server.factory.connections
            await secure_and_do_not_read(plain, server, limits_clock)
        await server.stop()

    run(reactor, main)
    assert len(lines(logged, "write_timeout")) == 1
    assert failures(logged) == []


def test_a_tls_server_that_does_not_read_is_aborted_after_close(
    reactor: Any, connecting: Any
) -> None:
    async def main() -> None:
        limits: Any = {"handshake_timeout": 10 * WRITE, "close_timeout": None}
        async with connecting(**limits) as (clock, stream, _, secure):
            # The kernel of the peer has acknowledged the beginning of the handshake.
            await until(lambda: not any(pending_of(stream)))
            # Much more than all buffers hold.
            stream.write(bytes(1 << 24))
            closed = stream.close()
            await look(clock, 2 * WRITE // LOOK)
            assert not closed.called
            await secure()
            await aborted_by_the_write_limit(clock, closed)

    run(reactor, main)


def test_a_connection_that_ends_at_once_does_not_end_the_limits(
    logged: Logged,
) -> None:
    """It ends in the first step of its handler, before the limits begin."""
    clock = Clock()
    streams: list[Stream] = []

    async def handler(stream: Stream) -> None:
        streams.append(stream)
        if len(streams) == 1:
            await stream.abort()
        await stream.read()

    factory = CoroutineFactory(handler, reactor=clock)
    _, transport = peers.connection_of(factory)
    assert transport.aborting
    clock.advance(FIRST_BYTE)
    _, transport = peers.connection_of(factory)
    assert FIRST_BYTE <= age(clock, transport) <= FIRST_BYTE + LOOK
    assert not clock.getDelayedCalls()


def test_a_transport_that_raises_does_not_end_the_limits_of_others(
    logged: Logged,
) -> None:
    clock = Clock()

    async def handler(stream: Stream) -> None:
        await stream.read()

    factory = CoroutineFactory(handler, reactor=clock)
    protocols = [peers.connection_of(factory) for _ in range(3)]
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


def test_write_timeout_of_a_transport_without_a_socket(logged: Logged) -> None:
    """It reports only that it has no room, and that it has room again."""
    clock = Clock()

    async def handler(stream: Stream) -> None:
        stream.pauseProducing()
        await stream.write(b"x")

    factory = CoroutineFactory(handler, reactor=clock)
    protocol, transport = peers.connection_of(factory)
    clock.pump([LOOK] * 5)
    protocol.stream.resumeProducing()
    assert transport.disconnecting
    protocol.stream.pauseProducing()
    assert WRITE - LOOK <= age(clock, transport) <= WRITE + 2 * LOOK
    assert len(lines(logged, "write_timeout")) == 1


# Clients


@pytest.mark.parametrize("file", [False, True])
def test_a_server_that_does_not_read_is_aborted_after_close(
    reactor: Any, maybe_certificate: Certificate, limits_clock: Clock, file: bool
) -> None:
    clock = limits_clock
    left = Event()

    async def handler(stream: Stream) -> None:
        await left.wait()

    async def main() -> None:
        server = await listen(reactor, handler, maybe_certificate)
        stream = await call(
            reactor, server, maybe_certificate, reactor=clock, close_timeout=None
        )
        async with await open_file(BIG_FILE[0], "rb") as opened:
            # Much more than all buffers hold.
            stream.write(bytes(1 << 24))
            if file:
                stream.send_file(opened)
            closed = stream.close()
            await aborted_by_the_write_limit(clock, closed)
        assert stream.lost
        left.set()
        await server.stop()
        clock.advance(0)

    run(reactor, main)


def test_a_client_with_nothing_to_send_closes_without_a_delayed_call(
    reactor: Any,
) -> None:
    """The kernel has acknowledged all output."""
    clock = Clock()

    async def main() -> None:
        server = await listen(reactor, _read_all)
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
def test_max_connections_auto_leaves_descriptors_free(
    reactor: Any, logged: Logged
) -> None:
    """Those of both servers, and of the clients, which are in this process."""

    async def main() -> None:
        servers = [
            await listen(reactor, _read_all, name=each) for each in ("one", "two")
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


def test_max_connections_none_does_not_look_at_descriptors(reactor: Any) -> None:
    """Only "auto" looks at them."""

    async def main() -> None:
        server = await listen(reactor, _read_all, max_connections=None)
        with few_descriptors(free=0):
            async with await call(reactor, server):
                await until(lambda: server.factory.connections)
        await server.stop()

    if sys.platform != "win32":
        run(reactor, main)


def _tcp(host: str, port: int = 5) -> Any:
    return (IPv6Address if ":" in host else IPv4Address)("TCP", host, port)


SAME_ADDRESS = [
    (_tcp("192.0.2.1"), _tcp("192.0.2.1", 6)),
    (_tcp("192.0.2.1"), _tcp("::ffff:192.0.2.1", 6)),
    (_tcp("2001:db8::1"), _tcp("2001:db8::ffff:0:0:1", 6)),
    (_tcp("fe80::1%eth0"), _tcp("fe80::1%eth0", 6)),
]
OTHER_ADDRESS = [
    (_tcp("192.0.2.1"), _tcp("192.0.2.2")),
    (_tcp("2001:db8:0:1::1"), _tcp("2001:db8:0:2::1")),
    (_tcp("::ffff:192.0.2.1"), _tcp("::ffff:192.0.2.2")),
    # All hosts of a link have this network.
    (_tcp("fe80::1%eth0"), _tcp("fe80::2%eth0")),
    (_tcp("::1"), _tcp("127.0.0.1")),
]


@pytest.mark.parametrize(("one", "other"), SAME_ADDRESS)
def test_addresses_that_count_as_one(one: Any, other: Any) -> None:
    assert network_of(one) == network_of(other) is not None


@pytest.mark.parametrize(("one", "other"), OTHER_ADDRESS)
def test_addresses_that_count_separately(one: Any, other: Any) -> None:
    assert network_of(one) != network_of(other)


@pytest.mark.parametrize("address", [None, UNIXAddress(None), UNIXAddress("/x")])
def test_no_limit_without_an_address(address: Any) -> None:
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
def test_max_connections_per_address(reactor: Any, logged: Logged) -> None:
    async def main() -> None:
        server = await listen(
            reactor,
            _read_all,
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
            _read_all,
            max_connections_per_address=1,
            reactor=reactor,
        )
        to = UNIXClientEndpoint(reactor, path)
        async with await connect(to), await connect(to):
            await until(lambda: len(server.factory.connections) == 2)
        await server.stop()

    run(reactor, main)


def test_a_handler_that_outlives_its_connection_counts(logged: Logged) -> None:
    """It holds memory as well; and its end is not counted twice."""
    end = Event()

    async def handler(stream: Stream) -> None:
        await end.wait()

    clock = Clock()
    factory = CoroutineFactory(handler, max_connections_per_address=1, reactor=clock)

    def made() -> tuple[Any, peers.AbortableTransport]:
        return peers.connection_of(factory, IPv4Address("TCP", "192.0.2.1", 1))

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
    factory = CoroutineFactory(_read_all, name="it", max_connections=1, reactor=clock)
    _, first = peers.connection_of(factory)

    def knock(times: int) -> None:
        for _ in range(times):
            assert peers.connection_of(factory)[1].aborting

    knock(100)
    (line,) = lines(logged, "max_connections")
    assert line.endswith("it has 1 connections (max_connections)")
    assert {each["log_level"] for each in logged if "why" in each} == {LogLevel.warn}
    clock.pump([LOOK] * 3)
    knock(100)
    assert len(lines(logged, "max_connections")) == 1
    clock.pump([LOOK] * 2)
    assert first.aborting
    _, first = peers.connection_of(factory)
    knock(3)
    *_, line = lines(logged, "max_connections")
    assert line.endswith("(max_connections) (199 more since the last such message)")
    assert len(lines(logged, "max_connections")) == 2
    # A clock that is set back silences nothing.
    clock.rightNow = 0
    knock(1)
    assert len(lines(logged, "max_connections")) == 3


def test_many_silent_peers_make_one_line(logged: Logged) -> None:
    """There are more connections than are checked in one turn of the reactor."""
    clock = Clock()
    factory = CoroutineFactory(_read_all, max_connections=None, reactor=clock)
    transports = [peers.connection_of(factory)[1] for _ in range(1200)]
    clock.pump([LOOK] * (FIRST_BYTE // LOOK + 1))
    assert all(each.aborting for each in transports)
    assert not factory.connections
    assert not clock.getDelayedCalls()
    assert len([each for each in logged if each["log_namespace"] in _SERVING]) == 1


def test_checks_of_many_connections_are_spread_over_turns(logged: Logged) -> None:
    """So other work has its turn in between."""
    clock = Clock()
    factory = CoroutineFactory(_push, max_connections=None, reactor=clock)
    protocols = [peers.connection_of(factory)[0] for _ in range(1200)]
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


def test_many_handshake_timeouts_make_one_line(
    reactor: Any, certificate: PrivateCertificate, logged: Logged
) -> None:
    clock = Clock()

    async def main() -> None:
        server = await listen(reactor, _read_all, certificate, reactor=clock)
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(peers.socket_to(server))
            await until(lambda: len(server.factory.connections) == 5)
            clock.advance(30)
            await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)
    (line,) = lines(logged, "handshake_timeout")
    assert "no handshake within 30.0 s" in line
    assert len([each for each in logged if each["log_namespace"] in _SERVING]) == 1
