"""
Groups: tasks that end together, within one block of code.

See ``docs/coroutines.md``.
"""

from __future__ import annotations

import functools
import sys
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Final, Generic, Protocol, TypeVar, overload

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from twisted_rtsig.coro.awaiting_asyncio import again
from twisted_rtsig.coro.errors import cancellation_in, reason_of
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation, Wait
from twisted_rtsig.coro.runnables import Runnable, call_and_wait, name_of
from twisted_rtsig.coro.scheduler import running
from twisted_rtsig.coro.scopes import Scope
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.tasks import OfTask, Task
from twisted_rtsig.typing_backports import TypeVarTuple, Unpack

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

T = TypeVar("T")
Args = TypeVarTuple("Args")


class TaskGroup(Scope):
    """
    Tasks that end together::

        async with TaskGroup() as group:
            group.spawn(serve, first)
            group.spawn(serve, second)

    The block ends when all of the tasks have ended.  If a task or the block fails,
    then the other tasks and the block are cancelled, and all errors are raised in one
    ``ExceptionGroup``.  For generators there is :func:`run_group`.

    :raises NoTaskError: at the beginning of the block, outside of a task.
    :ivar cancelled: whether :meth:`cancel` was called: by user code, or by the group
        itself after a failure.
    """

    _name = "TaskGroup"

    def __init__(self) -> None:
        # By task: the start() that has spawned it; None for spawn().
        self._tasks: dict[Task[Any], _Starting | None] = {}
        self._errors: list[BaseException] = []
        self.cancelled: bool = False
        self._reason: str | None = None
        self._in_block = False
        self._last_ends: Operation[None] | None = None
        # What each task calls at its end: the same object for all of them.  It refers
        # to this group, so it is set only within the block.
        self._when_task_ends: tuple[Callable[[Task[Any]], None], ...] = ()

    @overload
    def spawn(
        self,
        function: Callable[[Unpack[Args]], Awaitable[T]],
        *args: Unpack[Args],
        name: str | None = None,
        reactor: object = None,
    ) -> Task[T]: ...

    @overload
    def spawn(
        self,
        function: Callable[[Unpack[Args]], Generator[Any, Any, T]],
        *args: Unpack[Args],
        name: str | None = None,
        reactor: object = None,
    ) -> Task[T]: ...

    @overload
    def spawn(
        self, function: Runnable[T], *, name: str | None = None, reactor: object = None
    ) -> Task[T]: ...

    @overload
    def spawn(
        self,
        function: Callable[[Unpack[Args]], T],
        *args: Unpack[Args],
        name: str | None = None,
        reactor: object = None,
    ) -> Task[T]: ...

    def spawn(  # type: ignore[misc]
        self,
        function: Callable[..., Any] | Runnable[Any],
        *args: Any,
        name: str | None = None,
        reactor: object = None,
    ) -> Task[Any]:
        """
        As :func:`spawn`, for a task of this group.

        :raises RuntimeError: before or after the block.
        """
        owner = self._owner("spawn()")
        if reactor is None:
            caller = running.task
            if caller is None or caller._scheduler is not owner._scheduler:
                reactor = owner.reactor
        task: Task[Any] = spawn(function, *args, name=name, reactor=reactor)
        self._adopt(task, None)
        return task

    @must_be_awaited
    def start(
        self, function: Callable[..., Any], *args: Any, name: str | None = None
    ) -> Deferred[Any]:
        """
        As :meth:`spawn`, and wait until the task reports that it is ready::

            async def listen(*, task_status=TASK_STATUS_IGNORED):
                async with open_datagrams() as port:
                    task_status.started(port.host)
                    ...

            address = await group.start(listen)

        An error that the task raises before that is raised here, and does not cancel
        the group.  If this wait is cancelled before that, then the task is cancelled,
        and this waits for its end.

        :param function: called with ``args``, and with ``task_status``, a
            :class:`TaskStatus`.
        :param name: the name of the task in logs; by default the name of the function.
        :return: the value that ``task_status.started`` was called with.
        :raises RuntimeError: before or after the block; or (when awaited) if the task
            has returned without a call of ``task_status.started``.
        :raises CancelledError: (when awaited) if the task was cancelled before that.
        """
        reactor = self._owner("start()").reactor
        starting = _Starting()
        status: TaskStatus[Any] = TaskStatus(starting)
        run = functools.partial(function, *args, task_status=status)
        task = spawn(run, name=name or name_of(function), reactor=reactor)
        starting.watch(task, status)
        self._adopt(task, starting)
        return starting

    def _owner(self, what: str) -> Task[Any]:
        if self._task is None:
            raise RuntimeError(
                f"{self!r} runs no task outside of its block: call {what} within "
                "async with"
            )
        return self._task

    def _adopt(self, task: Task[Any], starting: _Starting | None) -> None:
        self._tasks[task] = starting
        if task._done is None and not task.done:
            task._done = self._when_task_ends
        else:
            task._when_done(self._ended)
        if self.cancelled:
            task.cancel(self._reason)

    def cancel(self, reason: str | None = None) -> None:
        """
        Cancel all tasks of the group, and the block.  They are cancelled once, so that
        they can wait while they clean up.  Tasks that are spawned later are cancelled
        as well, where they first wait.

        :param reason: as of :meth:`Task.cancel`.
        """
        if self.cancelled:
            return
        self.cancelled = True
        self._reason = reason
        owner = self._task
        if owner is None:
            return
        # All are cancelled before any of them runs: for a task that waits for another
        # task of the group, the end of that task is a part of its own cancellation.
        with owner._scheduler.holding():
            if self._in_block:
                owner._cancel_for(self, reason)
            for task in list(self._tasks):
                task.cancel(reason)

    def _ended(self, task: Task[Any]) -> None:
        starting = self._tasks[task]
        if starting is not None and not starting.end(task):
            # The task was not ready: start() has its result or error.
            pass
        elif task.failed:
            error = task._see_error()
            self._errors.append(error)
            self.cancel(f"{task.name} has failed with {type(error).__name__}")
        del self._tasks[task]
        last = self._last_ends
        # The block may have been cancelled while it waited for the last task.
        if not self._tasks and last is not None and not last.called:
            last.succeed(None)

    async def __aenter__(self) -> TaskGroup:
        task = self._enter()
        self._when_task_ends = (self._ended,)
        self._in_block = True
        if self.cancelled:
            task._cancel_for(self, self._reason)
        return self

    async def __aexit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> bool | None:
        # Not annotated as bool: checkers would conclude that it may hide any error.
        self._in_block = False
        if isinstance(error, GeneratorExit):
            # Nothing can resume this coroutine any more, nor the tasks of the group.
            self._exit()
            return False
        error = cancellation_in(error) or error
        own = error is not None and self._has_caused(error)
        if isinstance(error, CancelledError):
            self.cancel(reason_of(error))
        elif error is not None:
            self.cancel(
                f"the block of the group has failed with {type(error).__name__}"
            )
        outer: CancelledError | None = None
        while self._tasks:
            self._last_ends = Wait()
            try:
                await self._last_ends
            except CancelledError as cancelled:
                if not self._has_caused(cancelled):
                    outer = cancelled
                self.cancel(reason_of(cancelled))
        self._last_ends = None
        task = self._task
        assert task is not None
        self._exit()
        if isinstance(error, CancelledError) and not own:
            outer = error
        # Break a circle of references: tasks of the group may refer to the group, and
        # the errors refer to the frames of the tasks.
        errors, self._errors = self._errors, []
        if error is not None and not isinstance(error, CancelledError):
            errors.insert(0, error)
        if errors:
            if outer is not None:
                # Deliver the cancellation where the task waits next.
                task._cancels += (again(outer),)
            raise BaseExceptionGroup(
                f"{len(errors)} of a group of tasks have failed", errors
            ) from None
        if outer is not None and outer is not error:
            raise outer
        return own

    def _exit(self) -> None:
        self._when_task_ends = ()
        super()._exit()

    def __repr__(self) -> str:
        return f"<TaskGroup of {len(self._tasks)} tasks>"


