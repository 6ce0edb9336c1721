"""The stop of a server: what becomes of the connections and handlers that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from twisted.logger import Logger

from twisted_rtsig.coro.errors import Cancelled
from twisted_rtsig.coro.inspection import describe_first
from twisted_rtsig.coro.scopes import shield, timeout
from twisted_rtsig.coro.sleeping import sleep
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.tasks import OfTask, Task, current_task

if TYPE_CHECKING:
    from twisted_rtsig.coro.factories import CoroutineFactory

_log = Logger()

GRACE: Final = 10.0
"""How many seconds handlers have to finish when a server stops, by default."""

CANCEL_TIMEOUT: Final = 10.0
"""How many seconds cancelled handlers have to end when a server stops, by default."""

# How many turns of the reactor handlers have to end once their transports are aborted.
_LAST_TURNS: Final = 10


class Stopped(NamedTuple):
    """
    How the handlers that ran when a server began to stop have ended.

    :ivar finished: how many ended by themselves, within the grace.
    :ivar cancelled: how many were cancelled after the grace, and have ended.
    :ivar abandoned: how many were cancelled, and have not ended.
    """

    finished: int
    cancelled: int
    abandoned: int


def check_stop_times(grace: float, cancel_timeout: float) -> None:
    """:raises ValueError: if one of the times is less than 0."""
    for name, seconds in (("grace", grace), ("cancel_timeout", cancel_timeout)):
        if not seconds >= 0:
            raise ValueError(f"{name}={seconds}: 0 is the least")


class Stop:
    """
    One stop of a factory: see :meth:`CoroutineFactory.stop`.

    :raises ValueError: if one of the times is less than 0.
    """

    def __init__(
        self, factory: CoroutineFactory, grace: float, cancel_timeout: float
    ) -> None:
        check_stop_times(grace, cancel_timeout)
        self._factory = factory
        self._grace = grace
        self._cancel_timeout = cancel_timeout
        # The connections whose handlers ran when this began.
        self._running = [each for each in factory.connections if each.unended_handler]

    async def run(self) -> Stopped:
        """Wait for the handlers, cancel them, and abort their connections."""
        factory = self._factory
        why = f"the server stops, and its grace of {self._grace} s is over"
        cancelled: Cancelled | None = None
        try:
            try:
                gone = await self._all_gone_within(self._grace)
            except Cancelled as error:
                gone, cancelled = not factory.connections, error
                why = "the server stops, and does not wait any longer"
            if not gone:
                for protocol in list(factory.connections):
                    protocol.cancel(why)
                ending = self._end_cancelled()
                cancelled = cancelled or current_task()._next_cancel()
                if cancelled is not None and self._is_awaited_by_handler():
                    # That handler can end only when this stop has ended.  So the rest
                    # of the stop goes on in another task.
                    spawn(ending, name=current_task().name)
                    raise cancelled
                await ending
            factory.stopped.set()
            if cancelled is not None:
                raise cancelled
        finally:
            # The traceback of the error holds this frame.
            del cancelled
        running = self._running
        abandoned = sum(each.unended_handler is not None for each in running)
        late = sum(each.stopped for each in running)
        return Stopped(len(running) - late, late - abandoned, abandoned)

    async def _end_cancelled(self) -> None:
        """The handlers were cancelled: wait for them, and log those that are left."""
        try:
            gone = await self._all_gone_within(self._cancel_timeout)
        except Cancelled:
            with shield():
                await self._abort_connections()
            raise
        else:
            if not gone:
                with shield():
                    await self._abort_connections()
        finally:
            self._factory.stopped.set()

    def _is_awaited_by_handler(self) -> bool:
        """Whether a handler waits for the task that runs."""
        this = current_task()
        seen: set[Task[Any]] = set()
        for handler in self._unended_handlers():
            task: Task[Any] | None = handler
            while task is not None and task not in seen:
                if task is this:
                    return True
                seen.add(task)
                awaited = task._waiting_on
                task = awaited.awaited_task() if isinstance(awaited, OfTask) else None
        return False

    def _unended_handlers(self) -> list[Task[Any]]:
        unended = [each.unended_handler for each in self._factory.connections]
        return [each for each in unended if each is not None]

    async def _all_gone_within(self, seconds: float) -> bool:
        """Whether all connections and handlers have ended within a time."""
        try:
            with timeout(seconds):
                await self._factory.all_gone()
        except TimeoutError:
            return not self._factory.connections
        return True

    async def _abort_connections(self) -> None:
        """Abort the connections that are left."""
        connections = self._factory.connections
        for protocol in list(connections):
            protocol.stream.abort()
        for _ in range(_LAST_TURNS):
            await sleep(0)
            if not connections:
                return
        self._give_up()

    def _give_up(self) -> None:
        """Log the handlers that are left, and do not wait for them any more."""
        tasks = self._unended_handlers()
        for protocol in list(self._factory.connections):
            self._factory.forget(protocol)
        if tasks:
            _log.warn(
                "{count} handlers have not ended though they were cancelled and their "
                "connections aborted; the server has stopped without them:\n{handlers}",
                count=len(tasks),
                handlers=describe_first(tasks),
            )
