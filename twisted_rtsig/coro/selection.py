"""
Waiting for the first of several things, and leaving the others as they are, or
cancelling them.

See ``docs/channels.md``.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, overload
from weakref import WeakKeyDictionary

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import (
    HOOK,
    NOTHING,
    Operation,
    error_of,
    failed,
    ignore,
)
from twisted_rtsig.coro.scheduler import cancel_call, scheduler_for
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.coro.tracebacks import drop_machinery_above, log_failure
from twisted_rtsig.coro.waiting import Entry, Waiters

if TYPE_CHECKING:
    from twisted_rtsig.coro.channels import Channel

_log = Logger()

T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
Value = TypeVar("Value", covariant=True)


class Selectable(Protocol[Value]):
    """A case of :func:`select`."""

    def poll(self) -> Value:
        """
        Take the value, if there is one.

        :return: the value; or ``NOTHING``, which the type leaves out.
        :raises Exception: if the case has failed.
        """

    def watch(self, entry: Entry) -> None:
        """Call ``entry.succeed`` or ``entry.fail`` as soon as it has a result."""

    def unwatch(self, entry: Entry) -> None:
        """Stop watching for ``entry``."""


Source: TypeAlias = (
    Selectable[T]
    | Task[T]
    | Deferred[T]
    | Callable[[], Awaitable[T]]
    | Callable[[], Generator[Any, Any, T]]
)


# Cases of one type: the case that is chosen has that type.


@overload
def select(*cases: Channel[T]) -> Operation[tuple[Channel[T], T]]: ...


@overload
def select(*cases: Task[T]) -> Operation[tuple[Task[T], T]]: ...


@overload
def select(*cases: Deferred[T]) -> Operation[tuple[Deferred[T], T]]: ...


# Cases of several types.


@overload
def select(case: Source[T], /) -> Operation[tuple[Source[T], T]]: ...


@overload
def select(
    case1: Source[T1], case2: Source[T2], /
) -> Operation[tuple[Source[T1], T1] | tuple[Source[T2], T2]]: ...


@overload
def select(
    case1: Source[T1], case2: Source[T2], case3: Source[T3], /
) -> Operation[
    tuple[Source[T1], T1] | tuple[Source[T2], T2] | tuple[Source[T3], T3]
]: ...


@overload
def select(
    case1: Source[T1], case2: Source[T2], case3: Source[T3], case4: Source[T4], /
) -> Operation[
    tuple[Source[T1], T1]
    | tuple[Source[T2], T2]
    | tuple[Source[T3], T3]
    | tuple[Source[T4], T4]
]: ...


@overload
def select(*cases: Source[T]) -> Operation[tuple[Source[T], T]]: ...


@must_be_awaited
def select(*cases: Any) -> Operation[tuple[Any, Any]]:
    """
    Wait for the first of several things::

        chosen, value = await select(requests, stop, answers.sending(answer))
        if chosen is requests:
            ...

    Exactly one case happens.  If one is ready already, select does not wait.  If
    several are ready, it chooses one at random, so that no case starves another.

    :param cases: each is one of these: a :class:`Channel`, to receive from it; the
        result of ``Channel.sending``; an :class:`Event`; a :class:`Deadline`; a
        :class:`Task` or a Deferred, which goes on if it is not chosen; or a function
        without parameters that can wait, which is called, and cancelled if it is not
        chosen.
    :return: the case that was chosen, and its value, or None if it has no value.
    :raises EndOfChannel: if the chosen case is a channel at its end; the attribute
        ``channel`` of the error is that channel.
    :raises ChannelClosed: if the chosen case sends to a channel that is closed.
    :raises ValueError: if there are no cases.
    :raises TypeError: if a case is something else; or (when awaited) if a function
        returns something that cannot be awaited.
    """
    if not cases:
        raise ValueError("select() without anything to wait for would wait for ever")
    selectables = [(each, _selectable(each)) for each in cases]
    first = random.randrange(len(cases))
    selectables = selectables[first:] + selectables[:first]
    calls: list[_CallCase] = []
    again = False
    while True:
        for case, selectable in selectables:
            if type(selectable) is _CallCase and not again:
                calls.append(selectable)
            try:
                value = selectable.poll()
            except BaseException as error:
                _cancel(calls)
                if not isinstance(error, Exception):
                    raise
                # The traceback refers to this frame, and a case to the error.
                return failed(drop_machinery_above(error))
            if value is not NOTHING:
                if calls:
                    _cancel(calls)
                done: Operation[tuple[Any, Any]] = Operation()
                done.succeed((case, value))
                return done
        if not calls or again:
            return _Selection(selectables, calls).operation
        # The functions were called in this pass, and may have made an earlier case
        # ready.  So poll all cases once more.
        again = True


class _Case:
    """A case of a :func:`select` that waits: an ``Entry``."""

    __slots__ = ("__weakref__", "_case", "called", "owner", "selectable", "value")

    def __init__(self, selection: _Selection, case: Any, selectable: Selectable[Any]):
        self.owner = selection
        self._case = case
        self.selectable = selectable
        self.called = False
        self.value: Any = None
        selectable.watch(self)

    def succeed(self, value: Any) -> None:
        """Choose this case, with its value."""
        self.owner.give_up(self)
        self.owner.operation.succeed((self._case, value))

    def settle(self, value: Any) -> None:
        """Choose this case, with its value; ``tell`` resumes the task later."""
        self.owner.give_up(self)
        self.owner.operation.settle((self._case, value))

    def tell(self) -> None:
        """Resume the task with the value that this case was settled with."""
        self.owner.operation.tell()

    def fail(self, error: BaseException) -> None:
        """Choose this case, with its error."""
        self.owner.give_up(self)
        self.owner.operation.fail(error)

    def give_up(self) -> None:
        """Stop waiting: another case was chosen."""
        self.selectable.unwatch(self)
        self.called = True


class _Selection:
    """The owner of the operation of a :func:`select` that waits."""

    def __init__(
        self, selectables: list[tuple[Any, Selectable[Any]]], calls: list[_CallCase]
    ) -> None:
        self.operation: Operation[tuple[Any, Any]] = Operation()
        self.operation.owner = self
        self._calls = calls
        self._cases = [_Case(self, *each) for each in selectables]

    def give_up(self, chosen: _Case | None) -> None:
        """
        Stop waiting for all cases.

        :param chosen: the case that was chosen, which does not wait any more; None if
            the operation is given up.
        """
        # Another case may be in the same queue, which looks at ``called`` of this one.
        if chosen is not None:
            chosen.called = True
        for case in self._cases:
            if case is not chosen:
                case.give_up()
        # The cases and this refer to each other.
        self._cases = []
        self.operation.owner = None
        # To cancel a call may run any code.  So do it last, when no case is watched.
        calls, self._calls = self._calls, []
        if chosen is not None:
            calls = [each for each in calls if each is not chosen.selectable]
        _cancel(calls)

    def forget(self, operation: Operation[Any]) -> None:
        self.give_up(None)

    def waits_for(self, operation: Operation[Any]) -> str:
        return "the first of " + ", ".join(repr(each._case) for each in self._cases)


class Deadline:
    """
    A point in time, as a case of :func:`select`.

    :param seconds: the time from now.
    :param reactor: an ``IReactorTime`` provider; by default that of the task.
    :raises ValueError: if ``seconds`` is negative.
    """

    def __init__(self, seconds: float, reactor: object = None) -> None:
        if not seconds >= 0:
            raise ValueError(f"a deadline {seconds} seconds from now: 0 is the least")
        self._reactor = scheduler_for(reactor).reactor
        self._time = self._reactor.seconds() + seconds
        self._waiters = Waiters()
        self._call: Any = None

    @property
    def remaining(self) -> float:
        """The number of seconds that are left; 0 after the deadline."""
        left: float = self._time - self._reactor.seconds()
        return max(0.0, left)

    def poll(self) -> None:
        """See ``Selectable.poll``."""
        return NOTHING if self.remaining else None  # type: ignore[return-value]

    def watch(self, entry: Entry) -> None:
        """See ``Selectable.watch``."""
        self._waiters.entries.append(entry)
        if self._call is None:
            self._call = self._reactor.callLater(self.remaining, self._pass)

    def unwatch(self, entry: Entry) -> None:
        """See ``Selectable.unwatch``."""
        self._waiters.forget(entry)
        # While _pass() runs, there is no call to cancel.
        if not self._waiters.entries and self._call is not None:
            cancel_call(self._call)
            self._call = None

    def _pass(self) -> None:
        self._call = None
        # Floating-point times do not always add up, and ``remaining`` has to be 0 now.
        self._time = self._reactor.seconds()
        while self._waiters.entries:
            self._waiters.next().succeed(None)

    def __repr__(self) -> str:
        return f"<Deadline in {self.remaining:.1f} s>"


def _selectable(case: Any) -> Selectable[Any]:
    if isinstance(case, Task):
        return _TaskCase(case)
    if isinstance(case, Deferred):
        return _DeferredCase(case)
    if not hasattr(case, "unwatch"):
        if callable(case):
            return _CallCase(case)
        raise TypeError(
            f"select() cannot wait for {case!r}: give it a Channel, what sending() "
            "returns, an Event, a Deadline, a Task, a Deferred or a function"
        )
    selectable: Selectable[Any] = case
    return selectable


class _CallCase:
    """
    The result of a function that select has called, and that it cancels if another case
    is chosen.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        # The result, to be cancelled.  None before the call, and when there is nothing
        # to cancel any more.
        self._waiting: Task[Any] | Deferred[Any] | None = None
        self._selectable: Selectable[Any] | None = None

    def poll(self) -> Any:
        if self._selectable is None:
            waiting = self._function()
            if inspect.iscoroutine(waiting) or inspect.isgenerator(waiting):
                waiting = spawn(waiting)
            if not isinstance(waiting, Task | Deferred):
                raise TypeError(
                    f"select() cannot wait for {waiting!r}, which {self._function!r} "
                    "has returned: give it a function that returns a Deferred, a "
                    "coroutine or a generator"
                )
            self._waiting = waiting
            self._selectable = _selectable(waiting)
        try:
            value = self._selectable.poll()
        except BaseException:
            self._waiting = None
            raise
        if value is not NOTHING:
            self._waiting = None
        return value

    def watch(self, entry: Entry) -> None:
        assert self._selectable is not None
        self._selectable.watch(entry)

    def unwatch(self, entry: Entry) -> None:
        assert self._selectable is not None
        self._selectable.unwatch(entry)

    def cancel(self) -> None:
        """Cancel the result: another case was chosen, or select was given up."""
        waiting, self._waiting = self._waiting, None
        if isinstance(waiting, Task):
            waiting.cancel("select() does not wait for it any more")
        elif waiting is not None:
            try:
                waiting.cancel()
            except Exception as error:
                message = "The canceller of {deferred} has failed"
                log_failure(_log, message, error, deferred=waiting)
            # CancelledError is expected; any other error is logged.
            waiting.addErrback(_ignore_cancelled)


