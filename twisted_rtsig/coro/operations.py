"""
Operations: what this package's functions return.

An operation is a Deferred, so that it can be awaited by any coroutine, yielded
from ``inlineCallbacks`` and given callbacks.  A task of this package does not
need that machinery: it puts itself down as the one who waits, and is resumed
with the result.  An operation that is finished when it is awaited does not
reach the driver at all.

An operation starts when its function is called, whether it is awaited or not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

if TYPE_CHECKING:
    from twisted_rtsig.coro.tasks import Task

T = TypeVar("T")


class Operation(Deferred[T]):
    """
    Something that is under way.

    :ivar waiter: the task that is resumed when it is finished.
    """

    # One is made for each read and each write, so that nothing is set until it
    # is needed.  All that a Deferred has beyond this is made for those that are
    # used as one.
    result: Any
    waiter: Task[Any] | None = None

    _abandon: Callable[[], object] | None = None
    _has_callbacks = False

    __init__ = object.__init__

    def on_abandon(self, function: Callable[[], object]) -> Operation[T]:
        """
        Have C{function} called without arguments if nobody wants the result any
        more; afterwards whoever has made the operation must not finish it.
        """
        self._abandon = function
        return self

    def succeed(self, value: T) -> None:
        """Finish with a value."""
        if self._has_callbacks:
            self.callback(value)
        else:
            self.called = True
            self.result = value
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            waiter._waiting_on = None
            waiter._scheduler.resume(waiter, value)

    def fail(self, error: BaseException, quietly: bool = False) -> None:
        """
        Finish with an error.

        :param quietly: do not log it if nobody ever asks for it.
        """
        waiter = self.waiter
        if self._has_callbacks or (waiter is None and not quietly):
            self._have_callbacks()
            self.errback(Failure(error))
        else:
            self.called = True
            self.result = Failure(error)
        if waiter is not None:
            self.waiter = None
            waiter._resume(None, error)

    def abandon(self) -> None:
        """
        Nobody waits any more.  Unlike C{cancel} this finishes nothing, for a
        task that is about to be told itself.
        """
        self.waiter = None
        if self._abandon is not None:
            self._abandon()

    # Deferred

    def cancel(self) -> None:
        """See ``Deferred.cancel``."""
        if self.called:
            super().cancel()
        else:
            if self._abandon is not None:
                self._abandon()
            self.fail(CancelledError())

    def __await__(self) -> Generator[Deferred[T], Any, T]:
        if not self.called:
            # The driver sends the result.
            return (yield self)  # type: ignore[no-any-return]
        result = self.result
        if self.paused:
            return (yield from super().__iter__())
        if type(result) is Failure:
            # It is not unhandled any more.
            self.addErrback(_ignore)
            self.result = result
            result.raiseException()
        return result  # type: ignore[no-any-return]

    __iter__ = __await__

    def _have_callbacks(self) -> None:
        if not self._has_callbacks:
            self._has_callbacks = True
            Deferred.__init__(self)

    def addCallbacks(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Deferred.addCallbacks``."""
        self._have_callbacks()
        return super().addCallbacks(*args, **kwargs)

    def addCallback(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Deferred.addCallback``."""
        self._have_callbacks()
        return super().addCallback(*args, **kwargs)

    def addErrback(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Deferred.addErrback``."""
        self._have_callbacks()
        return super().addErrback(*args, **kwargs)

    def addBoth(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Deferred.addBoth``."""
        self._have_callbacks()
        return super().addBoth(*args, **kwargs)


class Finished(Operation[T]):
    """An operation that was done at once, with the result None or what is set."""

    called = True
    result: Any = None

    def __await__(self) -> Generator[Deferred[T], Any, T]:
        if self._has_callbacks:
            return (yield from super().__await__())
        return self.result  # type: ignore[no-any-return]

    __iter__ = __await__


def _ignore(failure: Failure) -> None:
    pass


def failed(error: BaseException, quietly: bool = False) -> Operation[Any]:
    """An operation that failed at once: see ``Operation.fail``."""
    operation: Operation[Any] = Operation()
    operation.fail(error, quietly)
    return operation
