"""The life of a handler is bound to its connection; limits; graceful stops."""

from __future__ import annotations

import contextlib
import gc
import re
import socket
import sys
import time
import weakref
from collections.abc import AsyncIterator, Generator
from typing import Any

import pytest
from twisted.application.internet import StreamServerEndpointService
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    UNIXClientEndpoint,
    UNIXServerEndpoint,
    wrapClientTLS,
)
from twisted.internet.error import (
    ConnectError,
    ConnectionAborted,
    ConnectionClosed,
    ConnectionDone,
    ConnectionLost,
)
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.ssl import PrivateCertificate, optionsForClientTLS
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.python.failure import Failure

from tests.coro.peers import (
    AbortableTransport,
    connection_of,
    read_slowly,
    secure_as_client,
    socket_to,
    unread_client,
    write_and_end,
    write_and_wait,
)
from tests.coro.support import (
    Certificate,
    Logged,
    call,
    client_endpoint,
    connected,
    failures,
    listen,
    run,
    run_for_real,
    spin,
    tls_endpoint,
    until,
)
from tests.support import DEADLINE, ON_PYPY
from twisted_rtsig.coro import (
    Cancelled,
    CoroutineFactory,
    DelimiterNotFound,
    Event,
    IncompleteRead,
    Server,
    Stopped,
    Stream,
    StreamError,
    Task,
    TaskGroup,
    UnreadPlaintext,
    connect,
    coroutine,
    open_process,
    select,
    serve,
    shield,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.output import unread_input
from twisted_rtsig.coro.testing import SansIO, stream_pair
from twisted_rtsig.coro.tracebacks import causes

# Twisted and pyOpenSSL hold different opinions on what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


async def _until_told(stream: Stream) -> None:
    """A handler that obeys a word of each line."""
    async for word in stream.lines():
        if word == b"return":
            return
        if word == b"raise":
            raise KeyError("told so")
        await stream.write(b"not that\n")


# The end of a handler


def test_a_handler_that_returns(reactor: Any, logged: Logged) -> None:
    async def main() -> None:
        server = await listen(reactor, _until_told)
        async with await call(reactor, server) as stream:
            await stream.write(b"what?\nreturn\n")
            assert await stream.read_exactly(9) == b"not that\n"
            assert await stream.read() == b""
        await server.stop()
        assert not server.factory.connections

    run(reactor, main)
    assert failures(logged) == []


def failure_of(
    reactor: Any, logged: Logged, handler: Any, line: bytes, **options: Any
) -> BaseException:
    """The logged error of a handler that fails after it has read a line."""

    async def main() -> None:
        server = await listen(reactor, handler, **options)
        async with await call(reactor, server) as stream:
            with contextlib.suppress(ConnectionClosed):
                await stream.write(line)
            with pytest.raises(ConnectionClosed):
                await stream.read()
        await server.stop(60)

    run(reactor, main)
    [failure] = failures(logged)
    assert failure.value is not None
    return failure.value


def test_a_handler_that_raises(reactor: Any, logged: Logged) -> None:
    error = failure_of(reactor, logged, _until_told, b"raise\n", name="Frederick")
    assert isinstance(error, KeyError)
    [event] = [each for each in logged if each.get("log_failure")]
    assert event["name"] == "Frederick"
    assert "in _until_told" in event["log_failure"].getTraceback()


def test_a_group_is_logged_once_with_all_its_errors(
    reactor: Any, logged: Logged
) -> None:
    error = failure_of(reactor, logged, _in_a_group, b"raise\n")
    assert [type(each) for each in causes(error)] == [KeyError]


def test_a_generator_that_raises(reactor: Any, logged: Logged) -> None:
    error = failure_of(reactor, logged, _asks_as_generator, b"\n")
    assert isinstance(error, KeyError)


def test_a_handler_without_a_parameter(reactor: Any, logged: Logged) -> None:
    async def handler() -> None:
        """It forgets the argument."""

    error = failure_of(reactor, logged, handler, b"\n")
    assert "takes 0 positional arguments" in str(error)


async def _asks(stream: Stream) -> None:
    await _fails(stream)


async def _fails(stream: Stream) -> None:
    await stream.read_line()
    raise KeyError("told so")


def _asks_as_generator(stream: Stream) -> Generator[Any, Any, None]:
    yield from _fails_as_generator(stream)


def _fails_as_generator(stream: Stream) -> Generator[Any, Any, None]:
    yield stream.read_line()
    raise KeyError("told so")


@inlineCallbacks
def _calls_inline_callbacks(stream: Stream) -> Generator[Any, Any, None]:
    yield inlineCallbacks(_asks_as_generator)(stream)


def _calls_a_coroutine(stream: Stream) -> Generator[Any, Any, None]:
    yield coroutine(_asks_as_generator)(stream)


async def _awaits_a_task(stream: Stream) -> None:
    await spawn(_asks, stream)


@pytest.mark.parametrize(
    ("handler", "stack"),
    [
        (_asks, ["_asks", "_fails"]),
        (_asks_as_generator, ["_asks_as_generator", "_fails_as_generator"]),
        (
            coroutine(_asks_as_generator),
            ["_asks_as_generator", "_fails_as_generator"],
        ),
        (
            _calls_inline_callbacks,
            ["_calls_inline_callbacks", "_asks_as_generator", "_fails_as_generator"],
        ),
        (
            _calls_a_coroutine,
            ["_calls_a_coroutine", "_asks_as_generator", "_fails_as_generator"],
        ),
        (lambda stream: Deferred.fromCoroutine(_asks(stream)), ["_asks", "_fails"]),
        (_awaits_a_task, ["_awaits_a_task", "_asks", "_fails"]),
    ],
)
def test_the_stack_of_a_handler_that_fails(
    logged: Logged, handler: Any, stack: list[str]
) -> None:
    """In every style it shows the lines of the user's code, in order, and no others."""
    protocol, transport = connection_of(CoroutineFactory(handler, reactor=Clock()))
    protocol.dataReceived(b"\n")
    assert transport.aborting
    [failure] = failures(logged)
    # Before this line, older Twisteds print the caller, which is one of the functions.
    _, _, trace = failure.getTraceback().rpartition("<exception caught here>")
    assert re.findall(r'File ".*", line [0-9]+, in (\S+)', trace) == stack


async def _in_a_group(stream: Stream) -> None:
    async with TaskGroup() as group:
        group.spawn(_until_told, stream)


@pytest.mark.parametrize("handler", [_until_told, _in_a_group])
def test_a_peer_that_leaves_is_not_logged_as_a_failure(
    reactor: Any, logged: Logged, handler: Any
) -> None:
    async def main() -> None:
        server = await listen(reactor, handler, name="Frederick")
        stream = await call(reactor, server)
        await stream.write(b"half a l")
        await stream.close()
        await server.factory.stop(10)
        await server.stop()

    run(reactor, main)
    assert failures(logged) == []
    assert [each for each in logged if each.get("name") == "Frederick"]


def test_a_failure_beside_that_of_the_peer_is_logged(logged: Logged) -> None:
    async def handler(stream: Stream) -> None:
        async def fails() -> None:
            try:
                await Event().wait()
            finally:
                raise KeyError("mine")

        async with TaskGroup() as group:
            group.spawn(fails)
            await stream.read_line()

    protocol, transport = connection_of(CoroutineFactory(handler, reactor=Clock()))
    protocol.dataReceived(b"half a l")
    protocol.readConnectionLost()
    assert transport.aborting
    [failure] = failures(logged)
    assert {type(each) for each in causes(failure.value)} == {IncompleteRead, KeyError}


def test_a_handler_may_go_on_without_its_connection(reactor: Any) -> None:
    ended: Deferred[str] = Deferred()

    async def handler(stream: Stream) -> None:
        try:
            while True:
                await stream.write(bytes(1000))
        except ConnectionClosed:
            await sleep(0)
        ended.callback("cleaned up")

    async def main() -> str:
        server = await listen(reactor, handler)
        await (await call(reactor, server)).abort()
        assert server.factory.connections
        result = await ended
        await server.stop()
        return result

    assert run(reactor, main) == "cleaned up"


def test_a_loss_cancels_the_handler_on_request(reactor: Any, logged: Logged) -> None:
    seen: Deferred[str] = Deferred()

    async def handler(stream: Stream) -> None:
        try:
            await Deferred()
        except Cancelled:
            seen.callback("cancelled")
            raise

    async def main() -> str:
        server = await listen(reactor, handler, cancel_on_loss=True)
        await (await call(reactor, server)).close()
        result = await seen
        await server.stop()
        return result

    assert run(reactor, main) == "cancelled"
    assert failures(logged) == []


# Stopping


def test_stop_lets_handlers_finish(reactor: Any) -> None:
    async def main() -> None:
        server = await listen(reactor, _until_told)
        stream = await call(reactor, server)
        await stream.write(b"what?\n")
        await stream.read_line()
        endpoint = client_endpoint(reactor, server)
        stopping = spawn(lambda: server.stop(60))
        await sleep(0)
        with pytest.raises(ConnectError):
            await connect(endpoint)
        assert not stopping.done
        await stream.write(b"what?\nreturn\n")
        assert await stream.read_line() == b"not that"
        await stream.close()
        await stopping

    run(reactor, main)


def test_stop_cancels_handlers_that_do_not_finish(reactor: Any, logged: Logged) -> None:
    async def main() -> None:
        server = await listen(reactor, _until_told)
        stream = await call(reactor, server)
        await stream.write(b"what?\n")
        await stream.read_line()
        await server.stop(0.01)
        with pytest.raises(ConnectionClosed):
            await stream.read()

    run(reactor, main)
    assert failures(logged) == []


def test_stop_does_not_wait_for_a_peer_that_does_not_read(reactor: Any) -> None:
    async def handler(stream: Stream) -> None:
        stream.write(bytes(1 << 24))

    async def main() -> None:
        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            stream.transport.pauseProducing()
            while not server.factory.connections:
                await sleep(0)
            await server.stop(0.01)

    run(reactor, main)


def test_a_second_stop_can_shorten_the_grace(reactor: Any) -> None:
    """As a second Ctrl-C does."""

    async def main() -> None:
        server = await listen(reactor, _until_told)
        async with await call(reactor, server) as stream:
            await stream.write(b"what?\n")
            await stream.read_line()
            first = spawn(lambda: server.stop(60))
            await sleep(0)
            await server.stop(0.01)
            await first

    run(reactor, main)


def test_a_cancelled_handler_can_still_write(reactor: Any) -> None:
    async def handler(stream: Stream) -> None:
        try:
            await stream.read()
        except Cancelled:
            await stream.write(b"bye")
            await stream.close()
            raise

    async def main() -> bytes:
        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            while not server.factory.connections:
                await sleep(0)
            stopping = server.stop()
            farewell = await stream.read()
            await stopping
        return farewell

    assert run(reactor, main) == b"bye"


def test_a_factory_that_stops_refuses_new_connections(logged: Logged) -> None:
    """The endpoint may still listen, as the endpoint of a service does."""
    clock = Clock()
    factory = CoroutineFactory(_echo, reactor=clock)
    protocol, transport = connection_of(factory)
    stopped = factory.stop(60)
    _, refused = connection_of(factory)
    assert refused.aborting
    assert not transport.aborting
    assert not stopped.called
    protocol.dataReceived(b"x\n")
    protocol.connectionLost(Failure(ConnectionDone()))
    assert stopped.called
    assert transport.value() == b"x"
    assert not clock.getDelayedCalls()
    assert any("stops" in str(each.get("why")) for each in logged)


def test_a_service(reactor: Any) -> None:
    """As twistd runs it."""
    endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    factory = CoroutineFactory(_until_told, reactor=reactor)
    service = StreamServerEndpointService(endpoint, factory)
    service.startService()
    port: Any = service._waitingForPort.result  # type: ignore[union-attr]

    async def main() -> bytes:
        async with await call(reactor, Server(port, factory)) as stream:
            await stream.write(b"what?\n")
            answer = await stream.read_line()
        await service.stopService()
        await factory.stop(60)
        return answer

    assert run(reactor, main) == b"not that"


# Handlers that go on when they are cancelled, until an event happens.


async def _stubborn(stream: Stream, end: Event) -> None:
    await stream.write(b"here")
    while not end.is_set:
        with contextlib.suppress(Cancelled, CancelledError):
            await end.wait()


def _stubborn_generator(stream: Stream, end: Event) -> Generator[Any, Any, None]:
    yield stream.write(b"here")
    while not end.is_set:
        with contextlib.suppress(Cancelled, CancelledError):
            yield end.wait()


async def _shielded(stream: Stream, end: Event) -> None:
    await stream.write(b"here")
    with shield():
        await end.wait()


@pytest.mark.parametrize(
    "handler",
    [
        _stubborn,
        _shielded,
        _stubborn_generator,
        coroutine(_stubborn_generator),
        inlineCallbacks(_stubborn_generator),
        lambda *args: Deferred.fromCoroutine(_stubborn(*args)),
    ],
)
def test_stop_does_not_wait_for_ever_for_a_cancelled_handler(
    reactor: Any, logged: Logged, handler: Any
) -> None:
    end = Event()

    async def main() -> None:
        name = "Frederick"
        server = await listen(reactor, lambda stream: handler(stream, end), name=name)
        stream = await call(reactor, server)
        assert await stream.read_exactly(4) == b"here"
        await server.stop(0.01, 0.01)
        assert not server.factory.connections
        with pytest.raises(ConnectionClosed):
            await stream.read()
        end.set()

    run(reactor, main)
    assert failures(logged) == []
    [event] = [each for each in logged if "handlers" in each]
    assert event["log_level"] is LogLevel.warn
    assert event["count"] == 1
    assert re.match(r"Frederick: [0-9.]+ s, waits for ", event["handlers"])


def test_stop_aborts_what_a_cancelled_handler_writes(
    reactor: Any, certificate: PrivateCertificate, logged: Logged
) -> None:
    """To a peer that does not read, plain and over TLS."""

    async def handler(stream: Stream) -> None:
        await stream.write(b"here")
        try:
            await Event().wait()
        finally:
            await stream.write(bytes(1 << 24))

    async def main() -> None:
        trusted = optionsForClientTLS("127.0.0.1", certificate)
        for tls in (False, True):
            if tls:
                endpoint = tls_endpoint(reactor, certificate)
                server = await serve(endpoint, handler, reactor=reactor)
                client = wrapClientTLS(trusted, client_endpoint(reactor, server))
                stream = await connect(client)
            else:
                server = await listen(reactor, handler)
                stream = await call(reactor, server)
            assert await stream.read_exactly(4) == b"here"
            await server.stop(0.01, 0.05)
            assert not server.factory.connections
            await stream.abort()

    run(reactor, main)
    assert failures(logged) == []
    assert not [each for each in logged if "handlers" in each]


def test_a_shorter_stop_ends_the_one_before(reactor: Any, logged: Logged) -> None:
    end = Event()

    async def main() -> None:
        server = await listen(reactor, lambda stream: _stubborn(stream, end))
        stream = await call(reactor, server)
        await stream.read_exactly(4)
        first = spawn(lambda: server.stop(60))
        await sleep(0)
        await server.stop(0, 0)
        await first
        end.set()
        await stream.abort()

    run(reactor, main)
    assert failures(logged) == []


def test_each_stop_counts_what_another_one_has_cancelled(reactor: Any) -> None:
    async def main() -> list[Stopped]:
        server = await listen(reactor, _echo)
        async with await call(reactor, server) as stream:
            await stream.write(b"x\n")
            await stream.read()
            slow = server.stop(3600)
            return [await server.stop(0), await slow]

    assert run(reactor, main) == [Stopped(0, 1, 0)] * 2


@pytest.mark.parametrize("again", ["stop", "loss"])
def test_a_handler_is_cancelled_once(again: str) -> None:
    clock = Clock()
    seen: list[str] = []

    async def handler(stream: Stream) -> None:
        try:
            await Event().wait()
        finally:
            seen.append("cleans up")
            await sleep(5)
            seen.append("is clean")

    factory = CoroutineFactory(handler, cancel_on_loss=True, reactor=clock)
    protocol, _ = connection_of(factory)
    first = factory.stop(1, 60)
    second = factory.stop(0, 60)
    clock.advance(0)
    assert seen == ["cleans up"]
    if again == "loss":
        protocol.connectionLost()
    clock.pump([1] * 10)
    assert seen == ["cleans up", "is clean"]
    if again == "stop":
        protocol.connectionLost()
    clock.advance(0)
    assert first.called
    assert second.called


def test_many_handlers_that_do_not_end_are_logged_in_one_line(logged: Logged) -> None:
    clock = Clock()
    end = Event()
    factory = CoroutineFactory(lambda stream: _shielded(stream, end), reactor=clock)
    transports = [connection_of(factory)[1] for _ in range(25)]
    stopped = factory.stop(60, 30)
    clock.advance(60)
    assert not any(each.aborting for each in transports)
    clock.advance(29)
    assert not any(each.aborting for each in transports)
    clock.advance(1)
    assert all(each.aborting for each in transports)
    clock.pump([0] * 20)
    assert stopped.called
    assert not clock.getDelayedCalls()
    [event] = [each for each in logged if "handlers" in each]
    assert event["count"] == 25
    assert event["handlers"].count("_shielded: ") == 20
    assert event["handlers"].endswith("and 5 more")
    end.set()


@pytest.mark.parametrize("times", [(-1,), (0, -1), (float("nan"),)])
def test_stop_refuses_bad_times(times: tuple[float, ...]) -> None:
    factory = CoroutineFactory(_echo, reactor=Clock())
    with pytest.raises(ValueError, match="0 is the least"):
        factory.stop(*times)
    assert not factory.stopping.is_set


# Handlers that learn of the stop


async def _until_stopping(stream: Stream) -> None:
    await stream.write(b"hello\n")
    while (line := await _line_unless_stopping(stream)) is not None:
        await stream.write(line)
    await stream.write(b"bye\n")


async def _line_unless_stopping(stream: Stream) -> bytes | None:
    reading = stream.read_line()
    chosen, line = await select(reading, stream.stopping)
    if chosen is stream.stopping:
        reading.cancel()
    return line


def _generator_until_stopping(stream: Stream) -> Generator[Any, Any, None]:
    yield stream.write(b"hello\n")
    while True:
        reading = stream.read_line()
        chosen, line = yield select(reading, stream.stopping)
        if chosen is stream.stopping:
            reading.cancel()
            yield stream.write(b"bye\n")
            return
        yield stream.write(line)


async def _lines_until_stopping(stream: Stream) -> None:
    await stream.write(b"hello\n")
    async for line in stream.lines(until=stream.stopping):
        await stream.write(line)
    await stream.write(b"bye\n")


@pytest.mark.parametrize(
    "handler",
    [
        _until_stopping,
        _lines_until_stopping,
        _generator_until_stopping,
        coroutine(_generator_until_stopping),
        inlineCallbacks(_generator_until_stopping),
        lambda stream: Deferred.fromCoroutine(_until_stopping(stream)),
        lambda stream: Deferred.fromCoroutine(_lines_until_stopping(stream)),
    ],
)
def test_an_idle_connection_does_not_delay_stop(
    reactor: Any, maybe_certificate: Certificate, logged: Logged, handler: Any
) -> None:
    async def main() -> None:
        server = await listen(reactor, handler, maybe_certificate)
        stream = await call(reactor, server, maybe_certificate)
        assert await stream.read_line() == b"hello"
        await stream.write(b"x\n")
        assert await stream.read_exactly(1) == b"x"
        assert not server.stopping.is_set
        stopped = server.stop(3600)
        assert server.stopping.is_set
        assert await stream.read_line() == b"bye"
        assert await stream.read() == b""
        await stream.close()
        await stopped

    run(reactor, main)
    gc.collect()
    assert failures(logged) == []


def test_stream_stopping_is_the_event_of_its_server() -> None:
    """A client has an event of its own, which is never set."""
    clock = Clock()
    factory = CoroutineFactory(_echo, reactor=clock)
    protocol, transport = connection_of(factory)
    assert protocol.stream.stopping is factory.stopping
    transport.loseConnection()
    one, other = stream_pair(reactor=clock)
    assert one.stopping is one.stopping is not other.stopping
    assert not one.stopping.is_set


def test_lines_until_an_event() -> None:
    """Complete lines are still delivered then; the rest can be read."""
    got: list[bytes] = []
    over = Event()
    over_in_a_line = Event()

    async def handler(stream: Stream) -> None:
        async for line in stream.lines(until=over):
            got.append(line)
            if line == b"two":
                over.set()
        got.append(await stream.read())
        # It has happened already.
        async for _ in stream.lines(until=over):
            raise AssertionError
        async for line in stream.lines(until=over_in_a_line):
            got.append(line)
        got.append(await stream.read())

    conversation = SansIO(handler)
    conversation.feed(b"one\ntwo\nthree\nfour")
    assert got == [b"one", b"two", b"three", b"four"]
    conversation.feed(b"five\nhalf a l")
    over_in_a_line.set()
    conversation.advance(0)
    conversation.advance(0)
    conversation.result()
    assert got[4:] == [b"five", b"half a l"]


@pytest.mark.parametrize("greeted", [False, True])
def test_data_sent_before_the_stop_is_answered(reactor: Any, greeted: bool) -> None:
    """
    Also if only the kernel has the data so far, or even the connection.
    """

    async def main() -> bytes:
        server = await listen(reactor, _lines_until_stopping)
        address = server.port.getHost().host, server.port.getHost().port
        with socket.create_connection(address, DEADLINE) as client:
            while greeted and not server.factory.connections:
                await sleep(0)
            client.sendall(b"one\ntwo\nhalf a l")
            await server.stop(3600)
            return client.makefile("rb").read()

    assert run(reactor, main) == b"hello\nonetwobye\n"


# More than a reactor reads in two turns, and less than kernels hold.
_MANY_LINES = [b"%07d" % number for number in range(24 * 1024)]
_MANY_BYTES = b"".join(line + b"\n" for line in _MANY_LINES)


def _counting(got: list[bytes]) -> Any:
    async def handler(stream: Stream) -> None:
        await stream.write(b"hello\n")
        async for line in stream.lines(until=stream.stopping):
            got.append(line)

    return handler


def _wait_until_received(transport: Any, size: int) -> None:
    """The kernel delivers without a turn of the reactor."""
    end = time.monotonic() + DEADLINE
    while (unread_input(transport) or 0) < size:
        assert time.monotonic() < end, "it was not received"
        time.sleep(0.001)


def test_much_data_sent_before_the_stop_is_answered(
    reactor: Any, maybe_certificate: Certificate
) -> None:
    got: list[bytes] = []

    async def main() -> None:
        server = await listen(reactor, _counting(got), maybe_certificate)
        port: Any = server.port
        port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        with socket_to(server) as plain:
            peer = await secure_as_client(plain) if maybe_certificate else None
            if peer is not None:
                assert await peer.read() == b"hello\n"
            else:
                await until(lambda: server.factory.connections)
            [connection] = server.factory.connections
            # No turn of the reactor from here on.
            if peer is not None:
                for start in range(0, len(_MANY_BYTES), 1 << 14):
                    await peer.write(_MANY_BYTES[start : start + (1 << 14)])
                await peer.write(b"half a l")
            else:
                plain.sendall(_MANY_BYTES + b"half a l")
            _wait_until_received(connection.stream.transport, len(_MANY_BYTES) + 8)
            stopped = server.stop(3600)
            if peer is not None:
                assert await peer.read() == b""
                await peer.close_notify()
            await stopped

    run(reactor, main)
    assert got == _MANY_LINES


def test_lines_that_a_process_wrote_before_the_event_are_read(reactor: Any) -> None:
    """A pipe holds 64 KiB, of which Twisted reads 8 KiB in a turn."""
    got: list[bytes] = []
    lines = _MANY_LINES[:7000]
    program = (
        f"import sys; sys.stdout.write({_MANY_BYTES[: 8 * len(lines)].decode()!r} + "
        "'half a l'); sys.stdout.flush(); sys.stdin.read()"
    )

    async def main() -> None:
        over = Event()
        over.set()
        process = open_process([sys.executable, "-c", program], reactor=reactor)
        async with process:
            stream = process.stream
            _wait_until_received(stream.transport, 8 * len(lines) + 8)
            got.extend([line async for line in stream.lines(until=over)])
            assert await stream.read() == b"half a l"

    run_for_real(reactor, main)
    assert got == lines


def test_a_peer_that_goes_on_sending_does_not_hold_up_a_stop(
    reactor: Any, maybe_certificate: Certificate
) -> None:
    line = b"a line\n"
    got: list[bytes] = []

    async def main() -> None:
        server = await listen(reactor, _counting(got), maybe_certificate)
        client = await call(reactor, server, maybe_certificate)

        async def go_on_sending() -> None:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await client.write(line * 1000)
                    await sleep(0)

        sending = spawn(go_on_sending)
        await until(lambda: len(got) > 1000)
        stopped = server.stop(3600)
        await sending
        await stopped

    run(reactor, main)
    assert set(got) == {b"a line"}


def test_a_transport_that_is_paused_does_not_hold_up_a_stop(reactor: Any) -> None:
    """As a protocol between it and the stream may do, to limit the rate."""
    got: list[bytes] = []

    async def main() -> None:
        server = await listen(reactor, _counting(got))
        with socket_to(server) as peer:
            await until(lambda: server.factory.connections)
            [connection] = server.factory.connections
            connection.stream.transport.pauseProducing()
            peer.sendall(b"a line\n")
            await server.stop(3600)

    run(reactor, main)
    assert got == []


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_until_an_event_keep_their_limit(end: bytes) -> None:
    """A line of just so many bytes, whatever ends it; and one byte more."""
    got: list[bytes] = []
    over = Event()

    async def handler(stream: Stream) -> None:
        async for line in stream.lines(5, until=over):
            got.append(line)
            over.set()

    conversation = SansIO(handler)
    conversation.feed(b"one" + end + b"12345" + end + b"two" + end)
    conversation.result()
    assert got == [b"one", b"12345", b"two"]
    over = Event()
    conversation = SansIO(handler)
    conversation.feed(b"three" + end + b"123456" + end + b"two" + end)
    with pytest.raises(DelimiterNotFound):
        conversation.result()
    assert got[3:] == [b"three"]


def test_an_incomplete_line_at_the_stop_can_be_read(reactor: Any) -> None:
    """Also if the peer has ended its output right after it."""
    got: list[bytes] = []

    async def handler(stream: Stream) -> None:
        async for line in stream.lines(until=stream.stopping):
            got.append(line)
        got.append(await stream.read())
        assert await stream.read() == b""

    async def main() -> None:
        server = await listen(reactor, handler)
        with socket_to(server) as client:
            await until(lambda: server.factory.connections)
            client.sendall(b"one\ntwo\nhalf a l")
            client.shutdown(socket.SHUT_WR)
            await server.stop(3600)

    run(reactor, main)
    assert got == [b"one", b"two", b"half a l"]


def test_cancelled_lines_leave_no_read_pending() -> None:
    got: list[bytes] = []

    async def handler(stream: Stream) -> None:
        with contextlib.suppress(TimeoutError), timeout(5):
            async for line in stream.lines(until=stream.stopping):
                got.append(line)
        got.append(await stream.read())

    conversation = SansIO(handler)
    conversation.feed(b"one\nha")
    conversation.advance(5)
    conversation.feed(b"lf")
    conversation.result()
    assert got == [b"one", b"ha"]


def test_a_read_left_pending_logs_nothing(reactor: Any, logged: Logged) -> None:
    """The handler was cancelled, has returned, or has timed out."""

    async def handler(stream: Stream) -> None:
        how = await stream.read_line()
        with contextlib.suppress(TimeoutError), timeout(0.01 if how == b"t" else 60):
            await select(stream.read_line(), stream.stopping)

    async def main() -> None:
        server = await listen(reactor, handler)
        streams = [await call(reactor, server) for _ in range(3)]
        for how, stream in zip((b"c", b"r", b"t"), streams, strict=True):
            await stream.write(how + b"\n")
        # The one that was timed out ends, and leaves its read.
        assert await streams[2].read() == b""
        # Cancelled in the select, since this does not set stopping.
        next(iter(server.factory.connections)).cancel("")
        with pytest.raises(ConnectionClosed):
            await streams[0].read()
        await server.stop(60)
        for stream in streams:
            await stream.abort()

    run(reactor, main)
    gc.collect()
    assert failures(logged) == []


# Limits


def test_max_connections(reactor: Any) -> None:
    async def main() -> None:
        server = await listen(reactor, _until_told, max_connections=1)
        first = await call(reactor, server)
        await first.write(b"what?\n")
        await first.read_line()
        async with await call(reactor, server) as second:
            with pytest.raises(ConnectionClosed):
                await second.read()
        await first.write(b"return\n")
        assert await first.read() == b""
        await first.close()
        while server.factory.connections:
            await sleep(0)
        async with await call(reactor, server) as third:
            await third.write(b"what?\n")
            await third.read_line()
        await server.stop()

    run(reactor, main)


@pytest.mark.parametrize("limit", [1, 1.5])
def test_lowering_max_connections(limit: Any) -> None:
    clock = Clock()
    factory = CoroutineFactory(_echo, max_connections=3, reactor=clock)
    protocols = [connection_of(factory)[0] for _ in range(3)]
    factory.max_connections = limit
    assert connection_of(factory)[1].aborting
    for each in protocols[:2]:
        assert connection_of(factory)[1].aborting
        each.connectionLost(Failure(ConnectionAborted()))
    # One is left.
    assert connection_of(factory)[1].aborting is (limit == 1)
    assert connection_of(factory)[1].aborting


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_connections": -1},
        {"max_connections": "all"},
        {"max_connections_per_address": 0},
        {"max_connections_per_address": 11, "max_connections": 10},
        {"first_byte_timeout": 0},
        {"write_timeout": -1},
        {"idle_timeout": 0},
        {"read_timeout": -1},
        {"handshake_timeout": 0},
        {"close_timeout": 0},
    ],
)
def test_bad_limits_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CoroutineFactory(_until_told, **wrong)


