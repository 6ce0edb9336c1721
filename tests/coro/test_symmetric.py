"""Symmetric coroutines: which one runs, and which value it gets."""

from __future__ import annotations

import contextvars
import gc
import sys
import weakref
from collections.abc import Callable, Generator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tests.coro.support import spin
from twisted_rtsig.coro import (
    Cancelled,
    NoTaskError,
    Task,
    TransferError,
    coroutine,
    current_task,
    sleep,
    spawn,
    symmetric,
    timeout,
    transfer,
)


def run(clock: Clock, function: Callable[..., Any], *args: Any) -> Any:
    task = spawn(function, *args, reactor=clock)
    while not task.done:
        assert clock.getDelayedCalls(), f"{task!r} waits for ever"
        clock.advance(0)
    return task.result()


def run_in_constant_memory(
    tracemalloc: Any, clock: Clock, first: Task[Any], sizes: list[int]
) -> None:
    """
    Transfer to a task, and run until that is over; the memory does not grow.

    :param sizes: what the task has measured meanwhile, in bytes.
    """

    async def main() -> None:
        await transfer(first)

    tracemalloc.start()
    try:
        run(clock, main)
    finally:
        tracemalloc.stop()
    assert len(sizes) == 10
    assert max(sizes) - min(sizes) < 100_000


# The same in both styles


async def _produce(consumer: Task[Any]) -> str:
    for item in range(3):
        asked = await transfer(consumer, item)
        assert asked == f"more than {item}"
    return "no more"


def _produce_as_generator(consumer: Task[Any]) -> Generator[Any, Any, str]:
    for item in range(3):
        asked = yield transfer(consumer, item)
        assert asked == f"more than {item}"
    return "no more"


@pytest.mark.parametrize(
    "produce", [_produce, _produce_as_generator, coroutine(_produce_as_generator)]
)
def test_transfers_pass_values_back_and_forth(clock: Clock, produce: Any) -> None:
    got: list[Any] = []

    async def consume(producer: Task[Any], item: Any) -> None:
        while True:
            got.append(item)
            item = await transfer(producer, f"more than {item}")

    async def main() -> str:
        producer = symmetric(produce)
        consumer = symmetric(consume, producer)
        result: str = await transfer(producer, consumer)
        return result

    assert run(clock, main) == "no more"
    assert got == [0, 1, 2]


def test_any_task_can_transfer_to_any_other(clock: Clock) -> None:
    ring: list[Task[Any]] = []

    async def node(main: Task[Any], number: int, count: int) -> None:
        while count < 10:
            count = await transfer(ring[(number + 1) % 3], count + 1)
        await transfer(main, f"{count} at {number}")

    async def main() -> Any:
        ring.extend(symmetric(node, current_task(), number) for number in range(3))
        return await transfer(ring[0], 0)

    assert run(clock, main) == "10 at 1"


def test_a_task_that_has_transferred_is_a_target_like_any_other(clock: Clock) -> None:
    async def answer(main: Task[Any], question: str) -> None:
        while True:
            question = await transfer(main, question.upper())

    async def main() -> list[str]:
        other = symmetric(answer, current_task())
        return [await transfer(other, each) for each in ("a", "b")]

    assert run(clock, main) == ["A", "B"]


def test_a_symmetric_task_awaits_other_operations(clock: Clock) -> None:
    async def dawdle(value: str) -> str:
        await sleep(5)
        return value

    async def main() -> Any:
        return await transfer(symmetric(dawdle), "at last")

    task = spawn(main, reactor=clock)
    clock.advance(4)
    assert not task.done
    clock.advance(1)
    assert task.result() == "at last"


# The end


def test_an_error_is_raised_in_the_first_task_that_transferred(
    clock: Clock, logged: list[Any]
) -> None:
    async def fail(value: Any) -> None:
        raise KeyError(value)

    async def main() -> str:
        with pytest.raises(KeyError, match="why"):
            await transfer(symmetric(fail), "why")
        return "went on"

    assert run(clock, main) == "went on"
    gc.collect()
    assert not [event for event in logged if "log_failure" in event]


