"""
Tasks leave no garbage to the collector, whatever they wait for and however they end.
So the failure of a task that no code awaits is logged when the last reference to the
task is dropped, and not some time later.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from subprocess import STDOUT, CalledProcessError
from types import CellType, FunctionType
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks, succeed
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.error import ConnectError, ConnectionLost
from twisted.internet.task import Clock

from tests.coro.support import (
    STYLES,
    ExpectedError,
    connected,
    forgets_awaits,
    listen,
    run_for_real,
)
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    CancelScope,
    CapacityLimiter,
    Channel,
    ChannelClosed,
    ChannelSender,
    Condition,
    Deadline,
    EndOfChannel,
    Event,
    FileEnded,
    IncompleteRead,
    Lock,
    OutputLimitExceeded,
    Portal,
    Semaphore,
    Stream,
    StreamError,
    TaskGroup,
    connect,
    coroutine,
    current_deadline,
    current_task,
    current_time,
    from_thread,
    in_thread,
    move_on_after,
    open_datagrams,
    open_process,
    open_signal_receiver,
    open_tcp,
    run_group,
    run_process,
    select,
    shield,
    sleep,
    spawn,
    symmetric,
    timeout,
    timeout_at,
    transfer,
)
from twisted_rtsig.files import (
    NamedTemporaryFile,
    TemporaryDirectory,
    open_file,
    walk,
)
from twisted_rtsig.files import (
    Path as AsyncPath,
)

pytestmark = frees_at_once

# Types of the garbage of Twisted's thread pool, which leaves a function that refers to
# itself for each call.
OF_THREAD_POOL = (FunctionType, CellType, tuple, dict)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    # Leave out objects of earlier tests, which may become garbage only now.
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def garbage() -> list[str]:
    """Descriptions of the objects that the collector finds."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [
            f"{type(each).__name__}: {each!r}"
            for each in gc.garbage
            if not isinstance(each, OF_THREAD_POOL)
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def advance(clock: Clock) -> None:
    """Let 15 seconds pass, and all turns of the reactor."""
    for _ in range(30):
        clock.advance(0.5)
        clock.advance(0)


# Tasks


async def fails_at_once() -> None:
    raise ExpectedError


async def fails_after_a_turn() -> None:
    await sleep(0)
    raise ExpectedError


async def fails_after_a_wait() -> None:
    await sleep(1)
    raise ExpectedError


async def fails_after_a_deferred() -> None:
    await succeed(None)
    raise ExpectedError


async def fails_in_a_coroutine() -> None:
    await fails_after_a_wait()


def generator_fails_at_once() -> Generator[Any, Any, None]:
    yield from ()
    raise ExpectedError


def generator_fails_after_a_wait() -> Generator[Any, Any, None]:
    yield sleep(1)
    raise ExpectedError


FAILING = [
    fails_at_once,
    fails_after_a_turn,
    fails_after_a_wait,
    fails_after_a_deferred,
    fails_in_a_coroutine,
    generator_fails_at_once,
    generator_fails_after_a_wait,
]


async def awaited(fails: Any) -> None:
    await spawn(fails)


async def awaited_by_name(fails: Any) -> None:
    task = spawn(fails)
    await task


async def awaited_when_it_has_failed(fails: Any) -> None:
    task = spawn(fails)
    await sleep(5)
    await task


def yielded(fails: Any) -> Generator[Any, Any, None]:
    yield spawn(fails)


def decorated(fails: Any) -> Generator[Any, Any, None]:
    def generator() -> Generator[Any, Any, Any]:
        return (yield spawn(fails))

    yield coroutine(generator)()


async def in_a_group(fails: Any) -> None:
    async with TaskGroup() as group:
        group.spawn(sleep, 9)
        group.spawn(fails)


async def in_the_block_of_a_group(fails: Any) -> None:
    async with TaskGroup() as group:
        group.spawn(sleep, 9)
        await spawn(fails)


