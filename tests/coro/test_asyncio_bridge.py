"""Tasks that await awaitables of asyncio, and asyncio's tasks that await Deferreds."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import subprocess
import sys
import textwrap
import traceback
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
from twisted.internet import defer
from twisted.internet.defer import Deferred, inlineCallbacks, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tests.coro import conftest
from tests.coro.support import (
    ExpectedError,
    call,
    connected,
    failures,
    listen,
    run,
    run_for_real,
)
from tests.coro.test_garbage import garbage, without_collector
from tests.support import DEADLINE, dispose, each_of, frees_at_once
from twisted_rtsig.coro import (
    Cancelled,
    CancelScope,
    Channel,
    Event,
    Instrument,
    Lock,
    NoTaskError,
    Stream,
    TaskGroup,
    add_instrument,
    coroutine,
    current_task,
    format_tasks,
    from_asyncio,
    move_on_after,
    remove_instrument,
    run_group,
    select,
    set_debug,
    shield,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.testing import cancel_everywhere

if sys.version_info >= (3, 11):
    from builtins import BaseExceptionGroup
else:
    from exceptiongroup import BaseExceptionGroup

since_311 = pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio has it not")

variable = contextvars.ContextVar("variable", default="none")

Body = Callable[[], Coroutine[Any, Any, Any]]


def _ours() -> Any:
    from twisted_rtsig.asyncioreactor import AsyncioReactor

    return AsyncioReactor(asyncio.new_event_loop())


# The reactors that have an event loop of asyncio.
_REACTORS: dict[str, Callable[[], Any]] = {"asyncio": conftest._asyncio}
if sys.platform.startswith("linux"):
    _REACTORS["rtsig-asyncio"] = _ours


@pytest.fixture(params=each_of(_REACTORS))
def reactor(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made = _REACTORS[request.param]()
    monkeypatch.setitem(sys.modules, "twisted.internet.reactor", made)
    monkeypatch.setattr("twisted.internet.reactor", made, raising=False)
    yield made
    dispose(made)
    made._asyncioEventloop.close()


# The errors that an awaited body may end with.
ENDS = (ExpectedError, BaseExceptionGroup, asyncio.CancelledError, defer.CancelledError)


# Bodies of coroutines, which pause by asyncio or by this package.  Each appends to a
# list what happens to it.


async def pause_of_asyncio() -> None:
    await asyncio.sleep(0.001)


async def pause_of_ours() -> None:
    await sleep(0.001)


def returns(pause: Any, told: list[str]) -> Body:
    async def body() -> str:
        await pause()
        return "value"

    return body


def raises(pause: Any, told: list[str]) -> Body:
    async def body() -> None:
        await pause()
        innermost()

    return body


def innermost() -> None:
    raise ExpectedError("why")


def waits(pause: Any, told: list[str]) -> Body:
    """A body that waits until it is cancelled, and cleans up before it ends."""

    async def body() -> None:
        told.append("waits")
        try:
            while True:
                await pause()
        except (asyncio.CancelledError, defer.CancelledError):
            await pause()
            told.append("cleaned up")
            raise

    return body


# Awaitables of asyncio


async def in_group(body: Body) -> Any:
    group: Any = asyncio.TaskGroup()
    async with group:
        task = group.create_task(body())
    return task.result()


async def in_timeout(body: Body) -> Any:
    async with asyncio.timeout(DEADLINE):
        return await body()


async def gathered(body: Body) -> Any:
    return (await asyncio.gather(body()))[0]


async def bare_yields(body: Body) -> Any:
    await asyncio.sleep(0)
    return await body()


OF_ASYNCIO: dict[str, Callable[[Body], Awaitable[Any]]] = {
    "task": lambda body: asyncio.ensure_future(body()),
    "coroutine": lambda body: body(),
    "gather": gathered,
    "wait_for": lambda body: asyncio.wait_for(body(), DEADLINE),
    "bare yields": bare_yields,
}
if sys.version_info >= (3, 11):
    OF_ASYNCIO["timeout"] = in_timeout
    OF_ASYNCIO["TaskGroup"] = in_group


# Ways to await an awaitable: each returns a Deferred of its result, which can be
# cancelled

Make = Callable[[], Awaitable[Any]]


async def awaits(make: Make) -> Any:
    return await make()


def yields(make: Make) -> Any:
    return (yield make())


@inlineCallbacks
def yields_to_twisted(make: Make) -> Any:
    return (yield from_asyncio(make()))


async def awaits_under_twisted(make: Make) -> Any:
    return await from_asyncio(make())


STYLES: dict[str, Callable[[Make], Deferred[Any]]] = {
    "async def": lambda make: spawn(awaits, make).as_deferred(),
    "generator": lambda make: spawn(yields, make).as_deferred(),
    "@coroutine": coroutine(yields),
    "run_group": lambda make: run_group(lambda group: make()),
    "inlineCallbacks": yields_to_twisted,
    "fromCoroutine": lambda make: Deferred.fromCoroutine(awaits_under_twisted(make)),
    "callbacks": lambda make: from_asyncio(make()),
}

each_style = pytest.mark.parametrize("style", STYLES)
each_of_asyncio = pytest.mark.parametrize("kind", OF_ASYNCIO)


@each_style
@each_of_asyncio
def test_values_of_asyncio(reactor: Any, style: str, kind: str) -> None:
    async def main() -> Any:
        body = returns(pause_of_asyncio, [])
        return await STYLES[style](lambda: OF_ASYNCIO[kind](body))

    assert run(reactor, main) == "value"


@each_style
@each_of_asyncio
def test_errors_of_asyncio(reactor: Any, style: str, kind: str) -> None:
    async def main() -> None:
        body = raises(pause_of_asyncio, [])
        await STYLES[style](lambda: OF_ASYNCIO[kind](body))

    with pytest.raises((ExpectedError, BaseExceptionGroup)) as caught:
        run(reactor, main)
    names = stack_through_groups(caught.value)
    assert names[-2:] == ["body", "innermost"]
    assert "main" in names
    expected = {"async def": "awaits", "generator": "yields", "@coroutine": "yields"}
    if style in expected:
        assert expected[style] in names


def stack(error: BaseException) -> list[str]:
    return [line.name for line in traceback.extract_tb(error.__traceback__)]


def stack_through_groups(error: Any) -> list[str]:
    """The stack of a group, followed by the stack of the only error in it."""
    names = stack(error)
    while isinstance(error, BaseExceptionGroup):
        [error] = error.exceptions
        names += stack(error)
    return names


@each_style
@each_of_asyncio
def test_cancelling_the_awaiting_task(reactor: Any, style: str, kind: str) -> None:
    told: list[str] = []

    async def main() -> None:
        body = waits(pause_of_asyncio, told)
        deferred = STYLES[style](lambda: OF_ASYNCIO[kind](body))
        while not told:
            await sleep(0.001)
        deferred.cancel()
        with pytest.raises(defer.CancelledError):
            await deferred
        # The cancellation takes effect when the awaitable has ended.
        assert told == ["waits", "cleaned up"]

    run(reactor, main)


@each_style
def test_cancelling_the_awaited_future(reactor: Any, style: str) -> None:
    async def main() -> None:
        future = asyncio.ensure_future(asyncio.sleep(DEADLINE))
        deferred = STYLES[style](lambda: future)
        await sleep(0.001)
        future.cancel()
        with pytest.raises(defer.CancelledError):
            await deferred

    run(reactor, main)


def test_cancelling_the_awaited_future_cancels_the_task(reactor: Any) -> None:
    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        task = spawn(awaits, lambda: future)
        future.cancel("enough")
        with pytest.raises(defer.CancelledError, match="awaits was cancelled: enough"):
            await task
        assert task.cancelled
        with pytest.raises(asyncio.CancelledError) as caught:
            await future
        assert not isinstance(caught.value, Cancelled)

    run(reactor, main)


def test_a_result_in_the_turn_of_a_cancellation(reactor: Any) -> None:
    """The result is not lost, and the task is cancelled where it waits next."""
    got: list[Any] = []

    async def awaits_twice(future: Any) -> None:
        got.append(await future)
        got.append("goes on")
        await sleep(0)
        got.append("never")

    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        task = spawn(awaits_twice, future)
        await sleep(0)
        # asyncio delivers the result in the next turn of the loop.
        future.set_result("value")
        task.cancel()
        with pytest.raises(defer.CancelledError):
            await task

    run(reactor, main)
    assert got == ["value", "goes on"]


def test_awaitables_that_suppress_their_cancellation(reactor: Any) -> None:
    async def stubborn() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            limit.deadline = reactor.seconds()
            await asyncio.sleep(DEADLINE)
        return "all the same"

    limit = move_on_after(DEADLINE)

    async def main() -> None:
        got = []
        with limit:
            got.append(await asyncio.ensure_future(stubborn()))
            await sleep(DEADLINE)
        assert got == ["all the same"]
        assert limit.expired

    run(reactor, main)


# Time


@since_311
@pytest.mark.parametrize("wait", ["of asyncio", "of ours", "Deferred"])
def test_timeout_of_asyncio(reactor: Any, wait: str) -> None:
    waiting: dict[str, Callable[[], Awaitable[Any]]] = {
        "of asyncio": lambda: asyncio.sleep(DEADLINE),
        "of ours": lambda: sleep(DEADLINE),
        "Deferred": Deferred,
    }

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001) as limit:
                await waiting[wait]()
        assert limit.expired()
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout_at(loop.time()):
                await waiting[wait]()
        current: Any = asyncio.current_task()
        assert current.cancelling() == 0
        # No cancellation is left over.
        await sleep(0)
        await asyncio.sleep(0)

    run(reactor, main)


@pytest.mark.parametrize("kind", OF_ASYNCIO)
def test_timeout_of_this_package(reactor: Any, kind: str) -> None:
    told: list[str] = []
    limits: list[Any] = []

    async def pause() -> None:
        # Set the deadline only now: asyncio may begin a task after a short deadline.
        if not limits[-1].expired:
            limits[-1].deadline = reactor.seconds()
        await pause_of_asyncio()

    async def main() -> None:
        body = waits(pause, told)
        limits.append(timeout(DEADLINE))
        with pytest.raises(TimeoutError, match="deadline"), limits[-1]:
            await OF_ASYNCIO[kind](body)
        limits.append(move_on_after(DEADLINE))
        with limits[-1]:
            await OF_ASYNCIO[kind](body)
        assert limits[-1].expired
        await asyncio.sleep(0)

    run(reactor, main)
    assert told == ["waits", "cleaned up"] * 2


def test_wait_for(reactor: Any) -> None:
    told: list[str] = []

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waits(pause_of_asyncio, told)(), 0.01)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waits(pause_of_ours, told)(), 0.01)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(Deferred(), 0.01)

    run(reactor, main)
    assert told == ["waits", "cleaned up"] * 2


@since_311
@pytest.mark.parametrize("first", ["ours", "asyncio"])
@pytest.mark.parametrize("outer", ["ours", "asyncio"])
def test_both_timeouts(reactor: Any, first: str, outer: str) -> None:
    """Each timeout raises its own error, inside or around the other timeout."""
    ours, theirs = (0.001, DEADLINE) if first == "ours" else (DEADLINE, 0.001)
    seen: list[str] = []

    async def main() -> None:
        try:
            if outer == "ours":
                with timeout(ours):
                    try:
                        async with asyncio.timeout(theirs):
                            await asyncio.sleep(DEADLINE)
                    except TimeoutError:
                        seen.append("asyncio")
            else:
                async with asyncio.timeout(theirs):
                    try:
                        with timeout(ours):
                            await asyncio.sleep(DEADLINE)
                    except TimeoutError:
                        seen.append("ours")
        except TimeoutError:
            seen.append(outer)

    run(reactor, main)
    assert seen == [first]


@since_311
@pytest.mark.parametrize("wait", ["of asyncio", "of ours"])
def test_both_timeouts_at_once(reactor: Any, wait: str) -> None:
    """The inner timeout does not swallow the outer one."""

    async def main() -> None:
        current: Any = asyncio.current_task()
        with move_on_after(DEADLINE) as limit:
            async with asyncio.timeout(DEADLINE) as inner:
                loop = asyncio.get_running_loop()
                loop.call_soon(lambda: setattr(limit, "deadline", 0))
                loop.call_soon(inner.reschedule, 0)
                await (asyncio.sleep if wait == "of asyncio" else sleep)(DEADLINE)
        assert limit.expired
        assert current.cancelling() == 0
        await sleep(0)

    run(reactor, main)


@since_311
def test_a_timeout_of_asyncio_whose_block_ends_in_time(reactor: Any) -> None:
    """A cancellation that was not delivered can be withdrawn."""

    async def main() -> None:
        async with asyncio.timeout(DEADLINE):
            current: Any = asyncio.current_task()
            current.cancel()
            assert current.cancelling() == 1
            assert current.uncancel() == 0
        await sleep(0)
        await asyncio.sleep(0)

    run(reactor, main)


@since_311
def test_a_shield_and_timeouts_of_asyncio(reactor: Any) -> None:
    """A shield keeps out the timeouts around it, and not the timeouts within it."""
    seen: list[str] = []

    async def main() -> None:
        try:
            async with asyncio.timeout(0.001):
                with shield():
                    seen.append("begins")
                    await asyncio.sleep(0.005)
                    await sleep(0.005)
                    seen.append("was kept")
                    try:
                        async with asyncio.timeout(0.001):
                            await asyncio.sleep(DEADLINE)
                    except TimeoutError:
                        seen.append("inner")
                    try:
                        async with asyncio.timeout(0.001):
                            with shield():
                                await sleep(0.005)
                            await sleep(DEADLINE)
                    except TimeoutError:
                        seen.append("innermost")
                await sleep(DEADLINE)
        except TimeoutError:
            seen.append("outer")

    run(reactor, main)
    assert seen == ["begins", "was kept", "inner", "innermost", "outer"]


@since_311
def test_both_timeouts_at_once_in_a_shield(reactor: Any) -> None:
    async def main() -> None:
        with shield(), move_on_after(DEADLINE) as limit:
            async with asyncio.timeout(DEADLINE) as inner:
                loop = asyncio.get_running_loop()
                loop.call_soon(lambda: setattr(limit, "deadline", 0))
                loop.call_soon(inner.reschedule, 0)
                await asyncio.sleep(DEADLINE)
        assert limit.expired

    run(reactor, main)


def test_cancellation_requests_are_counted(reactor: Any) -> None:
    """A request of this package for a block of code counts as long as the block."""

    async def main() -> None:
        current: Any = asyncio.current_task()
        with move_on_after(0.001):
            try:
                await asyncio.sleep(DEADLINE)
            finally:
                assert current.cancelling() == 1
        assert current.cancelling() == 0
        with shield(), move_on_after(0.001):
            inner: Any = asyncio.current_task()
            try:
                await sleep(DEADLINE)
            finally:
                assert inner.cancelling() == 1
                assert current.cancelling() == 0

    run(reactor, main)


def test_requests_by_asyncio_and_by_this_package_at_once(reactor: Any) -> None:
    """Only the request of this package is delivered."""

    async def main() -> None:
        current: Any = asyncio.current_task()
        for first, second in (
            (current.cancel, current_task().cancel),
            (current_task().cancel, current.cancel),
        ):
            first()
            second()
            assert current.cancelling() == 2
            with pytest.raises(Cancelled):
                await asyncio.sleep(DEADLINE)
            await asyncio.sleep(0)
            current.uncancel()
            current.uncancel()

    run(reactor, main)


def test_asyncio_cancels_a_task_whose_future_is_done(reactor: Any) -> None:
    """The cancellation has precedence, as in asyncio's tasks."""

    async def waits_for(future: Any, theirs: list[Any]) -> None:
        theirs.append(asyncio.current_task())
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await future

    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        theirs: list[Any] = []
        task = spawn(waits_for, future, theirs)
        await sleep(0)
        future.set_result("value")
        theirs[0].cancel("enough")
        await task

    run(reactor, main)


