"""Limiters: a number of borrowers at a time, first come first served."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock

from tests.coro.support import ExpectedError, forgets_awaits, run_for_real
from twisted_rtsig.coro import (
    CapacityLimiter,
    Event,
    NoTaskError,
    Stream,
    Task,
    TaskGroup,
    WouldBlock,
    coroutine,
    format_tasks,
    from_thread,
    in_thread,
    move_on_after,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.testing import cancel_everywhere


async def uses(limiter: CapacityLimiter, inside: list[Any], name: Any) -> None:
    async with limiter:
        inside.append(name)
        await sleep(1)
        inside.remove(name)


def uses_yielding(
    limiter: CapacityLimiter, inside: list[Any], name: Any
) -> Generator[Any, Any, None]:
    yield limiter.acquire()
    try:
        inside.append(name)
        yield sleep(1)
        inside.remove(name)
    finally:
        limiter.release()


STYLES: dict[str, Callable[..., Any]] = {
    "async def": uses,
    "generator": uses_yielding,
    "@coroutine": coroutine(uses_yielding),
}
styles = pytest.mark.parametrize("style", STYLES)


@styles
def test_a_limiter_serves_borrowers_in_order(clock: Clock, style: str) -> None:
    limiter = CapacityLimiter(2)
    inside: list[Any] = []
    tasks = [
        spawn(STYLES[style], limiter, inside, name, reactor=clock) for name in "abcde"
    ]
    for expected in (["a", "b"], ["c", "d"], ["e"], []):
        assert inside == expected
        assert limiter.borrowed_tokens == len(expected)
        assert limiter.available_tokens == 2 - len(expected)
        clock.advance(1)
    for task in tasks:
        task.result()


def test_statistics_and_repr(clock: Clock) -> None:
    limiter = CapacityLimiter(2)
    tasks = [spawn(uses, limiter, [], each, reactor=clock) for each in "abc"]
    assert limiter.statistics() == (2, 2, (tasks[0], tasks[1]), 1)
    assert "waits for a token of <CapacityLimiter at" in format_tasks(clock)
    assert "2 of 2 borrowed, 1 wait>" in repr(limiter)
    clock.pump([1, 1])
    assert limiter.statistics() == (0, 2, (), 0)
    assert limiter.total_tokens == 2


@forgets_awaits
def test_on_behalf_of(clock: Clock) -> None:
    limiter = CapacityLimiter(1)
    got: list[str] = []
    assert limiter.acquire_on_behalf_of("a").called
    waiting = limiter.acquire_on_behalf_of("b").addCallback(lambda _: got.append("b"))
    with pytest.raises(WouldBlock, match="no token left"):
        limiter.try_acquire_on_behalf_of("c")
    for borrower in "ab":
        with pytest.raises(RuntimeError, match="already"):
            limiter.acquire_on_behalf_of(borrower)
        with pytest.raises(RuntimeError, match="already"):
            limiter.try_acquire_on_behalf_of(borrower)
    with pytest.raises(RuntimeError, match="'b' has no token"):
        limiter.release_on_behalf_of("b")
    assert got == []
    limiter.release_on_behalf_of("a")
    assert got == ["b"]
    assert waiting.called
    limiter.release_on_behalf_of("b")
    limiter.try_acquire_on_behalf_of("c")
    assert limiter.statistics().borrowers == ("c",)


def test_a_callback_does_not_overtake_waiting_borrowers() -> None:
    limiter = CapacityLimiter(0)
    order: list[str] = []

    def overtake(result: None) -> None:
        order.append("a")
        limiter.acquire_on_behalf_of("c").addCallback(lambda _: order.append("c"))
        with pytest.raises(WouldBlock):
            limiter.try_acquire_on_behalf_of("d")

    limiter.acquire_on_behalf_of("a").addCallback(overtake)
    limiter.acquire_on_behalf_of("b").addCallback(lambda _: order.append("b"))
    limiter.total_tokens = 2
    assert order == ["a", "b"]
    limiter.release_on_behalf_of("a")
    assert order == ["a", "b", "c"]


@forgets_awaits
def test_a_task_borrows_one_token(clock: Clock) -> None:
    limiter = CapacityLimiter(2)

    async def main() -> None:
        limiter.try_acquire()
        with pytest.raises(RuntimeError, match="already"):
            limiter.acquire()
        limiter.acquire_on_behalf_of("something else")
        await spawn(fails_to_borrow)
        with pytest.raises(RuntimeError, match="has no token"):
            await spawn(limiter.release)
        limiter.release()
        with pytest.raises(RuntimeError, match="has no token"):
            limiter.release()

    async def fails_to_borrow() -> None:
        with pytest.raises(WouldBlock):
            limiter.try_acquire()

    spawn(main, reactor=clock).result()


@pytest.mark.parametrize("name", ["acquire", "try_acquire", "release"])
def test_acquire_outside_of_a_task_raises(name: str) -> None:
    with pytest.raises(NoTaskError, match=f"{name}\\(\\) of a limiter"):
        getattr(CapacityLimiter(1), name)()


# Their number


@pytest.mark.parametrize("total", [1.5, "one", None, math.nan, -math.inf])
def test_a_total_of_another_type_is_refused(total: Any) -> None:
    with pytest.raises(TypeError, match=r"an int, or math\.inf"):
        CapacityLimiter(total)
    limiter = CapacityLimiter(1)
    with pytest.raises(TypeError, match=r"an int, or math\.inf"):
        limiter.total_tokens = total
    assert limiter.total_tokens == 1


def test_a_negative_total_is_refused() -> None:
    with pytest.raises(ValueError, match="0 is the least"):
        CapacityLimiter(-1)
    with pytest.raises(ValueError, match="0 is the least"):
        CapacityLimiter(1).total_tokens = -1


def test_the_total_grows_and_shrinks(clock: Clock) -> None:
    limiter = CapacityLimiter(0)
    inside: list[Any] = []
    for name in range(9):
        spawn(uses, limiter, inside, name, reactor=clock)
    assert inside == []
    limiter.total_tokens = 4
    assert inside == [0, 1, 2, 3]
    limiter.total_tokens = 2
    assert limiter.available_tokens == 0
    assert limiter.borrowed_tokens == 4
    clock.advance(1)
    assert inside == [4, 5]
    limiter.total_tokens = math.inf
    assert inside == [4, 5, 6, 7, 8]
    assert limiter.available_tokens == math.inf
    clock.advance(1)
    assert inside == []


# Cancellation


def test_a_waiting_borrower_is_cancelled(clock: Clock) -> None:
    limiter = CapacityLimiter(1)
    inside: list[Any] = []
    tasks = [spawn(uses, limiter, inside, name, reactor=clock) for name in "abc"]
    tasks[1].cancel()
    assert tasks[1].cancelled
    assert limiter.statistics().tasks_waiting == 1
    clock.advance(1)
    assert inside == ["c"]
    # It may come again.
    limiter.acquire_on_behalf_of(tasks[1]).cancel()
    limiter.acquire_on_behalf_of(tasks[1]).cancel()


def test_a_borrower_cancelled_before_it_runs_releases_its_token(clock: Clock) -> None:
    """It was granted a token, and releases it."""
    limiter = CapacityLimiter(1)

    async def main() -> None:
        limiter.try_acquire_on_behalf_of("main")
        task = spawn(uses, limiter, [], "a")
        await sleep(0)
        limiter.release_on_behalf_of("main")
        assert limiter.statistics().borrowers == (task,)
        task.cancel()
        with pytest.raises(CancelledError):
            await task
        assert limiter.borrowed_tokens == 0

    task = spawn(main, reactor=clock)
    clock.advance(0)
    task.result()


@pytest.mark.filterwarnings("error")
def test_a_garbage_borrower_is_freed_with_its_limiter(clock: Clock) -> None:
    """No task can release its token, and none is left that could want it."""
    limiter = CapacityLimiter(1)
    task = spawn(uses, limiter, [], "a", reactor=clock)
    assert limiter.borrowed_tokens == 1
    task_of_it = weakref.ref(task)
    # The alarm of its sleep.
    clock.calls.clear()
    del task, limiter
    gc.collect()
    assert task_of_it() is None


def test_a_block_in_a_generator_that_is_closed(clock: Clock) -> None:
    limiter = CapacityLimiter(1)

    async def numbers() -> AsyncGenerator[int, None]:
        async with limiter:
            yield 1

    async def main() -> None:
        async with contextlib.aclosing(numbers()) as generator:
            assert await anext(generator) == 1
            assert limiter.borrowed_tokens == 1
        assert limiter.borrowed_tokens == 0

    spawn(main, reactor=clock).result()


def test_cancelled_everywhere() -> None:
    limiters: list[CapacityLimiter] = []

    async def handler(stream: Stream) -> None:
        limiter = CapacityLimiter(1)
        limiters[:] = [limiter]
        async with TaskGroup() as group:
            for name in "abc":
                group.spawn(uses, limiter, [], name)
            async with limiter:
                await stream.read_line()

    def handler_yielding(stream: Stream) -> Generator[Any, Any, None]:
        limiter = CapacityLimiter(1)
        limiters[:] = [limiter]
        other = spawn(uses, limiter, [], "a")
        try:
            yield from uses_yielding(limiter, [], "b")
        finally:
            yield other

    async def peer(stream: Stream) -> None:
        await stream.write(b"one\n")
        await stream.write_eof()

    def nothing_is_borrowed() -> None:
        assert limiters[0].statistics() == (0, 1, (), 0)

    assert cancel_everywhere(handler, peer, nothing_is_borrowed) == 2
    assert cancel_everywhere(handler_yielding, check=nothing_is_borrowed) == 2


@pytest.mark.parametrize("seed", range(20))
def test_random_borrowers_never_exceed_the_total(clock: Clock, seed: int) -> None:
    """They come, are cancelled, fail, and change the total; each of them is served."""
    random_ = random.Random(seed)
    limiter = CapacityLimiter(3)
    order: list[int] = []
    done: list[int] = []

    async def user(number: int) -> None:
        async with limiter:
            order.append(number)
            assert limiter.borrowed_tokens <= 5
            await sleep(random_.random())
            if random_.random() < 0.2:
                raise ExpectedError
        done.append(number)

    tasks: list[Task[None]] = []
    for number in range(100):
        tasks.append(spawn(user, number, reactor=clock))
        if random_.random() < 0.3:
            random_.choice(tasks).cancel()
        if random_.random() < 0.1:
            limiter.total_tokens = random_.randint(0, 5)
        clock.advance(random_.random() / 10)
    limiter.total_tokens = 5
    clock.pump([0.5] * 100)
    assert all(each.done for each in tasks)
    assert order == sorted(order)
    for each in tasks:
        if each.failed:
            with pytest.raises(ExpectedError):
                each.result()
    assert limiter.statistics() == (0, 5, (), 0)


@forgets_awaits
def test_many_borrowers_release_in_a_callback() -> None:
    """Each gets its token from the one before, and the stack does not grow."""
    limiter = CapacityLimiter(1)
    limiter.acquire_on_behalf_of("first")
    count = 10_000

    def release(acquired: None, number: int) -> None:
        limiter.release_on_behalf_of(number)

    for number in range(count):
        limiter.acquire_on_behalf_of(number).addCallback(release, number)
    limiter.release_on_behalf_of("first")
    assert limiter.statistics() == (0, 1, (), 0)


# Threads


def test_threads(reactor: Any) -> None:
    limiter = CapacityLimiter(2)
    lock = threading.Lock()
    running = 0
    most = 0
    all_here = threading.Barrier(2, timeout=10)

    def blocks(number: int, *, double: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        all_here.wait()
        with lock:
            running -= 1
        return number * double

    async def main() -> list[int]:
        waits = [limiter.in_thread(blocks, each, double=2) for each in range(6)]
        assert limiter.borrowed_tokens == 2
        assert limiter.statistics().tasks_waiting == 4
        assert "blocks" in repr(limiter.statistics().borrowers[0])
        return [await each for each in waits]

    assert run_for_real(reactor, main) == [0, 2, 4, 6, 8, 10]
    assert most == 2
    assert limiter.borrowed_tokens == 0


def test_a_thread_that_fails_returns_its_token(reactor: Any) -> None:
    limiter = CapacityLimiter(1)

    async def main() -> int:
        with pytest.raises(ValueError, match="one"):
            await limiter.in_thread(int, "one")
        return await limiter.in_thread(int, "1")

    assert run_for_real(reactor, main) == 1


def test_an_abandoned_thread_keeps_its_token(reactor: Any) -> None:
    limiter = CapacityLimiter(1)
    go_on = threading.Event()

    async def main() -> list[bool]:
        with move_on_after(0.01) as limit:
            await limiter.in_thread(go_on.wait)
        seen = [limit.expired, limiter.borrowed_tokens == 1]
        with move_on_after(0.01) as limit:
            await limiter.in_thread(seen.append, False)
        seen += [limit.expired, limiter.statistics().tasks_waiting == 0]
        go_on.set()
        with timeout(10):
            await limiter.in_thread(seen.append, True)
        seen.append(limiter.borrowed_tokens == 0)
        return seen

    assert all(run_for_real(reactor, main))


def test_format_tasks_shows_what_a_thread_waits_for(reactor: Any) -> None:
    limiter = CapacityLimiter(1)
    limiter.try_acquire_on_behalf_of("test")

    async def main() -> str:
        task = spawn(limiter.in_thread, int, "1")
        await sleep(0)
        listing = format_tasks(reactor)
        task.cancel()
        return listing

    listing = run_for_real(reactor, main)
    assert "waits for a token of <CapacityLimiter" in listing
    assert "for <class 'int'> in a thread" in listing


def test_a_thread_has_the_context_of_the_call(reactor: Any) -> None:
    """Its calls reach the reactor, also when the thread had to wait for its token."""
    limiter = CapacityLimiter(1)
    event = Event()

    async def main() -> None:
        limiter.try_acquire_on_behalf_of("test")
        waiting = limiter.in_thread(from_thread, event.wait)
        await in_thread(int, "1")
        limiter.release_on_behalf_of("test")
        event.set()
        await waiting

    run_for_real(reactor, main)
    assert limiter.borrowed_tokens == 0
