"""Blocking functions in threads, and calls from there back into the reactor."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Awaitable, Callable, Generator
from typing import Any, ParamSpec, TypeVar, overload

from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.coro.portals import Calls, calls_of
from twisted_rtsig.coro.runnables import Runnable
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.tracebacks import drop_machinery_above
from twisted_rtsig.typing_backports import TypeVarTuple, Unpack

T = TypeVar("T")
P = ParamSpec("P")
Args = TypeVarTuple("Args")


@must_be_awaited
def in_thread(
    function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Operation[T]:
    """
    Run a blocking function in a thread of the reactor's pool, with the context
    variables of the calling task.

    If the wait is cancelled, the thread goes on to the end of the function, and the
    result is dropped.  When the reactor stops, it waits for these threads.
    """
    operation: Operation[T] = Operation()
    ThreadCall(operation, function, args, kwargs).start()
    return operation


class ThreadCall:
    """
    A function that runs in a thread: the owner of the operation.

    :ivar operation: the operation; None once it is finished.  The traceback of its
        error refers to the frames of the thread, and these to this object.
    :ivar when_ended: called in the reactor's thread when the function has ended; or
        None.
    """

    __slots__ = ("_call", "_function", "_reactor", "operation", "when_ended")

    def __init__(
        self,
        operation: Operation[Any],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._reactor = reactor = scheduler_for(None).reactor
        context = contextvars.copy_context()
        calls = calls_of(reactor)
        calls.note_thread()
        context.run(_way_back.set, calls)
        self._call = functools.partial(context.run, function, *args, **kwargs)
        self._function = function
        self.operation: Operation[Any] | None = operation
        self.when_ended: Callable[[], object] | None = None

    def start(self) -> None:
        """Start the thread."""
        if self.operation is not None:
            self.operation.owner = self
        self._reactor.getThreadPool().callInThread(self.run, self._reactor)

    def run(self, reactor: Any) -> None:
        """Called in a thread."""
        try:
            result = self._call()
        except BaseException as error:
            reactor.callFromThread(self._fail, drop_machinery_above(error))
        else:
            reactor.callFromThread(self._succeed, result)

    def _ended(self) -> Operation[Any] | None:
        operation, self.operation = self.operation, None
        if self.when_ended is not None:
            self.when_ended()
        return operation

    def _succeed(self, result: Any) -> None:
        operation = self._ended()
        if operation is not None:
            operation.succeed(result)

    def _fail(self, error: BaseException) -> None:
        operation = self._ended()
        if operation is not None:
            operation.fail(error)

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``: the thread goes on."""
        self.operation = None

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"{self._function!r} in a thread"


@overload
def from_thread(
    function: Callable[[Unpack[Args]], Awaitable[T]], *args: Unpack[Args]
) -> T: ...


@overload
def from_thread(
    function: Callable[[Unpack[Args]], Generator[Any, Any, T]], *args: Unpack[Args]
) -> T: ...


@overload
def from_thread(function: Runnable[T]) -> T: ...


@overload
def from_thread(function: Callable[[Unpack[Args]], T], *args: Unpack[Args]) -> T: ...


def from_thread(  # type: ignore[misc]
    function: Callable[..., Any] | Runnable[Any], *args: Any
) -> Any:
    """
    Run ``function(*args)`` as a task in the reactor's thread, with the context
    variables of this thread, and wait for its result.

    Call this in a function that :func:`in_thread` runs.  In other threads use a
    :class:`Portal`.

    :param function: anything that :func:`spawn` takes.
    :return: the result of the task.  An exception that it raises is raised here.
    :raises ReactorNotRunning: if the reactor stops before the task has ended.  The
        task is cancelled then.
    :raises RuntimeError: in any other thread, including the reactor's.
    """
    way_back = _way_back.get(None)
    if way_back is None:
        raise RuntimeError(
            "from_thread() works only in a function that in_thread() runs: in other "
            "threads use the call() of a Portal"
        )
    return way_back.call(function, args)


# The way back to the reactor, for a function that in_thread() runs.
_way_back: contextvars.ContextVar[Calls] = contextvars.ContextVar("way_back")
