"""Scopes: deadlines that can be moved, and blocks that are left without an error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from tests.coro.support import run
from twisted_rtsig.coro import (
    Cancelled,
    CancelScope,
    Event,
    NoTaskError,
    Stream,
    TaskGroup,
    coroutine,
    current_deadline,
    current_time,
    move_on_after,
    move_on_at,
    run_group,
    shield,
    sleep,
    spawn,
    timeout,
    timeout_at,
)
from twisted_rtsig.coro.testing import cancel_everywhere


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    # A deadline of 0 is in the past.
    clock.advance(100)
    return clock


# Each makes a limit of so many seconds.
LIMITS: dict[str, Callable[[float], Any]] = {
    "timeout": timeout,
    "timeout_at": lambda seconds: timeout_at(current_time() + seconds),
    "move_on_after": move_on_after,
    "move_on_at": lambda seconds: move_on_at(current_time() + seconds),
    "CancelScope": lambda seconds: CancelScope(deadline=current_time() + seconds),
}
limits = pytest.mark.parametrize("kind", LIMITS)
SILENT = ["move_on_after", "move_on_at", "CancelScope"]


def quiet(kind: str) -> Any:
    return (
        contextlib.nullcontext()
        if kind in SILENT
        else contextlib.suppress(TimeoutError)
    )


async def sleeps(limit: Any, seconds: float) -> None:
    with limit:
        await sleep(seconds)


def sleeps_yielding(limit: Any, seconds: float) -> Generator[Any, Any, None]:
    with limit:
        yield sleep(seconds)


BODIES = {
    "async def": sleeps,
    "generator": sleeps_yielding,
    "@coroutine": coroutine(sleeps_yielding),
}
bodies = pytest.mark.parametrize("body", BODIES)


@bodies
@limits
def test_what_takes_too_long_is_cancelled(clock: Clock, kind: str, body: str) -> None:
    made = []

    async def main() -> float:
        made.append(LIMITS[kind](5))
        if kind in SILENT:
            await spawn(BODIES[body], made[0], 10)
        else:
            with pytest.raises(TimeoutError):
                await spawn(BODIES[body], made[0], 10)
        return current_time()

    task = spawn(main, reactor=clock)
    clock.advance(5)
    assert task.result() == 105
    assert made[0].expired
    assert made[0].deadline == 105
    assert not clock.getDelayedCalls()


@bodies
@limits
def test_a_block_that_ends_in_time(clock: Clock, kind: str, body: str) -> None:
    made: list[Any] = []

    async def main() -> float:
        made.append(LIMITS[kind](5))
        await spawn(BODIES[body], made[0], 1)
        return current_time()

    task = spawn(main, reactor=clock)
    clock.advance(1)
    assert task.result() == 101
    assert not made[0].expired
    assert made[0].deadline == 105
    assert not clock.getDelayedCalls()


def test_error_messages(clock: Clock) -> None:
    texts: list[str] = []

    async def main() -> None:
        for limit in (timeout(1), timeout_at(current_time() + 2)):
            try:
                with limit:
                    try:
                        await sleep(10)
                    except Cancelled as error:
                        texts.append(str(error))
                        raise
            except TimeoutError as error:
                texts.append(str(error))

    task = spawn(main, reactor=clock)
    clock.pump([1, 1])
    task.result()
    seconds, deadline = "it took more than 1 s", "the deadline has passed"
    assert texts == [seconds, seconds, deadline, deadline]


@limits
def test_other_errors_are_raised(clock: Clock, kind: str) -> None:
    async def main() -> None:
        with LIMITS[kind](5):
            raise KeyError

    with pytest.raises(KeyError):
        spawn(main, reactor=clock).result()
    assert not clock.getDelayedCalls()


@limits
def test_the_cancellation_of_the_task_is_raised(clock: Clock, kind: str) -> None:
    made: list[Any] = []

    async def main() -> None:
        made.append(LIMITS[kind](5))
        with made[0]:
            await sleep(10)

    task = spawn(main, reactor=clock)
    task.cancel()
    assert task.cancelled
    assert not made[0].expired
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize(
    ("inner", "outer", "expected"), [(1, 2, (True, True)), (2, 1, (False, True))]
)
def test_each_scope_leaves_only_its_own_block(
    clock: Clock, inner: float, outer: float, expected: tuple[bool, bool]
) -> None:
    seen: list[str] = []

    async def main() -> tuple[bool, bool]:
        with move_on_after(outer) as first:
            with move_on_after(inner) as second:
                await sleep(10)
            seen.append("after the inner one")
            await sleep(10)
        return second.expired, first.expired

    task = spawn(main, reactor=clock)
    clock.pump([1, 1])
    assert task.result() == expected
    assert seen == (["after the inner one"] if expected[0] else [])


@limits
def test_a_block_that_reaches_its_end_has_not_expired(clock: Clock, kind: str) -> None:
    """Else the value that the block got would be taken for missing."""
    event: Deferred[str] = Deferred()

    async def main() -> tuple[str, bool]:
        with LIMITS[kind](1) as limit:
            value = await event
        return value, limit.expired

    async def both_at_once() -> None:
        await sleep(0.5)
        event.callback("value")
        clock.advance(0.5)

    task = spawn(main, reactor=clock)
    spawn(both_at_once, reactor=clock)
    clock.advance(0.5)
    assert task.result() == ("value", False)


@limits
@pytest.mark.parametrize("seconds", [0, -1])
def test_a_timeout_of_zero(clock: Clock, kind: str, seconds: float) -> None:
    """Results that are there already are returned; nothing is waited for."""
    if seconds and kind in ("timeout", "move_on_after"):
        with pytest.raises(ValueError, match="0 is the least"):
            LIMITS[kind](seconds)
        return
    event = Event()
    event.set()
    got: list[str] = []

    async def main() -> bool:
        limit = LIMITS[kind](seconds)
        with quiet(kind), limit:
            await event.wait()
            got.append("what is there")
            await sleep(1)
            got.append("never")
        return bool(limit.expired)

    assert spawn(main, reactor=clock).result()
    assert got == ["what is there"]
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize(
    "make",
    [
        lambda: timeout(None),
        lambda: timeout(math.inf),
        lambda: timeout_at(None),
        lambda: timeout_at(math.inf),
        lambda: move_on_after(None),
        lambda: move_on_after(math.inf),
        lambda: move_on_at(None),
        lambda: move_on_at(math.inf),
        CancelScope,
    ],
)
def test_a_timeout_of_none(clock: Clock, make: Callable[[], Any]) -> None:
    async def main() -> str:
        with make() as limit:
            assert limit.deadline == current_deadline() == math.inf
            assert "without a limit" in repr(limit)
            await sleep(1e6)
        return "done"

    task = spawn(main, reactor=clock)
    assert len(clock.getDelayedCalls()) == 1
    clock.advance(1e6)
    assert task.result() == "done"


@pytest.mark.parametrize(
    "make", [timeout, timeout_at, move_on_after, move_on_at, lambda nan: setting(nan)]
)
def test_a_timeout_of_nan_is_refused(make: Callable[[float], Any]) -> None:
    with pytest.raises(ValueError, match=r"nan|not a number"):
        make(math.nan)


def setting(deadline: float) -> None:
    CancelScope().deadline = deadline


@pytest.mark.parametrize("make", [lambda: timeout(1), CancelScope])
def test_scopes_outside_of_a_task_raise(make: Callable[[], Any]) -> None:
    with pytest.raises(NoTaskError), make():
        pass
    with pytest.raises(NoTaskError):
        current_deadline()


@limits
def test_entering_a_scope_twice_raises(clock: Clock, kind: str) -> None:
    async def main() -> None:
        limit = LIMITS[kind](5)
        with limit:
            pass
        with pytest.raises(RuntimeError, match="entered before"), limit:
            pass

    spawn(main, reactor=clock).result()
    assert not clock.getDelayedCalls()


# Deadlines that are moved


@limits
@pytest.mark.parametrize("when", [103, 120, 100, 50, math.inf])
@pytest.mark.parametrize("where", ["before", "inside", "outside"])
def test_the_deadline_is_moved(
    clock: Clock, kind: str, when: float, where: str
) -> None:
    made: list[Any] = []

    async def main() -> float:
        limit = LIMITS[kind](10)
        made.append(limit)
        assert limit.deadline == 110
        if where == "before":
            limit.deadline = when
        with quiet(kind), limit:
            if where == "inside":
                limit.deadline = when
                assert limit.deadline == when
            await sleep(200)
        return current_time()

    task = spawn(main, reactor=clock)
    if where == "outside":
        made[0].deadline = when
    for _ in range(400):
        clock.advance(0.5)
    assert task.result() == min(max(when, 100), 300)
    assert made[0].expired == (when != math.inf)
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("kind", ["timeout", "move_on_at"])
def test_a_deadline_moved_on_each_arrival(clock: Clock, kind: str) -> None:
    """A peer must not be silent for long: each arrival moves the deadline."""

    async def main() -> float:
        with quiet(kind), LIMITS[kind](3) as limit:
            for _ in range(10):
                await sleep(2)
                limit.deadline = current_time() + 3
            await sleep(50)
        return current_time()

    task = spawn(main, reactor=clock)
    clock.pump([0.5] * 60)
    assert task.result() == 100 + 20 + 3
    assert not clock.getDelayedCalls()


def test_moving_a_deadline_too_late(clock: Clock) -> None:
    async def main() -> None:
        with move_on_after(1) as limit:
            try:
                await sleep(10)
            finally:
                limit.deadline = math.inf
                assert limit.expired
                await sleep(1)
        assert limit.expired
        # Nothing comes of it after the block.
        limit.deadline = 0
        await sleep(1)

    task = spawn(main, reactor=clock)
    clock.pump([1, 1, 1])
    task.result()
    assert not clock.getDelayedCalls()


@limits
@pytest.mark.parametrize("moved", [True, False])
def test_a_delayed_call_that_other_code_has_cancelled(
    clock: Clock, kind: str, moved: bool
) -> None:
    """As trial does at the end of a test."""

    async def main() -> str:
        with LIMITS[kind](5) as limit:
            for each in clock.getDelayedCalls():
                each.cancel()
            if moved:
                limit.deadline = math.inf
        return "done"

    assert spawn(main, reactor=clock).result() == "done"


# To cancel a scope


@pytest.mark.parametrize("where", ["before", "inside", "outside"])
@pytest.mark.parametrize("reason", [None, "no longer wanted"])
def test_cancelling_a_scope(clock: Clock, where: str, reason: str | None) -> None:
    made: list[CancelScope] = []
    texts: list[tuple[str | None, str]] = []

    async def main() -> str:
        scope = CancelScope(deadline=current_time() + 5)
        made.append(scope)
        if where == "before":
            scope.cancel(reason)
        with scope:
            if where == "inside":
                scope.cancel(reason)
            try:
                await sleep(10)
            except Cancelled as error:
                texts.append((error.reason, str(error)))
                # It is delivered once.
                scope.cancel("again")
                await sleep(1)
                raise
        return "went on"

    task = spawn(main, reactor=clock)
    if where == "outside":
        made[0].cancel(reason)
    clock.advance(1)
    assert task.result() == "went on"
    assert texts == [(reason, reason or "")]
    assert made[0].cancelled
    assert not made[0].expired
    assert not clock.getDelayedCalls()


def test_cancelling_a_scope_in_a_generator(clock: Clock) -> None:
    scope = CancelScope()

    @coroutine
    def main() -> Generator[Any, Any, str]:
        with scope:
            yield sleep(10)
        return "went on"

    got: list[str] = []
    task = spawn(lambda: main().addCallback(got.append), reactor=clock)
    scope.cancel()
    assert task.done
    assert got == ["went on"]
    assert scope.cancelled


def test_cancelling_a_scope_after_its_block(clock: Clock) -> None:
    async def main() -> str:
        with CancelScope() as scope:
            await sleep(0)
        scope.cancel()
        assert not scope.cancelled
        with CancelScope() as scope:
            scope.cancel()
        # It came to its end all the same.
        assert not scope.cancelled
        await sleep(1)
        return "went on"

    task = spawn(main, reactor=clock)
    clock.pump([0, 1])
    assert task.result() == "went on"


def test_the_deadline_of_a_cancelled_scope_does_nothing(clock: Clock) -> None:
    async def main() -> CancelScope:
        with CancelScope(deadline=current_time() + 5) as scope:
            try:
                scope.cancel()
                await sleep(1)
            finally:
                scope.deadline = 0
                await sleep(20)
        return scope

    task = spawn(main, reactor=clock)
    clock.pump([6, 20])
    assert task.result().cancelled
    assert not task.result().expired


# The effective deadline


def test_the_effective_deadline(clock: Clock) -> None:
    async def main() -> list[float]:
        seen = [current_deadline()]
        with timeout(10):
            with move_on_after(20), timeout(None):
                seen.append(current_deadline())
                with move_on_after(5) as inner:
                    seen.append(current_deadline())
                    inner.deadline = 103
                    seen.append(current_deadline())
                seen.append(current_deadline())
            with shield():
                seen.append(current_deadline())
                with timeout(30):
                    seen.append(current_deadline())
        return seen

    task = spawn(main, reactor=clock)
    assert task.result() == [math.inf, 110, 105, 103, 110, math.inf, 130]


def test_the_effective_deadline_in_groups(clock: Clock) -> None:
    """A scope that cancels the block of a group cancels its tasks."""
    seen: dict[str, float] = {}

    async def child(name: str) -> None:
        seen[name] = current_deadline()
        with move_on_after(2):
            seen[f"limited {name}"] = current_deadline()

    async def nested() -> None:
        async with TaskGroup() as group:
            with timeout(1):
                # Around a part of the block, and not around its tasks.
                group.spawn(child, "grandchild")
                await sleep(0)

    def body(group: TaskGroup) -> Generator[Any, Any, None]:
        group.spawn(child, "in a group for generators")
        yield sleep(0)

    async def main() -> None:
        with timeout(10):
            async with TaskGroup() as group:
                group.spawn(child, "child")
                group.spawn(nested)
            spawn(child, "no child")
            with shield():
                async with TaskGroup() as group:
                    group.spawn(child, "shielded")
        await run_group(body)

    task = spawn(main, reactor=clock)
    clock.pump([0, 0, 0])
    task.result()
    assert seen == {
        "child": 110,
        "limited child": 102,
        "grandchild": 110,
        "limited grandchild": 102,
        "no child": math.inf,
        "limited no child": 102,
        "shielded": math.inf,
        "limited shielded": 102,
        "in a group for generators": math.inf,
        "limited in a group for generators": 102,
    }


def test_the_effective_deadline_of_a_cancelled_task(clock: Clock) -> None:
    seen: list[float] = []

    async def child() -> None:
        try:
            await sleep(60)
        finally:
            seen.append(current_deadline())

    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            seen.append(current_deadline())
        async with TaskGroup() as group:
            group.spawn(child)
            await sleep(0)
            group.cancel()
            seen.append(current_deadline())
        with move_on_after(1):
            try:
                await sleep(60)
            finally:
                seen.append(current_deadline())
        current = task
        current.cancel()
        with shield():
            seen.append(current_deadline())
        seen.append(current_deadline())

    task = spawn(main, reactor=clock)
    clock.pump([0, 0, 1])
    task.result()
    never = -math.inf
    assert seen == [never, never, never, 101, math.inf, never]


# Reactors


def test_on_a_reactor(reactor: Any) -> None:
    async def too_late() -> None:
        with timeout_at(current_time() + 60) as limit:
            limit.deadline -= 120
            await Event().wait()

    async def main() -> list[bool]:
        seen = []
        with move_on_after(0.01) as limit:
            await sleep(60)
        seen.append(limit.expired)
        with move_on_at(current_time() + 60) as moved:
            assert current_deadline() - current_time() > 50
            moved.deadline = current_time() + 0.01
            await Deferred()
        seen.append(moved.expired)
        with pytest.raises(TimeoutError):
            await too_late()
        with CancelScope() as scope:
            reactor.callLater(0, scope.cancel)
            await sleep(60)
        seen.append(scope.cancelled)
        return seen

    assert run(reactor, main) == [True, True, True]


def test_cancelled_everywhere() -> None:
    """The cancellation of the task leaves none of these blocks quietly."""

    async def cancel_later(scope: CancelScope) -> None:
        await sleep(1)
        scope.cancel()

    async def handler(stream: Stream) -> None:
        with move_on_after(1) as limit:
            await stream.read_line()
        assert limit.expired
        async with TaskGroup() as group:
            with CancelScope() as scope:
                group.spawn(cancel_later, scope)
                await stream.read_line()
        assert scope.cancelled
        with timeout(5) as late:
            late.deadline = current_time() + 6
            await stream.read_line()

    async def peer(stream: Stream) -> None:
        await sleep(3)
        await stream.write(b"line\n")
        await stream.write_eof()

    assert cancel_everywhere(handler, peer) == 3


def test_two_cancellations_before_a_step_are_delivered_once(clock: Clock) -> None:
    """As in asyncio, unless the first one is delivered in between."""
    told: list[str] = []

    async def cleans_up() -> None:
        try:
            await sleep(60)
        except Cancelled as error:
            told.append(str(error))
            await sleep(1)
            told.append("cleaned up")
            raise

    async def main() -> None:
        task = spawn(cleans_up)
        await sleep(0)
        task.cancel("first")
        task.cancel("second")
        with contextlib.suppress(CancelledError):
            await task

    task = spawn(main, reactor=clock)
    clock.pump([0, 1])
    task.result()
    assert told == ["first", "cleaned up"]