def test_cancellation_messages_of_any_type(reactor: Any) -> None:
    """Some libraries recognize their own cancellations by the message."""
    message = object()

    async def waits_for_asyncio(theirs: list[Any]) -> None:
        theirs.append(asyncio.current_task())
        for wait in (asyncio.sleep, sleep):
            with pytest.raises(asyncio.CancelledError) as caught:
                await wait(DEADLINE)
            assert caught.value.args == (message,)

    async def main() -> None:
        theirs: list[Any] = []
        task = spawn(waits_for_asyncio, theirs)
        await sleep(0.001)
        theirs[0].cancel(message)
        await sleep(0.001)
        theirs[0].cancel(message)
        assert "to be cancelled: <object object" in format_tasks(reactor)
        await task

    run(reactor, main)


def test_awaitables_that_replace_the_cancellation(reactor: Any) -> None:
    """asyncio.Condition does that."""

    async def another() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(DEADLINE)
        raise asyncio.CancelledError

    async def in_group() -> None:
        async with TaskGroup() as group:
            group.spawn(sleep, DEADLINE)
            await another()

    async def main() -> None:
        with pytest.raises(TimeoutError, match=r"than 0\.001 s"), timeout(0.001):
            await another()
        with CancelScope() as scope:
            asyncio.get_running_loop().call_later(0.001, scope.cancel)
            await another()
        assert scope.cancelled
        with move_on_after(0.001) as limit:
            await in_group()
        assert limit.expired
        task = spawn(another)
        task.cancel("enough")
        with pytest.raises(defer.CancelledError):
            await task
        assert task.cancelled

    run(reactor, main)


