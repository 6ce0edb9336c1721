"""Portals: other threads run tasks in the reactor's thread."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future
from typing import Any, Final, TypeVar, overload

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ReactorNotRunning

from twisted_rtsig.coro.closing import AsyncBlock
from twisted_rtsig.coro.groups import TaskStatus
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.operations import ignore
from twisted_rtsig.coro.runnables import Runnable, name_of
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.scopes import shield
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.coro.tracebacks import drop_machinery_above
from twisted_rtsig.typing_backports import TypeVarTuple, Unpack

T = TypeVar("T")
Args = TypeVarTuple("Args")


class Portal(AsyncBlock):
    """
    Runs tasks in the reactor's thread for other threads::

        async with Portal() as portal:
            thread = threading.Thread(target=work, args=(portal,))
            ...

        def work(portal):
            line = portal.call(fetch, "example.com")

    At the end of the block the portal accepts no more tasks, and waits for its tasks to
    end.  If the block raises, it cancels them first.  Without a block, call
    :meth:`stop`.  Make a portal in the reactor's thread, or before the reactor runs.

    :param reactor: an ``IReactorThreads`` provider; by default that of the task.
    """

    def __init__(self, reactor: Any | None = None) -> None:
        self._reactor = scheduler_for(reactor).reactor
        self._calls = calls_of(self._reactor)
        self._lock = threading.Lock()
        # The lock protects these.
        self._stopped = False
        self._futures: dict[Future[Any], None] = {}
        self._all_ended = Event()

    # From other threads

    @overload
    def call(
        self, function: Callable[[Unpack[Args]], Awaitable[T]], *args: Unpack[Args]
    ) -> T: ...

    @overload
    def call(
        self,
        function: Callable[[Unpack[Args]], Generator[Any, Any, T]],
        *args: Unpack[Args],
    ) -> T: ...

    @overload
    def call(self, function: Callable[[Unpack[Args]], T], *args: Unpack[Args]) -> T: ...

    def call(  # type: ignore[misc]
        self, function: Callable[..., Any], *args: Any
    ) -> Any:
        """
        Run ``function(*args)`` as a task in the reactor's thread, with the context
        variables of this thread, and wait for its result.

        If the wait is interrupted, by Ctrl-C for example, the task is cancelled.

        :param function: anything that :func:`spawn` takes.
        :return: the result of the task.  An exception that it raises is raised here.
        :raises CancelledError: if the task is cancelled.
        :raises ReactorNotRunning: if the reactor stops before the task has ended.  The
            task is cancelled then.
        :raises RuntimeError: in the reactor's own thread, which would wait for itself;
            or after :meth:`stop`.
        """
        return wait_for(self._submit(function, args, None))

    @overload
    def spawn(
        self,
        function: Callable[[Unpack[Args]], Awaitable[T]],
        *args: Unpack[Args],
        name: str | None = None,
    ) -> Future[T]: ...

    @overload
    def spawn(
        self,
        function: Callable[[Unpack[Args]], Generator[Any, Any, T]],
        *args: Unpack[Args],
        name: str | None = None,
    ) -> Future[T]: ...

    @overload
    def spawn(
        self,
        function: Callable[[Unpack[Args]], T],
        *args: Unpack[Args],
        name: str | None = None,
    ) -> Future[T]: ...

    def spawn(  # type: ignore[misc]
        self, function: Callable[..., Any], *args: Any, name: str | None = None
    ) -> Future[Any]:
        """
        As :meth:`call`, without waiting.

        Cancelling the future cancels the task.  If the task fails, and the result of
        the future is never asked for, the error is logged.

        :param name: the name of the task in logs; by default that of the function.
        :return: a ``concurrent.futures.Future`` of the result.
        """
        return self._submit(function, args, name)

    def start(
        self, function: Callable[..., Any], *args: object, name: str | None = None
    ) -> tuple[Future[Any], Any]:
        """
        As :meth:`spawn`, and wait until the task reports that it is ready, as
        ``TaskGroup.start`` does.

        :param function: called with ``args``, and with the keyword argument
            ``task_status``, a :class:`TaskStatus`.
        :return: the future of the task, and the value that it has passed to
            ``task_status.started``.
        :raises RuntimeError: as :meth:`call`; or if the task returns without a call of
            ``task_status.started``.
        """
        ready: Future[Any] = Future()
        status: TaskStatus[Any] = TaskStatus(_Ready(ready))
        run = functools.partial(function, *args, task_status=status)
        running = self._submit(run, (), name or name_of(function))
        value = _wait_until_ready(ready, running)
        return running, value

    @contextlib.contextmanager
    def wrap_async_context_manager(
        self, manager: contextlib.AbstractAsyncContextManager[T]
    ) -> Iterator[T]:
        """
        Use an asynchronous context manager in a ``with`` statement of this thread.  It
        is entered and left in one task in the reactor's thread::

            connection = portal.call(open_tcp, "example.com", 80)
            with portal.wrap_async_context_manager(connection) as stream:
                portal.call(stream.write, b"GET / HTTP/1.0\\r\\n\\r\\n")

        :raises RuntimeError: as :meth:`call` does.
        """
        entered: Future[T] = Future()
        leaving: Deferred[BaseException | None] = Deferred()
        held = self._submit(_hold, (manager, entered, leaving), name_of(type(manager)))
        value = _wait_until_ready(entered, held)
        error: BaseException | None = None
        try:
            yield value
        except BaseException as raised:
            error = raised
        try:
            self._reactor.callFromThread(leaving.callback, error)
            try:
                swallowed = wait_for(held)
            except BaseException as raised:
                if raised is not error and raised.__context__ is None:
                    raised.__context__ = error
                raise
            if error is not None and not swallowed:
                raise error
        finally:
            # Its traceback refers to this frame.
            del error

    def _submit(
        self, function: Callable[..., Any], args: tuple[Any, ...], name: str | None
    ) -> Future[Any]:
        self._calls.check_thread("a portal")
        future: _TaskFuture[Any] = _TaskFuture()
        try:
            with self._lock:
                if self._stopped:
                    raise RuntimeError(
                        "the portal is stopped: it runs no more tasks, so stop it "
                        "after the threads that use it"
                    )
                self._futures[future] = None
            self._calls.submit(future, function, args, name, self._ended)
        except BaseException:
            # After a KeyboardInterrupt the task may have been submitted or not.
            future.cancel()
            self._reactor.callFromThread(self._calls.forget, future, self._ended)
            raise
        return future

    # In the reactor's thread

    def stop(self, cancel: bool = False) -> Deferred[None]:
        """
        Accept no more tasks: threads that submit one get a ``RuntimeError``.  Call this
        in the reactor's thread.

        :param cancel: whether to cancel the tasks of the portal.
        :return: fires when all tasks of the portal have ended.
        """
        with self._lock:
            self._stopped = True
            futures = list(self._futures)
        if not futures:
            self._all_ended.set()
        elif cancel:
            for future in futures:
                self._calls.cancel(future)
        return spawn(
            self._all_ended.wait, name="Portal.stop", reactor=self._reactor
        ).as_deferred()

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            self._futures.pop(future, None)
            last = self._stopped and not self._futures
        if last:
            self._all_ended.set()

    async def __aenter__(self) -> Portal:
        return self

    async def _end_block(self, error: BaseException | None) -> None:
        stopped = self.stop(cancel=error is not None)
        if isinstance(error, GeneratorExit):
            # The coroutine is being closed, and cannot wait any more.
            stopped.addErrback(ignore)
            return
        try:
            await stopped
        except GeneratorExit:
            raise
        except BaseException:
            if error is None:
                # Cancel the tasks only once, so that they can clean up.
                self.stop(cancel=True).addErrback(ignore)
            # As a task group, the block ends when its tasks have ended.
            with shield():
                await self.stop()
            raise

    def __repr__(self) -> str:
        state = "stopped" if self._stopped else "open"
        return f"<Portal, {state}, with {len(self._futures)} tasks>"


async def _hold(
    manager: contextlib.AbstractAsyncContextManager[T],
    entered: Future[T],
    leaving: Deferred[BaseException | None],
) -> bool | None:
    """
    Enter a context manager, and leave it when the thread does.

    :return: whether the context manager has swallowed the error.
    """
    value = await manager.__aenter__()
    try:
        _Ready(entered).started(value)
        error = await leaving
    except BaseException as raised:
        if not await manager.__aexit__(type(raised), raised, raised.__traceback__):
            raise
        return True
    if error is None:
        return await manager.__aexit__(None, None, None)
    try:
        return await manager.__aexit__(type(error), error, error.__traceback__)
    finally:
        # Its traceback may refer to this frame.
        del error


class _Ready:
    """Reports to a thread that a task is ready."""

    def __init__(self, ready: Future[Any]) -> None:
        self._ready = ready

    def started(self, value: Any) -> None:
        """See ``TaskStatus.started``."""
        # False if the thread was interrupted meanwhile, and has cancelled the future.
        if self._ready.set_running_or_notify_cancel():
            self._ready.set_result(value)


def _wait_until_ready(ready: Future[T], running: Future[Any]) -> T:
    """
    Wait until a task is ready.

    :param running: the future of the result of the task.
    :return: the value that the task has passed to ``started``.
    :raises BaseException: the error of the task, if it ends before.
    """
    running.add_done_callback(functools.partial(_give_up, ready))
    try:
        return ready.result()
    except FutureCancelled:
        wait_for(running)
        raise RuntimeError(
            "the task has returned without a call of task_status.started()"
        ) from None
    except BaseException:
        # A KeyboardInterrupt.
        ready.cancel()
        running.cancel()
        raise


def _give_up(ready: Future[Any], running: Future[Any]) -> None:
    if not ready.done():
        ready.cancel()
        ready.set_running_or_notify_cancel()


# Below portals and from_thread


class _TaskFuture(Future[T]):
    """The future of the result of a task."""

    # Logs the error of the task when it is collected, unless it was seen.
    _unseen: Any = None

    def _fail(self, task: Task[Any]) -> None:
        self._unseen = task._value
        self.set_exception(self._unseen.error())

    def result(self, timeout: float | None = None) -> T:
        """See ``concurrent.futures.Future.result``."""
        try:
            return super().result(timeout)
        finally:
            self._see()
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See ``concurrent.futures.Future.exception``."""
        error = super().exception(timeout)
        self._see()
        return error

    def _see(self) -> None:
        unseen, self._unseen = self._unseen, None
        if unseen is not None:
            unseen.see()


