"""
Deferreds in asyncio's tasks: ``await deferred`` waits there as in any coroutine.

A task of asyncio takes any object that its coroutine yields for a future, if the object
has the attribute ``_asyncio_future_blocking``, which CPython supports for futures of
other packages.  The task then asks the future for its loop, and adds a callback; when
the task is cancelled, it cancels the future.  A coroutine that awaits a Deferred yields
the Deferred, so :func:`install` gives the class ``Deferred`` the attributes that such a
task needs.  It replaces no attribute that Deferreds have already, and nothing changes
where asyncio is not used.

A plain Deferred is asked for its result when the task goes on.  An operation of
:mod:`twisted_rtsig.coro` takes the value from the driver of the coroutine, and asyncio
sends None.  So the value is thrown into the operation, in a :class:`Delivery`.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Callable
from contextvars import Context
from typing import Any, Final

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

# The attribute of an operation that has fired, for its value in a tuple.
_VALUE: Final = "_value_for_asyncio"

# The keyword of asyncio's Future.cancel, which no other caller passes.
_NOT_OF_ASYNCIO: Final = object()


class Delivery(BaseException):
    """
    Thrown into the coroutine that awaits an operation, to deliver the value.

    :ivar value: the value of the operation.
    """

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class _Blocking:
    """
    ``_asyncio_future_blocking`` of Deferreds.  It is true for a task of asyncio, which
    looks at the yielded object, and missing for ``asyncio.isfuture``, which looks at
    the class.

    So functions such as ``asyncio.wait_for`` and ``asyncio.gather`` put a task around
    a Deferred, as around any other awaitable.
    """

    def __get__(self, deferred: Any, owner: type) -> bool:
        if deferred is None:
            raise AttributeError("_asyncio_future_blocking")
        return True

    def __set__(self, deferred: Any, blocking: bool) -> None:
        """Ignore the flag, by which a task of asyncio reports that it waits."""


def _get_loop(deferred: Deferred[Any]) -> asyncio.AbstractEventLoop:
    """The loop of the calling task: a Deferred belongs to no loop."""
    return asyncio.get_running_loop()


def _add_done_callback(
    deferred: Deferred[Any],
    callback: Callable[[Any], object],
    *,
    context: Context | None = None,
) -> None:
    """
    Let a task of asyncio wait for a Deferred.

    :param callback: called by the loop with an object that has the result, as a future
        has.
    """
    cancel = vars(deferred).get("cancel")
    canceller = getattr(cancel, "__self__", None)
    if not isinstance(canceller, _Canceller):
        canceller = _Canceller(deferred)
    # Read before addBoth(), by which an operation changes its class.
    takes_value = getattr(deferred, "takes_value", False)
    canceller.waiting += 1
    canceller.to_be_resumed += 1
    # A task of asyncio passes a message to cancel(), and that of Deferreds takes none.
    vars(deferred)["cancel"] = canceller.cancel
    waiter = _Waiter(canceller, takes_value, callback, context)
    deferred.addBoth(waiter.fired)


def install() -> None:
    """Let asyncio's tasks await any Deferred."""
    cls: Any = Deferred
    if not isinstance(vars(cls).get("_asyncio_future_blocking"), _Blocking):
        cls._asyncio_future_blocking = _Blocking()
        cls.get_loop = _get_loop
        cls.add_done_callback = _add_done_callback


