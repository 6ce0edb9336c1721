"""Tasks: what they wait for, how they end, and how they are cancelled."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import subprocess
import sys
import traceback
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any
from unittest import mock
from weakref import ref

import pytest
from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.task import Clock

from tests.coro.support import cancel, failures, output_of
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    Cancelled,
    Channel,
    Event,
    NoTaskError,
    Task,
    TaskGroup,
    coroutine,
    current_task,
    run_group,
    select,
    shield,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.scheduler import scheduler_of

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


# Running


class _Wakes:
    """Sets an event when it is dropped."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __del__(self) -> None:
        self._event.set()


async def _appends(event: Event, seen: list[str], what: str) -> None:
    await event.wait()
    seen.append(what)


@frees_at_once
def test_a_value_that_resumes_a_task_when_it_is_dropped(clock: Clock) -> None:
    """The task that it resumes is the last one that runs."""
    seen: list[str] = []
    event = Event()

    channel: Channel[_Wakes] = Channel(1)

    async def drops() -> None:
        await channel.receive()
        await sleep(100)

    async def sends() -> None:
        await channel.send(_Wakes(event))

    spawn(_appends, event, seen, "resumed", reactor=clock)
    spawn(drops, reactor=clock)
    spawn(sends, reactor=clock)
    clock.advance(0)
    assert seen == ["resumed"]