def wait_for(future: Future[Any]) -> Any:
    """
    Wait for the result of a task, in the thread that has submitted it.

    :raises CancelledError: if the task was cancelled.
    :raises BaseException: the error of the task.
    """
    try:
        error = future.exception()
    except FutureCancelled:
        raise CancelledError("the task was cancelled") from None
    except BaseException:
        # A KeyboardInterrupt: the result is not needed any more.
        future.cancel()
        raise
    if error is None:
        return future.result()
    try:
        raise error
    finally:
        # The traceback refers to this frame.
        del future, error


def _nothing(future: Future[Any]) -> None:
    pass


class Calls:
    """
    The tasks that threads have submitted to one reactor.

    :ivar thread: the identifier of the reactor's thread; None until it is known.
    """

    def __init__(self, reactor: Any) -> None:
        # Weak, since the reactor refers to this: it must stay collectable.
        self._reactor = weakref.ref(reactor)
        # Unknown until the reactor runs.
        self.thread: int | None = None
        # None for a task that has not begun.
        self._tasks: dict[Future[Any], Task[Any] | None] = {}
        self._stopped = False
        # The other threads add tasks, and the reactor's thread removes them.
        self._lock = threading.Lock()

    @property
    def reactor(self) -> Any:
        """The reactor."""
        return self._reactor()

    def note_thread(self) -> None:
        """Remember this thread as the reactor's; another one may have made this."""
        self.thread = threading.get_ident()

    def check_thread(self, what: str) -> None:
        """
        Check that this is not the reactor's thread.

        :param what: the subject of the error message.
        :raises RuntimeError: in the reactor's thread.
        """
        if threading.get_ident() == self.thread:
            raise RuntimeError(
                f"{what} is for other threads than the reactor's, which would wait for "
                "itself: await the function there, or spawn() it"
            )

    # From other threads

    def submit(
        self,
        future: _TaskFuture[Any],
        function: Callable[..., Any] | Runnable[Any],
        args: tuple[Any, ...],
        name: str | None = None,
        ended: Callable[[Future[Any]], object] = _nothing,
    ) -> None:
        """
        Run a task.  When it ends, settle ``future``, and then call ``ended`` in the
        reactor's thread.

        :raises ReactorNotRunning: if the reactor has stopped.
        """
        with self._lock:
            if self._stopped:
                raise _stopped()
            self._tasks[future] = None
        future.add_done_callback(self._look_for_cancel)
        begin = functools.partial(self._begin, future, function, args, name, ended)
        self.reactor.callFromThread(contextvars.copy_context().run, begin)

    def call(
        self, function: Callable[..., Any] | Runnable[Any], args: tuple[Any, ...]
    ) -> Any:
        """
        Run a task, and wait for it.

        :raises RuntimeError: in the reactor's thread.
        """
        self.check_thread("from_thread()")
        future: _TaskFuture[Any] = _TaskFuture()
        self.submit(future, function, args)
        return wait_for(future)

    def _look_for_cancel(self, future: Future[Any]) -> None:
        if future.cancelled():
            self.reactor.callFromThread(self.cancel, future)

    # In the reactor's thread

    def _begin(
        self,
        future: _TaskFuture[Any],
        function: Callable[..., Any] | Runnable[Any],
        args: tuple[Any, ...],
        name: str | None,
        ended: Callable[[Future[Any]], object],
    ) -> None:
        if future.done():
            # It was cancelled, or failed by stop().
            if self._take(future):
                future.set_running_or_notify_cancel()
            ended(future)
            return
        try:
            task: Task[Any] = spawn(function, *args, name=name, reactor=self.reactor)
        except Exception as error:
            if self._take(future) and future.set_running_or_notify_cancel():
                future.set_exception(drop_machinery_above(error))
            ended(future)
        else:
            self._tasks[future] = task
            task._when_done(functools.partial(self._ended, future, ended))

    def _take(self, future: Future[Any]) -> bool:
        """Take over a future, to settle it; return False if stop() has done so."""
        with self._lock:
            return self._tasks.pop(future, self) is not self

    def _ended(
        self,
        future: _TaskFuture[Any],
        ended: Callable[[Future[Any]], object],
        task: Task[Any],
    ) -> None:
        """Settle the future of a task that has ended, unless stop() has done so."""
        if self._take(future):
            if task.cancelled:
                future.cancel()
            if future.set_running_or_notify_cancel():
                if task.failed:
                    future._fail(task)
                else:
                    future.set_result(task.result())
        ended(future)

    def cancel(self, future: Future[Any]) -> None:
        """Cancel the task of a future; if it has not begun, it never will."""
        task = self._tasks.get(future)
        if task is not None:
            task.cancel()
        elif future in self._tasks:
            future.cancel()

    def forget(
        self, future: Future[Any], ended: Callable[[Future[Any]], object]
    ) -> None:
        """
        Clean up after a ``submit`` that was interrupted.  If the task has begun, its
        own end calls ``ended``.
        """
        if self._tasks.get(future) is None:
            if self._take(future):
                future.set_running_or_notify_cancel()
            ended(future)

    def stop(self) -> None:
        """
        Fail all futures, since the reactor stops: it runs no more tasks, and waits for
        its threads.
        """
        with self._lock:
            self._stopped = True
            waiting, self._tasks = self._tasks, {}
        # Before any task is cancelled: that may end another one, which would settle its
        # future in another way.
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(_stopped())
        for task in waiting.values():
            if task is not None:
                task.cancel("the reactor has stopped")


def _stopped() -> ReactorNotRunning:
    return ReactorNotRunning(
        "a thread has asked for a task, and the reactor has stopped: it runs no more "
        "tasks"
    )


_calls: Final[weakref.WeakKeyDictionary[Any, Calls]] = weakref.WeakKeyDictionary()


def calls_of(reactor: Any) -> Calls:
    """The calls of a reactor.  Call this in the reactor's thread."""
    calls = _calls.get(reactor)
    if calls is None:
        calls = _calls[reactor] = Calls(reactor)
        reactor.callWhenRunning(calls.note_thread)
        reactor.addSystemEventTrigger("during", "shutdown", calls.stop)
        # The reactor joins its threads in the same phase.  It has to do so after
        # calls.stop, since the threads may wait for tasks.
        joins = getattr(reactor, "threadpoolShutdownID", None)
        if joins is not None:
            reactor.removeSystemEventTrigger(joins)
            reactor.threadpoolShutdownID = reactor.addSystemEventTrigger(
                "during", "shutdown", reactor._stopThreadPool
            )
    return calls
