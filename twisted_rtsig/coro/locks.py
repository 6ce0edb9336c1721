"""
Events, semaphores, locks and conditions, for tasks that share something.

First come, first served.  No cancellation loses anything: a task that was granted a
lock has it, even if it is cancelled before it runs; the cancellation takes effect where
the task waits next.  Use them in the reactor's thread only.

See ``docs/channels.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from twisted_rtsig.coro.errors import WouldBlock
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import NOTHING, Done, Operation, Wait
from twisted_rtsig.coro.waiting import Entry, Waiters


class _Queued:
    """Something that many operations wait for: their owner."""

    def __init__(self) -> None:
        self._waiters = Waiters()

    def _wait(self) -> Operation[None]:
        operation: Operation[None] = Wait()
        operation.owner = self
        self._waiters.entries.append(operation)
        return operation

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._waiters.forget(operation)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return repr(self)


class Event(_Queued):
    """Something that happens once, and that many tasks can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._set = False

    @property
    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._set

    def set(self) -> None:
        """
        Set the event: all waiting tasks go on, and later waits return at once.
        """
        if self._set:
            # A callback may set it again.  The loop below, further up the stack, does
            # the rest; to do it here would recurse.
            return
        self._set = True
        while self._waiters.entries:
            self._waiters.next().succeed(None)

    @must_be_awaited
    def wait(self) -> Operation[None]:
        """Wait until it has happened."""
        return Done() if self._set else self._wait()

    def poll(self) -> None:
        """See ``Selectable.poll``."""
        return None if self._set else NOTHING  # type: ignore[return-value]

    def watch(self, entry: Entry) -> None:
        """See ``Selectable.watch``."""
        self._waiters.entries.append(entry)

    def unwatch(self, entry: Entry) -> None:
        """See ``Selectable.unwatch``."""
        self._waiters.forget(entry)

    def __repr__(self) -> str:
        state = "set" if self._set else f"{self._waiters.waiting} wait"
        return f"<Event at {id(self):#x}: {state}>"


class Semaphore(_Queued):
    """
    Allow up to ``value`` concurrent holders::

        async with semaphore:

    :param value: the number of holders.
    :param max_value: if given, a release that would raise the value above this is an
        error.
    :raises ValueError: if the value is negative, or greater than ``max_value``.
    """

    def __init__(self, value: int, max_value: int | None = None) -> None:
        super().__init__()
        if value < 0 or (max_value is not None and value > max_value):
            most = "" if max_value is None else f", and {max_value} the most"
            raise ValueError(
                f"a semaphore cannot begin with {value}: 0 is the least{most}"
            )
        self._value = value
        self._max_value = max_value
        # How many waiting operations are still to be granted it, and whether the loop
        # of release() that grants it is running.
        self._given = 0
        self._telling = False

    @property
    def value(self) -> int:
        """How many more can acquire it now."""
        return self._value

    @must_be_awaited
    def acquire(self) -> Operation[None]:
        """Acquire the semaphore, as soon as it is the caller's turn."""
        if not self._value:
            return self._wait()
        self._value -= 1
        done: Operation[None] = Done()
        return done

    def try_acquire(self) -> None:
        """
        Acquire the semaphore without waiting.

        :raises WouldBlock: if that would have to wait.
        """
        if not self._value:
            raise WouldBlock(f"{self!r} is taken: use acquire(), which waits")
        self._value -= 1

    def release(self) -> None:
        """
        Release the semaphore: to the first waiting operation, if there is one.

        :raises RuntimeError: if it is released more often than it was acquired, and
            there is a ``max_value``.
        """
        if self._value == self._max_value:
            raise RuntimeError(
                f"{self!r} was released more often than acquired: release it once "
                "after each acquire"
            )
        if self._waiters.waiting <= self._given:
            self._value += 1
            return
        self._given += 1
        if self._telling:
            # A callback has released it.  The loop further up the stack grants it to
            # the next: to do it here would recurse as often as there are waiters.
            return
        self._telling = True
        try:
            while self._given:
                self._given -= 1
                # The waiters may have been cancelled meanwhile.
                if self._waiters.entries:
                    self._waiters.next().succeed(None)
                else:
                    self._value += 1
        finally:
            self._telling = False

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *exception: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} at {id(self):#x}: {self._value} left, "
            f"{self._waiters.waiting} wait>"
        )


