"""
Stacks: plain functions that may wait anywhere in their calls, on greenlet.

See ``docs/stackful.md``.  ``stackful.py`` is the public module.

The function of a stackful task runs on a stack of its own, which is a greenlet.  The
task itself is like any other: it runs a generator, the driver, which switches to the
stack.  :func:`wait` switches back with an awaitable.  The driver waits for it as any
generator or coroutine would, and switches to the stack again.

The garbage collector does not see the variables on a stack.  So the driver keeps all
objects that belong to a wait, and the stack refers to none of them.
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
from twisted_rtsig.coro.runnables import name_of
from twisted_rtsig.coro.scheduler import Stacks, running, schedulers
from twisted_rtsig.coro.tasks import Task, task_of_caller
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
# Any, since the current greenlet may be a Stack, with further attributes.
_current: Final[Callable[[], Any]] = getcurrent


class NoStackError(NoTaskError):
    """``wait`` was called outside of a stackful task."""

    def __init__(self, message: str) -> None:
        RuntimeError.__init__(self, message)


class Stack(greenlet):
    """
    The stack of a function.  Its variables must not refer to it: the garbage collector
    could not free the stack then.

    :ivar awaited: the awaitable that the function waits for; before it begins, the
        ``_Call``; None while it runs; once the stack was dropped, the number of times
        that the function has tried to wait.
    :ivar task: while the function runs, the task that runs it, if there is one;
        ``_DROPPED`` once nothing will resume it.
    """

    __slots__ = ("awaited", "task")

    awaited: Any
    task: Any


_DROPPED: Final = object()

# A function may ignore the exceptions in a dropped stack, and go on.  It is abandoned
# after this many attempts to wait.  More than one attempt is legitimate: each
# ``finally`` block may wait.
_MOST_WAITS_TO_END: Final = 100


# A function, its arguments, the error that is being handled where it is called, and a
# weak reference to the stack, unless the function is the body of a task.
_Call = tuple[
    Callable[..., Any],
    tuple[Any, ...],
    dict[str, Any] | None,
    BaseException | None,
    "ref[Stack] | None",
]


def stack_of(call: _Call | None) -> Stack:
    """Return a new stack, on which ``call`` will run."""
    stack = Stack(_run)
    # greenlet would keep an argument of the first switch until the end.
    stack.awaited = call
    return stack


@types.coroutine
def drive(stack: Stack, in_task: bool) -> Generator[Any, Any, Any]:
    """
    Run a stack, and wait for the awaitables that it passes.

    Each variable here takes memory in every task.

    :param in_task: whether this is the body of a task.  Then the scheduler takes
        operations as they are.
    """
    # The stack uses the same context, not a copy: each side sees what the other sets.
    stack.gr_context = getcurrent().gr_context
    if stack.gr_context is None:
        # This thread has no context yet: copy_context() makes it.
        copy_context()
        stack.gr_context = getcurrent().gr_context
    value: Any = None
    awaited: Any = None
    error: BaseException | None = None
    try:
        while True:
            current = getcurrent()
            # Another greenlet, if a task runs the tasks of another reactor.
            if stack.parent is not current:
                try:
                    stack.parent = current
                except ValueError as raised:
                    raise RuntimeError(
                        "a stackful task cannot be resumed in another thread than the "
                        "one it has begun in: start it in the reactor's thread"
                    ) from raised
            del current
            stack.task = running.task
            if error is None:
                value = stack.switch(value)
            else:
                # Passed explicitly, since greenlet drops the traceback of the error.
                value = _throw(stack, type(error), error, error.__traceback__)
                error = None
            stack.task = None
            awaited = stack.awaited
            if awaited is None:
                if stack.dead:
                    return value
                # The switch did not come from wait(): the function has switched to a
                # greenlet, and that has ended.
                error = RuntimeError(
                    "a greenlet has ended whose parent is not the function that "
                    "switched to it: make it with greenlet(run, getcurrent()) there"
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
                # As if the function had raised it: see _run.
                error = Cancelled(_GREENLET_EXIT)
                error.__cause__ = raised
            except BaseException as raised:
                error = raised
            awaited = None
    finally:
        # The traceback of an error refers to this frame.
        del stack, value, awaited, error


# The reason of the cancellation.
_GREENLET_EXIT: Final = "it has raised GreenletExit"

# The types that the scheduler takes from a generator.
_KNOWN: Final = (Deferred, Task)


def _steps_of(awaited: Any) -> Any:
    """The iterator that ``yield from`` needs, to wait for an awaitable."""
    if inspect.iscoroutine(awaited) or inspect.isgenerator(awaited):
        return awaited
    return awaited.__await__()


def _drop(stack: Stack) -> None:
    """Let the functions on the stack clean up, since nothing will resume it."""
    stack.task = _DROPPED
    try:
        stack.parent = getcurrent()
    except ValueError:
        # The garbage collector runs in another thread.  When the stack is deallocated,
        # greenlet ends it in its own thread.
        return
    _throw(stack, GeneratorExit)
    if not stack.dead:
        raise RuntimeError("the function of a stackful task ignores GeneratorExit")


def _run(nothing: None) -> Any:
    """
    The outermost function of a stack.  If an error is being handled where the stack is
    started, the function runs while that error is handled here, too.

    ``reference`` is read from the frame: see ``_Stacks``.
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
        # greenlet would return the exception as the result.
        raise Cancelled(_GREENLET_EXIT) from error
    except GeneratorExit:
        if _current().task is not _DROPPED:
            raise


