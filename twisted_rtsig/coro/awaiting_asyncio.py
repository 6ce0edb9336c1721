"""
Coroutines of asyncio in tasks: how a task waits for futures of asyncio, and the object
that stands for it as ``asyncio.current_task()``.

See ``docs/asyncio.md``.  A coroutine of asyncio runs in the task that awaits it, in
the same steps.  It yields futures, and the task waits for each of them.  Meanwhile
``asyncio.current_task()`` has to be an object that ``asyncio.timeout``, for example,
can cancel.  So a :class:`CurrentTask` stands for the task, and is set for each of its
steps.

Tasks of a reactor without an event loop of asyncio pay nothing for this.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import weakref
from asyncio import (
    AbstractEventLoop,
    CancelledError,
    Future,
    InvalidStateError,
    base_tasks,
)
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from twisted_rtsig.coro.errors import Cancelled, reason_of
from twisted_rtsig.coro.operations import NOTHING, Operation, Wait

if TYPE_CHECKING:
    from twisted_rtsig.coro.scheduler import Scheduler
    from twisted_rtsig.coro.scopes import Scope
    from twisted_rtsig.coro.tasks import Task

T = TypeVar("T")

# asyncio keeps the running loop and the current tasks in one place for all kinds of
# event loops, so these functions work with each of them.
_get_running_loop: Final = asyncio._get_running_loop
_set_running_loop: Final = asyncio._set_running_loop
# These two accept any object as a task.
_enter_task: Final[Callable[[Any, Any], None]] = asyncio.tasks._enter_task
_leave_task: Final[Callable[[Any, Any], None]] = asyncio.tasks._leave_task


def swap_current_task(loop: AbstractEventLoop, task: Any) -> Any:
    """Set the current task of a running loop; return the task that was current."""
    before = asyncio.current_task(loop)
    if before is not None:
        _leave_task(loop, before)
    if task is not None:
        _enter_task(loop, task)
    return before


# The event loop


class Asyncio:
    """
    The part of a scheduler that deals with asyncio.

    :ivar loop: the event loop of the reactor.  None if the reactor has no event loop
        and its tasks run in the callbacks of another loop: the tasks of a ``Clock``,
        for example.
    """

    __slots__ = ("loop",)

    def __init__(self, loop: AbstractEventLoop | None) -> None:
        self.loop: AbstractEventLoop | None = loop

    def adopt(self, task: Task[Any]) -> None:
        """Set a current task of asyncio for each step of a new task."""
        context: Any = task._context
        task._context = cast(Any, CurrentTask(task, context, self.loop))

    def adopt_active(self, task: Task[Any] | None) -> None:
        """As :meth:`adopt`, for a task that runs already, or has ended."""
        context: Any = None if task is None else task._context
        if task is None or context is None or current_task_of(task) is not None:
            return
        if isinstance(context, contextvars.Context):
            self.adopt(task)
        else:
            # The steps of the task are observed.  When the instruments are removed,
            # the inner context is put back: replace that.
            context.context = CurrentTask(task, context.context, self.loop)

    def note(self, task: Task[Any], reason: str | None, scope: Scope | None) -> None:
        """Note a cancellation by this package that was requested and not delivered."""
        others = tuple(e for e in task._cancels if not _same_by_asyncio(e, scope))
        if any(each._scope is scope for each in others):
            return
        # Of several requests only one is delivered, as in asyncio.
        task._cancels = (*others, Cancelled(reason, scope))
        current = current_task_of(task)
        if current is not None:
            current.around(task, scope).count(scope)


def _same_by_asyncio(cancelled: Cancelled, scope: Scope | None) -> bool:
    return isinstance(cancelled, _CancelledByAsyncio) and cancelled._scope is scope


def of_reactor(reactor: Any) -> Asyncio | None:
    """
    The :class:`Asyncio` of a reactor; None if there is no event loop, neither of the
    reactor nor running in this thread.
    """
    loop = getattr(reactor, "_asyncioEventloop", None)
    return Asyncio(loop) if loop is not None or a_loop_runs() else None


def a_loop_runs() -> bool:
    """Whether an event loop of asyncio runs in this thread."""
    return _get_running_loop() is not None


def loop_for(scheduler: Scheduler) -> AbstractEventLoop | None:
    """The event loop whose futures the tasks of a scheduler can wait for."""
    running = _get_running_loop()
    if running is not None or scheduler.asyncio is None:
        return running
    return scheduler.asyncio.loop


def no_loop(what: str) -> RuntimeError:
    """The error for an action, ``what``, that needs an event loop of asyncio."""
    return RuntimeError(
        f"{what}, and no event loop of asyncio runs in the thread of this reactor: "
        "use the reactor rtsig-asyncio, by twistd --reactor=rtsig-asyncio, "
        'twisted_rtsig.run(main, reactor="rtsig-asyncio") or '
        "twisted_rtsig.asyncioreactor.install(); or Twisted's asyncio reactor"
    )


# To wait


def wait_for(task: Task[Any], awaited: Any) -> Wait | FutureWait | None:
    """
    The operation that ``task`` is to wait for after it has yielded ``awaited``; None if
    ``awaited`` is not of asyncio.

    :raises RuntimeError: if the task would never be resumed.
    """
    scheduler = task._scheduler
    loop = loop_for(scheduler)
    if awaited is None:
        if loop is None and inspect.isgenerator(task._body):
            # The generator has yielded the result of a function that returns nothing.
            return None
        # asyncio.sleep(0), for example.
        what = f"{task!r} has yielded to asyncio's event loop"
    elif getattr(awaited, "_asyncio_future_blocking", None) is not None:
        what = f"{task!r} cannot wait for {awaited!r}: that is a future of asyncio"
    else:
        return None
    if loop is None:
        raise no_loop(what)
    if scheduler.asyncio is None:
        scheduler.use_asyncio(Asyncio(None))
    if awaited is None:
        turn: Wait = _Turn(loop).operation
        return turn
    future: Future[Any] = awaited
    if future.get_loop() is not loop:
        raise RuntimeError(
            f"{task!r} cannot wait for {future!r}: that belongs to another event loop "
            "of asyncio"
        )
    if awaited is current_task_of(task):
        raise RuntimeError(f"{task!r} cannot wait for itself")
    return FutureWait(task, future)


class _Turn:
    """A wait until the event loop has had a turn."""

    __slots__ = ("_handle", "operation")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.operation = Wait()
        self._handle = loop.call_soon(_wake, self.operation)
        self.operation.owner = self

    def forget(self, operation: Operation[Any]) -> None:
        self._handle.cancel()

    def waits_for(self, operation: Operation[Any]) -> str:
        return "the next turn of asyncio's event loop"


def _wake(operation: Operation[None]) -> None:
    operation.owner = None
    operation.succeed(None)


class FutureWait:
    """
    The wait of a task for a future of asyncio.

    :ivar future: the future.
    """

    __slots__ = ("_cancelling", "_sends", "_task", "_was_cancelled", "future")

    def __init__(self, task: Task[Any], future: Future[Any]) -> None:
        self._task = task
        self.future: Future[Any] = future
        self._cancelling = self._was_cancelled = False
        # Code that awaits the future asks the future for its result.  A generator that
        # has yielded it does not, so the result is sent to the generator.
        self._sends = not future._asyncio_future_blocking
        future._asyncio_future_blocking = False
        future.add_done_callback(self._done)

    def __repr__(self) -> str:
        return repr(self.future)

    def cancel(self, cancelled: Cancelled) -> None:
        """Cancel the future for the task, which is resumed when the future is done."""
        if self._cancelling:
            # Tasks of asyncio and of this package wait for each other in a circle.
            self._task._next_cancel()
            self._task._resume(None, cancelled._raised())
            return
        self._cancelling = self._was_cancelled = True
        try:
            self.future.cancel(msg=cancelled.reason)
        finally:
            self._cancelling = False

    def _done(self, future: Future[Any]) -> None:
        task = self._task
        if task._waiting_on is not self:
            return
        value: Any = None
        error: BaseException | None = None
        cancellation = cancellation_of(future)
        if cancellation is None:
            # asyncio, too, gives its cancellation precedence over the future's result.
            entry = task._cancel_to_raise()
            if isinstance(entry, _CancelledByAsyncio):
                error = _take(task, None)
        elif self._was_cancelled:
            error = _take(task, cancellation)
        if error is None and self._sends:
            try:
                value = future.result()
            except BaseException as raised:
                error = raised
        try:
            task._resume(value, error)
        finally:
            # Break a circle: the error's traceback refers to this frame.
            del self, task, value, error, cancellation, future


def _take(task: Task[Any], cause: BaseException | None) -> BaseException | None:
    """Take the next cancellation to deliver; return its error, or None."""
    cancelled = task._next_cancel()
    if cancelled is None:
        return None
    if cause is not None:
        cancelled.__cause__ = cause
    return cancelled._raised()


def cancellation_of(future: Future[Any]) -> CancelledError | None:
    """The cancellation of a future that is done; None if it was not cancelled."""
    try:
        # The future of asyncio.gather() fails with CancelledError, and does not count
        # as cancelled.
        error = future.exception()
    except CancelledError as cancelled:
        return cancelled
    return error if isinstance(error, CancelledError) else None


# The current task


class _CancelledByAsyncio(Cancelled):
    """
    A cancellation that code for asyncio has requested by ``cancel`` of the current
    task: a timeout or group of asyncio, for example.
    """

    def __init__(self, message: Any, scope: Scope | None) -> None:
        super().__init__(None if message is None else str(message), scope)
        self._message = message

    def _raised(self) -> CancelledError:
        # Some code checks that the class is exactly this one.
        error = CancelledError(*() if self._message is None else (self._message,))
        error.__cause__ = self.__cause__
        return error


def again(cancelled: CancelledError) -> Cancelled:
    """A copy of a cancellation, to be delivered once more."""
    if isinstance(cancelled, Cancelled):
        return Cancelled(cancelled.reason, cancelled._scope)
    return _CancelledByAsyncio(reason_of(cancelled), None)


def current_task_of(task: Task[Any]) -> CurrentTask | None:
    """The object that stands for ``task`` in asyncio, outside of any ``shield``."""
    context: Any = task._context
    while context is not None and type(context) is not CurrentTask:
        # If the steps of the task are observed, then this is a wrapper of the context.
        context = getattr(context, "context", None)
    current: CurrentTask | None = context
    return current


def runs(task: Task[Any]) -> bool:
    """
    Whether ``task`` is also the current task of asyncio.  It is not while an eager task
    of asyncio runs that ``task`` has started.
    """
    if _get_running_loop() is None:
        return True
    current: Any = asyncio.current_task()
    return isinstance(current, CurrentTask) and current.task() is task


def enter_shield(task: Task[Any], shield: Scope) -> None:
    """
    Let another object stand for ``task`` within a ``shield``.  So code that asks for
    the current task within the shield can cancel the code inside, and code that has
    asked before cannot.
    """
    current = current_task_of(task)
    if current is not None:
        _set_current(current, _WithinShield(current, task, shield))


def exit_shield(task: Task[Any], shield: Scope) -> None:
    """Undo :func:`enter_shield` when the task leaves its innermost ``shield``."""
    current = current_task_of(task)
    # A shield that was entered before the tasks used asyncio has no such object.
    if current is not None:
        inner = current.inner
        if inner is not None and inner.root is shield:
            _set_current(current, inner.outer)


def _set_current(current: CurrentTask, inner: _WithinShield | None) -> None:
    current.inner = inner
    loop = _get_running_loop()
    if loop is not None:
        swap_current_task(loop, inner or current)


class CurrentTask:
    """
    Stands for a task of this package as ``asyncio.current_task()``.  It also stands for
    the context of the task, so that the scheduler runs each step with this as the
    current task.

    It has the methods of asyncio's tasks, is an instance of their class to
    ``isinstance``, and can be awaited by them.  It is not in ``asyncio.all_tasks()``.

    :ivar context: the context of the task.
    :ivar loop: the event loop of its reactor; None if the reactor has none.
    :ivar inner: within a ``shield``, the object that is the current task instead.
    """

    __slots__ = ("__weakref__", "_more", "_ref", "context", "inner", "loop")

    # The shield that this is for; None outside of any shield.
    root: Scope | None = None

    # False, as of a future that nothing waits for: see asyncio.isfuture.
    _asyncio_future_blocking = False
    # For asyncio.print_call_graph, and for messages in asyncio's debug mode.
    _asyncio_awaited_by = None
    _source_traceback = None

    def __init__(
        self,
        task: Task[Any],
        context: contextvars.Context,
        loop: AbstractEventLoop | None,
    ) -> None:
        # Weak, since the task refers to this.
        self._ref = weakref.ref(task)
        self.context: contextvars.Context = context
        self.loop: AbstractEventLoop | None = loop
        self.inner: _WithinShield | None = None
        # Set when it is needed, since a CurrentTask is made for each task.
        self._more: _More | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return asyncio.Task

    # Steps

    # As contextvars.Context.run, with one or two arguments: *args would take longer.
    def run(self, function: Callable[..., T], first: Any, second: Any = NOTHING) -> T:
        """Run a step of the task."""
        if sys.version_info >= (3, 12):
            loop = _get_running_loop()
        else:
            # In these versions, to ask for the running loop takes a system call.
            loop = self.loop
            if loop is None or not loop.is_running():
                loop = _get_running_loop()
        if loop is None:
            return self._run_outside(function, first, second)
        try:
            _enter_task(loop, self.inner or self)
        except RuntimeError:
            return self._run_within(loop, function, first, second)
        try:
            if second is NOTHING:
                return self.context.run(function, first)
            return self.context.run(function, first, second)
        finally:
            _leave_task(loop, self.inner or self)
            # CPython 3.12 and 3.13 keep this frame with an error that the task raises.
            del self, function, first, second

    def _run_within(
        self, loop: AbstractEventLoop, function: Callable[..., T], *args: Any
    ) -> T:
        """Run a step while a task of asyncio, which has resumed this, is current."""
        before = swap_current_task(loop, None)
        try:
            return self.run(function, *args)
        finally:
            swap_current_task(loop, before)
            del self, function, args, before

    def _run_outside(self, function: Callable[..., T], *args: Any) -> T:
        """Run a step while no loop runs: the reactor is about to start, for example."""
        loop = self.loop
        try:
            if loop is None or loop.is_closed():
                return self.context.run(
                    function, *(e for e in args if e is not NOTHING)
                )
            _set_running_loop(loop)
            try:
                return self.run(function, *args)
            finally:
                _set_running_loop(None)
        finally:
            del self, function, args

    def task(self) -> Task[Any] | None:
        """The task; None once it has ended and nothing refers to it any more."""
        ended = None if self._more is None else self._more.ended
        return ended or self._ref()

    @property
    def more(self) -> _More:
        """The attributes that few tasks need; made on first use."""
        if self._more is None:
            self._more = _More()
        return self._more

    # Cancellation

    def around(self, task: Task[Any], scope: Scope | None) -> CurrentTask:
        """The object that is the current task where the block of ``scope`` begins."""
        within = self.inner
        while within is not None:
            if scope in task._scopes[task._scopes.index(within.root) :]:
                return within
            within = within.outer
        return self

    def count(self, scope: Scope | None) -> None:
        """Count a request to cancel a block of code, or if None, all of the task."""
        self.more.requests += 1
        if scope is not None:
            self.more.counted += (scope,)

    def cancelling(self) -> int:
        """The number of requests for a cancellation that were not withdrawn."""
        task = self.task()
        scopes = () if task is None else task._scopes
        left = tuple(each for each in self.more.counted if each in scopes)
        self.more.requests -= len(self.more.counted) - len(left)
        self.more.counted = left
        return self.more.requests

    def uncancel(self) -> int:
        """Withdraw a request; return the number of requests that are left."""
        if self.cancelling():
            self.more.requests -= 1
            task = self.task()
            if not self.more.requests and task is not None:
                task._cancels = tuple(
                    each
                    for each in task._cancels
                    if not _same_by_asyncio(each, self.root)
                )
        return self.more.requests

    def cancel(self, msg: Any | None = None) -> bool:
        """
        Raise asyncio's ``CancelledError`` where the task waits, or where it waits
        next.
        """
        task = self.task()
        if task is None or task.done:
            return False
        self.more.requests += 1
        if any(each._scope is self.root for each in task._cancels):
            return True
        before = task._cancels
        cancelled = _CancelledByAsyncio(msg, self.root)
        task._cancels += (cancelled,)
        waiting = task._waiting_on
        if task._cancel_to_raise() is not cancelled or waiting is None:
            return True
        if isinstance(waiting, FutureWait):
            if waiting.future.cancel(msg=msg):
                # The future delivers the cancellation to the task.
                task._cancels = before
        else:
            # Not now: asyncio's tasks do not run within a call of cancel() either.
            loop = _get_running_loop() or self.loop
            assert loop is not None
            loop.call_soon(task._interrupt)
        return True

    @property
    def _must_cancel(self) -> bool:
        task = self.task()
        return task is not None and any(
            _same_by_asyncio(each, self.root) for each in task._cancels
        )

    @property
    def _fut_waiter(self) -> Future[Any] | None:
        task = self.task()
        waiting = None if task is None else task._waiting_on
        return waiting.future if isinstance(waiting, FutureWait) else None

    # The end

    def done(self) -> bool:
        """Whether the task has ended."""
        task = self.task()
        return task is None or task.done

    def cancelled(self) -> bool:
        """Whether the task was cancelled."""
        task = self.task()
        return task is not None and task.cancelled

    def result(self) -> Any:
        """Return what the function of the task returned, or raise its error."""
        error = self.exception()
        if error is not None:
            try:
                raise error
            finally:
                del self, error
        task = self.task()
        assert task is not None
        return task.result()

    def exception(self) -> BaseException | None:
        """The error of the function of the task; None if it has returned."""
        task = self.task()
        if task is None:
            raise InvalidStateError("the task has ended, and its result is gone")
        if not task.done:
            raise InvalidStateError("the task has not ended yet")
        if task.cancelled:
            raise self._make_cancelled_error()
        return task._see_error() if task.failed else None

    @property
    def _cancel_message(self) -> str | None:
        task = self.task()
        return task._value if task is not None and task.cancelled else None

    def _make_cancelled_error(self) -> CancelledError:
        message = self._cancel_message
        return CancelledError(*() if message is None else (message,))

    def add_done_callback(
        self,
        callback: Callable[[Any], object],
        *,
        context: contextvars.Context | None = None,
    ) -> None:
        """When the task has ended, let the event loop call ``callback`` with this."""
        more = self.more
        if more.callbacks is None:
            more.callbacks = []
            task = self.task()
            if task is not None:
                task._when_done(self._end)
        more.callbacks.append((callback, context or contextvars.copy_context()))
        if self.done():
            self._call()

    def remove_done_callback(self, callback: Callable[[Any], object]) -> int:
        """Do not call ``callback``; return how often it had been added."""
        callbacks = self.more.callbacks or []
        left = [each for each in callbacks if each[0] != callback]
        removed = len(callbacks) - len(left)
        callbacks[:] = left
        return removed

    def _end(self, task: Task[Any]) -> None:
        self.more.ended = task
        self._call()

    def _call(self) -> None:
        more = self.more
        callbacks, more.callbacks = more.callbacks or [], []
        loop = _get_running_loop() or self.loop
        if loop is not None and not loop.is_closed():
            for callback, context in callbacks:
                loop.call_soon(callback, self, context=context)

    def __await__(self) -> Generator[Any, None, Any]:
        if not self.done():
            future: Future[None] = self.get_loop().create_future()
            self.add_done_callback(functools.partial(_tell, future))
            yield from future
        return self.result()

    __iter__ = __await__

    # Inspection

    def get_loop(self) -> AbstractEventLoop:
        """The running event loop; if none runs, the event loop of the reactor."""
        loop = _get_running_loop() or self.loop
        if loop is None:
            raise RuntimeError("no event loop of asyncio runs")
        return loop

    _loop = property(get_loop)

    def get_name(self) -> str:
        """The name of the task."""
        task = self.task()
        return "a task that has ended" if task is None else task.name

    def set_name(self, name: object) -> None:
        """Give the task another name."""
        task = self.task()
        if task is not None:
            task.name = str(name)

    def get_coro(self) -> Any:
        """The coroutine or generator of the task; None once it has ended."""
        task = self.task()
        return None if task is None or task.done else task._body

    _coro = property(get_coro)

    def get_context(self) -> contextvars.Context:
        """The context of the task."""
        return self.context

    def get_stack(self, *, limit: int | None = None) -> list[Any]:
        """The frames of the task."""
        return base_tasks._task_get_stack(cast(Any, self), limit)

    def print_stack(self, *, limit: int | None = None, file: Any = None) -> None:
        """Print the frames of the task."""
        base_tasks._task_print_stack(cast(Any, self), limit, file)

    def set_result(self, result: object) -> None:
        """Refuse, as tasks of asyncio do."""
        raise RuntimeError("Task does not support set_result operation")

    def set_exception(self, exception: object) -> None:
        """Refuse, as tasks of asyncio do."""
        raise RuntimeError("Task does not support set_exception operation")

    def __repr__(self) -> str:
        return f"<asyncio's view of {self.task()!r}>"


class _WithinShield(CurrentTask):
    """
    Stands for a task within a ``shield``.

    :ivar root: the shield.
    :ivar outer: the object for the next outer shield; None if there is none.
    """

    __slots__ = ("outer", "root")

    def __init__(self, current: CurrentTask, task: Task[Any], shield: Scope) -> None:
        super().__init__(task, current.context, current.loop)
        self.outer: _WithinShield | None = current.inner
        self.root: Scope | None = shield


class _More:
    """
    Attributes of a :class:`CurrentTask` that few tasks need.

    :ivar requests: the number of cancellations that were requested and not withdrawn.
        A request for a block of code counts as long as the task is in the block.
    :ivar counted: the blocks of such requests.
    :ivar callbacks: the functions to call at the end of the task, with their contexts.
    :ivar ended: the task, once it has ended, if something waits for its result.
    """

    __slots__ = ("callbacks", "counted", "ended", "requests")

    def __init__(self) -> None:
        self.requests: int = 0
        self.counted: tuple[Scope, ...] = ()
        self.callbacks: list[tuple[Callable[[Any], object], Any]] | None = None
        self.ended: Task[Any] | None = None


def _tell(future: Future[None], ended: object) -> None:
    if not future.done():
        future.set_result(None)