def test_serve_refuses_a_handler_that_is_not_callable() -> None:
    with pytest.raises(TypeError, match="function of a stream"):
        CoroutineFactory(5)  # type: ignore[arg-type]


async def _echo(stream: Stream) -> None:
    async for line in stream.lines():
        await stream.write(line)


class _Fragile(AbortableTransport):
    """A transport that loses its connection in each call."""

    def write(self, data: bytes) -> None:
        self.protocol.stream.pauseProducing()
        self.abortConnection()

    def startTLS(self, context: object) -> None:
        self.abortConnection()


def _start_tls(stream: Stream) -> Any:
    return stream.start_tls(None)


def _write_something(stream: Stream) -> Any:
    return stream.write(b"something")


@pytest.mark.parametrize("method", [_write_something, _start_tls])
def test_a_connection_lost_in_the_first_step_of_its_handler(method: Any) -> None:
    """The operation that loses it fails, and no time limit stays scheduled."""
    clock = Clock()
    got: list[Exception] = []

    async def handler(stream: Stream) -> None:
        try:
            await method(stream)
        except ConnectionAborted as error:
            got.append(error)

    factory = CoroutineFactory(handler, reactor=clock)
    protocol: Any = factory.buildProtocol(None)
    transport = _Fragile()
    transport.protocol = protocol
    protocol.makeConnection(transport)
    assert len(got) == 1
    assert not factory.connections
    assert not clock.getDelayedCalls()


