"""
The scheduler: who is resumed next, and in which turn of the reactor.

A task that is resumed from outside (by data that has arrived, say) runs at once.
One that is resumed by another task waits in a queue until that one waits itself,
so that nothing recurses however long a chain of tasks is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from twisted_rtsig.coro.tasks import Task

# How many tasks run in a row before the reactor gets a turn.
STEPS_IN_A_TURN = 500

_Step = tuple["Task[Any]", Any, "BaseException | None"]


class Scheduler:
    """
    Resumes the tasks of one reactor.

    :ivar reactor: an ``IReactorTime`` provider, for what lies in the future.
    """

    __slots__ = ("__weakref__", "_next_turn", "_ready", "_running", "reactor")

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self._ready: deque[_Step] = deque()
        self._next_turn: list[Callable[[], object]] = []
        self._running = False

    def resume(
        self, task: Task[Any], value: Any, error: BaseException | None = None
    ) -> None:
        """Run a task until it waits again: now, or after those that are ready."""
        if self._running:
            self._ready.append((task, value, error))
            return
        self._running = True
        try:
            task._step(value, error)
            if self._ready:
                self._run_ready()
        finally:
            self._running = False

    def next_turn(self, function: Callable[[], object]) -> None:
        """Call C{function} when the reactor has had a turn."""
        if not self._next_turn:
            self.reactor.callLater(0, self._turn)
        self._next_turn.append(function)

    def _run_ready(self) -> None:
        ready = self._ready
        for _ in range(STEPS_IN_A_TURN):
            task, value, error = ready.popleft()
            task._step(value, error)
            if not ready:
                return
        self.next_turn(self._nothing)

    def _nothing(self) -> None:
        """The turn itself runs who is ready."""

    def _turn(self) -> None:
        functions, self._next_turn = self._next_turn, []
        self._running = True
        try:
            # Each of them resumes tasks, which come after who is ready already.
            for function in functions:
                function()
            if self._ready:
                self._run_ready()
        finally:
            self._running = False


# By id of the reactor, which stays what it is as long as its scheduler lives.
_schedulers: WeakValueDictionary[int, Scheduler] = WeakValueDictionary()


def scheduler_of(reactor: Any | None) -> Scheduler:
    """The scheduler of a reactor, by default of the one that is installed."""
    if reactor is None:
        from twisted.internet import reactor
    scheduler = _schedulers.get(id(reactor))
    if scheduler is None:
        scheduler = _schedulers[id(reactor)] = Scheduler(reactor)
    return scheduler