def in_a_group_for_generators(fails: Any) -> Generator[Any, Any, None]:
    def body(group: TaskGroup) -> Generator[Any, Any, None]:
        group.spawn(fails)
        yield sleep(9)

    yield run_group(body)


async def with_a_cause(fails: Any) -> None:
    try:
        with timeout(9):
            await spawn(fails)
    except ExpectedError as error:
        raise RuntimeError("therefore") from error


async def selected(fails: Any) -> None:
    await select(spawn(fails), Event())


async def transferred(fails: Any) -> None:
    await transfer(symmetric(lambda value: fails()))


async def timed_out(fails: Any) -> None:
    with timeout(0.1):
        await spawn(sleep, 2)


async def alone(fails: Any) -> None:
    # The inner task has the name of its function; the failure is logged for "main".
    await spawn(fails).as_deferred()


@pytest.mark.parametrize("fails", FAILING)
@pytest.mark.parametrize(
    "how",
    [
        None,
        alone,
        awaited,
        awaited_by_name,
        awaited_when_it_has_failed,
        yielded,
        decorated,
        in_a_group,
        in_the_block_of_a_group,
        in_a_group_for_generators,
        with_a_cause,
        selected,
        transferred,
        timed_out,
    ],
)
def test_a_failure_is_logged_when_the_last_reference_goes(
    logged: list[Any], fails: Any, how: Any
) -> None:
    clock = Clock()
    with without_collector():
        if how is None:
            task = spawn(fails, name="main", reactor=clock)
        else:
            task = spawn(how, fails, name="main", reactor=clock)
        advance(clock)
        assert task.failed
        assert not logged
        del task
        names = [each["name"] for each in logged if "log_failure" in each]
        logged.clear()
        assert set(names) == {"main"}


# Every kind of wait


async def sleeps(clock: Clock) -> None:
    await sleep(0)
    await sleep(1)


async def deferreds(clock: Clock) -> None:
    for end in (lambda it: it.callback(1), lambda it: it.errback(ExpectedError())):
        with contextlib.suppress(ExpectedError):
            await ending(clock, end)


def ending(clock: Clock, end: Callable[[Deferred[Any]], object]) -> Deferred[Any]:
    deferred: Deferred[Any] = Deferred()
    clock.callLater(1, end, deferred)
    return deferred


async def tasks_that_fail(clock: Clock) -> None:
    for fails in FAILING:
        with contextlib.suppress(ExpectedError):
            await spawn(fails)
        with contextlib.suppress(ExpectedError):
            await spawn(fails).as_deferred()


async def groups(clock: Clock) -> None:
    async with TaskGroup() as group:
        group.spawn(sleep, 1)
        await sleep(0)
    names = []
    for fails in FAILING:
        try:
            async with TaskGroup() as group:
                group.spawn(fails)
                await sleep(5)
        except Exception as errors:
            names.append(type(errors).__name__)
    assert names == ["ExceptionGroup"] * len(FAILING)


async def starts(clock: Clock) -> None:
    async def is_ready(*, task_status: Any) -> None:
        task_status.started(task_status)
        await sleep(1)

    async def is_never_ready(fails: Any = sleep, *, task_status: Any) -> None:
        await (fails(1) if fails is sleep else spawn(fails))

    async with TaskGroup() as group:
        await group.start(is_ready)
        with contextlib.suppress(RuntimeError):
            await group.start(is_never_ready)
        for fails in FAILING:
            with contextlib.suppress(ExpectedError):
                await group.start(is_never_ready, fails)
        with contextlib.suppress(TimeoutError), timeout(0.1):
            await group.start(is_never_ready)
        await group.start(is_ready)
        group.cancel("why")


def starts_yielding(clock: Clock) -> Generator[Any, Any, None]:
    def fails_first(*, task_status: Any) -> Generator[Any, Any, None]:
        yield sleep(1)
        raise ExpectedError

    def body(group: TaskGroup) -> Generator[Any, Any, None]:
        with contextlib.suppress(ExpectedError):
            yield group.start(fails_first)

    yield run_group(body)