def test_idle_timeout(logged: Logged) -> None:
    clock = Clock()
    factory = CoroutineFactory(
        _echo, first_byte_timeout=None, idle_timeout=60, reactor=clock
    )
    busy, _ = connection_of(factory)
    _, transport = connection_of(factory)
    for _ in range(40):
        clock.advance(5)
        busy.dataReceived(b"x\n")
        if transport.aborting:
            break
    assert 60 <= clock.seconds() <= 75
    assert transport.aborting
    assert list(factory.connections) == [busy]
    assert any("idle_timeout" in str(each.get("error")) for each in logged)
    busy.connectionLost(Failure(ConnectionAborted()))
    clock.advance(60)
    assert not clock.getDelayedCalls()
    assert failures(logged) == []


def test_output_that_is_sent_resets_the_idle_timeout() -> None:
    async def write_now_and_then(stream: Stream) -> None:
        for _ in range(10):
            await sleep(40)
            await stream.write(b"x")

    async def write_once(stream: Stream) -> None:
        stream.pauseProducing()
        await stream.write(b"x")
        await Event().wait()

    clock = Clock()
    factory = CoroutineFactory(write_now_and_then, idle_timeout=60, reactor=clock)
    _, transport = connection_of(factory)
    clock.pump([5] * 80)
    assert not transport.aborting
    assert transport.value() == b"x" * 10
    assert transport.disconnecting

    clock = Clock()
    factory = CoroutineFactory(write_once, idle_timeout=60, reactor=clock)
    protocol, transport = connection_of(factory)
    clock.pump([5] * 10)
    # The peer has taken it.
    protocol.stream.resumeProducing()
    clock.pump([5] * 11)
    assert not transport.aborting
    clock.pump([5] * 4)
    assert transport.aborting


