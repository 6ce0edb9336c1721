"""
Operations: what this package's functions return.

An operation is a Deferred, so that it can be awaited by any coroutine, yielded
from ``inlineCallbacks`` and given callbacks.  A task of this package does not
need that machinery: it registers itself as the waiter, and is resumed with the
result.  An operation that is finished when it is awaited does not reach the
driver at all.

An operation starts when its function is called, whether it is awaited or not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import repeat
from types import MethodType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from twisted_rtsig.asyncio_support.deferreds import delivered
from twisted_rtsig.coro.tracebacks import WholeFailure

if TYPE_CHECKING:
    from twisted_rtsig.coro.tasks import Task

T = TypeVar("T")
C = TypeVar("C", bound=type)


HOOK: Final = "_hook_of_select"
"""The attribute of a Deferred given to ``select`` that tells ``select`` of its end."""

NOTHING: Final = object()
"""Sentinel: there is no value."""


class Owner(Protocol):
    """The object that has made an operation, and finishes it."""

    def forget(self, operation: Operation[Any]) -> None:
        """The operation was abandoned: do not finish it."""

    def waits_for(self, operation: Operation[Any]) -> str:
        """What the operation waits for, in words."""


class _OnDemand:
    """
    The callbacks of an operation that has none.  Another Deferred asks for them,
    if a callback of its own has returned the operation.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, operation: Operation[Any], owner: type) -> Any:
        operation._become_deferred()
        return vars(operation)[self._name]


def _with_room_for(*names: str) -> Callable[[C], C]:
    """
    Decorate a class whose instances will have these attributes.

    CPython lays out the instances of a class like its first ones, and makes a
    dictionary for each that has more, which takes far longer and twice the memory.
    """

    def decorate(cls: C) -> C:
        first = cls()
        for name in names:
            setattr(first, name, None)
        return cls

    return decorate


def _method_of_deferred(name: str) -> Any:
    """The method of an operation that makes a Deferred of it and calls its method."""

    def call(self: Operation[Any], *args: Any, **kwargs: Any) -> Any:
        self._become_deferred()
        return getattr(self, name)(*args, **kwargs)

    call.__name__ = name
    call.__qualname__ = f"Operation.{name}"
    call.__doc__ = f"See ``Deferred.{name}``."
    return call


@_with_room_for("owner", "waiter", "called", "result", "value")
class Operation(Deferred[T]):
    """
    Something that is under way.

    An operation that is used as a Deferred, in other ways than to await it, changes its
    class.  So no method has to ask whether there are callbacks, and only operations
    with callbacks pay for what these need.

    :ivar waiter: the task that is resumed when it is finished; ``OVER`` once it is,
        or has been abandoned.
    :ivar owner: the object that finishes it; None if nothing has to know that it was
        abandoned.
    :ivar value: the value that waits to be sent; only of a send.
    """

    # Nothing is set until it is needed, since one is made for each read and each
    # write.
    result: Any
    waiter: Any = None
    owner: Owner | None = None
    value: Any = NOTHING
    # Of what drives the coroutine that awaits it: see asyncio_support/deferreds.py.
    takes_value = True

    # The names from Twisted 25.5 on, and before.
    _callbacks: Any = _OnDemand()
    if not TYPE_CHECKING and "callbacks" not in vars(Deferred):
        callbacks = _OnDemand()

    called: bool

    if TYPE_CHECKING:

        def __init__(self) -> None: ...

    else:
        __init__ = object.__init__

    def succeed(self, value: T) -> None:
        """Finish with a value."""
        waiter: Task[Any] | None = self.waiter
        # The function of the task may hold this, and must not hold the task.
        self.waiter = OVER
        self.called = True
        self.result = value
        if waiter is not None:
            # As in Scheduler.resume.
            waiter._waiting_on = None
            waiter._value = value
            scheduler = waiter._scheduler
            scheduler._ready.append(waiter)
            if not scheduler._busy:
                try:
                    scheduler._run(scheduler)
                except StopIteration:
                    scheduler.run_anew()

    def settle(self, value: T) -> None:
        """Finish with a value; :meth:`tell` resumes the waiter later."""
        self.called = True
        self.result = value
        waiter: Task[Any] | None = self.waiter
        if waiter is None:
            self.waiter = OVER
        else:
            # It is too late to cancel it here.
            waiter._waiting_on = None
            # Callbacks may change the result before it is told.
            waiter._value = value

    def tell(self) -> None:
        """Resume the waiter with the value that :meth:`settle` has set."""
        waiter, self.waiter = self.waiter, OVER
        if waiter is not OVER:
            waiter._resume(waiter._value)

    def fail(self, error: BaseException, quietly: bool = False) -> None:
        """
        Finish with an error.

        :param quietly: do not log the error if nothing ever asks for it.
        """
        waiter: Task[Any] | None = self.waiter
        self.waiter = OVER
        if waiter is None and not quietly:
            self._become_deferred()
        if type(self) is _UsedAsDeferred:
            self.errback(WholeFailure(error))
            if quietly:
                self._silence(error)
        else:
            self.called = True
            self.result = WholeFailure(error)
        if waiter is not None and waiter is not OVER:
            waiter._resume(None, error)

    def _silence(self, error: BaseException) -> None:
        """Do not log ``error``, if it is what all callbacks have left."""
        result = self.result
        if isinstance(result, Failure) and result.value is error:
            self.addErrback(ignore)
            # For a caller that asks for it later.
            self.result = result

    def abandon(self) -> None:
        """
        Cancel for the waiting task, which is resumed by its caller and not by this.
        """
        self.waiter = OVER
        self.cancel()

    # Deferred

    def cancel(self) -> None:
        """
        See ``Deferred.cancel``.  If nothing asks for the result, the ``CancelledError``
        is not logged.
        """
        if self.called:
            super().cancel()
        else:
            if self.owner is not None:
                self.owner.forget(self)
            self.fail(CancelledError(), quietly=True)

    def __await__(self) -> Generator[Deferred[T], Any, T]:
        try:
            # The driver sends the result; a task's at once if it is there.
            return (yield self)  # type: ignore[no-any-return]
        except BaseException as error:
            value = delivered(self, error)
            if value is not None:
                return value[0]  # type: ignore[no-any-return]
            # The traceback holds this frame, and the result the error.
            del self
            raise

    if TYPE_CHECKING:

        def __iter__(self) -> Generator[Deferred[T], Any, T]: ...

    else:
        __iter__ = __await__

    def _become_deferred(self) -> None:
        if type(self) is not _UsedAsDeferred:
            self.__class__ = _UsedAsDeferred
            Deferred.__init__(self)

    # Type checkers see the methods of Deferred.
    if not TYPE_CHECKING:
        addCallbacks = _method_of_deferred("addCallbacks")
        addCallback = _method_of_deferred("addCallback")
        addErrback = _method_of_deferred("addErrback")
        addBoth = _method_of_deferred("addBoth")


