"""
Transports of asyncio for which the engine reads and writes: the guarantees of their
protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import (
    DEADLINE,
    RESET,
    dispose,
    each_of,
    reactor_classes,
    run_program,
)

if sys.platform == "win32" or not reactor_classes():
    pytest.skip("it is for Linux, BSD and macOS", allow_module_level=True)

from tests.test_asyncioreactor import CLASSES
from twisted_rtsig.asyncio_support.watched import WatchedTransport
from twisted_rtsig.asyncioreactor import AsyncioEngineReactor

Event = Any


@pytest.fixture(params=each_of(CLASSES), ids=lambda each: each.__name__)
def loop(request: Any) -> Iterator[Any]:
    """The event loop of each of the reactors."""
    reactor: AsyncioEngineReactor = request.param(asyncio.SelectorEventLoop())
    yield reactor._asyncioEventloop
    dispose(reactor)
    reactor._asyncioEventloop.close()


class Recorder(asyncio.Protocol):
    """Records the events of a connection, and calls ``on_data`` for its data."""

    def __init__(self, on_data: Callable[[Recorder, bytes], object]) -> None:
        self.events: list[Event] = []
        self.data = b""
        self.lost = asyncio.Event()
        self._on_data = on_data

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        self._on_data(self, data)

    def eof_received(self) -> None:
        self.events.append("eof")

    def connection_lost(self, error: Exception | None) -> None:
        self.events.append(error)
        self.lost.set()


class Pair:
    """A transport with its protocol, and a plain socket at the other end."""

    def __init__(self, protocol: Any, handle: socket.socket) -> None:
        self.protocol = protocol
        self.handle = handle


async def connected(
    on_data: Callable[[Recorder, bytes], object] = lambda protocol, data: None,
) -> Pair:
    loop: Any = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        handle = socket.create_connection(listening.getsockname(), DEADLINE)
        ours, _ = listening.accept()
    ours.setblocking(False)
    _, protocol = await loop.create_connection(lambda: Recorder(on_data), sock=ours)
    watched = loop._selector._watched[ours.fileno()]
    assert type(watched) is WatchedTransport
    return Pair(protocol, handle)


async def end(pair: Pair) -> None:
    pair.protocol.transport.abort()
    pair.handle.close()
    await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0)

    await asyncio.wait_for(wait(), DEADLINE)


def run(loop: Any, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, DEADLINE))


def test_all_data_arrives(loop: Any) -> None:
    """The data takes several reads, or exactly one.  The end follows it."""

    async def main() -> None:
        for size in (1, 65_535, 65_536, 65_537, 3_000_000):
            pair = await connected()
            sent = bytes(range(256)) * (size // 256) + bytes(size % 256)
            await asyncio.get_running_loop().run_in_executor(
                None, pair.handle.sendall, sent
            )
            await until(lambda: len(pair.protocol.data) >= size)
            assert pair.protocol.data == sent
            pair.handle.close()
            await pair.protocol.lost.wait()
            assert pair.protocol.events == ["eof", None]

    run(loop, main())


def test_the_end_arrives_together_with_data(loop: Any) -> None:
    async def main() -> None:
        for size in (1, 65_536, 100_000):
            pair = await connected()
            pair.handle.sendall(bytes(size))
            pair.handle.close()
            await pair.protocol.lost.wait()
            assert len(pair.protocol.data) == size
            assert pair.protocol.events == ["eof", None]

    run(loop, main())


def test_a_reset_is_passed_to_connection_lost(loop: Any) -> None:
    async def main() -> None:
        pair = await connected()
        pair.handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        pair.handle.close()
        await pair.protocol.lost.wait()
        (error,) = pair.protocol.events
        assert isinstance(error, ConnectionResetError)

    run(loop, main())


def test_a_pause_leaves_the_rest_of_the_data(loop: Any) -> None:
    async def main() -> None:
        pair = await connected(
            lambda protocol, data: protocol.transport.pause_reading()
        )
        pair.handle.sendall(bytes(150_000))
        for size in (65_536, 131_072, 150_000):
            await until(lambda: len(pair.protocol.data) >= size)
            for _ in range(5):
                await asyncio.sleep(0)
            assert len(pair.protocol.data) == size
            pair.protocol.transport.resume_reading()
        await end(pair)

    run(loop, main())


def test_a_connection_keeps_its_context(loop: Any) -> None:
    """A variable that data_received() sets has its value the next time, only there."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    seen = []

    def count(protocol: Recorder, data: bytes) -> None:
        seen.append(variable.get())
        variable.set(variable.get() + 1)

    async def main() -> None:
        variable.set(10)
        first = await connected(count)
        variable.set(20)
        second = await connected(count)
        for pair in (first, second, first, second):
            done = len(seen)
            pair.handle.sendall(b"x")
            await until(lambda: len(seen) > done)
        assert seen == [10, 20, 11, 21]
        assert variable.get() == 20
        for pair in (first, second):
            await end(pair)

    run(loop, main())


