"""
Tasks in plain functions, which may wait anywhere in their calls, on greenlet.

See ``docs/stackful.md``.  Needs the extra C{[greenlet]}; nothing else of this package
imports this module.

The function of such a task runs on a stack of its own, in a greenlet.  To its task this
stack is what a coroutine is to other tasks: the scheduler sends values to it and throws
errors into it, and it hands over what it waits for.  So such a task has all that other
tasks have, and a wait takes one switch to the scheduler and one back.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import (
    AsyncIterable,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
)
from contextlib import AbstractAsyncContextManager
from contextvars import Context, copy_context
from types import CodeType, FrameType
from typing import Any, Final, ParamSpec, TypeVar, cast
from weakref import ref

from twisted.internet.defer import Deferred

from twisted_rtsig.coro.errors import Cancelled, NoTaskError
from twisted_rtsig.coro.operations import Done, Finished, Operation, Wait
from twisted_rtsig.coro.scheduler import running
from twisted_rtsig.coro.tasks import (
    Task,
    awaitable,
    name_of,
    scheduler_for,
    task_of_caller,
)

try:
    from greenlet import GreenletExit, getcurrent, greenlet
except ImportError as error:
    raise ImportError(
        "twisted_rtsig.coro.stackful needs greenlet: "
        "pip install 'twisted-rtsig[greenlet]'"
    ) from error

if sys.version_info >= (3, 11):
    from typing import TypeVarTuple, Unpack
else:
    from typing_extensions import TypeVarTuple, Unpack

T = TypeVar("T")
P = ParamSpec("P")
Args = TypeVarTuple("Args")

_throw: Final[Callable[..., Any]] = greenlet.throw
# Its attributes are those of a Stack.
_current: Final[Callable[[], Any]] = getcurrent


class NoStackError(NoTaskError):
    """C{wait} was called where no function of a stackful task runs."""

    def __init__(self, message: str) -> None:
        RuntimeError.__init__(self, message)


# Starting


def spawn_stackful(
    function: Callable[[Unpack[Args]], T],
    *args: Unpack[Args],
    name: str | None = None,
    reactor: object = None,
) -> Task[T]:
    """
    Run a plain function, C{function(*args)}, as a task: in it, and in all that it
    calls, :func:`wait` waits.

    It begins as one that :func:`spawn` starts.

    :param name: what it is called in logs; by default the name of the function.
    :param reactor: an ``IReactorTime`` provider, ``task.Clock`` for example; by
        default that of the task that calls this, or the installed one.
    :raises TypeError: if it is no plain function.
    """
    _check(function, "spawn_stackful()", "spawn()")
    scheduler = scheduler_for(reactor)
    stack: Any = Stack(_run)
    task: Task[T] = Task(stack, name or name_of(function), scheduler)
    stack.gr_context = _context_of(task)
    scheduler.resume(task, (function, args))
    return task


def in_stackful(
    function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, T]:
    """
    Run a plain function in the task of the coroutine that awaits this: in it, and in
    all that it calls, :func:`wait` waits.

    :return: a coroutine, of what the function returns.
    :raises TypeError: if it is no plain function.
    """
    _check(function, "in_stackful()", "await")
    coroutine: Any = _await_stack(function, args, kwargs)
    coroutine.__qualname__ = name_of(function)
    return cast(Coroutine[Any, Any, T], coroutine)


# Its coroutine has a better name than a task could give it.
in_stackful.coroutine_function = in_stackful  # type: ignore[attr-defined]


async def _await_stack(
    function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> T:
    stack = InnerStack(_run_inner)
    # The context itself, so that each side sees what the other one sets.
    copy_context()
    stack.gr_context = _current().gr_context
    stack.call = (function, args, kwargs, sys.exc_info()[1], ref(stack))
    del function, args, kwargs
    result: T = await stack
    return result


def _check(function: object, what: str, instead: str) -> None:
    code = getattr(function, "__code__", None)
    if type(code) is CodeType and not code.co_flags & _NOT_PLAIN:
        return
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(
            f"{what} is for plain functions, and {function!r} is none: use {instead}"
        )
    if not callable(function):
        raise TypeError(f"{what} needs a function and its arguments, not {function!r}")


_NOT_PLAIN: Final = inspect.CO_COROUTINE | inspect.CO_GENERATOR


def _context_of(task: Task[Any]) -> Context | None:
    """That of a task, whose steps asyncio or an instrument may see."""
    context: Any = task._context
    while context is not None and type(context) is not Context:
        context = context.context
    found: Context | None = context
    return found


# Stacks


class Stack(greenlet):
    """
    The stack of a function: to a task what a coroutine is.

    It must not be referred to by what is on it, or nothing could ever drop it.

    :ivar awaited: what it waits for, which it hands over.  As an argument of a switch
        it would be kept on the stack.
    """

    # Unset until they are needed, since to set them takes a part of the time that it
    # takes to spawn a task.
    __slots__ = ("_coroutine", "_dropped", "awaited")

    awaited: Any

    @property
    def coroutine(self) -> Coroutine[Any, Any, Any] | None:
        """The coroutine on this stack that waits; None if a function does."""
        return getattr(self, "_coroutine", None)

    @coroutine.setter
    def coroutine(self, coroutine: Coroutine[Any, Any, Any] | None) -> None:
        self._coroutine = coroutine

    @property
    def dropped(self) -> bool:
        """Whether nothing will ever resume it."""
        return getattr(self, "_dropped", False)

    def drop(self) -> None:
        """Nothing will ever resume it: its functions are only to clean up."""
        self._dropped = True

    def send(self, value: Any) -> Any:
        """
        Resume it, until it waits; return what it waits for.

        :raises StopIteration: if its function has returned.
        """
        current = _current()
        # Another one, where a task runs the tasks of another reactor.
        if self.parent is not current:
            self.parent = current
        try:
            self.switch(value)
            awaited, self.awaited = self.awaited, None
            return awaited
        finally:
            del self, value, current

    def throw(self, error: BaseException) -> Any:  # type: ignore[override]
        """As C{send}, with an error that is raised where it waits."""
        current = _current()
        if self.parent is not current:
            self.parent = current
        try:
            # greenlet drops the traceback that an error has.
            _throw(self, type(error), error, error.__traceback__)
            awaited, self.awaited = self.awaited, None
            return awaited
        finally:
            del self, error, current

    def waiting_frames(self) -> list[FrameType]:
        """Its frames while it waits, from the outermost on."""
        frames = []
        frame: FrameType | None = self.gr_frame
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        return frames[::-1]


class InnerStack(Stack):
    """
    The stack of a function that a coroutine waits for: also an iterator, as what
    C{__await__} returns.

    :ivar call: the function and its arguments; None once it has begun.
    :ivar task: the task that runs, while this does.
    """

    __slots__ = ("call", "task")

    call: tuple[Any, ...] | None
    task: Task[Any] | None

    def __await__(self) -> Generator[Any, Any, Any]:
        return self  # type: ignore[return-value]

    def __iter__(self) -> InnerStack:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        """See C{Stack.send}."""
        if self.call is not None:
            value, self.call = self.call, None
        self.task = running.task
        try:
            return super().send(value)
        finally:
            self.task = None
            del self, value

    def throw(self, error: BaseException) -> Any:  # type: ignore[override]
        """See C{Stack.throw}."""
        self.task = running.task
        try:
            return super().throw(error)
        finally:
            self.task = None
            del self, error

    def close(self) -> None:
        """Nothing waits for it any more: let the function clean up."""
        self.drop()
        if self:
            with contextlib.suppress(GeneratorExit, StopIteration):
                self.throw(GeneratorExit())


def _run(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    """What the stack of a task runs: a function with its arguments."""
    function, args = call
    try:
        result = function(*args)
    except BaseException as error:
        _end(error, function)
    else:
        raise StopIteration(result)


def _run_inner(call: Any) -> None:
    """
    As C{_run}, where an error is being handled, or none.

    C{stack} is for what looks at the frame.
    """
    function, args, kwargs, handled, stack = call  # noqa: RUF059
    try:
        if handled is None:
            result = function(*args, **kwargs)
        else:
            traceback = handled.__traceback__
            try:
                raise handled
            except BaseException:
                handled.__traceback__ = traceback
                del handled, traceback
                result = function(*args, **kwargs)
    except BaseException as error:
        _end(error, function)
    else:
        raise StopIteration(result)


def _end(error: BaseException, function: object) -> None:
    """The function has raised something: let the task have it."""
    try:
        if isinstance(error, GeneratorExit) and _current().dropped:
            return
        if isinstance(error, StopIteration):
            message = f"{name_of(function)} has raised StopIteration"
            raise RuntimeError(message) from error
        if isinstance(error, GreenletExit):
            # greenlet would take it for the result.
            raise Cancelled("it has raised GreenletExit") from error
        raise error
    finally:
        del error


def _frame_below(frame: FrameType) -> FrameType | None:
    """The frame that a stack was resumed from, whose outermost frame is C{frame}."""
    stack: Any = None
    if frame.f_code is _OUTERMOST:
        stack = None if running.task is None else running.task._body
    elif frame.f_code is _OUTERMOST_OF_INNER:
        stack = frame.f_locals["stack"]()
    if not isinstance(stack, Stack) or stack.dropped or stack.parent is None:
        return None
    return stack.parent.gr_frame


_OUTERMOST: Final[CodeType] = _run.__code__
_OUTERMOST_OF_INNER: Final[CodeType] = _run_inner.__code__

running.frame_below = _frame_below


# Waiting


def wait(awaited: Awaitable[T] | Generator[Any, Any, T]) -> T:
    """
    Wait, in a plain function of a stackful task, for what a coroutine would await.

    :param awaited: an operation, a Deferred, a task, a coroutine, or anything else that
        can be awaited; with the reactor C{rtsig-asyncio} a future of asyncio.
    :return: its result.
    :raises NoStackError: if no function of a stackful task calls this.
    :raises TypeError: if it cannot be awaited.
    :raises Cancelled: if the task was cancelled, or a scope around this.
    """
    stack = _current()
    task: Any = running.task
    kind = type(awaited)
    if task is None or not (
        task._body is stack or (type(stack) is InnerStack and _is_direct(stack, task))
    ):
        del task
        return cast(T, _wait_in_steps(stack, awaited))
    if kind is Done or kind is Finished:
        return cast(T, awaited.result)  # type: ignore[union-attr]
    if not (kind is Operation or kind is Wait or isinstance(awaited, Deferred)):
        del task
        return cast(T, _wait_in_steps(stack, awaited))
    stack.awaited = awaited
    switch: Callable[[], T] = stack.parent.switch
    # While it waits, the stack must not refer to itself, nor to what would resume it.
    del stack, task, awaited
    try:
        return switch()
    except GreenletExit:
        _current().drop()
        raised: BaseException = GeneratorExit()
    except BaseException as error:
        if error.__context__ is not None:
            raise
        raised = error
    # Here its context becomes what the caller handles.
    try:
        raise raised
    finally:
        del raised


def _is_direct(stack: InnerStack, task: Task[Any]) -> bool:
    """
    Whether what a stack hands over is given to the scheduler; or to Twisted's driver of
    coroutines, which takes Deferreds as well.
    """
    return stack.task is task and task._scheduler.asyncio is None


@contextlib.contextmanager
def entering(manager: AbstractAsyncContextManager[T, bool | None]) -> Iterator[T]:
    """
    What is for C{async with}, for C{with} in a plain function of a stackful task::

        with entering(TaskGroup()) as group:
            group.spawn(in_stackful, serve, first)
    """
    # Looked up as by C{async with}, which leaves nothing if it could not enter.
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
    What is for C{async for}, for C{for} in a plain function of a stackful task::

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


def _wait_in_steps(stack: Any, awaited: Any) -> Any:
    """Drive a coroutine on this stack, and wait for what it waits for."""
    _check_stack(stack)
    coroutine: Any = _coroutine_of(awaited)
    del stack, awaited
    step = coroutine.send
    value: Any = None
    try:
        while True:
            try:
                value = step(value)
            except StopIteration as stop:
                return stop.value
            except BaseException as error:
                if error.__context__ is not None:
                    raise
                value = error
                break
            try:
                value = _hand_over(value, coroutine)
                step = coroutine.send
            except BaseException as error:
                value = error
                step = coroutine.throw
        # Here its context becomes what the caller handles.
        raise value
    finally:
        # The traceback of an error holds this frame.
        del coroutine, step, value


def _hand_over(awaited: Any, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Wait for what a coroutine on this stack has yielded."""
    stack = _current()
    if stack.dropped:
        raise GeneratorExit("nothing can resume this stack any more")
    stack.awaited = awaited
    stack.coroutine = coroutine
    switch = stack.parent.switch
    del stack, awaited, coroutine
    try:
        return switch()
    except GreenletExit:
        _current().drop()
        raise GeneratorExit from None
    finally:
        _current().coroutine = None


