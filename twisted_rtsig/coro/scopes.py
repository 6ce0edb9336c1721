"""
Scopes: blocks of code that limit how long a task waits in them, that can be
cancelled, or that keep cancellation out.

See ``docs/coroutines.md``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.error import AlreadyCancelled

from twisted_rtsig.coro.awaiting_asyncio import enter_shield, exit_shield
from twisted_rtsig.coro.errors import Cancelled, cancellation_in
from twisted_rtsig.coro.scheduler import cancel_call, scheduler_for
from twisted_rtsig.coro.tasks import Task, held_open, task_of_caller

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

L = TypeVar("L", bound="_Limit")
C = TypeVar("C", bound="CancelScope")


class Scope:
    """
    A block of code within a task, which may cancel the code inside.

    :cvar shields: whether the block keeps out cancellation that comes from outside.
    :ivar cancelled: whether the block was cancelled as a whole.
    """

    # The name in errors.
    _name: str
    shields: bool = False
    cancelled: bool = False

    # The task; None outside of the block, since an error that the task has ended with
    # may refer to this scope.
    _task: Task[Any] | None = None
    _entered = False

    def _enter(self) -> Task[Any]:
        if self._entered:
            raise RuntimeError(f"{self!r} was entered before: make a new one")
        task = self._task = task_of_caller(self._name)
        self._entered = True
        task._scopes += (self,)
        return task

    def _exit(self) -> None:
        task = self._task
        if task is None or task._scopes[-1:] != (self,):
            raise held_open(self)
        task._scopes = task._scopes[:-1]
        if task._cancels:
            task._cancels = tuple(e for e in task._cancels if e._scope is not self)
        self._task = None

    def _cancels_at(self) -> float:
        """The time of the reactor at which the scope cancels the code inside."""
        return -math.inf if self.cancelled else math.inf

    def _has_cancelled(self) -> bool:
        """Whether the scope has cancelled the code inside."""
        return self.cancelled

    def _has_caused(self, error: BaseException) -> bool:
        """Whether the block ends because of its own cancellation."""
        cancelled = cancellation_in(error)
        if isinstance(cancelled, Cancelled):
            return cancelled._scope is self
        # Code for asyncio may replace the cancellation by another one: for example,
        # asyncio.Condition does.
        return cancelled is not None and self._was_delivered()

    def _was_delivered(self) -> bool:
        """Whether this block has cancelled the code inside, and that was delivered."""
        pending = () if self._task is None else self._task._cancels
        return self._has_cancelled() and all(e._scope is not self for e in pending)


class _Limit(Scope):
    """
    A block of code that may have a deadline.

    :ivar expired: whether the deadline has passed before the block came to its end.
    """

    # Instances set only what differs from these defaults, since there may be a limit
    # for each wait.
    expired: bool = False
    # The reason, once the limit has expired.
    _why: str | None = None
    # The seconds from the beginning of the block; None if the deadline is known.
    _seconds: float | None = None
    _deadline = math.inf
    _reactor: Any | None = None
    _call: IDelayedCall | None = None

    @property
    def deadline(self) -> float:
        """
        When the block is cancelled, in the time of the reactor, which
        :func:`current_time` returns; ``math.inf`` for never.

        Any code may set it, before the block and within it.  If it is set to a time
        that has passed, then the block is cancelled at once.

        :raises ValueError: if it is set to NaN.
        """
        if self._seconds is None:
            return self._deadline
        if self._call is not None:
            when: float = self._call.getTime()
            return when
        now: float = scheduler_for(self._reactor).reactor.seconds()
        return now + self._seconds

    @deadline.setter
    def deadline(self, when: float) -> None:
        _check_deadline(when)
        self._seconds = None
        self._deadline = when
        if self._task is not None and not (self.expired or self.cancelled):
            self._watch_deadline(self._task)

    def _cancels_at(self) -> float:
        return -math.inf if self.cancelled else self.deadline

    def _has_cancelled(self) -> bool:
        return self.cancelled or self.expired

    def _begin(self) -> None:
        task = self._enter()
        seconds = self._seconds
        if not seconds:
            if seconds is None:
                self._watch_deadline(task)
            else:
                self._expire()
        else:
            reactor = self._reactor or task.reactor
            self._call = reactor.callLater(seconds, self._expire)

    def _watch_deadline(self, task: Task[Any]) -> None:
        if self._deadline == math.inf:
            self._forget_call()
            return
        reactor = self._reactor or task.reactor
        left = self._deadline - reactor.seconds()
        if left <= 0:
            self._forget_call()
            self._expire()
        elif self._call is not None and self._call.active():
            self._call.reset(left)
        else:
            self._call = reactor.callLater(left, self._expire)

    def _forget_call(self) -> None:
        cancel_call(self._call)
        self._call = None

    def _expire(self) -> None:
        why = self._why = self._why_expired()
        self._deadline = self.deadline
        # The call refers to this scope.
        self._seconds = self._call = None
        self.expired = True
        assert self._task is not None
        self._task._cancel_for(self, why)

    def _why_expired(self) -> str:
        if self._seconds is None:
            return "the deadline has passed"
        return f"it took more than {self._seconds} s"

    def _finish(self, error: BaseException | None) -> bool:
        """End the block; return whether it ends because of its own cancellation."""
        if self._call is not None:
            try:
                self._call.cancel()
            except AlreadyCancelled:
                # trial cancels all delayed calls at the end of a test.
                self._call = None
        own = error is not None and self._has_caused(error)
        self._exit()
        if error is None:
            # The block came to its end in spite of the cancellation.
            self.expired = False
        return own

    def _what(self) -> str:
        if self._seconds is not None:
            return f"{self._name} of {self._seconds} s"
        if self._deadline == math.inf:
            return f"{self._name} without a limit"
        return f"{self._name} until {self._deadline}"

    def __repr__(self) -> str:
        return f"<{self._what()}>"


class timeout(_Limit):
    """
    Limit how long a block of code takes::

        with timeout(5):
            line = await stream.read_line()

    If it takes longer, then the operation that it waits for is cancelled, and the block
    raises ``TimeoutError``.  Of nested timeouts, each raises only its own error.

    :param seconds: the limit, from the beginning of the block; None for no limit.  With
        0 the block is cancelled where it first has to wait.
    :param reactor: an ``IReactorTime`` provider; by default the reactor of the task.
    :raises ValueError: if the time is negative.
    :raises NoTaskError: at the beginning of the block, outside of a task.
    :ivar expired: whether the time was up before the block had come to its end.
    """

    _name = "timeout"

    def __init__(self, seconds: float | None, reactor: Any | None = None) -> None:
        self._seconds = _checked_seconds(seconds)
        if reactor is not None:
            self._reactor = reactor

    def __enter__(self: L) -> L:
        self._begin()
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> None:
        if self._finish(error):
            raise TimeoutError(self._why) from error


class timeout_at(timeout):
    """
    As :class:`timeout`, up to a point in time::

        with timeout_at(current_time() + 5):
            line = await stream.read_line()

    :param deadline: in the time of the reactor; ``math.inf`` or None for no limit.
    :param reactor: as for :class:`timeout`.
    :raises ValueError: if the deadline is NaN.
    """

    _name = "timeout_at"

    def __init__(self, deadline: float | None, reactor: Any | None = None) -> None:
        super().__init__(None, reactor)
        self._deadline = _checked_deadline(deadline)


class CancelScope(_Limit):
    """
    A block of code that can be cancelled, by its deadline or by :meth:`cancel`, and
    is then left without an error::

        with CancelScope() as scope:
            on_key_press(scope.cancel)
            await play(song)

    :param deadline: in the time of the reactor; ``math.inf`` or None for no limit.
    :param reactor: as for :class:`timeout`.
    :raises ValueError: if the deadline is NaN.
    :raises NoTaskError: at the beginning of the block, outside of a task.
    :ivar expired: as of :class:`timeout`.
    :ivar cancelled: whether :meth:`cancel` was called before the block had come to its
        end, and before its deadline.
    """

    cancelled: bool

    _name = "CancelScope"
    _reason: str | None = None

    def __init__(
        self, *, deadline: float | None = None, reactor: Any | None = None
    ) -> None:
        self._deadline = _checked_deadline(deadline)
        self._reactor = reactor

    def cancel(self, reason: str | None = None) -> None:
        """
        Cancel the code in the block, and leave the block.  Before the block begins,
        this cancels what it will first wait for.  Any code may call this; only the
        first call counts.

        :param reason: as of :meth:`Task.cancel`.
        """
        if self.cancelled or self.expired or (self._entered and self._task is None):
            return
        self.cancelled = True
        self._reason = reason
        if self._task is not None:
            self._forget_call()
            self._task._cancel_for(self, reason)

    def __enter__(self: C) -> C:
        if self.cancelled:
            self._enter()._cancel_for(self, self._reason)
        else:
            self._begin()
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> bool:
        if error is None:
            self.cancelled = False
        return self._finish(error)


class move_on_after(CancelScope):
    """
    As :class:`timeout`, but leave the block without an error::

        with move_on_after(5) as limit:
            line = await stream.read_line()
        if limit.expired:
            line = b"nothing"

    :param seconds: as for :class:`timeout`.
    :param reactor: as for :class:`timeout`.
    :raises ValueError: if the time is negative.
    """

    _name = "move_on_after"

    def __init__(self, seconds: float | None, reactor: Any | None = None) -> None:
        super().__init__(reactor=reactor)
        self._seconds = _checked_seconds(seconds)


class move_on_at(CancelScope):
    """
    As :class:`move_on_after`, up to a point in time.

    :param deadline: as for :class:`timeout_at`.
    :param reactor: as for :class:`timeout`.
    :raises ValueError: if the deadline is NaN.
    """

    _name = "move_on_at"

    def __init__(self, deadline: float | None, reactor: Any | None = None) -> None:
        super().__init__(deadline=deadline, reactor=reactor)


def _checked_seconds(seconds: float | None) -> float | None:
    if seconds is None or seconds == math.inf:
        return None
    if not seconds >= 0:
        raise ValueError(f"cannot time out after {seconds} seconds: 0 is the least")
    return seconds


def _checked_deadline(deadline: float | None) -> float:
    if deadline is None:
        return math.inf
    _check_deadline(deadline)
    return deadline


def _check_deadline(deadline: float) -> None:
    if math.isnan(deadline):
        raise ValueError("a deadline that is not a number: use math.inf for no limit")


class shield(Scope):
    """
    Keep cancellation that comes from outside of a block of code out of the block::

        with shield():
            await stream.write(b"QUIT\\r\\n")

    The task is cancelled where it waits next after the block.  A :class:`timeout`
    inside of the block works as usual.

    :raises NoTaskError: at the beginning of the block, outside of a task.
    """

    _name = "shield"
    shields = True

    def __enter__(self) -> shield:
        task = self._enter()
        if task._scheduler.asyncio is not None:
            enter_shield(task, self)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        task = self._task
        self._exit()
        if task is not None and task._scheduler.asyncio is not None:
            exit_shield(task, self)

    def __repr__(self) -> str:
        return "<shield>"


def current_deadline() -> float:
    """
    The deadline of the code that calls this, in the time of the reactor: the earliest
    deadline of the blocks around it, up to the innermost :class:`shield`.

    In a task of a group, the blocks around the group count as well.

    :return: ``math.inf`` without a deadline; ``-math.inf`` if the caller is cancelled
        already.
    :raises NoTaskError: outside of a task.
    """
    task: Task[Any] | None = task_of_caller("current_deadline()")
    assert task is not None
    if task._cancel_to_raise() is not None:
        return -math.inf
    scopes = task._scopes
    earliest = math.inf
    while task is not None:
        for scope in reversed(scopes):
            earliest = min(earliest, scope._cancels_at())
            if scope.shields:
                return earliest
        group = _group_of(task)
        task = None if group is None else group._task
        if task is not None:
            scopes = task._scopes[: task._scopes.index(group) + 1]
    return earliest


def _group_of(task: Task[Any]) -> Scope | None:
    """The group that a task belongs to."""
    # Found by the method that the task calls at its end: an attribute for the group
    # would take memory in every task.
    owners = (getattr(each, "__self__", None) for each in task._done or ())
    return next((each for each in owners if isinstance(each, Scope)), None)