def _cancel(calls: list[_CallCase]) -> None:
    for call in calls:
        call.cancel()


def _ignore_cancelled(failure: Failure) -> None:
    failure.trap(CancelledError)


class _TaskCase:
    """The end of a task."""

    def __init__(self, task: Task[Any]) -> None:
        self._task = task

    def poll(self) -> Any:
        return self._task.result() if self._task.done else NOTHING

    def watch(self, entry: Entry) -> None:
        hook = _hooks.get(self._task)
        if hook is None:
            hook = _hooks[self._task] = _Hook()
            self._task._when_done(hook.task_ended)
        hook.waiters.entries.append(entry)

    def unwatch(self, entry: Entry) -> None:
        _hooks[self._task].waiters.forget(entry)


class _DeferredCase:
    """The result of a Deferred."""

    def __init__(self, deferred: Deferred[Any]) -> None:
        self._deferred = deferred
        # Kept on the Deferred.  In _hooks it would keep the Deferred for ever: its
        # error has a traceback, whose frames may refer to the Deferred.
        hook: _Hook | None = vars(deferred).get(HOOK)
        if hook is None:
            hook = _Hook()
            deferred.addBoth(hook.fired)
            setattr(deferred, HOOK, hook)
        self._hook = hook

    def poll(self) -> Any:
        result = self._hook.result
        if isinstance(result, Failure):
            self._deferred.addErrback(ignore)
            raise error_of(result)
        return result

    def watch(self, entry: Entry) -> None:
        self._hook.waiters.entries.append(entry)

    def unwatch(self, entry: Entry) -> None:
        self._hook.waiters.forget(entry)