# The current task


def test_current_task(reactor: Any) -> None:
    async def main() -> None:
        current: Any = asyncio.current_task()
        assert isinstance(current, asyncio.Task)
        assert asyncio.isfuture(current)
        assert current.get_name() == current_task().name
        current.set_name("another")
        assert current_task().name == "another"
        assert current.get_loop() is asyncio.get_running_loop()
        assert current_task()._body is current.get_coro()
        assert not current.done()
        assert not current.cancelled()
        assert current not in asyncio.all_tasks()
        await asyncio.sleep(0)
        await sleep(0)
        assert asyncio.current_task() is current
        with pytest.raises(asyncio.InvalidStateError):
            current.result()
        with pytest.raises(RuntimeError, match="set_result"):
            current.set_result(None)
        await spawn(other, current)

    async def other(before: Any) -> None:
        assert asyncio.current_task() is not before
        assert [frame.f_code.co_name for frame in before.get_stack()] == ["main"]

    run(reactor, main)
    assert asyncio._get_running_loop() is None


def test_a_task_of_asyncio_that_resumes_a_task(reactor: Any) -> None:
    """The task of asyncio is current again afterwards."""
    seen: list[Any] = []

    async def of_asyncio(event: Event) -> None:
        before = asyncio.current_task()
        event.set()
        assert seen == ["resumed"]
        assert asyncio.current_task() is before
        with pytest.raises(NoTaskError):
            current_task()

    async def waits_for(event: Event) -> None:
        await event.wait()
        seen.append("resumed")

    async def main() -> None:
        event = Event()
        task = spawn(waits_for, event)
        await asyncio.ensure_future(of_asyncio(event))
        await task

    run(reactor, main)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio has it not")
def test_eager_tasks(reactor: Any) -> None:
    """An eager task runs within a step of a task, and is a task of asyncio only."""
    channel: Channel[str] = Channel(0)
    seen: list[str] = []

    async def eager() -> str:
        seen.append("begins")
        with pytest.raises(NoTaskError):
            current_task()
        with pytest.raises(NoTaskError), timeout(1):
            pass
        return await channel.receive()

    async def main() -> None:
        # After this the loop runs, and not only the task.
        await sleep(0)
        loop: Any = asyncio.get_running_loop()
        current = asyncio.current_task()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        task = asyncio.create_task(eager())
        assert seen == ["begins"]
        assert asyncio.current_task() is current
        with timeout(DEADLINE):
            await channel.send("value")
        assert await task == "value"

    run(reactor, main)