async def scopes(clock: Clock) -> None:
    with move_on_after(5) as limit:
        await sleep(1)
    waits: list[Any] = [lambda: sleep(5), Deferred, lambda: spawn(sleep, 5)]
    for wait in (*waits, Event().wait):
        with move_on_after(1) as limit:
            await wait()
        assert limit.expired
        with CancelScope() as scope:
            clock.callLater(1, scope.cancel, "why")
            await wait()
        assert scope.cancelled
        with move_on_after(9) as limit:
            limit.deadline = current_time() + 1
            await wait()
        assert limit.expired
        with contextlib.suppress(TimeoutError), timeout(9) as late:
            late.deadline = 0
            await wait()
        assert late.expired
    assert current_deadline() > current_time()


def scopes_yielding(clock: Clock) -> Generator[Any, Any, None]:
    for _ in range(2):
        with move_on_after(1) as limit:
            yield sleep(5)
        assert limit.expired
        with contextlib.suppress(TimeoutError), timeout_at(current_time() + 1):
            yield Event().wait()


async def timeouts(clock: Clock) -> None:
    with timeout(5) as limit:
        await sleep(1)
    waits: list[Any] = [lambda: sleep(5), Deferred, lambda: spawn(sleep, 5)]
    for wait in (*waits, Event().wait):
        with contextlib.suppress(TimeoutError), timeout(1) as limit:
            await wait()
    assert limit.expired


async def cancellation(clock: Clock) -> None:
    async def shielded() -> None:
        with shield():
            await sleep(2)

    for function in (shielded, lambda: sleep(5), Deferred):
        task = spawn(function)
        await sleep(1)
        task.cancel("why")
        with contextlib.suppress(CancelledError):
            await task


async def channels(clock: Clock) -> None:
    for capacity in (0, 1):
        channel: Channel[int] = Channel(capacity)

        async def send(channel: Channel[int] = channel) -> None:
            for each in range(3):
                await channel.send(each)
            await sleep(1)
            with contextlib.suppress(ChannelClosed):
                while True:
                    await channel.send(3)

        sending = spawn(send)
        for each in range(3):
            assert await channel.receive() == each
        await sleep(2)
        channel.close()
        await sending
        with contextlib.suppress(EndOfChannel):
            while True:
                await channel.receive()
        async for _ in channel:
            pass
        with contextlib.suppress(ChannelClosed):
            await channel.send(4)
        channel = Channel(0)
        clock.callLater(1, channel.close)
        with contextlib.suppress(ChannelClosed):
            await spawn(channel.send, 5)


async def locks(clock: Clock) -> None:
    lock, semaphore, event, condition = Lock(), Semaphore(1), Event(), Condition()
    ready: list[int] = []

    async def use() -> None:
        async with lock, semaphore:
            await sleep(1)
        async with condition:
            with contextlib.suppress(TimeoutError), timeout(0.5):
                await condition.wait()
            await condition.wait_for(lambda: bool(ready))
        await event.wait()

    users = [spawn(use) for _ in range(2)]
    await sleep(4)
    async with condition:
        condition.notify_all()
    await sleep(1)
    async with condition:
        ready.append(1)
        condition.notify_all()
    await sleep(1)
    event.set()
    for each in users:
        await each


async def ends_of_channels(clock: Clock) -> None:
    channel: Channel[int] = Channel(0)

    async def send(sender: ChannelSender[int]) -> None:
        with sender:
            await sender.send(1)
            await sleep(1)

    with channel.open_sender() as sender:
        sending = [spawn(send, sender.clone()) for _ in range(2)]
        await sleep(0)
        clock.callLater(1, sender.close)
        with contextlib.suppress(ChannelClosed):
            await spawn(sender.send, 2)
        with contextlib.suppress(ChannelClosed):
            await sender.send(3)
    with channel.open_receiver() as receiver:
        other = receiver.clone()
        await select(receiver, Event())
        async for _ in receiver:
            pass
        with contextlib.suppress(EndOfChannel):
            await receiver.receive()
        other.close()
        with contextlib.suppress(ChannelClosed):
            await other.receive()
    for each in sending:
        await each
    with channel.open_receiver() as receiver:
        pass
    with contextlib.suppress(ChannelClosed):
        await channel.send(1)