def test_an_error_of_the_call_is_an_error_of_the_task(clock: Clock) -> None:
    async def takes_nothing() -> None:
        pass

    async def main() -> None:
        other = symmetric(takes_nothing)  # type: ignore[call-arg, arg-type]
        with pytest.raises(TypeError, match="takes_nothing"):
            await transfer(other)
        assert other.failed

    run(clock, main)


def test_control_passes_over_ended_tasks(clock: Clock) -> None:
    relayed: list[Task[Any]] = []

    async def relay(count: int) -> Any:
        relayed.append(current_task())
        if count == 0:
            for each in relayed[:-1]:
                each.cancel()
            await sleep(0)
            return "from the last one"
        return await transfer(symmetric(relay), count - 1)

    async def main() -> list[Any]:
        first = symmetric(relay)
        with pytest.raises(CancelledError):
            await transfer(first, 3)

        await sleep(0)
        return [each.cancelled for each in relayed]

    assert run(clock, main) == [True, True, True, False]


def test_the_result_passes_over_an_ended_task(clock: Clock) -> None:
    made: list[Task[Any]] = []

    async def inner(value: Any) -> str:
        await transfer(made[0], "inner")
        return "the end of inner"

    async def middle(value: Any) -> str:
        made.append(symmetric(inner))
        await transfer(made[1])
        return "never"

    async def main() -> Any:
        made.append(current_task())
        starts_inner = symmetric(middle)
        assert await transfer(starts_inner) == "inner"
        starts_inner.cancel()
        # It gets the cancellation of the task that it started.
        with pytest.raises(CancelledError):
            await transfer(made[1])
        assert starts_inner.cancelled
        await sleep(0)
        return made[1].result()

    assert run(clock, main) == "the end of inner"


def test_ended_tasks_of_a_relay_are_freed(clock: Clock) -> None:
    seen: list[weakref.ref[Task[Any]]] = []
    main_task: list[Task[Any]] = []

    async def relay(count: int) -> None:
        seen.append(weakref.ref(current_task()))
        following = symmetric(relay)
        if count:
            spawn(jump, following, count - 1)

    async def jump(following: Task[Any], count: int) -> None:
        await transfer(following, count)

    spawn(jump, symmetric(relay, reactor=clock), 50, reactor=clock)
    main_task.clear()
    while clock.getDelayedCalls():
        clock.advance(0)
    gc.collect()
    assert len(seen) == 51
    assert [each() for each in seen] == [None] * 51


# Tasks that cannot be transferred to


def test_transfer_refuses_bad_targets(clock: Clock) -> None:
    async def end(value: Any) -> Any:
        return value

    async def main() -> None:
        ended = symmetric(end)
        assert await transfer(ended, 1) == 1
        with pytest.raises(TransferError, match="which has ended"):
            await transfer(ended)
        with pytest.raises(TransferError, match="which runs already"):
            await transfer(current_task())
        asleep = spawn(sleep, 5)
        await sleep(0)
        with pytest.raises(TransferError, match=r"which waits for 5\.0 more seconds"):
            await transfer(asleep)
        ready = spawn(end, 1)
        with pytest.raises(TransferError, match="which runs already"):
            await transfer(ready)
        with pytest.raises(TypeError, match="'no task'"):
            await transfer("no task")  # type: ignore[arg-type]
        asleep.cancel()

    run(clock, main)


def test_transfer_outside_of_a_task_raises(clock: Clock) -> None:
    async def end(value: Any) -> Any:
        return value

    other = symmetric(end, reactor=clock)
    errors: list[type[BaseException] | None] = []

    def note(failure: Failure) -> None:
        errors.append(failure.type)

    async def awaits() -> None:
        await transfer(other)

    @inlineCallbacks
    def yields() -> Generator[Any, Any, None]:
        yield transfer(other)

    deferreds: list[Deferred[Any]] = [Deferred.fromCoroutine(awaits()), yields()]
    for deferred in deferreds:
        deferred.addErrback(note)
    assert errors == [NoTaskError, NoTaskError]
    assert not other.done


def test_symmetric_refuses_other_objects(clock: Clock) -> None:
    with pytest.raises(TypeError, match="needs a function"):
        symmetric(5)  # type: ignore[call-overload]