class StartedListener(Protocol):
    """An object that waits until a task is ready."""

    def started(self, value: Any) -> None:
        """Called when the task is ready."""


class TaskStatus(Generic[T]):
    """
    The ``task_status`` of a function that :meth:`TaskGroup.start` runs: the task calls
    it to report that it is ready.
    """

    def __init__(self, starting: StartedListener) -> None:
        # None once the task is ready, or has ended.
        self._starting: StartedListener | None = starting

    @overload
    def started(self: TaskStatus[None]) -> None: ...

    @overload
    def started(self, value: T) -> None: ...

    def started(self, value: Any = None) -> None:
        """
        Report that the task is ready: let :meth:`TaskGroup.start` return.

        :param value: what :meth:`TaskGroup.start` returns.
        :raises RuntimeError: if this was called before, or the task has ended.
        """
        starting, self._starting = self._starting, None
        if starting is None:
            raise RuntimeError(
                "task_status.started() was called again, or after the task had ended: "
                "call it once"
            )
        starting.started(value)

    def _end(self) -> bool:
        """Note that the task has ended; return whether it was ready before."""
        starting, self._starting = self._starting, None
        return starting is None


class _Ignored(TaskStatus[Any]):
    """The status of a function that :meth:`TaskGroup.start` does not run."""

    def __init__(self) -> None:
        pass

    def started(self, value: Any = None) -> None:
        """See :meth:`TaskStatus.started`: does nothing."""

    def __repr__(self) -> str:
        return "TASK_STATUS_IGNORED"