class _Hook:
    """
    One callback on a task or a Deferred, which serves any number of selects.

    :ivar result: of a Deferred: its value or failure; ``NOTHING`` until it has fired.
    """

    __slots__ = ("_settled", "result", "waiters")

    def __init__(self) -> None:
        self.result: Any = NOTHING
        self.waiters = Waiters()
        # Entries that were settled, and are told when the operation fires.
        self._settled: list[Any] = []

    def task_ended(self, task: Task[Any]) -> None:
        while self.waiters.entries:
            waiter = self.waiters.next()
            if task.failed or task.cancelled:
                waiter.fail(task._see_error())
            else:
                waiter.succeed(task._value)

    def settle(self, value: Any) -> None:
        """Settle all entries, since the operation was settled with its value."""
        while self.waiters.entries:
            entry = self.waiters.next()
            self._settled.append(entry)
            entry.settle(value)

    def fired(self, result: Any) -> Any:
        self.result = result
        settled, self._settled = self._settled, []
        for entry in settled:
            entry.tell()
        if not isinstance(result, Failure):
            while self.waiters.entries:
                self.waiters.next().succeed(result)
        elif self.waiters.entries:
            while self.waiters.entries:
                self.waiters.next().fail(error_of(result))
            # The selects have handled the error.
            return None
        return result


# The hooks of tasks that were cases of a select.
_hooks: WeakKeyDictionary[Task[Any], _Hook] = WeakKeyDictionary()