def test_yield_from(clock: Clock) -> None:
    def answer(value: int) -> int:
        return value + 1

    def main() -> Generator[Any, Any, int]:
        first: int = yield from transfer(symmetric(answer), 1)
        second: int = yield from transfer(symmetric(answer), first)
        return second

    assert spawn(main, reactor=clock).result() == 3


# Cancellation


def test_a_symmetric_task_is_cancelled_before_its_start(clock: Clock) -> None:
    async def end(value: Any) -> None:
        pass

    async def transfers() -> None:
        await transfer(other)

    other = symmetric(end, reactor=clock)
    other.cancel()
    assert other.cancelled
    task = spawn(transfers, reactor=clock)
    with pytest.raises(TransferError, match="has ended"):
        task.result()


def test_a_timeout_around_a_transfer(clock: Clock) -> None:
    async def dawdle(value: Any) -> None:
        await sleep(10)

    async def main() -> str:
        other = symmetric(dawdle)
        with pytest.raises(TimeoutError), timeout(1):
            await transfer(other)
        return "in time"

    task = spawn(main, reactor=clock)
    clock.advance(1)
    assert task.result() == "in time"
    # No task is left that could get the control.
    clock.advance(9)
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("target_waits", [False, True])
def test_a_cancelled_task_transfers_no_value(clock: Clock, target_waits: bool) -> None:
    """
    Neither to a new task, nor to one that has transferred its own value, and would
    take over at once.
    """
    got: list[Any] = []

    async def take(value: Any) -> None:
        got.append(value)

    async def take_later(value: Task[Any]) -> None:
        got.append(await transfer(value))

    async def main() -> None:
        other = symmetric(take_later if target_waits else take)
        if target_waits:
            await transfer(other, current_task())
        current_task().cancel()
        try:
            await transfer(other, "lost")
        except Cancelled:
            got.append("cancelled")
            raise

    task = spawn(main, reactor=clock)
    assert task.cancelled
    assert got == ["cancelled"]


# Turns, memory, context


def test_transferring_tasks_let_the_reactor_run(reactor: Any) -> None:
    async def play(value: Task[Any]) -> None:
        while True:
            value = await transfer(value, current_task())

    async def main() -> None:
        await transfer(symmetric(play), symmetric(play))

    task = spawn(main, reactor=reactor)
    turns: list[None] = []
    reactor.callLater(0, turns.append, None)
    spin(reactor, lambda: turns)
    assert not task.done
    task.cancel()


def test_many_transfers_take_no_memory(tracemalloc: Any, clock: Clock) -> None:
    sizes: list[int] = []

    def play(value: Any) -> Generator[Any, Any, None]:
        for count in range(100_000):
            if count % 20_000 == 1000:
                sizes.append(tracemalloc.get_traced_memory()[0])
            yield transfer(others[current_task() is others[0]], count)

    others = [symmetric(play, reactor=clock) for _ in range(2)]

    run_in_constant_memory(tracemalloc, clock, others[0], sizes)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["async def", "generator"])
def test_a_million_transfers(tracemalloc: Any, clock: Clock, style: str) -> None:
    """In both styles they take no memory, and no stack."""
    sizes: list[int] = []
    depths: set[int] = set()

    def look(count: int) -> None:
        if count % 100_000 == 1000:
            sizes.append(tracemalloc.get_traced_memory()[0])
            frame, depth = sys._getframe(), 0
            while frame.f_back is not None:
                frame, depth = frame.f_back, depth + 1
            depths.add(depth)

    async def async_def(other: int, value: Any) -> None:
        for count in range(500_000):
            look(count)
            await transfer(others[other], count)

    def generator(other: int, value: Any) -> Generator[Any, Any, None]:
        for count in range(500_000):
            look(count)
            yield transfer(others[other], count)

    play = async_def if style == "async def" else generator
    others = [symmetric(play, 1, reactor=clock), symmetric(play, 0, reactor=clock)]

    run_in_constant_memory(tracemalloc, clock, others[0], sizes)
    # Of the first turn, and of the others.
    assert max(depths) - min(depths) < 10


def test_each_symmetric_task_has_its_own_context(clock: Clock) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def change(value: str) -> str:
        variable.set(value)
        return variable.get()

    async def main() -> tuple[Any, str]:
        variable.set("main")
        return await transfer(symmetric(change), "other"), variable.get()

    assert run(clock, main) == ("other", "main")