class _Canceller:
    """
    Cancels a Deferred that tasks of asyncio wait for.  As with a future, if one of the
    tasks is cancelled, then the Deferred is, for which all of them wait.

    :ivar deferred: a weak reference to the Deferred, which has this as an attribute.
    :ivar waiting: the number of tasks that wait.
    :ivar to_be_resumed: the number of tasks that wait, or were not yet resumed: until
        it is resumed, a task that is cancelled cancels the Deferred.
    :ivar cancelling: whether a task cancels the Deferred at this moment.
    :ivar asked: whether a task has cancelled the Deferred.
    :ivar error: the error of the tasks after that; None as long as the Deferred has not
        failed because of the cancellation.
    """

    __slots__ = (
        "_message",
        "asked",
        "cancelling",
        "deferred",
        "error",
        "to_be_resumed",
        "waiting",
    )

    def __init__(self, deferred: Deferred[Any]) -> None:
        self.deferred = weakref.ref(deferred)
        self._message: Any = None
        self.asked = self.cancelling = False
        self.error: asyncio.CancelledError | None = None
        self.waiting = self.to_be_resumed = 0

    def cancel(self, msg: Any = _NOT_OF_ASYNCIO) -> bool | None:
        """
        As ``Deferred.cancel``; or with a message, as ``asyncio.Future.cancel``.

        :return: whether the Deferred delivers the cancellation to the task; otherwise
            asyncio does.
        """
        deferred = self.deferred()
        if deferred is None:
            # The Deferred is gone: the garbage collector ends the task.
            return False
        if msg is _NOT_OF_ASYNCIO:
            type(deferred).cancel(deferred)
            return None
        if not self.waiting:
            return False
        self._message = msg
        self.asked = self.cancelling = True
        try:
            type(deferred).cancel(deferred)
        finally:
            self.cancelling = False
        return self.waiting > 0 or self.error is not None

    def fired(self, error: BaseException | None) -> BaseException | None:
        """
        Note that the Deferred has fired; return the error for a task.

        :param error: the error that the Deferred has failed with, if any.
        """
        self.waiting -= 1
        # A failure within the call of cancel() is due to the cancellation, whatever
        # error it is.
        if error is not None and (
            self.cancelling or (self.asked and isinstance(error, defer.CancelledError))
        ):
            message = () if self._message is None else (self._message,)
            self.error = asyncio.CancelledError(*message)
            self.error.__cause__ = error
            return self.error
        return error

    def resumed(self) -> None:
        """Note that a task goes on."""
        self.to_be_resumed -= 1
        deferred = self.deferred()
        if not self.to_be_resumed and deferred is not None:
            vars(deferred).pop("cancel", None)


class _Waiter:
    """A task of asyncio that waits for a Deferred."""

    __slots__ = ("_callback", "_canceller", "_context", "_loop", "_takes_value")

    def __init__(
        self,
        canceller: _Canceller,
        takes_value: bool,
        callback: Callable[[Any], object],
        context: Context | None,
    ) -> None:
        self._canceller = canceller
        self._takes_value = takes_value
        self._callback = callback
        self._context = context
        self._loop = asyncio.get_running_loop()

    def fired(self, result: Any) -> Any:
        """The Deferred has fired: resume the task in the loop's next turn."""
        error: BaseException | None = None
        if isinstance(result, Failure):
            error = result.value
            assert error is not None
            error = self._canceller.fired(error.with_traceback(result.tb))
            result = None
        else:
            self._canceller.fired(None)
            deferred = self._canceller.deferred()
            if self._takes_value and deferred is not None:
                vars(deferred)[_VALUE] = (result,)
                error = Delivery(result)
        if not self._loop.is_closed():
            outcome = _Outcome(error, self._canceller)
            self._loop.call_soon(self._callback, outcome, context=self._context)
        # Other callbacks of the Deferred get the value as well.
        return result


class _Outcome:
    """The object that a task of asyncio asks for the result when it is resumed."""

    __slots__ = ("_canceller", "_error")

    def __init__(self, error: BaseException | None, canceller: _Canceller) -> None:
        self._error = error
        self._canceller = canceller

    def result(self) -> None:
        """See ``asyncio.Future.result``."""
        self._canceller.resumed()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # Break a circle: the error's traceback refers to this frame.
                del self, error


def delivered(operation: Any, error: BaseException) -> tuple[Any] | None:
    """
    The value, in a tuple, that a task of asyncio delivers to an operation by throwing
    ``error``; None if ``error`` is a real error.
    """
    if isinstance(error, Delivery):
        return (error.value,)
    if type(error) is asyncio.CancelledError:
        value: tuple[Any] | None = vars(operation).get(_VALUE)
        if value is not None and _cancel_later(error):
            return value
    return None


if sys.version_info >= (3, 11):

    def _cancel_later(error: asyncio.CancelledError) -> bool:
        """
        Cancel the running task where it waits next, unless the request was withdrawn by
        then: by a timeout whose block has come to its end, for example.

        The task was cancelled when its value was there already.  If it were cancelled
        now, then the value would be lost.
        """
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            return False
        task.get_loop().call_soon(_cancel_now, task, task.cancelling(), error.args)
        return True

    def _cancel_now(task: asyncio.Task[Any], requests: int, message: Any) -> None:
        if not task.done() and task.cancelling() >= requests:
            # Make the same request again, so that it counts once.
            task.uncancel()
            task.cancel(*message)

else:

    def _cancel_later(error: asyncio.CancelledError) -> bool:
        """Cancel now: Python 3.10 does not count requests, and cannot withdraw them."""
        return False
