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


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(clock: Clock, function: Callable[..., Any], *args: Any) -> Any:
    task = spawn(function, *args, reactor=clock)
    while not task.done:
        assert clock.getDelayedCalls(), f"{task!r} waits for ever"
        clock.advance(0)
    return task.result()


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
def test_values_go_back_and_forth(clock: Clock, produce: Any) -> None:
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


def test_any_can_transfer_to_any_other(clock: Clock) -> None:
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


def test_it_waits_for_other_things_meanwhile(clock: Clock) -> None:
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


def test_an_error_goes_to_who_was_the_first_to_transfer(
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


def test_a_call_that_fails_is_an_error_of_the_coroutine(clock: Clock) -> None:
    async def takes_nothing() -> None:
        pass

    async def main() -> None:
        other = symmetric(takes_nothing)  # type: ignore[call-arg, arg-type]
        with pytest.raises(TypeError, match="takes_nothing"):
            await transfer(other)
        assert other.failed

    run(clock, main)


def test_the_control_goes_past_those_who_have_ended(clock: Clock) -> None:
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


def test_the_result_goes_past_one_that_has_ended(clock: Clock) -> None:
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
        # It is told that the one whom it started was cancelled.
        with pytest.raises(CancelledError):
            await transfer(made[1])
        assert starts_inner.cancelled
        await sleep(0)
        return made[1].result()

    assert run(clock, main) == "the end of inner"


def test_relays_leave_nothing_behind(clock: Clock) -> None:
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


# Who cannot take over


def test_transfers_that_cannot_be(clock: Clock) -> None:
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
        with pytest.raises(TypeError, match="'nobody'"):
            await transfer("nobody")  # type: ignore[arg-type]
        asleep.cancel()

    run(clock, main)


def test_outside_of_a_task(clock: Clock) -> None:
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


def test_only_functions(clock: Clock) -> None:
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


def test_one_that_was_not_started_is_cancelled(clock: Clock) -> None:
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
    # Nobody is there any more who would get the control.
    clock.advance(9)
    assert not clock.getDelayedCalls()


def test_who_is_to_be_cancelled_hands_nothing_over(clock: Clock) -> None:
    got: list[Any] = []

    async def take(value: Any) -> None:
        got.append(value)

    async def main() -> None:
        other = symmetric(take)
        current_task().cancel()
        try:
            await transfer(other, "lost")
        except Cancelled:
            got.append("cancelled")
            raise

    task = spawn(main, reactor=clock)
    assert task.cancelled
    assert got == ["cancelled"]


def test_nor_to_one_who_waits_for_it(clock: Clock) -> None:
    """The target has transferred itself, and would take over at once."""
    got: list[Any] = []

    async def take(value: Task[Any]) -> None:
        got.append(await transfer(value))

    async def main() -> None:
        other = symmetric(take)
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


def test_they_let_others_have_their_turn(reactor: Any) -> None:
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

    async def main() -> None:
        await transfer(others[0])

    tracemalloc.start()
    try:
        run(clock, main)
    finally:
        tracemalloc.stop()
    assert len(sizes) == 10
    assert max(sizes) - min(sizes) < 100_000


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

    async def main() -> None:
        await transfer(others[0])

    tracemalloc.start()
    try:
        run(clock, main)
    finally:
        tracemalloc.stop()
    assert len(sizes) == 10
    assert max(sizes) - min(sizes) < 100_000
    # Of the first turn, and of the others.
    assert max(depths) - min(depths) < 10


def test_each_has_its_own_context(clock: Clock) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def change(value: str) -> str:
        variable.set(value)
        return variable.get()

    async def main() -> tuple[Any, str]:
        variable.set("main")
        return await transfer(symmetric(change), "other"), variable.get()

    assert run(clock, main) == ("other", "main")