async def limiters(clock: Clock) -> None:
    limiter = CapacityLimiter(1)

    async def use() -> None:
        async with limiter:
            await sleep(1)
        with contextlib.suppress(RuntimeError):
            limiter.release()

    users = [spawn(use) for _ in range(3)]
    await sleep(0)
    with contextlib.suppress(TimeoutError), timeout(0.5):
        await limiter.acquire()
    for each in users:
        await each
    for fails in FAILING:
        with contextlib.suppress(ExpectedError):
            async with limiter:
                await spawn(fails)


async def selects(clock: Clock) -> None:
    channel: Channel[int] = Channel(0)
    sending = spawn(channel.send, 1)
    await select(channel, Event())
    await sending
    await select(channel, Deadline(1))
    await select(channel, spawn(sleep, 1))
    await select(channel, ending(clock, lambda it: it.callback(1)))
    with contextlib.suppress(TimeoutError), timeout(1):
        await select(channel, Event())
    for fails in FAILING:
        with contextlib.suppress(ExpectedError):
            await select(channel, spawn(fails))
    with contextlib.suppress(ExpectedError):
        await select(channel, ending(clock, lambda it: it.errback(ExpectedError())))
    waits_that_fail: list[Any] = list(FAILING)
    waits: list[Any] = [lambda: sleep(5), Deferred, lambda: spawn(sleep, 5)]
    for wait in (*waits, Event().wait):
        await select(wait, lambda: sleep(1))
        with contextlib.suppress(TimeoutError), timeout(1):
            await select(wait, channel.receive)
        for failing in waits_that_fail:
            with contextlib.suppress(ExpectedError):
                await select(wait, failing)
    clock.callLater(1, channel.close)
    for _ in range(2):
        with contextlib.suppress(EndOfChannel):
            await select(channel, Event())


async def transfers(clock: Clock) -> None:
    async def answers(caller: Any, value: int) -> int:
        value = await transfer(caller, value + 1)
        return value + 1

    other = symmetric(answers, current_task())
    assert await transfer(other, 1) == 2
    assert await transfer(other, 2) == 3
    for fails in FAILING:
        with contextlib.suppress(ExpectedError):
            await transfer(symmetric(lambda fails, value: fails(), fails))
    abandoned = symmetric(answers, current_task())
    await transfer(abandoned, 1)
    abandoned.cancel()


async def inline_callbacks(clock: Clock) -> None:
    @inlineCallbacks
    def inline() -> Generator[Any, Any, None]:
        yield sleep(1)
        try:
            yield ending(clock, lambda it: it.callback(1))
        finally:
            yield sleep(0, clock)

    await inline()


@pytest.mark.parametrize(
    "waits",
    [
        sleeps,
        deferreds,
        tasks_that_fail,
        groups,
        starts,
        starts_yielding,
        scopes,
        scopes_yielding,
        timeouts,
        cancellation,
        channels,
        ends_of_channels,
        locks,
        limiters,
        selects,
        transfers,
        inline_callbacks,
    ],
)
def test_waits_leave_no_garbage(waits: Any) -> None:
    def wait() -> None:
        clock = Clock()
        task = spawn(waits, clock, reactor=clock)
        for _ in range(5):
            advance(clock)
        task.result()

    # Fill the caches.
    wait()
    with without_collector():
        wait()
        assert garbage() == []


OPERATIONS: dict[str, Callable[[Clock], Any]] = {
    "sleep": lambda clock: sleep(1, clock),
    "sleep(0)": lambda clock: sleep(0, clock),
    "event": lambda clock: event_that_is_set(clock).wait(),
    "receive": lambda clock: channel_that_is_closed(clock).receive(),
    "send": lambda clock: channel_that_is_closed(clock).send(1),
    "select": lambda clock: select(channel_that_is_closed(clock), Event()),
    "task": lambda clock: spawn(fails_after_a_wait, reactor=clock).as_deferred(),
    "Deferred": lambda clock: ending(clock, lambda it: it.errback(ExpectedError())),
}


