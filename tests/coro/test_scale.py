"""
What is done with many objects at once takes time in proportion to their number.

The numbers are such that it takes some tenths of a second, and would take most of a
minute, or several, if it grew with the square.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, inlineCallbacks
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from tests.coro.support import ExpectedError, call, listen, run
from tests.coro.test_examples import example
from twisted_rtsig.coro import (
    Cancelled,
    CapacityLimiter,
    Channel,
    CoroutineFactory,
    Event,
    IncompleteRead,
    Stream,
    Task,
    TaskGroup,
    TaskStatus,
    coroutine,
    move_on_after,
    select,
    sleep,
    spawn,
)

MANY = 300_000
# Of what takes longer for each.
SOME = 40_000
DEEP = 10_000

# Seconds of CPU time.
LIMIT = 15.0


@contextlib.contextmanager
def linear() -> Iterator[None]:
    """Fail if a block takes far longer than it would in linear time."""
    start = time.process_time()
    yield
    assert time.process_time() - start < LIMIT


def full_stream(clock: Clock) -> Any:
    """The protocol of a stream whose transport has no room."""

    async def handler(stream: Stream) -> None:
        await Deferred()

    factory = CoroutineFactory(handler, reactor=clock)
    protocol: Any = factory.buildProtocol(None)
    protocol.makeConnection(StringTransport())
    protocol.stream.pauseProducing()
    return protocol


WAITS: dict[str, Callable[[Stream], Any]] = {
    "write": lambda stream: stream.write(b"x"),
    "close": Stream.close,
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["are done", "fail", "are cancelled"])
@pytest.mark.parametrize("wait", WAITS)
def test_many_operations_of_one_stream(wait: str, ending: str) -> None:
    clock = Clock()
    protocol = full_stream(clock)
    stream = protocol.stream
    cancelled = ending == "are cancelled"
    with linear():
        operations = [WAITS[wait](stream) for _ in range(SOME if cancelled else MANY)]
        assert not any(each.called for each in operations)
        if cancelled:
            for each in operations:
                each.addErrback(lambda failure: None)
                each.cancel()
        else:
            if ending == "are done":
                stream.resumeProducing()
            protocol.connectionLost(Failure(ConnectionDone()))
        assert all(each.called for each in operations)


@pytest.mark.slow
def test_many_tasks_await_one_task() -> None:
    clock = Clock()
    event = Event()
    awaited = spawn(event.wait, reactor=clock)
    with linear():
        waiting = [awaited.as_deferred() for _ in range(MANY)]
        event.set()
        assert all(each.called for each in waiting)


ENDINGS = ["are done", "are cancelled", "are cancelled in turn"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_many_tasks_wait_for_a_limiter(ending: str) -> None:
    limiter = CapacityLimiter(0)
    with linear():
        waiting = [limiter.acquire_on_behalf_of(each) for each in range(MANY)]
        if ending == "are done":
            limiter.total_tokens = MANY
        else:
            for each in waiting if ending == "are cancelled" else waiting[::-1]:
                each.cancel()
        assert all(each.called for each in waiting)
        for borrower in range(limiter.borrowed_tokens):
            limiter.release_on_behalf_of(borrower)
    assert limiter.statistics() == (0, limiter.total_tokens, (), 0)


@pytest.mark.slow
@pytest.mark.parametrize("sends", [True, False])
def test_many_tasks_wait_through_ends_of_a_channel(sends: bool) -> None:
    """Each end is closed by itself, while all others wait in the same queue."""
    channel: Channel[int] = Channel(0)
    with linear():
        ends: list[Any] = [
            channel.open_sender() if sends else channel.open_receiver()
            for _ in range(SOME)
        ]
        waiting = [each.send(1) if sends else each.receive() for each in ends]
        for each in ends[::2] + ends[::-1]:
            each.close()
        assert all(each.called for each in waiting)
        for each in waiting:
            each.addErrback(lambda failure: None)
    assert channel.statistics() == (0, 0, 0, 0, True, 0, 0)


@pytest.mark.slow
def test_many_tasks_start_in_a_group() -> None:
    clock = Clock()
    ready = Event()

    async def becomes_ready(*, task_status: TaskStatus[None]) -> None:
        await ready.wait()
        task_status.started()

    async def main() -> None:
        async with TaskGroup() as group:
            starts = [group.start(becomes_ready) for _ in range(SOME)]
            await sleep(1)
            ready.set()
            for each in starts:
                await each

    with linear():
        task = spawn(main, reactor=clock)
        while not task.done:
            clock.advance(1)
        task.result()


@pytest.mark.slow
def test_many_tasks_are_cancelled_with_their_group() -> None:
    clock, event = Clock(), Event()
    groups: list[TaskGroup] = []

    async def main() -> None:
        async with TaskGroup() as group:
            groups.append(group)
            for _ in range(SOME):
                group.spawn(event.wait)

    with linear():
        task = spawn(main, reactor=clock)
        while clock.getDelayedCalls():
            clock.advance(0)
        groups[0].cancel("why")
        while not task.done:
            clock.advance(0)
        task.result()


@pytest.mark.slow
def test_a_deadline_is_moved_often() -> None:
    clock = Clock()

    async def main() -> None:
        with move_on_after(1) as limit:
            for each in range(MANY):
                limit.deadline = each + 1

    with linear():
        spawn(main, reactor=clock).result()


@pytest.mark.slow
def test_many_selects_of_functions() -> None:
    """One of many waiters is cancelled by each select, in the middle of the queue."""
    event, channel = Event(), Channel[int](1)
    with linear():
        waiting = [select(event.wait, channel.receive) for _ in range(SOME)]
        for each in waiting[::2] + waiting[::-1]:
            each.addErrback(lambda failure: None)
            each.cancel()
    assert channel.statistics().receivers == 0


# The Redis example


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["UNSUBSCRIBE", "disconnect"])
def test_redis_many_channels(ending: str) -> None:
    redis_server = example("redis_server")
    database = redis_server.Database()
    connection = redis_server.Connection(database, Ended())
    channels = [b"channel %d" % each for each in range(MANY)]
    with linear():
        for each in channels:
            connection.subscribe(each)
        if ending == "UNSUBSCRIBE":
            answer = connection.unsubscribe(*channels)
            assert answer.count(b"unsubscribe") == len(channels)
            assert answer.endswith(b":0\r\n")
        else:
            spawn(connection.run, reactor=Clock()).result()
    assert database.subscribers == {}


class Ended:
    """A stream whose peer has left."""

    async def read_line(self) -> bytes:
        raise IncompleteRead(b"", "a line")


@pytest.mark.slow
def test_redis_many_clients_wait_for_one_list() -> None:
    clock = Clock()
    redis_server = example("redis_server")
    database = redis_server.Database()
    connection = redis_server.Connection(database, None)
    with linear():
        waiting = [
            spawn(connection.blocking_pop, [b"list", b"list"], b"0", reactor=clock)
            for _ in range(SOME)
        ]
        for task in waiting[::4]:
            task.cancel()
        del waiting[::4]
        for number in range(len(waiting)):
            database.push(b"list", (b"%d" % number,), left=False)
    got = [each.result().split()[-1] for each in waiting]
    assert got == [b"%d" % number for number in range(len(waiting))]
    assert database.waiting == {}


def test_redis_disconnects_from_its_channels(reactor: Any) -> None:
    database = example("redis_server").Database()

    async def main() -> None:
        server = await listen(reactor, database.session)
        async with await call(reactor, server) as stream:
            await stream.write(b"SUBSCRIBE one two\r\n")
            await stream.read_exactly(1)
            assert list(database.subscribers) == [b"one", b"two"]
        await server.stop(5)

    run(reactor, main)
    assert database.subscribers == {}


# Errors and tracebacks


def names(error: BaseException) -> list[str]:
    return [each.name for each in traceback.extract_tb(error.__traceback__)]


async def fails() -> None:
    await sleep(1)
    raise ExpectedError


def keeps_tracebacks() -> bool:
    """Whether a Deferred that has failed keeps the traceback; older Twisteds do not."""
    errors: list[BaseException | None] = []
    try:
        raise ExpectedError
    except ExpectedError:
        failed: Deferred[None] = fail(Failure())
    failed.addErrback(lambda failure: errors.append(failure.value))
    [error] = errors
    return error is not None and error.__traceback__ is not None


def test_a_traceback_does_not_grow() -> None:
    """Each await adds its own frames to the traceback, and only for itself."""
    clock = Clock()
    failed = spawn(fails, reactor=clock)
    clock.advance(1)
    seen: list[list[str]] = []

    async def awaits() -> None:
        for _ in range(300):
            try:
                await failed
            except ExpectedError as error:
                seen.append(names(error))

    def yields() -> Generator[Any, Any, None]:
        for _ in range(300):
            try:
                yield failed
            except ExpectedError as error:
                seen.append(names(error))

    def asks() -> None:
        for _ in range(300):
            try:
                failed.result()
            except ExpectedError as error:
                seen.append(names(error))

    @inlineCallbacks
    def inline() -> Generator[Any, Any, None]:
        for _ in range(300):
            try:
                yield failed.as_deferred()
            except ExpectedError as error:
                seen.append(names(error))

    for each in awaits, yields, asks, inline:
        seen.clear()
        task = spawn(each, reactor=clock)
        clock.advance(0)
        task.result()
        assert len(seen) == 300
        assert seen[0] == seen[-1]
        if each is not inline or keeps_tracebacks():
            assert seen[-1][-1] == "fails"
        assert len(seen[-1]) < 10


def test_the_traceback_of_an_operation_does_not_grow() -> None:
    clock = Clock()
    protocol = full_stream(clock)
    protocol.connectionLost(Failure(ConnectionDone()))
    reading = protocol.stream.read_line()
    seen: list[list[str]] = []

    async def awaits() -> None:
        for _ in range(300):
            with pytest.raises(IncompleteRead) as caught:
                await reading
            seen.append(names(caught.value))

    spawn(awaits, reactor=clock).result()
    assert len(seen) == 300
    assert seen[0] == seen[-1]


async def level(depth: int) -> None:
    if depth:
        await spawn(level, depth - 1)
    else:
        await fails()


def generator_level(depth: int) -> Generator[Any, Any, None]:
    if depth:
        yield spawn(generator_level, depth - 1)
    else:
        yield spawn(fails)


@coroutine
def decorated_level(depth: int) -> Generator[Any, Any, None]:
    if depth:
        yield decorated_level(depth - 1)
    else:
        yield spawn(fails)


async def level_with_a_wait(depth: int) -> None:
    try:
        await level_with_a_wait_below(depth)
    finally:
        await sleep(0)


async def level_with_a_wait_below(depth: int) -> None:
    if depth:
        await spawn(level_with_a_wait, depth - 1)
    else:
        await fails()


async def level_with_a_cause(depth: int) -> None:
    if not depth:
        await fails()
    try:
        await spawn(level_with_a_cause, depth - 1)
    except ExpectedError as error:
        raise ExpectedError(depth) from error


async def level_with_a_context(depth: int) -> None:
    if not depth:
        await fails()
    try:
        await spawn(level_with_a_context, depth - 1)
    except ExpectedError:
        raise ExpectedError(depth)  # noqa: B904


def level_of_both(clock: Clock, depth: int) -> Any:
    """Our tasks and Twisted's inlineCallbacks in turns."""

    async def task(depth: int) -> None:
        if depth:
            await inline(depth - 1)
        else:
            await fails()

    @inlineCallbacks
    def inline(depth: int) -> Generator[Any, Any, None]:
        yield spawn(task, depth, reactor=clock).as_deferred()

    return spawn(task, depth, reactor=clock)


