"""
Limiters: a number of borrowers at a time, each of which is known.

See ``docs/channels.md``.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from twisted.internet.defer import Deferred

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
    What a :class:`CapacityLimiter` is doing.

    :ivar borrowed_tokens: how many tokens are borrowed.
    :ivar total_tokens: how many there are.
    :ivar borrowers: what has borrowed them: tasks, or what ``acquire_on_behalf_of`` was
        given.
    :ivar tasks_waiting: how many acquires wait.
    """

    borrowed_tokens: int
    total_tokens: float
    borrowers: tuple[object, ...]
    tasks_waiting: int


class CapacityLimiter:
    """
    Limits how many tasks do something at the same time::

        async with limiter:

    As a semaphore, but it knows which tasks have borrowed its tokens, and the number of
    tokens can be changed.  First come, first served.  All of it belongs into the
    reactor's thread.

    :param total_tokens: how many there are: an ``int``, or ``math.inf``.
    :raises TypeError: if it is something else.
    :raises ValueError: if it is negative.
    """

    def __init__(self, total_tokens: float) -> None:
        self._total = _checked(total_tokens)
        # In the order in which they have borrowed.
        self._borrowers: dict[object, None] = {}
        self._waiting: set[object] = set()
        self._waiters = Waiters()
        # Whether tokens are handed out, by a call further up the stack.
        self._granting = False

    @property
    def total_tokens(self) -> float:
        """
        How many tokens there are.

        It can be set.  If there are fewer then than are borrowed, nothing is taken
        back, and no more are lent until enough were returned.

        :raises TypeError: if it is set to what is no ``int`` and not ``math.inf``.
        :raises ValueError: if it is set to less than 0.
        """
        return self._total

    @total_tokens.setter
    def total_tokens(self, total: float) -> None:
        self._total = _checked(total)
        self._grant()

    @property
    def borrowed_tokens(self) -> int:
        """How many tokens are borrowed."""
        return len(self._borrowers)

    @property
    def available_tokens(self) -> float:
        """How many tokens are left."""
        return max(0, self._total - len(self._borrowers))

    @must_be_awaited
    def acquire(self) -> Operation[None]:
        """
        Borrow a token for the task that calls this, as soon as it is its turn.

        :raises RuntimeError: if that task has one, or waits for one.
        :raises NoTaskError: outside of a task: use ``acquire_on_behalf_of``.
        """
        return self.acquire_on_behalf_of(task_of_caller("acquire() of a limiter"))

    @must_be_awaited
    def acquire_on_behalf_of(self, borrower: object) -> Operation[None]:
        """
        Borrow a token for anything else, as soon as it is its turn.

        :param borrower: anything that can be the key of a dictionary.
        :raises RuntimeError: if it has one, or waits for one.
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
        Borrow a token for the task that calls this, without waiting.

        :raises WouldBlock: if there is none.
        :raises RuntimeError: if that task has one, or waits for one.
        :raises NoTaskError: outside of a task: use ``try_acquire_on_behalf_of``.
        """
        self.try_acquire_on_behalf_of(task_of_caller("try_acquire() of a limiter"))

    def try_acquire_on_behalf_of(self, borrower: object) -> None:
        """
        Borrow a token for anything else, without waiting.

        :raises WouldBlock: if there is none.
        :raises RuntimeError: if it has one, or waits for one.
        """
        if not self._lend(borrower):
            raise WouldBlock(f"{self!r} has no token left: use acquire(), which waits")

    def release(self) -> None:
        """
        Return the token of the task that calls this.

        :raises RuntimeError: if it has none.
        :raises NoTaskError: outside of a task: use ``release_on_behalf_of``.
        """
        self.release_on_behalf_of(task_of_caller("release() of a limiter"))

    def release_on_behalf_of(self, borrower: object) -> None:
        """
        Return the token of anything else.

        :raises RuntimeError: if it has none.
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

        The thread has the token until the function has ended, also if the wait was
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
        """What it is doing."""
        return CapacityLimiterStatistics(
            len(self._borrowers),
            self._total,
            tuple(self._borrowers),
            self._waiters.waiting,
        )

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, GeneratorExit):
            # Of a task that the garbage collector has found, with this limiter, the
            # coroutine is closed outside of the task.
            with contextlib.suppress(RuntimeError):
                self.release()
        else:
            self.release()

    def _lend(self, borrower: object) -> bool:
        """Whether it has got a token; not before others that wait."""
        if borrower in self._borrowers or borrower in self._waiting:
            has = "has" if borrower in self._borrowers else "waits for"
            raise RuntimeError(f"{borrower!r} {has} a token of {self!r} already")
        if len(self._borrowers) >= self._total or self._waiters.entries:
            return False
        self._borrowers[borrower] = None
        return True

    def _grant(self) -> None:
        """Hand out what there is to what waits."""
        if self._granting:
            # A callback has released its token: a loop hands it out, since to do it
            # here would recurse as often as there are waiters.
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
    """Borrows the token for a function in a thread."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __repr__(self) -> str:
        return f"<{self._function!r} in a thread>"


class _ThreadToStart:
    """The owner of the operation until there is a token, and the thread starts."""

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