def event_that_is_set(clock: Clock) -> Event:
    event = Event()
    clock.callLater(1, event.set)
    return event


def channel_that_is_closed(clock: Clock) -> Channel[int]:
    channel: Channel[int] = Channel(0)
    clock.callLater(1, channel.close)
    return channel


# The styles of this package alone: when an operation fails, Twisted's own drivers leave
# garbage.
OURS = ["async def", "generator", "@coroutine"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("style", OURS)
def test_no_garbage_in_any_style(style: str, operation: str) -> None:
    def wait() -> list[Any]:
        clock = Clock()
        got: list[Any] = []
        steps = [lambda: OPERATIONS[operation](clock)] * 2
        STYLES[style](clock, steps, got)
        advance(clock)
        return got

    assert len(wait()) == 2
    with without_collector():
        wait()
        assert garbage() == []


@pytest.mark.parametrize("style", STYLES)
def test_a_thousand_sleeps(style: str) -> None:
    clock = Clock()
    got: list[Any] = []
    with without_collector():
        STYLES[style](clock, [lambda: sleep(1, clock)] * 1000, got)
        for _ in range(1000):
            clock.advance(1)
        assert got == [None] * 1000
        assert garbage() == []


# On a real reactor


async def streams(reactor: Any) -> None:
    async with connected(reactor) as (stream, peer):
        peer.sendall(b"one\ntw")
        await stream.read_line()
        with contextlib.suppress(TimeoutError), timeout(0.001):
            await stream.read_line()
        await stream.write(b"three")
        await stream.write_eof()
        peer.shutdown(socket.SHUT_WR)
        for read in (stream.read_line, stream.read_line, stream.peek):
            with contextlib.suppress(IncompleteRead):
                await read()
        with contextlib.suppress(StreamError):
            await stream.write(b"four")


async def streams_that_are_lost(reactor: Any) -> None:
    async with connected(reactor) as (stream, peer):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        reactor.callLater(0, peer.close)
        for use in (stream.read, stream.read_line, lambda: stream.write(b"one")):
            with contextlib.suppress(ConnectionLost):
                await use()


async def threads(reactor: Any) -> None:
    await in_thread(lambda: from_thread(sleep, 0))
    for function in (fails_at_once, fails_after_a_turn):
        with contextlib.suppress(ExpectedError):
            await in_thread(from_thread, function)
    async with Portal() as portal:
        await in_thread(lambda: portal.call(sleep, 0))
        await in_thread(lambda: portal.spawn(sleep, 0).result())
        with contextlib.suppress(ExpectedError):
            await in_thread(portal.call, fails_after_a_turn)
        await in_thread(lambda: portal.spawn(sleep, 10).cancel())
    with contextlib.suppress(ValueError):
        await in_thread(int, "one")
    limiter = CapacityLimiter(1)
    waits = [limiter.in_thread(time.sleep, 0.001) for _ in range(2)]
    with contextlib.suppress(ValueError):
        await limiter.in_thread(int, "one")
    for each in waits:
        await each
    with contextlib.suppress(TimeoutError), timeout(0):
        await in_thread(time.sleep, 0.001)
    # The thread goes on after its wait was cancelled: wait for it.
    while reactor.getThreadPool().working:
        await sleep(0.001)


async def signals(reactor: Any) -> None:
    with open_signal_receiver(signal.SIGTERM) as receiver:
        signal.raise_signal(signal.SIGTERM)
        await receiver.receive()
        with contextlib.suppress(TimeoutError), timeout(0.001):
            await receiver.receive()
        # This wait fails at the end of the block.
        receiver.receive()


async def processes(reactor: Any) -> None:
    async with open_process(["cat"]) as process:
        await process.stream.write(b"one\n")
        await process.stream.read_line()
        with contextlib.suppress(TimeoutError), timeout(0.001):
            await process.wait()
        await process.stream.write_eof()
        with contextlib.suppress(IncompleteRead):
            await process.stream.read_line()
        await process.wait()
    with contextlib.suppress(ExpectedError):
        async with open_process(["cat"]) as process:
            raise ExpectedError
    await run_process(["cat"], input=b"one")
    with contextlib.suppress(CalledProcessError):
        await run_process(["false"], text=True)
    with contextlib.suppress(OutputLimitExceeded):
        await run_process(["echo"], max_bytes=0)
    with contextlib.suppress(TimeoutError), timeout(0.001):
        await run_process(["sleep", "60"], stderr=STDOUT, signal_group=True)


async def files(reactor: Any) -> None:
    path = Path(__file__)
    async with await open_file(path) as file:
        while await file.read(1 << 16):
            pass
        await file.seek(0)
        await file.read_line()
    with contextlib.suppress(FileNotFoundError):
        await open_file(path.parent / "none")
    async with connected(reactor) as (stream, _), await open_file(path) as file:
        await stream.send_file(file, 0, 100)
        with contextlib.suppress(FileEnded):
            await stream.send_file(file, count=path.stat().st_size + 1)
    async with TemporaryDirectory() as folder:
        text = AsyncPath(folder) / "text"
        await text.write_text("one\ntwo\n")
        async with await text.open("r+") as lines:
            async for _ in lines:
                await lines.tell()
            lines.seek(0).cancel()
            await lines.write("three")
        async with NamedTemporaryFile(dir=folder) as temporary:
            await temporary.write(b"one")
        with contextlib.suppress(FileNotFoundError):
            _ = [each async for each in (text.parent / "nothing").iterdir()]
        _ = [each async for each in AsyncPath(folder).rglob("*")]
        async for _ in walk(folder):
            pass


async def datagrams(reactor: Any) -> None:
    port = open_datagrams(interface="127.0.0.1")
    async with port:
        await port.send_to(b"one", ("127.0.0.1", port.host.port))
        await port.receive_from()
        with contextlib.suppress(TimeoutError), timeout(0.001):
            await port.receive_from()
    with contextlib.suppress(StreamError):
        await port.receive_from()


@forgets_awaits
@pytest.mark.parametrize(
    "waits",
    [
        streams,
        streams_that_are_lost,
        threads,
        signals,
        processes,
        files,
        datagrams,
    ],
)
def test_waits_on_a_reactor_leave_no_garbage(reactor: Any, waits: Any) -> None:
    async def main() -> list[str]:
        # Fill the caches.
        await waits(reactor)
        await sleep(0.01)
        with without_collector():
            await waits(reactor)
            # The connections take some turns to end.
            await sleep(0.01)
            return garbage()

    assert run_for_real(reactor, main) == []


@pytest.mark.parametrize("outcome", ["connected", "refused", "cancelled"])
def test_open_tcp_leaves_no_more_garbage_than_twisted(
    reactor: Any, outcome: str
) -> None:
    """Twisted's clients are in reference cycles; open_tcp() adds none."""

    async def handler(stream: Stream) -> None:
        await stream.read()

    async def left_by(connecting: Callable[[], Any]) -> list[str]:
        patience = 0 if outcome == "cancelled" else 60
        for _ in range(2):
            with without_collector():
                with contextlib.suppress(ConnectError, TimeoutError), timeout(patience):
                    async with await connecting():
                        pass
                await sleep(0.01)
                # Compare the types alone: a repr may have an address in memory.
                left = sorted(each.partition(":")[0] for each in garbage())
        return left

    async def main() -> None:
        server = await listen(reactor, handler)
        port = server.port.getHost().port
        if outcome == "refused":
            await server.stop()
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port)
        theirs = await left_by(lambda: connect(endpoint))
        assert await left_by(lambda: open_tcp("127.0.0.1", port)) == theirs
        await server.stop()

    run_for_real(reactor, main)
