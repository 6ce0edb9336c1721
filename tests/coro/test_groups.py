"""Groups: tasks that are started until they are ready, and reasons to cancel them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.task import Clock

from tests.coro.support import ExpectedError, call, forgets_awaits, listen, run
from twisted_rtsig.coro import (
    TASK_STATUS_IGNORED,
    Cancelled,
    Channel,
    Event,
    Stream,
    Task,
    TaskGroup,
    TaskStatus,
    coroutine,
    current_task,
    format_tasks,
    run_group,
    shield,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.testing import cancel_everywhere

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


# Tasks that are started, in each style


def report(status: TaskStatus[Any], value: Any) -> None:
    """Report a task as started with *value*, unless that is an error or None."""
    if isinstance(value, Exception):
        raise value
    if value is not None:
        status.started(value)


async def becomes_ready(
    clock: Clock, value: Any, *, task_status: TaskStatus[Any] = TASK_STATUS_IGNORED
) -> str:
    """It takes a second to get ready, or to fail if *value* is an error."""
    await sleep(1, clock)
    report(task_status, value)
    await sleep(1, clock)
    return "done"


def becomes_ready_yielding(
    clock: Clock, value: Any, *, task_status: TaskStatus[Any] = TASK_STATUS_IGNORED
) -> Generator[Any, Any, str]:
    yield sleep(1, clock)
    report(task_status, value)
    yield sleep(1, clock)
    return "done"


STARTED: dict[str, Callable[..., Any]] = {
    "async def": becomes_ready,
    "generator": becomes_ready_yielding,
    "@coroutine": coroutine(becomes_ready_yielding),
    "@inlineCallbacks": inlineCallbacks(becomes_ready_yielding),
}
started = pytest.mark.parametrize("function", STARTED)


async def _start(function: Any, got: list[Any], *args: Any) -> None:
    async with TaskGroup() as group:
        try:
            got.append(await group.start(function, *args))
        except Exception as error:
            got.append(error)
        got.append(group)


def _starts(
    function: Any, got: list[Any], *args: Any
) -> Callable[[TaskGroup], Generator[Any, Any, None]]:
    """The same as a generator, for :func:`run_group`."""

    def block(group: TaskGroup) -> Generator[Any, Any, None]:
        try:
            got.append((yield group.start(function, *args)))
        except Exception as error:
            got.append(error)
        got.append(group)

    return block


def _start_yielding(*args: Any) -> Any:
    return run_group(_starts(*args))


@inlineCallbacks
def _start_inline(*args: Any) -> Generator[Any, Any, None]:
    yield run_group(inlineCallbacks(_starts(*args)))


# Each runs a group, starts a task in it, and appends what comes of that.
CALLERS: dict[str, Callable[..., Any]] = {
    "async def": _start,
    "generator": _start_yielding,
    "@inlineCallbacks": _start_inline,
}
callers = pytest.mark.parametrize("caller", CALLERS)


@callers
@started
def test_start_waits_until_ready(clock: Clock, caller: str, function: str) -> None:
    got: list[Any] = []
    task = spawn(CALLERS[caller], STARTED[function], got, clock, "ready", reactor=clock)
    assert got == []
    clock.advance(1)
    assert got[0] == "ready"
    # The group waits for the task that was started.
    assert not task.done
    clock.advance(1)
    assert task.result() is None
    assert not clock.getDelayedCalls()


@callers
@started
def test_a_task_that_fails_before_it_is_ready(
    clock: Clock, caller: str, function: str, logged: list[Any]
) -> None:
    """``start`` raises its error, and the group goes on."""
    got: list[Any] = []
    task = spawn(
        CALLERS[caller], STARTED[function], got, clock, ExpectedError(), reactor=clock
    )
    clock.advance(1)
    error, group = got
    assert type(error) is ExpectedError
    assert not group.cancelled
    task.result()
    got.clear()
    del task, error, group
    gc.collect()
    assert not logged


@callers
@started
def test_a_task_that_returns_before_it_is_ready(
    clock: Clock, caller: str, function: str
) -> None:
    got: list[Any] = []
    task = spawn(CALLERS[caller], STARTED[function], got, clock, None, reactor=clock)
    clock.pump([1, 1])
    error, group = got
    assert type(error) is RuntimeError
    assert "becomes_ready" in str(error)
    assert "task_status.started()" in str(error)
    assert not group.cancelled
    task.result()


@started
def test_the_function_can_be_called_directly(clock: Clock, function: str) -> None:
    task = spawn(STARTED[function], clock, "ready", reactor=clock)
    clock.pump([1, 1])
    assert task.result() == "done"


def test_a_task_that_is_ready_at_once(clock: Clock) -> None:
    async def at_once(*, task_status: TaskStatus[None]) -> None:
        task_status.started()

    async def main() -> Any:
        async with TaskGroup() as group:
            return await group.start(at_once)

    assert spawn(main, reactor=clock).result() is None


@pytest.mark.parametrize("in_callback", [False, True])
def test_a_task_started_by_a_callback(clock: Clock, in_callback: bool) -> None:
    """It runs before ``start`` returns."""
    got: list[Any] = []

    async def at_once(*, task_status: TaskStatus[int]) -> None:
        task_status.started(1)

    async def main() -> None:
        async with TaskGroup() as group:
            if in_callback:
                clock.callLater(0, lambda: group.start(at_once).addCallback(got.append))
            else:
                group.start(at_once).addCallback(got.append)
            await sleep(1)

    task = spawn(main, reactor=clock)
    clock.pump([0, 1])
    task.result()
    assert got == [1]


def test_a_task_that_fails_after_it_is_ready(clock: Clock) -> None:
    async def fails(*, task_status: TaskStatus[int]) -> None:
        task_status.started(1)
        await sleep(1)
        raise ExpectedError

    async def main() -> None:
        async with TaskGroup() as group:
            assert await group.start(fails) == 1
            await sleep(60)

    task = spawn(main, reactor=clock)
    clock.advance(1)
    with pytest.raises(ExceptionGroup) as caught:
        task.result()
    assert [type(each) for each in caught.value.exceptions] == [ExpectedError]


def test_reporting_ready_twice_raises(clock: Clock) -> None:
    kept: list[TaskStatus[Any]] = []

    async def twice(*, task_status: TaskStatus[int]) -> None:
        kept.append(task_status)
        task_status.started(1)
        with pytest.raises(RuntimeError, match="again"):
            task_status.started(2)

    async def main() -> Any:
        async with TaskGroup() as group:
            return await group.start(twice)

    assert spawn(main, reactor=clock).result() == 1
    with pytest.raises(RuntimeError, match="after the task had ended"):
        kept[0].started(3)


def test_starting_a_function_with_wrong_arguments(clock: Clock) -> None:
    async def takes_no_status() -> None:
        raise AssertionError

    async def main() -> None:
        async with TaskGroup() as group:
            with pytest.raises(TypeError, match="task_status"):
                await group.start(takes_no_status)
            with pytest.raises(TypeError):
                await group.start(None)  # type: ignore[arg-type]

    spawn(main, reactor=clock).result()


def test_start_outside_of_the_block_raises(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="outside of its block"):
        TaskGroup().start(becomes_ready, clock, "ready")


def test_the_name_of_a_started_task(clock: Clock) -> None:
    async def names(*, task_status: TaskStatus[str]) -> None:
        task_status.started(current_task().name)

    async def main() -> None:
        async with TaskGroup() as group:
            assert (await group.start(names)).endswith("<locals>.names")
            assert await group.start(names, name="Ann") == "Ann"

    spawn(main, reactor=clock).result()


def test_format_tasks_says_what_waits_for_a_start(clock: Clock) -> None:
    async def main() -> None:
        async with TaskGroup() as group:
            await group.start(becomes_ready, clock, "ready", name="Ann")

    task = spawn(main, reactor=clock)
    assert "waits for the start of <Task Ann: active>" in format_tasks(clock)
    clock.pump([1, 1])
    task.result()


# Cancellation of a start


@pytest.mark.parametrize("how", ["task", "timeout", "group", "other group"])
def test_a_start_that_is_cancelled_waits_for_the_end_of_the_task(
    clock: Clock, how: str
) -> None:
    seen: list[str] = []

    async def cleans_up(*, task_status: TaskStatus[int]) -> None:
        try:
            await sleep(60)
        finally:
            await sleep(1)
            seen.append("cleaned up")

    async def starts(group: TaskGroup) -> None:
        try:
            with timeout(1 if how == "timeout" else 60):
                await group.start(cleans_up)
        except TimeoutError:
            seen.append("timed out")
        except Cancelled as error:
            seen.append(f"cancelled: {error}")
            raise

    groups: list[TaskGroup] = []

    async def main() -> None:
        async with TaskGroup() as outer:
            async with TaskGroup() as group:
                groups.append(group)
                if how == "other group":
                    outer.spawn(starts, group)
                    await sleep(60)
                else:
                    await starts(group)
            seen.append("left")

    task = spawn(main, reactor=clock)
    if how == "task":
        task.cancel("why")
    elif how == "timeout":
        clock.advance(1)
    else:
        groups[0].cancel("why")
    assert not task.done
    clock.advance(1)
    if how == "task":
        assert task.cancelled
        assert seen == ["cleaned up", "cancelled: why"]
    elif how == "timeout":
        task.result()
        assert seen == ["cleaned up", "timed out", "left"]
    elif how == "group":
        task.result()
        assert seen == ["cleaned up", "cancelled: why", "left"]
    else:
        # What has called start() is not in the group, and was not cancelled.
        with pytest.raises(ExceptionGroup, match="1 of a group") as caught:
            task.result()
        (error,) = caught.value.exceptions
        assert isinstance(error, CancelledError)
        assert "was cancelled: why" in str(error)
        assert seen == ["cleaned up", "left"]
    assert not clock.getDelayedCalls()


def test_a_task_that_is_ready_in_spite_of_its_cancellation(clock: Clock) -> None:
    """It stays in the group, ``start`` has a result, and the next wait is cancelled."""
    seen: list[Any] = []

    async def goes_on(*, task_status: TaskStatus[str]) -> None:
        try:
            await sleep(60)
        except Cancelled:
            task_status.started("ready")
        await sleep(5)
        seen.append("done")

    async def main() -> None:
        async with TaskGroup() as group:
            with timeout(1) as limit:
                seen.append(await group.start(goes_on))
            assert not limit.expired

    task = spawn(main, reactor=clock)
    clock.pump([1, 4, 1])
    task.result()
    assert seen == ["ready", "done"]


def test_a_task_that_fails_when_its_start_is_cancelled(clock: Clock) -> None:
    async def fails(*, task_status: TaskStatus[str]) -> None:
        try:
            await sleep(60)
        finally:
            await sleep(1)
            raise ExpectedError

    async def main() -> None:
        async with TaskGroup() as group:
            with pytest.raises(ExpectedError), timeout(1):
                await group.start(fails)
            assert not group.cancelled

    task = spawn(main, reactor=clock)
    clock.pump([1, 1])
    task.result()


def test_a_start_in_a_group_that_is_cancelled(clock: Clock) -> None:
    async def main() -> str:
        async with TaskGroup() as group:
            group.cancel("why")
            with shield(), pytest.raises(CancelledError, match="cancelled: why"):
                await group.start(becomes_ready, clock, "ready")
        return "went on"

    task = spawn(main, reactor=clock)
    assert task.result() == "went on"
    assert not clock.getDelayedCalls()


def test_a_deferred_of_a_start_is_cancelled(clock: Clock) -> None:
    failures: list[Any] = []

    async def main() -> None:
        async with TaskGroup() as group:
            starting = group.start(becomes_ready, clock, "ready")
            starting.addErrback(failures.append)
            starting.cancel()

    task = spawn(main, reactor=clock)
    task.result()
    assert [each.type for each in failures] == [CancelledError]
    assert not clock.getDelayedCalls()


@forgets_awaits
def test_the_group_waits_for_a_task_that_is_not_ready(clock: Clock) -> None:
    async def main() -> None:
        async with TaskGroup() as group:
            group.start(becomes_ready, clock, "ready")

    task = spawn(main, reactor=clock)
    clock.advance(1)
    assert not task.done
    clock.advance(1)
    task.result()


def test_start_on_a_reactor(reactor: Any) -> None:
    """A real use: the start of a server returns its port."""

    async def serves(*, task_status: TaskStatus[Any]) -> None:
        async def handler(stream: Stream) -> None:
            await stream.write(b"hello\n")

        server = await listen(reactor, handler)
        task_status.started(server)
        try:
            await Event().wait()
        finally:
            await server.stop()

    async def main() -> bytes:
        async with TaskGroup() as group:
            server = await group.start(serves)
            async with await call(reactor, server) as stream:
                line = await stream.read_line()
            group.cancel()
        return line

    assert run(reactor, main) == b"hello"


def test_cancelled_everywhere() -> None:
    async def reads(stream: Stream, *, task_status: TaskStatus[bytes]) -> None:
        task_status.started(await stream.read_line())
        await stream.read_line()

    async def handler(stream: Stream) -> None:
        async with TaskGroup() as group:
            assert await group.start(reads, stream) == b"one"
            await sleep(1)

    def handler_yielding(stream: Stream) -> Generator[Any, Any, None]:
        def block(group: TaskGroup) -> Generator[Any, Any, None]:
            assert (yield group.start(reads, stream)) == b"one"
            yield sleep(1)

        yield run_group(block)

    async def peer(stream: Stream) -> None:
        await sleep(1)
        await stream.write(b"one\n")
        await sleep(2)
        await stream.write(b"two\n")
        await stream.write_eof()

    assert cancel_everywhere(handler, peer) == 3
    assert cancel_everywhere(handler_yielding, peer) == 1


# Groups that are cancelled as a whole


async def waits(told: list[str]) -> None:
    try:
        await Event().wait()
    except Cancelled as error:
        told.append(str(error))
        raise


@pytest.mark.parametrize("at", ["before", "inside", "outside"])
def test_cancelling_a_group_for_a_reason(clock: Clock, at: str) -> None:
    told: list[str] = []
    groups: list[TaskGroup] = [TaskGroup()]

    async def nested() -> None:
        async with TaskGroup() as group:
            group.spawn(waits, told)
            await waits(told)

    async def main() -> str:
        group = groups[0]
        if at == "before":
            group.cancel("why")
        async with group:
            tasks = [group.spawn(waits, told), group.spawn(nested)]
            if at != "before":
                await sleep(0)
            if at == "inside":
                group.cancel("why")
            await waits(told)
        assert all(each.cancelled for each in tasks)
        return "went on"

    task = spawn(main, reactor=clock)
    clock.advance(0)
    if at == "outside":
        groups[0].cancel("why")
        groups[0].cancel("again")
    assert task.result() == "went on"
    assert told == ["why"] * 4
    assert groups[0].cancelled


@pytest.mark.parametrize("at_once", [True, False])
def test_tasks_of_a_group_that_wait_for_each_other(clock: Clock, at_once: bool) -> None:
    """Each is cancelled once, and their errors are a part of the cancellation."""
    told: list[str] = []
    groups: list[TaskGroup] = []

    async def cleans_up() -> None:
        try:
            await waits(told)
        finally:
            await sleep(1)
            told.append("cleaned up")

    async def waits_for(other: Task[None]) -> None:
        try:
            await other
        except Cancelled as error:
            told.append(f"waiter: {error}")
            raise

    async def main() -> None:
        async with TaskGroup() as group:
            groups.append(group)
            one = group.spawn(cleans_up)
            two = group.spawn(waits_for, one)
            await sleep(0)
            if at_once:
                group.cancel("why")
            await waits_for(two)

    task = spawn(main, reactor=clock)
    clock.advance(0)
    if not at_once:
        groups[0].cancel("why")
    clock.advance(1)
    task.result()
    assert told == ["why", "cleaned up", "waiter: why", "waiter: why"]


def test_a_task_spawned_during_the_cancellation(clock: Clock) -> None:
    """A task of the group that cleans up spawns it."""
    told: list[str] = []

    async def spawns(group: TaskGroup) -> None:
        try:
            await Event().wait()
        finally:
            group.spawn(waits, told)

    async def main() -> None:
        async with TaskGroup() as group:
            group.spawn(spawns, group)
            await sleep(0)
            group.cancel("why")

    task = spawn(main, reactor=clock)
    clock.advance(0)
    task.result()
    assert told == ["why"]


@pytest.mark.parametrize("in_block", [True, False])
def test_a_failure_is_the_reason(clock: Clock, in_block: bool) -> None:
    told: list[str] = []

    async def fails() -> None:
        await sleep(1)
        raise ExpectedError

    async def main() -> None:
        async with TaskGroup() as group:
            group.spawn(waits, told)
            if in_block:
                await fails()
            group.spawn(fails, name="Ann")
            await waits(told)

    task = spawn(main, reactor=clock)
    clock.advance(1)
    with pytest.raises(ExceptionGroup):
        task.result()
    if in_block:
        assert told == ["the block of the group has failed with ExpectedError"]
    else:
        assert told == ["Ann has failed with ExpectedError"] * 2


# Reasons


@pytest.mark.parametrize("reason", [None, "no longer wanted"])
def test_the_reason_is_in_the_error(clock: Clock, reason: str | None) -> None:
    """In the task, in what it waits for, and outside of the group."""
    told: list[str] = []

    async def main() -> None:
        try:
            await spawn(waits, told)
        except Cancelled as error:
            told.append(error.reason or "")
            raise

    task = spawn(main, reactor=clock, name="Ann")
    task.cancel(reason)
    assert told == [reason or ""] * 2
    outside = "Ann was cancelled" + ("" if reason is None else f": {reason}")
    with pytest.raises(CancelledError) as caught:
        task.result()
    assert str(caught.value) == outside
    seen: list[Any] = []
    task.as_deferred().addErrback(seen.append)
    assert seen[0].getErrorMessage() == outside


def test_the_reason_passes_through_deferreds(clock: Clock) -> None:
    told: list[str] = []

    @inlineCallbacks
    def between() -> Generator[Any, Any, None]:
        yield spawn(waits, told).as_deferred()

    task = spawn(between, reactor=clock)
    task.cancel("why")
    assert told == ["why"]
    assert task.cancelled


def test_the_reason_reaches_a_group_for_generators(clock: Clock) -> None:
    told: list[str] = []

    def block(group: TaskGroup) -> Generator[Any, Any, None]:
        group.spawn(waits, told)
        yield spawn(waits, told)

    @coroutine
    def main() -> Generator[Any, Any, None]:
        yield run_group(block)

    task = spawn(main, reactor=clock)
    task.cancel("why")
    assert task.cancelled
    assert told == ["why"] * 2


def test_the_reason_of_a_task_that_was_not_started() -> None:
    from twisted_rtsig.coro import symmetric

    task = symmetric(lambda value: None)
    task.cancel("why")
    with pytest.raises(CancelledError, match="was cancelled: why"):
        task.result()


def test_the_reason_comes_after_a_shield(clock: Clock) -> None:
    told: list[str] = []
    values: Channel[None] = Channel(0)

    async def main() -> None:
        with shield():
            await values.receive()
        await waits(told)

    task = spawn(main, reactor=clock, name="Ann")
    task.cancel("why")
    assert "values, 0 senders and 1 receivers wait>, to be cancelled: why" in (
        format_tasks(clock)
    )
    values.send(None)
    assert told == ["why"]
    assert task.cancelled


def test_a_stopping_server_gives_a_reason(reactor: Any) -> None:
    told: list[str] = []

    async def handler(stream: Stream) -> None:
        await waits(told)

    async def main() -> None:
        server = await listen(reactor, handler)
        async with await call(reactor, server):
            while not server.factory.connections:
                await sleep(0)
            await server.stop(grace=0.01)

    run(reactor, main)
    assert told == ["the server stops, and its grace of 0.01 s is over"]


def test_a_lost_connection_gives_a_reason(reactor: Any) -> None:
    told: list[str] = []
    ended: Deferred[None] = Deferred()

    async def handler(stream: Stream) -> None:
        try:
            await waits(told)
        finally:
            ended.callback(None)

    async def main() -> None:
        server = await listen(reactor, handler, cancel_on_loss=True)
        async with await call(reactor, server):
            pass
        await ended
        await server.stop()

    run(reactor, main)
    assert told == ["the connection was lost"]