FULL_STACK = """
import contextlib
import sys
from twisted.internet.task import Clock
from twisted_rtsig.coro import Channel, Event, sleep, spawn

how = sys.argv[1]
clock = Clock()
channel = Channel(1000)
errors, seen = set(), []

async def appends(event, what):
    await event.wait()
    seen.append(what)

async def receives():
    async for each in channel:
        pass

def resume():
    event = Event()
    if how == "event":
        spawn(appends, event, "", reactor=clock)
        event.set()
    elif how == "channel":
        channel.send("deep")
    elif how == "spawn":
        spawn(sleep, 1, reactor=clock)
    else:
        sleep(0, clock)
        clock.advance(0)

def dive():
    # At each depth, from the deepest on.
    with contextlib.suppress(RecursionError):
        dive()
    try:
        resume()
    except Exception as error:
        errors.add(type(error).__name__)

spawn(receives, reactor=clock)
dive()
clock.advance(0)
seen.clear()
event = Event()
spawn(appends, event, "an event", reactor=clock)
event.set()
clock.pump([0] * 10)
spawn(sleep, 0, reactor=clock).as_deferred().addCallback(
    lambda _: seen.append("a turn")
)
clock.pump([0] * 10)
print(sorted(errors), seen)
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", ["event", "channel", "spawn", "turn"])
def test_tasks_run_on_after_the_stack_was_full(how: str) -> None:
    """In a process of its own: objects freed at its end complain on standard error."""
    ended = subprocess.run(
        [sys.executable, "-c", FULL_STACK, how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout == "['RecursionError'] ['an event', 'a turn']\n", ended.stderr


def test_a_task_begins_at_once_and_waits_for_deferreds(clock: Clock) -> None:
    first: Deferred[int] = Deferred()

    async def add() -> int:
        return await first + await defer.succeed(2)

    task = spawn(add, reactor=clock)
    assert not task.done
    with pytest.raises(RuntimeError, match="has not ended yet"):
        task.result()
    first.callback(1)
    assert task.done
    assert task.result() == 3


async def _async_def(deferred: Deferred[int], base: int) -> int:
    return base + await deferred


def _generator(deferred: Deferred[int], base: int) -> Generator[Any, int, int]:
    return base + (yield deferred)


def _returns_a_deferred(deferred: Deferred[int], base: int) -> Deferred[int]:
    return deferred.addCallback(lambda value: base + value)


@pytest.mark.parametrize(
    "function",
    [
        _async_def,
        _generator,
        coroutine(_generator),
        inlineCallbacks(_generator),
        _returns_a_deferred,
    ],
)
def test_what_spawn_accepts(clock: Clock, function: Any) -> None:
    deferred: Deferred[int] = Deferred()
    task = spawn(function, deferred, 40, reactor=clock)
    deferred.callback(2)
    assert task.result() == 42
    assert "_" in task.name


def test_a_coroutine_or_generator_object(clock: Clock) -> None:
    assert spawn(_async_def(defer.succeed(2), 1), reactor=clock).result() == 3
    assert spawn(_generator(defer.succeed(2), 1), reactor=clock).result() == 3


@pytest.mark.parametrize("what", [None, 3, "function"])
def test_what_spawn_refuses(clock: Clock, what: Any) -> None:
    with pytest.raises(TypeError, match="needs a function"):
        spawn(what, reactor=clock)


def test_arguments_for_a_coroutine_object_are_refused(clock: Clock) -> None:
    generator = _generator(defer.succeed(2), 1)
    with pytest.raises(TypeError, match="cannot take"):
        spawn(generator, 3, reactor=clock)  # type: ignore[call-overload]


def test_coroutine_refuses_other_functions() -> None:
    with pytest.raises(TypeError, match="needs no decoration"):
        coroutine(_async_def)  # type: ignore[arg-type]


def test_awaiting_another_object_raises(clock: Clock) -> None:
    def waits() -> Generator[Any, Any, str]:
        with pytest.raises(TypeError, match="cannot wait for 3"):
            yield 3
        return "goes on"

    assert spawn(waits, reactor=clock).result() == "goes on"


def test_tasks_wait_for_tasks(clock: Clock) -> None:
    async def inner() -> str:
        await sleep(1)
        return "done"

    async def outer() -> list[str]:
        task = spawn(inner)
        return [await task, await task]

    def generator() -> Generator[Any, str, str]:
        return (yield spawn(inner))

    tasks = [spawn(outer, reactor=clock), spawn(generator, reactor=clock)]
    clock.advance(1)
    assert [each.result() for each in tasks] == [["done", "done"], "done"]


def test_a_task_spawned_by_a_task_begins_when_that_one_waits(
    clock: Clock,
) -> None:
    order = []

    async def child() -> None:
        order.append("child")

    async def parent() -> None:
        spawn(child)
        order.append("parent")
        await sleep(1)

    spawn(parent, reactor=clock)
    assert order == ["parent", "child"]


def test_sleep_zero_lets_other_tasks_run_first(clock: Clock) -> None:
    order = []

    async def polite() -> None:
        await sleep(0)
        order.append("polite")

    async def other() -> None:
        order.append("other")

    async def main() -> None:
        spawn(polite)
        spawn(other)

    spawn(main, reactor=clock)
    clock.callLater(0, order.append, "reactor")
    clock.advance(0)
    assert order == ["other", "polite", "reactor"] or order == [
        "other",
        "reactor",
        "polite",
    ]


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_negative_time_is_refused(clock: Clock, seconds: float) -> None:
    with pytest.raises(ValueError, match="0 is the least"):
        sleep(seconds, clock)
    with pytest.raises(ValueError, match="0 is the least"):
        timeout(seconds, clock)


def test_each_task_has_its_own_context_variables(clock: Clock) -> None:
    variable = contextvars.ContextVar("variable", default="none")

    async def sets(value: str) -> tuple[str, str]:
        inherited = variable.get()
        variable.set(value)
        await sleep(1)
        return inherited, variable.get()

    async def parent() -> tuple[Any, ...]:
        variable.set("parent")
        tasks = [spawn(sets, "one"), spawn(sets, "two")]
        return (*[await each for each in tasks], variable.get())

    task = spawn(parent, reactor=clock)
    clock.advance(1)
    assert task.result() == (("parent", "one"), ("parent", "two"), "parent")
    assert variable.get() == "none"


def test_two_busy_tasks_let_the_reactor_run(clock: Clock) -> None:
    turns = 0

    async def busy() -> None:
        nonlocal turns
        while turns < 5000:
            turns += 1
            await spawn(_nothing)

    task = spawn(busy, reactor=clock)
    assert 0 < turns < 5000
    while not task.done:
        before = turns
        clock.advance(0)
        assert turns > before or task.done


async def _nothing() -> None:
    pass


def test_a_task_of_another_reactor_runs_within_a_task(clock: Clock) -> None:
    """Then the outer task is the current one again."""
    seen: list[str] = []

    async def other() -> None:
        seen.append(current_task().name)
        await sleep(1)
        seen.append(current_task().name)

    async def main() -> None:
        another = Clock()
        spawn(other, name="other", reactor=another)
        seen.append(current_task().name)
        another.advance(1)
        seen.append(current_task().name)

    assert spawn(main, name="main", reactor=clock).result() is None
    assert seen == ["other", "main", "other", "main"]


def test_an_error_of_a_canceller_does_not_stop_the_scheduler(
    clock: Clock, logged: list[Any]
) -> None:
    """It is logged, and the scheduler goes on."""

    def refuse(deferred: Deferred[None]) -> None:
        raise KeyError("why")

    async def cancels_itself() -> None:
        current_task().cancel()
        await Deferred(refuse)

    for _ in range(3):
        assert spawn(cancels_itself, reactor=clock).cancelled
        assert spawn(lambda: defer.succeed(1), reactor=clock).result() == 1
    assert [event["log_failure"].type for event in logged] == [KeyError] * 3


# Errors


def test_result_raises_the_error_of_the_task(clock: Clock, logged: list[Any]) -> None:
    async def fails() -> None:
        await defer.succeed(None)
        raise KeyError("why")

    async def waits() -> None:
        with pytest.raises(KeyError, match="why"):
            await spawn(fails)

    spawn(waits, reactor=clock).result()
    with pytest.raises(KeyError, match="why"):
        spawn(fails, reactor=clock).result()
    deferred = spawn(fails, reactor=clock).as_deferred()
    deferred.addErrback(lambda failure: failure.trap(KeyError))
    assert failures(logged) == []


def test_an_error_that_is_never_retrieved_is_logged(
    clock: Clock, logged: list[Any]
) -> None:
    async def helper() -> None:
        raise KeyError("why")

    async def fails() -> None:
        await sleep(1)
        await helper()

    spawn(fails, name="Frederick", reactor=clock)
    clock.advance(1)
    [failure] = failures(logged)
    assert [each["name"] for each in logged if "name" in each] == ["Frederick"]
    trace = failure.getTraceback()
    assert trace.index("in fails") < trace.index("in helper")
    assert "twisted" not in trace.replace("twisted_rtsig/tests", "")


def test_tracebacks_show_only_the_users_code(clock: Clock) -> None:
    @coroutine
    def third() -> Generator[Any, Any, None]:
        yield sleep(1)
        raise KeyError("why")

    @inlineCallbacks
    def second() -> Generator[Any, Any, None]:
        yield third()

    async def first() -> None:
        try:
            await second()
        except KeyError as error:
            raise RuntimeError("therefore") from error

    task = spawn(first, reactor=clock)
    clock.advance(1)
    with pytest.raises(RuntimeError) as caught:
        task.result()
    cause = caught.value.__cause__
    assert cause is not None
    names = [each.name for each in traceback.extract_tb(cause.__traceback__)]
    assert names == ["first", "second", "third"]


# Cancellation


def test_cancelling_a_task_cancels_what_it_waits_for(clock: Clock) -> None:
    cancelled: list[Any] = []
    deferred: Deferred[None] = Deferred(cancelled.append)

    async def waits() -> None:
        try:
            await deferred
        except Exception:
            pytest.fail("it is no Exception")
        finally:
            await sleep(1)
            cancelled.append("cleaned up")

    task = spawn(waits, reactor=clock)
    task.cancel()
    assert cancelled == [deferred]
    clock.advance(1)
    assert cancelled == [deferred, "cleaned up"]
    assert task.cancelled
    with pytest.raises(CancelledError):
        task.result()
    task.cancel()


def test_a_cancelled_task_raises_twisteds_cancelled_error(clock: Clock) -> None:
    task = spawn(sleep, 5, reactor=clock)
    deferred = task.as_deferred()
    caught: list[Any] = []
    deferred.addErrback(caught.append)
    deferred.cancel()
    assert caught[0].check(CancelledError)
    assert task.cancelled
    assert not clock.getDelayedCalls()


def test_a_cancelled_error_of_something_else_is_an_error(clock: Clock) -> None:
    deferred: Deferred[None] = Deferred()

    async def waits() -> str:
        with pytest.raises(CancelledError):
            await deferred
        return "not mine"

    task = spawn(waits, reactor=clock)
    deferred.cancel()
    assert task.result() == "not mine"


def test_cancelling_does_not_lose_a_result_that_has_arrived(clock: Clock) -> None:
    deferred: Deferred[str] = Deferred()
    got = []

    async def waits() -> None:
        got.append(await deferred)
        await sleep(5)

    async def main() -> None:
        task = spawn(waits)
        await sleep(0)
        deferred.callback("a connection")
        # It is about to be resumed.
        task.cancel()
        with pytest.raises(CancelledError):
            await task

    task = spawn(main, reactor=clock)
    clock.advance(0)
    assert got == ["a connection"]
    task.result()


def test_a_task_that_ignores_its_cancellation(clock: Clock) -> None:
    deferred: Deferred[str] = Deferred(lambda d: d.callback("late"))

    async def waits() -> str:
        result = await deferred
        with pytest.raises(Cancelled):
            await sleep(1)
        return result

    task = spawn(waits, reactor=clock)
    task.cancel()
    assert task.result() == "late"


def test_a_cancelled_task_waits_for_the_cleanup_of_what_it_waits_for(
    clock: Clock,
) -> None:
    @inlineCallbacks
    def cleans_up() -> Generator[Any, Any, None]:
        try:
            yield Deferred()
        finally:
            yield sleep(1, clock)

    async def waits() -> None:
        await cleans_up()

    task = spawn(waits, reactor=clock)
    task.cancel()
    assert not task.done
    clock.advance(1)
    assert task.cancelled


@pytest.mark.parametrize("late", [True, False])
def test_an_operation_that_fails_when_it_is_cancelled(clock: Clock, late: bool) -> None:
    """At once, the error is the cancellation; later, it is an error of its own."""

    @inlineCallbacks
    def cleans_up_badly() -> Generator[Any, Any, None]:
        try:
            yield Deferred()
        finally:
            if late:
                yield sleep(1, clock)
            raise KeyError("cleaning up")

    seen: list[BaseException] = []

    async def waits() -> None:
        try:
            await cleans_up_badly()
        except BaseException as error:
            seen.append(error)
            raise

    task = spawn(waits, reactor=clock)
    task.cancel()
    assert task.done != late
    clock.advance(1)
    assert task.cancelled != late
    cause = seen[0] if late else seen[0].__cause__
    assert isinstance(cause, KeyError)
    if late:
        with pytest.raises(KeyError):
            task.result()


@pytest.mark.parametrize("which", [-1, 19_800], ids=["the last", "one before it"])
def test_a_long_chain_is_cancelled(clock: Clock, which: int) -> None:
    """The first task is cancelled at once, then each that waits for the one before."""
    told: list[int] = []

    async def wait(number: int, awaited: Any) -> None:
        try:
            await awaited
        except Cancelled:
            told.append(number)
            raise
        except CancelledError:
            # It was not cancelled itself.
            told.append(-number)
            raise

    last: Any = Deferred()
    tasks: list[Task[None]] = []
    for number in range(20_000):
        last = spawn(wait, number, last, reactor=clock)
        tasks.append(last)
    tasks[which].cancel()
    while not last.done:
        clock.advance(0)
    cancelled = list(range(20_000))[: which + 1 or None]
    assert told == [*cancelled, *(-n for n in range(len(cancelled), 20_000))]
    assert all(tasks[number].cancelled for number in cancelled)
    for task in tasks[len(cancelled) :]:
        with pytest.raises(CancelledError):
            task.result()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_tasks_that_wait_for_each_other_are_cancelled(
    clock: Clock, length: int
) -> None:
    """Also a task that waits for itself."""
    begin: Deferred[None] = Deferred()
    tasks: list[Task[None]] = []

    async def wait(number: int) -> None:
        await begin
        await tasks[(number + 1) % length]

    tasks += [spawn(wait, number, reactor=clock) for number in range(length)]
    begin.callback(None)
    assert not any(each.done for each in tasks)
    tasks[0].cancel()
    assert all(each.cancelled for each in tasks)


@pytest.mark.parametrize("late", [defer.succeed, defer.fail])
def test_the_failure_of_an_abandoned_deferred_is_not_logged(
    clock: Clock, logged: list[Any], late: Any
) -> None:
    deferred: Deferred[Any] = Deferred()

    async def waits() -> None:
        await deferred

    spawn(waits, reactor=clock).cancel()
    if late is defer.succeed:
        deferred.callback(None)
    else:
        deferred.errback(KeyError())
    assert failures(logged) == []


def test_the_failures_of_tasks_that_wait_for_each_other_are_not_logged(
    clock: Clock, logged: list[Any]
) -> None:
    """No task waits for these failures any more."""
    begin: Deferred[None] = Deferred()
    tasks: list[Task[None]] = []

    async def wait(number: int) -> None:
        await begin
        await tasks[1 - number]

    tasks += [spawn(wait, number, reactor=clock) for number in range(2)]
    begin.callback(None)
    tasks[0].cancel()
    assert all(each.cancelled for each in tasks)
    tasks.clear()
    assert failures(logged) == []


@pytest.mark.parametrize("waits_for", [Deferred, lambda: sleep(5)])
@pytest.mark.parametrize("style", ["async def", "generator"])
def test_a_running_task_is_cancelled_where_it_waits_next(
    clock: Clock, waits_for: Any, style: str
) -> None:
    """Once, however often it was cancelled before."""
    seen: list[str] = []

    def cancels_itself() -> None:
        for _ in range(2):
            current_task().cancel()
        seen.append("runs")

    async def async_def() -> None:
        cancels_itself()
        try:
            await waits_for()
        finally:
            await sleep(1)
            seen.append("cleaned up")

    def generator() -> Generator[Any, Any, None]:
        cancels_itself()
        try:
            yield waits_for()
        finally:
            yield sleep(1)
            seen.append("cleaned up")

    task = spawn(async_def if style == "async def" else generator, reactor=clock)
    assert seen == ["runs"]
    clock.advance(1)
    assert seen == ["runs", "cleaned up"]
    assert task.cancelled
    assert not clock.getDelayedCalls()


def test_except_exception_does_not_catch_a_cancellation(clock: Clock) -> None:
    seen: list[str] = []

    def stubborn() -> Generator[Any, Any, None]:
        while True:
            try:
                yield sleep(5)
            except Exception:
                seen.append("swallowed")
            finally:
                seen.append("finally")

    tasks = [spawn(stubborn, reactor=clock), spawn(coroutine(stubborn), reactor=clock)]
    for task in tasks:
        task.cancel()
        assert task.cancelled
    assert seen == ["finally"] * 2
    assert not clock.getDelayedCalls()


# Timeouts


def test_timeout(clock: Clock) -> None:
    async def waits() -> str:
        with (
            pytest.raises(TimeoutError, match="more than 5 s"),
            timeout(5) as limit,
        ):
            await sleep(10)
        assert limit.expired
        with timeout(5) as limit:
            await sleep(1)
        assert not limit.expired
        return "both"

    task = spawn(waits, reactor=clock)
    clock.advance(5)
    clock.advance(1)
    assert task.result() == "both"
    assert not clock.getDelayedCalls()


def test_timeout_in_a_generator(clock: Clock) -> None:
    @coroutine
    def waits() -> Generator[Any, Any, None]:
        with timeout(5):
            yield sleep(10)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await waits()

    task = spawn(main, reactor=clock)
    clock.advance(5)
    task.result()


@pytest.mark.parametrize("style", ["async def", "generator"])
@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [(1, 2, ["inner", "outer"]), (2, 1, ["outer"]), (1, 1, ["outer"])],
)
def test_nested_timeouts_tell_their_expiry_from_the_other(
    clock: Clock, inner: int, outer: int, expected: list[str], style: str
) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def noted(name: str, seconds: int) -> Iterator[None]:
        try:
            with timeout(seconds) as limit:
                yield
        except TimeoutError:
            assert limit.expired
            seen.append(name)

    async def async_def() -> None:
        with noted("outer", outer):
            with noted("inner", inner):
                await sleep(10)
            await sleep(10)

    def generator() -> Generator[Any, Any, None]:
        with noted("outer", outer):
            with noted("inner", inner):
                yield sleep(10)
            yield sleep(10)

    run_it = async_def if style == "async def" else coroutine(generator)
    task = spawn(run_it, reactor=clock)
    clock.advance(1)
    clock.advance(1)
    task.result()
    assert seen == expected
    assert not clock.getDelayedCalls()


def test_a_timeout_that_expires_at_the_end_of_its_block(clock: Clock) -> None:
    deferred: Deferred[None] = Deferred()

    async def waits() -> str:
        with timeout(1):
            await deferred
        await sleep(5)
        return "went on"

    async def main() -> str:
        task = spawn(waits)
        await sleep(0.5)
        deferred.callback(None)
        clock.advance(0.5)
        result: str = await task
        return result

    task = spawn(main, reactor=clock)
    clock.advance(0.5)
    clock.advance(5)
    assert task.result() == "went on"


def test_a_timeout_over_a_yield_of_an_asynchronous_generator(clock: Clock) -> None:
    async def numbers() -> AsyncGenerator[int, None]:
        with timeout(5):
            yield 1

    async def expires_outside() -> None:
        async for _ in numbers():
            await sleep(10)

    async def ends_inside() -> None:
        await generator.__anext__()

    generator = numbers()
    tasks = [spawn(expires_outside, reactor=clock), spawn(ends_inside, reactor=clock)]
    clock.advance(5)
    for task in tasks:
        with pytest.raises(RuntimeError, match="asynchronous generator has yielded"):
            task.result()
    with pytest.raises(RuntimeError, match="asynchronous generator has yielded"):
        generator.aclose().send(None)


def test_functions_that_need_a_task_say_so(clock: Clock) -> None:
    @inlineCallbacks
    def bare() -> Generator[Any, Any, None]:
        yield defer.succeed(None)
        with pytest.raises(NoTaskError, match="@coroutine"), timeout(5):
            pass
        with pytest.raises(NoTaskError, match="@coroutine"), shield():
            pass
        with pytest.raises(NoTaskError, match="@coroutine"):
            current_task()

    async def group() -> None:
        async with TaskGroup():
            pass

    bare().addErrback(lambda failure: pytest.fail(str(failure)))

    async def within_a_task() -> str:
        await bare()
        with pytest.raises(NoTaskError, match="spawn"):
            await Deferred.fromCoroutine(group())
        return current_task().name

    assert spawn(within_a_task, name="mine", reactor=clock).result() == "mine"


@contextlib.contextmanager
def _times_out(seen: list[str]) -> Iterator[None]:
    with pytest.raises(TimeoutError), timeout(1):
        yield
    seen.append("timeout inside")


def test_shield(clock: Clock) -> None:
    seen: list[str] = []

    async def waits() -> None:
        with shield():
            await sleep(2)
            seen.append("shielded")
            with _times_out(seen):
                await sleep(5)
        await sleep(5)
        raise AssertionError("it was not cancelled")

    async def in_time() -> None:
        with pytest.raises(TimeoutError), timeout(1):
            await waits()

    tasks = [spawn(waits, reactor=clock), spawn(in_time, reactor=clock)]
    clock.advance(1)
    tasks[0].cancel()
    clock.advance(1)
    clock.advance(1)
    assert tasks[0].cancelled
    tasks[1].result()
    assert seen == ["shielded", "shielded", "timeout inside", "timeout inside"]


def test_shield_in_a_generator(clock: Clock) -> None:
    seen: list[str] = []

    def waits() -> Generator[Any, Any, None]:
        with shield():
            yield sleep(2)
            seen.append("shielded")
            with _times_out(seen):
                yield sleep(5)
        yield Deferred()

    task = spawn(waits, reactor=clock)
    task.cancel()
    clock.advance(2)
    clock.advance(1)
    assert task.cancelled
    assert seen == ["shielded", "timeout inside"]


# Groups


def test_a_group_waits_for_its_tasks(clock: Clock) -> None:
    async def main() -> list[int]:
        async with TaskGroup() as group:
            tasks = [group.spawn(_after, each, each) for each in (1, 2, 3)]
        return [each.result() for each in tasks]

    task = spawn(main, reactor=clock)
    clock.pump([1, 1])
    assert not task.done
    clock.advance(1)
    assert task.result() == [1, 2, 3]


async def _fails_to_clean_up(error: Exception) -> None:
    try:
        await sleep(60)
    finally:
        raise error


async def _after(seconds: float, value: Any) -> Any:
    await sleep(seconds)
    if isinstance(value, Exception):
        raise value
    return value


@pytest.mark.parametrize("in_block", [False, True])
def test_an_error_cancels_the_other_tasks_of_the_group(
    clock: Clock, in_block: bool
) -> None:
    tasks: list[Task[Any]] = []

    async def main() -> None:
        async with TaskGroup() as group:
            tasks.append(group.spawn(_after, 10, None))
            if in_block:
                await _after(1, KeyError("block"))
            group.spawn(_after, 1, KeyError("task"))
            await sleep(10)

    task = spawn(main, reactor=clock)
    clock.advance(1)
    with pytest.raises(ExceptionGroup) as caught:
        task.result()
    [error] = caught.value.exceptions
    assert isinstance(error, KeyError)
    assert tasks[0].cancelled
    assert not clock.getDelayedCalls()


def test_all_errors_are_raised_together(clock: Clock) -> None:
    async def main() -> None:
        async with TaskGroup() as group:
            group.spawn(_fails_to_clean_up, ValueError("cleaning up"))
            group.spawn(_after, 1, KeyError("task"))

    task = spawn(main, reactor=clock)
    clock.advance(1)
    with pytest.raises(ExceptionGroup) as caught:
        task.result()
    assert {type(each) for each in caught.value.exceptions} == {KeyError, ValueError}


def test_cancelling_the_task_of_a_group_cancels_the_group(clock: Clock) -> None:
    tasks: list[Task[Any]] = []

    async def main() -> None:
        with pytest.raises(TimeoutError), timeout(1):
            async with TaskGroup() as group:
                tasks.append(group.spawn(_after, 10, None))

    task = spawn(main, reactor=clock)
    clock.advance(1)
    task.result()
    assert tasks[0].cancelled


def test_the_tasks_of_a_group_are_cancelled_once_and_can_clean_up(clock: Clock) -> None:
    cleaned_up: list[int] = []

    async def cleans_up(seconds: int) -> None:
        try:
            await sleep(10)
        finally:
            await sleep(seconds)
            cleaned_up.append(seconds)
            if seconds == 1:
                raise ValueError("cleaning up")

    async def main() -> None:
        async with TaskGroup() as group:
            group.spawn(cleans_up, 1)
            group.spawn(cleans_up, 2)
            await _after(1, KeyError("block"))

    task = spawn(main, reactor=clock)
    clock.pump([1, 1])
    # As by a timeout around the group, while it waits for them.
    task.cancel()
    clock.advance(1)
    with pytest.raises(ExceptionGroup) as caught:
        task.result()
    assert {type(each) for each in caught.value.exceptions} == {KeyError, ValueError}
    assert cleaned_up == [1, 2]


def test_the_last_task_ends_while_its_group_is_cancelled(clock: Clock) -> None:
    event = Event()

    async def main() -> None:
        async with TaskGroup() as group:
            group.spawn(event.wait)

    async def ends_and_cancels() -> None:
        event.set()
        task.cancel()

    task = spawn(main, reactor=clock)
    assert spawn(ends_and_cancels, reactor=clock).done
    assert task.cancelled


def test_a_group_whose_coroutine_is_closed(clock: Clock) -> None:
    async def main() -> None:
        async with TaskGroup() as group:
            group.spawn(sleep, 1)
            await Event().wait()

    body = main()
    task = spawn(body, reactor=clock)
    # As the garbage collector does.
    body.close()
    assert not task.done


def test_cancelling_a_group(clock: Clock) -> None:
    async def main() -> str:
        async with TaskGroup() as group:
            group.spawn(_after, 10, None)
            group.cancel()
            await sleep(10)
        return "went on"

    assert spawn(main, reactor=clock).result() == "went on"


def test_a_group_for_generators(clock: Clock) -> None:
    def body(group: TaskGroup, value: int) -> Generator[Any, Any, int]:
        group.spawn(_after, 2, None)
        yield sleep(1)
        return value

    @inlineCallbacks
    def main() -> Generator[Any, int, int]:
        return (yield spawn(run_group, body, 3, reactor=clock).as_deferred())

    results: list[int] = []
    main().addCallback(results.append)
    clock.advance(1)
    assert not results
    clock.advance(1)
    assert results == [3]


@pytest.mark.parametrize("in_body", [False, True])
def test_an_error_in_a_group_for_generators(clock: Clock, in_body: bool) -> None:
    tasks: list[Task[Any]] = []

    def body(group: TaskGroup) -> Generator[Any, Any, None]:
        tasks.append(group.spawn(_after, 10, None))
        if in_body:
            yield sleep(1)
            raise KeyError("body")
        group.spawn(_after, 1, KeyError("task"))
        yield sleep(10)

    def main() -> Generator[Any, Any, ExceptionGroup[Exception]]:
        with pytest.raises(ExceptionGroup) as caught:
            yield run_group(body)
        return caught.value

    task = spawn(main, reactor=clock)
    clock.advance(1)
    [error] = task.result().exceptions
    assert isinstance(error, KeyError)
    assert tasks[0].cancelled
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_cancelling_the_task_of_a_group_for_generators(clock: Clock, how: str) -> None:
    tasks: list[Task[Any]] = []

    def body(group: TaskGroup) -> Generator[Any, Any, None]:
        tasks.append(group.spawn(_after, 10, None))
        yield sleep(10)

    def main() -> Generator[Any, Any, None]:
        with timeout(1 if how == "timeout" else 60):
            yield run_group(body)

    task = spawn(main, reactor=clock)
    clock.advance(1)
    if how == "cancel":
        task.cancel()
    assert task.cancelled == (how == "cancel")
    with pytest.raises(CancelledError if how == "cancel" else TimeoutError):
        task.result()
    assert tasks[0].cancelled
    assert not clock.getDelayedCalls()


def test_a_callback_spawns_into_a_group(clock: Clock) -> None:
    """On the group's reactor; a task that comes after the cancellation is cancelled."""
    late: list[Task[Any]] = []
    groups: list[TaskGroup] = []

    async def cleans_up() -> None:
        try:
            await sleep(60)
        finally:
            await sleep(1)

    async def main() -> None:
        async with TaskGroup() as group:
            groups.append(group)
            group.spawn(cleans_up)

    task = spawn(main, reactor=clock)
    late.append(groups[0].spawn(sleep, 60))
    assert late[0].reactor is clock
    task.cancel()
    assert late[0].cancelled
    # One of them cleans up still.
    assert not task.done
    late.append(groups[0].spawn(sleep, 60))
    assert late[1].cancelled
    clock.advance(1)
    assert task.cancelled
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_the_task_of_a_group_is_cancelled_in_the_block(clock: Clock, how: str) -> None:
    """The group does not take that for its own cancellation."""
    seen: list[str] = []

    async def main() -> None:
        with timeout(1 if how == "timeout" else 60):
            async with TaskGroup() as group:
                group.spawn(sleep, 60)
                await sleep(60)
            seen.append("never")
        seen.append("never")

    task = spawn(main, reactor=clock)
    clock.advance(1)
    if how == "cancel":
        task.cancel()
    with pytest.raises(CancelledError if how == "cancel" else TimeoutError):
        task.result()
    assert seen == []