class Lock(Semaphore):
    """
    A lock that one task can hold at a time::

        async with lock:
    """

    def __init__(self) -> None:
        super().__init__(1, 1)

    @property
    def locked(self) -> bool:
        """Whether the lock is held."""
        return not self._value


class Condition(_Queued):
    """
    A condition variable: something that may become true under a lock::

        async with condition:
            while not ready():
                await condition.wait()

    :param lock: the lock; by default a new one.
    """

    def __init__(self, lock: Lock | None = None) -> None:
        super().__init__()
        self.lock: Lock = Lock() if lock is None else lock

    @must_be_awaited
    def wait(self) -> Deferred[None]:
        """
        Release the lock, wait for a notification, and acquire the lock again.

        A wait that is cancelled acquires the lock again, too.  A wait that is
        cancelled after it was notified goes on, and the cancellation takes effect
        where the task waits next.

        :raises RuntimeError: if the lock is not held.
        """
        self._check("wait()")
        waiting = _Reacquiring(self._wait(), self)
        self.lock.release()
        return waiting

    @must_be_awaited
    def wait_for(self, predicate: Callable[[], bool]) -> Deferred[None]:
        """
        Wait until ``predicate()`` is true.  It is called with the lock held, now and
        after each notification.

        :raises RuntimeError: (when awaited) if the lock is not held, and the predicate
            is not true.
        """
        return _UntilTrue(predicate, self)

    def notify(self, count: int = 1) -> None:
        """
        Notify up to ``count`` waiting tasks.  Each goes on once it has the lock.

        :raises RuntimeError: if the lock is not held.
        """
        self._check("notify()")
        while self._waiters.entries and count > 0:
            count -= 1
            self._waiters.next().succeed(None)

    def notify_all(self) -> None:
        """
        Notify all waiting tasks.

        :raises RuntimeError: if the lock is not held.
        """
        self.notify(self._waiters.waiting)

    def _check(self, what: str) -> None:
        if not self.lock.locked:
            raise RuntimeError(
                f"{what} of {self!r} without its lock: call it in async with"
            )

    async def __aenter__(self) -> None:
        await self.lock.acquire()

    async def __aexit__(self, *exception: object) -> None:
        self.lock.release()

    def __repr__(self) -> str:
        return f"<Condition at {id(self):#x}: {self._waiters.waiting} wait>"


class _Reacquiring(Deferred[None]):
    """
    A wait for a notification, and then for the lock, whatever the first wait returned.

    This is not an ``Operation``, since a cancelled wait has to wait for the lock too.
    """

    def __init__(self, notified: Operation[None], condition: Condition) -> None:
        super().__init__()
        self._notified = notified
        self._condition = condition
        notified.addBoth(self._acquire)

    def _acquire(self, result: Any) -> None:
        self._condition.lock.acquire().addCallback(self._acquired, result)

    def _acquired(self, lock: None, result: Any) -> None:
        if isinstance(result, Failure):
            self.errback(result)
        else:
            self.callback(None)

    def cancel(self) -> None:
        """See ``Deferred.cancel``."""
        self._notified.cancel()

    def __repr__(self) -> str:
        return repr(self._condition)


class _UntilTrue(Deferred[None]):
    """A wait for notifications, until the predicate is true."""

    def __init__(self, predicate: Callable[[], bool], condition: Condition) -> None:
        super().__init__()
        self._predicate = predicate
        self._condition = condition
        self._waiting: Deferred[None] | None = None
        self._look(None)

    def _look(self, notified: None) -> None:
        self._waiting = None
        try:
            waiting = None if self._predicate() else self._condition.wait()
        except BaseException:
            self.errback()
            return
        if waiting is None:
            self.callback(None)
        else:
            self._waiting = waiting
            waiting.addCallbacks(self._look, self.errback)

    def cancel(self) -> None:
        """See ``Deferred.cancel``."""
        if self._waiting is None:
            super().cancel()
        else:
            self._waiting.cancel()

    def __repr__(self) -> str:
        return repr(self._condition)