@_with_room_for("owner", "waiter", "called", "result", "value")
class Wait(Operation[None]):
    """An operation without a value: to await it takes less time and memory."""

    takes_value = False

    def __await__(self) -> Any:
        # An iterator without a result, which needs no frame.
        return repeat(self, 1)

    if not TYPE_CHECKING:
        __iter__ = __await__


OVER: Final = object()
"""Sentinel: the operation is finished or abandoned, and has no waiter."""


@_with_room_for("result")
class Finished(Operation[T]):
    """An operation that was done at once; its result is None unless it is set."""

    called: bool = True
    waiter = OVER
    result: Any = None

    def __await__(self) -> Generator[Deferred[T], Any, T]:
        return self.result  # type: ignore[no-any-return]
        yield self

    if not TYPE_CHECKING:
        __iter__ = __await__

    def _become_deferred(self) -> None:
        self.called = True
        self.result = self.result
        super()._become_deferred()


class Done(Finished[None]):
    """A finished operation without a value: to await it is to iterate over nothing."""

    if not TYPE_CHECKING:
        # An iterator is its own iterator, and one exhausted iterator serves all.
        __await__ = MethodType(iter, iter(()))


class _UsedAsDeferred(Operation[T]):
    """An operation that has, or has had, callbacks."""

    def __await__(self) -> Generator[Deferred[T], Any, T]:
        if not self.called or self.paused:
            return (yield from super().__await__())
        result = self.result
        if isinstance(result, Failure):
            # The error is handled now.
            self.addErrback(ignore)
            self.result = result
            error = error_of(result)
            try:
                raise error
            finally:
                # The traceback holds this frame, and the result the error.
                del self, result, error
        return result  # type: ignore[no-any-return]

    __iter__ = __await__

    def succeed(self, value: T) -> None:
        """See ``Operation.succeed``."""
        waiter: Task[Any] | None = self.waiter
        self.waiter = OVER
        self.callback(value)
        if waiter is not None:
            waiter._resume(value)

    def settle(self, value: T) -> None:
        """See ``Operation.settle``."""
        self.pause()
        self.callback(value)
        super().settle(value)
        hook = vars(self).get(HOOK)
        if hook is not None:
            hook.settle(value)

    def tell(self) -> None:
        """See ``Operation.tell``."""
        # It is not paused if the first callback was added after settle().
        if self.paused:
            self.unpause()
        super().tell()

    addCallbacks = Deferred.addCallbacks
    addCallback = Deferred.addCallback
    addErrback = Deferred.addErrback
    addBoth = Deferred.addBoth


def error_of(failure: Failure) -> BaseException:
    """The error of a failure, to be raised as the failure has it: again each time."""
    error = failure.value
    assert error is not None
    return error.with_traceback(failure.tb)


def ignore(failure: Failure) -> None:
    """An errback that handles a failure by ignoring it."""


def finished(result: T) -> Operation[T]:
    """An operation that was done at once."""
    operation: Finished[T] = Finished()
    operation.result = result
    return operation


def failed(error: BaseException, quietly: bool = False) -> Operation[Any]:
    """An operation that failed at once: see ``Operation.fail``."""
    operation: Operation[Any] = Operation()
    operation.fail(error, quietly)
    return operation