def test_errors_of_a_group_come_before_a_cancellation(clock: Clock) -> None:
    """The cancellation is not lost: it is raised where the task waits next."""
    seen: list[str] = []

    async def group_of_them() -> None:
        async with TaskGroup() as group:
            group.spawn(_fails_to_clean_up, KeyError("cleaning up"))
            await sleep(60)

    async def main() -> None:
        with pytest.raises(ExceptionGroup):
            await group_of_them()
        seen.append("errors")
        try:
            await sleep(60)
        except Cancelled:
            seen.append("cancelled")
            raise

    task = spawn(main, reactor=clock)
    task.cancel()
    assert seen == ["errors", "cancelled"]
    assert task.cancelled


def test_a_group_runs_nothing_outside_of_its_block(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="outside of its block"):
        TaskGroup().spawn(_nothing)


def _canceller_that_fails(deferred: Deferred[None]) -> None:
    raise KeyError("canceller")


def test_a_canceller_that_fails(clock: Clock, logged: list[Any]) -> None:
    """Its error is logged, and the waiting task is cancelled all the same."""
    never: Deferred[None] = Deferred(_canceller_that_fails)

    async def wait() -> None:
        await never

    async def main() -> str:
        await cancel(spawn(wait))
        with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
            async with TaskGroup() as group:
                group.spawn(wait)
                await sleep(0)
                raise ValueError("block")
        assert [type(each) for each in raised.value.exceptions] == [ValueError]
        ready = Event()
        clock.callLater(1, ready.set)
        chosen, _ = await select(ready, lambda: Deferred(_canceller_that_fails))
        assert chosen is ready
        return "ended"

    task = spawn(main, reactor=clock)
    for _ in range(10):
        clock.advance(1)
    assert task.result() == "ended"
    kinds = [event["log_failure"].type for event in logged if "log_failure" in event]
    assert kinds == [KeyError] * 3


