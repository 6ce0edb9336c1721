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
from twisted_rtsig.coro.scheduler import cancel_call
from twisted_rtsig.coro.tasks import Task, scheduler_for, spawn
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
    """What :func:`select` can wait for."""

    def poll(self) -> Value:
        """
        Take what is there.

        :return: a value; or ``NOTHING``, of which type checkers need not know.
        :raises Exception: in place of a value.
        """

    def watch(self, entry: Entry) -> None:
        """Call ``entry.succeed`` or ``entry.fail`` once there is something."""

    def unwatch(self, entry: Entry) -> None:
        """Do not."""


Source: TypeAlias = (
    Selectable[T]
    | Task[T]
    | Deferred[T]
    | Callable[[], Awaitable[T]]
    | Callable[[], Generator[Any, Any, T]]
)


# Cases of one kind: the one that is chosen is of that kind.


@overload
def select(*cases: Channel[T]) -> Operation[tuple[Channel[T], T]]: ...


@overload
def select(*cases: Task[T]) -> Operation[tuple[Task[T], T]]: ...


@overload
def select(*cases: Deferred[T]) -> Operation[tuple[Deferred[T], T]]: ...


# Cases of several kinds.


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

    Exactly one of them happens.  If there is one already, nobody waits; if there
    are several, chance decides, so that each has its turn.

    :param cases: a :class:`Channel` to receive from; what ``Channel.sending``
        returns; an :class:`Event`; a :class:`Deadline`; a :class:`Task` or a
        Deferred, which goes on if it is not chosen; or a function without parameters
        that can wait, which is called, and cancelled if it is not chosen.
    :return: the one that was chosen, and its value: None of one that has none.
    :raises EndOfChannel: if a channel was chosen that is at its end: ``channel`` of
        the error is which.
    :raises ChannelClosed: if a channel was chosen to which nothing can be sent.
    :raises ValueError: if there are no cases.
    :raises TypeError: if one of them is something else; or (when awaited) if a function
        returns what cannot be waited for.
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
                # The traceback holds this frame, and a case the error.
                return failed(drop_machinery_above(error))
            if value is not NOTHING:
                if calls:
                    _cancel(calls)
                done: Operation[tuple[Any, Any]] = Operation()
                done.succeed((case, value))
                return done
        if not calls or again:
            return _Selection(selectables, calls).operation
        # A function that was called may have made happen what was looked at before.
        again = True


class _Case:
    """One of the things that a :func:`select` waits for: an ``Entry``."""

    __slots__ = ("__weakref__", "_case", "called", "owner", "selectable", "value")

    def __init__(self, selection: _Selection, case: Any, selectable: Selectable[Any]):
        self.owner = selection
        self._case = case
        self.selectable = selectable
        self.called = False
        self.value: Any = None
        selectable.watch(self)

    def succeed(self, value: Any) -> None:
        """This is the one, and this its value."""
        self.owner.give_up(self)
        self.owner.operation.succeed((self._case, value))

    def settle(self, value: Any) -> None:
        """This is the one, and ``tell`` tells of it."""
        self.owner.give_up(self)
        self.owner.operation.settle((self._case, value))

    def tell(self) -> None:
        """Tell of what it was settled with."""
        self.owner.operation.tell()

    def fail(self, error: BaseException) -> None:
        """This is the one, and it has failed."""
        self.owner.give_up(self)
        self.owner.operation.fail(error)

    def give_up(self) -> None:
        """It is another."""
        self.selectable.unwatch(self)
        self.called = True


class _Selection:
    """Owns the operation of a :func:`select` that waits."""

    def __init__(
        self, selectables: list[tuple[Any, Selectable[Any]]], calls: list[_CallCase]
    ) -> None:
        self.operation: Operation[tuple[Any, Any]] = Operation()
        self.operation.owner = self
        self._calls = calls
        self._cases = [_Case(self, *each) for each in selectables]

    def give_up(self, chosen: _Case | None) -> None:
        """Wait for none of them, of which ``chosen`` does not wait already."""
        # Another case may be in the same queue, and look at this one.
        if chosen is not None:
            chosen.called = True
        for case in self._cases:
            if case is not chosen:
                case.give_up()
        # They hold each other.
        self._cases = []
        self.operation.owner = None
        # What is cancelled may run other code: only now, when no case is watched.
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
    A point in time, for :func:`select`.

    :param seconds: how far it is from now.
    :param reactor: an ``IReactorTime`` provider; by default that of the task.
    :raises ValueError: if it is in the past.
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
        """How many seconds are left; 0 when it has passed."""
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
        # Not one that is told of it just now.
        if not self._waiters.entries and self._call is not None:
            cancel_call(self._call)
            self._call = None

    def _pass(self) -> None:
        self._call = None
        # Clocks count in fractions that do not always add up.
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
    """What a function returns, which belongs to the select that has called it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        # None before the call, and once nothing is to be cancelled.
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
        """Another case was chosen, or none."""
        waiting, self._waiting = self._waiting, None
        if isinstance(waiting, Task):
            waiting.cancel("select() does not wait for it any more")
        elif waiting is not None:
            try:
                waiting.cancel()
            except Exception as error:
                message = "The canceller of {deferred} has failed"
                log_failure(_log, message, error, deferred=waiting)
            # That it was cancelled is no news; any other error is logged.
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
        # Kept there, since an error leads back to whoever holds the Deferred: in
        # _hooks, both would stay for ever.
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
    Tells any number of selects of one end, and is told itself only once.

    :ivar result: of a Deferred: the value or the failure, once it has fired.
    """

    __slots__ = ("_settled", "result", "waiters")

    def __init__(self) -> None:
        self.result: Any = NOTHING
        self.waiters = Waiters()
        # Those that are told of the value when the operation does.
        self._settled: list[Any] = []

    def task_ended(self, task: Task[Any]) -> None:
        while self.waiters.entries:
            waiter = self.waiters.next()
            if task.failed or task.cancelled:
                waiter.fail(task._see_error())
            else:
                waiter.succeed(task._value)

    def settle(self, value: Any) -> None:
        """The operation was settled: it is too late to choose anything else."""
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
            # They have seen to it.
            return None
        return result


# Of the tasks that were selected.
_hooks: WeakKeyDictionary[Task[Any], _Hook] = WeakKeyDictionary()
