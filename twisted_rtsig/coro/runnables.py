"""
Runnables: the coroutine or generator that a task steps through, made of a function of
any style.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Coroutine, Generator
from types import CodeType
from typing import Any, TypeVar, cast

T = TypeVar("T")

Runnable = Coroutine[Any, Any, T] | Generator[Any, Any, T]

# The flags of the code of a function that returns one of these.
RUNNABLE_CODE = inspect.CO_COROUTINE | inspect.CO_GENERATOR


def name_of(function: object) -> str:
    """The name of a function; of any other callable, its ``repr``."""
    return getattr(function, "__qualname__", None) or repr(function)


def runnable_of(function: Any, args: tuple[Any, ...]) -> Runnable[Any]:
    """
    The coroutine or generator of ``function(*args)``.

    :raises TypeError: if there is nothing to run.
    """
    # The function that @coroutine has decorated makes no task of its own.
    inner = getattr(function, "generator_function", function)
    code: CodeType | None = getattr(inner, "__code__", None)
    if code is not None and code.co_flags & RUNNABLE_CODE:
        made: Runnable[Any] = inner(*args)
        return made
    # Of in_stackful().
    make_runnable = getattr(function, "make_runnable", None)
    if make_runnable is not None:
        return cast(Runnable[Any], make_runnable(*args))
    if inspect.iscoroutine(function) or inspect.isgenerator(function):
        if args:
            raise TypeError(f"{function!r} runs already: it cannot take {args!r}")
        return function
    if not callable(function):
        raise TypeError(
            f"spawn() needs a function and its arguments, or a coroutine: {function!r} "
            "is neither"
        )
    runnable: Any = call_and_wait(function, args)
    runnable.__qualname__ = name_of(function)
    return cast(Runnable[Any], runnable)


async def call_and_wait(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call a function of any style, and wait for what it returns if that can wait."""
    result = function(*args)
    if inspect.isgenerator(result):
        return await awaitable(result)
    if not inspect.isawaitable(result):
        return result
    try:
        return await result
    finally:
        # The traceback holds this frame, and an operation its error.
        del result


@types.coroutine
def awaitable(generator: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
    """A generator, for a coroutine to await."""
    return (yield from generator)


class Beginning:
    """The beginning of a task that starts with the first transfer to it."""

    __slots__ = ("_args", "_function")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._args = args

    def begin(self, value: Any) -> Runnable[Any]:
        """The coroutine or generator that runs after a transfer of ``value``."""
        return runnable_of(self._function, (*self._args, value))
