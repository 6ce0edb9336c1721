"""
Spawning: :func:`spawn` starts a task, and :func:`coroutine` lets each call of a
generator function start one.

See ``docs/coroutines.md``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Generator
from typing import Any, ParamSpec, TypeVar, overload

from twisted.internet.defer import Deferred

from twisted_rtsig.coro.runnables import RUNNABLE_CODE, Runnable, runnable_of
from twisted_rtsig.coro.scheduler import running, scheduler_of
from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.typing_backports import TypeVarTuple, Unpack

T = TypeVar("T")
P = ParamSpec("P")
Args = TypeVarTuple("Args")

# A reactor is an object wherever it is passed.  Type checkers take
# twisted.internet.reactor for the module of that name, and do not see that a Clock
# provides IReactorTime.  With Any mypy would not know which overload is right for a
# function that takes one, such as sleep().


@overload
def spawn(
    function: Callable[[Unpack[Args]], Awaitable[T]],
    *args: Unpack[Args],
    name: str | None = None,
    reactor: object = None,
) -> Task[T]: ...


@overload
def spawn(
    function: Callable[[Unpack[Args]], Generator[Any, Any, T]],
    *args: Unpack[Args],
    name: str | None = None,
    reactor: object = None,
) -> Task[T]: ...


@overload
def spawn(
    function: Runnable[T], *, name: str | None = None, reactor: object = None
) -> Task[T]: ...


@overload
def spawn(
    function: Callable[[Unpack[Args]], T],
    *args: Unpack[Args],
    name: str | None = None,
    reactor: object = None,
) -> Task[T]: ...


# mypy finds that no implementation accepts variadic overloads.
def spawn(  # type: ignore[misc]
    function: Callable[..., Any] | Runnable[Any],
    *args: Any,
    name: str | None = None,
    reactor: object = None,
) -> Task[Any]:
    """
    Run ``function(*args)`` as a task.

    It begins at once; or, if a task calls this, when that task waits.

    :param function: an ``async def`` or generator function, one decorated with
        :func:`coroutine` or ``inlineCallbacks``, any other; or the coroutine or
        generator that such a function has returned, without arguments.
    :param name: what it is called in logs; by default the name of the function.
    :param reactor: an ``IReactorTime`` provider, ``task.Clock`` for example; by
        default that of the task that calls this, or the installed one.
    :raises TypeError: if there is nothing to run.
    """
    if reactor is None and running.task is not None:
        scheduler = running.task._scheduler
    else:
        scheduler = scheduler_of(reactor)
    called: Any = function
    code = getattr(called, "__code__", None)
    # Nearly always it is an async def, or a generator function.
    if code is not None and code.co_flags & RUNNABLE_CODE:
        runnable = called(*args)
    else:
        runnable = runnable_of(function, args)
    task: Task[Any] = Task(runnable, name or runnable.__qualname__, scheduler)
    scheduler.resume(task, None)
    return task


def coroutine(
    function: Callable[P, Generator[Any, Any, T]],
) -> Callable[P, Deferred[T]]:
    """
    Decorate a generator function: each call runs as a task of its own, and
    returns a Deferred of the result.

    As ``inlineCallbacks``, with all that a task can do.  An ``async def`` needs
    no decoration.

    :raises TypeError: if it is no generator function.
    """
    if not inspect.isgeneratorfunction(function):
        raise TypeError(
            f"@coroutine is for generator functions, and {function!r} is none: an "
            "async def needs no decoration"
        )

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        return spawn(function(*args, **kwargs)).as_deferred()

    call.generator_function = function  # type: ignore[attr-defined]
    return call