@pytest.mark.parametrize("handler", [write_and_wait, write_and_end])
def test_a_peer_that_reads_slowly_is_not_idle(
    reactor: Any, clock: Clock, handler: Any
) -> None:
    """The server has written much at once, of which a little goes now and then."""
    with unread_client(reactor, clock, handler) as (_, client):
        for _ in read_slowly(reactor, client, 1 << 22, 1 << 16):
            clock.advance(5)


def test_a_peer_that_does_not_read_is_idle(reactor: Any, clock: Clock) -> None:
    with unread_client(reactor, clock, write_and_wait) as (factory, _):
        # What the kernel takes goes soon.
        for _ in range(100):
            reactor.iterate(0)
        clock.pump([5] * 20)
        spin(reactor, lambda: not factory.connections)


async def write_and_read(stream: Stream) -> None:
    # What fits into the buffer of the socket.
    transport: Any = stream.transport
    transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
    await stream.write(bytes(1 << 18))
    await stream.read()


@pytest.mark.skipif(
    not sys.platform.startswith(("linux", "darwin", "freebsd", "netbsd")),
    reason="the kernel does not tell what the peer has acknowledged",
)
@pytest.mark.parametrize("unix", [False, True])
def test_acknowledged_output_resets_the_idle_timeout(
    reactor: Any, clock: Clock, tmp_path: Any, unix: bool
) -> None:
    """The kernel has all that was written, and the peer takes a little at a time."""
    path = str(tmp_path / "socket") if unix else None
    held = unread_client(reactor, clock, write_and_read, path, receive_buffer=1 << 13)
    with held as (factory, client):
        for _ in read_slowly(reactor, client, 1 << 18, 1 << 12):
            clock.advance(5)
            assert factory.connections
        # It has all, and is idle from now on.
        clock.pump([5] * 20)
        spin(reactor, lambda: not factory.connections)