@atexit.register
def _drop_all() -> None:
    """
    When the process ends, let the functions clean up that still wait.  For coroutines
    Python does this, since its garbage collector finds them.
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
            # The frame of the driver.
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
                # Stop here: on PyPy the frames of a greenlet form a circle.
                inner = None if inner.f_code is _OUTERMOST else inner.f_back
        return frames[::-1]


_OUTERMOST: Final[CodeType] = _run.__code__
_DRIVER: Final[CodeType] = drive.__code__

running.stacks = _Stacks()


# Waiting


def wait(awaited: Awaitable[T] | Generator[Any, Any, T]) -> T:
    """
    Wait in a plain function of a stackful task, as ``await`` does in a coroutine.

    :param awaited: an operation, a Deferred, a task, a coroutine, or any other
        awaitable; with the reactor ``rtsig-asyncio`` also a future of asyncio.
    :return: the result.
    :raises NoStackError: outside of a stackful task.
    :raises TypeError: if the argument cannot be awaited.
    :raises Cancelled: if the task or a scope around the call was cancelled.
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
    # The stack must not refer to itself, nor to the operation that would resume it.
    del stack, awaited
    try:
        return cast(T, parent.switch())
    except GreenletExit:
        stack = _current()
        # The stack is being deallocated, and its attributes are unset.
        stack.task, stack.awaited = _DROPPED, None
        del stack
        raised: BaseException = GeneratorExit()
    except BaseException as error:
        if error.__context__ is not None:
            raise
        raised = error
    # Raised here, the error gets as its context the error that the caller handles.
    try:
        raise raised
    finally:
        del raised


def check_can_wait() -> None:
    """
    Check that :func:`wait` can wait here.  Called before work begins that an error of
    ``wait`` would leave behind.

    :raises NoStackError: outside of a stackful task.
    """
    wait(_NO_TIME)


_NO_TIME: Final = Done()


def _check_awaited(awaited: object) -> None:
    if not (isinstance(awaited, Awaitable) or inspect.isgenerator(awaited)):
        raise TypeError(f"wait() needs an awaitable, not {awaited!r}")


def _wait_elsewhere(stack: Any, awaited: Any) -> Any:
    """Wait on a dropped stack; or raise an error outside of a stackful task."""
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
    """Abandon a stack whose function would never end."""
    while True:
        # When the stack is deallocated, greenlet tries to end it, and reports that it
        # cannot.
        with contextlib.suppress(BaseException):
            _current().parent.switch()


def _without_waiting(awaited: Any) -> Any:
    """
    The result of ``awaited``, if it has one at once.

    :raises GeneratorExit: if it would have to wait.
    """
    steps = _steps_of(awaited)
    try:
        next(steps) if hasattr(steps, "__next__") else steps.send(None)
    except StopIteration as stop:
        return stop.value
    if hasattr(steps, "close"):
        steps.close()
    raise GeneratorExit("nothing can resume this stack any more")