def test_a_keyboard_interrupt_leaves_the_other_tasks_of_the_turn_running(
    clock: Clock,
) -> None:
    """The other tasks that wait for this turn run nevertheless."""
    woken: list[int] = []

    async def wait(number: int) -> None:
        await sleep(0)
        woken.append(number)

    def interrupt() -> None:
        raise KeyboardInterrupt

    tasks = [spawn(wait, 1, reactor=clock)]
    # As Ctrl-C does at any point, if Python's own handler of the signal is there.
    scheduler_of(clock).next_turn(interrupt)
    tasks += [spawn(wait, number, reactor=clock) for number in (2, 3)]
    with pytest.raises(KeyboardInterrupt):
        clock.advance(0)
    clock.advance(0)
    assert woken == [1, 2, 3]
    assert all(each.done for each in tasks)


def test_the_installed_reactor_keeps_its_scheduler() -> None:
    """Else each task that is spawned outside of tasks would make a new one."""

    async def work() -> None:
        pass

    assert spawn(work).done
    scheduler = ref(scheduler_of(None))
    assert spawn(work).done
    gc.collect()
    assert scheduler() is scheduler_of(None)


OUTSIDE_OF_ASYNCIO_AND_WITHIN = """
import asyncio
from twisted_rtsig.coro import spawn

async def current_task():
    try:
        return type(asyncio.current_task())
    except RuntimeError:
        return None

async def main():
    return spawn(current_task).result()

print(spawn(current_task).result())
print(asyncio.run(main()).__name__)
print(spawn(current_task).result())
"""


