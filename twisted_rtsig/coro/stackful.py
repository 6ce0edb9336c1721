"""
Tasks in plain functions, which may wait anywhere in their calls, on greenlet; and
sockets for libraries that were written for blocking ones.

See ``docs/stackful.md``.  Needs the extra ``[greenlet]``; nothing else of this package
imports this module.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import AsyncIterable, Callable, Coroutine, Generator, Iterator
from contextlib import AbstractAsyncContextManager
from types import CodeType
from typing import Any, Final, ParamSpec, TypeVar, cast
from weakref import ref

from twisted_rtsig.coro.blocking_sockets import (
    BlockingSocket,
    ClientSocket,
    create_connection,
)
from twisted_rtsig.coro.blocking_tls import BlockingSSLSocket, allow_blocking_sockets
from twisted_rtsig.coro.patching import patched
from twisted_rtsig.coro.runnables import name_of
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.stacks import NoStackError, drive, stack_of, wait
from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.typing_backports import TypeVarTuple, Unpack

__all__ = [
    "BlockingSSLSocket",
    "BlockingSocket",
    "ClientSocket",
    "NoStackError",
    "allow_blocking_sockets",
    "create_connection",
    "entering",
    "in_stackful",
    "iterate",
    "patched",
    "spawn_stackful",
    "wait",
]

T = TypeVar("T")
P = ParamSpec("P")
Args = TypeVarTuple("Args")


# Starting


def spawn_stackful(
    function: Callable[[Unpack[Args]], T],
    *args: Unpack[Args],
    name: str | None = None,
    reactor: object = None,
) -> Task[T]:
    """
    Run a plain function, ``function(*args)``, as a task.  In the function, and in all
    functions that it calls, :func:`wait` waits.

    The task begins as one of :func:`.spawn` does.

    :param name: the name of the task in logs; by default that of the function.
    :param reactor: an ``IReactorTime`` provider, ``task.Clock`` for example; by
        default that of the calling task, or the installed one.
    :raises TypeError: if the function is not a plain one.
    """
    _check(function, "spawn_stackful()", "spawn()")
    scheduler = scheduler_for(reactor)
    driver = drive(stack_of((function, args, None, None, None)), True)
    task: Task[T] = Task(driver, name or name_of(function), scheduler)
    scheduler.resume(task, None)
    return task


def in_stackful(
    function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, T]:
    """
    Run a plain function in the task of the coroutine that awaits this.  In the
    function, and in all functions that it calls, :func:`wait` waits.

    In a group ``group.spawn(in_stackful(function, *args))`` starts a task.

    :return: a coroutine that returns the result of the function.
    :raises TypeError: if the function is not a plain one.
    """
    _check(function, "in_stackful()", "await")
    coroutine: Any = _await_driver(function, args, kwargs)
    coroutine.__qualname__ = name_of(function)
    return cast(Coroutine[Any, Any, T], coroutine)


async def _await_driver(
    function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> T:
    stack = stack_of(None)
    stack.awaited = (function, args, kwargs, sys.exc_info()[1], ref(stack))
    driver: Any = drive(stack, False)
    del function, args, kwargs, stack
    result: T = await driver
    return result


def _make_runnable(
    function: Callable[..., T], *args: Any, **kwargs: Any
) -> Generator[Any, Any, T]:
    """
    The body of a task that is spawned with ``in_stackful``: the driver itself, without
    a coroutine around it.
    """
    _check(function, "in_stackful()", "await")
    driver: Any = drive(stack_of((function, args, kwargs, None, None)), True)
    driver.__qualname__ = name_of(function)
    return cast(Generator[Any, Any, T], driver)


in_stackful.make_runnable = _make_runnable  # type: ignore[attr-defined]


def _check(function: object, what: str, instead: str) -> None:
    code = getattr(function, "__code__", None)
    if type(code) is CodeType and not code.co_flags & _NOT_PLAIN:
        return
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(
            f"{what} is for plain functions, and {function!r} is not one: use {instead}"
        )
    if inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{what} is for plain functions, and {function!r} makes an asynchronous "
            "generator: call iterate() in a plain function"
        )
    if not callable(function):
        raise TypeError(f"{what} needs a function and its arguments, not {function!r}")


_NOT_PLAIN: Final = (
    inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
)


# Asynchronous context managers and iterators


@contextlib.contextmanager
def entering(manager: AbstractAsyncContextManager[T, bool | None]) -> Iterator[T]:
    """
    Use an asynchronous context manager in a ``with`` statement of a stackful task::

        with entering(TaskGroup()) as group:
            group.spawn(in_stackful(serve, first))
    """
    # As ``async with``: look up both methods first, and do not leave what could not be
    # entered.
    kind: Any = type(manager)
    leave = kind.__aexit__
    value: T = wait(kind.__aenter__(manager))
    try:
        yield value
    except BaseException as error:
        if not wait(leave(manager, type(error), error, error.__traceback__)):
            raise
    else:
        wait(leave(manager, None, None, None))


def iterate(values: AsyncIterable[T]) -> Iterator[T]:
    """
    Use an asynchronous iterable in a ``for`` statement of a stackful task::

        for line in iterate(stream.lines()):
            ...
    """
    iterator = aiter(values)
    while True:
        try:
            value = wait(anext(iterator))
        except StopAsyncIteration:
            return
        yield value
