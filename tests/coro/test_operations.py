"""Operations, which functions that wait return: awaited, and used as Deferreds."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Generator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from tests.coro.support import STYLES as LAZY_STYLES
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    BusyResourceError,
    CoroutineFactory,
    DelimiterNotFound,
    Stream,
    Task,
    buffers,
    coroutine,
    sleep,
    spawn,
    timeout,
)


class Peer:
    """
    The peer of a stream: the test calls what it does.

    :ivar stream: the handler's stream, at the other side.
    """

    stream: Stream

    def __init__(self, clock: Clock) -> None:
        self.over: Deferred[None] = Deferred()
        factory = CoroutineFactory(self._handler, reactor=clock)
        self._protocol: Any = factory.buildProtocol(None)
        self._protocol.makeConnection(StringTransport())

    async def _handler(self, stream: Stream) -> None:
        self.stream = stream
        await self.over

    def says(self, data: bytes) -> None:
        self._protocol.dataReceived(data)

    def leaves(self, why: Exception) -> None:
        self._protocol.connectionLost(Failure(why))


@pytest.fixture
def peer(clock: Clock) -> Peer:
    return Peer(clock)


async def _async_def(waited: list[Any], got: list[Any]) -> None:
    for each in waited:
        try:
            got.append(await each)
        except Exception as error:
            got.append(type(error))


def _generator(waited: list[Any], got: list[Any]) -> Generator[Any, Any, None]:
    for each in waited:
        try:
            got.append((yield each))
        except Exception as error:
            got.append(type(error))


STYLES: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "async def": lambda *args: spawn(_async_def, *args),
    "generator": lambda *args: spawn(_generator, *args),
    "@coroutine": coroutine(_generator),
    "@inlineCallbacks": inlineCallbacks(_generator),
    "fromCoroutine": lambda *args: Deferred.fromCoroutine(_async_def(*args)),
}
styles = pytest.mark.parametrize("style", STYLES)
endings = pytest.mark.parametrize("ending", ["a value", "an error"])


def end(peer: Peer, ending: str) -> Any:
    """Let a read end; its expected result."""
    if ending == "a value":
        peer.says(b"hello")
        return b"hello"
    peer.leaves(ConnectionLost())
    return ConnectionLost


@styles
@endings
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_an_operation_is_awaited_before_or_after_its_end(
    peer: Peer, style: str, ending: str, used: bool, ended: bool
) -> None:
    got: list[Any] = []
    reading = peer.stream.read()
    if used:
        reading.addBoth(lambda result: result)
    if ended:
        expected = end(peer, ending)
        STYLES[style]([reading], got)
    else:
        STYLES[style]([reading], got)
        assert got == []
        expected = end(peer, ending)
    assert [expected] == got


@styles
def test_an_operation_that_is_done_at_once(peer: Peer, style: str) -> None:
    got: list[Any] = []
    peer.says(b"one\ntwo\n")
    reads = [peer.stream.read_line(), peer.stream.read_exactly(0)]
    reads.append(peer.stream.read_line())
    used: Any = peer.stream.write(b"x")
    assert used.addCallback(lambda _: "changed") is used
    STYLES[style]([*reads, used], got)
    assert got == [b"one", b"", b"two", "changed"]


@endings
def test_two_tasks_await_the_same_operation(peer: Peer, ending: str) -> None:
    got: list[Any] = []
    reading = peer.stream.read()
    spawn(_async_def, [reading], got)
    spawn(_async_def, [reading], got)
    expected = end(peer, ending)
    assert got == [expected, expected]


@endings
def test_an_operation_is_awaited_twice(peer: Peer, ending: str) -> None:
    got: list[Any] = []
    reading = peer.stream.read()
    expected = end(peer, ending)
    spawn(_async_def, [reading, reading], got)
    assert got == [expected, expected]


def test_an_operation_waits_for_the_deferred_that_a_callback_returns(
    peer: Peer, clock: Clock
) -> None:
    got: list[Any] = []
    reading = peer.stream.read().addCallback(lambda data: sleep(1, clock))
    spawn(_async_def, [reading], got)
    peer.says(b"hello")
    spawn(_async_def, [reading], got)
    assert got == []
    clock.advance(1)
    assert got == [None, None]


def _second(second: Any, first: object) -> Any:
    return second


@endings
def test_a_callback_returns_an_operation(peer: Peer, ending: str) -> None:
    """As with any Deferred: before its end, and after it."""
    got: list[Any] = []
    for when in range(2):
        deferred: Deferred[Any] = Deferred()
        reading = peer.stream.read()
        deferred.addCallback(partial(_second, reading))
        if not when:
            deferred.callback(None)
        expected = end(peer, ending)
        if when:
            deferred.callback(None)
        spawn(_async_def, [deferred], got)
        assert got.pop() == expected
        if ending == "an error":
            return


def test_a_callback_returns_an_operation_that_is_done(peer: Peer) -> None:
    got: list[Any] = []
    deferred: Deferred[Any] = Deferred()
    peer.says(b"one\ntwo\n")
    deferred.addCallback(lambda _: peer.stream.read_line())
    deferred.addCallback(got.append)
    deferred.addCallback(lambda _: peer.stream.write(b"x"))
    deferred.addCallback(lambda _: peer.stream.read_line())
    deferred.addCallback(got.append)
    deferred.callback(None)
    assert got == [b"one", b"two"]


def test_cancelling_an_operation_is_an_error_for_its_waiters(peer: Peer) -> None:
    """The waiters were not cancelled themselves; and the stream can be read again."""
    got: list[Any] = []
    reading = peer.stream.read()
    spawn(_async_def, [reading], got)
    reading.cancel()
    reading.cancel()
    assert got == [CancelledError]
    spawn(_async_def, [peer.stream.read()], got)
    peer.says(b"hello")
    assert got == [CancelledError, b"hello"]


@pytest.mark.usefixtures("debug_off")
def test_an_error_that_is_never_retrieved_is_logged(
    peer: Peer, logged: list[Any]
) -> None:
    reading = peer.stream.read_line()
    peer.leaves(ConnectionLost())
    del reading
    gc.collect()
    failures = [each["log_failure"] for each in logged if each.get("log_failure")]
    assert [each.type for each in failures] == [ConnectionLost]


def test_a_finished_operation_is_not_yielded_to_the_driver(peer: Peer) -> None:
    """So no other driver of coroutines has to understand it."""

    async def converse(stream: Stream) -> list[bytes]:
        await stream.write(b"hello")
        got = [await stream.peek(1), await stream.read_line()]
        got += [await stream.read_until(b";"), await stream.read_exactly(2)]
        got += [await stream.read_until_regex(b"[.]"), await stream.read()]
        got.append(await stream.read_exactly(0))
        return got

    peer.says(b"line\n;ab.the rest")
    with pytest.raises(StopIteration) as end:
        converse(peer.stream).send(None)
    assert end.value.value == [b"l", b"line", b"", b"ab", b".", b"the rest", b""]


# Chains, however long


def test_a_long_chain_of_tasks(clock: Clock) -> None:
    """Each waits for the one before, and nothing recurses."""
    first: Deferred[int] = Deferred()

    async def add_one(to: Any) -> int:
        number: int = await to
        return number + 1

    last: Any = first
    for _ in range(100_000):
        last = spawn(add_one, last, reactor=clock)
    first.callback(0)
    while not last.done:
        clock.advance(0)
    assert last.result() == 100_000


def test_a_long_line_of_waiters(clock: Clock) -> None:
    """Each waiter is resumed by the one before."""
    gates: list[Deferred[None]] = [Deferred() for _ in range(100_000)]

    async def pass_on(number: int) -> None:
        await gates[number]
        if number + 1 < len(gates):
            gates[number + 1].callback(None)

    tasks = [spawn(pass_on, number, reactor=clock) for number in range(len(gates))]
    gates[0].callback(None)
    while not tasks[-1].done:
        clock.advance(0)
    assert all(task.done for task in tasks)


# What is left behind


@frees_at_once
def test_finished_operations_are_freed_without_the_collector(clock: Clock) -> None:
    """By reference counts alone."""
    gone: list[weakref.ref[Any]] = []

    class Marked:
        pass

    async def converse(stream: Stream) -> None:
        marked = Marked()
        gone.extend(map(weakref.ref, (marked, stream)))
        await stream.write(await stream.read_line())
        await sleep(1)

    def talk() -> None:
        factory = CoroutineFactory(converse, reactor=clock)
        protocol: Any = factory.buildProtocol(None)
        protocol.makeConnection(StringTransport())
        gone.append(weakref.ref(protocol))
        protocol.dataReceived(b"hel")
        protocol.dataReceived(b"lo\n")
        clock.advance(1)
        protocol.connectionLost(Failure(ConnectionDone()))
        protocol.makeConnection = None

    def cancel() -> None:
        task: Task[None] = spawn(sleep, 1, reactor=clock)
        gone.append(weakref.ref(task))
        task.cancel()

    gc.disable()
    try:
        talk()
        cancel()
        left = [each() for each in gone if each() is not None]
    finally:
        gc.enable()
    assert len(gone) == 4
    assert left == []


def test_an_abandoned_operation_is_cancelled_for_later_waiters(
    peer: Peer, clock: Clock
) -> None:
    async def reads() -> None:
        reading = peer.stream.read()
        with pytest.raises(TimeoutError), timeout(1):
            await reading
        with pytest.raises(CancelledError):
            await reading

    task = spawn(reads, reactor=clock)
    clock.advance(1)
    assert task.result() is None


def test_cancelled_writes_are_freed(peer: Peer, clock: Clock) -> None:
    given_up = []

    async def writes() -> None:
        peer.stream.pauseProducing()
        for _ in range(10):
            writing = peer.stream.write(b"x")
            given_up.append(weakref.ref(writing))
            with contextlib.suppress(TimeoutError), timeout(1):
                await writing
            del writing
        await sleep(1)

    task = spawn(writes, reactor=clock)
    clock.pump([1] * 10)
    gc.collect()
    assert not task.done
    assert [each() for each in given_up] == [None] * 10


# What a transport is told


@pytest.mark.usefixtures("debug_off")
def test_the_limits_at_which_the_transport_is_paused_and_resumed(peer: Peer) -> None:
    transport: Any = peer.stream.transport
    peer.says(bytes(1 << 17))
    assert transport.producerState == "producing"
    peer.says(b"x")
    assert transport.producerState == "paused"
    # Until half of it was read.
    assert peer.stream.read_exactly(1 << 16).called
    assert transport.producerState == "paused"
    assert peer.stream.read_exactly(1).called
    assert transport.producerState == "producing"


@pytest.mark.parametrize("when", ["before", "after"])
def test_input_after_close_is_discarded(peer: Peer, when: str) -> None:
    """And holds nothing up: under TLS, the farewell of the other side comes last."""
    transport: Any = peer.stream.transport
    if when == "before":
        peer.says(bytes(1 << 18))
        assert transport.producerState == "paused"
    closed = peer.stream.close()
    assert transport.producerState == "producing"
    if when == "after":
        peer.says(bytes(1 << 18))
        assert transport.producerState == "producing"
        assert transport.disconnecting
    peer.leaves(ConnectionDone())
    assert closed.called
    assert len(peer.stream.read(1 << 20).result) == (when == "before") << 18


# Limits


@pytest.mark.parametrize("method", ["read_line", "read_until", "read_until_regex"])
def test_a_limit_by_default(peer: Peer, method: str) -> None:
    delimiter = [] if method == "read_line" else [b"\n"]
    # Without the last one, there could be a match yet.
    peer.says(b"x" * ((1 << 16) + (method != "read_until_regex")))
    peer.says(b"\n")
    reading = getattr(peer.stream, method)(*delimiter)
    error = reading.result.value
    reading.addErrback(lambda _: None)
    assert type(error) is DelimiterNotFound
    assert error.max_bytes == 1 << 16
    assert "within 65536 bytes: refuse the peer, or pass a larger" in str(error)


def test_how_much_is_read_by_default(peer: Peer) -> None:
    peer.says(bytes(1 << 17))
    assert len(peer.stream.peek().result) == 1 << 16
    assert len(peer.stream.read().result) == 1 << 16
    reading = peer.stream.read_exactly(1 << 17)
    peer.says(bytes(1 << 17))
    assert len(reading.result) == 1 << 17


def test_lines_have_a_limit_by_default(peer: Peer, clock: Clock) -> None:
    async def main() -> None:
        lines = peer.stream.lines()
        assert await lines.__anext__() == b"one"
        with pytest.raises(DelimiterNotFound, match="within 65536 bytes"):
            await lines.__anext__()

    peer.says(b"one\n" + b"x" * (1 << 17))
    assert spawn(main, reactor=clock).result() is None


# Turns


@styles
@pytest.mark.parametrize(
    "read",
    [
        lambda stream: stream.read(2),
        lambda stream: stream.peek(2),
        lambda stream: stream.read_exactly(2),
        lambda stream: stream.read_line(),
        lambda stream: stream.read_until(b"\n"),
        lambda stream: stream.read_until_regex(b"\n"),
    ],
)
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_task_that_always_has_data_lets_other_tasks_run(
    peer: Peer, clock: Clock, style: str, read: Any, pieces: int
) -> None:
    for _ in range(pieces):
        peer.says(b"x\n" * 2_000)
    got: list[Any] = []
    turns = [0]
    call_later = clock.callLater

    def next_turn(*args: Any) -> Any:
        turns.append(len(got))
        return call_later(*args)

    clock.callLater = next_turn  # type: ignore[assignment, method-assign]
    LAZY_STYLES[style](clock, [partial(read, peer.stream)] * 1_000, got)
    clock.advance(0)
    assert len(got) == 1_000
    assert max(after - before for before, after in pairwise(turns)) < 300
    assert len(turns) > 3
    assert {len(each) for each in got} <= {1, 2}


@pytest.mark.parametrize("method", ["write", "close", "write_eof"])
def test_an_unawaited_operation_of_a_lost_connection_is_not_logged(
    peer: Peer, logged: list[Any], method: str
) -> None:
    transport: Any = peer.stream.transport
    transport.loseWriteConnection = lambda: None
    peer.stream.pauseProducing()
    waiting = getattr(peer.stream, method)(*[b"x"] * (method == "write"))
    assert not waiting.called
    peer.leaves(ConnectionLost())
    assert waiting.called
    del waiting
    gc.collect()
    assert not [each for each in logged if each.get("log_failure")]


def test_start_tls_during_a_read_raises(peer: Peer) -> None:
    reading = peer.stream.read()
    with pytest.raises(BusyResourceError, match="start TLS when none does"):
        peer.stream.start_tls(None)
    peer.says(b"x")
    assert reading.result == b"x"


class Counting(bytearray):
    """Tells how often one was made, and how many bytes were searched."""

    made = searched = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Counting.made += 1

    def find(self, *args: Any) -> int:
        _, first, last = args
        Counting.searched += min(last, len(self)) - first
        return super().find(*args)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(buffers, "bytearray", Counting, raising=False)
    Counting.made = Counting.searched = 0
    return Counting


@pytest.mark.parametrize("end", [b"\r\n", b"\r\n\r\n"])
def test_each_byte_is_searched_once(
    peer: Peer, counting: type[Counting], end: bytes
) -> None:
    """Only the bytes that may begin the delimiter are searched again."""
    reading = peer.stream.read_until(end, 1 << 20)
    size = 10_000
    for _ in range(size):
        peer.says(b"\r")
    assert not reading.called
    peer.says(end)
    assert len(reading.result) == size
    assert size < counting.searched < size * (len(end) + 1)


def test_buffered_data_is_not_copied_when_more_arrives(
    peer: Peer, counting: type[Counting]
) -> None:
    pieces = [b"%2048d" % number for number in range(200)]
    reading = peer.stream.read_exactly(2048 * len(pieces))
    for piece in pieces:
        peer.says(piece)
    assert reading.result == b"".join(pieces)
    assert counting.made == 1


def test_cancelled_waits_are_freed(peer: Peer, clock: Clock) -> None:
    given_up = []

    async def tries(start: Callable[[], Deferred[None]]) -> None:
        for _ in range(10):
            waiting = start()
            given_up.append(weakref.ref(waiting))
            with contextlib.suppress(TimeoutError), timeout(1):
                await waiting
            del waiting
        await sleep(1)

    transport: Any = peer.stream.transport
    transport.loseWriteConnection = lambda: None
    for start in (peer.stream.write_eof, peer.stream.close):
        task = spawn(tries, start, reactor=clock)
        clock.pump([1] * 10)
        gc.collect()
        assert not task.done
        assert [each() for each in given_up] == [None] * len(given_up)
        clock.advance(1)
        assert task.done
