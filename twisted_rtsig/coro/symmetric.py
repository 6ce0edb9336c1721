"""
Symmetric coroutines, which hand over to each other, and not back to a caller: see
``docs/symmetric.md``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar, overload

from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.runnables import Beginning, name_of
from twisted_rtsig.coro.scheduler import HANDOVER, scheduler_for
from twisted_rtsig.coro.tasks import SymmetricTask, Task
from twisted_rtsig.typing_backports import TypeVarTuple, Unpack

T = TypeVar("T")
Value = TypeVar("Value")
Args = TypeVarTuple("Args")


@overload
def symmetric(
    function: Callable[[Unpack[Args], Value], Awaitable[T]],
    *args: Unpack[Args],
    name: str | None = None,
    reactor: object = None,
) -> Task[T]: ...


@overload
def symmetric(
    function: Callable[[Unpack[Args], Value], Generator[Any, Any, T]],
    *args: Unpack[Args],
    name: str | None = None,
    reactor: object = None,
) -> Task[T]: ...


@overload
def symmetric(
    function: Callable[[Unpack[Args], Value], T],
    *args: Unpack[Args],
    name: str | None = None,
    reactor: object = None,
) -> Task[T]: ...


def symmetric(  # type: ignore[misc]
    function: Callable[..., Any],
    *args: Any,
    name: str | None = None,
    reactor: object = None,
) -> Task[Any]:
    """
    Make a coroutine that tasks can :func:`transfer` to.

    It is a task that has not begun.  The first transfer to it calls
    ``function(*args, value)``.

    When it ends, the task that was the first to transfer to it gets the control, with
    the value that it has returned, or the error that it has raised.  If that task has
    ended itself, the control goes to the task that was the first to transfer to that
    one, and so on.

    :param function: whatever :func:`spawn` takes, but no coroutine that runs.
    :param name: what it is called in logs; by default the name of the function.
    :param reactor: an ``IReactorTime`` provider; by default that of the task that
        calls this, or the installed one.
    :raises TypeError: if ``function`` cannot be called.
    """
    if not callable(function):
        raise TypeError(
            f"symmetric() needs a function, which the first transfer to it calls: "
            f"{function!r} is none"
        )
    beginning = Beginning(function, args)
    return SymmetricTask(beginning, name or name_of(function), scheduler_for(reactor))


@must_be_awaited
def transfer(target: Task[Any], value: Any = None) -> Any:
    """
    Hand over to another coroutine, and wait until a task hands over to this one::

        answer = await transfer(other, question)

    Await, or yield, it where it is called.  There is no stack of transfers: any task
    that has transferred can be the target of any other.

    :param target: what :func:`symmetric` has returned, or a task that waits in a
        ``transfer`` itself.
    :param value: what its ``transfer`` returns.
    :return: the value that is transferred to this task.
    :raises TransferError: (when awaited) if the target has ended, runs already or
        waits for something else.
    :raises NoTaskError: (when awaited) outside of a task.
    :raises TypeError: if the target is no task.
    """
    HANDOVER.target = target
    HANDOVER.value = value
    return HANDOVER