def test_the_current_task_can_be_awaited(reactor: Any) -> None:
    """Tasks of asyncio can await it, as they await each other."""
    seen: list[Any] = []
    theirs: list[Any] = []

    async def watched(outcome: str) -> str:
        theirs.append(asyncio.current_task())
        await asyncio.sleep(0.001)
        if outcome == "fails":
            raise ExpectedError
        if outcome == "is cancelled":
            current_task().cancel("enough")
            await sleep(0)
        return outcome

    async def watches(current: Any) -> Any:
        current.add_done_callback(seen.append)
        current.add_done_callback(theirs.append)
        assert current.remove_done_callback(theirs.append) == 1
        return await asyncio.gather(current, return_exceptions=True)

    async def main() -> None:
        for outcome in ("returns", "fails", "is cancelled"):
            task = spawn(watched, outcome)
            await sleep(0)
            current = theirs.pop()
            watching = asyncio.ensure_future(watches(current))
            await asyncio.wait({watching})
            del task
            [result] = watching.result()
            assert current.done()
            assert seen == [current]
            seen.clear()
            if outcome == "returns":
                assert result == await current == current.result() == "returns"
            elif outcome == "fails":
                assert isinstance(result, ExpectedError)
                assert current.exception() is result
            else:
                assert isinstance(result, asyncio.CancelledError)
                assert current.cancelled()

    run(reactor, main)


def test_asyncio_cancels_the_current_task(reactor: Any) -> None:
    async def waits_for(what: Awaitable[Any], theirs: list[Any]) -> None:
        theirs.append(asyncio.current_task())
        await what

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for what in (sleep(DEADLINE), loop.create_future(), Deferred[None]()):
            theirs: list[Any] = []
            task = spawn(waits_for, what, theirs)
            await sleep(0)
            assert theirs[0].cancel("enough")
            # Not within the call, as with asyncio's own tasks.
            assert not task.done
            with pytest.raises(defer.CancelledError, match="was cancelled: enough"):
                await task
            assert not theirs[0].cancel()
            assert theirs[0].cancelled()

    run(reactor, main)


@since_311
@pytest.mark.parametrize("wait", ["of asyncio", "of ours"])
def test_a_group_of_asyncio(reactor: Any, wait: str) -> None:
    told: list[str] = []

    async def fails_together(group: Any, body: Body, fails: Body) -> None:
        async with group:
            group.create_task(body())
            group.create_task(fails())
            await (asyncio.sleep if wait == "of asyncio" else sleep)(DEADLINE)

    async def main() -> None:
        body = waits(pause_of_asyncio, told)
        fails = raises(pause_of_asyncio, told)
        group: Any = asyncio.TaskGroup()
        with pytest.raises(BaseExceptionGroup) as caught:
            await fails_together(group, body, fails)
        [error] = caught.value.exceptions
        assert isinstance(error, ExpectedError)
        assert told == ["waits", "cleaned up"]
        current: Any = asyncio.current_task()
        assert current.cancelling() == 0
        await sleep(0)
        # The block is cancelled from outside.
        told.clear()
        group = asyncio.TaskGroup()
        with move_on_after(0.1) as limit:
            async with group:
                group.create_task(body())
                await (asyncio.sleep if wait == "of asyncio" else sleep)(DEADLINE)
        assert limit.expired
        assert told == ["waits", "cleaned up"]
        await asyncio.sleep(0)

    run(reactor, main)


def test_a_group_of_this_package(reactor: Any) -> None:
    told: list[str] = []

    async def main() -> None:
        async with TaskGroup() as group:
            group.spawn(waits(pause_of_asyncio, told))
            group.spawn(raises(pause_of_asyncio, told))
            await asyncio.sleep(DEADLINE)

    with pytest.raises(BaseExceptionGroup):
        run(reactor, main)
    assert told == ["waits", "cleaned up"]


# Tasks of asyncio that await tasks and Deferreds


def in_twisted(body: Body) -> Deferred[Any]:
    return Deferred.fromCoroutine(body())


@inlineCallbacks
def yields_in_twisted(body: Body) -> Any:
    return (yield Deferred.fromCoroutine(body()))


OF_OURS: dict[str, Callable[[Body], Any]] = {
    "task": spawn,
    "as_deferred": lambda body: spawn(body).as_deferred(),
    "fromCoroutine": in_twisted,
    "inlineCallbacks": yields_in_twisted,
    "run_group": lambda body: run_group(lambda group: body()),
}

each_of_ours = pytest.mark.parametrize("kind", OF_OURS)


async def awaits_asyncio(kind: str, body: Body) -> Any:
    """Await a task of asyncio, which awaits a body of this package."""

    async def of_asyncio() -> Any:
        return await OF_OURS[kind](body)

    return await asyncio.ensure_future(of_asyncio())


@each_of_ours
def test_asyncio_gets_the_value(reactor: Any, kind: str) -> None:
    body = returns(pause_of_ours, [])
    assert run(reactor, awaits_asyncio, kind, body) == "value"


@each_of_ours
def test_asyncio_gets_the_error_with_its_stack(reactor: Any, kind: str) -> None:
    with pytest.raises((ExpectedError, BaseExceptionGroup)) as caught:
        run(reactor, awaits_asyncio, kind, raises(pause_of_ours, []))
    names = stack_through_groups(caught.value)
    assert names[-2:] == ["body", "innermost"]
    assert "of_asyncio" in names
    assert "awaits_asyncio" in names


@each_of_ours
def test_cancelling_a_task_of_asyncio(reactor: Any, kind: str) -> None:
    told: list[str] = []

    async def of_asyncio() -> Any:
        with pytest.raises(asyncio.CancelledError) as caught:
            await OF_OURS[kind](waits(pause_of_ours, told))
        # The error of the Deferred.
        assert isinstance(caught.value.__cause__, defer.CancelledError)
        told.append("told")
        raise caught.value

    async def main() -> None:
        task = asyncio.ensure_future(of_asyncio())
        while not told:
            await sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert told == ["waits", "cleaned up", "told"]

    run(reactor, main)


@each_of_ours
def test_cancelling_a_deferred_that_asyncio_awaits(reactor: Any, kind: str) -> None:
    """The task of asyncio gets Twisted's error, and is not cancelled itself."""
    made: list[Any] = []

    async def of_asyncio() -> None:
        made.append(OF_OURS[kind](waits(pause_of_ours, [])))
        with pytest.raises(defer.CancelledError):
            await made[0]

    async def main() -> None:
        task = asyncio.ensure_future(of_asyncio())
        while not made:
            await sleep(0.001)
        await sleep(0.005)
        made[0].cancel()
        await task

    run(reactor, main)