def test_data_is_received_in_the_context_that_has_resumed_reading(loop: Any) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    seen = []

    async def main() -> None:
        variable.set(1)
        pair = await connected(lambda protocol, data: seen.append(variable.get()))
        # This is so much that the descriptor stays watched for writing.
        pair.protocol.transport.write(bytes(20_000_000))
        pair.protocol.transport.pause_reading()
        variable.set(2)
        pair.protocol.transport.resume_reading()
        pair.handle.sendall(b"x")
        await until(lambda: seen)
        # From Python 3.15 on, a transport keeps the context that it was made in.
        assert seen == [1 if sys.version_info >= (3, 15) else 2]
        await end(pair)

    run(loop, main())


def test_an_error_of_the_protocol_ends_the_connection(loop: Any) -> None:
    """The exception handler of the loop gets the error, as on any loop."""
    contexts: list[dict[str, Any]] = []

    def fail(protocol: Recorder, data: bytes) -> None:
        raise ZeroDivisionError("of the test")

    async def main() -> None:
        loop.set_exception_handler(lambda loop, context: contexts.append(context))
        pair = await connected(fail)
        pair.handle.sendall(b"x")
        await pair.protocol.lost.wait()
        assert isinstance(pair.protocol.events[0], ZeroDivisionError)
        (context,) = contexts
        assert context["message"] == (
            "Fatal error: protocol.data_received() call failed."
        )
        assert context["protocol"] is pair.protocol
        pair.handle.close()

    run(loop, main())


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_exit_in_the_protocol_leaves_the_loop(
    loop: Any, error: type[BaseException]
) -> None:
    """The connection goes on when the loop runs again."""
    fails = [True]

    def leave(protocol: Recorder, data: bytes) -> None:
        if fails:
            del fails[0]
            raise error

    async def go_on() -> None:
        pair.handle.sendall(b"second")
        await until(lambda: pair.protocol.data == b"firstsecond")
        await end(pair)

    pair: Pair = run(loop, connected(leave))
    pair.handle.sendall(b"first")
    late = loop.call_later(DEADLINE, loop.stop)
    with pytest.raises(error):
        loop.run_forever()
    late.cancel()
    run(loop, go_on())


def test_each_exit_in_a_protocol_leaves_the_loop(loop: Any) -> None:
    """The loop runs again after each of them."""

    def leave(protocol: Recorder, data: bytes) -> None:
        raise SystemExit(data.decode())

    async def connect() -> list[Pair]:
        return [await connected(leave) for _ in range(3)]

    pairs: list[Pair] = run(loop, connect())
    statuses = set()
    for number, pair in enumerate(pairs):
        pair.handle.sendall(b"%d" % number)
    for _ in pairs:
        late = loop.call_later(DEADLINE, loop.stop)
        with pytest.raises(SystemExit) as exit_:
            loop.run_forever()
        late.cancel()
        statuses.add(exit_.value.code)
    assert statuses == {"0", "1", "2"}
    for pair in pairs:
        run(loop, end(pair))


