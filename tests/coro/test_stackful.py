"""Stackful tasks: plain functions that wait, at any depth of their calls."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tests.coro.support import ExpectedError, call, listen, run, run_for_real
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    Cancelled,
    CancelScope,
    Channel,
    Condition,
    EndOfChannel,
    Event,
    Instrument,
    Lock,
    NoTaskError,
    Semaphore,
    Stream,
    Task,
    TaskGroup,
    TaskStatus,
    UnawaitedWarning,
    add_instrument,
    current_deadline,
    current_task,
    in_thread,
    move_on_after,
    remove_instrument,
    run_group,
    select,
    shield,
    sleep,
    spawn,
    statistics,
    symmetric,
    timeout,
    transfer,
)
from twisted_rtsig.coro.stackful import (
    NoStackError,
    entering,
    in_stackful,
    iterate,
    spawn_stackful,
    wait,
)
from twisted_rtsig.coro.testing import cancel_everywhere

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


def finish(clock: Clock, task: Task[Any]) -> Any:
    """Let time pass until a task has ended; its result."""
    for _ in range(1000):
        if task.done:
            return task.result()
        clock.advance(0.5)
    raise AssertionError(f"{task!r} waits for {task.waits_for()}")


# Each of these starts a stackful task that runs a function.
STARTS: dict[str, Callable[..., Task[Any]]] = {
    "spawn_stackful": spawn_stackful,
    "spawn": lambda function, **options: spawn(in_stackful, function, **options),
    "await": lambda function, **options: spawn(_awaits(function), **options),
    "in another one": lambda function, **options: spawn_stackful(
        lambda: wait(_awaits(function)), **options
    ),
}


async def _awaits(function: Callable[[], Any]) -> Any:
    return await in_stackful(function)


@pytest.fixture(params=STARTS)
def start(request: Any) -> Callable[..., Task[Any]]:
    started: Callable[..., Task[Any]] = STARTS[request.param]
    return started


# What it can wait for


async def _returns() -> str:
    await sleep(1)
    return "value"


async def _raises() -> None:
    await sleep(1)
    raise ExpectedError


def _generator() -> Generator[Any, Any, str]:
    yield sleep(1)
    return "value"


class _CanBeAwaited:
    def __await__(self) -> Generator[Any, Any, str]:
        yield from sleep(1).__await__()
        return "value"


def _later(clock: Clock, result: Any) -> Deferred[Any]:
    deferred: Deferred[Any] = Deferred()
    clock.callLater(1, deferred.callback, result)
    return deferred


def _sent() -> Channel[str]:
    channel: Channel[str] = Channel(1)
    channel.send("value")
    return channel


SUCCEED: dict[str, Callable[[Clock], Any]] = {
    "operation": lambda clock: spawn(_returns).as_deferred(),
    "finished operation": lambda clock: _sent().receive(),
    "channel": lambda clock: _sent(),
    "fired Deferred": lambda clock: succeed("value"),
    "Deferred": lambda clock: _later(clock, "value"),
    "task": lambda clock: spawn(_returns),
    "stackful task": lambda clock: spawn_stackful(lambda: wait(_returns())),
    "coroutine": lambda clock: _returns(),
    "generator": lambda clock: _generator(),
    "awaitable": lambda clock: _CanBeAwaited(),
    "in_stackful()": lambda clock: in_stackful(lambda: wait(_returns())),
}
FAIL: dict[str, Callable[[Clock], Any]] = {
    "failed Deferred": lambda clock: fail(ExpectedError()),
    "Deferred": lambda clock: _later(clock, Failure(ExpectedError())),
    "task": lambda clock: spawn(_raises),
    "coroutine": lambda clock: _raises(),
    "in_stackful()": lambda clock: in_stackful(lambda: wait(_raises())),
}


@pytest.mark.parametrize("what", set(SUCCEED) - {"channel"})
def test_what_succeeds(
    clock: Clock, start: Callable[..., Task[Any]], what: str
) -> None:
    def main() -> Any:
        return wait(SUCCEED[what](clock))

    assert finish(clock, start(main, reactor=clock)) == "value"


@pytest.mark.parametrize("what", FAIL)
def test_what_fails(clock: Clock, start: Callable[..., Task[Any]], what: str) -> None:
    def main() -> Any:
        with pytest.raises(ExpectedError):
            wait(FAIL[what](clock))
        # It goes on.
        return wait(_returns())

    assert finish(clock, start(main, reactor=clock)) == "value"


@pytest.mark.parametrize("what", [None, 3, "text", object()])
def test_what_cannot_be_awaited(
    clock: Clock, start: Callable[..., Task[Any]], what: Any
) -> None:
    task = start(lambda: wait(what), reactor=clock)
    with pytest.raises(TypeError, match=r"^wait\(\) needs an awaitable, not "):
        finish(clock, task)


def test_a_result_that_is_an_error_or_a_tuple(
    clock: Clock, start: Callable[..., Task[Any]]
) -> None:
    for result in ((), (1, 2), ExpectedError("returned"), None):
        assert finish(clock, start(lambda: wait(succeed(result)), reactor=clock)) is (
            result
        )
        assert finish(clock, start(lambda: result, reactor=clock)) is result


def test_at_any_depth(clock: Clock, start: Callable[..., Task[Any]]) -> None:
    """Functions in C that call back are no obstacle."""

    def key(value: int) -> int:
        wait(sleep(1))
        return -value

    class Values:
        def __iter__(self) -> Any:
            for value in range(4):
                wait(sleep(1))
                yield value

    def main() -> Any:
        return sorted(filter(lambda each: wait(succeed(True)), Values()), key=key)

    assert finish(clock, start(main, reactor=clock)) == [3, 2, 1, 0]


def test_many_at_once(clock: Clock) -> None:
    """They wait in turns."""
    seen: list[int] = []

    def main(number: int) -> None:
        for _ in range(3):
            wait(sleep(1))
            seen.append(number)

    tasks = [spawn_stackful(main, each, reactor=clock) for each in range(100)]
    for task in tasks:
        finish(clock, task)
    assert seen == [*range(100)] * 3


def test_on_every_reactor(reactor: Any) -> None:
    def handler(stream: Stream) -> None:
        for line in iterate(stream.lines()):
            wait(stream.write(b"<" + line + b">\n"))

    def client(stream: Stream) -> list[bytes]:
        got = []
        for line in (b"one\n", b"two\n"):
            wait(stream.write(line))
            got.append(wait(stream.read_line()))
        with pytest.raises(TimeoutError), timeout(0.01):
            wait(stream.read_line())
        wait(sleep(0.01))
        return got

    def main() -> list[bytes]:
        server = wait(listen(reactor, lambda stream: in_stackful(handler, stream)))
        with entering(wait(call(reactor, server))) as stream:
            got = client(stream)
        wait(server.stop())
        return got

    assert run(reactor, in_stackful, main) == [b"<one>", b"<two>"]


def test_threads(reactor: Any) -> None:
    assert run_for_real(
        reactor, lambda: in_stackful(lambda: wait(in_thread(sum, [1, 2])))
    ) == (3)


# Starting


def test_options(clock: Clock) -> None:
    def main(first: int, second: str) -> tuple[int, str]:
        assert current_task() is task[0]
        wait(sleep(1))
        assert current_task() is task[0]
        return first, second

    task: list[Task[tuple[int, str]]] = []
    scheduled: Deferred[None] = Deferred()

    def spawner() -> None:
        # It begins when this one waits.
        task.append(spawn_stackful(main, 1, "x"))
        assert task[0].reactor is clock
        wait(scheduled)

    spawn_stackful(spawner, reactor=clock)
    assert task[0].name.endswith("test_options.<locals>.main")
    assert repr(task[0]) == f"<Task {task[0].name}: active>"
    assert finish(clock, task[0]) == (1, "x")
    named = spawn_stackful(lambda: None, name="its name", reactor=clock)
    assert named.name == "its name"
    assert named.done
    scheduled.callback(None)


def test_names_of_what_is_spawned_by_in_stackful(clock: Clock) -> None:
    def main() -> None:
        wait(sleep(1))

    names = [
        spawn(in_stackful, main, reactor=clock).name,
        spawn(in_stackful(main), reactor=clock).name,
        spawn_stackful(main, reactor=clock).name,
    ]
    assert len(set(names)) == 1
    assert names[0].endswith(".main")
    assert spawn(in_stackful, main, name="other", reactor=clock).name == "other"


def test_keyword_arguments_of_in_stackful(clock: Clock) -> None:
    def main(first: int, *, second: int) -> int:
        wait(sleep(1))
        return first - second

    assert finish(clock, spawn(in_stackful(main, 3, second=1), reactor=clock)) == 2


async def _async_def() -> None:
    """No plain function."""


async def _async_generator() -> AsyncIterator[int]:
    yield 1


def test_what_is_no_plain_function(clock: Clock) -> None:
    for function in (_async_def, _generator):
        with pytest.raises(TypeError, match=r"plain functions.*use spawn\(\)"):
            spawn_stackful(function, reactor=clock)
        with pytest.raises(TypeError, match=r"plain functions.*use await"):
            in_stackful(function).close()
    for start in (spawn_stackful, in_stackful):
        with pytest.raises(TypeError, match=r"an asynchronous generator.*iterate\(\)"):
            start(_async_generator)
    with pytest.raises(TypeError, match="needs a function and its arguments"):
        spawn_stackful(3, reactor=clock)  # type: ignore[arg-type]


def test_statistics(clock: Clock) -> None:
    before = statistics(clock).tasks
    finish(clock, spawn_stackful(lambda: wait(sleep(1)), reactor=clock))
    cancelled = spawn_stackful(lambda: wait(sleep(1)), reactor=clock)
    cancelled.cancel()
    after = statistics(clock).tasks
    assert after.succeeded - before.succeeded == 1
    assert after.cancelled - before.cancelled == 1


# Where it does not work


def test_outside_of_any_task(clock: Clock) -> None:
    with pytest.raises(NoStackError, match=r"with spawn_stackful\(\)"):
        wait(Deferred())
    assert issubclass(NoStackError, NoTaskError)


def test_in_a_coroutine(clock: Clock) -> None:
    async def async_def() -> None:
        wait(Deferred())

    def generator() -> Generator[Any, Any, None]:
        yield sleep(1)
        wait(Deferred())

    for function in (async_def, generator):
        task: Task[None] = spawn(function, reactor=clock)
        with pytest.raises(NoStackError, match=r"write await.*await in_stackful\(\)"):
            finish(clock, task)


def test_in_a_thread(reactor: Any) -> None:
    def main() -> None:
        with pytest.raises(NoStackError, match=r"spawn_stackful"):
            wait(in_thread(lambda: wait(Deferred())))

    run_for_real(reactor, lambda: in_stackful(main))


def test_in_a_coroutine_that_a_stackful_task_waits_for(clock: Clock) -> None:
    """It is the same wherever the coroutine is awaited."""

    async def inner() -> None:
        await sleep(1)
        wait(Deferred())

    task = spawn_stackful(lambda: wait(inner()), reactor=clock)
    with pytest.raises(NoStackError, match="write await"):
        finish(clock, task)


def test_tasks_of_another_reactor(clock: Clock) -> None:
    """A stackful task runs them on its own stack: they must not wait with that."""
    other = Clock()

    async def coroutine() -> None:
        wait(Deferred())

    def stackful() -> str:
        wait(sleep(1))
        wait(sleep(1))
        return "value"

    def main() -> tuple[Task[None], Task[str]]:
        first = spawn(coroutine, reactor=other)
        second = spawn_stackful(stackful, reactor=other)
        wait(sleep(1))
        other.advance(1)
        wait(sleep(1))
        return first, second

    first, second = finish(clock, spawn_stackful(main, reactor=clock))
    with pytest.raises(NoStackError):
        first.result()
    assert not second.done
    other.advance(1)
    assert second.result() == "value"


def test_nested(clock: Clock) -> None:
    """Functions in coroutines in functions, and so on."""

    def function(depth: int) -> int:
        wait(sleep(0))
        if not depth:
            return 0
        return 1 + wait(coroutine(depth - 1))

    async def coroutine(depth: int) -> int:
        await sleep(0)
        if not depth:
            return 0
        return 1 + await in_stackful(function, depth - 1)

    assert finish(clock, spawn_stackful(function, 60, reactor=clock)) == 60
    assert finish(clock, spawn(coroutine, 60, reactor=clock)) == 60


@frees_at_once
def test_under_from_coroutine(clock: Clock) -> None:
    """There is no task, and so no timeout."""

    def main() -> str:
        with pytest.raises(NoTaskError), timeout(1):
            pass
        with pytest.raises(NoTaskError):
            current_task()
        wait(sleep(1, reactor=clock))
        wait(sleep(1, reactor=clock))
        wait(succeed(None))
        return "value"

    got: list[str] = []
    Deferred.fromCoroutine(in_stackful(main)).addCallback(got.append)
    clock.advance(1)
    clock.advance(1)
    assert got == ["value"]

    def within() -> str:
        # Neither is there one if it is started within a task.
        return wait(Deferred.fromCoroutine(in_stackful(main)))

    assert finish(clock, spawn_stackful(within, reactor=clock)) == "value"


# Cancellation and scopes

WAITS: dict[str, Callable[[], Any]] = {
    "operation": lambda: sleep(5),
    "Deferred": Deferred,
    "task": lambda: spawn(sleep, 5),
    "coroutine": _returns,
    "generator": _generator,
    "event": lambda: Event().wait(),
    "receive": lambda: Channel[int](0).receive(),
    "send": lambda: Channel[int](0).send(1),
    "select": lambda: select(Event()),
    "lock": lambda: Semaphore(0).acquire(),
    "in_stackful()": lambda: in_stackful(lambda: wait(Event().wait())),
    "stackful task": lambda: spawn_stackful(lambda: wait(Event().wait())),
}


@pytest.mark.parametrize("what", WAITS)
def test_cancelled_where_it_waits(
    clock: Clock, start: Callable[..., Task[Any]], what: str
) -> None:
    seen: list[Any] = []

    def main() -> None:
        try:
            wait(WAITS[what]())
        except Exception as error:
            seen.append(error)
        except Cancelled as cancelled:
            seen.append(cancelled.reason)
            raise
        finally:
            wait(sleep(1))
            seen.append("cleaned up")

    task = start(main, reactor=clock)
    clock.advance(0)
    task.cancel("the reason")
    with pytest.raises(CancelledError, match="the reason"):
        finish(clock, task)
    assert task.cancelled
    assert seen == ["the reason", "cleaned up"]
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("what", WAITS)
def test_timed_out_where_it_waits(
    clock: Clock, start: Callable[..., Task[Any]], what: str
) -> None:
    def main() -> str:
        with pytest.raises(TimeoutError, match=r"more than 0\.5 s"), timeout(0.5):
            wait(WAITS[what]())
        with move_on_after(0.5) as scope:
            wait(WAITS[what]())
        assert scope.expired
        return "went on"

    assert finish(clock, start(main, reactor=clock)) == "went on"
    assert not clock.getDelayedCalls()


def test_cancelled_before_it_begins(clock: Clock) -> None:
    seen: list[str] = []

    def main() -> None:
        seen.append("begun")
        wait(sleep(1))

    def spawner() -> Task[None]:
        task = spawn_stackful(main)
        task.cancel()
        return task

    task = spawn_stackful(spawner, reactor=clock).result()
    assert task.cancelled
    assert seen == ["begun"]


def test_shield(clock: Clock, start: Callable[..., Task[Any]]) -> None:
    seen: list[str] = []

    def main() -> None:
        with shield():
            wait(sleep(2))
            seen.append("shielded")
            with move_on_after(0.5):
                wait(sleep(1))
        seen.append("after")
        wait(sleep(1))
        seen.append("never")

    task = start(main, reactor=clock)
    task.cancel()
    with pytest.raises(CancelledError):
        finish(clock, task)
    assert seen == ["shielded", "after"]


def test_nested_scopes(clock: Clock, start: Callable[..., Task[Any]]) -> None:
    def main() -> str:
        with CancelScope() as outer, timeout(5):
            assert current_deadline() == clock.seconds() + 5
            clock.callLater(1, outer.cancel)
            wait(sleep(10))
        assert outer.cancelled
        with pytest.raises(TimeoutError), timeout(1), timeout(2):
            wait(in_stackful(lambda: wait(sleep(3))))
        return "the end"

    assert finish(clock, start(main, reactor=clock)) == "the end"


def test_a_scope_that_stays_open_fails_the_task(clock: Clock) -> None:
    """As in a coroutine, a scope that stays open fails the task."""

    def main() -> None:
        timeout(5).__enter__()

    task = spawn_stackful(main, reactor=clock)
    with pytest.raises(RuntimeError, match="was still open"):
        task.result()


def test_to_swallow_a_cancellation(clock: Clock) -> None:
    def main() -> str:
        with contextlib.suppress(Cancelled):
            wait(sleep(5))
        wait(sleep(1))
        return "went on"

    task = spawn_stackful(main, reactor=clock)
    task.cancel()
    assert finish(clock, task) == "went on"


def test_cancel_everywhere() -> None:
    left: list[str] = []

    def session(stream: Stream) -> None:
        try:
            with timeout(60):
                wait(stream.write(b"220 ready\n"))
                answer(stream)
        finally:
            left.append("left")

    def answer(stream: Stream) -> None:
        for line in iterate(stream.lines()):
            wait(coroutine(stream, line))

    async def coroutine(stream: Stream, line: bytes) -> None:
        await sleep(1)
        await stream.write(line + b"\n")

    async def client(stream: Stream) -> None:
        assert await stream.read_line() == b"220 ready"
        await stream.write(b"one\n")
        assert await stream.read_line() == b"one"

    # 220 ready; the line; the sleep; its answer; the end.
    assert cancel_everywhere(session, client) == 5
    assert left == ["left"] * 6


def test_cancel_everywhere_finds_faults() -> None:
    def swallows(stream: Stream) -> None:
        with contextlib.suppress(BaseException):
            wait(stream.read_line())

    def leaves(stream: Stream) -> None:
        spawn(sleep, 60)
        wait(stream.read())

    with pytest.raises(AssertionError, match=r"in swallows: .*the handler went on"):
        cancel_everywhere(swallows)
    with pytest.raises(AssertionError, match="left behind"):
        cancel_everywhere(leaves)


def test_cancel_everywhere_of_what_returns_a_coroutine() -> None:
    async def session(stream: Stream) -> None:
        await stream.write(b"x")
        await stream.read()

    assert cancel_everywhere(lambda stream: session(stream)) == 2


# Groups


def test_a_group(clock: Clock, start: Callable[..., Task[Any]]) -> None:
    def child(seconds: int) -> int:
        wait(sleep(seconds))
        return seconds

    def main() -> list[int]:
        with entering(TaskGroup()) as group:
            tasks = [group.spawn(in_stackful, child, each) for each in (1, 2)]
            tasks.append(group.spawn(in_stackful(child, 3)))
            assert tasks[0].name.endswith(".child")
        return [each.result() for each in tasks]

    assert finish(clock, start(main, reactor=clock)) == [1, 2, 3]


def test_a_group_that_fails(clock: Clock, start: Callable[..., Task[Any]]) -> None:
    seen: list[str] = []

    def fails() -> None:
        wait(sleep(1))
        raise ExpectedError

    def waits() -> None:
        try:
            wait(sleep(5))
        except Cancelled as cancelled:
            seen.append(str(cancelled.reason))
            raise

    def main() -> None:
        with entering(TaskGroup()) as group:
            group.spawn(in_stackful, fails)
            group.spawn(in_stackful, waits)
            waits()

    with pytest.raises(ExceptionGroup) as raised:
        finish(clock, start(main, reactor=clock))
    assert [type(each) for each in raised.value.exceptions] == [ExpectedError]
    assert [each.endswith(".fails has failed with ExpectedError") for each in seen] == [
        True
    ] * 2


def test_the_block_of_a_group_is_cancelled(
    clock: Clock, start: Callable[..., Task[Any]]
) -> None:
    tasks: list[Task[None]] = []

    def main() -> None:
        with entering(TaskGroup()) as group:
            tasks.append(group.spawn(in_stackful, lambda: wait(sleep(5))))
            wait(sleep(1))
            raise ExpectedError

    with pytest.raises(ExceptionGroup, match="1 of a group"):
        finish(clock, start(main, reactor=clock))
    assert tasks[0].cancelled
    task = start(main, reactor=clock)
    task.cancel()
    with pytest.raises(CancelledError):
        finish(clock, task)


def test_start_of_a_group(clock: Clock) -> None:
    def child(number: int, *, task_status: TaskStatus[int]) -> None:
        wait(sleep(1))
        task_status.started(number)
        wait(sleep(1))

    def main() -> tuple[int, float]:
        with entering(TaskGroup()) as group:
            value = wait(group.start(in_stackful, child, 7))
        return value, clock.seconds()

    assert finish(clock, spawn_stackful(main, reactor=clock)) == (7, 2)


def test_run_group(clock: Clock) -> None:
    def body(group: TaskGroup) -> str:
        group.spawn(sleep, 1)
        return wait(_returns())

    def main() -> str:
        value: str = wait(run_group(lambda group: in_stackful(body, group)))
        return value

    assert finish(clock, spawn_stackful(main, reactor=clock)) == "value"


# Managers and iterators of coroutines


def test_locks(clock: Clock, start: Callable[..., Task[Any]]) -> None:
    lock, condition = Lock(), Condition()
    seen: list[int] = []

    def use(number: int) -> None:
        with entering(lock):
            seen.append(number)
            wait(sleep(1))
            seen.append(number)

    def main() -> None:
        with entering(TaskGroup()) as group:
            group.spawn(in_stackful, use, 1)
            group.spawn(in_stackful, use, 2)
        with entering(condition), move_on_after(1):
            wait(condition.wait())
        with pytest.raises(ExpectedError), entering(lock):
            raise ExpectedError
        assert not lock.locked

    finish(clock, start(main, reactor=clock))
    assert seen == [1, 1, 2, 2]


class _Manager:
    """An asynchronous context manager."""

    def __init__(self, swallows: bool = False) -> None:
        self.swallows = swallows
        self.seen: list[type | None] = []

    async def __aenter__(self) -> str:
        await sleep(1)
        return "entered"

    async def __aexit__(self, kind: type | None, *rest: object) -> bool:
        self.seen.append(kind)
        await sleep(1)
        return self.swallows


def test_entering(clock: Clock) -> None:
    def main() -> None:
        manager = _Manager()
        with entering(manager) as value:
            assert value == "entered"
        with pytest.raises(ExpectedError), entering(manager):
            raise ExpectedError
        assert manager.seen == [None, ExpectedError]
        manager = _Manager(swallows=True)
        with entering(manager):
            raise ExpectedError
        with entering(manager), move_on_after(1):
            wait(sleep(5))
        assert manager.seen == [ExpectedError, None]

    finish(clock, spawn_stackful(main, reactor=clock))


def test_iterate(clock: Clock) -> None:
    channel: Channel[int] = Channel(0)

    def send() -> None:
        for each in range(3):
            wait(channel.send(each))
        channel.close()

    def main() -> list[int]:
        spawn_stackful(send)
        return [each + wait(succeed(1)) for each in iterate(channel)]

    assert finish(clock, spawn_stackful(main, reactor=clock)) == [1, 2, 3]


# Channels and transfer


def test_channels(clock: Clock, start: Callable[..., Task[Any]]) -> None:
    there: Channel[int] = Channel(0)
    back: Channel[int] = Channel(1)

    async def answers() -> None:
        async for each in there:
            await back.send(2 * each)
        back.close()

    def main() -> list[int]:
        spawn(answers)
        got = []
        for each in range(3):
            wait(there.send(each))
            got.append(wait(back.receive()))
        there.close()
        with pytest.raises(EndOfChannel):
            wait(back.receive())
        event = Event()
        clock.callLater(1, event.set)
        assert wait(select(Channel[int](0), event))[0] is event
        return got

    assert finish(clock, start(main, reactor=clock)) == [0, 2, 4]


def test_transfer(clock: Clock) -> None:
    def answers(caller: Task[Any], value: int) -> int:
        for _ in range(3):
            value = wait(transfer(caller, value + 1))
        return value * 10

    def main() -> list[int]:
        other = symmetric(in_stackful, answers, current_task())
        return [wait(transfer(other, each)) for each in (1, 2, 3, 4)]

    assert finish(clock, spawn_stackful(main, reactor=clock)) == [2, 3, 4, 40]


def test_transfers_in_a_circle(clock: Clock) -> None:
    """Flat, however many."""
    count = 5_000

    def player(pair: list[Any], mine: int, value: int) -> int:
        while value < count:
            value = wait(transfer(pair[1 - mine], value + 1))
        return value

    def main() -> int:
        pair: list[Any] = []
        pair += [symmetric(in_stackful, player, pair, each) for each in (0, 1)]
        last: int = wait(transfer(pair[0], 0))
        return last

    assert finish(clock, spawn_stackful(main, reactor=clock)) == count


# With the rest of the package


@frees_at_once
def test_a_forgotten_wait(
    clock: Clock, start: Callable[..., Task[Any]], recwarn: Any, debug_on: None
) -> None:
    # Other tests may have left operations to the garbage collector.
    gc.collect()
    recwarn.clear()

    def main() -> str:
        wait(sleep(1))
        with timeout(1):
            wait(succeed(None))
        wait(Channel[int](1).send(1))
        assert wait(_sent().receive()) == "value"
        with entering(Lock()):
            pass
        for warned in (True, False):
            operation = sleep(1)
            if not warned:
                wait(operation)
            del operation
            gc.collect()
        return wait(_returns())

    assert finish(clock, start(main, reactor=clock)) == "value"
    warnings = [each for each in recwarn if each.category is UnawaitedWarning]
    assert [each.filename for each in warnings] == [__file__]


def test_transfer_in_debug_mode(clock: Clock, debug_on: None) -> None:
    test_transfer(clock)


def test_instruments(clock: Clock) -> None:
    steps: list[str] = []

    class Counts(Instrument):
        def before_task_step(self, task: Task[Any]) -> None:
            steps.append("before")

        def after_task_step(self, task: Task[Any]) -> None:
            steps.append("after")

    def main() -> Task[Any]:
        wait(sleep(1))
        wait(sleep(1))
        return current_task()

    instrument = Counts()
    add_instrument(instrument, clock)
    task = spawn_stackful(main, reactor=clock)
    assert finish(clock, task) is task
    assert steps == ["before", "after"] * 3
    # One that comes while the task waits.
    remove_instrument(instrument, clock)
    task = spawn_stackful(main, reactor=clock)
    add_instrument(instrument, clock)
    finish(clock, task)
    remove_instrument(instrument, clock)
    assert len(steps) == 10


# asyncio


def asyncio_reactors() -> list[Any]:
    from tests.coro.test_asyncio_bridge import _REACTORS

    return [pytest.param(make, id=name) for name, make in _REACTORS.items()]


@pytest.fixture(params=asyncio_reactors())
def asyncio_reactor(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from tests.support import dispose

    made = request.param()
    monkeypatch.setitem(sys.modules, "twisted.internet.reactor", made)
    monkeypatch.setattr("twisted.internet.reactor", made, raising=False)
    yield made
    dispose(made)
    made._asyncioEventloop.close()


def test_futures_of_asyncio(asyncio_reactor: Any) -> None:
    async def value() -> str:
        await asyncio.sleep(0.001)
        return "value"

    def main() -> str:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()
        loop.call_later(0.001, future.set_result, "value")
        assert wait(future) == "value"
        current: Any = asyncio.current_task()
        assert current.task() is current_task()
        assert wait(asyncio.create_task(value())) == "value"
        assert asyncio.current_task() is current
        assert [*wait(asyncio.gather(value(), value()))] == ["value"] * 2
        wait(asyncio.sleep(0))
        failing: asyncio.Future[str] = loop.create_future()
        loop.call_soon(failing.set_exception, ExpectedError())
        with pytest.raises(ExpectedError):
            wait(failing)
        waiting = asyncio.create_task(asyncio.sleep(60))
        with move_on_after(0.01) as scope:
            wait(waiting)
        assert scope.expired
        assert waiting.cancelled()
        if sys.version_info >= (3, 11):
            with pytest.raises(TimeoutError), entering(asyncio.timeout(0.01)):
                wait(Event().wait())
            with entering(asyncio.TaskGroup()) as group:
                group.create_task(value())
        return wait(value())

    assert run_for_real(asyncio_reactor, lambda: spawn_stackful(main)) == "value"


def test_tasks_of_asyncio(asyncio_reactor: Any) -> None:
    """They can await a plain function, too."""

    def main() -> str:
        wait(sleep(0.001))
        wait(succeed(None))
        assert wait(_sent().receive()) == "value"
        assert wait(asyncio.sleep(0.001, "x")) == "x"
        channel: Channel[str] = Channel(0)
        channel.send("value")
        return wait(channel.receive())

    async def outer() -> Any:
        return await asyncio.create_task(in_stackful(main))

    assert run_for_real(asyncio_reactor, lambda: outer()) == "value"


# Without greenlet

WITHOUT = """
import sys
sys.modules["greenlet"] = None
import twisted_rtsig.coro
try:
    import twisted_rtsig.coro.stackful
except ImportError as error:
    print(error)
"""


def test_without_greenlet() -> None:
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    ).stdout
    assert "pip install 'twisted-rtsig[greenlet]'" in said


NOTHING_ELSE = """
import sys
import twisted_rtsig.coro.testing
import twisted_rtsig.files
from twisted.internet.task import Clock
from twisted_rtsig.coro import format_tasks, sleep, spawn
from twisted_rtsig.coro.testing import cancel_everywhere

async def session(stream):
    await stream.read()

cancel_everywhere(session)
spawn(sleep, 1, reactor=Clock())
format_tasks()
assert "greenlet" not in sys.modules, "greenlet"
"""


def test_nothing_else_imports_greenlet() -> None:
    subprocess.run([sys.executable, "-c", NOTHING_ELSE], check=True)
