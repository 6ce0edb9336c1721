"""Events, semaphores, locks and conditions: the order of waiters, and the holders."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import pytest
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    inlineCallbacks,
    succeed,
)
from twisted.internet.task import Clock

from tests.coro.support import STYLES, Start, most_left_by_timeouts
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    Condition,
    Event,
    Lock,
    Semaphore,
    WouldBlock,
    coroutine,
    sleep,
    spawn,
    timeout,
)

# Events


def test_setting_an_event_resumes_all_waiters(start: Start) -> None:
    event = Event()
    got: list[Any] = []
    for _ in range(3):
        start([event.wait], got)
    assert not event.is_set
    assert got == []
    event.set()
    assert event.is_set
    assert got == [None] * 3


def test_waiting_for_an_event_that_is_set_ends_at_once(start: Start) -> None:
    event = Event()
    event.set()
    event.set()
    got: list[Any] = []
    start([event.wait, event.wait], got)
    assert got == [None, None]


def test_cancelling_one_waiter_of_an_event_leaves_the_others(start: Start) -> None:
    event = Event()
    got: list[Any] = []
    waiting = [start([event.wait], got) for _ in range(3)]
    waiting[1].cancel()
    assert "2 wait" in repr(event)
    assert got in ([], [CancelledError])
    event.set()
    assert got[-2:] == [None, None]
    assert len(got) <= 3
    assert "set" in repr(event)


def test_waiters_of_an_event_are_resumed_in_order(clock: Clock) -> None:
    event = Event()
    order: list[int] = []
    for number in range(3):
        event.wait().addCallback(lambda _, number: order.append(number), number)
    # One that comes in a callback does not wait, and the others are not forgotten.
    event.wait().addCallback(lambda _: event.wait()).addCallback(
        lambda _: order.append(3)
    )
    event.wait().addCallback(lambda _: event.set())
    event.set()
    assert order == [0, 1, 2, 3]


# Semaphores and locks


LOCKS: dict[str, Callable[[], Semaphore]] = {
    "lock": Lock,
    "semaphore": partial(Semaphore, 1),
    "semaphore with a maximum": partial(Semaphore, 1, 1),
}


@pytest.fixture(params=LOCKS)
def lock(request: Any) -> Semaphore:
    """A lock that one task can hold."""
    return LOCKS[request.param]()


def test_first_come_first_served(start: Start, lock: Semaphore) -> None:
    got: list[list[Any]] = [[] for _ in range(4)]
    for each in got:
        start([lock.acquire], each)
    for number in range(4):
        assert got == [[None]] * (number + 1) + [[]] * (3 - number)
        assert f"{3 - number} wait" in repr(lock)
        assert lock.value == 0
        lock.release()
    assert lock.value == 1


@pytest.mark.usefixtures("debug_off")
@pytest.mark.parametrize("value", [0, 1, 3])
def test_a_semaphore_allows_as_many_holders_as_its_value(
    clock: Clock, value: int
) -> None:
    semaphore = Semaphore(value)
    acquired = [semaphore.acquire() for _ in range(5)]
    assert [each.called for each in acquired] == [True] * value + [False] * (5 - value)
    assert semaphore.value == 0
    for _ in range(5):
        semaphore.release()
    assert all(each.called for each in acquired)
    assert semaphore.value == value
    # Without a maximum, there can be more than in the beginning.
    semaphore.release()
    assert semaphore.value == value + 1


@pytest.mark.usefixtures("debug_off")
def test_try_acquire(lock: Semaphore) -> None:
    lock.try_acquire()
    with pytest.raises(WouldBlock, match="is taken"):
        lock.try_acquire()
    waiting = lock.acquire()
    lock.release()
    # The waiter has it now, and try_acquire() does not overtake.
    with pytest.raises(WouldBlock):
        lock.try_acquire()
    assert waiting.called
    lock.release()
    lock.try_acquire()


@pytest.mark.parametrize("lock", [Lock(), Semaphore(2, 2), Semaphore(0, 0)])
def test_releasing_more_than_was_acquired_raises(lock: Semaphore) -> None:
    value = lock.value
    with pytest.raises(RuntimeError, match="more often than acquired"):
        lock.release()
    assert lock.value == value


@pytest.mark.parametrize("arguments", [(-1,), (-1, 3), (4, 3)])
def test_bad_initial_values_of_a_semaphore(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"begin with {arguments[0]}"):
        Semaphore(*arguments)


def test_locked() -> None:
    lock = Lock()
    assert not lock.locked
    lock.try_acquire()
    assert lock.locked
    assert "<Lock at " in repr(lock)
    assert "0 left, 0 wait" in repr(lock)
    lock.release()
    assert not lock.locked


def test_async_with(clock: Clock, lock: Semaphore) -> None:
    inside: list[int] = []
    most = 0

    async def use(number: int) -> None:
        nonlocal most
        async with lock:
            inside.append(number)
            most = max(most, len(inside))
            await sleep(1, clock)
            inside.remove(number)
            if number == 1:
                raise KeyError(number)

    running: list[Any] = [spawn(use, each, reactor=clock) for each in range(3)]
    running += [Deferred.fromCoroutine(use(each)) for each in range(3, 5)]
    for number in range(5):
        assert inside == [number]
        clock.advance(1)
    assert most == 1
    assert lock.value == 1
    with pytest.raises(KeyError):
        running[1].result()


@pytest.mark.parametrize("decorate", [coroutine, inlineCallbacks])
def test_in_generators(clock: Clock, decorate: Any) -> None:
    lock = Lock()
    order: list[tuple[str, int]] = []

    def use(number: int) -> Generator[Any, Any, None]:
        yield lock.acquire()
        try:
            order.append(("in", number))
            yield sleep(1, clock)
            order.append(("out", number))
        finally:
            lock.release()

    for number in range(3):
        decorate(use)(number)
    clock.pump([1] * 3)
    assert order == [(what, n) for n in range(3) for what in ("in", "out")]
    assert not lock.locked


def test_a_cancelled_waiter_does_not_get_the_lock(
    start: Start, lock: Semaphore
) -> None:
    lock.try_acquire()
    got: list[list[Any]] = [[] for _ in range(4)]
    waiting = [start([lock.acquire], each) for each in got]
    waiting[0].cancel()
    waiting[2].cancel()
    assert "2 wait" in repr(lock)
    lock.release()
    assert got[1] == [None]
    assert got[3] == []
    lock.release()
    assert got[3] == [None]
    lock.release()
    assert lock.value == 1
    assert None not in got[0] + got[2]


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_task_cancelled_before_it_runs_with_the_lock_releases_it(
    clock: Clock, how: str, lock: Semaphore
) -> None:
    """It holds the lock before it runs, and gives it back."""
    lock.try_acquire()
    had: list[str] = []

    async def first() -> None:
        with timeout(1):
            async with lock:
                had.append("first")
                await sleep(60)
                had.append("never comes here")

    async def second() -> None:
        async with lock:
            had.append("second")

    def release_and_cancel() -> None:
        lock.release()
        if how == "cancel":
            tasks[0].cancel()
        else:
            clock.advance(1)

    tasks = [spawn(first, reactor=clock), spawn(second, reactor=clock)]
    spawn(release_and_cancel, reactor=clock)
    assert had == ["first", "second"]
    assert tasks[0].done
    assert tasks[1].done
    assert lock.value == 1
    assert not clock.getDelayedCalls()
    with pytest.raises(CancelledError if how == "cancel" else TimeoutError):
        tasks[0].result()


def test_a_cancelled_holder_releases_the_lock(clock: Clock) -> None:
    lock = Lock()

    async def use() -> None:
        async with lock:
            await sleep(60)

    tasks = [spawn(use, reactor=clock) for _ in range(3)]
    for each in tasks:
        each.cancel()
    assert all(each.cancelled for each in tasks)
    assert not lock.locked


@frees_at_once
@pytest.mark.usefixtures("debug_off")
def test_waiters_that_time_out_are_freed(clock: Clock) -> None:
    lock = Lock()
    lock.try_acquire()
    patient = lock.acquire()

    def acquire() -> tuple[Any, Deferred[Any]]:
        operation = lock.acquire()
        return operation, operation

    assert most_left_by_timeouts(clock, 1_000, acquire) <= 3
    assert "1 wait" in repr(lock)
    lock.release()
    assert patient.called


def test_many_waiters_are_cancelled_in_any_order(clock: Clock) -> None:
    lock = Lock()
    lock.try_acquire()
    tasks = [spawn(lock.acquire, reactor=clock) for _ in range(1_000)]
    cancelled = random.Random(1).sample(range(1_000), 900)
    for number in cancelled:
        tasks[number].cancel()
    patient = [each for each in tasks if not each.done]
    for number, each in enumerate(patient):
        lock.release()
        assert [task.done for task in patient[number : number + 2]][:2] in (
            [True, False],
            [True],
        )
        assert each.result() is None
    assert len(patient) == 100


def test_callbacks_release_the_lock(clock: Clock) -> None:
    lock = Lock()
    order: list[int] = []

    def acquired(_: None, number: int) -> None:
        order.append(number)
        lock.release()

    lock.try_acquire()
    for number in range(100):
        lock.acquire().addCallback(acquired, number)
    lock.release()
    assert order == list(range(100))
    assert not lock.locked


def resume_many(
    style: str, wait: Callable[[], Any], resume: Callable[[], object]
) -> None:
    """Start 10,000 waiters, each of which resumes the next one when it is resumed."""
    got: list[Any] = []

    def resume_next() -> Deferred[None]:
        resume()
        return succeed(None)

    for _ in range(10_000):
        STYLES[style](None, [wait, resume_next], got)
    resume()
    assert got == [None] * 20_000


not_in_tasks = pytest.mark.parametrize("style", ["@inlineCallbacks", "fromCoroutine"])


@not_in_tasks
def test_many_waiters_of_an_event_that_set_it_again(style: str) -> None:
    event = Event()
    resume_many(style, event.wait, event.set)


@not_in_tasks
def test_a_long_queue_for_a_lock(style: str) -> None:
    """Each is resumed within the release of the one before, and nothing recurses."""
    lock = Lock()
    lock.try_acquire()
    resume_many(style, lock.acquire, lock.release)
    assert not lock.locked


# Conditions


class Mailbox:
    """Something to wait for, in all styles: so many letters."""

    def __init__(self) -> None:
        self.condition = Condition()
        self.letters = 0
        self.taken: list[Any] = []

    async def take(self, number: int = 0) -> None:
        async with self.condition:
            while not self.letters:
                await self.condition.wait()
            self.letters -= 1
            self.taken.append(number)

    async def take_if_there(self, number: int = 0) -> None:
        async with self.condition:
            await self.condition.wait_for(lambda: self.letters > 0)
            self.letters -= 1
            self.taken.append(number)

    def take_yielding(self, number: int = 0) -> Generator[Any, Any, None]:
        yield self.condition.lock.acquire()
        try:
            while not self.letters:
                yield self.condition.wait()
            self.letters -= 1
            self.taken.append(number)
        finally:
            self.condition.lock.release()

    def take_yielding_if_there(self, number: int = 0) -> Generator[Any, Any, None]:
        yield self.condition.lock.acquire()
        try:
            yield self.condition.wait_for(lambda: self.letters > 0)
            self.letters -= 1
            self.taken.append(number)
        finally:
            self.condition.lock.release()

    def put(self, count: int = 1, notify: int = 1) -> None:
        self.condition.lock.try_acquire()
        self.letters += count
        self.condition.notify(notify)
        self.condition.lock.release()

    def waiting(self) -> str:
        return repr(self.condition).rpartition(": ")[2]


TAKERS: dict[str, Callable[[Clock, Mailbox, int], Any]] = {
    "async def": lambda clock, box, n: spawn(box.take, n, reactor=clock),
    "wait_for": lambda clock, box, n: spawn(box.take_if_there, n, reactor=clock),
    "generator": lambda clock, box, n: spawn(box.take_yielding, n, reactor=clock),
    "inlineCallbacks": lambda clock, box, n: inlineCallbacks(box.take_yielding)(n),
    "fromCoroutine": lambda clock, box, n: Deferred.fromCoroutine(box.take(n)),
    "wait_for, generator": lambda clock, box, n: spawn(
        box.take_yielding_if_there, n, reactor=clock
    ),
    "wait_for, inlineCallbacks": lambda clock, box, n: inlineCallbacks(
        box.take_yielding_if_there
    )(n),
    "wait_for, fromCoroutine": lambda clock, box, n: Deferred.fromCoroutine(
        box.take_if_there(n)
    ),
}
takers = pytest.mark.parametrize("taker", TAKERS)


@takers
def test_notified_waiters_are_resumed_in_order(clock: Clock, taker: str) -> None:
    box = Mailbox()
    for number in range(4):
        TAKERS[taker](clock, box, number)
    # None of them has the lock.
    assert not box.condition.lock.locked
    assert box.waiting() == "4 wait>"
    box.put()
    assert box.taken == [0]
    box.put(2, notify=2)
    assert box.taken == [0, 1, 2]
    box.put(2)
    TAKERS[taker](clock, box, 4)
    assert box.taken == [0, 1, 2, 3, 4]
    assert not box.condition.lock.locked
    assert box.waiting() == "0 wait>"


@takers
def test_wait_for_waits_again_while_its_predicate_is_false(
    clock: Clock, taker: str
) -> None:
    box = Mailbox()
    for number in range(3):
        TAKERS[taker](clock, box, number)
    box.put(1, notify=3)
    assert box.taken == [0]
    assert box.waiting() == "2 wait>"
    box.put(2, notify=2)
    assert box.taken == [0, 1, 2]


@pytest.mark.parametrize(
    ("count", "go_on"), [(-1, 0), (0, 0), (1, 1), (2, 2), (3, 3), (4, 3), ("all", 3)]
)
def test_notify_resumes_the_given_number(clock: Clock, count: Any, go_on: int) -> None:
    condition = Condition()
    done: list[int] = []

    async def wait(number: int) -> None:
        async with condition:
            await condition.wait()
            done.append(number)

    async def notify() -> None:
        async with condition:
            if count == "all":
                condition.notify_all()
            else:
                condition.notify(count)
            await sleep(1)
            # They need the lock.
            assert done == []

    waiting = [spawn(wait, number, reactor=clock) for number in range(3)]
    notifier = spawn(notify, reactor=clock)
    clock.advance(1)
    assert notifier.result() is None
    assert done == list(range(go_on))
    assert not condition.lock.locked
    for each in waiting:
        each.cancel()
    assert not condition.lock.locked


def test_notify_does_not_count_for_later_waiters(clock: Clock) -> None:
    condition = Condition()

    async def wait() -> None:
        async with condition:
            condition.notify_all()
            await condition.wait()

    task = spawn(wait, reactor=clock)
    assert not task.done
    task.cancel()


def test_a_condition_needs_its_lock() -> None:
    condition = Condition()
    for method in (condition.wait, condition.notify, condition.notify_all):
        with pytest.raises(RuntimeError, match="without its lock"):
            method()


def test_a_condition_whose_lock_another_task_holds(clock: Clock) -> None:
    lock = Lock()
    conditions = [Condition(lock), Condition(lock)]
    done: list[int] = []

    async def wait(number: int) -> None:
        async with conditions[number]:
            await conditions[number].wait()
            done.append(number)

    async def notify(number: int) -> None:
        async with lock:
            conditions[number].notify_all()

    for number in range(2):
        spawn(wait, number, reactor=clock)
    assert not lock.locked
    for number in (1, 0):
        spawn(notify, number, reactor=clock)
    assert done == [1, 0]
    assert not lock.locked


@pytest.mark.parametrize("how", ["cancel", "timeout"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("locked", [False, True])
def test_a_cancelled_waiter_of_a_condition_holds_the_lock(
    clock: Clock, how: str, when: str, locked: bool
) -> None:
    """It is cancelled before it is notified, or then, while it waits for the lock."""
    condition = Condition()
    seen: list[Any] = []
    has_it: list[str] = []

    async def wait() -> None:
        async with condition:
            try:
                with timeout(1 if how == "timeout" else 60):
                    await condition.wait()
                    seen.append("notified")
                    await sleep(60)
            finally:
                # And no other task has.
                seen.append(condition.lock.locked and not has_it)

    async def hold() -> None:
        async with condition:
            has_it.append("the other")
            if when == "after":
                condition.notify()
            if locked:
                await sleep(2)
            elif how == "cancel":
                waiter.cancel()
            else:
                clock.advance(1)
            has_it.clear()

    waiter = spawn(wait, reactor=clock)
    spawn(hold, reactor=clock)
    if locked:
        clock.advance(1)
        if how == "cancel":
            waiter.cancel()
        assert not waiter.done
        clock.advance(1)
    assert seen == ["notified", True][when == "before" :]
    with pytest.raises(CancelledError if how == "cancel" else TimeoutError):
        waiter.result()
    assert not condition.lock.locked
    assert "0 wait" in repr(condition)
    assert "0 wait" in repr(condition.lock)
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize(
    "taker",
    [
        "inlineCallbacks",
        "fromCoroutine",
        "wait_for, inlineCallbacks",
        "wait_for, fromCoroutine",
    ],
)
@pytest.mark.parametrize("locked", [False, True])
def test_a_cancelled_deferred_of_a_condition_holds_the_lock(
    clock: Clock, taker: str, locked: bool
) -> None:
    box = Mailbox()
    got: list[Any] = []
    waiting = TAKERS[taker](clock, box, 0)
    waiting.addErrback(lambda f: got.append((f.type, box.condition.lock.locked)))
    other = TAKERS[taker](clock, box, 1)
    if locked:
        box.condition.lock.try_acquire()
    waiting.cancel()
    if locked:
        assert got == []
        box.condition.lock.release()
    assert got == [(CancelledError, False)]
    assert box.waiting() == "1 wait>"
    box.put()
    assert other.called
    assert box.taken == [1]


def test_a_cancelled_waiter_of_a_condition_is_not_notified(clock: Clock) -> None:
    """The next one is."""
    box = Mailbox()
    tasks = [spawn(box.take, number, reactor=clock) for number in range(3)]
    tasks[0].cancel()
    box.put()
    assert box.taken == [1]
    assert box.waiting() == "1 wait>"
    box.put()
    assert box.taken == [1, 2]


def test_wait_for_returns_a_deferred(clock: Clock) -> None:
    condition = Condition()
    condition.lock.try_acquire()
    ready: list[None] = []
    got: list[Any] = []
    condition.wait_for(lambda: bool(ready)).addCallback(got.append)
    # It does not have the lock.
    condition.lock.try_acquire()
    condition.notify()
    condition.lock.release()
    assert got == []
    condition.lock.try_acquire()
    ready.append(None)
    condition.notify()
    assert got == []
    condition.lock.release()
    assert got == [None]
    assert condition.lock.locked


def test_wait_for_raises_the_error_of_its_predicate(clock: Clock) -> None:
    box = Mailbox()

    def fails() -> bool:
        raise KeyError(box.letters)

    async def wait() -> None:
        async with box.condition:
            with pytest.raises(KeyError, match="0"):
                await box.condition.wait_for(fails)
            box.letters += 1
            with pytest.raises(KeyError, match="1"):
                await box.condition.wait_for(lambda: box.letters == 0 or fails())

    task = spawn(wait, reactor=clock)
    assert task.result() is None
    assert not box.condition.lock.locked


def test_wait_for_ends_at_once_when_its_predicate_is_true(clock: Clock) -> None:
    box = Mailbox()
    box.put(2)
    assert spawn(box.take_if_there, reactor=clock).result() is None
    assert box.taken == [0]
