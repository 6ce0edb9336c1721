"""
Stacks: plain functions that may wait anywhere in their calls, on greenlet.

See ``docs/stackful.md``.  ``stackful.py`` is the public module.

The function of a stackful task runs on a stack of its own, which is a greenlet.  The
task is as every other: it runs a generator, the driver, which switches to the stack.
:func:`wait` switches back, with what there is to wait for.  The driver waits for that
as any generator or coroutine would, and switches to the stack again.

The garbage collector does not see what the variables on a stack refer to.  So all that
belongs to a wait is kept by the driver, and the stack refers to nothing of it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import types
from collections.abc import Awaitable, Callable, Generator
from contextvars import copy_context
from types import CodeType, FrameType
from typing import Any, Final, NoReturn, TypeVar, cast
from weakref import ref

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from twisted_rtsig.coro.errors import Cancelled, NoTaskError
from twisted_rtsig.coro.inspection import stack_of_body
from twisted_rtsig.coro.operations import Done, Finished, Operation, Wait
from twisted_rtsig.coro.scheduler import Stacks, running, schedulers
from twisted_rtsig.coro.tasks import Task, name_of, task_of_caller
from twisted_rtsig.coro.tracebacks import log_failure

try:
    from greenlet import GreenletExit, getcurrent, greenlet
except ImportError as _error:
    raise ImportError(
        "twisted_rtsig.coro.stackful needs greenlet: "
        "pip install 'twisted-rtsig[greenlet]'"
    ) from _error

T = TypeVar("T")

_log = Logger()

_throw: Final[Callable[..., Any]] = greenlet.throw
# Its attributes are those of a Stack.
_current: Final[Callable[[], Any]] = getcurrent


class NoStackError(NoTaskError):
    """``wait`` was called where no function of a stackful task runs."""

    def __init__(self, message: str) -> None:
        RuntimeError.__init__(self, message)


class Stack(greenlet):
    """
    The stack of a function, which must not refer to it: nothing could drop it then.

    :ivar awaited: what it hands over to be waited for; before it begins, the ``_Call``;
        None while it runs; once it was dropped, how often it has tried to wait.
    :ivar task: while it runs, the task that runs it, if any does; ``_DROPPED`` once
        nothing will resume it.
    """

    __slots__ = ("awaited", "task")

    awaited: Any
    task: Any


_DROPPED: Final = object()

# After so many waits a function that was dropped is given up, which goes on whatever is
# raised.  More than one may be right: each ``finally`` block can have some.
_MOST_WAITS_TO_END: Final = 100


# A function, its arguments, the error that is being handled where it is called, and,
# unless a task has called it, a weak reference to the stack.
_Call = tuple[
    Callable[..., Any],
    tuple[Any, ...],
    dict[str, Any] | None,
    BaseException | None,
    "ref[Stack] | None",
]


def stack_of(call: _Call | None) -> Stack:
    stack = Stack(_run)
    # As an argument of the first switch it would be kept until the end.
    stack.awaited = call
    return stack


@types.coroutine
def drive(stack: Stack, in_task: bool) -> Generator[Any, Any, Any]:
    """
    Run a stack, and wait for what it hands over.

    Each variable takes memory of every task.

    :param in_task: whether this is what a task runs, so that the scheduler takes it.
    """
    # The context itself, so that each side sees what the other one sets.
    stack.gr_context = getcurrent().gr_context
    if stack.gr_context is None:
        # The first one in this thread.
        copy_context()
        stack.gr_context = getcurrent().gr_context
    value: Any = None
    awaited: Any = None
    error: BaseException | None = None
    try:
        while True:
            current = getcurrent()
            # Another one, where a task runs the tasks of another reactor.
            if stack.parent is not current:
                try:
                    stack.parent = current
                except ValueError as raised:
                    raise RuntimeError(
                        "a stackful task cannot be resumed in another thread than that "
                        "which it has begun in: start it where the reactor runs"
                    ) from raised
            del current
            stack.task = running.task
            if error is None:
                value = stack.switch(value)
            else:
                # greenlet drops the traceback that an error has.
                value = _throw(stack, type(error), error, error.__traceback__)
                error = None
            stack.task = None
            awaited = stack.awaited
            if awaited is None:
                if stack.dead:
                    return value
                # It has not called wait(): it switched to a greenlet, which has ended.
                error = RuntimeError(
                    "a greenlet has ended in the place of the function that switched "
                    "to it: make it with greenlet(run, getcurrent()) there"
                )
                continue
            stack.awaited = None
            try:
                if in_task and (
                    type(awaited) is Operation or isinstance(awaited, _KNOWN)
                ):
                    value = yield awaited
                else:
                    value = yield from _steps_of(awaited)
            except GeneratorExit:
                awaited = None
                _drop(stack)
                raise
            except GreenletExit as raised:
                # As where the function raises it itself: see _run.
                error = Cancelled(_GREENLET_EXIT)
                error.__cause__ = raised
            except BaseException as raised:
                error = raised
            awaited = None
    finally:
        # The traceback of an error holds this frame.
        del stack, value, awaited, error


# The reason of a cancellation.
_GREENLET_EXIT: Final = "it has raised GreenletExit"

# What the scheduler takes from a generator.
_KNOWN: Final = (Deferred, Task)


def _steps_of(awaited: Any) -> Any:
    """What ``yield from`` is for, to wait for something."""
    if inspect.iscoroutine(awaited) or inspect.isgenerator(awaited):
        return awaited
    return awaited.__await__()


def _drop(stack: Stack) -> None:
    """Nothing will resume it: let its functions clean up."""
    stack.task = _DROPPED
    try:
        stack.parent = getcurrent()
    except ValueError:
        # The collector runs in another thread.  When the stack goes, greenlet ends it
        # in its own one.
        return
    _throw(stack, GeneratorExit)
    if not stack.dead:
        raise RuntimeError("the function of a stackful task ignores GeneratorExit")


def _run(nothing: None) -> Any:
    """
    What a stack runs: a function, and where an error is being handled, within that.

    ``reference`` is for what looks at the frame.
    """
    stack = _current()
    call: _Call = stack.awaited
    stack.awaited = None
    function, args, kwargs, handled, reference = call  # noqa: RUF059
    del stack, call
    try:
        if kwargs:
            function = functools.partial(function, **kwargs)
        if handled is None:
            return function(*args)
        traceback = handled.__traceback__
        try:
            raise handled
        except BaseException:
            handled.__traceback__ = traceback
            del handled, traceback
            return function(*args)
    except StopIteration as error:
        raise RuntimeError(f"{name_of(function)} has raised StopIteration") from error
    except GreenletExit as error:
        # greenlet would take it for the result.
        raise Cancelled(_GREENLET_EXIT) from error
    except GeneratorExit:
        if _current().task is not _DROPPED:
            raise


@atexit.register
def _drop_all() -> None:
    """
    Let the functions that still wait when the process ends clean up.  Python does this
    for coroutines, which its garbage collector finds.
    """
    for scheduler in schedulers():
        for task in scheduler.active_tasks():
            frames = stack_of_body(task._body)
            if any(each.f_code is _OUTERMOST for each in frames):
                body: Any = task._body
                try:
                    body.close()
                except BaseException as error:
                    message = "Task {name} has failed to clean up"
                    log_failure(_log, message, error, name=task.name)


class _Stacks(Stacks):
    def frame_below(self, frame: FrameType) -> FrameType | None:
        """See ``Stacks.frame_below``."""
        if frame.f_code is not _OUTERMOST:
            return None
        reference: ref[Stack] | None = frame.f_locals["reference"]
        if reference is None:
            # That of the driver.
            body = None if running.task is None else running.task._body
            return body.gi_frame if inspect.isgenerator(body) else None
        stack = reference()
        parent = None if stack is None else stack.parent
        return None if parent is None else parent.gr_frame

    def waiting_frames(self, frame: FrameType) -> list[FrameType]:
        """See ``Stacks.waiting_frames``."""
        frames: list[FrameType] = []
        if frame.f_code is _DRIVER:
            stack: Stack | None = frame.f_locals.get("stack")
            inner = None if stack is None else stack.gr_frame
            while inner is not None:
                frames.append(inner)
                # On PyPy the frames of a greenlet form a circle.
                inner = None if inner.f_code is _OUTERMOST else inner.f_back
        return frames[::-1]


_OUTERMOST: Final[CodeType] = _run.__code__
_DRIVER: Final[CodeType] = drive.__code__

running.stacks = _Stacks()


# Waiting


def wait(awaited: Awaitable[T] | Generator[Any, Any, T]) -> T:
    """
    Wait, in a plain function of a stackful task, for what a coroutine would await.

    :param awaited: an operation, a Deferred, a task, a coroutine, or anything else that
        can be awaited; with the reactor ``rtsig-asyncio`` a future of asyncio.
    :return: its result.
    :raises NoStackError: if no function of a stackful task calls this.
    :raises TypeError: if it cannot be awaited.
    :raises Cancelled: if the task was cancelled, or a scope around this.
    """
    stack = _current()
    if type(stack) is not Stack or stack.task is not running.task:
        return cast(T, _wait_elsewhere(stack, awaited))
    kind = type(awaited)
    if kind is Done or kind is Finished:
        return cast(T, awaited.result)  # type: ignore[union-attr]
    if not (kind is Operation or kind is Wait):
        _check_awaited(awaited)
    stack.awaited = awaited
    parent: Any = stack.parent
    # The stack must not refer to itself, nor to what would resume it.
    del stack, awaited
    try:
        return cast(T, parent.switch())
    except GreenletExit:
        stack = _current()
        # Unset, as it is being deallocated.
        stack.task, stack.awaited = _DROPPED, None
        del stack
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


def check_can_wait() -> None:
    """
    Called before anything begins that would be left behind.

    :raises NoStackError: if no function of a stackful task calls this.
    """
    wait(_NO_TIME)


_NO_TIME: Final = Done()


def _check_awaited(awaited: object) -> None:
    if not (isinstance(awaited, Awaitable) or inspect.isgenerator(awaited)):
        raise TypeError(f"wait() needs what can be awaited, not {awaited!r}")


def _wait_elsewhere(stack: Any, awaited: Any) -> Any:
    """Wait on a stack that was dropped, or say that there is none."""
    if type(stack) is Stack and stack.task is _DROPPED:
        _check_awaited(awaited)
        try:
            return _without_waiting(awaited)
        except GeneratorExit:
            waits = stack.awaited = (stack.awaited or 0) + 1
            if waits > _MOST_WAITS_TO_END:
                del stack, awaited
                _leave_for_good()
            raise
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


def _leave_for_good() -> NoReturn:
    """Leave a stack whose function would never end."""
    while True:
        # greenlet still tries to end it when it goes, and says that it cannot.
        with contextlib.suppress(BaseException):
            _current().parent.switch()


def _without_waiting(awaited: Any) -> Any:
    """
    What ``awaited`` returns, if it does at once.

    :raises GeneratorExit: if not.
    """
    steps = _steps_of(awaited)
    try:
        next(steps) if hasattr(steps, "__next__") else steps.send(None)
    except StopIteration as stop:
        return stop.value
    if hasattr(steps, "close"):
        steps.close()
    raise GeneratorExit("nothing can resume this stack any more")