def test_ended_connections_are_freed() -> None:
    """The watchdogs do not keep them, and end with the last connection."""
    clock = Clock()
    factory = CoroutineFactory(_echo, idle_timeout=60, read_timeout=60, reactor=clock)
    kept, _ = connection_of(factory)
    gone = []
    for _ in range(10):
        protocol = connection_of(factory)[0]
        protocol.dataReceived(b"half a l")
        gone.append(weakref.ref(protocol.stream))
        # Seen by the watchdogs.
        clock.advance(15)
        kept.dataReceived(b"x\n")
        # A handler that fails is logged, and logs keep what they are given.
        protocol.dataReceived(b"ine\n")
        protocol.connectionLost(Failure(ConnectionDone()))
        del protocol
    gc.collect()
    assert [each() for each in gone] == [None] * 10
    assert clock.getDelayedCalls()
    kept.connectionLost(Failure(ConnectionDone()))
    assert not clock.getDelayedCalls()
    # And begin again with the next connection.
    _, transport = connection_of(factory)
    clock.pump([15] * 5)
    assert transport.aborting
    assert not clock.getDelayedCalls()


def test_a_handler_that_outlives_its_connection_is_not_idle(logged: Logged) -> None:
    clock = Clock()
    end = Event()

    async def handler(stream: Stream) -> None:
        await end.wait()

    factory = CoroutineFactory(handler, idle_timeout=60, reactor=clock)
    protocol, _ = connection_of(factory)
    protocol.connectionLost(Failure(ConnectionDone()))
    clock.pump([15] * 10)
    assert not any("idle_timeout" in str(each.get("error")) for each in logged)
    end.set()
    assert not clock.getDelayedCalls()


