"""
Tasks: coroutines and generators that run by themselves, and wait for Deferreds.

A task steps through its function from one wait to the next; whatever it waits for
resumes it.  ``spawn`` in spawning.py starts one.  See ``docs/coroutines.md``.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import copy_context
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast
from weakref import ref

from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from twisted_rtsig.asyncio_support.deferreds import Delivery
from twisted_rtsig.coro.awaiting_asyncio import FutureWait, runs, wait_for
from twisted_rtsig.coro.errors import (
    Cancelled,
    NoTaskError,
    TransferError,
    cancellation_in,
    reason_of,
)
from twisted_rtsig.coro.operations import Operation, Wait, error_of
from twisted_rtsig.coro.runnables import Beginning, Runnable
from twisted_rtsig.coro.scheduler import (
    HANDOVER,
    RUN,
    WAITS,
    Raised,
    Scheduler,
    frame_below,
    running,
)
from twisted_rtsig.coro.tracebacks import WholeFailure, log_failure, without_machinery

if TYPE_CHECKING:
    from twisted_rtsig.coro.scopes import Scope

_log = Logger()

T = TypeVar("T")

# The states of a task: see Task._state, and Totals.tasks.
_ACTIVE = 0
_SUCCEEDED = 1
_FAILED = 2
_CANCELLED = 3

# Whether what the task waits for was cancelled for a cancellation: see
# Cancelled._requested.
_NOT = 0
_NOW = 1
_EARLIER = 2

# Tasks that are spawned within so many seconds share the time of the first one.
_BURST = 0.01


class _Failed:
    """
    Why a task has failed.  It is logged when this is collected, unless the error
    was seen before.
    """

    __slots__ = ("_error", "_name", "_seen", "_traceback")

    def __init__(self, name: str, error: BaseException) -> None:
        self._name = name
        self._error = error
        # Python adds to the traceback of the error wherever it is raised again.
        self._traceback = error.__traceback__
        self._seen = False

    def see(self) -> BaseException:
        """The error, to be raised where the task is awaited: again each time."""
        self._seen = True
        return self.error()

    def error(self) -> BaseException:
        """The error, which stays unseen."""
        return self._error.with_traceback(self._traceback)

    def __del__(self) -> None:
        if not self._seen:
            message = "Task {name} has failed"
            log_failure(_log, message, self.see(), name=self._name)


class TaskOrigin:
    """
    The attributes that tasks share if they are spawned in one burst, by the same task
    or outside of tasks, with the same name.  To share them takes less memory.

    :ivar name: of the tasks.
    :ivar kind: the class of their coroutines or generators; ``Beginning`` if they have
        not begun.
    :ivar send: the method of that class that resumes a coroutine.  A bound method would
        be one more object for each task.
    :ivar spawner: the task that has spawned them; None outside of tasks.
    :ivar since: when the first of them was spawned, in the time of ``time.monotonic``.
    """

    __slots__ = ("kind", "name", "send", "since", "spawner")

    def __init__(
        self,
        name: str,
        kind: type,
        spawner: weakref.ref[Task[Any]] | None,
        since: float,
    ) -> None:
        self.name: str = name
        self.kind: type = kind
        self.send: Callable[[Any, Any], Any] | None = getattr(kind, "send", None)
        self.spawner: weakref.ref[Task[Any]] | None = spawner
        self.since: float = since


class Task(Generic[T]):
    """
    A coroutine that runs by itself.  It can be awaited.

    Made by :func:`spawn`.
    """

    # Each attribute takes 8 bytes of every task that waits.
    __slots__ = (
        "__weakref__",
        "_body",
        "_cancels",
        "_context",
        "_done",
        "_origin",
        "_scheduler",
        "_scopes",
        "_value",
        "_waiting_on",
    )

    # While the task is ready: the value that it is resumed with, or a Raised for an
    # error.  Once it has ended: the result; a _Failed if it has failed; the reason if
    # it was cancelled.  Unset until it is ready for the first time.
    _value: Any

    # The task that was the first to transfer to this one: see SymmetricTask.
    _starter: Task[Any] | None = None

    def __init__(
        self, runnable: Runnable[T] | Beginning, name: str, scheduler: Scheduler
    ) -> None:
        self._scheduler = scheduler
        self._context: contextvars.Context | None = copy_context()
        # The timeouts, groups and shields that it is in, the outermost first.
        self._scopes: tuple[Scope, ...] = ()
        # Cancellations that were requested and not yet delivered.
        self._cancels: tuple[Cancelled, ...] = ()
        # The coroutine or generator, or how it begins; the state once it has ended.
        self._body: Runnable[T] | Beginning | int = runnable
        # What it waits for; None while it runs, or is about to.
        self._waiting_on: Deferred[Any] | Beginning | FutureWait | None = None
        # Functions to call with this task when it ends; None without any.
        self._done: Sequence[Callable[[Task[T]], object]] | None = None
        kind = type(runnable)
        if kind is Beginning:
            self._waiting_on = cast(Beginning, runnable)
        spawner = running.task
        now = monotonic()
        origin: Any = scheduler.origin
        if (
            origin is None
            or origin.name is not name
            or origin.kind is not kind
            or now - origin.since >= _BURST
            or (origin.spawner and origin.spawner()) is not spawner
        ):
            reference = None if spawner is None else ref(spawner)
            origin = scheduler.origin = TaskOrigin(name, kind, reference, now)
        self._origin: TaskOrigin = origin
        # An instrument may look at it, so that all of it has to be there.
        references = scheduler.references
        references.append(ref(self))
        if len(references) > scheduler.most_references:
            scheduler.task_added(self)

    @property
    def name(self) -> str:
        """The name of the task in logs."""
        return self._origin.name

    @name.setter
    def name(self, name: str) -> None:
        origin = self._origin
        self._origin = TaskOrigin(name, origin.kind, origin.spawner, origin.since)

    @property
    def reactor(self) -> Any:
        """The reactor that it runs on."""
        return self._scheduler.reactor

    @property
    def _state(self) -> int:
        body = self._body
        return body if type(body) is int else _ACTIVE

    # The end

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return type(self._body) is int

    @property
    def cancelled(self) -> bool:
        """Whether it has ended because it was cancelled."""
        return self._body == _CANCELLED

    @property
    def failed(self) -> bool:
        """Whether it has ended because its function has raised something."""
        return self._body == _FAILED

    def result(self) -> T:
        """
        What the function has returned.

        :raises RuntimeError: if it has not ended yet: await it before.
        :raises CancelledError: if the task was cancelled.
        :raises BaseException: whatever its function has raised.
        """
        state = self._state
        if state == _ACTIVE:
            raise RuntimeError(f"{self!r} has not ended yet: await it before")
        if state != _SUCCEEDED:
            error = self._see_error()
            try:
                raise error
            finally:
                # The traceback holds this frame, and the task the error.
                del self, error
        return cast(T, self._value)

    def as_deferred(self) -> Deferred[T]:
        """
        A new Deferred of its result.  To cancel that is to cancel the task.
        """
        deferred: OfTask[T] = OfTask(self)
        self._when_done(deferred.finish)
        return deferred

    def __await__(self) -> Generator[Deferred[T], Any, T]:
        if self._body is _SUCCEEDED:
            return cast(T, self._value)
        if type(self._body) is not int:
            ending: _Awaited[T] = _Awaited(self)
            self._when_done(ending.finish)
            # As in result().
            del self
            try:
                return cast(T, (yield ending))
            except Delivery as delivery:
                return cast(T, delivery.value)
        error = self._see_error()
        try:
            raise error
        finally:
            del self, error

    def _when_done(self, function: Callable[[Task[T]], object]) -> None:
        """Call ``function`` with this task when it has ended."""
        done = self._done
        if type(self._body) is int:
            function(self)
        elif type(done) is list:
            done.append(function)
        else:
            self._done = [*(done or ()), function]

    def _see_error(self) -> BaseException:
        """Why it has not succeeded: not to be logged, since the caller handles it."""
        if self._body == _CANCELLED:
            reason = "" if self._value is None else f": {self._value}"
            return CancelledError(f"{self.name} was cancelled{reason}")
        failed: _Failed = self._value
        return failed.see()

    def _see_failure(self) -> Failure:
        """As ``_see_error``, for a Deferred or the log."""
        return WholeFailure(self._see_error())

    def _end(self, state: int, result: Any) -> None:
        self._body = state
        self._scheduler.task_counts[state] += 1
        self._value = result
        self._context = None
        self._scopes = ()
        self._cancels = ()
        done = self._done
        if done is not None:
            self._done = None
            for function in done:
                function(self)

    def _fail(self, error: BaseException) -> None:
        self._end(_FAILED, _Failed(self.name, without_machinery(error)))

    # Cancellation

    def cancel(self, reason: str | None = None) -> None:
        """
        Raise :class:`Cancelled` where it waits, once; if it does not wait, then
        where it waits next.  What it waits for is cancelled.

        Does nothing to a task that has ended.

        :param reason: for the logs: the text of the ``Cancelled``, and a part of that
            of the ``CancelledError`` which is raised where the task is awaited.
        """
        self._cancel_for(None, reason)

    def _is_told_to_end(self) -> bool:
        """Whether it was cancelled, and has not ended yet."""
        if type(self._body) is int:
            return False
        value = self._value
        return bool(self._cancels) or (
            self._waiting_on is None
            and type(value) is Raised
            and isinstance(value.error, Cancelled)
        )

    def _cancel_for(self, scope: Scope | None, reason: str | None) -> None:
        if self._to_be_cancelled_for(scope, reason):
            self._interrupt()

    def _to_be_cancelled_for(self, scope: Scope | None, reason: str | None) -> bool:
        """Note a cancellation; return whether the task waits, and has not ended."""
        if type(self._body) is int:
            return False
        if self._waiting_on is None and type(self._value) is Raised:
            about_to_raise = self._value.error
            if isinstance(about_to_raise, Cancelled) and about_to_raise._scope is scope:
                return False
        asyncio = self._scheduler.asyncio
        if asyncio is not None:
            asyncio.note(self, reason, scope)
        elif not any(each._scope is scope for each in self._cancels):
            self._cancels += (Cancelled(reason, scope),)
        return self._waiting_on is not None

    def _cancel_to_raise(self) -> Cancelled | None:
        """The first cancellation that no shield keeps out."""
        for each in self._cancels:
            scope = each._scope
            inside = (
                self._scopes
                if scope is None
                else self._scopes[self._scopes.index(scope) + 1 :]
            )
            if not any(each.shields for each in inside):
                return each
        return None

    def _next_cancel(self) -> Cancelled | None:
        """As ``_cancel_to_raise``, and it is delivered by that."""
        cancelled = self._cancel_to_raise()
        if cancelled is not None:
            self._cancels = tuple(e for e in self._cancels if e is not cancelled)
        return cancelled

    def _interrupt(self) -> None:
        """
        Cancel what it waits for, unless a shield keeps the cancellation out.  If it
        waits for the end of another task, cancel what that task waits for, and so on.
        """
        # Tasks that wait for each other, in a chain of any length: directly, or through
        # Deferreds, which tell the next task to be cancelled.
        chain: dict[Task[Any], None] = {}
        told: list[Task[Any]] = []
        task: Task[Any] | None = self
        try:
            while task is not None:
                task = task._interrupt_one(chain, told)
                if task is None and told:
                    task = told.pop()
        finally:
            for each in chain:
                each._note_requested(_EARLIER)

    def _note_requested(self, requested: int) -> None:
        """Note in each cancellation whether what it waits for was cancelled for it."""
        for each in self._cancels:
            if requested != _EARLIER or each._requested == _NOW:
                each._requested = requested

    def _interrupt_one(
        self, chain: dict[Task[Any], None], told: list[Task[Any]]
    ) -> Task[Any] | None:
        """
        Cancel what it waits for, or return the task that it waits for.

        :param told: gets the tasks that a Deferred cancels when it is cancelled.
        """
        awaited = self._waiting_on
        if isinstance(awaited, Beginning):
            self._waiting_on = None
            self._end(_CANCELLED, self._cancels[0].reason)
            return None
        before = self._cancels
        cancelled = None if awaited is None else self._next_cancel()
        if cancelled is None or awaited is None:
            return None
        if awaited is HANDOVER:
            self._resume(None, cancelled._raised())
            return None
        if isinstance(awaited, Operation) and awaited.waiter is self:
            awaited.abandon()
            self._resume(None, cancelled._raised())
            return None
        if isinstance(awaited, FutureWait):
            self._cancels = before
            awaited.cancel(cancelled)
            return None
        # That it ends may take a while, or succeed all the same.
        task = awaited.awaited_task() if isinstance(awaited, OfTask) else None
        if self in chain or task is self or task in chain:
            # The tasks wait for each other in a circle: none of them would ever end.
            self._resume(None, cancelled._raised())
            return None
        chain[self] = None
        self._cancels = before
        self._note_requested(_NOW)
        if task is None:
            try:
                with _collecting(told, cancelled.reason):
                    awaited.cancel()
            except Exception as error:
                message = "The canceller of {deferred} has failed"
                log_failure(_log, message, error, deferred=awaited)
                if self._waiting_on is awaited:
                    # It may never fire.
                    self._next_cancel()
                    self._resume(None, cancelled._raised())
        elif task._to_be_cancelled_for(None, cancelled.reason):
            return task
        return None

    # Steps: called by the scheduler, which runs it from one to the next

    def _resume(self, value: Any, error: BaseException | None = None) -> None:
        """What it waited for has happened."""
        self._waiting_on = None
        self._scheduler.resume(self, value, error)

    def _return(self, value: T) -> None:
        """The function has returned."""
        if self._scopes:
            self._fail(held_open(self._scopes[-1]))
        else:
            self._end(_SUCCEEDED, value)

    def _raise(self, error: BaseException) -> None:
        """The function has raised something."""
        cancelled = cancellation_in(error)
        if cancelled is None:
            self._fail(error)
        elif isinstance(cancelled, Cancelled) and cancelled._scope is not None:
            self._fail(held_open(cancelled._scope))
        else:
            # The frames there hold it, in their turn.
            error.__traceback__ = cancelled.__traceback__ = None
            self._end(_CANCELLED, reason_of(cancelled))

    def _wait_for(self, awaited: Any) -> Any:
        """
        Wait for whatever it is, and return ``WAITS``; or return what to resume it with:
        the value, or a ``Raised``, if that is there.
        """
        kind = type(awaited)
        # Before isinstance(), which asks the abstract base class of Deferred.
        if kind is _Awaited and awaited._task is not None:
            awaited.waiter = self
            self._waiting_on = awaited
            if self._cancels:
                self._interrupt()
            return WAITS
        if isinstance(awaited, Deferred):
            if kind in (Operation, Wait) and awaited.called:
                result = awaited.result
                if isinstance(result, Failure):
                    return Raised(error_of(result))
                return result
        elif isinstance(awaited, Task):
            # Yielded by a generator.
            state = awaited._state
            if state == _SUCCEEDED:
                return awaited._value
            if state != _ACTIVE:
                return Raised(awaited._see_error())
            awaited = awaited.as_deferred()
        elif inspect.iscoroutine(awaited) or inspect.isgenerator(awaited):
            # As under inlineCallbacks of Twisted.
            task: Task[Any] = Task(awaited, awaited.__qualname__, self._scheduler)
            self._scheduler.resume(task, None)
            awaited = task.as_deferred()
        else:
            return self._wait_for_asyncio(awaited)
        self._waiting_on = awaited
        awaited.addBoth(self._fired, awaited)
        if self._cancels:
            self._interrupt()
        return WAITS

    def _wait_for_asyncio(self, awaited: Any) -> Any:
        try:
            wait = wait_for(self, awaited)
        except Exception as error:
            return Raised(error)
        if wait is None:
            return Raised(_not_awaitable(awaited))
        if isinstance(wait, Wait):
            wait.waiter = self
        self._waiting_on = wait
        if self._cancels:
            self._interrupt()
        return WAITS

    def _transfer(self, target: Any, value: Any) -> Any:
        """
        Let another task take over when it is its turn, and return ``WAITS``; or return
        what to resume this one with.
        """
        cancelled = self._next_cancel()
        if cancelled is not None:
            return Raised(cancelled._raised())
        if not isinstance(target, Task):
            return Raised(
                TypeError(
                    f"cannot transfer to {target!r}: give it what symmetric() returns, "
                    "or a task that waits in a transfer itself"
                )
            )
        awaited = target._waiting_on
        if isinstance(target, SymmetricTask) and isinstance(awaited, Beginning):
            self._waiting_on = HANDOVER
            target.begin(awaited, self, value)
        elif awaited is HANDOVER:
            self._waiting_on = HANDOVER
            target._resume(value)
        else:
            return Raised(
                TransferError(
                    f"cannot transfer to {target!r}, which {target._state_in_words()}: "
                    "only one that was not started yet, or has transferred itself, can "
                    "take over"
                )
            )
        return WAITS

    def _state_in_words(self) -> str:
        if self._state != _ACTIVE:
            return "has ended"
        if self._waiting_on is None:
            return "runs already"
        return f"waits for {self.waits_for()}"

    def waits_for(self) -> str | None:
        """What it waits for, in words; None if it does not wait."""
        awaited = self._waiting_on
        if awaited is None:
            return None
        if isinstance(awaited, Beginning):
            return "its first transfer"
        if awaited is HANDOVER:
            return "a transfer"
        if isinstance(awaited, Operation) and awaited.owner is not None:
            what: str = awaited.owner.waits_for(awaited)
            return what
        return repr(awaited)

    def _fired(self, result: Any, deferred: Deferred[Any]) -> Any:
        if self._waiting_on is not deferred:
            # Abandoned.
            return None if isinstance(result, Failure) else result
        requested = _NOT
        if self._cancels:
            requested = max(each._requested for each in self._cancels)
        if not isinstance(result, Failure):
            self._resume(result)
            # It may be awaited by another task as well.
            return result
        error: BaseException | None = error_of(result)
        # What fails at once fails because of it, whatever it calls that.
        if requested == _NOW or (requested and isinstance(error, CancelledError)):
            cancelled = self._next_cancel()
            if cancelled is not None:
                cancelled.__cause__ = error
                error = cancelled._raised()
        self._resume(None, error)
        return None

    def __repr__(self) -> str:
        state = ("active", "succeeded", "failed", "cancelled")[self._state]
        return f"<Task {self.name}: {state}>"


class SymmetricTask(Task[T]):
    """A task that begins with the first transfer to it: see symmetric.py."""

    __slots__ = ("_starter",)

    def __init__(self, beginning: Beginning, name: str, scheduler: Scheduler) -> None:
        self._starter: Task[Any] | None = None
        super().__init__(beginning, name, scheduler)

    def begin(self, beginning: Beginning, starter: Task[Any], value: Any) -> None:
        """``starter`` was the first task to transfer to this one."""
        self._starter = starter
        try:
            body = beginning.begin(value)
        except Exception as error:
            self._fail(error)
        else:
            self._body = body
            origin = self._origin
            self._origin = TaskOrigin(
                origin.name, type(body), origin.spawner, origin.since
            )
            self._resume(None)

    def _end(self, state: int, result: Any) -> None:
        super()._end(state, result)
        # Kept for the tasks that this one has started.  Ended tasks are skipped.
        starter = self._starter
        while starter is not None and starter.done:
            starter = starter._starter
        self._starter = starter
        if starter is not None and starter._waiting_on is HANDOVER:
            if state == _SUCCEEDED:
                starter._resume(result)
            else:
                starter._resume(None, self._see_error())


class _Collected:
    """
    The tasks that are cancelled by the Deferred that is cancelled now.

    :ivar told: these tasks; None while no task cancels a Deferred.
    :ivar reason: the reason of the cancellation.
    :ivar within: the task that ran before.  If another task runs meanwhile and cancels,
        that is a cancellation of its own.
    """

    __slots__ = ("reason", "told", "within")

    def __init__(self) -> None:
        self.told: list[Task[Any]] | None = None
        self.reason: str | None = None
        self.within: Task[Any] | None = None


_collected: Final = _Collected()


@contextlib.contextmanager
def _collecting(told: list[Task[Any]], reason: str | None) -> Iterator[None]:
    it = _collected
    before = it.told, it.reason, it.within
    it.told, it.reason, it.within = told, reason, running.task
    try:
        yield
    finally:
        it.told, it.reason, it.within = before


class OfTask(Deferred[T]):
    """Fires when a task has ended, and not before, even if it is cancelled."""

    def __init__(self, task: Task[T]) -> None:
        Deferred.__init__(self)
        # None once the task has ended: the traceback of its error leads here.
        self._task: Task[T] | None = task

    def __repr__(self) -> str:
        if self._task is None:
            return super().__repr__()
        return f"the end of {self._task!r}"

    def finish(self, task: Task[T]) -> None:
        """Fire with the result or the error of the task, which has ended."""
        self._task = None
        if task._body == _SUCCEEDED:
            self.callback(task._value)
        else:
            self.errback(task._see_failure())

    def awaited_task(self) -> Task[T] | None:
        """The task; None once this has fired."""
        return self._task

    def cancel(self) -> None:
        """See ``Deferred.cancel``."""
        task = self._task
        if task is None:
            super().cancel()
        elif _collected.told is None or _collected.within is not running.task:
            task.cancel()
        elif task._to_be_cancelled_for(None, _collected.reason):
            # To cancel it here would recurse as often as tasks and Deferreds take
            # turns in a chain.
            _collected.told.append(task)


class _Awaited(OfTask[T]):
    """
    What a coroutine yields that awaits a task: see ``Operation.takes_value``.

    :ivar waiter: the task that is resumed when the awaited one has ended, in fewer
        steps than a callback takes; None if another driver awaits it.
    """

    takes_value = True
    waiter: Task[Any] | None = None

    def finish(self, task: Task[T]) -> None:
        """See ``OfTask.finish``."""
        waiter = self.waiter
        if waiter is None:
            super().finish(task)
            return
        self._task = None
        # The task may hold this, and must not hold the waiter.
        self.waiter = None
        succeeded = task._body == _SUCCEEDED
        waiter._fired(task._value if succeeded else task._see_failure(), self)


def _not_awaitable(what: object) -> TypeError:
    return TypeError(
        f"a task cannot wait for {what!r}: await or yield a Deferred, a task or "
        "what a function of twisted_rtsig.coro has returned"
    )


def held_open(scope: object) -> RuntimeError:
    """The error of a block that an asynchronous generator has not left in time."""
    return RuntimeError(
        f"{scope!r} was still open when its task had left it: an asynchronous "
        "generator has yielded inside of it, and was not finished; take the "
        "yield out of the block, or put the block around the loop"
    )


def current_task() -> Task[Any]:
    """
    The task that calls this.

    :raises NoTaskError: if none does.
    """
    return task_of_caller("current_task()")


def task_of_caller(what: str) -> Task[Any]:
    """
    The task whose function has called ``what``.  A function under ``inlineCallbacks``
    that this function has called does not count.

    :raises NoTaskError: if there is none.
    """
    if running.task is not None:
        frame: FrameType | None = inspect.currentframe()
        while frame is not None and frame.f_globals is not vars(defer):
            if frame.f_code is RUN:
                task = running.task
                if task._scheduler.asyncio is None or runs(task):
                    return task
                break
            frame = frame_below(frame)
    raise NoTaskError(what)


def raise_if_cancelled() -> None:
    """
    Raise the cancellation of the task that runs, if one is pending: what waited for the
    task may be gone, and with it what would use the result.
    """
    cancelled = None if running.task is None else running.task._next_cancel()
    if cancelled is not None:
        raise cancelled