def test_asyncio_awaits_operations(reactor: Any) -> None:
    channel: Channel[int] = Channel(0)
    event = Event()
    lock = Lock()

    async def of_asyncio() -> list[Any]:
        got: list[Any] = [await channel.receive(), await channel.receive()]
        async for each in channel:
            got.append(each)
        await event.wait()
        async with lock:
            await sleep(0.001)
        got.append(await select(channel_of("first"), Deferred()))
        return got

    def channel_of(value: str) -> Any:
        other: Channel[str] = Channel(1)
        other.send(value)
        return other.receive()

    async def main() -> Any:
        await lock.acquire()
        task = asyncio.ensure_future(of_asyncio())
        for each in range(4):
            await channel.send(each)
        channel.close()
        await sleep(0.001)
        event.set()
        await sleep(0.001)
        lock.release()
        return await task

    *got, (_, first) = run(reactor, main)
    assert got == [0, 1, 2, 3]
    assert first == "first"


def test_asyncio_awaits_streams(reactor: Any) -> None:
    async def echo(stream: Stream) -> None:
        async for line in stream.lines():
            await stream.write(line.upper() + b"\n")

    async def of_asyncio(server: Any) -> bytes:
        stream = await call(reactor, server)
        await stream.write(b"hello\nthere\n")
        await stream.write_eof()
        got = [line async for line in stream.lines()]
        await stream.close()
        return b" ".join(got)

    async def main() -> Any:
        server = await listen(reactor, echo)
        try:
            return await asyncio.ensure_future(of_asyncio(server))
        finally:
            await server.stop()

    assert run(reactor, main) == b"HELLO THERE"


def test_streams_of_asyncio(reactor: Any) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            writer.write(line.upper())
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def main() -> Any:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        async with server:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"hello\nthere\n")
            writer.write_eof()
            got = [line async for line in reader]
            writer.close()
            await writer.wait_closed()
        return got

    assert run(reactor, main) == [b"HELLO\n", b"THERE\n"]


def test_asyncio_awaits_deferreds(reactor: Any) -> None:
    async def main() -> Any:
        loop = asyncio.get_running_loop()
        fired: Deferred[int] = succeed(1)
        later: Deferred[int] = Deferred()
        chained: Deferred[int] = Deferred()
        chained.addCallback(lambda value: Deferred().addCallback(lambda _: value))
        inner: Deferred[int] = Deferred()
        chained = succeed(None).addCallback(lambda _: inner)
        paused = succeed(4)
        paused.pause()
        loop.call_later(0.001, later.callback, 2)
        loop.call_later(0.001, inner.callback, 3)
        loop.call_later(0.001, paused.unpause)
        shared: Deferred[int] = Deferred()
        loop.call_later(0.001, shared.callback, 5)
        of_all = defer.gatherResults([succeed(6), succeed(7)])

        async def of_asyncio() -> list[Any]:
            return [
                *(await fired, await later, await chained, await paused),
                await asyncio.gather(shared, shared),
                await of_all,
                await asyncio.wait_for(succeed(8), DEADLINE),
                # A Deferred keeps its result after the first await.
                await later,
            ]

        return await asyncio.ensure_future(of_asyncio())

    assert run(reactor, main) == [1, 2, 3, 4, [5, 5], [6, 7], 8, 2]


def test_asyncio_does_not_take_a_deferred_for_a_future() -> None:
    """Therefore asyncio puts a task around the Deferred."""
    assert not asyncio.isfuture(Deferred())
    operation = sleep(0, Clock())
    assert not asyncio.isfuture(operation)
    operation.cancel()


def test_twisted_cancels_a_deferred_as_before(reactor: Any) -> None:
    cancelled: list[Any] = []

    async def main() -> None:
        deferred: Deferred[None] = Deferred(cancelled.append)

        async def of_asyncio() -> None:
            await deferred

        task = asyncio.ensure_future(of_asyncio())
        await sleep(0.001)
        deferred.cancel()
        with pytest.raises(defer.CancelledError):
            await task
        assert cancelled == [deferred]
        assert "cancel" not in vars(deferred)

    run(reactor, main)


def test_a_canceller_that_fails_with_another_error(reactor: Any) -> None:
    """Any failure within the call of the canceller is due to the cancellation."""

    async def of_asyncio(deferred: Deferred[None]) -> None:
        with pytest.raises(asyncio.CancelledError, match="enough") as caught:
            await deferred
        assert isinstance(caught.value.__cause__, ExpectedError)
        raise caught.value

    async def main() -> None:
        deferred: Deferred[None] = Deferred(lambda it: it.errback(ExpectedError("why")))
        task = asyncio.ensure_future(of_asyncio(deferred))
        await sleep(0.001)
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    run(reactor, main)


def test_cancelling_one_of_two_that_share_a_deferred(reactor: Any) -> None:
    """The Deferred is cancelled, as a future is that two tasks await."""

    async def main() -> None:
        deferred: Deferred[None] = Deferred()

        async def of_asyncio() -> None:
            await deferred

        tasks = [asyncio.ensure_future(of_asyncio()) for _ in range(2)]
        await sleep(0.001)
        tasks[0].cancel()
        await asyncio.wait(tasks)
        assert tasks[0].cancelled()

    run(reactor, main)


@since_311
def test_a_value_in_the_turn_of_a_cancellation_by_asyncio(reactor: Any) -> None:
    """A value that a channel has delivered is not lost; the task is cancelled later."""
    got: list[Any] = []
    channel: Channel[str] = Channel(0)

    async def of_asyncio() -> None:
        got.append(await channel.receive())
        got.append("goes on")
        await channel.receive()
        got.append("never")

    async def main() -> None:
        task = asyncio.ensure_future(of_asyncio())
        await sleep(0.001)
        await channel.send("value")
        # The task is resumed in the next turn of the loop.
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    run(reactor, main)
    assert got == ["value", "goes on"]


@since_311
def test_a_value_in_the_turn_of_a_timeout_of_asyncio(reactor: Any) -> None:
    """The block has come to its end, so nothing after it is cancelled."""
    channel: Channel[str] = Channel(0)

    async def of_asyncio() -> str:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE) as limit:
            loop.call_soon(send, limit)
            value = await channel.receive()
        await sleep(0.005)
        await asyncio.sleep(0.005)
        return value

    def send(limit: Any) -> None:
        channel.send("value")
        limit._on_timeout()

    async def main() -> str:
        task = asyncio.ensure_future(of_asyncio())
        value = await task
        assert task.cancelling() == 0
        return value

    assert run(reactor, main) == "value"