def test_read_timeout() -> None:
    clock = Clock()
    factory = CoroutineFactory(_echo, read_timeout=60, reactor=clock)
    patient, patient_transport = connection_of(factory)
    slow, slow_transport = connection_of(factory)
    for _ in range(12):
        clock.advance(10)
        # Whole lines, or nothing for long, are well.
        patient.dataReceived(b"x\n")
        if not slow_transport.aborting:
            slow.dataReceived(b"x")
    assert slow_transport.aborting
    assert not patient_transport.aborting
    patient.connectionLost(Failure(ConnectionAborted()))
    clock.advance(60)
    assert not clock.getDelayedCalls()


def test_handshake_timeout(reactor: Any, certificate: Any, logged: Logged) -> None:
    async def main() -> None:
        endpoint = tls_endpoint(reactor, certificate)
        server = await serve(
            endpoint, _until_told, handshake_timeout=0.05, reactor=reactor
        )
        port = server.port.getHost().port
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.setblocking(False)
            while not server.factory.connections:
                await sleep(0)
            while server.factory.connections:
                await sleep(0.01)
            with pytest.raises(ConnectionResetError):
                silent.recv(1)
        await server.stop()

    run(reactor, main)
    assert failures(logged) == []


def test_the_handshake_timeout_ends_with_the_handshake(
    reactor: Any, certificate: PrivateCertificate
) -> None:
    """No limit is left after the handshake, or after the connection is lost."""
    clock = Clock()

    async def main() -> None:
        server = await listen(
            reactor, _until_told, certificate, reactor=clock, handshake_timeout=60
        )
        async with await call(reactor, server, certificate) as stream:
            await stream.write(b"what?\n")
            assert await stream.read_line() == b"not that"
            clock.advance(61)
            await stream.write(b"what?\n")
            assert await stream.read_line() == b"not that"
        async with await call(reactor, server):
            await until(lambda: server.factory.connections)
        await until(lambda: not server.factory.connections)
        await server.stop()
        assert not clock.getDelayedCalls()

    run(reactor, main)


# Clients and endpoints


def test_connect_to_a_closed_port(reactor: Any) -> None:
    async def main() -> None:
        server = await listen(reactor, _until_told)
        endpoint = client_endpoint(reactor, server)
        await server.stop()
        with pytest.raises(ConnectError):
            await connect(endpoint)

    run(reactor, main)


@pytest.mark.skipif(ON_PYPY, reason="the queue of its listen(0) has more room")
def test_a_timeout_around_connect(reactor: Any) -> None:
    """The backlog of the listening socket is full, and nothing accepts."""

    async def main() -> None:
        with socket.socket() as listening, socket.socket() as first:
            listening.bind(("127.0.0.1", 0))
            listening.listen(0)
            first.connect(listening.getsockname())
            endpoint = TCP4ClientEndpoint(reactor, *listening.getsockname())
            with pytest.raises(TimeoutError), timeout(0.05):
                await connect(endpoint)

    run(reactor, main)
    spin(reactor, lambda: not reactor.getDelayedCalls())


def _unwilling(endpoint: Any, name: str, go_on: Event) -> Any:
    """An endpoint that goes on although it was cancelled."""

    class Endpoint:
        def method(self, factory: Any) -> Deferred[Any]:
            result: Deferred[Any] = Deferred()

            def begin(ignored: None) -> None:
                begun = getattr(endpoint, name)(factory)
                begun.chainDeferred(result)

            go_on.wait().addCallback(begin)
            return result

    setattr(Endpoint, name, Endpoint.method)
    return Endpoint()


def test_a_cancelled_connect_leaves_no_connection(reactor: Any) -> None:
    made: list[Stream] = []

    async def handler(stream: Stream) -> None:
        made.append(stream)
        assert await stream.read() == b""

    async def main() -> None:
        server = await listen(reactor, handler)
        go_on = Event()
        endpoint = _unwilling(client_endpoint(reactor, server), "connect", go_on)
        connecting = connect(endpoint)
        connecting.cancel()
        with pytest.raises(CancelledError):
            await connecting
        go_on.set()
        await until(lambda: made)
        await until(lambda: not server.factory.connections)
        await server.stop()

    run(reactor, main)


