"""
Scopes: blocks of code that limit how long a task waits in them, or that keep
cancellation out.

See ``docs/coroutines.md``.
"""

from __future__ import annotations

from typing import Any

from twisted_rtsig.coro.errors import Cancelled
from twisted_rtsig.coro.tasks import Task, held_open, task_of_caller


class Scope:
    """
    A block of code that a task is in, which may cancel what is inside of it.

    :cvar shields: whether the block keeps out cancellation that comes from outside.
    """

    shields = False

    def __init__(self) -> None:
        # The task, within the block: a task may end with an error that leads here.
        self._task: Task[Any] | None = None
        self._entered = False

    def _enter(self, what: str) -> Task[Any]:
        if self._entered:
            raise RuntimeError(f"{self!r} was entered before: make a new one")
        task = self._task = task_of_caller(what)
        self._entered = True
        task._scopes += (self,)
        return task

    def _exit(self) -> None:
        task = self._task
        if task is None or task._scopes[-1:] != (self,):
            raise held_open(self)
        task._scopes = task._scopes[:-1]
        if task._cancels:
            task._cancels = tuple(each for each in task._cancels if each is not self)
        self._task = None


class timeout(Scope):
    """
    Let a block of code take only so long::

        with timeout(5):
            line = await stream.read_line()

    If it takes longer, then what it waits for is cancelled, and the block raises
    ``TimeoutError``.  Of nested ones, each raises only its own.

    :param seconds: how long, from the beginning of the block.
    :param reactor: an ``IReactorTime`` provider; by default that of the task.
    :raises ValueError: if the time is negative.
    :raises NoTaskError: at the beginning of the block, outside of a task.
    :ivar expired: whether the time was over before the block was.
    """

    def __init__(self, seconds: float, reactor: Any | None = None) -> None:
        super().__init__()
        if not seconds >= 0:
            raise ValueError(f"cannot time out after {seconds} seconds: 0 is the least")
        self.expired = False
        self._seconds = seconds
        self._reactor = reactor
        self._call: Any = None

    def __enter__(self) -> timeout:
        task = self._enter("timeout")
        reactor = self._reactor or task.reactor
        self._call = reactor.callLater(self._seconds, self._expire)
        return self

    def _expire(self) -> None:
        self._call = None
        self.expired = True
        assert self._task is not None
        self._task._cancel_for(self)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._call is not None:
            self._call.cancel()
        self._exit()
        if isinstance(error, Cancelled) and error._scope is self:
            raise TimeoutError(f"it took more than {self._seconds} s") from error

    def __repr__(self) -> str:
        return f"<timeout of {self._seconds} s>"


class shield(Scope):
    """
    Let nothing outside of a block of code cancel what is inside::

        with shield():
            await stream.write(b"QUIT\r\n")

    It is cancelled where it waits next after the block.  A C{timeout} inside of
    the block does what it always does.

    :raises NoTaskError: at the beginning of the block, outside of a task.
    """

    shields = True

    def __enter__(self) -> shield:
        self._enter("shield")
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._exit()

    def __repr__(self) -> str:
        return "<shield>"
