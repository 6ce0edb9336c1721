"""Blocking functions in threads, for tasks, and the way back."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning

from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.coro.tasks import Task, scheduler_for, spawn
from twisted_rtsig.coro.tracebacks import drop_machinery_above

T = TypeVar("T")
P = ParamSpec("P")


def in_thread(
    function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Deferred[T]:
    """
    Run a function that blocks in a thread of the reactor's pool, with the context
    variables of the task that calls this.

    If the wait is cancelled, the thread goes on to the end of the function, and
    its result is dropped.  The reactor waits for such threads when it stops.
    """
    operation: Operation[T] = Operation()
    ThreadCall(operation, function, args, kwargs).start()
    return operation


class ThreadCall:
    """
    A function that runs in a thread: the owner of the operation.

    :ivar operation: None once it is finished, since the traceback of an error holds
        the frames of the thread, and so this.
    :ivar when_ended: called in the reactor's thread when the function has ended; None
        for nothing.
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
        context.run(_way_back.set, _WayBack(reactor))
        self._call = functools.partial(context.run, function, *args, **kwargs)
        self._function = function
        self.operation: Operation[Any] | None = operation
        self.when_ended: Callable[[], object] | None = None

    def start(self) -> None:
        """Run it."""
        if self.operation is not None:
            self.operation.owner = self
        self._reactor.getThreadPool().callInThread(self.run, self._reactor)

    def run(self, reactor: Any) -> None:
        """In a thread."""
        try:
            result = self._call()
        except BaseException as error:
            reactor.callFromThread(self._fail, drop_machinery_above(error))
        else:
            reactor.callFromThread(self._succeed, result)

    def _succeed(self, result: Any) -> None:
        operation = self._ended()
        if operation is not None:
            operation.succeed(result)

    def _fail(self, error: BaseException) -> None:
        operation = self._ended()
        if operation is not None:
            operation.fail(error)

    def _ended(self) -> Operation[Any] | None:
        operation, self.operation = self.operation, None
        if self.when_ended is not None:
            self.when_ended()
        return operation

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``: the thread goes on."""
        self.operation = None

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"{self._function!r} in a thread"


def from_thread(function: Callable[..., Any], *args: Any) -> Any:
    """
    From a function that :func:`in_thread` runs: run C{function(*args)} as a task
    in the reactor's thread, and wait for what it returns or raises.

    :param function: whatever :func:`spawn` takes.
    :raises ReactorNotRunning: if the reactor stops before the task has ended, which
        is cancelled then.
    :raises RuntimeError: in any other thread.
    """
    way_back = _way_back.get(None)
    if way_back is None:
        raise RuntimeError(
            "from_thread() works only in a function that in_thread() runs: elsewhere "
            "use reactor.callFromThread"
        )
    return way_back.call(function, args)


class _WayBack:
    """From a thread to a reactor."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._waiting = _waiting_for(reactor)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a task in the reactor's thread."""
        future: Future[Any] = Future()
        self._waiting.add(future)
        self._reactor.callFromThread(self._spawn, future, function, args)
        error = future.exception()
        if error is None:
            return future.result()
        try:
            raise error
        finally:
            # The traceback holds this frame.
            del future, error

    def _spawn(
        self, future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        if future.done():
            return
        try:
            task = spawn(function, *args, reactor=self._reactor)
        except Exception as error:
            self._waiting.remove(future)
            future.set_exception(drop_machinery_above(error))
        else:
            self._waiting.tasks[future] = task
            task._when_done(functools.partial(self._waiting.ended, future))


# What leads back from the function that runs in a thread.
_way_back: contextvars.ContextVar[_WayBack] = contextvars.ContextVar("way_back")


class _Waiting:
    """
    The threads that wait for tasks of one reactor, each with a future.

    :ivar tasks: those that were spawned.
    """

    def __init__(self) -> None:
        self.tasks: dict[Future[Any], Task[Any] | None] = {}
        self._stopped = False
        # The threads add, and the reactor's thread removes.
        self._lock = threading.Lock()

    def add(self, future: Future[Any]) -> None:
        """
        A thread is about to wait.

        :raises ReactorNotRunning: if it would wait for ever.
        """
        with self._lock:
            if self._stopped:
                raise _stopped()
            self.tasks[future] = None

    def remove(self, future: Future[Any]) -> None:
        """It has no longer to wait."""
        with self._lock:
            self.tasks.pop(future, None)

    def ended(self, future: Future[Any], task: Task[Any]) -> None:
        """The task has ended for which a thread waits, unless the reactor stops."""
        self.remove(future)
        if future.done():
            return
        if task.failed or task.cancelled:
            future.set_exception(task._see_error())
        else:
            future.set_result(task.result())

    def stop(self) -> None:
        """The reactor stops: it will run no more tasks, and waits for its threads."""
        with self._lock:
            self._stopped = True
            waiting = list(self.tasks.items())
        # Before any task is cancelled, since that may be the end of another one.
        for future, _ in waiting:
            future.set_exception(_stopped())
        for _, task in waiting:
            if task is not None:
                task.cancel("the reactor has stopped")


def _stopped() -> ReactorNotRunning:
    return ReactorNotRunning(
        "from_thread() was called in a thread, and the reactor has stopped: it runs "
        "no more tasks"
    )


_waiting: WeakKeyDictionary[Any, _Waiting] = WeakKeyDictionary()


def _waiting_for(reactor: Any) -> _Waiting:
    waiting = _waiting.get(reactor)
    if waiting is None:
        waiting = _waiting[reactor] = _Waiting()
        reactor.addSystemEventTrigger("during", "shutdown", waiting.stop)
        # The reactor joins its threads in the same phase, which has to come later.
        joins = getattr(reactor, "threadpoolShutdownID", None)
        if joins is not None:
            reactor.removeSystemEventTrigger(joins)
            reactor.threadpoolShutdownID = reactor.addSystemEventTrigger(
                "during", "shutdown", reactor._stopThreadPool
            )
    return waiting