def test_a_transport_gets_another_protocol(loop: Any) -> None:
    """One of the protocols reads into a buffer of its own."""

    class Buffered(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.buffer, self.data = bytearray(1000), b""

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, size: int) -> None:
            self.data += self.buffer[:size]

    async def main() -> None:
        pair = await connected()
        transport = pair.protocol.transport
        pair.handle.sendall(b"first")
        await until(lambda: pair.protocol.data == b"first")
        buffered = Buffered()
        transport.set_protocol(buffered)
        pair.handle.sendall(bytes(50_000))
        await until(lambda: len(buffered.data) == 50_000)
        again = Recorder(lambda protocol, data: None)
        transport.set_protocol(again)
        pair.handle.sendall(b"last")
        await until(lambda: again.data == b"last")
        assert pair.protocol.data == b"first"
        await end(pair)

    run(loop, main())


def test_debug_mode_measures_the_protocol(
    loop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        pair = await connected()
        loop.set_debug(True)
        # All callbacks count as slow.
        loop.slow_callback_duration = 0
        pair.handle.sendall(bytes(100_000))
        await until(lambda: len(pair.protocol.data) == 100_000)
        loop.set_debug(False)
        pair.handle.sendall(b"x")
        await until(lambda: len(pair.protocol.data) == 100_001)
        await end(pair)

    run(loop, main())
    assert "_SelectorSocketTransport._read_ready" in caplog.text


def run_until_stopped(loop: Any, pair: Pair) -> None:
    """Send a byte, and run the loop until the protocol stops it."""
    pair.handle.sendall(b"x")
    late = loop.call_later(DEADLINE, loop.stop)
    loop.run_forever()
    assert not late.cancelled()
    late.cancel()


def test_cancelled_timers_do_not_pile_up(loop: Any) -> None:
    """The loop itself has no work: the engine calls the protocol."""
    most = [0]

    def set_and_cancel(protocol: Recorder, data: bytes) -> None:
        for _ in range(50):
            loop.call_later(1000, print).cancel()
        most[0] = max(most[0], len(loop._scheduled))
        if len(protocol.data) < 100:
            pair.handle.sendall(b"x")
        else:
            loop.stop()

    pair: Pair = run(loop, connected(set_and_cancel))
    run_until_stopped(loop, pair)
    assert len(pair.protocol.data) == 100
    # 5,000 timers were set.
    assert most[0] < 1000
    pair.protocol.transport.abort()
    pair.handle.close()
    loop.call_soon(loop.stop)
    loop.run_forever()


def test_a_protocol_iterates_the_reactor(loop: Any) -> None:
    """Data that arrives meanwhile is not lost."""

    async def main() -> None:
        def iterate(protocol: Recorder, data: bytes) -> None:
            if data == b"one":
                pair.handle.sendall(b"two")
                for _ in range(3):
                    loop.reactor.iterate(0.001)

        pair = await connected(iterate)
        pair.handle.sendall(b"one")
        await until(lambda: pair.protocol.data == b"onetwo")
        pair.handle.sendall(b"three")
        await until(lambda: pair.protocol.data == b"onetwothree")
        pair.handle.close()
        await pair.protocol.lost.wait()
        assert pair.protocol.events == ["eof", None]

    run(loop, main())


# Writes are sent when the callbacks of the pass have been called


def peeked(handle: socket.socket) -> bytes:
    """The data that has arrived.  It is not consumed."""
    handle.setblocking(False)
    try:
        return handle.recv(1000, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
    finally:
        handle.settimeout(DEADLINE)


def test_writes_of_a_pass_are_sent_as_one(loop: Any) -> None:
    """They are sent in order, with the writes of callbacks that they schedule."""
    seen = []

    def answer(protocol: Recorder, data: bytes) -> None:
        protocol.transport.write(b"one ")
        protocol.transport.write(b"")
        protocol.transport.write(b"two ")
        seen.append(peeked(pair.handle))
        loop.call_soon(write_later, protocol)

    def write_later(protocol: Recorder) -> None:
        seen.append(peeked(pair.handle))
        protocol.transport.write(b"three ")
        loop.reactor.callLater(0, write_last, protocol)

    def write_last(protocol: Recorder) -> None:
        seen.append(peeked(pair.handle))
        protocol.transport.write(bytearray(b"four"))
        seen.append(peeked(pair.handle))
        loop.stop()

    pair: Pair = run(loop, connected(answer))
    run_until_stopped(loop, pair)
    assert seen == [b"", b"", b"", b"one two three four"]
    run(loop, end(pair))


def write_eof(transport: Any) -> None:
    transport.write_eof()


def write_much(transport: Any) -> None:
    transport.write(bytes(100_000))


def write_more_than_is_collected(transport: Any) -> None:
    for _ in range(100):
        transport.write(bytes(1000))


CALLS_AFTER_A_WRITE: list[Callable[[Any], object]] = [
    write_eof,
    write_much,
    write_more_than_is_collected,
    lambda transport: transport.close(),
    lambda transport: transport.abort(),
    lambda transport: transport.get_write_buffer_size(),
    lambda transport: transport.set_write_buffer_limits(10),
    lambda transport: transport.writelines([b"later"]),
    lambda transport: transport._loop.reactor.iterate(),
]


@pytest.mark.parametrize(
    "call", CALLS_AFTER_A_WRITE, ids=range(len(CALLS_AFTER_A_WRITE))
)
def test_a_write_is_sent_before_another_call_of_the_transport(
    loop: Any, call: Callable[[Any], object]
) -> None:
    seen = []

    def answer(protocol: Recorder, data: bytes) -> None:
        protocol.transport.write(b"first")
        call(protocol.transport)
        seen.append(pair.handle.recv(5))

    async def main() -> None:
        pair.handle.sendall(b"x")
        await until(lambda: seen)

    pair: Pair = run(loop, connected(answer))
    run(loop, main())
    assert seen == [b"first"]
    assert pair.protocol.transport.get_write_buffer_size() == 0
    run(loop, end(pair))


def test_writes_are_sent_at_once_if_the_buffer_may_hold_nothing(loop: Any) -> None:
    """Otherwise ``drain()`` would return before they are sent."""
    seen = []

    async def main() -> None:
        pair = await connected()
        transport = pair.protocol.transport
        transport.set_write_buffer_limits(high=0)
        transport.write(b"one")
        seen.append(peeked(pair.handle))
        transport.set_write_buffer_limits(high=5)
        transport.write(b"two")
        seen.append(peeked(pair.handle))
        transport.write(b"three")
        seen.append(peeked(pair.handle))
        transport.set_write_buffer_limits()
        transport.write(b"four")
        seen.append(peeked(pair.handle))
        await end(pair)

    run(loop, main())
    assert seen == [b"one", b"one", b"onetwothree", b"onetwothree"]


@pytest.mark.parametrize("reactor_class", CLASSES)
def test_a_write_before_a_fork_is_sent_once(
    reactor_class: type[AsyncioEngineReactor],
) -> None:
    program = """
import asyncio, os, socket

async def main():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        handle = socket.create_connection(listening.getsockname())
        reader, writer = await asyncio.open_connection(sock=listening.accept()[0])
    writer.write(b"written once")
    pid = os.fork()
    if pid == 0:
        writer.close()
        os._exit(0)
    os.waitpid(pid, 0)
    writer.close()
    await writer.wait_closed()
    received = b""
    while data := handle.recv(100):
        received += data
    print(received.decode(), flush=True)

loop = asyncio.SelectorEventLoop()
Reactor(loop)
loop.run_until_complete(main())
"""
    assert run_program(program, reactor_class=reactor_class) == "written once\n"


def test_a_write_before_a_file_is_sent_first(loop: Any, tmp_path: Any) -> None:
    (tmp_path / "file").write_bytes(b"file")

    async def main() -> None:
        pair = await connected()
        with open(tmp_path / "file", "rb") as file:
            pair.protocol.transport.write(b"before ")
            await loop.sendfile(pair.protocol.transport, file)
            pair.protocol.transport.write(b" after")
            await asyncio.sleep(0)
        assert pair.handle.recv(100) == b"before file after"
        await end(pair)

    run(loop, main())


def test_writes_are_sent_when_the_loop_does_not_run(loop: Any) -> None:
    """One is written before the loop runs, and one by its last callback."""
    pair: Pair = run(loop, connected())
    pair.protocol.transport.write(b"one")
    assert pair.handle.recv(10) == b"one"
    loop.call_soon(pair.protocol.transport.write, b"two")
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert pair.handle.recv(10) == b"two"
    run(loop, end(pair))


def test_a_write_of_a_signal_handler_is_sent(loop: Any) -> None:
    """The handler runs in the middle of the sleep, which nothing else ends."""
    received = []

    def write(number: int, frame: object) -> None:
        pair.protocol.transport.write(b"x")

    def interrupt() -> None:
        while not loop.reactor._waiting:
            time.sleep(0)
        os.kill(os.getpid(), signal.SIGUSR1)
        received.append(pair.handle.recv(1))
        loop.call_soon_threadsafe(loop.stop)

    pair: Pair = run(loop, connected())
    former = signal.signal(signal.SIGUSR1, write)
    try:
        thread = threading.Thread(target=interrupt)
        loop.call_soon(thread.start)
        loop.run_forever()
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert received == [b"x"]
    run(loop, end(pair))


def test_more_small_writes_than_the_buffer_has_room_for(loop: Any) -> None:
    """No data is lost or out of order, and the protocol is told to pause."""
    events = []

    class Sender(Recorder):
        def pause_writing(self) -> None:
            events.append("pause")

        def resume_writing(self) -> None:
            events.append("resume")

    async def main() -> None:
        pair = await connected()
        transport = pair.protocol.transport
        sender = Sender(lambda protocol, data: None)
        transport.set_protocol(sender)
        # Make the buffers small.
        handle = transport.get_extra_info("socket")
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
        transport.set_write_buffer_limits(1000)
        sent = 0
        while "pause" not in events:
            for _ in range(10):
                transport.write(b"%0999d " % sent)
                sent += 1
            await asyncio.sleep(0)
        assert events == ["pause"]
        received = bytearray(pair.handle.recv(1 << 20))
        # Now there is room, but these writes come before it is reported.
        transport.write(b"the ")
        transport.write(b"last")

        def read_all() -> bytes:
            while not received.endswith(b"the last"):
                received.extend(pair.handle.recv(1 << 20))
            return bytes(received)

        everything = await loop.run_in_executor(None, read_all)
        assert (
            everything
            == b"".join(b"%0999d " % each for each in range(sent)) + b"the last"
        )
        await until(lambda: events == ["pause", "resume"])
        await end(pair)

    run(loop, main())


def test_a_write_after_the_peer_has_left_ends_the_connection(loop: Any) -> None:
    """connection_lost() is called once, in the context of the connection."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen = []

    class Lost(Recorder):
        def connection_lost(self, error: Exception | None) -> None:
            seen.append((type(error), variable.get()))

    async def main() -> None:
        variable.set("of the connection")
        pair = await connected()
        transport = pair.protocol.transport
        transport.set_protocol(Lost(lambda protocol, data: None))
        transport.pause_reading()
        pair.handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        pair.handle.close()
        variable.set("another")
        transport.write(b"x")
        transport.write(b"x")
        await until(lambda: seen)
        assert seen == [(ConnectionResetError, "of the connection")]
        assert transport.is_closing()

    run(loop, main())


def test_writes_in_debug_mode_are_sent_at_once(loop: Any) -> None:
    """Then the traceback of an error shows the write."""
    seen = []

    async def main() -> None:
        pair = await connected()
        loop.set_debug(True)
        pair.protocol.transport.write(b"x")
        seen.append(peeked(pair.handle))
        await end(pair)

    run(loop, main())
    assert seen == [b"x"]


def test_a_small_write_that_the_buffer_has_no_room_for(loop: Any) -> None:
    async def main() -> None:
        pair = await connected()
        transport = pair.protocol.transport
        sent = 0
        with (
            socket.fromfd(
                transport.get_extra_info("socket").fileno(),
                socket.AF_INET,
                socket.SOCK_STREAM,
            ) as other,
            contextlib.suppress(BlockingIOError),
        ):
            while True:
                sent += other.send(bytes(1 << 20))
        transport.write(b"x")
        transport.write(b"y")
        await asyncio.sleep(0)
        assert transport.get_write_buffer_size() == 2

        def read_all() -> bytes:
            data = b""
            left = sent + 2
            while left:
                data = pair.handle.recv(left)
                left -= len(data)
            return data

        assert (await loop.run_in_executor(None, read_all)).endswith(b"xy")
        assert transport.get_write_buffer_size() == 0
        await end(pair)

    run(loop, main())


def _at_once(loop: Any, write: Callable[[], object]) -> None:
    write()


def _by_call_soon(loop: Any, write: Callable[[], object]) -> None:
    loop.call_soon(write)


def _by_a_timer(loop: Any, write: Callable[[], object]) -> None:
    loop.call_later(0.001, write)


def _by_a_timer_of_twisted(loop: Any, write: Callable[[], object]) -> None:
    loop.reactor.callLater(0.001, write)


@pytest.mark.parametrize(
    "arrange", [_at_once, _by_call_soon, _by_a_timer, _by_a_timer_of_twisted]
)
def test_an_answer_is_sent_before_the_loop_sleeps(
    loop: Any, arrange: Callable[[Any, Callable[[], object]], None]
) -> None:
    def answer(protocol: Recorder, data: bytes) -> None:
        arrange(loop, lambda: protocol.transport.write(b"answer"))

    async def main() -> None:
        pair = await connected(answer)

        def exchange() -> bytes:
            pair.handle.sendall(b"x")
            return pair.handle.recv(100)

        assert await loop.run_in_executor(None, exchange) == b"answer"
        await end(pair)

    # The timeout of the socket is the deadline.
    loop.run_until_complete(main())


def test_writes_in_passes_of_iterate_are_sent(loop: Any) -> None:
    """They are not left to the loop, which may not run."""
    seen = []

    def iterate(protocol: Recorder, data: bytes) -> None:
        write = protocol.transport.write
        loop.reactor.callLater(0, write, b"one ")
        loop.reactor.callLater(0, loop.reactor.iterate)
        loop.reactor.callLater(0, write, b"two ")
        loop.reactor.iterate()
        seen.append(peeked(pair.handle))
        write(b"three")
        seen.append(peeked(pair.handle))
        loop.reactor.callLater(0, loop.set_debug, True)
        loop.reactor.iterate()
        write(b"four")
        seen.append(peeked(pair.handle))

    async def main() -> None:
        pair.handle.sendall(b"x")
        await until(lambda: len(seen) == 3)
        await end(pair)

    pair: Pair = run(loop, connected(iterate))
    run(loop, main())
    assert seen == [b"one two ", b"one two ", b"one two threefour"]


def test_writes_that_asyncio_refuses_or_drops(loop: Any) -> None:
    async def main() -> None:
        pair = await connected()
        transport = pair.protocol.transport
        transport.write(b"first")
        with pytest.raises(TypeError):
            transport.write("text")
        waiter = transport._make_empty_waiter()
        with pytest.raises(RuntimeError, match="sendfile is in progress"):
            transport.write(b"x")
        await waiter
        transport._reset_empty_waiter()
        transport.write_eof()
        with pytest.raises(RuntimeError, match="after write_eof"):
            transport.write(b"x")
        assert pair.handle.recv(100) == b"first"
        assert pair.handle.recv(100) == b""
        await end(pair)

        pair = await connected()
        pair.protocol.transport.write(b"first")
        pair.protocol.transport.close()
        pair.protocol.transport.write(b"dropped")
        await asyncio.sleep(0)
        pair.protocol.transport.write(b"dropped")
        assert pair.handle.recv(100) == b"first"
        assert pair.handle.recv(100) == b""
        pair.handle.close()

    run(loop, main())