def test_tasks_that_await_each_other_in_a_circle(reactor: Any) -> None:
    async def main() -> None:
        tasks: list[Any] = []

        async def of_asyncio() -> None:
            await tasks[0]

        async def ours() -> None:
            await sleep(0)
            await tasks[1]

        tasks.append(spawn(ours))
        tasks.append(asyncio.ensure_future(of_asyncio()))
        await sleep(0.005)
        tasks[0].cancel()
        with pytest.raises(defer.CancelledError):
            await tasks[0]
        await asyncio.wait({tasks[1]})
        assert tasks[1].cancelled()

    run(reactor, main)


def test_a_transfer_under_asyncio(reactor: Any) -> None:
    from twisted_rtsig.coro import symmetric, transfer

    async def other(value: Any) -> None:
        pass

    async def of_asyncio() -> None:
        await transfer(symmetric(other))

    async def main() -> None:
        with pytest.raises(NoTaskError, match=r"transfer\(\)"):
            await asyncio.ensure_future(of_asyncio())

    run(reactor, main)


# Context variables


def test_context_variables(reactor: Any) -> None:
    async def sets(value: str) -> str:
        before = variable.get()
        await asyncio.sleep(0)
        variable.set(value)
        return before

    async def gets() -> str:
        await sleep(0)
        return variable.get()

    async def of_asyncio() -> list[str]:
        variable.set("of asyncio")
        got = [await spawn(gets)]
        await sleep(0.001)
        await spawn(sets, "not seen")
        got.append(variable.get())
        return got

    async def main() -> None:
        variable.set("of the task")
        # A coroutine runs in the task itself; a task of asyncio has a copy.
        assert await sets("set by a coroutine") == "of the task"
        assert variable.get() == "set by a coroutine"
        assert await asyncio.ensure_future(sets("not seen")) == "set by a coroutine"
        assert await from_asyncio(sets("not seen")) == "set by a coroutine"
        assert await asyncio.to_thread(variable.get) == "set by a coroutine"
        assert variable.get() == "set by a coroutine"
        got = await asyncio.ensure_future(of_asyncio())
        assert got == ["of asyncio", "of asyncio"]
        assert variable.get() == "set by a coroutine"

    run_for_real(reactor, main)
    assert variable.get() == "none"


# Asynchronous generators and context managers


@frees_at_once
def test_asynchronous_generators(reactor: Any) -> None:
    seen: list[str] = []

    async def generator(pause: Any, name: str) -> AsyncIterator[int]:
        try:
            for each in range(3):
                await pause()
                yield each
        finally:
            await pause()
            seen.append(name)

    async def loops(pause: Any, name: str) -> list[int]:
        got = [each async for each in generator(pause, name)]
        async for _ in generator(pause, f"{name} left early"):
            break
        return got

    async def main() -> None:
        for pause in (pause_of_asyncio, pause_of_ours):
            where = [
                loops(pause, f"{pause.__name__} in a task"),
                asyncio.ensure_future(loops(pause, f"{pause.__name__} in asyncio")),
            ]
            for each in where:
                assert await each == [0, 1, 2]
        while len(seen) < 8:
            await sleep(0.001)

    run(reactor, main)
    assert len(set(seen)) == 8


def test_asynchronous_context_managers(reactor: Any) -> None:
    async def of_asyncio(lock: Lock) -> None:
        async with lock:
            await asyncio.sleep(0)

    async def main() -> None:
        ours, theirs = Lock(), asyncio.Lock()
        async with theirs, ours:
            task = asyncio.ensure_future(of_asyncio(ours))
            await asyncio.sleep(0)
        await task
        condition = asyncio.Condition()
        with move_on_after(0.001) as limit:
            async with condition:
                await condition.wait()
        assert limit.expired
        assert not condition.locked()
        queue: asyncio.Queue[int] = asyncio.Queue(1)
        async with TaskGroup() as group:
            group.spawn(queue.put, 1)
            group.spawn(queue.put, 2)
            assert [await queue.get(), await queue.get()] == [1, 2]
        async with connected(reactor) as (stream, peer):
            peer.sendall(b"line\n")
            assert await asyncio.wait_for(stream.read_line(), DEADLINE) == b"line"

    run(reactor, main)


# Logs and garbage


@frees_at_once
def test_a_failure_is_logged_once(reactor: Any, logged: list[Any]) -> None:
    told: list[Any] = []

    async def of_asyncio(kind: str) -> None:
        await OF_OURS[kind](raises(pause_of_ours, []))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: told.append(context))
        for kind in OF_ASYNCIO:
            spawn(awaits, lambda kind=kind: OF_ASYNCIO[kind](fails))
        await sleep(0.05)
        assert len(failures(logged)) == len(OF_ASYNCIO)
        assert told == []
        logged.clear()
        from_asyncio(fails()).addCallback(print)
        await sleep(0.05)
        assert len(failures(logged)) == 1
        assert told == []
        logged.clear()
        tasks = [asyncio.ensure_future(of_asyncio(kind)) for kind in OF_OURS]
        await sleep(0.05)
        tasks.clear()
        assert failures(logged) == []
        assert len(told) == len(OF_OURS)

    fails = raises(pause_of_asyncio, [])
    run(reactor, main)


def test_an_abandoned_failure_is_not_logged(reactor: Any, logged: list[Any]) -> None:
    told: list[Any] = []

    async def of_asyncio() -> None:
        await Deferred()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: told.append(context))
        task = spawn(awaits, lambda: asyncio.ensure_future(asyncio.sleep(DEADLINE)))
        theirs = asyncio.ensure_future(of_asyncio())
        await sleep(0.001)
        task.cancel()
        theirs.cancel()
        await sleep(0.005)
        assert task.cancelled
        assert theirs.cancelled()

    run(reactor, main)
    gc.collect()
    assert told == []
    assert [each for each in logged if "log_failure" in each] == []


# These tests leave out the TaskGroups of asyncio and of this package, asyncio.wait_for
# and inlineCallbacks, which leave garbage of their own.


@frees_at_once
@pytest.mark.parametrize("make", [returns, raises, waits])
@pytest.mark.parametrize("style", ["async def", "generator", "@coroutine", "callbacks"])
@pytest.mark.parametrize("kind", [*OF_ASYNCIO.keys() - {"TaskGroup", "wait_for"}])
def test_awaiting_asyncio_leaves_no_garbage(
    reactor: Any, kind: str, style: str, make: Any
) -> None:
    def start(told: list[str]) -> Any:
        body = make(pause_of_asyncio, told)
        return STYLES[style](lambda: OF_ASYNCIO[kind](body))

    assert left_by(reactor, start, make is waits) == []