def _coroutine_of(awaited: Any) -> Coroutine[Any, Any, Any]:
    if inspect.iscoroutine(awaited):
        return awaited
    if inspect.isgenerator(awaited):
        return _await(awaitable(awaited))
    if not isinstance(awaited, Awaitable):
        raise TypeError(f"wait() needs what can be awaited, not {awaited!r}")
    return _await(awaited)


async def _await(awaited: Awaitable[T]) -> T:
    try:
        return await awaited
    finally:
        # The traceback of an error holds this frame.
        del awaited


def _check_stack(stack: Any) -> None:
    """
    Look whether the current greenlet is the stack of the task that runs, and that
    something will resume it.
    """
    task = running.task
    if isinstance(stack, Stack):
        if task is not None and task._body is stack:
            return
        # It can do all that need not wait.
        if stack.dropped:
            return
        # Not where a task on this stack runs the tasks of another reactor.
        if isinstance(stack, InnerStack) and stack.task is task:
            return
    try:
        task = task_of_caller("wait()")
    except NoTaskError:
        raise NoStackError(
            "wait() works only in a stackful task: run the function that calls it with "
            "spawn_stackful(), or in a coroutine with await in_stackful()"
        ) from None
    raise NoStackError(
        f"wait() cannot wait in {task!r}, which is a coroutine: write await (in a "
        "generator yield), or run the function that calls wait() with "
        "await in_stackful()"
    )