# Twisted leaves the socket of a port whose factory raises to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cancelled_serve_does_not_listen(reactor: Any) -> None:
    ports: list[Any] = []
    listen_tcp = reactor.listenTCP

    def listening(*args: Any, **options: Any) -> Any:
        ports.append(listen_tcp(*args, **options))
        return ports[-1]

    async def main() -> None:
        go_on = Event()
        real = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        serving = serve(_unwilling(real, "listen", go_on), _echo, reactor=reactor)
        serving.cancel()
        with pytest.raises(CancelledError):
            await serving
        go_on.set()
        await sleep(0)
        assert not any(each.connected for each in ports)

    reactor.listenTCP = listening
    run(reactor, main)
    gc.collect()


def test_unix_sockets(reactor: Any, tmp_path: Any) -> None:
    address = str(tmp_path / "socket")

    async def main() -> bytes:
        endpoint = UNIXServerEndpoint(reactor, address)
        server = await serve(endpoint, _until_told, reactor=reactor)
        async with await connect(UNIXClientEndpoint(reactor, address)) as stream:
            await stream.write(b"what?\n")
            answer = await stream.read_line()
        await server.stop()
        return answer

    assert run(reactor, main) == b"not that"


# TLS


def test_tls(reactor: Any, certificate: PrivateCertificate) -> None:
    async def main() -> None:
        server = await listen(reactor, _until_told, certificate)
        async with await call(reactor, server, certificate) as stream:
            await stream.write(b"what?\n")
            assert await stream.read_line() == b"not that"
            with pytest.raises(StreamError, match="no half close"):
                stream.write_eof()
            await stream.write(b"return\n")
            assert await stream.read() == b""
        await server.stop()

    run(reactor, main)


def test_start_tls(reactor: Any, certificate: PrivateCertificate) -> None:
    async def handler(stream: Stream) -> None:
        assert await stream.read_line() == b"STARTTLS"
        await stream.write(b"go ahead\n")
        await stream.start_tls(certificate.options())
        await stream.write(b"secret\n")
        assert await stream.read_line() == b"thanks"

    async def main() -> bytes:
        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            await stream.write(b"STARTTLS\n")
            await stream.read_line()
            await stream.start_tls(optionsForClientTLS("127.0.0.1", certificate))
            secret = await stream.read_line()
            await stream.write(b"thanks\n")
            assert await stream.read() == b""
        await server.stop()
        return secret

    assert run(reactor, main) == b"secret"


def test_start_tls_twice_raises(reactor: Any, certificate: PrivateCertificate) -> None:
    async def handler(stream: Stream) -> None:
        # Unless it is on a TLS endpoint.
        if not ISSLTransport.providedBy(stream.transport):
            await stream.start_tls(certificate.options())
        for _ in range(2):
            with pytest.raises(StreamError, match="encrypted already"):
                stream.start_tls(certificate.options())
        await stream.write(b"fine\n")

    async def main() -> None:
        options = optionsForClientTLS("127.0.0.1", certificate)
        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            await stream.start_tls(options)
            assert await stream.read_line() == b"fine"
            with pytest.raises(StreamError, match="encrypted already"):
                stream.start_tls(options)
        await server.stop()
        server = await listen(reactor, handler, certificate)
        async with await call(reactor, server, certificate) as stream:
            assert await stream.read_line() == b"fine"
        await server.stop()

    run(reactor, main)


def test_start_tls_after_one_side_has_ended_raises(reactor: Any) -> None:
    async def main() -> None:
        for end in ("write_eof", "close"):
            async with connected(reactor) as (stream, _):
                getattr(stream, end)()
                with pytest.raises(StreamError, match=end):
                    await stream.start_tls(None)
        async with connected(reactor) as (stream, peer):
            peer.shutdown(socket.SHUT_WR)
            assert await stream.read() == b""
            with pytest.raises(StreamError, match="ended"):
                await stream.start_tls(None)

    run(reactor, main)


def test_plaintext_injected_before_tls_is_refused(
    reactor: Any, certificate: PrivateCertificate, logged: Logged
) -> None:
    async def handler(stream: Stream) -> None:
        assert await stream.read_line() == b"STARTTLS"
        with pytest.raises(UnreadPlaintext, match="7 bytes came before TLS"):
            await stream.start_tls(certificate.options())

    async def main() -> None:
        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            await stream.write(b"STARTTLS\ninject\n")
            assert await stream.read() == b""
        await server.stop()

    run(reactor, main)
    assert failures(logged) == []


def test_a_failed_handshake(reactor: Any, certificate: PrivateCertificate) -> None:
    async def handler(stream: Stream) -> None:
        with pytest.raises(Exception, match=r"alert|lost"):
            await stream.start_tls(certificate.options())

    async def main() -> None:
        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            with pytest.raises(Exception, match="certificate verify failed"):
                # It does not trust that one.
                await stream.start_tls(optionsForClientTLS("127.0.0.1"))
        await server.stop()

    run(reactor, main)


def test_stop_of_a_server_whose_port_is_closed(reactor: Any) -> None:
    async def main() -> Stopped:
        server = await listen(reactor, _echo)
        stopped: Any = server.port.stopListening()
        await stopped
        return await server.stop()

    assert run(reactor, main) == Stopped(0, 0, 0)


def test_a_handler_stops_its_server_in_its_first_step(
    reactor: Any, logged: Logged
) -> None:
    stopped: list[Deferred[Stopped]] = []

    async def main() -> None:
        async def handler(stream: Stream) -> None:
            stopped.append(server.stop(0))
            await stream.read()

        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            with contextlib.suppress(ConnectionLost):
                assert await stream.read() == b""
        await stopped[0]

    run(reactor, main)
    assert failures(logged) == []


def test_serve_forever(reactor: Any) -> None:
    """Until it is cancelled, or something else stops the server."""

    async def main() -> None:
        server = await listen(reactor, _echo)
        # Nothing refers to its task but the server.
        spawn(server.serve_forever, reactor=reactor)
        gc.collect()
        await sleep(0)
        assert not server.stopping.is_set
        serving = spawn(server.serve_forever, reactor=reactor)
        await sleep(0)
        serving.cancel()
        with pytest.raises(CancelledError):
            await serving
        assert server.stopping.is_set
        await server.serve_forever()

    run(reactor, main)


def test_serve_forever_until_another_stop_has_ended(reactor: Any) -> None:
    """So a program that returns then does not end handlers that still have time."""
    leave = Event()

    async def handler(stream: Stream) -> None:
        await stream.write(b"here")
        await leave.wait()

    async def main() -> None:
        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            await stream.read_exactly(4)
            serving = spawn(server.serve_forever)
            await sleep(0)
            stopped = server.stop(3600)
            for _ in range(5):
                await sleep(0)
            assert not serving.done
            leave.set()
            assert await stream.read() == b""
            await serving
            assert await stopped == Stopped(1, 0, 0)

    run(reactor, main)