@frees_at_once
@pytest.mark.parametrize("make", [returns, raises, waits])
@pytest.mark.parametrize("kind", ["task", "as_deferred", "fromCoroutine"])
def test_waits_of_asyncio_leave_no_garbage(reactor: Any, kind: str, make: Any) -> None:
    async def of_asyncio(told: list[str]) -> None:
        await OF_OURS[kind](make(pause_of_ours, told))

    def start(told: list[str]) -> Any:
        return asyncio.ensure_future(of_asyncio(told))

    assert left_by(reactor, start, make is waits) == []


def left_by(reactor: Any, start: Any, cancels: bool) -> list[str]:
    async def once() -> None:
        told: list[str] = []
        it = start(told)
        if cancels:
            while not told:
                await sleep(0.001)
            it.cancel()
        with contextlib.suppress(*ENDS):
            await it
        del it
        # Let the loop make the calls that are pending.
        await sleep(0.005)

    async def main() -> list[str]:
        # Fill the caches.
        await once()
        with without_collector():
            await once()
            return garbage()

    left: list[str] = run(reactor, main)
    return left


@frees_at_once
def test_an_ended_task_is_freed(reactor: Any) -> None:
    async def main() -> Any:
        return asyncio.current_task()

    task = spawn(main, reactor=reactor)
    current = task.result()
    reference = weakref.ref(task)
    with without_collector():
        del task
        assert reference() is None
    assert current.done()
    with pytest.raises(asyncio.InvalidStateError, match="its result is gone"):
        current.result()


# Other modes


@pytest.mark.parametrize("mode", ["of asyncio", "of ours"])
def test_debug_modes(reactor: Any, mode: str, recwarn: pytest.WarningsRecorder) -> None:
    channel: Channel[str] = Channel(0)

    async def of_asyncio() -> Any:
        return await asyncio.wait_for(channel.receive(), DEADLINE)

    async def main() -> Any:
        task = asyncio.ensure_future(of_asyncio())
        await asyncio.sleep(0.001)
        await channel.send("value")
        await sleep(0.001)
        await Deferred.fromFuture(asyncio.ensure_future(asyncio.sleep(0)))
        return await task

    if mode == "of ours":
        set_debug(True)
    else:
        reactor._asyncioEventloop.set_debug(True)
    assert run(reactor, main) == "value"
    gc.collect()
    assert [str(each.message) for each in recwarn] == []


def test_instruments(reactor: Any) -> None:
    steps: list[str] = []

    class Watches(Instrument):
        def before_task_step(self, task: Any) -> None:
            steps.append(task.name)

    async def main() -> None:
        current = asyncio.current_task()
        before = len(steps)
        await asyncio.sleep(0.001)
        assert asyncio.current_task() is current
        assert len(steps) > before
        with shield():
            assert asyncio.current_task() is not current
            await asyncio.sleep(0.001)
        assert asyncio.current_task() is current

    add_instrument(Watches(), reactor)
    run(reactor, main)


def test_instruments_added_before_asyncio() -> None:
    """Instruments that were added before asyncio was used can be removed."""
    clock = Clock()
    steps: list[str] = []
    channel: Channel[Any] = Channel(0)

    class Watches(Instrument):
        def before_task_step(self, task: Any) -> None:
            steps.append(task.name)

    async def ours() -> None:
        await (await channel.receive())
        current: Any = asyncio.current_task()
        assert isinstance(current.get_context(), contextvars.Context)
        before = len(steps)
        await asyncio.sleep(0)
        assert len(steps) == before + 1
        remove_instrument(watches, clock)
        before = len(steps)
        await asyncio.sleep(0)
        assert len(steps) == before
        assert isinstance(asyncio.current_task(), asyncio.Task)

    async def main() -> None:
        channel.send(asyncio.ensure_future(asyncio.sleep(0)))
        await task

    watches = Watches()
    add_instrument(watches, clock)
    task = spawn(ours, reactor=clock)
    asyncio.run(main())


def test_format_tasks_shows_awaitables_of_asyncio(reactor: Any) -> None:
    async def main() -> str:
        task = spawn(awaits, lambda: asyncio.ensure_future(asyncio.sleep(DEADLINE)))
        await sleep(0)
        seen = format_tasks(reactor)
        task.cancel()
        await sleep(0.001)
        return seen

    assert "awaits: 0.0 s, waits for <Task pending" in run(reactor, main)


def test_threads(reactor: Any) -> None:
    async def main() -> Any:
        loop = asyncio.get_running_loop()
        return [
            await asyncio.to_thread(lambda: "to_thread"),
            await loop.run_in_executor(None, lambda: "run_in_executor"),
        ]

    assert run_for_real(reactor, main) == ["to_thread", "run_in_executor"]


# Loops


def test_awaiting_asyncio_without_a_loop_raises() -> None:
    clock = Clock()
    loop = asyncio.new_event_loop()
    future = loop.create_future()

    async def awaits_future() -> None:
        await future

    def yields_future() -> Any:
        yield future

    async def lets_others_go() -> None:
        await asyncio.sleep(0)

    def yields_nothing() -> Any:
        yield

    def asks_for_a_deferred() -> Any:
        yield from_asyncio(asyncio.sleep(1))

    try:
        for function in (
            *(awaits_future, yields_future, lets_others_go, asks_for_a_deferred),
        ):
            with pytest.raises(RuntimeError, match="--reactor=rtsig-asyncio"):
                spawn(function, reactor=clock).result()
        # A yield of None is a mistake that has nothing to do with asyncio.
        with pytest.raises(TypeError, match="cannot wait for None"):
            spawn(yields_nothing, reactor=clock).result()
    finally:
        loop.close()


def test_a_future_of_another_loop_raises(reactor: Any) -> None:
    loop = asyncio.new_event_loop()
    future = loop.create_future()

    async def main() -> None:
        await future

    try:
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            run(reactor, main)
    finally:
        loop.close()


def test_tasks_of_a_clock_in_a_loop() -> None:
    """Tasks of any reactor can await asyncio if its thread runs a loop."""
    clock = Clock()

    async def ours() -> Any:
        current = asyncio.current_task()
        assert isinstance(current, asyncio.Task)
        await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert asyncio.current_task() is current
        await sleep(1, clock)
        return await asyncio.wait_for(returns(pause_of_asyncio, [])(), DEADLINE)

    async def main() -> Any:
        task = spawn(ours, reactor=clock)
        while not clock.getDelayedCalls():
            await asyncio.sleep(0.001)
        clock.advance(1)
        return await task

    assert asyncio.run(main()) == "value"


def test_tasks_of_a_clock_before_a_loop_runs() -> None:
    clock = Clock()
    channel: Channel[Any] = Channel(0)

    async def ours() -> Any:
        future = await channel.receive()
        got = [await future]
        assert isinstance(asyncio.current_task(), asyncio.Task)
        await asyncio.sleep(0)
        return got

    async def main() -> Any:
        future = asyncio.get_running_loop().create_future()
        channel.send(future)
        future.set_result("value")
        return await task

    task = spawn(ours, reactor=clock)
    assert asyncio.run(main()) == ["value"]