def test_asyncio_sees_tasks_though_the_scheduler_was_made_before() -> None:
    """In the thread of the reactor a loop of asyncio may run for a while."""
    output = output_of(OUTSIDE_OF_ASYNCIO_AND_WITHIN)
    assert output.split() == ["None", "CurrentTask", "None"]


def test_tasks_run_though_trial_has_cancelled_the_turn_of_others(clock: Clock) -> None:
    """It cancels all delayed calls at the end of a test."""

    async def wait_for_ever() -> None:
        while True:
            await sleep(0)

    async def work() -> int:
        await sleep(0)
        return 4

    left = spawn(wait_for_ever, reactor=clock)
    for call in clock.getDelayedCalls():
        call.cancel()
    task = spawn(work, reactor=clock)
    clock.advance(0)
    assert task.result() == 4
    assert not left.done


def test_a_task_resumes_what_awaits_it_without_callbacks(clock: Clock) -> None:
    async def work() -> int:
        await sleep(1)
        return 4

    async def wait() -> int:
        return await awaited

    awaited = spawn(work, reactor=clock)
    waiting = [spawn(wait, reactor=clock) for _ in range(2)]
    with mock.patch.object(Deferred, "_startRunCallbacks") as run_callbacks:
        clock.advance(1)
    assert not run_callbacks.called
    assert [each.result() for each in waiting] == [4, 4]