LEVELS = [
    level,
    generator_level,
    decorated_level,
    level_with_a_wait,
    level_with_a_cause,
    level_with_a_context,
]


@pytest.mark.slow
@pytest.mark.parametrize("function", [*LEVELS, level_of_both])
def test_an_error_through_many_tasks(function: Any) -> None:
    clock = Clock()
    with linear():
        if function is level_of_both:
            task = level_of_both(clock, DEEP)
        else:
            task = spawn(function, DEEP, reactor=clock)
        for _ in range(DEEP // 100):
            clock.advance(0)
        clock.advance(1)
        while not task.done:
            clock.advance(0)
    with pytest.raises(ExpectedError) as caught:
        task.result()
    shown = names(caught.value)
    if function not in (level_with_a_cause, level_with_a_context):
        assert len(shown) > DEEP
        assert shown[-1] == "fails"
    # Nothing of this package, nor of Twisted, but the call of result().
    entries = traceback.extract_tb(caught.value.__traceback__)
    assert all("test_scale" in each.filename for each in entries[2:])


@pytest.mark.slow
def test_a_long_chain_with_inline_callbacks_is_cancelled() -> None:
    """Each task is told, and what the first one waits for is cancelled."""
    clock = Clock()
    told: list[int] = []
    first: Deferred[None] = Deferred()

    async def task(depth: int) -> None:
        try:
            await (inline(depth - 1) if depth else first)
        except Cancelled:
            told.append(depth)
            raise

    @inlineCallbacks
    def inline(depth: int) -> Generator[Any, Any, None]:
        yield spawn(task, depth, reactor=clock).as_deferred()

    last = spawn(task, DEEP, reactor=clock)
    for _ in range(DEEP // 100):
        clock.advance(0)
    assert len(told) == 0
    last.cancel()
    while not last.done:
        clock.advance(0)
    assert last.cancelled
    assert first.called
    assert told == list(range(DEEP + 1))


def test_a_circle_with_inline_callbacks_is_cancelled() -> None:
    clock = Clock()
    begin = Event()
    tasks: list[Task[None]] = []

    @inlineCallbacks
    def inline() -> Generator[Any, Any, None]:
        yield tasks[0].as_deferred()

    async def wait() -> None:
        await begin.wait()
        await inline()

    tasks.append(spawn(wait, reactor=clock))
    begin.set()
    assert not tasks[0].done
    tasks[0].cancel()
    assert tasks[0].cancelled