class _Cleans:
    """A handler that takes time to clean up when it is cancelled, and records it."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.go_on = Event()

    async def handler(self, stream: Stream) -> None:
        await stream.write(b"here")
        try:
            await Event().wait()
        finally:
            self.told.append("cleans up")
            await self.go_on.wait()
            self.told.append("is clean")

    def generator(self, stream: Stream) -> Generator[Any, Any, None]:
        yield stream.write(b"here")
        try:
            yield Deferred()
        finally:
            self.told.append("cleans up")
            yield self.go_on.wait()
            self.told.append("is clean")


@contextlib.asynccontextmanager
async def _stopping(
    reactor: Any, handler: Any, how: str
) -> AsyncIterator[tuple[Stream, Task[Any]]]:
    """A server that stops with a long grace, and the task that waits for the stop."""
    server = await listen(reactor, handler)
    stream = await call(reactor, server)
    await stream.read_exactly(4)
    stopping: Task[Any]
    if how == "stop":
        stopping = spawn(lambda: server.stop(3600, 3600))
    else:
        stopping = spawn(lambda: server.serve_forever(3600, 3600))
        await sleep(0)
        stopping.cancel()
    await sleep(0)
    assert server.stopping.is_set
    yield stream, stopping
    await stream.abort()
    await until(lambda: not server.factory.connections)


@pytest.mark.parametrize("how", ["stop", "serve_forever"])
@pytest.mark.parametrize("style", ["handler", "generator"])
def test_cancelling_a_stop_ends_the_grace(reactor: Any, how: str, style: str) -> None:
    """The handlers are cancelled, and waited for."""
    cleans = _Cleans()

    async def main() -> None:
        handler = getattr(cleans, style)
        async with _stopping(reactor, handler, how) as (stream, stopping):
            assert cleans.told == []
            stopping.cancel()
            for _ in range(5):
                await sleep(0)
            assert cleans.told == ["cleans up"]
            assert not stopping.done
            cleans.go_on.set()
            with pytest.raises(CancelledError):
                await stopping
            assert cleans.told == ["cleans up", "is clean"]
            with pytest.raises(ConnectionClosed):
                await stream.read()

    run(reactor, main)


@pytest.mark.parametrize("how", ["stop", "serve_forever"])
def test_cancelling_a_stop_again_aborts_the_connections(
    reactor: Any, logged: Logged, how: str
) -> None:
    cleans = _Cleans()

    async def main() -> None:
        async with _stopping(reactor, cleans.handler, how) as (stream, stopping):
            stopping.cancel()
            await sleep(0)
            assert not stopping.done
            stopping.cancel()
            # It is too late to hurry.
            stopping.cancel()
            with pytest.raises(CancelledError):
                await stopping
            with pytest.raises(ConnectionClosed):
                await stream.read()
            assert cleans.told == ["cleans up"]
            cleans.go_on.set()

    run(reactor, main)
    [event] = [each for each in logged if "handlers" in each]
    assert event["count"] == 1


def test_a_stop_that_takes_too_long(reactor: Any) -> None:
    cleans = _Cleans()
    cleans.go_on.set()

    async def main() -> None:
        server = await listen(reactor, cleans.handler)
        async with await call(reactor, server) as stream:
            await stream.read_exactly(4)
            with pytest.raises(TimeoutError), timeout(0.01):
                await server.stop(3600)
            assert cleans.told == ["cleans up", "is clean"]

    run(reactor, main)


@pytest.mark.parametrize("hurried", [False, True])
def test_a_handler_that_waits_for_the_stop_of_its_server(
    reactor: Any, logged: Logged, hurried: bool
) -> None:
    """It is cancelled with the others, which still have their time to clean up."""
    cleans = _Cleans()

    async def main() -> None:
        async def handler(stream: Stream) -> None:
            if streams:
                try:
                    await server.stop(3600 if hurried else 0.01, 3600)
                finally:
                    cleans.told.append("has waited")
            else:
                await cleans.handler(stream)

        streams: list[Stream] = []
        server = await listen(reactor, handler)
        other = await call(reactor, server)
        await other.read_exactly(4)
        streams.append(other)
        streams.append(await call(reactor, server))
        await until(lambda: server.stopping.is_set)
        stopped = server.stop(0, 3600) if hurried else server.stop(3600)
        await until(lambda: "has waited" in cleans.told)
        assert sorted(cleans.told) == ["cleans up", "has waited"]
        assert not server.factory.stopped.is_set
        for _ in range(20):
            await sleep(0)
        assert not stopped.called
        cleans.go_on.set()
        await stopped
        await until(lambda: server.factory.stopped.is_set)
        assert cleans.told[-1] == "is clean"
        for each in streams:
            await each.abort()

    run(reactor, main)
    assert failures(logged) == []
    assert not [each for each in logged if "handlers" in each]


@pytest.mark.parametrize("fails", [False, True])
def test_each_stop_waits_for_the_port(fails: bool, logged: Logged) -> None:
    closing: Deferred[None] = Deferred()

    class Port:
        def stopListening(self) -> Deferred[None]:
            return closing

    clock = Clock()
    server = Server(Port(), CoroutineFactory(_echo, reactor=clock))
    stops = [server.stop(), server.stop(), server.stop()]
    clock.advance(0)
    assert not any(each.called for each in stops)
    # Each wait is one of its own.
    stops[1].cancel()
    clock.advance(0)
    assert [each.called for each in stops] == [False, True, False]
    if fails:
        closing.errback(OSError("it stays open"))
    else:
        closing.callback(None)
    clock.advance(0)
    results: list[Any] = []
    for each in stops:
        each.addBoth(results.append)
    assert results[1].check(CancelledError)
    for each in (results[0], results[2]):
        if fails:
            assert each.check(OSError)
        else:
            assert each == Stopped(0, 0, 0)
    assert failures(logged) == []


def test_a_factory_that_has_stopped_does_not_listen(reactor: Any) -> None:
    factory = CoroutineFactory(_echo, reactor=reactor)
    run(reactor, lambda: factory.stop(0))
    with pytest.raises(RuntimeError, match="make a new CoroutineFactory"):
        factory.doStart()


def test_a_write_in_the_turn_of_a_time_limit_is_not_logged_as_a_failure(
    reactor: Any, logged: Logged
) -> None:
    async def main() -> None:
        async def handler(stream: Stream) -> None:
            stream.time_out(ConnectionAborted("too late"))
            await stream.write(b"more")

        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            with contextlib.suppress(ConnectionLost):
                await stream.read()
        await server.stop()

    run(reactor, main)
    assert failures(logged) == []
