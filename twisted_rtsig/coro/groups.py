"""
Groups: tasks that end together, within one block of code.

See ``docs/coroutines.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred

from twisted_rtsig.coro.errors import Cancelled
from twisted_rtsig.coro.operations import Operation, Wait
from twisted_rtsig.coro.scopes import Scope
from twisted_rtsig.coro.tasks import Runnable, Task, call_and_wait, spawn

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


class TaskGroup(Scope):
    """
    Tasks that end together::

        async with TaskGroup() as group:
            group.spawn(serve, first)
            group.spawn(serve, second)

    The block ends when all of them have ended.  If one of them fails, or the
    block does, then the others and the block are cancelled, and all errors are
    raised in one ``ExceptionGroup``.  For generators there is :func:`run_group`.

    :raises NoTaskError: at the beginning of the block, outside of a task.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tasks: dict[Task[Any], None] = {}
        self._errors: list[BaseException] = []
        self._cancelled = False
        self._in_block = False
        self._last_ends: Operation[None] | None = None

    def spawn(
        self, function: Callable[..., Any] | Runnable[Any], *args: Any, **named: Any
    ) -> Task[Any]:
        """
        As :func:`spawn`, for a task of this group.

        :raises RuntimeError: before or after the block.
        """
        if self._task is None:
            raise RuntimeError(
                f"{self!r} runs no task outside of its block: call spawn() within "
                "async with"
            )
        named.setdefault("reactor", self._task.reactor)
        task = spawn(function, *args, **named)
        self._tasks[task] = None
        task._when_done(self._ended)
        if self._cancelled:
            task.cancel()
        return task

    def cancel(self) -> None:
        """
        Cancel all tasks of the group, and the block: once, so that they can clean up.
        """
        if self._cancelled:
            return
        self._cancelled = True
        for task in list(self._tasks):
            task.cancel()
        if self._in_block and self._task is not None:
            self._task._cancel_for(self)

    def _ended(self, task: Task[Any]) -> None:
        del self._tasks[task]
        if task.failed:
            self._errors.append(task._see_error())
            self.cancel()
        last = self._last_ends
        # The one who waits for it may have been cancelled meanwhile.
        if not self._tasks and last is not None and not last.called:
            last.succeed(None)

    async def __aenter__(self) -> TaskGroup:
        self._enter("TaskGroup")
        self._in_block = True
        return self

    async def __aexit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> bool:
        self._in_block = False
        if isinstance(error, GeneratorExit):
            # Nobody can resume this any more, nor the tasks of the group.
            self._exit()
            return False
        own = isinstance(error, Cancelled) and error._scope is self
        if error is not None:
            self.cancel()
        outer: Cancelled | None = None
        while self._tasks:
            self._last_ends = Wait()
            try:
                await self._last_ends
            except Cancelled as cancelled:
                if cancelled._scope is not self:
                    outer = cancelled
                self.cancel()
        self._last_ends = None
        task = self._task
        assert task is not None
        self._exit()
        if isinstance(error, Cancelled) and not own:
            outer = error
        # Tasks of the group may refer to it, and the errors to their frames.
        errors, self._errors = self._errors, []
        if error is not None and not isinstance(error, Cancelled):
            errors.insert(0, error)
        if errors:
            if outer is not None:
                # Where it waits next.
                task._cancels += (outer._scope,)  # type: ignore[operator]
            raise BaseExceptionGroup(
                f"{len(errors)} of a group of tasks have failed", errors
            ) from None
        if outer is not None and outer is not error:
            raise outer
        return own

    def __repr__(self) -> str:
        return f"<TaskGroup of {len(self._tasks)} tasks>"


def run_group(body: Callable[[TaskGroup], Any], *args: Any) -> Deferred[Any]:
    """
    The :class:`TaskGroup` for generators::

        def body(group):
            group.spawn(serve, first)
            yield sleep(1)

        yield run_group(body)

    :param body: called with the group and C{args}: the block.
    :return: what C{body} returns, when all tasks of the group have ended.
    """

    async def block() -> Any:
        async with TaskGroup() as group:
            return await call_and_wait(body, (group, *args))

    return spawn(block, name=getattr(body, "__qualname__", None)).as_deferred()
