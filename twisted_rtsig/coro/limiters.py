"""
Limiters: up to a number of borrowers at a time, and which they are is known.

See ``docs/channels.md``.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

from twisted.internet.defer import Deferred

from twisted_rtsig.coro.closing import AsyncBlock
from twisted_rtsig.coro.errors import WouldBlock
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Done, Operation, Wait, ignore
from twisted_rtsig.coro.tasks import task_of_caller
from twisted_rtsig.coro.threads import ThreadCall
from twisted_rtsig.coro.waiting import Waiters

T = TypeVar("T")
P = ParamSpec("P")


class CapacityLimiterStatistics(NamedTuple):
    """
    The state of a :class:`CapacityLimiter`.

    :ivar borrowed_tokens: the number of tokens that are borrowed.
    :ivar total_tokens: the number of tokens.
    :ivar borrowers: the borrowers: tasks, or the objects that
        ``acquire_on_behalf_of`` was given.
    :ivar tasks_waiting: the number of acquires that wait.
    """

    borrowed_tokens: int
    total_tokens: float
    borrowers: tuple[object, ...]
    tasks_waiting: int


class CapacityLimiter(AsyncBlock):
    """
    Limits how many tasks do something at the same time::

        async with limiter:

    This is a semaphore that knows which tasks have borrowed its tokens, and whose
    number of tokens can be changed.  First come, first served.  Use it in the reactor's
    thread only.

    :param total_tokens: the number of tokens: an ``int``, or ``math.inf``.
    :raises TypeError: if the number is neither.
    :raises ValueError: if the number is negative.
    """

    def __init__(self, total_tokens: float) -> None:
        self._total = _checked(total_tokens)
        # Used as an ordered set: the first borrower first.
        self._borrowers: dict[object, None] = {}
        self._waiting: set[object] = set()
        self._waiters = Waiters()
        # Whether a call of _grant() further up the stack is handing out tokens.
        self._granting = False

    @property
    def total_tokens(self) -> float:
        """
        The number of tokens.

        It can be set.  If more tokens are borrowed than the new number, none is taken
        back, and none is lent until enough were returned.

        :raises TypeError: if it is set to something other than an ``int`` or
            ``math.inf``.
        :raises ValueError: if it is set to a negative number.
        """
        return self._total

    @total_tokens.setter
    def total_tokens(self, total: float) -> None:
        self._total = _checked(total)
        self._grant()

    @property
    def borrowed_tokens(self) -> int:
        """The number of tokens that are borrowed."""
        return len(self._borrowers)

    @property
    def available_tokens(self) -> float:
        """The number of tokens that are left."""
        return max(0, self._total - len(self._borrowers))

    @must_be_awaited
    def acquire(self) -> Operation[None]:
        """
        Borrow a token for the calling task, as soon as it is its turn.

        :raises RuntimeError: if the task has a token, or waits for one.
        :raises NoTaskError: outside of a task: use ``acquire_on_behalf_of``.
        """
        return self.acquire_on_behalf_of(task_of_caller("acquire() of a limiter"))

    @must_be_awaited
    def acquire_on_behalf_of(self, borrower: object) -> Operation[None]:
        """
        Borrow a token for another borrower, as soon as it is its turn.

        :param borrower: any hashable object.
        :raises RuntimeError: if the borrower has a token, or waits for one.
        """
        if self._lend(borrower):
            done: Operation[None] = Done()
            return done
        operation: Operation[None] = Wait()
        operation.owner = self
        operation.value = borrower
        self._waiting.add(borrower)
        self._waiters.entries.append(operation)
        return operation

    def try_acquire(self) -> None:
        """
        Borrow a token for the calling task, without waiting.

        :raises WouldBlock: if no token is left.
        :raises RuntimeError: if the task has a token, or waits for one.
        :raises NoTaskError: outside of a task: use ``try_acquire_on_behalf_of``.
        """
        self.try_acquire_on_behalf_of(task_of_caller("try_acquire() of a limiter"))

    def try_acquire_on_behalf_of(self, borrower: object) -> None:
        """
        Borrow a token for another borrower, without waiting.

        :param borrower: any hashable object.
        :raises WouldBlock: if no token is left.
        :raises RuntimeError: if the borrower has a token, or waits for one.
        """
        if not self._lend(borrower):
            raise WouldBlock(f"{self!r} has no token left: use acquire(), which waits")

    def release(self) -> None:
        """
        Return the token of the calling task.

        :raises RuntimeError: if the task has no token.
        :raises NoTaskError: outside of a task: use ``release_on_behalf_of``.
        """
        self.release_on_behalf_of(task_of_caller("release() of a limiter"))

    def release_on_behalf_of(self, borrower: object) -> None:
        """
        Return the token of another borrower.

        :raises RuntimeError: if the borrower has no token.
        """
        if borrower not in self._borrowers:
            raise RuntimeError(
                f"{borrower!r} has no token of {self!r}: acquire one before, and "
                "release it once"
            )
        del self._borrowers[borrower]
        self._grant()

    @must_be_awaited
    def in_thread(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> Deferred[T]:
        """
        As :func:`in_thread`, with a token.

        The thread keeps the token until the function has ended, even if the wait was
        cancelled before.
        """
        operation: Operation[T] = Operation()
        call = ThreadCall(operation, function, args, kwargs)
        borrower = _ThreadBorrower(function)
        call.when_ended = functools.partial(self.release_on_behalf_of, borrower)
        acquiring = self.acquire_on_behalf_of(borrower)
        if acquiring.called:
            call.start()
        else:
            operation.owner = _ThreadToStart(acquiring, call)
        return operation

    def statistics(self) -> CapacityLimiterStatistics:
        """The state of the limiter."""
        return CapacityLimiterStatistics(
            len(self._borrowers),
            self._total,
            tuple(self._borrowers),
            self._waiters.waiting,
        )

    async def __aenter__(self) -> None:
        await self.acquire()

    async def _end_block(self, error: BaseException | None) -> None:
        if isinstance(error, GeneratorExit):
            # The garbage collector has found the task and this limiter.  It closes the
            # coroutine outside of the task, which then is not the calling task.
            with contextlib.suppress(RuntimeError):
                self.release()
        else:
            self.release()

    def _lend(self, borrower: object) -> bool:
        """Lend a token, unless others wait for one; return whether it was lent."""
        if borrower in self._borrowers or borrower in self._waiting:
            has = "has" if borrower in self._borrowers else "waits for"
            raise RuntimeError(f"{borrower!r} {has} a token of {self!r} already")
        if len(self._borrowers) >= self._total or self._waiters.entries:
            return False
        self._borrowers[borrower] = None
        return True

    def _grant(self) -> None:
        """Hand out the tokens that are left to the operations that wait."""
        if self._granting:
            # A callback has released its token.  The loop further up the stack hands it
            # out: to do it here would recurse as often as there are waiters.
            return
        self._granting = True
        try:
            while self._waiters.entries and len(self._borrowers) < self._total:
                operation = self._waiters.next()
                self._waiting.remove(operation.value)
                self._borrowers[operation.value] = None
                operation.succeed(None)
        finally:
            self._granting = False

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._waiting.remove(operation.value)
        self._waiters.forget(operation)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"a token of {self!r}"

    def __repr__(self) -> str:
        return (
            f"<CapacityLimiter at {id(self):#x}: {len(self._borrowers)} of "
            f"{self._total} borrowed, {self._waiters.waiting} wait>"
        )


class _ThreadBorrower:
    """The borrower of a token for a function that runs in a thread."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __repr__(self) -> str:
        return f"<{self._function!r} in a thread>"


class _ThreadToStart:
    """The owner of the operation until it has a token and the thread starts."""

    def __init__(self, acquiring: Operation[None], call: ThreadCall) -> None:
        self._acquiring = acquiring
        self._call = call
        acquiring.addCallbacks(self._start, ignore)

    def _start(self, result: None) -> None:
        self._call.start()

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._call.forget(operation)
        self._acquiring.cancel()

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        owner: Any = self._acquiring.owner
        return (
            f"{owner.waits_for(self._acquiring)} for {self._call.waits_for(operation)}"
        )


def _checked(total: float) -> float:
    if not (isinstance(total, int) or total == math.inf):
        raise TypeError(f"a limiter with {total!r} tokens: give it an int, or math.inf")
    if total < 0:
        raise ValueError(f"a limiter cannot have {total} tokens: 0 is the least")
    return total