def test_tasks_before_the_reactor_runs(reactor: Any) -> None:
    seen: list[Any] = []

    async def early() -> None:
        seen.append(asyncio.get_running_loop())
        await asyncio.create_task(asyncio.sleep(0))
        seen.append(asyncio.get_running_loop())

    async def main() -> None:
        await task

    task = spawn(early, reactor=reactor)
    assert asyncio._get_running_loop() is None
    run_for_real(reactor, main)
    assert seen == [reactor._asyncioEventloop] * 2


def test_asyncio_awaits_deferreds_without_tasks_of_this_package() -> None:
    """The import of ``twisted_rtsig.coro`` is enough."""
    program = """
        import asyncio, sys
        import twisted_rtsig.coro
        assert "twisted.internet.reactor" not in sys.modules
        from twisted.internet.defer import Deferred

        async def main():
            deferred = Deferred()
            asyncio.get_running_loop().call_later(0.001, deferred.callback, "value")
            print(await deferred)

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("value\n", "")


def test_yielded_coroutines(reactor: Any) -> None:
    """Twisted's inlineCallbacks accepts them as well."""

    def generator() -> Any:
        got = [(yield returns(pause_of_ours, [])())]
        got.append((yield returns(pause_of_asyncio, [])()))
        return got

    assert run(reactor, generator) == ["value", "value"]


def test_failures_of_deferreds_reach_asyncio_unchanged(reactor: Any) -> None:
    async def of_asyncio(deferred: Deferred[None]) -> None:
        with pytest.raises(ExpectedError, match="why"):
            await deferred

    async def main() -> None:
        later: Deferred[None] = Deferred()
        task = asyncio.ensure_future(of_asyncio(later))
        await sleep(0.001)
        later.errback(Failure(ExpectedError("why")))
        await task
        await asyncio.ensure_future(of_asyncio(defer.fail(ExpectedError("why"))))

    run(reactor, main)


# cancel_everywhere


async def speaks_asyncio(stream: Stream) -> None:
    """Waits in every way of asyncio, and cleans up."""
    await asyncio.sleep(0)
    await asyncio.sleep(60)
    body = returns(pause_of_asyncio, [])
    for await_it in OF_ASYNCIO.values():
        assert await await_it(body) == "value"
    assert await asyncio.to_thread(lambda: "value") == "value"
    theirs = asyncio.ensure_future(of_asyncio_in_a_conversation(stream))
    try:
        await asyncio.wait({theirs})
    finally:
        theirs.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await theirs
        await asyncio.sleep(1)
    queue: asyncio.Queue[bytes] = asyncio.Queue(1)
    await queue.put(await stream.read_line())
    await stream.write(await queue.get())


async def of_asyncio_in_a_conversation(stream: Stream) -> None:
    assert await asyncio.wait_for(stream.read_line(), 60) == b"first"
    await asyncio.sleep(1)


async def peer_of_asyncio(stream: Stream) -> None:
    await asyncio.sleep(1)
    await stream.write(b"first\nsecond\n")
    assert await stream.read_exactly(6) == b"second"


def test_cancel_everywhere() -> None:
    # Eleven waits exist on each Python; a newer Python adds other kinds.
    assert cancel_everywhere(speaks_asyncio, peer_of_asyncio) > 11


@pytest.mark.parametrize("where", ["in a task", "in a callback"])
def test_cancel_everywhere_within_a_loop(where: str) -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        waits: asyncio.Future[int] = loop.create_future()
        if where == "in a task":
            cancels(waits)
        else:
            loop.call_soon(cancels, waits)
        await asyncio.sleep(0)
        return await waits

    def cancels(waits: asyncio.Future[int]) -> None:
        before = asyncio.current_task()
        waits.set_result(cancel_everywhere(speaks_asyncio, peer_of_asyncio))
        assert asyncio.current_task() is before

    assert asyncio.run(main()) > 11


left_behind: list[Any] = []


async def leaves_a_task(stream: Stream) -> None:
    left_behind.append(asyncio.ensure_future(sleeps_for_ever()))
    await sleep(0)


async def sleeps_for_ever() -> None:
    await asyncio.Event().wait()


async def leaves_a_timer(stream: Stream) -> None:
    asyncio.get_running_loop().call_later(60, print)
    await sleep(0)


async def swallows(stream: Stream) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(60)
    await asyncio.sleep(0)


async def waits_for_ever(stream: Stream) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (leaves_a_task, "the handler has left behind .*sleeps_for_ever"),
        (leaves_a_timer, "the handler has left behind"),
        (swallows, "the handler went on: let Cancelled pass"),
        (waits_for_ever, "the handler waits for something that never happens"),
    ],
)
def test_cancel_everywhere_finds_faults(
    handler: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twisted_rtsig.coro.testing.cancellation._PATIENCE", 0.01)
    with pytest.raises(AssertionError, match=why):
        cancel_everywhere(handler)
    for task in left_behind:
        # The task never ends: do not let asyncio log that.
        task._log_destroy_pending = False
    left_behind.clear()


# anyio, if it is installed


def test_anyio(reactor: Any) -> None:
    anyio: Any = pytest.importorskip("anyio")
    told: list[str] = []

    async def fails_together(body: Body) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(body)
            group.start_soon(raises(pause_of_asyncio, told))
            await sleep(DEADLINE)

    async def main() -> None:
        body = waits(pause_of_asyncio, told)
        for wait in (anyio.sleep, asyncio.sleep, sleep):
            with anyio.move_on_after(0.001) as scope:
                await wait(DEADLINE)
            assert scope.cancelled_caught
            with pytest.raises(TimeoutError), anyio.fail_after(0.001):
                await wait(DEADLINE)
        with pytest.raises(BaseExceptionGroup):
            await fails_together(body)
        # anyio cancels the waits of the cleaning up as well.
        assert told == ["waits"]
        told.clear()
        with move_on_after(0.01) as limit:
            async with anyio.create_task_group() as group:
                group.start_soon(body)
                await anyio.sleep(DEADLINE)
        assert limit.expired
        assert told == ["waits"]
        with anyio.CancelScope(shield=True):
            assert await anyio.to_thread.run_sync(lambda: "value") == "value"
        send, receive = anyio.create_memory_object_stream(1)
        async with send, receive:
            await send.send("value")
            assert await receive.receive() == "value"
        assert anyio.get_current_task().name == current_task().name
        if sys.version_info >= (3, 11):
            current: Any = asyncio.current_task()
            assert current.cancelling() == 0
        await sleep(0)
        await asyncio.sleep(0)

    run_for_real(reactor, main)