TASK_STATUS_IGNORED: Final[TaskStatus[Any]] = _Ignored()
"""The default of ``task_status``, for functions that are also called directly."""


class _Starting(OfTask[Any]):
    """A Deferred that fires when a task of a group is ready, or has ended before."""

    def __init__(self) -> None:
        Deferred.__init__(self)
        self._task: Task[Any] | None = None
        self._status: TaskStatus[Any] | None = None

    def watch(self, task: Task[Any], status: TaskStatus[Any]) -> None:
        """Set the task, which was spawned and may be ready already."""
        self._status = status
        if not self.called:
            self._task = task

    def started(self, value: Any) -> None:
        """Fire: the task is ready."""
        self._task = None
        self.callback(value)

    def end(self, task: Task[Any]) -> bool:
        """Note that the task has ended; return whether it was ready before."""
        # Break a circle: an error refers to the status by its frames.
        status, self._status = self._status, None
        self._task = None
        if status is None or status._end():
            return True
        if task.failed or task.cancelled:
            self.errback(task._see_failure())
        else:
            error = RuntimeError(
                f"{task.name} has returned without a call of task_status.started()"
            )
            self.errback(Failure(error))
        return False

    def __repr__(self) -> str:
        if self._task is None:
            return super().__repr__()
        return f"the start of {self._task!r}"


@overload
def run_group(
    body: Callable[[TaskGroup, Unpack[Args]], Awaitable[T]], *args: Unpack[Args]
) -> Deferred[T]: ...


@overload
def run_group(
    body: Callable[[TaskGroup, Unpack[Args]], Generator[Any, Any, T]],
    *args: Unpack[Args],
) -> Deferred[T]: ...


@overload
def run_group(
    body: Callable[[TaskGroup, Unpack[Args]], T], *args: Unpack[Args]
) -> Deferred[T]: ...


@must_be_awaited  # type: ignore[misc]
def run_group(body: Callable[..., Any], *args: Any) -> Deferred[Any]:
    """
    The :class:`TaskGroup` for generators::

        def body(group):
            group.spawn(serve, first)
            yield sleep(1)

        yield run_group(body)

    :param body: the block; called with the group and ``args``.
    :return: what ``body`` returns, once all tasks of the group have ended.
    """

    async def block() -> Any:
        async with TaskGroup() as group:
            return await call_and_wait(body, (group, *args))

    return spawn(block, name=getattr(body, "__qualname__", None)).as_deferred()
